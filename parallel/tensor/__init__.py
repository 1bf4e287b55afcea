"""Tensor parallelism, with sequence parallelism between the sharded regions."""

import copyreg

from torch.distributed import ProcessGroup

from .linear import ColumnLinear, RowLinear
from .loss import linear_cross_entropy
from .vocabulary import VocabEmbedding, VocabHead

__all__ = ["ColumnLinear", "RowLinear", "VocabEmbedding", "VocabHead", "linear_cross_entropy"]

# A copy of a layer, such as one that averages its weights, communicates over the same groups: copy
# keeps an object whose reduction is a name as it is. A pickle of a group is refused as before.
copyreg.pickle(ProcessGroup, lambda group: "ProcessGroup")
