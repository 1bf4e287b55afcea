"""Tensors that lie otherwise at the Hub: swapped, side by side, stacked, every second column."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.models import families, hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama, mixtral
from warploom.models.families.family import Family
from warploom.models.families.tensors import stored_tensors
from warploom.models.hf import files

NAMES = {
    "q.*.weight": "h.*.qkv.weight[:, +0].T",
    "k.*.weight": "h.*.qkv.weight[:, +1].T",
    "q.*.bias": "h.*.qkv.bias[+0]",
    "k.*.bias": "h.*.qkv.bias[+1]",
    "experts.*.gate": "all[*, :, 0%2].T",
    "experts.*.up": "all[*, :, 1%2].T",
    "conv.*.x": "conv.*[+0, 0, :]",
    "conv.*.b": "conv.*[+1, 0, :]",
    "same": "same",
}
SHAPES = {
    "q.0.weight": (8, 6),
    "k.0.weight": (4, 6),
    "q.0.bias": (8,),
    "k.0.bias": (4,),
    **{f"experts.{e}.{part}": (5, 6) for part in ("gate", "up") for e in range(11)},
    "conv.3.x": (7, 4),
    "conv.3.b": (3, 4),
    "same": (2, 3, 4),
}
STRANGE = Family(
    model_type="strange",
    class_name="Strange",
    fields=mixtral.FAMILY.fields,
    names={
        **mixtral.FAMILY.names,
        **{
            f"blocks.*.attention.qkv.{part}.weight": f"layers.*.qkv[:, +{n}].T"
            for n, part in enumerate("qkv")
        },
        "blocks.*.feed_forward.experts.*.gate.weight": "layers.*.gate_up[*, :, 0%2].T",
        "blocks.*.feed_forward.experts.*.up.weight": "layers.*.gate_up[*, :, 1%2].T",
        "blocks.*.feed_forward.experts.*.down.weight": "layers.*.down[*, :, :]",
        "blocks.*.feed_forward.router.bias": "layers.*.correction",
    },
    defaults=mixtral.FAMILY.defaults,
    always={"experts.score": "sigmoid", "experts.bias_rate": 0.001},
    prefix="model.",
)


@pytest.fixture
def tensors():
    """The logical tensors of `SHAPES`, and those of the Hub that they make."""
    logical = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    stored = {}
    for name, one in stored_tensors(NAMES, SHAPES).items():
        stored[name] = torch.full(one.shape, float("nan"))
        for part in one.parts:
            place = stored[name][tuple(slice(*s) for s in part.slices)]
            place.copy_(part.as_stored(logical[part.logical]))
    return logical, stored


def test_shapes_and_places_follow_from_the_table(tensors):
    logical, stored = tensors
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "h.0.qkv.weight": (6, 12),
        "h.0.qkv.bias": (12,),
        "all": (11, 6, 10),
        "conv.3": (10, 1, 4),
        "same": (2, 3, 4),
    }
    assert not any(tensor.isnan().any() for tensor in stored.values())
    assert torch.equal(stored["h.0.qkv.weight"][:, 8:], logical["k.0.weight"].t())
    assert torch.equal(stored["all"][10, :, 1::2], logical["experts.10.up"].t())
    assert torch.equal(stored["conv.3"][7:, 0], logical["conv.3.b"])
    found = stored_tensors(NAMES, SHAPES)
    assert [one.plain for one in found.values()] == [False, False, False, False, True]


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_any_slice_is_read_from_the_file(tensors, tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    logical, stored = tensors
    save_file(stored, tmp_path / files.SINGLE)
    where = files.entries(tmp_path)
    ranges = [(0, None, 1), (1, None, 1), (0, 2, 1), (0, None, 2), (1, None, 3)]
    with files.Reader() as reader:
        for name, one in stored_tensors(NAMES, SHAPES).items():
            for part in (*one.parts[:2], *one.parts[-2:]):
                sizes = SHAPES[part.logical]
                for cut in product(ranges, repeat=len(sizes)):
                    own = tuple(
                        (start, size if stop is None else stop, step)
                        for (start, stop, step), size in zip(cut, sizes, strict=True)
                    )
                    blocks = reader.blocks(where[name], part.within(own))
                    read = torch.cat([block.clone() for _, block in blocks])
                    slices = tuple(slice(*s) for s in own)
                    expected = part.as_stored(logical[part.logical][slices])
                    assert torch.equal(read, expected), (part, own)


@pytest.fixture
def strange(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", (llama.FAMILY, STRANGE))
    base = mixtral.tiny()
    assert base.experts is not None
    experts = replace(base.experts, score="sigmoid", bias_rate=0.003, router_z=0.1, balance=0.0)
    return replace(base, experts=experts, rope_base=1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_routers_biases_in_float32_and_what_trains(strange, dtype, tmp_path):
    model = Decoder.create(strange, seed=3, dtype=dtype)
    for block in model.blocks.values():
        block.feed_forward.router.bias.normal_()
    hf.save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["layers.0.gate_up"].shape == (4, 64, 320)
    assert stored["layers.0.correction"].dtype == torch.float32
    again = hf.load(tmp_path / "m")
    assert again.architecture == strange  # bias_rate and router_z too
    tensors = dict(again.named_parameters()) | dict(again.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("load"):
            assert torch.equal(tensor, tensors[name]), name
    tokens = torch.randint(strange.vocabulary, (2, 9))
    assert torch.equal(model(tokens), again(tokens))


def test_names_may_lack_the_prefix(strange, tmp_path):
    model = Decoder.create(strange, seed=3)
    hf.save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, file)
    again = hf.load(tmp_path / "m")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_bias_that_another_family_would_forget_is_not_saved_as_it(strange):
    with pytest.raises(ValueError, match="the nearest is"):
        families.of_architecture(replace(strange, qk_norm="head"))
    gone = replace(strange, experts=replace(strange.experts, bias_rate=0.0))
    assert families.of_architecture(gone).model_type == "strange"  # no bias is a bias of 0
