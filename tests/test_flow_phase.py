"""The flow phase: after the last step SOON's copy of the predictor, then the flow net are fitted on frozen latents,
once, and again after a stop."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPT, V, small_config
from training import cpu_process, new_model

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
        soon_fit_steps=5,
        soon_fit_batch=4,
        picture=False,
        val_every=0,
    )
    return small_config(**{**base, **overrides})


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
    fresh = V.WorldModel(cfg)
    assert equal(before["flow"], fresh.flow.state_dict()) and not equal(before["online"], fresh.online.state_dict())
    assert all(equal(before[name], after[name]) for name in STILL)
    assert not equal(before["flow"], after["flow"]) and not equal(before["flow_ema"], after["flow_ema"])
    assert not before["flow_stats"]["basis"].any() and after["flow_stats"]["basis"].any()
    assert (before["flow_fitted"], after["flow_fitted"]) == (False, True)
    assert before["soon_predictor"] is None and not equal(after["soon_predictor"], after["predictor"])


def test_a_finished_phase_is_not_repeated_and_an_extended_run_repeats_it(whole, tmp_path, capsys):
    """The same command again: no second phase, the same weights. More steps: the flow is fitted anew at the new end."""
    cfg = phase_config(shutil.copytree(whole, tmp_path / "run"))
    first = checkpoint(whole)
    assert V.train(cfg) == V.EXIT_OK
    assert "flow phase" not in capsys.readouterr().out and equal(first["flow"], checkpoint(tmp_path / "run")["flow"])
    assert V.train(V.replace(cfg, steps=4)) == V.EXIT_OK
    assert "flow phase" in capsys.readouterr().out and not equal(first["flow"], checkpoint(tmp_path / "run")["flow"])


@pytest.mark.parametrize("part", ["cache_latents", "fit_soon", "flow_coordinates"])
def test_a_stop_in_the_phase_costs_the_phase_alone(whole, tmp_path, monkeypatch, part):
    """Exit code 75 with the step checkpoint on disk; the same command gives the bits of an unstopped run."""
    cfg, plain = phase_config(tmp_path / "cut"), getattr(V, part)
    monkeypatch.setattr(V, part, lambda *args: (os.kill(os.getpid(), signal.SIGTERM), plain(*args))[1])
    assert V.train(cfg) == V.EXIT_STOPPED
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("*.pt")] == ["ckpt_3.pt"]
    monkeypatch.setattr(V, part, plain)
    assert V.train(cfg) == V.EXIT_OK
    one, two = checkpoint(whole), checkpoint(tmp_path / "cut")
    assert all(equal(one[name], two[name]) for name in (*STILL, "soon_predictor", "flow", "flow_ema", "flow_stats"))


def test_cached_pairs_are_what_the_loss_would_see(tmp_path):
    """Context and coordinates of cached clip i are those of training sample i, made plainly, one clip at a time."""
    cfg = phase_config(tmp_path / "run")
    model, process = new_model(cfg).eval(), cpu_process()
    source = V.open_data(cfg, [], True, lambda: None)
    contexts, futures = V.cache_latents(model, source, process, 5, 10, V.RunLog(cfg, False))
    y = V.flow_coordinates(model, contexts, futures, process)
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
            context = model.encode_now(model.online.tokenizer(clip))
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
    seen, plain = [], V.cache_latents
    monkeypatch.setattr(V, "cache_latents", lambda *args: (seen.append(torch.get_num_threads()), plain(*args))[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cfg = phase_config(
            tmp_path / "run", num_workers=1, steps=1, flow_fit_clips=4, flow_fit_steps=1, soon_fit_steps=1, val_clips=2
        )
        assert V.train(cfg) == V.EXIT_OK
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), V.spare_threads(5):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_soon_learns_on_the_cached_latents(tmp_path):
    """The copy's SOON loss falls well below the shared predictor's on unseen clips, and forecasts come from it."""
    cfg = phase_config(tmp_path / "run", soon_fit_steps=150, soon_fit_batch=8)
    model, process = new_model(cfg).eval().requires_grad_(False), cpu_process()
    source = V.open_data(cfg, [], True, lambda: None)
    log = V.RunLog(cfg, False)
    contexts, futures = V.cache_latents(model, source, process, 0, 48, log)
    shared, targets = model.predict_soon(contexts[40:]), futures[40:, : cfg.soon_tokens]
    V.fit_soon(model, contexts, futures, 40, process, log)
    own = model.predict_soon(contexts[40:])
    assert V.l1_loss(own, targets) < 0.5 * V.l1_loss(shared, targets)
    assert not any(parameter.requires_grad for parameter in model.soon_predictor.parameters())
    model.soon_predictor = None
    torch.testing.assert_close(model.predict_soon(contexts[40:]), shared)  # the shared one is as it was


def test_the_copy_comes_back_from_a_checkpoint(tmp_path):
    """A loaded model forecasts with the copy; a checkpoint without one forecasts with the shared predictor."""
    assert V.train(phase_config(tmp_path / "run")) == V.EXIT_OK
    path = tmp_path / "run" / "checkpoints" / "ckpt_final.pt"
    model, cfg = V.load_model(path)
    state = checkpoint(tmp_path / "run")
    assert equal(model.soon_predictor.state_dict(), state["soon_predictor"])
    context = torch.randn(2, cfg.now_tokens, cfg.enc_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model.predict_soon(context)
        model.soon_predictor = None
        shared = model.predict_soon(context)
    assert not torch.equal(own, shared)
    del state["soon_predictor"]
    V.restore_model(state, model)
    assert model.soon_predictor is None and torch.equal(model.predict_soon(context), shared)


def test_fits_average_their_gradients_over_ranks(monkeypatch):
    """Two ranks with opposite shares of one loss: each takes the step of the mean."""
    cfg, net = small_config(grad_clip=0.0), torch.nn.Linear(3, 1, bias=False)
    start, other = net.weight.detach().clone(), torch.tensor([[1.0, -2.0, 0.5]])
    monkeypatch.setattr(V.dist, "all_reduce", lambda grad: grad.add_(other / 2))
    V.fit_step(
        net, torch.optim.SGD(net.parameters(), lr=9.0), net(torch.ones(1, 3)).sum(), 0.1, cfg, cpu_process(world_size=2)
    )
    torch.testing.assert_close(net.weight.detach(), start - 0.1 * (torch.ones(1, 3) + other) / 2)


def test_fewer_clips_than_directions(tmp_path):
    """A handful of clips for eight directions: silent directions, finite samples."""
    cfg = phase_config(tmp_path / "run", flow_fit_clips=4, batch_size=1)
    assert V.train(cfg) == V.EXIT_OK
    model, _ = V.load_model(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")
    frames = torch.randint(0, 256, (1, cfg.now_frames, 3, cfg.height, cfg.width), dtype=torch.uint8)
    assert torch.isfinite(model.sample_futures(frames, 3)).all()


@pytest.mark.slow
def test_ranks_share_one_flow(tmp_path):
    """Two ranks fit one net on their shares of the clips, over pooled tokens, and the run ends with one checkpoint."""
    flags = dict(
        image_size=32,
        patch=8,
        num_frames=12,
        now_frames=4,
        soon_frames=4,
        eventually_frames=4,
        enc_dim=48,
        enc_depth=2,
        pred_dim=24,
        pred_depth=2,
        num_heads=4,
        outcome_queue=16,
        flow_dim=32,
        flow_depth=2,
        flow_heads=4,
        flow_rank=8,
        flow_chunks=2,
        flow_draws=3,
        flow_joint_max=0,
        flow_pool=2,
        batch_size=2,
        num_workers=0,
        steps=2,
        scenes="render",
        flow_fit_clips=32,
        flow_fit_steps=4,
        flow_fit_batch=4,
        soon_fit_steps=3,
        soon_fit_batch=4,
        device="cpu",
        val_clips=4,
        log_every=1,
        out_dir=str(tmp_path / "run"),
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
        "--no-picture",
    ]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "flow phase: latents of 32 clips" in done.stdout
    state = V.load_checkpoint(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")
    assert state["flow_fitted"] and state["flow"]["out.weight"].any()


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
    assert "flow phase step:1" in (tmp_path / "train.log").read_text()
