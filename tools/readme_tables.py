"""Write what README.md and docs/ take from the code, so that they cannot drift from it.

docs/config.md holds the config table, docs/log.md the log glossary, docs/cosmos.md, docs/future_latents.md and
docs/hope.md both of their worlds, README.md the text of tests/toy_world.py.

    python tools/readme_tables.py            rewrites what stands between the marker comments of PARTS
    python tools/readme_tables.py --print    prints those parts instead
"""

import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "worlds")]

import cosmos  # noqa: E402
import future_latents  # noqa: E402
import hope  # noqa: E402

import VJepa_AUTO_V2 as V  # noqa: E402

CONFIG_MARKS = ("<!-- config table -->", "<!-- end config table -->")
GLOSSARY_MARKS = ("<!-- log glossary -->", "<!-- end log glossary -->")
COSMOS_CONFIG_MARKS = ("<!-- cosmos config -->", "<!-- end cosmos config -->")
COSMOS_LOG_MARKS = ("<!-- cosmos log -->", "<!-- end cosmos log -->")
FUTURE_CONFIG_MARKS = ("<!-- future config -->", "<!-- end future config -->")
FUTURE_LOG_MARKS = ("<!-- future log -->", "<!-- end future log -->")
HOPE_CONFIG_MARKS = ("<!-- hope config -->", "<!-- end hope config -->")
HOPE_LOG_MARKS = ("<!-- hope log -->", "<!-- end hope log -->")
TOY_MARKS = ("<!-- toy world -->", "<!-- end toy world -->")


def cell(text):
    """Text of a Markdown table cell: a bar would end it."""
    return str(text).replace("|", r"\|")


def config_table(Config=V.VJepaAutoV2Config, but=object):
    """One row per config field: `field`, default, comment -> the whole table as text. Those that another config class
    has with the same default are left out."""
    helps, known = V.field_help(Config), getattr(but, "__dataclass_fields__", {})
    rows = [
        f"| `{field.name}` | {cell(field.default if field.default != '' else '(empty)')} | {cell(helps[field.name])} |"
        for field in fields(Config)
        if field.name not in known or known[field.name].default != field.default
    ]
    return "\n".join(["| field | default | comment |", "|---|---|---|", *rows])


def glossary_table():
    """One row per logged key: `key`, meaning -> the whole glossary as text."""
    rows = [
        f"| `{key}` | {cell(meaning)} |"
        for key, meaning in {**V.log_keys(V.VJepaAutoV2), **V.val_keys(V.VJepaAutoV2)}.items()
    ]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


def world_log(world):
    """What a world logs beside what every world does."""
    rows = [f"| `{key}`, `val_{key}` | {cell(meaning)} |" for key, meaning in world.KEYS.items()]
    others = {**world.TRAIN_KEYS, **{f"val_{key}": meaning for key, meaning in world.VAL_KEYS.items()}}
    rows += [f"| `{key}` | {cell(meaning)} |" for key, meaning in others.items()]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


def toy_world():
    """The example of a world, tests/toy_world.py, as a block of Python."""
    return f"```python\n{(ROOT / 'tests' / 'toy_world.py').read_text(encoding='utf-8').strip()}\n```"


PARTS = (  # page, its two markers, what stands between them
    ("docs/config.md", CONFIG_MARKS, config_table),
    ("docs/log.md", GLOSSARY_MARKS, glossary_table),
    ("docs/cosmos.md", COSMOS_CONFIG_MARKS, partial(config_table, cosmos.CosmosConfig, V.ClipConfig)),
    ("docs/cosmos.md", COSMOS_LOG_MARKS, partial(world_log, cosmos.Cosmos)),
    (
        "docs/future_latents.md",
        FUTURE_CONFIG_MARKS,
        partial(config_table, future_latents.FutureLatentsConfig, V.ClipConfig),
    ),
    ("docs/future_latents.md", FUTURE_LOG_MARKS, partial(world_log, future_latents.FutureLatents)),
    ("docs/hope.md", HOPE_CONFIG_MARKS, partial(config_table, hope.HopeConfig, V.RunConfig)),
    ("docs/hope.md", HOPE_LOG_MARKS, partial(world_log, hope.Hope)),
    ("README.md", TOY_MARKS, toy_world),
)


def fill(text, marks, part, page="page"):
    """Text of a page with a part put between two markers, over what is there. SystemExit names a missing marker."""
    for mark in marks:
        if text.count(mark) != 1:
            raise SystemExit(f"{page} must hold {mark} exactly once")
    head, rest = text.split(marks[0])
    if marks[1] not in rest:
        raise SystemExit(f"{page}: {marks[1]} stands before {marks[0]}")
    return f"{head}{marks[0]}\n\n{part}\n\n{marks[1]}{rest.split(marks[1])[1]}"


def main():
    """Rewrite the pages, or print the parts."""
    if "--print" in sys.argv[1:]:
        V.emit("\n\n".join(make() for _, _, make in PARTS) + "\n", sys.stdout)
        return
    for page, marks, make in PARTS:
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), marks, make(), page), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
