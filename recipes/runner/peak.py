"""What the machine can do at most, and what this process has used: the divisors of a report."""

import logging
import resource
from dataclasses import dataclass

import torch

from warploom.parallel.collectives import all_reduce_, barrier, device_of
from warploom.parallel.mesh import Mesh

from ..plan.timing import matmul_ceiling

_GIB = 2**30
_LOG = logging.getLogger(__name__)

# Dense bf16 FLOP/s as NVIDIA publishes them (data sheets of H100, H200, B200, A100); the first name
# that a device's name contains.
_PUBLISHED = (
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
)


@dataclass(frozen=True, slots=True)
class Peak:
    """The denominator of an MFU."""

    flops: float
    """FLOP/s of all ranks together."""
    words: str
    """Which peak it is."""


def peak(mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak of all ranks: published where it is known, measured elsewhere.

    A collective call. The measurement multiplies square matrices on all ranks at once, in the
    run's dtype.
    """
    name = "this machine"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _PUBLISHED:
            if known in name and dtype == torch.bfloat16:
                words = f"published dense bf16 peak of {mesh.size} x {name}"
                return Peak(flops * mesh.size, words)
    barrier(mesh.world)
    _LOG.info("measuring what this machine multiplies a second, for the MFU")
    best = max(matmul_ceiling(device, dtype) for _ in range(3))  # a busy moment is no peak
    own = torch.tensor(best, dtype=torch.float64)
    total = all_reduce_(own.to(device_of(mesh.world)), mesh.world)
    kind = str(dtype).removeprefix("torch.")
    words = f"{name}'s measured {kind} matrix products, {mesh.size} ranks at once"
    return Peak(float(total), words)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has held: of its GPU, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
