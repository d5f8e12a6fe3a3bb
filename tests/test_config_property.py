"""Random configs, command lines and config files: each runs, or ends in one line of UsageError; no third outcome."""

import functools
import importlib.util
import json
import math
import random
import re
import string
import warnings
from dataclasses import asdict, fields

import pytest
import torch
from conftest import V, random_batch
from training import cpu_process, new_model, new_phase

yaml = importlib.import_module("yaml") if importlib.util.find_spec("yaml") else None
FIELDS = {field.name: field for field in fields(V.VJepaAutoV2Config)}
# Fields whose large values cost time or memory; all others are drawn from their whole range. Most values fit together.
SMALL = {
    "num_workers": [0, 1, 512],
    "enc_depth": [1, 1, 2],
    "pred_depth": [1, 1, 2],
    "flow_depth": [1, 1, 2],
    "mlp_ratio": [0.1, 0.5, 1.0, 4.0],
    "short_num_blocks": [1, 1, 2, 2, 7],
    "long_num_blocks": [1, 1, 2],
    "mask_draws": [1, 1, 2, 3],
    "short_visible": [0.0, 0.01, 0.2, 0.5, 0.8, 0.99],
    "long_visible": [0.0, 0.01, 0.2, 0.5, 0.8, 0.99],
    "outcome_queries": [1, 2, 5],
    "outcome_queue": [0, 1, 2, 3, 16],
    "flow_rank": [1, 2, 7, 16, 64],
    "flow_joint_max": [0, 0, 500, 65536, 2**40],
    "flow_pool": [1, 1, 1, 2, 3],
    "flow_draws": [1, 2, 3],
    "flow_steps": [1, 2, 3],
    "batch_size": [1, 2, 2, 3],
    "grad_accum": [1, 1, 2],
    "lambda_flow": [0.0, 1.0, 1.0],
    "lambda_supcon": [0.0, 0.0, 1.0],
    "lambda_vjepa": [0.0, 1.0, 1.0],
    "flow_fit_clips": [0, 0, 1, 100],
    "lr": [0.0, 1e-6, 1e-3, 0.03],
    "flow_lr": [0.0, 1e-6, 1e-3, 0.03],
    "weight_decay": [0.0, 0.05, 1.0],  # a rate of 7 may well diverge in a step
    "preset": list(V.merged(V.VJepaAutoV2Config, "PRESETS")),
    "device": ["cpu"],
    "compile": [False],
    "compile_whole": [False, True],
}
SIZES = [
    "patch",
    "image_size",
    "tubelet_t",
    "now_frames",
    "soon_frames",
    "eventually_frames",
    "num_frames",
    "num_heads",
    "enc_dim",
    "pred_dim",
    "flow_heads",
    "flow_dim",
    "flow_chunks",
    "flow_rank",
    "flow_pool",
]  # rules tie these to each other
TEXTS = {
    "data_root": ["", "a b", "data", "/nowhere/\u00e9"],
    "video_glob": ["*", "", "*.mp4", "[", "**"],
    "out_dir": ["runs/x", "."],
    "resume": ["auto", "never", "a.pt"],
    "frame_cache": ["auto", "auto", "auto", "auto", "off", "kept"],
    "track": ["", "", "wandb", "tensorboard,wandb", ","],
    "actions": ["none", "none", "none", "steer", "speed,accel", "yaw_rate, steer"],
    "scene_mix": ["default", "fork_only", "fork=1", "fork=3, brake=0.5", "steady=1e-9"],
}
ODD = [
    -1,
    0,
    1,
    5,
    7,
    10**9,
    2**63,
    10**30,
    -(10**400),
    10**5000,
    -1.0,
    0.0,
    0.3,
    2.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "0",
    "x\ny",
    "\x1b[31m",
    "a\0b",
    "\ud800",
    "fork=nan",
    "fork=1,lane=-1",
    "=",
    "wandb,mlflow",
    None,
    True,
    False,
    (),
    (8,),
    (16, 24),
    [16, 8],
    (8, 8.0),
    (8, 10**5000),
    [[[]]],
    {},
    b"x",
    object(),
    torch.zeros(2, 2),
]
TOO_LARGE = {
    "mlp_ratio": 8,
    "lr": 1,  # weights of 1e308 are no fault of the loop
    "flow_lr": 1,
    "num_frames": 64,
    "enc_dim": 64,
    "pred_dim": 64,
    "flow_dim": 64,
    "outcome_queries": 8,
    "flow_draws": 8,
    "flow_rank": 300,
    "flow_steps": 8,
    "outcome_queue": 10**4,
    "mask_draws": 4,
    "enc_depth": 8,
    "pred_depth": 8,
    "flow_depth": 8,
    "batch_size": 8,
    "grad_accum": 8,
    "height": 64,
    "width": 64,
    "short_num_blocks": 100,
    "long_num_blocks": 100,
    "flow_tokens": 500,
}


def draw_in_range(rng, name):
    """Either end of a field's range, or something between; open and very wide ones: up to ten times the default."""
    low, high = V.merged(V.VJepaAutoV2Config, "RANGES")[name]
    default = FIELDS[name].default
    wide = (
        high is None or high > 100 * max(default, 1) and rng.random() < 0.97
    )  # a bound that only keeps nonsense out is met now and then
    top = 10 * max(default, 1) if wide else high
    if FIELDS[name].type is int:
        return rng.choice([low, default, default, rng.randint(low, top)] + ([] if wide else [high]))
    return rng.choice([float(low), default, default, rng.uniform(low, top)] + ([] if wide else [float(high)]))


def draw_config(rng):
    """One random value for every field; about half of the draws break no rule."""
    values = {}
    for name, field in FIELDS.items():
        if name in SMALL or name in TEXTS or name in V.merged(V.VJepaAutoV2Config, "CHOICES"):
            values[name] = rng.choice(
                SMALL.get(name) or TEXTS.get(name) or V.merged(V.VJepaAutoV2Config, "CHOICES")[name]
            )
        elif field.type is bool:
            values[name] = rng.random() < 0.5
        elif name in V.merged(V.VJepaAutoV2Config, "RANGES"):
            values[name] = draw_in_range(rng, name)
    for pair in (
        ("crop_scale_min", "crop_scale_max"),
        ("crop_ratio_min", "crop_ratio_max"),
        ("aspect_min", "aspect_max"),
    ):
        values.update(zip(pair, sorted(values[name] for name in pair)))
    heads, flow_heads, patch, tubelet = (
        rng.choice([1, 2, 3, 4]),
        rng.choice([1, 2, 4]),
        rng.choice([1, 4, 4, 5, 8, 8, 16]),
        rng.choice([1, 2, 2, 3]),
    )
    sides = [
        patch * rng.randint(max(1, -(-8 // patch)), min(5, 32 // patch)) if patch > 1 else rng.randint(1, 5)
        for _ in range(2)
    ]
    parts = {name: tubelet * rng.choice([1, 1, 2, 3]) for name in ("now_frames", "soon_frames", "eventually_frames")}
    widths = [heads * rng.choice([6, 6, 8, 12]) for _ in range(2)]  # even per head, as rope wants it
    values |= {
        "patch": patch,
        "image_size": sides[0] if rng.random() < 0.5 else tuple(sides),
        "tubelet_t": tubelet,
        **parts,
        "num_frames": sum(parts.values()),
        "num_heads": heads,
        "enc_dim": widths[0],
        "pred_dim": widths[1],
        "flow_heads": flow_heads,
        "flow_dim": flow_heads * 2 * rng.randint(1, 6),
        "pred_heads": rng.choice([0, heads]),
        "grad_clip_value": rng.choice([0.0, 0.1]) if not values["grad_clip"] else rng.choice([0.0] * 49 + [1.0]),
        "amp_type": values["amp_type"] if values["amp"] or rng.random() < 0.02 else "auto",
        "start_fps": rng.choice([0.0, 0.0, values["clip_fps"]] if rng.random() < 0.98 else [1.0]),
        "frame_cache": values["frame_cache"] if values["decoder"] != "decord" or rng.random() < 0.1 else "auto",
        "windows_per_file": rng.choice([1, 1, 3]) if values["clip_fps"] and values["scenes"] == "files" else 1,
        "freeze_encoder": rng.random() < 0.01,  # without weights both are refused
        "teacher": "frozen" if rng.random() < 0.01 else "ema",
        "soon_fit_steps": rng.choice([0, 1, 3] if values["flow_fit_clips"] else [0] * 49 + [1]),
        "flow_chunks": rng.randint(1, parts["eventually_frames"] // tubelet),
        "flow_rank": rng.choice([1, 2, 5, 16, 64 if values["flow_joint_max"] else 3]),
    }
    while rng.random() < 0.25:
        values[rng.choice(SIZES)] = rng.randint(1, 13)
    while rng.random() < 0.25:
        name = rng.choice(list(FIELDS))
        values[name] = (
            rng.choice(ODD)
            if rng.random() < 0.7 or name not in V.merged(V.VJepaAutoV2Config, "RANGES")
            else draw_in_range(rng, name)
        )
    return V.VJepaAutoV2Config(**values)


def check_line(error):
    """A message is one printable line of bearable length."""
    line = str(error)
    assert line.strip() and not re.search(V.UNPRINTABLE, line) and len(line) < 3000, repr(line[:400])
    return line


def labelled_batch(cfg, rng, first):
    batch = random_batch(cfg, cfg.batch_size, seed=first, first=first)
    batch["maneuver"] = torch.tensor([rng.choice([-1, 0, 1, 2]) for _ in range(cfg.batch_size)])
    return batch


def run_steps(cfg, rng, num_steps, sample):
    """Optimizer steps on random frames, then sampled futures; all of it must stay finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Initializing zero-element tensors"
        )  # mlp_ratio 0.1 of a narrow width leaves no hidden channel
        model = new_model(cfg)
    if sample:
        assert (
            all(math.isfinite(value) and value >= 0 for value in V.flops_per_clip(cfg).values())
            and V.memory_estimate_gb(cfg, 1) > 0
        )
    phase = new_phase(model, cpu_process(torch.bfloat16 if cfg.amp else None))
    for step in range(num_steps):
        first = step * cfg.grad_accum
        batches = [labelled_batch(cfg, rng, (first + number) * cfg.batch_size) for number in range(cfg.grad_accum)]
        metrics, carries, finite = V.take_step(phase, batches, step)
        assert finite, {name: float(value) for name, value in metrics.items()}
        V.apply_step(phase, carries, step)
        phase.optimizer.zero_grad(set_to_none=True)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if sample:
        now = torch.randn(1, cfg.now_frames, 3, cfg.height, cfg.width)
        futures = model.eval().sample_futures(now, 2, num_steps=min(cfg.flow_steps, 3))
        assert futures.shape == (1, 2, cfg.soon_tokens + cfg.flow_chunks, cfg.enc_dim) and torch.isfinite(futures).all()


def as_flags(cfg):
    """A config as the flags that give it."""
    flags = []
    for name, value in asdict(cfg).items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return flags


def check_round_trip(cfg, folder):
    """A valid config comes back the same from flags, from JSON and from YAML."""
    plain = json.loads(json.dumps(asdict(cfg)))
    (folder / "a.json").write_text(json.dumps(plain))
    ways = [as_flags(cfg), ["--config", str(folder / "a.json")]]
    if yaml:
        (folder / "a.yaml").write_text(yaml.safe_dump(plain))
        ways.append(["--config", str(folder / "a.yaml")])
    for argv in ways:
        assert plain == json.loads(json.dumps(asdict(V.resolve_config(argv, V.VJepaAutoV2)[0]))), argv


def try_configs(seed, count, folder):
    """-> how many were refused, how many made their steps."""
    rng, default, refused, ran = random.Random(seed), V.VJepaAutoV2Config(), 0, 0
    for number in range(count):
        cfg = draw_config(rng)
        try:
            V.validate_config(cfg)
        except V.UsageError as error:
            assert check_line(error).startswith("config: ") and re.search(r"\(--\w+\)$", str(error))
            refused += 1
            continue
        if any(getattr(cfg, name) > most for name, most in TOO_LARGE.items()):
            continue  # valid, and too large for a test
        long = number % 4 == 0
        try:
            if long:
                check_round_trip(cfg, folder)
            run_steps(cfg, rng, 3 if long else 1, sample=long)  # the flow's directions stay zero until the second step
        except Exception as error:  # the third outcome, whatever it is, is told with the config that made it
            changed = {name: value for name, value in asdict(cfg).items() if value != getattr(default, name)}
            raise AssertionError(f"a third outcome, of number {number}, {changed}") from error
        ran += 1
    return refused, ran


@pytest.mark.parametrize("count", [24, pytest.param(60, marks=pytest.mark.slow)])
def test_random_configs_run_or_are_refused(tmp_path, count):
    """Configs over all fields. Seen red with the rules between fields left out, and with the types not checked."""
    refused, ran = try_configs(0, count, tmp_path)
    assert refused >= count / 4 and ran >= count / 4, (refused, ran)


@pytest.mark.slow
def test_1000_random_configs_run_or_are_refused(tmp_path):
    """The same at length."""
    refused, ran = try_configs(1, 1000, tmp_path)
    assert refused >= 250 and ran >= 400, (refused, ran)


# -- random command lines and files

LETTERS = string.printable + "\0\x1b\x85\u2028\u00e9\u0661\udcff\ud83d"
WORDS = [
    "0",
    "1",
    "2",
    "-1",
    "1e-4",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1_0",
    "012",
    "0x1f",
    "1" * 30,
    "9" * 5000,
    "64,96",
    "64,",
    ",",
    "16,16,16",
    "true",
    "no",
    "None",
    "",
    " ",
    "=",
    "--",
    "-",
    "-5",
    "a b",
    "x\ny",
    "../x",
    "~",
    "$(touch x)",
    "; ls",
    "'",
    "cpu",
    "auto",
    "tiny",
    "base",
    "sincos",
    "mean",
    "fork=1",
    "wandb",
]


def random_text(rng):
    return rng.choice(WORDS) if rng.random() < 0.7 else "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 12)))


def fitting_text(rng, name):
    """A text that the field may well accept."""
    if name in V.merged(V.VJepaAutoV2Config, "CHOICES"):
        return rng.choice(V.merged(V.VJepaAutoV2Config, "CHOICES")[name])
    return str(
        FIELDS[name].default
        if rng.random() < 0.5 or name not in V.merged(V.VJepaAutoV2Config, "RANGES")
        else draw_in_range(rng, name)
    )


def outcome(argv, origin):
    """What a command line ends in -> its config, or the line of its UsageError. All else fails and names its origin."""
    try:
        cfg, overrides, _ = V.resolve_config(argv, V.VJepaAutoV2)
        assert V.validate_config(cfg) is None and set(overrides) <= set(FIELDS)
        return cfg
    except V.UsageError as error:
        return check_line(error)
    except Exception as error:  # the third outcome, whatever it is, is told with the command line that made it
        raise AssertionError(f"a third outcome, of {ascii(origin)}") from error


def random_argv(rng):
    """Up to four arguments: known flags with fitting or random texts, flags that do not exist, loose words."""
    argv = []
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(list(FIELDS))
        flag = f"--{name}" if rng.random() < 0.7 else f"--{name.replace('_', '-')}"
        kind = rng.random()
        if kind < 0.6 and FIELDS[name].type is bool:
            argv.append(flag if rng.random() < 0.5 else f"--no-{name}")
        elif kind < 0.6:
            argv.append(f"{flag}={fitting_text(rng, name)}")
        elif kind < 0.75:
            argv += [flag, random_text(rng)]
        elif kind < 0.85:
            argv.append(f"{flag}={random_text(rng)}")
        elif kind < 0.9:
            argv += ["--config", random_text(rng)]
        else:
            argv.append(
                rng.choice(["", "-", "--", "--no-", f"{flag}x", f"-{name[0]}", f"--{name[:-1]}"]) + random_text(rng)
            )
    return argv


@pytest.fixture
def one_parser(monkeypatch):
    """The parser is built once: its 90 flags take longer than a command line."""
    monkeypatch.setattr(V, "build_parser", functools.lru_cache(V.build_parser))


def test_random_command_lines_give_a_config_or_one_line(one_parser, tmp_path, monkeypatch):
    """1,000 command lines: a valid config or a UsageError of one line. Seen red with control characters let through."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    argvs = [random_argv(rng) for _ in range(1000)]
    ends = [outcome(argv, argv) for argv in argvs if not {"-h", "--help"} & set(argv)]
    refused = sum(isinstance(end, str) for end in ends)
    assert 300 <= refused <= len(ends) - 100 and len(ends) > 900 and not list(tmp_path.iterdir()), (refused, len(ends))


def plain_values(rng, depth=0):
    """A random value that JSON can hold, at times a nested one."""
    if depth < 3 and rng.random() < 0.15:
        return [plain_values(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and rng.random() < 0.05:
        return {random_text(rng): plain_values(rng, depth + 1)}
    return rng.choice([None, True, False, 0, 1, -1, 0.5, 10**30, math.nan, math.inf, random_text(rng)])


def random_file(rng):
    """A config file of a few fields as JSON or YAML, some lines doubled, some characters changed -> (text, suffix)."""
    values = {}
    for name in rng.sample(list(FIELDS), rng.randint(0, 4)):
        values[name] = FIELDS[name].default if rng.random() < 0.8 else plain_values(rng)
    if rng.random() < 0.1:
        values[rng.choice(["inherits", "versions", "config", random_text(rng)])] = rng.choice(
            ["a.json", ["a.yaml"], "../b.json", plain_values(rng)]
        )
    as_yaml = yaml and rng.random() < 0.5
    text = (
        yaml.safe_dump(values, allow_unicode=True)
        if as_yaml
        else json.dumps(values, indent=1, ensure_ascii=rng.random() < 0.5)
    )
    lines = text.splitlines(keepends=True)
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    text = "".join(lines)
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + random_text(rng) + text[place + rng.randint(0, 2) :]
    return text, ".yaml" if as_yaml else ".json"


def test_random_config_files_give_a_config_or_one_line(one_parser, tmp_path):
    """1,000 files, half of them YAML where pyyaml is there. Seen red without nesting check, and coerce taking all."""
    rng, refused = random.Random(0), 0
    for _ in range(1000):
        text, suffix = random_file(rng)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused += isinstance(outcome(["--config", str(path)], text), str)
    assert 250 <= refused <= 750, refused
