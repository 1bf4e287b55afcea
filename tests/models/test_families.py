"""The dense families against transformers: logits, every gradient, both ways through the Hub."""

import importlib
import json
import math
import pkgutil
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.models import families, hf
from warploom.models.decoder import Decoder

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 89,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 89, "n_positions": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 16, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": PLAIN,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 5}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "gpt2": ("GPT2", {"n_inner": 40}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma2, open": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": BY_KIND}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
}
LENGTHS = [[13, 50], [1, 40, 20, 2]]  # of documents, for each row


def _peer(name, changes):
    """Build a tiny model of transformers, none of whose parameters is zero or one."""
    import transformers as t

    dropout = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    sizes = GPT2 | dict.fromkeys(dropout, 0.0) if name == "GPT2" else SIZES
    text = "Text" if name == "Gemma3" else ""
    config = getattr(t, f"{name}{text}Config")(**sizes | changes)
    config._attn_implementation = "eager"
    made = getattr(t, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in made.parameters():
            near = 0.3 if p.dim() == 1 else 0.17
            p.add_(near * torch.randn(p.shape, generator=g))
    return made.eval()


def _pairs(model, peer, lengths, tokens):
    """Return logits of ours, packed, and of theirs, one document after the other."""
    documents = torch.tensor(sum(lengths, []), dtype=torch.int32)
    ours = model(tokens, documents).flatten(0, 1)
    parts = tokens.flatten().split(documents.tolist())
    return ours, torch.cat([peer(part[None]).logits[0] for part in parts])


def _gradients_equal(model, peer, folder):
    """Compare all gradients by their names at the Hub."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    hf.save(model, folder)
    ours = load_file(folder / "model.safetensors")
    theirs = {n: p.grad for n, p in peer.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert want.abs().max() > 0, name
        close = 1e-4 * float(want.abs().max())
        torch.testing.assert_close(ours[name], want, atol=close, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_transformers(case, tmp_path):
    peer = _peer(*CASES[case])
    peer.save_pretrained(tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    tokens = torch.randint(SIZES["vocab_size"], (2, 63))
    ours, theirs = _pairs(model, peer, LENGTHS, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    hf.save(model, tmp_path / "ours")
    _returns(tmp_path, peer, model)
    upstream = torch.randn(ours.shape)
    for logits in (ours, theirs):
        (logits * upstream).sum().backward()
    _gradients_equal(model, peer, tmp_path / "gradients")


def _returns(folder, peer, model):
    """Bit for bit, and under the same names, what transformers had written."""
    ours, theirs = (load_file(folder / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = type(peer).from_pretrained(folder / "ours", attn_implementation="eager")
    assert hf.architecture(folder / "ours") == model.architecture
    tokens = torch.randint(SIZES["vocab_size"], (1, 60))
    assert torch.equal(again(tokens).logits, peer(tokens).logits)
