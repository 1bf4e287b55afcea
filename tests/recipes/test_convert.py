"""Megatron-Core's checkpoints are read without a pickle."""

import io
import pickletools
import warnings
import zipfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Layout, Piece, rows, whole
from warploom.recipes.convert import gpt_names, read_megatron_checkpoint
from warploom.recipes.convert.pickled import read

LAYERS, WIDTH, HEADS, KV, HEAD, HIDDEN, VOCABULARY = 2, 8, 4, 2, 4, 12, 10


def _model():
    """Hugging Face tensors of a small Llama, and Megatron's tensors of the same."""
    g = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=g)

    hf = {
        "model.embed_tokens.weight": made(VOCABULARY, WIDTH),
        "model.norm.weight": made(WIDTH),
        "lm_head.weight": made(VOCABULARY, WIDTH),
    }
    stacked = {}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        q, k, v = (made(n * HEAD, WIDTH) for n in (HEADS, KV, KV))
        gate, up, down = made(HIDDEN, WIDTH), made(HIDDEN, WIDTH), made(WIDTH, HIDDEN)
        out, first, second = made(WIDTH, HEADS * HEAD), made(WIDTH), made(WIDTH)
        hf |= {f"{at}self_attn.{n}_proj.weight": t for n, t in (("q", q), ("k", k), ("v", v))}
        hf |= {f"{at}mlp.{n}_proj.weight": t for n, t in (("gate", gate), ("up", up))}
        hf |= {f"{at}self_attn.o_proj.weight": out, f"{at}mlp.down_proj.weight": down}
        hf |= {f"{at}input_layernorm.weight": first, f"{at}post_attention_layernorm.weight": second}
        groups = [
            torch.cat((q[n * 2 * HEAD :][: 2 * HEAD], k[n * HEAD :][:HEAD], v[n * HEAD :][:HEAD]))
            for n in range(KV)
        ]
        for name, tensor in {
            "self_attention.linear_qkv.weight": torch.cat(groups),
            "self_attention.linear_qkv.layer_norm_weight": first,
            "self_attention.linear_proj.weight": out,
            "mlp.linear_fc1.weight": torch.cat((gate, up)),
            "mlp.linear_fc1.layer_norm_weight": second,
            "mlp.linear_fc2.weight": down,
        }.items():
            stacked.setdefault(f"decoder.layers.{name}", []).append(tensor)
    padded = torch.zeros(12, WIDTH)
    padded[:VOCABULARY] = hf["model.embed_tokens.weight"]
    theirs = {name: torch.stack(found) for name, found in stacked.items()}
    theirs |= {
        "embedding.word_embeddings.weight": padded,
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"].bfloat16(),
    }
    return hf, theirs


def _write(folder):
    """Save Megatron's tensors from two ranks, each with a half of one dimension or another."""
    mesh = init_device_mesh("cpu", (2,))
    state = {}
    for name, tensor in _model()[1].items():
        dim = tensor.dim() - 1 if "proj" in name or "fc2" in name else max(tensor.dim() - 2, 0)
        part = tensor.chunk(2, dim)[dist.get_rank()]
        state[name] = DTensor.from_local(part.contiguous(), mesh, [Shard(dim)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**state, "step": {"iteration": 3}}, checkpoint_id=folder)


def _names():
    return gpt_names(heads=HEADS, kv_heads=KV, head_dim=HEAD, hidden=HIDDEN)


def _read_cut(folder):
    hf, _ = _model()
    mesh = Mesh.build("tp4")
    rank = mesh.rank
    layouts, tensors = {}, {}
    for name, tensor in hf.items():
        part = rank % 2  # kv heads are fewer than ranks
        if tensor.dim() == 1:
            layouts[name] = whole(name, tensor.shape)
        elif name.endswith(("down_proj.weight", "o_proj.weight")):  # columns, every fourth one
            slices = ((0, tensor.shape[0], 1), (rank, tensor.shape[1], 4))
            shape = (tensor.shape[0], tensor.shape[1] // 4)
            layouts[name] = Layout(shape, (Piece(name, tuple(tensor.shape), slices, (0, 0)),))
        elif name.endswith("v_proj.weight"):  # transposed, a half
            slices = ((part * 4, part * 4 + 4, 1), (0, WIDTH, 1))
            piece = Piece(name, tuple(tensor.shape), slices, (0, 0), transposed=True)
            layouts[name] = Layout((WIDTH, 4), (piece,))
        else:
            each = -(-tensor.shape[0] // 4)
            first, last = rank * each, min((rank + 1) * each, len(tensor))
            layouts[name] = Layout((each, WIDTH), (rows(name, tensor.shape, first, last),))
        tensors[name] = torch.full(layouts[name].shape, torch.nan)
    read_megatron_checkpoint(folder, tensors, layouts, names=_names())
    for name, layout in layouts.items():
        (piece,) = layout.pieces
        want = hf[name].bfloat16().float() if name == "lm_head.weight" else hf[name]
        assert torch.equal(piece.of_local(tensors[name]), piece.of_logical(want)), name


def test_a_checkpoint_of_two_ranks_is_read_by_four_to_the_bit(ranks, tmp_path):
    ranks(2, _write, str(tmp_path / "saved"))
    ranks(4, _read_cut, str(tmp_path / "saved"))


def _one(tensors, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=str(folder), no_dist=True)


def test_what_is_missing_is_named(tmp_path):
    _, theirs = _model()
    name = "model.layers.1.mlp.up_proj.weight"
    layouts = {"up": whole(name, (HIDDEN, WIDTH))}
    tensors = {"up": torch.zeros(HIDDEN, WIDTH)}
    with pytest.raises(ValueError, match=r"must have a file \.metadata; .* has none"):
        read_megatron_checkpoint(tmp_path, tensors, layouts, names=_names())
    _one({"output_layer.weight": theirs["output_layer.weight"]}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"must lie in one of mlp\.linear_fc1\.weight; the check"):
        read_megatron_checkpoint(tmp_path / "a", tensors, layouts, names=_names())
    _one({"decoder.layers.1.mlp.linear_fc1.weight": torch.ones(HIDDEN + 1, WIDTH)}, tmp_path / "b")
    with pytest.raises(ValueError, match=r"88 elements of decoder.layers.1.mlp.linear_fc1.weight"):
        read_megatron_checkpoint(tmp_path / "b", tensors, layouts, names=_names())
    with pytest.raises(ValueError, match="no tensor for model.layers.N.x.weight"):
        _names()("model.layers.0.x.weight")


class _Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path):
    buffer = io.BytesIO()
    torch.save(_Evil(), buffer)
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        data = archive.read(name)
    assert any(op.name == "REDUCE" for op, _, _ in pickletools.genops(data))
    with pytest.raises(ValueError, match=r"x may hold plain .* the name .*eval: it is damaged"):
        read(data, {"torch.Size"}, "x")
    with pytest.raises(ValueError, match="it holds no pickle"):
        read(b"\x80\x02}", set(), "x")
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata may hold plain data and known names alone"):
        read_megatron_checkpoint(tmp_path, {}, {}, names=_names())
