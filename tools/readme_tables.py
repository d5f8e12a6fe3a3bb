"""Write the config table and the log glossary of README.md from the script, so that they cannot drift from it.

Two ways to call it:

    python tools/readme_tables.py            rewrites what stands between the marker comments
    python tools/readme_tables.py --print    prints both tables instead
"""

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import VJepa_AUTO_V2 as V  # noqa: E402

CONFIG_MARKS = ("<!-- config table -->", "<!-- end config table -->")
GLOSSARY_MARKS = ("<!-- log glossary -->", "<!-- end log glossary -->")


def cell(text):
    """Text of a Markdown table cell: a bar would end it."""
    return str(text).replace("|", r"\|")


def config_rows():
    """One row per config field: `field`, default, comment -> list of lines."""
    helps = V.field_help()
    return [
        f"| `{field.name}` | {cell(field.default if field.default != '' else '(empty)')} | {cell(helps[field.name])} |"
        for field in fields(V.VJepaAutoV2Config)
    ]


def glossary_rows():
    """One row per logged key: `key`, meaning -> list of lines."""
    return [f"| `{key}` | {cell(meaning)} |" for key, meaning in {**V.LOG_KEYS, **V.VAL_KEYS}.items()]


def config_table():
    """The whole config table as text."""
    return "\n".join(["| field | default | comment |", "|---|---|---|", *config_rows()])


def glossary_table():
    """The whole glossary as text."""
    return "\n".join(["| key | meaning |", "|---|---|", *glossary_rows()])


def fill(text, marks, table):
    """README text with the part between two markers replaced by a table. SystemExit names a marker that is missing."""
    for mark in marks:
        if text.count(mark) != 1:
            raise SystemExit(f"README.md must hold {mark} exactly once")
    head, rest = text.split(marks[0])
    if marks[1] not in rest:
        raise SystemExit(f"README.md: {marks[1]} stands before {marks[0]}")
    return f"{head}{marks[0]}\n\n{table}\n\n{marks[1]}{rest.split(marks[1])[1]}"


def main():
    """Rewrite README.md, or print the tables."""
    if "--print" in sys.argv[1:]:
        V.emit(f"{config_table()}\n\n{glossary_table()}\n", sys.stdout)
        return
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(fill(fill(text, CONFIG_MARKS, config_table()), GLOSSARY_MARKS, glossary_table()), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
