"""Break each site that communicates or divides, one at a time: the tests must fail.

    python -m tests.mutants [--list] [--only parallel/tensor/linear.py] [--sample 6] [--jobs 2]

First every test of parallel/ and models/, and the proofs of recipes/, run once and say which
functions they enter (build/reach.json). Then each mutant is tried in a copy of the tree with tests
that enter its function: the nearest and quickest first, then others at random. A hang counts as a
failure. `named.json` holds bugs that public projects had.

Results are kept in build/mutants.json by a hash of the mutated file and of the tests that decided,
so that a run that was broken off goes on, and one with more seconds tries survivors alone. A
survivor needs a reason in `equivalent.json`, or the run fails; one that has a reason is tried for a
tenth of the seconds. A whole run writes docs/mutants.md.
"""

import argparse
import collections
import hashlib
import json
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from . import reach
from .sites import EXEMPT, Mutant, generated, mutated, named

_NONE_CHOSEN = 5  # the exit code of pytest
DEAD = ("killed", "timeout")
TESTS = ("tests/parallel", "tests/models", "tests/recipes/test_verify.py")
TESTS += ("tests/recipes/test_matrix.py",)
IMPORTED = (
    *("torch", "torch.distributed", "torch.optim", "torch._inductor.config", "numpy", "pytest"),
    *("hypothesis", "safetensors.torch", "rich", "tyro"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"),
)
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "--no-header"]


def copied(root: Path, to: Path) -> None:
    """Copy what git tracks, and what it does not ignore, with links as links.

    Ranks are forked where they stand, and wait less long for one that hangs.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        source, target = root / name, to / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    for name in ("tests/conftest.py", "tests/pool.py", "recipes/verification/pool.py"):
        if (file := to / name).exists():
            text = file.read_text().replace('get_context("forkserver")', 'get_context("fork")')
            text = re.sub(r"timedelta\(seconds=\d+\)", "timedelta(seconds=15)", text)
            text = re.sub(r"(timeout(?:_s)?(?:: float)? ?= ?)\d+(\.0)?", r"\g<1>30", text)
            file.write_text(text)


class Tree:
    """A copy of the tree with a warm process in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        copied(root, folder)
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = f"{folder / 'src'}:{folder}"
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        self.zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.zygote", *IMPORTED],
            cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def pytest(self, words: list[str], limit: float, **environment: str) -> tuple[int | None, str]:
        """Return the exit code of pytest, None where it ran too long, and what it said."""
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        job = {"arguments": [*PYTEST, *words], "environment": environment, "limit": limit}
        self.zygote.stdin.write(json.dumps(job) + "\n")
        self.zygote.stdin.flush()
        answer = json.loads(self.zygote.stdout.readline())
        return answer["code"], answer["output"]

    def close(self) -> None:
        self.zygote.kill()
        self.zygote.wait()


class Reach:
    """Which tests enter which function, and how long they take; measured once, kept in a file."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.file = root, file
        self.known = json.loads(file.read_text()) if file.exists() else {}
        self.lock = threading.Lock()

    def hash(self, test: str) -> str:
        return hashlib.sha256((self.root / test).read_bytes()).hexdigest()[:16]

    def missing(self) -> list[str]:
        """List the test files that were not measured as they are."""
        files = [
            str(file.relative_to(self.root))
            for name in TESTS
            for file in sorted(
                (self.root / name).glob("test_*.py")
                if (self.root / name).is_dir()
                else [self.root / name]
            )
            if file.exists()
        ]
        self.known = {f: found for f, found in self.known.items() if f in files}
        return [f for f in files if self.known.get(f, {}).get("hash") != self.hash(f)]

    def measure(self, tree: Tree, test: str) -> str:
        """Run a test file in an instrumented tree; name what failed there, and will not be used."""
        with tempfile.TemporaryDirectory() as folder:
            words = ["-p", "tests.mutants.reach", "--maxfail=1000", test]
            code, said = tree.pytest(words, 1800, **{reach.VARIABLE: folder})
            found, failed = reach.collect(Path(folder))
        if not found and code != _NONE_CHOSEN:
            raise SystemExit(f"{test} must pass before anything is mutated; it said:\n{said}")
        with self.lock:
            self.known[test] = {"hash": self.hash(test), "tests": found}
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1))
        return f"failed without a mutant, left out: {', '.join(failed)}" if failed else ""

    def tests(self, mutant: Mutant, seconds: float) -> list[tuple[str, float]]:
        """List all tests that enter the function of a mutant, with their seconds.

        Those named after its file and the quickest come first, up to half of `seconds`; the others
        follow in a random order, which differs from mutant to mutant.
        """
        found: list[tuple[str, float]] = []
        scope = [] if mutant.scope == "module" else mutant.scope.split(".")
        while not found:  # what is not entered by itself is looked for in what holds it
            entered = re.compile(re.escape(f"{mutant.path}:{'.'.join(scope)}") + r"(\..*)?")
            whole = re.compile(re.escape(f"{mutant.path}:") + ".*")
            found = [
                (test, facts["seconds"])
                for file in self.known.values()
                for test, facts in file["tests"].items()
                if any(map((entered if scope else whole).fullmatch, facts["entered"]))
            ]
            if not scope:
                break
            scope.pop()
        words = {*Path(mutant.path).parts[1:-1], Path(mutant.path).stem} - {"__init__"}
        found.sort(
            key=lambda t: (not any(w in Path(t[0].split("::")[0]).stem for w in words), t[1])
        )
        near = _within(found, seconds / 2)
        others = found[len(near) :]
        random.Random(mutant.id).shuffle(others)
        return near + others


def _within(tests: list[tuple[str, float]], seconds: float) -> list[tuple[str, float]]:
    """Return the first tests that take so long together; one at least."""
    chosen: list[tuple[str, float]] = []
    for test, took in tests:
        if chosen and sum(t for _, t in chosen) + took > seconds:
            break
        chosen.append((test, took))
    return chosen


class Results:
    """What is known, in a file, by mutant and by what it depends on."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root, self.file, self.lock = root, file, threading.Lock()
        self.known = json.loads(file.read_text()) if file.exists() else {}

    def hash(self, text: str, tests: Iterable[str]) -> str:
        files = sorted({test.split("::")[0] for test in tests})
        parts = [(self.root / f).read_bytes() for f in files if (self.root / f).exists()]
        return hashlib.sha256(b"\0".join([*parts, text.encode()])).hexdigest()[:16]

    def get(self, mutant: Mutant, tests: list[str], chosen: int) -> str | None:
        """Return a result that still holds: a death whoever brought it, a survival of the chosen.

        Args:
            mutant: Of what.
            tests: All that enter its function.
            chosen: How many of these, the first, would be tried.
        """
        entry = self.known.get(mutant.id)
        if entry is None or not set(entry["tests"]) <= set(tests):
            return None
        if entry["sources"] != self.hash(mutant.text, entry["tests"]):
            return None
        result: str = entry["result"]
        return result if result in DEAD or set(entry["tests"]) >= set(tests[:chosen]) else None

    def put(self, mutant: Mutant, tests: list[str], result: str, why: str) -> None:
        """Keep a result, of the one test that failed or of all that did not."""
        failed = [test for test in tests if f"FAILED {test}" in why]
        if result == "killed" and failed:
            tests, why = failed[:1], why[why.index("FAILED ") :].splitlines()[0][:300]
        sources = self.hash(mutant.text, tests)
        entry = {"result": result, "tests": tests, "sources": sources, "why": why[-300:]}
        with self.lock:
            self.known[mutant.id] = entry
            self.file.parent.mkdir(exist_ok=True)
            self.file.with_suffix(".new").write_text(json.dumps(self.known, indent=1))
            self.file.with_suffix(".new").replace(self.file)


class Tool:
    """Measures what tests reach, and tries mutants, in `jobs` copies of the tree at a time."""

    def __init__(self, root: Path, jobs: int, seconds: float) -> None:
        self.root, self.jobs, self.seconds = root, jobs, seconds
        self.reach = Reach(root, root / "build/reach.json")
        self.results = Results(root, root / "build/mutants.json")

    def measure(self) -> None:
        """Bring what is known of the tests up to date."""
        if missing := self.reach.missing():

            def instrument(folder: Path) -> None:
                for name in mutated(folder):
                    text = (folder / name).read_text()
                    (folder / name).write_text(reach.instrument(name, text))

            self._each("measure tests", missing, lambda t, x: self.reach.measure(t, x), instrument)

    def run(self, mutants: list[Mutant], reasons: dict[str, str]) -> dict[str, str]:
        """Try all, and return the results by id."""
        found: dict[str, str] = {}
        left: list[tuple[Mutant, list[tuple[str, float]]]] = []
        for mutant in mutants:
            tests = self.reach.tests(mutant, self.seconds)
            share = 0.1 if mutant.id in reasons else 1.0
            chosen = _within(tests, share * self.seconds)
            known = self.results.get(mutant, [test for test, _ in tests], len(chosen))
            if known is None and chosen:
                left.append((mutant, chosen))
            else:
                found[mutant.id] = known or "survived"

        def attempt(tree: Tree, one: tuple[Mutant, list[tuple[str, float]]]) -> str:
            mutant, tests = one
            found[mutant.id] = result = self._attempt(tree, mutant, tests)
            return "" if result in DEAD else f"{result}: {mutant.id} (line {mutant.line})"

        if left:
            self._each("mutants", left, attempt)
        return found

    def _attempt(self, tree: Tree, mutant: Mutant, tests: list[tuple[str, float]]) -> str:
        names = [test for test, _ in tests]
        file = tree.folder / mutant.path
        before = file.read_text()
        file.write_text(mutant.text)
        try:
            limit = 90 + 5 * sum(took for _, took in tests)
            code, said = tree.pytest(names, limit)
        finally:
            file.write_text(before)
        result = {0: "survived", 1: "killed", 2: "killed", None: "timeout"}.get(code, "broken")
        self.results.put(mutant, names, result, said)
        return result

    def _each(
        self,
        what: str,
        items: list,
        do: Callable[[Tree, object], str | None],
        prepare: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Do something for each item in a tree that no other uses meanwhile."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        trees: queue.Queue[Tree] = queue.Queue()

        def one(item: object) -> str | None:
            tree = trees.get()
            try:
                return do(tree, item)
            finally:
                trees.put(tree)

        with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Progress(*columns) as bar:
            task = bar.add_task(what, total=len(items))
            made = [Tree(self.root, Path(folder) / str(n)) for n in range(self.jobs)]
            pool = ThreadPoolExecutor(self.jobs)
            try:
                for tree in made:
                    prepare(tree.folder)
                    trees.put(tree)
                for future in as_completed([pool.submit(one, item) for item in items]):
                    if text := future.result():
                        bar.console.print(text)
                    bar.advance(task)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for tree in made:
                    tree.close()


def report(mutants: list[Mutant], found: dict[str, str], reasons: dict[str, str]) -> str:
    """Write the page: score, a line a file, public bugs, survivors."""
    rows = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        rows[mutant.path][found[mutant.id]] += 1
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


def main(words: list[str] | None = None, root: Path = Path(__file__).parents[2]) -> int:
    """Run from the command line; 1 if a mutant survives without a reason."""
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", description="Mutation score of what carries gradients."
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument(
        "--only", action="append", metavar="FILE", help="mutate this file or folder"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants, evenly drawn")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument(
        "--seconds", type=float, default=120, help="of tests a mutant, half of them the nearest"
    )
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
    tool = Tool(root, given.jobs, given.seconds)
    tool.measure()
    reasons = json.loads((root / "tests/mutants/equivalent.json").read_text())
    found = tool.run(mutants, reasons)
    if len(mutants) == whole:
        (root / "docs/mutants.md").write_text(report(mutants, found, reasons))
    count = collections.Counter(found.values())
    print(", ".join(f"{n} {name}" for name, n in sorted(count.items())))
    alive = [i for i, r in found.items() if r not in DEAD and i not in reasons]
    if alive:
        print("these survive without a reason in tests/mutants/equivalent.json:", *alive, sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
