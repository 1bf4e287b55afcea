"""Many texts at a time from one model, out of pages that they share.

    engine = Engine(model, tokenizer)
    for completion in engine.generate(["Once upon", "The"], Sampling(max_tokens=64)):
        print(completion.text)

A step computes the next tokens of all samples that run, and beginnings of others, in one pass of
the model; then it draws. The model is the one that trains: `Decoder.advance` runs its blocks over
pages (`models/cache.py`). Every rank of a tensor-parallel model makes the same calls; all of them
have the same logits and return the same.

`schedule.py` says who is computed, `pages.py` where, `sampling.py` what is drawn, `text.py` what
may be shown, `weights.py` whether pages are still true; `completion.py` is what comes of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import index
from typing import Any, Protocol, runtime_checkable

import torch

from warploom.kernels import invariant
from warploom.models.cache import Cache, longest

from ..errors import UserError
from .completion import Completion, Event, FinishReason, Stats
from .pages import Pages
from .room import pages_that_fit
from .sampling import Sampling, Token, draw
from .schedule import Sample, Scheduler
from .text import TextStream
from .weights import Weights


@runtime_checkable
class Tokens(Protocol):
    """What the engine needs of a tokenizer.

    `eos`, an id or several, or what transformers calls it, `eos_token_id`, ends texts where it is
    there.
    """

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class _Running(Sample):
    """A sample and what came of it."""

    request: int
    index: int
    sampling: Sampling
    longest: int  # most tokens, the prompt with them
    stream: TextStream | None
    tokens: list[Token] = field(default_factory=list)

    def completion(self, reason: FinishReason) -> Completion:
        return Completion(
            request=self.request,
            sample=self.index,
            prompt_ids=tuple(self.ids[: self.prompt]),
            ids=tuple(self.ids[self.prompt :]),
            text="" if self.stream is None else self.stream.text,
            tokens=tuple(self.tokens),
            finish_reason=reason,
            found=self.found or 0,
        )


class Engine:
    """Continues texts with a model.

    Args:
        model: A decoder, on one rank or tensor-parallel; its parameters may change while no request
            is under way: what the old ones have computed is then computed again.
        tokenizer: For prompts and stop strings of text, and for the text of completions; `None` for
            ids alone. Its ends of text end a sample.
        pages: Pages of the cache; `None` for what every sample could need, or what a share of the
            memory that is free can hold.
        page_size: Tokens of a page.
        max_sequences: Most samples that are computed at a time.
        chunk: Most tokens of prompts in a step.
        share_prefixes: Whether prompts may begin with pages that others have left.
        batch_invariant: Whether a token's results depend on nothing but the tokens before it, bit
            by bit (`kernels/invariant.py`).
        make_cache: Makes the cache of a model.

    Raises:
        UserError: If a size is not positive, or `tokenizer` does not encode and decode.
        ValueError: If the model is split in a way that cannot generate.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokens | None = None,
        *,
        pages: int | None = None,
        page_size: int = 16,
        max_sequences: int = 64,
        chunk: int = 512,
        share_prefixes: bool = True,
        batch_invariant: bool = False,
        make_cache: Callable[..., Any] = Cache,
    ) -> None:
        sizes = {"page_size": page_size, "max_sequences": max_sequences, "chunk": chunk}
        for name, size in (sizes if pages is None else {"pages": pages, **sizes}).items():
            if size < 1:
                raise UserError(f"{name} must be at least 1; got {size}")
        if tokenizer is not None and not isinstance(tokenizer, Tokens):
            raise UserError(
                f"tokenizer must encode and decode, as rollout.codec.Codec(folder) does; got "
                f"{tokenizer!r:.80}"
            )
        self.model, self.tokenizer = model, tokenizer
        a = model.architecture
        self.window, self.vocabulary = longest(a), int(a.vocabulary)
        options = {"page_size": page_size, "slots": max_sequences}
        if pages is None:
            pages = pages_that_fit(model, make_cache, self.window, **options)
        self._cache = make_cache(model, pages=pages, **options)
        states = "ssm" in {a.kind(layer) for layer in range(a.layers)}
        self._pages = Pages(pages, page_size, shared=share_prefixes and not states)
        self.longest = min(self.window, pages * page_size + 1)  # what is drawn last has no page
        self._scheduler = Scheduler(
            self._pages,
            slots=max_sequences,
            longest=self.window,
            chunk=chunk,
            copy=self._cache.copy,
            copy_slot=self._cache.copy_slot,
        )
        theirs = getattr(tokenizer, "eos_token_id", None)  # of transformers
        eos = getattr(tokenizer, "eos", () if theirs is None else theirs)
        self.eos = frozenset([eos] if isinstance(eos, int) else eos)
        self._device = next(model.parameters()).device
        self._weights = Weights(model)
        self._mode = invariant.batch_invariant if batch_invariant else nullcontext
        self._requests: dict[int, list[_Running]] = {}  # samples that have not ended
        self._events: list[Event] = []  # that the next step hands out
        self._numbers = self._added = self._steps = 0
        self._counts = {"prompt_tokens": 0, "tokens": 0, "found_tokens": 0}

    @property
    def busy(self) -> bool:
        """Whether another step has something to do or to tell."""
        return bool(self._requests or self._events)

    @property
    def stats(self) -> Stats:
        """What is there, and what was done."""
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages=self._pages.count,
            pages_free=self._pages.free,
            steps=self._steps,
            put_back=self._scheduler.put_back,
            **self._counts,
        )

    def forget(self) -> None:
        """Compute again whatever is asked for.

        A request that finds no other under way does this by itself where a parameter was written
        to; a change of little that autograd cannot see (a few elements of `.data`) or of more than
        parameters and buffers (a hook) needs this call.
        """
        self._scheduler.reset()

    def encode(self, prompt: str | Sequence[int], sampling: Sampling) -> list[int]:
        """Return a prompt's ids, if the request can be served at all.

        Raises:
            UserError: If the prompt is empty, leaves no room in the window or in the pages, it or
                `stop_ids` have ids outside the vocabulary, or text is asked for and there is no
                tokenizer.
        """
        if self.tokenizer is None and (isinstance(prompt, str) or sampling.stop):
            raise UserError(
                f"prompts and stop strings of text need a tokenizer: give the engine one, or take "
                f"ids and stop_ids; got {prompt!r:.40} and {sampling.stop!r:.40}"
            )
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = [index(i) for i in prompt]
        except TypeError:
            raise UserError(
                f"a prompt must be a text or a list of ids; got {prompt!r:.80}"
            ) from None
        if not ids:
            raise UserError(f"a prompt must have at least one token; {prompt!r} has none")
        for what, given in (("the prompt has", ids), ("stop_ids has", sampling.stop_ids)):
            if wrong := [i for i in given if not 0 <= i < self.vocabulary][:1]:
                raise UserError(f"ids must be from 0 to {self.vocabulary - 1}; {what} {wrong[0]}")
        if sampling.logprobs > self.vocabulary:
            raise UserError(
                f"logprobs must be at most the vocabulary ({self.vocabulary}); got "
                f"{sampling.logprobs}"
            )
        if len(ids) >= self.window:
            raise UserError(
                f"a prompt must leave room for a token in the window of {self.window}; this one "
                f"has {len(ids)} tokens: shorten it"
            )
        longest, room = self._longest(ids, sampling), self._pages.count * self._pages.size
        if longest - 1 > room:  # what was drawn last is never written
            raise UserError(
                f"a sample of up to {longest} tokens must fit the {self._pages.count} pages of "
                f"{self._pages.size} tokens: ask for fewer than {sampling.max_tokens} tokens "
                f"behind the {len(ids)} of the prompt, or give the engine more pages"
            )
        return ids

    def _longest(self, ids: Sequence[int], sampling: Sampling) -> int:
        return min(len(ids) + sampling.max_tokens, self.window)

    def add(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> int:
        """Queue a request.

        Args:
            prompt: Text or ids.
            sampling: How it is continued; `None` for the defaults.

        Returns:
            The request's number, which its events bear.

        Raises:
            UserError: As `encode`; nothing is queued then.
        """
        how = Sampling() if sampling is None else sampling
        ids, tokenizer = self.encode(prompt, how), self.tokenizer
        if not self.busy and self._weights.changed():
            self.forget()
        number, self._added = self._added, self._added + 1
        samples: list[_Running] = []
        for place in range(how.n):
            sample = _Running(
                number=self._numbers,
                ids=[*ids],
                prompt=len(ids),
                leader=samples[0] if samples else None,
                request=number,
                index=place,
                sampling=how,
                longest=self._longest(ids, how),
                stream=None if tokenizer is None else TextStream(tokenizer.decode, how.stop),
            )
            self._numbers += 1
            samples.append(sample)
            self._scheduler.add(sample)
        self._requests[number] = samples
        self._counts["prompt_tokens"] += len(ids) * how.n
        return number

    def cancel(self, request: int) -> None:
        """End a request's samples; the next step tells. One that has ended stays as it is."""
        for sample in [*self._requests.get(request, ())]:
            text = "" if sample.stream is None else sample.stream.close()
            self._events.append(self._end(sample, None, text, "cancelled"))

    def step(self) -> list[Event]:
        """Compute the next tokens of the samples that run.

        Returns:
            An event for each token that was drawn, and for each sample that was cancelled.

        Raises:
            RuntimeError: If logits are not finite, or the model has no batch-invariant form that is
                asked for. Whatever is raised, no sample is lost: all will be computed again.
        """
        events, self._events = self._events, []
        planned = self._scheduler.plan()
        if not planned:
            return events
        try:
            with self._mode():
                drawn = self._compute(planned)
            for sample, token in drawn:
                events.append(self._take(sample, token))
        except BaseException:
            self._events = events
            self._scheduler.reset()
            raise
        self._steps += 1
        return events

    @torch.inference_mode()
    def _compute(self, planned: Sequence[tuple[Sample, int]]) -> list[tuple[_Running, Token]]:
        """Run the model over the planned tokens, and draw where a sample has no token left."""
        tokens: list[int] = []
        lasts, rows = [], []
        for sample, count in planned:
            tokens += sample.ids[sample.done : sample.done + count]
            if sample.done + count == len(sample.ids):
                lasts.append(sample)
                rows.append(len(tokens) - 1)
        samples, counts = zip(*planned, strict=True)
        slots = [s.slot for s in samples]
        width = max(len(s.pages) for s in samples)
        where = self._cache.step(
            torch.tensor([s.done for s in samples]),
            torch.tensor(counts),
            torch.from_numpy(self._scheduler.tables[slots, :width]),
            torch.tensor(slots),
        )
        hidden_TD = self.model.advance(torch.tensor(tokens, device=self._device), where)
        for sample, count in planned:
            sample.done += count
        if not rows:
            return []
        logits_MV = self.model.logits(hidden_TD[torch.tensor(rows, device=self._device)])
        drawing = [(row, s) for row, last in enumerate(lasts) for s in self._with_followers(last)]
        if len(drawing) > len(rows):
            logits_MV = logits_MV[torch.tensor([row for row, _ in drawing], device=self._device)]
        numbers = [(s.index, len(s.tokens)) for _, s in drawing]
        drawn = draw(logits_MV, [s.sampling for _, s in drawing], numbers)
        return [(s, token) for (_, s), token in zip(drawing, drawn, strict=True)]

    def _with_followers(self, sample: Any) -> Iterator[Any]:
        yield sample
        yield from self._scheduler.fork(sample)

    def _take(self, sample: _Running, token: Token) -> Event:
        """Append a token to a sample, and end it where this was the last."""
        sample.ids.append(token.id)
        sample.tokens.append(token)
        how, stream = sample.sampling, sample.stream
        self._counts["tokens"] += 1
        stopped = token.id in how.stop_ids or (token.id in self.eos and not how.ignore_eos)
        text = "" if stream is None or stopped else stream.push(token.id)
        ended = stopped or (stream is not None and stream.stopped)
        if not (ended or len(sample.ids) >= sample.longest):
            return Event(request=sample.request, sample=sample.index, token=token, text=text)
        text += "" if stream is None else stream.close()
        return self._end(sample, token, text, "stop" if ended else "length")

    def _end(self, sample: _Running, token: Token | None, text: str, reason: FinishReason) -> Event:
        self._scheduler.remove(sample)
        self._counts["found_tokens"] += sample.found or 0
        samples = self._requests[sample.request]
        samples.remove(sample)
        if not samples:
            del self._requests[sample.request]
        return Event(
            request=sample.request,
            sample=sample.index,
            token=token,
            text=text,
            completion=sample.completion(reason),
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue prompts until all have ended.

        Args:
            prompts: Texts or ids.
            sampling: How all are continued, or how each is.
            progress: Whether a terminal shows how far it is.

        Returns:
            `n` completions of each prompt, in order.

        Raises:
            UserError: As `encode`, before anything is computed; or if there are not as many
                samplings as prompts.
            RuntimeError: If requests that were added are under way.
        """
        if self.busy:
            raise RuntimeError(
                f"generate needs an engine without requests, and {len(self._requests)} are under "
                f"way: step until none is"
            )
        if isinstance(prompts, str) or any(isinstance(prompt, int) for prompt in prompts):
            raise UserError(f"prompts must be a list of texts or of lists of ids: {prompts!r:.40}")
        one = isinstance(sampling, Sampling) or sampling is None
        how: Any = [sampling or Sampling()] * len(prompts) if one else sampling
        if len(how) != len(prompts):
            raise UserError(f"{len(prompts)} prompts must have as many samplings; got {len(how)}")
        encoded = [self.encode(p, s) for p, s in zip(prompts, how, strict=True)]
        requests = [self.add(ids, s) for ids, s in zip(encoded, how, strict=True)]
        ended: list[Completion] = []
        try:
            for event in self._run(sum(s.n for s in how), progress):
                if event.completion is not None:
                    ended.append(event.completion)
        except BaseException:
            for request in requests:
                self.cancel(request)
            self._events = []
            raise
        return sorted(ended, key=lambda c: (c.request, c.sample))

    def _run(self, samples: int, progress: bool) -> Iterator[Event]:
        """Step until nothing is left."""
        from .progress import Progress

        with Progress(samples, shown=progress) as bar:
            while self.busy:
                events = self.step()
                yield from events
                bar.update(sum(e.completion is not None for e in events), len(events))
