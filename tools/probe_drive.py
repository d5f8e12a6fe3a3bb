"""How much of a recorded drive's steering frozen features tell: probes on a checkpoint's target encoder, and controls.

    python tools/probe_drive.py --ckpt CKPT --drive TUB [--signal steer] [--fps 20] [--out DIR] [--gap_s 5] [--folds 5]
    python tools/probe_drive.py --drive TUB [--fps 20] --export DIR

TUB is a Donkeycar tub, new form (manifest.json, catalogs, images/) or old (record_<n>.json beside the pictures). Every
record ends a window of NOW frames and one of NOW + SOON frames, taken at the checkpoint's clip_fps by the records' time
stamps (--fps replaces stamps that are not the camera's). The label of both is the signal at the window's last picture:
the features have seen what the driver had seen when the command was given, and nothing later; both windows answer one
question.

Drives are cut into --folds blocks of time. Each is predicted by probes fitted on the others, less every window that
comes within --gap_s seconds of it: neighbouring pictures are nearly equal, and a random split would reward remembering
them.

    linear      ridge on the leading 128 principal components of all tokens, its strength chosen in training blocks
    attentive   one learned query attends to all tokens, then an MLP; a fixed number of epochs

Rows: trained (the checkpoint), untrained (same config, fresh weights, several seeds), pixels and pixels_grey (the same
probes on frames pooled to 16 x 16), shuffled (trained features, training labels permuted), mean (of the training
labels), persistence (the signal one clip frame earlier: no camera knows it, it stands there as a reference). Mean
absolute error and R2 of all held-out predictions, with 95 % intervals of a bootstrap over blocks of --block_s seconds,
and the paired difference of every row to `trained`.
Written under --out: probe_drive.json. Printed: the same as a table.

--export cuts the drive at pauses and every --segment_s seconds into DIR/videos/*.mp4 with DIR/annotations/*.json
(per-frame `steer`, + = right, and `throttle`, in the tub's own units, -1 to 1), which the script trains on and
tools/evaluate.py reads. Between two files cut from one stretch --gap_s seconds are left out, so that a held-out file
continues no training file.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 0)]

import evaluate as E

import VJepa_AUTO_V2 as V

SIGNALS = {"steer": "user/angle", "throttle": "user/throttle"}
IMAGE_KEY = "cam/image_array"
SESSION_PAUSE_S = 60.0  # between two recordings of one tub when --fps replaces the time stamps: no window spans it
FASTEST_CAMERA = 125.0  # pictures per second; time stamps closer than that are those of a conversion
MAX_SIDE = 8  # token grids wider than this are pooled before they are probed, so that a long drive fits in memory
COMPONENTS = 128  # principal components that ridge sees; between 64 and 256 a trial drive's scores hardly moved
ALPHAS = np.logspace(-3, 4, 8)  # ridge strengths tried, for components of unit mean variance
POOLED = 16  # side of the pooled pictures of the pixel controls
ROWS = ("trained", "untrained", "pixels", "pixels_grey", "shuffled", "mean", "persistence")  # order of the report
LEAST_TRAIN = 20  # windows below which a fold is refused
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Drive:
    """A recorded drive, ordered in time: picture files, seconds since the first, one value of every signal for each."""

    paths: list
    times: np.ndarray
    signals: dict

    @property
    def fps(self):
        """Pictures per second, by the median interval."""
        return float(1 / np.median(np.diff(self.times)))


# -- the drive


def parse_lines(path):
    """A file of JSON objects or lists, one per line -> list. UserError names the line that is none."""
    try:
        lines = V.read_text(path, V.MAX_LIST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise V.UserError(f"drive {path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [V.parse_json(line, float)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise V.UserError(f"drive {path}: line {number} is not JSON ({V.one_line(error)})") from error
    return rows


def tub_records(folder):
    """Records of a tub in their order, without deleted ones -> [(record number, folder of its picture, record)]."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        about = [row for row in parse_lines(manifest) if isinstance(row, dict) and "paths" in row]
        if not about:
            raise V.UserError(f"drive {manifest}: no line lists the catalogs under 'paths'")
        deleted = set(about[-1].get("deleted_indexes", []))
        rows = [row for name in about[-1]["paths"] for row in parse_lines(folder / name)]
        found = [(row.get("_index", number), folder / "images", row) for number, row in enumerate(rows)]
        found = [entry for entry in found if entry[0] not in deleted]
    else:
        paths = [path for path in folder.glob("record_*.json") if path.stem[7:].isdigit()]
        numbered = sorted((int(path.stem[7:]), path) for path in paths)
        found = [(number, folder, row) for number, path in numbered for row in parse_lines(path)]
    if len(found) < 2:
        forms = "manifest.json or record_<n>.json"
        raise V.UserError(
            f"drive {folder}: no Donkeycar tub with two records or more ({forms}); unpack an archive first"
        )
    return sorted(found, key=lambda entry: entry[0])


def record_times(folder, records, fps):
    """Seconds of every record since the first, by its number when fps is given, else by time stamps -> float64 [n]."""
    if fps:
        names = [row.get("_session_id") for _, _, row in records]
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        paused = [SESSION_PAUSE_S * order[name] for name in names]
        return np.array([(number - records[0][0]) / fps + pause for (number, _, _), pause in zip(records, paused)])
    stamps = [row.get("_timestamp_ms", row.get("milliseconds")) for _, _, row in records]
    if any(not isinstance(stamp, (int, float)) for stamp in stamps):
        raise V.UserError(f"drive {folder}: records without time stamps; give the camera's rate with --fps")
    times = (np.array(stamps, np.float64) - stamps[0]) / 1000
    steps = np.diff(times)
    if steps.min() <= 0 or 1 / np.median(steps) > FASTEST_CAMERA:
        apart = f"{1000 * np.median(steps):.3g} ms apart, smallest step {1000 * steps.min():.3g} ms"
        raise V.UserError(f"drive {folder}: time stamps {apart}: not those of a camera; give its rate with --fps")
    return times


def read_tub(folder, fps=0.0):
    """A Donkeycar tub -> Drive. fps > 0 replaces the time stamps by record number / fps."""
    folder = Path(folder)
    if not folder.is_dir():
        raise V.UsageError(f"drive {folder}: no such folder")
    records, keys = tub_records(folder), ", ".join((IMAGE_KEY, *SIGNALS.values()))
    paths, signals = [], []
    for number, place, row in records:
        name, *values = [row.get(key) if isinstance(row, dict) else None for key in keys.split(", ")]
        numbers = all(isinstance(value, (int, float)) and np.isfinite(value) for value in values)
        if not isinstance(name, str) or not numbers:
            raise V.UserError(f"drive {folder}: record {number} lacks one of {keys}")
        paths.append(place / name)
        signals.append(values)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise V.UserError(f"drive {folder}: {len(missing)} pictures missing, the first is {missing[0].name}")
    signals = dict(zip(SIGNALS, np.array(signals, np.float64).T))
    return Drive(paths, record_times(folder, records, fps), signals)


def read_picture(path):
    """A picture file -> uint8 [H, W, 3]. UserError when it is damaged."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:  # what Pillow raises on damaged files
        raise V.UserError(f"picture {path.name}: cannot be decoded ({' '.join(str(error).split())[:120]})") from error


def read_pictures(drive, numbers, cfg):
    """Pictures by record number, cropped and resized as validation clips are -> {number: uint8 [H, W, 3]}."""
    import av
    from av.video.reformatter import VideoReformatter

    plan = V.ClipPlan(1, 0.0, cfg.height, cfg.width, 0.0, 1.0, 1.0, 0.5, 0.5)
    pictures, scaler = {}, VideoReformatter()
    for number in E.counted(numbers, "pictures"):
        frame = av.VideoFrame.from_ndarray(read_picture(drive.paths[number]), format="rgb24")
        pictures[int(number)] = np.ascontiguousarray(V.pyav_picture(frame, plan, 1.0, scaler))
    return pictures


# -- windows and folds


def nearest_records(times, wanted):
    """Record whose time is nearest to each wanted time -> int64, shaped like wanted."""
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    return after - (wanted - times[after - 1] < times[after] - wanted)


def cut_windows(times, clip_fps, num_frames, stride=1):
    """Windows of num_frames records clip_fps apart, each ending at a record -> int64 [n, num_frames].

    Windows in which a record is missing, repeated or half a clip step off its time are left out.
    """
    ends = times[::stride]
    wanted = ends[:, None] - np.arange(num_frames - 1, -1, -1) / clip_fps
    records = nearest_records(times, wanted)
    whole = (np.abs(times[records] - wanted) < 0.5 / clip_fps - 1e-6).all(1) & (np.diff(records, axis=1) > 0).all(1)
    return records[whole]


def time_folds(begin, end, num_folds, gap_s):
    """Contiguous test blocks -> [(train [n], test [m])] window numbers. begin, end: seconds of first and last pictures.

    A window trains only if its whole span lies more than gap_s before or after that of all test windows of the block.
    """
    folds = []
    for test in np.array_split(np.arange(len(begin)), num_folds):
        if len(test):
            apart = (end < begin[test].min() - gap_s) | (begin > end[test].max() + gap_s)
            folds.append((np.flatnonzero(apart), test))
    return folds


def inner_folds(train, begin, end):
    """Folds inside training windows, for choices that must not see the held-out block -> [(fit, held)] of `train`.

    They share no picture, but keep no gap: a choice that profits from neighbours costs nothing but sharpness.
    """
    return [(fit, held) for fit, held in time_folds(begin[train], end[train], 4, 0.0) if len(fit)]


def check_folds(folds, begin, end, args):
    """UserError when a fold is left with too little to fit on, or the drive with too little to choose on."""
    least = min((len(train) for train, _ in folds), default=0)
    enough = len(folds) == args.folds and least >= LEAST_TRAIN
    if not enough or min(len(inner_folds(train, begin, end)) for train, _ in folds) < 2:
        raise V.UserError(
            f"drive too short: {least} training windows in the smallest of {args.folds} folds, {LEAST_TRAIN} needed, "
            f"in two stretches or more; lower --gap_s ({args.gap_s:g}), raise --folds, or lower --stride"
        )


# -- features


def pool_tokens(tokens, grid):
    """Tokens [B, L, D] of a (t, h, w) grid -> [B, L', D], each tubelet pooled to at most MAX_SIDE x MAX_SIDE sites."""
    side = tuple(-(-length // -(-length // MAX_SIDE)) for length in grid[1:])  # length / ceil(length / MAX_SIDE), up
    return E.pool_sites(tokens, grid[1:], side)


@torch.no_grad()
def encoder_features(model, pictures, windows, batch_size, name):
    """Target-encoder tokens of every window, of a taught encoder its own -> float32 [n, L', D] on the CPU."""
    grid, features = (windows.shape[1] // model.cfg.tubelet_t, *model.cfg.grid[1:]), []
    device = next(model.parameters()).device
    parts = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    for part in E.counted(parts, f"{name}, {windows.shape[1]} frames, batches"):
        frames = torch.from_numpy(np.stack([[pictures[int(number)] for number in row] for row in part])).to(device)
        clip = model.normalise(frames.permute(0, 1, 4, 2, 3))
        taught = model.cfg.teacher == "frozen"
        tokens = V.layer_norm(model.online(clip)) if taught else model.make_targets(clip)  # [B, L, D]
        features.append(pool_tokens(tokens, grid).float().cpu())
    return torch.cat(features)


def pixel_features(pictures, windows, tubelet_t):
    """Frames pooled to 16 x 16, cut into tubelets of 2 x 2 pooled pixels -> float32 [n, L', tubelet_t * 12]."""
    numbers = sorted(pictures)
    stack = torch.from_numpy(np.stack([pictures[number] for number in numbers])).permute(0, 3, 1, 2)
    small = [F.adaptive_avg_pool2d(part.float() / 255, POOLED) for part in stack.split(256)]
    clips = torch.cat(small)[torch.from_numpy(np.searchsorted(numbers, windows))]  # [n, T, 3, 16, 16]
    n, T, half = len(clips), windows.shape[1], POOLED // 2
    clips = clips.view(n, T // tubelet_t, tubelet_t, 3, half, 2, half, 2).permute(0, 1, 4, 6, 2, 3, 5, 7)
    return clips.reshape(n, T // tubelet_t * half**2, tubelet_t * 12)


# -- probes


class DriveProbe(nn.Module):
    """Tokens [B, N, D] with learned positions, read by an attentive probe of one query -> one number [B]."""

    def __init__(self, num_tokens, dim, width=64, num_heads=4):
        super().__init__()
        self.inner, self.position = nn.Linear(dim, width), nn.Parameter(torch.zeros(num_tokens, width))
        self.probe = E.AttentiveProbe(torch.zeros(1, width), [1], num_heads)
        V.init_weights(self)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.probe.queries, std=0.02)

    def forward(self, tokens):
        return self.probe(self.inner(tokens) + self.position)[0][:, 0]


def attentive_probe(features, labels, folds, args, device, name):
    """Held-out predictions of an attentive probe that is fitted per fold -> float64 [n]."""
    predictions = np.full(len(labels), np.nan)
    for fold, (train, test) in enumerate(E.counted(folds, f"{name}, attentive, folds"), 1):
        torch.manual_seed(args.seed * 1000 + fold)
        x, order = features[train], np.random.default_rng([args.seed, fold])
        mean, std = x.mean((0, 1)), x.std((0, 1)).clamp(min=1e-6)
        y = torch.from_numpy((labels[train] - labels[train].mean()) / labels[train].std()).float()
        probe, num_batches = DriveProbe(*features.shape[1:]).to(device), -(-len(train) // 64)
        steps = max(args.epochs * num_batches, 2)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        for _ in range(args.epochs):
            for rows in np.array_split(order.permutation(len(train)), num_batches):
                loss = F.mse_loss(probe(((x[rows] - mean) / std).to(device)), y[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            parts = [probe(((part - mean) / std).to(device)).cpu() for part in features[test].split(256)]
        predictions[test] = torch.cat(parts).double().numpy() * labels[train].std() + labels[train].mean()
    return predictions


def choose_alpha(x, y, inner):
    """The ridge strength with the least mean squared error over inner folds [(fit, held)], all fitted at once."""
    from sklearn.linear_model import Ridge

    errors = np.zeros(len(ALPHAS))
    for fit, held in inner:
        ridge = Ridge(ALPHAS).fit(x[fit], np.repeat(y[fit, None], len(ALPHAS), 1))  # one output per strength
        errors += np.square(ridge.predict(x[held]) - y[held, None]).mean(0)
    return ALPHAS[errors.argmin()]


def linear_probe(features, labels, folds, begin, end, shuffle_seed=None):
    """Held-out predictions of ridge on principal components, both fitted per fold -> float64 [n].

    The components come from the windows' Gram matrix, which is small however many tokens a window has. With a shuffle
    seed the labels of the training windows are permuted: what the probe then finds is chance.
    """
    from sklearn.decomposition import KernelPCA
    from sklearn.linear_model import Ridge

    flat = features.flatten(1)
    flat = flat - flat.mean(0)  # KernelPCA centres on the training windows; this only keeps the products exact
    gram = (flat @ flat.T).double().numpy()
    predictions = np.full(len(labels), np.nan)
    for fold, (train, test) in enumerate(folds):
        pca = KernelPCA(min(COMPONENTS, len(train) - 1), kernel="precomputed", eigen_solver="dense")
        x_train = pca.fit_transform(gram[np.ix_(train, train)])
        size = np.sqrt(np.square(x_train).mean())
        x_train, x_test, y = x_train / size, pca.transform(gram[np.ix_(test, train)]) / size, labels[train]
        if shuffle_seed is not None:
            y = np.random.default_rng([shuffle_seed, fold]).permutation(y)
        alpha = choose_alpha(x_train, y, inner_folds(train, begin, end))
        predictions[test] = Ridge(alpha).fit(x_train, y).predict(x_test)
    return predictions


# -- scores


def block_sums(predictions, labels, blocks):
    """Per block: count, absolute and squared errors, means over predictions [S, n], labels, their squares -> [5, b]."""
    errors = predictions - labels
    columns = (np.ones_like(labels), np.abs(errors).mean(0), np.square(errors).mean(0), labels, labels**2)
    return np.stack([np.bincount(blocks, column) for column in columns])


def scores_of(sums):
    """Sums [5, ...] -> (mean absolute error, R2), each [...]."""
    count, absolute, square, label, label_square = sums
    return absolute / count, 1 - square / (label_square - label**2 / count)


def interval(values):
    """Middle 95 % of bootstrap draws -> [low, high]."""
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def score_rows(rows, labels, blocks, seed):
    """Add mae, r2, their intervals and the difference to `trained` to rows that hold predictions [S, n]. In place."""
    num_blocks = int(blocks.max()) + 1
    picks = np.random.default_rng(seed).integers(0, num_blocks, (DRAWS, num_blocks))
    counts = np.stack([np.bincount(pick, minlength=num_blocks) for pick in picks], 1).astype(float)  # [b, DRAWS]
    trained, every = {}, []
    for row in rows:
        sums = block_sums(row["predictions"], labels, blocks)
        (mae, r2), draws = scores_of(sums.sum(1)), scores_of(sums @ counts)
        row.update(mae=float(mae), mae_interval=interval(draws[0]), r2=float(r2), r2_interval=interval(draws[1]))
        if len(row["predictions"]) > 1:
            each = [scores_of(block_sums(one[None], labels, blocks).sum(1)) for one in row["predictions"]]
            row["per_seed"] = [{"mae": float(own[0]), "r2": float(own[1])} for own in each]
        if row["features"] == "trained":
            trained[row["probe"], row["window"]] = draws
        every.append(draws)
    for row, draws in zip(rows, every):
        base = trained.get((row["probe"], row["window"]))
        if base and row["features"] != "trained":
            row["mae_above_trained"], row["r2_above_trained"] = (interval(own - ours) for own, ours in zip(draws, base))


# -- the report


def feature_rows(name, makers, windows, labels, folds, spans, args, device):
    """Features by every probe and window -> rows with predictions [S, n]. makers: for each seed, window -> features."""
    rows = []
    for window, records in windows.items():
        predictions = {probe: [] for probe in args.probes}
        for maker in makers:
            features = maker(records)
            if "linear" in args.probes:
                predictions["linear"].append(linear_probe(features, labels, folds, *spans))
            if "attentive" in args.probes:
                predictions["attentive"].append(attentive_probe(features, labels, folds, args, device, name))
            if name == "trained" and "linear" in args.probes:
                shuffled = linear_probe(features, labels, folds, *spans, shuffle_seed=args.seed)
                rows.append(dict(features="shuffled", probe="linear", window=window, predictions=shuffled[None]))
        for probe, value in predictions.items():
            rows.append(dict(features=name, probe=probe, window=window, predictions=np.stack(value)))
    return rows


def encoded(pictures, batch_size, name, make_model, records):
    """Features of windows by the target encoder of the model that `make_model` makes."""
    return encoder_features(make_model(), pictures, records, batch_size, name)


def untrained_model(model, seed):
    """A fresh model of the same sizes: what its architecture alone makes of the pictures."""
    torch.manual_seed(seed)
    return E.untrained_twin(model)


def all_rows(model, drive, windows, labels, folds, spans, args):
    """Every row of the report, with predictions [S, n]."""
    device, cfg, every = next(model.parameters()).device, model.cfg, windows["now+soon"]
    pictures = read_pictures(drive, np.unique(every), cfg)
    grey = {n: np.repeat(p.mean(2, keepdims=True).astype(np.uint8), 3, 2) for n, p in pictures.items()}
    read, seeds = partial(encoded, pictures, args.batch_size), range(args.untrained_seeds)
    sources = {
        "trained": [partial(read, "trained", lambda: model)],
        "untrained": [partial(read, f"untrained, seed {s}", partial(untrained_model, model, s)) for s in seeds],
        "pixels": [partial(pixel_features, pictures, tubelet_t=cfg.tubelet_t)],
        "pixels_grey": [partial(pixel_features, grey, tubelet_t=cfg.tubelet_t)],
    }
    rows = []
    for name, makers in sources.items():
        if makers:
            rows += feature_rows(name, makers, windows, labels, folds, spans, args, device)
    mean = np.full(len(labels), np.nan)
    for train, test in folds:
        mean[test] = labels[train].mean()
    before = drive.signals[args.signal][every[:, -2]]
    for name, predictions in (("mean", mean), ("persistence", before)):
        rows.append(dict(features=name, probe="", window="", predictions=predictions[None]))
    return rows


def print_table(report):
    """The report's rows as a table on stdout."""
    V.say(
        f"{report['signal']} of {report['drive']}: {report['windows']} windows, "
        f"deviation {report['deviation']:.3f}, {report['folds']} folds, "
        f"gap {report['gap_s']:g} s, {report['blocks']} blocks of {report['block_s']:g} s"
    )
    head = ("features", "probe", "window", "MAE", "95 %", "R2", "95 %", "R2 less that of trained")
    line = "{:<13}{:<11}{:<10}{:>7}  {:<16}{:>7}  {:<18}{:<18}".format
    V.say(line(*head))
    for row in report["rows"]:
        keys = ("mae_interval", "r2_interval", "r2_above_trained")
        mae, r2, above = ("[{:.3f}, {:.3f}]".format(*row[key]) if key in row else "" for key in keys)
        names = (row["features"], row["probe"], row["window"])
        V.say(line(*names, f"{row['mae']:.3f}", mae, f"{row['r2']:.3f}", r2, above))


def probe(args):
    """Checkpoint and drive -> report, printed and written to --out."""
    E.need("sklearn", "PIL")
    model, cfg, _ = E.open_checkpoint(args.ckpt, args.device, args.init_from)
    clip_fps = args.clip_fps or cfg.clip_fps
    if not clip_fps:
        raise V.UsageError("clip_fps 0 of this checkpoint has no time step; give one with --clip_fps")
    drive = read_tub(args.drive, args.fps)
    long = cut_windows(drive.times, clip_fps, cfg.now_frames + cfg.soon_frames, args.stride)
    windows = {"now": long[:, -cfg.now_frames :], "now+soon": long}
    labels = drive.signals[args.signal][long[:, -1]]
    begin, end = drive.times[long[:, 0]], drive.times[long[:, -1]]
    folds = time_folds(begin, end, args.folds, args.gap_s)
    check_folds(folds, begin, end, args)
    if min(labels[train].std() for train, _ in folds) < 1e-6:
        still = f"{args.signal} does not change in one of the training folds, nothing can be learned"
        raise V.UserError(f"drive {args.drive}: {still}")
    blocks = np.unique(np.floor((end - end[0]) / args.block_s), return_inverse=True)[1]
    num_blocks = int(blocks.max()) + 1
    if num_blocks < 5:
        found = f"{num_blocks} blocks of {args.block_s:g} s for the bootstrap"
        raise V.UserError(f"drive too short: {found}, 5 needed; lower --block_s")
    rows = all_rows(model, drive, windows, labels, folds, (begin, end), args)
    rows.sort(key=lambda row: ROWS.index(row["features"]))
    score_rows(rows, labels, blocks, args.seed)
    for row in rows:
        row.pop("predictions")
    report = dict(ckpt=str(args.ckpt), drive=str(args.drive), signal=args.signal, windows=len(labels))
    report |= dict(drive_fps=drive.fps, clip_fps=clip_fps, now_frames=cfg.now_frames, soon_frames=cfg.soon_frames)
    report |= dict(folds=args.folds, gap_s=args.gap_s, block_s=args.block_s, stride=args.stride, blocks=num_blocks)
    report |= dict(deviation=float(labels.std()), epochs=args.epochs, seed=args.seed)
    report |= dict(train_windows=[len(train) for train, _ in folds], rows=rows)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    V.write_report(Path(args.out) / "probe_drive.json", report)
    print_table(report)
    return report


# -- export


def cut_segments(drive, segment_s, gap_s):
    """The drive at an even frame rate, cut at pauses and every segment_s, gap_s left out -> [record numbers [T]]."""
    times, step = drive.times, 1 / drive.fps
    pauses = np.flatnonzero(np.diff(times) > 1.5 * step) + 1
    segments = []
    for stretch in np.split(np.arange(len(times)), pauses):
        start, last = times[stretch[0]], times[stretch[-1]]
        while start <= last + 0.5 * step:
            count = int(np.floor((min(segment_s, last - start + step)) / step + 1e-6))
            if count > 1:
                segments.append(nearest_records(times, start + np.arange(count) * step))
            start += segment_s + gap_s
    return segments


def export(args):
    """Write the drive as videos and annotations that the script trains on -> number of files."""
    E.need("PIL")
    drive, folder = read_tub(args.drive, args.fps), Path(args.export)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise V.UserError(f"export {folder}: is not empty; choose another --export")
    segments = cut_segments(drive, args.segment_s, args.gap_s)
    if not segments:
        raise V.UserError(f"drive {args.drive}: no stretch of two records or more without a pause")
    for name in ("videos", "annotations"):
        (folder / name).mkdir(parents=True)
    units = dict.fromkeys(SIGNALS, "share of full deflection; steer + = right")
    for number, records in enumerate(E.counted(segments, "videos"), 1):
        pictures = [read_picture(drive.paths[record]) for record in records]
        if len({picture.shape for picture in pictures}) > 1:
            raise V.UserError(f"drive {args.drive}: pictures of different sizes in one stretch cannot become one video")
        V.write_video(folder / "videos" / f"drive_{number:04d}.mp4", np.stack(pictures), drive.fps)
        about = {"fps": drive.fps, "first_record": int(records[0]), "units": units}
        about |= {name: values[records].round(6).tolist() for name, values in drive.signals.items()}
        (folder / "annotations" / f"drive_{number:04d}.json").write_text(json.dumps(about))
    V.say(f"{len(segments)} videos with annotations in {folder}; train on them with --data_root {folder}")
    return len(segments)


def build_parser():
    """Flags of the tool."""
    about = "Probe frozen features for the steering of a recorded drive."
    parser = V.ArgumentParser(prog="probe_drive.py", description=about, allow_abbrev=False)
    flag, path, probes = parser.add_argument, os.path.expanduser, ("linear", "attentive")
    instead = "write the drive as videos/ and annotations/ instead of probing"
    apart = "seconds kept free on both sides of a held-out block, or between exported files [5]"
    flag("--drive", required=True, type=path, help="folder of a Donkeycar tub")
    flag("--ckpt", default="", type=path, help="checkpoint to probe")
    flag("--init_from", default="", type=path, help="where the frozen weights of the run are, if they were moved")
    flag("--export", default="", type=path, metavar="DIR", help=instead)
    flag("--out", default="runs/probe_drive", type=path, help="folder of probe_drive.json [runs/probe_drive]")
    flag("--signal", default="steer", choices=tuple(SIGNALS), help="what is predicted [steer]")
    flag("--fps", type=float, default=0.0, help="pictures per second of the drive; 0 = by its time stamps [0]")
    flag("--clip_fps", type=float, default=0.0, help="frames per second of a window; 0 = the checkpoint's [0]")
    flag("--stride", type=int, default=1, help="records between the ends of two windows [1]")
    flag("--folds", type=int, default=5, help="blocks of time, each predicted from the others [5]")
    flag("--gap_s", type=float, default=5.0, help=apart)
    flag("--block_s", type=float, default=5.0, help="seconds of a block of the bootstrap [5]")
    flag("--probes", nargs="+", default=[*probes], choices=probes, help="probes to fit [both]")
    flag("--epochs", type=int, default=40, help="epochs of the attentive probe [40]")
    flag("--untrained_seeds", type=int, default=3, help="fresh encoders to compare with [3]")
    flag("--batch_size", type=int, default=32, help="windows encoded at once [32]")
    flag(
        "--device",
        default="auto",
        choices=V.merged(V.VJepaAutoV2Config, "CHOICES")["device"],
        help="where to compute [auto]",
    )
    flag("--seed", type=int, default=0, help="of the attentive probe, the shuffle and the bootstrap [0]")
    flag("--segment_s", type=float, default=15.0, help="seconds of an exported file [15]")
    return parser


def check_flags(args):
    """UsageError for a value out of range, or for a missing --ckpt."""
    least = dict(fps=0, clip_fps=0, stride=1, folds=2, gap_s=0, block_s=0.1, epochs=1, untrained_seeds=0, batch_size=1)
    for name, low in {**least, "seed": 0, "segment_s": 0.5}.items():
        value = getattr(args, name)
        if not np.isfinite(value) or value < low:
            raise V.UsageError(f"{name} = {value}: must be {low} or above (--{name})")
    if not args.ckpt and not args.export:
        raise V.UsageError("give --ckpt to probe a checkpoint, or --export DIR to write the drive as videos")


def start(argv):
    """Export the drive or probe on it, as the flags say."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    (export if args.export else probe)(args)


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(start, argv)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
