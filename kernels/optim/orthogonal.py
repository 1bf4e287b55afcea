"""Newton-Schulz iteration: the nearest matrix whose singular values are about 1.

    x = u / |u|,    then in each step    A = x x^T,   B = b A + c A^2,   x <- a x + B x

Shapes `[..., n, m]`, n <= m (or the transpose is taken), a stack of matrices at once. Bound by
arithmetic: a step takes 4 n^2 m + 2 n^3 FLOPs. A and B are symmetric: the Triton kernel computes
the tiles on and below the diagonal and writes each twice, which leaves 3 n^2 m + n^3.

The update of an optimizer: there is no gradient.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the coefficients).
"""

import torch
from torch import Tensor

from ..backends import choose
from ..library import need_tensors, register, wide

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TINY = 1e-7


def newton_schulz_reference(u: Tensor, *, steps: int = 5) -> Tensor:
    """Specify `newton_schulz`; tests hold every backend to it.

    Args:
        u: Matrices `[..., n, m]`.
        steps: Iterations.

    Returns:
        `[..., n, m]`.
    """
    x = u.mT if u.shape[-2] > u.shape[-1] else u
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide(u.dtype))
    x = (x / (norm + _TINY)).to(u.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    y: Tensor = x.mT if u.shape[-2] > u.shape[-1] else x
    return y


def _newton_schulz(u: Tensor, steps: int, backend: str | None) -> Tensor:
    if not u.numel():
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    tall = u.shape[-2] > u.shape[-1]
    x = (u.mT if tall else u).reshape(-1, *sorted(u.shape[-2:]))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide(u.dtype))
    x = (x / (norm + _TINY)).to(u.dtype)  # a norm in float16 may be infinite
    device = choose("newton_schulz", u.device, u.dtype, backend) == "triton"
    if device:
        from .orthogonal_triton import symmetric

        x = x.contiguous()
    add = torch.addmm if len(x) == 1 else torch.baddbmm
    x = x[0] if len(x) == 1 else x
    for _ in range(steps):
        if device:
            gram = symmetric(x)
            power = symmetric(gram, add=gram, beta=_B, alpha=_C)
        else:
            gram = x @ x.mT
            power = add(gram, gram, gram, beta=_B, alpha=_C)
        x = add(x, power, x, beta=_A)
    return (x.mT if tall else x).contiguous().view(u.shape)


_NEWTON_SCHULZ = register(
    "newton_schulz(Tensor u, int steps, str? backend) -> Tensor",
    _newton_schulz, lambda u, steps, backend: u.new_empty(u.shape),
)  # fmt: skip


def newton_schulz(u: Tensor, *, steps: int = 5, backend: str | None = None) -> Tensor:
    """Return matrices with the singular vectors of `u` and singular values of about 1.

    Args:
        u: Matrices `[..., n, m]`, any strides; float16, bfloat16, float32 or float64, which is the
            dtype of every product (sums are float32 at least).
        steps: Iterations, at least 0.
        backend: `reference` (torch's matrix products) or `triton` (the symmetric ones); None takes
            the fastest that is proven here.

    Returns:
        `[..., n, m]`, in the dtype of `u`. Singular values lie within 0.68 and 1.21 after five
        steps, except those below about 2e-3 of the norm.

    Raises:
        ValueError: If `u` has fewer than two dimensions, another dtype, or `steps` is negative.
        RuntimeError: If `u` requires a gradient, or `backend` cannot serve it here.
    """
    need_tensors("newton_schulz", u=u)
    if u.dim() < 2 or u.dtype not in _DTYPES or steps < 0:
        raise ValueError(
            f"newton_schulz: u must be [..., n, m], float16, bfloat16, float32 or float64, and "
            f"steps at least 0; got {[*u.shape]}, {u.dtype} and {steps} steps"
        )
    if u.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"newton_schulz: has no gradient, and u {[*u.shape]} requires one: detach it, or call "
            f"under torch.no_grad()"
        )
    x: Tensor = _NEWTON_SCHULZ(u, steps, backend)
    return x
