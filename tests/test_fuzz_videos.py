"""Damaged, hostile and very many files: nothing crashes, hangs, fills the memory or opens a file that was not asked
for."""

import importlib.util
import json
import os
import shutil
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import FOOTAGE, ROOT, V, small_config
from test_videos import frame_numbers, write_coded

sys.path.insert(0, str(ROOT / "tools"))

import fuzz_videos as Z  # noqa: E402

ODD = FOOTAGE / "odd_videos"
NUM_FEW = 4 * len(Z.MUTATORS)  # 60: every mutator four times
STREAM_DAMAGE = (
    "flipped bits",
    "flipped media bits",
    "random bytes",
    "zero run",
)  # mutators that hit the coded pictures
DECODER_NAMES = [
    "pyav",
    pytest.param("decord", marks=pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord")),
]
needs_odd_files = pytest.mark.skipif(not ODD.is_dir(), reason="no awkward files beside this checkout")
needs_inotify = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="inotify, /proc and RLIMIT_AS are Linux'"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The two intact files of the fuzz -> {name: path}."""
    return Z.write_sources(tmp_path_factory.mktemp("sources"))


def count(rows, **wanted):
    """Number of fuzz rows with these values."""
    return sum(all(row[key] == value for key, value in wanted.items()) for row in rows)


def outcome_of(path, intact=None, reader="auto", timeout_s=60.0, plan=Z.PLAN):
    """Read a path in a child process with our options -> its row. Without intact frames, frames are `silent`."""
    child = Z.Child(timeout_s, limit_mb=1000.0)
    row = child.read("ours", reader, Path(path), plan, np.zeros(1) if intact is None else intact)
    child.close()
    return row


def write_coded_by(codec, path, frames, options=None, gop=15):
    """Frames uint8 [T, H, W, 3] through any encoder at Z.FPS -> path. Skips the test where the encoder is not built
    in."""
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    policy = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Z.FPS)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], "yuv420p", gop
        stream.options = options or {}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    # SVT-AV1 makes a root caller a real-time thread for good: CPU threads of torch that spin at that priority starve
    # each other
    os.sched_setscheduler(0, *policy)
    return path


# -- the fuzz itself


@needs_inotify
def test_a_few_mutations():
    """Four mutants of each kind: no crash, hang, foreign exception or other file opened; memory bounded; scripts and
    pipes refused, intact files under a wrong extension read right. Seen red with `raise error` in place of BadFile at
    the end of read_pyav."""
    rows = Z.fuzz(NUM_FEW, seed=1, reader="pyav", ways=("ours",))
    assert len(rows) == NUM_FEW and Z.passed(rows), [row for row in rows if not Z.passed([row])]
    assert count(rows, mutator="playlist", outcome="refused") == count(rows, mutator="fifo", outcome="refused") == 4
    assert count(rows, mutator="wrong extension", outcome="right") == 4
    assert max(row["peak_mb"] for row in rows) < 100  # a reading of these files takes about 15


@needs_inotify
@pytest.mark.slow
def test_a_thousand_mutations():
    """As above, 1000 mutants of another seed; of those whose pictures were damaged at most one in five comes out
    silently wrong."""
    rows = Z.fuzz(1000, seed=2, reader="pyav", ways=("ours",))
    assert len(rows) == 1000 and Z.passed(rows), [row for row in rows if not Z.passed([row])]
    assert all(row["outcome"] == "refused" for row in rows if row["mutator"] in ("playlist", "fifo"))
    assert max(row["peak_mb"] for row in rows) < 100
    damaged = [row for row in rows if row["mutator"] in STREAM_DAMAGE]
    # measured 12 %: damage that still is valid syntax shows to nobody without a checksum
    assert count(damaged, outcome="silent") < 0.2 * len(damaged)


@needs_inotify
@pytest.mark.slow
def test_strict_options_catch_what_the_defaults_show():
    """Of clips whose coded bits were flipped, PyAV's defaults show at least twice as many silently wrong as our
    reader."""
    rows = Z.fuzz(20 * len(Z.MUTATORS), seed=3, reader="pyav")
    flipped = [row for row in rows if row["mutator"] in ("flipped bits", "flipped media bits")]
    silent = {way: count(flipped, way=way, outcome="silent") for way in Z.WAYS}
    assert 0 < 2 * silent["ours"] < silent["defaults"]


def test_mutants_depend_on_seed_and_number_alone(tmp_path, sources):
    """The same numbers give the same bytes, names and plans, other numbers others; every mutator changes what it
    says."""
    made = []
    for _ in range(2):
        for number in range(2 * len(Z.MUTATORS)):
            name, source, path, plan = Z.write_mutant(tmp_path, sources, 7, number)
            made.append((name, source, path.name, plan, b"" if name == "fifo" else path.read_bytes()))
            path.unlink()
    half = len(made) // 2
    assert made[:half] == made[half:] and {entry[0] for entry in made} == set(Z.MUTATORS)
    for name, source, _, _, data in made[:half]:
        same = data == sources[source].read_bytes()
        assert same == (name == "wrong extension"), name


def test_boxes_of_an_mp4(sources):
    """find_boxes covers the file without a gap, children inside their parents, and knows the index."""
    data = sources["b_frames"].read_bytes()
    boxes = Z.find_boxes(data)
    top = [box for box in boxes if "/" not in box[0]]
    assert [box[1] for box in top] == [0, *(box[2] for box in top[:-1])] and top[-1][2] == len(data)
    (table,) = [box for box in boxes if box[0] == "moov/trak/mdia/minf/stbl/stsz"]
    assert struct.unpack(">I", data[table[1] + 16 : table[1] + 20]) == (Z.NUM_FRAMES,)


def crash(reader, path, plan):
    """A reader that dies of SIGABRT."""
    os.abort()


def wait(reader, path, plan):
    """A reader that never answers."""
    time.sleep(60)


def stumble(reader, path, plan):
    """A reader that lets a foreign exception out."""
    raise ValueError("foreign")


def blacken(reader, path, plan):
    """A reader that gives wrong pixels."""
    return np.zeros((plan.num_frames, plan.height, plan.width, 3), np.uint8)


def gorge(reader, path, plan):
    """A reader that asks for more memory than it is allowed."""
    return np.ones(3 * 10**9, np.uint8)


@needs_inotify
@pytest.mark.parametrize(
    "reading, outcome", [(crash, "crash"), (wait, "hang"), (stumble, "other"), (gorge, "other"), (blacken, "silent")]
)
def test_the_fuzz_sees_what_it_looks_for(monkeypatch, sources, reading, outcome):
    """Planted readers that crash, hang, raise, eat memory or give wrong pixels are named so."""
    monkeypatch.setitem(Z.WAYS, "ours", reading)
    intact = np.full((Z.PLAN.num_frames, Z.PLAN.height, Z.PLAN.width, 3), 9, np.uint8)
    row = outcome_of(sources["plain"], intact, timeout_s=0.5 if reading is wait else 60.0)
    assert row["outcome"] == outcome
    assert row["off"] == (9 if reading is blacken else 0)


def test_exit_code_and_report(monkeypatch, tmp_path, capsys):
    """0 for refused, right and silent; 1 for a crash, a hang, another exception, or another file opened; failures of
    `defaults` are only counted."""
    good = dict(
        number=3,
        mutator="cut",
        source="plain",
        way="ours",
        outcome="silent",
        detail="",
        off=9.0,
        peak_mb=5.0,
        seconds=0.1,
        opened=[],
    )
    for change, code in (
        ({}, 0),
        ({"outcome": "refused"}, 0),
        ({"outcome": "crash"}, 1),
        ({"outcome": "hang"}, 1),
        ({"outcome": "other"}, 1),
        ({"opened": ["bait.mp4"]}, 1),
        ({"outcome": "crash", "way": "defaults"}, 0),
    ):
        monkeypatch.setattr(Z, "fuzz", lambda *args, row={**good, **change}: [good, row])
        assert Z.main(["--num", "2", "--out", str(tmp_path / "fuzz.json")]) == code
        assert ("mutation 3 (cut of plain)" in capsys.readouterr().out) == bool(code)
    table = json.loads((tmp_path / "fuzz.json").read_text())["table"]
    assert (
        table["ours"]["cut"]["silent"] == table["ours"]["all"]["seen"] == 1 and table["defaults"]["all"]["crash"] == 1
    )


# -- one file at a time


@needs_inotify
def test_playlists_open_nothing_but_themselves(tmp_path):
    """Every form of script, under four names: refused, and no other file of the folder is opened. Control: PyAV's
    defaults do open what an ffconcat script names, and the watch sees it. Seen red with format_whitelist left out of
    open_pyav."""
    Z.write_bait(tmp_path)
    watch = Z.OpenWatch(tmp_path)
    forms = {Z.playlist(b"", np.random.default_rng(seed)) for seed in range(60)}
    assert len(forms) == 7
    for form in sorted(forms):
        for suffix in (".mp4", ".ts", ".mkv", ".h264"):
            path = tmp_path / f"script{suffix}"
            path.write_bytes(form)
            watch.names()
            with pytest.raises(V.BadFile):
                V.read_frames(str(path), Z.PLAN, "auto")
            assert watch.names() == {path.name}
            path.unlink()
    path = tmp_path / "script.mp4"
    path.write_bytes(b"ffconcat version 1.0\nfile bait.mp4\nduration 5\n")
    watch.names()
    assert Z.plain_pyav(path, Z.PLAN).shape == (12, 64, 64, 3)
    assert watch.names() == {"script.mp4", "bait.mp4"}
    watch.close()


def test_one_scaler_for_a_clip_gives_the_frames_of_one_for_each(tmp_path):
    """Frames of a clip are what each frame's own scaler makes of it. Seen red with another interpolation."""
    path, rng = tmp_path / "clip.mp4", np.random.default_rng(0)
    V.write_video(path, rng.integers(0, 256, (30, 48, 80, 3), dtype=np.uint8), 30)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    for height, width in ((32, 32), (64, 64), (48, 80)):
        plan = V.ClipPlan(30, 30.0, height, width, 0.0, 0.7, 1.1, 0.3, 0.6)
        wide, high, x, y = V.crop_box(plan, 80, 48)
        own = [f.reformat(width=wide, height=high, format="rgb24", interpolation="AREA").to_ndarray() for f in frames]
        assert np.array_equal(V.read_pyav(path, plan), np.stack(own)[:, y : y + height, x : x + width])


@needs_inotify
def test_pipes_and_devices_do_not_block(tmp_path):
    """A pipe, a link to one, a link to a device without end, a link to itself: listed like any name, refused at once.
    Seen red with check_regular left out of read_frames (the readers of the pipe hung)."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "to_pipe.mp4").symlink_to(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "itself.mp4").symlink_to(tmp_path / "itself.mp4")
    videos = V.find_videos(str(tmp_path), "*")
    assert [video.name for video in videos] == ["itself.mp4", "pipe.mp4", "to_pipe.mp4", "zero.mp4"]
    details = {video.name: outcome_of(video.path, timeout_s=20.0)["detail"] for video in videos}
    assert "cannot be read" in details.pop("itself.mp4") and set(details.values()) == {"not a regular file"}


@needs_odd_files
@needs_inotify
@pytest.mark.parametrize("reader", DECODER_NAMES)
def test_awkward_files_of_other_projects(reader):
    """Each is read or refused, in a child process: no crash, no hang, no foreign exception."""
    paths = sorted(ODD.iterdir())
    assert paths
    for path in paths:
        row = outcome_of(path, reader=reader, plan=replace(Z.PLAN, fps=0.0))
        bad = path.name in ("README.md", "chunk_out_of_range.mp4", "corrupted.mp4", "opus.mp4")
        assert row["outcome"] == ("refused" if bad else "silent"), (path.name, row)


def test_bug_patches_welcome(tmp_path, sources):
    """A feature that FFmpeg does not know is a bad file.

    Symptom: the run ends with av.error.PatchWelcomeError. Trigger: an mdhd box of version 127, as one damaged byte
    makes it. Cause: that error and a few others derive from FFmpegError alone, none of the classes that were caught.
    """
    data = bytearray(sources["plain"].read_bytes())
    (box,) = [box for box in Z.find_boxes(bytes(data)) if box[0] == "moov/trak/mdia/mdhd"]
    data[box[1] + 8] = 127
    (tmp_path / "future.mp4").write_bytes(data)
    with pytest.raises(V.BadFile, match="patches welcome"):
        V.read_frames(str(tmp_path / "future.mp4"), Z.PLAN, "auto")


def test_every_error_of_the_decoder_is_a_bad_file(sources, monkeypatch):
    """All classes of PyAV's errors, raised in the middle of decoding, come out as BadFile with their reason."""
    import av

    classes = {cls for cls in vars(av.error).values() if isinstance(cls, type) and issubclass(cls, av.FFmpegError)}
    assert len(classes) > 20
    for cls in classes:
        monkeypatch.setattr(V, "pyav_frames", Fail(cls(1163346256, "the decoder's own words")))
        with pytest.raises(V.BadFile, match="the decoder's own words"):
            V.read_frames(str(sources["plain"]), Z.PLAN, "pyav")


class Fail:
    """A callable that raises what it was made with."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *args):
        raise self.error


def patched(data, box_name, offset, value):
    """Bytes of an mp4 with one 32-bit number of one box replaced."""
    (box,) = [box for box in Z.find_boxes(data) if box[0] == box_name]
    return data[: box[1] + offset] + struct.pack(">I", value) + data[box[1] + offset + 4 :]


def test_damaged_geometry_is_refused(tmp_path, sources):
    """A display matrix of zeros, one that turns by 45 degrees, and pixels 42 times as wide as high.

    Symptom: the clip came out turned by a quarter (a matrix of zeros has the rotation -2**31) or as a thin cut of the
    frame.
    """
    data = sources["plain"].read_bytes()
    matrix = 48  # offset in tkhd: 16.16 fixed point, rows of three; then width and height
    zeros, turned = data, data
    for place in range(9):
        zeros = patched(zeros, "moov/trak/tkhd", matrix + 4 * place, 0)
    for place, value in enumerate((46341, 46341, 0, -46341 % 2**32, 46341)):
        turned = patched(turned, "moov/trak/tkhd", matrix + 4 * place, value)
    wide = patched(data, "moov/trak/tkhd", matrix + 36, 4096 << 16)
    for name, mutant, reason in (
        ("zeros", zeros, "display matrix"),
        ("turned", turned, "display matrix"),
        ("wide", wide, "as wide as high"),
    ):
        (tmp_path / f"{name}.mp4").write_bytes(mutant)
        with pytest.raises(V.BadFile, match=reason):
            V.read_frames(str(tmp_path / f"{name}.mp4"), Z.PLAN, "pyav")


@needs_inotify
def test_huge_frames_are_refused_unseen(tmp_path):
    """A frame of more than MAX_PIXELS, in a file of some hundred kilobytes, is refused before memory is taken for it.
    Seen red with max_pixels left out of the decoder's options and of open_pyav's (frames, and 177 MB held)."""
    import av

    picture = av.VideoFrame(8448, 8192, "yuv420p")
    for plane in picture.planes:
        plane.update(bytes(plane.buffer_size))
    with av.open(str(tmp_path / "huge.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Z.FPS)
        stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast", "tune": "zerolatency"}
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert picture.width * picture.height > V.MAX_PIXELS
    row = outcome_of(tmp_path / "huge.mp4", reader="pyav")
    assert row["outcome"] == "refused" and row["peak_mb"] < 100, row


# -- the right frames of undamaged files


@pytest.mark.parametrize(
    "codec, options",
    [("libsvtav1", {"preset": "10"}), ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}), ("mpeg4", {})],
)
def test_bug_frames_left_out_that_were_asked_for(tmp_path, codec, options):
    """Seeking and leaving frames out changes no pixel, whatever the codec.

    Symptom: AV1 windows that do not start at the file's beginning showed some frames twice and left out their
    neighbours. Cause: dav1d takes skip_frame from the first packet it gets and keeps to it.
    """
    path = write_coded_by(codec, tmp_path / "coded.mp4", Z.moving_picture(np.random.default_rng(1)), options)
    for u_start in (0.3, 0.6, 1.0):
        plan = replace(Z.PLAN, u_start=u_start)
        assert np.array_equal(V.read_pyav(str(path), plan), V.read_pyav(str(path), plan, fast=False))


def test_bug_entered_between_key_frames(tmp_path):
    """A file whose list of key frames is lost gives the same frames as with it.

    Symptom: grey ghosts, 28 levels off. Trigger: MPEG-4 part 2 without its stss box, so that every packet counts as a
    key frame. Cause: the seek landed between key frames, and that decoder starts there without a word.
    """
    path = write_coded_by("mpeg4", tmp_path / "coded.mp4", Z.moving_picture(np.random.default_rng(1)))
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    (tmp_path / "lost.mp4").write_bytes(data.replace(b"stss", b"free"))
    for u_start in (0.3, 0.6, 1.0):
        plan = replace(Z.PLAN, u_start=u_start)
        assert np.array_equal(V.read_pyav(str(tmp_path / "lost.mp4"), plan), V.read_pyav(str(path), plan))


def test_hidden_key_frame_needs_no_second_reading(tmp_path, sources, monkeypatch):
    """A file cut without coding anew hides its key frame behind its edit list, and shows from a later frame on: it is
    sound and read in one go. Seen red when entering it at its very start counted as landing between key frames."""
    frame_ticks = 1024  # of 1 / 12288 s, at 12 frames per second
    (tmp_path / "cut.mp4").write_bytes(
        patched(sources["plain"].read_bytes(), "moov/trak/edts/elst", 20, 3 * frame_ticks)
    )
    calls, read_pyav = [], V.read_pyav

    def counted(path, plan, fast=True):
        calls.append(fast)
        return read_pyav(path, plan, fast)

    monkeypatch.setattr(V, "read_pyav", counted)
    plan = replace(Z.PLAN, u_start=0.6)
    shown = V.read_pyav(str(tmp_path / "cut.mp4"), plan)
    assert calls == [True]
    assert not np.array_equal(shown, read_pyav(str(sources["plain"]), plan))  # three frames on
    assert np.array_equal(shown, read_pyav(str(tmp_path / "cut.mp4"), plan, fast=False))


def test_two_hours_are_sampled_by_seeking(tmp_path, monkeypatch):
    """Any window of a file of 2 h is right and decodes under 2 % of its frames. Seen red with the seek left out."""
    path = write_coded(tmp_path / "long.mp4", 3600, 0.5, {"g": "30", "bf": "2", "preset": "ultrafast"})
    decoded, pyav_frames = [], V.pyav_frames
    monkeypatch.setattr(
        V, "pyav_frames", lambda *args: (decoded.append(frame) or frame for frame in pyav_frames(*args))
    )
    for u_start in (0.25, 0.6, 0.999):
        decoded.clear()
        plan = replace(Z.PLAN, num_frames=8, fps=0.1, height=32, width=32, u_start=u_start)
        numbers = frame_numbers(V.read_frames(path, plan, "pyav"))
        assert np.abs(numbers - (u_start * (7200 - 80) / 2 + np.arange(8) * 5)).max() <= 0.51
        assert 8 <= len(decoded) < 0.02 * 3600


# -- folders


def ring(signum, frame):
    """Handler of SIGALRM: a walk that does not end must fail, not hang the tests."""
    raise TimeoutError("still walking")


def test_symlink_loops_end(tmp_path):
    """Twelve folders that all link to each other, to themselves and to the root, and two links that only name each
    other: every file once, under the first name that leads to it. Seen red (still walking) with the set of visited
    folders left out."""
    for number in range(12):
        (tmp_path / f"f{number:02d}").mkdir()
        (tmp_path / f"f{number:02d}" / f"own_{number:02d}.mp4").write_bytes(b"")
    for number in range(12):
        (tmp_path / f"f{number:02d}" / "root").symlink_to(tmp_path, target_is_directory=True)
        for other in range(12):
            (tmp_path / f"f{number:02d}" / f"to{other:02d}").symlink_to(
                tmp_path / f"f{other:02d}", target_is_directory=True
            )
    (tmp_path / "this").symlink_to(tmp_path / "that")
    (tmp_path / "that").symlink_to(tmp_path / "this")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        names = [video.name for video in V.find_videos(str(tmp_path), "*")]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sorted(name.rpartition("/")[2] for name in names) == [f"own_{number:02d}.mp4" for number in range(12)]
    assert names[0] == "f00/own_00.mp4"


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path):
    """100,000 files in 100 folders are listed, split and ready to be read in under 10 s of CPU time (a busy machine
    counts less)."""
    for folder in range(100):
        (tmp_path / f"drive_{folder:03d}").mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / f"drive_{folder:03d}" / f"clip_{number:03d}.mp4", os.O_CREAT | os.O_WRONLY))
    cfg = small_config(data_root=str(tmp_path), val_fraction=0.1)
    begin = time.process_time()
    videos = V.list_data(cfg)
    source = V.open_data(V.VJepaAutoV2, cfg, videos, True, lambda: None)
    seconds = time.process_time() - begin
    print(f"100,000 files listed and split in {seconds:.1f} s of CPU time")
    shutil.rmtree(tmp_path)  # pytest would keep them for three runs
    assert len(videos) == len(source.train) + len(source.val) == 100000 and source.kind == "videos"
    # binomial(100000, 0.1) has a standard deviation of 95 files: 400 is four of them
    assert abs(len(source.val) - 10000) < 400
    assert seconds < 10
