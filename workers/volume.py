"""How many bytes a rank receives for one attention layer over a sequence that ranks share, by formula.

One document of T tokens lies in 2C segments of S = T / 2C tokens over C ranks; rank r holds segments r and 2C - 1 - r.
Its last query stands in segment 2C - 1 - r, so of the 2C - r segments up to there it fetches all but its own two, and
the early one it owns is fetched by all C - 1 others, the late one by the r ranks before it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What a volume depends on. dims: d_qk and d_v. itemsize: bytes of an element, wide: of a far gradient's."""

    kv_heads: int
    dims: tuple[int, int]
    itemsize: int
    wide: int


def nsa_volume(
    tokens: int, ranks: int, rank: int, shape: Shape, cmp_block: int, cmp_stride: int, window: int
) -> dict[str, dict[str, int]]:
    """Bytes by phase (``forward``, ``backward``) and by plan (``raw``, ``cmp``, ``near``, ``far``)."""
    segment = tokens / (2 * ranks)
    row = shape.kv_heads * sum(shape.dims) * shape.itemsize
    borders = (rank > 0) + (rank < ranks - 1)  # segments of this rank that begin next to another rank's, and end so
    fetched, owned = (2 * ranks - rank - 2) * segment, (ranks - 1 + rank) * segment
    # The first segment makes fewer compressed blocks: none ends with its first tokens.
    fewer = cmp_block // cmp_stride - 1
    cmp_fetched = fetched / cmp_stride - (fewer if rank else 0)
    cmp_owned = owned / cmp_stride - (0 if rank else fewer * (ranks - 1))
    halos = {"raw": borders * (cmp_block - cmp_stride) * row, "near": borders * (window - 1) * row}
    forward = halos | {"cmp": cmp_fetched * row, "far": fetched * row}
    backward = halos | {
        "cmp": cmp_owned * row,
        "far": fetched * row + owned * row * shape.wide / shape.itemsize,
    }
    return {phase: {k: round(v) for k, v in x.items()} for phase, x in (("forward", forward), ("backward", backward))}


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
