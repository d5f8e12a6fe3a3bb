"""Recorded steps: a CUDA graph's replays learn what plain passes learn. Without a card, a stand-in for the graph that
computes nothing while it records, and writes where a graph would write."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import random_batch, small_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import new_model, new_phase, take_steps

import VJepa_AUTO_V2 as V


def record(self, count):
    """`Recorder.record` without a card: results of replays go where the first ones lie."""
    left = [gradient.clone() for gradient in self.gradients]
    self.found = V.take_pass(self.phase, self.batch, count)
    torch._foreach_copy_(self.gradients, left)  # a graph computes nothing while it is recorded

    def replay():
        for kept, new in zip(self.found, V.take_pass(self.phase, self.batch, count)):
            for name, value in new.items():
                kept[name].copy_(value)

    self.graph = SimpleNamespace(replay=replay)


def learn(cfg, batches, recorded, device="cpu", amp_dtype=None):
    """Steps of a new model -> (its weights, metrics of each step, the phase)."""
    process = V.Process(0, 1, torch.device(device), amp_dtype)
    model = new_model(cfg).to(process.device)
    if cfg.compile:
        V.compile_world(model)
    phase = new_phase(model, process)
    phase.recorder = V.Recorder(phase) if recorded else None
    torch.manual_seed(7)

    def batches_at(step):
        return [V.for_step(batch, step, process.device) for batch in batches[step]]

    history = take_steps(phase, batches_at, len(batches))
    return {name: value.clone() for name, value in model.state_dict().items()}, history, phase


def batches_of(cfg, num_steps, sizes=()):
    """Micro-batches of some steps, other ones each time."""
    first = itertools.count()
    return [
        [random_batch(cfg, sizes[step] if sizes else 2, step, 10 * next(first)) for _ in range(cfg.grad_accum)]
        for step in range(num_steps)
    ]


def assert_same(one, two):
    assert one[1] == two[1]
    for name, value in one[0].items():
        assert torch.equal(value, two[0][name]), name


@pytest.mark.parametrize("grad_accum", [1, 2, 3])
def test_replays_learn_what_plain_passes_learn(monkeypatch, grad_accum):
    """Bit for bit, with other clips in every step. Seen red with gradients that were not set to zero, with a batch that
    was not copied; of two micro-steps without what a plain one left before the first replay; of three with carries that
    were not their own."""
    monkeypatch.setattr(V.Recorder, "record", record)
    cfg = small_config(grad_accum=grad_accum)
    batches = batches_of(cfg, 7)
    plain, replayed = learn(cfg, batches, False), learn(cfg, batches, True)
    assert replayed[2].recorder.graph is not None and replayed[2].recorder.num_plain == 3
    assert_same(plain, replayed)


def test_a_batch_of_another_form_is_passed_plainly(monkeypatch):
    """Between replays, and its gradients count. Seen red without the look at the form."""
    monkeypatch.setattr(V.Recorder, "record", record)
    cfg = small_config()
    batches = batches_of(cfg, 7, (2, 2, 2, 2, 1, 2, 1))
    plain, replayed = learn(cfg, batches, False), learn(cfg, batches, True)
    assert replayed[2].recorder.num_plain == 5
    assert_same(plain, replayed)


@pytest.mark.parametrize(
    "device, ranks, dtype, flag, says, expected",
    [
        ("cuda", 1, torch.bfloat16, True, True, True),
        ("cuda", 1, None, True, True, True),
        ("cuda", 1, torch.float16, True, True, False),
        ("cuda", 2, None, True, True, False),
        ("cuda", 1, None, False, True, False),
        ("cuda", 1, None, True, False, False),
        ("cpu", 1, None, True, True, False),
    ],
)
def test_where_steps_are_replayed(monkeypatch, device, ranks, dtype, flag, says, expected):
    """On one GPU, without a scaler, where neither the setting nor the world forbids it."""
    model = new_model(small_config(cuda_graph=flag))
    monkeypatch.setattr(V.VJepaAutoV2, "REPLAYS", says)
    assert V.is_replayed(model, V.Process(0, ranks, torch.device(device), dtype)) is expected


class Crossings(TorchDispatchMode):
    """Names of operations that see tensors of the card and of the CPU at once, copies between them say."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if len({leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)}) > 1:
            self.found.append(str(function))
        return out


def pretend_forward(world, batch, parts=()):
    """A forward pass on a card of which there are only shapes -> names of operations that cross to the CPU. Reading a
    number raises DataDependentOutputException."""
    with FakeTensorMode(), Crossings() as crossings:

        def on_card(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        for module in itertools.chain(*(part.modules() for part in (world, *parts))):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fresh = torch.nn.Parameter(on_card(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = fresh
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else on_card(buffer)
        losses, _, _ = world({name: on_card(value) for name, value in batch.items()})
        assert losses["loss_total"].device.type == "cuda"
    return crossings.found


VARIANTS = {
    "default": {},
    "plain": V.VJepaAutoV2Config.BEFORE,
    "draws": dict(mask_draws=2, grad_checkpoint=True, dropout=0.1),
    "supcon": dict(lambda_supcon=0.5, outcome_target="delta"),
    "actions": dict(actions="steer,accel", action_drop=0.5),
    "rope": dict(pos_embed="rope", soon_start="mask", flow_context_grad=0.5),
    "no queue, no flow": dict(outcome_queue=0, lambda_flow=0.0),
    "phase": dict(flow_fit_clips=40, flow_fit_batch=4, flow_fit_drop=0.25),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pass_needs_no_number_from_the_card(name):
    """Nor one on it, in all forms of the objective: a recording would break, and does on a card that is there."""
    cfg = small_config(**VARIANTS[name])
    batch = {**random_batch(cfg, 2), "step": torch.tensor(0)}
    if cfg.action_names:
        batch["actions_hidden"] = torch.tensor([True, False])
    assert pretend_forward(new_model(cfg), batch) == []


@pytest.mark.parametrize("kind", [V.SoonFit, V.FlowFit])
def test_a_pass_of_a_fit_needs_no_number_from_the_card(monkeypatch, kind):
    """The same of the steps that follow training."""
    cfg = small_config(**VARIANTS["phase"])
    model = new_model(cfg).eval()
    run = new_phase(model).run
    run.log = V.RunLog(cfg, False)
    latents = [torch.randn(40, n, cfg.enc_dim) for n in (cfg.now_tokens, cfg.soon_tokens + cfg.flow_chunks)]
    monkeypatch.setattr(V, "cache_latents", lambda model, run: latents)
    fit = kind(model, run, SimpleNamespace(latents=latents))
    assert pretend_forward(fit, fit.batch(3), (model,)) == []


@pytest.mark.parametrize("how", ["number", "copy"])
def test_a_pass_that_reads_is_seen(monkeypatch, how):
    """What the tests above would say of an edited forward."""
    cfg = small_config()
    forward = V.VJepaAutoV2.forward

    def reading(self, batch):
        losses, gauges, carry = forward(self, batch)
        more = float(losses["loss_soon"].detach()) if how == "number" else torch.ones(3).to(losses["loss_soon"].device)
        return {**losses, "loss_total": losses["loss_total"] + more}, gauges, carry

    monkeypatch.setattr(V.VJepaAutoV2, "forward", reading)
    batch = {**random_batch(cfg, 2), "step": torch.tensor(0)}
    if how == "number":
        with pytest.raises(DataDependentOutputException):
            pretend_forward(new_model(cfg), batch)
    else:
        assert pretend_forward(new_model(cfg), batch)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"amp": True}, {"dropout": 0.1}, {"grad_checkpoint": True}, {"grad_accum": 3}, {"amp": True, "compile": True}],
    ids=str,
)
def test_replays_on_cuda(changes):
    """The same bits as plain passes on a card, dropout's draws too."""
    cfg = small_config(**changes)
    batches, kind = batches_of(cfg, 8), torch.bfloat16 if cfg.amp else None
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain, replayed = (learn(cfg, batches, recorded, "cuda", kind) for recorded in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert replayed[2].recorder.graph is not None
    assert_same(plain, replayed)


@pytest.mark.gpu
@gpu
def test_a_pass_that_reads_from_the_card_is_named(monkeypatch):
    """With what to do, and the card goes on."""
    cfg = small_config()
    forward = V.VJepaAutoV2.forward

    def reading(self, batch):
        found = forward(self, batch)
        found[1]["read"] = found[0]["loss_total"].detach() * float(found[0]["loss_total"].detach())
        return found

    monkeypatch.setattr(V.VJepaAutoV2, "forward", reading)
    with pytest.raises(V.UserError, match="cannot be recorded as a CUDA graph .*--no-cuda_graph starts"):
        learn(cfg, batches_of(cfg, 5), True, "cuda")
    assert float(torch.ones(3, device="cuda").sum()) == 3
    learn(dataclasses.replace(cfg, cuda_graph=False), batches_of(cfg, 5), False, "cuda")
