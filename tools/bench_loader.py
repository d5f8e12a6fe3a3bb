"""How fast one core turns videos into clips, where that time goes, and how much memory it takes.

    python tools/bench_loader.py --rounds 5 --out loader.json
    python tools/bench_loader.py --seconds 60 --gops 30 --profile

720p H.264 files at 30 fps, of 10 and 60 s and with key frames 30 and 250 frames apart (250 is x264's default), with
detail that moves, are written to a temporary folder, and one more is made of the last by tools/prepare_videos.py. Then,
interleaved over the rounds so that a busy machine hurts all alike, one thread reads of each

    pyav, decord     V.READERS with the base config's plan: 84 frames at 4 fps, 224 px, at random windows
    N windows        V.ClipDataset with windows_per_file N (--windows), whose windows are decoded in one go
    cached           V.ClipDataset with a frame cache that holds the file, and the largest crop, as held-out clips are
    whole file       every frame decoded, turned to float32, resized to 224 x 224 as torchvision does (bilinear,
                     antialiased), 84 of them kept

`whole file` stands for the naive way of decoding a video before sampling it. It runs frame by frame, so that it fits in
memory: kinder than holding the file as float32, which for 60 s of 720p would take 20 GB. It is read once a round.
Decoders that are not installed are left out. Speed is per second of CPU time, so that a busy machine counts less.
Memory is the peak of a fresh process that reads 20 clips (one, for the whole file), less what it held after its
imports. `--profile` tells on what pyav's CPU time goes instead; `--step_s 0.4` what share of its time a step waits that
takes so long for 8 clips, read by `--workers` processes, once all frames are kept. The step here is a pause, so the
cores are the loader's, and a thread copies batches meanwhile, as one pins them for a GPU.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

HEIGHT, WIDTH, FPS = 720, 1280, 30
PREPARE = Path(__file__).resolve().parent / "prepare_videos.py"


def installed_decoders():
    """Names of the decoders that can be imported here -> list."""
    modules = {"pyav": "av", "decord": "decord"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def add_h264(container, width, height, preset, gop):
    """An H.264 stream of an x264 preset -> the stream."""
    stream = container.add_stream("libx264", rate=FPS)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"preset": preset, "crf": "23", "g": str(gop)}
    return stream


def write_bench_videos(folder, lengths, gops, preset):
    """Write a file of 720p for each length in seconds and each GOP: a textured ground that pans under grain, which each
    picture of is drawn once -> {what it is: path}."""
    import av

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(0, 1, (1, 3, 120, 220)).astype(np.float32))
    fine = torch.from_numpy(rng.normal(0, 1, (1, 3, HEIGHT + 160, WIDTH + 320)).astype(np.float32))
    ground = F.interpolate(coarse, size=fine.shape[-2:], mode="bicubic") * 45 + fine * 4 + 128
    ground = ground[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
    grain = rng.integers(0, 16, (4, HEIGHT, WIDTH, 1), dtype=np.uint8)
    paths = {f"{length:g} s, GOP {gop}": Path(folder) / f"{length:g}_{gop}.mp4" for length in lengths for gop in gops}
    with ExitStack() as files:
        streams = []
        for length in lengths:
            for gop in gops:
                container = files.enter_context(av.open(str(paths[f"{length:g} s, GOP {gop}"]), "w"))
                streams.append((round(length * FPS), container, add_h264(container, WIDTH, HEIGHT, preset, gop)))
        for number in range(max(count for count, _, _ in streams)):
            top = round(80 + 79 * np.sin(number / 40))
            left = round(160 + 159 * np.sin(number / 65))
            picture = ground[top : top + HEIGHT, left : left + WIDTH] // 2 + 40 + grain[number % 4]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            for count, container, stream in streams:
                if number < count:
                    frame.pts = number
                    container.mux(stream.encode(frame))
        for _, container, stream in streams:
            container.mux(stream.encode())
    return paths


def prepare(path, folder):
    """A file as tools/prepare_videos.py makes it -> path."""
    target = Path(folder) / "prepared"
    command = [sys.executable, str(PREPARE), "--input", str(path), "--output", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.rglob("*.mp4"))


def bench_plan(number, clip_fps):
    """The base config's plan for clip `number`: 84 frames, 224 x 224 pixels, random window and crop."""
    cfg = V.VJepaAutoV2Config(clip_fps=clip_fps)
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


def data_of(path, clip_fps, windows=1, cache=""):
    """The dataset of one file: with so many windows per file, or uncropped and with a frame cache in that folder."""
    cfg = V.VJepaAutoV2Config(clip_fps=clip_fps, windows_per_file=windows, **V.ClipConfig.UNCROPPED if cache else {})
    data = V.ClipDataset(cfg, [V.VideoFile(path.name, str(path))], "", "train")
    if cache:
        data.frame_cache = V.FrameCache(cache, cfg)
        data.frame_cache.open()
    return data


class Reader:
    """Reads clips of a file one way, and only that way: a decoder that fails must not be measured as another one."""

    def __init__(self, path, way, clip_fps):
        self.path, self.way, self.clip_fps = Path(path), way, clip_fps
        number, _, what = way.partition(" ")
        if what == "windows":
            self.data = data_of(self.path, clip_fps, int(number))
        elif way == "cached":
            self.data = data_of(self.path, clip_fps, cache=str(self.path.parent / "cache"))

    def __call__(self, number):
        """Clip `number` -> its frames, in a form of the way's own."""
        plan = bench_plan(number, self.clip_fps)
        if self.way == "whole file":
            return read_whole(self.path, plan)
        if self.way in V.READERS:
            frames = np.ascontiguousarray(V.READERS[self.way](str(self.path), plan))
        else:
            frames, _, _, bad, _ = self.data.decode(number, plan.height, plan.width)
            if bad:
                raise ValueError(f"{self.way}: {bad[0]}")
        if frames.shape != (plan.num_frames, plan.height, plan.width, 3):
            raise ValueError(f"{self.way} gave frames of shape {frames.shape}")
        return frames


def measure_speed(path, ways, args):
    """Interleaved rounds -> {way: [clips per second of CPU time, one per round]}."""
    rates, readers = {way: [] for way in ways}, {way: Reader(path, way, args.clip_fps) for way in ways}
    for number in range(args.rounds * args.clips if "cached" in readers else 0):
        readers["cached"](number)
    for round_number in range(args.rounds):
        order = ways if round_number % 2 == 0 else ways[::-1]
        for way in order:
            count = {"whole file": 1, f"{args.windows} windows": args.windows}.get(way, args.clips)
            begin = time.process_time()
            for clip in range(count):
                readers[way](round_number * count + clip)
            rates[way].append(count / (time.process_time() - begin))
    return rates


class Clock:
    """CPU seconds by what they went on: those of a part leave out the parts that it calls."""

    def __init__(self):
        self.spent, self.stack, self.last = Counter(), [], time.process_time()

    def turn(self, name=None):
        """A part begins, or without a name ends."""
        now = time.process_time()
        if self.stack:
            self.spent[self.stack[-1]] += now - self.last
        if name is None:
            self.stack.pop()
        else:
            self.stack.append(name)
        self.last = now


class Timed:
    """A function, or what makes a generator, under a clock."""

    def __init__(self, clock, name, work):
        self.clock, self.name, self.work = clock, name, work

    def __call__(self, *args, **more):
        self.clock.turn(self.name)
        try:
            found = self.work(*args, **more)
        finally:
            self.clock.turn()
        return self.each(found) if hasattr(found, "send") else found

    def each(self, items):
        """A generator's items."""
        while True:
            self.clock.turn(self.name)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.clock.turn()
            yield item


PARTS = {  # functions of the script -> what their time goes on
    "open_pyav": "open, find_stream_info", "enter_window": "seek", "from_key": "demux", "pyav_frames": "decode",
    "is_wanted": "choose packets", "unneeded_run": "choose packets", "whole_picture": "scale, RGB",
    "pyav_picture": "scale, RGB", "orientation": "turn", "crop_box": "crop",
}  # fmt: skip


def profile(path, clips, clip_fps):
    """Where the time of pyav's clips goes -> {part: milliseconds per clip}."""
    clock, real = Clock(), {name: getattr(V, name) for name in PARTS if hasattr(V, name)}
    try:
        for name, work in real.items():
            setattr(V, name, Timed(clock, PARTS[name], work))
        clock.turn("numpy, Python")
        for number in range(clips):
            V.read_pyav(str(path), bench_plan(number, clip_fps))
        clock.turn()
    finally:
        for name, work in real.items():
            setattr(V, name, work)
    return {name: 1e3 * seconds / clips for name, seconds in clock.spent.most_common()}


def memory_mb():
    """-> (resident set now, its peak so far) of this process in MB; where /proc is missing both are the peak."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would be inherited from the parent process
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return tuple(int(rows[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    return peak, peak


def memory_child(path, way, clip_fps, clips):
    """Run in a fresh process: import the decoder, read so many clips, print its peak above what the imports hold, in
    MB."""
    importlib.import_module("decord" if way == "decord" else "av")
    before, _ = memory_mb()
    reader = Reader(path, way, clip_fps)
    for number in range(1 if way == "whole file" else clips):
        reader(number)
    V.say(memory_mb()[1] - before)


def measure_memory(path, way, args):
    """Peak memory above the imports of a fresh process that reads clips one way -> MB."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", way, "--video", str(path)]
    command += ["--clip_fps", str(args.clip_fps), "--memory_clips", str(args.memory_clips)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


def copy_batch(batch):
    """What V.pin_batch does where there is a GPU, into plain memory."""
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}


def wait_share(path, folder, args):
    """Share of the time for which steps of `step_s` for 8 clips wait, those of the second half: by then the file's
    frames are kept -> float."""
    data, steps = data_of(path, args.clip_fps, cache=str(Path(folder) / f"kept_{Path(path).stem}")), 8 * args.clips
    V.pin_batch, waits = copy_batch, []
    loader = V.ClipLoader(data, V.StepSampler(0, steps, 8, 0, 1), args.workers, batch_bytes=V.batch_bytes(data, 8))
    loader.pinning = ThreadPoolExecutor(1)
    for _ in range(steps):
        begin = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - begin)
        time.sleep(args.step_s)
    loader.close()
    waits = waits[steps // 2 :]
    return sum(waits) / (sum(waits) + args.step_s * len(waits))


def parse(argv):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(description="Clips per second and core, and memory, of the ways to read a video.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0], help="lengths of the files [10 60]")
    parser.add_argument("--gops", type=int, nargs="+", default=[30, 250], help="frames between key frames [30 250]")
    parser.add_argument("--clip_fps", type=float, default=4.0, help="frames per second of a clip of 84 frames [4]")
    parser.add_argument("--windows", type=int, default=4, help="windows of one file that are decoded in one go [4]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, medians are reported [5]")
    parser.add_argument("--clips", type=int, default=3, help="clips per way and round [3]")
    parser.add_argument("--memory_clips", type=int, default=20, help="clips of the memory figure; 0 leaves it out [20]")
    parser.add_argument(
        "--x264_preset", default="veryfast", help="how the videos are coded; ultrafast has no B-frames [veryfast]"
    )
    parser.add_argument("--profile", action="store_true", help="tell where pyav's time goes, and nothing else")
    parser.add_argument("--step_s", type=float, default=0.0, help="tell what steps of so many seconds wait, no more")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of --step_s [1]")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="JSON file to write")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--video", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.seconds) <= 0 or min(args.gops) < 1 or min(args.rounds, args.clips) < 1 or args.windows < 2:
        raise V.UsageError("--seconds must be above 0, --gops, --rounds and --clips at least 1, --windows at least 2")
    if args.step_s < 0 or args.workers < 1:
        raise V.UsageError("--step_s must be 0 or above, --workers at least 1")
    return args


def bench(path, args):
    """Measure one file and print its table -> {way: figures}."""
    ways = [*installed_decoders(), f"{args.windows} windows", *["cached"] * hasattr(V, "FrameCache"), "whole file"]
    rates = measure_speed(path, ways, args)
    slowest, rows = statistics.median(rates["whole file"]), {}
    V.say(f"{'way':<12}{'clips/s per core':>18}{'x whole file':>14}{'peak MB':>10}")
    for way in ways:
        rate = statistics.median(rates[way])
        peak = measure_memory(path, way, args) if args.memory_clips else 0.0
        rows[way] = dict(clips_per_s=rate, rounds=rates[way], times_whole_file=rate / slowest, peak_mb=peak)
        V.say(f"{way:<12}{rate:>18.3f}{rate / slowest:>14.1f}{peak:>10.0f}")
    return rows


def main(argv=None):
    """Parse flags, write the videos, measure each, print the tables and write the JSON."""
    args = parse(argv)
    torch.set_num_threads(1)
    if args.child:
        memory_child(args.video, args.child, args.clip_fps, args.memory_clips)
        return
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        paths = write_bench_videos(folder, args.seconds, args.gops, args.x264_preset)
        paths[f"prepared from {list(paths)[-1]}"] = prepare(list(paths.values())[-1], folder)
        V.say(f"{len(paths)} videos of {WIDTH} x {HEIGHT} at {FPS} fps written in {time.perf_counter() - begin:.0f} s")
        for what, path in paths.items():
            V.say(f"{what}, {path.stat().st_size / 1e6:.1f} MB")
            if args.step_s:
                report[what] = wait_share(path, folder, args)
                V.say(f"steps of {args.step_s:g} s for 8 clips wait for {report[what]:.1%} of the time")
            elif args.profile:
                report[what] = profile(path, args.clips * args.rounds, args.clip_fps)
                for part, spent in report[what].items():
                    V.say(f"{part:<24}{spent:>10.1f} ms per clip{100 * spent / sum(report[what].values()):>8.1f} %")
            else:
                report[what] = bench(path, args)
    if args.out:
        names = [name for name in ("av", "decord") if importlib.util.find_spec(name)]
        versions = {name: importlib.import_module(name).__version__ for name in names}
        machine = platform.processor() or platform.machine()
        V.write_report(args.out, dict(files=report, torch=torch.__version__, versions=versions, machine=machine))


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
