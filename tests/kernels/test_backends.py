"""Who serves what: proofs, explicit choices, errors, and what importing costs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tests.kernels.specimen import item

from warploom.benchmarks.proofs import record_proof
from warploom.kernels import backends
from warploom.kernels.norm import rms_norm

CPU = torch.device("cpu")


def _python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_cpu_takes_the_reference():
    assert backends.choose("rms_norm", CPU, torch.float32) == "reference"
    assert backends.choose("rms_norm", CPU, torch.float32, "reference") == "reference"


def test_available_names_what_is_missing():
    listed = backends.available()
    assert {"rms_norm", "rotary", "swiglu"} <= set(listed)
    for op in ("rms_norm", "rotary", "swiglu"):
        assert {"reference", "triton"} <= set(listed[op])
        if not torch.cuda.is_available():
            assert listed[op]["triton"] in ("needs a CUDA device", "needs triton")
    if not torch.cuda.is_available():
        assert listed["flash_attention"]["cudnn"] == "needs a CUDA device"


@item("bad input", ops=("every",))
@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("cudnn", r"rms_norm: backend 'cudnn' is not one of reference, triton, cuda"),
        ("cuda", r"rms_norm: backend 'cuda' needs .*"),
        ("triton", r"rms_norm: backend 'triton' needs .*"),
    ],
)
def test_a_choice_that_cannot_be_served_is_an_error(backend, sentence, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=sentence):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend=backend)


def test_unknown_operators_are_an_error():
    with pytest.raises(ValueError, match="op must be one of .*rms_norm.*, got 'norm'"):
        backends.choose("norm", CPU, torch.float32)


class _Device:
    """A CUDA device that is not here: compute capability 9.0."""

    type = "cuda"

    def __eq__(self, other):
        return False

    __hash__ = object.__hash__


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "proven.json"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(backends.proof, "__defaults__", None, raising=False)
    recorded = backends.proof
    monkeypatch.setattr(
        backends, "proof", lambda op, capability, backend: recorded(op, capability, backend, file)
    )
    monkeypatch.setattr(backends.proof, "cache_clear", recorded.cache_clear, raising=False)
    yield file
    recorded.cache_clear()


def test_a_proof_makes_the_kernel_the_default_and_a_change_unmakes_it(hopper, monkeypatch):
    def choose(op, dtype, backend=None):
        return backends.choose(op, _Device(), dtype, backend)  # a new one: nothing is cached

    assert choose("rms_norm", torch.bfloat16) == "reference"
    assert choose("rms_norm", torch.bfloat16, "triton") == "triton"
    record_proof("rms_norm", device=_Device(), error=0.9, time_ms=0.1, file=hopper)
    assert choose("rms_norm", torch.bfloat16) == "triton"
    assert choose("rms_norm", torch.float64) == "reference"
    assert choose("swiglu", torch.bfloat16) == "reference"
    with pytest.raises(RuntimeError, match="needs float16, bfloat16 or float32"):
        choose("rms_norm", torch.float64, "triton")
    entry = json.loads(hopper.read_text())["rms_norm"]["triton"]["9.0"]
    assert entry["device"] == "NVIDIA H200"
    assert entry["source"] == backends.source_hash("rms_norm")
    assert (entry["error"], entry["time_ms"]) == (0.9, 0.1)
    assert [f.name for f in hopper.parent.iterdir()] == ["proven.json"]
    monkeypatch.setattr(backends, "source_hash", lambda op, backend: "0" * 64)
    backends.proof.cache_clear()
    assert choose("rms_norm", torch.bfloat16) == "reference"


def test_proofs_of_other_operators_and_devices_stay(hopper, monkeypatch):
    record_proof("rms_norm", device=_Device(), error=1.0, time_ms=1.0, file=hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    record_proof("rms_norm", device=_Device(), error=1.0, time_ms=2.0, file=hopper)
    record_proof("swiglu", device=_Device(), error=1.0, time_ms=3.0, file=hopper)
    proofs = json.loads(hopper.read_text())
    assert sorted(proofs) == ["rms_norm", "swiglu"]
    assert sorted(proofs["rms_norm"]["triton"]) == ["10.0", "9.0"]


def test_a_proof_needs_a_device():
    with pytest.raises(RuntimeError, match="needs a CUDA device, got cpu"):
        record_proof("rms_norm", device=CPU, error=1.0, time_ms=1.0)


def test_the_committed_proofs_are_of_known_operators():
    proofs = json.loads(backends.PROVEN.read_text())
    assert set(proofs) <= set(backends.available())


@item("import", ops=("every",))
def test_importing_kernels_does_not_import_triton():
    code = (
        "import torch, sys, time; start = time.process_time();"
        "import warploom.kernels.norm, warploom.kernels.rope, warploom.kernels.activation;"
        "print(time.process_time() - start, 'triton' in sys.modules)"
    )
    seconds, triton = _python(code).split()
    assert triton == "False"
    assert float(seconds) < 1  # of the processor; 0.1 s on an idle machine


@item("import", ops=("every",))
def test_without_triton_the_reference_serves_and_the_error_names_it():
    code = (
        "import importlib.util as u, torch; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "from warploom.kernels.norm import rms_norm;"
        "x = torch.ones(2, 4); rms_norm(x, x[0])\n"
        "try: rms_norm(x, x[0], backend='triton')\n"
        "except RuntimeError as e: print(e)"
    )
    assert "needs the package triton, which is not installed" in _python(code)
