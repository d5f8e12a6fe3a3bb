"""A signal while the program still imports its libraries, which takes seconds: nobody listens yet."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import SCRIPT

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_during_the_imports(tmp_path, number):
    """It is obeyed as soon as somebody listens: 75 and `stopped`, so that a scheduler queues the job again. Seen red
    with -15 and a KeyboardInterrupt's traceback, no status.json."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--preset", "tiny", "--device", "cpu"]
    command += ["--scene_clips", "4", "--out_dir", str(tmp_path / "run")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in run.stderr if "numpy" in line)  # -X importtime tells each module once it is loaded
    run.send_signal(number)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 75, out
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("stopped", signal.Signals(number).name)
    assert out.splitlines()[-1].startswith(f"stopped by {status['reason']} while it started")
