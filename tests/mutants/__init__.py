"""Mutation score of what carries gradients, and what a mutated source calls.

    python -m tests.mutants [--list] [--only parallel/tensor/linear.py] [--sample 6] [--jobs 2]

    sites.py    every site of the sources, and every way to break it
    reach.py    which test enters which function
    zygote.py   a warm process that forks one pytest after the other
    __main__.py the tool: tries each mutant with the tests that reach it, and writes docs/mutants.md

A mutated source reads `__import__("tests.mutants").mutants.drop(gather)(x, group)`.
"""

PAIRS = ("gather", "scatter", "copy", "reduce", "join", "split", "swap")


def _bound(fn, args, kwargs):
    import inspect

    values = inspect.signature(fn).bind(*args, **kwargs)
    values.apply_defaults()
    return values.arguments


def base(name):
    """Name a collective without `_begin` and the underscore of those in place."""
    return name.removesuffix("_begin").rstrip("_")


def _without(kind, given):
    """Return what a rank has when nothing is sent, in the shape that the caller expects."""
    import torch

    if kind == "exchange":
        return [x for x, _ in given["receives"]]
    x, group = given["x"], given["group"]
    if kind in ("gather", "join", "all_gather_rows"):
        return torch.cat([x] * group.size())
    if kind in ("scatter", "reduce_scatter_rows"):
        return x.chunk(group.size())[group.rank()]
    if kind == "split":
        return x.chunk(group.size())[0]
    if kind in ("swap", "all_to_all_rows"):
        rows = x.shape[0] if given["got"] is None else sum(given["got"])
        return x if rows == x.shape[0] else x.new_zeros(rows, *x.shape[1:]) + 0 * x.sum()
    return x


def _pending(fn, given, value):
    if given.get("out") is not None:
        value = given["out"].copy_(value)
    if not fn.__name__.endswith("_begin"):
        return value
    from warploom.parallel.collectives import Pending

    return Pending(value)


def drop(fn):
    """Return the collective that sends nothing, forward or backward."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        if given["group"] is None:
            return fn(*args, **kwargs)
        return _pending(fn, given, _without(base(fn.__name__), given))

    return call


def drop_adjoint(fn):
    """Return the collective whose backward sends nothing."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        x, group = given["x"], given["group"]
        if group is None:
            return fn(*args, **kwargs)
        y = fn(*args, **kwargs).detach()
        local = _without(base(fn.__name__), given)
        if base(fn.__name__) == "gather":
            import torch

            own = group.rank()
            local = torch.cat([x if r == own else x.detach() for r in range(group.size())])
        return y + (local - local.detach())

    return call


def double(fn):
    """Return the collective whose result counts twice; of a pair, its gradient alone."""

    def twice(x):
        if base(fn.__name__) in PAIRS:
            return 2 * x - x.detach()
        import torch

        with torch.no_grad():
            return x.mul_(2) if x.dtype != torch.bool else x.logical_not_()

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        result = fn(*args, **kwargs)
        if given["group"] is None:
            return result
        value = result.wait() if fn.__name__.endswith("_begin") else result
        value = [twice(x) for x in value] if isinstance(value, list) else twice(value)
        return _pending(fn, {}, value)

    return call


def another(group):
    """Return a group of as many other ranks, or `None` in a world that has no others."""
    import torch.distributed as dist

    if group is None or group.size() == dist.get_world_size():
        return None
    ranks, size, own = dist.get_process_group_ranks(group), group.size(), dist.get_rank()
    stride = dist.get_world_size() // size
    across = list(range(own % stride, dist.get_world_size(), stride))[:size]
    block = list(range(own - own % size, own - own % size + size))
    return _made(tuple(across if across != ranks else block))


def _made(ranks, cache={}):  # noqa: B006  a group is made once
    import torch.distributed as dist

    if ranks not in cache:
        cache[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return cache[ranks]


def other(fn):
    """Return the collective over another group."""

    def call(*args, **kwargs):
        given = _bound(fn, args, kwargs)
        group = another(given["group"])
        if given["group"] is None or group is None:
            return drop(fn)(*args, **kwargs)
        given["group"] = group
        if "x" not in given:
            return drop(fn)(*args, **kwargs)
        return fn(given.pop("x"), given.pop("group"), **given)

    return call


def declared(how, value):
    """Return what a layout declares, dropped, doubled or over another group."""
    if isinstance(value, bool):
        return not value
    if how == "drop":
        return ()
    if how == "double":
        return (*value, *value)
    groups = [(another(g[0]), g[1]) if isinstance(g, tuple) else another(g) for g in value]
    return tuple(g for g in groups if (g[0] if isinstance(g, tuple) else g) is not None)
