"""Memory of a step: what it is measured to be, recomputation, and offload to the host.

    with track(model=model, optimizer=optimizer) as seen:
        step(batches)                      # seen.peak.total, seen.peak.by, seen.peak.at
    Recompute.parse("selective").run("norm", lambda x: project(gather(norm(x), group)), x)
    with offloaded(least=1 << 20):
        loss = model.loss(batch)

`tracker` measures live bytes by cause; `recompute` says which operators run again in the backward;
`offload` moves what the backward needs to host memory and back.
"""

from .offload import Moved, offloaded
from .recompute import Recompute, remembered
from .tracker import CAUSES, Peak, Seen, track

__all__ = ["CAUSES", "Moved", "Peak", "Recompute", "Seen", "offloaded", "remembered", "track"]
