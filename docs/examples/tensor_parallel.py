"""Column- and row-parallel linears in a plain torch model, under a plain torch optimizer.

    torchrun --nproc-per-node 2 docs/examples/tensor_parallel.py

A layer needs a `ProcessGroup` and the full sizes, nothing else: no mesh, no trainer. With
`sequence_parallel` (the default) each rank brings its own rows of the tokens, and whatever stands
between the layers sees these rows alone:

    rank r    x [T/R, D] -> LayerNorm -> up [T, F/R] -> GELU -> down [T/R, D] -> head [T/R, C]

So the weights of `up` and `down`, of which a rank holds a slice, have their whole gradient. What
every rank holds in full (the norm, the head, the bias of `down`) has seen T/R tokens, and its
gradient must be summed over the group. A layout says so of our layers in `partial`; a torch module
says nothing, and you sum.

The loss is a sum divided by the tokens of all ranks. A mean over the rank's own would be R times
too large after the sum.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.parallel.sharding import assemble, layouts, load
from warploom.parallel.tensor import ColumnLinear, RowLinear

TOKENS, WIDTH, HIDDEN, CLASSES = 12, 8, 16, 5


class Net(nn.Module):
    """A residual block and a classifier; `up` and `down` may be any linears."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), up, down
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[tokens, D]` to logits `[tokens, C]`."""
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        return logits


def sharded(whole: Net, group: dist.ProcessGroup | None) -> Net:
    """Build the net over a group, with the slices of `whole` that this rank's layouts name."""
    up = ColumnLinear(WIDTH, HIDDEN, group=group, bias=True)
    down = RowLinear(HIDDEN, WIDTH, group=group, bias=True)
    net = Net(up, down).double()
    load(net, whole.state_dict())
    return net


def sum_gradients(net: Net, group: dist.ProcessGroup) -> None:
    """Sum the gradients that are parts: of plain modules, and where a layout is partial."""
    for path, layout in layouts(net).items():
        if path.startswith(("norm.", "head.")) or layout.partial:
            dist.all_reduce(net.get_parameter(path).grad, group=group)


def run(group: dist.ProcessGroup | None) -> dict[str, float]:
    """Train both nets for three steps; return the largest difference of every parameter."""
    torch.manual_seed(0)
    whole = Net(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)).double()
    x, y = torch.randn(TOKENS, WIDTH).double(), torch.randint(CLASSES, (TOKENS,))
    net = sharded(whole, group)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    parts = [(whole, x, y), (net, x.chunk(ranks)[rank], y.chunk(ranks)[rank])]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model, _, _ in parts]
    for _ in range(3):
        for (model, inputs, targets), optimizer in zip(parts, optimizers, strict=True):
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), targets, reduction="sum") / TOKENS).backward()
            if model is net and group is not None:
                sum_gradients(net, group)
            optimizer.step()
    after = assemble(dict(net.named_parameters()), layouts(net), group)
    return {n: float((after[n] - p).abs().max()) for n, p in whole.state_dict().items()}


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, difference in run(dist.group.WORLD if dist.is_initialized() else None).items():
        print(f"{name:12} differs by {difference:.1e}")
