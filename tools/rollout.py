"""Closed-loop rollouts of a world that predicts frames: tools/futures.py draws them, tools/evaluate.py measures them.

A library of these two, without a command of its own. Such a world (worlds/cosmos.py) has

    model(context [B, Tc, 3, H, W], n) -> frames [B, n, 3, H, W] in [0, 1], latents [B, n, D], of the context [B, Tc, D]
    model.encode(frames) -> [B, T, D]        model.decode(latents) -> [B, T, 3, H, W] in [0, 1]
    model.dynamics(latents [B, Tc, D], n) -> [B, n, D]: not needed; it spares training clips of the probe the painting

and settings now_frames (the context) and soon_frames (the horizon that it learned). All errors are those of pixels in
units of 0 to 1. A clip is cut at several places of its file where that is long enough; intervals are 95 % bootstrap
intervals over files, and a ratio's numerator and denominator are always of the same files.

    pictures   rollout.mp4, grid.png: truth beside prediction, with the error of every frame
    figures    MSE, MAE, PSNR, SSIM per step, in thirds of the horizon, for all clips and for each kind, beside
               persistence            the last context frame repeated
               linear extrapolation   z_T + k (z_T - z_(T-1)) in latent space, decoded
               background             per pixel the median of the context frames
               ceiling                the true future frames, encoded and decoded
    probe      where the objects are (the mean of their places), read linearly from predicted latents: R2 per step
"""

import base64
import io
import math
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 0)]

import evaluate as E
import futures as P

import VJepa_AUTO_V2 as V

SOURCES = ("model", "persistence", "linear extrapolation", "background", "ceiling")
METRICS = ("mse", "mae", "psnr", "ssim")
BATCH_VALUES = 2**25  # pixel values of the clips that go through the model at once
SSIM_FRAMES = 16  # frames whose SSIM is taken at once: they stay in the processor's cache
FILES_AT_ONCE = 4  # files per batch of the loader
R2_STEP, R2_ASKED, R2_KINDS = 10, 0.8, ("pendulum", "falling", "projectile")
R2_FLOOR = -1.0  # where charts of R2 end
STRENGTHS = 10.0 ** np.arange(-6, 3)  # of ridge regressions, per row and unit of variance


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    windows: int = 3  # clips of a file at most, evenly spread
    test_files: int = 10**6  # of each kind
    fit_files: int = 400  # training files of each kind that fit probes
    resamples: int = 1000  # bootstrap draws


FULL, QUICK = Sizes(), Sizes(windows=1, test_files=6, fit_files=24, resamples=200)

# ---------------------------------------------------------------------------------------------------------------------
# 1  Files: data root -> clips with the true state
# ---------------------------------------------------------------------------------------------------------------------


def open_source(model, data, data_root):
    """Videos of a run, {kind, root}, or those given instead -> (V.DataSource, config that names them). UsageError."""
    if not data_root and data["kind"] in ("render", "random"):
        raise V.UserError("data_root: this run was not trained on video files; give some to look at (--data_root)")
    return E.open_videos(model.cfg, E.videos_of(data, data_root), type(model))


def side_of(source, split):
    """The files of a side, by default those of test/, else the held-out ones -> (its name, [VideoFile]). UsageError for
    a side without files."""
    sides = {"train": source.train, "val": source.val, "test": source.test}
    split = split or ("test" if source.test else "val")
    if not sides[split]:
        raise V.UsageError(f"split = {split}: {source.root} has no {split}/ with videos (--split, --data_root)")
    return split, sides[split]


def kind_of(video, annotation):
    """What is seen in a video, by its first sub-folder below the side, else by its annotation; "" where nobody says."""
    folders = video.name.split("/")[:-1]
    folders = folders[1:] if folders[:1] and folders[0] in V.SIDES else folders
    return folders[0] if folders else str(annotation.get("kind") or annotation.get("maneuver") or "")


def annotation_of(video, root):
    """The annotation of a video, {} where it cannot be read: whoever reads the clip gives the reason."""
    try:
        return V.read_annotation(root, video)
    except V.BadFile:
        return {}


def by_kind(videos, root):
    """{kind: [VideoFile]}, both in the order of the names of kinds and of the list."""
    kinds = {}
    for video in videos:
        kinds.setdefault(kind_of(video, {} if "/" in video.name else annotation_of(video, root)), []).append(video)
    return dict(sorted(kinds.items()))


def thinned(videos, root, most):
    """At most so many files of each kind, evenly spread over the list -> [VideoFile]."""
    kinds = by_kind(videos, root)
    return [files[at] for files in kinds.values() for at in P.even_picks(len(files), most)]


def frames_between(start, duration, native_fps, cfg):
    """Frames at the model's rate that a file holds from a second on; all of them where clip_fps is 0."""
    rate = cfg.clip_fps or native_fps
    return max(0, int((duration - start + 0.5 / native_fps) * rate + 1e-6))


def window_starts(there, needed, most):
    """First frames of clips of `needed` frames in a file, evenly spread -> list, empty where it is too short. Another
    clip for every third of its length that is left: two that nearly agree tell no more than one."""
    if there < needed:
        return []
    count = min(most, 1 + 3 * (there - needed) // needed)
    return np.linspace(0, there - needed, count).round().astype(int).tolist() if count > 1 else [0]


def opened(video, root, cfg):
    """A video -> (annotation, plan of a clip from its start, seconds, frames per second). BadFile."""
    annotation = V.read_annotation(root, video)
    if not video.pictures:
        V.check_regular(video.path)
    plan = V.ClipPlan(2, cfg.clip_fps, cfg.height, cfg.width, 0.0, 1.0, 1.0, 0.5, 0.5, cfg.frame_fps)
    plan = V.fit_plan(plan, video, annotation)
    try:
        return annotation, plan, *V.video_timing(video.path, plan)
    except V.DECODE_ERRORS as error:  # what bindings raise on damaged files
        raise V.BadFile(f"its times cannot be read ({V.reason_of(error)})") from error


def plan_from(plan, second, num_frames, duration):
    """A plan of so many frames from a second on."""
    room = duration - num_frames / plan.fps if plan.fps else 0.0
    return replace(plan, num_frames=num_frames, u_start=float(np.clip(second / room, 0, 1)) if room > 1e-6 else 0.0)


def true_state(annotation, video):
    """The mean place of all objects of an annotation -> float64 [T, 2], NaN where unknown; None where it has no
    objects. UserError for objects that cannot be read."""
    objects = annotation.get("objects")
    if not objects:
        return None
    try:
        places = np.array([[one["x"], one["y"]] for one in objects], float)  # null becomes NaN
    except (TypeError, ValueError, LookupError) as error:
        what = "objects must be a list of {x, y}, lists of equal length"
        raise V.UserError(f"annotation of {video.name}: {what}") from error
    if places.ndim != 3 or not places.shape[2]:
        raise V.UserError(f"annotation of {video.name}: objects must hold one x and y per frame")
    return places.mean(0).T


@dataclass
class FileClips:
    """Clips of one file: frames uint8 [k, T, 3, H, W], true state [k, T, 2], NaN where unknown. bad: why there are
    none; there: how many frames there are instead."""

    number: int
    kind: str = ""
    bad: str = ""
    there: int = 0
    frames: torch.Tensor | None = None
    state: np.ndarray | None = None


def read_clips(number, video, root, cfg, needed, most):
    """Clips of `needed` frames from evenly spread places of a video -> FileClips. BadFile."""
    annotation, plan, duration, native_fps = opened(video, root, cfg)
    kind, there = kind_of(video, annotation), frames_between(0.0, duration, native_fps, cfg)
    starts = window_starts(there, needed, most)[: None if cfg.clip_fps else 1]
    if not starts:
        return FileClips(number, kind, f"{there} frames, {needed} are needed", there)
    places, frames, states = true_state(annotation, video), [], []
    for start in starts:
        own = plan_from(plan, start / (cfg.clip_fps or 1.0), needed, duration)
        frames.append(E.as_frames(V.read_frames(video.path, own, cfg.decoder)))
        states.append(np.full((needed, 2), math.nan))
        if places is not None:
            at = V.frame_times(own, duration, native_fps) - video.begin
            at *= float(annotation.get("fps") or native_fps)
            states[-1] = places[np.clip(at.astype(int), 0, len(places) - 1)]
    return FileClips(number, kind, "", there, torch.stack(frames), np.stack(states))


class Files(torch.utils.data.Dataset):
    """Item i: the clips of file i. `dataset` is the FileDataset that guards against files on which a decoder hangs."""

    def __init__(self, dataset, needed, most):
        self.dataset, self.needed, self.most = dataset, needed, most
        self.cfg = replace(dataset.cfg, num_frames=needed * most)  # by which the loader sizes its buffers

    def __len__(self):
        return len(self.dataset.videos)

    def __getitem__(self, number):
        data = self.dataset
        video = data.videos[number]
        if video.name in data.quarantine:
            return FileClips(number, bad=data.quarantine[video.name])
        try:
            with data.watch.holding(number):
                return read_clips(number, video, data.data_root, data.cfg, self.needed, self.most)
        except V.BadFile as error:
            return FileClips(number, bad=str(error))


def all_of(items):
    """The loader's batch: the items as they are."""
    return items


# ---------------------------------------------------------------------------------------------------------------------
# 2  Rollouts: clips -> errors and latents
# ---------------------------------------------------------------------------------------------------------------------


def unit(frames):
    """uint8 or float frames -> float in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def median_frame(context):
    """Context [B, Tc, 3, H, W] -> per pixel its median over time, float in [0, 1], [B, 1, 3, H, W]."""
    ordered, T = context.sort(1).values, context.shape[1]
    ordered = unit(ordered)
    return ((ordered[:, (T - 1) // 2] + ordered[:, T // 2]) / 2)[:, None]


def extrapolated(latents, num_steps):
    """Context latents [B, Tc, D] -> the straight line through the last two, its next steps [B, n, D]."""
    last, steps = latents[:, -1:], torch.arange(1, num_steps + 1, device=latents.device)
    return last + steps[None, :, None] * (last - latents[:, -2:-1])


def similarity(pictures, truth):
    """SSIM of every frame, by scikit-image with its 7 x 7 window: [N, 3, H, W] each, in [0, 1] -> float64 [N].

    The channels of some frames lie below each other in one grey picture, whose map is averaged where the window lies
    within one of them: what scikit-image averages of a single frame, in less time.
    """
    from skimage.metrics import structural_similarity

    C, H, W = truth.shape[1:]
    window = min(7, min(H, W) - 1 + min(H, W) % 2)
    edge, found = window // 2, []
    for part in zip(pictures.split(SSIM_FRAMES), truth.split(SSIM_FRAMES)):
        pages = [frames.reshape(-1, W).cpu().numpy() for frames in part]
        _, page = structural_similarity(*pages, win_size=window, data_range=1.0, full=True)
        found.append(page.reshape(-1, C, H, W)[:, :, edge : H - edge, edge : W - edge].mean((1, 2, 3), np.float64))
    return np.concatenate(found)


def frame_errors(pictures, truth):
    """[B, n, 3, H, W] each, in [0, 1] -> {mse, mae, ssim: float64 [B, n]}."""
    off = pictures - truth
    found = {"mse": off.square().mean((2, 3, 4)), "mae": off.abs().mean((2, 3, 4))}
    found = {name: values.cpu().double().numpy() for name, values in found.items()}
    found["ssim"] = similarity(pictures.flatten(0, 1), truth.flatten(0, 1)).reshape(truth.shape[:2])
    return found


@dataclass
class Rolled:
    """Clips of a side, n of them, through the model: file numbers [n], kinds [n], true state [n, T, 2], true latents
    [n, T, D], predicted and linearly extrapolated ones [n, H, D], errors {source: {metric: [n, H]}}."""

    files: np.ndarray
    kinds: np.ndarray
    state: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    linear: np.ndarray
    errors: dict = field(default_factory=dict)

    def pick(self, rows):
        """Some of the clips -> Rolled."""
        errors = {name: {metric: v[rows] for metric, v in own.items()} for name, own in self.errors.items()}
        arrays = (self.files, self.kinds, self.state, self.true, self.predicted, self.linear)
        return Rolled(*(array[rows] for array in arrays), errors)


@torch.no_grad()
def roll(model, frames, horizon, with_errors):
    """Frames uint8 [B, T, 3, H, W] -> (predicted frames, {true, predicted, linear: latents on the CPU}, errors). The
    first T - horizon frames are the context."""
    frames = frames.to(next(model.parameters()).device)
    context, future, errors, pictures = frames[:, :-horizon], frames[:, -horizon:], {}, None
    if not with_errors and hasattr(model, "dynamics"):
        seen = model.encode(context)
        predicted = model.dynamics(seen, horizon)
    else:
        pictures, predicted, seen = model(context, horizon)
    ahead, linear = model.encode(future), extrapolated(seen, horizon)
    latents = {"true": torch.cat([seen, ahead], 1), "predicted": predicted, "linear": linear}
    if with_errors:
        truth, last = unit(future), unit(context[:, -1:])
        shown = (pictures, last, model.decode(linear), median_frame(context), model.decode(ahead))
        for name, own in zip(SOURCES, shown):
            errors[name] = frame_errors(own.float().expand_as(truth), truth)
    return pictures, {name: values.float().cpu().numpy() for name, values in latents.items()}, errors


class Gathering:
    """What is left of the files of a side: Rolled, the reasons of files without clips, a few clips to show."""

    def __init__(self, with_errors, most_shown=0):
        self.with_errors, self.most_shown = with_errors, most_shown
        self.rows, self.left_out, self.there, self.shown = [], {}, [], {}

    def take(self, item, video):
        """Note a file that has no clips -> whether it has some."""
        if item.bad:
            self.left_out[video.name] = item.bad
            self.there += [item.there] * bool(item.there)
        return not item.bad

    def add(self, model, items, horizon, names):
        """Clips of some files through the model, in batches."""
        frames, counts = torch.cat([item.frames for item in items]), [len(item.frames) for item in items]
        files = np.repeat([item.number for item in items], counts)
        kinds = np.repeat(np.array([item.kind for item in items], object), counts)
        state, size = np.concatenate([item.state for item in items]), max(1, BATCH_VALUES // frames[0].numel())
        for first in range(0, len(frames), size):
            part = slice(first, first + size)
            pictures, latents, errors = roll(model, frames[part], horizon, self.with_errors)
            self.rows.append(Rolled(files[part], kinds[part], state[part], *latents.values(), errors))
            for at in range(len(pictures) if self.most_shown else 0):  # the first clip of every kind
                kind, number = kinds[first + at], files[first + at]
                if len(self.shown) < self.most_shown and kind not in self.shown:
                    self.shown[kind] = names[number], frames[first + at], pictures[at].cpu()

    def whole(self):
        """All clips -> Rolled, None for none."""
        if not self.rows:
            return None
        arrays = zip(*((row.files, row.kinds, row.state, row.true, row.predicted, row.linear) for row in self.rows))
        errors = {
            name: {metric: np.concatenate([row.errors[name][metric] for row in self.rows]) for metric in own}
            for name, own in self.rows[0].errors.items()
        }
        return Rolled(*(np.concatenate(parts) for parts in arrays), errors)


def gather(model, source, cfg, side, videos, horizon, sizes, num_workers, progress, with_errors):
    """The clips of a side's files through the model -> Gathering."""
    data = source.dataset(cfg, side)
    data.videos = videos
    found = Gathering(with_errors, 4 if with_errors else 0)
    clips = Files(data, cfg.now_frames + horizon, sizes.windows)
    progress.stage(f"{side} videos", len(videos))
    names = [video.name for video in videos]
    for items in E.open_loader(clips, len(videos), FILES_AT_ONCE, num_workers, all_of):
        good = [item for item in items if found.take(item, videos[item.number])]
        if good:
            found.add(model, good, horizon, names)
        progress.step(len(items))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 3  Statistics: errors of clips -> values with intervals over files
# ---------------------------------------------------------------------------------------------------------------------


class Resampling:
    """Bootstrap over files: clips of one file are drawn together. `weights` [R, F]: how often each file is drawn."""

    def __init__(self, files, num, seed=0):
        names, self.place = np.unique(files, return_inverse=True)
        count = len(names)
        self.files = count
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), num if count > 1 else 0)
        self.weights = draws.astype(float)

    def sums(self, values):
        """Values of clips [n, ...] -> (their sum [...], sums of resampled files [R, ...])."""
        own = np.zeros((self.files, *values.shape[1:]))
        np.add.at(own, self.place, values)
        return own.sum(0), np.tensordot(self.weights, own, 1)


def interval(drawn):
    """Values of resamples [R, ...] -> 95 % interval (low [...], high [...]), None without resamples. A value that is
    not finite counts as larger than all others."""
    if not len(drawn):
        return None
    ordered = np.sort(np.where(np.isfinite(drawn), drawn, math.inf), 0)
    return ordered[int(0.025 * (len(drawn) - 1))], ordered[math.ceil(0.975 * (len(drawn) - 1))]


def divided(part, whole):
    """part / whole, NaN where whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, np.full(np.broadcast(part, whole).shape, math.nan), where=whole != 0)


def mean_of(values, draw):
    """Mean over clips [n, ...] -> (value [...], resampled values [R, ...])."""
    (total, totals), (count, counts) = draw.sums(values), draw.sums(np.ones((len(values), *[1] * (values.ndim - 1))))
    return total / count, divided(totals, counts)


def ratio_of(part, whole, draw):
    """Mean over mean of clips [n, ...] each, over the same files -> (value, resampled values)."""
    (a, many_a), (b, many_b) = draw.sums(part), draw.sums(whole)
    return divided(a, b), divided(many_a, many_b)


def psnr(mse):
    """Of a mean squared error in units of 0 to 1 -> dB, at most 100."""
    return -10 * np.log10(np.maximum(mse, 1e-10))


def spans_of(horizon):
    """Thirds of a horizon -> {"1-10": slice(0, 10), ...}, fewer for a horizon below 3."""
    parts = [part for part in np.array_split(np.arange(horizon), 3) if len(part)]
    return {f"{part[0] + 1}-{part[-1] + 1}": slice(part[0], part[-1] + 1) for part in parts}


def metric_of(metric, own, draw, steps=None):
    """A metric of one source, {metric: [n, H]} -> (value, (low, high) or None) per step, or of the mean over `steps`.

    PSNR is that of the mean squared error: the mean of PSNR is infinite as soon as one frame is right to the bit.
    """
    values = own["mse" if metric == "psnr" else metric]
    value, drawn = mean_of(values if steps is None else values[:, steps].mean(1), draw)
    return (psnr(value), interval(psnr(drawn))) if metric == "psnr" else (value, interval(drawn))


def r2_of(truth, read, draw):
    """Places [n, H, 2] and what is read of them -> (R2 per step [H], resampled [R, H]): the mean of x and y, each
    against its mean over the clips at that step."""
    (n, many), (left, lefts) = draw.sums(np.ones((len(truth), 1, 1))), draw.sums((truth - read) ** 2)
    centred = truth - truth.mean(0)  # the variance of a resample is then a small difference of small numbers
    (first, firsts), (second, seconds) = draw.sums(centred), draw.sums(centred**2)
    found = []
    for error, one, two, count in ((left, first, second, n), (lefts, firsts, seconds, many)):
        spread = two - divided(one**2, count)
        found.append((1 - divided(error, np.where(spread > 1e-9 * count, spread, 0))).mean(-1))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# 4  Probe: latents -> where the objects are
# ---------------------------------------------------------------------------------------------------------------------


def solved(rows, values, strengths):
    """Ridge regressions of centred rows [m, D] on centred values [m, 2] -> weights [len(strengths), D, 2]."""
    roots, basis = np.linalg.eigh(rows.T @ rows)
    target = basis.T @ (rows.T @ values)
    return np.stack([basis @ (target / (roots[:, None].clip(0) + strength * len(rows))) for strength in strengths])


def fit_probe(latents, places, files):
    """A linear map from latents [n, T, D] to places [n, T, 2] -> function of latents [..., D]. Its strength is the best
    on every fifth file, and then all files fit it."""
    rows, values = latents.reshape(-1, latents.shape[-1]).astype(float), places.reshape(-1, 2)
    mean, scale, centre = rows.mean(0), rows.std(0) + 1e-6, values.mean(0)
    rows, values = (rows - mean) / scale, values - centre
    held, strength = np.repeat(np.unique(files, return_inverse=True)[1] % 5 == 4, latents.shape[1]), STRENGTHS[3]
    if held.any():
        tried = solved(rows[~held], values[~held], STRENGTHS)
        strength = STRENGTHS[np.argmin([np.square(rows[held] @ weights - values[held]).sum() for weights in tried])]
    return Probe(mean, scale, solved(rows, values, [strength])[0], centre)


@dataclass
class Probe:
    """places = (latents - mean) / scale @ weights + centre."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    centre: np.ndarray

    def __call__(self, latents):
        """[..., D] -> [..., 2]."""
        return (latents - self.mean) / self.scale @ self.weights + self.centre


READERS = {  # what is held against the true place -> in words
    "model": "read from predicted latents by a probe fitted on predicted latents of training files",
    "probe of true latents": "read from predicted latents by a probe fitted on encoded true frames",
    "ceiling": "read by that probe from the encoded true frames themselves",
    "standing still": "the true place in the last context frame",
    "linear extrapolation": "read by that probe from linearly extrapolated latents",
}


def read_places(fit, test, horizon):
    """Probes fitted on training clips, applied to test clips of the same kind (Rolled each) -> {reader: places
    [n, H, 2]}."""
    ahead = slice(fit.state.shape[1] - horizon, None)
    own = fit_probe(fit.predicted, fit.state[:, ahead], fit.files)
    plain = fit_probe(fit.true, fit.state, fit.files)
    still = np.repeat(test.state[:, -horizon - 1 : -horizon], horizon, 1)
    read = (own(test.predicted), plain(test.predicted), plain(test.true[:, ahead]), still, plain(test.linear))
    return dict(zip(READERS, read))


def known(rolled):
    """The clips whose true state is known in every frame -> Rolled."""
    return rolled.pick(np.isfinite(rolled.state).all((1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# 5  Evaluation: model -> figures
# ---------------------------------------------------------------------------------------------------------------------


def plain(value):
    """Arrays and tuples of a nested value as lists."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (np.ndarray, list, tuple)) else value


def judged(value, span, n, reading, controls, passed, asked):
    """A figure with a threshold of its own: whether it is met is decided by whoever calls."""
    entry = E.make_figure("", float(value), span, n, controls, reading=reading)
    if entry["value"] is None or passed is None:
        return {**entry, "expect": asked}
    verdict = f"{value:.3g} is {'good' if passed else 'not good enough'}, {asked} is asked for"
    return {**entry, "expect": asked, "passed": bool(passed), "reading": f"{reading}; {verdict}."}


def error_figures(rolled, kind, draw, spans):
    """Errors in thirds of the horizon and their ratios to the baselines -> {figure: entry}."""
    figures, of = {}, "all clips" if kind == "all" else f"clips of kind {kind}"
    for name, steps in spans.items():
        for metric in METRICS:
            found = {source: metric_of(metric, own, draw, steps) for source, own in rolled.errors.items()}
            value, around = found["model"]
            beside = {source: float(found[source][0]) for source in SOURCES[1:]}
            reading = f"{metric.upper()} of the predicted frames, {of}, steps {name}, pixels in units of 0 to 1"
            entry = E.make_figure("", float(value), plain(around), len(rolled.files), beside, reading=reading)
            figures[f"{metric}.{kind}.{name}"] = entry
        for source in SOURCES[1:]:
            pair = (rolled.errors[which]["mse"][:, steps].mean(1) for which in ("model", source))
            value, drawn = ratio_of(*pair, draw)
            around, must = interval(drawn), source in ("persistence", "linear extrapolation")
            reading = f"MSE of the prediction over that of {source}, {of}, steps {name}: below 1 the model is better"
            passed = around[1] < 1 if must and around is not None and math.isfinite(value) else None
            args = float(value), plain(around), len(rolled.files), reading, {}, passed
            figures[f"ratio to {source}.{kind}.{name}"] = judged(*args, "interval below 1" if must else None)
    return figures


def error_curves(rolled, draw):
    """Metrics per step -> {metric: {source: {value, low, high: [H]}}}."""
    curves = {}
    for metric in METRICS:
        curves[metric] = {}
        for source, own in rolled.errors.items():
            value, around = metric_of(metric, own, draw)
            low, high = around or (np.full_like(value, math.nan),) * 2
            curves[metric][source] = {"value": value, "low": np.minimum(low, high), "high": np.maximum(low, high)}
    return curves


def probe_kind(fit, test, kind, horizon, resamples, seed):
    """R2 of the place for one kind -> ({figure: entry}, {reader: {value, low, high: [H]}})."""
    draw, truth, curves = Resampling(test.files, resamples, seed), test.state[:, -horizon:], {}
    for reader, places in read_places(fit, test, horizon).items():
        value, drawn = r2_of(truth, places, draw)
        lows = interval(-drawn)  # what is not finite is as bad as can be
        low, high = (np.full(horizon, math.nan),) * 2 if lows is None else (-lows[1], -lows[0])
        curves[reader] = {"value": value, "low": low, "high": high}
    figures = {}
    for step in sorted({1, R2_STEP, *(steps.stop for steps in spans_of(horizon).values())}):
        if step > horizon:
            continue
        found = {reader: {key: float(v[step - 1]) for key, v in own.items()} for reader, own in curves.items()}
        own = found["model"]
        beside = {reader: found[reader]["value"] for reader in READERS if reader != "model"}
        reading = f"R2 of the objects' mean place at step {step}, kind {kind}, {READERS['model']}"
        asked = f">= {R2_ASKED:g}" if step == R2_STEP and kind in R2_KINDS else None
        passed = own["value"] >= R2_ASKED if asked else None
        args = own["value"], [own["low"], own["high"]], len(test.files), reading, beside, passed, asked
        figures[f"position R2.{kind}.{step}"] = judged(*args)
    return figures, curves


def probe_figures(fit, test, kinds, horizon, sizes, seed):
    """R2 of the place for every kind -> (figures, {kind: curves}, why kinds are left out [line])."""
    figures, curves, why = {}, {}, []
    for kind in kinds:
        own, mine = (known(rolled.pick(rolled.kinds == kind)) for rolled in (fit, test))
        if len(np.unique(own.files)) < 2 or len(np.unique(mine.files)) < 2:
            counts = f"{len(np.unique(own.files))} training and {len(np.unique(mine.files))} test files"
            why.append(f"{kind or 'all'}: {counts} have the places of their objects in annotations/, two are needed")
            continue
        more, curves[kind or "all"] = probe_kind(own, mine, kind or "all", horizon, sizes.resamples, seed)
        figures |= more
    return figures, curves, why


def nothing_left(source, side, found, cfg, horizon):
    """UserError for a side of which no file gives a clip."""
    needed = cfg.now_frames + horizon
    if found.there and len(found.there) == len(found.left_out):
        have = (
            f"have {min(found.there)} to {max(found.there)}" if len(set(found.there)) > 1 else f"have {found.there[0]}"
        )
        rate = f" at {cfg.clip_fps:g} per second" if cfg.clip_fps else ""
        what = f"all files of {side} are too short: they {have} frames{rate}, {needed} are needed"
        raise V.UserError(f"data_root {source.root}: {what} (context {cfg.now_frames} + horizon {horizon})")
    first = "; ".join(next(iter(found.left_out.items())))
    raise V.UserError(f"data_root {source.root}: no file of {side} gives a clip; the first: {first}")


def fit_side(model, source, cfg, horizon, sizes, num_workers, progress):
    """Training files through the model, for probes -> (Rolled or None, why not)."""
    if not source.held_out:
        return None, "the only file serves for training and test"
    videos = thinned(source.train, source.root, sizes.fit_files)
    if not any(annotation_of(video, source.root).get("objects") for video in videos[:: max(1, len(videos) // 16)]):
        return None, f"annotations/ of {source.root} does not say where the objects are (objects: [{{x, y}}])"
    found = gather(model, source, cfg, "train", videos, horizon, sizes, num_workers, progress, False)
    return found.whole(), "no training file gives a clip that is long enough"


def evaluate(model, cfg, source, split="", sizes=FULL, horizon=0, seed=0, num_workers=2, progress=None):
    """Measure a world that predicts frames -> (content of evaluation.json, less checkpoint and step; clips to show).

    horizon: steps to predict, 0 for those that it learned. UserError where no file of the side gives a clip.
    """
    progress, horizon = progress or E.Progress(quiet=True), horizon or cfg.soon_frames
    E.need("skimage")
    model.eval()
    side, videos = side_of(source, split)
    cut = thinned(videos, source.root, sizes.test_files)
    found = gather(model, source, cfg, side, cut, horizon, sizes, num_workers, progress, True)
    test = found.whole()
    if test is None:
        raise nothing_left(source, side, found, cfg, horizon)
    fit, why = fit_side(model, source, cfg, horizon, sizes, num_workers, progress)
    progress.stage("figures")
    kinds = sorted(set(test.kinds))
    named = ["all", *kinds] if len(kinds) > 1 or kinds[0] else ["all"]
    figures, curves, counts = {}, {"step": list(range(1, horizon + 1))}, {}
    for kind in named:
        own = test if kind == "all" else test.pick(test.kinds == kind)
        draw = Resampling(own.files, sizes.resamples, seed)
        figures |= error_figures(own, kind, draw, spans_of(horizon))
        curves[kind] = error_curves(own, draw)
        counts[kind] = {"files": draw.files, "clips": len(own.files)}
    probes = {"left_out": [why]}
    if fit is not None:
        more, curves["position R2"], left_out = probe_figures(fit, test, kinds, horizon, sizes, seed)
        figures, probes = figures | more, {"left_out": left_out, "clips": len(fit.files)}
    progress.close()
    met = [figure["passed"] for figure in figures.values() if figure["passed"] is not None]
    data = {"kind": "videos", "root": source.root, "split": side, "counts": counts, "left_out": found.left_out}
    report = {"data": data, "context": cfg.now_frames, "horizon": horizon, "learned": cfg.soon_frames, "seed": seed}
    report |= {"sizes": asdict(sizes), "units": "errors of pixels in units of 0 to 1", "figures": figures}
    report |= {"probe": probes, "controls_must_fail": {}, "curves": curves}
    report["summary"] = f"{sum(met)} of {len(met)} thresholds met"
    return E.without_nan(plain(report)), found.shown


# ---------------------------------------------------------------------------------------------------------------------
# 6  Pictures: clips -> rollout.mp4, grid.png
# ---------------------------------------------------------------------------------------------------------------------

PANEL, CELL, GAP, HEAD, CURVE = (
    336,
    84,
    16,
    66,
    116,
)  # pixels: sides of panels and cells, distances, height of the curve
GREY, HOLD = (214, 214, 214), 6  # where there is no truth; how often the last picture of a clip is shown again
NO_TRUTH = "no truth: the file has ended"


@dataclass
class Exhibit:
    """A clip to show: true frames uint8 [t, H, W, 3], context first, t at most context + n; predicted ones
    [n, H, W, 3]; errors {mse, mae, still mse, still mae: [n]}, NaN without truth. fps 0: times are not known."""

    title: str
    frames: np.ndarray
    pictures: np.ndarray
    errors: dict
    context: int
    fps: float

    @property
    def steps(self):
        """How many frames are predicted."""
        return len(self.pictures)

    @property
    def height(self):
        return self.frames.shape[1]

    @property
    def width(self):
        return self.frames.shape[2]

    def time_of(self, step):
        """'+0.50 s' after the last context frame, for a step counted from 0 (below 0: in the context)."""
        return f"{(step + 1) / self.fps:{'+' if step != -1 else ''}.2f} s" if self.fps else f"frame {step + 1:+d}"

    def truth(self, frame):
        """The true picture at a frame of context and horizon, None where the file has ended."""
        return self.frames[frame] if frame < len(self.frames) else None


def as_pictures(frames):
    """[T, 3, H, W] -> uint8 [T, H, W, 3]."""
    frames = unit(frames).clamp(0, 1) * 255
    return frames.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_exhibit(title, frames, pictures, cfg):
    """Frames uint8 [t, 3, H, W], context first, and predicted ones [n, 3, H, W] in [0, 1] -> Exhibit."""
    n, future, pictures = len(pictures), unit(frames[cfg.now_frames :]), pictures.float().cpu()
    errors, still = {}, unit(frames[cfg.now_frames - 1 : cfg.now_frames])
    for name, shown in (("", pictures[: len(future)]), ("still ", still)):
        off = (shown - future).double()
        for metric, values in (("mse", off.square()), ("mae", off.abs())):
            errors[name + metric] = np.full(n, math.nan)
            errors[name + metric][: len(future)] = values.mean((1, 2, 3)).numpy()
    return Exhibit(title, as_pictures(frames), as_pictures(pictures), errors, cfg.now_frames, cfg.clip_fps)


def fitting(draw, text, width, font):
    """A text that is no wider, its middle left out where it must be."""
    keep = len(text)
    while keep > 8 and draw.textlength(text, font=font) > width:
        keep -= 1
        text = f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}"
    return text


def draw_empty(draw, place, size, text=NO_TRUTH):
    """A grey panel that says why nothing is shown."""
    x, y = place
    draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=GREY)
    V.draw_text(draw, text, (x + 6, y + size[1] / 2 - 9), size[0] - 12, P.font(13), 17, P.INK)


def draw_curve(draw, box, exhibit, shown):
    """The error of the first `shown` steps as a curve, beside that of the last context frame repeated."""
    left, top, right, bottom = box
    lines = (("still mse", P.QUIET), ("mse", P.COLOURS["sample"]))
    known = np.concatenate([exhibit.errors[name] for name, _ in lines])
    highest = float(np.nanmax(known)) if np.isfinite(known).any() else 1.0
    draw.rectangle(box, outline=(190, 190, 190))
    draw.text((left + 6, top + 3), f"MSE, up to {highest:.2g}:", fill=P.INK, font=P.font(12))
    draw.text((left + 120, top + 3), "prediction", fill=P.COLOURS["sample"], font=P.font(12))
    draw.text((left + 190, top + 3), "last frame repeated", fill=P.QUIET, font=P.font(12))
    for name, colour in lines:
        points = []
        for step, value in enumerate(exhibit.errors[name][: max(shown, 0)]):
            if math.isfinite(value):
                x = left + (right - left) * (step + 1) / exhibit.steps
                points.append((x, bottom - 2 - (bottom - top - 22) * value / max(highest, 1e-12)))
        if len(points) > 1:
            draw.line(points, fill=colour, width=3 if name == "mse" else 2)
        for x, y in points[-1:]:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def error_line(exhibit, step):
    """What the numbers of a page say at a step -> text."""
    if step < 0:
        return f"The model sees {exhibit.context} context frames; the next {exhibit.steps} are predicted."
    mse, still = exhibit.errors["mse"][step], exhibit.errors["still mse"][step]
    where = f"Step {step + 1} of {exhibit.steps}"
    return f"{where}:  {NO_TRUTH}" if math.isnan(mse) else f"{where}:  MSE {mse:.5f}, last frame repeated {still:.5f}"


def rollout_page(exhibit, frame):
    """One picture of rollout.mp4, truth beside prediction, at a frame of context and horizon -> uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw

    step, size = frame - exhibit.context, P.panel_size(exhibit, PANEL)
    wide = max(2 * size[0] + 3 * GAP, 560)
    page = Image.new("RGB", (wide, HEAD + 22 + size[1] + 34 + CURVE + GAP), P.PAPER)
    draw, line = ImageDraw.Draw(page), wide - 2 * GAP
    clock = ("CONTEXT" if step < 0 else "PREDICTED") + f"  {exhibit.time_of(step)}"
    room = draw.textlength(clock, font=P.font(17))
    draw.text((wide - GAP - room, 9), clock, fill=P.INK, font=P.font(17))
    draw.text((GAP, 9), fitting(draw, exhibit.title, line - room - GAP, P.font(17)), fill=P.INK, font=P.font(17))
    total = exhibit.context + exhibit.steps
    split, here = GAP + line * exhibit.context // total, GAP + line * (frame + 1) // total
    for end, colour in ((GAP + line, (225, 225, 225)), (here, P.COLOURS["sample"]), (min(split, here), P.INK)):
        draw.rectangle((GAP, 40, end, 44), fill=colour)
    top, badge, truth = HEAD + 22, "context" if step < 0 else "", exhibit.truth(frame)
    empty = np.full((1, 1, 3), GREY, np.uint8)
    shown = ("Truth", P.COLOURS["truth"], truth), ("Prediction", P.COLOURS["sample"], exhibit.pictures[max(step, 0)])
    for number, (title, colour, picture) in enumerate(shown):
        place = GAP + number * (size[0] + GAP), top
        picture = truth if step < 0 else picture
        P.draw_panel(draw, page, place, size, title, colour, empty if picture is None else picture, badge)
        if picture is None:
            draw_empty(draw, place, size)
    draw.text((GAP, top + size[1] + 8), error_line(exhibit, step), fill=P.INK, font=P.font(15))
    below = top + size[1] + 34
    draw_curve(draw, (GAP, below, wide - GAP, below + CURVE), exhibit, step + 1)
    return np.asarray(page)


class Pages:
    """All pictures of rollout.mp4, drawn one by one as V.write_video asks for them: clip after clip, with a short stay
    on the last picture of each."""

    def __init__(self, exhibits):
        self.exhibits = exhibits
        count = sum(exhibit.context + exhibit.steps + HOLD for exhibit in exhibits)
        self.shape = count, *rollout_page(exhibits[0], 0).shape

    def __iter__(self):
        for exhibit in self.exhibits:
            for frame in range(exhibit.context + exhibit.steps):
                page = rollout_page(exhibit, frame)
                yield page
            for _ in range(HOLD):
                yield page


def write_rollout(path, exhibits):
    """rollout.mp4: a picture per frame, at half the clips' speed, 4 to 15 per second."""
    video = io.BytesIO()
    V.write_video(video, Pages(exhibits), int(np.clip(round(exhibits[0].fps / 2), 4, 15)), V.MARK)
    V.write_own(path, lambda handle: handle.write(video.getvalue()))


def draw_cell(draw, page, place, size, picture, note=""):
    """One picture of the grid, grey where there is none, and a note under it."""
    if picture is None:
        draw_empty(draw, place, size, "no truth")
    else:
        page.paste(P.scaled(picture, size), place)
        draw.rectangle((*place, place[0] + size[0] - 1, place[1] + size[1] - 1), outline=GREY)
    x = place[0] + (size[0] - draw.textlength(note, font=P.font(11))) / 2
    draw.text((x, place[1] + size[1] + 2), note, fill=P.QUIET, font=P.font(11))


def draw_grid(exhibits, title):
    """grid.png: rows truth and prediction of every clip; columns the last two context frames and up to eight steps, the
    MSE under each predicted frame -> image."""
    size, gap, label, head, below = P.panel_size(exhibits[0], CELL), 5, 100, 62, 18
    context = [step for step in (-2, -1) if step >= -exhibits[0].context]
    columns, block = context + P.even_picks(exhibits[0].steps, 8), 22 + 2 * size[1] + gap + below + 8
    page, draw = P.new_page(label + len(columns) * (size[0] + gap) + 20, head + len(exhibits) * block, title)
    places = [label + number * (size[0] + gap) + 8 * (step >= 0) for number, step in enumerate(columns)]
    for x, step in zip(places, columns):
        for line, text in enumerate(("context" if step < 0 else f"step {step + 1}", exhibits[0].time_of(step))):
            text_x = x + (size[0] - draw.textlength(text, font=P.font(11))) / 2
            draw.text((text_x, head - 26 + 13 * line), text, fill=P.INK, font=P.font(11))
    for row, exhibit in enumerate(exhibits):
        top = head + row * block
        name = fitting(draw, exhibit.title, page.width - 24, P.font(13))
        draw.text((12, top + 4), name, fill=P.INK, font=P.font(13))
        for number, colour in enumerate((P.COLOURS["truth"], P.COLOURS["sample"])):
            y = top + 22 + number * (size[1] + gap)
            P.draw_label(draw, y, size[1], ("Truth", "Prediction")[number], colour, P.QUIET)
            for x, step in zip(places, columns):
                if number == 0 or step < 0:
                    draw_cell(draw, page, (x, y), size, exhibit.truth(exhibit.context + step))
                else:
                    mse = exhibit.errors["mse"][step]
                    note = "" if math.isnan(mse) else f"{mse:.5f}"
                    draw_cell(draw, page, (x, y), size, exhibit.pictures[step], note)
    return page


# ---------------------------------------------------------------------------------------------------------------------
# 7  tools/futures.py rollout
# ---------------------------------------------------------------------------------------------------------------------

LIMITS = {"num_predict": (1, 10**4), "start": (0, 10**7), "num_clips": (1, 64), "seed": (0, 10**6)}


def parse(argv):
    """Flags of `futures.py rollout` -> namespace. UsageError in one line."""
    about = "Roll a world that predicts frames out, closed loop, and show truth beside prediction."
    parser = V.ArgumentParser(prog="futures.py rollout", description=about, allow_abbrev=False)
    path, flag = dict(default="", type=os.path.expanduser), parser.add_argument
    flag("--ckpt", required=True, type=os.path.expanduser, help="checkpoint of a run")
    flag("--num_predict", type=int, help="steps to predict [the horizon that it learned]")
    flag("--clip", **path, help="show this video instead of clips of the run's own data")
    flag("--start", type=float, default=0.0, help="where clips begin in their files, in seconds [0]")
    flag("--num_clips", type=int, default=4, help="clips shown, of every kind in turn [4]")
    flag("--data_root", **path, help="folder, video or list to take clips from [the run's own data]")
    flag("--split", choices=V.SIDES, help="which side of them [test where there is one, else val]")
    flag("--out", **path, help="output folder [the run's folder / rollout]")
    flag("--seed", type=int, default=0, help="which clips are shown [0]")
    flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    E.check_limits(args, LIMITS)
    E.need("PIL")
    return args


def read_clip(video, root, start, most, cfg):
    """The frames of a video from a second on, at most so many -> uint8 [t, 3, H, W]. BadFile where the context is not
    filled."""
    _, plan, duration, native_fps = opened(video, root, cfg)
    there = min(frames_between(start if cfg.clip_fps else 0.0, duration, native_fps, cfg), most)
    if there < cfg.now_frames:
        rate = f" at {cfg.clip_fps:g} per second" if cfg.clip_fps else ""
        where = f" from {start:g} s on (--start)" if start else ""
        raise V.BadFile(f"{there} frames{rate}{where}, the context alone needs {cfg.now_frames}")
    plan = plan_from(plan, start, there, duration)
    return E.as_frames(V.read_frames(video.path, plan, cfg.decoder))


def in_turn(videos, root, seed):
    """All videos, one of each kind after another, drawn by the seed within a kind -> list."""
    rng = np.random.default_rng(seed)
    queues = [[files[at] for at in rng.permutation(len(files))] for files in by_kind(videos, root).values()]
    return [files[turn] for turn in range(max(map(len, queues))) for files in queues if turn < len(files)]


def pick_clips(source, cfg, split, num_clips, start, most, seed):
    """Clips of a side of the data -> (side, [(title, frames uint8 [t, 3, H, W])]). Those whose files fill context and
    horizon come first; UserError where none fills the context."""
    side, videos = side_of(source, split)
    found, reasons = [], []
    for video in in_turn(videos, source.root, seed):
        try:
            found.append((video.name, read_clip(video, source.root, start, most, cfg)))
        except V.BadFile as error:
            reasons.append(f"{video.name}: {error}")
        if sum(len(frames) == most for _, frames in found) == num_clips or len(found) == 8 * num_clips:
            break
    if not found:
        raise V.UserError(f"data_root {source.root}: no file of {side} can be shown; the first: {reasons[0]}")
    if reasons:
        V.say(f"note: {len(reasons)} files are left out; the first: {reasons[0]}", sys.stderr)
    found.sort(key=lambda clip: -len(clip[1]))  # stable: the kinds stay in turn
    return side, found[:num_clips]


def own_clip(path, start, most, cfg):
    """The user's video -> [(name, frames uint8 [t, 3, H, W])]."""
    if not os.path.isfile(path):
        raise V.UsageError(f"clip {path}: no such file")
    try:
        return [(os.path.basename(path), read_clip(V.VideoFile(os.path.basename(path), path), "", start, most, cfg))]
    except V.BadFile as error:
        raise V.UserError(f"clip {path}: {error}") from error


@torch.no_grad()
def exhibits_of(model, cfg, clips, num_predict):
    """Clips [(title, frames)] through the model, one by one -> [Exhibit]."""
    shown, device = [], next(model.parameters()).device
    for title, frames in clips:
        pictures = model(frames[None, : cfg.now_frames].to(device), num_predict)[0][0]
        shown.append(make_exhibit(title, frames, pictures, cfg))
    return shown


def print_errors(exhibits, what, num_predict, cfg):
    """Mean errors of all predicted frames that have a truth, beside those of standing still."""
    learned = "" if num_predict == cfg.soon_frames else f" ({cfg.soon_frames} were learned)"
    V.say(f"{what}: {num_predict} steps{learned} from {cfg.now_frames} context frames, pixels in units of 0 to 1")
    values = {name: np.concatenate([exhibit.errors[name] for exhibit in exhibits]) for name in exhibits[0].errors}
    there = int(np.isfinite(values["mse"]).sum())
    if not there:
        V.say("the files end with the context: there is no truth to compare with")
        return
    V.say(f"{f'mean of {there} frames':<28}{'MSE':>10}{'MAE':>10}")
    for name, key in (("prediction", ""), ("last context frame repeated", "still ")):
        V.say(f"{name:<28}{np.nanmean(values[key + 'mse']):>10.5f}{np.nanmean(values[key + 'mae']):>10.5f}")


def open_model(path, device):
    """A checkpoint of a world that predicts frames -> (model, config, {step, data}). UserError for another world."""
    model, cfg, about = E.load_world(path, device)
    if not E.predicts_frames(model):
        what = f"the world {type(model).__name__} predicts no frames (it has no encode and decode)"
        if isinstance(model, V.VJepaAutoV2):
            what = f"VJepaAutoV2 predicts latents, not frames; see them with: python tools/futures.py --ckpt {path}"
        raise V.UserError(f"ckpt {path}: {what}")
    return model, cfg, about


def show(args):
    """Open the run, roll clips out, print errors, write the pictures -> their paths."""
    model, cfg, about = open_model(args.ckpt, args.device)
    num_predict = args.num_predict or cfg.soon_frames
    most = cfg.now_frames + num_predict
    if args.clip:
        side, clips = "clip", own_clip(args.clip, args.start, most, cfg)
    else:
        source, cfg = open_source(model, about["data"], args.data_root)
        side, clips = pick_clips(source, cfg, args.split, args.num_clips, args.start, most, args.seed)
    out = P.output_folder(args, "rollout")
    exhibits = exhibits_of(model, cfg, clips, num_predict)
    what = clips[0][0] if args.clip else f"{len(clips)} clips of {side}"
    print_errors(exhibits, what, num_predict, cfg)
    write_rollout(out / "rollout.mp4", exhibits)
    V.save_picture(draw_grid(exhibits, f"Truth and prediction, MSE below; {side}"), out / "grid.png")
    return [out / "rollout.mp4", out / "grid.png"]


# ---------------------------------------------------------------------------------------------------------------------
# 8  tools/evaluate.py: evaluation.html and the command
# ---------------------------------------------------------------------------------------------------------------------


def table(head, rows):
    """Titles and rows of texts -> <table>; the first column is a name."""
    cells = ["".join(f"<th>{E.safe(text)}</th>" for text in head)]
    for name, *values in rows:
        numbers = "".join(f'<td class="num">{E.safe(text)}</td>' for text in values)
        cells.append(f"<td>{E.safe(name)}</td>{numbers}")
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def number(value):
    """A number for the page, a dash for none; four digits, for ratios near 1."""
    return "-" if value is None else f"{value:.4g}"


def with_interval(value, around):
    """0.012 [0.011, 0.013]."""
    return number(value) + (f" [{number(around[0])}, {number(around[1])}]" if around else "")


def error_tables(report):
    """One table per metric, and one of the ratios -> HTML."""
    parts, counts = [], report["data"]["counts"]
    places = [(kind, name) for kind in counts for name in spans_of(report["horizon"])]
    for metric in METRICS:
        rows = []
        for kind, name in places:
            entry = report["figures"][f"{metric}.{kind}.{name}"]
            beside = [number(entry["controls"][source]) for source in SOURCES[1:]]
            rows.append((f"{kind}, {name}", with_interval(entry["value"], entry["interval"]), *beside))
        parts.append(f"<h3>{metric.upper()}</h3>{table(('clips, steps', *SOURCES), rows)}")
    rows = []
    for kind, name in places:
        entries = [report["figures"][f"ratio to {source}.{kind}.{name}"] for source in SOURCES[1:]]
        rows.append((f"{kind}, {name}", *(with_interval(entry["value"], entry["interval"]) for entry in entries)))
    head = ("clips, steps", *(f"to {source}" for source in SOURCES[1:]))
    return "".join([f"<h3>MSE of the model over that of a baseline</h3>{table(head, rows)}", *parts])


def place_table(report):
    """R2 of the place at some steps -> HTML, "" without probes."""
    rows = []
    for name, entry in report["figures"].items():
        if name.startswith("position R2."):
            _, kind, step = name.split(".")
            beside = [number(value) for value in entry["controls"].values()]
            rows.append((f"{kind}, step {step}", with_interval(entry["value"], entry["interval"]), *beside))
    return table(("kind", *READERS), rows) if rows else ""


def error_chart(steps, curves, kind):
    """MSE per step of the model and its baselines -> <figure>. Linear extrapolation is drawn up to twice the highest
    of the others."""
    series = {source: own["value"] for source, own in curves["mse"].items()}
    kept = [value for name, values in series.items() if name != "linear extrapolation" for value in values]
    top = 2 * max(value for value in kept if value is not None)
    series = {name: [None if v is None or v > top else v for v in values] for name, values in series.items()}
    return E.line_chart(steps, series, ("step", "MSE"), f"MSE per step, {kind} clips: lower is better.")


def place_chart(steps, curves, kind):
    """R2 per step -> <figure>."""
    series = {}
    for reader, own in curves.items():
        series[reader] = [None if value is None or value < R2_FLOOR else value for value in own["value"]]
    caption = f"R2 of the objects' mean place, {kind}: 1 is perfect, what lies below {R2_FLOOR:g} is not drawn."
    return E.line_chart(steps, series, ("step", "R2"), caption, level=R2_ASKED)


def inline(image, caption):
    """A Pillow image -> <figure> with the picture inside."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img alt="{E.safe(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{picture}</div><figcaption>{E.safe(caption)}</figcaption></figure>'


def page_head(report):
    """What was measured, on what, in which units -> HTML."""
    data, context, horizon = report["data"], report["context"], report["horizon"]
    files = data["counts"]["all"]
    more = "" if horizon == report["learned"] else f" (the model learned {report['learned']})"
    lines = [
        f"Checkpoint {report.get('checkpoint', '')}, step {report.get('step', '')}, on {files['clips']} clips of "
        f"{files['files']} files of {data['split']}: {context} context frames, {horizon} predicted ones{more}.",
        "All errors are those of pixels in units of 0 to 1; PSNR is that of the mean squared error. Brackets are 95 % "
        "bootstrap intervals over files; numerator and denominator of a ratio are of the same files.",
        "Persistence repeats the last context frame; linear extrapolation is a straight line in latent space, "
        "decoded; background is the median of the context per pixel; the ceiling is the decoder on encoded true "
        "frames.",
    ]
    lines += [f"Left out: {name}: {reason}." for name, reason in list(data["left_out"].items())[:20]]
    return "".join(f"<p>{E.safe(line)}</p>" for line in lines)


def write_page(report, exhibits, path):
    """The report as one self-contained HTML file."""
    steps, curves, places = report["curves"]["step"], report["curves"], report["curves"].get("position R2", {})
    charts = [error_chart(steps, curves[kind], kind) for kind in report["data"]["counts"]]
    probes = [place_chart(steps, own, kind) for kind, own in places.items()]
    why = "".join(f"<p>Left out: {E.safe(line)}.</p>" for line in report["probe"]["left_out"])
    asked = {name: figure for name, figure in report["figures"].items() if figure["expect"]}
    readers = "".join(f"<li>{E.safe(name)}: {E.safe(words)}</li>" for name, words in READERS.items())
    body = [
        f"<h1>Evaluation: {E.safe(report['summary'])}</h1>{page_head(report)}",
        inline(draw_grid(exhibits, "Truth and prediction, MSE below"), "The first clip of every kind, four at most."),
        f'<h2>Error per step</h2><div class="charts">{"".join(charts)}</div>',
        f'<h2>Where the objects are</h2>{why}<div class="charts">{"".join(probes)}</div>{place_table(report)}',
        f"<ul>{readers}</ul>" if probes else "",
        f"<h2>Errors in thirds of the horizon</h2>{error_tables(report)}",
        f"<h2>What was asked for</h2>{E.summary_table(asked)}",
        "".join(E.figure_card(name, figure) for name, figure in asked.items()),
    ]
    E.write_html(path, body)


def print_report(report):
    """Ratios and R2 with their thresholds on standard output, then the summary."""
    for name, figure in report["figures"].items():
        if figure["expect"]:
            mark = {True: "met", False: "MISSED", None: "not measured"}[figure["passed"]]
            V.say(f"{name:<48}{with_interval(figure['value'], figure['interval']):<28}{figure['expect']:<18}{mark}")
    for line in report["probe"]["left_out"]:
        V.say(f"position R2 left out: {line}")
    V.say(report["summary"])


def run(model, cfg, about, args):
    """tools/evaluate.py on a world that predicts frames: measure, write, print -> exit code."""
    if args.split == "all":
        raise V.UsageError("split = all: a world that predicts frames is measured on val or test (--split)")
    if args.horizon < 0:
        raise V.UsageError(f"horizon = {args.horizon}: must be at least 1 (--horizon)")
    E.need("skimage", "PIL")
    source, cfg = open_source(model, about["data"], args.data_root)
    progress, out = E.Progress(), Path(args.out) if args.out else E.run_folder(args.ckpt)
    out.mkdir(parents=True, exist_ok=True)
    report = {"checkpoint": str(args.ckpt), "step": about["step"]}
    sizes = QUICK if args.quick else FULL
    measured = cfg, source, args.split, sizes, args.horizon, args.seed, args.num_workers, progress
    found, clips = evaluate(model, *measured)
    report |= found
    report["seconds"] = round(progress.seconds, 1)
    exhibits = [make_exhibit(*clip, cfg) for clip in clips.values()]
    V.write_report(out / "evaluation.json", report)
    write_page(report, exhibits, out / "evaluation.html")
    print_report(report)
    V.say(f"written: {out / 'evaluation.json'}, {out / 'evaluation.html'} ({report['seconds']:.0f} s)")
    return V.EXIT_OK
