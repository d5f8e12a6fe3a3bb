"""README.md says what the code does: its config table, log glossary and flags are compared with the script."""

import json
import re
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, V, small_config

sys.path.insert(0, str(ROOT / "tools"))

import readme_tables  # noqa: E402

# Flags of torchrun, pip and srun that a README may show, and --field, which stands for any of ours.
FOREIGN_FLAGS = {
    "--nproc_per_node",
    "--nnodes",
    "--node_rank",
    "--max_restarts",
    "--signals-to-handle",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
    "--standalone",
    "--help",
    "--upgrade",
    "--index-url",
    "--extra-index-url",
    "--ntasks",
    "--ntasks-per-node",
    "--field",
}


@pytest.fixture(scope="module")
def readme():
    """Text of README.md."""
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path.read_text(encoding="utf-8")


def table_rows(text):
    """Rows of all Markdown tables whose first cell is `code` -> list of lists of cells, bars and backticks resolved."""
    rows = []
    for line in text.splitlines():
        if re.match(r"\| `\w+` \|", line):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            rows.append([cells[0].strip("`"), *cells[1:]])
    return rows


def test_config_table_names_every_field_with_its_default(readme):
    """`field` | default | comment, read from the page, against the dataclass. Seen red with an edited default."""
    stated = {row[0]: (row[1].strip("`"), row[2]) for row in table_rows(readme) if len(row) == 3}
    helps = V.field_help()
    wrong = {
        field.name: (str(field.default) or "(empty)", helps[field.name])
        for field in fields(V.VJepaAutoV2Config)
        if stated.get(field.name) != (str(field.default) or "(empty)", helps[field.name])
    }
    assert not wrong, f"run python tools/readme_tables.py; wrong or missing: {sorted(wrong)}"
    assert set(stated) <= set(helps), "a field that no longer exists"


def test_glossary_gives_every_key_its_meaning(readme):
    """`key` | meaning, against LOG_KEYS and VAL_KEYS. Seen red with one meaning edited in the script."""
    stated = {row[0]: row[1] for row in table_rows(readme) if len(row) == 2}
    meanings = {**V.LOG_KEYS, **V.VAL_KEYS}
    wrong = [key for key, meaning in meanings.items() if stated.get(key) != meaning]
    assert not wrong, f"run python tools/readme_tables.py; wrong or missing: {wrong}"


def test_tables_are_what_the_tool_writes(readme):
    """Running the tool again changes nothing."""
    again = readme_tables.fill(readme, readme_tables.CONFIG_MARKS, readme_tables.config_table())
    assert readme_tables.fill(again, readme_tables.GLOSSARY_MARKS, readme_tables.glossary_table()) == readme


def test_every_flag_in_the_readme_exists(readme):
    """A copied command works: each --flag is of the script, of torchrun or of a tool here. Seen red with --stepz."""
    known = {flag for action in V.build_parser()._actions for flag in action.option_strings}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))
    known |= FOREIGN_FLAGS | set(re.findall(r"""["'](--[a-z][\w-]*)["']""", sources))
    page = re.sub(r"<!--.*?-->|^#SBATCH.*$|^trap .*$", "", readme, flags=re.MULTILINE)
    used = {flag.rstrip("_-") for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page)}
    assert not used - known


def test_a_real_run_logs_only_keys_of_the_tables(scene_folder, tmp_path):
    """Whatever stands in metrics.jsonl has a meaning. Seen red with a key added to validate's result."""
    cfg = small_config(
        data_root=str(scene_folder), out_dir=str(tmp_path), steps=2, picture=False, lambda_supcon=0.5, val_clips=2
    )
    assert V.train(cfg) == 0
    keys = {key for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert keys == set(V.LOG_KEYS) | set(V.VAL_KEYS)
    assert all(meaning and "\n" not in meaning for meaning in (*V.LOG_KEYS.values(), *V.VAL_KEYS.values()))


def test_tool_fills_between_markers_only():
    """Text around the markers stays, a missing marker is named, filling twice is filling once."""
    marks = readme_tables.CONFIG_MARKS
    page = f"above\n{marks[0]}\nold\n{marks[1]}\nbelow\n"
    filled = readme_tables.fill(page, marks, "| a |")
    assert filled == f"above\n{marks[0]}\n\n| a |\n\n{marks[1]}\nbelow\n" == readme_tables.fill(filled, marks, "| a |")
    with pytest.raises(SystemExit, match="exactly once"):
        readme_tables.fill("no markers", marks, "")
    assert [row[0] for row in table_rows(readme_tables.config_table())] == [
        field.name for field in fields(V.VJepaAutoV2Config)
    ]
