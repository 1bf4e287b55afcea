"""The scan of a state-space layer whose decay is one number a head (Mamba-2's SSD).

    S_t = exp(dt_t a) S_(t-1) + dt_t x_t B_t^T          S is [P, M], zero or given at the start
    y_t = S_t C_t

In chunks of Q tokens, the state is formed at their borders only. Within a chunk

    y_i = exp(l_i) S C_i + sum over j <= i of exp(l_i - l_j) (C_i . B_j) dt_j x_j

with l the sums of dt a: matrix products. Chunks are cut in each document by itself. `sequential`
computes token by token instead, in operations that treat every token alike: the same bits whatever
else is in the batch, and however a sequence is cut into calls.

Differentiable by autograd; PyTorch's operators on any device, no kernel of its own yet.

Shapes: T tokens, N documents, H heads, G groups of heads that share B and C, J = H/G, P head
dimension, M state, Q chunk, U chunks. The chunked form does T H (2 Q M/J + 2 Q P + 4 P M)
floating-point operations; the states saved are U H P M elements, U < T/Q + N.

Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060, section 6 (the chunked form), equations
1 and 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..invariant import invariant
from ..library import wide

CHUNK = 64


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x); PyTorch's on a CPU rounds a value by where in memory it lies."""
    return x / (1 + (-x).clamp(max=80).exp())


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), with the same bits wherever a value lies."""
    return x.clamp(max=30).exp().log1p() + (x - 30).clamp(min=0)


class _Plan(NamedTuple):
    """Chunks of the documents: all the first ones, then all the second ones, longest first.

    Attributes:
        order: The documents, longest first, `[N]`.
        sizes: How many documents have a first chunk, a second one, and so on.
        tokens: Of each chunk `[U, Q]`; T where it has no more.
        places: Of each token among those `[T]`.
    """

    order: Tensor
    sizes: list[int]
    tokens: Tensor
    places: Tensor


def _plan(cu_seqlens: Tensor, chunk: int, device: torch.device) -> _Plan:
    bounds = cu_seqlens.cpu().long()
    order = bounds.diff().argsort(descending=True, stable=True)
    starts, ends = bounds[:-1][order], bounds[1:][order]
    counts = -(-(ends - starts) // chunk)
    steps = torch.arange(int(counts.max()) if len(counts) else 0)
    has = counts > steps[:, None]
    step, rank = has.nonzero(as_tuple=True)
    tokens = (starts[rank] + step * chunk)[:, None] + torch.arange(chunk)
    real = tokens < ends[rank][:, None]
    tokens = tokens.where(real, bounds[-1])
    places = tokens[real].argsort()
    places = real.flatten().nonzero()[:, 0][places]
    sizes = has.sum(1).tolist()
    return _Plan(order.to(device), sizes, tokens.to(device), places.to(device))


def state_space_scan(
    x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGM: Tensor, c_TGM: Tensor, cu_seqlens: Tensor, *,
    initial_NHPM: Tensor | None = None, chunk: int = CHUNK, sequential: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan each document; return what the states give and the states at the ends.

    Waits for `cu_seqlens` where it is on a GPU.

    Args:
        x_THP: Inputs `[T, H, P]`.
        dt_TH: Time steps `[T, H]`, at least 0.
        a_H: Decay a unit of time `[H]`, negative.
        b_TGM: What writes the states, `[T, G, M]`; head h reads group h // (H / G).
        c_TGM: What reads them, as `b_TGM`.
        cu_seqlens: Where documents start, and the end: `[N + 1]`, int32.
        initial_NHPM: State before each document `[N, H, P, M]`; `None` for zeros.
        chunk: Tokens Q of a chunk.
        sequential: Whether every token is a step by itself, as in `batch_invariant()` and where no
            document has two: slow, for bits that do not depend on the rest of the batch.

    Returns:
        y `[T, H, P]` in the dtype of `x_THP`, and the last states `[N, H, P, M]` in float32, or
        float64 for float64 inputs.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    (tokens, heads, width), (groups, state) = x_THP.shape, b_TGM.shape[1:]
    shape = (len(cu_seqlens) - 1, heads, width, state)
    wanted = ((tokens, heads), (heads,), (tokens, groups, state), (tokens, groups, state))
    found = tuple(tuple(t.shape) for t in (dt_TH, a_H, b_TGM, c_TGM))
    if found != wanted or heads % groups or chunk < 1:
        raise ValueError(
            f"x, dt, a, b and c must be [T, H, P], [T, H], [H], [T, G, M] and [T, G, M], G dividing"
            f" H, and chunk at least 1; got {[*x_THP.shape]}, {', '.join(map(str, found))}, {chunk}"
        )
    if initial_NHPM is not None and initial_NHPM.shape != shape:
        raise ValueError(f"initial must be {[*shape]}; got {[*initial_NHPM.shape]}")
    dtype = wide(x_THP.dtype)
    x, dt, a, b, c = (t.to(dtype) for t in (x_THP, dt_TH, a_H, b_TGM, c_TGM))
    longest = int(cu_seqlens.diff().max()) if shape[0] else 0
    single = sequential or invariant() or longest <= 1
    plan = _plan(cu_seqlens, 1 if single else min(chunk, longest), x.device)
    start = x.new_zeros(shape) if initial_NHPM is None else initial_NHPM.to(dtype)[plan.order]
    run = _token_by_token if single else _in_chunks
    y, last = run(x * dt[..., None], dt * a, b, c, start, plan)
    return y.to(x_THP.dtype), last[plan.order.argsort()]


def _in_chunks(
    x: Tensor, decay: Tensor, b: Tensor, c: Tensor, start: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Scan inputs that are multiplied by dt; `decay` `[T, H]` is dt a."""
    groups = b.shape[1]

    def cut(t: Tensor) -> Tensor:  # [T, G, ...] to [U, G, Q, ...]; the padding is zero
        padded = torch.cat([t, t.new_zeros(1, *t.shape[1:])])
        return padded[plan.tokens].transpose(1, 2)

    b, c, x = cut(b), cut(c), cut(x.unflatten(1, (groups, -1)))  # x [U, G, Q, J, P]
    sums = cut(decay.double()).cumsum(-1)  # [U, H, Q]: differences of these are small
    between = (sums[..., :, None] - sums[..., None, :]).to(x.dtype)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    weight = between.masked_fill(later, -torch.inf).exp().unflatten(1, (groups, -1))
    own = (weight * (c @ b.mT)[:, :, None]) @ x.transpose(2, 3)  # [U, G, J, Q, P]

    def spread(t: Tensor) -> Tensor:  # a number a token and head, [U, H, Q] to [U, G, Q, J, 1]
        t = t.to(x.dtype).exp().unflatten(1, (groups, -1))
        return t.transpose(2, 3)[..., None]

    left = (x * spread(sums[..., -1:] - sums)).flatten(3)  # [U, G, Q, J P], decayed to the end
    shape = (-1, *start.shape[1:])
    written = (left.mT @ b).view(shape)
    kept = sums[..., -1].to(x.dtype).exp()[..., None, None]
    entering, last = _pass(written, kept, start, plan.sizes)
    read = c @ entering.unflatten(1, (groups, -1)).flatten(2, 3).mT  # [U, G, Q, J P]
    y = own.transpose(2, 3) + read.unflatten(-1, (-1, shape[2])) * spread(sums)
    return y.transpose(1, 2).reshape(-1, *shape[1:3]).index_select(0, plan.places), last


def _pass(written: Tensor, kept: Tensor, state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Carry states from chunk to chunk.

    Args:
        written: What each chunk adds `[U, H, P, M]`.
        kept: Which part of the state a chunk leaves `[U, H, 1, 1]`.
        state: Before the first chunks `[N, H, P, M]`, the longest document first.
        sizes: As in `_Plan`.

    Returns:
        The state before each chunk `[U, H, P, M]`, and the last ones as `state`.
    """
    entering, done = [written[:0]], [state[:0]]
    for add, keep in zip(written.split(sizes), kept.split(sizes), strict=True):
        done.append(state[len(add) :])
        state = state[: len(add)]
        entering.append(state)
        state = state * keep + add
    return torch.cat(entering), torch.cat([state, *reversed(done)])


def _token_by_token(
    x: Tensor, decay: Tensor, b: Tensor, c: Tensor, start: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Do as `_in_chunks`, each token a step; the backward keeps the states every `CHUNK` steps."""
    token = plan.tokens[:, 0]
    parts = [t.index_select(0, token) for t in (x, decay.exp(), b, c)]
    ys, state, at = [x[:0]], start, 0
    for first in range(0, len(plan.sizes), CHUNK):
        sizes = plan.sizes[first : first + CHUNK]
        rows = slice(at, at := at + sum(sizes))
        own = [p[rows] for p in parts]
        y, state = checkpoint(_steps, sizes, state, *own, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys).index_select(0, plan.places), state


def _steps(
    sizes: list[int], state: Tensor, x: Tensor, keep: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    ys, done, each = [], [], x.shape[1] // b.shape[1]
    parts = (x[..., None], keep[..., None, None], b, c)
    for u, k, write, read in zip(*(p.split(sizes) for p in parts), strict=True):
        write, read = (t.repeat_interleave(each, 1)[:, :, None] for t in (write, read))
        done.append(state[len(u) :])
        state = state[: len(u)] * k + u * write
        ys.append((state * read).sum(-1))
    return torch.cat(ys), torch.cat([state, *reversed(done)])
