"""FP8 products by PyTorch: cuBLASLt on CUDA, for tensors and rows its own code on the CPU too.

What cuBLASLt wants of the scales, by scaling; G is K / 128, and G4 is G up to a multiple of 4:

    tensor   []
    row      [M, 1] and [1, N]
    tile     a [M, G], rows side by side in memory; b [G4, N / 128], groups side by side
    block    a [M, G] and b [N, G], rows side by side in memory
    mx       of each 128 rows and 4 groups 512 bytes, [row % 32, row / 32 % 4, group % 4]; padded

With G where it wants G4 the answer was silently wrong before pytorch pull request 166752: scales
are laid out here, and what has no place in a layout is refused. Every sum goes on in float32
(`use_fast_accum=False`). The CUDA half has never run on a device: the tests marked `gpu` are its
proof.

Source: the documentation of cuBLAS, "Scaling factors layouts"; of `torch.nn.functional.scaled_mm`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from ..quant.formats import BLOCK, MX_BLOCK

FIRST = (8, 9)
"""The first compute capability whose matrix units take FP8."""

FIRST_MX = (10, 0)
"""The first that takes MX scales."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SWIZZLE = (32, 4, 4)  # rows, rows / 32 and groups of a block of MX scales


def device_lack(
    capability: tuple[int, int] | None, scaling: str, backend: str | None
) -> str | None:
    """Say that a CUDA device has no matrix units for a scaling, and what to use; or None.

    Args:
        capability: Of the device, None where it is no CUDA device.
        scaling: As the table of `fp8` names it.
        backend: As the caller named it; one that emulates is taken at its word.

    Returns:
        The end of a sentence that begins with the operator's name.
    """
    if capability is None or backend == "reference":
        return None
    found = f"this device has {capability[0]}.{capability[1]}"
    if capability < FIRST:
        return (
            f"FP8 needs compute capability 8.9, {found}: take bfloat16, or backend='reference', "
            f"which emulates it"
        )
    if scaling == "mx" and capability < FIRST_MX and backend is None:
        return (
            f"MX scales need compute capability 10.0, {found}: take scaling 'block', or "
            f"backend='triton', which multiplies groups of 32 one by one"
        )
    return None


def missing(
    sizes: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype], scaling: str,
    dtype: torch.dtype, device: torch.device, capability: tuple[int, int] | None,
) -> str | None:  # fmt: skip
    """Say what keeps PyTorch's product from these operands, or None when it takes them.

    Args:
        sizes: M, N and K.
        types: Of a and b.
        scaling: As the table of `fp8` names it.
        dtype: Of the result.
        device: Where the operands are.
        capability: Of the device, if it is a CUDA one.

    Returns:
        The end of a sentence that begins with the backend's name, and says what to use.
    """
    if dtype not in _DTYPES:
        return f"gives float16, bfloat16 or float32, not {dtype}: take backend='reference'"
    if capability is None:
        if device.type == "cpu" and scaling in ("tensor", "row"):
            return None
        return (
            f"takes scales of tensors and rows on the CPU and all on CUDA, got scaling {scaling!r} "
            f"on {device.type}: take backend='reference'"
        )
    found = f"this device has {capability[0]}.{capability[1]}"
    if scaling == "mx" and capability < FIRST_MX:
        return f"takes MX scales from compute capability 10.0 on, {found}: take backend='triton'"
    if scaling in ("tile", "block") and capability[0] != 9:
        return f"takes groups of 128 on compute capability 9.0 alone, {found}: take 'triton'"
    if types == (torch.float8_e5m2, torch.float8_e5m2):
        return "takes one operand in float8_e5m2, not both: take backend='triton'"
    return _misfit(sizes, scaling)


def _misfit(sizes: tuple[int, int, int], scaling: str) -> str | None:
    rows, columns, depth = sizes
    needs = {"M": 1, "N": 16, "K": 16}
    if scaling in ("tile", "block"):
        needs = {"M": 4, "N": BLOCK if scaling == "tile" else 16, "K": BLOCK}
    if scaling == "mx":
        needs["K"] = MX_BLOCK
    for (name, multiple), size in zip(needs.items(), (rows, columns, depth), strict=True):
        if size % multiple:
            return (
                f"needs {name} to be a multiple of {multiple} with scaling {scaling!r}, got "
                f"M, N, K = {rows}, {columns}, {depth}: take backend='triton'"
            )
    return None


def along_rows(scale: Tensor) -> Tensor:
    """Lay `[R, G]` out with rows side by side: strides 1 and R."""
    return scale.t().contiguous().t()


def along_groups(scale: Tensor) -> Tensor:
    """Lay the scales of tiles `[C, G]` out as `[G4, C]` with groups side by side, padded by 0."""
    tiles, groups = scale.shape
    laid = scale.new_zeros(tiles, -(-groups // 4) * 4)
    laid[:, :groups] = scale
    return laid.t()


def swizzled(scale: Tensor) -> Tensor:
    """Lay MX scales, bytes `[R, G]`, out as the table says.

    Returns:
        float8_e8m0fnu, flat.
    """
    (rows, groups), (low, high, four) = scale.shape, _SWIZZLE
    blocks = -(-rows // (low * high)), -(-groups // four)
    laid = scale.new_zeros(blocks[0] * low * high, blocks[1] * four)
    laid[:rows, :groups] = scale
    laid = laid.view(blocks[0], high, low, blocks[1], four).permute(0, 3, 2, 1, 4)
    return laid.reshape(-1).view(torch.float8_e8m0fnu)


def _ready(codes: Tensor) -> Tensor:
    """Have rows contiguous and aligned to 16 bytes, as cuBLASLt takes them."""
    aligned = codes.is_contiguous() and not codes.storage_offset() % 16
    return codes if aligned else codes.clone(memory_format=torch.contiguous_format)


def gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, scaling: str, dtype: torch.dtype
) -> Tensor:
    """Multiply; nothing is `missing`.

    Args:
        a: `[M, K]` in an FP8 dtype.
        a_scale: Of `a`; bytes with "mx".
        b: `[N, K]` in an FP8 dtype.
        b_scale: Of `b`.
        scaling: As the table of `fp8` names it.
        dtype: Of the result.

    Returns:
        `[M, N]`.
    """
    a, b_KN = _ready(a), _ready(b).t()
    if scaling in ("tile", "block"):
        one, square = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        tile = scaling == "tile"
        scales = along_groups(b_scale) if tile else along_rows(b_scale)
        return F.scaled_mm(
            a, b_KN, along_rows(a_scale), one, scales, square if tile else one, output_dtype=dtype
        )
    if scaling == "row":
        a_scale, b_scale = a_scale.contiguous(), b_scale.contiguous().t()
    elif scaling == "mx":
        a_scale, b_scale = swizzled(a_scale), swizzled(b_scale)
    return torch._scaled_mm(a, b_KN, a_scale, b_scale, out_dtype=dtype, use_fast_accum=False)
