"""The benchmark of generation, on a tiny model: both sides write the same, and figures add up."""

import json

import pytest

from warploom.benchmarks import generate


def test_workloads_are_what_the_table_says():
    drawn = generate.works(100)
    assert {name: work.tokens for name, work in drawn.items()} == {
        "one": 128, "equal": 2048, "unequal": 1152, "queue": 4608, "shared": 8, "alone": 1,
    }  # fmt: skip
    sizes = [len(prompt) for prompt in drawn["unequal"].prompts]
    assert (min(sizes), max(sizes), sum(sizes)) == (32, 224, 2048)


@pytest.mark.slow
def test_both_sides_write_the_same(tmp_path, capsys):
    file = tmp_path / "found.json"
    words = ["--model", "tiny", "--scale", "0.1", "--rounds", "2", "--threads", "1"]
    assert generate.main([*words, "--json", str(file)]) == 0
    (run,) = json.loads(file.read_text())["runs"]
    rows = run["works"]
    assert rows["unequal"]["texts_equal"] == 16
    assert rows["one"]["warploom"]["tokens_per_s"] > 0
    assert rows["prefills_of_8"]["cpu_s"] > 0
    assert "of 64 texts equal" in capsys.readouterr().out


@pytest.mark.slow
def test_the_batch_invariant_mode_takes_turns_too(tmp_path, capsys):
    file = tmp_path / "found.json"
    words = ["--model", "tiny", "--scale", "0.1", "--rounds", "2", "--works", "one", "unequal"]
    words += ["--threads", "1", "--peer", "batch-invariant", "--json", str(file)]
    assert generate.main(words) == 0
    (run,) = json.loads(file.read_text())["runs"]
    assert run["peer"] == "batch-invariant"
    assert run["works"]["unequal"]["texts_equal"] == 16
    assert run["works"]["one"]["times_as_fast_s"] > 0
    assert "batch-invariant" in capsys.readouterr().out
