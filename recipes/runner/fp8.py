"""The choices of `--fp8`, and where they cannot be had.

    tensor     one scale a tensor, from its own largest value
    delayed    one scale a tensor, from the largest values of the last 16 steps
    row        one scale a row of what a product contracts
    block      one scale for 1 x 128 elements, 128 x 128 of weights
    mx         one scale for 32 elements, a power of two (MXFP8)

Inputs and weights are e4m3. Gradients are e5m2 for tensor, delayed and row, e4m3 for block and mx.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.gemm.fp8_torch import FIRST, device_lack
from warploom.models.architecture import Architecture
from warploom.parallel.mesh import Degrees

from ..errors import UserError
from ..plan.fits import check_fp8

Fp8 = Literal["tensor", "delayed", "row", "block", "mx"]

_RECIPES: Mapping[str, Fp8Recipe] = MappingProxyType(
    {
        "tensor": Fp8Recipe(scaling="tensor"),
        "delayed": Fp8Recipe(scaling="tensor", delayed=True),
        "row": Fp8Recipe(scaling="row"),
        "block": Fp8Recipe(scaling="block"),
        "mx": Fp8Recipe(scaling="mx"),
    }
)


def recipe(name: str | None) -> Fp8Recipe | None:
    """Return the recipe of a choice; `None` for none.

    Raises:
        UserError: If there is no such choice.
    """
    if name is not None and name not in _RECIPES:
        raise UserError(f"fp8 must be one of {', '.join(_RECIPES)} or None, got {name!r}")
    return None if name is None else _RECIPES[name]


def check_sizes(name: str | None, architecture: Architecture, degrees: Degrees) -> None:
    """Refuse widths that the choice cannot serve.

    Raises:
        UserError: In one sentence.
    """
    if (chosen := recipe(name)) is not None:
        try:
            check_fp8(architecture, degrees, chosen)
        except ValueError as error:
            raise UserError(str(error)) from None


def check_device(name: str | None, device: torch.device) -> None:
    """Refuse a device without the matrix units; a CPU emulates them, slowly.

    Raises:
        UserError: In one sentence.
    """
    if (chosen := recipe(name)) is None or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if lack := device_lack(capability, chosen.scaling, None):
        other = "--fp8 block" if chosen.scaling == "mx" and capability >= FIRST else "another GPU"
        raise UserError(f"fp8 {name}: {lack.partition(': ')[0]}: take {other}, or leave fp8 out")
