"""Slots in which rows of a training are put (``symmetric.py``): whether, and how large they are. Arithmetic alone."""

from __future__ import annotations

from math import comb, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.workers.config import Recipe

ENOUGH = 0.8
"""Of the tokens, how many must need a rank, in the mean over ranks, so that all of them are put there: with 64 experts
and 6 or 7 of them chosen 0.99 do with 2 ranks, 0.84 or more with 4, 0.6 with 8."""
ROOM = 1 << 30
"""Bytes of experts' rows that may be asked for without knowing how many come; of more, the host reads it. It would wait
for that in each layer, and so would all that it launches: with 16k tokens a rank 7 to 20 % of a step over four GPUs."""
COUNTS, OUT, BACK, LETTER, WORDS_BACK = range(5)
"""Parts of a slot: rows out, rows that come home, and the words that go with them; of words out the counts may come
sooner than the others."""
ALIGN = 64  # words: each part begins there


def shapes(slots: int, capacity: int, width: int, choices: int, experts: int) -> dict[int, tuple[int, ...]]:
    """Of the parts of so many slots, in int32 words. width: of a row; choices: of a token, with float32 gates."""
    return {
        LETTER: (slots, experts + capacity * 2 * choices),
        OUT: (slots, capacity, width),
        WORDS_BACK: (slots, capacity, choices),
        BACK: (slots, capacity, width),
    }


def words_in(shape: tuple[int, ...]) -> int:
    """What a part takes, with what is left free behind it."""
    return -(-prod(shape) // ALIGN) * ALIGN


def travels(recipe: Recipe) -> bool:
    """Whether rows of a training go to experts on other ranks."""
    m, p = recipe.model, recipe.parallel
    return bool(recipe.moe.experts) and m.dense_layers < m.layers and (p.split is not None or p.expert_ranks > 1)


def why_exchanged(recipe: Recipe, itemsize: int) -> str:
    """Why rows that travel are exchanged wherever the ranks are, in words; "" where they are put, if the ranks reach
    each other's memory. itemsize: bytes of an activation."""
    p, row = recipe.parallel, recipe.model.hidden * itemsize
    if p.dispatch == "exchanged":
        return "parallel.dispatch is 'exchanged'"
    if p.split:
        return "ranks with experts have no tokens of their own"
    if itemsize > 4:
        return "gates of float64 are not put"
    if row % 16:
        return f"a row of {row} bytes is no multiple of 16"
    if p.dispatch == "put":
        return ""
    if 0 < recipe.route.max_devices < recipe.balance.device_groups:
        return "route.max_devices keeps tokens away from ranks"
    shares = needed(recipe)
    share = sum(shares) / len(shares)
    return "" if share >= ENOUGH else f"a rank is needed by {share:.2f} of the tokens, less than {ENOUGH}"


def may_put(recipe: Recipe, itemsize: int) -> bool:
    """Whether rows of a training are put where its ranks are GPUs that reach each other's memory."""
    return travels(recipe) and recipe.parallel.device != "cpu" and not why_exchanged(recipe, itemsize)


def slot_bytes(recipe: Recipe, itemsize: int) -> int:
    """Bytes of a rank's slots, which all its layers share."""
    moe, sent = recipe.moe, sent_shared(recipe)
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


def sent_shared(recipe: Recipe) -> int:
    """How many shared experts every token is sent to, as to routed ones."""
    return recipe.moe.shared_experts if recipe.moe.shared == "dispatched" else 0


def rows_at_most(capacity: int, ranks: int, choices: int, local: int) -> int:
    """Rows of a rank's experts if all tokens choose as many of them as they can. capacity: tokens of each of the ranks;
    choices: experts of a token; local: experts of a rank, of the one that has most."""
    return ranks * capacity * min(choices, local)


def has_room(rows: int, row_bytes: int) -> bool:
    """Whether a rank asks for memory for so many rows without knowing whether they come."""
    return rows * row_bytes <= ROOM


def needed(recipe: Recipe) -> list[float]:
    """Of each rank that shares the experts, the part of the tokens that needs it, where these choose evenly: all of
    them where it hosts a shared expert. ``route.max_devices`` makes it less."""
    moe, ranks = recipe.moe, recipe.parallel.expert_ranks
    elsewhere = moe.experts - moe.experts // ranks
    chosen = 1 - comb(elsewhere, moe.top_k) / comb(moe.experts, moe.top_k)
    always = min(ranks, sent_shared(recipe))
    return [1.0] * always + [chosen] * (ranks - always)
