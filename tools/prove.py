"""Train on built-in scenes and evaluate on held-out ones, once per seed, and write down what came out.

    python tools/prove.py --out records/proof --seeds 1337 1338 1339

For every seed: `VJepa_AUTO_V2.py --preset proof --seed SEED`, then `tools/evaluate.py` on its last checkpoint. Flags
that are not named here go to the training script as they are (`--steps 100 --flow_fit_clips 500`). Written under --out:

    seed_<SEED>/config.json, train.log, metrics.jsonl, evaluation.json    the record of one run
    summary.json, summary.md    every figure: threshold, mean, standard deviation and n over the seeds, how many met it

Checkpoints and pages stay in --run_dir, outside the record. A run that was interrupted goes on where it stopped; a seed
whose record is complete is not run again. Exit code 0 says that the record is complete, not that every threshold was
met.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V

RECORD = ("config.json", "train.log", "metrics.jsonl", "evaluation.json")


def run(command):
    """Run a command with this Python from the project's root, its output passed through -> seconds. SystemExit with its
    code when it fails."""
    V.say("+ python " + " ".join(map(str, command)))
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        V.say(f"error: {command[0]} ended with exit code {code}", sys.stderr)
        raise SystemExit(code)
    return time.perf_counter() - began


def prove_seed(seed, run_dir, record, preset, flags, quick):
    """Train and evaluate one seed and copy its record -> {"train_s", "evaluate_s", "cores"}. Nothing is done twice."""
    times = record / "times.json"
    if times.is_file():
        return json.loads(times.read_text())
    train_s = run(["VJepa_AUTO_V2.py", "--preset", preset, "--seed", seed, "--out_dir", run_dir, *flags])
    checkpoint = run_dir / "checkpoints" / "ckpt_final.pt"
    evaluate_s = run(["tools/evaluate.py", "--ckpt", checkpoint, "--out", run_dir, *(["--quick"] if quick else [])])
    record.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        there = record / name
        if there.exists() and (there.is_dir() or there.read_bytes() != (run_dir / name).read_bytes()):
            V.move_aside(record / name)
        shutil.copyfile(run_dir / name, record / name)
    spent = {"train_s": round(train_s, 1), "evaluate_s": round(evaluate_s, 1)}
    spent |= {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    times.write_text(json.dumps(spent))
    return spent


def summarise(evaluations):
    """{seed: evaluation.json's content} -> {figure: {"expect", "n", "mean", "std", "met", "values"}} over the seeds."""
    names = list(dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation["figures"]))
    summary = {}
    for name in names:
        rows = [evaluation["figures"][name] for evaluation in evaluations.values() if name in evaluation["figures"]]
        values = [row["value"] for row in rows if row["value"] is not None]
        summary[name] = {
            "expect": rows[0].get("expect"),
            "n": len(values),
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "met": sum(bool(row.get("passed")) for row in rows) if rows[0].get("expect") else None,
            "values": values,
        }
    return summary


def table(summary, times):
    """The summary as a Markdown table, figures with a threshold first."""
    number = "{:.3f}".format
    lines = ["| figure | threshold | mean | std | n | met |", "|---|---|---|---|---|---|"]
    for name, row in sorted(summary.items(), key=lambda item: not item[1]["expect"]):
        mean, std = (number(row[key]) if row[key] is not None else "" for key in ("mean", "std"))
        met = f"{row['met']} of {row['n']}" if row["expect"] else ""
        lines.append(f"| {name} | {row['expect'] or ''} | {mean} | {std} | {row['n']} | {met} |")
    spent = []
    for seed, value in times.items():
        train, evaluate = (f"{value[key] / 60:.1f} min" for key in ("train_s", "evaluate_s"))
        spent.append(f"seed {seed}: {train} training + {evaluate} evaluation on {value['cores']} cores")
    return "\n".join([*lines, "", f"Time: {', '.join(spent)}.", ""])


def main(argv=None):
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description="Train and evaluate the proof run over seeds.", allow_abbrev=False)
    parser.add_argument("--out", required=True, type=os.path.expanduser, help="folder of the record")
    runs = "folder of the runs themselves; default runs/<name of --out>"
    parser.add_argument("--run_dir", default="", type=os.path.expanduser, help=runs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--preset", default="proof")
    parser.add_argument("--quick", action="store_true", help="the short evaluation")
    args, flags = parser.parse_known_args(argv)
    out = Path(args.out).resolve()
    runs = Path(args.run_dir).resolve() if args.run_dir else ROOT / "runs" / out.name
    times, evaluations = {}, {}
    for seed in args.seeds:
        record = out / f"seed_{seed}"
        times[seed] = prove_seed(seed, runs / f"seed_{seed}", record, args.preset, flags, args.quick)
        evaluations[seed] = json.loads((record / "evaluation.json").read_text())
    summary = summarise(evaluations)
    V.write_report(out / "summary.json", {"seeds": args.seeds, "flags": flags, "times": times, "figures": summary})
    V.write_own(out / "summary.md", lambda handle: handle.write(f"{table(summary, times)}<!-- {V.MARK} -->\n".encode()))
    V.emit(table(summary, times) + "\n", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
