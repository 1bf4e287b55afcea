"""What is measured: an operator at the sizes of a model, its roof and its form in plain PyTorch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

Inputs = tuple[tuple[Tensor, ...], dict[str, Any]]

Scale = Literal["tiny", "cpu", "cuda"]
"""For what the sizes of a suite are: to try it, or for a device to be busy."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model that its operators see.

    Attributes:
        width: Of the residual stream.
        heads: Query heads.
        groups: Key heads.
        head_dim: Of a head, as far as it is rotated.
        hidden: Width of the feed-forward layer; of one expert where there are some.
        vocabulary: Rows of the head.
        experts: Of a layer, 0 for none.
        top_k: Experts a token.
        expert_groups: Groups of neighbouring experts.
        top_groups: Groups open to a token.
        score: How the router scores.
        layers: Layers whose tensors the optimizer steps at once.
    """

    width: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    vocabulary: int
    experts: int = 0
    top_k: int = 0
    expert_groups: int = 1
    top_groups: int = 1
    score: str = "softmax"
    layers: int = 1


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "llama3-8b": Model(
            width=4096, heads=32, groups=8, head_dim=128, hidden=14336, vocabulary=128_256
        ),
        "deepseek-v3": Model(
            width=7168,
            heads=128,
            groups=1,
            head_dim=64,
            hidden=2048,
            vocabulary=129_280,
            experts=256,
            top_k=8,
            expert_groups=8,
            top_groups=4,
            score="sigmoid",
        ),
        "qwen3-30b-a3b": Model(
            width=2048,
            heads=32,
            groups=4,
            head_dim=128,
            hidden=768,
            vocabulary=151_936,
            experts=128,
            top_k=8,
        ),
        "smollm2-135m": Model(
            width=576, heads=9, groups=3, head_dim=64, hidden=1536, vocabulary=49_152, layers=10
        ),
        "tiny": Model(
            width=64, heads=4, groups=2, head_dim=16, hidden=96, vocabulary=256, experts=8, top_k=2
        ),
    }
)
"""What `--shapes` takes. The operators of experts run on the models that have some."""


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without.

    Attributes:
        bytes: Read and written, each tensor once.
        flops: Of its formula, two to a multiply-add.
        products: Whether they are matrix products, held to the ceiling of those.
        ceiling: Which of the measured ones, where it is there; else `matmul_flops_per_s`.
    """

    bytes: float
    flops: float
    products: bool = False
    ceiling: str = "matmul_flops_per_s"

    def __add__(self, other: "Work") -> "Work":
        products = self.products or other.products
        return Work(self.bytes + other.bytes, self.flops + other.flops, products, self.ceiling)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one size.

    `ours` is called with `backend=` besides the inputs; `eager` is the usual form in PyTorch, its
    fused operators where it has them. `draw` returns the tensors that take a gradient and a
    dictionary of what is fixed.

    Attributes:
        op: As `backends.available()` lists it.
        variant: Which way of calling it; empty for the plain one.
        size: What a reader calls the size.
        draw: From `Draw` to inputs and fixed arguments.
        ours: The operator.
        eager: Plain PyTorch.
        forward: Roof of the forward.
        backward: Roof of the backward, or None where there is none.
        peers: Whether further backends (liger, te, apex) serve this way of calling it.
        inplace: Whether a call overwrites its inputs, so that each gets fresh ones.
        compiles: Whether `eager` can be compiled.
        key: What the dispatcher calls the case (`backends.case_key`); empty where it asks for none.
        memory: Whether to measure the most memory of a step, beyond its inputs.
        others: Peers of this operator alone, by the package that must be installed; called as
            `eager` is.
    """

    op: str
    variant: str = ""
    size: str
    draw: Callable[["Draw"], Inputs]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    forward: Work
    backward: Work | None
    peers: bool = True
    inplace: bool = False
    compiles: bool = True
    key: str = ""
    memory: bool = False
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the operator and the way it is called."""
        return f"{self.op} {self.variant}".strip()


@dataclass(frozen=True)
class Draw:
    """Random numbers of a dtype on a device, the same in every run.

    Attributes:
        dtype: Of the numbers.
        device: Where they are drawn.
    """

    dtype: torch.dtype
    device: torch.device
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_generator", torch.Generator(self.device).manual_seed(0))

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal numbers.

        Args:
            shape: Of the tensor.
            scale: Their standard deviation.
            dtype: Another dtype.
        """
        x = torch.randn(shape, generator=self._generator, device=self.device)
        return (x * scale).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw int64 numbers from 0 to `high` - 1."""
        generator, device = self._generator, self.device
        return torch.randint(0, high, shape, generator=generator, device=device)


Build = Callable[[Model, int, int], Iterator[Case]]
"""The cases of an operator, of the model, the tokens and the bytes of an element."""
