"""Folders in FP8, as DeepSeek-V3 is published, against transformers' own dequantisation."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.quantizers import quantizer_finegrained_fp8

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import deepseek_v3, llama
from warploom.models.hf import files
from warploom.parallel.mesh import Mesh

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
CONFIG |= {"activation_scheme": "dynamic"}
_TINY = deepseek_v3.tiny()
SMALL = replace(  # 130, 160 and 192 are no multiples of 128; experts are narrower than a block
    _TINY, width=192, hidden=160, vocabulary=67, latent=replace(_TINY.latent, queries=130),
    experts=replace(_TINY.experts, hidden=24),
)  # fmt: skip
Q = "model.layers.1.self_attn.q_b_proj.weight"


def _codes(rows, columns):
    """Draw codes whose scales differ a lot from block to block."""
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    return codes, scales * 4.0 ** -torch.arange(scales.numel()).view(scales.shape)


def quantised(made, folder, scale=torch.float32):
    """Write a folder whose projections are in FP8; return what they stand for, by name."""
    hf.save(Decoder.create(made, dtype=torch.bfloat16), folder)
    _configure(folder, quantization_config=CONFIG)
    stored, want = load_file(folder / "model.safetensors"), {}
    torch.manual_seed(1)
    for name in [n for n in stored if n.endswith("_proj.weight") or "kv_a_proj" in n]:
        codes, scales = _codes(*stored[name].shape)
        scales = scales.to(scale)
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        want[name] = _dequantize_fp8_weight(codes, scales, [128, 128], torch.float32)
    save_file(stored, folder / "model.safetensors")
    return want


def _configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_weights_in_fp8_are_read_as_what_they_stand_for(tmp_path, dtype, scale):
    want = quantised(SMALL, tmp_path / "model", scale)
    assert any(x.shape[0] % 128 and x.shape[1] > 128 for x in want.values())
    model = hf.load(tmp_path / "model", dtype=dtype)
    dtype = dtype or torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {dtype}
    hf.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert len(want) > 30
    for name, whole in want.items():
        assert torch.equal(again[name], whole.to(dtype)), name


@pytest.mark.parametrize("block", [1, 300, 1 << 20])
def test_any_slice_has_its_own_scales(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    codes, scales = _codes(300, 260)
    save_file({"a": codes, "a_scale_inv": scales}, tmp_path / files.SINGLE)
    whole = _dequantize_fp8_weight(codes, scales, [128, 128], torch.float32)
    ranges = [(0, 300, 1), (100, 200, 1), (127, 129, 1), (256, 260, 1), (3, 257, 100)]
    with files.Reader() as reader:
        (entry,) = files.entries(tmp_path).values()
        for rows, (first, last, step) in product(ranges, ranges):
            columns = (first, min(last, 260), step)
            blocks = [(at, x.clone()) for at, x in reader.blocks(entry, (rows, columns))]
            assert [at.start for at, _ in blocks] == [0, *(at.stop for at, _ in blocks[:-1])]
            read = torch.cat([x for _, x in blocks])
            assert torch.equal(read, whole[slice(*rows), slice(*columns)])
        assert torch.equal(torch.cat([x.clone() for _, x in reader.blocks(entry)]), whole)


def test_transformers_gives_the_same_logits(tmp_path, monkeypatch):
    made = replace(llama.tiny(), width=256, heads=4, kv_heads=2, head_dim=64, hidden=384)
    want = quantised(made, tmp_path / "model")
    assert all(n % 128 == 0 for x in want.values() for n in x.shape)  # others it cannot on a CPU
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").float()
    tokens = torch.randint(256, (2, 33))
    with torch.no_grad():
        ours = hf.load(tmp_path / "model").float()(tokens)
        torch.testing.assert_close(ours, peer(tokens).logits, atol=1e-4, rtol=1e-4)


def _sliced(folder):
    alone = dict(hf.load(folder, dtype=torch.float32).named_parameters())
    whole = Decoder(SMALL, device="meta").logical_layouts()
    want = {p.name: p.of_local(alone[at]) for at, made in whole.items() for p in made.pieces}
    for text in ("tp2", "ep2", "tp2,etp2", "pp2"):
        model = hf.load(folder, Mesh.build(text), dtype=torch.float32)
        for path, layout in model.logical_layouts().items():
            own = model.get_parameter(path)
            for piece in layout.pieces:
                part = want[piece.name][tuple(slice(*s) for s in piece.slices)]
                assert torch.equal(piece.of_local(own), part), (text, piece.name)


def test_ranks_read_their_slices(ranks, tmp_path):
    quantised(SMALL, tmp_path / "model")
    ranks(2, _sliced, tmp_path / "model")


def test_scales_must_fit(tmp_path):
    codes, scales = _codes(300, 130)
    wrong = [None, scales.T.contiguous(), scales[:, :1].contiguous(), scales[0, 0], scales.int()]
    for made in wrong:
        tensors = {"a.weight": codes} | ({} if made is None else {"a.weight_scale_inv": made})
        save_file(tensors, tmp_path / files.SINGLE)
        with pytest.raises(
            ValueError, match=r"a\.weight .* its scales .* a\.weight_scale_inv"
        ) as e:
            files.entries(tmp_path)
        assert "(3, 2)" in str(e.value)
    save_file({"a": codes[0], "a_scale_inv": scales[0]}, tmp_path / files.SINGLE)
    with pytest.raises(ValueError, match=r"a \(130,\) .* matrix"):
        files.entries(tmp_path)


@pytest.mark.parametrize("wrong", ["code", "scale", "overflow"])
def test_what_is_not_finite_is_refused(tmp_path, wrong):
    quantised(SMALL, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    stored = load_file(file)
    if wrong == "code":
        stored[Q].view(torch.uint8)[3, 5] = 0x7F
    else:
        stored[f"{Q}_scale_inv"][0, 0] = math.nan if wrong == "scale" else 3e38
    save_file(stored, file)
    with pytest.raises(ValueError, match=f"{Q} in .* must hold finite weights"):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_block_size": [64, 64]},
        {"weight_block_size": None},
        {"fmt": "e5m2"},
        {"quant_method": "gptq"},
        {"quant_method": "mxfp4"},
        {"quant_method": None},
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, changes):
    hf.save(Decoder.create(SMALL), tmp_path / "model")
    _configure(tmp_path / "model", quantization_config=CONFIG | changes)
    with pytest.raises(
        ValueError, match=r"quantization_config=.* \(the weights would be quant"
    ) as e:
        hf.load(tmp_path / "model")
    assert repr(next(iter(changes.values()))) in str(e.value)


def test_a_format_that_is_said_in_part_is_read(tmp_path):
    hf.save(Decoder.create(SMALL), tmp_path / "model")
    _configure(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    hf.load(tmp_path / "model")
