"""Everything a GPU has to say, unattended: proofs, a training step, benchmarks, tests.

    make gpu PYTHON=python3 RESULTS=benchmarks/results/h200

Needs torch with CUDA, triton, numpy and pytest, and nothing to be installed. Rows of work run in
processes of their own (`rows.py`), the most valuable first, so that a crash or a hang of one kernel
loses its row alone; the whole keeps to `--budget` seconds, and each part leaves time to the later
ones. Writes at most eight files, a part's as soon as it is over.

    part     what                                                              file
    csrc     builds csrc/ and runs its own checks                              csrc.json
    prove    every device kernel against float64 and torch, timed              proofs.json
             what passed, for the dispatcher (kernels/proven.json, a copy)     proven.json
    train    8 layers of Llama-3-8B, embedding and head, 8,192 tokens          training.json
    bench    every operator beside its peers and the roof, two cases a suite   kernels.json
             the same as a picture, where matplotlib is there                  kernels.png
    tests    pytest -m gpu                                                     tests.json
    suites   every case of the suites, in a run of its own (--parts suites)    suites.json
    all      one page                                                          summary.md, suites.md

Backends that were the fastest in a suite's case are those that the dispatcher takes there
(`kernels/fastest.json`).

measured on an H200: nothing yet
"""

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from warploom.benchmarks import fastest, proofs, rows
from warploom.benchmarks.kernels import command as bench
from warploom.benchmarks.kernels import measure, report
from warploom.benchmarks.kernels.cases import Case, Scale
from warploom.benchmarks.kernels.operators import OPERATORS
from warploom.benchmarks.kernels.products import SUITES

_ROOT = Path(__file__).resolve().parents[1]
_H100_BF16 = 989e12  # dense bfloat16 peak of H100 and H200, FLOP/s (datasheet)
_MOE = ("route", "permute", "unpermute")
_OF_A_SUITE = 2  # cases in the part `bench`


class Part:
    """A part's share of the time.

    Attributes:
        most: Seconds it may take.
        keep: Seconds of it that the parts before leave.
    """

    def __init__(self, most: float, keep: float) -> None:
        self.most, self.keep = most, keep


_PARTS = {
    "csrc": Part(90, 30),
    "prove": Part(230, 120),
    "train": Part(120, 60),
    "bench": Part(200, 70),
    "tests": Part(200, 60),
    "suites": Part(540, 120),
}
_USUAL = ",".join(name for name in _PARTS if name != "suites")


def train(device: torch.device, *, steps: int = 30, small: bool = False) -> dict[str, Any]:
    """Time whole steps (forward, backward, clip, AdamW) of a slice of Llama-3-8B on one device.

    Args:
        device: Where.
        steps: Timed steps, after 3 others.
        small: Whether to take a tiny model, to try the harness.
    """
    from warploom.models import cost
    from warploom.models.batch import Batch
    from warploom.models.decoder import Decoder
    from warploom.models.families import llama
    from warploom.parallel.mesh import Mesh
    from warploom.parallel.optimizer import AdamW
    from warploom.parallel.step import Step

    sizes = llama.tiny() if small else replace(llama.llama3_8b(), layers=8)
    length = min(sizes.max_positions, 64) if small else 8192
    mesh = Mesh.build()
    model = Decoder.create(sizes, seed=0, dtype=torch.bfloat16, device=device)
    layouts = model.layouts()
    step = Step(model, layouts, AdamW(dict(model.named_parameters()), layouts, mesh), mesh)
    seconds, losses = [], []
    for number in range(steps + 3):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, sizes.vocabulary, (1, length + 1), generator=generator).to(device)
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], document_lengths=None)
        start = time.perf_counter()
        losses.append(step([batch], learning_rate=1e-4).losses["language_model"])
        seconds.append(time.perf_counter() - start)  # the step reads the loss: it has ended
    middle = statistics.median(seconds[3:])
    flops = cost.flops_per_token(sizes, length).training
    found = {
        "step_time_s": middle,
        "step_time_min_s": min(seconds[3:]),
        "step_time_max_s": max(seconds[3:]),
        "tokens_per_s": length / middle,
        "flops_per_token": flops,
        "tflops_per_s": flops * length / middle / 1e12,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "layers": sizes.layers,
        "sequence": length,
    }
    if device.type == "cuda":
        found["mfu"] = flops * length / middle / _H100_BF16
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


class Session:
    """One run of `make gpu`: what was asked for, where it goes, and until when."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.results = asked, asked.results
        self.device = torch.device(asked.device)
        self.end: float = time.monotonic() + asked.budget
        self.parts = [name for name in asked.parts.split(",") if name]
        self.summary: list[str] = []

    def deadline(self, part: str) -> float:
        """Return when a part must end: its own share, less what the later ones keep."""
        later = self.parts[self.parts.index(part) + 1 :] if part in self.parts else []
        limit = min(time.monotonic() + _PARTS[part].most, self.end)
        keep: float = sum(_PARTS[name].keep for name in later)
        return min(limit, self.end - keep)

    def do(self, work: str, names: Sequence[str], until: float, **rest: Any) -> dict[str, Any]:
        """Have rows of a kind of work done."""
        words = ["--device", self.asked.device, "--steps", str(self.asked.steps)]
        words += ["--small"] * self.asked.small
        command = [sys.executable, __file__, *words, "--work", work]
        return rows.run(command, names, deadline=until, said=self.say, **rest)

    def say(self, name: str, row: rows.Row) -> None:
        """Print how a row ended."""
        print(f"  {name}: {row.get('failed', 'done')}"[:160], flush=True)

    def write(self, name: str, found: dict[str, Any]) -> None:
        """Write a file of the results."""
        report.write(self.results / name, report.about(self.device) | found)

    def csrc(self, until: float) -> int:
        """Build the compiled library in place, then run its stand-alone runner, if it is there."""
        found: dict[str, Any] = {}
        if not (tool := shutil.which("nvcc")):
            found["left_out"] = "nvcc is not on the PATH"
        elif importlib.util.find_spec("pybind11") is None:
            found["left_out"] = "pybind11 is not installed"
        else:
            found["nvcc"] = tool
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            for name, words in (("build", build), ("run", [str(_ROOT / "csrc" / "run")])):
                if name == "run" and not Path(words[0]).exists():
                    found[name] = {"left_out": "there is no csrc/run"}
                    continue
                found[name] = _run(words, until)
        failed = [k for k, v in found.items() if isinstance(v, dict) and v.get("exit_code")]
        self.summary.append(f"csrc: {found.get('left_out') or ('failed: ' if failed else 'done')}")
        self.summary[-1] += ", ".join(failed)
        self.write("csrc.json", found)
        return len(failed)

    def prove(self, until: float) -> int:
        """Prove every kernel, and write down what passed."""
        cuda = self.device.type == "cuda"
        names = proofs.rows(("triton", "cuda") if cuda else ("reference",), self.asked.only)
        jobs = max(min((os.cpu_count() or 2) - 4, 12), 1)
        half = time.monotonic() + 0.65 * (until - time.monotonic())
        checked = self.do("check", names, half, row_s=90, jobs=jobs)
        passed = [name for name in names if "failed" not in checked[name]]
        timed = self.do("training", passed, until, row_s=60)
        verdicts = proofs.verdicts(checked, timed)
        lines = []
        for (op, backend), verdict in verdicts.items():
            if verdict["failed"]:
                lines.append(f"- {op} {backend}: **{len(verdict['failed'])} rows failed**")
                lines += [f"    - {row}: {why[:200]}" for row, why in verdict["failed"].items()]
                continue
            lines.append(f"- {op} {backend}: proven, error {verdict['error']:.2f} of plain torch's")
            if cuda:
                error, ms = verdict["error"], verdict["time_ms"]
                device = torch.device("cuda", 0)
                proofs.record_proof(op, device=device, error=error, time_ms=ms, backend=backend)
        named = {f"{op} {backend}": v for (op, backend), v in verdicts.items()}
        self.write("proofs.json", {"verdicts": named, "checked": checked, "training": timed})
        shutil.copy(_ROOT / "kernels" / "proven.json", self.results / "proven.json")
        self.summary += ["", "## Proofs", "", *lines]
        return sum(bool(v["failed"]) for v in verdicts.values())

    def train(self, until: float) -> int:
        """Time a training step."""
        row = self.do("train", ["train"], until, row_s=_PARTS["train"].most)["train"]
        self.write("training.json", row)
        words = row.get("failed") or (
            f"step {row['step_time_s'] * 1e3:.1f} ms, {row['tokens_per_s']:.0f} tokens/s, "
            + (f"MFU {row['mfu']:.1%}" if "mfu" in row else "no peak to compare with")
        )
        self.summary += ["", "## Training step", "", words]
        return int("failed" in row)

    def bench(self, until: float) -> int:
        """Time every operator beside its peers, and two cases of each suite."""
        return self._time("kernels", _bench_rows(self.asked), until)

    def suites(self, until: float) -> int:
        """Time every case of the suites."""
        return self._time("suites", [name for name, _ in _suite_rows(self.asked)], until)

    def _time(self, title: str, names: Sequence[str], until: float) -> int:
        """Time rows; compile all of them before, several at a time."""
        jobs = max(min((os.cpu_count() or 2) - 4, 12), 1)
        begin = time.monotonic()
        self.do("warm", names, begin + 0.4 * (until - begin), row_s=60, jobs=jobs)
        host = ["host"] if any("@" in name for name in names) else []
        done = self.do("bench", [*names, *host], until, row_s=45)
        result = report.about(self.device) | {"ceilings": {}, "rows": [], "overhead": []}
        for name, row in done.items():
            if "failed" in row:
                result["rows"].append({"op": name, "variant": "", "size": "", **row})
                result["rows"][-1]["contender"] = "all"
                continue
            result["ceilings"] = result["ceilings"] or row["ceilings"]
            result["rows"] += row["rows"]
            result["overhead"] += row["overhead"]
        if self.device.type == "cuda":
            capability = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
            result["fastest"] = fastest.table(result["rows"], capability, torch.bfloat16)
            fastest.merge(result["fastest"])
        report.write(self.results / f"{title}.json", result)
        if importlib.util.find_spec("matplotlib") and result["ceilings"]:
            report.plot(self.results / f"{title}.png", result)
        self.summary += ["", f"## {title}, forward and backward", "", *_bench_lines(result)]
        return sum("failed" in row for row in done.values())

    def tests(self, until: float) -> int:
        """Run the tests that need a GPU; what has ended is known even if the rest hangs."""
        words = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
        words += ["-n", "8"] if importlib.util.find_spec("xdist") else []
        words += ["--timeout", "90"] if importlib.util.find_spec("pytest_timeout") else []
        done = _run([*words, *(self.asked.tests or ["tests"])], until, keep=200_000)
        outcomes: dict[str, str] = {}
        for line in done["output"].splitlines():
            if match := re.search(r"(tests/\S+::.+?)\s+(PASSED|FAILED|ERROR|SKIPPED|X\w+)", line):
                outcomes[match[1]] = match[2]
            elif match := re.search(r"(PASSED|FAILED|ERROR|SKIPPED|X\w+)\s+(tests/\S+::\S+)", line):
                outcomes[match[2]] = match[1]
        counts = {kind: list(outcomes.values()).count(kind) for kind in {*outcomes.values()}}
        failing = [name for name, kind in outcomes.items() if kind in ("FAILED", "ERROR")]
        last = done["output"].splitlines()[-60:]
        found = {"exit_code": done["exit_code"], "counts": counts, "failing": failing}
        self.write("tests.json", {**found, "last_lines": last})
        said = ", ".join(f"{n} {kind.lower()}" for kind, n in sorted(counts.items()))
        self.summary += [
            "",
            "## Tests that need a GPU",
            "",
            f"exit code {done['exit_code']}: {said}",
        ]
        self.summary += [f"- {name}" for name in failing[:40]]
        return int(done["exit_code"] != 0)


def _run(words: Sequence[str], until: float, keep: int = 4000) -> dict[str, Any]:
    """Run a program to its end, or to the deadline; return its exit code and its last output."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{_ROOT / 'src'}{os.pathsep}{_ROOT}"}
    program = subprocess.Popen(
        words,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        output = program.communicate(timeout=max(until - start, 1.0))[0]
    except subprocess.TimeoutExpired:
        rows.end(program)
        output = program.communicate()[0] + "\nended: the time is used up"
    seconds = time.monotonic() - start
    return {"exit_code": program.returncode, "seconds": seconds, "output": output[-keep:]}


def _bench_words(asked: argparse.Namespace, op: str = "", shapes: str = "") -> argparse.Namespace:
    words = ["--device", asked.device, *(["--op", op] if op else [])]
    if asked.small:
        words += ["--shapes", "tiny", "--quick", "--peers", "eager"]
    elif shapes:
        words += ["--shapes", shapes]
    return bench.arguments(words)


def _bench_rows(asked: argparse.Namespace) -> list[str]:
    """Name the rows: each operator in one model, two of each suite, then in the others."""
    ops = [op for op in OPERATORS if not asked.only or op in asked.only]
    first = [f"{op}@{'qwen3-30b-a3b' if op in _MOE else 'llama3-8b'}" for op in ops]
    suites = [name for name, _ in _suite_rows(asked) if int(name.rpartition("/")[2]) < _OF_A_SUITE]
    return (
        [*first, *suites]
        if asked.small
        else [*first, *suites, *(f"{op}@deepseek-v3" for op in ops)]
    )


def _suite_rows(asked: argparse.Namespace) -> list[tuple[str, Case]]:
    """Name a row for each case of the suites: the first of each suite first, and so on."""
    scale: Scale = "tiny" if asked.device == "cpu" else "cuda"
    ranked = [
        (number, f"suite/{suite}/{number}", case)
        for suite in SUITES
        for number, case in enumerate(SUITES[suite](scale, 4 if scale == "tiny" else 2))
        if not asked.only or case.op in asked.only
    ]
    return [(name, case) for _, name, case in sorted(ranked, key=lambda row: row[0])]


def _bench_row(name: str, asked: argparse.Namespace, *, warm: bool) -> dict[str, Any]:
    if name == "host":
        words = _bench_words(asked, ",".join(op for op in asked.only if op in OPERATORS))
        plan = bench.plan_of(words)
        return {
            "ceilings": {},
            "rows": [],
            "overhead": bench.overhead(bench.cases_of(words, plan), plan),
        }
    suite = name.startswith("suite/")
    words = _bench_words(asked, *([] if suite else name.split("@")))
    words.suite = name.split("/")[1] if suite else None
    plan = bench.plan_of(words)
    if warm:
        plan = replace(plan, rounds=1, repeats=1)
    cases = [dict(_suite_rows(asked))[name]] if suite else bench.cases_of(words, plan)
    result = bench.run(cases, plan, overhead_too=False)
    return {key: result[key] for key in ("ceilings", "rows", "overhead")}


def _bench_lines(result: dict[str, Any]) -> list[str]:
    """Lay out the whole steps of our backends: time, share of the roof, ratio to each peer."""
    lines = [report.ceilings_line(result["ceilings"]), ""] if result["ceilings"] else []
    for row in result["rows"]:
        who = f"- {row['op']} {row['variant']} {row['size']} {row['contender']}".replace("  ", " ")
        if "failed" in row:
            lines.append(f"{who}: {row['failed'][:200]}")
        elif row["contender"] in measure.OURS:
            ratios = [f"{r:.2f}x {peer}" for peer, r in row["times_as_fast_as"].items()]
            share = f"{row['ms']['median']:.3f} ms, {row['roof_share']:.0%} of the roof"
            lines.append(f"{who} {row['pass']}: {share}, {', '.join(ratios)}")
    return lines


def _work(asked: argparse.Namespace) -> None:
    """Do rows, as a worker of `rows.run`."""
    device = torch.device(asked.device)
    works: dict[str, Callable[[str], rows.Row]] = {
        "check": lambda name: proofs.check(name, device),
        "training": lambda name: proofs.training(name, device, small=asked.small),
        "train": lambda name: train(device, steps=asked.steps, small=asked.small),
        "warm": lambda name: _bench_row(name, asked, warm=True),
        "bench": lambda name: _bench_row(name, asked, warm=False),
    }
    file, *names = asked.names
    rows.serve(works[asked.work], names, Path(file))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks/results/h200")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all parts")
    parser.add_argument("--parts", default=_USUAL, help="in this order; also suites")
    parser.add_argument("--only", default="", help="operators, names with commas between them")
    parser.add_argument("--tests", nargs="*", help="other words for pytest than the folder tests")
    parser.add_argument("--steps", type=int, default=30, help="timed training steps")
    parser.add_argument("--device", default="cuda", help="cpu, with --small, to try the harness")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the harness")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if unknown := [name for name in asked.parts.split(",") if name not in _PARTS]:
        parser.error(f"--parts must be among {', '.join(_PARTS)}, got {unknown[0]!r}")
    asked.only = [name for name in asked.only.split(",") if name]
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 if all of them ended well, 2 without a CUDA device."""
    asked = arguments(argv)
    sys.path.insert(0, str(_ROOT))  # the specimens of the tests
    if asked.work:
        _work(asked)
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    asked.results = asked.results.resolve()
    asked.results.mkdir(parents=True, exist_ok=True)
    session, failed = Session(asked), 0
    page = "suites.md" if session.parts == ["suites"] else "summary.md"
    for part in session.parts:
        until = session.deadline(part)
        left = until - time.monotonic()
        if left < 5:
            session.summary.append(f"{part}: left out, the budget of {asked.budget} s is used up")
            failed += 1
            continue
        print(f"--- {part} (at most {left:.0f} s)", flush=True)
        try:
            wrong = getattr(session, part)(until)
        except Exception as error:  # a part's failure is that part's
            session.summary.append(f"{part}: {type(error).__name__}: {error}")
            wrong = 1
        print(f"--- {part}: {f'{wrong} failed' if wrong else 'done'}", flush=True)
        failed += wrong
        text = "\n".join([f"# make gpu, {report.about(session.device)}", "", *session.summary])
        (asked.results / page).write_text(text + "\n")
    print("\n".join(session.summary))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
