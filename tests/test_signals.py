"""Signals and restarts over the whole life of a run: heard from the first line to the last, saved where there is
something to save, exit 75."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, SHALLOW, V, small_config

FAULTY = ROOT / "tests" / "faulty_run.py"
RANK_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
)


def config(scene_folder, out_dir, **overrides):
    base = dict(
        data_root=str(scene_folder),
        out_dir=str(out_dir),
        steps=3,
        ckpt_every=2,
        val_every=0,
        val_clips=2,
        picture=False,
        dropout=0.1,
        **SHALLOW,
    )
    return small_config(**{**base, **overrides})


def config_file(cfg, folder):
    path = Path(folder) / f"config_{abs(hash(json.dumps(asdict(cfg)))) % 10**8}.json"
    path.write_text(json.dumps(asdict(cfg)))
    return str(path)


def environment(**more):
    return {
        **{name: value for name, value in os.environ.items() if name not in RANK_NAMES},
        "OMP_NUM_THREADS": "1",
        **more,
    }


def status(out_dir):
    return json.loads((Path(out_dir) / "status.json").read_text())


def steps_logged(out_dir):
    path = Path(out_dir) / "metrics.jsonl"
    return (
        [row["step"] for row in map(json.loads, path.read_text().splitlines()) if "lr" in row] if path.exists() else []
    )


def final(out_dir):
    return torch.load(Path(out_dir) / "checkpoints/ckpt_final.pt", map_location="cpu", weights_only=True)


def same(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- the flag


def test_a_signal_told_twice_is_one_request():
    """Launcher and group tell it within moments, by whatever name; only a clearly later one ends at once, and says what
    is lost. Seen red: exit 143."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 2)
        flag = V.StopFlag()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        if flag.reason != "SIGTERM":
            os._exit(1)
        flag.saved, flag.since = 40, flag.since - V.REPEAT_S - 1
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(2)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    assert os.read(reading, 1000) == b"SIGINT after SIGTERM: ended at once, nothing is saved since step 40\n"
    os.close(reading)


def test_nohup_is_obeyed():
    """Where SIGHUP was switched off before the start, it stays off; everything is given back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = V.StopFlag()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not flag.asked() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    flag.restore()
    signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread(scene_folder, tmp_path):
    """Python gives signals to the main thread alone: a run elsewhere hears none, and runs. Seen red with ValueError."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(V.train(config(scene_folder, tmp_path / "run", steps=1))))
    thread.start()
    thread.join()
    assert codes == [0]


def two_ranks(other):
    """This rank's Process, with another rank whose flags come from `other`."""
    process = V.Process(0, 2, torch.device("cpu"), None)
    told = []
    process.any = lambda *flags: (told.append(flags), [bool(flag) or bool(mine) for flag, mine in zip(flags, other)])[1]
    return process, told


def raise_stopped():
    raise V.Stopped


def test_ranks_stop_together():
    """A stop on either rank ends a piece of work on both, each rank having told the other exactly once."""
    process, told = two_ranks([False])
    assert process.together(max, 3, 4) == 4 and told == [(False,)]
    with pytest.raises(V.StoppedTogether):
        process.together(raise_stopped)
    assert told == [(False,), (True,)]
    process, told = two_ranks([True])
    with pytest.raises(V.StoppedTogether):
        process.together(max, 3, 4)
    assert told == [(False,)]
    process, told = two_ranks([True])
    with pytest.raises(V.StoppedTogether):
        process.together(process.stop_together)  # agreed inside: not told a second time, when the other has left
    assert told == [(False,)]


class Batches:
    """A loader of three batches."""

    def __init__(self):
        self.left, self.closed = 3, False

    def __len__(self):
        return 3

    def __next__(self):
        self.left -= 1
        return self.left

    def close(self):
        self.closed = True


def test_a_walk_over_batches_ends_together():
    """Whole without a stop, at once with one, the loader closed in both cases."""
    for other, expected in ([False], [2, 1, 0]), ([True], []):
        (process, _), loader, seen = two_ranks(other), Batches(), []
        try:
            for batch in process.in_step(loader):
                seen.append(batch)
        except V.StoppedTogether:
            assert other == [True]
        assert seen == expected and loader.closed


# -- a signal at every stage of a run

FLOW = dict(flow_fit_clips=8, flow_fit_steps=4, soon_fit_steps=2, soon_fit_batch=2)
# where the signal comes -> (settings, function in which it comes, at which call, words of the last line, saved by then)
STAGES = {
    "listing": ({}, "list_data", 1, "while it started", 0),
    "first checks": ({}, "check_ranks", 1, "while it started", 0),
    "data": ({}, "split_readable", 1, "while it started", 0),
    "first evaluation": (dict(val_every=1), "validate", 1, "at step 1, saved", 1),
    "save in the middle": ({}, "save_checkpoint", 1, "at step 2, saved", 2),
    "step": ({}, "take_step", 2, "at step 2, saved", 2),
    "batch": ({}, "next_batches", 2, "at step 1, saved", 1),
    "latents": (FLOW, "cache_latents", 1, "before the soon phase began", 3),
    "soon fit": (FLOW, "take_step", 4, "at step 4, saved", 3),
    "flow coordinates": (FLOW, "flow_coordinates", 1, "before the flow phase began", 3),
    "flow fit": (FLOW, "take_step", 7, "at step 7, saved", 3),
    "final save": ({}, "save_checkpoint", 2, "after its last step, saved", 3),
    "final evaluation": ({}, "validate", 1, "after its last step, saved", 3),
    "picture": (dict(picture=True), "encode_bank", 1, "after its last step, saved", 3),
}


FAST = ("listing", "batch", "final save", "final evaluation", "latents")


def strike(monkeypatch, name, at, number):
    """Send this process a signal in the at-th call of a function of the script."""
    real, count = getattr(V, name), [0]

    def struck(*args, **more):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)
        return real(*args, **more)

    monkeypatch.setattr(V, name, struck)


@pytest.fixture(scope="module")
def straight(scene_folder, tmp_path_factory):
    """Runs that nobody stopped, by their settings."""
    made = {}

    def run(settings):
        key = json.dumps(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight")
            assert V.train(config(scene_folder, made[key], **settings)) == 0
        return made[key]

    return run


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage in FAST else pytest.mark.slow) for stage in STAGES]
)
def test_a_signal_at_every_stage(scene_folder, tmp_path, straight, monkeypatch, capsys, stage):
    """Exit 75, status stopped with the reason, saved what there is; the same command ends the run with the same bits as
    if nothing had been.

    Seen red: listing, final save and final evaluation, in which the signal itself ended the process.
    """
    settings, name, at, words, saved = STAGES[stage]
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)[len(stage) % 4]
    cfg = config(scene_folder, tmp_path / "run", **settings)
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, name, at, number)
        assert V.main(["--config", config_file(cfg, tmp_path)]) == 75
    told = status(cfg.out_dir)
    assert (told["state"], told["exit_code"], told["reason"]) == ("stopped", 75, number.name)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert (
        last.startswith(f"stopped by {number.name} {words}")
        and (tmp_path / "run/train.log").read_text().splitlines()[-1] == last
    )
    steps = [V.load_checkpoint(path)["step"] for _, path in V.checkpoint_files(cfg.out_dir)]
    assert max(steps, default=0) == saved
    assert V.train(cfg) == 0
    ours, theirs = final(cfg.out_dir), final(straight(settings))
    for part in (
        "online",
        "predictor",
        "outcome",
        "flow",
        "flow_ema",
        "target",
        "opt",
        "flow_stats",
        "outcome_queue",
        "soon_predictor",
        "rng",
        "consumed",
    ):
        assert same(ours[part], theirs[part]), part
    assert steps_logged(cfg.out_dir) == steps_logged(straight(settings)) and status(cfg.out_dir)["state"] == "finished"


def test_a_signal_while_a_resumed_run_starts(scene_folder, tmp_path, monkeypatch):
    """status.json says stopped, so that a scheduler queues the job again. Seen red with -15 and `running`."""
    cfg = config(scene_folder, tmp_path / "run", steps=4)
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, "take_step", 2, signal.SIGTERM)
        assert V.train(cfg) == 75
    for name in ("load_checkpoint", "restore_run"):
        with pytest.MonkeyPatch.context() as patch:
            strike(patch, name, 1, signal.SIGTERM)
            assert V.train(cfg) == 75
        assert (status(cfg.out_dir)["state"], status(cfg.out_dir)["reason"]) == ("stopped", "SIGTERM")
        assert [step for step, _ in V.checkpoint_files(cfg.out_dir)] == [2]
    assert V.train(cfg) == 0 and steps_logged(cfg.out_dir) == [1, 2, 3, 4]


# -- restarts by torchrun


def restarted(monkeypatch, attempt, launch="abc"):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)


def die_at(monkeypatch, step):
    """Make the run die in a step, as of a signal that nobody can catch."""
    real = V.take_step

    def take_step(phase, batches, at):
        if at == step:
            raise ZeroDivisionError
        return real(phase, batches, at)

    monkeypatch.setattr(V, "take_step", take_step)


@pytest.fixture(scope="module")
def one_step(scene_folder, tmp_path_factory):
    """A finished run of one step -> run folder, to be copied."""
    out_dir = tmp_path_factory.mktemp("one_step")
    assert V.train(config(scene_folder, out_dir, steps=1)) == 0
    return out_dir


@pytest.mark.parametrize("dies_at, goes_on_at", [(5, 4), pytest.param(1, 0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resume", ["never", "file"])
def test_a_restart_goes_on_from_its_own_newest_checkpoint(
    scene_folder, one_step, tmp_path, monkeypatch, capsys, resume, dies_at, goes_on_at
):
    """Not from --resume again, which would throw back what was done since; nor from the old run's checkpoints before
    its own first.

    Seen red: both began anew, from nothing and from FILE.
    """
    shutil.copytree(one_step, tmp_path / "run")  # an old run in the same folder, and a checkpoint elsewhere
    start = shutil.copy(one_step / "checkpoints/ckpt_final.pt", tmp_path / "start.pt")
    cfg = config(scene_folder, tmp_path / "run", steps=6, resume="never" if resume == "never" else str(start))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        restarted(patch, 0)
        die_at(patch, dies_at)
        V.train(cfg)
    capsys.readouterr()
    restarted(monkeypatch, 1)
    assert V.train(cfg) == 0
    out, expected = capsys.readouterr().out, goes_on_at or (1 if resume == "file" else 0)
    assert (f"at step {expected}" in out) == bool(expected) and ("resumed from" in out) == bool(expected)
    if not goes_on_at and resume == "file":
        assert f"resumed from {start}" in out
    assert steps_logged(cfg.out_dir)[-1] == 6


def test_an_attempt_that_died_before_it_cleared_the_folder(scene_folder, tmp_path, monkeypatch, capsys):
    """--resume never, dead in its first moment: the restart finds the old run's checkpoints, and must not go on from
    them."""
    assert V.train(config(scene_folder, tmp_path / "run", steps=2)) == 0
    restarted(monkeypatch, 1)
    capsys.readouterr()
    assert V.train(config(scene_folder, tmp_path / "run", steps=2, resume="never", seed=3)) == 0
    assert (
        "resumed from" not in capsys.readouterr().out
        and (tmp_path / "run/previous_1/checkpoints/ckpt_final.pt").is_file()
    )


# -- ranks that are started by hand


@pytest.mark.parametrize(
    "names, words",
    [
        (dict(RANK="x", WORLD_SIZE="2"), "RANK = 'x' must be a whole number from 0 to 1"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK = '2' must be"),
        (dict(RANK="-1", WORLD_SIZE="2"), "RANK = '-1'"),
        (dict(RANK="", WORLD_SIZE="2"), "RANK = ''"),
        (dict(WORLD_SIZE="2"), "RANK = ''"),
        (dict(RANK="1"), "RANK = '1' must be a whole number from 0 to 0"),
        (dict(RANK="0", WORLD_SIZE="0"), "WORLD_SIZE = '0'"),
        (dict(RANK="0", WORLD_SIZE="two\nerror: x"), "WORLD_SIZE = 'two\\nerror: x'"),
        (dict(RANK="0", WORLD_SIZE="1" * 30), "WORLD_SIZE = '111"),
        (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="a"), "LOCAL_RANK = 'a'"),
        (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR, where rank 0 is met, is not set"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"), "MASTER_PORT = ''"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="http"), "MASTER_PORT = 'http'"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="70000"), "MASTER_PORT = '70000'"),
        (dict(TORCHELASTIC_RESTART_COUNT="often"), "TORCHELASTIC_RESTART_COUNT = 'often'"),
    ],
    ids=str,
)
def test_wrong_rank_environment(scene_folder, tmp_path, monkeypatch, capsys, names, words):
    """One line that names the variable, exit 2. Seen red: ValueError and KeyError."""
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert V.main(["--config", config_file(config(scene_folder, tmp_path / "run"), tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    "rank, words",
    [("0", "rank 1 of 2 did not come within dist_timeout_s = 1 s"), ("1", "rank 0 does not answer at 127.0.0.1")],
)
def test_an_absent_peer(scene_folder, tmp_path, monkeypatch, capsys, rank, words):
    """Named in one line, exit 1, when dist_timeout_s is over; what is waited for is said before. Seen red: a traceback
    of DistStoreError."""
    monkeypatch.setattr(V, "SILENCE_S", 0.3)
    for name, value in dict(
        RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    ).items():
        monkeypatch.setenv(name, value)
    assert V.main(["--config", config_file(config(scene_folder, tmp_path / "run", dist_timeout_s=1.0), tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("at work: waiting for ")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_while_waiting_for_peers(scene_folder, tmp_path, monkeypatch, rank):
    """Exit 75 at once, not after dist_timeout_s; rank 0 tells it in status.json."""
    for name, value in dict(
        RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    ).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert V.main(["--config", config_file(config(scene_folder, tmp_path / "run"), tmp_path)]) == 75
    timer.join()
    assert time.monotonic() - began < 10 and (rank == "1" or status(tmp_path / "run")["state"] == "stopped")


# -- real processes


def launch(command, env):
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end_group(process):
    """Kill what is left of a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


def ranks(cfg, folder, *options):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--monitor-interval=0.1",
        *options,
        str(FAULTY),
        "--config",
        config_file(cfg, folder),
    ]


def wait_for(condition, seconds, process):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, (
            process.communicate()[0] if process.poll() is not None else "not in time"
        )
        time.sleep(0.02)


@pytest.mark.faults
def test_a_signal_to_launcher_and_ranks_together(scene_folder, tmp_path):
    """As systemd sends it: everyone gets it, and the launcher tells its ranks once more. Saved, 75, stopped. Seen red:
    nothing saved, 3 of 3."""
    cfg = config(scene_folder, tmp_path / "run", steps=4000, ckpt_every=4000)
    process = launch(ranks(cfg, tmp_path), environment())
    try:
        wait_for(lambda: len(steps_logged(cfg.out_dir)) > 2, 90, process)
        for _ in range(3):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.05)
        output, _ = process.communicate(timeout=90)
        told = status(cfg.out_dir)
        assert (told["state"], told["exit_code"], told["reason"]) == ("stopped", 75, "SIGTERM"), output
        assert V.checkpoint_files(cfg.out_dir)[-1][0] == told["step"] > 2
    finally:
        end_group(process)


@pytest.mark.faults
def test_a_signal_to_one_rank(scene_folder, tmp_path):
    """Rank 1 alone is told, while both evaluate or make latents: they leave together, and the next start goes on to the
    end."""
    cfg = config(
        scene_folder,
        tmp_path / "run",
        steps=4,
        val_every=2,
        val_clips=400,
        flow_fit_clips=400,
        flow_fit_steps=20,
        dist_timeout_s=60.0,
    )
    for steps, words in ((2, "at step 2, saved"), (4, "before the flow phase began")):
        process = launch(ranks(cfg if steps == 2 else V.replace(cfg, val_every=0), tmp_path), environment())
        try:
            wait_for(lambda steps=steps: steps_logged(cfg.out_dir)[-1:] == [steps], 60, process)
            time.sleep(0.5)
            (pid,) = [
                int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if is_rank(path, process.pid, 1)
            ]
            os.kill(pid, signal.SIGUSR1)
            output, _ = process.communicate(timeout=120)
            assert (
                status(cfg.out_dir)["state"] == "stopped"
                and f"stopped by a signal on another rank {words}" in output
                and f'{SCRIPT.name}", line' not in output
            ), output
        finally:
            end_group(process)
    process = launch(ranks(V.replace(cfg, val_every=0, val_clips=2), tmp_path), environment())
    output, _ = process.communicate(timeout=180)
    assert (
        process.returncode == 0
        and status(cfg.out_dir)["state"] == "finished"
        and steps_logged(cfg.out_dir) == list(range(1, 25))
    ), output


def is_rank(path, group, rank):
    """Whether an environ file belongs to a rank (no loader worker of it) of a process group."""
    try:
        words, pid = path.read_bytes().split(b"\0"), int(path.parent.name)
        fields = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()
        return f"RANK={rank}".encode() in words and os.getpgid(pid) is not None and int(fields[1]) == group
    except (OSError, IndexError):
        return False  # ended while we looked, or not ours to read


@pytest.mark.faults
def test_signals_at_random_moments(scene_folder, tmp_path):
    """The real command, told at any moment after its first line, and again at once: 75 and stopped, or already done."""
    rng = random.Random(6)
    cfg = config(scene_folder, tmp_path / "run", steps=16, ckpt_every=100, val_every=4)
    command = [sys.executable, str(SCRIPT), "--config", config_file(cfg, tmp_path)]
    for latest in (0.0, 1.0, 3.0):
        process = launch(command, environment())
        try:
            wait_for(
                lambda pid=process.pid: (tmp_path / "run/status.json").exists() and status(cfg.out_dir)["pid"] == pid,
                60,
                process,
            )
            time.sleep(rng.uniform(0.0, latest))
            for _ in range(2):
                process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)))
            output, _ = process.communicate(timeout=60)
            assert (process.returncode, status(cfg.out_dir)["state"]) in ((75, "stopped"), (0, "finished")), output
        finally:
            end_group(process)
    assert V.train(cfg) == 0 and steps_logged(cfg.out_dir) == list(range(1, 17))


@pytest.mark.faults
def test_torchrun_restarts_a_run_that_began_with_never(scene_folder, tmp_path):
    """A crash in step 8: the restart goes on from step 6 of this launch, beside the old run's files under previous_1.
    Seen red: back to step 1."""
    assert V.train(config(scene_folder, tmp_path / "run", steps=1)) == 0
    cfg = config(scene_folder, tmp_path / "run", steps=10, ckpt_every=3, resume="never")
    process = launch(ranks(cfg, tmp_path, "--max-restarts=1"), environment(FAULTS=json.dumps([["exception", 1, 7, 0]])))
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        end_group(process)
    assert process.returncode == 0 and "at step 6" in output, output
    assert steps_logged(cfg.out_dir) == list(range(1, 11)) and len(list((tmp_path / "run").glob("previous_*"))) == 1


@pytest.mark.faults
@pytest.mark.parametrize("dead", [0])
def test_a_peer_that_dies_while_it_starts(scene_folder, tmp_path, dead):
    """Two ranks started by hand, one killed as soon as both have met: the other ends in one line with exit 1."""
    cfg, port = config(scene_folder, tmp_path / "run", steps=4000, dist_timeout_s=20.0), free_port()
    both = []
    try:
        for rank in range(2):
            env = environment(
                RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            both.append(launch([sys.executable, str(SCRIPT), "--config", config_file(cfg, tmp_path)], env))
        wait_for(lambda: (tmp_path / "run/train.log").exists(), 60, both[0])
        both[dead].kill()
        output, _ = both[1 - dead].communicate(timeout=60)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (
            both[1 - dead].returncode == 1
            and len(lines) == 1
            and f"rank {dead}" in lines[0]
            and "Traceback" not in output
        ), output
    finally:
        for process in both:
            end_group(process)
