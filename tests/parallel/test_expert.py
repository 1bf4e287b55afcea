"""Experts spread over ranks equal plain loops over all experts on one rank: outputs, gradients."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from warploom.parallel.checkpoint import Entry, load, save
from warploom.parallel.collectives import observed
from warploom.parallel.data.buckets import shard_rows
from warploom.parallel.expert import MoE, bias_entries, update_biases
from warploom.parallel.initialise import normal_
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import assemble, layouts, narrow

D, HIDDEN, E, K, N = 6, 8, 8, 2, 3  # N documents a data-parallel rank

LOSSES = {"balance": "sequence", "z_loss": True}
V3 = {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "bias": True}
GPT_OSS = {"score": "softmax_after", "router_bias": True, "expert_bias": True, "clamp": 1.5}
OPTIONS = {
    "losses": LOSSES,
    "shared": {"shared": 8, **LOSSES, "chunks": 2},
    "v3": {**V3, "chunks": 3, "shared": 4},
    "batch": {"balance": "batch", "normalise": False, "top_k": 3},
    "replicated": {"sequence_parallel": False, "shared": 8, "shared_gate": True, **LOSSES},
    "gpt-oss": {**GPT_OSS, "chunks": 2},
    "biases": {"expert_bias": True, "shared": 4, "shared_gate": True, "normalise": False},
    "one expert": {"top_k": 1, "skew": True, "balance": "sequence"},
}
MESHES = {
    2: ["ep2", "etp2", "tp2,ep2", "cp2,ep2", "tp2", "tp2,etp2"],
    4: ["ep4", "tp2,dp2,ep2,etp2", "tp2,ep4", "tp2,cp2,ep2", "tp4,etp2", "rep2,dp2,ep2"],
}


def _randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(mesh=None, *, skew=False, top_k=K, **options):
    """Build the layer on the groups of `mesh`, or whole on one rank: the same logical values."""
    torch.manual_seed(3)
    groups = {"group": None}
    if mesh is not None:
        groups = {"group": mesh.ep, "etp_group": mesh.etp, "tp_group": mesh.tp}
        groups["context_group"] = mesh.cp
    layer = MoE(D, HIDDEN, E, top_k, **groups, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(40)
        for name, layout in layouts(layer).items():
            if "bias" in name:
                normal_(layer.get_parameter(name), layout, seed=4, std=0.7)
        if skew:
            layer.router.weight[5] += 1000.0
        if layer.router.bias is not None:
            layer.router.bias.copy_(_randn(E, seed=8) / 10)
    return layer


def logical(layer, mesh=None):
    """Return the logical weights, as leaves."""
    world = None if mesh is None else mesh.world
    found = assemble(dict(layer.named_parameters()), layouts(layer), world)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def _swiglu(x, weights, name):
    gate, up = (x @ weights[f"{name}{part}.weight"].t() for part in ("gate", "up"))
    down = name.replace("gate_up.", "") + "down.weight"
    return (F.silu(gate) * up) @ weights[down].t()


def _expert(x, weights, e, clamp=None):
    """Serve a token by one expert."""

    def product(x, name):
        bias = weights.get(f"experts.{e}.{name}.bias", torch.zeros(()))
        return x @ weights[f"experts.{e}.{name}.weight"].t() + bias

    gate, up = product(x, "gate"), product(x, "up")
    if clamp is None:
        return product(F.silu(gate) * up, "down")
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return product((up + 1) * gate * torch.sigmoid(1.702 * gate), "down")


def choose(x, weights, *, bias=None, top_k=K, score="softmax", groups=1, top_groups=1, **rest):
    """Route one token after the other, in plain Python."""
    logits = x @ weights["router.weight"].t()
    if rest.get("router_bias"):
        logits = logits + weights["router.linear_bias"]
    scores = torch.sigmoid(logits) if score == "sigmoid" else logits.softmax(1)
    chosen, kept = [], []
    for line in scores:
        values = line.detach() + (0 if bias is None else bias.double())
        size = E // groups
        best = [sum(sorted(values[g * size : (g + 1) * size].tolist())[-2:]) for g in range(groups)]
        opened = sorted(range(groups), key=lambda g: -best[g])[:top_groups]  # noqa: B023
        order = sorted(
            (e for e in range(E) if e // size in opened),
            key=lambda e: -values[e],  # noqa: B023
        )[:top_k]
        part = line[order]
        part = part / part.sum() if rest.get("normalise", True) else part
        chosen.append(order)
        kept.append(part * rest.get("scale", 1.0))
    return chosen, kept, scores / scores.sum(1, keepdim=True), logits


def oracle(x, weights, documents, *, dropped=frozenset(), **options):
    """Serve tokens by plain loops: y and both losses, of all documents."""
    chosen, kept, probabilities, logits = choose(x, weights, **options)
    rows = []
    for t in range(len(x)):
        row = x[t] * 0
        for j, e in enumerate(chosen[t]):
            if documents[t] >= 0 and (t, j) not in dropped:
                row = row + kept[t][j] * _expert(x[t], weights, e, options.get("clamp"))
        rows.append(row)
    y = torch.stack(rows) if rows else x * 0
    if options.get("shared"):
        gate = (
            torch.sigmoid(x @ weights["shared_gate.weight"].t())
            if options.get("shared_gate")
            else 1
        )
        y = y + gate * _swiglu(x, weights, "shared.gate_up.")
    balance = x.new_zeros(())
    for d in set(documents.tolist()) - {-1}:
        own = [t for t in range(len(x)) if documents[t] == d]
        counts = torch.tensor([sum(chosen[t].count(e) for t in own) for e in range(E)])
        mean = sum(probabilities[t] for t in own)
        k = options.get("top_k", K)
        balance = balance + E / (k * len(own) ** 2) * (counts * mean).sum()
    z = sum((logits[t].logsumexp(0) ** 2 for t in range(len(x)) if documents[t] >= 0), x.sum() * 0)
    return y, {"load_balance": balance, "router_z": z}


def _tokens(mesh, replicated, skew, even):
    """Return all tokens, their documents and upstream gradients, and which are this rank's."""
    d = mesh.degrees
    inner = 1 if replicated else d.tp
    parts = inner * d.cp * (d.dp or 1) * d.rep
    sizes = [[5, 0, 7, 2], [3, 6, 0, 1]][d.cp > 1][:parts]
    if even and not replicated:  # the linears of shared experts need equal parts over tp
        sizes = [sizes[at // d.tp] for at in range(parts)]
    total = sum(sizes)
    x, dy = _randn(total, D, seed=1), _randn(total, D, seed=2)
    x = x.abs() if skew else x
    documents = torch.randint(-1, N, (total,), generator=torch.Generator().manual_seed(3))
    share = mesh.rank // (d.tp if replicated else 1)
    start = sum(sizes[:share])
    own = slice(start, start + sizes[share])
    of_batch = torch.arange(parts).div(inner * d.cp, rounding_mode="floor")
    shift = of_batch.repeat_interleave(torch.tensor(sizes)) * N
    return x, dy, documents, torch.where(documents < 0, -1, documents + shift), own


def _reduced(layer, mesh):
    """Sum the gradients over the groups that the layouts name, and put them together."""
    made, found = layouts(layer), {}
    for path, parameter in layer.named_parameters():
        found[path] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        )
        replicas = mesh.edp if made[path].expert else mesh.shard
        for group in (*made[path].partial, replicas, mesh.rep):
            if group is not None:
                dist.all_reduce(found[path], group=group)
    return assemble(found, made, mesh.world)


def _close(got, want, name):
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda m: f"{name}: {m}")


def _equals_oracle(text, names):
    mesh = Mesh.build(text)
    for name in names:
        options = dict(OPTIONS[name])
        replicated = not options.get("sequence_parallel", True)
        skew, even = options.get("skew", False), bool(options.get("shared"))
        layer = build(mesh, **options)
        weights = logical(layer, mesh)
        for key, value in logical(build(**options)).items():
            assert torch.equal(weights[key], value), f"{key} starts alike under every topology"
        x, dy, documents, everywhere, own = _tokens(mesh, replicated, skew, even)
        x.requires_grad_()
        if options.get("balance") == "batch":
            everywhere = torch.where(everywhere < 0, -1, everywhere // N)
        want, wanted = oracle(x, weights, everywhere, **{**options, "bias": layer.router.bias})
        objective = (want * dy).sum()
        scales = {"load_balance": 0.7, "router_z": 0.03}
        here = [key for key, flag in zip(scales, ("balance", "z_loss"), strict=True)
                if options.get(flag)]  # fmt: skip
        objective = objective + sum(scales[key] * wanted[key] for key in here)
        gradients = torch.autograd.grad(
            objective, [x, *weights.values()], allow_unused=True, materialize_grads=True
        )
        mine = x.detach()[own].clone().requires_grad_()
        y, losses = layer(mine, documents[own], N)
        assert list(losses) == here
        _close(y, want[own], f"{name} y")
        total = (y * dy[own]).sum() + sum(scales[key] * losses[key] for key in here)
        total.backward()
        _close(mine.grad, gradients[0][own], f"{name} dx")
        for key in here:
            value = losses[key].detach().clone()
            if mesh.tp is not None:
                both = [torch.empty_like(value) for _ in range(mesh.tp.size())]
                dist.all_gather(both, value, group=mesh.tp)
                assert all(torch.equal(v, value) for v in both)
            if mesh.tokens is not None:
                dist.all_reduce(value, group=mesh.tokens)
            _close(value, wanted[key], f"{name} {key}")
        found = _reduced(layer, mesh)
        assert found.keys() == weights.keys()
        for key, gradient in zip(weights, gradients[1:], strict=True):
            _close(found[key], gradient, f"{name} {key}")


def _autocast_is_near(text):
    """With all experts chosen, so that rounding moves no token."""
    mesh = Mesh.build(text)
    layer = build(mesh, top_k=E, shared=8, sequence_parallel=False, **LOSSES).float()
    x, dy = _randn(6, D, seed=1).float(), _randn(6, D, seed=2).float()
    results = []
    for on in (False, True):
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            y, losses = layer(mine)
        ((y * dy).sum() + sum(losses.values())).backward()
        results.append([y.detach().float(), mine.grad, *(p.grad for p in layer.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_autocast_is_near_on_one_rank():
    _autocast_is_near("")


def _on_two_ranks():
    group = dist.group.WORLD
    for text in ("ep2", "tp2,etp2"):
        _autocast_is_near(text)
    layer = build(Mesh.build("tp2,ep2"), shared=8, bias=True)
    twin, x = copy.deepcopy(layer), _randn(6, D, seed=1)
    assert twin.group is twin.shared.down.group is twin.router.tp_group is group
    assert twin.experts.down is not layer.experts.down
    assert torch.equal(twin(x)[0], layer(x)[0])
    other = [dist.new_group([rank]) for rank in (0, 1)][1 - dist.get_rank()]
    for name in ("tp_group", "context_group"):
        with pytest.raises(ValueError, match="must be a process group that this rank is in"):
            MoE(D, HIDDEN, E, K, group=None, **{name: other})


def test_autocast_copies_and_foreign_groups_on_two_ranks(ranks):
    ranks(2, _on_two_ranks)


def _compiled():
    layer = build(Mesh.build("tp2,ep2"), shared=8, chunks=2, **LOSSES)
    dy, results = _randn(6, D, seed=2), []
    for run in (layer, torch.compile(layer, backend="eager")):
        for seed in (1, 2):
            layer.zero_grad()
            x = _randn(6, D, seed=seed).requires_grad_()
            y, losses = run(x)
            ((y * dy).sum() + sum(losses.values())).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_a_compiled_layer_equals_the_eager_one(ranks):
    ranks(2, _compiled)


def _overlaps(chunks):
    mesh = Mesh.build("ep2")
    layer = build(mesh, chunks=chunks, balance="sequence")
    whole = build(mesh, balance="sequence")
    x, dy = _randn(7, D, seed=mesh.rank), _randn(7, D, seed=2)
    events = []

    def watch(call):
        events.append(f"{call.op} {call.shape[-1]}")
        return nullcontext()

    def computed(module, args, out):
        events.append("compute")
        out.register_hook(lambda _: events.append("compute"))

    layer.experts.register_forward_hook(computed)
    results = []
    for module in (layer, whole):
        mine = x.clone().requires_grad_()
        with observed(watch):
            y, losses = module(mine)
            events.append("backward")
            ((y * dy).sum() + losses["load_balance"]).backward()
        results.append([y, mine.grad, *(p.grad for p in module.parameters())])
        if module is layer:
            forward, backward = (
                " ".join(events[: events.index("backward")]),
                " ".join(events[events.index("backward") + 1 :]),
            )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    send, work = f"all_to_all {D}", "compute"
    both = [send, send, *[work, send, send] * (chunks - 2), work, send, work, send]
    assert forward == " ".join(["all_to_all 4", *both])
    assert backward == " ".join(both)


def test_the_next_dispatch_is_under_way_while_experts_compute(ranks):
    ranks(2, _overlaps, 3)


def _in_a_foreign_program():
    """A plain torch model, whose only word for ranks is a process group; trained by hand."""
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self, group):
            super().__init__()
            self.enter = torch.nn.Linear(4, D)
            self.moe = MoE(D, HIDDEN, E, K, group=group, bias=True)

        def forward(self, x):
            return self.moe(self.enter(x).tanh())[0].square().mean()

    torch.manual_seed(5)
    model = Block(dist.group.WORLD)
    torch.manual_seed(5)
    alone = Block(None)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    half = x.chunk(2)[dist.get_rank()]
    for _ in range(3):
        for module, part in ((model, half), (alone, x)):
            module.zero_grad()
            module(part).backward()
        for name, p in model.named_parameters():
            if "experts" not in name:
                dist.all_reduce(p.grad)
            p.grad /= 2
        with torch.no_grad():
            for module in (model, alone):
                for p in module.parameters():
                    p -= 0.5 * p.grad
        update_biases(model, 0.01, dist.group.WORLD)
        update_biases(alone, 0.01)
    assert torch.equal(model.moe.router.bias, alone.moe.router.bias)
    assert model.moe.router.bias.any()
    torch.testing.assert_close(model.enter.weight, alone.enter.weight)
    torch.testing.assert_close(model.moe.router.weight, alone.moe.router.weight)
    held = alone.moe.experts.down.chunk(2)[dist.get_rank()]
    torch.testing.assert_close(model.moe.experts.down, held)


def test_in_a_foreign_program(ranks):
    ranks(2, _in_a_foreign_program)


def _entries(layer, mesh):
    """List what a run keeps: shards of the weights, as an optimizer has them, and the bias."""
    made, found = layouts(layer), bias_entries(layer)
    for path, parameter in layer.named_parameters():
        replicas = mesh.edp if made[path].expert else mesh.shard
        start, stop = shard_rows(len(parameter), replicas)
        own = parameter.detach()[start:stop]
        found.append(Entry("master", own, narrow(made[path], start, stop)))
    return found


def _travels(folder, saved, loaded):
    for name in ("v3", "gpt-oss"):
        _travels_with(f"{folder}/{name}", saved, loaded, {"bias": True, **OPTIONS[name]})


def _travels_with(folder, saved, loaded, options):
    mesh = Mesh.build(saved)
    layer = build(mesh, **options)
    want = logical(layer, mesh)
    path = save(folder, _entries(layer, mesh), {"step": 1}, mesh)
    mesh = Mesh.build(loaded)
    layer = build(mesh, **options)
    bias = layer.router.bias.clone()
    entries = _entries(layer, mesh)
    for entry in entries:
        entry.tensor.zero_()
    load(path, entries, mesh)
    assert torch.equal(layer.router.bias, bias)
    for key, value in logical(layer, mesh).items():
        assert torch.equal(value, want[key]), key


@pytest.mark.parametrize(("saved", "loaded"), [("ep2", "tp2,etp2"), ("etp2", "ep2")])
def test_a_checkpoint_travels_between_topologies(ranks, tmp_path, saved, loaded):
    ranks(2, _travels, str(tmp_path), saved, loaded)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_rank_equals_plain_loops(name):
    _equals_oracle("", [name])


@pytest.mark.parametrize("text", MESHES[2])
def test_two_ranks_equal_plain_loops(ranks, text):
    ranks(2, _equals_oracle, text, list(OPTIONS))


@pytest.mark.parametrize("text", MESHES[4])
def test_four_ranks_equal_plain_loops(ranks, text):
    ranks(4, _equals_oracle, text, list(OPTIONS))
