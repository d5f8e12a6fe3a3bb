"""tools/evaluate.py: its scores against closed forms, its fork tests in a world with known odds, the command and its
page."""

import html.parser
import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, V, needs, small_config
from training import fill_space, new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))

import evaluate as E  # noqa: E402

needs("sklearn")

SMALL = E.Sizes(
    fit_forks=8,
    fit_clips=10,
    fork_scenes=4,
    siblings=4,
    sign_scenes=1,
    brake_scenes=3,
    brake_siblings=3,
    kind_scenes=4,
    mix_clips=12,
    twin_scenes=4,
    rare_scenes=2,
    fit_videos=8,
    num_samples=4,
    surprise_samples=6,
    surprise_steps=1,
    shuffled_steps=2,
    shuffled_batch=4,
    probe_epochs=1,
    components=8,
    resamples=10,
    batch=16,
)
DELTA, NOISE, DIMS, K = (
    2.0,
    0.1,
    8,
    32,
)  # the synthetic world: distance of the branches, deviation within a branch, numbers per future, samples

# -- a world of two branches with known odds


def futures(rng, centre, axis, odds, count):
    """Draws of the world's own law around a fork -> (points [count, DIMS], sides [count])."""
    side = np.where(rng.random(count) < odds, 1, -1)
    return centre + side[:, None] * axis / 2 + NOISE * rng.standard_normal((count, DIMS)), side


def sampled(rng, kind, centre, axis, odds):
    """K samples of one kind of forecaster [K, DIMS]."""
    noise = rng.standard_normal((K, DIMS))
    if kind == "oracle":
        return futures(rng, centre, axis, odds, K)[0]
    if kind == "one mode":
        return centre + axis / 2 + NOISE * noise
    if kind == "mean + noise":  # the residual's covariance over all scenes, whose axes point anywhere
        return centre + math.sqrt(DELTA**2 / 4 / DIMS + NOISE**2) * noise
    if kind == "0.8 at even forks":
        return futures(rng, centre, axis, 0.8 if odds == 0.5 else odds, K)[0]
    assert kind == "0.5 at all forks"
    return futures(rng, centre, axis, 0.5, K)[0]


def fork_world(kind, num_even=60, num_sign=40, knows_side=False, seed=0):
    """Readings of scenes with their own axis each, sampled by one kind of forecaster; the point forecast is a
    median."""
    rng, readings = np.random.default_rng(seed), []
    for odds, count in ((0.5, num_even), *((p, num_sign) for p in (0.1, 0.3, 0.7, 0.9))):
        for _ in range(count):
            centre, axis = rng.standard_normal(DIMS), rng.standard_normal(DIMS)
            axis *= DELTA / np.linalg.norm(axis)
            real, side = futures(rng, centre, axis, 0.5, 10)
            if odds != 0.5:
                side = np.array([-1, -1, 1, 1])
                real = centre + side[:, None] * axis / 2 + NOISE * rng.standard_normal((4, DIMS))
            point = centre + axis * (np.sign(odds - 0.5) / 2 if odds != 0.5 else side[0] / 2 if knows_side else 0.0)
            samples = {
                "model": sampled(rng, kind, centre, axis, odds),
                "mean + noise": sampled(rng, "mean + noise", centre, axis, odds),
            }
            readings.append(E.Reading(odds, real, side, 10 if odds == 0.5 else 0, point, samples))
    return readings


def fork_passes(kind, **world):
    """Which fork figures a forecaster passes -> {figure: True or False}."""
    figures = E.fork_figures(fork_world(kind, **world), E.Sizes(resamples=20), {})
    return {name: figure["passed"] for name, figure in figures.items()}


def test_an_oracle_passes_every_fork_test():
    """Samples of the world's own law meet all thresholds, and nearly reach what real futures score."""
    readings = fork_world("oracle")
    figures = E.fork_figures(readings, E.Sizes(), {"mean + noise": None})
    assert all(figure["passed"] for figure in figures.values()), {
        name: figure["value"] for name, figure in figures.items() if not figure["passed"]
    }
    assert len(figures) == 12
    assert figures["es_vs_oracle"]["value"] == pytest.approx(1, abs=0.08)
    for name in ("fork_deviation", "es_skill_point", "es_skill_noise", "near_real", "between_share"):
        assert figures[name]["value"] == pytest.approx(figures[name]["controls"]["perfect sampler"], abs=0.04), name
    assert (
        figures["calibration_slope"]["controls"]["mean + noise"] == pytest.approx(0, abs=0.3)
        and figures["es_skill_noise"]["controls"]["mean + noise"] == 0
    )
    low, high = figures["fork_share"]["interval"]
    assert low < figures["fork_share"]["value"] < high < low + 0.1


def test_near_a_real_branch_is_said_with_what_it_was_measured_with():
    """Radius, distance of samples and distance between branches stand beside near_real: an oracle's samples keep the
    world's own distance, and a world told more finely makes the radius smaller, not the samples' distance."""
    scale = E.fork_figures(fork_world("oracle"), E.Sizes(resamples=2), {})["near_real"]
    typical = NOISE * math.sqrt(DIMS)
    assert scale["branch_distance"] == pytest.approx(DELTA, rel=0.1)
    assert 0.8 * typical < scale["sample_distance"] < 1.2 * typical
    assert 1.5 * typical < scale["radius"] < 3.5 * typical
    finer = fork_world("oracle")
    for reading in finer:
        for side in (-1, 1):
            own = reading.real[reading.side == side]
            reading.real[reading.side == side] = own.mean(0) + (own - own.mean(0)) / 3
    told = E.fork_figures(finer, E.Sizes(resamples=2), {})["near_real"]
    assert told["radius"] == pytest.approx(scale["radius"] / 3) and told["value"] < 0.7 < scale["value"]
    assert told["sample_distance"] == pytest.approx(scale["sample_distance"])


@pytest.mark.parametrize(
    "kind, failed, passed",
    [
        (
            "one mode",
            ("fork_share", "fork_deviation", "es_skill_point", "es_vs_oracle", "calibration_slope"),
            ("near_real", "between_share"),
        ),
        (
            "mean + noise",
            ("between_share", "near_real", "es_skill_noise", "es_vs_oracle", "calibration_slope"),
            ("fork_share",),
        ),
        ("0.8 at even forks", ("fork_share", "fork_deviation"), ("near_real", "between_share")),
        (
            "0.5 at all forks",
            ("calibration_slope", "calibration_intercept", "calibration_ece"),
            ("fork_share", "fork_deviation", "near_real", "es_vs_oracle"),
        ),
    ],
)
def test_a_wrong_forecaster_fails_the_tests_made_for_it(kind, failed, passed):
    """Seen red with the share counted as > 0.5 of the samples' mean, and with the near radius multiplied by 15."""
    verdicts = fork_passes(kind)
    assert not any(verdicts[name] for name in failed), [name for name in failed if verdicts[name]]
    assert all(verdicts[name] for name in passed), [name for name in passed if not verdicts[name]]


def test_a_forecast_that_knows_the_future_is_a_leak():
    """no_leak is red when the point forecast stands at the realised branch, or when NOW frames differ; hedging with the
    first."""
    assert fork_passes("oracle")["no_leak"] and fork_passes("oracle")["hedging"]
    knowing = fork_passes("oracle", knows_side=True)
    assert knowing["no_leak"] is False and knowing["hedging"] is False
    readings = fork_world("oracle", num_even=40, num_sign=2)
    readings[3] = replace(readings[3], same_now=False)
    assert E.fork_figures(readings, E.Sizes(resamples=20), {})["no_leak"]["passed"] is False


def test_controls_that_pass_everything_are_reported():
    """controls_must_fail is red for a control as good as an oracle and green for real ones; untested figures count
    nothing."""
    readings, good = fork_world("oracle"), fork_world("oracle", seed=1)
    figures = E.fork_figures(readings, E.Sizes(resamples=5), {"shuffled targets": good, "mean + noise": None})
    verdicts = E.controls_must_fail(figures)
    assert verdicts["shuffled targets"] == {
        "tests": list(E.CONTROL_TESTS["shuffled targets"]),
        "failed": [],
        "passed": False,
    }
    assert verdicts["mean + noise"]["passed"] and set(verdicts["mean + noise"]["failed"]) == {
        "between_share",
        "near_real",
        "es_vs_oracle",
    }
    assert "untrained encoder" not in verdicts


def test_the_charts_of_a_fork_world():
    """Calibration per sign and normalised histograms: real futures at the ends, mean + noise in the middle."""
    curves = E.fork_curves(fork_world("oracle"), ("model", "mean + noise"))
    assert curves["calibration"]["odds"] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert np.allclose(curves["calibration"]["share"], curves["calibration"]["odds"], atol=0.05)
    edges = np.array(curves["branch_coordinate"]["edges"])
    middle = (edges[:-1] > 0.24) & (edges[1:] < 0.76)
    inside = {
        name: np.array(values)[middle].sum() for name, values in curves["branch_coordinate"].items() if name != "edges"
    }
    assert (
        inside["real futures"] < 0.02
        and inside["model"] < 0.02
        and inside["mean + noise"] > 0.5
        and inside["point forecast"] == 1
    )


# -- scores against closed forms


def test_energy_score_of_a_fork():
    """Point forecast delta / 2, fair oracle delta / 4, Gaussian of the fork's own spread 0.3012 delta: so the skill of
    a perfect sampler is at most 0.5 against a point and 0.17 against such noise."""
    rng, n = np.random.default_rng(0), 3000
    truth, draws = (rng.integers(0, 2, shape) * DELTA for shape in ((n, 1), (n, 8, 1)))
    assert np.allclose(E.energy_score(np.full((n, 1, 1), DELTA / 2), truth.astype(float)), DELTA / 2)
    assert E.energy_score(np.zeros((n, 1, 1)), truth.astype(float)).mean() == pytest.approx(DELTA / 2, rel=0.05)
    fair, unfair = (E.energy_score(draws.astype(float), truth.astype(float), fair).mean() for fair in (True, False))
    assert fair == pytest.approx(DELTA / 4, rel=0.05)  # standard error about 0.4 %
    assert unfair == pytest.approx(DELTA / 4 * (1 + 1 / 8), rel=0.05)
    gauss = E.energy_score(DELTA / 2 * (1 + rng.standard_normal((n, 24, 1))), truth.astype(float)).mean()
    assert gauss == pytest.approx(0.3012 * DELTA, rel=0.03)


@pytest.mark.slow
def test_energy_score_is_unbiased_in_the_number_of_samples():
    """Three samples score like fifteen on average, in several dimensions; seen red with K * K in the fair branch."""
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((2500, 3))
    few, many = (E.energy_score(rng.standard_normal((2500, k, 3)), truth).mean() for k in (3, 15))
    assert few == pytest.approx(many, rel=0.04)
    assert E.oracle_score(rng.standard_normal((400, 3))) == pytest.approx(many, rel=0.08)
    assert math.isnan(E.oracle_score(truth[:2]))


def test_calibration_by_hand():
    """Shares 0.2 + 0.5 p: slope 0.5, intercept 0.2, ece the mean of |0.2 - 0.5 p|."""
    odds = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 4)
    slope, intercept, ece = E.calibration(0.2 + 0.5 * odds, odds)
    assert (slope, intercept, ece) == pytest.approx((0.5, 0.2, np.mean([0.15, 0.05, 0.05, 0.15, 0.25])))
    assert E.calibration(odds, odds) == pytest.approx((1, 0, 0))


def test_binomial_deviation():
    """K = 1 always says 0 or 1; K = 32 gives the 0.070 that a perfect sampler shows."""
    assert E.binomial_deviation(1) == 0.5
    assert E.binomial_deviation(32) == pytest.approx(0.0699, abs=5e-4)


def test_coverage_and_ranks_tell_narrow_from_right():
    """A truth of the samples' own law is covered 80 % of the time at K = 32 with even ranks; narrow and shifted
    samplers are caught.

    Seen red with numpy's default quantile, which covers 75 %.
    """
    rng, n = np.random.default_rng(2), 8000
    truth = rng.standard_normal(n)
    right, narrow, shifted = (
        rng.standard_normal((n, 32)),
        0.5 * rng.standard_normal((n, 32)),
        1 + rng.standard_normal((n, 32)),
    )
    assert E.coverage(right, truth).mean() == pytest.approx(0.8, abs=0.015)
    assert E.coverage(narrow, truth).mean() < 0.55
    shares, chance = E.rank_test(E.truth_ranks(right, truth), 32)
    assert len(shares) == 11 and shares.sum() == pytest.approx(1) and chance > 0.001
    for wrong in (narrow, shifted):
        assert E.rank_test(E.truth_ranks(wrong, truth), 32)[1] < 1e-6
    assert E.rank_test(E.truth_ranks(narrow, truth), 32)[0][0] > 2 / 11
    ties = E.truth_ranks(np.zeros((n, 32)), np.zeros(n))
    assert ties.min() == 0 and ties.max() == 32 and E.rank_test(ties, 32)[1] > 0.001


def test_best_of_k_is_the_mean_over_all_choices():
    """Against brute force over all subsets."""
    distances = np.random.default_rng(3).random((5, 6))
    brute = [
        [np.mean([min(row[list(chosen)]) for chosen in itertools.combinations(range(6), k)]) for k in (1, 2, 5, 6)]
        for row in distances
    ]
    assert np.allclose(E.best_of(distances, (1, 2, 5, 6)), brute)


def test_scores_agree_with_scikit_learn():
    """AUROC (with ties and direction), macro-F1, R2, accuracy."""
    from sklearn import metrics

    rng = np.random.default_rng(4)
    positive, negative = rng.integers(2, 8, 40), rng.integers(0, 6, 30)
    known = metrics.roc_auc_score([1] * 40 + [0] * 30, [*positive, *negative])
    assert E.auroc(positive, negative) == pytest.approx(known) and known > 0.5
    assert E.auroc(negative, positive) == pytest.approx(1 - known)
    rows = np.stack([rng.integers(0, 4, 200), rng.integers(0, 4, 200)], 1)
    assert E.macro_f1(rows) == pytest.approx(metrics.f1_score(rows[:, 0], rows[:, 1], average="macro"))
    assert E.accuracy(rows) == pytest.approx(metrics.accuracy_score(rows[:, 0], rows[:, 1]))
    values = rng.standard_normal((50, 2))
    assert E.r2(values) == pytest.approx(metrics.r2_score(values[:, 0], values[:, 1]))
    assert E.pair_accuracy(np.array([1, 2, 3]), np.array([0, 2, 4])).tolist() == [1, 0.5, 0]


def test_retrieval_ranks():
    """The own candidate nearest is rank 1; the number of nearer ones counts; duplicates share their places."""
    candidates = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert E.retrieval_ranks(candidates, candidates).tolist() == [1, 1, 1, 1]
    assert E.retrieval_ranks(np.array([[3.2], [1.1], [1.9], [0.4]]), candidates).tolist() == [4, 1, 1, 4]
    assert E.retrieval_ranks(np.zeros((3, 1)), np.zeros((3, 1))).tolist() == [2, 2, 2]


def test_bootstrap_intervals_cover():
    """About 95 % of intervals of a mean hold the true one; rows that come in groups of equal ones give wider
    intervals."""
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        low, high = E.bootstrap(rng.standard_normal(40), np.mean, num=200, seed=trial)
        held += low <= 0 <= high
    assert 178 <= held <= 199  # 95 % of 200 less the 2 % that 40 rows cost; three standard deviations of 3 either way
    rows, groups = np.repeat(rng.standard_normal(20), 10), np.repeat(np.arange(20), 10)
    grouped, single = (np.diff(E.bootstrap(rows, np.mean, own))[0] for own in (groups, None))
    assert grouped > 2 * single  # sqrt(10) in the limit
    assert E.bootstrap(rows[:1], np.mean) is None


def test_thresholds_read_as_they_judge():
    """The text and the verdict of one-sided and two-sided limits; no value gives no verdict."""
    assert [E.expectation(limits) for limits in ((0.9, None), (None, 0.1), (0.45, 0.55))] == [
        ">= 0.9",
        "<= 0.1",
        "0.45..0.55",
    ]
    assert [E.meets(value, (0.45, 0.55)) for value in (0.44, 0.45, 0.55, 0.56)] == [False, True, True, False]
    assert E.meets(math.nan, (0, None)) is None and E.meets(None, (0, None)) is None
    figure = E.make_figure("branch_gate", 0.9, [0.8, 0.95], 10)
    assert figure["passed"] is False and "not good enough" in figure["reading"] and figure["expect"] == ">= 0.97"
    assert E.make_figure("branch_gate", math.nan)["passed"] is None


# -- forecasts, probes, spaces


def test_forecast_errors_by_hand():
    """The right forecast has no error; in a world that stands still, or goes on in a straight line, that reference has
    none either.

    The moving tokens are those of the truth: with all the motion in one site, their error is that site's.
    """
    cfg = small_config()  # 4 x 4 sites, NOW 2 and SOON 2 tubelets
    generator = torch.Generator().manual_seed(0)
    still = V.layer_norm(torch.randn(2, 1, 16, 48, generator=generator)).expand(2, 6, 16, 48)
    errors = E.forecast_errors(still[:, 2:4].flatten(1, 2), still.flatten(1, 2), cfg)
    assert errors.shape == (2, 3, 2, 2) and errors.abs().max() < 1e-5
    step, start = (
        0.3 * torch.randn(2, 1, 16, 48, generator=generator),
        V.layer_norm(torch.randn(2, 1, 16, 48, generator=generator)),
    )
    before, last = start[:, 0], V.layer_norm(start[:, 0] + step[:, 0])
    line = torch.stack([before, last, *(V.layer_norm(last + h * (last - before)) for h in (1, 2))], 1)
    moving = torch.cat([line, line[:, :2]], 1).flatten(1, 2)
    errors = E.forecast_errors(moving[:, 32:64], moving, cfg)
    assert errors[:, 2].max() < 1e-5 and errors[:, 1].min() > 0.05 and errors[:, 0].max() == 0
    jumped = still.clone().flatten(1, 2)
    jumped[:, 32 + 5] += 8.0
    errors = E.forecast_errors(jumped[:, 32:64] + 1, jumped, cfg)
    # 4 of 16 sites count as moving, one of them moves by 8
    assert errors[0, 1, :, 0].tolist() == pytest.approx([8 / 16, 8 / 4], abs=1e-5) and errors[
        0, 0, :, 0
    ].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_principal_components_and_their_maps():
    """Scores have mean square 1 and a linear map of them pulls back to one of rows; a planted direction comes first."""
    rng = np.random.default_rng(6)
    direction = np.eye(40)[7]
    rows = 3 + rng.standard_normal((60, 1)) * 5 * direction + 0.1 * rng.standard_normal((60, 40))
    space = E.Principal(rows, 4)
    assert abs(float(space.basis[7, 0])) > 0.99
    scores = space.scores(rows)
    assert (scores**2).mean() == pytest.approx(1, rel=1e-3)
    weight, bias = space.pull_back(rng.standard_normal((4, 2)), np.array([1.0, -2.0]))
    other = rng.standard_normal((5, 40))
    again = np.random.default_rng(6)
    again.standard_normal((60, 1)), again.standard_normal((60, 40))
    expected = space.scores(other) @ again.standard_normal((4, 2)) + [1.0, -2.0]
    assert np.allclose(torch.as_tensor(other).float() @ weight + bias, expected, atol=1e-3)


def linear_tasks(n=240, seed=7):
    """Rows whose first numbers say everything -> (rows [n, 30], Tasks): a value, three classes of which one is rare, a
    value that no row knows."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, 30))
    value = 2 * rows[:, 0] - rows[:, 1] + 5
    value[::7] = math.nan
    classes = np.where(rows[:, 2] > 0.3, 3, np.where(rows[:, 3] > 0, 1, 0))
    classes[::5] = -1
    return rows, E.Tasks(
        {"speed": value, "steer": np.full(n, math.nan)},
        {"maneuver": classes, "branch": (rows[:, 4] > 0).astype(int)},
        {"maneuver": 4, "branch": 2},
        np.arange(n) // 2,
    )


def test_linear_probes_read_what_is_there():
    """Values, several classes and two classes from one set of rows; unknown labels take no part; shuffled labels are
    not readable."""
    rows, tasks = linear_tasks()
    other, test = linear_tasks(seed=8)
    pred = E.predict(E.fit_probes(rows, tasks, 30), other, test)
    assert set(pred) == {"speed", "maneuver", "branch"}
    assert E.probe_scores(test, "speed", pred["speed"])[0] > 0.98
    assert (
        E.probe_scores(test, "maneuver", pred["maneuver"])[0] > 0.75
        and E.probe_scores(test, "branch", pred["branch"])[0] > 0.8
    )
    assert 2 not in pred["maneuver"]  # a class that no row has
    dealt = tasks.shuffled(0)
    assert np.array_equal(np.isnan(dealt.values["speed"]), np.isnan(tasks.values["speed"])) and not np.array_equal(
        dealt.classes["branch"], tasks.classes["branch"]
    )
    luck = E.predict(E.fit_probes(rows, dealt, 30), other, test)
    assert (
        E.probe_scores(test, "speed", luck["speed"])[0] < 0.2
        and E.probe_scores(test, "branch", luck["branch"])[0] < 0.65
    )


def test_the_attentive_probe_learns_where_a_token_stands_out():
    """A value and a class that one of eight tokens carries; unknown labels take no part."""
    rng = np.random.default_rng(9)
    tokens = torch.from_numpy(rng.standard_normal((1000, 8, 32))).half()
    value, classes = tokens[:, 3, 0].double().numpy() * 4 + 10, (tokens[:, 5, 1] > 0).long().numpy()
    tokens[:, 3, 2] += 6  # what marks the tokens
    tokens[:, 5, 3] += 6
    value[::9], classes[::4] = math.nan, -1
    tasks = E.Tasks({"speed": value[:800]}, {"maneuver": classes[:800]}, {"maneuver": 2}, np.arange(800))
    test = E.Tasks({"speed": value[800:]}, {"maneuver": classes[800:]}, {"maneuver": 2}, np.arange(200))
    pred = E.attentive_predictions(tokens[:800], tasks, tokens[800:], 20, torch.device("cpu"))
    assert (
        E.probe_scores(test, "speed", pred["speed"])[0] > 0.6
        and E.accuracy(test.rows("maneuver", pred["maneuver"])[0]) > 0.65
    )


def test_branch_space_holds_what_siblings_differ_in():
    """Scenes that look different but fork in one direction: that direction is found, the looks are not. Scatter within
    a branch is the unit, so that a wide harmless direction counts no more than a narrow one. Seen red without the
    whitening."""
    rng, latents, labels = np.random.default_rng(10), [], []
    fork, wander = np.eye(60)[:2]
    for scene in range(60):
        look = 10 * rng.standard_normal(60)
        for side in (-1, -1, 1, 1):
            latents.append(look + 3 * side * fork + rng.standard_normal() * wander + 0.1 * rng.standard_normal(60))
            labels.append({"scene_seed": scene, "branch": side})
    weight, bias = E.branch_map(torch.from_numpy(np.stack(latents)).view(240, 6, 10), labels)
    assert not bias.any() and weight.shape == (60, 8)
    lengths = (weight.T @ torch.eye(60)).norm(dim=0)  # of one latent unit in each direction
    assert lengths[0] > 8 and 0.9 < lengths[1] < 1.1  # scatter 0.1 along the fork, 1 along the wandering
    inside = torch.randn(2000, 60) * 0.1
    inside[:, 1] = torch.randn(2000)
    assert (inside @ weight).std(0).tolist() == pytest.approx(
        [1] * 8, abs=0.45
    )  # directions picked for their scatter have less on fresh futures


def test_reducer_keeps_small_tokens_and_shrinks_large_ones():
    """Small grids pass unchanged; 16 x 12 sites of 160 channels become 8 x 8 of 128, site means and the channels'
    energy preserved."""
    same = E.Reducer(small_config())
    tokens = torch.randn(2, 32, 48)
    same.fit(tokens)
    assert torch.equal(same(tokens), tokens)
    reduce = E.Reducer(small_config(image_size=(128, 96), enc_dim=160))
    tokens = torch.randn(4, 2 * 16 * 12, 20) @ torch.randn(20, 160)
    reduce.fit(tokens)
    small = reduce(tokens.view(2, 2, -1, 160))
    assert small.shape == (2, 2, 2 * 64, 128)
    top = tokens.view(4, 2, 16, 12, 160)[0, 0, :2, :2].mean(
        (0, 1)
    )  # rows pool 16 -> 8; of 12 -> 8 columns the first covers two
    assert small[0, 0, 0].norm() == pytest.approx(float(top.norm()), rel=1e-3)


# -- scenes


def test_fitting_and_testing_scenes_never_meet():
    """All scene seeds of all sets are disjoint, and far above those of any training. Seen red with two sets sharing a
    range."""
    cfg = small_config()
    sets = {
        "fit": E.fit_jobs(0, cfg, E.QUICK, V.SCENE_KINDS),
        "forks": [job for _, jobs, _ in E.fork_groups(0, cfg, SMALL) for job in jobs],
        "twins": [job for jobs in E.twin_groups(0, cfg, 4) for job in jobs],
        "rare": [job for jobs in E.rare_groups(0, cfg, 4) for job in jobs],
        "mix": [E.Job(E.set_seed(0, "mix", n), 0) for n in range(100)],
        "other seed": E.fit_jobs(1, cfg, SMALL, V.SCENE_KINDS),
    }
    seeds = {name: {job.scene_seed for job in jobs} for name, jobs in sets.items()}
    for one, two in itertools.combinations(seeds, 2):
        assert not seeds[one] & seeds[two], (one, two)
    largest = V.scene_seed_at(replace(cfg, seed=V.merged(V.VJepaAutoV2Config, "RANGES")["seed"][1]), 10**7, "val")
    assert min(min(group) for group in seeds.values()) >= E.EVAL_SEED > largest


def test_scenes_are_chosen_as_told():
    """Forks have the asked odds and two siblings per branch, rare branches are rare, every fitting occluder has its car
    as told."""
    cfg = small_config()
    for odds, jobs, natural in E.fork_groups(0, cfg, SMALL):
        assert {V.scene_odds(job.scene_seed, cfg, "fork")["right"] for job in jobs} == {odds}
        sides = [E.future_of(job, cfg)["choice"] for job in jobs]
        assert min(sides.count(-1), sides.count(1)) >= 2
        assert [job.future_seed for job in jobs[:natural]] == list(range(natural))
    for likely, rare in E.rare_groups(0, cfg, 4):
        right = V.scene_odds(rare.scene_seed, cfg, "fork")["right"]
        assert (E.future_of(rare, cfg)["choice"], E.future_of(likely, cfg)["choice"]) == (
            (1, -1) if right == 0.1 else (-1, 1)
        )
    stops = [E.future_of(job, cfg)["stops"] for job in E.fit_jobs(0, cfg, SMALL, ("occluder",))]
    assert stops == [False, True] * 5
    twins = E.twin_groups(0, cfg, 4)
    assert [job.twin for job in twins[0]] == ["", *V.TWIN_KINDS] and "pass_through" not in [
        job.twin for job in twins[-1]
    ]


def test_scenes_are_drawn_in_the_size_that_the_run_learned_from():
    """A run of files sees its scenes drawn large and averaged down, as its decoder did; a run that rendered sees them
    as drawn."""
    job, cfg = E.Job(E.EVAL_SEED, 0, "fork"), small_config(scene_size=64)
    clip, labels = E.scene_pictures(job, cfg)
    large, _ = V.scene(job.scene_seed, 0, cfg, "fork")
    expected = large.reshape(cfg.num_frames, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert clip.dtype == torch.uint8 and np.abs(clip.numpy() - expected).max() <= 0.5
    rendered, _ = E.scene_pictures(job, replace(cfg, scenes="render"))
    drawn, _ = V.scene(job.scene_seed, 0, replace(cfg, scene_size=0), "fork")
    assert np.array_equal(rendered.numpy(), drawn.transpose(0, 3, 1, 2)) and not np.array_equal(rendered, clip)
    assert labels["stops"] is False


def test_labels_at_the_end_of_soon():
    """Signals are means over the last SOON tubelet, unknown ones NaN; a braking after SOON is not yet a maneuver."""
    cfg = small_config(clip_fps=4.0)  # NOW and SOON are frames 0 to 7
    assert (
        E.soon_end([*range(12)], cfg) == 6.5
        and math.isnan(E.soon_end([None] * 12, cfg))
        and math.isnan(E.soon_end(None, cfg))
    )
    assert E.soon_end([0] * 7 + [3, None, None], cfg) == 1.5
    assert E.window_maneuver({"maneuver": "brake", "brake_time": 0.9}, cfg) == "brake"
    assert E.window_maneuver({"maneuver": "brake", "brake_time": 1.1}, cfg) == "keep"
    assert E.window_maneuver({"maneuver": "fork_left", "brake_time": None}, cfg) == "fork_left"


# -- surprise


class FakeSubject:
    """Encodes a clip as its own pixels and samples two futures: the frames it was given as `worlds`."""

    def __init__(self, cfg, worlds):
        self.cfg, self.worlds, self.steps, self.sampled, self.flows = cfg, worlds, 1, True, {"model": None}

    def soon(self, tokens):
        return tokens[:, self.cfg.now_frames :]

    def encode(self, frames):
        tokens = frames.float().flatten(2)  # one token per frame
        return (
            tokens[:, : self.cfg.now_frames],
            tokens,
            torch.zeros(len(frames), self.cfg.soon_frames, tokens.shape[-1]),
        )

    def sample(self, context, flow, num_samples, num_steps, seed):
        for first in range(len(context)):
            yield first, self.worlds[None]


def test_surprise_is_the_distance_to_the_nearest_sample():
    """Zero for a clip that a sample foresees, in either of two worlds; positive for any other. Once NOW itself differs
    from the first clip's, a window no longer counts."""
    cfg = SimpleNamespace(now_frames=2, soon_frames=2, soon_tokens=2, sites=1, tubelet_t=1)
    clips = torch.zeros(3, 5, 3, 1, 1, dtype=torch.uint8)  # T = 5 leaves two windows
    clips[1, 2:], clips[2, 2:] = 8, 4
    subject = FakeSubject(cfg, torch.stack([torch.zeros(2, 3), torch.full((2, 3), 8.0)]))
    scores = E.window_surprise(subject, clips, SMALL, 0)
    assert scores.shape == (5, 3, 2)
    for row in range(4):
        assert scores[row, :, 0].tolist() == [0, 0, 4]
    assert scores[4, :, 0].tolist() == [
        0,
        8,
        4,
    ]  # the point forecast of black takes a legal world for more surprising than an impossible one
    assert np.isfinite(scores[:, 0]).all() and np.isnan(scores[:, 1:, 1]).all()


def test_samples_beyond_the_memory_come_in_parts(monkeypatch):
    """Every part draws other samples, and the nearest of all parts counts. Seen red with the same seed for every part,
    and with the last part's distance kept in place of the smallest."""
    cfg = SimpleNamespace(now_frames=2, soon_frames=2, soon_tokens=2, sites=1, tubelet_t=1)
    clips = torch.full((1, 4, 3, 1, 1), 5, dtype=torch.uint8)
    subject, asked = FakeSubject(cfg, None), []

    def sample(context, flow, num_samples, num_steps, seed):
        asked.append((num_samples, seed))
        yield 0, torch.full((1, num_samples, 2, 3), float(len(asked)))

    subject.sample = sample
    monkeypatch.setattr(E, "SAMPLED_NUMBERS", 2 * 3 * 3)  # three samples of two tokens of three numbers
    scores = E.window_surprise(subject, clips, replace(SMALL, surprise_samples=20), 0)
    assert [num for num, _ in asked] == [3, 3, 3, 3, 3, 3, 2] and len({seed for _, seed in asked}) == 7
    assert scores[:4, 0, 0].tolist() == [0, 0, 0, 0]  # part 5 foresaw the clip


def test_the_worst_tokens_show_a_small_break():
    """One bad token of forty counts by its own error under that score, by a fortieth of it under L1."""
    cfg = SimpleNamespace(now_frames=2, soon_frames=40, soon_tokens=40, sites=1, tubelet_t=1)
    clips = torch.zeros(2, 42, 3, 1, 1, dtype=torch.uint8)
    clips[1, 20] = 8
    subject = FakeSubject(cfg, torch.zeros(1, 40, 3))
    scores = E.window_surprise(subject, clips, SMALL, 0)[:, 1, 0]
    assert scores[1] == 4 and scores[3] == pytest.approx(8 / 40)  # a twentieth is two tokens: one of them is the break


def test_a_lasting_error_outweighs_a_passing_one():
    """Under the headline a token that stays wrong by 1 surprises more than one that is wrong by 2 to either side in
    turn; the worst tokens say the opposite. By hand: four tubelets of two sites, errors averaged over the tubelets, one
    of two sites counts."""
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    passing, lasting = torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 5)
    passing[0, :, 0] = 2 * sign[:, None]
    lasting[0, :, 1] = 1
    first, second = (E.nearest_scores(error.flatten(1, 2), 2) for error in (passing, lasting))
    assert first[:2].tolist() == [0, 2] and second[:2].tolist() == [1, 1]
    assert (
        E.nearest_scores(torch.cat([passing, lasting]).flatten(1, 2), 2)[1] == 1
    )  # each score takes the sample that is nearest by it
    assert E.nearest_scores(lasting[:, :1].flatten(1, 2), 2)[:2].tolist() == [1, 1]  # one tubelet: nothing to average


def test_twins_are_compared_on_shared_windows():
    """The first clip's windows count only where the twin's do: else a busy later window of the possible clip would
    decide."""
    scores = np.zeros((5, 2, 3))
    scores[:, 0], scores[:, 1] = (1, 2, 30), (3, 4, np.nan)
    own, first = E.over_shared(scores, 1)
    assert own.tolist() == [3.5] * 5 and first.tolist() == [1.5] * 5


def test_auroc_counts_impossible_above_rare():
    """Impossible clips with large, rare ones with small surprise: 1; the other way round: 0. Matched, scenes of unlike
    level compare."""

    def scores(*levels):
        return np.broadcast_to(np.array(levels, float)[None, :, None], (4, len(levels), 2)) + np.zeros((4, 1, 1))

    twins, rare = [scores(1, 5, 6), scores(1, 4)], [scores(1, 2), scores(1, 3)]
    figures = E.surprise_auroc([twins, twins], [rare, rare], SMALL)
    assert figures["surprise_auroc"]["value"] == figures["surprise_auroc_matched"]["value"] == 1
    figures = E.surprise_auroc([rare, rare], [twins, twins], SMALL)
    assert figures["surprise_auroc"]["value"] == 0
    busy = [scores(11, 12), scores(21, 22)]  # forks surprise more as a whole, their rare branch adds 1
    figures = E.surprise_auroc([twins, twins], [busy, busy], SMALL)
    assert figures["surprise_auroc"]["value"] == 0 and figures["surprise_auroc_matched"]["value"] == 1


# -- the whole evaluation


def tiny_model(**overrides):
    """A model of a few thousand parameters with random weights and directions, on wide pictures."""
    torch.set_num_threads(1)
    model = new_model(
        small_config(
            **{
                **dict(image_size=(16, 32), scenes="render", num_frames=16, soon_frames=4, eventually_frames=8),
                **overrides,
            }
        )
    )
    fill_space(model)
    return model


class PageReader(html.parser.HTMLParser):
    """Collects a page's tags, checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.words += [value for name, value in attributes if name != "src"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.words += [value for _, value in attributes]

    def handle_data(self, data):
        self.words.append(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_page(path):
    """Parse a page -> PageReader; every tag is closed."""
    page = PageReader()
    page.feed(path.read_text())
    assert not page.open
    return page


@pytest.fixture(scope="module")
def scene_report():
    """Evaluation of a random model on built-in scenes at the smallest sizes -> (model, report)."""
    model = tiny_model()
    before = torch.get_rng_state()
    report = E.evaluate(model, SMALL, num_workers=0)
    assert torch.equal(before, torch.get_rng_state())
    return model, report


def test_every_figure_is_there(scene_report):
    """All thresholds have a figure with value, sentence, n, and the controls beside it; nothing is NaN; the summary
    counts right."""
    _, report = scene_report
    figures = report["figures"]
    assert not set(E.THRESHOLDS) - set(figures) and "no_leak" in figures
    for name, figure in figures.items():
        assert set(figure) >= {"value", "interval", "n", "controls", "expect", "passed", "reading"} and figure[
            "reading"
        ].endswith("."), name
        assert (figure["expect"] is not None) == (name in E.THRESHOLDS or name == "no_leak"), name
        assert figure["value"] is None or figure["n"] > 0, name
    for name in ("fork_share", "near_real", "calibration_slope"):
        assert set(figures[name]["controls"]) >= {"untrained encoder", "shuffled targets", "mean + noise"}
    assert set(figures["probe_speed_r2"]["controls"]) >= {
        "untrained encoder",
        "raw pixels",
        "shuffled labels",
        "encoded NOW alone",
    }
    judged = [figure["passed"] for figure in figures.values() if figure["passed"] is not None]
    assert (
        report["summary"] == f"{sum(judged)} of {len(judged)} thresholds met" and sum(judged) < len(judged) / 2
    )  # nothing was learned
    assert report["controls_must_fail"]["untrained encoder"]["passed"]
    assert set(report["curves"]) == {
        "skill",
        "calibration",
        "branch_coordinate",
        "pooled_ranks",
        "gap_ranks",
        "best_of_k",
        "surprise",
        "lane_odds",
    }
    json.dumps(report, allow_nan=False)


def test_one_seed_gives_one_evaluation(scene_report):
    """Figures that hang on rendering, sampling and fitting repeat; another seed means other scenes."""
    model, report = scene_report
    sizes = replace(SMALL, twin_scenes=0, rare_scenes=0, probe_epochs=0)
    shorter = replace(model.cfg, scene_mix="fork=1")
    model.cfg, kept = shorter, model.cfg
    sizes = replace(sizes, mix_clips=6, fit_forks=4)
    again, once, other = (E.evaluate(model, sizes, seed=seed, num_workers=0)["figures"] for seed in (0, 0, 1))
    model.cfg = kept
    assert json.dumps(again) == json.dumps(once) != json.dumps(other)
    assert (
        "gap_crps_ratio" not in again and "surprise_teleport" not in again and "fork_share" in again
    )  # only what the run has seen


def test_the_page_stands_alone(scene_report, tmp_path):
    """Well-formed, no network, viewport set, every figure with its sentence, the charts and the strip of pictures."""
    model, report = scene_report
    E.write_page({**report, "checkpoint": "<a&b>.pt", "step": 3}, model.cfg, tmp_path / "page.html")
    page, text = read_page(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links) and "http" not in " ".join(
        page.words
    )
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen
    ids = {attributes.get("id") for _, attributes in page.seen}
    assert set(report["figures"]) <= ids and {link[1:] for link in page.links if link.startswith("#")} == set(
        report["figures"]
    )
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 7 + len(report["curves"]["lane_odds"]) and tags.count("img") == 1
    assert "&lt;a&amp;b&gt;.pt" in text and not re.search(r"\b(nan|inf|None)\b", " ".join(page.words))
    assert text.index("Summary") < text.index("Charts") < text.index("Every figure")


def save_checkpoint(model, folder):
    """A checkpoint of a model as the script writes it -> path."""
    return V.save_checkpoint(new_state(model, step=3), folder, model.cfg, final=True)


def test_the_command_on_videos_with_and_without_annotations(scene_folder, tmp_path, capsys):
    """Reads the held-out files of the run's split, writes both files beside the checkpoint, probes only where there are
    labels."""
    checkpoint = save_checkpoint(
        tiny_model(val_fraction=0.4, scene_clips=8, num_frames=12, eventually_frames=4), tmp_path / "run"
    )
    bare = tmp_path / "bare"
    shutil.copytree(scene_folder / "videos", bare)
    names = {}
    for root, out in ((scene_folder, tmp_path / "run"), (bare, tmp_path / "out")):
        argv = ["--ckpt", str(checkpoint), "--data_root", str(root), "--num_workers", "0", "--device", "cpu"]
        code = E.run(E.parse(argv + (["--out", str(out)] if root is bare else ["--split", "all"])), SMALL)
        assert code == 0
        report = json.loads((out / "evaluation.json").read_text())
        assert report["step"] == 3 and report["data"]["kind"] == "videos" and read_page(out / "evaluation.html")
        names[root] = set(report["figures"])
        cfg = replace(V.load_model(checkpoint)[1], data_root=str(root))
        held_out = len(V.open_data(V.VJepaAutoV2, cfg, V.find_videos(str(root), "*"), True, None).val)
        assert report["data"]["files"] == (held_out if root is bare else 8)
    assert names[scene_folder] - names[bare] >= {"probe_speed_r2"} and not [
        name for name in names[bare] if name.startswith(("probe", "fork", "surprise"))
    ]
    assert names[bare] >= {
        "skill_persistence",
        "skill_linear",
        "retrieval_r1",
        "pooled_rank_chi2",
        "spread_ratio",
        "effective_rank",
        "target_std",
    }
    assert "thresholds met" in capsys.readouterr().out


def test_signals_of_a_video_are_read_at_the_clips_times(scene_folder, tmp_path):
    """An annotation at 4 frames per second against a clip at 2: every second value, from the plan's window on."""
    video = V.find_videos(str(scene_folder), "*")[0]
    annotation = {
        "fps": 4.0,
        "speed": [float(number) for number in range(12)],
        "maneuver": "keep",
        "steer": [None] * 12,
    }
    plan = V.ClipPlan(4, 2.0, 16, 32, 0.5, 1.0, 1.0, 0.5, 0.5)  # 2 s out of 3 s, starting at 0.5 s
    labels = E.timed_annotation(annotation, video, plan)
    assert labels == {"maneuver": "keep", "speed": [2.0, 4.0, 6.0, 8.0], "steer": [None] * 4}
    with pytest.raises(V.UserError, match="speed must be a list of numbers"):
        E.timed_annotation({"speed": ["fast"]}, video, plan)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(V.UserError, match="annotation of text.mp4: the times of its video cannot be read"):
        E.timed_annotation(annotation, V.VideoFile("text.mp4", str(tmp_path / "text.mp4")), plan)


def test_bad_input_ends_in_one_line(tmp_path, capsys, monkeypatch):
    """Missing and foreign checkpoints, an empty folder of videos, a missing scikit-learn: exit code and one line, no
    traceback."""
    (tmp_path / "foreign.pt").write_bytes(b"no checkpoint")
    (tmp_path / "empty").mkdir()
    checkpoint = str(save_checkpoint(tiny_model(), tmp_path / "run"))
    cases = [
        (["--ckpt", str(tmp_path / "none.pt")], 2, "no such checkpoint"),
        (["--ckpt", str(tmp_path / "foreign.pt")], 1, "not readable"),
        (["--ckpt", checkpoint, "--data_root", str(tmp_path / "empty")], 2, "no video"),
        (["--ckpt", checkpoint, "--data_root", str(tmp_path / "nowhere")], 2, "no such file or folder"),
    ]
    for argv, code, cause in cases:
        assert E.main(argv) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and cause in error
    found = E.importlib.util.find_spec
    monkeypatch.setattr(E.importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert E.main(["--ckpt", checkpoint]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "[eval]" in error
    with pytest.raises(SystemExit) as usage:
        E.main(["--quick"])
    assert usage.value.code == 2


def test_nothing_in_the_report_is_nan():
    """Infinite and undefined numbers become null at any depth, numpy's numbers plain ones."""
    report = E.without_nan({"a": [math.nan, np.float64(1.5), (np.int64(2), math.inf)], "b": {"c": np.bool_(True)}})
    assert report == {"a": [None, 1.5, [2, None]], "b": {"c": True}} and type(report["b"]["c"]) is bool
