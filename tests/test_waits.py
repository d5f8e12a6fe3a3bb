"""Waits have an end, and what passes is not permanent: workers stopped, killed, orphaned, data away, no /dev/shm.

Expected batches are always those of a loader without workers that nothing disturbs.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, V, group_members, small_config

NUM_BATCHES = 6


def data_of(folder, **overrides):
    """Config and videos of a scene folder."""
    return small_config(data_root=str(folder), **overrides), V.find_videos(str(folder), "*")


def open_clips(cfg, videos, num_workers, timeout_s=30.0, **more):
    """A loader of six batches of three."""
    dataset = V.ClipDataset(cfg, videos, cfg.data_root, "train", ())
    return V.ClipLoader(
        dataset,
        V.StepSampler(0, NUM_BATCHES, 3, 0, 1),
        num_workers,
        timeout_s=timeout_s,
        batch_bytes=V.batch_bytes(dataset, 3),
        **more,
    )


def rows_of(batches):
    """(sample, file, mean pixel) of batches, in order."""
    return [
        (i, f, float(frames.float().mean()))
        for batch in batches
        for i, f, frames in zip(batch["index"].tolist(), batch["file"].tolist(), batch["frames"])
    ]


def undisturbed(cfg, videos):
    return rows_of(open_clips(cfg, videos, 0))


def before_reading(monkeypatch, deed):
    """Call deed(path) before each file is read."""
    real = V.read_frames
    monkeypatch.setattr(V, "read_frames", lambda path, plan, decoder: deed(path) or real(path, plan, decoder))


def once(mark, deed):
    """A function that does a deed in the first process that calls it, and nothing afterwards."""

    def call(*_):
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        deed()

    return call


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


# -- hand-over


def test_batches_are_the_same_bytes_by_every_way(scene_folder):
    """Shared memory, too little of it for a batch, and the socket alone hand over what no worker makes."""
    cfg, videos = data_of(scene_folder)
    plain = open_clips(cfg, videos, 0)
    expected, whole = list(plain), plain.batch_bytes
    for room in (whole, 3 * 12 * 3 * 32 * 32 + 64, 0):
        loader = open_clips(cfg, videos, 2)
        loader.close()
        loader.batch_bytes = room
        loader.start()
        for batch, other in zip(loader, expected, strict=True):
            assert batch.keys() == other.keys() and all(
                torch.equal(value, other[key]) for key, value in batch.items() if key != "bad"
            )
            assert all(value.dtype == other[key].dtype for key, value in batch.items() if key != "bad")


@pytest.mark.faults
def test_batches_that_a_thread_copies(scene_folder, monkeypatch):
    """The path of pinned memory with its thread, pinning replaced by a copy: each batch is whole and in its place.

    Seen red with the slot released before the copy: later clips stood in earlier batches.
    """
    cfg, videos = data_of(scene_folder)
    monkeypatch.setattr(
        V,
        "pin_batch",
        lambda batch: (
            time.sleep(0.15)
            or {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        ),
    )
    for workers in (1, 2):
        loader = open_clips(cfg, videos, workers)
        loader.pinning = ThreadPoolExecutor(1)
        assert rows_of(loader) == undisturbed(cfg, videos)


@pytest.mark.faults
def test_a_batch_is_not_overwritten_by_the_next(scene_folder):
    """Batches are copies: kept ones stay as workers fill shared memory. Seen red with take(in_place=True)."""
    cfg, videos = data_of(scene_folder)
    kept = list(open_clips(cfg, videos, 1))
    time.sleep(0.1)
    assert rows_of(kept) == undisturbed(cfg, videos)


def without_shared_memory(mount, tmpdir, code):
    """Run Python code in a mount namespace of its own after a shell line, with a TMPDIR -> CompletedProcess. Skips
    where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mount namespaces need rights that are not there")
    env = {**os.environ, "TMPDIR": tmpdir, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [unshare, "-m", "sh", "-c", f'{mount}; exec "$0" "$@"', sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )


@pytest.mark.parametrize(
    "mount",
    [
        pytest.param("mount -t tmpfs -o size=4k tmpfs /dev/shm", id="4k", marks=pytest.mark.faults),
        pytest.param("mount -t tmpfs -o size=8m tmpfs /dev/shm", id="8m", marks=pytest.mark.faults),
        pytest.param("mount -t tmpfs -o ro tmpfs /dev/shm", id="read-only", marks=pytest.mark.faults),
        pytest.param(
            "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9",
            id="absent",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_run_needs_no_dev_shm_and_no_tmpdir(scene_folder, tmp_path, mount):
    """Batches larger than /dev/shm, a TMPDIR too long for a socket's name that does not exist: the run ends well.

    Seen red with torch's DataLoader: it waits for ever, its workers killed by SIGBUS or unable to listen.
    """
    cfg, _ = data_of(
        scene_folder,
        out_dir=str(tmp_path / "run"),
        image_size=128,
        patch=32,
        num_workers=2,
        batch_size=16,
        steps=2,
        val_clips=2,
        picture=False,
        resume="never",
    )
    (tmp_path / "flags.json").write_text(json.dumps(asdict(cfg)))
    call = f"sys.exit(V.main(['--config', {str(tmp_path / 'flags.json')!r}]))"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import VJepa_AUTO_V2 as V; {call}"
    done = without_shared_memory(mount, "/nowhere/" + "x" * 150, code)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.mark.faults
def test_workers_that_are_spawned(scene_folder, monkeypatch):
    """Where processes are not forked (macOS) the batches come through the socket, the same."""
    cfg, videos = data_of(scene_folder)
    monkeypatch.setattr(V, "START_METHOD", "spawn")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert rows_of(open_clips(cfg, videos, 2, timeout_s=60.0)) == undisturbed(cfg, videos)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.faults), signal.SIGSTOP], ids=lambda number: number.name
)
def test_a_worker_that_ends_or_stops_in_the_middle_of_a_message(scene_folder, tmp_path, monkeypatch, number):
    """Half a batch is in the socket: the worker is replaced, nothing is lost, no file is blamed.

    Seen red with torch's DataLoader: its queue waits for the other half, which another worker can no longer send
    either."""
    cfg, videos = data_of(scene_folder)
    strike = once(tmp_path / "mark", lambda: os.kill(os.getpid(), number))
    real = V.WorkerEnd.say

    def say(end, kind, content):
        if kind == "batch" and not (tmp_path / "mark").exists():
            end.channel.sendall((10**6).to_bytes(8, "little") + b"half of it")
            strike()
        real(end, kind, content)

    monkeypatch.setattr(V.WorkerEnd, "say", say)
    monkeypatch.setattr(V, "QUIET_S", 0.0)
    loader = open_clips(cfg, videos, 2, timeout_s=1.0)
    assert rows_of(loader) == undisturbed(cfg, videos) and not loader.files.quarantine and (tmp_path / "mark").exists()


def test_a_stopped_worker_is_replaced_and_its_file_is_not_blamed(scene_folder, tmp_path, monkeypatch):
    """SIGSTOP with a file in hand. Seen red with quarantine at the first silence: a good file was left out."""
    cfg, videos = data_of(scene_folder)
    expected = undisturbed(cfg, videos)
    before_reading(monkeypatch, once(tmp_path / "mark", lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    began, loader = time.monotonic(), open_clips(cfg, videos, 2, timeout_s=1.0)
    assert rows_of(loader) == expected and not loader.files.quarantine and (tmp_path / "mark").exists()
    assert time.monotonic() - began < 15


def test_a_signal_during_a_fork_is_heard_after_it():
    """Ctrl-C while workers are started is raised once they are known. Seen red without the context: the fork was cut
    off, or the key lost."""
    started = []
    with pytest.raises(KeyboardInterrupt):
        with V.HeldSignals():
            signal.raise_signal(signal.SIGINT)
            started.append(True)
    assert started and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_that_die_again_and_again_end_the_run_in_one_line(scene_folder, monkeypatch):
    """What kills them is named with the way out."""
    cfg, videos = data_of(scene_folder)
    monkeypatch.setattr(V.WorkerEnd, "hand_over", lambda *_: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(V.UserError, match=r"killed by SIGBUS.*--num_workers 0"):
        list(open_clips(cfg, videos, 2))


def test_workers_that_cannot_be_started(scene_folder, monkeypatch):
    """A limit on processes: one line names it; workers that had started are gone. Seen red (BlockingIOError)."""
    cfg, videos = data_of(scene_folder)
    started, real = [], V.Worker.start

    def start(worker, *work):
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        real(worker, *work)
        started.append(worker.process.pid)

    monkeypatch.setattr(V.Worker, "start", start)
    with pytest.raises(V.UserError, match=r"cannot be started \(Resource temporarily unavailable\).*ulimit -u"):
        open_clips(cfg, videos, 2)
    assert not alive(started[0])


@pytest.mark.parametrize(
    "kind, words",
    [(V.UserError, "plain words"), (OSError, "plain words"), (TypeError, "in a loader worker: TypeError: plain words")],
)
def test_an_exception_in_a_worker_is_one_short_reason(scene_folder, monkeypatch, kind, words):
    """The text of the exception alone; where it happened stands in its cause. Seen red with DataLoader, which puts the
    traceback into it."""
    cfg, videos = data_of(scene_folder)

    def fail(samples):
        raise kind("plain words")

    with pytest.raises(RuntimeError if kind is TypeError else kind) as caught:
        list(open_clips(cfg, videos, 1, collate_fn=fail))
    assert str(caught.value) == words and "test_waits.py" in str(caught.value.__cause__)


# -- stopping


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_a_wait_hears_the_stop_flag_and_loses_nothing(scene_folder, tmp_path, monkeypatch, workers):
    """Stopped within a second; the batch that was due is still due. Seen red without `stopping`."""
    cfg, videos = data_of(scene_folder)
    expected = undisturbed(cfg, videos)
    before_reading(monkeypatch, once(tmp_path / "mark", lambda: time.sleep(1.8)))
    asked = threading.Event()
    loader = open_clips(cfg, videos, workers, stopping=asked.is_set)
    began = time.monotonic()
    threading.Timer(0.3, asked.set).start()
    with pytest.raises(V.Stopped):
        list(loader)
    assert time.monotonic() - began < 1.7 and loader.delivered == 0
    asked.clear()
    assert rows_of(loader) == expected


def test_a_batch_that_is_there_is_given_even_when_stopping(scene_folder):
    """Only a wait is cut short: the loop itself ends after the step."""
    cfg, videos = data_of(scene_folder)
    loader = open_clips(cfg, videos, 1, stopping=lambda: True)
    wait_until(lambda: loader.look(0.1) or loader.due.parcels, 20)
    assert next(loader)["index"].tolist() == [0, 1, 2]


# -- time that nobody had


def fork_group(work):
    """Run work() in a forked process that leads a group of its own -> pid. Its exit code is 0 when work returns."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.faults
def test_a_suspended_group_quarantines_nothing(scene_folder, tmp_path, monkeypatch):
    """Ctrl-Z and fg, past the time-out, files in hand: no file is left out. Seen red with wall time counted."""
    cfg, videos = data_of(scene_folder)
    expected = undisturbed(cfg, videos)
    before_reading(monkeypatch, lambda path: time.sleep(0.4))

    def work():
        loader = open_clips(cfg, videos, 2, timeout_s=1.5)
        (tmp_path / "began").touch()
        assert rows_of(loader) == expected and not loader.files.quarantine and not loader.strikes

    pid = fork_group(work)
    try:
        wait_until((tmp_path / "began").exists, 20)
        for _ in range(2):
            time.sleep(0.6)
            os.killpg(pid, signal.SIGSTOP)
            time.sleep(2.5)
            os.killpg(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all ended


def test_workers_end_with_their_parent(scene_folder, tmp_path, monkeypatch):
    """kill -9 of the main process while a worker hangs in a file and another idles: both end in seconds. Seen red."""
    cfg, videos = data_of(scene_folder)

    def work():
        before_reading(monkeypatch, once(tmp_path / "mark", lambda: time.sleep(3600)))
        loader = open_clips(cfg, videos, 2, timeout_s=600.0)
        (tmp_path / "pids.part").write_text(json.dumps([worker.process.pid for worker in loader.workers]))
        (tmp_path / "pids.part").rename(tmp_path / "pids")
        list(loader)

    pid = fork_group(work)
    pids = []
    try:
        wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "mark").exists(), 20)
        pids = json.loads((tmp_path / "pids").read_text())
        assert all(alive(worker) for worker in pids)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(lambda: not any(alive(worker) for worker in pids), 5)
    finally:
        for worker in filter(alive, pids):
            os.kill(worker, signal.SIGKILL)


# -- cores that the step needs as well


def test_workers_are_as_nice_as_the_run_says_where_it_computes_on_the_cpu(scene_folder, tmp_path, monkeypatch):
    """All loaders of a run with evaluation and picture. Seen red with a loader that was not told, of the training and
    of the picture, and with one told on a GPU as well."""
    seen, real = [], V.ClipLoader.__post_init__
    monkeypatch.setattr(V.ClipLoader, "__post_init__", lambda loader: seen.append(loader.nice) or real(loader))
    cfg = small_config(data_root=str(scene_folder), out_dir=str(tmp_path / "run"), num_workers=1, worker_nice=3)
    assert V.train(V.replace(cfg, steps=2, picture=True, device="cpu")) == 0
    assert len(seen) >= 3 and set(seen) == {3}
    of_device = {name: V.Process(0, 1, torch.device(name), None).worker_nice(cfg) for name in ("cpu", "cuda")}
    assert of_device == {"cpu": 3, "cuda": 0}


def test_workers_that_get_no_time_are_not_nice_any_more(scene_folder, monkeypatch):
    """Other programs leave none to nice ones: after the first silence the next come at the run's own priority, the
    batches are the same and no file is left out. Seen red with workers that stay nice."""
    cfg, videos = data_of(scene_folder)
    own, told = os.nice(0), []
    before_reading(monkeypatch, lambda path: time.sleep(600) if os.nice(0) > own else None)
    expected = undisturbed(cfg, videos)
    loader = open_clips(cfg, videos, 2, timeout_s=1.0, nice=1, line=told.append)
    assert rows_of(loader) == expected and not loader.dataset.quarantine and loader.nice == 0
    assert told == ["no word from a loader worker for 1 s: the next have the run's own priority"]


NO_TORCH = """
import os, runpy, sys
sys.modules["torch"] = None
try:
    runpy.run_path(sys.argv[1], run_name=sys.argv[2])
except ImportError as error:
    assert error.name == "torch", error
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def spins_of(file, run_name="__main__", **more):
    """GOMP_SPINCOUNT when a file comes to import torch, "None" where it is not set."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", NO_TORCH, str(ROOT / file), run_name]
    return subprocess.run(command, env={**env, **more}, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "file",
    [
        *(f"worlds/{name}.py" for name in ("hope", "cosmos", "future_latents")),
        *(f"tools/{name}.py" for name in ("evaluate", "cache_latents")),
    ],
)
def test_threads_of_what_is_started_do_not_spin_for_long(file):
    """Told before torch is imported. Seen red with a world that leaves torch's default."""
    assert spins_of(file) == "2000"


def test_how_threads_wait_is_left_to_who_says_it():
    """And to whoever imports the script. Seen red with the line outside of its `if`."""
    assert spins_of(SCRIPT) == "2000" and spins_of(SCRIPT, GOMP_SPINCOUNT="9") == "9"
    assert spins_of(SCRIPT, OMP_WAIT_POLICY="active") == spins_of(SCRIPT, "imported") == "None"


# -- data that are away for a while


def copy_scenes(scene_folder, folder):
    return Path(shutil.copytree(scene_folder, folder))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
def test_data_that_are_away_for_a_while_are_waited_for(scene_folder, tmp_path, monkeypatch, capfd, workers):
    """The folder is gone for half a second: the same batches, no file called bad, one line. Seen red: all were bad."""
    folder = copy_scenes(scene_folder, tmp_path / "data")
    cfg, videos = data_of(folder)
    expected = undisturbed(cfg, videos)
    before_reading(monkeypatch, lambda path: time.sleep(0.05))
    loader = open_clips(cfg, videos, workers)
    batches = [next(loader)]
    folder.rename(tmp_path / "elsewhere")
    threading.Timer(0.5, (tmp_path / "elsewhere").rename, (folder,)).start()
    batches += list(loader)
    assert rows_of(batches) == expected and not any(batch["bad"] for batch in batches)
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "waiting up to 60 s for the data" in told


def test_data_that_stay_away_are_waited_for_once(scene_folder, tmp_path):
    """After decode_timeout_s every file is bad: not so long for each of them."""
    folder = copy_scenes(scene_folder, tmp_path / "data")
    cfg, videos = data_of(folder, decode_timeout_s=1.0)
    shutil.rmtree(folder)
    began, batch = time.monotonic(), next(open_clips(cfg, videos, 0))
    assert (
        time.monotonic() - began < 4
        and batch["file"].tolist() == [-1] * 3
        and {name for name, _ in batch["bad"]} == {video.name for video in videos}
    )


def test_a_wait_for_data_hears_the_stop_flag(scene_folder, tmp_path):
    """Without workers too."""
    folder = copy_scenes(scene_folder, tmp_path / "data")
    cfg, videos = data_of(folder)
    shutil.rmtree(folder)
    with pytest.raises(V.Stopped):
        next(open_clips(cfg, videos, 0, stopping=lambda: True))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE], ids=lambda code: errno.errorcode[code])
def test_a_fault_of_the_machine_is_tried_again(scene_folder, monkeypatch, code):
    """A reason from a network or a full table of open files replaces no clip. Seen red with the first answer taken."""
    cfg, videos = data_of(scene_folder)
    expected, failed = undisturbed(cfg, videos), []

    def fail_twice(path):
        if videos[2].name in path and len(failed) < 2:
            failed.append(path)
            raise V.BadFile(f"cannot be read ({os.strerror(code)})")

    before_reading(monkeypatch, fail_twice)
    monkeypatch.setattr(V, "RETRY_S", 0.01)
    assert rows_of(open_clips(cfg, videos, 0)) == expected and len(failed) == 2


def test_a_lasting_fault_is_tried_four_times_and_then_believed(scene_folder, monkeypatch):
    """A file that always fails with an input/output error costs its retries once, not in every epoch."""
    cfg, videos = data_of(scene_folder)
    tries = []

    def fail(path):
        if videos[2].name in path:
            tries.append(path)
            raise V.BadFile(os.strerror(errno.EIO))

    before_reading(monkeypatch, fail)
    monkeypatch.setattr(V, "RETRY_S", 0.01)
    dataset = V.ClipDataset(cfg, videos, cfg.data_root, "train", ())
    met = sum(videos[2].name in dict(dataset[number]["bad"]) for number in range(4 * len(videos)))
    assert met >= 4 and len(tries) == 3 + met


# -- what counts is what is bad now


def test_a_file_that_decodes_later_is_good_again(scene_folder, tmp_path):
    """`failing` follows the batches; a sample without any file wins over what was decoded beside it."""
    folder = copy_scenes(scene_folder, tmp_path / "data")
    cfg, videos = data_of(folder, decode_timeout_s=0.1)
    failing = {videos[0].name: "away"}
    loader = open_clips(cfg, videos, 0, failing=failing)
    list(loader)
    assert not failing
    loader.keep_account({"file": torch.tensor([0, -1]), "bad": [(videos[0].name, "gone")]})
    assert failing == {videos[0].name: "gone"}


def test_remembered_bad_files_are_history_not_a_verdict(scene_folder, tmp_path, capsys):
    """Every file is in bad_files.jsonl from an outage, one is bad all along: the next start tries them again and goes
    on. Seen red: it failed for ever."""
    folder = copy_scenes(scene_folder, tmp_path / "data")
    cfg, videos = data_of(folder, out_dir=str(tmp_path / "run"), steps=2, picture=False, val_every=0)
    Path(V.split_videos(videos, cfg.val_fraction)[0][0].path).write_bytes(b"bad all along" * 99)
    assert V.train(cfg) == 0
    with open(tmp_path / "run/bad_files.jsonl", "w") as handle:
        handle.writelines(
            json.dumps({"path": video.name, "reason": "cannot be read (No such file or directory)"}) + "\n"
            for video in videos
        )
    assert V.train(V.replace(cfg, steps=8)) == 0
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "bad_files" in line
    ]
    assert records[-1]["step"] == 8 and records[-1]["bad_files"] == len(videos)  # so far, over all restarts
    assert len((tmp_path / "run/bad_files.jsonl").read_text().splitlines()) == len(videos)


def test_a_bad_file_that_is_quarantined_later_is_remembered(tmp_path):
    """Its second line stands, so that the next start does not open it. Seen red with each name written once."""
    cfg = small_config(out_dir=str(tmp_path))
    log = V.RunLog(cfg, True)
    log.add_bad(
        [
            ("a.mp4", "truncated"),
            ("a.mp4", "truncated"),
            ("a.mp4", f"{V.QUARANTINED}: it killed two loader workers"),
            ("a.mp4", "truncated"),
        ]
    )
    again = V.RunLog(cfg, True)
    again.forget_after(0, False)
    assert again.bad == {"a.mp4": f"{V.QUARANTINED}: it killed two loader workers"}
    assert len((tmp_path / "bad_files.jsonl").read_text().splitlines()) == 2


# -- tools


def test_no_tool_opens_a_loader_of_its_own():
    """torch's DataLoader is neither guarded nor needed: nobody uses it."""
    assert not [path.name for path in [SCRIPT, *(ROOT / "tools").glob("*.py")] if "DataLoader(" in path.read_text()]


def start_evaluation(checkpoint, folder, **more):
    command = [
        sys.executable,
        str(ROOT / "tools/evaluate.py"),
        "--ckpt",
        str(checkpoint),
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(folder / "out"),
        "--num_workers",
        "2",
    ]
    command += ["--data_root", str(folder / "data")] if (folder / "data").exists() else []
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **more
    )


@pytest.fixture(scope="module")
def checkpoint(scene_folder, tmp_path_factory):
    """The checkpoint of a run of one step."""
    cfg, _ = data_of(scene_folder, out_dir=str(tmp_path_factory.mktemp("run")), steps=1, picture=False)
    assert V.train(cfg) == 0
    return Path(cfg.out_dir) / "checkpoints/ckpt_final.pt"


@pytest.mark.faults
def test_an_error_in_a_worker_of_evaluate_is_one_line(scene_folder, checkpoint, tmp_path):
    """An annotation whose speed is a list of lists: exit 1, one short line. Seen red: a traceback in it, and no end."""
    pytest.importorskip("sklearn")
    folder = copy_scenes(scene_folder, tmp_path / "data")
    for path in (folder / "annotations").glob("*.json"):
        path.write_text('{"speed": [[1, 2], [3, 4]]}')
    process = start_evaluation(checkpoint, tmp_path)
    try:
        _, told = process.communicate(timeout=120)
    finally:
        end_all(process)
    last = told.strip().splitlines()[-1]
    assert (
        process.returncode == 1
        and last.startswith("error: data_root ")
        and "annotation scene_" in last
        and "speed" in last
        and len(last) < 300
        and "Traceback" not in told
    ), told


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_evaluate_ends_with_its_workers(checkpoint, tmp_path, number):
    """Ctrl-C to the group, and kill -9 of the main process alone: nobody is left.

    Seen red with torch's DataLoader (Ctrl-C), and with workers forked while handlers were in place: Python lost the
    Ctrl-C in a fork hook."""
    pytest.importorskip("sklearn")
    process = start_evaluation(checkpoint, tmp_path)
    try:
        wait_until(lambda: len(group_members(process.pid)) > 2, 60)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        wait_until(lambda: not group_members(process.pid), 10)
    finally:
        end_all(process)


def end_all(process):
    """Kill what is left of a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
