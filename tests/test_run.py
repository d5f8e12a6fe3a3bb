"""The real command, what it leaves behind, and going on after an interruption as if nothing had happened."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, SHALLOW, V, small_config

STATE_KEYS = {
    "step",
    "cfg",
    "online",
    "predictor",
    "outcome",
    "flow",
    "flow_ema",
    "target",
    "opt",
    "scaler",
    "flow_stats",
    "outcome_queue",
    "rng",
    "consumed",
    "world_size",
    "source",
}
WALL_CLOCK = (
    "clips_per_s",
    "data_wait",
    "mem_gb",
    "time",
)  # the only logged values that may differ between two equal runs


def config(folder, out_dir, **overrides):
    """Eight steps with dropout and two mask draws on the scene folder: 7 train files, so an epoch ends in step 4."""
    base = dict(
        data_root=str(folder),
        out_dir=str(out_dir),
        steps=8,
        dropout=0.1,
        mask_draws=2,
        **SHALLOW,
        val_every=3,
        val_clips=2,
        picture=False,
    )
    return small_config(**{**base, **overrides})


def arguments(cfg, folder):
    """The command line of a config: a JSON file."""
    path = Path(folder) / "run.json"
    path.write_text(json.dumps(asdict(cfg)))
    return ["--config", str(path)]


def rows(out_dir):
    """metrics.jsonl -> list of dicts."""
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def facts(out_dir):
    """Every logged value that is not about wall-clock time, as text, so that nan equals nan."""
    return [json.dumps({key: value for key, value in row.items() if key not in WALL_CLOCK}) for row in rows(out_dir)]


def checkpoint(out_dir, name="ckpt_final.pt"):
    return torch.load(Path(out_dir) / "checkpoints" / name, map_location="cpu", weights_only=True)


def same(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def train_until(cfg, stop_after, number=signal.SIGTERM):
    """Run a config and send this process a signal in the given step -> exit code."""
    real, seen = V.take_step, []

    def stopping(phase, batches, step):
        result = real(phase, batches, step)
        seen.append(step)
        if step + 1 == stop_after:
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "take_step", stopping)
        return V.train(cfg)


@pytest.fixture(scope="module")
def straight(scene_folder, tmp_path_factory):
    """Eight steps in one go -> run folder."""
    out_dir = tmp_path_factory.mktemp("straight")
    assert V.train(config(scene_folder, out_dir)) == 0
    return out_dir


@pytest.fixture(scope="module")
def broken_off(scene_folder, tmp_path_factory):
    """The same run stopped in step 5 -> run folder, to be copied."""
    out_dir = tmp_path_factory.mktemp("broken_off")
    assert train_until(config(scene_folder, out_dir), 5) == 75
    return out_dir


@pytest.fixture
def to_resume(broken_off, tmp_path):
    """A fresh copy of the stopped run."""
    return shutil.copytree(broken_off, tmp_path / "copy")


# -- the command and its files


def spoken(argv, folder):
    """The command in this process, which has imported what it needs -> CompletedProcess with what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        code = V.main(argv)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", params=["here", pytest.param("apart", marks=pytest.mark.slow)])
def commanded(request, scene_folder, tmp_path_factory):
    """The real command, four steps with an evaluation, in this process and in one of its own -> (folder, finished
    process, config)."""
    folder = tmp_path_factory.mktemp("command")
    cfg = small_config(
        data_root=str(scene_folder), out_dir=str(folder / "run"), steps=4, val_every=2, val_clips=2, ckpt_every=2
    )
    argv = [*arguments(cfg, folder), "--seed", "7"]
    if request.param == "here":
        return folder / "run", spoken(argv, folder), cfg
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, cwd=folder, env=env)
    return folder / "run", done, cfg


def test_command_ends_well_and_writes_the_promised_files(commanded):
    """Exit 0, nothing on stderr, exactly the files of the contract."""
    out_dir, done, _ = commanded
    assert (done.returncode, done.stderr) == (0, "")
    files = {str(path.relative_to(out_dir)) for path in out_dir.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}" for name in ("ckpt_2.pt", "ckpt_final.pt", V.WRITTEN)}
    assert files == {"config.json", "train.log", "metrics.jsonl", "futures.png", "status.json", ".lease", *checkpoints}
    assert (out_dir / "train.log").read_text() == done.stdout  # no bar, no colour where there is no terminal


def test_command_says_what_it_runs_on(commanded):
    """The start-up lines: device, parameters, tokens, cost, memory, data, schedule, overrides, estimate; verdict."""
    _, done, _ = commanded
    for word in (
        "device: cpu",
        "fp32",
        "parameters: online",
        "96 tokens",
        "TFLOP",
        "GB per process",
        "data: videos, 7 train and 1 val",
        "warm-up 0 (warmup_steps 2 capped at a tenth of steps)",
        "seed=7",
        "first estimate:",
        "verdict:",
        "done: 4 steps",
    ):
        assert word in done.stdout, word


def test_an_end_without_time_is_cut_to_one_batch_and_one_clip(scene_folder, tmp_path, monkeypatch):
    """Evaluation and picture keep their time: one batch, one clip, a line each. Seen red: deadline ignored."""
    monkeypatch.setattr(V, "END_S", 0.0)
    assert V.train(config(scene_folder, tmp_path, steps=2, val_clips=8, picture=True)) == 0
    assert rows(tmp_path)[-1]["val_clips"] == 2  # one batch
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert "evaluation: its 0 s were over after 2 of 8 clips" in lines
    assert any(
        line.endswith("futures.png; its 0 s were over after 1 of 3 clips and a search among 2 of 256") for line in lines
    )


def test_an_end_with_time_sees_everything(scene_folder, tmp_path, monkeypatch):
    """All clips are evaluated and drawn, all of the bank is searched; its 256 clips are decoded once per file."""
    real, decoded = V.read_frames, {}
    monkeypatch.setattr(
        V,
        "read_frames",
        lambda path, plan, decoder: (
            decoded.get(path) if path in decoded else decoded.setdefault(path, real(path, plan, decoder))
        ),
    )
    monkeypatch.setattr(V, "END_S", 1e6)
    assert V.train(config(scene_folder, tmp_path, steps=2, val_clips=3, picture=True)) == 0
    assert rows(tmp_path)[-1]["val_clips"] == 4  # rounded up to full batches
    text = (tmp_path / "train.log").read_text()
    assert "evaluation: its" not in text and "futures.png\n" in text and "were over" not in text


def test_measured_time_to_finish_is_told_once(straight):
    """After the warm-up steps one line tells seconds per step and the time to go, whatever log_every is."""
    lines = [
        line
        for line in (straight / "train.log").read_text().splitlines()
        if " s per step: " in line and line.endswith(" to go")
    ]
    assert len(lines) == 1


def test_config_json_tells_how_the_run_was_made(commanded, capsys):
    """Versions, commit, command, data, the whole config; and --config takes the file again."""
    out_dir, _, cfg = commanded
    saved = json.loads((out_dir / "config.json").read_text())
    assert {"versions", "commit", "command", "data", "config"} <= set(saved)
    assert saved["versions"]["torch"] == torch.__version__ and {"python", "numpy", "av"} <= set(saved["versions"])
    assert saved["command"][-2:] == ["--seed", "7"] and saved["data"] == {
        "kind": "videos",
        "root": cfg.data_root,
        "train_files": 7,
        "val_files": 1,
    }
    again, _, _ = V.resolve_config(["--config", str(out_dir / "config.json")], V.VJepaAutoV2)
    assert json.loads(json.dumps(asdict(again))) == saved["config"] and again.seed == 7


def test_metrics_hold_every_key_of_the_log_table(commanded):
    """Each training record has the keys of LOG_KEYS in order, evaluations those of VAL_KEYS; console lines match."""
    out_dir, done, _ = commanded
    records = rows(out_dir)
    assert [row["step"] for row in records] == [1, 2, 2, 3, 4, 4]
    absent = ("phase", "loss_supcon", "passive_share", "soon_action_gain")
    for row in records:
        if "val_soon_skill" in row:
            assert list(row) == [
                "step",
                *(key for key in V.val_keys(V.VJepaAutoV2) if key.removeprefix("val_") not in absent),
            ]
        else:
            assert list(row) == [key for key in V.log_keys(V.VJepaAutoV2) if key not in absent]
        known = {
            key: value for key, value in row.items() if value == value and value is not None and key not in WALL_CLOCK
        }
        whole = [f"{key}:{V.format_number(value)}" for key, value in known.items()]
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith(f"step:{row['step']} ")]
        assert [line for line in lines if set(whole) <= set(line) and len(line) == len(row)]


def test_checkpoint_is_plain_tensors_and_values(commanded):
    """torch.load(weights_only=True) reads it; keys of the contract, of raw modules; source and config are inside."""
    out_dir, _, cfg = commanded
    state = checkpoint(out_dir)
    assert STATE_KEYS <= set(state) and state["step"] == 4 and state["consumed"] == 8 and state["world_size"] == 1
    assert state["source"] == SCRIPT.read_text(encoding="utf-8") and state["cfg"]["enc_dim"] == cfg.enc_dim
    model = V.VJepaAutoV2(cfg)
    for name in ("online", "predictor", "outcome", "flow", "flow_ema", "target"):
        assert set(state[name]) == set(getattr(model, name).state_dict())
    loaded, loaded_cfg = V.load_model(out_dir / "checkpoints/ckpt_final.pt")
    assert loaded_cfg.seed == 7 and same(loaded.online.state_dict(), state["online"]) and not loaded.training


def test_picture_opens(commanded):
    """futures.png is a picture of a plausible size with something drawn on it."""
    from PIL import Image

    with Image.open(commanded[0] / "futures.png") as image:
        image.load()
        assert image.format == "PNG" and 500 < image.width < 3000 and 800 < image.height < 6000
        assert (
            len(image.convert("L").histogram()) == 256 and len(set(image.resize((64, 64)).convert("L").tobytes())) > 20
        )


def test_bare_command_marks_built_in_scenes(tmp_path, capsys):
    """Without data_root record lines start with data:scenes, and config.json has the source. Seen red: mark empty."""
    cfg = small_config(out_dir=str(tmp_path / "run"), steps=2, picture=False, val_clips=2, **SHALLOW)
    assert V.main(arguments(cfg, tmp_path)) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "step:" in line and "loss" in line]
    assert (
        len(lines) == 3
        and all(line.startswith("data:scenes step:") for line in lines)
        and "built-in driving scenes" in text
    )
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["kind"] == "scenes"
    assert len(list((tmp_path / "run/scenes/videos").glob("*.mp4"))) == 8


def test_checkpoint_tells_its_data_source(tmp_path):
    """A model trained on built-in scenes says so in the checkpoint itself, not only in the log."""
    cfg = small_config(out_dir=str(tmp_path / "run"), steps=1, picture=False, val_clips=2, **SHALLOW)
    assert V.train(cfg) == 0
    state = checkpoint(tmp_path / "run")
    told = {key: value for key, value in state.items() if key not in ("cfg", "source")}
    inner = [value for part in told.values() if isinstance(part, dict) for value in part.values()]
    assert "scenes" in [value for value in [*told.values(), *inner] if isinstance(value, str)]


def test_progress_bar_only_on_a_terminal(tmp_path, capsys, monkeypatch):
    """Nothing where stdout is a file or a pipe; one rewritten line on a terminal. Seen red without the isatty test."""
    log = V.RunLog(small_config(out_dir=str(tmp_path)), True)
    log.bar(5, 10, "loss_total:1")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.bar(5, 10, "loss_total:1")
    log.line("next")
    out = capsys.readouterr().out
    assert (
        out.startswith("\r[############............] 5/10")
        and out.endswith("next\n")
        and (tmp_path / "train.log").read_text() == "next\n"
    )


def test_handlers_are_given_back(scene_folder, tmp_path):
    """After train() returns to Python, Ctrl-C and SIGTERM belong to their owner again."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert V.train(config(scene_folder, tmp_path / "run", steps=1)) == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_absent_tracker_is_named_in_one_line(scene_folder, tmp_path, capsys, monkeypatch, package):
    """--track with a package that is not installed: one line with its name, before any data is touched."""
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package, "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(V, "open_data", lambda *rest: pytest.fail("the package must be looked for before the data"))
    code = V.main([*arguments(config(scene_folder, tmp_path / "run", steps=1), tmp_path), "--track", package])
    err = capsys.readouterr().err
    assert (
        code in (1, 2)
        and err.startswith("error: ")
        and err.count("\n") == 1
        and package in err
        and "pip install" in err
    )


# -- resume


def test_stop_and_resume(straight, to_resume, scene_folder):
    """Stopped in step 5 of 8, started again: the same bits in every record and in the last checkpoint. Seen red with
    torch.set_rng_state removed, with consumed not read, and with the flow statistics left out of the checkpoint."""
    assert not (to_resume / "checkpoints/ckpt_final.pt").exists() and (to_resume / "checkpoints/ckpt_5.pt").is_file()
    assert facts(to_resume) == facts(straight)[:6]  # five steps and the evaluation after step 3
    assert V.train(config(scene_folder, to_resume)) == 0
    assert facts(to_resume) == facts(straight)
    ours, theirs = checkpoint(to_resume), checkpoint(straight)
    for name in STATE_KEYS - {"cfg", "source"}:
        assert same(ours[name], theirs[name]), name
    assert "resumed from" in (to_resume / "train.log").read_text()


def test_another_seed_differs(straight, scene_folder, tmp_path):
    """The comparison used here can see a difference: only then does equality mean something."""
    assert V.train(config(scene_folder, tmp_path, seed=1338, steps=2, val_every=0)) == 0
    assert facts(tmp_path)[0] != facts(straight)[0]
    assert len({row["loss_total"] for row in rows(straight) if "loss_total" in row}) == 8


@pytest.mark.parametrize(
    "stop_after, number, workers", [(2, signal.SIGUSR1, 0), (4, signal.SIGTERM, 2), (3, signal.SIGTERM, 0)]
)
def test_stop_and_resume_elsewhere(straight, scene_folder, tmp_path, stop_after, number, workers):
    """Early with SIGUSR1, across the epoch border with loader workers (the uninterrupted run had none), and just before
    an evaluation, which the next start makes up for. Seen red with that evaluation left out."""
    cfg = config(scene_folder, tmp_path, num_workers=workers)
    assert train_until(cfg, stop_after, number) == 75
    assert checkpoint(tmp_path, f"ckpt_{stop_after}.pt")["consumed"] == 2 * stop_after
    assert V.train(cfg) == 0
    assert facts(tmp_path) == facts(straight)
    assert same(checkpoint(tmp_path)["online"], checkpoint(straight)["online"])


def test_a_killed_run_repeats_from_its_checkpoint_and_no_step_twice(straight, scene_folder, tmp_path):
    """Died in step 7 without saving: goes on from ckpt_4, drops records of steps 5, 6, a torn line; ends the same."""
    cfg, real = config(scene_folder, tmp_path, ckpt_every=4), V.apply_step

    def dying(phase, carries, step):
        if step == 6:
            raise KeyboardInterrupt
        real(phase, carries, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "apply_step", dying)
        with pytest.raises(KeyboardInterrupt):
            V.train(cfg)
    assert [row["step"] for row in rows(tmp_path)][-1] == 6
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 7, "loss_to')
    (tmp_path / "checkpoints" / ".ckpt_8.pt.1.tmp").write_bytes(b"half")
    assert V.train(cfg) == 0
    seen = [(row["step"], "val_soon_skill" in row) for row in rows(tmp_path)]
    assert len(seen) == len(set(seen)) == 11 and facts(tmp_path) == facts(straight)
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))  # the torn temporary file is swept


def test_a_run_killed_in_an_evaluation_loses_no_step(straight, scene_folder, tmp_path):
    """Died in the evaluation after step 3: the checkpoint of that step was there, and the run goes on with what was
    due, to the same end. Seen red with the checkpoint written after the evaluation."""

    def dying(*args):
        raise KeyboardInterrupt

    cfg = config(scene_folder, tmp_path, ckpt_every=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "validate", dying)
        with pytest.raises(KeyboardInterrupt):
            V.train(cfg)
    assert [step for step, _ in V.checkpoint_files(tmp_path)] == [3]
    assert V.train(cfg) == 0
    assert facts(tmp_path) == facts(straight) and same(checkpoint(tmp_path)["online"], checkpoint(straight)["online"])


def forget_rng(monkeypatch):
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)


def forget_optimizer(monkeypatch):
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)


def forget_consumed(monkeypatch):
    real = V.load_checkpoint
    monkeypatch.setattr(V, "load_checkpoint", lambda *args, **kw: {**real(*args, **kw), "consumed": 0})


def after_restore(monkeypatch, spoil):
    real = V.VJepaAutoV2.restore
    monkeypatch.setattr(V.VJepaAutoV2, "restore", lambda model, state: (real(model, state), spoil(model)))


def forget_queue(monkeypatch):
    after_restore(monkeypatch, lambda model: (model.queue.zero_(), model.queue_filled.zero_()))


def forget_flow_stats(monkeypatch):
    after_restore(monkeypatch, lambda model: model.space.load_state_dict(V.FutureSpace(model.cfg).state_dict()))


def forget_target(monkeypatch):
    after_restore(monkeypatch, lambda model: model.target.load_state_dict(model.online.state_dict()))


def forget_flow_ema(monkeypatch):
    after_restore(monkeypatch, lambda model: model.flow_ema.load_state_dict(model.flow.state_dict()))


@pytest.mark.parametrize(
    "forget",
    [forget_rng, forget_optimizer, forget_consumed, forget_queue, forget_flow_stats, forget_target, forget_flow_ema],
)
def test_resume_that_forgets_something_shows(straight, to_resume, scene_folder, monkeypatch, forget):
    """Negative controls: each part of the state that is left out makes the comparison above fail."""
    forget(monkeypatch)
    assert V.train(config(scene_folder, to_resume)) == 0
    assert facts(to_resume)[:6] == facts(straight)[:6]
    assert facts(to_resume) != facts(straight)


@pytest.mark.slow
@pytest.mark.parametrize("forget", [False, True])
def test_loss_scale_survives_a_restart(scene_folder, tmp_path, monkeypatch, forget):
    """fp16 on the CPU: the scaler's state after a stop and a resume is that of a run in one go; left out, it is not."""
    monkeypatch.setattr(V, "amp_dtype", lambda cfg, device: torch.float16)
    monkeypatch.setattr(V, "amp_cost", lambda *_: 0.5)  # however slow this CPU is at it
    base = config(scene_folder, tmp_path / "one", amp=True)
    assert V.train(base) == 0
    cut = V.replace(base, out_dir=str(tmp_path / "cut"))
    assert train_until(cut, 4) == 75
    if forget:
        monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, state: None)
    assert V.train(cut) == 0
    whole, after = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "cut")
    assert whole["scaler"]["scale"] < 65536  # it starts there, and the first steps overflow
    assert (whole["scaler"] == after["scaler"]) is not forget
    assert forget or same(whole["online"], after["online"])


OF_THE_LAST_START = {"status.json", ".lease"}  # they tell of the start itself, a refused one included


def test_resume_with_another_config_is_refused(to_resume, scene_folder, tmp_path, capsys):
    """Exit 2, each field with both values, nothing of the old run touched. Seen red with enc_dim off the list."""
    before = {path: path.read_bytes() for path in to_resume.rglob("*") if path.is_file()}
    cfg = config(scene_folder, to_resume, enc_dim=96, seed=5)
    assert V.main(arguments(cfg, tmp_path)) == 2
    err = capsys.readouterr().err
    assert (
        "enc_dim = 96 (checkpoint: 48)" in err
        and "seed = 5 (checkpoint: 1337)" in err
        and err.count("\n") == 1
        and "--resume never" in err
    )
    after = {path: path.read_bytes() for path in to_resume.rglob("*") if path.is_file()}
    assert {
        path.name for path in after if after[path] != before.get(path)
    } <= OF_THE_LAST_START and after.keys() == before.keys()


@pytest.mark.parametrize(
    "change", [dict(lambda_flow=0.0), dict(lambda_eventually=0.0), dict(lambda_vjepa=0.0, lambda_soon=0.0)], ids=str
)
def test_resume_with_a_loss_switched_off_is_no_traceback(to_resume, scene_folder, tmp_path, capsys, change):
    """Switching a loss off changes which parameters are trained: it goes on, or is refused naming the field."""
    code = V.main(arguments(config(scene_folder, to_resume, **change), tmp_path))
    err = capsys.readouterr().err
    assert code == 0 or (code == 2 and err.startswith("error: ") and err.count("\n") == 1 and next(iter(change)) in err)


def test_resume_may_change_what_does_not_touch_the_weights(to_resume, scene_folder):
    """Learning rate, workers and log interval may change, and more steps may be asked for."""
    assert V.train(config(scene_folder, to_resume, lr=1e-5, num_workers=0, log_every=2, steps=10)) == 0
    assert [row["step"] for row in rows(to_resume) if "loss_total" in row] == [1, 2, 3, 4, 5, 6, 8, 10]


def test_resume_from_a_named_file(to_resume, straight, scene_folder, tmp_path):
    """--resume FILE goes on from that file in a new folder, and ends where the straight run ended."""
    cfg = config(scene_folder, tmp_path / "new", resume=str(to_resume / "checkpoints/ckpt_5.pt"))
    assert V.train(cfg) == 0
    assert facts(tmp_path / "new") == facts(straight)[6:]
    assert same(checkpoint(tmp_path / "new")["online"], checkpoint(straight)["online"])


def test_resume_from_an_absent_file(tmp_path, scene_folder, capsys):
    """A path that is not there is a usage error, not a fresh start."""
    cfg = config(scene_folder, tmp_path / "run", resume=str(tmp_path / "ckpt_9.pt"))
    assert V.main(arguments(cfg, tmp_path)) == 2
    assert "ckpt_9.pt: no such checkpoint" in capsys.readouterr().err and not (tmp_path / "run/metrics.jsonl").exists()


def test_going_back_to_an_older_checkpoint_is_not_undone(scene_folder, tmp_path):
    """--resume ckpt_1 in a folder with later ones: new checkpoints are kept, --resume auto follows the new branch."""
    changes = dict(steps=4, ckpt_every=1, val_every=0)
    assert V.train(config(scene_folder, tmp_path, keep_last=3, **changes)) == 0  # leaves 1, 2, 3 and final
    older = tmp_path / "checkpoints/ckpt_1.pt"
    assert train_until(config(scene_folder, tmp_path, resume=str(older), lr=1e-5, **changes), 2) == 75
    assert checkpoint(tmp_path, "ckpt_2.pt")["cfg"]["lr"] == 1e-5
    assert V.train(config(scene_folder, tmp_path, lr=1e-5, **changes)) == 0
    assert "ckpt_2.pt at step 2" in (tmp_path / "train.log").read_text()
    assert checkpoint(tmp_path)["cfg"]["lr"] == 1e-5 and [row["step"] for row in rows(tmp_path) if "lr" in row] == list(
        range(1, 5)
    )


def test_new_checkpoints_survive_older_leftovers(scene_folder, tmp_path):
    """keep_last drops the oldest in time, not what was just written, beside later steps of an abandoned branch."""
    V.train(config(scene_folder, tmp_path, ckpt_every=2, keep_last=2, val_every=0))  # leaves 4, 6 and final
    first = shutil.copy(tmp_path / "checkpoints/ckpt_4.pt", tmp_path / "kept.pt")
    state = {**checkpoint(tmp_path, "ckpt_4.pt"), "step": 2}
    torch.save(state, first)
    assert train_until(config(scene_folder, tmp_path, resume=str(first), keep_last=2), 3) == 75
    assert (tmp_path / "checkpoints/ckpt_3.pt").is_file()


def test_a_finished_run_that_was_extended_and_stopped_goes_on_from_the_stop(scene_folder, tmp_path):
    """ckpt_final of the shorter run must not hide the later ckpt_<step> of its extension."""
    assert V.train(config(scene_folder, tmp_path, steps=2, val_every=0)) == 0
    assert train_until(config(scene_folder, tmp_path, steps=4, val_every=0), 3) == 75
    assert V.train(config(scene_folder, tmp_path, steps=4, val_every=0)) == 0
    assert "at step 3" in (tmp_path / "train.log").read_text()


def test_resume_never_puts_the_old_run_aside(straight, scene_folder, tmp_path):
    """The old run lies whole under previous_1, the new one starts at step 1. Seen red with put_aside doing nothing."""
    run = shutil.copytree(straight, tmp_path / "run")
    old = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert V.train(config(scene_folder, run, resume="never", steps=2, seed=5)) == 0
    kept = run / "previous_1"
    aside = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert aside == {path: text for path, text in old.items() if path.name not in OF_THE_LAST_START}
    assert [row["step"] for row in rows(run) if "lr" in row] == [1, 2] and checkpoint(run)["step"] == 2


def test_resume_never_harms_no_foreign_file(scene_folder, tmp_path):
    """A folder checkpoints/ that holds other people's files keeps them, here or under previous_1."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/model_best.pth").write_bytes(b"weeks of work")
    assert V.train(config(scene_folder, tmp_path / "run", resume="never", steps=1)) == 0
    assert [path.read_bytes() for path in (tmp_path / "run").rglob("model_best.pth")] == [b"weeks of work"]


def test_resume_never_twice_after_one_was_deleted(scene_folder, tmp_path):
    """previous_<k> takes a free number even when an earlier one was deleted by hand."""
    (tmp_path / "previous_2").mkdir()
    for seed in (1, 2):
        assert V.train(config(scene_folder, tmp_path, resume="never", steps=1, seed=seed)) == 0
    assert len(list(tmp_path.glob("previous_*/checkpoints/ckpt_final.pt"))) == 1


def test_keep_last(scene_folder, tmp_path):
    """keep_last numbered checkpoints beside the final one. Seen red with the deletion removed."""
    assert V.train(config(scene_folder, tmp_path, steps=5, ckpt_every=1, keep_last=2, val_every=0)) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        V.WRITTEN,
        "ckpt_3.pt",
        "ckpt_4.pt",
        "ckpt_final.pt",
    ]


def test_a_finished_run_started_again_does_no_harm(straight, scene_folder, tmp_path):
    """Exit 0, the same weights, the same records, none twice."""
    run = shutil.copytree(straight, tmp_path / "run")
    assert V.train(config(scene_folder, run)) == 0
    assert same(checkpoint(run)["online"], checkpoint(straight)["online"])
    assert facts(run) == facts(straight)


def test_seconds_add_up_over_restarts(to_resume, scene_folder):
    """`time` goes on from the first run's; it never falls."""
    assert V.train(config(scene_folder, to_resume)) == 0
    times = [row["time"] for row in rows(to_resume) if "time" in row]
    assert times == sorted(times) and len(times) == 8


# -- saving


def test_save_is_atomic(tmp_path, monkeypatch):
    """Writing that breaks off half-way leaves the old checkpoint readable, no rubbish. Seen red: plain torch.save."""
    cfg = small_config()
    state = {"step": 4, "online": {"weight": torch.ones(100)}}
    V.save_checkpoint(state, tmp_path, cfg, final=True)

    def half(state, handle):
        handle.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        V.save_checkpoint({"step": 5, "online": {}}, tmp_path, cfg, final=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [V.WRITTEN, "ckpt_final.pt"]
    assert same(checkpoint(tmp_path), state) and V.damage_of(tmp_path / "checkpoints/ckpt_final.pt") == ""


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    """With keep_last 1 and a disk that fills, the last good checkpoint stays."""
    cfg = small_config(keep_last=1)
    V.save_checkpoint({"step": 4}, tmp_path, cfg, final=False)
    monkeypatch.setattr(
        torch, "save", lambda state, handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        V.save_checkpoint({"step": 5}, tmp_path, cfg, final=False)
    assert checkpoint(tmp_path, "ckpt_4.pt") == {"step": 4}


def test_full_disk_is_one_line(scene_folder, tmp_path, capsys, monkeypatch):
    """A disk that fills while the run saves ends it with exit 1 and one line, not a traceback."""

    def full(state, handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert V.main(arguments(config(scene_folder, tmp_path / "run", steps=2), tmp_path)) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "No space left" in err


@pytest.mark.slow
def test_a_compiled_run_saves_the_keys_of_the_raw_modules(scene_folder, tmp_path, monkeypatch):
    """No _orig_mod. or module. in any key; an uncompiled run goes on from it. Seen red with torch.compile(model)."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options)
    )  # needs no C++ compiler
    assert train_until(config(scene_folder, tmp_path, steps=3, compile=True, val_every=0), 2) == 75
    state = checkpoint(tmp_path, "ckpt_2.pt")
    names = [name for part in ("online", "predictor", "outcome", "flow", "flow_ema", "target") for name in state[part]]
    assert names and not [name for name in names if "_orig_mod" in name or name.startswith("module.")]
    assert V.train(config(scene_folder, tmp_path, steps=3, val_every=0)) == 0
    assert "at step 2" in (tmp_path / "train.log").read_text()


# -- steps that are not finite


def poison(monkeypatch, calls, seen=None):
    """Make the batches of some steps nan, counted from 0; `seen` collects the weights at the start of every step."""
    real_device, real_step, count = V.to_device, V.take_step, [0]

    def to_device(batch, device):
        batch, number = real_device(batch, device), count[0]
        if number in calls:
            batch["frames"] = torch.full(batch["frames"].shape, float("nan"))
        return batch

    def take_step(phase, *rest):
        if seen is not None:
            seen.append({name: value.clone() for name, value in phase.world.state_dict().items()})
        result = real_step(phase, *rest)
        count[0] += 1
        return result

    monkeypatch.setattr(V, "to_device", to_device)
    monkeypatch.setattr(V, "take_step", take_step)


def test_a_step_that_is_not_finite_changes_nothing(scene_folder, tmp_path, monkeypatch):
    """Weights, EMA, queue and flow statistics stay, the step is counted, the run goes on. Seen red: no check."""
    seen = []
    poison(monkeypatch, {2}, seen)
    assert V.train(config(scene_folder, tmp_path, steps=5, val_every=0, log_every=5)) == 0
    assert same(seen[2], seen[3]) and not same(seen[1], seen[2]) and not same(seen[3], seen[4])
    assert [(row["step"], row["skipped_steps"]) for row in rows(tmp_path) if "lr" in row] == [
        (1, 0),
        (5, 1),
    ]  # the first step is always told
    assert all(torch.isfinite(value).all() for value in checkpoint(tmp_path)["online"].values())
    assert "step 3 skipped" in (tmp_path / "train.log").read_text()


def test_a_skipped_step_can_be_logged(scene_folder, tmp_path, monkeypatch):
    """A log line due in a skipped step shows what was not finite instead of ending the run."""
    poison(monkeypatch, {1})
    assert V.train(config(scene_folder, tmp_path, steps=3, val_every=0)) == 0
    assert [row["skipped_steps"] for row in rows(tmp_path) if "lr" in row] == [0, 1, 1]


def test_skipped_steps_are_counted_over_restarts(scene_folder, tmp_path, monkeypatch):
    """`skipped_steps` says "so far": a restart does not set it back to zero."""
    poison(monkeypatch, {1})
    assert train_until(config(scene_folder, tmp_path, steps=5, val_every=0, log_every=5), 3) == 75
    monkeypatch.undo()
    assert V.train(config(scene_folder, tmp_path, steps=5, val_every=0)) == 0
    assert [row["skipped_steps"] for row in rows(tmp_path) if "lr" in row] == [
        0,
        1,
        1,
        1,
    ]  # steps 1, 4 and 5, and the stop logs step 3


def test_too_many_skipped_steps_in_a_row_stop_the_run(scene_folder, tmp_path, capsys, monkeypatch):
    """Three allowed: two in a row, a good one, then three. Exit 1, one line, the last checkpoint holds no nan."""
    poison(monkeypatch, {1, 2, 4, 5, 6})
    cfg = config(scene_folder, tmp_path / "run", steps=20, max_skipped_steps=3, ckpt_every=4, val_every=0, log_every=20)
    assert V.main(arguments(cfg, tmp_path)) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: 3 steps in a row were not finite") and err.count("\n") == 1
    assert all(torch.isfinite(value).all() for value in checkpoint(tmp_path / "run", "ckpt_4.pt")["online"].values())
    assert "step 7 skipped" in (tmp_path / "run/train.log").read_text()


def test_metrics_are_strict_json(straight):
    """No NaN or Infinity, which are not JSON: other programs read metrics.jsonl."""
    for line in (straight / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name, line=line: pytest.fail(f"{name} in {line[:60]}"))


# -- the real command, stopped for real


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_real_signal_to_the_real_command(scene_folder, tmp_path, number):
    """A process with two workers is signalled from outside: exit 75, saved, and the same command finishes the run."""
    cfg = config(scene_folder, tmp_path / "run", steps=60, num_workers=2, log_every=5)
    command = [sys.executable, str(SCRIPT), *arguments(cfg, tmp_path)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in run.stdout:
        if "step:10 " in line:
            run.send_signal(number)
            break
    rest, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (75, "") and "saved; run the same command to go on" in rest
    assert list((tmp_path / "run/checkpoints").glob("ckpt_*.pt"))
    again = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (again.returncode, again.stderr) == (0, "") and "resumed from" in again.stdout
    steps = [(row["step"], "val_soon_skill" in row) for row in rows(tmp_path / "run")]
    assert len(steps) == len(set(steps))
    assert V.train(config(scene_folder, tmp_path / "straight", steps=60, log_every=5)) == 0
    assert same(checkpoint(tmp_path / "run")["online"], checkpoint(tmp_path / "straight")["online"])


@pytest.mark.slow
def test_tensorboard_gets_the_records(scene_folder, tmp_path):
    """With the package installed, event files appear in the run folder."""
    pytest.importorskip("tensorboard")
    assert V.train(config(scene_folder, tmp_path, steps=2, track="tensorboard")) == 0
    assert list((tmp_path / "tensorboard").glob("events*"))
