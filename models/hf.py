"""Hugging Face folders (config.json, safetensors, tokenizer) in and out, tensor by tensor.

`load` reads on each rank only the slices that it holds. `save` puts the logical tensors together
one at a time and writes at most one file's worth from memory; the folder appears under its name
when it is whole, or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from warploom.parallel.collectives import Group, gather_json
from warploom.parallel.export import export
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Piece

from .decoder import Architecture, Decoder
from .families import of_architecture, of_model_type

_READABLE = 0o644  # safetensors writes for the owner alone
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.*")
_SHARD_BYTES = 5_000_000_000


def architecture(folder: str | Path) -> Architecture:
    """Read the architecture of a folder's config.json.

    Raises:
        FileNotFoundError: If there is no config.json.
        ValueError: If no family has its `model_type`, a size is missing, or fields have values that
            `Decoder` cannot honour; all of them are listed.
    """
    config = _read_json(Path(folder) / "config.json")
    family = of_model_type(config.get("model_type", ""))
    wrong = family.unsupported(config)
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"{folder}/config.json has values that cannot be honoured: {found}")
    try:
        made: Architecture = family.read(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json must have {error.args[0]!r}") from None
    return made


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    recompute: str = "none",
    z_loss: float = 0.0,
) -> Decoder:
    """Build a decoder from a Hugging Face folder.

    Args:
        folder: Holds config.json and model.safetensors, or its parts with their index.
        mesh: Groups of ranks; `None` for one rank.
        dtype: Of the parameters; `None` for that of the file.
        device: Where the parameters go; `None` for the CPU.
        recompute: As in `Decoder`.
        z_loss: As in `Decoder`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the config cannot be honoured, or tensors are missing, unknown or of another
            shape; all of them are listed.
    """
    made = architecture(folder)
    where = locate(folder)
    if dtype is None:
        dtype = _stored_dtype(where)
    model = Decoder(
        made,
        mesh=mesh,
        recompute=recompute,
        z_loss=z_loss,
        dtype=dtype,
        device=device or "cpu",
    )
    load_into(model, folder)
    return model


@torch.no_grad()
def load_into(model: Decoder, folder: str | Path) -> None:
    """Overwrite the parameters of `model` with those of a Hugging Face folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If tensors are missing, unknown or of another shape; nothing is changed then.
    """
    where = locate(folder)
    _check(model.architecture, where, folder)
    rename = of_architecture(model.architecture).rename
    wanted: dict[Path, list[tuple[Piece, Tensor]]] = {}
    parameters = dict(model.named_parameters())
    for path, layout in model.logical_layouts().items():
        parameters[path].zero_()  # padding
        for piece in layout.pieces:
            target = piece.of_local(parameters[path])
            wanted.setdefault(where[rename(piece.name)], []).append((piece, target))
    for file, items in wanted.items():
        with safe_open(file, framework="pt") as opened:
            for piece, target in items:
                stored = opened.get_slice(rename(piece.name))
                target.copy_(stored[tuple(slice(*s) for s in piece.slices)])


def save(
    model: Decoder,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    card: str | None = None,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a decoder as a folder that `transformers` loads; every rank of the mesh calls it.

    Args:
        model: What to write.
        folder: Must not exist.
        tokenizer_folder: Its tokenizer's files are copied, and its end-of-text id goes into
            config.json and generation_config.json.
        card: Text of README.md.
        shard_bytes: Largest file of tensors, in bytes; what is larger becomes several with an
            index. Also bounds the memory that the write takes, but for one tensor.

    Raises:
        FileExistsError: If `folder` exists.
        FileNotFoundError: If `tokenizer_folder` holds no tokenizer.
        ValueError: If `transformers` could not load this architecture.
        OSError: If a file cannot be written; nothing is left under `folder`.
    """
    final, tokenizer = Path(folder), Path(tokenizer_folder) if tokenizer_folder else None
    world = None if model.mesh is None else model.mesh.world
    _refuse(model, final, tokenizer, world)
    rank = 0 if model.mesh is None else model.mesh.rank
    partial = final.with_name(f".{final.name}.partial")
    error: OSError | None = None
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_texts(model, partial, tokenizer, card)
    except OSError as failed:  # the other ranks are about to gather: go with them, then raise
        error = failed
    error = _write_tensors(model, partial, shard_bytes, error)
    if rank == 0:
        try:
            if error is None:
                _flush(partial)
                partial.rename(final)
        except OSError as failed:
            error = failed
        shutil.rmtree(partial, ignore_errors=True)
    texts = gather_json(str(error or ""), world)
    if error is not None:
        raise error
    if any(texts):
        raise OSError(f"{final} was not written by rank 0: {''.join(texts)}")


def _refuse(model: Decoder, final: Path, tokenizer: Path | None, world: Group) -> None:
    """Raise on every rank what `save` must not begin with."""
    if any(gather_json(final.exists(), world)):
        raise FileExistsError(f"{final} exists: weights are never overwritten, name a new folder")
    if tokenizer is not None and not _tokenizer_files(tokenizer):
        raise FileNotFoundError(f"{tokenizer} must hold a tokenizer (tokenizer.json, ...)")
    a = model.architecture
    if not a.qk_norm and a.width % a.heads:
        raise ValueError(
            f"width ({a.width}) must be divisible by heads ({a.heads}): transformers refuses other "
            "Llama models"
        )


def locate(folder: str | Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor in a folder.

    Raises:
        FileNotFoundError: If there are no safetensors, or the index names a file that is absent.
    """
    root = Path(folder)
    if (root / _INDEX).exists():
        names: dict[str, str] = _read_json(root / _INDEX)["weight_map"]
        absent = sorted({file for file in names.values() if not (root / file).exists()})
        if absent:
            raise FileNotFoundError(f"{root / _INDEX} names files that are absent: {_list(absent)}")
        return {name: root / file for name, file in names.items()}
    if not (root / _SINGLE).exists():
        raise FileNotFoundError(f"{root} must hold {_SINGLE} or {_INDEX}")
    with safe_open(root / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), root / _SINGLE)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} must hold {path.name}")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _list(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _headers(where: Mapping[str, Path]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of each tensor; reads no data."""
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_slice(name)
                yield name, tuple(stored.get_shape()), stored.get_dtype()


def _stored_dtype(where: Mapping[str, Path]) -> torch.dtype:
    kinds = sorted({kind for _, _, kind in _headers(where)})
    if len(kinds) != 1 or kinds[0] not in _DTYPES:
        raise ValueError(
            f"tensors must share one dtype of {', '.join(_DTYPES)} to be loaded as they are; found "
            f"{', '.join(kinds)}: pass dtype"
        )
    return _DTYPES[kinds[0]]


def logical_shapes(made: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face names of a model's tensors, in its order, with their shapes."""
    rename = of_architecture(made).rename
    layouts = Decoder(made, device="meta").logical_layouts()
    return {rename(p.name): p.shape for layout in layouts.values() for p in layout.pieces}


def _check(made: Architecture, where: Mapping[str, Path], folder: str | Path) -> None:
    """Compare names and shapes of a folder with what the architecture needs; list every fault."""
    expected = logical_shapes(made)
    found = {name: shape for name, shape, _ in _headers(where)}
    faults = []
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and not _redundant(name, made, where)]
    shapes = [
        f"{name} is {found[name]}, must be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    for title, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            faults.append(f"{title} ({len(names)}): {_list(names)}")
    if faults:
        raise ValueError(f"{folder} does not hold this model: tensors {'; '.join(faults)}")


def _redundant(name: str, made: Architecture, where: Mapping[str, Path]) -> bool:
    """Whether an extra tensor says nothing: rotary tables, or a tied head that equals its twin."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    rename = of_architecture(made).rename
    twin = rename("embedding.weight")
    if not made.tied or name != rename("head.weight") or twin not in where:
        return False
    with safe_open(where[name], framework="pt") as a, safe_open(where[twin], framework="pt") as b:
        return torch.equal(a.get_tensor(name), b.get_tensor(twin))


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({p for glob in _TOKENIZER for p in folder.glob(glob) if p.is_file()})


def _special_ids(tokenizer: Path) -> dict[str, int]:
    """Return `bos_token_id` and `eos_token_id`, as far as a tokenizer's files name them."""
    config, vocabulary = tokenizer / "tokenizer_config.json", tokenizer / "tokenizer.json"
    if not (config.exists() and vocabulary.exists()):
        return {}
    added = {t["content"]: t["id"] for t in _read_json(vocabulary).get("added_tokens", ())}
    named = _read_json(config)
    ids = {}
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in added:
            ids[f"{key}_id"] = added[text]
    return ids


def _write_texts(model: Decoder, folder: Path, tokenizer: Path | None, card: str | None) -> None:
    """Write everything but the tensors."""
    special = _special_ids(tokenizer) if tokenizer is not None else {}
    config: dict[str, Any] = of_architecture(model.architecture).write(model.architecture)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype, **special}
    _write_json(folder / "config.json", config)
    if "eos_token_id" in special:
        _write_json(folder / "generation_config.json", special)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    for path in _tokenizer_files(tokenizer) if tokenizer is not None else ():
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    model: Decoder, folder: Path, shard_bytes: int, error: OSError | None
) -> OSError | None:
    """Gather the tensors in order and write them on rank 0; give back the first failure."""
    mesh, size = model.mesh, next(model.parameters()).element_size()
    writes = mesh is None or mesh.rank == 0
    shapes = logical_shapes(model.architecture)
    plan = _plan({n: torch.Size(s).numel() * size for n, s in shapes.items()}, shard_bytes)
    tensors = _gathered(model)
    index: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = _SINGLE if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        shard = {}
        for name, tensor in islice(tensors, len(names)):
            if tensor is not None and error is None:
                shard[name] = tensor
        index |= dict.fromkeys(names, file)
        try:
            if writes and error is None:
                save_file(shard, folder / file, metadata={"format": "pt"})
                (folder / file).chmod(_READABLE)
        except (OSError, SafetensorError) as failed:  # the latter for a full disk
            error = OSError(f"{folder / file} cannot be written: {failed}")
    if writes and error is None and len(plan) > 1:
        total = sum(torch.Size(s).numel() * size for s in shapes.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return error


def _plan(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Deal names to files in order, each of at most `most` bytes or one tensor."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def _gathered(model: Decoder) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each logical tensor in the order of `logical_shapes`: whole, on the CPU of rank 0."""
    rename = of_architecture(model.architecture).rename
    parameters, own = dict(model.named_parameters()), model.logical_layouts()
    whole = Decoder(model.architecture, device="meta").logical_layouts()
    names = [piece.name for layout in whole.values() for piece in layout.pieces]
    for name, tensor in export(parameters, own, names, model.mesh or Mesh.alone()):
        yield rename(name), tensor


def _flush(folder: Path) -> None:
    """Have the disk hold what was written, before its name says so."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
