"""Shared pieces of the tests: the script on the import path, a tiny config, small videos made on the fly."""

import gc
import importlib.util
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

# The tests run side by side, one process per core: a second thread is not needed, and one that waits for it must not
# spin. Both are read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that starts a command in the background hands it SIGINT ignored, nohup SIGHUP, which a run then goes on
# ignoring: tests of them would wait in vain.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "VJepa_AUTO_V2.py"
sys.path.insert(0, str(ROOT))

# Real footage and awkward files kept beside a developer's checkout; tests that want them skip where they are absent.
FOOTAGE = Path(os.environ.get("VJEPA_TEST_DATA", ROOT.parent / "shared" / "data"))


def __getattr__(name):
    """`from conftest import V` imports the script, and torch with it: the process that deals out tests is spared it."""
    if name == "V":
        return importlib.import_module("VJepa_AUTO_V2")
    raise AttributeError(name)


def needs(*packages):
    """Skip a test file whose packages are not installed. Importing them here would cost each process a second."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


# 4 x 4 sites, NOW 2 + SOON 2 + EVENTUALLY 2 tubelets: a few thousand parameters
SMALL = dict(
    image_size=32,
    patch=8,
    num_frames=12,
    now_frames=4,
    soon_frames=4,
    eventually_frames=4,
    enc_dim=48,
    enc_depth=2,
    pred_dim=24,
    pred_depth=2,
    num_heads=4,
    outcome_queries=2,
    outcome_queue=16,
    flow_dim=32,
    flow_depth=2,
    flow_heads=4,
    flow_rank=8,
    flow_chunks=2,
    flow_draws=3,
    batch_size=2,
    num_workers=0,
    steps=20,
    warmup_steps=2,
    scene_clips=8,
    device="cpu",
    val_clips=4,
    log_every=1,
)

SHALLOW = dict(enc_depth=1, pred_depth=1, flow_depth=1)  # for whole runs whose claim is about the loop around the model


def small_config(**overrides):
    """A config of a few thousand parameters: 4 x 4 sites, NOW 2 + SOON 2 + EVENTUALLY 2 tubelets."""
    import VJepa_AUTO_V2 as V

    return replace(V.VJepaAutoV2Config(), **{**SMALL, **overrides})


def plain_config(**overrides):
    """As small_config, with the plain form of all that makes a step cheaper: every hidden token predicted and so on."""
    import VJepa_AUTO_V2 as V

    return small_config(**{**V.VJepaAutoV2Config.BEFORE, **overrides})


def random_batch(cfg, num_clips, seed=0, first=0):
    """A batch of random frames with the masks and flow noise of samples first, first + 1, ... -> dict of tensors."""
    import numpy as np
    import torch

    import VJepa_AUTO_V2 as V

    rng = np.random.default_rng(seed)
    samples = []
    for index in range(first, first + num_clips):
        sample = V.mask_and_noise(cfg, "train", index)
        frames = rng.integers(0, 256, (cfg.num_frames, 3, cfg.height, cfg.width), dtype=np.uint8)
        if cfg.action_names:
            told = rng.standard_normal((cfg.num_frames // cfg.tubelet_t, len(cfg.action_names)), dtype=np.float32)
            sample["actions"] = torch.from_numpy(told)
        sample.update(
            frames=torch.from_numpy(frames),
            file=torch.tensor(index),
            maneuver=torch.tensor(-1),
            index=torch.tensor(index),
            bad=[],
        )
        samples.append(sample)
    batch = V.collate(samples)
    batch.pop("bad")
    return batch


def group_members(group):
    """Process ids of a process group that are not zombies."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(path.parent.name))
    return members


def pytest_collection_finish():
    """What the imports made stays for ever: the garbage collector need not walk over it again, nor forks copy it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run that died in a test must not keep the handlers of the next one."""
    held = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def quick_pictures():
    """PNG files of the tests may be large: to make one as small as can be takes longer than all that leads to it."""
    from PIL import Image

    real, patch = Image.Image.save, pytest.MonkeyPatch()

    def save(image, file, format=None, **params):
        quick = {"optimize": False, "compress_level": 1} if "optimize" in params else {}
        real(image, file, format, **{**params, **quick})

    patch.setattr(Image.Image, "save", save)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def one_measure_of_speed():
    """The speed of a matrix product is the machine's: measured once, not in each of some hundred runs."""
    import VJepa_AUTO_V2 as V

    real, known, patch = V.measure_speed, {}, pytest.MonkeyPatch()

    def measured(process):
        key = process.device, process.amp_dtype
        if key not in known:
            known[key] = real(process)
        return known[key]

    patch.setattr(V, "measure_speed", measured)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """What fsync adds is seen only when the power fails: in this process it wants an open file and takes no time.
    tests/test_faults.py checks that it is called, and when; processes of their own call the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: os.fstat(number) and None)
        yield


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """Eight built-in scenes as mp4 with annotations -> folder."""
    import VJepa_AUTO_V2 as V

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    V.write_scenes(folder, small_config())
    return folder
