"""ZeRO stages 0 to 3 on meshes equal one process: losses, gradients, norm, clip, parameters."""

import pytest
import torch
from tests.parallel.toy import stack

from warploom.parallel.mesh import Degrees, Mesh, _build
from warploom.parallel.parity import differences, failures, record


def _alone():
    """Return a mesh of one rank, inside a larger world."""
    return _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)


def _rows_a_micro_batch(mesh, count):
    return 12 // (mesh.degree("dp") * mesh.degree("rep")) // count


def _equals_one_process(text, cases):
    mesh, alone = Mesh.build(text), _alone()
    want = {
        muon: record(stack(alone, micro=12, muon=muon), alone) for muon in {c[2] for c in cases}
    }
    for zero, count, muon, recompute in cases:
        micro = _rows_a_micro_batch(mesh, count)
        subject = stack(mesh, zero=zero, micro=micro, muon=muon, recompute=recompute)
        bad = failures(differences(record(subject, mesh), want[muon]))
        assert bad == {}, (text, zero, count, muon, recompute, bad)


CASES = [
    (zero, count, muon, (zero + count + muon) % 2 == 0)
    for zero in range(4)
    for count in (1, 3)
    for muon in (False, True)
]


@pytest.mark.parametrize("text", ["dp1", "dp2,ep2", "tp2", "tp2,ep2", "rep2"])
def test_stages_equal_one_process(ranks, text):
    degrees = Degrees.parse(text)
    ranks(
        degrees.resolve(degrees.tp * degrees.dp * degrees.rep).world
        if degrees.dp
        else degrees.tp * degrees.rep,
        _equals_one_process,
        text,
        CASES,
    )
