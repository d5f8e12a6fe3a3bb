"""Lines of a jsonl list: parts of videos, raw streams and pictures with told times, groups, signals, and what is wrong
with them."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FOOTAGE, ROOT, SHALLOW, V, small_config
from test_videos import coded_frames, frame_numbers, names_of, touch

PLAN = V.ClipPlan(8, 4.0, 64, 64, 0.0, 1.0, 1.0, 0.5, 0.5)
EPISODES = (0, 37, 60, 61, 140, 400)  # first frames in a file of 400
HEVC = ("libx265", {"x265-params": "log-level=none:keyint=90:pools=none:frame-threads=1"})
AV1 = ("libsvtav1", {"preset": "8", "crf": "5"})


def encode(path, count, fps, codec="libx264", options=None, pix_fmt="yuv420p", format=None, first_pts=0):
    """Coded frames of 64 x 64 in a file -> its path; skips where the encoder is not there."""
    import av

    try:
        av.codec.Codec(codec, "w")
    except (ValueError, av.FFmpegError):
        pytest.skip(f"no encoder {codec}")
    os.environ.setdefault("SVT_LOG", "-1")
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options, stream.codec_context.thread_count = pix_fmt, options or {}, 1
        for number, picture in enumerate(coded_frames(count, 64)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + first_pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_list(folder, *rows, name="list.jsonl"):
    """Rows as a jsonl list -> its path."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def listed(folder, *rows):
    """Rows as a jsonl list -> the Listing that is read of it."""
    return V.find_videos(write_list(folder, *rows), "*")


def read_numbers(video, plan, decoder="auto"):
    """Frame numbers of a clip of a listed file."""
    return frame_numbers(V.read_frames(video.path, V.fit_plan(plan, video), decoder))


def episode_rows(name, fps):
    """A line for each episode, its begin summed up as a data set's index does it, with all that floats do to it."""
    rows, begin = [], 0.0
    for first, end in zip(EPISODES, EPISODES[1:]):
        rows.append({"video": name, "begin": begin, "length": (end - first) / fps, "group": f"episode {first}"})
        begin += float(np.float32((end - first) / fps))
    return rows


def write_pictures(folder, count, suffix="png", size=64, first=1):
    """Coded frames as pictures 1, 2, ..., 10, ... without leading zeros -> folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(coded_frames(count, size)):
        Image.fromarray(picture).save(folder / f"{number + first}.{suffix}", quality=95)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """120 pngs that tell their numbers, 0 to 119 -> folder."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "drive", 120)


@pytest.fixture(scope="module")
def raw_hevc(tmp_path_factory):
    """A raw stream of 200 frames whose header says 25 per second, with times at 20.0004 -> folder."""
    folder = tmp_path_factory.mktemp("raw")
    encode(folder / "video.hevc", 200, 25, *HEVC, format="hevc")
    with open(folder / "frame_times", "wb") as file:  # npy without a suffix
        np.save(file, 1e6 + np.arange(200) / 20.0004)
    return folder


# -- parts of a file


@pytest.mark.parametrize(
    "suffix, codec, options",
    [
        ("mp4", "libx264", {"crf": "10", "g": "250", "bf": "3"}),
        ("mp4", *AV1),
        ("mp4", *HEVC),
        ("mkv", "libx264", {"crf": "10", "g": "30", "bf": "2"}),
        ("ts", "libx264", {"crf": "10", "g": "50", "bf": "2"}),
        ("avi", "libx264", {"crf": "10", "g": "50", "bf": "0"}),
    ],
)
def test_no_window_shows_another_episode(tmp_path, suffix, codec, options):
    """60 windows over the episodes of one file, 360 in all: every frame is its episode's and within one of the truth,
    also at rates above the file's and where an episode is shorter than the window, and where decord is asked for; the
    fast path gives the plain one's frames. Seen red without the bound at the end, and without half a frame."""
    fps = 30
    encode(tmp_path / f"file.{suffix}", 400, fps, codec, options, first_pts=90 if suffix == "mp4" else 0)
    rng, videos = np.random.default_rng(0), listed(tmp_path, *episode_rows(f"file.{suffix}", fps))
    for number in range(60):
        at = number % len(videos)
        first, end = EPISODES[at : at + 2]
        u_start = float((0, 1, rng.random())[number // 5 % 3])
        plan = replace(PLAN, u_start=u_start, fps=(4.0, 30.0, 60.0, 0.0)[number % 4])
        video = videos[at]
        plan = V.fit_plan(plan, video)
        frames = V.read_frames(video.path, plan, ("auto", "decord")[number % 2])
        found, (seconds, rate) = frame_numbers(frames), V.video_timing(video.path, plan)
        truth = V.frame_times(plan, seconds, rate) * fps
        assert first <= found.min() and found.max() < end, (number, video.name, found)
        assert np.abs(found - np.floor(truth)).max() <= 1
        if number % 6 == 0:
            assert np.array_equal(V.read_pyav(video.path, plan), V.read_pyav(video.path, plan, fast=False))


def test_parts_end_where_their_lines_say(tmp_path):
    """A begin alone runs to the file's end; a part may lie a second over it, as containers round, and no more; one that
    begins behind the end is named. A whole file is read as ever."""
    encode(tmp_path / "a.mp4", 200, 20)
    whole, tail, over, far, behind = listed(
        tmp_path,
        {"video": "a.mp4"},
        {"video": "a.mp4", "begin": 6},
        {"video": "a.mp4", "begin": 6, "length": 4.9},
        {"video": "a.mp4", "begin": 6, "length": 6},
        {"video": "a.mp4", "begin": 11, "length": 5},
    )
    assert V.fit_plan(PLAN, whole) == replace(PLAN, file=whole) and whole.name == "a.mp4" and far.name == "a.mp4#t=6,12"
    for video in (tail, over):
        assert read_numbers(video, PLAN)[0] == 120
        assert read_numbers(video, replace(PLAN, u_start=1.0))[-1] == 195
    for video, words in ((far, "begin 6, length 6"), (behind, "begin 11, length 5")):
        for decoder in ("pyav", "decord"):
            with pytest.raises(V.BadFile, match=f"lasts 10.00 s, its line asks for {words}"):
                read_numbers(video, PLAN, decoder)


def test_a_bad_episode_leaves_its_neighbours(tmp_path):
    """What is wrong with one line stands under its own name, in samples and in quarantine."""
    encode(tmp_path / "a.mp4", 100, 20)
    videos = listed(tmp_path, *({"video": "a.mp4", "begin": begin, "length": 2.5} for begin in (0, 2.5, 90)))
    data = V.ClipDataset(small_config(num_frames=12, clip_fps=8.0), videos, "", "train")
    samples = [data[index] for index in range(9)]
    assert {name for sample in samples for name, _ in sample["bad"]} == {"a.mp4#t=90,92.5"}
    assert {int(sample["file"]) for sample in samples} == {0, 1}
    data.quarantine[videos[0].name] = "quarantined"
    assert {int(data[index]["file"]) for index in range(9)} == {1}


# -- raw streams


def test_raw_streams_at_their_own_rate(raw_hevc):
    """By fps, by times, neither: 3 s are 60 frames at 20 per second, not 75; times count more than fps, a line more
    than the flag. Files whose rate a line tells are not among those guessed."""
    told, both, rate, plain = listed(
        raw_hevc,
        {"video": "video.hevc", "times": "frame_times", "begin": 2},
        {"video": "video.hevc", "times": "frame_times", "fps": 50},
        {"video": "video.hevc", "fps": 20.0},
        {"video": "video.hevc"},
    )
    assert np.array_equal(read_numbers(told, PLAN), 40 + 5 * np.arange(8))
    assert np.array_equal(read_numbers(both, PLAN), 5 * np.arange(8))
    assert np.array_equal(read_numbers(rate, replace(PLAN, frame_fps=10.0)), 5 * np.arange(8))
    assert np.array_equal(read_numbers(plain, replace(PLAN, frame_fps=10.0)), np.floor(2.5 * np.arange(8) + 0.5))
    seconds, fps = V.video_timing(told.path, V.fit_plan(PLAN, told))
    assert fps == pytest.approx(20.0004) and seconds == pytest.approx(200 / 20.0004 - 2)
    assert V.guessed_rates(small_config(), "", [told, rate]) == ([], True)


def test_no_window_crosses_a_gap(tmp_path, raw_hevc, pictures):
    """Times with two gaps: 200 windows of 2 s each lie in one stretch, the shares of the stretches are their lengths,
    and the stretch that is too short is never drawn; where none is long enough the longest is taken whole."""
    times = np.arange(120) / 20.0
    times[50:] += 5.0  # stretches of 2.5, 0.5 and 3 s
    times[60:] += 0.6
    (tmp_path / "times.txt").write_text("".join(f"{time:.3f}\n" for time in times))
    (video,) = listed(tmp_path, {"frames": str(pictures), "times": "times.txt"})
    firsts, rng = [], np.random.default_rng(0)
    for u_start in [0.0, 1.0, *rng.random(198)]:
        found = read_numbers(video, replace(PLAN, u_start=float(u_start), height=32, width=32))
        assert np.all(np.diff(found) == 5) and not any(found[0] < gap <= found[-1] for gap in (50, 60))
        firsts.append(found[0])
    assert min(firsts) == 0 and max(firsts) == 80 and 40 <= (np.array(firsts) < 50).sum() <= 140
    found = read_numbers(video, replace(PLAN, num_frames=40))
    assert found[0] >= 60 and found[-1] == 119
    (part,) = listed(tmp_path, {"frames": str(pictures), "times": "times.txt", "begin": 1, "length": 7.3})
    assert read_numbers(part, replace(PLAN, num_frames=4, u_start=0.99)).min() >= 20


# -- pictures


def test_pictures_are_frames_of_a_lossless_video(tmp_path, pictures, monkeypatch):
    """Bit for bit through the same crops, in natural order, and only what is needed is opened."""
    from PIL import Image

    encode(tmp_path / "same.mov", 120, 20, "png", pix_fmt="rgb24")
    video, drive = listed(tmp_path, {"video": "same.mov"}, {"frames": str(pictures), "fps": 20})
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    rng = np.random.default_rng(0)
    for _ in range(6):
        u_start, scale, ratio, u_x, u_y = rng.random(5)
        crop = dict(u_start=u_start, scale=0.5 + scale / 2, ratio=0.8 + ratio / 2, u_x=u_x, u_y=u_y)
        plan = replace(PLAN, height=40, width=56, **crop)
        frames = V.read_frames(drive.path, V.fit_plan(plan, drive), "auto")
        assert np.array_equal(frames, V.read_frames(video.path, V.fit_plan(plan, video), "pyav"))
    assert len(opened) == 6 * 8
    assert np.array_equal(read_numbers(drive, PLAN), 5 * np.arange(8))
    assert read_numbers(drive, replace(PLAN, fps=0.0)).tolist() == list(range(0, 120, 15))


def test_every_kind_of_picture_and_of_times(tmp_path):
    """jpg, bmp and webp; a pattern; times as KITTI writes them, as a csv of two folders merged; grey pictures."""
    from PIL import Image

    for suffix in ("jpg", "bmp", "webp"):
        write_pictures(tmp_path / suffix, 20, suffix)
    Image.fromarray(coded_frames(20, 64)[3]).convert("L").save(tmp_path / "bmp" / "4.bmp")
    touch(tmp_path / "jpg" / "._3.jpg")
    touch(tmp_path / "jpg" / "notes.txt")
    kitti = [f"2011-09-26 23:59:59.{800 + 100 * n:03d}000000" for n in range(2)]
    kitti += [f"2011-09-27 00:00:{n // 10:02d}.{n % 10}00000000" for n in range(18)]
    (tmp_path / "timestamps.txt").write_text("\n".join(kitti) + "\n\n")
    merged = [f"{('jpg', 'webp')[n % 2]}/{n + 1}.{('jpg', 'webp')[n % 2]},{7 + n / 10}" for n in range(20)]
    (tmp_path / "drive.csv").write_text("path,time\n" + "\n".join(merged) + "\n")
    for row in (
        {"frames": "jpg", "fps": 10},
        {"frames": "bmp/*.bmp", "times": "timestamps.txt"},
        {"frames": "webp/", "times": "timestamps.txt"},
        {"frames": "drive.csv"},
        {"frames": "jpg/1*.jpg", "fps": 10},
    ):
        (video,) = listed(tmp_path, row)
        wanted = [0, *range(9, 19)] if "1*" in row["frames"] else range(20)
        plan = replace(PLAN, num_frames=len(wanted), fps=10.0)
        assert read_numbers(video, plan).tolist() == list(wanted)


def test_pictures_stand_upright(tmp_path):
    """The EXIF turn of a camera held on its side is undone before the crop."""
    from PIL import Image

    (tmp_path / "drive").mkdir()
    upright = np.zeros((48, 96, 3), np.uint8)
    upright[:, 48:] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # stored with its left side up: to be turned a quarter clockwise
    for number in range(4):
        stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "drive" / f"{number}.jpg", exif=exif, quality=95)
    (video,) = listed(tmp_path, {"frames": "drive", "fps": 4})
    frame = V.read_frames(video.path, V.fit_plan(replace(PLAN, height=24, width=48), video), "auto")[0].astype(float)
    assert frame[:, :20].max() < 30 and frame[:, 28:].min() > 170


def break_pictures(folder, case):
    """Make a drive of 8 pictures that is wrong in one way -> its line."""
    from PIL import Image

    write_pictures(folder / "drive", 8)
    path, row = folder / "drive" / "5.png", {"frames": "drive", "fps": 4.0}
    if case == "two sizes":
        write_pictures(folder / "drive", 1, size=48, first=5)
    elif case == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "16 bits":
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(path)
    elif case == "huge":  # 60000 x 60000 by its header, in 33 bytes
        head = path.read_bytes()
        path.write_bytes(head[:16] + struct.pack(">II", 60000, 60000) + head[24:])
    elif case == "no rate":
        row = {"frames": "drive"}
    elif case == "no picture":
        row = {"frames": "drive/*.jpg", "fps": 4}
    elif case == "no folder":
        row = {"frames": "gone", "fps": 4}
    elif case == "a file":
        row = {"frames": "drive/5.png", "fps": 4}
    else:
        kind, text = case
        if text:
            (folder / kind).write_bytes(text if isinstance(text, bytes) else text.encode())
        row = {"frames": kind} if kind.endswith(".csv") else {"frames": "drive", "times": kind}
    return row


EIGHT = "".join(f"{n}\n" for n in range(8))


@pytest.mark.parametrize(
    "case, words",
    [
        ("two sizes", "pictures of two sizes: 1.png 64 x 64, 5.png 48 x 48"),
        ("damaged", "picture 5.png: "),
        ("empty", r"picture 5.png: empty file"),
        ("16 bits", "picture 5.png: 64 x 64 pixels of kind I"),
        ("huge", "picture 5.png: "),
        ("no rate", "no times: fps or times in its line, or --frame_fps"),
        ("no picture", r"no picture in it .*called \*.jpg"),
        ("no folder", "cannot be read .No such file"),
        ("a file", "cannot be read .Not a directory"),
        (("short", "0\n0.5\n1\n"), "8 pictures, and 3 times in short"),
        (("long", EIGHT + "8\n"), "8 pictures, and 9 times in long"),
        (("back", EIGHT.replace("5", "3.5")), "times back: .*each later than the one before"),
        (("nan", EIGHT.replace("5", "nan")), "times nan: .*each later"),
        (("one", "3\n"), "times one: they must be two or more"),
        (("text", "a\nb\n"), "times text: could not convert"),
        (("dates", "2011-09-26 10:00:00\nlater\n"), "times dates: "),
        (("npy", b"\x93NUMPYxx"), "times npy: "),
        (("cut", b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'shape': (" + b" " * 100), "times cut: "),
        (("gone", ""), "times gone: No such file"),
        (("a.csv", "name,time\nx.png,1\n"), "times a.csv: its first line must be path,time"),
        (("b.csv", "path,time\ngone.png,1\nmore.png,2\n"), "picture gone.png: .*No such file"),
        (("c.csv", "path,time\ngone.png,1\nmore.png\n"), "times c.csv: "),
        (("d.csv", "x"), "times d.csv: "),
    ],
)
def test_bad_drives_are_bad_files(tmp_path, case, words):
    """One line with the reason, and for what is told of them the name. Nothing but BadFile is raised."""
    (video,) = listed(tmp_path, break_pictures(tmp_path, case))
    with pytest.raises(V.BadFile, match=words) as error:
        read_numbers(video, PLAN)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_times_of_a_raw_stream_that_are_too_few(raw_hevc):
    """Fewer times than frames: named with both counts. More are a stream that was cut: the first are taken."""
    np.save(raw_hevc / "short.npy", np.arange(150) / 20)
    np.save(raw_hevc / "long.npy", np.arange(250) / 20)
    short, long = listed(raw_hevc, *({"video": "video.hevc", "times": f"{name}.npy"} for name in ("short", "long")))
    with pytest.raises(V.BadFile, match="200 frames, and 150 times in short.npy"):
        read_numbers(short, PLAN)
    assert V.video_timing(long.path, V.fit_plan(PLAN, long))[0] == pytest.approx(10.0)
    assert read_numbers(long, PLAN).tolist() == list(range(0, 40, 5))


# -- lines


@pytest.mark.parametrize(
    "row, words",
    [
        ({"video": "a.mp4", "frames": "a"}, "either a 'video'"),
        ({"begin": 1}, "either a 'video'"),
        ({"frames": ["a"]}, "path = .*must be a text"),
        ({"video": "a.mp4", "begin": -1}, "begin = -1 must be a number from 0 on"),
        ({"video": "a.mp4", "begin": "3"}, "begin = '3' must be"),
        ({"video": "a.mp4", "begin": True}, "begin = True must be"),
        ({"video": "a.mp4", "length": 0}, "length = 0 must be a number above 0"),
        ({"video": "a.mp4", "length": 1e300}, "length = 1e.300 must be"),
        ({"video": "a.mp4", "length": [3]}, "length = "),
        ({"video": "a.hevc", "fps": 0}, "fps = 0 must be a number above 0"),
        ({"frames": "a", "fps": -20.5}, "fps = -20.5 must"),
        ({"video": "a.mp4", "times": "t.npy"}, "times are for pictures and raw streams"),
        ({"video": "a.hevc", "times": 3}, "times = 3 must be a text"),
        ({"video": "a.mp4", "group": ["x"]}, "group .*must be a text"),
        ({"video": "a.mp4", "group": "a\nb"}, "group .*without control characters"),
        ({"video": "a.mp4", "signals": [1, 2]}, "signals = .*must be a text"),
        ({"video": "a.mp4", "signals": {"fps": 0, "speed": [1]}}, "fps = 0 must be a positive number"),
        ({"video": "a.mp4", "signals": {"speed": ["fast"]}}, "speed must be a list of numbers"),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, row, words):
    """Exit 2 and one line with the list, the line's number and the key."""
    path = write_list(tmp_path, {"video": "ok.mp4"}, {}, row) if not row else write_list(tmp_path, {"video": "a"}, row)
    assert V.main(["--data_root", path, "--out_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "list.jsonl line 2: " in error and error.count("\n") == 1 and len(error) < 600
    with pytest.raises(V.UsageError, match=words):
        V.find_videos(path, "*")


def test_keys_that_mean_nothing_are_told(tmp_path):
    """One note for a list, with the nearest key; null is as if a key were not there."""
    videos = listed(
        tmp_path, {"video": "a.mp4", "lenght": 3, "id": 7}, {"video": "b.mp4", "begin": None, "signals": None, "id": 8}
    )
    assert videos[0].length == 0 and videos[1] == V.VideoFile("b.mp4", str(tmp_path / "b.mp4"))
    assert videos.notes == [
        f"note: 2 key(s) of {tmp_path}/list.jsonl mean nothing here and are left out: lenght (did you mean length?), id"
    ]


# -- groups


def test_groups_stand_on_one_side(tmp_path):
    """Lines of a group, and parts of a file without one, also under the names of links; groups of one file may stand
    on both. What is held out is drawn from the group's name alone."""
    rng, rows = np.random.default_rng(0), []
    for number in range(30):
        touch(tmp_path / f"{number}.mp4")
        os.link(tmp_path / f"{number}.mp4", tmp_path / f"link_{number}.mp4")
        rows += [{"video": f"{number}.mp4", "begin": 3 * part, "length": 3} for part in range(3)]
        rows += [{"video": f"link_{number}.mp4", "begin": 9}, {"video": f"camera_{number}.mp4", "group": number // 5}]
        rows += [{"video": "all.mp4", "begin": 7.5 * number, "length": 7.5, "group": f"episode {number}"}]
    videos = listed(tmp_path, *(rows[at] for at in rng.permutation(len(rows))))
    for share in (0.1, 0.5, 0.9):
        train, val = V.split_videos(videos, share)
        assert len(train) + len(val) == len(videos) and train and val
        assert not {video.drive for video in train} & {video.drive for video in val}
        files = [{os.stat(v.path).st_ino for v in side if os.path.exists(v.path)} for side in (train, val)]
        assert not files[0] & files[1]
    alone = V.split_videos([V.VideoFile(f"episode {number}", "") for number in range(30)], 0.5)[1]
    some = V.split_videos([video for video in videos if video.name.startswith("all.mp4")], 0.5)[1]
    assert {video.group for video in some} == set(names_of(alone))
    assert len({video.name for video in videos}) == len(videos) == len(rows)


def test_one_group_more_is_held_out_at_a_time(tmp_path, monkeypatch):
    """A held-out group that cannot be read is followed by one more group, not by as many as it has lines."""
    videos = [V.VideoFile(f"{n}.mp4", "x", group=f"g{n // 6}") for n in range(60)]
    first = {video.group for video in V.split_videos(videos, 0.01)[1]}
    monkeypatch.setattr(V, "told_apart", lambda seconds, work, cfg, video: ([], video.group not in first))
    val = V.split_readable(small_config(val_fraction=0.01), videos)[1]
    assert len(first) == 1 and len({video.group for video in val}) == 2 and len(val) == 12


def test_a_list_of_everything_trains_and_resumes(tmp_path, pictures, raw_hevc):
    """Episodes, pictures and a raw stream in one run; on resume the same list says nothing, another group is told."""
    encode(tmp_path / "a.mp4", 200, 20)
    rows = [{"video": "a.mp4", "begin": begin, "length": 2.5, "group": f"e{begin}"} for begin in (0, 2.5, 5)]
    rows += [{"video": "a.mp4", "begin": 400, "maneuver": "left"}, {"frames": str(pictures), "fps": 20, "length": 5}]
    rows += [{"video": str(raw_hevc / "video.hevc"), "times": str(raw_hevc / "frame_times"), "group": "raw"}]
    settings = dict(
        out_dir=str(tmp_path / "run"), picture=False, val_clips=2, val_fraction=0.3, clip_fps=8.0, **SHALLOW
    )
    settings |= dict(data_root=write_list(tmp_path, *rows), max_bad_fraction=0.9)
    assert V.train(small_config(steps=4, **settings)) == 0 and V.train(small_config(steps=5, **settings)) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "files are not those" not in log
    bad = {json.loads(line)["path"] for line in (tmp_path / "run/bad_files.jsonl").read_text().splitlines()}
    assert bad <= {"a.mp4#t=400"}
    write_list(tmp_path, *rows[:-1], {**rows[-1], "group": "another"})
    assert V.train(small_config(steps=6, **settings)) == 0
    (told,) = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "files are not those" in line]
    assert "1 added (" in told and told.count("video.hevc of another") == told.count("video.hevc of raw") == 1


# -- signals


def test_signals_of_a_part_belong_to_its_seconds(tmp_path):
    """Inline and from a file: value i is that of second begin + i / fps, in tools/evaluate.py too, with the clip's
    window inside the part; the maneuver of the signals counts more than the line's; parts of a file are one drive."""
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    import evaluate as E

    encode(tmp_path / "a.mp4", 400, 20)
    values = {"fps": 10, "speed": [n / 10 for n in range(60)], "maneuver": "left"}
    (tmp_path / "b.json").write_text(json.dumps(values))
    part = {"video": "a.mp4", "begin": 8, "length": 6, "maneuver": "right"}
    inline, stored, bare = listed(
        tmp_path,
        {**part, "signals": values},
        {**part, "begin": 9, "length": 5, "signals": "b.json"},
        {"video": "a.mp4"},
    )
    assert V.maneuver_names([inline, stored], "") == ["left", "right"]
    cfg = small_config(num_frames=12, clip_fps=4.0)
    for video in (inline, stored):
        data = V.ClipDataset(cfg, [video, bare], str(tmp_path / "list.jsonl"), "val", ["left"])
        clips = E.VideoClips(data, 8)
        for frames, labels in map(clips.__getitem__, range(8)):
            assert labels["drive"] == 0
            if labels["file"] == 0:
                seconds = frame_numbers(frames.permute(0, 2, 3, 1).numpy()) / 20 - video.begin
                assert labels["maneuver"] == "left" and np.abs(np.array(labels["speed"]) - seconds).max() <= 0.11
    assert torch.equal(data[0]["maneuver"], torch.tensor(0 if int(data[0]["file"]) == 0 else -1))


@pytest.mark.parametrize(
    "content, words", [(None, "gone.json: No such file"), (b"[1]", "JSON object"), (b"{", "annotation gone.json: ")]
)
def test_signals_that_are_no_annotation(tmp_path, content, words):
    """A file that a line names must be there and hold an annotation: else a bad file, with its name."""
    touch(tmp_path / "a.mp4")
    if content:
        (tmp_path / "gone.json").write_bytes(content)
    (video,) = listed(tmp_path, {"video": "a.mp4", "signals": "gone.json"})
    with pytest.raises(V.BadFile, match=words):
        V.read_annotation("", video)


# -- folders


def test_folders_of_pictures_with_their_rate(tmp_path):
    """With --frame_fps each folder of pictures is a drive, split by its path; annotations are found by it; without, an
    error that names the flag and the tool, whatever missing_data says."""
    for name in ("night/1", "night/2", "day"):
        write_pictures(tmp_path / "data" / name, 12)
    touch(tmp_path / "data" / "notes.txt")
    (tmp_path / "data/annotations/night").mkdir(parents=True)
    (tmp_path / "data/annotations/night/2.json").write_text('{"maneuver": "left"}')
    cfg = small_config(data_root=str(tmp_path / "data"), frame_fps=5.0, clip_fps=5.0)
    videos = V.list_data(cfg)
    assert names_of(videos) == ["day", "night/1", "night/2"]
    data = V.ClipDataset(cfg, videos, cfg.data_root, "val", ["left"])
    frames, number, annotation, bad, _ = data.decode(0, 64, 64)
    assert not bad and frame_numbers(frames).tolist() == list(range(12))
    assert V.read_annotation(cfg.data_root, videos[2]) == {"maneuver": "left"}
    (one,) = V.list_data(replace(cfg, data_root=str(tmp_path / "data/day")))
    assert one.name == "day" and one.path == str(tmp_path / "data/day") + "/"
    command = rf"python tools/make_list.py {tmp_path}/data --out LIST.jsonl"
    with pytest.raises(V.UsageError, match=rf"no video matches .*; found 36 \.png, .*{command}.*--frame_fps N"):
        V.list_data(replace(cfg, frame_fps=0.0))
    touch(tmp_path / "data" / "a.mp4")  # pictures beside videos are none, as ever
    assert names_of(V.list_data(cfg)) == ["a.mp4"]


def test_layouts_that_would_be_misread_name_their_tool(tmp_path):
    """LeRobot's files hold several episodes, comma2k19's streams no times: refused with the command. A folder of their
    videos below, or the rate as a flag, is read as ever."""
    touch(tmp_path / "lerobot/videos/front/chunk-000/file-000.mp4")
    (tmp_path / "lerobot/meta").mkdir()
    (tmp_path / "lerobot/meta/info.json").write_text('{"codebase_version": "v3.0", "fps": 30}')
    touch(tmp_path / "comma/Chunk_1/drive/3/video.hevc")
    touch(tmp_path / "comma/Chunk_1/drive/3/global_pose/frame_times")
    for name, frame_fps in (("lerobot", 0.0), ("lerobot", 20.0), ("comma", 0.0)):
        cfg = small_config(data_root=str(tmp_path / name), frame_fps=frame_fps)
        with pytest.raises(V.UsageError, match=f"python tools/make_list.py {tmp_path}/{name} --out LIST.jsonl"):
            V.list_data(cfg)
    assert names_of(V.list_data(replace(cfg, frame_fps=20.0))) == ["Chunk_1/drive/3/video.hevc"]
    assert len(V.list_data(replace(cfg, data_root=str(tmp_path / "lerobot/videos")))) == 1


@pytest.mark.skipif(not (FOOTAGE / "driving" / "clips").is_dir(), reason="no footage beside this checkout")
def test_real_footage_in_parts(tmp_path):
    """A part of a real clip shows the frames that the whole one shows at its seconds."""
    path = sorted((FOOTAGE / "driving" / "clips").glob("*.mp4"))[0]
    (part,) = listed(tmp_path, {"video": str(path), "begin": 1.5, "length": 3.0})
    plan = V.fit_plan(replace(PLAN, u_start=0.3), part)
    seconds, fps = V.video_timing(part.path, plan)
    times = V.frame_times(plan, seconds, fps)
    whole, _ = V.video_timing(part.path, PLAN)
    at = (times[0] - 0.5 / fps) / (whole - 2.0)
    same = V.read_frames(part.path, replace(PLAN, u_start=float(at)), "pyav")
    assert 1.5 <= times[0] and times[-1] < 4.5
    assert np.array_equal(V.read_frames(part.path, plan, "pyav"), same)
