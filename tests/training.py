"""What several test files need: a seeded model, a CPU process, and training steps exactly as the loop takes them."""

import torch
from conftest import V

torch.set_num_threads(1)  # two threads of these tiny products wait for each other longer than they compute


def new_model(cfg, seed=0, rank=0, world_size=1):
    """A freshly initialised model in train mode; the same weights for the same config and seed."""
    torch.manual_seed(seed)
    return V.VJepaAutoV2(cfg, rank, world_size).train()


def cpu_process(amp_dtype=None, rank=0, world_size=1):
    return V.Process(rank, world_size, torch.device("cpu"), amp_dtype)


def train_steps(model, cfg, batches_at, num_steps, process=None, wrapped=None):
    """`num_steps` updates with the micro-batches batches_at(step) -> (list of metrics, optimizer)."""
    process = process or cpu_process()
    optimizer, scaler = model.optimizer(), torch.amp.GradScaler("cpu", enabled=False)
    history = []
    for step in range(num_steps):
        metrics, carries, finite = V.take_step(
            model, wrapped or model, optimizer, scaler, batches_at(step), step, cfg, process
        )
        assert finite
        V.apply_step(model, optimizer, scaler, carries, step, cfg)
        optimizer.zero_grad(set_to_none=True)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, optimizer


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
