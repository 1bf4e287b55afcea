"""`warploom verify`: it proves what is right, and names the module and the axis of what is not."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from warploom.parallel import collectives, step
from warploom.parallel.parity import failures
from warploom.parallel.tensor import linear
from warploom.recipes import verify
from warploom.recipes.verification.case import prove
from warploom.recipes.verification.diagnosis import diagnose

# Each breaks something on the ranks of a mesh, and leaves one process as it is.


def _twice(x, weight, bias, plan, inner=linear.gather_linear):
    y = inner(x, weight, bias, plan)
    return y * 2 - y.detach()  # the value of y, twice its gradient


def _unsummed(x, group):
    return x if group is None else x.chunk(group.size())[group.rank()]


def _without(field, layouts):
    """Drop a declaration of every layout."""

    def changed(*args):
        return {path: replace(layout, **{field: ()}) for path, layout in layouts(*args).items()}

    return changed


def _divided_again(promised, mesh, inner=step._divisors):
    size = 1 if mesh.tokens is None else mesh.tokens.size()
    return {name: count * size for name, count in inner(promised, mesh).items()}


def _norm_of_data_ranks_alone(self, shards, losses, inner=step.Step._norm):
    with patch.object(step, "all_reduce_", lambda x, group: collectives.all_reduce_(x, None)):
        return inner(self, shards, losses)


def _half_as_much(self, batches, *, learning_rate, inner=step.Step.__call__):
    with patch.object(torch, "_foreach_mul_", lambda xs, c: [x.mul_(c / 2) for x in xs]):
        return inner(self, batches, learning_rate=learning_rate)


def _breaks():
    from warploom.models.decoder import Decoder

    return {
        "gather doubles": patch.object(linear, "gather_linear", _twice),
        "partial dropped": patch.object(Decoder, "layouts", _without("partial", Decoder.layouts)),
        "spread dropped": patch.object(Decoder, "layouts", _without("spread", Decoder.layouts)),
        "divided again": patch.object(step, "_divisors", _divided_again),
        "row sum dropped": patch.object(linear, "scatter", _unsummed),
        "norm of one": patch.object(step.Step, "_norm", _norm_of_data_ranks_alone),
    }


def broken(what, case):
    """Prove a case with something broken, against one process that is not."""
    from warploom.recipes.verification.case import reference

    reference(case)  # kept, so that what follows finds it as it should be
    with _breaks()[what]:
        return prove(case)


@pytest.mark.parametrize(
    ("what", "mesh", "axis", "module", "cause"),
    [
        ("gather doubles", "tp2,dp2", "tp", "gate_up", "2 times what it must be"),
        ("row sum dropped", "tp2,pp2", "tp", "blocks.0.attention", "everything before it is right"),
        ("partial dropped", "tp2,dp2", "tp", "norm", "their sum is missing"),
        ("partial dropped", "pp2", "pp", "embedding", "their sum is missing"),
        ("spread dropped", "tp2,dp2", "tp", "attention.qkv", "their sum is missing"),
        ("divided again", "tp2,dp2", "dp", "every loss", "divided by the 2 data ranks"),
        ("norm of one", "tp2", "tp", "the gradient norm", "counted too rarely"),
    ],
)
def test_what_is_broken_is_named(pool, what, mesh, axis, module, cause):
    case = verify.plan(verify.Verify(mesh=mesh))
    if what == "spread dropped":
        case = replace(case, architecture=replace(case.architecture, kv_heads=1))

    def run(one):
        return pool(one.degrees.world, broken, what, one)

    outcome = run(case)
    assert failures(outcome.differences)
    found = diagnose(case, outcome, run)
    assert found.axis == axis
    assert module in found.module
    assert cause in found.cause
