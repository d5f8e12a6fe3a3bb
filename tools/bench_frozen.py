"""What a frozen ViT-L costs on this machine's CPU: memory beside the encoder alone, clips per second with and without a
cache. Weights are random, written by the real library (transformers) into --work, with a few videos.

    python tools/bench_frozen.py --work /tmp/frozen [--frames 24] [--soon 4] [--batch_size 1] [--steps 2]

One process after the other: the encoder alone on a batch (NOW, then the whole clip), a run with --freeze_encoder,
tools/cache_latents.py, a run with --latents. Prints one line each and the two ratios.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V


def write_weights(folder):
    """A V-JEPA 2 ViT-L of random weights as transformers saves it."""
    import transformers

    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, crop_size=256, frames_per_clip=64)
    torch.manual_seed(0)
    transformers.VJEPA2Model(transformers.VJEPA2Config(**sizes)).save_pretrained(folder)


def write_videos(folder, frames):
    """Two videos of noise in coarse blocks, a clip long each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        pictures = rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
        V.write_video(folder / f"{number}.mp4", pictures, 4)


def flags_of(args):
    """The command line that all runs share."""
    now, soon = 4, args.soon
    shape = dict(num_frames=args.frames, now_frames=now, soon_frames=soon, eventually_frames=args.frames - now - soon)
    plain = dict(lambda_vjepa=0, crop_scale_min=1, crop_ratio_min=1, crop_ratio_max=1, device="cpu", num_workers=0)
    run = dict(
        batch_size=args.batch_size,
        grad_accum=1,
        steps=args.steps,
        log_every=1,
        val_clips=2,
        resume="never",
        val_fraction=0.5,
    )
    flags = ["--preset=vjepa2_vitl", "--no-amp", "--no-picture", "--freeze_encoder", f"--init_from={args.work}/weights"]
    return flags + [f"--{name}={value}" for name, value in {**shape, **plain, **run}.items()]


def encode_alone(args):
    """The other process: load the encoder, run it on a batch, and say what that took."""
    encoder = V.load_encoder(args.work / "weights")
    clip = torch.randint(0, 256, (args.batch_size, args.frames, 3, 256, 256), dtype=torch.uint8)
    clip = (clip.float() / 255 - torch.tensor(V.IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(V.IMAGE_STD).view(3, 1, 1)
    began = time.perf_counter()
    with torch.no_grad():
        encoder(clip[:, :4]), encoder(clip)
    seconds = time.perf_counter() - began
    print(json.dumps({"mem_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "seconds": seconds}))


def call(*command):
    """Run a command to its end -> its last line."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def train(args, name, *flags):
    """A run -> the last line of its metrics that says clips per second, and its peak of memory in GB."""
    out = args.work / name
    call(ROOT / "VJepa_AUTO_V2.py", *flags_of(args), f"--out_dir={out}", *flags)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "clips_per_s" in row]
    seconds = [after["time"] - before["time"] for before, after in zip(rows, rows[1:])]
    return {"mem_gb": rows[-1]["mem_gb"], "clips_per_s": args.batch_size / float(np.median(seconds))}


def main():
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description="Memory and speed of a frozen ViT-L on a CPU.")
    parser.add_argument("--work", required=True, type=Path, help="folder for weights, videos and runs")
    parser.add_argument("--frames", type=int, default=24, help="frames of a clip, 4 of them NOW")
    parser.add_argument("--soon", type=int, default=4, help="frames of SOON")
    parser.add_argument("--batch_size", type=int, default=1, help="clips of a batch")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run; the first is not timed")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return encode_alone(args)
    videos = args.work / f"videos_{args.frames}"
    if not (args.work / "weights" / "model.safetensors").is_file():
        write_weights(args.work / "weights")
    if not videos.is_dir():
        write_videos(videos, args.frames)
    same = [f"--work={args.work}", f"--frames={args.frames}", f"--batch_size={args.batch_size}", f"--soon={args.soon}"]
    alone = json.loads(call(__file__, *same, "--alone"))
    print(
        f"encoder alone: {alone['mem_gb']:.2f} GB, {alone['seconds']:.1f} s for a batch of {args.batch_size}",
        flush=True,
    )
    frozen = train(args, "frozen", f"--data_root={videos}")
    print(f"frozen run: {frozen['mem_gb']:.2f} GB, {frozen['clips_per_s']:.4g} clips/s", flush=True)
    cache = args.work / f"cache_{args.frames}"
    print(
        call(ROOT / "tools" / "cache_latents.py", f"--out={cache}", f"--data_root={videos}", *flags_of(args)),
        flush=True,
    )
    args.steps = max(args.steps, 6)
    cached = train(args, "cached", f"--latents={cache}")
    print(f"run from a cache: {cached['mem_gb']:.2f} GB, {cached['clips_per_s']:.4g} clips/s")
    print(
        f"memory {frozen['mem_gb'] / alone['mem_gb']:.2f} times the encoder's, "
        f"speed from a cache {cached['clips_per_s'] / frozen['clips_per_s']:.1f} times"
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.exit(main())
