"""`warploom verify` proves every family on a mesh that uses every axis that it has."""

import json

import pytest

from warploom.models.families import (
    bamba,
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    olmo2,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from warploom.recipes import verify

DENSE = (llama, qwen2, qwen3, gpt2, gemma2, gemma3, olmo2, bamba)
ROUTED = (mixtral, qwen2_moe, qwen3_moe, gpt_oss, deepseek_v2, deepseek_v3)


def _folder(family, path):
    (path / "config.json").write_text(json.dumps(family.FAMILY.config(family.tiny())))
    return str(path)


def _name(family):
    return family.__name__.rpartition(".")[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DENSE, *ROUTED], ids=_name)
def test_every_axis_at_once(family, tmp_path, capsys):
    mesh = "tp2,pp2,cp2" + (",ep4" if family in ROUTED else "")
    assert verify.main([_folder(family, tmp_path), "--mesh", mesh]) == 0, capsys.readouterr().out
    assert "proven" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", [*DENSE, *ROUTED], ids=_name)
def test_what_runs_again_sends_and_saves_as_predicted(family, recompute, tmp_path, capsys):
    words = [_folder(family, tmp_path), "--mesh", "tp2,cp2", "--recompute", recompute]
    assert verify.main(words) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_muon_asks_the_experts_ranks_who_owns_what(tmp_path, capsys):
    words = [_folder(llama, tmp_path), "--mesh", "tp2,dp2", "--optimizer", "muon"]
    assert verify.main(words) == 0, capsys.readouterr().out
