"""Text from a model that trains: an engine over its own modules and weights."""

from .engine import Completion, Engine, Event, Stats
from .sampling import Sampling

__all__ = ["Completion", "Engine", "Event", "Sampling", "Stats"]
