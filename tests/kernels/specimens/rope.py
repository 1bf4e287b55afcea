"""Specimens of `kernels/rope`."""

import functools

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.rope import Yarn, rotary, rotary_reference, rotary_tables


def _draw(draw, rows, width, partial=False):
    """Heads of about `width` dimensions; with `partial` about half of them turn."""
    pairs = (width + 3) // 4 if partial else (width + 1) // 2
    head_dim = width + width % 2
    few = 1 if rows > 10**6 else rows  # so many that nobody touches them: one angle for all
    positions = torch.arange(few, device=draw.device)
    cos, sin = rotary_tables(positions, 2 * pairs, base=1e4, scaling=Yarn(4.0, 64))
    cos, sin = (t if few == rows else t.expand(rows, pairs) for t in (cos, sin))
    q, k = draw(rows, 2, head_dim), draw(rows, 1, head_dim, seed=1)
    return (q, k), {"cos_TJ": cos, "sin_TJ": sin}


def _in_place(q, k, **rest):
    """Write over slices of a fused projection, of which the gradient is asked."""
    fused = torch.cat([q, k], 1)
    return rotary(fused[:, :2], fused[:, 2:], inplace=True, **rest)


def _plain(q, k, *, cos_TJ, sin_TJ, interleaved=False):
    cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos_TJ, sin_TJ))
    turned = 2 * cos.shape[2]

    def turn(x):
        a, b = (x[..., 0:turned:2], x[..., 1:turned:2]) if interleaved else (
            x[..., :turned].chunk(2, -1)
        )  # fmt: skip
        both = a * cos - b * sin, b * cos + a * sin
        head = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
        return torch.cat([head, x[..., turned:]], -1)

    return turn(q), turn(k)


def _specimen(name, run=rotary, interleaved=False, partial=False, training=((8192, 128),)):
    pairs = {"interleaved": True} if interleaved else {}
    return Specimen(
        name=name,
        op="rotary",
        draw=functools.partial(_draw, partial=partial),
        run=functools.partial(run, **pairs),
        truth=lambda q, k, *, cos_TJ, sin_TJ: rotary_reference(
            q, k, cos_TJ.double(), sin_TJ.double(), **pairs
        ),
        plain=functools.partial(_plain, **pairs),
        rows=(0, 1),
        shapes=((0, 6), (1, 1), (5, 6), (33, 129)),
        training=training,
        huge=run is rotary,
        second=None,  # is right: the backward is a rotation
    )


SPECIMENS = (
    _specimen("rotary", training=((8192, 64), (8192, 128), (8192, 192))),
    _specimen("rotary_interleaved", interleaved=True),
    _specimen("rotary_partial", partial=True),
    _specimen("rotary_in_place", _in_place, interleaved=True, partial=True),
)
