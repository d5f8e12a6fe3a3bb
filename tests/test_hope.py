"""worlds/hope.py: predictors against the published form, what they may see, losses, rollouts, jumps, the curriculum,
weights from elsewhere, whole runs and their resume. The memories and the clips have files of their own."""

import contextlib
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, V
from training import run_file, stop_after_update

WORLD = ROOT / "worlds" / "hope.py"
Hope = V.import_world(WORLD, "Hope")
W = sys.modules[Hope.__module__]

# 2 x 3 patches of 5 numbers, 4 + 1 frames
SMALL = dict(
    feature_map="tiny",
    feature_dim=5,
    grid_high=2,
    grid_wide=3,
    num_timesteps=4,
    action_dim=2,
    pred_dim=28,
    pred_depth=2,
    num_heads=2,
    drop_path=0.0,
    batch_size=2,
    lr=1e-3,
    num_workers=0,
    steps=6,
    device="cpu",
    log_every=1,
    val_clips=4,
    val_every=0,
)
FLAGS = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
SEEING = ("ac_vit", "convlstm")
LEARNING = (*SEEING, "hope", "hybrid")


def config(**overrides):
    """A small config that holds its own rules -> HopeConfig."""
    cfg = replace(W.HopeConfig(), **{**SMALL, **overrides})
    V.validate_config(cfg)
    return cfg


def new_world(seed=0, **overrides):
    """A world with weights under which nothing stands still, in eval mode."""
    torch.manual_seed(seed)
    world = Hope(config(**overrides)).eval()
    with torch.no_grad():
        for parameter in world.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return world


def clip_of(cfg, num_clips=2, seed=0):
    """Noise in the shape of a batch -> {name: tensor}."""
    generator = torch.Generator().manual_seed(seed)
    T, A = cfg.num_timesteps, cfg.action_dim
    shapes = {"features": (T + 1, cfg.patches, cfg.feature_dim), "actions": (T, A), "states": (T, A)}
    shapes |= {"extrinsics": (T, A - 1)} if cfg.use_extrinsics else {}
    return {name: torch.randn(num_clips, *shape, generator=generator) for name, shape in shapes.items()}


def batch_of(cfg, step=0, **kwargs):
    """The same with what the world draws, and the step."""
    clip = clip_of(cfg, **kwargs)
    drawn = [Hope.draw(cfg, "train", index)["jump"] for index in range(len(clip["features"]))]
    return {**clip, "jump": torch.stack(drawn), "step": torch.tensor(step)}


def seen(clip):
    """A clip -> what `predict` takes: frames 0..T-1 and what is done at each."""
    return [clip["features"][:, :-1], *(clip[name] for name in ("actions", "states", "extrinsics") if name in clip)]


def told(call, *args, kind=V.UserError):
    """The error of a call, which must be one line -> its text."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- predictors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("vjepa2_ac", 43_378_816),
        ("baseline_convlstm", 5_263_616),
        pytest.param("vjepa2_ac_vitg", 305_220_992, marks=pytest.mark.slow),
    ],
)
def test_presets_have_the_parameters_of_the_original(preset, count):
    """At full size, on the meta device; described with the exact number."""
    cfg = replace(W.HopeConfig(), **V.merged(W.HopeConfig, "PRESETS")[preset], preset=preset)
    V.validate_config(cfg)
    with torch.device("meta"):
        world = Hope(cfg)
    assert sum(p.numel() for p in world.parameters()) == count and f"{count:,}" in world.describe()[0]


def test_identity_has_no_parameters():
    world = Hope(config(predictor="identity"))
    clip = clip_of(world.cfg)
    assert sum(p.numel() for p in world.parameters()) == 0
    assert torch.allclose(world.predict(*seen(clip)), world.normalise(clip["features"][:, :-1]), atol=1e-5)


def waves(name, shape):
    """Numbers between -0.5 and 0.5 that follow from a name alone, about 1 for the scale of a norm."""
    count = np.arange(int(np.prod(shape)))
    values = np.mod(np.sin(12.9898 * count + sum(name.encode())) * 43758.5453, 1) - 0.5
    values = values + name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
    return torch.from_numpy(values.reshape(shape)).float()


def published_weights(world):
    """Weights by `waves` under the names of the published predictor -> {name: tensor}."""
    names = {V.renamed(name, W.PUBLISHED, 1, 0): value for name, value in world.predictor.state_dict().items()}
    return {name: waves(name, value.shape) for name, value in names.items()}


# What the published class (vit_ac_predictor of facebookresearch/vjepa2) makes of the weights and inputs of `waves`
PUBLISHED_OUTPUT = {
    False: ([-2.32909, -2.1176, -1.4252], [-0.54322, 0.10254, -0.107, -0.64258, 0.32999, -0.88758], -130.204, 341.6679),
    True: ([-2.33896, -2.11564, -1.32962], [-0.4764, 0.15074, 0.03156, -0.3178, 0.51425, -0.8867], -128.2061, 325.6234),
}


@pytest.mark.parametrize("use_extrinsics", [False, True])
def test_ac_vit_is_the_published_predictor(use_extrinsics, tmp_path):
    """Its released layout loads, and outputs are those that its own code gave, for a grid that is no square. Seen red
    with rotary frequencies in pairs, with columns that are not stretched, and with an action that is not rotated in
    time."""
    cfg = config(
        num_timesteps=3,
        action_dim=3,
        use_extrinsics=use_extrinsics,
        init_from=str(tmp_path / "ac.pt"),
        normalise_actions=False,
    )
    world, lines = Hope(cfg).eval(), []
    names = {f"module.{name}": value for name, value in published_weights(world).items()}
    torch.save({"encoder": {}, "predictor": names, "epoch": 1}, tmp_path / "ac.pt")
    world.take_weights(lines.append)
    assert len(lines) == 1 and f"{len(names)} tensors" in lines[0] and "2 heads" in lines[0]
    x, a, s = waves("features", (2, 3, 6, 5)), waves("actions", (2, 3, 3)), waves("states", (2, 3, 3))
    e = waves("extrinsics", (2, 3, 2)) if use_extrinsics else None
    with torch.no_grad():
        y = world.predictor(x, a, s, e).double()
    patch, places, total, square = PUBLISHED_OUTPUT[use_extrinsics]
    assert y[1, :, 4, 2].tolist() == pytest.approx(patch, abs=3e-5)  # recorded with five digits
    assert y[0, 2, :, 0].tolist() == pytest.approx(places, abs=3e-5)
    assert (float(y.sum()), float(y.square().sum())) == pytest.approx((total, square), rel=1e-5)


def test_ac_vit_begins_as_published():
    """Truncated normal of 0.02, output layers divided by the root of twice their number, drop_path rising to its end,
    an idle encoder of extrinsics."""
    world = Hope(config(pred_dim=96, pred_depth=3, drop_path=0.2))
    for number, block in enumerate(world.predictor.blocks, 1):
        for layer, wanted in ((block.attn.qkv, 0.02), (block.attn.proj, 0.02 / (2 * number) ** 0.5)):
            assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=0.05)  # of 9000 numbers: 1 %
            assert not layer.bias.any()
    assert [block.share for block in world.predictor.blocks] == pytest.approx([0.0, 0.1, 0.2])
    idle = {name for name, p in world.named_parameters() if not p.requires_grad}
    assert idle == {"predictor.extrinsics_encoder.weight", "predictor.extrinsics_encoder.bias"}


def test_drop_path_skips_whole_samples():
    torch.manual_seed(0)
    kept = W.drop_path(torch.ones(4000, 2, 3), 0.25, True)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (kept[:, :1, :1] == kept).all() and float(kept.mean()) == pytest.approx(1.0, abs=0.04)
    assert torch.equal(W.drop_path(kept, 0.25, False), kept)


@pytest.mark.parametrize("predictor", SEEING)
def test_the_future_never_reaches_the_past(predictor):
    """Another frame, action or state at t: nothing before slot t moves, slot t does. Seen red without the cut of the
    keys. convlstm sees no states."""
    world = new_world(predictor=predictor)
    clip = seen(clip_of(world.cfg))
    with torch.no_grad():
        before = world.predict(*clip)
        for part in range(3):
            for t in range(world.cfg.num_timesteps):
                other = [values.clone() for values in clip]
                other[part][:, t] += 1.0 + torch.randn_like(other[part][:, t])
                change = (world.predict(*other) - before).abs().amax((0, 2, 3))
                assert change[:t].sum() == 0, (part, t)
                if (predictor, part) != ("convlstm", 2):
                    assert (change[t:] > 1e-4).all(), (part, t, change)


def test_only_ac_vit_sees_extrinsics():
    world = new_world(use_extrinsics=True)
    clip = clip_of(world.cfg)
    with torch.no_grad():
        change = world.predict(*seen(clip)) - world.predict(*seen({**clip, "extrinsics": clip["extrinsics"] + 1}))
    assert change.abs().amax((0, 2, 3)).min() > 1e-4


def test_the_convlstm_is_a_cell_by_hand():
    """Two frames of one patch in float64, against the equations of a ConvLSTM; new, it stands still."""
    cfg = config(predictor="convlstm", grid_high=1, grid_wide=1, num_timesteps=2, pred_dim=3)
    fresh, clip = Hope(cfg), clip_of(cfg, 1)
    assert torch.equal(fresh.predictor(*seen(clip)), clip["features"][:, :-1])
    net = new_world(**{**SMALL, **{k: getattr(cfg, k) for k in ("predictor", "grid_high", "grid_wide", "pred_dim")}})
    net = net.predictor.double()
    x, a = clip["features"][0, :2, 0].double(), clip["actions"][0].double()
    centre = net.gates.weight[:, :, 1, 1]
    hidden = cell = torch.zeros(3, dtype=torch.float64)
    wanted = []
    for t in range(2):
        row = torch.cat([net.embed.weight[:, :, 0, 0] @ x[t] + net.embed.bias, a[t], hidden])
        keep, take, show, new = (centre @ row + net.gates.bias).split(3)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(take) * torch.tanh(new)
        hidden = torch.sigmoid(show) * torch.tanh(cell)
        wanted.append(x[t] + net.out.weight[:, :, 0, 0] @ hidden + net.out.bias)
    found = net(x[None, :, None], a[None], a[None])[0, :, 0]
    assert torch.allclose(found, torch.stack(wanted), atol=1e-12)


@pytest.mark.parametrize("predictor", LEARNING)
def test_residual_predictors_begin_as_identity(predictor):
    """Teacher, rollout and jump give the last frame; gradients reach the output layer. convlstm always does."""
    world = Hope(config(predictor=predictor, residual=predictor != "convlstm")).train()
    clip = clip_of(world.cfg)
    rows, z = seen(clip), world.normalise(clip["features"])
    assert torch.allclose(world.predict(*rows), z[:, :-1], atol=1e-5)
    assert torch.allclose(world.rollout(*rows), z[:, :1].expand(-1, 4, -1, -1), atol=1e-5)
    if predictor != "convlstm":
        assert torch.allclose(world.jump(*rows, times=torch.tensor([1, 3])), z[:, 0], atol=1e-5)
        assert (Hope(config(predictor=predictor)).predict(*rows) - z[:, :-1]).abs().mean() > 0.1
    world(batch_of(world.cfg))[0]["loss_total"].backward()
    assert world.predictor.out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("predictor", LEARNING)
def test_actions_count_by_their_statistics(predictor):
    """Actions, states and extrinsics in other units are the same to a world whose statistics are in these; unknown
    states of a rollout are the mean one. Without the field they enter as they are."""
    world = new_world(predictor=predictor, use_extrinsics=True)
    rows = seen(clip_of(world.cfg))
    before = world.predict(*rows), world.rollout(*rows)
    for name in ("actions", "states", "extrinsics"):
        getattr(world, f"{name}_mean").fill_(5.0), getattr(world, f"{name}_std").fill_(0.01)
    units = rows[:1] + [0.01 * row + 5.0 for row in rows[1:]]
    assert torch.allclose(world.predict(*units), before[0], atol=1e-3)  # 5 + 0.01 x loses four digits
    assert torch.allclose(world.rollout(*units), before[1], atol=1e-3)
    assert (world.predict(*rows) - before[0]).abs().max() > 0.1
    raw = Hope(config(predictor=predictor, use_extrinsics=True, normalise_actions=False))
    assert not [name for name, _ in raw.named_buffers() if name.endswith(("_mean", "_std"))]


def test_tokens_of_actions_are_as_large_as_those_of_patches():
    """With normalised actions, half of it bias: so the first norm leaves how strong an action is."""
    torch.manual_seed(0)
    net = Hope(config(feature_dim=64, pred_dim=96, num_heads=8)).predictor
    tokens = net.frame_tokens(torch.randn(64, 4, 6, 64), torch.randn(64, 4, 2), torch.randn(64, 4, 2)).detach()
    action, state, patch = (
        part.square().mean().sqrt() for part in (tokens[:, :, 0], tokens[:, :, 1], tokens[:, :, 2:])
    )
    assert 0.7 < action / patch < 1.4 and 0.7 < state / patch < 1.4, (action, state, patch)
    assert net.action_encoder.bias.detach().square().mean().sqrt() > 0.4 * action


# -- rollouts and jumps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictor", "context"),
    [("ac_vit", 1), ("ac_vit", 2), ("convlstm", 2), ("hope", 2), pytest.param("hybrid", 1, marks=pytest.mark.slow)],
)
def test_a_rollout_is_the_growing_sequence(predictor, context):
    """Taking up where the last frame ended gives what the whole sequence gives, and gradients as well; frames behind
    the context count for nothing. Seen red with a past that is not rotated, and with actions one late."""
    world = new_world(predictor=predictor, use_extrinsics=predictor == "ac_vit", known_states=True)
    features, *beside = seen(clip := clip_of(world.cfg))
    T = world.cfg.num_timesteps
    grown = world.normalise(features[:, :context])
    for t in range(context, T + 1):
        preds = world.predictor(grown, *(part[:, :t] for part in beside))
        grown = torch.cat([grown, world.normalise(preds[:, -1:])], 1)
    guesses = world.rollout(clip["features"], *beside, context=context)
    assert guesses.shape == (2, T + 1 - context, 6, 5)
    assert torch.allclose(guesses, grown[:, context:], atol=2e-5)  # sums in another order, 4 frames on end
    wanted, found = (
        torch.autograd.grad(each[:, -1].square().sum(), world.trained().values(), retain_graph=True, allow_unused=True)
        for each in (grown * torch.arange(5), guesses * torch.arange(5))
    )
    for a, b in zip(wanted, found):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-3 * a.norm() + 1e-5)
    blind = clip["features"].clone()
    blind[:, context:] = torch.nan
    assert torch.equal(world.rollout(blind, *beside, context=context, steps=2), guesses[:, :2])


@pytest.mark.parametrize("known", [False, True])
def test_a_rollout_is_not_told_what_became_of_it(known):
    """States and extrinsics behind the context count for nothing, unless they are known beforehand; actions do. Seen
    red with true states in every rollout: shuffled actions then cost nothing, as speeds told all."""
    world = new_world(use_extrinsics=True, known_states=known)
    clip = clip_of(world.cfg)
    rows = [clip[name] for name in ("features", "actions", "states", "extrinsics")]
    with torch.no_grad():
        before = world.rollout(*rows, context=2)
        for part in (1, 2, 3):
            other = [row.clone() for row in rows]
            other[part][:, 2:] += 1
            change = (world.rollout(*other, context=2) - before).abs().amax((0, 2, 3))
            assert change[0] == 0 and (change[1:] > 1e-4).all() == (known or part == 1), part
            other[part][:, 1] += 1
            assert (world.rollout(*other, context=2) - before).abs().max() > 1e-4


def test_gradients_flow_through_all_steps_of_a_rollout():
    """The last guess depends on the first frame through every guess between."""
    world = new_world()
    features, *beside = seen(clip_of(world.cfg))
    first = features[:, :1].clone().requires_grad_()
    world.rollout(first, *beside)[:, -1, :, 0].sum().backward()
    assert first.grad.abs().max() > 1e-5


def test_a_rollout_beyond_its_actions_is_refused():
    world = new_world()
    features, *beside = seen(clip_of(world.cfg))
    for more in (dict(steps=5), dict(context=0), dict(context=2, steps=4)):
        with pytest.raises(ValueError, match="a rollout of"):
            world.rollout(features, *beside, **more)
    with pytest.raises(ValueError, match="num_timesteps = 4"):
        world.predictor(*(torch.cat([part, part], 1) for part in (features, *beside)))


@pytest.mark.parametrize("predictor", ["ac_vit", "hope", "hybrid"])
def test_a_jump_is_one_pass_at_another_time(predictor):
    """At time 0 it is the guess from the first frame; later frames and actions count for nothing; the place in time
    does, for each sample by itself."""
    world = new_world(predictor=predictor)
    features, *beside = seen(clip := clip_of(world.cfg))
    with torch.no_grad():
        found = world.jump(features, *beside, times=torch.tensor([0, 3]))
        assert torch.allclose(found[0], world.predict(*seen(clip))[0, 0], atol=1e-6)
        late = world.jump(features, *beside, times=torch.tensor([3, 3]))
        assert torch.equal(late[1], found[1]) and (late[0] - found[0]).abs().max() > 1e-3
        blind = [torch.cat([part[:, :1], torch.full_like(part[:, 1:], torch.nan)], 1) for part in (features, *beside)]
        assert torch.equal(world.jump(*blind, times=torch.tensor([3, 3])), late)
        places = world.predictor.rope(0, 4)[0].unflatten(0, (4, -1))  # [T, M, hd]
        assert torch.equal(world.predictor.rope(0, 1, torch.tensor([2]))[0][0, 0], places[2])


# -- losses -----------------------------------------------------------------------------------------------------------


def test_frame_errors_by_hand():
    """l1, mean square, and huber, which is half the square up to 1 and the distance less a half beyond."""
    preds, targets = torch.tensor([0.5, -2.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    for form, wanted in (("l1", 1.25), ("l2", 2.125), ("huber", (0.125 + 1.5) / 2)):
        world = Hope(config(predictor="identity", loss_form=form))
        assert world.frame_error(preds, targets).tolist() == [[pytest.approx(wanted)]]


def test_normalise_is_a_layer_norm_without_weights():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float16)
    wide = x.double()
    wanted = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(Hope(config(predictor="identity")).normalise(x).double(), wanted, atol=1e-5)
    assert torch.equal(Hope(config(predictor="identity", normalise=False)).normalise(x), x.float())


def test_the_losses_of_a_step_against_plain_loops():
    """Teacher forcing over all frames, a rollout over its own, a jump of each sample to the frame that it drew; their
    sum by weights."""
    fields = dict(context_frames=2, rollout_steps=2, jump_frames=3, lambda_teacher=0.5, lambda_jump=2.0)
    world = new_world(**fields).train()
    batch = batch_of(world.cfg)
    losses, gauges, _ = world(batch)
    z, beside = world.normalise(batch["features"]), [batch["actions"], batch["states"]]
    teacher = (world.predict(z[:, :4], *beside) - z[:, 1:]).abs().mean()
    rolled = (world.rollout(z, *beside, context=2, steps=2) - z[:, 2:4]).abs().mean()
    jumps = []
    for number, share in enumerate(batch["jump"].tolist()):
        tau = 4 - int(3 * share)
        one = [part[number : number + 1] for part in (z, *beside)]
        guess = world.jump(*one, times=torch.tensor([tau - 1]))
        jumps.append((guess[0] - z[number, tau]).abs().mean())
    jumped = torch.stack(jumps).mean()
    found = [losses[f"loss_{name}"] for name in ("teacher", "rollout", "jump", "total")]
    wanted = [teacher, rolled, jumped, 0.5 * teacher + rolled + 2 * jumped]
    assert torch.allclose(torch.stack(found), torch.stack(wanted), rtol=1e-5)
    assert float(gauges["still"]) == pytest.approx(float((z[:, :-1] - z[:, 1:]).abs().mean()), rel=1e-5)


def test_draws_of_jumps_follow_from_seed_stream_and_number():
    """And they reach each of the last frames about as often."""
    cfg = config()
    drawn = [float(Hope.draw(cfg, "train", index)["jump"]) for index in range(600)]
    assert drawn[:5] == [float(Hope.draw(cfg, "train", index)["jump"]) for index in range(5)]
    assert drawn[0] != float(Hope.draw(cfg, "val", 0)["jump"])
    counts = np.bincount([int(3 * share) for share in drawn])
    assert len(counts) == 3 and counts.min() > 150


def test_an_evaluation_looks_at_every_horizon():
    """Errors of a whole rollout, each beside the last context frame, and beside a rollout under another clip's
    actions; identity's own ratios are 1, and actions save it nothing."""
    world = new_world(rollout_steps=2)
    batch = batch_of(world.cfg)
    with torch.no_grad():
        losses, gauges, _ = world(batch)
    means = {name: float(value) for name, value in {**losses, **gauges}.items()}
    values = world.figures([], means)
    z, beside = world.normalise(batch["features"]), [batch["actions"], batch["states"]]
    with torch.no_grad():
        guesses = world.rollout(z, *beside)
        swapped = (world.rollout(z, beside[0].flip(0), beside[1]) - z[:, 1:]).abs().mean()
    for h in range(1, 5):
        error, still = (guesses[:, h - 1] - z[:, h]).abs().mean(), (z[:, 0] - z[:, h]).abs().mean()
        assert values[f"ratio_{h}"] == pytest.approx(float(error / still), rel=1e-4)
    assert "ratio_5" not in values
    assert means["loss_rollout"] == pytest.approx(float((guesses[:, :2] - z[:, 1:3]).abs().mean()), rel=1e-4)
    gain = 1 - float((guesses - z[:, 1:]).abs().mean() / swapped)
    assert values["action_gain"] == pytest.approx(gain, abs=1e-5)
    assert (
        "horizon" in world.verdict({f"val_{name}": value for name, value in values.items()}) or values["ratio_1"] >= 1
    )
    still = Hope(config(predictor="identity")).eval()
    with torch.no_grad():
        _, gauges, _ = still(batch)
    values = still.figures([], {"loss_teacher": 1.0, **{name: float(value) for name, value in gauges.items()}})
    assert values["rollout_ratio"] == pytest.approx(1) and values["action_gain"] == pytest.approx(0, abs=1e-6)
    assert "no better at 1" in still.verdict({f"val_{name}": value for name, value in values.items()})


# -- curriculum -------------------------------------------------------------------------------------------------------


def test_a_curriculum_by_step_and_by_epoch():
    """What an entry does not name stays as it was; the loop's count of files turns steps into epochs."""
    cfg = config(curriculum="0s:rollout=1; 3s: rollout=4 , teacher=0.5;5s:lambda_rollout=0")
    stages = [cfg.stage_at(step) for step in (0, 2, 3, 4, 5, 99)]
    assert [(number, stage.rollout, stage.teacher, stage.lambda_rollout) for number, stage in stages] == [
        (0, 1, 1.0, 1.0), (0, 1, 1.0, 1.0), (1, 4, 0.5, 1.0), (1, 4, 0.5, 1.0), (2, 4, 0.5, 0.0), (2, 4, 0.5, 0.0),
    ]  # fmt: skip
    cfg = config(curriculum="2:rollout=3", grad_accum=2)  # 8 samples per step on two ranks
    assert [cfg.stage_at(step, 12, 2)[1].rollout for step in range(5)] == [2, 2, 2, 3, 3]
    assert cfg.stage_at(10**6)[1].rollout == 2  # outside of a run no epoch passes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rollout=2", "'rollout=2' is not EPOCH:NAME=VALUE"),
        ("0:frames=2", "'frames=2' does not set one of rollout, jump, teacher"),
        ("0:rollout", "'rollout' does not set one of"),
        ("0:rollout=0", "rollout must be a whole number above 0"),
        ("0:rollout=2.5", "rollout must be a whole number above 0"),
        ("0:teacher=-1", "teacher must be a number of 0 or more"),
        ("0:teacher=nan", "teacher must be a number of 0 or more"),
        ("0:rollout=1,rollout=2", "sets rollout twice"),
        ("5:rollout=1;5:rollout=2", "must begin after 5"),
        ("0:rollout=1;5s:rollout=2", "by epoch or by step, not both"),
        ("3:rollout=5", "a rollout of 5 frames exceeds num_timesteps - context_frames + 1 = 4"),
        ("3:lambda_jump=1,jump=5", "must not exceed num_timesteps, 5 asked"),
        ("3:teacher=0,lambda_rollout=0", "some loss must have a weight"),
    ],
)
def test_a_curriculum_that_cannot_be_is_one_line(text, why):
    error = told(lambda: config(curriculum=text), kind=V.UsageError)
    assert why in error and error.startswith("config: ")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (dict(context_frames=5), "context_frames = 5: must not exceed num_timesteps = 4"),
        (dict(rollout_steps=5), "rollout_steps = 5: a rollout of 5 frames exceeds"),
        (dict(num_heads=3), "pred_dim = 28: must be divisible by 3 heads"),
        (dict(num_heads=7), "an even number of 6 or more for each"),
        (dict(num_heads=4), "an even number of 6 or more for each"),
        (dict(predictor="convlstm", lambda_jump=1.0), "convlstm knows no such place"),
        (dict(predictor="hope", chunk=4), "chunk = 4: must be below 4, the frames of the longest pass"),
        (dict(predictor="hybrid", curriculum="0:teacher=0,rollout=1"), "chunk = 1: must be below 1, the frames"),
        (dict(predictor="hope", lambda_teacher=0, lambda_rollout=0, lambda_jump=1), "memories that nothing is read"),
        (dict(use_extrinsics=True, action_dim=1), "action_dim = 1: must be at least 2 with use_extrinsics"),
        (dict(clip_start=5, clip_end=5), "clip_end = 5: must exceed clip_start = 5"),
        (dict(predictor="identity", init_from="x.pt"), "init_from = 'x.pt': identity has no weights"),
        (dict(predictor="lstm"), "predictor = 'lstm': must be one of ac_vit"),
    ],
)
def test_settings_that_cannot_be_are_one_line(fields, why):
    assert why in told(lambda: config(**fields), kind=V.UsageError)


def test_a_step_follows_the_curriculum():
    """Losses of a step are of its part, and a loss without weight is not computed in training."""
    world = new_world(curriculum="0s:rollout=1,lambda_jump=1;2s:rollout=3,teacher=0,lambda_jump=0").train()
    early, late = (world(batch_of(world.cfg, step))[0] for step in (1, 2))
    assert set(early) == {"loss_total", "loss_teacher", "loss_rollout", "loss_jump"}
    assert set(late) == {"loss_total", "loss_rollout"}
    z = world.normalise(batch_of(world.cfg)["features"])
    guesses = world.rollout(z, *(batch_of(world.cfg)[name] for name in ("actions", "states")), steps=3)
    assert torch.allclose(late["loss_total"], (guesses - z[:, 1:4]).abs().mean())
    lines = [world.after_step([], step) for step in range(3)]
    assert lines[0] == [] == lines[2] and lines[1][0].startswith("curriculum: from step 2 on: next frame x 0, rollouts")
    assert [world.state(step) for step in (1, 2)] == [
        {"rollout_frames": 1, "stage": 0},
        {"rollout_frames": 3, "stage": 1},
    ]


def test_memories_learn_in_a_group_of_their_own():
    """At half the rate, without decay; every parameter that learns is in one group."""
    world = Hope(config(predictor="hope", lr=1.0))
    groups = {group["name"]: group for group in world.optimizer().param_groups}
    assert set(groups) == {"decay", "no_decay", "memory"}
    assert (groups["memory"]["peak_lr"], groups["decay"]["peak_lr"]) == (0.5, 1.0)
    assert groups["memory"]["weight_decay"] == 0.0 and len(groups["memory"]["params"]) == sum(
        ".titans." in name and "memory." in name for name in world.trained()
    )
    assert sum(len(group["params"]) for group in groups.values()) == len(world.trained())
    assert [group["name"] for group in Hope(config()).groups()] == ["decay", "no_decay"]


def test_the_flat_schedule():
    """A rise from a share of the peak over 8.5 % of the steps, then the peak, then a fall over as many."""
    world = Hope(config(schedule="flat", steps=1000, lr=1.0, min_lr=0.01))
    rates = [world.lr(step, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.176) and rates[85:915] == [1.0] * 830 and rates[-1] == pytest.approx(1 / 85)
    assert all(a < b for a, b in zip(rates[:85], rates[1:86])) and all(a > b for a, b in zip(rates[915:], rates[916:]))
    assert Hope(config(lr=1.0)).lr(3, 1.0) == V.lr_at(3, config(lr=1.0), 1.0)
    assert world.optimizer().param_groups[0]["betas"] == (0.9, 0.999)


# -- weights from elsewhere -------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    """Other sizes by the names of their fields, what is absent, what is no weights."""
    path = tmp_path / "ac.pt"
    world = Hope(config(init_from=str(path), normalise_actions=False))
    assert "no such file" in told(world.take_weights, print)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "git lfs pull" in told(world.take_weights, print)
    torch.save({"encoder": {}}, path)
    assert f"init_from {path}: holds no predictor (--init_from)" == told(world.take_weights, print)
    other = Hope(config(feature_dim=7, pred_depth=3, action_dim=4))
    torch.save({"predictor": published_weights(other)}, path)
    assert told(world.take_weights, print).endswith(
        "does not fit: feature_dim = 5, the weights have 7 (--feature_dim); action_dim = 2, the weights have 4 "
        "(--action_dim); pred_depth = 2, the weights have 3 (--pred_depth)"
    )
    good = published_weights(world)
    good.pop("predictor_norm.bias")
    torch.save({"predictor": good}, path)
    assert "does not fit: no predictor_norm.bias" in told(world.take_weights, print)
    torch.save({"predictor": {**published_weights(world), "state_encoder.bias": torch.full((28,), torch.nan)}}, path)
    assert "state_encoder.bias holds NaN" in told(world.take_weights, print)
    torch.save({"predictor": published_weights(world)}, path)
    for field in ("residual", "normalise_actions"):
        other = Hope(replace(world.cfg, **{field: True}))
        assert f"were learned without {field} (--no-{field})" in told(other.take_weights, print)
    torch.save({"predictor": {"x": print}}, path)
    assert "cannot be read as weights" in told(world.take_weights, print)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips in which every patch moves along by what the action says -> folder."""
    root, rng = tmp_path_factory.mktemp("hope") / "clips", np.random.default_rng(0)
    for number in range(12):
        actions = rng.normal(size=(4, 2)).astype(np.float32)
        way = np.concatenate([np.zeros((1, 2)), actions.cumsum(0)])
        features = rng.normal(size=(1, 6, 5)) + np.pad(way, ((0, 0), (0, 3)))[:, None]
        folder = root / f"clip_{number:05d}"
        for name, content in (("feature_maps/tiny", features.reshape(-1, 5)), ("actions_states/actions", actions)):
            (folder / name).parent.mkdir(parents=True)
            np.save(folder / f"{name}.npy", content.astype(np.float32))
    return root


def run_here(*argv):
    """A command line of the world in this process -> (exit code, all that it printed)."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = V.main([*FLAGS, *map(str, argv)], world=Hope)
    return code, output.getvalue()


def facts(folder):
    """Records of a run without times and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "data_wait", "mem_gb", "time")} for row in rows]


def weights(folder):
    return torch.load(folder / "checkpoints" / "ckpt_final.pt", weights_only=True)["model"]


def test_a_run_stopped_at_any_part_ends_like_one_that_was_not(clips, tmp_path, monkeypatch):
    """With dropped paths and a curriculum by epoch: records and weights equal to the bit. The log tells where a part
    begins, the end a verdict and a picture; a run from its weights begins with them. Clips of the test side are read by
    nobody."""
    argv = ["--data_root", clips, "--drop_path", 0.3, "--curriculum", "0:rollout=1;1:rollout=3,teacher=0.5"]
    argv += ["--batch_size", 4, "--steps", 4, "--ckpt_every", 2]
    read, real = set(), W.FeatureClips.read_file

    def watched(self, video, plan):
        read.add((self.stream, video.name))
        return real(self, video, plan)

    monkeypatch.setattr(W.FeatureClips, "read_file", watched)
    monkeypatch.setattr(W.FeatureClips, "try_some", lambda *_: None)  # a look at the first clip before they are split
    code, output = run_here(*argv, "--out_dir", tmp_path / "one")
    assert code == 0, output
    trained, val = ({name for stream, name in read if stream == side} for side in ("train", "val"))
    assert trained and not trained & val and not any("clip_00011" in name for name in trained | val)
    stop_after_update(monkeypatch, lambda phase, step: step == 1)
    assert run_here(*argv, "--out_dir", tmp_path / "two")[0] == 75
    monkeypatch.undo()
    assert run_here(*argv, "--out_dir", tmp_path / "two")[0] == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert facts(one) == facts(two)
    rows = [row for row in facts(one) if "loss_total" in row]
    assert [row["rollout_frames"] for row in rows] == [1, 1, 1, 3]  # 10 training clips, 4 per step
    assert "curriculum: from epoch 1 on: next frame x 0.5, rollouts of 3 frames x 1" in (one / "train.log").read_text()
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "horizons.png").stat().st_size > 1000 and "picture: " in output and "error / identity's" in output
    last = facts(one)[-1]
    assert {"val_ratio_1", "val_ratio_4", "val_rollout_ratio", "val_action_gain", "val_ratio"} <= last.keys()
    actions = np.stack([np.load(clips / f"clip_{n:05d}/actions_states/actions.npy") for n in range(10)]).reshape(-1, 2)
    assert torch.allclose(first["actions_mean"], torch.from_numpy(actions.mean(0)), atol=1e-6)
    assert torch.allclose(first["actions_std"], torch.from_numpy(actions.std(0)), atol=1e-6)
    assert first["states_mean"].tolist() == [0, 0] and first["states_std"].tolist() == [1, 1]  # absent: zeros
    assert (two / "train.log").read_text().count(" in 10 training clips, normalised by that") == 2  # not on resume
    world, lines = Hope(config(init_from=str(one / "checkpoints" / "ckpt_final.pt"))), []
    world.take_weights(lines.append)
    assert "weights: predictor of" in lines[0] and "(checkpoint of a run)" in lines[0]
    assert all(torch.equal(first[name], value) for name, value in world.state_dict().items())
    world.take_data(None)  # its statistics stay
    raw = Hope(replace(world.cfg, normalise_actions=False))
    assert "weights were learned with normalise_actions (--normalise_actions)" in told(raw.take_weights, print)
    world, cfg = V.load_model(one / "checkpoints" / "ckpt_final.pt", world=Hope)
    assert world.predict(*seen(clip_of(cfg))).shape == (2, 4, 6, 5) and not world.training


def test_wrong_commands_are_one_line(clips, tmp_path):
    """Bad settings, ids without clips, weights that are not there."""
    for argv, why in (
        (["--clip_start", 50], "no clip has an id from 50"),
        (["--curriculum", "0:rollout=9"], "a rollout of 9 frames exceeds num_timesteps"),
        (["--feature_map", "other"], "no clip_<id>/feature_maps/other.npy"),
        (["--init_from", tmp_path / "absent.pt"], "absent.pt: no such file (--init_from)"),
        (["--use_extrinsics"], "extrinsics.npy"),
        (["--num_timesteps", 9], "num_timesteps = 9 needs 10"),
    ):
        code, output = run_here("--data_root", clips, "--out_dir", tmp_path / "run", *argv)
        last = output.splitlines()[-1]
        assert code in (1, 2) and last.startswith("error: ") and why in last, output
        assert output.count("error: ") == 1 and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["identity", *LEARNING])
def test_a_dry_run_counts_a_step_in_shapes(predictor, capsys):
    code, output = run_here("--predictor", predictor, "--dry_run")
    assert code == 0 and "TFLOP per clip" in output and f"({predictor})" in output, output


@pytest.mark.parametrize(
    "predictor", ["hope", *(pytest.param(n, marks=pytest.mark.slow) for n in LEARNING if n != "hope")]
)
def test_autocast_stays_near(predictor):
    """bf16 autocast: losses within 2 %, bf16 keeps 8 bits, and gradients for all that learns."""
    world = new_world(predictor=predictor).train()
    batch = batch_of(world.cfg)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, _ = world(batch)
    losses["loss_total"].backward()
    assert losses["loss_total"].item() == pytest.approx(world(batch)[0]["loss_total"].item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in world.trained().values())


def test_checkpointed_blocks_give_the_same_gradients():
    grads = []
    for again in (False, True):
        world = new_world(grad_checkpoint=again, drop_path=0.5).train()
        torch.manual_seed(3)
        world(batch_of(world.cfg))[0]["loss_total"].backward()
        grads.append([p.grad for p in world.trained().values()])
    assert all(torch.equal(*pair) for pair in zip(*grads))


@pytest.mark.slow
@pytest.mark.parametrize(("predictor", "kind"), [("ac_vit", "none"), ("hope", "fsdp")])
def test_two_ranks_are_one(clips, tmp_path, predictor, kind):
    """Two gloo ranks at half the batch log the losses of one process, whole or sharded, with all losses and a part of
    the curriculum that begins on the way."""
    argv = [WORLD, *FLAGS, "--data_root", clips, "--predictor", predictor, "--steps", 4]
    argv += ["--curriculum", "0s:rollout=2,lambda_jump=1;2s:rollout=3"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_file(*argv, "--batch_size", 4, "--out_dir", tmp_path / "one")
    run_file(*ranks, *argv, "--batch_size", 2, "--shard", kind, "--out_dir", tmp_path / "two")
    one, two = ([row["loss_total"] for row in facts(tmp_path / name) if "loss_total" in row] for name in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("predictor", LEARNING)
def test_compiled_blocks_compute_the_same(predictor):
    """--compile takes block by block, and a rollout that grows over them. Without a compiler behind the graphs, which
    takes minutes."""
    losses, grads = [], []
    for compiled in (False, True):
        world = new_world(predictor=predictor, rollout_steps=4).train()
        if compiled:
            world.compile(dynamic=False, backend="eager")
        loss = world(batch_of(world.cfg))[0]["loss_total"]
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad for p in world.trained().values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all((a - b).norm() <= 1e-3 * a.norm() + 1e-5 for a, b in zip(*grads))
