"""One micro-batch through the stages of a rank, without its pipeline: what travels, what stays."""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.parallel.collectives import Call, observed
from warploom.parallel.expert import Experts, record_routing

from ..plan.ledger import Ledger
from ..plan.memory import activations
from ..plan.tracker import track
from . import traffic
from .plan import Case


def counts(ledger: Ledger) -> traffic.Counted:
    """Return what a ledger has counted so far."""
    return {key: (float(calls), float(sent)) for key, (calls, sent) in ledger.table().items()}


class Gate:
    """A ledger that counts only while it is open."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.open = ledger, False

    def __call__(self, call: Call) -> AbstractContextManager[object]:
        """Count one collective, or let it pass."""
        return self.ledger(call) if self.open else nullcontext()


def _run(model: Decoder, batch: Batch, backward: bool) -> Tensor:
    """Run each stage of this rank by itself, on random activations where one comes before it."""
    total = torch.zeros((), dtype=torch.float64)
    for stage in model.held:
        x = None
        if stage:
            shape, dtype = model.boundary(stage - 1, batch)
            x = torch.randn(shape, dtype=dtype).requires_grad_()
        y, terms = model.stage(stage, x, batch)
        total = sum((term.weight * term.sum for term in terms), total)
        total = total if y is None else total + y.sum()
        if backward:
            total.backward()
            total = total.detach() * 0
    return total


def layers(model: Decoder, batch: Batch, ledger: Ledger) -> traffic.Seen:
    """Run a micro-batch forward and backward, seen by a ledger; a collective call."""
    with observed(ledger), record_routing() as routed:
        _run(model, batch, backward=True)
    for parameter in model.parameters():
        parameter.grad = None
    lengths = batch.document_lengths
    documents = len(batch.tokens if lengths is None else lengths)
    return traffic.Seen(_tokens(model, batch), documents, routed)


def _tokens(model: Decoder, batch: Batch) -> int:
    """Return the tokens of this context-parallel rank, padding included."""
    shape, _ = model.boundary(0, batch)
    return shape[0] * (1 if model.mesh is None else model.mesh.degree("tp"))


def peak(model: Decoder, case: Case, batch: Batch) -> tuple[float, float]:
    """Return the bytes that a micro-batch saves for its backward, and what the cost model predicts.

    Of this rank; a collective call. Rows that experts serve are the router's decision: they are
    counted here.
    """
    served: list[int] = []
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Experts):
                hook = module.register_forward_pre_hook(lambda _, x: served.append(len(x[0])))
                stack.callback(hook.remove)
        seen = stack.enter_context(track(model=model))
        chosen = stack.enter_context(record_routing())
        _run(model, batch, backward=False)
        held = seen.highest["activations"]
    sent = [int((indices >= 0).sum()) for indices in chosen]
    d = case.degrees
    tokens, total = _tokens(model, batch), batch.tokens.numel()
    packed, rows = batch.document_lengths, [batch.tokens.shape[1]] * len(batch.tokens)
    documents = 0 if packed is None else len(packed)
    if packed is None and d.cp == d.uly > 1:
        documents = len(rows)
    if d.cp == 1 and tokens > total:
        documents = (documents or len(rows)) + 1
    wanted = activations(
        case.architecture,
        tokens,
        dtype=torch.float64,
        degrees=d,
        recompute=case.recompute,
        z_loss=case.z_loss > 0,
        context=case.parallel.context,
        stages=case.stages,
        held=model.held,
        total=total,
        documents=documents,
        lengths=rows if packed is None else packed.tolist(),
        rows=list(zip(sent, served, strict=True)),
    )
    return float(held), float(wanted)
