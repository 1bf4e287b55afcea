import math

import pytest
import torch

from warploom.recipes.runner.learning_rate import WSD, Cosine


def _oracle(make, steps):
    """The factors of a transformers schedule at steps 0, 1, ..."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def _ours(schedule, steps):
    return [schedule.factor(t, steps) for t in range(steps)]


def _same(ours, theirs, warmup, steps):
    """Warm-up is theirs one step later, the rest theirs at the same step."""
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-12)
    assert ours[warmup:] == pytest.approx(theirs[warmup:steps], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine_equals_transformers(warmup):
    from transformers import get_cosine_schedule_with_warmup

    theirs = _oracle(lambda o: get_cosine_schedule_with_warmup(o, warmup, 100), 101)
    _same(_ours(Cosine(warmup=warmup, final=0.0), 100), theirs, warmup, 100)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_wsd_equals_transformers(shape, final):
    from transformers import get_wsd_schedule

    theirs = _oracle(
        lambda o: get_wsd_schedule(
            o,
            num_warmup_steps=10,
            num_stable_steps=70,
            num_decay_steps=20,
            decay_type=shape,
            min_lr_ratio=final,
        ),
        101,
    )
    ours = _ours(WSD(warmup=10, decay=0.2, shape=shape, final=final), 100)
    if final:  # transformers warms up from the final fraction, not from 0
        assert ours[10:] == pytest.approx(theirs[10:100], abs=1e-12)
    else:
        _same(ours, theirs, 10, 100)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", (0.75, 0.5, 0.25)),
        ("cosine", (0.8536, 0.5, 0.1464)),
        ("1-sqrt", (0.5, 0.2929, 0.1340)),
    ],
)
def test_wsd_reference_values(shape, values):
    schedule = WSD(warmup=10, decay=0.2, shape=shape, final=0.0)
    assert [schedule.factor(t, 100) for t in (85, 90, 95)] == pytest.approx(values, abs=5e-5)


@pytest.mark.parametrize("schedule", [Cosine(warmup=10, final=0.0), WSD(warmup=10)])
@pytest.mark.parametrize("steps", [11, 100])
def test_no_step_trains_at_zero(schedule, steps):
    values = _ours(schedule, steps)
    assert min(values) > 0
    assert values[0] == 0.1
    assert values[9] == values[10] == 1.0


def test_final_fraction_is_the_floor():
    assert Cosine(warmup=0, final=0.1).factor(999_999, 1_000_000) == pytest.approx(0.1, abs=1e-6)
    assert Cosine(warmup=0, final=0.1).factor(50, 100) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Cosine(warmup=-1), "warmup"),
        (lambda: Cosine(final=1.5), "final"),
        (lambda: WSD(decay=0.0), "decay"),
        (lambda: WSD(final=math.inf), "final"),
    ],
)
def test_refuses_in_words(make, names):
    with pytest.raises(ValueError, match=names):
        make()
