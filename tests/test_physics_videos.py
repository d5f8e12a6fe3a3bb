"""tools/make_videos.py and tools/split_videos.py: the motion obeys the physics that its annotations state, the pictures
show it, and a split holds its shares and stays. Each test was seen red with the bug that its docstring names."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, V

sys.path.insert(0, str(ROOT / "tools"))

import make_videos as M  # noqa: E402
import split_videos as S  # noqa: E402

ELASTIC = {"gravity": 0.0, "drag": 0.0, "floor_restitution": 1.0, "wall_restitution": 1.0}


def motion(state):
    """State -> place, speed [T, N, 2] and radius [N]."""
    things = state["objects"]
    place, speed = (
        np.stack([np.stack([thing[name] for name in names], 1) for thing in things], 1)
        for names in (("x", "y"), ("vx", "vy"))
    )
    return place, speed, np.array([thing["radius"] for thing in things])


# -- physics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_undamped_pendulum_keeps_its_energy_and_period(index):
    """Energy per mass over 20 s, and the angle after one stated period. Seen red with Euler's step for `swing`, with
    the period of small angles, and with the string's length left out of the speed."""
    state = M.simulate("pendulum", 3, 600, 30.0, index, damping=0.0)
    place, speed, _ = motion(state)
    energy = (speed**2).sum((1, 2)) / 2 - state["gravity"] * place[:, 0, 1]
    swing = state["gravity"] * state["length"] * (1 - math.cos(state["angle"][0]))
    assert np.abs(energy - energy[0]).max() < 1e-6 * swing  # the step's own error is 1e-9 or so
    again = M.simulate("pendulum", 3, 11, 10 / state["period"], index, damping=0.0)
    assert abs(again["angle"][10] - again["angle"][0]) < 1e-6 and again["angle"][5] == pytest.approx(-again["angle"][0])
    assert 1.3 <= state["period"] <= 1.9 and math.radians(20) <= abs(state["angle"][0]) <= math.radians(60)


def test_pendulum_hangs_on_its_string_and_is_damped():
    """Places and speeds belong to the angles, and a damped one loses height in every swing. Seen red with sine and
    cosine swapped, and with the damping's sign turned."""
    state = M.simulate("pendulum", 1, 240, 30.0, 2)
    place, speed, _ = motion(state)
    angle, rate, arm = np.array(state["angle"]), np.array(state["angular_velocity"]), place[:, 0] - state["pivot"]
    assert np.allclose(np.hypot(*arm.T), state["length"]) and np.allclose(np.arctan2(arm[:, 0], arm[:, 1]), angle)
    assert np.allclose(speed[:, 0], state["length"] * rate[:, None] * np.stack((np.cos(angle), -np.sin(angle)), 1))
    energy = rate**2 / 2 + state["gravity"] / state["length"] * (1 - np.cos(angle))
    assert (np.diff(energy) <= 1e-9).all() and 0.2 < energy[-1] / energy[0] < 0.5  # about exp(-0.15 * 8)


def test_pair_collision_follows_the_closed_formula():
    """Two balls that meet off-centre: places and speeds after it are those of the exact instant of contact. Seen red
    with the normal taken where the sub-step ended, and with the speeds simply swapped."""
    place, speed, radius = np.array([[0.3, 0.5], [0.6, 0.54]]), np.array([[0.7, 0.1], [-0.4, 0.05]]), 1 / 16
    after_place, after_speed = M.move_bodies(place, speed, [radius] * 2, ELASTIC, [0.0, 0.4], True)
    gap, closing = place[1] - place[0], speed[1] - speed[0]
    a, b, c = closing @ closing, 2 * gap @ closing, gap @ gap - 4 * radius**2
    contact = (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)
    assert 0 < contact < 0.4
    normal = (gap + closing * contact) / (2 * radius)
    turned = speed + np.stack((normal, -normal)) * (closing @ normal)  # equal masses exchange what is along it
    assert np.allclose(after_speed[1], turned, atol=1e-9)
    assert np.allclose(after_place[1], place + speed * contact + turned * (0.4 - contact), atol=1e-9)
    assert np.allclose(after_speed[1].sum(0), speed.sum(0), atol=1e-12)  # momentum
    assert (after_speed[1] ** 2).sum() == pytest.approx((speed**2).sum(), rel=1e-12)  # energy


@pytest.mark.parametrize("gravity", [0.0, 1.2])
def test_elastic_balls_keep_their_energy(gravity):
    """Over a whole clip of many collisions with each other and the walls nobody wins or loses, overlaps or leaves. Seen
    red with a restitution of 0.99, and, with gravity, with balls set on the wall instead of taken back to the touch."""
    law = {**ELASTIC, "gravity": gravity}
    index = next(i for i in range(50) if len(M.simulate("bouncing", 0, 2, 30.0, i)["objects"]) == 8)
    place, speed, radius = motion(M.simulate("bouncing", 0, 120, 30.0, index, **law))
    energy = (speed**2).sum((1, 2)) / 2 - gravity * place[:, :, 1].sum(1)
    # a triple contact may push a ball a hair along gravity: one part in a thousand allows it, a lost bounce is ten
    assert np.abs(energy - energy[0]).max() < (1e-3 if gravity else 1e-12) * (speed[0] ** 2).sum()
    assert (place >= radius[:, None] - 1e-12).all() and (place <= 1 - radius[:, None] + 1e-12).all()
    first, second = np.triu_indices(8, 1)
    gaps = np.linalg.norm(place[:, first] - place[:, second], axis=-1)
    assert gaps.min() > 2 * radius[0] - 0.002
    turns = (np.abs(np.diff(speed[:, :, 0], axis=0)) > 1e-6).sum()  # no force but contacts acts sideways
    assert turns > 40


def test_a_dropped_ball_bounces_as_high_as_its_restitution_says():
    """Instants and heights of a ball that is let fall, against the closed formulas; in the end it lies still. Seen red
    with the turn made at the end of the sub-step, and with the wall's restitution taken for the floor's."""
    law = {"gravity": 1.2, "drag": 0.0, "floor_restitution": 0.5, "wall_restitution": 0.85}
    down = math.sqrt(2 * 0.75 / 1.2)  # the floor is 0.75 below its lower edge
    times = [down * 1.5, down * 1.5 + down * 0.75, 4.0]  # tops of the first and the second arc, and long after
    place, speed = M.move_bodies([[0.5, 0.2]], [[0.0, 0.0]], [0.05], law, times)
    assert np.allclose(0.95 - place[:, 0, 1], [0.75 / 4, 0.75 / 16, 0.0], atol=1e-9)
    assert np.allclose(speed, 0, atol=1e-9)


@pytest.mark.parametrize("index", range(6))
def test_projectile_flies_a_parabola_until_it_touches(index):
    """x and y before the first contact, against start and gravity alone; the flight lasts 1 to 1.5 s and stays within
    the frame. Seen red with 0.01 of drag and with gravity halved."""
    state = M.simulate("projectile", 5, 240, 120.0, index)
    place, speed, radius = (part[..., 0, :] if part.ndim == 3 else part for part in motion(state))
    times = np.arange(240) / 120
    parabola = place[0] + speed[0] * times[:, None] + np.stack((0 * times, state["gravity"] * times**2 / 2), 1)
    landing = np.flatnonzero((parabola[:, 1] > 1 - radius[0]) | (parabola[:, 0] > 1 - radius[0]))[0]
    assert 1.0 <= times[landing] <= 1.5 and parabola[:landing, 1].min() > radius[0]
    assert np.abs(place[:landing] - parabola[:landing]).max() < 1e-9
    assert speed[landing].min() < 0 < speed[landing - 1].min()  # turned at the floor, or at the wall just above it
    assert place[0, 0] < 0.2 and place[0, 1] > 0.8 and 40 <= math.degrees(math.atan2(-speed[0, 1], speed[0, 0])) <= 65


def test_drag_leads_to_the_terminal_speed():
    """Speed and depth of a fall with drag, against the closed formulas. Seen red with drag as a factor per sub-step of
    1 - drag / fps, and with gravity left out of the drag."""
    for drag in (0.6, 20.0):  # the second reaches its terminal speed within the frame
        state = M.simulate("falling", 2, 60, 120.0, 1, drag=drag)
        place, speed, _ = motion(state)
        times = np.arange(60) / 120
        lost, final = (1 - np.exp(-drag * times))[:, None], state["gravity"] / drag
        assert np.allclose(speed[..., 1], final * lost, atol=1e-9)
        assert np.allclose(speed[..., 0], speed[0, :, 0] * (1 - lost), atol=1e-9)
        assert np.allclose(place[..., 1] - place[0, :, 1], final * (times[:, None] - lost / drag), atol=1e-9)
    assert np.allclose(speed[-1, :, 1], final, rtol=1e-4)


@pytest.mark.parametrize("kind", M.KINDS)
def test_speeds_are_the_slopes_of_places(kind):
    """Wherever nothing is touched. Seen red with vx and vy swapped in the annotation."""
    place, speed, _ = motion(M.simulate(kind, 11, 960, 480.0, 1))
    slope = (place[2:] - place[:-2]) * 240
    wrong = np.abs(slope - speed[1:-1]).max((1, 2)) > 1e-3
    assert wrong.mean() < 0.15 and (wrong.any() or kind == "pendulum")  # contacts: two or three instants each


# -- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", M.KINDS)
def test_frame_rate_changes_the_sampling_alone(kind):
    """States of 30, 60 and 25 frames per second at common instants are equal to the bit. Seen red with a sub-step of a
    sixteenth of a frame, and with the motion going on from the shorter step to a frame."""
    slow = M.simulate(kind, 4, 60, 30.0, 3)
    for fps, own, other in ((60.0, 2, 1), (25.0, 5, 6), (7.5, 1, 4)):
        fast = M.simulate(kind, 4, round(2 * fps), fps, 3)
        for ours, theirs in zip(motion(fast), motion(slow)):
            if ours.ndim == 3:
                assert np.array_equal(ours[::own], theirs[::other][: len(ours[::own])])


def test_a_clip_is_its_seed_kind_and_number():
    """Same to the bit once more; another in each of the three; other kinds do not see max_balls. Seen red with one
    generator for all videos and with the kind left out of the seed."""
    for kind in M.KINDS:
        state = M.simulate(kind, 7, index=5)
        assert state == M.simulate(kind, 7, index=5) and state["maneuver"] == kind
        starts = [
            motion(M.simulate(kind, *key))[0][0, 0] for key in ((7, 2, 30.0, 5), (8, 2, 30.0, 5), (7, 2, 30.0, 6))
        ]
        assert len({tuple(start) for start in starts}) == 3
        assert (state == M.simulate(kind, 7, index=5, max_balls=2)) == (kind != "bouncing")
        assert kind == "falling" or state == M.simulate(kind, 7, index=5, max_falling=3)
    hues = {tuple(M.simulate(kind, 7, 2)["objects"][0]["colour"]) for kind in M.KINDS}
    assert len(hues) == len(M.KINDS)
    with pytest.raises(ValueError, match="no constant"):
        M.simulate("falling", 0, damping=1.0)


def test_every_clip_moves_to_its_end_and_within_the_frame():
    """Speeds in the last third, edges, counts and shapes over 24 clips of each kind. Seen red with gravity 10."""
    for kind in M.KINDS:
        counts, shapes = set(), set()
        for index in range(24):
            state = M.simulate(kind, 0, index=index, max_falling=3)
            place, speed, radius = motion(state)
            counts.add(len(radius))
            shapes |= {thing["shape"] for thing in state["objects"]}
            assert np.linalg.norm(speed[40:], axis=-1).mean() > 0.15
            assert (place - radius[:, None] > -1e-9).all() and (place + radius[:, None] < 1 + 1e-9).all()
            for thing in state["objects"]:
                light = np.array(thing["colour"]) @ (0.299, 0.587, 0.114)
                assert light < 140 and max(thing["colour"]) - min(thing["colour"]) > 60  # stands out from white
        assert counts == {"bouncing": set(range(1, 9)), "falling": {1, 2, 3}}.get(kind, {1})
        assert shapes == ({"circle", "square"} if kind == "falling" else {"circle"})


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", M.KINDS)
def test_drawn_bodies_stand_where_the_state_says(kind, size, monkeypatch):
    """Centre and area of the coloured pixels of clips with one body, within a tenth of a pixel. Seen red with places
    rounded to pixels, with half a pixel's shift, and with x and y swapped."""
    monkeypatch.setattr(M, "TRAIL", 0)  # it draws the centre after it
    singles = [index for index in range(40) if len(M.simulate(kind, 0, 2, 30.0, index)["objects"]) == 1]
    for state in [M.simulate(kind, 0, 60, 30.0, index) for index in singles[:3]]:
        frames, (place, _, radius) = M.render(state, size).astype(float), motion(state)
        assert frames.shape == (60, size, size, 3)
        weight = frames.max(-1) - frames.min(-1)  # white, and the grey of the string, weigh nothing
        assert weight.max() == pytest.approx(np.ptp(state["objects"][0]["colour"]), abs=1)
        pixels, total = np.arange(size) + 0.5, weight.sum((1, 2))
        x, y = (weight.sum(1) * pixels).sum(1) / total, (weight.sum(2) * pixels).sum(1) / total
        assert np.abs(x - place[:, 0, 0] * size).max() < 0.1 and np.abs(y - place[:, 0, 1] * size).max() < 0.1
        area = total / weight.max() / size**2
        wanted = radius[0] ** 2 * (4 if state["objects"][0]["shape"] == "square" else math.pi)
        assert np.abs(area / wanted - 1).max() < 0.15  # a rim of a pixel around 1.6 of them


def test_a_projectile_leaves_a_trail_that_fades():
    """Fainter the older, none before there is one. Seen red with np.roll's end of the clip shown at its beginning, and
    with the ages the other way round."""
    state = M.simulate("projectile", 0)
    frames, place = M.render(state, 128).astype(float), motion(state)[0][:, 0]
    weight = frames.max(-1) - frames.min(-1)
    columns, rows = (place.T * 128).astype(int)
    ages = [weight[20, rows[20 - age], columns[20 - age]] for age in (0, 3, 5)]
    assert ages[0] > 1.3 * ages[1] > 1.3**2 * ages[2] > 0
    assert weight[20, rows[12], columns[12]] == 0
    assert (weight[0] > 0).sum() < 1.3 * math.pi * (0.05 * 128) ** 2


def test_string_and_pivot_are_drawn():
    """Grey half way down the string, and white beside it. Seen red with the string left out."""
    state = M.simulate("pendulum", 0, 60, 30.0, 0)
    frames, place = M.render(state, 128), motion(state)[0][:, 0]
    half = (np.array(state["pivot"]) + place) / 2 * 128
    for frame in (0, 15, 40):
        column, row = half[frame].astype(int)
        assert frames[frame, row, column].max() < 160 and (frames[frame, row, column + 8] == 255).all()
        assert tuple(frames[frame, int(0.06 * 128), 64]) == M.GREY


def test_sheet_is_small_and_has_two_rows_for_each_kind(tmp_path):
    """Seen red with one row each."""
    from PIL import Image

    assert M.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 8 * 88 and height > 8 * 88 and (tmp_path / "sheet.png").stat().st_size < 100_000


# -- files ------------------------------------------------------------------------------------------------------------


def write(folder, *flags):
    """make_videos with tiny counts -> exit code."""
    return M.main(["--out", str(folder), "--num_videos", "2", "--num_frames", "6", "--size", "16", *flags])


def contents(folder):
    """{path below a folder: its bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_do_not_depend_on_what_is_made_beside_them(tmp_path):
    """Bytes of videos and annotations with other kinds, counts and orders; the annotation is the state, and the script
    reads it. Seen red with the number of kinds in the seed, and with rounded annotations."""
    assert (
        write(tmp_path / "all") == 0
        and write(tmp_path / "few", "--kinds", "falling,bouncing", "--num_videos", "1") == 0
    )
    all_files, few = contents(tmp_path / "all"), contents(tmp_path / "few")
    assert len(few) == 5 and all(all_files[name] == data for name, data in few.items())
    videos = V.find_videos(str(tmp_path / "all"), "*")
    assert [video.name for video in videos] == [f"{kind}/{kind}_00{i}.mp4" for kind in sorted(M.KINDS) for i in (0, 1)]
    for video in videos:
        annotation, kind = V.read_annotation(str(tmp_path / "all"), video), os.path.dirname(video.name)
        assert annotation == M.simulate(kind, 0, 6, 30.0, int(video.name[-5])) and annotation["maneuver"] == kind
        frames = V.read_frames(video.path, V.ClipPlan(6, 30.0, 16, 16, 0.0, 1.0, 1.0, 0.5, 0.5), "auto")
        assert np.abs(frames.astype(float) - M.render(annotation, 16)).mean() < 8  # colours have half the pixels


def test_an_interrupted_writing_goes_on_and_may_grow(tmp_path, monkeypatch, capsys):
    """Finished files stay untouched, what is absent is made as if nothing had been. Seen red with files always
    written anew, and with the counts in the settings."""
    assert write(tmp_path / "whole", "--num_videos", "3") == 0
    monkeypatch.setattr(M.V, "write_new", broken_after(4, V.write_new))
    assert write(tmp_path / "part", "--kinds", "pendulum") == V.EXIT_ERROR  # settings, video, annotation, video
    monkeypatch.undo()
    assert "disk is full" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").rglob("*.*")}
    assert len(before) == 4 and write(tmp_path / "part", "--num_videos", "3") == 0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert "11 videos" in (said := capsys.readouterr().out) and "1 were there" in said


def broken_after(count, work):
    """A function that works `count` times, then raises OSError."""
    calls = iter([True] * count)

    def once(*args):
        if not next(calls, False):
            raise OSError(28, "disk is full")
        return work(*args)

    return once


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kinds", "falling,bounce"], "no kind 'bounce' (did you mean bouncing?)"),
        (["--kinds", ","], "names no kind"),
        (["--num_frames", "1"], "--num_frames 1"),
        (["--size", "33"], "must be even"),
        (["--size", "14"], "--size 14"),
        (["--fps", "0"], "--fps 0"),
        (["--fps", "nan"], "--fps nan"),
        (["--max_balls", "0"], "--max_balls 0"),
        (["--num_videos", "none"], "--num_videos"),
        (["--seed", "-1"], "--seed -1"),
        (["--size", "4096", "--num_frames", "60"], "too much for one video"),
        (["--out", ""], "one of --out and --sheet"),
    ],
)
def test_bad_flags_of_make_videos_are_one_line(tmp_path, capsys, flags, words):
    """Exit code 2, the reason, nothing written. Seen red with the checks left out."""
    assert write(tmp_path / "out", *flags) == V.EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["other contents", "other settings", "other physics", "a file", "a broken setting"])
def test_foreign_folders_of_make_videos_are_refused(tmp_path, capsys, monkeypatch, what):
    """Whatever stands at --out stays as it is. Seen red with the folder taken up without a look."""
    folder = tmp_path / "out"
    if what == "a file":
        folder.write_text("mine")
    elif what == "other contents":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    else:
        assert write(folder, "--kinds", "falling", "--seed", "9" if what == "other settings" else "0") == 0
        if what == "other physics":
            monkeypatch.setattr(M, "PHYSICS", M.PHYSICS + 1)
        elif what == "a broken setting":
            (folder / "videos.json").write_text("{")
    before = contents(tmp_path)
    assert write(folder) == V.EXIT_ERROR
    error = capsys.readouterr().err
    assert "--out" in error and error.count("\n") == 1 and contents(tmp_path) == before


# -- split ------------------------------------------------------------------------------------------------------------


def make_input(folder, **counts):
    """Empty files named like videos, and annotations of their own -> folder."""
    for kind, count in counts.items():
        for part, suffix in (("videos", "mp4"), ("annotations", "json")):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                text = json.dumps({"maneuver": kind, "number": number}) if suffix == "json" else ""
                (folder / part / kind / f"{kind}_{number:03d}.{suffix}").write_text(text)
    return folder


def split(folder, *flags):
    """split_videos from folder/in to folder/out -> exit code."""
    return S.main(["--input", str(folder / "in"), "--output", str(folder / "out"), *flags])


def sides(folder):
    """{name without its side: side} of what lies in a split's side folders."""
    found = {}
    for side in S.SIDES:
        for path in (folder / side).rglob("*.*") if (folder / side).is_dir() else ():
            found.setdefault(str(path.relative_to(folder / side)), []).append(side)
    assert all(len(on) == 1 for on in found.values())  # disjoint
    return {name: on[0] for name, on in found.items()}


def counted(found):
    """{sub-folder: (train, val, test)}."""
    counts = Counter((os.path.dirname(name), side) for name, side in found.items())
    return {folder: tuple(counts[folder, side] for side in S.SIDES) for folder, _ in counts}


@pytest.mark.parametrize("copy", [False, True])
def test_shares_hold_in_every_sub_folder_and_annotations_are_found(tmp_path, copy, capsys):
    """80/10/10 of each kind, everything once, links (or copies) of the right files, and `read_annotation` finds each
    one's own. Seen red with one pool for all sub-folders, with annotations left under their old names, and with
    absolute links."""
    make_input(tmp_path / "in", falling=40, pendulum=20, one=3)
    assert split(tmp_path, *(["--copy"] if copy else [])) == 0
    found = sides(tmp_path / "out")
    assert len(found) == 63 and counted(found) == {"falling": (32, 4, 4), "pendulum": (16, 2, 2), "one": (1, 1, 1)}
    assert "63 videos: train 49, val 7, test 7" in capsys.readouterr().out
    os.rename(tmp_path, moved := tmp_path.with_name(tmp_path.name + "_moved"))  # links are relative
    listing = V.find_videos(str(moved / "out"), "*")
    assert sorted(video.name.split("/", 1)[1] for video in listing) == sorted(found) and not listing.notes
    for video in listing:
        annotation = V.read_annotation(str(moved / "out"), video)
        assert video.name.endswith("{maneuver}_{number:03d}.mp4".format(**annotation))
        assert os.path.islink(video.path) != copy and os.path.isfile(video.path)
        assert not os.readlink(video.path).startswith("/") if not copy else True


def test_a_split_is_decided_by_seed_and_names_and_given_twice_the_same(tmp_path, capsys):
    """Whatever the order of listing or the place; another seed gives another. Seen red with sides dealt out in the
    order of the listing, and with a seed that is not used."""
    make_input(tmp_path / "in", falling=30, pendulum=30)
    assert split(tmp_path) == 0
    found, before = sides(tmp_path / "out"), contents(tmp_path / "out")
    assert split(tmp_path) == 0 and "0 videos and 0 annotations" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before and sides(tmp_path / "out") == found
    names = [name for name in found if name.startswith("falling/")]
    for order in (names, names[::-1], sorted(names, key=hash)):
        assert S.deal_out(order, {}, [0.8, 0.1, 0.1], 42) == {name: found[name] for name in names}
    assert S.deal_out(names, {}, [0.8, 0.1, 0.1], 43) != {name: found[name] for name in names}


def test_a_grown_folder_keeps_the_sides_and_the_shares(tmp_path, capsys):
    """Placed videos stay, new ones fill up to the shares, and those that went are named. Seen red with all dealt out
    anew, and with shares of the new ones only."""
    make_input(tmp_path / "in", falling=17, few=2)
    assert split(tmp_path) == 0
    before = sides(tmp_path / "out")
    assert before["few/few_000.mp4"] == before["few/few_001.mp4"] == "train"
    make_input(tmp_path / "in", falling=50, few=10)
    gone = [f"falling/falling_{number:03d}.mp4" for number in range(2, 8)]
    for name in gone:
        (tmp_path / "in" / "videos" / name).unlink()
    assert split(tmp_path) == 0
    after = sides(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    counts = counted({name: side for name, side in after.items() if name not in gone})
    assert counts["few"] == (8, 1, 1) and np.abs(np.array(counts["falling"]) - (35.2, 4.4, 4.4)).max() < 1
    told = capsys.readouterr()
    assert "6 placed videos are gone" in told.err and "falling_002.mp4" in told.err
    make_input(tmp_path / "in", falling=50)  # and it is back
    assert split(tmp_path) == 0 and sides(tmp_path / "out") == after and "gone" not in capsys.readouterr().err


def test_small_sub_folders_are_split_together(tmp_path, capsys):
    """One video in each of many folders gives a whole split, two in all train, and both are said. Seen red with small
    sub-folders sent to train one by one."""
    make_input(tmp_path / "in", **{f"trip{number}": 1 for number in range(10)})
    assert split(tmp_path) == 0
    assert Counter(sides(tmp_path / "out").values()) == {"train": 8, "val": 1, "test": 1}
    assert "fewer than 3 videos each, split together: trip0, trip1, trip2 and 7 more" in capsys.readouterr().out
    make_input(tmp_path / "two" / "in", trip=2)
    assert split(tmp_path / "two", "--ratios", "1,1,1") == 0
    assert Counter(sides(tmp_path / "two" / "out").values()) == {"train": 2}


def test_ratios_are_normalised_and_may_leave_a_side_out(tmp_path, capsys):
    """8,1,1 is 0.8,0.1,0.1; a side of 0 gets nothing. Seen red with ratios taken as they are."""
    make_input(tmp_path / "a" / "in", falling=20)
    make_input(tmp_path / "b" / "in", falling=20)
    assert split(tmp_path / "a") == 0 and split(tmp_path / "b", "--ratios", "8,1,1") == 0
    assert sides(tmp_path / "a" / "out") == sides(tmp_path / "b" / "out")
    assert "taken as 0.8,0.1,0.1" in capsys.readouterr().out
    make_input(tmp_path / "c" / "in", falling=4)
    assert split(tmp_path / "c", "--ratios", "0.5,0.5,0") == 0
    assert counted(sides(tmp_path / "c" / "out")) == {"falling": (2, 2, 0)}


def test_every_suffix_and_no_folder_named_videos(tmp_path):
    """What the loader takes for a video is split; flat files and their annotations too, and flat annotations of a
    sub-folder. Seen red with mp4, avi and mov only, and with annotations looked for in sub-folders alone."""
    for part in ("annotations", "deep"):
        (tmp_path / "in" / part).mkdir(parents=True)
    (tmp_path / "in" / "deep" / "lone.mp4").touch()
    (tmp_path / "in" / "annotations" / "lone.json").write_text('{"maneuver": "keep"}')
    for suffix in V.VIDEO_SUFFIXES:
        (tmp_path / "in" / f"clip_{suffix[1:]}{suffix.upper()}").touch()
    (tmp_path / "in" / "notes.txt").touch()
    (tmp_path / "in" / "annotations" / "clip_mkv.json").write_text('{"maneuver": "brake"}')
    assert split(tmp_path) == 0
    found = sides(tmp_path / "out")
    assert len(found) == len(V.VIDEO_SUFFIXES) + 1 and set(found.values()) == set(S.SIDES)
    for name, maneuver in (("clip_mkv.MKV", "brake"), ("deep/lone.mp4", "keep")):
        annotation = V.read_annotation(str(tmp_path / "out"), V.VideoFile(f"{found[name]}/{name}", ""))
        assert annotation == {"maneuver": maneuver}


@pytest.mark.parametrize("copy", [False, True])
def test_a_split_that_was_cut_off_goes_on_as_decided(tmp_path, monkeypatch, capsys, copy):
    """The disk fails half way, the folder grows meanwhile: what had been decided holds. Seen red with split.json
    written at the end."""
    make_input(tmp_path / "in", falling=12)
    flags = ["--copy"] if copy else []
    assert split(tmp_path, *flags) == 0
    decided = sides(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "whole")
    monkeypatch.setattr(S.os, "rename", broken_after(5, os.rename))
    assert split(tmp_path, *flags) == V.EXIT_ERROR
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "cannot be written (disk is full" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").rglob(".*"))  # half a copy, say
    make_input(tmp_path / "in", falling=30)
    assert split(tmp_path, *flags) == 0
    assert decided.items() <= sides(tmp_path / "out").items() and len(sides(tmp_path / "out")) == 30


@pytest.mark.parametrize(
    "what, flags, code, words",
    [
        ("no videos", [], 1, "no videos (found 1 .txt)"),
        ("empty", [], 1, "no videos (found no file at all)"),
        ("absent", [], 2, "no such folder"),
        ("a video", [], 2, "no such folder"),
        ("full", ["--output", "IN/out"], 2, "lies in --input"),
        ("full", ["--output", "IN"], 2, "lies in --input"),
        ("full", ["--ratios", "0.8,0.2"], 2, "--ratios '0.8,0.2': must be three numbers"),
        ("full", ["--ratios", "0,1,1"], 2, "train > 0"),
        ("full", ["--ratios", "0.8,-0.1,0.3"], 2, "none negative"),
        ("full", ["--ratios", "nan,1,1"], 2, "--ratios"),
        ("full", ["--ratios", "many"], 2, "--ratios"),
        ("full", ["--seed", "x"], 2, "--seed"),
        ("full", ["--output", "/proc/version/out"], 1, "cannot be"),
        ("other contents", [], 1, "not empty and holds no split.json"),
        ("other split", ["--seed", "1"], 1, "holds another split (seed 42, not 1)"),
        ("other split", ["--copy"], 1, "holds another split (copy False, not True)"),
        ("other report", [], 1, "holds another split (split_of None"),
        ("broken report", [], 1, "cannot be used"),
        ("own file", [], 1, "was not placed by this split"),
    ],
)
def test_bad_input_of_split_videos_is_one_line(tmp_path, capsys, what, flags, code, words):
    """Exit code and reason, and nothing written. Seen red with the checks left out."""
    folder, out = tmp_path / "in", tmp_path / "out"
    if what == "a video":
        folder.write_text("")
    elif what in ("no videos", "empty"):
        folder.mkdir()
        if what == "no videos":
            (folder / "notes.txt").touch()
    elif what != "absent":
        make_input(folder, falling=4)
    if what in ("other split", "own file"):
        assert split(tmp_path) == 0
    if what == "own file":
        (path := next((out / "train").rglob("*.mp4"))).unlink()
        path.write_text("mine")
    elif what.startswith("other") and what != "other split" or what == "broken report":
        out.mkdir()
        content = {"other contents": "mine", "other report": '{"train": []}', "broken report": "["}[what]
        (out / ("mine.txt" if what == "other contents" else "split.json")).write_text(content)
    before = contents(tmp_path)
    capsys.readouterr()
    assert split(tmp_path, *(flag.replace("IN", str(folder)) for flag in flags)) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and contents(tmp_path) == before


@pytest.mark.slow
def test_both_real_commands(tmp_path):
    """From the command line to annotations found in the split, in processes of their own. Seen red with the path of the
    script left out of theirs."""
    tool = [sys.executable, str(ROOT / "tools" / "make_videos.py"), "--out", str(tmp_path / "videos")]
    make = [*tool, "--num_videos", "3", "--num_frames", "4", "--size", "16", "--kinds", "falling,projectile"]
    cut = [sys.executable, str(ROOT / "tools" / "split_videos.py"), "--input", "videos", "--output", "split"]
    done = [subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path) for line in (make, cut)]
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 2
    assert "6 videos in" in done[0].stdout and "6 videos: train 2, val 2, test 2" in done[1].stdout
    assert counted(sides(tmp_path / "split")) == {"falling": (1, 1, 1), "projectile": (1, 1, 1)}
    for video in V.find_videos(str(tmp_path / "split"), "*"):
        assert V.read_annotation(str(tmp_path / "split"), video)["num_frames"] == 4
