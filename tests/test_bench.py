"""tools/bench.py: what is timed is what the loop does, its parts add up, and the rows of a GPU say what is missing."""

import json

import pytest
import torch
from conftest import small_config

import VJepa_AUTO_V2 as V
from tools import bench


@pytest.fixture(scope="module")
def figures():
    """A small config, measured once."""
    return bench.measure(small_config(device="cpu", batch_size=2), rounds=2, each=1)


def test_parts_of_a_step_add_up(figures):
    """Every part takes time, and together they are the step. Seen red with the encoder's pieces left out."""
    parts = figures["parts_s"]
    assert all(parts[name] > 0 for name in (*bench.PARTS, *bench.OTHER_PARTS)), parts
    inside = sum(parts[name] for name in (*bench.PARTS, *bench.OTHER_PARTS))
    assert inside == pytest.approx(parts["step"], rel=1e-6)
    assert sum(parts[name] for name in (*bench.PARTS, "rest of forward")) == pytest.approx(parts["forward"], rel=1e-6)


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
    first, second, third, parts = bench.told(figures)
    assert "fp32" in first and "s/step" in second and "% of" in third and "optimizer" in parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_rows_need_a_gpu(tmp_path):
    with pytest.raises(V.UsageError, match="no usable CUDA device"):
        bench.main(["gpu", "--out", str(tmp_path)])
    with pytest.raises(V.UsageError, match="--rounds"):
        bench.main(["step", "--rounds", "0"])
