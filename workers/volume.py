"""How many bytes a rank receives for one attention layer over a sequence that ranks share, by formula.

Ranks hold segments of a pack. Of a document that begins at 0, a segment [a, b) reads the selected branch's keys of
[0, b), the window's of [a - w + 1, b), and the B(b) compressed blocks that end there, B(t) = (t - l) / d + 1. It makes
blocks B(a) to B(b), of the tokens from d · B(a) on. What other ranks hold of these arrives forwards, each row once;
backwards the gradients arrive of what the others read of this rank's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.kernels.nsa import BlockSizes
    from shoal.kernels.nsa.rows import Range, Rows

PACKED = 64 << 20
"""Bytes of all ranks' rows that may be packed where nearly all of them travel; they are in memory twice then."""
PLANS = ("raw", "cmp", "near", "far")
"""What moves, as ``workers/sequence.py`` names it: tokens before φ, compressed keys, windows, selected keys."""


@dataclass(frozen=True)
class Shape:
    """What a volume depends on. dims: d_qk and d_v. itemsize: bytes of an element, wide: of a far gradient's."""

    kv_heads: int
    dims: tuple[int, int]
    itemsize: int
    wide: int


def nsa_volume(
    cu_seqlens: Sequence[int], owned: Sequence[Rows], rank: int, shape: Shape, sizes: BlockSizes
) -> dict[str, dict[str, int]]:
    """Bytes by phase (``forward``, ``backward``) and by plan (:data:`PLANS`), of documents of any length.

    owned: the tokens of each rank of the group (``workers/sequence.py``, ``zigzag``).
    """
    arriving, returning = Counter[str](), Counter[str]()
    for first, end in pairwise(cu_seqlens):
        within = [
            [(max(a, first) - first, min(b, end) - first) for a, b in rows.ranges if max(a, first) < min(b, end)]
            for rows in owned
        ]
        read, held = [_read(segments, sizes) for segments in within], [_held(segments, sizes) for segments in within]
        for plan in PLANS:
            for other in range(len(owned)):
                if other != rank:
                    arriving[plan] += _shared(read[rank][plan], held[other][plan])
                    returning[plan] += _shared(read[other][plan], held[rank][plan])
    row = shape.kv_heads * sum(shape.dims)
    forward = {plan: arriving[plan] * row * shape.itemsize for plan in PLANS}
    backward = {plan: returning[plan] * row * shape.itemsize for plan in PLANS}
    backward["far"] = forward["far"] + returning["far"] * row * shape.wide  # keys are fetched once more
    return {"forward": forward, "backward": backward}


def _read(segments: Sequence[Range], sizes: BlockSizes) -> dict[str, list[Range]]:
    """Rows that a rank reads for its segments of a document, of which neither starts nor stops before the last one."""
    blocks = _held(segments, sizes)["cmp"]
    d, rest = sizes.cmp_stride, sizes.cmp_block - sizes.cmp_stride
    return {
        "raw": [(low * d, high * d + rest) for low, high in blocks if low < high],
        "cmp": [(0, high) for _, high in blocks],
        "near": [(max(0, start - sizes.window + 1), stop) for start, stop in segments],
        "far": [(0, stop) for _, stop in segments],
    }


def _held(segments: Sequence[Range], sizes: BlockSizes) -> dict[str, list[Range]]:
    """Rows that a rank has of its own: tokens, and the blocks that end with one of them."""
    blocks = [(sizes.cmp_blocks(start), sizes.cmp_blocks(stop)) for start, stop in segments]
    return {plan: blocks if plan == "cmp" else list(segments) for plan in PLANS}


def _shared(read: Sequence[Range], held: Sequence[Range]) -> int:
    """How many rows of those held are read, each counted once."""
    count = 0
    for low, stop in held:
        for first, last in read:
            count += max(0, min(last, stop) - max(first, low))
            low = max(low, last)  # the next range of those read begins no earlier than this one
    return count


def far_volume(rows: int, shape: Shape, forwards: int = 1, told: int = 0) -> int:
    """Bytes of the selected branch that ranks together receive for one layer, forward and backward, of any documents.

    rows: keys of a head, with their values, that go from one rank to another whenever they are fetched; their gradients
    return. forwards: passes that fetch them, beside the backward one: one more where a layer is computed again. told:
    of how many pages ranks tell one another whether they chose them, a byte each, in each of those passes.
    """
    return rows * sum(shape.dims) * (shape.itemsize * (forwards + 1) + shape.wide) + forwards * told


def ring_volume(tokens: int, ranks: int, shape: Shape) -> dict[str, int]:
    """Bytes by phase of full attention around a ring: keys and values pass every rank; backward, so do gradients."""
    row = shape.kv_heads * sum(shape.dims)
    passed = tokens / ranks * row * (ranks - 1)
    gradients = tokens / ranks * row * ranks * shape.wide if ranks > 1 else 0.0
    return {"forward": round(passed * shape.itemsize), "backward": round(passed * shape.itemsize + gradients)}
