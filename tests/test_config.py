"""Section 1 and 2: defaults, flags, presets, config files, and the rules that refuse a config which could not run."""

import ast
import functools
import inspect
import json
import math
import os
import re
import runpy
import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from conftest import SCRIPT, V, small_config

FIELDS = [field.name for field in fields(V.VJepaAutoV2Config)]
# People's scripts rely on these; lambda_flow and whatever else is new is not part of the promise.
CONTRACT = dict(
    image_size=224,
    num_frames=84,
    channels=3,
    tubelet_t=2,
    patch=16,
    enc_dim=768,
    enc_depth=12,
    pred_dim=384,
    pred_depth=12,
    num_heads=12,
    mlp_ratio=4.0,
    dropout=0.0,
    now_frames=4,
    soon_frames=16,
    eventually_frames=64,
    short_num_blocks=8,
    short_scale=0.15,
    long_num_blocks=2,
    long_scale=0.70,
    aspect_min=0.75,
    aspect_max=1.50,
    batch_size=8,
    num_workers=4,
    lr=1e-4,
    weight_decay=0.05,
    warmup_steps=2000,
    grad_clip=1.0,
    seed=1337,
    ema_momentum=0.996,
    lambda_vjepa=1.0,
    lambda_soon=1.0,
    lambda_eventually=0.25,
    outcome_queries=8,
    outcome_temperature=0.2,
    log_every=50,
    ckpt_every=1000,
    out_dir="runs/vjepa_auto_v2",
    device="auto",
    amp=False,
    compile=False,
    resume="auto",
    preset="base",
    data_root="",
    clip_fps=4.0,
    decoder="auto",
    missing_data="scenes",
    hflip=False,
    pos_embed="sincos",
)


@pytest.fixture(scope="module", autouse=True)
def read_help_once():
    """The help texts are read from the source by a slow call; once is enough for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "field_help", functools.lru_cache(V.field_help))
        yield


def resolve(*argv):
    """Config of a command line."""
    return V.resolve_config(list(argv), V.VJepaAutoV2)[0]


def fails(capsys, *argv):
    """Run a command line that must be refused -> its one line on stderr, without the prefix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "train", lambda *rest: pytest.fail("this command line must not start a run"))
        assert V.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err.removeprefix("error: ").strip()


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


# -- defaults and flags


def test_contract_defaults():
    """The promised defaults, exactly. Seen red with lr 2e-4."""
    defaults = asdict(V.VJepaAutoV2Config())
    assert {name: defaults[name] for name in CONTRACT} == CONTRACT
    assert "lambda_flow" in defaults and resolve() == V.VJepaAutoV2Config()


def test_flag_without_any_change_is_the_dataclass():
    """The command line adds nothing of its own: no flag, no override."""
    cfg, overrides, asked = V.resolve_config([], V.VJepaAutoV2)
    assert (cfg, overrides) == (V.VJepaAutoV2Config(), {})
    assert asked == {"config": [], "print_config": False, "dry_run": None}


def test_every_field_is_a_flag_in_both_spellings():
    """--batch_size and --batch-size; booleans --amp and --no-amp. Seen red with the dashed spelling dropped."""
    parser = V.build_parser(V.VJepaAutoV2)
    for name in FIELDS:
        kind = V.field_types(V.VJepaAutoV2Config)[name]
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            if kind is bool:
                assert getattr(parser.parse_args([flag]), name) is True
                assert getattr(parser.parse_args([f"--no-{flag[2:]}"]), name) is False
                continue
            text, value = {int: ("7", 7), float: ("0.5", 0.5), str: ("some text", "some text")}.get(
                kind, ("64,96", (64, 96))
            )
            got = getattr(parser.parse_args([flag, text]), name)
            assert got == value and type(got) is type(value)
            assert getattr(parser.parse_args([f"{flag}={text}"]), name) == value


def test_image_size_takes_one_number_or_two():
    """'64' is square, '64,96' is height, width; three numbers are refused."""
    assert resolve("--image_size", "64").image_size == 64
    cfg = resolve("--image_size", "64,96")
    assert (cfg.image_size, cfg.height, cfg.width) == ((64, 96), 64, 96)
    with pytest.raises(V.UsageError, match="image_size"):
        resolve("--image_size", "64,96,3")


def test_every_field_has_help_and_help_cannot_disagree():
    """--help tells each field's comment and its current default. Seen red with one trailing comment removed."""
    helps = V.field_help(V.VJepaAutoV2Config)
    assert list(helps) == FIELDS and all(len(text) > 2 for text in helps.values())
    source = SCRIPT.read_text(encoding="utf-8").split("\n# 2  ")[0]
    actions = {action.dest: action for action in V.build_parser(V.VJepaAutoV2)._actions}
    page = " ".join(V.build_parser(V.VJepaAutoV2).format_help().split())
    for field in fields(V.VJepaAutoV2Config):
        assert f"# {helps[field.name]}\n" in source
        assert helps[field.name] in actions[field.name].help.replace("%%", "%")
        assert f"[{field.default}]" in actions[field.name].help and f"[{field.default}]" in page


def test_editing_a_default_changes_the_run(tmp_path, monkeypatch, capsys):
    """The dataclass is the only place of a default: edited in a copy of the file, the command and its help follow."""
    text = SCRIPT.read_text(encoding="utf-8")
    old = "outcome_queries: int = 8 "
    assert text.count(old) == 1
    copy = tmp_path / SCRIPT.name
    copy.write_text(text.replace(old, "outcome_queries: int = 5 "), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(copy), "--print_config"])
    with pytest.raises(SystemExit) as ended:  # as `python copy` does, in a process that has torch already
        runpy.run_path(str(copy), run_name="__main__")
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out) == {
        **json.loads(json.dumps(asdict(V.VJepaAutoV2Config()))),
        "outcome_queries": 5,
    }


def test_config_from_python_is_the_run(scene_folder, tmp_path):
    """VJepaAutoV2Config(...) handed to train() is what config.json and the checkpoint say."""
    cfg = replace(
        small_config(),
        data_root=str(scene_folder),
        out_dir=str(tmp_path / "run"),
        steps=1,
        picture=False,
        outcome_queries=3,
    )
    assert V.train(cfg) == 0
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert saved == json.loads(json.dumps(asdict(cfg)))
    model, loaded = V.load_model(tmp_path / "run/checkpoints/ckpt_final.pt")
    assert loaded == cfg and model.outcome.queries.shape[0] == 3


# -- presets and files


@pytest.mark.parametrize("preset", list(V.merged(V.VJepaAutoV2Config, "PRESETS")))
def test_presets_validate_and_are_applied(preset):
    """Every preset is a config that may run, the same from the command line and from Python."""
    cfg = resolve("--preset", preset)
    V.validate_config(cfg)
    assert cfg == V.preset_config(preset) and cfg.preset == preset
    assert {name: getattr(cfg, name) for name in V.merged(V.VJepaAutoV2Config, "PRESETS")[preset]} == V.merged(
        V.VJepaAutoV2Config, "PRESETS"
    )[preset]


def test_base_preset_is_the_dataclass():
    """base = these defaults, so that editing the dataclass reaches everyone."""
    assert V.merged(V.VJepaAutoV2Config, "PRESETS")["base"] == {} and set(V.merged(V.VJepaAutoV2Config, "PRESETS")) == {
        "tiny",
        "proof",
        "small",
        "base",
        "large",
        *(f"vjepa2_{size}" for size in ("vitl", "vitl_latents", "vith", "vitg", "vitg_384")),
    }


def test_precedence(tmp_path):
    """Default < preset < file < later file < flag, each step seen. Seen red with presets merged last."""
    first = write(tmp_path / "first.json", {"lr": 0.25, "min_lr": 0.125, "seed": 3, "preset": "tiny"})
    second = write(tmp_path / "second.json", {"min_lr": 0.0625, "seed": 4})
    cfg = resolve("--config", first, "--config", second, "--seed", "5")
    assert (cfg.seed, cfg.min_lr, cfg.lr) == (5, 0.0625, 0.25)
    assert (
        cfg.enc_dim == V.merged(V.VJepaAutoV2Config, "PRESETS")["tiny"]["enc_dim"]
        and cfg.patch == V.merged(V.VJepaAutoV2Config, "PRESETS")["tiny"]["patch"]
    )
    assert cfg.weight_decay == V.VJepaAutoV2Config.weight_decay
    assert resolve("--config", second, "--config", first).min_lr == 0.125
    assert resolve("--config", first, "--preset", "base").enc_dim == 768  # the flag's preset replaces the file's


def test_overrides_are_what_the_user_set(tmp_path):
    """Only files and flags count as overrides, not what a preset brings."""
    _, overrides, _ = V.resolve_config(
        ["--preset", "tiny", "--config", write(tmp_path / "a.json", {"lr": 0.5}), "--no-amp"], V.VJepaAutoV2
    )
    assert overrides == {"preset": "tiny", "lr": 0.5, "amp": False}


def test_inherits_is_relative_to_the_file(tmp_path, monkeypatch):
    """A name or a list of names, later parents win, the file itself wins; the working directory plays no part."""
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.json", {"seed": 1, "lr": 0.5, "min_lr": 0.5})
    write(tmp_path / "deep/b.json", {"inherits": "../a.json", "lr": 0.25})
    write(tmp_path / "c.json", {"min_lr": 0.125, "lr": 0.0625})
    top = write(tmp_path / "top.json", {"inherits": ["deep/b.json", str(tmp_path / "c.json")], "seed": 9})
    monkeypatch.chdir("/")
    assert V.read_config_file(top, V.VJepaAutoV2Config) == {"seed": 9, "lr": 0.0625, "min_lr": 0.125}
    assert V.read_config_file(write(tmp_path / "left.json", {"inherits": "deep/b.json"}), V.VJepaAutoV2Config) == {
        "seed": 1,
        "lr": 0.25,
        "min_lr": 0.5,
    }


@pytest.mark.parametrize(
    "way",
    ["../other.json", "deep/../../other.json", "{tmp}/other.json", "link.json", "folder/other.json", "middle.json"],
)
def test_inherits_stays_in_the_folder_of_the_first_file(tmp_path, capsys, way):
    """No ../, absolute path or symlink to a file or folder leads out, at any depth. Seen red without the check."""
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    write(tmp_path / "other.json", {"seed": 1})
    (inside / "link.json").symlink_to(tmp_path / "other.json")
    (inside / "folder").symlink_to(tmp_path)
    write(inside / "middle.json", {"inherits": "../other.json"})
    line = fails(capsys, "--config", write(inside / "top.json", {"inherits": way.format(tmp=tmp_path)}))
    assert f"inherits {tmp_path / 'other.json'}, which lies outside {inside}" in line


def test_inherits_has_a_depth(tmp_path, capsys):
    """Eight files may stand above the first one, not nine. Seen red with the limit at nine."""
    for number in range(9):
        write(tmp_path / f"{number}.json", {"inherits": f"{number + 1}.json"})
    write(tmp_path / "9.json", {"seed": 5})
    assert resolve("--config", str(tmp_path / "1.json")).seed == 5
    assert "more than 8 files" in fails(capsys, "--config", str(tmp_path / "0.json"))


def test_inherits_reads_a_file_once(tmp_path, monkeypatch):
    """Eight levels of eight links would be 16 million reads. Seen red with the answers not kept."""
    reads, parse = [], V.parse_config
    monkeypatch.setattr(V, "parse_config", lambda path, Config: reads.append(path.name) or parse(path, Config))
    for number in range(4):
        write(tmp_path / f"{number}.json", {"inherits": [f"{number + 1}.json"] * 8})
    write(tmp_path / "4.json", {"seed": 5})
    assert V.read_config_file(tmp_path / "0.json", V.VJepaAutoV2Config) == {"seed": 5} and sorted(reads) == [
        f"{number}.json" for number in range(5)
    ]


def test_inherits_may_form_a_diamond(tmp_path):
    """Two parents with one grandparent are no loop."""
    write(tmp_path / "root.json", {"seed": 1})
    write(tmp_path / "left.json", {"inherits": "root.json"})
    write(tmp_path / "right.json", {"inherits": "root.json", "lr": 0.5})
    assert V.read_config_file(
        write(tmp_path / "top.json", {"inherits": ["left.json", "right.json"]}), V.VJepaAutoV2Config
    ) == {"seed": 1, "lr": 0.5}


def test_inherits_loop_is_refused(tmp_path, capsys):
    """a -> b -> a ends in one line that names the way. Seen red with the trail not passed on."""
    write(tmp_path / "a.json", {"inherits": "b.json"})
    write(tmp_path / "b.json", {"inherits": "a.json"})
    line = fails(capsys, "--config", str(tmp_path / "a.json"))
    assert "inherits itself" in line and "a.json -> b.json -> a.json" in line


@pytest.mark.parametrize("inherits", [5, None, {"a": 1}, [7]])
def test_inherits_of_a_wrong_type_is_refused(tmp_path, capsys, inherits):
    """Anything but a name or a list of names is one line naming the key or the missing file."""
    line = fails(capsys, "--config", write(tmp_path / "a.json", {"inherits": inherits}))
    assert "a.json" in line or "cannot be read" in line


def test_yaml(tmp_path):
    """The same rules for YAML; 1e-4, which YAML 1.1 reads as text, is a number."""
    pytest.importorskip("yaml")
    write(tmp_path / "base.json", {"seed": 7})
    path = write(
        tmp_path / "a.yaml",
        "inherits: base.json\nlr: 1e-4\nmin_lr: 1.5e-7\nimage_size: [64, 96]\namp: true\nsteps: 12\nout_dir: x\n",
    )
    assert V.read_config_file(path, V.VJepaAutoV2Config) == {
        "seed": 7,
        "lr": 1e-4,
        "min_lr": 1.5e-7,
        "image_size": (64, 96),
        "amp": True,
        "steps": 12,
        "out_dir": "x",
    }


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "1: 2\n", "lr: fast\n", "steps: 1e3\n"])
def test_bad_yaml_is_one_line(tmp_path, capsys, text):
    """Broken syntax, a list, a key that is no text, words for numbers: one line naming the file."""
    pytest.importorskip("yaml")
    assert "a.yml" in fails(capsys, "--config", write(tmp_path / "a.yml", text))


@pytest.mark.parametrize(
    "text, values",
    [
        ("lr: 1e-4", {"lr": 1e-4}),
        ("lr: -1E+2", {"lr": -100.0}),
        ("lr: .5", {"lr": 0.5}),
        ("lr: 3", {"lr": 3.0}),
        ("lr: 5.e1", {"lr": 50.0}),
        ("steps: 012", {"steps": 12}),
        ("steps: +12", {"steps": 12}),
        ("amp: yes\nhflip: off\npicture: TRUE", {"amp": True, "hflip": False, "picture": True}),
        ("out_dir: 'no'\ntrack: ''", {"out_dir": "no", "track": ""}),
        ("out_dir: 1:30", {"out_dir": "1:30"}),
        ("out_dir: 2001-01-01", {"out_dir": "2001-01-01"}),
        ("image_size: [010, 16]", {"image_size": (10, 16)}),
        ("\ufeffseed: 1", {"seed": 1}),
        ("{}", {}),
        ("# nothing\nseed: !!int 7", {"seed": 7}),
        ("out_dir: !!str 012", {"out_dir": "012"}),
        ("out_dir: |\n  x", {"out_dir": "x"}),
    ],
)
def test_yaml_means_what_it_says(tmp_path, text, values):
    """Words that YAML 1.1 reads as text, octal, base sixty, a date. Seen red with yaml.safe_load for our loader."""
    pytest.importorskip("yaml")
    got = V.read_config_file(write(tmp_path / "a.yaml", text), V.VJepaAutoV2Config)
    assert got == values and {name: type(value) for name, value in got.items()} == {
        name: type(value) for name, value in values.items()
    }


BOMB = "a: &a [1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("lr: .nan", "lr = nan"),
        ("lr: .inf", "lr = inf"),
        ("lr: -.Inf", "lr = -inf"),
        ("lr: nan", "lr = 'nan' must be of type float"),
        ("steps: 1:30", "steps = '1:30' must be of type int"),
        ("steps: 1_000", "steps = '1_000'"),
        ("steps: 0x10", "steps = '0x10'"),
        ("steps:", "steps = None"),
        ("seed: 2001-99-99", "seed = '2001-99-99'"),
        ("out_dir: no", "out_dir = False must be of type str"),
        ("out_dir: 012", "out_dir = 12 must be of type str"),
        ("seed: 1\nlr: 0.1\n\nseed: 2", "key 'seed' stands twice, in lines 1 and 4"),
        ("{lr: 1,\n 'lr': 2}", "key 'lr' stands twice, in lines 1 and 2"),
        ("seed: !!python/name:os.path.join", "line 1: tag tag:yaml.org,2002:python/name:os.path.join is not allowed"),
        ("seed: !!python/object/apply:os.system ['touch boo']", "python/object/apply:os.system is not allowed"),
        ("seed: !!binary eA==", "is not allowed"),
        ("seed: !!int ''", "is not allowed"),
        ("amp: !!bool maybe", "is not allowed"),
        ("seed: !!seq 5", "is not allowed"),
        ("seed: !!timestamp x", "is not allowed"),
        ("seed: !boo 5", "is not allowed"),
        ("seed: !!set {a}", "is not allowed"),
        ("lr: &x 1\nmin_lr: *x", "line 1: aliases are not allowed"),
        ("image_size: &x [*x, 1]", "aliases are not allowed"),
        (BOMB, "aliases are not allowed"),
        ("<<: {lr: 1}", "unknown key '<<'"),
        ("[a]: 1", "key ['a'] is not a text"),
        ("? {a: 1}\n: 1", "is not a text"),
        ("~: 1", "key None is not a text"),
        ("lr: 1\n---\nlr: 2", "not valid YAML"),
        ("lr: " + "[\n" * 20000, "not valid YAML"),
        ("lr: " + "[\n" * 20000 + "]" * 20000, "recursion"),
        ("seed: " + "1" * 5000, "not valid YAML"),
        ("lr: " + "1" * 400, "lr = too large a number (1326 bits) must be of type float"),
        ("a\0b: 1", "not valid YAML"),
        ('"a\\nb\\e": 1', r"unknown key 'a\nb\x1b'"),
        ('out_dir: "a\\nb\\e[31m"', r"out_dir = 'a\nb\x1b[31m': must hold no control characters"),
        ("#" * 2**18 + "\nlr: 1", "larger than 262144 bytes"),
        ("", "must hold a mapping of fields, not NoneType"),
    ],
)
def test_yaml_traps_are_one_line(tmp_path, capsys, monkeypatch, text, fragment):
    """What YAML makes of odd input; nothing in it runs or fills memory. Seen red without each check of yaml_value."""
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    assert fragment in fails(capsys, "--config", write(tmp_path / "a.yml", text))
    assert [path.name for path in tmp_path.iterdir()] == ["a.yml"]


def test_yaml_without_pyyaml_names_the_package(tmp_path, capsys, monkeypatch):
    """A missing extra is named before anything else happens."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install pyyaml" in fails(capsys, "--config", write(tmp_path / "a.yaml", "seed: 1\n"))


# -- mistakes on the command line


@pytest.mark.parametrize(
    "argv, fragment",
    [
        (["--batch_sice", "4"], "did you mean --batch_size?"),
        (["--batch_sice=4"], "did you mean --batch_size?"),
        (["--data-rot", "x"], "did you mean --data-root?"),
        (
            ["--batch", "4"],
            "unknown argument --batch",
        ),  # no abbreviations: a later flag of that name would change their meaning
        (["videos"], "unknown argument videos"),
        (["--steps", "many"], "--steps"),
        (["--steps", "1.5"], "--steps"),
        (["--lr"], "--lr"),
        (["--lr", "quick"], "--lr"),
        (["--image_size", "64x96"], "image_size"),
        (["--preset", "tinny"], "did you mean tiny?"),
        (["--device", "gpu"], "device = 'gpu': must be one of auto, cuda, mps, cpu (--device)"),
        (["--lr", "nan"], "lr = nan"),
        (["--steps", "0"], "steps = 0: must lie in 1 to 1000000000 (--steps)"),
        (["--log_every", "0"], "log_every = 0: must lie in 1 to 1000000000 (--log_every)"),
        (["--steps", "1" * 400], "steps = too large a number (1326 bits): must be int (--steps)"),
        (["--steps", "1" * 5000], "--steps"),
        (["--lr", "1e999"], "lr = inf"),
        (["--image_size", "9" * 400], "image_size = too large a number (1329 bits)"),
        (["--image_size", "10000"], "image_size = 10000: must lie in 1 to 8192 (--image_size)"),
        (
            ["--dist_timeout_s", "1e300"],
            "dist_timeout_s = 1e+300: must lie in 1 to 1000000",
        ),  # more than a timedelta holds
        (
            ["--enc_dim", str(2**62)],
            "enc_dim = 4611686018427387904: must lie in 6 to 65536",
        ),  # more than a tensor holds
    ],
)
def test_bad_flags_are_one_line(capsys, argv, fragment):
    """Exit 2, one line with the cause and the nearest name. Seen red with the suggestion removed."""
    assert fragment in fails(capsys, *argv)


@pytest.mark.parametrize(
    "text, fragment",
    [
        ('{"batch_sice": 4}', "unknown key 'batch_sice' (did you mean batch_size?)"),
        ('{"lr": 0.1', "not valid JSON"),
        ("[1, 2]", "must hold a mapping"),
        ("7", "must hold a mapping"),
        ("", "not valid JSON"),
        ('{"lr": "fast"}', "lr = 'fast' must be of type float"),
        ('{"steps": 1.5}', "steps = 1.5 must be of type int"),
        ('{"steps": true}', "steps = True must be of type int"),
        ('{"amp": 1}', "amp = 1 must be of type bool"),
        ('{"out_dir": null}', "out_dir = None must be of type str"),
        ('{"image_size": [64, 96, 3]}', "image_size = [64, 96, 3] must be a number or a pair of numbers"),
        ('{"image_size": "64"}', "image_size = '64' must be a number or a pair of numbers"),
        ('{"lr": NaN}', "lr = nan"),
        ('{"versions": {}, "config": 5}', "must hold a mapping"),
        ('{"preset": "tinny"}', "did you mean tiny?"),
        ('{"lr": Infinity}', "lr = inf"),
        ('{"lr": 1e999}', "lr = inf"),
        ('{"lr": ' + "1" * 400 + "}", "lr = too large a number (1326 bits) must be of type float"),
        ('{"seed": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"seed": 1,\n "lr": 0.5,\n "seed" : 2}', "key 'seed' stands twice, in lines 1 and 3"),
        ('{"versions": {},\n "config": {"lr": 1,\n\n "lr": 1}}', "key 'lr' stands twice, in lines 2 and 4"),
        ('{"s\\u0065ed": 1, "seed": 1}', "key 'seed' stands twice"),
        ("[" * 100000, "recursion"),
        ('{"lr": ' + "[" * 500 + "]" * 500 + "}", "lr = a list of 1 must be of type float"),
        ('{"lr": ["' + "x" * 1000 + '"]}', "x... must be of type float"),
        ('{"image_size": [64, [1]]}', "image_size = a list of 2 must be"),
        ('{"a\\nb\\u001b": 1}', r"unknown key 'a\nb\x1b'"),
        ('{"lr": "a\\nb"}', r"lr = 'a\nb' must be of type float"),
        ('{"out_dir": "a\\u0000b"}', r"out_dir = 'a\x00b': must hold no control characters"),
        ('{"out_dir": "a\\ud800b"}', "and only UTF-8 (--out_dir)"),
        ('{"inherits": "a\\nb.json"}', r"a\nb.json: its name must hold no control characters"),
        ('{"inherits": [["a"]]}', "inherits = a list of 1 must be a file name or a list of them"),
        ('{"seed": 1' + " " * 2**18 + "}", "larger than 262144 bytes"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, capsys, text, fragment):
    """Exit 2, one line with the field, its value and what was wanted. Seen red with coerce returning its input."""
    assert fragment in fails(capsys, "--config", write(tmp_path / "a.json", text))


def test_missing_config_file(tmp_path, capsys):
    """A path that is absent, or a folder, is named."""
    assert "absent.json" in fails(capsys, "--config", str(tmp_path / "absent.json"))
    assert str(tmp_path) in fails(capsys, "--config", str(tmp_path))


def test_a_config_is_a_file(tmp_path, capsys):
    """A pipe or device may have no end, a link may form a circle. Seen red (hanging) without the check for a file."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "bytes.json").write_bytes(b'{"out_dir": "\xff"}')
    assert "not a file" in fails(capsys, "--config", str(tmp_path / "pipe.json")) and "not a file" in fails(
        capsys, "--config", "/dev/zero"
    )
    assert "cannot be read" in fails(capsys, "--config", str(tmp_path / "loop.json"))
    assert "can't decode byte 0xff" in fails(capsys, "--config", str(tmp_path / "bytes.json"))


UGLY = ["a\nb", "a\r\x1b[31mb", "a\0b", "\x85", "\u2028", "\udcff", "\n", "\x7f"]


@pytest.mark.parametrize("ugly", UGLY, ids=ascii)
def test_no_text_breaks_the_line(tmp_path, capsys, ugly):
    """Line breaks, escape codes, NUL and stray bytes in any text of a user: one printable line. Seen red with one_line
    giving its text back."""
    argvs = [
        ["--config", str(tmp_path / ugly)],
        [ugly],
        [f"--{ugly}"],
        ["--batch_sice" + ugly],
        [f"--{ugly}=1"],
        ["--amp=" + ugly],
    ]
    argvs += [[f"--{name}", ugly] for name in FIELDS if V.field_types(V.VJepaAutoV2Config)[name] is not bool]
    for argv in argvs:
        assert fails(capsys, *argv).isprintable(), argv


def test_a_link_to_an_ugly_name(tmp_path, capsys):
    """The name that a link resolves to is looked at as well. Seen red with the given name alone checked."""
    write(tmp_path / "a\nb.json", {"seed": "x"})
    (tmp_path / "fine.json").symlink_to(tmp_path / "a\nb.json")
    assert fails(capsys, "--config", str(tmp_path / "fine.json")).endswith(
        "its name must hold no control characters, and only UTF-8"
    )


def test_no_text_reaches_a_shell():
    """No call of a shell or interpreter, in the script and its tools. Seen red with os.system and with shell=True."""
    for path in [SCRIPT, *(SCRIPT.parent / "tools").glob("*.py")]:
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            name = ast.unparse(call.func)
            banned = name in ("eval", "exec", "compile", "__import__") or name.startswith(
                ("os.system", "os.popen", "os.spawn", "os.exec")
            )
            assert not banned and not name.endswith(("getoutput", "subprocess_shell")), (
                f"{path.name}:{call.lineno}: {name}"
            )
            assert all(word.arg != "shell" for word in call.keywords), f"{path.name}:{call.lineno}: shell="


# -- printing and reading back


@pytest.mark.parametrize(
    "argv", [[], ["--preset", "tiny", "--image_size", "48,96"], ["--lr", "1e-5", "--no-picture", "--out_dir", "a b"]]
)
def test_print_config_reads_back(tmp_path, capsys, argv):
    """What --print_config prints is JSON that --config takes again, to the same config."""
    assert V.main([*argv, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(printed)) == set(FIELDS)
    path = write(tmp_path / "printed.json", printed)
    assert resolve("--config", path) == resolve(*argv)
    assert V.main(["--config", path, "--print-config"]) == 0
    assert capsys.readouterr().out == printed


# -- rules

FROZEN, UNCROPPED = dict(freeze_encoder=True, init_from="x"), V.ClipConfig.UNCROPPED
# One entry per rule between fields: overrides of a valid config, and the words that name field, value, rule and flag.
RELATIONS = [
    (dict(num_frames=14), "num_frames = 14: must equal now + soon + eventually frames = 12 (--num_frames)"),
    (dict(now_frames=3, num_frames=11), "now_frames = 3: must be divisible by tubelet_t = 2 (--now_frames)"),
    (dict(image_size=36), "image_size = 36: 36 must be divisible by patch = 8 (--image_size)"),
    (dict(pred_dim=26), "pred_dim = 26: must be divisible by num_heads = 4 (--pred_dim)"),
    (dict(pos_embed="rope", pred_dim=16), "pred_dim = 16: rope needs"),
    (
        dict(enc_dim=45, pred_dim=27, num_heads=3),
        "enc_dim = 45: must be even, the position code pairs sine and cosine (--enc_dim)",
    ),
    (
        dict(crop_scale_min=0.9, crop_scale_max=0.5),
        "crop_scale_min = 0.9: must not exceed crop_scale_max = 0.5 (--crop_scale_min)",
    ),
    (dict(image_size=8), "image_size = 8: needs at least 2 patches of 8 to mask one (--image_size)"),
    (dict(flow_chunks=3), "flow_chunks = 3: only 2 EVENTUALLY tubelets to chunk (--flow_chunks)"),
    (
        dict(soon_fit_steps=5),
        "soon_fit_steps = 5: the flow phase fits SOON, and flow_fit_clips = 0 leaves it out (--soon_fit_steps)",
    ),
    (dict(init_key="encoder"), "init_key = 'encoder': chooses within --init_from, which names nothing (--init_key)"),
    (dict(flow_joint_max=0, flow_pool=5), "flow_pool = 5: exceeds the 4 x 4 token grid (--flow_pool)"),
    (
        dict(flow_joint_max=0, flow_rank=49),
        "flow_rank = 49: exceeds the 48 numbers that a direction spans (--flow_rank)",
    ),
    (dict(lambda_vjepa=0.0, lambda_soon=0.0, lambda_eventually=0.0), "lambda_vjepa = 0.0: at least one of"),
    (dict(freeze_encoder=True), "freeze_encoder = True: needs the weights of init_from"),
    (dict(teacher="frozen"), "teacher = 'frozen': needs the weights of init_from"),
    (dict(FROZEN, teacher="frozen"), "teacher = 'frozen': freeze_encoder leaves nothing to teach (--teacher)"),
    (dict(latents="x", lambda_vjepa=0.0, **UNCROPPED), "latents = 'x': needs a frozen encoder (--freeze_encoder)"),
    (dict(FROZEN, latents="x", **UNCROPPED), "lambda_vjepa = 1.0: must be 0: cached latents know no masks"),
    (
        dict(actions="steer,wheel"),
        "actions = 'steer,wheel': no signal wheel; none, or some of speed,steer,yaw_rate,accel",
    ),
    (dict(actions="speed, speed"), "actions = 'speed, speed': names a signal twice (--actions)"),
    (
        dict(FROZEN, latents="x", lambda_vjepa=0.0, actions="steer", **UNCROPPED),
        "actions = 'steer': must be none: cached latents hold no signals (--latents) (--actions)",
    ),
]
MORE_RELATIONS = [
    (dict(soon_frames=5, num_frames=13), "soon_frames = 5"),
    (dict(eventually_frames=5, num_frames=13), "eventually_frames = 5"),
    (dict(image_size=(32, 36)), "image_size = (32, 36): 36 must be divisible by patch = 8"),
    (dict(enc_dim=50), "enc_dim = 50: must be divisible"),
    (dict(pred_heads=5), "pred_dim = 24: must be divisible by pred_heads = 5 (--pred_dim)"),
    (dict(pos_embed="rope21", pred_heads=8), "pred_dim = 24: rope needs"),
    (dict(flow_dim=34), "flow_dim = 34: must be divisible by flow_heads = 4 (--flow_dim)"),
    (dict(flow_dim=33, flow_heads=3), "flow_dim = 33: must be even"),
    (dict(pos_embed="rope", enc_dim=16), "enc_dim = 16: rope needs"),
    (dict(pos_embed="rope", enc_dim=28), "enc_dim = 28: rope needs"),  # 7 channels per head cannot be turned in pairs
    (dict(crop_ratio_min=2.0), "crop_ratio_min = 2.0: must not exceed"),
    (dict(aspect_min=3.0), "aspect_min = 3.0: must not exceed"),
]


@pytest.mark.parametrize(
    "overrides, message",
    RELATIONS + MORE_RELATIONS,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_rules_between_fields(overrides, message):
    """Each rule names field, value, rule and flag, and holds if nothing else breaks. Seen red without each rule."""
    V.validate_config(small_config())
    with pytest.raises(V.UsageError) as caught:
        V.validate_config(small_config(**overrides))
    assert message in str(caught.value) and str(caught.value).startswith("config: ")
    assert re.search(r"\(--\w+\)$", str(caught.value))


def test_the_table_above_covers_every_rule():
    """As many entries as there are rules in the code: a rule without a case turns this red."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(V.VJepaAutoV2Config.rules)))
    rows = [node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load)]
    rules = [row for row in rows if len(row.elts) == 3 and not isinstance(row.elts[0], (ast.Constant, ast.Tuple))]
    ordered = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "in_order" in ast.unparse(node.func)]
    assert len(rules) + len(ordered) == len(RELATIONS)


@pytest.mark.parametrize("name", list(V.merged(V.VJepaAutoV2Config, "RANGES")))
def test_every_range_is_enforced(name):
    """Just outside is refused with the field, the value, the range and the flag. Seen red with one bound removed."""
    low, high = V.merged(V.VJepaAutoV2Config, "RANGES")[name]
    assert low is not None  # no number of this config may be arbitrarily negative
    whole = V.field_types(V.VJepaAutoV2Config)[name] is int
    outside = [] if low is None else [low - (1 if whole else 1e-3)]
    outside += [] if high is None else [high + (1 if whole else 1e-3)]
    outside += [] if whole else [math.nan, math.inf]
    for value in outside:
        with pytest.raises(V.UsageError) as caught:
            V.validate_config(small_config(**{name: value}))
        assert f"{name} = {value}: must lie in " in str(caught.value) and f"(--{name})" in str(caught.value)


def test_every_word_has_a_list_or_is_free_text():
    """A text field is a path, a pattern, one of a list of words, or has a rule. Seen red: `decoder` not in CHOICES."""
    words = {name for name, kind in V.field_types(V.VJepaAutoV2Config).items() if kind is str}
    assert words - set(V.merged(V.VJepaAutoV2Config, "CHOICES")) == {
        "preset",  # one of PRESETS
        "actions",  # names of signals
        "data_root",
        "frame_cache",
        "video_glob",
        "out_dir",
        "resume",
        "track",
        "scene_mix",
        "best_by",  # a figure of the world's evaluations
        "latents",
        "init_from",
        "init_key",  # an entry of that file
    }


@pytest.mark.parametrize("name", list(V.merged(V.VJepaAutoV2Config, "CHOICES")))
def test_every_choice_is_enforced(name):
    """A word that is not on the list is refused with the list."""
    with pytest.raises(V.UsageError) as caught:
        V.validate_config(small_config(**{name: "nonsense"}))
    assert (
        f"{name} = 'nonsense': must be one of {', '.join(V.merged(V.VJepaAutoV2Config, 'CHOICES')[name])} (--{name})"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(image_size=0), "image_size = 0: must lie in 1 to 8192 (--image_size)"),
        (dict(image_size=(32, -32)), "image_size = (32, -32): must lie in 1 to 8192 (--image_size)"),
        (dict(image_size=8193), "image_size = 8193: must lie in 1 to 8192 (--image_size)"),
        (dict(steps="20"), "steps = '20': must be int (--steps)"),
        (dict(steps=20.0), "steps = 20.0: must be int (--steps)"),
        (dict(steps=True), "steps = True: must be int (--steps)"),
        (dict(steps=10**5000), "steps = too large a number (16610 bits): must be int (--steps)"),
        (dict(lr=None), "lr = None: must be float (--lr)"),
        (dict(lr=True), "lr = True: must be float (--lr)"),
        (dict(amp=1), "amp = 1: must be bool (--amp)"),
        (dict(out_dir=Path("x")), "out_dir = PosixPath('x'): must be str (--out_dir)"),
        (dict(image_size=(32,)), "image_size = (32,): must be a number or a pair of numbers (--image_size)"),
        (
            dict(image_size=(32, 10**5000)),
            "image_size = a tuple of 2: must be a number or a pair of numbers (--image_size)",
        ),
        (dict(image_size=32.0), "image_size = 32.0: must be a number or a pair of numbers (--image_size)"),
        (
            dict(data_root="a\x1b[31m"),
            "data_root = 'a\\x1b[31m': must hold no control characters, and only UTF-8 (--data_root)",
        ),
        (dict(track="mlflow,wandb"), "track = 'mlflow,wandb': mlflow is not one of tensorboard, wandb (--track)"),
    ],
)
def test_other_value_rules(overrides, message):
    """Rules on one field that are neither a range nor a list."""
    with pytest.raises(V.UsageError) as caught:
        V.validate_config(small_config(**overrides))
    assert message in str(caught.value)


def test_all_problems_are_told_at_once():
    """Two mistakes give two messages in one line."""
    with pytest.raises(V.UsageError, match=r"crop_scale_min = 0.9.*; pred_dim = 26") as caught:
        V.validate_config(small_config(pred_dim=26, crop_scale_min=0.9, crop_scale_max=0.5))
    assert "\n" not in str(caught.value)


def test_warmup_is_capped_and_schedules_end_with_the_run():
    """The promise behind `warmup_steps`: at most a tenth of the steps, full rate after it, min_lr at the last step."""
    cfg = small_config(steps=100, warmup_steps=2000, lr=1e-3, min_lr=1e-5)
    rates = [V.lr_at(step, cfg, cfg.lr) for step in range(cfg.steps)]
    assert cfg.warmup == 10 and max(rates) == rates[9] == 1e-3 and rates[-1] == pytest.approx(1e-5)
    assert V.lr_at(0, small_config(steps=1), 1e-3) > 0
