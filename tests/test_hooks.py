"""What the loop offers every world: its own learning rates, parts frozen by a setting, a split by folders, the best
checkpoint, what an evaluation changes, marks, and the words of its errors."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import V


@dataclass
class LineConfig(V.RunConfig):
    freeze: bool = False  # the backbone comes from elsewhere
    MUST_MATCH = ("freeze",)


class Lines(V.FileDataset):
    """line_<k>.npy: float32 [6], of which the last follows from the others."""

    SUFFIXES = (".npy",)

    def read_file(self, video, plan):
        try:
            return {"line": torch.tensor(np.load(video.path))}
        except ValueError as error:
            raise V.BadFile(V.reason_of(error)) from error

    def blank(self):
        return {"line": torch.zeros(6)}


class Line(V.World):
    """Predict the last number of a line. The learning rate halves with every evaluation, and `told` counts them."""

    Config, Dataset = LineConfig, Lines
    KEYS = {"loss_line": "squared error of the last number"}

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.backbone, self.head = nn.Linear(5, 5), nn.Linear(5, 1)
        self.register_buffer("told", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))
        if cfg.freeze:
            self.FROZEN = ("backbone",)

    def forward(self, batch):
        line = batch["line"]
        error = self.head(self.backbone(line[:, :5]))[:, 0] - line[:, 5]
        return self.weigh({"loss_line": error.square().mean()}), {}, {}

    def lr(self, step, peak):
        return super().lr(step, peak) * 0.5 ** int(self.told)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Sixteen files -> folder."""
    folder, rng = tmp_path_factory.mktemp("lines"), np.random.default_rng(0)
    for number in range(16):
        line = rng.standard_normal(6, dtype=np.float32)
        line[5] = line[:5].sum()
        np.save(folder / f"line_{number}.npy", line)
    return folder


def config(folder, out_dir, **overrides):
    """Eight steps on the lines."""
    base = dict(device="cpu", steps=8, num_workers=0, batch_size=4, log_every=1, val_clips=4, val_every=0, lr=1e-2)
    return LineConfig(data_root=str(folder), out_dir=str(out_dir), **{**base, **overrides})


def rows(out_dir):
    """metrics.jsonl -> list of dicts without times and memory."""
    timed = ("clips_per_s", "data_wait", "mem_gb", "time")
    lines = map(json.loads, (Path(out_dir) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in timed} for row in lines]


def checkpoint(out_dir, name="ckpt_final.pt"):
    return torch.load(Path(out_dir) / "checkpoints" / name, weights_only=True)


# -- learning rates of a world


def test_a_world_sets_its_learning_rates(lines, tmp_path, monkeypatch):
    """The optimizer and the log have the world's rate; by default, and in a Fit, it is lr_at of its own config.

    Seen red with lr_at in take_step, and in log_values.
    """
    cfg, used, real = config(lines, tmp_path), [], V.apply_step

    def looking(phase, carries, step):
        used.append(phase.optimizer.param_groups[0]["lr"])
        phase.world.told += step == 3
        real(phase, carries, step)

    monkeypatch.setattr(V, "apply_step", looking)
    assert V.train(cfg, world=Line) == 0
    expected = [V.lr_at(step, cfg, cfg.lr) * 0.5 ** (step > 3) for step in range(8)]
    assert used == expected
    logged = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    assert logged == [*expected[:3], expected[3] / 2, *expected[4:]]  # asked after the step
    assert V.World(cfg).lr(5, 0.3) == V.lr_at(5, cfg, 0.3)


# -- parts frozen by a setting


def test_a_part_is_frozen_by_a_setting(lines, tmp_path):
    """FROZEN set in __init__ holds for training, checkpoints, resume and load_model; without it the part learns.

    Seen red with the class's FROZEN in check_insides: the checkpoint counted as damaged.
    """
    for freeze in (True, False):
        cfg = config(lines, tmp_path / str(freeze), freeze=freeze, steps=4)
        assert V.train(cfg, world=Line) == 0 and V.train(V.replace(cfg, steps=6), world=Line) == 0
        state = checkpoint(cfg.out_dir)
        assert state["frozen"].keys() == ({"backbone"} if freeze else set())
        assert ("backbone.weight" in state["model"]) is not freeze and state["step"] == 6
        with pytest.raises(V.UsageError, match=f"freeze = {not freeze} .checkpoint: {freeze}"):
            V.train(V.replace(cfg, steps=8, freeze=not freeze), world=Line)
    torch.manual_seed(V.RunConfig.seed)
    backbone = Line(cfg).backbone.weight
    assert Line.FROZEN == () and not torch.equal(checkpoint(tmp_path / "False")["model"]["backbone.weight"], backbone)
    torch.manual_seed(V.RunConfig.seed)  # what elsewhere stands for here
    model, _ = V.load_model(tmp_path / "True" / "checkpoints" / "ckpt_final.pt", world=Line)
    assert torch.equal(model.backbone.weight, backbone) and not model.trained().keys() & {"backbone.weight"}
    torch.manual_seed(1)
    with pytest.raises(V.UsageError, match="the frozen weights of backbone are others"):
        V.load_model(tmp_path / "True" / "checkpoints" / "ckpt_final.pt", world=Line)
