"""The pipeline executor under plain `nn.Sequential` stages, with a loss of your own.

    torchrun --nproc-per-node 2 docs/examples/pipeline_sequential.py

A schedule is a table, a stage a function. `execute` calls the functions of this rank in the order
of the table, sends what they return and accumulates gradients in your parameters:

    (x | None, batch) -> (y | None, objective | None)     x is None first, y is None last

The objective is what is differentiated: divide it by the count of the whole batch yourself, not of
the micro-batch, and the gradients add up to those of one process. Each parameter lives on one rank,
so there is nothing to sum; with data-parallel replicas sum over these, once, after `execute`.

`1f1b` suits any module. The schedules that split the backward in two (`zb_h1`, `zbv`) save time
where the linears are ours, whose weight gradient can wait; a torch module computes both at once.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warploom.parallel.pipeline import Schedule, execute

LAYERS, WIDTH, ROWS, MICROBATCHES = 4, 8, 12, 4


def huber(y: Tensor, target: Tensor) -> Tensor:
    """Return this example's own loss, summed."""
    return nn.functional.huber_loss(y, target, reduction="sum", delta=0.5)


def build() -> list[nn.Module]:
    """Return all layers; a real program builds those of its own rank."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return [layer.double() for layer in layers]


def run(group: dist.ProcessGroup | None) -> dict[str, float]:
    """Compare the loss, and the gradients of this rank's layers, with one process."""
    torch.manual_seed(1)
    x, target = torch.randn(2, ROWS, WIDTH).double()
    whole = build()
    expected = huber(nn.Sequential(*whole)(x), target) / x.numel()
    expected.backward()

    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    schedule = Schedule.one_f_one_b(ranks, MICROBATCHES)
    layers, each = build(), LAYERS // ranks
    mine = nn.Sequential(*layers[rank * each : (rank + 1) * each])

    def stage(y: Tensor | None, batch: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
        inputs, targets = batch
        y = mine(inputs if y is None else y)
        if rank < ranks - 1:
            return y, None
        return None, huber(y, targets) / x.numel()

    batches = list(zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True))
    objectives = execute(schedule, {rank: stage}, batches, group=group)

    found = {}
    if rank == ranks - 1:  # the objectives arise here
        found["loss"] = abs(float(sum(objectives.values())) - float(expected.detach()))
    for number in range(rank * each, (rank + 1) * each):
        pairs = zip(layers[number].parameters(), whole[number].named_parameters(), strict=True)
        for a, (name, b) in pairs:
            assert a.grad is not None
            assert b.grad is not None
            found[f"d {number}.{name}"] = float((a.grad - b.grad).abs().max())
    return found


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, difference in run(dist.group.WORLD if dist.is_initialized() else None).items():
        print(f"{name:16} differs by {difference:.1e}")
