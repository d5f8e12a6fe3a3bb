"""Masks and loading: sample i is a pure function of (seed, i), whoever asks, when, and through how many workers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import V, plain_config, small_config

BASE_GRID = V.VJepaAutoV2Config()  # 42 x 14 x 14 tokens


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory, scene_folder):
    """One good video, five that cannot be decoded each for its own reason -> folder."""
    folder = tmp_path_factory.mktemp("bad")
    whole = sorted((scene_folder / "videos").glob("*.mp4"))[0]
    shutil.copy(whole, folder / "good.mp4")
    (folder / "bad_empty.mp4").write_bytes(b"")
    (folder / "bad_text.mp4").write_text("no video\n" * 100)
    (folder / "bad_cut.mp4").write_bytes(whole.read_bytes()[:500])
    (folder / "bad_gone.mp4").symlink_to(folder / "absent")
    (folder / "bad_zeros.mkv").write_bytes(bytes(4096))
    return folder


def same(one, other):
    """Whether two samples or batches hold the same keys and bits."""
    assert one.keys() == other.keys()
    return all(
        torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key] for key, value in one.items()
    )


def dataset_of(folder, cfg, stream="train", maneuvers=()):
    """A dataset over all videos of a folder."""
    return V.ClipDataset(cfg, V.find_videos(str(folder), "*"), str(folder), stream, maneuvers, draw=V.mask_and_noise)


def loaded(dataset, sampler, num_workers):
    """All batches of a loader."""
    return list(V.ClipLoader(dataset, sampler, num_workers, False))


# -- masks


def draw_masks(cfg, family, count, first=0):
    """keep_idx [count, K] and mask_idx [count, M] of consecutive samples."""
    samples = [V.mask_and_noise(cfg, "train", first + number) for number in range(count)]
    return [torch.cat([sample[f"{part}_{family}"] for sample in samples]).numpy() for part in ("keep", "mask")]


@pytest.mark.parametrize("family", V.MASK_FAMILIES)
def test_masks_partition_the_grid(family):
    """1000 draws: kept and masked tokens are ascending, disjoint, together all, as many each time, none is empty.

    Seen red with the levelling of the visible count left out.
    """
    for cfg in (plain_config(), plain_config(image_size=64, patch=8), plain_config(image_size=(32, 96))):
        keep, mask = draw_masks(cfg, family, 334)  # stacking fails where counts differ
        assert keep.dtype == np.int64 and mask.dtype == np.int64
        assert keep.shape[1] == V.family_visible(cfg, family) * cfg.grid[0] > 0 and mask.shape[1] > 0
        assert (np.diff(keep, axis=1) > 0).all() and (np.diff(mask, axis=1) > 0).all()
        assert (np.sort(np.concatenate([keep, mask], 1), 1) == np.arange(cfg.num_tokens)).all()


@pytest.mark.parametrize("family", V.MASK_FAMILIES)
def test_masks_repeat_over_time_without_bias(family):
    """Every tubelet hides the same sites, hence as many early as late tokens."""
    cfg = plain_config(image_size=64)
    _, mask = draw_masks(cfg, family, 200)
    sites = mask.reshape(200, cfg.grid[0], -1)
    assert (sites - np.arange(cfg.grid[0])[:, None] * cfg.sites == sites[:, :1]).all()


@pytest.mark.parametrize("family", V.MASK_FAMILIES)
def test_masks_are_pure_and_differ_between_samples(family):
    """The same sample draws the same mask, other samples, seeds, streams others. Seen red: an unseeded generator."""
    cfg = small_config(image_size=112)
    keep, _ = draw_masks(cfg, family, 100)
    assert np.array_equal(keep[40:60], draw_masks(cfg, family, 20, first=40)[0])
    assert len({row.tobytes() for row in keep}) >= 95  # of thousands of possible masks a few may meet by chance
    assert not np.array_equal(keep[0], V.mask_and_noise(replace(cfg, seed=1), "train", 0)[f"keep_{family}"][0].numpy())
    assert not np.array_equal(keep[0], V.mask_and_noise(cfg, "val", 0)[f"keep_{family}"][0].numpy())


@pytest.mark.parametrize("family, share", [("short", 0.37), ("long", 0.16)])
def test_visible_share_of_the_block_sampler(family, share):
    """On 14 x 14 sites the union of blocks leaves 37 % visible (short) and 16 % (long), as the constant count says."""
    rng = np.random.default_rng(11)
    drawn = np.array([1 - V.block_mask(rng, *V.mask_blocks(BASE_GRID, family)).mean() for _ in range(2000)])
    # one draw deviates by about 0.07, the mean of 2000 by 0.0017: 0.01 is six of them and covers rounding in 37, 16
    assert drawn.mean() == pytest.approx(share, abs=0.01)
    # the constant is itself a mean of 2000 draws, rounded to one of 196 sites
    assert V.family_visible(BASE_GRID, family) / 196 == pytest.approx(drawn.mean(), abs=4 * 0.0017 * 2**0.5 + 0.5 / 196)


def test_asked_visible_share_is_kept():
    """short_visible and long_visible set the count, never to nothing or everything."""
    cfg = small_config(image_size=64, short_visible=0.5, long_visible=0.001)
    assert (V.family_visible(cfg, "short"), V.family_visible(cfg, "long")) == (32, 1)
    assert V.family_visible(replace(cfg, long_visible=0.99, image_size=16), "long") == 3  # of 2 x 2 sites


def test_masked_sites_are_blocks_not_salt():
    """Hidden sites hang together: their neighbours are hidden far more often than in a random mask of the same size."""
    rng = np.random.default_rng(3)
    together, apart = [], []
    for _ in range(200):
        hidden = np.zeros(196, bool)
        hidden[V.sample_mask(rng, BASE_GRID, "short")[1][: 196 - V.family_visible(BASE_GRID, "short")]] = True
        shuffled = rng.permutation(hidden)
        for values, grid in ((together, hidden.reshape(14, 14)), (apart, shuffled.reshape(14, 14))):
            values.append((grid[1:] == grid[:-1]).mean())
    # random masks agree with their neighbour in 0.63**2 + 0.37**2 = 53 % of places
    assert np.mean(together) > 0.75 and np.mean(apart) < 0.58


def test_mask_draws_and_noise_shapes():
    """mask_draws masks per family differ from one another; noise is standard, tau lies in (0, 1)."""
    cfg = small_config(image_size=64, mask_draws=3, flow_draws=5)
    sample = V.mask_and_noise(cfg, "train", 0)
    assert sample["keep_short"].shape[0] == 3 and len({row.numpy().tobytes() for row in sample["keep_short"]}) == 3
    assert sample["noise"].shape == (5, cfg.flow_tokens, cfg.flow_rank) and sample["tau"].shape == (5,)
    many = [V.mask_and_noise(cfg, "train", number) for number in range(300)]
    noise, tau = torch.stack([one["noise"] for one in many]), torch.stack([one["tau"] for one in many])
    assert 0 < tau.min() and tau.max() < 1
    # 12000 normal numbers: the mean deviates by 0.009, the deviation by 0.0065
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03


# -- samples


def test_sample_is_a_function_of_its_number(scene_folder):
    """Datasets built twice give the same bits in any order, past an epoch too; other seeds and streams others.

    Seen red with the window drawn from an unseeded generator.
    """
    cfg = small_config(crop_scale_min=0.3)
    one, two = dataset_of(scene_folder, cfg), dataset_of(scene_folder, cfg)
    numbers = [0, 3, 7, 8, 21, 1000]
    forward, backward = {n: one[n] for n in numbers}, {n: two[n] for n in numbers[::-1]}
    assert all(same(forward[n], backward[n]) for n in numbers)
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(forward[3], one[3])
    other = dataset_of(scene_folder, replace(cfg, seed=2))
    assert not torch.equal(forward[3]["noise"], other[3]["noise"]) and not torch.equal(
        forward[3]["tau"], other[3]["tau"]
    )
    assert any(not torch.equal(forward[n]["frames"], other[n]["frames"]) for n in numbers)
    assert not torch.equal(forward[3]["noise"], dataset_of(scene_folder, cfg, "val")[3]["noise"])


def test_sample_contents(scene_folder):
    """Frames are uint8 [T, 3, H, W] of the file that the sample names."""
    cfg = small_config(crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0)
    dataset = dataset_of(scene_folder, cfg)
    sample = dataset[5]
    assert (
        sample["frames"].shape == (12, 3, 32, 32)
        and sample["frames"].dtype == torch.uint8
        and sample["frames"].is_contiguous()
    )
    labels = V.read_annotation(str(scene_folder), dataset.videos[int(sample["file"])])
    frames, _ = V.scene(labels["scene_seed"], 0, cfg)
    # the whole file at its own size and rate: only H.264 stands between the two
    assert np.abs(sample["frames"].permute(0, 2, 3, 1).numpy().astype(float) - frames).mean() < 6
    assert int(sample["index"]) == 5 and sample["bad"] == []


def test_each_epoch_visits_every_file_once(scene_folder):
    """Eight samples on end read the eight files, in another order each time."""
    dataset = dataset_of(scene_folder, small_config())
    orders = [[next(dataset.candidates(epoch * 8 + number)) for number in range(8)] for epoch in range(5)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_validation_is_not_cropped_or_stretched():
    """Held-out clips keep random windows, and the largest centred crop."""
    cfg = small_config(crop_scale_min=0.2)
    plans = [V.draw_plan(np.random.default_rng(seed), cfg, "val") for seed in range(20)]
    assert {(plan.scale, plan.ratio, plan.u_x, plan.u_y) for plan in plans} == {(1.0, 1.0, 0.5, 0.5)}
    assert len({plan.u_start for plan in plans}) == 20


def test_crop_ranges_are_kept():
    """1000 draws of a training plan stay in the configured ranges and fill them."""
    cfg = small_config(crop_scale_min=0.4, crop_scale_max=0.9, crop_ratio_min=0.8, crop_ratio_max=1.25)
    plans = [V.draw_plan(np.random.default_rng(seed), cfg, "train") for seed in range(1000)]
    scales, ratios = np.array([plan.scale for plan in plans]), np.array([plan.ratio for plan in plans])
    assert 0.4 <= scales.min() < 0.41 and 0.89 < scales.max() <= 0.9
    assert 0.8 <= ratios.min() < 0.81 and 1.24 < ratios.max() <= 1.25
    assert abs(np.log(ratios).mean()) < 0.02  # even on a log scale: wide and tall crops are as likely


# -- order


@pytest.mark.parametrize("start", [0, 48])
def test_ranks_share_the_single_process_order(start):
    """Micro-step by micro-step, W ranks of batch b take together what one process with batch b*W takes.

    Seen red with each rank given a run of samples of its own.
    """
    for world_size in (1, 2, 3, 4):
        single = list(V.StepSampler(start, 5, 3 * world_size, 0, 1))
        ranks = [list(V.StepSampler(start, 5, 3, rank, world_size)) for rank in range(world_size)]
        assert [sorted(sum((batches[step] for batches in ranks), [])) for step in range(5)] == single
        assert all(
            number % world_size == (start + rank) % world_size
            for rank in range(world_size)
            for batch in ranks[rank]
            for number in batch
        )
        assert sorted(number for batches in ranks for batch in batches for number in batch) == list(
            range(start, start + 15 * world_size)
        )


def test_restart_continues_the_order():
    """A sampler started after k micro-steps gives the tail of the whole run, on each rank."""
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            whole = list(V.StepSampler(0, 10, 4, rank, world_size))
            assert list(V.StepSampler(3 * 4 * world_size, 7, 4, rank, world_size)) == whole[3:]
            assert len(V.StepSampler(0, 10, 4, rank, world_size)) == len(whole) == 10


def test_worker_count_changes_nothing(scene_folder):
    """0 and 2 workers give the same batches in the same order, and leave the global generators alone.

    Seen red with the loader's own generator left out.
    """
    dataset = dataset_of(scene_folder, small_config())
    torch.manual_seed(5)
    np.random.seed(5)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone = loaded(dataset, V.StepSampler(6, 4, 2, 0, 1), 0)
    spread = loaded(dataset, V.StepSampler(6, 4, 2, 0, 1), 2)
    assert [batch["index"].tolist() for batch in alone] == [[6, 7], [8, 9], [10, 11], [12, 13]]
    assert len(alone) == len(spread) and all(same(one, other) for one, other in zip(alone, spread, strict=True))
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(legacy, np.random.get_state()[1])


def test_collate_stacks_and_gathers():
    """Tensors are stacked, the lists of bad files joined in sample order."""
    samples = [{"x": torch.tensor([n, n]), "bad": [(f"{n}.mp4", "why")] * n} for n in range(3)]
    batch = V.collate(samples)
    assert batch["x"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["bad"] == [("1.mp4", "why"), ("2.mp4", "why"), ("2.mp4", "why")]


# -- bad files


def test_bad_files_are_replaced_and_named(bad_folder):
    """One good video among six: every sample shows it, names the bad ones met, the same way each time.

    Seen red with the replacement drawn from an unseeded generator.
    """
    cfg = small_config()
    dataset, again = dataset_of(bad_folder, cfg), dataset_of(bad_folder, cfg)
    good = [video.name for video in dataset.videos].index("good.mp4")
    bad_names = {video.name for video in dataset.videos} - {"good.mp4"}
    met = []
    for number in range(24):
        sample = dataset[number]
        assert int(sample["file"]) == good and sample["frames"].float().std() > 5
        names = [name for name, _ in sample["bad"]]
        assert set(names) <= bad_names and len(set(names)) == len(names)
        assert all(reason for _, reason in sample["bad"])
        met.append(names)
    assert all(same(dataset[number], again[number]) for number in range(23, -1, -1))
    assert {name for names in met for name in names} == bad_names
    assert len({tuple(names) for names in met}) > 6  # the order of replacement is the sample's own


def test_reasons_tell_bad_files_apart(bad_folder, tmp_path):
    """Each bad file's reason says what is wrong with it."""
    folder = tmp_path / "videos"
    shutil.copytree(bad_folder, folder, symlinks=True)
    (folder / "good.mp4").unlink()
    reasons = dict(dataset_of(folder, small_config())[0]["bad"])
    assert "0 bytes" in reasons["bad_empty.mp4"] and "cannot be read" in reasons["bad_gone.mp4"]
    assert all("cannot open" in reasons[name] for name in ("bad_text.mp4", "bad_cut.mp4", "bad_zeros.mkv"))


def test_replacement_is_the_same_in_workers(bad_folder):
    """Two workers replace as one process does, and the batch gathers the names."""
    dataset = dataset_of(bad_folder, small_config())
    alone, spread = loaded(dataset, V.StepSampler(0, 3, 3, 0, 1), 0), loaded(dataset, V.StepSampler(0, 3, 3, 0, 1), 2)
    assert all(same(one, other) for one, other in zip(alone, spread, strict=True))
    assert any(batch["bad"] for batch in alone)


def test_all_files_bad(bad_folder, tmp_path):
    """With nothing to decode the sample is zeros of the right shape, file -1, and every file is named once."""
    folder = tmp_path / "videos"
    shutil.copytree(bad_folder, folder, symlinks=True)
    (folder / "good.mp4").unlink()
    for number in range(6):
        sample = dataset_of(folder, small_config())[number]
        assert int(sample["file"]) == -1 and not sample["frames"].any() and sample["frames"].shape == (12, 3, 32, 32)
        assert sorted(name for name, _ in sample["bad"]) == sorted(path.name for path in folder.iterdir())
    assert len(V.collate([sample, sample])["bad"]) == 10


# -- labels and flips


@pytest.fixture
def labelled_folder(tmp_path, scene_folder):
    """Three videos with annotations turn_left, keep and none -> folder."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "annotations").mkdir()
    for number, path in enumerate(sorted((scene_folder / "videos").glob("*.mp4"))[:3]):
        shutil.copy(path, tmp_path / "videos" / f"{number}.mp4")
    for number, maneuver in enumerate(("turn_left", "keep")):
        (tmp_path / "annotations" / f"{number}.json").write_text(
            json.dumps({"maneuver": maneuver, "fps": 4, "speed": [1.0]})
        )
    return tmp_path


def test_hflip_mirrors_frames_and_labels(labelled_folder):
    """A flipped sample is mirrored, left and right exchanged in its label; about half are, none in validation."""
    maneuvers = ["keep", "turn_left", "turn_right"]
    plain, flipping = (
        dataset_of(labelled_folder, small_config(hflip=hflip), maneuvers=maneuvers) for hflip in (False, True)
    )
    mirrored = {"keep": "keep", "turn_left": "turn_right"}
    flips = 0
    for number in range(24):
        one, other = plain[number], flipping[number]
        label = {0: "turn_left", 1: "keep"}.get(int(one["file"]))
        flipped = not torch.equal(one["frames"], other["frames"])
        assert torch.equal(one["frames"].flip(-1) if flipped else one["frames"], other["frames"])
        wanted = mirrored[label] if flipped and label else label
        assert int(one["maneuver"]) == (maneuvers.index(label) if label else -1)
        assert int(other["maneuver"]) == (maneuvers.index(wanted) if wanted else -1)
        flips += flipped
    assert 3 <= flips <= 21  # 24 coins: four standard deviations are 9.8
    held_out = [dataset_of(labelled_folder, small_config(hflip=hflip), "val") for hflip in (False, True)]
    assert all(torch.equal(held_out[0][number]["frames"], held_out[1][number]["frames"]) for number in range(8))


def test_maneuver_names(labelled_folder):
    """All names, their mirror images, sorted, without the empty one; a list's label counts without annotation."""
    videos = V.find_videos(str(labelled_folder), "*")
    assert V.maneuver_names(videos, str(labelled_folder)) == ["keep", "turn_left", "turn_right"]
    videos[2] = replace(videos[2], label="fork_right")
    assert V.maneuver_names(videos, str(labelled_folder)) == [
        "fork_left",
        "fork_right",
        "keep",
        "turn_left",
        "turn_right",
    ]
    (labelled_folder / "annotations" / "0.json").write_text("{broken")
    assert V.maneuver_names(videos, str(labelled_folder)) == ["fork_left", "fork_right", "keep"]


@pytest.mark.parametrize(
    "label, mirrored",
    [
        ("turn_left", "turn_right"),
        ("right", "left"),
        ("lane_change_left_slow", "lane_change_right_slow"),
        ("straight", "straight"),
        ("bright", "bright"),
        ("leftover_right", "leftover_left"),
        ("", ""),
        ("turn left", "turn right"),
        ("turn-right", "turn-left"),
        ("left2", "right2"),
    ],
)
def test_mirror_label(label, mirrored):
    """left and right are exchanged as words, whatever separates them; mirroring twice changes nothing."""
    assert V.mirror_label(label) == mirrored and V.mirror_label(mirrored) == label


@pytest.mark.parametrize("text", ["{broken", "[1]", "7", '"left"', "\x00"])
def test_annotation_that_is_no_object(labelled_folder, text):
    """An annotation that is not a JSON object makes its video bad, by name: lost labels would go unnoticed."""
    (labelled_folder / "annotations" / "0.json").write_text(text)
    videos = V.find_videos(str(labelled_folder), "*")
    with pytest.raises(V.BadFile, match="annotation 0.json"):
        V.read_annotation(str(labelled_folder), videos[0])
    dataset = dataset_of(labelled_folder, small_config())
    samples = [dataset[number] for number in range(6)]
    assert all(int(sample["file"]) != 0 for sample in samples)
    assert {name for sample in samples for name, _ in sample["bad"]} == {"0.mp4"}


def test_bug_null_maneuver_is_no_label(labelled_folder):
    """A maneuver of null is none.

    Symptom: a maneuver named 'None' that all unlabelled clips share. Cause: str() of what the JSON holds.
    """
    (labelled_folder / "annotations" / "0.json").write_text('{"maneuver": null}')
    videos = V.find_videos(str(labelled_folder), "*")
    assert V.maneuver_names(videos, str(labelled_folder)) == ["keep"]
    videos[0] = replace(videos[0], label="fork_left")
    dataset = V.ClipDataset(
        small_config(), videos, str(labelled_folder), "val", V.maneuver_names(videos, str(labelled_folder))
    )
    named = {int(sample["file"]): int(sample["maneuver"]) for sample in map(dataset.__getitem__, range(6))}
    assert named == {0: 0, 1: 2, 2: -1}  # of fork_left, fork_right, keep


# -- where data comes from


def never():
    """A barrier that a single process does not wait at."""


def test_list_data(tmp_path, scene_folder):
    """No data_root: nothing is listed; an empty folder is an error only where asked for; a wrong path always is."""
    assert V.list_data(small_config()) == []
    assert len(V.list_data(small_config(data_root=str(scene_folder)))) == 8
    assert V.list_data(small_config(data_root=str(tmp_path))) == []
    with pytest.raises(V.UsageError, match="no video"):
        V.list_data(small_config(data_root=str(tmp_path), missing_data="error"))
    with pytest.raises(V.UsageError, match="no video"):
        V.list_data(small_config(data_root=str(scene_folder), video_glob="night_*", missing_data="error"))
    with pytest.raises(V.UsageError, match="absent"):
        V.list_data(small_config(data_root=str(tmp_path / "absent")))


def test_open_data_on_videos(scene_folder):
    """Listed videos are split by file, and each stream reads its side; nothing is written."""
    cfg = small_config(data_root=str(scene_folder), val_fraction=0.3, out_dir="/nonexistent")
    source = V.open_data(V.VJepaAutoV2, cfg, V.list_data(cfg), True, never)
    assert (source.kind, source.held_out, source.maneuvers) == ("videos", True, [])
    assert len(source.train) + len(source.val) == 8 and not {v.name for v in source.train} & {
        v.name for v in source.val
    }
    assert [source.dataset(cfg, stream).videos for stream in ("train", "bank", "val")] == [
        source.train,
        source.train,
        source.val,
    ]
    named = V.open_data(V.VJepaAutoV2, replace(cfg, lambda_supcon=1.0), V.list_data(cfg), True, never)
    assert set(named.maneuvers) <= set(V.SCENE_MANEUVERS) and "fork_left" in named.maneuvers


def test_open_data_with_one_video(scene_folder):
    """A single file serves both sides, and the source says so."""
    path = sorted((scene_folder / "videos").glob("*.mp4"))[0]
    cfg = small_config(data_root=str(path))
    source = V.open_data(V.VJepaAutoV2, cfg, V.list_data(cfg), True, never)
    assert not source.held_out and source.train == source.val and len(source.train) == 1
    assert source.dataset(cfg, "val")[0]["bad"] == []


def test_open_data_writes_scenes_on_rank_zero(tmp_path):
    """Without videos rank 0 writes scenes before the barrier, another rank only waits; both then see the same files."""
    cfg = small_config(out_dir=str(tmp_path), scene_clips=4)
    waited = []
    source = V.open_data(
        V.VJepaAutoV2, cfg, [], True, lambda: waited.append(len(list(tmp_path.glob("scenes/videos/*.mp4"))))
    )
    assert waited == [4] and source.kind == "scenes" and source.held_out and len(source.train + source.val) == 4
    before = (tmp_path / "scenes" / "scenes.json").stat().st_mtime_ns
    other = V.open_data(V.VJepaAutoV2, cfg, [], False, lambda: waited.append("rank 1"))
    assert waited == [4, "rank 1"] and (other.train, other.val) == (source.train, source.val)
    assert (tmp_path / "scenes" / "scenes.json").stat().st_mtime_ns == before


def test_open_data_random(tmp_path):
    """missing_data random gives pixels from (seed, i), marked as such; with videos present they are used instead."""
    cfg = small_config(data_root=str(tmp_path), missing_data="random", out_dir="/nonexistent")
    source = V.open_data(V.VJepaAutoV2, cfg, V.list_data(cfg), True, never)
    dataset = source.dataset(cfg, "train")
    assert source.kind == "random" and isinstance(dataset, V.NoiseDataset)
    one, two = dataset[3], source.dataset(cfg, "train")[3]
    assert (
        same(one, two)
        and one["frames"].shape == (12, 3, 32, 32)
        and not torch.equal(one["frames"], dataset[4]["frames"])
    )
    # even levels have a mean of 127.5 and a deviation of 74: over 36864 pixels the mean deviates by 0.4
    assert abs(one["frames"].float().mean() - 127.5) < 2
