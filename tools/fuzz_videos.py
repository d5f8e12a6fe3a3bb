"""What becomes of damaged and hostile video files: a seeded fuzz of the reader.

    python tools/fuzz_videos.py --num 1000 --seed 0 --out fuzz.json

Two H.264 mp4 files are made (one by V.write_video with its index at the end; one with B-frames, an index at the front
and short GOPs). Mutation i takes file and mutator in turn and draws the rest from (seed, i). A forked child, a new one
every 25 readings, reads each under a wall-clock limit and a limit on its address space, first by V.read_frames with the
project's options (`ours`), then the way a short script would do it with the decoder's defaults (`defaults`).

Outcome of one reading:

    right      the same bytes as from the intact file, by the same reader and the same plan
    refused    V.BadFile (`defaults`: an error of the decoder or of plain Python code that meets what it returns)
    silent     frames without any error, of which at least one byte differs from the intact file's: damaged pictures,
               and pictures of other moments where the damage is in the file's time tables
    other      ours only: an exception that is not BadFile, which would end a run
    crash      the child died of a signal
    hang       no answer within --timeout seconds

`seen` counts those silent clips in which some picture is off by more than VISIBLE grey levels on average. `opened`
counts mutants during whose reading another file of the folder was opened (Linux' inotify). `peak_mb` is the largest
resident memory that a reading added. The pipe is not given to `defaults`, whose open would never return. With `--reader
decord` a file that decord cannot open goes on to PyAV, as in a run. Exit code 0 when `ours` shows no crash, no hang, no
other exception and opened no other file.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import ctypes
import faulthandler
import importlib.metadata
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

SIZE, FPS, NUM_FRAMES = 96, 12, 60  # of the files that are mutated: pixels, frames per second, frames
PLAN = V.ClipPlan(num_frames=12, fps=6.0, height=64, width=64, u_start=0.0, scale=1.0, ratio=1.0, u_x=0.5, u_y=0.5)
STARTS = (0.0, 0.3, 0.6, 1.0)  # where in the file the clip that is read begins: u_start of its plan
VISIBLE = 2.0  # grey levels, mean over one picture
OUTCOMES = ("right", "refused", "silent", "other", "crash", "hang")
BAIT = "bait"  # name of the files that playlists point to
CONTAINERS = ("moov", "trak", "mdia", "minf", "stbl", "mvex", "edts", "dinf")  # boxes that hold boxes


# -- files to mutate


def moving_picture(rng):
    """Smooth coloured blobs that drift over a gradient -> uint8 [NUM_FRAMES, SIZE, SIZE, 3]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    phase, speed = rng.uniform(0, 6, (3, 3)), rng.uniform(-0.25, 0.25, (3, 3))
    frames = np.empty((NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    for number in range(NUM_FRAMES):
        for colour in range(3):
            a, b, c = phase[colour] + speed[colour] * number
            frames[number, :, :, colour] = (
                128 + 50 * np.sin(9 * x + a) * np.cos(7 * y + b) + 40 * np.sin(21 * x * y + c)
            )
    return frames


def write_sources(folder):
    """Make the intact files -> {name: path}."""
    import av

    frames = moving_picture(np.random.default_rng(0))
    paths = {"plain": Path(folder) / "plain.mp4", "b_frames": Path(folder) / "b_frames.mp4"}
    V.write_video(paths["plain"], frames, FPS)
    with av.open(str(paths["b_frames"]), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "22", "g": "15", "bf": "2"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return paths


def write_bait(folder):
    """Put the files that playlists point to into a folder: other pictures than the sources', and as a .ts the same
    bytes again."""
    path = Path(folder) / f"{BAIT}.mp4"
    V.write_video(path, moving_picture(np.random.default_rng(99)), FPS)
    path.with_suffix(".ts").write_bytes(path.read_bytes())


def find_boxes(data, begin=0, end=None, parent=""):
    """Boxes of an mp4 file, also those inside others -> [(path such as moov/trak/tkhd, first byte, end)]."""
    found, end = [], len(data) if end is None else end
    while begin + 8 <= end:
        size, kind = struct.unpack(">I4s", data[begin : begin + 8])
        name = kind.decode("latin-1")
        if size < 8 or begin + size > end:
            break
        found.append((f"{parent}{name}", begin, begin + size))
        if name in CONTAINERS:
            found += find_boxes(data, begin + 8, begin + size, f"{parent}{name}/")
        begin += size
    return found


# -- mutators: (data, rng) -> mutated bytes


def cut(data, rng):
    """Keep only the first part."""
    return data[: rng.integers(0, len(data))]


def flip_bits(data, rng):
    """One to eight single bits anywhere."""
    out = np.frombuffer(data, np.uint8).copy()
    out[rng.integers(0, len(out), rng.integers(1, 9))] ^= np.uint8(1) << rng.integers(0, 8, dtype=np.uint8)
    return out.tobytes()


def flip_media_bits(data, rng):
    """One to eight single bits of the coded pictures."""
    _, begin, end = next(box for box in find_boxes(data) if box[0] == "mdat")
    return data[: begin + 8] + flip_bits(data[begin + 8 : end], rng) + data[end:]


def flip_header_bits(data, rng):
    """One to eight single bits of the index that says where and when the pictures are."""
    _, begin, end = next(box for box in find_boxes(data) if box[0] == "moov")
    return data[: begin + 8] + flip_bits(data[begin + 8 : end], rng) + data[end:]


def random_bytes(data, rng):
    """A short run of random bytes."""
    begin, length = rng.integers(0, len(data)), rng.integers(1, 65)
    return data[:begin] + rng.bytes(length) + data[begin + length :]


def zero_run(data, rng):
    """A run of zeros, up to a sixth of the file."""
    begin, length = rng.integers(0, len(data)), rng.integers(1, len(data) // 6)
    return data[:begin] + bytes(min(length, len(data) - begin)) + data[begin + length :]


def swap_boxes(data, rng):
    """Two boxes that stand side by side change places."""
    boxes = find_boxes(data)
    pairs = [
        (a, b) for a in boxes for b in boxes if a[2] == b[1] and a[0].rpartition("/")[0] == b[0].rpartition("/")[0]
    ]
    (_, begin, middle), (_, _, end) = pairs[rng.integers(len(pairs))]
    return data[:begin] + data[middle:end] + data[begin:middle] + data[end:]


def zero_header(data, rng):
    """The inside of one box other than the coded pictures is zeroed; once in four times its size and type as well."""
    boxes = [box for box in find_boxes(data) if box[0] not in ("mdat", "free") and box[2] - box[1] > 8]
    _, begin, end = boxes[rng.integers(len(boxes))]
    begin += 8 * int(rng.random() < 0.75)
    return data[:begin] + bytes(end - begin) + data[end:]


def rename_box(data, rng):
    """One box gets another box's type, or one that nobody knows."""
    boxes = find_boxes(data)
    kinds = [data[begin + 4 : begin + 8] for _, begin, _ in boxes] + [b"\xff\xfe\x00x"]
    _, begin, _ = boxes[rng.integers(len(boxes))]
    return data[: begin + 4] + kinds[rng.integers(len(kinds))] + data[begin + 8 :]


def huge_number(data, rng):
    """One aligned 32-bit number inside a header box becomes very large, negative or zero."""
    boxes = [box for box in find_boxes(data) if box[0] not in ("mdat", "free") and box[2] - box[1] >= 12]
    _, begin, end = boxes[rng.integers(len(boxes))]
    at = begin + 4 * int(rng.integers(0, (end - begin) // 4))
    value = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000000, 0x80000000)[rng.integers(6)]
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


def duplicate_run(data, rng):
    """A run of bytes stands there twice."""
    begin, length = rng.integers(0, len(data)), rng.integers(1, 4097)
    return data[: begin + length] + data[begin : begin + length] + data[begin + length :]


def delete_run(data, rng):
    """A run of bytes is missing."""
    begin, length = rng.integers(0, len(data)), rng.integers(1, 4097)
    return data[:begin] + data[begin + length :]


def playlist(data, rng):
    """A script that names another file, in one of the forms that FFmpeg follows."""
    forms = (
        f"ffconcat version 1.0\nfile {BAIT}.mp4\nduration 5\n",
        f"ffconcat version 1.0\nfile {BAIT}.mp4\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{BAIT}.ts\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXTINF:5,\n{BAIT}.mp4\n",
        f"file '{BAIT}.mp4'\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 4000 RTP/AVP 96\na={BAIT}.mp4\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f"<Representation><BaseURL>{BAIT}.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>\n",
    )
    return forms[rng.integers(len(forms))].encode()


def unchanged(data, rng):
    """The bytes as they are: their name is wrong, or they are a pipe."""
    return data


MUTATORS = {  # name -> (function, suffixes of which one is drawn)
    "cut": (cut, (".mp4",)),
    "flipped bits": (flip_bits, (".mp4",)),
    "flipped media bits": (flip_media_bits, (".mp4",)),
    "flipped header bits": (flip_header_bits, (".mp4",)),
    "random bytes": (random_bytes, (".mp4",)),
    "zero run": (zero_run, (".mp4",)),
    "swapped boxes": (swap_boxes, (".mp4",)),
    "zeroed header": (zero_header, (".mp4",)),
    "renamed box": (rename_box, (".mp4",)),
    "huge number": (huge_number, (".mp4",)),
    "duplicated run": (duplicate_run, (".mp4",)),
    "deleted run": (delete_run, (".mp4",)),
    "wrong extension": (unchanged, (".avi", ".mkv", ".ts", ".h264", ".hevc", ".webm", ".mov")),
    "playlist": (playlist, (".mp4", ".ts", ".mkv")),
    "fifo": (unchanged, (".mp4",)),
}


def write_mutant(folder, sources, seed, number):
    """Mutation `number` of a seed -> (mutator's name, name of the intact file, path of the mutant, plan of the clip to
    read)."""
    rng = np.random.default_rng([seed, number])
    name = list(MUTATORS)[number % len(MUTATORS)]
    source = list(sources)[number // len(MUTATORS) % len(sources)]
    mutate, suffixes = MUTATORS[name]
    path = Path(folder) / f"mutant{suffixes[rng.integers(len(suffixes))]}"
    data = mutate(sources[source].read_bytes(), rng)
    if name == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    return name, source, path, replace(PLAN, u_start=STARTS[rng.integers(len(STARTS))])


# -- readers


def plain_pyav(path, plan):
    """The clip with PyAV's defaults: every frame is decoded, the one on screen at each time is kept and scaled by a
    scaler of its own."""
    import av
    from av.video.reformatter import VideoReformatter

    with av.open(f"file:{path}") as container:
        stream = V.playing_stream(container)
        frames = list(container.decode(stream))
        begin, unit = stream.start_time or 0, float(stream.time_base)
        starts = np.array([(frame.pts - begin) * unit for frame in frames])
        fps = float(stream.average_rate)
    times = V.frame_times(plan, starts[-1] + 1 / fps, fps)
    wanted = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, len(frames) - 1)
    return np.stack([V.pyav_picture(frames[number], plan, 1.0, VideoReformatter()) for number in wanted])


def plain_decord(path, plan):
    """The clip with decord's defaults."""
    import decord

    decord.logging.set_level(decord.logging.FATAL)
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), width=plan.width, height=plan.height)
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    times = V.frame_times(plan, float(starts[-1]) + 1 / reader.get_avg_fps(), float(reader.get_avg_fps()))
    return reader.get_batch(np.clip(np.searchsorted(starts, times, side="right") - 1, 0, len(starts) - 1)).asnumpy()


def ours(reader, path, plan):
    """The project's reader -> frames uint8 [T, H, W, 3]. Raises V.BadFile."""
    return V.read_frames(str(path), plan, reader)


def defaults(reader, path, plan):
    """The same clip with the decoder's defaults."""
    return {"pyav": plain_pyav, "decord": plain_decord}[reader](path, plan)


WAYS = {"ours": ours, "defaults": defaults}


def memory_mb(key):
    """VmRSS, VmHWM or VmSize of this process in MB."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[key].split()[0]) * 1024 / 1e6


def judge(way, reader, path, plan, intact):
    """Read once -> (outcome, detail, largest mean difference of a picture in grey levels)."""
    try:
        frames = WAYS[way](reader, path, plan)
    except V.BadFile as error:
        return "refused", str(error), 0.0
    except Exception as error:  # what escapes is the very thing that is counted here
        return ("other" if way == "ours" else "refused"), f"{type(error).__name__}: {error}", 0.0
    if np.array_equal(frames, intact):
        return "right", "", 0.0
    same_shape = frames.shape == intact.shape
    return "silent", "", float(np.abs(frames.astype(float) - intact).mean((1, 2, 3)).max()) if same_shape else 255.0


def serve(pipe, limit_mb):
    """In the forked child: limit the address space, then read what the pipe names and send back (outcome, detail, off,
    peak in MB)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = int((memory_mb("VmSize") + limit_mb) * 1e6)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders write about every file
    os.dup2(silence, 2)
    faulthandler.disable()
    while True:
        job = pipe.recv()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_mb("VmRSS")
        answer = judge(*job)
        pipe.send((*answer, memory_mb("VmHWM") - before))


class Child:
    """A forked process that reads files, one at a time. After `lifetime` of them, or when it died or hung, the next one
    takes over."""

    def __init__(self, timeout_s, limit_mb, lifetime=25):
        self.timeout_s, self.limit_mb, self.lifetime, self.left, self.process = timeout_s, limit_mb, lifetime, 0, None

    def read(self, *job):
        """job: way, reader, path, plan, intact frames -> dict(outcome, detail, off, peak_mb, seconds)."""
        if not self.left:
            self.start()
        begin = time.monotonic()
        self.pipe.send(job)
        outcome, detail, off, peak_mb = "hang", "", 0.0, 0.0
        if self.pipe.poll(self.timeout_s):
            try:
                outcome, detail, off, peak_mb = self.pipe.recv()
            except EOFError:
                self.process.join()
                outcome, detail = "crash", f"exit code {self.process.exitcode}"
        self.left = 0 if outcome in ("crash", "hang") else self.left - 1
        return dict(outcome=outcome, detail=detail, off=off, peak_mb=peak_mb, seconds=time.monotonic() - begin)

    def start(self):
        """End the old process and fork a new one."""
        self.close()
        fork = multiprocessing.get_context("fork")
        self.pipe, end = fork.Pipe()
        self.process, self.left = fork.Process(target=serve, args=(end, self.limit_mb), daemon=True), self.lifetime
        self.process.start()
        end.close()

    def close(self):
        """Kill the process."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.pipe.close()


class OpenWatch:
    """Names of the files of a folder that any process has opened since it was last asked (Linux' inotify)."""

    IN_OPEN, IN_ISDIR, NONBLOCK = 0x20, 0x40000000, 0o4000

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(self.NONBLOCK)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(folder), self.IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def names(self):
        """-> set of names."""
        found = set()
        try:
            while True:
                events = os.read(self.fd, 65536)
                while events:
                    _, mask, _, length = struct.unpack("iIII", events[:16])
                    if not mask & self.IN_ISDIR:
                        found.add(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                    events = events[16 + length :]
        except BlockingIOError:
            return found

    def close(self):
        """Stop watching."""
        os.close(self.fd)


# -- the run


def fuzz(num, seed, reader, timeout_s=10.0, limit_mb=1000.0, ways=tuple(WAYS)):
    """Write and read `num` mutants -> [dict(number, mutator, source, way, outcome, detail, off, peak_mb, seconds,
    opened)]."""
    rows = []
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
        sources = write_sources(home)
        write_bait(folder)
        plans = [replace(PLAN, u_start=u_start) for u_start in STARTS]
        intact = {
            (way, name, plan): WAYS[way](reader, path, plan)
            for way in ways
            for name, path in sources.items()
            for plan in plans
        }
        watch, child = OpenWatch(folder), Child(timeout_s, limit_mb)
        for number in range(num):
            name, source, path, plan = write_mutant(folder, sources, seed, number)
            for way in ways:
                watch.names()
                if name == "fifo" and way == "defaults":
                    continue  # it would block until the time limit, every time
                row = child.read(way, reader, path, plan, intact[way, source, plan])
                opened = sorted(watch.names() - {path.name})
                rows.append(dict(number=number, mutator=name, source=source, way=way, **row, opened=opened))
            path.unlink()
        child.close()
        watch.close()
    return rows


def summarise(rows):
    """Rows of `fuzz` -> {way: {mutator or 'all': counts}}."""
    table = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        for name in [*dict.fromkeys(row["mutator"] for row in mine), "all"]:
            some = [row for row in mine if name in (row["mutator"], "all")]
            counts = {outcome: sum(row["outcome"] == outcome for row in some) for outcome in OUTCOMES}
            counts.update(
                num=len(some),
                seen=sum(row["outcome"] == "silent" and row["off"] > VISIBLE for row in some),
                opened=sum(bool(row["opened"]) for row in some),
                peak_mb=round(max(row["peak_mb"] for row in some), 1),
                slowest_s=round(max(row["seconds"] for row in some), 2),
            )
            table.setdefault(way, {})[name] = counts
    return table


def print_table(table):
    """One block per way, one line per mutator."""
    columns = ("num", *OUTCOMES[:3], "seen", *OUTCOMES[3:], "opened", "peak_mb", "slowest_s")
    for way, lines in table.items():
        V.say(f"{way:<22}" + "".join(f"{column:>10}" for column in columns))
        for name, counts in lines.items():
            V.say(f"  {name:<20}" + "".join(f"{counts[column]:>10}" for column in columns))


def passed(rows):
    """Whether our reader neither crashed, hung, raised anything but BadFile, nor opened another file."""
    mine = [row for row in rows if row["way"] == "ours"]
    return not any(row["outcome"] in ("other", "crash", "hang") or row["opened"] for row in mine)


def main(argv=None):
    """Parse flags, fuzz, print the table and what failed, write the JSON -> exit code."""
    parser = argparse.ArgumentParser(description="Read damaged videos; count what is refused, wrong, crashed or hung.")
    parser.add_argument("--num", type=int, default=1000, help="mutations [1000]")
    parser.add_argument("--seed", type=int, default=0, help="seed of all of them [0]")
    parser.add_argument(
        "--reader", choices=("pyav", "decord"), default="pyav", help="decoder that is asked first [pyav]"
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that one reading may take [10]")
    parser.add_argument(
        "--memory", type=float, default=1000.0, help="MB of address space that one reading may add [1000]"
    )
    parser.add_argument("--out", default="", type=os.path.expanduser, help="JSON file to write")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    rows = fuzz(args.num, args.seed, args.reader, args.timeout, args.memory)
    table = summarise(rows)
    print_table(table)
    for row in rows:
        if not passed([row]):
            V.say(
                f"mutation {row['number']} ({row['mutator']} of {row['source']}): "
                f"{row['outcome']} {row['detail'][:160]} {row['opened'] or ''}"
            )
    V.say(f"{args.num} mutations, {time.monotonic() - begin:.0f} s")
    if args.out:
        versions = {name: importlib.metadata.version(name) for name in ("av", args.reader.replace("pyav", "av"))}
        report = dict(num=args.num, seed=args.seed, reader=args.reader, versions=versions, table=table, rows=rows)
        V.write_report(args.out, report)
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
