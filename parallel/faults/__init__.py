"""Faults of a running world: who hangs, who calls something else, who is slow."""

from .fingerprint import Fingerprint, MismatchError
from .stragglers import Report, Section, Stragglers
from .watchdog import Hang, Watchdog

__all__ = [
    "Fingerprint", "Hang", "MismatchError", "Report", "Section", "Stragglers", "Watchdog",
]  # fmt: skip
