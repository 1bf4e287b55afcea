"""The thread that owns the engine, and the jobs that cross over to it.

The event loop reserves room, submits a job and awaits what the job is handed; the thread steps the
engine. What crosses over is a queue of commands, one way, and calls that the loop runs soon, the
other way: at most a few are under way, so that a loop that is late slows the engine down rather
than the memory up. What a client does not take is kept up to a bound, and then its job ends.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..rollout import Engine, Event, Sampling
from .metrics import Metrics
from .refusal import Refusal, failed

Ended = Literal["completed", "disconnected", "stalled", "stopped", "failed"]
_BATCHES = 4  # steps that the loop may be behind


class Job:
    """A request on its way through the engine; all but `numbers` belongs to the event loop.

    Args:
        prompts: Ids of each prompt, and how it is continued.
        stream: Whether each token is handed over, or only whole texts.
        limit: Events that are kept for a client that does not take them.
        abort: Ends the connection of a client that lets them fill.

    Attributes:
        accepted: When the job was submitted, in seconds of a monotonic clock.
        ended: Why nothing more will come; `None` while something will.
        gone: Why the client is not there any more; it may have missed the end.
        numbers: The engine's number of each prompt; belongs to the thread.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[list[int], Sampling]],
        *,
        stream: bool,
        limit: int,
        abort: Callable[[], None],
    ) -> None:
        self.prompts, self.stream, self.limit, self.abort = prompts, stream, limit, abort
        self.samples = self.left = sum(how.n for _, how in prompts)
        self.accepted, self.last = 0.0, dict[int, float]()
        self.ended: Ended | None = None
        self.gone: Ended | None = None
        self.numbers: list[int] = []
        self._kept: list[tuple[int, Event]] = []
        self._wake = asyncio.Event()

    def put(self, choice: int, event: Event) -> bool:
        """Keep an event of a text; return whether there was room."""
        wanted = self.ended is None and (self.stream or event.completion is not None)
        if wanted and self.stream and len(self._kept) >= self.limit:
            return False
        if wanted:
            self._kept.append((choice, event))
            self._wake.set()
        return True

    def end(self, why: Ended) -> None:
        """Say that nothing more will come; the first reason stands."""
        if self.ended is None:
            self.ended = why
            if why != "completed":
                self._kept = []
            self._wake.set()

    async def take(self) -> list[tuple[int, Event]]:
        """Return what has come, with the number of its text; nothing once all has."""
        while not self._kept and self.ended is None:
            self._wake.clear()
            await self._wake.wait()
        kept, self._kept = self._kept, []
        return kept


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        engine: Owned by the thread from `start` on; only `encode` and what does not change may be
            used elsewhere.
        metrics: Written by the event loop.
        most: Texts that may be accepted and not have ended.

    Attributes:
        error: What ended the thread before its time.
        stats: The engine's, after its last step.
        pending: Texts that are reserved, or accepted and have not ended.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, most: int) -> None:
        self.engine, self.metrics, self.most = engine, metrics, most
        self.error: BaseException | None = None
        self.stats, self.pending = engine.stats, 0
        self._jobs: set[Job] = set()
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        # of the thread, by the engine's number: whose, and the first text's; texts that go on
        self._owners: dict[int, tuple[Job, int]] = {}
        self._left: dict[int, int] = {}
        self._room = threading.Semaphore(_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Texts that were accepted and do not run."""
        return max(self.pending - self.stats.running, 0)

    def start(self) -> None:
        """Start the thread; called by the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread; blocks, so call it beside the loop. Jobs that are left are cancelled."""
        self._stopped.set()
        self._commands.put(("stop", None))
        self._thread.join(timeout_s)

    def reserve(self, samples: int) -> None:
        """Keep room for texts.

        Raises:
            Refusal: If there is none, or the engine has failed.
        """
        if self.error is not None:
            raise failed()
        if self.pending + samples > self.most:
            raise Refusal(
                429,
                f"the server may have {self.most} texts under way and has {self.pending}: ask for "
                f"{samples} later",
                outcome="busy",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.pending += samples

    def release(self, samples: int) -> None:
        """Give reserved room back."""
        self.pending -= samples

    def submit(self, job: Job) -> None:
        """Hand a job to the engine; its room is reserved, and is given back when it has ended."""
        if self.error is not None or self._stopped.is_set():
            job.end("failed" if self.error is not None else "stopped")
            return
        job.accepted = time.monotonic()
        self._jobs.add(job)
        self.metrics.accepted += 1
        self.metrics.prompt_tokens += sum(len(ids) for ids, _ in job.prompts)
        self._commands.put(("add", job))

    def end(self, job: Job, why: Ended) -> None:
        """End a job that has not ended: nothing more is handed over, its pages become free."""
        if job.ended is None:
            job.end(why)
            self._commands.put(("cancel", job))

    def end_all(self, why: Ended) -> None:
        """End all jobs."""
        for job in [*self._jobs]:
            self.end(job, why)

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while self._turn():
                continue
        except BaseException as error:
            self._post(self._broke, error)
            if not isinstance(error, Exception):
                raise

    def _turn(self) -> bool:
        """Do what was asked, and a step; return whether there will be another turn."""
        block = not self.engine.busy
        while block or not self._commands.empty():
            command, job = self._commands.get()
            block = False
            if job is None:
                return False
            if command == "add":
                self._add(job)
            else:
                for number in job.numbers:
                    self.engine.cancel(number)
        events = self.engine.step()
        news = [(*self._owners[event.request], event) for event in events]
        for event in events:
            if event.completion is not None:
                self._forget(event.request)
        return self._post(self._arrived, news, self.engine.stats, time.monotonic())

    def _add(self, job: Job) -> None:
        first = 0
        for ids, how in job.prompts:
            number = self.engine.add(ids, how)
            job.numbers.append(number)
            self._owners[number] = job, first
            self._left[number] = how.n
            first += how.n

    def _forget(self, number: int) -> None:
        """Let a request go when its last text has ended."""
        self._left[number] -= 1
        if not self._left[number]:
            del self._left[number], self._owners[number]

    def _post(self, call: Callable[..., None], *args: Any) -> bool:
        """Have the loop call something soon; wait while it is behind."""
        while not self._room.acquire(timeout=1):
            if self._stopped.is_set():
                return False
        try:
            self._loop.call_soon_threadsafe(self._on_loop, call, args)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # What follows runs in the event loop.

    def _on_loop(self, call: Callable[..., None], args: Sequence[Any]) -> None:
        self._room.release()
        call(*args)

    def _arrived(self, news: Sequence[tuple[Job, int, Event]], stats: Any, now: float) -> None:
        self.stats = stats
        for job, first, event in news:
            choice = first + event.sample
            if event.token is not None:
                self.metrics.tokens += 1
                if not job.last:
                    self.metrics.first_token.observe(now - job.accepted)
                elif choice in job.last:
                    self.metrics.token.observe(now - job.last[choice])
                job.last[choice] = now
            if not job.put(choice, event):
                self.end(job, "stalled")
                job.abort()
            if event.completion is not None:
                self._ended(job, now)

    def _ended(self, job: Job, now: float) -> None:
        job.left -= 1
        self.pending -= 1
        if not job.left:
            self.metrics.request.observe(now - job.accepted)
            self._jobs.discard(job)
            job.end("completed")

    def _broke(self, error: BaseException) -> None:
        self.error = error
        for job in self._jobs:
            job.end("failed")
        self._jobs.clear()
