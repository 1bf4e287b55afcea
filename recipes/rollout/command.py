"""What the commands that run an engine share: their options, and the engine of a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from warploom.models import hf

from ..errors import UserError
from ..files import read_json
from .codec import Codec
from .engine import Engine
from .progress import loading
from .sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A folder, and how its model runs."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A Hugging Face folder: config.json, safetensors, tokenizer.json."""
    dtype: Literal["float32", "bf16", "float16"] | None = None
    """Of weights and activations; by default that of the file."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model is."""
    pages: int | None = None
    """Pages of the cache; by default what the memory can hold."""
    batch_invariant: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Give a text the same bits alone or in company; on the CPU, and slower."""

    def engine(self, codec: Codec, **options: Any) -> Engine:
        """Load the model and return its engine; a terminal is told meanwhile.

        Args:
            codec: The folder's tokenizer.
            **options: Of `Engine`.

        Raises:
            UserError: If the folder cannot be read, the tokenizer is another model's, torch cannot
                use the device, or it has no batch-invariant form.
        """
        try:
            kind = torch.empty(0, device=self.device).device
        except (AssertionError, RuntimeError) as error:  # the former where torch has no CUDA
            why = str(error).partition("\n")[0]
            raise UserError(
                f"device ({self.device}) must be one that torch can use here: {why}"
            ) from None
        name = "bfloat16" if self.dtype == "bf16" else self.dtype
        dtype = None if name is None else getattr(torch, name)
        if self.batch_invariant and kind.type != "cpu":
            raise UserError(f"device must be cpu with --batch-invariant; got {kind}: name it so")
        try:
            with loading(self.folder):
                model = hf.load(self.folder, dtype=dtype, device=self.device)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
        if self.batch_invariant and next(model.parameters()).dtype == torch.float64:
            raise UserError(
                f"dtype must not be float64 with --batch-invariant, as {self.folder} has it: add "
                f"--dtype float32"
            )
        options |= {"pages": self.pages, "batch_invariant": self.batch_invariant}
        return Engine(model.eval(), codec, **options)


def folder_sampling(folder: Path, *, temperature: float = 0.0) -> Sampling:
    """Return how a folder's generation_config.json would have tokens chosen.

    Args:
        folder: Of Hugging Face's layout.
        temperature: Where the file does not say that they are drawn.

    Raises:
        UserError: If it says what cannot be.
    """
    config = read_json(folder / "generation_config.json", missing={})
    names = {"top_k", "top_p", "min_p", "temperature"} if config.get("do_sample") else set()
    said = {name: config[name] for name in names if config.get(name) is not None}
    try:
        temperature = 1.0 if names else temperature
        return Sampling(**{"temperature": temperature, "max_tokens": 256, **said})
    except UserError as error:
        raise UserError(f"{folder}/generation_config.json: {error}") from None
