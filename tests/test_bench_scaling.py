"""tools/bench_scaling.py: what it counts, what it reads in a trace, and its arithmetic."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, V

sys.path.insert(0, str(ROOT / "tools"))

import bench_scaling  # noqa: E402


def test_share_of_the_all_reduce_inside_backward(tmp_path):
    """Backward lasts from 10 to 20 us; of two all-reduces, 6 us and 4 us, 7 us lie inside; the last ends 3 us later."""
    backward = ("autograd::engine::evaluate_function: MmBackward0", 10, 10)
    rows = [backward, ("gloo:all_reduce", 12, 6), ("gloo:all_reduce", 19, 4), ("gloo:all_reduce", 40, 5)]
    events = [{"ph": "X", "name": name, "ts": begin, "dur": length} for name, begin, length in rows]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = bench_scaling.read_trace(tmp_path / "trace.json")
    assert found["all_reduces"] == 2 and found["inside_backward"] == pytest.approx(0.7)
    assert found["after_backward_s"] == pytest.approx(3e-6)
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events[1:]}))
    with pytest.raises(V.UserError, match="without backward"):
        bench_scaling.read_trace(tmp_path / "trace.json")


def test_arithmetic_of_a_row():
    """Two GPUs in a ring at 1 GB/s: 1 GB of gradients each way takes 1 s, behind two thirds of a micro-step of 3 s none
    of it is waited for."""
    cfg = V.VJepaAutoV2Config(batch_size=1)
    args, _ = bench_scaling.parse(["--table", "--peak", "1", "--share", "1", "--nvlink", "1", "--reached", "1"])
    row = dict(zip(bench_scaling.HEADS, bench_scaling.table_row(args, "base", (cfg, 3e12, 1e9, 0), 2)))
    assert (row["compute s"], row["DDP GB"], row["DDP ms"]) == ("3.000", "1.00", "1000")
    assert row["DDP efficiency"] == "75.0% to 100%" and row["FSDP efficiency"] == "85.7% to 100%"
    assert len(bench_scaling.HEADS) == len(row)


@pytest.mark.slow
def test_two_ranks_are_measured_and_counted(tmp_path):
    """A few steps: all gradients go over the wire once, other collectives are few and small. The share itself is no
    test's matter on a machine that others use."""
    flags = ["--enc_depth", "1", "--pred_depth", "1", "--flow_depth", "1", "--batch_size", "2", "--no-amp"]
    flags += ["--flow_squeeze", "0"]  # gradients enough to be told from the rest
    out, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    command = [sys.executable, "tools/bench_scaling.py", "--rounds", "1", "--steps", "1", "--out", str(out)]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    text = subprocess.run([*command, "--trace", str(trace), *flags], cwd=ROOT, check=True, capture_output=True).stdout
    figures = json.loads(out.read_text())
    assert figures["gradient_bytes"] == figures["trained_bytes"] > 1e6
    assert figures["other_bytes"] < figures["gradient_bytes"] / 2
    assert figures["other_calls"] == {"all_reduce": 2, "all_gather": 4, "broadcast": 7}
    assert 0 <= figures["trace_inside_backward"] <= 1 and trace.stat().st_size > 1000
    assert b"weak scaling" in text


@pytest.mark.slow
def test_table_has_a_row_for_every_size():
    """Nine rows, as docs/scaling.md shows them."""
    args, _ = bench_scaling.parse(["--table"])
    lines = bench_scaling.table(args)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(lines) == 11 and not [line for line in lines if line not in page]


def test_rows_of_the_page_stand_in_tables_of_their_width():
    """Seen red: rows of the table above had been written into one of memory, whose rows begin alike."""
    lines = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    rows = [(line, before) for before, line in zip(lines, lines[1:]) if line.startswith("|") and before.startswith("|")]
    assert rows and not [row for row in rows if row[0].count("|") != row[1].count("|")]
