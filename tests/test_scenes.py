"""Built-in driving scenes: a present that tells nothing, a future that keeps the odds, files that hold both."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import V, small_config

TINY = small_config(image_size=16, patch=8, num_frames=6, now_frames=2, soon_frames=2, eventually_frames=2, flow_chunks=1)
DECODER_NAMES = ["pyav", pytest.param("decord", marks=pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="no decord"))]


def fork_seeds(count, prob=None):
    """The first scene seeds whose road forks, with the given odds if any."""
    found, seed = [], 0
    while len(found) < count:
        params = V.draw_scene(seed)
        if params["is_fork"] and prob in (None, params["prob"]):
            found.append(seed)
        seed += 1
    return found


def both_branches(scene_seed, cfg):
    """One left and one right future of a forking scene -> {-1: frames, 1: frames}."""
    found = {}
    for future_seed in range(200):
        frames, labels = V.scene(scene_seed, future_seed, cfg)
        found.setdefault(labels["branch"], frames)
        if len(found) == 2:
            return found
    raise AssertionError(f"scene {scene_seed} shows one branch only in 200 futures")


def plan_of(cfg, height, width):
    """The plan that takes every frame of a written scene uncropped."""
    return V.ClipPlan(cfg.num_frames, cfg.clip_fps, height, width, 0.0, 1.0, 1.0, 0.5, 0.5)


# -- the present


def test_now_is_bit_identical_over_futures():
    """NOW pixels are a function of scene_seed alone.

    Seen red with the car ahead drawn on the future's branch, and with NOW's noise drawn from the future.
    """
    cfg = small_config(image_size=48)
    for scene_seed in range(25):
        first, _ = V.scene(scene_seed, 0, cfg)
        for future_seed in (1, 2, 3):
            other, _ = V.scene(scene_seed, future_seed, cfg)
            assert np.array_equal(first[: cfg.now_frames], other[: cfg.now_frames])
            assert not np.array_equal(first[cfg.now_frames :], other[cfg.now_frames :])


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_now_is_bit_identical_after_the_file(tmp_path, decoder):
    """Written to mp4 and read back, NOW still holds no bit of the branch. Seen red with the encoder's look-ahead and B-frames on."""
    cfg = small_config(image_size=64)
    for scene_seed in fork_seeds(4):
        read = []
        for branch, frames in both_branches(scene_seed, cfg).items():
            path = tmp_path / f"{scene_seed}_{branch}.mp4"
            V.write_video(path, frames, cfg.clip_fps)
            read.append(np.ascontiguousarray(V.READERS[decoder](str(path), plan_of(cfg, 64, 64))))
        assert np.array_equal(read[0][: cfg.now_frames], read[1][: cfg.now_frames])
        assert not np.array_equal(read[0][cfg.now_frames :], read[1][cfg.now_frames :])


def test_scene_is_a_pure_function():
    """The same seeds give the same frames and labels; another scene seed another present."""
    one, two, other = V.scene(5, 1, TINY), V.scene(5, 1, TINY), V.scene(6, 1, TINY)
    assert np.array_equal(one[0], two[0]) and one[1] == two[1]
    assert not np.array_equal(one[0][:2], other[0][:2])


def test_present_of_a_fork_shows_its_odds():
    """Two forks that differ in their odds only differ in the sign's colour: the present tells how likely each branch is."""
    cfg = small_config(image_size=64)
    seen = 0
    for scene_seed in fork_seeds(20):
        frames, labels = V.scene(scene_seed, 0, cfg)
        colour = np.array(V.SIGN_COLOURS[labels["prob"]])
        seen += bool((np.abs(frames[: cfg.now_frames].astype(int) - colour).max(-1) <= 12).sum() >= 2)  # sky noise has a deviation of 3
    # the sign stands some 15 m ahead in the last NOW frame; a tree or a car may hide it now and then
    assert seen >= 17


# -- the future


def test_branches_keep_the_odds_of_their_sign(monkeypatch):
    """Over 2000 futures the share of right branches is the sign's probability, sign by sign; painting is left out."""
    monkeypatch.setattr(V, "draw_objects", lambda *_: None)
    monkeypatch.setattr(V, "paint_ground", lambda scene, pose, height, width, fork_at: np.zeros((len(pose[0]), height, width, 3), np.float32))
    for prob in sorted(set(V.FORK_ODDS)):
        seeds = fork_seeds(8, prob)
        sides = np.array([V.scene(seeds[number % 8], number, TINY)[1]["branch"] for number in range(400)])
        assert set(sides) == {-1, 1}
        # five signs of 400 futures; four standard deviations of a share, so one false alarm in 3000 sets of seeds
        assert abs((sides == 1).mean() - prob) < 4 * np.sqrt(prob * (1 - prob) / 400)


def test_written_scenes_keep_the_odds(monkeypatch):
    """One future per scene, as written to disk: over 2000 scenes each sign's share holds too, and 70 % of the roads fork."""
    monkeypatch.setattr(V, "draw_objects", lambda *_: None)
    monkeypatch.setattr(V, "paint_ground", lambda scene, pose, height, width, fork_at: np.zeros((len(pose[0]), height, width, 3), np.float32))
    labels = [V.scene(seed, 0, TINY)[1] for seed in range(2000)]
    forks = [row for row in labels if row["branch"]]
    assert abs(len(forks) / 2000 - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 2000)
    for prob in set(V.FORK_ODDS):
        sides = np.array([row["branch"] for row in forks if row["prob"] == prob])
        assert len(sides) > 100
        assert abs((sides == 1).mean() - prob) < 4 * np.sqrt(prob * (1 - prob) / len(sides))


def test_branch_changes_the_pixels_after_now():
    """Left and right differ more from SOON on than two futures of the same branch do, and not at all before."""
    cfg = small_config(image_size=48)
    for scene_seed in fork_seeds(5):
        left, right = (frames.astype(float) for _, frames in sorted(both_branches(scene_seed, cfg).items()))
        gap = np.abs(left - right).mean((1, 2, 3))
        assert (gap[: cfg.now_frames] == 0).all()
        # noise of deviation 3 on the sky alone gives less than 2 grey levels; the roads part within a second of the last NOW frame
        assert gap[-4:].mean() > 8


def test_straight_roads_have_one_future():
    """Where the road does not fork every future keeps the lane, and only noise differs."""
    seeds = [seed for seed in range(40) if not V.draw_scene(seed)["is_fork"]]
    for seed in seeds[:5]:
        one, labels = V.scene(seed, 0, TINY)
        two, _ = V.scene(seed, 1, TINY)
        assert (labels["maneuver"], labels["branch"], labels["prob"]) == ("keep", 0, 0.0)
        assert np.abs(one.astype(int) - two).max() < 40  # the difference of two noises of deviation 3


# -- labels and files


def test_labels_are_finite_complete_and_signed():
    """Per-frame signals are as long as the clip; yaw rate and steering share the branch's sign and vanish up to NOW's end."""
    cfg = small_config(image_size=16, patch=8)
    sides = set()
    for scene_seed in range(60):
        frames, labels = V.scene(scene_seed, 3, cfg)
        assert frames.shape == (cfg.num_frames, 16, 16, 3) and frames.dtype == np.uint8
        for name in ("speed", "yaw_rate", "steer", "lane_offset"):
            assert len(labels[name]) == cfg.num_frames and np.isfinite(labels[name]).all()
        assert labels["maneuver"] == {0: "keep", 1: "fork_right", -1: "fork_left"}[labels["branch"]]
        assert labels["fps"] == cfg.clip_fps and 9 <= labels["speed"][0] <= 15
        for name in ("yaw_rate", "steer"):
            signal = np.array(labels[name])
            assert (signal[: cfg.now_frames] == 0).all()
            assert (np.sign(signal[signal != 0]) == labels["branch"]).all()
            assert labels["branch"] == 0 or signal.any()
        assert np.abs(labels["yaw_rate"]).max() < 0.6  # rad/s: curvature 0.028 at 15 m/s is 0.42
        assert np.abs(labels["lane_offset"]).max() < 0.5
        sides.add(labels["branch"])
    assert sides == {-1, 0, 1}


def test_scene_size_and_shape():
    """scene_size sets the short side, sides are even, and a config of two sides keeps its shape."""
    frames, _ = V.scene(0, 0, small_config(image_size=(16, 32), patch=8, scene_size=24))
    assert frames.shape[1:3] == (24, 48)
    frames, _ = V.scene(0, 0, small_config(scene_size=33))
    assert frames.shape[1] % 2 == 0 and abs(frames.shape[1] - 33) <= 1


def test_files_hold_the_frames(tmp_path):
    """Through the mp4 and back: every frame at its place, with a mean error of a few grey levels."""
    cfg = small_config(image_size=96)
    frames, _ = V.scene(fork_seeds(1)[0], 0, cfg)
    V.write_video(tmp_path / "scene.mp4", frames, cfg.clip_fps)
    read = V.read_frames(str(tmp_path / "scene.mp4"), plan_of(cfg, 96, 96), "auto").astype(float)
    errors = np.abs(read[:, None] - frames[None].astype(float)).mean((2, 3, 4))
    assert (errors.argmin(1) == np.arange(cfg.num_frames)).all()
    # crf 16 alone leaves about one level; halved colour resolution costs the rest on sharp coloured edges
    assert np.diag(errors).max() < 4


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
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_write_scenes_once_per_setting(tmp_path):
    """A second call changes nothing; another setting, or a writing that was cut short, writes all anew and leaves no old file."""
    folder, cfg = tmp_path / "scenes", small_config(image_size=16, patch=8, scene_clips=4)
    V.write_scenes(folder, cfg)
    before = contents(folder)
    assert len(before) == 9  # 4 videos, 4 annotations, the setting
    V.write_scenes(folder, small_config(image_size=16, patch=8, scene_clips=4, steps=999))
    assert contents(folder) == before
    V.write_scenes(folder, small_config(image_size=16, patch=8, scene_clips=3, seed=7))
    after = contents(folder)
    assert len(after) == 7
    assert after["videos/scene_000000.mp4"][0] != before["videos/scene_000000.mp4"][0]
    (folder / "scenes.json").unlink()
    (folder / "videos" / "scene_000001.mp4").write_bytes(b"half a vid")
    V.write_scenes(folder, small_config(image_size=16, patch=8, scene_clips=3, seed=7))
    assert {name: data for name, (data, _) in contents(folder).items()} == {name: data for name, (data, _) in after.items()}


def test_scene_file_name_matches_annotation(scene_folder):
    """One annotation per video, of the same name, valid JSON without NaN."""
    for path in sorted((scene_folder / "videos").glob("*.mp4")):
        text = (scene_folder / "annotations" / f"{path.stem}.json").read_text()
        assert "NaN" not in text and json.loads(text)["fps"] == 4.0
