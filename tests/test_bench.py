"""tools/bench.py and plain_step.py: what is timed is what the loop does, its parts add up, sides take turns, the plain
step has our losses and our work, and the rows of a GPU say what is missing."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, small_config

import VJepa_AUTO_V2 as V
from tools import bench

RENAMED = (  # parts of names in our world, and in the plain one
    ("tokenizer.proj", "proj"), ("trunk.blocks", "trunk.layers"), (".attn.qkv.", ".self_attn.in_proj_"),
    (".attn.proj", ".self_attn.out_proj"), ("cross.proj", "attn.out_proj"), ("cross.in_proj", "attn.in_proj"),
    ("queue_filled", "filled"),
)  # fmt: skip


def take_weights(plain, world):
    """Copy weights, queue and directions of a world of ours into a plain one, which must find all it has."""
    values = {**world.state_dict(), "basis": world.space.basis}
    for end in ("weight", "bias"):
        parts = [values[f"outcome.cross.{name}.{end}"] for name in ("q", "kv")]
        values[f"outcome.cross.in_proj_{end}"] = torch.cat(parts)
        for net in ("flow", "flow_ema"):
            for name, number in (("fc1", 0), ("fc2", 2)):
                for block in range(world.cfg.flow_depth):
                    values[f"{net}.mlps.{block}.{number}.{end}"] = values[f"{net}.blocks.{block}.mlp.{name}.{end}"]
                    values[f"{net}.modulate.{block}.{end}"] = values[f"{net}.blocks.{block}.modulate.{end}"]
            values[f"{net}.modulate.{world.cfg.flow_depth}.{end}"] = values[f"{net}.modulate.{end}"]
    for old, new in RENAMED:
        values = {name.replace(old, new): value for name, value in values.items()}
    known = {}
    for name, value in values.items():
        layer = "trunk.layers" in name
        name = name.replace("mlp.fc1", "linear1" if layer else "mlp.0")
        known[name.replace("mlp.fc2", "linear2" if layer else "mlp.2")] = value
    own = [*plain.named_parameters(), ("queue", plain.queue), ("filled", plain.filled), ("basis", plain.basis)]
    for name, value in own:
        value.data.copy_(known[name])


@pytest.fixture(scope="module")
def both():
    """A small world of ours with fixed directions and random numbers for zeros, a plain one with its weights, and a
    batch."""
    torch.manual_seed(0)
    cfg, _ = bench.plain_step.plain_config(small_config(device="cpu", batch_size=2), {})
    phase = bench.new_phase(cfg, V.Process(0, 1, torch.device("cpu"), None))
    world = bench.plain_step.space_of(phase.world)
    for value in world.parameters():
        value.data.add_(torch.randn_like(value), alpha=0.05)
    world.queue.normal_(), world.queue_filled.fill_(5)
    plain = bench.plain_step.PlainStep(cfg, torch.device("cpu"))
    take_weights(plain.world, world)
    return phase, plain, bench.new_batch(phase.run)


@pytest.fixture(scope="module")
def figures():
    """A small config, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ceiling", partial(bench.ceiling, seconds=0.01))
        return bench.measure(small_config(device="cpu", batch_size=2, amp=False), rounds=2, each=1)


def test_parts_of_a_step_add_up(figures):
    """Every part takes time, and together they are the step. Seen red with the encoder's pieces left out."""
    parts = figures["parts_s"]
    assert all(parts[name] > 0 for name in (*bench.PARTS, *bench.OTHER_PARTS)), parts
    inside = sum(parts[name] for name in (*bench.PARTS, *bench.OTHER_PARTS))
    assert inside == pytest.approx(parts["step"], rel=1e-6)
    assert sum(parts[name] for name in (*bench.PARTS, "rest of forward")) == pytest.approx(parts["forward"], rel=1e-6)


def test_parts_of_a_cheaper_step():
    """The settings that compute less name the same parts. Seen red with the target's forward timed alone."""
    cheap = dict(pred_attention="cross", pred_share=0.5, target_window=1, mask_families="one", eventually_stride=2)
    phase = bench.new_phase(small_config(**cheap), V.Process(0, 1, torch.device("cpu"), None))
    parts = bench.split(phase, bench.new_batch(phase.run), 1)
    assert all(parts[name] > 0 for name in (*bench.PARTS, *bench.OTHER_PARTS)), parts


def test_rates_follow_from_the_seconds(figures):
    cfg = small_config(device="cpu", batch_size=2)
    with torch.device("meta"):
        work = sum(V.VJepaAutoV2(cfg).flops().values())
    assert figures["clips_per_s"] == pytest.approx(2 / figures["seconds"])
    assert figures["tokens_per_s"] == pytest.approx(2 * cfg.num_tokens / figures["seconds"])
    assert figures["tflops"] == pytest.approx(2 * work / figures["seconds"] / 1e12)
    assert figures["ceiling_share"] == pytest.approx(figures["tflops"] / figures["ceiling_tflops"])
    low, high = figures["seconds_quartiles"]
    assert 0 < low <= figures["seconds"] <= high


def test_quartiles_lie_within_what_was_measured():
    """Seen red with quartiles that go on beyond two rounds far apart: the lower one was below zero."""
    assert bench.spread([1.0, 9.0]) == (3.0, 5.0, 7.0) and bench.spread([2.0]) == (2.0, 2.0, 2.0)


def test_a_timed_step_trains():
    """Weights and their EMA move, as in the loop."""
    cfg = small_config(device="cpu", batch_size=2)
    process = V.Process(0, 1, torch.device("cpu"), None)
    phase = bench.new_phase(cfg, process)
    before = {name: value.clone() for name, value in phase.world.state_dict().items()}
    batch = V.for_step(V.noise_batch(phase.run, 2), 0, "cpu")
    for step in range(2):  # the first step's learning rate warms up from 0 on
        bench.take_step(phase, batch, step)
    now = phase.world.state_dict()
    for name in ("online.tokenizer.proj.weight", "target.tokenizer.proj.weight", "predictor.out.weight"):
        assert not torch.equal(before[name], now[name]), name


def test_rows_tell_what_is_missing(figures, tmp_path):
    """Rows that failed or were not reached say so; uncompiled ones stand in the table of parts as well."""
    row, lost = ("tiny", "--amp"), ("base", "--amp", "--compile")
    bench.write_rows(tmp_path, [(row, {**figures, "waits_per_step": 0}), (lost, "not run: the minutes were over")])
    text = (tmp_path / "gpu.md").read_text()
    assert "| base | --amp --compile | not run: the minutes were over |" in text
    assert text.count("| tiny") == 2 and text.count("| base") == 1
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert known["tiny --amp"]["seconds"] == figures["seconds"] and known["base --amp --compile"].startswith("not run")


def test_told_lines(figures):
    first, second, third, parts, data = bench.told(figures)
    assert "fp32" in first and "s/step" in second and "% of" in third and "optimizer" in parts
    assert "in one process" in data


def test_data_cost_what_the_loader_does(figures):
    """Clips come from the source of a run: scenes that are rendered, or those that it would write as files."""
    assert figures["data_s_per_clip"] > 0
    assert figures["data_share"] == pytest.approx(2 * figures["data_s_per_clip"] / figures["seconds"])
    assert bench.clip_seconds(small_config(scenes="render")) > 0


def test_products_are_counted_as_by_hand():
    """A block on a CPU, forward and backward, against a count by hand: backward makes each product twice, and scores
    once more. Seen red with torch's own table, which knows no attention of a CPU."""
    block, x = V.Block(48, 4, 4.0, 0.0), torch.randn(3, 10, 48, requires_grad=True)
    with bench.product_counter() as counter:
        block(x).sum().backward()
    linear, scores = 2 * 3 * 10 * 48 * 48 * (4 + 2 * 4), 2 * 3 * 10 * 10 * 48
    assert counter.get_total_flops() == 3 * linear + (2 + 5) * scores


def test_executed_products_are_those_that_must_be_computed(both, figures):
    """Beside the outcome head, the flow net's small layers and scores that are computed again: a tenth here."""
    assert 1 < figures["executed_tflop_per_clip"] / figures["tflop_per_clip"] < 1.6


# -- a plain step


def test_plain_losses_are_ours(both):
    """All four, from equal weights, on one batch. Seen red with the families of masks exchanged."""
    phase, plain, batch = both
    ours, _, _ = phase.world(batch)
    theirs, _ = plain.world(batch)
    for name in ("loss_vjepa", "loss_soon", "loss_eventually", "loss_flow"):
        assert float(theirs[name].detach()) == pytest.approx(float(ours[name].detach()), rel=1e-4), name


def test_plain_work_is_ours(both):
    """As many products, within what the tokens cost that only the plain step embeds. Seen red with a layer less."""
    phase, plain, batch = both
    counts = []
    for world in (phase.world, plain.world):
        with bench.product_counter() as counter:
            losses = world(batch)[0]
            sum(losses[f"loss_{name}"] for name in ("vjepa", "soon", "eventually", "flow")).backward()
        counts.append(counter.get_total_flops())
        world.zero_grad()
    assert counts[0] == pytest.approx(counts[1], rel=0.06)  # tokens of 8 x 8 pixels at 48 channels: 5 %


def test_a_plain_step_trains(both):
    _, plain, batch = both
    before = {name: value.clone() for name, value in plain.world.state_dict().items()}
    plain.take(batch, 0)
    now = plain.world.state_dict()
    for name in ("online.proj.weight", "target.proj.weight", "flow_ema.out.weight", "read_out.weight", "queue"):
        assert not torch.equal(before[name], now[name]), name


def test_plain_refuses_what_it_does_not_know():
    """What the user asks for is refused, what a preset or a default says gives way. Seen red without the check."""
    with pytest.raises(V.UsageError, match="plain step knows 'full' alone .--pred_attention"):
        bench.main(["plain", "--preset", "tiny", "--pred_attention", "cross"])
    cfg, note = bench.plain_step.plain_config(small_config(pred_attention="cross", flow_joint_max=0), {})
    assert (cfg.pred_attention, cfg.lambda_flow) == ("full", 0) and "lambda_flow 0" in note


# -- two sides


class FakeSide:
    """Notes when it is asked; its seconds are the number of the call."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls
        self.facts = dict(precision="fp32", threads=1, tflop_per_clip=0.1)

    def take(self, steps):
        self.calls.append((self.name, steps))
        return (2.0, 4.0) if self.name == "a" else (3.0, 2.0)


def test_sides_take_turns_and_rounds_are_paired():
    """ABBA, so that neither side is always the first. Seen red without the reversal."""
    calls = []
    sides = [FakeSide(name, calls) for name in "ab"]
    taken = bench.take_turns(sides, 3, 4)
    assert calls == [(name, bench.WARM_STEPS) for name in "ab"] + [(name, 4) for name in "abbaab"]
    assert bench.paired(taken[1], taken[0]) == [(1.5,) * 3, (0.5,) * 3]
    assert "1.500 times" in bench.ratio_line("b", bench.paired(taken[1], taken[0]))
    assert bench.median_line(sides[0], taken[0]).startswith("a: 2 s/step, 4 CPU s (fp32")


def test_bad_comparisons_are_refused(tmp_path, monkeypatch):
    """One line each, before anything is timed."""
    for argv, why in (
        (["step", "--against", "--heads 3"], "unknown argument --heads"),
        (["step", "--against", "'"], "--against"),
        (["plain", "--compare", "HEAD"], "belongs to step"),
        (["gpu", "--control"], "belongs to step"),
        (["step", "--threads", "-1"], "--threads"),
        (["step", "--compare", "no such"], "no commit|git checkout"),
    ):
        with pytest.raises(V.UsageError, match=why):
            bench.main([*argv, "--preset", "tiny", "--device", "cpu", "--no-amp"])
    with pytest.raises(V.UsageError, match="expected one argument"):
        bench.main(["step", "--against"])
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(V.UsageError, match="needs a git checkout"):
        bench.source_of("HEAD")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(V.UsageError, match="git cannot be run"):
        bench.source_of("HEAD")


def flags_of(**overrides):
    """A small config on the command line."""
    cfg = vars(small_config(**overrides))
    plain = vars(V.VJepaAutoV2Config())
    return [word for name, value in cfg.items() if value != plain[name] for word in (f"--{name}", f"{value}")]


@pytest.mark.slow
def test_two_sides_really(tmp_path, capsys):
    """The working tree against itself and against other flags, in processes of their own."""
    out = tmp_path / "pair.json"
    argv = ["step", "--against", "--pred_depth 4", "--rounds", "2", "--each", "1", "--threads", "1", "--out", str(out)]
    assert bench.main([*argv, *flags_of()]) == 0
    told, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert "--pred_depth 4 takes, over the working tree: " in told
    both = [figures[name]["tflop_per_clip"] for name in ("the working tree", "--pred_depth 4")]
    assert both[1] > 1.05 * both[0] and len(figures["--pred_depth 4"]["ratios"]) == 2
    args = SimpleNamespace(compare=None, against=None, control=True)
    assert [row[0] for row in bench.compared(args, flags_of(), None)] == ["the working tree", "the working tree again"]


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path):
    """As a commit does whose script does not know a flag. Seen red with stderr thrown away."""
    (tmp_path / "VJepa_AUTO_V2.py").write_text(
        (ROOT / "VJepa_AUTO_V2.py").read_text().replace("pred_depth", "pred_deep")
    )
    with pytest.raises(V.UsageError, match="^old: unknown argument --pred_depth"):
        with bench.Side("old", "ours", None, 1, flags_of(), tmp_path):
            pass


@pytest.mark.slow
def test_plain_really(capsys):
    cheap = ["--preset", "tiny", "--device", "cpu", "--batch_size", "1", "--enc_depth", "2", "--flow_depth", "1"]
    assert bench.main(["plain", "--rounds", "2", "--each", "1", *cheap]) == 0
    assert "plain takes, over ours: " in capsys.readouterr().out


# -- the rows of a GPU


def test_rows_cover_what_the_readme_wants():
    """All presets, two precisions, compiled and not, batches of 8 and 2; every row is a valid command."""
    cfgs = [V.resolve_config(["--preset", *row], V.VJepaAutoV2)[0] for row in bench.ROWS]
    assert {cfg.preset for cfg in cfgs} == {"tiny", "small", "base", "large", "vjepa2_vitl"}
    base = {(cfg.amp, cfg.batch_size) for cfg in cfgs if cfg.preset == "base"}
    assert base == {(amp, size) for amp in (True, False) for size in (8, 2)}
    for preset in ("tiny", "small", "base", "large", "vjepa2_vitl"):
        assert {cfg.compile for cfg in cfgs if cfg.preset == preset and cfg.amp} == {True, False}, preset


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_rows_need_a_gpu(tmp_path):
    with pytest.raises(V.UsageError, match="no usable CUDA device"):
        bench.main(["gpu", "--out", str(tmp_path)])
    with pytest.raises(V.UsageError, match="--rounds"):
        bench.main(["step", "--rounds", "0"])
