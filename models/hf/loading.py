"""A decoder from a folder."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Slice

from ..decoder import Decoder
from .files import DTYPES, Entry, Reader
from .tensors import checked, held, refuse_nan, stored_dtype, targets
from .texts import architecture, check_tokenizer

_THREADS = 2  # one waits for the disk or for pages of memory, one looks for NaN


def load(
    folder: str | Path, mesh: Mesh | None = None, *, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, **options: Any,
) -> Decoder:  # fmt: skip
    """Build a decoder from a Hugging Face folder.

    Args:
        folder: Holds config.json and model.safetensors, or its parts with their index.
        mesh: Groups of ranks; `None` for one rank.
        dtype: Of the parameters; `None` for that of the file.
        device: Where the parameters go; `None` for the CPU.
        options: Others of `Decoder`, such as `recompute` and `z_loss`.

    Raises:
        FileNotFoundError: If a file is missing.
        TypeError: If `mesh`, `dtype` or another option is of another kind, such as a name.
        ValueError: If the config cannot be honoured; tensors are missing, unknown, of another shape
            (all are listed) or hold NaN or infinity; or the tokenizer has more ids than the
            vocabulary.
    """
    made = architecture(folder)
    check_tokenizer(Path(folder), made)
    checked(made, folder)  # before memory is taken
    if dtype is None:
        dtype = stored_dtype(folder, made)
    model = Decoder(made, mesh=mesh, dtype=dtype, device=device or "cpu", **options)
    load_into(model, folder)
    return model


@torch.no_grad()
def load_into(model: Decoder, folder: str | Path) -> None:
    """Overwrite the parameters of `model`, and its routers' biases, with those of a folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If tensors are missing, unknown or of another shape: nothing is changed then. If
            one holds NaN or infinity: then some are changed.
    """
    found = checked(model.architecture, folder)
    for _, layout, tensor in held(model):
        covered = sum(math.prod(piece.sizes) for piece in layout.pieces)
        if covered < tensor.numel():
            tensor.zero_()  # padding
    with Reader() as reader, ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda item: _fill(reader, *item), targets(model, found)):
            pass  # the first error is raised


def _fill(
    reader: Reader, name: str, entry: Entry, slices: tuple[Slice, ...], target: Tensor
) -> None:
    """Read a slice of a stored tensor into a view of the model, straight where it can be."""
    own = target.is_contiguous() and target.device.type == "cpu" and not entry.scales
    own &= target.dtype == DTYPES[entry.kind] and all(s[2] == 1 for s in slices)
    for rows, block in reader.blocks(entry, slices, target if own else None):
        refuse_nan(block, name, entry)
        if not own:
            target[rows if entry.shape else ...].copy_(block)
