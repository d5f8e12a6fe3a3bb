"""The real command with faults planted from outside: `python faulty_run.py FLAGS`, under torchrun as well.

Environment: FAULTS, a JSON list of [kind, rank, step, attempt]; TRACE, a folder for one JSON line per rank and step:
loss, gradient norm and a checksum of all weights as exact text, and the sample numbers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V  # noqa: E402

torch.set_num_threads(1)
RANK, ATTEMPT = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def strike(kind, model, batches):
    """Do what a fault does to this process or its step."""
    if kind in ("SIGKILL", "SIGSEGV", "SIGTERM", "SIGUSR1", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "exception":
        raise ValueError("planted exception")
    elif kind == "exit":
        os._exit(3)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "inf":
        for batch in batches:
            batch["frames"] = torch.full_like(batch["frames"], torch.inf, dtype=torch.float32)
    elif kind == "drift":
        with torch.no_grad():
            model.predictor.out.bias[0] += 1e-6
    else:
        raise SystemExit(f"unknown fault {kind}")


def take_step(phase, batches, step):
    """The step of the script, with the faults of this rank, step and attempt before it and a trace line after it."""
    for kind, rank, at, attempt in json.loads(os.environ.get("FAULTS", "[]")):
        if (rank, at, attempt) == (RANK, step, ATTEMPT):
            strike(kind, phase.world, batches)
    metrics, carries, finite = PLAIN_STEP(phase, batches, step)
    if "TRACE" in os.environ:
        row = {
            "step": step,
            "rank": RANK,
            "loss": float(metrics["loss_total"]).hex(),
            "norm": float(metrics["grad_norm"]).hex(),
            "weights": V.digest(V.fingerprint(phase.world)),
            "samples": [number for batch in batches for number in batch["index"].tolist()],
            "files": [number for batch in batches for number in batch["file"].tolist()],
        }
        with open(Path(os.environ["TRACE"]) / f"rank_{RANK}.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
    return metrics, carries, finite


PLAIN_STEP, V.take_step = V.take_step, take_step
V.amp_cost = lambda world, device, dtype: 0.5  # --amp means bf16 in these tests, however slow this CPU is at it

if __name__ == "__main__":
    sys.exit(V.main())
