"""Train on built-in scenes and evaluate on held-out ones, once per seed, and write down what came out.

    python tools/prove.py --out records/proof --seeds 1337 1338 1339

For every seed: `VJepa_AUTO_V2.py --preset proof --seed SEED`, then `tools/evaluate.py` on its last checkpoint. Flags
that are not named here go to the training script as they are (`--steps 100 --flow_fit_clips 500`). Written under --out:

    seed_<SEED>/config.json, train.log, metrics.jsonl, evaluation.json    the record of one run
    summary.json, summary.md    every figure: threshold, mean, standard deviation and n over the seeds, how many met it

Checkpoints and pages stay in --run_dir, outside the record. A run that was interrupted goes on where it stopped; a seed
whose record is complete is not run again. Exit code 0 says that the record is complete, not that every threshold was
met.

    python tools/prove.py --out records/b --against records/a        two records, nothing is trained

Every figure that both have, over the seeds that both have complete (--seeds narrows them): both means, the mean
difference within a seed (b - a) with its 95 % interval (Student's t over seeds), and whether b is better, worse or
within noise of a. Figures of metrics.jsonl and costs per step stand beside them; comparison.json and comparison.md are
written under --out. With few seeds "within noise" says little: the half width of the interval is what a difference had
to exceed. Records of unlike evaluations are refused; unlike settings are listed, unlike amounts of training warned of.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V

RECORD = ("config.json", "train.log", "metrics.jsonl", "evaluation.json")
SEEDS = (1337, 1338, 1339)

# What is aimed at where no threshold tells: 1 more, -1 less, a text the number to be near. Learned targets make the
# losses of two settings incomparable, and a p-value or a gauge has no better side: these have none.
AIMS = {"lane_odds_error": -1, "best_of_k": -1, "retrieval_median_rank": -1, "spread_ratio": "1", "val_soon_skill": 1}
MORE = ("skill_", "probe_", "retrieval_r", "surprise_", "val_soon_skill_at_")  # beginnings of figures: more is better
CURVES = ("val_soon_skill", "val_loss_soon", "val_loss_vjepa", "val_effective_rank", "val_target_std")
APART = ("seed", "out_dir", "resume", "log_every", "ckpt_every", "keep_last", "picture", "track")
APART += ("num_workers", "worker_nice", "cuda_graph")
AMOUNT = ("steps", "batch_size", "grad_accum", "scene_mix", "scene_clips", "flow_fit_clips", "flow_fit_steps")
AMOUNT += ("flow_fit_batch", "soon_fit_steps", "soon_fit_batch")  # how much a run sees and learns


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


# -- two records


def read_json(path, lines=False):
    """A record's JSON file -> its values, a list of them where each stands in a line. UserError for a damaged one."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        raise V.UserError(f"{path}: is no JSON ({V.flat(error)}); --out and --against need whole records") from error


def complete_seeds(root, flag, seeds):
    """Complete records of a folder -> {seed: folder}, of these seeds alone where some are given. A note for what is
    incomplete; UsageError where nothing is left."""
    if not root.is_dir():
        raise V.UsageError(f"{flag} {root}: no such folder")
    found = {}
    for folder in root.glob("seed_*"):
        seed = int(folder.name[5:]) if re.fullmatch(r"seed_\d+", folder.name) else None
        if seed is None or seeds and seed not in seeds:
            continue
        lacking = [name for name in (*RECORD, "times.json") if not (folder / name).is_file()]
        if lacking:
            V.say(f"note: {folder} is left out: it has no {', '.join(lacking)}", sys.stderr)
        else:
            found[seed] = folder
    if not found:
        raise V.UsageError(f"{flag} {root}: holds no complete record (seed_<SEED>/) of the seeds asked for")
    return found


def read_record(folder):
    """The record of one seed -> {evaluation, config, curves: {figure: value}, costs: {name: value}}."""
    told, evaluation, times = (read_json(folder / f"{name}.json") for name in ("config", "evaluation", "times"))
    lines = read_json(folder / "metrics.jsonl", lines=True)
    before = {**asdict(V.VJepaAutoV2Config()), **V.merged(V.VJepaAutoV2Config, "BEFORE")}  # younger fields
    cfg = {**before, **told["config"], "commit": (told.get("commit") or "")[:12]}
    last = [line for line in lines if "val_soon_skill" in line]
    curves = {name: last[-1].get(name) for name in CURVES} if last else {}
    for line in [line for line in last if line["step"] < last[-1]["step"]][-1:]:  # before SOON's own fit
        curves[f"val_soon_skill_at_{line['step']}"] = line["val_soon_skill"]
    rates = [line["clips_per_s"] for line in lines if line.get("clips_per_s") and "phase" not in line]
    work = re.search(r"^step: (\d+) clips, ([\d.e+-]+) TFLOP", (folder / "train.log").read_text(), re.M)
    costs = {
        "TFLOP per clip": float(work[2]) / int(work[1]) if work else None,
        "s per step": cfg["batch_size"] * cfg["grad_accum"] / statistics.median(rates) if rates else None,
        "training s": times["train_s"],
        "evaluation s": times["evaluate_s"],
    }
    return dict(evaluation=evaluation, config=cfg, curves=curves, costs=costs)


def check_alike(pairs):
    """{seed: (record a, record b)}: the same scenes in the same numbers in all. UsageError that names what differs."""
    first = next(iter(pairs.values()))[0]["evaluation"]
    for seed, pair in pairs.items():
        for name, record in zip("ab", pair):
            for key in ("sizes", "seed", "data"):
                one, other = first.get(key), record["evaluation"].get(key)
                if isinstance(one, dict) and isinstance(other, dict):  # of long ones only what differs
                    unlike = [part for part in one | other if one.get(part) != other.get(part)]
                    one, other = ({part: told.get(part) for part in unlike[:2]} for told in (one, other))
                if one != other:
                    found = f"seed {seed} of {name} has the {key} {other}, the first of a {one}"
                    raise V.UsageError(f"--against: unlike evaluations (--quick in one alone?): {found}")


def unlike_settings(pairs):
    """Settings in which the records differ -> {field: (values of a, values of b)}, each over the seeds."""
    names = dict.fromkeys(name for pair in pairs.values() for record in pair for name in record["config"])
    unlike = {}
    for name in names:
        if name not in APART:
            arms = [[pair[arm]["config"].get(name) for pair in pairs.values()] for arm in (0, 1)]
            if any(value != arms[0][0] for arm in arms for value in arm):
                unlike[name] = tuple(arm[0] if arm.count(arm[0]) == len(arm) else arm for arm in arms)
    return unlike


def aim_of(name, expect):
    """What a figure should be -> 1 more, -1 less, the text of a number to be near, None unknown. expect: its threshold
    as text, '>= 0.9', '<= 0.1' or '0.45..0.55', or None."""
    if not expect:
        return AIMS.get(name, 1 if name.startswith(MORE) else None)
    if ".." in expect:
        low, high = map(float, expect.split(".."))
        return f"{(low + high) / 2:.3g}"
    return 1 if expect.startswith(">") else -1


def gain_of(value, aim):
    """How good a value is: more is better."""
    return -abs(value - float(aim)) if isinstance(aim, str) else value * aim


def student_t(freedom):
    """97.5 % quantile of Student's t: a table, from 6 degrees of freedom on its expansion about the normal."""
    known, z = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706), 1.959964
    if freedom <= len(known):
        return known[freedom - 1]
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def mean_interval(values):
    """Values of single seeds -> (mean, 95 % interval [low, high]). None in its place for a single one, and for equal
    ones but 0: figures that are counts of few scenes do agree by chance, and would look certain."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if len(values) < 2 or spread < 1e-12 < abs(mean):
        return mean, None
    half = student_t(len(values) - 1) * spread / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


def compare(name, a, b, expect):
    """A figure's values by seed, {seed: value} of both records -> one row, None where no seed has both."""
    seeds = [seed for seed in a if a[seed] is not None and b.get(seed) is not None]
    if not seeds:
        return None
    aim = aim_of(name, expect)
    ours, theirs = [b[seed] for seed in seeds], [a[seed] for seed in seeds]
    gains = [gain_of(y, aim) - gain_of(x, aim) for x, y in zip(theirs, ours)] if aim is not None else None
    shown = [-gain for gain in gains] if isinstance(aim, str) else [y - x for x, y in zip(theirs, ours)]
    difference, interval = mean_interval(shown)
    verdict, judged = "", mean_interval(gains)[1] if gains else None
    if judged:
        verdict = "better" if judged[0] > 0 else "worse" if judged[1] < 0 else "within noise"
    row = dict(aim=aim, expect=expect, n=len(seeds), a=statistics.fmean(theirs), b=statistics.fmean(ours))
    row |= dict(difference=difference, interval=interval, verdict=verdict, values_a=theirs, values_b=ours)
    return {**row, "gains": gains}


def tables_of(records):
    """{seed: record} -> ({figure: {seed: value}}, {figure: threshold as text}), evaluation's before the curves'."""
    values, expect = {}, {}
    for seed, record in records.items():
        for name, figure in record["evaluation"]["figures"].items():
            values.setdefault(name, {})[seed] = figure["value"]
            expect.setdefault(name, figure.get("expect"))
    for seed, record in records.items():
        for name, value in record["curves"].items():
            values.setdefault(name, {})[seed] = value
    return values, expect


def all_together(rows):
    """Gains of all figures, each over its deviation between seeds of one record, averaged within a seed -> (mean,
    interval): what all of them say together, which each alone is too noisy for. None without two seeds."""
    scaled = []
    for row in rows.values():
        if row["gains"] and row["n"] > 1:
            sides = [[gain_of(value, row["aim"]) for value in row[arm]] for arm in ("values_a", "values_b")]
            spread = math.sqrt(statistics.fmean(map(statistics.variance, sides)))
            if spread:
                scaled.append([gain / spread for gain in row["gains"]])
    most = max(map(len, scaled), default=0)
    scaled = [gains for gains in scaled if len(gains) == most]  # of figures that every seed has
    return mean_interval([statistics.fmean(of_seed) for of_seed in zip(*scaled)]) if scaled else None


def summary_lines(rows):
    """What the rows say together -> lines of text."""
    verdicts = [row["verdict"] for row in rows.values() if row["verdict"]]
    if not verdicts:
        return ["A single seed in common: differences without intervals, nothing is judged."]
    noise, better, worse = map(verdicts.count, ("within noise", "better", "worse"))
    lines = [
        f"{len(verdicts)} figures with a better side: {noise} within noise, {better} better, {worse} worse. At 95 % "
        f"about {0.05 * len(verdicts):.1f} of them fall outside by chance where nothing differs."
    ]
    mean, interval = all_together(rows) or (0.0, None)
    if interval:
        low, high = interval
        lines.append(
            f"All together: b lies {mean:+.2f} [{low:+.2f}, {high:+.2f}] deviations between seeds on the better side."
        )
    return lines


def short(value):
    """A number in a table's cell, a list of them, or what stands for none."""
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value)) + "]"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def comparison_table(out, against, pairs, rows, unlike):
    """Two records beside each other as Markdown text."""
    lines = [f"a: {against.name}, b: {out.name}; seeds {', '.join(map(str, pairs))}.", "", *summary_lines(rows), ""]
    lines += ["| figure | asked | a | b | b - a | 95 % | b is |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        number = "{:.3f}".format
        interval = "{:+.3f}..{:+.3f}".format(*row["interval"]) if row["interval"] else ""
        name += f", distance from {row['aim']}" if isinstance(row["aim"], str) else ""
        cells = (number(row["a"]), number(row["b"]), f"{row['difference']:+.3f}", interval, row["verdict"])
        lines.append(f"| {name} | {row['expect'] or ''} | {' | '.join(cells)} |")
    lines += ["", "| cost, mean over seeds | a | b | b / a of single seeds |", "|---|---|---|---|"]
    for name, row in cost_rows(pairs).items():
        lines.append(f"| {name} | {short(row['a'])} | {short(row['b'])} | {', '.join(map(short, row['ratios']))} |")
    lines += [
        "",
        "Losses are of learned targets: unlike settings make them incomparable. Times are those of the log, of",
    ]
    lines += ["machines that may have done other work.", "", "| unlike setting | a | b |", "|---|---|---|"]
    lines += [f"| {name} | {short(a)} | {short(b)} |" for name, (a, b) in unlike.items()]
    return "\n".join([*lines, ""])


def cost_rows(pairs):
    """{cost: {a, b: means, ratios: b / a of single seeds}} of the costs that all records have."""
    rows = {}
    for name in ("TFLOP per clip", "s per step", "training s", "evaluation s"):
        a, b = ([pair[arm]["costs"][name] for pair in pairs.values()] for arm in (0, 1))
        if all(a) and all(b):
            means = statistics.fmean(a), statistics.fmean(b)
            rows[name] = dict(a=means[0], b=means[1], ratios=[y / x for x, y in zip(a, b)])
    return rows


def compare_records(out, against, seeds):
    """Two folders of records -> comparison.json and comparison.md under `out`, printed too."""
    if out == against:
        raise V.UsageError(f"--against {against}: is --out itself; name another record")
    a, b = complete_seeds(against, "--against", seeds), complete_seeds(out, "--out", seeds)
    common = sorted(set(a) & set(b))
    if not common:
        raise V.UsageError(f"--against {against}: no seed in common (it has {sorted(a)}, --out {sorted(b)})")
    pairs = {seed: (read_record(a[seed]), read_record(b[seed])) for seed in common}
    check_alike(pairs)
    unlike = unlike_settings(pairs)
    for name in AMOUNT:
        if name in unlike:
            V.say("warning: {} differs ({} and {}): not the same training".format(name, *unlike[name]), sys.stderr)
    (values, expect), (others, _) = (tables_of({seed: pair[arm] for seed, pair in pairs.items()}) for arm in (0, 1))
    rows = {name: compare(name, values[name], others.get(name, {}), expect.get(name)) for name in values}
    rows = {name: row for name, row in rows.items() if row}
    text = comparison_table(out, against, pairs, rows, unlike)
    report = {"a": against.name, "b": out.name, "seeds": common, "summary": summary_lines(rows), "figures": rows}
    report |= {"together": all_together(rows), "costs": cost_rows(pairs), "unlike_settings": unlike}
    V.write_report(out / "comparison.json", report)
    V.write_own(out / "comparison.md", lambda handle: handle.write(f"{text}<!-- {V.MARK} -->\n".encode()))
    V.emit(text + "\n", sys.stdout)
    return 0


def main(argv=None):
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate the proof run over seeds, or compare two records.", allow_abbrev=False
    )
    parser.add_argument("--out", required=True, type=os.path.expanduser, help="folder of the record")
    runs = "folder of the runs themselves; default runs/<name of --out>"
    parser.add_argument("--run_dir", default="", type=os.path.expanduser, help=runs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help=f"default {' '.join(map(str, SEEDS))}")
    parser.add_argument("--preset", default="proof")
    parser.add_argument("--quick", action="store_true", help="the short evaluation")
    parser.add_argument("--against", default="", type=os.path.expanduser, help="another record: compare, train nothing")
    args, flags = parser.parse_known_args(argv)
    out, args.seeds = Path(args.out).resolve(), list(dict.fromkeys(args.seeds))
    if args.against:
        if flags:
            raise V.UsageError(f"--against compares what is there; {' '.join(flags)} would go to a run")
        return compare_records(out, Path(args.against).resolve(), args.seeds)
    args.seeds = args.seeds or list(SEEDS)
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
