"""muP keeps activations of one size over widths; the standard parametrisation does not."""

import json

import pytest
import torch

from warploom.benchmarks.coordinates import Coordinates, main, measure
from warploom.models.decoder import INIT_STD, Architecture, Decoder
from warploom.models.families import llama
from warploom.models.mup import learning_rates

WIDTHS = (128, 256, 512)


def _slopes(parametrisation):
    asked = Coordinates(
        parametrisation=parametrisation, widths=WIDTHS, seeds=1, steps=3, learning_rate=1e-3
    )
    return measure(asked)["slopes"]


def test_activations_are_flat_over_widths_under_mup_alone():
    flat, growing = _slopes("mup"), _slopes("standard")
    assert flat.keys() == growing.keys() >= {"attention 1", "block 1", "logits, change"}
    assert all(abs(s) < 0.2 for s in flat.values()), flat
    grown = [s for name, s in growing.items() if name != "embedding"]
    assert min(grown) > 0.4, growing


def test_the_base_width_is_the_standard_parametrisation_but_for_the_scores():
    sizes = {"layers": 1, "width": 64, "heads": 1, "kv_heads": 1, "head_dim": 64, "hidden": 96}
    plain = Architecture(**sizes, vocabulary=50, max_positions=16)
    based = Architecture(**sizes, vocabulary=50, max_positions=16, mup_base=64)
    ours, theirs = Decoder.create(plain), Decoder.create(based)
    assert not theirs.head.weight.any()
    with torch.no_grad():
        theirs.head.weight.copy_(ours.head.weight)
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(ours(tokens), theirs(tokens))
    wide = Architecture(**sizes, vocabulary=50, max_positions=16, mup_base=16)
    model = Decoder.create(wide)
    rates = {path: learning_rates(wide)(path, p) for path, p in model.named_parameters()}
    assert {path for path, rate in rates.items() if rate == 0.25} == {
        *("blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"),
        *("blocks.0.feed_forward.gate_up.weight", "blocks.0.feed_forward.down.weight"),
    }
    assert set(rates.values()) == {0.25, 1.0}
    assert float(model.blocks["0"].attention.qkv.weight.detach().std()) == pytest.approx(
        INIT_STD / 2, rel=0.05
    )
    assert llama.tiny().multiple == 1


def test_the_command_writes_values_and_a_chart(tmp_path, capsys):
    words = ["--widths", "32", "64", "--seeds", "1", "--steps", "1", "--folder"]
    assert main([*words, str(tmp_path / "mup")]) == 0
    assert "slope" in capsys.readouterr().out
    written = json.loads((tmp_path / "mup" / "coordinates.json").read_text())
    assert written["parametrisation"] == "mup"
    assert (tmp_path / "mup" / "coordinates.png").read_bytes()[1:4] == b"PNG"
