"""The proof itself: meshes equal one process, and a broken layer does not pass."""

import pytest
import torch.distributed as dist
from tests.parallel.toy import subject

from warploom.parallel.mesh import Degrees, Mesh, _build
from warploom.parallel.parity import differences, failures, record
from warploom.parallel.tensor import linear as linear_module
from warploom.parallel.tensor.overlap import gather_linear


def _alone():
    """Return a mesh of one rank, inside a larger world."""
    return _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)


def _mesh_equals_one_process(text, sequence_parallel):
    want = record(subject(_alone(), micro=8), _alone())
    mesh = Mesh.build(text)
    got = record(subject(mesh, micro=2, sequence_parallel=sequence_parallel), mesh)
    assert failures(differences(got, want)) == {}


@pytest.mark.parametrize("text", ["tp1,dp2", "tp2", "tp2,dp2", "tp4", "tp2,rep2", "dp2,rep2"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_mesh_equals_one_process(ranks, text, sequence_parallel):
    degrees = Degrees.parse(text)
    ranks(
        degrees.tp * (degrees.dp or 1) * degrees.rep,
        _mesh_equals_one_process,
        text,
        sequence_parallel,
    )


def _twice(x, *rest):
    """Gather and multiply, as the layer does, with twice the gradient of what is gathered."""
    return gather_linear(x * 2 - x.detach(), *rest)


def _a_doubled_gradient_is_found():
    want = record(subject(_alone(), micro=8), _alone())
    mesh = Mesh.build("tp2")
    linear_module.gather_linear = _twice
    try:
        got = record(subject(mesh), mesh)
    finally:
        linear_module.gather_linear = gather_linear
    bad = failures(differences(got, want))
    assert "gradient embedding.weight" in bad
    assert "gradient norm, step 0" in bad
    assert "loss language_model, step 0" not in bad
    assert "gradient head.weight" not in bad


def test_a_doubled_gradient_is_found(ranks):
    ranks(2, _a_doubled_gradient_is_found)


def _undeclared_partial_gradient_is_found():
    want = record(subject(_alone(), micro=8), _alone())
    mesh = Mesh.build("tp2")
    made = subject(mesh)
    from dataclasses import replace

    forgotten = {path: replace(layout, partial=()) for path, layout in made.layouts.items()}
    got = record(replace(made, layouts=forgotten), mesh)
    assert "gradient down.bias" in failures(differences(got, want))
    assert dist.get_world_size() == 2


def test_undeclared_partial_gradient_is_found(ranks):
    ranks(2, _undeclared_partial_gradient_is_found)


def test_nan_is_a_failure():
    assert list(failures({"a": float("nan"), "b": 0.0})) == ["a"]
