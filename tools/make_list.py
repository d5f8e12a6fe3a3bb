"""Write the jsonl list through which the script reads a data set as it was published. Nothing is copied or re-encoded.

    python tools/make_list.py DIR --out LIST.jsonl [--layout NAME] [--camera NAME] [--side all|train|val|test]
                              [--frame_fps N] [--speed_unit m/s|km/h|mph] [--angle_unit rad|deg] [--no-signals]
                              [--force]
    python VJepa_AUTO_V2.py --data_root LIST.jsonl

DIR is a data set of LeRobot (v2.0, v2.1, v3.0), comma2k19, nuScenes, KITTI raw, BDD100K or Cityscapes, any folder of
pictures, or a Kinetics list (`path index` in each line). It is seen from its files which one it is; --layout says it.
docs/layouts.md tells what is taken from each.

Beside the list stand two folders where they are needed: LIST_signals/ (speed, steer, yaw_rate in SI units, + = right)
and LIST_frames/ (csv files of path,time). The same command may be given again; what another hand wrote is not
overwritten without --force. Paths are relative where the list stands beside or above the data, else absolute.

A line is one drive without a gap: what belongs together has one `group`, and is held out together. Rates and times come
from the data; pictures without any need --frame_fps. What is left out is counted and named, with the reason.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import csv
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

TIME_FILES = ("timestamps.txt", "times.txt", "timestamps.npy", "times.npy", "frame_times", "frame_times.npy")
SPEED_UNITS = {"m/s": 1.0, "km/h": 1 / 3.6, "mph": 0.44704}
ANGLE_UNITS = {"rad": 1.0, "deg": math.pi / 180}
SPELLINGS = {"ms": "m/s", "mps": "m/s", "kmh": "km/h", "kph": "km/h", "kmph": "km/h"}
LEROBOT_VERSIONS = ("v2.0", "v2.1", "v3.0")
CITYSCAPES_FPS, BDD_TRACK_FPS = 17.0, 5.0
OXTS_COLUMNS = {"speed": (8, 1.0), "yaw_rate": (22, -1.0)}  # vf, forward; wu, about the upward axis, + = left there
SIGNAL_NAMES = {  # names of LeRobot's columns, with the unit at their end if they say one
    "speed": r"(?i)(?:.*[._ ])?(?:(?:ego|car|vehicle)_?)?speed(?:_(m/?_?s|mps|km/?_?h|kph|kmph|mph))?",
    "steer": r"(?i)(?:.*[._ ])?steer(?:ing)?(?:_wheel)?(?:_angle)?(?:_(rad|deg)(?:ians|rees)?)?",
    "yaw_rate": r"(?i)(?:.*[._ ])?yaw_?rate(?:_(rad|deg)(?:/?_?p?s)?)?",
}


class Found:
    """What a layout gave: lines of the list, what was left out, and words for the user."""

    def __init__(self):
        self.what, self.lines, self.left_out, self.notes, self.spoken = "", [], {}, [], time.monotonic()

    def add(self, seconds, **line):
        """One line. `video` or `frames` a Path, `frames` also [(Path, second)], `times` a Path, `signals` arrays with
        their fps; seconds None: not known without opening the video."""
        self.lines.append({"seconds": seconds, **line})
        if V.is_terminal(sys.stderr) and time.monotonic() - self.spoken > 0.5:
            self.spoken = time.monotonic()
            V.emit(f"\r{len(self.lines)} listed ", sys.stderr)

    def leave_out(self, name, reason):
        self.left_out.setdefault(V.flat(reason), []).append(name)

    def attempt(self, name, add, *args, **line):
        """Let a function add the lines of a drive, which is left out where it raises BadFile -> what it returned."""
        try:
            return add(self, *args, **line)
        except V.BadFile as error:
            self.leave_out(name, error)


# -- times and pictures -----------------------------------------------------------------------------------------------


def natural(name):
    """Sorting key in which 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("([0-9]+)", name)]


def number_in(name):
    """The last number in the stem of a file name, None without any."""
    numbers = re.findall(r"\d+", os.path.splitext(name)[0])
    return int(numbers[-1]) if numbers else None


def epoch_in(name):
    """Seconds since 1970 that a file name ends in: in s with a fraction, or whole ms, us or ns. None for others."""
    found = re.search(r"(?<!\d)(1\d{9})(?:\.(\d+)|(\d{3}|\d{6}|\d{9}))\D*$", os.path.splitext(name)[0])
    return float(f"{found[1]}.{found[2] or found[3]}") if found else None


def pictures_of(names):
    """The pictures among the names of a folder, in natural order."""
    return sorted((name for name in names if name.lower().endswith(V.PICTURE_SUFFIXES)), key=natural)


def load_numbers(path):
    """A npy file, whatever its suffix, or a text with a number or a date and time in each line -> float64 [N], of
    dates seconds. BadFile says why there is none."""
    where = f"{path.parent.name}/{path.name}"
    try:
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                return np.load(path, allow_pickle=False).astype(np.float64).ravel()
        lines = [line.strip() for line in V.read_text(path, V.MAX_LIST_BYTES).splitlines() if line.strip()]
        if lines and ":" in lines[0]:
            return np.array([line.replace(" ", "T") for line in lines], "datetime64[ns]").astype(np.int64) / 1e9
        return np.array(lines, np.float64)
    except FileNotFoundError as error:
        raise V.BadFile(f"{where} missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise V.BadFile(f"{where} cannot be read ({V.reason_of(error)})") from error


def runs_of(seconds):
    """Times of frames -> [(first, after the last)] of the parts without a gap, and the usual step in seconds. BadFile
    for times that do not rise, and where no part has two frames."""
    steps = np.diff(seconds)
    if len(seconds) < 2:
        raise V.BadFile("fewer than two frames")
    if not np.isfinite(seconds).all() or (steps <= 0).any():
        raise V.BadFile("times that do not rise from frame to frame")
    step = float(np.median(steps))
    cuts = np.flatnonzero(steps > max(V.GAP_S, V.GAP_STEPS * step)) + 1
    runs = [(int(a), int(b)) for a, b in zip([0, *cuts], [*cuts, len(seconds)]) if b - a > 1]
    if not runs:
        raise V.BadFile("no two frames without a gap between them")
    return runs, step


def sample_signals(sources, start, length, fps):
    """Values of {signal: (times, values)} at start + i / fps -> {"fps", signal: float64 array}, nan where a source has
    nothing within a second and a half. {} for no sources."""
    grid, sampled = start + np.arange(max(int(length * fps + 1e-6), 1)) / fps, {}
    for name, (times, values) in sources.items():
        good = np.isfinite(times) & np.isfinite(values)
        times, values = times[good], values[good]
        if len(times) > 1 and (np.diff(times) >= 0).all():
            after = np.clip(np.searchsorted(times, grid), 1, len(times) - 1)
            near = np.minimum(abs(grid - times[after - 1]), abs(grid - times[after]))
            sampled[name] = np.where(near < 1.5, np.interp(grid, times, values), np.nan)
    return {"fps": round(fps, 6), **sampled} if sampled else {}


def check_sizes(paths):
    """BadFile where pictures cannot be read or have not one size."""
    from PIL import Image

    sizes = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, path.name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise V.BadFile(f"{path.name} cannot be read ({V.reason_of(error)})") from error
        if len(sizes) > 1:
            shapes = ", ".join(f"{width} x {height} ({name})" for (width, height), name in sizes.items())
            raise V.BadFile(f"pictures of mixed sizes: {shapes}")


def add_timed(found, media, times_file, seconds, sources, **line):
    """A line for each part without a gap of what has a file of times. media: {"video" or "frames": Path}, sources:
    signals as (times, values) on the same clock."""
    runs, step = runs_of(seconds)
    for first, after in runs:
        begin, length = seconds[first] - seconds[0], seconds[after - 1] - seconds[first] + step
        signals = sample_signals(sources, seconds[first], length, 1 / step)
        part = {} if after - first == len(seconds) else {"begin": round(begin, 6), "length": round(length, 6)}
        found.add(length, **media, **part, times=times_file, signals=signals, **line)


def add_pictures(found, paths, seconds, group):
    """A line with a csv for each part without a gap of pictures whose times are known. BadFile."""
    runs, step = runs_of(seconds)
    check_sizes(paths)
    for first, after in runs:
        frames = list(zip(paths[first:after], (seconds[first:after] - seconds[first]).round(6).tolist()))
        found.add(frames[-1][1] + step, frames=frames, group=group)


def add_timed_folder(found, folder, names, times_file, sources, group):
    """Lines of a folder of pictures with a file of times, one for each picture. BadFile."""
    seconds = load_numbers(times_file)
    if len(seconds) != len(names):
        raise V.BadFile(f"{times_file.name} has {len(seconds)} times for {len(names)} pictures")
    check_sizes([folder / name for name in names])
    add_timed(found, {"frames": folder}, times_file, seconds, sources, group=group)


# -- LeRobot ----------------------------------------------------------------------------------------------------------


def read_info(root, tree):
    """meta/info.json of a LeRobot data set -> dict. UsageError for all that cannot be read."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise V.UsageError(f"{root}: looks like a LeRobot data set, and has no meta/info.json; fetch its meta/ folder")
    try:
        info = V.parse_json(V.read_text(path, V.MAX_LIST_BYTES), float)
        version, features = info["codebase_version"], info["features"]
        usable = isinstance(features, dict) and all(isinstance(feature, dict) for feature in features.values())
        if not usable or not V.fits(float, info["fps"]) or not 0 < info["fps"] <= 10**4:
            raise ValueError("fps and features are not what they should be")
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise V.UsageError(f"{path}: cannot be read ({type(error).__name__}: {V.reason_of(error)})") from error
    if version not in LEROBOT_VERSIONS:
        known = ", ".join(LEROBOT_VERSIONS)
        cure = "convert it with LeRobot's own scripts"
        raise V.UsageError(f"{path}: codebase_version {V.shown(version)} is not known, only {known}; {cure}")
    if info.get("storage_format") == "lance" or any(folder.split("/")[0].endswith(".lance") for folder in tree):
        cure = "use the data set with videos and parquet files from which it was made"
        raise V.UsageError(f"{root}: its frames lie in lance tables (storage_format lance), which are not read; {cure}")
    return info


def is_depth(feature):
    """Whether a camera of a LeRobot data set gives distances."""
    notes = {**feature, **(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(notes.get("is_depth_map") or notes.get("video.is_depth_map"))


def pick_camera(info, wanted, found):
    """The key of the camera to take. UsageError where there is none, or not the one that --camera names."""
    videos, refused = [], {}
    for key, feature in info["features"].items():
        if feature.get("dtype") == "image":
            refused[key] = "its pictures lie in parquet files, which are not read"
        elif feature.get("dtype") == "video" and is_depth(feature):
            refused[key] = "a depth camera, whose pictures are distances"
        elif feature.get("dtype") == "video":
            videos.append(key)
    known, keys = f"cameras: {', '.join(videos) or 'none'}", [*videos, *refused]
    named = [key for key in keys if key == wanted] or [key for key in keys if wanted and key.endswith(f".{wanted}")]
    if wanted and not named:
        raise V.UsageError(f"--camera {wanted}: no such camera{V.nearest(wanted, videos)}; {known}")
    if named and named[0] in refused:
        raise V.UsageError(f"--camera {wanted}: {refused[named[0]]}; {known}")
    if not videos:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in refused.items()) or "none at all"
        raise V.UsageError(f"LeRobot data set without a camera that can be read (--camera): {reasons}")
    front = [key for key in videos if re.search("front|forward|center|centre|ego|head", key, re.IGNORECASE)]
    if not named and not front and len(videos) > 1:
        raise V.UsageError(f"several cameras, none of them in front; name one with --camera; {known}")
    chosen = (named or front or videos)[0]
    others = [key for key in videos if key != chosen] + [f"{key}, {reason}" for key, reason in refused.items()]
    found.notes.append(f"camera: {chosen}" + f"; not taken (--camera): {'; '.join(others)}" * bool(others))
    return chosen


def read_table(path, columns, optional=()):
    """Columns of a parquet file -> pyarrow table. UsageError where it cannot be read, or pyarrow is absent."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        what = "parquet files need pyarrow: pip install pyarrow"
        raise V.UsageError(f"{path}: {what} (without it LeRobot v2 works with --no-signals)") from error
    try:
        table = parquet.ParquetFile(path).read(columns=[*columns, *optional])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise V.UsageError(f"{path}: cannot be read ({V.reason_of(error)})") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise V.UsageError(f"{path}: has no column {', '.join(missing)}")
    return table


def fill_path(root, info, name, values):
    """A path of a LeRobot data set from the template in its info.json. UsageError for a template of other fields."""
    try:
        if re.search(r"\{[^}]*[.\[!]", info[name]):
            raise ValueError("a field with an attribute")
        return root / info[name].format(total_episodes=info.get("total_episodes", 0), **values)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        shown = V.shown(info.get(name))
        raise V.UsageError(f"{root}/meta/info.json: {name} {shown} cannot be filled in") from error


def episodes_v2(root, info, camera):
    """meta/episodes.jsonl -> [{index, length, tasks, video, data}]."""
    path, episodes = root / "meta" / "episodes.jsonl", []
    try:
        for line in filter(str.strip, V.read_text(path, V.MAX_LIST_BYTES).splitlines()):
            row = V.parse_json(line, float)
            one = dict(index=int(row["episode_index"]), length=int(row["length"]), tasks=row.get("tasks"))
            chunk = one["index"] // int(info.get("chunks_size") or 1000)
            place = dict(episode_chunk=chunk, episode_index=one["index"], video_key=camera)
            paths = {kind: fill_path(root, info, f"{kind}_path", place) for kind in ("video", "data")}
            episodes.append({**one, **paths})
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise V.UsageError(f"{path}: cannot be read ({type(error).__name__}: {V.reason_of(error)})") from error
    return episodes


def episodes_v3(root, info, camera):
    """meta/episodes/*/*.parquet -> as `episodes_v2`, with `first`, the episode's first frame in its video."""
    begin, paths = f"videos/{camera}/from_timestamp", sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    places = {
        kind: [f"{where}/{name}_index" for name in ("chunk", "file")]
        for kind, where in (("video", f"videos/{camera}"), ("data", "data"))
    }
    columns, episodes = ["episode_index", "length", begin, *places["video"], *places["data"]], []
    if not paths:
        raise V.UsageError(f"{root}: no meta/episodes/chunk-*/file-*.parquet, which LeRobot v3.0 needs")
    for path in paths:
        for row in read_table(path, columns, ["tasks"]).to_pylist():
            try:
                numbers = {name: int(row[name]) for name in columns if name != begin}
                one = dict(index=numbers["episode_index"], length=numbers["length"], tasks=row.get("tasks"))
                one["first"] = round(row[begin] * info["fps"])
            except (TypeError, ValueError, OverflowError) as error:
                raise V.UsageError(f"{path}: an episode with an empty field ({V.reason_of(error)})") from error
            for kind, (chunk, file) in places.items():
                place = dict(video_key=camera, chunk_index=numbers[chunk], file_index=numbers[file])
                one[kind] = fill_path(root, info, f"{kind}_path", place)
            episodes.append(one)
    return episodes


def find_signals(info, args, found):
    """Signals among the columns of a LeRobot data set -> {signal: (feature, place in it or None, factor)}. What has no
    unit is left out, and said."""
    names, chosen, unclear = [], {}, []
    for key, feature in info["features"].items():
        labels, shape = feature.get("names"), feature.get("shape") or [1]
        groups = labels.values() if isinstance(labels, dict) else [labels]
        flat = [label for group in groups if isinstance(group, list) for label in group]
        if re.match("float|int|double", str(feature.get("dtype"))) and len(shape) == 1:
            names += [(f"{key}.{label}", key, place) for place, label in enumerate(flat) if len(flat) == shape[0]]
            names += [(key, key, None)] if shape == [1] else []
    for name, key, place in sorted(names, key=lambda name: not name[0].startswith("observation")):
        for kind, pattern in SIGNAL_NAMES.items():
            match, units = re.fullmatch(pattern, name), SPEED_UNITS if kind == "speed" else ANGLE_UNITS
            if not match or kind in chosen:
                continue
            flag = "speed_unit" if kind == "speed" else "angle_unit"
            said = re.sub("[_/]", "", match[1] or "").lower()
            unit = SPELLINGS.get(said, said) or getattr(args, flag)
            if unit:
                chosen[kind] = key, place, units[unit]
                found.notes.append(f"{kind}: {name} in {unit}")
            else:
                unclear.append(f"{name} (--{flag})")
    if unclear:
        found.notes.append(f"signals without a unit, left out until a flag says it: {', '.join(unclear[:4])}")
    elif not chosen:
        found.notes.append("signals: none of the columns is a speed, a steering angle or a yaw rate")
    return chosen


def column_values(table, feature, place):
    """A column of numbers, or one of the places of a column of lists -> float64 [N]."""
    values = table.column(feature).to_numpy(zero_copy_only=False)
    if values.dtype == object:
        values = np.stack(values)
    return values.reshape(len(values), -1)[:, place or 0].astype(np.float64)


def lerobot_signals(chosen, episodes, fps, found):
    """{episode: {"fps", signal: values}} of the chosen columns. Every parquet file is read once."""
    files, signals = {}, {}
    for episode in episodes:
        files.setdefault(episode["data"], []).append(episode)
    gone = [path for path in files if chosen and not path.is_file()]
    found.notes += V.left_out_note(
        "signals", ["/".join(path.parts[-3:]) for path in gone], "parquet file(s) are not there and"
    )
    for path in (path for path in files if chosen and path not in gone):
        features = dict.fromkeys(feature for feature, _, _ in chosen.values())
        table = read_table(path, ["episode_index", *features])
        try:
            whose = column_values(table, "episode_index", None)
            values = {kind: column_values(table, key, at) * by for kind, (key, at, by) in chosen.items()}
        except (ValueError, TypeError, IndexError) as error:
            raise V.UsageError(f"{path}: signals cannot be read ({V.reason_of(error)}); try --no-signals") from error
        for episode in files[path]:
            rows = np.flatnonzero(whose == episode["index"])[: episode["length"]]
            signals[episode["index"]] = {"fps": fps, **{kind: column[rows] for kind, column in values.items()}}
    return signals


def check_rate(path, fps):
    """UsageError unless a video has the rate that info.json says: episodes are found in it by that."""
    try:
        with V.opened_stream(path) as (_, stream):
            rate = float(stream.average_rate or 0)
    except V.BadFile as error:
        raise V.UsageError(f"{path}: {error}") from error
    if rate and abs(rate / fps - 1) > 0.01:
        raise V.UsageError(f"{path}: {rate:g} frames per second, and meta/info.json says {fps:g}; one of them is wrong")


def read_lerobot(root, tree, args, found):
    """LeRobot: an episode is a line; several share a video of v3.0, each with begin and length on whole frames."""
    info = read_info(root, tree)
    version, fps, camera = info["codebase_version"], float(info["fps"]), pick_camera(info, args.camera, found)
    read = episodes_v3 if version == "v3.0" else episodes_v2
    episodes, there, ends = [], {}, {}
    for episode in sorted(read(root, info, camera), key=lambda one: (str(one["video"]), one.get("first", 0))):
        video, first = episode["video"], episode.get("first", 0)
        if video not in there:
            there[video] = video.is_file()
            if there[video] and sum(there.values()) == 1:
                check_rate(video, fps)
        if not there[video]:
            found.leave_out(f"episode {episode['index']}", "its video is not there")
        elif episode["length"] < 2 or first < ends.get(video, 0):
            found.leave_out(f"episode {episode['index']}", "shorter than two frames, or in the frames of another one")
        else:
            episodes.append(episode)
            ends[video] = first + episode["length"] if version == "v3.0" else 0
    chosen = find_signals(info, args, found) if args.signals else {}
    signals = lerobot_signals(chosen, episodes, fps, found)
    for episode in sorted(episodes, key=lambda one: one["index"]):
        length = episode["length"] / fps
        part = dict(begin=round(episode["first"] / fps, 6), length=round(length, 6)) if "first" in episode else {}
        tasks = episode["tasks"] if isinstance(episode["tasks"], list) else [episode["tasks"] or ""]
        line = dict(group=f"{root.name} episode {episode['index']}", maneuver=V.flat("; ".join(map(str, tasks))))
        found.add(length, video=episode["video"], **part, **line, signals=signals.get(episode["index"], {}))
    videos = len({str(episode["video"]) for episode in episodes})
    found.what = f"LeRobot {version}, {len(episodes)} episodes in {videos} videos at {fps:g} fps"


# -- drives -----------------------------------------------------------------------------------------------------------


def count_frames(path):
    """How many frames a bare stream holds, without decoding them. BadFile."""
    with V.opened_stream(path) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def comma_signals(folder):
    """CAN speed (m/s) and steering angle (degrees of the wheel, + = left) -> {signal: (times, values)} in SI, + =
    right. What cannot be read is absent."""
    sources = {}
    for name, place, factor in (("speed", "speed", 1.0), ("steer", "steering_angle", -ANGLE_UNITS["deg"])):
        with suppress(V.BadFile):  # the segment is worth as much without: the summary counts signals
            times, values = (load_numbers(folder / "processed_log/CAN" / place / part) for part in ("t", "value"))
            sources |= {name: (times, values * factor)} if len(times) == len(values) else {}
    return sources


def add_segment(found, folder, with_signals):
    """The lines of a segment of comma2k19. BadFile."""
    times_file = folder / "global_pose" / "frame_times"
    seconds = load_numbers(times_file)
    if len(seconds) < 1200:  # a whole minute: shorter ones are counted, all of them would be 100 GB to read
        count = count_frames(folder / "video.hevc")
        if len(seconds) < count:
            raise V.BadFile(f"global_pose/frame_times too short ({len(seconds)} times for {count} frames)")
        seconds = seconds[:count]
    sources = comma_signals(folder) if with_signals else {}
    add_timed(found, {"video": folder / "video.hevc"}, times_file, seconds, sources, group=folder.parent.name)


def read_comma2k19(root, tree, args, found):
    """comma2k19: a segment of a minute is a line, a drive (dongle|start) a group. Bare HEVC: times are frame_times."""
    folders = sorted((folder for folder, names in tree.items() if "video.hevc" in names), key=natural)
    for folder in (Path(os.path.abspath(root / folder)) for folder in folders):
        found.attempt(f"{folder.parent.name}/{folder.name}", add_segment, folder, args.signals)
    found.what = f"comma2k19, {len(folders)} segments"


def read_nuscenes(root, tree, args, found):
    """nuScenes: pictures of samples/ and sweeps/ of one camera in the order of the microseconds in their names, a line
    for each part of a log without a gap."""
    camera, cameras, places, logs = args.camera or "CAM_FRONT", set(), set(), {}
    for folder, names in tree.items():
        match = re.fullmatch(r"(?:.*/)?(samples|sweeps)/(CAM_\w+)/", folder)
        cameras.update([match[2]] if match else [])
        for name in names if match and match[2] == camera else ():
            places.add(match[1])
            if stamp := re.fullmatch(rf"(.+)__{camera}__(\d{{16}})\.\w+", name):
                logs.setdefault(stamp[1], {})[int(stamp[2])] = root / folder / name
    if not logs:
        raise V.UsageError(f"--camera {camera}: nuScenes has no pictures of it here; {', '.join(sorted(cameras))}")
    if len(places) == 1:
        found.notes.append(f"note: only {places.pop()}/{camera} is here; samples/ are 2, with sweeps/ 12 per second")
    for log, pictures in sorted(logs.items()):
        stamps = sorted(pictures)
        seconds = (np.array(stamps) - stamps[0]) / 1e6
        found.attempt(log, add_pictures, [pictures[stamp] for stamp in stamps], seconds, log)
    found.what = f"nuScenes {camera}, {len(logs)} logs"


def kitti_signals(folder):
    """oxts of a KITTI drive -> {signal: (times, values)}, {} where it is absent or not whole: the summary counts."""
    try:
        seconds, names = load_numbers(folder / "oxts" / "timestamps.txt"), (folder / "oxts" / "data").glob("*.txt")
        rows = np.array([V.read_text(name, 10**5).split()[:25] for name in sorted(names)], np.float64)
    except (V.BadFile, OSError, ValueError):
        return {}
    whole = rows.shape == (len(seconds), 25)
    return {name: (seconds, rows[:, at] * by) for name, (at, by) in OXTS_COLUMNS.items()} if whole else {}


def read_kitti(root, tree, args, found):
    """KITTI raw: a drive is a line, its times are image_02/timestamps.txt."""
    camera, drives, cameras = args.camera or "image_02", 0, set()
    for folder in sorted(tree, key=natural):
        match = re.fullmatch(r"(.*/)?(image_\d\d)/data/", folder)
        cameras.update([match[2]] if match else [])
        if match and match[2] == camera:
            drive, drives = Path(os.path.abspath(root / (match[1] or ""))), drives + 1
            sources, group = kitti_signals(drive) if args.signals else {}, re.sub("_(sync|extract)$", "", drive.name)
            place, names = drive / camera, pictures_of(tree[folder])
            times = place / "timestamps.txt"
            found.attempt(drive.name, add_timed_folder, place / "data", names, times, sources, group)
    if not drives:
        raise V.UsageError(f"--camera {camera}: no such folder in this KITTI data set; {', '.join(sorted(cameras))}")
    found.what = f"KITTI raw {camera}, {drives} drives"


def add_numbered(found, root, sequences, fps):
    """Lines of {group: {frame number: path below root}} at a known rate; a missing number is a missing frame, half a
    second of them a gap."""
    for group, pictures in sorted(sequences.items()):
        numbers = sorted(pictures)
        seconds = (np.array(numbers) - numbers[0]) / fps
        found.attempt(group, add_pictures, [root / pictures[number] for number in numbers], seconds, group)


def read_bdd100k(root, tree, args, found):
    """BDD100K: videos/<side>/*.mov, else images/track/<side>/<video>/<video>-0000001.jpg at 5 Hz."""
    side, sequences = r"(train|val|test)" if args.side == "all" else f"({args.side})", {}
    for folder in sorted(tree):
        if re.fullmatch(rf"(.*/)?videos/{side}/", folder):
            for name in sorted(name for name in tree[folder] if name.lower().endswith(".mov")):
                found.add(None, video=root / folder / name, group=name[:-4])
        match = re.fullmatch(rf"(.*/)?images/track/{side}/([^/]+)/", folder)
        for name in pictures_of(tree[folder]) if match else ():
            sequences.setdefault(match[3], {})[number_in(name)] = folder + name
    if not found.lines and not sequences:
        what = "holds single frames of unrelated videos (images/100k, images/10k), of which no clip can be made"
        raise V.UsageError(f"{root}: BDD100K {what}; fetch videos/ or images/track (--side {args.side})")
    if found.lines:
        found.what = f"BDD100K videos, {len(found.lines)} of side {args.side}"
        found.notes.append("note: a run on the folder itself, instead of this list, keeps its train/ and val/")
    else:
        found.what = f"BDD100K images/track at {BDD_TRACK_FPS:g} Hz, {len(sequences)} of side {args.side}"
        add_numbered(found, root, sequences, BDD_TRACK_FPS)


def read_cityscapes(root, tree, args, found):
    """Cityscapes leftImg8bit_sequence: city_sequence_frame at 17 Hz; a snippet of 30 frames is a line, its sequence the
    group."""
    sequences = {}
    for folder, names in tree.items():
        parts = f"{root.name}/{folder}".split("/")
        if "leftImg8bit_sequence" in parts and args.side in ("all", *parts):
            for name in names:
                if match := re.fullmatch(r"(.+_\d{6})_(\d{6})_leftImg8bit\.\w+", name):
                    sequences.setdefault(match[1], {})[int(match[2])] = folder + name
    if not sequences:
        what = "leftImg8bit holds single frames, each of another snippet, of which no clip can be made"
        raise V.UsageError(f"{root}: Cityscapes {what}; fetch leftImg8bit_sequence (--side {args.side})")
    found.what = f"Cityscapes leftImg8bit_sequence at {CITYSCAPES_FPS:g} Hz, {len(sequences)} sequences"
    add_numbered(found, root, sequences, CITYSCAPES_FPS)


def add_folder(found, folder, names, frame_fps):
    """A folder of pictures -> how their times are known. Times in the names, then a file of times, then --frame_fps,
    with which a missing number is a missing frame. BadFile."""
    paths, group, times = [folder / name for name in names], folder.name, [epoch_in(name) for name in names]
    if None not in times:
        add_pictures(found, [path for _, path in sorted(zip(times, paths))], np.array(sorted(times)), group)
        return "times in their names"
    for place in (one / name for one in (folder, folder.parent) for name in TIME_FILES):
        if place.is_file():
            add_timed_folder(found, folder, names, place, {}, group)
            return f"times of {place.name}"
    if not frame_fps:
        sought = "none in their names, no timestamps.txt or times.txt beside them"
        raise V.BadFile(f"pictures without times ({sought}); give their rate, --frame_fps N")
    numbers = [number_in(name) for name in names]
    steps = [] if None in numbers else np.diff(numbers).tolist()
    if min(steps, default=1) <= 0:
        at = next(at for at, step in enumerate(steps) if step <= 0)
        raise V.BadFile(f"names that are no one sequence ({names[at]}, {names[at + 1]}): a folder for each drive")
    if len(set(steps)) > 1:
        add_pictures(found, paths, (np.array(numbers) - numbers[0]) / np.median(steps) / frame_fps, group)
    else:
        runs_of(np.arange(len(names)))
        check_sizes(paths)
        found.add(len(names) / frame_fps, frames=folder, fps=frame_fps, group=group)
    return f"--frame_fps {frame_fps:g}"


def read_pictures(root, tree, args, found):
    """Any folders of pictures: each is a drive, in natural order of the names."""
    drives, ways = 0, Counter()
    for folder in sorted(tree, key=natural):
        if names := [name for name in pictures_of(tree[folder]) if name[0] != "."]:
            drives += 1
            place = Path(os.path.abspath(root / folder))
            ways[found.attempt(folder.rstrip("/") or root.name, add_folder, place, names, args.frame_fps)] += 1
    how = ", ".join(f"{way} ({count})" for way, count in ways.items() if way)
    found.what = f"folders of pictures, {drives} of them" + f"; {how}" * bool(how)


def read_kinetics(path, found):
    """A Kinetics list, `path index` in each line -> the videos of it that are there, the index as maneuver."""
    listing = V.read_list(str(path))
    for video in listing:
        if os.path.isfile(video.path):
            source = re.fullmatch(r"(.{11})_\d{6}_\d{6}", Path(video.path).stem)  # clips of one video of the web
            group = source[1] if source else Path(video.path).stem
            found.add(None, video=Path(video.path), group=group, maneuver=video.label)
        else:
            found.leave_out(video.name, "not there; paths count from the folder of the list")
    found.what = f"Kinetics list, {len(listing)} videos, {len({video.label for video in listing})} classes"


PICTURE = rf"[^/]+({'|'.join(re.escape(suffix) for suffix in V.PICTURE_SUFFIXES)})"
LAYOUTS = {  # how a layout is seen from a path below the folder, the words for that, and who reads it; first one wins
    "lerobot": (
        r"(meta/(info\.json|episodes.*)|data/chunk-.*\.parquet|[^/]+\.lance/.*)",
        "meta/info.json",
        read_lerobot,
    ),
    "comma2k19": (r"(.*/)?(processed_log|global_pose)/.*", "<segment>/global_pose/frame_times", read_comma2k19),
    "nuscenes": (rf"(.*/)?(samples|sweeps)/CAM_\w+/{PICTURE}", "samples/CAM_FRONT/*.jpg", read_nuscenes),
    "kitti": (rf"(.*/)?image_\d\d/data/{PICTURE}", "<drive>/image_02/data/*.png", read_kitti),
    "bdd100k": (
        rf"(.*/)?(videos/(train|val|test)/[^/]+\.mov|images/(track|100k|10k)/.*{PICTURE})",
        "videos/train/*.mov or images/track",
        read_bdd100k,
    ),
    "cityscapes": (r"(.*/)?.+_\d{6}_\d{6}_leftImg8bit\.\w+", "leftImg8bit_sequence/<side>/<city>/*", read_cityscapes),
    "pictures": (rf"(.*/)?{PICTURE}", "pictures (" + " ".join(V.PICTURE_SUFFIXES) + ")", read_pictures),
}


# -- the command ------------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> namespace. UsageError names what is wrong."""
    parser = V.ArgumentParser(description="Write the list of a data set as it was published.", allow_abbrev=False)
    parser.add_argument("data", metavar="DIR", type=os.path.expanduser, help="folder of a data set, or a Kinetics list")
    parser.add_argument("--out", required=True, type=os.path.expanduser, help="list to write, LIST.jsonl")
    parser.add_argument("--layout", default="", choices=["", *LAYOUTS], help="what DIR is [seen from its files]")
    parser.add_argument("--camera", default="", help="camera: a key of LeRobot, CAM_FRONT, image_02")
    parser.add_argument("--side", default="all", choices=["all", *V.SIDES], help="of BDD100K and Cityscapes [all]")
    parser.add_argument("--frame_fps", type=float, default=0.0, help="rate of pictures that have no times")
    parser.add_argument("--speed_unit", default="", choices=["", *SPEED_UNITS], help="of a LeRobot speed without one")
    parser.add_argument("--angle_unit", default="", choices=["", *ANGLE_UNITS], help="of a LeRobot angle without one")
    parser.add_argument("--no-signals", dest="signals", action="store_false", help="leave speed and steering out")
    parser.add_argument("--force", action="store_true", help="overwrite what this tool did not write")
    args = parser.parse_args(argv)
    if not os.path.exists(args.data):
        parser.error(f"DIR {args.data}: no such file or folder")
    if not os.access(args.data, os.R_OK):
        parser.error(f"DIR {args.data}: cannot be read; check its permissions")
    if not args.out.lower().endswith(".jsonl"):
        parser.error(f"--out {args.out}: must end in .jsonl")
    if not 0 <= args.frame_fps <= 1000 or "--frame_fps" in argv and args.frame_fps == 0:
        parser.error(f"--frame_fps {args.frame_fps:g}: must be above 0 and at most 1000")
    args.data, args.out = Path(os.path.abspath(args.data)), Path(os.path.abspath(args.out))
    return args


def companions(out):
    """The folders beside a list -> {what is in them: path}."""
    return {name: out.with_name(f"{out.stem}_{name}") for name in ("signals", "frames")}


def check_out(args):
    """UsageError where the list or its folders stand there and were not written by this tool."""
    try:
        if os.path.lexists(args.out):
            with open(args.out, "rb") as file:
                ours = V.MARK.encode() in file.read(200)
            if not ours and not args.force:
                raise V.UsageError(f"--out {args.out}: stands there and was not written by this tool; or give --force")
        for folder in companions(args.out).values():
            if os.path.lexists(folder) and not (folder / "made_by.txt").is_file() and not args.force:
                raise V.UsageError(f"--out {args.out}: {folder} was not written by this tool; or give --force")
    except OSError as error:
        raise V.UsageError(f"--out {args.out}: cannot be read ({V.reason_of(error)})") from error


def read_tree(root):
    """All files below a folder, hidden folders left out -> {folder, "" or ending in /: its file names}, and notes."""
    tree, closed = {}, []
    for parent, entry in V.walk_folder(str(root), closed):
        tree.setdefault(parent, []).append(entry.name)
    return tree, V.left_out_note("WARNING", closed, f"folder(s) below {root} cannot be read and")


def recognise(root, tree):
    """The name of a data set's layout. UsageError says what was looked for."""
    if not tree:
        raise V.UsageError(f"DIR {root}: no file in it")
    for layout, (pattern, _, _) in LAYOUTS.items():
        samples = (folder + name for folder, names in tree.items() for name in names[:1000])  # of millions: seconds
        if any(re.fullmatch(pattern, path, re.IGNORECASE) for path in samples):
            return layout
    sought = "; ".join(f"{layout}: {words}" for layout, (_, words, _) in LAYOUTS.items())
    videos = [name for names in tree.values() for name in names if name.lower().endswith(V.VIDEO_SUFFIXES)]
    if videos:
        cure = f"a folder of videos needs no list: python VJepa_AUTO_V2.py --data_root {shlex.quote(str(root))}"
        raise V.UsageError(f"DIR {root}: no layout that is known ({sought}); {cure}")
    seen = V.count_suffixes([name for names in tree.values() for name in names])
    raise V.UsageError(f"DIR {root}: no layout that is known; looked for {sought}; found {seen}")


def portable(path, out):
    """A path as the list says it: relative where the list stands beside or above the data, else absolute."""
    return os.path.relpath(path, out.parent) if Path(path).is_relative_to(out.parent) else str(path)


def file_name(group, taken):
    """A file name for what belongs to a group, another one each time."""
    stem = re.sub(r"[^\w.-]+", "_", group).strip(".")[:80] or "drive"
    taken[stem] += 1
    return stem if taken[stem] == 1 else f"{stem}.{taken[stem]}"


def plain(values):
    """An array -> list of numbers with six digits, None for nan."""
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]


def save(folder, name, text):
    """Write a file of a companion folder, which is marked as this tool's, unless it stands there as it is -> path."""
    mark, path = folder / "made_by.txt", folder / name
    if not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        V.write_atomic(mark, lambda handle: handle.write(f"{V.MARK} tools/make_list.py\n".encode()))
    content = text.encode("utf-8", "surrogateescape")
    if path.is_file() and path.read_bytes() != content:
        V.write_atomic(path, lambda handle: handle.write(content))
    V.write_new(path, content)  # without fsync, which takes minutes for 100,000 episodes
    return path


def write_line(line, name, out):
    """A line's files beside the list -> its JSON text."""
    folders, values = companions(out), {}
    for key, value in line.items():
        if key == "seconds" or value in ("", {}):
            continue
        if key == "signals":
            value = {kind: plain(part) if isinstance(part, np.ndarray) else part for kind, part in value.items()}
            value = portable(save(folders[key], f"{name}.json", json.dumps(value) + "\n"), out)
        elif isinstance(value, list):
            table, near = io.StringIO(), value[0][0].is_relative_to(out.parent)
            rows = [(os.path.relpath(path, folders[key]) if near else path, second) for path, second in value]
            csv.writer(table, lineterminator="\n").writerows([("path", "time"), *rows])
            value = portable(save(folders[key], f"{name}.csv", table.getvalue()), out)
        elif isinstance(value, Path):
            value = portable(value, out)
        values[key] = value
    return json.dumps(values)


def write_list(found, layout, args):
    """Write the companion files, then the list."""
    taken, texts = Counter(), [f"# {V.MARK} tools/make_list.py: {layout} {json.dumps(str(args.data))}"]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        texts += [write_line(line, file_name(line["group"], taken), args.out) for line in found.lines]
        V.write_atomic(args.out, lambda handle: handle.write("".join(f"{text}\n" for text in texts).encode()))
    except OSError as error:
        raise V.UserError(f"--out {args.out}: cannot be written ({V.reason_of(error)})") from error


def total_seconds(found):
    """How long all lines are together, and '' or how that was guessed: of videos only a few are opened."""
    known = [line["seconds"] for line in found.lines if line["seconds"] is not None]
    unknown = [line["video"] for line in found.lines if line["seconds"] is None]
    lengths = []
    for path in unknown[:: max(len(unknown) // 20, 1)]:
        try:
            with V.opened_stream(str(path)) as (container, _):
                lengths += [container.duration / 1e6] if container.duration else []
        except V.BadFile:
            continue  # the run names it, with the reason
    more = len(unknown) * float(np.mean(lengths)) if lengths else 0.0
    return sum(known) + more, f" (guessed from {len(lengths)})" if unknown else ""


def tell(found, args):
    """Say what was recognised, how much it is, what was left out, and the next command."""
    for note in found.notes:
        V.say(note)
    (seconds, guessed), groups = total_seconds(found), len({line["group"] for line in found.lines})
    V.say(f"listed: {len(found.lines)} line(s), {groups} group(s), {V.describe_time(seconds)}{guessed}: {args.out}")
    have = Counter(name for line in found.lines for name in line.get("signals") or {} if name != "fps")
    if args.signals:
        counts = ", ".join(f"{name} ({count} lines)" for name, count in have.items())
        V.say(f"signals: {counts or 'none'}")
    for reason, names in found.left_out.items():
        V.say(f"left out: {len(names)}, {V.name_some(names)}: {reason}")
    cfg, known = V.VJepaAutoV2Config(), [line["seconds"] for line in found.lines if line["seconds"]]
    window = cfg.num_frames / cfg.clip_fps
    if known and np.median(known) < window:
        V.say(
            f"note: the median line lasts {np.median(known):.1f} s, a clip {window:.1f} s: shorter ones are sampled "
            "over their whole length (--num_frames, --clip_fps)"
        )
    V.say(f"next: python VJepa_AUTO_V2.py --data_root {shlex.quote(str(args.out))}")


def make(argv):
    """Recognise a data set, list it, write the list."""
    args, found = parse(argv), Found()
    check_out(args)
    if args.data.is_file():
        layout = "kinetics"
        if args.data.suffix.lower() not in (".csv", ".txt"):
            raise V.UsageError(f"DIR {args.data}: neither a folder nor a Kinetics list (.csv or .txt)")
        read_kinetics(args.data, found)
    else:
        tree, found.notes = read_tree(args.data)
        layout = args.layout or recognise(args.data, tree)
        LAYOUTS[layout][2](args.data, tree, args, found)
    V.say(f"recognised: {found.what}")
    if not found.lines:
        reasons = "; ".join(f"{reason}: {V.name_some(names)}" for reason, names in found.left_out.items())
        raise V.UsageError(f"DIR {args.data}: nothing to list ({V.one_line(reasons or 'no drive in it', 1000)})")
    write_list(found, layout, args)
    tell(found, args)


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(make, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
