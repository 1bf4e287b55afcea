"""Context parallelism: one sequence on many ranks, each with a part of its tokens.

`Split` says which; the kinds of attention differ in what travels: keys and values round a ring,
all of them at once, or heads for tokens. `attention` combines them over the groups of a mesh.
"""

from .gathered import all_gather_attention
from .ring import ring_attention
from .split import Segment, Split, shard_sequence, unshard
from .ulysses import attention, ulysses_attention

__all__ = [
    "Segment", "Split", "all_gather_attention", "attention", "ring_attention", "shard_sequence",
    "ulysses_attention", "unshard",
]  # fmt: skip
