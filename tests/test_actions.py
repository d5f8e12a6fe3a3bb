"""Actions: the signals of a clip's future reach SOON's predictor and the flow net, at the right times, no one else."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, V, plain_config, small_config
from PIL import Image
from training import cpu_process, fill_space, new_model, new_phase, new_state, stop_after_update

sys.path.insert(0, str(ROOT / "tools"))

import evaluate as E  # noqa: E402

FPS, STEP = 8.0, 4  # of the grey video; its frame k has the grey STEP * k


def active(**overrides):
    """A small config that is told two signals of rendered steered scenes."""
    return small_config(**{**dict(actions="steer,accel", scenes="render", scene_mix="steered=1"), **overrides})


def awake(cfg, seed=0):
    """A model in eval mode none of whose parts starts as zero, so that whatever is told can show."""
    model = new_model(cfg, seed).eval()
    fill_space(model)
    generator = torch.Generator().manual_seed(seed)
    for net in (model.flow, model.flow_ema, model.predictor):
        for value in net.parameters():
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return model


def with_draws(cfg, batch, **changes):
    """A batch with the masks and noise that a config asks for."""
    drawn = V.collate([{**V.mask_and_noise(cfg, "train", index), "bad": []} for index in range(4)])
    return {**batch, **{name: value for name, value in drawn.items() if name != "bad"}, **changes}


def futures(model, frames, actions=None):
    return model.sample_futures(frames, 2, 2, torch.Generator().manual_seed(0), actions)


@pytest.fixture(scope="module")
def batch():
    """Four rendered clips with their actions."""
    cfg = active()
    data = V.open_data(V.VJepaAutoV2, cfg, [], True, None).dataset(cfg, "train")
    found = V.collate([data[index] for index in range(4)])
    del found["bad"]
    return found


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """48 frames at 8 per second, each with a grey of its own: a video, and pictures of the same -> folder."""
    folder = tmp_path_factory.mktemp("grey")
    frames = np.broadcast_to((STEP * np.arange(48, dtype=np.uint8))[:, None, None, None], (48, 32, 32, 3))
    V.write_video(folder / "a.mp4", np.ascontiguousarray(frames), FPS)
    (folder / "pictures").mkdir()
    for number in range(48):
        Image.fromarray(frames[number]).save(folder / "pictures" / f"{number}.png", compress_level=1)
    return folder


def samples_of(folder, row, count, **overrides):
    """Samples of a list with one line -> [(frames by their grey [T], actions [tubelets, A])]."""
    path = folder / f"list_{abs(hash(json.dumps(row)))}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    cfg = active(scenes="files", actions="speed,steer", crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0)
    cfg = replace(cfg, data_root=str(path), **overrides)
    data = V.ClipDataset(cfg, V.read_list(str(path)), str(path), "train", draw=V.mask_and_noise)
    samples = [data[index] for index in range(count)]
    assert not any(sample["bad"] for sample in samples)
    return [(s["frames"].double().mean((1, 2, 3)) / STEP, s["actions"], s["frames"]) for s in samples]


# -- settings


@pytest.mark.parametrize(
    "changes, why",
    [
        (
            dict(actions="steer,wheel"),
            "actions = 'steer,wheel': no signal wheel; none, or some of speed,steer,yaw_rate",
        ),
        (dict(actions="steer, steer"), "names a signal twice"),
        (dict(actions=""), "no signal ''; none, or"),
        (dict(actions="none,steer"), "no signal none"),
        (dict(action_drop=1.5), "action_drop = 1.5: must lie in 0 to 1"),
        (dict(latents="cache", freeze_encoder=True), r"must be none: cached latents hold no signals \(--latents\)"),
    ],
)
def test_bad_settings_are_refused(changes, why):
    with pytest.raises(V.UsageError, match=why):
        V.validate_config(active(**changes))


def test_names_are_read_in_their_order():
    assert active(actions="accel, speed").action_names == ("accel", "speed") and not small_config().action_names


# -- actions of a clip


def test_rendered_scenes_have_their_own_actions(batch):
    """Every tubelet holds the mean of what the labels say of its frames. Seen red with the tubelets reversed."""
    cfg = active()
    for index in range(4):
        labels = V.scene(V.scene_seed_at(cfg, index), 0, cfg)[1]
        rows = np.stack([labels["steer"], labels["accel"]], 1)
        wanted = (rows[0::2] + rows[1::2]) / 2
        np.testing.assert_allclose(batch["actions"][index], wanted, atol=1e-6)
    assert batch["actions"].dtype == torch.float32 and batch["actions"][:, 2:, 0].abs().amin(1).max() > 0


@pytest.mark.parametrize("way", ["whole", "part", "windows", "short", "slow signals"])
def test_actions_come_from_the_frames_times(grey, way):
    """The grey of a decoded frame tells its own number in the file, and so does the signal: both must agree, for any
    window, a part of a file (whose signals begin with it), windows that follow one another, a file shorter than the
    window, and signals at another rate. Seen red with `- video.begin` left out, and with the window's start ignored."""
    begin, rate = (2.0, FPS) if way == "part" else (0.0, 2.0 if way == "slow signals" else FPS)
    signal = (np.arange(begin, 6.0, 1 / rate) * FPS).tolist()
    row = {"video": str(grey / "a.mp4"), "signals": {"fps": rate, "speed": signal, "steer": signal}}
    row |= {"begin": begin, "length": 4.0} if way == "part" else {}
    row |= {"begin": 0.5, "length": 1.5} if way == "short" else {}
    if way == "short":
        row["signals"] = {"fps": FPS, "speed": signal[4:], "steer": signal[4:]}
    found = samples_of(grey, row, 4, windows_per_file=2 if way == "windows" else 1)
    for seen, actions, _ in found:
        held = np.floor(seen.round().numpy() * rate / FPS) * FPS / rate  # the value at or before the frame
        np.testing.assert_allclose(actions[:, 0], (held[0::2] + held[1::2]) / 2, atol=0.3)
    assert len({float(actions[0, 0]) for _, actions, _ in found}) > 1 or way == "short"


def test_actions_of_pictures_follow_their_told_times(grey, tmp_path):
    """Pictures with a gap of five seconds between two stretches: signals run through it by the clock."""
    times = np.arange(48) / FPS + 5.0 * (np.arange(48) >= 24)
    (tmp_path / "times.txt").write_text("".join(f"{second}\n" for second in times))
    clock = (np.arange(0, 12, 0.125) * FPS).tolist()
    row = {"frames": str(grey / "pictures"), "times": str(tmp_path / "times.txt")}
    row["signals"] = {"fps": FPS, "speed": clock, "steer": clock}
    found = samples_of(tmp_path, row, 6)
    stretches = set()
    for seen, actions, _ in found:
        second = times[seen.round().int().numpy()] * FPS
        np.testing.assert_allclose(actions[:, 0], (second[0::2] + second[1::2]) / 2, atol=0.3)
        stretches.add(bool(seen[0] >= 24))
    assert stretches == {True, False}


def test_a_mirrored_clip_is_steered_the_other_way(grey):
    """Steering changes its sign with the picture, speed does not. Seen red with MIRRORED empty."""
    signal = list(range(1, 49))
    row = {"video": str(grey / "a.mp4"), "signals": {"fps": FPS, "speed": signal, "steer": signal}}
    ratio = [actions[:, 1] / actions[:, 0] for _, actions, _ in samples_of(grey, row, 12, hflip=True)]
    assert {float(value) for row in ratio for value in row} == {1.0, -1.0}
    assert all((row == row[0]).all() for row in ratio)


@pytest.mark.parametrize(
    "signals, known",
    [
        ({"speed": [1.0] * 48, "steer": [0.0] * 48}, 12),
        ({"speed": [1.0] * 48, "steer": [0.0] * 20}, 0),  # ends too early: not gone on with
        ({"speed": [1.0] * 48, "yaw_rate": [0.0] * 48}, 6),  # steering is not made of it
        ({"speed": [1.0] * 48, "steer": [None] * 48}, 6),
        ({"speed": [], "steer": None}, 0),
        ({}, 0),
    ],
)
def test_what_is_not_known_is_nan_and_makes_a_passive_clip(grey, signals, known):
    """Missing, null or too short signals: NaN, and the whole clip counts as passive. Seen red with the last value of a
    list repeated."""
    row = {"video": str(grey / "a.mp4"), "signals": {"fps": FPS, **signals}}
    cfg, (_, actions, _) = active(), samples_of(grey, row, 1, seed=3)[0]
    if len(signals.get("steer") or []) == 20:
        assert actions.isfinite().all(0).tolist() == [True, False]
    else:
        assert actions.isfinite().sum() == known
    units, passive = new_model(cfg).given(1, actions[None, cfg.future_tubelets[0] :])
    assert passive.tolist() == [known != 12] and units.isfinite().all()


def test_scenes_read_back_from_files_have_them_too(scene_folder):
    """mp4 and annotation give what rendering gives."""
    cfg = small_config(actions="steer,accel", data_root=str(scene_folder))
    videos = V.list_data(cfg)
    data = V.ClipDataset(cfg, videos, str(scene_folder), "val")
    for index in range(3):
        sample, number, _ = data.sample(index)
        labels = json.loads((scene_folder / "annotations" / f"{videos[number].name[:-4]}.json").read_text())
        torch.testing.assert_close(sample["actions"], V.action_rows(labels, cfg))


def test_hidden_actions_are_drawn_per_sample():
    """By (seed, i) alone, at the rate asked for, never in an evaluation; all other draws are those without actions.
    Seen red with the draw put before the masks."""
    cfg = active(action_drop=0.25, **V.VJepaAutoV2Config.BEFORE)
    plain = plain_config(scenes="render", scene_mix="steered=1")
    drawn = [V.mask_and_noise(cfg, "train", index) for index in range(300)]
    hidden = [bool(sample["actions_hidden"]) for sample in drawn]
    assert 0.17 < np.mean(hidden) < 0.33 and hidden[7:9] == [
        bool(V.mask_and_noise(cfg, "train", index)["actions_hidden"]) for index in (7, 8)
    ]
    assert not any(V.mask_and_noise(cfg, "val", index)["actions_hidden"] for index in range(40))
    before = V.mask_and_noise(plain, "train", 5)
    assert before.keys() | {"actions_hidden"} == drawn[5].keys()
    assert all(torch.equal(before[name], drawn[5][name]) for name in before)


# -- statistics


def statistics(rows, hflip=False, names="speed,steer"):
    """action_statistics of files with these signals."""
    videos = [V.VideoFile(f"{n}.mp4", "", signals=json.dumps(row)) for n, row in enumerate(rows)]
    data = V.ClipDataset(active(scenes="files", actions=names, hflip=hflip), videos, "", "train")
    return V.action_statistics(data, lambda: False)


def test_statistics_are_those_of_all_values():
    """Over files of unlike length, null left out; a constant signal has deviation 1; mirrored ones count both ways."""
    rows = [{"speed": [1, 2, None, 3], "steer": [0.5] * 3}, {"speed": [10.0], "steer": [0.5]}, {"speed": [4]}]
    means, deviations, told = statistics(rows)
    assert means == pytest.approx([4.0, 0.5]) and deviations == pytest.approx([np.std([1, 2, 3, 10, 4]), 1.0])
    assert "in 3 of 3 training files; 1 of these lack one, and are passive" in told
    assert statistics(rows, hflip=True)[0][1] == 0 and statistics(rows, hflip=True)[1][1] == pytest.approx(0.5)


def test_files_without_the_signals_are_refused():
    wrong = statistics([{"speed": [1.0], "yaw_rate": [0.0]}] * 3)[2]
    assert wrong == "no file has them all: speed in 3, steer in 0 annotations of 3 of 3 training files"


def test_many_files_are_sampled():
    told = statistics([{"speed": [float(n)], "steer": [0.0]} for n in range(1500)])[2]
    assert told.endswith("in 500 of 1500 training files")


def test_statistics_travel_in_the_checkpoint():
    """Restored, not computed again; a passive checkpoint has no place for them."""
    cfg, model = active(), new_model(active())
    run = new_phase(model, source=V.open_data(V.VJepaAutoV2, cfg, [], True, None)).run
    run.log = V.RunLog(cfg, False)
    run.process.stop.asked = lambda: False
    model.take_data(run)
    assert not torch.equal(model.action_std, torch.ones(2))
    state, other = new_state(model), new_model(cfg, seed=1)
    other.restore(state)
    assert torch.equal(other.action_std, model.action_std) and torch.equal(other.action_mean, model.action_mean)
    passive = new_model(small_config())
    assert "action_stats" not in passive.snapshot() and not any("action" in name for name in passive.state_dict())
    with pytest.raises(V.UsageError, match=r"actions = none \(checkpoint: steer,accel\)"):
        V.check_same_run(state, small_config(), "ckpt.pt")


# -- who is told


SHAPES = [dict(), dict(flow_joint_max=0, flow_pool=2, flow_rank=8), dict(pos_embed="rope", soon_start="mask")]


@pytest.mark.parametrize("shape", SHAPES, ids=["joint", "tokens", "rope"])
def test_actions_change_soon_and_flow_alone(batch, shape):
    """SOON sees the actions of its own tubelets and no later one, samples see all of them; NOW, EVENTUALLY and the
    chunk read-out see none. Seen red with later tubelets given to the predictor, and with the flow net not told."""
    cfg, clip = active(**shape), batch["frames"]
    model, told = awake(cfg), batch["actions"][:, 2:].clone()
    context, forecast, _ = model.see(clip, told)
    later, sooner = told.clone(), told.clone()
    later[:, cfg.future_tubelets[1] :] += 0.3
    sooner[:, 0] += 0.3
    M = cfg.soon_tokens
    assert torch.equal(model.forecast(context, actions=later), forecast)
    changed = model.forecast(context, actions=sooner)
    assert (changed - forecast)[:, :M].abs().amax((1, 2)).min() > 1e-3 and torch.equal(changed[:, M:], forecast[:, M:])
    samples = futures(model, clip, told)
    for other in (later, sooner, None):
        assert (futures(model, clip, other) - samples).abs().amax((1, 2, 3)).min() > 1e-4
    shown = with_draws(cfg, batch, actions_hidden=torch.zeros(4, dtype=torch.bool))
    losses = [model({**shown, "actions": batch["actions"] + more})[0] for more in (0.0, 0.3)]
    same = {name: torch.equal(losses[0][name], losses[1][name]) for name in losses[0]}
    assert same["loss_vjepa"] and same["loss_eventually"] and not same["loss_soon"] and not same["loss_flow"]


def test_actions_of_now_change_nothing(batch):
    """They are not told: what was driven is in the picture."""
    model, told = awake(active()), batch["actions"].clone()
    told[:, :2] = math.nan
    one, two = (model({**batch, "actions": actions})[0] for actions in (batch["actions"], told))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shape", SHAPES, ids=["joint", "tokens", "rope"])
def test_hidden_absent_and_unknown_are_the_same(batch, shape):
    """A clip whose actions are hidden, one with a NaN, and one that is told none give the same bits, whatever the other
    clips are told. Seen red with 0 put in for a NaN, as if it were the mean."""
    model, told = awake(active(**shape)), batch["actions"][:, 2:].clone()
    told[1, -1, 0] = math.nan
    hidden = torch.tensor([False, False, True, False])
    context = model.now_context(batch["frames"])
    mixed, passive = model.given(4, told, hidden), model.given(4)
    assert mixed[1].tolist() == [False, True, True, False] and passive[1].all()
    with torch.no_grad():
        for give in (partial_soon(model, context), partial_flow(model, context)):
            one, two = give(mixed), give(passive)
            torch.testing.assert_close(one[1:3], two[1:3], rtol=0, atol=1e-6)
            assert (one[[0, 3]] - two[[0, 3]]).abs().amax() > 1e-4


def partial_soon(model, context):
    """given -> SOON predictions."""
    return lambda given: model.predict_soon(context, given)


def partial_flow(model, context):
    """given -> the flow net's guess from one noise."""
    noise = torch.randn(4, 1, model.cfg.flow_tokens, model.cfg.flow_rank, generator=torch.Generator().manual_seed(1))
    return lambda given: model.flow(noise, torch.full((4, 1), 0.3), model.flow.project(context, *given))[:, 0]


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("changes", [dict(), dict(lambda_soon=0.0), dict(flow_joint_max=0, flow_pool=2)])
def test_every_parameter_gets_a_gradient(batch, hidden, changes):
    """Whatever a batch hides: a rank whose parameter has none would stop DDP. Seen red with lambda_soon 0 and action
    tokens that still learn."""
    cfg = active(**changes)
    model = new_model(cfg)
    losses, gauges, _ = model(with_draws(cfg, batch, actions_hidden=torch.full((4,), hidden)))
    losses["loss_total"].backward()
    assert not [name for name, value in model.trained().items() if value.grad is None]
    assert float(gauges["passive_share"]) == hidden


def test_a_sensors_fault_is_cut():
    model, told = new_model(active()), torch.full((1, 4, 2), 1e6)
    assert model.given(1, told)[0].eq(30).all() and model.given(1, -told)[0].eq(-30).all()


def test_the_gain_of_actions_is_that_of_soon_skill(batch):
    """By hand, of the same clips with and without. Seen red with the two exchanged."""
    cfg = active()
    model, shown = awake(cfg), with_draws(cfg, batch, actions_hidden=torch.zeros(4, dtype=torch.bool))
    with torch.no_grad():
        told, gauges, carry = model(shown)
        passive, _, _ = model({**shown, "actions_hidden": torch.ones(4, dtype=torch.bool)})
        gain = model.held_out(shown, carry)["soon_action_gain"]
    saved = float((passive["loss_soon"] - told["loss_soon"]) / gauges["persistence"])
    assert abs(gain) > 1e-4 and gain == pytest.approx(saved, rel=1e-3)


@pytest.mark.slow
def test_the_flow_fit_learns_what_its_own_actions_leave_open(batch):
    """Coordinates of a clip are those of the forecast that was told its actions, or of the passive one where the step
    hides them. Seen red with the two exchanged."""
    cfg = active(flow_fit_clips=4, flow_fit_batch=64, action_drop=0.5)
    model = awake(cfg)
    run = new_phase(model, source=V.open_data(V.VJepaAutoV2, cfg, [], True, None)).run
    run.log = V.RunLog(cfg, False)
    with torch.no_grad():
        latents = model.now_context(batch["frames"]), model.future_target(model.targets_of(batch)), batch["actions"]
    learned = V.FlowFit(model, run, SimpleNamespace(latents=latents)).batch(1)
    ways = [model.space.encode(V.residual_rows(model, run.process, *some)) for some in (latents, latents[:2])]
    assert (ways[0] - ways[1]).abs().amax() > 1e-3 and 10 < learned["actions_hidden"].sum() < 54
    for context, y, hidden in zip(learned["context"], learned["y"], learned["actions_hidden"].long()):
        clip = int((latents[0] - context).abs().amax((1, 2)).argmin())
        torch.testing.assert_close(y, ways[hidden][clip], rtol=1e-4, atol=1e-4)


# -- Python API


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda actions: actions[:, 1:], r"actions: float32 \[4, 3, 2\], must be floats \[4, 4, 2\]: steer,accel of"),
        (lambda actions: actions[:1], r"actions: float32 \[1, 4, 2\]"),
        (lambda actions: actions * math.nan, "actions: hold NaN or infinity"),
        (lambda actions: actions.tolist(), "actions: a list, which is no tensor"),
        (lambda actions: actions.long(), r"actions: int64 \[4, 4, 2\], must be floats"),
    ],
)
def test_wrong_actions_are_refused(batch, change, why):
    model, actions = new_model(active()).eval(), change(batch["actions"][:, 2:])
    for call in (model.see, lambda clip, actions: futures(model, clip, actions)):
        with pytest.raises(V.UsageError, match=why):
            call(batch["frames"], actions)


def test_a_passive_model_takes_none(batch):
    model = new_model(small_config()).eval()
    with pytest.raises(V.UsageError, match="trained without"):
        futures(model, batch["frames"], batch["actions"][:, 2:])


# -- steered scenes


def test_a_steered_fork_shows_nothing_and_steering_tells_all():
    """Both branches come about as often, from one present, bit for bit; the sign of steering in SOON is the branch's,
    and no sign stands at the road. Seen red with the fork's sign drawn."""
    cfg, sides = active(image_size=32), []
    for scene_seed in range(60):
        labels = V.scene_truth(scene_seed, 0, cfg, "steered")[-1]
        soon = np.array(labels["steer"][cfg.now_frames : cfg.now_frames + cfg.soon_frames])
        assert np.sign(soon[np.abs(soon).argmax()]) == labels["branch"] and not any(labels["steer"][: cfg.now_frames])
        sides.append(labels["branch"])
    assert 18 <= sides.count(1) <= 42 and V.scene_odds(3, cfg, "steered") == {"kind": "steered", "right": 0.5}
    looks = {V.scene(5, future, cfg, "steered")[0][: cfg.now_frames].tobytes() for future in range(6)}
    assert len(looks) == 1
    params, (future, _), pose, mover, _ = V.scene_truth(5, 0, cfg, "steered")
    parts = [part for _, _, parts, _ in V.thing_list(params, future, pose, mover) for part in parts]
    assert not any(tuple(part[:4]) == (-1.2, 1.2, 1.9, 3.8) for part in parts)


def test_scenes_of_other_kinds_are_drawn_as_before():
    """The new kind stands last with no share: each seed has the kind that it had."""
    kinds, shares = V.SCENE_KINDS[:5], [0.3, 0.2, 0.2, 0.1, 0.2]
    assert V.SCENE_KINDS[5:] == ("steered",) and V.mix_shares("default")[5] == 0
    for seed in range(60):
        assert V.draw_scene(seed, small_config())["kind"] == np.random.default_rng([seed, 3]).choice(kinds, p=shares)


# -- evaluation


class Oracle(E.Subject):
    """A subject whose samples are real SOON latents of the branch that the steering names, either without actions."""

    def of_branch(self, actions, context, shape):
        side = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        if actions is not None:
            side = (actions[:, :, 0].sum(1) > 0).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        number = torch.arange(len(context)).view(-1, *[1] * (len(shape) - 1))
        return self.ends[number - number % 2 + side.long()]

    def encode(self, frames):
        context, targets, point = super().encode(frames)
        self.ends = torch.cat([getattr(self, "ends", self.soon(targets)[:0]), self.soon(targets)])
        return context, targets, point

    def sample(self, context, flow, num_samples, num_steps, seed, actions=None):
        yield 0, self.of_branch(actions, context, (len(context), num_samples))

    def forecast(self, context, actions=None):
        return self.of_branch(actions, context, (len(context),))


def test_steered_figures_know_an_oracle_from_the_deaf():
    """Right samples meet every threshold; those that ignore actions miss all that ask for them."""
    cfg, sizes = active(), replace(E.QUICK, fork_scenes=8, resamples=20, num_samples=32)
    study = E.Study([Oracle(new_model(cfg).eval(), cpu_process())], sizes, 0, 0, E.Progress(quiet=True))
    figures = E.steered_figures(study)
    assert all(figure["passed"] for figure in figures.values()), {n: f["value"] for n, f in figures.items()}
    assert figures["steered_entropy"]["value"] < 1e-6 and figures["steered_flip"]["value"] == 1
    deaf = Oracle(new_model(cfg).eval(), cpu_process())
    told = deaf.of_branch
    deaf.of_branch = lambda actions, context, shape: told(None, context, shape)
    figures = E.steered_figures(replace(study, subjects=[deaf]))
    missed = {name for name, figure in figures.items() if figure["passed"] is False}
    assert missed >= {"steered_entropy", "steered_own", "steered_flip", "steered_gain", "steered_forecast"}


# -- whole runs


def run_config(out_dir, **overrides):
    """Three steps, then both fits, on rendered steered scenes."""
    fits = dict(flow_fit_clips=24, flow_fit_steps=4, flow_fit_batch=4, soon_fit_steps=3, soon_fit_batch=4)
    plain = dict(out_dir=str(out_dir), steps=3, picture=False, val_every=2, enc_depth=1, pred_depth=1)
    return active(**{**fits, **plain, **overrides})


def run(cfg, when=None):
    """A run in this process, stopped when `when(phase, step)` says so -> (exit code, log)."""
    with pytest.MonkeyPatch.context() as patch:
        if when:
            stop_after_update(patch, when)
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            return V.train(cfg), out.getvalue()


def final(out_dir):
    return torch.load(out_dir / "checkpoints" / "ckpt_final.pt", weights_only=True)


def same(one, two):
    """Whether nested dicts of tensors are equal."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    return torch.equal(one, two) if torch.is_tensor(one) else True


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run in one go -> (folder, log)."""
    out_dir = tmp_path_factory.mktemp("straight")
    code, log = run(run_config(out_dir))
    assert code == V.EXIT_OK, log
    return out_dir, log


@pytest.mark.slow
@pytest.mark.parametrize("name, step", [("", 2), ("soon", 2), ("flow", 3)])
def test_a_stopped_run_ends_with_the_same_bits(straight, tmp_path, name, step):
    """Stopped in training and in both fits: the statistics come from the checkpoint and all weights are those of a run
    in one go. Seen red with the statistics left out of the checkpoint."""
    cfg = run_config(tmp_path, num_workers=1)
    assert run(cfg, lambda phase, done: phase.name == name and done + 1 == step)[0] == V.EXIT_STOPPED
    code, log = run(cfg)
    assert code == V.EXIT_OK and "training files" not in log.split("resumed from")[0].split("actions:")[-1]
    one, two = final(straight[0]), final(tmp_path)
    nets = (*V.VJepaAutoV2.NETWORKS, "soon_predictor", "flow_stats", "action_stats")
    assert all(same(one[net], two[net]) for net in nets)


@pytest.mark.slow
def test_a_run_says_what_its_actions_are_and_what_they_gain(straight):
    out_dir, log = straight
    assert "actions: steer -0.003785 +- 0.05207, accel" in log and "hidden in 30% of the clips" in log
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    gains = [row["val_soon_action_gain"] for row in rows if "val_soon_action_gain" in row]
    assert len(gains) == 2 and all(map(math.isfinite, gains)) and any("passive_share" in row for row in rows)
    state = final(out_dir)
    assert state["predictor"].keys() >= {"actions.embed.weight", "actions.absent"}
    assert not torch.equal(state["soon_predictor"]["actions.absent"], state["predictor"]["actions.absent"])
    model, _ = V.load_model(out_dir / "checkpoints" / "ckpt_final.pt")
    assert torch.equal(model.action_std, state["action_stats"]["std"]) and model.action_std[0] < 0.1


def test_a_passive_predictor_fits_into_an_active_world():
    """Published weights have no action tokens: all else is loaded, these stay. Seen red with them among the names."""
    passive, active_one = (new_model(cfg, seed).predictor for seed, cfg in enumerate((small_config(), active())))
    tensors = passive.state_dict()
    official = {V.renamed(name, V.PREDICTOR_NAMES, V.OURS, V.OFFICIAL): value for name, value in tensors.items()}
    before = active_one.actions.embed.weight.clone()
    assert not V.fill(active_one, official, V.PREDICTOR_NAMES)
    assert all(torch.equal(active_one.state_dict()[name], value) for name, value in tensors.items())
    assert torch.equal(active_one.actions.embed.weight, before)


@pytest.mark.slow
def test_an_active_run_starts_from_passive_weights_and_back(straight, tmp_path):
    """The encoder is taken either way; a line says that action tokens start anew."""
    passive = run_config(tmp_path / "passive", actions="none", flow_fit_clips=0, soon_fit_steps=0)
    assert run(passive)[0] == V.EXIT_OK
    for folder, names in ((tmp_path / "passive", "steer"), (straight[0], "none")):
        start = folder / "checkpoints" / "ckpt_final.pt"
        cfg = run_config(tmp_path / names, actions=names, init_from=str(start), flow_fit_clips=0, soon_fit_steps=0)
        code, log = run(replace(cfg, lr=0.0))
        assert code == V.EXIT_OK and ("outcome head, action tokens, flow net" in log) == (names != "none"), log
        assert same(final(folder)["target"], final(tmp_path / names)["online"])


@pytest.mark.slow
def test_videos_without_the_signals_end_the_run(scene_folder, tmp_path):
    """A folder none of whose annotations has a signal; one in which some have it trains, and says how many lack it."""
    folder = tmp_path / "bare"
    (folder / "annotations").mkdir(parents=True)
    for number, path in enumerate(sorted((scene_folder / "videos").glob("*.mp4"))):
        (folder / path.name).symlink_to(path)
        if number % 2:
            (folder / "annotations" / f"{path.stem}.json").write_text('{"fps": 4, "speed": [1.5, 2]}')
    plain = dict(scenes="files", data_root=str(folder), flow_fit_clips=0, soon_fit_steps=0, steps=1)
    with pytest.raises(V.UsageError, match="actions = 'steer': no file has them all: steer in 0 annotations of 7 of 7"):
        run(run_config(tmp_path / "no", actions="steer", **plain))
    code, log = run(run_config(tmp_path / "some", actions="speed", **plain))
    assert code == V.EXIT_OK and "of these lack one, and are passive" in log


def test_axes_of_a_sensor_are_no_accel():
    """Vectors called accel were never read and refuse no file; the signal is then unknown. Seen red as a bad file."""
    annotation = {"accel": [[0.1, 0.0, 9.8], [0.2, 0.0, 9.8]], "speed": [1.0, 2.0]}
    V.check_annotation(annotation)
    assert annotation == {"speed": [1.0, 2.0]}
