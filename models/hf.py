"""Hugging Face folders (config.json, safetensors, tokenizer) in and out, tensor by tensor.

`load` reads on each rank only the slices that it holds, straight into the parameters where dtype
and layout allow it. `save` puts the logical tensors together one at a time, reads what it has
written, and gives the folder its name when it is whole, or not at all.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.collectives import Group, gather_json
from warploom.parallel.expert import bias_entries
from warploom.parallel.export import export
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Layout, Piece

from .decoder import Architecture, Decoder
from .families import Family, of_architecture, of_model_type
from .families.tensors import Part, Stored, stored_tensors
from .hf_files import (
    DTYPES,
    Entry,
    Reader,
    Writer,
    entries,
    flush,
    listed,
    read_json,
    write_json,
)

__all__ = ["architecture", "load", "load_into", "save", "stored_shapes"]

_TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.*")
_SHARD_BYTES = 5_000_000_000
_PROBE = 16  # tokens


def architecture(folder: str | Path) -> Architecture:
    """Read the architecture of a folder's config.json.

    Raises:
        FileNotFoundError: If there is no config.json.
        ValueError: If no family has its `model_type`, a field is missing, or fields are there that
            cannot be honoured; all of them are named, with what they would change.
    """
    config = read_json(Path(folder) / "config.json")
    family = of_model_type(config.get("model_type", ""))
    try:
        return family.architecture(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json must have {error.args[0]!r}") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Decoder:
    """Build a decoder from a Hugging Face folder.

    Args:
        folder: Holds config.json and model.safetensors, or its parts with their index.
        mesh: Groups of ranks; `None` for one rank.
        dtype: Of the parameters; `None` for that of the file.
        device: Where the parameters go; `None` for the CPU.
        options: Others of `Decoder`, such as `recompute` and `z_loss`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the config cannot be honoured; tensors are missing, unknown, of another shape
            (all are listed) or hold NaN or infinity; or the tokenizer has more ids than the
            vocabulary.
    """
    made = architecture(folder)
    check_tokenizer(Path(folder), made)
    if dtype is None:
        dtype = _stored_dtype(folder, made)
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
    found = _checked(model.architecture, folder)
    for path, layout, tensor in _held(model):
        covered = sum(math.prod(piece.sizes) for piece in layout.pieces)
        if covered < tensor.numel():
            tensor.zero_()  # padding
    with Reader() as reader:
        for name, entry, part, piece, target in _targets(model, found):
            own = target.is_contiguous() and target.device.type == "cpu"
            own &= target.dtype == DTYPES[entry.kind] and all(s[2] == 1 for s in piece)
            for rows, block in reader.blocks(entry, piece, target if own else None):
                _refuse_nan(block, name, entry)
                if not own:
                    target[rows if entry.shape else ...].copy_(block)
