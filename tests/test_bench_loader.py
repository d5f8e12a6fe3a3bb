"""tools/bench_loader.py: it makes its files, measures every way of reading them, and says where the time goes."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_loader as B

import VJepa_AUTO_V2 as V


@pytest.fixture
def small(monkeypatch):
    """Films of 96 x 64 at 30 fps."""
    for name, value in (("HEIGHT", 64), ("WIDTH", 96)):
        monkeypatch.setattr(B, name, value)


@pytest.mark.slow
def test_every_way_is_measured(small, tmp_path, capsys):
    """A row for each file and way, rates above 0, and the whole file as the unit."""
    flags = ["--seconds", "1", "--gops", "10", "--rounds", "1", "--clips", "1", "--windows", "2", "--memory_clips", "0"]
    B.main([*flags, "--out", str(tmp_path / "out.json")])
    report, shown = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert list(report["files"]) == ["1 s, GOP 10", "prepared from 1 s, GOP 10"]
    for rows in report["files"].values():
        assert {"pyav", "2 windows", "whole file"} <= set(rows) and rows["whole file"]["times_whole_file"] == 1
        assert ("cached" in rows) == hasattr(V, "FrameCache")
        assert all(row["clips_per_s"] > 0 and way in shown for way, row in rows.items())


def test_the_profile_adds_up(small, monkeypatch, capsys):
    """Parts leave out the parts that they call; the script is as before afterwards."""
    real = {name: getattr(V, name) for name in B.PARTS}
    monkeypatch.setattr(B, "prepare", lambda path, folder: path)  # by the real tool above
    B.main(["--seconds", "1", "--gops", "10", "--rounds", "1", "--clips", "1", "--profile"])
    shown = capsys.readouterr().out
    assert "decode" in shown and "scale, RGB" in shown and "open, find_stream_info" in shown
    assert real == {name: getattr(V, name) for name in B.PARTS}
    clock = B.Clock()
    for name in ("outer", "inner", None, None):
        clock.turn(name)
    assert set(clock.spent) == {"outer", "inner"} and clock.stack == []


@pytest.mark.slow
def test_a_wait_is_measured(small, monkeypatch, capsys):
    """Steps far longer than a clip takes to read wait for little, far shorter ones for nearly all of the time."""
    monkeypatch.setattr(B, "prepare", lambda path, folder: path)
    monkeypatch.setattr(V, "pin_batch", V.pin_batch)  # which the tool replaces
    flags = ["--seconds", "1", "--gops", "10", "--clips", "1"]
    shares = []
    for step_s in ("0.3", "0.001"):
        B.main([*flags, "--step_s", step_s])
        shares += re.findall(r"wait for ([\d.]+)%", capsys.readouterr().out)
    assert len(shares) == 4 and max(map(float, shares[:2])) < 40 < min(map(float, shares[2:]))


def test_flags_are_checked():
    with pytest.raises(V.UsageError, match="--windows at least 2"):
        B.parse(["--windows", "1"])
