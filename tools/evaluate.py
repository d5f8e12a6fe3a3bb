"""Measure a checkpoint: how well it forecasts, samples futures, reads the road and is surprised, beside its controls.

    python tools/evaluate.py --ckpt runs/x/checkpoints/ckpt_final.pt [--data_root DIR] [--split val|test|all] [--quick]

Without --data_root the built-in scenes are rendered, from seeds that no training reaches; scenes that fit probes and
scenes that test are never the same. Their true odds are known, so sampled futures are held against them. With
--data_root the held-out videos of the run's own split are used: point skill, retrieval, rank histogram, spread,
collapse gauges, and, where DIR/annotations/ holds signals, probes fitted on the training files.

Written under --out (default: the run's folder):

    evaluation.json    every figure: value, 95 % bootstrap interval, n, controls, threshold, whether it was met; curves
    evaluation.html    the same as one page with charts and pictures; opens from disk, needs no network

A world that predicts frames (worlds/cosmos.py) is measured on the videos of its run by tools/rollout.py, with --split
test where they have such a folder: errors of frames per step beside baselines, and a probe of the true state.

From Python: `evaluate(model, sizes, source=None, seed=0)` -> the content of evaluation.json. Needs scikit-learn (extra
`eval`). The other tools take from here what they share: progress, probes, pooling, opening a checkpoint.
"""

import os
import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as VJepa_AUTO_V2.py does, and why

import argparse
import base64
import hashlib
import html
import importlib.util
import io
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

# ---------------------------------------------------------------------------------------------------------------------
# 1  Sizes, thresholds, what every figure says
# ---------------------------------------------------------------------------------------------------------------------

EVAL_SEED = 10**16  # scene seeds from here upwards belong to evaluation
# each has a range of its own
SETS = ("fit", "forks", "signs", "brake", "steady", "lane", "occluder", "mix", "twins", "rare", "picture", "steered")
SAMPLED_NUMBERS = 2**26  # of sampled latents, held at once


@dataclass(frozen=True)
class Sizes:
    """How much is measured: scenes, samples and fitting steps."""

    fit_forks: int = 200  # fork scenes that fit spaces and probes, two siblings of each branch
    fit_clips: int = 560  # clips of every other kind that fit probes
    fork_scenes: int = 96  # test forks at odds 0.5
    siblings: int = 10  # real futures of each
    sign_scenes: int = 40  # test forks of each other odds, two siblings of each branch
    brake_scenes: int = 80  # test scenes with a lead car that may brake
    brake_siblings: int = 8  # real futures of each
    kind_scenes: int = 80  # test scenes of steady, lane and occluder, each
    mix_clips: int = 320  # test clips of the run's own mix, or of the user's videos
    twin_scenes: int = 64  # steady scenes with impossible twins, half of them with a barrier
    rare_scenes: int = 48  # forks whose rare branch comes true
    fit_videos: int = 600  # clips of training files that fit probes, with --data_root
    num_samples: int = 32  # K futures per scene
    surprise_samples: int = 512  # K of surprise: enough that a branch at odds 0.1 comes near a real one
    surprise_steps: int = 8  # Euler steps of these, since windows are many
    shuffled_steps: int = 300  # steps of the flow net that learns permuted targets
    shuffled_batch: int = 64  # clips per such step
    probe_epochs: int = 12  # epochs of the attentive probe
    components: int = 1536  # most principal components under a linear probe; at most half as many as clips
    resamples: int = 1000  # bootstrap draws
    batch: int = 32  # clips encoded at once


FULL = Sizes()
QUICK = Sizes(
    fit_forks=40,
    fit_clips=72,
    fork_scenes=32,
    siblings=6,
    sign_scenes=12,
    brake_scenes=24,
    brake_siblings=6,
    kind_scenes=24,
    mix_clips=96,
    twin_scenes=16,
    rare_scenes=12,
    fit_videos=160,
    surprise_samples=64,
    shuffled_steps=100,
    shuffled_batch=32,
    probe_epochs=8,
    resamples=400,
)

# figure -> (smallest, largest) value asked for; None leaves a side open
THRESHOLDS = {
    "branch_gate": (0.97, None),
    "fork_share": (0.45, 0.55),
    "fork_deviation": (None, 0.12),
    "between_share": (None, 0.10),
    "near_real": (0.85, None),
    "calibration_slope": (0.85, 1.15),
    "calibration_intercept": (-0.07, 0.07),
    "calibration_ece": (None, 0.06),
    "hedging": (0.8, None),
    "es_skill_point": (0.35, None),
    "es_skill_noise": (0.25, None),
    "es_vs_oracle": (None, 1.10),
    "gap_crps_ratio": (None, 1.15),
    "gap_coverage80": (0.74, 0.86),
    "steady_spread": (None, 1.5),
    "skill_persistence": (0.1, None),
    "skill_linear": (0.05, None),
    "probe_speed_r2": (0.9, None),
    "probe_lane_offset_r2": (0.8, None),
    "probe_maneuver_f1": (0.8, None),
    "surprise_teleport": (0.9, None),
    "surprise_vanish": (0.9, None),
    "surprise_pass_through": (0.9, None),
    "surprise_recolour": (0.75, None),
    "surprise_reverse": (0.75, None),
    "surprise_auroc": (0.9, None),
}
STEERED_THRESHOLDS = {  # of a model that knows actions
    "steered_entropy": (None, 0.1),
    "steered_entropy_passive": (0.8, None),
    "steered_own": (0.9, None),
    "steered_flip": (0.9, None),
    "steered_gain": (0.5, None),
    "steered_gain_shuffled": (None, 0.02),
    "steered_forecast": (0.9, None),
}
# figure -> what it says, without its verdict
READINGS = {
    "branch_gate": "Share of real SOON latents from which a linear probe names the branch of the fork: too low, and "
    "the encoder is at fault, not the sampler",
    "no_leak": "Share of even forks whose realised branch the point forecast is nearer to: NOW cannot know it, so "
    "only chance is right, and the NOW frames of all siblings must be equal bit for bit",
    "fork_share": "Share of sampled futures that turn right where right and left are equally likely: 0.5 is right",
    "fork_deviation": "How far that share lies from 0.5 in a single scene, on average: a perfect sampler shows only "
    "its binomial noise",
    "between_share": "Share of samples that stand between the two real branches, where no future lies: 0 is right",
    "near_real": "Share of samples as close to a real branch as real futures are (1.5 times their 95th percentile): 1 "
    "is right",
    "calibration_slope": "Slope of the sampled share over the true odds of the five signs: 1 means that signs are "
    "read, 0 that they are ignored",
    "calibration_intercept": "Where that line starts, 0 without a preference for one side",
    "calibration_ece": "Distance between sampled share and true odds, averaged over the signs: 0 is right",
    "hedging": "Share of even forks whose point forecast stands between the branches, as an honest median must",
    "es_skill_point": "Energy score on the branch axis, share saved against the point forecast: at most 0.5 at an "
    "even fork",
    "es_skill_noise": "The same against point forecast plus noise of the right covariance, which knows no branches",
    "es_vs_oracle": "Energy score over that of real futures of the same present: 1 is as good as reality",
    "gap_crps_ratio": "Error of the sampled distance to the lead car at the end of SOON (CRPS) over that of real "
    "futures: 1 is as good as reality",
    "gap_coverage80": "How often the true distance lies in the sampled 80 % interval: 0.8 is right, less is "
    "overconfident",
    "gap_rank_chi2": "Probability of ranks as uneven as these if truth and samples came from one law: near 0 is bad",
    "steady_spread": "Deviation of the sampled position of a steady car over the probe's own error: where nothing is "
    "open, samples must agree",
    "skill_persistence": "Error saved against a world that stands still, on the fifth of the tokens that moves most, "
    "from the second SOON tubelet on",
    "skill_linear": "Error saved against going on in a straight line through latent space, on the same tokens",
    "skill_persistence_all": "Error saved against a world that stands still, on all SOON tokens",
    "skill_linear_all": "Error saved against linear extrapolation, on all SOON tokens",
    "retrieval_r1": "Share of clips whose own future is the nearest of all candidates to the point forecast",
    "retrieval_r5": "Share of clips whose own future is among the five nearest candidates",
    "retrieval_median_rank": "Median rank of the own future among all candidates, 1 is best",
    "best_of_k": "Error of the best of all K samples over that of the point forecast: below the same figure of mean + "
    "noise, samples go where futures go",
    "spread_ratio": "Deviation among sampled futures over the deviation of real futures from the point forecast: 1 is "
    "right, 0 means one mode",
    "pooled_rank_chi2": "Probability of ranks as uneven as these in pooled latent space if truth and samples came "
    "from one law: near 0 is bad",
    "effective_rank": "exp(entropy) of the singular values of target tokens: 1 means collapse",
    "target_std": "Deviation of target channels over all tokens: near 0 means collapse",
    "lane_odds_error": "Distance between the sampled shares of left, keep and right and the odds of the indicator "
    "shown: 0 is right",
    "occluder_stops": "Share of samples in which the car stops behind the truck",
    "probe_branch_accuracy": "Share of forks whose branch a frozen linear probe names from NOW and SOON latents",
    "probe_maneuver_f1": "Macro-F1 of a frozen linear probe of the maneuver on NOW and SOON latents",
    "surprise_auroc": "How well surprise (nearest of K samples) tells impossible clips from legal but rare branches, "
    "which it must not flag: 0.5 is chance",
    "surprise_auroc_matched": "The same when every clip is measured against another future of its own present, so "
    "that kinds of scenes do not matter",
    "steered_entropy": "Bits that the branch of sampled futures leaves open at a fork that the own steering decides, "
    "with the true actions: 0 is right",
    "steered_entropy_passive": "The same without actions: NOW says nothing, so 1 bit is right",
    "steered_own": "Share of futures sampled with the true actions that take the branch driven: 1 is right",
    "steered_flip": "Share of clips whose samples mostly take the branch driven with the true actions, and the other "
    "one with those of the other branch: 1 is right",
    "steered_gain": "Energy score on the branch axis, share saved by the true actions against none: 1 is right",
    "steered_gain_shuffled": "The same with the actions of other scenes, half of which took the other branch: they "
    "must save nothing",
    "steered_forecast": "Share of clips whose point forecast, told the true actions, is nearer to the branch driven",
}
# control -> figures made to catch it; it must fail at least one of them
CONTROL_TESTS = {
    "untrained encoder": (
        *("skill_persistence", "skill_linear", "fork_share", "fork_deviation", "calibration_slope"),
        *("es_skill_point", "es_vs_oracle"),
    ),
    "shuffled targets": ("calibration_slope", "calibration_ece", "near_real", "between_share", "es_vs_oracle"),
    "mean + noise": ("between_share", "near_real", "es_vs_oracle"),
}
SIGNALS = tuple(name for name in V.SIGNALS if name != "accel")  # per-frame signals that probes read at the end of SOON


def expectation(limits):
    """(low, high) -> '>= 0.9', '<= 0.1' or '0.45..0.55'."""
    low, high = limits
    if low is None:
        return f"<= {high:g}"
    return f">= {low:g}" if high is None else f"{low:.3g}..{high:.3g}"


def meets(value, limits):
    """Whether a value lies within (low, high); None for no value."""
    if value is None or not math.isfinite(value):
        return None
    low, high = limits
    return bool((low is None or value >= low) and (high is None or value <= high))


def reading_of(name):
    """What a figure says, without its verdict."""
    if name in READINGS:
        return READINGS[name]
    if name.startswith("surprise_"):
        twin = name[9:].replace("_", " ")
        return (
            f"Accuracy at telling an impossible from the possible future of one present, twin '{twin}': 0.5 is chance"
        )
    return f"R2 of a frozen linear probe of {name[6:-3].replace('_', ' ')} on NOW and SOON latents: 1 is perfect"


def make_figure(name, value, interval=None, n=0, controls=None, limits=None, also=None, reading=""):
    """One entry of evaluation.json: a value with all that is needed to judge it. also: other facts beside it; reading:
    what it says, where READINGS has no such name."""
    limits = limits or THRESHOLDS.get(name)
    value = None if value is None or not math.isfinite(value) else float(value)
    passed = meets(value, limits) if limits else None
    if value is None:
        verdict = "not measurable here"
    elif limits is None:
        verdict = f"{value:.3g} here, to be read beside its controls"
    else:
        verdict = f"{value:.3g} is {'good' if passed else 'not good enough'}, {expectation(limits)} is asked for"
    return {
        "value": value,
        "interval": interval,
        "n": int(n),
        "controls": controls or {},
        "expect": expectation(limits) if limits else None,
        "passed": passed,
        "reading": f"{reading or reading_of(name)}; {verdict}.",
        **(also or {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# 2  Scores: arrays -> numbers
# ---------------------------------------------------------------------------------------------------------------------


def ratio(part, whole):
    """part / whole, NaN where whole is 0."""
    return float(part) / float(whole) if whole else math.nan


def bootstrap(table, statistic, groups=None, num=1000, seed=0):
    """95 % interval of statistic(rows) under resampling of rows [n, ...], or of groups [n] -> [low, high], or None."""
    table, rng = np.asarray(table), np.random.default_rng(seed)
    names = np.zeros(0) if groups is None else np.unique(groups)
    members = None  # of groups with more than one row each
    if len(names) not in (0, len(table)):
        members = [np.flatnonzero(groups == name) for name in names]
    count = len(table) if members is None else len(members)
    if count < 2:
        return None
    values = []
    for _ in range(num):
        drawn = rng.integers(0, count, count)
        values.append(statistic(table[drawn if members is None else np.concatenate([members[i] for i in drawn])]))
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return [float(v) for v in np.quantile(values, (0.025, 0.975))] if len(values) else None


def measured(name, rows, statistic, controls, resamples, groups=None, **more):
    """A statistic of rows [n, ...] as a figure with its interval -> {name: figure}. more: as for make_figure."""
    interval = bootstrap(rows, statistic, groups, resamples)
    return {name: make_figure(name, statistic(rows), interval, len(rows), controls, **more)}


def energy_score(samples, truth, fair=True):
    """Energy score per row (Gneiting and Raftery 2007), the CRPS at d = 1: samples [n, K, d], truth [n, d] -> [n].

    Lower is better. fair: the mean distance between samples is taken over pairs of different ones, so that K does not
    matter on average.
    """
    K = samples.shape[1]
    error = np.linalg.norm(samples - truth[:, None], axis=-1).mean(1)
    if K == 1:
        return error
    apart = np.linalg.norm(samples[:, :, None] - samples[:, None], axis=-1).sum((1, 2))
    return error - 0.5 * apart / (K * (K - 1) if fair else K * K)


def score_against(samples, truths):
    """Mean fair energy score of one set of samples [K, d] against several truths [n, d] -> float."""
    return float(energy_score(np.broadcast_to(samples, (len(truths), *samples.shape)), truths).mean())


def oracle_score(real):
    """Mean fair energy score of real futures [n, d], each one scored by all others -> float, NaN below three."""
    if len(real) < 3:
        return math.nan
    return float(np.mean([energy_score(np.delete(real, i, 0)[None], real[i : i + 1])[0] for i in range(len(real))]))


def branch_coordinate(points, left, right):
    """Place on the line between two branch means, 0 left and 1 right: points [..., d], left, right [d] -> [...]."""
    axis = right - left
    return (points - left) @ axis / max(axis @ axis, 1e-30)


def branch_distance(points, left, right):
    """Distance to the nearer branch mean: points [..., d] -> [...]."""
    return np.minimum(np.linalg.norm(points - left, axis=-1), np.linalg.norm(points - right, axis=-1))


def real_radii(real, side):
    """Distance of each real future [n, d] to the mean of the others on its side (-1, 1) -> [m], less sides with one."""
    radii = []
    for which in (-1, 1):
        own = real[side == which]
        if len(own) > 1:
            radii.append(np.linalg.norm(own - own.mean(0), axis=1) * len(own) / (len(own) - 1))
    return np.concatenate(radii) if radii else np.zeros(0)


def binomial_deviation(K):
    """Mean |share - 0.5| of a perfect sampler with K draws at even odds."""
    return sum(math.comb(K, k) * abs(k / K - 0.5) for k in range(K + 1)) / 2**K


def binary_entropy(share):
    """Bits of a choice between two, of shares [n] in 0 to 1 -> [n]."""
    share = np.clip(share, 1e-12, 1 - 1e-12)
    return -share * np.log2(share) - (1 - share) * np.log2(1 - share)


def calibration(share, odds):
    """Sampled shares [n] against true odds [n] -> (slope, intercept, ece). The odds themselves are the bins of the ece:
    a sampler that always says 0.5 would look calibrated in bins of its own predictions."""
    if len(np.unique(odds)) < 2:
        return math.nan, math.nan, math.nan
    slope, intercept = np.polyfit(odds, share, 1)
    ece = np.mean([abs(share[odds == p].mean() - p) for p in np.unique(odds)])
    return float(slope), float(intercept), float(ece)


def coverage(samples, truth, level=0.8):
    """Whether truth [n] lies in the central interval of samples [n, K] -> bool [n]. Weibull: exact for the same law."""
    low, high = np.quantile(samples, ((1 - level) / 2, (1 + level) / 2), axis=1, method="weibull")
    return (truth >= low) & (truth <= high)


def truth_ranks(samples, truth, seed=0):
    """How many of the samples [n, K] lie below truth [n], ties split at random -> int [n] in 0..K."""
    below, ties = (samples < truth[:, None]).sum(1), (samples == truth[:, None]).sum(1)
    return below + np.random.default_rng(seed).integers(0, ties + 1)


def rank_test(ranks, K, num_bins=11):
    """Ranks in 0..K -> (share per bin, chi-squared probability of such unevenness if all ranks are equally likely)."""
    from scipy.stats import chi2

    edges = np.linspace(0, K + 1, min(num_bins, K + 1) + 1) - 0.5
    counts = np.histogram(ranks, edges)[0]
    expected = np.histogram(np.arange(K + 1), edges)[0] / (K + 1) * len(ranks)
    uneven = ((counts - expected) ** 2 / np.maximum(expected, 1e-12)).sum()
    return counts / max(len(ranks), 1), float(chi2.sf(uneven, len(counts) - 1))


def best_of(distances, ks):
    """Expected smallest of k out of K distances [n, K], exact over all choices -> [n, len(ks)]."""
    ordered, K = np.sort(distances, 1), distances.shape[1]
    weights = np.array([[math.comb(K - 1 - i, k - 1) / math.comb(K, k) for k in ks] for i in range(K)])
    return ordered @ weights


def auroc(positive, negative):
    """Probability that a positive scores above a negative, ties count half. [n], [m] -> float."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean()) if difference.size else math.nan


def pair_accuracy(impossible, possible):
    """1 where the impossible twin scores above the possible one, 0.5 for a tie: [n], [n] -> [n]."""
    return (impossible > possible) + 0.5 * (impossible == possible)


def retrieval_ranks(queries, candidates):
    """Rank of candidate i for query i by L1 distance, 1 = nearest, ties count half: [n, d], [n, d] -> [n]."""
    ranks = []
    for i, query in enumerate(queries):
        distance = np.abs(candidates - query).mean(1)
        ranks.append(1 + (distance < distance[i]).sum() + 0.5 * ((distance == distance[i]).sum() - 1))
    return np.asarray(ranks, float)


def r2(rows):
    """Coefficient of determination of rows [n, 2] = (truth, prediction)."""
    truth, pred = rows[:, 0], rows[:, 1]
    return 1 - ratio(((truth - pred) ** 2).sum(), ((truth - truth.mean()) ** 2).sum())


def f1(rows, c):
    """F1 of one class: rows [n, 2] = (truth, prediction)."""
    truth, pred = rows[:, 0] == c, rows[:, 1] == c
    return 2 * (truth & pred).sum() / max(truth.sum() + pred.sum(), 1)


def macro_f1(rows):
    """Mean F1 over the classes that truth names: rows [n, 2] = (truth, prediction)."""
    return float(np.mean([f1(rows, c) for c in np.unique(rows[:, 0])]))


def accuracy(rows):
    """Share of rows [n, 2] whose two entries agree."""
    return float((rows[:, 0] == rows[:, 1]).mean())


def mean_ratio(rows):
    """Sum of the first over sum of the second column."""
    return ratio(rows[:, 0].sum(), rows[:, 1].sum())


def rms_ratio(rows):
    """Root of mean_ratio: of squares, a ratio of deviations."""
    return math.sqrt(mean_ratio(rows))


def saved(rows):
    """1 - mean_ratio: the share of an error that is saved against a reference, a ratio of means."""
    return 1 - mean_ratio(rows)


# ---------------------------------------------------------------------------------------------------------------------
# 3  Fork tests: readings of scenes -> figures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """One present in a space of d numbers: real futures [n, d], point forecast [d], sampled futures by name [K, d]."""

    odds: float  # true probability of the right branch, 0 where there is no fork
    real: np.ndarray
    side: np.ndarray  # -1 or 1 per real future, 0 without a fork
    natural: int  # the first so many real futures were drawn with the true odds
    point: np.ndarray
    samples: dict
    truth: list = field(default_factory=list)  # labels of the real futures
    same_now: bool = True  # NOW frames of all real futures are equal bit for bit

    def forked(self):
        """Whether each branch has two real futures, what every fork test needs."""
        return min((self.side == -1).sum(), (self.side == 1).sum()) > 1

    def ends(self):
        """Means of the two branches -> (left [d], right [d])."""
        return self.real[self.side == -1].mean(0), self.real[self.side == 1].mean(0)


def choose(readings, columns):
    """The same readings in some of their d numbers: columns is a slice -> [Reading]."""
    chosen = []
    for r in readings:
        samples = {name: s[:, columns] for name, s in r.samples.items()}
        chosen.append(replace(r, real=r.real[:, columns], point=r.point[columns], samples=samples))
    return chosen


FORK_COLUMNS = "odds share between near point picked es es_point es_noise es_oracle real_between real_near".split()
REFERENCES = ("point", "noise", "oracle")  # of the energy score


def fork_row(r, variant, radius):
    """What the fork tests take from one scene -> numbers in the order of FORK_COLUMNS."""
    ends, samples, noise = r.ends(), r.samples[variant], r.samples["mean + noise"]
    place, real, point, noise = (branch_coordinate(points, *ends) for points in (samples, r.real, r.point, noise))
    natural, scores = real[: r.natural, None], [math.nan] * 4
    if r.natural > 2:
        scores = [score_against(np.reshape(x, (-1, 1)), natural) for x in (place, point, noise)]
        scores.append(oracle_score(natural))
    between, real_between = (((x > 0.25) & (x < 0.75)).mean() for x in (place, real))
    near, real_near = ((x <= radius).mean() for x in (branch_distance(samples, *ends), real_radii(r.real, r.side)))
    picked = (point > 0.5) == (r.side[0] > 0)
    return r.odds, (place > 0.5).mean(), between, near, point, picked, *scores, real_between, real_near


def near_radius(forks):
    """How far from a branch a sample still counts as near: 1.5 times what 95 % of real futures keep. NaN for none."""
    return 1.5 * np.quantile(np.concatenate([real_radii(r.real, r.side) for r in forks]), 0.95) if forks else math.nan


def branch_scale(readings):
    """What near_real measures with, medians over even forks in units of the scatter of real futures within a branch:
    radius of near, distance of a sample to the nearer branch, distance between the branches -> dict."""
    forks = [r for r in readings if r.forked()]
    even = [r for r in forks if r.odds == 0.5]
    distances = [np.median(branch_distance(r.samples["model"], *r.ends())) for r in even]
    apart = [np.linalg.norm(np.subtract(*r.ends())) for r in even]
    scale = {"radius": near_radius(forks), "sample_distance": np.median(distances), "branch_distance": np.median(apart)}
    return {name: float(value) for name, value in scale.items()}


def fork_rows(readings, variant):
    """Per fork: odds, shares of samples right, between, near, place of the forecast, energy scores -> {column: [n]}."""
    usable = [r for r in readings if r.forked()]
    radius = near_radius(usable)
    rows = np.asarray([fork_row(r, variant, radius) for r in usable], float)
    return dict(zip(FORK_COLUMNS, rows.reshape(len(usable), len(FORK_COLUMNS)).T))


def calibrated(column, rows):
    """One of (slope, intercept, ece) of rows [n, 2] = (share, odds)."""
    return calibration(rows[:, 0], rows[:, 1])[column]


def fork_scores(readings, variant, resamples=1000):
    """Readings in branch space -> {figure: (value, interval, n)} of one kind of samples."""
    rows = fork_rows(readings, variant)
    if not len(rows["odds"]):
        return {}
    even, pairs = rows["odds"] == 0.5, np.stack([rows["share"], rows["odds"]], 1)
    scored = even & np.isfinite(rows["es_oracle"])
    point, noise, oracle = (np.stack([rows["es"], rows[f"es_{name}"]], 1)[scored] for name in REFERENCES)
    tests = {
        "fork_share": (rows["share"][even], np.mean),
        "fork_deviation": (abs(rows["share"] - 0.5)[even], np.mean),
        "between_share": (rows["between"][even], np.mean),
        "near_real": (rows["near"][even], np.mean),
        "hedging": (((rows["point"] >= 0.25) & (rows["point"] <= 0.75))[even], np.mean),
        "es_skill_point": (point, saved),
        "es_skill_noise": (noise, saved),
        "es_vs_oracle": (oracle, mean_ratio),
        "calibration_slope": (pairs, partial(calibrated, 0)),
        "calibration_intercept": (pairs, partial(calibrated, 1)),
        "calibration_ece": (pairs, partial(calibrated, 2)),
    }
    scores = {}
    for name, (table, statistic) in tests.items():
        value = statistic(table) if len(table) else math.nan
        scores[name] = value, bootstrap(table, statistic, num=resamples), len(table)
    return scores


def real_scores(rows, num_samples):
    """What real futures would score in the fork tests, the best that can be asked -> {figure: value}."""
    even = rows["odds"] == 0.5
    oracle, point, noise = (np.nansum(rows[name][even]) for name in ("es_oracle", "es_point", "es_noise"))
    scores = {"fork_deviation": binomial_deviation(num_samples)}
    scores |= {"es_skill_point": 1 - ratio(oracle, point), "es_skill_noise": 1 - ratio(oracle, noise)}
    if even.any():
        scores |= {"between_share": rows["real_between"][even].mean(), "near_real": rows["real_near"][even].mean()}
    return scores


def fork_figures(readings, sizes, controls):
    """Figures of the fork tests: the model's own samples, each beside the same test of the control samples -> dict.

    controls: {name: readings or None}; None takes the samples of that name from the model's readings.
    """
    others = {name: fork_scores(own or readings, "model" if own else name, 2) for name, own in controls.items()}
    rows, figures = fork_rows(readings, "model"), {}
    even, best = rows["odds"] == 0.5, real_scores(rows, sizes.num_samples)
    for name, (value, interval, n) in fork_scores(readings, "model", sizes.resamples).items():
        beside = {control: scores[name][0] for control, scores in others.items() if name in scores}
        beside |= {"perfect sampler": best[name]} if name in best else {}
        figures[name] = make_figure(name, value, interval, n, beside)
    if even.any():
        figures["near_real"] |= branch_scale(readings)
        picked, band = rows["picked"][even], 3 * math.sqrt(0.25 / even.sum())
        same, limits = all(r.same_now for r in readings), (0.5 - band, 0.5 + band)
        more = dict(limits=limits, also={"now_frames_equal": same})
        figures |= measured("no_leak", picked, np.mean, {"chance": 0.5}, sizes.resamples, **more)
        figures["no_leak"]["passed"] &= same
    return figures


def fork_curves(readings, names):
    """What the charts of the fork tests show -> dict of plain lists."""
    rows, bins = fork_rows(readings, "model"), np.linspace(-0.5, 1.5, 41)
    if not len(rows["odds"]):
        return {}
    odds = np.unique(rows["odds"])
    alike = [rows["odds"] == p for p in odds]
    told = {
        "odds": odds.tolist(),
        "share": [float(rows["share"][here].mean()) for here in alike],
        "std": [float(rows["share"][here].std()) for here in alike],
        "n": [int(here.sum()) for here in alike],
        "point": [float(np.median(rows["point"][here])) for here in alike],
    }
    places = {name: [] for name in ("real futures", *names, "point forecast")}
    for r in readings:
        if r.odds == 0.5 and r.forked():
            shown = {"real futures": r.real, "point forecast": r.point[None], **r.samples}
            for name, found in places.items():
                found.append(branch_coordinate(shown[name], *r.ends()))
    histogram = {"edges": bins.tolist()}
    for name, values in places.items():
        if values:
            counts = np.histogram(np.clip(np.concatenate(values), -0.5, 1.5), bins)[0]
            histogram[name] = (counts / counts.sum()).tolist()
    return {"calibration": told, "branch_coordinate": histogram}


# ---------------------------------------------------------------------------------------------------------------------
# 4  Probes: latents and labels -> linear read-outs
# ---------------------------------------------------------------------------------------------------------------------


class Principal:
    """Leading principal directions of rows [n, R], by the Gram matrix: R may be large. Scores have mean square 1."""

    def __init__(self, rows, rank, centre=True):
        rank = max(rank, 1)
        rows = torch.as_tensor(rows).float()
        self.mean = rows.mean(0) if centre else torch.zeros(rows.shape[1])
        centred = rows - self.mean
        values, vectors = torch.linalg.eigh((centred @ centred.T).double())
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        solid = values > 1e-9 * values[0].clamp_min(1e-30)
        self.basis = centred.T @ (vectors[:, solid] * values[solid].rsqrt()).float()  # [R, k] orthonormal
        self.scale = float((values[solid].sum() / max(len(rows), 1) / max(int(solid.sum()), 1)).clamp_min(1e-30).sqrt())

    def scores(self, rows):
        """Rows [n, R] -> float64 [n, k]."""
        return (((torch.as_tensor(rows).float() - self.mean) @ self.basis) / self.scale).double().numpy()

    def pull_back(self, weight, bias):
        """A linear map of scores, weight [k, d] and bias [d], as one of rows -> (weight [R, d], bias [d])."""
        weight = self.basis @ torch.as_tensor(weight).float() / self.scale
        return weight, torch.as_tensor(bias).float() - self.mean @ weight


def fit_ridge(scores, columns):
    """Ridge regressions, the strength of each chosen by leave-one-out error: scores [n, k], columns {name: values [n],
    NaN unknown} -> {name: (weight [k, 1], bias [1])}, less names with fewer than 8 known values. Names known on the
    same rows share one decomposition."""
    from sklearn.linear_model import RidgeCV

    fitted, alike = {}, {}
    for name, values in columns.items():
        alike.setdefault(np.isfinite(values).tobytes(), []).append(name)
    for names in alike.values():
        known = np.isfinite(columns[names[0]])
        if known.sum() >= 8:
            mode = "svd" if known.sum() > scores.shape[1] else "auto"  # auto takes 1.5 to 2.3 times as long
            ridge = RidgeCV(alphas=np.logspace(-2, 5, 15), alpha_per_target=True, gcv_mode=mode)
            ridge.fit(scores[known], np.stack([columns[name][known] for name in names], 1))
            for name, weight, bias in zip(names, np.atleast_2d(ridge.coef_), np.atleast_1d(ridge.intercept_)):
                fitted[name] = weight[:, None], np.array([bias])
    return fitted


def fit_logistic(scores, classes, groups, num_classes):
    """Logistic regression, its strength chosen on a fifth of the groups: scores [n, k], classes [n], -1 unknown ->
    (weight [k, c], bias [c]). The largest of the c outputs names the class, never one that no row has."""
    from sklearn.linear_model import LogisticRegression

    scores, known = scores.astype(np.float32), classes >= 0  # less time, the same classes
    if len(np.unique(classes[known])) < 2:
        return None
    held = known & (np.random.default_rng(0).permutation(int(groups.max()) + 1)[groups] % 5 == 0)
    inner, chosen = known & ~held, 0.1
    if held.any() and len(np.unique(classes[inner])) > 1:
        tried = [LogisticRegression(C=C, max_iter=3000) for C in (0.001, 0.01, 0.1, 1.0)]
        fits = [fit.fit(scores[inner], classes[inner]) for fit in tried]
        chosen = max(fits, key=lambda fit: fit.score(scores[held], classes[held])).C
    fitted = LogisticRegression(C=chosen, max_iter=3000).fit(scores[known], classes[known])
    weight, bias = np.zeros((scores.shape[1], num_classes)), np.full(num_classes, -1e6)
    if len(fitted.classes_) == 2:  # one column in scikit-learn: the second class against the first
        weight[:, fitted.classes_[1]], bias[fitted.classes_] = fitted.coef_[0], (0.0, fitted.intercept_[0])
    else:
        weight[:, fitted.classes_], bias[fitted.classes_] = fitted.coef_.T, fitted.intercept_
    return weight, bias


@dataclass
class Tasks:
    """What probes read: values, NaN unknown; classes, -1 unknown, and how many there are; groups: scene or file [n]."""

    values: dict
    classes: dict
    num_classes: dict
    groups: np.ndarray

    def names(self):
        return [*self.values, *self.classes]

    def rows(self, task, pred):
        """Known (truth, prediction) rows [m, 2] of a task and the groups they belong to."""
        truth = self.values.get(task, self.classes.get(task)).astype(float)
        known = np.isfinite(truth) if task in self.values else truth >= 0
        return np.stack([truth[known], np.asarray(pred, float)[known]], 1), self.groups[known]

    def pick(self, names, rows=slice(None)):
        """Some of the tasks, on some rows -> Tasks."""
        values = {name: column[rows] for name, column in self.values.items() if name in names}
        classes = {name: column[rows] for name, column in self.classes.items() if name in names}
        return replace(self, values=values, classes=classes, groups=self.groups[rows])

    def shuffled(self, seed):
        """The same labels dealt to other clips: what a probe finds here is luck. Unknown ones stay unknown."""
        rng, dealt = np.random.default_rng(seed), []
        for labels in (self.values, self.classes):
            dealt.append({name: column.copy() for name, column in labels.items()})
            for column in dealt[-1].values():
                known = np.flatnonzero(np.isfinite(column) if column.dtype.kind == "f" else column >= 0)
                column[known] = column[rng.permutation(known)]
        return replace(self, values=dealt[0], classes=dealt[1])


def fit_probes(rows, tasks, rank, space=None):
    """One linear probe per task on principal components of rows [n, R] (`space`, where they are known already)
    -> {task: (weight [R, c], bias [c])}; tasks without labels are left out."""
    space = space or Principal(rows, min(rank, len(rows) // 2))
    scores = space.scores(rows)
    probes = fit_ridge(scores, tasks.values)
    for name, classes in tasks.classes.items():
        probes[name] = fit_logistic(scores, classes, tasks.groups, tasks.num_classes[name])
    return {name: space.pull_back(*fitted) for name, fitted in probes.items() if fitted is not None}


def predict(probes, rows, tasks):
    """Probes on rows [n, R] -> {task: values or class numbers [n]}."""
    rows = torch.as_tensor(rows).float()
    outputs = {name: (rows @ weight + bias).numpy() for name, (weight, bias) in probes.items()}
    return {name: out[:, 0] if name in tasks.values else out.argmax(1) for name, out in outputs.items()}


class AttentiveProbe(nn.Module):
    """Cross-attention from queries [Q, D], one per task, then a linear head each: V-JEPA's probe with one block."""

    def __init__(self, queries, widths, num_heads):
        super().__init__()
        dim = queries.shape[1]
        self.queries, self.norm_tokens, self.norm = nn.Parameter(queries), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross, self.mlp = V.CrossAttention(dim, dim, num_heads), V.MLP(dim, 4 * dim)
        self.heads = nn.ModuleList(nn.Linear(dim, width) for width in widths)

    def forward(self, tokens):
        """tokens [B, L, D] -> list of [B, width]."""
        x = self.queries.expand(len(tokens), -1, -1)  # [B, tasks, D]
        x = x + self.cross(x, *self.cross.project(self.norm_tokens(tokens)))
        x = x + self.mlp(self.norm(x))
        return [head(x[:, task]) for task, head in enumerate(self.heads)]


def new_probe(dim, widths):
    """An attentive probe for tokens of `dim` channels, with sharp first queries."""
    num_heads = max(h for h in range(1, max(dim // 32, 1) + 1) if dim % h == 0)
    probe = AttentiveProbe(torch.randn(len(widths), dim), widths, num_heads)
    for linear in (probe.cross.q, probe.cross.kv, probe.cross.proj):
        nn.init.trunc_normal_(linear.weight, std=dim**-0.5)
    return probe


def attentive_loss(outputs, labels, scales):
    """Sum over tasks: squared error in units of the deviation, or cross-entropy; unknown labels count nothing."""
    total = outputs[0].new_zeros(())
    for out, label, scale in zip(outputs, labels, scales):
        if scale is None:
            loss, known = F.cross_entropy(out, label, ignore_index=-1, reduction="sum"), label >= 0
        else:
            known = torch.isfinite(label)
            loss = (out[:, 0] - (torch.nan_to_num(label) - scale[0]) / scale[1])[known].square().sum()
        total = total + loss / known.sum().clamp_min(1)
    return total


def cosine_lr(peak, step, num_steps):
    """Learning rate of the small fits: twenty steps of warm-up, then half a cosine."""
    return peak / 2 * (1 + math.cos(math.pi * step / num_steps)) * min(1.0, (step + 1) / 20)


def attentive_predictions(tokens, tasks, test_tokens, epochs, device, seed=0):
    """Train an attentive probe of all tasks on tokens [n, L, D], apply it to test tokens -> {task: predictions}."""
    names = [name for name in tasks.names() if name in tasks.classes or np.isfinite(tasks.values[name]).sum() > 7]
    values = {name: torch.as_tensor(tasks.values[name]).float().to(device) for name in names if name in tasks.values}
    labels = [values[name] if name in values else torch.as_tensor(tasks.classes[name]).to(device) for name in names]
    scales = [
        (values[name].nanmean(), values[name][~values[name].isnan()].std().clamp_min(1e-6)) if name in values else None
        for name in names
    ]
    torch.manual_seed(seed)
    widths = [1 if name in values else tasks.num_classes[name] for name in names]
    probe = new_probe(tokens.shape[-1], widths).to(device)
    size, rng = min(32, len(tokens)), torch.Generator().manual_seed(seed)
    steps = epochs * (len(tokens) // size)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine_lr(4e-3, step, steps)
        drawn = torch.randint(len(tokens), (size,), generator=rng)
        outputs = probe(tokens[drawn].to(device).float())
        loss = attentive_loss(outputs, [label[drawn.to(device)] for label in labels], scales)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        parts = [probe(part.to(device).float()) for part in test_tokens.split(64)]
    found = {}
    for name, column, scale in zip(names, zip(*parts), scales):
        out = torch.cat(column).cpu()
        found[name] = (out[:, 0] * scale[1].cpu() + scale[0].cpu() if scale else out.argmax(1)).numpy()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 5  Clips: held-out scenes or videos -> frames and labels
# ---------------------------------------------------------------------------------------------------------------------


class Bar:
    """Progress on stderr: a line that rewrites itself on a terminal, elsewhere the last word. Silent when `quiet`."""

    def __init__(self, quiet=False):
        self.quiet, self.began, self.width = quiet, time.perf_counter(), 0

    @property
    def seconds(self):
        return time.perf_counter() - self.began

    def show(self, share, text):
        """Rewrite the line."""
        if not self.quiet and V.is_terminal(sys.stderr):
            line = V.progress_bar(share, text)
            V.emit("\r" + line.ljust(self.width), sys.stderr)
            self.width = len(line)

    def close(self, text=""):
        """Leave the line empty, then say a last word."""
        if self.width:
            V.emit("\r" + " " * self.width + "\r", sys.stderr)
            self.width = 0
        if text and not self.quiet:
            V.say(text, sys.stderr)


def counted(things, name):
    """Things of a list, one by one, with a bar meanwhile and their number at the end -> generator."""
    bar = Bar()
    for done, thing in enumerate(things, 1):
        yield thing
        bar.show(done / len(things), f"{done}/{len(things)} {name}")
    bar.close(f"{name}: {len(things)}")


class Progress(Bar):
    """A Bar of several stages; where no bar can be shown, each begins with a plain line."""

    def stage(self, name, total=1):
        """Begin a stage of `total` parts."""
        self.name, self.total, self.done = name, max(total, 1), 0
        if not V.is_terminal(sys.stderr):
            self.close(f"{self.seconds:6.0f} s  {name}")
        self.step(0)

    def step(self, count=1):
        """Count parts of the stage."""
        self.done += count
        self.show(self.done / self.total, f"{self.done}/{self.total} {self.name} ({self.seconds:.0f} s)")


def as_frames(frames):
    """The decoder's uint8 [T, H, W, 3] -> tensor [T, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


@dataclass(frozen=True)
class Job:
    """One clip to render."""

    scene_seed: int
    future_seed: int
    kind: str = ""
    twin: str = ""


def set_seed(seed, name, number):
    """Scene seed `number` of a set: no two sets, nor any training, share one."""
    return EVAL_SEED + seed * 10**12 + SETS.index(name) * 10**9 + number


def future_of(job, cfg):
    """What happens after NOW in a job, without drawing it -> dict with choice, brake_at, stops."""
    return V.draw_future(V.draw_scene(job.scene_seed, cfg, job.kind), job.future_seed, job.scene_seed)[0]


def futures_where(scene_seed, cfg, kind, key, value, count, most=400):
    """Future seeds in which key has this value, the first `count` of them -> list, shorter when `most` hold no more."""
    found, scene = [], V.draw_scene(scene_seed, cfg, kind)
    for future_seed in range(most):
        if len(found) < count and V.draw_future(scene, future_seed, scene_seed)[0][key] == value:
            found.append(future_seed)
    return found


def both_branches(scene_seed, cfg):
    """Future seeds of a fork, two to the left and two to the right -> list."""
    return [s for side in (-1, 1) for s in futures_where(scene_seed, cfg, "fork", "choice", side, 2)]


def fork_seeds(seed, name, cfg, odds, count):
    """Scene seeds of a set whose fork has these odds -> list of `count`."""
    found, number = [], 0
    while len(found) < count:
        scene_seed, number = set_seed(seed, name, number), number + 1
        if V.scene_odds(scene_seed, cfg, "fork")["right"] == odds:
            found.append(scene_seed)
    return found


def scene_pictures(job, cfg, drive=None):
    """Render a job in the size that the model sees -> (frames uint8 [T, 3, H, W], labels). Scenes of runs that learned
    from files are drawn in the files' size and averaged down, as a decoder does; those of runs that rendered as is.
    drive: as for V.scene."""
    drawn = cfg if cfg.scenes == "files" else replace(cfg, scene_size=0)
    frames, labels = V.scene(job.scene_seed, job.future_seed, drawn, job.kind, job.twin, drive)
    clip = as_frames(frames)
    if clip.shape[-2:] != (cfg.height, cfg.width):
        clip = F.interpolate(clip.float(), size=(cfg.height, cfg.width), mode="area").round().byte()
    labels["stops"] = bool(future_of(job, cfg)["stops"])
    return clip, labels


class SceneJobs(torch.utils.data.Dataset):
    """Rendered jobs."""

    def __init__(self, jobs, cfg):
        self.jobs, self.cfg = jobs, cfg

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, index):
        return scene_pictures(self.jobs[index], self.cfg)


def timed_annotation(annotation, video, plan):
    """Per-frame signals of an annotation at the times of a clip's frames -> dict of lists [T] and the maneuver."""
    labels = {"maneuver": str(annotation.get("maneuver", ""))}
    try:
        V.check_annotation({**annotation})
        signals = V.timed_signals(annotation, video, V.fit_plan(plan, video, annotation), SIGNALS)
    except ValueError as error:
        raise V.UserError(f"annotation of {video.name}: {error}") from error
    except V.BadFile as error:
        raise V.UserError(f"annotation of {video.name}: the times of its video cannot be read ({error})") from error
    for name, values in signals.items():
        labels[name] = [None if math.isnan(value) else float(value) for value in values]
    return labels


class VideoClips(torch.utils.data.Dataset):
    """Clips of videos by the script's dataset -> frames and labels: file, bad, maneuver, signals at their times."""

    def __init__(self, dataset, count):
        self.dataset, self.count, self.cfg = dataset, min(count, 32 * len(dataset.videos)), dataset.cfg
        self.drives = {}  # number of the first file of each
        for number, video in enumerate(dataset.videos):
            self.drives.setdefault(video.drive, number)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        data, cfg = self.dataset, self.dataset.cfg
        frames, number, annotation, bad, _ = data.decode(index, cfg.height, cfg.width)
        labels = {}
        if number >= 0:
            plan = V.draw_plan(V.sample_rng(cfg.seed, data.stream, index, 2), cfg, data.stream)
            with data.watch.holding(number):
                labels = timed_annotation(annotation, data.videos[number], plan)
            labels["drive"] = self.drives[data.videos[number].drive]
        return as_frames(frames), {**labels, "file": number, "bad": bad}


def collate_clips(pairs):
    """List of (frames, labels) -> (frames [B, T, 3, H, W], list of labels)."""
    return torch.stack([frames for frames, _ in pairs]), [labels for _, labels in pairs]


def open_loader(clips, count, size, num_workers, collate_fn, nice=0):
    """V.ClipLoader of `count` clips in order, in batches of `size`; a `dataset` of the clips is what reads files."""
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    options = dict(timeout_s=clips.cfg.decode_timeout_s, files=getattr(clips, "dataset", None), nice=nice)
    room = size * math.prod((clips.cfg.num_frames, 3, clips.cfg.height, clips.cfg.width)) + 2**16
    return V.ClipLoader(clips, batches, num_workers, collate_fn=collate_fn, batch_bytes=room, **options)


def soon_end(values, cfg):
    """Mean over the frames of the last SOON tubelet of a per-frame list, NaN where it is unknown."""
    if not values:
        return math.nan
    end = cfg.now_frames + cfg.soon_frames
    known = [value for value in values[end - cfg.tubelet_t : end] if value is not None]
    return float(np.mean(known)) if known else math.nan


def window_maneuver(labels, cfg):
    """The maneuver as far as NOW and SOON show it: a braking that begins later is none yet."""
    late = labels.get("brake_time") is not None and labels["brake_time"] > cfg.soon_frames / (cfg.clip_fps or 4.0)
    return "keep" if late and labels.get("maneuver") == "brake" else labels.get("maneuver", "")


def make_tasks(labels, cfg, maneuvers, scenes):
    """Labels of clips -> Tasks, groups by scene or drive. Scenes have branch, lane and a car that stops too."""
    values = {name: np.array([soon_end(label.get(name), cfg) for label in labels]) for name in SIGNALS}
    values = {name: v for name, v in values.items() if np.isfinite(v).any() and not (scenes and name == "steer")}
    numbers, classes = {name: number for number, name in enumerate(maneuvers)}, {}
    if maneuvers:
        classes["maneuver"] = np.array([numbers.get(window_maneuver(label, cfg), -1) for label in labels])
    counts = {"maneuver": len(maneuvers)}
    if scenes:
        lanes = {"lane_change_left": 0, "keep": 1, "lane_change_right": 2}
        classes["branch"] = np.array([-1 if label["kind"] != "fork" else int(label["branch"] > 0) for label in labels])
        classes["lane"] = np.array([lanes[label["maneuver"]] if label["kind"] == "lane" else -1 for label in labels])
        classes["stops"] = np.array([int(label["stops"]) if label["kind"] == "occluder" else -1 for label in labels])
        counts |= {"branch": 2, "lane": 3, "stops": 2}
    groups = [label["scene_seed"] if scenes else label.get("drive", label["file"]) for label in labels]
    _, groups = np.unique(groups, return_inverse=True)
    return Tasks(values, classes, counts, groups)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Subjects: a model and what was fitted on its latents
# ---------------------------------------------------------------------------------------------------------------------

POOL_SIDE, POOL_CHANNELS = 8, 128  # larger token grids and wider tokens are reduced to this before they are kept


def pool_sites(tokens, grid, side):
    """Tokens [..., t*h*w, D] of a grid (h, w) -> averages over side = (h', w') parts of it, [..., t*h'*w', D]."""
    if side == grid:
        return tokens
    lead, D = tokens.shape[:-2], tokens.shape[-1]
    maps = tokens.reshape(-1, *grid, D).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(maps, side).permute(0, 2, 3, 1).reshape(*lead, -1, D)


class Reducer:
    """Fixed linear map that makes tokens small enough to keep: at most 8 x 8 averaged sites, 128 principal channels."""

    def __init__(self, cfg):
        self.grid, self.side, self.basis = cfg.grid[1:], tuple(min(side, POOL_SIDE) for side in cfg.grid[1:]), None

    def fit(self, tokens):
        """Choose the channels from the first tokens seen [n, L, D]; they stay as they are when they are few."""
        if tokens.shape[-1] > POOL_CHANNELS and self.basis is None:
            rows = tokens.flatten(0, 1)
            self.basis = torch.linalg.eigh((rows.T @ rows).double())[1].flip(1)[:, :POOL_CHANNELS].float()

    def __call__(self, tokens):
        """[..., L, D] -> [..., L', D']."""
        tokens = pool_sites(tokens, self.grid, self.side)
        return tokens if self.basis is None else tokens @ self.basis


class ResidualNoise(nn.Module):
    """Stands in for a flow net and knows nothing of NOW: in one step it turns noise into coordinates with the
    residual's own covariance. Samples are the point forecast plus noise of the right size and shape, without branches.
    """

    def __init__(self, space):
        super().__init__()
        self.space = space

    def project(self, context, *given):
        """Nothing of the context or of actions is used."""
        return None

    def forward(self, x_tau, tau, projected):
        """Noise [B, R, N, k] -> y [B, R, N, k]; right for a single step from tau 0 alone."""
        return self.space.gaussian(x_tau)


def own_precision(cfg, device):
    """A process of one rank that computes in what the run's --amp means on this device."""
    process = V.Process(0, 1, device, None)
    process.amp_dtype, _ = V.choose_precision(V.VJepaAutoV2, cfg, process)
    return process


def contexts_at_once(cfg, num_samples):
    """Contexts of which so many futures each may be held at once."""
    return max(1, SAMPLED_NUMBERS // (num_samples * (cfg.soon_tokens + cfg.flow_chunks) * cfg.enc_dim))


class Subject:
    """A model with the flow nets that sample from it, and linear read-outs of SOON latents fitted on it."""

    def __init__(self, model, process, steps=None):
        self.model, self.cfg, self.device, self.reduce = model, model.cfg, process.device, Reducer(model.cfg)
        self.steps, self.sampled = steps or model.cfg.flow_steps, steps is None  # whether its samples can differ
        self.process = process
        self.flows, self.probes, self.weight, self.bias, self.columns = {"model": model.flow_ema}, {}, None, None, {}

    def soon(self, tokens):
        """SOON part of targets [B, L, D]."""
        return tokens[:, self.cfg.now_tokens : self.cfg.now_tokens + self.cfg.soon_tokens]

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames on the host -> fp32 (context [B, K, D], targets [B, L, D], point forecast [B, F, D])."""
        with V.autocast(self.process):
            context, point, targets = self.model.see(frames.to(self.device))
        return context.float(), targets.float(), point.float()

    @torch.no_grad()
    def forecast(self, context, actions=None):
        """Point forecast of SOON [B, M, D] of contexts [B, K, D], told actions [B, F, A] or none."""
        with V.autocast(self.process):
            return self.model.forecast(context, actions=actions)[:, : self.cfg.soon_tokens].float()

    @torch.no_grad()
    def sample(self, context, flow, num_samples, num_steps, seed, actions=None):
        """SOON latents of contexts [B, K, D], told actions [B, F, A] or none, by a flow net, in parts -> generator of
        (first row, [b, S, M, D])."""
        cfg, own, num_steps = self.cfg, self.model.flow_ema, 1 if isinstance(flow, ResidualNoise) else num_steps
        size = contexts_at_once(cfg, num_samples)
        for first in range(0, len(context), size):
            part, generator = context[first : first + size], torch.Generator(self.device)
            generator.manual_seed(seed * 1_000_003 + first)
            self.model.flow_ema = flow
            try:
                with V.autocast(self.process):
                    told = actions if actions is None else actions[first : first + size]
                    futures = self.model.sample_futures(part, num_samples, num_steps, generator, told)
            finally:
                self.model.flow_ema = own
            yield first, futures[:, :, : cfg.soon_tokens].float()

    def set_readings(self, maps):
        """Take in linear maps of reduced SOON latents {name: (weight [R, d], bias [d])}: `read` applies all at once."""
        edges = np.cumsum([0, *(weight.shape[1] for weight, _ in maps.values())])
        self.columns = {name: slice(int(a), int(b)) for name, a, b in zip(maps, edges, edges[1:])}
        self.weight = torch.cat([weight for weight, _ in maps.values()], 1).to(self.device)
        self.bias = torch.cat([bias for _, bias in maps.values()]).to(self.device)

    def read(self, soon):
        """SOON latents [..., M, D] -> all read-outs [..., d] as a float64 array."""
        return (self.reduce(soon).flatten(-2) @ self.weight + self.bias).double().cpu().numpy()


@dataclass
class Study:
    """What an evaluation works with: subjects, the model first; sizes; seed of scenes and noise; processes."""

    subjects: list
    sizes: Sizes
    seed: int
    workers: int
    progress: Progress

    @property
    def main(self):
        return self.subjects[0]

    @property
    def cfg(self):
        return self.subjects[0].cfg

    def stream(self, clips, name):
        """Batches of a dataset in order -> generator of (frames uint8 on the host, labels)."""
        self.progress.stage(name, len(clips))
        nice = self.main.process.worker_nice(self.cfg)
        for frames, labels in open_loader(clips, len(clips), self.sizes.batch, self.workers, collate_clips, nice):
            yield frames, labels
            self.progress.step(len(labels))


@dataclass
class Latents:
    """What is kept of a set of clips: reduced latents in half precision on the host, and labels."""

    labels: list
    now: torch.Tensor  # targets of NOW [n, L', D']
    soon: torch.Tensor  # targets of SOON
    context: torch.Tensor  # online encoder on NOW alone
    point: torch.Tensor  # point forecast of SOON
    flow: tuple  # full contexts and whitened residuals of the first clips, what a flow net learns from

    def seen(self):
        """NOW and SOON targets [n, L', D']."""
        return torch.cat([self.now, self.soon], 1)


def pixel_rows(frames, cfg):
    """NOW and SOON frames averaged to 8 x 8 -> half precision rows [n, R]: what a probe finds without any encoder."""
    shown = frames[:, : cfg.now_frames + cfg.soon_frames].flatten(0, 1).float() / 255
    return F.adaptive_avg_pool2d(shown, 8).reshape(len(frames), -1).half()


def usable(frames, labels, bad):
    """Drop clips of which no file could be decoded; `bad` collects (file, reason) -> (frames, labels)."""
    bad.update(entry for label in labels for entry in label.get("bad", ()))
    keep = [label.get("file", 0) >= 0 for label in labels]
    return frames[torch.tensor(keep)], [label for label, ok in zip(labels, keep) if ok]


@torch.no_grad()
def flow_pair(subject, context, targets, point):
    """What a flow net learns from -> (contexts in half precision, coordinates of the residuals), on the host."""
    space = subject.model.space
    y = space.encode(space.pool(subject.model.future_target(targets) - point))
    return context.half().cpu(), y.cpu()


def collect(subjects, batches, bad, flow_clips=0, meter=None):
    """Encode batches by every subject -> ([Latents], pixel rows [n, R]), (None, None) without a decodable clip.

    The first batch chooses a subject's kept channels. meter: a Meter that sees everything at full size.
    """
    parts, flows, pixels, labels = [[] for _ in subjects], [[] for _ in subjects], [], []
    for frames, batch_labels in batches:
        frames, batch_labels = usable(frames, batch_labels, bad)
        if not batch_labels:
            continue
        for subject, part, pairs in zip(subjects, parts, flows):
            context, targets, point = subject.encode(frames)
            subject.reduce.fit(targets)
            now, soon = targets[:, : subject.cfg.now_tokens], subject.soon(targets)
            kept = (now, soon, context, point[:, : subject.cfg.soon_tokens])
            part.append([subject.reduce(tokens).half().cpu() for tokens in kept])
            if len(labels) < flow_clips:
                pairs.append(flow_pair(subject, context, targets, point))
            if meter is not None:
                meter.see(subject, context, targets, point)
        pixels.append(pixel_rows(frames, subjects[0].cfg))
        labels += batch_labels
    if not labels:
        return None, None
    latents = []
    for part, pairs in zip(parts, flows):
        latents.append(Latents(labels, *map(torch.cat, zip(*part)), tuple(map(torch.cat, zip(*pairs)))))
    return latents, torch.cat(pixels)


def train_shuffled(subject, latents, sizes, seed):
    """A fresh flow net trained on residuals dealt to other clips: it learns what futures there are, not whose."""
    contexts, y = latents.flow
    cfg, device = subject.cfg, subject.device
    torch.manual_seed(seed)
    net, rng = V.FlowNet(cfg).to(device), torch.Generator().manual_seed(seed)
    y = y[torch.randperm(len(y), generator=rng)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    size, draws = min(sizes.shuffled_batch, len(y)), 4
    for step in range(sizes.shuffled_steps):
        optimizer.param_groups[0]["lr"] = cosine_lr(1e-3, step, sizes.shuffled_steps)
        chosen = torch.randint(len(y), (size,), generator=rng)
        noise = torch.randn((size, draws, *y.shape[1:]), generator=rng).to(device)
        tau = V.shifted_tau(torch.randn((size, draws), generator=rng), cfg.tau_shift).to(device)
        with V.autocast(subject.process):
            projected = net.project(contexts[chosen].to(device).float())
            loss = V.velocity_loss(net, projected, y[chosen, None].to(device).expand_as(noise), noise, tau)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()


def branch_map(soon, labels):
    """Reduced SOON latents of fork siblings [n, L', D'] -> linear map onto the branch space: eight numbers in which
    siblings differ.

    The leading directions of differences: per scene, right mean minus left mean and every future minus the mean of its
    own branch; not centred, as differences are. One unit is the scatter of real futures within a branch, whatever the
    direction: in latent units the distance between the branches lets anything in between pass for near.
    """
    seeds, sides = np.array([label["scene_seed"] for label in labels]), np.array([label["branch"] for label in labels])
    rows, between, within, free = soon.flatten(1).float(), [], [], 0
    for seed in np.unique(seeds[sides != 0]):
        left, right = (rows[torch.from_numpy((seeds == seed) & (sides == side))] for side in (-1, 1))
        if min(len(left), len(right)) > 1:
            between.append((right.mean(0) - left.mean(0))[None])
            within += [left - left.mean(0), right - right.mean(0)]
            free += len(left) + len(right) - 2
    basis, within = Principal(torch.cat([*between, *within]), 8, centre=False).basis, torch.cat(within)
    values, vectors = torch.linalg.eigh(((within @ basis).T @ (within @ basis)).double() / free)
    whiten = (vectors * values.clamp_min(1e-6 * float(values[-1])).rsqrt()) @ vectors.T
    return basis @ whiten.float(), torch.zeros(basis.shape[1])


def pooled_map(latents, num=4):
    """Leading directions of the mean SOON token's residual, truth minus forecast, as a map of reduced SOON latents."""
    residual = (latents.soon.float() - latents.point.float()).mean(1)
    basis = Principal(residual, num).basis  # [D', k]
    weight = basis.repeat(latents.soon.shape[1], 1) / latents.soon.shape[1]
    return weight, torch.zeros(weight.shape[1])


def look_of(frames):
    """Digest of uint8 frames: equal for frames that are equal bit for bit."""
    return hashlib.sha256(frames.numpy().tobytes()).digest()


def measure(study, subjects, groups, name, seed, variants=None):
    """Render groups of jobs, encode them, sample from the first of each -> one [Reading] per subject, in group order.

    groups: list of (odds, jobs, natural). variants: names of the flow nets to sample with, by default all.
    """
    owner = [number for number, (_, jobs, _) in enumerate(groups) for _ in jobs]
    clips = SceneJobs([job for _, jobs, _ in groups for job in jobs], study.cfg)
    found = [[{"real": [], "samples": {}} for _ in groups] for _ in subjects]
    labels, looks, position = [[] for _ in groups], [set() for _ in groups], 0
    for frames, batch_labels in study.stream(clips, name):
        numbers = owner[position : position + len(frames)]
        leads = [i for i, number in enumerate(numbers) if not labels[number] and numbers.index(number) == i]
        for subject, own in zip(subjects, found):
            context, targets, point = subject.encode(frames)
            for number, row in zip(numbers, subject.read(subject.soon(targets))):
                own[number]["real"].append(row)
            for i, row in zip(leads, subject.read(point[leads, : subject.cfg.soon_tokens])):
                own[numbers[i]]["point"] = row
            for variant, flow in subject.flows.items() if leads else ():
                if variants is None or variant in variants:
                    draw = (flow, study.sizes.num_samples, subject.steps, seed + position)
                    for begin, soon in subject.sample(context[leads], *draw):
                        for i, row in zip(leads[begin:], subject.read(soon)):
                            own[numbers[i]]["samples"][variant] = row
        for number, picture, label in zip(numbers, frames, batch_labels):
            labels[number].append(label)
            looks[number].add(look_of(picture[: study.cfg.now_frames]))
        position += len(frames)
    readings = []
    for own in found:
        readings.append([])
        for reading, (odds, _, natural), truth, look in zip(own, groups, labels, looks):
            side, real = np.array([label["branch"] for label in truth]), np.stack(reading.pop("real"))
            same = len(look) == 1
            readings[-1].append(Reading(odds, real, side, natural, truth=truth, same_now=same, **reading))
    return readings


# ---------------------------------------------------------------------------------------------------------------------
# 7  Forecasts of any clips: skill, retrieval, spread, collapse
# ---------------------------------------------------------------------------------------------------------------------

KS = (1, 2, 4, 8, 16, 32)


def forecast_errors(point, targets, cfg, share=0.2):
    """L1 of three forecasts of SOON per clip and tubelet: point [B, M, D], targets [B, L, D] -> [B, 3, 2, H].

    Forecasts: the model's, the last NOW tubelet repeated, a straight line through the last two (NaN with a single one).
    Tokens: all, and the `share` of each tubelet's that lie farthest from the last NOW tubelet.
    """
    sites, n = cfg.sites, cfg.now_tokens
    soon, pred = targets[:, n : n + cfg.soon_tokens].unflatten(1, (-1, sites)), point.unflatten(1, (-1, sites))
    last, line = targets[:, n - sites : n], torch.full_like(soon, math.nan)  # [B, s, D], [B, H, s, D]
    if n >= 2 * sites:
        steps = torch.arange(1, soon.shape[1] + 1, device=soon.device)[:, None, None]
        line = V.layer_norm(last[:, None] + steps * (last - targets[:, n - 2 * sites : n - sites])[:, None])
    moving = (soon - last[:, None]).abs().mean(-1).topk(math.ceil(share * sites), dim=-1).indices
    errors = []
    for forecast in (pred, last[:, None], line):
        error = (forecast - soon).abs().mean(-1)  # [B, H, s]
        errors.append(torch.stack([error.mean(-1), error.gather(-1, moving).mean(-1)], 1))
    return torch.stack(errors, 1)


class Meter:
    """Takes the measures of clips that need latents at full size, batch by batch, and keeps only numbers."""

    def __init__(self, study):
        self.main, self.sizes, self.seed, self.seen = study.main, study.sizes, study.seed, 0
        self.ks = [k for k in KS if k <= study.sizes.num_samples]
        self.errors, self.gauge, self.residual = {id(subject): [] for subject in study.subjects}, [], []
        self.distance, self.mean_distance, self.spread, self.reads = (
            {name: [] for name in ("model", "mean + noise")} for _ in range(4)
        )

    def see(self, subject, context, targets, point):
        """One batch of one subject; sampled futures are measured for the first subject alone."""
        cfg, soon = subject.cfg, subject.soon(targets)
        point = point[:, : cfg.soon_tokens]
        self.errors[id(subject)].append(forecast_errors(point, targets, cfg).cpu().numpy())
        if subject is not self.main:
            return
        self.gauge.append(V.gauge_tokens(targets).half().cpu())
        self.residual.append((soon - point).square().mean((1, 2)).cpu().numpy())
        for name in self.distance:
            draw = (subject.flows[name], self.sizes.num_samples, subject.steps, self.seed + self.seen)
            for first, futures in subject.sample(context, *draw):
                truth = soon[first : first + len(futures), None]
                self.distance[name].append((futures - truth).square().mean((2, 3)).sqrt().cpu().numpy())
                means = [(futures[:, :k].mean(1) - truth[:, 0]).square().mean((1, 2)).sqrt() for k in self.ks]
                self.mean_distance[name].append(torch.stack(means, 1).cpu().numpy())
                self.spread[name].append(futures.var(1).mean((1, 2)).cpu().numpy())
                self.reads[name].append(subject.read(futures))
        self.seen += len(targets)


def skill_figures(study, meter, groups):
    """Point skill against two references, on moving and on all tokens -> (figures, curve per tubelet)."""
    errors, resamples = [np.concatenate(meter.errors[id(subject)]) for subject in study.subjects], study.sizes.resamples
    horizon, figures = errors[0].shape[-1], {}
    begin, curve = min(1, horizon - 1), {"tubelet": list(range(1, horizon + 1))}
    for row, reference in ((1, "persistence"), (2, "linear")):
        for column, ending in ((1, ""), (0, "_all")):
            table, control = (e[:, [0, row], column, begin:].mean(-1) for e in errors)
            if np.isfinite(table).all():
                beside = {"untrained encoder": saved(control)}
                figures |= measured(f"skill_{reference}{ending}", table, saved, beside, resamples, groups)
                shares = [saved(errors[0][:, [0, row], column, h]) for h in range(horizon)]
                curve[f"{reference}, {'moving' if column else 'all'} tokens"] = shares
    return figures, curve


def retrieval_figures(latents, sites, groups, resamples):
    """Rank of the true future among all clips' for the point forecast, beside persistence and chance -> dict."""
    candidates, count, figures = latents.soon.flatten(1).float().numpy(), len(latents.soon), {}
    repeated = latents.now[:, -sites:].repeat(1, latents.soon.shape[1] // sites, 1)
    queries = (tokens.flatten(1).float().numpy() for tokens in (latents.point, repeated))
    ranks, still = (retrieval_ranks(own, candidates) for own in queries)
    for most in (1, 5):
        beside = {"persistence": float((still <= most).mean()), "chance": min(1.0, most / count)}
        figures |= measured(f"retrieval_r{most}", ranks <= most, np.mean, beside, resamples, groups)
    beside = {"persistence": float(np.median(still)), "chance": (count + 1) / 2}
    return figures | measured("retrieval_median_rank", ranks, np.median, beside, resamples, groups)


def sampling_figures(meter, latents, groups):
    """What sampled futures say without known odds: best of K, spread, ranks in pooled space -> (figures, curves)."""
    main, resamples, columns = meter.main, meter.sizes.resamples, meter.main.columns["pooled"]
    joined = {name: np.concatenate(parts) for name, parts in meter.distance.items()}
    point = np.concatenate(meter.residual) ** 0.5
    tables = {name: np.stack([distance.min(1), point], 1) for name, distance in joined.items()}
    beside = {"mean + noise": mean_ratio(tables["mean + noise"]), "point forecast": 1.0}
    figures = measured("best_of_k", tables["model"], mean_ratio, beside, resamples, groups)
    tables = {name: np.stack([np.concatenate(parts), point**2], 1) for name, parts in meter.spread.items()}
    beside = {"mean + noise": rms_ratio(tables["mean + noise"]), "point forecast": 0.0}
    figures |= measured("spread_ratio", tables["model"], rms_ratio, beside, resamples, groups)
    truth = latents.soon.flatten(1).float().to(main.device) @ main.weight[:, columns] + main.bias[columns]
    truth, shares, chances = truth.double().cpu().numpy(), {}, {}
    for name, parts in meter.reads.items():
        reads = np.concatenate(parts)[:, :, columns]
        ranks = np.concatenate([truth_ranks(reads[..., d], truth[:, d]) for d in range(truth.shape[1])])
        shares[name], chances[name] = rank_test(ranks, meter.sizes.num_samples)
    chance = chances.pop("model")
    figures["pooled_rank_chi2"] = make_figure("pooled_rank_chi2", chance, None, len(point), chances)
    best = {"k": meter.ks, "point forecast": [float(point.mean())] * len(meter.ks)}
    for name in joined:
        best[f"best of k, {name}"] = best_of(joined[name], meter.ks).mean(0).tolist()
        best[f"mean of k, {name}"] = np.concatenate(meter.mean_distance[name]).mean(0).tolist()
    return figures, {"best_of_k": best, "pooled_ranks": rank_curve(shares)}


def rank_curve(shares):
    """Shares of ranks per bin by name -> curve of plain lists."""
    return {"bin": list(range(1, len(shares["model"]) + 1)), **{name: s.tolist() for name, s in shares.items()}}


def gauge_figures(meter):
    """Collapse gauges on targets -> dict."""
    tokens = torch.cat(meter.gauge).float()
    rank, std, most = V.effective_rank(tokens), V.target_std(tokens), float(meter.main.cfg.enc_dim)
    return {
        "effective_rank": make_figure("effective_rank", float(rank), None, len(tokens), {"most possible": most}),
        "target_std": make_figure("target_std", float(std), None, len(tokens), {"most possible": 1.0}),
    }


def probe_scores(tasks, task, pred):
    """Score of a task: R2 of a signal, macro-F1 of maneuvers, else accuracy -> (value, rows, groups, statistic)."""
    rows, groups = tasks.rows(task, pred)
    statistic = r2 if task in tasks.values else macro_f1 if task == "maneuver" else accuracy
    return (statistic(rows) if len(rows) > 1 else math.nan), rows, groups, statistic


def sample_votes(subject, reads, tasks):
    """Sampled futures read by the SOON probes: mean of a signal over samples, most frequent class -> {task: [n]}."""
    votes = {}
    for task in tasks.names():
        if task in subject.columns:
            outputs = reads[:, :, subject.columns[task]]  # [n, K, c]
            if task in tasks.values:
                votes[task] = outputs[..., 0].mean(1)
            else:
                named = outputs.argmax(-1)
                votes[task] = np.stack([(named == c).sum(1) for c in range(outputs.shape[-1])], 1).argmax(1)
    return votes


def probe_predictions(study, fit, test, pixels, fit_tasks, tasks, meter):
    """Frozen probes in all places -> {place: {task: predictions on the test clips}}; the first is the headline."""
    main, sizes, progress, places = study.main, study.sizes, study.progress, {}
    progress.stage("linear probes", 5)
    (seen, seen_test), (fresh, fresh_test) = ((part.seen(), other.seen()) for part, other in zip(fit, test))
    space = Principal(seen.flatten(1), min(sizes.components, len(seen) // 2))
    for name, rows, test_rows, own, known in (
        ("NOW + SOON", seen, seen_test, fit_tasks, space),
        ("shuffled labels", seen, seen_test, fit_tasks.shuffled(study.seed), space),
        ("untrained encoder", fresh, fresh_test, fit_tasks, None),
        ("raw pixels", *pixels, fit_tasks, None),
        ("encoded NOW alone", fit[0].context, test[0].context, fit_tasks, None),
    ):
        probes = fit_probes(rows.flatten(1), own, sizes.components, known)
        places[name] = predict(probes, test_rows.flatten(1), tasks)
        progress.step()
    places["SOON alone"] = predict(main.probes, test[0].soon.flatten(1), tasks)
    places["SOON probe on the point forecast"] = predict(main.probes, test[0].point.flatten(1), tasks)
    places["SOON probe on sampled futures"] = sample_votes(main, np.concatenate(meter.reads["model"]), tasks)
    progress.stage("attentive probes", 3)
    for name, own, other in (
        ("attentive, NOW + SOON", seen, seen_test),
        ("attentive, untrained encoder", fresh, fresh_test),
        ("attentive, encoded NOW alone", fit[0].context, test[0].context),
    ):
        places[name] = attentive_predictions(own, fit_tasks, other, sizes.probe_epochs, main.device, study.seed)
        progress.step()
    return places


def probe_figures(places, tasks, resamples):
    """Predictions by place -> {figure}: the linear probe on NOW + SOON targets, all other places as its controls."""
    figures, (headline, *others) = {}, places
    for task in tasks.names():
        if task not in places[headline]:
            continue
        value, rows, groups, statistic = probe_scores(tasks, task, places[headline][task])
        if len(rows) < 2:
            continue
        name = f"probe_{task}_" + {r2: "r2", macro_f1: "f1", accuracy: "accuracy"}[statistic]
        beside = {place: probe_scores(tasks, task, places[place][task])[0] for place in others if task in places[place]}
        interval = bootstrap(rows, statistic, groups, resamples)
        figures[name] = make_figure(name, value, interval, len(np.unique(groups)), beside)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# 8  Scenes with known odds other than forks
# ---------------------------------------------------------------------------------------------------------------------


def gap_figures(readings, column, cfg, sizes):
    """Braking lead car: the sampled gap at the end of SOON against that probed on real futures -> (figures, curves)."""
    real, n = [r.real[:, column] for r in readings], len(readings)
    oracle = np.array([oracle_score(gaps) for gaps in real])
    point = np.array([score_against(r.point[None, column], gaps) for r, gaps in zip(readings, real)])
    scores, inside, shares, chances = {}, {}, {}, {}
    for name in ("model", "mean + noise"):
        drawn = np.stack([r.samples[name][:, column] for r in readings])  # [n, K, 1]
        scores[name] = np.array([score_against(own, gaps) for own, gaps in zip(drawn, real)])
        held = [coverage(own.T.repeat(len(gaps), 0), gaps[:, 0]).mean() for own, gaps in zip(drawn, real)]
        inside[name] = np.array(held)
        ranks = truth_ranks(drawn[..., 0], np.array([gaps[0, 0] for gaps in real]))
        shares[name], chances[name] = rank_test(ranks, sizes.num_samples)
    told = np.array([soon_end(label["lead_gap"], cfg) for r in readings for label in r.truth])
    error = float(np.sqrt(np.nanmean((np.concatenate(real)[:, 0] - told) ** 2)))
    table, whole = np.stack([scores["model"], oracle], 1), oracle.mean()
    noise, still = (ratio(own.mean(), whole) for own in (scores["mean + noise"], point))
    beside = {"mean + noise": noise, "point forecast": still, "perfect sampler": 1.0}
    figures = measured("gap_crps_ratio", table, mean_ratio, beside, sizes.resamples, also={"probe_rmse_m": error})
    beside = {"mean + noise": float(inside["mean + noise"].mean()), "perfect sampler": 0.8}
    figures |= measured("gap_coverage80", inside["model"], np.mean, beside, sizes.resamples)
    figures["gap_rank_chi2"] = make_figure("gap_rank_chi2", chances.pop("model"), None, n, chances)
    return figures, {"gap_ranks": rank_curve(shares)}


def steady_figures(readings, column, cfg, sizes):
    """Steady movers: deviation of the probed position over samples against the probe's error, same scenes -> dict."""
    rows = []
    for r in readings:
        truth = soon_end(r.truth[0].get("mover_u"), cfg)
        if math.isfinite(truth):
            model, noise = (r.samples[name][:, column].var(ddof=1) for name in ("model", "mean + noise"))
            rows.append((model, (r.real[0, column].item() - truth) ** 2, noise))
    if len(rows) < 2:
        return {}
    rows = np.asarray(rows)
    beside = {"mean + noise": rms_ratio(rows[:, [2, 1]]), "point forecast": 0.0}
    also = {"probe_rmse_picture_widths": float(rows[:, 1].mean() ** 0.5)}
    return measured("steady_spread", rows, rms_ratio, beside, sizes.resamples, also=also)


def odds_error(rows):
    """Mean distance between shares and true odds over presents of different odds. rows [n, 2 * c] = (shares, odds)."""
    shares, odds = np.split(rows, 2, axis=1)
    kinds = np.unique(odds, axis=0)
    return float(np.mean([abs(shares[(odds == kind).all(1)].mean(0) - kind) for kind in kinds]))


def lane_figures(readings, column, cfg, sizes):
    """Lane scenes: sampled shares of left, keep, right against the odds of the indicator -> (figures, curves)."""
    told = [V.scene_odds(r.truth[0]["scene_seed"], cfg, "lane") for r in readings]
    odds = np.array([[one[side] for side in ("left", "keep", "right")] for one in told])
    shares = {}
    for name in ("model", "mean + noise", "shuffled targets", "real futures", "point forecast"):
        shares[name] = []
        for r in readings:
            shown = {**r.samples, "real futures": r.real[:1], "point forecast": r.point[None]}[name]
            shares[name].append((shown[:, column].argmax(1)[:, None] == np.arange(3)).mean(0))
    shares = {name: np.stack(rows) for name, rows in shares.items()}
    tables, curves = {name: np.concatenate([share, odds], 1) for name, share in shares.items()}, {}
    beside = {name: odds_error(table) for name, table in tables.items() if name != "model"}
    for kind in np.unique(odds, axis=0):
        here = (odds == kind).all(1)
        curve = {"n": int(here.sum()), **{name: share[here].mean(0).tolist() for name, share in shares.items()}}
        curves["odds " + " / ".join(f"{p:g}" for p in kind)] = curve
    return measured("lane_odds_error", tables["model"], odds_error, beside, sizes.resamples), {"lane_odds": curves}


def occluder_figures(readings, column, sizes):
    """Cars behind a truck: sampled share that stops there against the true odds -> dict."""
    both = [
        [(r.samples[name][:, column].argmax(1) == 1).mean() for r in readings] for name in ("model", "mean + noise")
    ]
    own, noise = np.array(both)
    pairs = [(label["stops"], real[column].argmax()) for r in readings for label, real in zip(r.truth, r.real)]
    rows = np.array(pairs, float)
    beside = {"true odds": V.STOP_ODDS, "mean + noise": float(noise.mean())}
    beside |= {"real futures, probed": float(rows[:, 1].mean()), "probe accuracy on real futures": accuracy(rows)}
    return measured("occluder_stops", own, np.mean, beside, sizes.resamples)


# ---------------------------------------------------------------------------------------------------------------------
# 9  Surprise: impossible twins against possible and rare futures
# ---------------------------------------------------------------------------------------------------------------------
# Headline: the lasting error of the nearest of K samples. A break is an error at few sites that stays, while what a
# sample gets slightly wrong about a moving scene changes its sign from tubelet to tubelet: so errors are averaged over
# SOON before their size is taken, and the worst tenth of the sites counts; not a choice by motion, which the very
# frames that are judged would make. Twins are compared where their NOW is the same: once NOW shows the break, a clip
# from which a car has vanished is simply a clip with less in it.

SCORES = (
    "lasting error of the nearest sample",
    "worst tokens of the nearest sample",
    "nearest sample, RMS",
    "nearest sample, L1",
    "point forecast, L1",
)


def worst(values, share):
    """Mean of the largest share of values, at least one: [..., M] -> [...]."""
    return values.topk(max(1, round(share * values.shape[-1])), -1)[0].mean(-1)


def nearest_scores(error, sites):
    """Errors of S samples [S, M, D], M = tubelets x sites -> first four of SCORES, each of its nearest sample [4]."""
    lasting = error.unflatten(1, (-1, sites)).mean(1).abs().mean(-1)  # [S, s]
    by_token = error.abs().mean(-1)  # [S, M]
    measured = (worst(lasting, 0.1), worst(by_token, 0.05), error.square().mean((1, 2)).sqrt(), by_token.mean(-1))
    return torch.stack([values.min() for values in measured])


def window_surprise(subject, clips, sizes, seed):
    """Surprise of every window, NOW + SOON from each tubelet on, of clips uint8 [V, T, 3, H, W] -> [5, V, W] as SCORES.

    Targets are the target encoder's on the window alone. Where a clip's NOW is that of the group's first clip, both
    share their samples; elsewhere the window is NaN.
    """
    cfg = subject.cfg
    length = cfg.now_frames + cfg.soon_frames
    starts = range(0, clips.shape[1] - length + 1, cfg.tubelet_t)
    windows = torch.stack([clips[:, start : start + length] for start in starts], 1)
    windows = windows.flatten(0, 1)  # [V * W, n, 3, H, W]
    looks = [look_of(window[: cfg.now_frames]) for window in windows]
    encoded = [subject.encode(part) for part in windows.split(sizes.batch)]
    context, targets, point = (torch.cat(parts) for parts in zip(*encoded))
    soon = subject.soon(targets)
    scores = torch.full((len(SCORES), len(windows)), math.inf)
    scores[-1] = (point[:, : cfg.soon_tokens] - soon).abs().mean((1, 2)).cpu()
    shared = torch.tensor([look == looks[place % len(starts)] for place, look in enumerate(looks)])
    steps, total = min(sizes.surprise_steps, subject.steps), sizes.surprise_samples if subject.sampled else 1
    most = max(1, SAMPLED_NUMBERS // soon[0].numel())  # samples of one scene that fit the memory
    for drawn in range(0, total, most):
        draw = (subject.flows["model"], min(most, total - drawn), steps, seed + 10**8 * drawn)
        for begin, futures in subject.sample(context[: len(starts)], *draw):
            for row in shared.nonzero()[:, 0].tolist():
                if begin <= row % len(starts) < begin + len(futures):
                    nearest = nearest_scores(futures[row % len(starts) - begin] - soon[row], cfg.sites).cpu()
                    scores[:-1, row] = torch.minimum(scores[:-1, row], nearest)
    scores[:, ~shared] = math.nan
    return scores.view(-1, len(clips), len(starts)).numpy()


def surprise_of(study, groups, name, seed):
    """Surprise of groups of jobs that share a scene -> per subject a list over groups of arrays [5, V, W]."""
    results, pending = [[] for _ in study.subjects], []
    clips, left = SceneJobs([job for jobs in groups for job in jobs], study.cfg), [len(jobs) for jobs in groups]
    for frames, _ in study.stream(clips, name):
        pending += list(frames)
        while left and len(pending) >= left[0]:
            group, pending, number = torch.stack(pending[: left[0]]), pending[left.pop(0) :], len(results[0])
            for subject, result in zip(study.subjects, results):
                result.append(window_surprise(subject, group, study.sizes, seed + number))
    return results


def over_shared(scores, place):
    """Surprise of clip `place` and of the first clip, means over windows of the same NOW: [5, V, W] -> ([5], [5])."""
    windows = np.isfinite(scores[0, place])
    return scores[:, place, windows].mean(-1), scores[:, 0, windows].mean(-1)


def twin_groups(seed, cfg, count):
    """Steady scenes, half of them with a barrier, as groups of jobs: the possible clip, then its impossible twins."""
    chosen, number = {True: [], False: []}, 0
    while min(map(len, chosen.values())) < count // 2 and number < 100 * count:
        scene_seed, number = set_seed(seed, "twins", number), number + 1
        chosen[V.scene_odds(scene_seed, cfg, "steady")["barrier"]].append(scene_seed)
    groups = []
    for barrier, seeds in chosen.items():
        twins = [twin for twin in V.TWIN_KINDS if barrier or twin != "pass_through"]
        groups += [[Job(scene_seed, 0, "steady", twin) for twin in ("", *twins)] for scene_seed in seeds[: count // 2]]
    return groups


def rare_groups(seed, cfg, count):
    """Forks at odds 0.1 and 0.9 as groups of two jobs: the likely branch, then the rare one -> list."""
    groups = []
    for odds, rare in ((0.1, 1), (0.9, -1)):
        for scene in fork_seeds(seed, "rare", cfg, odds, count // 2):
            futures = [futures_where(scene, cfg, "fork", "choice", side, 1)[0] for side in (-rare, rare)]
            groups.append([Job(scene, future, "fork") for future in futures])
    return groups


def auroc_rows(rows):
    """AUROC of rows [n, 2] = (score, 1 for impossible)."""
    return auroc(rows[rows[:, 1] == 1, 0], rows[rows[:, 1] == 0, 0])


def clip_scores(scores, matched):
    """Surprise [C, V, W] of a group of clips -> one row [C] for every clip but the first: by its largest window, or
    `matched`, less the first clip's on the windows that both share."""
    rows = []
    for place in range(1, scores.shape[1]):
        own, first = over_shared(scores, place)
        rows.append(own - first if matched else np.nanmax(scores[:, place], -1))
    return rows


def surprise_auroc(twins, rare, sizes):
    """Impossible twins against rare legal branches, single clips and each against its own present -> figures."""
    figures = {}
    for name, matched in (("surprise_auroc", False), ("surprise_auroc_matched", True)):
        values = []
        for impossible, legal in zip(twins, rare):
            rows, groups = [], []
            for number, scores in enumerate([*impossible, *legal]):
                found = clip_scores(scores, matched)
                rows += [(*row, number < len(impossible)) for row in found]
                groups += [number] * len(found)
            values.append((np.asarray(rows), np.asarray(groups)))
        (rows, groups), (others, _) = values
        main = [auroc_rows(rows[:, [score, -1]]) for score in range(len(SCORES))]
        beside = {**dict(zip(SCORES[1:], main[1:])), "untrained encoder": auroc_rows(others[:, [0, -1]]), "chance": 0.5}
        interval = bootstrap(rows[:, [0, -1]], auroc_rows, groups, sizes.resamples)
        figures[name] = make_figure(name, main[0], interval, len(np.unique(groups)), beside)
    return figures


def surprise_figures(study, shares):
    """Pairwise accuracy for every twin, AUROC of impossible clips against rare legal branches -> (figures, curves)."""
    cfg, sizes, seed = study.cfg, study.sizes, study.seed
    groups = twin_groups(seed, cfg, sizes.twin_scenes)
    results = surprise_of(study, groups, "surprise: impossible twins", seed)
    pairs = {twin: [[] for _ in study.subjects] for twin in V.TWIN_KINDS}
    for which, result in enumerate(results):
        for jobs, scores in zip(groups, result):
            for place, job in enumerate(jobs[1:], 1):
                pairs[job.twin][which].append(pair_accuracy(*over_shared(scores, place)))
    figures, curves = {}, {}
    for twin, by_subject in pairs.items():
        main, untrained = (np.asarray(rows).reshape(-1, len(SCORES)) for rows in by_subject)
        means = dict(zip(SCORES, main.mean(0).tolist()))
        beside = {"untrained encoder": float(untrained[:, 0].mean())}
        curves[twin] = {SCORES[0]: means.pop(SCORES[0]), SCORES[-1]: means[SCORES[-1]], **beside}
        beside = {**means, **beside, "chance": 0.5}
        figures |= measured(f"surprise_{twin}", main[:, 0], np.mean, beside, sizes.resamples)
    if shares["fork"]:
        rare = rare_groups(seed, cfg, sizes.rare_scenes)
        rare = surprise_of(study, rare, "surprise: rare branches", seed + 10**6)
        figures |= surprise_auroc(results, rare, sizes)
    return figures, {"surprise": curves}


# ---------------------------------------------------------------------------------------------------------------------
# 10  Evaluation: model -> figures
# ---------------------------------------------------------------------------------------------------------------------


def fit_jobs(seed, cfg, sizes, kinds):
    """Clips that fit spaces and probes: forks, each branch twice, stopping and passing cars, the rest -> [Job]."""
    jobs = []
    for place, kind in enumerate(kinds):
        for number in range(sizes.fit_forks if kind == "fork" else sizes.fit_clips):
            scene_seed, futures = set_seed(seed, "fit", place * 10**6 + number), [0]
            if kind == "fork":
                futures = both_branches(scene_seed, cfg)
            elif kind == "occluder":
                futures = futures_where(scene_seed, cfg, kind, "stops", bool(number % 2), 1)
            jobs += [Job(scene_seed, future, kind) for future in futures]
    return jobs


def fork_groups(seed, cfg, sizes):
    """Test forks: `siblings` natural futures at even odds, two of each branch at least and at other odds -> groups."""
    groups = []
    for scene_seed in fork_seeds(seed, "forks", cfg, 0.5, sizes.fork_scenes):
        more = [s for s in both_branches(scene_seed, cfg) if s >= sizes.siblings]
        groups.append((0.5, [Job(scene_seed, s, "fork") for s in (*range(sizes.siblings), *more)], sizes.siblings))
    for odds in sorted(set(V.FORK_ODDS) - {0.5}):
        for scene_seed in fork_seeds(seed, "signs", cfg, odds, sizes.sign_scenes):
            groups.append((odds, [Job(scene_seed, s, "fork") for s in both_branches(scene_seed, cfg)], 0))
    return groups


def fit_readings(subject, latents, tasks, sizes):
    """Fit all that is read from SOON latents, probes, branch space, pooled space: sets subject.probes and readings."""
    rows = latents.soon.flatten(1)
    subject.probes = fit_probes(rows, tasks, sizes.components)
    maps = dict(subject.probes)
    if "branch" in tasks.classes and (tasks.classes["branch"] >= 0).any():
        forks = tasks.classes["branch"] >= 0
        gate = fit_probes(rows[torch.from_numpy(forks)], tasks.pick(("branch",), forks), sizes.components)
        maps |= {"gate": gate["branch"], "axes": branch_map(latents.soon, latents.labels)}
    maps["pooled"] = pooled_map(latents)
    subject.set_readings(maps)


def gate_figures(readings, subjects, sizes):
    """Accuracy of the branch probe on the real futures of test forks, beside the untrained encoder -> figures."""
    values = []
    for subject, own in zip(subjects, readings):
        column = subject.columns["gate"]
        values.append(np.array([(r.real[:, column].argmax(1) == (r.side > 0)).mean() for r in own]))
    beside = {"untrained encoder": float(values[1].mean()), "chance": 0.5}
    return measured("branch_gate", values[0], np.mean, beside, sizes.resamples)


def odds_figures(study, shares):
    """Everything that is held against known odds, for the kinds that the run's mix has -> (figures, curves)."""
    main, cfg, sizes, seed = study.main, study.cfg, study.sizes, study.seed
    figures, curves, two = {}, {}, ("model", "mean + noise")
    if shares["fork"]:
        readings = measure(study, study.subjects, fork_groups(seed, cfg, sizes), "forks", seed)
        figures |= gate_figures(readings, study.subjects, sizes)
        own, untrained = (choose(r, subject.columns["axes"]) for r, subject in zip(readings, study.subjects))
        for reading in untrained:
            reading.samples["mean + noise"] = reading.samples["model"]
        controls = {"untrained encoder": untrained, "shuffled targets": None, "mean + noise": None}
        figures |= fork_figures(own, sizes, controls)
        curves |= fork_curves(own, (*two, "shuffled targets"))
    if shares["brake"]:
        num, groups = sizes.brake_siblings, []
        for scene_seed in (set_seed(seed, "brake", number) for number in range(sizes.brake_scenes)):
            groups.append((0, [Job(scene_seed, future, "brake") for future in range(num)], num))
        readings = measure(study, [main], groups, "braking cars", seed + 1, two)[0]
        more, curve = gap_figures(readings, main.columns["lead_gap"], cfg, sizes)
        figures, curves = figures | more, curves | curve
    for kind, reading in (("steady", "mover_u"), ("lane", "lane"), ("occluder", "stops")):
        if not shares[kind]:
            continue
        groups = [(0, [Job(set_seed(seed, kind, number), 0, kind)], 1) for number in range(sizes.kind_scenes)]
        readings = measure(study, [main], groups, f"{kind} scenes", seed + 2, None if kind == "lane" else two)[0]
        column = main.columns.get(reading)
        if column is None:
            continue
        if kind == "steady":
            figures |= steady_figures(readings, column, cfg, sizes)
        elif kind == "occluder":
            figures |= occluder_figures(readings, column, sizes)
        else:
            more, curve = lane_figures(readings, column, cfg, sizes)
            figures, curves = figures | more, curves | curve
    return figures, curves


STEERED_WAYS = ("true", "passive", "other branch", "shuffled")  # actions that samples are told


def steered_latents(study):
    """Held-out steered scenes, each driven to the left, then to the right -> (contexts, reduced SOON latents [2n, R],
    actions [2n, F, A])."""
    main, cfg, found = study.main, study.cfg, []
    seeds = [set_seed(study.seed, "steered", number) for number in range(study.sizes.fork_scenes)]
    jobs = [
        Job(s, futures_where(s, cfg, "steered", "choice", side, 1)[0], "steered") for s in seeds for side in (-1, 1)
    ]
    for frames, labels in study.stream(SceneJobs(jobs, cfg), "steered forks"):
        context, targets, _ = main.encode(frames)
        told = torch.stack([V.action_rows(label, cfg) for label in labels])[:, cfg.future_tubelets[0] :]
        found.append((context, main.reduce(main.soon(targets)).flatten(1), told.to(context.device)))
    return [torch.cat(parts) for parts in zip(*found)]


def steered_figures(study):
    """What actions change at forks that the own steering alone decides -> figures."""
    main, sizes, (context, soon, actions) = study.main, study.sizes, steered_latents(study)
    number = torch.arange(len(soon), device=soon.device)
    other = number ^ 1  # the sibling
    # of the next scene, every second time of its other branch: half of all are right by chance
    shuffled = ((number + 2) % len(soon)) ^ (number // 2 % 2)
    left, axis = soon[number - number % 2], soon[number - number % 2 + 1] - soon[number - number % 2]
    length, own = axis.square().sum(1).clamp_min(1e-12), (number % 2).cpu().numpy()
    told = dict(zip(STEERED_WAYS, (actions, None, actions[other], actions[shuffled])))
    place, rows = {}, {}  # 0 = left branch, 1 = right branch
    for way, given in told.items():
        parts = []
        draw = (context, main.model.flow_ema, sizes.num_samples, main.steps, study.seed)
        for first, samples in main.sample(*draw, given):
            part = slice(first, first + len(samples))
            away = main.reduce(samples).flatten(2) - left[part, None]
            parts.append((away * axis[part, None]).sum(2) / length[part, None])
        place[way] = torch.cat(parts).double().cpu().numpy()  # [2n, K]
    point = main.reduce(main.forecast(context, actions)).flatten(1) - left
    point = ((point * axis).sum(1) / length).cpu().numpy()
    share = {way: (rows > 0.5).mean(1) for way, rows in place.items()}
    score = {way: energy_score(rows[..., None], own[:, None].astype(float)) for way, rows in place.items()}
    entropy = {way: binary_entropy(share[way]) for way in STEERED_WAYS}
    flipped = ((share["true"] > 0.5) == own) & ((share["other branch"] > 0.5) != own)
    perfect = float(
        np.mean(binary_entropy(np.random.default_rng(0).binomial(sizes.num_samples, 0.5, 4000) / sizes.num_samples))
    )
    gains = {way: np.stack([score[way], score["passive"]], 1) for way in STEERED_WAYS}
    rows = {
        "steered_entropy": (entropy["true"], np.mean, {"shuffled actions": float(entropy["shuffled"].mean())}),
        "steered_entropy_passive": (entropy["passive"], np.mean, {"perfect sampler": perfect}),
        "steered_own": (
            np.abs(1 - own - share["true"]),
            np.mean,
            {"passive": np.abs(1 - own - share["passive"]).mean()},
        ),
        "steered_flip": (flipped, np.mean, {}),
        "steered_gain": (gains["true"], saved, {"actions of the other branch": saved(gains["other branch"])}),
        "steered_gain_shuffled": (gains["shuffled"], saved, {}),
        "steered_forecast": ((point > 0.5) == own, np.mean, {}),
    }
    groups, figures = (number // 2).cpu().numpy(), {}
    for name, (table, statistic, beside) in rows.items():
        figures |= measured(
            name, np.asarray(table, float), statistic, beside, sizes.resamples, groups, limits=STEERED_THRESHOLDS[name]
        )
    return figures


def clip_figures(study, meter, fit, test, pixels, fit_tasks, tasks):
    """Figures of mixed test clips of scenes or videos: skill, retrieval, sampling, gauges, probes -> (figures, curves).

    fit, test: the subjects' Latents; pixels: the pixel rows of both.
    """
    study.progress.stage("scores")
    resamples, side = study.sizes.resamples, study.main.reduce.side
    figures, skill = skill_figures(study, meter, tasks.groups)
    figures |= retrieval_figures(test[0], side[0] * side[1], tasks.groups, resamples)
    more, curves = sampling_figures(meter, test[0], tasks.groups)
    figures |= more | gauge_figures(meter)
    if tasks.names():
        places = probe_predictions(study, fit, test, pixels, fit_tasks, tasks, meter)
        figures |= probe_figures(places, tasks, resamples)
    return figures, {"skill": skill, **curves}


def scene_evaluation(study):
    """All figures on built-in scenes -> (figures, curves, what was measured on)."""
    main, cfg, sizes, seed, bad = study.main, study.cfg, study.sizes, study.seed, {}
    shares = dict(zip(V.SCENE_KINDS, V.mix_shares(cfg.scene_mix)))
    jobs = fit_jobs(seed, cfg, sizes, [kind for kind, share in shares.items() if share])
    order = np.random.default_rng(0).permutation(len(jobs))  # mixed: the first ones choose channels and fit a flow net
    batches = study.stream(SceneJobs([jobs[i] for i in order], cfg), "fitting scenes")
    fit, fit_pixels = collect(study.subjects, batches, bad, flow_clips=1024)
    fit_tasks = make_tasks(fit[0].labels, cfg, V.SCENE_MANEUVERS, True)
    study.progress.stage("spaces and probes", 2)
    for subject, latents in zip(study.subjects, fit):
        fit_readings(subject, latents, fit_tasks, sizes)
        study.progress.step()
    study.progress.stage("flow net on shuffled targets")
    main.flows["mean + noise"] = ResidualNoise(main.model.space)
    main.flows["shuffled targets"] = train_shuffled(main, fit[0], sizes, seed)
    figures, curves = odds_figures(study, shares)
    meter, jobs = Meter(study), [Job(set_seed(seed, "mix", number), 0) for number in range(sizes.mix_clips)]
    batches = study.stream(SceneJobs(jobs, cfg), "mixed scenes")
    test, test_pixels = collect(study.subjects, batches, bad, meter=meter)
    tasks = make_tasks(test[0].labels, cfg, V.SCENE_MANEUVERS, True)
    both = ({*SIGNALS, "maneuver", "branch"} - {"mover_u"}) & {*fit_tasks.names()} & {*tasks.names()}
    pixels = fit_pixels, test_pixels
    more, curve = clip_figures(study, meter, fit, test, pixels, fit_tasks.pick(both), tasks.pick(both))
    figures, curves = figures | more, curves | curve
    if shares["steady"]:
        more, curve = surprise_figures(study, shares)
        figures, curves = figures | more, curves | curve
    if shares["steered"] and {"steer", "yaw_rate"} & {*cfg.action_names}:
        figures |= steered_figures(study)
    return figures, curves, {"kind": "scenes", "scene_mix": cfg.scene_mix, "first_seed": EVAL_SEED + seed * 10**12}


def unreadable(source, which, bad):
    """UserError for a set of files of which none can be decoded; bad: {file: reason}."""
    first = "; ".join(next(iter(bad.items())))
    return V.UserError(f"data_root {source.root}: no {which} file can be decoded; the first: {first}")


def video_evaluation(study, source, split):
    """Figures on real videos: everything that needs no known odds -> (figures, curves, what was measured on)."""
    main, cfg, sizes, bad = study.main, study.cfg, study.sizes, {}
    if split == "test" and not source.test:
        raise V.UsageError(f"split = test: {source.root} has no test/ with videos (--split, --data_root)")
    dataset = source.dataset(cfg, "test" if split == "test" else "val")
    if split == "all":
        dataset.videos = source.train + [video for video in source.val if source.held_out]
    batches = study.stream(VideoClips(source.dataset(cfg, "bank"), sizes.fit_videos), "training videos")
    fit, fit_pixels = collect(study.subjects, batches, bad)
    if fit is None:
        raise unreadable(source, "training", bad)
    maneuvers = V.maneuver_names(source.train + source.val, source.root)
    fit_tasks = make_tasks(fit[0].labels, cfg, maneuvers, False)
    for subject, latents in zip(study.subjects, fit):
        fit_readings(subject, latents, fit_tasks, sizes)
    main.flows["mean + noise"] = ResidualNoise(main.model.space)
    meter, batches = Meter(study), study.stream(VideoClips(dataset, sizes.mix_clips), "test videos")
    test, test_pixels = collect(study.subjects, batches, bad, meter=meter)
    if test is None:
        raise unreadable(source, split, bad)
    tasks = make_tasks(test[0].labels, cfg, maneuvers, False)
    if split == "all":  # probes are tested on files that they were not fitted on
        seen = np.array([label["file"] < len(source.train) for label in test[0].labels])
        for column in (*tasks.values.values(), *tasks.classes.values()):
            column[seen] = math.nan if column.dtype.kind == "f" else -1
    both, pixels = {*fit_tasks.names()} & {*tasks.names()} & {*main.probes}, (fit_pixels, test_pixels)
    figures, curves = clip_figures(study, meter, fit, test, pixels, fit_tasks.pick(both), tasks.pick(both))
    data = {"kind": "videos", "root": source.root, "split": split, "files": len(dataset.videos)}
    data |= {"clips": len(test[0].labels), "held_out": source.held_out and split != "all", "bad_files": bad}
    return figures, curves, data


def controls_must_fail(figures):
    """Which figures made to catch a control it fails -> {control: {tests, failed, passed}}; passed: at least one."""
    verdicts = {}
    for control, names in CONTROL_TESTS.items():
        beside = {name: figures[name]["controls"] for name in names if name in figures}
        met = {name: meets(own[control], THRESHOLDS[name]) for name, own in beside.items() if control in own}
        tests = [name for name, ok in met.items() if ok is not None]
        if tests:
            failed = [name for name in tests if not met[name]]
            verdicts[control] = {"tests": tests, "failed": failed, "passed": bool(failed)}
    return verdicts


def without_nan(value):
    """The same nested value with None for every number that is not finite, numpy's numbers as plain ones."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# module -> what pip calls it, where the two differ
PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "PIL": "pillow"}


def need(*modules):
    """UserError with the command that installs them when modules of the extra `eval` are missing."""
    missing = [PACKAGES.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise V.UserError(f'{", ".join(missing)} not installed: pip install "vjepa-auto-v2[eval]"')


def untrained_twin(model):
    """A new model of the same sizes in eval mode, none of whose weights were read anywhere."""
    cfg = replace(model.cfg, freeze_encoder=False, teacher="ema", init_from="")
    return type(model)(cfg).to(next(model.parameters()).device).eval()


def evaluate(model, sizes=FULL, source=None, split="val", seed=0, num_workers=2, progress=None):
    """Measure a world model on its device -> the content of evaluation.json, less the checkpoint's path and step.

    source: a V.DataSource of real videos; built-in scenes without one. Global random state is left as it was.
    """
    progress, device = progress or Progress(quiet=True), model.image_mean.device
    need("sklearn")
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        fresh = untrained_twin(model)
        process = own_precision(model.cfg, device)
        # a fresh flow net returns the point forecast in any number of steps
        subjects = [Subject(model, process), Subject(fresh, process, steps=1)]
        study = Study(subjects, sizes, seed, num_workers, progress)
        found = scene_evaluation(study) if source is None else video_evaluation(study, source, split)
    figures, curves, data = found
    progress.close()
    judged = [figure["passed"] for figure in figures.values() if figure["passed"] is not None]
    report = {"data": data, "seed": seed, "sizes": asdict(sizes), "figures": figures}
    report |= {"controls_must_fail": controls_must_fail(figures), "curves": curves}
    return without_nan({**report, "summary": f"{sum(judged)} of {len(judged)} thresholds met"})


# ---------------------------------------------------------------------------------------------------------------------
# 11  Page: evaluation.json's content -> one HTML file
# ---------------------------------------------------------------------------------------------------------------------

# told apart by most colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#222222")
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top;
  overflow-wrap: anywhere; }
.num { white-space: nowrap; font-variant-numeric: tabular-nums; }
.met { color: #00734f; font-weight: 600; } .missed { color: #b03a00; font-weight: 600; } .plain { color: #666; }
.figure { margin: 1rem 0; } .figure h3 { font-size: 1rem; margin: 0; } .figure p { margin: .2rem 0; }
.beside { color: #555; font-size: .88rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem; }
figure { margin: 0 0 1rem; } figcaption { font-size: .88rem; color: #444; }
svg { width: 100%; height: auto; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } .wide img { min-width: 44rem; }
.key { display: inline-block; margin-right: .8rem; font-size: .85rem; white-space: nowrap; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
"""
NAMED = {  # the same thing has the same colour in every chart
    **dict.fromkeys(("model", "sampled share", "best of k, model"), "#0072B2"),
    **dict.fromkeys(("real futures", "true odds"), "#222222"),
    **dict.fromkeys(("mean + noise", "best of k, mean + noise"), "#E69F00"),
    **dict.fromkeys(("point forecast", "point forecast's place"), "#009E73"),
    **{"shuffled targets": "#CC79A7", "untrained encoder": "#777777"},
    **dict.fromkeys(("persistence", "standing still"), "#D55E00"),
    **{"linear extrapolation": "#56B4E9", "ceiling": "#222222"},
}
CHART = (52, 392, 10, 218)  # left, right, top, bottom of the axes inside 400 x 256 units


def short(value):
    """A number for the page, a dash for none."""
    return "-" if value is None else f"{value:.3g}"


def safe(text):
    """Text with everything escaped that HTML would read."""
    return html.escape(str(text))


def nice_ticks(low, high, count=5):
    """About `count` round numbers between low and high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * number, 10) for number in range(first, last + 1)]


def svg_line(x1, y1, x2, y2, colour, dashed=False):
    """A straight line."""
    pattern = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{pattern}/>'


def svg_text(x, y, text, anchor="middle", size=11, turned=False):
    """Text at a place, turned by a quarter for the vertical axis."""
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if turned else f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} text-anchor="{anchor}" font-size="{size}">{safe(text)}</text>'


def chart_frame(x_range, y_range, x_ticks, x_label, y_label):
    """Axes of a chart -> (SVG parts, (x0, x_scale, y0, y_scale)): a value v stands at x0 + v * x_scale."""
    left, right, top, bottom = CHART
    x_scale = (right - left) / max(x_range[1] - x_range[0], 1e-12)
    y_scale = (bottom - top) / max(y_range[1] - y_range[0], 1e-12)
    x0, y0 = left - x_range[0] * x_scale, bottom + y_range[0] * y_scale
    parts = [svg_line(left, bottom, right, bottom, "#999")]
    for tick in nice_ticks(*y_range):
        y = y0 - tick * y_scale
        parts += [svg_line(left, y, right, y, "#eee"), svg_text(left - 5, y + 4, f"{tick:g}", "end")]
    parts += [svg_text(x0 + place * x_scale, bottom + 15, text) for place, text in x_ticks]
    parts.append(svg_text((left + right) / 2, 250, x_label, size=12))
    parts.append(svg_text(13, (top + bottom) / 2, y_label, size=12, turned=True))
    return parts, (x0, x_scale, y0, -y_scale)


def colours_of(names):
    """One colour per series: its own where it has one, else the next free one -> list."""
    free = iter([colour for colour in COLOURS if colour not in {NAMED.get(name) for name in names}])
    return [NAMED.get(name) or next(free) for name in names]


def figure_tag(parts, names, caption):
    """SVG parts, the names of its series and a caption as one <figure>."""
    colours, keys = colours_of(names), ""
    for name, colour in zip(names, colours):
        keys += f'<span class="key"><i style="background:{colour}"></i>{safe(name)}</span>'
    picture = f'<svg viewBox="0 0 400 256" role="img" aria-label="{safe(caption)}">{"".join(parts)}</svg>'
    return f"<figure>{picture}<div>{keys}</div><figcaption>{safe(caption)}</figcaption></figure>"


def known_values(series):
    """All values of series {name: [y]} that are known -> list."""
    return [value for values in series.values() for value in values if value is not None]


def line_chart(x, series, labels, caption, diagonal=False, level=None, steps=False, log_x=False):
    """Lines over x {name: [y], None where unknown} with labels of both axes -> <figure>.

    diagonal: dashed y = x; level: dashed height; steps: the outline of a histogram; log_x: equal steps per doubling.
    """
    known = known_values(series) + ([0, 1] if diagonal else [] if level is None else [level])
    low, high = min(0.0, *known), max(known)
    places = [math.log2(value) for value in x] if log_x else list(x)
    marks = zip(places, x) if len(x) <= 10 else ((tick, tick) for tick in nice_ticks(min(x), max(x)))
    ticks, x_range = [(place, f"{mark:g}") for place, mark in marks], (0, 1) if diagonal else (min(places), max(places))
    parts, (x0, x_scale, y0, y_scale) = chart_frame(x_range, (low, high + 0.05 * (high - low)), ticks, *labels)
    if diagonal:
        parts.append(svg_line(x0, y0, x0 + x_scale, y0 + y_scale, "#999", True))
    if level is not None:
        parts.append(svg_line(CHART[0], y0 + level * y_scale, CHART[1], y0 + level * y_scale, "#999", True))
    for colour, values in zip(colours_of(series), series.values()):
        points = [(x0 + place * x_scale, y0 + y * y_scale) for place, y in zip(places, values) if y is not None]
        dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        if steps:
            points, dots = [(a, y) for (left, y), (right, _) in zip(points, points[1:]) for a in (left, right)], []
        corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts += [f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{corners}"/>', *dots]
    return figure_tag(parts, series, caption)


def bar_chart(categories, series, y_label, caption, level=None):
    """Groups of bars, one per category, one bar per series {name: [y]} -> <figure>. level: dashed height."""
    known = known_values(series) + ([] if level is None else [level])
    ticks, y_range = [(n + 0.5, name) for n, name in enumerate(categories)], (min(0.0, *known), 1.05 * max(known))
    parts, (x0, x_scale, y0, y_scale) = chart_frame((0, len(categories)), y_range, ticks, "", y_label)
    width = 0.8 / len(series)
    for place, (colour, values) in enumerate(zip(colours_of(series), series.values())):
        for number, value in enumerate(values):
            if value is not None:
                x, (top, bottom) = x0 + (number + 0.1 + place * width) * x_scale, sorted((y0 + value * y_scale, y0))
                shape = f'width="{width * x_scale * 0.92:.1f}" height="{bottom - top:.1f}"'
                parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" {shape} fill="{colour}"/>')
    if level is not None:
        parts.append(svg_line(CHART[0], y0 + level * y_scale, CHART[1], y0 + level * y_scale, "#333", True))
    return figure_tag(parts, series, caption)


def fork_charts(curves):
    """Calibration curve and histogram of branch coordinates -> list of <figure>."""
    if "calibration" not in curves:
        return []
    told, places = curves["calibration"], dict(curves["branch_coordinate"])
    edges, series = places.pop("edges"), {"sampled share": told["share"], "point forecast's place": told["point"]}
    labels = ("true odds of the right branch", "share to the right")
    caption = "Calibration over the five signs: samples belong on the dashed line."
    odds = line_chart(told["odds"], series, labels, caption, diagonal=True)
    outlines = {name: [*values, values[-1]] for name, values in places.items()}
    caption = "Even forks: real futures stand at 0 and 1, and so must samples; mean + noise fills the middle."
    return [
        odds,
        line_chart(edges, outlines, ("place between the branches (0 left, 1 right)", "share"), caption, steps=True),
    ]


def charts(curves):
    """All charts that the curves allow -> list of <figure>."""
    skill, best, found = dict(curves["skill"]), dict(curves["best_of_k"]), []
    caption = "Point skill per tubelet: above 0 the forecast beats the reference."
    found.append(line_chart(skill.pop("tubelet"), skill, ("SOON tubelet", "error saved"), caption, level=0))
    found += fork_charts(curves)
    for name, what in (("pooled_ranks", "pooled latent space"), ("gap_ranks", "the distance to a braking car")):
        if name in curves:
            shares = dict(curves[name])
            bins = shares.pop("bin")
            caption = f"Rank of the truth among samples in {what}: flat is right, a U too narrow, a hill too wide."
            found.append(bar_chart(bins, shares, "share", caption, level=1 / len(bins)))
    caption = "Best of K samples, and mean of K: the model's best should fall below that of mean + noise."
    found.append(line_chart(best.pop("k"), best, ("K", "error"), caption, log_x=True))
    if "surprise" in curves:
        twins, rows = [twin.replace("_", " ") for twin in curves["surprise"]], list(curves["surprise"].values())
        series = {name: [row[name] for row in rows] for name in rows[0]}
        caption = "Telling impossible from possible twins: the dashed line is chance."
        found.append(bar_chart(twins, series, "accuracy", caption, level=0.5))
    for kind, shares in curves.get("lane_odds", {}).items():
        told = [float(p) for p in kind.removeprefix("odds ").split(" / ")]
        series = {"true odds": told, "sampled share": shares["model"], "mean + noise": shares["mean + noise"]}
        caption = f"Lane scenes with {kind} of left / keep / right ({shares['n']} scenes)."
        found.append(bar_chart(("left", "keep", "right"), series, "share", caption))
    return found


def fork_strip(cfg, seed):
    """NOW and SOON of one even fork, with its left and its right future, as a PNG -> <figure>."""
    from PIL import Image

    scene_seed = fork_seeds(seed, "picture", cfg, 0.5, 1)[0]
    end, rows, buffer = cfg.now_frames + cfg.soon_frames, [], io.BytesIO()
    drawn = replace(cfg, scene_size=max(112, min(cfg.height, cfg.width)))
    shown = np.linspace(0, end - 1, min(end, 8)).round().astype(int)
    for side in (-1, 1):
        frames, _ = V.scene(scene_seed, futures_where(scene_seed, cfg, "fork", "choice", side, 1)[0], drawn, "fork")
        greys = [255 if t >= cfg.now_frames else 120 for t in shown]
        framed = [np.pad(frames[t], ((3, 3), (3, 3), (0, 0)), constant_values=grey) for t, grey in zip(shown, greys)]
        rows.append(np.concatenate(framed, 1))
    Image.fromarray(np.concatenate(rows)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = (
        f"One present, two futures at odds 0.5: the first {int((shown < cfg.now_frames).sum())} pictures of each row "
        "(grey border) are NOW and equal bit for bit; then SOON, left branch above, right branch below."
    )
    picture = f'<img alt="two futures of one fork" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{picture}</div><figcaption>{safe(caption)}</figcaption></figure>'


def figure_card(name, figure):
    """One figure with its sentence and what stands beside it -> HTML."""
    interval = f" [{short(figure['interval'][0])}, {short(figure['interval'][1])}]" if figure["interval"] else ""
    beside = "; ".join(f"{control} {short(value)}" for control, value in figure["controls"].items())
    return (
        f'<div class="figure" id="{safe(name)}"><h3>{safe(name)}: {short(figure["value"])}{interval}</h3>'
        f"<p>{safe(figure['reading'])}</p>"
        + (f'<p class="beside">Beside it: {safe(beside)}.</p>' if beside else "")
        + f'<p class="beside">n = {figure["n"]}</p></div>'
    )


VERDICTS = {True: ("met", "&#10003; met"), False: ("missed", "&#10007; missed"), None: ("plain", "")}


def summary_table(figures):
    """Figures with a threshold, then the rest -> <table>."""
    rows = []
    for name, figure in sorted(figures.items(), key=lambda item: item[1]["expect"] is None):
        word, mark = VERDICTS[figure["passed"]]
        rows.append(
            f'<tr><td><a href="#{safe(name)}">{safe(name)}</a></td><td class="num">{short(figure["value"])}</td>'
            f'<td class="num">{safe(figure["expect"] or "")}</td><td class="num {word}">{mark}</td></tr>'
        )
    return f"<table><tr><th>figure</th><th>value</th><th>asked for</th><th></th></tr>{''.join(rows)}</table>"


def control_table(verdicts):
    """Which tests every control fails -> <table>."""
    rows = []
    for control, verdict in verdicts.items():
        word, mark = "missed", "&#10007; passes everything"
        if verdict["passed"]:
            word, mark = "met", "&#10003; fails, as it must"
        failed = f"{len(verdict['failed'])} of {len(verdict['tests'])}: {', '.join(verdict['failed'])}"
        rows.append(f'<tr><td>{safe(control)}</td><td class="{word}">{mark}</td><td>{safe(failed)}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def write_html(path, body):
    """Parts of a page's body as one self-contained HTML file."""
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    V.write_own(path, lambda handle: handle.write(f"{page}<!-- {V.MARK} -->\n".encode()))


def write_page(report, cfg, path):
    """The report as one self-contained HTML file."""
    where = {"scenes": "built-in scenes that no training saw", "videos": "real videos"}[report["data"]["kind"]]
    strip = fork_strip(cfg, report["seed"]) if "branch_coordinate" in report["curves"] else ""
    controls = f"<h2>Controls that must fail</h2>{control_table(report['controls_must_fail'])}"
    body = [
        f"<h1>Evaluation: {safe(report['summary'])}</h1>",
        f"<p>Checkpoint {safe(report.get('checkpoint', ''))}, step {safe(report.get('step', ''))}, on {where}. "
        "Intervals are 95 % bootstrap intervals over scenes or files. A figure says little alone: read it with what "
        "stands beside it.</p>",
        f"<h2>Summary</h2>{summary_table(report['figures'])}",
        controls if report["controls_must_fail"] else "",
        f'<h2>Charts</h2>{strip}<div class="charts">{"".join(charts(report["curves"]))}</div>',
        f"<h2>Every figure</h2>{''.join(figure_card(name, figure) for name, figure in report['figures'].items())}",
    ]
    write_html(path, body)


# ---------------------------------------------------------------------------------------------------------------------
# 12  Command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> namespace."""
    path = dict(default="", type=os.path.expanduser)
    about = "Measure a checkpoint and write evaluation.json and evaluation.html."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, type=os.path.expanduser, help="checkpoint file of VJepa_AUTO_V2.py")
    parser.add_argument("--init_from", **path, help="where the frozen weights of the run are, if they were moved")
    parser.add_argument("--data_root", **path, help="real videos (folder, video or list) instead of built-in scenes")
    split = "of videos: held-out files, those of test/, or all [val; of a world that predicts frames test, else val]"
    parser.add_argument("--split", choices=("val", "test", "all"), default="", help=split)
    horizon = "of a world that predicts frames: steps to predict [the horizon that it learned]"
    parser.add_argument("--horizon", type=int, default=0, help=horizon)
    parser.add_argument("--out", **path, help="folder to write into [the run's folder]")
    parser.add_argument("--quick", action="store_true", help="a fifth of the scenes: wide intervals, about a minute")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="other scenes, other samples [0]")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that render or decode [2]")
    args = parser.parse_args(argv)
    if args.seed < 0 or args.num_workers < 0:
        parser.error("--seed and --num_workers must not be negative")
    return args


def predicts_frames(model):
    """Whether a world is one of those that tools/rollout.py measures and shows."""
    members = (getattr(model, name, None) for name in ("encode", "decode"))
    other = not isinstance(model, V.VJepaAutoV2) and issubclass(model.Dataset, V.ClipDataset)
    return other and all(map(callable, members))


def load_world(path, device, init_from=""):
    """A checkpoint of any world -> (model on the device, its config, {step, data}); data: kind and root of what it
    learned from."""
    if not os.path.lexists(path):
        raise V.UsageError(f"ckpt {path}: no such checkpoint")
    try:
        model, cfg = V.load_model(path, V.choose_device(device, 0), init_from=init_from)
    except (RuntimeError, KeyError) as error:  # names or shapes of the weights differ
        why = str(error).strip().splitlines()[0]
        raise V.UserError(f"ckpt {path}: made by another version of VJepa_AUTO_V2.py ({why})") from error
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return model, cfg, {"step": int(state["step"]), "data": state["data"]}


def check_world(model, path):
    """UserError unless a checkpoint's model is a VJepaAutoV2."""
    if not isinstance(model, V.VJepaAutoV2):
        what = f"made by the world {type(model).__name__}; this tool looks into VJepaAutoV2 alone"
        if predicts_frames(model):
            what = f"the world {type(model).__name__} predicts frames: python tools/futures.py rollout --ckpt {path}"
        raise V.UserError(f"ckpt {path}: {what}")


def open_checkpoint(path, device, init_from=""):
    """`load_world` of a VJepaAutoV2. UserError for another world."""
    model, cfg, about = load_world(path, device, init_from)
    check_world(model, path)
    return model, cfg, about


def videos_of(data, data_root):
    """Where videos are: those of a run, {kind, root}, or those given instead -> path. UsageError where it is gone."""
    root = data_root or data["root"]
    if not root:
        raise V.UsageError("data_root: this run learned from no videos; say where some are (--data_root)")
    if not os.path.exists(root):
        gone = "" if data_root else ", the run's videos are gone; say where they are (--data_root)"
        raise V.UsageError(f"data_root {root}: no such file or folder{gone}")
    return root


def check_limits(args, limits):
    """UsageError for a flag outside its {name: (low, high)}; None, where none was given, is inside."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise V.UsageError(f"{name} = {value}: must lie in {low} to {high} (--{name})")


def open_videos(cfg, root, world=V.VJepaAutoV2):
    """Videos under a root: folder, video or list -> (V.DataSource of a world, its class; config that names them).
    UsageError for none."""
    cfg = replace(cfg, data_root=root, missing_data="error")
    videos = V.list_data(cfg)
    source = V.open_data(world, cfg, videos, True, None)
    for note in V.data_notes(cfg, videos, source):
        V.say(note, sys.stderr)
    return source, cfg


def run_folder(checkpoint):
    """Folder of the run that a checkpoint belongs to: above checkpoints/, else the file's own."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def print_table(report):
    """Figures with thresholds on standard output, then the summary."""
    for name, figure in report["figures"].items():
        if figure["expect"]:
            mark = {True: "met", False: "MISSED", None: "not measured"}[figure["passed"]]
            V.say(f"{name:<24}{short(figure['value']):>10}  {figure['expect']:<16}{mark}")
    for control, verdict in report["controls_must_fail"].items():
        fails = f"fails {', '.join(verdict['failed'])}"
        V.say(f"control {control}: {fails if verdict['passed'] else 'PASSES every test made for it'}")
    V.say(report["summary"])


def run(args, sizes):
    """Load, measure, write, print -> exit code."""
    model, cfg, about = load_world(args.ckpt, args.device, args.init_from)
    if predicts_frames(model):
        import rollout  # it imports this file

        return rollout.run(model, cfg, about, args)
    check_world(model, args.ckpt)
    if args.horizon:
        raise V.UsageError("horizon: VJepaAutoV2 forecasts SOON, of a fixed length; leave --horizon out")
    source, split = None, args.split or "val"
    if args.data_root:
        source, cfg = open_videos(cfg, args.data_root)
        model.cfg = cfg
    elif cfg.data_root:
        note = "note: this run learned from videos; without --data_root it is measured on built-in scenes, "
        V.say(note + "which it never saw", sys.stderr)
    out = Path(args.out) if args.out else run_folder(args.ckpt)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    report = {"checkpoint": str(args.ckpt), "step": about["step"]}
    report |= evaluate(model, sizes, source, split, args.seed, args.num_workers, progress)
    report["seconds"] = round(progress.seconds, 1)
    V.write_report(out / "evaluation.json", report)
    write_page(report, cfg, out / "evaluation.html")
    print_table(report)
    V.say(f"written: {out / 'evaluation.json'}, {out / 'evaluation.html'} ({report['seconds']:.0f} s)")
    return V.EXIT_OK


def main(argv=None):
    """Command line -> exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return V.report_errors(run, args, QUICK if args.quick else FULL)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
