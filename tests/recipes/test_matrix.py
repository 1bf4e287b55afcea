"""The matrix: every legal pair of levels of all axes and options, on meshes of 1, 2, 4 and 8 ranks.

Each case trains three steps in float64 and equals one process to 1e-10: losses, gathered gradients,
their norm, the clip coefficient, the parameters (recipes/verification/case.py, as `warploom
verify`). The full product has some 10^8 legal cases: the slow test draws a sample of it.
"""

import math
import random
from dataclasses import replace

import pytest
from tests.pairwise import covering, uncovered

from warploom.parallel.mesh import Degrees
from warploom.parallel.parity import failures
from warploom.recipes.runner.parallel import Parallel
from warploom.recipes.verification.case import TOLERANCE, prove
from warploom.recipes.verification.plan import Case
from warploom.recipes.verification.shrink import built_in

DENSE = ("tp", "cp", "pp", "dp", "rep")
FACTORS = {
    "pp": (1, 2, 4),
    "tp": (1, 2, 4),
    "cp": (1, 2, 4),
    "dp": (1, 2),
    "rep": (1, 2),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "schedule": ("none", "gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"),
    "microbatches": (1, 2, 4),
    "context": ("none", "ring", "all_gather", "ulysses", "hybrid"),
    "balance": ("none", "zigzag", "document", "contiguous"),
    "model": ("dense", "softmax", "sigmoid"),
    "keys": ("split", "shared"),
    "zero": (1, 0, 2, 3),
    "recompute": ("none", "selective", "full"),
    "optimizer": ("adamw", "muon"),
    "packed": (True, False),
    "tied": (True, False),
    "offload": (False, True),
    "uneven": (False, True),
    "qk_norm": ("head", None),
}


def legal(levels):
    """Say whether a case, as far as it is known, can run on eight ranks."""
    get = levels.get
    if math.prod(get(axis, 1) for axis in DENSE) > 8:
        return False
    inner = [get(axis) for axis in ("tp", "cp", "dp")]
    split = get("ep", 1) * get("etp", 1)
    if split > 8 // (get("pp", 1) * get("rep", 1)):
        return False
    if None not in inner and math.prod(inner) % split:
        return False
    if get("model") == "dense" and split > 1:
        return False
    if "pp" in levels and not _schedule_is_legal(levels):
        return False
    if get("pp") == 1 and get("uneven"):
        return False
    cp = get("cp")
    for name in ("context", "balance"):
        if cp is not None and name in levels and (cp == 1) != (levels[name] == "none"):
            return False
    if {"context", "balance"} <= levels.keys() and (
        (levels["context"] == "none") != (levels["balance"] == "none")
    ):
        return False
    if get("context") == "hybrid" and cp not in (None, 4):
        return False
    return not (get("keys") == "shared" and get("tp", 2) == 1)


def _schedule_is_legal(levels):
    pp, name, m = levels["pp"], levels.get("schedule"), levels.get("microbatches")
    if name is None:
        return True
    if (pp == 1) != (name == "none"):
        return False
    if name == "dualpipev":
        return pp == 2 and m in (None, 4)
    return not (name == "interleaved" and m is not None and m % pp)


def case_of(levels):
    """Build the case of complete levels."""
    uly = {"ulysses": levels["cp"], "hybrid": 2}.get(levels["context"], 1)
    axes = {axis: levels[axis] for axis in (*DENSE, "ep", "etp")} | {"uly": uly}
    mesh = ",".join(f"{axis}{degree}" for axis, degree in axes.items() if degree > 1)
    degrees = Degrees(**axes)
    schedule = levels["schedule"]
    each = 2 if schedule in ("interleaved", "zbv", "dualpipev") else 1
    stages = levels["pp"] * each
    a = built_in(degrees, stages)
    a = replace(a, tied=levels["tied"], qk_norm=levels["qk_norm"], layers=max(2, stages))
    if levels["keys"] == "shared":
        a = replace(a, kv_heads=max(1, levels["tp"] // 2))
    if levels["model"] == "dense":
        a = replace(a, experts=None)
    elif levels["model"] == "sigmoid":
        grouped = {"groups": 2, "top_groups": 1, "top_k": 2, "shared": None, "scale": 2.5}
        a = replace(a, experts=replace(a.experts, score="sigmoid", **grouped))
    uneven = ()
    if levels["uneven"]:  # the last stage has no block of its own
        uneven = (2, *[1] * (stages - 2), 0)
    return Case(
        architecture=a,
        mesh=mesh,
        parallel=Parallel(
            schedule="1f1b" if schedule == "none" else schedule,
            stage_layers=uneven,
            zero=levels["zero"],
            context="all_gather" if levels["context"] == "all_gather" else "ring",
            balance="zigzag" if levels["balance"] == "none" else levels["balance"],
            offload=levels["offload"],
            offload_activations=levels["offload"],
        ),
        microbatches=levels["microbatches"],
        recompute=levels["recompute"],
        optimizer=levels["optimizer"],
        packed=levels["packed"],
    )


def name_of(levels):
    """Write what is not the first level of its factor."""
    changed = {n: level for n, level in levels.items() if level not in ("none", FACTORS[n][0])}
    return "-".join(f"{n}{v}" if isinstance(v, int) else str(v) for n, v in changed.items())


MATRIX = covering(FACTORS, legal)


def random_case(seed):
    """Draw one legal case of the full product."""
    rng = random.Random(seed)
    while True:
        levels = {}
        for name in FACTORS:
            able = [level for level in FACTORS[name] if legal(levels | {name: level})]
            if not able:
                break
            levels[name] = rng.choice(able)
        else:
            return levels


def _proves(pool, levels):
    case = case_of(levels)
    outcome = pool(case.degrees.world, prove, case)
    assert failures(outcome.differences, tolerance=TOLERANCE) == {}


def test_the_matrix_covers_every_legal_pair():
    assert all(legal(levels) for levels in MATRIX)
    assert uncovered(MATRIX, FACTORS, legal) == []
    assert {case_of(levels).degrees.world for levels in MATRIX} == {1, 2, 4, 8}


@pytest.mark.parametrize("levels", MATRIX, ids=name_of)
def test_mesh_equals_one_process(pool, levels):
    _proves(pool, levels)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400))
def test_a_case_of_the_full_product(pool, seed):
    _proves(pool, random_case(seed))
