"""What a conversion reads: an architecture, its tensors by their names at the Hub, and texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from warploom.models.architecture import Architecture
from warploom.models.families import of_architecture
from warploom.models.families.tensors import Stored
from warploom.models.hf.files import DTYPES, Reader, read_json
from warploom.models.hf.tensors import checked, refuse_nan, stored_tensors_of
from warploom.models.hf.texts import architecture, copy_texts


class Source(Protocol):
    """Weights on a disk."""

    architecture: Architecture
    config: dict[str, Any]
    """The fields of config.json."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor where none is asked for."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks of its first dimension; one may overwrite the one before."""
        ...

    def texts(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation_config.json into a folder."""
        ...


class Folder:
    """A Hugging Face folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the config cannot be honoured, or tensors do not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.architecture = architecture(path)
        self.config = read_json(path / "config.json")
        _, self._entries = checked(self.architecture, path)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the file."""
        return DTYPES[self._entries[name].kind]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Read a tensor; `ValueError` where it is not finite."""
        entry = self._entries[name]
        with Reader() as reader:
            for _, block in reader.blocks(entry):
                refuse_nan(block, name, entry)
                yield block

    def texts(self, folder: Path) -> None:
        """Copy what is there."""
        copy_texts(self.path, folder)


def tensors_of(made: Architecture) -> dict[str, Stored]:
    """Return the tensors that a folder with this architecture holds, in its order."""
    return stored_tensors_of(made, of_architecture(made))
