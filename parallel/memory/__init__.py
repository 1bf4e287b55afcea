"""Memory of a step: recomputation, and offload to the host.

    Recompute.parse("selective").run("norm", lambda x: project(gather(norm(x), group)), x)
    with offloaded(least=1 << 20):
        loss = model.loss(batch)

`recompute` says which operators run again in the backward; `offload` moves what the backward needs
to host memory and back. What memory a step takes is measured by `recipes/plan/tracker.py`.
"""

from .offload import Moved, offloaded
from .recompute import Recompute, remembered

__all__ = ["Moved", "Recompute", "offloaded", "remembered"]
