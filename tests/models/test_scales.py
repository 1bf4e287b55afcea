"""Scales of a decoder against the same scales in its weights; what norms start as."""

from dataclasses import replace

import pytest
import torch

from warploom.models.decoder import Architecture, Decoder, Experts
from warploom.models.norm import RMSNorm

DENSE = Architecture(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    vocabulary=37,
    max_positions=16,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
EXPERTS = Experts(count=4, top_k=2, hidden=12, shared=8, balance=0.5)
FORMS = {"dense": DENSE, "routed": replace(DENSE, mlp_bias=False, experts=EXPERTS)}
TOKENS = torch.arange(24).view(2, 12) * 5 % 37
SCALE = 0.7


def _pair(made, **scales):
    """Build a model with scales, and one without, of equal weights that are not 0 or 1."""
    both = [Decoder.create(a, seed=3, dtype=torch.float64) for a in (replace(made, **scales), made)]
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one, other in zip(*(m.parameters() for m in both), strict=True):
            one.add_(0.3 * torch.randn(one.shape, generator=draw, dtype=one.dtype))
            other.copy_(one)
    return both


@torch.no_grad()
def _scale(model, ends, by):
    found = [p for name, p in model.named_parameters() if name.endswith(ends)]
    assert found
    for p in found:
        p.mul_(by)


def _adds(norm_at):
    """What a block adds is linear in these."""
    if norm_at != "before":
        return ("post_norm.weight",)
    outs = ("attention.out", "feed_forward.down", "shared.down")
    return (*(f"{name}.{leaf}" for name in outs for leaf in ("weight", "bias")), "experts.down")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_at", ["before", "after", "both"])
def test_what_blocks_add_is_scaled(form, norm_at):
    scaled, plain = _pair(replace(FORMS[form], norm_at=norm_at), residual_scale=SCALE)
    before = plain(TOKENS)
    _scale(plain, _adds(norm_at), SCALE)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS), atol=1e-12, rtol=0)
    assert (plain(TOKENS) - before).abs().max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_what_a_feed_forward_adds_is_normalised(form):
    one, other = _pair(replace(FORMS[form], norm_at="both"))
    before = one(TOKENS)
    _scale(one, ("feed_forward_post_norm.weight",), 0.0)
    _scale(other, (*_adds("before")[2:],), 0.0)  # its norm is of zeros
    torch.testing.assert_close(one(TOKENS), other(TOKENS), atol=1e-12, rtol=0)
    assert (one(TOKENS) - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "ends"), [("embedding_scale", "embedding.weight"), ("logit_scale", "head.weight")]
)
def test_embedding_and_logits_are_scaled(name, ends):
    scaled, plain = _pair(DENSE, **{name: SCALE})
    _scale(plain, (ends,), SCALE)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["rms", "rms_plus_one", "layer"])
def test_norms_start_without_a_scale(norm):
    """A weight of 1 where the scale is 1 + weight would double every stream."""
    made = replace(DENSE, norm=norm, norm_at="both", qk_norm="head")
    norms = [m for m in Decoder.create(made).modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 2 * 6 + 1
    for one in norms:
        assert torch.equal(one.scale, torch.ones(len(one.weight)))
        assert not getattr(one, "bias", torch.zeros(1)).any()
