"""Where a proof fails, and why: the module, the axis, the reduction that is missing or doubled.

The axis is found by proofs on smaller meshes: of one axis alone, then of all but one. On the
smallest mesh that fails, a wrong gradient is compared with the right one: a whole multiple of it
was summed or divided once too often; shares that sum up to it were never summed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from warploom.parallel.mesh import Degrees
from warploom.parallel.parity import failures

from .case import TOLERANCE, Outcome, Share
from .plan import Case

CLOSE = 1e-6  # a share of the largest element: far above rounding, far below any bug
AXES = ("tp", "cp", "pp", "dp", "rep", "ep", "etp")
MEANING = {
    "tp": "tensor-parallel ranks (tp)",
    "cp": "context-parallel ranks (cp)",
    "pp": "pipeline ranks (pp)",
    "dp": "data ranks (dp)",
    "rep": "replicas (rep)",
    "ep": "expert-parallel ranks (ep, edp)",
    "etp": "expert-tensor-parallel ranks (etp)",
}

Run = Callable[[Case], Outcome]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong.

    Attributes:
        axis: The axis without which nothing is wrong, or several, such as `tp, pp`.
        mesh: The smallest mesh found that fails.
        option: The option without which nothing is wrong on that mesh; empty if there is none.
        module: The module that is wrong, nearest to the loss where a gradient is.
        cause: One sentence.
    """

    axis: str
    mesh: str
    option: str
    module: str
    cause: str

    def __str__(self) -> str:
        option = f", with {self.option}" if self.option else ""
        return f"{self.module} on axis {self.axis} (mesh {self.mesh}{option}): {self.cause}"


def diagnose(case: Case, outcome: Outcome, run: Run) -> Diagnosis:
    """Find where a failed case fails, by running smaller ones.

    Args:
        case: The case.
        outcome: What it found.
        run: Runs another.
    """
    axis, smallest, found = _axis(case, outcome, run)
    option, smallest, found = _option(smallest, found, run)
    size = math.prod(getattr(smallest.degrees, name) or 1 for name in axis)
    module, cause = explain(found, size, " and ".join(MEANING[name] for name in axis))
    names = ", ".join(axis) if axis else "none: one rank fails too"
    return Diagnosis(names, smallest.mesh or "dp1", option, module, cause)


def _axis(case: Case, outcome: Outcome, run: Run) -> tuple[tuple[str, ...], Case, Outcome]:
    """Return the axes that are needed to fail, the smallest case that fails, and what it found."""
    for axis, smaller in _single(case):
        found = run(smaller)
        if failures(found.differences, tolerance=TOLERANCE):
            return axis, smaller, found
    mended: list[str] = []
    smallest, last = case, outcome
    for name in [name for name in AXES if (getattr(case.degrees, name) or 1) > 1]:
        fewer = _without(smallest, name)
        less = None if fewer is None else run(fewer)
        if fewer and less and failures(less.differences, tolerance=TOLERANCE):
            smallest, last = fewer, less
        else:
            mended.append(name)
    return tuple(mended), smallest, last


def _single(case: Case) -> Iterator[tuple[tuple[str, ...], Case]]:
    """Yield the cases of one rank, of one axis alone, and those of experts over few ranks."""
    d = case.degrees
    yield (), _on(case, Degrees(dp=1))
    for axis in ("tp", "cp", "pp", "dp", "rep"):
        degree = getattr(d, axis) or 1
        if degree > 1:
            uly = math.gcd(d.uly, degree) if axis == "cp" else 1
            alone = replace(Degrees(dp=1, uly=uly), **{axis: degree})
            yield (axis,), _on(case, alone)
    if d.ep > 1:
        yield ("ep",), _on(case, Degrees(dp=d.ep, ep=d.ep))
    if d.etp > 1:
        yield ("etp",), _on(case, Degrees(dp=d.etp, etp=d.etp))


def _without(case: Case, axis: str) -> Case | None:
    """Return the case with one axis less; `None` where the expert axes would not fold."""
    d = replace(case.degrees, **{axis: 1})
    if axis == "cp":
        d = replace(d, uly=1)
    if d.tp * d.cp * (d.dp or 1) % (d.ep * d.etp):
        return None
    return _on(case, d)


def _on(case: Case, degrees: Degrees) -> Case:
    """Return the case on another mesh."""
    names = ("tp", "cp", "uly", "pp", "dp", "rep", "ep", "etp")
    parts = [f"{n}{getattr(degrees, n)}" for n in names if (getattr(degrees, n) or 1) > 1]
    same = degrees.pp == case.degrees.pp
    layers = case.parallel.stage_layers if same else ()
    return replace(case.on(stage_layers=layers), mesh=",".join(parts))


def _option(case: Case, outcome: Outcome, run: Run) -> tuple[str, Case, Outcome]:
    """Return the first option that is needed to fail, with a case that has no needless ones."""
    how, pp = case.parallel, case.degrees.pp > 1
    schedule = {"schedule": "gpipe", "stage_layers": ()} if pp else {}
    plain: dict[str, Callable[[Case], Case]] = {
        f"recompute={case.recompute}": lambda c: replace(c, recompute="none"),
        "offload": lambda c: c.on(offload=False, offload_activations=False),
        f"zero={how.zero}": lambda c: c.on(zero=1),
        f"schedule={how.schedule}": lambda c: c.on(**schedule),
        f"optimizer={case.optimizer}": lambda c: replace(c, optimizer="adamw"),
        "packed documents": lambda c: replace(c, packed=False),
        f"context={how.context}": lambda c: c.on(context="ring"),
        f"balance={how.balance}": lambda c: c.on(balance="zigzag"),
        "padding": lambda c: replace(c, sequence=16),
    }
    needed = []
    for name, simplify in plain.items():
        if (simpler := simplify(case)) == case:
            continue
        found = run(simpler)
        if failures(found.differences, tolerance=TOLERANCE):
            case, outcome = simpler, found
        else:
            needed.append(name)
    return ", ".join(needed), case, outcome


def explain(outcome: Outcome, size: int, ranks: str) -> tuple[str, str]:
    """Return the module that is wrong, and a sentence on why.

    Args:
        outcome: Of a case that fails.
        size: Ranks of the axis.
        ranks: What they are called.
    """
    wrong = failures(outcome.differences, tolerance=TOLERANCE)
    gradients = outcome.shares
    if any(n.startswith("loss ") and n.endswith(", step 0") for n in wrong):
        return _explain_losses(outcome, wrong, size, ranks)
    if gradients:
        return _explain_gradients(gradients, outcome.norms, size, ranks)
    got, want = outcome.norms
    if any(n.startswith("gradient norm, step 0") for n in wrong):
        square = (got / want) ** 2 if want else math.nan
        how = "too often" if got > want else "too rarely"
        return "the gradient norm", (
            f"every gradient is right, the square of their norm {square:.4g} times what it must "
            f"be: over the {ranks} some are counted {how}"
        )
    if any(n.startswith("clip coefficient, step 0") for n in wrong):
        return "clipping", "the norm is right, what the gradient is multiplied with is not"
    parameters = [n.removeprefix("parameter ") for n in wrong if n.startswith("parameter ")]
    if parameters:
        return _modules(parameters), (
            f"the first gradient is right, what becomes of the parameters is not: the optimizer's "
            f"state over the {ranks}, or the gather of what it changed"
        )
    return ", ".join(wrong), f"wrong after the first step, over the {ranks}"


def _explain_losses(
    outcome: Outcome, wrong: Mapping[str, float], size: int, ranks: str
) -> tuple[str, str]:
    for name, (got, want) in outcome.flows.items():
        if abs(got - want) > CLOSE * want:
            return name, (
                f"in the forward pass the norm of what it adds to the stream is "
                f"{math.sqrt(got / want):.6g} times what it must be, and everything before it is "
                f"right: over the {ranks} a sum is missing or doubled, or a rank sees the wrong "
                f"tokens or weights"
            )
    terms = [n for n in outcome.losses if f"loss {n}, step 0" in wrong]
    ratios = {n: outcome.losses[n][0] / outcome.losses[n][1] for n in terms}
    kinds = {n: _kind(Share(ratio, 0.0, 1.0, 1), size) for n, ratio in ratios.items()}
    told = ", ".join(f"{n} {ratio:.6g} times" for n, ratio in ratios.items())
    if len(set(kinds.values())) == 1 and "scaled" not in kinds.values():
        kind = next(iter(kinds.values()))
        how = "multiplied with" if kind == "doubled" else "divided by"
        return "every loss" if len(terms) == len(outcome.losses) else ", ".join(terms), (
            f"{told} what it must be, and what the blocks give is right: its sum or its count is "
            f"{how} the {size} {ranks} once too often, or one of both is not summed over them"
        )
    return "the head or " + ", ".join(terms), (
        f"{told} what it must be, and what the blocks give is right: over the {ranks} its sum or "
        f"its count is wrong, or a merge of the slices of the vocabulary"
    )


def _explain_gradients(
    shares: Mapping[str, Share], norms: tuple[float, float], size: int, ranks: str
) -> tuple[str, str]:
    kinds: dict[str, list[str]] = {}
    for name, share in shares.items():
        kinds.setdefault(_kind(share, size), []).append(name)
    order = ("unsummed", "doubled", "averaged", "scaled", "other")
    kind = next(k for k in order if k in kinds)
    names = kinds[kind]
    ratio = shares[names[0]].ratio
    where = _modules(names)
    sentences = {
        "unsummed": f"each of the {ranks} keeps its own share of the gradient, and the shares sum "
        f"up to the right one: their sum is missing (is the layout declared partial or spread?)",
        "doubled": f"the gradient is {ratio:.4g} times what it must be: it is summed over the "
        f"{ranks} once too often, or a divisor of {size} is missing",
        "averaged": f"the gradient is 1/{1 / ratio:.4g} of what it must be: a sum over the {ranks} "
        f"is missing, or it is divided by their number once too often",
        "scaled": f"the gradient is {ratio:.6g} times what it must be: a wrong divisor or clip "
        f"coefficient, no multiple of the {size} {ranks}",
        "other": f"the gradient is no multiple of the right one: over the {ranks} a part of it is "
        f"missing, doubled or of the wrong tokens",
    }
    everything = len(names) > 1 and math.isclose(norms[0], abs(ratio) * norms[1], rel_tol=1e-6)
    if everything and kind in ("doubled", "averaged", "scaled"):
        where = f"every parameter ({where})"
    return where, sentences[kind]


def _kind(share: Share, size: int) -> str:
    """Name how a gradient is wrong."""
    if share.holders > 1 and share.summed < CLOSE:
        return "unsummed"
    if share.residual > CLOSE or share.ratio <= 0:
        return "other"
    if size > 1:
        power = math.log(share.ratio) / math.log(size)
        if abs(power) > CLOSE and abs(power - round(power)) < CLOSE:
            return "doubled" if power > 0 else "averaged"
    return "scaled"


def _modules(names: list[str]) -> str:
    """Name modules, the one nearest to the loss first, without the numbers of blocks."""
    ordered = sorted(names, key=_depth, reverse=True)
    kinds: dict[str, list[str]] = {}
    for name in ordered:
        parts = name.split(".")
        block = parts[1] if parts[0] == "blocks" else ""
        rest = ".".join(parts[2:] if block else parts)
        kinds.setdefault(rest, []).append(block)
    shown = [
        rest + (f" (block {', '.join(blocks)})" if blocks[0] else "")
        for rest, blocks in kinds.items()
    ]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more


def _depth(name: str) -> tuple[float, str]:
    """Order parameters as the forward pass meets them."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return float(parts[1]), name
    return (-1.0 if parts[0] == "embedding" else math.inf), name
