"""`warploom bench kernels` on the CPU: what is measured, how it is counted, what is refused."""

import dataclasses
import json
import re
import time

import pytest
import torch

from warploom import cli
from warploom.benchmarks.kernels import command, measure, report, search
from warploom.benchmarks.kernels.cases import MODELS, Case, Draw, Work
from warploom.benchmarks.kernels.operators import OPERATORS
from warploom.benchmarks.kernels.products import SUITES
from warploom.kernels import backends, tuning

CPU = torch.device("cpu")
PLAN = measure.Plan(
    device=CPU, dtype=torch.float32, ours=("reference",), peers=("eager",), rounds=3, repeats=2
)
FOUND = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12}
CASES = [case for build in OPERATORS.values() for case in build(MODELS["tiny"], 32, 4)]


def _words(tmp_path, *more):
    quick = ["--device", "cpu", "--shapes", "tiny", "--quick"]
    return ["bench", "kernels", *quick, "--json", str(tmp_path / "k.json"), *more]


def test_the_command_measures_and_writes(tmp_path, capsys):
    words = _words(tmp_path, "--op", "swiglu,route", "--peers", "eager", "--tokens", "16")
    assert cli.main([*words, "--plot", str(tmp_path / "roof.png")]) == 0
    out = capsys.readouterr().out
    for part in ("ceilings measured in this run: copy", "swiglu", "x eager", "the host's time"):
        assert part in out
    threads = torch.get_num_threads()
    assert f"in float32, on {threads} {'thread' if threads == 1 else 'threads'}" in out
    for column in ("of roof: ", "x eager: ", "over a launch: ", "and backward us: "):
        assert out.count(column) == 1, column
    result = json.loads((tmp_path / "k.json").read_text())
    assert {row["op"] for row in result["rows"]} == {"swiglu", "route"}
    assert {row["contender"] for row in result["rows"]} == {"reference", "eager"}
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "both"}
    assert {"date", "torch", "device", "ceilings", "method", "overhead"} <= set(result)
    assert (result["dtype"], result["threads"]) == ("float32", threads)
    row = result["rows"][0]
    assert row["ms"]["min"] <= row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["max"]
    assert row["samples"] >= 3
    assert row["difference"] < 1e-5
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_compiled_peer_is_measured(tmp_path):
    assert cli.main(_words(tmp_path, "--op", "relu2", "--peers", "eager,compile")) == 0
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert "compile" in {row["contender"] for row in rows if "failed" not in row}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--op", "swiglo"], "--op must be among .*got 'swiglo': did you mean swiglu"),
        (["--shapes", "llama3-8b,gpt"], "--shapes must be among llama3-8b.*got 'gpt'"),
        (["--peers", "eager,apex2"], "--peers must be among eager, compile.*got 'apex2'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--dtype", "int8"], "--dtype must be among bf16, fp16, fp32, got 'int8'"),
        (
            ["--backends", "hip"],
            "--backends must be among reference, triton, cuda, torch, cudnn, got 'hip'",
        ),
        (["--rounds", "2"], "--rounds must be at least 3 for a spread, got 2"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--op", "route", "--shapes", "llama3-8b"], "route needs a model with experts"),
    ],
)
def test_what_is_not_there_is_one_sentence(capsys, words, sentence):
    assert cli.main(["bench", "kernels", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(sentence, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_a_gpu_that_is_not_there(capsys):
    for words in (["--device", "cuda"], ["--backends", "triton"]):
        assert cli.main(["bench", "kernels", *words]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["liger", "te", "apex", "bitsandbytes"])
def test_a_peer_that_was_named_and_is_not_installed(capsys, monkeypatch, peer):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "run", None)  # before anything is measured
    assert cli.main(["bench", "kernels", "--device", "cpu", "--peers", f"eager,{peer}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"warploom: --peers {peer} needs the package "), error
    assert error.count("\n") == 1


@pytest.mark.parametrize("peer", ["liger", "te", "apex"])
def test_a_peer_that_was_named_and_needs_a_gpu(capsys, monkeypatch, peer):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "run", None)
    words = ["--device", "cpu", "--op", "rms_norm", "--peers", f"eager,{peer}"]
    assert cli.main(["bench", "kernels", *words]) == 2
    error = capsys.readouterr().err
    assert error == f"warploom: --peers {peer} needs a CUDA device, here is cpu; or leave it out\n"


def test_a_peer_that_was_named_and_has_none_of_the_operators(capsys, monkeypatch):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "run", None)
    words = ["--device", "cpu", "--op", "rms_norm,relu2", "--peers", "eager,bitsandbytes"]
    assert cli.main(["bench", "kernels", *words]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "warploom: --peers bitsandbytes has none of the operators asked for: rms_norm, relu2\n"
    )
    words = ["--device", "cpu", "--suite", "moe_layer,grouped", "--peers", "bitsandbytes"]
    assert cli.main(["bench", "kernels", *words]) == 2
    assert "bitsandbytes has none of the operators asked for: moe_block" in capsys.readouterr().err


def test_a_backend_that_was_named_and_has_none_of_the_operators(capsys, monkeypatch):
    monkeypatch.setattr(command, "run", None)
    words = ["--device", "cpu", "--op", "rms_norm", "--backends", "reference,torch"]
    assert cli.main(["bench", "kernels", *words]) == 2
    error = capsys.readouterr().err
    assert error == "warploom: --backends torch has none of the operators asked for: rms_norm\n"


def test_a_library_that_cannot_run_here_is_left_out_unless_named():
    plan = command.plan_of(command.arguments(["--device", "cpu"]))
    assert set(plan.peers) <= {"eager", "compile", "bitsandbytes"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_library_serves_on_a_gpu(monkeypatch, device):
    """It was asked for among our own backends, and so never measured."""
    plan = dataclasses.replace(PLAN, peers=("eager", "liger", "te"), device=torch.device(device))
    monkeypatch.setattr(measure.peers.importlib.util, "find_spec", lambda name: name)
    served = {case.name: set(measure.contenders(case, plan)) for case in CASES}
    assert served["rms_norm"] == {"reference", "eager"} | (
        {"liger", "te"} if device == "cuda" else set()
    )
    assert "te" not in served["swiglu"]


def test_a_search_needs_a_gpu_and_our_kernels(capsys, monkeypatch):
    monkeypatch.setattr(command, "run", None)
    assert cli.main(["bench", "kernels", "--tune", "--device", "cpu"]) == 2
    assert "--tune needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(command, "_device", lambda asked: torch.device("cuda", 0))
    assert cli.main(["bench", "kernels", "--tune", "--backends", "reference"]) == 2
    assert "--backends is reference" in capsys.readouterr().err


def test_a_table_on_a_terminal_prints_brackets_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    report.show("t", ["size"], [["x must be [T, D], got [bold]"]])
    assert "x must be [T, D], got [bold]" in capsys.readouterr().out


def test_the_help_says_what_the_columns_are(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for column in ("of roof: ", "x eager: ", "over a launch: ", "and backward us: "):
        assert column in out


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert cli.main(_words(tmp_path, "--op", "relu2", "--plot", "x.png")) == 2
    assert "pip install 'warploom[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.size}")
def test_ours_and_eager_compute_the_same(case):
    """A figure counts only for the same work: values, and the gradients of all inputs."""
    found = {}
    for name, run in measure.contenders(case, PLAN).items():
        draw = Draw(torch.float32, CPU)
        runner = measure.Runner(case, run, case.draw(draw), draw)
        gradients = runner.prepare("both")() if case.backward else ()
        first = () if runner.first is None else (runner.first.double(),)
        found[name] = [*first, *gradients]
        if case.op == "adamw":  # in place
            found[name] = runner.fixed["columns"][0]
    for a, b in zip(found["reference"], found["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert case.op in backends.available()


def test_every_operator_has_cases():
    """Those of the matrix units in their suites."""
    suites = {case.op for build in SUITES.values() for case in build("tiny", 4)}
    there = {op for op, row in backends.available().items() if {"triton", "cuda"} & set(row)}
    assert sorted(there - suites - set(OPERATORS)) == []


def _case(forward, eager, **rest):
    return Case(
        op="swiglu",
        size="4",
        draw=lambda d: ((d(4),), {}),
        ours=lambda x, backend: forward(x),
        eager=eager,
        forward=Work(4e6, 8e6),
        backward=None,
        **rest,
    )


def test_turns_rotate_and_ratios_are_of_medians():
    order = []

    def slow(x):
        order.append("ours")
        time.sleep(0.004)
        return x

    def fast(x):
        order.append("eager")
        time.sleep(0.002)
        return x

    rows = measure.measure(_case(slow, fast), PLAN, FOUND)
    ours = next(row for row in rows if row["contender"] == "reference")
    assert ours["times_as_fast_as"]["eager"] == pytest.approx(0.5, rel=0.3)
    assert ours["gb_per_s"] == pytest.approx(4e6 / ours["ms"]["median"] * 1e-6)
    assert ours["roof_share"] == pytest.approx(4.0 / ours["ms"]["median"])  # 4 MB at 1 GB/s
    begins = [who for who, before in zip(order, [None, *order], strict=False) if who != before]
    assert begins == ["ours", "eager", "ours", "eager", "ours", "eager"][: len(begins)]
    assert len(begins) >= 4, "who began the first round does not begin the second"


def test_one_contender_that_fails_is_a_row():
    def broken(x):
        raise RuntimeError("no such kernel\nand more")

    rows = measure.measure(_case(broken, lambda x: x), PLAN, FOUND)
    failed = next(row for row in rows if row["contender"] == "reference")
    assert failed["failed"] == "RuntimeError: no such kernel"
    assert any(row["contender"] == "eager" and "ms" in row for row in rows)
    assert command.judge(rows) == 1


def test_what_computes_something_else_is_told(capsys):
    rows = measure.measure(_case(lambda x: 2 * x, lambda x: x), PLAN, FOUND)
    assert command.judge(rows) == 1
    assert "differs from eager PyTorch by 1.0" in capsys.readouterr().err


def test_each_backward_has_a_forward_of_its_own_that_is_not_timed():
    calls = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return 2 * g

    case = Case(
        op="swiglu",
        size="4",
        draw=lambda d: ((d(4),), {}),
        ours=lambda x, backend: Twice.apply(x),
        eager=lambda x: 2 * x,
        forward=Work(1, 1),
        backward=Work(1, 1),
    )
    draw = Draw(torch.float32, CPU)
    runner = measure.Runner(case, case.ours and (lambda x: Twice.apply(x)), case.draw(draw), draw)
    calls.clear()
    call = runner.prepare("backward")
    assert calls == ["forward"]
    call()
    assert calls == ["forward", "backward"]
    runner.prepare("both")()
    assert calls == ["forward", "backward"] * 2


def test_a_product_is_held_to_the_ceiling_of_products():
    assert measure.roof_ms(Work(1e6, 1e9), FOUND) == pytest.approx(1.0)
    assert measure.roof_ms(Work(1e6, 1e10, products=True), FOUND) == pytest.approx(10.0)


def test_tune_searches_while_it_measures(monkeypatch, tmp_path):
    seen = []

    def run(cases, plan):
        seen.append((tuning._STATE.search is not None, tuning._STATE.files[0]))
        return {"ceilings": FOUND, "rows": [], "overhead": []}

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "plan_of", lambda asked: PLAN)  # of a GPU
    monkeypatch.setattr(search, "user_file", lambda: tmp_path / "tuned.json")
    assert cli.main(["bench", "kernels", "--tune", "--device", "cpu"]) == 0
    assert seen == [(True, tmp_path / "tuned.json")]
    assert tuning._STATE.search is None
