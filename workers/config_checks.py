"""Which combinations of a recipe's keys are possible, beyond what the schema says of each.

Every refusal is one sentence that names the key, its value and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.workers.placement import segments_of

if TYPE_CHECKING:
    from shoal.workers.config import AttentionTable, ModelTable, Recipe


def check(recipe: Recipe) -> None:
    """Raises ValueError of the first thing that cannot be."""
    _check_model(recipe)
    if recipe.attention.kind == "nsa":
        _check_blocks(recipe.attention)
    _check_backends(recipe)
    _check_experts(recipe)
    _check_train(recipe)
    _check_placement(recipe)
    _check_ranks(recipe)


def _check_divides(key: str, divisor: int, of: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{of}={value} is not divisible by {key}={divisor}: set {key} to a divisor of {value}")


def _check_model(recipe: Recipe) -> None:
    m = recipe.model
    _check_divides("model.kv_heads", m.kv_heads, "model.heads", m.heads)
    if m.head_dim % 2:
        raise ValueError(f"model.head_dim={m.head_dim} is odd, and RoPE rotates pairs: set an even model.head_dim")
    _check_rope(m)
    if m.dense_layers > m.layers:
        raise ValueError(
            f"model.dense_layers={m.dense_layers} is more than model.layers={m.layers}: set it to {m.layers} or less"
        )
    dense = m.layers if not recipe.moe.experts else m.dense_layers
    if dense and not m.dense_hidden:
        raise ValueError(f"model.dense_hidden=0, but {dense} layers have a dense FFN: set model.dense_hidden")


def _check_rope(m: ModelTable) -> None:
    if m.rope_scaling == "none":
        if m.rope_factor != 1 or m.rope_original:
            raise ValueError(
                f"model.rope_factor={m.rope_factor} and model.rope_original={m.rope_original} do nothing with "
                f"model.rope_scaling='none': set model.rope_scaling to 'yarn', or leave them out"
            )
        return
    if m.rope_original < 2:
        raise ValueError(
            f"model.rope_original={m.rope_original} is no context, which model.rope_scaling='yarn' goes on from: "
            f"set it to the one that the model was trained on"
        )
    if m.context > m.rope_factor * m.rope_original:
        raise ValueError(
            f"model.context={m.context} is longer than model.rope_factor={m.rope_factor} times "
            f"model.rope_original={m.rope_original}: set model.rope_factor to {m.context / m.rope_original:g}"
        )


def _check_backends(recipe: Recipe) -> None:
    cpu = recipe.parallel.device == "cpu"
    if recipe.attention.backend == "triton" and cpu:
        raise ValueError(
            "attention.backend='triton' needs a GPU, and parallel.device='cpu': set attention.backend='auto'"
        )
    if recipe.moe.backend in ("triton", "megablocks") and cpu:
        raise ValueError(
            f"moe.backend={recipe.moe.backend!r} needs a GPU, and parallel.device='cpu': set moe.backend='auto'"
        )


def _check_blocks(a: AttentionTable) -> None:
    for key in ("cmp_block", "slc_block"):
        value = getattr(a, key)
        if value % a.cmp_stride:
            near = max(1, round(value / a.cmp_stride)) * a.cmp_stride
            raise ValueError(
                f"attention.{key}={value} is not a multiple of attention.cmp_stride={a.cmp_stride}: "
                f"set attention.{key} to {near}"
            )
    if a.cmp_block > a.slc_block:
        raise ValueError(
            f"attention.cmp_block={a.cmp_block} is longer than attention.slc_block={a.slc_block}: "
            f"set attention.slc_block to {a.cmp_block} or more"
        )
    forced = a.slc_initial + a.slc_local
    if a.slc_local < 1:
        raise ValueError("attention.slc_local=0 leaves a query without its own block: set it to 1 or more")
    if a.slc_count < forced:
        raise ValueError(
            f"attention.slc_count={a.slc_count} is less than its forced blocks, slc_initial + slc_local = {forced}: "
            f"set attention.slc_count to {forced} or more"
        )


def _check_experts(recipe: Recipe) -> None:
    moe, balance = recipe.moe, recipe.balance
    if not moe.experts:
        return
    if not moe.expert_hidden:
        raise ValueError("moe.expert_hidden=0, but moe.experts is set: set moe.expert_hidden")
    if not 1 <= moe.top_k <= moe.experts:
        raise ValueError(
            f"moe.top_k={moe.top_k} is not between 1 and moe.experts={moe.experts}: set moe.top_k in that range"
        )
    if moe.experts % balance.device_groups:
        raise ValueError(
            f"moe.experts={moe.experts} does not divide into balance.device_groups={balance.device_groups}: "
            f"set balance.device_groups to a divisor of {moe.experts}"
        )
    if moe.normalize_gates and moe.top_k == 1:
        raise ValueError(
            "moe.normalize_gates=true with moe.top_k=1 makes every gate 1, and the router learns nothing: "
            "set moe.normalize_gates to false"
        )
    if moe.router == "hash" and moe.top_k != 1:
        raise ValueError(f"moe.top_k={moe.top_k} with moe.router='hash', which picks one expert: set moe.top_k to 1")
    _check_choice(recipe)


def _check_choice(recipe: Recipe) -> None:
    moe, balance, most = recipe.moe, recipe.balance, recipe.route.max_devices
    learned = {
        "balance.sequence": balance.sequence,
        "balance.z_loss": balance.z_loss,
        "balance.bias_rate": balance.bias_rate,
        "route.max_devices": most,
    }
    for key, value in learned.items():
        if value and moe.router == "hash":
            raise ValueError(f"{key}={value} with moe.router='hash', which learns nothing: set {key} to 0")
    if balance.z_loss and moe.router == "sigmoid":
        raise ValueError(
            f"balance.z_loss={balance.z_loss} with moe.router='sigmoid', whose scores no sum divides: "
            f"set balance.z_loss to 0"
        )
    if most > balance.device_groups:
        raise ValueError(
            f"route.max_devices={most} is more than balance.device_groups={balance.device_groups}: "
            f"set it to {balance.device_groups} or less, or balance.device_groups to the number of devices"
        )
    size = moe.experts // balance.device_groups
    if most and moe.top_k > most * size:
        raise ValueError(
            f"moe.top_k={moe.top_k} is more than the experts of route.max_devices={most} groups, {most * size}: "
            f"set route.max_devices to {-(-moe.top_k // size)} or more"
        )


def _check_train(recipe: Recipe) -> None:
    t = recipe.train
    _check_divides("train.accumulate", t.accumulate, "train.batch", t.batch)
    if t.recompute > recipe.model.layers:
        raise ValueError(
            f"train.recompute={t.recompute} is more than model.layers={recipe.model.layers}: "
            f"set it to {recipe.model.layers} or less"
        )
    last = t.profile_at + t.profile_steps - 1
    if t.profile_at > t.steps:
        raise ValueError(
            f"train.profile_at={t.profile_at} is after the last step, train.steps={t.steps}: "
            f"set train.profile_at to {t.steps} or less, or to 0 for no trace"
        )
    if t.profile_at and last > t.steps:
        raise ValueError(
            f"train.profile_steps={t.profile_steps} from train.profile_at={t.profile_at} on end at step {last}, after "
            f"train.steps={t.steps}: set train.profile_steps to {t.steps - t.profile_at + 1} or less"
        )
    if t.sequence > recipe.model.context:
        raise ValueError(
            f"train.sequence={t.sequence} is longer than model.context={recipe.model.context}: "
            f"set train.sequence to {recipe.model.context} or less"
        )


def _check_placement(recipe: Recipe) -> None:
    p = recipe.parallel
    if p.placement != "colocated" and not p.split:
        raise ValueError(
            f"parallel.placement={p.placement!r} is neither 'colocated' nor of the form nA:mF: set it to, say, 2A:2F"
        )
    if p.split:
        if 0 in p.split:
            raise ValueError(
                f"parallel.placement={p.placement!r} leaves one side without ranks: give each side 1 or more"
            )
        if sum(p.split) != p.ranks:
            raise ValueError(
                f"parallel.placement={p.placement!r} names {sum(p.split)} ranks, but parallel.ranks={p.ranks}: "
                f"set parallel.ranks to {sum(p.split)}"
            )
        if p.expert not in (0, p.split[1]):
            raise ValueError(
                f"parallel.expert={p.expert} contradicts parallel.placement={p.placement!r}: leave parallel.expert out"
            )
        if not recipe.moe.experts:
            raise ValueError(
                f"parallel.placement={p.placement!r} needs experts, and moe.experts=0: set it to colocated"
            )
        if recipe.model.dense_layers >= recipe.model.layers:
            raise ValueError(
                f"parallel.placement={p.placement!r} needs a layer with experts, and "
                f"model.dense_layers={recipe.model.dense_layers} leaves none of {recipe.model.layers}: lower it"
            )
    elif p.expert:
        _check_divides("parallel.expert", p.expert, "parallel.ranks", p.ranks)


def _check_ranks(recipe: Recipe) -> None:
    p, t = recipe.parallel, recipe.train
    groups = recipe.balance.device_groups
    if p.rebalance_every and recipe.route.max_devices and groups % p.expert_ranks:
        raise ValueError(
            f"parallel.rebalance_every={p.rebalance_every} moves whole groups with route.max_devices, and "
            f"balance.device_groups={groups} do not divide over {p.expert_ranks} expert ranks: "
            f"set balance.device_groups to a multiple of {p.expert_ranks} (with {p.expert_ranks} itself none would "
            f"move), or parallel.rebalance_every to 0"
        )
    if p.attention_ranks % p.context:
        raise ValueError(
            f"parallel.context={p.context} does not divide {p.attention_ranks} attention ranks: "
            f"set parallel.context to a divisor of {p.attention_ranks}"
        )
    if p.shard_dense and recipe.model.hidden % p.attention_ranks:
        raise ValueError(
            f"model.hidden={recipe.model.hidden} does not divide over {p.attention_ranks} attention ranks, as "
            f"parallel.shard_dense=true cuts it: set parallel.ranks so that it does, or parallel.shard_dense to false"
        )
    if recipe.moe.experts and recipe.moe.experts % p.expert_ranks:
        raise ValueError(
            f"moe.experts={recipe.moe.experts} does not divide over {p.expert_ranks} expert ranks: "
            f"set parallel.ranks or parallel.expert so that it does"
        )
    _check_copies(recipe)
    micro, shards = t.batch // t.accumulate, p.attention_ranks // p.context
    if micro % shards:
        over = f"{p.attention_ranks} attention ranks" if p.context == 1 else f"{shards} groups of {p.context} ranks"
        raise ValueError(
            f"train.batch / train.accumulate = {micro} sequences do not divide over {over}: "
            f"set train.batch to a multiple of {t.accumulate * shards}"
        )
    _check_segments(recipe, micro // shards, shards)


def _check_copies(recipe: Recipe) -> None:
    extra, ranks, groups = recipe.serve.expert_copies, recipe.parallel.expert_ranks, recipe.bound_groups
    if not extra or not groups:
        return
    why = f"serve.expert_copies={extra} keeps to the groups of experts that route.max_devices lets a token go to"
    if groups % ranks and ranks % groups:
        raise ValueError(
            f"{why}, and balance.device_groups={groups} neither divide over {ranks} expert ranks nor are a divisor of "
            f"them: set parallel.ranks or parallel.expert so that they do, or serve.expert_copies to 0"
        )
    size = recipe.moe.experts // groups
    if groups % ranks == 0 and extra < size:
        raise ValueError(
            f"{why}, each {size} experts of a rank, which are copied together: "
            f"set serve.expert_copies to {size} or more, or to 0"
        )


def _check_segments(recipe: Recipe, rows: int, groups: int) -> None:
    """Each of ``groups`` context groups has so many rows of a micro-batch; a rank of it holds two segments of them."""
    p, a, t = recipe.parallel, recipe.attention, recipe.train
    name = "window" if a.window > a.slc_block else "slc_block"
    least, multiple = (getattr(a, name), a.slc_block) if a.kind == "nsa" else (1, 1)

    def shortest(tokens: int) -> int:
        return min(stop - start for start, stop in segments_of(tokens, p.context, multiple))

    def first(rows: int) -> int:
        """How many times ``rows`` tokens are enough."""
        count = -(-2 * p.context * least // rows)
        while shortest(count * rows) < least:
            count += 1
        return count

    tokens = rows * t.sequence
    if p.context == 1 or shortest(tokens) >= least:
        return
    shorter = f"shorter than attention.{name}={least}" if a.kind == "nsa" else "which hold nothing"
    # Fewer ranks in a group would not do: there would be more groups, with fewer rows each.
    longer = first(rows)
    or_longer = f", or train.sequence to {longer}" if longer <= recipe.model.context else ""
    raise ValueError(
        f"parallel.context={p.context} cuts packed batches of {tokens} tokens into segments of "
        f"{shortest(tokens)}, {shorter}: set train.batch to "
        f"{first(t.sequence) * groups * t.accumulate}{or_longer}"
    )
