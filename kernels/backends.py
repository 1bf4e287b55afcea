"""Who can serve which operator, here: what is installed, what has been proven, what is chosen.

Every operator has a backend `reference`, its specification in PyTorch, which runs on every device.
A Triton kernel is the default on a CUDA device only after `record_proof` has written down that it
passed its tests on a device of that compute capability, with the device code as it is now: the
entry in `proven.json` carries the hash of the file, so a changed kernel is unproven again. An
explicit choice is obeyed or refused in one sentence; nothing falls back silently.

An operator's Triton code lies in `<folder>/<stem>_triton.py`; where the file does not exist the
operator has no such backend.
"""

import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_PROVEN = _HERE / "proven.json"
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """Where an operator's code lies.

    Attributes:
        stem: Path of its device code below `kernels/`, without `_triton.py`.
        default: What serves where no kernel is proven.
        library: Whether PyTorch has a fused operator of its own, backend `torch`.
    """

    stem: str
    default: str = "reference"
    library: bool = False

    @property
    def triton(self) -> Path:
        return _HERE / f"{self.stem}_triton.py"

    @property
    def backends(self) -> tuple[str, ...]:
        library = ("torch",) if self.library else ()
        return ("reference", *library, *(("triton",) if self.triton.exists() else ()))


_OPERATORS: Mapping[str, _Operator] = MappingProxyType(
    {
        "rms_norm": _Operator(stem="norm/rms"),
        "rotary": _Operator(stem="rope/rotate"),
        "swiglu": _Operator(stem="activation/glu"),
        "linear_cross_entropy": _Operator(stem="loss/cross_entropy"),
        "linear_log_probs": _Operator(stem="loss/cross_entropy"),
        "route": _Operator(stem="moe/router"),
        "permute": _Operator(stem="moe/permutation"),
        "unpermute": _Operator(stem="moe/permutation"),
        "grouped_gemm": _Operator(stem="gemm/grouped"),
        "flash_attention": _Operator(stem="attention/flash", default="torch", library=True),
        "flash_attention_varlen": _Operator(stem="attention/flash", default="torch", library=True),
    }
)


def _operator(op: str) -> _Operator:
    if op not in _OPERATORS:
        raise ValueError(f"op must be one of {', '.join(_OPERATORS)}, got {op!r}")
    return _OPERATORS[op]


def source_hash(op: str) -> str:
    """Hash the Triton device code of `op`: a proof holds only for the code it was made with.

    Args:
        op: Name of an operator that has Triton code.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the operator has no Triton code.
    """
    file = _operator(op).triton
    if not file.exists():
        raise RuntimeError(f"{op}: there is no Triton kernel ({file.name} does not exist)")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    if not file.exists():
        return {}
    proofs: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())
    return proofs


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@functools.cache
def proof(op: str, capability: str, file: Path = _PROVEN) -> Mapping[str, Any] | None:
    """Look up the proof of the Triton kernel of `op` as its code is now; read once per process.

    Args:
        op: Operator.
        capability: Compute capability of the device, such as "9.0".
        file: The record.

    Returns:
        The entry (device, versions, error, time in milliseconds, source hash), or None when the
        kernel never passed on such a device or has changed since.

    Raises:
        ValueError: If there is no such operator.
    """
    if "triton" not in _operator(op).backends:
        return None
    entry = _read(file).get(op, {}).get(capability)
    return entry if entry and entry["source"] == source_hash(op) else None


def record_proof(
    op: str, *, device: torch.device, error: float, time_ms: float, file: Path = _PROVEN
) -> None:
    """Write down that the Triton kernel of `op` passed its tests on `device`; called by `make gpu`.

    Args:
        op: Operator.
        device: The CUDA device on which it passed.
        error: Largest error against the float64 reference, relative to that of PyTorch in the
            same dtype; dimensionless.
        time_ms: Median time of forward and backward, in milliseconds.
        file: The record; replaced atomically.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the operator has no Triton code, or `device` is not a CUDA device.
    """
    if device.type != "cuda":
        raise RuntimeError(f"{op}: a proof needs a CUDA device, got {device}")
    import triton  # type: ignore[import-untyped]

    entry = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "error": error,
        "time_ms": time_ms,
        "source": source_hash(op),
    }
    proofs = _read(file)
    proofs.setdefault(op, {})[_capability(device)] = entry
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(handle, "w") as stream:
        stream.write(json.dumps(proofs, indent=2, sort_keys=True) + "\n")
    os.chmod(name, 0o644)
    os.replace(name, file)
    proof.cache_clear()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Tell whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1); imports triton."""
    if not _has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _missing(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what `backend` lacks to serve `op` on `device`, or None when it can."""
    served = _operator(op).backends
    if backend not in served:
        return f"is not one of {', '.join(served)}"
    if backend != "triton":
        return None
    if not _has_triton():
        return "needs the package triton, which is not installed"
    if device.type != "cuda" and not interpreted():
        return f"needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {device.type}"
    if dtype not in _TRITON_DTYPES:
        return f"needs float16, bfloat16 or float32, the tensors are {dtype}"
    return None


def choose(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Choose the backend that serves `op`.

    Args:
        op: Operator.
        device: Where its tensors are.
        dtype: Their dtype.
        backend: An explicit choice, which is obeyed or refused; None takes the fastest proven one.

    Returns:
        The backend's name: `reference`, `torch` or `triton`.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the explicit choice cannot be served here.
    """
    if backend is None:
        operator = _operator(op)
        if device.type != "cuda" or not _has_triton() or dtype not in _TRITON_DTYPES:
            return operator.default
        return "triton" if proof(op, _capability(device)) else operator.default
    missing = _missing(op, backend, device, dtype)
    if missing:
        raise RuntimeError(f"{op}: backend {backend!r} {missing}")
    return backend


def _status(op: str, backend: str) -> str:
    if backend != "triton":
        return "proven on every device"
    if not _has_triton():
        return "needs triton"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    entry = proof(op, _capability(torch.device("cuda", torch.cuda.current_device())))
    return f"proven on {entry['device']}" if entry else "unproven"


def available() -> dict[str, dict[str, str]]:
    """List every operator's backends and what stands in their way on this machine.

    Returns:
        For each operator, backend -> "proven on <device>", "unproven" (works when named, is not
        the default) or "needs <what is missing>".
    """
    return {
        op: {backend: _status(op, backend) for backend in operator.backends}
        for op, operator in _OPERATORS.items()
    }
