"""The engine over real models: transformers' text, the trainer's log-probabilities, two ranks."""

import copy
import functools
import importlib
import pkgutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from warploom.kernels import cpu
from warploom.kernels.attention import paged
from warploom.kernels.invariant import batch_invariant
from warploom.kernels.loss import cross_entropy_partials
from warploom.models import families, hf
from warploom.models.decoder import Decoder
from warploom.parallel.collectives import gather_json
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.recipes.rollout import Engine, Sampling

MODULES = {
    name: importlib.import_module(f"{families.__name__}.{name}")
    for _, name, _ in pkgutil.iter_modules(families.__path__)
}
FAMILIES = {name: module.tiny for name, module in MODULES.items() if hasattr(module, "tiny")}
GREEDY = Sampling(temperature=0.0, max_tokens=16)


@functools.cache
def model(family):
    """A tiny model whose logits are far apart."""
    made = Decoder.create(FAMILIES[family](), seed=3)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return made


def prompts(vocabulary=256):
    g = torch.Generator().manual_seed(1)
    sizes = (1, 37, 5, 16, 17, 90)
    return [torch.randint(vocabulary, (n,), generator=g).tolist() for n in sizes]


def ids(completions):
    return [list(c.ids) for c in completions]


QUICK = ("llama", "gemma3", "deepseek_v3", "bamba", "gpt_oss")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_greedy_texts_are_those_of_transformers(family, tmp_path):
    hf.save(model(family), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs.config.output_router_logits = False  # a loss, which cannot be computed over a mask
    given = prompts(theirs.config.vocab_size)
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    longest = max(map(len, given))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in given])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    wanted = theirs.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()
    for settings in ({"pages": 200}, {"pages": 24, "page_size": 8, "chunk": 7, "max_sequences": 3}):
        engine = Engine(model(family), **settings)
        assert ids(engine.generate(given, GREEDY)) == wanted
        assert engine.stats.pages_free == engine.stats.pages


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_log_probabilities_are_the_models(family):
    how = Sampling(max_tokens=12, n=3, seed=5, logprobs=2)
    sampled = Engine(model(family), pages=200).generate(prompts(), how)
    for c in sampled:
        whole = torch.tensor([[*c.prompt_ids, *c.ids]])
        with torch.no_grad():
            logits = model(family)(whole)[0, len(c.prompt_ids) - 1 : -1].double()
        wanted = logits.log_softmax(-1)
        own = wanted.gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs).double(), own, atol=1e-4, rtol=0)
        assert c.logprobs == c.sampling_logprobs
        best = [[i for i, _ in token.top] for token in c.tokens]
        assert best == wanted.topk(2).indices.tolist()
    assert len({c.ids for c in sampled}) == len(sampled)


@pytest.mark.skipif(cpu.missing() is not None, reason="warploom._cpu is not built")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss", "mixtral"])
def test_the_operators_of_generation_give_what_those_that_train_give(family, monkeypatch):
    """Heads of whole vectors, windows, soft-caps, sinks, biases; from 3 rows on products too."""
    made = Decoder.create(replace(FAMILIES[family](), head_dim=32), seed=3)
    how = Sampling(max_tokens=20, logprobs=3, temperature=0)
    called = Counter()

    class Counted:
        def __getattr__(self, name):
            called[name] += 1
            return getattr(operators, name)

    operators = cpu.operators()
    for module in (cpu, paged):
        monkeypatch.setattr(module, "operators", Counted)
    found = Engine(made, pages=200).generate(prompts(), how)
    assert set(called) >= {"decode", "linear", "rms_norm"}
    assert called["decode"] >= 19 * made.architecture.layers
    before = called.total()
    for module in (cpu, paged):
        monkeypatch.setattr(module, "lanes", lambda: 0)
    wanted = Engine(made, pages=200).generate(prompts(), how)
    assert called.total() == before
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        ours, theirs = torch.tensor(one.logprobs), torch.tensor(other.logprobs)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["written", "loaded", "replaced", "trained", "fused", "data"])
def test_other_weights_find_no_pages_of_the_old(how):
    """Prompts whose keys are in pages already are computed again by weights that have changed."""
    trained = Decoder(model("llama").architecture)
    trained.load_state_dict(model("llama").state_dict())
    engine, other = Engine(trained, pages=60), copy.deepcopy(trained)
    asked = Sampling(temperature=0, max_tokens=4)
    engine.generate(prompts()[1:2], asked)
    assert engine.generate(prompts()[1:2], asked)[0].found > 0
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    if how == "written":
        with torch.no_grad():
            for p, value in zip(trained.parameters(), other.parameters(), strict=True):
                p.copy_(value)
    elif how == "loaded":
        trained.load_state_dict(other.state_dict())
    elif how == "data":
        for p, value in zip(trained.parameters(), other.parameters(), strict=True):
            p.data.copy_(value)
    elif how == "fused":  # which autograd does not count
        for p in trained.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(trained.parameters(), lr=0.1, fused=True).step()
        other = trained
    elif how == "replaced":
        trained.norm.weight = torch.nn.Parameter(trained.norm.weight.detach() * 1.5)
        other = trained
    else:
        named = dict(trained.named_parameters())
        optimizer = AdamW(named, trained.layouts(), Mesh.build(""))
        optimizer.step({name: torch.ones_like(p) for name, p in named.items()}, 0.1)
        other = trained
    again, fresh = (e.generate(prompts()[1:2], asked) for e in (engine, Engine(other, pages=60)))
    assert again[0].found == 0
    assert again[0].logprobs == fresh[0].logprobs
    assert engine.generate(prompts()[1:2], asked)[0].found > 0


def test_samples_do_not_depend_on_their_company():
    how = Sampling(max_tokens=10, n=4, seed=11, top_p=0.9, top_k=40)
    whole = Engine(model("llama"), pages=300).generate(prompts(), how)
    small = Engine(model("llama"), pages=14, page_size=8, chunk=5, max_sequences=3)
    again = small.generate(prompts(), how)
    assert small.stats.put_back > 0
    assert ids(again) == ids(whole)
    for n, prompt in enumerate(prompts()):
        alone = Engine(model("llama"), pages=40).generate([prompt], how)
        assert ids(alone) == ids(whole[4 * n : 4 * n + 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_invariant_mode_gives_the_trainers_bits(family, dtype):
    made = Decoder(FAMILIES[family](), dtype=dtype)
    made.load_state_dict(model(family).state_dict())
    how = Sampling(max_tokens=8, n=2, seed=5, top_p=0.95)
    with batch_invariant(), torch.no_grad():
        sampled = Engine(made, pages=300).generate(prompts(), how)
        small = Engine(made, pages=14, page_size=8, chunk=5, max_sequences=3)
        for one, again in zip(sampled, small.generate(prompts(), how), strict=True):
            assert (one.ids, one.logprobs) == (again.ids, again.logprobs)
        assert small.stats.put_back > 0
        rows = [[*c.prompt_ids, *c.ids] for c in sampled]
        lengths = [len(row) for row in rows]
        whole = made(torch.tensor([sum(rows, [])]), torch.tensor(lengths, dtype=torch.int32))[0]
        for c, logits in zip(sampled, whole.split(lengths), strict=True):
            before = logits[len(c.prompt_ids) - 1 : -1]
            high, total, true = cross_entropy_partials(before, torch.tensor(c.ids))
            assert (true - (high + total.log())).tolist() == list(c.logprobs)


def on_two_ranks(family, how):
    mesh = Mesh.build("tp2")
    made = Decoder.create(FAMILIES[family](), seed=3, mesh=mesh)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)
    engine = Engine(made, pages=14, page_size=8, chunk=16, max_sequences=3)
    found = ids(engine.generate(prompts(), how))
    return gather_json([found, engine.stats.put_back], mesh.tp)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_ranks_agree(family, pool):
    how = Sampling(max_tokens=8, n=2, seed=2, temperature=0.8)
    wanted = ids(Engine(model(family), pages=200).generate(prompts(), how))
    first, second = pool(2, on_two_ranks, family, how)
    assert first == second
    assert first[0] == wanted
    assert first[1] > 0


def test_memory_decides_how_many_pages(monkeypatch):
    from warploom.recipes.rollout import room

    made = Engine(model("llama"), max_sequences=3)
    assert made.stats.pages == 3 * 512 // 16
    a = model("llama").architecture
    page = a.layers * 2 * a.kv_heads * a.head_dim * 4 * 16
    monkeypatch.setattr(room, "_free", lambda device: 50 * page)
    assert Engine(model("llama")).stats.pages == 10
    monkeypatch.setattr(room, "_free", lambda device: page)
    with pytest.raises(ValueError, match=f"needs {page} bytes"):
        Engine(model("llama"))
