"""A model under muP as one of the standard parametrisation, all that a config.json can say.

The logits' factor 1 / m goes into the last norm, the scores' 8 / sqrt(K) into the queries or their
norm. What comes out is the same but for one rounding of these weights, none where m and K are
powers of 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import Attention
from ..decoder import Decoder
from ..norm import RMSNorm


@contextmanager
def standard(model: Decoder) -> Iterator[None]:
    """Have the weights say what muP multiplies by, while this is open; then they are as before."""
    a, kept = model.architecture, list[tuple[Tensor, Tensor]]()

    def scale(x: Tensor, by: float, plus: float = 0.0) -> None:
        kept.append((x, x.clone()))
        x.add_(plus).mul_(by).sub_(plus)

    def scale_norm(norm: RMSNorm, by: float) -> None:
        for x in norm.parameters():
            scale(x, by, float(norm.plus_one))

    mixers = [m for m in model.modules() if isinstance(m, Attention) and a.mup_base]
    scales = [m.options.pop("scale", None) for m in mixers if a.attention_scale is None]
    with torch.no_grad():
        if a.mup_base and hasattr(model, "norm"):
            scale_norm(model.norm, 1 / a.multiple)
        for m in mixers if scales else ():
            if m.q_norm is not None:
                scale_norm(m.q_norm, 8 / a.head_dim**0.5)
            else:
                for p in m.qkv.parameters():
                    scale(p[: m.widths[0]], 8 / a.head_dim**0.5)
    model.architecture = replace(a, mup_base=None)
    try:
        yield
    finally:
        model.architecture = a
        with torch.no_grad():
            for x, before in kept:
                x.copy_(before)
        for m, value in zip(mixers if scales else (), scales, strict=True):
            m.options["scale"] = value
