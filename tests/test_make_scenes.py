"""tools/make_scenes.py: files that training would have made itself, a split that training keeps, folders that are never
overwritten."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, V

sys.path.insert(0, str(ROOT / "tools"))  # worker processes, which get this path, look the module up by its name

import make_scenes as M  # noqa: E402


@pytest.fixture
def in_one_process(monkeypatch):
    """Write in this process: starting others costs seconds and is tested once."""

    class OnePool:
        def __init__(self, workers, context):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, write, jobs, chunksize):
            return map(write, jobs)

    monkeypatch.setattr(M, "ProcessPoolExecutor", OnePool)


def make(folder, *flags):
    return M.main(
        ["--out", str(folder), "--num", "6", "--size", "32", "--num_frames", "12", "--soon_frames", "4", *flags]
    )


def test_files_are_those_of_training(tmp_path, in_one_process):
    """Bytes of video and annotation i equal what the script writes for a run of the same seed and shape."""
    assert make(tmp_path / "tool", "--seed", "7") == 0
    cfg = V.preset_config(
        "tiny", seed=7, image_size=32, scene_size=0, num_frames=12, soon_frames=4, eventually_frames=4, scene_clips=6
    )
    V.write_scenes(tmp_path / "script", cfg)
    for part in ("videos", "annotations"):
        ours, theirs = (sorted((tmp_path / who / part).iterdir()) for who in ("tool", "script"))
        assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 6
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs))


def test_split_is_the_one_that_training_keeps(tmp_path, in_one_process):
    """split.json names what split_videos holds out; siblings of held-out scenes are named as such."""
    assert make(tmp_path, "--siblings", "2", "--val_fraction", "0.3") == 0
    split = json.loads((tmp_path / "split.json").read_text())
    train, val = V.split_videos(V.find_videos(str(tmp_path), "*"), 0.3)
    assert split["train"] == [video.name for video in train] and split["val"] == [video.name for video in val] and val
    held = {name[:12] for name in split["val"]}
    assert split["train_shares_a_scene_with_val"] == [name for name in split["train"] if name[:12] in held]


def test_siblings_share_their_present(tmp_path, in_one_process):
    """NOW frames of written siblings are equal after decoding, later ones are not."""
    assert make(tmp_path, "--siblings", "2", "--mix", "fork_only") == 0
    plan = V.ClipPlan(12, 4.0, 32, 32, 0.0, 1.0, 1.0, 0.5, 0.5)
    one, two = (V.read_frames(str(tmp_path / "videos" / f"scene_000003_future_{k}.mp4"), plan, "auto") for k in (0, 1))
    assert np.array_equal(one[:4], two[:4]) and not np.array_equal(one[4:], two[4:])


def test_an_interrupted_writing_goes_on(tmp_path, in_one_process):
    """Finished files are kept, a missing one is made, and the contents are those of an uninterrupted run."""
    assert make(tmp_path) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "videos").iterdir()}
    (tmp_path / "videos" / "scene_000002.mp4").unlink()
    assert make(tmp_path) == 0
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "videos").iterdir()}
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    assert [name for name in before if before[name] != after[name]] == ["scene_000002.mp4"]


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
)  # spawned ones import torch: seconds
def test_worker_processes_write_the_same(tmp_path, in_one_process, monkeypatch, method):
    """Two processes, same bytes."""
    assert make(tmp_path / "one") == 0
    monkeypatch.undo()
    context, asked = multiprocessing.get_context(method), []
    monkeypatch.setattr(M.multiprocessing, "get_context", lambda method: asked.append(method) or context)
    assert make(tmp_path / "two", "--workers", "2") == 0 and asked == ["spawn"]
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_killed_worker_ends_the_writing_in_one_line(tmp_path, monkeypatch, capsys):
    """Seen red with multiprocessing.Pool: it starts another process and waits for ever for what the dead one was to
    write."""
    context = multiprocessing.get_context("fork")  # a process that knows the patch below
    monkeypatch.setattr(M.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(M.V, "write_scene", lambda *args: os._exit(9))
    assert make(tmp_path) == V.EXIT_ERROR
    error = capsys.readouterr().err
    assert "a writing process was killed" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "33"], "must be even"),
        (["--mix", "spoon=1"], "scene_mix"),
        (["--num", "0"], "at least 1"),
        (["--num_frames", "8", "--soon_frames", "8"], "eventually_frames"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, words):
    """Usage errors: exit code 2, the name in one line, nothing written."""
    assert make(tmp_path / "out", *flags) == V.EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_foreign_folders_are_refused(tmp_path, capsys, in_one_process):
    """A folder with anything else in it, or with scenes of other settings, stays as it is."""
    (tmp_path / "mine.txt").write_text("do not touch")
    assert make(tmp_path) == V.EXIT_ERROR and "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert make(tmp_path / "scenes") == 0 and make(tmp_path / "scenes", "--seed", "9") == V.EXIT_ERROR
    assert "other settings" in capsys.readouterr().err


def test_sheet_is_drawn(tmp_path):
    """One picture with a row per kind and a second future of the fork."""
    from PIL import Image

    assert M.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 1000 and height > len(M.SHEET_ROWS) * 184


STRIKE = """
import os, runpy, signal, sys

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Strike())
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", ["make_scenes.py", pytest.param("futures.py", marks=pytest.mark.slow)])
def test_a_signal_during_the_imports_of_a_tool(tool):
    """Ctrl-C in the first seconds: one line and exit code 130. Seen red, a traceback, with the guard left out."""
    command = [sys.executable, "-c", STRIKE, str(ROOT / "tools" / tool)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
