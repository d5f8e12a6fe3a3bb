"""Nothing is ever lost: kills, full disks, broken ranks, hung decoders, two writers. The long ones: `pytest -m faults`.

Runs are started as users start them, by python or torchrun on gloo; faults come from faulty_run.py, outside the script.
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, V, group_members, small_config
from training import new_state

FAULTY = ROOT / "tests" / "faulty_run.py"
QUICK_LOOK = dict(val_clips=2, val_every=0, picture=False)


def flags(cfg, folder):
    """A config as the flags of a command: one JSON file."""
    path = Path(folder) / f"flags_{abs(hash(json.dumps(asdict(cfg)))) % 10**8}.json"
    path.write_text(json.dumps(asdict(cfg)))
    return ["--config", str(path)]


def environment(trace=None, faults=(), **more):
    """The environment of a run: one thread, faults, and a folder for the trace."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(list(faults)), **more}
    if trace:
        Path(trace).mkdir(exist_ok=True)
        env["TRACE"] = str(trace)
    return env


def launch(command, env, **more):
    """Start a command in a process group of its own, its output collected."""
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **more
    )


def alone(cfg, folder):
    return [sys.executable, str(FAULTY), *flags(cfg, folder)]


def ranks(cfg, folder, number, *options):
    """The command of a run on several gloo ranks."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={number}",
        "--monitor-interval=0.1",
        *options,
        str(FAULTY),
        *flags(cfg, folder),
    ]


def finish(command, env, timeout=180):
    """Run a command to its end -> (exit code, output). Nothing of it is left alive, whatever happens."""
    process = launch(command, env)
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    finally:
        end_group(process)


def end_group(process):
    """Kill what is left of a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for(condition, seconds, process=None):
    """Poll until a condition holds. AssertionError when it does not in time, or when the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def status(out_dir):
    return json.loads((Path(out_dir) / "status.json").read_text())


def steps_logged(out_dir):
    """Steps of the training lines in a run's log, without a last line that a kill has torn where it crosses a page."""
    path = Path(out_dir) / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, whole) if "lr" in row]


def trace_of(folder):
    """{(rank, step): facts}, the last attempt's where a step was taken twice."""
    rows = [
        json.loads(line) for path in sorted(Path(folder).glob("rank_*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {
        (row["rank"], row["step"]): {key: value for key, value in row.items() if key not in ("rank", "step")}
        for row in rows
    }


def run_config(scene_folder, out_dir, **overrides):
    """A run with dropout and accumulation, saved every third step."""
    base = dict(data_root=str(scene_folder), out_dir=str(out_dir), steps=10, dropout=0.1, ckpt_every=3, **QUICK_LOOK)
    return small_config(**{**base, **overrides})


# -- checkpoints: kills while saving, flipped bits, cut files


@lru_cache(maxsize=1)
def real_state():
    """What a small run saves before its first step."""
    cfg = small_config(enc_depth=1, pred_depth=1, flow_depth=1)
    model = V.VJepaAutoV2(cfg)
    return new_state(model, V.DataSource("scenes", "", [], [], [], True))


def small_state(step):
    """A state that load_checkpoint accepts, whose encoder's tensors all tell the same step."""
    state = real_state()
    return {
        **state,
        "step": step,
        "online": {name: torch.full_like(value, float(step)) for name, value in state["online"].items()},
    }


def save_for_ever(out_dir, save):
    """Save one step after another until killed; numbered, and every fourth time the final one over the old one."""
    cfg, step = small_config(keep_last=2), 0
    while True:
        step += 1
        save(small_state(step), out_dir, cfg, step % 4 == 0)


def save_plainly(state, out_dir, cfg, final):
    """The control: what scripts without this care do."""
    torch.save(state, Path(out_dir) / "checkpoints" / "ckpt_final.pt")


def newest_step(out_dir):
    """Step of the newest checkpoint that can be trusted, -1 where none can be read."""
    steps = []
    for _, path in V.checkpoint_files(out_dir):
        try:
            state = V.load_checkpoint(path)
        except V.BadCheckpoint:
            steps.append(-1)
            continue
        assert all((tensor == state["step"]).all() for tensor in state["online"].values())  # no mixture of two
        steps.append(state["step"])
    return steps


def kill_while_saving(out_dir, save, num, seed=0):
    """Fork a process that saves in a loop and kill it at a random moment, repeatedly -> newest_step's answers."""
    rng, answers = random.Random(seed), []
    real_state()  # made once, here: each child would spend the time until its kill on making it
    (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for _ in range(num):
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(out_dir, save)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.001, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        answers.append(newest_step(out_dir))
    return answers


@pytest.mark.faults
def test_kill_while_saving(tmp_path):
    """300 kills leave every finished checkpoint whole; a plain torch.save under the same kills does not."""
    answers = kill_while_saving(tmp_path / "ours", V.save_checkpoint, 300)
    assert not [steps for steps in answers if -1 in steps]  # not one damaged file, not even among the older ones
    assert sum(bool(steps) for steps in answers) > 0.8 * 300
    plain = kill_while_saving(tmp_path / "plain", save_plainly, 300)
    assert sum(steps == [-1] for steps in plain) > 0.2 * 300  # the control: the kills do hit the writing
    V.sweep_folder(tmp_path / "ours")
    assert (
        not list((tmp_path / "ours/checkpoints").glob(".*.tmp"))
        and len(list((tmp_path / "ours/checkpoints").iterdir())) <= 8
    )


def test_two_kills_before_the_new_name(tmp_path, monkeypatch):
    """Twice in a row a run is killed between the word on a checkpoint and its name: the one that is there is still
    known as whole, and the next one takes its place. Seen red: it counted as damaged."""
    cfg, real = small_config(), os.replace
    V.save_checkpoint(small_state(3), tmp_path, cfg, True)

    def killed(source, target):
        if str(target).endswith("ckpt_final.pt"):
            raise KeyboardInterrupt
        real(source, target)

    for step in (6, 9):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            V.save_checkpoint(small_state(step), tmp_path, cfg, True)
        assert newest_step(tmp_path) == [3]
    V.save_checkpoint(small_state(12), tmp_path, cfg, True)
    assert newest_step(tmp_path) == [12] and not list((tmp_path / "checkpoints").glob("previous_*"))


def content_places(path):
    """(offset, size) of what the members of a checkpoint's archive hold; between them lie names, sizes and padding."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name, extra = struct.unpack("<HH", whole[member.header_offset + 26 : member.header_offset + 30])
            yield member.header_offset + 30 + name + extra, member.file_size


def damaged_copies(path, rng, flips, cuts):
    """The bytes of a checkpoint with one bit flipped in its content or elsewhere, or cut off -> (kind, bytes)."""
    whole, places = path.read_bytes(), list(content_places(path))
    inside = np.zeros(len(whole), bool)
    for offset, size in places:
        inside[offset : offset + size] = True
    for kind, where in (("content", np.flatnonzero(inside)), ("beside", np.flatnonzero(~inside))):
        for _ in range(flips):
            place = int(where[rng.randrange(len(where))])
            yield kind, whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
    for _ in range(cuts):
        yield "cut", whole[: rng.randrange(len(whole))]


def check_damage(tmp_path, flips, cuts):
    """-> number of flips of content that torch.load takes without a word. All damage is named, the older one taken."""
    cfg, told = small_config(), []
    V.save_checkpoint(small_state(3), tmp_path, cfg, False)
    V.save_checkpoint(small_state(6), tmp_path, cfg, False)
    newest, silent = tmp_path / "checkpoints/ckpt_6.pt", 0
    for number, (kind, content) in enumerate(damaged_copies(newest, random.Random(1), flips, cuts)):
        newest.write_bytes(content)
        state, path = V.newest_checkpoint(tmp_path, told.append)
        assert path.name == "ckpt_3.pt" and "ckpt_6.pt" in told[-1], (kind, number)
        silent += kind == "content" and loads_without_a_word(newest)
    assert len(told) == 2 * flips + cuts
    return silent


def loads_without_a_word(path):
    """Whether torch.load takes a damaged file."""
    try:
        torch.load(path, weights_only=True)
    except Exception:  # whatever a damaged archive raises
        return False
    return True


def test_damaged_checkpoints_are_passed_over(tmp_path):
    """10 flipped bits in its content, 10 beside it, 8 cuts: the older checkpoint is taken and the damage named.

    Control: torch.load alone takes flipped files.
    """
    assert check_damage(tmp_path, 10, 8) > 0


@pytest.mark.faults
def test_damaged_checkpoints_are_passed_over_long(tmp_path):
    """300 flipped bits in the content, 300 beside it, 200 cuts, all named. Seen red with the archive's CRC-32 alone: a
    flip in its directory made torch.load read other content."""
    silent = check_damage(tmp_path, 300, 200)
    print(f"300 flips in the content: torch.load takes {silent} of them")
    assert silent > 200


def test_a_copy_without_its_record_is_held_to_its_checksums(tmp_path):
    """A checkpoint alone in another folder: a flipped bit in its content is named by the archive's CRC-32."""
    V.save_checkpoint(small_state(3), tmp_path, small_config(), False)
    content = bytearray((tmp_path / "checkpoints/ckpt_3.pt").read_bytes())
    (tmp_path / "alone.pt").write_bytes(content)
    assert V.load_checkpoint(tmp_path / "alone.pt")["step"] == 3
    with zipfile.ZipFile(tmp_path / "alone.pt") as archive:  # between the files of an archive lies padding
        data = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    content[content.index(data) + len(data) // 2] ^= 16
    (tmp_path / "alone.pt").write_bytes(content)
    with pytest.raises(V.BadCheckpoint, match="checksum of"):
        V.load_checkpoint(tmp_path / "alone.pt")


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(tmp_path):
    V.save_checkpoint(small_state(3), tmp_path, small_config(), False)
    (tmp_path / "checkpoints/ckpt_3.pt").write_bytes(b"rubbish")
    with pytest.raises(V.UserError, match="nothing starts over unasked.*ckpt_3.pt"):
        V.newest_checkpoint(tmp_path, print)


def test_hash_files_of_earlier_versions_are_left_alone(tmp_path):
    """They are not read, whatever is in them, and nobody deletes them: they may be the user's own."""
    folder, hashes = (
        tmp_path / "checkpoints",
        {"ckpt_3.pt.sha256": b"0" * 64 + b"  ckpt_3.pt\n", "ckpt_6.pt.sha256": b"\xff\x00 mine"},
    )
    for step in (3, 6):
        V.save_checkpoint(small_state(step), tmp_path, small_config(), False)
    for name, content in hashes.items():
        (folder / name).write_bytes(content)
    assert (
        V.newest_checkpoint(tmp_path, print)[1].name == "ckpt_6.pt"
        and V.load_checkpoint(folder / "ckpt_3.pt")["step"] == 3
    )
    V.save_checkpoint(small_state(9), tmp_path, small_config(keep_last=1), False)
    V.move_checkpoint(folder / "ckpt_9.pt", folder / "ckpt_8.pt")
    assert {path.name for path in folder.iterdir()} == {V.WRITTEN, "ckpt_8.pt", *hashes}
    assert all((folder / name).read_bytes() == content for name, content in hashes.items())


def test_a_lost_record_of_what_was_written_proves_nothing(tmp_path):
    """Without it, or with a damaged one, checkpoints stay, and one that is written again moves the old one aside."""
    folder = tmp_path / "checkpoints"
    for damage in (b"", b"5", b'{"ckpt_3.pt": 7}', b"\xff"):
        V.save_checkpoint(small_state(3), tmp_path, small_config(), False)
        (folder / V.WRITTEN).write_bytes(damage)
        assert not V.is_written(folder / "ckpt_3.pt")
    V.save_checkpoint(small_state(6), tmp_path, small_config(keep_last=1), False)
    assert (folder / "ckpt_3.pt").is_file() and V.is_written(folder / "ckpt_6.pt")
    assert len(list(folder.glob("previous_*/ckpt_3.pt"))) == 3


class Recorder:
    """File operations of write_atomic in order, by name of the file, for counting what a power cut may leave."""

    def __init__(self, monkeypatch):
        self.calls = []
        real = {name: getattr(os, name) for name in ("fsync", "replace")}

        def fsync(number):
            self.calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}")).name))
            real["fsync"](number)

        def replace(source, target):
            self.calls.append(("replace", Path(target).name))
            real["replace"](source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)


def test_power_cut_order(tmp_path, monkeypatch):
    """Data reach the disk before the name does, and the folder last. Seen red without os.fsync."""
    (tmp_path / "checkpoints").mkdir()
    recorder = Recorder(monkeypatch)
    V.save_checkpoint(small_state(3), tmp_path, small_config(), False)
    calls = [
        (kind, name.lstrip(".").split(".tmp")[0].rsplit(".", 1)[0] if name.endswith(".tmp") else name)
        for kind, name in recorder.calls
    ]
    record = [
        ("fsync", "written.json"),
        ("replace", V.WRITTEN),
        ("fsync", "checkpoints"),
    ]  # before the file that it proves
    assert calls == [("fsync", "ckpt_3.pt"), *record, ("replace", "ckpt_3.pt"), ("fsync", "checkpoints")]


# -- disks


def test_full_disk_while_saving_goes_on(scene_folder, tmp_path, monkeypatch, capsys):
    """A save in the middle that the disk refuses: told, no rubbish, the run goes on and the next save works."""
    real, refused = V.write_atomic, []

    def write_atomic(path, write, announce=None):
        if Path(path).name == "ckpt_3.pt":
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, write, announce)

    monkeypatch.setattr(V, "write_atomic", write_atomic)
    assert V.train(run_config(scene_folder, tmp_path / "run", steps=7)) == 0
    assert (
        refused
        and "checkpoint of step 3 could not be saved (No space left on device); no earlier one stands"
        in capsys.readouterr().out
    )
    assert {path.name for path in (tmp_path / "run/checkpoints").glob("*.pt")} == {"ckpt_6.pt", "ckpt_final.pt"}


def limit_file_size(megabytes):
    """Larger files than this fail to be written, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20), resource.RLIM_INFINITY))


def test_torch_save_hides_no_disk_error(tmp_path):
    """The real writer against a real limit, in a child: OSError with its cause, temporary file gone, old one whole."""
    cfg = small_config()
    V.save_checkpoint(small_state(3), tmp_path, cfg, True)
    pid = os.fork()
    if pid == 0:
        limit_file_size(0.3)
        try:
            V.save_checkpoint(small_state(6), tmp_path, cfg, True)
        except OSError as error:
            os._exit(10 if error.errno == errno.EFBIG else 11)
        except BaseException:  # reported by its exit code: this is a forked child
            os._exit(12)
        os._exit(13)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
    assert V.load_checkpoint(tmp_path / "checkpoints/ckpt_final.pt")["step"] == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [V.WRITTEN, "ckpt_final.pt"]


def test_log_lines_wait_while_the_disk_refuses(tmp_path, capsys):
    """Lines that could not be written follow when there is room, whole, once, in order; the older ones are whole."""
    log = V.RunLog(small_config(out_dir=str(tmp_path)), True)
    log.record({"step": 1})
    pid = os.fork()
    if pid == 0:
        limit_file_size((tmp_path / "metrics.jsonl").stat().st_size / 2**20 + 3 / 2**20)
        log.record({"step": 2})
        torn = (tmp_path / "metrics.jsonl").read_text() != '{"step": 1}\n'
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.record({"step": 3})
        os._exit(10 + torn)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.faults
def test_tmpfs_runs_full(scene_folder, tmp_path):
    """A real small file system: the run tells that saving fails, ends with one line; what was saved can be read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        os.geteuid()
        or not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("mounting a tmpfs needs rights that are not there")
    try:
        code, output = finish(
            alone(run_config(scene_folder, disk / "run", steps=30, ckpt_every=2, keep_last=30), tmp_path), environment()
        )
        last = output.strip().splitlines()[-1]
        assert (
            code == 1
            and "WARNING: checkpoint of step" in output
            and last.startswith("error: ")
            and "No space left" in last
        ), output
        files = V.checkpoint_files(disk / "run")
        assert (
            files
            and all(V.load_checkpoint(path) for _, path in files)
            and not list((disk / "run/checkpoints").glob(".*.tmp"))
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- one writer, status


@pytest.mark.faults
def test_second_writer_is_refused(scene_folder, tmp_path):
    """One line that names host and pid; the first run is not disturbed; after a kill -9 the lease is free at once."""
    cfg = run_config(scene_folder, tmp_path / "run", steps=4000)
    first = launch(alone(cfg, tmp_path), environment())
    try:
        wait_for(lambda: len(steps_logged(tmp_path / "run")) > 2, 60, first)
        held = status(tmp_path / "run")
        code, output = finish(alone(cfg, tmp_path), environment())
        assert code == 1 and output.count("\n") == 1 and f"pid {first.pid}" in output and held["host"] in output
        assert status(tmp_path / "run")["pid"] == first.pid and status(tmp_path / "run")["state"] == "running"
    finally:
        end_group(first)
    code, output = finish(alone(V.replace(cfg, steps=5), tmp_path), environment())
    assert code == 0 and status(tmp_path / "run")["state"] == "finished", output


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_signal_to_the_whole_group(scene_folder, tmp_path, number):
    """Every process gets the signal, loader workers too, as from schedulers: exit 75, saved, in status, none left."""
    cfg = run_config(scene_folder, tmp_path / "run", steps=4000, num_workers=2)
    process = launch(alone(cfg, tmp_path), environment())
    try:
        wait_for(lambda: len(steps_logged(tmp_path / "run")) > 1, 60, process)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        told = status(tmp_path / "run")
        assert (process.returncode, told["state"], told["exit_code"], told["reason"]) == (
            75,
            "stopped",
            75,
            number.name,
        ), output
        assert V.checkpoint_files(tmp_path / "run")[-1][0] == told["step"] == steps_logged(tmp_path / "run")[-1]
        wait_for(lambda: not group_members(process.pid), 10)
    finally:
        end_group(process)


@pytest.mark.faults
def test_status_of_a_failed_run(scene_folder, tmp_path):
    """A crash leaves state failed with its reason, and ends at once although loader workers ignore SIGTERM."""
    code, output = finish(
        alone(run_config(scene_folder, tmp_path / "run", num_workers=2), tmp_path),
        environment(faults=[["exception", 0, 4, 0]]),
        60,
    )
    told = status(tmp_path / "run")
    assert code == 1 and told["state"] == "failed" and told["step"] == 4 and "planted exception" in told["reason"], (
        output
    )


def test_status_of_a_run_that_failed_in_this_process(scene_folder, tmp_path, monkeypatch):
    """The same without a process of its own: the exception reaches the caller, the state is failed with its reason."""
    real = V.take_step

    def take_step(phase, batches, step):
        if step == 4:
            raise ValueError("planted exception")
        return real(phase, batches, step)

    monkeypatch.setattr(V, "take_step", take_step)
    with pytest.raises(ValueError, match="planted exception"):
        V.train(run_config(scene_folder, tmp_path / "run"))
    told = status(tmp_path / "run")
    assert told["state"] == "failed" and told["step"] == 4 and "planted exception" in told["reason"]


# -- decoders that hang or crash


def dangerous(monkeypatch, deeds):
    """Make reading some files do a deed: {part of the name: function}."""
    real = V.read_frames

    def read_frames(path, plan, decoder):
        for part, deed in deeds.items():
            if part in str(path):
                deed()
        return real(path, plan, decoder)

    monkeypatch.setattr(V, "read_frames", read_frames)


def samples_of(cfg, videos, quarantine, num_workers, timeout_s=60.0):
    """(sample number, file number, mean pixel) of six batches, and the quarantine afterwards."""
    dataset = V.ClipDataset(cfg, videos, cfg.data_root, "train", (), quarantine)
    loader = V.ClipLoader(dataset, V.StepSampler(0, 6, 3, 0, 1), num_workers, False, timeout_s)
    batches = list(loader)
    rows = [
        (i, f, float(frames.float().mean()))
        for batch in batches
        for i, f, frames in zip(batch["index"].tolist(), batch["file"].tolist(), batch["frames"])
    ]
    return rows, dataset.quarantine, [entry for batch in batches for entry in batch["bad"]]


@pytest.mark.parametrize(
    "deed, words",
    [
        pytest.param("kill", "killed two loader workers", marks=pytest.mark.faults),
        pytest.param("segfault", "killed two loader workers", marks=pytest.mark.faults),
        ("hang", "decode_timeout_s"),
    ],
)
def test_a_file_that_ends_its_worker_is_quarantined(scene_folder, monkeypatch, deed, words):
    """The batches are those of a run without the file, which is named. Seen red with the quarantine not filled."""
    cfg = small_config(data_root=str(scene_folder))
    videos = V.find_videos(str(scene_folder), "*")
    evil = videos[2]
    expected, _, _ = samples_of(cfg, videos, {evil.name: "left out"}, 0)
    deeds = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(600),
    }
    dangerous(monkeypatch, {evil.name: deeds[deed]})
    rows, quarantine, bad = samples_of(cfg, videos, {}, 2, timeout_s=1.0 if deed == "hang" else 60.0)
    assert rows == expected
    assert (
        list(quarantine) == [evil.name]
        and quarantine[evil.name].startswith(V.QUARANTINED)
        and words in quarantine[evil.name]
    )
    assert {name for name, _ in bad} == {evil.name}


def test_an_exception_in_a_worker_is_not_taken_for_its_death(scene_folder, monkeypatch):
    """A bug in the loading code must surface, not be retried."""
    cfg = small_config(data_root=str(scene_folder))
    videos = V.find_videos(str(scene_folder), "*")

    def bug():
        raise RuntimeError("a bug")

    dangerous(monkeypatch, {videos[2].name: bug})
    with pytest.raises(RuntimeError, match="a bug"):
        samples_of(cfg, videos, {}, 2)


@pytest.mark.faults
def test_quarantine_survives_a_restart(scene_folder, tmp_path, monkeypatch):
    """A quarantined file is not opened again by the run that resumes."""
    evil = V.split_videos(V.find_videos(str(scene_folder), "*"), 0.1)[0][1]
    cfg = run_config(scene_folder, tmp_path / "run", steps=6, num_workers=1)
    dangerous(monkeypatch, {evil.name: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    assert V.train(cfg) == 0
    assert evil.name in (tmp_path / "run/bad_files.jsonl").read_text()
    deaths, real = [], V.ClipLoader.replace_workers
    monkeypatch.setattr(V.ClipLoader, "replace_workers", lambda *args: deaths.append(args) or real(*args))
    assert V.train(V.replace(cfg, steps=12)) == 0 and not deaths


# -- several ranks


def test_ranks_must_agree():
    """A differing rank is named with what differs. The collective itself is tested under torchrun below."""
    process = V.Process(0, 3, torch.device("cpu"), None)
    process.collect = lambda parts: [parts, parts, {**parts, "data_listing": "other"}]
    with pytest.raises(V.UserError, match="data listing of rank 2 differs"):
        V.check_ranks(process, config="a", data_listing="b")
    V.check_ranks(V.Process(0, 1, torch.device("cpu"), None), config="a")


def test_fingerprint_sees_one_bit():
    """One flipped bit in one weight or buffer changes it; a second look does not."""
    model = V.VJepaAutoV2(small_config())
    before = V.fingerprint(model)
    assert V.fingerprint(model) == before
    with torch.no_grad():
        model.predictor.out.bias[0] += 1e-7
    assert V.fingerprint(model) != before


@pytest.mark.faults
@pytest.mark.parametrize("variant", ["fp32", "bf16", "accumulation", "workers"])
def test_three_ranks_resume_bit_exactly(scene_folder, tmp_path, variant):
    """10 steps on 3 ranks == a rank killed in step 8, torchrun restarts from step 6: losses, norms, weights as hex.

    Two ranks would hide that DDP regroups its buckets after its first step. Seen red without the pass of `rehearse`.
    """
    more = {"fp32": {}, "bf16": dict(amp=True), "accumulation": dict(grad_accum=2), "workers": dict(num_workers=2)}[
        variant
    ]
    cfg = run_config(scene_folder, tmp_path / "whole", **more)
    code, output = finish(ranks(cfg, tmp_path, 3), environment(tmp_path / "trace_whole"))
    assert code == 0, output
    cut = V.replace(cfg, out_dir=str(tmp_path / "cut"))
    faults = [["SIGKILL", 1, 7, 0]]
    code, output = finish(ranks(cut, tmp_path, 3, "--max-restarts=1"), environment(tmp_path / "trace_cut", faults))
    assert code == 0 and "resumed from" in output, output
    whole, after = trace_of(tmp_path / "trace_whole"), trace_of(tmp_path / "trace_cut")
    assert len(whole) == 30 and whole == after
    assert steps_logged(cut.out_dir) == list(range(1, 11))


def reasons(output):
    """The lines of a run under torchrun that tell why its attempts ended: all of it would be cut where it is shown."""
    telling = re.compile(r"error:|exitcode|[a-zA-Z]+(Error|Exception)\b|SIG[A-Z]+|resumed from|could not|WARNING")
    return "\n".join(line[:300] for line in output.splitlines() if telling.search(line) and "wrapped =" not in line)


@pytest.mark.faults
def test_ten_restarts_in_a_row(scene_folder, tmp_path):
    """kill -9, segfault, exception and exit on random ranks, ten attempts in a row: back at the first try."""
    rng, kinds = random.Random(3), ["SIGKILL", "SIGSEGV", "exception", "exit"]
    faults = [[kinds[attempt % 4], rng.randrange(2), 2 * attempt + 1, attempt] for attempt in range(10)]
    cfg = run_config(scene_folder, tmp_path / "run", steps=22, ckpt_every=2, dist_timeout_s=60.0)
    code, output = finish(ranks(cfg, tmp_path, 2, "--max-restarts=10"), environment(faults=faults), timeout=400)
    assert code == 0, reasons(output)
    assert status(tmp_path / "run")["attempt"] == 10 and steps_logged(tmp_path / "run") == list(range(1, 23))
    # the first attempt saved nothing; a later one that had ended for another reason would leave a gap
    resumed = re.findall(r"^resumed from .* at step (\d+)$", output, re.MULTILINE)
    assert list(map(int, resumed)) == list(range(2, 20, 2)), reasons(output)


@pytest.mark.faults
def test_hung_rank_is_named_and_replaced(scene_folder, tmp_path):
    """A rank that stops answering: the others give up after dist_timeout_s, name it, and torchrun starts all anew."""
    cfg = run_config(scene_folder, tmp_path / "run", steps=6, ckpt_every=2, dist_timeout_s=8.0)
    env = environment(faults=[["hang", 1, 4, 0]], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    code, output = finish(ranks(cfg, tmp_path, 2, "--max-restarts=1"), env)
    assert code == 0 and "rank 1 did not answer" in output and "resumed from" in output, output


@pytest.mark.faults
def test_drifted_rank_is_named(scene_folder, tmp_path):
    """A rank whose weights differ by one part in a million is named at the next save, and nothing is saved after."""
    cfg = run_config(scene_folder, tmp_path / "run", ckpt_every=4)
    code, output = finish(ranks(cfg, tmp_path, 2), environment(faults=[["drift", 1, 5, 0]]))
    assert code == 1 and "ranks disagree: weights of rank 1 differs" in output, output
    assert [step for step, _ in V.checkpoint_files(tmp_path / "run")] == [4]


@pytest.mark.faults
@pytest.mark.parametrize("to", ["rank", "group", "launcher"])
def test_signals_under_torchrun(scene_folder, tmp_path, to):
    """Whoever gets the signal: all ranks save one step, status.json has what torchrun's code hides, nobody is left."""
    cfg = run_config(scene_folder, tmp_path / "run", steps=4000, num_workers=1)
    process = launch(ranks(cfg, tmp_path, 2, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1"), environment())
    try:
        wait_for(lambda: len(steps_logged(tmp_path / "run")) > 2, 90, process)
        if to == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(process.pid if to == "launcher" else status(tmp_path / "run")["pid"], signal.SIGUSR1)
        output, _ = process.communicate(timeout=90)
        told = status(tmp_path / "run")
        assert (told["state"], told["exit_code"]) == ("stopped", 75) and process.returncode != 0, output
        assert V.checkpoint_files(tmp_path / "run")[-1][0] == told["step"]
        wait_for(lambda: not group_members(process.pid), 15)
    finally:
        end_group(process)


@pytest.mark.faults
def test_ranks_of_a_killed_launcher_save_and_end(scene_folder, tmp_path):
    """kill -9 of torchrun leaves no orphans that go on writing."""
    cfg = run_config(scene_folder, tmp_path / "run", steps=4000)
    process = launch(ranks(cfg, tmp_path, 2), environment())
    try:
        wait_for(lambda: len(steps_logged(tmp_path / "run")) > 2, 90, process)
        rank_ids = [pid for pid in all_descendants(process.pid) if pid != process.pid]
        process.kill()
        wait_for(lambda: not [pid for pid in rank_ids if Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid)], 60)
        assert status(tmp_path / "run")["state"] == "stopped" and "launcher" in status(tmp_path / "run")["reason"]
    finally:
        for pid in rank_ids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        end_group(process)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def all_descendants(pid):
    """A process and everything below it."""
    everyone = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {}
    for one in everyone:
        try:
            parents[one] = parent_of(one)
        except FileNotFoundError:
            continue  # ended while we looked
    found, grew = {pid}, True
    while grew:
        more = {one for one, parent in parents.items() if parent in found} - found
        grew, found = bool(more), found | more
    return sorted(found)


@pytest.mark.faults
def test_another_number_of_ranks_goes_on_with_the_same_samples(scene_folder, tmp_path):
    """1 -> 3 -> 1 ranks and 0 -> 2 workers at the same global batch: sample numbers are those of one process."""
    base = run_config(scene_folder, tmp_path / "run", steps=9, ckpt_every=1, batch_size=6, keep_last=20)
    code, output = finish(
        alone(V.replace(base, out_dir=str(tmp_path / "one")), tmp_path), environment(tmp_path / "trace_one")
    )
    assert code == 0, output
    stages = [(1, 3, 0), (3, 6, 2), (1, 9, 0)]
    for number, until, workers in stages:
        cfg = V.replace(base, batch_size=6 // number, num_workers=workers)
        faults = [["SIGTERM", 0, until - 1, 0]] if until < 9 else []
        command = alone(cfg, tmp_path) if number == 1 else ranks(cfg, tmp_path, number)
        finish(command, environment(tmp_path / "trace_many", faults))
    per_step = [{}, {}]
    for samples, folder in zip(per_step, ("trace_one", "trace_many")):
        for (_, step), row in sorted(trace_of(tmp_path / folder).items()):
            samples[step] = sorted(samples.get(step, []) + row["samples"])
    assert per_step[0] == per_step[1] == {step: list(range(6 * step, 6 * step + 6)) for step in range(9)}


@pytest.mark.faults
def test_infinite_loss_on_one_rank(scene_folder, tmp_path):
    """All ranks skip the step, name its files, weights stay equal; too often in a row, the run stops with advice."""
    cfg = run_config(scene_folder, tmp_path / "run")
    code, output = finish(ranks(cfg, tmp_path, 2), environment(tmp_path / "trace", [["inf", 1, 4, 0]]))
    assert (
        code == 0
        and "step 5 skipped" in output
        and "rank 1: " in output
        and "scene_" in output.split("step 5 skipped")[1].splitlines()[0]
    ), output
    trace = trace_of(tmp_path / "trace")
    assert all(trace[0, step]["weights"] == trace[1, step]["weights"] for step in range(10))
    assert (
        trace[0, 4]["weights"] == trace[0, 5]["weights"] != trace[0, 6]["weights"]
    )  # traced before the update of the step
    cfg = run_config(scene_folder, tmp_path / "second", max_skipped_steps=2)
    code, output = finish(ranks(cfg, tmp_path, 2), environment(faults=[["inf", 1, step, 0] for step in (4, 5)]))
    assert code == 1 and "2 steps in a row were not finite" in output and "lower --lr" in output


@pytest.mark.faults
def test_kill_at_random_moments(scene_folder, tmp_path):
    """A run killed at any moment, repeatedly, loses at most ckpt_every steps each time and logs every step once."""
    rng, cfg = random.Random(5), run_config(scene_folder, tmp_path / "run", steps=60, ckpt_every=5, num_workers=1)
    for _ in range(6):
        process = launch(alone(cfg, tmp_path), environment())
        before = steps_logged(tmp_path / "run")[-1:] or [0]
        try:
            wait_for(lambda seen=([], before): steps_logged(tmp_path / "run")[-1:] not in seen, 60, process)
            time.sleep(rng.uniform(0, 1.0))
        finally:
            end_group(process)
        reached = steps_logged(tmp_path / "run")[-1]
        saved = [step for step, _ in V.checkpoint_files(tmp_path / "run")]
        assert max(saved, default=0) >= reached - 5
        if reached >= 55:
            break
    code, output = finish(alone(cfg, tmp_path), environment())
    assert code == 0 and steps_logged(tmp_path / "run") == list(range(1, 61)), output


def test_script_is_what_users_start():
    """The faulty runner and the command share one file: nothing of the faults lives in the product."""
    assert '"FAULTS"' not in SCRIPT.read_text()


# -- long files


def write_long_video(path, hours, fps, side=64):
    """An H.264 file whose picture tells its time: grey level by the minute."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for number in range(int(hours * 3600 * fps)):
            level = 20 + number // (60 * fps) * 200 // (hours * 60)
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.faults
def test_two_hours_are_sampled_by_seeking_with_flat_memory(tmp_path):
    """10,000 clips of a two-hour file: as fast as its first minutes, no memory held. Seen red: frames in a list."""
    write_long_video(tmp_path / "long.mp4", 2, 2)
    cfg = small_config(clip_fps=2.0)
    plan = V.ClipPlan(4, 2.0, 32, 32, 0.0, 1.0, 1.0, 0.5, 0.5)
    rng, seen, marks = np.random.default_rng(0), [], []
    for number in range(10_000):
        frames = V.read_frames(str(tmp_path / "long.mp4"), V.replace(plan, u_start=float(rng.random())), cfg.decoder)
        seen.append(int(frames.mean()))
        if number in (999, 9999):
            marks.append(resident_mb())
    print(f"memory after 1,000 clips {marks[0]:.0f} MB, after 10,000 {marks[1]:.0f} MB")
    assert marks[1] - marks[0] < 10, marks  # MB over 9,000 clips
    assert min(seen) < 40 and max(seen) > 200  # the whole file, not its start
