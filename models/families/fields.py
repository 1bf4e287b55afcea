"""The fields of a config.json, read so that none is overlooked."""

from collections.abc import Mapping
from typing import Any

EXTRA = "warploom"
"""Our own field: choices of the training, which leave the logits alone."""


class Config:
    """The fields of a config.json, which remembers those that were asked for.

    Args:
        given: The fields; null is absent.
        defaults: Values of absent fields, or functions of this that compute them.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._given, self._defaults = given, defaults
        self._asked = {EXTRA}
        self._faults: list[str] = []

    def __getitem__(self, name: str) -> Any:
        """Return a field or its default; `KeyError` if there is neither."""
        value = self.get(name)
        if value is None:
            default = self._defaults[name]
            return default(self) if callable(default) else default
        return value

    def __contains__(self, name: str) -> bool:
        """Whether a field is there, be it null."""
        return name in self._given

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, `default` where it is absent."""
        self._asked.add(name)
        value = self._given.get(name)
        return default if value is None else value

    def refuse(self, name: str, value: Any, would: str) -> None:
        """Note a value that cannot be honoured, and what it would change."""
        self._asked.add(name)
        self._faults.append(f"{name}={value!r} ({would})")

    def close(self, ignored: set[str]) -> None:
        """Raise all faults, with the fields that nobody asked for."""
        for name, value in self._given.items():
            if value is not None and name not in self._asked | ignored:
                self.refuse(name, value, "a field that is not known here: it may change the model")
        if self._faults:
            raise ValueError(f"values that cannot be honoured: {', '.join(self._faults)}")
