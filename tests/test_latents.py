"""Cached latents: what tools/cache_latents.py writes, what a run reads of it, and what neither takes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, V, small_config
from training import new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))
import cache_latents as C
from toy_world import Toy

PLAIN = dict(lambda_vjepa=0.0, crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0, hflip=False)


def flags_of(cfg):
    """The command line of a config."""
    default = type(cfg)()
    return [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}"
        for name, value in vars(cfg).items()
        if value != getattr(default, name)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six videos of two windows each and one shorter than a clip, a source of weights, a cache of them -> (config of an
    uncached run, folder of the cache)."""
    root = tmp_path_factory.mktemp("cached")
    (root / "videos").mkdir()
    rng = np.random.default_rng(0)
    for number, seconds in enumerate((6.5, 6.5, 6.5, 6.5, 6.5, 6.5, 2.0)):
        base = rng.integers(0, 256, (8, 8, 3))
        frames = [
            np.kron(np.roll(base, shift, 1), np.ones((8, 8, 1))).astype(np.uint8) for shift in range(int(8 * seconds))
        ]
        V.write_video(root / "videos" / f"clip_{number}.mp4", np.stack(frames), 8)
    model = new_model(small_config(), seed=3)
    torch.save(new_state(model), root / "source.pt")
    # a cache holds all EVENTUALLY tubelets
    weights = dict(init_from=str(root / "source.pt"), freeze_encoder=True, eventually_stride=1)
    cfg = small_config(
        data_root=str(root / "videos"), out_dir=str(root / "run"), clip_fps=4.0, val_fraction=0.3, **weights, **PLAIN
    )
    assert C.main([f"--out={root / 'cache'}", *flags_of(cfg)]) == 0
    return cfg, root / "cache"


@pytest.fixture
def copy(made, tmp_path):
    """A cache of one's own to damage -> (config of a run from it, folder)."""
    folder = tmp_path / "cache"
    shutil.copytree(made[1], folder)
    return cached(made[0], folder), folder


def cached(cfg, folder):
    """The config of a run from a cache."""
    return replace(cfg, data_root="", latents=str(folder))


def open_source(cfg, world=V.VJepaAutoV2):
    """The DataSource as a run opens it."""
    videos = V.list_latents(world, cfg) if cfg.latents else V.list_data(cfg, world.Dataset)
    return V.open_data(world, cfg, videos, True, None)


def rows_of(folder):
    with open(folder / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def reason_of_first(cfg):
    """Why the first row of a cache cannot be read."""
    clips = V.list_latents(V.VJepaAutoV2, cfg)
    with pytest.raises(V.BadFile) as caught:
        data = clips.Dataset(cfg, clips, "", "train")
        content = data.read_file(clips[0], 0.0)
        data.check_form(content)
    return str(caught.value)


def test_what_is_written(made):
    """Two windows of a long video, one of a short one; fp16; the list names the same windows."""
    cfg, folder = made
    rows = rows_of(folder)
    assert list(rows[0]) == list(C.COLUMNS)
    assert [row["name"] for row in rows] == [f"clip_{number // 2}.mp4" for number in range(12)] + ["clip_6.mp4"]
    assert [float(row["begin"]) for row in rows[:2]] == [0.0, 3.0] and float(rows[-1]["length"]) == pytest.approx(2.0)
    lines = [json.loads(line) for line in (folder / "list.jsonl").read_text().splitlines()]
    assert [Path(line["video"]).name for line in lines] == [row["name"] for row in rows]
    assert [line.get("begin", 0.0) for line in lines] == [float(row["begin"]) for row in rows]
    found = torch.load(folder / rows[0]["out_path"], weights_only=True)
    short = cfg.now_tokens + cfg.soon_tokens + cfg.eventually_tubelets
    assert {name: tuple(value.shape) for name, value in found.items()} == {"context": (32, 48), "targets": (short, 48)}
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_losses_are_those_of_the_uncached_run(made):
    """The same samples, the same held-out files, losses equal to the rounding of fp16, 2^-11, a few times over."""
    cfg, folder = made
    plain = open_source(replace(cfg, data_root=str(folder / "list.jsonl")))
    stored, direct = open_source(cached(cfg, folder)), open_source(cfg)
    drives = [sorted({video.drive for video in source.val}) for source in (plain, stored, direct)]
    assert drives[0] == drives[1] == drives[2] and drives[0]
    model = new_model(cfg).eval()
    for stream in ("train", "val"):
        sets = [source.dataset(run, stream) for source, run in ((plain, cfg), (stored, cached(cfg, folder)))]
        for first in (0, 7):
            batches = [V.collate([data[index] for index in range(first, first + 4)]) for data in sets]
            assert torch.equal(batches[0]["file"], batches[1]["file"]) and not batches[1]["bad"]
            (losses, gauges, carry), (theirs, other, rest) = (model(batch) for batch in batches)
            for name, loss in {**losses, **gauges}.items():
                torch.testing.assert_close(theirs.get(name, other.get(name)), loss, rtol=2e-3, atol=2e-3)
            looks = [model.look(batches[0], carry), model.look(batches[1], rest)]
            torch.testing.assert_close(looks[1]["targets"], looks[0]["targets"], rtol=2e-3, atol=2e-3)
            held = [model.held_out(batch, each) for batch, each in zip(batches, (carry, rest))]
            assert held[0]["flow_spread"] == pytest.approx(held[1]["flow_spread"], rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("name, value", [("clip_fps", 8.0), ("image_size", 64), ("soon_frames", 2), ("num_heads", 2)])
def test_another_cache_is_refused(made, name, value):
    """Rate, size and window are named with both values."""
    cfg = replace(cached(*made), **{name: value})
    with pytest.raises(V.UsageError, match=rf"latents .*{name} = .* \(here {value}\)"):
        V.list_latents(V.VJepaAutoV2, cfg)


def test_other_weights_and_worlds_are_refused(made, copy):
    cfg, folder = copy
    about = json.loads((folder / "cache.json").read_text())
    about["frozen"]["online"] = "0" * 64
    (folder / "cache.json").write_text(json.dumps(about))
    source = open_source(cfg)
    run = V.Run(cfg, None, None, None, source, new_model(cfg))
    with pytest.raises(V.UsageError, match="encoder with other weights"):
        V.check_cache(run)
    with pytest.raises(V.UsageError, match=r"Toy has none to read \(--latents\)"):
        V.list_latents(Toy, cfg)
    about["settings"]["world"] = "Toy"
    (folder / "cache.json").write_text(json.dumps(about))
    with pytest.raises(V.UsageError, match=r"made with world = Toy \(here VJepaAutoV2\)"):
        open_source(cfg)


class Code:
    """What no cache may hold: unpickling it would run something."""

    def __reduce__(self):
        return os.mkdir, ("/nonexistent/ran",)


def damage_nan(path):
    found = torch.load(path, weights_only=True)
    found["context"][0, 0] = float("nan")
    torch.save(found, path)


def damage_shape(path):
    found = torch.load(path, weights_only=True)
    torch.save({**found, "targets": found["targets"][1:]}, path)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "latents cannot be read"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (damage_nan, "NaN or infinity: context"),
        (lambda path: torch.save(Code(), path), "latents cannot be read"),
        (lambda path: torch.save([1, 2], path), "no dict of tensors, but a list"),
        (lambda path: torch.save({"context": "x"}, path), "a str, which is no tensor"),
        (lambda path: torch.save({}, path), "absent"),
        (damage_shape, "targets is float16"),
    ],
)
def test_a_bad_file_is_named(copy, damage, reason):
    """Missing, cut, empty, NaN, code, other objects and shapes: a bad file, and another is read in its place."""
    cfg, folder = copy
    damage(folder / rows_of(folder)[0]["out_path"])
    assert reason in reason_of_first(cfg)
    assert not os.path.exists("/nonexistent/ran")
    sample = open_source(cfg).dataset(replace(cfg, decode_timeout_s=0.1), "train")
    assert all(sample[index]["file"] >= 0 for index in range(4))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda folder: (folder / "index.csv").unlink(), "no index.csv or cache.json that can be read .*goes on where"),
        (lambda folder: (folder / "cache.json").unlink(), "no index.csv or cache.json that can be read"),
        (lambda folder: (folder / "cache.json").write_text("{"), "cache.json that can be read"),
        (lambda folder: (folder / "cache.json").write_text("[]"), "cache.json that can be read"),
        (lambda folder: (folder / "cache.json").write_text('{"tensors": {"a": [[-1], "x"]}}'), "that can be read"),
        (lambda folder: (folder / "index.csv").write_text("name\na\n"), "no rows, or not all have out_path"),
        (lambda folder: (folder / "index.csv").write_text(""), "no rows, or not all have out_path"),
        (shutil.rmtree, "that can be read"),
    ],
)
def test_a_bad_cache_is_one_line(copy, spoil, reason):
    cfg, folder = copy
    spoil(folder)
    with pytest.raises(V.UsageError, match=reason) as caught:
        V.list_latents(V.VJepaAutoV2, cfg)
    assert "\n" not in str(caught.value)


def foreign_cache(folder, cfg, shape=None, **columns):
    """A csv of whole clips as FutureLatents writes it, one file of three clips and one of one -> its path."""
    folder.mkdir()
    grid, generator = cfg.grid, torch.Generator().manual_seed(0)
    shapes = [(3, cfg.enc_dim, *grid), shape or (cfg.enc_dim, *grid)]
    for number, each in enumerate(shapes):
        torch.save(torch.randn(each, generator=generator), folder / f"{number}.pt")
    names = ["out_path", *columns]
    lines = [",".join([f"{number}.pt", *(f"{value}_{number}" for value in columns.values())]) for number in range(2)]
    (folder / "embeddings.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    return folder / "embeddings.csv"


def test_caches_of_others_work_with_a_warning(made, tmp_path):
    """[B, D, T, H, W] and [D, T, H, W]: tokens in (t, h, w) order, NOW cut out of the whole, which a warning says."""
    cfg = cached(made[0], foreign_cache(tmp_path / "foreign", made[0], label="turn"))
    source = open_source(cfg)
    assert (
        "WARNING" in source.Dataset.notes(cfg, source)[0]
        and "NOW saw its future" in source.Dataset.notes(cfg, source)[0]
    )
    data = source.Dataset(cfg, V.list_latents(V.VJepaAutoV2, cfg), "", "train")
    whole = torch.load(tmp_path / "foreign" / "0.pt", weights_only=True)
    found = data.read_file(data.videos[0], 0.4)
    tokens = whole[1].flatten(1).T
    assert torch.equal(found["context"], tokens[: cfg.now_tokens])
    model = new_model(cfg)
    targets = V.layer_norm(tokens[None])
    torch.testing.assert_close(model.future_target(found["targets"][None]), model.future_target(targets))
    losses, _, _ = model(V.collate([source.dataset(cfg, "train")[index] for index in range(2)]))
    assert torch.isfinite(losses["loss_total"])


def test_caches_of_others_that_do_not_fit(made, tmp_path):
    cfg = made[0]
    path = foreign_cache(tmp_path / "foreign", cfg, shape=(cfg.enc_dim, 2, 2, 2))
    foreign = cached(cfg, path)
    data = V.list_latents(V.VJepaAutoV2, foreign)
    with pytest.raises(V.BadFile, match=r"holds \[8, 48\] tokens and channels, not 6 x 4 x 4 tokens of 48"):
        data.Dataset(foreign, data, "", "train").read_file(data[1], 0.0)
    for content in ([1], torch.ones(3), {"a": torch.ones(1)}, torch.ones(48, 6, 4, 4, dtype=torch.int64), Code()):
        for number in range(2):
            torch.save(content, path.parent / f"{number}.pt")
        with pytest.raises(V.UsageError, match="no usable file among the first"):
            V.list_latents(V.VJepaAutoV2, foreign)


# -- the tool


def test_only_what_is_missing_is_made(made, copy, capsys):
    """Given again, the command makes the windows whose files are gone, and no other."""
    _, folder = copy
    rows = rows_of(folder)
    gone, kept = folder / rows[3]["out_path"], folder / rows[4]["out_path"]
    before = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink(), (folder / "index.csv").unlink()
    for name, hours in ((".left.pt.999999999.tmp", 2), (".new.pt.999999998.tmp", 0)):
        (folder / "clips" / name).write_bytes(b"x")
        os.utime(folder / "clips" / name, (time.time() - 3600 * hours,) * 2)
    capsys.readouterr()
    assert C.main([f"--out={folder}", *flags_of(made[0])]) == 0
    told = capsys.readouterr().out
    assert "13 windows of" in told and "1 of them to be made" in told
    assert gone.read_bytes() == before[0] and kept.stat().st_mtime_ns == before[1]
    # half a file that another machine may be writing stays
    assert rows_of(folder) == rows and [left.name[:4] for left in (folder / "clips").glob(".*")] == [".new"]


def test_shards_share_the_work(made, tmp_path, capsys):
    """The first says that others are missing; the last writes the same index as a single process."""
    cfg, folder = made
    for number in range(2):
        assert not (tmp_path / "index.csv").exists()
        assert C.main([f"--out={tmp_path}", f"--shard={number}/2", *flags_of(cfg)]) == 0
    assert "6 windows of other shards are missing" in capsys.readouterr().out
    assert (tmp_path / "index.csv").read_bytes() == (folder / "index.csv").read_bytes()
    assert (tmp_path / "list.jsonl").read_bytes() == (folder / "list.jsonl").read_bytes()


def test_windows_every_second_and_parts(made):
    """Windows overlap by --every_s, none leaves its part of the video or crosses a gap in its told times."""
    cfg = made[0]
    video = V.VideoFile("a", str(Path(cfg.data_root) / "clip_0.mp4"), begin=0.5)
    assert [part.video.begin for part in C.windows_of(cfg, video, 6.0, 1.0)] == [0.5, 1.5, 2.5, 3.5]
    assert [(part.video.begin, part.video.length) for part in C.windows_of(cfg, video, 2.0, 1.0)] == [(0.5, 0.0)]
    times = Path(cfg.data_root).parent / "times.npy"
    np.save(times, np.concatenate([np.arange(40) / 10, 10 + np.arange(35) / 10]))
    parts = C.windows_of(cfg, replace(video, begin=0.0, times=str(times)), 4.0, 0.5)
    assert [part.video.begin for part in parts] == [0.0, 0.5, 1.0, 10.0, 10.5]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--shard=2/2"], "shard = '2/2'"),
        (["--every_s=-1"], "every_s = -1.0"),
        (["--every_s=nan"], "every_s = nan"),
        (["--no-freeze_encoder", "--init_from="], "its encoder learns, so latents would not last (--freeze_encoder)"),
        (["--world=none.py"], "world none.py: no Python file (--world)"),
        ([f"--world={ROOT / 'tests' / 'conftest.py'}"], "holds no world (--world)"),
        (["--latents=x"], "latents: this tool makes them"),
        (["--data_root="], "data_root: must name the videos"),
        (["--clip_fps=8"], "holds a cache made with clip_fps = 4.0"),
    ],
)
def test_wrong_flags_are_one_line(copy, made, capsys, flags, line):
    assert C.main([f"--out={copy[1]}", *flags_of(made[0]), *flags]) == V.EXIT_USAGE
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and line in error[0]


def test_the_disk_and_the_folder_are_looked_at_first(made, tmp_path, monkeypatch, capsys):
    cfg = made[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert C.main([f"--out={tmp_path / 'other'}", *flags_of(cfg)]) == V.EXIT_USAGE
    assert "holds something else than a cache" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(C.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert C.main([f"--out={tmp_path / 'new'}", *flags_of(cfg)]) == V.EXIT_USAGE
    assert "GB are free (--out, --every_s)" in capsys.readouterr().err
    assert not list((tmp_path / "new" / "clips").iterdir())


def test_a_bad_video_is_left_out(made, tmp_path, capsys):
    cfg = made[0]
    videos = tmp_path / "videos"
    shutil.copytree(cfg.data_root, videos)
    (videos / "clip_2.mp4").write_bytes((videos / "clip_2.mp4").read_bytes()[:300])
    assert C.main([f"--out={tmp_path / 'cache'}", *flags_of(replace(cfg, data_root=str(videos)))]) == 0
    assert "1 videos or windows are left out: clip_2.mp4" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "cache")) == 11


@pytest.mark.slow
def test_killed_and_given_again(made, tmp_path):
    """kill -9 in the middle leaves whole files; the same command with loader workers finishes the same cache."""
    cfg, folder = made
    argv = [
        sys.executable,
        str(ROOT / "tools" / "cache_latents.py"),
        f"--out={tmp_path}",
        *flags_of(replace(cfg, num_workers=2)),
    ]
    process = subprocess.Popen([*argv, "--batch_size=1"], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("clips/*.pt"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in tmp_path.glob("clips/*.pt"):
        assert torch.load(path, weights_only=True).keys() == {"context", "targets"}
    subprocess.run(argv, check=True)
    assert (tmp_path / "index.csv").read_bytes() == (folder / "index.csv").read_bytes()
    for row in rows_of(folder):
        ours, theirs = (torch.load(place / row["out_path"], weights_only=True) for place in (tmp_path, folder))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_real_runs(made, tmp_path, capsys):
    """A cached run logs the losses of the uncached one, is resumed, draws its picture from the videos, says in one line
    when they are gone, and goes on with its flow phase from the cache."""
    cfg, folder = made
    fits = dict(flow_fit_clips=4, flow_fit_steps=2, soon_fit_steps=2, steps=4, ckpt_every=2, val_every=2)
    runs = {
        "plain": replace(cfg, data_root=str(folder / "list.jsonl"), out_dir=str(tmp_path / "plain"), **fits),
        "cached": replace(cached(cfg, folder), out_dir=str(tmp_path / "cached"), num_workers=2, **fits),
    }
    logs = {}
    for name, run in runs.items():
        assert V.main(flags_of(run)) == 0
        logs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert (tmp_path / name / "futures.png").is_file()
    assert len(logs["plain"]) == len(logs["cached"])
    for ours, theirs in zip(logs["plain"], logs["cached"]):
        assert ours["step"] == theirs["step"]
        for key in [key for key in ours if "loss" in key]:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-2, abs=1e-3), key
    moved = Path(cfg.data_root).with_name("moved")
    Path(cfg.data_root).rename(moved)
    capsys.readouterr()
    try:
        assert V.main(flags_of(replace(runs["cached"], steps=6))) == 0
    finally:
        moved.rename(cfg.data_root)
    told = capsys.readouterr().out
    assert "picture: none, since videos behind the latents are not there: " in told and "resumed from" in told


@pytest.mark.slow
def test_two_ranks(made, tmp_path):
    """torchrun on two ranks reads a cache, each its own samples."""
    cfg, folder = made
    run = replace(cached(cfg, folder), out_dir=str(tmp_path / "run"), steps=3, num_workers=1, picture=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(SCRIPT), *flags_of(run)], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    state = V.load_checkpoint(tmp_path / "run" / "checkpoints" / "ckpt_final.pt")
    assert state["step"] == 3 and state["world_size"] == 2 and state["data"]["root"] == str(folder / "list.jsonl")


@pytest.mark.slow
def test_tools_open_a_run_from_a_cache(made, tmp_path):
    """futures.py and probe_drive.py find the videos of a cached run by its list, and an untrained twin has no weights
    of the source."""
    import probe_drive

    cfg, folder = made
    run = replace(cached(cfg, folder), out_dir=str(tmp_path / "run"), steps=2, picture=False)
    assert V.main(flags_of(run)) == 0
    final = tmp_path / "run" / "checkpoints" / "ckpt_final.pt"
    command = [sys.executable, str(ROOT / "tools" / "futures.py"), f"--ckpt={final}", "--minutes=0.05", "--device=cpu"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    model, _ = V.load_model(final)
    twin = probe_drive.untrained_model(model, 0)
    assert not torch.equal(twin.online.tokenizer.proj.weight, model.online.tokenizer.proj.weight)
    pictures = {number: np.zeros((32, 32, 3), np.uint8) for number in range(12)}
    assert probe_drive.encoder_features(model, pictures, np.arange(12)[None], 1, "x").shape[0] == 1


def test_the_picture_of_a_cache_split_by_folders_keeps_the_sides(tmp_path):
    """Its clips of val/ are held out, as in the cached run. Seen red: the list went by hashes, so the picture could
    show clips of training."""
    names = [f"{side}/{number}.mp4" for side in V.SIDES for number in range(4)]
    lines = []
    for number, name in enumerate(names):
        (tmp_path / f"{number}.mp4").touch()
        lines.append(json.dumps({"video": f"{number}.mp4", "length": 3.0, "group": name}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "cache.json").write_text('{"split": "folders"}')
    source, gone = V.videos_behind(V.VJepaAutoV2, small_config(), str(tmp_path / "list.jsonl"))
    assert gone == [] and [part.group for part in source.val] == names[4:8]
    assert [part.group for part in source.train] == names[:4]
