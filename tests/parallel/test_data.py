"""What the stages communicate and hold, against their formulas; buckets; units."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from tests.parallel.toy import stack

from warploom.parallel.collectives import observed
from warploom.parallel.data import Gradients, Units, make_buckets, shard_rows, unit_of
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.sharding import layouts
from warploom.parallel.step import Step, Term

_BUCKET = 100  # elements: several buckets a block


def _step(mesh, zero, *, elements=_BUCKET, micro=2, **kwargs):
    made = stack(mesh, zero=zero, micro=micro, **kwargs)
    step = Step(made.model, made.layouts, made.optimizer, mesh, zero=zero, bucket_elements=elements)
    return made, step


class _Log:
    """Notes every collective, and whatever else is appended."""

    def __init__(self):
        self.events = []

    @contextmanager
    def __call__(self, call):
        self.events.append((call.op, call.bytes))
        yield

    def of(self, op):
        return [event[1] for event in self.events if event[0] == op]


def _padded(model, paths, ranks):
    """Return the bytes of float64 tensors whose rows are padded to a multiple of the ranks."""
    named = dict(model.named_parameters())
    return sum(-(-named[p].shape[0] // ranks) * ranks * named[p][:1].numel() * 8 for p in paths)


def _stages_communicate_as_the_formulas_say():
    mesh = Mesh.build("dp2")
    for zero in range(4):
        made, step = _step(mesh, zero)
        log = _Log()
        made.model.blocks["0"].scale.register_hook(
            lambda g, log=log: log.events.append(("end of a backward", 0))
        )
        for block in made.model.blocks.values():
            block.register_forward_hook(lambda *_, log=log: log.events.append(("forward", 0)))
        batches = made.batches(0)
        assert len(batches) == 3
        with observed(log):
            step(batches, learning_rate=0.1)
        paths = [path for path, _ in made.model.named_parameters()]
        gradient = _padded(made.model, paths, 2)
        buckets = len(step.gradients.sums)
        assert buckets > 4
        ops = [op for op, _ in log.events]
        sums = "all_reduce" if zero == 0 else "reduce_scatter"
        # Beside the gradients: divisors, losses, the norm; nothing is partial here.
        small = 3 if zero == 0 else 0
        times = 3 if zero >= 2 else 1
        assert len(log.of(sums)) == times * buckets + small, zero
        if zero:
            assert sum(log.of(sums)) == times * gradient
        last = [at for at, op in enumerate(ops) if op == "forward"][-1]
        first = ops.index(sums, 1)  # the divisors come first
        assert (first > last) == (zero < 2), "only the last micro-batch communicates below stage 2"
        ends = [at for at, op in enumerate(ops) if op == "end of a backward"]
        before = [at for at, op in enumerate(ops) if op == sums and last < at < ends[-1]]
        assert len(before) >= buckets - 3, "buckets leave while the backward goes on"
        gathered = log.of("all_gather")
        if zero == 0:
            assert gathered == []
        elif zero < 3:
            assert sum(gathered) == gradient // 2
        else:
            root = _padded(made.model, [p for p in paths if not p.startswith("blocks")], 2) // 2
            units = gradient // 2 - root
            assert len(gathered) == 1 + 3 * 2 * 2
            assert sum(gathered) == root + 3 * 2 * units
        step.close()


def test_stages_communicate_as_the_formulas_say(ranks):
    ranks(2, _stages_communicate_as_the_formulas_say)


def _bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _peaks(mesh, zero):
    """Return the most bytes of parameters and of gradients during a step, and those after it."""
    made, step = _step(mesh, zero, blocks=6)
    named = dict(made.model.named_parameters())
    seen = []

    def look(*_):
        full = [p.data for p in named.values()]
        rows = [s.rows for s in made.optimizer.shards.values()]
        grads = [p.grad for p in named.values() if p.grad is not None]
        totals = [one.total for one in step.gradients.sums if one.total is not None]
        seen.append((_bytes([*full, *rows]), _bytes([*grads, *totals])))

    for block in made.model.blocks.values():
        block.register_forward_hook(look)
        block.down.register_full_backward_hook(look)
    for parameter in named.values():
        parameter.register_post_accumulate_grad_hook(look)
    step(made.batches(0), learning_rate=0.1)
    peak = [max(column) for column in zip(*seen, strict=True)]
    seen.clear()
    look()
    block = sum(p.numel() * 8 for n, p in named.items() if n.startswith("blocks.0"))
    whole = sum(p.numel() * 8 for p in named.values())
    own = _padded(made.model, named, mesh.degree("dp")) // mesh.degree("dp")
    step.close()
    return peak, seen[0], whole, block, own


def _memory_falls_as_the_theory_says():
    mesh = Mesh.build("dp4")
    for zero in (0, 1):
        (parameters, gradients), after, whole, _, _ = _peaks(mesh, zero)
        assert parameters == after[0] == whole
        assert gradients >= 0.9 * whole
    (parameters, gradients), after, whole, block, own = _peaks(mesh, 2)
    root = whole - 6 * block
    assert parameters == after[0] == whole
    assert gradients <= own + block + root
    assert after[1] == own
    (parameters, gradients), after, _, _, _ = _peaks(mesh, 3)
    away = 8 * 9 * 6  # a NaN for each parameter of the blocks
    assert parameters <= own + root + block + away
    assert gradients <= own + block + root
    assert after[0] <= own + away + 8
    assert 0.75 * whole > own + root + block, "the limits are well below the whole"


def test_memory_falls_as_the_theory_says(ranks):
    ranks(4, _memory_falls_as_the_theory_says)


class _Uneven(torch.nn.Module):
    """Layers that a rank's batch uses or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3).double() for _ in range(4))

    def counts(self, batch):
        return {"loss": 1}

    def loss(self, batch):
        x = torch.ones(1, 3, dtype=torch.float64)
        for at in batch:
            x = self.layers[at](x).tanh()
        return (Term("loss", x.sum(), 1),)


def _ranks_may_use_different_layers():
    """Buckets leave in one order, though each rank lacks the gradients of other layers."""
    mesh = Mesh.build("dp2")
    used = [[[0, 1], [3]], [[2, 3], [0, 2]]]
    want = _Uneven()
    for batch in used[0] + used[1]:
        (want.loss(batch)[0].sum / 4).backward()
    for zero in (0, 1, 2):
        model = _Uneven()
        made = layouts(model)
        optimizer = AdamW(dict(model.named_parameters()), made, mesh)
        step = Step(model, made, optimizer, mesh, zero=zero, clip=None, bucket_elements=9)
        seen = {}
        optimizer.step = lambda shards, rate, seen=seen: seen.update(shards)
        step(used[mesh.rank], learning_rate=0.1)
        for path, parameter in want.named_parameters():
            shard = optimizer.shards[path]
            gradient = parameter.grad[shard.start : shard.stop]
            torch.testing.assert_close(seen[path], gradient, atol=1e-14, rtol=0)


def test_ranks_may_use_different_layers(ranks):
    ranks(2, _ranks_may_use_different_layers)


def _units_outside_of_a_step():
    mesh = Mesh.build("dp2")
    want = stack(mesh).model
    made, step = _step(mesh, 3)
    batch = made.batches(0)[0]
    shapes = {path: p.shape for path, p in want.named_parameters()}
    assert {path: p.shape for path, p in made.model.named_parameters()} == shapes
    assert all(p.isnan().all() for p in made.model.parameters())
    with pytest.raises(RuntimeError, match="single memory location"):
        made.model.embedding.weight.data.copy_(want.embedding.weight.data)
    with torch.no_grad(), step.opened():
        assert torch.equal(made.model.loss(batch)[0].sum, want.loss(batch)[0].sum)
    with step.opened(whole=True):
        for path, p in made.model.named_parameters():
            assert torch.equal(p, want.get_parameter(path))
    assert all(p.isnan().all() for p in made.model.parameters())
    step.close()
    for path, p in made.model.named_parameters():
        assert torch.equal(p, want.get_parameter(path))
    assert dist.get_world_size() == 2


def test_units_outside_of_a_step(ranks):
    ranks(2, _units_outside_of_a_step)


def _shared_memory_is_refused():
    mesh = Mesh.build("dp2")
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.zeros(4, 2)[:2]
    with pytest.raises(ValueError, match=r"memory to themselves, but weight \(2, 2\) is in memory"):
        Units(model, {}, lambda path: mesh.shard)


def test_shared_memory_is_refused(ranks):
    ranks(2, _shared_memory_is_refused)


def test_units_are_the_entries_of_the_outermost_lists():
    model = torch.nn.Module()
    model.inner = torch.nn.Module()
    model.inner.blocks = torch.nn.ModuleDict(
        {"a": torch.nn.ModuleList([torch.nn.Linear(1, 1)]), "b": torch.nn.Linear(1, 1)}
    )
    model.tail = torch.nn.Linear(1, 1)
    shared = torch.nn.Parameter(torch.zeros(1))
    model.inner.blocks["a"].extra = model.inner.blocks["b"].extra = shared
    model.inner.blocks["b"].weight = model.tail.weight
    assert unit_of(model) == {
        "inner.blocks.a.extra": -1,
        "inner.blocks.a.0.weight": 0,
        "inner.blocks.a.0.bias": 0,
        "inner.blocks.b.weight": -1,
        "inner.blocks.b.bias": 1,
        "tail.bias": -1,
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_buckets_bring_back_what_they_took(ranks):
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (7,), "c": (2, 2, 2), "d": (0, 4), "e": (6, 1)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    group = None if ranks == 1 else dist.ProcessGroup(0, ranks)
    (bucket,) = make_buckets(tensors, lambda path: group)
    flat = bucket.pack(list(tensors.values()), torch.float64)
    back = [torch.empty_like(t) for t in tensors.values()]
    bucket.spill(flat, back)
    for got, want in zip(back, tensors.values(), strict=True):
        assert torch.equal(got, want)
    own = bucket.views(flat[:1])
    for name, tensor in tensors.items():
        assert torch.equal(own[name].float(), tensor[slice(*shard_rows(len(tensor), group))])
    assert torch.equal(bucket.own([v.float() for v in own.values()]).double(), flat[:1])


def test_buckets_hold_one_kind_and_their_limit():
    tensors = {
        str(n): torch.zeros(4, dtype=(torch.float32, torch.float64)[n % 2]) for n in range(7)
    }
    made = make_buckets(tensors, lambda path: None, elements=8)
    assert [bucket.paths for bucket in made] == [("0", "2"), ("1", "3"), ("5",), ("4", "6")]


def _float32_sums_of_16_bits():
    """Each rank's sum is 256 + 1 times 128 in bfloat16, which would lose the ones."""
    mesh = Mesh.build("dp2")
    for zero in range(4):
        weight = torch.nn.Parameter(torch.ones(4, 1, dtype=torch.bfloat16))
        model = torch.nn.Module()
        model.weight = weight
        gradients = Gradients({"weight": weight}, layouts(model), mesh, zero=zero)
        values = [256.0, *[1.0] * 128]
        for at, value in enumerate(values):
            with gradients.backward(last=at == len(values) - 1):
                (weight * value).sum().backward()
        (shard,) = gradients.reduce().values()
        assert shard.dtype == torch.float32
        assert torch.equal(shard, torch.full_like(shard, 2 * 384.0))
        gradients.close()


def test_float32_sums_of_16_bits(ranks):
    ranks(2, _float32_sums_of_16_bits)
