"""Activation recomputation: none, of chosen operators, or of whole blocks.

An operator that recomputes keeps its inputs and runs again in the backward. What that is worth is
FLOPs spent for a byte freed, against those an accelerator does in the time in which it moves a byte
(an H100 in bf16: 989 TFLOP/s over 3.35 TB/s, 295). For one token and layer, in 16 bits; D width,
F feed-forward width, H heads of size K, S sequence, causal:

    operator      freed, bytes                              run again, FLOPs      FLOPs a byte
    norm          2 D, the gathered input of what follows   5 D                   3
    attention     2 H K + 4 H, output and log-sum-exp       2 S H K               S
    feed_forward  4 F, gate and up                          4 D F                 D
    moe           as feed_forward, a choice each            as feed_forward       D, and two
                                                            and both exchanges    all-to-alls
    block         all but the stream, 2 D                   a forward             about D

so `selective` is the norms: what they free is also what sequence parallelism does not divide, for
it is the projections' input, gathered over the tokens. The function given for a norm must therefore
reach through the gather into the projection. It costs the norm and the gather; the product itself
does not run again, as the checkpoint stops once the last tensor that the backward needs is there.

Korthikanti et al. choose the core of attention instead: there the scores are stored, 5 H S bytes,
which are freed for 4 K / 5 FLOPs a byte. Flash attention stores no scores, and its share is worth
it at no sequence that is long enough to matter.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 5 and equation 6; Chen et
al. 2016, https://arxiv.org/abs/1604.06174, section 3 (recomputation of whole blocks).
"""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from ..collectives import observers, watched

T = TypeVar("T")

OPERATORS = ("norm", "attention", "feed_forward", "moe")
BLOCK = "block"
_NAMED = {"none": frozenset[str](), "full": frozenset({BLOCK}), "selective": frozenset({"norm"})}


class _Memo:
    """What the first run of a recomputed function decided, for the runs that follow."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.at = 0


_MEMO: contextvars.ContextVar[_Memo | None] = contextvars.ContextVar(
    "warploom_recompute_memo", default=None
)


def remembered(decide: Callable[[], T]) -> T:
    """Return `decide()`; where a recomputed function runs again, what it returned at first.

    For what must neither change nor happen twice: a choice, a count, a collective without a
    gradient. The result is kept until the backward.

    Args:
        decide: Called without gradients in view, in the same order in every run.
    """
    memo = _MEMO.get()
    if memo is None:
        return decide()
    if memo.at == len(memo.values):
        memo.values.append(decide())
    memo.at += 1
    value: T = memo.values[memo.at - 1]
    return value


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which operators run again in the backward.

    Attributes:
        operators: Some of `OPERATORS`, or `block` alone.
    """

    operators: frozenset[str] = frozenset()

    @staticmethod
    def parse(text: str) -> "Recompute":
        """Read `none`, `full`, `selective`, or operators such as `norm,feed_forward`.

        Raises:
            ValueError: If a word is neither, or stands beside words that it contradicts.
        """
        words = [word for word in text.replace(" ", "").split(",") if word]
        if len(words) == 1 and words[0] in _NAMED:
            return Recompute(_NAMED[words[0]])
        if not words or not set(words) <= set(OPERATORS):
            raise ValueError(
                f"recompute must be none, full, selective or a list of {', '.join(OPERATORS)}; "
                f"got {text!r}"
            )
        return Recompute(frozenset(words))

    def __str__(self) -> str:
        for name, operators in _NAMED.items():
            if operators == self.operators:
                return name
        return ",".join(sorted(self.operators))

    def run(self, name: str, fn: Callable[..., T], *args: Any) -> T:
        """Call `fn(*args)`; where `name` recomputes, keep only `args` for the backward.

        Collectives of the second run are seen by the observers of the first.

        Args:
            name: One of `OPERATORS`, or `block`.
            fn: A function of tensors whose results depend on nothing that changes until its
                backward; random numbers are drawn again as they were.
            args: Its arguments; tensors that `fn` holds otherwise stay in memory anyway.

        Raises:
            ValueError: If `name` is not known.
        """
        if name != BLOCK and name not in OPERATORS:
            raise ValueError(f"operator must be one of {BLOCK}, {', '.join(OPERATORS)}; got {name}")
        if name not in self.operators or not torch.is_grad_enabled():
            return fn(*args)
        context, memo = contextvars.copy_context(), _Memo()

        def again(*given: Any) -> T:
            memo.at = 0
            # autograd may run this in a thread of its own, where no context variable is set
            present = observers()
            return context.copy().run(_seen, present, memo, fn, given)

        result: T = checkpoint(again, *args, use_reentrant=False)
        return result


def _seen(present: tuple[Any, ...], memo: _Memo, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    _MEMO.set(memo)  # in a copy of the context, which ends with this call
    with watched(observers() or present):
        return fn(*args)
