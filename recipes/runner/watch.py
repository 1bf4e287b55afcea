"""What watches over a run of several ranks: hangs, ranks that call something else, slow ranks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore, Store

from warploom.parallel.collectives import observed
from warploom.parallel.faults import Fingerprint, Report, Stragglers, Watchdog
from warploom.parallel.mesh import Mesh

from ..errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """What watches over the ranks; nothing of it changes what is trained."""

    patience_s: float = 40.0
    """A collective that takes longer is told: which rank, which call, who is missing, where its
    code stands. 0 watches nothing. Collectives give up after 60 s by themselves."""
    fingerprints: bool = False
    """Compare operation, shape and dtype of every collective before it runs, and name the first
    that differs; slow, to find out why a run hangs."""
    stragglers_every: int = 0
    """Every so many steps say which rank is slow, by how much, and on what; 0 never."""

    def __post_init__(self) -> None:
        if not 0 <= self.patience_s < float("inf"):
            raise UserError(f"watch.patience_s must be 0 or more seconds, got {self.patience_s}")
        if self.stragglers_every < 0:
            raise UserError(
                f"watch.stragglers_every must be 0 or more steps, got {self.stragglers_every}"
            )


@contextmanager
def watching(watch: Watch, store: Store | None, mesh: Mesh) -> Iterator[Stragglers | None]:
    """Watch while the context is open; gives what times the ranks, where it is asked for.

    Args:
        watch: What to watch.
        store: In which the ranks found each other; `None` for one rank.
        mesh: The ranks.
    """
    if store is None:
        yield None
        return
    with ExitStack() as stack:
        if watch.patience_s:
            beside = PrefixStore("watchdog", store)
            dog = Watchdog(beside, rank=mesh.rank, patience_s=watch.patience_s)
            stack.enter_context(dog)
        if watch.fingerprints:
            compare = Fingerprint(PrefixStore("fingerprints", store))
            stack.enter_context(observed(compare))
        times = None
        if watch.stragglers_every:
            times = Stragglers(mesh.world, every=watch.stragglers_every)
            stack.enter_context(observed(times))
        yield times


def tell(report: Report) -> str:
    """Say in a line who is slow."""
    slow = "; ".join(
        f"{s.name}: rank {s.slowest} takes {s.slowest_s:.3g} s, the median {s.median_s:.3g} s"
        for s in report.sections
    )
    return (
        f"over {report.steps} steps, the others wait most for rank {report.awaited} (it waits "
        f"{report.wait_s:.3g} s a step, the median {report.median_wait_s:.3g} s); {slow}"
    )
