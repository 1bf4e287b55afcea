"""Rotary positions in config.json: angles bit for bit those of transformers, in both spellings."""

import json
from dataclasses import replace

import pytest
import torch

from warploom.kernels.rope import DynamicNtk, Linear, Llama3, NtkAware, Yarn, rotary_tables
from warploom.models.families import llama, of_architecture

FAMILY = llama.FAMILY
STRETCHED = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, DeepSeek": {
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn, gpt-oss": {
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn, temperature": {
        "factor": 8.0,
        "original_max_position_embeddings": 100,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn, no length": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def _config(**fields):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 32, "vocab_size": 16, "max_position_embeddings": 512}
    return {**sizes, **fields}


@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
def test_angles_are_those_of_transformers_bit_for_bit(kind, spelling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    name = kind.partition(",")[0]
    given = {"type" if spelling == "type" else "rope_type": name, **STRETCHED[kind]}
    if spelling == "rope_parameters":
        config = _config(rope_parameters={**given, "rope_theta": 50_000.0})
    else:
        config = _config(rope_scaling=given, rope_theta=50_000.0)
    made = FAMILY.architecture(config)
    assert made.rope_base == 50_000.0
    peer = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
    scaling = made.rope_scaling
    for longest in (400, 1500):  # within and beyond the window
        positions = torch.arange(longest)
        cos, sin = peer(torch.zeros(1, 1), positions[None])
        if isinstance(scaling, DynamicNtk):
            scaling = replace(scaling, length=longest)
        ours = rotary_tables(positions, 64, base=made.rope_base, scaling=scaling)
        assert torch.equal(cos[0, :, :32], ours[0])
        assert torch.equal(sin[0, :, :32], ours[1])


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        Linear(3.0),
        DynamicNtk(4.0, 512, 512),
        Yarn(4.0, 128),
        Yarn(4.0, 128, 16.0, 2.0, 1.5, truncate=False),
        Yarn(4.0, 128, mscale=1.0, mscale_all_dim=0.5),
        Llama3(8.0, 1.0, 4.0, 128),
    ],
)
def test_what_is_written_is_read_again_in_every_spelling(scaling):
    longest = 2048 if isinstance(scaling, DynamicNtk) else 512  # that is four times the original
    made = replace(llama.tiny(), max_positions=longest, rope_scaling=scaling)
    config = json.loads(json.dumps(FAMILY.config(made)))
    assert FAMILY.architecture(config) == made
    del config["rope_parameters"]
    assert FAMILY.architecture(config) == made
    config = FAMILY.config(made)
    config.pop("rope_scaling", None), config.pop("rope_theta")
    assert FAMILY.architecture(config) == made


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_a_length_of_0_is_not_an_absent_one(kind):
    name = "original_max_position_embeddings"
    given = {**STRETCHED[kind], "rope_type": kind}
    for original in (0, -3):
        inside = {"rope_parameters": {**given, name: original}}
        beside = {"rope_parameters": given, name: original}
        by_length = {"rope_parameters": {"rope_type": "yarn", name: original}}
        for fields in (inside, beside, by_length):
            with pytest.raises(ValueError, match=f"original must be positive, got {original}"):
                FAMILY.architecture(_config(**fields))


def test_a_part_of_0_is_not_an_absent_one():
    for part in ({"partial_rotary_factor": 0.0}, {"rope_parameters": {"partial_rotary_factor": 0}}):
        with pytest.raises(ValueError, match="partial_rotary_factor=0"):
            FAMILY.architecture(_config(**part))


def test_a_length_and_a_larger_base_are_the_same_model():
    dynamic = replace(llama.tiny(), max_positions=2048, rope_scaling=DynamicNtk(4.0, 512, 2048))
    assert of_architecture(dynamic) is FAMILY
    ntk = replace(llama.tiny(), rope_scaling=NtkAware(4.0))
    assert of_architecture(ntk) is FAMILY
    again = FAMILY.architecture(FAMILY.config(ntk))
    assert again.rope_scaling is None
    positions = torch.arange(100)
    ours = rotary_tables(positions, 16, base=ntk.rope_base, scaling=ntk.rope_scaling)
    theirs = rotary_tables(positions, 16, base=again.rope_base)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    far = replace(llama.tiny(), rope_scaling=DynamicNtk(4.0, 256, 256))
    with pytest.raises(ValueError, match="llama, whose config.json cannot say max_positions="):
        of_architecture(far)  # transformers counts from max_position_embeddings
