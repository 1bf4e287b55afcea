"""Specimens of `kernels/optim`, and what its many-tensor operators launch."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.optim import (
    adamw_,
    adamw_reference,
    global_norm,
    newton_schulz,
    newton_schulz_reference,
    squared_norm_reference,
)


def _draw(draw, rows, width):
    return (draw(rows, width),), {}


def _draw_stack(draw, rows, width):
    return (draw(3, rows, width),), {}


def _draw_many(draw, rows, width):
    return (draw(rows, width), draw(width, seed=1), draw(1, seed=2), draw(0, seed=3)), {}


def _orthogonal(u, backend):
    return newton_schulz(u.detach(), backend=backend)


def _norm(*tensors, backend):
    return global_norm([t.detach() for t in tensors], backend=backend)


_RATES = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _draw_adamw(draw, rows, width):
    parameter, gradient, mean = (draw(rows, width, seed=i) for i in range(3))
    return (parameter, gradient, mean, draw(rows, width, seed=3).square()), {}


def _step(parameter, gradient, mean, square, backend):
    """A step that leaves its arguments alone: the third."""
    lists = [[x.detach().clone(memory_format=torch.contiguous_format)]
             for x in (parameter, gradient, mean, square)]  # fmt: skip
    count = torch.full((), 2.0, device=parameter.device)
    adamw_(*lists, step=count, backend=backend, **_RATES)
    return lists[0][0], lists[2][0], lists[3][0]


def _step_truth(*tensors):
    return adamw_reference(*(x.detach() for x in tensors), step=3, **_RATES)


_SCHULZ = {
    "op": "newton_schulz",
    "run": _orthogonal,
    "truth": lambda u: newton_schulz_reference(u.detach()),
    "plain": lambda u: newton_schulz_reference(u.detach()),
    "rows": (),
    "gradient": False,
    "huge": False,  # a matrix of 2^31 elements has no place in a product
}

SPECIMENS = (
    Specimen(
        name="adamw",
        op="adamw",
        draw=_draw_adamw,
        run=_step,
        truth=_step_truth,
        plain=_step_truth,
        dtypes=(torch.float64, torch.float32),
        gradient=False,
        rows=(),  # of a matrix are not apart by meaning, and need not be
        huge=False,  # has a test of its own
        training=((4096, 14336),),
    ),
    Specimen(
        name="newton_schulz",
        draw=_draw,
        training=((4096, 14336), (4096, 4096), (576, 1536)),
        shapes=((0, 6), (1, 1), (1, 64), (5, 3), (33, 129), (70, 66)),
        **_SCHULZ,
    ),
    Specimen(
        name="newton_schulz_stack",
        draw=_draw_stack,
        training=((2048, 768),),
        shapes=((0, 6), (4, 1), (5, 33)),
        **_SCHULZ,
    ),
    Specimen(
        name="global_norm",
        op="global_norm",
        draw=_draw_many,
        run=_norm,
        truth=lambda *tensors: squared_norm_reference([t.detach() for t in tensors]).sqrt(),
        plain=lambda *tensors: torch.nn.utils.get_total_norm([t.detach() for t in tensors]),
        rows=(),
        gradient=False,
        huge=False,  # has a test of its own
        training=((8192, 4096),),
    ),
)


def _empty(dtype, *shapes):
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _adamw(parameter, gradient, extra):
    from warploom.kernels.optim import adam_triton
    from warploom.kernels.optim.adam import Rates

    shapes = ((128256, 4096), (4096, 14336), (4096,), (7,))
    number = torch.empty((), device="meta")
    adam_triton.update(
        _empty(parameter, *shapes),
        _empty(gradient, *shapes),
        _empty(torch.float32, *shapes),
        _empty(torch.float32, *shapes),
        [] if extra is None else _empty(extra, *shapes),
        number,
        None,
        number,
        number,
        Rates(3e-4, 0.9, 0.95, 1e-8, 0.1),
        None,
    )


def _norm_and_scale(dtype):
    from warploom.kernels.optim import norm_triton

    tensors = _empty(dtype, (128256, 4096), (4096,), (7,))
    norm_triton.squared_norm(tensors, None)
    norm_triton.scale(tensors, torch.empty((), dtype=torch.float64, device="meta"), None)


def _symmetric(dtype, *shape):
    from warploom.kernels.optim import orthogonal_triton

    (x,) = _empty(dtype, shape)
    gram = orthogonal_triton.symmetric(x)
    orthogonal_triton.symmetric(gram, add=gram, alpha=2.0315, beta=-4.775)


# Each runs a Triton host on meta tensors of a real model, to be called where launches are recorded.
LAUNCHES = (
    lambda: _adamw(torch.float32, torch.float32, None),
    lambda: _adamw(torch.bfloat16, torch.bfloat16, torch.float32),
    lambda: _adamw(torch.bfloat16, torch.float32, torch.float32),
    lambda: _adamw(torch.float16, torch.float32, torch.float32),
    lambda: _adamw(torch.bfloat16, torch.bfloat16, torch.int16),
    lambda: _adamw(torch.bfloat16, torch.float32, torch.int16),
    lambda: _norm_and_scale(torch.bfloat16),
    lambda: _norm_and_scale(torch.float16),
    lambda: _norm_and_scale(torch.float32),
    lambda: _symmetric(torch.bfloat16, 4096, 14336),
    lambda: _symmetric(torch.bfloat16, 8, 576, 1536),
    lambda: _symmetric(torch.float32, 4096, 4096),
)
