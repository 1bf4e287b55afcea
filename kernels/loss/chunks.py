"""What the linear losses share: a chunk of logits at a time, and gradients gathered over chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..invariant import invariant, linear
from ..library import need_tensors, wide

_CPU_BYTES = 64 << 20  # of float32 logits a chunk
_CUDA_BYTES = 1 << 30
_CUDA_TOKENS = 4096  # enough to fill the device in each product

Rows = slice | Tensor


def chunk_tokens(hidden_TD: Tensor, vocabulary: int) -> int:
    """Choose how many tokens' logits are alive at a time.

    Args:
        hidden_TD: `[T, D]`; its device and dtype decide.
        vocabulary: Columns of the logits, on this rank.

    Returns:
        At least 1: 64 MiB of float32 logits on the CPU, 4096 tokens and 1 GiB elsewhere.
    """
    if hidden_TD.device.type == "cpu":
        return max(1, _CPU_BYTES // (4 * max(vocabulary, 1)))
    return max(1, min(_CUDA_TOKENS, _CUDA_BYTES // (hidden_TD.element_size() * max(vocabulary, 1))))


class Chunks:
    """The chunks of one call: which rows, and a buffer of logits that all chunks share.

    On the CPU only the rows that train are met. Elsewhere counting them would wait for the device:
    all rows are met, and the ignored ones enter as zeros, so that a NaN in them stays out.

    Args:
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]`.
        targets: `[T]`, or `[T, M]` whose first column says whether a row is ignored.
        ignore_index: The target of positions that do not train.
        chunk: Tokens of a chunk; None chooses.

    Raises:
        ValueError: On the CPU, if a target that trains is outside the vocabulary or is repeated.
    """

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, ignore_index: int,
        chunk: int | None,
    ) -> None:  # fmt: skip
        self.hidden_TD, self.weight_VD, self.targets = hidden_TD, weight_VD, targets
        self.trained_T = trained(targets, ignore_index)
        self.rows: Tensor | None = None
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        if hidden_TD.device.type == "cpu":
            check_range(targets, self.trained_T, vocabulary)
            rows = self.trained_T.nonzero()[:, 0]
            if len(rows) < tokens:
                self.rows, tokens = rows, len(rows)
        limit = chunk or chunk_tokens(hidden_TD, vocabulary)
        self.count = -(-tokens // limit)
        self.tokens, self.step = tokens, max(1, -(-tokens // max(1, self.count)))
        self.logits_CV = hidden_TD.new_empty(min(self.step, tokens), vocabulary)

    def __iter__(self) -> Iterator[tuple[Rows, Tensor, Tensor, Tensor]]:
        """Yield rows of the call, their hidden states `[C, D]`, targets, logits `[C, V]`."""
        for start in range(0, self.tokens, self.step):
            rows: Rows = slice(start, min(start + self.step, self.tokens))
            count = min(self.step, self.tokens - start)
            if self.rows is not None:
                rows = self.rows[rows]
            hidden_CD = self.hidden_TD[rows]
            if hidden_CD.device.type != "cpu":
                hidden_CD = torch.where(self.trained_T[rows, None], hidden_CD, 0)
            logits_CV = self.logits_CV[:count]
            if invariant():
                logits_CV.copy_(linear(hidden_CD, self.weight_VD))
            else:
                torch.mm(hidden_CD, self.weight_VD.t(), out=logits_CV)
            yield rows, hidden_CD, self.targets[rows], logits_CV


class Gradients:
    """dhidden and dweight of a linear head, gathered over chunks; empty where not asked for.

    One chunk's dweight is a single product, rounded once to the weight's dtype. Over several it is
    accumulated in float32 at least: in bfloat16 the share of a chunk would be rounded away.

    Args:
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]`.
        needs: Whether dhidden and dweight are wanted.
        chunks: How many chunks will be added.
    """

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, needs: tuple[bool, bool], chunks: int
    ) -> None:
        self.weight_VD, self.needs, self.added = weight_VD, needs, 0
        self.dhidden = hidden_TD.new_zeros(hidden_TD.shape if needs[0] else 0)
        dtype = weight_VD.dtype if chunks < 2 else wide(weight_VD.dtype)
        self.dweight = weight_VD.new_empty(weight_VD.shape if needs[1] else 0, dtype=dtype)

    def add_(self, rows: Rows, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
        """Add a chunk.

        Args:
            rows: Those of the call.
            dlogits_CV: Gradient `[C, V]` by their logits.
            hidden_CD: Their hidden states `[C, D]`.
        """
        if self.needs[0] and isinstance(rows, slice):
            torch.mm(dlogits_CV, self.weight_VD, out=self.dhidden[rows])
        elif self.needs[0]:
            self.dhidden[rows] = dlogits_CV @ self.weight_VD
        if not self.needs[1]:
            return
        sum_VD, dlogits_VC = self.dweight, dlogits_CV.t()
        if not self.added and sum_VD.dtype == hidden_CD.dtype:
            torch.mm(dlogits_VC, hidden_CD, out=sum_VD)
        elif sum_VD.dtype == hidden_CD.dtype:
            sum_VD.addmm_(dlogits_VC, hidden_CD)
        elif sum_VD.device.type == "cpu":  # which has no product of bfloat16 into float32
            product_VD = dlogits_VC @ hidden_CD
            sum_VD.add_(product_VD) if self.added else sum_VD.copy_(product_VD)
        else:
            torch.ops.aten.addmm.dtype_out(
                sum_VD, dlogits_VC, hidden_CD, sum_VD.dtype, beta=min(self.added, 1), out=sum_VD
            )
        self.added += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """Return dhidden `[T, D]` and dweight `[V, D]` in the dtypes of the inputs."""
        dweight = self.dweight if self.added else self.dweight.zero_()
        return self.dhidden, dweight.to(self.weight_VD.dtype)


def trained(targets: Tensor, ignore_index: int) -> Tensor:
    """Tell which positions train.

    Args:
        targets: `[T]` or `[T, M]`, of which the first column decides.
        ignore_index: The target of those that do not.

    Returns:
        `[T]`, boolean.
    """
    return (targets if targets.dim() == 1 else targets[:, 0]) != ignore_index


def scaled(gradient: Tensor, g: Tensor) -> Tensor:
    """Multiply a saved gradient by an upstream scalar, in the wide dtype, rounded once.

    A bfloat16 upstream scalar would scale every gradient wrong; `g` gets a dimension here because
    PyTorch rounds one without to the other's dtype.

    Args:
        gradient: Any shape.
        g: `[]`, float32 at least.

    Returns:
        The product, in the dtype of `gradient`.
    """
    return torch.mul(gradient, g.reshape(1), out=torch.empty_like(gradient))


def check_range(targets: Tensor, trained_T: Tensor, vocabulary: int) -> None:
    """Refuse targets that no column has; reads them, so only for those on the CPU.

    Args:
        targets: `[T]`, or `[T, M]`, distinct in a row.
        trained_T: `[T]`, which count.
        vocabulary: V.

    Raises:
        ValueError: If one is not in [0, V), or twice in a row.
    """
    outside = (targets < 0) | (targets >= vocabulary)
    outside = (outside.flatten(1).any(-1) if outside.dim() > 1 else outside) & trained_T
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {vocabulary}) or the ignore_index, "
            f"got {targets[at].tolist()} at position {at}"
        )
    if targets.dim() > 1:
        same = targets.sort(-1).values.diff(dim=-1).eq(0).any(-1) & trained_T
        if same.any():
            at = int(same.nonzero()[0])
            raise ValueError(
                f"indices of a position must be distinct, "
                f"got {targets[at].tolist()} at position {at}"
            )


def check_linear(
    name: str, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int | None
) -> None:
    """Refuse inputs of a linear loss that do not belong together.

    Args:
        name: Operator, for the message.
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]` in the same floating dtype, V at least 1.
        targets: `[T]` or `[T, M]`, int32 or int64.
        chunk: None, or at least 1.

    Raises:
        ValueError: If they are not these.
    """
    need_tensors(name, hidden=hidden_TD, weight=weight_VD, targets=targets)
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or targets.shape[:1] != hidden_TD.shape[:1]:
        raise ValueError(
            f"{name}: hidden must be [T, D], weight [V, D] and targets [T], got "
            f"{[*hidden_TD.shape]}, {[*weight_VD.shape]} and {[*targets.shape]}"
        )
    if hidden_TD.shape[1] != weight_VD.shape[1] or not weight_VD.shape[0]:
        raise ValueError(
            f"{name}: hidden and weight must have one width and weight a row at least, "
            f"got {[*hidden_TD.shape]} and {[*weight_VD.shape]}"
        )
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.is_floating_point():
        raise ValueError(
            f"{name}: hidden and weight must have one floating dtype, "
            f"got {hidden_TD.dtype} and {weight_VD.dtype}"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: targets must be int32 or int64, got {targets.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name}: chunk must be at least 1 token, got {chunk}")
