"""Transcode what training reads, once, to small files that decode several times faster. The originals stay as they are.

    python tools/prepare_videos.py --input DIR|LIST|FILE --output DIR2 [--short_side 288] [--gop 30] [--crf 20]
                                   [--workers N] [--frame_fps N] [--video_glob GLOB] [--timeout_s 300]
    python VJepa_AUTO_V2.py --data_root DIR2        (or DIR2/videos.jsonl: the last line says which)

What is read is what VJepa_AUTO_V2.py would read, by its own reader: the stream that plays, turned and mirrored as it
asks, its pixels squared, raw streams and pictures at the times that are told of them. What is written is H.264 yuv420p
in mp4 without sound, never larger than the source, each frame at the very time at which training shows it.

DIR2/videos/       a folder's files under their own names, whatever these end in: split, annotations and --video_glob
                   stay. train/, val/ and test/ stay. Of lists and pictures, names that end in .mp4
DIR2/annotations/  copies of the annotations that belong to them
DIR2/videos.jsonl  for lists, pictures, and files with gaps: groups, parts, labels and signals as in the input
DIR2/prepared.jsonl, failed.jsonl  what was made of what, and what could not be, with the reason

The same command goes on where it was ended, does anew what has changed since, and tries again what failed. One file is
read by one process with one thread; one that crashes or hangs costs that file. Exit code 1: some files failed.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

# Measured in records/speed/prepare.md: neither CABAC nor deblocking (fastdecode), and seven frames of eight that nobody
# refers to, so that a reader who wants four frames per second skips most of them.
ENCODER = {"preset": "veryfast", "tune": "fastdecode", "x264-params": "bframes=7:b-pyramid=none:b-adapt=0"}
TAIL = ".preparing"  # how names of files end that are not whole yet
MADE_BY = f"{V.MARK} tools/prepare_videos.py"  # stands in all that is written but copies, whose SHA-256 is on record
PLAN = V.ClipPlan(2, 1.0, 2, 2, 0.0, 1.0, 1.0, 0.5, 0.5)  # of no clip: for what asks a file for its times
SPEAK_S = 30.0  # between two lines of progress where stderr is no terminal


@dataclass(frozen=True)
class Job:
    """One source to be transcoded, whatever lines of a list refer to it."""

    video: V.VideoFile  # its path and what tells its times, no more
    rate: float  # frames per second that are told of a raw stream or of pictures, 0: none
    noted: float  # rate that its annotation names, of a raw stream
    output: str  # path below DIR2
    is_whole: bool  # whether gaps in its times are refused: they would need a list


# -- source: all frames that training could show, at their times -------------------------------------------------------


def target_size(width, height, short_side):
    """Size of a picture as shown, pixels squared -> (width, height): even, its short side at most `short_side`."""
    shrink = min(1.0, short_side / min(width, height))
    if shrink == 1.0:
        return max(int(width) // 2 * 2, 2), max(int(height) // 2 * 2, 2)
    return max(2 * round(width * shrink / 2), 2), max(2 * round(height * shrink / 2), 2)


def scaled(frame, aspect, short_side, scaler):
    """A decoded frame -> uint8 [H, W, 3], turned and mirrored as it asks, in the target's size."""
    return V.whole_picture(frame, partial(target_size, short_side=short_side), aspect, scaler)[0]


def video_frames(path, plan, short_side):
    """All of a video -> generator: (seconds, frames per second, unit of its times, [(begin, end) of parts between
    jumps or gaps]), then (second, uint8 [H, W, 3]) in display order. BadFile."""
    from av.video.reformatter import VideoReformatter

    V.check_regular(path)
    begins, scaler = [None], VideoReformatter()
    for number, begin in enumerate(begins):  # a transport stream with jumps has several, each decoded for itself
        with V.opened_stream(path) as (container, stream):
            stream.thread_type, stream.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(V.MAX_PIXELS)}
            line, packets = V.time_line(container, stream, plan, fast=False)
            aspect, times, is_ts = V.pixel_aspect_of(stream), np.zeros(1), container.format.name == "mpegts"
            if is_ts:
                ends = {}
                for at, _, _, end in V.stream_keys(V.file_stamp(container), stream.index):
                    ends.setdefault(end, at)
                begins[1:] = list(ends.values())[1:]
                parts, times = [(at, end) for end, at in ends.items()], np.array([begin or 0.0])
            elif line.told is None:
                parts = [(0.0, line.duration)]
            else:
                starts, lengths, _ = V.stretches(plan.file)
                parts = [(a, min(a + b, line.duration)) for a, b in zip(starts.tolist(), lengths.tolist())]
            if not number:
                yield line.duration, line.fps, line.unit if line.told is None else None, parts
            for now, end, frame in V.shown_frames(container, stream, line, packets, times, False):  # noqa: B007
                yield max(now, begin or 0.0), scaled(frame, aspect, short_side, scaler)
            if not is_ts and line.duration > end + V.end_slack(line):
                promise = f"ends at {end:.2f} s, its header promises {line.duration:.2f} s: a cut file, which a copy"
                raise V.BadFile(f"{promise} without the promise cures (ffmpeg -i IN -c copy OUT.mkv)")


def picture_frames(path, plan, short_side):
    """The same of a drive of pictures."""
    import av
    from av.video.reformatter import VideoReformatter

    paths, seconds, duration, fps = V.picture_line(path, plan)
    parts, unit, scaler = [(0.0, duration)], None, VideoReformatter()
    if plan.file.times:
        begins, lengths, _ = V.stretches(plan.file)
        parts = [(a, a + b) for a, b in zip(begins.tolist(), lengths.tolist())]
    else:
        unit = 1 / Fraction(fps).limit_denominator(10**6)
    yield duration, fps, unit, parts
    for second, picture in zip(seconds.tolist(), map(V.open_picture, paths)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        yield second, scaled(frame, 1.0, short_side, scaler)


def ticks_per_second(unit, fps):
    """Unit of a source's times, None where they are told in seconds -> ticks per second of the mp4, which tell them and
    the rate exactly, or to the microsecond. Even: the writer needs a tick between two frames."""
    per_second = unit.denominator if unit and unit.denominator <= 10**6 else 10**6
    both = math.lcm(per_second, Fraction(fps).limit_denominator(1001).numerator)
    per_second = both if both <= 10**6 else per_second
    return 2 * per_second * math.ceil(5000 / per_second)


def on_screen(frames, scale, total):
    """(second, picture) in display order -> (tick, picture): rising from 0 and below `total`, every one even. What is
    on screen for no time is left out; the first picture stands for all before it, as V.pyav_walk has it."""
    held = None
    for second, picture in frames:
        tick = 0 if held is None else max(2 * round(second * scale / 2), 0)
        if held is not None and tick >= total:
            break
        if held is not None and tick > held[0]:
            yield held
        held = tick, picture
    yield held


# -- target: mp4 whose times are the source's --------------------------------------------------------------------------


def open_mp4(path, scale):
    """A new mp4 that counts so many ticks per second -> container."""
    import av

    options = {"movie_timescale": str(scale), "video_track_timescale": str(scale)}
    container = av.open(str(path), "w", format="mp4", options=options)
    container.metadata["comment"] = MADE_BY
    return container


class Film:
    """An mp4 that is being written: pictures at ticks in, a file of exactly so many ticks out.

    The muxer takes a file's length from decoding times, which x264 sets anew where there are B-frames. So they are set
    here: packet i is decoded when frame i - 1 is shown, the first at 0 and the second one tick later."""

    def __init__(self, path, scale, fps, height, width, settings):
        self.container, self.ticks, self.held = open_mp4(path, scale), deque(), None
        rate = Fraction(min(max(fps, 1.0), 1000.0)).limit_denominator(1001)
        self.stream = stream = self.container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = self.unit = Fraction(1, scale)
        stream.codec_context.thread_count = 1
        stream.options = {**ENCODER, "crf": str(settings["crf"]), "g": str(settings["gop"])}

    def add(self, tick, picture):
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = tick, self.unit
        self.ticks.append(tick)
        self.take(self.stream.encode(frame))

    def take(self, packets):
        """Set the decoding times of packets and write them, all but the last, whose length is not known yet."""
        for packet in packets:
            packet.dts, packet.time_base = 0, self.unit
            if self.held is not None:
                packet.dts = max(self.ticks.popleft(), 1)
                self.held.duration = packet.dts - self.held.dts
                self.container.mux(self.held)
            self.held = packet

    def close(self, total):
        """Write what is left; the file ends at tick `total`."""
        self.take(self.stream.encode())
        self.held.duration = total - self.held.dts
        self.container.mux(self.held)
        self.container.close()


def set_rate(path, count, scale, total, fps):
    """Let a file's header tell the source's mean rate, which decides on half a frame in V.frame_times. It is what is
    stored through how long that lasts by decoding times: where that must be longer than what is shown, the first frame
    is decoded earlier, and an edit list says what is shown. Shorter it cannot be: then the mean of the frames stays."""
    import av

    stored = round(count * scale / Fraction(fps).limit_denominator(10**6))
    if stored <= total or count < 2:
        return
    temporary = path.with_name(f"{path.name}.rate{TAIL}")
    try:
        with av.open(str(path)) as source:
            pts, dts = zip(*((packet.pts, packet.dts) for packet in source.demux(video=0) if packet.size))
        last = max(pts)
        lead = stored - dts[-1] - (total - last if pts[-1] == last else 1)
        with av.open(str(path)) as source, open_mp4(temporary, scale) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in (packet for packet in source.demux(video=0) if packet.size):
                packet.duration = total - last if packet.pts == last else 1
                packet.dts = packet.dts or -lead
                packet.stream = stream
                target.mux(packet)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_written(path, ticks, total, scale):
    """OSError unless a file gives the times that were written, as training will read them."""
    try:
        with V.opened_stream(str(path)) as (container, stream):
            line, packets = V.time_line(container, stream, PLAN)
            found = sorted(packet.pts for packet in packets if packet.size)
    except V.BadFile as error:
        raise OSError(f"what was written cannot be read: {error}") from error
    kept = line.unit == Fraction(1, scale) and line.start == 0 and found == ticks
    if not kept or line.duration != float(total * line.unit):
        raise OSError(f"{len(found)} frames and {line.duration:g} s were written of {len(ticks)} frames")


# -- one file, in a process of its own ---------------------------------------------------------------------------------


def stamp(video):
    """What changes when a source does: bytes, time of the last change, and how many files it is. BadFile."""
    paths = [video.path, *([video.times] if video.times and video.times != video.path else [])]
    try:
        if video.pictures:
            in_csv = video.path == video.times
            paths += V.read_times(video.path)[2] if in_csv else V.list_pictures(video.path, video.pictures)
        infos = [os.stat(path) for path in paths]
    except OSError as error:
        raise V.BadFile(f"cannot be read ({error.strerror})") from error
    last = max(info.st_mtime_ns for info in infos)
    return {"size": sum(info.st_size for info in infos), "mtime_ns": last, "files": len(infos)}


def write_film(job, frames, temporary, settings):
    """Encode frames -> generator of the share that is done, then the record of the file. BadFile; OSError of the
    disk."""
    duration, fps, unit, parts = next(frames)
    scale = ticks_per_second(unit, fps)
    total = max(2 * round(duration * scale / 2), 2)
    if len(parts) > 1 and job.is_whole:
        jump = f"its times jump at {parts[0][1]:.2f} s, which needs a list, and folders split the files"
        raise V.BadFile(f"{jump}: cut it there")
    kept = [part for part in parts if part[1] - part[0] >= 2 / fps]  # of two frames at least
    if not kept and len(parts) > 1:
        raise V.BadFile("no part of two frames between the jumps of its times")
    film, ticks, spoken = None, [], 0.0
    for tick, picture in on_screen(frames, scale, total):
        height, width = picture.shape[:2]
        if film is None:
            film = Film(temporary, scale, fps, height, width, settings)
        elif (width, height) != (film.stream.width, film.stream.height):
            shapes = f"{film.stream.width} x {film.stream.height} to {width} x {height}"
            raise V.BadFile(f"the shape of its pictures changes at {tick / scale:.2f} s, scaled from {shapes}")
        film.add(tick, picture)
        ticks.append(tick)
        if time.monotonic() - spoken > 0.5:
            spoken = time.monotonic()
            yield tick / total
    film.close(total)
    set_rate(temporary, len(ticks), scale, total, fps)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    check_written(temporary, ticks, total, scale)
    yield {"frames": len(ticks), "seconds": duration, "parts": kept if len(parts) > 1 else []}


def transcode(job, folder, settings):
    """Work of a process: a source -> DIR2's file, whole from the moment it has its name. Generator of shares done, then
    of its record, or of ("bad" or "disk", reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to obey
    target = folder / job.output
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}{TAIL}")
    plan = replace(PLAN, frame_fps=job.rate, noted_fps=job.noted, file=job.video)
    read = picture_frames if job.video.pictures else video_frames
    try:
        before = stamp(job.video)
        for said in write_film(job, read(job.video.path, plan, settings["short_side"]), temporary, settings):
            if isinstance(said, float):
                yield said
        V.read_times.cache_clear()
        V.list_pictures.cache_clear()
        if stamp(job.video) != before:
            raise V.BadFile("it changed while it was transcoded; run the same command again")
        result = {**said, "bytes": temporary.stat().st_size, "source": before}
        os.replace(temporary, target)
        V.sync_folder(target.parent)
    except V.BadFile as error:
        result = "bad", str(error)
    except OSError as error:
        result = "disk", V.reason_of(error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    yield result


class Process:
    """A process that transcodes one file, as the parent sees it."""

    def __init__(self, job, folder, settings):
        self.job, self.share, self.heard, self.result = job, 0.0, time.monotonic(), None
        self.pipe, end = multiprocessing.Pipe(duplex=False)
        work = (os.getpid(), end, transcode, job, folder, settings)
        self.process = multiprocessing.get_context("fork").Process(target=V.do_apart, args=work)
        with V.HeldSignals():
            self.process.start()
        end.close()

    def hear(self):
        """Take in what it says."""
        try:
            said, self.heard = self.pipe.recv(), time.monotonic()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            said = "bad", f"its process was {how} (out of memory, or a crash of the decoder)"
        if isinstance(said, float):
            self.share = said
        elif said is not None:
            self.result = said

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


# -- all files ---------------------------------------------------------------------------------------------------------


class Records:
    """DIR2/prepared.jsonl: a line for each finished file, and one for each copy. Its lock keeps a second run out of the
    folder. What is deleted or replaced is the tool's own: it bears its mark, or it is a copy whose SHA-256 is here."""

    HEAD = f'{{"made_by": "{MADE_BY}", '.encode()  # how each line begins

    def __init__(self, folder, settings, outputs):
        self.folder, self.settings, self.path = folder, settings, folder / "prepared.jsonl"
        if not self.path.exists() and folder.exists() and any(folder.iterdir()):
            raise V.UserError(f"--output {folder} is not empty and holds no prepared.jsonl; use another one")
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.done, self.copies = open(self.path, "a+b"), {}, {}
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise V.UserError(f"--output {folder}: another run prepares videos there") from error
        self.file.seek(0)
        text = self.file.read()
        if not self.HEAD.startswith(text[: len(self.HEAD)]):  # shorter where a kill has torn the first line
            raise V.UserError(f"--output {folder}: this tool did not write its prepared.jsonl; use another one")
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last one may be torn: its file is made again
                row = json.loads(line)
                (self.copies if "sha256" in row else self.done)[row["output"]] = row
        if text and not text.endswith(b"\n"):
            self.file.write(b"\n")
        (folder / "videos").mkdir(exist_ok=True)
        self.names = {folder / name for name in ("videos.jsonl", "failed.jsonl", *outputs, *self.done, *self.copies)}
        self.sweep()

    def sweep(self):
        """Remove what killed processes left: temporary files by the names that they have for this folder's own."""
        for stale in self.folder.rglob(".*"):
            name = re.fullmatch(rf"\.(.+)\.\d+(\.tmp|({re.escape(TAIL)})(\.rate{re.escape(TAIL)})?)", stale.name)
            if name and stale.with_name(name[1]) in self.names and stale.is_file():
                stale.unlink(missing_ok=True)

    def key(self, job):
        """What must be the same for a finished file to count."""
        times = {"times": job.video.times, "pictures": job.video.pictures, "rate": job.rate, "noted": job.noted}
        return {"path": job.video.path, **times, "settings": self.settings}

    def finished(self, job, source):
        """The record of a file that was made of this source as it is now, by these settings, else None."""
        row, path = self.done.get(job.output), self.folder / job.output
        if row is None or row["key"] != self.key(job) or row["source"] != source:
            return None
        return row if path.is_file() and path.stat().st_size == row["bytes"] else None

    def is_own(self, name):
        """Whether this tool wrote the file of this name: its mark stands at an end, or its sum is on record."""
        with open(self.folder / name, "rb") as file:
            if name in self.copies:
                return hashlib.sha256(file.read()).hexdigest() == self.copies[name]["sha256"]
            head = file.read(200)
            file.seek(max(os.fstat(file.fileno()).st_size - 2**16, 0))
            return MADE_BY.encode() in head + file.read()

    def check_own(self, job):
        """UserError where a file stands that this tool did not write."""
        path = self.folder / job.output
        if os.path.lexists(path) and not (path.is_file() and self.is_own(job.output)):
            raise V.UserError(f"{path} was not written by this tool; move it away, or use another --output")

    def note(self, rows, name, values):
        """A row about a file, on the disk and in `rows`."""
        rows[name] = {"output": name, **values}
        self.file.write(self.HEAD + json.dumps(rows[name])[1:].encode() + b"\n")
        self.file.flush()

    def add(self, job, record):
        self.note(self.done, job.output, {"key": self.key(job), **record})

    def drop(self, name):
        """Delete and forget what this tool wrote under a name: its source is gone or fails. Others' files stay."""
        own = self.folder / name
        if own.is_file() and self.is_own(name):
            own.unlink()
        self.done.pop(name, None)
        self.copies.pop(name, None)

    def copy(self, content, name):
        """Write the bytes of a copy, whole or not at all, where they are not there. Another's file is moved aside."""
        target = self.folder / name
        if target.is_file() and target.read_bytes() == content:
            return
        if os.path.lexists(target) and not (target.is_file() and name in self.copies and self.is_own(name)):
            V.move_aside(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.names.add(target)
        self.note(self.copies, name, {"sha256": hashlib.sha256(content).hexdigest()})
        temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}{TAIL}")
        temporary.write_bytes(content)
        os.replace(temporary, target)


class Progress:
    """Bytes of the sources that are done, and when the rest will be, on stderr."""

    def __init__(self, sizes):
        self.total, self.done, self.files, self.count = sum(sizes), 0, len(sizes), 0
        self.began = self.spoken = time.monotonic()

    def show(self, running=()):
        now, on_terminal = time.monotonic(), V.is_terminal(sys.stderr)
        last = self.count == self.files
        if now - self.spoken < (0.2 if on_terminal else SPEAK_S) and not last:
            return
        self.spoken = now
        share = (self.done + sum(size * share for size, share in running)) / max(self.total, 1)
        rest = V.describe_time((now - self.began) * (1 - share) / share) if share > 0.001 else "?"
        text = f"{self.count}/{self.files} files, {rest} to go"
        if on_terminal:
            V.emit("\r" + V.progress_bar(share, text) + "\033[K" + "\n" * last, sys.stderr)
        else:
            V.say(f"{share:.0%}: {text}", sys.stderr)


def run_all(sources, records, args):
    """Transcode {job: stamp of its source}, the largest first -> {output: reason} of those that failed. UserError where
    the disk is full."""
    import av  # noqa: F401  # once, and not in each process that is forked

    waiting = deque(sorted(sources, key=lambda job: -sources[job]["size"]))
    progress = Progress([sources[job]["size"] for job in sources])
    running, failed = {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                (records.folder / waiting[0].output).parent.mkdir(parents=True, exist_ok=True)
                process = Process(waiting.popleft(), records.folder, records.settings)
                running[process.pipe] = process
            for pipe in multiprocessing.connection.wait(list(running), timeout=1.0):
                running[pipe].hear()
            for pipe, process in list(running.items()):
                if process.result is None and time.monotonic() - process.heard > args.timeout_s:
                    process.result = "bad", f"nothing came of it for {args.timeout_s:g} s (--timeout_s)"
                if process.result is not None:
                    process.end()
                    del running[pipe]
                    take_in(process.job, process.result, records, failed)
                    progress.count, progress.done = progress.count + 1, progress.done + sources[process.job]["size"]
            progress.show([(sources[process.job]["size"], process.share) for process in running.values()])
    finally:
        for process in running.values():
            process.end()
        records.sweep()
    return failed


def take_in(job, result, records, failed):
    """Note how a file went. UserError where the disk refuses: then no other file will go better."""
    if isinstance(result, dict):
        records.add(job, result)
    elif result[0] == "disk":
        saved = f"{len(records.done)} finished file(s) stay, nothing is lost; the same command goes on"
        raise V.UserError(f"--output {records.folder}: cannot be written ({result[1]}); {saved}")
    else:
        failed[job.output] = result[1]
        records.drop(job.output)
        V.say(f"failed: {job.video.path}: {result[1]}", sys.stderr)


# -- what there is to do, and what training is told --------------------------------------------------------------------


def listed_output(video):
    """Path below DIR2 for a file of a list, or a drive of pictures, before others of the same are told apart."""
    name = re.sub(r"#t=[\d.,e+-]+$", "", video.name)
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".", "~")]
    path = "/".join(re.sub(r"[*?\[\]]", "_", part)[:120] for part in parts) or "video"
    is_file = path.lower().endswith((*V.VIDEO_SUFFIXES, ".csv"))
    return f"videos/{os.path.splitext(path)[0] if is_file else path}.mp4"


def told_rates(video, root, frame_fps):
    """-> (rate that is told of a raw stream or of pictures, rate that a raw stream's annotation names), 0: none."""
    is_raw, noted = video.path.lower().endswith(V.RAW_SUFFIXES), 0.0
    if is_raw:
        with suppress(V.BadFile):  # training names it with its reason
            noted = V.read_annotation(root, video).get("fps") or 0.0
    return (video.fps or frame_fps if is_raw or video.pictures else 0.0), noted


def plan_jobs(videos, root, by_name, is_whole, frame_fps):
    """Listed videos -> {video: its Job}. `by_name`: outputs bear the names of a folder's files."""
    sources, wanted = {}, {}
    for video in videos:
        bare = replace(video, name="", label="", begin=0.0, length=0.0, group="", signals="")
        sources[video] = (bare, *told_rates(video, root, frame_fps))
        wanted[sources[video]] = f"videos/{video.name}" if by_name else listed_output(video)
    counts = Counter(path.casefold() for path in wanted.values())
    for source, path in wanted.items():
        if not by_name and counts[path.casefold()] > 1:  # the same whatever stands in what order in the list
            mark = hashlib.sha256(repr((source[0].path, *source[1:], source[0].times)).encode()).hexdigest()[:8]
            wanted[source] = f"{path[:-4]}_{mark}.mp4"
    jobs = {source: Job(*source, path, is_whole) for source, path in wanted.items()}
    return {video: jobs[source] for video, source in sources.items()}


def check_places(args, videos):
    """UsageError where originals and output could meet."""
    out = os.path.realpath(args.output)
    root = os.path.realpath(args.input)
    places = {root, *(os.path.realpath(os.path.dirname(video.path)) for video in videos)}
    if os.path.isdir(root) and (out + os.sep).startswith(root.rstrip(os.sep) + os.sep):
        raise V.UsageError(
            f"--output {args.output} lies in --input {args.input}; training would read both, use another"
        )
    for place in places:
        if (place + os.sep).startswith(out.rstrip(os.sep) + os.sep):
            raise V.UsageError(f"--output {args.output} holds originals ({place}); use another")


def copy_annotations(jobs, root, records):
    """Copy the annotations of a folder's videos to where they are looked for -> {video: path below DIR2}."""
    found = {}
    for video, job in jobs.items() if os.path.isdir(root) else ():
        content, name = None, os.path.splitext(video.name)[0] + ".json"
        target = "annotations" + os.path.splitext(job.output.removeprefix("videos"))[0] + ".json"
        paths = [os.path.join(root, "annotations", place) for place in (name, os.path.basename(name))]
        if path := next(filter(os.path.isfile, paths), None):
            with suppress(OSError):  # training finds no annotation there, as here
                content = Path(path).read_bytes()
        if content is None:
            records.drop(target)
        else:
            records.copy(content, target)
            found[video] = target
    return found


def copy_signals(video, records):
    """What a list's line says of signals -> the same for the new list: an object, or the path of a copy."""
    if not video.signals or video.signals.startswith("{"):
        return json.loads(video.signals or "null")
    mark = hashlib.sha256(os.fsencode(video.signals)).hexdigest()[:8]
    place = f"annotations/{Path(video.signals).stem[:100]}_{mark}.json"
    try:
        content = Path(video.signals).read_bytes()
    except OSError:
        return video.signals  # training names it with its reason, here as there
    records.copy(content, place)
    return place


def cut_signals(annotation, begin, end):
    """The part of an annotation's lists from second `begin` to `end`."""
    fps = annotation.get("fps")
    first, after = (round((fps or 0) * second) for second in (begin, end))
    return {key: value[first:after] if fps and isinstance(value, list) else value for key, value in annotation.items()}


def lines_of(video, job, record, signals, root):
    """A video of the input -> lines of DIR2/videos.jsonl: one, or one for each part between gaps in its times."""
    line = {"video": job.output, "group": video.drive, "maneuver": video.label or None, "signals": signals}
    begin, end = video.begin, video.begin + video.length if video.length else math.inf
    if not record["parts"]:
        return [{**line, "begin": begin or None, "length": video.length or None}]
    cut = [(max(begin, first), min(end, after)) for first, after in record["parts"] if after > begin and first < end]
    lines = []
    for first, after in cut:
        with suppress(V.BadFile):  # training names it with its reason: signals stay what they are
            annotation = V.read_annotation(root, video)
            line["signals"] = cut_signals(annotation, first - begin, after - begin) or None
        lines.append({**line, "begin": first, "length": after - first})
    return lines


def write_lines(path, texts):
    """Write a file of ours anew. Another's of that name is moved aside."""
    content = "".join(f"{text}\n" for text in texts).encode()
    V.write_own(path, lambda handle: handle.write(content))


def write_list(videos, jobs, records, annotations, root):
    """Write DIR2/videos.jsonl: what the input says of its videos, of those that are there now."""
    texts = [f"# {MADE_BY}"]
    for video in videos:
        record = records.done.get(jobs[video].output)
        if record is not None:
            signals = annotations.get(video) or copy_signals(video, records)
            for line in lines_of(video, jobs[video], record, signals, root):
                texts.append(json.dumps({key: value for key, value in line.items() if value is not None}))
    write_lines(records.folder / "videos.jsonl", texts)


def write_failed(records, failed, jobs):
    """DIR2/failed.jsonl: what could not be transcoded, and why. Gone where there is nothing."""
    if not failed:
        records.drop("failed.jsonl")
        return
    paths = {job.output: job.video.path for job in jobs}
    rows = [{"file": paths[output], "reason": reason, "made_by": MADE_BY} for output, reason in failed.items()]
    write_lines(records.folder / "failed.jsonl", map(json.dumps, rows))


def parse(argv):
    """Command line -> namespace."""
    about = "Transcode videos once, so that training reads them faster."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    cores = V.usable_cores()
    add, expand = parser.add_argument, os.path.expanduser
    add("--input", required=True, type=expand, help="what --data_root is: folder, list or video")
    add("--output", required=True, type=expand, help="folder to write, outside of the input")
    add("--short_side", type=int, default=288, help="pixels of the shorter side, never enlarged [288]")
    add("--gop", type=int, default=30, help="frames from key frame to key frame [30]")
    add("--crf", type=int, default=20, help="x264's quality, 0 to 51, 0 is lossless [20]")
    add("--workers", type=int, default=cores, help=f"files at a time, one thread each [{cores}]")
    add("--frame_fps", type=float, default=0.0, help="as in training: rate of raw streams and pictures")
    add("--video_glob", default="*", help="as in training: which files of a folder")
    add("--timeout_s", type=float, default=300.0, help="a file of which nothing comes for so long fails")
    args = parser.parse_args(argv)
    rules = {
        "short_side": (args.short_side >= 16 and args.short_side % 2 == 0, "an even number from 16 on"),
        "gop": (1 <= args.gop <= 10**6, "from 1 to 1000000"),
        "crf": (0 <= args.crf <= 51, "from 0 to 51"),
        "workers": (args.workers >= 1, "at least 1"),
        "frame_fps": (0 <= args.frame_fps < math.inf, "0 or a rate"),
        "timeout_s": (args.timeout_s > 0, "above 0"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise V.UsageError(f"--{name} {getattr(args, name)} must be {rule}")
    return args


def find(args):
    """The input -> its Listing, with its notes and guesses said. UsageError as in training."""
    glob = {"data_root": args.input, "frame_fps": args.frame_fps, "video_glob": args.video_glob}
    cfg = replace(V.VJepaAutoV2Config(), **glob, missing_data="error")
    try:
        videos = V.list_data(cfg)
    except V.UsageError as error:  # of training's flag, and training may do without it
        said = str(error).replace(", or leave --data_root out for built-in scenes", "")
        raise V.UsageError(re.sub(r"(--)?data_root\b", "--input", said)) from error
    check_places(args, videos)
    for note in videos.notes:
        V.say(note)
    guessed, complete = V.guessed_rates(cfg, args.input, videos)
    if guessed:
        count = f"{len(guessed)}{'' if complete else ' or more'} raw streams name no frame rate"
        kept = f"they are written at {V.RAW_FPS:g} per second, a guess that stays in them (--frame_fps)"
        V.say(f"WARNING: {count}: {kept}: {V.name_some(guessed)}")
    return videos


def look(jobs, records):
    """-> ({job: stamp} of those that are to be transcoded, {output: reason} of those that cannot be read)."""
    todo, failed = {}, {}
    for job in jobs:
        try:
            source = stamp(job.video)
            if records.finished(job, source) is None:
                records.check_own(job)
                todo[job] = source
        except V.BadFile as error:
            failed[job.output] = str(error)
            records.drop(job.output)
            V.say(f"failed: {job.video.path}: {error}", sys.stderr)
    return todo, failed


def tell(args, jobs, failed, records, root, seconds, count):
    """The last lines: how much it became, what failed, what to train on."""
    rows = [records.done[job.output] for job in jobs if job.output in records.done]
    before, after = (sum(sizes) / 1e6 for sizes in ([r["source"]["size"] for r in rows], [r["bytes"] for r in rows]))
    took = f"{count} now, in {V.describe_time(seconds)}"
    V.say(f"prepared: {len(rows)} of {len(jobs)} files ({took}), {before:.0f} MB -> {after:.0f} MB: {args.output}")
    gone = [name for name in records.done if name not in {job.output for job in jobs}]
    if gone:
        V.say(f"note: {args.output} also holds {len(gone)} file(s) that the input has no more: {V.name_some(gone)}")
    if failed:
        V.say(f"failed: {len(failed)} file(s), named with the reason in {args.output}/failed.jsonl", sys.stderr)
    if rows:
        V.say(f"next: python VJepa_AUTO_V2.py --data_root {shlex.quote(str(root))}")


def prepare(argv):
    """List, transcode what is not there yet, copy annotations, write the list -> exit code."""
    args, began = parse(argv), time.monotonic()
    videos, folder = find(args), Path(args.output)
    is_split, is_file = bool(videos.sides), os.path.isfile(args.input)
    is_list = is_file and args.input.lower().endswith((".csv", ".txt", ".jsonl"))
    has_pictures = any(video.pictures for video in videos)
    jobs = plan_jobs(videos, args.input, not (is_list or has_pictures), is_split, args.frame_fps)
    unique = list(dict.fromkeys(jobs.values()))
    try:
        settings = {**{name: getattr(args, name) for name in ("short_side", "gop", "crf")}, **ENCODER}
        records = Records(folder, settings, [job.output for job in unique])
        todo, failed = look(unique, records)
        failed |= run_all(todo, records, args)
        annotations = copy_annotations(jobs, args.input, records)
        has_parts = any(records.done[job.output]["parts"] for job in unique if job.output in records.done)
        root = folder
        if is_list or not is_split and (has_pictures or has_parts):
            root = folder / "videos.jsonl"
            write_list(videos, jobs, records, annotations, args.input)
        else:
            records.drop("videos.jsonl")
        write_failed(records, failed, unique)
    except OSError as error:
        what = f"--output {args.output}: cannot be written ({V.reason_of(error)})"
        raise V.UserError(f"{what}; what is finished stays, the same command goes on") from error
    tell(args, unique, failed, records, root, time.monotonic() - began, len(todo))
    return V.EXIT_ERROR if failed else V.EXIT_OK


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(prepare, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
