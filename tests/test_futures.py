"""tools/futures.py: the pixel decoder and its cache, what is read from latents, the pictures, and the command's
errors."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FOOTAGE, ROOT, V, needs, small_config
from training import new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))

import futures as P  # noqa: E402

needs("matplotlib")


def scene_config(**overrides):
    """A tiny model of built-in scenes drawn on the fly; wide pictures, so that rows and columns cannot be mixed up."""
    return small_config(**{**dict(image_size=(16, 32), scenes="render", num_frames=12, clip_fps=4.0), **overrides})


def save_run(folder, cfg, kind="render", root="", seed=0):
    """A checkpoint of a model that was never trained -> its path."""
    model = new_model(cfg, seed)
    source = V.DataSource(kind, str(root), [], [], [], True)
    return V.save_checkpoint(new_state(model, source, step=3), folder, cfg, final=True)


def video(path, seconds, fps=10, size=(32, 48)):
    """A video whose brightness counts its frames: frame i is 2 * i + 20 everywhere."""
    frames = np.stack([np.full((*size, 3), 2 * number + 20, np.uint8) for number in range(round(seconds * fps))])
    V.write_video(path, frames, fps)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of built-in scenes with a decoder of a few steps beside its checkpoint -> checkpoint."""
    path = save_run(tmp_path_factory.mktemp("run"), scene_config())
    with pytest.MonkeyPatch.context() as few:
        few.setattr(P, "JUDGE_CLIPS", 8)
        few.setattr(P, "POOL_CLIPS", 24)
        model, *where = P.open_run(P.parse_arguments(["--ckpt", str(path), "--device", "cpu"]))
        P.get_decoder(model, *where, 0.01, 0, None, 0)
    return path


def command(capsys, *argv):
    """Run the command in this process -> (exit code, stdout, stderr)."""
    code = P.main([*map(str, argv), "--num_workers", "0", "--device", "cpu"])
    return code, *capsys.readouterr()


def error_line(result, code):
    """Check the exit code and that the last line of stderr is the only error line -> that line."""
    assert result[0] == code, result
    assert result[2].count("error: ") == 1 and "Traceback" not in result[2]
    return result[2].splitlines()[-1]


# -- decoder


@pytest.mark.parametrize(
    "image_size, patch, tubelet_t",
    [((16, 32), 8, 2), ((42, 28), 14, 2), ((12, 18), 6, 1), ((4, 6), 1, 2), ((15, 10), 5, 4)],
)
def test_decoder_makes_frames_of_the_clips_size(image_size, patch, tubelet_t):
    """Any grid, patch and tubelet length; the cut-off uint8 pictures have the frames' shape."""
    cfg = scene_config(image_size=image_size, patch=patch, tubelet_t=tubelet_t)
    decoder = P.PixelDecoder(cfg, 16)
    pictures = P.decode_soon(decoder, torch.randn(5, cfg.soon_tokens, cfg.enc_dim), cfg)
    assert pictures.shape == (5, cfg.soon_frames, *image_size, 3) and pictures.dtype == np.uint8
    assert math.prod(P.prime_factors(patch)) == patch


def test_a_token_is_drawn_where_it_belongs():
    """Changing the token at (t, h, w) changes pixels around its own tubelet and patch. Seen red with h and w exchanged
    in the decoder."""
    cfg = scene_config(image_size=(24, 64))
    torch.manual_seed(0)
    decoder = P.PixelDecoder(cfg, 16).eval()
    latents = torch.randn(16, 3, 3, 8, cfg.enc_dim)
    for t, h, w in ((1, 1, 5), (1, 1, 2)):
        changed = latents.clone()
        changed[:, t, h, w] += 3 * torch.randn(16, cfg.enc_dim)
        with torch.no_grad():
            change = (decoder(changed) - decoder(latents)).abs().mean((0, 2))  # [T, H, W]
        middle = [
            float((change.sum(tuple({0, 1, 2} - {axis})) * (torch.arange(side) + 0.5)).sum() / change.sum())
            for axis, side in enumerate(change.shape)
        ]
        assert middle == pytest.approx([2 * t + 1, 8 * h + 4, 8 * w + 4], abs=2)


@pytest.mark.slow
def test_training_beats_the_mean_frame_on_held_out_scenes():
    """120 small steps on latents of a random encoder. Seen red with the truth of another clip."""
    cfg = scene_config(image_size=(16, 16), patch=4, tubelet_t=2, enc_dim=48)
    model = new_model(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held_out, pool = P.fill_pool(model, None, "val", 1e9, 16), P.fill_pool(model, None, "train", 1e9, 64)
    torch.manual_seed(0)
    decoder, steps = P.train_decoder(P.PixelDecoder(cfg, 24), pool, cfg, 1e9, max_steps=120)
    report = P.judge_decoder(decoder, pool, held_out, cfg)
    assert steps == 120
    seen, mean = report["decoder on true latents"], report["mean frame"]
    assert seen[0] < 0.85 * mean[0] and seen[1] > mean[1] + 0.5, report
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_pairs_tubelets_with_their_own_frames():
    """Latents that say how bright their own tubelet is: the decoder learns it. Seen red with the frames always taken
    from the first tubelet on."""
    cfg = scene_config(image_size=(8, 16), num_frames=20, soon_frames=12, enc_dim=24)
    generator = torch.Generator().manual_seed(0)
    bright = torch.rand(40, 8, generator=generator)
    latents = torch.zeros(40, 8, 1, 2, 24)
    latents[..., 3] = 4 * bright[:, :, None, None] - 2
    frames = (255 * bright).byte().repeat_interleave(2, 1)[:, :, None, None, None].expand(-1, -1, 3, 8, 16)
    pool = P.Pool(frames, latents.half(), torch.zeros(0), torch.zeros(0), torch.zeros(0))
    torch.manual_seed(0)
    decoder, _ = P.train_decoder(P.PixelDecoder(cfg, 16), pool, cfg, 1e9, max_steps=60)
    seen = P.decode_soon(decoder, pool.soon(cfg)[1], cfg).mean((2, 3, 4)) / 255
    assert (
        np.abs(seen - bright[:, 2:].repeat_interleave(2, 1).numpy()).mean() < 0.08
    )  # 0.25 for one brightness everywhere


def test_judging_by_hand():
    """A constant error of 10: L1 10 and 20 log10(25.5) dB; the mean frame and the last NOW frame are what their names
    say."""
    error, ratio = P.psnr(np.full((2, 3), 110, np.uint8), np.full((2, 3), 100, np.uint8))
    assert (error, ratio) == (10, pytest.approx(20 * math.log10(25.5), abs=1e-4))
    cfg = scene_config()
    frames = torch.zeros(2, 8, 3, 16, 32, dtype=torch.uint8)
    frames[0, 4:], frames[1, 4:], frames[:, 3] = 60, 100, 70
    latents = torch.zeros(2, 4, 2, 4, cfg.enc_dim, dtype=torch.half)
    pool = P.Pool(frames, latents, torch.zeros(2, cfg.soon_tokens, cfg.enc_dim), torch.zeros(2, 2), torch.zeros(2))
    report = P.judge_decoder(P.PixelDecoder(cfg, 16), pool, pool, cfg)
    assert report["mean frame"][0] == 20 and report["last NOW frame repeated"][0] == 20


def test_pool_holds_now_and_soon_of_the_clips_it_names():
    """Latents are those of the whole clip, in (t, h, w) order; held-out scenes are not training scenes."""
    cfg = scene_config()
    model = new_model(cfg).eval()
    pool, held_out = (
        P.fill_pool(model, None, "train", 1e9, 3, least=3),
        P.fill_pool(model, None, "val", 1e9, 3, least=3),
    )
    frames, labels = P.render(cfg, P.TRAIN_SEED + 1, kind="fork")
    clip = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())[None]
    targets = model.make_targets(model.normalise(clip))[0]
    assert torch.equal(pool.frames[1], clip[0, :8]) and int(pool.branch[1]) == labels["branch"] != 0
    torch.testing.assert_close(
        pool.soon(cfg)[1][1], targets[cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens], rtol=0, atol=2e-3
    )  # fp16
    assert not torch.equal(pool.frames[1], held_out.frames[1]) and held_out.points.shape == (
        3,
        cfg.soon_tokens,
        cfg.enc_dim,
    )


def test_missing_vgg_weights_are_named(monkeypatch, tmp_path):
    """--perceptual downloads nothing: the file that is missing is named."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(V.UserError, match=r"vgg16-\w+\.pth"):
        P.Perceptual()


def test_perceptual_distance(monkeypatch, tmp_path):
    """0 for equal pictures, more for more noise; weights come from the cached file. Random weights stand in for it."""
    from torchvision.models import VGG16_Weights
    from torchvision.models.vgg import cfgs, make_layers

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"], batch_norm=False)[:16]
    weights = {f"features.{name}": value for name, value in layers.state_dict().items()}
    torch.save(weights, tmp_path / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    distance, truth, noise = P.Perceptual(), torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    far = [float(distance(truth + scale * noise, truth)) for scale in (0.0, 0.05, 0.5)]
    assert far[0] == 0 < far[1] < far[2]


# -- cache


@pytest.mark.slow
def test_cache_is_used_again_and_trained_longer_when_asked(run_folder, monkeypatch, tmp_path):
    """The same checkpoint trains once; more minutes than the cache had train anew. Seen red with the comparison of
    minutes left out."""
    model, source, path, key = P.open_run(P.parse_arguments(["--ckpt", str(run_folder), "--device", "cpu"]))
    assert source is None and path.is_file() and path.parent == run_folder.parent
    decoder, saved = P.get_decoder(model, source, path, key, 0.005, 0, None, 0)
    monkeypatch.setattr(P, "fill_pool", lambda *args, **options: 1 / 0)
    again, _ = P.get_decoder(model, source, path, key, 0.01, 0, None, 0)
    assert (
        all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())
        and saved["minutes"] == 0.01
    )
    with pytest.raises(ZeroDivisionError):
        P.get_decoder(model, source, path, key, 0.02, 0, None, 0)


def test_other_weights_and_foreign_files_are_refused(run_folder, tmp_path):
    """A decoder made for other weights, a torn file and a pickle that would run code are not used. Seen red with the
    key unchecked."""
    cfg = scene_config()
    _, _, path, key = P.open_run(P.parse_arguments(["--ckpt", str(run_folder), "--device", "cpu"]))
    other = save_run(tmp_path / "other", cfg, seed=1)
    _, _, other_path, other_key = P.open_run(P.parse_arguments(["--ckpt", str(other), "--device", "cpu"]))
    assert other_key != key and other_path.name != path.name
    other_path.write_bytes(path.read_bytes())
    assert P.read_cache(other_path, other_key, cfg, "cpu") == (None, f"{other_path}: made for other weights or data")
    other_path.write_bytes(path.read_bytes()[:1000])
    assert P.read_cache(other_path, other_key, cfg, "cpu")[0] is None
    torch.save({"key": other_key, "width": 96, "decoder": P.Pool}, other_path)
    decoder, why = P.read_cache(other_path, other_key, cfg, "cpu")
    assert decoder is None and "not readable" in why
    assert P.read_cache(tmp_path / "absent.pt", key, cfg, "cpu") == (None, "")


def test_key_follows_weights_and_data():
    """One changed number in the target encoder, another step or other data give another key; the flow net does not
    count."""
    model = new_model(scene_config())
    key = P.decoder_key(model, 3, "scenes")
    assert key != P.decoder_key(model, 4, "scenes") and key != P.decoder_key(model, 3, "videos")
    model.flow.out.weight.data += 1
    assert key == P.decoder_key(model, 3, "scenes")
    model.target.tokenizer.proj.bias.data[0] += 1e-3
    assert key != P.decoder_key(model, 3, "scenes")


# -- readings


def test_lateral_path_by_hand():
    """A constant yaw rate w at speed v leads to -v / w * ln cos(w t); straight on leads nowhere."""
    labels = {"fps": 50, "yaw_rate": [0.2] * 101, "speed": [10.0] * 101}
    assert P.lateral_path(labels)[-1] == pytest.approx(-10 / 0.2 * math.log(math.cos(0.4)), rel=1e-3)
    assert not P.lateral_path({**labels, "yaw_rate": [0.0] * 101}).any()


def test_lateral_path_of_a_fork_is_the_roads_own():
    """The scene's labels lead to where the branch really lies, on the right side. Seen red with the sign of the yaw
    rate exchanged."""
    cfg = scene_config(num_frames=20, soon_frames=12)
    for future_seed in range(6):
        _, labels = V.scene(5, future_seed, cfg, "fork")
        future = V.draw_future(V.draw_scene(5, cfg, "fork"), future_seed, 5)[0]
        times = np.arange(20) / 4
        drawn, tau = V.draw_scene(5, cfg, "fork"), times - times[3]
        at = drawn["speed"] * (times[3] + drawn["reach"])
        s = V.ego_path(drawn, future, times, tau, at)["s"]
        assert P.lateral_path(labels)[-1] == pytest.approx(labels["branch"] * V.branch_offset(s[-1] - at), rel=0.1)


def test_ridge_finds_linear_weights_and_shrinks_on_noise():
    """An exact linear rule comes back; values that have nothing to do with the features give about their mean. Seen red
    with the constant left out."""
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(200, 20, generator=generator), torch.randn(20, generator=generator)
    found = P.ridge(features, features @ weights + 5)
    torch.testing.assert_close(found, torch.cat([weights, torch.tensor([5.0])]), rtol=0, atol=0.02)
    noise = P.ridge(features, 3 + torch.randn(200, generator=generator))
    assert noise[:-1].norm() < 0.15 and float(noise[-1]) == pytest.approx(3, abs=0.3)


def test_probe_reads_the_right_tubelet():
    """Latents that carry a number per tubelet in one channel of the left columns: the probe fitted on clips tells it on
    others.

    Seen red with the tubelets in reversed order.
    """
    cfg = scene_config()
    generator = torch.Generator().manual_seed(0)

    def clips(count):
        latents = 0.1 * torch.randn(count, 4, 2, 4, cfg.enc_dim, generator=generator)
        lateral = torch.randn(count, 2, generator=generator)
        latents[:, 2:, :, 0, 7] += lateral[:, :, None]
        return P.Pool(
            torch.zeros(count, 8, 3, 16, 32, dtype=torch.uint8), latents, torch.zeros(0), lateral, lateral[:, 1].sign()
        )

    pool, held_out = clips(300), clips(50)
    readings = P.fit_readings(pool, held_out, cfg)
    read = P.read_lateral(readings["probe"], held_out.soon(cfg)[1], cfg)
    assert (
        (read - held_out.lateral).abs().mean() < 0.3
        and float(readings["probe_r2"]) > 0.8
        and float(readings["branch_told"]) > 0.9
    )
    assert readings["bank"].shape == (300, 2) and "probe" not in P.fit_readings(replace_lateral(pool), held_out, cfg)


def replace_lateral(pool):
    """The same clips as if they were videos: no lateral displacement is known."""
    return P.Pool(
        pool.frames, pool.latents, pool.points, torch.full_like(pool.lateral, math.nan), torch.zeros_like(pool.branch)
    )


def test_branch_shares_by_hand():
    """Places 0 (left branch), 1 (right) and 0.25, 0.75 between them decide. Seen red with the share taken of those not
    between."""
    right, between, names = P.branch_shares([-3.0, 3.0, 2.8, 0.1, 0.2, -4.0, 9.0, -2.5], -3.0, 3.0)
    assert right == 5 / 8 and between == 2 / 8
    assert names == ["left", "right", "right", "between", "between", "left", "right", "left"]
    assert P.branch_shares([0.0], -1.0, 5.0)[0] == 0  # the middle is 2
    assert P.counted(names) == "3 left, 2 between, 3 right"


def test_fan_shares_of_constructed_samples(monkeypatch):
    """A sampler that sends 3 of 4 samples right, read by a probe on one channel, gives 75 %; error bars are those over
    scenes.

    Seen red with left and right exchanged in true_branches.
    """
    cfg = scene_config()
    model, signs = new_model(cfg).eval(), []
    probe = torch.zeros(2, 6 * cfg.enc_dim + 1)
    probe[:, 5 * 6 : 6 * 6] = 1 / 6  # the mean of channel 5 over the six parts of the picture

    def samples(context, num_samples, generator):
        future = torch.zeros(1, num_samples, cfg.soon_tokens + cfg.flow_chunks, cfg.enc_dim)
        future[:, : num_samples // 4, :, 5], future[:, num_samples // 4 :, :, 5] = -30, 30
        signs.append(num_samples)
        return future

    monkeypatch.setattr(model, "sample_futures", samples)
    fans = P.sample_fans(model, {"probe": probe}, 0, 8, 2)
    assert list(fans) == list(P.SIGNS) and all(len(rows) == 2 for rows in fans.values()) and signs == [8] * 10
    assert all(
        fan["right"] == 0.75 and fan["between"] == 0 and fan["samples"].shape == (8, 2)
        for rows in fans.values()
        for fan in rows
    )
    np.testing.assert_allclose(fans[0.5][0]["samples"][:, 1], [-30] * 2 + [30] * 6, rtol=1e-5)
    assert P.share_summary([{"right": 0.4, "between": 0.1}, {"right": 0.8, "between": 0.3}]) == pytest.approx(
        (0.6, 0.2, 0.2)
    )


def test_true_branches_lie_on_their_sides():
    """Both futures of a fork, also of a rare one, left negative."""
    cfg = scene_config()
    rare = next(seed for seed in range(100) if V.scene_odds(seed, cfg, "fork")["right"] == 0.1)
    truth = P.true_branches(cfg, rare)
    assert set(truth) == {-1, 1} and truth[-1][-1] < 0 < truth[1][-1] and len(truth[1]) == 2


def test_scenes_shown_follow_the_runs_mix():
    """A fork at even odds first; kinds the run never saw are not shown; seeds give other scenes."""
    cfg = scene_config()
    chosen = P.pick_scenes(cfg, 0)
    assert [kind for _, kind in chosen] == ["fork", "lane", "brake"] and V.scene_odds(chosen[0][0], cfg, "fork")[
        "right"
    ] == 0.5
    forks = P.pick_scenes(replace(cfg, scene_mix="fork_only"), 0)
    assert [V.scene_odds(seed, cfg, "fork")["right"] for seed, _ in forks] == [0.5, 0.9, 0.1]
    assert not {seed for seed, _ in chosen} & {seed for seed, _ in P.pick_scenes(cfg, 1)}


def test_latent_colours_are_one_mapping():
    """The fitted latents span the colours; a latent gets the same colour elsewhere; the order is (t, h, w). Seen red
    with a mean per picture."""
    cfg = scene_config()
    fitted = torch.randn(cfg.soon_tokens, cfg.enc_dim, generator=torch.Generator().manual_seed(0))
    colours = P.latent_colours(fitted, torch.stack([fitted, fitted[3].expand_as(fitted)]), cfg)
    assert colours.shape == (2, 2, 2, 4, 3) and (colours[1] == colours[0, 0, 0, 3]).all()
    assert colours[0].min() == 0 and colours[0].max() == 255


# -- the command


def test_everything_is_written(run_folder, tmp_path, capsys, monkeypatch):
    """All pictures of a run of scenes, from a cached decoder; the video opens again in the script's own reader."""
    from PIL import Image

    monkeypatch.setattr(P, "FAN_SCENES", 2)
    monkeypatch.setattr(P, "FAN_SAMPLES", 5)
    own = P.output_folder(P.parse_arguments(["--ckpt", str(run_folder)]), "futures")
    assert own == run_folder.parent.parent / "futures" and own.is_dir()
    code, out, _ = command(
        capsys, "--ckpt", run_folder, "--out", tmp_path / "new" / "folder", "--minutes", "0.005", "--num_samples", "5"
    )
    assert code == 0 and "mean frame" in out
    paths = [
        tmp_path / "new" / "folder" / name
        for name in ("rollout.mp4", "frames.png", "frames_2.png", "frames_3.png", "latents.png", "fan.png")
    ]
    assert out.splitlines()[-6:] == list(map(str, paths)) and {*paths} == {*(tmp_path / "new" / "folder").iterdir()}
    cfg = scene_config()
    size = P.panel_size(cfg, 104)
    assert Image.open(paths[1]).size == (
        138 + 6 * (size[0] + 5) + 20,
        68 + 8 * (size[1] + 5) + 8,
    )  # 2 NOW + 4 SOON columns, 3 + 5 rows
    assert all(min(Image.open(path).size) > 300 for path in paths[1:])
    wide, high = P.panel_size(cfg, 208)
    width, height = 14 + 4 * (wide + 14), 62 + 3 * (high + 38)
    frames = V.read_frames(str(paths[0]), V.ClipPlan(33, 4, height, width, 0.0, 1.0, 1.0, 0.5, 0.5), "pyav")
    assert frames.shape == (33, height, width, 3)  # three clips of 4 + 4 frames and 3 to rest
    truth = P.render(cfg, *P.pick_scenes(cfg, 0)[0][:1], kind="fork")[0]
    panel = frames[5, 62 + 22 : 62 + 22 + high, 14 : 14 + wide]
    assert (
        np.abs(panel.astype(int) - np.asarray(P.scaled(truth[5], (wide, high))).astype(int)).mean() < 6
    )  # H.264 and 4:2:0 colour
    assert np.abs(panel.astype(int) - np.asarray(P.scaled(truth[0], (wide, high))).astype(int)).mean() > 6


def test_a_clip_that_ends_inside_soon_has_no_truth(run_folder, tmp_path, capsys):
    """1.5 s hold NOW (1 s) but not SOON: this is said, the pictures are written, and no panel claims a truth."""
    path = video(tmp_path / "short.mp4", 1.5)
    code, out, _ = command(
        capsys, "--ckpt", run_folder, "--out", tmp_path, "--minutes", "0.005", "--clip", path, "--num_samples", "2"
    )
    assert code == 0 and "no truth" in out
    assert {p.name for p in tmp_path.iterdir()} == {"short.mp4", "rollout.mp4", "frames.png", "latents.png", "fan.png"}
    cfg = scene_config()
    model, decoder = new_model(cfg).eval(), P.PixelDecoder(cfg, 16).eval()
    short = P.make_exhibit(model, decoder, P.clip_window(str(path), 0.0, cfg), "short", 2, 0)
    assert [title for title, _, _ in P.panels(short, 4)] == [
        "Point forecast",
        "Sample 1",
        "Sample 2",
    ] and short.true is None
    long = P.make_exhibit(model, decoder, P.clip_window(str(video(tmp_path / "long.mp4", 4)), 0.0, cfg), "long", 2, 0)
    assert [title for title, _, _ in P.panels(long, 4)][:2] == ["Truth", "Truth, decoded"] and np.array_equal(
        long.frames[4:], P.panels(long, 4)[0][2]
    )


def test_the_clips_window_begins_where_it_is_asked_for(tmp_path):
    """Brightness counts the frames: the first one taken at --start 1.0 is number 10, the next 2.5 frames later."""
    cfg, path = scene_config(), str(video(tmp_path / "count.mp4", 8))
    for start, length in ((0.0, 12), (1.0, 12), (5.5, 8), (6.5, 4)):
        frames = P.clip_window(path, start, cfg)
        number = (frames.mean((1, 2, 3)) - 20) / 2
        assert len(frames) == length
        np.testing.assert_allclose(number, 10 * start + 2.5 * np.arange(length), atol=1.1)  # whole frames, and H.264
    assert len(P.clip_window(path, 0.0, replace(cfg, clip_fps=0.0))) == 12


@pytest.mark.slow
def test_videos_have_a_plane_instead_of_a_fan(scene_folder, tmp_path, capsys, monkeypatch):
    """A run on a folder of videos: held-out files are shown, fan.png is a plane, --data_root replaces a folder that has
    moved."""
    monkeypatch.setattr(P, "JUDGE_CLIPS", 8)
    monkeypatch.setattr(P, "POOL_CLIPS", 16)
    path = save_run(tmp_path, scene_config(), "videos", tmp_path / "gone")
    gone = command(capsys, "--ckpt", path)
    assert "the run's videos are gone" in error_line(gone, 2)
    code, out, _ = command(
        capsys, "--ckpt", path, "--data_root", scene_folder, "--minutes", "0.005", "--num_samples", "2"
    )
    assert code == 0 and (tmp_path / "futures" / "fan.png").is_file() and "held-out videos" in out
    _, val = V.split_readable(scene_config(), V.find_videos(str(scene_folder), "*"))
    assert len(list((tmp_path / "futures").glob("frames*.png"))) == min(3, len(val))


@pytest.mark.parametrize(
    "flags, code, text",
    [
        (["--num_samples", "0"], 2, "num_samples = 0: must lie in 1 to 64"),
        (["--minutes", "0"], 2, "minutes = 0.0"),
        (["--start", "-1"], 2, "start = -1.0"),
        (["--seed", "x"], 2, "invalid int value"),
        (["--clp", "x"], 2, "unrecognized arguments"),
        (["--data_root", "absent"], 2, "data_root absent: no such file or folder"),
        (["--clip", "absent.mp4"], 2, "clip absent.mp4: no such file"),
    ],
)
def test_wrong_flags(run_folder, capsys, flags, code, text):
    """One line, exit 2, before anything is trained."""
    assert text in error_line(command(capsys, "--ckpt", run_folder, *flags), code)


def test_wrong_checkpoints(tmp_path, capsys):
    """Absent, foreign, of another version, without a flow net."""
    assert "absent.pt: no such checkpoint" in error_line(command(capsys, "--ckpt", tmp_path / "absent.pt"), 2)
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    assert "foreign.pt: not readable" in error_line(command(capsys, "--ckpt", tmp_path / "foreign.pt"), 1)
    path = save_run(tmp_path / "old", scene_config())
    state = torch.load(path, weights_only=True)
    torch.save({**state, "flow_ema": {"other": torch.zeros(1)}}, path)
    assert "made by another version" in error_line(command(capsys, "--ckpt", path), 1)
    assert "lambda_flow 0" in error_line(
        command(capsys, "--ckpt", save_run(tmp_path / "dry", scene_config(lambda_flow=0.0))), 1
    )
    assert "random pixels" in error_line(
        command(capsys, "--ckpt", save_run(tmp_path / "noise", scene_config(), "random")), 1
    )


def test_wrong_clips(run_folder, tmp_path, capsys):
    """Too short, not a video, starting past its end: named before any training."""
    short = error_line(command(capsys, "--ckpt", run_folder, "--clip", video(tmp_path / "blink.mp4", 0.5)), 1)
    assert "0.50 s long, NOW needs 1.00 s" in short
    assert "from 7 s on" in error_line(
        command(capsys, "--ckpt", run_folder, "--clip", video(tmp_path / "four.mp4", 4), "--start", "7"), 1
    )
    (tmp_path / "text.mp4").write_text("no video")
    assert "text.mp4: cannot be opened" in error_line(
        command(capsys, "--ckpt", run_folder, "--clip", tmp_path / "text.mp4"), 1
    )


def test_folder_that_cannot_be_written(run_folder, tmp_path, capsys):
    """--out below a file: the cause and the flag."""
    (tmp_path / "file").write_text("")
    assert "choose another --out" in error_line(
        command(capsys, "--ckpt", run_folder, "--out", tmp_path / "file" / "out"), 1
    )


def test_real_footage(run_folder, tmp_path, capsys):
    """A real driving video goes the same way, where one is there."""
    path = FOOTAGE / "driving" / "labelled" / "donkeycar_tub" / "video.mp4"
    if not path.is_file():
        pytest.skip("no footage here")
    code, out, _ = command(
        capsys, "--ckpt", run_folder, "--out", tmp_path, "--minutes", "0.005", "--clip", path, "--num_samples", "2"
    )
    assert code == 0 and (tmp_path / "rollout.mp4").stat().st_size > 10000
