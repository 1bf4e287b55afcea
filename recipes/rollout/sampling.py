"""How a token is chosen from the logits: the choices, and the draw.

Temperature, top-k, top-p and min-p, in this order, keep the tokens whose scores are above a floor;
of these one is drawn by the inverse of their cumulative distribution. The uniform number of a draw
is a hash of (seed, sample, position), so that a text does not depend on what is computed beside it.

Shapes: M rows, R of them that are drawn at random, V vocabulary.

Source: Fan et al. 2018, https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751 (top-p); Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
(min-p); Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405 (counter-based generators).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from warploom.kernels.library import wide
from warploom.kernels.loss import cross_entropy_partials

from ..errors import UserError

_COLDEST = 1e-3  # below it float32 scores overflow
_RANGES = {
    "temperature": (float, 0.0, 100.0),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 0.0, 1.0),
    "min_p": (float, 0.0, 1.0),
    "max_tokens": (int, 1, 2**31 - 1),
    "seed": (int, -(2**63), 2**63 - 1),
    "n": (int, 1, 4096),
    "logprobs": (int, 0, 2**31 - 1),
}
_LIKELIEST = 1024  # tokens that top-p looks at first


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a request's tokens are chosen, and when its texts end.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keeps this many of the likeliest tokens, and those that tie with the last; 0 for all.
        top_p: Keeps the likeliest tokens until their probabilities sum to this; 1 for all.
        min_p: Keeps tokens at least this many times as likely as the likeliest; 0 for all.
        max_tokens: Most tokens of a text; the model's window may end it before.
        seed: Of the draws. Two requests with the same one share their uniform numbers.
        n: Texts that are sampled from one prompt.
        stop: Strings that end a text; it is cut before them.
        stop_ids: Ids that end a text, beside the tokenizer's ends of text.
        ignore_eos: Whether the tokenizer's ends of text end nothing.
        logprobs: How many of the likeliest tokens are listed at each position, with their
            log-probabilities; that of the token itself always is.
        kept: Whether the ids that could be drawn are listed at each position.

    Raises:
        UserError: If a value is out of range or of another kind.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    kept: bool = False

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            known = isinstance(value, int | kind) and not isinstance(value, bool)
            if not (known and low <= value <= high):
                what = "an integer" if kind is int else "a number"
                raise UserError(f"{name} must be {what} from {low:g} to {high:g}; got {value!r}")
        if 0 < self.temperature < _COLDEST:
            raise UserError(
                f"temperature must be 0, for the likeliest token, or at least {_COLDEST:g}; got "
                f"{self.temperature!r}"
            )
        for name, item in (("stop", str), ("stop_ids", int)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(x) is item for x in value):
                raise UserError(f"{name} must be a tuple of {item.__name__}; got {value!r}")
        if "" in self.stop:
            raise UserError(f"stop must hold no empty string, which ends all; got {self.stop}")

    @property
    def everything(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self.temperature == 1 and not self.filters

    @property
    def filters(self) -> bool:
        """Whether tokens are left out of the draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Token(NamedTuple):
    """A token that was chosen.

    Attributes:
        id: Its id.
        logprob: Its log-probability in nats under the model, at temperature 1.
        sampling_logprob: The one under the distribution that it was drawn from; 0 where it was the
            likeliest that was taken.
        top: Ids and log-probabilities of the likeliest tokens, if asked for.
        kept: Ids that could be drawn, ascending int64, if asked for; `None` where it is all.
    """

    id: int
    logprob: float
    sampling_logprob: float
    top: tuple[tuple[int, float], ...] = ()
    kept: Tensor | None = None


def uniform(seed: int, sample: int, position: int) -> float:
    """Return the number in [0, 1) that draws token `position` of sample `sample`."""
    digest = hashlib.sha256(f"{seed}|{sample}|{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


@torch.no_grad()
def draw(
    logits_MV: Tensor, how: Sequence[Sampling], numbers: Sequence[tuple[int, int]]
) -> list[Token]:
    """Choose a token of each row.

    Args:
        logits_MV: `[M, V]`.
        how: How each row's token is chosen.
        numbers: Number of the sample and of the token in its text, from 0, of each row.

    Returns:
        M tokens; that of a row depends on no other row.

    Raises:
        RuntimeError: If logits are NaN or infinite.
    """
    z_MV = logits_MV.to(wide(logits_MV.dtype))
    ids_M = z_MV.argmax(-1)
    own_M = torch.zeros_like(z_MV[:, 0])
    kept: dict[int, Tensor | None] = {}
    random = [m for m, s in enumerate(how) if s.temperature > 0]
    if random:
        some = [how[m] for m in random]
        u_R = [uniform(s.seed, *numbers[m]) for m, s in zip(random, some, strict=True)]
        rows = torch.tensor(random, device=z_MV.device)
        z_RV = z_MV if len(random) == len(how) else z_MV[rows]
        ids_M[rows], own_M[rows], kept_RV = _random(z_RV, some, u_R)
        for m, s, kept_V in zip(random, some, kept_RV, strict=True):
            if s.kept:
                kept[m] = kept_V.nonzero()[:, 0].cpu() if s.filters else None
    high_M, total_M, true_M = cross_entropy_partials(logits_MV, ids_M)
    lse_M = high_M + total_M.log()
    if not bool(lse_M.isfinite().all()):
        raise RuntimeError(
            f"logits must be finite, and those of {int((~lse_M.isfinite()).sum())} of {len(how)} "
            f"texts are not: look at the model's weights"
        )
    log_probs = (true_M - lse_M).tolist()
    tops = _top(z_MV, lse_M, [s.logprobs for s in how])
    found = zip(ids_M.tolist(), log_probs, own_M.tolist(), how, tops, strict=True)
    return [
        Token(
            token,
            log_prob,
            log_prob if s.everything else own,
            top,
            kept.get(m, torch.tensor([token])) if s.kept else None,
        )
        for m, (token, log_prob, own, s, top) in enumerate(found)
    ]


def _random(
    z_RV: Tensor, how: Sequence[Sampling], u_R: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ids `[R]`; return also their log-probabilities in the draw, and what was kept."""
    scores_RV = z_RV / _column([s.temperature for s in how], z_RV)
    best_R1 = scores_RV.amax(-1, keepdim=True)
    weights_RV = (scores_RV - best_R1).exp()
    kept_RV = scores_RV >= floors(scores_RV, how)[:, None]
    if any(s.filters for s in how):
        weights_RV *= kept_RV
    sums_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    aim_R1 = _column(u_R, sums_RV) * sums_RV[:, -1:]
    # the first whose sum exceeds the aim; one of weight 0 has the sum of the one before
    ids_R1 = torch.searchsorted(sums_RV, aim_R1, right=True).clamp_(max=z_RV.shape[-1] - 1)
    own_R1 = scores_RV.gather(-1, ids_R1) - best_R1 - sums_RV[:, -1:].log()
    return ids_R1[:, 0], own_R1[:, 0].to(z_RV.dtype), kept_RV


def floors(scores_RV: Tensor, how: Sequence[Sampling]) -> Tensor:
    """Return the least score that top-k, top-p and min-p keep in each row.

    Args:
        scores_RV: Logits over temperatures `[R, V]`.
        how: The choices of each row.

    Returns:
        `[R]`; -inf where all is kept. What ties with the last token that is kept is kept.
    """
    vocabulary = scores_RV.shape[-1]
    floor_R = torch.full_like(scores_RV[:, 0], -torch.inf)
    ks = [min(s.top_k, vocabulary) for s in how]
    if any(ks):
        k_R1 = torch.tensor(ks, device=scores_RV.device)[:, None]
        largest_RC = scores_RV.topk(max(ks)).values
        kth_R = largest_RC.gather(-1, (k_R1 - 1).clamp(min=0))[:, 0]
        floor_R = torch.where(k_R1[:, 0] > 0, kth_R, floor_R)
    some = [r for r, s in enumerate(how) if s.top_p < 1]
    if some:
        rows = torch.tensor(some, device=scores_RV.device)
        part_RV = scores_RV[rows]
        part_RV = part_RV.masked_fill(part_RV < floor_R[rows, None], -torch.inf)
        nucleus_R = _nucleus(part_RV, _column([how[r].top_p for r in some], scores_RV))
        floor_R[rows] = torch.maximum(floor_R[rows], nucleus_R)
    if any(s.min_p > 0 for s in how):
        least = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in how]
        floor_R = torch.maximum(floor_R, scores_RV.amax(-1) + _column(least, scores_RV)[:, 0])
    return floor_R


def _nucleus(scores_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Return the least score of the likeliest tokens that sum to p; sort no more than it takes."""
    vocabulary, size = scores_RV.shape[-1], _LIKELIEST
    log_p_RV = scores_RV.log_softmax(-1)  # a row's bits are its own, those of logsumexp are not
    while True:
        largest_RC, ids_RC = log_p_RV.topk(min(size, vocabulary))
        upto_RC = largest_RC.exp().cumsum(-1)
        above_RC = torch.cat((torch.zeros_like(p_R1), upto_RC[:, :-1]), -1)
        count_R1 = (above_RC < p_R1).sum(-1, keepdim=True).clamp_(min=1)
        if size >= vocabulary or int(count_R1.max()) < size:
            return scores_RV.gather(-1, ids_RC.gather(-1, count_R1 - 1))[:, 0]
        size *= 8


def _top(z_MV: Tensor, lse_M: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """List the likeliest tokens of each row and their log-probabilities."""
    if not any(counts):
        return [()] * len(counts)
    values_MC, ids_MC = z_MV.topk(min(max(counts), z_MV.shape[-1]))
    listed = zip(ids_MC.tolist(), (values_MC - lse_M[:, None]).tolist(), strict=True)
    return [
        tuple(zip(ids[:count], log_probs[:count], strict=True))
        for (ids, log_probs), count in zip(listed, counts, strict=True)
    ]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
