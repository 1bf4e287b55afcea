"""Specimens of `kernels/norm`."""

from tests.kernels.specimen import Specimen

from warploom.kernels.norm import rms_norm, rms_norm_reference

_TRAINING = tuple((8192, width) for width in (64, 128, 576, 1000, 2048, 4096, 8192, 16384))


def _draw(draw, rows, width):
    return (draw(rows, width), draw(width, seed=1)), {}


def _draw_residual(draw, rows, width):
    return (draw(rows, width), draw(width, seed=1), draw(rows, width, seed=2)), {}


def _truth(x, weight, residual=None, *, rounded):
    """Normalise the sum as it was rounded to the dtype of the input."""
    if residual is None:
        return rms_norm_reference(x, weight)[0]
    h = x + residual
    h = h + ((x.to(rounded) + residual.to(rounded)).to(h.dtype) - h).detach()
    return rms_norm_reference(h, weight)[0], h


def _plain(x, weight, residual=None):
    import torch

    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * weight
    return y if residual is None else (y, h)


SPECIMENS = (
    Specimen(
        name="rms_norm",
        op="rms_norm",
        draw=_draw,
        run=rms_norm,
        truth=_truth,
        plain=_plain,
        training=_TRAINING,
    ),
    Specimen(
        name="rms_norm_residual",
        op="rms_norm",
        draw=_draw_residual,
        run=lambda x, weight, residual, backend: rms_norm(
            x, weight, residual=residual, backend=backend
        ),
        truth=_truth,
        plain=_plain,
        training=_TRAINING,
        rows=(0, 1),
    ),
)
