"""Adapt a checkpoint of worlds/hope.py to the clip in hand, and score it on frames that no gradient has touched.

    python tools/adapt.py CHECKPOINT [--data_root DIR] [--side test|val|train|all] [--layers SET] [--mode MODE] [...]

Of each clip the first `seen` frames are known. The chosen weights take a few gradient steps on them; later frames are
predicted and scored. What the error on the seen frames does is told apart: it says nothing about the future. Three arms
take the same clips in the same order:

    none       the checkpoint as it is; it sees the same frames as context
    shuffled   the same steps towards the frames of the last clip of another video: what any steps of this size do
    adapted    the steps towards the clip's own frames

    --mode rollout      the error of the own rollout from `context` frames over the seen ones, then a rollout from all
                        seen frames into the future: scores per horizon
    --mode teacher      the same scores after steps on one-step errors of the seen frames
    --mode sequential   frame after frame: predict it, score it, then learn from it before the next is predicted

Weights start anew in every clip, or with --accumulate go on from clip to clip; then a clip's steps come after its own
score (sequential) or use its seen frames alone, and the shuffled arm takes its targets from a clip that was scored
before. The first clip, or the clips of the first video, only lend their frames to the shuffled arm of the next.

    --layers layernorm | attn_out | bias | mlp_out   each adds to those before it: LayerNorm, output projections of
                                                     token mixing, all biases, output layers of the MLPs
    --layers layernorm+mlp_out                       exactly these parts

Written under --out (default: the run's folder / adaptation): adaptation.json and adaptation.png. docs/adaptation.md
says what the figures mean. From Python: `adaptation_gain(world, dataset or batches, ...)` -> the content of
adaptation.json; the world is left bit by bit as it was.

Letters: T + 1 frames of a clip, N patches per frame, D feature_dim, A action_dim.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import math
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 0)]

import evaluate as E
import futures as P

import VJepa_AUTO_V2 as V

PARTS = ("layernorm", "attn_out", "bias", "mlp_out")
MODES = ("rollout", "teacher", "sequential")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
ARMS = ("none", "shuffled", "adapted")
# ends of the names of linear layers: what token mixing or a memory adds to the residual stream, and what an MLP adds
OUTPUTS = {"attn_out": ("attn.proj", "mixing.proj", "titans.proj"), "mlp_out": ("mlp.fc2",)}
MEMORY_NORM = {"memory.scale": ("layernorm",), "memory.shift": ("layernorm", "bias")}  # the LayerNorm of a Titan memory
WORST, BEST = 10, 5  # clips listed by name
TENSORS = ("features", "actions", "states", "extrinsics")  # of a clip
STATISTICS = ("mean", "median", "std", "min", "max")
COLOURS = {"none": "#777777", "shuffled": "#c2410c", "adapted": "#00734f"}


@dataclass(frozen=True)
class How:
    """How a clip is adapted to and scored."""

    layers: str = "layernorm"  # layernorm | attn_out | bias | mlp_out (each with those before it), or a+b exactly
    mode: str = "rollout"  # rollout | teacher | sequential
    accumulate: bool = False  # weights go on from clip to clip
    lr: float = 5e-4  # learning rate
    steps: int = 5  # gradient steps per clip, or per frame in mode sequential
    grad_clip: float = 1.0  # largest norm of a gradient; 0 = any
    context: int = 1  # true frames from which the rollout over the seen frames starts
    seen: int = 0  # first frames of a clip that are known; 0 = half of them
    optimizer: str = "adam"  # adam | adamw (weight decay 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# 1  Weights: which ones adapt, and how they come back
# ---------------------------------------------------------------------------------------------------------------------


def parts_of(layers):
    """attn_out -> every part up to it; a+b -> exactly these. UsageError for an unknown one."""
    names = layers.split("+")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        rule = f"must be one of {', '.join(PARTS)}, or some of them joined by +"
        raise V.UsageError(f"layers = {layers}: {rule} (--layers)")
    return PARTS[: PARTS.index(layers) + 1] if len(names) == 1 else tuple(part for part in PARTS if part in names)


def part_parameters(predictor):
    """A predictor -> {part: {name: parameter}} of what learns. The bias of a LayerNorm or an output layer belongs to
    its layer and to `bias`."""
    found, modules = {part: {} for part in PARTS}, dict(predictor.named_modules())
    for full, parameter in predictor.named_parameters():
        path, _, name = full.rpartition(".")
        belongs = {part for part, ends in OUTPUTS.items() if path.endswith(ends)}
        belongs |= {"layernorm"} if isinstance(modules[path], nn.LayerNorm) else set()
        belongs |= {"bias"} if name == "bias" else set()
        belongs |= {part for end, parts in MEMORY_NORM.items() if full.endswith(end) for part in parts}
        for part in belongs if parameter.requires_grad else ():
            found[part][full] = parameter
    return found


def count(parameters):
    """Numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters)


def choose(world, layers):
    """A world and a layer set -> ({name: parameter}, {total, adapted, share, parts: numbers that each adds}). UserError
    where the predictor has none of it."""
    parts, predictor = parts_of(layers), world.predictor
    found = part_parameters(predictor)
    chosen, own = {}, {}
    for part in parts:
        own[part] = count(weight for name, weight in found[part].items() if name not in chosen)
        chosen |= found[part]
    total, kind = count(predictor.parameters()), getattr(world.cfg, "predictor", type(predictor).__name__)
    if not chosen:
        has = ", ".join(part for part in PARTS if found[part]) or "none of the others either"
        what = {"layernorm": "LayerNorm"}.get(layers, " or ".join(parts))
        raise V.UserError(f"layers = {layers}: predictor {kind} has no {what}; it has {has} (--layers)")
    adapted = count(chosen.values())
    return chosen, {"total": total, "adapted": adapted, "share": adapted / total, "parts": own}


class Learner:
    """The chosen weights of an arm. Inside `with` the world has them, outside it has its own, bit by bit."""

    def __init__(self, parameters, how):
        self.parameters, self.how = list(parameters), how
        self.own = [parameter.detach().clone() for parameter in self.parameters]
        self.failed, self.log = 0, []
        self.restart()

    @torch.no_grad()
    def put(self, values):
        """Copy values into the world's weights."""
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def restart(self):
        """Begin from the checkpoint's weights, with an optimizer that remembers nothing."""
        self.values = [value.clone() for value in self.own]
        self.optimizer = OPTIMIZERS[self.how.optimizer](self.parameters, lr=self.how.lr)
        self.log, self.has_failed = [], False

    def __enter__(self):
        self.put(self.values)
        return self

    def __exit__(self, kind, error, trace):
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.put(self.own)

    def fail(self, clip, what):
        """Say what went wrong in a clip, and go on with the checkpoint's weights, without further steps on it."""
        V.say(f"WARNING: {clip.name}: {what} during adaptation; scored with the checkpoint's weights", sys.stderr)
        self.restart()
        self.put(self.own)
        self.failed, self.has_failed = self.failed + 1, True

    def change(self):
        """How far the weights moved from the checkpoint's, as a share of their norm, NaN where that is 0."""
        moved = [parameter.detach() - value for parameter, value in zip(self.parameters, self.own)]
        return E.ratio(nn.utils.get_total_norm(moved), nn.utils.get_total_norm(self.own))

    def learn(self, clip, loss_of):
        """`steps` gradient steps on loss_of(), an error of frames already seen; its values before and after are kept,
        with the gradient norms before and after clipping."""
        losses, norms = [], []
        for _ in range(0 if self.has_failed else self.how.steps):
            with torch.enable_grad():
                loss = loss_of()
                grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                return self.fail(clip, "the loss or its gradient is not finite")
            scale = min(1.0, self.how.grad_clip / (float(norm) + 1e-6)) if self.how.grad_clip else 1.0
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = None if grad is None else grad * scale
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
            norms.append((float(norm), float(norm) * scale))
        if norms:
            with torch.no_grad():
                self.log.append((losses[0], float(loss_of()), *np.mean(norms, 0)))


# ---------------------------------------------------------------------------------------------------------------------
# 2  Clips: a data set or batches -> clips, one by one
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """One clip: features [1, T + 1, N, D] as the world normalises them, actions and states [1, T, A], extrinsics
    [1, T, A - 1] or None. group: the video that it is of."""

    name: str
    group: str
    features: torch.Tensor
    actions: torch.Tensor
    states: torch.Tensor
    extrinsics: torch.Tensor | None

    @property
    def frames(self):
        return self.features.shape[1]

    def given(self, frames, steps):
        """The arguments of a predictor that knows so many frames and so many actions; nothing later is passed on."""
        extrinsics = None if self.extrinsics is None else self.extrinsics[:, :steps]
        return self.features[:, :frames], self.actions[:, :steps], self.states[:, :steps], extrinsics


def make_clip(world, name, group, content):
    """Tensors of one clip without batch axis -> Clip on the world's device, in fp32."""
    device = next(world.parameters()).device
    most, parts = world.cfg.num_timesteps, {}
    for key in TENSORS:
        value = content.get(key)
        parts[key] = None if value is None else value[None, : most + (key == "features")].to(device).float()
    with torch.no_grad():
        parts["features"] = world.normalise(parts["features"])
    return Clip(name, group, **parts)


def dataset_contents(data, num_clips):
    """Files of a V.FileDataset, evenly spread, in their order -> (name, video, dict of tensors or the reason why
    not)."""
    for number in P.even_picks(len(data.videos), num_clips + 1 if num_clips else len(data.videos)):
        video = data.videos[number]
        content = data.quarantine.get(video.name)
        try:
            content = content or data.read(number, data.plan(np.random.default_rng(0)))
        except V.BadFile as error:
            content = str(error)
        yield video.name, video.drive, content


def batch_contents(batches, num_clips):
    """Batches of the world, dicts of tensors [B, ...] -> (name, name, dict of tensors) of their first clips."""
    number = 0
    for batch in batches:
        for row in range(len(batch["features"])):
            if num_clips and number > num_clips:
                return
            yield f"clip {number}", f"clip {number}", {key: batch[key][row] for key in TENSORS if key in batch}
            number += 1


def clips_of(world, data, num_clips, how, left_out):
    """The clips that can be scored, one by one -> generator of Clip. Others go into left_out, {name: reason}."""
    contents = dataset_contents if isinstance(data, V.FileDataset) else batch_contents
    for name, group, content in contents(data, num_clips):
        frames = len(content["features"]) if isinstance(content, dict) else 0
        if not frames:
            left_out[name] = content
        elif frames <= how.seen:
            left_out[name] = f"{frames} frames; {how.seen} seen and one to be scored are needed (--seen)"
        elif not all(torch.isfinite(value).all() for value in content.values() if value.is_floating_point()):
            left_out[name] = "holds numbers that are not finite"
        else:
            yield make_clip(world, name, group, content)
        if name in left_out:
            V.say(f"WARNING: {name} is left out: {left_out[name]}", sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# 3  Arms: clip -> steps on seen frames, errors of later ones
# ---------------------------------------------------------------------------------------------------------------------


def seen_loss(world, clip, truth, how):
    """Mean error of the frames context .. seen - 1 against the same frames of `truth`: no later one is looked at."""
    if how.mode == "teacher":
        preds = world.predict(*clip.given(how.seen - 1, how.seen - 1))[:, how.context - 1 :]
    else:
        known = clip.given(how.context, how.seen - 1)
        preds = world.rollout(*known, context=how.context, steps=how.seen - how.context)
    return world.frame_error(preds, truth.features[:, how.context : how.seen]).mean()


def next_frame(world, clip, frame):
    """The prediction of one frame from all true frames before it -> [1, 1, N, D]."""
    return world.predict(*clip.given(frame, frame))[:, -1:]


def next_loss(world, clip, truth, frame):
    """The error of the prediction of one frame, against the same frame of `truth`, or its last one."""
    at = min(frame, truth.frames - 1)
    return world.frame_error(next_frame(world, clip, frame), truth.features[:, at : at + 1]).mean()


@torch.no_grad()
def predicted(predict, clip, learner):
    """predict() with the weights in hand; where these broke in adaptation, with the checkpoint's. UserError where
    those give no finite numbers."""
    preds = predict()
    if learner is not None and not learner.has_failed and not torch.isfinite(preds).all():
        learner.fail(clip, "what the weights predict is not finite")
        preds = predict()
    if not torch.isfinite(preds).all():
        raise V.UserError(f"{clip.name}: what the checkpoint predicts is not finite")
    return preds


def score_after(world, clip, truth, how, learner):
    """Modes rollout and teacher: steps on the seen frames, then a rollout from all of them -> errors [frames - seen].
    Without a learner no steps."""
    if learner is not None:
        learner.learn(clip, partial(seen_loss, world, clip, truth, how))
    later = dict(context=how.seen, steps=clip.frames - how.seen)
    predict = partial(world.rollout, *clip.given(how.seen, clip.frames - 1), **later)
    return world.frame_error(predicted(predict, clip, learner), clip.features[:, how.seen :])[0].tolist()


def score_along(world, clip, truth, how, learner):
    """Mode sequential: every frame is predicted before it is learned from -> errors [frames - seen]. The last frame is
    learned from only where weights go on to the next clip."""
    errors = []
    for frame in range(how.context, clip.frames):
        if frame >= how.seen:
            preds = predicted(partial(next_frame, world, clip, frame), clip, learner)
            errors.append(float(world.frame_error(preds, clip.features[:, frame : frame + 1])))
        if learner is not None and (frame < clip.frames - 1 or how.accumulate):
            learner.learn(clip, partial(next_loss, world, clip, truth, frame))
    return errors


def run_arm(world, clip, truth, how, learner):
    """One arm on one clip -> {error, per_step, and with a learner what its steps did}."""
    score = score_along if how.mode == "sequential" else score_after
    with torch.no_grad():
        if learner is None:
            errors = score(world, clip, truth, how, None)
            return {"error": float(np.mean(errors)), "per_step": errors}
        if not how.accumulate:
            learner.restart()
        learner.log, learner.has_failed = [], False
        with learner:
            errors = score(world, clip, truth, how, learner)
            entry = {"error": float(np.mean(errors)), "per_step": errors, "failed": learner.has_failed}
            before, after, norm, clipped = np.mean(learner.log, 0).tolist() if learner.log else [math.nan] * 4
            entry |= {"seen_before": before, "seen_after": after, "grad_norm": norm, "grad_norm_clipped": clipped}
            return entry | {"change": learner.change()}


def run_clips(world, clips, how, parameters, bar=None, total=0):
    """Every arm on every clip that comes behind one of another video -> [{name, frames, arm: ...}]."""
    learners = {arm: None if arm == "none" else Learner(parameters, how) for arm in ARMS}
    found, last, other = [], None, None  # the last clip, and the last one of another video than that
    for clip in clips:
        other = last if last is not None and last.group != clip.group else other
        if other is not None:
            truths = {"none": clip, "shuffled": other, "adapted": clip}
            entry = {"name": clip.name, "group": clip.group, "frames": clip.frames - how.seen}
            arms = {arm: run_arm(world, clip, truths[arm], how, learners[arm]) for arm in ARMS}
            found.append({**entry, "shuffled_from": other.name, **arms})
            if bar is not None:
                bar.show(len(found) / max(total, len(found)), f"{len(found)} clips")
        last = clip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 4  Figures: clips -> summary
# ---------------------------------------------------------------------------------------------------------------------


def gain_of(found, reference, arm, resamples, seed):
    """Share of a reference arm's error that an arm saves -> {gain, interval over videos, clips_better: their share}."""
    rows = np.array([[clip[arm]["error"], clip[reference]["error"]] for clip in found])
    interval = E.bootstrap(rows, E.saved, np.array([clip["group"] for clip in found]), resamples, seed)
    return {"gain": E.saved(rows), "interval": interval, "clips_better": float((rows[:, 0] < rows[:, 1]).mean())}


def arm_summary(found, arm):
    """Errors of an arm over clips -> {mean, median, std, min, max; per_step: means over the clips that have it}."""
    errors = np.array([clip[arm]["error"] for clip in found])
    table = np.full((len(found), max(clip["frames"] for clip in found)), np.nan)
    for row, clip in zip(table, found):
        row[: clip["frames"]] = clip[arm]["per_step"]
    return {name: float(getattr(np, name)(errors)) for name in STATISTICS} | {"per_step": np.nanmean(table, 0).tolist()}


def step_summary(found, arm):
    """What the steps of an arm did, mean over clips -> {failed, seen_before, seen_after, grad_norm, ...}."""
    names = ("seen_before", "seen_after", "grad_norm", "grad_norm_clipped", "change")
    table = np.array([[clip[arm][name] for name in names] for clip in found if not clip[arm]["failed"]])
    means = table.mean(0).tolist() if len(table) else [math.nan] * len(names)
    return {"failed": sum(clip[arm]["failed"] for clip in found), **dict(zip(names, means))}


def summary_of(found, resamples, seed):
    """Clips -> {arms, gains, steps, worst and best clips}."""
    gains = {f"{arm} over {base}": gain_of(found, base, arm, resamples, seed) for arm, base in (
        ("adapted", "none"), ("adapted", "shuffled"), ("shuffled", "none"))}  # fmt: skip
    for clip in found:
        clip["gain"] = 1 - E.ratio(clip["adapted"]["error"], clip["none"]["error"])
    order = [clip["name"] for clip in sorted(found, key=lambda clip: clip["gain"])]
    return {
        "clips": len(found),
        "arms": {arm: arm_summary(found, arm) for arm in ARMS},
        "gains": gains,
        "steps": {arm: step_summary(found, arm) for arm in ARMS[1:]},
        "worst": order[:WORST],
        "best": order[::-1][:BEST],
    }


def checked(how, frames):
    """`How` with the number of seen frames of so many filled in. UsageError for what cannot be."""
    how = replace(how, seen=how.seen or max(how.context + 1, frames // 2))
    rules = (
        (how.mode not in MODES, "mode", f"must be one of {', '.join(MODES)}"),
        (how.optimizer not in OPTIMIZERS, "optimizer", f"must be one of {', '.join(OPTIMIZERS)}"),
        (not 0 < how.lr <= 100, "lr", "must be above 0 and at most 100"),
        (how.steps < 1, "steps", "must be at least 1: no step adapts nothing"),
        (not 0 <= how.grad_clip < math.inf, "grad_clip", "must be 0 (off) or above"),
        (how.context < 1, "context", "must be at least 1: a rollout starts from a true frame"),
        (how.seen <= how.context, "seen", f"must exceed context = {how.context}: nothing would be left to adapt on"),
        (how.seen >= frames, "seen", f"must be at most {frames - 1} of {frames} frames: one must be left to score"),
    )
    for is_broken, name, rule in rules:
        if is_broken:
            raise V.UsageError(f"{name} = {getattr(how, name)}: {rule} (--{name})")
    return how


def adaptation_gain(world, data, num_clips=0, resamples=1000, seed=0, bar=None, **settings):
    """Adapt a world of worlds/hope.py to clips and score it on their later frames -> the content of adaptation.json.

    data: a V.FileDataset, of which num_clips are scored (0 = all; one more is read), or batches, dicts of tensors as
    the world's forward gets them. settings: fields of How, by default context = context_frames of the config. Of the
    result, ["gains"]["adapted over none"] is {gain, interval, clips_better}: the share of the later frames' error that
    adaptation saves. UsageError for settings that cannot be, UserError without clips of two videos. The world is left
    as it was.
    """
    settings.setdefault("context", getattr(world.cfg, "context_frames", 1))
    how, was_training, left_out = How(**settings), world.training, {}
    chosen, share = choose(world, how.layers)
    is_dataset = isinstance(data, V.FileDataset)
    how = checked(how, 1 + min(cfg.num_timesteps for cfg in (world.cfg, data.cfg if is_dataset else world.cfg)))
    try:
        world.eval()
        clips = clips_of(world, data, num_clips, how, left_out)
        found = run_clips(world, clips, how, chosen.values(), bar, num_clips or is_dataset and len(data.videos) - 1)
    finally:
        world.train(was_training)
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:1])
        asked = "no clips of two videos can be used: one is scored, one lends its frames to the shuffled arm"
        raise V.UserError(f"{asked}{f' ({len(left_out)} left out, the first: {why})' * bool(why)}")
    report = {"how": asdict(how), "parameters": {**share, "names": list(chosen)}, "left_out": left_out}
    return report | summary_of(found, resamples, seed) | {"per_clip": found}


# ---------------------------------------------------------------------------------------------------------------------
# 5  Table and picture
# ---------------------------------------------------------------------------------------------------------------------


def percent(entry):
    """A gain with its interval as text: +3.1 % [+1.0, +5.2]."""
    around = entry["interval"]
    return f"{entry['gain']:+.2%}" + (f" [{around[0]:+.2%}, {around[1]:+.2%}]" if around else " (one video)")


def share_line(report):
    """How many parameters adapt -> text."""
    own, how = report["parameters"], report["how"]
    parts = ", ".join(f"{part} {number:,}" if number else f"no {part}" for part, number in own["parts"].items())
    return f"layers {how['layers']}: {own['adapted']:,} of {own['total']:,} parameters = {own['share']:.2%} ({parts})"


def print_report(report):
    """The report as a short table."""
    how, arms, steps = report["how"], report["arms"], report["steps"]["adapted"]
    later = range(len(arms["none"]["per_step"]))
    way = "weights go on from clip to clip" if how["accumulate"] else "weights anew in every clip"
    V.say(share_line(report))
    V.say(
        f"mode {how['mode']}, {how['steps']} steps of {how['optimizer']} at {how['lr']:g}, {way}; {how['seen']} frames "
        f"seen, {len(later)} later ones scored, {report['clips']} clips"
    )
    tables = {"error of later frames": {name: [arms[arm][name] for arm in ARMS] for name in STATISTICS}}
    tables["per step"] = {1 + step: [arms[arm]["per_step"][step] for arm in ARMS] for step in later}
    for title, columns in tables.items():
        V.say(f"{title:<24}" + "".join(f"{name:>10}" for name in columns))
        for arm, values in zip(ARMS, zip(*columns.values())):
            V.say(f"{arm:<24}" + "".join(f"{value:>10.5f}" for value in values))
    for name, entry in report["gains"].items():
        V.say(f"error saved, {name:<22}{percent(entry):<36}{entry['clips_better']:.0%} of clips better")
    V.say(
        f"steps: gradient norm {steps['grad_norm']:.3g}, after clipping {steps['grad_norm_clipped']:.3g}, weights "
        f"moved by {steps['change']:.2%}; failed {steps['failed']} (shuffled {report['steps']['shuffled']['failed']})"
    )
    seen = f"{steps['seen_before']:.5f} -> {steps['seen_after']:.5f}"
    V.say(f"on the seen frames themselves {seen}: what was learned from, no result")


def draw(report, path):
    """adaptation.png: the error per step of the three arms, and the gain of every clip, sorted."""
    figure = P.new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for arm in ARMS:
        values = report["arms"][arm]["per_step"]
        left.plot(range(1, 1 + len(values)), values, marker="o", color=COLOURS[arm], label=arm)
        gains = sorted(100 * (1 - E.ratio(clip[arm]["error"], clip["none"]["error"])) for clip in report["per_clip"])
        if arm != "none":
            share = 100 * (np.arange(len(gains)) + 0.5) / len(gains)
            right.plot(share, gains, marker=".", color=COLOURS[arm], label=arm)
    what = "frame after the seen ones" if report["how"]["mode"] == "sequential" else "horizon, frames"
    left.set(xlabel=what, ylabel="error", xticks=range(1, 1 + len(values)))
    left.set_title(f"Error of later frames, {report['clips']} clips", fontsize=12)
    right.axhline(0, color="#999999", linewidth=1, linestyle="--")
    right.set(xlabel="clips, sorted, %", ylabel="error saved, %")
    right.set_title(f"Adapted over none: {percent(report['gains']['adapted over none'])}", fontsize=12)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    P.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> namespace."""
    path = dict(default="", type=os.path.expanduser)
    parser = V.ArgumentParser(description="Test-time adaptation, scored on later frames.", allow_abbrev=False)
    flag = parser.add_argument
    flag("ckpt", type=os.path.expanduser, metavar="CHECKPOINT", help="checkpoint of worlds/hope.py")
    flag("--data_root", **path, help="clips to take [those of the run]")
    flag("--side", choices=(*V.SIDES, "all"), default="test", help="which side of them, or all of them [test]")
    flag("--layers", default=How.layers, help=f"{'|'.join(PARTS)}: each with those before it; a+b: exactly these")
    flag("--mode", default=How.mode, help=f"{'|'.join(MODES)} [{How.mode}]")
    flag("--accumulate", action="store_true", help="weights go on from clip to clip [anew in every clip]")
    flag("--optimizer", default=How.optimizer, help=f"{'|'.join(OPTIMIZERS)} [{How.optimizer}]")
    flag("--lr", type=float, default=How.lr, help=f"learning rate [{How.lr:g}]")
    flag("--steps", type=int, default=How.steps, help=f"gradient steps per clip, or frame if sequential [{How.steps}]")
    flag("--grad_clip", type=float, default=How.grad_clip, help=f"largest norm of a gradient, 0: any [{How.grad_clip}]")
    flag("--seen", type=int, default=How.seen, help="first frames of a clip that are known, 0: half of them [0]")
    flag("--context", type=int, help="true frames that the rollout over the seen frames starts from [the run's]")
    flag("--num_timesteps", type=int, help="frames of a clip less one, to take shorter clips [the run's]")
    flag("--num_clips", type=int, default=0, help="clips that are scored, evenly spread; 0: all [0]")
    flag("--resamples", type=int, default=1000, help="bootstrap draws [1000]")
    flag("--seed", type=int, default=0, help="of the bootstrap [0]")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--out", **path, help="folder to write into [the run's folder / adaptation]")
    args = parser.parse_args(argv)
    E.check_limits(args, {"num_clips": (0, 10**9), "resamples": (1, 10**6), "seed": (0, 2**32)})
    return args


def open_side(world, cfg, about, args):
    """The data set of a side of a run's clips, or of those given instead. UsageError where there are none."""
    frames = cfg.num_timesteps if args.num_timesteps is None else args.num_timesteps
    if not 0 < frames <= cfg.num_timesteps:
        raise V.UsageError(f"num_timesteps = {frames}: must be 1 to {cfg.num_timesteps}, the run's (--num_timesteps)")
    cfg = replace(cfg, data_root=E.videos_of(about["data"], args.data_root), num_timesteps=frames)
    source = V.open_data(type(world), cfg, V.list_data(cfg, type(world).Dataset), True, None)
    sides, data = {"train": source.train, "val": source.val, "test": source.test}, source.dataset(cfg, "test")
    sides["all"] = list(dict.fromkeys(clip for side in sides.values() for clip in side))
    data.videos = sides[args.side]
    if not data.videos:
        raise V.UsageError(f"side = {args.side}: {cfg.data_root} has no clips on it (--side, --data_root)")
    return data


def open_world(path, device):
    """A checkpoint of worlds/hope.py -> (world, config, {step, data}). UserError for another world."""
    world, cfg, about = E.load_world(path, device)
    if not all(callable(getattr(world, name, None)) for name in ("normalise", "predict", "rollout", "frame_error")):
        raise V.UserError(f"ckpt {path}: made by the world {type(world).__name__}; this tool adapts those of hope.py")
    return world.float(), cfg, about


def run(argv):
    """Command line: load, adapt, score, write, print -> exit code."""
    args = parse(argv)
    E.need("matplotlib")
    settings = {entry.name: getattr(args, entry.name) for entry in fields(How)}
    settings = {name: value for name, value in settings.items() if value is not None}
    world, cfg, about = open_world(args.ckpt, args.device)
    data, bar = open_side(world, cfg, about, args), E.Bar()
    report = {"checkpoint": str(args.ckpt), "step": about["step"], "side": args.side}
    report |= {"data_root": data.data_root, "predictor": getattr(cfg, "predictor", "")}
    report |= adaptation_gain(world, data, args.num_clips, args.resamples, args.seed, bar, **settings)
    bar.close()
    report["seconds"], out = round(bar.seconds, 1), P.output_folder(args, "adaptation")
    V.write_report(out / "adaptation.json", E.without_nan(report))
    draw(report, out / "adaptation.png")
    print_report(report)
    V.say(f"written: {out / 'adaptation.json'}, {out / 'adaptation.png'} ({report['seconds']:.0f} s)")
    return V.EXIT_OK


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
