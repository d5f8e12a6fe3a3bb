"""House rules of VJepa_AUTO_V2.py: it reads top to bottom, does nothing when imported, and holds no dead setting."""

import ast
import builtins
import io
import re
import tokenize
from dataclasses import fields

from conftest import ROOT, SCRIPT, V

SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
CONFIG_NAMES = [cls.__name__ for cls in V.VJepaAutoV2Config.__mro__[:-1]]
CONFIG_CLASSES = [node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name in CONFIG_NAMES]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
HARMLESS_CALLS = {"dict", "tuple", "list", "set", "frozenset", "len", "range", "sorted", "typing", "math", "re"}
RULE = "# " + "-" * 117


def defined_names(statement):
    """Names that a module-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def local_names(function):
    """Names that a function binds itself: arguments, assignments, loop variables, imports, caught errors."""
    names = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
    names |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(function):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= set(defined_names(node))
    return names


def loaded_names(node):
    """Names read in a statement that are not the local ones of the function in which they stand -> [(name, line)]."""
    found = []
    for child in ast.iter_child_nodes(node):
        inner = loaded_names(child)
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            inner.append((child.id, child.lineno))
        found += inner
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        own = local_names(node)
        found = [(name, line) for name, line in found if name not in own]
    return found


def callee(call):
    """'torch.load' for torch.load(...), '' for what is no plain dotted name."""
    return ast.unparse(call.func) if isinstance(call.func, (ast.Name, ast.Attribute)) else ""


def test_nothing_is_used_above_the_line_that_defines_it():
    """Red when any function stands below one that calls it. Seen red with `lr_at` moved to the end of the file."""
    position = {}
    for number, statement in enumerate(TREE.body):
        for name in defined_names(statement):
            position.setdefault(name, number)
    early = []
    for number, statement in enumerate(TREE.body):
        for name, line in loaded_names(statement):
            if position.get(name, -1) > number:
                early.append(f"line {line} uses {name}, defined at line {TREE.body[position[name]].lineno}")
    assert not early, "\n".join(early)


def test_every_name_is_known():
    """Names read anywhere are local, module-level or builtin. Seen red with `import shutil` removed."""
    known = (
        {name for statement in TREE.body for name in defined_names(statement)}
        | set(dir(builtins))
        | {"__file__", "__name__"}
    )
    in_classes = {
        name
        for cls in ast.walk(TREE)
        if isinstance(cls, ast.ClassDef)
        for stmt in cls.body
        for name in defined_names(stmt)
    }
    unknown = {name for statement in TREE.body for name, _ in loaded_names(statement)} - known - in_classes
    assert not unknown


def test_module_level_variables_are_constants():
    """No lower-case variable at module level, so no function reads hidden state. Seen red with `cache = {}` added."""
    for statement in TREE.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for name in defined_names(statement):
                assert name == name.upper(), f"line {statement.lineno}: module-level variable {name}"
    assert not [node for node in ast.walk(TREE) if isinstance(node, (ast.Global, ast.Nonlocal))]


def test_module_level_holds_only_definitions():
    """Imports, constants, functions, classes, __main__ guards. Seen red with `torch.manual_seed(0)` at module level."""
    for number, statement in enumerate(TREE.body):
        if number == 0:
            assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)  # the docstring
            continue
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        if isinstance(statement, ast.If):
            assert ast.unparse(statement.test) == "__name__ == '__main__'"
            continue
        assert isinstance(statement, kinds), f"line {statement.lineno}: {type(statement).__name__} at module level"
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
                assert callee(call).split(".")[0] in HARMLESS_CALLS, (
                    f"line {call.lineno}: {callee(call)} runs on import"
                )


def test_functions_are_short_and_flat():
    """At most 60 lines (`run` 140), no function or class inside. Seen red with a function nested in `main`."""
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert not {name: size for name, size in sizes.items() if size > (140 if name == "run" else 60)}
    for function in FUNCTIONS:
        inside = [
            node
            for node in ast.walk(function)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not function
        ]
        assert not inside, f"{function.name} nests {inside[0].name}"


def test_lambdas_are_only_arguments():
    """A lambda may be handed to write_atomic, write_own, sorted, re.sub and their like, never named or returned. Seen
    red with `f = lambda: 0`."""
    handed = set()
    for call in (node for node in ast.walk(TREE) if isinstance(node, ast.Call)):
        if callee(call) in ("write_atomic", "write_own", "sorted", "min", "max", "re.sub") or callee(call).endswith(
            ".sort"
        ):
            handed |= {id(arg) for arg in (*call.args, *(keyword.value for keyword in call.keywords))}
    stray = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Lambda) and id(node) not in handed]
    assert not stray, f"lambdas at lines {stray}"


def is_config(node):
    """Whether an expression is a config: cfg, shape, anything.cfg, or the dataclass itself."""
    named = isinstance(node, ast.Name) and node.id in ("cfg", "shape", *CONFIG_NAMES)
    return named or isinstance(node, ast.Attribute) and node.attr == "cfg"


def expand(joined, function):
    """Texts that getattr's f-string can take: placeholders run over the string constants of the function around it."""
    words = {
        node.value for node in ast.walk(function) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    words = {word.removeprefix("loss_") for word in words if re.fullmatch(r"\w+", word)} | set(V.MASK_FAMILIES)
    texts = {""}
    for part in joined.values:
        texts = {text + tail for text in texts for tail in ([part.value] if isinstance(part, ast.Constant) else words)}
    return texts


def config_reads():
    """Names read from a config outside the dataclass and the rules that check it, properties resolved to fields."""
    reads = set()
    for top in TREE.body:
        if top in CONFIG_CLASSES or getattr(top, "name", "") == "value_problems":
            continue
        reads |= {
            node.attr
            for node in ast.walk(top)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_config(node.value)
        }
        for function in (node for node in ast.walk(top) if isinstance(node, ast.FunctionDef)):
            for call in (
                node for node in ast.walk(function) if isinstance(node, ast.Call) and callee(node) == "getattr"
            ):
                if is_config(call.args[0]) and isinstance(call.args[1], ast.JoinedStr):
                    reads |= expand(call.args[1], function)
    inside = [node for cls in CONFIG_CLASSES for node in cls.body if isinstance(node, ast.FunctionDef)]
    properties = {node.name: node for node in inside if node.name != "rules"}
    todo = [name for name in properties if name in reads]
    while todo:
        own = {
            node.attr
            for node in ast.walk(properties[todo.pop()])
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
        }
        todo += [name for name in own - reads if name in properties]
        reads |= own
    return reads


def test_every_config_field_is_read():
    """A field only in RANGES or a rule changes nothing. Seen red with an unused field added to the dataclass."""
    by_name = {"preset"}  # read from the user's settings, before there is a config
    assert not {field.name for field in fields(V.VJepaAutoV2Config)} - by_name - config_reads()


def test_ranges_and_choices_name_only_fields():
    """A misspelt rule guards nothing: numbers have a range, every key is a field. Seen red with a key renamed."""
    names = {field.name for field in fields(V.VJepaAutoV2Config)}
    assert (
        set(V.merged(V.VJepaAutoV2Config, "RANGES")) | set(V.merged(V.VJepaAutoV2Config, "CHOICES")) <= names
        and {name for cls in V.VJepaAutoV2Config.__mro__ for name in vars(cls).get("MUST_MATCH", ())} <= names
    )
    assert all(set(preset) <= names for preset in V.merged(V.VJepaAutoV2Config, "PRESETS").values())
    assert {name for name, kind in V.field_types(V.VJepaAutoV2Config).items() if kind in (int, float)} == set(
        V.merged(V.VJepaAutoV2Config, "RANGES")
    )


def test_sections_are_numbered_and_banners_have_one_style():
    """Rule, `# N  Title`, rule, numbers 1..n. Seen red with section 7 numbered 8."""
    lines = SOURCE.splitlines()
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"#\s*[-=#*~]{5,}", line.strip())]
    assert len(rules) % 2 == 0 and len(rules) >= 20
    for place, (top, bottom) in enumerate(zip(rules[::2], rules[1::2]), 1):
        assert lines[top] == lines[bottom] == RULE and bottom == top + 2, f"line {top + 1}"
        assert re.fullmatch(rf"# {place}  [A-Z].+", lines[top + 1]), f"line {top + 2}: {lines[top + 1]}"


def test_broad_handlers_only_where_foreign_things_are_met():
    """`except Exception` where a foreign file is read (read_weights, import_world, load_checkpoint,
    LatentDataset) or a foreign package called (Tracker.call), with its reason. Seen red with another one in `main`."""
    broad = []
    for function in FUNCTIONS:
        for handler in (node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)):
            caught = ast.unparse(handler.type) if handler.type else "Exception"
            if re.search(r"\b(Base)?Exception\b", caught):
                broad.append((function.name, handler.lineno))
    assert [name for name, _ in broad] == ["read_weights", "import_world", "load_checkpoint", "read_file", "call"]
    for _, line in broad:
        assert re.search(r"# \w+", SOURCE.splitlines()[line - 1]), "a reason must stand beside it"


def test_torch_load_reads_weights_only():
    """No checkpoint can run code. Seen red with weights_only=False."""
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and callee(node) == "torch.load"]
    assert calls
    for call in calls:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"
    assert "pickle" not in {name for statement in TREE.body for name in defined_names(statement)}


def test_comments_are_neither_missing_nor_everywhere():
    """Lines with a comment, banners included: 3 to 25 % of all lines. Seen red with every comment stripped."""
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    assert 0.03 <= len(commented) / len(SOURCE.splitlines()) <= 0.25


def test_every_module_level_function_and_class_says_what_it_does():
    """A docstring each. Seen red with the docstring of `lr_at` removed."""
    silent = [
        node.name
        for node in TREE.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)
    ]
    assert not silent


def test_no_other_file_of_the_project_is_imported():
    """The script stands alone: nothing of tools/ or tests/. Seen red with `import conftest`."""
    others = {path.stem for folder in (ROOT, ROOT / "tools", ROOT / "tests") for path in folder.glob("*.py")} | {
        "tools",
        "tests",
    }
    imported = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert not imported & others
