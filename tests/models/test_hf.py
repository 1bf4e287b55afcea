"""Hugging Face folders in and out: bit for bit, in any number of files, on any mesh."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama, qwen3
from warploom.parallel.mesh import Mesh

BASE = replace(llama.tiny(), tied=False, rope_base=500_000.0)


def _config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config = {k: v for k, v in (config | changes).items() if v is not ...}
    path.write_text(json.dumps(config))


def _equal(a, b):
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(ours) == list(theirs)
    for name, p in ours.items():
        assert p.dtype == theirs[name].dtype, name
        assert torch.equal(p, theirs[name]), name


@pytest.fixture
def folder(tmp_path):
    hf.save(Decoder.create(BASE, seed=3), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("made", [BASE, llama.tiny(), qwen3.tiny()], ids=["llama", "tied", "qwen3"])
def test_a_round_trip_changes_no_bit(made, dtype, tmp_path):
    model = Decoder.create(made, seed=3, dtype=dtype)
    hf.save(model, tmp_path / "one")
    hf.save(model, tmp_path / "many", shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    for name in ("one", "many"):
        again = hf.load(tmp_path / name)
        assert again.architecture == made
        _equal(again, model)
    other = hf.load(tmp_path / "many", dtype=torch.float16)
    assert torch.equal(other.norm.weight, model.norm.weight.half())


@pytest.mark.parametrize("kind", ["llama", "llama, tied, sharded", "qwen3"])
def test_a_folder_of_transformers_loads_and_saves_back(kind, tmp_path):
    import transformers as t

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 90}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 123_456.0}}
    if kind == "qwen3":
        peer = t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, **rope, head_dim=16))
    else:
        tied = "tied" in kind
        peer = t.LlamaForCausalLM(t.LlamaConfig(**sizes, **rope, tie_word_embeddings=tied))
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if "sharded" in kind else "1GB")
    model = hf.load(tmp_path / "theirs")
    assert model.architecture.rope_base == 123_456.0
    tokens = torch.randint(90, (2, 12))
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-5, rtol=0)
    hf.save(model, tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(peer.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_older_spelling_of_rope_is_read(folder):
    _config(folder, rope_parameters=..., rope_theta=77.0)
    assert hf.architecture(folder).rope_base == 77.0
    _config(folder, rope_theta=...)
    assert hf.architecture(folder).rope_base == 10_000.0


def test_the_config_says_what_transformers_4_reads(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500_000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000.0}
    assert (config["torch_dtype"], config["architectures"]) == ("float32", ["LlamaForCausalLM"])
    assert not (folder / "generation_config.json").exists()


def test_fields_that_cannot_be_honoured_are_listed(folder):
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500_000.0}
    _config(folder, rope_parameters=scaled, attention_bias=True, mlp_bias=True, hidden_act="gelu")
    with pytest.raises(ValueError, match="cannot be honoured") as caught:
        hf.load(folder)
    for words in ("attention_bias=True", "mlp_bias=True", "hidden_act='gelu'", "'llama3'"):
        assert words in str(caught.value)
    _config(folder, rope_parameters=..., attention_bias=False, mlp_bias=False, hidden_act="silu")
    _config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="rope_scaling={'type': 'linear'"):
        hf.load(folder)
    _config(folder, rope_scaling=None, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=r"layer_types=\['sliding_attention'\]"):
        hf.load(folder)
    _config(folder, layer_types=None, model_type="gpt2")
    with pytest.raises(ValueError, match="model_type must be one of llama, qwen3, mixtral; got 'gpt2'"):
        hf.load(folder)
    _config(folder, model_type="llama", vocab_size=...)
    with pytest.raises(ValueError, match="config.json must have 'vocab_size'"):
        hf.load(folder)


def test_tensors_that_do_not_fit_are_listed_and_nothing_changes(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.7.strange"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)  # says nothing: accepted
    save_file(tensors, folder / "model.safetensors")
    model = Decoder.create(BASE, seed=9)
    with pytest.raises(ValueError, match="does not hold this model") as caught:
        hf.load_into(model, folder)
    for words in (
        "missing (1): model.layers.1.mlp.up_proj.weight",
        "unknown (1): model.layers.7.strange",
        "of another shape (1): model.norm.weight is (65,), must be (64,)",
    ):
        assert words in str(caught.value)
    assert "inv_freq" not in str(caught.value)
    _equal(model, Decoder.create(BASE, seed=9))


def test_a_tied_head_in_the_file_must_equal_its_embedding(tmp_path):
    hf.save(Decoder.create(llama.tiny()), tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    hf.load(tmp_path / "tied")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"unknown \(1\): lm_head.weight"):
        hf.load(tmp_path / "tied")


def test_missing_files_and_mixed_dtypes_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="found BF16, F32: pass dtype"):
        hf.load(folder)
    assert hf.load(folder, dtype=torch.float32).norm.weight.dtype == torch.float32
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold model.safetensors or model.safetensors"):
        hf.load(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="absent: model-00001-of-00001.safetensors"):
        hf.load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere must hold config.json"):
        hf.load(tmp_path / "nowhere")


def _tokenizer(folder):
    from tokenizers import AddedToken, Tokenizer, models

    folder.mkdir()
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "tokens.bin").write_bytes(b"not a tokenizer")


def test_tokenizer_card_and_end_of_text_come_along(tmp_path):
    from transformers import AutoModelForCausalLM

    _tokenizer(tmp_path / "tok")
    hf.save(Decoder.create(BASE), tmp_path / "m", tmp_path / "tok", "# A model\n")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert peer.generation_config.eos_token_id == peer.config.eos_token_id == 2
    assert (tmp_path / "m" / "README.md").read_text() == "# A model\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty must hold a tokenizer"):
        hf.save(Decoder.create(BASE), tmp_path / "m2", tmp_path / "empty")


def test_a_folder_is_never_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model exists: weights are never overwritten"):
        hf.save(Decoder.create(BASE, seed=8), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    real, calls = hf.save_file, []

    def full_disk(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="cannot be written.*No space left"):
        hf.save(Decoder.create(BASE), tmp_path / "m", shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []
    calls.extend("ab")
    hf.save(Decoder.create(BASE), tmp_path / "m", shard_bytes=50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_llama_that_transformers_would_refuse_is_not_saved(tmp_path):
    odd = replace(BASE, width=66)
    with pytest.raises(ValueError, match=r"width \(66\) must be divisible by heads \(4\)"):
        hf.save(Decoder.create(odd), tmp_path / "m")


def _across_meshes(root):
    import torch.distributed as dist

    rank = dist.get_rank()
    for number, made in enumerate((replace(BASE, vocabulary=255), qwen3.tiny())):
        one = Decoder.create(made, seed=3)
        for mesh in (Mesh.build("tp2"), Mesh.build("dp2")):
            name = f"{number}-{mesh.degree('tp')}"
            model = Decoder.create(made, mesh=mesh, seed=3)
            hf.save(model, root / name, shard_bytes=60_000)
            _equal(hf.load(root / name), one)
            _equal(hf.load(root / name, mesh), model)
    with pytest.raises(FileExistsError):
        hf.save(model, root / name)
    (root / "file").touch()
    dist.barrier()
    wrong = NotADirectoryError if rank == 0 else OSError  # both stop, neither waits for the other
    with pytest.raises(wrong):
        hf.save(model, root / "file" / "m")


def test_two_ranks_save_and_load_as_one(ranks, tmp_path):
    ranks(2, _across_meshes, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0-1", "0-2", "1-1", "1-2", "file"]
    for kind in "01":
        files = sorted(path.name for path in (tmp_path / f"{kind}-1").iterdir())
        for file in files:
            one, two = (tmp_path / f"{kind}-{n}" / file for n in "12")
            assert one.read_bytes() == two.read_bytes(), file
    shutil.rmtree(tmp_path / "0-1")
