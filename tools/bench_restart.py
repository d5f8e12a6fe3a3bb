"""Kill a run again and again, time how long each restart takes to its next step, and what saving costs.

    python tools/bench_restart.py [--kills 5] [--preset tiny] [--nproc 1] [--out FILE.json] [-- more flags]

The run trains on built-in scenes in a temporary folder with its own flags; every kill is a kill -9 of the whole process
group at a random moment. Printed: seconds from the start of the command to its first new step, steps that had to be
done again, and the share of a run's time that went into saving at the given ckpt_every (saving timed alone, on the
final state).
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V


def logged_steps(out_dir):
    """Steps in metrics.jsonl in order, evaluations left out; a torn last line does not count."""
    path = Path(out_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [
        row["step"]
        for row in map(json.loads, text.splitlines() if text.endswith("\n") else text.splitlines()[:-1])
        if "lr" in row
    ]


def wait_for_step(process, out_dir, after, old_file=None, seconds=600.0):
    """Wait until a step beyond `after` stands in a metrics.jsonl other than `old_file` (an inode: a start replaces the
    file) -> seconds waited. SystemExit when the run ends or takes too long."""
    began, path = time.perf_counter(), Path(out_dir) / "metrics.jsonl"
    while not path.exists() or path.stat().st_ino == old_file or max(logged_steps(out_dir), default=0) <= after:
        if process.poll() is not None or time.perf_counter() - began > seconds:
            raise SystemExit(f"error: the run did not reach step {after + 1}; see {out_dir}/train.log")
        time.sleep(0.02)
    return time.perf_counter() - began


def start(command):
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=ROOT
    )


def kill(process):
    """kill -9 of the whole group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def saving_seconds(out_dir, rounds=5):
    """Median seconds of one save of the newest state, and its size in bytes."""
    path = V.checkpoint_files(out_dir)[-1][1]
    state, cfg, times = V.load_checkpoint(path), V.VJepaAutoV2Config(), []
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        for _ in range(rounds):
            began = time.perf_counter()
            V.save_checkpoint(state, folder, cfg, True)
            times.append(time.perf_counter() - began)
    return statistics.median(times), path.stat().st_size


def main(argv=None):
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description="Time restarts after kill -9, and saving.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--nproc", type=int, default=1, help="ranks, under torchrun when above 1")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="json file for the figures")
    args, flags = parser.parse_known_args(argv)
    rng, waits, lost, times = random.Random(0), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / "run"
        launcher = (
            [sys.executable]
            if args.nproc == 1
            else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
        )
        command = [
            *launcher,
            "VJepa_AUTO_V2.py",
            "--preset",
            args.preset,
            "--out_dir",
            str(out_dir),
            "--log_every",
            "1",
            *(f for f in flags if f != "--"),
        ]
        process = start(command)
        wait_for_step(process, out_dir, 3)
        while not V.checkpoint_files(out_dir) and process.poll() is None:
            time.sleep(0.02)
        for _ in range(args.kills):
            time.sleep(rng.uniform(0, 5))
            kill(process)
            reached = max(logged_steps(out_dir))
            rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()[:-1]]
            times += [b["time"] - a["time"] for a, b in zip(rows, rows[1:]) if "lr" in a and "lr" in b]
            saved = max((step for step, _ in V.checkpoint_files(out_dir)), default=0)
            lost.append(reached - saved)
            old_file = (out_dir / "metrics.jsonl").stat().st_ino
            process = start(command)
            waits.append(wait_for_step(process, out_dir, saved, old_file))
        kill(process)
        save_s, size = saving_seconds(out_dir)
        ckpt_every = json.loads((out_dir / "config.json").read_text())["config"]["ckpt_every"]
    figures = {
        "kills": args.kills,
        "ranks": args.nproc,
        "restart_s_worst": max(waits),
        "restart_s_median": statistics.median(waits),
        "steps_lost_worst": max(lost),
        "ckpt_every": ckpt_every,
        "save_s": save_s,
        "checkpoint_mb": size / 1e6,
        "step_s": statistics.median(times),
        "saving_share": save_s / (ckpt_every * statistics.median(times)),
    }
    for name, value in figures.items():
        V.say(f"{name:<18}{value:.4g}")
    if args.out:
        V.write_report(args.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
