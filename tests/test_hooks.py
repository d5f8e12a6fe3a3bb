"""What the loop offers every world: its own learning rates, parts frozen by a setting, a split by folders, the best
checkpoint, what an evaluation changes, marks, and the words of its errors."""

import errno
import json
import os
import signal
import subprocess
import sys
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
    assert source.held_out and source.split_by == "folders" and names(source.test)[0] == "test/line_10.npy"
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
    assert (
        source.split_by == "hash" and source.test == [] and (source.train, source.val) == V.split_videos(listing, 0.1)
    )
    assert len(listing.notes) == notes and all("split by the hash of all names" in note for note in listing.notes)


def test_the_test_stream_is_val_without_test_files(lines, tmp_path):
    """So that whoever asks for the test side always gets held-out samples, the same as `val`."""
    cfg, source = opened(spread(lines, tmp_path, train=range(4), val=range(4, 8)))
    assert source.split_by == "folders" and source.test == [] and source.dataset(cfg, "test").stream == "val"
    for index in range(4):
        assert int(source.dataset(cfg, "test")[index]["file"]) == int(source.dataset(cfg, "val")[index]["file"])


def test_a_file_linked_into_two_sides_is_in_one(lines, tmp_path):
    """A link from test/ into train/ does not train: the file has one name, that of test/."""
    root = spread(lines, tmp_path, train=range(4), val=(4, 5), test=(6,))
    (root / "train" / "again.npy").symlink_to(root / "test" / "line_6.npy")
    _, source = opened(root)
    assert "train/again.npy" not in names(source.train) and names(source.test) == ["test/line_6.npy"]


# -- what an evaluation changes, and the best checkpoint


class Plateau(Line):
    """Counts and adds up the figures that it is told."""

    def after_validation(self, values):
        self.told += 1
        self.last += values["val_loss_line"] * self.told


SHORT = dict(val_every=2, ckpt_every=2, best_by="val_loss_line")
BEST = "ckpt_best.pt"


def figures(monkeypatch, by_step):
    """Let evaluations give these values of val_loss_line, by all steps so far."""

    def validate(run, deadline=0):
        run.process.stop_together()  # as the walk over its batches does
        value = by_step[run.progress.total]
        return {"val_loss_total": 1.0, "val_loss_line": value, "val_clips": 4.0}

    monkeypatch.setattr(V, "validate", validate)


def equal(a, b):
    """Whether two nested states hold the same bits, but for the seconds; nan equals nan."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in ("seconds", "out_dir"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def files_of(out_dir, folder="checkpoints"):
    return sorted(path.name for path in (Path(out_dir) / folder).glob("*.pt"))


@pytest.mark.parametrize(
    ("by", "values", "best", "told"),
    [
        ("val_loss_line", {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5}, 4, 3.0),
        ("val_loss_line", {2: 5.0, 4: 3.0, 6: 3.0, 8: 2.0}, 8, 2.0),
        ("-val_loss_line", {2: 5.0, 4: 3.0, 6: 6.0, 8: 6.0}, 6, -6.0),
        ("val_loss_line", {2: float("nan"), 4: float("-inf"), 6: 9.0, 8: float("nan")}, 6, 9.0),
        ("val_loss_line", {2: float("nan"), 4: float("nan"), 6: float("inf"), 8: float("nan")}, 0, None),
        ("", {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5}, 0, None),
    ],
)
def test_the_best_checkpoint_is_kept(lines, tmp_path, monkeypatch, by, values, best, told):
    """That of the first smallest (or largest) finite figure, the last evaluation included, whatever keep_last drops;
    with the content of any checkpoint, and found by nobody unasked. Seen red with <= for <, and without isfinite."""
    figures(monkeypatch, values)
    cfg = config(lines, tmp_path, val_every=2, ckpt_every=1, keep_last=1, best_by=by)
    assert V.train(cfg, world=Plateau) == 0
    kept = [BEST] * bool(best)
    assert set(files_of(tmp_path)) == {"ckpt_7.pt", "ckpt_final.pt", *kept}
    if not best:
        return
    state = checkpoint(tmp_path, BEST)
    assert (state["step"], state["best_step"], state["best"]) == (best, best, told)
    assert state.keys() == checkpoint(tmp_path).keys() and state["cfg"]["best_by"] == by
    assert V.load_model(tmp_path / "checkpoints" / BEST, world=Plateau)[0].told == min(best // 2, 3)
    for name in ("ckpt_7.pt", "ckpt_final.pt"):
        (tmp_path / "checkpoints" / name).unlink()
    assert V.newest_checkpoint(tmp_path, print, Plateau) == (None, None)


@pytest.mark.parametrize("flags", [["--best_by", "-val_lossline"], ["--best-by=val_lossline"]])
def test_a_figure_that_no_evaluation_has_is_refused(lines, tmp_path, capsys, flags):
    """One line, exit code 2, the nearest name, before anything is written; a dash in front is no flag."""
    command = ["--data_root", str(lines), "--out_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert V.main([*command, *flags], world=Line) == 2 and not (tmp_path / "run").exists()
    _, err = capsys.readouterr()
    assert err == (
        f"error: config: best_by = '{flags[-1].removeprefix('--best-by=')}': is no figure of an evaluation (did you "
        "mean val_loss_line?); there are val_loss_total, val_loss_line, val_clips (--best_by)\n"
    )
    V.check_best_by(V.VJepaAutoV2Config(best_by="-val_soon_skill"), V.VJepaAutoV2)


def test_a_dash_is_taken_from_the_command_line(lines, tmp_path):
    """`--best_by -val_x` is what a user types. Seen red: argparse expected one argument."""
    cfg, overrides, _ = V.resolve_config(["--best_by", "-val_loss_line", "--lr", "1e-3"], Line)
    assert cfg.best_by == overrides["best_by"] == "-val_loss_line"
    with pytest.raises(V.UsageError, match="unknown argument -x"):
        V.resolve_config(["-x"], Line)


def test_a_figure_that_is_not_given_is_told(lines, tmp_path, monkeypatch):
    """KEYS may name figures that come only with some settings."""
    rare = type("Rare", (Line,), {"VAL_KEYS": {"rare": "seldom there"}})
    assert V.train(config(lines, tmp_path, val_every=4, best_by="val_rare"), world=rare) == 0
    told = "WARNING: best_by = val_rare: this evaluation has no such figure"
    assert (tmp_path / "train.log").read_text().count(told) == 2 and files_of(tmp_path) == ["ckpt_final.pt"]


class Killed(BaseException):
    """What no handler of the loop catches."""


def strike(patch, name, at, after, how):
    """In the at-th call of a function of the script, before or after its work: die, or be told to stop."""
    real, calls = getattr(V, name), []

    def struck(*args, **more):
        calls.append(name)
        result = real(*args, **more) if after or len(calls) != at else None
        if len(calls) == at:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGTERM)
            result = result if after else real(*args, **more)
        return result

    patch.setattr(V, name, struck)


VALUES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.5, 10: float("inf"), 12: 2.0}


def run_of_twelve(folder, out_dir, **overrides):
    return config(folder, out_dir, **{**SHORT, "steps": 12, **overrides})


@pytest.fixture(scope="module")
def unbroken(lines, tmp_path_factory):
    """Twelve steps that nobody stops, by ckpt_every -> run folder."""
    made = {}

    def run(ckpt_every):
        if ckpt_every not in made:
            made[ckpt_every] = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                figures(patch, VALUES)
                assert V.train(run_of_twelve(lines, made[ckpt_every], ckpt_every=ckpt_every), world=Plateau) == 0
        return made[ckpt_every]

    return run


# the function, and at which call it is struck in a run that evaluates every second step: around evaluation, log, what
# the world makes of it, and saves, of a step that becomes the best and of one that does not
PLACES = [
    ("validate", 2), ("validate", 3), ("take_in", 2), ("take_in", 3), ("keep_best", 2), ("keep_best", 3),
    ("save_run", 2), ("save_run", 4), ("save_run", 5), ("save_checkpoint", 3), ("take_step", 5), ("take_step", 7),
]  # fmt: skip


FAST = [
    ("take_in", 2, 2, "stopped"),
    ("take_in", 2, 2, "killed"),
    ("keep_best", 2, 3, "killed"),
    ("keep_best", 2, 100, "stopped"),
]
CASES = [(*place, every, how) for place in PLACES for every in (2, 3, 100) for how in ("stopped", "killed")]


@pytest.mark.parametrize(
    ("name", "at", "ckpt_every", "how"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_resume_is_exact(lines, tmp_path, unbroken, name, at, ckpt_every, how):
    """Struck before and after its work in any of these places, the same command ends with the records, the weights and
    the best checkpoint of an unbroken run; nothing is taken in twice, nothing is left out.

    Seen red without the replay in train_phase, without `validated`, and where the best counted as saved for a stop.
    """
    for after in (False, True):
        cfg = run_of_twelve(lines, tmp_path / str(after), ckpt_every=ckpt_every)
        with pytest.MonkeyPatch.context() as patch:
            figures(patch, VALUES)
            with pytest.MonkeyPatch.context() as struck:
                strike(struck, name, at, after, how)
                if how == "killed":
                    with pytest.raises(Killed):
                        V.train(cfg, world=Plateau)
                else:
                    assert V.train(cfg, world=Plateau) == 75
                    told = json.loads((Path(cfg.out_dir) / "status.json").read_text())["step"]
                    saved = [V.load_checkpoint(path, Plateau)["step"] for _, path in V.checkpoint_files(cfg.out_dir)]
                    assert max(saved) == told
            assert V.train(cfg, world=Plateau) == 0
        assert rows(cfg.out_dir) == rows(unbroken(ckpt_every))
        for file in ("ckpt_final.pt", BEST):
            ours, theirs = (checkpoint(folder, file) for folder in (cfg.out_dir, unbroken(ckpt_every)))
            # a final checkpoint that is saved again knows of the last evaluation
            known = {} if file == BEST else {"best": 0, "best_step": 0}
            assert equal({**ours, **known}, {**theirs, **known}), file
        assert int(ours["model"]["told"]) == 5 and ours["best_step"] == 12


def test_a_lost_log_is_evaluated_again(lines, tmp_path, monkeypatch):
    """Without the record of an evaluation whose step is saved from before it, it is made again and taken in once; where
    it was taken in, it is only logged again."""
    figures(monkeypatch, VALUES)
    for ckpt_every in (2, 100):
        cfg = run_of_twelve(lines, tmp_path / str(ckpt_every), ckpt_every=ckpt_every)
        with pytest.MonkeyPatch.context() as patch:
            strike(patch, "take_in", 2, True, "stopped")
            assert V.train(cfg, world=Plateau) == 75
        (tmp_path / str(ckpt_every) / "metrics.jsonl").unlink()
        assert V.train(cfg, world=Plateau) == 0
        assert int(checkpoint(cfg.out_dir)["model"]["told"]) == 5
        assert [row["step"] for row in rows(cfg.out_dir) if "val_clips" in row] == [4, 6, 8, 10, 12]


def test_figures_come_back_as_they_were(lines, tmp_path, monkeypatch):
    """What the world is told of an evaluation is the same when it is read from the log: floats to the bit, NaN for all
    that is not finite."""
    seen, value = [], 0.1 + 0.2
    values = {"val_loss_total": value, "val_loss_line": float("-inf"), "val_clips": 4.0}
    monkeypatch.setattr(V, "validate", lambda run, deadline=0: values)
    monkeypatch.setattr(Plateau, "after_validation", lambda self, told: seen.append(told))
    cfg = config(lines, tmp_path, steps=3, val_every=2, ckpt_every=2)
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, "take_in", 1, True, "killed")
        with pytest.raises(Killed):
            V.train(cfg, world=Plateau)
    assert V.train(cfg, world=Plateau) == 0
    assert len(seen) == 2 and list(map(list, seen)) == [list(values)] * 2
    assert all(list(map(repr, told.values())) == [repr(value), "nan", "4.0"] for told in seen)


def stopped_at(cfg, step):
    """Run a config of a Plateau until it was told to stop in a step."""
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, "take_step", step, True, "stopped")
        assert V.train(cfg, world=Plateau) == 75


def test_a_best_checkpoint_of_later_steps_is_moved_aside(lines, tmp_path, monkeypatch):
    """Killed behind it, or an older checkpoint named, the run does not go on from it: it lies in the same previous_<k>
    as later checkpoints, and the best is looked for anew among the steps to come."""
    figures(monkeypatch, VALUES)
    cfg = run_of_twelve(lines, tmp_path / "killed", ckpt_every=5)
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, "take_step", 9, True, "killed")  # saved: 5, best: 4, then 8
        with pytest.raises(Killed):
            V.train(cfg, world=Plateau)
    assert checkpoint(cfg.out_dir, BEST)["step"] == 8 and files_of(cfg.out_dir) == ["ckpt_5.pt", BEST]
    stopped_at(cfg, 2)
    assert files_of(cfg.out_dir, "previous_1") == [BEST]
    log = (tmp_path / "killed/train.log").read_text()
    assert "ckpt_best.pt of step 4 is no longer there; the best is looked for anew" in log
    assert (checkpoint(cfg.out_dir, "ckpt_7.pt")["best_step"], checkpoint(cfg.out_dir, BEST)["best"]) == (6, 4.0)

    cfg = run_of_twelve(lines, tmp_path / "named", keep_last=9)
    assert V.train(cfg, world=Plateau) == 0 and checkpoint(cfg.out_dir, BEST)["step"] == 12
    again = V.replace(cfg, resume=str(tmp_path / "named/checkpoints/ckpt_6.pt"), steps=8)
    assert V.train(again, world=Plateau) == 0
    assert files_of(cfg.out_dir, "previous_1") == ["ckpt_10.pt", "ckpt_8.pt", BEST, "ckpt_final.pt"]
    assert checkpoint(cfg.out_dir, BEST)["step"] == 8 and not (tmp_path / "named/previous_2").exists()


def test_going_on_from_the_best_checkpoint(lines, tmp_path, monkeypatch):
    """--resume names it, in its own folder and from another: it is not moved, and stays the best until a better one."""
    figures(monkeypatch, {**VALUES, 11: 9.0})
    cfg = run_of_twelve(lines, tmp_path / "run", steps=11)
    assert V.train(cfg, world=Plateau) == 0
    path = tmp_path / "run/checkpoints" / BEST
    assert checkpoint(cfg.out_dir, BEST)["step"] == 8
    stopped_at(V.replace(cfg, resume=str(path)), 1)
    assert checkpoint(cfg.out_dir, BEST)["step"] == 8 and checkpoint(cfg.out_dir, "ckpt_9.pt")["best_step"] == 8
    assert int(checkpoint(cfg.out_dir, "ckpt_9.pt")["model"]["told"]) == 4
    assert BEST not in files_of(cfg.out_dir, "previous_1")
    other = V.replace(cfg, resume=str(path), out_dir=str(tmp_path / "other"))
    stopped_at(other, 1)  # evaluated again, for its own log, and the best there so far
    assert checkpoint(other.out_dir, BEST)["step"] == 8 and rows(other.out_dir)[0]["val_loss_line"] == 2.5
    assert int(checkpoint(other.out_dir, "ckpt_9.pt")["model"]["told"]) == 4


def test_other_files_under_its_name(lines, tmp_path, monkeypatch):
    """A user's own file, a damaged one, and the best by another figure are moved aside, never overwritten; an absent
    one is told. A finished run that is started again, or extended, keeps its own."""
    figures(monkeypatch, {**VALUES, 7: 9.0, 9: 1.0, 10: 0.5})
    cfg, path = run_of_twelve(lines, tmp_path, steps=4), tmp_path / "checkpoints" / BEST
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert V.train(cfg, world=Plateau) == 0 and checkpoint(tmp_path, BEST)["step"] == 4
    assert (tmp_path / "previous_1" / BEST).read_bytes() == b"mine"
    content = path.read_bytes()
    for steps in (4, 6):  # the evaluation of step 6 is no better
        assert V.train(V.replace(cfg, steps=steps), world=Plateau) == 0
        assert path.read_bytes() == content and not (tmp_path / "previous_2").exists()
    damaged = bytes([*content[:2000], content[2000] ^ 1, *content[2001:]])
    path.write_bytes(damaged)
    assert V.train(V.replace(cfg, steps=7, val_every=0), world=Plateau) == 0
    assert (tmp_path / "previous_2" / BEST).read_bytes() == damaged and checkpoint(tmp_path, BEST)["step"] == 7
    assert "it is not kept as the best" in (tmp_path / "train.log").read_text()
    assert V.train(V.replace(cfg, steps=9, val_every=0, best_by="-val_loss_line"), world=Plateau) == 0
    assert checkpoint(tmp_path, BEST)["best"] == -1.0 and files_of(tmp_path, "previous_3") == [BEST]
    path.unlink()  # 0.5, the last figure, is less than the 1.0 of before
    assert V.train(V.replace(cfg, steps=10, val_every=0, best_by="-val_loss_line"), world=Plateau) == 0
    assert checkpoint(tmp_path, BEST)["best"] == -0.5


def test_resume_never_moves_the_best_away(lines, tmp_path, monkeypatch):
    """With all that the old run wrote."""
    figures(monkeypatch, {2: 1.0, 3: 9.0})
    cfg = config(lines, tmp_path, steps=3, **SHORT)
    assert V.train(cfg, world=Plateau) == 0
    figures(monkeypatch, {2: 2.0, 3: 3.0})
    assert V.train(V.replace(cfg, resume="never"), world=Plateau) == 0
    assert checkpoint(tmp_path, BEST)["best"] == 2.0 and BEST in files_of(tmp_path, "previous_1/checkpoints")


def test_a_full_disk_costs_that_best_alone(lines, tmp_path, monkeypatch):
    """It is told; the best that stands counts on, and the next better one is tried."""
    figures(monkeypatch, {2: 5.0, 4: 3.0, 6: 4.0, 8: 9.0})
    real, tries = V.save_checkpoint, []

    def full(state, out_dir, cfg, final, best=False, shards=None):
        tries.append(state["step"] if best else 0)
        if tries[-1] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state, out_dir, cfg, final, best, shards)

    monkeypatch.setattr(V, "save_checkpoint", full)
    assert V.train(config(lines, tmp_path, **SHORT), world=Plateau) == 0
    log = (tmp_path / "train.log").read_text()
    assert "WARNING: checkpoint of step 4 could not be saved (No space left on device)" in log
    assert "the next try is after the next good evaluation" in log
    assert [step for step in tries if step] == [2, 4, 6] and checkpoint(tmp_path, BEST)["best"] == 4.0


def test_early_checkpoints_of_format_3_go_on(lines, tmp_path, monkeypatch):
    """Those without what the best checkpoint needs: nothing was the best then, nothing was taken in."""
    figures(monkeypatch, VALUES)
    cfg = run_of_twelve(lines, tmp_path, best_by="", val_every=0)
    stopped_at(cfg, 3)
    path = tmp_path / "checkpoints" / "ckpt_3.pt"
    state = checkpoint(tmp_path, path.name)
    new = {"validated", "best", "best_step"}
    (tmp_path / "checkpoints" / V.WRITTEN).unlink()
    torch.save({key: value for key, value in state.items() if key not in new}, path)
    assert equal(V.load_checkpoint(path, Plateau), state)
    assert V.train(V.replace(cfg, best_by="val_loss_line", val_every=2), world=Plateau) == 0
    assert checkpoint(tmp_path, BEST)["step"] == 12
    for name, value in (("validated", -1), ("best", float("nan")), ("best_step", 0.5)):
        torch.save({**state, name: value}, path)
        with pytest.raises(V.BadCheckpoint, match=f"{name} = "):
            V.load_checkpoint(path, Plateau)


class HeadFit(V.Fit):
    """The head learns on, of lines drawn by the step."""

    KEYS = {"loss_head": "squared error of the last number"}

    def __init__(self, model, run, before):
        super().__init__(model, "head", 4, 4, 40)

    def batch(self, step=None):
        return {"line": torch.randn(len(self.pick(step, self.rng(step))), 6, generator=self.rng(step))}

    def forward(self, batch):
        losses, _, _ = self.model(batch)
        return {"loss_total": losses["loss_total"], "loss_head": losses["loss_total"]}, {}, {}


class Fitted(Plateau):
    """A Plateau whose head is fitted after training."""

    def phases(self):
        return [("head", 4)]

    def phase_groups(self, name):
        return [V.param_group(self.cfg, "decay", list(self.head.parameters()), 1e-2)]

    def open_phase(self, name, run, before):
        return HeadFit(self, run, before)


def test_a_fit_after_training_is_no_part_of_it(lines, tmp_path, monkeypatch):
    """Its evaluations change nothing and are never the best; the last evaluation, behind it, may be. Resumed in it."""
    figures(monkeypatch, {2: 5.0, 4: 6.0, 8: 4.0})
    cfg = config(lines, tmp_path, steps=4, **SHORT)
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, "take_step", 7, True, "stopped")
        assert V.train(cfg, world=Fitted) == 75
    assert checkpoint(tmp_path, BEST)["step"] == 2
    assert V.train(cfg, world=Fitted) == 0
    state = checkpoint(tmp_path, BEST)
    assert (state["step"], state["after"], state["best_step"], int(state["model"]["told"])) == (4, 4, 8, 1)
    assert [row["step"] for row in rows(tmp_path) if "val_loss_head" in row] == [6, 8]


@pytest.mark.slow
def test_two_ranks_take_in_the_same(lines, tmp_path):
    """Ranks at half the batch, killed behind an evaluation whose step was saved before it: both take it in, and the run
    ends as an unbroken one."""
    program = tmp_path / "worlds" / "plateau.py"
    program.parent.mkdir()
    program.write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(V.__file__).removesuffix('VJepa_AUTO_V2.py')!r}]\n"
        "from test_hooks import V, Plateau\n"
        "real = V.take_in\n"
        "def take_in(phase, values):\n"
        "    if os.environ.get('KILL') and phase.run.progress.total == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(phase, values)\n"
        "V.take_in = take_in\n"
        "sys.exit(V.main(world=Plateau))\n"
    )
    flags = "--device cpu --steps 8 --num_workers 0 --batch_size 2 --log_every 1 --val_clips 4 --val_every 2 --lr 0.01"
    flags += f" --ckpt_every 2 --best_by val_loss_line --dist_timeout_s 20 --data_root {lines}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    for name, kill in (("whole", ""), ("cut", "yes"), ("cut", "")):
        command = [*launcher, *flags.split(), "--out_dir", str(tmp_path / name)]
        done = subprocess.run(command, env={**os.environ, "KILL": kill}, capture_output=True, text=True)
        assert (done.returncode == 0) is not bool(kill), done.stdout + done.stderr
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for file in ("ckpt_final.pt", BEST):
        assert equal(checkpoint(tmp_path / "cut", file), checkpoint(tmp_path / "whole", file))
    assert int(checkpoint(tmp_path / "cut")["model"]["told"]) == 3


# -- marks, files and words


class Marked(Line):
    """A Line that says that its weights are random, and draws a picture."""

    FILES = ("line.png",)

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.mark = "weights:random"

    def report(self, run, values, seconds):
        V.write_own(Path(run.cfg.out_dir) / "line.png", lambda handle: handle.write(V.MARK.encode()))


def test_a_mark_stands_before_every_line(lines, tmp_path):
    """Training and evaluation, config.json and checkpoints bear it; a world without one bears none."""
    cfg = config(lines, tmp_path / "run", steps=2, val_every=1)
    assert V.train(cfg, world=Marked) == 0
    log = (tmp_path / "run/train.log").read_text().splitlines()
    assert len([line for line in log if line.startswith("weights:random step:")]) == 4
    assert not [line for line in log if line.startswith("step:")]
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["world"]["mark"] == checkpoint(cfg.out_dir)["world"]["mark"] == "weights:random"
    model, _ = V.load_model(tmp_path / "run/checkpoints/ckpt_final.pt", world=Marked)
    source = V.DataSource("scenes", "", [], [], [], True)
    assert V.Run(cfg, None, None, None, source, model).mark == "data:scenes weights:random "
    assert V.Run(cfg, None, None, None, source, Line(cfg)).mark == "data:scenes "


def test_what_a_world_writes_is_a_run_s(lines, tmp_path):
    """--resume never moves its picture with the old run; a user's file of that name is moved aside at the start; what a
    killed writer left of it goes. A file that another world would write stays. Seen red with futures.png alone."""
    (tmp_path / "line.png").write_bytes(b"mine")
    cfg = config(lines, tmp_path, steps=1)
    assert V.train(cfg, world=Marked) == 0
    assert (tmp_path / "previous_1/line.png").read_bytes() == b"mine" and (tmp_path / "line.png").is_file()
    (tmp_path / "futures.png").write_bytes(b"mine")
    for name in (".line.png.7.tmp", ".futures.png.7.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert V.train(V.replace(cfg, resume="never"), world=Marked) == 0
    assert (tmp_path / "previous_2/line.png").read_bytes() == (tmp_path / "line.png").read_bytes() == V.MARK.encode()
    assert (tmp_path / "futures.png").read_bytes() == b"mine" and (tmp_path / ".futures.png.7.tmp").exists()
    assert not (tmp_path / ".line.png.7.tmp").exists() and V.VJepaAutoV2.FILES == ("futures.png",)
    with pytest.raises(TypeError, match="FILES must be a tuple of names"):
        type("Slip", (Line,), {"FILES": "line.png"})


def out_of_memory(self, batch):
    raise MemoryError


def never_finite(self, batch):
    return {"loss_total": next(self.parameters()).sum() * float("nan")}, {}, {}


def test_cures_name_only_what_the_world_has(lines, tmp_path, monkeypatch, capsys):
    """Out of memory, days of work, steps that are not finite. Seen red: --preset tiny of a world without presets."""
    assert V.memory_cures(V.VJepaAutoV2Config()) == (
        "lower --batch_size (raise --grad_accum), --grad_checkpoint, --amp, smaller --image_size or --num_frames, "
        "--preset small or tiny"
    )

    @dataclass
    class Preset(V.ClipConfig):
        PRESETS = {"cosmos_tiny": {}, "cosmos_gru": {}}

    assert V.small_presets(Preset()) == "cosmos_tiny" and V.memory_cures(Preset()) == (
        "lower --batch_size (raise --grad_accum), --amp, smaller --image_size or --num_frames, --preset cosmos_tiny"
    )
    command = ["--data_root", str(lines), "--out_dir", str(tmp_path), "--device", "cpu", "--num_workers", "0"]
    monkeypatch.setattr(V, "rehearse", lambda *args: (1e6, "guessed"))
    monkeypatch.setattr(Line, "forward", out_of_memory)
    assert V.main(command, world=Line) == 1
    out, err = capsys.readouterr()
    assert "THAT IS DAYS: think of fewer --steps, or a faster device" in out
    assert "in order of effect: lower --batch_size (raise --grad_accum), --amp; nothing saved before is harmed" in err
    monkeypatch.setattr(Line, "forward", never_finite)
    assert V.main([*command, "--max_skipped_steps", "2"], world=Line) == 1
    assert "2 steps in a row were not finite; lower --lr, or look at the data" in capsys.readouterr().err


class Absent(Line):
    """A Line whose weights are there when `there` is true."""

    there = True

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        if not self.there:
            raise V.UsageError("encoder: /weights is not there (--encoder)")


def test_a_world_s_own_error_is_no_damage(lines, tmp_path, monkeypatch, capsys):
    """What its __init__ lacks is told as it is, for load_model, resume and a new run, and no checkpoint is passed over;
    a config that cannot be stays damage. Seen red: `damaged or made by another version`."""
    cfg = config(lines, tmp_path / "run", steps=2)
    assert V.train(cfg, world=Absent) == 0
    path = tmp_path / "run/checkpoints/ckpt_final.pt"
    V.checkpoint_template.cache_clear()
    monkeypatch.setattr(Absent, "there", False)
    for work in (V.train, lambda cfg, world: V.load_model(path, world=world)):
        with pytest.raises(V.UsageError, match=r"^encoder: /weights is not there \(--encoder\)$"):
            work(cfg, world=Absent)
    with pytest.raises(V.UsageError, match="^encoder: /weights is not there"):
        V.train(V.replace(cfg, out_dir=str(tmp_path / "new")), world=Absent)
    monkeypatch.undo()
    state = checkpoint(cfg.out_dir)
    (path.parent / V.WRITTEN).unlink()
    torch.save({**state, "cfg": {**state["cfg"], "steps": -1}}, path)
    with pytest.raises(V.BadCheckpoint, match="damaged or made by another version .ValueError: config: steps = -1"):
        V.load_model(path, world=Absent)
