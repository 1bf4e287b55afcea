"""Memory on every axis: exactly what was predicted, and as much less as theory says."""

from dataclasses import replace

import pytest
import torch

from warploom.models import cost
from warploom.models.architecture import Experts
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.families import llama, qwen3
from warploom.parallel.collectives import gather_json
from warploom.parallel.expert import MoE, record_routing
from warploom.parallel.memory import track
from warploom.parallel.mesh import Mesh

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
    predicted = cost.activations(
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


def _both_on_all(cases):
    """Compare every case on every rank; return those that differ."""
    wrong, meshes = [], {}
    for text, made, lengths, dtype, options in cases:
        if text not in meshes:
            meshes[text] = Mesh.build(text)
        mesh = meshes[text]
        length = options.pop("length", 26)
        batch = _batch(made, length=length, lengths=lengths)
        found = gather_json(_both(made, batch, mesh, dtype, **options), mesh.world)
        wrong += [(text, options, found)] * any(got != want for got, want in found)
    return wrong


RECOMPUTE = (
    "none",
    "full",
    "selective",
    "attention",
    "feed_forward",
    "moe",
    "norm,feed_forward,moe",
)
PACKED = [20, 6, 26, 3, 23, 26]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, PACKED])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_one_rank_saves_what_was_predicted(recompute, dtype, lengths, z_loss):
    for made in (DENSE, NORMS, MOE, PLAIN):
        batch = _batch(made, lengths=lengths)
        got, want = _both(made, batch, None, dtype, recompute=recompute, z_loss=z_loss)
        assert got == want
