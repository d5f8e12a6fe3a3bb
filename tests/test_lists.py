"""Lists, folders and annotations as users have them: every video is found once, and what is malformed is named, never
an uncaught error."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import SHALLOW, V, small_config
from test_videos import PLAN, coded_frames, frame_numbers, names_of, touch


def listed(folder, text, name="list.csv"):
    """Write a list -> [(name, label)] as it is read."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(video.name, video.label) for video in V.find_videos(str(folder / name), "*")]


# -- folders


@pytest.mark.parametrize(
    "glob, wanted",
    [
        ("**/*.mp4", ["a.mp4", "night/b.mp4", "night/x/c.mp4"]),
        ("**/night/*", ["night/b.mp4", "night/x/c.mp4"]),
        ("night/**/c.mp4", ["night/x/c.mp4"]),
        ("night/**/*.mp4", ["night/b.mp4", "night/x/c.mp4"]),
        ("./a.*", ["a.mp4"]),
        ("**", ["a.mp4", "night/b.mp4", "night/x/c.mp4"]),
        ("**/**/[ab].mp4", ["a.mp4", "night/b.mp4"]),
        ("videos/night/*.mp4", ["night/b.mp4", "night/x/c.mp4"]),
        ("night**/b.mp4", ["night/b.mp4"]),
    ],
)
def test_globs_mean_what_users_expect(tmp_path, glob, wanted):
    """**/ is any number of folders, none included. Seen red with fnmatch alone, where **/*.mp4 finds nothing in a
    flat folder."""
    for name in ("a.mp4", "night/b.mp4", "night/x/c.mp4"):
        touch(tmp_path / "videos" / name)
    assert names_of(V.find_videos(str(tmp_path), glob)) == wanted


def test_globs_match_all_that_fnmatch_matches(tmp_path):
    """1,000 random globs against random names: what fnmatch finds on the name or the path is still found."""
    import fnmatch

    rng = random.Random(0)
    for _ in range(1000):
        glob = "".join(rng.choice(["*", "**/", "/", "a", "b", "?", "[ab]", ".mp4"]) for _ in range(rng.randint(1, 6)))
        path = (
            "/".join("".join(rng.choice("ab") for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 3)))
            + ".mp4"
        )
        matches = V.glob_pattern(glob).match
        assert matches(path) or not fnmatch.fnmatch(path, glob), (glob, path)


@pytest.mark.parametrize(
    "suffix, container, codec",
    [
        ("MTS", "mpegts", "libx264"),
        ("m2ts", "mpegts", "libx264"),
        ("3gp", "3gp", "libx264"),
        ("3g2", "3g2", "libx264"),
        ("f4v", "f4v", "libx264"),
        ("wmv", "asf", "wmv2"),
        ("asf", "asf", "wmv2"),
        ("flv", "flv", "libx264"),
        ("mpg", "mpeg", "mpeg2video"),
        ("mpeg", "mpeg", "mpeg1video"),
        ("VOB", "vob", "mpeg2video"),
        ("ogv", "ogg", "libvpx"),
        ("265", "hevc", "libx265"),
        ("264", "h264", "libx264"),
    ],
)
def test_every_known_suffix_is_read(tmp_path, suffix, container, codec):
    """A folder that holds only such a file is found and its frames come at even distances. Seen red with the old list
    of suffixes."""
    import av

    with av.open(str(tmp_path / f"clip.{suffix}"), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate, stream.codec_context.max_b_frames = "yuv420p", 2_000_000, 0
        stream.options = (
            {"x265-params": "log-level=none:bframes=0:pools=none:frame-threads=1"}
            if codec == "libx265"
            else {"bf": "0"}
        )
        stream.codec_context.thread_count = 1  # libvpx's others spin over pictures this small
        for picture in coded_frames(200, 64):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    (video,) = V.find_videos(str(tmp_path), "*")
    plan = V.replace(PLAN, width=64, height=64)
    numbers = frame_numbers(V.read_frames(video.path, plan, "auto"))
    assert (
        np.all(np.abs(np.diff(numbers) - 12.5) <= 1) and 0 <= numbers[0] <= 1
    )  # 2 per second of 25, from the start on


@pytest.mark.parametrize("name", ["list.wmv", "list.flv", "list.mpg", "list.ogv", "list.asf"])
def test_the_new_containers_open_no_other_file(tmp_path, name):
    """A playlist under one of their names is refused, and the file it names is not read."""
    touch(tmp_path / "secret.ts")
    for text in (
        "#EXTM3U\n#EXTINF:1,\nsecret.ts\n",
        "[Reference]\nRef1=secret.ts\n",
        '<asx><entry><ref href="secret.ts"/></entry></asx>',
        "ffconcat version 1.0\nfile secret.ts\n",
    ):
        (tmp_path / name).write_text(text * 20)
        with pytest.raises(V.BadFile, match="cannot open"):
            V.read_frames(str(tmp_path / name), PLAN, "auto")


def test_a_folder_without_videos_says_what_it_holds(tmp_path):
    """Known suffixes and what was seen with its counts. Seen red with the old message."""
    for name in ("1.jpg", "2.JPG", "x/3.jpg", "a.braw", "README", ".hidden.mp4"):
        touch(tmp_path / name)
    with pytest.raises(
        V.UsageError, match=r"no video matches '\*' among \.mp4, .*\.mts.*; found 3 \.jpg, .*1 \.braw"
    ) as error:
        V.list_data(small_config(data_root=str(tmp_path), missing_data="error"))
    assert "1 hidden" in str(error.value) and "1 without suffix" in str(error.value)


def test_hidden_names_and_system_copies_do_not_count(tmp_path):
    """macOS's twins, notebook checkpoints, wastebaskets, a disk station's copies. Seen red: all seven were listed.
    The root itself may be hidden."""
    root = tmp_path / ".hidden_root"
    for name in (
        "a.mp4",
        "._a.mp4",
        ".ipynb_checkpoints/a-checkpoint.mp4",
        ".Trash/b.mp4",
        "x/@eaDir/c.mp4",
        "__MACOSX/x/._d.mp4",
        "$RECYCLE.BIN/e.mp4",
        ".mp4",
    ):
        touch(root / name)
    assert names_of(V.find_videos(str(root), "*")) == ["a.mp4"]


def test_one_file_under_three_names_counts_once(tmp_path):
    """Hard link and links: the first name in sorted order. Other files of equal content are files of their own. Seen
    red: all five listed."""
    (tmp_path / "x").mkdir()
    for name in ("m.mp4", "n.mp4"):
        (tmp_path / name).write_bytes(b"same bytes")
    os.link(tmp_path / "m.mp4", tmp_path / "x" / "hard.mp4")
    (tmp_path / "a_link.mp4").symlink_to(tmp_path / "m.mp4")
    (tmp_path / "z_link.mp4").symlink_to(tmp_path / "a_link.mp4")
    videos = V.find_videos(str(tmp_path), "*")
    assert names_of(videos) == ["a_link.mp4", "n.mp4"] and any(
        "3 further name(s)" in note and "x/hard.mp4" in note for note in videos.notes
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_file_stands_in_train_and_val(tmp_path, seed):
    """Random links in a folder, and a list that names files again under other names and labels: no inode on both
    sides. Seen red in lists and folders."""
    rng, root = random.Random(seed), tmp_path / "root"
    root.mkdir()
    for number in range(12):
        (root / f"{number}.mp4").write_bytes(bytes([number]))
    for number in range(24):
        target, name = root / f"{rng.randrange(12)}.mp4", root / f"{'abc'[number % 3]}{number}.mp4"
        os.link(target, name) if number % 2 else name.symlink_to(target)
    names = sorted(path.name for path in root.iterdir())
    text = "".join(f"{rng.choice(['', './'])}{name},{rng.choice('xyz')}\n" for name in rng.choices(names, k=60))
    (root / "list.csv").write_text(text)
    for data_root in (root, root / "list.csv"):
        for share in (0.1, 0.5, 0.9):
            train, val = V.split_videos(V.find_videos(str(data_root), "*"), share)
            train, val = ({os.stat(video.path).st_ino for video in side} for side in (train, val))
            assert train and val and not train & val


def test_a_list_keeps_the_labels_of_one_file(tmp_path):
    """Another name with another label stays, under the first name; with the same label it goes; a line written twice
    counts twice, as ever."""
    touch(tmp_path / "a.mp4")
    os.link(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert listed(tmp_path, "a.mp4,left\nb.mp4,right\n./a.mp4,left\na.mp4,left\nb.mp4,right\n") == [
        ("a.mp4", "left"),
        ("a.mp4", "right"),
        ("a.mp4", "left"),
    ]


def test_a_closed_subfolder_is_told(tmp_path, monkeypatch):
    """Its name and the reason stand in a note, the rest is listed; a closed root is a usage error. Seen red with
    os.walk, which says nothing."""
    real = os.scandir
    for name in ("open/a.mp4", "closed/b.mp4"):
        touch(tmp_path / name)

    def guarded(folder):
        if str(folder).endswith(closed):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return real(folder)

    closed = "closed"
    monkeypatch.setattr(os, "scandir", guarded)
    videos = V.find_videos(str(tmp_path), "*")
    assert names_of(videos) == ["open/a.mp4"] and ["Permission denied: closed" in note for note in videos.notes] == [
        True
    ]
    closed = tmp_path.name
    with pytest.raises(V.UsageError, match="cannot be read .Permission denied."):
        V.find_videos(str(tmp_path), "*")


def go_down(name, count, deed):
    """Stand `count` folders called `name` deeper than now; `deed` is done to each before it is entered."""
    for _ in range(count):
        deed(name)
        os.chdir(name)


@pytest.fixture
def deep_folder(tmp_path, monkeypatch, request):
    """a.mp4 in a folder, b.mp4 1,200 folders called request.param deeper -> folder. Taken apart by hand:
    shutil.rmtree recurses."""
    monkeypatch.chdir(tmp_path)
    go_down("root", 1, os.mkdir)
    touch(tmp_path / "root" / "a.mp4")
    go_down(request.param, 1200, os.mkdir)
    with open("b.mp4", "wb"):
        pass
    os.chdir(tmp_path)
    yield tmp_path / "root"
    go_down("root", 1, str)
    go_down(request.param, 1200, str)
    os.unlink("b.mp4")
    for _ in range(1200):
        os.chdir("..")
        os.rmdir(request.param)


@pytest.mark.parametrize("deep_folder, found", [("d", True), ("long_name", False)], indirect=["deep_folder"])
def test_folders_1200_deep(deep_folder, found):
    """No recursion limit; where the path grows longer than the system takes, that is told. Seen red: RecursionError
    from os.walk on Python 3.11."""
    videos = V.find_videos(str(deep_folder), "*")
    assert (
        len(videos) == 1 + found
        and bool(videos.notes) != found
        and all("File name too long: long_name/" in note for note in videos.notes)
    )


# -- lists


def test_csv_as_spreadsheets_write_it(tmp_path):
    """Quoted commas and quotes, header by name, further columns, comments, a byte-order mark, CRLF. Seen red: path
    and label torn, comments counted as bad files."""
    for name in ("a, b.mp4", 'the "best".mp4', "plain.mp4", "#1.mp4", "with blank.mp4"):
        touch(tmp_path / name)
    text = (
        "\ufeff# made by hand\r\nid,label,file_name,speed\r\n"
        '1,"turn, left","a, b.mp4",3\r\n# a comment\r\n2,keep,"the ""best"".mp4",4\r\n\r\n'
        "3,,plain.mp4,5\r\n4,0,gone.mp4,6\r\n"
    )
    assert listed(tmp_path, text) == [
        ("a, b.mp4", "turn, left"),
        ('the "best".mp4', "keep"),
        ("plain.mp4", ""),
        ("gone.mp4", "0"),
    ]
    text = 'plain.mp4,keep,0.5,train\n"a, b.mp4",left,0.5,val\n'
    text += '#1.mp4,right\n"gone, too.mp4",7\nwith blank.mp4,keep\ngone.mp4,1,2,3\n'
    assert listed(tmp_path, text) == [
        ("plain.mp4", "keep"),
        ("a, b.mp4", "left"),
        ("#1.mp4", "right"),
        ("gone, too.mp4", "7"),
        ("with blank.mp4", "keep"),
        ("gone.mp4", "1"),
    ]


@pytest.mark.parametrize("separator", ["\t", ",", " ", ";", "::"])
def test_label_0_and_headers_with_any_separator(tmp_path, separator):
    """0 is a label like any other; a header in any order of its columns is followed."""
    for name in ("a.mp4", "b.mp4"):
        touch(tmp_path / name)
    lines = [("a.mp4", "0"), ("b.mp4", "1"), ("gone.mp4", "0")]
    assert listed(tmp_path, "".join(f"{name}{separator}{label}\n" for name, label in lines)) == lines
    assert (
        listed(tmp_path, f"path{separator}label\n" + "".join(f"{name}{separator}{label}\n" for name, label in lines))
        == lines
    )
    assert (
        listed(tmp_path, f"label{separator}path\n" + "".join(f"{label}{separator}{name}\n" for name, label in lines))
        == lines
    )


def test_jsonl_labels(tmp_path):
    """0 and false are labels, null and "" are none. Seen red: label 0 was dropped."""
    rows = [
        {"path": "a.mp4", "maneuver": 0},
        {"path": "b.mp4", "label": 0},
        {"path": "c.mp4", "maneuver": None, "label": 2},
        {"path": "d.mp4", "maneuver": "", "label": ""},
        {"path": "e.mp4", "maneuver": False},
    ]
    found = listed(tmp_path, "# a comment\n" + "".join(json.dumps(row) + "\n" for row in rows), "list.jsonl")
    assert [label for _, label in found] == ["0", "0", "2", "", "False"]


HOSTILE = {
    "a NUL in a path": (b"a\0b.mp4,left\n", "list.csv"),
    "a NUL in jsonl": (b'{"path": "a\\u0000b.mp4"}\n', "list.jsonl"),
    "a lone surrogate": (b'{"path": "\\ud800.mp4"}\n', "list.jsonl"),
    "a surrogate in a label": (b'{"path": "a.mp4", "label": "\\ud800"}\n', "list.jsonl"),
    "deep nesting": (b'{"path": ' + b"[" * 100_000 + b"\n", "list.jsonl"),
    "deep and closed": (b'{"path": "a.mp4", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "list.jsonl"),
    "5,000 digits": (b'{"path": "a.mp4", "label": ' + b"7" * 5000 + b"}\n", "list.jsonl"),
    "a huge label": (b'{"path": "a.mp4", "label": ' + b"7" * 400 + b"}\n", "list.jsonl"),
    "a key twice": (b'{"path": "a.mp4", "path": "b.mp4"}\n', "list.jsonl"),
    "NaN": (b'{"path": "a.mp4", "label": NaN}\n', "list.jsonl"),
    "a list as path": (b'{"path": ["a.mp4"]}\n', "list.jsonl"),
    "a list as label": (b'{"path": "a.mp4", "label": ["x"]}\n', "list.jsonl"),
    "a cell without end": (b'"' + b"x," * 100_000 + b".mp4\n", "list.csv"),
    "true as path": (b'{"path": true}\n', "list.jsonl"),
    "a control character in a label": (b"a.mp4,le\x1bft\n", "list.csv"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_lines_are_named(tmp_path, capsys, case):
    """Exit 2 and one line with the line's number. Seen red: UnicodeEncodeError, ValueError, RecursionError and
    TypeError in turn."""
    content, name = HOSTILE[case]
    good = b'{"path": "ok.mp4"}\n' if name.endswith("jsonl") else b"ok.mp4\n"
    (tmp_path / name).write_bytes(good + content)
    (tmp_path / "ok.mp4").write_bytes(b"")
    assert V.main(["--data_root", str(tmp_path / name), "--out_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "line 2: " in error and error.count("\n") == 1 and len(error) < 600


def test_lines_whose_file_cannot_be_are_bad_files(tmp_path):
    """A name too long for a path, a folder, bytes that are not UTF-8 in JSON's escapes: listed, and named bad when
    they are read."""
    os.mkdir(tmp_path / "folder.mp4")
    latin = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / latin).write_bytes(b"x")
    rows = [{"path": "x" * 5000 + ".mp4"}, {"path": "folder.mp4"}, {"path": latin}, {"path": "a" * 300 + "/b.mp4"}]
    found = (
        V.find_videos(str(tmp_path / "list.jsonl"), "*")
        if listed(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "list.jsonl")
        else []
    )
    assert len(found) == 4
    for video in found:
        assert V.read_annotation(str(tmp_path), video) == {}
        with pytest.raises(V.BadFile):
            V.read_frames(video.path, PLAN, "auto")


def test_random_bytes_never_end_a_reader(tmp_path):
    """300 mutated lists and annotations: each is read, or named by UsageError or BadFile, and nothing else is
    raised."""
    rng, video = random.Random(0), V.VideoFile("a.mp4", "a.mp4")
    seeds = [
        b'path,label\n"a, b.mp4",left\nc.mp4 0\n#x\n',
        b'{"path": "a.mp4", "maneuver": "left", "n": [1, 2.5e3, null]}\n',
        b'{"maneuver": 0, "fps": 20, "speed": [1, null, 2.5]}',
    ]
    parts = [
        b'"',
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"NaN",
        b"1e999",
        b"9" * 5000,
        b"[" * 3000,
        b"{",
        b"]",
        b"\\ud800",
        b",",
        b"\r",
        b"\n",
        b"\xc2\x85",
        b"::",
        b"-",
        b"~",
        b"#",
    ]
    (tmp_path / "annotations").mkdir()
    for _ in range(300):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.choice([0, 0, 1, 5])] = rng.choice(parts)
        for name in ("list.csv", "list.jsonl", "annotations/a.json"):
            (tmp_path / name).write_bytes(data)
        for read in (
            lambda: V.find_videos(str(tmp_path / "list.csv"), "*"),
            lambda: V.find_videos(str(tmp_path / "list.jsonl"), "*"),
            lambda: V.read_annotation(str(tmp_path), video),
        ):
            try:
                read()
            except (V.UsageError, V.BadFile) as error:
                assert "\n" not in str(error)


# -- annotations


def annotate(folder, content):
    """One video with an annotation of these bytes -> (data_root, video)."""
    touch(folder / "videos" / "a.mp4")
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "a.json").write_bytes(content)
    return str(folder), V.VideoFile("a.mp4", str(folder / "videos" / "a.mp4"))


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b'{"maneuver": 0}', {"maneuver": "0"}),
        (b'{"maneuver": false}', {"maneuver": "False"}),
        (b'{"maneuver": null}', {}),
        (b'{"maneuver": ""}', {}),
        (b'\xef\xbb\xbf{"maneuver": "left"}', {"maneuver": "left"}),
        (b'{"speed": [1, null, 2.5], "fps": 20}', {"speed": [1, None, 2.5], "fps": 20}),
        (b'{"speed": 3, "note": 1' + b"0" * 400 + b', "fps": null}', {"speed": 3, "note": 10**400, "fps": None}),
    ],
)
def test_annotations_that_are_read(tmp_path, content, wanted):
    """Label 0 is kept, a byte-order mark is none of the text. Seen red on the first, second and fifth."""
    assert V.read_annotation(*annotate(tmp_path, content)) == wanted


BAD_ANNOTATIONS = [
    b'{"speed": [[1, 2], [3, 4]]}',
    b'{"speed": ["fast"]}',
    b'{"steer": [1, {}]}',
    b'{"speed": [NaN]}',
    b'{"speed": [Infinity]}',
    b'{"speed": [1e999]}',
    b'{"speed": [1' + b"0" * 400 + b"]}",
    b'{"n": ' + b"7" * 5000 + b"}",
    b'{"n": ' + b"[" * 50_000,
    b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"fps": 0}',
    b'{"fps": -4}',
    b'{"fps": "25"}',
    b'{"fps": true}',
    b'{"fps": 1e999}',
    b'{"fps": [25]}',
    b'{"fps": 1' + b"0" * 400 + b"}",
    b'{"maneuver": "a", "maneuver": "b"}',
    b'{"maneuver": "\\ud800"}',
    b'{"maneuver": "a\\u0000"}',
    b'{"maneuver": ["a"]}',
    b'{"maneuver": {}}',
    b'{"maneuver": 1e999, "speed": [1e999]}',
    b"\x00",
    b"",
    b"\xff\xfe{}",
    b"[]",
    b'{"a": 1}{',
]


@pytest.mark.parametrize("content", BAD_ANNOTATIONS, ids=range(len(BAD_ANNOTATIONS)))
def test_malformed_annotations_make_a_named_bad_file(tmp_path, content):
    """One line with the annotation's name, whoever reads. Seen red: ValueError, RecursionError, OverflowError, or
    taken as they are."""
    with pytest.raises(V.BadFile, match="annotation a.json: ") as error:
        V.read_annotation(*annotate(tmp_path, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert V.maneuver_names([V.VideoFile("a.mp4", "")], str(tmp_path)) == []


def test_annotations_that_cannot_be_opened(tmp_path, monkeypatch):
    """No permission and too large are named; a folder, a pipe and a name too long for a path are no annotation, and
    none is waited for."""
    root, video = annotate(tmp_path, b'{"maneuver": "left"}')
    monkeypatch.setattr(V, "MAX_ANNOTATION_BYTES", 10)
    with pytest.raises(V.BadFile, match="a.json: larger than 10 bytes"):
        V.read_annotation(root, video)
    monkeypatch.undo()
    for deed in (os.mkdir, os.mkfifo):
        os.unlink(tmp_path / "annotations/a.json")
        deed(tmp_path / "annotations/a.json")
        assert V.read_annotation(root, video) == {}
        os.rmdir(tmp_path / "annotations/a.json") if deed is os.mkdir else None
        (tmp_path / "annotations/a.json").touch()
    assert V.read_annotation(root, V.VideoFile("x" * 252 + ".mp4", "")) == {}

    def closed(path, *rest, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(V.os, "stat", closed)
    with pytest.raises(V.BadFile, match="a.json: Permission denied"):
        V.read_annotation(root, video)


def test_label_0_reaches_the_batch(tmp_path, scene_folder):
    """Annotation 0, list label 0 and an annotation's empty text beside a list's label. Seen red: no clip had a
    label."""
    folder = shutil.copytree(scene_folder, tmp_path / "data")
    first, second, third = sorted(path.stem for path in (folder / "videos").iterdir())[:3]
    (folder / "annotations" / f"{first}.json").write_text('{"maneuver": 0}')
    videos = [
        video
        for video in V.find_videos(str(folder), "*")
        if video.path.endswith((f"{first}.mp4", f"{second}.mp4", f"{third}.mp4"))
    ]
    (folder / "annotations" / f"{second}.json").write_text('{"maneuver": ""}')
    (folder / "annotations" / f"{third}.json").unlink()
    videos = [videos[0], V.replace(videos[1], label="1"), V.replace(videos[2], label="0")]
    names = V.maneuver_names(videos, str(folder))
    assert names == ["0", "1"]
    data = V.ClipDataset(small_config(), videos, str(folder), "val", names)
    assert {int(sample["file"]): int(sample["maneuver"]) for sample in map(data.__getitem__, range(6))} == {
        0: 0,
        1: 1,
        2: 0,
    }


# -- paths and restarts


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """In flags, config files, configs made in Python, list entries and the tools' flags. Seen red: a folder named ~
    appeared."""
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "data" / "a.mp4")
    (tmp_path / "flags.json").write_text('{"out_dir": "~/run", "resume": "~/x.pt"}')
    cfg, _, _ = V.resolve_config(["--config", "~/flags.json", "--data_root", "~/data"], V.VJepaAutoV2)
    assert (cfg.out_dir, cfg.resume, cfg.data_root) == tuple(str(tmp_path / name) for name in ("run", "x.pt", "data"))
    assert (
        V.replace(cfg, data_root="~/other").data_root == str(tmp_path / "other")
        and small_config(resume="auto").resume == "auto"
    )
    (tmp_path / "list.txt").write_text("~/data/a.mp4 left\n~/gone.mp4\n")
    assert [video.path for video in V.find_videos(str(tmp_path / "list.txt"), "*")] == [
        str(tmp_path / "data/a.mp4"),
        str(tmp_path / "gone.mp4"),
    ]


def test_a_changed_listing_is_told_on_resume(scene_folder, tmp_path):
    """One line with counts and first names; nothing for the same files, for a moved folder, or for a checkpoint of an
    older version. Seen red with no such line."""
    data = shutil.copytree(scene_folder, tmp_path / "data")
    settings = dict(
        data_root=str(data), out_dir=str(tmp_path / "run"), picture=False, val_clips=2, val_fraction=0.3, **SHALLOW
    )
    assert V.train(small_config(steps=1, **settings)) == 0
    assert V.train(small_config(steps=2, **settings)) == 0
    told = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "files are not those" in line]
    assert not told
    os.rename(data / "videos/scene_000003.mp4", data / "videos/new_\u00fc.mp4")
    shutil.copy(data / "videos/scene_000004.mp4", data / "videos/newer.mp4")
    assert V.train(small_config(steps=3, **settings)) == 0
    (told,) = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "files are not those" in line]
    assert "2 added (new_\u00fc.mp4, newer.mp4), 1 removed (scene_000003.mp4)" in told
    source = V.DataSource("videos", "x", [V.VideoFile("a.mp4", "")], [], [], False)
    assert V.listing_change({"kind": "videos", "root": "x"}, source) == "" and "1 (videos) now" in V.listing_change(
        {**source.listing(), "kind": "scenes"}, source
    )


def test_a_checkpoint_holds_any_names_and_not_too_many(tmp_path, monkeypatch):
    """Names that are not UTF-8 come back from a file read with weights_only; beyond the bound only their number is
    kept."""
    videos = [V.VideoFile(os.fsdecode(b"\xff%d.mp4" % number), "") for number in range(3)]
    source = V.DataSource("videos", "x", videos, [], [], False)
    torch.save({"data": source.listing()}, tmp_path / "x.pt")
    assert (
        torch.load(tmp_path / "x.pt", weights_only=True)["data"] == source.listing()
        and len(source.listing()["names"]) == 3
    )
    monkeypatch.setattr(V, "MAX_LISTED", 2)
    assert source.listing()["names"] == [] and "3 files (videos) then, 2 (videos) now" in V.listing_change(
        source.listing(), V.replace(source, train=videos[:2])
    )
