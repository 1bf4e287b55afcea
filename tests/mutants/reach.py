"""Which test enters which function: a mutant is tried with those that can see it.

In a copy of the tree every function of the mutated files says that it was entered (`instrument`),
in whatever process; pytest, with this module as a plugin, says which test runs and how long it
takes. Both write below the folder that `WARPLOOM_REACH` names; without it nothing is written.
"""

import ast
import collections
import os
from pathlib import Path

from .sites import functions

VARIABLE = "WARPLOOM_REACH"
MARK = '__import__("tests.mutants.reach").mutants.reach.mark'


def instrument(path: str, text: str) -> str:
    """Return the source of `path` with a mark at the head of each function."""
    lines = text.splitlines(keepends=True)
    heads = []
    for place, node in functions(text):
        documented = ast.get_docstring(node, clean=False) is not None
        if not (body := node.body[documented:]):
            continue
        line = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
        if not lines[line - 1][: body[0].col_offset].strip():
            indent = " " * body[0].col_offset
            heads.append((line, f'{indent}{MARK}("{path}:{place}")\n'))
    for line, mark in sorted(heads, reverse=True):
        lines.insert(line - 1, mark)
    return "".join(lines)


def mark(function: str, seen=set()) -> None:  # noqa: B006  each process writes a pair once
    """Note that the test that runs has entered a function."""
    folder = os.environ.get(VARIABLE)
    if folder is None or not (now := Path(folder, "now")).exists():
        return
    test = now.read_text()
    if (test, function) not in seen:
        seen.add((test, function))
        with Path(folder, f"{os.getpid()}.entered").open("a") as file:
            file.write(f"{test}\t{function}\n")


def pytest_runtest_logstart(nodeid, location):
    if folder := os.environ.get(VARIABLE):
        Path(folder, "new").write_text(nodeid)
        Path(folder, "new").replace(Path(folder, "now"))


def pytest_runtest_logreport(report):
    if folder := os.environ.get(VARIABLE):
        with Path(folder, "times").open("a") as file:
            file.write(f"{report.nodeid}\t{report.duration}\t{report.outcome}\n")


def collect(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """Return what was written, and which tests failed.

    By test that passed, its seconds and the functions it entered; a skipped one is in neither.
    """
    times = collections.defaultdict(float)
    ended = collections.defaultdict(set)
    file = folder / "times"
    for line in file.read_text().splitlines() if file.exists() else ():
        test, seconds, outcome = line.split("\t")
        times[test] += float(seconds)
        ended[test].add(outcome)
    entered = collections.defaultdict(set)
    for file in folder.glob("*.entered"):
        for line in file.read_text().splitlines():
            test, function = line.split("\t")
            entered[test].add(function)
    found = {
        test: {"seconds": seconds, "entered": sorted(entered[test])}
        for test, seconds in times.items()
        if ended[test] == {"passed"}
    }
    return found, sorted(test for test in times if "failed" in ended[test])
