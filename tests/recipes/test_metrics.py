import json

import pytest
import torch

from warploom.recipes.runner.metrics import JsonLines, Metrics, TensorBoard, read, trim


def _write(path, steps, after=0):
    metrics = Metrics([JsonLines(path, after=after)])
    for step in steps:
        metrics.add(step, loss=1 / step)
    metrics.close()


def test_a_line_a_step_with_exact_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics([JsonLines(path, after=0)])
    metrics.add(1, loss=torch.tensor(0.1, dtype=torch.float64), note="a")
    metrics.add(1, held_out_loss=2.5)
    metrics.add(2, loss=torch.tensor(1 / 3, dtype=torch.float64))
    assert path.read_text() == ""  # nothing is computed before it is due
    assert metrics.flush() == {"step": 2, "loss": 1 / 3}
    assert read(path) == [
        {"step": 1, "loss": 0.1, "note": "a", "held_out_loss": 2.5},
        {"step": 2, "loss": 1 / 3},
    ]
    assert metrics.flush() is None


def test_a_resumed_run_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    _write(path, range(5, 10), after=4)
    assert [line["step"] for line in read(path)] == list(range(1, 10))


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_trimmed(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    assert [line["step"] for line in read(path)] == [1, 2]
    trim(path, 3)
    assert path.read_bytes() == b"".join(data.splitlines(keepends=True)[:2])


def test_what_follows_a_broken_line_is_not_trusted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 5))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    trim(path, 9)
    assert path.read_bytes() == lines[0]


def test_nan_is_not_json(tmp_path):
    metrics = Metrics([JsonLines(tmp_path / "metrics.jsonl", after=0)])
    metrics.add(1, loss=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        metrics.flush()


def test_lines_are_seen_before_close(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics([JsonLines(path, after=0)])
    metrics.add(1, loss=0.5)
    metrics.flush()
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5}


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics([TensorBoard(tmp_path, after=0)])
    metrics.add(1, loss=0.5, note="words")
    metrics.add(2, loss=0.25)
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
