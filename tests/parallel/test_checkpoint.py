"""Checkpoints: any topology loads any other, bit for bit; what does not fit is said in words."""

import json
import math
import os
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from warploom.parallel.checkpoint import (
    AsyncSaver,
    CheckpointError,
    Entry,
    commit,
    latest,
    load,
    read_state,
    save,
    set_aside,
    verify,
)
from warploom.parallel.checkpoint import saver as saver_module
from warploom.parallel.checkpoint.agreement import agree
from warploom.parallel.checkpoint.boxes import meet, sizes, uncovered, within
from warploom.parallel.checkpoint.index import DTYPES, Index, read_index
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Layout, Piece, narrow, rows, whole

PADDING = -77


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Do not wait for the disk: what is on it after a crash is test_checkpoint_faults.py's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def logical(name, shape, dtype=torch.float32):
    """Return the values of a logical tensor: the same on every rank and topology."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-99, 99, shape, generator=generator).to(dtype)


def local(prefix, layout, dtype=torch.float32, *, fill=True):
    """Return the local tensor of a layout, its padding and (unless filled) its values PADDING."""
    tensor = torch.full(layout.shape, PADDING).to(dtype)
    if fill:
        for piece in layout.pieces:
            values = logical(f"{prefix}/{piece.name}", piece.shape, dtype)
            piece.of_local(tensor).copy_(piece.of_logical(values))
    return tensor


def model_layouts(tp, at):
    """Return layouts as the layers of a model make them, for rank `at` of `tp`."""

    def share(n):
        each = -(-n // tp)
        return min(at * each, n), min(at * each + each, n)

    each = 12 // tp
    halves = [
        Piece(
            "mlp", (24, 3), ((2 * at * each + odd, 2 * (at + 1) * each, 2), (0, 3, 1)), (at_row, 0)
        )
        for odd, at_row in ((0, 0), (1, each))
    ]
    columns = Piece("out", (6, 8), ((0, 6, 1), (at * 8 // tp, (at + 1) * 8 // tp, 1)), (0, 0))
    turned = Piece("c_fc", (5, 8), ((0, 5, 1), columns.slices[1]), (0, 0), transposed=True)
    fused = (rows("q", (8, 6), *share(8)), rows("k", (4, 6), *share(4), 8 // tp))
    return {
        "embedding": Layout((-(-10 // tp), 6), (rows("embedding", (10, 6), *share(10)),)),
        "qkv": Layout((12 // tp, 6), fused),
        "out": Layout((6, 8 // tp), (columns,)),
        "c_fc": Layout((8 // tp, 5), (turned,)),
        "gate_up": Layout((2 * each, 3), tuple(halves)),
        "norm": whole("norm", (7,)),
        "scalar": whole("scalar", ()),
    }


def entries_of(mesh, *, fill=True):
    """Return weights in bf16, masters sharded over dp in float32, and counters."""
    layouts = model_layouts(mesh.degree("tp"), mesh.coordinate("tp"))
    dp, at = mesh.degree("dp"), mesh.coordinate("dp")
    made = []
    for layout in layouts.values():
        made.append(Entry("model", local("model", layout, torch.bfloat16, fill=fill), layout))
        if layout.shape:
            each = -(-layout.shape[0] // dp)
            own = narrow(
                layout, min(at * each, layout.shape[0]), min(at * each + each, layout.shape[0])
            )
            made.append(Entry("master", local("master", own, fill=fill), own))
            made.append(Entry("seen", local("seen", own, torch.int64, fill=fill), own))
    return made


def save_at(folders):
    for degrees, folder in folders.items():
        mesh = Mesh.build(degrees)
        state = {"step": 7, "degrees": degrees, "loss": 0.1 + 0.2, "rank": mesh.rank}
        assert save(folder, entries_of(mesh), state, mesh) == latest(folder)


def load_at(topologies, folders):
    for degrees in topologies:
        mesh = Mesh.build(degrees)
        expected = entries_of(mesh)
        for saved, folder in folders.items():
            found = entries_of(mesh, fill=False)
            state = load(latest(folder), found, mesh)
            assert state == {"step": 7, "degrees": saved, "loss": 0.1 + 0.2, "rank": 0}
            for want, got in zip(expected, found, strict=True):
                assert torch.equal(want.tensor, got.tensor), (saved, want.prefix, want.layout)


def test_any_topology_loads_any_other(ranks, tmp_path):
    worlds = {1: [""], 2: ["tp2", "dp2"], 4: ["tp4", "tp2,dp2", "dp4"]}
    folders = {d: str(tmp_path / f"at-{d}") for made in worlds.values() for d in made}
    for size, made in worlds.items():
        part = {degrees: folders[degrees] for degrees in made}
        save_at(part) if size == 1 else ranks(size, save_at, part)
    for size, made in worlds.items():
        load_at(made, folders) if size == 1 else ranks(size, load_at, made, folders)

    # each element is stored once, by the lowest rank that holds it
    indices = {degrees: read_index(latest(folder)) for degrees, folder in folders.items()}
    for index in indices.values():
        for name, record in index.tensors.items():
            stored = sum(math.prod(sizes(chunk.slices)) for chunk in record.chunks)
            assert stored == math.prod(record.shape), name
    assert {c.file for c in indices["dp4"].tensors["model/out"].chunks} == {
        "rank-00000.safetensors"
    }
    assert len(indices["tp2,dp2"].tensors["master/out"].chunks) == 4


@st.composite
def cut(draw, size):
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size)), draw(st.integers(1, 4))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_boxes_meet_as_sets_do(data):
    shape = data.draw(st.lists(st.integers(1, 9), max_size=3))
    index = np.arange(math.prod(shape)).reshape(shape)
    target, *parts = (
        tuple(data.draw(cut(size)) for size in shape) for _ in range(data.draw(st.integers(1, 5)))
    )

    def held(box):
        return index[tuple(slice(*c) for c in box)]

    found = []
    for part in parts:
        both = meet(part, target)
        expected = np.intersect1d(held(part), held(target))
        assert np.array_equal(np.sort(held(both).ravel()) if both is not None else [], expected)
        if both is not None:
            assert np.array_equal(held(part)[within(both, part)], held(both))
            assert np.array_equal(held(target)[within(both, target)], held(both))
            found.append(both)
    union = {i for box in found for i in held(box).ravel()}
    assert uncovered(target, found) == held(target).size - len(union)


def partition(data, shape):
    """Cut a logical tensor into pieces: ranges along one dimension, stepped along another."""
    boxes = [tuple((0, n, 1) for n in shape)]
    for dim, size in enumerate(shape):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, size))
            cuts = [(0, at, 1), (at, size, 1)]
        else:
            step = data.draw(st.integers(1, 3))
            cuts = [(first, size, step) for first in range(min(step, size))]
        boxes = [(*b[:dim], c, *b[dim + 1 :]) for b in boxes for c in cuts if range(*c)]
    return boxes


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_partition_loads_any_other_a_block_at_a_time(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=2)))
    folder = tmp_path_factory.mktemp("partition")
    mesh = Mesh.build("")

    def entries(fill):
        for box in partition(data, shape):
            turned = data.draw(st.booleans())
            piece = Piece("w", shape, box, (1, 2), turned)
            own = Layout(tuple(n + 3 for n in piece.sizes), (piece,))
            yield Entry("x", local("x", own, fill=fill), own)

    save(folder, list(entries(True)), {"step": 0}, mesh, block_bytes=data.draw(st.integers(1, 64)))
    verify(latest(folder))
    found = list(entries(False))
    load(latest(folder), found)
    for entry in found:
        assert torch.equal(entry.tensor, local("x", entry.layout))


def one(name="w", shape=(4, 3), dtype=torch.float32, prefix="master", *, fill=True):
    layout = whole(name, shape)
    return Entry(prefix, local(prefix, layout, dtype, fill=fill), layout)


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    entries = [one("norm.weight", (5,)), one("a", (3, 3), torch.float64), one("s", ())]
    path = save(tmp_path, entries, {"step": 120, "tokens": 1 << 40}, Mesh.build(""))
    assert path == tmp_path / "step-00000120"
    assert {p.name for p in path.iterdir()} == {"rank-00000.safetensors", "index.json"}
    stored = load_file(path / "rank-00000.safetensors")
    assert set(stored) == {"master/norm.weight@0", "master/a@0,0", "master/s@"}
    for entry in entries:
        (piece,) = entry.pieces
        key = f"{piece.name}@{','.join('0' * len(piece.shape))}"
        assert torch.equal(stored[key], entry.tensor)
    index = json.loads((path / "index.json").read_text())
    assert index["version"] == 1
    assert index["world"] == 1
    assert index["state"] == {"step": 120, "tokens": 1 << 40} == read_state(path)
    assert index["tensors"]["master/a"]["dtype"] == "float64"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    for shape in ((3, 2), (), (0,), (2, 0)):
        name = f"w{len(shape)}{math.prod(shape)}"
        entry, found = one(name, shape, dtype), one(name, shape, dtype, fill=False)
        path = save(tmp_path / name, [entry], {"step": 1}, Mesh.build(""))
        load(path, [found])
        assert (
            torch.equal(found.tensor.view(torch.uint8), entry.tensor.view(torch.uint8))
            if (shape)
            else found.tensor.item() == entry.tensor.item()
        )


def test_asynchronous_equals_synchronous(tmp_path, monkeypatch):
    mesh = Mesh.build("tp1")
    entries = entries_of(mesh)
    expected = save(tmp_path / "sync", entries, {"step": 3}, mesh)
    gate = threading.Event()
    write_part = saver_module.write_part

    def late(job):
        assert gate.wait(30)
        write_part(job)

    monkeypatch.setattr(saver_module, "write_part", late)
    saver = AsyncSaver()
    coming = saver.start(tmp_path / "async", entries, {"step": 3}, mesh)
    for entry in entries:
        entry.tensor.fill_(0)  # training goes on
    assert latest(tmp_path / "async") is None
    gate.set()
    assert saver.finish() == coming == latest(tmp_path / "async")
    assert saver.finish() is None
    for file in expected.iterdir():
        assert file.read_bytes() == (coming / file.name).read_bytes(), file.name


def test_the_next_start_waits_and_buffers_are_not_shared(tmp_path):
    mesh, saver = Mesh.build(""), AsyncSaver()
    entry = one()
    for step in range(5):
        entry.tensor.fill_(step)
        saver.start(tmp_path, [entry], {"step": step}, mesh)
    saver.finish()
    for step in range(5):
        found = one(fill=False)
        load(tmp_path / f"step-{step:08d}", [found])
        assert torch.equal(found.tensor, torch.full((4, 3), float(step)))


def test_keep_deletes_the_oldest(tmp_path):
    saver = AsyncSaver(keep=2)
    for step in (1, 5, 99_999_999, 100_000_000):
        saver.start(tmp_path, [one()], {"step": step}, Mesh.build(""))
    saver.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    assert latest(tmp_path).name == "step-100000000"
    with pytest.raises(ValueError, match="step 99999998 must be the newest"):
        save(tmp_path, [one()], {"step": 99_999_998}, Mesh.build(""))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        AsyncSaver(keep=0)


def test_an_old_one_that_cannot_be_deleted_is_said(tmp_path, monkeypatch):
    saver = AsyncSaver(keep=1)
    saver.start(tmp_path, [one()], {"step": 1}, Mesh.build(""))
    saver.finish()

    def refuse(folder, keep):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(commit, "prune", refuse)
    saver.start(tmp_path, [one()], {"step": 2}, Mesh.build(""))
    with pytest.raises(RuntimeError, match="step-00000002 is complete, but .* Permission denied"):
        saver.finish()
    verify(latest(tmp_path))
    assert latest(tmp_path).name == "step-00000002"


def test_a_checkpoint_is_never_overwritten(tmp_path):
    mesh = Mesh.build("")
    path = save(tmp_path, [one()], {"step": 5}, mesh)
    before = (path / "index.json").read_bytes()
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step {step} must be the newest.*step-00000005"):
            save(tmp_path, [one()], {"step": step}, mesh)
    assert (path / "index.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    (aside,) = set_aside(tmp_path, after=3)
    assert latest(tmp_path) is None
    assert save(tmp_path, [one()], {"step": 4}, mesh) == latest(tmp_path)
    assert aside.is_dir()


def test_latest_reads_what_is_complete(tmp_path):
    assert latest(tmp_path / "absent") is None
    for name in ("step-00000009.tmp-ab12", "step-00000008", "step-x", "step-00000007.aside-00"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) is None
    save(tmp_path, [one()], {"step": 2}, Mesh.build(""))
    assert latest(str(tmp_path)).name == "step-00000002"


def test_what_does_not_fit_is_said(tmp_path):
    mesh = Mesh.build("")
    path = save(tmp_path, [one("a"), one("b"), one("a", prefix="adamw")], {"step": 1}, mesh)
    with pytest.raises(
        ValueError,
        match="lacks 1 tensors that are asked for: master/c, and holds "
        "2 that are not: master/b, adamw/a",
    ):
        load(path, [one("a"), one("c")])
    with pytest.raises(ValueError, match="holds 1 that are not: adamw/a"):
        load(path, [one("a"), one("b")])
    weights = [one("a", fill=False), one("b", fill=False)]
    assert load(path, weights, allow_unexpected=True) == {"step": 1}
    assert torch.equal(weights[1].tensor, one("b").tensor)
    with pytest.raises(ValueError, match=r"master/a has shape \(4, 3\), \(5, 3\) is asked for"):
        load(path, [one("a", (5, 3))], allow_unexpected=True)
    with pytest.raises(ValueError, match=r"lacks 1 .*master/c, and differs in 1: master/a has sh"):
        load(path, [one("a", (5, 3)), one("c")], allow_unexpected=True)
    with pytest.raises(ValueError, match="master/a is float32, float64 is asked for"):
        load(path, [one("a", dtype=torch.float64)], allow_unexpected=True)
    with pytest.raises(CheckpointError, match="must be a checkpoint"):
        load(tmp_path, [one("a")])


def test_bad_arguments_are_said(tmp_path):
    mesh = Mesh.build("")
    with pytest.raises(ValueError, match=r"shape \(2,\), its layout says \(3,\)"):
        Entry("master", torch.zeros(2), whole("w", (3,)))
    with pytest.raises(TypeError, match="complex64 cannot be saved"):
        Entry("master", torch.zeros(2, dtype=torch.complex64), whole("w", (2,)))
    for state in ({}, {"step": -1}, {"step": "1"}, {"step": True}):
        with pytest.raises(ValueError, match="state must have a `step`"):
            save(tmp_path, [], state, mesh)
    for value in (float("nan"), torch.zeros(1), {1, 2}):
        with pytest.raises(ValueError, match="state must be JSON values"):
            save(tmp_path, [], {"step": 1, "x": value}, mesh)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_covered_is_named(tmp_path):
    mesh = Mesh.build("")
    part = Layout((3, 3), (rows("w", (4, 3), 1, 4),))
    with pytest.raises(ValueError, match=r"master/w \(4, 3\): 3 elements are on no rank"):
        save(tmp_path, [Entry("master", torch.zeros(3, 3), part)], {"step": 1}, mesh)
    assert not list(tmp_path.iterdir())

    path = save(tmp_path, [one()], {"step": 1}, mesh)
    index = read_index(path)
    record = index.tensors["master/w"]
    chunk = replace(record.chunks[0], slices=((1, 4, 1), (0, 3, 1)))
    lost = {"master/w": replace(record, chunks=(chunk,))}
    (path / "index.json").write_text(
        Index(1, index.state, index.files, lost, index.block_bytes).to_text()
    )
    with pytest.raises(CheckpointError, match=r"does not cover master/w \(4, 3\): 3 elements"):
        load(path, [one()])


def test_tied_entries_are_stored_once_and_contradictions_refused(tmp_path):
    mesh = Mesh.build("")
    path = save(tmp_path, [one(), one()], {"step": 1}, mesh)
    assert len(read_index(path).tensors["master/w"].chunks) == 1
    top = Layout((2, 3), (rows("w", (4, 3), 0, 2),))
    with pytest.raises(ValueError, match="different slices of master/w"):
        save(tmp_path, [one(), Entry("master", torch.zeros(2, 3), top)], {"step": 2}, mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_rows_that_are_needed_are_read_and_these_are_hashed(tmp_path):
    entry = one("w", (100, 4))
    path = save(tmp_path, [entry], {"step": 1}, Mesh.build(""), block_bytes=10 * 16)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-35 * 16] ^= 1  # in row 65: block 60:70
    file.write_bytes(data)
    for start, stop in ((0, 60), (70, 100)):
        own = Layout((stop - start, 4), (rows("w", (100, 4), start, stop),))
        found = Entry("master", local("master", own, fill=False), own)
        load(path, [found])
        assert torch.equal(found.tensor, entry.tensor[start:stop])
    own = Layout((1, 4), (rows("w", (100, 4), 69, 70),))
    with pytest.raises(CheckpointError, match=r"rank-00000.*master/w.*rows 60:70 .* hash"):
        load(path, [Entry("master", torch.zeros(1, 4), own)])


def load_what_one_rank_lacks(folder):
    mesh = Mesh.build("dp2")
    mine = [one("a"), one("b"), one("c")][: 2 + mesh.rank]
    with pytest.raises(ValueError, match="^rank 1: .*master/c$" if mesh.rank == 0 else "master/c$"):
        load(latest(folder), mine, mesh)
    with pytest.raises(ValueError, match="state must have a `step`"):
        save(folder, mine, {"step": 2} if mesh.rank else {}, mesh)
    with pytest.raises(ValueError, match="must be the newest"):
        save(folder, mine, {"step": 1}, mesh)
    with pytest.raises(ValueError, match=r"the same step; they are at \[2, 3\]"):
        save(folder, mine, {"step": 2 + mesh.rank}, mesh)
    # a damaged checkpoint of one, a wrong name of the other: all go on the same way
    with pytest.raises(CheckpointError if mesh.rank == 0 else ValueError):
        agree(None, CheckpointError("x") if mesh.rank == 0 else ValueError("y"))
    with pytest.raises(CheckpointError, match="^x$" if mesh.rank == 0 else "^rank 0: x$"):
        agree(mesh, CheckpointError("x") if mesh.rank == 0 else ValueError("y"))
    # what no rank asks for is unexpected; what one asks for is not
    with pytest.raises(ValueError, match="holds 1 that are not: master/b$"):
        load(latest(folder), [one("a")][: mesh.rank], mesh)


def test_an_error_of_one_rank_is_an_error_of_all(ranks, tmp_path):
    save(tmp_path, [one("a"), one("b")], {"step": 1}, Mesh.build(""))
    ranks(2, load_what_one_rank_lacks, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.gpu
def test_tensors_on_a_gpu_go_through_pinned_memory(tmp_path):
    mesh, saver = Mesh.build(""), AsyncSaver()
    expected = entries_of(mesh)
    for step in (1, 2):
        there = [Entry(e.prefix, e.tensor.cuda(), e.layout) for e in expected]
        saver.start(tmp_path, there, {"step": step}, mesh)
        for entry in there:
            entry.tensor.fill_(0)
        saver.finish()
        found = [replace(e, tensor=torch.zeros_like(e.tensor, device="cuda")) for e in expected]
        load(latest(tmp_path), found, mesh)
        for want, got in zip(expected, found, strict=True):
            for piece in want.layout.pieces:
                assert torch.equal(piece.of_local(got.tensor).cpu(), piece.of_local(want.tensor))
