"""The decoder against transformers, against itself in other forms, and in words when misused."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from warploom.kernels.rope import DynamicNtk, NtkAware, Yarn
from warploom.models import hf
from warploom.models.batch import Batch
from warploom.models.decoder import Architecture, Decoder
from warploom.models.families import llama, qwen3
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import assemble

SMALL = Architecture(
    layers=2, width=48, heads=6, kv_heads=2, head_dim=8, hidden=80, vocabulary=101, max_positions=64
)
SHAPES = {
    "llama": SMALL,
    "llama, tied": replace(SMALL, tied=True, rope_base=500_000.0),
    "llama, no sharing of heads": replace(SMALL, kv_heads=6),
    "llama, one key head": replace(SMALL, kv_heads=1, norm_eps=1e-6),
    "qwen3": replace(SMALL, qk_norm="head", head_dim=16),
    "qwen3, tied": replace(SMALL, qk_norm="head", tied=True, heads=4),
}
every_shape = pytest.mark.parametrize("architecture", SHAPES.values(), ids=SHAPES.keys())


def _batch(architecture, rows=2, length=24, lengths=None, ignore=5):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(architecture.vocabulary, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :ignore] = -100
    sizes = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return Batch(ids[:, :-1].contiguous(), targets, sizes)


def _spread(model, scale=3.0):
    """Move the weights, norms too, away from those of a start, so that each one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.copy_(p * scale if p.dim() > 1 else 1 + 0.3 * noise)
    return model


def _peer(folder):
    from transformers import AutoModelForCausalLM

    peer, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return peer


def _close(got, want, relative):
    torch.testing.assert_close(got, want, atol=relative * want.detach().abs().max().item(), rtol=0)


@every_shape
def test_logits_and_gradients_equal_transformers(architecture, tmp_path):
    model = _spread(Decoder.create(architecture, seed=1))
    hf.save(model, tmp_path / "ours")
    peer = _peer(tmp_path / "ours")
    assert type(peer).__name__ == ("Qwen3" if architecture.qk_norm else "Llama") + "ForCausalLM"
    batch = _batch(architecture)

    logits = model(batch.tokens)
    _close(logits, peer(batch.tokens).logits, 1e-5)

    (term,) = model.loss(batch)
    term.sum.backward()
    peer_logits = peer(batch.tokens).logits
    want = torch.nn.functional.cross_entropy(
        peer_logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    want.backward()
    assert int(term.count) == 2 * 24 - 5
    torch.testing.assert_close(term.sum, want, rtol=1e-5, atol=0)
    ours = assemble(
        {path: p.grad for path, p in model.named_parameters()}, model.logical_layouts(), None
    )
    theirs = dict(peer.named_parameters())
    assert len(ours) == len(theirs)
    for name, gradient in ours.items():
        _close(gradient, theirs[llama.FAMILY.rename(name)].grad, 1e-4)


@pytest.mark.parametrize("made", [llama.tiny(), qwen3.tiny()], ids=["llama", "qwen3"])
def test_packed_documents_equal_separate_runs(made, tmp_path):
    model = _spread(Decoder.create(made, seed=2))
    hf.save(model, tmp_path / "ours")
    peer = _peer(tmp_path / "ours")
    lengths = [3, 20, 1, 12, 12]
    batch = _batch(made, lengths=lengths)
    got = model(batch.tokens, document_lengths=batch.document_lengths).flatten(0, 1)
    documents = batch.tokens.flatten().split(lengths)
    _close(got, torch.cat([peer(d[None]).logits[0] for d in documents]), 1e-5)
    alone = torch.cat([model(d[None])[0] for d in documents])
    _close(got, alone, 1e-5)

    (packed,) = model.loss(batch)
    targets = batch.targets.flatten().split(lengths)
    sums = [
        model.loss(Batch(d[None], t[None]))[0].sum for d, t in zip(documents, targets, strict=True)
    ]
    torch.testing.assert_close(packed.sum, torch.stack(sums).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("lengths", [None, [7, 17, 24]])
def test_gradients_equal_finite_differences(lengths):
    made = replace(SMALL, qk_norm="head")
    model = _spread(Decoder.create(made, dtype=torch.float64, z_loss=0.01))
    batch = _batch(made, lengths=lengths)

    def objective():
        return sum(term.weight * term.sum for term in model.loss(batch))

    objective().backward()
    generator = torch.Generator().manual_seed(0)
    for path, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * step)
                values.append(objective())
                p.add_(direction, alpha=-sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        want = (p.grad * direction).sum()
        # the rotary tables are float32 in the loss too, so only the differences round
        torch.testing.assert_close(slope, want, rtol=1e-6, atol=1e-5, msg=path)


def test_positions_start_again_with_each_document():
    # attention sees differences of positions only, so that the logits alone would not tell
    model, lengths = Decoder.create(SMALL), [10, 14, 5, 19]
    cos, sin = model._sequences(torch.zeros(2, 24), torch.tensor(lengths)).angles["full"]
    first = [0, 10, 24, 29]
    assert (cos[first] == 1).all()
    assert (sin[first] == 0).all()
    assert (sin[:, 0] == 0).sum() == len(first)
    alone, _ = model._sequences(torch.zeros(1, 19), None).angles["full"]
    assert torch.equal(cos[29:], alone)


def test_only_batches_that_train_keep_their_tables():
    model, tokens = Decoder.create(SMALL), torch.randint(SMALL.vocabulary, (2, 12))
    batch = Batch(tokens, tokens)
    with torch.no_grad():  # such as held-out batches, which live as long as the run
        model.loss(batch)
    assert len(model._made) == 0
    model.loss(batch)
    assert len(model._made) == 1
    del batch
    assert len(model._made) == 0


def test_recomputation_changes_no_bit():
    batch = _batch(SMALL, lengths=[10, 14, 24])
    seen = []
    for recompute in ("none", "full"):
        model = _spread(Decoder.create(SMALL, recompute=recompute))
        (term,) = model.loss(batch)
        term.sum.backward()
        seen.append([term.sum.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


def test_full_recomputation_saves_less():
    batch = _batch(SMALL)
    sizes = {}
    for recompute in ("none", "full"):
        model = Decoder.create(SMALL, recompute=recompute)
        sizes[recompute] = 0

        def count(x, recompute=recompute):
            sizes[recompute] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model.loss(batch)
    assert sizes["full"] < 0.5 * sizes["none"]


def test_z_loss_is_a_term_of_its_own():
    batch = _batch(SMALL)
    model = _spread(Decoder.create(SMALL, z_loss=1e-3))
    loss, z = model.loss(batch)
    trained = batch.targets.flatten() != -100
    lse = model(batch.tokens).flatten(0, 1)[trained].logsumexp(-1)
    assert (loss.name, z.name, loss.weight, z.weight) == ("language_model", "z_loss", 1.0, 1e-3)
    torch.testing.assert_close(z.sum, lse.square().sum(), rtol=1e-5, atol=0)
    assert {n: int(c) for n, c in model.counts(batch).items()} == {
        "language_model": int(loss.count),
        "z_loss": int(z.count),
    }
    plain = _spread(Decoder.create(SMALL))
    assert list(plain.counts(batch)) == ["language_model"]
    torch.testing.assert_close(plain.loss(batch)[0].sum, loss.sum, rtol=1e-6, atol=0)


def test_loss_never_holds_the_logits(monkeypatch):
    made = replace(SMALL, vocabulary=70_000, layers=1)
    model = Decoder.create(made)
    batch = _batch(made, rows=1, length=64, ignore=0)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == 70_000:
                    self.rows = max(self.rows, x.shape[0])
            return out

    with Largest() as seen:
        model.loss(batch)[0].sum.backward()
    assert seen.rows < 64
    with Largest() as seen:
        model(batch.tokens)
    assert seen.rows == 64


def test_a_start_has_the_stated_deviations():
    made = replace(SMALL, layers=8, width=96, hidden=256, vocabulary=512)
    model = Decoder.create(made, seed=5)
    for path, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        narrow = path.endswith(("attention.out.weight", "feed_forward.down.weight"))
        want = 0.02 / 4 if narrow else 0.02
        assert abs(p.std().item() / want - 1) < 0.05, path
    again, other = Decoder.create(made, seed=5, names=str.upper), Decoder.create(made, seed=6)
    assert torch.equal(
        model.blocks["3"].attention.qkv.weight, again.blocks["3"].attention.qkv.weight
    )
    assert not torch.equal(model.head.weight, other.head.weight)
    assert again.layouts()["norm.weight"].pieces[0].name == "NORM.WEIGHT"


def test_tied_weights_are_one_parameter():
    model = Decoder.create(replace(SMALL, tied=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert set(model.layouts()) == set(dict(model.named_parameters()))


def test_bfloat16_stays_near_float32():
    batch = _batch(SMALL, lengths=[20, 4, 24])
    wide = _spread(Decoder.create(SMALL), 2.0)
    narrow = Decoder.create(SMALL, dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    a, b = wide.loss(batch)[0].sum, narrow.loss(batch)[0].sum
    assert b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=5e-3, atol=0)
    b.backward()
    assert all(
        p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in narrow.parameters()
    )


def _equals_one_rank(made, rows, length, lengths):
    mesh = Mesh.build("tp2")
    one = _spread(Decoder.create(made, dtype=torch.float64, seed=4, z_loss=0.1))
    model = Decoder.create(made, mesh=mesh, dtype=torch.float64, seed=4, z_loss=0.1)
    whole = assemble(dict(one.named_parameters()), one.layouts(), None)
    own = model.layouts()
    with torch.no_grad():
        for path, p in model.named_parameters():
            for piece in own[path].pieces:
                piece.of_local(p).copy_(piece.of_logical(whole[piece.name]))
    batch = _batch(made, rows, length, lengths)
    close = {"atol": 1e-10, "rtol": 0}
    sizes = batch.document_lengths
    torch.testing.assert_close(model(batch.tokens, sizes), one(batch.tokens, sizes), **close)
    for got, want in zip(model.loss(batch), one.loss(batch), strict=True):
        torch.testing.assert_close(got.sum, want.sum, **close)
        assert got.count == want.count == model.counts(batch)[got.name]
        (got.weight * got.sum).backward(retain_graph=True)
        (want.weight * want.sum).backward(retain_graph=True)
    for path, p in model.named_parameters():
        for group in own[path].partial:
            dist.all_reduce(p.grad, group=group)
    gradients = assemble({n: p.grad for n, p in model.named_parameters()}, own, mesh.tp)
    for path, p in one.named_parameters():
        for piece in one.layouts()[path].pieces:
            got, want = gradients[piece.name], piece.of_local(p.grad)
            torch.testing.assert_close(got, want, **close, msg=piece.name)


def _two_ranks():
    tied = replace(SMALL, tied=True, qk_norm="head")
    _equals_one_rank(SMALL, 2, 24, None)
    _equals_one_rank(tied, 2, 24, [20, 4, 24])
    _equals_one_rank(tied, 1, 13, None)  # an odd number of tokens is padded
    wrong = r"tp \(2\) must divide heads \(6\), .*multiple of kv_heads \(3\): tp1 does"
    with pytest.raises(ValueError, match=wrong):
        Decoder(replace(SMALL, kv_heads=3), mesh=Mesh.build("tp2"))
    wrong = r"tp \(2\) must divide heads \(6\), hidden \(81\), .*: tp1 and tp3 do"
    with pytest.raises(ValueError, match=wrong):
        Decoder(replace(SMALL, hidden=81, kv_heads=6), mesh=Mesh.build("tp2"))
    wide = {"hidden": 80, "heads": 5, "kv_heads": 1}  # tp5 would divide the heads, not 82
    for hidden, near in ((80, "tp1 and tp5 do"), (82, "tp1 does")):
        with pytest.raises(ValueError, match=f": {near}$"):
            Decoder(replace(SMALL, **wide | {"hidden": hidden}), mesh=Mesh.build("tp2"))
    wrong = r"uly \(2\) must divide cp \(2\), heads of a tp rank \(5\): uly1 does"
    with pytest.raises(ValueError, match=wrong):
        Decoder(replace(SMALL, **wide), mesh=Mesh.build("cp2,uly2"))


def test_two_tensor_parallel_ranks_equal_one(ranks):
    ranks(2, _two_ranks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 4}, r"heads \(6\) must be divisible by kv_heads \(4\)"),
        ({"rope_base": float("nan")}, "rope_base must be above 0 and finite; got nan"),
        ({"norm_eps": -1.0}, "norm_eps must be above 0 and finite; got -1.0"),
        ({"head_dim": 7}, "head_dim must be even and at least 2 for rotary positions; got 7"),
        ({"rope_dim": 0}, "rope_dim must be even and at least 2 for rotary positions; got 0"),
        (
            {"rope_dim": 2, "rope_scaling": NtkAware(2.0)},
            "rope_dim must be even and at least 4 for",
        ),
        ({"rope_dim": 2, "rope_scaling": DynamicNtk(2.0, 8, 8)}, "at least 4 for rotary .* got 2"),
        ({"rope_base": 1.0, "rope_scaling": Yarn(2.0, 8)}, "rope_base must be above 1 with Yarn;"),
        ({"layers": 0, "hidden": -1}, "at least 1; got layers=0, hidden=-1"),
    ],
)
def test_a_wrong_architecture_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([24, 23], "sum to the batch's tokens .2 x 24 = 48.; got 2 lengths, .* sum to 47"),
        ([24, 0, 24], "must be positive"),
        ([30, 18], "no document may cross a row: no document ends with row 0"),
    ],
)
def test_wrong_documents_are_refused(lengths, words):
    with pytest.raises(ValueError, match=words):
        Decoder.create(SMALL).loss(_batch(SMALL, lengths=lengths))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="recompute must be none, full.* got 'some'"):
        Decoder(SMALL, recompute="some")
    with pytest.raises(ValueError, match="z_loss must be at least 0; got -1"):
        Decoder(SMALL, z_loss=-1)
    model = Decoder.create(SMALL)
    with pytest.raises(ValueError, match=r"sequence \(65\) must be at most max_positions \(64\)"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets must have the shape of tokens"):
        model.loss(Batch(torch.zeros(1, 4).long(), torch.zeros(1, 5).long()))
