"""Bamba: long documents, fields, sizes and greedy text; test_families.py has the gradients."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as t

from warploom.models import hf
from warploom.models.cache import Cache
from warploom.models.cost import parameters
from warploom.models.decoder import Decoder
from warploom.models.families import bamba

SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
SIZES |= {"mamba_n_heads": 8, "mamba_d_state": 6, "pad_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0}}


def _peer(**changes):
    torch.manual_seed(0)
    peer = t.BambaForCausalLM(t.BambaConfig(**SIZES | ROPE | changes)).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "A_log" not in name:
                p.mul_(2).add_(torch.randn_like(p) * 0.1)
    return peer


def _ours(peer, folder, **options):
    peer.save_pretrained(folder)
    return hf.load(folder, **options)


def test_long_documents_in_one_pack_are_those_of_transformers(tmp_path):
    peer = _peer(mamba_n_groups=2)
    model = _ours(peer, tmp_path / "theirs")
    lengths = (70, 1, 5, 300, 64)
    tokens = torch.randint(90, (1, sum(lengths)))
    with torch.no_grad():
        want = torch.cat([peer(row).logits for row in tokens.split(lengths, 1)], 1)
        got = model(tokens, document_lengths=lengths)
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0)


def test_fields_that_change_the_model_are_named(tmp_path):
    _peer().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    plain = json.loads(path.read_text())
    changes = {
        "hidden_act": "gelu",
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "time_step_limit": [0.001, 0.1],
        "z_loss_coefficient": 0.1,
        "partial_rotary_factor": 0.25,
        "mamba_expand": 3,
        "mamba_future": 1,
    }
    del plain["rope_parameters"]
    assert bamba.FAMILY.architecture(plain).rope_dim == 4
    for name, value in changes.items():
        path.write_text(json.dumps({**plain, "mamba_d_head": 8, name: value}))
        with pytest.raises(
            ValueError, match=rf"cannot be honoured: {name}={re.escape(repr(value))} \("
        ):
            hf.load(tmp_path / "model")


def test_the_published_size_has_the_published_parameters():
    made = bamba.bamba_9b()
    with torch.device("meta"):
        peer = t.BambaForCausalLM(t.BambaConfig(**bamba.FAMILY.config(made)))
        model = Decoder(made, device="meta")
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(p.numel() for p in peer.parameters()) == 9_780_235_392
    assert total == sum(parameters(made).values())
    for made in (bamba.tiny(), bamba.bamba_9b()):
        config = json.loads(json.dumps(bamba.FAMILY.config(made)))
        assert bamba.FAMILY.architecture(config) == made
        assert not bamba.FAMILY.cannot_say(made)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.25 \(transformers rotates half"):
        bamba.FAMILY.cannot_say(replace(bamba.tiny(), rope_dim=4))


def test_greedy_text_through_the_cache_is_that_of_transformers(tmp_path):
    peer = _peer(mamba_n_groups=2)
    model = _ours(peer, tmp_path / "theirs")
    prompts = [torch.randint(90, (n,)) for n in (1, 9, 23)]
    texts = [p.tolist() for p in prompts]
    tables = torch.arange(30, dtype=torch.int32).view(3, 10)
    with torch.no_grad():
        cache = Cache(model, pages=30, page_size=4, slots=3)
        starts = torch.zeros(3, dtype=torch.int64)
        new = prompts
        for _ in range(14):
            counts = torch.tensor([len(x) for x in new])
            where = cache.step(starts, counts, tables)
            logits = model.logits(model.advance(torch.cat(new), where)[counts.cumsum(0) - 1])
            new = list(logits.argmax(-1).split(1))
            starts = starts + counts
            texts = [text + x.tolist() for text, x in zip(texts, new, strict=True)]
        for prompt, text in zip(prompts, texts, strict=True):
            want = peer.generate(
                prompt[None],
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=14,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert want[0].tolist() == text
