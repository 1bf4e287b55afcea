"""Mutation score of what carries gradients: each site that communicates or divides, broken.

    python tests/mutants.py [--list] [--only parallel/tensor/linear.py] [--sample 6] [--jobs 2]

Sites are found in the sources of parallel/ and models/: every use of a collective, every divisor,
every sum of gradients, every group that is taken from a mesh. Each is dropped, doubled and given
another group, one mutant at a time, in a copy of the tree; the tests nearest to the file run, and
must fail. A hang counts as a failure. `mutants_named.json` holds bugs that public projects had.

Results are kept in build/mutants.json by mutant and by a hash of the file and of the tests that
decided, so that a run that was broken off goes on, and one with more tests tries survivors alone.
A survivor needs a reason in `mutants_equivalent.json`, or the run fails. A whole run writes
docs/mutants.md.
"""

import argparse
import ast
import collections
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

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
    "parallel/mesh.py": "makes the groups: its tests name every rank",
    "models/hf.py": "moves bytes, not gradients",
    "models/cost.py": "predicts",
    "models/memory_cost.py": "predicts",
}
NO_GRADIENT = {"barrier", "device_of", "gather_json", "place"}  # exported, carry no gradient
PAIRS = ("gather", "scatter", "copy", "reduce", "join", "split", "swap")
ROWS = ("all_gather_rows", "reduce_scatter_rows", "all_to_all_rows")
PLAIN = ("all_reduce", "exchange", "broadcast", *ROWS)
OTHER = {
    "tp": "shard", "shard": "tp", "tokens": "shard", "ep": "etp", "etp": "ep", "edp": "shard",
    "cp": "dp", "dp": "cp", "rep": "shard", "world": "tokens", "ulysses": "ring",
    "ring": "ulysses", "pp": "tp", "ends": "pp",
}  # fmt: skip
DECLARED = ("partial", "spread", "expert")
DEAD = ("killed", "timeout")


# What a mutated source calls: `__import__("mutants").drop(gather)(x, group)`.


def _bound(fn, args, kwargs):
    import inspect

    values = inspect.signature(fn).bind(*args, **kwargs)
    values.apply_defaults()
    return values.arguments


def base(name):
    """Name a collective without `_begin` and the underscore of those in place."""
    return name.removesuffix("_begin").rstrip("_")


def _without(kind, given):
    """Return what a rank has when nothing is sent, in the shape that the caller expects."""
    import torch

    if kind == "exchange":
        return [x for x, _ in given["receives"]]
    x, group = given["x"], given["group"]
    if kind in ("gather", "join", "all_gather_rows"):
        return torch.cat([x] * group.size())
    if kind in ("scatter", "reduce_scatter_rows"):
        return x.chunk(group.size())[group.rank()]
    if kind == "split":
        return x.chunk(group.size())[0]
    if kind in ("swap", "all_to_all_rows"):
        rows = x.shape[0] if given["got"] is None else sum(given["got"])
        return x if rows == x.shape[0] else x.new_zeros(rows, *x.shape[1:]) + 0 * x.sum()
    return x


def _pending(fn, given, value):
    if given.get("out") is not None:
        value = given["out"].copy_(value)
    if not fn.__name__.endswith("_begin"):
        return value
    from warploom.parallel.collectives import Pending

    return Pending(value)


def drop(fn):
    """Return the collective that sends nothing, forward or backward."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        if given["group"] is None:
            return fn(*args, **kwargs)
        return _pending(fn, given, _without(base(fn.__name__), given))

    return call


def drop_adjoint(fn):
    """Return the collective whose backward sends nothing."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        x, group = given["x"], given["group"]
        if group is None:
            return fn(*args, **kwargs)
        y = fn(*args, **kwargs).detach()
        local = _without(base(fn.__name__), given)
        if base(fn.__name__) in ("gather", "join"):
            import torch

            own = group.rank()
            local = torch.cat([x if r == own else x.detach() for r in range(group.size())])
        return y + (local - local.detach())

    return call


def double(fn):
    """Return the collective whose result counts twice; of a pair, its gradient alone."""

    def twice(x):
        if base(fn.__name__) in PAIRS:
            return 2 * x - x.detach()
        import torch

        with torch.no_grad():
            return x.mul_(2) if x.dtype != torch.bool else x.logical_not_()

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        result = fn(*args, **kwargs)
        if given["group"] is None:
            return result
        value = result.wait() if fn.__name__.endswith("_begin") else result
        value = [twice(x) for x in value] if isinstance(value, list) else twice(value)
        return _pending(fn, {}, value)

    return call


def another(group):
    """Return a group of as many other ranks, or `None` in a world that has no others."""
    import torch.distributed as dist

    if group is None or group.size() == dist.get_world_size():
        return None
    ranks, size, own = dist.get_process_group_ranks(group), group.size(), dist.get_rank()
    stride = dist.get_world_size() // size
    across = list(range(own % stride, dist.get_world_size(), stride))[:size]
    block = list(range(own - own % size, own - own % size + size))
    return _made(tuple(across if across != ranks else block))


def _made(ranks, cache={}):  # noqa: B006  a group is made once
    import torch.distributed as dist

    if ranks not in cache:
        cache[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return cache[ranks]


def other(fn):
    """Return the collective over another group."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        group = another(given["group"])
        if given["group"] is None or group is None:
            return drop(fn)(*args, **kwargs)
        given["group"] = group
        if "x" not in given:
            return drop(fn)(*args, **kwargs)
        return fn(given.pop("x"), given.pop("group"), **given)

    return call


def declared(how, value):
    """Return what a layout declares, dropped, doubled or over another group."""
    if isinstance(value, bool):
        return not value
    if how == "drop":
        return ()
    if how == "double":
        return (*value, *value)
    groups = [(another(g[0]), g[1]) if isinstance(g, tuple) else another(g) for g in value]
    return tuple(g for g in groups if (g[0] if isinstance(g, tuple) else g) is not None)


# The tool.


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    place: str
    what: str
    how: str
    line: int
    text: str

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
            made = {
                how: f'__import__("mutants").{how}({node.id})'
                for how in ("drop", "double", "other")
            }
            if base(node.id) in ("gather", "scatter", "join", "split", "swap"):
                made["drop_adjoint"] = f'__import__("mutants").drop_adjoint({node.id})'
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
                made = {h: f'__import__("mutants").declared("{h}", {value})' for h in hows}
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
    for path in sorted(p for tree in TREES for p in (root / tree).rglob("*.py")):
        name = str(path.relative_to(root))
        if any(name == e or name.startswith(f"{e}/") for e in EXEMPT):
            continue
        text = path.read_text()
        seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for place, what, how, node, replacement in _Sites(name, text, collectives).found:
            seen[place, what, how] += 1
            number = seen[place, what, how]
            label = f"{what}#{number}" if number > 1 else what
            yield Mutant(name, place, label, how, node.lineno, replaced(text, node, replacement))


def named(root: Path) -> Iterator[Mutant]:
    """Yield the public bugs, each as a mutant.

    Raises:
        SystemExit: If a patch does not find its place: the source has changed, and so must it.
    """
    for bug in json.loads((root / "tests/mutants_named.json").read_text()):
        text = (root / bug["file"]).read_text() if (root / bug["file"]).exists() else ""
        after, count = re.subn(bug["find"], bug["replace"], text)
        if count != 1 or after == text:
            raise SystemExit(
                f"{bug['thread']} ({bug['what']}) must match once in {bug['file']}; its pattern "
                f"matches {count} times: mend tests/mutants_named.json"
            )
        line = text[: re.search(bug["find"], text).start()].count("\n") + 1
        yield Mutant(bug["file"], bug["thread"], bug["what"], "named", line, after)


def _imports(root: Path, path: Path) -> set[str]:
    """List the files of the layers that a file imports."""
    parts = path.relative_to(root).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            first = list(parts[: len(parts) - node.level]) if node.level else []
            module = ".".join([*first, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            stem = root / name.removeprefix("warploom.").replace(".", "/")
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if name and file.is_file():
                    found.add(str(file.relative_to(root)))
    return found


def tests_of(root: Path) -> dict[str, tuple[str, ...]]:
    """Map each source file to the tests that reach it by imports, the nearest first."""
    layers = ("kernels", "parallel", "models", "recipes")
    sources = [p for layer in layers for p in (root / layer).rglob("*.py")]
    edges = {str(p.relative_to(root)): _imports(root, p) for p in sources}
    distances: dict[str, dict[str, int]] = collections.defaultdict(dict)
    tests = [*root.glob("tests/parallel/test_*.py"), *root.glob("tests/models/test_*.py")]
    tests += root.glob("tests/recipes/test_verify*.py")
    for test in sorted(tests):
        name = str(test.relative_to(root))
        frontier, depth, reached = _imports(root, test), 1, set()
        for beside in test.parent.glob("*.py"):  # helpers such as toy.py
            if not beside.name.startswith("test_") and beside.stem in test.read_text():
                frontier |= _imports(root, beside)
        while frontier:
            for file in frontier:
                distances[file][name] = depth
            reached |= frontier
            frontier = {f for near in frontier for f in edges.get(near, ())} - reached
            depth += 1
    result = {}
    for file, found in distances.items():
        words = {*Path(file).parts[1:-1], Path(file).stem} - {"__init__"}
        mirrors = {t: any(word in Path(t).stem for word in words) for t in found}
        result[file] = tuple(sorted(found, key=lambda t: (not mirrors[t], found[t], t)))
    return result


def copied(root: Path, to: Path) -> None:
    """Copy what git tracks, and what it does not ignore, with links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        source, target = root / name, to / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    conftest = to / "tests/conftest.py"
    text = re.sub(r"timedelta\(seconds=\d+\)", "timedelta(seconds=15)", conftest.read_text())
    conftest.write_text(re.sub(r"(timeout: float = )\d+", r"\g<1>45", text))


def tried(tree: Path, tests: tuple[str, ...], limit: float) -> tuple[str, str]:
    """Run tests in a tree until one fails: `killed`, `survived`, `timeout` or `broken`, and why."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # starts in half the time
    environment["PYTHONPATH"] = f"{tree / 'src'}:{tree / 'tests'}"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *tests], cwd=tree, env=environment, start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "timeout", ""
        output.seek(0)
        lines = [line.strip() for line in output if line.startswith(("FAILED", "ERROR", "E  "))]
    return {0: "survived", 1: "killed"}.get(code, "broken"), (lines or [""])[-1][:200]


class Results:
    """What is known, in a file, by mutant and by what it depends on."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.file, self.lock = root, file, threading.Lock()
        self.known = json.loads(file.read_text()) if file.exists() else {}

    def hash(self, path: str, tests: tuple[str, ...], text: str) -> str:
        parts = [
            (self.root / name).read_bytes()
            for name in (path, *tests)
            if (self.root / name).exists()
        ]
        return hashlib.sha256(b"\0".join([*parts, text.encode()])).hexdigest()[:16]

    def get(self, mutant: Mutant, tests: tuple[str, ...]) -> str | None:
        """Return a result that still holds: a death whoever brought it, a survival of all."""
        entry = self.known.get(mutant.id)
        if entry is None or not set(entry["tests"]) <= set(tests):
            return None
        if entry["sources"] != self.hash(mutant.path, tuple(entry["tests"]), mutant.text):
            return None
        result: str = entry["result"]
        return result if result in DEAD or set(entry["tests"]) == set(tests) else None

    def put(self, mutant: Mutant, tests: tuple[str, ...], result: str, why: str) -> None:
        """Keep a result, of the one test that failed or of all that did not."""
        failed = re.match(r"(?:FAILED|ERROR) ([^:]+\.py)", why)
        if result == "killed" and failed and failed[1] in tests:
            tests = (failed[1],)
        sources = self.hash(mutant.path, tests, mutant.text)
        entry = {"result": result, "tests": tests, "sources": sources, "why": why}
        with self.lock:
            self.known[mutant.id] = entry
            self.file.parent.mkdir(exist_ok=True)
            self.file.with_suffix(".new").write_text(json.dumps(self.known, indent=1))
            self.file.with_suffix(".new").replace(self.file)


class Workers:
    """Copies of the tree, in each of which one mutant is tried at a time."""

    def __init__(self, root: Path, results: Results, nearest: int) -> None:
        self.root, self.results, self.nearest = root, results, nearest
        self.tests = tests_of(root)
        self.trees: queue.Queue[Path] = queue.Queue()
        self.seconds: dict[str, float] = {}
        self.lock = threading.Lock()

    def chosen(self, path: str) -> tuple[str, ...]:
        """List the tests of a source file."""
        return self.tests.get(path, ())[: self.nearest]

    def unbroken(self, tree: Path, test: str) -> float:
        """Return the seconds that a test file takes without a mutation; it must pass."""
        with self.lock:
            if test not in self.seconds:
                begin = time.monotonic()
                result, why = tried(tree, (test,), 600)
                if result != "survived":
                    raise SystemExit(
                        f"{test} must pass before anything is mutated; {result}: {why}"
                    )
                self.seconds[test] = time.monotonic() - begin
            return self.seconds[test]

    def attempt(self, mutant: Mutant) -> str:
        """Return what became of a mutant, from what is known or by trying it."""
        tests = self.chosen(mutant.path)
        if not tests:
            return "survived"
        if (known_result := self.results.get(mutant, tests)) is not None:
            return known_result
        tree = self.trees.get()
        try:
            limit = 60 + 3 * sum(self.unbroken(tree, test) for test in tests)
            file = tree / mutant.path
            before = file.read_text()
            file.write_text(mutant.text)
            try:
                result, why = tried(tree, tests, limit)
            finally:
                file.write_text(before)
        finally:
            self.trees.put(tree)
        self.results.put(mutant, tests, result, why)
        return result

    def run(self, mutants: list[Mutant], jobs: int) -> dict[str, str]:
        """Try all, `jobs` at a time, and return the results by id."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Progress(*columns) as bar:
            task = bar.add_task("mutants", total=len(mutants))
            for job in range(jobs):
                copied(self.root, Path(folder) / str(job))
                self.trees.put(Path(folder) / str(job))
            found = {}
            pool = ThreadPoolExecutor(jobs)
            try:
                futures = {pool.submit(self.attempt, mutant): mutant for mutant in mutants}
                for future in as_completed(futures):
                    mutant = futures[future]
                    found[mutant.id] = future.result()
                    bar.advance(task)
                    if found[mutant.id] not in DEAD:
                        bar.console.print(f"{found[mutant.id]}: {mutant.id} (line {mutant.line})")
            finally:
                pool.shutdown(cancel_futures=True)
        return found


def report(mutants: list[Mutant], found: dict[str, str], reasons: dict[str, str]) -> str:
    """Write the page: score, a line a file, public bugs, survivors."""
    rows = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        rows[mutant.path][found[mutant.id]] += 1
        rows[mutant.path]["sites"] += mutant.how in ("drop", "other", "named")
    total = sum(rows.values(), collections.Counter())
    dead, all_ = total["killed"] + total["timeout"], len(mutants)
    survivors = [m for m in mutants if found[m.id] not in DEAD]
    lines = [
        "# Mutation score",
        "",
        "Written by `make mutants`. Every collective, divisor, sum of gradients and group of the",
        "sources below is dropped, doubled or given another group, one at a time, and the tests",
        "must fail. A hang counts as a failure.",
        "",
        f"**{dead} of {all_} killed** ({total['timeout']} by a hang), {len(survivors)} survive,",
        f"{sum(m.id in reasons for m in survivors)} of these because they are equivalent.",
        "",
        "| file | mutants | killed | hung | survived |",
        "|---|---|---|---|---|",
    ]
    for path, row in sorted(rows.items()):
        count = sum(row[x] for x in ("killed", "timeout", "survived", "broken"))
        lines.append(
            f"| `{path}` | {count} | {row['killed']} | {row['timeout']} | {row['survived']} |"
        )
    lines += [
        "",
        "## Bugs that public projects had",
        "",
        "| thread | what | here |",
        "|---|---|---|",
    ]
    lines += [
        f"| {m.place} | {m.what} | `{m.path}`: {found[m.id]} |" for m in mutants if m.how == "named"
    ]
    lines += ["", "## Survivors", ""]
    lines += [f"- `{m.id}`: {reasons.get(m.id, 'no reason given')}" for m in survivors] or ["None."]
    lines += ["", "## Not mutated", ""]
    lines += [f"- `{path}`: {why}" for path, why in EXEMPT.items()]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None, root: Path = Path(__file__).parents[1]) -> int:
    """Run from the command line; 1 if a mutant survives without a reason."""
    parser = argparse.ArgumentParser(description="Mutation score of what carries gradients.")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument(
        "--only", action="append", metavar="FILE", help="mutate this file or folder"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants, evenly drawn")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--tests", type=int, default=8, help="test files a mutant, nearest first")
    given = parser.parse_args(words)
    mutants = [*generated(root), *named(root)]
    whole = len(mutants)
    if given.only:
        mutants = [m for m in mutants if any(m.path.startswith(o.rstrip("/")) for o in given.only)]
    if given.sample:
        mutants = random.Random(0).sample(mutants, min(given.sample, len(mutants)))
    if given.list:
        print("\n".join(f"{m.id} (line {m.line})" for m in mutants))
        return 0
    results = Results(root, root / "build/mutants.json")
    found = Workers(root, results, given.tests).run(mutants, given.jobs)
    reasons = json.loads((root / "tests/mutants_equivalent.json").read_text())
    if len(mutants) == whole:
        (root / "docs/mutants.md").write_text(report(mutants, found, reasons))
    count = collections.Counter(found.values())
    print(", ".join(f"{n} {name}" for name, n in sorted(count.items())))
    alive = [i for i, r in found.items() if r not in DEAD and i not in reasons]
    if alive:
        print("these survive without a reason in tests/mutants_equivalent.json:", *alive, sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
