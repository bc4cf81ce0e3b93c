"""Slots in which rows of a training are put (``symmetric.py``): whether, and how large they are. Arithmetic alone."""

from __future__ import annotations

from math import comb, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.workers.config import Recipe

ENOUGH = 0.8
"""Of a rank's tokens, how many must need a given other rank, so that all of them are put there: with 64 experts and 6
or 7 of them chosen 0.99 do with 2 ranks, 0.84 or more with 4, 0.6 with 8."""
COUNTS, OUT, BACK, WORDS_OUT, WORDS_BACK = range(5)
"""Parts of a slot: counts, rows out, rows that come home, and the words that go with each row."""
ALIGN = 64  # words: each part begins there


def shapes(slots: int, capacity: int, width: int, choices: int, experts: int) -> dict[int, tuple[int, ...]]:
    """Of the parts of so many slots, in int32 words. width: of a row; choices: of a token, with float32 gates."""
    return {
        COUNTS: (slots, experts),
        WORDS_OUT: (slots, capacity, 2 * choices),
        OUT: (slots, capacity, width),
        WORDS_BACK: (slots, capacity, choices),
        BACK: (slots, capacity, width),
    }


def words_in(shape: tuple[int, ...]) -> int:
    """What a part takes, with what is left free behind it."""
    return -(-prod(shape) // ALIGN) * ALIGN


def may_put(recipe: Recipe, itemsize: int) -> bool:
    """Whether a training puts its rows where its ranks reach each other's memory. itemsize: bytes of an activation."""
    m, moe, p = recipe.model, recipe.moe, recipe.parallel
    if not moe.experts or m.dense_layers == m.layers or p.split or p.expert_ranks == 1 or p.device == "cpu":
        return False
    wanted = p.dispatch == "put" or (p.dispatch == "auto" and needed(recipe, p.expert_ranks) >= ENOUGH)
    return wanted and itemsize < 8 and m.hidden * itemsize % 16 == 0  # as inboxes.py and symmetric.py refuse others


def slot_bytes(recipe: Recipe, itemsize: int) -> int:
    """Bytes of a rank's slots, which all its layers share; 0 where rows are exchanged."""
    if not may_put(recipe, itemsize):
        return 0
    moe = recipe.moe
    sent = moe.shared_experts if moe.shared == "dispatched" else 0
    width = recipe.model.hidden * itemsize // 4
    parts = shapes(recipe.parallel.expert_ranks - 1, capacity(recipe), width, moe.top_k + sent, moe.experts + sent)
    return 4 * sum(map(words_in, parts.values()))


def capacity(recipe: Recipe) -> int:
    """Tokens that a rank has at most: of a micro-batch, whose rows attention ranks divide among them."""
    t, p = recipe.train, recipe.parallel
    tokens = t.batch // t.accumulate * t.sequence
    if p.context == 1:
        return tokens // p.attention_ranks
    # two segments, each of which a rank's share of an uneven division makes longer by at most one block
    block = recipe.attention.slc_block if recipe.attention.kind == "nsa" else 1
    return -(-tokens // p.attention_ranks) + 2 * block


def needed(recipe: Recipe, ranks: int) -> float:
    """Of tokens whose choices are even, the share that needs a given one of the ranks that share the experts."""
    moe = recipe.moe
    if 0 < recipe.route.max_devices < recipe.balance.device_groups:
        return 0.0  # which keeps tokens away from ranks
    elsewhere = moe.experts - moe.experts // ranks
    return 1 - comb(elsewhere, moe.top_k) / comb(moe.experts, moe.top_k)
