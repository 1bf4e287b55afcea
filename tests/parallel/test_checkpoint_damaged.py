"""Checkpoints that lost their index, hold another's, or are damaged several at a time."""

import logging

import pytest
import torch

from warploom.parallel.checkpoint import Entry, latest, latest_good, save, verify
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
