"""GGUF files: a dense Llama or Qwen3 of llama.cpp, its quantised weights as numbers again.

What is undone on the way: rows of each Llama query and key head lie there in the order of
neighbouring pairs, here in that of halves; a quantised weight is scale x integer (+ minimum).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (format, names of fields).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warploom.models.architecture import Architecture
from warploom.models.families import of_architecture
from warploom.models.families.tensors import rename
from warploom.models.hf.files import listed

from .gguf_tokenizer import write_tokenizer
from .source import tensors_of

_NAMES = MappingProxyType(
    {
        "embedding": "token_embd",
        "norm": "output_norm",
        "head": "output",
        "blocks.*.attention_norm": "blk.*.attn_norm",
        "blocks.*.attention.qkv.q": "blk.*.attn_q",
        "blocks.*.attention.qkv.k": "blk.*.attn_k",
        "blocks.*.attention.qkv.v": "blk.*.attn_v",
        "blocks.*.attention.q_norm": "blk.*.attn_q_norm",
        "blocks.*.attention.k_norm": "blk.*.attn_k_norm",
        "blocks.*.attention.out": "blk.*.attn_output",
        "blocks.*.feed_forward_norm": "blk.*.ffn_norm",
        "blocks.*.feed_forward.gate_up.gate": "blk.*.ffn_gate",
        "blocks.*.feed_forward.gate_up.up": "blk.*.ffn_up",
        "blocks.*.feed_forward.down": "blk.*.ffn_down",
    }
)
_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "layers": "block_count",
        "width": "embedding_length",
        "heads": "attention.head_count",
        "hidden": "feed_forward_length",
        "max_positions": "context_length",
        "norm_eps": "attention.layer_norm_rms_epsilon",
    }
)
_SAID = ("attention.value_length", "rope.dimension_count", "vocab_size")  # must agree with the rest
_ALWAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"llama": {}, "qwen3": {"qk_norm": "head"}}
)
_PAIRED = ("llama",)  # families whose heads lie there in pairs
_BLOCK = 16 << 20  # bytes of numbers made at once


class GGUF:
    """A GGUF file.

    Args:
        path: The file; of several, `ValueError`.
        tokenizer: Whether the file's own tokenizer is to be written.

    Raises:
        ImportError: If the `gguf` package is not installed.
        ValueError: If the file is damaged, of a family or with fields that are not known here, or
            its tensors do not fit its fields; all are named.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self._file = GGUFReader(path)
        except (ValueError, IndexError) as error:  # what numpy says of a file that ends too soon
            raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
        try:
            self._fields = {name: field.contents() for name, field in self._file.fields.items()}
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} has a field that cannot be read: {error}") from None
        self._found = {tensor.name: tensor for tensor in self._file.tensors}
        self._refuse_overlaps()
        self.architecture = self._read()
        self._stored = tensors_of(self.architecture)
        logical = {name: one.parts[0].logical for name, one in self._stored.items()}
        self._theirs = {name: rename(_NAMES, one) for name, one in logical.items()}
        self._check()
        ids = {
            f"{kind}_token_id": self._fields.get(f"tokenizer.ggml.{theirs}_token_id")
            for kind, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        self.ids = {name: value for name, value in ids.items() if value is not None}
        self.config = of_architecture(self.architecture).config(self.architecture) | self.ids

    def _refuse_overlaps(self) -> None:
        """Refuse a file in which a tensor begins where it cannot: it would be read as another's."""
        end = self._file.data_offset
        for tensor in sorted(self._found.values(), key=lambda t: (t.data_offset, t.n_bytes)):
            if tensor.data_offset < end or tensor.data_offset % self._file.alignment:
                raise ValueError(
                    f"{self.path} is damaged: {tensor.name} begins at byte {tensor.data_offset}, "
                    f"within what is before it, or at no multiple of {self._file.alignment}"
                )
            end = tensor.data_offset + tensor.n_bytes

    def _read(self) -> Architecture:
        family = str(self._fields.get("general.architecture"))
        if family not in _ALWAYS:
            raise ValueError(
                f"general.architecture must be one of {', '.join(_ALWAYS)}; {self.path} says "
                f"{family!r}"
            )
        own = {
            name.removeprefix(f"{family}."): value
            for name, value in self._fields.items()
            if name.startswith(f"{family}.")
        }
        if missing := [name for name in _FIELDS.values() if name not in own]:
            raise ValueError(f"{self.path} must have {', '.join(f'{family}.{n}' for n in missing)}")
        sizes = {ours: own.pop(theirs) for ours, theirs in _FIELDS.items()}
        width, heads = sizes["width"], sizes["heads"]
        embedding = self._found.get("token_embd.weight")
        if embedding is None:
            raise ValueError(f"{self.path} must hold token_embd.weight")
        made = Architecture(
            **sizes,
            **_ALWAYS[family],
            kv_heads=own.pop("attention.head_count_kv", heads),
            head_dim=own.pop("attention.key_length", width // heads),
            vocabulary=int(embedding.shape[1]),
            rope_base=own.pop("rope.freq_base", 10_000.0),
            tied="output.weight" not in self._found,
        )
        agree = dict(zip(_SAID, (made.head_dim, made.head_dim, made.vocabulary), strict=True))
        strange = {name: value for name, value in own.items() if agree.get(name) != value}
        if strange:
            listed = ", ".join(f"{family}.{name}={value!r}" for name, value in strange.items())
            raise ValueError(f"{self.path} has fields that cannot be honoured: {listed}")
        # float32 there: 1e-5 came as 9.99999974e-06
        return made if made.norm_eps == 0 else _rounded(made)

    def _check(self) -> None:
        """Compare names and shapes with what the architecture needs; list every fault."""
        needed = {theirs: self._stored[name].shape for name, theirs in self._theirs.items()}
        shapes = {name: tuple(map(int, t.shape))[::-1] for name, t in self._found.items()}
        faults = {
            "missing": [name for name in needed if name not in shapes],
            "unknown": [name for name in shapes if name not in needed],
            "of another shape": [
                f"{name} is {shapes[name]}, must be {shape}"
                for name, shape in needed.items()
                if shapes.get(name, shape) != shape
            ],
        }
        if any(faults.values()):
            said = "; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names)
            raise ValueError(f"{self.path} does not hold this model: tensors {said}")

    def dtype(self, name: str) -> torch.dtype:
        """Return bfloat16 or float16 where the file has it, and float32 for all else."""
        kind = self._found[self._theirs[name]].tensor_type.name
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Make a tensor's numbers, whole heads at a time; `ValueError` where one is not finite."""
        from gguf.quants import dequantize

        found = self._found[self._theirs[name]]
        shape = self._stored[name].shape
        pairs = self._fields["general.architecture"] in _PAIRED and self._theirs[name].endswith(
            ("attn_q.weight", "attn_k.weight")
        )
        step = self.architecture.head_dim if pairs else 1
        step *= max(1, _BLOCK // (4 * step * (shape[1] if len(shape) > 1 else 1)))
        rows = np.atleast_2d(found.data) if len(shape) > 1 else found.data
        for at in range(0, shape[0], step):
            made = np.array(dequantize(rows[at : at + step], found.tensor_type))  # a copy
            block = torch.from_numpy(made)
            if not block.isfinite().all():
                raise ValueError(f"{found.name} in {self.path} must be finite: the file is damaged")
            if pairs:
                half = self.architecture.head_dim // 2
                block = block.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
            yield block

    def texts(self, folder: Path) -> None:
        """Write the tokenizer that the file holds, and what ends a generation."""
        try:
            write_tokenizer(self._fields, self.path, folder, self.ids)
        except ValueError:
            raise
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise ValueError(f"{self.path} has a tokenizer that is damaged: {error!r}") from None


def _rounded(made: Architecture) -> Architecture:
    """Take numbers that were rounded to float32 for the shortest that round to the same."""
    from dataclasses import replace

    def shortest(value: float) -> float:
        return float(str(np.float32(value)))

    return replace(made, norm_eps=shortest(made.norm_eps), rope_base=shortest(made.rope_base))
