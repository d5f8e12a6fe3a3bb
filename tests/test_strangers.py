"""Nothing of the user's is ever deleted or overwritten: files of others in every folder that the project writes to
outlive every command.

The rule: what the project deletes it can prove to have made (a numbered checkpoint by the SHA-256 on record beside
it, a temporary file by a run's own name for it), and what stands under a name that it writes is moved to previous_<k>
unless it bears its mark.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, V, small_config
from test_evaluate import SMALL, E
from test_faults import small_state

OURS = (
    "futures.png",
    "evaluation.json",
    "evaluation.html",
    "probe_drive.json",
    "summary.json",
    "summary.md",
    "split.json",
    "rollout.mp4",
    "frames.png",
    "latents.png",
    "fan.png",
    "ckpt_7.pt",
    "ckpt_2.pt.sha256",
)  # names that some command writes
FOREIGN = (
    "mine.txt",
    ".x.tmp",
    ".mine.pt.1.tmp",
    "a.sha256",
    "model_best.pth",
    ".writable",
    "scene_000001.mp4.tmp",
    "mine/deep.mp4",
    "mine/ckpt_1.pt",
)


def load_tool(name):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def plant(*folders, names=(*OURS, *FOREIGN)):
    """A user's files in each folder, where nothing else stands -> {path: bytes}."""
    planted = {}
    for folder in map(Path, folders):
        for name in names:
            path = folder / name
            if os.path.lexists(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"the user's own {path}".encode())
            planted[path] = path.read_bytes()
    return planted


def check(planted, root):
    """Every planted file has its bytes where it was, or under its name in a folder previous_<k> of the same folder."""
    for path, content in planted.items():
        places = [path, *path.parent.glob(f"previous_*/{path.name}")]
        # --resume never puts the checkpoints of the old run aside as a whole, with what stands among them
        places += [place for aside in Path(root).rglob("previous_*") for place in aside.rglob(path.name)]
        assert any(place.is_file() and place.read_bytes() == content for place in places), f"{path} is gone"


# -- scenes


def make(tmp_path, **overrides):
    """The built-in scenes of a run in tmp_path -> DataSource."""
    cfg = small_config(**{**dict(out_dir=str(tmp_path), image_size=16, scene_clips=4), **overrides})
    return V.open_data(V.VJepaAutoV2, cfg, V.list_data(cfg), True, lambda: None)


@pytest.mark.parametrize(
    "what",
    [
        "files",
        "a setting of make_scenes",
        "another setting",
        "a file",
        "a dead link",
        "no scenes.json",
        "a torn scenes.json",
        "a scenes.json that is a folder",
    ],
)
def test_a_folder_scenes_of_others_is_left_alone(tmp_path, what):
    """The run takes another folder, the same one each time. Seen red: rmtree of the whole folder, exit 0."""
    folder = tmp_path / "scenes"
    if what == "a file":
        folder.write_text("mine")
    elif what == "a dead link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        (folder / "videos").mkdir(parents=True)
        (folder / "videos" / "holiday.mp4").write_bytes(b"irreplaceable")
        (folder / "videos" / "scene_000001.mp4").write_bytes(b"irreplaceable as well")
    if what in ("a setting of make_scenes", "another setting"):
        (folder / "scenes.json").write_text(
            '{"seed": 1}' if what == "another setting" else '{"seed": 1337, "siblings": 1}'
        )
    elif what == "a torn scenes.json":
        (folder / "scenes.json").write_bytes(b"\xff\0")
    elif what.endswith("folder"):
        (folder / "scenes.json").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sources = [make(tmp_path), make(tmp_path)]
    assert {path: path.read_bytes() for path in before} == before and os.path.lexists(folder)
    assert len({source.root for source in sources}) == 1 and Path(sources[0].root).name.startswith("scenes_")
    assert len(list(Path(sources[0].root).glob("videos/*.mp4"))) == 4
    (note,) = V.data_notes(small_config(out_dir=str(tmp_path)), V.Listing(), sources[0])
    assert "stays as it is" in note and sources[0].root in note


def test_strangers_among_the_scenes_stay_and_do_not_train(tmp_path):
    """A user's video in the run's own scenes/videos is no scene; a scene that went missing is written again."""
    source = make(tmp_path)
    folder = tmp_path / "scenes"
    planted = plant(folder, folder / "videos", folder / "annotations", names=FOREIGN)
    before = (folder / "videos/scene_000002.mp4").read_bytes()
    (folder / "videos/scene_000002.mp4").unlink()
    again = make(tmp_path)
    assert (again.root, again.train, again.val) == (source.root, source.train, source.val) and len(
        again.train + again.val
    ) == 4
    assert (folder / "videos/scene_000002.mp4").read_bytes() == before
    check(planted, tmp_path)
    assert (
        make(tmp_path, scene_clips=5).root != source.root and make(tmp_path).root == source.root
    )  # two settings, two folders


def test_writing_scenes_hears_a_stop(tmp_path):
    """Stopped between two scenes; the next call goes on with the same bytes and renders nothing twice. Seen red: no
    such parameter."""
    cfg, asked = small_config(image_size=16, scene_clips=6), []
    V.write_scenes(tmp_path / "straight", cfg)
    with pytest.raises(V.Stopped):
        V.write_scenes(tmp_path / "cut", cfg, lambda: asked.append(1) or len(asked) > 3)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("scene_*")}
    assert len(first) == 6  # three scenes
    assert V.write_scenes(tmp_path / "cut", cfg) == tmp_path / "cut"
    for path in (tmp_path / "straight").rglob("*.*"):
        other = tmp_path / "cut" / path.relative_to(tmp_path / "straight")
        assert (
            other.read_bytes() == path.read_bytes()
            and first.get(path.name, 0) in (0, other.stat().st_mtime_ns)
            or path.name not in first
        )
    assert not list((tmp_path / "cut").rglob(".*"))


# -- checkpoints


def test_checkpoints_of_others_are_neither_dropped_nor_overwritten(tmp_path):
    """A ckpt_7.pt that is not on record, a copy of one of ours, and files where ours belong. Seen red: dropped by
    keep_last, overwritten by the save."""
    cfg, folder = small_config(keep_last=1), tmp_path / "checkpoints"
    V.save_checkpoint(small_state(3), tmp_path, cfg, False)
    planted = plant(folder)
    copied = (folder / "ckpt_3.pt").read_bytes()
    (folder / "ckpt_1.pt").write_bytes(copied)
    (folder / "ckpt_4.pt").write_bytes(b"mine")
    (folder / "ckpt_4.pt.sha256").write_text(f"{'0' * 64}  ckpt_4.pt\n")
    planted |= {folder / "ckpt_1.pt": copied, folder / "ckpt_4.pt": b"mine"}
    for step in (2, 7, 8, 9):
        V.save_checkpoint(small_state(step), tmp_path, cfg, False)
    check(planted, tmp_path)
    assert (folder / "ckpt_1.pt").is_file() and (folder / "ckpt_4.pt").read_bytes() == b"mine"
    assert {path.name for path in folder.glob("ckpt_*.pt")} == {"ckpt_1.pt", "ckpt_4.pt", "ckpt_9.pt"}
    assert all(V.load_checkpoint(path)["step"] == 9 for path in [folder / "ckpt_9.pt"])


def test_a_renamed_checkpoint_overwrites_nobodys(tmp_path):
    """ckpt_final that becomes ckpt_6 where a user's ckpt_6.pt lies. Seen red: overwritten."""
    V.save_checkpoint(small_state(6), tmp_path, small_config(), True)
    folder = tmp_path / "checkpoints"
    planted = plant(folder, names=("ckpt_6.pt", "ckpt_6.pt.sha256"))
    V.move_checkpoint(folder / "ckpt_final.pt", folder / "ckpt_6.pt")
    assert V.load_checkpoint(folder / "ckpt_6.pt")["step"] == 6
    check(planted, tmp_path)


def test_the_sweep_takes_only_what_writers_left(tmp_path):
    """Temporary files under a run's own names go, all else stays. Seen red: .x.tmp and a.sha256 deleted."""
    left = [".config.json.7.tmp", "checkpoints/.ckpt_8.pt.1.tmp", "checkpoints/..written.json.12.tmp"]
    (tmp_path / "checkpoints").mkdir()
    for name in left:
        (tmp_path / name).write_text("half")
    planted = plant(tmp_path, tmp_path / "checkpoints")
    (tmp_path / "checkpoints/.folder.tmp").mkdir()
    V.sweep_folder(tmp_path)
    check(planted, tmp_path)
    assert not [name for name in left if (tmp_path / name).exists()] and (tmp_path / "checkpoints/.folder.tmp").is_dir()


# -- the commands


def test_what_stands_under_our_names_is_moved_aside(tmp_path, capsys):
    """write_own replaces what bears the mark and moves anything else, folders too, and says so."""
    for name in ("report.json", "folder.json"):
        planted = plant(tmp_path, names=("report.json", "folder.json/deep"))
        for number in range(2):
            report = json.dumps({"made_by": V.MARK, "number": number}).encode()
            V.write_own(tmp_path / name, lambda handle, report=report: handle.write(report))
        assert json.loads((tmp_path / name).read_text())["number"] == 1
    assert (tmp_path / "previous_1/report.json").read_bytes() == planted.get(
        tmp_path / "report.json", (tmp_path / "previous_1/report.json").read_bytes()
    )
    assert (tmp_path / "previous_2/folder.json/deep").is_file() and capsys.readouterr().err.count(
        "was not written by a run"
    ) == 2


def settings(scene_folder, folder, **overrides):
    """A short run in this folder."""
    return small_config(
        **{
            **dict(
                data_root=str(scene_folder),
                out_dir=str(folder),
                steps=4,
                val_clips=2,
                ckpt_every=1,
                keep_last=1,
                lambda_flow=1.0,
            ),
            **overrides,
        }
    )


@pytest.mark.faults
def test_training_harms_no_stranger(scene_folder, tmp_path):
    """A fresh folder with a user's files under all names of a run; a used one; --resume never; scenes; each leaves
    every byte. Seen red: config.json, metrics.jsonl, futures.png and scenes/ were overwritten or removed."""
    run = tmp_path / "run"
    planted = plant(run, names=(*OURS, *FOREIGN, *V.RUN_FILES))
    planted |= plant(run / "checkpoints", names=("mine.txt", "a.sha256", ".x.tmp", "mine/ckpt_1.pt")) | plant(
        run / "scenes", run / "scenes/videos"
    )
    plain = dict(picture=False)
    for overrides in (
        dict(),
        dict(steps=6),
        dict(steps=2, resume="never", **plain),
        dict(steps=3, data_root="", **plain),
        dict(steps=4, data_root="", resume="never", **plain),
    ):
        assert V.train(settings(scene_folder, run, **overrides)) == 0
        check(planted, tmp_path)
        (run / "futures.png").unlink(missing_ok=True)
        planted |= plant(run, run / "checkpoints", run / "scenes", *run.glob("scenes_*"), *run.glob("scenes_*/videos"))
    assert {path.name for path in run.glob("scenes*")} > {"scenes"}


@pytest.mark.faults
def test_tools_harm_no_stranger(scene_folder, tmp_path, capsys):
    """evaluate, futures, make_scenes and prove over folders with a user's files. Seen red: evaluation.json,
    frames.png, split.json and summary.md overwritten."""
    futures, scenes, prove = map(load_tool, ("futures", "make_scenes", "prove"))
    run = tmp_path / "run"
    cfg = settings(
        scene_folder, run, scenes="render", data_root="", num_frames=12, steps=2, scene_clips=16, val_clips=2
    )
    assert V.train(cfg) == 0
    planted = plant(run, run / "checkpoints", run / "futures", tmp_path / "record")
    checkpoint = str(run / "checkpoints/ckpt_final.pt")
    assert (
        E.run(
            E.parse(
                [
                    "--ckpt",
                    checkpoint,
                    "--data_root",
                    str(scene_folder),
                    "--split",
                    "all",
                    "--num_workers",
                    "0",
                    "--device",
                    "cpu",
                ]
            ),
            SMALL,
        )
        == 0
    )
    check(planted, tmp_path)
    assert (
        futures.main(
            ["--ckpt", checkpoint, "--minutes", "0.01", "--num_samples", "2", "--num_workers", "0", "--device", "cpu"]
        )
        == 0
    ), capsys.readouterr().err
    check(planted, tmp_path)
    made = tmp_path / "made"
    command = [
        "--out",
        str(made),
        "--num",
        "4",
        "--size",
        "32",
        "--num_frames",
        "12",
        "--soon_frames",
        "4",
        "--workers",
        "1",
    ]
    args = scenes.parse(command)
    scenes.open_folder(made, scenes.settings_of(scenes.make_config(args), args))
    planted |= plant(made, made / "videos", made / "annotations") | plant(made / "videos", names=("scene_000002.mp4",))
    for index in range(4):
        scenes.write_one((made, scenes.make_config(args), index, 0, scenes.scene_name(index, 0, 1)))
    scenes.write_split(made, scenes.make_config(args), 1)
    check(planted, tmp_path)
    planted |= plant(tmp_path, names=("sheet.png", "record/seed_3/config.json"))
    assert scenes.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "run", lambda command: 1.0)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/seed_3").symlink_to(run)
        assert prove.main(["--out", str(tmp_path / "record"), "--run_dir", str(tmp_path / "runs"), "--seeds", "3"]) == 0
    check(planted, tmp_path)


def test_no_command_removes_whole_folders():
    """rmtree stands nowhere in the project, and every unlink is one of those that the rule allows."""
    allowed = {
        "temporary.unlink(missing_ok=True)",
        "self.temporary.unlink(missing_ok=True)",  # of the frame cache: it holds the file open, and it is the same one
        "stale.unlink(missing_ok=True)",
        "old.unlink()",
        "own.unlink()",  # of prepare_videos.py: bears its mark, or has the SHA-256 of the copy that is on record
        "path.unlink()",
        "shard.unlink()",  # of a sharded checkpoint, of the size and time that are on record
        'path.with_suffix(".bad").unlink(missing_ok=True)',  # the cache's own word on a window that now has latents
        'folder.with_suffix(".bad").unlink(missing_ok=True)',  # the same, on a clip
        "stale.rmdir() if stale.is_dir() else stale.unlink(missing_ok=True)",  # its own hidden .tmp, empty folders
    }  # path: in the fuzzer's own temporary folder
    for path in (ROOT / "VJepa_AUTO_V2.py", *sorted((ROOT / "tools").glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        assert "rmtree" not in text and "os.remove" not in text, path
        calls = {line.strip() for line in text.splitlines() if "unlink(" in line}
        assert calls <= allowed, calls - allowed
