"""Every site that communicates or divides, and every way to break it."""

import ast
import collections
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import PAIRS, base

TREES = ("parallel", "models")
EXEMPT = {
    "parallel/checkpoint": "moves bytes, not gradients",
    "parallel/faults": "watches",
    "parallel/memory": "measures",
    "parallel/interop": "translates",
    "parallel/export.py": "moves bytes, not gradients",
    "parallel/collectives/debug.py": "compares",
    "parallel/collectives/door.py": "watches",
    "parallel/parity.py": "compares",
    "parallel/pipeline/simulator.py": "predicts times, and draws them",
    "parallel/mesh.py": "makes the groups: its tests name every rank",
    "models/hf": "moves bytes, not gradients",
    "models/cost.py": "predicts",
}
NO_GRADIENT = {"barrier", "device_of", "gather_json", "place"}  # exported, carry no gradient
ROWS = ("all_gather_rows", "reduce_scatter_rows", "all_to_all_rows")
PLAIN = ("all_reduce", "exchange", "broadcast", *ROWS)
OTHER = {
    "tp": "shard", "shard": "tp", "tokens": "shard", "ep": "etp", "etp": "ep", "edp": "shard",
    "cp": "dp", "dp": "cp", "rep": "shard", "world": "tokens", "ulysses": "ring",
    "ring": "ulysses", "pp": "tp", "ends": "pp",
}  # fmt: skip
DECLARED = ("partial", "spread", "expert")
CALLS = '__import__("tests.mutants").mutants'


@dataclass(frozen=True)
class Mutant:
    """One change of one file: at a place, which is a function or the thread of a public bug."""

    path: str
    place: str
    what: str
    how: str
    line: int
    text: str
    scope: str  # the function or class that it changes

    @property
    def id(self) -> str:
        return f"{self.path}:{self.place}:{self.what}:{self.how}"


def dotted(node):
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def exported(root: Path) -> set[str]:
    """Collect the exported functions of parallel/collectives that take a group."""
    names, takes = set(), set()
    for file in sorted((root / "parallel/collectives").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                takes |= {node.name} if "group" in arguments else set()
            elif isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
    return {name for name in names & takes if name not in NO_GRADIENT}


def known(name: str) -> bool:
    return base(name) in (*PAIRS, *PLAIN)


class _Sites(ast.NodeVisitor):
    """Collect `(place, what, how, node, replacement)` of one file."""

    def __init__(self, path: str, text: str, collectives: set[str]) -> None:
        self.path, self.text = path, text
        self.collectives = collectives
        self.stack: list[str] = []
        self.parameters: set[str] = set()
        self.found: list[tuple[str, str, str, ast.AST, str]] = []
        tree = ast.parse(text)
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        here = path.startswith("parallel/collectives/")
        self.names = {
            alias.asname or alias.name
            for node in imports
            for alias in node.names
            if alias.name in collectives and ("collectives" in (node.module or "") or here)
        }
        if here:
            self.names |= {
                n.name for n in tree.body if isinstance(n, ast.FunctionDef)
            } & collectives
        self.paths = "pathlib" in {
            a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
        }
        self.paths |= any(n.module == "pathlib" for n in imports)
        self.visit(tree)

    def source(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def add(self, what: str, node: ast.AST, **changes: str) -> None:
        place = ".".join(self.stack) or "module"
        for how, replacement in changes.items():
            self.found.append((place, what, how.replace("_", " "), node, replacement))

    def _named(self, node) -> None:
        self.stack.append(node.name)
        outside = self.parameters
        if not isinstance(node, ast.ClassDef):
            self.parameters = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        for part in (*node.body, *node.decorator_list):
            self.visit(part)
        self.parameters = outside
        self.stack.pop()

    visit_FunctionDef = visit_ClassDef = visit_AsyncFunctionDef = _named  # no annotations

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.names and isinstance(node.ctx, ast.Load):
            made = {how: f"{CALLS}.{how}({node.id})" for how in ("drop", "double", "other")}
            if base(node.id) in ("gather", "scatter", "split", "swap"):
                made["drop_adjoint"] = f"{CALLS}.drop_adjoint({node.id})"
            self.add(node.id, node, **made)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = dotted(node.value).split(".")[-1]
        if owner == "mesh" and node.attr in OTHER and isinstance(node.ctx, ast.Load):
            self.add(
                f"mesh.{node.attr}", node, other=f"{self.source(node.value)}.{OTHER[node.attr]}"
            )
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Div) and not self.paths:
            left, right = self.source(node.left), self.source(node.right)
            self.add("/", node, drop=f"({left})", double=f"(({left}) / (2 * ({right})))")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        target, value = self.source(node.target), self.source(node.value)
        if isinstance(node.op, ast.Div):
            self.add("/=", node, drop="pass", double=f"{target} /= 2 * ({value})")
        elif isinstance(node.op, ast.Add) and self._sums(target) and not _counts(node):
            self.add("+=", node, drop="pass", double=f"{target} += 2 * ({value})")
        self.generic_visit(node)

    def _sums(self, target: str) -> bool:
        """Say whether a sum into `target` is one of gradients."""
        backward = any("backward" in name for name in self.stack)
        return (
            backward
            or self.path.startswith("parallel/data/")
            or bool(re.match(r"d[a-z]+\b|.*grad", target))
        )

    def visit_Call(self, node: ast.Call) -> None:
        if dotted(node.func) == "device_of":  # all groups of a rank have one device
            return
        if isinstance(node.func, ast.Attribute):
            owner, method = self.source(node.func.value), node.func.attr
            values = ", ".join(self.source(a) for a in node.args)
            if method in ("div", "div_") and node.args or method == "add_" and self._sums(owner):
                self.add(method, node, drop=owner, double=f"{owner}.{method}(2 * ({values}))")
            elif method == "mean":
                rest = self.source(node)[len(owner) :].replace(".mean", ".sum", 1)
                self.add(method, node, drop=f"{owner}{rest}", double=f"({self.source(node)} / 2)")
        for keyword in node.keywords:
            handed_on = isinstance(keyword.value, ast.Name) and keyword.value.id in self.parameters
            if keyword.arg in DECLARED and not handed_on:
                value = self.source(keyword.value)
                hows = ("drop",) if keyword.arg == "expert" else ("drop", "double", "other")
                made = {h: f'{CALLS}.declared("{h}", {value})' for h in hows}
                self.add(f"{keyword.arg}=", keyword.value, **made)
        self.generic_visit(node)


def _counts(node: ast.AugAssign) -> bool:
    """Say whether `+=` collects or counts, rather than sums tensors."""
    name = dotted(node.target).split(".")[-1]
    plain = isinstance(node.value, ast.Constant | ast.List | ast.ListComp | ast.Tuple)
    counting = r"(.*size|.*count|offset|at|total|start|seconds|steps|.*bytes|number|found)"
    return plain or bool(re.fullmatch(counting, name))


def replaced(text: str, node: ast.AST, replacement: str) -> str:
    """Put `replacement` where `node` stands; columns of the syntax tree count bytes."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    whole = text.encode()
    return (whole[:begin] + replacement.encode() + whole[end:]).decode()


def generated(root: Path) -> Iterator[Mutant]:
    """Yield every mutant of the sources below `root`, in order."""
    collectives = exported(root)
    for name in mutated(root):
        text = (root / name).read_text()
        seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for place, what, how, node, replacement in _Sites(name, text, collectives).found:
            seen[place, what, how] += 1
            number = seen[place, what, how]
            label = f"{what}#{number}" if number > 1 else what
            changed = replaced(text, node, replacement)
            yield Mutant(name, place, label, how, node.lineno, changed, place)


def named(root: Path) -> Iterator[Mutant]:
    """Yield the public bugs, each as a mutant.

    Raises:
        SystemExit: If a patch does not find its place: the source has changed, and so must it.
    """
    for bug in json.loads((root / "tests/mutants/named.json").read_text()):
        text = (root / bug["file"]).read_text() if (root / bug["file"]).exists() else ""
        after, count = re.subn(bug["find"], bug["replace"], text)
        if count != 1 or after == text:
            raise SystemExit(
                f"{bug['thread']} ({bug['what']}) must match once in {bug['file']}; its pattern "
                f"matches {count} times: mend tests/mutants/named.json"
            )
        line = text[: re.search(bug["find"], text).start()].count("\n") + 1
        place, what = bug["thread"], bug["what"]
        yield Mutant(bug["file"], place, what, "named", line, after, scope(text, line))


def functions(text: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each function with its dotted place, the outer ones first."""

    def below(node, stack):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                place = [*stack, child.name]
                if isinstance(child, ast.FunctionDef):
                    yield ".".join(place), child
                yield from below(child, place)
            else:
                yield from below(child, stack)

    yield from below(ast.parse(text), [])


def scope(text: str, line: int) -> str:
    """Return the place of the innermost function that holds a line."""
    found = "module"
    for place, node in functions(text):
        if node.lineno <= line <= node.end_lineno:
            found = place
    return found


def mutated(root: Path) -> list[str]:
    """List the files of the trees that are not exempt."""
    names = sorted(str(p.relative_to(root)) for tree in TREES for p in (root / tree).rglob("*.py"))
    return [n for n in names if not any(n == e or n.startswith(f"{e}/") for e in EXEMPT)]
