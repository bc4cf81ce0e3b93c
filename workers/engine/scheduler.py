"""Which tokens of which requests are computed in the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from shoal.workers.engine.request import Limits
from shoal.workers.engine.sequence import Pools, Sequence


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence, from its first one that is not in the cache.

    count: tokens of the sequence. samples: whether they are its last, so that the next token comes out of them.
    guesses: tokens computed after them, in the hope that they are what comes.
    """

    sequence: Sequence
    count: int
    samples: bool
    guesses: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens to compute."""
        return self.count + len(self.guesses)


class Scheduler:
    """Continuous batching. Sequences that generate come first, then prompts, in chunks, in the order of arrival.

    When pages run out the sequence that came last gives up all of its pages, and is computed again later; the first one
    never does, so that somebody always gets on. preemptions: how often that was. cached: tokens of prompts
    that were found in the cache.
    """

    def __init__(self, limits: Limits, pools: Pools, context: int) -> None:
        self.limits, self.pools, self.context = limits, pools, context
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.cached = 0

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, which ended or was cancelled, and frees its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.release()
        else:
            self.waiting.remove(sequence)

    def plan(self) -> list[Chunk]:
        """The chunks of the next step; their pages are reserved."""
        budget = self.limits.step
        chunks: list[Chunk] = []
        preempted = self.preemptions
        for prefilling in (False, True):
            for sequence in [s for s in self.running if (s.remaining > 1) == prefilling]:
                # it may have been preempted for one before it
                if budget and (preempted == self.preemptions or sequence in self.running):
                    chunk = _chunk(sequence, budget)
                    if self._make_room(sequence, sequence.computed + chunk.count, chunks):
                        chunks.append(chunk)
                        budget -= chunk.count
        while budget and self.waiting and len(self.running) < self.limits.sequences:
            admitted = self._admit(budget)
            if not admitted:
                break
            chunks.append(admitted)
            budget -= admitted.count
        return self._with_guesses(chunks, budget)

    def _with_guesses(self, chunks: list[Chunk], budget: int) -> list[Chunk]:
        """Adds guesses where the step has room left, and pages are free: they take nothing from what is certain."""
        if not self.limits.speculate:
            return chunks
        guessing = []
        for chunk in chunks:
            sequence = chunk.sequence
            guesses = self._guesses(sequence, budget) if chunk.samples and sequence.generated else ()
            upto = sequence.computed + chunk.count + len(guesses)
            if guesses and sequence.reserve(upto):
                budget -= len(guesses)
                chunk = replace(chunk, guesses=guesses)
            guessing.append(chunk)
        return guessing

    def _guesses(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Guesses that neither leave the context nor come after the last token that may be generated."""
        left = sequence.request.sampling.max_tokens - sequence.generated - 1
        count = min(self.limits.speculate, left, self.context - len(sequence.tokens), budget)
        return tuple(sequence.ngrams.propose(count)) if count > 0 else ()

    def _make_room(self, sequence: Sequence, upto: int, chunks: list[Chunk]) -> bool:
        """Reserves pages, if need be those of sequences that came later. False when this one had to give way itself."""
        while not sequence.reserve(upto):
            last = self.running[-1]
            self._preempt(last)
            chunks[:] = [c for c in chunks if c.sequence is not last]
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.release()
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self, budget: int) -> Chunk | None:
        """Starts the first sequence that waits, if there are pages for all of its tokens."""
        sequence = self.waiting[0]
        sequence.adopt_prefix()
        chunk = _chunk(sequence, budget)
        near = sequence.computed + min(sequence.remaining, self.limits.step)
        if sequence.missing(len(sequence.tokens))[0] > self.pools.far.free or not sequence.fits(near):
            sequence.release()
            return None
        sequence.reserve(sequence.computed + chunk.count)
        self.waiting.popleft()
        self.running.append(sequence)
        if sequence.cached is None:
            sequence.cached = min(sequence.computed, len(sequence.request.prompt))
            self.cached += sequence.cached
        return chunk


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    count = min(sequence.remaining, budget)
    return Chunk(sequence, count, count == sequence.remaining)
