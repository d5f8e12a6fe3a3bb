"""What is found out about a file is kept, never believed unseen; windows of one file are decoded in one go; and what is
left out of decoding changes no pixel."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from test_videos import PLAN, frame_numbers, write_coded

import VJepa_AUTO_V2 as V


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One film of 200 frames at 10 fps in the containers of which something must be found out, and a plain mp4."""
    folder, paths = tmp_path_factory.mktemp("kept"), {}
    for name, suffix in (("stream_keys", "ts"), ("count_packets", "h264"), ("end_of_stream", "mkv"), ("", "mp4")):
        paths[name] = write_coded(
            folder / f"film.{suffix}",
            200,
            10,
            {"g": "20", "bf": "2"},
            container_options={"live": "1"} if suffix == "mkv" else None,
        )
    return paths


@pytest.fixture
def looks(monkeypatch):
    """Names of the looks through a file, in order; what was found before is forgotten."""
    done = []
    for name in ("stream_keys", "count_packets", "end_of_stream"):
        finding = V.Finding(getattr(V, name).find)
        monkeypatch.setattr(finding, "find", Watched(finding.find, done))
        monkeypatch.setattr(V, name, finding)
    return done


class Watched:
    """A function that notes its name when it is called."""

    def __init__(self, work, done):
        self.work, self.done = work, done

    def __call__(self, *args):
        self.done.append(self.work.__name__)
        return self.work(*args)


def forget():
    """As in a new process."""
    for name in ("stream_keys", "count_packets", "end_of_stream"):
        getattr(V, name).known.clear()


PLAN_10 = replace(PLAN, fps=2.0, frame_fps=10.0, u_start=0.6)


@pytest.mark.parametrize("name", ["stream_keys", "count_packets", "end_of_stream"])
def test_a_second_visit_looks_no_more(files, tmp_path, looks, name):
    """Neither in this process nor in the next one that is given the folder; without a folder nothing is written."""
    path, plan = files[name], replace(PLAN_10, kept=str(tmp_path / "not" / "there"))
    plain = V.read_pyav(path, PLAN_10)
    assert looks == [name]
    assert np.array_equal(V.read_pyav(path, plan), plain) and looks == [name]
    forget()
    assert np.array_equal(V.read_pyav(path, plan), plain) and looks == [name] * 2
    forget()
    assert np.array_equal(V.read_pyav(path, plan), plain) and looks == [name] * 2
    assert V.video_timing(path, plan) == V.video_timing(path, PLAN_10)
    assert [one.endswith(".json") for one in os.listdir(plan.kept)] == [True]  # and no temporary file


def test_an_mp4_needs_no_look(files, tmp_path, looks):
    """Its header is its index: nothing is kept."""
    V.read_pyav(files[""], replace(PLAN_10, kept=str(tmp_path / "kept")))
    assert looks == [] and not (tmp_path / "kept").exists()


def damaged(text):
    """What may become of a kept file -> {what: its new bytes}. The last three would show other frames if believed."""
    kept = json.loads(text)
    keys = json.loads(text)
    for key in keys["found"]:
        key[0] += 1.0
    other_file = {**kept, "about": [*kept["about"][:3], "elsewhere", *kept["about"][4:]]}
    return {
        "empty": b"", "cut": text[: len(text) // 2].encode(), "binary": os.urandom(300), "a list": b"[1, 2]",
        "a number": b"7", "deep": b"[" * 100_000, "no sum": json.dumps({**kept, "sum": 0}).encode(),
        "other findings": json.dumps(keys).encode(), "of another file": json.dumps(other_file).encode(),
        "of another format": json.dumps({**kept, "about": [0, *kept["about"][1:]]}).encode(),
    }  # fmt: skip


def test_damaged_and_foreign_findings_are_not_believed(files, tmp_path, looks):
    """They are found anew, and written over. Seen red without the sum: a window a second off."""
    path, plan = files["stream_keys"], replace(PLAN_10, kept=str(tmp_path))
    plain = V.read_pyav(path, plan)
    (place,) = tmp_path.iterdir()
    text = place.read_text()
    for what, content in damaged(text).items():
        place.write_bytes(content)
        forget()
        looks.clear()
        assert np.array_equal(V.read_pyav(path, plan), plain), what
        assert looks == ["stream_keys"] and place.read_text() == text, what


@pytest.mark.parametrize("what", ["a file", "a pipe in it", "a folder in it", "not writable"])
def test_a_folder_that_keeps_nothing_is_no_error(files, tmp_path, looks, what, monkeypatch):
    """Read as if nothing were kept; a pipe does not block."""
    path, folder = files["count_packets"], tmp_path / "kept"
    plan = replace(PLAN_10, kept=str(folder))
    plain = V.read_pyav(path, plan)
    (place,) = folder.iterdir()
    place.unlink()
    if what == "a file":
        folder.rmdir()
        folder.write_bytes(b"somebody's")
    elif what == "a pipe in it":
        os.mkfifo(place)
    elif what == "a folder in it":
        place.mkdir()
        (place / "somebody's").touch()
    else:
        monkeypatch.setattr(V.os, "replace", Full())
    forget()
    assert np.array_equal(V.read_pyav(path, plan), plain)
    assert not list(tmp_path.rglob("*.tmp"))
    if what == "a file":
        assert folder.read_bytes() == b"somebody's"


class Full:
    """A full disk."""

    def __call__(self, *args):
        raise OSError(28, "No space left on device")


def test_a_changed_file_is_looked_through_again(files, tmp_path, looks):
    """Also one of the same size and time, whose first or last bytes are others. Seen red without the hash of these."""
    path, plan = tmp_path / "film.h264", replace(PLAN_10, kept=str(tmp_path / "kept"))
    content = open(files["count_packets"], "rb").read()
    path.write_bytes(content)
    before = os.stat(path)
    V.read_pyav(str(path), plan)
    for number, change in enumerate((content[:-1] + b"\0", content + b"\0")):
        with open(path, "r+b") as file:  # the same inode
            file.write(change)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        forget()
        V.read_frames(str(path), plan, "pyav")
        assert looks == ["count_packets"] * (number + 2)


def test_memory_is_bounded(monkeypatch):
    """The oldest findings go; one that is larger than all that may be held is held alone. A hundred files do not push
    each other out, as sixteen did."""
    monkeypatch.setattr(V.Finding, "MOST", 1000)
    finding = V.Finding(Counting())
    for name in [*range(90)] * 2:
        assert finding((str(name), 1, 2, 3, ""), 10) == list(range(10))
    assert finding.find.calls == 90 and finding.held == 990
    assert len(finding(("large", 1, 2, 3, ""), 5000)) == 5000 and list(finding.known) == [("large", 1, 2, 3, 5000)]
    finding(("small", 1, 2, 3, ""), 1)
    assert finding.held == 2 and len(finding.known) == 1


class Counting:
    """A look that finds so many numbers."""

    def __init__(self):
        self.calls, self.__name__ = 0, "counting"

    def __call__(self, stamp, count):
        self.calls += 1
        return list(range(count))


# -- what is left out of decoding


@pytest.mark.parametrize(
    "suffix, options, most",
    [
        ("mp4", {"g": "8", "bf": "2"}, 140),
        ("ts", {"g": "5", "bf": "0"}, 113),
        ("mkv", {"g": "1"}, 40),
        ("mp4", {"g": "8", "x264-params": "open-gop=1:bframes=3"}, 660),
    ],
)
def test_whole_runs_are_left_out(tmp_path, suffix, options, most, monkeypatch):
    """Where requests lie further apart than key frames, what lies between is not decoded, and no pixel changes; nor is
    what follows the last request. At most so many frames are decoded for 36: reading twice, or from the start, is more.
    Seen red with no run left out, with wanted frames in it, with what follows the last request, and with open GOPs
    entered (1034 frames)."""
    path, decoded, real = write_coded(tmp_path / f"film.{suffix}", 240, 30, options), [], V.pyav_frames
    plans = [replace(PLAN, num_frames=6, fps=fps, u_start=u) for fps in (1.0, 2.0) for u in (0.0, 0.41, 1.0)]
    plain = [V.read_pyav(path, plan, fast=False) for plan in plans]
    monkeypatch.setattr(V, "pyav_frames", Noting(real, decoded))
    for plan, frames in zip(plans, plain):
        assert np.array_equal(V.read_pyav(path, plan), frames)
    assert len(decoded) <= most


class Noting:
    """pyav_frames, and each of its frames noted."""

    def __init__(self, work, decoded):
        self.work, self.decoded = work, decoded

    def __call__(self, *args):
        for frame in self.work(*args):
            self.decoded.append(frame.pts)
            yield frame


def test_a_long_last_frame_costs_no_second_reading(tmp_path, monkeypatch):
    """The last request falls on a frame that is on screen for seconds, which its own length may not say."""
    pts = [*range(0, 4000, 100), 9000, 9100]
    path = write_coded(tmp_path / "slow.mkv", 42, 10, {"bf": "0", "g": "250"}, pts_ms=pts)
    readings, real = [], V.shown_frames
    monkeypatch.setattr(V, "shown_frames", lambda *args: readings.append(args[5]) or real(*args))
    plan = replace(PLAN, num_frames=4, fps=1.0, u_start=0.75)
    assert frame_numbers(V.read_pyav(path, plan))[-1] == 39 and readings == [True]


def test_a_window_reads_no_further_than_its_end(tmp_path, monkeypatch):
    """However long a file is, and however near its key frames are. Seen red: 10,000 clips of two hours in 410 s, not
    30, when each window was left for the next key frame until the file was at its end."""
    path, packets, real = write_coded(tmp_path / "near.mp4", 600, 10, {"g": "5"}), [], V.from_key
    monkeypatch.setattr(V, "from_key", Noting(real, packets))
    for u_start in (0.0, 0.5):
        V.read_pyav(path, replace(PLAN, num_frames=4, fps=2.0, u_start=u_start))
    assert 0 < len(packets) < 200


@pytest.mark.parametrize("size", [(398, 224), (33, 31), (448, 252), (64, 64)])
def test_a_picture_is_the_scalers(size):
    """Neither the view of its rows nor the one thread changes a pixel of what to_ndarray gives."""
    import av
    from av.video.reformatter import VideoReformatter

    frame = av.VideoFrame.from_ndarray(
        np.random.default_rng(0).integers(0, 256, (270, 480, 3), np.uint8), format="rgb24"
    )
    frame = frame.reformat(format="yuv420p")
    plan = V.ClipPlan(1, 1.0, size[1], size[0], 0.0, 1.0, 1.0, 0.5, 0.5)
    own = (
        VideoReformatter().reformat(frame, *V.crop_box(plan, 480, 270)[:2], "rgb24", interpolation="AREA").to_ndarray()
    )
    x, y = V.crop_box(plan, 480, 270)[2:]
    assert np.array_equal(V.pyav_picture(frame, plan, 1.0, VideoReformatter()), own[y : y + size[1], x : x + size[0]])


# -- windows of one file


def clips(videos, **settings):
    """A dataset of training clips of 6 frames at 5 fps."""
    cfg = V.preset_config("tiny", image_size=32, num_frames=6, now_frames=2, soon_frames=2, clip_fps=5.0, **settings)
    return V.ClipDataset(cfg, videos, "", "train")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three films at 10 fps: of 20 s, of 2.5 s, which is shorter than four windows, and of 1 s, shorter than one."""
    folder = tmp_path_factory.mktemp("films")
    counts = {"long": 200, "short": 25, "tiny": 10}
    paths = [write_coded(folder / f"{name}.mp4", count, 10, {"g": "25"}) for name, count in counts.items()]
    return [V.VideoFile(os.path.basename(path), path) for path in paths]


def test_windows_of_a_file_are_those_read_alone(films, monkeypatch):
    """Sample i is the same whoever reads it, after whatever: forward, backward, every second one, in a pickled copy.
    Forward a group is opened once. Seen red with the frames of a finished member given away."""
    numbers = range(24)
    alone = {number: clips(films, windows_per_file=4)[number] for number in numbers}
    opened, real = [], V.opened_stream
    monkeypatch.setattr(V, "opened_stream", lambda *args: opened.append(args[0]) or real(*args))
    data = clips(films, windows_per_file=4)
    forward = {number: data[number] for number in numbers}
    assert len(opened) == 6  # groups
    copy = pickle.loads(pickle.dumps(data))
    backward = {number: copy[number] for number in numbers[::-1]}
    halves = {number: data[number] for half in (0, 1) for number in numbers[half::2]}
    for number in numbers:
        for other in (forward, backward, halves):
            assert all(same(alone[number][key], other[number][key]) for key in alone[number])


def same(one, other):
    return one == other if isinstance(one, list) else bool((one == other).all())


def test_windows_follow_one_another(films):
    """Four samples on end lie in one file, each beginning where the one before ended, and every file has its turn."""
    data = clips(films[:1], windows_per_file=4, crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0)
    starts = [frame_numbers(data.decode(number, 32, 32)[0])[0] for number in range(40)]
    steps = np.diff(np.reshape(starts, (10, 4)))
    assert ((steps >= 11) & (steps <= 13)).all()  # 1.2 s
    assert len(set(starts[::4])) > 6
    data = clips(films, windows_per_file=4)
    assert all(len({int(data[4 * group + place]["file"]) for place in range(4)}) == 1 for group in range(3))
    assert {int(data[4 * group]["file"]) for group in range(3)} == {0, 1, 2}


def test_a_short_file_gives_windows_that_overlap(films):
    """They are spread evenly from its first to its last one."""
    plans = [replace(PLAN, num_frames=6, fps=5.0, u_start=0.3, windows=4, place=place) for place in range(4)]
    starts = [V.frame_times(plan, 2.5, 10.0)[0] for plan in plans]
    assert starts == pytest.approx([0.05 + 1.3 * place / 3 for place in range(4)])


def test_one_window_per_file_is_as_before(films):
    """And held-out clips are never taken as neighbours."""
    plain, data = clips(films), clips(films, windows_per_file=4)
    assert plain.windows() == 1 and plain.plan_of(5, 32, 32)[0].windows == 1
    data.stream = plain.stream = "val"
    assert all(same(plain[5][key], data[5][key]) for key in ("frames", "file"))


def test_a_bad_file_among_windows(films, tmp_path):
    """Each member of its group goes to the same substitute, also where another process read the one before."""
    (tmp_path / "bad.mp4").write_bytes(open(films[0].path, "rb").read()[:4000])
    videos = [*films, V.VideoFile("bad.mp4", str(tmp_path / "bad.mp4"))]
    data, found = clips(videos, windows_per_file=4), {}
    for number in range(16):
        sample = data[number]
        alone = clips(videos, windows_per_file=4)[number]
        assert all(same(sample[key], alone[key]) for key in sample)
        found.setdefault(number // 4, set()).add((int(sample["file"]), tuple(name for name, _ in sample["bad"])))
    assert all(len(group) == 1 for group in found.values())
    assert sum("bad.mp4" in names for group in found.values() for _, names in group) == 1


def test_windows_need_a_rate_and_files():
    """One clear line each."""
    for settings, why in (({"clip_fps": 0.0}, "whole file"), ({"scenes": "render"}, "rendered")):
        with pytest.raises(V.UsageError, match=f"windows_per_file = 4: must be 1: .*{why}"):
            V.validate_config(V.preset_config("tiny", windows_per_file=4, **settings))
