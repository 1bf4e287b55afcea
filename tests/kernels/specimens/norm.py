"""Specimens of `kernels/norm`."""

import functools

import torch
import torch.nn.functional as F
from tests.kernels.specimen import SHAPES, Specimen

from warploom.kernels.norm import (
    layer_norm,
    layer_norm_fp8,
    layer_norm_reference,
    qk_norm_rotary,
    qk_norm_rotary_reference,
    rms_norm,
    rms_norm_fp8,
    rms_norm_reference,
)
from warploom.kernels.quant import Fp8, fp8_quantize
from warploom.kernels.rope import rotary_tables

_WIDTHS = (64, 128, 576, 1000, 2048, 4096, 8192, 16384)
# One element has no variance: PyTorch's own backward, the reference, is not exactly 0 there.
_SHAPES = {"rms_norm": SHAPES, "layer_norm": ((1, 2), *(s for s in SHAPES if s[1] > 1))}
_OPS = {
    "rms_norm": (rms_norm, rms_norm_fp8, rms_norm_reference),
    "layer_norm": (layer_norm, layer_norm_fp8, layer_norm_reference),
}


def _draw(draw, rows, width, shape):
    """Draw x, weight and what the form `shape` has: a bias, a residual."""
    x, weight = draw(rows, width), draw(width, seed=1)
    bias = (draw(width, seed=2),) if "bias" in shape else ()
    residual = (draw(rows, width, seed=3),) if "residual" in shape else ()
    return (x, weight, *bias, *residual), {}


def _call(fn, inputs, shape, **rest):
    """Call a norm; what is quantised comes back as its value and scale."""
    if "residual" in shape:
        *inputs, residual = inputs
        rest["residual"] = residual
    out = fn(*inputs, **rest)
    y, *h = (out,) if isinstance(out, Fp8 | torch.Tensor) else out
    return (*((y.dequantize(), y.scale) if isinstance(y, Fp8) else (y,)), *h)


def _through(y, scaling):
    """Quantise y, and let the gradient pass straight through."""
    q = fp8_quantize(y.float(), backend="reference", **scaling)
    return y + (q.dequantize(y.dtype).detach() - y).detach(), q.scale


def _truth(reference, shape, scaling):
    """Normalise the sum as it was rounded to the dtype of the input."""

    def truth(*inputs, rounded):
        h, *rest = inputs
        if "residual" in shape:
            *rest, residual = rest
            total = h + residual
            h = total + ((h.to(rounded) + residual.to(rounded)).to(h.dtype) - total).detach()
        y = reference(h, *rest)[0]
        parts = _through(y, scaling) if scaling else (y,)
        return (*parts, h) if "residual" in shape else parts

    return truth


def _plain(name, shape, scaling):
    def plain(x, weight, *rest):
        h = x + rest[-1] if "residual" in shape else x
        if name == "layer_norm":
            y = F.layer_norm(h, weight.shape, weight, rest[0] if "bias" in shape else None)
        else:
            y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * weight
        parts = _through(y, scaling) if scaling else (y,)
        return (*parts, h) if "residual" in shape else parts

    return plain


def _specimen(name, op, shape=(), widths=_WIDTHS, **scaling):
    plain, fp8, reference = _OPS[op]
    fn = functools.partial(fp8, **scaling) if scaling else plain
    return Specimen(
        name=name,
        op=op,
        draw=functools.partial(_draw, shape=shape),
        run=lambda *inputs, backend=None: _call(fn, inputs, shape, backend=backend),
        truth=_truth(reference, shape, scaling),
        plain=_plain(op, shape, scaling),
        shapes=_SHAPES[op],
        training=tuple((8192, width) for width in widths),
        huge=not scaling,  # a value that is read again is touched
        rows=tuple(range(1 + bool(scaling) + ("residual" in shape))),
        **({"dtypes": (torch.bfloat16, torch.float16)} if scaling else {}),
        **({"backends": ("triton", "cuda")} if plain is rms_norm and not scaling else {}),
    )


def _draw_heads(draw, rows, width):
    """Two query heads and a key head, of about `width` dimensions."""
    head_dim = width + width % 2
    few = 1 if rows > 10**6 else rows  # so many that nobody touches them: one angle for all
    tables = rotary_tables(torch.arange(few, device=draw.device), head_dim, base=1e4)
    cos, sin = (t if few == rows else t.expand(rows, -1) for t in tables)
    q, k = draw(rows, 2, head_dim), draw(rows, 1, head_dim, seed=1)
    weights = draw(head_dim, seed=2), draw(head_dim, seed=3)
    return (q, k, *weights), {"cos_TJ": cos, "sin_TJ": sin}


def _true_heads(*inputs, cos_TJ, sin_TJ):
    return qk_norm_rotary_reference(*inputs, cos_TJ.double(), sin_TJ.double())


def _plain_heads(q, k, q_weight, k_weight, *, cos_TJ, sin_TJ):
    cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos_TJ, sin_TJ))

    def heads(x, weight):
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        a, b = n.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return heads(q, q_weight), heads(k, k_weight)


SPECIMENS = (
    Specimen(
        name="qk_norm_rotary",
        op="qk_norm_rotary",
        draw=_draw_heads,
        run=qk_norm_rotary,
        truth=_true_heads,
        plain=_plain_heads,
        shapes=((0, 6), (1, 2), (5, 6), (33, 129)),
        training=((8192, 128), (8192, 64), (8192, 256)),
        rows=(0, 1),
    ),
    _specimen("rms_norm", "rms_norm"),
    _specimen("rms_norm_residual", "rms_norm", ("residual",)),
    _specimen("rms_norm_fp8_row", "rms_norm", widths=(4096, 16384), scaling="row"),
    _specimen(
        "rms_norm_fp8_block",
        "rms_norm",
        ("residual",),
        widths=(576, 4096, 16384),
        scaling="block",
        power_of_two=True,
    ),
    _specimen("layer_norm", "layer_norm", ("bias",)),
    _specimen("layer_norm_residual", "layer_norm", ("residual",), widths=(768, 4096, 8192)),
    _specimen(
        "layer_norm_fp8_block",
        "layer_norm",
        ("bias", "residual"),
        widths=(4096, 16384),
        scaling="block",
    ),
)
