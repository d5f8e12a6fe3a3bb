"""The frame cache: what is kept comes out bit for bit as decoded, whatever happens to files, folders and processes.


`both` reads a plan plainly and through the cache; `hits_only` forbids every opening of a video.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FOOTAGE, SHALLOW, V, small_config

SIDE, FRAMES = 24, 6
ODD, CLIPS = FOOTAGE / "odd_videos", FOOTAGE / "driving" / "clips"
RATES = [0.0, 4.0]
UNCROPPED = {name: value for name, value in V.ClipConfig.UNCROPPED.items() if name != "hflip"}


def settings(**overrides):
    """A config whose crops have one size; windows of 1.5 s."""
    return small_config(**{**dict(image_size=SIDE, num_frames=FRAMES, clip_fps=4.0), **UNCROPPED, **overrides})


def open_cache(folder, cfg=None, **options):
    cache = V.FrameCache(folder, cfg or settings(), **options)
    cache.open()
    return cache


def write(path, pts, codec="libx264", size=(40, 32), options=None, format=None, aspect=None, unit=1000):
    """Noise that moves, a frame at each of these times in units -> path. `turn`: degrees of a display matrix."""
    import av

    rng = np.random.default_rng(len(pts))
    ground = rng.integers(0, 256, (size[1], size[0] + len(pts), 3), dtype=np.uint8)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(unit * (len(pts) - 1), max(int(pts[-1] - pts[0]), 1)))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"threads": "1", "crf": "20", "preset": "ultrafast", **(options or {})}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.time_base = Fraction(1, unit)
        for number, moment in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(ground[:, number : number + size[0]], format="rgb24")
            frame.pts, frame.time_base = int(moment), Fraction(1, unit)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def steady(seconds, fps):
    return np.round(np.arange(round(seconds * fps)) * 1000 / fps).astype(int)


def turned(path, degrees=90):
    """The same mp4 with a display matrix, written into its track header."""
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    unit = 0x10000
    matrix = {90: (0, unit, 0, -unit, 0, 0, 0, 0, 0x40000000)}[degrees]
    data[at : at + 36] = b"".join(int(value).to_bytes(4, "big", signed=True) for value in matrix)
    Path(path).write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One odd file of each kind -> {kind: VideoFile}."""
    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(1)
    uneven = np.cumsum(rng.integers(10, 400, 60))
    bframes = {"bf": "3", "g": "250", "preset": "veryfast", "b-adapt": "0"}
    paths = {
        "uneven": write(folder / "uneven.mp4", uneven - uneven[0], options={"bf": "2", "preset": "veryfast"}),
        "long": write(folder / "long.mp4", steady(32, 8), options=bframes),
        "open": write(folder / "open.mkv", steady(14, 8), options={**bframes, "g": "16", "x264-params": "open-gop=1"}),
        "turned": turned(write(folder / "turned.mp4", steady(4, 10))),
        "wide": write(folder / "wide.mkv", steady(4, 10), aspect=Fraction(16, 9)),
        "ts": write(folder / "ts.ts", steady(12, 10), options={"g": "20", "bf": "2", "preset": "veryfast"}),
        "avi": write(folder / "avi.avi", steady(12, 10), codec="mpeg4", unit=1000, options={"g": "20"}),
        "raw": write(folder / "raw.h264", steady(12, 10), options={"g": "30"}, format="h264"),
        "short": write(folder / "short.mp4", steady(1, 12)),
        "few": write(folder / "few.mp4", steady(0.4, 10)),
    }
    files = {kind: V.VideoFile(kind, path) for kind, path in paths.items()}
    files["part"] = replace(files["long"], begin=9.3, length=4.0)
    files["exact"] = replace(files["long"], begin=19.0, length=1.5)
    np.save(folder / "times.npy", np.cumsum(rng.uniform(0.03, 0.3, 120)))
    files["told"] = replace(files["raw"], times=str(folder / "times.npy"))
    return files


def plans_of(video, cfg, count=5, stream="train"):
    """Plans of windows and offsets for a file, the first and the last window among them."""
    rng = np.random.default_rng(len(video.name))
    plans = [V.draw_plan(rng, cfg, stream) for _ in range(count)]
    plans[0], plans[1] = replace(plans[0], u_start=0.0), replace(plans[1], u_start=1.0)
    return [V.fit_plan(plan, video) for plan in plans]


def answer(read, *args):
    """Frames, or the words of a BadFile."""
    try:
        return read(*args)
    except V.BadFile as error:
        return str(error)


def same(one, other):
    return type(one) is type(other) and (one == other if isinstance(one, str) else np.array_equal(one, other))


def refuse(*args, **kwargs):
    raise AssertionError("a video was opened")


@pytest.fixture
def hits_only(monkeypatch):
    """A context in which no video can be opened."""

    def forbid():
        monkeypatch.setattr(V, "open_pyav", refuse)
        monkeypatch.setattr(V, "read_frames", refuse)

    yield forbid
    monkeypatch.undo()


# -- the same frames


@pytest.mark.parametrize("start_fps", RATES)
def test_frames_are_those_of_the_plain_reader(tmp_path, videos, hits_only, start_fps):
    """Every kind of file, filled by one window and another, then again without opening any video. Seen red with the
    interval of a row begun one frame late, and with times of start_fps off by a rounding."""
    cfg = settings(start_fps=start_fps)
    cache, wanted = open_cache(tmp_path / "kept", cfg), {}
    for kind, video in videos.items():
        for number, plan in enumerate(plans_of(video, cfg)):
            wanted[kind, number] = V.read_frames(video.path, plan, "auto")
            assert same(cache.read(video.path, plan), wanted[kind, number]), (kind, number)
    assert not cache.failed and not list((tmp_path / "kept").rglob("*.tmp"))
    hits_only()
    again = V.FrameCache(tmp_path / "kept", cfg)
    for kind, video in videos.items():
        for number, plan in enumerate(plans_of(video, cfg)):
            assert same(again.read(video.path, plan), wanted[kind, number]), (kind, number)


def test_windows_start_on_the_grid(videos):
    """With start_fps all requests of all windows are among few times, the same to the last bit; all starts come up."""
    cfg = settings(start_fps=8.0)
    for duration in (1.5, 1.6, 7.0, 33.3):
        times = [
            V.frame_times(replace(plan, u_start=u), duration, 29.97)
            for plan in plans_of(videos["long"], cfg, 2)
            for u in np.linspace(0, 1, 400)
        ]
        kept = V.wanted_times(plans_of(videos["long"], cfg, 2)[0], duration, 29.97)
        assert np.isin(np.concatenate(times), kept).all() and times[-1][-1] < duration
        starts = {clip[0] for clip in times}
        assert len(starts) == 1 + int((duration - 1.5) * 8 + 1e-9)


def test_a_rate_that_is_no_multiple_is_refused():
    for overrides in (dict(start_fps=6.0), dict(start_fps=2.0), dict(start_fps=4.0, clip_fps=0.0)):
        with pytest.raises(V.UsageError, match="start_fps.*multiple of clip_fps"):
            V.validate_config(settings(num_frames=12, image_size=32, **overrides))
    for overrides in (dict(frame_cache=" "), dict(frame_cache="kept", decoder="decord")):
        with pytest.raises(V.UsageError, match="frame_cache"):
            V.validate_config(settings(num_frames=12, image_size=32, **overrides))
    V.validate_config(settings(num_frames=12, image_size=32, start_fps=0.3, clip_fps=0.1, frame_cache="kept"))


def test_drawn_sizes_are_scaled_again(tmp_path, videos, hits_only):
    """Crops of drawn size and shape come out close to the decoded ones, those of validation the same bit for bit."""
    cfg = settings(crop_scale_min=0.5, crop_ratio_min=0.8, crop_ratio_max=1.2)
    cache, video = (
        open_cache(tmp_path / "kept", cfg),
        V.VideoFile("big", write(tmp_path / "big.mp4", steady(3, 8), size=(160, 128))),
    )
    plans = [*plans_of(video, cfg, 8), *plans_of(video, cfg, 3, "val")]
    plain = [V.read_frames(video.path, plan, "auto") for plan in plans]
    for _ in range(2):
        for number, plan in enumerate(plans):
            kept = cache.read(video.path, plan)
            assert kept.shape == plain[number].shape
            assert np.array_equal(kept, plain[number]) or number < 8
            assert np.abs(kept.astype(float) - plain[number]).mean() < 25  # noise, half a pixel off at most
        hits_only()


def test_other_sizes_and_pictures_are_read_plainly(tmp_path, videos):
    """A plan that is not of the config is no reason to keep anything."""
    cache = open_cache(tmp_path / "kept")
    for overrides in (dict(height=16), dict(scale=0.7), dict(ratio=1.1)):
        plan = replace(plans_of(videos["long"], settings())[2], **overrides)
        assert same(cache.read(videos["long"].path, plan), V.read_frames(videos["long"].path, plan, "auto"))
    assert not cache.listing()


def test_bad_files_are_bad_with_the_same_words(tmp_path, videos):
    """Damage, no video, a missing file, a part behind the end; what cannot be kept is tried once."""
    cache, cfg = open_cache(tmp_path / "kept"), settings()
    data = bytearray(Path(videos["long"].path).read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "hurt.mp4").write_bytes(data)
    (tmp_path / "text.mp4").write_bytes(b"no video")
    names = [str(tmp_path / name) for name in ("hurt.mp4", "text.mp4", "gone.mp4")]
    for path in names:
        for plan in plans_of(V.VideoFile("x", path), cfg, 4) * 2:
            assert same(answer(cache.read, path, plan), answer(V.read_frames, path, plan, "auto"))
    plan = plans_of(replace(videos["long"], begin=40.0), cfg)[0]
    assert "lasts" in answer(cache.read, videos["long"].path, plan)
    assert cache.failed


@pytest.mark.skipif(not ODD.is_dir() or not CLIPS.is_dir(), reason="no footage beside this checkout")
@pytest.mark.slow
@pytest.mark.parametrize("start_fps", RATES)
def test_real_footage(tmp_path, start_fps):
    """Awkward files of others, and clips from cars."""
    cfg = settings(start_fps=start_fps)
    cache = open_cache(tmp_path / "kept", cfg)
    for path in [*ODD.glob("*.m*"), *sorted(CLIPS.glob("*"))[::4]]:
        for plan in plans_of(V.VideoFile(path.name, str(path)), cfg, 3) * 2:
            assert same(answer(cache.read, str(path), plan), answer(V.read_frames, str(path), plan, "auto")), path


# -- what changes


def kept_files(folder):
    return sorted(path for path in Path(folder).rglob("*.[0-9]*") if path.is_file())


def test_a_changed_file_is_noticed(tmp_path, videos):
    """Of equal size with another time, and of equal size and time with other bytes at its end. Seen red with the
    path alone as the key."""
    path, cache, cfg = str(tmp_path / "a.mp4"), open_cache(tmp_path / "kept"), settings()
    shutil.copy(videos["turned"].path, path)
    plan = plans_of(V.VideoFile("a", path), cfg)[2]
    first = cache.read(path, plan)
    other = bytearray(Path(path).read_bytes())
    info, at = os.stat(path), other.index(b"mdat") + 4
    size = int.from_bytes(other[at - 8 : at - 4], "big") - 8
    Path(path).write_bytes(bytes(other[: at + size // 2]) + bytes(len(other) - at - size // 2))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert os.stat(path).st_size == info.st_size and same(
        answer(cache.read, path, plan), answer(V.read_frames, path, plan, "auto")
    )
    assert not same(answer(cache.read, path, plan), first)
    shutil.copy(videos["turned"].path, path)
    os.utime(path, ns=(1, 1))
    before = len(kept_files(tmp_path / "kept"))
    assert same(cache.read(path, plan), first) and len(kept_files(tmp_path / "kept")) > before


def test_another_setting_is_another_entry(tmp_path, videos, monkeypatch):
    """Size of the crop, versions of the decoder and rates all count."""
    path, cfg = videos["turned"].path, settings()
    open_cache(tmp_path / "kept").read(path, plans_of(videos["turned"], cfg)[2])
    count = len(kept_files(tmp_path / "kept"))
    for overrides in (
        dict(image_size=16),
        dict(start_fps=4.0),
        dict(frame_fps=3.0),
        dict(crop_scale_min=0.8, crop_scale_max=0.8),
    ):
        other = replace(cfg, **overrides)
        plan = plans_of(videos["turned"], other)[2]
        assert same(open_cache(tmp_path / "kept", other).read(path, plan), V.read_frames(path, plan, "auto"))
        assert len(kept_files(tmp_path / "kept")) == count + 1
        count += 1
    monkeypatch.setattr(V, "decoder_versions", lambda: ["0"])
    open_cache(tmp_path / "kept").read(path, plans_of(videos["turned"], cfg)[2])
    assert len(kept_files(tmp_path / "kept")) == count + 1


def test_a_source_that_changes_while_it_is_decoded_is_not_kept(tmp_path, videos, monkeypatch):
    path, cache = str(tmp_path / "a.mp4"), open_cache(tmp_path / "kept")
    shutil.copy(videos["turned"].path, path)
    plan, seal = plans_of(V.VideoFile("a", path), settings())[2], V.SegmentMaker.seal

    def touch_and_seal(maker, key):
        os.utime(path)
        return seal(maker, key)

    monkeypatch.setattr(V.SegmentMaker, "seal", touch_and_seal)
    assert same(cache.read(path, plan), V.read_frames(path, plan, "auto"))
    assert not kept_files(tmp_path / "kept")


@pytest.mark.parametrize("harm", ["cut", "longer", "garbage", "empty", "row", "tail", "other", "zeros"])
def test_damaged_segments_are_made_again(tmp_path, videos, hits_only, harm):
    """Whatever stands under the name of a segment is proven before it is read, each row by its sum."""
    path, cache = videos["turned"].path, open_cache(tmp_path / "kept")
    plan = plans_of(videos["turned"], settings())[2]
    wanted = cache.read(path, plan)
    segment = next(file for file in kept_files(tmp_path / "kept") if file.suffix == ".0")
    data = bytearray(segment.read_bytes())
    row = data[: SIDE * SIDE * 3]
    if harm == "other":
        cache.read(videos["wide"].path, plans_of(videos["wide"], settings())[2])
        other = next(file for file in kept_files(tmp_path / "kept") if file.suffix == ".0" and file != segment)
        data = other.read_bytes()
    elif harm == "row":
        for at in range(100, len(data) - 5000, 1000):
            data[at] ^= 4
    elif harm == "tail":
        data[-40] ^= 1
    elif harm == "zeros":
        data[: len(data) - 5000] = bytes(len(data) - 5000)
    else:
        data = {"cut": data[:-1000], "longer": data + row, "garbage": os.urandom(len(data)), "empty": b""}[harm]
    segment.write_bytes(data)
    assert same(cache.read(path, plan), wanted) and segment.read_bytes() != bytes(data)
    hits_only()
    assert same(cache.read(path, plan), wanted)


# -- disks and folders


def warned(cache, path, plan):
    """Read -> (frames, the lines that were said)."""
    told = []
    return cache.read(path, plan, told.append), told


@pytest.mark.parametrize("harm", ["full", "quota", "folder gone", "in place of its folder a file", "no locks"])
def test_a_disk_that_refuses_is_said_once(tmp_path, videos, monkeypatch, harm):
    """One WARNING, frames as decoded, nothing half written stays; what was kept before still answers."""
    cache, folder, path = open_cache(tmp_path / "kept"), tmp_path / "kept", videos["long"].path
    plans = plans_of(videos["long"], settings(), 3)
    wanted = [V.read_frames(path, plan, "auto") for plan in plans]
    assert same(cache.read(path, plans[0]), wanted[0])
    if harm in ("full", "quota"):
        code = errno.ENOSPC if harm == "full" else errno.EDQUOT
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    elif harm == "no locks":
        code = errno.ENOLCK
        monkeypatch.setattr(V.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    else:
        shutil.rmtree(folder)
        if harm.startswith("in place"):
            folder.write_text("mine")
    lines = []
    for number in (1, 0, 1, 2):
        frames, told = warned(cache, path, plans[number])
        assert same(frames, wanted[number])
        lines += told
    assert len(lines) == 1 and lines[0].startswith(f"WARNING: frame_cache {folder}: ") and "is decoded" in lines[0]
    left = [path.stat().st_size for path in tmp_path.glob("kept/*/*.tmp")]
    assert left == ([0] if harm == "no locks" else [])  # without a lock nobody knows whose it is
    assert not harm.startswith("in place") or folder.read_text() == "mine"


def test_a_real_limit_on_file_size(tmp_path, videos):
    """RLIMIT_FSIZE in a process of its own: the write fails in the middle of a segment."""
    cache, path = open_cache(tmp_path / "kept"), videos["long"].path
    plan = plans_of(videos["long"], settings())[1]

    def limited(pipe):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        frames, told = warned(cache, path, plan)
        pipe.send((frames, told))

    frames, told = in_process(limited)
    assert same(frames, V.read_frames(path, plan, "auto")) and len(told) == 1 and "too large" in told[0]
    assert not list(tmp_path.rglob("*.tmp")) and not kept_files(tmp_path / "kept")


def in_process(work):
    """What a forked process sends."""
    pipe, end = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(end,))
    process.start()
    try:
        assert pipe.poll(60)
        return pipe.recv()
    finally:
        process.kill()
        process.join()


def test_the_oldest_go_and_what_is_in_use_stays(tmp_path, videos, hits_only):
    """Within frame_cache_gb at any time; what this run used is not thrown out for more of the same."""
    path, cfg, folder = videos["long"].path, settings(), tmp_path / "kept"
    plans = [replace(plan, u_start=u) for plan, u in zip(plans_of(videos["long"], cfg), (0.1, 0.5, 0.9))]
    open_cache(folder).read(path, plans[0])
    one = sum(file.stat().st_size for file in kept_files(folder))
    tight = replace(cfg, frame_cache_gb=1.9 * one / 1e9)
    for number, plan in enumerate(plans):
        for file in kept_files(folder):
            os.utime(file, (1000 + number, 1000 + number))
        cache = open_cache(folder, tight, since=time.time() - 1)
        assert same(cache.read(path, plan), V.read_frames(path, plan, "auto"))
        assert [file.suffix for file in kept_files(folder)] == [f".{number}"]
        assert (
            int((folder / "total").read_text()) == sum(file.stat().st_size for file in kept_files(folder)) <= 1.9 * one
        )
    frames, told = warned(cache, path, plans[0])
    assert same(frames, V.read_frames(path, plans[0], "auto")) and "frame_cache_gb" in told[0]
    assert [file.suffix for file in kept_files(folder)] == [".2"]
    hits_only()
    assert cache.read(path, plans[2]) is not None


def test_a_smaller_limit_shrinks_what_is_there(tmp_path, videos):
    folder = tmp_path / "kept"
    for plan in plans_of(videos["long"], settings()):
        open_cache(folder).read(videos["long"].path, plan)
    before = sum(file.stat().st_size for file in kept_files(folder))
    limit = 0.5 * before
    open_cache(folder, settings(frame_cache_gb=limit / 1e9), since=time.time() + 1)
    assert 0 < sum(file.stat().st_size for file in kept_files(folder)) <= limit


def test_folders_of_others_are_refused_and_left_alone(tmp_path, videos):
    """Something else in it, a file; our own with a stranger among ours keeps it through every eviction."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, why in (("other", "holds something else"), ("file", "is no folder")):
        with pytest.raises(V.UsageError, match=f"frame_cache .*{why}.*--frame_cache"):
            open_cache(tmp_path / name)
    cache = open_cache(tmp_path / "kept")
    cache.read(videos["long"].path, plans_of(videos["long"], settings())[0])
    place = kept_files(tmp_path / "kept")[0].parent
    strangers = [
        place / "mine.0",
        place / f"{'a' * 39}.0",
        tmp_path / "kept/mine.tmp",
        place / ("b" * 40),
        place / "x.tmp",
    ]
    for path in strangers:
        path.write_bytes(b"mine")
    open_cache(tmp_path / "kept", settings(frame_cache_gb=0.0), since=time.time() + 9)
    assert all(path.read_bytes() == b"mine" for path in strangers) and not cache.listing()


# -- processes


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path, videos):
    """At once, in other orders: both get the decoded frames, and what stays is whole."""
    cfg, path = settings(), videos["long"].path
    plans = plans_of(videos["long"], cfg, 8)
    open_cache(tmp_path / "kept")
    context, wanted = multiprocessing.get_context("fork"), [V.read_frames(path, plan, "auto") for plan in plans]

    def read_all(order):
        cache = V.FrameCache(tmp_path / "kept", cfg)
        fine = all(same(cache.read(path, plans[number]), wanted[number]) for number in order)
        os._exit(0 if fine and cache.stores else 1)

    processes = [context.Process(target=read_all, args=(order,)) for order in (range(8), range(7, -1, -1))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    cache = open_cache(tmp_path / "kept")
    assert not list(tmp_path.rglob("*.tmp")) and cache.listing()
    assert all(same(cache.read(path, plan), frames) for plan, frames in zip(plans, wanted))


def test_whoever_finds_a_segment_in_the_making_decodes(tmp_path, videos):
    """No waiting, no second writer, no warning."""
    cache, path = open_cache(tmp_path / "kept"), videos["turned"].path
    plan = plans_of(videos["turned"], settings())[2]
    cache.read(path, plan)
    segment = next(file for file in kept_files(tmp_path / "kept") if file.suffix == ".0")
    segment.unlink()
    maker = V.SegmentMaker(segment)
    frames, told = warned(cache, path, plan)
    assert same(frames, V.read_frames(path, plan, "auto")) and not told and not segment.exists()
    maker.close()
    assert same(cache.read(path, plan), frames) and segment.exists()


@pytest.mark.slow
def test_a_killed_filler_leaves_nothing_that_is_read(tmp_path, videos, monkeypatch):
    """SIGKILL in the middle of a segment: its rows are forgotten by the next one, and swept at the next start."""
    cache, path = open_cache(tmp_path / "kept"), videos["long"].path
    plan, add = plans_of(videos["long"], settings())[1], V.SegmentMaker.add

    def add_and_die(maker, *args):
        add(maker, *args)
        if len(maker.sums) == 5:
            maker.handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def read():
        monkeypatch.setattr(V.SegmentMaker, "add", add_and_die)
        cache.read(path, plan)

    for number in range(2):
        process = multiprocessing.get_context("fork").Process(target=read)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert list(tmp_path.rglob("*.tmp")) and {file.suffix for file in kept_files(tmp_path / "kept")} == {".tmp"}
        if number:
            open_cache(tmp_path / "kept")
            assert not list(tmp_path.rglob("*.tmp"))
        assert same(cache.read(path, plan), V.read_frames(path, plan, "auto"))
        if not number:
            next(file for file in kept_files(tmp_path / "kept") if file.suffix == ".3").unlink()


def test_a_file_that_takes_too_long_is_decoded(tmp_path, videos):
    """Within a third of decode_timeout_s or not at all; it is not tried again."""
    cache, plan = open_cache(tmp_path / "kept", settings(decode_timeout_s=0.1)), plans_of(videos["long"], settings())[1]
    cache.limit_s = -1.0
    assert same(cache.read(videos["long"].path, plan), V.read_frames(videos["long"].path, plan, "auto"))
    assert len(cache.failed) == 1 and not list(tmp_path.rglob("*.tmp"))


# -- runs


def choose(cfg, clips=1000, **source):
    video = source.pop("video")
    data = V.DataSource("videos", "", [video] * 4, [], [], True, **source)
    return V.choose_frame_cache(cfg, data, clips)


def test_auto_says_why(tmp_path, videos, monkeypatch):
    """Where it pays, fits, and changes nothing; each reason against it is told."""
    cfg, video = settings(out_dir=str(tmp_path / "run")), videos["turned"]
    place, told = choose(cfg, video=video)
    assert place[0] == str(tmp_path / "run/frame_cache") and "frames: kept in" in told and "GB" in told
    for overrides, clips, why in (
        (dict(crop_scale_min=0.6), 1000, "crops of several sizes"),
        (dict(decoder="decord"), 1000, "decord"),
        (dict(), 5, "times"),
        (dict(frame_cache_gb=1e-4), 1000, "frame_cache_gb = 0.0001"),
        (dict(out_dir=str(tmp_path / "file")), 1000, "is no folder"),
    ):
        (tmp_path / "file").mkdir(exist_ok=True)
        (tmp_path / "file/frame_cache").write_text("mine")
        place, told = choose(replace(cfg, **overrides), clips, video=video)
        assert place is None and told.startswith("frames: not kept (") and why in told
    assert choose(replace(cfg, frame_cache="off"), video=video) == (None, "")
    named = replace(cfg, frame_cache=str(tmp_path / "named"), crop_scale_min=0.6)
    place, told = choose(named, video=video)
    assert place[0] == named.frame_cache and "not the same bit for bit" in told
    monkeypatch.setattr(
        V.FrameCache, "open", lambda cache: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
    )
    place, told = choose(named, video=video)
    assert place[2] is False and "WARNING" in told and "Read-only" in told
    place, told = choose(replace(named, frame_cache=str(tmp_path / "none")), video=video)
    assert place is None and told.startswith("WARNING: frames: not kept")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_learns_the_same_with_and_without(tmp_path, videos, capsys, workers):
    """Four steps and an evaluation: equal losses; the second run opens no video; --resume never keeps the cache."""
    (tmp_path / "data").mkdir()
    for kind in ("turned", "wide", "uneven"):
        shutil.copy(videos[kind].path, tmp_path / "data")
    losses = {}
    for name, frame_cache in (("off", "off"), ("auto", "auto"), ("again", "auto")):
        out = tmp_path / ("off" if name == "off" else "auto")
        cfg = small_config(
            data_root=str(tmp_path / "data"),
            out_dir=str(out),
            steps=4,
            num_workers=workers,
            frame_cache=frame_cache,
            resume="never",
            val_every=2,
            picture=False,
            **UNCROPPED,
            **SHALLOW,
        )
        assert V.train(cfg) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [{key: row[key] for key in row if "loss" in key} for row in rows]
        said = capsys.readouterr().out
        assert ("frames: kept in" in said) == (frame_cache == "auto")
        files = kept_files(out / "frame_cache")
        assert bool(files) == (frame_cache == "auto")
        if name == "auto":
            before = {path: path.stat().st_ino for path in files}
    assert losses["off"] == losses["auto"] == losses["again"] and len(losses["off"]) >= 4
    assert {path: path.stat().st_ino for path in files}.items() >= before.items()


def test_a_worker_warns_through_the_log(tmp_path, videos):
    """What a loader worker meets is said by the main process, once for all loaders of a run."""
    cfg, lines = settings(), []
    cache = open_cache(tmp_path / "kept", cfg)
    shutil.rmtree(tmp_path / "kept")
    source = V.DataSource("videos", "", [videos["turned"]] * 4, [], [], True, frame_cache=cache)
    source.line = V.lru_cache(lines.append)
    for _ in range(2):
        loader = V.open_loader(source, cfg, "train", V.StepSampler(0, 2, 2, 0, 1), 2)
        assert all(torch.is_tensor(batch["frames"]) for batch in loader)
    assert len(lines) == 1 and "No such file" in lines[0]
