"""The named tables: what each rank runs, in order, and how long its bubble is.

p ranks, m micro-batches, v stages a rank, rank r. `F0` is the forward of a rank's first stage and
`F1` that of its second; `F` = forward, `I` and `W` = input and weight gradients, `B` = both.

    gpipe        m F, then m B
    1f1b         p-r-1 F, then F B in turn, then the remaining B
    interleaved  2 (p-r-1) + (v-1) p F, then F B in turn, then the remaining B; stages change
                 every p micro-batches
    zb_h1        1f1b with I for B; the W of a micro-batch comes r micro-batches after its I
    zbv          F0 2(p-r)-1 times; F1 F0 r times; F1 I1 W1 p-r times; F0 I0 W0 F1 I1 W1 while there
                 are forwards; I0 I1 r times; I0 W0 p-r times; the remaining W
    dualpipev    F0 2(p-r-1) times; F0 F1 r+1 times; I1 W1 F1 p-r-1 times; F0 B1 F1 B0 m-2p+r+1
                 times; B1 F1 B0 p-r-1 times; B1 B0 r+1 times, from the middle on I for B; W I0
                 p-r-1 times; the remaining W

zbv and dualpipev place stage s on rank min(s, 2p-1-s): a V, whose ends meet on rank 0. What follows
for a rank, from the times F, I, W of one stage:

                 most micro-batches in flight      idle until the last rank ends
    gpipe        m                                 (p-1)(F+I+W)
    1f1b         min(p, m)                         (p-1)(F+I+W)
    interleaved  min(v m, (v+1) p - 1)             (p-1)(F+I+W)
    zb_h1        min(p, m)                         (p-1)(F+I-W) + max(p-m, 0) W      for W <= I
    zbv          2 min(p, m)                       max(p-1, 4(p-1) - 2(m-1)) F       for F = I = W
    dualpipev    2p + 1                            (p-1) F                           for F = I = W

A micro-batch of one stage is in flight from its F to its B or W. From 2p - 1 micro-batches on, a
rank of zbv is never idle between its first action and its last: all that remains is the start.
dualpipev is counted one action after the other, without the overlap of an F with the B beside it.

Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965 (gpipe); Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2 (1f1b, interleaved); Qi et al. 2023,
https://arxiv.org/abs/2401.10241, section 2.3 (zb_h1) and appendix (zbv), and Qi et al. 2024,
https://arxiv.org/abs/2405.15362; DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 3.2.1,
cut in half by Sea AI Lab as in https://github.com/deepseek-ai/DualPipe (dualpipev).
"""

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple


class Action(NamedTuple):
    """What a rank does next.

    Attributes:
        kind: `F` forward, `B` backward, `I` its input gradients or `W` its weight gradients alone.
        stage: Global number of the stage.
        microbatch: Number of the micro-batch.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """Write it as `F0.3`: kind, stage, micro-batch."""
        return f"{self.kind}{self.stage}.{self.microbatch}"


Rows = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """Times of one stage and one micro-batch, the same for all.

    Attributes:
        forward: Of a forward.
        input: Of the input gradients.
        weight: Of the weight gradients; a whole backward takes both.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0

    def __call__(self, action: Action) -> float:
        """Return the time of an action."""
        kind = action[0]
        if kind == "F":
            return self.forward
        return self.input * (kind != "W") + self.weight * (kind != "I")


def idle(name: str, p: int, m: int, costs: Costs) -> float:
    """Return how long each rank of a named table is idle, by the formula above.

    Raises:
        ValueError: If there is no such formula for this table or these costs.
    """
    forward, gradient, weight = costs.forward, costs.input, costs.weight
    if name in ("gpipe", "1f1b", "interleaved"):
        return (p - 1) * (forward + gradient + weight)
    if name == "zb_h1" and weight <= gradient:
        return (p - 1) * (forward + gradient - weight) + max(p - m, 0) * weight
    if name == "zbv" and forward == gradient == weight:
        return max(p - 1, 4 * (p - 1) - 2 * (m - 1)) * forward
    if name == "dualpipev" and forward == gradient == weight:
        return (p - 1) * forward
    raise ValueError(f"{name} has no closed formula of its bubble for {costs}; simulate it")


class _Row:
    """Writes a rank's row: each kind of each stage takes its micro-batches in order."""

    def __init__(self, *stages: int) -> None:
        self.stages = stages
        self.actions: list[Action] = []
        self.next: dict[str, int] = {}

    def add(self, text: str, times: int = 1) -> None:
        """Append the actions of `text`, such as `F0 B1`, `times` times; `B` counts as I and W."""
        for _ in range(times):
            for word in text.split():
                kind, place = word[0], word[1]
                microbatch = self.count(word)
                for each in "IW" if kind == "B" else kind:
                    self.next[each + place] = microbatch + 1
                self.actions.append(Action(kind, self.stages[int(place)], microbatch))

    def count(self, word: str) -> int:
        """Return how many of an action such as `I0` there are."""
        return self.next.get(word.replace("B", "I"), 0)


def gpipe(p: int, m: int) -> Rows:
    """Write the table of GPipe."""
    return tuple(
        tuple(Action(kind, rank, i) for kind in "FB" for i in range(m)) for rank in range(p)
    )


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    pairs = zip(forwards[warmup:], backwards, strict=False)
    rest = backwards[max(len(forwards) - warmup, 0) :]
    return (*forwards[:warmup], *chain.from_iterable(pairs), *rest)


def one_f_one_b(p: int, m: int) -> Rows:
    """Write the table of 1F1B."""
    return tuple(
        _alternate(
            [Action("F", rank, i) for i in range(m)],
            [Action("B", rank, i) for i in range(m)],
            p - rank - 1,
        )
        for rank in range(p)
    )


def interleaved(p: int, m: int, v: int) -> Rows:
    """Write the table of interleaved 1F1B; m is a multiple of p."""
    order = [(c, g * p + i) for g in range(m // p) for c in range(v) for i in range(p)]
    return tuple(
        _alternate(
            [Action("F", c * p + rank, i) for c, i in order],
            [Action("B", (v - 1 - c) * p + rank, i) for c, i in order],
            2 * (p - rank - 1) + (v - 1) * p,
        )
        for rank in range(p)
    )


def zb_h1(p: int, m: int) -> Rows:
    """Write the table of ZB-H1."""
    rows = []
    for rank in range(p):
        row = _Row(rank)
        row.add("F0", min(p - rank - 1, m))
        for i in range(m):
            row.add("F0", row.count("F0") < m)
            row.add("I0")
            row.add("W0", i >= rank)
        row.add("W0", m - row.count("W0"))
        rows.append(tuple(row.actions))
    return tuple(rows)


def zbv(p: int, m: int) -> Rows:
    """Write the table of ZBV; below 2p - 1 micro-batches it is cut out of that of 2p - 1."""
    full = max(m, 2 * p - 1)
    rows = []
    for rank in range(p):
        row = _Row(rank, 2 * p - 1 - rank)
        row.add("F0", 2 * (p - rank) - 1)
        row.add("F1 F0", rank)
        row.add("F1 I1 W1", p - rank)
        while row.count("F1") < full:
            row.add("F0", row.count("F0") < full)
            row.add("I0 W0 F1 I1 W1")
        row.add("I0 I1", rank)
        row.add("I0 W0", p - rank)
        row.add("W1", full - row.count("W1"))
        row.add("W0", full - row.count("W0"))
        rows.append(tuple(action for action in row.actions if action.microbatch < m))
    return tuple(rows)


def dualpipev(p: int, m: int) -> Rows:
    """Write the table of DualPipeV; m is at least 2p."""
    rows = []
    for rank in range(p):
        row = _Row(rank, 2 * p - 1 - rank)
        rest = p - rank - 1
        row.add("F0", 2 * rest)
        row.add("F0 F1", rank + 1)
        row.add("I1 W1 F1", rest)
        row.add("F0 B1 F1 B0", m - 2 * p + rank + 1)
        row.add("B1 F1 B0", rest)
        tail = ["1", "0"] * (rank + 1)
        whole, split = tail[: rank + 1], tail[rank + 1 :] + ["0"] * rest
        row.add(" ".join("B" + place for place in whole))
        row.add(" ".join("I" + place for place in split[: rank + 1]))
        row.add(" ".join(f"W{place} I0" for place in split[:rest]))
        row.add(" ".join("W" + place for place in split[rest:]))
        rows.append(tuple(row.actions))
    return tuple(rows)
