"""How long a training step takes, what of the machine's speed it uses, and how it compares.

    python tools/bench.py step [--rounds 7] [--each 4] [--threads N] [--out FILE.json] [flags of the script]
    python tools/bench.py step --compare REV [--against "FLAGS"] [--control] [flags of the script]
    python tools/bench.py plain [--rounds 7] [--each 4] [--threads 1] [flags of the script]
    python tools/bench.py gpu [--out records/gpu] [--minutes 10]

`step` times optimizer steps of the tri-temporal world on a batch of noise that lies on the device, in the precision
that a run would choose: seconds per step (median and quartiles of rounds) on the clock and of the CPU, clips and tokens
per second, memory at its peak, TFLOP that must be computed and those of the products that are executed, and TFLOP/s
beside what a large product of random matrices reaches in the same precision on the same device. Then, uncompiled, what
the parts of a step take, how often a step makes the CPU wait for the GPU, and what the clips of a step cost to make in
one process, from the run's own source and without its frame cache: the workers of a run do that beside the step.

`--compare REV` and `--against "FLAGS"` hold the working tree against its VJepa_AUTO_V2.py of a commit, and against
itself under other flags. Each side lives in a process of its own; they take turns, one round each, in an order that
turns round every time, while the others wait. Said are seconds of each, and of the paired rounds by how much longer the
other side takes. `--control` adds the working tree a second time, which tells how far noise goes; so does
`--compare HEAD`. On a shared machine trust the ratios of CPU seconds with `--threads 1`.

`plain` does the same with the step of plain_step.py: the same losses and sizes as one would write them first. It runs
in fp32, ours in fp32 and, where the CPU is faster with it, in bf16. The products of both must be equally many.

`gpu` runs `step` for the rows of records/gpu, each in a process of its own, in order of importance until the minutes
are over, and writes gpu.md and gpu.json.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "VJEPA_BENCH_SOURCE"  # environment: folder of the VJepa_AUTO_V2.py that is measured, where it is another
sys.path[:0] = [os.environ.get(SOURCE) or str(ROOT), str(ROOT / "tools")]

import plain_step
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import VJepa_AUTO_V2 as V

WARM_STEPS = 3  # steps after the first that do not count
PARTS = ("target", "online", "predictor", "outcome", "flow")  # children of the world whose forward passes are timed
OTHER_PARTS = ("rest of forward", "backward and clipping", "optimizer", "EMA and statistics")


# -- 1  A step


def wait(device):
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def set_up(threads):
    """What a run sets, and the number of threads where it is given."""
    torch.set_float32_matmul_precision("high")
    if threads:
        torch.set_num_threads(threads)


def process_for(cfg):
    """The single process of a run on the config's device, in the precision that the run would choose."""
    process = V.Process(0, 1, V.choose_device(cfg.device, 0), None)
    process.amp_dtype, _ = V.choose_precision(V.VJepaAutoV2, cfg, process)
    return process


def new_run(cfg, process):
    """A run without a world."""
    source = V.DataSource("render", "", [], [], [], True, V.ClipDataset, V.VJepaAutoV2.draw)
    return V.Run(cfg, process, None, None, source)


def new_phase(cfg, process):
    """Training of a fresh world as the loop has it -> V.Phase."""
    run = new_run(cfg, process)
    wrapped = V.build_world(V.VJepaAutoV2, run)
    run.scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp_dtype == torch.float16)
    return V.Phase(run, run.world, wrapped, run.optimizer)


def settle(world):
    """Teach the flow's space made directions, so that steps are those of a run that has gone on for a while: one batch
    of noise, again and again, would never fill them."""
    cfg = world.cfg
    if cfg.lambda_flow and not cfg.flow_fit_clips:
        span = len(world.space.basis)
        world.space.fit(torch.randn(2 * cfg.flow_rank, cfg.flow_tokens, span, device=world.space.basis.device))
        world.space.updates.fill_(1000)


def new_batch(run):
    """A batch of noise on the device."""
    return V.for_step(V.noise_batch(run, run.cfg.batch_size), 0, run.process.device)


def take_step(phase, batch, step):
    """A step with all that the loop asks of other ranks in it."""
    process = phase.run.process
    process.any(False, False)
    _, carries, finite = V.take_step(phase, [batch] * phase.cfg.grad_accum, step)
    process.any(not finite, False)
    V.apply_step(phase, carries, step)
    phase.optimizer.zero_grad(set_to_none=True)


def timed(take, batch, device, steps):
    """Seconds per step over some steps: on the clock, and of this process on all its cores."""
    wait(device)
    began, used = time.perf_counter(), time.process_time()
    for step in range(steps):
        take(batch, step)
    wait(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - used) / steps


def spread(values):
    """(first quartile, median, third quartile), within what was measured."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values) * 3


# -- 2  What a step must compute, what it executes, and what the device can


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


def attention_flop(q, k, v, *_, **__):
    """FLOP of attention by the shapes of queries, keys and values."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flop(gradient, q, k, v, *_, **__):
    """FLOP of its backward, scores once more included, by the shapes of the gradient, queries, keys and values."""
    return sdpa_backward_flop_count(gradient, q, k, v)


def product_counter():
    """torch's counter of the FLOP of products, with the attention kernel of a CPU, which it does not know."""
    own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={own: attention_flop, backward: attention_backward_flop})


def executed_flop(take, batch, compiled=False):
    """FLOP of the products of one step, forward and backward; what is compiled runs uncompiled. Attention that
    computes its scores a second time in backward, as fused kernels do, is counted so."""
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), product_counter() as counter:
        take(batch, 0)
    return counter.get_total_flops()


# -- 3  The parts of a step, and its data


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

    def around(self, name, call, *args, **kwargs):
        """What the call gives, timed under a name."""
        self.begin(name)
        try:
            return call(*args, **kwargs)
        finally:
            self.end(name)


def split(phase, batch, steps):
    """Seconds per step of the parts of an uncompiled step. `forward` holds the parts of PARTS and what joins them."""
    watch, world, run = Stopwatch(phase.run.process.device), phase.world, phase.run
    for name in ("forward", *PARTS):
        module = world if name == "forward" else getattr(world, name)
        if name == "online":  # it is used in pieces, which its caller names
            module.encode = partial(watch.around, name, module.encode)
        elif name == "target":  # of some tubelets or all
            world.make_targets = partial(watch.around, name, world.make_targets)
        else:
            module.register_forward_pre_hook(partial(watch.begin, name))
            module.register_forward_hook(partial(watch.end, name))
    for step in range(steps):
        watch.begin("step")
        _, carries, _ = V.take_step(phase, [batch] * phase.cfg.grad_accum, step)
        watch.around("optimizer", run.scaler.step, phase.optimizer)
        watch.around("EMA and statistics", world.after_step, carries, step)
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


def clip_seconds(cfg, most=8):
    """Seconds that one process takes to make a clip of the run's source with all that is drawn for it: the mean over a
    few, after one that does not count. Of scenes that a run would write as files, a few are written first."""
    count = min(cfg.batch_size, most)
    with tempfile.TemporaryDirectory() as folder:
        own = replace(cfg, out_dir=folder, scene_clips=min(cfg.scene_clips, 2 * most))
        videos = V.list_latents(V.VJepaAutoV2, own) if cfg.latents else V.list_data(own)
        data = V.open_data(V.VJepaAutoV2, own, videos, True, tuple).dataset(own, "train")
        data[count]
        began = time.perf_counter()
        V.collate([data[index] for index in range(count)])
        return (time.perf_counter() - began) / count


# -- 4  Figures of a step


def measure(cfg, rounds, each):
    """A config's steps -> figures, a dict for JSON. UserError where the device has too little memory."""
    process = process_for(cfg)
    device, on_gpu = process.device, process.device.type == "cuda"
    figures = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "precision": V.PRECISIONS[process.amp_dtype],
        "compiled": cfg.compile,
        "batch_size": cfg.batch_size,
        "grad_accum": cfg.grad_accum,
        "ceiling_tflops": ceiling(process),
    }
    phase = new_phase(cfg, process)
    batch, take = new_batch(phase.run), partial(take_step, phase)
    figures["first_step_s"], _ = timed(take, batch, device, 1)
    settle(phase.world)
    timed(take, batch, device, WARM_STEPS)
    walls, used = zip(*(timed(take, batch, device, each) for _ in range(rounds)))
    low, median, high = spread(walls)
    clips, flop = V.step_samples(cfg, 1), sum(phase.world.flops().values())
    figures |= {
        "seconds": median,
        "seconds_quartiles": (low, high),
        "cpu_seconds": statistics.median(used),
        "clips_per_s": clips / median,
        "tokens_per_s": clips * cfg.num_tokens / median,
        "tflop_per_clip": flop / 1e12,
        "tflops": flop * clips / median / 1e12,
        "mem_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else V.peak_memory_gb(device),
    }
    figures["ceiling_share"] = figures["tflops"] / figures["ceiling_tflops"]
    if on_gpu:
        figures["waits_per_step"], figures["waits_at"] = count_waits(phase, batch)
    figures["replayed"], phase.recorder = phase.recorder is not None, None  # what follows looks into a step
    figures["executed_tflop_per_clip"] = executed_flop(take, batch, cfg.compile) / clips / 1e12
    if not cfg.compile:
        figures["parts_s"] = split(phase, batch, each)
    figures["data_s_per_clip"] = clip_seconds(cfg)
    figures["data_share"] = figures["data_s_per_clip"] * clips / median
    return figures


def told(figures):
    """Figures of `measure` -> lines."""
    low, high = figures["seconds_quartiles"]
    first, executed = figures["first_step_s"], figures["executed_tflop_per_clip"]
    lines = [
        f"{figures['device']}, torch {figures['torch']}, {figures['precision']}{', compiled' * figures['compiled']}",
        f"{figures['seconds']:.4g} s/step (quartiles {low:.4g} to {high:.4g}; the first {first:.3g}), "
        f"{figures['cpu_seconds']:.4g} CPU s, {figures['clips_per_s']:.4g} clips/s, {figures['tokens_per_s']:.4g} "
        f"tokens/s, {figures['mem_gb']:.3g} GB",
        f"{figures['tflop_per_clip']:.4g} TFLOP per clip must be computed, {executed:.4g} are; "
        f"{figures['tflops']:.4g} TFLOP/s = {figures['ceiling_share']:.1%} of {figures['ceiling_tflops']:.4g} of a "
        "large product",
    ]
    if "parts_s" in figures:
        parts = figures["parts_s"]
        names = (*PARTS, *OTHER_PARTS)
        shares = ", ".join(f"{name} {parts.get(name, 0.0) / parts['step']:.1%}" for name in names)
        lines.append(f"a step of {parts['step']:.4g} s is {shares}")
    data, share = figures["data_s_per_clip"], figures["data_share"]
    lines.append(f"data: {data:.4g} s per clip in one process; beside a step, its clips take {share:.1%} of its time")
    if "waits_per_step" in figures:
        lines.append(f"the CPU waits for the GPU {figures['waits_per_step']} times per step: {figures['waits_at']}")
    return lines


# -- 5  Sides that take turns

DTYPES = {name: dtype for dtype, name in V.PRECISIONS.items()}
TREE = "the working tree"


class Side:
    """A process that takes steps when it is told to and waits meanwhile. `kind`: ours | fixed (ours, with a flow space
    that stays) | plain; `folder`: that of its VJepa_AUTO_V2.py."""

    def __init__(self, name, kind, dtype, threads, flags, folder=ROOT):
        self.name, self.words = name, tempfile.TemporaryFile("w+")
        own = ["--kind", kind, "--dtype", V.PRECISIONS[dtype], "--threads", f"{threads}"]
        self.child = subprocess.Popen(
            [sys.executable, __file__, "side", *own, *flags], env={**os.environ, SOURCE: str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True,
        )  # fmt: skip

    def __enter__(self):
        self.facts = self.hear()
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout, self.words):
            with suppress(BrokenPipeError):
                pipe.close()

    def hear(self):
        """What the process says next. UsageError or UserError with its last word where it ended."""
        for line in self.child.stdout:
            if line.startswith('{"side": '):
                return json.loads(line)["side"]
        code, _ = self.child.wait(), self.words.seek(0)
        last = (self.words.read().strip().splitlines() or [f"ended with {code}"])[-1].removeprefix("error: ")
        self.__exit__()
        raise (V.UsageError if code == V.UsageError.exit_code else V.UserError)(f"{self.name}: {V.flat(last)[:300]}")

    def take(self, steps):
        """-> (seconds per step, CPU seconds per step)."""
        with suppress(BrokenPipeError):  # `hear` says why
            self.child.stdin.write(f"{steps}\n")
            self.child.stdin.flush()
        return tuple(self.hear())


def run_side(args, flags):
    """What the process of a Side does -> exit code."""
    set_up(args.threads)
    cfg, named, _ = V.resolve_config(flags, V.VJepaAutoV2)
    if args.kind != "ours":
        cfg, _ = plain_step.plain_config(cfg, named)
    device = V.choose_device(cfg.device, 0)
    process = V.Process(0, 1, device, DTYPES[args.dtype])
    if args.kind == "plain":
        run, take = new_run(cfg, process), plain_step.PlainStep(cfg, device).take
    else:
        phase = new_phase(cfg, process)
        run, take = phase.run, partial(take_step, phase)
        (plain_step.space_of if args.kind == "fixed" else settle)(phase.world)
    batch = new_batch(run)
    facts = {"precision": args.dtype, "threads": torch.get_num_threads(), "torch": torch.__version__}
    take(batch, 0)  # moments of AdamW and the like
    facts["tflop_per_clip"] = executed_flop(take, batch, cfg.compile) / V.step_samples(cfg, 1) / 1e12
    V.emit(json.dumps({"side": facts}) + "\n", sys.stdout)
    for line in sys.stdin:
        V.emit(json.dumps({"side": timed(take, batch, device, int(line))}) + "\n", sys.stdout)
    return 0


def take_turns(sides, rounds, each):
    """Rounds of steps, one side after the other -> [(seconds, CPU seconds) per round] of each side."""
    taken = [[] for _ in sides]
    for side in sides:
        side.take(WARM_STEPS)
    for number in range(rounds):
        places = range(len(sides))
        for place in reversed(places) if number % 2 else places:
            taken[place].append(sides[place].take(each))
    return taken


def paired(over, under):
    """Rounds of two sides -> quartiles of the ratios of seconds, and of CPU seconds."""
    return [spread([one[kind] / two[kind] for one, two in zip(over, under)]) for kind in (0, 1)]


def median_line(side, rows):
    """A side's seconds in words."""
    wall, used = (statistics.median(kind) for kind in zip(*rows))
    facts = side.facts
    told = f"{facts['precision']}, threads: {facts['threads']}, {facts['tflop_per_clip']:.4g} TFLOP per clip executed"
    return f"{side.name}: {wall:.4g} s/step, {used:.4g} CPU s ({told})"


def ratio_line(what, ratios):
    """Ratios of `paired` in words."""
    wall, used = (f"{median:.3f} times (quartiles {low:.3f} to {high:.3f})" for low, median, high in ratios)
    return f"{what}: {wall}; of CPU seconds {used}"


def side_figures(sides, taken, ratios):
    """-> a dict for JSON: of each side its facts, rounds, and ratios where it has some."""
    return {
        side.name: {**side.facts, "seconds, CPU seconds": rows, "ratios": ratios.get(side.name)}
        for side, rows in zip(sides, taken)
    }


def source_of(rev):
    """The text of VJepa_AUTO_V2.py at a commit. UsageError where there is none."""
    commands = (
        (["rev-parse", "--git-dir"], "needs a git checkout"),
        (["rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}"], "no commit"),
        (["show", f"{rev}:./VJepa_AUTO_V2.py"], "a commit without VJepa_AUTO_V2.py"),
    )
    for command, why in commands:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        except OSError as error:
            raise V.UsageError(f"--compare {rev}: git cannot be run ({V.reason_of(error)})") from error
        if done.returncode:
            raise V.UsageError(f"--compare {V.shown(rev)}: {why}; git says: {V.flat(done.stderr)[:160]}")
    return done.stdout


def compared(args, flags, stack):
    """The sides of a comparison, the working tree first -> [(name, precision, flags, folder)]."""
    cfg, _, _ = V.resolve_config(flags, V.VJepaAutoV2)
    dtype, rows = process_for(cfg).amp_dtype, []
    if args.compare is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "VJepa_AUTO_V2.py").write_text(source_of(args.compare))
        rows.append((args.compare, dtype, flags, folder))
    if args.against is not None:
        try:
            own = [*flags, *shlex.split(args.against)]
        except ValueError as error:
            raise V.UsageError(f"--against {V.shown(args.against)}: {error}") from error
        other, _, _ = V.resolve_config(own, V.VJepaAutoV2)
        same = all(getattr(cfg, name) == getattr(other, name) for name in ("amp", "amp_type", "device"))
        rows.append(
            (args.against.strip() or "no other flags", dtype if same else process_for(other).amp_dtype, own, ROOT)
        )
    if args.control or args.compare == "HEAD":
        rows.append((f"{TREE} again", dtype, flags, ROOT))
    return [(TREE, dtype, flags, ROOT), *rows]


def run_compare(args, flags):
    """`step --compare` and its like -> exit code."""
    set_up(args.threads)
    with ExitStack() as stack:
        rows = compared(args, flags, stack)
        sides = [stack.enter_context(Side(name, "ours", dtype, args.threads, *of)) for name, dtype, *of in rows]
        taken = take_turns(sides, args.rounds, args.each)
    ratios = {side.name: paired(rows, taken[0]) for side, rows in zip(sides[1:], taken[1:])}
    lines = [*map(median_line, sides, taken)]
    lines += [ratio_line(f"{name} takes, over {TREE}", each) for name, each in ratios.items()]
    V.emit("\n".join(lines) + "\n", sys.stdout)
    if args.out:
        V.write_report(args.out, side_figures(sides, taken, ratios))
    return 0


def run_step(args, flags):
    """`step` -> exit code."""
    if args.compare is not None or args.against is not None or args.control:
        return run_compare(args, flags)
    cfg, _, _ = V.resolve_config(flags, V.VJepaAutoV2)
    set_up(args.threads)
    try:
        figures = measure(cfg, args.rounds, args.each)
    except torch.OutOfMemoryError as error:
        raise V.UserError(f"too little memory: {V.flat(error)[:160]}; {V.memory_cures(cfg)}") from error
    V.emit("\n".join(told(figures)) + "\n", sys.stdout)
    if args.out:
        V.write_report(args.out, figures)
    return 0


# -- 6  `plain`

SAME_WORK = 0.02  # share by which the products of two sides may differ that do the same work


def run_plain(args, flags):
    """`plain` -> exit code. UserError where the sides do not do the same work."""
    cfg, named, _ = V.resolve_config(flags, V.VJepaAutoV2)
    (cfg, note), threads = plain_step.plain_config(cfg, named), args.threads or 1
    set_up(threads)
    half = process_for(replace(cfg, amp=True)).amp_dtype
    rows = [("plain", "plain", None), ("ours", "fixed", None)] + [("ours in bf16", "fixed", half)] * (half is not None)
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(*row, threads, flags)) for row in rows]
        plain, ours = (side.facts["tflop_per_clip"] for side in sides[:2])
        if abs(ours / plain - 1) > SAME_WORK:
            told = f"{plain:.4g} TFLOP per clip are executed by the plain step, {ours:.4g} by ours"
            raise V.UserError(f"not the same work: {told}; a setting that plain_step.py does not know makes it so")
        taken = take_turns(sides, args.rounds, args.each)
    ratios = {side.name: paired(taken[0], rows) for side, rows in zip(sides[1:], taken[1:])}
    lines = [*[note] * bool(note), "the flow's directions are fixed on both sides", *map(median_line, sides, taken)]
    lines += [ratio_line(f"plain takes, over {name}", each) for name, each in ratios.items()]
    lines += ["no bf16: it is no faster than fp32 on this device"] * (half is None)
    V.emit("\n".join(lines) + "\n", sys.stdout)
    if args.out:
        V.write_report(args.out, side_figures(sides, taken, ratios))
    return 0


# -- 7  `gpu`

# its rows, the most wanted first
ROWS = (
    ("base", "--amp", "--compile"),
    ("small", "--amp", "--compile"),
    ("base", "--amp", "--no-compile"),
    ("small", "--amp", "--no-compile"),
    ("small", "--amp", "--compile", "--no-cuda_graph"),
    ("base", "--amp", "--compile", "--no-cuda_graph"),
    ("base", "--no-amp", "--no-compile", "--batch_size", "2"),
    ("base", "--amp", "--no-compile", "--batch_size", "2"),
    ("tiny", "--amp", "--compile"),
    ("tiny", "--amp", "--no-compile"),
    ("large", "--amp", "--no-compile"),
    ("large", "--amp", "--compile"),
    ("vjepa2_vitl", "--amp", "--no-compile", "--grad_accum", "1"),
    ("small", "--no-amp", "--no-compile"),
    ("vjepa2_vitl", "--amp", "--compile", "--grad_accum", "1"),
    ("base", "--no-amp", "--no-compile"),  # 8 clips; where they do not fit, that is the figure
)

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


# -- 8  Command line

COMMANDS = {"step": run_step, "plain": run_plain, "gpu": run_gpu}


def parse(argv):
    """-> (arguments, flags for the script)."""
    parser = V.ArgumentParser(description="How long a training step takes.", allow_abbrev=False)
    parser.add_argument("what", choices=(*COMMANDS, "side"), metavar="|".join(COMMANDS))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the median counts")
    parser.add_argument("--each", type=int, default=4, help="steps of a round")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of the CPU; 0: as many as torch takes, plain: 1"
    )
    parser.add_argument("--compare", metavar="REV", help="step: take turns with the script of this commit")
    parser.add_argument("--against", metavar="FLAGS", help="step: take turns with the same script under further flags")
    parser.add_argument("--control", action="store_true", help="step: the working tree a second time, for the noise")
    parser.add_argument("--minutes", type=float, default=10.0, help="gpu: begin no row after so many")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="step, plain: json file; gpu: folder")
    parser.add_argument("--kind", choices=("ours", "fixed", "plain"), default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help=argparse.SUPPRESS)
    words = iter(sys.argv[1:] if argv is None else argv)  # argparse takes no value that looks like a flag
    words = ["=".join((word, *islice(words, 1))) if word == "--against" else word for word in words]
    args, flags = parser.parse_known_args(words)
    for name, least in (("rounds", 1), ("each", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise V.UsageError(f"{name} = {getattr(args, name)}: must be {least} or above (--{name})")
    for name in ("compare", "against", "control"):
        if getattr(args, name) not in (None, False) and args.what != "step":
            raise V.UsageError(f"--{name} belongs to step, not to {args.what}")
    return args, flags


def main(argv=None):
    """Command line -> exit code."""
    args, flags = parse(argv)
    return {**COMMANDS, "side": run_side}[args.what](args, flags)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
