"""Ranks, gradient accumulation and gathers: several processes are one process with a larger batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, SCRIPT, SMALL, V, plain_config, random_batch, small_config
from training import new_model, train_steps

SUPCON = dict(lambda_supcon=0.5)


def global_batch(cfg, step, num_clips, maneuvers):
    """All clips of one step over all ranks, each from its own file, with the given maneuvers."""
    batch = random_batch(cfg, num_clips, seed=step, first=step * num_clips)
    batch["maneuver"] = torch.tensor(maneuvers)
    return batch


def rank_part(batch, rank, world_size):
    """The clips that a rank's sampler hands it: i * W + r."""
    return {key: value[rank::world_size] for key, value in batch.items()}


def run_rank(rank, world_size, port, cfg, num_steps, num_clips, maneuvers, folder):
    """One rank of a run, put together as `train` does it. Rank 0 writes its losses (means over ranks) and weights."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    process = V.identify_process(cfg, V.StopFlag(()))
    V.join_ranks(process, cfg)
    gathered = V.gather_rows(torch.tensor([[rank * 10.0], [rank * 10.0 + 1]]), world_size)
    torch.manual_seed(cfg.seed)
    model = V.VJepaAutoV2(cfg, process.rank, process.world_size).train()
    torch.manual_seed(cfg.seed + 1 + process.rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    batches = [rank_part(global_batch(cfg, step, num_clips, maneuvers), rank, world_size) for step in range(num_steps)]
    history, _ = train_steps(model, lambda step: [batches[step]], num_steps, process, wrapped)
    names = [name for name in history[0] if name.startswith("loss_")]
    means = [dict(zip(names, process.mean([metrics[name] for name in names]))) for metrics in history]
    everyone = process.collect({name: value.double().sum().item() for name, value in model.state_dict().items()})
    if rank == 0:
        torch.save(
            {"losses": means, "state": model.state_dict(), "sums": everyone, "gathered": gathered},
            os.path.join(folder, "result.pt"),
        )
    torch.distributed.destroy_process_group()


def run_ranks(world_size, cfg, num_steps, num_clips, maneuvers, folder):
    """Spawn the ranks -> what rank 0 wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (world_size, port, cfg, num_steps, num_clips, maneuvers, str(folder)), nprocs=world_size)
    return torch.load(os.path.join(folder, "result.pt"), weights_only=True)


def run_one(cfg, num_steps, num_clips, maneuvers):
    """The same steps in this process with the whole batch -> (losses per step, state before, state after)."""
    model = new_model(cfg, seed=cfg.seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history, _ = train_steps(model, lambda step: [global_batch(cfg, step, num_clips, maneuvers)], num_steps)
    return history, before, model.state_dict()


def distance_share(before, after, other):
    """Distance between two results over the distance travelled, per network and statistic -> dict.

    Single numbers cannot be compared: Adam divides a gradient by its own size, so rounding noise in gradients that are
    zero in exact arithmetic (key biases) moves a weight by a part of the learning rate. As a share of all movement it
    stays small."""
    shares = {}
    for part in ("online", "predictor", "outcome", "flow.", "read_out", "target", "flow_ema", "queue"):
        names = [name for name in before if name.startswith(part) and before[name].is_floating_point()]
        moved = sum((after[name] - before[name]).double().square().sum() for name in names).sqrt()
        apart = sum((after[name] - other[name]).double().square().sum() for name in names).sqrt()
        shares[part] = float(apart / moved)
    return shares


def projector(state):
    """What the flow's directions mean: the projection onto them, whatever their signs or order."""
    return state["space.basis"] @ state["space.basis"].T


def assert_same_run(result, history, before, after):
    for step, (means, metrics) in enumerate(zip(result["losses"], history)):
        for name, value in means.items():
            # fp32 sums in another order, grown over ten steps: measured 4e-6 relative at most
            assert value == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), (step, name)
    state = result["state"]
    for part, share in distance_share(before, after, state).items():
        assert share < 0.002, (part, share)  # measured 1e-4 at most
    assert int(state["queue_filled"]) == int(after["queue_filled"])
    torch.testing.assert_close(state["space.variance"], after["space.variance"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(state["space.mean"], after["space.mean"], rtol=0, atol=2e-3)
    torch.testing.assert_close(projector(state), projector(after), rtol=0, atol=2e-2)


# -- fast


def test_gather_rows_order(monkeypatch):
    """Clip i of rank r becomes row i * W + r, the order of the samples. Seen red with the ranks' blocks in a row."""

    def fake_all_gather(parts, rows):
        for rank, part in enumerate(parts):
            part.copy_(rows + 100 * rank)

    monkeypatch.setattr(V.dist, "all_gather", fake_all_gather)
    rows = torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
    gathered = V.gather_rows(rows.detach(), 2)
    assert gathered.flatten().tolist() == [0, 100, 1, 101, 2, 102]


def test_every_sample_is_taken_once_and_in_gather_order():
    """The samplers of all ranks together give each step the samples of the one-process run, row i * W + r."""
    alone = list(V.StepSampler(12, 3, 4, 0, 1))
    ranks = [list(V.StepSampler(12, 3, 2, rank, 2)) for rank in range(2)]
    for step in range(3):
        woven = [ranks[row % 2][step][row // 2] for row in range(4)]
        assert woven == alone[step]


def test_own_key_of_each_rank(monkeypatch):
    """InfoNCE over gathered keys: the mean over two pretended ranks is the loss of one process with all clips.

    Seen red with labels that leave out the rank.
    """
    cfg = small_config(outcome_queue=6)
    model, outcome, key = new_model(cfg), torch.randn(4, cfg.enc_dim), torch.randn(4, cfg.enc_dim)
    model.queue.normal_()
    model.queue_filled.fill_(3)
    alone, top1 = model.eventually_loss(outcome, key)
    parts = []
    for rank in range(2):
        model.rank, model.world_size = rank, 2
        monkeypatch.setattr(V, "gather_rows", lambda rows, world_size: key)
        parts.append(model.eventually_loss(outcome[rank::2], key[rank::2]))
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, alone, rtol=1e-5, atol=0)
    assert (parts[0][1] + parts[1][1]) / 2 == top1


def accumulated(cfg, num_steps, pieces):
    """Train on global batches of four clips cut into `pieces` micro-batches -> (history, before, after)."""
    model = new_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def batches_at(step):
        batch = global_batch(cfg, step, 4, [-1] * 4)
        return [
            {key: value[i * 4 // pieces : (i + 1) * 4 // pieces] for key, value in batch.items()} for i in range(pieces)
        ]

    history, _ = train_steps(model, batches_at, num_steps)
    return history, before, model.state_dict()


def test_grad_accum_is_the_large_batch_without_infonce():
    """Two micro-steps give the losses and weights of one step with both. Seen red without the division by the count."""
    cfg = plain_config(lambda_eventually=0.0, outcome_queue=8)
    history, before, after = accumulated(cfg, 8, 1)
    split, _, other = accumulated(cfg, 8, 2)
    for whole, parts in zip(history, split):
        for name in ("loss_total", "loss_vjepa", "loss_soon", "loss_flow", "grad_norm", "flow_grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), (
                name
            )  # another order of fp32 sums over eight steps
    shares = distance_share(before, after, other)
    shares.pop("outcome")  # not trained here
    assert max(shares.values()) < 0.002, shares  # measured 2e-6; see distance_share
    torch.testing.assert_close(projector(other), projector(after), rtol=0, atol=2e-2)
    assert torch.allclose(other["queue"], after["queue"], atol=1e-3)


def test_grad_accum_sees_fewer_negatives():
    """With InfoNCE on, a micro-step contrasts its own clips alone: accumulation is no large batch, by design."""
    cfg = plain_config()
    whole, parts = accumulated(cfg, 1, 1)[0][0], accumulated(cfg, 1, 2)[0][0]
    assert whole["loss_vjepa"] == pytest.approx(parts["loss_vjepa"], rel=1e-4)
    assert whole["loss_eventually"] > parts["loss_eventually"] + 0.3  # ln 4 against ln 2 at the start


# -- real ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, num_clips, maneuvers, flow_rank",
    [(2, 4, [0, 0, 1, 1], 8), (3, 3, [0, 0, 0], 8), (2, 4, [0, 0, 1, 1], 64)],
)
def test_ranks_equal_one_process(tmp_path, world_size, num_clips, maneuvers, flow_rank):
    """The first ten steps with all losses on: losses, weights, EMA, queue and flow statistics are those of one process.

    With 64 directions fewer rows than directions are seen. Seen red with the mean of gradients over ranks dropped, with
    gather_rows in rank order, and with the places of new directions left to rounding. A rank's clips lie W apart, so
    that the first halves of all ranks are that of one process; a rank of one clip has both mask families.
    """
    cfg = small_config(flow_rank=flow_rank, mask_families="one" if num_clips > world_size else "both", **SUPCON)
    result = run_ranks(world_size, cfg, 10, num_clips, maneuvers, tmp_path)
    assert result["gathered"].flatten().tolist() == [rank * 10 + i for i in range(2) for rank in range(world_size)]
    for sums in result["sums"][1:]:
        assert sums == result["sums"][0]  # every rank holds the same numbers, bit for bit
    assert_same_run(result, *run_one(cfg, 10, num_clips, maneuvers))


@pytest.mark.slow
def test_supcon_with_all_positives_on_one_rank(tmp_path):
    """Clips with a partner sit on rank 0 only: the mean over ranks is still the loss of the whole batch.

    Seen red with each rank dividing by its own count of such clips.
    """
    cfg = small_config(**SUPCON)
    result = run_ranks(2, cfg, 1, 4, [0, 1, 0, -1], tmp_path)
    history, _, _ = run_one(cfg, 1, 4, [0, 1, 0, -1])
    assert history[0]["loss_supcon"] > 0
    assert result["losses"][0]["loss_supcon"] == pytest.approx(history[0]["loss_supcon"], rel=1e-4)


@pytest.mark.slow
def test_torchrun_trains_to_the_end(tmp_path):
    """The documented command on two ranks: exit code 0, one final checkpoint, one log line per step (not per rank)."""
    flags = {**SMALL, "steps": 4, "out_dir": str(tmp_path / "run")}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
        "--no-picture",
    ]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [V.WRITTEN, "ckpt_final.pt"]
    state = V.load_checkpoint(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")
    assert state["step"] == 4 and state["world_size"] == 2 and state["consumed"] == 16 and len(state["rng"]) == 2
    records = [V.json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss_total" in record] == [1, 2, 3, 4]
    assert "2 process(es)" in (tmp_path / "run" / "train.log").read_text()
    assert V.load_model(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")[1].steps == 4
