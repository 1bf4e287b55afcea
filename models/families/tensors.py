"""Where logical tensors lie in those of the Hub.

A family's table says it by the name of the Hub's tensor, with a `*` for each number, and what is to
be done to that tensor:

    model.layers.*.mlp.up_proj                       nothing: they are the same
    transformer.h.*.attn.c_proj.weight.T             swap its two dimensions
    transformer.h.*.attn.c_attn.weight[:, +1].T      take the second of those that stand side by
                                                     side along a dimension, then swap
    ...experts.gate_up_proj[*, :, 0%2].T             take one expert's, there every second column
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from warploom.parallel.sharding import Slice

_PLACE = re.compile(r"(?P<name>[^\[]*?)(\[(?P<index>.*)\])?(?P<swap>\.T)?")


def rename(names: Mapping[str, str], logical: str) -> str:
    """Look a logical name up: whole, or without its last word.

    Raises:
        KeyError: If the table does not have it.
    """
    key = re.sub(r"(?<=\.)\d+(?=\.)", "*", logical)
    module, _, leaf = key.rpartition(".")
    found = names[key] if key in names else f"{names[module]}.{leaf}"
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", logical))
    return re.sub(r"\*", lambda _: next(numbers), found)


@dataclass(frozen=True, slots=True)
class Part:
    """A logical tensor in one of the Hub.

    Attributes:
        logical: Its name.
        slices: Which slice of the Hub's tensor it is, for each dimension of that.
        dropped: Dimensions, of one element there, that the logical tensor does not have.
        swapped: Whether the two that it has are in the other order.
    """

    logical: str
    slices: tuple[Slice, ...]
    dropped: tuple[int, ...] = ()
    swapped: bool = False

    def within(self, own: tuple[Slice, ...]) -> tuple[Slice, ...]:
        """Return the slice of the Hub's tensor that is a slice of the logical one."""
        inner = iter(own[::-1] if self.swapped else own)
        return tuple(
            base if dim in self.dropped else _slice_of(base, next(inner))
            for dim, base in enumerate(self.slices)
        )

    def as_stored(self, logical: Tensor) -> Tensor:
        """View the logical tensor, or a slice of it, with the dimensions of the Hub's."""
        view = logical.t() if self.swapped else logical
        for dim in self.dropped:
            view = view.unsqueeze(dim)
        return view


def _slice_of(base: Slice, own: Slice) -> Slice:
    start, stop, step = own
    begin = base[0] + start * base[2]
    return begin, begin + (stop - 1 - start) * base[2] + 1, step * base[2]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the Hub: its shape, and the logical tensors that it is made of."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def plain(self) -> bool:
        """Whether it is a logical tensor as it is."""
        return len(self.parts) == 1 and not self.parts[0].swapped and not self.parts[0].dropped


def stored_tensors(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """Return the Hub's tensors that hold the logical ones, in their order.

    Args:
        names: The table of a family.
        shapes: Of the logical tensors, by name.
    """
    found: dict[str, list[tuple[str, list[str], bool]]] = {}
    for logical, shape in shapes.items():
        place = _PLACE.fullmatch(rename(names, logical))
        assert place is not None
        index = re.split(r", *", place["index"] or ", ".join(":" * len(shape)))
        found.setdefault(place["name"], []).append((logical, index, bool(place["swap"])))
    return {name: _together(items, shapes) for name, items in found.items()}


def _together(
    items: list[tuple[str, list[str], bool]], shapes: Mapping[str, tuple[int, ...]]
) -> Stored:
    """Lay out a tensor of the Hub, dimension by dimension."""
    sizes = [iter(shapes[name][::-1] if swap else shapes[name]) for name, _, swap in items]
    shape, columns = [], []
    for words in zip(*(index for _, index, _ in items), strict=True):
        own = {w: 1 if w.isdigit() else next(s) for w, s in zip(words, sizes, strict=True)}
        total, slices = _lay(own)
        shape.append(total)
        columns.append([slices[word] for word in words])
    parts = [
        Part(name, tuple(slices), tuple(d for d, word in enumerate(index) if word.isdigit()), swap)
        for (name, index, swap), *slices in zip(items, *columns, strict=True)
    ]
    return Stored(tuple(shape), tuple(parts))


def _lay(sizes: Mapping[str, int]) -> tuple[int, dict[str, Slice]]:
    """Return the size of a dimension of the Hub's tensor, and the slice that each word names."""
    found: dict[str, Slice] = {}
    total = 0
    for word, size in sorted(sizes.items()):
        first, _, step = word.partition("%")
        if word.startswith("+"):  # one after the other
            found[word] = (total, total + size, 1)
        elif step:
            found[word] = (int(first), int(first) + (size - 1) * int(step) + 1, int(step))
        else:
            begin = int(first) if word.isdigit() else 0
            found[word] = (begin, begin + size, 1)
        total += size
    return total, found
