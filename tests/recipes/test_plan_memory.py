"""Memory on every axis: exactly what was predicted, and as much less as theory says."""

from dataclasses import replace

import pytest
import torch
from tests.models.test_fp8 import RECIPES
from tests.models.test_fp8 import SMALL as NARROW

from warploom.models import cost
from warploom.models.architecture import Experts
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.families import llama, qwen3
from warploom.models.stages import Stages
from warploom.parallel.collectives import gather_json
from warploom.parallel.expert import MoE, record_routing
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.pipeline import Schedule
from warploom.parallel.step import Step
from warploom.parallel.tensor import Fp8Product
from warploom.recipes.plan import memory
from warploom.recipes.plan.tracker import track

DENSE = replace(llama.tiny(), layers=3)
NORMS = replace(qwen3.tiny(), layers=2)
ROUTED = Experts(count=4, top_k=2, hidden=48, shared=32, dense_layers=1, balance=0.1, router_z=0.1)
MOE = replace(llama.tiny(), layers=3, tied=False, experts=ROUTED)
PLAIN = replace(llama.tiny(), layers=2, tied=False, experts=Experts(count=4, top_k=2, hidden=48))


def _batch(made, rows=4, length=26, lengths=None):
    torch.manual_seed(0)
    ids = torch.randint(made.vocabulary, (rows, length + 1))
    documents = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents)


def _forward(model, batch):
    """Run each stage of this rank and return what holds its graph."""
    kept = []
    for stage in model.held:
        x = None
        if stage:
            shape, dtype = model.boundary(stage - 1, batch)
            x = torch.randn(shape, dtype=dtype).requires_grad_()
        y, terms = model.stage(stage, x, batch)
        kept.append((y, [term.sum for term in terms]))
    return kept


def _both(made, batch, mesh, dtype=torch.float32, **options):
    """Return what a micro-batch saves on this rank, measured and predicted."""
    model = Decoder.create(made, mesh=mesh, dtype=dtype, **options)
    served = []
    for module in model.modules():
        if isinstance(module, MoE):
            hook = lambda _, args: served.append(len(args[0]))  # noqa: E731
            module.experts.register_forward_pre_hook(hook)
    with track(model=model) as seen, record_routing() as chosen:
        kept = _forward(model, batch)
        measured = seen.live["activations"]
        assert measured == seen.highest["activations"]
    del kept
    degrees = None if mesh is None else mesh.degrees
    tp = 1 if mesh is None else degrees.tp
    tokens = model.boundary(0, batch)[0][0] * tp
    lengths = batch.document_lengths
    documents = 0 if lengths is None else len(lengths)
    if degrees is not None and degrees.cp == degrees.uly > 1:
        documents = documents or len(batch.tokens)
    elif degrees is None or degrees.cp == 1:
        padded = tokens > batch.tokens.numel()
        documents = (documents or len(batch.tokens)) + 1 if padded else documents
    sent = [int((indices >= 0).sum()) for indices in chosen]
    predicted = memory.activations(
        made,
        tokens,
        dtype=dtype,
        recompute=options.get("recompute", "none"),
        z_loss=options.get("z_loss", 0) > 0,
        context=options.get("context", "ring"),
        stages=model.stages,
        held=model.held,
        total=batch.tokens.numel(),
        documents=documents,
        rows=list(zip(sent, served, strict=True)) if served else None,
        **({} if degrees is None else {"degrees": degrees}),
    )
    return measured, predicted


PACKED = [20, 6, 26, 3, 23, 26]
OPERATORS = "norm,feed_forward,moe"
KV = replace(DENSE, heads=8, kv_heads=2, head_dim=8)  # fewer key/value heads than ranks
V = Stages.deal(3, (0, 1, 1, 0), (1, 1, 1, 0))
ON_TWO = [  # mesh, architecture, lengths of documents, dtype, options
    ("tp2", MOE, PACKED, torch.float32, {"z_loss": 0.1}),
    ("tp2", NORMS, None, torch.bfloat16, {"length": 25, "recompute": OPERATORS}),
    ("cp2", DENSE, PACKED, torch.bfloat16, {}),
    ("cp2", NORMS, None, torch.float32, {"context": "all_gather", "recompute": "selective"}),
    ("cp2,uly2", DENSE, None, torch.float32, {"length": 25}),
    ("cp2,uly2", NORMS, PACKED, torch.bfloat16, {"recompute": "attention"}),
    ("pp2", DENSE, None, torch.float32, {}),
    ("pp2", MOE, PACKED, torch.bfloat16, {"recompute": "full"}),
    ("pp2", DENSE, None, torch.float32, {"stages": V, "recompute": "selective"}),
    ("dp2,ep2", MOE, None, torch.bfloat16, {}),
    ("dp2,etp2", MOE, PACKED, torch.float32, {"recompute": "moe"}),
    ("tp2,ep2", MOE, None, torch.float32, {"length": 25, "recompute": OPERATORS}),
]
ON_FOUR = [
    ("tp4", KV, None, torch.float32, {}),
    ("tp2,cp2", KV, PACKED, torch.bfloat16, {"recompute": "selective"}),
    ("cp4,uly2", KV, None, torch.float32, {"length": 25, "context": "all_gather"}),
    ("tp2,dp2,ep2,etp2", MOE, None, torch.bfloat16, {}),
    ("cp2,pp2,ep2", MOE, PACKED, torch.float32, {"recompute": "selective"}),
]


def _compared(cases):
    """Compare every case on every rank; return those that differ."""
    wrong, meshes = [], {}
    for text, made, lengths, dtype, options in cases:
        mesh = meshes[text] = meshes.get(text) or Mesh.build(text)
        options = dict(options)
        batch = _batch(made, length=options.pop("length", 26), lengths=lengths)
        found = gather_json(_both(made, batch, mesh, dtype, **options), mesh.world)
        wrong += [(text, options, found)] * any(got != want for got, want in found)
    return wrong


@pytest.mark.parametrize("recompute", ["none", "full", "selective", "attention", OPERATORS])
@pytest.mark.parametrize("lengths", [None, PACKED])
def test_one_rank_saves_what_was_predicted(recompute, lengths):
    for made, dtype, z_loss in (
        (DENSE, torch.float32, 0.1),
        (NORMS, torch.bfloat16, 0.0),
        (MOE, torch.bfloat16, 0.1),
        (PLAIN, torch.float64, 0.0),
    ):
        batch = _batch(made, lengths=lengths)
        got, want = _both(made, batch, None, dtype, recompute=recompute, z_loss=z_loss)
        assert got == want


@pytest.mark.parametrize(("size", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_every_rank_saves_what_was_predicted(pool, size, cases):
    assert pool(size, _compared, cases) == []


def test_rows_are_one_pair_for_each_routed_block():
    with pytest.raises(ValueError, match=r"each routed block that is held \(2\), got 1"):
        memory.activations(MOE, 8, rows=[(8, 8)])


def _tensor_and_context():
    """Return what rank 0 saves alone, under tp2, and under cp2 by the ring and by all-gather."""
    batch = _batch(DENSE)
    tp, cp = Mesh.build("tp2"), Mesh.build("cp2")
    runs = [
        (None, {}),
        (None, {"recompute": "selective"}),
        (tp, {}),
        (tp, {"recompute": "selective"}),
    ]
    runs += [(cp, {}), (cp, {"context": "all_gather"})]
    return [_both(DENSE, batch, mesh, **options)[0] for mesh, options in runs]


def test_tp_and_cp_divide_activations(pool):
    alone, selective, tp, tp_selective, ring, gathered = pool(2, _tensor_and_context)
    tokens, a, row = 4 * 26, DENSE, 4 * DENSE.width
    shared = tokens * (4 * a.head_dim + 8)  # tables of angles and ids, on each tp rank
    inputs = tokens * row  # of what follows a norm or the head, gathered on each tp rank
    assert tp - shared - tokens == pytest.approx(
        (alone - shared - (2 * a.layers + 1) * inputs) / 2 + (2 * a.layers + 1) * inputs, rel=1e-9
    )
    # recomputed norms keep no gathered input: but for the head's, all is divided
    assert tp_selective - shared - tokens == (selective - shared - inputs) / 2 + inputs
    head = a.vocabulary * row
    assert ring - head == (alone - head) / 2  # O(S / R): the gradient of the head alone is whole
    assert gathered - ring == a.layers * tokens * 2 * a.kv_heads * a.head_dim * 4


def _pipelined(name, microbatches, recompute):
    """Return, for each rank, the most saved bytes of a step and parameters; and as predicted."""
    made = replace(DENSE, layers=4, tied=False)
    mesh, table = Mesh.build("pp2"), Schedule.named(name, 2, microbatches)
    stages = Stages.deal(4, table.placement)
    model = Decoder.create(made, mesh=mesh, stages=stages, recompute=recompute)
    optimizer = AdamW(dict(model.named_parameters()), model.layouts(), mesh)
    step = Step(model, model.layouts(), optimizer, mesh, schedule=table)
    batches = [_batch(made) for _ in range(microbatches)]
    with track(model=model, optimizer=optimizer) as seen:
        step(batches, learning_rate=1e-3)
    step.close()
    plan = memory.memory(
        made,
        4 * 26,
        degrees=mesh.degrees,
        recompute=recompute,
        stages=stages,
        schedule=table,
        rank=mesh.rank,
    )
    causes = ("parameters", "gradients", "optimizer", "activations")
    found = [[seen.highest[c] for c in causes], [getattr(plan, c) for c in causes]]
    return gather_json(found, mesh.world)


def test_pp_divides_parameters_and_schedules_bound_what_is_in_flight(pool):
    found = {}
    for name in ("gpipe", "1f1b", "zbv"):
        found[name] = pool(2, _pipelined, name, 4, "none")
        for got, want in found[name]:
            assert got[:3] == want[:3]
            shared = 1.0 if name != "zbv" else 0.97  # the stages of a rank share tables
            assert want[3] * shared <= got[3] <= want[3]
    made = replace(DENSE, layers=4, tied=False)
    embedding = made.vocabulary * made.width * 4
    blocks = 4 * sum(cost.parameters(made).values()) - 2 * embedding - made.width * 4
    assert [rank[0][0] for rank in found["gpipe"]] == [
        blocks / 2 + embedding,
        blocks / 2 + embedding + made.width * 4,
    ]
    first, last = (rank[0][3] for rank in found["gpipe"])  # four micro-batches in flight
    assert [rank[0][3] for rank in found["1f1b"]] == [first / 2, last / 4]


def _sharded(made, dtype):
    """Return for each ZeRO stage what rank 0 holds, measured and predicted, and its peak."""
    mesh, found = Mesh.build("dp2"), []
    for zero in range(4):
        model = Decoder.create(made, mesh=mesh, dtype=dtype, recompute="full")
        parameters, layouts = dict(model.named_parameters()), model.layouts()
        optimizer = AdamW(parameters, layouts, mesh)
        step = Step(model, layouts, optimizer, mesh, zero=zero, bucket_elements=made.width**2)
        gradients, there = step.gradients, []

        def note(*_, model=model, there=there):
            there.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))

        for block in model.blocks.values():
            block.register_forward_pre_hook(note)  # runs again in the backward: recompute is full
        with track(model=model, optimizer=optimizer, gradients=gradients) as seen:
            held = dict(seen.live)
            step.accumulate([_batch(made, rows=1)] * 2, {"language_model": 1.0})
            gradients.reduce()
        with track(model=model, gradients=gradients) as after:
            most = max(seen.highest["gradients"], after.live["gradients"])
        plan = memory.memory(made, 26, dtype=dtype, degrees=mesh.degrees, zero=zero)
        states = [held["parameters"], most, held["optimizer"]]
        found.append((states, plan, seen.peak.total, max(there)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_divides_states(pool, dtype):
    made = replace(DENSE, layers=12)
    found = pool(2, _sharded, made, dtype)
    for held, plan, *_ in found[:3]:
        assert held == [plan.parameters, plan.gradients, plan.optimizer]
    zeroth, first, second, third = (held for held, *_ in found)
    assert first[2] == second[2] == zeroth[2] / 2
    whole = 4 * sum(cost.parameters(made).values())
    assert (second[1], third[1]) == (whole / 2, whole / 2)
    # at rest there are own rows, which are the masters where nothing is narrower, and shapes
    rows, shapes = zeroth[0] / 2, third[0]
    assert third[2] == first[2] + rows
    assert shapes == dtype.itemsize * (12 * 6 + 2)
    # in a step there are the root and a unit, and one more on its way
    away = dtype.itemsize * 11 * 6
    plan, there = found[3][1].parameters, found[3][3] + rows - away
    unit = (zeroth[0] - (made.vocabulary + 1) * made.width * dtype.itemsize) / 12
    assert there == plan - unit < 0.75 * zeroth[0]
    peaks = [peak for _, _, peak, _ in found[:3]]
    assert peaks[0] > peaks[1] > peaks[2]


def _saved_bytes(model, batch):
    """Sum the storages that autograd keeps, each once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, total = {}, 0

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        term = model.loss(batch)[0]
    total = sum(storage.nbytes() for storage in kept.values())
    assert term.sum.grad_fn is not None
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "made",
    [replace(llama.tiny(), tied=False), llama.tiny(), qwen3.tiny()],
    ids=["llama", "tied", "qwen3"],
)
def test_planned_activations_are_what_autograd_saves(made, dtype):
    made = replace(made, layers=3)
    model = Decoder.create(made, dtype=dtype)
    plan = memory.activations(made, 48, dtype=dtype)
    assert _saved_bytes(model, _batch(made, 2, 24)) == plan


def test_planned_memory():
    made = llama.smollm2_135m()
    plan = memory.memory(made, 2048, dtype=torch.bfloat16, degrees=Degrees(dp=4))
    count = 134_515_008
    assert plan.parameters == 2 * count
    assert plan.gradients == 4 * count + count  # accumulated, and own rows of the sum
    assert plan.optimizer == 12 * count // 4
    assert plan.total == sum((plan.parameters, plan.gradients, plan.optimizer, plan.activations))
    assert memory.memory(made, 2048).optimizer == 8 * count
    full = memory.activations(made, 2048, recompute="full")
    assert full < 0.2 * memory.activations(made, 2048)
    with pytest.raises(ValueError, match="recompute must be none, full.* got 'half'"):
        memory.activations(made, 2048, recompute="half")


@pytest.mark.parametrize(
    "name", ["block", *(pytest.param(s, marks=pytest.mark.slow) for s in ("tensor", "row", "mx"))]
)
def test_memory_in_fp8_is_what_was_predicted(name, monkeypatch):
    recipe, activations = RECIPES[name], memory.activations
    monkeypatch.setattr(memory, "activations", lambda *a, **k: activations(*a, fp8=recipe, **k))
    made = replace(NARROW, max_positions=64)
    batch = _batch(made, length=40)
    for recompute in ("none", "full", "selective", "attention,feed_forward"):
        got, want = _both(made, batch, None, torch.float32, recompute=recompute, fp8=recipe)
        assert got == want, recompute
    assert [*_both(made, batch, None, torch.bfloat16, fp8=recipe)] == [
        activations(made, 160, dtype=torch.bfloat16, fp8=recipe)
    ] * 2


@pytest.mark.parametrize("name", ["tensor", "row", "block", "mx"])
def test_both_copies_of_the_weights_are_planned(name):
    recipe = RECIPES[name]
    model = Decoder.create(NARROW, fp8=recipe)
    held = {}
    for layer in model.modules():
        if isinstance(getattr(layer, "fp8", None), Fp8Product):
            q = layer.fp8.codes(layer.weight, copy=True)
            for t in (q.data, q.scale, q.data_t, q.scale_t):
                held[t.data_ptr()] = t.nbytes
    plans = [memory.memory(NARROW, 48, fp8=r).parameters for r in (recipe, None)]
    assert sum(held.values()) == pytest.approx(plans[0] - plans[1], rel=1e-3)
