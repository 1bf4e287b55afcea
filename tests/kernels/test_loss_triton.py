"""The Triton code of the cross-entropy: what it computes, interpreted, and its build for two GPUs.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter runs in a process of its own:
the tests named `interpreted_*` below, which this file starts, and which skip otherwise.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.backends import interpreted
from warploom.kernels.loss import (
    cross_entropy_gradient_,
    cross_entropy_partials,
    linear_cross_entropy,
    linear_log_probs,
)

triton = pytest.importorskip("triton")
in_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")


@compiled
def test_in_the_interpreter():
    """Run the tests of this file that need the interpreter."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10, done.stdout[-500:]


def _chunk(tokens, vocabulary, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(tokens, vocabulary, generator=g)).to(dtype)
    return logits, torch.randint(-2, vocabulary + 2, (tokens,), generator=g), g


def _assert_chunk(logits, targets, start, g):
    """Hold partials and gradient to the reference in float64 on the same, rounded logits."""
    wide = logits.double()
    actual = cross_entropy_partials(logits, targets, start, backend="triton")
    expected = cross_entropy_partials(wide, targets, start, backend="reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-6)
    lse = expected[0] + expected[1].log()
    g_nll, g_lse = torch.randn(2, len(lse), generator=g)
    gradient = cross_entropy_gradient_(
        logits.clone(), targets, start, lse.float(), g_nll, g_lse, backend="triton"
    )
    exact = cross_entropy_gradient_(
        wide.clone(), targets, start, lse, g_nll.double(), g_lse.double(), backend="reference"
    )
    close = (
        {"rtol": 1e-2, "atol": 1e-3} if logits.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(gradient.double(), exact, **close)


@in_interpreter
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, 5), vocabulary=st.integers(1, 300), start=st.sampled_from([0, 7, -5]))
def test_interpreted_partials_and_gradient(tokens, vocabulary, start):
    logits, targets, g = _chunk(tokens, vocabulary)
    _assert_chunk(logits, targets + start, start, g)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [4096, 4097, 10_001])  # a tile, one more, several
def test_interpreted_several_tiles_a_row(dtype, vocabulary):
    logits, targets, g = _chunk(3, vocabulary, dtype)
    _assert_chunk(logits, targets, 0, g)


@in_interpreter
def test_interpreted_rows_with_strides():
    logits, targets, _ = _chunk(6, 90)
    for view in (logits[::2, 10:50], logits[:, ::2]):
        a, e = (
            cross_entropy_partials(view, targets[: len(view)].int(), 3, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(a, e)


@in_interpreter
@pytest.mark.parametrize("case", ["nan", "huge", "minus infinity"])
def test_interpreted_rows_stay_apart(case):
    logits, targets, _ = _chunk(3, 5000)
    targets.clamp_(0, 4999)
    value = {"nan": float("nan"), "huge": 1e4, "minus infinity": -torch.inf}[case]
    logits[1, 17 if case != "minus infinity" else slice(None)] = value
    high, total, target = cross_entropy_partials(logits, targets, backend="triton")
    expected = cross_entropy_partials(logits, targets, backend="reference")
    for row in (0, 2):
        torch.testing.assert_close(
            high[row] + total[row].log(), expected[0][row] + expected[1][row].log()
        )
    if case == "nan":
        assert total[1].isnan()
        assert total[[0, 2]].isfinite().all()
    elif case == "minus infinity":
        assert (high[1], total[1]) == (-torch.inf, 0)
    else:
        torch.testing.assert_close((high, total, target), expected)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("z_loss", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_interpreted_whole_loss(dtype, z_loss, ignored):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(41, 8, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(41, (11,), generator=g)
    targets[torch.rand(11, generator=g) < ignored] = -100
    results = []
    for backend in ("triton", "reference"):
        result = linear_cross_entropy(
            hidden, weight, targets, z_loss=z_loss, chunk=4, backend=backend
        )
        total = result[0][0] + 0.1 * result[1][0] if z_loss else result[0]
        log_probs = linear_log_probs(hidden, weight, targets, backend=backend)
        gradients = torch.autograd.grad(total * 0.3, (hidden, weight))
        results.append((total, log_probs, *gradients))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@in_interpreter
def test_interpreted_ignored_rows_are_zero_whatever_they_hold():
    from warploom.kernels.loss.cross_entropy_triton import nll_and_gradient_

    logits, _, _ = _chunk(4, 33)
    logits[2] = float("nan")
    wanted = logits.softmax(-1)
    wanted[0, 5] -= 1
    wanted[1, 32] -= 1
    wanted[2:] = 0
    nll = nll_and_gradient_(logits, torch.tensor([5, 32, -7, -7]), -7)
    torch.testing.assert_close(logits, wanted)
    assert nll[:2].gt(0).all()
    assert nll[2:].tolist() == [0, 0]


def _build(kernel, capability, types, aligned):
    """Compile for a device that need not be here; `aligned`: all pointers and sizes by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(zip(kernel.arg_names, types, strict=True))
    divisible = [["tt.divisibility", 16]]
    attrs = {(i,): divisible for i, t in enumerate(types) if aligned and t != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 4096}, attrs=attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )


@compiled
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("logits", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("name", ["partials", "gradient", "nll_and_gradient"])
def test_builds_without_spills(capability, aligned, logits, name, tmp_path):
    from warploom.kernels.loss import cross_entropy_triton as device

    types = {
        "partials": [logits, "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32", "i32"],
        "gradient": [logits, "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32", "i32"],
        "nll_and_gradient": [logits, "*i64", "*fp32", "i32", "i32", "i32"],
    }[name]
    kernel = getattr(device, f"{name}_kernel")
    built = _build(kernel, capability, [*types, "constexpr"], aligned)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert "STACK:0 " in usage, usage  # a spill lives on the stack
    assert "LOCAL:0 " in usage, usage
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 128, usage  # two programs a multiprocessor
    assert not aligned or re.search(r"ld\.global[^;]*v4\.b32", built.asm["ptx"]), "16 bytes a load"
    assert re.search(r"arith\.muli .*: i64", built.asm["ttir"]), "row offsets must be 64 bits wide"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("z_loss", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 1000, 128_256])
def test_on_a_gpu(dtype, z_loss, vocabulary):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=g).to("cuda", dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, generator=g).to("cuda", dtype).requires_grad_()
    targets = torch.randint(vocabulary, (600,), generator=g).cuda()
    targets[::7] = -100
    results = []
    for backend, convert in (("triton", lambda x: x), ("reference", lambda x: x.double())):
        result = linear_cross_entropy(
            convert(hidden), convert(weight), targets, z_loss=z_loss, chunk=256, backend=backend
        )
        total = (result[0][0] + 1e-3 * result[1][0] if z_loss else result[0]) / 500
        results.append((total, *torch.autograd.grad(total, (hidden, weight))))
    for a, e in zip(*results, strict=True):
        assert (a - e).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * e.norm() + 1e-7


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_a_gpu():
    logits = torch.randn(18_000, 128_256, dtype=torch.bfloat16, device="cuda")
    targets = torch.arange(18_000, device="cuda")
    high, total, _ = cross_entropy_partials(logits, targets, backend="triton")
    exact = logits[-1].double().logsumexp(-1)
    torch.testing.assert_close((high[-1] + total[-1].log()).double(), exact, rtol=1e-5, atol=1e-5)
