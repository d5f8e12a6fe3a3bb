"""Write built-in driving scenes as videos with annotations and a split, or draw a contact sheet of them.

    python tools/make_scenes.py --out DIR --num N --size S --seed K [--num_frames 20] [--now_frames 4]
                                [--soon_frames 8] [--fps 4]
                                [--mix default|fork_only|fork=3,brake=1] [--siblings n] [--workers 2]
    python tools/make_scenes.py --sheet FILE.png

Written under --out: videos/*.mp4, annotations/*.json (labels of `scene`), split.json (the files that training will hold
out) and scenes.json (the settings). Scene i is the one that training with the same seed writes or renders itself. With
--siblings n every scene has n futures, scene_<i>_future_<k>, whose NOW frames are bit-identical. The same command goes
on where it was interrupted; a folder with other settings or other contents is refused, and no file that stands there is
overwritten.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

SHEET_ROWS = (  # kind, scene number, future seeds that show the wanted choice, title
    ("fork", "choice", 1, "fork, white sign: right 0.5"),
    ("fork", "choice", -1, "the same present, other future"),
    ("brake", "braked", True, "lead car with beacon: brakes at 1.0 per second"),
    ("lane", "choice", 1, "indicator right: changes lane with 0.8"),
    ("occluder", "stops", False, "car behind a truck: comes out with 0.85"),
    ("steady", "barrier", True, "car before a barrier: it must stop"),
)


def make_config(args):
    """Command line -> a valid config of the script; UsageError names what is wrong."""
    eventually = args.num_frames - args.now_frames - args.soon_frames
    patch = next((p for p in (16, 8, 4, 2) if args.size % p == 0), 0)
    cfg = V.preset_config(
        "tiny",
        seed=args.seed,
        scene_clips=max(args.num, 4),
        image_size=args.size,
        scene_size=0,
        num_frames=args.num_frames,
        now_frames=args.now_frames,
        soon_frames=args.soon_frames,
        eventually_frames=eventually,
        clip_fps=args.fps,
        scene_mix=args.mix,
        patch=patch or 1,
        tubelet_t=1,
        val_fraction=args.val_fraction,
    )
    if not patch or args.num < 1 or args.siblings < 1 or args.workers < 1:
        raise V.UsageError("--size must be even, --num, --siblings and --workers at least 1")
    V.validate_config(cfg)
    return cfg


def settings_of(cfg, args):
    """What decides the contents of the folder -> dict."""
    names = ("seed", "image_size", "num_frames", "now_frames", "soon_frames", "clip_fps", "scene_mix", "val_fraction")
    return {**{name: getattr(cfg, name) for name in names}, "siblings": args.siblings}


def open_folder(folder, settings):
    """Make the folder, or take up one of the same settings. UserError for any other that is not empty."""
    done = folder / "scenes.json"
    if done.is_file():
        try:
            found = V.parse_json(V.read_text(done, V.MAX_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise V.UserError(f"{V.one_line(done)}: cannot be read ({V.one_line(error)}); use another --out") from error
        if found != settings:
            raise V.UserError(f"{folder} holds scenes of other settings ({done}); use another --out or delete it")
    elif folder.exists() and any(folder.iterdir()):
        raise V.UserError(f"{folder} is not empty and holds no scenes.json; use another --out")
    for name in ("videos", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    V.write_new(done, json.dumps(settings).encode())


def scene_name(index, future_seed, num_siblings):
    """File stem of a scene."""
    return f"scene_{index:06d}" + (f"_future_{future_seed}" if num_siblings > 1 else "")


def write_one(job):
    """Render and write one (folder, cfg, index, future seed, name) unless it is there."""
    folder, cfg, index, future_seed, name = job
    if (folder / "videos" / f"{name}.mp4").is_file() and (folder / "annotations" / f"{name}.json").is_file():
        return
    V.write_scene(folder, name, cfg, V.scene_seed_at(cfg, index), future_seed)


def write_all(folder, cfg, args):
    """Write every scene with `workers` processes and a progress line. UserError when one of them is killed."""
    jobs = [
        (folder, cfg, index, k, scene_name(index, k, args.siblings))
        for index in range(args.num)
        for k in range(args.siblings)
    ]
    began, shown = time.perf_counter(), V.is_terminal(sys.stderr)
    # an executor, not a Pool: that puts a new process in the place of a dead one and waits for ever for its scenes
    try:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            for count, _ in enumerate(pool.map(write_one, jobs, chunksize=8), 1):
                if shown:
                    bar = V.progress_bar(count / len(jobs), f"{count}/{len(jobs)} scenes")
                    V.emit("\r" + bar + ("" if count < len(jobs) else "\n"), sys.stderr)
    except BrokenProcessPool as error:
        raise V.UserError(
            "a writing process was killed (out of memory?); the same command goes on, fewer --workers need less"
        ) from error
    return len(jobs), time.perf_counter() - began


def write_split(folder, cfg, num_siblings):
    """split.json: the files that training on the folder holds out, by the script's own rule -> (train, val) counts.

    Siblings share a scene: where one of them is held out, the others would tell its present, so they are named as well.
    """
    train, val = V.split_videos(V.find_videos(str(folder), "*"), cfg.val_fraction)
    split = {"train": [video.name for video in train], "val": [video.name for video in val]}
    if num_siblings > 1:
        held = {name.split("_future_")[0] for name in split["val"]}
        split["train_shares_a_scene_with_val"] = [name for name in split["train"] if name.split("_future_")[0] in held]
    V.write_report(folder / "split.json", split)
    return len(train), len(val)


def sheet_scene(kind, key, wanted, cfg, sign=0.5):
    """The first scene and future of a kind that show what a row of the sheet is about -> frames [T, H, W, 3]."""
    for scene_seed in range(12, 4000):
        params = V.draw_scene(scene_seed, cfg, kind)
        fits = {
            "fork": params["prob"] == sign,
            "brake": params["beacon"],
            "lane": params["indicator"] == "right",
            "occluder": True,
            "steady": params["plot"] == "barrier",
        }[kind]
        for future_seed in range(40 if fits else 0):
            future, _ = V.draw_future(params, future_seed, scene_seed)
            shown = {**future, "braked": 0.1 < future["brake_at"] < 0.6, "barrier": True}[key]
            if shown == wanted:
                return V.scene(scene_seed, future_seed, cfg, kind)[0]
    raise V.UserError(f"no {kind} scene shows {key} = {wanted}")


def draw_sheet(path, cfg, columns=(0, 3, 5, 7, 9, 11)):
    """Contact sheet: a row per kind, NOW to the left of the gap and SOON to the right of it."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, text = cfg.height, 14, 34
    rows = [(title, sheet_scene(kind, key, wanted, cfg)) for kind, key, wanted, title in SHEET_ROWS]
    sheet = Image.new("RGB", (len(columns) * (side + 4) + gap + 8, len(rows) * (side + text) + 30), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, frame in enumerate(columns):
        left = 4 + column * (side + 4) + (gap if frame >= cfg.now_frames else 0)
        seconds = (frame - cfg.now_frames + 1) / cfg.clip_fps
        draw.text(
            (left, 4),
            f"NOW {seconds:+.2f} s" if frame < cfg.now_frames else f"SOON {seconds:+.2f} s",
            fill=(90, 90, 90),
            font=font,
        )
        for row, (_, frames) in enumerate(rows):
            sheet.paste(Image.fromarray(np.ascontiguousarray(frames[frame])), (left, 28 + row * (side + text) + 24))
    for row, (title, _) in enumerate(rows):
        draw.text((4, 28 + row * (side + text)), title, fill="black", font=font)
    V.save_picture(sheet.quantize(128), path)  # a third of the bytes


def parse(argv):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(
        description="Write built-in driving scenes as videos with annotations.", allow_abbrev=False
    )
    parser.add_argument("--out", default="", type=os.path.expanduser, help="folder to write")
    parser.add_argument("--num", type=int, default=100, help="scenes")
    parser.add_argument("--size", type=int, default=96, help="side in pixels, even")
    parser.add_argument("--seed", type=int, default=1337, help="run seed: scene i is training's scene i of that seed")
    parser.add_argument("--num_frames", type=int, default=20)
    parser.add_argument("--now_frames", type=int, default=4, help="frames that a scene's future does not touch")
    parser.add_argument("--soon_frames", type=int, default=8)
    parser.add_argument("--siblings", type=int, default=1, help="futures of every scene")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--mix", default="default", help="kinds of scenes, as --scene_mix of the script")
    parser.add_argument("--val_fraction", type=float, default=0.1)
    parser.add_argument("--sheet", default="", type=os.path.expanduser, help="draw a contact sheet to this png")
    args = parser.parse_args(argv)
    if not args.out and not args.sheet:
        parser.error("one of --out and --sheet is needed")
    return args


def make(args):
    """Draw the sheet, write the folder, as the flags say."""
    cfg = make_config(args)
    if args.sheet:
        draw_sheet(
            args.sheet,
            replace(cfg, image_size=184, num_frames=12, eventually_frames=0, clip_fps=4.0, now_frames=4, soon_frames=8),
        )
        V.say(f"written: {args.sheet}")
    if args.out:
        folder = Path(args.out)
        open_folder(folder, settings_of(cfg, args))
        count, seconds = write_all(folder, cfg, args)
        train, val = write_split(folder, cfg, args.siblings)
        V.say(f"{count} scenes in {seconds:.1f} s under {folder}: {train} train, {val} val files")


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(make, parse(argv))


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
