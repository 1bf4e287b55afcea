"""Data parallelism: where gradients and parameters are kept, and how they are summed and shared."""

from .buckets import BUCKET_ELEMENTS, Bucket, make_buckets, shard_rows
from .gradients import Gradients
from .units import Units, unit_of

__all__ = [
    "BUCKET_ELEMENTS", "Bucket", "Gradients", "Units", "make_buckets", "shard_rows", "unit_of",
]  # fmt: skip
