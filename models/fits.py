"""Whether a mesh can split what more than one layer splits: all of it together."""

from warploom.parallel.mesh import Degrees, check_degree

from .architecture import Architecture


def check(architecture: Architecture, degrees: Degrees) -> None:
    """Refuse tp and uly that do not divide what they split.

    Args:
        architecture: Sizes.
        degrees: Degrees of parallelism; dp may be open.

    Raises:
        ValueError: In one sentence, with the nearest that do.
    """
    a, d = architecture, degrees
    whole, either = {"heads": a.heads}, {"kv_heads": a.kv_heads}
    if any(a.routed(layer) is None for layer in range(a.layers)):
        whole["hidden"] = a.hidden
    if a.ssm is not None:
        whole["ssm.heads"], either["ssm.groups"] = a.ssm.heads, a.ssm.groups
    if a.experts is not None and a.experts.shared:
        whole["experts.shared"] = a.experts.shared
    check_degree("tp", d.tp, whole, either)
    check_degree("uly", d.uly, {"cp": d.cp, "heads of a tp rank": a.heads // d.tp})
