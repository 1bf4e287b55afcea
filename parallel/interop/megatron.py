"""Megatron-Core's GPT, built of our norm, linears, core attention and loss.

    model = GPTModel(config, warploom_layer_spec(), ...)

Shapes here are Megatron's: S sequence (under sequence parallelism S/R), B batch, D width, H query
heads, G key/value heads, K head dimension, V vocabulary, R tensor-parallel ranks.

The layers run where their inputs are, a CPU with gloo included. Megatron's own parts around them
(its random states, its buffers, the writer of its checkpoints) need CUDA.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warploom.kernels.attention import flash_attention, flash_attention_varlen
from warploom.kernels.loss import cross_entropy_gradient_, cross_entropy_partials
from warploom.kernels.norm import rms_norm

from ..collectives import Group, all_reduce_
from ..sharding import Layout
from ..tensor import ColumnLinear, RowLinear

_MARK = "sequence_parallel"


def _megatron(name: str) -> Any:
    try:
        return importlib.import_module(f"megatron.core.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"this needs Megatron-Core, which cannot be imported ({error}): pip install "
            f"'warploom[megatron]'"
        ) from error


def _group(given: Any, config: Any) -> Group:
    if given is None and dist.is_initialized() and config.tensor_model_parallel_size > 1:
        given = _megatron("parallel_state").get_tensor_model_parallel_group()
    group: Group = None if given is None or given.size() == 1 else given
    return group


def _refuse(name: str, **wrong: Any) -> None:
    """Raise if any argument has a value, and say which."""
    found = [f"{key}={value}" for key, value in wrong.items() if value]
    if found:
        raise ValueError(
            f"{name} does not serve {', '.join(found)}: use Megatron's own layer there"
        )


def _device(config: Any) -> torch.device:
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class Norm(nn.Module):
    """`RMSNorm` with the constructor of Megatron's norms.

    Raises:
        ValueError: If the configuration asks for another norm, or for a scale around zero.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        other = config.normalization if config.normalization != "RMSNorm" else None
        around = config.layernorm_zero_centered_gamma
        _refuse("Norm", normalization=other, layernorm_zero_centered_gamma=around)
        kind = {"dtype": config.params_dtype, "device": _device(config)}
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, **kind))
        # Megatron sums the gradients of parameters that carry this mark over its tp ranks
        setattr(self.weight, _MARK, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`."""
        y: Tensor = rms_norm(x, self.weight, eps=self.eps)
        return y


def _adopt(layer: Any, config: Any, init_method: Callable[[Tensor], Any], stride: int) -> None:
    """Give a linear Megatron's dtype, device, initial values and marks."""
    layer.to(dtype=config.params_dtype, device=_device(config))
    layer.tp_group = layer.group
    (layout,) = layer.declare_layouts().values()
    dim = layer.axes["weight"]
    marks = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": stride}
    for mark, value in {**marks, "allreduce": True}.items():
        setattr(layer.weight, mark, value)
    if config.perform_initialization:
        _draw(layer.weight, layout, init_method)


@torch.no_grad()
def _draw(parameter: Tensor, layout: Layout, init_method: Callable[[Tensor], Any]) -> None:
    """Draw the whole matrix and keep this rank's part: the same weights on every mesh."""
    if parameter.is_cuda:
        with _megatron("tensor_parallel").get_cuda_rng_tracker().fork():
            init_method(parameter)
        return
    for piece in layout.pieces:
        whole = torch.empty(piece.shape, dtype=torch.float32)
        init_method(whole)
        piece.of_local(parameter).copy_(piece.of_logical(whole))


def _sharded(layer: Any, prefix: str, offsets: Any, metadata: Any) -> Any:
    """Return what Megatron's distributed checkpoints save of a linear."""
    utils = _megatron("transformer.utils")
    state = layer.state_dict(prefix="", keep_vars=True)
    extra = {} if metadata is None else {"dp_cp_group": metadata["dp_cp_group"]}
    group = layer.tp_group or _megatron("parallel_state").get_tensor_model_parallel_group()
    return utils.make_sharded_tensors_for_checkpoint(
        state, prefix, layer.axes, offsets, tp_group=group, **extra
    )


class Column(ColumnLinear):
    """`ColumnLinear` with the constructor and the results of `ColumnParallelLinear`.

    Raises:
        ValueError: If an option is asked for that it does not serve, or sizes do not divide.
    """

    axes: Mapping[str, int] = {"weight": 0}

    def __init__(
        self, input_size: int, output_size: int, *, config: Any,
        init_method: Callable[[Tensor], Any], bias: bool = True, gather_output: bool = False,
        stride: int = 1, skip_weight_param_allocation: bool = False, is_expert: bool = False,
        tp_group: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        skipped = skip_weight_param_allocation
        asked = {"gather_output": gather_output, "skip_weight_param_allocation": skipped}
        _refuse("Column", bias=bias, is_expert=is_expert, **asked)
        group = _group(tp_group, config)
        super().__init__(
            input_size, output_size, group=group,
            sequence_parallel=config.sequence_parallel and group is not None,
            parts={str(part): output_size // stride for part in range(stride)},
        )  # fmt: skip
        _adopt(self, config, init_method, stride)

    def forward(self, x: Tensor) -> Any:
        """Map `[S, B, D]` to `[S, B, F/R]`, beside a bias that is always `None`."""
        return super().forward(x), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Return what Megatron's distributed checkpoints save."""
        return _sharded(self, prefix, sharded_offsets, metadata)


class Row(RowLinear):
    """`RowLinear` with the constructor and the results of `RowParallelLinear`.

    Raises:
        ValueError: If an option is asked for that it does not serve, or sizes do not divide.
    """

    axes: Mapping[str, int] = {"weight": 1}

    def __init__(
        self, input_size: int, output_size: int, *, config: Any,
        init_method: Callable[[Tensor], Any], bias: bool = True, input_is_parallel: bool = True,
        stride: int = 1, is_expert: bool = False, tp_group: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        whole = not input_is_parallel
        _refuse("Row", bias=bias, is_expert=is_expert, whole_input=whole, stride=stride != 1)
        group = _group(tp_group, config)
        sequence_parallel = config.sequence_parallel and group is not None
        super().__init__(input_size, output_size, group=group, sequence_parallel=sequence_parallel)
        _adopt(self, config, init_method, stride)

    def forward(self, x: Tensor, **fused: Any) -> Any:
        """Map `[S, B, D/R]` to `[S, B, F]`, beside a bias that is always `None`."""
        return super().forward(x, **fused), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Return what Megatron's distributed checkpoints save."""
        return _sharded(self, prefix, sharded_offsets, metadata)


class CoreAttention(nn.Module):
    """Flash attention with the constructor of Megatron's `DotProductAttention`.

    Raises:
        ValueError: If dropout, windows, context parallelism or a softmax with an offset is asked.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dropped = config.attention_dropout if attention_dropout is None else attention_dropout
        offset = getattr(config, "softmax_type", "vanilla")
        _refuse(
            "CoreAttention",
            attention_dropout=dropped,
            window_size=getattr(config, "window_size", None),
            context_parallel_size=0 if config.context_parallel_size == 1 else 2,
            softmax_type=None if offset == "vanilla" else offset,
        )
        self.scale = softmax_scale
        self.mask = attn_mask_type

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        attn_mask_type: Any = None, attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """Map `[S, B, H/R, K]`, keys and values `[S, B, G/R, K]`, to `[S, B, H K / R]`.

        Packed, they are `[T, H/R, K]` and `[T, G/R, K]`, the result `[T, H K / R]`.

        Raises:
            ValueError: If the mask is neither causal nor none, or there is a bias.
        """
        kind = (self.mask if attn_mask_type is None else attn_mask_type).name
        if kind not in ("causal", "no_mask", "padding_causal") or attention_bias is not None:
            raise ValueError(
                f"CoreAttention takes causal or no_mask, without a bias; got {kind} and bias "
                f"{attention_bias is not None}"
            )
        causal = kind != "no_mask"
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q
            y = flash_attention_varlen(query, key, value, bounds, causal=causal, scale=self.scale)
            assert isinstance(y, Tensor)
            return y.flatten(1)
        rows = (x.transpose(0, 1) for x in (query, key, value))
        y = flash_attention(*rows, causal=causal, scale=self.scale)
        assert isinstance(y, Tensor)
        return y.transpose(0, 1).flatten(2)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        start = 0 if group is None else group.rank() * logits.shape[1]
        largest, total, target = cross_entropy_partials(logits, targets, start)
        joint = all_reduce_(largest.clone(), group, op="max")
        both = all_reduce_(torch.stack((total * torch.exp(largest - joint), target)), group)
        lse = joint + both[0].log()
        ctx.start = start
        ctx.save_for_backward(logits, targets, lse)
        return lse - both[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        gradient = logits.clone()
        cross_entropy_gradient_(gradient, targets, ctx.start, lse, upstream[0].contiguous())
        return gradient, None, None


def language_model_loss(labels: Tensor, logits: Tensor, *, group: Group) -> Tensor:
    """Return the cross-entropy of every token, as `GPTModel.compute_language_model_loss` does.

    Args:
        labels: Ids `[B, S]`, int64.
        logits: `[S, B, V/R]`, this rank's part of the vocabulary.
        group: The tensor-parallel process group; `None` for one rank.

    Returns:
        `[B, S]`, float32 at least.
    """
    targets = labels.t().reshape(-1)
    losses: Tensor = _PerToken.apply(logits.flatten(0, 1), targets, group)
    return losses.view(logits.shape[:2]).t().contiguous()


def warploom_layer_spec(*, qk_layernorm: bool = False) -> Any:
    """Return the `ModuleSpec` of a GPT layer: our norms, linears and core attention.

    For `GPTModel(config, warploom_layer_spec(), ...)` with RMSNorm and no biases; for the norm at
    the end of the model, put it in a `TransformerBlockSubmodules` with `layer_norm=Norm`.

    Raises:
        RuntimeError: If Megatron-Core cannot be imported.
    """
    specs = _megatron("models.gpt.gpt_layer_specs")
    made = specs.get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    layer = made.submodules
    of = layer.self_attention.submodules
    of.linear_qkv, of.linear_proj, of.core_attention = Column, Row, CoreAttention
    if qk_layernorm:
        of.q_layernorm = of.k_layernorm = Norm
    layer.mlp.submodules.linear_fc1, layer.mlp.submodules.linear_fc2 = Column, Row
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    return made
