"""Encode a data set once with the frozen encoder of a world; `--latents DIR` then trains from that, without videos.

    python tools/cache_latents.py --out DIR --data_root VIDEOS --init_from FOLDER --freeze_encoder [flags of the run]
    python tools/cache_latents.py --out DIR --data_root VIDEOS --world worlds/NAME.py [flags of that world]
    python tools/cache_latents.py --out DIR ... --shard 0/4         one of four processes that share the work

Every video is covered by windows of a clip's length, one every --every_s seconds (by default they follow each other);
a shorter video gives one. Written into DIR, each file whole or not at all, so that the same command goes on after any
end and makes only what is missing:

    cache.json          encoder, settings, names, shapes and types of the tensors
    clips/<hash>.pt     the latents of a window, a dict of fp16 tensors
    clips/<hash>.bad    why a window has none; tried again by the next command
    list.jsonl          the same windows as a list for --data_root, to train on them uncached
    index.csv           one row per window (out_path, name, begin, length, group, maneuver); written last

The windows are taken as an evaluation takes them: the largest centred crop, undistorted. Shards may run at the same
time, on one machine or several that see DIR; the last one to finish writes the index.

Another layout is that of feature folders with actions, from which worlds/hope.py trains:

    python tools/cache_latents.py --layout hope --out DIR --ckpt RUN/checkpoints/ckpt_final.pt --signals steer,accel
                                  [--data_root VIDEOS] [--scene_clips 200] [--clip_latents 9] [--view palette]

Clips of videos with annotations, or without --data_root of built-in scenes that no run trains on, go through the
target encoder of a checkpoint of VJepa_AUTO_V2.py. Written are clip_<id>/feature_maps/NAME.npy [T*N, D] fp16,
clip_<id>/actions_states/ with actions.npy [T - 1, A], states.npy [T - 1, A] and extrinsics.npy [T - 1, A - 1],
cache.json and index.csv. By default each latent is made of the NOW window that ends in it, so that it knows nothing of
later frames; --see whole encodes the clip at once, as the maps of V-JEPA 2 are. docs/data.md says what stands in which
column.
"""

import os
import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as VJepa_AUTO_V2.py does, and why

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import math
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import VJepa_AUTO_V2 as V

COLUMNS = ("out_path", "name", "begin", "length", "group", "maneuver")
STALE_S = 3600.0  # age of a half-written file that nobody writes any more
TELL_S = 10.0  # between two lines of progress where no bar can be shown
LAYOUTS = ("clips", "hope")


# -- command line


def shard_of(text):
    """'2/8' -> (2, 8). UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not number < count:
        raise V.UsageError(f"shard = {V.shown(text)}: must be i/n with i from 0 to n - 1, such as 0/4 (--shard)")
    return number, count


def layout_of(argv):
    """The --layout of a command line; any other flag is nobody's yet."""
    parser = V.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layout", choices=LAYOUTS, default="clips")
    return parser.parse_known_args(argv)[0].layout


def parse(argv):
    """Command line -> (namespace of this tool's own flags, the flags of the world). UsageError."""
    about = "Encode a data set once with the frozen encoder of a world. All other flags are those of the world."
    parser = V.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--layout", choices=LAYOUTS, default="clips", help="clips | hope (feature folders)")
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--world", default="", help="file of the world; by default the main file's own")
    parser.add_argument("--every_s", "--every-s", type=float, default=0.0, help="seconds between windows; 0 = a clip's")
    parser.add_argument("--shard", default="0/1", help="i/n: make the windows i, i + n, ... of all")
    args, rest = parser.parse_known_args(argv)
    if not 0 <= args.every_s < math.inf:
        raise V.UsageError(f"every_s = {args.every_s}: must be 0 or above (--every_s)")
    args.out, args.shard = Path(os.path.expanduser(args.out)), shard_of(args.shard)
    return args, rest


def load_world(path):
    """The world in a file, the main file's own for "" -> its class. UsageError where there is none."""
    if not path:
        return V.VJepaAutoV2
    spec = importlib.util.spec_from_file_location(f"world_{Path(path).stem}", path)
    if spec is None or not os.path.isfile(path):
        raise V.UsageError(f"world {path}: no Python file (--world)")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody's code: anything may come out of it
        why = f"{type(error).__name__}: {V.flat(error)}"
        raise V.UsageError(f"world {path}: cannot be imported ({why}) (--world)") from error
    own = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, V.World)]
    own = [each for each in own if each.__module__ == spec.name and not issubclass(each, V.Fit)]
    if not own:
        raise V.UsageError(f"world {path}: holds no world (--world)")
    return own[-1]


# -- what to encode


class Lengths(V.FileDataset):
    """The usable seconds of every video, in order."""

    def candidates(self, index):
        """The file of this number, and no other in its place."""
        return [index] if index < len(self.videos) else []

    def read_file(self, video, plan):
        plan = V.draw_plan(np.random.default_rng(0), self.cfg, "val")
        plan = V.fit_plan(plan, video, V.read_annotation(self.data_root, video))
        return {"seconds": torch.tensor(V.video_timing(video.path, plan)[0], dtype=torch.float64)}

    def blank(self):
        return {"seconds": torch.zeros((), dtype=torch.float64)}


def stretches_of(video, seconds):
    """The parts of a video between gaps in the told times of its frames -> [(begin, seconds)]; one, of so many usable
    seconds, where none are told."""
    if not video.times:
        return [(video.begin, seconds)]
    begins, lengths, fps = V.stretches(video)
    return [(begin, length) for begin, length in zip(begins.tolist(), lengths.tolist()) if length > 1 / fps]


@dataclass(frozen=True)
class Window:
    """What one file of the cache stands for."""

    video: V.VideoFile  # the window as a video of its own
    name: str  # of the video that it is a part of
    group: str  # what is held out together
    seconds: float

    @property
    def out_path(self):
        """Where its latents lie: by what it is, so that it keeps them when other videos come."""
        what = f"{self.name}\0{self.video.begin:.6f}\0{self.seconds:.6f}".encode("utf-8", "surrogateescape")
        return f"clips/{hashlib.sha256(what).hexdigest()[:24]}.pt"


def windows_of(cfg, video, seconds, every_s):
    """The windows of a video of so many usable seconds -> [Window]. Each has the maneuver and the rate of its video."""
    noted = V.read_annotation(cfg.data_root, video)
    fps = video.fps or cfg.frame_fps or noted.get("fps") or 0.0
    video = replace(video, label=noted.get("maneuver", video.label), fps=fps, signals="")
    length, found = round(cfg.num_frames / cfg.clip_fps, 6) if cfg.clip_fps else math.inf, []
    for first, there in stretches_of(video, seconds):
        every, taken = every_s or length, min(length, round(there, 6))
        count = math.floor((there - length) / every + 1e-6) + 1 if there >= length else 1  # a short one is spread over
        for begin in (round(first + number * every, 6) if number else first for number in range(count)):
            # without an end of its own, a short one ends where its video does, which rounding could miss
            own = taken if there >= length or video.times else video.length
            part = replace(video, name=f"{video.name}@{begin:g}", begin=begin, length=own)
            found.append(Window(part, video.name, video.drive, taken))
    return found


def in_turn(data, cfg, told):
    """All samples of a dataset by the loader's workers, in batches, with progress -> generator of batches."""
    sampler = V.StepSampler(0, math.ceil(len(data) / cfg.batch_size), cfg.batch_size, 0, 1)
    size = V.batch_bytes(data, cfg.batch_size)
    loader, began, spoke = (
        V.ClipLoader(data, sampler, cfg.num_workers, False, cfg.decode_timeout_s, batch_bytes=size),
        0,
        0,
    )
    began = spoke = time.monotonic()
    for number, batch in enumerate(loader, 1):
        yield batch
        done, now = min(number * cfg.batch_size, len(data)), time.monotonic()
        rate = done / max(now - began, 1e-9)
        text = (
            f"{told}: {done} of {len(data)}, {rate:.3g} per second, {V.describe_time((len(data) - done) / rate)} left"
        )
        if V.is_terminal(sys.stderr):
            V.emit("\r" + V.progress_bar(done / len(data), text) + "\n" * (done == len(data)), sys.stderr)
        elif now - spoke > TELL_S or done == len(data):
            V.say(text)
            spoke = now
    loader.close()


def find_windows(cfg, videos, every_s):
    """All windows of the videos, in their order -> ([Window], [(name, why)] of the videos that have none)."""
    seconds, bad = {}, []
    for batch in in_turn(Lengths(cfg, videos, cfg.data_root, "val"), cfg, "lengths of videos"):
        bad += batch["bad"]
        seconds |= {
            number: value for number, value in zip(batch["file"].tolist(), batch["seconds"].tolist()) if number >= 0
        }
    found = [part for number in sorted(seconds) for part in windows_of(cfg, videos[number], seconds[number], every_s)]
    return found, bad


# -- what is written


def put(path, content):
    """Bytes into a file, whole or not at all."""
    V.write_atomic(path, lambda handle: handle.write(content))


def open_cache(out, about, parts=("clips",)):
    """Make the folder, or see that what it holds goes on from the same encoder and settings. UsageError."""
    path = out / "cache.json"
    if path.is_file():
        try:
            known = V.parse_json(V.read_text(path, 2**24))
        except (OSError, ValueError, RecursionError) as error:
            raise V.UsageError(
                f"out {out}: cache.json cannot be read ({V.reason_of(error)}); use another folder"
            ) from error
        other = [key for key in about if not isinstance(known, dict) or known.get(key) != about[key]]
        if other:
            then = known.get("settings", {}) if isinstance(known, dict) else {}
            names = [
                f"{name} = {then.get(name)}" for name, value in about["settings"].items() if then.get(name) != value
            ]
            plain = {"frozen": "other weights", "windows": "other videos"}
            what = ", ".join(names) or " and ".join(plain.get(key, key) for key in other)
            raise V.UsageError(f"out {out}: holds a cache made with {what}; use another folder (--out)")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise V.UsageError(f"out {out}: holds something else than a cache; use another folder (--out)")
    for folder in (out, *(out / part for part in parts)):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of processes that were killed, anywhere
            if time.time() - left.stat().st_mtime > STALE_S:
                for stale in (*left.glob("*/*.npy"), *left.glob("*"), left):
                    with suppress(OSError):  # a folder in which somebody else keeps something stays
                        stale.rmdir() if stale.is_dir() else stale.unlink(missing_ok=True)
    put(path, json.dumps(about, indent=1).encode())


def check_room(out, bytes_each, todo, total):
    """Say how large the cache becomes. UsageError where the disk has no room for what is missing."""
    need, free = bytes_each * todo, shutil.disk_usage(out).free
    size = f"{bytes_each * total / 1e9:.3g} GB: {total} windows of {bytes_each / 1e6:.3g} MB"
    V.say(f"cache: {size}, {todo} of them to be made; {free / 1e9:.3g} GB are free")
    if need > 0.98 * free:
        raise V.UsageError(
            f"out {out}: needs {need / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free (--out, --every_s)"
        )


def list_line(window):
    """A window as a line of a jsonl list."""
    video = window.video
    where = os.path.abspath(video.path)
    if video.pictures and video.pictures != "*":
        where = os.path.join(where, video.pictures)
    row = {"frames" if video.pictures else "video": where}
    row |= {name: getattr(video, name) for name in ("begin", "length", "fps", "times") if getattr(video, name)}
    return {**row, "group": window.group, **({"maneuver": video.label} if video.label else {})}


def write_index(out, windows):
    """list.jsonl, then index.csv, of the windows that have latents."""
    lines = "".join(json.dumps(list_line(window)) + "\n" for window in windows)
    put(out / "list.jsonl", lines.encode())
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for window in windows:
        video = window.video
        rows.writerow((window.out_path, window.name, video.begin, window.seconds, window.group, video.label))
    put(out / "index.csv", table.getvalue().encode("utf-8", "surrogateescape"))


# -- encoding


class Windows:
    """What makes a world's dataset read its files in order, each for itself; comes before it in a class."""

    def candidates(self, index):
        return [index] if index < len(self.videos) else []


def write_batch(out, windows, batch, latents):
    """The latents of a batch, one file for each window that could be read; why not beside the others."""
    why = dict(batch["bad"])
    for row, number in enumerate(batch["index"].tolist()):
        if number >= len(windows):
            continue
        window, reason = windows[number], ""
        tensors = {name: value[row].half().cpu().clone() for name, value in latents.items()}
        if batch["file"][row] < 0:
            reason = why.get(window.video.name, "cannot be read")
        elif odd := [name for name, value in tensors.items() if not value.isfinite().all()]:
            reason = f"{odd[0]} is not finite in fp16"
        path = out / window.out_path
        if reason:
            put(path.with_suffix(".bad"), reason.encode())
        else:
            V.write_atomic(path, lambda handle, tensors=tensors: torch.save(tensors, handle))
            path.with_suffix(".bad").unlink(missing_ok=True)


@torch.no_grad()
def encode(model, cfg, out, windows):
    """Make the latents of windows."""
    device = next(model.parameters()).device
    process = V.Process(0, 1, device, V.amp_dtype(cfg, device))
    Dataset = type("Windows", (Windows, type(model).Dataset), {})
    data = Dataset(cfg, [window.video for window in windows], cfg.data_root, "val")
    for batch in in_turn(data, cfg, "windows"):
        with V.autocast(process):
            latents = model.latents(V.to_device(batch, device))
        write_batch(out, windows, batch, latents)


def make_model(world, cfg):
    """The world with its frozen encoder -> (model in eval mode on its device, forms of the latents of a clip)."""
    if not world.latent_fields:
        raise V.UsageError(f"world {world.__name__}: has no latents to cache (--world)")
    torch.manual_seed(cfg.seed)
    model = world(cfg).eval()
    if not model.FROZEN:
        raise V.UsageError(f"world {world.__name__}: its encoder learns, so latents would not last (--freeze_encoder)")
    model.to(V.choose_device(cfg.device, 0))
    frames = torch.zeros((1, cfg.num_frames, cfg.channels, cfg.height, cfg.width), dtype=torch.uint8)
    with torch.no_grad():
        latents = model.latents({"frames": frames.to(next(model.parameters()).device)})
    return model, {name: [list(value.shape[1:]), "float16"] for name, value in latents.items()}


# -- feature folders (--layout hope)


CLIP_COLUMNS = ("clip", "name", "begin", "length", "group", "maneuver")
UNITS = {"steer": 0.05, "yaw_rate": 0.1, "heading": 0.1, "speed": 10.0}  # rad, rad/s, rad, m/s; all others 1
FIELDS = (
    *("data_root", "video_glob", "scene_clips", "scene_mix", "seed", "clip_fps", "frame_fps", "decoder"),
    *("batch_size", "num_workers", "device", "decode_timeout_s"),
)


def palette(frames):
    """Other colours: red, green and blue change places, dark parts become brighter. uint8 [..., 3, H, W]."""
    return ((frames.roll(1, -3).float() / 255).pow(0.7) * 255).round().to(torch.uint8)


def camera(frames):
    """Another camera: 1.25 times as long a lens that looks further down. uint8 [B, T, 3, H, W]."""
    high, wide = (round(side * 0.8) for side in frames.shape[-2:])
    left = (frames.shape[-1] - wide) // 2
    part = frames[..., frames.shape[-2] - high :, left : left + wide].flatten(0, 1).float()
    whole = torch.nn.functional.interpolate(part, frames.shape[-2:], mode="bilinear", antialias=True)
    return whole.round().clamp(0, 255).to(torch.uint8).reshape(frames.shape)


VIEWS = {"plain": torch.clone, "palette": palette, "camera": camera}


def parse_hope(argv):
    """Command line -> (namespace of the flags of this layout, the flags that say where clips come from). UsageError."""
    about = "Encode videos with actions, or built-in scenes, into feature folders. All other flags choose the clips."
    parser = V.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--layout", choices=LAYOUTS, help="hope")
    parser.add_argument("--out", required=True, type=Path, help="folder of the cache")
    parser.add_argument("--ckpt", required=True, help="checkpoint whose target encoder is used")
    parser.add_argument("--signals", default="steer,accel", help="lists of the annotations that are actions")
    parser.add_argument("--clip_latents", type=int, default=9, help="latents of a clip, one more than actions")
    parser.add_argument("--feature_map", default="tritemporal", help="name of the maps")
    parser.add_argument("--see", choices=("past", "whole"), default="past", help="what a latent is made of")
    parser.add_argument("--view", choices=tuple(VIEWS), default="plain", help="what is done to pictures before")
    is_flag = dict(action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--states", **is_flag, help="write states.npy and extrinsics.npy where signals allow")
    parser.add_argument("--every_s", "--every-s", type=float, default=0.0, help="seconds between clips; 0 = a clip's")
    parser.add_argument("--shard", default="0/1", help="i/n: make the clips i, i + n, ... of all")
    args, rest = parser.parse_known_args(argv)
    args.names = tuple(name.strip() for name in args.signals.split(","))
    for wrong, flag, rule in (
        (not all(args.names) or len(set(args.names)) < len(args.names), "signals", "must name each signal once"),
        (args.clip_latents < 2, "clip_latents", "must be at least 2"),
        (not re.fullmatch(r"[\w.-]+", args.feature_map), "feature_map", "must be a file name without .npy"),
        (not 0 <= args.every_s < math.inf, "every_s", "must be 0 or above"),
    ):
        if wrong:
            raise V.UsageError(f"{flag} = {V.shown(getattr(args, flag))}: {rule} (--{flag})")
    args.out, args.shard = args.out.expanduser(), shard_of(args.shard)
    return args, rest


def hope_config(args, saved, rest):
    """The config of a checkpoint with the clips of this command -> (config, frames before the first latent's).
    UsageError for a setting that is the checkpoint's own."""
    _, given, _ = V.resolve_config(rest, V.VJepaAutoV2)
    for name in given:
        if name not in FIELDS:
            raise V.UsageError(f"{name}: is the checkpoint's own here; to be chosen are {', '.join(FIELDS)} (--{name})")
    before = saved.now_frames - saved.tubelet_t if args.see == "past" else 0
    own = dict(data_root="", num_workers=2, device="auto", crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0)
    own |= dict(hflip=False, frame_cache="off", windows_per_file=1, latents="", scenes="render", actions="none")
    cfg = replace(saved, **{**own, **given}, num_frames=before + args.clip_latents * saved.tubelet_t)
    if not cfg.clip_fps:
        raise V.UsageError("clip_fps = 0: steps need a length (--clip_fps)")
    return cfg, before


class WithSignals(Windows):
    """Clips with the signals of each frame: frames uint8 [T, 3, H, W], signals float32 [T, names + 2], the last two
    being speed and yaw_rate. `since`: the first frame of which actions must be known; `sources`: the video that a
    window was cut from; `numbers`: which scenes."""

    names, since, sources, numbers = (), 0, {}, ()

    def rows(self, signals):
        """{name: [T]} -> [T, names + 2], NaN where a signal is absent. BadFile where an action is unknown."""
        absent = np.full(self.cfg.num_frames, math.nan)
        wanted = (*self.names, "speed", "yaw_rate")
        rows = np.stack([np.asarray(signals.get(name, absent), np.float64) for name in wanted], 1)
        for name, known in zip(self.names, np.isfinite(rows[self.since :]).T):
            if name not in signals:
                raise V.BadFile(f"annotation: has no {name} (--signals)")
            if not known.all():
                at = (self.since + int(np.argmin(known))) / self.cfg.clip_fps
                raise V.BadFile(f"annotation: {name} is not known {at:.3g} s after the clip's start")
        return torch.from_numpy(rows.astype(np.float32))

    def sample(self, index):
        frames, number, noted, bad, _ = self.decode(index, self.cfg.height, self.cfg.width)
        rows = noted.get("rows", self.blank()["signals"])
        frames = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
        return {"frames": frames, "signals": rows}, number, bad

    def blank(self):
        frames = super().blank()["frames"]
        return {"frames": frames, "signals": torch.zeros(len(frames), len(self.names) + 2)}


class SignalVideos(WithSignals, V.ClipDataset):
    """Windows of videos with the signals of their annotations."""

    def read_file(self, video, plan):
        source = self.sources[video]
        noted = V.read_annotation(self.data_root, source)
        frames, _ = super().read_file(video, plan)
        placed, wanted = replace(video, begin=source.begin), (*self.names, "speed", "yaw_rate")
        found = V.timed_signals(noted, placed, V.fit_plan(plan, video, noted), wanted)
        return frames, {"rows": self.rows(found)}


class SignalScenes(WithSignals, V.SceneDataset):
    """Built-in scenes with their true signals."""

    def decode(self, index, height, width):
        if index >= len(self.videos):  # the rest of a last batch
            return np.zeros((self.cfg.num_frames, height, width, 3), np.uint8), -1, {}, [], False
        frames, _, labels, bad, flip = super().decode(self.numbers[index], height, width)
        return frames, index, {"rows": self.rows(labels)}, bad, flip


@torch.no_grad()
def see_clips(model, frames, cfg, args):
    """uint8 [B, T, 3, H, W] -> latents [B, clip_latents, N, D] of the target encoder, LayerNormed without affine."""
    frames = VIEWS[args.view](frames)
    if args.see == "whole":
        return model.make_targets(model.normalise(frames)).unflatten(1, (args.clip_latents, -1))
    step, now = cfg.tubelet_t, cfg.now_frames
    windows = [frames[:, t * step : t * step + now] for t in range(args.clip_latents)]
    clip = model.normalise(torch.stack(windows, 1).flatten(0, 1))  # [B * T, now, 3, H, W]
    tokens = model.target.encode(model.target.tokenizer.cut(clip), model.now_idx.expand(len(clip), -1))
    latents = tokens[:, -cfg.sites :]  # of the last tubelet
    if hasattr(model, "target_map"):
        latents = V.layer_norm(latents) @ model.target_map
    return V.layer_norm(latents).unflatten(0, (-1, args.clip_latents))


def in_units(values, names):
    """Columns in SI units -> in the units of feature folders, which are about 1 in size."""
    return values / np.array([UNITS.get(name, 1.0) for name in names])


def beside_latents(signals, cfg, args, before):
    """signals [T, names + 2] of a clip's frames -> {file: array} of actions and, where speed and yaw_rate are known,
    states and extrinsics."""
    step, steps, A = cfg.tubelet_t, args.clip_latents - 1, len(args.names)
    signals = signals.numpy().astype(np.float64)
    of_steps = signals[before + step :, :A].reshape(steps, step, A).mean(1)
    files, moves = {"actions": in_units(of_steps, args.names)}, signals[before + step - 1 :, A:]
    if not (args.states and np.isfinite(moves).all()):
        return files
    speed, yaw_rate = moves.T  # from the last frame of the first latent on
    heading = np.append(0.0, np.cumsum((yaw_rate[1:] + yaw_rate[:-1]) / 2 / cfg.clip_fps))
    along = np.stack([speed * np.cos(heading), speed * np.sin(heading)], 1)
    place = np.concatenate([np.zeros((1, 2)), np.cumsum((along[1:] + along[:-1]) / 2 / cfg.clip_fps, 0)])
    states = in_units(np.stack([speed, heading], 1), ("speed", "heading"))
    poses = np.concatenate([in_units(heading[:, None], ("heading",)), place], 1)
    for name, columns, width in (("states", states, A), ("extrinsics", poses, A - 1)):
        wide = np.zeros((steps, width))
        wide[:, : columns.shape[1]] = columns[: steps * step : step, :width]  # last frames of all latents but the last
        files |= {name: wide} if width else {}
    return files


def clip_folder(out, number):
    """Where a clip lies, by its number among all windows, which cache.json knows."""
    return out / f"clip_{number:05d}"


def write_clip(folder, feature_map, latents, files):
    """A clip's folder, whole or not at all. latents [T, N, D]."""
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for part in ("feature_maps", "actions_states"):
        (made / part).mkdir(parents=True)
    np.save(made / "feature_maps" / f"{feature_map}.npy", latents.flatten(0, 1).half().cpu().numpy())
    for name, values in files.items():
        np.save(made / "actions_states" / f"{name}.npy", values.astype(np.float32))
    os.rename(made, folder)
    folder.with_suffix(".bad").unlink(missing_ok=True)


def encode_hope(model, cfg, args, before, windows, sources, numbers):
    """Make the clips of these numbers."""
    device = V.choose_device(cfg.device, 0)
    model.to(device)
    Dataset = SignalVideos if sources else SignalScenes
    data = Dataset(cfg, [windows[number].video for number in numbers], cfg.data_root, "val" if sources else "test")
    data.names, data.since, data.sources, data.numbers = args.names, before + cfg.tubelet_t, sources, numbers
    for batch in in_turn(data, cfg, "clips"):
        latents, why = see_clips(model, batch["frames"].to(device), cfg, args), dict(batch["bad"])
        for row, index in enumerate(batch["index"].tolist()):
            if index >= len(numbers):
                continue
            folder, name = clip_folder(args.out, numbers[index]), windows[numbers[index]].video.name
            reason = "" if batch["file"][row] >= 0 else why.get(name, "cannot be read")
            if reason or not latents[row].half().isfinite().all():
                put(folder.with_suffix(".bad"), (reason or "latents are not finite in fp16").encode())
            else:
                files = beside_latents(batch["signals"][row], cfg, args, before)
                write_clip(folder, args.feature_map, latents[row], files)


def hope_windows(cfg, args):
    """What becomes a clip each -> ([Window], {video of a window: that it was cut from}, [(name, why)])."""
    length = cfg.num_frames / cfg.clip_fps
    if not cfg.data_root:
        names = [f"scene_{number}" for number in range(cfg.scene_clips)]
        return [Window(V.VideoFile(name, ""), name, name, length) for name in names], {}, []
    videos = V.list_data(replace(cfg, missing_data="error"))
    for note in videos.notes:
        V.say(note, sys.stderr)
    windows, bad = find_windows(cfg, videos, args.every_s)
    whole = [window for window in windows if window.seconds > length - 0.5 / cfg.clip_fps]
    bad += [(w.name, f"{w.seconds:.3g} s are too short for {length:.3g} s") for w in windows if w not in set(whole)]
    sources = {(video.name, video.drive): video for video in videos}
    return whole, {window.video: sources[window.name, window.group] for window in whole}, bad


def finish_hope(args, cfg, windows, bad):
    """Say what has no latents, and write the index unless other shards are still at work."""
    folders = [clip_folder(args.out, number) for number in range(len(windows))]
    made = [(window, folder) for window, folder in zip(windows, folders) if folder.is_dir()]
    failed = [folder.with_suffix(".bad") for folder in folders if not folder.is_dir()]
    bad = bad + [(path.stem, path.read_text()) for path in failed if path.is_file()]
    if bad:
        reasons = "; ".join(f"{V.one_line(name)}: {V.one_line(why)}" for name, why in bad[:3])
        V.say(f"WARNING: {len(bad)} videos or clips are left out: {reasons}", sys.stderr)
    if others := sum(not path.is_file() for path in failed):
        V.say(f"shard {args.shard[0]}/{args.shard[1]}: done; {others} clips of other shards are missing")
        return
    if not made:
        raise V.UserError(f"out {args.out}: no clip could be encoded")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(CLIP_COLUMNS)
    for window, folder in made:
        rows.writerow((folder.name, window.name, window.video.begin, window.seconds, window.group, window.video.label))
    put(args.out / "index.csv", table.getvalue().encode("utf-8", "surrogateescape"))
    sizes = {"feature_map": args.feature_map, "feature_dim": cfg.enc_dim, "grid_high": cfg.grid[1]}
    sizes |= {"grid_wide": cfg.grid[2], "num_timesteps": args.clip_latents - 1, "action_dim": len(args.names)}
    flags = " ".join(f"--{name} {value}" for name, value in sizes.items())
    V.say(f"{len(made)} clips in {args.out}; train: python worlds/hope.py --data_root {args.out} {flags}")


def start_hope(argv):
    """Encode the clips that are missing into feature folders; the index once all are there."""
    args, rest = parse_hope(argv)
    model, saved = V.load_model(args.ckpt)
    if not isinstance(model, V.VJepaAutoV2):
        raise V.UsageError(f"ckpt {args.ckpt}: {type(model).__name__} has no target encoder (--ckpt)")
    cfg, before = hope_config(args, saved, rest)
    windows, sources, bad = hope_windows(cfg, args)
    if not windows:
        why = "; ".join(f"{V.one_line(name)}: {V.one_line(reason)}" for name, reason in bad[:3])
        raise V.UserError(f"data_root {cfg.data_root}: no clip of {cfg.num_frames} frames; {why}")
    settings = {
        name: getattr(args, name) for name in ("clip_latents", "feature_map", "see", "view", "signals", "states")
    }
    named = ("clip_fps", "num_frames", *(() if sources else ("seed", "scene_mix")))
    settings |= {name: getattr(cfg, name) for name in named}
    units = {name: UNITS.get(name, 1.0) for name in (*args.names, "heading", "speed")}
    about = {"settings": settings, "units": units, "frozen": V.digest(V.fingerprint(model.target))}
    about["windows"] = V.digest([(window.video.name, window.seconds) for window in windows])
    open_cache(args.out, about, ())
    todo = [number for number in range(len(windows)) if not clip_folder(args.out, number).is_dir()]
    own = [number for number in todo if number % args.shard[1] == args.shard[0]]
    check_room(args.out, args.clip_latents * cfg.sites * cfg.enc_dim * 2, len(todo), len(windows))
    if own:
        encode_hope(model, cfg, args, before, windows, sources, own)
    finish_hope(args, cfg, windows, bad)


def start(argv):
    """Find the windows, encode those that are missing, write the index once all are there."""
    if layout_of(argv) == "hope":
        return start_hope(argv)
    args, rest = parse(argv)
    world = load_world(args.world)
    cfg, _, _ = V.resolve_config(rest, world)
    if cfg.latents:
        raise V.UsageError("latents: this tool makes them, in --out")
    videos = V.list_data(cfg, world.Dataset)
    if not videos:
        raise V.UsageError("data_root: must name the videos to encode (--data_root)")
    model, forms = make_model(world, cfg)
    split = "folders" if videos.sides else "hash"
    about = {
        "settings": V.latent_settings(world, cfg),
        "frozen": V.frozen_hashes(model),
        "tensors": forms,
        "split": split,
    }
    open_cache(args.out, about)
    for note in videos.notes:
        V.say(note, sys.stderr)
    windows, bad = find_windows(cfg, videos, args.every_s)
    missing = [window for window in windows if not (args.out / window.out_path).is_file()]
    number, count = args.shard
    own = [window for window in windows[number::count] if not (args.out / window.out_path).is_file()]
    size = sum(math.prod(shape) * getattr(torch, kind).itemsize for shape, kind in forms.values())
    check_room(args.out, size, len(missing), len(windows))
    if own:
        encode(model, cfg, args.out, own)
    finish(args, cfg, windows, bad)


def finish(args, cfg, windows, bad):
    """Say what has no latents, and write the index unless other shards are still at work."""
    paths = {window: args.out / window.out_path for window in windows}
    made = [window for window, path in paths.items() if path.is_file()]
    failed = [window for window, path in paths.items() if not path.is_file() and path.with_suffix(".bad").is_file()]
    bad = bad + [(window.video.name, paths[window].with_suffix(".bad").read_text()) for window in failed]
    if bad:
        reasons = "; ".join(f"{V.one_line(name)}: {V.one_line(why)}" for name, why in bad[:3])
        V.say(f"WARNING: {len(bad)} videos or windows are left out: {reasons}", sys.stderr)
    if others := len(windows) - len(made) - len(failed):
        V.say(
            f"shard {args.shard[0]}/{args.shard[1]}: done; {others} windows of other shards are missing, the last "
            "shard to finish writes index.csv"
        )
    elif not made:
        raise V.UserError(f"data_root {cfg.data_root}: no video could be encoded")
    else:
        write_index(args.out, made)
        V.say(f"cache: {len(made)} windows in {args.out}; train from it with --latents {args.out}")


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(start, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
