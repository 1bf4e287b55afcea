"""The same layers with `group=None`: plain modules of one process, and nothing communicates.

    python docs/examples/one_rank.py

`torch.distributed` need not be initialised. What holds for any module holds here: `state_dict` goes
in and out, `torch.optim` steps, a device moves it. Write a model once with `group=`, run it alone,
and pass a group when it outgrows the device.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.parallel.context import ring_attention
from warploom.parallel.tensor import ColumnLinear, RowLinear

TOKENS, WIDTH, HEADS = 10, 8, 2


class Attention(nn.Module):
    """Causal attention of our layers."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.qkv = ColumnLinear(WIDTH, 3 * WIDTH, group=group)
        self.out = RowLinear(WIDTH, WIDTH, group=group, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, D]` to the same; the T tokens are one document."""
        q, k, v = self.qkv(x).unflatten(1, (3, HEADS, -1)).unbind(1)
        y: Tensor = self.out(ring_attention(q, k, v, group=None).flatten(1))
        return y


class Plain(nn.Module):
    """The same of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, D]` to the same."""
        q, k, v = self.qkv(x).unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(0, 1).flatten(1))
        return y


def run(group: None = None) -> dict[str, float]:
    """Train both for three steps; return the largest difference of every parameter."""
    torch.manual_seed(0)
    plain, ours = Plain().double(), Attention().double()
    ours.load_state_dict(plain.state_dict())
    x, target = torch.randn(2, TOKENS, WIDTH).double()
    for model in (plain, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    after = ours.state_dict()
    return {n: float((after[n] - p).abs().max()) for n, p in plain.state_dict().items()}


if __name__ == "__main__":
    for name, difference in run().items():
        print(f"{name:12} differs by {difference:.1e}")
