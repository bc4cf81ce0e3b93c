"""Feed-forward layers: dense SwiGLU, and DeepSeekMoE over the ranks of a dispatch group."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from shoal.kernels.moe import (
    hash_route,
    load_fractions,
    sequence_counts,
    sequence_loss,
    shares_of,
    swiglu_ffn,
)
from shoal.kernels.moe.backend import counts_stay, experts_backend
from shoal.kernels.moe.gemms import Gemms, side_by_side
from shoal.kernels.moe.router import Router, Routing
from shoal.workers.config import Recipe
from shoal.workers.dispatch import Dispatcher
from shoal.workers.errors import InvalidInput
from shoal.workers.expert_plan import EMPTY, Homes, even_homes
from shoal.workers.gathered import GatheredFlight
from shoal.workers.mesh import Mesh
from shoal.workers.model.load import Counted, MoELoad
from shoal.workers.routed import Found, Pass, RoutedFFN, Weights
from shoal.workers.slots import sent_shared

Stages = Generator[None, None, Tensor]
"""A computation that pauses where it would wait for other ranks, so that another one can go on meanwhile."""


def run(stages: Stages) -> Tensor:
    """Runs a computation to its end without pauses."""
    return interleave([stages])[0]


def interleave(computations: Sequence[Stages]) -> list[Tensor]:
    """Runs computations by turns, from pause to pause. All ranks must take the same turns."""
    results: dict[int, Tensor] = {}
    while len(results) < len(computations):
        for i, stages in enumerate(computations):
            if i not in results:
                try:
                    next(stages)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(computations))]


class DenseFFN(nn.Module):
    """SwiGLU of one hidden size."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(inner, hidden))

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[T, hidden] -> [T, hidden]``."""
        return swiglu_ffn(x_TH, self.gate_up, self.down)


class ExpertStack(nn.Module):
    """The experts that one rank hosts, as stacked weights. ``names`` says which, whatever the placement; "" is the name
    of a slot without one."""

    def __init__(self, names: list[str], hidden: int, inner: int) -> None:
        super().__init__()
        self.names = names
        self.gate_up = nn.Parameter(torch.empty(len(names), hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(len(names), inner, hidden))


class MoE(nn.Module):
    """DeepSeekMoE (eq. 9-11): shared experts for every token, routed ones by affinity, no token dropped.

    Router and local shared experts live with the attention shard; routed and dispatched shared experts on expert ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        homes: Homes | None = None,
    ) -> None:
        """homes: where the routed experts lie, for a service, whose ranks have slots for ``serve.expert_copies`` more
        than their share; None: in equal runs."""
        super().__init__()
        moe, hidden = recipe.moe, recipe.model.hidden
        self.table, self.balance, self.most, self.mesh = moe, recipe.balance, recipe.route.max_devices, mesh
        # No buffer of the module: those are cast to the model's dtype, and steps of 1e-3 would be lost.
        self.bias: Tensor | None = None
        if recipe.balance.bias_rate:
            self.bias = torch.zeros(moe.experts, dtype=torch.float32, device=device)
        self.sent_shared = sent_shared(recipe)
        self.products, self.dtype = _backend(moe.backend, device, dtype), dtype
        # All of the layer on this rank: no rows are exchanged, and they need not exist for the backward pass.
        alone = mesh.dispatch.size == 1 and not self.sent_shared
        self.whole = alone and moe.router != "hash" and self.products.triton
        self._joined: tuple[Tensor, int | None] | None = None  # the weights as one, and the version they are of
        self.homes = homes or even_homes(moe.experts, mesh.placement.set_size)
        owners = mesh.placement.owners(self.homes, self.sent_shared)
        sources = [place for place, rank in enumerate(mesh.dispatch.ranks) if rank in mesh.placement.attention]
        rooms: tuple[int, ...] = ()
        if homes and (extra := recipe.serve.expert_copies):
            room = min(moe.experts, moe.experts // mesh.placement.set_size + extra)
            rooms = mesh.placement.rooms(room, self.sent_shared)
        self.dispatcher = Dispatcher(mesh.dispatch, owners, device, self.products.triton, sources=sources, rooms=rooms)
        if mesh.hosts_attention:
            if moe.router != "hash":
                self.centroids = nn.Parameter(torch.empty(moe.experts, hidden))
            if moe.shared == "local" and moe.shared_experts:
                names = [f"shared.{s}" for s in range(moe.shared_experts)]
                self.shared = ExpertStack(names, hidden, moe.expert_hidden)
        if mesh.hosts_experts:
            self.experts = ExpertStack([self._name(e) for e in self.dispatcher.local], hidden, moe.expert_hidden)

    def assign(self, homes: Homes) -> None:
        """Gives the routed experts to other ranks, by name: the weights are for the caller to move, into the same
        memory. As many to each as before, or as it has slots. All ranks call it alike, between two passes."""
        self.homes = homes
        self.dispatcher.assign(self.mesh.placement.owners(homes, self.sent_shared))
        if self.mesh.hosts_experts:
            assert len(self.dispatcher.local) == len(self.experts.names)
            self.experts.names = [self._name(e) for e in self.dispatcher.local]

    @property
    def on_device(self) -> bool:
        """Whether the layer can be part of a CUDA graph, with as many tokens on all ranks that have any: the host
        reads no count."""
        return counts_stay(self.products, self.dispatcher.device, self.dtype)

    def _name(self, expert: int) -> str:
        routed = self.table.experts
        if expert == EMPTY:
            return ""
        return f"experts.{expert}" if expert < routed else f"shared.{expert - routed}"

    def forward(self, x_TH: Tensor, tokens_T: Tensor, load: MoELoad) -> Tensor:
        """``[T, hidden] -> [T, hidden]``; every rank of the dispatch group takes part, those without tokens too."""
        return run(self.stages(x_TH, tokens_T, load))

    def stages(self, x_TH: Tensor, tokens_T: Tensor, load: MoELoad) -> Stages:
        """The same; without gradients with a pause while the results are on their way home."""
        if self.whole:
            return self._on_this_rank(x_TH, load)
        own, shared, router = _weights(self, "experts"), _weights(self, "shared"), self.router(load)
        inside = router if self.products.triton else None
        passing = Pass(self.dispatcher, self.products, own, shared, self.sent_shared, inside, load.live)
        given = None if inside else self._route(x_TH, tokens_T, router)
        choice: tuple[Tensor | None, Tensor | None] = (None, None)
        found = Found()
        if given:
            choice = given.gates, given.experts
            found = Found(None if given.scores is None else given.scores.sum(0), given.squares, given.scores)
        if torch.is_grad_enabled():
            inputs = (x_TH, inside.centroids if inside else None, *choice, *own, *shared)
            out, *chosen = RoutedFFN.apply(passing, *inputs)
            found = Found(*chosen) if inside else found
        else:
            passing.begin(x_TH, *choice)
            yield
            out = passing.end()
            found = passing.found() if inside else found
        if load.live is None:
            counts = passing.flight.expert_counts()
            self._count(found, counts[: self.table.experts] if self.sent_shared else counts, passing.chosen, load)
        elif isinstance(passing.flight, GatheredFlight):
            load.chosen.append(passing.flight.chosen()[:, : self.table.top_k])
        else:
            load.chosen.append(passing.chosen)
        return out

    def router(self, load: MoELoad) -> Router | None:
        """Who chooses the experts of this rank's tokens; None for a hash of them, and without tokens."""
        moe, b = self.table, self.balance
        if moe.router == "hash" or not self.mesh.hosts_attention:
            return None
        return Router(
            self.centroids,
            moe.top_k,
            moe.normalize_gates,
            self.bias,
            b.device_groups,
            self.most,
            squares=bool(b.z_loss) and load.balance,
            scores=load.sequences is not None or (moe.router == "sigmoid" and load.balance),
            score=moe.router,
        )

    def _on_this_rank(self, x: Tensor, load: MoELoad) -> Tensor:
        """The layer in one piece."""
        from shoal.kernels.moe.layer import moe_layer

        r = self.router(load)
        assert r is not None
        shared = self._shared_weights()
        weights = (r.centroids, self.experts.gate_up, self.experts.down)
        result = moe_layer(
            x,
            *weights,
            shared,
            r.top_k,
            score=r.score,
            normalize=r.normalize,
            bias=r.bias,
            groups=r.groups,
            most=r.most,
            squares=r.squares,
            scores=r.scores,
            kind=self.products,
        )
        if load.live is None:
            found = Found(result.sums, result.squares, result.scores)
            self._count(found, result.counts, result.experts, load)
        else:
            load.chosen.append(result.experts)
        return result.out

    @torch.no_grad()
    def join_shared(self) -> int:
        """Keeps the shared experts' weights as one for steps without gradients, which otherwise copy them each time.

        Called again after the parameters changed, it brings them up to date in their place, where a CUDA graph reads
        them. Returns the bytes that it allocated.
        """
        shared: ExpertStack | None = getattr(self, "shared", None)  # once: a module's attributes are slow, steps many
        if not self.whole or shared is None or len(shared.names) < 2:
            return 0
        weight, kept = shared.gate_up, self._joined
        version = _version(weight)
        if kept is None:
            self._joined = side_by_side(weight.detach()), version
            return self._joined[0].nbytes
        if version is None or kept[1] != version:
            self._joined = kept[0].copy_(side_by_side(weight)), version
        return 0

    def _shared_weights(self) -> tuple[Tensor, Tensor] | None:
        if not hasattr(self, "shared"):
            return None
        gate_up, down = self.shared.gate_up, self.shared.down
        if self._joined is None or torch.is_grad_enabled() or self._joined[1] != _version(gate_up):
            return gate_up, down
        return self._joined[0], down.flatten(0, 1)

    def _route(self, x: Tensor, tokens: Tensor, router: Router | None) -> Routing:
        moe = self.table
        if moe.router == "hash":
            return hash_route(tokens, moe.experts, x.dtype)
        if router is None:
            none = torch.zeros(0, moe.top_k, dtype=torch.int64, device=x.device)
            return Routing(None, x.new_zeros(0, moe.top_k), none)
        return router.route(x)

    def _count(self, found: Found, counts: Tensor, chosen: Tensor, load: MoELoad) -> None:
        """Adds this layer's load, and what its balance losses are made of."""
        if not load.balance:
            load.layers.append(Counted(counts))
            return
        if self.table.router == "sigmoid" and found.scores is not None:
            shares = shares_of(found.scores)
            found = found._replace(sums=shares.sum(0), scores=shares)
        sums = found.sums if self.balance.expert or self.balance.device else None
        of_sequences = None
        if found.scores is not None and load.sequences is not None:
            of_sequences = self._sequence_loss(found.scores, chosen, load.sequences, load.tokens)
        load.layers.append(Counted(counts, sums, found.squares, of_sequences))

    def _sequence_loss(self, scores: Tensor, chosen: Tensor, sequences: tuple[Tensor, int], tokens: int) -> Tensor:
        """Of this rank's tokens; f of a sequence that several ranks share is that of all its tokens."""
        of_token, count = sequences
        counts = sequence_counts(chosen, of_token, count, self.table.experts)
        if self.mesh.context is not None:
            counts = self.mesh.context.all_reduce(counts)
        return sequence_loss(scores, load_fractions(counts), of_token, tokens, self.balance.sequence)

    @torch.no_grad()
    def nudge(self, counts: Tensor, rate: Tensor | float | None = None) -> None:
        """Moves each expert's bias a step towards even load. counts: ``[N']`` int64, tokens of the global batch. rate:
        instead of ``balance.bias_rate``, of all or of each ``[N']``."""
        if self.bias is not None:
            step = self.balance.bias_rate if rate is None else rate
            self.bias += (counts.sum() - counts * len(counts)).sign() * step


def _weights(module: nn.Module, name: str) -> Weights:
    """Of the stack of experts of this name, where there is one on this rank."""
    stack = getattr(module, name, None)
    return (stack.gate_up, stack.down) if isinstance(stack, ExpertStack) else (None, None)


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> type[Gemms]:
    try:
        return experts_backend(name, device, dtype)
    except ValueError as error:
        raise InvalidInput(str(error)) from None


def named_views(
    module: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None
) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """Every tensor of a model under its placement-independent name: ``(name, parameter, index into it or None)``.

    Experts are named one by one (``layers.3.moe.experts.17.down``), so that a checkpoint does not know how they were
    stacked. parameters: by their names in the module, where those it has at the moment are not meant.
    """
    stacks = {name: m for name, m in module.named_modules() if isinstance(m, ExpertStack)}
    for full, parameter in dict(module.named_parameters() if parameters is None else parameters).items():
        prefix, _, leaf = full.rpartition(".")
        if prefix not in stacks:
            yield full, parameter, None
            continue
        layer = prefix.rpartition(".")[0]
        for i, name in enumerate(stacks[prefix].names):
            if name:
                yield f"{layer}.{name}.{leaf}", parameter, i


def _version(weight: Tensor) -> int | None:
    """How often a tensor was changed in place; None for one made in inference mode, which does not count that."""
    return None if weight.is_inference() else weight._version


def named_biases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The experts' biases of a model, which are not its parameters: ``(layers.3.moe.bias, [N'] float32)``."""
    for name, layer in module.named_modules():
        if isinstance(layer, MoE) and layer.bias is not None:
            yield f"{name}.bias", layer.bias
