"""What lies in a run's folder may be damaged, foreign or no file at all: it is named and passed over, never a
traceback."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, SHALLOW, V, small_config

WRONG = [
    0,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    "text",
    "",
    None,
    True,
    [],
    [1],
    {},
    {"a": 1},
    (),
    torch.zeros(2),
    torch.zeros(0, dtype=torch.int8),
]


def deep(levels):
    """A list in a list in a list."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture(scope="module")
def stopped(scene_folder, tmp_path_factory):
    """Three steps of a run with checkpoints 1, 2 and final -> (its folder, its config)."""
    out_dir = tmp_path_factory.mktemp("stopped")
    cfg = small_config(
        data_root=str(scene_folder),
        out_dir=str(out_dir),
        steps=3,
        ckpt_every=1,
        val_every=0,
        val_clips=2,
        picture=False,
        **SHALLOW,
    )
    assert V.train(cfg) == 0
    return out_dir, cfg


@pytest.fixture
def run(stopped, tmp_path):
    """A fresh copy of it -> (folder, config)."""
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    return folder, V.replace(stopped[1], out_dir=str(folder))


def newest_first(folder):
    return [path for _, path in reversed(V.checkpoint_files(folder))]


# -- the insides of a well-formed checkpoint


def places(state, path=()):
    """Keys of every dict and list in a state -> tuples that lead to a value; of long ones the first and the last."""
    keys = list(state) if isinstance(state, dict) else range(len(state))
    for key in dict.fromkeys([*list(keys)[:2], *list(keys)[-1:]]) if len(path) > 1 and len(keys) > 8 else keys:
        yield (*path, key)
        if isinstance(state[key], (dict, list, tuple)) and len(path) < 4:
            yield from places(state[key], (*path, key))


def changed(state, path, value):
    """A copy of nested dicts and lists with one value replaced; with KeyError as value, left out."""
    if not path:
        return value
    key, *rest = path
    if value is KeyError and not rest:
        return (
            {name: part for name, part in state.items() if name != key}
            if isinstance(state, dict)
            else [*state[:key], *state[key + 1 :]]
        )
    if isinstance(state, dict):
        return {**state, key: changed(state[key], rest, value)}
    return type(state)([*state[:key], changed(state[key], rest, value), *state[key + 1 :]])


def write(state, path):
    """Put another state in a checkpoint's place, as whole and well-formed as it was."""
    torch.save(state, path)
    (path.parent / V.WRITTEN).unlink(missing_ok=True)  # else its SHA-256 tells already


def outcome(path):
    """'' when a checkpoint is taken and a model comes of it, else the message of BadCheckpoint, or of WrongWorld where
    what it says of its world is of another one. Anything else is raised."""
    try:
        V.load_model(path)
    except (V.BadCheckpoint, V.WrongWorld) as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return str(error)
    return ""


def wrong_states(state, rng, share):
    """(where, a state wrong there) for a share of all places and wrong values."""
    for path in places(state):
        values = [KeyError, *WRONG, deep(50)]
        at = state
        for key in path:
            at = at[key]
        if isinstance(at, torch.Tensor):
            values += [
                at.to(torch.float64),
                at.flatten()[:-1],
                at[None],
                at.to_sparse() if at.dim() and at.is_floating_point() else None,
            ]
        for value in values:
            plain = isinstance(at, (int, float, str)) or not isinstance(at, torch.Tensor) and not at
            same = plain and type(value) is type(at) and value == at
            if rng.random() < share and not same:
                yield (path, str(value)[:30]), changed(state, path, value)


def check_wrong_states(run, share):
    """-> how many wrong states were refused, and which were taken."""
    folder, _ = run
    path = folder / "checkpoints/ckpt_2.pt"
    state = V.load_checkpoint(path)
    refused, taken = 0, []
    for where, wrong in wrong_states(state, random.Random(4), share):
        write(wrong, path)
        if outcome(path):
            refused += 1
        else:
            taken.append(where)
    return refused, taken


# Places where another value of the right kind is as good: settings of a run, and what decides nothing.
FREE = {
    "cfg",
    "step",
    "consumed",
    "seconds",
    "skipped",
    "after",
    "world",
    "phase_opt",
    "data",
    "source",
    "soon_predictor",
    "opt",
    "scaler",
    "rng",
    "world_size",
    "best",  # absent in older ones, as these three may be
    "best_step",
    "validated",
}


class HandedOver:
    """Writing and reading of checkpoints without a file between them: nine tenths of a wrong state's time go there."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch, "save", self.save)
        monkeypatch.setattr(torch, "load", self.load)
        monkeypatch.setattr(V, "damage_of", lambda path: "")

    def save(self, state, path):
        self.state = state

    def load(self, path, **more):
        return copy.deepcopy(self.state)


def test_wrong_insides_are_bad_checkpoints(run, monkeypatch):
    """A draw of one in 100 wrong values at every place, handed over as they are: those below go by way of files. Seen
    red with 17 kinds of error (AttributeError, TypeError, KeyError, ...)."""
    state = V.load_checkpoint(run[0] / "checkpoints/ckpt_2.pt")
    HandedOver(monkeypatch).save(state, "")
    refused, taken = check_wrong_states(run, 0.01)
    assert refused > 25 and not [where for where, _ in taken if where[0] not in FREE], taken


@pytest.mark.faults
def test_wrong_insides_are_bad_checkpoints_long(run, monkeypatch):
    """Half of all wrong values at every place handed over as they are, and one in twenty by way of a file."""
    through_files, in_files = check_wrong_states(run, 0.05)
    assert through_files > 100 and not [where for where, _ in in_files if where[0] not in FREE], in_files
    state = V.load_checkpoint(run[0] / "checkpoints/ckpt_1.pt")  # the second in the folder is a wrong one now
    HandedOver(monkeypatch).save(state, "")
    refused, taken = check_wrong_states(run, 0.5)
    print(f"{refused} wrong states refused, {len(taken)} taken as good")
    assert refused > 1000 and not [where for where, _ in taken if where[0] not in FREE], taken


@pytest.mark.parametrize(
    "path, value",
    [
        (("cfg",), 3),
        (("online",), 0),
        (("step",), "two"),
        (("opt",), []),
        (("format",), torch.zeros(3)),
        (("seconds",), float("nan")),
        (("cfg", "enc_dim"), 10**9),
        (("cfg", "image_size"), deep(200)),
        (("opt", "state", 0, "exp_avg"), torch.zeros(3)),
        (("opt", "param_groups", 0, "lr"), "fast"),
        (("rng", 0, "torch"), torch.zeros(5056, dtype=torch.uint8)),
        (("rng",), []),
        (("outcome_queue", "filled"), torch.tensor(10**6)),
        (("scaler",), 7),
        (("data",), None),
        (("data", "names"), 5),
        (("data", "files"), "many"),
        (("precision",), []),
        (("world_size",), 0),
        (("consumed",), -5),
        (("opt", "state"), {"x": 1}),
        (("flow_stats",), {}),
        (("world",), {"name": 5, "file": torch.zeros(0), "sha256": None}),
        (("frozen",), {"backbone": "0"}),
        (("frozen",), "text"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_resume_passes_over_wrong_insides(run, path, value, capsys):
    """--resume auto names the file and goes on from the one before. Seen red: a traceback for each."""
    folder, cfg = run
    newest, before, _ = newest_first(folder)
    write(changed(torch.load(newest, weights_only=True), path, value), newest)
    with pytest.raises(V.BadCheckpoint, match="ckpt_final.pt"):
        V.load_model(newest)
    state, taken = V.newest_checkpoint(folder, print)
    assert taken == before and state["step"] == 2 and "ckpt_final.pt" in capsys.readouterr().out


def test_what_is_good_is_taken(run):
    """The control of the tests above: untouched, and with what earlier or later versions may lack or add."""
    folder, cfg = run
    newest = newest_first(folder)[0]
    state = torch.load(newest, weights_only=True)
    assert outcome(newest) == ""
    more = {
        **state,
        "later": 1,
        "cfg": {**{name: value for name, value in state["cfg"].items() if name != "picture"}, "of_another_version": 5},
    }
    for group in more["opt"]["param_groups"]:
        group["of_a_later_torch"] = None
    write(more, newest)
    assert outcome(newest) == ""
    for name in ("after", "world", "frozen", "phase_opt", "soon_predictor", "precision"):
        more.pop(name)
    write({**more, "format": 2}, newest)
    assert outcome(newest) == "" and V.train(V.replace(cfg, steps=4)) == 0


# -- checkpoint names that are no files


def make_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [make_folder, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name), os.mkfifo],
    ids=["folder", "dangling", "loop", "pipe"],
)
@pytest.mark.parametrize("name", [pytest.param("ckpt_7.pt", marks=pytest.mark.slow), "ckpt_final.pt"])
def test_a_checkpoint_that_is_no_file(run, make, name, capsys):
    """Named and passed over; the run goes on, saves under that name, and deletes nothing. Seen red: UsageError,
    IsADirectoryError, or a hang."""
    folder, cfg = run
    path = folder / "checkpoints" / name
    (folder / "checkpoints/ckpt_final.pt").unlink()
    make(path)
    assert V.main(["--config", config_file(folder.parent, V.replace(cfg, steps=8, ckpt_every=1, keep_last=1))]) == 0
    out = capsys.readouterr().out
    assert f"WARNING: checkpoint {path}: not a file" in out and "resumed from" in out
    assert V.load_checkpoint(folder / "checkpoints/ckpt_final.pt")["step"] == 8
    if make is make_folder:
        assert [found.read_text() for found in folder.rglob("notes.txt")] == ["mine"]


def config_file(folder, cfg):
    path = Path(folder) / "config_of_test.json"
    path.write_text(json.dumps(asdict(cfg)))
    return str(path)


# -- metrics.jsonl, bad_files.jsonl, status.json, .lease

LINES = [
    b"5",
    b"null",
    b"[1]",
    b'"step"',
    b'{"step": "two"}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b"{}",
    b'{"step": 1, "loss_total": NaN}',
    b'{"step": 1, "x": 1e999}',
    b"\xff\xfe\x00",
    b'{"step": \xe4}',
    b"[" * 10**5,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 2, "loss',
    b"x" * 10**6,
]
BAD_LINES = [
    b"5",
    b"null",
    b'{"path": 5, "reason": "x"}',
    b'{"path": "x"}',
    b"\xff\xfe",
    b"[" * 10**5,
    b'{"path": "x", "rea',
]


@pytest.mark.parametrize("name, lines", [("metrics.jsonl", LINES), ("bad_files.jsonl", BAD_LINES)])
def test_damaged_lines_are_left_out(run, name, lines, capsys):
    """Each kind of wrong line, all in one file: one warning, the right lines stay, the run goes on. Seen red: a
    traceback for most."""
    folder, cfg = run
    rows = (folder / name).read_bytes().splitlines() if (folder / name).exists() else [b'{"path": "a", "reason": "b"}']
    (folder / name).write_bytes(b"\n".join([*rows[:1], *lines, *rows[1:]]))
    assert V.train(V.replace(cfg, steps=4)) == 0
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and f"{name}: line 2, 3, 4" in out
    kept = [json.loads(line, parse_constant=pytest.fail) for line in (folder / name).read_text().splitlines()]
    if name == "metrics.jsonl":
        assert [row["step"] for row in kept if "lr" in row] == [1, 2, 3, 4]
    else:
        assert kept == [{"path": "a", "reason": "b"}]


def test_flipped_bits_in_companions(run):
    """20 single flips over all small files of the folder: the run starts and ends, whatever it finds. Seen red with
    UnicodeDecodeError."""
    folder, cfg = run
    (folder / "bad_files.jsonl").write_text('{"path": "a", "reason": "b"}\n')
    rng, whole = random.Random(2), {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {"metrics.jsonl", "bad_files.jsonl", "config.json", "status.json", ".lease", "train.log"} <= set(whole)
    for _ in range(20):
        for name, content in whole.items():
            place = rng.randrange(len(content))
            (folder / name).write_bytes(
                content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            )
        with V.RunFolder(cfg, V.Process(0, 1, torch.device("cpu"), None)) as held:
            log = V.RunLog(cfg, True, held)
            held.closing.append(log)  # else its thread talks on while other tests run
            V.is_restart(cfg)
            log.forget_after(3, False)
            log.record({"step": 4})


@pytest.mark.parametrize(
    "make", [make_folder, lambda path: path.symlink_to("nowhere"), os.mkfifo], ids=["folder", "dangling", "pipe"]
)
def test_companions_that_are_no_files(run, make, capsys):
    """Moved to previous_<k>, with a word; the run goes on. Seen red: a hang on the pipe, IsADirectoryError for the
    folder."""
    folder, cfg = run
    names = ("metrics.jsonl", "train.log", "bad_files.jsonl", "config.json", "status.json")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
    assert V.train(V.replace(cfg, steps=4)) == 0
    assert capsys.readouterr().err.count("was not written by a run; it now stands in") == len(names)
    assert all((folder / name).is_file() for name in names if name != "bad_files.jsonl")
    assert len([path for path in folder.glob("previous_*/*") if path.name in names]) == len(names)


def test_a_lease_in_bytes(run, capsys):
    """What a .lease holds is shown as one clean line. Seen red with UnicodeDecodeError."""
    folder, cfg = run
    process = V.Process(0, 1, torch.device("cpu"), None)
    (folder / ".lease").write_bytes(b"\xff\x1b[31m\nerror: forged" * 1000)
    with V.RunFolder(cfg, process):
        pass
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import fcntl, json, time
handle = open({str(folder / ".lease")!r}, "r+b")
fcntl.lockf(handle, fcntl.LOCK_EX)
handle.write(b"\\xff\\x1b[31m" + b"\\nerror: forged" * 1000)
handle.flush()
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert V.main(["--config", config_file(folder.parent, cfg)]) == 1
    finally:
        holder.kill()
        holder.wait()
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1 and "another run writes there" in err and "\x1b" not in err and err.startswith("error: ")
    )


def test_strangers_are_not_swept_away(run):
    """Only temporary files of this script's own names go. Seen red: every .*.tmp was deleted."""
    folder, cfg = run
    ours, theirs = (
        [".ckpt_3.pt.77.tmp", ".status.json.77.tmp", ".metrics.jsonl.77.tmp"],
        [".notes.tmp", ".vim.77.tmp", ".ckpt_3.pt.tmp"],
    )
    for name in ours + theirs:
        (folder / name).write_text("x")
    V.sweep_folder(folder)
    assert {path.name for path in folder.glob(".*.tmp")} == set(theirs)


def test_an_archive_of_something_else(tmp_path):
    """A whole zip file that no checkpoint is."""
    with zipfile.ZipFile(tmp_path / "ckpt_1.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "not readable" in outcome(tmp_path / "ckpt_1.pt")
