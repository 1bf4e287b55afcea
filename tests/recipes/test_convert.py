"""`warploom convert`: GGUF files and Hugging Face folders in, a Hugging Face folder out."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_hf_fp8 import quantised

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama, mixtral, qwen3
from warploom.recipes.convert import command
from warploom.recipes.errors import UserError

gguf = pytest.importorskip("gguf")

SIZES = {"vocabulary": 270, "rope_base": 123_456.0}
FORMS = {
    "llama": replace(llama.tiny(), **SIZES, norm_eps=1e-5, tied=False),
    "tied": replace(llama.tiny(), **SIZES),
    "qwen3": replace(qwen3.tiny(), **SIZES),
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def _pairs(weight, head_dim):
    """Order the rows of heads as llama.cpp has them."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _byte_tokens():
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|pad|>", "<|end|>", *letters, "Ġt", "he", "Ġthe", "12", "Ġ1", "ĊĊ"]
    kinds = [3, 3, *[1] * (len(tokens) - 2)]
    while len(tokens) < SIZES["vocabulary"]:
        tokens.append(f"<user{len(tokens)}>")
        kinds.append(4)
    return tokens, kinds, ["Ġ t", "h e", "Ġt he", "1 2", "Ġ 1", "Ċ Ċ"]


def _write(path, model, quantise=None, **changes):
    """Write a model as a GGUF file, as llama.cpp's converter lays it out; by its own writer."""
    a = model.architecture
    family = "qwen3" if a.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, family)
    own = {
        "block_count": a.layers,
        "embedding_length": a.width,
        "feed_forward_length": a.hidden,
        "context_length": a.max_positions,
        "attention.head_count": a.heads,
        "attention.head_count_kv": a.kv_heads,
        "rope.dimension_count": a.head_dim,
        "vocab_size": a.vocabulary,
        **changes,
    }
    for name, value in own.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{family}.{name}", value)
    writer.add_float32(f"{family}.rope.freq_base", a.rope_base)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", a.norm_eps)
    tokens, kinds, merges = _byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    layer = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "q_norm": "attn_q_norm"}
    layer |= {"k_norm": "attn_k_norm", "out": "attn_output", "gate": "ffn_gate", "up": "ffn_up"}
    layer |= {"down": "ffn_down", "attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm"}
    outer = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
    given = {}
    for path_, made in model.logical_layouts().items():
        for piece in made.pieces:
            words = piece.name.split(".")
            weight = piece.of_local(model.get_parameter(path_).detach())
            name = f"blk.{words[1]}.{layer[words[-2]]}" if words[0] == "blocks" else outer[words[0]]
            if family == "llama" and words[-2] in "qk":
                weight = _pairs(weight, a.head_dim)
            data = weight.contiguous().numpy()
            kind = gguf.GGMLQuantizationType.F32
            if quantise is not None and data.ndim == 2:
                kind = quantise
                data = gguf.quants.quantize(data, kind)
            given[piece.name] = gguf.quants.dequantize(data, kind)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return given


def _run(*words):
    return command.main([str(word) for word in words])


@pytest.mark.parametrize("form", FORMS)
def test_a_gguf_file_becomes_the_model_that_it_was_made_of(form, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Decoder.create(FORMS[form], seed=3)
    _write(tmp_path / "m.gguf", model)
    assert _run(tmp_path / "m.gguf", tmp_path / "out") == 0
    again = hf.load(tmp_path / "out")
    assert again.architecture == model.architecture
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(270, (2, 12))
    torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-5, rtol=0)
    assert peer.generation_config.eos_token_id == 1


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "F16", "BF16"])
def test_quantised_weights_are_numbers_again(kind, tmp_path):
    model = Decoder.create(FORMS["llama"], seed=3)
    quantise = getattr(gguf.GGMLQuantizationType, kind)
    given = _write(tmp_path / "m.gguf", model, quantise)
    _run(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    up = found["model.layers.1.mlp.up_proj.weight"]
    assert up.dtype == expected
    assert found["model.norm.weight"].dtype == torch.float32
    assert np.array_equal(up.float(), given["blocks.1.feed_forward.gate_up.up.weight"])
    key = _pairs(found["model.layers.1.self_attn.k_proj.weight"].float(), 16)
    assert np.array_equal(key, given["blocks.1.attention.qkv.k.weight"])
    again = hf.load(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(again(torch.arange(8)[None])).all()


def test_the_tokenizer_of_a_gguf_file_cuts_as_it_says(tmp_path):
    from transformers import AutoTokenizer

    _write(tmp_path / "m.gguf", Decoder.create(FORMS["tied"]))
    _run(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = _byte_tokens()[0]

    def cut(text):
        return [tokens[n] for n in tokenizer(text)["input_ids"]]

    assert cut("the the") == ["t", "he", "Ġthe"]
    assert cut("12 12") == ["1", "2", "Ġ", "1", "2"]  # digits apart: the merge is never used
    assert cut("a<|end|><user269>b\n\n") == ["a", "<|end|>", "<user269>", "b", "ĊĊ"]
    for text in ("naïve 日本語 😀\n\t x", "\r\n  a  b ", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.model_max_length == FORMS["tied"].max_positions
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "hi<|end|>"


def test_what_a_gguf_file_says_and_we_do_not_know_is_refused_by_name(tmp_path):
    model = Decoder.create(FORMS["tied"])

    def refusal(**changes):
        path = tmp_path / "bad.gguf"
        _write(path, model, **changes)
        with pytest.raises(UserError) as caught:
            _run(path, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
        return str(caught.value)

    said = refusal(**{"rope.scaling.type": "linear", "expert_count": 4})
    assert "llama.rope.scaling.type='linear', llama.expert_count=4" in said
    assert "llama.vocab_size=99" in refusal(vocab_size=99)
    assert "of another shape: blk.0.ffn_gate.weight is (160, 64), must" in refusal(
        feed_forward_length=128
    )
    assert "missing: blk.2.attn_norm.weight" in refusal(block_count=3)
    with torch.no_grad():
        model.blocks["1"].feed_forward.down.weight[3, 5] = float("nan")
    assert "blk.1.ffn_down.weight in" in refusal()


def test_a_file_that_is_no_gguf_or_not_whole_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match=r"it begins with b'PK"):
        _run(path, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist: name a GGUF file"):
        _run(tmp_path / "nowhere", tmp_path / "out")
    _write(path, Decoder.create(FORMS["tied"]))
    whole = path.read_bytes()
    for size in (40, len(whole) // 2, len(whole) - 4000):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            _run(path, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_tensors_of_a_gguf_file_lie_apart(tmp_path):
    """An offset that is another tensor's would give the model that one's weights."""
    _write(tmp_path / "m.gguf", Decoder.create(FORMS["llama"], seed=3))
    raw, places = (tmp_path / "m.gguf").read_bytes(), {}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        name = tensor.name.encode()
        at = raw.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
        places[tensor.name] = at + 4 + 8 * int.from_bytes(raw[at : at + 4], "little") + 4
    out, q = (places[f"blk.0.attn_{part}.weight"] for part in ("output", "q"))
    other = int.from_bytes(raw[out : out + 8], "little")
    for at in (other, other + 32, other + 7):
        (tmp_path / "x.gguf").write_bytes(raw[:q] + at.to_bytes(8, "little") + raw[q + 8 :])
        with pytest.raises(UserError, match=r"x\.gguf is damaged: blk\.0\.attn_"):
            _run(tmp_path / "x.gguf", tmp_path / "out")
    where = raw.index(b"tokenizer.ggml.merges")
    (tmp_path / "x.gguf").write_bytes(raw[:where] + b"T" + raw[where + 1 :])
    with pytest.raises(UserError, match="has a tokenizer that is damaged: KeyError"):
        _run(tmp_path / "x.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.fixture
def folder(tmp_path):
    made = replace(mixtral.tiny(), vocabulary=270)
    hf.save(Decoder.create(made, seed=3), tmp_path / "in", shard_bytes=100_000)
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "in" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "in"


def _tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_folder_is_converted_and_everything_comes_along(folder, tmp_path):
    before = _tensors(folder)
    assert _run(folder, tmp_path / "one") == 0
    after = _tensors(tmp_path / "one")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert _run(folder, tmp_path / "low", "--dtype", "bf16", "--shard-bytes", 50_000) == 0
    low = _tensors(tmp_path / "low")
    assert all(torch.equal(low[name], tensor.bfloat16()) for name, tensor in before.items())
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 6
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "low" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(UserError, match="low exists: weights are never overwritten"):
        _run(folder, tmp_path / "low")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists: weights are never overwritten"):
        _run(folder, tmp_path / "link")


@pytest.mark.parametrize(("words", "dtype"), [((), "bf16"), (("--dtype", "float32"), "float32")])
def test_a_folder_in_fp8_becomes_one_that_is_not(tmp_path, words, dtype):
    from transformers import AutoModelForCausalLM

    want = quantised(llama.tiny(), tmp_path / "in")
    assert _run(tmp_path / "in", tmp_path / "out", *words) == 0
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert not hasattr(peer.config, "quantization_config")
    kind = {"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
    for name, p in peer.named_parameters():
        assert p.dtype == kind
        assert name not in want or torch.equal(p, want[name].to(kind))
    assert hf.load(tmp_path / "out").norm.weight.dtype == kind


def test_nothing_half_written_is_left(folder, tmp_path, monkeypatch):
    name = "model.layers.1.self_attn.o_proj.weight"
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][1, 2] = float("inf")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{name} in .* must hold finite weights; 1 of"):
        _run(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    tensors[name][1, 2] = 0.0
    save_file(tensors, file)
    real, seen = command.Writer.write, SimpleNamespace(count=0)

    def damage(writer, name, blocks):
        seen.count += 1
        real(writer, name, [b + 1 for b in blocks] if seen.count == 5 else blocks)

    monkeypatch.setattr(command.Writer, "write", damage)
    with pytest.raises(OSError, match="does not hold .* as it was written"):
        _run(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_tokenizer_can_be_taken_from_elsewhere(folder, tmp_path):
    (tmp_path / "tok").mkdir()
    with pytest.raises(UserError, match="must hold a tokenizer"):
        _run(folder, tmp_path / "out", "--tokenizer", tmp_path / "tok")
    big = {"model": {"vocab": {"a": 0, "b": 270}}, "added_tokens": []}
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(big))
    said = r"ids up to 270, which must be below the vocabulary of the model \(270\)"
    with pytest.raises(UserError, match=said):
        _run(folder, tmp_path / "out", "--tokenizer", tmp_path / "tok")
    big["model"]["vocab"]["b"] = 269
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(big))
    _run(folder, tmp_path / "out", "--tokenizer", tmp_path / "tok")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    shutil.rmtree(tmp_path / "out")
