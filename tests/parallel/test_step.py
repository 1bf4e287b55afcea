"""One divisor: the gradient of a global batch does not depend on how it is split."""

import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from tests.parallel.toy import ToyModel, global_batch, split, subject

from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.sharding import layouts
from warploom.parallel.step import NonFiniteError, Step, Term


def _plain_gradient():
    """Return loss and gradients of the whole global batch at once, by autograd alone."""
    model = ToyModel()
    ids, targets = (x.flatten() for x in global_batch(0))
    (lm, z) = model.loss((ids, targets))
    loss = lm.sum / lm.count + 0.01 * z.sum / z.count
    loss.backward()
    return float((lm.sum / lm.count).detach()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_micro_batches_do_not_change_the_gradient(micro):
    loss, want = _plain_gradient()
    mesh = Mesh.build()
    made = subject(mesh, micro=micro, clip=None)
    step = Step(made.model, made.layouts, made.optimizer, mesh, clip=None)
    result = step(made.batches(0), learning_rate=0.0)
    assert math.isclose(result.losses["language_model"], loss, abs_tol=1e-12)
    for name, gradient in want.items():
        torch.testing.assert_close(step.gradients.local(name), gradient, atol=1e-12, rtol=0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in want.values()))
    assert math.isclose(result.grad_norm, norm, abs_tol=1e-12)


def _ranks_with_unequal_counts():
    loss, want = _plain_gradient()
    mesh = Mesh.build("dp2,rep2")
    made = subject(mesh, micro=1, clip=None)
    step = Step(made.model, made.layouts, made.optimizer, mesh, clip=None)
    result = step(made.batches(0), learning_rate=0.0)
    assert abs(result.losses["language_model"] - loss) < 1e-12
    assert result.counts["language_model"] == float((global_batch(0)[1] != -100).sum())
    norm = math.sqrt(sum(float(g.square().sum()) for g in want.values()))
    assert abs(result.grad_norm - norm) < 1e-12


def test_ranks_with_unequal_counts(ranks):
    ranks(4, _ranks_with_unequal_counts)


class _Bare(torch.nn.Module):
    """A model of one weight whose loss and counts are what a test says."""

    def __init__(self, value=1.0, count=2, promised=2, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        self.value, self.count, self.promised = value, count, promised

    def counts(self, batch):
        return {"loss": self.promised}

    def loss(self, batch):
        return (Term("loss", (self.weight * self.value * batch).sum(), self.count),)


def _step(model, mesh, **kwargs):
    made = layouts(model)
    optimizer = AdamW(dict(model.named_parameters()), made, mesh, weight_decay=0.0)
    return Step(model, made, optimizer, mesh, **kwargs)


def test_a_batch_that_trains_nothing_is_refused():
    step = _step(_Bare(count=0, promised=0), Mesh.build())
    with pytest.raises(ValueError, match="must hold at least one position that trains; loss"):
        step([1.0], learning_rate=0.1)


def test_counts_that_differ_from_the_loss_are_refused():
    with pytest.raises(RuntimeError, match="counts.. must equal what loss.. reports"):
        _step(_Bare(count=3), Mesh.build())([1.0], learning_rate=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model = _Bare()
    with pytest.raises(NonFiniteError, match="the step is not finite: loss loss (nan|inf)"):
        _step(model, Mesh.build())([1.0, bad], learning_rate=0.1)
    assert torch.equal(model.weight, torch.ones(4))


def _all_ranks_stop_together():
    mesh = Mesh.build()
    model = _Bare()
    with pytest.raises(NonFiniteError):
        _step(model, mesh)([math.nan if dist.get_rank() == 1 else 1.0], learning_rate=0.1)
    assert torch.equal(model.weight, torch.ones(4))


def test_all_ranks_stop_together(ranks):
    ranks(2, _all_ranks_stop_together)


def test_clip_scales_to_the_limit():
    model = _Bare(value=100.0)
    step = _step(model, Mesh.build(), clip=0.5)
    result = step([1.0], learning_rate=0.0)
    assert result.grad_norm == pytest.approx(100.0)  # 4 elements of 100 / 2
    shards = step.gradients.local("weight")
    assert float(shards.norm()) == pytest.approx(0.5, rel=1e-5)


def test_the_result_tells_the_clip_coefficient():
    result = _step(_Bare(value=100.0), Mesh.build(), clip=0.5)([1.0], learning_rate=0.0)
    assert result.clip_coefficient == pytest.approx(0.005, rel=1e-5)
    assert _step(_Bare(), Mesh.build(), clip=50.0)([1.0], learning_rate=0.0).clip_coefficient == 1.0


def test_counts_are_asked_once_a_micro_batch():
    model = _Bare()
    asked = []
    model.counts = lambda batch: asked.append(batch) or {"loss": 2}
    _step(model, Mesh.build())([1.0, 2.0, 3.0], learning_rate=0.1)
    assert asked == [1.0, 2.0, 3.0]


def test_terms_of_several_layers_sum_up_and_count_once():
    model = _Bare()
    one = model.loss
    model.loss = lambda batch: (*one(batch), *one(batch), *one(batch))
    result = _step(model, Mesh.build())([1.0, 1.0], learning_rate=0.0)
    assert result.losses == {"loss": 6.0}  # 3 layers of 4 weights, over 2 counts
    assert result.counts == {"loss": 4.0}


def test_terms_must_be_those_that_are_promised():
    model = _Bare()
    model.counts = lambda batch: {"loss": 2, "other": 1}
    with pytest.raises(RuntimeError, match="report every term that counts.. promises; other came"):
        _step(model, Mesh.build())([1.0], learning_rate=0.1)
    model.counts = lambda batch: {"other": 1}
    with pytest.raises(RuntimeError, match="loss is not among other"):
        _step(model, Mesh.build())([1.0], learning_rate=0.1)


def test_a_model_may_act_after_the_step():
    model = _Bare()
    seen = []
    model.after_step = lambda mesh: seen.append((mesh, float(model.weight.detach().sum())))
    mesh = Mesh.build()
    step = _step(model, mesh)
    step([1.0], learning_rate=0.5)
    assert seen == [(mesh, float(model.weight.detach().sum()))]
    assert seen[0][1] < 4.0


@pytest.mark.parametrize("zero", [-1, 4, 1.0, True, None])
def test_a_stage_that_is_none_is_refused(zero):
    with pytest.raises(ValueError, match="zero must be a ZeRO stage, 0, 1, 2 or 3; got"):
        _step(_Bare(), Mesh.build(), zero=zero)


def _pipeline_without_schedule():
    with pytest.raises(ValueError, match="stages .pp2. needs a schedule"):
        _step(_Bare(), Mesh.build("pp2"))


def test_a_pipeline_needs_a_schedule(ranks):
    ranks(2, _pipeline_without_schedule)


def test_16_bit_gradients_accumulate_in_float32():
    model = _Bare(dtype=torch.bfloat16, count=1, promised=1)
    step = _step(model, Mesh.build(), clip=None)
    by = {"loss": 1.0}
    step.accumulate([torch.tensor(1.0, dtype=torch.bfloat16)] * 300, by)
    assert step.gradients.local("weight").dtype == torch.float32
    assert torch.equal(step.gradients.local("weight"), torch.full((4,), 300.0))  # bf16 stops at 256
    step.gradients.zero()
    assert torch.equal(step.gradients.local("weight"), torch.zeros(4)), "of the step before"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_unfrozen_trains(dtype):
    model = _Bare(dtype=dtype, count=1, promised=1)
    model.weight.requires_grad_(False)
    step = _step(model, Mesh.build(), clip=None)
    model.weight.requires_grad_(True)
    before = model.weight.detach().clone()
    step([torch.tensor(1.0, dtype=dtype)] * 2, learning_rate=0.1)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_that_is_dropped_leaves_nothing_behind(zero):
    """A hook in a parameter is held by C++: the collector does not see a cycle through it."""
    model = _Bare(count=1, promised=1)
    step = _step(model, Mesh.build(), zero=zero)
    step([torch.tensor(1.0)], learning_rate=0.1)
    left = [weakref.ref(x) for x in (model, model.weight, step, step.gradients, step.mesh)]
    del model, step
    gc.collect()
    assert not [ref() for ref in left if ref() is not None]


def _ranks_bring_unequal_batches():
    mesh = Mesh.build("dp2")
    for zero, numbers in ((1, (1, 2)), (2, (2, 1)), (1, (0, 0))):
        step = _step(_Bare(), mesh, zero=zero)
        own = numbers[mesh.rank]
        words = f"at least one; this one brings {own}, all of them {sum(numbers)}"
        with pytest.raises(ValueError, match=words):
            step([torch.tensor(1.0)] * own, learning_rate=0.1)


def test_ranks_bring_as_many_micro_batches(ranks):
    ranks(2, _ranks_bring_unequal_batches)


def test_split_covers_the_global_batch():
    mesh = Mesh.build()
    parts = split(global_batch(0), mesh, 2)
    assert torch.equal(torch.cat([p[0] for p in parts]), global_batch(0)[0].flatten())
