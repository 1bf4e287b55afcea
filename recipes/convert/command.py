"""`warploom convert`: weights of another format, or dtype, as a Hugging Face folder.

    warploom convert SmolLM2-135M-Instruct.Q4_1.gguf smol
    warploom convert hub/Qwen3-8B models/qwen3-8b-bf16 --dtype bf16

Tensor by tensor, in blocks: whatever the model's size, little of it is in memory at a time. What
was written is read again; the folder appears under its name when it is whole.
"""

import logging
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

from warploom.models import hf
from warploom.models.hf.files import Reader, Writer, entries, flush, write_json
from warploom.models.hf.tensors import biases_of
from warploom.models.hf.texts import check_tokenizer, copy_texts, tokenizer_files

from ..errors import UserError, unboxed
from .source import Folder, Source, tensors_of

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn weights into a Hugging Face folder."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A GGUF file, or a Hugging Face folder."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to write; must not exist."""
    dtype: Literal["keep", "bf16", "float32"] = "keep"
    """Of the tensors; `keep` takes that of the file, and float32 for what is quantised."""
    shard_bytes: int = 5_000_000_000
    """Largest file of tensors, in bytes; what is larger becomes several with an index."""
    tokenizer: Path | None = None
    """A folder whose tokenizer is taken instead of the source's own."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom convert`; those of the process when None.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the source is missing, damaged or of an unknown kind, or the target exists.
    """
    with unboxed():
        command = tyro.cli(Convert, prog="warploom convert", description=__doc__, args=argv)
    try:
        convert(command)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise UserError(str(error)) from error
    print(f"{command.target}: {_said(command.target)}")
    return 0


def _said(folder: Path) -> str:
    made, found = hf.architecture(folder), entries(folder)
    kinds = "/".join(sorted({entry.kind for entry in found.values()}))
    return f"{len(found)} tensors in {kinds}, {made.layers} layers of width {made.width}"


def convert(command: Convert) -> None:
    """Convert weights.

    Raises:
        FileExistsError: If the target exists.
        FileNotFoundError: If the source, or a file of it, is missing.
        ImportError: If the source is a GGUF file and the `gguf` package is not installed.
        ValueError: If the source cannot be honoured, is damaged or holds NaN.
        OSError: If the target cannot be written; nothing is left under its name.
    """
    target = command.target
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists: weights are never overwritten, name a new folder")
    source = _open(command.source)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if command.tokenizer is None:
            source.texts(partial)
        elif tokenizer_files(command.tokenizer):
            copy_texts(command.tokenizer, partial)
        else:
            raise FileNotFoundError(
                f"{command.tokenizer} must hold a tokenizer (tokenizer.json, ...)"
            )
        check_tokenizer(partial, source.architecture)
        _tensors(source, partial, command)
        hf.architecture(partial)
        flush(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(path: Path) -> Source:
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a GGUF file or a Hugging Face folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} must be a GGUF file or a Hugging Face folder; it begins with {magic!r}"
        )
    from .gguf import GGUF

    return GGUF(path)


def _tensors(source: Source, folder: Path, command: Convert) -> None:
    """Write config.json and the tensors, and read these again."""
    wanted = {"bf16": torch.bfloat16, "float32": torch.float32}.get(command.dtype)
    stored, biases = tensors_of(source.architecture), biases_of(source.architecture)
    dtypes = {n: source.dtype(n) if n in biases else wanted or source.dtype(n) for n in stored}
    kinds = sorted({str(dtypes[name])[6:] for name in stored if name not in biases})
    apart = ("dtype", "quantization_config")  # said below; nothing is packed any more
    config = {name: value for name, value in source.config.items() if name not in apart}
    config["torch_dtype"] = kinds[0] if len(kinds) == 1 else None
    write_json(folder / "config.json", config)
    shapes = {name: (dtypes[name], one.shape) for name, one in stored.items()}
    writer = Writer(folder, shapes, command.shard_bytes)
    sums = dict.fromkeys(stored, 0)
    total = sum(dtypes[n].itemsize * torch.Size(one.shape).numel() for n, one in stored.items())
    with _progress() as progress:
        task = progress.add_task("writing", total=total)

        def passed(name: str) -> Iterator[Tensor]:
            for block in source.blocks(name):
                made = block.to(dtypes[name]).contiguous()
                sums[name] = _sum(made, sums[name])
                progress.advance(task, made.nbytes)
                yield made

        for name in stored:
            writer.write(name, passed(name))
        task = progress.add_task("reading", total=total)
        with Reader() as reader:
            for name, entry in entries(folder).items():
                found = 0
                for _, block in reader.blocks(entry):
                    found = _sum(block, found)
                    progress.advance(task, block.nbytes)
                if found != sums[name]:
                    raise OSError(f"{entry.file.name} does not hold {name} as it was written")


def _sum(block: Tensor, before: int) -> int:
    """Add a block to the checksum of a tensor."""
    return zlib.crc32(block.view(-1).view(torch.uint8).numpy().data, before)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
    )
