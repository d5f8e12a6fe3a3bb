"""Everything a user can get wrong ends in one clear line on stderr and the promised exit code, never in a traceback."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHALLOW, V, small_config


def run(capsys, tmp_path, **overrides):
    """Run the command in this process -> (exit code, stdout, stderr)."""
    cfg = small_config(
        **{**dict(out_dir=str(tmp_path / "run"), steps=2, picture=False, val_clips=2, **SHALLOW), **overrides}
    )
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(asdict(cfg)))
    code = V.main(["--config", str(path)])
    return code, *capsys.readouterr()


def one_line(err):
    """Check that stderr is a single error line -> that line. What the decoder's C++ side prints does not count."""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, err
    return err


def bad_files(folder):
    """bad_files.jsonl -> {path: reason}."""
    return {
        row["path"]: row["reason"]
        for row in map(json.loads, (Path(folder) / "bad_files.jsonl").read_text().splitlines())
    }


def write_audio(path):
    """A second of sound and no picture."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


# -- data


def test_wrong_data_root(capsys, tmp_path):
    """Exit 2, the path and what to do instead; no run folder appears."""
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "absent"))
    assert code == 2 and "absent: no such file or folder" in one_line(err) and not (tmp_path / "run").exists()


def test_data_root_of_another_kind(capsys, tmp_path):
    """A file that is neither a video nor a list is refused by name."""
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "notes.pdf"))
    assert code == 2 and "notes.pdf: neither a folder, a video, nor a csv, txt or jsonl list" in one_line(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_data_root(capsys, tmp_path):
    """A folder without permission is named, not taken for an empty one."""
    (tmp_path / "locked").mkdir(mode=0o000)
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "locked"))
    assert code == 2 and "not readable" in one_line(err)


def test_empty_folder_warns_and_trains_on_marked_scenes(capsys, tmp_path):
    """The loop still runs, says so loudly, and marks every record. Seen red with the warning removed."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("no video")
    code, out, err = run(capsys, tmp_path, data_root=str(tmp_path / "empty"))
    assert (code, err) == (0, "") and "WARNING: no video under" in out
    lines = [line for line in out.splitlines() if " loss_total:" in f" {line}" or "val_loss_soon:" in line]
    assert len(lines) == 3 and all(line.startswith("data:scenes ") for line in lines)


def test_empty_folder_is_refused_if_so_asked(capsys, tmp_path):
    """--missing_data error: exit 2, one line with the folder and the pattern, nothing written."""
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "empty"), missing_data="error", video_glob="*.mkv")
    assert (
        code == 2
        and "no video matches '*.mkv'" in one_line(err)
        and "--video_glob" in err
        and not (tmp_path / "run").exists()
    )


def test_empty_folder_may_give_random_pixels_marked(capsys, tmp_path):
    """--missing_data random trains on noise only because it was asked for, and says so on every record."""
    (tmp_path / "empty").mkdir()
    code, out, _ = run(capsys, tmp_path, data_root=str(tmp_path / "empty"), missing_data="random")
    assert code == 0 and out.count("data:random step:") == 3


@pytest.fixture
def mixed_folder(scene_folder, tmp_path):
    """Eight good videos beside an empty, a truncated, a sound-only, a garbage and a text file, all named .mp4."""
    folder = shutil.copytree(scene_folder, tmp_path / "mixed") / "videos"
    good = sorted(folder.glob("*.mp4"))[0].read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (folder / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    write_audio(folder / "sound.mp4")
    return folder.parent


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named_counted_and_replaced(capsys, tmp_path, mixed_folder, workers):
    """Exit 0; bad files once in bad_files.jsonl with a reason; records hold the count. Seen red: BadFile ignored."""
    code, out, err = run(
        capsys, tmp_path, data_root=str(mixed_folder), steps=8, val_clips=4, val_fraction=0.3, num_workers=workers
    )
    assert (code, err) == (0, "")
    named = bad_files(tmp_path / "run")
    assert set(named) == {"zero.mp4", "truncated.mp4", "garbage.mp4", "text.mp4", "sound.mp4"}
    assert (
        "0 bytes" in named["zero.mp4"]
        and "no video stream" in named["sound.mp4"]
        and all(len(reason) > 5 for reason in named.values())
    )
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [row["bad_files"] for row in records if "bad_files" in row]
    assert counts == sorted(counts) and counts[-1] >= 3
    assert (
        out.count("bad file: zero.mp4: ") == 1 and len((tmp_path / "run/bad_files.jsonl").read_text().splitlines()) == 5
    )


def test_a_restart_counts_bad_files_once(capsys, tmp_path, mixed_folder):
    """What was named before a restart is known after it: no second line, no smaller count."""
    settings = dict(data_root=str(mixed_folder), val_clips=4, val_fraction=0.3)
    assert run(capsys, tmp_path, steps=8, **settings)[0] == 0
    before = bad_files(tmp_path / "run")
    assert run(capsys, tmp_path, steps=9, **settings)[0] == 0
    assert bad_files(tmp_path / "run") == before and len(
        (tmp_path / "run/bad_files.jsonl").read_text().splitlines()
    ) == len(before)
    last = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "bad_files" in line
    ][-1]
    assert (last["step"], last["bad_files"]) == (9, 5)


@pytest.mark.parametrize("limit", [0.5, 0.99])
def test_all_files_bad(capsys, tmp_path, limit):
    """Exit 1, one line with a name and its reason, whatever share is allowed; nothing was trained on blank frames."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(bytes([number]) * 999)
    code, _, err = run(capsys, tmp_path, data_root=str(folder), max_bad_fraction=limit)
    assert code == 1 and "cannot be decoded" in one_line(err) and ".mp4: " in err and "bad_files.jsonl" in err
    assert len(bad_files(tmp_path / "run")) >= 3 and not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/metrics.jsonl").exists() or (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_no_good_training_file_stops_the_run(capsys, tmp_path, scene_folder):
    """Black frames never stand in for training clips: exit 1, one line naming a file, no step logged."""
    folder = shutil.copytree(scene_folder, tmp_path / "copy")
    train, _ = V.split_videos(V.find_videos(str(folder), "*"), 0.1)
    for video in train:
        Path(video.path).write_bytes(b"damaged" * 100)
    code, _, err = run(capsys, tmp_path, data_root=str(folder), max_bad_fraction=0.99)
    assert code == 1 and any(video.name in one_line(err) for video in train)
    assert not (tmp_path / "run/metrics.jsonl").is_file()


def test_another_file_is_held_out_when_the_held_out_one_is_bad(capsys, tmp_path, scene_folder):
    """A small folder whose one held-out file is damaged validates on the next file by hash, not on black frames."""
    folder = shutil.copytree(scene_folder, tmp_path / "copy")
    videos = V.find_videos(str(folder), "*")
    bad = V.split_videos(videos, 0.1)[1]
    for video in bad:
        Path(video.path).write_bytes(b"damaged" * 100)
    train, val = V.split_readable(small_config(), videos)
    assert (
        len(val) == len(bad) + 1
        and {video.name for video in bad} < {video.name for video in val}
        and len(train) + len(val) == len(videos)
    )
    code, _, err = run(capsys, tmp_path, data_root=str(folder))
    assert (code, err) == (0, "") and set(bad_files(tmp_path / "run")) >= {video.name for video in bad}


def test_list_with_absent_files(capsys, tmp_path, scene_folder):
    """A list that names a file which is not there: the file is bad, the others serve."""
    names = [str(path) for path in sorted((scene_folder / "videos").glob("*.mp4"))]
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "\n".join(f"{name},keep" for name in [*names, str(tmp_path / "gone.mp4")])
    )
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "list.csv"), steps=8, val_clips=4)
    assert (code, err) == (0, "") and [Path(name).name for name in bad_files(tmp_path / "run")] == ["gone.mp4"]


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"a.mp4"', '{"label": "keep"}'])
def test_damaged_list(capsys, tmp_path, text):
    """A jsonl line that is no object with a path: exit 2 with the line number."""
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4"}\n' + text + "\n")
    code, _, err = run(capsys, tmp_path, data_root=str(tmp_path / "list.jsonl"))
    assert code == 2 and "line 2" in one_line(err)


# -- checkpoints


@pytest.fixture(scope="module")
def finished(scene_folder, tmp_path_factory):
    """A finished run of two steps -> folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert (
        V.train(
            small_config(
                data_root=str(scene_folder), out_dir=str(folder), steps=2, picture=False, val_clips=2, **SHALLOW
            )
        )
        == 0
    )
    return folder


class Malicious:
    """Pickles to an instruction to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def spoil(path, how, marker):
    """Damage a checkpoint in one of several ways."""
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) * 2 // 3])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how.startswith("flipped"):
        place = int(len(data) * float(how.split()[1]))
        path.write_bytes(data[:place] + bytes(byte ^ 0xFF for byte in data[place : place + 64]) + data[place + 64 :])
    elif how == "foreign dict":
        torch.save({"model": torch.ones(3), "step": 4}, path)
    elif how == "foreign list":
        torch.save([1, 2, 3], path)
    elif how == "keys without content":
        torch.save({"step": 1, "cfg": {}, "online": {}, "target": {}, "opt": {}, "consumed": 2}, path)
    elif how == "a module missing":
        state = torch.load(path, weights_only=True)
        del state["flow_stats"]
        torch.save(state, path)
    elif how == "a weight missing":
        state = torch.load(path, weights_only=True)
        state["online"].pop(next(iter(state["online"])))
        torch.save(state, path)
    elif how == "malicious":
        torch.save({"step": 1, "cfg": Malicious(str(marker))}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(str(marker))))


HOWS = [
    "empty",
    "truncated",
    "text",
    "flipped 0.1",
    "flipped 0.5",
    "flipped 0.9",
    "foreign dict",
    "foreign list",
    "keys without content",
    "a module missing",
    "a weight missing",
    "malicious",
    "malicious raw",
]


@pytest.mark.parametrize("how", HOWS)
def test_corrupt_checkpoint(capsys, tmp_path, finished, scene_folder, how):
    """One line with the file, no start from zero, nothing executed, no file harmed. Seen red: weights_only=False."""
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoints/ckpt_final.pt"
    spoil(path, how, tmp_path / "ran")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder), steps=4)
    assert code in (1, 2) and "ckpt_final.pt" in one_line(err)
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    changed = {file.name for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert changed <= {"train.log", "config.json", "status.json", ".lease"} and not (tmp_path / "ran").exists()
    assert (folder / "train.log").read_bytes().startswith(before[folder / "train.log"])


def test_malicious_pickle_would_run_if_it_were_trusted(tmp_path):
    """Control of the test above: read without weights_only, the same file does create the folder."""
    path = tmp_path / "ckpt.pt"
    spoil_target = tmp_path / "ran"
    path.write_bytes(b"")
    spoil(path, "malicious", spoil_target)
    torch.load(path, weights_only=False)  # on purpose, on a file made two lines above: proves that the bait is live
    assert spoil_target.is_dir()


def test_resume_never_ignores_a_corrupt_checkpoint(capsys, tmp_path, finished, scene_folder):
    """--resume never needs no old checkpoint: it puts it aside and runs."""
    folder = shutil.copytree(finished, tmp_path / "run")
    spoil(folder / "checkpoints/ckpt_final.pt", "truncated", None)
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder), resume="never")
    assert (code, err) == (0, "") and (folder / "previous_1/checkpoints/ckpt_final.pt").is_file()


# -- places that cannot be written


def test_out_dir_is_a_file(capsys, tmp_path, scene_folder):
    """Exit 1, one line; the file stays as it is."""
    (tmp_path / "run").write_text("mine")
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder))
    assert (
        code == 1
        and "cannot be written" in one_line(err)
        and "--out_dir" in err
        and (tmp_path / "run").read_text() == "mine"
    )


@pytest.mark.parametrize("place", ["below a file", "/proc/vjepa_run", "read-only"])
def test_out_dir_cannot_be_written(capsys, tmp_path, scene_folder, place):
    """A path under a regular file, a file system that takes no files, no permission."""
    out_dir = tmp_path / "run"
    if place == "below a file":
        (tmp_path / "file").write_text("mine")
        out_dir = tmp_path / "file" / "run"
    elif place == "/proc/vjepa_run":
        if not os.path.isdir("/proc/self"):
            pytest.skip("no /proc here")
        out_dir = Path(place)
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        out_dir.mkdir(mode=0o500)
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder), out_dir=str(out_dir))
    assert code == 1 and str(out_dir) in one_line(err) and "cannot be written" in err


# -- devices and flags


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda_is_refused_not_replaced(capsys, tmp_path, scene_folder):
    """Exit 2: a run that was meant for a GPU never crawls on the CPU unnoticed."""
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder), device="cuda")
    assert code == 2 and "no usable CUDA device" in one_line(err) and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_absent_mps_is_refused(capsys, tmp_path, scene_folder):
    """Exit 2 for mps as well."""
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder), device="mps")
    assert code == 2 and "device = mps" in one_line(err)


@pytest.mark.parametrize(
    "argv, fragment",
    [
        (["--stepz", "3"], "did you mean --steps?"),
        (["--steps", "three"], "--steps"),
        (["--decoder", "ffmpeg"], "decoder = 'ffmpeg'"),
        (["--config", "/absent/config.json"], "/absent/config.json"),
        (["--amp=yes"], "--amp"),
    ],
)
def test_mistyped_command(capsys, monkeypatch, argv, fragment):
    """Exit 2 and one line; test_config.py holds the long list."""
    monkeypatch.setattr(V, "train", lambda *rest: pytest.fail("this command line must not start a run"))
    assert V.main(argv) == 2
    assert fragment in one_line(capsys.readouterr().err)


def test_out_of_memory_tells_what_to_lower(capsys, tmp_path, scene_folder, monkeypatch):
    """Exit 1 with the flags in their order of effect, not a traceback."""

    def exhausted(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(V, "take_step", exhausted)
    code, _, err = run(capsys, tmp_path, data_root=str(scene_folder))
    assert code == 1 and "out of memory" in one_line(err) and "--batch_size" in err and "--grad_checkpoint" in err


def test_a_bug_is_not_taken_for_lack_of_memory(capsys, tmp_path, scene_folder, monkeypatch):
    """A RuntimeError that says nothing of memory, and its subclasses, end in a traceback. Seen red with every subclass
    of RuntimeError called out of memory."""

    def broken(*rest):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(V, "take_step", broken)
    with pytest.raises(NotImplementedError):
        run(capsys, tmp_path, data_root=str(scene_folder))
