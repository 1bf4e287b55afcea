"""A layer of experts in a plain torch model: tokens travel to the rank that holds their expert.

    torchrun --nproc-per-node 2 docs/examples/experts.py

The ranks of one group are data-parallel outside the layer and expert-parallel inside: each brings
its own rows, and holds E/P of the E experts.

    router, norm    held in full, has seen own tokens   sum the gradient over the group
    experts         tokens of all ranks have come here  whole already: sum over nothing

That is also why `DistributedDataParallel` does not fit around it: it would average the gradients of
different experts. A layout says it: `expert` is True where the replicas are not those of the rest.

The load-balancing loss is a sum over documents, the language loss over tokens; each is divided by
the count of all ranks, so that no split of the batch changes the gradient. A rank without tokens
must still call the layer: it sends and receives with the others.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.parallel.expert import MoE
from warploom.parallel.sharding import assemble, layouts

ROWS, LENGTH, WIDTH, HIDDEN, EXPERTS, TOP_K, BALANCE = 4, 6, 8, 12, 4, 2, 0.1


class Net(nn.Module):
    """A norm and a layer of experts in a residual block: what the ranks share out."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, group=group, balance="sequence")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows `[B, S, D]`, each a document, to the same, and the sum of the balance loss."""
        documents = torch.arange(len(x)).repeat_interleave(x.shape[1])
        y, losses = self.moe(self.norm(x).flatten(0, 1), documents, len(x))
        return x + y.view_as(x), losses["load_balance"]


def by_hand(net: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch from logical tensors, all experts here."""
    h = F.layer_norm(x, (WIDTH,), net["norm.weight"], net["norm.bias"])
    probabilities = (h @ net["moe.router.weight"].t()).softmax(-1)
    weights, chosen = probabilities.topk(TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    y = x
    for e in range(EXPERTS):
        gate, up, down = (net[f"moe.experts.{e}.{w}.weight"] for w in ("gate", "up", "down"))
        served = (F.silu(h @ gate.t()) * (h @ up.t())) @ down.t()
        y = y + served * (weights * (chosen == e)).sum(-1, keepdim=True)
    counts = F.one_hot(chosen, EXPERTS).sum((1, 2)).double()
    balance = counts * probabilities.sum(1) * EXPERTS / (TOP_K * x.shape[1] ** 2)
    return y, balance.sum()


def run(group: dist.ProcessGroup | None) -> dict[str, float]:
    """Compare every gradient, and the parameters after a step of SGD, with plain torch."""
    torch.manual_seed(0)
    net = Net(group).double()  # the same weights on any number of ranks
    for parameter in net.moe.parameters():
        parameter.data *= 20  # that every gradient matters here
    x, target = torch.randn(2, ROWS, LENGTH, WIDTH).double()
    made = layouts(net)
    start = assemble(dict(net.named_parameters()), made, group)
    whole = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    y, balance = by_hand(whole, x)
    ((y - target).square().sum() / x.numel() + BALANCE * balance / ROWS).backward()

    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    own = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    y, balance = net(x[own])
    ((y - target[own]).square().sum() / x.numel() + BALANCE * balance / ROWS).backward()
    for path, layout in made.items():
        if not layout.expert and group is not None:
            dist.all_reduce(net.get_parameter(path).grad, group=group)
    gradients = {path: p.grad for path, p in net.named_parameters() if p.grad is not None}
    found = assemble(gradients, made, group)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    after = assemble(dict(net.named_parameters()), made, group)
    torch.optim.SGD(whole.values(), lr=0.1).step()
    result = {f"d {n}": float((found[n] - p.grad).abs().max()) for n, p in whole.items()}
    return result | {n: float((after[n] - p.detach()).abs().max()) for n, p in whole.items()}


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, difference in run(dist.group.WORLD if dist.is_initialized() else None).items():
        print(f"{name:32} differs by {difference:.1e}")
