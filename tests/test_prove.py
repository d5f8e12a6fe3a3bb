"""tools/prove.py --against: what two records say beside each other, and which records say nothing."""

import json
import math

import pytest

import VJepa_AUTO_V2 as V
from tools import prove

FIGURES = {  # name -> threshold
    "near_real": ">= 0.85",
    "between_share": "<= 0.1",
    "fork_share": "0.45..0.55",
    "gap_rank_chi2": None,
    "lane_odds_error": None,
    "gap_coverage80": "0.74..0.86",
}


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Whatever is trained or evaluated here is a mistake."""
    monkeypatch.setattr(prove, "run", lambda command: pytest.fail(f"ran {command}"))


def write_seed(root, seed, values, sizes=8, rate=20.0, tflop=0.04, **config):
    """The record of one seed as a run leaves it, figures in the order of FIGURES."""
    folder = root / f"seed_{seed}"
    folder.mkdir(parents=True)
    figures = {name: {"value": value, "expect": FIGURES[name]} for name, value in zip(FIGURES, values)}
    evaluation = {
        "sizes": {"fork_scenes": sizes, "batch": 32},
        "seed": 0,
        "data": {"kind": "scenes"},
        "figures": figures,
    }
    cfg = {"seed": seed, "out_dir": str(root), "steps": 800, "batch_size": 8, "grad_accum": 1, **config}
    lines = [
        {"step": 1, "clips_per_s": None},
        *({"step": 50 * k, "clips_per_s": rate + k - 2} for k in (1, 2, 3)),
        *({"step": 150 + k, "phase": "flow", "clips_per_s": 200.0} for k in range(5)),  # no steps
        {"step": 100, "val_soon_skill": 0.1, "val_loss_soon": 0.3},
        {"step": 150, "val_soon_skill": 0.2, "val_loss_soon": 0.2},
    ]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.json").write_text(json.dumps({"config": cfg, "commit": "f00"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.log").write_text(f"device: cpu\nstep: 8 clips, {tflop:.3g} TFLOP (online 18%)\n")
    (folder / "times.json").write_text(json.dumps({"train_s": 60.0, "evaluate_s": 30.0, "cores": 1}))


def write_pair(tmp_path, num=3, shift=(0.0,) * 6, **more):
    """Records a and b of `num` seeds, b's figures further by `shift` and a little that differs from seed to seed."""
    for k in range(num):
        values = 0.8 + 0.01 * k, 0.1, 0.6, 0.5, 0.02, 0.6
        write_seed(tmp_path / "a", k, values)
        write_seed(tmp_path / "b", k, [v + s + 0.001 * (k - 1) for v, s in zip(values, shift)], **more)
    return ["--out", str(tmp_path / "b"), "--against", str(tmp_path / "a")]


def compared(tmp_path, command, capsys):
    """-> (comparison.json, what was said)."""
    assert prove.main(command) == 0
    out, err = capsys.readouterr()
    return json.loads((tmp_path / "b" / "comparison.json").read_text()), out + err


def test_each_figure_is_judged_by_its_own_better_side(tmp_path, capsys):
    """More, less, nearer, unknown. Seen red with the sign of '<=' turned and with a range read as one side."""
    report, said = compared(tmp_path, write_pair(tmp_path, shift=(0.05, 0.05, -0.05, 0.05, -0.01, 0.05)), capsys)
    verdicts = {name: row["verdict"] for name, row in report["figures"].items()}
    assert verdicts == {
        "near_real": "better",
        "between_share": "worse",
        "fork_share": "better",
        "gap_rank_chi2": "",
        "lane_odds_error": "better",
        "gap_coverage80": "better",
        "val_soon_skill": "within noise",
        "val_loss_soon": "",
        "val_soon_skill_at_100": "within noise",
    }
    row = report["figures"]["near_real"]
    half = 4.3027 * 0.001 / math.sqrt(3)  # of differences 0.049, 0.05 and 0.051
    assert row["difference"] == pytest.approx(0.05) and row["interval"] == pytest.approx([0.05 - half, 0.05 + half])
    assert (row["n"], row["a"], row["b"]) == (3, pytest.approx(0.81), pytest.approx(0.86))
    assert report["figures"]["fork_share"]["difference"] == pytest.approx(-0.05)  # of the distance from 0.5
    assert "7 figures with a better side: 2 within noise, 4 better, 1 worse" in said
    assert "about 0.4 of them fall outside by chance" in said
    assert said.count("| near_real |") == 1 and V.MARK in (tmp_path / "b" / "comparison.md").read_text()


def test_pairs_are_within_a_seed(tmp_path, capsys):
    """What seeds have in common cancels: deviations of 0.2 between them hide no difference of 0.02."""
    for k in range(3):
        write_seed(tmp_path / "a", k, [0.2 * k])
        write_seed(tmp_path / "b", k, [0.2 * k + 0.02 + 0.001 * k])
    report, _ = compared(tmp_path, ["--out", str(tmp_path / "b"), "--against", str(tmp_path / "a")], capsys)
    assert report["figures"]["near_real"]["verdict"] == "better"


def test_noise_is_not_judged(tmp_path, capsys):
    report, said = compared(tmp_path, write_pair(tmp_path, shift=(1e-4,) * 6), capsys)
    assert {row["verdict"] for row in report["figures"].values()} == {"within noise", ""}
    low, high = report["together"][1]
    assert low < 0 < high and "All together: b lies" in said


def test_equal_differences_are_not_certain():
    """Counts of few scenes differ by the same in all seeds now and then. Seen red as better by 0.0625..0.0625."""
    row = prove.compare("surprise_x", {1: 0.5, 2: 0.75}, {1: 0.5625, 2: 0.8125}, None)
    assert row["difference"] == 0.0625 and row["interval"] is None and not row["verdict"]
    row = prove.compare("surprise_x", {1: 0.5, 2: 0.75}, {1: 0.5, 2: 0.75}, None)
    assert row["interval"] == [0, 0] and row["verdict"] == "within noise"


def test_small_shifts_are_seen_together():
    """Thirty figures, each a deviation worse under noise as large: none alone is sure, all together are."""
    rng, rows = V.np.random.default_rng(0), {}
    for k in range(30):
        a, b = rng.standard_normal(3), rng.standard_normal(3) - 1
        rows[k] = prove.compare("probe_x", dict(enumerate(a.tolist())), dict(enumerate(b.tolist())), None)
    verdicts = [row["verdict"] for row in rows.values()]
    _, (_, high) = prove.all_together(rows)
    assert high < 0 and verdicts.count("worse") < 15


def test_costs_and_settings_stand_beside(tmp_path, capsys):
    """Median rate of the steps, FLOP of the log, a warning where one side learned longer; fields that a record is too
    old for are as they were."""
    report, said = compared(
        tmp_path, write_pair(tmp_path, rate=40.0, tflop=0.02, steps=400, patch=8, pred_attention="cross"), capsys
    )
    assert report["costs"]["s per step"]["a"] == pytest.approx(0.4)
    assert report["costs"]["s per step"]["ratios"] == pytest.approx([0.5] * 3)
    assert report["costs"]["TFLOP per clip"]["b"] == pytest.approx(0.0025)
    assert report["unlike_settings"] == {"steps": [800, 400], "patch": [16, 8], "pred_attention": ["full", "cross"]}
    assert said.count("warning:") == 1 and "warning: steps differs (800 and 400): not the same training" in said


def test_one_seed_has_no_interval(tmp_path, capsys):
    report, said = compared(tmp_path, write_pair(tmp_path, num=1, shift=(0.5,) * 6), capsys)
    assert report["figures"]["near_real"]["interval"] is None and not report["figures"]["near_real"]["verdict"]
    assert "single seed" in said


def test_incomplete_seeds_are_left_out(tmp_path, capsys):
    command = write_pair(tmp_path)
    (tmp_path / "a" / "seed_1" / "times.json").unlink()
    (tmp_path / "a" / "seed_notes").mkdir()
    report, said = compared(tmp_path, command, capsys)
    assert report["seeds"] == [0, 2] and "seed_1 is left out: it has no times.json" in said
    report, _ = compared(tmp_path, [*command, "--seeds", "2"], capsys)
    assert report["seeds"] == [2]


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--seeds", "7"], "--against .*no complete record"),
        (["--steps", "5"], "--against .*--steps 5 would go to a run"),
        (["--against", "/nowhere/x"], "--against /nowhere/x: no such folder"),
    ],
)
def test_bad_flags(tmp_path, more, reason):
    with pytest.raises(V.UsageError, match=reason):
        prove.main([*write_pair(tmp_path, num=1), *more])


def test_records_that_say_nothing(tmp_path):
    """No seed in common, a quick evaluation beside a full one, a damaged file, one folder twice."""
    write_seed(tmp_path / "a", 1, [0.5])
    write_seed(tmp_path / "b", 2, [0.5])
    command = ["--out", str(tmp_path / "b"), "--against", str(tmp_path / "a")]
    with pytest.raises(V.UsageError, match=r"no seed in common \(it has \[1\], --out \[2\]\)"):
        prove.main(command)
    with pytest.raises(V.UsageError, match="is --out itself"):
        prove.main(["--out", str(tmp_path / "a"), "--against", str(tmp_path / "a")])
    write_seed(tmp_path / "b", 1, [0.5], sizes=4)
    with pytest.raises(
        V.UsageError, match=r"--quick.*seed 1 of b has the sizes \{'fork_scenes': 4\}.*\{'fork_scenes': 8\}"
    ):
        prove.main(command)
    (tmp_path / "b" / "seed_1" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(V.UserError, match="metrics.jsonl: is no JSON"):
        prove.main(command)
    assert not (tmp_path / "b" / "comparison.md").exists()


def test_a_stranger_comparison_is_kept(tmp_path, capsys):
    command = write_pair(tmp_path)
    (tmp_path / "b" / "comparison.md").write_text("mine")
    compared(tmp_path, command, capsys)
    compared(tmp_path, command, capsys)
    assert (tmp_path / "b" / "previous_1" / "comparison.md").read_text() == "mine"
    assert not (tmp_path / "b" / "previous_2").exists()


def test_interval_factor():
    """Table and expansion of Student's t beside published values."""
    for freedom, factor in ((1, 12.706), (2, 4.303), (5, 2.571), (6, 2.447), (9, 2.262), (29, 2.045)):
        assert prove.student_t(freedom) == pytest.approx(factor, abs=2e-3)
