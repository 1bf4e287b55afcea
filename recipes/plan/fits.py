"""Whether a mesh can split a model: judged from sizes alone, before anything is built."""

from collections.abc import Callable

from warploom.kernels.gemm import Fp8Recipe
from warploom.models.architecture import Architecture
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees
from warploom.parallel.tensor import check_widths


def check(architecture: Architecture, degrees: Degrees, *, stages: int | None = None) -> None:
    """Refuse degrees that do not divide what they split.

    Args:
        architecture: Sizes.
        degrees: Degrees of parallelism; dp may be open.
        stages: Pipeline stages; by default one a pipeline rank.

    Raises:
        ValueError: In one sentence, with the degrees that fit.
    """
    a, d = architecture, degrees
    dense = any(a.routed(layer) is None for layer in range(a.layers))
    _need(
        d.tp,
        "tp",
        f"heads ({a.heads}), and divide or be divided by kv_heads ({a.kv_heads})",
        lambda tp: a.heads % tp == 0 and (a.kv_heads % tp == 0 or tp % a.kv_heads == 0),
    )
    if dense:
        _need(d.tp, "tp", f"hidden ({a.hidden})", lambda tp: a.hidden % tp == 0)
    if a.ssm is not None:
        heads, groups = a.ssm.heads, a.ssm.groups
        what = f"ssm.heads ({heads}), and divide or be divided by ssm.groups ({groups})"
        _need(
            d.tp, "tp", what, lambda tp: heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        )
        held = heads // d.tp
        what = f"the ssm heads of a tensor-parallel rank ({held})"
        _need(d.cp, "cp", what, lambda cp: held % cp == 0)
    if a.experts is not None and (shared := a.experts.shared):
        _need(d.tp, "tp", f"experts.shared ({shared})", lambda tp: shared % tp == 0)
    _need(d.uly, "uly", f"cp ({d.cp})", lambda uly: d.cp % uly == 0)
    own = a.heads // d.tp
    _need(d.uly, "uly", f"the heads of a tensor-parallel rank ({own})", lambda uly: own % uly == 0)
    if a.experts is None:
        for axis, degree in (("ep", d.ep), ("etp", d.etp)):
            if degree > 1:
                raise ValueError(
                    f"{axis}{degree} splits experts, but the model is dense: leave {axis} out"
                )
    else:
        count, width = a.experts.count, a.experts.hidden
        _need(d.ep, "ep", f"experts.count ({count})", lambda ep: count % ep == 0)
        _need(d.etp, "etp", f"experts.hidden ({width})", lambda etp: width % etp == 0)
    Stages.deal(a.layers, range(stages or d.pp))


def check_fp8(architecture: Architecture, degrees: Degrees, recipe: Fp8Recipe) -> None:
    """Refuse widths of a rank that FP8 products cannot serve.

    Args:
        architecture: Sizes.
        degrees: Degrees of parallelism that fit it; dp may be open.
        recipe: How the products are rounded.

    Raises:
        ValueError: In one sentence, for the first that does not fit.
    """
    a, tp = architecture, degrees.tp
    heads, keys = a.heads // tp, max(a.kv_heads // tp, 1)
    widths = {
        "width": a.width,
        "heads x head_dim": heads * a.head_dim,
        "(heads + 2 kv_heads) x head_dim": (heads + 2 * keys) * a.head_dim,
    }
    if any(a.routed(layer) is None for layer in range(a.layers)):
        widths["hidden"] = a.hidden // tp
    check_widths(recipe, widths)


def _need(degree: int, axis: str, what: str, fits: Callable[[int], bool]) -> None:
    if fits(degree):
        return
    good = [str(n) for n in range(1, 4 * degree) if fits(n)]
    raise ValueError(f"{axis} ({degree}) must divide {what}: {', '.join(good)} would")
