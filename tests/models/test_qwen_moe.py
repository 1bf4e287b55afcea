"""Qwen2-MoE and Qwen3-MoE against transformers: logits, every gradient, folders; their sizes."""

import json
from dataclasses import replace

import pytest
import torch

from warploom.models import hf
from warploom.models.cost import parameters
from warploom.models.decoder import Decoder
from warploom.models.families import of_architecture, qwen2_moe, qwen3_moe
from warploom.models.hf.tensors import stored_tensors_of
from warploom.parallel.sharding import assemble

LENGTHS = [3, 19, 1, 9]  # with few tokens some experts have none

FORMS = {
    "qwen2": replace(qwen2_moe.tiny(), layers=3, norm_eps=1e-6),
    "qwen3": replace(qwen3_moe.tiny(), layers=3, kv_heads=1),
    "qwen3, twelve experts": replace(
        qwen3_moe.tiny(),
        experts=replace(qwen3_moe.tiny().experts, count=12, top_k=3, normalise=False, balance=0.3),
    ),
}


def drawn(made, seed=3):
    """Draw a decoder whose weights are large enough for every choice to matter, biases too."""
    model = Decoder.create(made, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
            else:
                p.mul_(20.0 if "router" in name else 4.0)
    return model


def peer_of(model, folder):
    """Load what is saved into transformers, which must miss nothing."""
    import transformers as t

    hf.save(model, folder)
    peer, told = t.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return peer


def agrees(model, peer, lengths=LENGTHS, *, split=lambda found, name, gradient: None):
    """Compare logits and all gradients; documents are packed here, and alone there."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.architecture.vocabulary, (1, sum(lengths)), generator=g)
    logits = model(tokens, torch.tensor(lengths, dtype=torch.int32))
    parts = [peer(part).logits for part in tokens.split(lengths, 1)]
    want = torch.cat(parts, 1)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    dy = torch.randn(want.shape, generator=g)
    (logits * dy).sum().backward()
    (want * dy).sum().backward()
    found = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in peer.named_parameters():
        split(found, name, parameter.grad)
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    got = assemble({n: p.grad for n, p in model.named_parameters()}, model.logical_layouts(), None)
    stored = stored_tensors_of(model.architecture, of_architecture(model.architecture))
    assert {part.logical for one in stored.values() for part in one.parts} == got.keys()
    for name, one in stored.items():
        for part in one.parts:
            ours = part.as_stored(got[part.logical])
            theirs = found[name][tuple(slice(*s) for s in part.slices)]
            assert ours.shape == theirs.shape, part
            assert ours.abs().max() > 0 or ".experts." in name, name
            limit = 1e-4 * max(float(theirs.abs().max()), 1e-3 * largest)
            said = f"{part.logical}: "
            torch.testing.assert_close(
                ours, theirs, atol=limit, rtol=0, msg=lambda m, said=said: said + m
            )


def _apart(found, name, gradient):
    """Name each expert's part of what transformers stacks in memory, as it is on disk."""
    if name.endswith("experts.gate_up_proj"):
        for e, both in enumerate(gradient):
            stem = name.replace("gate_up_proj", str(e))
            found[f"{stem}.gate_proj.weight"], found[f"{stem}.up_proj.weight"] = both.chunk(2)
    elif name.endswith("experts.down_proj"):
        stem = name.removesuffix("down_proj")
        found |= {f"{stem}{e}.down_proj.weight": down for e, down in enumerate(gradient)}


@pytest.mark.parametrize("form", FORMS)
def test_transformers_agrees(form, tmp_path):
    model = drawn(FORMS[form])
    agrees(model, peer_of(model, tmp_path / "ours"), split=_apart)


def test_equal_scores_of_equal_experts_give_the_same(tmp_path):
    """All routers' rows are one: whichever experts are taken, the sum is the same."""
    for form in ("qwen2", "qwen3"):
        model = drawn(FORMS[form])
        with torch.no_grad():
            for block in model.blocks.values():
                moe = block.feed_forward
                moe.router.weight.zero_()
                for stacked in (moe.experts.gate_up, moe.experts.down):
                    each = stacked.view(moe.count, -1, stacked.shape[1])
                    each.copy_(each[:1].clone().expand_as(each))
        peer = peer_of(model, tmp_path / form)
        tokens = torch.randint(256, (2, 9))
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_transformers_come_back(form, tmp_path):
    model = drawn(FORMS[form])
    peer_of(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = hf.load(tmp_path / "theirs")
    assert again.architecture.experts.balance == pytest.approx(FORMS[form].experts.balance)
    assert replace(again.architecture, experts=FORMS[form].experts) == FORMS[form]
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (qwen2_moe.qwen1_5_moe_a2_7b, 14_315_784_192),
        (qwen2_moe.qwen2_57b_a14b, 57_408_658_944),
        (qwen3_moe.qwen3_30b_a3b, 30_532_122_624),
        (qwen3_moe.qwen3_235b_a22b, 235_093_634_560),
    ],
)
def test_published_sizes(made, count):
    assert sum(parameters(made()).values()) == count
    assert f"{count:,}" in made.__doc__
    family = of_architecture(made())
    assert family.architecture(json.loads(json.dumps(family.config(made())))) == made()


def test_what_cannot_be_honoured_is_named(tmp_path):
    hf.save(Decoder.create(qwen3_moe.tiny()), tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"decoder_sparse_step": 2, "mlp_only_layers": [0]}))
    with pytest.raises(ValueError, match=r"step=2 \(some .*mlp_only_layers=\[0\] \(these blocks"):
        hf.load(tmp_path / "model")
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "moe_intermediate_size"}))
    with pytest.raises(ValueError, match="must have 'moe_intermediate_size'"):
        hf.load(tmp_path / "model")
