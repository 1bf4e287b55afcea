"""A block whose norms run again makes no product twice, whatever the schedule."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from warploom.models.batch import Batch
from warploom.models.decoder import Architecture, Decoder
from warploom.models.stages import Stages
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Schedule, execute

SIZES = Architecture(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    vocabulary=37,
    max_positions=16,
    qk_norm="head",
)


def _forward_flops(gate_up, weight, *_, **__):
    return 2 * gate_up[0] * weight[0] * weight[1]


def _backward_flops(dy, gate_up, weight, weight_grad, *_, **__):
    return (1 + weight_grad) * _forward_flops(gate_up, weight)


OPERATORS = {
    torch.ops.warploom.swiglu_linear_forward: _forward_flops,
    torch.ops.warploom.swiglu_linear_backward: _backward_flops,
}


def _flops_and_gradients(mesh, name, recompute):
    """Train two stages of one rank on two micro-batches; count all but attention's scores."""
    schedule = Schedule.named(name, 1, 2, virtual=2 if name == "interleaved" else 1)
    stages = Stages.deal(SIZES.layers, schedule.placement)
    made = {"mesh": mesh, "stages": stages, "seed": 3, "dtype": torch.float64}
    model = Decoder.create(SIZES, recompute=recompute, **made)

    def bind(stage):
        def run(x, batch):
            y, terms = model.stage(stage, x, batch)
            return y, terms[0].sum if terms else None

        return run

    ids = torch.arange(18).view(2, 9) % 7
    batches = [Batch(row[None, :-1], row[None, 1:]) for row in ids]
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as flops:
        execute(schedule, {s: bind(s) for s in range(schedule.stages)}, batches, group=None)
    gradients = {path: p.grad for path, p in model.named_parameters()}
    return flops.get_total_flops(), gradients


def _no_product_runs_twice(text):
    mesh = Mesh.build(text) if text else Mesh.alone()
    want, gradients = _flops_and_gradients(mesh, "interleaved", "none")
    assert want
    for name in ("interleaved", "zb_h1", "zbv"):
        flops, found = _flops_and_gradients(mesh, name, "selective")
        assert flops == want, f"{name}: {flops / want - 1:+.2%}"
        for path, gradient in gradients.items():
            torch.testing.assert_close(found[path], gradient, atol=1e-10, rtol=0, msg=path)


@pytest.mark.parametrize("text", ["", "tp2"])
def test_no_product_runs_twice(ranks, text):
    if text:
        ranks(2, _no_product_runs_twice, text)
    else:
        _no_product_runs_twice(text)
