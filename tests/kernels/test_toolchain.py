"""Compilers that miscompile are named, and no kernel here is of the kind that they break."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from warploom.kernels import toolchain


@pytest.mark.parametrize(
    ("triton", "ptxas", "named"),
    [
        ("3.6.0", "12.8.93", ["triton 3.6.0", "ptxas 12.8.93"]),
        ("3.7.0", "13.3.73", ["triton 3.7.0"]),
        ("3.7.1", "13.0.88", ["ptxas 13.0.88"]),
        ("3.7.1+git1", "13.3.73", []),
        ("3.3.1", "13.4.0", []),
        ("3.9.0", None, []),
    ],
)
def test_which_compilers_are_named(triton, ptxas, named):
    found = toolchain.hazards(triton, ptxas)
    assert len(found) == len(named)
    assert all(sentence.startswith(name) for sentence, name in zip(found, named, strict=True))


def test_a_machine_with_a_hopper_gpu_is_told(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    from triton.backends.nvidia.compiler import get_ptxas

    toolchain.warnings.cache_clear()
    told = toolchain.warnings()
    toolchain.warnings.cache_clear()
    assert Path(get_ptxas(90).path).exists()
    assert all("take" in s or "pip install" in s for s in told)
    assert importlib.metadata.version("triton") != "3.7.1" or told  # its ptxas is 12.8.93


def test_a_first_factor_in_registers_is_seen():
    from tests.kernels.launches import products_from_registers

    shared = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, 1, 1;"
    registers = shared.replace("%rd1", "{%r1,%r2,%r3,%r4}")
    assert not products_from_registers(shared)
    assert products_from_registers(f"{shared}\n{registers}") == 1


@pytest.mark.parametrize(("installed", "able"), [("3.6.0", False), ("3.7.1", True), ("4.0", True)])
def test_an_old_triton_does_not_run_ahead_of_a_head_in_two_tiles(monkeypatch, installed, able):
    monkeypatch.setattr(toolchain.importlib.metadata, "version", lambda name: installed)
    assert toolchain.pipelines_two_tiles() == able
