"""Optimizers whose state is sharded over the data-parallel ranks (ZeRO-1)."""

from .adamw import AdamW
from .muon import Muon
from .sharded import Shard, ShardedOptimizer

__all__ = ["AdamW", "Muon", "Shard", "ShardedOptimizer"]
