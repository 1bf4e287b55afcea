"""Run in a process of its own with TRITON_INTERPRET=1: the Triton kernels against the reference.

The interpreter shows meaning: masks, strides, offsets, the persistent loop. Its bfloat16 rounding
is not the GPU's, so the residual sum is compared in float32 and float16.
"""

import torch
from tests.kernels.checks import SHAPES, case, check

from warploom.kernels.activation import swiglu
from warploom.kernels.norm import rms_norm
from warploom.kernels.rope import rotary, rotary_tables


def _same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _strides():
    """Strided rows, expanded upstream gradients, views of a fused projection."""
    wide = torch.randn(9, 3, 2, 6).permute(1, 0, 3, 2)
    x = wide[..., 1].requires_grad_()  # [3, 9, 6], no stride is 1
    weight = torch.randn(6)
    for fn in (lambda b: rms_norm(x, weight, backend=b), lambda b: swiglu(x, backend=b)):
        pair = [fn(backend) for backend in ("reference", "triton")]
        _same(*pair)
        _same(*(torch.autograd.grad(y.sum(), x)[0] for y in pair))
    residual = torch.randn(3, 9, 12)[..., :6].requires_grad_()  # rows 12 apart
    dy, dh = torch.randn(3, 9, 6), torch.randn(3, 9, 10)[..., :6]
    pair = []
    for backend in ("reference", "triton"):
        out = rms_norm(x, weight, residual=residual, backend=backend)
        pair.append([*out, *torch.autograd.grad(out, (x, residual), (dy, dh))])
    _same(*pair)
    fused = torch.randn(9, 7 * 8, requires_grad=True)
    q, k, _ = fused.view(9, 7, 8).split([4, 2, 1], 1)
    tables = rotary_tables(torch.arange(9), 8, base=100.0)
    pair = [rotary(q, k, *tables, backend=b) for b in ("reference", "triton")]
    _same(pair[0], pair[1])
    grads = [
        torch.autograd.grad((y[0].sum(), y[1].sum()), fused, retain_graph=True)[0] for y in pair
    ]
    _same(*grads)


def _poisoned_row():
    x = torch.randn(70, 8)
    x[5] = float("nan")
    y = rms_norm(x, torch.ones(8), backend="triton")
    assert y.isnan().any(1).nonzero().tolist() == [[5]]
    y = swiglu(x, backend="triton")
    assert y.isnan().any(1).nonzero().tolist() == [[5]]


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in ("rms_norm", "rms_norm_residual", "rotary", "swiglu"):
        for tokens, width in SHAPES:
            for dtype in (torch.float32, torch.float16) if width < 100 else (torch.float32,):
                check(case(name, tokens, width, dtype, backend="triton"))
    for name in ("rms_norm", "rms_norm_residual"):  # the column kernel
        check(case(name, 70, 8200, torch.float32, backend="triton"))
    _strides()
    _poisoned_row()
    print("interpreted: all the same")


if __name__ == "__main__":
    main()
