"""Text from a model that trains: an engine over its own modules and weights."""

from .completion import Completion, Event, Stats
from .engine import Engine
from .sampling import Sampling

__all__ = ["Completion", "Engine", "Event", "Sampling", "Stats"]
