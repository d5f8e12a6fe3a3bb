"""Train all rivals of worlds/hope.py at equal compute on the same latents, and write down which predicts best.

    python tools/rivals.py --out records/rivals [--minutes 60] [--device cpu]       trains an encoder itself
    python tools/rivals.py --out DIR --ckpt RUN/checkpoints/ckpt_final.pt           with the encoder of a checkpoint
    python tools/rivals.py --out DIR --data_root FOLDERS [--shift ice=FOLDERS2]     latents that are there already

Built-in scenes that no run has seen, of kinds whose futures hang on the driver (--scene_mix), go through the target
encoder of a checkpoint with their true actions (by tools/cache_latents.py --layout hope), three times: as they are, and
further ones as other colours (palette) and another camera show them. Without --ckpt the preset tiny trains it first,
for --encoder_steps steps. Each rival then trains by the real command of worlds/hope.py, once per seed, and is scored on
the test part of the clips, which no run has seen, and on the shifted ones. Flags that are not named here go to
worlds/hope.py.

Equal compute: --match flop (default) gives each the floating-point operations that --steps steps of the first rival
that learns take, counted on a real step in each part of the curriculum, whose three parts are thirds of its run with
rollouts of 2, 4 and all frames; --match seconds the time of such steps, measured here, with as many processes at once
as will train; --match steps the same steps. --steps 0 takes as many as fill 70 % of what is left of --minutes by
that measurement, 50 % on a GPU. All three are reported.

Written under --out, whole or not at all: rivals.json and rivals.md. Folders, runs and single evaluations stay in
--work (runs/<name of --out>); the same command goes on from what is finished there, and after --minutes ends with a
line that says so.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import adapt as A
import evaluate as E
import numpy as np
import torch

import VJepa_AUTO_V2 as V

RIVALS = {  # name -> flags of its run
    "identity": ("--preset", "vjepa2_ac_tiny", "--predictor", "identity"),
    "convlstm": ("--preset", "baseline_convlstm_tiny"),
    "ac_vit": ("--preset", "vjepa2_ac_tiny"),
    "hope": ("--preset", "hope_param_matched_tiny"),
    "hybrid": ("--preset", "hope_hybrid_tiny"),
}
ARMS = ("true", "shuffled", "zero", "still")  # actions of a rollout; the first frame repeated
SHIFTS = ("palette", "camera")
ENCODER = (  # NOW and SOON of the preset tiny; the flow net is as small as it can be
    *("--preset", "tiny", "--scenes", "render", "--lambda_flow", "0", "--lambda_eventually", "0", "--flow_dim", "32"),
    *("--flow_depth", "1", "--flow_heads", "2", "--flow_rank", "4", "--flow_chunks", "1", "--flow_joint_max", "16"),
    *("--no-picture", "--val_every", "0"),
)
# share of what is left of --minutes that training may take as measured: on a GPU, where steps wait for kernels to
# be started, adaptation to single clips takes as long as to batches
FILL = {True: 0.7, False: 0.5}
MEASURED_S = 3.0  # seconds of steps that are measured in each part of the curriculum
GRACE_S = 60.0  # a run that is told to stop saves within


# -- processes, each with an end


def end(process):
    """Tell a process of ours to stop, wait until it has saved, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_all(commands, num_at_once, deadline):
    """Run {name: (command of this Python, file of its output)}, some at a time. UserError for one that fails, and when
    the deadline (time.monotonic) passes; none goes on behind us."""
    waiting, active = list(commands.items()), {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.setdefault("OMP_NUM_THREADS", str(max(V.usable_cores() // max(min(num_at_once, len(commands)), 1), 1)))
    try:
        while waiting or active:
            while waiting and len(active) < num_at_once:
                name, (command, log) = waiting.pop(0)
                V.say(f"{name}: {log}")
                with open(log, "a") as output:
                    output.write(f"+ python {' '.join(map(str, command))}\n")
                with open(log, "ab") as output:
                    told = dict(cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                    active[name] = subprocess.Popen([sys.executable, *map(str, command)], **told), log
            time.sleep(0.1)
            for name, (process, log) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[name]
                if process.returncode:
                    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                    raise V.UserError(f"{name}: ended with exit code {process.returncode} ({V.flat(last)}); see {log}")
            if active and time.monotonic() > deadline:
                names = ", ".join(active)
                raise V.UserError(f"minutes are over while {names} ran; the same command goes on (--minutes)")
    finally:
        for process, _ in active.values():
            end(process)


# -- latents


def make_encoder(args, deadline):
    """Where a checkpoint that encodes lies; trained here if none was given."""
    place = args.work / "encoder"
    path = place / "checkpoints" / "ckpt_final.pt"
    if not path.is_file():
        command = ["VJepa_AUTO_V2.py", *ENCODER, "--scene_mix", args.scene_mix, "--steps", args.encoder_steps]
        command += ["--warmup_steps", args.encoder_steps // 10, "--device", args.device, "--out_dir", place]
        run_all({"encoder": (command, args.work / "encoder.log")}, 1, deadline)
    return path


def cache_clips(args, deadline):
    """Encode the scenes in all views -> {name: folder}, `plain` first."""
    if args.data_root:
        return {"plain": args.data_root, **args.shifts}
    ckpt = args.ckpt or make_encoder(args, deadline)
    folders = {view: args.work / "latents" / view for view in ("plain", *SHIFTS)}
    commands = {}
    for number, (view, folder) in enumerate(folders.items()):
        if (folder / "index.csv").is_file():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        clips, kind = args.shift_clips if number else args.clips, "plain" if number == 0 else view
        command = ["tools/cache_latents.py", "--layout", "hope", "--out", folder, "--ckpt", ckpt, "--view", kind]
        command += ["--signals", args.signals, "--scene_clips", max(clips, 4), "--device", args.device, "--no-states"]
        command += ["--num_workers", min(V.usable_cores(), 8), "--clip_latents", args.clip_latents]
        command += ["--seed", args.scene_seed + (number > 0)]  # shifted scenes are others than those that train
        command += ["--scene_mix", args.scene_mix]
        commands[f"latents, {view}"] = (command, args.work / f"latents_{view}.log")
    run_all(commands, args.jobs, deadline)
    return folders


def sizes_of(folder, feature_map):
    """What a run must be told of feature folders, by the first clip -> {field: value}. UsageError."""
    maps = sorted(folder.glob(f"clip_*/feature_maps/{feature_map or '*'}.npy"))
    if not maps:
        raise V.UsageError(f"data_root {folder}: no clip_<id>/feature_maps/{feature_map or '*'}.npy")
    try:
        shape = np.load(maps[0], mmap_mode="r").shape
        steps, wide = np.load(maps[0].parents[1] / "actions_states" / "actions.npy", mmap_mode="r").shape
    except (OSError, ValueError) as error:
        raise V.UsageError(f"data_root {folder}: {maps[0].parents[1].name} cannot be read ({V.flat(error)})") from error
    patches = shape[0] // (steps + 1) if len(shape) == 2 else math.prod(shape[1:-1])
    high, wide_grid = shape[1:3] if len(shape) == 4 else (math.isqrt(patches),) * 2
    if high * wide_grid != patches:
        high, wide_grid = 1, patches
    grid = dict(grid_high=high, grid_wide=wide_grid, num_timesteps=steps, action_dim=wide)
    return dict(feature_map=maps[0].stem, feature_dim=shape[-1], **grid)


# -- plan: equal compute


def curriculum(steps, frames):
    """Rollouts of 2, 4 and all frames in thirds of a run -> text for --curriculum."""
    parts = {steps * third // 3: min(length, frames) for third, length in enumerate((2, 4, frames))}
    return ";".join(f"{begin}s:rollout={length}" for begin, length in parts.items())


def flags_of(args, name, sizes, folder):
    """The flags of a rival's run, but for seed, steps and place."""
    told = {**sizes, "data_root": folder, "device": args.device, "test_fraction": args.test_fraction}
    flags = [*args.rivals[name], *(part for key, value in told.items() for part in (f"--{key}", str(value)))]
    return [*flags, *args.flags]


def open_rival(args, name, sizes, folder):
    """(class of the world, config of a rival, with parts of the curriculum that begin at steps 0, 1 and 2). UsageError
    for a preset or flags that there are not."""
    world, parts = V.import_world(ROOT / "worlds" / "hope.py", "Hope"), curriculum(3, sizes["num_timesteps"])
    try:
        cfg, _, _ = V.resolve_config([*flags_of(args, name, sizes, folder), "--curriculum", parts], world)
    except V.UsageError as error:
        raise V.UsageError(f"rival {name}: {error} (--rivals)") from error
    return world, cfg


def source_of(world, cfg, folder):
    """The feature folders at a place as a run of this config sees them -> DataSource."""
    cfg = replace(cfg, data_root=str(folder))
    return V.open_data(world, cfg, V.list_data(cfg, world.Dataset), True, None)


class Products(V.Ledger):
    """Counts the FLOP of products in real passes, where numbers have values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def open_steps(args, name, sizes, folder, num_clips, device):
    """A rival and a batch of num_clips, 0 = its own -> (model, batch without its step, clips of a real batch)."""
    world, cfg = open_rival(args, name, sizes, folder)
    torch.manual_seed(0)
    source = source_of(world, cfg, folder)
    model, data = world(cfg).to(device).train(), source.dataset(cfg, "train")
    samples = V.collate([data[index] for index in range(num_clips or cfg.batch_size)])
    batch = V.to_device({key: value for key, value in samples.items() if key != "bad"}, device)
    return model, batch, cfg.batch_size


def one_step(model, batch, step):
    """Forward and backward pass of a part of the curriculum."""
    model({**batch, "step": torch.tensor(step)})[0]["loss_total"].backward()


def count(args, name, sizes, folder):
    """A rival's parameters and FLOP of a step, mean over the parts of the curriculum -> dict. Counted on real passes of
    two clips on the CPU; element-wise work is not counted."""
    model, batch, size = open_steps(args, name, sizes, folder, 2, torch.device("cpu"))
    flop, learning = [], sum(parameter.numel() for parameter in model.trained().values())
    for step in range(3 if learning else 0):
        with Products() as counter:
            one_step(model, batch, step)
        flop.append(counter.flop * size / 2)
    return dict(parameters=learning, flop=statistics.fmean(flop) if flop else 0.0)


def measure(args, name, sizes, folder):
    """Seconds of a rival's step on the device that trains, mean over the parts of the curriculum."""
    device, seconds = V.choose_device(args.device, 0), []
    model, batch, _ = open_steps(args, name, sizes, folder, 0, device)
    for step in range(3):
        one_step(model, batch, step)  # kernels are chosen, memory is taken
        began, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - began < MEASURED_S:
            one_step(model, batch, step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            steps += 1
        seconds.append((time.perf_counter() - began) / steps)
    return statistics.fmean(seconds)


def measure_all(args, argv, names, deadline):
    """Seconds of a step of these rivals, measured while as many processes work as will train -> {rival: seconds}."""
    seeds = args.seeds[: max(args.jobs // max(len(names), 1), 1)]
    paths = {(name, seed): args.work / f"seconds_{name}_{seed}" for seed in seeds for name in names}
    commands = {}
    for (name, seed), path in paths.items():
        command = ["tools/rivals.py", *argv, "--measure", name, "--evaluate", path.name]
        commands[f"steps of {name}, {seed}"] = command, args.work / f"{name}_{seed}.log"
    run_all(commands, args.jobs, deadline)
    found = {pair: float(path.read_text()) for pair, path in paths.items()}
    return {name: statistics.fmean(value for pair, value in found.items() if pair[0] == name) for name in names}


def steps_of(args, plan, seconds_left):
    """{rival: {parameters, flop, seconds}} -> the same with the steps that each takes."""
    learning = [name for name, row in plan.items() if row["parameters"]]
    unit = {name: dict(flop=row["flop"], seconds=row["seconds"], steps=1)[args.match] for name, row in plan.items()}
    first = unit[learning[0]] if learning else 1
    each = [plan[name]["seconds"] * first / unit[name] for name in learning]  # for a step of the first one
    if not args.steps and learning:
        wall = max(max(each), sum(each) * len(args.seeds) / args.jobs)
        args.steps = max(int(FILL[args.device == "cpu"] * seconds_left / wall), 3)
    for name, row in plan.items():
        row["steps"] = max(round(args.steps * first / unit[name]), 3) if row["parameters"] else 1
    return plan


def make_plan(args, argv, sizes, folder, deadline):
    """How many steps each rival gets -> {rival: {parameters, flop, seconds, steps}}, kept in plan.json. UserError where
    that was made with other settings."""
    path, asked = args.work / "plan.json", {"sizes": sizes, "match": args.match, "steps": args.steps}
    asked |= {"rivals": {name: list(flags) for name, flags in args.rivals.items()}, "flags": args.flags}
    asked |= {"ckpt": str(args.ckpt or ""), "data_root": str(folder), "device": args.device}
    asked |= {"test_fraction": args.test_fraction, "scene_mix": args.scene_mix, "signals": args.signals}
    if path.is_file():
        known = V.parse_json(V.read_text(path, 2**24))
        other = [name for name in asked if known["asked"].get(name) != json.loads(json.dumps(asked[name]))]
        if other:
            raise V.UserError(f"work {args.work}: holds rivals of other {', '.join(other)}; use another --work")
        return known["plan"]
    plan = {name: count(args, name, sizes, folder) for name in args.rivals}
    seconds = measure_all(args, argv, [name for name, row in plan.items() if row["parameters"]], deadline)
    for name, row in plan.items():
        row["seconds"] = seconds.get(name, 0.0)
    plan = steps_of(args, plan, deadline - time.monotonic())
    V.write_atomic(path, lambda handle: handle.write(json.dumps({"asked": asked, "plan": plan}, indent=1).encode()))
    return plan


def tell_plan(args, plan):
    """The plan as lines. A warning where it takes longer than --minutes."""
    for name, row in plan.items():
        total = f"{row['steps'] * row['flop']:.3g} FLOP, about {row['steps'] * row['seconds'] / 60:.3g} min per seed"
        V.say(f"{name}: {row['parameters']:,} parameters, {row['steps']} steps, {total}")
    each = [row["steps"] * row["seconds"] / 60 for row in plan.values()]
    whole = max(max(each), sum(each) * len(args.seeds) / args.jobs)
    if whole > args.minutes:
        V.say(f"WARNING: training takes about {whole:.0f} min, and --minutes is {args.minutes:g}", sys.stderr)


# -- training


def seeds_of(args, row):
    """The seeds of a rival: what learns nothing is the same for all."""
    return args.seeds if row["parameters"] else args.seeds[:1]


def train_all(args, plan, sizes, folder, deadline):
    """Every rival with every seed, seeds in turn, so that a stop leaves whole comparisons."""
    commands = {}
    for seed in args.seeds:
        for name, row in plan.items():
            place = args.work / f"{name}_{seed}"
            if seed not in seeds_of(args, row) or (place / "checkpoints" / "ckpt_final.pt").is_file():
                continue
            place.mkdir(parents=True, exist_ok=True)
            command = ["worlds/hope.py", *flags_of(args, name, sizes, folder), "--steps", row["steps"], "--seed", seed]
            command += ["--curriculum", curriculum(row["steps"], sizes["num_timesteps"]), "--val_every", 0]
            command += ["--warmup_steps", row["steps"] // 10, "--log_every", max(row["steps"] // 30, 1)]
            command += ["--ckpt_every", max(row["steps"] // 4, 1), "--out_dir", place]
            commands[f"{name}, seed {seed}"] = (command, args.work / f"{name}_{seed}.log")
    run_all(commands, args.jobs, deadline)


def training_seconds(place, steps, batch_size):
    """Seconds of a run's steps, by the rate of its log lines, loading and evaluations left out; nan if none tell it."""
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    rates = [row["clips_per_s"] for row in rows if row.get("clips_per_s") and math.isfinite(row["clips_per_s"])]
    return steps * batch_size * statistics.fmean(1 / rate for rate in rates) if rates else math.nan


# -- evaluation: clips -> errors per horizon


def clips_of(data):
    """The first window of every clip of a dataset, in order -> {name: tensors [1, ...]}. Bad ones are told."""
    found = {}
    for number, video in enumerate(data.videos):
        try:
            found[video.name] = {key: value[None] for key, value in data.read(number, 0.0).items()}
        except V.BadFile as error:
            V.say(f"WARNING: {video.name} is left out: {error}", sys.stderr)
    if len(found) < 2:
        raise V.UserError(f"{data.data_root}: {len(found)} clips to be scored, and two are needed: shuffled actions")
    return found


@torch.no_grad()
def score(model, clips, batch_size=32):
    """Rollouts from the first frame -> {arm: errors [clips, T]}: with true, another clip's and no actions, and the
    first frame repeated. The other clip is half of all further on: neighbours may be of one video. States go with the
    actions: later ones tell what these did."""
    device, names, parts = next(model.parameters()).device, list(clips), {arm: [] for arm in ARMS}
    whole = {key: torch.cat([clips[name][key] for name in names]) for key in clips[names[0]]}
    told = {"true": {key: whole[key] for key in ("actions", "states")}}
    told["shuffled"] = {key: value.roll(len(names) // 2, 0) for key, value in told["true"].items()}
    told["zero"] = {key: torch.zeros_like(value) for key, value in told["true"].items()}
    for first in range(0, len(names), batch_size):
        batch = {key: value[first : first + batch_size].to(device) for key, value in whole.items()}
        z, extrinsics = model.normalise(batch["features"]), batch.get("extrinsics")
        for arm, given in told.items():
            actions, states = (given[key][first : first + batch_size].to(device) for key in ("actions", "states"))
            preds = model.rollout(z, actions, states, extrinsics, context=1, steps=actions.shape[1])
            parts[arm].append(model.frame_error(preds, z[:, 1:]))
        parts["still"].append(model.frame_error(z[:, :1].expand_as(z[:, 1:]), z[:, 1:]))
    return {arm: torch.cat(errors).cpu().double().numpy() for arm, errors in parts.items()}


def adapt_to(args, model, data):
    """What adaptation saves on the clips of a dataset -> {before, adapted: errors per clip}, or {why} where it cannot
    be."""
    how = dict(layers=args.adapt_layers, lr=args.adapt_lr, steps=args.adapt_steps, context=1)
    try:
        report = A.adaptation_gain(model, data, args.adapt_clips, resamples=2, **how)
    except V.UserError as error:
        return {"why": str(error)}
    return {arm: [clip[arm]["error"] for clip in report["per_clip"]] for arm in A.ARMS}


def asked_of(args, place, folders):
    """What decides an evaluation -> dict of texts and numbers."""
    names = ("adapt_layers", "adapt_lr", "adapt_steps", "adapt_clips")
    info = os.stat(place / "checkpoints" / "ckpt_final.pt")
    views = {view: str(folder) for view, folder in folders.items()}
    return {**{name: getattr(args, name) for name in names}, "views": views, "run": [info.st_size, info.st_mtime_ns]}


def known_scores(args, place, folders):
    """What was found of a run by the same settings -> dict, None where nothing was."""
    path = place / "rivals.json"
    found = V.parse_json(V.read_text(path, 2**28)) if path.is_file() else {}
    return found["views"] if found.get("asked") == asked_of(args, place, folders) else None


def evaluate(args, place, folders):
    """A run's errors on the test clips and on shifted ones, kept in its folder."""
    model, cfg = V.load_model(place / "checkpoints" / "ckpt_final.pt", V.choose_device(args.device, 0))
    world, found = type(model), {}
    for view, folder in folders.items():
        source = source_of(world, cfg, folder)
        data = source.dataset(cfg, "test")
        if view != "plain":  # none of it was ever trained on
            data.videos = list(dict.fromkeys([*source.train, *source.val, *source.test]))
        clips = clips_of(data)
        scores = {arm: errors.tolist() for arm, errors in score(model, clips).items()}
        gain = {"why": "no shift"} if view == "plain" else adapt_to(args, model, data)
        found[view] = {"clips": list(clips), "errors": scores, "adaptation": gain}
    text = json.dumps({"asked": asked_of(args, place, folders), "views": found})
    V.write_atomic(place / "rivals.json", lambda handle: handle.write(text.encode()))


def evaluate_all(args, argv, plan, folders, deadline):
    """Every run that has not been, each by a process of this command."""
    commands = {}
    for name, row in plan.items():
        for place in (args.work / f"{name}_{seed}" for seed in seeds_of(args, row)):
            if known_scores(args, place, folders) is None:
                command = ["tools/rivals.py", *argv, "--evaluate", place.name]
                commands[f"{place.name}, evaluation"] = command, args.work / f"{place.name}.log"
    run_all(commands, args.jobs, deadline)


# -- figures


def saved(rows):
    """Errors [..., 2] of a reference and of what is held against it -> share of the reference's error that is saved."""
    total = np.asarray(rows, float).reshape(-1, 2).sum(0)
    return 1 - total[1] / total[0] if total[0] > 0 else math.nan


def interval(table, num=1000):
    """95 % interval of `saved` over errors [seeds, clips, 2], both drawn anew with replacement -> [low, high]."""
    table, rng = np.asarray(table, float), np.random.default_rng(0)
    drawn = []
    for _ in range(num):
        seeds, clips = (rng.integers(0, count, count) for count in table.shape[:2])
        drawn.append(saved(table[seeds][:, clips]))
    return [float(value) for value in np.nanquantile(drawn, (0.025, 0.975))]


def figure(reference, other):
    """Errors [seeds, clips] twice -> {share of the reference's error that is saved, interval, of each seed}."""
    table = np.stack([reference, other], -1)
    return {"value": saved(table), "interval": interval(table), "seeds": [saved(rows) for rows in table]}


def adaptation_figure(parts):
    """What adaptation saved under a shift, of each seed -> {adapted, shuffled: over none, over_shuffled} or {why}."""
    for part in parts:
        if "why" in part:
            return part
    none, shuffled, adapted = ([part[arm] for part in parts] for arm in A.ARMS)
    pairs = {"adapted": (none, adapted), "shuffled": (none, shuffled), "over_shuffled": (shuffled, adapted)}
    return {name: figure(*pair) for name, pair in pairs.items()}


def figures_of(runs):
    """A rival's evaluations, one per seed -> figures of the test part and of each shift."""
    found = {}
    for view in runs[0]:
        errors = {arm: np.array([run[view]["errors"][arm] for run in runs]) for arm in ARMS}  # [seeds, clips, T]
        horizons = range(errors["true"].shape[2])
        row = {
            "clips": errors["true"].shape[1],
            "error": errors["true"].mean((0, 1)).tolist(),
            "still": errors["still"].mean((0, 1)).tolist(),
            "saved": [figure(errors["still"][:, :, h], errors["true"][:, :, h]) for h in horizons],
        }
        means = {arm: values.mean(2) for arm, values in errors.items()}
        row["saved_all"] = figure(means["still"], means["true"])
        row |= {f"actions_over_{arm}": figure(means[arm], means["true"]) for arm in ("shuffled", "zero")}
        found[view] = row | {"adaptation": adaptation_figure([run[view]["adaptation"] for run in runs])}
    return found


def compare(args, evaluations):
    """Each rival against each other on the test part -> {a: {b: figure}}, where both have all seeds."""
    means = {}
    for name, runs in evaluations.items():
        rows = np.array([run["plain"]["errors"]["true"] for run in runs]).mean(2)
        means[name] = np.repeat(rows, len(args.seeds), 0) if len(rows) == 1 else rows
    return {a: {b: figure(means[b], means[a]) for b in means if b != a} for a in means}


def percent(entry):
    """A share with its interval as text, none where there is no such figure."""
    if not entry:
        return "none"
    value, low, high = (round(number, 3) + 0.0 for number in (entry["value"], *entry["interval"]))  # no -0
    return f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"


def table(heads, rows):
    """Texts -> lines of a table."""
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]


def sure(entries):
    """{name: figure or None} -> the names whose whole interval is above 0, as text."""
    return ", ".join(name for name, entry in entries.items() if entry and entry["interval"][0] > 0) or "none"


def verdict(report):
    """Sentences that follow from the figures."""
    rivals, lines = {name: row for name, row in report["rivals"].items() if row["parameters"]}, []
    below = [name for name, row in rivals.items() if all(each["value"] > 0 for each in row["plain"]["saved"])]
    whole = [name for name in below if all(each["interval"][0] > 0 for each in rivals[name]["plain"]["saved"])]
    told = f"Better than identity at every horizon: {', '.join(below) or 'none'}"
    lines.append(f"{told}; with the whole interval: {', '.join(whole) or 'none'}.")
    best = max((row["plain"]["saved_all"]["value"], name) for name, row in report["rivals"].items())[1]
    lines.append(f"Least error over all horizons: {best}, surely below {sure(report['pairs'][best])}.")
    for arm, what in (("shuffled", "those of another clip"), ("zero", "zeros")):
        gains = {name: row["plain"][f"actions_over_{arm}"] for name, row in rivals.items()}
        lines.append(f"True actions surely save error beside {what}: {sure(gains)}.")
    for view in report["shifts"]:
        for kind, what in (("adapted", "none"), ("over_shuffled", "adaptation to shuffled targets")):
            gains = {name: row[view]["adaptation"].get(kind) for name, row in rivals.items()}
            lines.append(f"Under {view}, adaptation surely saves error beside {what}: {sure(gains)}.")
    return ["", *(f"* {line}" for line in lines)]


def markdown(report):
    """The report as tables."""
    rivals, settings = report["rivals"], report["settings"]
    plain = next(iter(rivals.values()))["plain"]
    frames = len(plain["error"])
    picked = sorted({1, 2, 4, frames // 2, frames} & set(range(1, frames + 1)))
    lines = [
        f"Rivals at equal {settings['match']}, {len(settings['seeds'])} seeds, {plain['clips']} test clips, {frames} "
        "frames on own guesses from one. Shares of an error that are saved, with 95 % intervals over seeds and clips."
    ]
    rows = []
    for name, row in rivals.items():
        took = "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f}"  # one step tells no time
        cost = [name, f"{row['parameters']:,}", str(row["steps"]), f"{row['flop']:.2g}", took]
        rows.append([*cost, *(percent(row["plain"]["saved"][h - 1]) for h in picked)])
    heads = ["rival", "parameters", "steps", "FLOP", "seconds", *(f"over identity, {h}" for h in picked)]
    lines += table(heads, rows)
    kinds = ("saved_all", "actions_over_shuffled", "actions_over_zero")
    rows = [[name, *(percent(row["plain"][kind]) for kind in kinds)] for name, row in rivals.items()]
    lines += table(["rival", "over identity, all frames", "true actions over shuffled", "over zeros"], rows)
    for view in report["shifts"]:
        rows = []
        for name, row in rivals.items():
            gains = (row[view]["adaptation"].get(kind) for kind in ("adapted", "shuffled", "over_shuffled"))
            rows.append([name, percent(row[view]["saved_all"]), *map(percent, gains)])
        told = ("over identity", "adapted over none", "shuffled targets over none", "adapted over shuffled")
        lines += table([f"under {view}", *told], rows)
    return "\n".join([*lines, *verdict(report), "", f"Times on {report['machine']}.", ""])


def make_report(args, plan, sizes, folders):
    """The figures of all runs, which are evaluated -> dict."""
    rivals, evaluations = {}, {}
    for name, row in plan.items():
        places = [args.work / f"{name}_{seed}" for seed in seeds_of(args, row)]
        evaluations[name] = [known_scores(args, place, folders) for place in places]
        _, cfg = open_rival(args, name, sizes, folders["plain"])
        seconds = statistics.fmean(training_seconds(place, row["steps"], cfg.batch_size) for place in places)
        cost = dict(parameters=row["parameters"], steps=row["steps"], flop=row["flop"] * row["steps"], seconds=seconds)
        rivals[name] = {**cost, **figures_of(evaluations[name])}
    names = ("match", "seeds", "signals", "clips", "shift_clips", "test_fraction", "adapt_layers", "adapt_lr")
    settings = {name: getattr(args, name) for name in (*names, "adapt_steps", "adapt_clips")}
    settings |= {"sizes": sizes, "rivals": args.rivals, "flags": args.flags, "plan": plan}
    device = V.choose_device(args.device, 0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{V.usable_cores()} CPU cores"
    report = {"settings": settings, "machine": f"{where}, {platform.machine()}, {args.jobs} run(s) at a time"}
    shifts = [view for view in folders if view != "plain"]
    return report | {"shifts": shifts, "rivals": rivals, "pairs": compare(args, evaluations)}


# -- command


def named(texts, what):
    """NAME=VALUE texts -> {name: value}. UsageError."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, is_set, value) in zip(texts, pairs) if not (name and is_set and value)]:
        raise V.UsageError(f"{what} {wrong[0]}: must be NAME=VALUE (--{what})")
    return {name: value for name, _, value in pairs}


def parse(argv):
    """Command line -> namespace. UsageError."""
    parser = V.ArgumentParser(description="All rivals at equal compute on the same latents.", allow_abbrev=False)
    flag, path = parser.add_argument, lambda text: Path(os.path.expanduser(text))
    flag("--out", required=True, type=path, help="folder of the record")
    flag("--work", type=path, help="folder of latents and runs [runs/<name of --out>]")
    flag("--ckpt", type=path, help="checkpoint of VJepa_AUTO_V2.py that encodes built-in scenes")
    flag("--data_root", type=path, help="feature folders instead")
    flag("--feature_map", default="", help="name of their maps [the first one's]")
    flag("--shift", nargs="*", default=[], metavar="NAME=FOLDERS", help="shifted clips beside --data_root")
    names = ", ".join(RIVALS)
    flag("--rivals", nargs="+", default=list(RIVALS), metavar="NAME[=PRESET]", help=f"[{names}]")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag("--match", choices=("flop", "seconds", "steps"), default="flop", help="what is equal [flop]")
    flag("--minutes", type=float, default=60.0, help="longest time of the whole command [60]")
    flag("--jobs", type=int, default=0, help="runs at a time; 0 = one per core [0]")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--signals", default="steer,accel,speed", help="actions of the scenes")
    flag("--scene_mix", default="steered=4,lane=1,brake=1", help="kinds of scenes [steered=4,lane=1,brake=1]")
    flag("--evaluate", default="", help=argparse.SUPPRESS)  # a run in --work, by a process of its own
    flag("--measure", default="", help=argparse.SUPPRESS)  # a rival, into the file of --work that --evaluate names
    flag("--adapt_layers", default="layernorm+bias", help="what adaptation changes, as in tools/adapt.py")
    for name, kind, default, text in (
        ("steps", int, 0, "steps of the first rival that learns; 0 = what --minutes allows"),
        ("encoder_steps", int, 300, "steps of the encoder, without --ckpt"),
        ("clips", int, 1500, "scenes that are encoded to train, validate and test"),
        ("clip_latents", int, 7, "latents of a clip, one more than frames to predict"),
        ("shift_clips", int, 64, "scenes of each shift"),
        ("scene_seed", int, 7, "of the scenes"),
        ("test_fraction", float, 0.15, "share of the clips that no run sees"),
        ("adapt_lr", float, 5e-4, "learning rate of adaptation"),
        ("adapt_steps", int, 5, "steps of adaptation per clip"),
        ("adapt_clips", int, 16, "clips that are adapted to, evenly spread; 0 = all"),
    ):
        flag(f"--{name}", type=kind, default=default, help=f"{text} [{default:g}]")
    args, args.flags = parser.parse_known_args(argv)
    return check(args)


def check(args):
    """Fill in what follows from other flags. UsageError."""
    args.work = args.work or ROOT / "runs" / args.out.resolve().name
    chosen = dict(text.partition("=")[::2] for text in args.rivals)
    unknown = [name for name, preset in chosen.items() if not preset and name not in RIVALS]
    for wrong, what in (
        (args.ckpt and args.data_root, "ckpt and data_root: one of them at most (--ckpt, --data_root)"),
        (args.ckpt and not args.ckpt.is_file(), f"ckpt {args.ckpt}: no such checkpoint (--ckpt)"),
        (args.data_root and not args.data_root.is_dir(), f"data_root {args.data_root}: no folder (--data_root)"),
        (args.shift and not args.data_root, "shift: goes with --data_root; scenes have their own (--shift)"),
        (unknown, f"rivals: {', '.join(unknown)} is none of {', '.join(RIVALS)}; NAME=PRESET adds one (--rivals)"),
        (len(set(args.seeds)) < len(args.seeds), "seeds: one stands there twice (--seeds)"),
        (not 0 < args.minutes <= 10**5, f"minutes = {args.minutes:g}: must be above 0 (--minutes)"),
        (min(args.jobs, args.steps) < 0, "jobs and steps must be 0 or above (--jobs, --steps)"),
        (not 0 < args.test_fraction < 0.9, "test_fraction: must lie between 0 and 0.9 (--test_fraction)"),
    ):
        if wrong:
            raise V.UsageError(what)
    args.rivals = {name: ["--preset", preset] if preset else list(RIVALS[name]) for name, preset in chosen.items()}
    args.device = V.choose_device(args.device, 0).type
    args.jobs = args.jobs or min(V.usable_cores(), len(args.rivals) * len(args.seeds))
    args.shifts = {name: Path(folder) for name, folder in named(args.shift, "shift").items()}
    A.parts_of(args.adapt_layers)
    return args


def start(argv):
    """Encode, plan, train, evaluate, write."""
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.minutes
    args.work.mkdir(parents=True, exist_ok=True)
    folders = cache_clips(args, deadline)
    sizes = sizes_of(Path(folders["plain"]), args.feature_map)
    if args.measure:
        (args.work / args.evaluate).write_text(str(measure(args, args.measure, sizes, folders["plain"])))
        return
    if args.evaluate:
        evaluate(args, args.work / args.evaluate, folders)
        return
    plan = make_plan(args, argv, sizes, folders["plain"], deadline)
    tell_plan(args, plan)
    train_all(args, plan, sizes, folders["plain"], deadline)
    evaluate_all(args, argv, plan, folders, deadline)
    report = make_report(args, plan, sizes, folders)
    args.out.mkdir(parents=True, exist_ok=True)
    V.write_report(args.out / "rivals.json", E.without_nan(report))
    text = markdown(report)
    V.write_own(args.out / "rivals.md", lambda handle: handle.write(f"{text}<!-- {V.MARK} -->\n".encode()))
    V.emit(text, sys.stdout)


def interrupt(*_):
    """What SIGTERM does: as Ctrl-C, so that no run goes on behind us."""
    raise KeyboardInterrupt


def main(argv=None):
    """Command line -> exit code."""
    if argv is None:
        signal.signal(signal.SIGTERM, interrupt)
    return V.report_errors(start, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
