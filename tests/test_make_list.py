"""tools/make_list.py: every layout, written here as it is published, is recognised and listed; whatever is wrong with
one ends in one line that names it.

Frames tell which episode they belong to and their number in it: 4 x 4 blocks, black or white, are 16 bits.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, V, small_config
from PIL import Image

sys.path.insert(0, str(ROOT / "tools"))

import make_list as M  # noqa: E402

SIDE = 64
ENCODERS = {"h264": "libx264", "av1": "libsvtav1", "hevc": "libx265"}
OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "20", "g": "10"},
    "libsvtav1": {"preset": "10", "crf": "20", "g": "2", "svtav1-params": "lp=1"},  # faster ones lose frames,
    "libx265": {
        "preset": "ultrafast",
        "crf": "20",
        "x265-params": "log-level=none:keyint=10:pools=none:frame-threads=1",
    },
}


# -- frames that tell what they are -----------------------------------------------------------------------------------


def picture(episode, number):
    """-> uint8 [64, 64, 3]: 5 bits of the episode, 11 of the frame's number, the highest first."""
    bits = [(episode << 11 | number) >> (15 - place) & 1 for place in range(16)]
    grey = np.kron(np.array(bits, np.uint8).reshape(4, 4) * 215 + 20, np.ones((SIDE // 4, SIDE // 4), np.uint8))
    return np.repeat(grey[..., None], 3, 2)


def told(frames):
    """uint8 [T, 64, 64, 3] -> (episodes, numbers), int [T]."""
    blocks = frames.mean(-1).reshape(len(frames), 4, SIDE // 4, 4, SIDE // 4).mean((2, 4)) > 127
    values = blocks.reshape(len(frames), 16) @ (1 << np.arange(15, -1, -1))
    return values >> 11, values & 2047


def encode(path, pictures, fps, codec="h264", form=None):
    """Pictures [64, 64, 3] -> a video."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(ENCODERS[codec], rate=Fraction(fps).limit_denominator(1001))
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", OPTIONS[ENCODERS[codec]]
        stream.codec_context.thread_count = 1
        for image in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def save_pictures(folder, names, episode=0, size=None, first=0):
    """Write a picture under each name, numbered in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, first):
        image = Image.fromarray(picture(episode, number))
        (image.resize(size) if size else image).save(folder / name, quality=95)


# -- data sets as they are published ----------------------------------------------------------------------------------


def lerobot_info(version, fps, **changes):
    """meta/info.json of a data set with a front, a wrist and a depth camera, and a car's state -> dict."""
    v3 = version == "v3.0"
    video = {"dtype": "video", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
    depth = {**video, "info": {"video.is_depth_map": True, "video.codec": "hevc"}}
    names = {"axes": ["speed_kmh", "heading", "steering_angle_deg"]}
    features = {
        "observation.images.wrist": {**video, "info": {"video.is_depth_map": False}},
        "observation.images.front": {**video, "info": {"video.is_depth_map": False}},
        "observation.images.depth": depth,
        "observation.state.vehicle": {"dtype": "float32", "shape": [3], "names": names},
        "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    chunk = "chunk-{chunk_index:03d}/file-{file_index:03d}" if v3 else "chunk-{episode_chunk:03d}"
    return {
        "codebase_version": version,
        "robot_type": "car",
        "fps": fps,
        "chunks_size": 1000,
        "total_episodes": 3,
        "data_path": f"data/{chunk}.parquet" if v3 else f"data/{chunk}/episode_{{episode_index:06d}}.parquet",
        "video_path": f"videos/{{video_key}}/{chunk}.mp4"
        if v3
        else f"videos/{chunk}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
        "features": features,
        **changes,
    }


def write_lerobot(root, version, lengths=(20, 31, 17), fps=10, codec="h264", camera="observation.images.front", **info):
    """A LeRobot data set whose frames tell episode and number -> root."""
    import pyarrow
    from pyarrow import parquet

    (root / "meta").mkdir(parents=True)
    about = lerobot_info(version, fps, total_episodes=len(lengths), **info)
    (root / "meta" / "info.json").write_text(json.dumps(about))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = []
    for episode, length in enumerate(lengths):
        state = [[36.0 + frame, 0.0, 180 / np.pi * episode] for frame in range(length)]
        whose, tasks = [episode] * length, [f"task {episode % 2}"]
        rows.append({"episode_index": whose, "observation.state.vehicle": state, "tasks": tasks, "length": length})
    if version == "v3.0":
        path = root / about["video_path"].format(video_key=camera, chunk_index=0, file_index=0)
        encode(path, [picture(e, n) for e, length in enumerate(lengths) for n in range(length)], fps, codec)
        since, until = starts[:-1] / fps, starts[1:] / fps
        table = {"episode_index": list(range(len(lengths))), "length": list(lengths)}
        table |= {"tasks": [row["tasks"] for row in rows]}
        zeros = [0] * len(lengths)
        table |= {"data/chunk_index": zeros, "data/file_index": zeros}
        table |= {"dataset_from_index": starts[:-1].tolist(), "dataset_to_index": starts[1:].tolist()}
        for key in ("observation.images.front", "observation.images.wrist"):
            table |= {f"videos/{key}/chunk_index": zeros, f"videos/{key}/file_index": zeros}
            table |= {f"videos/{key}/from_timestamp": since.tolist(), f"videos/{key}/to_timestamp": until.tolist()}
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        parquet.write_table(pyarrow.table(table), root / "meta/episodes/chunk-000/file-000.parquet")
        (root / "data/chunk-000").mkdir(parents=True)
        columns = ("episode_index", "observation.state.vehicle")
        data = {name: [value for row in rows for value in row[name]] for name in columns}
        parquet.write_table(pyarrow.table(data), root / "data/chunk-000/file-000.parquet")
        return root
    lines = [dict(episode_index=e, tasks=row["tasks"], length=row["length"]) for e, row in enumerate(rows)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for episode, row in enumerate(rows):
        place = dict(episode_chunk=0, episode_index=episode, video_key=camera)
        encode(
            root / about["video_path"].format(**place), [picture(episode, n) for n in range(row["length"])], fps, codec
        )
        path = root / about["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {name: row[name] for name in ("episode_index", "observation.state.vehicle")}
        parquet.write_table(pyarrow.table(data), path)
    return root


def save_array(path, values):
    """A npy file under a name without suffix, as comma2k19 has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, np.asarray(values, np.float64))


def write_segment(root, route, segment, episode, frames=60, rate=20.0004, since=46408.5):
    """A segment of comma2k19: bare HEVC, frame_times, CAN -> its folder."""
    folder = root / "Chunk_1" / route / str(segment)
    encode(folder / "video.hevc", [picture(episode, n) for n in range(frames)], 25, "hevc", "hevc")
    save_array(folder / "global_pose/frame_times", since + np.arange(frames) / rate)
    times = since + 0.02 + np.arange(int(frames / rate * 89)) / 89
    for name, values in (("speed", (10 + times - since)[:, None]), ("steering_angle", 90.0 * np.ones(len(times)))):
        save_array(folder / "processed_log/CAN" / name / "t", times)
        save_array(folder / "processed_log/CAN" / name / "value", values)
    return folder


def write_nuscenes(root, log="n008-2018-05-21-11-06-59-0400", episode=0, seconds=4, since=1526915243):
    """Pictures of a log: every sixth is a sample, 12 Hz, with a gap of 3 s in its middle."""
    stamps = [since * 10**6 + n * 10**6 // 12 + (3 * 10**6 if n >= seconds * 6 else 0) for n in range(seconds * 12)]
    for number, stamp in enumerate(stamps):
        part = "sweeps" if number % 6 else "samples"
        save_pictures(root / part / "CAM_FRONT", [f"{log}__CAM_FRONT__{stamp}.jpg"], episode, first=number)
    save_pictures(root / "samples" / "CAM_BACK", [f"{log}__CAM_BACK__{since * 10**6}.jpg"])
    return root


def write_kitti(root, drive="2011_09_26_drive_0001", episode=0, frames=20):
    """A drive of KITTI raw with oxts at its frames -> its folder."""
    folder = root / "2011_09_26" / f"{drive}_sync"
    save_pictures(folder / "image_02/data", [f"{n:010d}.png" for n in range(frames)], episode)
    stamps = [f"2011-09-26 13:02:{25 + n * 0.1:012.9f}\n" for n in range(frames)]
    (folder / "image_02/timestamps.txt").write_text("".join(stamps))
    (folder / "oxts/data").mkdir(parents=True)
    (folder / "oxts/timestamps.txt").write_text("".join(stamps))
    for n in range(frames):
        row = np.zeros(30)
        row[8], row[22] = 10 + n, 0.25  # vf, wu
        (folder / f"oxts/data/{n:010d}.txt").write_text(" ".join(map(str, row)) + "\n")
    return folder


def write_cityscapes(root, kind="leftImg8bit_sequence"):
    """Two snippets of one sequence, the second 20 s later."""
    folder = root / kind / "train" / "aachen"
    numbers = [*range(30), *range(340, 370)] if kind != "leftImg8bit" else [19]
    save_pictures(folder, [f"aachen_000000_{n:06d}_leftImg8bit.png" for n in numbers])
    return root


# -- helpers ----------------------------------------------------------------------------------------------------------


def make(folder, out, capsys, *flags):
    """The command in this process -> (lines of the list, what it said)."""
    capsys.readouterr()
    assert M.main([str(folder), "--out", str(out), *flags]) == 0, capsys.readouterr().err
    lines = out.read_text().splitlines()
    assert lines[0].startswith("#") and V.MARK in lines[0]
    return [json.loads(line) for line in lines[1:]], capsys.readouterr().out


def refused(folder, out, capsys, *flags):
    """The one line with which the command refuses; nothing is written."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    capsys.readouterr()
    assert M.main([str(folder), "--out", str(out), *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return error


def read_signals(out, line):
    return json.loads((out.parent / line["signals"]).read_text())


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    """{version: a small LeRobot data set}; tests leave them as they are."""
    root = tmp_path_factory.mktemp("lerobot")
    return {version: write_lerobot(root / version.replace(".", ""), version) for version in ("v2.1", "v3.0")}


@pytest.fixture(scope="module")
def comma(tmp_path_factory):
    """Two drives of comma2k19, three segments."""
    root = tmp_path_factory.mktemp("comma2k19")
    for episode, (route, segment) in enumerate((("a1|2018-08-02--08-34-47", 3), ("a1|2018-08-02--08-34-47", 10))):
        write_segment(root, route, segment, episode)
    write_segment(root, "b2|2018-09-02--08-34-47", 0, 2)
    return root


# -- what is listed ---------------------------------------------------------------------------------------------------


def test_lerobot_v2_has_a_line_for_each_episode(lerobot, tmp_path, capsys):
    """Files, groups, tasks, and signals in SI units from columns that name theirs."""
    out = tmp_path / "list.jsonl"
    lines, said = make(lerobot["v2.1"], out, capsys)
    assert [line["group"] for line in lines] == [f"v21 episode {number}" for number in range(3)]
    assert [line["maneuver"] for line in lines] == ["task 0", "task 1", "task 0"]
    assert all("begin" not in line and line["video"].endswith(".mp4") for line in lines)
    signals = read_signals(out, lines[2])
    assert signals["fps"] == 10 and len(signals["speed"]) == 17
    assert signals["speed"][9] == pytest.approx(45 / 3.6, rel=1e-5) and signals["steer"][0] == pytest.approx(2)
    assert "LeRobot v2.1, 3 episodes" in said and "camera: observation.images.front; not taken" in said
    assert f"next: python VJepa_AUTO_V2.py --data_root {out}" in said and "7 s" in said


def test_lerobot_v3_episodes_begin_on_frames(lerobot, tmp_path, capsys):
    """Several episodes of one video are parts of whole frames of it, and have their own signals."""
    out = tmp_path / "list.jsonl"
    lines, said = make(lerobot["v3.0"], out, capsys)
    assert len({line["video"] for line in lines}) == 1 and len(lines) == 3
    assert [(line["begin"], line["length"]) for line in lines] == [(0, 2.0), (2.0, 3.1), (5.1, 1.7)]
    assert len(read_signals(out, lines[1])["speed"]) == 31 and read_signals(out, lines[1])["steer"][0] == 1
    assert "signals: speed (3 lines), steer (3 lines)" in said


def test_lerobot_v20_and_signals_without_a_unit(tmp_path, capsys):
    """A speed without a unit is left out and named with its flag, which then says it. So does a steering angle."""
    root = write_lerobot(tmp_path / "set", "v2.0", lengths=(6,))
    about = lerobot_info("v2.0", 10)
    about["features"]["observation.state.vehicle"]["names"] = ["speed", "heading", "steering_angle_normalized"]
    (root / "meta/info.json").write_text(json.dumps(about))
    lines, said = make(root, tmp_path / "a.jsonl", capsys)
    assert "signals" not in lines[0] and "vehicle.speed (--speed_unit)" in said
    lines, said = make(root, tmp_path / "b.jsonl", capsys, "--speed_unit", "mph")
    assert read_signals(tmp_path / "b.jsonl", lines[0])["speed"][0] == pytest.approx(36 * 0.44704, rel=1e-5)
    lines, said = make(root, tmp_path / "c.jsonl", capsys, "--no-signals")
    assert "signals" not in lines[0] and not (tmp_path / "c_signals").exists()


def test_cameras_of_lerobot(lerobot, tmp_path, capsys):
    """--camera takes a key or its end; a missing one, a depth camera and pictures in parquet are refused."""
    root, out = lerobot["v2.1"], tmp_path / "list.jsonl"
    lines, said = make(root, out, capsys, "--camera", "front")
    assert "observation.images.front" in lines[0]["video"]
    assert "depth camera" in refused(root, out, capsys, "--camera", "depth")
    assert "did you mean" in refused(root, out, capsys, "--camera", "observation.images.fromt")
    error = refused(root, out, capsys, "--camera", "wrist")  # known, and none of its videos is there
    assert "its video is not there" in error and "episode 0" in error
    about = lerobot_info("v2.1", 10)
    for key in ("front", "wrist"):
        about["features"][f"observation.images.{key}"]["dtype"] = "image"
    (tmp_path / "images/meta").mkdir(parents=True)
    (tmp_path / "images/meta/info.json").write_text(json.dumps(about))
    error = refused(tmp_path / "images", tmp_path / "x.jsonl", capsys)
    assert "parquet" in error and "--camera" in error and "depth" in error
    assert "parquet" in refused(tmp_path / "images", tmp_path / "x.jsonl", capsys, "--camera", "front")


def test_comma2k19_has_its_own_times_and_can_signals(comma, tmp_path, capsys):
    """A drive is a group; steering of the wheel in degrees to the left becomes radians to the right."""
    out = tmp_path / "list.jsonl"
    lines, said = make(comma, out, capsys)
    assert [line["group"][:2] for line in lines] == ["a1", "a1", "b2"] and "comma2k19, 3 segments" in said
    assert [line["video"].split("/")[-2] for line in lines] == ["3", "10", "0"]
    assert all(line["times"].endswith("global_pose/frame_times") for line in lines)
    signals = read_signals(out, lines[0])
    assert signals["fps"] == pytest.approx(20.0004, abs=1e-3) and len(signals["speed"]) == 60
    assert signals["steer"][30] == pytest.approx(-np.pi / 2, rel=1e-5)
    assert signals["speed"][30] == pytest.approx(10 + 30 / 20.0004, abs=1e-3)


def test_comma2k19_segments_without_times_are_left_out(tmp_path, capsys):
    """Missing, short, damaged and falling frame_times are named; a gap splits a segment."""
    route = "a1|2018-08-02--08-34-47"
    folders = [write_segment(tmp_path / "set", route, number, number, frames=30) for number in range(5)]
    times = [folder / "global_pose/frame_times" for folder in folders]
    times[0].unlink()
    save_array(times[1], 5 + np.arange(29) / 20)
    times[2].write_bytes(b"no array")
    save_array(times[3], 5 - np.arange(30) / 20)
    save_array(times[4], 46408.5 + np.arange(30) / 20 + 2 * (np.arange(30) >= 10))
    lines, said = make(tmp_path / "set", tmp_path / "list.jsonl", capsys)
    assert [(line["begin"], line["length"]) for line in lines] == [(0, 0.5), (2.5, 1.0)]
    assert "frame_times missing" in said and "too short (29 times for 30 frames)" in said
    assert "cannot be read" in said and "do not rise" in said and f"{route}/3" in said
    for number in (3, 4):
        times[number].unlink()
    error = refused(tmp_path / "set", tmp_path / "x.jsonl", capsys)
    assert "nothing to list" in error and "frame_times missing" in error and "too short" in error


def test_nuscenes_merges_samples_and_sweeps(tmp_path, capsys):
    """One order by the microseconds in the names, a line before and after a gap, one group for a log."""
    root, out = write_nuscenes(tmp_path / "set"), tmp_path / "list.jsonl"
    write_nuscenes(root, "n015-2018-07-24-11-22-45+0800", 1, seconds=2, since=1532402927)
    lines, said = make(root, out, capsys)
    assert [line["group"][:4] for line in lines] == ["n008", "n008", "n015", "n015"]
    rows = list(csv.reader(open(tmp_path / lines[1]["frames"])))
    assert rows[0] == ["path", "time"] and len(rows) == 25 and rows[1][1] == "0.0"
    assert {row[0].split("/")[-3] for row in rows[1:]} == {"samples", "sweeps"}
    shown = [np.asarray(Image.open(tmp_path / "list_frames" / row[0])) for row in rows[1:]]
    assert told(np.stack(shown))[1].tolist() == list(range(24, 48))
    error = refused(root, tmp_path / "x.jsonl", capsys, "--camera", "CAM_FRNT")
    assert "--camera CAM_FRNT" in error and "CAM_BACK, CAM_FRONT" in error
    for path in (root / "sweeps/CAM_FRONT").iterdir():
        path.unlink()
    lines, said = make(root, out, capsys)
    assert len(lines) == 4 and "only samples/CAM_FRONT is here" in said  # 2 Hz is no row of gaps: one in each log


def test_kitti_has_times_speed_and_yaw_rate(tmp_path, capsys):
    """timestamps.txt as it is; oxts + = left becomes + = right; another count of times is left out."""
    out = tmp_path / "list.jsonl"
    write_kitti(tmp_path / "set")
    bad = write_kitti(tmp_path / "set", "2011_09_26_drive_0002", 1)
    (bad / "image_02/data/0000000003.png").unlink()
    lines, said = make(tmp_path / "set", out, capsys)
    assert len(lines) == 1 and lines[0]["group"] == "2011_09_26_drive_0001"
    assert lines[0]["frames"].endswith("image_02/data") and lines[0]["times"].endswith("image_02/timestamps.txt")
    signals = read_signals(out, lines[0])
    assert signals["fps"] == pytest.approx(10) and signals["yaw_rate"][5] == -0.25
    assert signals["speed"][5] == pytest.approx(15, abs=1e-3) and len(signals["speed"]) == 20
    assert "20 times for 19 pictures" in said and "drive_0002" in said
    assert "--camera image_03" in refused(tmp_path / "set", tmp_path / "x.jsonl", capsys, "--camera", "image_03")


def test_bdd100k_takes_videos_or_tracks(tmp_path, capsys):
    """Videos by side; tracks at 5 Hz by the numbers in their names; single frames are refused."""
    root = tmp_path / "bdd100k"
    save_pictures(root / "images/100k/train", ["0000f77c-6257be58.jpg"])
    error = refused(root, tmp_path / "x.jsonl", capsys)
    assert "images/100k" in error and "images/track" in error
    track = root / "images/track/train/0000f77c-6257be58"
    save_pictures(track, [f"0000f77c-6257be58-{n:07d}.jpg" for n in (1, 2, 3, 9, 10)])
    lines, said = make(root, tmp_path / "list.jsonl", capsys)
    assert [line["group"] for line in lines] == ["0000f77c-6257be58"] * 2 and "5 Hz" in said
    for side, name in (("train", "a"), ("val", "b")):
        encode(root / "videos" / side / f"{name}.mov", [picture(0, n) for n in range(10)], 30)
    lines, said = make(root, tmp_path / "list.jsonl", capsys, "--side", "val")
    assert [line["group"] for line in lines] == ["b"] and "--data_root" in said
    assert len(make(root, tmp_path / "list.jsonl", capsys)[0]) == 2


def test_cityscapes_takes_sequences(tmp_path, capsys):
    """A snippet is a line at 17 Hz, its sequence the group; single frames are refused."""
    lines, said = make(write_cityscapes(tmp_path / "set"), tmp_path / "list.jsonl", capsys)
    assert [line["group"] for line in lines] == ["aachen_000000"] * 2 and "17 Hz" in said
    rows = list(csv.reader(open(tmp_path / lines[1]["frames"])))
    assert len(rows) == 31 and float(rows[2][1]) == pytest.approx(1 / 17, abs=1e-6) and "000340" in rows[1][0]
    error = refused(write_cityscapes(tmp_path / "one", "leftImg8bit"), tmp_path / "x.jsonl", capsys)
    assert "leftImg8bit holds single frames" in error and "leftImg8bit_sequence" in error


def test_pictures_take_times_from_names_files_or_the_flag(tmp_path, capsys):
    """In that order; without any, an error that names the flag. Ten comes after nine."""
    out, root = tmp_path / "list.jsonl", tmp_path / "drives"
    save_pictures(root / "a", [f"{n}.png" for n in range(1, 11)])
    error = refused(root / "a", out, capsys)
    assert "--frame_fps" in error and "without times" in error and str(root / "a") in error
    lines, said = make(root / "a", out, capsys, "--frame_fps", "5")
    assert lines == [{"frames": "drives/a", "fps": 5.0, "group": "a"}] and "2 s" in said
    (root / "a/timestamps.txt").write_text("".join(f"{n / 4}\n" for n in range(10)))
    lines, said = make(root / "a", out, capsys)
    assert lines == [{"frames": "drives/a", "times": "drives/a/timestamps.txt", "group": "a"}]
    (root / "a/timestamps.txt").write_text("0\n0.25\n")
    assert "2 times for 10 pictures" in refused(root / "a", tmp_path / "x.jsonl", capsys)
    (root / "a/timestamps.txt").write_text("soon\n" * 10)
    assert "cannot be read" in refused(root / "a", tmp_path / "x.jsonl", capsys)
    save_pictures(root / "b", [f"left_{1526915243012 + 100 * n}.jpg" for n in range(5)])
    lines, said = make(root / "b", out, capsys)
    rows = list(csv.reader(open(tmp_path / lines[0]["frames"])))
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and "in their names" in said


def test_numbered_pictures_that_lack_some(tmp_path, capsys):
    """A missing number is a missing frame, many are a gap, and numbers that start anew are two drives in a folder."""
    root, out = tmp_path / "a", tmp_path / "list.jsonl"
    save_pictures(root, [f"f{n:03d}.png" for n in (0, 2, 4, 8, 10, 40, 42)])
    lines, said = make(root, out, capsys, "--frame_fps", "10")
    times = [[row[1] for row in csv.reader(open(tmp_path / line["frames"]))][1:] for line in lines]
    assert times == [["0.0", "0.1", "0.2", "0.4", "0.5"], ["0.0", "0.1"]]
    save_pictures(root, ["g000.png"])
    assert "no one sequence" in refused(root, tmp_path / "x.jsonl", capsys, "--frame_fps", "10")


def test_pictures_of_mixed_sizes_and_damaged_ones_are_left_out(tmp_path, capsys):
    """The folder is named with the picture; where it is the only one, that is the error."""
    root = tmp_path / "drives"
    save_pictures(root / "a", ["0.png", "1.png"])
    save_pictures(root / "b", ["0.png", "1.png"])
    save_pictures(root / "b", ["2.png"], size=(48, 64))
    save_pictures(root / "c", ["0.png", "1.png"])
    (root / "c/1.png").write_bytes(b"\x89PNG no more")
    lines, said = make(root, tmp_path / "list.jsonl", capsys, "--frame_fps", "4")
    assert [line["group"] for line in lines] == ["a"]
    assert "left out: 1, b: pictures of mixed sizes: 64 x 64 (0.png), 48 x 64 (2.png)" in said
    assert "left out: 1, c: 1.png cannot be read" in said
    assert "mixed sizes" in refused(root / "b", tmp_path / "x.jsonl", capsys, "--frame_fps", "4")


def test_kinetics_list(tmp_path, capsys):
    """`path index`, blanks in the path too: what is there is listed, clips of one video are one group."""
    for name in ("-0aBcDeFgHi_000010_000020.mp4", "-0aBcDeFgHi_000030_000040.mp4", "sub dir/other.mp4"):
        encode(tmp_path / "k" / name, [picture(0, n) for n in range(5)], 5)
    names = ["-0aBcDeFgHi_000010_000020.mp4 3", "-0aBcDeFgHi_000030_000040.mp4 3", "sub dir/other.mp4 12", "gone.mp4 1"]
    (tmp_path / "k/train.csv").write_text("\n".join(names) + "\n")
    lines, said = make(tmp_path / "k/train.csv", tmp_path / "list.jsonl", capsys)
    assert [line["maneuver"] for line in lines] == ["3", "3", "12"] and lines[2]["video"] == "k/sub dir/other.mp4"
    assert [line["group"] for line in lines] == ["-0aBcDeFgHi", "-0aBcDeFgHi", "other"]
    assert "left out: 1, gone.mp4" in said and "3 s (guessed from 3)" in said
    (tmp_path / "k/train.csv").write_text("gone.mp4 1\n")
    assert "gone.mp4" in refused(tmp_path / "k/train.csv", tmp_path / "x.jsonl", capsys)


# -- where it is written ----------------------------------------------------------------------------------------------


def test_paths_are_relative_where_the_list_is_above_the_data(comma, tmp_path, capsys):
    """Else absolute; what stands beside the list is always relative."""
    lines, _ = make(comma, comma.parent / f"{comma.name}.jsonl", capsys)
    assert lines[0]["video"].startswith(f"{comma.name}/Chunk_1/a1|")
    lines, _ = make(comma, tmp_path / "deep/list.jsonl", capsys)
    assert os.path.isabs(lines[0]["video"]) and lines[0]["signals"].startswith("list_signals/")


def test_only_its_own_files_are_overwritten(tmp_path, capsys):
    """The same command again is fine; another hand's list or folder is refused without --force."""
    root, out = tmp_path / "a", tmp_path / "list.jsonl"
    save_pictures(root, [f"{1526915243012 + 100 * n}.jpg" for n in range(4)])
    first = make(root, out, capsys)
    assert make(root, out, capsys) == first
    out.write_text('{"video": "mine.mp4"}\n')
    assert "--force" in refused(root, out, capsys) and "mine" in out.read_text()
    assert make(root, out, capsys, "--force")[0] == first[0]
    (tmp_path / "other_frames").mkdir()
    (tmp_path / "other_frames/mine.txt").write_text("mine")
    assert "other_frames" in refused(root, tmp_path / "other.jsonl", capsys)
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_disk_that_refuses_is_one_line(tmp_path, capsys):
    save_pictures(tmp_path / "a", ["0.png", "1.png"])
    (tmp_path / "file").write_text("")
    error = refused(tmp_path / "a", tmp_path / "file/list.jsonl", capsys, "--frame_fps", "2")
    assert "--out" in error


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(codebase_version="v4.2"), "codebase_version 'v4.2' is not known, only v2.0, v2.1, v3.0"),
        (dict(codebase_version=3), "codebase_version 3"),
        (dict(storage_format="lance"), "lance"),
        (dict(fps=0), "fps"),
        (dict(fps=None), "fps"),
        (dict(features=[]), "features"),
        (dict(video_path=None), "video_path"),
        (dict(video_path="videos/{x}.mp4"), "video_path"),
        (dict(data_path="{episode_index.__class__}"), "data_path"),
        (dict(fps=20), "10 frames per second, and meta/info.json says 20"),
    ],
)
def test_lerobot_that_is_not_what_it_should_be(lerobot, tmp_path, capsys, change, words):
    """Each fault of info.json is one line that names the file or the field."""
    root = tmp_path / "set"
    shutil.copytree(lerobot["v2.1"], root)
    (root / "meta/info.json").write_text(json.dumps({**lerobot_info("v2.1", 10), **change}))
    assert words in refused(root, tmp_path / "x.jsonl", capsys)


def test_lerobot_with_missing_or_damaged_parts(lerobot, tmp_path, capsys):
    """Without info.json or episodes, with broken files, with a lance table, with episodes on each other's frames."""
    import pyarrow
    from pyarrow import parquet

    out = tmp_path / "x.jsonl"
    for version in lerobot:
        shutil.copytree(lerobot[version], tmp_path / version)
    two, three = tmp_path / "v2.1", tmp_path / "v3.0"
    (two / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1 no more")
    error = refused(two, out, capsys)
    assert "episode_000001.parquet: cannot be read" in error
    (two / "data/chunk-000/episode_000001.parquet").unlink()
    lines, said = make(two, tmp_path / "list.jsonl", capsys)
    assert ["signals" in line for line in lines] == [True, False, True] and "episode_000001.parquet" in said
    (two / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n')
    assert "episodes.jsonl: cannot be read (KeyError: 'length')" in refused(two, out, capsys)
    (two / "meta/episodes.jsonl").unlink()
    assert "episodes.jsonl: cannot be read" in refused(two, out, capsys)
    (two / "meta/info.json").write_text('{"fps": ')
    assert "info.json: cannot be read" in refused(two, out, capsys)
    (two / "meta/info.json").unlink()
    assert "has no meta/info.json" in refused(two, out, capsys)
    table = three / "meta/episodes/chunk-000/file-000.parquet"
    rows = parquet.read_table(table).to_pydict()
    rows["videos/observation.images.front/from_timestamp"] = [0.0, 1.0, 5.1]
    parquet.write_table(pyarrow.table(rows), table)
    lines, said = make(three, tmp_path / "list.jsonl", capsys)
    assert len(lines) == 2 and "left out: 1, episode 1" in said
    rows.pop("videos/observation.images.front/file_index")
    parquet.write_table(pyarrow.table(rows), table)
    assert "has no column videos/observation.images.front/file_index" in refused(three, out, capsys)
    table.unlink()
    assert "meta/episodes/chunk-" in refused(three, out, capsys)
    (three / "frames.lance").mkdir()
    (three / "frames.lance/data").write_text("")
    assert "lance" in refused(three, out, capsys)


def test_without_pyarrow(lerobot, tmp_path, capsys, monkeypatch):
    """What to install is said; v2 without signals needs none."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for version in lerobot:
        error = refused(lerobot[version], tmp_path / "x.jsonl", capsys)
        assert "pip install pyarrow" in error and "--no-signals" in error
    assert len(make(lerobot["v2.1"], tmp_path / "list.jsonl", capsys, "--no-signals")[0]) == 3


def test_folders_and_flags_that_are_none(tmp_path, capsys):
    """Unknown, empty and absent folders, files of other kinds, and flags out of range."""
    out = tmp_path / "out/x.jsonl"
    assert "no such file or folder" in refused(tmp_path / "gone", out, capsys)
    (tmp_path / "empty").mkdir()
    assert "no file in it" in refused(tmp_path / "empty", out, capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.pdf").write_text("x")
    error = refused(tmp_path / "other", out, capsys)
    assert "looked for lerobot: meta/info.json; comma2k19:" in error and "1 .pdf" in error
    (tmp_path / "other/drive.mp4").write_text("x")
    assert "a folder of videos needs no list" in refused(tmp_path / "other", out, capsys)
    assert "neither a folder nor a Kinetics list" in refused(tmp_path / "other/notes.pdf", out, capsys)
    assert "--out" in refused(tmp_path / "other", tmp_path / "x.csv", capsys)
    assert "--frame_fps" in refused(tmp_path / "other", out, capsys, "--frame_fps", "-3")
    assert "--layout" in refused(tmp_path / "other", out, capsys, "--layout", "waymo")
    save_pictures(tmp_path / "one", ["0.png"])
    assert "fewer than two frames" in refused(tmp_path / "one", out, capsys, "--frame_fps", "3")


# -- what a run reads through the lists -------------------------------------------------------------------------------


def check_windows(out, truths, num_windows, num_frames=4, clip_fps=5.0):
    """Read windows through V's dataset over a list -> annotations. truths: (episode, its frames, number of the first,
    native fps) of each line. None is of a wrong episode, every frame lies within one of the truth."""
    videos = V.find_videos(str(out), "*")
    assert len(videos) == len(truths) and not videos.notes
    data, rng = V.ClipDataset(small_config(image_size=SIDE), videos, "", "val"), np.random.default_rng(0)
    annotations, off = {}, 0
    for index in range(num_windows):
        number = index % len(videos)
        (episode, length, first, fps), u = truths[number], (0.0, 1.0, *rng.random(8))[index // len(videos) % 10]
        plan = V.ClipPlan(num_frames, clip_fps, SIDE, SIDE, u, 1.0, 1.0, 0.5, 0.5)
        frames, annotations[number] = data.read_file(videos[number], plan)
        episodes, numbers = told(frames)
        assert (episodes == episode).all(), (index, episodes)
        assert numbers.min() >= first and numbers.max() < first + length, (index, numbers)
        start = u * max(length / fps - num_frames / clip_fps, 0)
        truth = first + np.floor((start + np.arange(num_frames) / clip_fps) * fps + 0.5)
        assert abs(numbers - truth).max() <= 1, (index, numbers, truth)
        off += (numbers != truth).sum()
    assert off <= 0.1 * num_windows * num_frames  # ties of the truth's own rounding
    return [annotations[number] for number in range(len(videos))]


LENGTHS = (20, 31, 17, 44, 23, 12)


def test_windows_of_lerobot(lerobot, tmp_path, capsys):
    """A few of each version; signals are those of the episode."""
    for version, root in lerobot.items():
        make(root, tmp_path / f"{version}.jsonl", capsys)
        truths = [(episode, length, 0, 10) for episode, length in enumerate(LENGTHS[:3])]
        annotations = check_windows(tmp_path / f"{version}.jsonl", truths, 30)
        assert [annotation["maneuver"] for annotation in annotations] == ["task 0", "task 1", "task 0"]
        assert annotations[1]["speed"][4] == pytest.approx(40 / 3.6, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ENCODERS)
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("fps", [10, 30, 29.97])
def test_no_window_of_lerobot_is_of_a_wrong_episode(version, codec, fps, tmp_path, capsys):
    """360 windows of each layout and codec."""
    import av

    try:
        av.codec.Codec(ENCODERS[codec], "w")
    except ValueError:
        pytest.skip(f"no encoder for {codec} here")
    root = write_lerobot(tmp_path / "set", version, LENGTHS, fps, codec)
    for video in sorted(root.glob("videos/**/*.mp4")):  # what went in came out: no frame was lost by the encoder
        with av.open(str(video)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        episodes, numbers = told(frames)
        assert all((np.diff(numbers[episodes == one]) == 1).all() for one in set(episodes))
    make(root, tmp_path / "list.jsonl", capsys)
    truths = [(episode, length, 0, fps) for episode, length in enumerate(LENGTHS)]
    check_windows(tmp_path / "list.jsonl", truths, 360, clip_fps=fps / 2)


def test_windows_of_drives(comma, tmp_path, capsys):
    """comma2k19 at 20.0004 Hz where the stream says 25, and all the others, between their gaps."""
    make(comma, tmp_path / "comma.jsonl", capsys)
    annotations = check_windows(tmp_path / "comma.jsonl", [(episode, 60, 0, 20.0004) for episode in range(3)], 24)
    assert len(annotations[2]["steer"]) == 60
    folder = write_segment(tmp_path / "gap", "a1|2018-08-02--08-34-47", 0, 7)
    times = folder / "global_pose/frame_times"
    save_array(times, np.load(times) + 3.0 * (np.arange(60) >= 25))
    make(tmp_path / "gap", tmp_path / "gap.jsonl", capsys)
    check_windows(tmp_path / "gap.jsonl", [(7, 25, 0, 20.0004), (7, 35, 25, 20.0004)], 20)
    make(write_nuscenes(tmp_path / "nuscenes"), tmp_path / "nuscenes.jsonl", capsys)
    check_windows(tmp_path / "nuscenes.jsonl", [(0, 24, 0, 12), (0, 24, 24, 12)], 20)
    for episode, drive in enumerate(("2011_09_26_drive_0001", "2011_09_26_drive_0002")):
        write_kitti(tmp_path / "kitti", drive, episode)
    make(tmp_path / "kitti", tmp_path / "kitti.jsonl", capsys)
    annotations = check_windows(tmp_path / "kitti.jsonl", [(0, 20, 0, 10), (1, 20, 0, 10)], 20)
    assert annotations[0]["yaw_rate"][3] == -0.25
    make(write_cityscapes(tmp_path / "city"), tmp_path / "city.jsonl", capsys)
    check_windows(tmp_path / "city.jsonl", [(0, 30, 0, 17), (0, 30, 30, 17)], 20, clip_fps=8.5)
    track = tmp_path / "track/images/track/train/a-b"
    save_pictures(track, [f"a-b-{n:07d}.jpg" for n in (*range(1, 13), *range(20, 32))], 4)
    make(tmp_path / "track", tmp_path / "track.jsonl", capsys)
    check_windows(tmp_path / "track.jsonl", [(4, 12, 0, 5), (4, 12, 12, 5)], 20, clip_fps=2.5)
    for episode, side in enumerate(("train", "val")):
        encode(tmp_path / "bdd/videos" / side / f"{side}.mov", [picture(episode, n) for n in range(40)], 30)
    make(tmp_path / "bdd", tmp_path / "bdd.jsonl", capsys)
    check_windows(tmp_path / "bdd.jsonl", [(0, 40, 0, 30), (1, 40, 0, 30)], 20)
    (tmp_path / "bdd/kinetics.csv").write_text("videos/val/val.mov 3\n")
    make(tmp_path / "bdd/kinetics.csv", tmp_path / "kinetics.jsonl", capsys)
    assert check_windows(tmp_path / "kinetics.jsonl", [(1, 40, 0, 30)], 10)[0]["maneuver"] == "3"
    save_pictures(tmp_path / "drives/a", [f"{n}.png" for n in range(1, 13)])
    save_pictures(tmp_path / "drives/b", [f"{1526915243012 + 100 * n}.png" for n in range(12)], 1)
    make(tmp_path / "drives", tmp_path / "drives.jsonl", capsys, "--frame_fps", "10")
    check_windows(tmp_path / "drives.jsonl", [(0, 12, 0, 10), (1, 12, 0, 10)], 20)


@pytest.mark.slow
def test_a_run_learns_from_a_list(lerobot, tmp_path):
    """The real commands: a list is made, and three steps are taken on its episodes, which are held out whole."""
    out, runs = tmp_path / "list.jsonl", tmp_path / "run"
    command = [sys.executable, str(ROOT / "tools/make_list.py"), str(lerobot["v3.0"]), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "next: python VJepa_AUTO_V2.py" in done.stdout, done.stderr
    cfg = small_config(data_root=str(out), out_dir=str(runs), steps=3, picture=False, val_clips=2)
    (tmp_path / "config.json").write_text(json.dumps(asdict(cfg)))
    done = subprocess.run([sys.executable, SCRIPT, "--config", str(tmp_path / "config.json")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and not (runs / "bad_files.jsonl").exists()
