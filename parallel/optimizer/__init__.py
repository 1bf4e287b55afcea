"""Optimizers whose state is sharded over the ranks that hold the same parameters."""

from .adamw import AdamW
from .muon import Muon
from .sharded import Shard, ShardedOptimizer

__all__ = ["AdamW", "Muon", "Shard", "ShardedOptimizer"]
