"""One micro-batch, as the corpus gives it and the model takes it."""

from dataclasses import dataclass

from torch import Tensor

IGNORED = -100  # the target of a position that is not trained


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Batch:
    """Token ids and what is trained on.

    Attributes:
        tokens: Ids `[B, S]`, int64.
        targets: The id that follows each token `[B, S]`, int64; -100 is not trained.
        document_lengths: Lengths `[N]`, int32, of the documents in the flattened tokens; they sum
            to B x S, and no document crosses a row. `None` makes each row one document.
    """

    tokens: Tensor
    targets: Tensor
    document_lengths: Tensor | None = None
