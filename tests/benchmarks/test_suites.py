"""The suites of the matrix units, and the dispatcher's table that is made of their rows."""

import contextlib
import json

import pytest
import torch

from warploom import cli
from warploom.benchmarks import fastest
from warploom.benchmarks.kernels import attention, command, measure
from warploom.benchmarks.kernels.cases import Draw
from warploom.benchmarks.kernels.products import SUITES
from warploom.kernels import backends
from warploom.kernels.attention import Scores, flash
from warploom.kernels.gemm import fp8, grouped
from warploom.kernels.moe import block

CPU = torch.device("cpu")
PLAN = measure.Plan(
    device=CPU,
    dtype=torch.float32,
    ours=("reference", "torch"),
    peers=("eager",),
    rounds=3,
    repeats=1,
)
CASES = [case for build in SUITES.values() for case in build("tiny", 4)]
LARGE = [case for build in SUITES.values() for case in build("cuda", 2)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.size}".replace(" ", "_"))
def test_ours_and_eager_compute_the_same(case):
    """Values, and the gradients of all inputs; FP8 to its rounding."""
    near = 0.06 if case.op.startswith("fp8") else 2e-5
    found, lack = {}, {}
    for name, run in measure.contenders(case, PLAN).items():
        draw = Draw(torch.float32, CPU)
        try:
            runner = measure.Runner(case, run, case.draw(draw), draw)
        except RuntimeError as error:
            lack[name] = measure._failed(name, error)
            continue
        gradients = runner.prepare("both")() if case.backward else ()
        found[name] = [runner.first, *gradients]
    assert {"reference", "eager"} <= set(found)
    assert all(row["refused"] for row in lack.values())
    for name, line in found.items():
        for a, b in zip(line, found["eager"], strict=True):
            assert float((a - b).norm()) <= near * float(b.norm()), name


def test_flops_are_those_of_the_pairs_that_are_seen():
    full, causal = (attention._dense((4, 2, 64, 32), 128, c, 2) for c in (False, True))
    assert full.forward.flops == 2 * 4 * 128 * 128 * (64 + 32)
    assert causal.forward.flops == full.forward.flops * 129 / 256
    assert causal.backward.flops == causal.forward.flops * (3 * 64 + 2 * 32) / (64 + 32)
    packed = attention._varlen((4, 2, 64, 32), 1024, 128, 2)
    lengths = attention.documents(1024, 128)
    assert sum(lengths) == 1024
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    assert packed.forward.flops == 2 * 4 * pairs * (64 + 32)
    assert Scores(scale=1.0, right=0).pairs(64, 64) == 64 * 65 // 2


def test_the_sizes_are_those_of_real_models():
    sizes = {case.op: set() for case in LARGE}
    for case in LARGE:
        sizes[case.op].add(case.size)
    assert {"32768x(32/8)x128/128", "32768x(16/16)x192/128"} <= sizes["flash_attention"]
    assert any(size.startswith("32768 in") for size in sizes["flash_attention_varlen"])
    assert {"4096x7168x16384", "8192x57344x8192"} <= sizes["fp8_linear"]
    assert "mixtral 8192x28672x4096, 8 experts" in sizes["grouped_gemm"]
    assert len(sizes["moe_block"]) == 3
    assert len({(c.op, c.variant, c.size) for c in LARGE}) == len(LARGE)


def test_documents_take_memory_as_the_tokens_do():
    """Sixteen times the pairs, four times the memory; a mask has all pairs."""
    most = {}
    for tokens in (512, 2048):
        case = attention._varlen((4, 2, 64, 64), tokens, 256, 4)
        for name, run in measure.contenders(case, PLAN).items():
            draw = Draw(torch.float32, CPU)
            runner = measure.Runner(case, run, case.draw(draw), draw)
            most[name, tokens] = measure.peak_bytes(runner.prepare("both"), CPU)
    assert most["torch", 2048] < 5 * most["torch", 512]
    assert most["eager", 2048] > 6 * most["eager", 512]
    assert most["torch", 2048] < most["eager", 2048] / 2


def test_the_command_runs_a_suite(tmp_path, capsys):
    words = ["--suite", "moe_layer,grouped", "--device", "cpu", "--quick", "--peers", "eager"]
    file = tmp_path / "s.json"
    assert cli.main(["bench", "kernels", *words, "--op", "moe_block", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "peak MiB" in out
    assert "the host's time" not in out
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == {"moe_block"}
    assert all(row["peak_mib"] > 0 for row in rows if row.get("pass") == "both")
    assert {row["key"] for row in rows} == {"experts=8,hidden=48,rows=256,width=64"}


def test_a_suite_that_is_not_there(capsys):
    assert cli.main(["bench", "kernels", "--suite", "atention", "--device", "cpu"]) == 2
    assert "--suite must be among attention, paged, fp8" in capsys.readouterr().err


def test_on_a_gpu_the_table_may_hold_cudnn_and_no_peer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_capability", lambda device: "9.0")
    allowed = [fastest._may_choose("flash_attention", b, "9.0") for b in ("cudnn", "torch", "flex")]
    assert allowed == [True, True, False]


def test_an_operator_of_a_suite_names_it(capsys):
    assert cli.main(["bench", "kernels", "--op", "relu2,fp8_gemm", "--device", "cpu"]) == 2
    assert "--op fp8_gemm is timed in a suite: add --suite fp8\n" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--tokens", "128"], ["--shapes", "tiny"]])
def test_sizes_beside_a_suite_would_do_nothing(words, capsys):
    assert cli.main(["bench", "kernels", "--suite", "nf4", "--device", "cpu", *words]) == 2
    assert f"{words[0]} does not go with --suite, whose sizes are" in capsys.readouterr().err


def test_what_refuses_is_no_failure_of_ours():
    refused = measure._failed("torch", RuntimeError("op: backend 'torch' needs bfloat16"))
    broken = measure._failed("torch", RuntimeError("CUDA error"))
    assert refused["refused"]
    assert "refused" not in broken
    shared = {"op": "o", "variant": "", "size": "", "contender": "torch"}
    assert command.judge([{**shared, **refused}]) == 0
    assert command.judge([{**shared, **broken}]) == 1


def _row(backend, ms, span="both", key="rows=64", difference=0.0):
    shared = {"op": "grouped_gemm", "key": key, "pass": span, "contender": backend}
    return {**shared, "ms": {"median": ms}, "difference": difference}


@pytest.fixture
def proven(monkeypatch):
    """Say of which kernels there is a proof."""
    there = set()
    monkeypatch.setattr(backends, "proof", lambda op, capability, b="triton": b in there or None)
    backends.fastest.cache_clear()
    yield there
    backends.fastest.cache_clear()


def test_the_fastest_that_may_be_chosen_is_written(proven, tmp_path):
    rows = [
        _row("torch", 2.0),
        _row("triton", 1.0),
        _row("reference", 9.0),
        _row("eager", 0.1),
        _row("torch", 0.1, span="forward"),
        _row("reference", 0.1, key="rows=128", difference=0.5),
        _row("reference", 3.0, span="forward", key="forward alone"),
        {"op": "grouped_gemm", "key": "rows=64", "contender": "cuda", "failed": "no"},
        _row("torch", 0.1, key=""),
    ]
    found = fastest.table(rows, "9.0", torch.bfloat16)["grouped_gemm"]["9.0"]
    assert set(found) == {"bfloat16,rows=64", "bfloat16,forward alone"}
    assert found["bfloat16,rows=64"]["backend"] == "torch", "Triton is not proven"
    proven.add("triton")
    found = fastest.table(rows, "9.0", torch.bfloat16)
    assert found["grouped_gemm"]["9.0"]["bfloat16,rows=64"] == {
        "backend": "triton",
        "ms": 1.0,
        "source": backends.table_hash("grouped_gemm"),
    }
    file = tmp_path / "fastest.json"
    fastest.merge(found, file)
    fastest.merge({"grouped_gemm": {"10.0": {"bfloat16,rows=64": {"backend": "torch"}}}}, file)
    (tmp_path / "kernels.json").write_text(json.dumps({"fastest": {"op": {"9.0": {"k": {}}}}}))
    fastest.merge(json.loads((tmp_path / "kernels.json").read_text())["fastest"], file)
    there = json.loads(file.read_text())
    assert set(there) == {"grouped_gemm", "op"}
    assert set(there["grouped_gemm"]) == {"9.0", "10.0"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fastest.json", "kernels.json"]


def test_a_table_is_obeyed_while_it_holds(proven, tmp_path, monkeypatch):
    """An entry counts for today's code, for a library or a proven kernel, and for its case."""
    file = tmp_path / "fastest.json"

    def chosen(backend, source=None, case="rows=64", dtype=torch.bfloat16):
        entry = {"backend": backend, "source": source or backends.table_hash("grouped_gemm")}
        file.write_text(json.dumps({"grouped_gemm": {"9.0": {"bfloat16,rows=64": entry}}}))
        backends.fastest.cache_clear()
        return backends.choose("grouped_gemm", torch.device("cuda", 0), dtype, case=case)

    found = backends.fastest
    monkeypatch.setattr(backends, "_capability", lambda device: "9.0")
    monkeypatch.setattr(backends, "_default", lambda *_: "default")
    monkeypatch.setattr(
        backends, "fastest", lambda op, capability, key: found(op, capability, key, file)
    )
    monkeypatch.setattr(backends.fastest, "cache_clear", found.cache_clear, raising=False)
    assert chosen("torch") == "torch"
    assert chosen("torch", source="of other code") == "default"
    assert chosen("torch", case="rows=128") == "default"
    assert chosen("torch", case=None) == "default"
    assert chosen("torch", dtype=torch.float16) == "default"
    assert chosen("hip") == "default"
    assert chosen("triton") == "default"
    proven.add("triton")
    assert chosen("triton") == "triton"
    assert backends.choose("grouped_gemm", CPU, torch.bfloat16, case="rows=64") == "default"


def test_a_case_has_one_name():
    key = backends.case_key
    assert key(tokens=5000, head=128, causal=True) == "causal,head=128,tokens=8192"
    assert key(head=128, tokens=8192, causal=False) == "head=128,tokens=8192"
    assert key(scaling="tile", rows=1, n=24) == "n=24,rows=1,scaling=tile"


@pytest.mark.parametrize("case", [c for c in CASES if c.key], ids=lambda c: f"{c.name}-{c.size}")
def test_operators_ask_for_their_cases_as_the_suites_name_them(case, monkeypatch):
    asked = []

    def choose(op, device, dtype, backend=None, case=None):
        asked.append((op, case))
        return "reference"

    real = torch.Tensor.is_cuda
    modules = (flash, grouped, fp8, block)
    for module in modules:
        monkeypatch.setattr(module, "choose", choose)
    draw = Draw(torch.float32, CPU)
    inputs, fixed = case.draw(draw)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with contextlib.suppress(RuntimeError, AssertionError):  # no CUDA device: what was asked counts
        case.ours(*inputs, **fixed, backend=None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", real)
    assert (case.op, case.key) in asked
