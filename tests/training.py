"""What several test files need: a seeded model, a CPU process, training steps exactly as the loop takes them,
and files run as typed."""

import os
import signal
import subprocess
import sys

import torch
from conftest import ROOT, V

torch.set_num_threads(1)  # two threads of these tiny products wait for each other longer than they compute


def run_file(*argv, cwd=ROOT):
    """A Python file in a process of its own, as typed -> all that it printed."""
    result = subprocess.run(
        [sys.executable, *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def new_model(cfg, seed=0, rank=0, world_size=1):
    """A freshly initialised model in train mode; the same weights for the same config and seed."""
    torch.manual_seed(seed)
    return V.VJepaAutoV2(cfg, rank, world_size).train()


def cpu_process(amp_dtype=None, rank=0, world_size=1):
    return V.Process(rank, world_size, torch.device("cpu"), amp_dtype)


def new_phase(model, process=None, wrapped=None, source=None):
    """Training of a model as the loop sees it, with a run that has no folder and no log -> V.Phase."""
    process = process or cpu_process()
    source = source or V.DataSource("render", "", [], [], [], True, V.ClipDataset, model.draw)
    run = V.Run(
        model.cfg, process, None, None, source, model, model.optimizer(), torch.amp.GradScaler("cpu", enabled=False)
    )
    return V.Phase(run, model, wrapped or model, run.optimizer)


def new_state(model, source=None, **progress):
    """What a checkpoint of a model would hold -> dict."""
    run = new_phase(model, source=source).run
    run.progress = V.Progress(**progress)
    return V.checkpoint_state(run)


def stop_after_update(monkeypatch, is_time):
    """Send this process SIGTERM after the update of a step of which is_time(phase, step) is true."""
    real = V.apply_step

    def stopping(phase, carries, step):
        real(phase, carries, step)
        if is_time(phase, step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(V, "apply_step", stopping)


def train_steps(model, batches_at, num_steps, process=None, wrapped=None):
    """`num_steps` updates with the micro-batches batches_at(step) -> (list of metrics, optimizer)."""
    phase = new_phase(model, process, wrapped)
    return take_steps(phase, batches_at, num_steps), phase.optimizer


def take_steps(phase, batches_at, num_steps):
    """The same of a phase that is there already -> list of metrics."""
    history = []
    for step in range(num_steps):
        metrics, carries, finite = V.take_step(phase, batches_at(step), step)
        assert finite
        V.apply_step(phase, carries, step)
        phase.optimizer.zero_grad(set_to_none=True)
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def watch(model, batch):
    """One forward pass with every call of predictor, outcome head and flow net recorded.

    -> (losses, gauges, carry, seen), where seen[name] lists (arguments, output) of the calls in order.
    """
    seen = {"predictor": [], "outcome": [], "flow": []}
    hooks = [
        getattr(model, name).register_forward_hook(lambda module, args, out, calls=calls: calls.append((args, out)))
        for name, calls in seen.items()
    ]
    losses, gauges, carry = model(batch)
    for hook in hooks:
        hook.remove()
    return losses, gauges, carry, seen


def fill_space(model, num_updates=4, rows_each=16, seed=5):
    """Feed the flow's statistics with random rows, so that its directions are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    tokens, span = model.space.mean.shape
    channels = len(model.space.variance)
    for _ in range(num_updates):
        rows = torch.randn(rows_each, tokens, span, generator=generator)
        model.space.absorb(rows, 0.5 + torch.rand(channels, generator=generator))
