"""Built-in driving scenes: a present that tells nothing, futures that keep their exact odds, files that hold both."""

import importlib.util
import json
import math
import multiprocessing
import os
import time
from functools import cache

import numpy as np
import pytest
import torch
from conftest import V, small_config

TINY = small_config(
    image_size=16, patch=8, num_frames=6, now_frames=2, soon_frames=2, eventually_frames=2, flow_chunks=1
)
DECODER_NAMES = [
    "pyav",
    pytest.param("decord", marks=pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord")),
]
EVALUATION_SEED = 10**16  # tools/evaluate.py takes its scenes from here upwards


def plan_of(cfg, height, width):
    """The plan that takes every frame of a written scene uncropped."""
    return V.ClipPlan(cfg.num_frames, cfg.clip_fps, height, width, 0.0, 1.0, 1.0, 0.5, 0.5)


@cache
def scene_of(kind, seed):
    """A scene of TINY, drawn once for all tests of its kind."""
    return V.draw_scene(seed, TINY, kind)


def futures(kind, count, **fixed):
    """One drawn future for each of `count` scenes whose parameters are as `fixed` says -> list of (scene, future)."""
    found, seed = [], 0
    while len(found) < count:
        scene = scene_of(kind, seed)
        if all(scene[name] == value for name, value in fixed.items()):
            found.append((scene, V.draw_future(scene, 0, seed)[0]))
        seed += 1
    return found


def future_seeds(scene_seed, cfg, kind, choices=(-1, 1)):
    """{choice: the first future seed that makes it} of a scene."""
    scene, found = V.draw_scene(scene_seed, cfg, kind), {}
    for future_seed in range(400):
        found.setdefault(V.draw_future(scene, future_seed, scene_seed)[0]["choice"], future_seed)
    return {choice: found[choice] for choice in choices}


def close_to_odds(count, total, odds):
    """Whether a count lies within four standard deviations of its expectation."""
    return abs(count - total * odds) <= 4 * math.sqrt(total * odds * (1 - odds)) + 1e-9


# -- the present


@pytest.mark.parametrize(
    "shape",
    [
        dict(image_size=48),
        dict(image_size=(32, 64), clip_fps=10),
        dict(image_size=32, clip_fps=0),
        dict(image_size=16, patch=8, num_frames=84, soon_frames=16, eventually_frames=64),
    ],
)
@pytest.mark.parametrize("kind", V.SCENE_KINDS)
def test_now_is_bit_identical_over_futures(kind, shape):
    """NOW pixels are a function of scene_seed alone, whatever the size, rate and length."""
    cfg = small_config(**shape)
    for scene_seed in range(4):
        clips = [frames for frames, _ in V.siblings(scene_seed, 3, cfg, kind)]
        for clip in clips[1:]:
            assert np.array_equal(clips[0][: cfg.now_frames], clip[: cfg.now_frames])
            assert not np.array_equal(clips[0][cfg.now_frames :], clip[cfg.now_frames :])


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_now_is_bit_identical_after_the_file(tmp_path, decoder):
    """Written to mp4 and read back, NOW still holds no bit of the branch. Seen red with look-ahead and B-frames on."""
    cfg = small_config(image_size=64)
    for scene_seed in range(3):
        read = []
        for side, future_seed in future_seeds(scene_seed, cfg, "fork").items():
            path = tmp_path / f"{scene_seed}_{side}.mp4"
            V.write_video(path, V.scene(scene_seed, future_seed, cfg, "fork")[0], cfg.clip_fps)
            read.append(np.ascontiguousarray(V.READERS[decoder](str(path), plan_of(cfg, 64, 64))))
        assert np.array_equal(read[0][: cfg.now_frames], read[1][: cfg.now_frames])
        assert not np.array_equal(read[0][cfg.now_frames :], read[1][cfg.now_frames :])


def test_scene_is_a_pure_function():
    """The same seeds give the same frames and labels; another scene seed another present."""
    one, two, other = V.scene(5, 1, TINY), V.scene(5, 1, TINY), V.scene(6, 1, TINY)
    assert np.array_equal(one[0], two[0]) and one[1] == two[1]
    assert not np.array_equal(one[0][:2], other[0][:2])


def test_the_picture_shows_the_odds():
    """The sign's colour, the lit lamp and the beacon are in the NOW frames, and nothing of that kind elsewhere."""
    cfg, signs, beacons = small_config(image_size=64), 0, {True: [], False: []}
    for scene_seed in range(30):
        now = V.scene(scene_seed, 0, cfg, "fork")[0][: cfg.now_frames].astype(int)
        colour = np.array(V.SIGN_COLOURS[V.scene_odds(scene_seed, cfg, "fork")["right"]])
        signs += bool((np.abs(now - colour).max(-1) <= 14).sum() >= 3)  # sky noise has a deviation of 4
        scene = V.draw_scene(scene_seed, cfg, "lane")
        corner = V.scene(scene_seed, 0, cfg, "lane")[0][0, -1]
        lit = {name: corner[column].tolist() == [70, 255, 90] for name, column in (("left", 0), ("right", -1))}
        assert lit == {name: scene["indicator"] == name for name in lit}
        now = V.scene(scene_seed, 0, cfg, "brake")[0][: cfg.now_frames, 20:36, 24:44].astype(int)
        beacons[V.draw_scene(scene_seed, cfg, "brake")["beacon"]].append(np.abs(now - (255, 180, 0)).max(-1).min())
    assert signs >= 26  # a tree or an oncoming car may hide one
    assert np.median(beacons[True]) < 60 < np.median(beacons[False])


def test_seeds_of_training_validation_and_evaluation_never_meet():
    """The ranges of two streams, two run seeds and the evaluation are apart for any realistic number of clips."""
    largest = V.merged(V.VJepaAutoV2Config, "RANGES")["seed"][1]
    last = [
        V.scene_seed_at(small_config(seed=seed), 10**6, stream)
        for stream in ("train", "val")
        for seed in (0, 1, largest)
    ]
    first = [
        V.scene_seed_at(small_config(seed=seed), 0, stream) for stream in ("train", "val") for seed in (0, 1, largest)
    ]
    assert all(a < b for a, b in zip(last[:-1], first[1:])) and last[-1] < EVALUATION_SEED


# -- the odds


def test_forks_keep_the_odds_of_their_sign():
    """Sign by sign the share of right branches is its probability; half is the common case."""
    drawn = futures("fork", 4000)
    for odds in set(V.FORK_ODDS):
        sides = [future["choice"] for scene, future in drawn if scene["prob"] == odds]
        assert set(sides) == {-1, 1} and close_to_odds(sides.count(1), len(sides), odds)
        assert close_to_odds(len(sides), len(drawn), V.FORK_ODDS.count(odds) / len(V.FORK_ODDS))


@pytest.mark.parametrize("indicator", V.LANE_ODDS)
def test_lane_changes_keep_the_odds_of_the_indicator(indicator):
    """Left, keep and right as often as LANE_ODDS says, never where it says 0."""
    drawn = [future["choice"] for _, future in futures("lane", 1500, indicator=indicator)]
    for choice, odds in zip((-1, 0, 1), V.LANE_ODDS[indicator]):
        assert close_to_odds(drawn.count(choice), len(drawn), odds)


@pytest.mark.parametrize("beacon", [True, False])
def test_braking_starts_at_its_hazard_rate(beacon):
    """The starts are exponential: Kolmogorov's distance to the law stays below its 1e-4 quantile."""
    starts = np.sort([future["brake_at"] for _, future in futures("brake", 2000, beacon=beacon)])
    law = 1 - np.exp(-V.HAZARDS[beacon] * starts)
    assert np.abs(law - (np.arange(2000) + 0.5) / 2000).max() < 2.23 / math.sqrt(2000)


def test_stops_and_mixes_keep_their_odds():
    """Cars stop behind the truck in STOP_ODDS of the cases; kinds of scenes come in the shares of scene_mix."""
    stops = [future["stops"] for _, future in futures("occluder", 2000)]
    assert close_to_odds(sum(stops), 2000, V.STOP_ODDS)
    kinds = [V.draw_scene(seed, TINY)["kind"] for seed in range(2000)]
    for kind, share in zip(V.SCENE_KINDS, V.mix_shares("default")):
        assert close_to_odds(kinds.count(kind), 2000, share)
    only = small_config(scene_mix="fork_only")
    assert {V.draw_scene(seed, only)["kind"] for seed in range(50)} == {"fork"}
    assert V.mix_shares("fork=3,brake=1") == [0.75, 0.25, 0, 0, 0, 0]


def test_scene_odds_names_every_open_event():
    """The API's odds are those that the draws keep; the chance to brake within SOON follows from rate and length."""
    for seed in range(20):
        assert V.scene_odds(seed, TINY, "fork") == {"kind": "fork", "right": V.draw_scene(seed, TINY, "fork")["prob"]}
        left, keep, right = V.LANE_ODDS[V.draw_scene(seed, TINY, "lane")["indicator"]]
        assert V.scene_odds(seed, TINY, "lane") == {"kind": "lane", "left": left, "keep": keep, "right": right}
        odds = V.scene_odds(seed, TINY, "brake")
        assert odds["brake_in_soon"] == pytest.approx(1 - math.exp(-odds["hazard"] * TINY.soon_frames / TINY.clip_fps))
    assert V.scene_odds(3, TINY)["kind"] == V.draw_scene(3, TINY)["kind"]


@pytest.mark.parametrize("mix", ["forks=1", "fork=a", "fork=0", "fork=-1,brake=2", "", "fork=inf"])
def test_bad_mixes_are_refused(mix):
    """One line that names the field."""
    with pytest.raises(V.UsageError, match="scene_mix"):
        V.validate_config(small_config(scene_mix=mix))


# -- the future


def test_branch_changes_the_pixels_after_now():
    """Left and right differ clearly once the roads part."""
    cfg = small_config(image_size=48)
    for scene_seed in range(5):
        left, right = (
            V.scene(scene_seed, future_seed, cfg, "fork")[0].astype(float)
            for future_seed in future_seeds(scene_seed, cfg, "fork").values()
        )
        assert np.abs(left - right).mean((1, 2, 3))[-4:].mean() > 8  # noise on the sky alone gives 2


def test_steady_scenes_have_one_future():
    """Below the horizon two futures are equal, bit for bit; above it they differ by noise alone."""
    cfg = small_config(image_size=32)
    for scene_seed in range(6):
        (one, labels), (two, _) = V.siblings(scene_seed, 2, cfg, "steady")
        ground = int(np.ceil(V.HORIZON * 32 - 0.5))
        assert labels["maneuver"] == "keep" and np.array_equal(one[:, ground:], two[:, ground:])
        assert np.abs(one.astype(int) - two).max() < 50  # the difference of two noises of deviation 4


def test_brake_scenes_differ_in_the_braking_alone():
    """Before either of two futures brakes their labels are equal; the gap then falls and stays above 3 m."""
    for scene_seed in range(40):
        (_, one), (_, two) = V.siblings(scene_seed, 2, small_config(image_size=16, patch=8), "brake")
        times = (np.arange(12) - 3) / 4
        quiet = times < min(
            value if value is not None else math.inf for value in (one["brake_time"], two["brake_time"])
        )
        assert np.allclose(np.array(one["lead_gap"])[quiet], np.array(two["lead_gap"])[quiet])
        assert (one["maneuver"] == "brake") == (one["brake_time"] is not None)


def test_the_truck_hides_the_passing_car():
    """In most scenes the car's paint is seen, hardly so while labelled hidden, and again after unless it stops."""
    cfg = small_config(image_size=96, num_frames=20, soon_frames=8, eventually_frames=8)
    hidden = emerged = checked = 0
    for scene_seed in range(30):
        frames, labels = V.scene(scene_seed, 0, cfg, "occluder")
        stops = V.draw_future(V.draw_scene(scene_seed, cfg, "occluder"), 0, scene_seed)[0]["stops"]
        out = [u is not None and u < 0.45 for u in labels["mover_u"]]
        hidden += "hidden" in labels["event"]
        emerged += any(out[cfg.now_frames : cfg.now_frames + cfg.soon_frames]) != stops
        checked += 1
    assert hidden == checked and emerged >= checked - 2


@pytest.mark.parametrize("twin", V.TWIN_KINDS)
def test_twins_break_physics_once(twin):
    """Equal to the possible clip, bit for bit, up to break_frame; different in SOON after it."""
    cfg, seen = small_config(image_size=48, num_frames=20, soon_frames=8, eventually_frames=8), 0
    for scene_seed in range(12):
        if twin == "pass_through" and not V.scene_odds(scene_seed, cfg, "steady")["barrier"]:
            with pytest.raises(ValueError, match="barrier"):
                V.scene(scene_seed, 0, cfg, "steady", twin)
            continue
        possible, _ = V.scene(scene_seed, 0, cfg, "steady")
        impossible, labels = V.scene(scene_seed, 0, cfg, "steady", twin)
        start = labels["break_frame"]
        assert cfg.now_frames <= start < cfg.now_frames + cfg.soon_frames and labels["twin"] == twin
        assert np.array_equal(possible[:start], impossible[:start])
        assert not np.array_equal(
            possible[start : cfg.now_frames + cfg.soon_frames], impossible[start : cfg.now_frames + cfg.soon_frames]
        )
        seen += 1
    assert seen >= 2


def test_twins_of_other_scenes_are_refused():
    """Only steady scenes have an exact future to break."""
    for kind in set(V.SCENE_KINDS) - {"steady"}:
        with pytest.raises(ValueError, match="steady"):
            V.scene(0, 0, TINY, kind, "vanish")
    with pytest.raises(ValueError, match="one of"):
        V.scene(0, 0, TINY, "steady", "melt")


# -- labels and files


@pytest.mark.parametrize("kind", V.SCENE_KINDS)
def test_labels_are_complete_and_consistent(kind):
    """Signals as long as the clip, finite or None, in agreement with each other: speed is the distance's rate, turns
    have the branch's sign, a lane change ends a lane further, and no car is driven through, in 21 s as in 5 s."""
    long = dict(num_frames=84, soon_frames=16, eventually_frames=64)
    for scene_seed in range(40):
        cfg = small_config(image_size=16, patch=8, **(long if scene_seed % 4 == 0 else {}))
        frames, labels = V.scene(scene_seed, 3, cfg, kind)
        assert frames.shape == (cfg.num_frames, 16, 16, 3) and frames.dtype == np.uint8
        assert (
            json.loads(json.dumps(labels)) == labels
            and labels["kind"] == kind
            and labels["maneuver"] in V.SCENE_MANEUVERS
        )
        for name in ("speed", "yaw_rate", "steer", "lane_offset", "accel"):
            assert len(labels[name]) == cfg.num_frames and np.isfinite(labels[name]).all()
        for name in ("lead_gap", "mover_u", "mover_depth", "event"):
            assert len(labels[name]) == cfg.num_frames
        gaps = [gap for gap in labels["lead_gap"] if gap is not None]
        assert all(gap >= 3 for gap in gaps) and (bool(gaps) or kind not in ("brake",))
        turn = np.array(labels["yaw_rate"])
        assert (turn[: cfg.now_frames] == 0).all() and np.abs(turn).max() < 1.0 and min(labels["speed"]) > 0.5
        if kind in V.FORKS:
            assert (np.sign(turn[np.abs(turn) > 0.01]) == labels["branch"]).all() and labels[
                "maneuver"
            ] == f"fork_{'left' if labels['branch'] < 0 else 'right'}"
        if kind == "lane" and cfg.num_frames == 84:
            ends = {"lane_change_left": -3.5, "keep": 0.0, "lane_change_right": 3.5}[labels["maneuver"]]
            assert labels["lane_offset"][-1] == pytest.approx(ends, abs=1.2)


def test_speed_is_the_rate_of_the_way():
    """Between two frames the car covers the mean of their speeds."""
    cfg = small_config(num_frames=20, soon_frames=8, eventually_frames=8)
    times = np.arange(20) / 4
    for kind in V.SCENE_KINDS:
        for scene_seed in range(10):
            scene = V.draw_scene(scene_seed, cfg, kind)
            future, _ = V.draw_future(scene, 0, scene_seed)
            pose = V.ego_path(scene, future, times, times - times[3], 40.0)
            way = np.diff(pose["s"])
            assert (
                np.abs(way - (pose["speed"][1:] + pose["speed"][:-1]) / 8).max() < 0.3
            )  # a braking that starts between two frames


def test_scene_size_and_shape():
    """scene_size sets the short side, sides are even, and a config of two sides keeps its shape."""
    frames, _ = V.scene(0, 0, small_config(image_size=(16, 32), patch=8, scene_size=24))
    assert frames.shape[1:3] == (24, 48)
    frames, _ = V.scene(0, 0, small_config(scene_size=33))
    assert frames.shape[1] % 2 == 0 and abs(frames.shape[1] - 33) <= 1


def test_files_hold_the_frames(tmp_path):
    """Through the mp4 and back: every frame at its place, with a mean error of a few grey levels."""
    cfg = small_config(image_size=96)
    frames, _ = V.scene(0, 0, cfg, "fork")
    V.write_video(tmp_path / "scene.mp4", frames, cfg.clip_fps)
    read = V.read_frames(str(tmp_path / "scene.mp4"), plan_of(cfg, 96, 96), "auto").astype(float)
    errors = np.abs(read[:, None] - frames[None].astype(float)).mean((2, 3, 4))
    assert (errors.argmin(1) == np.arange(cfg.num_frames)).all()
    # crf 16 alone leaves about one level; halved colour resolution costs the rest on sharp coloured edges
    assert np.diag(errors).max() < 4


def test_rendered_and_written_scenes_agree(scene_folder):
    """Sample i drawn on the fly is file i up to the codec, same labels; two epochs of drawing never repeat a scene."""
    cfg = small_config(scenes="render")
    source = V.open_data(V.VJepaAutoV2, cfg, [], True, lambda: None)
    data = source.dataset(cfg, "train")
    for index in range(cfg.scene_clips):
        drawn, _, labels, bad, _ = data.decode(index, cfg.height, cfg.width)
        read = V.read_frames(
            str(scene_folder / "videos" / f"scene_{index:06d}.mp4"), plan_of(cfg, cfg.height, cfg.width), "auto"
        )
        error = np.square(drawn.astype(float) - read).mean()
        assert 10 * np.log10(255**2 / error) > 26 and bad == []
        assert labels == json.loads((scene_folder / "annotations" / f"scene_{index:06d}.json").read_text())
    seeds = [V.scene_seed_at(cfg, index) for index in range(3 * cfg.scene_clips)]
    assert len(set(seeds)) == len(seeds)
    assert not np.array_equal(data.decode(0, 32, 32)[0], data.decode(cfg.scene_clips, 32, 32)[0])
    assert not np.array_equal(data.decode(0, 32, 32)[0], source.dataset(cfg, "val").decode(0, 32, 32)[0])


def test_rendered_scenes_are_mirrored_with_their_maneuver():
    """hflip turns half of the training clips, and left into right; validation stays as it is."""
    cfg = small_config(scenes="render", hflip=True, lambda_supcon=1.0, scene_mix="fork_only")
    plain = small_config(scenes="render", lambda_supcon=1.0, scene_mix="fork_only")
    sources = [V.open_data(V.VJepaAutoV2, c, [], True, lambda: None) for c in (cfg, plain)]
    flipped, straight = (source.dataset(c, "train") for source, c in zip(sources, (cfg, plain)))
    turned = 0
    for index in range(16):
        one, two = flipped[index], straight[index]
        if not torch.equal(one["frames"], two["frames"]):
            assert torch.equal(one["frames"], two["frames"].flip(-1))
            names = [V.SCENE_MANEUVERS[int(sample["maneuver"])] for sample in (one, two)]
            assert names[0] == V.mirror_label(names[1]) != names[1]
            turned += 1
    assert 2 <= turned <= 14
    val = [source.dataset(c, "val")[0]["frames"] for source, c in zip(sources, (cfg, plain))]
    assert torch.equal(*val)


def test_annotations_are_read_back(scene_folder):
    """Every written video finds its annotation, with the labels that its seeds give."""
    cfg = small_config()
    videos = V.find_videos(str(scene_folder), "*")
    assert len(videos) == cfg.scene_clips
    for video in videos:
        annotation = V.read_annotation(str(scene_folder), video)
        _, labels = V.scene(annotation["scene_seed"], annotation["future_seed"], cfg)
        assert annotation == labels
    assert len({V.read_annotation(str(scene_folder), video)["scene_seed"] for video in videos}) == cfg.scene_clips


def contents(folder):
    """{path below a folder: (bytes, time of change)} of all its files."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_write_scenes_once_per_setting(tmp_path):
    """A second call changes nothing, another setting takes a folder of its own, a writing that was cut short goes
    on."""
    folder, cfg = tmp_path / "scenes", small_config(image_size=16, patch=8, scene_clips=4)
    V.write_scenes(folder, cfg)
    before = contents(folder)
    assert len(before) == 9  # 4 videos, 4 annotations, the setting
    V.write_scenes(folder, small_config(image_size=16, patch=8, scene_clips=4, steps=999))
    assert contents(folder) == before
    other = small_config(image_size=16, patch=8, scene_clips=3, seed=7)
    place = V.write_scenes(folder, other)
    after = contents(place)
    assert contents(folder) == before and place.parent == folder.parent and len(after) == 7
    assert after["videos/scene_000000.mp4"][0] != before["videos/scene_000000.mp4"][0]
    (place / "videos" / "scene_000001.mp4").unlink()  # as after a kill: a file has its name when it is whole
    (place / "videos" / ".scene_000001.mp4.0123456789abcdef.tmp").write_bytes(b"half a vid")
    assert V.write_scenes(folder, other) == place and V.write_scenes(folder, cfg) == folder
    again = {name: data for name, (data, _) in contents(place).items() if not name.endswith(".tmp")}
    assert again == {name: data for name, (data, _) in after.items()} and contents(folder) == before


def helped(folder, own):
    """Wait until more scenes stand than this process wrote itself."""
    deadline = time.monotonic() + 20
    while len(list((folder / "helped/annotations").glob("*.json"))) <= own:
        assert time.monotonic() < deadline, "no helper wrote anything"
        time.sleep(0.01)
    return True


def test_scenes_that_helpers_write_are_the_same(tmp_path, monkeypatch):
    """Two helpers and the process itself write the bytes of one process; a stop ends them between two scenes, and the
    next call goes on. Seen red with helpers that drew a scene of another index."""
    cfg, asked, pids = V.replace(TINY, scene_clips=64, num_workers=2), [], []
    real = V.write_scene
    monkeypatch.setattr(V, "write_scene", lambda *args: pids.append(os.getpid()) or real(*args))
    monkeypatch.setattr(V, "usable_cores", lambda: 1)
    V.write_scenes(tmp_path / "alone", cfg)
    assert len(pids) == 64
    monkeypatch.setattr(V, "usable_cores", lambda: 8)
    with pytest.raises(V.Stopped):
        V.write_scenes(tmp_path / "helped", cfg, lambda: asked.append(1) or len(asked) > 5 and helped(tmp_path, 5))
    assert not multiprocessing.active_children() and not list((tmp_path / "helped").rglob(".*"))
    V.write_scenes(tmp_path / "helped", cfg)
    one, several = (contents(tmp_path / name) for name in ("alone", "helped"))
    assert {name: data for name, (data, _) in one.items()} == {name: data for name, (data, _) in several.items()}


def test_scene_file_name_matches_annotation(scene_folder):
    """One annotation per video, of the same name, valid JSON without NaN."""
    for path in sorted((scene_folder / "videos").glob("*.mp4")):
        text = (scene_folder / "annotations" / f"{path.stem}.json").read_text()
        assert "NaN" not in text and json.loads(text)["fps"] == 4.0
