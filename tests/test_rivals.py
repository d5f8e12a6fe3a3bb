"""tools/rivals.py: equal compute, scores on unseen clips, intervals, and processes that end."""

import json
import math
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, V

sys.path.insert(0, str(ROOT / "tools"))
import make_pushes as P
import rivals as R

SMALL = ("--pred_dim=24", "--pred_depth=1", "--num_heads=2", "--batch_size=2", "--num_workers=0")
LAYOUT = ["--latents", "5", "--size", "16", "--dim", "6", "--balls", "1"]


@pytest.fixture(scope="module")
def pushes(tmp_path_factory):
    """Twelve clips of five latents, 2 x 2 patches, 6 wide, and four on ice -> (folder, folder)."""
    root = tmp_path_factory.mktemp("pushes")
    assert P.main(["--out", str(root / "base"), "--num", "12", *LAYOUT]) == 0
    assert P.main(["--out", str(root / "ice"), "--num", "4", "--seed", "1", "--shift", "ice", *LAYOUT]) == 0
    return root / "base", root / "ice"


def parsed(tmp_path, *flags):
    return R.parse([f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}", "--device=cpu", *flags])


class Pusher:
    """A world that adds each action and state to all patches: frame t is the sum of those before."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def parameters(self):
        return iter([self.weight])

    def normalise(self, features):
        return features

    def rollout(self, features, actions, states, extrinsics, context, steps):
        assert context == 1 and steps == actions.shape[1]
        return features[:, :1] + (actions + states).cumsum(1)[:, :, None, :]

    def frame_error(self, preds, targets):
        return (preds - targets).abs().mean((2, 3))


def test_scores_of_a_world_that_is_right():
    """True actions leave no error, those of the clip half of all further on and none leave what they differ by, and the
    first frame repeated is identity. Seen red with states that did not go with the actions."""
    actions = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    states = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(1))
    frames = torch.cat([torch.zeros(6, 1, 2), (actions + states).cumsum(1)], 1)[:, :, None].expand(-1, -1, 4, -1)
    clips = {
        f"{number}": {"features": frames[number : number + 1], "actions": actions[number : number + 1]}
        | {"states": states[number : number + 1]}
        for number in range(6)
    }
    errors = R.score(Pusher(), clips, batch_size=4)
    assert np.abs(errors["true"]).max() < 1e-6
    ahead = (actions + states).cumsum(1)
    wanted = {"shuffled": (ahead.roll(3, 0) - ahead).abs().mean(2), "zero": ahead.abs().mean(2)}
    wanted["still"] = wanted["zero"]
    for arm, values in wanted.items():
        np.testing.assert_allclose(errors[arm], values.numpy(), rtol=1e-5)


def test_shares_and_their_intervals():
    """A share that is the same in all clips has no width; one that differs between seeds alone is as wide as these."""
    reference = np.random.default_rng(0).uniform(1, 2, (3, 40))
    same = R.figure(reference, 0.75 * reference)
    assert same["value"] == pytest.approx(0.25) and same["interval"] == pytest.approx([0.25, 0.25])
    apart = R.figure(reference, reference * np.array([[0.7], [0.8], [0.9]]))
    assert apart["seeds"] == pytest.approx([0.3, 0.2, 0.1])
    # all three draws are of one seed in 1 of 9 cases: both ends of the interval are such draws
    assert apart["interval"] == pytest.approx([0.1, 0.3])
    noise = np.random.default_rng(1).normal(1, 0.5, (1, 400))
    low, high = R.figure(np.ones((1, 400)), noise)["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.15)
    assert R.percent({"value": -1e-5, "interval": [-1e-5, 0.0]}) == "+0.0% [+0.0%, +0.0%]"
    assert R.adaptation_figure([{"why": "no layers"}]) == {"why": "no layers"} and R.percent(None) == "none"
    part = {"none": [1.0, 1.0], "shuffled": [1.2, 1.2], "adapted": [0.9, 0.9]}
    gains = {name: entry["value"] for name, entry in R.adaptation_figure([part]).items()}
    assert gains == pytest.approx({"adapted": 0.1, "shuffled": -0.2, "over_shuffled": 0.25})
    above, across = {"interval": [0.1, 0.2]}, {"interval": [-0.1, 0.2]}
    assert R.sure({"a": above, "b": across, "c": None, "d": above}) == "a, d" and R.sure({"b": across}) == "none"


def test_curriculum_in_thirds():
    assert R.curriculum(90, 8) == "0s:rollout=2;30s:rollout=4;60s:rollout=8"
    assert R.curriculum(90, 3) == "0s:rollout=2;30s:rollout=3;60s:rollout=3"


@pytest.mark.slow
def test_equal_flop(pushes, tmp_path, monkeypatch):
    """Steps times FLOP agree; what learns nothing takes one step; a plan is kept, and one of other settings refused.
    FLOP are those of the batch: twice as many clips, twice as many. Seen red with steps * unit / first."""
    args = parsed(tmp_path, f"--data_root={pushes[0]}", "--rivals=identity", "--jobs=1", *SMALL)
    args.work.mkdir()
    sizes = R.sizes_of(pushes[0], "")
    assert sizes == dict(feature_map="pushes", feature_dim=6, grid_high=2, grid_wide=2, num_timesteps=4, action_dim=2)
    rows = {"identity": R.count(args, "identity", sizes, pushes[0])}
    assert rows["identity"]["flop"] == rows["identity"]["parameters"] == 0
    args.rivals["ac_vit"] = R.RIVALS["ac_vit"]
    rows["ac_vit"] = R.count(args, "ac_vit", sizes, pushes[0])
    model, batch, size = R.open_steps(args, "ac_vit", sizes, pushes[0], 4, torch.device("cpu"))
    with R.Products() as counter:  # four clips, where batches hold two and two are counted
        R.one_step(model, batch, 0)
    args.flags = [*args.flags, "--batch_size=4"]
    twice = R.count(args, "ac_vit", sizes, pushes[0])["flop"]
    assert size == 2 and len(batch["features"]) == 4 and counter.flop > 0
    assert rows["ac_vit"]["flop"] > 0 and twice == pytest.approx(2 * rows["ac_vit"]["flop"])
    rows["half"] = {**rows["ac_vit"], "flop": rows["ac_vit"]["flop"] / 2}
    args.rivals["half"], args.steps = args.rivals["ac_vit"], 40
    seconds = {"ac_vit": 0.5, "half": 0.25}
    monkeypatch.setattr(R, "count", lambda args, name, *_: dict(rows[name]))
    monkeypatch.setattr(R, "measure_all", lambda args, argv, names, deadline: {name: seconds[name] for name in names})
    plan = R.make_plan(args, [], sizes, pushes[0], math.inf)
    assert {name: row["steps"] for name, row in plan.items()} == {"identity": 1, "ac_vit": 40, "half": 80}
    assert {name: row["seconds"] for name, row in plan.items()} == {"identity": 0, **seconds}
    args.steps = 40
    assert R.make_plan(args, [], sizes, pushes[0], math.inf) == plan
    args.steps = 41
    with pytest.raises(V.UserError, match="holds rivals of other steps; use another --work"):
        R.make_plan(args, [], sizes, pushes[0], math.inf)


def test_steps_that_fill_the_time():
    """Two rivals with two seeds at equal seconds, one at a time: a quarter of the training's time each; with all four
    at once the slowest one takes all of it."""
    args = Namespace(match="seconds", steps=0, seeds=[5, 6], jobs=1, device="cpu")
    seconds_left = 60 / R.FILL[True]
    for jobs, steps in ((1, 30), (4, 120)):
        plan = {name: dict(parameters=1, flop=1, seconds=value) for name, value in (("slow", 0.5), ("half", 0.25))}
        args.jobs, args.steps = jobs, 0
        plan = R.steps_of(args, plan, seconds_left + 1e-6)
        assert {name: row["steps"] for name, row in plan.items()} == {"slow": steps, "half": 2 * steps}


def test_no_process_goes_on(tmp_path):
    """At the deadline a run is told to stop and waited for; one that fails is named with its last line."""
    log = tmp_path / "log"
    began = time.monotonic()
    sleeper = f"import time, pathlib\ntime.sleep(60)\npathlib.Path({str(tmp_path / 'late')!r}).touch()"
    with pytest.raises(V.UserError, match=r"minutes are over while slow ran; the same command goes on \(--minutes\)"):
        R.run_all({"slow": (["-c", sleeper], log)}, 1, time.monotonic())
    assert time.monotonic() - began < 20 and not (tmp_path / "late").exists()
    with pytest.raises(V.UserError, match=r"bad: ended with exit code 3 \(.*no such preset"):
        R.run_all({"bad": (["-c", "print('no such preset', flush=True); raise SystemExit(3)"], log)}, 1, math.inf)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--ckpt=/none.pt", "--data_root=."], "ckpt and data_root: one of them at most"),
        (["--ckpt=/none.pt"], "ckpt /none.pt: no such checkpoint"),
        (["--data_root=/none"], "data_root /none: no folder"),
        (["--data_root=.", "--rivals", "lstm"], "rivals: lstm is none of identity, convlstm, ac_vit, hope, hybrid"),
        (["--data_root=.", "--seeds", "1", "1"], "seeds: one stands there twice"),
        (["--data_root=.", "--minutes", "0"], "minutes = 0: must be above 0"),
        (["--data_root=.", "--shift", "ice"], "shift ice: must be NAME=VALUE"),
        (["--data_root=.", "--adapt_layers", "all"], "layers = all: must be one of"),
        (["--data_root=.", "--test_fraction", "0"], "test_fraction: must lie between 0 and 0.9"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, reason):
    with pytest.raises(V.UsageError, match=reason) as caught:
        parsed(tmp_path, *flags)
    assert "\n" not in str(caught.value)


def test_rivals_and_folders_that_there_are_not(pushes, tmp_path):
    args = parsed(tmp_path, f"--data_root={pushes[0]}", "--rivals", "ours=no_such_preset")
    with pytest.raises(V.UsageError, match=r"rival ours: preset 'no_such_preset': must be one of .*\(--rivals\)"):
        R.open_rival(args, "ours", R.sizes_of(pushes[0], ""), pushes[0])
    with pytest.raises(V.UsageError, match=r"no clip_<id>/feature_maps/other.npy"):
        R.sizes_of(pushes[0], "other")
    one = {"a": {}}
    with pytest.raises(V.UserError, match="1 clips to be scored, and two are needed"):
        R.clips_of(Namespace(videos=[Namespace(name="a")], read=lambda number, plan: one["a"], data_root="x"))


@pytest.mark.slow
def test_the_whole_command(pushes, tmp_path, capsys):
    """Two rivals from folders: trained by the real command, scored on the test part and under a shift; the same
    command neither trains nor scores anything again."""
    base, ice = pushes
    command = [f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}", "--device=cpu", f"--data_root={base}"]
    command += ["--shift", f"ice={ice}", "--rivals", "identity", "convlstm", "--seeds", "0", "--steps=6"]
    command += ["--adapt_clips=2", "--test_fraction=0.3", *SMALL]
    assert R.main(command) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "rivals.json").read_text())
    assert list(report["rivals"]) == ["identity", "convlstm"] and report["shifts"] == ["ice"]
    identity, convlstm = report["rivals"].values()
    assert identity["plain"]["error"] == pytest.approx(identity["plain"]["still"], abs=1e-5)
    assert identity["plain"]["clips"] == 4 and identity["ice"]["clips"] == 4  # all of ice, the test part of base
    assert convlstm["plain"]["still"] == pytest.approx(identity["plain"]["still"], abs=1e-5)
    assert len(convlstm["plain"]["saved_all"]["seeds"]) == 1 and len(convlstm["plain"]["error"]) == 4
    assert "why" in identity["ice"]["adaptation"] and "value" in convlstm["ice"]["adaptation"]["adapted"]
    table = (tmp_path / "out" / "rivals.md").read_text()
    assert "| convlstm |" in table and "Better than identity at every horizon" in told
    place = tmp_path / "work" / "convlstm_0"
    seen = json.loads((place / "rivals.json").read_text())["views"]
    assert {name.split("/")[0] for name in seen["plain"]["clips"]} == {f"clip_{n:05d}" for n in range(8, 12)}
    made = {path: path.stat().st_mtime_ns for path in (place / "checkpoints" / "ckpt_final.pt", place / "rivals.json")}
    assert R.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert json.loads((tmp_path / "out" / "rivals.json").read_text())["rivals"] == report["rivals"]
    (place / "rivals.json").unlink()
    assert R.known_scores(parsed(tmp_path, *command[2:]), place, {"plain": base, "ice": ice}) is None
