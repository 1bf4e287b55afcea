"""Megatron-Core: a GPT of our parts equals its own."""

import contextlib
import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist

megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not importable: pip install 'warploom[megatron]'",
)


def _without_cuda(patch):
    """Let Megatron's own parts run on a CPU: they ask for the device and fork its random states."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    patch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())


def _layer_equals_megatrons(sequence_parallel):
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(False)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from warploom.parallel.interop.megatron import language_model_loss, warploom_layer_spec

    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
        ffn_hidden_size=48, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=size, use_cpu_initialization=True,
        sequence_parallel=sequence_parallel, bias_activation_fusion=False,
    )  # fmt: skip
    keep = {"vocab_size": 64, "max_sequence_length": 8, "position_embedding_type": "rope"}
    plain = get_gpt_layer_local_spec(normalization="RMSNorm")
    patch = pytest.MonkeyPatch()
    _without_cuda(patch)
    # its torch norm refuses sequence parallelism: ours stands in for it, in both models
    if sequence_parallel:
        from warploom.parallel.interop.megatron import Norm

        plain.submodules.input_layernorm = plain.submodules.pre_mlp_layernorm = Norm
        patch.setattr("megatron.core.transformer.transformer_block.LayerNormImpl", Norm)
    theirs = GPTModel(config, plain, **keep)
    ours = GPTModel(config, warploom_layer_spec(), **keep)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    torch.manual_seed(0)
    ids, positions = torch.randint(0, 64, (2, 8)), torch.arange(8).expand(2, 8)
    mask = torch.triu(torch.ones(1, 1, 8, 8, dtype=torch.bool), 1)
    upstream = torch.randn(2, 8)
    want = theirs(ids, positions, mask, labels=ids)
    want.backward(upstream)
    tp = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
    patch.setattr(
        ours, "compute_language_model_loss", lambda x, y: language_model_loss(x, y, group=tp)
    )
    got = ours(ids, positions, mask, labels=ids)
    got.backward(upstream)
    patch.undo()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )
    parallel_state.destroy_model_parallel()


@megatron
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_a_gpt_of_our_parts_equals_megatrons(ranks, size, sequence_parallel):
    ranks(size, _layer_equals_megatrons, sequence_parallel)


def test_without_megatron_the_error_says_what_to_install(monkeypatch):
    from warploom.parallel.interop.megatron import warploom_layer_spec

    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError))
    with pytest.raises(RuntimeError, match="cannot be imported .*: pip install 'warploom.megatron"):
        warploom_layer_spec()
