"""Whether a mesh can split a model: judged from sizes alone, before anything is built."""

from warploom.kernels.gemm import Fp8Recipe
from warploom.models.architecture import Architecture
from warploom.models.fits import check as check_split
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees, check_degree
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
    check_split(a, d)
    if a.ssm is not None:
        check_degree("cp", d.cp, {"ssm heads of a tp rank": a.ssm.heads // d.tp})
    if a.experts is None:
        for axis, degree in (("ep", d.ep), ("etp", d.etp)):
            if degree > 1:
                raise ValueError(
                    f"{axis}{degree} splits experts, but the model is dense: leave {axis} out"
                )
    else:
        check_degree("ep", d.ep, {"experts.count": a.experts.count})
        check_degree("etp", d.etp, {"experts.hidden": a.experts.hidden})
    Stages.deal(a.layers, [stage % d.pp for stage in range(stages or d.pp)])


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
