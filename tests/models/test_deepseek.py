"""DeepSeek-V2 and V3 against transformers: logits, every gradient, ties, further tokens; meshes."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.test_parity import _mesh_equals_one_process
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import MtpModel

from warploom.models import hf
from warploom.models.architecture import Architecture, Experts, Latent
from warploom.models.batch import Batch
from warploom.models.cache import Cache
from warploom.models.cost import parameters
from warploom.models.decoder import Decoder
from warploom.models.families import deepseek_v2, deepseek_v3, of_architecture
from warploom.models.predict import ahead

LENGTHS = (41, 1, 23)  # the window before YaRN is 16
SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 6, "n_routed_experts": 8, "first_k_dense_replace": 1,
    "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"rope_theta": 100.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
V2 = {"num_experts_per_tok": 2, "n_shared_experts": 2, "rope_parameters": YARN}
V2 |= {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V2 |= {"routed_scaling_factor": 4.0}
LITE = V2 | {"topk_method": "greedy", "q_lora_rank": None, "rope_parameters": PLAIN}
LITE |= {"routed_scaling_factor": 1.0}
V3 = {"num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
V3 |= {"rope_parameters": YARN | {"mscale_all_dim": 1.0}, "num_nextn_predict_layers": 0}
CASES = {"v2": ("V2", V2), "v2_lite": ("V2", LITE), "v3": ("V3", V3)}


def _peer(version, **options):
    """Build the model of transformers with weights that matter, clones and an empty expert."""
    torch.manual_seed(0)
    config = getattr(transformers, f"Deepseek{version}Config")(**SIZES | options)
    peer = getattr(transformers, f"Deepseek{version}ForCausalLM")(config)
    draw(peer)
    return peer


@torch.no_grad()
def draw(module):
    for p in module.parameters():
        p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    for name, m in module.named_modules():
        if name.endswith("mlp.gate"):
            m.weight.mul_(5)
            w = m.weight
            w[1], w[5], w[6] = -w[0], -w[4], 0  # of softmax scores, 6 is never among the best two
            w[2:4] = w[:2]
            if hasattr(m, "e_score_correction_bias"):
                bias = m.e_score_correction_bias.normal_(0.0, 0.1)
                bias[2:4], bias[6] = bias[:2], -9.0
        if name.endswith("mlp.experts"):
            for p in m.parameters():
                p[2:4] = p[:2]


def _hub(named):
    """Split stacked experts, as the folders of the Hub have them."""
    found = {}
    for name, x in named.items():
        place, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not place.endswith("experts"):
            found[name] = x
            continue
        parts = {"down_proj": x} if kind == "down_proj" else {}
        if kind == "gate_up_proj":
            parts["gate_proj"], parts["up_proj"] = x.chunk(2, 1)
        for part, stack in parts.items():
            found |= {f"{place}.{e}.{part}.weight": stack[e] for e in range(len(stack))}
    return found


def _theirs(peer, mtp=None):
    """Return parameters and biases of transformers by the Hub's names."""
    named = {
        **dict(peer.named_parameters()),
        **{n: b for n, b in peer.named_buffers() if "e_sc" in n},
    }
    for name, x in [] if mtp is None else [*mtp.named_parameters(), *mtp.named_buffers()]:
        if name.startswith("layers."):
            _, k, rest = name.split(".", 2)
            rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm", 1)
            named[f"model.layers.{SIZES['num_hidden_layers'] + int(k)}.{rest}"] = x
    return named


def _own(model):
    """Return the logical tensors of a model on one rank: weights and biases by the Hub's names."""
    rename = of_architecture(model.architecture).rename
    weights, biases = {}, {}
    parameters = dict(model.named_parameters())
    for path, layout in model.logical_layouts().items():
        for piece in layout.pieces:
            weights[rename(piece.name)] = piece, parameters[path]
    for entry in model.buffer_entries():
        biases[rename(entry.layout.pieces[0].name)] = entry.tensor
    return weights, biases


@torch.no_grad()
def _ours(peer, mtp=None, **changes):
    """Build our model from the config and the weights of theirs; nothing may be left over."""
    config = peer.config.to_dict()
    family = deepseek_v2.FAMILY if "V2" in type(peer).__name__ else deepseek_v3.FAMILY
    made = replace(family.architecture(config), **changes)
    assert of_architecture(made) is family
    model = Decoder(made)
    weights, biases = _own(model)
    theirs = _hub(_theirs(peer, mtp))
    assert theirs.keys() == weights.keys() | biases.keys()
    for name, (piece, p) in weights.items():
        piece.of_local(p).copy_(theirs[name])
    for name, bias in biases.items():
        bias.copy_(theirs[name])
    return model


def _merged(gradients):
    """Add the gradients of cloned experts: which of them serves is the choice of a sort."""
    found = dict(gradients)
    for name, x in gradients.items():
        for clone in (2, 3):
            if f".experts.{clone}." in name:
                found[name.replace(f".experts.{clone}.", f".experts.{clone - 2}.")] += x
                del found[name]
        if name.endswith("mlp.gate.weight"):
            found[name] = torch.cat((x[:2] + x[2:4], x[4:]))
    return found


def _same_gradients(model, peer, mtp=None):
    theirs = {n: p.grad for n, p in _theirs(peer, mtp).items() if p.requires_grad}
    want = {n: x.clone() for n, x in _hub(theirs).items()}
    got = {n: piece.of_local(p.grad).clone() for n, (piece, p) in _own(model)[0].items()}
    for name in got:
        if ".experts.6." in name:
            assert not torch.stack((got[name], want[name])).any(), name
    tied = [n for n in got if ".experts.0.down" in n]
    assert any(not torch.equal(got[n], got[n.replace("s.0.", "s.2.")]) for n in tied)
    got, want = _merged(got), _merged(want)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, atol=1e-4 * largest, rtol=0, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_equal_transformers(name):
    version, options = CASES[name]
    peer = _peer(version, **options)
    model = _ours(peer)
    tokens = torch.randint(67, (1, sum(LENGTHS)))
    upstream = torch.randn(sum(LENGTHS), 67)
    got = model(tokens, torch.tensor(LENGTHS, dtype=torch.int32))[0]
    want = torch.cat([peer(part).logits[0] for part in tokens.split(LENGTHS, 1)])
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    got.backward(upstream)
    want.backward(upstream)
    _same_gradients(model, peer)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_folders_of_transformers_there_and_back(version, tmp_path):
    """The routers' biases too, in float32 beside bfloat16 weights."""
    peer = _peer(version, **V2 if version == "V2" else V3).bfloat16()
    for m in peer.modules():
        if hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias = torch.nn.Buffer(torch.randn(8))
    peer.save_pretrained(tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    assert all(e.tensor.any() for e in model.buffer_entries())
    hf.save(model, tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    for (name, a), b in zip(peer.state_dict().items(), again.state_dict().values(), strict=True):
        assert (a.dtype, torch.equal(a, b)) == (b.dtype, True), name


def test_blocks_that_predict_are_saved_and_transformers_passes_them_by(tmp_path):
    model = Decoder.create(deepseek_v3.tiny(), seed=1)
    hf.save(model, tmp_path / "ours")
    again = hf.load(tmp_path / "ours")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(256, (1, 90))  # the window before YaRN is 64
    torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-5, rtol=0)


def test_a_folder_without_the_blocks_that_it_promises_says_what_to_do(tmp_path):
    hf.save(Decoder.create(replace(deepseek_v3.tiny(), predict=2)), tmp_path / "ours")
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    path, file = tmp_path / "theirs/config.json", tmp_path / "theirs/model.safetensors"
    config, stored = json.loads(path.read_text()), load_file(file)
    remedy = "; set num_nextn_predict_layers to 0 in its config.json to load it without the blocks"
    with pytest.raises(ValueError, match=r"missing \(\d+\): .*layers\.2\.") as caught:
        hf.load(tmp_path / "theirs")
    assert remedy in str(caught.value)
    path.write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    hf.load(tmp_path / "theirs")
    path.write_text(json.dumps(config))
    whole = load_file(tmp_path / "ours/model.safetensors")
    one = {name: x for name, x in whole.items() if name.startswith("model.layers.3.")}
    norm = {name: x for name, x in stored.items() if name != "model.norm.weight"}
    for tensors in (stored | one, norm):  # one of the two blocks, and more than they is missing
        save_file(tensors, file)
        with pytest.raises(ValueError, match="missing") as caught:
            hf.load(tmp_path / "theirs")
        assert "set num_nextn" not in str(caught.value)


def _further(peer, mtp, tokens, targets):
    """Return the loss of each depth by modules of transformers, for one document."""
    hidden, sums = peer.model(tokens).last_hidden_state, []
    for k in range(len(mtp.layers)):
        positions = torch.arange(k + 1, tokens.shape[1])[None]
        hidden = mtp.forward_layer(k, hidden[:, :-1], positions, None, input_ids=tokens[:, k + 1 :])
        logits = peer.lm_head(hidden)[0]
        sums.append(cross_entropy(logits, targets[0, k + 1 :], reduction="sum"))
    return sums


def test_further_tokens_equal_transformers():
    """Two depths, each through the norm, to the head and the next depth; within documents."""
    peer = _peer("V3", **V3 | {"num_nextn_predict_layers": 2})
    mtp = MtpModel(peer, 2)
    draw(mtp.layers)
    mtp.config._attn_implementation = "eager"
    model = _ours(peer, mtp, predict_weight=0.6)
    tokens, targets = torch.randint(67, (2, 1, sum(LENGTHS)))
    targets[0, 10:14] = -100
    batch = Batch(tokens, targets, torch.tensor(LENGTHS, dtype=torch.int32))
    terms = {term.name: term for term in model.loss(batch)}
    assert terms["multi_token_prediction"].weight == 0.3
    assert model.counts(batch)["multi_token_prediction_2"] == sum(LENGTHS) - 2 * 2 - 1 - 4
    parts = zip(tokens.split(LENGTHS, 1), targets.split(LENGTHS, 1), strict=True)
    want = [_further(peer, mtp, *part) for part in parts if part[0].shape[1] > 2]
    for name, depth in (("multi_token_prediction", 0), ("multi_token_prediction_2", 1)):
        expected = sum(sums[depth] for sums in want)
        torch.testing.assert_close(terms[name].sum, expected, rtol=1e-5, atol=0)
        assert terms[name].count == model.counts(batch)[name]
    for block, tokens_ahead in (("3", 40 + 22), ("4", 39 + 21)):  # beyond the end none is served
        assert model.blocks[block].feed_forward.router.load.sum() == 3 * tokens_ahead
    got = terms["multi_token_prediction"].sum + 3 * terms["multi_token_prediction_2"].sum
    got.backward()
    sum(a + 3 * b for a, b in want).backward()
    _same_gradients(model, peer, mtp)


def test_what_lies_ahead_stays_in_its_document():
    x, lengths = torch.arange(8).view(2, 4), torch.tensor([3, 1, 4])
    assert ahead(x, lengths, 1, -1).tolist() == [1, 2, -1, -1, 5, 6, 7, -1]
    assert ahead(x, lengths, 2, -1).tolist() == [2, -1, -1, -1, 6, 7, -1, -1]
    assert ahead(x, None, 3, -1).tolist() == [3, -1, -1, -1, 7, -1, -1, -1]
    assert ahead(x, None, 9, -1).tolist() == [-1] * 8


TINY = Architecture(
    layers=2, width=16, heads=4, kv_heads=4, head_dim=10, hidden=24, vocabulary=37,
    max_positions=16, norm_eps=1e-6, predict=2,
    latent=Latent(keys=6, queries=7, rotated=4, values=5),
    experts=Experts(
        count=4, top_k=2, hidden=12, shared=8, dense_layers=1, score="sigmoid", scale=2.5,
        groups=2, top_groups=1, balance=0.5, router_z=0.1, bias_rate=0.1,
    ),
)  # fmt: skip
MESHES = [
    ("tp2,ep2", {"recompute": "selective"}),
    pytest.param("pp2", {"schedule": "zb_h1", "recompute": "norm,moe"}, marks=pytest.mark.slow),
    pytest.param("cp2", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("text", "options"), MESHES, ids=["tp2,ep2", "pp2", "cp2"])
def test_meshes_equal_one_process(pool, text, options):
    pool(2, _mesh_equals_one_process, text, TINY, options)


@pytest.mark.parametrize("family", [deepseek_v2, deepseek_v3])
def test_pages_give_the_logits_of_the_whole(family):
    model = Decoder.create(family.tiny(), seed=1, dtype=torch.float64)
    tokens = torch.randint(256, (1, 100))
    with torch.no_grad():
        cache = Cache(model, pages=7, page_size=16)
        assert list(cache.layers) == [0, 1]  # none for what predicts further tokens
        table, start, got = torch.randperm(7, dtype=torch.int32)[None], 0, []
        for part in tokens[0].split((50, 1, 30, 19)):
            where = cache.step(torch.tensor([start]), torch.tensor([len(part)]), table)
            got.append(model.logits(model.advance(part, where)))
            start += len(part)
        torch.testing.assert_close(torch.cat(got), model(tokens)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", [deepseek_v2, deepseek_v3])
def test_configs_there_and_back(family):
    """Through transformers too, which keeps every field and adds its own."""
    for made in (family.tiny(), getattr(family, family.__name__.rpartition(".")[2])()):
        config = family.FAMILY.config(made)
        assert family.FAMILY.architecture(config) == made
        theirs = transformers.AutoConfig.for_model(**config)
        assert family.FAMILY.architecture(theirs.to_dict()) == made


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (deepseek_v2, {"topk_method": "noaux_tc", "norm_topk_prob": True, "mlp_bias": True}),
        (deepseek_v2, {"num_key_value_heads": 2, "seq_aux": False, "scoring_func": "sigmoid"}),
        (deepseek_v3, {"rope_interleave": False, "topk_method": "greedy", "moe_layer_freq": 2}),
        (deepseek_v3, {"attention_bias": True, "index_topk": 2048, "hidden_act": "gelu"}),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(family, changes):
    config = family.FAMILY.config(family.tiny())
    with pytest.raises(ValueError, match="cannot be honoured") as caught:
        family.FAMILY.architecture(config | changes)
    for name, value in changes.items():
        assert f"{name}={value!r}" in str(caught.value)


def test_a_bias_that_does_not_move_is_kept():
    made = deepseek_v3.tiny()
    made = replace(made, experts=replace(made.experts, bias_rate=0.0))
    assert deepseek_v3.FAMILY.architecture(deepseek_v3.FAMILY.config(made)) == made
    assert len(Decoder(made, device="meta").buffer_entries()) == 2


def test_published_sizes():
    """The counts of the Hub; those of V3 without the block that predicts a further token."""
    sizes = {
        deepseek_v2.deepseek_v2: 235_741_434_880,
        deepseek_v2.deepseek_v2_lite: 15_706_484_224,
        deepseek_v3.deepseek_v3: 671_026_404_352,
    }
    for made, count in sizes.items():
        assert sum(parameters(replace(made(), predict=0)).values()) == count
    further = sum(parameters(deepseek_v3.deepseek_v3()).values()) - 671_026_404_352
    assert further == 11_610_067_968
