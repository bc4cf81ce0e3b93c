"""Decode steps of fixed shapes: the same operations whatever the requests, so that a CUDA graph holds a whole step.

A step has 1, 2, 4, 8 … rows, each a token with pages of its own. What a row is lies in one array of numbers, copied to
the device before the step; everything else is worked out there. Rows that nobody needs write to a page that nobody
reads, go to no other rank's experts, and count for nothing. Ranks that share experts compute the same shape at the same
time, so that what they exchange has sizes that no host has to read. A rank that hosts experts alone computes their part
of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shoal.kernels.few import MOST
from shoal.kernels.nsa.paged import PagedCache, decode_tables
from shoal.kernels.nsa.paged_store import Compressed
from shoal.workers.data.batch import PackedBatch
from shoal.workers.engine.cache import PagedAttention, reach
from shoal.workers.engine.few import by_triton, few_stages
from shoal.workers.engine.request import UNSHAPED, Shape
from shoal.workers.engine.tables import ALIGNED, SINGLE, Part, Tables, fill, sizes_of
from shoal.workers.gathered import Live
from shoal.workers.model import Transformer
from shoal.workers.model.attention import rotation_rates
from shoal.workers.model.feedforward import run
from shoal.workers.model.load import MoELoad

FEW = MOST
"""Rows up to which a step takes its layers in few launches. 0: none, and tables of steps in many launches too."""
MOST_ROWS = 256
FEWEST_PAGES = 64  # that a graph has room for: below, a step costs the same
BOTH = 8  # rows up to which a step without compressed rows has a graph of its own: of more, some row mostly ends one


@dataclass(frozen=True)
class Rows:
    """What the rows of a step are, int64, on the device. tokens, positions: ``[B]``. live: ``[B]``, 1 for rows that
    somebody needs. near_start: ``[B]``, the number of the first near page. near: ``[B, W]``, far: ``[B, P]``."""

    tokens: Tensor
    positions: Tensor
    live: Tensor
    near_start: Tensor
    near: Tensor
    far: Tensor


class RowTables(Tables):
    """Tables of single rows, made on the device. scratch: the far page for compressed rows that do not end. rates: of
    ``rotation_rates``, for NSA that Triton computes, whose tables then take one launch."""

    def __init__(
        self, model: Transformer, rows: Rows, compress: bool, scratch: int, rates: Tensor | None = None
    ) -> None:
        recipe, m = model.recipe, model.recipe.model
        if rates is not None:
            from shoal.kernels.nsa.triton_places import triton_row_places

            at, wide = sizes_of(recipe), torch.promote_types(model.dtype, torch.float32)
            arrays = (rows.positions, rows.near_start, rows.far, rows.near, rates)
            places = triton_row_places(*arrays, m.kv_heads, at, wide, scratch if compress else None)
            super().__init__(recipe, rows.tokens, rows.positions, model.dtype, places.rotation)
            self.far, self.near, self.compressed = places.far, places.near, places.compressed
            self.whole = [(slice(0, len(rows.positions)), places.tables)]
            return
        super().__init__(recipe, rows.tokens, rows.positions, model.dtype)
        page = self.sizes.slc_block
        own, place = rows.positions // page, rows.positions % page
        self.far = self.to_rows(_pick(rows.far, own), place)
        self.near = self.far[:0]
        if self.nsa:
            self.near = self.to_rows(_pick(rows.near, own - rows.near_start), place)
            self.compressed = self._compress(rows, scratch) if compress else None
        first = rows.near_start * page
        tables = decode_tables(rows.positions, rows.far, rows.near, first, m.kv_heads, self.sizes)
        self.whole = [(slice(0, len(place)), tables)]

    def _compress(self, rows: Rows, scratch: int) -> Compressed:
        """A compressed row for every row of the step; those that do not end yet go to the scratch page."""
        s, page, t = self.sizes, self.sizes.slc_block, rows.positions
        per = page // s.cmp_stride
        ended = ((t + 1) // s.cmp_stride - 1).clamp(min=0)
        begins = (ended + 1) * s.cmp_stride - s.cmp_block
        ends = ((t + 1) % s.cmp_stride == 0) & (begins >= 0)
        keys = (begins[:, None] + torch.arange(s.cmp_block, device=t.device)).clamp(min=0)
        near = (keys // page - rows.near_start[:, None]).clamp(0, rows.near.shape[1] - 1)
        far = torch.where(ends, _pick(rows.far, ended // per), scratch)
        return Compressed(
            self.to_compressed(far, ended % per), rows.near.gather(1, near), keys % page, self.rope(keys[:, 0])
        )


class DecodeSteps:
    """Steps of short parts over a model's caches. With ``capture`` each shape is a CUDA graph, made when it is first
    needed or by :meth:`warm_up`; without, the same operations run one by one. Collective over the ranks of the model.

    scratch: a far and a near page of the caches that no sequence has. experts: ``[MoE layers, experts]`` int64, to
    which the choices of live rows are added; None where none are known: without MoE layers, or without experts where
    these have ranks of their own. Such ranks have no caches, no parts, and logits of no tokens.
    """

    def __init__(
        self,
        model: Transformer,
        caches: dict[nn.Module, PagedCache],
        scratch: tuple[int, int],
        most: int,
        experts: Tensor | None,
        capture: bool,
    ) -> None:
        self.model, self.caches, self.scratch, self.experts, self.capture = model, caches, scratch, experts, capture
        self.sizes, self.nsa = sizes_of(model.recipe), model.recipe.attention.kind == "nsa"
        self.device = next(model.parameters()).device
        whole = -(-model.recipe.model.context // self.sizes.slc_block)
        self.rows, self.pages = _doubled(min(most, MOST_ROWS)), _quartered(whole)
        few = FEW > 0 and by_triton(model, caches)
        self.rates = rotation_rates(model.recipe.model, self.device) if few else None
        back = reach(model.recipe)
        self.windows = (back + SINGLE) // self.sizes.slc_block + 2 if back else 0
        size = self._places(Shape(self.rows[-1], self.pages[-1], False))[-1][0].stop
        self.numbers = torch.zeros(size, dtype=torch.int64, device=self.device)
        if capture:
            rows = self.rows[-1] if model.hosts_attention else 0
            self.out = torch.empty(rows, model.recipe.model.vocab, dtype=model.dtype, device=self.device)
            self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def need(self, parts: Sequence[Part]) -> Shape:
        """What one step of these parts needs: ``UNSHAPED`` where a part is too long, nothing without parts."""
        if any(len(p.tokens) > SINGLE for p in parts):
            return UNSHAPED
        stride = self.sizes.cmp_stride
        ends = any(p.stop // stride > p.start // stride for p in parts)
        return Shape(sum(len(p.tokens) for p in parts), max((len(p.far) for p in parts), default=0), ends)

    def fits(self, need: Shape) -> bool:
        """Whether there is a shape that has what is needed; of nothing there is none."""
        return 0 < need.rows <= self.rows[-1]

    def logits(self, parts: Sequence[Part], need: Shape | None = None) -> Tensor:
        """``[T, vocab]`` of the tokens of all parts, to be read before the next step.

        need: what all ranks together need; None: what these parts need.
        """
        shape = self._shape(need or self.need(parts))
        self._put(parts, shape)
        return self._run(shape)[: sum(len(p.tokens) for p in parts)]

    def shapes(self) -> Iterator[Shape]:
        """All there are, the largest first, whose memory the others can use."""
        for rows in reversed(self.rows):
            for pages in reversed(self.pages):
                yield from (Shape(rows, pages, c) for c in self._ways(rows))

    @torch.inference_mode()
    def warm_up(self) -> bool:
        """Makes the graphs of all shapes, on all ranks in one order.

        False, with a warning that says why, where a rank could not make one: steps are then to be computed without.
        """
        for shape in self.shapes():
            self._put((), shape)
            self._rehearse(shape)
            try:
                self.graphs[shape] = self._graph(shape)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph can hold a decode step here ({error}): steps take longer", stacklevel=2)
            if not all(made for (made,) in self.model.mesh.tell([shape in self.graphs])):
                self.graphs.clear()
                return False
            self.graphs[shape].replay()
        return True

    def _ways(self, rows: int) -> tuple[bool, ...]:
        if not self.nsa:
            return (False,)
        return (True, False) if rows <= BOTH else (True,)

    def _shape(self, need: Shape) -> Shape:
        """The smallest that has what is needed."""
        rows = next(n for n in self.rows if n >= need.rows)
        pages = next(n for n in self.pages if n >= need.pages)
        return Shape(rows, pages, self.nsa and (need.compress or rows > BOTH))

    def _places(self, shape: Shape) -> list[tuple[slice, tuple[int, ...]]]:
        """Where the arrays of ``Rows`` lie in one flat array, and their shapes."""
        n, at = shape.rows if self.model.hosts_attention else 0, 0
        found: list[tuple[slice, tuple[int, ...]]] = []
        for dims in ((n,), (n,), (n,), (n,), (n, self.windows), (n, shape.pages)):
            found.append((slice(at, at + math.prod(dims)), dims))
            at += -(-math.prod(dims) // ALIGNED) * ALIGNED
        return found

    def _put(self, parts: Sequence[Part], shape: Shape) -> None:
        """Copies what the rows are to the device, without waiting for it."""
        if not self.model.hosts_attention:
            return
        places = self._places(shape)
        size = places[-1][0].stop
        host = torch.empty(size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        flat = host.numpy()
        tokens, positions, live, near_start, near, far = (flat[place].reshape(dims) for place, dims in places)
        # One array for all rows: numbers that are put one by one take longer than the pages.
        numbers = [(token, p.start + i, 1, p.near_start) for p in parts for i, token in enumerate(p.tokens)]
        count = len(numbers)
        if numbers:
            tokens[:count], positions[:count], live[:count], near_start[:count] = np.array(numbers, np.int64).T
            fill(near[:count], [p.near for p in parts for _ in p.tokens])
            fill(far[:count], [p.far for p in parts for _ in p.tokens])
        for array in (tokens, positions, live, near_start):
            array[count:] = 0
        far[count:], near[count:] = self.scratch
        self.numbers[:size].copy_(host, non_blocking=True)

    def _run(self, shape: Shape) -> Tensor:
        """Logits ``[rows, vocab]`` of what was put."""
        if not self.capture:
            return self._compute(shape)
        if shape not in self.graphs:
            self._rehearse(shape)
            self.graphs[shape] = self._graph(shape)
        self.graphs[shape].replay()
        return self.out[: shape.rows]

    def _rehearse(self, shape: Shape) -> None:
        """Computes a step once, which compiles, connects and loads what is not to be while it is captured."""
        counted = None if self.experts is None else self.experts.clone()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._compute(shape)
            if self.experts is not None and counted is not None:
                self.experts.copy_(counted)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _graph(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """Captures a step that was computed before."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread may not allocate meanwhile; others have nothing to do with the capture.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            self.out[: shape.rows].copy_(self._compute(shape))
        return graph

    def _compute(self, shape: Shape) -> Tensor:
        """What a graph holds: nothing in it depends on a number that the host would have to know."""
        rows = Rows(*(self.numbers[place].view(dims) for place, dims in self._places(shape)))
        batch = PackedBatch(rows.tokens, rows.tokens, rows.positions, (0, len(rows.tokens)))
        load = MoELoad(shape.rows, balance=False, live=Live(rows.live, shape.rows))
        attention = None
        if self.model.hosts_attention:
            tables = RowTables(self.model, rows, shape.compress, self.scratch[0], self.rates)
            attention = PagedAttention(tables, self.caches)
        if attention and self.rates is not None and shape.rows <= FEW:
            hidden = run(few_stages(self.model, batch, load, attention))
        else:
            hidden = run(self.model.stages(batch, load, attention))
        load.add_to(self.experts)
        return self.model.logits(hidden) if attention else hidden.new_empty(0, self.model.recipe.model.vocab)


def capturable(model: Transformer) -> bool:
    """Whether CUDA graphs can hold the steps of all ranks: on GPUs whose counts stay there. Collective."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    here = on_gpu and all(layer.on_device for layer in model.moe_layers)
    return all(there for (there,) in model.mesh.tell([here]))


def _doubled(most: int) -> list[int]:
    """1, 2, 4, 8 … up to the first that is ``most`` or more."""
    return [1 << i for i in range((most - 1).bit_length() + 1)]


def _quartered(whole: int) -> list[int]:
    """``whole``, a quarter of it, and so on, the smallest first."""
    sizes = [whole]
    while sizes[-1] > FEWEST_PAGES:
        sizes.append(-(-sizes[-1] // 4))
    return sizes[::-1]


def _pick(table: Tensor, column: Tensor) -> Tensor:
    """Of each row of ``[B, n]`` the element in its column ``[B]``."""
    return table.gather(1, column[:, None])[:, 0]
