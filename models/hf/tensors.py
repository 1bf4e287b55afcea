"""Which tensors a folder must hold, and what of them a rank holds."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from warploom.parallel.expert import bias_entries
from warploom.parallel.sharding import Layout, Slice

from ..architecture import Architecture
from ..decoder import Decoder
from ..families import Family, of_architecture
from ..families.tensors import Stored, stored_tensors
from .files import DTYPES, Entry, Reader, entries, listed

_CHECKED = 1 << 16  # elements


def stored_tensors_of(made: Architecture, family: Family) -> dict[str, Stored]:
    """Return the tensors that a folder with a model of this architecture holds, in its order."""
    layouts = (layout for _, layout, _ in held(Decoder(made, device="meta")))
    shapes = {piece.name: piece.shape for layout in layouts for piece in layout.pieces}
    return stored_tensors(family.names, shapes)


def held(model: Decoder) -> list[tuple[str, Layout, Tensor]]:
    """List what of a model goes to the Hub: parameters, and the routers' biases."""
    parameters = dict(model.named_parameters())
    found = [(path, made, parameters[path]) for path, made in model.logical_layouts().items()]
    biases = [(e.layout.pieces[0].name, e.layout, e.tensor) for e in bias_entries(model)]
    return found + biases


def checked(made: Architecture, folder: str | Path) -> tuple[dict[str, Stored], dict[str, Entry]]:
    """Compare names and shapes of a folder with what the architecture needs; list every fault."""
    held_there = entries(folder)
    if made.layers > len(held_there):
        raise ValueError(
            f"{folder} has {len(held_there)} tensors: too few for {made.layers} layers"
        )
    family = of_architecture(made)
    needed, found = stored_tensors_of(made, family), {}
    for name, entry in held_there.items():
        full = family.prefix + name
        found[full if name not in needed and full in needed else name] = entry
    missing = [name for name in needed if name not in found]
    unknown = [n for n in found if n not in needed and not _redundant(n, made, family, found)]
    shapes = [
        f"{name} is {found[name].shape}, must be {stored.shape}"
        for name, stored in needed.items()
        if name in found and found[name].shape != stored.shape
    ]
    kinds = [f"{n} is {e.kind}" for n, e in found.items() if n in needed and e.kind not in DTYPES]
    faults = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": shapes,
        f"of other dtypes than {', '.join(DTYPES)}": kinds,
    }
    if any(faults.values()):
        texts = [f"{title} ({len(n)}): {listed(n)}" for title, n in faults.items() if n]
        ahead = tuple(f"blocks.{n}." for n in range(made.layers, made.layers + made.predict))
        further = [n for n, s in needed.items() if s.parts[0].logical.startswith(ahead)]
        if further and missing == further:
            words = "set num_nextn_predict_layers to 0 in its config.json to load it without"
            texts.append(f"{words} the blocks that predict further tokens")
        raise ValueError(f"{folder} does not hold this model: tensors {'; '.join(texts)}")
    return needed, found


def _redundant(name: str, made: Architecture, family: Family, found: dict[str, Entry]) -> bool:
    """Whether an extra tensor says nothing, such as a tied head that equals its twin."""
    if name.endswith(family.skipped):
        return True
    twin = found.get(family.rename("embedding.weight"))
    if not made.tied or name != family.rename("head.weight") or twin is None:
        return False
    if (found[name].kind, found[name].shape) != (twin.kind, twin.shape):
        return False
    with Reader() as a, Reader() as b:
        pairs = zip(a.blocks(found[name]), b.blocks(twin), strict=True)
        return all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def targets(
    model: Decoder, checked: tuple[dict[str, Stored], dict[str, Entry]]
) -> list[tuple[str, Entry, tuple[Slice, ...], Tensor]]:
    """List what this rank holds of each stored tensor, in the order of the files.

    Name, entry, the slice that is held, and a view of it in the model with the Hub's dimensions.
    """
    needed, found = checked
    parts = {part.logical: (name, part) for name, s in needed.items() for part in s.parts}
    items = []
    for _, layout, tensor in held(model):
        for piece in layout.pieces:
            name, part = parts[piece.name]
            view = part.as_stored(piece.of_local(tensor.detach()))
            items.append((name, found[name], part.within(piece.slices), view))
    return sorted(items, key=lambda item: (item[1].file, item[1].begin))


def refuse_nan(block: Tensor, name: str, entry: Entry) -> None:
    """Raise `ValueError` where a block that was read is not finite."""
    if not _finite(block):
        wrong = int((~block.isfinite()).sum())
        raise ValueError(
            f"{name} in {entry.file} must hold finite weights; {wrong} of {block.numel()} elements "
            "that were read together are NaN or infinite: the file is damaged, or training diverged"
        )


def _finite(block: Tensor) -> bool:
    """Whether no exponent is all ones: on this thread alone, while the block is in its cache."""
    kind = np.dtype(f"u{block.element_size()}")
    infinite = torch.tensor([float("inf")], dtype=block.dtype).view(torch.uint8).numpy().view(kind)
    bits = block.contiguous().view(-1).view(torch.uint8).numpy().view(kind)
    sign = kind.type(np.iinfo(kind).max >> 1)
    parts = (bits[at : at + _CHECKED] for at in range(0, len(bits), _CHECKED))
    return all((part & sign).max() < infinite for part in parts)


def biases_of(made: Architecture) -> set[str]:
    """Name the routers' biases at the Hub, which are in float32 whatever the others are in."""
    entries = bias_entries(Decoder(made, device="meta"))
    return {of_architecture(made).rename(entry.layout.pieces[0].name) for entry in entries}


def stored_dtype(folder: str | Path, made: Architecture) -> torch.dtype:
    """Return the dtype that all tensors of a folder share; `ValueError` if there is none."""
    apart, family = biases_of(made), of_architecture(made)
    named = entries(folder).items()
    used = {e.kind for n, e in named if n not in apart and not n.endswith(family.skipped)}
    kinds = sorted(used)
    if len(kinds) != 1 or kinds[0] not in DTYPES:
        raise ValueError(
            f"tensors must share one dtype of {', '.join(DTYPES)} to be loaded as they are; found "
            f"{', '.join(kinds)}: pass dtype"
        )
    return DTYPES[kinds[0]]
