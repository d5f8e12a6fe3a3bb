"""Write what README.md and docs/ take from the code, so that they cannot drift from it.

docs/config.md holds the config table, docs/log.md the log glossary, README.md the text of tests/toy_world.py.

    python tools/readme_tables.py            rewrites what stands between the marker comments of PARTS
    python tools/readme_tables.py --print    prints those parts instead
"""

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V  # noqa: E402

CONFIG_MARKS = ("<!-- config table -->", "<!-- end config table -->")
GLOSSARY_MARKS = ("<!-- log glossary -->", "<!-- end log glossary -->")
TOY_MARKS = ("<!-- toy world -->", "<!-- end toy world -->")


def cell(text):
    """Text of a Markdown table cell: a bar would end it."""
    return str(text).replace("|", r"\|")


def config_table():
    """One row per config field: `field`, default, comment -> the whole table as text."""
    helps = V.field_help(V.VJepaAutoV2Config)
    rows = [
        f"| `{field.name}` | {cell(field.default if field.default != '' else '(empty)')} | {cell(helps[field.name])} |"
        for field in fields(V.VJepaAutoV2Config)
    ]
    return "\n".join(["| field | default | comment |", "|---|---|---|", *rows])


def glossary_table():
    """One row per logged key: `key`, meaning -> the whole glossary as text."""
    rows = [f"| `{key}` | {cell(meaning)} |" for key, meaning in {**V.log_keys(V.VJepaAutoV2), **V.val_keys(V.VJepaAutoV2)}.items()]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


def toy_world():
    """The example of a world, tests/toy_world.py, as a block of Python."""
    return f"```python\n{(ROOT / 'tests' / 'toy_world.py').read_text(encoding='utf-8').strip()}\n```"


PARTS = (  # page, its two markers, what stands between them
    ("docs/config.md", CONFIG_MARKS, config_table),
    ("docs/log.md", GLOSSARY_MARKS, glossary_table),
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
