"""Megatron-Core's distributed checkpoints, read into our pieces.

    names = gpt_names(heads=32, kv_heads=8, head_dim=128, hidden=14336)
    read_megatron_checkpoint(folder, parameters, layouts, names=names)

In Megatron's fused qkv the rows of a key/value group stand together: its H/G query heads, its key,
its value. In fc1 all rows of the gate come first, then those of up. Layers are stacked along a new
dimension 0, or named one by one; both are read. Neither torch_dist's metadata nor its tensors are
unpickled: see `pickled`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.checkpoint.boxes import Box, meet, uncovered, within
from warploom.parallel.sharding import Layout, Piece

from .torch_dist import index, pieces


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a logical tensor that lie together in a tensor of Megatron's.

    Attributes:
        keys: Names that the tensor may have; one of them is there.
        layer: Its place in a tensor that stacks the layers; `None` where nothing stacks.
        start: First row in the logical tensor.
        stop: One past the last.
        at: First row in Megatron's.
    """

    keys: tuple[str, ...]
    layer: int | None
    start: int
    stop: int
    at: int


Names = Callable[[str], list[Part]]


def gpt_names(*, heads: int, kv_heads: int, head_dim: int, hidden: int) -> Names:
    """Return where Megatron's GPT keeps each tensor of a Hugging Face Llama or Qwen3.

    Args:
        heads: Query heads H.
        kv_heads: Key/value heads G.
        head_dim: Head dimension K.
        hidden: Feed-forward width F.
    """
    each = heads // kv_heads
    group = (each + 2) * head_dim
    top = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    simple = {
        "input_layernorm": (
            "self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
        ),
        "post_attention_layernorm": (
            "mlp.linear_fc1.layer_norm_weight",
            "pre_mlp_layernorm.weight",
        ),
        "self_attn.o_proj": ("self_attention.linear_proj.weight",),
        "self_attn.q_norm": ("self_attention.q_layernorm.weight",),
        "self_attn.k_norm": ("self_attention.k_layernorm.weight",),
        "mlp.down_proj": ("mlp.linear_fc2.weight",),
    }
    fused = {"q_proj": (0, each), "k_proj": (each, 1), "v_proj": (each + 1, 1)}
    everything = 1 << 62

    def rows(inner: str) -> tuple[tuple[str, ...], list[tuple[int, int, int]]]:
        if inner in simple:
            return simple[inner], [(0, everything, 0)]
        part = inner.rpartition(".")[2]
        if part in fused:
            first, count = fused[part]
            size = count * head_dim
            at = [(g * size, (g + 1) * size, g * group + first * head_dim) for g in range(kv_heads)]
            return ("self_attention.linear_qkv.weight",), at
        if part in ("gate_proj", "up_proj"):
            return ("mlp.linear_fc1.weight",), [(0, hidden, hidden * (part == "up_proj"))]
        raise ValueError(f"a GPT of Megatron has no tensor for model.layers.N.{inner}.weight")

    def names(name: str) -> list[Part]:
        if name in top:
            return [Part((top[name],), None, 0, everything, 0)]
        words = name.split(".")
        if words[:2] != ["model", "layers"] or words[-1] != "weight":
            raise ValueError(f"a GPT of Megatron has no tensor for {name}")
        keys, found = rows(".".join(words[3:-1]))
        return [Part(keys, int(words[2]), *place) for place in found]

    return names


def _place(part: Part, known: Mapping[str, Any], name: str) -> tuple[str, tuple[int, ...]]:
    """Return the tensor of a part, and the index of its layer if it stacks them."""
    for key in part.keys:
        if part.layer is None and key in known:
            return key, ()
        if f"decoder.layers.{key}" in known:
            return f"decoder.layers.{key}", (part.layer or 0,)
        if f"decoder.layers.{part.layer}.{key}" in known:
            return f"decoder.layers.{part.layer}.{key}", ()
    raise ValueError(
        f"{name} must lie in one of {', '.join(part.keys)}; the checkpoint has none of these"
    )


def _moved(box: Box, rows: int, lead: tuple[int, ...]) -> Box:
    (a, b, step), *rest = box
    return (*((i, i + 1, 1) for i in lead), (a + rows, b + rows, step), *rest)


def _requests(
    piece: Piece, parts: list[Part], known: Mapping[str, Any]
) -> Iterator[tuple[str, Box, int, int]]:
    """Yield what a piece needs: name, box there, rows that it is moved by, leading dimensions."""
    for part in parts:
        key, lead = _place(part, known, piece.name)
        rest = tuple((0, n, 1) for n in piece.shape[1:])
        both = meet(piece.slices, ((part.start, min(part.stop, piece.shape[0]), 1), *rest))
        if both is not None:
            shift = part.at - part.start
            yield key, _moved(both, shift, lead), shift, len(lead)


@torch.no_grad()
def read_megatron_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    *,
    names: Names,
    prefix: str = "",
) -> None:
    """Fill local tensors from a distributed checkpoint of Megatron-Core, of any parallel degrees.

    Args:
        folder: Where its `.metadata` is.
        tensors: Local tensors by path, overwritten.
        layouts: Their layouts, by the same paths, in the names that `names` takes.
        names: Where a logical tensor lies, such as `gpt_names(...)`.
        prefix: What the checkpoint's names begin with, such as `model.`.

    Raises:
        ValueError: If a tensor is not there, or not all of it; the tensors may then be partly
            filled.
    """
    folder = Path(folder)
    known = {k.removeprefix(prefix): v for k, v in index(folder).items() if k.startswith(prefix)}
    asked: dict[str, list[tuple[Box, int, int, Piece, Tensor]]] = {}
    for path, layout in layouts.items():
        for piece in layout.pieces:
            for key, box, shift, lead in _requests(piece, names(piece.name), known):
                local = piece.of_local(tensors[path])
                asked.setdefault(key, []).append((box, shift, lead, piece, local))
    for key, requests in asked.items():
        if len(requests[0][0]) != len(known[key].shape):
            raise ValueError(f"{key} has the shape {known[key].shape} in {folder}: another model's")
        done: list[list[Box]] = [[] for _ in requests]
        boxes = [request[0] for request in requests]
        for number, both, values in pieces(folder, known[key], boxes):
            box, shift, lead, piece, local = requests[number]
            logical = _moved(both[lead:], -shift, ())
            target = local[within(logical, piece.slices)]
            target.copy_(values.view(target.shape))
            done[number].append(both)
        for box, parts in zip(boxes, done, strict=True):
            if missing := uncovered(box, parts):
                raise ValueError(f"{missing} elements of {key} at {box} are not in {folder}")
