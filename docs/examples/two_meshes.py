"""Two meshes in one process: an encoder split over `tp`, a decoder replicated over `dp`.

    torchrun --nproc-per-node 2 docs/examples/two_meshes.py

A mesh is a frozen value that is passed as an argument; there is no current one. The same ranks are
tensor-parallel in the encoder and data-parallel in the decoder, and one collective stands where the
tokens change hands:

    encoder   all ranks hold all T tokens, and slices of the weights     mesh "tp2"
    split     each rank goes on with its own T/R tokens; the backward gathers their gradients
    decoder   each rank holds its tokens, and all of the weights         mesh "dp2"

What is summed, and over which group, belongs to the mesh of the module: in the decoder every
gradient over `dp`; in the encoder nothing, as without sequence parallelism each rank of `tp` sees
all tokens.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.parallel.collectives import split
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import assemble, layouts
from warploom.parallel.tensor import ColumnLinear, RowLinear

TOKENS, WIDTH, HIDDEN = 8, 6, 12


class Encoder(nn.Module):
    """Two linears, of which each rank holds a slice."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.up = ColumnLinear(WIDTH, HIDDEN, group=mesh.tp, sequence_parallel=False)
        self.down = RowLinear(HIDDEN, WIDTH, group=mesh.tp, bias=True, sequence_parallel=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T, D]` to `[T, D]`, alike on all ranks."""
        y: Tensor = self.down(F.silu(self.up(x)))
        return y


def run(group: dist.ProcessGroup | None) -> dict[str, float]:
    """Compare every gradient of both halves with one process."""
    ranks = 1 if group is None else group.size()
    tensor, data = Mesh.build(f"tp{ranks}"), Mesh.build(f"dp{ranks}")
    torch.manual_seed(0)
    x, target = torch.randn(2, TOKENS, WIDTH).double()
    encoder, decoder = Encoder(tensor).double(), nn.Linear(WIDTH, WIDTH).double()
    made = layouts(encoder)
    start = assemble(dict(encoder.named_parameters()), made, tensor.tp)

    up, down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)
    whole = nn.ModuleDict({"up": up, "down": down, "out": nn.Linear(WIDTH, WIDTH)}).double()
    out = {f"out.{name}": value for name, value in decoder.state_dict().items()}
    whole.load_state_dict(start | out)
    y = whole["out"](whole["down"](F.silu(whole["up"](x))))
    ((y - target).square().sum() / TOKENS).backward()

    hidden = split(encoder(x), data.dp)
    own = target.chunk(ranks)[data.data_rank]
    ((decoder(hidden) - own).square().sum() / TOKENS).backward()
    gradients = {path: p.grad for path, p in encoder.named_parameters() if p.grad is not None}
    found = assemble(gradients, made, tensor.tp)
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        if data.dp is not None:
            dist.all_reduce(parameter.grad, group=data.dp)
        found[f"out.{name}"] = parameter.grad
    return {f"d {n}": float((found[n] - p.grad).abs().max()) for n, p in whole.named_parameters()}


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, difference in run(dist.group.WORLD if dist.is_initialized() else None).items():
        print(f"{name:16} differs by {difference:.1e}")
