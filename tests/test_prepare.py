"""tools/prepare_videos.py: what is read of a prepared folder is what was read of the originals, whatever happened."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, V, small_config
from test_timelines import shown_at, with_matrix, write_streams
from test_videos import PLAN, coded_frames, frame_numbers, write_coded, write_hevc

sys.path.insert(0, str(ROOT / "tools"))

import prepare_videos as P

STARTS = (0.0, 0.31, 0.77, 1.0)


def run(source, out, *flags):
    """The command in this process -> exit code."""
    return P.main(["--input", str(source), "--output", str(out), "--workers", "2", *flags])


def videos_of(root, **fields):
    """{drive: [its videos]} of a data_root, and the config that names it."""
    cfg = replace(small_config(lambda_supcon=1.0), data_root=str(root), **fields)
    found = {}
    for video in V.list_data(cfg):
        found.setdefault(video.drive, []).append(video)
    return found, cfg


def numbers_of(video, cfg, **changes):
    """Frame numbers of clips at all STARTS of a video, as training reads them."""
    plans = [replace(PLAN, u_start=float(u), frame_fps=cfg.frame_fps, **changes) for u in STARTS]
    annotation = V.read_annotation(cfg.data_root, video)
    fitted = [V.fit_plan(plan, video, annotation) for plan in plans]
    return [frame_numbers(V.read_frames(video.path, plan, "pyav")).tolist() for plan in fitted]


def second_and_rate(path):
    """-> (seconds of all frames, TimeLine) of a file."""
    with V.opened_stream(str(path)) as (container, stream):
        line, packets = V.time_line(container, stream, PLAN, fast=False)
        return [line.second(frame.pts) for frame in V.pyav_frames(stream, np.zeros(1), False, line, packets)], line


def content(path):
    """Names and bytes of all below a folder."""
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of many kinds of files, and what became of it -> (folder, prepared folder, presentation times in ms)."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    rng, videos = np.random.default_rng(0), source / "videos"
    (videos / "city").mkdir(parents=True)
    pts = np.cumsum([0, *rng.choice([20, 33, 40, 300], 119)])
    write_coded(videos / "vfr.mp4", 120, 25, {"bf": "3"}, pts_ms=pts)
    write_coded(videos / "city" / "vfr.mkv", 120, 25, {"bf": "2"}, pts_ms=pts + 700)
    write_coded(videos / "even.MOV", 100, 30000 / 1001)
    write_coded(videos / "stream.ts", 100, 10, {"g": "20", "bf": "2"})
    write_coded(videos / "old.avi", 100, 10, {"bf": "0"})
    write_hevc(videos / "raw.hevc", coded_frames(60, 64))
    (source / "annotations" / "city").mkdir(parents=True)
    (source / "annotations" / "vfr.json").write_text('{"maneuver": "turn_left", "fps": 2, "speed": [1, 2, 3]}')
    (source / "annotations" / "city" / "vfr.json").write_text('{"maneuver": "stop"}')
    (source / "annotations" / "raw.json").write_text('{"fps": 12.5, "maneuver": 0}')
    (source / "annotations" / "old.json").write_text("{broken")
    before = content(source)
    assert run(source, out) == V.EXIT_OK
    assert content(source) == before
    return source, out, pts


def test_windows_show_the_same_frames(prepared):
    """Variable rates, an own rate from an annotation, mp4, mkv, mov, ts, avi and a raw stream: every window of the
    prepared file shows the frames of that window of the original. Seen red with the length of the file a frame off.

    The header of the mkv calls its rate 25, the mean of its frames is 10: half a frame, which V.frame_times adds, is
    another time. There the frames are those on screen at the times asked for, by the original's times."""
    source, out, pts = prepared
    (old, cfg), (new, new_cfg) = videos_of(source), videos_of(out)
    assert list(old) == list(new) and len(old) == 6
    for name in old:
        if name == "old.avi":  # its annotation is broken, here and there
            for videos, config in ((old, cfg), (new, new_cfg)):
                with pytest.raises(V.BadFile, match=r"old\.json"):
                    V.read_annotation(config.data_root, videos[name][0])
            continue
        for changes in ({}, {"fps": 0.0}, {"fps": 5.0, "num_frames": 12}):
            if name == "city/vfr.mkv":
                plans = [replace(PLAN, u_start=u_start, **changes) for u_start in STARTS]
                timing = V.video_timing(new[name][0].path, PLAN)
                wanted = [shown_at(pts, V.frame_times(plan, *timing)).tolist() for plan in plans]
                assert numbers_of(new[name][0], new_cfg, **changes) == wanted
                continue
            assert numbers_of(new[name][0], new_cfg, **changes) == numbers_of(old[name][0], cfg, **changes), name
    for name in ("vfr.mp4", "city/vfr.mkv"):
        seconds, line = second_and_rate(new[name][0].path)
        assert np.abs(np.array(seconds) - (pts - pts[0]) / 1000).max() < 1e-6
        assert line.duration == pytest.approx(second_and_rate(old[name][0].path)[1].duration, abs=1e-9)


def test_what_is_written(prepared):
    """H.264 yuv420p in mp4 without sound, a key frame at least every 30 frames, decoding times that rise."""
    import av

    for path in sorted((prepared[1] / "videos").rglob("*.*")):
        with av.open(str(path)) as container:
            assert "mp4" in container.format.name and len(container.streams) == 1
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            packets = [packet for packet in container.demux(stream) if packet.size]
            assert all(a.dts < b.dts for a, b in zip(packets, packets[1:]))
            assert max(np.diff([number for number, packet in enumerate(packets) if packet.is_keyframe] + [0])) <= 30


def test_split_labels_and_annotations_stay(prepared):
    """V.open_data gives both folders the same sides, names and maneuvers; annotations are read alike."""
    sources = []
    for root in prepared[:2]:
        cfg = replace(small_config(lambda_supcon=1.0, val_fraction=0.4), data_root=str(root))
        data = V.open_data(V.VJepaAutoV2, cfg, V.list_data(cfg), True, lambda: None)
        annotations = [V.read_annotation(root, video) for video in (*data.train, *data.val) if video.name != "old.avi"]
        sources.append(([v.name for v in data.train], [v.name for v in data.val], data.maneuvers, annotations))
    assert sources[0] == sources[1] and len(sources[0][1]) > 1
    assert {"turn_left", "turn_right", "stop", "0"} <= set(sources[0][2])


def test_the_same_command_goes_on(prepared, tmp_path, capsys):
    """Finished files stay untouched, what a kill left is removed, a changed source is done anew, and where it fails now
    its old file goes; a source that is gone is named, other settings are other files."""
    import shutil

    source, out = tmp_path / "source", tmp_path / "out"
    (source / "videos").mkdir(parents=True)
    for name in ("vfr.mp4", "even.MOV", "stream.ts"):
        shutil.copy(prepared[0] / "videos" / name, source / "videos" / name)
    assert run(source, out) == V.EXIT_OK
    before = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    (out / "videos" / f".vfr.mp4.12{P.TAIL}").write_bytes(b"half")
    with open(out / "prepared.jsonl", "ab") as file:
        file.write(P.Records.HEAD + b'"output": "videos/vfr.mp4", "ke')
    assert run(source, out) == V.EXIT_OK and "(0 now" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()} == before
    write_coded(source / "videos" / "vfr.mp4", 50, 10)
    (source / "videos" / "even.MOV").unlink()
    assert run(source, out) == V.EXIT_OK
    said = capsys.readouterr().out
    assert "(1 now" in said and "1 file(s) that the input has no more: videos/even.MOV" in said
    assert len(second_and_rate(out / "videos" / "vfr.mp4")[0]) == 50
    assert run(source, out, "--crf", "30") == V.EXIT_OK and "(2 now" in capsys.readouterr().out
    (source / "videos" / "stream.ts").write_bytes(b"x" * 4000)  # what was made of it before must not stay
    assert run(source, out, "--crf", "30") == V.EXIT_ERROR and not (out / "videos" / "stream.ts").exists()
    (source / "videos" / "stream.ts").unlink()
    capsys.readouterr()
    assert run(source, out, "--crf", "30") == V.EXIT_OK and "(0 now" in capsys.readouterr().out


def test_lists_keep_what_their_lines_say(tmp_path, capsys):
    """Parts, groups, labels, inline and filed signals, told times, pictures: the new list gives the same drives, parts
    and annotations, and its windows the same frames. Two files of one name do not meet."""
    from PIL import Image

    frames = coded_frames(80, 64)
    for folder in ("a", "b", "drive"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    write_coded(tmp_path / "in/a/x.mp4", 120, 10)
    write_coded(tmp_path / "in/a/x.mkv", 60, 10)
    write_hevc(tmp_path / "in/b/video.hevc", frames)
    for number in range(40):
        Image.fromarray(frames[number]).save(tmp_path / f"in/drive/{number}.png")
    (tmp_path / "in/times.txt").write_text("".join(f"{100 + n * 0.083 + 0.02 * (n % 2)}\n" for n in range(80)))
    (tmp_path / "in/signals.json").write_text('{"fps": 1, "speed": [4, 5]}')
    rows = [
        {"video": "a/x.mp4", "begin": 1.5, "length": 6.0, "label": "left", "group": "g"},
        {"video": "a/x.mp4", "begin": 8.0, "signals": {"fps": 2, "speed": [1, None, 3], "maneuver": "right"}},
        {"video": "a/x.mkv", "signals": "signals.json", "maneuver": 7},
        {"video": "b/video.hevc", "times": "times.txt"},
        {"video": "b/video.hevc", "fps": 8},
        {"frames": "drive", "fps": 10, "group": "drive 1"},
        {"frames": "drive/1*.png", "fps": 4},
        {"video": "missing.mp4", "label": "gone"},
    ]
    (tmp_path / "in/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "in/list.jsonl", tmp_path / "out") == V.EXIT_ERROR
    out, err = capsys.readouterr()
    assert f"--data_root {tmp_path / 'out/videos.jsonl'}" in out and "missing.mp4: cannot be read" in err
    assert json.loads((tmp_path / "out/failed.jsonl").read_text())["file"].endswith("missing.mp4")
    (old, cfg), (new, new_cfg) = videos_of(tmp_path / "in/list.jsonl"), videos_of(tmp_path / "out/videos.jsonl")
    assert list(new) == [drive for drive in old if drive != "missing.mp4"]
    for drive, videos in new.items():
        assert len(videos) == len(old[drive])
        for was, video in zip(old[drive], videos):
            assert (video.begin, video.length, video.label) == (was.begin, was.length, was.label)
            assert V.read_annotation("", video) == V.read_annotation("", was)
            assert video.path.startswith(str(tmp_path / "out")) and not video.times and not video.fps
            assert numbers_of(video, new_cfg) == numbers_of(was, cfg), was.name
    assert len(list((tmp_path / "out/videos").rglob("*.mp4"))) == 6


def test_folders_of_pictures_and_sides(tmp_path, capsys):
    """Pictures below train/ and val/ become videos there, with the annotations of their drives; without these folders
    they become a list."""
    from PIL import Image

    for drive in ("train/a.1", "val/b"):
        (tmp_path / "in" / drive).mkdir(parents=True)
        for number, picture in enumerate(coded_frames(6, 48)):
            Image.fromarray(picture).save(tmp_path / "in" / drive / f"{number}.png")
    (tmp_path / "in/annotations/train").mkdir(parents=True)
    (tmp_path / "in/annotations/train/a.json").write_text('{"maneuver": "stop"}')
    with pytest.raises(V.UsageError, match="--frame_fps"):
        P.prepare(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert run(tmp_path / "in", tmp_path / "out", "--frame_fps", "5") == V.EXIT_OK
    (old, cfg), (new, new_cfg) = videos_of(tmp_path / "in", frame_fps=5.0), videos_of(tmp_path / "out")
    sides = V.list_data(new_cfg).sides
    assert {side: [video.name for video in part] for side, part in sides.items()} == {
        "train": ["train/a.1.mp4"], "val": ["val/b.mp4"], "test": []
    }  # fmt: skip
    assert V.read_annotation(new_cfg.data_root, new["train/a.1.mp4"][0]) == {"maneuver": "stop"}
    assert numbers_of(new["val/b.mp4"][0], new_cfg) == numbers_of(old["val/b"][0], cfg)
    assert run(tmp_path / "in/train", tmp_path / "alone", "--frame_fps", "5") == V.EXIT_OK
    assert list(videos_of(tmp_path / "alone/videos.jsonl")[0]) == ["a.1"]


def test_a_stream_that_jumps(tmp_path, capsys):
    """Two streams in one file: two parts with their own signals, whose windows are right; below train/ it is refused,
    since folders have no parts."""
    data = open(write_coded(tmp_path / "one.ts", 200, 10, {"g": "20", "bf": "2"}), "rb").read()
    for folder in ("in", "split/train", "split/val"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "two.ts").write_bytes(data + data)
    (tmp_path / "in/annotations").mkdir()
    (tmp_path / "in/annotations/two.json").write_text(json.dumps({"fps": 1, "speed": list(range(40))}))
    assert run(tmp_path / "in", tmp_path / "out") == V.EXIT_OK
    assert "--data_root" in (said := capsys.readouterr().out) and said.rstrip().endswith("videos.jsonl")
    new, cfg = videos_of(tmp_path / "out/videos.jsonl")
    assert list(new) == ["two.ts"] and len(new["two.ts"]) == 2
    for video, begin in zip(new["two.ts"], (0, 20)):
        assert (round(video.begin), round(video.length)) == (begin, 20)
        assert V.read_annotation("", video)["speed"] == list(range(begin, begin + 20))
        for u_start, numbers in zip(STARTS, numbers_of(video, cfg)):
            assert np.abs(np.array(numbers) - (u_start * 160 + np.arange(8) * 5)).max() <= 1
    assert run(tmp_path / "split", tmp_path / "no") == V.EXIT_ERROR
    assert "jump at 20.00 s" in capsys.readouterr().err


def test_gaps_in_told_times(tmp_path):
    """A raw stream whose times have a gap: a part on each side of it, and what happens between two frames at one time
    is that the later one is shown."""
    write_hevc(tmp_path / "a.hevc", coded_frames(80, 64))
    seconds = np.arange(80) * 0.1 + 30.0 * (np.arange(80) >= 50)
    np.save(tmp_path / "times.npy", seconds)
    (tmp_path / "list.jsonl").write_text('{"video": "a.hevc", "times": "times.npy", "begin": 1}\n')
    assert run(tmp_path / "list.jsonl", tmp_path / "out") == V.EXIT_OK
    new, _ = videos_of(tmp_path / "out/videos.jsonl")
    parts = [(round(video.begin, 6), round(video.length, 6)) for video in new["a.hevc"]]
    assert parts == [(1.0, 4.0), (35.0, 3.0)]
    frames = [(0.0, "a"), (-1.0, "b"), (0.5, "c"), (0.5, "d"), (0.75, "e"), (9.0, "f")]
    assert list(P.on_screen(iter(frames), 20000, 20000)) == [(0, "b"), (10000, "d"), (15000, "e")]
    assert list(P.on_screen(iter([(3.0, "a"), (4.0, "b")]), 20000, 200000)) == [(0, "a"), (80000, "b")]


def test_pictures_as_they_are_shown(tmp_path):
    """Turned upright, pixels squared, the stream that plays, never larger than the source, even sides."""
    assert P.target_size(1280, 720, 288) == (512, 288) and P.target_size(375, 1242, 288) == (288, 954)
    assert P.target_size(161, 121, 288) == (160, 120) and P.target_size(289, 4000, 288) == (288, 3986)
    import av

    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 250  # top left
    for name, aspect in (("turned.mp4", Fraction(1)), ("wide.mp4", Fraction(2))):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.options = {"crf": "5"}
            stream.codec_context.sample_aspect_ratio = aspect
            for _ in range(8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    data = (tmp_path / "turned.mp4").read_bytes()
    (tmp_path / "turned.mp4").write_bytes(with_matrix(data, (0, 1, -1, 0)))
    write_streams(tmp_path / "cover.mp4", [("mjpeg", 1, 1, 0, {}), ("libx264", 40, 10, 0, {"bf": "2"})])
    out = tmp_path.parent / f"{tmp_path.name}_out"
    assert run(tmp_path, out, "--short_side", "32") == V.EXIT_OK
    for name, size in (("turned.mp4", (32, 42)), ("wide.mp4", (86, 32)), ("cover.mp4", (32, 32))):
        with V.opened_stream(str(out / "videos" / name)) as (_, stream):
            assert (stream.width, stream.height) == size
        for plan in (replace(PLAN, num_frames=2), replace(PLAN, num_frames=2, ratio=1.3)):
            was, now = (V.read_frames(str(root / name), plan, "pyav") for root in (tmp_path, out / "videos"))
            assert np.abs(was.astype(int) - now).mean() < 6, name  # another corner would be 60 off


def break_first(monkeypatch, deed):
    """Let the process that reads bad.mp4 do a deed after its first frame."""
    real = P.video_frames

    def frames(path, plan, short_side):
        for number, item in enumerate(real(path, plan, short_side)):
            if number == 2 and path.endswith("bad.mp4"):
                deed(path)
            yield item

    monkeypatch.setattr(P, "video_frames", frames)


def grow(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 8)


@pytest.mark.parametrize(
    "deed, reason",
    [
        (lambda path: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda path: time.sleep(60), "nothing came of it for 1.5 s"),
        (grow, "changed while it was transcoded"),
    ],
    ids=["crash", "hang", "change"],
)
def test_a_bad_file_costs_itself(tmp_path, monkeypatch, capsys, deed, reason):
    """A decoder that crashes or hangs, and a source that changes meanwhile: named on the screen and in failed.jsonl,
    nothing of it is kept, the other file is there, and the next run does the rest."""
    (tmp_path / "in").mkdir()
    for name in ("good.mp4", "bad.mp4"):
        write_coded(tmp_path / "in" / name, 20, 10)
    with monkeypatch.context() as patch:
        break_first(patch, deed)
        assert run(tmp_path / "in", tmp_path / "out", "--timeout_s", "1.5") == V.EXIT_ERROR
    assert reason in capsys.readouterr().err and reason in (tmp_path / "out/failed.jsonl").read_text()
    assert [path.name for path in (tmp_path / "out/videos").iterdir()] == ["good.mp4"]
    assert run(tmp_path / "in", tmp_path / "out") == V.EXIT_OK and "(1 now" in capsys.readouterr().out
    assert not (tmp_path / "out/failed.jsonl").exists() and len(list((tmp_path / "out/videos").iterdir())) == 2


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    """What is finished stays, nothing half written does, and the same command goes on."""
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "bad.mp4"):
        write_coded(tmp_path / "in" / name, 40, 10)
    with monkeypatch.context() as patch:
        break_first(patch, lambda path: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
        assert run(tmp_path / "in", tmp_path / "out", "--workers", "1") == V.EXIT_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert "cannot be written" in lines[-1] and "nothing is lost" in lines[-1]
    assert {path.name for path in (tmp_path / "out/videos").iterdir()} <= {"a.mp4"}
    assert run(tmp_path / "in", tmp_path / "out") == V.EXIT_OK


def test_what_is_refused(prepared, tmp_path, capsys):
    """Output and input that could meet, folders of others, wrong flags, nothing to do: one line, exit code 2 or 1."""
    source, (root, list_path) = prepared[0], (tmp_path / "in", tmp_path / "list.csv")
    (root / "videos").mkdir(parents=True)
    write_coded(root / "videos" / "a.mp4", 8, 10)
    list_path.write_text(f"{root}/videos/a.mp4,left\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    cases = [
        (root, root, (), 2, "lies in --input"),
        (root, root / "small", (), 2, "lies in --input"),
        (root / "videos", root, (), 2, "holds originals"),
        (list_path, root, (), 2, "holds originals"),
        (root, tmp_path / "full", (), 1, "holds no prepared.jsonl"),
        (tmp_path / "none", tmp_path / "x", (), 2, f"error: --input {tmp_path}/none: no such file or folder; give a"),
        (tmp_path / "full", tmp_path / "x", (), 2, "no video matches"),
        (root, tmp_path / "x", ("--short_side", "33"), 2, "--short_side 33"),
        (root, tmp_path / "x", ("--crf", "99"), 2, "--crf 99"),
        (root, tmp_path / "x", ("--gop", f"{10**10}"), 2, "--gop 10000000000 must be"),
        (root, root / "videos" / "a.mp4" / "x", (), 2, "lies in --input"),
        (root, source / "videos" / "vfr.mp4", (), 1, "cannot be written"),
    ]
    for given, out, flags, code, words in cases:
        assert run(given, out, *flags) == code, words
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0], lines
    assert run(root, tmp_path / "out") == V.EXIT_OK
    write_coded(root / "videos" / "b.mp4", 8, 10)
    (tmp_path / "out/videos/b.mp4").write_bytes(b"somebody's")
    assert run(root, tmp_path / "out") == V.EXIT_ERROR and "was not written by this tool" in capsys.readouterr().err
    assert (tmp_path / "out/videos/b.mp4").read_bytes() == b"somebody's"


def advice(monkeypatch, costs, device="cpu", seconds=0.4, kind="videos", frame_cache=None):
    """The start-up line for what decoding a few clips was measured to cost."""
    cfg = replace(small_config(batch_size=8, num_workers=4), data_root="my videos")
    source, data = V.DataSource(kind, "", [], [], [], True), V.ClipDataset(cfg, [], "", "train")
    data.frame_cache = frame_cache
    process = V.Process(0, 1, torch.device(device), None)
    monkeypatch.setattr(V.DataSource, "dataset", lambda *args: data)
    monkeypatch.setattr(V, "told_apart", lambda *args: (costs, True))
    monkeypatch.setattr(V.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    return V.advise_preparing(SimpleNamespace(cfg=cfg, process=process, source=source), seconds)


def test_start_up_says_when_preparing_would_help(monkeypatch, tmp_path, prepared):
    """Only where decoding takes longer than the step, files are large, and no frames are kept; never of prepared files.
    The gain is the least that was measured for files of that size."""
    command = "python tools/prepare_videos.py --input 'my videos' --output DIR"
    # 8 clips of 1.2 s by 4 workers on 4 cores: 2.4 s, beside 0.4 s of the step on the same cores, or on another device
    line = advice(monkeypatch, [(1.2, 720), (0.1, 360), (1.3, 1080)])
    assert line == f"decoding takes 86% of the time: {command} would make it 6 times faster"
    assert "83%" in advice(monkeypatch, [(1.2, 720)], device="cuda")
    assert advice(monkeypatch, [(0.5, 360)]).endswith("71% of the time: " + command + " would halve it")
    for costs, others in (([(0.1, 720)], {}), ([(1.2, 288)], {}), ([], {}), ([(1.2, 720)], {"kind": "random"})):
        assert advice(monkeypatch, costs, **others) == ""
    assert advice(monkeypatch, [(1.2, 720)], frame_cache=object()) == ""
    assert advice(monkeypatch, [(1.2, 720)], seconds=0.2) == ""  # its 20 steps take 4 s
    for root, side in zip(prepared[:2], (32, 0)):
        video = V.VideoFile("vfr.mp4", str(root / "videos" / "vfr.mp4"))
        data = V.ClipDataset(small_config(), [video], "", "train")
        ((cost, found),) = V.decode_costs(data)
        assert found == side and 0 < cost < 5


def test_files_of_others_in_the_output_stay(tmp_path, capsys):
    """A stranger's lists, annotations, videos and temporary files are neither deleted nor overwritten, whatever would
    write or drop a file of that name; what is not in the way stays where it is. Seen red: videos.jsonl and
    an annotation written by hand were deleted, another overwritten."""
    (tmp_path / "in/annotations").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4"):
        write_coded(tmp_path / "in" / name, 8, 10)
    (tmp_path / "in/annotations/b.json").write_text('{"maneuver": "stop"}')
    (tmp_path / "list.csv").write_text(f"{tmp_path}/in/a.mp4,left\n")
    out = tmp_path / "out"
    assert run(tmp_path / "in", out) == V.EXIT_OK
    planted = {}
    names = ("videos.jsonl", "failed.jsonl", "annotations/a.json", "annotations/b.json", ".x.preparing", "note.txt")
    for name in (*names, "videos/.mine.mp4.1.preparing"):
        planted[out / name] = f"the user's own {name}".encode()
        (out / name).write_bytes(planted[out / name])
    (tmp_path / "in/annotations/b.json").write_text('{"maneuver": "left"}')
    assert run(tmp_path / "in", out) == V.EXIT_OK
    aside = out / "annotations/previous_1/b.json"
    assert str(aside.parent) in capsys.readouterr().err
    assert aside.read_bytes() == planted.pop(out / "annotations/b.json")
    assert (out / "annotations/b.json").read_text() == '{"maneuver": "left"}'
    assert {path: path.read_bytes() for path in planted} == planted
    (tmp_path / "in/annotations/b.json").unlink()
    assert run(tmp_path / "in", out) == V.EXIT_OK and not (out / "annotations/b.json").exists()
    (tmp_path / "in/b.mp4").write_bytes(b"x" * 4000)
    assert run(tmp_path / "in", out) == V.EXIT_ERROR and not (out / "videos/b.mp4").exists()
    assert (out / "previous_1/failed.jsonl").read_bytes() == planted.pop(out / "failed.jsonl")
    planted[out / "videos/a.mp4"] = b"the user's own"
    (out / "videos/a.mp4").write_bytes(b"the user's own")
    assert run(tmp_path / "in", out) == V.EXIT_ERROR and "was not written by this tool" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in planted} == planted
    del planted[out / "videos/a.mp4"]
    (out / "videos/a.mp4").unlink()
    assert run(tmp_path / "list.csv", out) == V.EXIT_OK
    assert (out / "previous_2/videos.jsonl").read_bytes() == planted.pop(out / "videos.jsonl")
    assert run(tmp_path / "list.csv", out) == V.EXIT_OK and not (out / "previous_3").exists()
    assert {path: path.read_bytes() for path in planted} == planted
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/prepared.jsonl").write_text("mine")
    assert run(tmp_path / "list.csv", tmp_path / "theirs") == V.EXIT_ERROR
    assert "did not write its prepared.jsonl" in capsys.readouterr().err
    assert content(tmp_path / "theirs") == {"prepared.jsonl": b"mine"}


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """kill -9 at random moments, then to the end: each file is whole, none was made twice after it was finished, no
    temporary is left, and no process."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        write_coded(tmp_path / "in" / f"{number}.mp4", 400, 10)
    command = [sys.executable, str(ROOT / "tools/prepare_videos.py"), "--input", str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), "--workers", "2"]
    for seconds in (0.0, 0.3, 0.6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "out/prepared.jsonl").exists():
            time.sleep(0.02)
        time.sleep(seconds)
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "6 of 6 files" in done.stdout, done.stderr
    names = [json.loads(line)["output"] for line in (tmp_path / "out/prepared.jsonl").read_text().splitlines()]
    assert sorted(names) == sorted(set(names)) and len(names) == 6
    files = sorted(path.name for path in (tmp_path / "out/videos").iterdir())
    assert files == [f"{number}.mp4" for number in range(6)]
    for name in files:
        assert len(second_and_rate(tmp_path / "out/videos" / name)[0]) == 400
    assert re.search(r"100%: \d/\d files, 0 s to go", done.stderr)
