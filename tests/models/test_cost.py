"""Planned costs against published counts and torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from warploom.models import cost
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.families import llama, qwen3
from warploom.recipes.plan.flops import measured_flops

PUBLISHED = {
    llama.llama2_7b: 6_738_415_616,
    llama.llama3_8b: 8_030_261_248,
    llama.llama3_70b: 70_553_706_496,
    llama.smollm2_135m: 134_515_008,
    qwen3.qwen3_0_6b: 596_049_920,
    qwen3.qwen3_1_7b: 1_720_574_976,
    qwen3.qwen3_4b: 4_022_468_096,
    qwen3.qwen3_8b: 8_190_735_360,
}
TINY = {
    "llama": replace(llama.tiny(), tied=False),
    "llama, tied": llama.tiny(),
    "qwen3": qwen3.tiny(),
}
every_tiny = pytest.mark.parametrize("made", TINY.values(), ids=TINY.keys())


def _batch(made, rows, length):
    ids = torch.randint(made.vocabulary, (rows, length + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda f: f.__name__)
def test_parameters_are_those_published(size):
    assert sum(cost.parameters(size()).values()) == PUBLISHED[size]


@every_tiny
def test_parameters_are_those_of_the_model(made):
    model = Decoder(made, device="meta")
    found = dict.fromkeys(cost.parameters(made), 0)
    for path, p in model.named_parameters():
        kinds = [k for k in ("norm", "feed_forward", "attention", "embedding", "head") if k in path]
        found[kinds[0]] += p.numel()
    assert found == cost.parameters(made)


def test_flops_of_llama3_8b():
    made = llama.llama3_8b()
    flops = cost.flops_per_token(made, 8192)
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # neither the embedding nor the norms
    assert flops.forward == 2 * matrices + 32 * 4 * 4096 * 4096
    assert flops.training == 3 * flops.forward


@every_tiny
def test_planned_flops_are_those_of_transformers(made):
    from transformers import AutoModelForCausalLM

    from warploom.models.families import of_architecture

    family = of_architecture(made)
    import transformers

    config = getattr(transformers, family.class_name.replace("ForCausalLM", "Config"))
    peer = AutoModelForCausalLM.from_config(
        config(**family.config(made)), attn_implementation="eager"
    )
    batch = _batch(made, 2, 24)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        peer(batch.tokens)
    with FlopCounterMode(display=False) as training:
        peer(batch.tokens, labels=batch.tokens).loss.backward()
    plan = cost.flops_per_token(made, 24, halve=False)
    assert forward.get_total_flops() == 48 * plan.forward
    assert training.get_total_flops() == 48 * plan.training


@pytest.mark.parametrize("lengths", [None, [5, 19, 1, 23]])
@every_tiny
def test_measured_flops_are_planned_ones_and_the_scores_twice(made, lengths):
    model = Decoder.create(made)
    batch = _batch(made, 2, 24)
    if lengths:
        batch = replace(batch, document_lengths=torch.tensor(lengths, dtype=torch.int32))
    plan = cost.flops_per_token(made, 24, document_lengths=lengths)
    again = made.layers * 2 * made.heads * made.head_dim * sum(n * n for n in lengths or [24, 24])
    measured = measured_flops(lambda: model.loss(batch)[0].sum.backward())
    assert measured == 48 * plan.training + again / 2


def test_measured_flops_of_z_loss_and_of_inference():
    made = llama.tiny()
    batch = _batch(made, 2, 24)
    head = 2 * made.vocabulary * made.width
    plain, z = Decoder.create(made), Decoder.create(made, z_loss=0.1)

    def train(model):
        sum(term.sum for term in model.loss(batch)).backward()

    four = measured_flops(lambda: train(z))
    assert four - measured_flops(lambda: train(plain)) == 48 * head
    with torch.no_grad():
        loss = measured_flops(lambda: plain.loss(batch))
        logits = measured_flops(lambda: plain(batch.tokens))
    assert loss == logits == 48 * cost.flops_per_token(made, 24).forward


def test_mfu_and_wrong_lengths():
    assert cost.mfu(1000.0, 6e9, 1e13) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="must be at least 1; got .5, 0."):
        cost.flops_per_token(llama.tiny(), 5, document_lengths=[5, 0])
