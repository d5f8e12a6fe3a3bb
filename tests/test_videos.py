"""Video files: listing, splitting, time and crop arithmetic, and decoding of good, awkward and hostile files."""

import importlib.util
import json
import os
import struct
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from conftest import FOOTAGE, V

ODD, CLIPS = FOOTAGE / "odd_videos", FOOTAGE / "driving" / "clips"
PLAN = V.ClipPlan(num_frames=8, fps=2.0, height=32, width=32, u_start=0.0, scale=1.0, ratio=1.0, u_x=0.5, u_y=0.5)
NTSC = 30000 / 1001
DECODER_NAMES = [
    "pyav",
    pytest.param("decord", marks=pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord")),
]
both_decoders = pytest.mark.parametrize("decoder", DECODER_NAMES)
needs_footage = pytest.mark.skipif(not ODD.is_dir() or not CLIPS.is_dir(), reason="no footage beside this checkout")


# -- videos that carry their frame numbers


def coded_frames(count, size=32):
    """Frames whose quadrants hold the frame number's base-8 digits as grey levels -> uint8 [count, size, size, 3]."""
    frames, half = np.zeros((count, size, size, 3), np.uint8), size // 2
    for digit, (top, left) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
        levels = np.arange(count) // 8**digit % 8 * 32 + 16
        frames[:, top : top + half, left : left + half] = levels[:, None, None, None]
    return frames


def frame_numbers(frames):
    """Inverse of coded_frames, refusing a picture between two levels. uint8 [T, H, W, 3] -> int [T]."""
    half = frames.shape[1] // 2
    quarters = [frames[:, :half, :half], frames[:, :half, half:], frames[:, half:, :half], frames[:, half:, half:]]
    # levels are 32 apart; 10 leaves room for the encoder and blur at quadrant borders, none for a mix of two frames
    digits = [(part.mean((1, 2, 3)) - 16) / 32 for part in quarters]
    assert all(np.abs(digit - digit.round()).max() < 10 / 32 for digit in digits)
    return sum(digit.round().astype(int) * 8**place for place, digit in enumerate(digits))


def write_coded(path, count, fps, options=None, pts_ms=None, last_ms=None, container_options=None, format=None):
    """Coded frames by the encoder's defaults (look-ahead, B-frames) -> H.264 file; pts_ms: each frame's time."""
    import av

    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", "threads": "1", **(options or {})}
        if pts_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for number, picture in enumerate(coded_frames(count)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = int(pts_ms[number]), Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        if last_ms:
            packets[-1].duration = last_ms
        for packet in packets:
            container.mux(packet)
    return str(path)


def read_with(decoder, path, plan):
    """Frames from one decoder, without the fallback to the other."""
    return np.ascontiguousarray(V.READERS[decoder](str(path), plan))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """25 s at 10 fps with B-frames and key frames 25 s apart -> path."""
    return write_coded(tmp_path_factory.mktemp("long") / "long.mp4", 250, 10, {"g": "250", "bf": "3"})


@pytest.fixture(scope="module")
def short_gops(tmp_path_factory):
    """25 s at 10 fps with a key frame every 3 s, index at the front -> path."""
    path = tmp_path_factory.mktemp("gops") / "gops.mp4"
    return write_coded(path, 250, 10, {"g": "30", "bf": "2"}, container_options={"movflags": "faststart"})


# -- listing


def touch(path):
    """An empty file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def names_of(videos):
    """The names of a listing, in order."""
    return [video.name for video in videos]


def test_folder_lists_known_suffixes_sorted(tmp_path):
    """Names are paths below the root with /, sorted; other files are left out, upper-case suffixes are not."""
    for name in ("b.mp4", "a.MKV", "sub/c.avi", "note.txt", "mp4", "sub/d.jpg", "with blank \u00fc\u4e2d.webm"):
        touch(tmp_path / name)
    assert names_of(V.find_videos(str(tmp_path), "*")) == [
        "a.MKV",
        "b.mp4",
        "sub/c.avi",
        "with blank \u00fc\u4e2d.webm",
    ]


def test_folder_prefers_its_videos_subfolder(tmp_path):
    """With a videos/ subfolder only that one is listed, and names start below it."""
    touch(tmp_path / "outside.mp4")
    touch(tmp_path / "videos" / "in.mp4")
    (video,) = V.find_videos(str(tmp_path), "*")
    assert video.name == "in.mp4" and os.path.samefile(video.path, tmp_path / "videos" / "in.mp4")


def test_glob_matches_name_or_relative_path(tmp_path):
    """A glob filters by file name or by the path below the root."""
    for name in ("day/a.mp4", "night/a.mp4", "night/b.mp4"):
        touch(tmp_path / name)
    assert names_of(V.find_videos(str(tmp_path), "night/*")) == ["night/a.mp4", "night/b.mp4"]
    assert names_of(V.find_videos(str(tmp_path), "a.*")) == ["day/a.mp4", "night/a.mp4"]


def test_links_are_followed_but_loops_end(tmp_path):
    """A link to a folder outside is listed; a link back to the root does not multiply the files."""
    touch(tmp_path / "root" / "sub" / "a.mp4")
    touch(tmp_path / "elsewhere" / "b.mp4")
    (tmp_path / "root" / "sub" / "loop").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert names_of(V.find_videos(str(tmp_path / "root"), "*")) == ["more/b.mp4", "sub/a.mp4"]


def test_bug_linked_folder_name(tmp_path):
    """A folder reachable under several names keeps the first in sorted order, on every machine.

    Symptom: names, hence splits, differ between machines. Cause: the walk took sub-folders in the file system's order.
    """
    touch(tmp_path / "root" / "m_real" / "a.mp4")
    for letter in "zyxwvutsrqponlkjihgfedcba":
        (tmp_path / "root" / f"{letter}_link").symlink_to(tmp_path / "root" / "m_real", target_is_directory=True)
    assert names_of(V.find_videos(str(tmp_path / "root"), "*")) == ["a_link/a.mp4"]


def test_folder_named_like_a_video_is_not_one(tmp_path):
    """A directory x.mp4 is walked, never listed as a video."""
    touch(tmp_path / "x.mp4" / "y.mp4")
    assert names_of(V.find_videos(str(tmp_path), "*")) == ["x.mp4/y.mp4"]


def test_single_file_and_wrong_roots(tmp_path):
    """One video is a list of one; a missing path and a file of another kind are usage errors that name the path."""
    touch(tmp_path / "one.mp4")
    touch(tmp_path / "one.pdf")
    assert names_of(V.find_videos(str(tmp_path / "one.mp4"), "*")) == ["one.mp4"]
    for name in ("absent", "one.pdf"):
        with pytest.raises(V.UsageError, match=name):
            V.find_videos(str(tmp_path / name), "*")


@pytest.mark.parametrize("separator", ["\t", ",", " ", ";", "::"])
def test_list_file_separators(tmp_path, separator):
    """path<separator>label in any usual separator, blanks in paths included, blank lines skipped, file order kept."""
    names = ["b b.mp4", "a.mp4", "sub/\u00fc c.mp4"]
    for name in names:
        touch(tmp_path / name)
    lines = [f"{name}{separator}turn_{number}" for number, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    videos = V.find_videos(str(tmp_path / "list.txt"), "*")
    assert names_of(videos) == names
    assert [video.label for video in videos] == ["turn_0", "turn_1", "turn_2"]
    assert all(os.path.samefile(video.path, tmp_path / video.name) for video in videos)


def test_list_file_header_quotes_and_bom(tmp_path):
    """A csv with a header, a byte-order mark, quoted paths that hold commas, and lines without a label."""
    for name in ("a, b.mp4", "plain.mp4", "with blank.mp4"):
        touch(tmp_path / name)
    text = '\ufeffpath,maneuver\n"a, b.mp4",keep\nplain.mp4,turn_left\nwith blank.mp4\n'
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    videos = V.find_videos(str(tmp_path / "list.csv"), "*")
    assert [(video.name, video.label) for video in videos] == [
        ("a, b.mp4", "keep"),
        ("plain.mp4", "turn_left"),
        ("with blank.mp4", ""),
    ]


@pytest.mark.parametrize("name", ["file_1.mp4", "video/a.mp4", "path.mp4", "Video 1.mp4"])
@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_bug_first_line_taken_for_a_header(tmp_path, name, separator):
    """A first line whose path starts with file, video or path is a video like any other.

    Symptom: the first video of a list is dropped silently. Trigger: `file_1.mp4 left`, `video/a.mp4 0`. Cause: the
    header test looked at the word only, and at the disk only for what stands before the first comma."""
    touch(tmp_path / name)
    touch(tmp_path / "z.mp4")
    (tmp_path / "list.txt").write_text(f"{name}{separator}left\nz.mp4{separator}keep\n")
    assert names_of(V.find_videos(str(tmp_path / "list.txt"), "*")) == [name, "z.mp4"]


def test_bug_quoted_path_without_label(tmp_path):
    """A quoted path with blanks and no label is one path.

    Symptom: path '"my', label 'clip.mp4'. Cause: quotes were stripped only after a separator was found.
    """
    touch(tmp_path / "my clip.mp4")
    (tmp_path / "list.txt").write_text('"my clip.mp4"\n')
    assert [(video.name, video.label) for video in V.find_videos(str(tmp_path / "list.txt"), "*")] == [
        ("my clip.mp4", "")
    ]


def test_list_keeps_missing_files(tmp_path):
    """A listed file that is not on disk stays listed: it is named as bad when first read, not dropped silently."""
    (tmp_path / "list.txt").write_text("gone.mp4 left\n")
    (video,) = V.find_videos(str(tmp_path / "list.txt"), "*")
    assert (video.name, video.label) == ("gone.mp4", "left")
    with pytest.raises(V.BadFile, match="cannot be read"):
        V.read_frames(video.path, PLAN, "auto")


@pytest.mark.parametrize("list_name", ["list.jsonl", "LIST.JSONL"])
def test_jsonl_list(tmp_path, list_name):
    """JSON lines with video or path, maneuver or label; a null label is no label."""
    rows = [
        {"video": "a b.mp4", "maneuver": "left"},
        {"path": "c.mp4", "label": "keep"},
        {"path": "d.mp4"},
        {"path": "e.mp4", "maneuver": None},
    ]
    (tmp_path / list_name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    videos = V.find_videos(str(tmp_path / list_name), "*")
    assert [(video.name, video.label) for video in videos] == [
        ("a b.mp4", "left"),
        ("c.mp4", "keep"),
        ("d.mp4", ""),
        ("e.mp4", ""),
    ]
    assert videos[0].path == str(tmp_path / "a b.mp4")


@pytest.mark.parametrize("line", ['{"video": "a.mp4"', '{"name": "a.mp4"}', "[1, 2]", "7", '"a.mp4"', "a.mp4 left"])
def test_broken_jsonl_line_is_named(tmp_path, line):
    """A line that is no object with a path is a usage error that names the line."""
    (tmp_path / "list.jsonl").write_text('{"video": "ok.mp4"}\n' + line + "\n")
    with pytest.raises(V.UsageError, match="line 2"):
        V.find_videos(str(tmp_path / "list.jsonl"), "*")


def test_list_that_is_not_text(tmp_path):
    """A list of bytes that are not UTF-8 is a usage error."""
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00caf\xe9.mp4\n")
    with pytest.raises(V.UsageError, match="cannot be read"):
        V.find_videos(str(tmp_path / "list.txt"), "*")


# -- splits


def fake_videos(count, prefix="clip"):
    """Videos that exist by name only."""
    return [V.VideoFile(f"{prefix}_{number}.mp4", "") for number in range(count)]


def test_split_is_a_partition_by_name():
    """Train and val share no file, miss none, keep the listing's order, and do not depend on it."""
    videos = fake_videos(500)
    train, val = V.split_videos(videos, 0.1)
    assert set(train) | set(val) == set(videos) and not set(train) & set(val)
    assert train == [video for video in videos if video in set(train)]
    assert set(V.split_videos(videos[::-1], 0.1)[1]) == set(val)
    # binomial(500, 0.1) has a standard deviation of 6.7 files: 27 is four of them
    assert abs(len(val) - 50) < 27


@pytest.mark.parametrize("count", [2, 3, 5, 17])
@pytest.mark.parametrize("val_fraction", [0.001, 0.1, 0.5, 0.9])
def test_both_sides_hold_a_file(count, val_fraction):
    """From two files up neither side is empty, whatever the names hash to."""
    for trial in range(30):
        train, val = V.split_videos(fake_videos(count, f"trial{trial}"), val_fraction)
        assert train and val


def test_split_edges():
    """No file, one file, and val_fraction 0: everything trains, nothing is held out."""
    assert V.split_videos([], 0.1) == ([], [])
    assert V.split_videos(fake_videos(1), 0.1) == (fake_videos(1), [])
    assert V.split_videos(fake_videos(9), 0.0) == (fake_videos(9), [])


def test_adding_a_file_moves_no_other():
    """In a folder with its own held-out files the sides of old files stay; a tiny folder may move its forced file."""
    videos = fake_videos(200)
    before = set(V.split_videos(videos, 0.1)[1])
    for number in range(20):
        after = set(V.split_videos(videos + fake_videos(1, f"new{number}"), 0.1)[1])
        assert after & set(videos) == before
    for trial in range(50):
        few = fake_videos(3, f"few{trial}")
        before, after = (
            set(V.split_videos(few, 0.1)[1]),
            set(V.split_videos(few + fake_videos(1, f"more{trial}"), 0.1)[1]),
        )
        assert len((before ^ after) & set(few)) <= 1


def test_split_takes_undecodable_names():
    """File names that are not UTF-8 (surrogates from os.walk) split like any other."""
    videos = [V.VideoFile(os.fsdecode(b"\xff\xe9_%d.mp4" % number), "") for number in range(4)]
    train, val = V.split_videos(videos, 0.25)
    assert len(train) + len(val) == 4 and train and val


# -- times


def random_plans(count, seed=0):
    """Plans with random windows, crops and sizes, and the generator for the rest."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        u_start, scale, u_x, u_y = rng.random(4)
        yield (
            V.ClipPlan(
                int(rng.integers(3, 90)),
                float(rng.uniform(0.5, 12)),
                int(rng.integers(8, 300)),
                int(rng.integers(8, 300)),
                u_start,
                0.05 + 0.95 * scale,
                float(rng.uniform(0.5, 2)),
                u_x,
                u_y,
            ),
            rng,
        )


def test_window_lies_within_the_file():
    """1000 draws of files longer than the window: times rise by 1 / fps exactly and end before the file does."""
    for plan, rng in random_plans(1000):
        duration, native = plan.num_frames / plan.fps * rng.uniform(1, 10), rng.uniform(plan.fps, 120)
        times = V.frame_times(plan, duration, native)
        assert times.shape == (plan.num_frames,) and times.dtype == np.float64
        np.testing.assert_allclose(np.diff(times), 1 / plan.fps, rtol=1e-9)
        assert times[0] >= 0 and times[-1] < duration


def test_windows_reach_both_ends():
    """u_start 0 begins at the file's first frame, u_start 1 ends at its last."""
    first = V.frame_times(replace(PLAN, u_start=0.0), 20.0, 10.0)
    last = V.frame_times(replace(PLAN, u_start=1.0), 20.0, 10.0)
    assert int(first[0] * 10) == 0
    assert last[-1] + 0.5 == pytest.approx(
        20.0, abs=0.1
    )  # the last of 2 fps holds half a second, half a native frame is added


def test_same_seconds_at_any_native_rate():
    """Half a native frame aside, the moments depend on the file's length only, not on its frame rate."""
    for plan, rng in random_plans(200, seed=1):
        duration = plan.num_frames / plan.fps * rng.uniform(1.01, 5)
        moments = [V.frame_times(plan, duration, native) - 0.5 / native for native in (12.0, 24.0, NTSC, 59.94)]
        for other in moments[1:]:
            np.testing.assert_allclose(other, moments[0], atol=1e-9)


def test_no_drift_at_29_97():
    """After 300 s at 4 fps the frame asked for is the one shown then: 29.97 is not taken for 30."""
    times = V.frame_times(replace(PLAN, num_frames=1200, fps=4.0), 300.1, NTSC)
    numbers = np.floor(times * NTSC).astype(int)
    assert numbers[-1] == round(1199 / 4 * NTSC) and numbers[-1] != round(1199 / 4 * 30)


@pytest.mark.parametrize("fps", [0.0, 4.0])
def test_short_file_is_spread_uniformly(fps):
    """A file shorter than the window, or clip_fps 0, gives frames evenly over its whole length."""
    times = V.frame_times(replace(PLAN, num_frames=16, fps=fps), 3.0, 20.0)
    np.testing.assert_allclose(np.diff(times), 3.0 / 16)
    assert 0 < times[0] < 1 / 20 and 3.0 - 2 * 3.0 / 16 < times[-1] < 3.0


def test_too_few_frames_are_taken_one_by_one():
    """With fewer frames than asked for, each frame is asked for once and the rest lies past the end."""
    times = V.frame_times(replace(PLAN, num_frames=16, fps=4.0), 0.5, 10.0)
    assert np.floor(times[:5] * 10).astype(int).tolist() == [0, 1, 2, 3, 4]
    assert (times[5:] > 0.5).all()


# -- crops


def test_crop_lies_inside_the_scaled_frame():
    """1000 draws: the crop fits, has the asked aspect, and its area is the asked share of the largest such box."""
    for plan, rng in random_plans(1000, seed=2):
        width, height = (int(side) for side in rng.integers(64, 2000, 2))
        scaled_w, scaled_h, x, y = V.crop_box(plan, width, height)
        assert 0 <= x <= scaled_w - plan.width and 0 <= y <= scaled_h - plan.height
        box_w, box_h = plan.width * width / scaled_w, plan.height * height / scaled_h  # the crop in source pixels
        # sides are rounded to whole pixels: half a pixel on a scaled side, twice for a quotient, thrice for an area
        slack = 0.5 / min(scaled_w, scaled_h)
        assert box_w / box_h == pytest.approx(plan.width / plan.height * plan.ratio, rel=3 * slack)
        aspect = plan.width / plan.height * plan.ratio
        largest = min(width, height * aspect) * min(height, width / aspect)
        assert box_w * box_h == pytest.approx(plan.scale * largest, rel=4 * slack)


def test_no_distortion_at_ratio_one():
    """At ratio 1 both sides are scaled alike, to within rounding, for any frame and any crop size."""
    for plan, rng in random_plans(1000, seed=3):
        width, height = (int(side) for side in rng.integers(64, 2000, 2))
        scaled_w, scaled_h, _, _ = V.crop_box(replace(plan, ratio=1.0), width, height)
        assert scaled_w / width == pytest.approx(scaled_h / height, abs=0.5 / width + 0.5 / height + 1e-9)


def test_absurdly_stretched_frame_is_refused():
    """A frame that would fill the memory when scaled is a bad file."""
    with pytest.raises(V.BadFile, match="stretched"):
        V.crop_box(replace(PLAN, height=224, width=224), 100000, 2)


@both_decoders
def test_crop_takes_the_asked_part(tmp_path, decoder):
    """u_x and u_y choose the part of the picture that is cut: corners show their own colours."""
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    levels = {(0.0, 0.0): 40, (1.0, 0.0): 100, (0.0, 1.0): 160, (1.0, 1.0): 220}
    for (u_x, u_y), level in levels.items():
        frames[:, int(32 * u_y) : int(32 * u_y) + 32, int(48 * u_x) : int(48 * u_x) + 48] = level
    V.write_video(tmp_path / "corners.mp4", frames, 4)
    for (u_x, u_y), level in levels.items():
        picture = read_with(
            decoder,
            tmp_path / "corners.mp4",
            replace(PLAN, num_frames=4, fps=4.0, height=16, width=16, scale=0.2, u_x=u_x, u_y=u_y),
        )
        assert picture.shape == (4, 16, 16, 3) and picture.dtype == np.uint8
        np.testing.assert_allclose(picture, level, atol=4)  # grey levels after H.264 at crf 16


# -- decoding: the right frames at the right times


@both_decoders
@pytest.mark.parametrize("fps, seconds", [(10, 22), (NTSC, 21), (25, 21)])
def test_right_frames_at_right_times(tmp_path, decoder, fps, seconds):
    """Videos of 20 s and more from write_video, several starts: frame k is the one shown k / 2 s after the start."""
    count = round(seconds * fps)
    V.write_video(tmp_path / "coded.mp4", coded_frames(count), fps)
    for u_start in (0.0, 0.13, 0.5, 0.871, 1.0):
        numbers = frame_numbers(read_with(decoder, tmp_path / "coded.mp4", replace(PLAN, u_start=u_start)))
        wanted = (u_start * (count / fps - 4.0) + np.arange(8) / 2) * fps  # in frames; the nearest one is asked for
        # one in a hundred of a frame for the container's rounded duration and times
        assert np.abs(numbers - wanted).max() <= 0.51


@both_decoders
@pytest.mark.parametrize("fixture", ["long_video", "short_gops"])
def test_right_frames_after_a_seek(decoder, fixture, request):
    """B-frames, key frames 25 s or 3 s apart: every start has its frames. Seen red: counted from the key frame on."""
    path = request.getfixturevalue(fixture)
    for u_start in np.linspace(0, 1, 12):
        numbers = frame_numbers(read_with(decoder, path, replace(PLAN, u_start=float(u_start))))
        wanted = u_start * 210 + np.arange(8) * 5  # 25 s less the 4 s window, at 10 fps
        assert np.abs(numbers - wanted).max() <= 0.51


def test_seek_needs_no_second_reading(short_gops, monkeypatch):
    """With key frames a file is entered at the one before the window, once. Seen red without the seek's flag."""
    calls, read_pyav = [], V.read_pyav

    def counted(path, plan, seek=True):
        calls.append(seek)
        return read_pyav(path, plan, seek)

    monkeypatch.setattr(V, "read_pyav", counted)
    for u_start in (0.3, 0.62, 0.95):
        V.read_pyav(short_gops, replace(PLAN, u_start=u_start))
    assert calls == [True] * 3


@both_decoders
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "webm.mkv"])
def test_containers_agree(tmp_path, decoder, suffix):
    """The same frames from every container, early and late."""
    path = write_coded(tmp_path / f"coded.{suffix}", 120, 10, {"g": "40", "bf": "2"})
    for u_start, first in ((0.0, 0), (0.5, 40), (1.0, 80)):
        numbers = frame_numbers(read_with(decoder, path, replace(PLAN, u_start=u_start)))
        assert np.abs(numbers - (first + np.arange(8) * 5)).max() <= 1


def write_hevc(path, frames):
    """Coded frames -> raw HEVC file, whose every frame PyAV alone reads right: on a busy machine x265 wrote other
    pictures into some of its files (seven of fifty with lossless=1), so it may try five times."""
    import av

    for _ in range(5):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx265", rate=10)
            stream.width = stream.height = 64  # x265 takes no less
            stream.pix_fmt = "yuv420p"
            stream.options = {"x265-params": "log-level=none:keyint=40:pools=none:frame-threads=1:crf=4"}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        with av.open(str(path)) as container:
            written = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        if len(written) == len(frames) and np.abs(written.astype(int) - frames).mean((1, 2, 3)).max() < 4:
            return str(path)
    raise AssertionError("x265 wrote no right file in five tries")


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("suffix", ["ts", "avi", "h264", "hevc"])
def test_stream_containers(tmp_path, decoder, suffix):
    """Transport streams, AVI and raw streams: the right frames, to within two, whichever decoder was asked for first.

    Two, because AVI holds no display times: with two B-frames the first picture is shown two frames after its own time.

    Symptoms this was written for: raw streams failed with 'Operation not permitted' because packets were counted and
    then rewound, which raw streams cannot; decord gave frames seconds off, or one frame again and again, without
    notice."""
    if suffix == "hevc":
        path = write_hevc(tmp_path / "coded.hevc", coded_frames(120, 64))
    else:
        path = write_coded(tmp_path / f"coded.{suffix}", 120, 10, {"g": "40", "bf": "2"})
    for u_start, first in ((0.0, 0), (0.5, 40), (1.0, 80)):
        numbers = frame_numbers(V.read_frames(path, replace(PLAN, u_start=u_start), decoder))
        assert np.abs(numbers - (first + np.arange(8) * 5)).max() <= (2 if suffix == "avi" else 1)


@both_decoders
def test_variable_frame_rate(tmp_path, decoder):
    """Frames 40 and 160 ms apart in turn, then a burst: what is taken is what was on screen at that time."""
    gaps = [40, 160] * 60 + [20] * 100 + [100] * 50
    pts = np.cumsum([0, *gaps])[: len(gaps)]
    path = write_coded(tmp_path / "vfr.mp4", len(gaps), 10, {"g": "50"}, pts_ms=pts)
    numbers = frame_numbers(read_with(decoder, path, PLAN))
    half = (pts[-1] + gaps[-1]) / len(gaps) / 2  # ms, half a mean frame
    moments = np.arange(8) * 500 + half
    assert (pts[numbers] <= moments + 1).all() and (pts[numbers + 1] > moments - 1).all()
    for u_start in (0.4, 0.8, 1.0):
        shown = pts[frame_numbers(read_with(decoder, path, replace(PLAN, u_start=u_start)))]
        assert np.abs(np.diff(shown) - 500).max() <= 160  # off by at most one longest frame


def test_bug_last_frame_held(tmp_path):
    """A last frame that stays on screen for 6 s is no truncation.

    Symptom: 'ends at 3.9 s, its header promises 9.9 s'. Trigger: time-lapse or screen recordings. Cause: the file's end
    was taken to be the start of its last frame.
    """
    path = write_coded(tmp_path / "held.mp4", 40, 10, {"bf": "0"}, pts_ms=np.arange(40) * 100, last_ms=6000)
    numbers = frame_numbers(V.read_pyav(path, replace(PLAN, u_start=1.0)))
    assert numbers[-1] == 39


@both_decoders
def test_short_files(tmp_path, decoder):
    """Shorter than the window: spread over the whole file; fewer frames than asked: each one, then the last again."""
    V.write_video(tmp_path / "short.mp4", coded_frames(20), 10)
    V.write_video(tmp_path / "few.mp4", coded_frames(5), 10)
    V.write_video(tmp_path / "one.mp4", coded_frames(1), 10)
    spread = frame_numbers(read_with(decoder, tmp_path / "short.mp4", PLAN))
    assert np.abs(spread - np.arange(8) * 2.5).max() <= 0.51
    assert frame_numbers(read_with(decoder, tmp_path / "few.mp4", PLAN)).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert frame_numbers(read_with(decoder, tmp_path / "one.mp4", PLAN)).tolist() == [0] * 8


@both_decoders
def test_whole_file_at_fps_zero(long_video, decoder):
    """fps 0 spreads the frames over the file whatever u_start says."""
    numbers = [
        frame_numbers(read_with(decoder, long_video, replace(PLAN, fps=0.0, u_start=u_start))).tolist()
        for u_start in (0.0, 0.9)
    ]
    assert numbers[0] == numbers[1]
    assert np.abs(np.array(numbers[0]) - np.arange(8) * 250 / 8).max() <= 0.51


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord")
def test_decoders_agree_in_grey_levels(tmp_path):
    """Same frames, same crop: both decoders show the same moving picture."""
    rng = np.random.default_rng(0)
    coarse = np.repeat(np.repeat(rng.integers(0, 256, (30, 6, 8, 1), dtype=np.uint8), 16, 1), 16, 2)
    V.write_video(tmp_path / "noise.mp4", np.repeat(coarse, 3, 3), 10)
    plan = replace(PLAN, num_frames=5, height=48, width=80, scale=0.7, ratio=1.1, u_x=0.2, u_y=0.9)
    one, other = (read_with(name, tmp_path / "noise.mp4", plan).astype(float) for name in ("pyav", "decord"))
    # same pixels through two resize filters: edges of 16-pixel blocks differ, the picture not (contrast is about 75)
    assert np.abs(one - other).mean() < 6
    assert np.abs(one - other[::-1]).mean() > 30


def test_odd_sizes(tmp_path):
    """Odd widths and heights are written and read back."""
    V.write_video(tmp_path / "odd.mp4", np.full((4, 33, 31, 3), 90, np.uint8), 4)
    frames = V.read_frames(str(tmp_path / "odd.mp4"), replace(PLAN, num_frames=4, fps=4.0, height=33, width=31), "pyav")
    assert frames.shape == (4, 33, 31, 3)
    np.testing.assert_allclose(frames, 90, atol=3)


@both_decoders
@pytest.mark.parametrize(
    "degrees, matrix, corners",
    [
        (0, (1, 0, 0, 1), (140, 30, 220, 30)),
        (90, (0, 1, -1, 0), (220, 140, 30, 30)),
        (180, (-1, 0, 0, -1), (30, 220, 30, 140)),
        (270, (0, -1, 1, 0), (30, 30, 140, 220)),
    ],
)
def test_rotation_of_the_display_matrix(tmp_path, decoder, degrees, matrix, corners):
    """A phone's file is turned upright: a picture with a marked corner comes out turned clockwise by the matrix."""
    stored = np.full((4, 64, 64, 3), 30, np.uint8)
    stored[:, :32, :32], stored[:, 32:, :32] = 140, 220
    V.write_video(tmp_path / "flat.mp4", stored, 4)
    data, one = (tmp_path / "flat.mp4").read_bytes(), 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (value * one for value in matrix)
    (tmp_path / "turned.mp4").write_bytes(
        data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    )
    picture = read_with(decoder, tmp_path / "turned.mp4", replace(PLAN, num_frames=4, fps=4.0))[0]
    quarters = (
        picture[:15, :15],
        picture[:15, 17:],
        picture[17:, :15],
        picture[17:, 17:],
    )  # clear of the blurred borders
    np.testing.assert_allclose([part.mean() for part in quarters], corners, atol=4)


# -- decoding: what must not be decoded


def refused(path, reason, decoders=("auto", "decord"), plan=PLAN):
    """Assert that a path is refused with a reason, within seconds, whichever decoder comes first."""
    for decoder in decoders:
        outcome = []
        worker = threading.Thread(target=read_or_reason, args=(str(path), decoder, plan, outcome), daemon=True)
        worker.start()
        worker.join(20)
        assert outcome, f"{decoder} still waits on {path}"
        assert isinstance(outcome[0], str), f"{decoder} gave frames from {path}"
        assert reason in outcome[0]


def read_or_reason(path, decoder, plan, outcome):
    """Append the frames, or the reason against them, to outcome."""
    try:
        outcome.append(V.read_frames(path, plan, decoder))
    except V.BadFile as error:
        outcome.append(str(error))


def test_paths_that_are_no_video(tmp_path):
    """Missing, a folder, a pipe (whose open would block), zero bytes, text: each refused with its own reason."""
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 500)
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    refused(tmp_path / "absent.mp4", "cannot be read")
    refused(tmp_path / "dangling.mp4", "cannot be read")
    refused(tmp_path / "folder.mp4", "not a regular file")
    refused(tmp_path / "pipe.mp4", "not a regular file")
    refused(tmp_path / "empty.mp4", "0 bytes")
    refused(tmp_path / "text.mp4", "cannot open")


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.mp4\nduration 25\n",
        "ffconcat version 1.0\nfile secret.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:25\n#EXTINF:25,\nsecret.ts\n#EXT-X-ENDLIST\n",
    ],
)
@pytest.mark.parametrize("decoder", ["auto", "decord"])
def test_playlist_named_mp4_opens_no_other_file(tmp_path, text, decoder):
    """A playlist script under a video's name is refused, by the fallback decoder too.

    Symptom: the clip of another file. Trigger: `ffconcat` or HLS text named .mp4. Cause: decord has no list of allowed
    demuxers, and what PyAV refused was handed to it.
    """
    write_coded(tmp_path / "secret.mp4", 250, 10)
    write_coded(tmp_path / "secret.ts", 250, 10)
    (tmp_path / "playlist.mp4").write_text(text)
    refused(tmp_path / "playlist.mp4", "cannot", (decoder,))


@both_decoders
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_truncated_file(tmp_path, decoder, suffix):
    """60 % of a file whose header promises all of it: windows in the missing part are refused, not filled up."""
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    data = open(write_coded(tmp_path / f"whole.{suffix}", 250, 10, {"g": "30"}, container_options=options), "rb").read()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) * 6 // 10])
    if decoder == "pyav" or suffix == "mp4":  # decord measures a cut Matroska file by what is left of it
        refused(tmp_path / f"cut.{suffix}", "", (decoder,), replace(PLAN, u_start=1.0))
        refused(tmp_path / f"cut.{suffix}", "", (decoder,), replace(PLAN, fps=0.0))
    numbers = frame_numbers(V.read_frames(str(tmp_path / f"cut.{suffix}"), PLAN, decoder))
    assert numbers.tolist() == list(range(0, 40, 5))  # what is there is still right


def test_truncated_before_its_index(tmp_path, short_gops):
    """A recording that was cut before its index was written cannot be opened."""
    V.write_video(tmp_path / "whole.mp4", coded_frames(100), 10)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    refused(tmp_path / "cut.mp4", "cannot open")


def test_overwritten_middle(short_gops, tmp_path):
    """A hole of zeros in the coded data is refused where the window crosses it."""
    data = bytearray(open(short_gops, "rb").read())
    begin, end = len(data) // 2, len(data) // 2 + len(data) // 8
    data[begin:end] = bytes(end - begin)
    (tmp_path / "hole.mp4").write_bytes(data)
    refused(tmp_path / "hole.mp4", "pyav stopped decoding", ("pyav",), replace(PLAN, fps=0.0))


# -- awkward files of other projects


@needs_footage
@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize(
    "name, low, high",
    [
        ("h265_10bits.mp4", 90, 150),
        ("bitmap.mp4", 155, 165),
        ("h264_white_frame_sar_16_9.mp4", 250, 256),
        ("av1_video.mkv", 100, 150),
        ("video_90.mov", 85, 105),
    ],
)
def test_awkward_files_decode(decoder, name, low, high):
    """HEVC 10 bit, 1 x 1 pixel, one frame with wide pixels, AV1, rotated: decoded whichever decoder comes first."""
    frames = V.read_frames(str(ODD / name), replace(PLAN, fps=0.0), decoder)
    assert frames.shape == (8, 32, 32, 3)
    assert low < frames.mean() < high


@needs_footage
@pytest.mark.parametrize(
    "name, reason",
    [
        ("corrupted.mp4", "stopped decoding"),
        ("opus.mp4", "no video stream"),
        ("chunk_out_of_range.mp4", "cannot open"),
        ("README.md", "cannot open"),
    ],
)
def test_awkward_files_are_refused(name, reason):
    """A damaged stream, sound only, an index that points past the end, text: refused with the reason."""
    refused(ODD / name, reason, plan=replace(PLAN, fps=0.0))


@needs_footage
@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord")
def test_decord_hands_av1_over():
    """decord cannot read AV1: the file then comes from PyAV, pixel for pixel."""
    path = str(ODD / "av1_video.mkv")
    with pytest.raises(V.CannotOpen):
        V.read_decord(path, PLAN)
    assert np.array_equal(V.read_frames(path, PLAN, "decord"), V.read_pyav(path, PLAN))


@needs_footage
def test_rotated_footage_stands_upright():
    """A clip recorded upright is 320 x 568 once turned: its tall crop shows most of the frame, in both decoders."""
    plan = replace(PLAN, num_frames=3, fps=0.0, height=142, width=80)
    one, other = (read_with(name, ODD / "video_90.mov", plan).astype(float) for name in ("pyav", "decord"))
    assert np.abs(one - other).mean() < 8


@needs_footage
@pytest.mark.slow
@both_decoders
def test_real_clips_decode(decoder):
    """Every real driving clip gives frames at several starts, none black or still."""
    clips = sorted(CLIPS.glob("*.mp4"))
    assert clips
    for path in clips:
        for u_start in (0.0, 0.5, 1.0):
            frames = V.read_frames(str(path), replace(PLAN, u_start=u_start), decoder).astype(float)
            assert frames.shape == (8, 32, 32, 3) and frames.mean() > 2 and frames.std() > 2
            assert np.abs(np.diff(frames, axis=0)).mean() > 0.1


def test_the_fast_path_gives_the_plain_paths_frames(tmp_path):
    """Seeking and leaving out unneeded B-frames changes no pixel. Seen red with wanted = False (all left out)."""
    path = tmp_path / "b_frames.mp4"
    write_coded(path, 700, 30, options={"bf": "3", "g": "250"})
    for u_start in (0.0, 0.31, 0.77, 1.0):
        plan = replace(PLAN, num_frames=12, fps=4.0, u_start=u_start)
        assert np.array_equal(V.read_pyav(str(path), plan), V.read_pyav(str(path), plan, fast=False))


def test_the_fast_path_leaves_frames_out(tmp_path):
    """Fewer frames are decoded than shown by the file; otherwise the equality above would prove nothing."""
    path = tmp_path / "b_frames.mp4"
    write_coded(path, 120, 30, options={"bf": "3"})
    counts = []
    for fast in (True, False):
        with V.open_pyav(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            counts.append(
                sum(1 for _ in V.pyav_frames(stream, np.array([1.0, 3.0]), fast, *V.time_line(container, stream, PLAN)))
            )
    assert counts[0] < 0.8 * counts[1] == 0.8 * 120
