"""Specimens of `kernels/loss`; specifications are PyTorch's own losses over all logits."""

import torch
import torch.nn.functional as F
from tests.kernels.specimen import Specimen

from warploom.kernels.loss import (
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    linear_top_k_kl,
)

_SHAPES = ((0, 6), (1, 1), (1, 64), (5, 3), (33, 129), (3, 1000))
_GIVEN = ((4096, 32_000), (8192, 128_256))
_LINEAR = ((3, 128_256),)  # each token has a launch of its own
_ALL = {"softcap": 3.0, "label_smoothing": 0.2}
_D = 10


def _targets(draw, rows, width):
    targets = draw.integers(width, rows)
    targets[2::3] = -100
    return targets


def _draw_given(draw, rows, width):
    return (draw(rows, width, scale=2.0),), {"targets": _targets(draw, rows, width)}


def _draw_linear(draw, rows, width):
    inputs = draw(rows, _D, scale=0.7), draw(width, _D, seed=1)
    return inputs, {"targets": _targets(draw, rows, width)}


def _draw_teacher(draw, rows, width):
    inputs, _ = _draw_linear(draw, rows, width)
    teacher = 2 * draw(rows, width, seed=2).float()
    log_probs, indices = teacher.log_softmax(-1).topk(min(4, width), -1)
    indices[2::3] = -100
    return inputs, {"indices": indices, "log_probs": log_probs}


def _capped(z, softcap):
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _truth_given(logits, *, targets, z_loss=False, softcap=None, label_smoothing=0.0):
    z = _capped(logits, softcap)
    trained = targets != -100
    total = F.cross_entropy(z, targets, reduction="sum", label_smoothing=label_smoothing)
    if not z_loss:
        return total, trained.sum()
    return total, trained.sum(), z.logsumexp(-1)[trained].square().sum(), trained.sum()


def _logits(hidden, weight):
    """Return the head's logits; without a weight they are what is given."""
    return hidden if weight is None else hidden @ weight.t()


def _truth_linear(hidden, weight, **rest):
    return _truth_given(_logits(hidden, weight), **rest)


def _truth_log_probs(hidden, weight, *, targets, softcap=None, entropy=False):
    z = _capped(_logits(hidden, weight), softcap)
    log = -F.cross_entropy(z, targets, reduction="none")
    if not entropy:
        return log
    return log, torch.where(targets == -100, 0, torch.special.entr(z.softmax(-1)).sum(-1))


def _truth_top_k(hidden, weight, *, indices, log_probs, softcap=None, **options):
    """Probabilities of M + 1 outcomes, and F.kl_div."""
    trained = indices[:, 0] != -100
    columns = indices.clamp(min=0)
    student = _capped(_logits(hidden, weight), softcap).softmax(-1)
    teacher, picked = log_probs.to(student.dtype).exp(), student.gather(-1, columns)
    pair = [teacher, picked]
    if options.get("tail", True) and columns.shape[1] < student.shape[1]:
        others = torch.ones_like(student).scatter(-1, columns, 0)
        rests = 1 - teacher.sum(-1), (student * others).sum(-1)
        pair = [torch.cat((p, rest[:, None]), -1) for p, rest in zip(pair, rests, strict=True)]
    p, q = (x / x.sum(-1, keepdim=True) for x in pair)
    if options.get("direction") == "reverse":
        p, q = q, p
    kl = F.kl_div(q.log(), p, reduction="none").sum(-1)
    return torch.where(trained, kl, 0)


def _plain(truth):
    """In float32 from logits in the dtype of the inputs, as models compute their losses."""

    def given(logits, **rest):
        return truth(logits.float() if logits.dtype.itemsize == 2 else logits, **rest)

    def linear(hidden, weight, **rest):
        z = hidden @ weight.t()
        z = z.float() if z.dtype.itemsize == 2 else z
        return truth(z, None, **rest)

    return given if truth is _truth_given else linear


def _run(op, **options):
    """Several chunks a call; of one token where a row must not depend on its company."""
    sizes = {cross_entropy: {}, linear_cross_entropy: {"chunk": 14}}
    chunk = sizes.get(op, {"chunk": 1})

    def run(*inputs, backend, targets=None, indices=None, log_probs=None):
        fixed = (targets,) if indices is None else (indices, log_probs)
        return op(*inputs, *fixed, **options, **chunk, backend=backend)

    return run


def _specimen(name, op, draw, truth, training, rows=(), **options):
    return Specimen(
        name=name,
        op=op.__name__,
        draw=draw,
        run=_run(op, **options),
        truth=lambda *inputs, **fixed: truth(*inputs, **fixed, **options),
        plain=lambda *inputs, **fixed: _plain(truth)(*inputs, **fixed, **options),
        shapes=_SHAPES,
        training=training,
        rows=rows,
        huge=False,
        # the others of an operator call the same kernels in the same way
        backends=() if name.endswith(("_z", "_top")) or name == "linear_log_probs" else ("triton",),
    )


SPECIMENS = (
    *(
        _specimen(f"cross_entropy{name}", cross_entropy, _draw_given, _truth_given, _GIVEN, **o)
        for name, o in {"": {}, "_all": {**_ALL, "z_loss": True}}.items()
    ),
    *(
        _specimen(f"linear_cross_entropy{name}", linear_cross_entropy, _draw_linear,
                  _truth_linear, _LINEAR, **o)
        for name, o in {"": {}, "_capped": _ALL, "_z": {**_ALL, "z_loss": True}}.items()
    ),
    *(
        _specimen(f"linear_log_probs{name}", linear_log_probs, _draw_linear, _truth_log_probs,
                  _LINEAR, rows=rows, **o)
        for name, rows, o in (
            ("", (0,), {}),
            ("_entropy", (0, 1), {"entropy": True, "softcap": 3.0}),
        )
    ),
    *(
        _specimen(f"linear_top_k_kl{name}", linear_top_k_kl, _draw_teacher, _truth_top_k,
                  _LINEAR, rows=(0,), **o)
        for name, o in {
            "": {},
            "_reverse": {"direction": "reverse", "softcap": 3.0},
            "_top": {"tail": False},
        }.items()
    ),
)  # fmt: skip
