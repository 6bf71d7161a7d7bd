"""The shape of openpista.py: its map is true, it only looks up, and importing it is cheap."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

SOURCE = pathlib.Path(__file__).parent.parent / "openpista.py"
TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# ===== (\d+)\. (\w+) =+$", re.M)
HEAVY = {"aioquic", "cryptography", "httpx"}
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def sections():
    """[(title, first line, last line), ...] in file order."""
    starts = [(m[2], TEXT.count("\n", 0, m.start()) + 1) for m in BANNER.finditer(TEXT)]
    ends = [line - 1 for _, line in starts[1:]] + [TEXT.count("\n")]
    return [(title, first, last) for (title, first), last in zip(starts, ends, strict=True)]


@functools.cache
def section_of(line):
    return max((i for i, (_, first, _) in enumerate(sections()) if first <= line), default=-1)


def names_of(node):
    """What a statement of the module defines."""
    if hasattr(node, "name"):
        return [node.name]
    if isinstance(node, ast.AugAssign):
        return []
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_map_matches_banners():
    mapped = re.findall(r"^ +(\d+)\. (\w+) ", ast.get_docstring(TREE, clean=False), re.M)
    assert mapped == [(str(i), title) for i, (title, _, _) in enumerate(sections(), 1)]


@functools.cache
def local_names(node):
    """Parameters and variables of a definition, which may be called like something further down."""
    stored = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return stored | {name.arg for name in ast.walk(node) if isinstance(name, ast.arg)}


def test_each_section_uses_only_those_above():
    home = {name: section_of(node.lineno) for node in TREE.body for name in names_of(node)}
    down = [
        (name.id, name.lineno)
        for node in TREE.body
        if isinstance(node, (*DEFS, ast.ClassDef))
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
        and name.id not in local_names(node)
        and home.get(name.id, -1) > section_of(node.lineno)
    ]
    assert down == []


def test_nothing_is_defined_twice():
    names = [name for node in TREE.body for name in names_of(node)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_importing_is_cheap():
    code = f"import sys, openpista; print({HEAVY!r} & set(sys.modules) or 'none')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE.parent)
    assert out.stdout.strip() == "none"


def test_broad_excepts_are_few_and_have_a_reason():
    broad = [
        TEXT.splitlines()[node.lineno - 1]
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"
    ]
    assert len(broad) <= 4
    assert all("#" in line for line in broad)


def test_public_names_have_docstrings():
    bare = [
        node.name
        for node in TREE.body
        if isinstance(node, (*DEFS, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert bare == []


def test_nouns_have_their_defaults_last():
    """What typing would check when it makes a NamedTuple, and ours does not."""
    nouns = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases)
    ]
    fields = {noun.name: [field.value for field in noun.body if isinstance(field, ast.AnnAssign)] for noun in nouns}
    assert len(fields) > 50 and all(values == sorted(values, key=bool) for values in fields.values())


def test_patterns_are_compiled_when_they_are_used():
    """Not at import, where each costs every command 0.1 ms: `Pattern` takes the place of re.compile there."""
    inside = {id(part) for node in ast.walk(TREE) if isinstance(node, (*DEFS, ast.Lambda)) for part in ast.walk(node)}
    compiled = [
        node for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func) == "re.compile"
    ]
    assert [node.lineno for node in compiled if id(node) not in inside] == []
