"""What a decoder costs: exact parameters, floating-point operations a token.

FLOPs are of the model, not of the machine: two a multiply-add of each matrix product, three times
the forward for a training step (the backward differentiates both factors), nothing for norms,
activations and softmax, nothing for what is computed twice. Causal attention counts half of the
square of a document's length; an embedding is a look-up and counts nothing; a head counts, tied or
not.

    forward a token = 2 x (matrix parameters) + 4 x L x H x K x context,   context = S / 2
                      + 4 x elements of the states, of layers that have some

Shapes: T tokens, S sequence, D width, F feed-forward width, H query heads, G key/value heads, K
head dimension, V vocabulary, L layers, R tensor-parallel ranks.

Source: Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1; Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B (MFU).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .architecture import Architecture, StateSpace
from .block import Block
from .predict import Prediction

_KINDS = ("norm", "router", "experts", "feed_forward", "attention", "embedding", "head")


def parameters(architecture: Architecture) -> dict[str, int]:
    """Return the number of parameters by kind of block; their sum is that of the model.

    Args:
        architecture: Sizes.

    Returns:
        `embedding` (and learned positions), `attention` (and what mixes tokens in its place),
        `feed_forward` (dense ones and shared experts), `router`, `experts`, `norm` and `head`, over
        all layers and ranks, without padding; a tied head has none of its own. Blocks that predict
        further tokens count, and their projections as `head`.
    """
    return {kind: sum(sizes) for kind, sizes in _counted(architecture).items()}


def _counted(a: Architecture) -> dict[str, tuple[int, int]]:
    """Count parameters by kind of block: those of matrices that multiply every token, the rest.

    One block of each sort is built, without memory.
    """
    found = {kind: (0, 0) for kind in _KINDS}
    alike = Counter((a.kind(n), a.routed(n)) for n in range(a.layers))
    first = {(a.kind(n), a.routed(n)): n for n in reversed(range(a.layers))}
    with torch.device("meta"):
        blocks = [(Block(a, first[sort], mesh=None), times) for sort, times in alike.items()]
        blocks += [(Prediction(a, a.layers, mesh=None), a.predict)] if a.predict else []
    ends = a.vocabulary * a.width
    norm = a.width * (2 if a.norm == "layer" else 1)
    positions = a.max_positions * a.width if a.positions == "learned" else 0
    found |= {"embedding": (0, ends + positions), "norm": (0, norm)}
    found["head"] = (0 if a.tied else ends, 0)
    for block, times in blocks:
        for path, p in block.named_parameters():
            kind = next((k for k in _KINDS if k in path), "head")
            (matrices, rest), size = found[kind], times * p.numel()
            found[kind] = (matrices + size, rest) if p.dim() > 1 else (matrices, rest + size)
    return found


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations a token.

    Attributes:
        forward: Of the forward pass.
        training: Of forward and backward.
    """

    forward: float
    training: float


def flops_per_token(
    architecture: Architecture, sequence: int, *, document_lengths: Sequence[int] | None = None,
    halve: bool = True,
) -> Flops:  # fmt: skip
    """Return the model's floating-point operations a token, averaged over the sequence.

    Args:
        architecture: Sizes.
        sequence: Tokens S of a row.
        document_lengths: Lengths of packed documents, in tokens; attention stays within each.
        halve: Whether causal attention counts half of the square; `False` counts what a kernel
            does that computes the masked half too.

    Raises:
        ValueError: If a length is not positive.
    """
    a = architecture
    lengths = [sequence] if document_lengths is None else list(document_lengths)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"sequence and document_lengths must be at least 1; got {lengths[:8]}")
    count = {kind: sizes[0] for kind, sizes in _counted(a).items()}
    if a.experts is not None:
        count["experts"] = count["experts"] * a.experts.top_k // a.experts.count
    matrices = sum(count.values()) + (a.predict + a.tied) * a.vocabulary * a.width
    both = a.head_dim + (a.head_dim if a.latent is None else a.latent.values)
    pairs = sum(_context(lengths, a, n, halve) for n in range(a.layers + a.predict))
    states = 0 if a.ssm is None else scan_flops(a.ssm)
    states *= sum(a.kind(n) == "ssm" for n in range(a.layers))
    forward = 2.0 * matrices + pairs * 2 * a.heads * both + states
    return Flops(forward, 3 * forward)


def scan_flops(ssm: StateSpace) -> int:
    """Return the floating-point operations a token of one layer's states, in the forward pass.

    A multiply-add to write each element (dt x B^T) and one to read it (S C), whatever a kernel does
    in chunks; the convolution counts with the matrices.

    Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060, equations 1 and 2.
    """
    return 4 * ssm.heads * ssm.head_dim * ssm.state


def state_bytes(ssm: StateSpace, itemsize: int) -> int:
    """Return the bytes that one layer keeps of a sequence in generation, over all ranks.

    Args:
        ssm: Sizes.
        itemsize: Bytes of an element in the model's dtype; states take four at least.
    """
    inner, both = ssm.heads * ssm.head_dim, 2 * ssm.groups * ssm.state
    inputs = (inner + both) * (ssm.convolution - 1)
    return inputs * itemsize + inner * ssm.state * max(itemsize, 4)


def _context(lengths: Sequence[int], a: Architecture, layer: int, halve: bool) -> float:
    """Return the keys that a token of a layer meets, on average."""
    kind = a.kind(layer)
    if kind == "ssm":
        return 0.0
    window = a.window if kind == "sliding" and halve else None
    w = [min(n, window or n) for n in lengths]
    pairs = sum(n * m - m * m / 2 if halve else n * m for n, m in zip(lengths, w, strict=True))
    return pairs / sum(lengths)


def mfu(tokens_per_s: float, training_flops_per_token: float, peak_flops: float) -> float:
    """Return the model-FLOPs utilisation: tokens/s x FLOPs a token / peak, dimensionless.

    Args:
        tokens_per_s: Of all devices together.
        training_flops_per_token: `flops_per_token(...).training`.
        peak_flops: FLOP/s of all devices together; say which peak beside the result.
    """
    return tokens_per_s * training_flops_per_token / peak_flops
