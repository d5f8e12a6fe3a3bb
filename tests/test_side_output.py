"""Console, log lines and trackers are side output: whatever becomes of them, a run goes on, ends as it should and says
all in train.log."""

import errno
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, V, small_config

EVIL = "evil\nerror: forged \x1b[31mred\x1b[0m\u2028 \udce4.mp4"


def config(scene_folder, out_dir, **overrides):
    base = dict(
        data_root=str(scene_folder),
        out_dir=str(out_dir),
        steps=4,
        val_every=0,
        val_clips=2,
        picture=False,
        enc_depth=1,
        pred_depth=1,
        flow_depth=1,
    )
    return small_config(**{**base, **overrides})


def command(cfg, folder):
    """A config as a command of the real script."""
    path = Path(folder) / "config_of_test.json"
    path.write_text(json.dumps(asdict(cfg)))
    return [sys.executable, str(SCRIPT), "--config", str(path)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def steps_logged(out_dir):
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "lr" in row]


def status(out_dir):
    return json.loads((Path(out_dir) / "status.json").read_text())


# -- the one way out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", None])
def test_emit_writes_what_no_encoding_holds(encoding):
    """Every text reaches every stream, escaped where it must be. Seen red with print."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding) if encoding else io.StringIO()
    assert V.emit("gr\u00fcn \u8def \udce4\n", stream) == ""
    assert (raw.getvalue() or stream.getvalue().encode()).endswith(b"\\udce4\n")


def test_emit_survives_every_broken_stream(tmp_path):
    """No stream, a closed one, a full disk, a reader that left: the reason comes back, and later flushes are quiet."""
    assert V.emit("x", None) == "closed"
    closed = open(tmp_path / "x", "w")
    closed.close()
    assert "closed" in V.emit("x", closed)
    full = open("/dev/full", "w")
    assert V.emit("x", full) == os.strerror(errno.ENOSPC)
    full.close()  # would raise if the stream still led to the full disk
    reading, writing = os.pipe()
    os.close(reading)
    broken = os.fdopen(writing, "w")
    assert V.emit("x", broken) == os.strerror(errno.EPIPE)
    broken.close()


def test_every_line_is_one_line(tmp_path, capsys, monkeypatch):
    """Names that forge lines or colour the terminal are escaped by whatever prints, not by whoever calls."""
    log = V.RunLog(small_config(out_dir=str(tmp_path)), True)
    log.line(f"bad file: {EVIL}")
    log.add_bad([(EVIL, f"annotation {EVIL}")])
    V.say(EVIL)
    V.say(EVIL, sys.stderr)
    for kind in (V.UserError, V.UsageError, OSError):

        def fail(kind=kind):
            raise kind(EVIL)

        V.report_errors(fail)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.bar(1, 2, EVIL)
    out, err = capsys.readouterr()
    text = (tmp_path / "train.log").read_text()
    assert out.count("\n") == 3 and err.count("\n") == 4 and text.count("\n") == 2
    for shown in (out.replace("\r", "\n"), err, text):
        assert not re.search(V.UNPRINTABLE, shown.replace("\n", "")) and "\nerror: forged" not in shown
    assert (
        json.loads((tmp_path / "bad_files.jsonl").read_text())["path"] == EVIL
    )  # a file of data keeps the name itself


def test_nothing_prints_around_the_one_way_out():
    """print and stream.write stand nowhere in the script and its tools. Seen red with one print left in RunLog."""
    for path in [SCRIPT, *(ROOT / "tools").glob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path.name != "VJepa_AUTO_V2.py" or "stream.write(text.encode" not in line:
                assert not re.search(r"(?<![\w.\"])print\(|std(out|err)\.write\(|stream\.write\(", line), (
                    f"{path.name} line {number}: {line.strip()}"
                )


# -- consoles that go away


@pytest.mark.faults
def test_a_reader_that_leaves(scene_folder, tmp_path):
    """`| head -3`: exit 0, train.log and metrics.jsonl hold everything, one warning last. Seen red: EPIPE ended the run
    unsaved."""
    cfg = config(scene_folder, tmp_path / "run", steps=12)
    run = subprocess.Popen(command(cfg, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    for _ in range(3):
        run.stdout.readline()
    run.stdout.close()
    err = run.stderr.read()
    assert (run.wait(120), err) == (0, b"") and status(cfg.out_dir)["state"] == "finished"
    lines = (tmp_path / "run/train.log").read_text().splitlines()
    assert (
        steps_logged(cfg.out_dir) == list(range(1, 13))
        and lines[-2].startswith("done: ")
        and lines[-1].startswith("WARNING: the console was lost")
    )
    assert len([line for line in lines if line.startswith("WARNING")]) == 1


@pytest.mark.faults
@pytest.mark.parametrize("streams", ["full", "closed", "ascii"])
def test_other_consoles(scene_folder, tmp_path, streams):
    """A full disk behind stdout, all streams closed, an encoding without the names' letters: exit 0, all said in
    train.log, and no file of the run
    holds what was meant for a stream."""
    data = shutil.copytree(scene_folder, tmp_path / "data")
    for number in range(3):
        with open(os.fsencode(str(data / "videos")) + b"/b\xe4d%d.mp4" % number, "wb") as file:
            file.write(b"no video")
    cfg = config(data, tmp_path / "run", steps=8, max_bad_fraction=0.9)
    options = {"full": "> /dev/full 2> /dev/full", "closed": "<&- >&- 2>&-", "ascii": ""}[streams]
    shell = " ".join(f"'{word}'" for word in command(cfg, tmp_path)) + " " + options
    env = (
        environment(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        if streams == "ascii"
        else environment()
    )
    done = subprocess.run(["sh", "-c", shell], env=env, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    text = (tmp_path / "run/train.log").read_text()
    assert (
        "bad file: " in text
        and "\\udce4d" in text
        and "done: 8 steps" in text
        and ("console was lost" in text) == (streams != "ascii")
    )
    assert V.load_checkpoint(tmp_path / "run/checkpoints/ckpt_final.pt")["step"] == 8
    if streams == "ascii":
        assert done.stdout.decode() == text


@pytest.mark.faults
@pytest.mark.parametrize("owned", [True, False])
def test_a_terminal_that_closes(scene_folder, tmp_path, owned):
    """The terminal a run was started from: SIGHUP stops it like SIGTERM, saved. One that it merely writes to: EIO costs
    the console alone."""
    cfg = config(scene_folder, tmp_path / "run", steps=4000 if owned else 30)
    pid, master = pty.fork() if owned else (0, 0)
    if owned and pid == 0:
        os.execve(sys.executable, command(cfg, tmp_path), environment())
    if not owned:
        master, slave = pty.openpty()
        run = subprocess.Popen(
            command(cfg, tmp_path), stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True
        )
        os.close(slave)
        pid = run.pid
    seen = b""
    while b"step:2 " not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told, lines = status(cfg.out_dir), (tmp_path / "run/train.log").read_text().splitlines()
    assert lines[-1].startswith("WARNING: the console was lost")
    if owned:
        assert (code, told["state"], told["reason"]) == (75, "stopped", "SIGHUP")
        assert V.checkpoint_files(cfg.out_dir)[-1][0] == told["step"] == steps_logged(cfg.out_dir)[-1]
    else:
        assert (code, told["state"], steps_logged(cfg.out_dir)[-1]) == (0, "finished", 30)


@pytest.mark.faults
def test_torchrun_into_a_closed_pipe(scene_folder, tmp_path):
    """Two ranks, whose console goes away: exit 0."""
    cfg = config(scene_folder, tmp_path / "run", steps=6)
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *command(cfg, tmp_path)[1:],
    ]
    run = subprocess.Popen(ranks, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment())
    run.stdout.readline()
    run.stdout.close()
    assert (
        run.wait(180) == 0
        and steps_logged(cfg.out_dir) == list(range(1, 7))
        and status(cfg.out_dir)["state"] == "finished"
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    "words, code",
    [
        ("VJepa_AUTO_V2.py --help", 0),
        ("VJepa_AUTO_V2.py --print_config", 0),
        ("VJepa_AUTO_V2.py --no_such_flag", 2),
        ("tools/evaluate.py --help", 0),
        ("tools/evaluate.py --ckpt absent.pt", 2),
        ("tools/readme_tables.py --print", 0),
        ("tools/make_scenes.py --num 2 --workers 1 --out OUT", 0),
    ],
)
def test_commands_into_a_closed_pipe(tmp_path, words, code):
    """With nobody reading what they print: no traceback, the exit code that is true. Seen red with 1, and 120 for the
    help."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *words.replace("OUT", str(tmp_path / "out")).split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, env=environment(), timeout=60)
    os.close(writing)
    assert done.returncode == code and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done


@pytest.mark.faults
def test_report_errors_with_nobody_to_tell():
    """stdout and stderr both broken: the code is still the right one."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import VJepa_AUTO_V2 as V
for number in (1, 2):
    reading, writing = os.pipe()
    os.dup2(writing, number)
    os.close(reading), os.close(writing)
def command():
    V.say("a line")
    raise V.UsageError("wrong")
sys.exit(V.report_errors(command))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 2


# -- disks


@pytest.mark.parametrize("error", [errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_is_told_once(tmp_path, capsys, monkeypatch, error):
    """Read-only, broken or over quota: lines wait, one warning for the whole time, all lines in order afterwards. Seen
    red: EROFS from truncate."""
    log, real = V.RunLog(small_config(out_dir=str(tmp_path)), True), open
    log.record({"step": 1})

    def refuse(path, mode="r", *args, **more):
        if "a" in mode:
            raise OSError(error, os.strerror(error))
        return real(path, mode, *args, **more)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "truncate", lambda *args: refuse("x", "a"))
    for step in (2, 3):
        log.record({"step": step})
    monkeypatch.undo()
    log.close()
    assert capsys.readouterr().err.count("WARNING") == 2  # one for each of the two files
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))


def during(monkeypatch, step, deed):
    """Do something in the middle of a run, after one of its steps."""
    real = V.take_step

    def take_step(phase, batches, at):
        if at + 1 == step:
            deed()
        return real(phase, batches, at)

    monkeypatch.setattr(V, "take_step", take_step)


def test_a_folder_that_is_removed(scene_folder, tmp_path, monkeypatch, capsys):
    """As a full disk: warnings, on to the end, one line; the folder is not made anew. Seen red: an empty folder with a
    checkpoint, no lease."""
    cfg = config(scene_folder, tmp_path / "run", steps=6, ckpt_every=2)
    during(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    assert V.main(command(cfg, tmp_path)[2:]) == 1
    out, err = capsys.readouterr()
    assert (
        "step:6 " in out
        and "WARNING: checkpoint of step 2 could not be saved" in out
        and "WARNING: checkpoint of step 4" in out
    )
    assert (
        err.splitlines()[-1].startswith("error: checkpoint of step 6 could not be saved")
        and not (tmp_path / "run").exists()
    )


def test_a_folder_that_comes_back(scene_folder, tmp_path, monkeypatch):
    """Moved away for two steps: what waited is written, nothing is missing."""
    cfg = config(scene_folder, tmp_path / "run", steps=8, ckpt_every=2)
    deeds = {
        3: lambda: os.rename(tmp_path / "run", tmp_path / "away"),
        5: lambda: os.rename(tmp_path / "away", tmp_path / "run"),
    }
    for step, deed in deeds.items():
        during(monkeypatch, step, deed)
    assert V.train(cfg) == 0 and steps_logged(cfg.out_dir) == list(range(1, 9))
    assert {step for step, _ in V.checkpoint_files(cfg.out_dir)} == {2, 6, float("inf")}


def test_a_folder_that_another_run_makes_anew(scene_folder, tmp_path, monkeypatch, capsys):
    """Removed, and taken by a second run of the same name: ours ends in one line at its next save and has written
    nothing there."""
    cfg = config(scene_folder, tmp_path / "run", steps=8, ckpt_every=4)

    def take_over():
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run/checkpoints").mkdir(parents=True)
        (tmp_path / "run/.lease").write_text("host other, pid 1")

    during(monkeypatch, 2, take_over)
    assert V.main(command(cfg, tmp_path)[2:]) == 1
    err = capsys.readouterr().err
    assert (
        "another run has made the folder anew" in err.splitlines()[-2] + err.splitlines()[-1] and "Traceback" not in err
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lease", "checkpoints"] and not list(
        (tmp_path / "run/checkpoints").iterdir()
    )


@pytest.mark.faults
def test_a_lease_that_is_deleted_is_taken_again(scene_folder, tmp_path, monkeypatch):
    """rm out_dir/.lease, by someone who thought it stale: the run takes it anew, and a second one is still refused."""
    cfg, refused = config(scene_folder, tmp_path / "run", steps=6, ckpt_every=2), []

    def second():
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import VJepa_AUTO_V2 as V; sys.exit(V.main(sys.argv[1:]))"
        )
        refused.append(
            subprocess.run(
                [sys.executable, "-c", code, *command(cfg, tmp_path)[2:]],
                capture_output=True,
                text=True,
                env=environment(),
            )
        )

    during(monkeypatch, 2, lambda: (tmp_path / "run/.lease").unlink())
    during(monkeypatch, 5, second)
    assert V.train(cfg) == 0
    assert refused[0].returncode == 1 and "another run writes there" in refused[0].stderr


# -- trackers


class Foreign(BaseException):
    """What some packages raise: not even an Exception."""


def fake_wandb(monkeypatch, fail_in):
    """A wandb that fails at one point."""
    seen = []

    def act(point, result=None):
        seen.append(point)
        if point == fail_in:
            raise RuntimeError(f"{EVIL} failed in {point}")
        return result

    def log(numbers, step):
        act("second log" if seen.count("log") else "log")

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init = lambda **options: act("init", types.SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


@pytest.mark.parametrize("fail_in", ["init", "log", "second log", ""])
def test_trackers_may_fail(scene_folder, tmp_path, monkeypatch, capsys, fail_in):
    """One warning, that tracker is left out, the run ends as it should. Seen red: RuntimeError ended the run."""
    seen = fake_wandb(monkeypatch, fail_in)
    assert V.train(config(scene_folder, tmp_path / "run", steps=3, track="wandb")) == 0
    out = capsys.readouterr().out
    assert out.count("WARNING: track: wandb failed (RuntimeError") == bool(fail_in) and steps_logged(
        tmp_path / "run"
    ) == [1, 2, 3]
    assert seen == {"init": ["init"], "log": ["init", "log"], "second log": ["init", "log", "second log"]}.get(
        fail_in, ["init", "log"] + ["second log"] * 3
    )


def test_a_tracker_that_cannot_be_imported(scene_folder, tmp_path, monkeypatch, capsys):
    """Installed, but broken: TypeError in its import, as protobuf raises."""
    package = tmp_path / "wandb"
    package.mkdir()
    (package / "__init__.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert V.train(config(scene_folder, tmp_path / "run", steps=2, track="wandb")) == 0
    assert "track: wandb failed (TypeError: Descriptors" in capsys.readouterr().out


# -- strict JSON


def test_numbers_that_json_lacks(tmp_path, capsys):
    """NaN and both infinities become null in metrics.jsonl and stay visible on the console. Seen red with Infinity in
    the file."""
    log = V.RunLog(small_config(out_dir=str(tmp_path)), True)
    log.record({"step": 1, "a": float("inf"), "b": float("-inf"), "c": float("nan"), "d": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": None,
        "d": 1.5,
    }
    assert capsys.readouterr().out == "step:1 a:inf b:-inf c:nan d:1.5\n"


@pytest.mark.parametrize("amp", [False, True])
def test_black_clips(tmp_path, amp):
    """Nothing moves, so there is no error to save against: skill null in training and evaluation, exit 0. Seen red with
    ZeroDivisionError."""
    import av
    import numpy as np

    folder = tmp_path / "black"
    folder.mkdir()
    for number in range(4):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            for _ in range(24):
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
                )
            container.mux(stream.encode())
    cfg = config(folder, tmp_path / "run", steps=2, amp=amp, pos_embed="rope", pred_dim=48, val_every=1)
    real = V.VJepaAutoV2.make_targets

    def still_targets(self, *args):  # what bf16 and rope give for black clips: the same target at every time
        targets = real(self, *args)
        return targets[:, : self.cfg.sites].repeat(1, self.cfg.grid[0], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V.VJepaAutoV2, "make_targets", still_targets)
        assert V.train(cfg) == 0
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [row[key] for row in rows for key in row if key.endswith("soon_skill")] == [None] * 4
    assert "nothing moves in the held-out clips" in (tmp_path / "run/train.log").read_text()


def test_skill_of_numbers():
    """1 - loss / reference where there is a reference, NaN where it is zero."""
    share = V.saved_share(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    assert share[0] == 0.5 and share[1:].isnan().all()


# -- numbers that are sizes


@pytest.mark.parametrize("name", [name for name, kind in V.field_types(V.VJepaAutoV2Config).items() if kind is int])
def test_no_whole_number_is_without_a_bound(name):
    """9e18 for any of them is refused in one line. Seen red with flow_rank: a MemoryError in the middle of the
    start."""
    assert V.merged(V.VJepaAutoV2Config, "RANGES")[name][1] is not None
    if name != "flow_joint_max":  # a threshold: nothing has its size
        with pytest.raises(V.UsageError, match=name):
            V.validate_config(small_config(**{name: 9 * 10**18}))


def test_more_directions_than_numbers():
    """flow_rank beyond what the directions span is a wrong config, joint or pooled."""
    span = (small_config().soon_tokens + 2) * 48
    V.validate_config(small_config(flow_rank=span))
    with pytest.raises(V.UsageError, match=f"exceeds the {span} numbers"):
        V.validate_config(small_config(flow_rank=span + 1))


# -- signals that reach what prints


def test_say_from_threads(capsys):
    """Lines from several threads stay whole."""
    threads = [threading.Thread(target=lambda: [V.say("x" * 50) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().out == ("x" * 50 + "\n") * 200


# -- a sign of life


def test_a_silent_run_says_what_it_is_at(scene_folder, tmp_path, monkeypatch, capsys):
    """Steps that take long: the stage is told in between, on the console and in train.log, and no thread stays behind.

    Seen red without the thread: nothing was said while `base` took its first step of 83 s.
    """
    real, before = V.take_step, threading.active_count()
    monkeypatch.setattr(V, "SILENCE_S", 0.2)
    monkeypatch.setattr(V, "take_step", lambda *args: V.time.sleep(0.5) or real(*args))
    assert V.train(config(scene_folder, tmp_path / "run", steps=2, log_every=5)) == 0
    lines = (tmp_path / "run/train.log").read_text().splitlines()
    assert {"at work: step 1 of 2 has begun", "at work: step 1 of 2 is done"} <= set(lines)
    assert capsys.readouterr().out.splitlines() == lines and threading.active_count() == before


def test_a_run_that_talks_is_left_in_peace(scene_folder, tmp_path):
    """No such line while others come."""
    assert V.train(config(scene_folder, tmp_path / "run", steps=2)) == 0
    assert "at work" not in (tmp_path / "run/train.log").read_text()
