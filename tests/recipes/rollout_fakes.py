"""A model whose next token depends on every token before it, read through the tables."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import torch

from warploom.recipes.rollout import Engine

V, WINDOW = 29, 48


class FakeCache:
    """Pages that hold tokens, and slots that hold the hash of all tokens."""

    def __init__(self, model, *, pages, page_size, slots):
        self.size = page_size
        self.tokens = torch.full((pages, page_size), -1)
        self.states = [None] * slots
        self.layers = {0: (self.tokens,)}
        self.copied = 0

    def copy(self, source, target):
        self.tokens[target] = self.tokens[source]
        self.copied += 1

    def copy_slot(self, source, target):
        self.states[target] = self.states[source]

    def step(self, starts, counts, tables, slots):
        assert tables.dtype == torch.int32
        return SimpleNamespace(cache=self, starts=starts, counts=counts, tables=tables, slots=slots)


def digest(before, token):
    return hashlib.sha256(before + bytes([token])).digest()


class FakeModel:
    """`kind` says whether it reads pages or states; `fails` is a step that raises."""

    mesh = None

    def __init__(self, kind="full", *, eos=None):
        self.architecture = SimpleNamespace(
            max_positions=WINDOW, vocabulary=V, layers=1, kind=lambda layer: kind, rope_scaling=None
        )
        self.kind, self.fails, self.steps, self.most, self.computed = kind, (), 0, 0, 0
        self.weight = torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def buffers(self):
        return iter(())

    def advance(self, tokens, where):
        self.steps += 1
        self.most = max(self.most, len(tokens))
        self.computed += len(tokens)
        cache, first, hidden = where.cache, 0, []
        plans = list(zip(where.starts.tolist(), where.counts.tolist(), where.tables, strict=True))
        for start, count, table in plans:
            for at in range(start, start + count):
                place = int(table[at // cache.size]), at % cache.size
                cache.tokens[place] = tokens[first + at - start]
            first += count
        assert first == len(tokens)
        if self.steps in self.fails:
            raise MemoryError("no room")
        for (start, count, table), slot in zip(plans, where.slots.tolist(), strict=True):
            pages = cache.tokens[table[: -(-(start + count) // cache.size)].long()].flatten()
            assert (pages[: start + count] >= 0).all()
            state = b""
            for at, token in enumerate(pages[: start + count].tolist()):
                state = digest(state, token)
                if at >= start:
                    hidden.append(state)
            if self.kind == "ssm":
                state = b"" if start == 0 else cache.states[slot]
                for at in range(start, start + count):
                    state = digest(state, int(pages[at]))
                    hidden[at - start - count] = state
                cache.states[slot] = state
        return torch.tensor([[*state] for state in hidden], dtype=torch.float64)

    def logits(self, hidden):
        return (
            torch.stack([logits_of(bytes(int(x) for x in row)) for row in hidden])
            if len(hidden)
            else torch.empty(0, V)
        )


def logits_of(state):
    g = torch.Generator().manual_seed(int.from_bytes(state[:7], "little"))
    return 3 * torch.randn(V, generator=g)


def expected(prompt, sampling, sample, eos=()):
    """What a sample must be, computed alone."""
    from warploom.recipes.rollout.sampling import draw

    state = b""
    for token in prompt:
        state = digest(state, token)
    tokens = []
    while len(tokens) < sampling.max_tokens and len(prompt) + len(tokens) < WINDOW:
        (token,) = draw(logits_of(state)[None], [sampling], [(sample, len(tokens))])
        tokens.append(token)
        if token.id in (*eos, *sampling.stop_ids):
            return tokens, "stop"
        state = digest(state, token.id)
    return tokens, "length"


def engine(model=None, **options):
    made = {"pages": 12, "page_size": 4, "max_sequences": 4, "chunk": 8, "make_cache": FakeCache}
    return Engine(model or FakeModel(), **{**made, **options})


def check(engine):
    """Every page has as many owners as samples list it, and the tables say where they are."""
    scheduler, pages = engine._scheduler, engine._pages
    listed = Counter(page for s in scheduler.running for page in s.pages)
    for page in range(pages.count):
        assert pages.owners(page) == listed[page]
    assert pages.free == pages.count - len(listed)
    slots = [s.slot for s in scheduler.running]
    assert sorted(slots + scheduler._slots) == list(range(len(scheduler.tables)))
    for s in scheduler.running:
        assert scheduler.tables[s.slot, : len(s.pages)].tolist() == s.pages
    for s in scheduler.waiting:
        assert s.slot == -1
        assert not s.pages
        assert not s.done
    for line in (scheduler.running, scheduler.waiting):
        assert [s.number for s in line] == sorted(s.number for s in line)
