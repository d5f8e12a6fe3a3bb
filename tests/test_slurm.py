"""The SLURM script of docs/many_gpus.md, word for word but for paths and sizes, against stand-ins for SLURM's commands.

`srun` starts what it is given in a session of its own, `scancel` signals that session as SLURM does the processes of a
step, `scontrol` names one host and notes what is queued again. The test sends the signal before the time limit.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPT, SMALL

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do echo "srun $1" >> calls; shift; done\n'
    'echo "$@" > step; setsid "$@" & echo $! > step.pid; wait $!',
    "scancel": 'echo "scancel $*" >> calls; kill "-${1#--signal=}" -- "-$(cat step.pid)"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "scontrol $*" >> calls; fi',
}
# what stands for a run that ends as it is told to: by itself, or when it gets SIGTERM
RUN = """trap 'sleep 0.5; echo "{{\\"state\\": \\"{ends}\\", \\"step\\": 3}}" > run/status.json; exit 1' TERM
mkdir -p run; echo '{{"state": "running"}}' > run/status.json; for i in $(seq 100); do sleep 0.1; done"""


def recipe(**changes):
    """The script of the page with other words in it -> text."""
    text = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs" / "many_gpus.md").read_text(), re.DOTALL)[1]
    changes = {"/shared/runs/big": "run", **changes}
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def submit(folder, text, commands):
    """Start a script as SLURM's batch shell would -> its process."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name, body in commands.items():
        (place / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / name).chmod(0o755)
    (folder / "job.sh").write_text(text)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "64"}
    known = {**os.environ, **job, "PATH": f"{place}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["bash", "job.sh"], cwd=folder, env=known, start_new_session=True)


def calls(folder):
    """What the stand-ins were asked for -> lines."""
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def wait_for(what, seconds=120.0):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def end(process, folder):
    """Kill what is left of a job and of its step."""
    for group in (process.pid, *map(int, (folder / "step.pid").read_text().split())):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("ends, again", [("stopped", 1), ("running", 1), ("finished", 0), ("failed", 0)])
def test_only_what_is_not_done_is_queued_again(tmp_path, ends, again):
    """The signal before the time limit comes to the run as SIGTERM; then status.json decides. A run that was killed as
    it saved still says running. Seen red without the wait in the trap, which then reads the state too early."""
    job = submit(tmp_path, recipe(), {**STAND_INS, "torchrun": RUN.format(ends=ends)})
    try:
        wait_for((tmp_path / "run" / "status.json").exists)
        os.kill(job.pid, signal.SIGUSR1)
        job.wait(30)
    finally:
        end(job, tmp_path)
    assert calls(tmp_path) == [
        "srun --cpus-per-task=64", "scancel --signal=TERM 41.0", *["scontrol requeue 41"] * again
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    """Its exit code is the job's, so that a failure shows in SLURM's accounts."""
    job = submit(tmp_path, recipe(), {**STAND_INS, "torchrun": f"exit {code}"})
    assert job.wait(30) == code and calls(tmp_path) == ["srun --cpus-per-task=64"]
    assert "--rdzv_endpoint=127.0.0.1:29500 VJepa_AUTO_V2.py --data_root DIR" in (tmp_path / "step").read_text()


@pytest.mark.slow
def test_a_real_run_goes_on_after_its_job_is_queued_again(scene_folder, tmp_path):
    """Under torchrun: saved before the time limit, queued again, resumed from there by the same script, finished."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    few = {**SMALL, "steps": 4000, "picture": False, "data_root": str(scene_folder), "val_every": 0}
    flags = f"--config {tmp_path}/small.json --device cpu"
    words = {"--nproc_per_node=8": "--nproc_per_node=1", "29500": str(port), " VJepa_AUTO_V2.py": f" {SCRIPT}"}
    words |= {"--data_root DIR --steps 100000 --device cuda --amp --compile": flags}
    commands = {**STAND_INS, "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
    (tmp_path / "small.json").write_text(json.dumps(few))
    job = submit(tmp_path, recipe(**words), commands)
    try:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        os.kill(job.pid, signal.SIGUSR1)
        job.wait(60)
        stopped = json.loads((tmp_path / "run" / "status.json").read_text())
        assert stopped["state"] == "stopped" and calls(tmp_path)[-1] == "scontrol requeue 41"
        (tmp_path / "small.json").write_text(json.dumps({**few, "steps": stopped["step"] + 2}))
        job = submit(tmp_path, recipe(**words), commands)
        assert job.wait(120) == 0
    finally:
        end(job, tmp_path)
    ended = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (ended["state"], ended["step"]) == ("finished", stopped["step"] + 2)
    assert f"at step {stopped['step']}" in (tmp_path / "run" / "train.log").read_text()
    assert sum("requeue" in call for call in calls(tmp_path)) == 1
