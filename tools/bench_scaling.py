"""How training scales over ranks: measured on two processes of this machine, and as arithmetic for many GPUs.

    python tools/bench_scaling.py [--preset tiny] [--rounds 6] [--steps 4] [--out FILE.json] [--trace FILE.json] [...]
    python tools/bench_scaling.py --table [--share 0.45] [--nics 8]

Two gloo processes, each on its own core with one thread, take turns: steps as two ranks, the same steps as two
processes that know nothing of each other, and steps of one while the other waits. The second is the control: what two
busy cores take from each other is not the ranks' fault. Weak scaling is its time over that of the ranks. Further flags
are those of the script. Counted for one step: bytes of gradients and every other collective; and from a trace of one
step, which share of the all-reduce's time lies inside backward. On a busy machine start it with chrt -r 1.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch
import torch.distributed as dist
from bench import new_phase, take_step, timed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import VJepa_AUTO_V2 as V

KINDS = ("ranks", "apart", "alone")  # two ranks, two single processes side by side, one while the other waits
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_gather_object")


# -- measured: two processes


def counting(calls, real, name, *args, **kwargs):
    """A collective that is noted, with its bytes."""
    tensors = [value for value in args if torch.is_tensor(value)]
    calls[name].append(sum(value.nbytes for value in tensors))
    return real(*args, **kwargs)


def counting_hook(sizes, bucket):
    """DDP's own all-reduce of a bucket of gradients, with its bytes noted."""
    sizes.append(bucket.buffer().nbytes)
    return default_hooks.allreduce_hook(None, bucket)


def count_collectives(phase, batch):
    """One step -> {bytes of gradients per bucket, of what learns; calls and bytes of other collectives}."""
    calls, real = {name: [] for name in COLLECTIVES}, {name: getattr(dist, name) for name in COLLECTIVES}
    sizes = []
    phase.wrapped.register_comm_hook(sizes, counting_hook)
    for name in COLLECTIVES:
        setattr(dist, name, partial(counting, calls, real[name], name))
    try:
        take_step(phase, batch, 0)
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, real[name])
    other = {name: list((Counter(of) - Counter(sizes)).elements()) for name, of in calls.items()}  # the hook's own
    return {
        "gradient_bytes": sum(sizes),
        "trained_bytes": sum(p.nbytes for p in phase.world.trained().values()),
        "buckets": len(sizes),
        "other_calls": {name: len(of) for name, of in other.items() if of},
        "other_bytes": sum(map(sum, other.values())),
    }


def covered(spans, window):
    """Seconds of spans [(begin, end)] that lie inside a window."""
    return sum(max(0, min(end, window[1]) - max(begin, window[0])) for begin, end in spans)


def read_trace(path):
    """A chrome trace of a step -> share of all-reduce time inside backward, and what it is made of. UserError where it
    holds neither."""
    events = [event for event in json.loads(Path(path).read_text())["traceEvents"] if event.get("ph") == "X"]
    spans = [(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events]
    backward = [span for span in spans if span[0].startswith("autograd::engine::evaluate_function")]
    reduced = [span[1:] for span in spans if "all_reduce" in span[0] and "gloo:" in span[0]]
    if not backward or not reduced:
        raise V.UserError(f"{path}: a trace without backward or without gloo's all-reduce")
    window = min(span[1] for span in backward), max(span[2] for span in backward)
    buckets = [span for span in reduced if span[1] > window[0] and span[0] < window[1]]
    whole = sum(end - begin for begin, end in buckets)
    return {
        "backward_s": window[1] - window[0],
        "all_reduce_s": whole,
        "all_reduces": len(buckets),
        "inside_backward": covered(buckets, window) / whole if whole else 0.0,
        "after_backward_s": max(0.0, max(end for _, end in buckets) - window[1]),
    }


def trace_step(phase, batch, path):
    """One step under torch's profiler -> `read_trace` of it. The trace stays at `path`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        take_step(phase, batch, 0)
    profiler.export_chrome_trace(str(path))
    return read_trace(path)


def let_helpers_in():
    """Under chrt -r, threads that move data go before the one that computes, as other schedulers let them: else they
    wait for the end of its turn, a tenth of a second."""
    if os.sched_getscheduler(0) == os.SCHED_RR:
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(2))


def run_rank(rank, args, flags, out):
    """One of the two processes: all rounds, then counts and a trace -> written to `out` by rank 0."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    cfg, _, _ = V.resolve_config([*flags, "--preset", args.preset, "--device", "cpu"], V.VJepaAutoV2)
    group = V.identify_process(cfg, V.StopFlag(()))
    V.join_ranks(group, cfg)
    group.amp_dtype = V.amp_dtype(cfg, group.device)
    together, single = new_phase(cfg, group), new_phase(cfg, replace(group, world_size=1, rank=0, store=None))
    batch = V.for_step(V.noise_batch(together.run, cfg.batch_size), 0, group.device)
    for phase in (together, single, together):  # DDP makes its buckets anew after the first
        take_step(phase, batch, 0)
    let_helpers_in()
    times = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            dist.barrier()
            if kind != "alone" or rank == 0:
                step = partial(take_step, together if kind == "ranks" else single)
                times[kind].append(timed(step, batch, group.device, args.steps))
    with tempfile.TemporaryDirectory() as folder:
        trace = trace_step(together, batch, (rank == 0 and args.trace) or Path(folder) / "trace.json")
    counts = count_collectives(together, batch)
    if rank == 0:
        Path(out).write_text(json.dumps({"times": times, "trace": trace, "counts": counts}))
    dist.destroy_process_group()


def summary(found):
    """What the ranks wrote -> figures: medians, and weak scaling as a median over rounds."""
    times = found["times"]
    wall, cpu = ({kind: statistics.median(row[side] for row in times[kind]) for kind in KINDS} for side in (0, 1))
    pairs = [[row[0] for row in times[kind]] for kind in KINDS]
    return {
        **{f"{kind}_s": wall[kind] for kind in KINDS},
        **{f"{kind}_cpu_s": cpu[kind] for kind in KINDS},
        "weak_scaling": statistics.median(apart / ranks for ranks, apart, _ in zip(*pairs)),
        "cores_share": statistics.median(alone / apart for _, apart, alone in zip(*pairs)),
        **found["counts"],
        **{f"trace_{name}": value for name, value in found["trace"].items()},
    }


def measure(args, flags):
    """Start the two processes -> figures. UserError where the machine has one core, or one of them ends early."""
    if len(os.sched_getaffinity(0)) < 2:
        raise V.UserError("two cores are needed, one for each process; --table needs none")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--rank_out", f"{folder}/found.json"]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        if codes := [code for code in (rank.wait() for rank in ranks) if code]:
            raise V.UserError(f"a process ended with code {codes[0]}; what it said stands above")
        return summary(json.loads(Path(folder, "found.json").read_text()))


def show(figures):
    """Figures -> lines."""
    calls = ", ".join(f"{count} {name}" for name, count in figures["other_calls"].items())
    share = figures["gradient_bytes"] / figures["trained_bytes"]
    return [
        f"{'':<28}{'s per step':>12}{'CPU s':>9}",
        *(
            f"{text:<28}{figures[f'{kind}_s']:>12.4f}{figures[f'{kind}_cpu_s']:>9.4f}"
            for kind, text in zip(KINDS, ("two ranks", "two single processes", "one process alone"))
        ),
        f"weak scaling {figures['weak_scaling']:.1%} (two single processes over two ranks); beside a busy core a "
        f"single process runs at {figures['cores_share']:.1%}",
        f"gradients: {figures['gradient_bytes'] / 1e6:.2f} MB in {figures['buckets']} buckets, {share:.4f} of the "
        f"weights that learn; besides: {calls}, {figures['other_bytes'] / 1e6:.3f} MB",
        f"trace: {figures['trace_inside_backward']:.0%} of {figures['trace_all_reduce_s'] * 1e3:.1f} ms of all-reduce "
        f"in {figures['trace_all_reduces']} calls lie inside backward ({figures['trace_backward_s'] * 1e3:.1f} ms); "
        f"{figures['trace_after_backward_s'] * 1e3:.1f} ms are waited for after it",
    ]


# -- arithmetic: many GPUs

SIZES = ("base", "vjepa2_vitl", "vjepa2_vitg")
GPUS = (8, 64, 1024)


def model_facts(preset):
    """-> (config, FLOP per clip, bytes that learn, bytes of the target encoder and the flow's EMA, bytes that blocks
    gather per micro-step under fsdp)."""
    cfg = V.preset_config(preset)
    with torch.device("meta"):
        world = V.VJepaAutoV2(cfg)
    learns = sum(p.nbytes for p in world.trained().values())
    units = {id(p) for unit in V.shard_units(world) for p in unit.parameters()}
    trunk = {
        name: sum(p.nbytes for p in getattr(world, name).parameters() if id(p) in units) for name in world.NETWORKS
    }
    calls = 2 * cfg.mask_draws + 1 if cfg.lambda_vjepa else 1  # passes of encoder and predictor in a micro-step
    gathered = 2 * calls * (trunk["online"] + trunk["predictor"]) + trunk["target"] + 2 * trunk["flow"]
    return cfg, sum(world.flops().values()), learns, gathered


def rate(args, ranks):
    """Bytes per second that a ring of so many GPUs carries: NVLink in a node, else at most what the network cards of a
    node do together."""
    return args.reached * min(args.nvlink, *([args.nics * args.nic] if ranks > 8 else [args.nvlink])) * 1e9


def table_row(args, preset, facts, ranks):
    """One row of the table -> list of texts."""
    cfg, flop, learns, gathered = facts
    micro = flop * cfg.batch_size / (args.peak * 1e12 * args.share)
    compute, ring, clips = micro * cfg.grad_accum, (ranks - 1) / ranks, V.step_samples(cfg, ranks)
    reduced, moved = 2 * ring * learns, ring * (gathered * cfg.grad_accum + learns)
    ddp_s, fsdp_s = reduced / rate(args, ranks), moved / rate(args, ranks)
    # gradients are summed behind two thirds of the last micro-step, weights gathered behind all of the step
    ddp, fsdp = compute + max(0.0, ddp_s - micro * 2 / 3), compute + max(0.0, fsdp_s - compute)
    factor = clips / V.step_samples(cfg, 8)
    return [
        preset, f"{ranks}", f"{clips}", f"{compute:.3f}", f"{reduced / 1e9:.2f}", f"{ddp_s * 1e3:.0f}",
        f"{compute / (compute + ddp_s):.1%} to {compute / ddp:.0%}", f"{moved / 1e9:.1f}", f"{fsdp_s * 1e3:.0f}",
        f"{compute / (compute + fsdp_s):.1%} to {compute / fsdp:.0%}", f"{clips / compute:.0f}",
        f"{cfg.lr * factor**0.5:.2g}", f"{cfg.ema_momentum**factor:.4f}",
    ]  # fmt: skip


HEADS = (
    "size", "GPUs", "clips per step", "compute s", "DDP GB", "DDP ms", "DDP efficiency", "FSDP GB", "FSDP ms",
    "FSDP efficiency", "clips/s", "lr", "EMA momentum",
)  # fmt: skip


def table(args):
    """The table of docs/scaling.md -> lines of Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for preset in SIZES:
        facts = model_facts(preset)
        lines += [f"| {' | '.join(table_row(args, preset, facts, ranks))} |" for ranks in GPUS]
    return lines


def parse(argv):
    """-> (arguments, flags for the script)."""
    parser = argparse.ArgumentParser(description="Scaling over ranks, measured and as arithmetic.", allow_abbrev=False)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=6, help="turns of the three kinds")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="json file for the figures")
    parser.add_argument("--trace", default="", type=os.path.expanduser, help="json file for chrome://tracing")
    parser.add_argument("--rank_out", default="", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="arithmetic for many GPUs; measures nothing")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of a GPU in bf16")
    parser.add_argument("--share", type=float, default=0.45, help="share of the peak that a step reaches")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s of a GPU inside its node, one way")
    parser.add_argument("--nic", type=float, default=50.0, help="GB/s of a network card, one way")
    parser.add_argument("--nics", type=int, default=8, help="network cards of a node of 8 GPUs")
    parser.add_argument("--reached", type=float, default=0.7, help="share of a bandwidth that collectives reach")
    return parser.parse_known_args(argv)


def main(argv=None):
    """Command line -> exit code."""
    args, flags = parse(argv)
    if args.rank_out:
        return run_rank(int(os.environ["RANK"]), args, flags, args.rank_out)
    if args.table:
        V.emit("\n".join(table(args)) + "\n", sys.stdout)
        return 0
    figures = measure(args, flags)
    V.emit("\n".join(show(figures)) + "\n", sys.stdout)
    if args.out:
        V.write_report(args.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
