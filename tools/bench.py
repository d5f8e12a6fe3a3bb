"""How long a training step takes, and what of the machine's speed it uses.

    python tools/bench.py step [--rounds 7] [--each 4] [--out FILE.json] [flags of the script, such as --preset, --amp]
    python tools/bench.py gpu [--out records/gpu] [--minutes 10]

`step` times optimizer steps of the tri-temporal world on a batch of noise that lies on the device: seconds per step
(median and quartiles of rounds), clips and tokens per second, memory at its peak, and TFLOP/s beside what a large
product of random matrices reaches in the same precision on the same device. Then, uncompiled, what the parts of a step
take, and how often a step makes the CPU wait for the GPU.

`gpu` runs `step` for the rows of records/gpu, each in a process of its own, in order of importance until the minutes
are over, and writes gpu.md and gpu.json.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import VJepa_AUTO_V2 as V

WARM_STEPS = 3  # steps after the first that do not count
PARTS = ("target", "online", "predictor", "outcome", "flow")  # children of the world whose forward passes are timed
OTHER_PARTS = ("rest of forward", "backward and clipping", "optimizer", "EMA and statistics")
# what `gpu` runs, the most wanted first
ROWS = (
    ("base", "--amp", "--compile"),
    ("small", "--amp", "--compile"),
    ("base", "--amp", "--no-compile"),
    ("small", "--amp", "--no-compile"),
    ("base", "--no-amp", "--no-compile", "--batch_size", "2"),
    ("base", "--amp", "--no-compile", "--batch_size", "2"),
    ("tiny", "--amp", "--compile"),
    ("tiny", "--amp", "--no-compile"),
    ("large", "--amp", "--no-compile"),
    ("large", "--amp", "--compile"),
    ("vjepa2_vitl", "--amp", "--no-compile", "--grad_accum", "1"),
    ("small", "--no-amp", "--no-compile"),
)


# -- a step


def wait(device):
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def new_phase(cfg, process):
    """Training of a fresh world as the loop has it -> V.Phase."""
    source = V.DataSource("render", "", [], [], [], True, V.ClipDataset, V.VJepaAutoV2.draw)
    run = V.Run(cfg, process, None, None, source)
    wrapped = V.build_world(V.VJepaAutoV2, run)
    run.scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp_dtype == torch.float16)
    return V.Phase(run, run.world, wrapped, run.optimizer)


def take_step(phase, batch, step):
    """A step with all that the loop asks of other ranks in it."""
    process = phase.run.process
    process.any(False, False)
    _, carries, finite = V.take_step(phase, [batch] * phase.cfg.grad_accum, step)
    process.any(not finite, False)
    V.apply_step(phase, carries, step)
    phase.optimizer.zero_grad(set_to_none=True)


def timed(phase, batch, steps):
    """Seconds per step over some steps."""
    device = phase.run.process.device
    wait(device)
    began = time.perf_counter()
    for step in range(steps):
        take_step(phase, batch, step)
    wait(device)
    return (time.perf_counter() - began) / steps


def ceiling(process, seconds=1.0):
    """TFLOP/s of a large product of random matrices in the run's precision: the median over about so many seconds."""
    device, size = process.device, 8192 if process.device.type == "cuda" else 1024
    kind = process.amp_dtype or torch.float32
    one, two = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        one @ two
        wait(device)
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(taken) / 1e12


class Stopwatch:
    """Seconds by part of a step: marks on the device's own clock where it has one, so that nothing waits for it."""

    def __init__(self, device):
        self.device, self.spans, self.begun = device, {}, {}

    def now(self):
        if self.device.type != "cuda":
            wait(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name, *_):
        self.begun[name] = self.now()

    def end(self, name, *_):
        self.spans.setdefault(name, []).append((self.begun.pop(name), self.now()))

    def seconds(self):
        """-> {part: seconds in all}."""
        wait(self.device)
        if self.device.type == "cuda":
            return {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self.spans.items()}
        return {name: sum(b - a for a, b in spans) for name, spans in self.spans.items()}

    def around(self, call, name):
        """The call, timed under a name."""

        def timed_call(*args, **kwargs):
            self.begin(name)
            try:
                return call(*args, **kwargs)
            finally:
                self.end(name)

        return timed_call


def split(phase, batch, steps):
    """Seconds per step of the parts of an uncompiled step. `forward` holds the parts of PARTS and what joins them."""
    watch, world, run = Stopwatch(phase.run.process.device), phase.world, phase.run
    for name in ("forward", *PARTS):
        module = world if name == "forward" else getattr(world, name)
        if name == "online":  # it is used in pieces, which its caller names
            module.encode = watch.around(module.encode, name)
        else:
            module.register_forward_pre_hook(partial(watch.begin, name))
            module.register_forward_hook(partial(watch.end, name))
    for step in range(steps):
        watch.begin("step")
        _, carries, _ = V.take_step(phase, [batch] * phase.cfg.grad_accum, step)
        watch.around(run.scaler.step, "optimizer")(phase.optimizer)
        watch.around(world.after_step, "EMA and statistics")(carries, step)
        phase.optimizer.zero_grad(set_to_none=True)
        watch.end("step")
    seconds = {name: value / steps for name, value in watch.seconds().items()}
    behind = sum(seconds[name] for name in ("forward", "optimizer", "EMA and statistics"))
    seconds["backward and clipping"] = seconds["step"] - behind
    seconds["rest of forward"] = seconds["forward"] - sum(seconds.get(name, 0.0) for name in PARTS)
    return seconds


def count_waits(phase, batch):
    """How often a step makes the CPU wait for the GPU -> (times, what torch says of each kind of wait)."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take_step(phase, batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    return len(waits), sorted(set(waits))


def measure(cfg, rounds, each):
    """A config's steps -> figures, a dict for JSON. UserError where the device has too little memory."""
    device = V.choose_device(cfg.device, 0)
    process = V.Process(0, 1, device, V.amp_dtype(cfg, device))
    on_gpu = device.type == "cuda"
    figures = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": V.PRECISIONS[process.amp_dtype],
        "compiled": cfg.compile,
        "batch_size": cfg.batch_size,
        "grad_accum": cfg.grad_accum,
        "ceiling_tflops": ceiling(process),
    }
    phase = new_phase(cfg, process)
    batch = V.for_step(V.noise_batch(phase.run, cfg.batch_size), 0, device)
    figures["first_step_s"] = timed(phase, batch, 1)
    timed(phase, batch, WARM_STEPS)
    taken = sorted(timed(phase, batch, each) for _ in range(rounds))
    low, median, high = statistics.quantiles(taken, n=4) if rounds > 1 else taken * 3
    clips, flops = V.step_samples(cfg, 1), phase.world.flops()
    figures |= {
        "seconds": median,
        "seconds_quartiles": (low, high),
        "clips_per_s": clips / median,
        "tokens_per_s": clips * cfg.num_tokens / median,
        "tflop_per_clip": sum(flops.values()) / 1e12,
        "tflops": sum(flops.values()) * clips / median / 1e12,
        "mem_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else V.peak_memory_gb(device),
    }
    figures["ceiling_share"] = figures["tflops"] / figures["ceiling_tflops"]
    if on_gpu:
        figures["waits_per_step"], figures["waits_at"] = count_waits(phase, batch)
    if not cfg.compile:
        figures["parts_s"] = split(phase, batch, each)
    return figures


def told(figures):
    """Figures of `measure` -> lines."""
    low, high = figures["seconds_quartiles"]
    first = figures["first_step_s"]
    lines = [
        f"{figures['device']}, torch {figures['torch']}, {figures['precision']}{', compiled' * figures['compiled']}",
        f"{figures['seconds']:.4g} s/step (quartiles {low:.4g} to {high:.4g}; the first {first:.3g}), "
        f"{figures['clips_per_s']:.4g} clips/s, {figures['tokens_per_s']:.4g} tokens/s, {figures['mem_gb']:.3g} GB",
        f"{figures['tflop_per_clip']:.4g} TFLOP per clip, {figures['tflops']:.4g} TFLOP/s = "
        f"{figures['ceiling_share']:.1%} of {figures['ceiling_tflops']:.4g} of a large product",
    ]
    if "parts_s" in figures:
        parts = figures["parts_s"]
        names = (*PARTS, *OTHER_PARTS)
        shares = ", ".join(f"{name} {parts.get(name, 0.0) / parts['step']:.1%}" for name in names)
        lines.append(f"a step of {parts['step']:.4g} s is {shares}")
    if "waits_per_step" in figures:
        lines.append(f"the CPU waits for the GPU {figures['waits_per_step']} times per step: {figures['waits_at']}")
    return lines


def run_step(args, flags):
    """`step` -> exit code."""
    cfg, _, _ = V.resolve_config(flags, V.VJepaAutoV2)
    torch.set_float32_matmul_precision("high")
    try:
        figures = measure(cfg, args.rounds, args.each)
    except torch.OutOfMemoryError as error:
        raise V.UserError(f"too little memory: {V.flat(error)[:160]}; {V.memory_cures(cfg)}") from error
    V.emit("\n".join(told(figures)) + "\n", sys.stdout)
    if args.out:
        V.write_report(args.out, figures)
    return 0


# -- the rows of a GPU

HEADS = (
    "preset", "flags", "s/step", "clips/s", "tokens/s", "TFLOP/s", "of a large product", "GB", "waits/step", "first s",
)  # fmt: skip


def row_of(row, figures):
    """A row of gpu.md; figures is a text where there are none."""
    if isinstance(figures, str):
        return [row[0], " ".join(row[1:]), figures, *[""] * (len(HEADS) - 3)]
    low, high = figures["seconds_quartiles"]
    return [
        row[0], " ".join(row[1:]), f"{figures['seconds']:.4f} ({low:.4f} to {high:.4f})",
        f"{figures['clips_per_s']:.1f}", f"{figures['tokens_per_s'] / 1e3:.0f} k", f"{figures['tflops']:.0f}",
        f"{figures['ceiling_share']:.0%} of {figures['ceiling_tflops']:.0f}", f"{figures['mem_gb']:.1f}",
        f"{figures['waits_per_step']}", f"{figures['first_step_s']:.0f}",
    ]  # fmt: skip


def parts_table(found):
    """What the parts of uncompiled steps take -> lines of Markdown."""
    names = ("step", *PARTS, *OTHER_PARTS)
    lines = ["", f"| ms | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for row, figures in found:
        if not isinstance(figures, str) and "parts_s" in figures:
            values = (f"{figures['parts_s'].get(name, 0.0) * 1e3:.1f}" for name in names)
            lines.append(f"| {' '.join(row)} | {' | '.join(values)} |")
    return lines


def write_rows(out, found):
    """gpu.md and gpu.json of what is known so far."""
    known = [figures for _, figures in found if not isinstance(figures, str)]
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    lines += [f"| {' | '.join(row_of(*pair))} |" for pair in found] + parts_table(found)
    head = f"{known[0]['device']}, torch {known[0]['torch']}, `python tools/bench.py gpu`" if known else "no figures"
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([head, "", *lines, ""])
    V.write_atomic(out / "gpu.md", lambda handle: handle.write(text.encode()))
    V.write_report(out / "gpu.json", {" ".join(row): figures for row, figures in found})


def run_gpu(args, flags):
    """`gpu` -> exit code."""
    if not torch.cuda.is_available():
        raise V.UsageError("this machine has no usable CUDA device; tools/bench.py step measures any device")
    out, found, end = Path(args.out or ROOT / "records" / "gpu"), [], time.monotonic() + 60 * args.minutes
    for row in ROWS:
        left = end - time.monotonic()
        figures = "not run: the minutes were over"
        if left > 20:
            with tempfile.TemporaryDirectory() as folder:
                path, own = Path(folder, "step.json"), ["--rounds", f"{args.rounds}", "--each", f"{args.each}"]
                command = [sys.executable, __file__, "step", *own, "--out", str(path), "--preset", *row, *flags]
                began = time.monotonic()
                try:
                    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, timeout=left)
                except subprocess.TimeoutExpired:
                    figures = f"stopped after {left:.0f} s"
                else:
                    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
                    figures = json.loads(path.read_text()) if path.exists() else f"failed: {last[:200]}"
            V.say(f"{' '.join(row)}: {time.monotonic() - began:.0f} s, {row_of(row, figures)[2]}")
        found.append((row, figures))
        write_rows(out, found)
    V.emit((out / "gpu.md").read_text(), sys.stdout)
    return 0


def parse(argv):
    """-> (arguments, flags for the script)."""
    parser = V.ArgumentParser(description="How long a training step takes.", allow_abbrev=False)
    parser.add_argument("what", choices=("step", "gpu"))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the median counts")
    parser.add_argument("--each", type=int, default=4, help="steps of a round")
    parser.add_argument("--minutes", type=float, default=10.0, help="gpu: begin no row after so many")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="step: json file; gpu: folder")
    args, flags = parser.parse_known_args(argv)
    for name in ("rounds", "each"):
        if getattr(args, name) < 1:
            raise V.UsageError(f"{name} = {getattr(args, name)}: must be 1 or above (--{name})")
    return args, flags


def main(argv=None):
    """Command line -> exit code."""
    args, flags = parse(argv)
    return (run_step if args.what == "step" else run_gpu)(args, flags)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
