"""The dense families against transformers: logits, every gradient, both ways through the Hub."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_parity import _mesh_equals_one_process as mesh_equals_one_process

from warploom.kernels.rope import Linear
from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import (
    gemma2,
    gemma3,
    gpt2,
    llama,
    of_architecture,
    of_model_type,
    olmo2,
    qwen2,
    qwen3,
)

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 89,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 89, "n_positions": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 16, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": PLAIN,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 40, "sliding_window": 5}
OPEN = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 16}
MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "gpt2": ("GPT2", {"n_inner": 40}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma2, open": ("Gemma2", OPEN),
    "gemma2, full": ("Gemma2", {**GEMMA, "layer_types": ["full_attention"] * 3}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": BY_KIND}),
    "bamba": ("Bamba", {**MAMBA, "mamba_n_groups": 1}),
    "bamba, groups": ("Bamba", {**MAMBA, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
}
LENGTHS = [[13, 50], [1, 40, 20, 2]]  # of documents, for each row
MODULES = (llama, qwen2, qwen3, gpt2, gemma2, gemma3, olmo2)
NAMED = [
    size
    for module in MODULES
    for name, size in vars(module).items()
    if re.match(r"(llama|smollm|qwen|gpt|gemma|olmo)\d?.*_", name) and callable(size)
]


def _peer(name, changes):
    """Build a tiny model of transformers, none of whose parameters is zero or one."""
    import transformers as t

    dropout = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    sizes = GPT2 | dict.fromkeys(dropout, 0.0) if name == "GPT2" else SIZES
    text = "Text" if name == "Gemma3" else ""
    config = getattr(t, f"{name}{text}Config")(**sizes | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(11)  # as many float32 digits are lost each time
    made = getattr(t, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config)
    with torch.no_grad():
        for p in made.parameters():
            near = 0.3 if p.dim() == 1 else 0.15
            p.add_(near * torch.randn(p.shape))
    return made.eval()


def _pairs(model, peer, lengths, tokens):
    """Return logits of ours, packed, and of theirs, one document after the other."""
    documents = torch.tensor(sum(lengths, []), dtype=torch.int32)
    ours = model(tokens, documents).flatten(0, 1)
    parts = tokens.flatten().split(documents.tolist())
    return ours, torch.cat([peer(part[None]).logits[0] for part in parts])


def _gradients_equal(model, peer, folder):
    """Compare all gradients by their names at the Hub."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    hf.save(model, folder)
    ours = load_file(folder / "model.safetensors")
    theirs = {n: p.grad for n, p in peer.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert want.abs().max() > 0, name
        close = 1e-4 * float(want.abs().max())
        torch.testing.assert_close(
            ours[name], want, atol=close, rtol=0, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_transformers(case, tmp_path):
    peer = _peer(*CASES[case])
    peer.save_pretrained(tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    tokens = torch.randint(SIZES["vocab_size"], (2, 63))
    ours, theirs = _pairs(model, peer, LENGTHS, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    hf.save(model, tmp_path / "ours")
    _returns(tmp_path, peer, model)
    upstream = torch.randn(ours.shape)
    for logits in (ours, theirs):
        (logits * upstream).sum().backward()
    _gradients_equal(model, peer, tmp_path / "gradients")


def _returns(folder, peer, model):
    """Bit for bit, and under the same names, what transformers had written."""
    ours, theirs = (load_file(folder / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = type(peer).from_pretrained(folder / "ours", attn_implementation="eager")
    assert hf.architecture(folder / "ours") == model.architecture
    tokens = torch.randint(SIZES["vocab_size"], (1, 60))
    assert torch.equal(again(tokens).logits, peer(tokens).logits)


def test_dynamic_scaling_goes_by_the_longest_document(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    peer = _peer("Llama", {"rope_parameters": dynamic, "max_position_embeddings": 16})
    peer.save_pretrained(tmp_path / "theirs")
    model = hf.load(tmp_path / "theirs")
    assert model.architecture.max_positions == 64
    for length in (7, 16, 17, 60):
        tokens = torch.randint(SIZES["vocab_size"], (2, length))
        ours, theirs = model(tokens), peer(tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    hf.save(model, tmp_path / "ours")
    assert hf.architecture(tmp_path / "ours") == model.architecture
    again = type(peer).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(again(tokens).logits, theirs)


def _count(made):
    layouts = Decoder(made, device="meta").logical_layouts().values()
    pieces = {piece.name: piece.shape for made in layouts for piece in made.pieces}
    return sum(map(math.prod, pieces.values()))


@pytest.mark.parametrize("size", NAMED, ids=lambda size: size.__name__)
def test_a_named_size_has_as_many_parameters_as_it_says(size):
    made = size()
    one, two = (_count(replace(made, layers=n)) for n in (1, 2))
    (said,) = re.findall(r": ([\d,]+) parameters", size.__doc__)
    assert f"{one + (made.layers - 1) * (two - one):,}" == said
    assert ("tied" in size.__doc__) == made.tied
    module = size.__module__.rpartition(".")[2]
    assert of_architecture(made).model_type.startswith(module)


LLAMA = {"num_key_value_heads": 8, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
PUBLISHED = {
    "llama3_2_1b": LLAMA
    | {
        "model_type": "llama",
        "bos_token_id": 128000,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "qwen2_5_0_5b": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt2_small": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "gemma2_27b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    "gemma3_1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "olmo2_32b": {
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 4096,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_that_of_the_named_size(name):
    (size,) = (size for size in NAMED if size.__name__ == name)
    family, config = of_model_type(PUBLISHED[name]["model_type"]), PUBLISHED[name]
    assert family.architecture(config) == size()
    assert family.architecture(family.config(size())) == size()
    for field, value in (("hidden_act", "relu"), ("n_unheard_of", 1), ("layer_types", ["linear"])):
        if field not in family.ignored and (field != "hidden_act" or field in config):
            with pytest.raises(ValueError, match=f"{field}="):
                family.architecture({**config, field: value})


def test_a_window_that_is_null_is_none():
    """transformers has no window then, and not the default one."""
    windows = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}
    with pytest.raises(ValueError, match="sliding_window=None .blocks that have a window"):
        qwen2.FAMILY.architecture(SIZES | windows)
    assert qwen2.FAMILY.architecture(SIZES | windows | {"sliding_window": 6}).window == 6
    assert qwen2.FAMILY.architecture(SIZES | windows | {"use_sliding_window": False}).kinds == ()


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_a_list_of_windows_that_are_not_used_is_refused(name, tmp_path):
    """transformers reads such a config and cannot run it; with windows its logits are ours."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    said = {"layer_types": kinds, "sliding_window": 6, "max_window_layers": 3}
    tokens = torch.randint(SIZES["vocab_size"], (1, 40))
    peer = _peer(name, said | {"use_sliding_window": True})
    peer.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    assert ours.architecture.kinds == ("sliding", "full")
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, atol=1e-5, rtol=0)
    for unused in ({"use_sliding_window": False}, {}):
        with pytest.raises((TypeError, ValueError)):
            _peer(name, said | unused)(tokens)
        with pytest.raises(ValueError, match="use_sliding_window=False .layer_types names blocks"):
            of_model_type(name.lower()).architecture(SIZES | said | unused)


def test_soft_caps_may_be_null_or_absent():
    read = gemma2.FAMILY.architecture
    bare = {k: v for k, v in PUBLISHED["gemma2_27b"].items() if not k.endswith("softcapping")}
    assert read(bare) == gemma2.gemma2_27b()
    null = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    made = read(bare | null)
    assert (made.softcap, made.logit_softcap) == (0, 0)
    assert gemma2.FAMILY.config(made).items() >= null.items()
    scaled = PUBLISHED["gemma3_1b"] | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    made = gemma3.FAMILY.architecture(scaled)
    assert (made.rope_scaling, made.sliding_rope_base) == (Linear(8.0), 10_000.0)
    again = gemma3.FAMILY.config(made)
    assert again["rope_scaling"]["factor"] == 8.0  # transformers 4 reads this
    del again["rope_parameters"]
    assert gemma3.FAMILY.architecture(again) == made


def test_gpt2_as_it_was_first_published(tmp_path):
    model = Decoder.create(gpt2.tiny(), seed=3)
    hf.save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    old = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    assert old["h.1.attn.c_attn.weight"].shape == (64, 192)
    extra = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old | extra, file)
    again = hf.load(tmp_path / "m")
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    config = PUBLISHED["gpt2_small"]
    changes = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
    with pytest.raises(ValueError, match="values that cannot be honoured") as caught:
        gpt2.FAMILY.architecture(config | changes | {"scale_attn_weights": False})
    for name in (*changes, "scale_attn_weights"):
        assert f"{name}=" in str(caught.value)


def test_the_embedding_scale_is_rounded_as_the_weights(tmp_path):
    peer = _peer("Gemma3", GEMMA).bfloat16()
    peer.save_pretrained(tmp_path / "theirs")
    model, seen = hf.load(tmp_path / "theirs"), []
    model.blocks["0"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.arange(60)[None]
    model(tokens)
    assert torch.equal(seen[0], peer.model.embed_tokens(tokens)[0])
    assert not torch.equal(seen[0], peer.model.embed_tokens.weight[tokens[0]] * 32**0.5)


MESH = {"width": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 24, "vocabulary": 37}
MESH |= {"max_positions": 16}
SMALL = {module.FAMILY.model_type: replace(module.tiny(), **MESH) for module in MODULES}
WINDOW = {"window": 3, "layers": 2, "kinds": ("sliding", "full")}
SMALL |= {name: replace(SMALL[name], **WINDOW) for name in ("gemma2", "gemma3_text")}


def _mesh_equals_one_process(text, names, options):
    for name in names:
        mesh_equals_one_process(text, SMALL[name], options)


PROOFS = [
    ("tp2", ("gpt2", "gemma3_text", "olmo2"), {}),
    pytest.param("tp2", ("qwen2", "gemma2"), {"recompute": "selective"}, marks=pytest.mark.slow),
    pytest.param("tp4", tuple(SMALL), {"recompute": "full"}, marks=pytest.mark.slow),
    pytest.param("pp2", ("gpt2", "gemma2"), {"schedule": "1f1b"}, marks=pytest.mark.slow),
    pytest.param("tp2,pp2", ("olmo2",), {"schedule": "1f1b"}, marks=pytest.mark.slow),
    pytest.param("cp2", tuple(SMALL), {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("text", "names", "options"), PROOFS)
def test_a_mesh_trains_a_family_as_one_process(pool, text, names, options):
    pool(
        math.prod(map(int, re.findall(r"\d+", text))),
        _mesh_equals_one_process,
        text,
        names,
        options,
    )


def test_a_refusal_names_the_nearest_family_of_the_same_parts():
    with pytest.raises(ValueError, match=r"is gemma2, .* cannot say embedding_scale=1\.0$"):
        of_architecture(replace(gemma2.tiny(), embedding_scale=1.0))
