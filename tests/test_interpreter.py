"""What only a fresh interpreter shows: what the import does, what a CPU without bf16 is found to be, how an end beside
open loader workers goes. One interpreter shows all three: its start takes longer than the three together."""

import json
import os
import platform
import subprocess
import sys

from conftest import ROOT

CODE = f"""
import json, os, signal, sys, time
import numpy as np, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
state = lambda: (torch.get_rng_state().tolist(),
                 [v.tolist() if hasattr(v, 'tolist') else v for v in np.random.get_state()],
                 dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision(),
                 [signal.getsignal(s) for s in signals],
                 torch.cuda.is_initialized(), torch.distributed.is_initialized())
before = state()
import VJepa_AUTO_V2 as V
untouched = state() == before
print("imported", flush=True), print("imported", file=sys.stderr, flush=True)

began = time.process_time()
dtype, reason = V.choose_precision(V.VJepaAutoV2, V.preset_config("tiny"), V.Process(0, 1, torch.device("cpu"), None))
answer = dict(untouched=untouched, dtype=str(dtype), reason=reason, seconds=time.process_time() - began)
print(json.dumps(answer), flush=True)

from conftest import small_config
cfg = small_config(data_root=sys.argv[1])
dataset = V.ClipDataset(cfg, V.find_videos(cfg.data_root, "*"), cfg.data_root, "train")
loader = V.ClipLoader(dataset, V.StepSampler(0, 50, 2, 0, 1), 2, False)
next(loader)
raise ValueError("left open")
"""


def test_a_fresh_interpreter(scene_folder):
    """A process that runs CODE, its oneDNN told to use no instruction newer than AVX2.

    The import prints nothing and leaves RNG state, environment, threads and signal handlers. Seen red with a seeding
    line and a print.
    A CPU without bf16 instructions stays in fp32: the real trial, known within a second, and said. Seen red with
    amp_dtype's answer taken: a step of `tiny` took 18 times as long.
    It ends beside an open loader: workers ignore SIGTERM, with which Python ends children at exit. Seen red (it hangs)
    without the finalizer.
    """
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(scene_folder)], capture_output=True, text=True, env=env, timeout=100
    )
    out, err = ended.stdout.splitlines(), ended.stderr.splitlines()
    assert out[0] == err[0] == "imported" and json.loads(out[1])["untouched"]
    assert len(out) == 2 and err[1].startswith("Traceback ")  # nor at its end
    told, expected = json.loads(out[1]), "this CPU has no bf16 instructions, bf16 would take "
    if platform.machine() in ("x86_64", "AMD64"):  # the switch that takes bf16 away is x86's
        assert told["dtype"] == "None" and told["reason"].startswith(expected)
        assert told["seconds"] < 1.0
    assert ended.returncode == 1 and err[-1] == "ValueError: left open"
