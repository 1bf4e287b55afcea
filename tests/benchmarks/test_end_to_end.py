"""The comparison with transformers, on a tiny model: same losses, both sides measured."""

import json

from warploom.benchmarks import end_to_end


def test_both_sides_see_the_same_losses(tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--model", "tiny", "--batch", "2", "--sequence", "16", "--rounds", "2"]
    assert end_to_end.main([*words, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["largest_loss_difference"] < 1e-4
    assert set(result["sides"]) == {"warploom", "transformers"}
    assert all(row["peak_memory_gib"] > 0.05 for row in result["sides"].values())
    assert "largest difference of the losses" in capsys.readouterr().out


def test_a_loss_that_differs_fails(monkeypatch):
    setting = end_to_end.Setting(model="tiny", batch=1, sequence=8, fused=False, threads=1)
    step = {"seconds": 1.0, "peak_gib": 1.0}
    found = {"warploom": [{**step, "loss": 1.0}] * 2, "transformers": [{**step, "loss": 1.1}] * 2}
    result = end_to_end.summarise(setting, found)
    monkeypatch.setattr(end_to_end, "measure", lambda *_: result)
    assert end_to_end.main(["--model", "tiny"]) == 1
