"""How fast one core turns a video into clips, and how much memory that takes.

    python tools/bench_loader.py --seconds 60 --rounds 5 --out loader.json

A 720p H.264 file at 30 fps with key frames 250 frames apart (x264's default) and detail that moves is written to a
temporary folder. Then, interleaved over the rounds so that a busy machine hurts all alike, one thread reads

    pyav, decord               V.read_frames with the base config's plan: 84 frames at 4 fps, 224 px, at random windows
    whole file                 every frame decoded, turned to float32, resized to 224 x 224 as torchvision does
                               (bilinear, antialiased), 84 of them kept

`whole file` stands for the naive way of decoding a video before sampling it. It runs frame by frame, so that it fits in
memory: kinder than holding the file as float32, which for 60 s of 720p would take 20 GB. Decoders that are not
installed are left out. Speed is per second of CPU time, so that a busy machine counts less. Memory is the peak of a
fresh process that reads 20 clips (one, for the whole file), less what it held after its imports.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import importlib
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

HEIGHT, WIDTH, FPS, GOP = 720, 1280, 30, 250
MEMORY_CLIPS = 20


def installed_decoders():
    """Names of the decoders that can be imported here -> list."""
    modules = {"pyav": "av", "decord": "decord"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def write_bench_video(path, seconds, preset):
    """Write `seconds` of 720p at 30 fps, a textured ground that pans under grain, as H.264 of an x264 preset with a GOP
    of 250."""
    import av

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(0, 1, (1, 3, 120, 220)).astype(np.float32))
    fine = torch.from_numpy(rng.normal(0, 1, (1, 3, HEIGHT + 160, WIDTH + 320)).astype(np.float32))
    ground = F.interpolate(coarse, size=fine.shape[-2:], mode="bicubic") * 45 + fine * 4 + 128
    ground = ground[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
    grain = rng.integers(0, 16, (4, HEIGHT, WIDTH, 1), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": preset, "crf": "23", "g": str(GOP)}
        for number in range(round(seconds * FPS)):
            top = round(80 + 79 * np.sin(number / 40))
            left = round(160 + 159 * np.sin(number / 65))
            picture = ground[top : top + HEIGHT, left : left + WIDTH] // 2 + 40 + grain[number % 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def bench_plan(number):
    """The base config's plan for clip `number`: 84 frames at 4 fps, 224 x 224 pixels, random window and crop."""
    cfg = V.VJepaAutoV2Config()
    return V.draw_plan(np.random.default_rng([7, number]), cfg, "train")


def read_whole(path, plan):
    """The naive way: every frame to float32 [3, H, W], resized to the plan's size -> float32 [T, 3, height, width]."""
    import av

    kept = []
    with av.open(str(path)) as container:
        stream = V.playing_stream(container)
        stream.thread_type, stream.thread_count = "NONE", 1
        wanted = set(np.linspace(0, stream.frames - 1, plan.num_frames).round().astype(int).tolist())
        for number, frame in enumerate(container.decode(stream)):
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float() / 255
            picture = F.interpolate(picture, size=(plan.height, plan.width), mode="bilinear", antialias=True)[0]
            if number in wanted:
                kept.append(picture)
    return torch.stack(kept)


def read_clip(path, way, plan):
    """One clip by one way, and only that way: a decoder that fails here must not be measured as another one."""
    if way == "whole file":
        return read_whole(path, plan)
    frames = np.ascontiguousarray(V.READERS[way](str(path), plan))
    if frames.shape != (plan.num_frames, plan.height, plan.width, 3):
        raise ValueError(f"{way} gave frames of shape {frames.shape}")
    return frames


def measure_speed(path, ways, rounds, clips_per_round):
    """Interleaved rounds -> {way: [clips per second of CPU time, one per round]}. The whole file is read once a
    round."""
    rates = {way: [] for way in ways}
    for round_number in range(rounds):
        order = ways if round_number % 2 == 0 else ways[::-1]
        for way in order:
            count = 1 if way == "whole file" else clips_per_round
            plans = [bench_plan(round_number * clips_per_round + clip) for clip in range(count)]
            begin = time.process_time()
            for plan in plans:
                read_clip(path, way, plan)
            rates[way].append(count / (time.process_time() - begin))
    return rates


def memory_mb():
    """-> (resident set now, its peak so far) of this process in MB; where /proc is missing both are the peak."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would be inherited from the parent process
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return tuple(int(rows[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    return peak, peak


def memory_child(path, way):
    """Run in a fresh process: import the decoder, read MEMORY_CLIPS clips, print its peak above what the imports hold,
    in MB."""
    importlib.import_module({"pyav": "av", "whole file": "av"}.get(way, way))
    before, _ = memory_mb()
    for number in range(1 if way == "whole file" else MEMORY_CLIPS):
        read_clip(path, way, bench_plan(number))
    V.say(memory_mb()[1] - before)


def measure_memory(path, way):
    """Peak memory above the imports of a fresh process that reads clips one way -> MB."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", way, "--video", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


def main():
    """Parse flags, write the video, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description="Clips per second and core, and memory, of the ways to read a video.")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the video written for the bench [60]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, medians are reported [5]")
    parser.add_argument("--clips", type=int, default=3, help="clips per decoder and round [3]")
    parser.add_argument(
        "--x264_preset", default="veryfast", help="how the video is coded; ultrafast has no B-frames [veryfast]"
    )
    parser.add_argument("--out", default="", type=os.path.expanduser, help="JSON file to write")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--video", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        memory_child(args.video, args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        path, begin = Path(folder) / "bench.mp4", time.perf_counter()
        write_bench_video(path, args.seconds, args.x264_preset)
        size_mb = path.stat().st_size / 1e6
        V.say(
            f"video: {args.seconds:g} s of {WIDTH} x {HEIGHT} at {FPS} fps, {size_mb:.1f} MB, "
            f"written in {time.perf_counter() - begin:.0f} s"
        )
        ways = [*installed_decoders(), "whole file"]
        rates = measure_speed(path, ways, args.rounds, args.clips)
        memory = {way: measure_memory(path, way) for way in ways}
    slowest = statistics.median(rates["whole file"])
    V.say(f"{'way':<12}{'clips/s per core':>18}{'x whole file':>14}{'peak MB':>10}")
    rows = {}
    for way in ways:
        rate = statistics.median(rates[way])
        rows[way] = dict(clips_per_s=rate, rounds=rates[way], times_whole_file=rate / slowest, peak_mb=memory[way])
        V.say(f"{way:<12}{rate:>18.3f}{rate / slowest:>14.1f}{memory[way]:>10.0f}")
    if args.out:
        versions = {
            name: importlib.import_module(name).__version__
            for name in ("av", "decord")
            if importlib.util.find_spec(name)
        }
        report = dict(
            video=dict(seconds=args.seconds, fps=FPS, size_mb=size_mb, gop=GOP),
            ways=rows,
            torch=torch.__version__,
            versions=versions,
            machine=platform.processor() or platform.machine(),
        )
        V.write_report(args.out, report)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
