"""Hugging Face folders in and out: bit for bit, in any number of files, on any mesh."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama, mixtral, qwen3
from warploom.models.hf import files, saving
from warploom.models.stages import Stages
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Schedule
from warploom.recipes.plan.tracker import track

MIXTRAL = replace(mixtral.tiny(), layers=4, rope_base=1e4)
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
@pytest.mark.parametrize(
    "made", [BASE, llama.tiny(), qwen3.tiny(), MIXTRAL], ids=["llama", "tied", "qwen3", "mixtral"]
)
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


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("mesh", "tp2", r"mesh must be a Mesh, such as Mesh\.build\('tp2'\); got 'tp2'"),
        ("dtype", "bf16", r"dtype must be a dtype, such as torch\.bfloat16; got 'bf16'"),
        ("fp8", "block", r"fp8 must be a Fp8Recipe, such as Fp8Recipe\(.*\); got 'block'"),
    ],
)
def test_names_instead_of_what_they_name_are_refused(folder, monkeypatch, option, given, said):
    places, allocate = [], Decoder.to_empty
    monkeypatch.setattr(
        Decoder,
        "to_empty",
        lambda m, *, device: (places.append(device), allocate(m, device=device)),
    )
    with pytest.raises(TypeError, match=f"^{said}$"):
        hf.load(folder, **{option: given})
    with pytest.raises(TypeError, match=f"^{said}$"):
        Decoder.create(BASE, **{option: given})
    assert set(places) == {"meta"}  # no memory was taken


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


def _refusal(folder, **changes):
    _config(folder, **changes)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        hf.load(folder)
    _config(folder, **dict.fromkeys(changes, ...))
    return str(caught.value)


def test_fields_that_cannot_be_honoured_are_named_with_what_they_would_change(folder):
    said = _refusal(
        folder,
        rope_parameters={"rope_type": "longrope", "factor": 8.0},
        attention_dropout=0.1,
        hidden_act="gelu",
        layer_types=["full_attention", "sliding_attention"],
        strange={"x": 1},
        nothing=None,
    )
    for words in (
        "values that cannot be honoured: ",
        "rope_parameters.rope_type='longrope' (angles would be stretched in another way)",
        "attention_dropout=0.1 (attention would drop scores while training)",
        "hidden_act='gelu' (the feed-forward would use another activation)",
        "layer_types=['sliding_attention'] (these blocks would mix tokens in another way)",
        "strange={'x': 1} (a field that is not known here: it may change the model)",
    ):
        assert words in said
    assert "nothing" not in said
    linear = {"type": "linear", "factor": 2.0, "short_factor": [1.0]}
    assert "rope_scaling.short_factor=[1.0] (no part" in _refusal(folder, rope_scaling=linear)
    assert "must have 'rope_scaling.factor'" in _refusal(folder, rope_scaling={"type": "linear"})
    assert "partial_rotary_factor=0.5" in _refusal(folder, partial_rotary_factor=0.5)
    _config(folder, model_type="strange")
    with pytest.raises(
        ValueError, match=r"config.json: model_type must be one of .* got 'strange'"
    ):
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
    with pytest.raises(FileNotFoundError, match="nowhere must be a folder on this machine"):
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


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(folder, wrong, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = wrong
    save_file(tensors, folder / "model.safetensors")
    said = r"model\.layers\.1\.mlp\.up_proj\.weight in .* must hold finite weights; 1 of"
    with pytest.raises(ValueError, match=said):
        hf.load(folder, dtype=dtype)


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused(folder, tmp_path):
    _tokenizer(tmp_path / "tok")
    text = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    for where, words in (("added", "256"), ("vocab", "300")):
        if where == "added":
            text["added_tokens"][0]["id"] = 256
        else:
            text["model"]["vocab"]["b"] = 300
        (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(text))
        said = rf"ids up to {words}, which must be below the vocabulary of the model \(256\)"
        with pytest.raises(ValueError, match=said):
            hf.save(Decoder.create(BASE), tmp_path / "m", tmp_path / "tok")
        shutil.copy(tmp_path / "tok" / "tokenizer.json", folder)
        with pytest.raises(ValueError, match=said):
            hf.load(folder)


def test_an_export_that_a_disk_or_a_config_changes_is_noticed(tmp_path, monkeypatch):
    real, calls = files.Writer.write, []

    def damage(writer, name, blocks):
        calls.append(name)
        real(writer, name, [block * 1.001 for block in blocks] if len(calls) == 7 else blocks)

    with monkeypatch.context() as patch:
        patch.setattr(files.Writer, "write", damage)
        with pytest.raises(OSError, match="does not hold .* as it was written"):
            hf.save(Decoder.create(BASE), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []

    write = saving.write_json

    def other(path, fields):
        write(path, {**fields, "rope_theta": 7.0, "rope_parameters": None})

    monkeypatch.setattr(saving, "write_json", other)
    with pytest.raises(OSError, match="describes another model: outputs of stage 0 differ by"):
        hf.save(Decoder.create(BASE), tmp_path / "m")
    hf.save(Decoder.create(BASE), tmp_path / "m", check=False)


def test_a_file_that_ends_too_soon_is_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file|must have .* bytes"):
            hf.load(folder)


def test_a_folder_is_never_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="model exists: weights are never overwritten"):
        hf.save(Decoder.create(BASE, seed=8), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_link_to_nowhere_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("warploom.models.hf.saving.Writer", None)  # refused before it is asked for
    with pytest.raises(FileExistsError, match="model exists: weights are never overwritten"):
        hf.save(Decoder.create(BASE), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    real, calls = files.Writer.write, []

    def full_disk(writer, name, blocks):
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(writer, name, blocks)

    monkeypatch.setattr(files.Writer, "write", full_disk)
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


def test_transformers_loads_our_mixtral_and_we_load_its(tmp_path):
    import transformers as t

    model = Decoder.create(MIXTRAL, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8.0 if "router" in name else 2.0)
    hf.save(model, tmp_path / "ours", shard_bytes=100_000)
    peer, told = t.MixtralForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(MIXTRAL.vocabulary, (2, 12))
    torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-5, rtol=0)
    peer.save_pretrained(tmp_path / "theirs")
    again = hf.load(tmp_path / "theirs")
    assert again.architecture == MIXTRAL
    _equal(again, model)


MESHES = {
    2: ["tp2", "pp2", "pp2 zbv", "cp2", "dp2,ep2", "rep2", "tp2,etp2"],
    4: ["tp4", "tp2,cp2,ep2,etp2", "pp2,dp2,ep2", "pp2,tp2 interleaved", "pp4", "dp4,ep4"],
    8: ["tp2,pp2,cp2,ep2,etp2 zbv", "tp4,dp2,ep4", "pp4,dp2,ep2"],
}
FORMS = {
    "dense": replace(BASE, layers=4),
    "tied": replace(llama.tiny(), layers=4, vocabulary=255),  # 256 rows on two ranks
    "mixtral": replace(MIXTRAL, vocabulary=255),
}


def _over(text, made, seed):
    """Build a decoder on the mesh and the stages that `text` names."""
    text, _, name = text.partition(" ")
    mesh = Mesh.build(text)
    placement = range(mesh.degree("pp"))
    if name:
        virtual = 2 if name == "interleaved" else 1
        placement = Schedule.named(name, mesh.degree("pp"), 4, virtual=virtual).placement
    stages = Stages.deal(made.layers, placement)
    return Decoder.create(made, mesh=mesh, stages=stages, seed=seed)


class _Counts:
    """Spies on what a load takes from files: bytes read, and the most at a time."""

    def __init__(self, monkeypatch):
        self.read, self.most, self.lock = 0, 0, threading.Lock()
        real = files.Reader._fill

        def fill(reader, space, entry, hull):
            with self.lock:
                self.read += space.nbytes
                self.most = max(self.most, space.nbytes)
            return real(reader, space, entry, hull)

        monkeypatch.setattr(files.Reader, "_fill", fill)


def _from_any_to_any(root, made, texts):
    import torch.distributed as dist

    monkeypatch = pytest.MonkeyPatch()
    shard_bytes, rank = 100_000, dist.get_rank()
    largest = made.vocabulary * made.width * 4
    for at, text in enumerate(texts):
        model = _over(text, made, seed=3)
        own = sum(p.nbytes for p in model.parameters())
        with track(model=model) as seen:
            hf.save(model, root / str(at), shard_bytes=shard_bytes)
        held = seen.peak.total - own
        assert held <= 3 * largest, (text, held)  # not a file of them
        if rank == 0:
            for file in (root / "alone").iterdir():
                assert file.read_bytes() == (root / str(at) / file.name).read_bytes(), (text, file)
        empty = _over(text, made, seed=4)
        with monkeypatch.context() as patch:
            counts = _Counts(patch)
            patch.setattr(files, "_BLOCK", 20_000)
            hf.load_into(empty, root / "alone")
        _equal(empty, model)
        pieces = [p for layout in empty.logical_layouts().values() for p in layout.pieces]
        sizes = [torch.Size(p.sizes).numel() * 4 for p in pieces]
        assert counts.read == sum(sizes), text  # no byte that another rank holds
        assert counts.most <= 20_000 + made.width * 4 * 4, text
    dist.barrier()


def _export_and_import(pool, tmp_path, world, form):
    made = FORMS[form]
    hf.save(Decoder.create(made, seed=3), tmp_path / "alone", shard_bytes=100_000)
    assert len(list((tmp_path / "alone").glob("model-*.safetensors"))) > 6
    texts = [t for t in MESHES[world] if form == "mixtral" or ",e" not in t]
    pool(world, _from_any_to_any, tmp_path, made, texts)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_export_and_import_tensor_by_tensor(pool, tmp_path, form):
    _export_and_import(pool, tmp_path, 2, form)


@pytest.mark.slow
@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_more_ranks_export_and_import_tensor_by_tensor(pool, tmp_path, form, world):
    _export_and_import(pool, tmp_path, world, form)
