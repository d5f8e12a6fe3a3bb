"""When frames are on screen: variable rates, streams that jump or begin in the middle, covers, sound, mirrors, raw.

The right frame is always the one with the latest presentation time at or before the moment asked for, on the video
stream's own line.
"""

import re
import struct
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from conftest import V, small_config
from test_videos import DECODER_NAMES, PLAN, coded_frames, frame_numbers, write_coded

TS_PACKET = 188  # bytes


@pytest.fixture
def readings(monkeypatch):
    """The `fast` flag of every call of read_pyav, in order."""
    calls, real = [], V.read_pyav

    def counted(path, plan, fast=True):
        calls.append(fast)
        return real(path, plan, fast)

    monkeypatch.setattr(V, "read_pyav", counted)
    return calls


def shown_at(pts_ms, times):
    """Numbers of the frames that are on screen `times` seconds after the first, by their presentation times in ms."""
    return np.searchsorted(np.asarray(pts_ms) - pts_ms[0], np.asarray(times) * 1000 + 1e-6, side="right") - 1


def write_streams(path, parts, container_options=None):
    """Mux encoded streams into one file. parts: list of (codec, count, fps, second of the first frame, options); 'aac'
    is silence."""
    import av

    with av.open(str(path), "w", options=container_options or {}) as container:
        packets = []
        for codec, count, fps, start, options in parts:
            if codec == "aac":
                stream = container.add_stream("aac", rate=8000, layout="mono")
                silence = np.zeros((1, 1024), np.float32)
                frames = [av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono") for _ in range(count)]
            else:
                stream = container.add_stream(codec, rate=fps)
                stream.width = stream.height = 32
                stream.pix_fmt, stream.options = "yuvj420p" if codec == "mjpeg" else "yuv420p", options
                frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in coded_frames(count)]
            for number, frame in enumerate(frames):
                if codec == "aac":
                    frame.sample_rate, frame.time_base = 8000, Fraction(1, 8000)
                    frame.pts = number * 1024 + round(start * 8000)
                else:
                    frame.pts, frame.time_base = number + round(start * fps), Fraction(1, fps)
                packets += stream.encode(frame)
            packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return str(path)


# -- variable frame rates


def test_bug_frames_on_screen_left_out(tmp_path, readings):
    """Two seconds at 25 fps, then one frame a second, with B-frames: every moment shows the frame of that moment.

    Symptom: frames up to 3 s old. Cause: what to leave out was decided by the packets' durations, in Matroska a guess.
    """
    pts = np.concatenate([np.arange(50) * 40, 2000 + np.arange(60) * 1000])
    path = write_coded(tmp_path / "vfr.mkv", len(pts), 25, {"bf": "3", "g": "30"}, pts_ms=pts)
    duration, fps = V.video_timing(path, PLAN)
    for u_start in (0.0, 0.4, 0.8, 1.0):
        plan = replace(PLAN, fps=1.0, num_frames=12, u_start=u_start)
        wanted = shown_at(pts, V.frame_times(plan, duration, fps))
        assert frame_numbers(V.read_pyav(path, plan)).tolist() == wanted.tolist()
    assert readings == [True] * 4


def test_any_rate_in_any_container(tmp_path):
    """Random gaps between frames, groups of pictures, B-frames, starts and containers: the fast path gives the plain
    path's frames bit for bit, and they are the ones on screen. Seen red with the durations that the container
    guesses."""
    for seed in range(24):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(40, 90))
        wild, steps, even = (
            rng.choice([20, 40, 100, 500, 1500, 3000], count),
            np.repeat(rng.integers(10, 2000, 9), 10),
            [40] * count,
        )
        gaps = (wild, steps[:count], even)[seed % 3]
        pts = np.cumsum([0, *gaps])[:count] + int(rng.choice([0, 700, 5000]))
        suffix = ("mkv", "mp4", "ts", "mov")[seed % 4]
        params = (
            f"bframes={rng.integers(0, 5)}:keyint={rng.choice([5, 25, 250])}:open-gop={rng.integers(0, 2)}:b-pyramid=2"
        )
        options = {"x264-params": params}
        path = write_coded(tmp_path / f"{seed}.{suffix}", count, 25, options, pts_ms=pts)
        duration, fps = V.video_timing(path, PLAN)
        for u_start in rng.random(3):
            plan = replace(PLAN, fps=float(rng.choice([0.0, 1.0, 4.0])), u_start=float(u_start))
            plain = V.read_pyav(path, plan, fast=False)
            assert np.array_equal(V.read_pyav(path, plan), plain), (seed, suffix, options)
            times = V.frame_times(plan, duration, fps)
            near = [
                shown_at(pts, times + shift) for shift in (-2e-3, 2e-3)
            ]  # on the very border of two frames either will do
            numbers = frame_numbers(plain)
            assert ((numbers == near[0]) | (numbers == near[1])).all(), (seed, suffix, options)


# -- transport streams


@pytest.fixture(scope="module")
def stream_bytes(tmp_path_factory):
    """A transport stream of 30 s at 10 fps, a key frame every 2 s -> (bytes, offsets of the key packets)."""
    import av

    path = write_coded(tmp_path_factory.mktemp("ts") / "whole.ts", 300, 10, {"g": "20", "bf": "2", "sc_threshold": "0"})
    with av.open(path) as container:
        keys = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe]
    return open(path, "rb").read(), keys


def clips_of(path, starts=(0.0, 0.3, 0.7, 1.0)):
    """Frame numbers of a clip for every start, or the reason against it."""
    found = []
    for u_start in starts:
        try:
            found.append(frame_numbers(V.read_frames(str(path), replace(PLAN, u_start=u_start), "auto")))
        except V.BadFile as error:
            found.append(str(error))
    return found


def test_transport_streams_are_sought(tmp_path, stream_bytes, readings, monkeypatch):
    """A late window of a transport stream is entered at its own key frame, once. Seen red: all was decoded, twice."""
    (tmp_path / "whole.ts").write_bytes(stream_bytes[0])
    decoded, pyav_frames = [], V.pyav_frames
    monkeypatch.setattr(V, "pyav_frames", lambda *args: (decoded.append(0) or frame for frame in pyav_frames(*args)))
    for u_start in (0.3, 0.62, 1.0):
        decoded.clear()
        numbers = frame_numbers(V.read_pyav(str(tmp_path / "whole.ts"), replace(PLAN, u_start=u_start)))
        assert np.abs(numbers - (u_start * 260 + np.arange(8) * 5)).max() <= 0.51
        assert len(decoded) < 75  # 40 frames of the window and at most a group of pictures before it
    assert readings == [True] * 3


def test_stream_that_begins_inside_a_group_of_pictures(tmp_path, stream_bytes, readings):
    """It loses that group, not the file, and its time line begins with the first picture that can be shown. Seen red:
    that picture stood still until its own time came."""
    data, keys = stream_bytes
    at = (keys[3] + 3 * TS_PACKET) // TS_PACKET * TS_PACKET
    (tmp_path / "cut.ts").write_bytes(data[: keys[0]] + data[at:])  # tables, then the fourth group from its middle
    for u_start, numbers in zip((0.0, 0.3, 0.7, 1.0), clips_of(tmp_path / "cut.ts")):
        assert np.abs(numbers - (80 + u_start * (220 - 40) + np.arange(8) * 5)).max() <= 0.51
    assert readings == []  # read_frames holds the reader itself: only a second, plain reading would show


def test_streams_behind_one_another(tmp_path, stream_bytes):
    """Two streams in one file, of which the second's clock starts anew: a window in either one is right, one across the
    joint refused. Seen red: windows of a time line of half the length."""
    data, _ = stream_bytes
    (tmp_path / "two.ts").write_bytes(data + data)
    inside = 0
    for u_start, found in zip(np.linspace(0, 1, 21), clips_of(tmp_path / "two.ts", np.linspace(0, 1, 21))):
        at = u_start * 560
        if isinstance(found, str):
            assert "jump" in found and 260 < at < 300
        else:
            assert np.abs(found - (at % 300 + np.arange(8) * 5)).max() <= 1
            inside += 1
    assert inside >= 18


def test_stream_with_a_gap(tmp_path, stream_bytes):
    """Ten minutes without a picture: windows before and behind it are right on the real time line, those that touch the
    gap are refused. Seen red: one frame stood still for ten minutes."""
    import av

    path = tmp_path / "gap.ts"
    with av.open(str(path), "w") as container:
        (tmp_path / "whole.ts").write_bytes(stream_bytes[0])
        with av.open(str(tmp_path / "whole.ts")) as source:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    late = 600 * 90000 if packet.pos >= stream_bytes[1][8] else 0
                    packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, stream
                    container.mux(packet)
    found = clips_of(path, (0.0, 0.015, 0.5, 0.985, 0.99, 1.0))
    assert [isinstance(clip, str) for clip in found] == [False, False, True, False, False, False]
    assert "jump" in found[2] and np.abs(found[0] - np.arange(8) * 5).max() <= 1
    assert np.abs(found[5] - 260 - np.arange(8) * 5).max() <= 1
    assert np.abs(found[3] - (0.985 * 6260 - 6000 + np.arange(8) * 5)).max() <= 1


def test_clock_that_wraps(tmp_path, stream_bytes):
    """The clock of 33 bits runs over in the middle of the file: nobody notices."""
    import av

    (tmp_path / "whole.ts").write_bytes(stream_bytes[0])
    with av.open(str(tmp_path / "wrap.ts"), "w", options={"output_ts_offset": str(2**33 / 90000 - 10)}) as container:
        with av.open(str(tmp_path / "whole.ts")) as source:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
    for u_start, numbers in zip((0.0, 0.3, 0.7, 1.0), clips_of(tmp_path / "wrap.ts")):
        assert np.abs(numbers - (u_start * 260 + np.arange(8) * 5)).max() <= 1


# -- the stream's own length, and which stream


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("start", [0, 5])
def test_sound_has_no_part_in_it(tmp_path, suffix, start, readings):
    """Sound that goes on for 15 s after the picture, a picture that begins 5 s after the sound: late windows are right.
    Seen red in mkv: `ends at 10.00 s, its header promises 25.00 s`."""
    parts = [("libx264", 100, 10, start, {"g": "20", "bf": "2"}), ("aac", 200, 0, 0, {})]
    path = write_streams(tmp_path / f"sound.{suffix}", parts)
    for u_start in (0.0, 0.5, 1.0):
        numbers = frame_numbers(V.read_pyav(path, replace(PLAN, u_start=u_start)))
        assert np.abs(numbers - (u_start * 60 + np.arange(8) * 5)).max() <= 0.51
    assert readings == [True] * 3


def test_cut_mkv_with_sound_is_still_refused(tmp_path):
    """Half of a file whose sound is as long as its picture: late windows are refused, by what the header promises."""
    path = write_streams(tmp_path / "whole.mkv", [("libx264", 200, 10, 0, {"g": "20"}), ("aac", 156, 0, 0, {})])
    data = open(path, "rb").read()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    assert isinstance(clips_of(tmp_path / "cut.mkv", [1.0])[0], str)


@pytest.mark.parametrize("decoder", DECODER_NAMES)
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_covers_never_play(tmp_path, suffix, decoder):
    """A cover of one frame as the first video stream: the moving one is read by either decoder. Seen red: a still."""
    parts = [("mjpeg", 1, 1, 0, {}), ("libx264", 120, 10, 0, {"g": "20", "bf": "2"})]
    path = write_streams(tmp_path / f"cover.{suffix}", parts)
    for u_start in (0.0, 1.0):
        numbers = frame_numbers(V.read_frames(path, replace(PLAN, u_start=u_start), decoder))
        assert np.abs(numbers - (u_start * 80 + np.arange(8) * 5)).max() <= 1
    assert V.video_timing(path, PLAN)[0] == pytest.approx(12.0, abs=0.2)
    if decoder == "decord":
        with pytest.raises(V.CannotOpen, match="2 video streams"):
            V.read_decord(path, PLAN)


def test_a_lone_picture_plays(tmp_path):
    """One stream of one frame is a video of one frame."""
    path = write_streams(tmp_path / "one.mp4", [("libx264", 1, 10, 0, {})])
    assert frame_numbers(V.read_frames(path, PLAN, "auto")).tolist() == [0] * 8


# -- mirrors


def with_matrix(data, matrix):
    """Bytes of an mp4 whose display matrix a, b, c, d (16.16) replaces the identity."""
    at = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    a, b, c, d = (round(value * 65536) for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.fixture(scope="module")
def marked_corners(tmp_path_factory):
    """Bytes of an mp4 of 48 x 32 pixels whose corners, read in rows, have the grey levels 40, 100, 160, 220."""
    stored = np.zeros((4, 32, 48, 3), np.uint8)
    stored[:, :16, :24], stored[:, :16, 24:], stored[:, 16:, :24], stored[:, 16:, 24:] = 40, 100, 160, 220
    path = tmp_path_factory.mktemp("corners") / "flat.mp4"
    V.write_video(path, stored, 4)
    return path.read_bytes()


@pytest.mark.parametrize("decoder", DECODER_NAMES)
@pytest.mark.parametrize(
    "a, b, c, d",
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_eight_orientations(tmp_path, marked_corners, decoder, a, b, c, d):
    """What is stored in column p, row q is shown in column a p + c q, row b p + d q. Seen red: a horizontal flip came
    out upside down, a vertical one untouched, both transposes turned instead."""
    (tmp_path / "turned.mp4").write_bytes(with_matrix(marked_corners, (a, b, c, d)))
    shown = np.zeros((2, 2))
    for p, q, level in ((-1, -1, 40), (1, -1, 100), (-1, 1, 160), (1, 1, 220)):  # corners around the middle
        shown[int(b * p + d * q > 0), int(a * p + c * q > 0)] = level
    height, width = (48, 32) if a == 0 else (32, 48)
    plan = replace(PLAN, num_frames=4, fps=4.0, height=height, width=width)
    picture = V.read_frames(str(tmp_path / "turned.mp4"), plan, decoder)[0]
    seen = [[picture[row, column].mean() for column in (4, width - 5)] for row in (4, height - 5)]
    np.testing.assert_allclose(seen, shown, atol=4)


@pytest.mark.parametrize(
    "matrix", [(1, 0.3, 0, 1), (0.97, 0.26, -0.26, 0.97), (1, 1, 1, 1), (1, 0, 1, 0), (0.998, 0.06, -0.06, 0.998)]
)
def test_other_matrices_are_refused(tmp_path, marked_corners, matrix):
    """Skew, turns by 15 and 3.4 degrees, matrices that flatten the picture. Seen red: 3.4 degrees were passed over."""
    (tmp_path / "turned.mp4").write_bytes(with_matrix(marked_corners, matrix))
    for decoder in ("auto", "decord"):
        with pytest.raises(V.BadFile, match="display matrix"):
            V.read_frames(str(tmp_path / "turned.mp4"), PLAN, decoder)


def test_looking_at_the_matrix_ties_no_frame_to_itself(tmp_path, marked_corners):
    """A frame goes when its last name goes. Seen red with frame.side_data: frames waited for the garbage collector with
    the threads of their scaler, and a collection in a forked loader worker then hung for ever."""
    (tmp_path / "flat.mp4").write_bytes(marked_corners)
    with V.open_pyav(str(tmp_path / "flat.mp4")) as container:
        frame = next(container.decode(video=0))
        before = sys.getrefcount(frame)
        V.orientation(frame)
        assert sys.getrefcount(frame) == before


# -- files without times


def without_timing(data):
    """An H.264 byte stream of x264's baseline profile without the end of its parameters, which holds the frame rate."""
    units = []
    for unit in re.split(b"\0\0\0?\1", data)[1:]:
        if unit[0] & 31 == 7:
            bits, at = "".join(f"{byte:08b}" for byte in unit[1:].replace(b"\0\0\3", b"\0\0")), 24
            for code in "eeee1ee11":  # id, frame number, kind of order, references, gaps, width, height, fields, direct
                zeros = bits.index("1", at) - at if code == "e" else 0
                at += 2 * zeros + 1
            assert bits[at : at + 2] == "01"  # no cropping, and there is such a part
            bits = bits[: at + 1] + "01"
            bits += "0" * (-len(bits) % 8)
            unit = unit[:1] + bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
        units.append(unit)
    return b"".join(b"\0\0\0\1" + unit for unit in units)


@pytest.fixture(scope="module")
def raw_stream(tmp_path_factory):
    """Bytes of a raw H.264 stream of 120 frames at 10 fps, with the rate in its header."""
    path = tmp_path_factory.mktemp("raw") / "raw.h264"
    return open(write_coded(path, 120, 10, {"profile": "baseline", "g": "40", "bf": "0"}), "rb").read()


def test_rate_of_raw_streams(tmp_path, raw_stream):
    """By the user's setting, else the header, else the annotation, else 25 fps. Seen red: both settings ignored."""
    (tmp_path / "timed.h264").write_bytes(raw_stream)
    (tmp_path / "untimed.h264").write_bytes(without_timing(raw_stream))
    cases = (
        ("timed", 0, 0, 10),
        ("timed", 0, 5, 10),
        ("timed", 20, 5, 20),
        ("untimed", 0, 0, 25),
        ("untimed", 0, 10, 10),
        ("untimed", 20, 10, 20),
    )
    for name, setting, noted, fps in cases:
        plan = replace(PLAN, num_frames=4, frame_fps=float(setting), noted_fps=float(noted))
        assert V.video_timing(tmp_path / f"{name}.h264", plan) == (pytest.approx(120 / fps), fps)
        numbers = frame_numbers(V.read_frames(str(tmp_path / f"{name}.h264"), plan, "auto"))
        assert np.abs(np.diff(numbers) - fps / 2).max() <= 1


def test_rates_reach_the_reader_and_guesses_are_named(tmp_path, raw_stream):
    """frame_fps and an annotation's fps change a dataset's clip; files whose rate nobody gives are named, no others."""
    (tmp_path / "annotations").mkdir()
    untimed = without_timing(raw_stream)
    for name, data in (("timed", raw_stream), ("noted", untimed), ("guessed", untimed), ("broken", b"x")):
        (tmp_path / f"{name}.h264").write_bytes(data)
    (tmp_path / "annotations" / "noted.json").write_text('{"fps": 10}')
    cfg = small_config(data_root=str(tmp_path), clip_fps=4.0, crop_scale_min=1.0)
    videos = V.find_videos(cfg.data_root, "*")
    assert V.guessed_rates(cfg, cfg.data_root, videos) == (["guessed.h264"], True)
    assert V.guessed_rates(replace(cfg, frame_fps=10.0), cfg.data_root, videos) == ([], True)
    by_name = {video.name: video for video in videos}
    clips = {}
    for name, setting in (("timed", 0.0), ("noted", 0.0), ("guessed", 0.0), ("guessed", 10.0)):
        data = V.ClipDataset(replace(cfg, frame_fps=setting), [by_name[f"{name}.h264"]], cfg.data_root, "val")
        clips[name, setting] = data.decode(3, 32, 32)[0]
    assert np.array_equal(clips["timed", 0.0], clips["noted", 0.0])
    assert np.array_equal(clips["timed", 0.0], clips["guessed", 10.0])
    assert not np.array_equal(clips["timed", 0.0], clips["guessed", 0.0])
    (tmp_path / "annotations" / "noted.json").write_text('{"fps": -3}')
    assert "fps" in V.ClipDataset(cfg, [by_name["noted.h264"]], cfg.data_root, "val").decode(3, 32, 32)[3][0][1]


@pytest.mark.parametrize(
    "codec, options",
    [("libx264", {"bf": "3", "g": "40"}), ("libx264", {"bf": "0", "g": "40"}), ("mpeg4", {"bf": "2", "g": "12"})],
)
def test_avi_shows_every_frame_in_its_turn(tmp_path, codec, options):
    """AVI holds no presentation times: frames come in order, one per packet. Seen red: up to three frames off, also
    without B-frames by one."""
    path = write_streams(tmp_path / "coded.avi", [(codec, 120, 10, 0, options)])
    for u_start in (0.0, 0.37, 1.0):
        plan = replace(PLAN, u_start=u_start)
        frames = V.read_frames(path, plan, "auto")
        numbers = frames.reshape(8, -1).mean(1) if codec == "mpeg4" else frame_numbers(frames)
        if codec == "libx264":
            assert np.abs(numbers - (u_start * 80 + np.arange(8) * 5)).max() <= 0.51
        assert np.array_equal(frames, V.read_pyav(path, plan, fast=False))


def test_times_that_run_backwards_are_refused(tmp_path, monkeypatch):
    """The latest frame at or before a moment is not defined then. Seen red: some frame or other."""
    path, real = write_coded(tmp_path / "coded.mp4", 80, 10, {"bf": "0"}), V.pyav_frames
    frames = []

    def shuffled(*args):
        frames[:] = real(*args)
        return [*frames[:3], frames[10], *frames[3:]]

    monkeypatch.setattr(V, "pyav_frames", shuffled)
    with pytest.raises(V.BadFile, match="run backwards, from 1.00 s to 0.30 s"):
        V.read_frames(path, PLAN, "pyav")
