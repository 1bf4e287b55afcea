"""Folders that say what is not so: headers, indices, configs and tokenizers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from warploom.models import hf
from warploom.models.architecture import Experts
from warploom.models.decoder import Decoder
from warploom.models.families import llama
from warploom.models.hf.files import read_header

BASE = replace(llama.tiny(), tied=False)
Q, OUT = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qo")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    hf.save(Decoder.create(BASE, seed=3), root / "one", check=False)
    hf.save(Decoder.create(BASE, seed=3), root / "many", shard_bytes=200_000, check=False)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    import shutil

    shutil.copytree(saved / "many", tmp_path / "many")
    shutil.copytree(saved / "one", tmp_path / "one")
    return tmp_path


def _rewrite(path, change):
    """Change the header of a file, as an object or as text."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _entry(**changes):
    return lambda header: header[Q].update(changes)


def _at_anothers_place(header):
    header[Q]["data_offsets"] = header[OUT]["data_offsets"]


def _before_the_data(header):
    begin, end = header[Q]["data_offsets"]
    header[Q]["data_offsets"] = [-8, end - begin - 8]


def _twice(header):
    return json.dumps(header)[:-1] + f', "{Q}": {json.dumps(header[OUT])}}}'


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_at_anothers_place, "must lie one after the other, each as large as its shape says"),
        (_before_the_data, "must lie one after the other"),
        (_entry(dtype="F64"), "each as large as its shape says"),
        (_entry(shape=[-64, -64]), "each as large as its shape says"),
        (_entry(shape=[64.0, 64.0]), "must describe its tensors: TypeError"),
        (_entry(data_offsets=None), "must describe its tensors"),
        (lambda header: header.update({Q: 5}), "must describe its tensors"),
        (_twice, f"'{Q}' stands there twice"),
        (lambda header: "[1, 2]", "must hold a JSON object; it holds a list"),
        (lambda header: "[" * 100_000, "must hold a JSON object: maximum recursion"),
    ],
)
def test_a_header_that_lies_is_refused(copy, change, sentence):
    _rewrite(copy / "one" / "model.safetensors", change)
    with pytest.raises(ValueError, match=sentence):
        hf.load(copy / "one")


def test_an_index_stays_in_its_folder_and_names_each_tensor_once(copy):
    folder, path = copy / "many", copy / "many" / INDEX
    index = json.loads(path.read_text())
    (folder / "other").mkdir()
    first = index["weight_map"][Q]
    (folder / first).rename(folder / "other" / first)
    for elsewhere in (f"other/{first}", f"../many/other/{first}", f"{folder}/other/{first}", 3):
        index["weight_map"][Q] = elsewhere
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="a weight_map to files of its own folder"):
            hf.load(folder)
    (folder / first).symlink_to(folder / "other" / first)  # as in the cache of the Hub
    index["weight_map"][Q] = first
    path.write_text(json.dumps(index))
    hf.load(folder)
    last = sorted(set(index["weight_map"].values()))[-1]
    assert last != first
    both = load_file(folder / last) | {Q: torch.zeros(64, 64)}
    save_file(both, folder / last)
    with pytest.raises(ValueError, match=f"must hold each tensor once; twice: .*{Q}"):
        hf.load(folder)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object; it holds a list"):
        hf.load(folder)


def test_scales_of_packed_weights_must_fit(tmp_path):
    """Else the scales of one group would be read for another's."""
    stem = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.zeros(2, 4, 3, 16, dtype=torch.uint8)
    for scales in (torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(2, 4, 3)):
        file = tmp_path / "model.safetensors"
        save_file({f"{stem}_blocks": blocks, f"{stem}_scales": scales}, file)
        with pytest.raises(ValueError, match="must be .* with its scales beside it"):
            hf.files.entries(tmp_path)
    assert read_header(file)[f"{stem}_blocks"].shape == (2, 4, 3, 16)
    save_file({f"{stem}_blocks": blocks[0], f"{stem}_scales": scales[0].byte()}, file)
    with pytest.raises(ValueError, match="must be a matrix, or one of each expert"):
        hf.files.entries(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 64.0}, "width of an architecture must be int; got 64.0"),
        ({"hidden_size": "64"}, "width of an architecture must be int; got '64'"),
        ({"num_hidden_layers": True}, "layers of an architecture must be int; got True"),
        ({"num_hidden_layers": 10**9}, "tensors: too few for 1000000000 layers"),
        ({"vocab_size": 10**12}, r"must be \(1000000000000, 64\)"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps of an architecture must be float; got '1e-5'"),
        ({"tie_word_embeddings": "no"}, "tied of an architecture must be bool; got 'no'"),
        ({"layer_types": ["full_attention"] * 3}, "there are 2 layers"),
        ({"warploom": {"rope_base": 5.0}}, "warploom.rope_base=5.0 .it is no choice of"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "config.json: "),
        ({"rope_parameters": "default"}, "config.json: "),
    ],
)
def test_a_config_of_other_kinds_is_refused_before_memory_is_taken(copy, changes, sentence):
    path = copy / "one" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=sentence):
        hf.load(copy / "one")


@pytest.mark.parametrize("text", ["[]", '{"model": 5}', '{"added_tokens": [{"content": "x"}]}'])
def test_a_tokenizer_that_is_none_is_refused(copy, text):
    (copy / "one" / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json must "):
        hf.load(copy / "one")


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_at", "pre"), ("positions", "rope"), ("norm", "rmsnorm"), ("qk_norm", "heads")]
    + [("kinds", ("sliding ",)), ("kinds", ["full"]), ("activation", "silu"), ("window", 4.0)],
)
def test_choices_that_do_not_exist_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} of an architecture must be .*; got "):
        replace(BASE, **{name: value})
    with pytest.raises(ValueError, match="score of experts must be"):
        Experts(count=4, top_k=2, hidden=8, score="tanh")
