"""gpt-oss against transformers: logits, every gradient, folders; and on meshes against one rank."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_parity import SIZES, _mesh_equals_one_process
from tests.models.test_qwen_moe import agrees, drawn, peer_of

from warploom.kernels.rope import Yarn
from warploom.models import hf
from warploom.models.cost import parameters
from warploom.models.decoder import Decoder
from warploom.models.families import gpt_oss, of_architecture
from warploom.models.hf import files
from warploom.parallel.mesh import Degrees, Mesh

TINY = gpt_oss.tiny()
LONG = replace(  # a window longer than some documents, YaRN that begins early, five blocks
    TINY,
    layers=5,
    window=11,
    rope_scaling=replace(TINY.rope_scaling, original=16),
    experts=replace(TINY.experts, count=12, top_k=3, balance=0.3),
)
WIDE = replace(
    TINY, kinds=("full",), window=None, kv_heads=1, experts=replace(TINY.experts, clamp=0.2)
)


@pytest.mark.parametrize("made", [TINY, LONG, WIDE], ids=["tiny", "long", "wide"])
def test_transformers_agrees(made, tmp_path):
    model = drawn(made)
    peer = peer_of(model, tmp_path / "ours")
    agrees(model, peer, [3, 71, 1, 9])


def test_an_expert_without_tokens_and_equal_experts(tmp_path):
    model = drawn(TINY)
    with torch.no_grad():
        for block in model.blocks.values():
            moe = block.feed_forward
            moe.router.weight.zero_()
            moe.router.linear_bias.copy_(torch.tensor([0.5, -9.0, 0.5, 0.5]))  # a tie of three
            for x in moe.experts.parameters():
                each = x.view(moe.count, -1)
                each.copy_(each[:1].clone().expand_as(each))
    peer = peer_of(model, tmp_path / "ours")
    tokens = torch.randint(256, (2, 9))
    logits = model(tokens)
    torch.testing.assert_close(logits, peer(tokens).logits, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    layouts = model.logical_layouts()
    for name, p in model.named_parameters():
        for piece in layouts[name].pieces:
            if ".experts.1." in piece.name:
                assert not piece.of_local(p.grad).any()


def test_folders_of_transformers_come_back(tmp_path):
    model = drawn(LONG)
    peer_of(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = hf.load(tmp_path / "theirs")
    assert again.architecture.experts.balance == pytest.approx(0.3)
    assert replace(again.architecture, experts=LONG.experts) == LONG
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_in_mxfp4_are_read_as_what_they_stand_for(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = replace(TINY, hidden=96, experts=replace(TINY.experts, hidden=96))
    hf.save(Decoder.create(made, dtype=torch.bfloat16), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    stored, want, scales = load_file(tmp_path / "model/model.safetensors"), {}, {}
    for name in [n for n in stored if n.endswith("_proj")]:
        experts, inner, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(115, 130, blocks.shape[:3], dtype=torch.uint8)
        want[name] = convert_moe_packed_tensors(blocks, exponents)
        stored[f"{name}_blocks"], scales[f"{name}_scales"] = blocks, exponents
    (tmp_path / "model/model.safetensors").unlink()
    parts = {"a.safetensors": stored, "b.safetensors": scales}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / "model" / file)
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    model = hf.load(tmp_path / "model")
    assert model.norm.weight.dtype == torch.bfloat16
    hf.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    for name, whole in want.items():
        assert torch.equal(again[name], whole), name
    name = "model.layers.1.mlp.experts.down_proj"
    with files.Reader() as reader:
        entry = files.entries(tmp_path / "model")[name]
        part = [x for _, x in reader.blocks(entry, ((1, 3, 1), (40, 72, 1), (1, 60, 3)))]
    assert torch.equal(torch.cat(part), want[name][1:3, 40:72, 1:60:3])
    del scales[f"{name}_scales"], index["weight_map"][f"{name}_scales"]
    save_file(scales, tmp_path / "model/b.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"with its scales beside it: .*down_proj_scales"):
        hf.load(tmp_path / "model")


def _stacked(folder):
    for text in ("dp2,ep2", "tp2,etp2"):
        mesh = Mesh.build(text)
        model, empty = (Decoder.create(TINY, mesh=mesh, seed=seed) for seed in (3, 4))
        hf.save(model, folder / text)
        one, two = (folder / name / "model.safetensors" for name in ("alone", text))
        assert one.read_bytes() == two.read_bytes()
        hf.load_into(empty, folder / "alone")
        for a, b in zip(empty.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_two_ranks_save_and_load_stacked_experts(ranks, tmp_path):
    hf.save(Decoder.create(TINY, seed=3), tmp_path / "alone")
    ranks(2, _stacked, tmp_path)


@pytest.mark.parametrize(
    ("made", "count"),
    [(gpt_oss.gpt_oss_20b, 20_914_757_184), (gpt_oss.gpt_oss_120b, 116_829_156_672)],
)
def test_published_sizes(made, count):
    assert sum(parameters(made()).values()) == count
    assert f"{count:,}" in made.__doc__
    family = of_architecture(made())
    assert family is gpt_oss.FAMILY
    assert family.architecture(json.loads(json.dumps(family.config(made())))) == made()


def test_what_cannot_be_honoured_is_named(tmp_path):
    hf.save(Decoder.create(TINY), tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"] | {"short_factor": 0.7}
    changes = {"swiglu_alpha": 1.5, "layer_types": ["chunked_attention"]}
    path.write_text(
        json.dumps(
            config | changes | {"rope_parameters": rope, "rope_scaling": None, "hidden_act": "gelu"}
        )
    )
    with pytest.raises(ValueError, match="cannot be honoured") as caught:
        hf.load(tmp_path / "model")
    for words in ("swiglu_alpha=1.5", "chunked", "short_factor", "'gelu'"):
        assert words in str(caught.value)


MADE = replace(
    TINY,
    **SIZES,
    window=3,
    rope_scaling=Yarn(original=8, factor=4.0, truncate=False),
    experts=replace(TINY.experts, hidden=12, balance=0.5, clamp=0.05),
)
CASES = [
    ("cp2,ep2", {}),
    pytest.param("tp2,etp2", {"recompute": "selective"}, marks=pytest.mark.slow),
    pytest.param("tp2,cp2,ep2", {"context": "all_gather"}, marks=pytest.mark.slow),
    pytest.param("cp4,uly2,ep2,etp2", {"balance": "document", "zero": 3}, marks=pytest.mark.slow),
    pytest.param("pp2,dp2,ep2", {"schedule": "zbv"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("text", "options"), CASES)
def test_mesh_equals_one_process(ranks, text, options):
    made = replace(MADE, layers=4) if "pp" in text else MADE
    degrees = Degrees.parse(text)
    world = degrees.tp * degrees.cp * degrees.pp * (degrees.dp or 1)
    ranks(world, _mesh_equals_one_process, text, made, options)
