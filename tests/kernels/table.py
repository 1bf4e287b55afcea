"""Make `docs/kernels.md`: which test proves which item of the must-test list for which operator.

    python -m tests.kernels.table > docs/kernels.md

It collects the tests of `tests/kernels` without running them. A test that carries `@item` counts
for the operator of each specimen that it is run on, or for the operators that it names.
"""

import contextlib
import io
import string
import sys
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from warploom.kernels import backends

ITEMS = {
    "values": "against float64 on the same rounded inputs, gradients too",
    "zero and odd sizes": "no rows, one row, widths of 1 and not a multiple of anything",
    "layout": "every input strided, transposed, or at an address that is not aligned",
    "more than 2^31 elements": "64-bit offsets in the compiled code; a huge call on a GPU",
    "NaN and inf": "a poisoned row poisons its row alone",
    "upstream gradients": "random, zero, expanded, strided; a graph used twice; one output alone",
    "determinism": "repeats give the same bits; 100 on a GPU",
    "batch invariance": "a row's result does not depend on the other rows",
    "no_grad, autocast": "both, and the values stay",
    "second derivative": "refused in a sentence, as is forward mode",
    "opcheck": "schema, fake and autograd registration",
    "torch.compile": "fullgraph, dynamic sizes",
    "streams and graphs": "a side stream, a captured graph replayed on other inputs, a second GPU",
    "fits sm_90 and sm_100": "each launch at real sizes: no spill, shared memory, 16-byte accesses",
    "empty experts": "first, middle, last, all; ties; rows that nobody owns",
    "optimizer edge cases": "step on the device, skipped steps, remainder bits, huge tensors",
    "bad input": "one sentence with what was found",
    "import": "without a GPU, a driver or Triton",
}


@dataclass
class Found:
    """Which tests prove an item for an operator, and where they can run."""

    tests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def text(self, letters: dict[str, str]) -> str:
        marks = []
        for test, where in sorted(self.tests.items(), key=lambda line: letters[line[0]]):
            marks.append(letters[test] + ("*" if where == {"gpu"} else ""))
        return " ".join(marks)


class Collector:
    """A pytest plugin that notes the collected tests."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], Found] = defaultdict(Found)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for test in items:
            names = getattr(test.function, "items", ())
            params = getattr(getattr(test, "callspec", None), "params", {})
            ops = test.function.ops if names else ()
            ops = ops or ((params["s"].op,) if "s" in params else ())
            where = "gpu" if test.get_closest_marker("gpu") else "cpu"
            path = test.nodeid.split("[")[0]
            for op in backends.available() if ops == ("every",) else ops:
                for name in names:
                    self.cells[op, name].tests[path].add(where)


def collect() -> dict[tuple[str, str], Found]:
    """Collect the tests; `(operator, item)` to what proves it."""
    collector = Collector()
    words = ["--collect-only", "-n0", "-m", "", "-p", "no:cacheprovider"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main([*words, "tests/kernels"], plugins=[collector])
    if code:
        sys.exit(f"the tests cannot be collected:\n{said.getvalue()}")
    return collector.cells


# Operators and items that mean nothing together, and why.
REASONS = {
    "no gradient": (
        ("adamw", "global_norm", "newton_schulz", "nf4_quantize", "nf4_dequantize", "fp8_gemm")
        + ("paged_attention",),
        ("upstream gradients", "second derivative"),
    ),
    "rows are summed, sorted, or no rows at all": (
        ("cross_entropy", "linear_cross_entropy", "permute", "unpermute", "adamw")
        + ("global_norm", "newton_schulz", "nf4_quantize", "nf4_dequantize"),
        ("batch invariance",),
    ),
    "what it spoils is its whole matrix": (("newton_schulz",), ("NaN and inf",)),
    "a row's bits are those of a product as large as its expert's load": (
        ("grouped_gemm", "moe_block"),
        ("batch invariance",),
    ),
    "a row's bits are those of a product of so many rows": (
        ("nf4_linear", "fp8_gemm", "fp8_linear"),
        ("batch invariance",),
    ),
    "its kernel is that of `nf4_dequantize`": (("nf4_linear",), ("more than 2^31 elements",)),
    "its kernels are those of `fp8_quantize` and `fp8_gemm`": (
        ("fp8_linear",),
        ("more than 2^31 elements",),
    ),
    "its second derivative is right": (("rotary",), ("second derivative",)),
    "a matrix so large has no place in a product": (
        ("newton_schulz",),
        ("more than 2^31 elements",),
    ),
}
ONLY = {
    "empty experts": ("route", "permute", "unpermute", "grouped_gemm", "moe_block"),
    "optimizer edge cases": ("adamw", "global_norm"),
}


def applies(op: str, name: str) -> bool:
    """Tell whether an item means anything for an operator."""
    if name in ONLY:
        return op in ONLY[name]
    return not any(op in ops and name in names for ops, names in REASONS.values())


def empty(cells: dict[tuple[str, str], Found]) -> list[str]:
    """Name the cells that no test proves though they mean something."""
    pairs = [(op, name) for op in operators() for name in ITEMS if applies(op, name)]
    return [f"{op}: {name}" for op, name in pairs if not cells[op, name].tests]


def operators() -> list[str]:
    return [*backends.available()]


def table(cells: dict[tuple[str, str], Found]) -> str:
    """Write the page."""
    tests = sorted({test for found in cells.values() for test in found.tests})
    names = [*string.ascii_lowercase, *(a + b for a in "abcdefgh" for b in string.ascii_lowercase)]
    letters = dict(zip(tests, names, strict=False))
    lines = [
        "# Kernels: what is proven, and by which test",
        "",
        "Made from the tests by `python -m tests.kernels.table > docs/kernels.md`; a test holds it"
        " to them. A letter names a test below; `*` says that it needs a GPU, and has not run"
        " without one. A dash: the item means nothing there.",
        "",
        "| operator | " + " | ".join(ITEMS) + " |",
        "|---" * (len(ITEMS) + 1) + "|",
    ]
    for op in operators():
        row = [cells[op, i].text(letters) if applies(op, i) else "-" for i in ITEMS]
        lines.append(f"| `{op}` | " + " | ".join(row) + " |")
    reasons = "; ".join(
        f"{why} ({', '.join(f'`{op}`' for op in ops)}: {', '.join(names)})"
        for why, (ops, names) in REASONS.items()
    )
    lines += ["", f"Why an item means nothing: {reasons}."]
    lines += ["", "| item | what is meant |", "|---|---|"]
    lines += [f"| {name} | {meant} |" for name, meant in ITEMS.items()]
    lines += ["", "| | test |", "|---|---|"]
    lines += [f"| {letters[test]} | `{test}` |" for test in tests]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(collect()))
