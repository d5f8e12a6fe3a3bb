"""The seam between the loop and its worlds: a toy world of pixels, one of precomputed features, and old checkpoints."""

import contextlib
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, V, small_config
from training import cpu_process, new_phase, stop_after_update

TOY = ROOT / "tests" / "toy_world.py"
FLAGS = ["--device", "cpu", "--num_workers", "0", "--scene_clips", "8", "--log_every", "1", "--val_clips", "4"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy world in a folder of its own -> its file."""
    path = tmp_path_factory.mktemp("project") / "worlds" / "toy.py"
    path.parent.mkdir()
    path.write_text(f"{TOY.read_text()}# a text of its own: another test may have imported that one in this process\n")
    return path


def environment():
    """This process's environment, with the script on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(path, out_dir, *more, ranks=1):
    """What a user types."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(path), *FLAGS, "--out_dir", str(out_dir), *more]


def run(path, out_dir, *more, ranks=1):
    """Run a world file -> (exit code, all that it printed)."""
    result = subprocess.run(
        command(path, out_dir, *more, ranks=ranks),
        env=environment(),
        cwd=path.parent.parent,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


def run_here(path, out_dir, *more):
    """The same in this process, which has torch already."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = V.main([*FLAGS, "--out_dir", str(out_dir), *more], world=V.import_world(path, "Toy"))
        except SystemExit as ended:  # --help
            code = ended.code
    return code, output.getvalue()


def facts(out_dir):
    """What must be equal in two runs: every record without times and memory."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in ("clips_per_s", "data_wait", "mem_gb", "time")}
        for row in rows
    ]


def weights(out_dir):
    return torch.load(out_dir / "checkpoints" / "ckpt_final.pt", weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed_after(path, out_dir, step, number, *more):
    """Start a world, send a signal once a step is logged -> exit code."""
    process = subprocess.Popen(command(path, out_dir, *more), env=environment(), cwd=path.parent.parent)
    deadline = time.monotonic() + 120
    while not (log := out_dir / "metrics.jsonl").exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(60)


# -- a toy world of thirty lines


STOPPED = ["--steps", "24", "--batch_size", "2", "--ckpt_every", "5", "--val_every", "10"]


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    """The run that nobody stops -> run folder."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    assert run_here(toy, out_dir, *STOPPED)[0] == 0
    return out_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_world_of_thirty_lines_is_stopped_and_resumed(toy, unbroken, tmp_path, monkeypatch, number):
    """Stopped or killed in the middle, the same command ends with the records and the weights of an unbroken run. Only
    what is killed needs a process of its own."""
    if number == signal.SIGTERM:
        stop_after_update(monkeypatch, lambda phase, step: step == 7)
        assert run_here(toy, tmp_path, *STOPPED)[0] == 75
        monkeypatch.undo()
    else:
        assert killed_after(toy, tmp_path, 7, number, *STOPPED) == -number
    code, output = run_here(toy, tmp_path, *STOPPED)
    assert code == 0 and "resumed from" in output
    assert facts(tmp_path) == facts(unbroken) and len(facts(unbroken)) == 27
    assert same_weights(weights(tmp_path), weights(unbroken))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 24)


@pytest.mark.slow
def test_two_ranks_of_a_world_are_one(toy, tmp_path):
    """Under torchrun two ranks at half the batch log the losses of one process, and resume to the bit."""
    more = ["--ckpt_every", "3", "--val_every", "0", "--min_lr", "0.0001"]
    assert run(toy, tmp_path / "one", "--steps", "6", *more, "--batch_size", "4")[0] == 0
    for name, steps in (("two", "6"), ("again", "3"), ("again", "6")):
        code, output = run(toy, tmp_path / name, "--steps", steps, *more, "--batch_size", "2", ranks=2)
        assert code == 0, output
    one, two, again = (
        [row for row in facts(tmp_path / name) if "loss_total" in row] for name in ("one", "two", "again")
    )
    assert [row["loss_total"] for row in one] == pytest.approx([row["loss_total"] for row in two], rel=1e-5)
    assert len(two) == 6 and two[3:] == again[3:]


def test_help_and_errors_are_of_the_world(toy, tmp_path):
    """--help shows the world's fields alone; what it does not have is refused like a misspelt flag."""
    code, output = run_here(toy, tmp_path / "run", "--help")
    assert code == 0 and output.startswith("usage: toy.py") and "--hidden" in output and "--flow" not in output
    assert "channels between the convolutions" in " ".join(output.split())
    code, output = run_here(toy, tmp_path / "run", "--enc_dim", "96")
    assert code == 2 and output.startswith("error: unknown argument --enc_dim") and output.count("\n") == 1
    code, output = run_here(toy, tmp_path / "run", "--hidden", "0")
    assert code == 2 and "hidden = 0: must lie in 1 to 4096 (--hidden)" in output and output.count("\n") == 1


@pytest.fixture(scope="module")
def toy_run(toy, tmp_path_factory):
    """Two steps of the toy world -> run folder."""
    out_dir = tmp_path_factory.mktemp("toy_run")
    code, output = run_here(toy, out_dir, "--steps", "2", "--val_every", "0")
    assert code == 0, output
    return out_dir


def test_load_model_finds_the_world_by_name_and_content(toy, toy_run, tmp_path):
    """A file elsewhere is run while it has the content that the checkpoint knows; missing or edited it is named.

    Seen red with the stem alone: another toy.py was loaded.
    """
    path = toy_run / "checkpoints" / "ckpt_final.pt"
    model, cfg = V.load_model(path)
    assert type(model).__name__ == "Toy" and cfg.hidden == 32 and not model.training
    state, copied = torch.load(path, weights_only=True), tmp_path / "copy.py"
    shutil.copy(toy, copied)
    assert same_weights(model.state_dict(), state["model"])
    assert state["world"]["name"] == "Toy" and state["world"]["file"] == toy.as_posix()
    edited = tmp_path / "toy.py"
    edited.write_text("# another\n" + toy.read_text())
    for spoiled in ({"file": str(edited)}, {"file": "worlds/absent.py"}, {"file": str(copied), "name": "Other"}):
        other = tmp_path / "ckpt_2.pt"
        torch.save({**state, "world": {**state["world"], **spoiled}}, other)
        with pytest.raises(V.UserError, match="made by the world|holds no world called Other") as caught:
            V.load_model(other)
        assert str(other) in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(V.load_model(path, world=type(model))[0], type(model))


def test_two_worlds_of_one_stem_are_told_apart(toy, toy_run, tmp_path):
    """Another file of the same name and class does not go on with a run, and neither does another world."""
    second = tmp_path / "worlds" / "toy.py"
    second.parent.mkdir()
    second.write_text(toy.read_text().replace("5, padding=2", "3, padding=1"))
    code, output = run_here(second, toy_run, "--steps", "3")
    assert code == 2 and output.splitlines()[-1].startswith(f"error: checkpoint {toy_run}")
    assert f"made by the world Toy ({toy})" in output and f"this is Toy ({second})" in output
    cfg = small_config(steps=3, out_dir=str(toy_run))
    with pytest.raises(V.UsageError, match=r"made by the world Toy .*, this is VJepaAutoV2 \(VJepa_AUTO_V2.py\)"):
        V.train(cfg)
    moved = tmp_path / "moved" / "toy.py"  # the same content under another path is the same world
    moved.parent.mkdir()
    shutil.copy(toy, moved)
    copy = tmp_path / "copy"
    shutil.copytree(toy_run, copy)
    assert run_here(moved, copy, "--steps", "2", "--val_every", "0")[0] == 0


# -- a world of another kind: features in .npy files, with actions


@dataclass
class FeatureConfig(V.RunConfig):
    length: int = 4  # states of a window
    width: int = 6  # numbers of a state
    hidden: int = 16  # width of the recurrent cell
    reach: float = 0.0  # from the share of steps given here on, the rollout counts
    MUST_MATCH = ("length", "width", "hidden")


class Features(V.FileDataset):
    """feature_<k>.npy: float32 [N, width + 2], states and two actions."""

    SUFFIXES = (".npy",)

    def read_file(self, video, plan):
        try:
            rows = np.load(video.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise V.BadFile(V.reason_of(error)) from error
        if rows.ndim != 2 or rows.shape[1] != self.cfg.width + 2 or len(rows) < self.cfg.length:
            raise V.BadFile(f"shape {rows.shape}")
        begin = int(plan * (len(rows) - self.cfg.length + 1))
        return self.blank(torch.tensor(rows[begin : begin + self.cfg.length]))

    def blank(self, rows=None):
        width = self.cfg.width
        rows = torch.zeros(self.cfg.length, width + 2) if rows is None else rows
        return {"states": rows[:, :width], "actions": rows[:, width:]}


class Rollout(V.World):
    """Predict the next state from state and action."""

    Config, Dataset, NO_DECAY, FROZEN = FeatureConfig, Features, ("offset",), ("backbone",)
    KEYS = {"loss_forced": "squared error with the true state before", "loss_rollout": "with its own"}
    backbone_seed = 5

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.cell, self.out = nn.GRUCell(cfg.width + 2, cfg.hidden), nn.Linear(cfg.hidden, cfg.width)
        self.offset = nn.Parameter(torch.zeros(1, cfg.width))
        generator = torch.Generator().manual_seed(self.backbone_seed)
        self.backbone = nn.Linear(cfg.width, cfg.width, bias=False)
        with torch.no_grad():
            self.backbone.weight.copy_(torch.randn(cfg.width, cfg.width, generator=generator))
        self.backbone.to(torch.bfloat16)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))

    def encode(self, states):
        return self.backbone(states.bfloat16()).float()

    def predict(self, states, actions, forced):
        state, hidden, errors = states[:, 0], states.new_zeros(len(states), self.cfg.hidden), []
        for step in range(self.cfg.length - 1):
            hidden = self.cell(torch.cat([states[:, step] if forced else state, actions[:, step]], 1), hidden)
            state = self.out(hidden) + self.offset
            errors.append((state - states[:, step + 1]).square().mean())
        return torch.stack(errors).mean()

    def forward(self, batch):
        states = self.encode(batch["states"])
        forced, rollout = (self.predict(states, batch["actions"], way) for way in (True, False))
        late = (batch["step"] >= self.cfg.reach * self.cfg.steps).float()  # a schedule inside forward
        return (
            {"loss_total": forced + late * rollout, "loss_forced": forced, "loss_rollout": rollout},
            {},
            {"late": late},
        )

    def after_step(self, carries, step):
        self.seen[int(carries[0]["late"])] = True


@pytest.fixture(scope="module")
def feature_folder(tmp_path_factory):
    """Twelve feature files, one of them junk -> folder."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    for number in range(12):
        rows = rng.standard_normal((9, 8), dtype=np.float32)
        for step in range(8):  # the action moves the first two numbers, the others stay nearly as they are
            rows[step + 1, :6] = rows[step, :6] + 0.1 * rows[step + 1, :6] + np.pad(rows[step, 6:], (0, 4))
        np.save(folder / f"feature_{number}.npy", rows)
    (folder / "feature_3.npy").write_bytes(b"junk")
    (folder / "notes.mp4").write_bytes(b"not for this world")
    return folder


def feature_config(folder, out_dir, **overrides):
    base = dict(device="cpu", steps=8, num_workers=0, batch_size=4, log_every=1, val_clips=4, val_every=0, lr=1e-2)
    return FeatureConfig(data_root=str(folder), out_dir=str(out_dir), **{**base, **overrides})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_world_without_clips_reads_its_own_files(feature_folder, tmp_path, num_workers):
    """Junk is named, counted and replaced, with workers and without; another suffix is not looked at; losses fall."""
    cfg = feature_config(feature_folder, tmp_path, num_workers=num_workers, steps=60)
    assert V.train(cfg, world=Rollout) == 0
    rows = facts(tmp_path)
    bad = [json.loads(line) for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in bad] == ["feature_3.npy"] and rows[-2]["bad_files"] == 1
    losses = [row["loss_forced"] for row in rows if "loss_forced" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert "data: files, 11 train and 1 val" in (tmp_path / "train.log").read_text()


def test_such_a_world_needs_its_files(tmp_path):
    """No scenes stand in: without a folder, or with nothing in it that fits, the run is refused in one line."""
    with pytest.raises(V.UsageError, match=r"data_root = '': must name a folder or a list of files \.npy"):
        V.train(feature_config("", tmp_path / "run"), world=Rollout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(V.UsageError, match=r"no video matches '\*' among \.npy"):
        V.train(feature_config(tmp_path / "empty", tmp_path / "run"), world=Rollout)
    with pytest.raises(V.UsageError, match=r"absent: must name a folder or a list of files \.npy \(--data_root\)$"):
        V.train(feature_config(tmp_path / "absent", tmp_path / "run"), world=Rollout)
    assert not {"image_size", "decoder", "scenes", "enc_dim"} & V.field_types(FeatureConfig).keys()


class Loose(Features):
    """Features that do not look at what they read, with clips of another name, length or type among them."""

    def read_file(self, video, plan):
        number = int(re.search(r"\d+", video.name)[0])
        if number == 3:
            raise V.BadFile("junk")
        rows = torch.tensor(np.load(video.path))[: 3 if number == 1 else 4].to(torch.float64 if number == 2 else None)
        sample = self.blank(rows)
        return {"state" if number == 4 and key == "states" else key: value for key, value in sample.items()}


def test_a_file_of_another_form_is_a_bad_file(feature_folder):
    """Samples are stacked: what differs from `blank` in name, shape or type is named and replaced. Seen red without
    check_form: torch.stack ended the run with a traceback."""
    cfg = feature_config(feature_folder, "")
    data = Loose(cfg, V.list_data(cfg, Features), "", "train")
    bad = {name: reason for index in range(12) for name, reason in data[index]["bad"]}
    assert bad == {
        "feature_1.npy": "states is float32 [3, 6], and float32 [4, 6] in other samples",
        "feature_2.npy": "states is float64 [4, 6], and float32 [4, 6] in other samples",
        "feature_3.npy": "junk",
        "feature_4.npy": "states is absent, and float32 [4, 6] in other samples",
    }
    with pytest.raises(V.BadFile, match=r"x is a ndarray, which is no tensor, and absent in other samples"):
        data.check_form({**data.blank(), "x": np.zeros(3)})


class Marked(V.ClipDataset):
    """Clips with something of their own beside the frames."""

    def sample(self, index):
        content, number, bad = super().sample(index)
        return {**content, "mark": torch.tensor(index)}, number, bad

    def blank(self):
        return {**super().blank(), "mark": torch.tensor(0)}


@pytest.mark.parametrize(("kind", "made_up"), [("render", V.SceneDataset), ("random", V.NoiseDataset)])
def test_made_up_frames_come_in_a_world_s_own_samples(kind, made_up):
    """Seen red when SceneDataset and NoiseDataset took the place of the world's Dataset: `mark` was missing."""
    cfg, videos = small_config(), [V.VideoFile(f"scene_{number}", "") for number in range(4)]
    own = V.DataSource(kind, "", videos, videos, [], True, Marked).dataset(cfg, "train")
    plain = V.DataSource(kind, "", videos, videos, [], True).dataset(cfg, "train")
    assert isinstance(own, Marked) and type(plain) is made_up
    assert int(own[2]["mark"]) == 2 and torch.equal(own[2]["frames"], plain[2]["frames"])


class DecoderFit(V.Fit):
    """The decoder of a Decoded learns on cached latents."""

    KEYS = {"loss_decoded": "squared error of the decoded state"}

    def __init__(self, model, run, before):
        data = run.source.dataset(run.cfg, "train")
        with torch.no_grad():
            latents = torch.cat([model.encode(data[index]["states"]) for index in range(24)])
        super().__init__(model, "decoder", model.cfg.steps, 8, len(latents))
        self.latents = latents

    def batch(self, step=None):
        chosen = torch.arange(self.kept, len(self.latents))
        if step is not None:
            chosen = torch.randint(self.kept, (self.cfg.batch_size,), generator=self.rng(step))
        return {"latents": self.latents[chosen]}

    def forward(self, batch):
        loss = (self.model.decoder(batch["latents"]) - batch["latents"]).square().mean()
        return {"loss_total": loss, "loss_decoded": loss}, {}, {}


class Decoded(Rollout):
    """The same with a decoder that is fitted after training."""

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.decoder = nn.Linear(cfg.width, cfg.width).requires_grad_(False)

    def phases(self):
        return [("decoder", self.cfg.steps)]

    def phase_groups(self, name):
        return [V.param_group(self.cfg, "decay", list(self.decoder.parameters()), 1e-2)]

    def open_phase(self, name, run, before):
        return DecoderFit(self, run, before)


def test_a_world_fits_a_part_after_training_and_resumes_inside(feature_folder, tmp_path, monkeypatch):
    """Stopped in the middle of its own phase, the same config ends with the records and weights of an unbroken run."""
    whole = feature_config(feature_folder, tmp_path / "whole", ckpt_every=3)
    assert V.train(whole, world=Decoded) == 0
    losses = [row["loss_decoded"] for row in facts(tmp_path / "whole") if "loss_decoded" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    cut = feature_config(feature_folder, tmp_path / "cut", ckpt_every=3)
    stop_after_update(monkeypatch, lambda phase, step: phase.name and step == 4)
    assert V.train(cut, world=Decoded) == 75
    monkeypatch.undo()
    assert V.train(cut, world=Decoded) == 0
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    assert same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_schedules_buffers_and_frozen_parts_come_back(feature_folder, tmp_path, monkeypatch):
    """`step` reaches forward, a bool buffer is saved, a frozen bf16 part is saved as its hash alone, and another one is
    refused. Resumed to the bit."""
    whole = feature_config(feature_folder, tmp_path / "whole", reach=0.5, ckpt_every=3)
    assert V.train(whole, world=Rollout) == 0
    losses = [row["loss_total"] - row["loss_forced"] for row in facts(tmp_path / "whole")[:8]]
    assert all(abs(loss) < 1e-6 for loss in losses[:4]) and all(loss > 1e-3 for loss in losses[4:])
    cut, real = feature_config(feature_folder, tmp_path / "cut", reach=0.5, ckpt_every=3), V.take_step
    monkeypatch.setattr(V, "take_step", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or real(*args))
    assert V.train(cut, world=Rollout) == 75
    monkeypatch.undo()
    assert V.train(cut, world=Rollout) == 0
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    path = tmp_path / "cut" / "checkpoints" / "ckpt_final.pt"
    state = torch.load(path, weights_only=True)
    assert not any(name.startswith("backbone") for name in state["model"]) and state["frozen"].keys() == {"backbone"}
    assert state["model"]["seen"].tolist() == [True, True, False]
    model, _ = V.load_model(path)
    assert model.backbone.weight.dtype == torch.bfloat16 and model.seen.dtype == torch.bool
    monkeypatch.setattr(Rollout, "backbone_seed", 6)
    with pytest.raises(V.UsageError, match="the frozen weights of backbone are others"):
        V.load_model(path)
    with pytest.raises(V.UsageError, match="the frozen weights of backbone are others"):
        V.train(cut, world=Rollout)


def test_groups_decay_matrices_alone():
    """What NO_DECAY names, vectors and frozen parts are kept out of weight decay, frozen parts out of the optimizer."""
    model = Rollout(FeatureConfig()).train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in model.optimizer().param_groups}
    assert groups["decay"] == {"cell.weight_ih", "cell.weight_hh", "out.weight"}
    assert groups["no_decay"] == {"cell.bias_ih", "cell.bias_hh", "out.bias", "offset"}


def test_fingerprint_sees_every_type():
    """One bit of an odd bf16 tensor, of a bool, a byte or a double changes it. Seen red with int32 views alone."""
    model = nn.Module()
    for name, kind in (("bf16", torch.bfloat16), ("flag", torch.bool), ("whole", torch.uint8), ("wide", torch.float64)):
        model.register_buffer(name, torch.zeros(3, dtype=kind))
    before = V.fingerprint(model)
    for value in model.buffers():
        value[1] = 1
        assert V.fingerprint(model) != before
        value[1] = 0
    assert V.fingerprint(model) == before


class Normed(Rollout):
    """The same with a BatchNorm."""

    FROZEN = ()

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.backbone = nn.Identity()
        self.norm = nn.BatchNorm1d(cfg.width)

    def encode(self, states):
        return self.norm(states.flatten(0, 1)).unflatten(0, states.shape[:2])


def test_batchnorm_is_refused_where_ranks_would_differ(feature_folder, tmp_path):
    """One process may have it: passes that are thrown away leave its statistics alone. Several ranks may not."""
    cfg = feature_config(feature_folder, tmp_path)
    model = Normed(cfg)
    phase = new_phase(model, source=V.open_data(Normed, cfg, V.list_data(cfg, Features), True, lambda: None))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    V.throw_away_pass(phase.run, model, V.noise_batch(phase.run, 4))
    assert same_weights(before, model.state_dict())
    run = V.Run(cfg, cpu_process(world_size=2), None, None)
    with pytest.raises(V.UserError, match="norm is a BatchNorm that learns"):
        V.build_world(Normed, run)


# -- what a world may not do


def test_a_field_cannot_hide_what_a_config_computes():
    """A field called width would be the image's width. Seen red without __init_subclass__: clips of that width."""
    with pytest.raises(TypeError, match="a field must not be called width, which ClipConfig computes"):

        @dataclass
        class Hiding(V.ClipConfig):
            width: int = 3  # channels

    @dataclass
    class Odd(V.RunConfig):
        names: list = None  # not a flag

    with pytest.raises(
        TypeError, match=r"Odd\.names: a field is an int, float, str, bool or int \| tuple, not <class 'list'>"
    ):
        V.field_types(Odd)


class Undecorated(FeatureConfig):
    depth: int = 2  # no flag: @dataclass is missing


@dataclass
class Misnamed(FeatureConfig):
    PRESETS = {"tiny": {"widht": 3}}
    RANGES = {"lenght": (1, 9)}
    MUST_MATCH = ("hiden",)


@dataclass
class Weighed(FeatureConfig):
    lambda_roll: float = 1.0  # weight of the rollout


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"Config": Undecorated}, "Undecorated lacks @dataclass above it"),
        ({"Config": Misnamed}, "Misnamed has no field hiden, .* no field lenght, .* no field widht, which a table"),
        ({"Config": Weighed}, "lambda_roll weighs loss_roll, of which KEYS says nothing"),
        ({"Dataset": V.ClipDataset}, "FeatureConfig must derive from ClipConfig, or name a Dataset that reads other"),
        ({"FROZEN": "backbone"}, "FROZEN must be a tuple of names"),
    ],
)
def test_a_world_s_slips_are_told_when_it_is_defined(members, told):
    """Each was silent, or an AttributeError in the loop, at the first resume at the latest."""
    with pytest.raises(TypeError, match=f"^Slip: .*{told}"):
        type("Slip", (Rollout,), members)


@pytest.mark.parametrize("name", ["state", "groups", "report"])
def test_an_attribute_cannot_hide_what_the_loop_calls(name):
    """A child called state would be called as the hook, or the hook as the child. Seen red without __setattr__."""
    model = Rollout(FeatureConfig())
    with pytest.raises(TypeError, match=f"Rollout: an attribute must not be called {name}, which the loop calls"):
        setattr(model, name, nn.Linear(2, 2))


def test_a_parameter_in_no_group_is_told():
    """It would never learn, without a word. What needs no gradient may stay out."""

    class Partial(Rollout):
        def groups(self):
            return super().groups()[:1]

    model = Partial(FeatureConfig())
    with pytest.raises(ValueError, match=r"no group of Partial holds offset, cell\.bias_ih, cell\.bias_hh and 1 more"):
        model.optimizer()
    for name in ("offset", "cell.bias_ih", "cell.bias_hh", "out.bias"):
        model.get_parameter(name).requires_grad_(False)
    assert model.trained().keys() == {"cell.weight_ih", "cell.weight_hh", "out.weight"}
    model.optimizer()


def public(cls):
    """Names of the public members that a class itself defines; fields of a dataclass stand in docs/config.md."""
    return {name for name in vars(cls) if not name.startswith("_")} - getattr(cls, "__dataclass_fields__", {}).keys()


@pytest.mark.parametrize(
    ("title", "members"),
    [
        ("## World", public(V.World) | public(V.Fit)),
        ("## FileDataset", public(V.FileDataset)),
        ("## RunConfig", public(V.RunConfig)),
    ],
)
def test_page_of_worlds_names_every_member(title, members):
    """docs/worlds.md has a line for each member of the classes that a world derives from, and for nothing else."""
    text = (ROOT / "docs" / "worlds.md").read_text(encoding="utf-8").split(f"{title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", text, re.MULTILINE)
    assert {name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)} == members
    assert all(meaning.strip() for _, meaning in rows)


def test_a_snapshot_may_not_use_the_loop_s_names():
    """A world whose entry would replace one of the loop's is told so at its first save."""

    class Greedy(Rollout):
        def snapshot(self):
            return {"step": {}}

    run = new_phase(Greedy(FeatureConfig())).run
    with pytest.raises(ValueError, match="Greedy.snapshot: the loop itself uses the name step"):
        V.checkpoint_state(run)


def test_worlds_of_the_project_import_the_script_alone():
    """worlds/*.py: nothing of the project but VJepa_AUTO_V2, and no copy of its loop."""
    for path in (ROOT / "worlds").glob("*.py"):
        assert not re.search(r"^(from|import) (tools|tests|worlds)", path.read_text(), re.MULTILINE), path
    assert not math.isnan(len(TOY.read_text().splitlines())) and len(TOY.read_text().splitlines()) < 60


class Lazy(Rollout):
    """A world that reads a value while it is built, and has a part that no loss reaches."""

    FROZEN, calm = (), 0.0

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.backbone, self.idle = nn.Identity(), nn.Linear(2, 2)
        self.calm = torch.linspace(0, 1, 3)[1].item()

    def encode(self, states):
        return states


def test_a_world_that_reads_values_while_it_is_built_is_resumed(feature_folder, tmp_path):
    """.item() in __init__ is no damage of the checkpoint. Seen red with a template on the meta device alone."""
    cfg = feature_config(feature_folder, tmp_path, steps=2)
    assert V.train(cfg, world=Lazy) == 0
    assert V.load_model(tmp_path / "checkpoints" / "ckpt_final.pt", world=Lazy)[0].calm == 0.5


def test_a_part_without_gradient_is_named_where_ranks_would_wait_for_it(feature_folder, tmp_path):
    """One process lets it be; several are told before the first step. Seen red: an error in DDP's own words."""
    cfg = feature_config(feature_folder, tmp_path)
    phase = new_phase(Lazy(cfg), source=V.open_data(Lazy, cfg, V.list_data(cfg, Features), True, lambda: None))
    batch, wrapped = V.noise_batch(phase.run, 4), nn.Module()
    V.throw_away_pass(phase.run, phase.world, batch)
    wrapped.module = phase.world
    wrapped.forward = phase.world.forward
    phase.run.process.world_size = 2
    with pytest.raises(V.UserError, match="Lazy: idle.weight, idle.bias got no gradient; call requires_grad_"):
        V.throw_away_pass(phase.run, wrapped, batch)


@pytest.mark.parametrize("key", ["time", "lr", "clips"])
def test_a_key_of_the_loop_cannot_be_a_world_s(key):
    """What a world would log under a name of the loop would be overwritten without a word."""
    taken = type("Taken", (Rollout,), {"KEYS": {**Rollout.KEYS, key: "mine"}})
    with pytest.raises(TypeError, match=f"Taken: the loop itself logs {key}"):
        V.log_keys(taken)


# -- checkpoints of format 2


@pytest.fixture(scope="module")
def format_2(tmp_path_factory):
    """Checkpoints from before the file knew other worlds: of step 4 of 8, and after a flow phase -> folder."""
    folder = tmp_path_factory.mktemp("format_2")
    for name in ("running", "fitted"):
        content = lzma.decompress((ROOT / "tests" / "data" / f"format2_{name}.pt.xz").read_bytes())
        (folder / f"{name}.pt").write_bytes(content)
    return folder


def test_old_checkpoints_go_on_as_they_would_have(format_2, tmp_path, monkeypatch):
    """Steps 5 to 8 from a checkpoint of format 2 have the losses and gradient norms that the old file went on with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    state = torch.load(format_2 / "running.pt", weights_only=True)
    cfg = V.replace(
        V.saved_config(state, V.VJepaAutoV2), out_dir=str(tmp_path / "run"), resume=str(format_2 / "running.pt")
    )
    assert V.train(cfg) == 0
    rows = [row for row in facts(tmp_path / "run") if "loss_total" in row]
    assert [row["step"] for row in rows] == [5, 6, 7, 8]
    # logged by that file on an AVX-512 CPU; other CPUs add in another order
    assert [row["loss_total"] for row in rows] == pytest.approx([5.75081, 3.03572, 3.80792, 4.75744], rel=2e-3)
    assert [row["grad_norm"] for row in rows] == pytest.approx([104.735, 89.0096, 118.652, 95.2783], rel=2e-3)


def test_old_checkpoints_load_with_their_flow(format_2, tmp_path, capsys):
    """A finished run of format 2 is finished: its copy for SOON is there, and its flow phase is not done again."""
    path = format_2 / "fitted.pt"
    model, cfg = V.load_model(path)
    state = torch.load(path, weights_only=True)
    assert same_weights(model.soon_predictor.state_dict(), state["soon_predictor"])
    assert all(same_weights(getattr(model, name).state_dict(), state[name]) for name in model.NETWORKS)
    assert model.sample_futures(torch.zeros(1, cfg.now_frames, 3, 16, 16), 2).isfinite().all()
    upgraded = V.load_checkpoint(path)
    assert (upgraded["step"], upgraded["after"], V.phase_at(model.phases(), upgraded["after"])[0]) == (8, 5, "")
