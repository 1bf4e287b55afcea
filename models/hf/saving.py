"""A decoder to a folder, which is read again before it gets its name."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path

import torch
from torch import Tensor

from warploom.parallel.collectives import Group, gather_json
from warploom.parallel.export import export
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Layout

from ..batch import Batch
from ..decoder import Decoder
from ..families import Family, of_architecture
from ..families.tensors import Stored
from .files import Reader, Writer, flush, write_json
from .standard import standard
from .tensors import checked, held, refuse_nan, stored_tensors_of, targets
from .texts import architecture, check_tokenizer, copy_texts, special_ids, tokenizer_files

_SHARD_BYTES = 5_000_000_000
_PROBE = 16  # tokens


def save(
    model: Decoder, folder: str | Path, tokenizer_folder: str | Path | None = None,
    card: str | None = None, *, shard_bytes: int = _SHARD_BYTES, check: bool = True,
) -> None:  # fmt: skip
    """Write a decoder as a folder that `transformers` loads; every rank of the mesh calls it.

    Args:
        model: What to write.
        folder: Must not exist.
        tokenizer_folder: Its tokenizer's files, chat template and generation_config.json are
            copied, and its end-of-text id goes into config.json and generation_config.json.
        card: Text of README.md.
        shard_bytes: Largest file of tensors, in bytes; what is larger becomes several with an
            index. The write holds one tensor of the Hub at a time.
        check: Whether every rank reads its slices back and compares them bit by bit, and the logits
            that the written config.json gives on a few tokens with the model's, before the folder
            gets its name. All ranks must see it for that.

    Raises:
        FileExistsError: If `folder` exists.
        FileNotFoundError: If `tokenizer_folder` holds no tokenizer.
        ValueError: If `transformers` could not load this architecture, or the tokenizer has more
            ids than the vocabulary.
        OSError: If a file cannot be written, or does not hold what was written; nothing is left
            under `folder`.
    """
    if model.architecture.mup_base is not None:
        with standard(model):
            return save(model, folder, tokenizer_folder, card, shard_bytes=shard_bytes, check=check)
    final, tokenizer = Path(folder), Path(tokenizer_folder) if tokenizer_folder else None
    family = _refuse(model, final, tokenizer)
    writes = model.mesh is None or model.mesh.rank == 0
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_texts(model, family, partial, tokenizer, card)

    def finish() -> None:
        if writes:
            flush(partial)
            partial.rename(final)

    checks = (bound(_compare, model, partial), bound(_probe, model, partial))
    tensors = bound(_write_tensors, model, family, partial, shard_bytes)
    try:
        for step in (begin, tensors, *(checks if check else ()), finish):
            _together(step, final, _world(model))
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)


def _together(step: Callable[[], None], final: Path, world: Group) -> None:
    """Run a step on every rank; raise on all where one fails."""
    error: OSError | ValueError | None = None
    try:
        step()
    except (OSError, ValueError) as failed:  # the other ranks are about to gather
        error = failed
    said = "" if error is None else f"{type(error).__name__}: {error}"
    failures = [text for text in gather_json(said, world) if text]
    if error is not None:
        raise error
    if failures:
        raise OSError(f"{final} was not written: {failures[0]}")


def _refuse(model: Decoder, final: Path, tokenizer: Path | None) -> Family:
    """Raise on every rank what `save` must not begin with; return the family to write."""
    if any(gather_json(final.exists() or final.is_symlink(), _world(model))):
        raise FileExistsError(f"{final} exists: weights are never overwritten, name a new folder")
    if tokenizer is not None:
        if not tokenizer_files(tokenizer):
            raise FileNotFoundError(f"{tokenizer} must hold a tokenizer (tokenizer.json, ...)")
        check_tokenizer(tokenizer, model.architecture)
    a = model.architecture
    family = of_architecture(a)
    if family.model_type == "llama" and a.width % a.heads:
        raise ValueError(
            f"width ({a.width}) must be divisible by heads ({a.heads}): transformers refuses other "
            "Llama models"
        )
    return family


def _write_texts(
    model: Decoder, family: Family, folder: Path, tokenizer: Path | None, card: str | None
) -> None:
    """Write everything but the tensors."""
    dtype = str(next(model.parameters()).dtype)[6:]
    special = {} if tokenizer is None else special_ids(tokenizer)
    config = family.config(model.architecture) | {"torch_dtype": dtype, **special}
    write_json(folder / "config.json", config)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    if tokenizer is not None:
        copy_texts(tokenizer, folder)


def _write_tensors(model: Decoder, family: Family, folder: Path, shard_bytes: int) -> None:
    """Gather the tensors in order and write them on rank 0, which gathers on when it fails."""
    stored, own = stored_tensors_of(model.architecture, family), held(model)
    dtypes = {p.name: str(tensor.dtype)[6:] for _, layout, tensor in own for p in layout.pieces}
    kinds = {
        name: kind for rank in gather_json(dtypes, _world(model)) for name, kind in rank.items()
    }
    tensors = {
        name: (getattr(torch, kinds[one.parts[0].logical]), one.shape)
        for name, one in stored.items()
    }
    writer: Writer | None = None
    error: OSError | None = None
    for name, tensor in _gathered(model, own, stored):
        try:
            if tensor is not None and error is None:
                writer = writer or Writer(folder, tensors, shard_bytes)
                writer.write(name, [tensor])
        except OSError as failed:
            error = OSError(f"{name} cannot be written to {folder}: {failed}")
    if error is not None:
        raise error


def _gathered(
    model: Decoder, own: list[tuple[str, Layout, Tensor]], stored: dict[str, Stored]
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each tensor of the Hub: whole, on the CPU of rank 0."""
    tensors = {path: tensor for path, _, tensor in own}
    layouts = {path: layout for path, layout, _ in own}
    names = [part.logical for one in stored.values() for part in one.parts]
    gathered = export(tensors, layouts, names, model.mesh or Mesh.alone())
    for name, one in stored.items():
        whole: Tensor | None = None
        for part in one.parts:
            _, tensor = next(gathered)
            if tensor is not None and one.plain:
                whole = tensor
            elif tensor is not None:
                whole = tensor.new_empty(one.shape) if whole is None else whole
                whole[tuple(slice(*s) for s in part.slices)] = part.as_stored(tensor)
        yield name, whole
    next(gathered, None)


def _world(model: Decoder) -> Group:
    return None if model.mesh is None else model.mesh.world


def _compare(model: Decoder, folder: Path) -> None:
    """Compare this rank's slices with what the files hold, bit by bit."""
    if not folder.exists():
        raise OSError(
            f"{folder} must be seen by every rank: name a shared one, or pass check=False"
        )
    with Reader() as reader:
        for name, entry, piece, target in targets(model, checked(model.architecture, folder)):
            for rows, block in reader.blocks(entry, piece):
                refuse_nan(block, name, entry)
                if not torch.equal(block, (target[rows] if entry.shape else target).cpu()):
                    raise OSError(f"{entry.file} does not hold {name} as it was written")


@torch.no_grad()
def _probe(model: Decoder, folder: Path) -> None:
    """Compare what each stage gives by the written config.json with what the model gives.

    The parameters, which the files hold bit by bit, serve both: this takes no memory of their size.
    """
    dtype, device = (getattr(next(model.parameters()), name) for name in ("dtype", "device"))
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    draw = torch.Generator().manual_seed(0)
    shape = (1, min(_PROBE, model.architecture.max_positions))
    tokens = torch.randint(model.architecture.vocabulary, shape, generator=draw).to(device)
    twins = []
    for made in (model.architecture, architecture(folder)):
        twin = Decoder(made, mesh=model.mesh, stages=model.stages, dtype=dtype, device="meta")
        twin.load_state_dict(own, strict=False, assign=True)
        twins.append(twin)
    for stage in model.held:
        x = None
        if stage:
            size, _ = twins[0].boundary(stage - 1, Batch(tokens, tokens))
            x = torch.randn(size, generator=draw).to(device, dtype)
        ours, theirs = (twin.infer(stage, x, tokens) for twin in twins)
        most = float(ours.abs().max()) * torch.finfo(dtype).eps ** 0.5
        if not (far := float((ours - theirs).abs().max())) <= most:
            raise OSError(
                f"{folder}/config.json describes another model: outputs of stage {stage} differ by "
                f"{far:.3g}, more than {most:.3g}"
            )
