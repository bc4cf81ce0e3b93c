"""The engine of one rank: requests in, tokens out, a step at a time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.kernels.nsa.paged import PagedCache
from shoal.workers.data.batch import IGNORE, PackedBatch
from shoal.workers.engine.cache import PagedAttention, make_caches, page_bytes, reach
from shoal.workers.engine.decode import DecodeSteps, capturable
from shoal.workers.engine.request import UNSHAPED, Busy, Finish, Limits, Load, Output, Request, Sampling, Token, Turn
from shoal.workers.engine.sampling import NO_TOKEN, accepted, choose, spans, to_device
from shoal.workers.engine.scheduler import Chunk, Scheduler
from shoal.workers.engine.sequence import Pools, Sequence
from shoal.workers.engine.tables import SINGLE, Part, StepTables, warm_parts
from shoal.workers.errors import ClusterRefused, InvalidInput
from shoal.workers.expert_plan import Homes, Plan
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import Stages, interleave, named_views
from shoal.workers.model.load import MoELoad
from shoal.workers.rehome import rehome

CACHED_SEQUENCES = 2  # near pages kept for prefixes, in sequences for each one that runs


class Engine:
    """Continuous batching over a model with paged caches. Not thread-safe: one thread calls it.

    With several ranks every rank steps at the same time, those without requests too: the experts are shared.
    """

    def __init__(
        self, model: Transformer, limits: Limits, memory: int | None = None, fixed: bool | None = None
    ) -> None:
        """memory: bytes that the caches may take; None for no limit. fixed: whether decode steps have fixed shapes, in
        CUDA graphs on a GPU; None: where graphs can hold them and ``limits`` want graphs. All ranks call it alike.

        Raises ClusterRefused when the pages of one sequence at full context do not fit.
        """
        self.model, self.limits = model, limits
        recipe = model.recipe
        self.context, self.device = recipe.model.context, next(model.parameters()).device
        fixed = limits.graphs and capturable(model) if fixed is None else fixed
        joined = model.join_shared()
        self.pools = self._make_pools(None if memory is None else memory - joined)
        self.scheduler = Scheduler(limits, self.pools, self.context)
        self.sequences: dict[str, Sequence] = {}
        self.moves: deque[tuple[int, Homes]] = deque()  # MoE layers whose experts are to move, and where to
        self._load = Load(capacity=limits.sequences, pages=self.pools.far.size)
        layers = sum(block.moe is not None for block in model.layers)
        counts = torch.zeros(layers, recipe.moe.experts, dtype=torch.int64, device=self.device)
        # Where experts have ranks of their own, only these know what all tokens chose.
        self._experts: Tensor | None = counts if layers and model.mesh.hosts_experts else None
        self._accepted = 0
        self._apart = model.mesh.placement.apart
        self._planned: tuple[list[Chunk], list[Part]] = [], []
        scratch = self.pools.far.size, self.pools.near.size
        self.caches: dict[nn.Module, PagedCache] = {}
        if model.hosts_attention:
            attentions: list[Any] = [block.attention for block in model.layers]
            caches = make_caches(recipe, scratch[0] + fixed, scratch[1] + fixed, model.dtype, self.device)
            self.caches = dict(zip(attentions, caches, strict=True))
        self.decode: DecodeSteps | None = None
        if fixed:
            most = min(limits.step, limits.sequences * (1 + min(limits.speculate, SINGLE - 1)))
            self.decode = DecodeSteps(model, self.caches, scratch, most, self._experts, self.device.type == "cuda")

    def _make_pools(self, memory: int | None) -> Pools:
        recipe, limits = self.model.recipe, self.limits
        page, back = recipe.attention.slc_block, reach(recipe)
        whole = -(-self.context // page)
        near = 0
        if back:
            each = -(-back // page) + 2
            near = limits.sequences * each * (1 + CACHED_SEQUENCES * limits.prefix_cache) + -(-limits.step // page)
        far = limits.pages or limits.sequences * whole
        if memory is not None and self.model.hosts_attention:
            far_bytes, near_bytes = page_bytes(recipe, self.model.dtype.itemsize)
            far = min(far, max(0, memory - near * near_bytes) // far_bytes)
        if far < whole:
            raise ClusterRefused(
                f"{far} pages of {page} tokens are fewer than a sequence of model.context={self.context} needs "
                f"({whole}): give the cache more memory or pages, or lower serve.sequences"
            )
        return Pools(far, near, page, back, limits.prefix_cache)

    def add(self, request: Request, again: bool = False) -> None:
        """Queues a request. again: it was accepted before, by an engine that is gone; a full queue takes it too.

        Raises InvalidInput when it can never be computed, Busy when the queue is full.
        """
        longest = len(request.prompt) + request.sampling.max_tokens
        if not request.prompt:
            raise InvalidInput("the prompt is empty: give at least one token")
        if longest > self.context:
            raise InvalidInput(
                f"prompt and max_tokens come to {len(request.prompt)} + {request.sampling.max_tokens} tokens, more "
                f"than the model's context of {self.context}: shorten the prompt or lower max_tokens"
            )
        vocab = self.model.recipe.model.vocab
        if not all(0 <= t < vocab for t in request.prompt):
            raise InvalidInput(
                f"the prompt holds token ids outside 0 … {vocab - 1}: encode it with this model's tokenizer"
            )
        if request.id in self.sequences:
            raise InvalidInput(f"request id {request.id!r} is in use: give each request its own")
        if len(self.scheduler.waiting) >= self.limits.waiting and not again:
            raise Busy(f"{len(self.scheduler.waiting)} requests wait already: try again a little later")
        sequence = Sequence(request, self.pools)
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, request: str) -> bool:
        """Ends a request and frees its pages; False when there is none of this id (any more)."""
        sequence = self.sequences.pop(request, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
        return sequence is not None

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.sequences)

    def turn(self, stop: bool = False) -> Turn:
        """Plans the next step, and says what all ranks of the model do in it together; collective over them.

        stop: whether this one wants to end instead. Requests are added and cancelled before it, not before the step.
        """
        chunks = self.scheduler.plan() if self.model.hosts_attention else []
        chunks.sort(key=lambda c: c.size > SINGLE)  # short ones first, as StepTables wants them
        parts = [_part(c) for c in chunks]
        self._planned = chunks, parts
        shape = self.decode.need(parts) if self.decode else UNSHAPED
        own = Turn(len(self.sequences), stop, shape, bool(self.moves))
        return Turn.together(self.model.mesh.tell(own.numbers()))

    @torch.inference_mode()
    def step(self, turn: Turn | None = None) -> list[Output]:
        """Computes one step and returns the news, in no particular order. Collective over the ranks of the model.

        turn: what :meth:`turn` said of it; None: it is planned now. From two requests on over all ranks, and where
        attention and experts have ranks of their own, one that is of no fixed shape is computed as two halves by turns,
        so that neither side waits for the other.
        """
        began = time.perf_counter()
        turn = turn or self.turn()
        chunks, _ = self._planned
        self.model.join_shared()  # of weights that were loaded anew
        fixed = self.decode is not None and self.decode.fits(turn.shape)
        halves = 2 if turn.requests > 1 and self._apart and not fixed else 1
        computed = self._compute(turn, fixed, halves)
        # Until it asks for the tokens, the host goes on while a GPU computes.
        prompt = sum(min(c.count, max(0, len(c.sequence.request.prompt) - c.sequence.computed)) for c in chunks)
        tokens = self._choose(computed, fixed, halves)
        outputs = [self._take(chunk, new) for chunk, new in zip(chunks, tokens, strict=True)]
        self._count(chunks, outputs, prompt, time.perf_counter() - began)
        return [o for o in outputs if o.tokens or o.finish]

    def place(self, plan: Plan) -> None:
        """Has experts move to where a plan says: a layer before each step, so that no answer waits long. All ranks get
        the same plan, and none before the last one's moves are done."""
        now = [layer.homes for layer in self.model.moe_layers]
        self.moves.extend((i, homes) for i, homes in enumerate(plan) if homes != now[i])

    @torch.no_grad()
    def move(self) -> None:
        """Moves the experts of the next layer, in a turn with moves, before its step; collective. Weights and tables
        change where they are, in the slots that a rank has for experts: CUDA graphs read what is there."""
        layer, homes = self.moves[0]
        moe = self.model.moe_layers[layer]

        def stacked() -> dict[str, Tensor]:
            return {name: weights.data[i] for name, weights, i in named_views(moe) if i is not None}

        before = stacked()
        moe.assign(homes)
        rehome(self.model.mesh.world, before, stacked())
        self.moves.popleft()

    def warm_up(self) -> None:
        """On GPUs prepares what steps need and what is slow the first time, and without it is slow then. Before the
        first request; collective over the ranks of the model."""
        if self.device.type != "cuda":
            return
        self._warm_prompts()
        if any(layer.dispatcher.rooms for layer in self.model.moe_layers):
            self._warm_moves()
        if self.decode and not self.decode.warm_up():
            self.decode = None

    def _warm_moves(self) -> None:
        """Makes the connections over which experts move, from every rank to every other one."""
        world = self.model.mesh.world
        each = dict(zip(map(str, range(world.size)), torch.zeros(world.size, 1, device=self.device), strict=True))
        own = str(world.index)
        rehome(world, {own: each[own]}, each)

    @torch.inference_mode()
    def _warm_prompts(self) -> None:
        """Computes prompts over pages that are nobody's yet, and leaves no trace of them."""
        recipe = self.model.recipe
        for parts in warm_parts(recipe, self.limits.step, reach(recipe), self.limits.sequences):
            hidden = interleave([self._forward(parts if self.model.hosts_attention else [])])[0]
            if self.model.hosts_attention:
                self.model.logits(hidden[-1:])
        if self._experts is not None:
            self._experts.zero_()
        for cache in self.caches.values():
            for tensor in vars(cache).values():
                tensor[:1] = 0

    def load(self) -> Load:
        """How busy this engine is."""
        return replace(
            self._load,
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_used=self.pools.far.size - self.pools.far.free,
            pages_cached=self.pools.far.cached,
            preemptions_total=self.scheduler.preemptions,
            cached_tokens_total=self.scheduler.cached,
            expert_tokens=() if self._experts is None else tuple(map(tuple, self._experts.tolist())),
        )

    def _compute(self, turn: Turn, fixed: bool, halves: int) -> Tensor:
        """Of all tokens logits ``[tokens, vocab]``, or, not ``fixed``, hidden states, half by half."""
        _, parts = self._planned
        if fixed:
            assert self.decode is not None
            return self.decode.logits(parts, turn.shape)
        return torch.cat(interleave([self._forward(parts[half::halves]) for half in range(halves)]))

    def _choose(self, computed: Tensor, fixed: bool, halves: int) -> list[list[Token]]:
        """Of each chunk the tokens chosen after its last token and after each guess; none if it ends before."""
        chunks, _ = self._planned
        order = [chunk for half in range(halves) for chunk in chunks[half::halves]]
        rows: list[int] = []
        places: list[int] = []
        samplings: list[Sampling] = []
        for chunk, span in zip(order, spans([c.size for c in order]), strict=True):
            if chunk.samples:
                rows += range(span.start + chunk.count - 1, span.stop)
                samplings += [chunk.sequence.request.sampling] * (1 + len(chunk.guesses))
                places += range(chunk.sequence.generated, chunk.sequence.generated + 1 + len(chunk.guesses))
        if not rows:
            return [[] for _ in chunks]
        computed = _rows(computed, rows)
        chosen = choose(computed if fixed else self.model.logits(computed), samplings, places)
        counts = spans([1 + len(c.guesses) if c.samples else 0 for c in order])
        found = {id(chunk): chosen[span] for chunk, span in zip(order, counts, strict=True)}
        return [found[id(chunk)] for chunk in chunks]

    def _forward(self, parts: list[Part]) -> Stages:
        """Hidden states ``[tokens, hidden]`` of parts, short ones first."""
        tables = StepTables(self.model.recipe, parts, self.model.dtype, self.device)
        ids = tables.tokens
        batch = PackedBatch(ids, torch.full_like(ids, IGNORE), tables.positions, (0, len(ids)))
        load = MoELoad(max(1, len(ids)), balance=False)
        attention = PagedAttention(tables, self.caches) if self.model.hosts_attention else None
        hidden = yield from self.model.stages(batch, load, attention)
        load.add_to(self._experts)
        return hidden

    def _take(self, chunk: Chunk, tokens: list[Token]) -> Output:
        """Adds to a sequence what came out of its chunk; ends it if that was its end."""
        sequence = chunk.sequence
        if any(token.id == NO_TOKEN for token in tokens):
            return self._spoilt(sequence)
        sequence.advance(chunk.count)
        if not chunk.samples:
            return Output(sequence.request.id)
        right = accepted(chunk.guesses, tokens)
        sampling, new, finish = sequence.request.sampling, [], None
        for token in tokens[: right + 1]:
            if token.id in sampling.stop_tokens:
                finish = Finish.stop
                break
            new.append(token)
            sequence.tokens.append(token.id)
            if sequence.generated >= sampling.max_tokens:
                finish = Finish.length
                break
        if right:
            sequence.advance(min(right, len(new)))  # guesses that came true are in the cache
        if finish:
            self.cancel(sequence.request.id)
        self._accepted += right
        told, sequence.told = sequence.told, True
        return Output(sequence.request.id, tuple(new), finish, 0 if told else sequence.cached or 0)

    def _spoilt(self, sequence: Sequence) -> Output:
        """Ends a request whose logits are not finite, and cleans its pages: nothing finite comes out of them.

        Pages that others hold too are theirs to clean: they end in the same way if it was these.
        """
        far, near = self.pools.far.sole(sequence.far), self.pools.near.sole(sequence.near)
        for cache in self.caches.values():
            for pages, tensors in (
                (far, (cache.k_slc, cache.v_slc, cache.k_cmp, cache.v_cmp)),
                (near, (cache.k_win, cache.v_win, cache.k_raw, cache.v_raw)),
            ):
                for tensor in tensors if pages else ():
                    tensor[pages] = 0
        self.cancel(sequence.request.id)
        return Output(sequence.request.id, (), Finish.error)

    def _count(self, chunks: list[Chunk], outputs: list[Output], prompt: int, seconds: float) -> None:
        was = self._load
        self._load = replace(
            was,
            steps_total=was.steps_total + 1,
            step_seconds_total=was.step_seconds_total + seconds,
            prompt_tokens_total=was.prompt_tokens_total + prompt,
            generated_tokens_total=was.generated_tokens_total + sum(len(o.tokens) for o in outputs),
            proposed_tokens_total=was.proposed_tokens_total + sum(len(c.guesses) for c in chunks),
            accepted_tokens_total=self._accepted,
        )


def _part(chunk: Chunk) -> Part:
    s = chunk.sequence
    tokens = (*s.tokens[s.computed : s.computed + chunk.count], *chunk.guesses)
    return Part(tokens, s.computed, s.far.array, s.near.array, s.near_start)


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """``x[rows]``, without a copy of all of them, and without waiting for a GPU."""
    if rows == list(range(len(x))):
        return x
    return x.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), x.device))
