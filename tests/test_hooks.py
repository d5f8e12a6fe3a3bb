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


# -- a split by folders


def spread(lines, root, **sides):
    """Copies of some of the lines: spread(lines, root, train=range(4), val=[7]) -> root."""
    for side, numbers in sides.items():
        (root / side).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            (root / side / f"line_{number}.npy").write_bytes((lines / f"line_{number}.npy").read_bytes())
    return root


def names(videos):
    return [video.name for video in videos]


def opened(root, **overrides):
    cfg = config(root, "unused", **overrides)
    return cfg, V.open_data(Line, cfg, V.list_data(cfg, Lines), True, lambda: None)


@pytest.mark.parametrize("inside", ["", "videos"])
@pytest.mark.parametrize("val_fraction", [0.1, 0.0])
def test_folders_split_the_files(lines, tmp_path, inside, val_fraction):
    """train/ trains, val/ is held out, test/ is read only when asked for; every stream draws its own windows."""
    spread(lines, tmp_path / inside, train=range(6), val=range(6, 9), test=range(9, 14))
    cfg, source = opened(tmp_path, val_fraction=val_fraction)
    assert [len(part) for part in (source.train, source.val, source.test)] == [6, 3, 5]
    assert source.held_out and source.by_folders and names(source.test)[0] == "test/line_10.npy"
    for stream, part in (("train", source.train), ("bank", source.train), ("val", source.val), ("test", source.test)):
        assert source.dataset(cfg, stream).videos == part and source.dataset(cfg, stream).stream == stream
    assert len({int(source.dataset(cfg, "test")[index]["file"]) for index in range(5)}) == 5


def test_a_run_learns_from_the_folders(lines, tmp_path):
    """The start-up line counts them, test/ is not opened, and a split that changes is told on resume.

    Seen red with split_readable in open_data.
    """
    root = spread(lines, tmp_path / "data", train=range(4), val=(4, 5), test=(6,))
    (root / "test" / "line_6.npy").write_bytes(b"junk")
    cfg = config(root, tmp_path / "run", steps=2)
    assert V.train(cfg, world=Line) == 0
    log = (tmp_path / "run/train.log").read_text()
    told = f"data: files, split by folders: 4 train, 2 val, 1 test files under {root}; val_fraction is not used"
    assert told in log and not (tmp_path / "run/bad_files.jsonl").exists()
    listed = checkpoint(tmp_path / "run")["data"]
    assert listed["split"] == "folders" and listed["files"] == 6
    written = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert [written[f"{side}_files"] for side in V.SIDES] == [4, 2, 1]
    assert V.train(V.replace(cfg, steps=3), world=Line) == 0
    assert "the files are not those" not in (tmp_path / "run/train.log").read_text()
    (root / "val" / "line_4.npy").rename(root / "train" / "line_9.npy")
    assert V.train(V.replace(cfg, steps=4), world=Line) == 0
    assert "1 added (train/line_9.npy), 1 removed (val/line_4.npy)" in (tmp_path / "run/train.log").read_text()


def test_a_split_that_became_one_by_folders_is_told(lines, tmp_path):
    """A run begun before folders counted, or before the last stray file was moved, draws other samples now."""
    root = spread(lines, tmp_path, train=range(4), val=(4, 5))
    cfg, source = opened(root)
    before = {name: value for name, value in source.listing().items() if name != "split"}
    assert V.listing_change(before, source).startswith(
        "WARNING: the files are not those of the checkpoint: split by hash then, by folders now; samples"
    )
    spread(lines, root, **{"": (9,)})
    assert V.listing_change(source.listing(), opened(root)[1]).startswith(
        "WARNING: the files are not those of the checkpoint: 1 added (line_9.npy), split by folders then, by hash now;"
    )


@pytest.mark.parametrize(
    ("sides", "split", "empty"),
    [
        (dict(train=(1, 2), test=(3,)), "train/ and test/", "val"),
        (dict(train=(1, 2), val=(), test=(3,)), "train/ and val/ and test/", "val"),
        (dict(train=(1, 2), val=()), "train/ and val/", "val"),
        (dict(train=(), val=(3,)), "train/ and val/", "train"),
    ],
)
def test_an_empty_side_is_refused(lines, tmp_path, capsys, sides, split, empty):
    """One line with the folder and the cure, exit code 2, before anything is written."""
    root = spread(lines, tmp_path / "data", **sides)
    cfg = config(root, tmp_path / "run")
    flags = ["--data_root", cfg.data_root, "--out_dir", cfg.out_dir, "--device", "cpu"]
    assert V.main(flags, world=Line) == 2 and not (tmp_path / "run").exists()
    out, err = capsys.readouterr()
    assert out == "" and err == (
        f"error: data_root {root}: split by its folders {split}, and {empty}/ holds no video; move some of the others "
        "there, or let tools/split_videos.py split a folder into all three\n"
    )


@pytest.mark.parametrize(
    ("sides", "notes"),
    [
        (dict(train=range(8)), 0),
        (dict(train=range(4), more=range(4, 8)), 0),
        (dict(val=range(4), test=range(4, 8)), 0),
        (dict(train=range(4), val=(4, 5), more=(6, 7)), 1),
    ],
)
def test_other_folders_are_split_by_hash(lines, tmp_path, sides, notes):
    """train/ alone, no train/, or files elsewhere: as always, and the last is noted."""
    _, source = opened(spread(lines, tmp_path, **sides))
    listing = V.find_videos(str(tmp_path), "*", Lines.SUFFIXES)
    assert not source.by_folders and source.test == [] and (source.train, source.val) == V.split_videos(listing, 0.1)
    assert len(listing.notes) == notes and all("split by the hash of all names" in note for note in listing.notes)


def test_the_test_stream_is_val_without_test_files(lines, tmp_path):
    """So that whoever asks for the test side always gets held-out samples, the same as `val`."""
    cfg, source = opened(spread(lines, tmp_path, train=range(4), val=range(4, 8)))
    assert source.by_folders and source.test == [] and source.dataset(cfg, "test").stream == "val"
    for index in range(4):
        assert int(source.dataset(cfg, "test")[index]["file"]) == int(source.dataset(cfg, "val")[index]["file"])


def test_a_file_linked_into_two_sides_is_in_one(lines, tmp_path):
    """A link from test/ into train/ does not train: the file has one name, that of test/."""
    root = spread(lines, tmp_path, train=range(4), val=(4, 5), test=(6,))
    (root / "train" / "again.npy").symlink_to(root / "test" / "line_6.npy")
    _, source = opened(root)
    assert "train/again.npy" not in names(source.train) and names(source.test) == ["test/line_6.npy"]
