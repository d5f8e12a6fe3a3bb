"""tools/probe_drive.py: tubs, windows, folds of time, probes, scores, the command and its export."""

import json
import math
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import FOOTAGE, ROOT, V, needs, small_config
from training import new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))

import probe_drive as P  # noqa: E402

needs("sklearn")
Image = pytest.importorskip("PIL.Image")

RATE = 10.0  # pictures per second of the made-up drive


def steering(num):
    """A signal in [-1, 1] without a period in sight -> float64 [num]."""
    t = np.arange(num) / RATE
    return np.round((np.sin(4.1 * t) + np.sin(2.37 * t + 1) + np.sin(1.61 * t + 2)) / 3, 6)


def cue_picture(steer, number, height=36, width=48):
    """Fixed stripes and a little noise; the right half is brighter than the left by the steering -> uint8 [H, W, 3]."""
    picture = 100 + np.random.default_rng(number).integers(0, 16, (height, width, 3))
    picture[:, ::6] += 40
    return (picture + 60 * steer * np.where(np.arange(width) < width // 2, -1, 1)[None, :, None]).astype(np.uint8)


def write_tub(folder, num=160, milliseconds=1000 / RATE, deleted=(), old=False):
    """A tub of `num` records with the cue; record numbers start at 3 -> (folder, steering [num])."""
    images, signal = folder if old else folder / "images", steering(num)
    images.mkdir(parents=True)
    rows = []
    for record, steer in enumerate(signal, 3):
        Image.fromarray(cue_picture(steer, record)).save(images / f"{record}_cam.png")
        row = {"cam/image_array": f"{record}_cam.png", "user/angle": steer, "user/throttle": 0.25, "user/mode": "user"}
        stamp = 1_600_000_000_000 + round((record - 3) * milliseconds)
        rows.append({**row, "milliseconds": stamp} if old else {"_index": record, "_timestamp_ms": stamp, **row})
    if old:
        for record, row in enumerate(rows, 3):
            (folder / f"record_{record}.json").write_text(json.dumps(row))
        return folder, signal
    half = num // 2
    for name, part in (("catalog_0.catalog", rows[:half]), ("catalog_1.catalog", rows[half:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    about = {
        "paths": ["catalog_0.catalog", "catalog_1.catalog"],
        "current_index": num,
        "max_len": half,
        "deleted_indexes": list(deleted),
    }
    header = [["cam/image_array", "user/angle"], ["image_array", "float"], {}, {"created_at": 1.0}, about]
    (folder / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in header))
    return folder, signal


def tub_config():
    """5 frames a second, NOW 4 and SOON 4 frames: windows of 0.6 and 1.4 s."""
    return small_config(clip_fps=5.0, image_size=(24, 32))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint of an encoder with fresh weights -> path."""
    cfg = tub_config()
    model = new_model(cfg, seed=11)
    state = new_state(model, V.DataSource("videos", "", [], [], [], True))
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    V.save_checkpoint(state, folder, cfg, final=True)
    return folder / "checkpoints" / "ckpt_final.pt"


@pytest.fixture(scope="module")
def tub(tmp_path_factory):
    """(folder, steering) of 160 records at 10 pictures per second."""
    return write_tub(tmp_path_factory.mktemp("drive") / "tub")


# -- tubs


@pytest.mark.parametrize("old", [False, True])
def test_tub_gives_pictures_times_and_signals_in_order(tmp_path, old):
    """Both forms of a tub; the old one's files are not in the order of their names (record_10 < record_9)."""
    folder, signal = write_tub(tmp_path / "tub", num=30, old=old)
    drive = P.read_tub(folder)
    np.testing.assert_allclose(drive.times, np.arange(30) / RATE, atol=1e-9)
    np.testing.assert_array_equal(drive.signals["steer"], signal)
    assert set(drive.signals["throttle"]) == {0.25} and drive.fps == pytest.approx(RATE)
    for record in (0, 17, 29):
        np.testing.assert_array_equal(P.read_picture(drive.paths[record]), cue_picture(signal[record], record + 3))


def test_deleted_records_leave_a_gap_in_time(tmp_path):
    """By time stamps and by --fps alike. Seen red with record positions in place of record numbers."""
    folder, signal = write_tub(tmp_path / "tub", num=30, deleted=(8, 9, 10))
    kept = np.delete(np.arange(30), [5, 6, 7])
    for fps in (0.0, 20.0):
        drive = P.read_tub(folder, fps)
        np.testing.assert_array_equal(drive.signals["steer"], signal[kept])
        np.testing.assert_allclose(drive.times, kept / (fps or RATE), atol=1e-9)


def test_no_window_spans_two_sessions(tmp_path):
    """With --fps the numbers run on from one recording to the next, which may lie a day later."""
    folder, _ = write_tub(tmp_path / "tub", num=40)
    for name, session in (("catalog_0.catalog", "a"), ("catalog_1.catalog", "b")):
        rows = [{**json.loads(line), "_session_id": session} for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = P.cut_windows(P.read_tub(folder, RATE).times, 5.0, 4)
    assert len(windows) == 2 * (20 - 6) and not any((row < 20).any() and (row >= 20).any() for row in windows)


def test_pictures_are_cropped_and_resized_as_clips_are(tmp_path):
    """The same pictures through a video and the script's reader agree up to the codec."""
    folder, signal = write_tub(tmp_path / "tub", num=12)
    cfg = small_config(image_size=(24, 24), clip_fps=RATE)
    pictures = P.read_pictures(P.read_tub(folder), range(12), cfg)
    V.write_video(
        tmp_path / "same.mp4", np.stack([cue_picture(steer, number) for number, steer in enumerate(signal, 3)]), RATE
    )
    frames = V.read_frames(str(tmp_path / "same.mp4"), V.ClipPlan(12, RATE, 24, 24, 0.0, 1.0, 1.0, 0.5, 0.5), "pyav")
    error = np.abs(np.stack([pictures[number] for number in range(12)]).astype(float) - frames).mean()
    assert error < 3, error  # noise of 16 grey levels through H.264; a crop shifted by one pixel gives 9


# -- windows and folds


def test_windows_end_at_every_record_and_step_by_time():
    """10 records a second at 5 frames a second: every other record. Pictures 30 ms off their time still count."""
    times = np.arange(40) / RATE
    windows = P.cut_windows(times, 5.0, 4)
    np.testing.assert_array_equal(windows, np.arange(6, 40)[:, None] + [-6, -4, -2, 0])
    np.testing.assert_array_equal(P.cut_windows(times, 5.0, 4, stride=3)[:, -1], np.arange(6, 40, 3))
    late = times + np.random.default_rng(0).uniform(-0.03, 0.03, 40)
    windows = P.cut_windows(late, 5.0, 4)
    assert len(windows) > 25 and np.abs(late[windows] - (late[windows[:, -1:]] + [-0.6, -0.4, -0.2, 0])).max() < 0.1


def test_windows_with_a_hole_are_left_out():
    """A pause of two seconds: no window holds pictures of both sides, and none repeats a picture."""
    times = np.concatenate([np.arange(20), np.arange(40, 60)]) / RATE
    windows = P.cut_windows(times, 5.0, 4)
    assert len(windows) == 2 * 14
    assert np.diff(times[windows], axis=1).max() < 0.3
    assert len(P.cut_windows(np.arange(20) / 2.0, 5.0, 4)) == 0, "a drive slower than the clip has no windows"


@pytest.mark.parametrize("gap_s", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("num_folds", [2, 5])
def test_no_training_window_comes_near_a_test_window(gap_s, num_folds):
    """All pictures of both against each other, at irregular times. Seen red with `begin` in place of `end`, and without
    the gap."""
    times = np.cumsum(np.random.default_rng(3).uniform(0.08, 0.12, 300))
    windows = P.cut_windows(times, 5.0, 8)
    folds = P.time_folds(times[windows[:, 0]], times[windows[:, -1]], num_folds, gap_s)
    np.testing.assert_array_equal(np.concatenate([test for _, test in folds]), np.arange(len(windows)))
    for train, test in folds:
        assert len(train) > 0 and (np.diff(test) == 1).all()
        apart = np.abs(times[windows[train]].reshape(-1, 1) - times[windows[test]].reshape(1, -1))
        assert apart.min() > gap_s
        near = np.setdiff1d(np.arange(len(windows)), [*train, *test])  # nothing farther away than need be is lost
        if len(near):
            assert all(
                np.abs(times[windows[number]][:, None] - times[windows[test]].reshape(1, -1)).min() <= gap_s + 0.2
                for number in near
            )


# -- features


def test_pooled_tokens_are_means_over_neighbouring_sites():
    """16 x 12 sites -> 8 x 6, tubelets and channels apart; small grids stay as they are."""
    tokens = torch.randn(2, 3 * 16 * 12, 5)
    pooled = P.pool_tokens(tokens, (3, 16, 12))
    expected = tokens.view(2, 3, 8, 2, 6, 2, 5).mean((3, 5)).reshape(2, 3 * 48, 5)
    torch.testing.assert_close(pooled, expected)
    assert P.pool_tokens(tokens[:, :96], (3, 8, 4)) is not None and torch.equal(
        P.pool_tokens(tokens[:, :96], (3, 8, 4)), tokens[:, :96]
    )
    assert P.pool_tokens(torch.randn(1, 14 * 14, 4), (1, 14, 14)).shape == (1, 49, 4)


def test_pixel_tokens_hold_their_own_corner():
    """Token (t, h, w) is made of frames 2t, 2t + 1 and pooled pixels 2h.., 2w.. of its window."""
    rng = np.random.default_rng(0)
    pictures = {number: rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for number in (4, 6, 8, 10)}
    tokens = P.pixel_features(pictures, np.array([[4, 6, 8, 10], [4, 4, 4, 4]]), 2)
    assert tokens.shape == (2, 2 * 64, 24)
    token = tokens[0, 64 + 3 * 8 + 5].view(2, 3, 2, 2)  # t = 1, h = 3, w = 5 -> frames 8 and 10
    for frame, number in enumerate((8, 10)):
        box = pictures[number][12:16, 30:36].reshape(2, 2, 2, 3, 3).mean((1, 3)) / 255  # [2, 2, 3]
        np.testing.assert_allclose(token[frame].permute(1, 2, 0), box, atol=1e-6)


def test_encoder_features_are_the_target_encoder_on_each_window():
    """Window by window and in batches alike; the long window is not the short one repeated."""
    cfg = tub_config()
    model = new_model(cfg).eval()
    rng = np.random.default_rng(1)
    pictures = {number: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for number in range(9)}
    windows = np.array([[0, 1, 2, 3], [2, 4, 6, 8], [5, 6, 7, 8]])
    features = P.encoder_features(model, pictures, windows, 2, "test")
    for row, tokens in zip(windows, features):
        clip = model.normalise(torch.from_numpy(np.stack([pictures[n] for n in row])).permute(0, 3, 1, 2)[None])
        torch.testing.assert_close(tokens[None], model.make_targets(clip), rtol=1e-4, atol=1e-5)


# -- probes and scores


def make_task(noise=0.0, num=240):
    """Features [n, 6, 8] in which one token holds the label along one direction -> (features, labels, folds, begin,
    end)."""
    labels = steering(num)
    features = torch.randn(num, 6, 8, generator=torch.Generator().manual_seed(0))
    features[:, 4, 2] = torch.from_numpy(labels * 8 + noise * np.random.default_rng(1).normal(size=num)).float()
    begin = np.arange(num) / RATE
    return features, labels, P.time_folds(begin, begin + 0.6, 4, 1.0), begin, begin + 0.6


def r2(predictions, labels):
    return 1 - np.square(predictions - labels).mean() / labels.var()


def test_linear_probe_finds_a_linear_label_and_not_a_shuffled_one():
    """Above 0.97 as it stands; with permuted training labels no better than the mean. Seen red with the shuffle left
    out."""
    features, labels, folds, begin, end = make_task()
    assert r2(P.linear_probe(features, labels, folds, begin, end), labels) > 0.97
    assert r2(P.linear_probe(features, labels, folds, begin, end, shuffle_seed=0), labels) < 0.1


def test_linear_probe_is_ridge_on_principal_components():
    """The Gram form against scikit-learn's PCA and the ridge it chooses, fold by fold."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV

    features, labels, folds, begin, end = make_task(noise=4.0)
    ours = P.linear_probe(features, labels, folds, begin, end)
    flat = features.flatten(1).double().numpy()  # 48 numbers: all components are kept
    for train, test in folds:
        pca = PCA(svd_solver="full").fit(flat[train])
        size = np.sqrt(np.square(pca.transform(flat[train])).mean() * 48 / min(P.COMPONENTS, len(train) - 1))
        inner = P.time_folds(begin[train], end[train], 4, 0.0)
        ridge = RidgeCV(P.ALPHAS, cv=inner, scoring="neg_mean_squared_error").fit(
            pca.transform(flat[train]) / size, labels[train]
        )
        np.testing.assert_allclose(ours[test], ridge.predict(pca.transform(flat[test]) / size), atol=1e-3)


def test_probes_never_see_the_labels_they_predict():
    """Changing a test block's labels leaves the predictions of that block untouched."""
    features, labels, folds, begin, end = make_task(noise=2.0)
    test = folds[1][1]
    changed = labels.copy()
    changed[test] = 7.0
    args = P.build_parser().parse_args(["--drive", "x", "--epochs", "2"])
    for predict in (
        lambda y: P.linear_probe(features, y, folds, begin, end),
        lambda y: P.attentive_probe(features, y, folds, args, "cpu", "test"),
    ):
        np.testing.assert_array_equal(predict(labels)[test], predict(changed)[test])


@pytest.mark.slow
def test_attentive_probe_attends_to_the_token_that_knows():
    """R2 above 0.8 in 80 epochs on features of any scale, near 0 on features without the label. Seen red with test
    features not standardised."""
    features, labels, folds, _, _ = make_task()
    args = P.build_parser().parse_args(["--drive", "x", "--epochs", "80"])
    assert r2(P.attentive_probe(features * 3 + 5, labels, folds, args, "cpu", "test"), labels) > 0.8
    args.epochs = 10
    nothing = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    assert r2(P.attentive_probe(nothing, labels, folds, args, "cpu", "test"), labels) < 0.2


def test_scores_are_scikit_learns_and_intervals_those_of_resampled_blocks():
    """MAE and R2 against the library; intervals against a bootstrap written out. Two seeds count by their mean."""
    from sklearn.metrics import mean_absolute_error, r2_score

    rng = np.random.default_rng(0)
    labels, blocks = rng.normal(size=200), np.arange(200) // 20
    close, far = labels + 0.3 * rng.normal(size=200), labels + 0.9 * rng.normal(size=200)
    rows = [
        dict(features="trained", probe="linear", window="now", predictions=close[None]),
        dict(features="untrained", probe="linear", window="now", predictions=np.stack([close, far])),
    ]
    P.score_rows(rows, labels, blocks, seed=0)
    assert rows[0]["mae"] == pytest.approx(mean_absolute_error(labels, close))
    assert rows[0]["r2"] == pytest.approx(r2_score(labels, close))
    assert rows[1]["r2"] == pytest.approx((r2_score(labels, close) + r2_score(labels, far)) / 2)
    assert rows[1]["mae"] == pytest.approx((mean_absolute_error(labels, close) + mean_absolute_error(labels, far)) / 2)
    assert [seed["r2"] for seed in rows[1]["per_seed"]] == pytest.approx(
        [r2_score(labels, close), r2_score(labels, far)]
    )
    draws = []
    for _ in range(600):
        taken = np.concatenate([np.flatnonzero(blocks == block) for block in rng.integers(0, 10, 10)])
        draws.append(r2_score(labels[taken], close[taken]))
    np.testing.assert_allclose(rows[0]["r2_interval"], np.percentile(draws, (2.5, 97.5)), atol=0.015)
    assert rows[1]["r2_above_trained"][1] < 0 < rows[1]["mae_above_trained"][0], (
        "the worse row must lie apart from the better one"
    )
    assert "r2_above_trained" not in rows[0]


# -- the command


def test_command_reports_every_row_and_features_beat_shuffled_labels(tub, ckpt, tmp_path, capsys):
    """The whole command on 16 s of a drive with a visible cue: features tell it, permuted labels do not, and the files
    say the same as the table."""
    command = [
        "--ckpt",
        ckpt,
        "--drive",
        tub[0],
        "--out",
        tmp_path,
        "--gap_s",
        1,
        "--block_s",
        1,
        "--folds",
        3,
        "--untrained_seeds",
        2,
        "--epochs",
        2,
        "--device",
        "cpu",
    ]
    assert P.main([str(part) for part in command]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "probe_drive.json").read_text())
    rows = {(row["features"], row["probe"], row["window"]): row for row in report["rows"]}
    names = ("trained", "untrained", "pixels", "pixels_grey")
    both = [
        (name, probe, window) for name in names for probe in ("linear", "attentive") for window in ("now", "now+soon")
    ]
    assert set(rows) == {
        *both,
        ("shuffled", "linear", "now"),
        ("shuffled", "linear", "now+soon"),
        ("mean", "", ""),
        ("persistence", "", ""),
    }
    assert report["windows"] == 160 - 14
    assert all(row["mae_interval"][0] <= row["mae"] <= row["mae_interval"][1] for row in rows.values())
    for name in ("trained", "pixels"):
        assert rows[name, "linear", "now"]["r2_interval"][0] > max(
            0.3, rows["shuffled", "linear", "now"]["r2_interval"][1]
        )
    assert rows["mean", "", ""]["r2"] < 0.05
    signal = tub[1][14:]
    assert rows["persistence", "", ""]["mae"] == pytest.approx(np.abs(signal - tub[1][12:-2]).mean())
    assert f"{rows['trained', 'linear', 'now']['r2']:.3f}" in printed and len(printed.splitlines()) == 2 + len(rows)


def spoil(folder, what):
    """Damage a good tub in one way."""
    catalog = folder / "catalog_0.catalog"
    lines = catalog.read_text().splitlines()
    if what == "picture gone":
        (folder / "images" / "9_cam.png").unlink()
    elif what == "picture torn":
        path = folder / "images" / "9_cam.png"
        path.write_bytes(path.read_bytes()[:40])
    elif what == "line torn":
        catalog.write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]))
    elif what == "no angle":
        catalog.write_text("\n".join([lines[0].replace("user/angle", "user/other"), *lines[1:]]))
    elif what == "angle nan":
        catalog.write_text("\n".join([json.dumps({**json.loads(lines[0]), "user/angle": math.nan}), *lines[1:]]))
    elif what == "no stamps":
        catalog.write_text("\n".join(line.replace("_timestamp_ms", "_other") for line in lines))
    elif what == "catalog gone":
        catalog.unlink()
    elif what == "no catalogs":
        (folder / "manifest.json").write_text('["cam/image_array"]\n{"created_at": 1}\n')
    elif what == "no tub":
        for path in folder.glob("*.*"):
            path.unlink()
    else:
        raise KeyError(what)


@pytest.mark.parametrize(
    "what, words",
    [
        ("picture gone", "1 pictures missing, the first is 9_cam.png"),
        ("picture torn", "picture 9_cam.png: cannot be decoded"),
        ("line torn", "line 5 is not JSON"),
        ("no angle", "record 3 lacks one of"),
        ("angle nan", "record 3 lacks one of"),
        ("no stamps", "give the camera's rate with --fps"),
        ("catalog gone", "catalog_0.catalog: cannot be read"),
        ("no catalogs", "no line lists the catalogs"),
        ("no tub", "no Donkeycar tub"),
    ],
)
def test_a_damaged_tub_ends_in_one_line(tmp_path, capsys, what, words):
    """error: ..., exit code 1, nothing on stdout."""
    folder, _ = write_tub(tmp_path / "tub", num=20)
    spoil(folder, what)
    assert P.main(["--drive", str(folder), "--export", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert not out and words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_stamps_of_a_conversion_are_refused(tmp_path, capsys):
    """4 ms between pictures is no camera: --fps must be given."""
    folder, _ = write_tub(tmp_path / "tub", num=20, milliseconds=4)
    assert P.main(["--drive", str(folder), "--export", str(tmp_path / "out")]) == 1
    assert "4 ms apart" in capsys.readouterr().err
    assert P.main(["--drive", str(folder), "--export", str(tmp_path / "out"), "--fps", "20"]) == 0


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--folds", "1"], 2, "folds = 1"),
        (["--gap_s", "nan"], 2, "gap_s = nan"),
        (["--signal", "speed"], 2, "invalid choice"),
        (["--fold", "3"], 2, "--fold"),
        (["--gap_s", "30"], 1, "drive too short"),
        (["--block_s", "10", "--gap_s", "1"], 1, "blocks of 10 s"),
        (["--signal", "throttle", "--gap_s", "1"], 1, "throttle does not change"),
        (["--ckpt", "absent.pt"], 2, "no such checkpoint"),
        (["--ckpt", ""], 2, "give --ckpt"),
        (["--drive", "absent"], 2, "no such folder"),
    ],
)
def test_wrong_flags_end_in_one_line(tub, ckpt, tmp_path, capsys, flags, code, words):
    """Usage errors leave with 2, a drive that does not suffice with 1; either way one line."""
    assert (
        P.main(["--ckpt", str(ckpt), "--drive", str(tub[0]), "--out", str(tmp_path), "--device", "cpu", *flags]) == code
    )
    err = capsys.readouterr().err.splitlines()
    assert words in err[-1] and err[-1].startswith("error: ") and sum(line.startswith("error") for line in err) == 1
    assert not (tmp_path / "probe_drive.json").exists()


def test_a_missing_extra_is_named():
    """One line with the command that installs it."""
    with pytest.raises(V.UserError, match=r'no_such_module not installed: pip install "vjepa-auto-v2\[eval\]"'):
        P.E.need("json", "no_such_module")


# -- export


def test_export_cuts_at_pauses_and_leaves_the_gap_out():
    """Records of every file, counted by hand: 3 s files, 1 s between, a pause after 6.9 s."""
    times = np.concatenate([np.arange(70), np.arange(100, 125)]) / RATE
    drive = P.Drive([], times, {})
    segments = P.cut_segments(drive, 3.0, 1.0)
    assert [(int(s[0]), int(s[-1]), len(s)) for s in segments] == [(0, 29, 30), (40, 69, 30), (70, 94, 25)]
    assert np.concatenate(P.cut_segments(drive, 3.0, 0.0)).tolist() == list(range(95))


def test_export_is_read_back_as_training_data(tub, tmp_path, capsys):
    """Videos and annotations are found by the script, as long as each other, and picture and steering still belong
    together."""
    folder = tmp_path / "data"
    assert P.main(["--drive", str(tub[0]), "--export", str(folder), "--segment_s", "4", "--gap_s", "1"]) == 0
    videos = V.find_videos(str(folder), "*")
    assert len(videos) == 4 and "4 videos" in capsys.readouterr().out
    for video in videos:
        about = V.read_annotation(str(folder), video)
        steer = np.array(about["steer"])
        first = about["first_record"]
        np.testing.assert_array_equal(steer, tub[1][first : first + len(steer)])
        assert about["fps"] == pytest.approx(RATE) and len(about["throttle"]) == len(steer)
        frames = V.read_frames(
            video.path, V.ClipPlan(len(steer), RATE, 36, 48, 0.0, 1.0, 1.0, 0.5, 0.5), "pyav"
        ).astype(float)
        seen = (frames[:, :, 26:].mean((1, 2, 3)) - frames[:, :, :22].mean((1, 2, 3))) / 120
        np.testing.assert_allclose(seen - seen.mean(), steer - steer.mean(), atol=0.05)
    assert P.main(["--drive", str(tub[0]), "--export", str(folder)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_real_tub(tmp_path):
    """1,000 records of a real tub against the list that was made from it by another program."""
    source = FOOTAGE / "driving" / "labelled" / "donkeycar_tub"
    if not (source / "tub.tar.gz").is_file():
        pytest.skip("no real tub here")
    with tarfile.open(source / "tub.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(V.UserError, match="give its rate with --fps"):
        P.read_tub(tmp_path / "tub")
    drive = P.read_tub(tmp_path / "tub", 20.0)
    listed = np.genfromtxt(source / "labels.csv", delimiter=",", skip_header=1, usecols=(1, 2))
    np.testing.assert_allclose(np.stack([drive.signals["steer"], drive.signals["throttle"]], 1), listed, atol=1e-9)
    assert drive.times[-1] == pytest.approx(999 / 20) and os.path.basename(drive.paths[10]) == "10_cam_image_array_.jpg"
    assert P.read_picture(drive.paths[500]).shape == (120, 160, 3)
