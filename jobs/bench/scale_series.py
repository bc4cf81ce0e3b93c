"""What ``shoal bench scale`` measures of layers and of training, and what each of it does on N ranks, in the words of
``scale_model``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from shoal.jobs.bench.context import LONG
from shoal.jobs.bench.context import SMALL as SMALL_NSA
from shoal.jobs.bench.dispatch_ranks import Sizes
from shoal.jobs.bench.scale_cases import Case, Facts, Line, Series, Training, recipe_of
from shoal.jobs.bench.scale_model import (
    Attention,
    Curve,
    Experts,
    Plan,
    Travel,
    dispatch_travels,
    replica_travels,
    sequence_travels,
)
from shoal.jobs.bench.sequence_rank import SIZES
from shoal.jobs.bench.sequence_rank import Case as Layer
from shoal.jobs.estimate import attention_flops, count_flops, count_parameters
from shoal.workers.slots import may_put
from shoal.workers.volume import Shape

if TYPE_CHECKING:
    from shoal.workers.config import Recipe

BUCKET = 64 << 20  # bytes of weights that travel at a time (workers/replicas.py)


class MoESeries(Series):
    """A DeepSeekMoE layer forward and backward, its experts over all ranks; rows exchanged by ``path``."""

    part = "moe"
    powers = (0, 1)
    flat = True

    def __init__(self, sizes: Sizes, path: str, weak: int, strong: int) -> None:
        """weak: tokens a rank; strong: of all ranks together."""
        self.sizes, self.weak, self.strong = replace(sizes, paths=(path,)), weak, strong
        self.what = "MoE layer" if path == "all_to_all" else "MoE layer, rows put"

    def lines(self) -> list[Line]:
        """As the base class has it."""
        return [
            Line(self.what, "weak", lambda n: self._case(n, self.weak * n), {8: 0.92}),
            Line(self.what, "strong", lambda n: self._case(n, self.strong)),
        ]

    def _case(self, ranks: int, tokens: int) -> Case:
        # on one rank there is nothing to exchange: one measurement for all paths
        sizes = self.sizes if ranks > 1 else replace(self.sizes, paths=())
        return Case(self.what if ranks > 1 else "MoE layer", ranks, tokens, replace(sizes, tokens=(tokens // ranks,)))

    def layer(self, itemsize: int) -> Experts:
        """Its sizes."""
        s = self.sizes
        return Experts(s.hidden, s.inner, s.experts, s.top_k, s.shared, itemsize)

    def flops(self, case: Case) -> float:
        """As the base class has it."""
        return 3 * self.layer(2).flops(case.tokens, self.sizes.top_k + self.sizes.shared)

    def plan(self, case: Case, curve: Curve, one: Facts) -> Plan:
        """As the base class has it."""
        mine = case.tokens // case.ranks
        compute = curve(mine)
        put = self.sizes.paths == ("symmetric",)
        per_flop = compute * case.ranks / self.flops(case)
        layer = self.layer(int(one["itemsize"]))
        return Plan(compute, tuple(dispatch_travels(layer, mine, case.ranks, per_flop, put)))

    def ideal(self, case: Case, mode: str, curve: Curve, one: Facts) -> float:
        """As the base class has it."""
        return curve(case.tokens // case.ranks) if mode == "weak" else curve(case.tokens) / case.ranks


class SequenceSeries(Series):
    """NSA of one layer, forward and backward, over one sequence that all ranks share."""

    part = "sequence"

    def __init__(self, layer: Layer, weak: int, strong: tuple[int, ...], long: tuple[int, ...] = ()) -> None:
        """weak: tokens a rank; strong: of all ranks together; long: such that are measured last, on two or more."""
        self.layer, self.weak, self.strong, self.long = layer, weak, strong, long

    def lines(self) -> list[Line]:
        """As the base class has it. A sequence grows with the ranks, or is the same for all of them."""
        fixed = [(n, 1) for n in self.strong] + [(n, 2) for n in self.long]
        lines = [Line(f"NSA at {name_of(n)}", "strong", self._of(n), _targets(n), least) for n, least in fixed]
        return [
            Line(
                f"NSA, {name_of(self.weak)} a rank",
                "weak",
                lambda n: self._case(n, self.weak * n),
                _targets(8 * self.weak),
            ),
            *lines,
        ]

    def _of(self, tokens: int) -> Callable[[int], Case]:
        return lambda ranks: self._case(ranks, tokens)

    def _case(self, ranks: int, tokens: int) -> Case:
        return Case("NSA", ranks, tokens, replace(self.layer, context=tokens, ranks=ranks))

    def _flops(self, tokens: int) -> dict[str, float]:
        c = self.layer
        return attention_flops(SIZES, tokens, c.heads, c.kv_heads, (c.dim, c.dim))

    def flops(self, case: Case) -> float:
        """As the base class has it."""
        return 3 * case.tokens * sum(self._flops(case.tokens).values())

    def plan(self, case: Case, curve: Curve, one: Facts) -> Plan:
        """As the base class has it."""
        compute, c, each = curve(case.tokens) / case.ranks, self.layer, self._flops(case.tokens)
        itemsize = int(one["itemsize"])
        shape = Shape(c.kv_heads, (c.dim, c.dim), itemsize, itemsize)
        layer = Attention(shape, SIZES, sum(each.values()), each["slc"], each["phi"])
        per_flop = compute * case.ranks / self.flops(case)
        return Plan(compute, tuple(sequence_travels(layer, case.tokens, case.ranks, per_flop)))


SETTLED = ("train.warmup=2000", "balance.bias_rate=0.0001")
"""Of weights that are new. At the full rate from the first step on, routers send all tokens to a few experts, as they
do in no training that goes well; as they are at first, biases balance them before the first step, and keep them so at a
rate that is small beside how far the scores of 64 experts are apart, some 0.003.

That takes ``model.embedding_std`` of 1, which recipes have. Embeddings as small as the other weights are lost beside
what the first layers of attention add, which is a mean over a passage. To a router all tokens of a sequence are then
one, and those of the next sequence another: no bias that suits both evens out either."""


class TrainSeries(Series):
    """Steps of training. shared: whether all ranks share each sequence."""

    part = "train"

    def __init__(
        self,
        what: str,
        recipe: str,
        sets: tuple[str, ...],
        batch: Callable[[str, int], tuple[int, int, int]],
        steps: int,
        shared: bool = False,
        modes: tuple[str, ...] = ("weak", "strong"),
        points: tuple[int, ...] = (),
        long: tuple[int, ...] = (),
        asked: dict[int, float] | None = None,
        utilisation: float | None = None,
    ) -> None:
        """batch: of mode and ranks the sequences of a step, those of a micro-batch, and their length. points: lengths
        of a sequence that one rank trains on for the curve. long: lengths of one that four and more train on, last.
        asked: of weak scaling, the least efficiency by ranks. utilisation: the least share of the peak; with it one
        rank alone is measured."""
        self.what, self.recipe, self.sets, self.batch, self.steps = what, recipe, sets, batch, steps
        self.shared, self.modes, self.points, self.long = shared, modes, points, long
        self.flat = not points
        self.asked, self.utilisation = asked or {8: 0.90}, utilisation
        self.corpus = ""

    def lines(self) -> list[Line]:
        """As the base class has it."""
        if self.utilisation:
            return [Line(self.what, "weak", self._of("weak"), ranks=(1,), utilisation=self.utilisation)]
        lines = [Line(self.what, mode, self._of(mode), self.asked if mode == "weak" else {}) for mode in self.modes]
        model = self.what.partition(",")[0]
        return [*lines, *(Line(f"{model} at {name_of(n)}", "strong", self._long(n), least=4) for n in self.long)]

    def _long(self, length: int) -> Callable[[int], Case]:
        return lambda ranks: self._case(ranks, 1, 1, length)

    def extra(self) -> list[Case]:
        """As the base class has it."""
        return [self._case(1, 1, 1, length) for length in self.points]

    def _of(self, mode: str) -> Callable[[int], Case]:
        return lambda ranks: self._case(ranks, *self.batch(mode, ranks))

    def _case(self, ranks: int, batch: int, micro: int, length: int) -> Case:
        sets = [*SETTLED, *self.sets, f"train.steps={self.steps}"]
        sets += [f"train.sequence={length}", f"model.context={length}"]
        sets += [f"train.batch={batch}", f"train.accumulate={batch // micro}"]
        sets += [f"parallel.ranks={ranks}", f"parallel.context={ranks if self.shared else 1}"]
        experts = recipe_of(self.recipe, (*self.sets, "parallel.expert=1")).moe.experts
        sets.append(f"parallel.expert={ranks if experts % ranks == 0 else 1}")
        training = Training(self.recipe, tuple(sets), self.steps, self.corpus)
        return Case(self.what, ranks, batch * length, training)

    def on_curve(self, facts: Facts) -> float:
        """Without the update of the weights, which does not depend on tokens."""
        return (float(facts["ms"]) - float(facts["update_ms"])) / 1e3

    def flops(self, case: Case) -> float:
        """As the base class has it."""
        recipe = self._recipe(case)
        return case.tokens * count_flops(recipe, count_parameters(recipe)).training

    def _recipe(self, case: Case) -> Recipe:
        assert isinstance(case.sizes, Training)
        return case.sizes.load()

    def plan(self, case: Case, curve: Curve, one: Facts) -> Plan:
        """As the base class has it. The update is shared out, as the optimizer's state is."""
        computing = curve(case.tokens) / case.ranks
        per_flop = computing * case.ranks / self.flops(case)
        travels = step_travels(self._recipe(case), per_flop, int(one["itemsize"]))
        return Plan(computing + float(one["update_ms"]) / 1e3 / case.ranks, tuple(travels))

    def ideal(self, case: Case, mode: str, curve: Curve, one: Facts) -> float:
        """As the base class has it; with more tokens there are as many weights to update."""
        update = float(one["update_ms"]) / 1e3
        return curve(case.tokens) / case.ranks + (update if mode == "weak" else update / case.ranks)


def step_travels(recipe: Recipe, per_flop: float, itemsize: int) -> list[Travel]:
    """What a rank of a colocated placement receives in a step; itemsize: bytes of a weight, gradients are float32."""
    m, moe, p, t = recipe.model, recipe.moe, recipe.parallel, recipe.train
    micro = t.batch // t.accumulate * t.sequence
    parameters = count_parameters(recipe)
    everywhere = parameters.total - parameters.routed_experts
    # a micro-batch's forward pass, a third of its FLOPs, hides weights, and the rest gradients
    beside = micro / p.ranks * count_flops(recipe, parameters).training / 3 * per_flop
    travels: list[Travel] = []
    experts = parameters.routed_experts / p.expert_ranks
    for held, ranks in ((everywhere, p.ranks), (experts, p.ranks // p.expert_ranks)):
        share = beside * held / (everywhere + experts)
        travels += replica_travels(held, ranks, 4, itemsize, BUCKET, 2 * share, share)
    over = recipe.balance.over == "global_batch" and bool(recipe.balance.expert or recipe.balance.device)
    counted = int(t.accumulate > 1 and over)  # a forward pass of its own
    layer = Experts(m.hidden, moe.expert_hidden, moe.experts, moe.top_k, moe.shared_experts, itemsize)
    put = may_put(recipe, itemsize)
    attention = _attention(recipe, itemsize) if p.context > 1 else None
    for i in range(m.layers):
        again = counted + (i < t.recompute)
        found: list[Travel] = []
        if i >= m.dense_layers and moe.experts:
            found += dispatch_travels(layer, micro / p.ranks, p.expert_ranks, per_flop, put, again)
        if attention:
            found += sequence_travels(attention, micro, p.context, per_flop, again, t.batch // t.accumulate)
        travels += [replace(each, count=each.count * t.accumulate) for each in found]
    return travels


def _attention(recipe: Recipe, itemsize: int) -> Attention:
    from shoal.workers.model.attention import block_sizes  # needs pydantic, as recipes do

    m, a = recipe.model, recipe.attention
    each = attention_flops(a, recipe.train.sequence, m.heads, m.kv_heads, (m.head_dim, m.v_dim))
    shape = Shape(m.kv_heads, (m.head_dim, m.v_dim), itemsize, itemsize)
    return Attention(shape, block_sizes(a), sum(each.values()), each["slc"], each["phi"])


def name_of(tokens: int) -> str:
    """``64k``, ``1M``."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)


def _targets(tokens: int) -> dict[int, float]:
    return {8: 0.90} if tokens == 1 << 20 else {}


def all_series(small: bool, steps: int | None) -> list[Series]:
    """What is measured of layers and of training; small: what a CPU computes in a moment."""
    return _small(steps or 3) if small else _large(steps or 6)


def _large(steps: int) -> list[Series]:
    cuda = ("parallel.device=cuda",)
    of_2b = lambda mode, n: (16 * n, 16 * n, 4096) if mode == "weak" else (16, 16, 4096)  # noqa: E731
    of_64k = lambda mode, n: (n if mode == "weak" else 1, 1, 65536)  # noqa: E731
    few = min(steps, 4)
    return [
        *(MoESeries(Sizes(), path, 16384, 65536) for path in ("all_to_all", "symmetric")),
        SequenceSeries(Layer("nsa", 0, 1), 131072, (65536, 262144), (1 << 20,)),
        TrainSeries("deepseekmoe-2b at 4k", "deepseekmoe-2b", cuda, of_2b, steps),
        TrainSeries(
            "deepseekmoe-2b at 2k, 4 micro-batches",  # of as many sequences as fit 80 GB
            "deepseekmoe-2b",
            ("balance.over=micro_batch", *cuda),
            lambda _, n: (160 * n, 40 * n, 2048),
            steps,
            utilisation=0.40,
        ),
        TrainSeries("nsa-64k-small at 64k", "nsa-64k-small", ("train.recompute=8", *cuda), of_64k, steps, shared=True),
        TrainSeries(
            "nsa-64k-small at 64k, a sequence a rank at a time",  # as many tokens a rank in each micro-batch
            "nsa-64k-small",
            ("train.recompute=8", *cuda),
            lambda _, n: (n, n, 65536),
            steps,
            shared=True,
            modes=("weak",),
        ),
        TrainSeries(
            "deepseekmoe-2b with 64 experts at 4k",
            "deepseekmoe-2b",
            ("moe.experts=64", *cuda),
            of_2b,
            steps,
            modes=("weak",),
        ),
        TrainSeries(
            "deepseekmoe-2b with 64 experts at 2k, 12 micro-batches",  # as many tokens as fit 80 GB, 12 times
            "deepseekmoe-2b",
            ("moe.experts=64", "balance.over=micro_batch", *cuda),
            lambda mode, n: (432 * n, 36 * n, 2048),
            few,
            modes=("weak",),
            asked={2: 0.95, 8: 0.90},
        ),
        TrainSeries(
            "4 layers of 2048, 128k a rank",
            "nsa-64k-small",
            (*LONG, "model.rope_factor=128.0", *cuda),
            lambda mode, n: (1, 1, 131072 * n),
            few,
            shared=True,
            modes=("weak",),
            points=(65536,),
            long=(1 << 20,),
        ),
    ]


def _small(steps: int) -> list[Series]:
    sizes = Sizes(hidden=32, inner=16, experts=16, top_k=3, repeats=1, window=1.0)
    layer = Layer("nsa", 0, 1, heads=4, kv_heads=2, dim=16, repeats=1)
    tiny = (
        "model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16",
        "moe.expert_hidden=32", "model.vocab=512", "parallel.device=cpu", "data.shuffle_tokens=65536",
    )  # fmt: skip
    of_2b = lambda mode, n: (8 * n if mode == "weak" else 8, min(2 * n, 8), 128)  # noqa: E731
    of_64k = lambda mode, n: (n if mode == "weak" else 1, 1, 2048)  # noqa: E731
    nsa = (*SMALL_NSA, "train.recompute=1")
    return [
        MoESeries(sizes, "all_to_all", 64, 256),
        SequenceSeries(layer, 1024, (2048,)),
        TrainSeries("deepseekmoe-2b, small", "deepseekmoe-2b", tiny, of_2b, steps),
        TrainSeries("deepseekmoe-2b alone, small", "deepseekmoe-2b", tiny, of_2b, steps, utilisation=0.40),
        TrainSeries("nsa-64k-small, small", "nsa-64k-small", nsa, of_64k, steps, shared=True),
        TrainSeries("deepseekmoe-2b with 64 experts, small", "deepseekmoe-2b", ("moe.experts=64", *tiny), of_2b, steps),
    ]
