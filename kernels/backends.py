"""Who can serve which operator, here: what is installed, what has been proven, what is chosen.

Every operator has a backend `reference`, its specification in PyTorch, which runs on every device.
A kernel in Triton or CUDA C++ is the default on a CUDA device only after `make gpu` has written
down that it passed its tests on a device of that compute capability, with the device code as it is
now: the entry in `proven.json` carries the hash of the code, so a changed kernel is unproven again.
An explicit choice is obeyed or refused in one sentence; nothing falls back silently.

An operator's Triton code lies in `<folder>/<stem>_triton.py`, the host of its CUDA C++ code in
`<folder>/<stem>_cuda.py`; where the file does not exist the operator has no such backend. Of
several proven ones the fastest, by the proofs, is the default.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import peers
from .invariant import need_invariant
from .launch import has_triton, next_power_of_two
from .launch import interpreted as interpreted

_HERE = Path(__file__).resolve().parent
PROVEN = _HERE / "proven.json"
_FASTEST = _HERE / "fastest.json"
_DEVICE = ("triton", "cuda")  # backends with device code of ours, which a GPU must prove
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """Where an operator's code lies.

    Attributes:
        stem: Path of its device code below `kernels/`, without `_triton.py` or `_cuda.py`.
        default: What serves where no kernel is proven.
        library: Backends that are PyTorch's own fused operators.
        shared: Further stems whose Triton code its kernels call.
    """

    stem: str
    default: str = "reference"
    library: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def files(self, backend: str) -> list[Path]:
        """Return the device code of `backend`, its own file first, or nothing."""
        own = _HERE / f"{self.stem}_{backend}.py"
        rest = [_HERE / f"{stem}_{backend}.py" for stem in self.shared]
        return [own, *(file for file in rest if file.exists())] if own.exists() else []

    @functools.cached_property
    def backends(self) -> tuple[str, ...]:
        """Name ours; looked up once, because a call that names its backend asks each time."""
        return ("reference", *self.library, *(name for name in _DEVICE if self.files(name)))

    def listed(self, op: str) -> tuple[str, ...]:
        """Return all backends of the operator `op` whose entry this is, peers too."""
        return *self.backends, *peers.peers_of(op)


_FP8 = ("quant/fp8",)
_OPERATORS: Mapping[str, _Operator] = MappingProxyType(
    {
        "rms_norm": _Operator(stem="norm/rms", shared=_FP8),
        "layer_norm": _Operator(stem="norm/layer", shared=("norm/rms", *_FP8)),
        "qk_norm_rotary": _Operator(stem="norm/qk_rotary", shared=("norm/rms",)),
        "rotary": _Operator(stem="rope/rotate"),
        "swiglu": _Operator(stem="activation/glu", shared=_FP8),
        "geglu": _Operator(stem="activation/glu", shared=_FP8),
        "relu2": _Operator(stem="activation/glu", shared=_FP8),
        "cross_entropy": _Operator(stem="loss/logits"),
        "linear_cross_entropy": _Operator(stem="loss/logits"),
        "linear_log_probs": _Operator(stem="loss/logits"),
        "linear_top_k_kl": _Operator(stem="loss/logits"),
        "route": _Operator(stem="moe/router"),
        "permute": _Operator(stem="moe/permutation", shared=_FP8),
        "unpermute": _Operator(stem="moe/permutation", shared=_FP8),
        "moe_block": _Operator(
            stem="moe/block",
            library=("torch",),
            shared=("gemm/grouped", "moe/permutation", "activation/glu", *_FP8),
        ),
        "adamw": _Operator(stem="optim/adam"),
        "global_norm": _Operator(stem="optim/norm"),
        "newton_schulz": _Operator(stem="optim/orthogonal"),
        "fp8_quantize": _Operator(stem="quant/fp8"),
        "mx_quantize": _Operator(stem="quant/mx", shared=_FP8),
        "nf4_quantize": _Operator(stem="quant/nf4", shared=_FP8),
        "nf4_dequantize": _Operator(stem="quant/nf4", shared=_FP8),
        "nf4_linear": _Operator(stem="quant/nf4", shared=_FP8),
        "grouped_gemm": _Operator(stem="gemm/grouped", library=("torch",)),
        "fp8_gemm": _Operator(stem="gemm/fp8", library=("torch",)),
        "fp8_linear": _Operator(stem="gemm/fp8", library=("torch",), shared=_FP8),
        "flash_attention": _Operator(
            stem="attention/flash",
            default="torch",
            library=("torch", "cudnn"),
            shared=("attention/flash_backward",),
        ),
        "flash_attention_varlen": _Operator(
            stem="attention/flash",
            default="torch",
            library=("torch",),
            shared=("attention/flash_backward",),
        ),
        "paged_attention": _Operator(
            stem="attention/paged", default="torch", library=("torch",), shared=("attention/flash",)
        ),
    }
)


def _operator(op: str) -> _Operator:
    if op not in _OPERATORS:
        raise ValueError(f"op must be one of {', '.join(_OPERATORS)}, got {op!r}")
    return _OPERATORS[op]


def source_hash(op: str, backend: str = "triton") -> str:
    """Hash the device code of `op`: a proof holds only for the code it was made with.

    Args:
        op: Name of an operator.
        backend: `triton` or `cuda`.

    Returns:
        SHA-256 of the files (for `cuda`, of the compiled library's sources too), 64 digits.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the operator has no such device code.
    """
    files = _operator(op).files(backend)
    if not files:
        raise RuntimeError(f"{op}: there is no {backend} kernel")
    text = b"".join(file.read_bytes() for file in files)
    if backend == "cuda":
        from .native import source_hash as compiled

        text += compiled().encode()
    return hashlib.sha256(text).hexdigest()


_Proofs = dict[str, dict[str, dict[str, dict[str, Any]]]]


def _read(file: Path) -> _Proofs:
    if not file.exists():
        return {}
    proofs: _Proofs = json.loads(file.read_text())
    return proofs


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@functools.cache
def proof(
    op: str, capability: str, backend: str = "triton", file: Path = PROVEN
) -> Mapping[str, Any] | None:
    """Look up the proof of a kernel of `op` as its code is now; read once per process.

    Args:
        op: Operator.
        capability: Compute capability of the device, such as "9.0".
        backend: `triton` or `cuda`.
        file: The record.

    Returns:
        The entry (device, versions, error, time in milliseconds, source hash), or None when the
        kernel never passed on such a device or has changed since.

    Raises:
        ValueError: If there is no such operator.
    """
    if backend not in _operator(op).backends:
        return None
    entry = _read(file).get(op, {}).get(backend, {}).get(capability)
    if not entry or (backend == "cuda" and _lack(backend, None)):
        return None
    return entry if entry["source"] == source_hash(op, backend) else None


def forget() -> None:
    """Read the records of proofs and of the fastest backends anew at the next call."""
    for cached in (proof, fastest, _default):
        cached.cache_clear()


def _lack(backend: str, device: torch.device | None) -> str | None:
    """Say what `backend` lacks on this machine (and `device`), or None."""
    if backend == "triton" and not has_triton():
        return "needs the package triton, which is not installed"
    if backend == "cuda":
        from .native import missing

        return missing(device)
    return peers.missing(backend) if backend in peers.PEERS else None


def _missing(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what `backend` lacks to serve `op` on `device`, or None when it can."""
    served = _operator(op).backends  # a peer serves whole calls, in the public function
    if backend not in served:
        known = served if backend in peers.PEERS else _operator(op).listed(op)
        return f"is not one of {', '.join(known)}"
    if backend not in _DEVICE:
        return None
    if lack := _lack(backend, device):
        return lack
    if device.type != "cuda" and not (backend == "triton" and interpreted()):
        hint = " (or TRITON_INTERPRET=1)" if backend == "triton" else ""
        return f"needs a CUDA device{hint}, the tensors are on {device.type}"
    if dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, the tensors are {dtype}"
    return None


@functools.cache
def _default(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the fastest kernel that is proven on devices like this one."""
    operator = _operator(op)
    if device.type != "cuda" or not has_triton() or dtype not in _DTYPES:
        return operator.default
    capability = _capability(device)
    proofs = {b: proof(op, capability, b) for b in operator.backends if b in _DEVICE}
    times = {b: float(entry["time_ms"]) for b, entry in proofs.items() if entry}
    return min(times, key=times.__getitem__, default=operator.default)


def case_key(**sizes: int | str) -> str:
    """Name a case of an operator, as the table of the fastest backends has it.

    Args:
        **sizes: What the choice depends on; `tokens` and `rows` are rounded up to powers of two, a
            flag is named where it is set.

    Returns:
        Such as "causal,head=128,tokens=8192".
    """
    parts = []
    for name, size in sorted(sizes.items()):
        if isinstance(size, bool):
            parts += [name] * size
        else:
            near = isinstance(size, int) and name in ("tokens", "rows")
            parts.append(f"{name}={next_power_of_two(int(size)) if near else size}")
    return ",".join(parts)


def table_hash(op: str) -> str:
    """Hash all device code of `op`: a measured choice holds for the kernels that were compared."""
    own = [source_hash(op, b) for b in _operator(op).backends if b in _DEVICE]
    return hashlib.sha256("".join(own).encode()).hexdigest()


@functools.cache
def fastest(op: str, capability: str, key: str, file: Path = _FASTEST) -> str | None:
    """Look up the backend that was measured to be the fastest; read once per process.

    Args:
        op: Operator.
        capability: Compute capability of the device, such as "9.0".
        key: Dtype and case, such as "bfloat16,causal,head=128,tokens=8192".
        file: The table, which `benchmarks/fastest.py` writes.

    Returns:
        The backend; None where nothing was measured, the device code has changed since, or the
        backend is neither a library's nor proven.
    """
    entry = _read(file).get(op, {}).get(capability, {}).get(key)
    if not entry or entry["backend"] not in _operator(op).backends:
        return None
    backend: str = entry["backend"]
    proven = backend not in _DEVICE or proof(op, capability, backend)
    return backend if proven and entry["source"] == table_hash(op) else None


def choose(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None,
    case: str | None = None,
) -> str:  # fmt: skip
    """Choose the backend that serves `op`.

    Args:
        op: Operator.
        device: Where its tensors are.
        dtype: Their dtype.
        backend: An explicit choice, which is obeyed or refused; None takes the fastest proven one.
        case: What `case_key` says of the call: the fastest in this case, where it was measured.

    Returns:
        The backend's name: `reference`, `torch`, `triton` or `cuda`.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the explicit choice cannot be served here, or not in the batch-invariant
            mode.
    """
    served = device.type == "cpu" and backend in (None, "reference", "torch")
    need_invariant(op, served and not op.startswith(("fp8", "mx", "nf4")), backend or device)
    if backend is None:
        measured = None
        if case is not None and device.type == "cuda":
            key = f"{str(dtype).removeprefix('torch.')},{case}"
            measured = fastest(op, _capability(device), key)
        return measured or _default(op, device, dtype)
    if missing := _missing(op, backend, device, dtype):
        raise RuntimeError(f"{op}: backend {backend!r} {missing}")
    return backend


def _status(op: str, backend: str) -> str:
    if lack := _lack(backend, None):
        return lack
    if backend in peers.PEERS:
        return "theirs: when named"
    if backend in (*_DEVICE, "cudnn") and not torch.cuda.is_available():
        return "needs a CUDA device"
    if backend not in _DEVICE:
        return "proven on every device"
    device = torch.device("cuda", torch.cuda.current_device())
    entry = proof(op, _capability(device), backend)
    return f"proven on {entry['device']}" if entry else "unproven"


def available() -> dict[str, dict[str, str]]:
    """List every operator's backends and what stands in their way on this machine.

    Returns:
        For each operator, backend -> "proven on <device>", "unproven" (works when named, is not
        the default), "theirs: when named" (a peer) or "needs <what is missing>".
    """
    return {
        op: {backend: _status(op, backend) for backend in operator.listed(op)}
        for op, operator in _OPERATORS.items()
    }
