"""Peers as backends: Liger for real where it is installed, the others by stand-ins."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.launches import recorded

from warploom.kernels import backends, peers
from warploom.kernels.norm import layer_norm, rms_norm, rms_norm_reference
from warploom.kernels.rope import rotary, rotary_reference, rotary_tables

X, R = torch.randn(9, 64), torch.randn(9, 64)
W, B = torch.randn(64), torch.randn(64)


def test_peers_are_listed_and_never_the_default():
    listed = backends.available()
    assert {"liger", "te", "apex"} <= set(listed["rms_norm"])
    assert "liger" in listed["linear_cross_entropy"]
    assert "te" not in listed["swiglu"]
    assert backends.choose("rms_norm", torch.device("cpu"), torch.float32) == "reference"


def test_a_peer_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="rms_norm: backend 'apex' needs the package apex, from"):
        rms_norm(X, W, backend="apex")
    assert backends.available()["rms_norm"]["liger"].startswith("needs the package liger-kernel")


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules of the peers' names, whose functions are PyTorch's."""

    def module(name, **members):
        made = types.ModuleType(name)
        made.__spec__ = types.SimpleNamespace(name=name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def turn(t, cos, sin):  # [s, b, h, d] with tables [s, 1, 1, d], as apex documents
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    module("apex")
    module("apex.transformer")
    module("apex.transformer.functional", fused_apply_rotary_pos_emb_cached=turn)
    module("apex.normalization")
    module(
        "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=lambda x, w, shape, eps: F.rms_norm(x, shape, w, eps),
        fused_layer_norm_affine=lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps),
    )
    module("transformer_engine")
    module("transformer_engine.pytorch", RMSNorm=torch.nn.RMSNorm, LayerNorm=torch.nn.LayerNorm)
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda name: sys.modules.get(name) and object()
    )


@pytest.mark.parametrize("peer", ["apex", "te"])
def test_how_apex_and_transformer_engine_are_called(stand_ins, peer):
    y, h = rms_norm(X, W, residual=R, backend=peer)
    expected = rms_norm_reference(X, W, residual=R)
    torch.testing.assert_close((y, h), expected)
    torch.testing.assert_close(rms_norm(X, W, backend=peer), rms_norm_reference(X, W)[0])
    torch.testing.assert_close(layer_norm(X, W, B, backend=peer), F.layer_norm(X, (64,), W, B))
    torch.testing.assert_close(layer_norm(X, W, backend=peer), F.layer_norm(X, (64,), W))


def test_how_apex_turns(stand_ins):
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    tables = rotary_tables(torch.arange(9), 16, base=1e4)
    torch.testing.assert_close(
        rotary(q, k, *tables, backend="apex"), rotary_reference(q, k, *tables)
    )
    with pytest.raises(RuntimeError, match="'apex' serves the plain form alone"):
        rotary(q, k, *tables, interleaved=True, backend="apex")


_LIGER = """
import torch
from torch.nn.functional import cross_entropy as plain
from warploom.kernels.loss import cross_entropy, linear_cross_entropy
from warploom.kernels.rope import rotary, rotary_reference, rotary_tables
q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
tables = rotary_tables(torch.arange(9), 16, base=1e4)
torch.testing.assert_close(rotary(q, k, *tables, backend="liger"), rotary_reference(q, k, *tables))
z, targets = torch.randn(9, 50, requires_grad=True), torch.randint(0, 50, (9,))
targets[3] = -100
total, count = cross_entropy(z, targets, backend="liger")
want = plain(z, targets, reduction="sum")
torch.testing.assert_close(total, want)
assert int(count) == 8
torch.testing.assert_close(*(torch.autograd.grad(t, z)[0] for t in (total * 2, want * 2)))
h, w = torch.randn(9, 64, requires_grad=True), torch.randn(50, 64)
total, _ = linear_cross_entropy(h, w, targets, backend="liger")
torch.testing.assert_close(total, plain(h @ w.t(), targets, reduction="sum"))
print("the same")
"""


def test_liger_in_the_interpreter():
    """Those of its kernels that Triton's interpreter runs."""
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    done = subprocess.run(
        [sys.executable, "-c", _LIGER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]


@pytest.mark.parametrize("fused", [False, True])
def test_liger_is_called_as_it_wants(fused, monkeypatch):
    """Forward and backward reach the launches of its kernels, with results of the right shape."""
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    import liger_kernel.ops  # noqa: F401  its kernels are made here, to be compiled

    from warploom.kernels.activation import geglu, swiglu

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or the tensors would have to be on a GPU

    x, w, residual = (t.clone().requires_grad_() for t in (X, W, R))
    residual = residual if fused else None
    with recorded() as found:
        for y in (
            rms_norm(x, w, residual=residual, backend="liger"),
            layer_norm(x, w, B, residual=residual, backend="liger"),
            *(() if fused else (swiglu(x, backend="liger"), geglu(x, backend="liger"))),
        ):
            y = y[0] if fused and isinstance(y, tuple) else y
            y.sum().backward()
            assert y.shape in (x.shape, (9, 32))
    assert len(found) >= 4
    assert x.grad.shape == x.shape
