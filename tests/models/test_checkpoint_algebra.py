"""Checkpoints as an algebra: save on A, load on B is the identity, for any meshes A and B.

Values that depend on the logical names alone stand in for a trained run where bits are compared;
runs that are taken up again on another mesh are trained.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from warploom.models.batch import Batch
from warploom.models.decoder import Architecture, Decoder, Experts
from warploom.models.stages import Stages
from warploom.parallel.checkpoint import AsyncSaver, load, save
from warploom.parallel.initialise import normal_
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW, Muon
from warploom.parallel.pipeline import Schedule
from warploom.parallel.sharding import assemble
from warploom.parallel.step import Step

DENSE = Architecture(
    layers=4,
    width=16,
    heads=8,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    vocabulary=37,  # no tp divides it
    max_positions=16,
    qk_norm="head",
)
ROUTED = replace(
    DENSE,
    experts=Experts(
        count=4, top_k=2, hidden=8, shared=8, dense_layers=1, balance=0.1, bias_rate=1e-2
    ),
)
TOPOLOGIES = {
    1: ["dp1"],
    2: ["tp2", "cp2", "pp2 1f1b", "pp2 zbv", "dp2", "rep2", "dp2,ep2", "tp2,etp2"],
    4: [
        "tp4",
        "tp2,cp2",
        "cp4,uly2",
        "dp4",
        "rep2,dp2",
        "pp2,dp2 1f1b",
        "pp2,tp2 interleaved",
        "pp2,cp2 zbv",
        "pp4 1f1b",
    ],
    8: [
        "tp8",
        "tp2,cp2,dp2",
        "pp2,tp2,cp2 interleaved",
        "pp2,dp2,rep2 zbv",
        "pp4,dp2 1f1b",
        "rep2,tp4",
    ],
}
EXPERTS = {
    1: [],
    2: [],
    4: ["tp4,ep4", "dp4,ep2", "tp2,dp2,ep2,etp2", "pp2,dp2,ep2 zbv", "rep2,tp2,etp2"],
    8: ["tp2,cp2,dp2,ep4,etp2", "pp2,tp2,dp2,ep2,etp2 interleaved", "dp8,ep4"],
}


ROWS, LENGTH = 4, 8


@dataclass
class Run:
    """What a run consists of on one topology."""

    mesh: Mesh
    model: Decoder
    optimizer: AdamW
    step: Step

    def entries(self):
        return self.optimizer.entries() + self.model.buffer_entries()

    def resume(self, path):
        state = load(path, self.entries(), self.mesh)
        self.optimizer.steps = state["step"]
        self.optimizer.publish()
        return state

    def train(self, numbers):
        return [self.step(_batches(self.mesh, n), learning_rate=1e-2).losses for n in numbers]

    def logical(self):
        """Everything that is saved, in full, by its name in a checkpoint."""
        entries = dict(enumerate(self.entries()))
        return assemble(
            {str(at): entry.tensor for at, entry in entries.items()},
            {str(at): replace(e.layout, pieces=e.pieces) for at, e in entries.items()},
            self.mesh.world,
        )


def _hidden(path, parameter):
    return parameter.dim() > 1 and not path.startswith(("embedding", "head"))


def _run(topology, made, *, zero=1, muon=False, dtype=torch.float32, seed=3):
    """Build a run on the mesh and the schedule that `topology` names."""
    text, _, name = topology.partition(" ")
    mesh = Mesh.alone() if text == "dp1" else Mesh.build(text)
    schedule, stages = None, None
    if name:
        virtual = 2 if name == "interleaved" else 1
        micro = ROWS // mesh.data_ranks
        schedule = Schedule.named(name, mesh.degree("pp"), micro, virtual=virtual)
        stages = Stages.deal(made.layers, schedule.placement)
    model = Decoder.create(made, mesh=mesh, stages=stages, dtype=dtype, seed=seed)
    parameters, layouts = dict(model.named_parameters()), model.layouts()
    kind = {"hidden": _hidden} if muon else {}
    optimizer = (Muon if muon else AdamW)(parameters, layouts, mesh, **kind)
    return Run(
        mesh, model, optimizer, Step(model, layouts, optimizer, mesh, zero=zero, schedule=schedule)
    )


def _batches(mesh, number):
    """The micro-batches of one row each; one row trains nothing, one in part."""
    g = torch.Generator().manual_seed(number)
    tokens, targets = torch.randint(37, (2, ROWS, LENGTH), generator=g)
    targets[0, :5], targets[3] = -100, -100
    each = ROWS // mesh.data_ranks
    own = range(mesh.data_rank * each, (mesh.data_rank + 1) * each)
    return [Batch(tokens[r : r + 1], targets[r : r + 1], None) for r in own]


def _seed(prefix):
    return sum(prefix.encode())


def _fill(run):
    """Give every saved tensor values that depend on its prefix and logical names alone."""
    for entry in run.entries():
        normal_(entry.tensor, entry.layout, seed=_seed(entry.prefix), std=1.0)


def _check(run, where):
    """Compare every saved tensor, and the parameters that follow from the masters, bit for bit."""
    for entry in run.entries():
        want = torch.empty_like(entry.tensor)
        normal_(want, entry.layout, seed=_seed(entry.prefix), std=1.0)
        for piece in entry.layout.pieces:  # padding is not kept
            name = f"{where}: {entry.prefix}/{piece.name}"
            assert torch.equal(piece.of_local(entry.tensor), piece.of_local(want)), name
    layouts = run.model.layouts()
    with run.step.opened(whole=True):
        for path, parameter in run.model.named_parameters():
            wide = torch.empty(parameter.shape)
            normal_(wide, layouts[path], seed=_seed("master"), std=1.0)
            for piece in layouts[path].pieces:
                own = piece.of_local(parameter.detach())
                want = piece.of_local(wide).to(parameter.dtype)
                assert torch.equal(own, want), f"{where}: {path}"


def _state(step):
    """What a run keeps beside its tensors."""
    return {
        "step": step,
        "rng": torch.Generator().manual_seed(step).get_state().tolist(),
        "data": {"document": 7, "offset": 123_456_789_012, "epoch": 0.1 + 0.2},
    }


def _saved(folder, at, topology, made, options):
    """Save a filled run on one topology, in a world of its own."""
    run = _run(topology, made, **options)
    _fill(run)
    if run.mesh.world is not None or dist.get_rank() == 0:
        save(Path(folder) / str(at), run.entries(), _state(at), run.mesh)
    dist.barrier()


def _loaded(folder, sources, topology, made, options):
    """Load what `sources` saved (number: topology), in turn, on one topology."""
    run = _run(topology, made, **options)
    for at, source in sources.items():
        for entry in run.entries():
            entry.tensor.detach().fill_(torch.nan)
        state = run.resume(Path(folder) / str(at) / f"step-{at:08d}")
        assert state == _state(at)
        assert run.optimizer.steps == at
        _check(run, f"{source} to {topology}")


def _every_pair(pool, world, folder, topologies, made, options, hops, *, shift=0, timeout_s=120):
    """Save on each topology; load each checkpoint on the `hops` topologies that follow it.

    Each topology has a world of its own: gloo keeps threads for every group of a world.
    """
    stages = [{**options, "zero": (at + shift) % 4} for at in range(len(topologies))]
    for at, topology in enumerate(topologies):
        pool(world, _saved, folder, at, topology, made, stages[at], timeout_s=timeout_s)
    for to, topology in enumerate(topologies):
        before = [(to - hop) % len(topologies) for hop in range(1, hops + 1)]
        sources = {at: topologies[at] for at in before}
        pool(world, _loaded, folder, sources, topology, made, stages[to], timeout_s=timeout_s)


# every pair of kind, tied or not, optimizer and dtype; the first two, fast, have each level
CASES = {
    "dense, tied, Muon, bfloat16": (
        replace(DENSE, tied=True),
        {"muon": True, "dtype": torch.bfloat16},
    ),
    "experts, AdamW": (ROUTED, {}),
    "dense, AdamW": (DENSE, {}),
    "experts, AdamW, bfloat16": (ROUTED, {"dtype": torch.bfloat16}),
    "experts, tied, AdamW": (replace(ROUTED, tied=True), {}),
    "experts, Muon": (ROUTED, {"muon": True}),
}


def _topologies(world, made):
    return TOPOLOGIES[1] + TOPOLOGIES[world] + (EXPERTS[world] if made.experts else [])


@pytest.mark.parametrize("case", list(CASES)[:2])
def test_saved_anywhere_loads_elsewhere(pool, tmp_path, case):
    made, options = CASES[case]
    topologies = _topologies(4, made)
    if made.experts:  # the others are with the dense model
        topologies = [t for t in topologies if t in (*EXPERTS[4], "dp1", "pp2,tp2 interleaved")]
    _every_pair(pool, 4, tmp_path, topologies, made, options, 1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_saved_anywhere_loads_everywhere(pool, tmp_path, case, world):
    made, options = CASES[case]
    topologies = _topologies(world, made)
    for shift in range(4):  # every topology under every stage of ZeRO
        hops = len(topologies) if shift == 0 else 2
        args = (pool, world, tmp_path / str(shift), topologies, made, options, hops)
        _every_pair(*args, shift=shift, timeout_s=600)


def _bytes(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def _trained(folder, first, made, options):
    """Train four steps, saved after two at once and while the others run; keep how it went."""
    run, saver = _run(first, made, **options), AsyncSaver()
    run.train([0, 1])
    path = save(folder / "now", run.entries(), _state(2), run.mesh)
    late = saver.start(folder / "later", run.entries(), _state(2), run.mesh)
    losses = run.train([2, 3])  # while it is written
    assert saver.finish() == late
    assert _bytes(path) == _bytes(late)
    torch.save((losses, run.logical()), folder / f"rank-{dist.get_rank()}.pt")


def _taken_up(folder, topology, made, options, exact):
    """Go on after two steps on another mesh: the losses and all that is saved, as they were."""
    losses, want = torch.load(folder / f"rank-{dist.get_rank()}.pt")
    again = _run(topology, made, seed=99, **options)
    assert again.resume(folder / "later" / "step-00000002") == _state(2)
    found, after = again.train([2, 3]), again.logical()
    assert after.keys() == want.keys()
    for name, tensor in want.items():
        if exact or name.startswith("buffer/"):
            assert torch.equal(after[name], tensor), (topology, name)
        assert float((after[name] - tensor).abs().max()) < 1e-10, (topology, name)
    for got, wanted in zip(found, losses, strict=True):
        assert got == pytest.approx(wanted, rel=0, abs=0 if exact else 1e-10)


def _goes_on(pool, world, folder, first, others, made, muon, zero, timeout_s=120):
    options = {"muon": muon, "dtype": torch.float64, "zero": zero}
    pool(world, _trained, folder, first, made, options, timeout_s=timeout_s)
    for topology in others:
        exact = topology == first
        pool(world, _taken_up, folder, topology, made, options, exact, timeout_s=timeout_s)


def test_a_run_goes_on_on_another_mesh(pool, tmp_path):
    _goes_on(pool, 2, tmp_path / "1", "tp2", ["tp2", "pp2 zbv"], DENSE, True, 1)
    _goes_on(pool, 2, tmp_path / "2", "dp2,ep2", ["dp2,ep2", "cp2"], ROUTED, False, 3)


@pytest.mark.slow
@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("made", [replace(DENSE, tied=True), ROUTED], ids=["dense", "experts"])
def test_a_run_goes_on_on_every_mesh(pool, tmp_path, made, world, muon):
    topologies = TOPOLOGIES[world] + (EXPERTS[world] if made.experts else [])
    for at, first in enumerate(topologies[::3]):
        args = (pool, world, tmp_path / str(at), first, topologies, made, muon, at % 4)
        _goes_on(*args, timeout_s=600)


def test_another_model_is_refused_in_one_sentence(tmp_path):
    run = _run("dp1", DENSE)
    path = save(tmp_path, run.entries(), _state(0), run.mesh)
    other = _run("dp1", replace(DENSE, hidden=32, layers=5, qk_norm=None))
    before = other.logical()
    with pytest.raises(ValueError, match="lacks") as caught:
        other.resume(path)
    for words in (
        "master/blocks.4.attention.out.weight",  # asked for
        "master/blocks.0.attention.k_norm.weight",  # held
        "master/blocks.0.feed_forward.down.weight has shape (16, 24), (16, 32) is asked for",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    after = other.logical()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
