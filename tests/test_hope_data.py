"""Feature folders: what a sample is, which clips train, and what is said of bad ones."""

import json
import re
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, V, small_config
from training import new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))
import cache_latents as C
import make_pushes as P

H = sys.modules[V.import_world(ROOT / "worlds" / "hope.py", "Hope").__module__]

SIZES = dict(feature_dim=5, grid_high=2, grid_wide=3, num_timesteps=3, action_dim=2)


@dataclass
class Config(V.RunConfig):
    """The fields that the Dataset reads."""

    feature_map: str = "tiny"
    feature_dim: int = 5
    grid_high: int = 2
    grid_wide: int = 3
    num_timesteps: int = 3
    action_dim: int = 2
    use_extrinsics: bool = False
    clip_start: int = -1
    clip_end: int = -1
    test_fraction: float = 0.2
    val_fraction: float = 0.2
    decode_timeout_s: float = 0.1


class Tell(V.World):
    """A world without memory that says how large the features are."""

    Config, Dataset, KEYS = Config, H.FeatureClips, {"loss_size": "mean square of the features"}

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return self.weigh({"loss_size": (self.scale * batch["features"]).square().mean()}), {}, {}


def write_clip(root, number, frames=4, actions=None, form=2, kind=np.float32, **beside):
    """A clip whose number in frame t, patch n, channel d is 100 t + n + d / 10; action t is (t, number)."""
    t, n, d = np.ogrid[:frames, :6, :5]
    features = (100 * t + n + d / 10).astype(kind)
    shape = {2: (-1, 5), 3: (frames, 6, 5), 4: (frames, 2, 3, 5)}[form]
    folder = root / f"clip_{number:05d}"
    (folder / "feature_maps").mkdir(parents=True)
    (folder / "actions_states").mkdir()
    np.save(folder / "feature_maps" / "tiny.npy", features.reshape(shape))
    rows = frames - 1 if actions is None else actions
    beside = {"actions": np.stack([np.arange(rows), np.full(rows, number)], 1).astype(kind), **beside}
    for name, values in beside.items():
        np.save(folder / "actions_states" / f"{name}.npy", values)
    return folder


def config(root, **fields):
    return Config(data_root=str(root), out_dir=str(root / "run"), num_workers=0, device="cpu", **fields)


def listed(cfg):
    return V.list_data(cfg, H.FeatureClips)


def opened(cfg):
    return V.open_data(Tell, cfg, listed(cfg), True, None)


def ids(clips):
    return [H.clip_id(clip, "tiny") for clip in clips]


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten clips of four latents, one more of another map's name."""
    root = tmp_path_factory.mktemp("ten")
    for number in range(10, 20):
        write_clip(root, number)
    (root / "clip_00099" / "feature_maps").mkdir(parents=True)
    np.save(root / "clip_00099" / "feature_maps" / "other.npy", np.zeros((4, 6, 5), np.float32))
    return root


def test_three_forms_give_the_same_sample(tmp_path):
    """[T*N, D], [T, N, D], [T, H, W, D], single and half precision: the same numbers, every action in its place."""
    for number, (form, kind) in enumerate([(2, np.float32), (3, np.float16), (4, np.float64)]):
        write_clip(tmp_path, number, form=form, kind=kind)
    cfg = config(tmp_path, test_fraction=0.0, val_fraction=0.0)
    clips = listed(cfg)
    data = H.FeatureClips(cfg, clips, cfg.data_root, "val")
    for number, clip in enumerate(clips):
        found = data.read_file(clip, 0.0)
        data.check_form(found)
        # 305.4 at half precision is off by up to 2^-3
        torch.testing.assert_close(found["features"][3, 5], torch.arange(5) / 10 + 305, rtol=0, atol=0.13)
        torch.testing.assert_close(found["features"][1, 2], torch.arange(5) / 10 + 102, rtol=0, atol=0.04)
        assert found["actions"].tolist() == [[0, number], [1, number], [2, number]]
        assert found["states"].tolist() == [[0, 0]] * 3


def test_the_window_of_a_long_clip(tmp_path):
    """Drawn by (seed, i) in training, the first one elsewhere; actions, states and extrinsics move with it, and a row
    per latent is as good as one per step. Seen red with a window that did not move the actions."""
    steps = np.arange(9, dtype=np.float32)
    more = dict(states=np.stack([steps, -steps], 1)[:8], extrinsics=steps[:, None])
    write_clip(tmp_path, 3, frames=9, actions=9, **more)
    cfg = config(tmp_path, test_fraction=0.0, val_fraction=0.0, use_extrinsics=True)
    source = opened(cfg)
    starts = []
    for index in range(40):
        sample = source.dataset(cfg, "train")[index]
        first = int(sample["features"][0, 0, 0]) // 100
        starts.append(first)
        steps = [first, first + 1, first + 2]
        assert sample["features"][:, 0, 0].tolist() == [100.0 * step for step in [*steps, first + 3]]
        assert sample["actions"][:, 0].tolist() == steps == sample["extrinsics"][:, 0].tolist()
        assert sample["states"].tolist() == [[step, -step] for step in steps]
    assert set(starts) == set(range(6))
    assert starts == [int(source.dataset(cfg, "train")[i]["features"][0, 0, 0]) // 100 for i in range(40)]
    assert all(source.dataset(cfg, "val")[i]["actions"][0, 0] == 0 for i in range(5))
    notes = H.FeatureClips.notes(cfg, source)
    assert notes == ["actions: 1 of 1 clips looked at have a row per latent: the last leads nowhere, left out"]


def test_the_last_ids_are_the_test_part(ten):
    """No clip stands on two sides, and the loop's own source knows all three. Seen red with test clips in train."""
    source = opened(config(ten))
    assert [ids(part) for part in (source.train, source.val, source.test)] == [[*range(10, 16)], [16, 17], [18, 19]]
    assert source.held_out and source.split_by == "ids"
    data = source.dataset(config(ten), "test")
    assert {int(data[index]["actions"][0, 1]) for index in range(8)} == {18, 19}
    drawn = {
        int(source.dataset(config(ten), side)[index]["actions"][0, 1])
        for side in ("train", "bank")
        for index in range(40)
    }
    assert drawn == {*range(10, 16)}
    without = opened(config(ten, val_fraction=0.0))  # training files serve both sides, those of the test part neither
    assert ids(without.val) == ids(without.train) == [*range(10, 18)] and not without.held_out
    narrow = opened(config(ten, clip_start=12, clip_end=17))
    assert [ids(part) for part in (narrow.train, narrow.val, narrow.test)] == [[12, 13, 14], [15], [16]]


def test_windows_of_one_video_stay_together(ten, tmp_path):
    """Groups of index.csv are not cut by a border between sides."""
    for number in range(10):
        write_clip(tmp_path, number)
    rows = [f"clip_{number:05d},drive_{number // 4}" for number in range(10)]
    (tmp_path / "index.csv").write_text("\n".join(["clip,group", *rows]))
    source = opened(config(tmp_path))
    assert [ids(part) for part in (source.train, source.val, source.test)] == [[*range(4)], [*range(4, 8)], [8, 9]]


def test_folders_split_where_there_are_some(tmp_path):
    for side, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        for number in numbers:
            write_clip(tmp_path / side, number)
    source = opened(config(tmp_path))
    assert [ids(part) for part in (source.train, source.val, source.test)] == [[1, 2], [3], [4]]
    assert source.split_by == "folders"


@pytest.mark.parametrize(
    "fields, reason",
    [
        (dict(clip_start=30), r"no clip has an id from 30 to below inf; they go from 10 to 19 \(--clip_start"),
        (dict(clip_start=5, clip_end=9), "no clip has an id from 5 to below 9"),
        (
            dict(feature_map="big"),
            r"no clip_<id>/feature_maps/big.npy; there are other.npy, tiny.npy \(--feature_map\)",
        ),
        (dict(feature_dim=6), r"none of 10 clips .* features: 5 wide, not feature_dim = 6 \(--feature_dim\)"),
        (dict(grid_wide=5), r"24 rows cannot be divided into 10 patches per frame, 2 x 5 \(--grid_high, --grid_wide\)"),
        (dict(num_timesteps=7), r"features: 4 latents, and num_timesteps = 7 needs 8 \(--num_timesteps 3\)"),
        (dict(action_dim=7), r"actions.npy: is \[3, 2\], not 7 wide = action_dim \(--action_dim\)"),
        (dict(use_extrinsics=True), "actions_states/extrinsics.npy is missing"),
        (dict(val_fraction=0.5, test_fraction=0.5), "10 clips or groups cannot be split into train, 5 val and 5 test"),
    ],
)
def test_settings_that_fit_no_clip_are_one_line(ten, fields, reason):
    with pytest.raises(V.UsageError, match=reason) as caught:
        listed(config(ten, **fields))
    assert "\n" not in str(caught.value) and str(ten) in str(caught.value)


def spoil_features(values):
    """A damage that saves other features."""
    return lambda clip: np.save(clip / "feature_maps" / "tiny.npy", values)


def spoil_actions(values):
    return lambda clip: np.save(clip / "actions_states" / "actions.npy", values)


def cut(clip):
    path = clip / "feature_maps" / "tiny.npy"
    path.write_bytes(path.read_bytes()[:-30])


HOLED = np.zeros((24, 5), np.float32)
HOLED[13, 2] = np.nan


@pytest.mark.parametrize(
    "damage, reason",
    [
        (spoil_features(np.zeros((23, 5), np.float32)), "23 rows cannot be divided into 6 patches"),
        (spoil_features(np.zeros((24, 4), np.float32)), "features: 4 wide, not feature_dim = 5"),
        (spoil_features(np.zeros((4, 7, 5), np.float32)), r"shape \[4, 7, 5\] does not fit 6 patches"),
        (spoil_features(np.zeros((4, 3, 2, 5), np.float32)), r"shape \[4, 3, 2, 5\] does not fit 6 patches"),
        (spoil_features(np.zeros(24, np.float32)), r"features: shape \[24\], not"),
        (spoil_features(HOLED), "features: NaN or infinity in row 13"),
        (spoil_features(np.zeros((24, 5), np.float32, order="F")), "stored by columns, not numbers stored by rows"),
        (spoil_features(np.zeros((24, 5), object)), "holds object, not numbers"),
        (cut, "features: cut short, its header tells of"),
        (lambda clip: (clip / "feature_maps" / "tiny.npy").write_bytes(b"no array"), "features: no npy file"),
        (lambda clip: (clip / "feature_maps" / "tiny.npy").write_bytes(b""), "empty file"),
        (spoil_actions(np.zeros((2, 2), np.float32)), "actions.npy: 2 rows for 4 latents, and 3 are needed"),
        (spoil_actions(np.zeros((8, 2), np.float32)), "actions.npy: 8 rows for 4 latents, and 3 are needed"),
        (spoil_actions(np.full((3, 2), np.inf, np.float32)), "actions_states/actions.npy: NaN or infinity in row 0"),
        (spoil_actions(np.zeros(3, np.float32)), r"actions.npy: is \[3\], not 2 wide"),
        (lambda clip: (clip / "actions_states" / "actions.npy").unlink(), "actions_states/actions.npy is missing"),
    ],
)
def test_a_bad_clip_is_named_and_replaced(tmp_path, damage, reason):
    """One damaged clip among good ones: named once with its reason, another is read in its place."""
    for number in range(4):
        write_clip(tmp_path, number)
    damage(tmp_path / "clip_00001")
    cfg = config(tmp_path, val_fraction=0.25, test_fraction=0.25)
    source = opened(cfg)
    data = source.dataset(cfg, "train")
    samples = [data[index] for index in range(2)]
    (bad,) = (each for sample in samples for each in sample["bad"])
    assert bad[0] == "clip_00001/feature_maps/tiny.npy"
    assert re.search(reason, bad[1]), bad[1]
    assert all(sample["file"] == 0 for sample in samples)


def test_absent_states_are_said(ten):
    cfg = config(ten)
    notes = H.FeatureClips.notes(cfg, opened(cfg))
    assert notes == ["states: 8 of 8 clips looked at have no states.npy: zeros stand in"]


def test_only_what_a_sample_needs_is_read(tmp_path, monkeypatch):
    """One window of a clip of 2,000 latents: 4 of them are read, not the file."""
    write_clip(tmp_path, 0, frames=2000)
    cfg = config(tmp_path, val_fraction=0.0, test_fraction=0.0)
    sizes, real = [], np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda content, kind: sizes.append(len(content)) or real(content, kind))
    opened(cfg).dataset(cfg, "train")[0]
    assert max(sizes) == 4 * 6 * 5 * 4


def test_a_run_from_feature_folders(ten, tmp_path):
    """The loop trains, counts all three sides, and goes over bad clips as it does elsewhere."""
    for number in range(8):
        write_clip(tmp_path / "data", number)
    cut(tmp_path / "data" / "clip_00002")
    cfg = config(tmp_path / "data", steps=3, batch_size=2, log_every=1, val_clips=2, warmup_steps=0)
    assert V.train(cfg, world=Tell) == 0
    log = (tmp_path / "data" / "run" / "train.log").read_text()
    assert "data: files, split by ids: 4 train, 2 val, 2 test files" in log and "zeros stand in" in log
    assert "cut short" in (tmp_path / "data" / "run" / "bad_files.jsonl").read_text()


# -- tools/make_pushes.py


def test_pushes_make_clips_that_train(tmp_path):
    """The same clip from the same seed, a stopped command goes on, another physics is refused in its place."""
    flags = ["--out", str(tmp_path / "a"), "--num", "4", "--latents", "5", "--size", "16", "--dim", "6"]
    assert P.main(flags) == 0
    again = ["--out", str(tmp_path / "b"), *flags[2:], "--videos"]
    assert P.main([*again, "--num", "1"]) == 0 and P.main(again) == 0
    paths = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.npy"))
    assert len(paths) == 12
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in paths)
    noted = json.loads((tmp_path / "b" / "annotations" / "clip_00002.json").read_text())
    pushes = np.load(tmp_path / "b" / "clip_00002" / "actions_states" / "actions.npy")
    assert noted["push_x"][1:] == pytest.approx(pushes[:, 0].tolist()) and len(noted["push_y"]) == 5
    assert P.main([*flags, "--shift", "ice"]) == 1
    assert P.main([*flags, "--shift", "ice", "--first_id", "4"]) == 0
    sizes = dict(feature_dim=6, grid_high=2, grid_wide=2, num_timesteps=4, feature_map="pushes")
    source = opened(config(tmp_path / "a", **sizes))
    assert (
        len(source.train) == 4 and source.dataset(config(tmp_path / "a", **sizes), "test")[0]["states"].abs().max() > 0
    )


def test_a_push_moves_the_ball_that_way():
    """The pushed ball's speed follows the push, at a right angle under `rotate`; other clips move otherwise."""
    for shift, turn in (("base", [[1, 0], [0, 1]]), ("rotate", [[0, -1], [1, 0]])):
        gains = []
        for number in range(30):
            _, pushes, speeds = P.make_clip(0, number, 9, 16, 1, shift)
            free = (np.abs(speeds[1:] - 0.75 * speeds[:-1] - pushes[:-1] @ np.transpose(turn)) < 0.05).all(1)
            gains.append(free.mean())
        assert np.mean(gains) > 0.5  # elsewhere it met a wall
    base, ice = (P.make_clip(0, 5, 9, 16, 2, shift)[2] for shift in ("base", "ice"))
    assert np.abs(base - ice).max() > 0.01


# -- tools/cache_latents.py --layout hope


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights: NOW 4 of 12 frames, tubelets of 2, 4 x 4 patches, 48 wide -> (path, model)."""
    path = tmp_path_factory.mktemp("model") / "random.pt"
    model = new_model(small_config(), seed=3)
    torch.save(new_state(model), path)
    return path, model.eval()


def cache(path, out, *flags):
    own = ["--layout", "hope", f"--ckpt={path}", f"--out={out}", "--clip_latents=4", "--num_workers=0", "--device=cpu"]
    return C.main([*own, *flags])


def test_scenes_become_feature_folders(checkpoint, tmp_path, capsys):
    """Latents are the target encoder's of the NOW window that ends in them, actions the scene's own signals; the same
    command makes what is missing, and other settings are refused."""
    (path, model), out = checkpoint, tmp_path / "out"
    assert cache(path, out, "--scene_clips=5", "--signals=accel,steer") == 0
    cfg = config(out, feature_map="tritemporal", feature_dim=48, grid_high=4, grid_wide=4)
    source = opened(cfg)
    assert (len(source.train), len(source.val), len(source.test)) == (3, 1, 1)
    scenes = V.replace(model.cfg, num_frames=10, scenes="render")  # 2 before the first latent, 2 for each of 4
    frames, labels = V.scene(V.scene_seed_at(scenes, 4, "test"), 0, scenes)
    sample = source.dataset(cfg, "test")[0]
    clip = model.normalise(torch.from_numpy(frames).permute(0, 3, 1, 2)[None])
    for t in range(4):
        window = model.target.encode(model.target.tokenizer.cut(clip[:, 2 * t : 2 * t + 4]), model.now_idx[None])
        wanted = V.layer_norm(window[:, -16:])[0]
        torch.testing.assert_close(sample["features"][t], wanted, rtol=2e-3, atol=2e-3)  # fp16, a few times over
    pairs = [np.mean(labels[name][4:], dtype=float) for name in ("accel", "steer")]  # frames 4 to 9 are three steps
    assert sample["actions"].mean(0).tolist() == pytest.approx([pairs[0], pairs[1] / 0.05], abs=1e-5)
    assert sample["states"][:, 0].tolist() == pytest.approx([labels["speed"][frame] / 10 for frame in (3, 5, 7)])
    turned = np.trapezoid(labels["yaw_rate"][3:8], dx=1 / scenes.clip_fps) / 0.1
    assert sample["states"][2, 1] == pytest.approx(turned, abs=1e-5) and sample["states"][0, 1] == 0
    gone = out / "clip_00002"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy") if gone not in path.parents}
    content = (gone / "feature_maps" / "tritemporal.npy").read_bytes()
    shutil.rmtree(gone)
    assert cache(path, out, "--scene_clips=5", "--signals=accel,steer") == 0
    assert (gone / "feature_maps" / "tritemporal.npy").read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    assert cache(path, out, "--scene_clips=5", "--signals=accel,steer", "--view=palette") == 2
    assert "holds a cache made with view = plain" in capsys.readouterr().err


def test_no_latent_knows_later_frames(checkpoint):
    """Other pixels from a frame on change no latent before it, unless the clip is encoded whole; views change all.
    Seen red with the window one tubelet later."""
    _, model = checkpoint
    args = Namespace(clip_latents=4, see="past", view="plain")
    frames = torch.randint(0, 256, (1, 10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = torch.cat([frames[:, :6], 255 - frames[:, 6:]], 1)  # frame 6 is the first of latent 2
    seen, then = (C.see_clips(model, each, model.cfg, args) for each in (frames, other))
    assert seen.shape == (1, 4, 16, 48) and torch.equal(seen[:, :2], then[:, :2])
    assert (seen[:, 2:] - then[:, 2:]).abs().amax((2, 3)).min() > 0.01
    for view in ("palette", "camera"):
        shifted = C.see_clips(model, frames, model.cfg, Namespace(clip_latents=4, see="past", view=view))
        assert (shifted - seen).abs().amax((2, 3)).min() > 0.01
    whole = Namespace(clip_latents=4, see="whole", view="plain")
    seen, then = (C.see_clips(model, each[:, 2:], model.cfg, whole) for each in (frames, other))
    assert (seen[:, :2] - then[:, :2]).abs().max() > 1e-3


def test_videos_become_feature_folders(checkpoint, tmp_path, capsys):
    """Signals at the frames' times, two clips of a long video in one group; what is short or has no such signal is left
    out with its reason."""
    root, out = tmp_path / "drives", tmp_path / "out"
    (root / "videos").mkdir(parents=True)
    (root / "annotations").mkdir()
    ramp = {"fps": 8, "steer": [k / 100 for k in range(48)], "speed": [10.0] * 48, "yaw_rate": [0.1] * 48}
    for name, frames, noted in (("long", 48, ramp), ("mute", 24, {"fps": 8, "speed": [1.0]}), ("short", 8, ramp)):
        pictures = np.random.default_rng(frames).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)
        V.write_video(root / "videos" / f"{name}.mp4", pictures, 8)
        (root / "annotations" / f"{name}.json").write_text(json.dumps(noted))
    assert cache(checkpoint[0], out, f"--data_root={root}", "--signals=steer", "--clip_fps=4") == 0
    told = capsys.readouterr().err
    assert "2 videos or clips are left out" in told and "short.mp4: 1 s are too short for 2.5 s" in told
    assert "annotation: has no steer (--signals)" in told
    rows = (out / "index.csv").read_text().splitlines()
    assert rows[1:] == ["clip_00000,long.mp4,0.0,2.5,long.mp4,", "clip_00001,long.mp4,2.5,2.5,long.mp4,"]
    for number, begin in enumerate((0, 20)):  # frames of the file at 8 per second; a clip's frame k is 2 k of them on
        actions = np.load(out / f"clip_{number:05d}" / "actions_states" / "actions.npy")
        wanted = [(begin + 2 * (4 + 2 * t + 0.5)) / 100 / 0.05 for t in range(3)]
        assert actions[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)
        states = np.load(out / f"clip_{number:05d}" / "actions_states" / "states.npy")
        assert states.tolist() == [[pytest.approx(1.0)]] * 3
    assert cache(checkpoint[0], tmp_path / "none", f"--data_root={root}", "--signals=mover_u", "--clip_fps=4") == 1
    assert "no clip could be encoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--signals=steer,,accel"], "signals = 'steer,,accel': must name each signal once (--signals)"),
        (["--clip_latents=1"], "clip_latents = 1: must be at least 2 (--clip_latents)"),
        (["--patch=4"], "patch: is the checkpoint's own here"),
        (["--clip_fps=0"], "clip_fps = 0: steps need a length"),
        (["--feature_map=a/b"], "feature_map = 'a/b': must be a file name"),
        (["--shard=3/2"], "must be i/n"),
    ],
)
def test_wrong_flags_are_one_line(checkpoint, tmp_path, capsys, flags, reason):
    assert cache(checkpoint[0], tmp_path / "out", "--scene_clips=4", *flags) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
