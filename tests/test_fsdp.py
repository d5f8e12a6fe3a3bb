"""--shard fsdp: losses, weights and resumed runs are those of DDP, at any number of ranks and in every world; sharded
checkpoints are proven before they are read, and what a run did not write is left alone."""

import contextlib
import functools
import importlib
import io
import json
import os
import resource
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, SHALLOW, SMALL, V, small_config

FILES = {"toy": "tests/toy_world.py", "cosmos": "worlds/cosmos.py", "future": "worlds/future_latents.py"}
CLASSES = {"toy": "Toy", "cosmos": "Cosmos", "future": "FutureLatents"}
COMMON = dict(
    device="cpu", scenes="render", scene_clips=8, num_workers=0, batch_size=2, steps=3, log_every=1, val_clips=2
)
COMMON |= dict(val_every=2, ckpt_every=1, min_lr=1e-4, keep_last=9)
PHASES = dict(flow_fit_clips=16, flow_fit_steps=2, flow_fit_batch=4, soon_fit_steps=2, soon_fit_batch=4)
FEW = {**PHASES, "flow_fit_steps": 1, "soon_fit_steps": 1}
FUTURE = dict(backbone="tiny", image_size=32, num_frames=8, now_frames=4, soon_frames=4, hidden_dim=48, depth=2)
FUTURE |= dict(num_heads=2, lr=1e-3, flow_steps=2, dump_clips=0, val_samples=2)
COSMOS = dict(image_size=128, num_frames=4, now_frames=2, soon_frames=2, base_channels=8, latent_dim=16, hidden_dim=24)
COSMOS |= dict(num_heads=2, num_layers=2, dynamics="transformer", dropout=0.0)
# 16 channels leave one bias a gradient near zero, which Adam's first steps turn into 3e-6 by rounding alone
VJEPA = {**SMALL, **SHALLOW, "enc_depth": 2, "flow_squeeze": 8, "picture": False}
SIZES = {"vjepa": VJEPA, "toy": {}, "cosmos": COSMOS, "future": FUTURE}


@functools.cache
def world_of(name):
    """The world of a name, imported once, with the help of its flags read: a second of work each time."""
    world = V.import_world(ROOT / FILES[name], CLASSES[name]) if name in FILES else V.VJepaAutoV2
    V.build_parser(world)
    return world


def faulty_step(real, fault, phase, carries, step):
    """The update of a step, then a fault where it is due: SIGTERM, death, or a disk that is full until the next one."""
    real(phase, carries, step)
    at, kind = fault
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if phase.run.progress.total + 1 == at:
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        else:
            os._exit(9)


def run_job(name, flags, fault=None):
    """One run in this process, with the environment of its rank -> [exit code, all that it printed]. fault: the step
    and kind of what befalls it."""
    named = {**SIZES[name], **COMMON, **flags}
    flags = {True: "--{}", False: "--no-{}"}
    argv = [(flags[value] if isinstance(value, bool) else "--{}={}").format(key, value) for key, value in named.items()]
    real, output = V.apply_step, io.StringIO()
    V.apply_step = functools.partial(faulty_step, real, fault) if fault else real
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = V.main(argv, world=world_of(name))
    finally:
        V.apply_step = real
    return [code, output.getvalue()]


def run_rank(rank, world_size, ports, jobs, folder):
    """All jobs of a rank, one after the other."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    results = []
    for port, (name, flags, *fault) in zip(ports, jobs):
        os.environ["MASTER_PORT"] = str(port)
        results.append(run_job(name, flags, fault[0][1:] if fault and fault[0][0] == rank else None))
        Path(folder, f"rank_{rank}.json").write_text(json.dumps(results))


def run_ranks(world_size, folder, *jobs):
    """Jobs (world, flags, if any (rank, step, kind) of a fault) on so many ranks -> [exit code, output] of rank 0."""
    with contextlib.ExitStack() as opened:
        free = [opened.enter_context(socket.socket()) for _ in jobs]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    folder.mkdir(exist_ok=True)
    for name, *_ in jobs:  # what every rank would do by itself
        world_of(name)
    for name in ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"):
        importlib.import_module(name)
    start = mp.get_context("fork").Process  # spawned, each would import torch anew, which takes longer than its runs
    ranks = [start(target=run_rank, args=(rank, world_size, ports, jobs, str(folder))) for rank in range(world_size)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(300)
        each.kill()
    return json.loads((folder / "rank_0.json").read_text())


def records(out_dir):
    """Figures of a run that must be equal in two -> {(step, phase, is evaluation): {name: value}}."""
    rows = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], row.get("phase", ""), "val_clips" in row): {
            key: value
            for key, value in row.items()
            if isinstance(value, float) and key not in ("clips_per_s", "data_wait", "mem_gb", "time")
        }
        for row in rows
    }


def checkpoint(out_dir, name="ckpt_final.pt"):
    return Path(out_dir, "checkpoints", name)


def assert_same_run(one, other, world="vjepa", after=0):
    """Two run folders have the same figures from a step on, and the same weights and moments."""
    of_one, of_other = ({key: row for key, row in records(each).items() if key[0] > after} for each in (one, other))
    assert of_one.keys() == of_other.keys() and len(of_one) > 0
    for key, row in of_one.items():
        # fp32 sums in another order: 4.9e-7 was seen in a run
        assert row == pytest.approx(of_other[key], rel=2e-5, abs=1e-6, nan_ok=True), key
    assert_same_state(*(V.load_checkpoint(checkpoint(each), world_of(world)) for each in (one, other)))


def assert_same_state(one, other, place=""):
    """Checkpoints have the same entries, and tensors to float tolerance."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one.keys() - {"cfg", "seconds", "rng", "scaler", "source"}:
            assert_same_state(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype, place
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6, msg=f"{place} differs")


# -- fast


def test_units_are_the_blocks_of_every_world():
    """Blocks are gathered one by one; what two modules share, or what has no weights, is not."""
    units = V.shard_units(V.VJepaAutoV2(small_config()))
    assert {type(unit).__name__ for unit in units} == {"Block", "FlowBlock"} and len(units) == 10
    assert len({id(p) for unit in units for p in unit.parameters()}) == sum(len(list(u.parameters())) for u in units)
    tied = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    tied[1].weight = tied[0].weight
    assert V.shard_units(torch.nn.ModuleDict({"a": tied, "b": torch.nn.ModuleList([torch.nn.Identity()])})) == [tied[2]]
    nested = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2)])])
    assert V.shard_units(nested) == [nested[0][0]]


def test_out_of_memory_names_shards_where_they_help():
    """With several processes that do not shard yet."""
    cures = [V.memory_cures(small_config(shard=kind), ranks) for kind, ranks in (("none", 2), ("none", 1), ("fsdp", 2))]
    assert ["--shard fsdp" in text for text in cures] == [True, False, False]


def test_one_rank_runs_as_without(tmp_path):
    """One process: the same bits as without, and a line that says why nothing is sharded."""
    flags = dict(steps=2, val_every=0, ckpt_every=9)
    runs = [run_job("toy", {**flags, "shard": kind, "out_dir": tmp_path / kind}) for kind in ("none", "fsdp")]
    assert [code for code, _ in runs] == [0, 0]
    said = "note: shard = fsdp: one process holds everything, so nothing is sharded"
    assert said in runs[1][1] and said not in runs[0][1]
    assert records(tmp_path / "none") == records(tmp_path / "fsdp")


def test_fp16_is_refused(tmp_path):
    """Its scaler is not known to work on parts."""
    flags = dict(steps=1, shard="fsdp", amp=True, amp_type="fp16", out_dir=tmp_path)
    code, output = run_job("toy", flags)
    assert code == 2 and "shard = 'fsdp': does not go with fp16: use --amp_type bf16, or no --amp (--shard)" in output


# -- real ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of VJepaAutoV2 with its phases, of 3 + 2 + 2 steps -> (their folder, {name: [exit code, output]}): one
    process, then two ranks, DDP and sharded; `cut` is stopped in training and in a phase, then goes on to its end."""
    base = tmp_path_factory.mktemp("runs")
    one = run_job("vjepa", dict(shard="none", out_dir=base / "one"))
    fsdp, more = dict(shard="fsdp"), dict(grad_accum=2, **PHASES)
    jobs = {
        "ddp": (dict(shard="none", **more),),
        "fsdp": ({**fsdp, **more, "best_by": "val_loss_total"},),
        "cut": ({**fsdp, **more, "ckpt_every": 9, "out_dir": base / "cut end"}, (1, 2, "stop")),
        "cut again": ({**fsdp, **more, "keep_last": 1, "out_dir": base / "cut end"}, (0, 4, "stop")),
        "cut end": ({**fsdp, **more},),
        "from ddp": ({**fsdp, **more, "resume": checkpoint(base / "ddp", "ckpt_2.pt")},),
        "from fsdp": ({**more, "resume": checkpoint(base / "fsdp", "ckpt_2.pt")},),
        "one ddp": (dict(resume=checkpoint(base / "one", "ckpt_2.pt")),),
        "one fsdp": ({**fsdp, "resume": checkpoint(base / "one", "ckpt_2.pt")},),
    }
    jobs = {name: ({"out_dir": base / name, **flags}, *fault) for name, (flags, *fault) in jobs.items()}
    for name in ("cut end", "from ddp", "from fsdp", "one ddp", "one fsdp"):  # no more of these is looked at
        jobs[name][0]["ckpt_every"] = 9
    outputs = run_ranks(2, base / "jobs", *(("vjepa", *job) for job in jobs.values()))
    return base, {"one": one, **dict(zip(jobs, outputs))}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "cut end", "from ddp", "from fsdp"])
def test_runs_are_those_of_ddp(runs, name):
    """Losses, norms, figures, weights, EMA and moments of a sharded run, with micro-steps, clipping, evaluations and
    the phases after training; in one go, cut off twice, and across from one kind to the other. Seen red with gradients
    of the first micro-step averaged alone, with the norm of this rank's parts, and with moments that were not resumed.
    """
    base, outputs = runs
    assert [outputs[each][0] for each in ("ddp", name)] == [0, 0], outputs[name][1][-2000:]
    assert_same_run(base / "ddp", base / name, after=2 if "from" in name else 0)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded(runs):
    base, outputs = runs
    assert [outputs[name][0] for name in ("one", "one ddp", "one fsdp")] == [0, 0, 0]
    assert_same_run(base / "one ddp", base / "one fsdp", after=2)


@pytest.mark.slow
def test_what_a_sharded_run_says_and_leaves(runs):
    """A line about what is cut; shards beside the checkpoints on the way alone; what load_model gives; keep_last."""
    base, outputs = runs
    assert "over 2 processes; 7 blocks of at most" in outputs["fsdp"][1] and "sharded:" not in outputs["ddp"][1]
    assert outputs["cut"][0] == outputs["cut again"][0] == V.EXIT_STOPPED
    assert "at step 2, saved" in outputs["cut"][1] and "at step 4, saved" in outputs["cut again"][1]
    shards = {path.parent.name: path.name for path in base.glob("*/checkpoints/*_shards/__1_0.distcp")}
    folder = base / "fsdp" / "checkpoints"
    assert sorted(path.name for path in folder.glob("*_shards")) == [f"ckpt_{step}_shards" for step in (1, 2, 3)]
    assert not list((base / "cut end" / "checkpoints").glob("*_shards")) and shards  # keep_last 1 in a phase
    assert not list(base.glob("*/checkpoints/.*.tmp"))
    for name in ("ckpt_2.pt", "ckpt_final.pt", "ckpt_best.pt"):
        model, _ = V.load_model(folder / name)
        assert type(model) is V.VJepaAutoV2 and not any(map(V.is_sharded, model.state_dict().values()))
    other = V.load_checkpoint(checkpoint(base / "ddp", "ckpt_2.pt"))
    assert_same_state(V.load_checkpoint(folder / "ckpt_2.pt"), {**other, "best": pytest.approx(other["best"])})


@pytest.mark.slow
def test_other_numbers_of_ranks(runs, tmp_path):
    """From two ranks to three, some of which have no part of a small tensor, and to one."""
    saved = dict(resume=checkpoint(runs[0] / "fsdp", "ckpt_2.pt"), **FEW)
    jobs = [("vjepa", {**saved, "shard": kind, "out_dir": tmp_path / kind}) for kind in ("none", "fsdp")]
    assert [code for code, _ in run_ranks(3, tmp_path / "jobs", *jobs)] == [0, 0]
    assert_same_run(tmp_path / "none", tmp_path / "fsdp", after=2)
    alone = [run_job(name, {**flags, "out_dir": f"{flags['out_dir']}_one"}) for name, flags in jobs]
    assert [code for code, _ in alone] == [0, 0]
    assert_same_run(tmp_path / "none_one", tmp_path / "fsdp_one", after=2)


@pytest.fixture
def copied(runs, tmp_path):
    """A run folder with the sharded checkpoints of steps 1 and 2 -> its folder of checkpoints."""
    folder = tmp_path / "run" / "checkpoints"
    skipped = shutil.ignore_patterns("ckpt_[3-9]*", "ckpt_final.pt", "ckpt_best.pt")
    return Path(shutil.copytree(runs[0] / "fsdp" / "checkpoints", folder, ignore=skipped))


def edit(path, change):
    """Change bytes of a file."""
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda folder: (folder / "__1_0.distcp").unlink(), "No such file or directory"),
        (lambda folder: edit(folder / "__0_0.distcp", lambda data: data[:-1]), "ckpt_2_shards/__0_0.distcp has"),
        (lambda folder: edit(folder / "__0_0.distcp", lambda data: data[:99] + b"!" + data[100:]), "its SHA-256 is"),
        (shutil.rmtree, "No such file or directory"),
    ],
    ids=["missing", "cut", "flipped", "gone"],
)
def test_a_damaged_shard_is_refused(copied, spoil, why):
    """The checkpoint before it is taken, with a line that names what is wrong."""
    spoil(copied / "ckpt_2_shards")
    told = []
    state, path = V.newest_checkpoint(copied.parent, told.append)
    assert path.name == "ckpt_1.pt" and state["step"] == 1
    assert len(told) == 1 and told[0].startswith("WARNING: checkpoint ") and why in told[0]


@pytest.mark.slow
def test_shards_are_named_plainly_and_never_unpickled(copied, monkeypatch):
    """A name that leads out of the folder, or a piece that is missing, is refused; the pickle beside the shards is not
    even opened."""
    state = torch.load(copied / "ckpt_2.pt", weights_only=True)
    (copied / "ckpt_2_shards" / ".metadata").write_bytes(b"no pickle")
    assert V.load_checkpoint(copied / "ckpt_2.pt")["step"] == 2
    known = state["shards"]
    odd = {"../x": next(iter(known["files"].values())), **known["files"]}
    with pytest.raises(ValueError, match="is no name of one"):
        V.read_shards({**state, "shards": {**known, "files": odd}}, copied / "ckpt_2.pt")
    known["tensors"][0][3].pop()
    with pytest.raises(ValueError, match="are missing"):
        V.read_shards(state, copied / "ckpt_2.pt")


@pytest.mark.slow
def test_shards_follow_their_checkpoint(copied, tmp_path):
    """Moved beside it, and deleted with it, not before; a file in their folder that no run wrote stays. Seen red:
    moved shards took a stranger's file on record."""
    V.place_shards(copied / "ckpt_1_shards", tmp_path / "ckpt_1.pt", is_new=True)  # with the times of this copy
    shutil.move(copied / "ckpt_1.pt", tmp_path / "ckpt_1.pt")
    (tmp_path / "ckpt_1_shards" / "notes.txt").write_text("mine")
    V.move_checkpoint(tmp_path / "ckpt_1.pt", copied / "ckpt_7.pt")
    assert V.load_checkpoint(copied / "ckpt_7.pt")["step"] == 1
    V.delete_shards(copied / "ckpt_7.pt")
    assert V.load_checkpoint(copied / "ckpt_7.pt")["step"] == 1
    (copied / "ckpt_7.pt").unlink()
    os.utime(copied / "ckpt_7_shards" / "__1_0.distcp", ns=(1, 1))  # no longer the file on record
    V.delete_shards(copied / "ckpt_7.pt")
    assert sorted(path.name for path in (copied / "ckpt_7_shards").iterdir()) == ["__1_0.distcp", "notes.txt"]


@pytest.mark.slow
def test_orphans_of_a_killed_save_are_deleted(copied, tmp_path):
    """A kill before the shards have their name, and one after it but before the checkpoint has: the next run deletes
    both. Shards whose checkpoint somebody took elsewhere stay. Seen red: orphans stayed for ever."""
    V.place_shards(copied / "ckpt_2_shards", tmp_path / "ckpt_5.pt", is_new=True)
    V.place_shards(tmp_path / "ckpt_5_shards", copied / "ckpt_5.pt", is_new=True)
    shutil.move(copied / "ckpt_2.pt", copied / ".ckpt_5.pt.77.tmp")
    V.place_shards(copied / "ckpt_1_shards", copied / "ckpt_4.pt", is_new=True)
    unfinished = copied / ".ckpt_6_shards.77.tmp"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    V.sweep_folder(copied.parent)
    assert sorted(path.name for path in copied.iterdir()) == [V.WRITTEN, "ckpt_1.pt", "ckpt_4_shards"]


@pytest.mark.slow
def test_every_world_and_faults(tmp_path):
    """Each world has the losses of DDP: parameters without axis, transformer layers of torch, frozen backbones, and
    clipping by value. A disk that is full on one rank costs one checkpoint; a rank that dies ends the other with a
    line, and one process goes on from what both have saved."""
    worlds = {
        "toy": dict(grad_clip=0.0, grad_clip_value=1e-3),
        "cosmos": {},
        "future": dict(predictor="flow", context_depth=1),
    }
    jobs = [
        (name, {**flags, "shard": kind, "ckpt_every": 2, "out_dir": tmp_path / f"{name} {kind}"})
        for name, flags in worlds.items()
        for kind in ("none", "fsdp")
    ]
    dying = dict(shard="fsdp", steps=4, out_dir=tmp_path / "dying")
    jobs.append(("toy", dict(shard="fsdp", out_dir=tmp_path / "full"), (1, 1, "full")))
    results = run_ranks(2, tmp_path / "jobs", *jobs, ("toy", dying, (1, 3, "die")))
    for (name, flags, *_), (code, output) in zip(jobs, results):
        assert code == 0, (name, flags, output[-2000:])
    for name in worlds:
        assert_same_run(tmp_path / f"{name} none", tmp_path / f"{name} fsdp", name)
    full = results[-2][1]
    assert "WARNING: checkpoint of step 1 could not be saved (rank 1: " in full and full.count("WARNING") == 1
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == [V.WRITTEN, "ckpt_2.pt", "ckpt_2_shards", "ckpt_final.pt"]
    code, output = results[-1]
    assert code == V.EXIT_ERROR and "ranks lost each other at step" in output and "rank 1 did not answer" in output
    code, output = run_job("toy", dying)
    assert code == 0 and "ckpt_2.pt at step 2" in output
