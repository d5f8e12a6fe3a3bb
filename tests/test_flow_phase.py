"""The flow phase: after the last step SOON's copy of the predictor, then the flow net are fitted on frozen latents,
once, and again after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHALLOW, SMALL, V, small_config
from training import cpu_process, new_model, new_phase

STILL = ("online", "predictor", "outcome", "target", "read_out")  # what the flow phase must not touch


def phase_config(out_dir, **overrides):
    """Three steps on rendered scenes, then five steps of SOON and six of the flow net on 24 clips."""
    base = dict(
        out_dir=str(out_dir),
        steps=3,
        scenes="render",
        flow_fit_clips=24,
        flow_fit_steps=6,
        flow_fit_batch=4,
        flow_fit_drop=0.25,
        soon_fit_steps=5,
        soon_fit_batch=4,
        picture=False,
        val_every=0,
        **SHALLOW,
    )
    return small_config(**{**base, **overrides})


def phase_run(model, source, consumed=0):
    """A run that has reached its flow phase, without a folder -> V.Run."""
    run = new_phase(model, source=source).run
    run.log, run.progress = V.RunLog(model.cfg, False), V.Progress(step=model.cfg.steps, consumed=consumed)
    return run


def held_out_loss(run, fit):
    """The loss of a fit on its held-out clips."""
    return V.validate_fit(run, fit)["val_loss_total"]


def checkpoint(out_dir, name="ckpt_final.pt"):
    return torch.load(out_dir / "checkpoints" / name, map_location="cpu", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run and its phase in one go -> run folder."""
    out_dir = tmp_path_factory.mktemp("whole")
    assert V.train(phase_config(out_dir)) == V.EXIT_OK
    return out_dir


def test_only_the_flow_and_the_copy_move(whole):
    """The flow net waits while the rest learns, then it and a copy of the predictor learn while the rest waits."""
    cfg = phase_config(whole)
    before, after = checkpoint(whole, "ckpt_3.pt"), checkpoint(whole)
    torch.manual_seed(cfg.seed)
    fresh = V.VJepaAutoV2(cfg)
    assert equal(before["flow"], fresh.flow.state_dict()) and not equal(before["online"], fresh.online.state_dict())
    assert all(equal(before[name], after[name]) for name in STILL)
    assert not equal(before["flow"], after["flow"]) and not equal(before["flow_ema"], after["flow_ema"])
    assert not before["flow_stats"]["basis"].any() and after["flow_stats"]["basis"].any()
    assert (before["after"], after["after"]) == (0, 11)
    assert before["soon_predictor"] is None and not equal(after["soon_predictor"], after["predictor"])


def test_a_finished_phase_is_not_repeated_and_an_extended_run_repeats_it(whole, tmp_path, capsys):
    """The same command again: no second phase, the same weights. More steps: the flow is fitted anew at the new end."""
    cfg = phase_config(shutil.copytree(whole, tmp_path / "run"))
    first = checkpoint(whole)
    assert V.train(cfg) == V.EXIT_OK
    assert "flow phase" not in capsys.readouterr().out and equal(first["flow"], checkpoint(tmp_path / "run")["flow"])
    assert V.train(V.replace(cfg, steps=4)) == V.EXIT_OK
    assert "flow phase" in capsys.readouterr().out and not equal(first["flow"], checkpoint(tmp_path / "run")["flow"])


def stopped_run(cfg, owner, name, call):
    """Run a config and send this process a signal when a function of the script is called for the `call`th time."""
    plain, calls = getattr(owner, name), []

    def signalled(*args):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert V.train(cfg) == V.EXIT_STOPPED
    return sorted(path.name for path in Path(cfg.out_dir).glob("checkpoints/*.pt"))


@pytest.mark.parametrize(
    "owner, name, call, left",
    [
        (V, "cache_latents", 1, ["ckpt_3.pt"]),
        pytest.param(V.SoonFit, "batch", 3, ["ckpt_3.pt", "ckpt_6.pt"], marks=pytest.mark.slow),
        (V.SoonFit, "batch", 5, ["ckpt_3.pt", "ckpt_8.pt"]),
        pytest.param(V, "flow_coordinates", 1, ["ckpt_3.pt", "ckpt_8.pt"], marks=pytest.mark.slow),
        (V.FlowFit, "batch", 2, ["ckpt_10.pt", "ckpt_3.pt", "ckpt_8.pt"]),
        (V.FlowFit, "batch", 6, ["ckpt_14.pt", "ckpt_3.pt", "ckpt_8.pt"]),
    ],
)
def test_a_stop_in_the_phase_costs_nothing(whole, tmp_path, owner, name, call, left):
    """Stopped while latents are made, or in any step of both fits, their last included: exit code 75, what was done is
    saved, and the same command gives the bits and the log of an unstopped run. Seen red with the optimizer of the phase
    left out of the checkpoint, and without the evaluation of a fit whose last step was stopped."""
    cfg = phase_config(tmp_path / "cut")
    assert stopped_run(cfg, owner, name, call) == left
    assert V.train(cfg) == V.EXIT_OK
    one, two = checkpoint(whole), checkpoint(tmp_path / "cut")
    assert all(equal(one[name], two[name]) for name in (*STILL, "soon_predictor", "flow", "flow_ema", "flow_stats"))
    assert phase_facts(whole) == phase_facts(tmp_path / "cut")


@pytest.mark.slow
def test_other_fits_than_before_come_anew(whole, tmp_path, capsys):
    """More steps of the flow: what SOON learned stays. Fewer of SOON after a stop inside its fit: both fits begin anew,
    with the bits of a run that was never stopped. Seen red: SOON's optimizer went into the flow net's fit."""
    more = phase_config(shutil.copytree(whole, tmp_path / "more"), flow_fit_steps=8)
    assert V.train(more) == V.EXIT_OK
    assert "at step 8; its steps after that come anew" in capsys.readouterr().out
    one, two = checkpoint(whole), checkpoint(tmp_path / "more")
    assert equal(one["soon_predictor"], two["soon_predictor"]) and not equal(one["flow"], two["flow"])
    assert (two["step"], two["after"]) == (3, 13)

    cut, fewer = phase_config(tmp_path / "cut"), dict(soon_fit_steps=2, flow_fit_steps=2)
    assert stopped_run(cut, V.SoonFit, "batch", 3) == ["ckpt_3.pt", "ckpt_6.pt"]
    assert V.train(V.replace(cut, **fewer)) == V.EXIT_OK
    assert V.train(phase_config(tmp_path / "straight", **fewer)) == V.EXIT_OK
    one, two = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "cut")
    assert all(equal(one[name], two[name]) for name in (*STILL, "soon_predictor", "flow", "flow_ema", "flow_stats"))


def test_a_run_extended_after_a_stop_in_a_fit_goes_on_from_its_own_steps(tmp_path, capsys):
    """Stopped in step 6, the third of a fit after three of training, then extended and stopped in step 5: the same
    command goes on from there. Seen red: ckpt_6.pt still counted as the newest, and training was at step 3 again."""
    cfg = phase_config(tmp_path / "run")
    assert stopped_run(cfg, V.SoonFit, "batch", 3) == ["ckpt_3.pt", "ckpt_6.pt"]
    longer = V.replace(cfg, steps=7)
    assert stopped_run(longer, V, "take_step", 2) == ["ckpt_3.pt", "ckpt_5.pt"]
    capsys.readouterr()
    assert V.train(longer) == V.EXIT_OK
    assert "ckpt_5.pt at step 5\n" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss_total" in row] == list(range(1, 19))


def metrics(out_dir):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def phase_facts(out_dir):
    """What metrics.jsonl tells of the steps after training: phase, step, losses."""
    names = ("phase", "step", "loss_total", "val_loss_soon", "val_loss_flow")
    facts = [tuple(row.get(name) for name in names) for row in metrics(out_dir) if "phase" in row]
    assert [fact[1] for fact in facts if fact[2] is not None] == list(range(4, 15))
    return facts


def test_a_step_hides_its_share_of_the_context(tmp_path):
    """flow_fit_drop: another part in every step, none in the held-out clips; its other draws stay. Seen red with the
    loss made without the factors."""
    batches, losses = [], []
    for drop in (0.25, 0.0):
        cfg = phase_config(tmp_path / "run", flow_fit_batch=32, flow_fit_drop=drop)
        model = new_model(cfg).eval()
        torch.nn.init.normal_(model.flow.out.weight)
        run = phase_run(model, V.open_data(V.VJepaAutoV2, cfg, [], True, lambda: None))
        chunks = cfg.flow_chunks
        latents = [torch.randn(40, n, cfg.enc_dim) for n in (cfg.now_tokens, cfg.soon_tokens + chunks)]
        fit = V.FlowFit(model, run, SimpleNamespace(latents=latents))
        batch = fit.batch(3)
        batches.append(batch)
        losses += [fit(some)[0]["loss_flow"] for some in (batch, {**batch, "keep": None})]
        assert "keep" not in fit.batch()
        if drop:
            keep = batch["keep"]
            assert keep.shape == (32, cfg.now_tokens, cfg.flow_read)
            assert set(keep.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
            assert 0.7 < (keep > 0).float().mean() < 0.8
            assert torch.equal(fit.batch(3)["keep"], keep) and not torch.equal(fit.batch(4)["keep"], keep)
    assert "keep" not in batches[1] and torch.equal(batches[0]["noise"], batches[1]["noise"])
    assert losses[0] != losses[1] and losses[2] == losses[3]


def test_cached_pairs_are_what_the_loss_would_see(tmp_path):
    """Context and coordinates of cached clip i are those of training sample i, made plainly, one clip at a time."""
    cfg = phase_config(tmp_path / "run", flow_fit_clips=10)
    model = new_model(cfg).eval()
    source = V.open_data(V.VJepaAutoV2, cfg, [], True, lambda: None)
    run = phase_run(model, source, consumed=5)
    contexts, futures = V.cache_latents(model, run)
    y = V.flow_coordinates(model, (contexts, futures), run, False)
    assert run.log.stage.startswith("coordinates for the flow phase: batch"), "minutes with 100,000 clips"
    assert contexts.shape == (16, cfg.now_tokens, cfg.enc_dim) and y.shape == (
        16,
        1,
        cfg.flow_rank,
    )  # full batches of four times batch_size
    data = source.dataset(cfg, "train")
    for place in (0, 3, 15):
        frames = data[5 + place]["frames"][None]
        with torch.no_grad():
            clip = model.normalise(frames)
            context = model.encode_now(model.online.tokenizer.cut(clip))
            future = model.future_target(model.make_targets(clip))
            expected = model.space.encode(
                model.space.pool(future - model.forecast(context, model.predict_soon(context)))
            )
        torch.testing.assert_close(contexts[place : place + 1], context, rtol=0, atol=1e-5)
        torch.testing.assert_close(futures[place : place + 1], future, rtol=0, atol=1e-5)
        torch.testing.assert_close(y[place : place + 1], expected, rtol=0, atol=1e-3 * float(y.abs().max()))


def test_loader_workers_get_cores_of_their_own(tmp_path, monkeypatch):
    """Latents are made with one CPU thread fewer per worker, never with none; what comes after has all threads again,
    also after an error."""
    seen, plain = [], V.VJepaAutoV2.encode_now

    def encode_now(model, tokens):
        if not torch.is_grad_enabled() and tokens.shape[1] == cfg.now_tokens:  # neither training nor an evaluation
            seen.append(torch.get_num_threads())
        return plain(model, tokens)

    monkeypatch.setattr(V.VJepaAutoV2, "encode_now", encode_now)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cfg = phase_config(
            tmp_path / "run", num_workers=1, steps=1, flow_fit_clips=4, flow_fit_steps=1, soon_fit_steps=1, val_clips=2
        )
        assert V.train(cfg) == V.EXIT_OK
        assert seen[0] == 1 and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), V.spare_threads(5):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError
        assert seen[-1] == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_soon_learns_on_the_cached_latents(tmp_path):
    """The copy's SOON loss falls well below the shared predictor's on unseen clips, and forecasts come from it."""
    cfg = phase_config(tmp_path / "run", soon_fit_steps=150, soon_fit_batch=8)
    model, process = new_model(cfg).eval(), cpu_process()
    source = V.open_data(V.VJepaAutoV2, cfg, [], True, lambda: None)
    run = phase_run(model, source)
    fit = model.open_phase("soon", run, None)
    contexts, futures = fit.latents
    before = held_out_loss(run, fit)
    phase = V.Phase(run, fit, fit, fit.optimizer(), "soon", 0)
    shared = model.predictor.state_dict()
    was = {name: value.clone() for name, value in shared.items()}
    for step in range(150):
        batch = V.for_step(fit.batch(step), step, process.device)
        _, carries, finite = V.take_step(phase, [batch], step)
        assert finite
        V.apply_step(phase, carries, step)
        phase.optimizer.zero_grad(set_to_none=True)
    assert held_out_loss(run, fit) < 0.5 * before
    assert equal(was, shared)  # the shared one is as it was


def test_the_copy_comes_back_from_a_checkpoint(whole):
    """A loaded model forecasts with the copy; a checkpoint without one forecasts with the shared predictor."""
    model, cfg = V.load_model(whole / "checkpoints" / "ckpt_final.pt")
    state = checkpoint(whole)
    assert equal(model.soon_predictor.state_dict(), state["soon_predictor"])
    context = torch.randn(2, cfg.now_tokens, cfg.enc_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model.predict_soon(context)
        model.soon_predictor = None
        shared = model.predict_soon(context)
    assert not torch.equal(own, shared)
    del state["soon_predictor"]
    model.restore(state)
    assert model.soon_predictor is None and torch.equal(model.predict_soon(context), shared)


def test_fewer_clips_than_directions(tmp_path):
    """A handful of clips for eight directions: silent directions, finite samples."""
    cfg = phase_config(tmp_path / "run", flow_fit_clips=4, batch_size=1)
    assert V.train(cfg) == V.EXIT_OK
    model, _ = V.load_model(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")
    frames = torch.randint(0, 256, (1, cfg.now_frames, 3, cfg.height, cfg.width), dtype=torch.uint8)
    assert torch.isfinite(model.sample_futures(frames, 3)).all()


@pytest.mark.slow
def test_ranks_share_one_flow(tmp_path):
    """Two ranks fit one net on their shares of the clips, over pooled tokens, and the run ends with one checkpoint: the
    same, to the bit, when a rank was told to stop in the last step of SOON, and again in the midst of the flow."""
    fits = dict(flow_fit_clips=32, flow_fit_steps=5, flow_fit_batch=4, soon_fit_steps=3, soon_fit_batch=4)
    flags = {**SMALL, "flow_joint_max": 0, "flow_pool": 2, "steps": 2, "scenes": "render", **fits}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "faulty_run.py"), "--no-picture"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    states = []
    for name, faults in (("whole", [[]]), ("cut", [[["SIGTERM", 1, 2, 0]], [["SIGTERM", 1, 3, 0]], []])):
        out_dir = tmp_path / name
        for fault in faults:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(fault)}
            run = dict(capture_output=True, text=True, cwd=ROOT, env=env, timeout=240)
            done = subprocess.run([*command, "--out_dir", str(out_dir)], **run)
            assert (done.returncode == 0) == (not fault), done.stderr[-3000:]
            assert "flow phase: latents of 32 clips" in done.stdout
        states.append(V.load_checkpoint(out_dir / "checkpoints" / "ckpt_final.pt"))
        assert (states[-1]["step"], states[-1]["after"]) == (2, 8) and states[-1]["flow"]["out.weight"].any()
        assert [row["step"] for row in metrics(out_dir) if "loss_total" in row] == list(range(1, 11))
    whole, cut = states
    assert all(equal(whole[name], cut[name]) for name in (*STILL, "soon_predictor", "flow", "flow_ema", "flow_stats"))


def test_latents_kept_in_bf16_serve_a_net_in_fp32(tmp_path, monkeypatch):
    """--amp on a CPU that is slow at bf16: contexts are kept short, used in full. Seen red without `.float()`."""
    monkeypatch.setattr(V, "amp_cost", lambda *_: 31.0)
    cfg = small_config(
        out_dir=str(tmp_path),
        amp=True,
        steps=1,
        flow_fit_clips=16,
        flow_fit_steps=1,
        soon_fit_steps=1,
        scenes="render",
        val_every=0,
        val_clips=2,
        picture=False,
    )
    assert V.train(cfg) == 0
    assert "step:3 phase:flow" in (tmp_path / "train.log").read_text()
