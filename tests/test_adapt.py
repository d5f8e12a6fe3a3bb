"""tools/adapt.py: it helps where it must and not otherwise, no scored frame reaches a weight or a prediction, the world
comes back bit by bit, counts of parameters, errors in one line, and the command."""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, V, needs
from training import new_state

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "worlds")]

needs("matplotlib")

import adapt as A  # noqa: E402
import hope as H  # noqa: E402

T, N, D, ACTIONS = 8, 4, 6, 2
SIZES = dict(feature_dim=D, grid_high=2, grid_wide=2, num_timesteps=T, action_dim=ACTIONS, feature_map="tiny")
FAST = dict(lr=0.05, steps=15, seen=5)


class Drift(nn.Module):
    """Frames move by their actions, and by what a LayerNorm says, which starts at nothing. Every call is kept."""

    def __init__(self):
        super().__init__()
        self.push, self.norm = nn.Linear(ACTIONS, D, bias=False), nn.LayerNorm(D)
        nn.init.constant_(self.norm.weight, 1e-6)
        self.calls, self.breaks = [], ""

    def forward(self, features, actions, states, extrinsics=None):
        preds = features + self.push(actions)[:, :, None] + self.norm(features)
        if (
            self.breaks == "loss"
            and torch.is_grad_enabled()
            or self.breaks == "weights"
            and self.norm.bias[0].abs() > 0
        ):
            preds = preds * torch.nan
        bias, is_learning = self.norm.bias.detach().clone(), torch.is_grad_enabled()
        self.calls.append((features.shape[1], bias, preds.detach().clone(), is_learning))
        return preds


@dataclass
class DriftingConfig(H.HopeConfig):
    normalise: bool = False  # made features have no deviation of 1


class Drifting(H.Hope):
    """Hope whose predictor knows the made clips but not their drift."""

    Config = DriftingConfig

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.predictor = Drift()


def new_world(**settings):
    torch.manual_seed(0)
    return Drifting(DriftingConfig(**{**SIZES, **settings}, predictor="identity")).train()


def made(world, num=7, drift=0.3, own=True, seed=0):
    """Clips that move by their actions and a constant drift, each its own or all the same -> a batch of the world."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(num, T, ACTIONS, generator=generator)
    shift = drift * torch.randn(num if own else 1, 1, 1, D, generator=generator)
    with torch.no_grad():
        moves = world.predictor.push(actions)[:, :, None] + shift
        start = torch.randn(num, 1, N, D, generator=generator)
        features = torch.cat([start, start + moves.expand(num, T, N, D).cumsum(1)], 1)
        features += 0.02 * torch.randn(features.shape, generator=generator)
    return {"features": features, "actions": actions, "states": torch.zeros_like(actions)}


def figures(world, batch, **settings):
    return A.adaptation_gain(world, [batch], resamples=200, **{**FAST, **settings})


def without_future(batch, first, clip=slice(None)):
    """The same clips, or one of them, with other frames from `first` on."""
    features = batch["features"].clone()
    features[clip, first:] += 100
    return {**batch, "features": features}


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", A.MODES)
def test_a_drift_is_learned_from_seen_frames_and_not_from_those_of_others(mode):
    world = new_world()
    report = figures(world, made(world), mode=mode, steps=5 if mode == "sequential" else 15)
    gains = report["gains"]
    assert report["clips"] == 6 and len(report["arms"]["none"]["per_step"]) == T + 1 - 5
    assert gains["adapted over none"]["gain"] > 0.5 and gains["adapted over none"]["interval"][0] > 0.3
    assert gains["adapted over shuffled"]["interval"][0] > 0.3
    assert gains["shuffled over none"]["gain"] < 0


def test_where_nothing_drifts_there_is_nothing_to_gain():
    world = new_world()
    report = figures(world, made(world, drift=0.0), lr=1e-4, steps=3)
    assert abs(report["gains"]["adapted over none"]["gain"]) < 0.05
    assert report["gains"]["shuffled over none"]["gain"] < 0.02


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("mode", ["rollout", "teacher"])
def test_scored_frames_reach_no_weight_and_no_prediction(mode, accumulate):
    """Seen red with targets one frame later."""
    world, seen = new_world(), FAST["seen"]
    calls, batch = world.predictor.calls, made(world, num=3)
    figures(world, batch, mode=mode, steps=3, accumulate=accumulate)
    before = calls.copy()
    calls.clear()
    figures(world, without_future(batch, seen), mode=mode, steps=3, accumulate=accumulate)
    assert len(calls) == len(before) > 0
    for old, new in zip(before, calls):
        assert old[0] == new[0] and torch.equal(old[1], new[1]) and torch.equal(old[2], new[2])
    calls.clear()
    figures(world, without_future(batch, seen - 1), mode=mode, steps=3, accumulate=accumulate)  # one that is seen
    assert not all(torch.equal(old[1], new[1]) for old, new in zip(before, calls))


def test_a_later_action_reaches_no_weight():
    world, seen = new_world(), FAST["seen"]
    batch = made(world, num=2)
    other = {**batch, "actions": batch["actions"].clone()}
    other["actions"][:, seen - 1 :] += 1
    reports = [figures(world, clips, steps=3)["per_clip"][0]["adapted"] for clips in (batch, other)]
    assert reports[0]["change"] == reports[1]["change"] and reports[0]["error"] != reports[1]["error"]


@pytest.mark.parametrize("accumulate", [False, True])
def test_sequential_predicts_a_frame_before_it_learns_from_it(accumulate):
    world, frame, found = new_world(), 6, []
    how = A.How(mode="sequential", lr=0.05, steps=2, seen=5, accumulate=accumulate)
    batch = made(world, num=1)
    for clips in (batch, without_future(batch, frame)):
        (clip,) = A.clips_of(world, [clips], 0, how, {})
        world.predictor.calls.clear()
        entry = A.run_arm(world, clip, clip, how, A.Learner(world.predictor.norm.parameters(), how))
        looks = [call for call in world.predictor.calls if not call[3]]  # without gradient: a score comes first
        found.append((entry, *(next(call for call in looks if call[0] == length) for length in (frame, frame + 1))))
    (old, *old_calls), (new, *new_calls) = found
    assert old["per_step"][: frame - 5] == new["per_step"][: frame - 5]
    assert all(torch.equal(old_calls[0][at], new_calls[0][at]) for at in (1, 2))
    assert not torch.equal(old_calls[1][1], new_calls[1][1])  # the next frame is predicted by what was learned


def test_sequential_clips_that_were_scored_do_not_depend_on_later_ones():
    world = new_world()
    batch = made(world, num=3)
    how = dict(mode="sequential", steps=2, accumulate=True)
    old, new = (figures(world, clips, **how)["per_clip"] for clips in (batch, without_future(batch, 0, 2)))
    assert old[0] == new[0] and old[1]["adapted"] != new[1]["adapted"]


def test_a_clip_that_was_scored_helps_later_ones_in_accumulate_mode_only():
    world = new_world()
    batch = made(world, num=8, own=False)
    gains = {}
    for accumulate in (False, True):
        report = figures(world, batch, steps=2, lr=0.01, accumulate=accumulate)
        gains[accumulate] = [clip["gain"] for clip in report["per_clip"]]
        changes = [clip["adapted"]["change"] for clip in report["per_clip"]]
        assert (changes[-1] > 3 * changes[0]) == accumulate
    assert gains[True][0] == gains[False][0] and gains[True][-1] > gains[False][-1] + 0.1


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_world_comes_back_bit_by_bit(accumulate, monkeypatch):
    """Seen red with the checkpoint's weights not put back."""
    world = new_world()
    batch, before = made(world, num=3), {name: value.clone() for name, value in world.state_dict().items()}
    figures(world, batch, accumulate=accumulate)
    monkeypatch.setattr(A.Learner, "change", interrupted)  # called while the adapted weights are in the world
    with pytest.raises(KeyboardInterrupt):
        figures(world, batch, accumulate=accumulate)
    after = world.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and world.training
    assert all(weight.grad is None and weight.requires_grad for weight in world.parameters())


def test_steps_are_those_of_adam_on_a_clipped_gradient():
    """Seen red without clipping."""
    world = new_world()
    batch = made(world, num=2)
    report = figures(world, batch, steps=3, lr=0.01, grad_clip=0.1)
    clip, norm = report["per_clip"][0]["adapted"], world.predictor.norm
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.01)
    seen = {name: value[1:, : 5 if name == "features" else 4] for name, value in batch.items()}
    norms = []
    for _ in range(3):
        preds = world.rollout(*seen.values(), context=1)
        world.frame_error(preds, seen["features"][:, 1:]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(norm.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        preds = world.rollout(batch["features"][1:, :5], batch["actions"][1:], batch["states"][1:], context=5)
        errors = world.frame_error(preds, batch["features"][1:, 5:])[0]
    assert clip["per_step"] == pytest.approx(errors.tolist(), rel=1e-5)
    assert clip["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5) and clip["grad_norm_clipped"] <= 0.1
    assert clip["seen_after"] < clip["seen_before"]


@pytest.mark.parametrize("cause", ["loss", "weights"])
def test_what_breaks_in_adaptation_is_named_counted_and_scored_with_the_checkpoint(cause, capsys):
    world = new_world()
    world.predictor.breaks = cause  # with gradients on, or once its weights have moved
    report = figures(world, made(world, num=3), steps=1)
    said = capsys.readouterr().err
    assert said.count("WARNING: clip 1: ") == 2 and "scored with the checkpoint's weights" in said
    assert report["steps"]["adapted"]["failed"] == report["steps"]["shuffled"]["failed"] == 2
    assert report["gains"]["adapted over none"]["gain"] == 0


def test_clips_that_are_too_short_or_not_finite_are_named_and_left_out(capsys):
    world = new_world()
    batch = made(world, num=4)
    short = {name: value[:1, : 5 if name == "features" else 4] for name, value in batch.items()}
    broken = {**batch, "features": batch["features"][:1] * torch.nan}
    broken |= {name: broken[name][:1] for name in ("actions", "states")}
    report = A.adaptation_gain(world, [short, broken, batch], **FAST)
    assert report["clips"] == 3 and "5 frames; 5 seen and one" in report["left_out"]["clip 0"]
    assert "not finite" in report["left_out"]["clip 1"] and "WARNING: clip 0 is left out" in capsys.readouterr().err
    with pytest.raises(
        V.UserError, match="no clips of two videos can be used.*2 left out, the first: clip 0: 5 frames"
    ):
        A.adaptation_gain(world, [short, short], **FAST)


def test_targets_of_the_shuffled_arm_are_of_another_video():
    world, how = new_world(), A.How(**{**FAST, "steps": 1})
    clips = list(A.clips_of(world, [made(world)], 0, how, {}))
    for clip, group in zip(clips, "aabbbca"):
        clip.group = group
    found = A.run_clips(world, clips, how, list(world.predictor.norm.parameters()))
    lent = [(entry["name"], entry["shuffled_from"]) for entry in found]
    assert lent == [(f"clip {to}", f"clip {of}") for to, of in ((2, 1), (3, 1), (4, 1), (5, 4), (6, 5))]
    assert A.gain_of(found[:3], "none", "adapted", 50, 0)["interval"] is None  # one video


def test_impossible_settings_are_refused_in_one_line():
    world = new_world()
    batch = made(world, num=2)
    for settings, told in (
        (dict(layers="head"), "layers = head: must be one of layernorm, attn_out, bias, mlp_out"),
        (dict(layers="layernorm+head"), "or some of them joined by"),
        (dict(mode="online"), "mode = online: must be one of rollout, teacher, sequential"),
        (dict(optimizer="sgd"), "optimizer = sgd: must be one of"),
        (dict(context=0), "context = 0: must be at least 1"),
        (dict(steps=0), "steps = 0: must be at least 1"),
        (dict(lr=0.0), "lr = 0.0: must be above 0"),
        (dict(grad_clip=-1.0), "grad_clip = -1.0: must be 0"),
        (dict(context=5), "seen = 5: must exceed context = 5"),
        (dict(seen=9), "seen = 9: must be at most 8 of 9 frames: one must be left to score"),
    ):
        with pytest.raises(V.UsageError, match=told):
            figures(world, batch, **settings)
    world.predictor = H.Identity(world.cfg)
    with pytest.raises(V.UserError, match="predictor identity has no LayerNorm; it has none of the others"):
        figures(world, batch)


# -- the command


def write_clips(root, world, num, frames=T + 1):
    """Made clips as feature folders -> root."""
    batch = made(world, num)
    for number in range(num):
        folder = root / f"clip_{number:05d}"
        for part in ("feature_maps", "actions_states"):
            (folder / part).mkdir(parents=True)
        np.save(folder / "feature_maps" / "tiny.npy", batch["features"][number, :frames].flatten(0, 1).numpy())
        np.save(folder / "actions_states" / "actions.npy", batch["actions"][number, : frames - 1].numpy())
    return root


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A checkpoint of the made world and its clips -> folder."""
    folder, world = tmp_path_factory.mktemp("adapt"), new_world()
    write_clips(folder / "clips", world, 16)
    state = new_state(world)
    state["data"] = {**state["data"], "kind": "videos", "root": str(folder / "clips")}
    torch.save(state, folder / "ckpt.pt")
    return folder


def command(folder, *flags):
    return A.main([str(folder / "ckpt.pt"), "--device", "cpu", "--resamples", "50", *map(str, flags)])


def test_the_command_writes_figures_and_a_picture(run_dir, tmp_path, capsys):
    flags = ("--side", "train", "--num_clips", 3, "--lr", 0.05, "--steps", 5, "--seen", 5, "--out", tmp_path)
    assert command(run_dir, *flags) == 0
    report, said = json.loads((tmp_path / "adaptation.json").read_text()), capsys.readouterr().out
    assert report["clips"] == len(report["per_clip"]) == 3 and report["how"]["context"] == 1
    assert "layers layernorm: 12 of 24 parameters = 50.00%" in said and "error saved, adapted over none" in said
    assert report["worst"][::-1] == report["best"] and report["parameters"]["share"] == 0.5
    assert (tmp_path / "adaptation.png").stat().st_size > 5000


def test_the_command_says_in_one_line_what_cannot_be(run_dir, tmp_path, capsys):
    world = new_world()
    short = write_clips(tmp_path / "short", world, 4, frames=5)
    other = tmp_path / "other.pt"
    for flags, told in (
        (("--side", "test", "--data_root", tmp_path), "no"),
        (("--data_root", short), "num_timesteps = 8 needs 9"),
        (("--data_root", short, "--num_timesteps", 9), "num_timesteps = 9: must be 1 to 8"),
        (("--data_root", short, "--num_timesteps", 0), "num_timesteps = 0: must be 1 to 8"),
        (("--steps", 0), "steps = 0"),
        (("--layers", "all"), "layers = all"),
        (("--num_clips", -1), "num_clips = -1: must lie in"),
        (("--stepz", 2), "--stepz"),
    ):
        assert command(run_dir, *flags, "--out", tmp_path / "out") != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ") and told in said[-1]
    torch.save(new_state(Plain(V.ClipConfig(image_size=32))), other)
    assert A.main([str(other), "--device", "cpu"]) != 0
    assert "made by the world Plain; this tool adapts those of hope.py" in capsys.readouterr().err


class Plain(V.World):
    """Another world."""

    KEYS = {"loss_none": "nothing"}

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.scale = nn.Parameter(torch.ones(()))


# -- parts


@pytest.fixture(scope="module")
def full_size():
    """ac_vit as the original had it, without memory."""
    with torch.device("meta"):
        return H.Hope(H.HopeConfig(action_dim=2))


@pytest.mark.parametrize(
    ("layers", "adapted", "percent"),
    [
        ("layernorm", 37_632, 0.09),
        ("attn_out", 3_585_792, 8.27),
        ("layernorm+bias", 122_752, 0.28),
        ("layernorm+mlp_out", 14_202_624, 32.74),
        ("bias", 3_661_696, 8.44),
        ("mlp_out", 17_817_472, 41.07),
    ],
)
def test_shares_of_the_original_at_full_size(full_size, layers, adapted, percent):
    chosen, share = A.choose(full_size, layers)
    assert share["total"] == 43_378_816 and share["adapted"] == adapted == sum(share["parts"].values())
    assert round(100 * share["share"], 2) == percent and len(chosen) == len(set(chosen.values()))


@pytest.mark.parametrize("predictor", sorted(H.PREDICTORS))
def test_every_predictor_adapts_or_says_why_not(predictor):
    torch.manual_seed(0)
    sizes = dict(SIZES, feature_dim=12, num_timesteps=4, pred_dim=24, pred_depth=1, num_heads=2)
    world, done = H.Hope(H.HopeConfig(**sizes, predictor=predictor)), []
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 5, N, 12, generator=generator)
    batch = {"features": features, "actions": features[:, 1:, 0, :ACTIONS], "states": torch.zeros(2, 4, ACTIONS)}
    before = {name: value.clone() for name, value in world.state_dict().items()}
    for part in A.PARTS:
        try:
            report = A.adaptation_gain(world, [batch], layers=part, steps=1, seen=3, grad_clip=0.0, resamples=2)
        except V.UserError as error:
            assert f"predictor {predictor} has no " in str(error)
        else:
            done.append(part)
            assert report["per_clip"][0]["adapted"]["change"] > 0 and not report["per_clip"][0]["adapted"]["failed"]
    parts = {part for part, found in A.part_parameters(world.predictor).items() if found}
    assert parts == {"identity": set(), "convlstm": {"bias"}}.get(predictor, set(A.PARTS))
    assert done == {"identity": [], "convlstm": ["bias", "mlp_out"]}.get(predictor, [*A.PARTS])
    assert all(torch.equal(before[name], value) for name, value in world.state_dict().items())
