"""Compilers that miscompile are named."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from warploom.recipes import compilers


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
    found = compilers.hazards(triton, ptxas)
    assert len(found) == len(named)
    assert all(sentence.startswith(name) for sentence, name in zip(found, named, strict=True))


def test_a_machine_with_a_hopper_gpu_is_told(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    from triton.backends.nvidia.compiler import get_ptxas

    compilers.warnings.cache_clear()
    told = compilers.warnings()
    compilers.warnings.cache_clear()
    assert Path(get_ptxas(90).path).exists()
    assert all("take" in s or "pip install" in s for s in told)
    assert importlib.metadata.version("triton") != "3.7.1" or told  # its ptxas is 12.8.93
