"""A model under muP is written as the standard one that it is: what transformers computes of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from warploom.models import hf
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
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
from warploom.models.hf.standard import standard
from warploom.parallel.mesh import Mesh

MODULES = (bamba, gemma2, gemma3, gpt2, gpt_oss, llama, mixtral, olmo2, qwen2, qwen2_moe, qwen3)
PLAIN = {"rope_scaling": None, "attention_scale": None}  # else muP leaves the scores alone
V2, V3 = (replace(module.tiny(), **PLAIN) for module in (deepseek_v2, deepseek_v3))
LITE = replace(V2, latent=replace(V2.latent, queries=None), heads=2, kv_heads=2)
CASES = {m.FAMILY.model_type: m.tiny() for m in (*MODULES, qwen3_moe, deepseek_v2)}
CASES |= {"deepseek_v2, no yarn": V2, "deepseek_v2, queries of the stream": LITE}
CASES |= {"deepseek_v3": V3, "qwen3, no tie": replace(qwen3.tiny(), tied=False)}


def _model(made):
    """Draw a model whose norms, biases, sinks and head are not what they start as."""
    model = Decoder.create(replace(made, mup_base=16), seed=3)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) / 10)
    return model


def _kept(model):
    return {name: p.clone() for name, p in model.named_parameters()}


def _same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_model_under_mup_is_written_as_the_standard_one_that_it_is(name, tmp_path):
    model = _model(CASES[name])
    made, before = model.architecture, _kept(model)
    tokens = torch.randint(made.vocabulary, (2, 24))
    want = model(tokens)
    hf.save(model, tmp_path / "out")
    assert model.architecture is made
    assert _same(model, before)
    assert torch.equal(model(tokens), want)
    again = hf.load(tmp_path / "out")
    assert again.architecture == replace(made, mup_base=None)
    torch.testing.assert_close(again(tokens), want, atol=1e-5, rtol=1e-5)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(peer(tokens).logits, want, atol=1e-5, rtol=1e-5)
    model.architecture = replace(made, mup_base=None)  # the multipliers matter here
    assert (model(tokens) - want).abs().max() > 0.01


@torch.no_grad()
def test_further_tokens_are_predicted_as_before(tmp_path):
    """Each depth through its norm to the head, and from there to the next."""
    model = _model(replace(V3, predict=3))
    tokens, targets = torch.randint(model.architecture.vocabulary, (2, 2, 24))
    hf.save(model, tmp_path / "out")
    pair = model, hf.load(tmp_path / "out")
    want, got = ({t.name: t.sum for t in m.loss(Batch(tokens, targets))} for m in pair)
    assert len(want) == 5  # the last is of the routers
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    ("made", "unsaid"),
    [
        (replace(gemma2.tiny(), attention_scale=None), "attention_scale"),
        (replace(CASES["llama"], softcap=5.0), "softcap"),
        (replace(CASES["bamba"], residual_scale=0.5), "residual_scale"),
    ],
    ids=["scores", "softcap", "residual"],
)
def test_what_no_config_says_is_refused_and_nothing_changes(made, unsaid, tmp_path):
    model, tokens = _model(made), torch.arange(24)[None]
    before, want = _kept(model), model(tokens)
    with pytest.raises(ValueError, match=f"config.json cannot say {unsaid}="):
        hf.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert _same(model, before)
    assert torch.equal(model(tokens), want)


def _save_split(root, made):
    for text in ("tp2", "pp2"):
        hf.save(Decoder.create(made, seed=3, mesh=Mesh.build(text)), root / text)


@pytest.mark.parametrize("made", [V3, LITE, CASES["qwen3"]], ids=["further", "latent", "tied"])
def test_ranks_write_what_one_process_does(pool, tmp_path, made):
    made = replace(made, mup_base=16)
    hf.save(Decoder.create(made, seed=3), tmp_path / "alone")
    pool(2, _save_split, tmp_path, made)
    want = load_file(tmp_path / "alone" / "model.safetensors")
    for text in ("tp2", "pp2"):
        got = load_file(tmp_path / text / "model.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3", "llama"])
@pytest.mark.parametrize("done", [0, 1, 2, None])
@torch.no_grad()
def test_whatever_fails_leaves_the_model_as_it_was(name, done, monkeypatch):
    """After some weights were scaled, and after all were."""
    model, tokens = _model(CASES[name]), torch.arange(24)[None]
    before, want, scaled = _kept(model), model(tokens), []
    multiply = torch.Tensor.mul_

    def fail_at(place):
        if place == done:
            raise KeyboardInterrupt

    def mul_(x, by):
        fail_at(len(scaled))
        scaled.append(by)
        return multiply(x, by)

    monkeypatch.setattr(torch.Tensor, "mul_", mul_)
    with pytest.raises(KeyboardInterrupt), standard(model):
        fail_at(None)
    monkeypatch.undo()
    assert len(scaled) > 2 if done is None else len(scaled) == done
    assert model.architecture.mup_base == 16
    assert _same(model, before)
    assert torch.equal(model(tokens), want)
