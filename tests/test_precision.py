"""Autocast, torch.compile and non-finite steps: precision changes no state's type, compilation changes nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import V, random_batch, small_config
from training import cpu_process, fill_space, new_model, new_phase, train_steps


def loss_values(model, batch, amp_dtype=None):
    """Losses of one forward pass in the given precision -> dict of floats."""
    with V.autocast(cpu_process(amp_dtype)), torch.no_grad():
        losses, _, carry = model(batch)
    return {name: float(value) for name, value in losses.items()}, carry


# -- autocast


def test_bf16_losses_are_close_to_fp32():
    """Autocast moves every loss by a few percent at most."""
    cfg = small_config()
    model, batch = new_model(cfg), random_batch(cfg, 4)
    fill_space(model)
    exact, _ = loss_values(model, batch)
    rough, carry = loss_values(model, batch, torch.bfloat16)
    assert rough != exact  # autocast did something
    for name, value in exact.items():
        assert rough[name] == pytest.approx(value, rel=0.02), (
            name
        )  # bf16 keeps 8 bits: 0.4 % per number, less in a mean
    assert carry["targets"].dtype == carry["rows"].dtype == carry["key"].dtype == torch.float32


def test_master_weights_ema_and_optimizer_stay_fp32():
    """Three bf16 steps leave weights, EMA copies, moments, queue and flow statistics in fp32, and the losses fp32 too.

    Seen red with the model cast to bfloat16 in place of autocast.
    """
    cfg = small_config(amp=True)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    process = cpu_process(V.amp_dtype(cfg, torch.device("cpu")))
    assert process.amp_dtype == torch.bfloat16
    dtypes = []
    hook = model.online.trunk.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )
    loss_dtypes = []
    model.register_forward_hook(lambda module, args, out: loss_dtypes.extend(value.dtype for value in out[0].values()))
    before = model.online.tokenizer.proj.weight.clone()
    _, optimizer = train_steps(model, lambda step: [batch], 3, process)
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}  # matrix products do run in bf16
    assert set(loss_dtypes) == {torch.float32}
    assert not torch.equal(before, model.online.tokenizer.proj.weight)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_infonce_logits_are_fp32_under_autocast(monkeypatch):
    """The similarity product is excluded from autocast. Seen red with full_precision removed from info_nce."""
    outcome, keys, labels, absent = (
        torch.randn(3, 64),
        torch.randn(5, 64),
        torch.arange(3),
        torch.zeros(5, dtype=torch.bool),
    )
    plain = V.info_nce(outcome, keys, labels, absent, 0.2)[0]
    dtypes, cross_entropy = [], V.F.cross_entropy
    monkeypatch.setattr(
        V.F, "cross_entropy", lambda logits, labels: dtypes.append(logits.dtype) or cross_entropy(logits, labels)
    )
    with V.autocast(cpu_process(torch.bfloat16)):
        assert torch.equal(V.info_nce(outcome, keys, labels, absent, 0.2)[0], plain)
        assert V.info_nce(outcome.bfloat16(), keys.bfloat16(), labels, absent, 0.2)[0].dtype == torch.float32
    assert dtypes == [torch.float32, torch.float32]


def test_flow_space_is_fp32_under_autocast():
    """Whitened coordinates of a residual are the same bits with and without autocast around the loss.

    Seen red with full_precision removed from flow_loss.
    """
    cfg = small_config()
    model, batch = new_model(cfg), random_batch(cfg, 2)
    fill_space(model)
    calls = []
    encode = model.space.encode
    model.space.encode = lambda rows: calls.append((rows, encode(rows))) or calls[-1][1]
    loss_values(model, batch, torch.bfloat16)
    rows, y = calls[0]
    assert y.dtype == torch.float32 and torch.equal(y, encode(rows))


def test_fp16_only_where_the_device_lacks_bf16(monkeypatch):
    """Old CUDA cards get fp16 (and with it the loss scaler), new ones and the CPU bf16, none without --amp."""
    amp, cuda, cpu = small_config(amp=True), SimpleNamespace(type="cuda"), torch.device("cpu")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, supported=supported: supported
        )
        assert V.amp_dtype(amp, cuda) == expected
        assert V.amp_dtype(amp, cpu) == torch.bfloat16
        assert V.amp_dtype(small_config(amp=False), cuda) is None
    assert "including_emulation=False" in V.inspect.getsource(V.amp_dtype)  # emulated bf16 is slower than fp32


@pytest.mark.parametrize(
    "cost, saved, expected, words",
    [
        (0.4, "", torch.bfloat16, "0.4 of the time of fp32 on this CPU"),
        (1.0, "", torch.bfloat16, "1 of the time"),
        (1.1, "", None, "bf16 would take 1.1 times as long on this CPU"),
        (31.0, "", None, "this CPU has no bf16 instructions, bf16 would take 31 times as long"),
        (1.1, "bf16", torch.bfloat16, "1.1 of the time"),  # a resumed run computes the same bits
        (0.9, "fp32", None, "bf16 would take 0.9 times"),
        (31.0, "bf16", None, "no bf16 instructions"),  # goes on on another machine
        (0.2, "fp32", torch.bfloat16, "0.2 of the time"),
    ],
)
def test_amp_only_where_it_is_not_slower(monkeypatch, cost, saved, expected, words):
    """--amp counts only where the trial found it no slower; a checkpoint's precision stays unless clearly wrong."""
    monkeypatch.setattr(V, "amp_cost", lambda *_: cost)
    dtype, reason = V.choose_precision(V.VJepaAutoV2, small_config(amp=True), cpu_process(), saved)
    assert dtype == expected and words in reason
    assert V.choose_precision(V.VJepaAutoV2, small_config(amp=False), cpu_process(), saved) == (None, "")


def test_the_slowest_rank_decides_for_all(monkeypatch):
    """All ranks compute in one precision. Seen red with each rank's own trial deciding."""
    monkeypatch.setattr(V, "amp_cost", lambda *_: 0.3)
    process = cpu_process(rank=0, world_size=2)
    process.collect = lambda cost: [cost, 20.0]
    assert V.choose_precision(V.VJepaAutoV2, small_config(amp=True), process)[0] is None


def test_the_trial_sees_what_autocast_costs(monkeypatch):
    """The ratio is of the block's passes: one that sleeps in autocast is called slow. Seen red: both timed in fp32."""

    def pretend(block, tokens, dtype):
        V.time.sleep(0.02 if dtype else 0.005)

    monkeypatch.setattr(V, "part_pass", pretend)
    cost = V.amp_cost(V.VJepaAutoV2, small_config(), torch.device("cpu"), torch.float32)
    assert 2 < cost < 8  # fp32 as its own "autocast": products cost the same


# -- the first estimate


class Wrapped:
    """What stands around a model under DDP, with a function of the test in its place."""

    def __init__(self, call, model):
        self.call, self.model = call, model

    def __call__(self, batch):
        return self.call(batch)

    def buffers(self):
        return ()

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none)


def test_the_first_estimate_times_a_real_pass(monkeypatch):
    """Seconds per step: the second pass of a whole batch, times micro-steps. Seen red with the first pass timed."""
    passes, clock, run = [], [0.0], new_phase(new_model(small_config(grad_accum=3))).run
    monkeypatch.setattr(V, "measure_speed", lambda process: 1.0)
    monkeypatch.setattr(V.time, "perf_counter", lambda: clock[0])  # a busy machine would add to a real one

    def slow(batch):
        passes.append(len(batch["frames"]))
        clock[0] += 0.5 if len(passes) == 1 else 0.1
        return run.world(batch)

    seconds, how = V.rehearse(run, Wrapped(slow, run.world))
    assert passes == [2, 2] and seconds == pytest.approx(0.3) and how == "timed on noise"
    assert all(parameter.grad is None for parameter in run.world.parameters())
    monkeypatch.setattr(V, "is_replayed", lambda world, process: True)  # on a GPU, which took a fifth of it
    assert V.rehearse(run, Wrapped(slow, run.world))[1] == "timed on noise, before its kernels are recorded: at most"


@pytest.mark.parametrize("step_s, expected", [(3, [4, 4]), (30, [1, 1]), (300, [])])
def test_no_pass_is_made_that_would_take_minutes(monkeypatch, step_s, expected):
    """Expected to take long, one clip is timed in place of a batch, or none, and the estimate says that it is rough."""
    cfg, passes = small_config(batch_size=4), []
    model, flops = new_model(cfg), sum(V.flops_per_clip(cfg).values()) * cfg.batch_size
    monkeypatch.setattr(V, "measure_speed", lambda process: flops / step_s / 0.4e12)
    spy = Wrapped(lambda batch: passes.append(len(batch["frames"])) or model(batch), model)
    seconds, how = V.rehearse(new_phase(model).run, spy)
    assert passes == expected
    assert ("roughly" in how, seconds == pytest.approx(step_s)) == (not expected, not expected)


# -- non-finite steps


@pytest.mark.parametrize("poison", ["gradient", "frames", "flow gradient"])
def test_a_non_finite_step_is_reported_and_changes_nothing(poison):
    """NaN in a gradient or a frame makes take_step say so; without apply_step all training state stays as it was.

    Seen red with the gradient norms left out of the finite check.
    """
    cfg = small_config()
    model, batch = new_model(cfg), random_batch(cfg, 2)
    fill_space(model)
    phase = new_phase(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if poison == "frames":
        batch["frames"] = model.normalise(batch["frames"])
        batch["frames"][1, 0, 0, 0, 0] = float("nan")
    else:
        parameter = model.flow.out.weight if poison == "flow gradient" else model.predictor.out.weight
        parameter.register_hook(lambda grad: grad * float("nan"))
    _, _, finite = V.take_step(phase, [batch], 0)
    assert finite is False
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not phase.optimizer.state


def test_a_finite_step_is_reported_finite():
    cfg = small_config()
    model = new_model(cfg)
    assert V.take_step(new_phase(model), [random_batch(cfg, 2)], 0)[2] is True


# -- compile


class CountingBackend:
    """A torch.compile backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    def calls(self, name):
        """Number of calls of functions or methods with this name, in each graph."""
        targets = [
            [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
            for graph in self.graphs
        ]
        return [sum(bool(re.search(rf"\b{name}\b", target)) for target in graph) for graph in targets]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [None, True, False])
def test_one_graph_for_ten_steps(fresh_dynamo, monkeypatch, tiles):
    """The whole forward is one graph with all attention in it, new masks, queue fill and statistics compile nothing.

    Seen red with attention behind torch.compiler.disable.
    """
    cfg = small_config(**(dict() if tiles is None else dict(pos_embed="rope", flow_joint_max=0, flow_pool=2, amp=True)))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    model, backend = new_model(cfg), CountingBackend()
    model.compile(dynamic=False, backend=backend)
    process = cpu_process(V.amp_dtype(cfg, torch.device("cpu")))
    train_steps(model, lambda step: [random_batch(cfg, 2, seed=step, first=2 * step)], 10, process)
    assert len(backend.graphs) == 1
    # online on two masks and NOW, target on two windows, predictor three times, outcome once, flow: self, cross where
    # tokens mix
    expected = 5 * cfg.enc_depth + 3 * cfg.pred_depth + 1 + cfg.flow_depth * (2 if cfg.flow_tokens > 1 else 0)
    # bf16 on a CPU; the target encoder has no gradients: there it depends on the CPU
    plain = (expected - 2 * cfg.enc_depth * tiles) if cfg.amp else 0
    assert (backend.calls("scaled_dot_product_attention"), backend.calls("softmax")) == ([expected - plain], [plain])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_is_plain_training(fresh_dynamo, backend):
    """Three steps compiled and plain: the same losses and weights; state_dict keys do not change."""
    cfg, results = small_config(), []
    for compiled in (False, True):
        model = new_model(cfg)
        fill_space(model, num_updates=20)
        keys = list(model.state_dict())
        if compiled:
            model.compile(dynamic=False, backend=backend)
        history, _ = train_steps(model, lambda step: [random_batch(cfg, 2, seed=step)], 3)
        assert list(model.state_dict()) == keys and list(dict(model.named_parameters()))[0].startswith("online.")
        results.append((history, model.state_dict()))
    (plain, state), (compiled, compiled_state) = results
    for metrics, metrics_compiled in zip(plain, compiled):
        for name, value in metrics.items():
            assert metrics_compiled[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (
                name
            )  # decomposed kernels round otherwise
    for name in state:
        # Adam turns rounding noise of zero gradients into a part of the learning rate, 1e-4 to 5e-4 per step
        torch.testing.assert_close(compiled_state[name], state[name], rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_blocks_are_compiled_once_per_size(fresh_dynamo, monkeypatch):
    """By default blocks are compiled, and like ones share it: as many graphs as sizes that a kind of block meets, and
    none after the first step. Seen red with at most four recompilations, after which blocks run uncompiled."""
    cfg, backend, real = small_config(), CountingBackend(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: real(self, backend=backend, **kw))
    model, counts = new_model(cfg), []
    V.compile_world(model)
    for first in range(3):
        batch = random_batch(cfg, 2, seed=first, first=2 * first)
        train_steps(model, lambda step, batch=batch: [batch], 1)
        counts.append(len(backend.graphs))
    # encoder: two masks, NOW, two windows without gradient; predictor: two masks and SOON; flow
    assert counts == [9, 9, 9]
    assert len(V.shard_units(model)) > 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_small_models_get_autocast_on_cuda():
    """A card that has bf16 uses it, however little work a clip is. Seen red on an H100, which took fp32."""
    cfg = V.preset_config("small", device="cuda")
    device = V.choose_device("cuda", 0)
    assert V.choose_precision(V.VJepaAutoV2, cfg, V.Process(0, 1, device, None))[0] is V.amp_dtype(cfg, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_on_cuda(compiled):
    """A few autocast steps on the GPU stay finite and start at the losses of the CPU."""
    cfg = small_config(device="cuda", amp=True)
    device = V.choose_device("cuda", 0)
    model, process = new_model(cfg), V.Process(0, 1, device, V.amp_dtype(cfg, device))
    reference, _ = loss_values(model, random_batch(cfg, 2))
    model.to(device)
    if compiled:
        model.compile(dynamic=False)
    history, _ = train_steps(model, lambda step: [V.to_device(random_batch(cfg, 2, seed=0), device)], 5, process)
    assert history[0]["loss_vjepa"] == pytest.approx(reference["loss_vjepa"], rel=0.02)
    assert history[0]["loss_soon"] == pytest.approx(reference["loss_soon"], rel=0.02)
