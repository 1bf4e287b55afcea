"""The rules of the house, as tests."""

import ast
from pathlib import Path

import pytest

LAYERS = ("kernels", "parallel", "models", "recipes", "benchmarks")
ROOT = Path(__file__).parents[1]
FILES = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def _imported(path, node):
    """Yield the absolute dotted names that an import statement reaches, relative ones resolved."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = ("warploom", *path.relative_to(ROOT).with_suffix("").parts)
        base = ".".join(parts[: -node.level]) + "." if node.level else ""
        module = base + (node.module or "")
        yield from (f"{module.rstrip('.')}.{alias.name}" for alias in node.names)


@each_file
def test_imports_point_down(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _imported(path, node):
            parts = name.split(".")
            if parts[0] == "warploom" and len(parts) > 1 and parts[1] in LAYERS:
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                by_path = path.parent == ROOT / "recipes"  # recipes are started by their path
                reach = LAYERS.index(parts[1])
                own = reach == layer and (relative or by_path)
                below = reach < layer and not relative
                assert own or below, f"{LAYERS[layer]} may not import {name}"


@each_file
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@each_file
def test_no_module_state(path):
    assert not any(isinstance(n, ast.Global) for n in ast.walk(ast.parse(path.read_text())))


@each_file
def test_a_file_is_not_named_like_a_function_its_package_exports(path):
    init = path.parent / "__init__.py"
    if init.exists() and path != init:
        names = [
            a.name
            for n in ast.walk(ast.parse(init.read_text()))
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        ]
        assert path.stem not in names


def test_each_layer_is_a_link_and_has_no_init():
    for layer in LAYERS:
        assert (ROOT / "src" / "warploom" / layer).is_symlink()
        assert not (ROOT / layer / "__init__.py").exists(), (
            "would shadow the PyPI package of that name"
        )
