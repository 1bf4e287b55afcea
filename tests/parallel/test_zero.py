"""ZeRO stages 0 to 3 on meshes equal one process: losses, gradients, norm, clip, parameters."""

import pytest
from tests.parallel.toy import stack

from warploom.parallel.mesh import Degrees, Mesh, _build
from warploom.parallel.parity import differences, failures, record
from warploom.parallel.pipeline import Schedule

MESHES = [
    "dp2,ep2",
    "tp2",
    "rep2",
    "cp2",
    "tp2,dp2,ep2",
    "rep2,dp2",
    "dp4,ep2",
    "tp4",
    "tp2,cp2,etp2",
]
ALL = [(zero, count, muon) for zero in range(4) for count in (1, 3) for muon in (False, True)]


def _alone():
    """Return a mesh of one rank, inside a larger world."""
    return _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)


def _wanted(blocks=2):
    alone = _alone()
    return [
        record(stack(alone, micro=12, muon=muon, blocks=blocks), alone) for muon in (False, True)
    ]


def _equals_one_process(text, cases):
    mesh, want = Mesh.build(text), _wanted()
    for zero, count, muon in cases:
        micro = 12 // (mesh.degree("dp") * mesh.degree("rep")) // count
        recompute = (zero + count + muon) % 2 == 0
        subject = stack(mesh, zero=zero, micro=micro, muon=muon, recompute=recompute)
        bad = failures(differences(record(subject, mesh), want[muon]))
        assert bad == {}, (text, zero, count, muon, recompute, bad)


def test_stages_equal_one_process_on_one_rank():
    _equals_one_process("dp1", ALL)


@pytest.mark.parametrize(("at", "text"), list(enumerate(MESHES)))
def test_stages_equal_one_process(pool, at, text):
    """Each stage once on each mesh; every case is on two meshes."""
    cases = [ALL[4 * zero + (zero + at) % 4] for zero in range(4)]
    d = Degrees.parse(text)
    pool(d.tp * d.cp * d.rep * (d.dp or 1), _equals_one_process, text, cases)


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
def test_stages_equal_one_process_in_full(pool, text):
    d = Degrees.parse(text)
    pool(d.tp * d.cp * d.rep * (d.dp or 1), _equals_one_process, text, ALL)


def _pipelines_equal_one_process(text, cases):
    mesh, want = Mesh.build(text), _wanted(blocks=4)
    micro = 12 // mesh.degree("dp") // 3
    for schedule, zero in cases:
        subject = stack(
            mesh,
            zero=zero,
            micro=micro,
            muon=zero == 2,
            recompute=zero % 2 == 0,
            schedule=schedule,
            blocks=4,
        )
        bad = failures(differences(record(subject, mesh), want[zero == 2]))
        assert bad == {}, (text, schedule.name, zero, bad)


PLAIN, SPLIT = Schedule.one_f_one_b(2, 3), Schedule.zbv(2, 3)


@pytest.mark.parametrize(
    ("text", "cases"),
    [
        ("pp2", [(PLAIN, 1), (SPLIT, 1)]),
        ("pp2,dp2", [(PLAIN, 3), (SPLIT, 0), (SPLIT, 2), (SPLIT, 3)]),
        pytest.param(
            "pp2,dp2", [(PLAIN, 0), (PLAIN, 1), (PLAIN, 2), (SPLIT, 1)], marks=pytest.mark.slow
        ),
    ],
)
def test_pipelines_equal_one_process(pool, text, cases):
    pool(4 if "dp2" in text else 2, _pipelines_equal_one_process, text, cases)
