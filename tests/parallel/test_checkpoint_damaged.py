"""Checkpoints that lost their index, hold another's, or are damaged several at a time."""

import hashlib
import json
import logging
import re

import pytest
import torch

from warploom.parallel.checkpoint import (
    CheckpointError,
    Entry,
    latest,
    latest_good,
    load,
    read_state,
    save,
    verify,
)
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import whole


def one(value=0):
    return Entry("master", torch.full((4, 3), float(value)), whole("a", (4, 3)))


def saved(folder, *steps):
    """Save the steps and return their paths."""
    return [save(folder, [one(step)], {"step": step}, Mesh.build("")) for step in steps]


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_without_index_makes_way_for_its_step(tmp_path, caplog, empty):
    six, eight = saved(tmp_path, 6, 8)
    (eight / "index.json").unlink()
    if empty:
        (eight / "rank-00000.safetensors").unlink()
    assert latest(tmp_path) == six
    with caplog.at_level(logging.WARNING):
        assert saved(tmp_path, 8) == [eight]
    verify(eight)
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.name.startswith("step-00000008.damaged-")
    assert (aside / "rank-00000.safetensors").is_file() is not empty
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(eight) in said
    assert str(aside) in said
    save(tmp_path, [one()], {"step": 10}, Mesh.build(""), keep=1)
    assert latest_good(tmp_path) == latest(tmp_path) == tmp_path / "step-00000010"
    assert sorted(tmp_path.iterdir()) == sorted([aside, tmp_path / "step-00000010"])


def hashed(values):
    """Write JSON that has the hash of an index."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return json.dumps({**values, "sha256": hashlib.sha256(text.encode()).hexdigest()})


FIELDS = {"version": 1, "world": 1, "state": {}, "files": {}, "tensors": {}, "block_bytes": 64}
SHAPES = [
    "",
    "[]",
    "[1]",
    '["sha256"]',
    "{}",
    '{"format": 1}',
    "1",
    "2.5",
    "null",
    "true",
    '"sha256"',
]
SHAPES += ["[" * 200_000, "\0" * 64, '{"sha256": null}', '{"sha256": [], "version": 1}']
SHAPES += [hashed({"version": 1}), hashed({**FIELDS, "files": [1]})]
SHAPES += [hashed({**FIELDS, "files": {"a": {"size": 1}}}), hashed({**FIELDS, "tensors": {"a": 1}})]
SHAPES += [hashed({**FIELDS, "tensors": {"a": {"shape": 1, "dtype": "float32", "chunks": []}}})]


@pytest.mark.parametrize("text", SHAPES, ids=lambda text: text[:20] or "empty")
def test_an_index_of_another_shape_is_named(tmp_path, text):
    good, path = saved(tmp_path, 1, 2)
    file = path / "index.json"
    file.write_text(text)
    for read in (read_state, verify, lambda path: load(path, [one()])):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))} (is damaged|has form)"):
            read(path)
    assert latest_good(tmp_path) == good


def flip(path):
    """Change a bit of the last tensor of every file."""
    for file in path.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 64
        file.write_bytes(data)


def test_all_that_are_damaged_are_named_down_to_a_good_one(tmp_path):
    two, four, six, eight = saved(tmp_path, 2, 4, 6, 8)
    flip(eight)
    told = rf"^{eight}/rank-00000\.safetensors is damaged in tensor master/a [^;]*; "
    with pytest.raises(CheckpointError, match=rf"{told}the last good checkpoint is {six}$") as only:
        load(eight, [one()])
    assert only.value.damaged == (eight,)
    flip(six)
    good = f"the last good checkpoint is {four}$"
    with pytest.raises(CheckpointError, match=f"{told}{six} is damaged too; {good}") as both:
        load(eight, [one()])
    assert both.value.damaged == (eight, six)
    flip(two)  # older than the good one: in nobody's way
    with pytest.raises(CheckpointError, match=f"{six} is damaged too; {good}"):
        load(eight, [one()])
    for path in both.value.damaged:  # as it says
        path.rename(tmp_path / f"away-{path.name}")
    assert load(latest(tmp_path), [one()]) == {"step": 4}


def test_where_none_is_good_all_are_named(tmp_path):
    two, four, six = saved(tmp_path, 2, 4, 6)
    for path in (two, four, six):
        flip(path)
    told = f"; {four}, {two} are damaged too; no older checkpoint is good$"
    with pytest.raises(CheckpointError, match=told) as caught:
        load(six, [one()])
    assert caught.value.damaged == (six, four, two)


def load_on_ranks(folder):
    mesh, names = Mesh.build("dp2"), ("step-00000003", "step-00000002")
    with pytest.raises(CheckpointError, match=f"{names[1]} is damaged too; .*00000001$") as caught:
        load(latest(folder), [one()], mesh)
    assert tuple(path.name for path in caught.value.damaged) == names


def test_all_ranks_name_the_same(ranks, tmp_path):
    for path in saved(tmp_path, 1, 2, 3)[1:]:
        flip(path)
    ranks(2, load_on_ranks, str(tmp_path))
