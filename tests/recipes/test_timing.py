"""Timing: medians in milliseconds, ceilings in FLOP/s and bytes a second."""

import time

import pytest
import torch

from warploom.recipes.plan.timing import copy_ceiling, host_us, matmul_ceiling, samples_ms, time_ms


def test_milliseconds_and_counts():
    calls = []

    def fn():
        calls.append(1)
        time.sleep(0.005)

    measured = time_ms(fn, "cpu", repeats=5, warmup=2)
    assert len(calls) == 7
    assert 5.0 <= measured < 100.0


def test_the_median_ignores_one_slow_call():
    delays = iter([0.0, 0.0, 0.3, 0.0, 0.0])
    assert time_ms(lambda: time.sleep(next(delays)), "cpu", repeats=5, warmup=0) < 100.0


def test_what_is_prepared_is_not_timed():
    order = []

    def prepare():
        order.append("prepare")
        time.sleep(0.02)
        return lambda: order.append("call")

    found = samples_ms(prepare, "cpu", repeats=3, warmup=1)
    assert order == ["prepare", "call"] * 4
    assert len(found) == 3
    assert max(found) < 10.0


def test_the_host_is_timed_call_by_call():
    calls = []
    found = host_us(lambda: calls.append(time.sleep(0.001)), "cpu", calls=4, rounds=3, warmup=2)
    assert len(calls) == 2 + 4 * 3
    assert 1e3 <= found < 2e4


def test_errors_say_what_was_found():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        time_ms(lambda: None, "cpu", repeats=0)
    with pytest.raises(ValueError, match="must be a CPU or a CUDA device, got meta"):
        time_ms(lambda: None, "meta")
    with pytest.raises(RuntimeError, match="need a CUDA device of capability 8.9, got cpu"):
        matmul_ceiling("cpu", torch.float8_e4m3fn)


def test_ceilings_are_of_this_world():
    """Between a tenth of what any machine does and a thousand times what any CPU does."""
    assert 1e8 < matmul_ceiling("cpu", torch.float32, size=256) < 1e14
    assert 1e8 < copy_ceiling("cpu", size=1 << 22) < 1e13


def test_ceilings_count_every_operation(monkeypatch):
    """With a clock that always says one millisecond, the counts themselves are seen."""
    monkeypatch.setattr("warploom.recipes.plan.timing.time_ms", lambda *a, **k: 1.0)
    assert matmul_ceiling("cpu", torch.float32, size=64) == pytest.approx(2 * 64**3 * 1e3)
    assert copy_ceiling("cpu", size=4096) == pytest.approx(2 * 4096 * 1e3)


@pytest.mark.gpu
def test_the_device_is_timed_not_the_launch():
    a = torch.randn(4096, 4096, device="cuda")
    assert time_ms(lambda: a @ a, "cuda") > 0.5  # 137 GFLOP in float32
    assert 1e12 < copy_ceiling("cuda") < 1e13
    assert 1e14 < matmul_ceiling("cuda", torch.bfloat16) < 1e16
    assert 1e14 < matmul_ceiling("cuda", torch.float8_e4m3fn) < 1e17
