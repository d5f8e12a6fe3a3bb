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
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import VJepa_AUTO_V2 as V

COLUMNS = ("out_path", "name", "begin", "length", "group", "maneuver")
STALE_S = 3600.0  # age of a half-written file that nobody writes any more
TELL_S = 10.0  # between two lines of progress where no bar can be shown


# -- command line


def shard_of(text):
    """'2/8' -> (2, 8). UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not number < count:
        raise V.UsageError(f"shard = {V.shown(text)}: must be i/n with i from 0 to n - 1, such as 0/4 (--shard)")
    return number, count


def parse(argv):
    """Command line -> (namespace of this tool's own flags, the flags of the world). UsageError."""
    about = "Encode a data set once with the frozen encoder of a world. All other flags are those of the world."
    parser = V.ArgumentParser(description=about, allow_abbrev=False)
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


def open_cache(out, about):
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
            what = ", ".join(names) or " and ".join({"frozen": "other weights"}.get(key, key) for key in other)
            raise V.UsageError(f"out {out}: holds a cache made with {what}; use another folder (--out)")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise V.UsageError(f"out {out}: holds something else than a cache; use another folder (--out)")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob(".*.tmp"), *(out / "clips").glob(".*.tmp")):  # of processes that were killed, anywhere
        if time.time() - stale.stat().st_mtime > STALE_S:
            stale.unlink(missing_ok=True)
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


def start(argv):
    """Find the windows, encode those that are missing, write the index once all are there."""
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
