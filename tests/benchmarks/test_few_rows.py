"""The products of a step are those of the model, and each side is timed on all of them."""

import json

import torch

from warploom.benchmarks import few_rows
from warploom.models.decoder import Decoder
from warploom.models.families import llama


def test_the_products_are_those_of_the_model():
    model = Decoder(llama.tiny(), device="meta")
    held = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert sorted(few_rows.shapes(llama.tiny())) == sorted(held)  # the head is the embedding


def test_each_side_has_a_time_for_each_number_of_rows(tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        words = ["--model", "tiny", "--rows", "1", "5", "--rounds", "2"]
        assert few_rows.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads((tmp_path / "found.json").read_text())["ms"]
    assert set(found) == {"1", "5"}
    assert all(time >= 0 for times in found.values() for time in times.values())
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["rows", *found["5"]]
    assert [line.split()[0] for line in table[2:]] == ["1", "5"]
