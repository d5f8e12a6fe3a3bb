"""README.md and docs/ say what the code does: tables, flags, commands, links and names are compared with the code."""

import ast
import importlib.util
import json
import re
import shlex
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPT, V, small_config

sys.path.insert(0, str(ROOT / "tools"))

import adapt  # noqa: E402
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
    "--local-dir",
    "--signal",
    "--cpus-per-task",
    "--kill-on-bad-exit",
}


PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


def page(name):
    """Text of one page."""
    return (ROOT / name).read_text(encoding="utf-8")


def marked(name, marks):
    """What stands between two markers of a page."""
    return page(name).split(marks[0])[1].split(marks[1])[0]


def section(name, title):
    """Text of a section of a page, from its heading to the next one of the same depth."""
    return re.split(r"^## ", page(name).split(f"\n## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def anchors(text):
    """Headings of a page as GitHub turns them into anchors."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def table_rows(text):
    """Rows of all Markdown tables whose first cell is `code` -> list of lists of cells, bars and backticks resolved."""
    rows = []
    for line in text.splitlines():
        if re.match(r"\| `\w+` \|", line):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            rows.append([cells[0].strip("`"), *cells[1:]])
    return rows


def test_config_table_names_every_field_with_its_default():
    """`field` | default | comment, read back from the page. Seen red with one default edited in the script."""
    stated = {
        row[0]: (row[1].strip("`"), row[2]) for row in table_rows(marked("docs/config.md", readme_tables.CONFIG_MARKS))
    }
    helps = V.field_help(V.VJepaAutoV2Config)
    wrong = {
        field.name: (str(field.default) or "(empty)", helps[field.name])
        for field in fields(V.VJepaAutoV2Config)
        if stated.get(field.name) != (str(field.default) or "(empty)", helps[field.name])
    }
    assert not wrong, f"run python tools/readme_tables.py; wrong or missing: {sorted(wrong)}"
    assert set(stated) <= set(helps), "a field that no longer exists"


def test_glossary_gives_every_key_its_meaning():
    """`key` | meaning, against LOG_KEYS and VAL_KEYS. Seen red with one meaning edited in the script."""
    stated = dict(table_rows(marked("docs/log.md", readme_tables.GLOSSARY_MARKS)))
    meanings = {**V.log_keys(V.VJepaAutoV2), **V.val_keys(V.VJepaAutoV2)}
    wrong = [key for key, meaning in meanings.items() if stated.get(key) != meaning]
    assert not wrong, f"run python tools/readme_tables.py; wrong or missing: {wrong}"
    assert set(stated) <= set(meanings), "a key that no longer exists"


def test_readme_shows_the_toy_world():
    """The world that README shows is the file that the tests run, letter for letter."""
    shown = marked("README.md", readme_tables.TOY_MARKS).strip()
    assert shown == f"```python\n{page('tests/toy_world.py').strip()}\n```", "run python tools/readme_tables.py"


@pytest.mark.parametrize("name, marks, make", readme_tables.PARTS, ids=[part[0] for part in readme_tables.PARTS])
def test_pages_are_what_the_tool_writes(name, marks, make):
    """Running the tool again changes nothing."""
    assert readme_tables.fill(page(name), marks, make(), name) == page(name)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_of_a_page_exists(name):
    """Each --flag of a page is one of the script's, a world's, torchrun's or a tool's here. Seen red with --stepz."""
    worlds = (
        V.VJepaAutoV2,
        readme_tables.cosmos.Cosmos,
        readme_tables.future_latents.FutureLatents,
        readme_tables.hope.Hope,
    )
    known = {flag for world in worlds for action in V.build_parser(world)._actions for flag in action.option_strings}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))
    known |= {f"--{field.name}" for field in fields(adapt.How)}  # made in a loop
    known |= FOREIGN_FLAGS | set(re.findall(r"""["'](--[a-z][\w-]*)["']""", sources))
    text = re.sub(r"<!--.*?-->|^#SBATCH.*$|^trap .*$", "", page(name), flags=re.MULTILINE)
    used = {flag.rstrip("_-") for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)}
    assert not used - known


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_test_that_a_page_names_exists(name):
    """Scripts in commands are there, `pytest -k NAME` picks a test. Seen red with tools/evalu.py and -k ten_starts."""
    named = set(re.findall(r"\b(?:tools|tests|docs)/\w+\.\w+|\bVJepa_AUTO_V2\.py\b|\.ci/run\b", page(name)))
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for picked in re.findall(r"pytest [^`\n]*-k (\w+)", page(name)):
        assert re.search(rf"^def test_\w*{picked}", tests, re.MULTILINE), f"no test named {picked}"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    """Pictures, pages and headings that links name are there. Seen red with #what-they-say and records/fans.png."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page(name)):
        if target.startswith("https://"):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{name} links to {target}#{anchor}"


def test_readme_leads_to_every_page():
    """Nothing in docs/ is out of reach."""
    assert set(PAGES[1:]) <= set(re.findall(r"\]\((docs/\w+\.md)", page("README.md")))


def test_readme_holds_the_test_command_that_ci_runs():
    """The first line below the marker that begins with python3, which .ci/run takes, installs and tests."""
    below = page("README.md").split("<!-- test command -->")[1]
    command = next(line for line in below.splitlines() if line.startswith("python3 "))
    assert shlex.split(command)[-2:] == ["-m", "pytest"] and ".[test]" in command
    assert "<!-- test command -->" in page(".ci/run")


def script_names():
    """Every name and every plain string that stands in the script."""
    found = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        parts = [getattr(node, part, None) for part in ("id", "attr", "arg", "name", "value")]
        found |= {part for part in parts if isinstance(part, str)}
    return found


def leads_to(name, names):
    """Whether a dotted name is reached from the script, a plain one stands in it. Commands and paths name a file."""
    if re.search(r"[/ ]|\.py$", name):
        return (ROOT / name.split()[-1]).exists()
    first, *rest = name.split(".")
    thing = getattr(V, first, None)
    for part in rest:
        thing = getattr(thing, part, None)
    return first in names and (not rest or thing is not None)


def test_every_name_in_how_to_change_it_exists():
    """Each place to put a finger on is there. Seen red with `sample_masks` and `VJepaAutoV2.drawn`."""
    text = re.sub(r"^```.*?^```", "", section("README.md", "How to change it"), flags=re.MULTILINE | re.DOTALL)
    named, names = re.findall(r"`([^`\n]+)`", text), script_names()
    assert len(named) > 12
    assert not [name for name in named if not leads_to(name, names)]


def class_part(tree, owner, part):
    """A method, or the assignment to a name, in the body of a class of the script."""
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner).body
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(node, "name", None) == part or getattr(target, "id", None) == part:
            return node
    raise AssertionError(f"{owner} has no {part}")


def test_a_new_loss_touches_the_three_places_that_readme_names(scene_folder, tmp_path, monkeypatch):
    """The three lines of the page, put where it says, make a loss that trains, is logged and evaluated."""
    block = page("README.md").split("<!-- new loss -->")[1].split("```")[1]
    setting, meaning, loss = (line for line in block.splitlines()[1:] if line and not line.startswith("#"))
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    keys = ast.walk(class_part(tree, "VJepaAutoV2", "KEYS"))
    firsts = {}
    for node in ast.walk(class_part(tree, "VJepaAutoV2", "forward")):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for name in ast.walk(target):
                firsts.setdefault(getattr(name, "id", ""), node.end_lineno)
    places = {
        class_part(tree, "VJepaAutoV2Config", "lambda_supcon").end_lineno: setting,
        next(key.lineno for key in keys if getattr(key, "value", "") == "loss_supcon") - 1: meaning,
        max(firsts["losses"], firsts["context"]): loss,
    }
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    for place, line in sorted(places.items(), reverse=True):
        lines.insert(place, " " * (4 if line is setting else 8) + line)
    (tmp_path / SCRIPT.name).write_text("\n".join(lines), encoding="utf-8")
    cfg = small_config(data_root=str(scene_folder), out_dir=str(tmp_path / "run"), steps=2, picture=False)
    settings = {name: value for name, value in vars(cfg).items() if value != getattr(V.VJepaAutoV2Config(), name)}
    (tmp_path / "small.json").write_text(json.dumps({**settings, "lambda_hinge": 10.0}), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("script_with_a_new_loss", tmp_path / SCRIPT.name)
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, changed)
    spec.loader.exec_module(changed)
    assert changed.main(["--config", str(tmp_path / "small.json")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss_hinge"] > 0 and rows[-1]["val_loss_hinge"] > 0
    weighed = sum(
        getattr(cfg, f"lambda_{name}") * rows[0][f"loss_{name}"] for name in ("vjepa", "soon", "eventually", "flow")
    )
    assert rows[0]["loss_total"] == pytest.approx(weighed + 10.0 * rows[0]["loss_hinge"], rel=1e-4)


def test_a_real_run_logs_only_keys_of_the_tables(scene_folder, tmp_path):
    """Whatever stands in metrics.jsonl has a meaning. Seen red with a key added to validate's result."""
    cfg = small_config(
        data_root=str(scene_folder),
        out_dir=str(tmp_path),
        steps=2,
        picture=False,
        lambda_supcon=0.5,
        val_clips=2,
        actions="speed",
    )
    assert V.train(cfg) == 0
    keys = {key for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert keys == set(V.log_keys(V.VJepaAutoV2)) - {"phase"} | set(V.val_keys(V.VJepaAutoV2))
    assert all(
        meaning and "\n" not in meaning
        for meaning in (*V.log_keys(V.VJepaAutoV2).values(), *V.val_keys(V.VJepaAutoV2).values())
    )


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
