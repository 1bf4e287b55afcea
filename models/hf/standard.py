"""A model under muP as one of the standard parametrisation, all that a config.json can say.

The logits' factor 1 / m goes into the last norm, and into that of each further token; the scores'
8 / sqrt(K) into the queries or their norm. muP multiplies nothing else. What comes out is the same
but for one rounding of these weights, none where m and K are powers of 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..architecture import Architecture
from ..attention import Attention, score_options
from ..decoder import Decoder
from ..latent import LatentAttention
from ..norm import RMSNorm
from ..predict import Prediction


@contextmanager
def standard(model: Decoder) -> Iterator[None]:
    """Have the weights say what muP multiplies by, while this is open; then they are as before."""
    a, kept = model.architecture, list[tuple[Tensor, Tensor]]()
    ends = [m for m in model.modules() if isinstance(m, Decoder | Prediction)]
    mixers = [m for m in model.modules() if isinstance(m, Attention | LatentAttention)]

    def scale(x: Tensor, by: float, plus: float = 0.0) -> None:
        kept.append((x, x.clone()))
        x.add_(plus).mul_(by).sub_(plus)

    def scale_norm(norm: RMSNorm, by: float) -> None:
        for x in norm.parameters():
            scale(x, by, float(norm.plus_one))

    def describe(a: Architecture) -> None:
        model.architecture = a
        for m in mixers:
            m.options = score_options(a, m.kind)

    try:
        with torch.no_grad():
            for end in ends:
                if hasattr(end, "norm"):
                    scale_norm(end.norm, 1 / a.multiple)
            for m in mixers if a.attention_scale is None else ():
                by = 8 / a.head_dim**0.5
                if m.q_norm is not None:
                    scale_norm(m.q_norm, by)
                elif isinstance(m, LatentAttention):
                    scale(m.q.weight, by)
                else:
                    for p in m.qkv.parameters():
                        scale(p[: m.widths[0]], by)
        describe(replace(a, mup_base=None))
        yield
    finally:
        describe(a)
        with torch.no_grad():
            for x, before in kept:
                x.copy_(before)
