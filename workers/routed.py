"""DeepSeekMoE's experts over the ranks of a dispatch group, as one node of autograd, so that exchanges and products
are launched in the order in which they overlap.

Forward, the shared experts' first product runs while tokens travel, their second one while results come home. Backward,
the shared experts' gradients hide the gradients that travel, and the experts' weight gradients those that come home.
Kept are the tokens, those that came, the outputs of first products, and the routing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shoal.kernels.moe import gemms as ffn
from shoal.kernels.moe.fan import combine, expand
from shoal.kernels.moe.gemms import Gemms, apart
from shoal.kernels.moe.plan import gates_of_rows
from shoal.kernels.moe.router import Router
from shoal.workers.dispatch import Dispatcher
from shoal.workers.flight import Own
from shoal.workers.gathered import Live

if TYPE_CHECKING:
    from shoal.kernels.moe.triton_route import Choice

Pair = tuple[Tensor, Tensor]
Weights = tuple[Tensor | None, Tensor | None]
"""Of experts: gate_up ``[E, H, 2F]`` (gate first) and down ``[E, F, H]``; None for none."""


class Found(NamedTuple):
    """What balance losses are made of, with gradients; None for what there is not. sums: of the scores over tokens,
    ``[N]``. squares: of the log-sum-exp of logits, added up. scores: ``[T, N]``."""

    sums: Tensor | None = None
    squares: Tensor | None = None
    scores: Tensor | None = None


class Pass:
    """One pass of a layer over the tokens of this rank, ``x [T, H]``; collective over the dispatch group.

    own: the weights of the routed (and dispatched shared) experts that this rank hosts; shared: those of the local
    shared ones, which every token uses. kind: who computes products. always: how many of the last experts every token
    is sent to, with gate 1. router: who chooses, by Triton; without one gates and experts are given. live: as
    :meth:`Dispatcher.start` has it, for a pass without gradients.

    Once it has begun, ``chosen [T, K]`` says which experts the tokens go to, those of ``always`` aside.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        kind: type[Gemms],
        own: Weights,
        shared: Weights,
        always: int = 0,
        router: Router | None = None,
        live: Live | None = None,
    ) -> None:
        self.live = live
        self.dispatcher, self.kind, self.own, self.shared = dispatcher, kind, own, shared
        self.always, self.router, self.triton = always, router, dispatcher.triton
        self.keep = False
        self.choice: Choice | None = None

    def begin(self, x: Tensor, gates: Tensor | None = None, experts: Tensor | None = None) -> None:
        """From the tokens until results are on their way home. gates: ``[T, K]`` float32 or float64; experts: int."""
        x = x.contiguous()
        gates, self.chosen = self._choose(x, gates, experts)
        gates, experts = self._with_always(gates, self.chosen)
        counts = self.choice.counts if self.choice else None
        self.flight = self.dispatcher.start(x, gates, experts, self.keep, self.live, counts)
        self.shared_hidden = self.shared_act = self.hidden = None
        shared_up, _ = self.shared
        if shared_up is not None:
            self.shared_products = self.kind(None)
            self.shared_hidden, self.shared_act = self.shared_products.up(x, shared_up)
        self.flight.send()
        self.arrived = self.flight.arrive(x, gates)
        rows = expand(self.arrived.parts, self.arrived.fan, self.triton)
        up, down = self.own
        # a token of one request may leave a rank without rows, and a GPU's grouped products want some
        if up is not None and down is not None and len(rows):
            self.products = self.kind(self.arrived.ends)
            self.hidden, rows = ffn.forward(self.products, rows, up, down)
        self.results = rows
        self.flight.give_back(self.arrived, rows)

    def _choose(self, x: Tensor, gates: Tensor | None, experts: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.router is None:
            assert gates is not None and experts is not None
            return gates.to(torch.promote_types(gates.dtype, torch.float32)), experts
        from shoal.kernels.moe.triton_route import choose

        r = self.router
        self.choice = choose(
            x,
            r.centroids,
            r.top_k,
            score=r.score,
            normalize=r.normalize,
            bias=r.bias,
            groups=r.groups,
            most=r.most,
            lse=r.squares,
            sort=False,
        )
        return self.choice.gates, self.choice.experts

    def found(self) -> Found:
        """Of the router of the pass."""
        if self.router is None or self.choice is None:
            return Found()
        return Found(self.choice.sums, self.choice.squares, self.choice.scores if self.router.scores else None)

    def _with_always(self, gates: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        if not self.always:
            return gates, experts
        total, tokens = self.dispatcher.experts, len(experts)
        last = torch.arange(total - self.always, total, device=experts.device, dtype=experts.dtype)
        ones = gates.new_ones(tokens, self.always)
        return torch.cat([gates, ones], 1), torch.cat([experts, last.expand(tokens, -1)], 1)

    def end(self) -> Tensor:
        """``[T, H]``: waits for the results, and adds all up."""
        base = None
        _, shared_down = self.shared
        if shared_down is not None and self.shared_act is not None:
            base = self.shared_products.rows_by_weight(self.shared_act, shared_down.flatten(0, 1))
        out = self._with_own(base)
        self.arrived = self.flight.kept(self.arrived)
        del self.results, self.shared_act
        return out

    def _with_own(self, base: Tensor | None) -> Tensor:
        """``[T, H]``: base, what this rank's experts have for its tokens, and what the others' have."""
        results, arrived, mine = self.results, self.arrived, self.flight.own
        own = Own(results, arrived.fan.rows[mine], arrived.gates[mine]) if len(results) else None
        if base is None and own is not None:  # nothing else is left to do while rows are on their way home
            base, own = combine(results, own.rows, self.triton, own.gates), None
        elif base is None:
            base = results.new_zeros(self.flight.tokens, results.shape[1])
        return self.flight.returned(base, own)

    def backward(self, grad: Tensor, d_found: Found | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of x, centroids, gates, gate_up, down, and of the shared experts' gate_up and down.

        d_found: gradients of :meth:`found`.
        """
        flight, arrived, grad = self.flight, self.arrived, grad.contiguous()
        x = arrived.parts[0]
        flight.send_grads(grad)
        base, d_shared_up, d_shared_down = self._shared_backward(x, grad)
        came = flight.arrive_grads(grad)
        up, down = self.own
        d_up = d_down = None
        if up is None or down is None or self.hidden is None:
            d_rows, d_gates = grad.new_empty(0, grad.shape[1]), torch.zeros_like(arrived.gates)
            flight.give_back_grads(arrived.fan, d_rows, d_gates)
            if up is not None and down is not None:
                d_up, d_down = torch.zeros_like(up), torch.zeros_like(down)
        else:

            def on_rows(d_rows: Tensor, d_weights: Tensor | None) -> None:
                nonlocal d_gates
                assert d_weights is not None
                d_gates = gates_of_rows(d_weights, arrived.fan.rows, flight.triton)
                flight.give_back_grads(arrived.fan, d_rows, d_gates)

            d_rows, d_up, d_down, _ = ffn.backward(
                self.products,
                expand(came, arrived.fan, self.triton),
                lambda: expand(arrived.parts, arrived.fan, self.triton),
                self.hidden,
                up,
                down,
                arrived.gates,
                arrived.fan.order,
                on_rows,
            )
        gates_home = flight.returned_gates(d_gates[: flight.tokens])
        if self.always:
            gates_home = gates_home[:, : -self.always]
        logits = self._logits_backward(gates_home, d_found or Found(), x.dtype)
        d_x = flight.returned_grads(base, Own(d_rows, arrived.fan.rows[: flight.tokens]), logits)
        d_centroids = None if logits is None else logits[0].T @ x
        given = None if self.router else gates_home
        return d_x, d_centroids, given, d_up, d_down, d_shared_up, d_shared_down

    def _logits_backward(self, d_gates: Tensor, d_found: Found, dtype: torch.dtype) -> Pair | None:
        """Gradient of the router's logits, and its centroids."""
        d_sums, d_squares, d_scores = d_found
        if self.router is None or self.choice is None:
            return None
        from shoal.kernels.moe.triton_route import choose_backward

        grads = d_gates.contiguous().flatten(), None if d_sums is None else d_sums.contiguous()
        d_logits = choose_backward(
            self.choice,
            *grads,
            dtype,
            score=self.router.score,
            normalize=self.router.normalize,
            score_grads=None if d_scores is None else d_scores.contiguous(),
            square_grad=d_squares,
        )
        return d_logits, self.router.centroids

    def _shared_backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        up, down = self.shared
        if up is None or down is None or self.shared_hidden is None:
            return None, None, None
        weights = up, down.flatten(0, 1)
        d_x, d_up, d_down, _ = ffn.backward(self.shared_products, grad, lambda: x, self.shared_hidden, *weights)
        return d_x, apart(d_up, len(up)), d_down.view_as(down)


class RoutedFFN(torch.autograd.Function):
    """A :class:`Pass` with gradients; the centroids and weights are those of the pass."""

    @staticmethod
    def forward(
        ctx: Any,
        passing: Pass,
        x: Tensor,
        centroids: Tensor | None,
        gates: Tensor | None,
        experts: Tensor | None,
        up: Tensor | None,
        down: Tensor | None,
        shared_up: Tensor | None,
        shared_down: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """``[T, H]``, and what the router of the pass :meth:`Pass.found`."""
        ctx.passing, passing.keep = passing, True
        ctx.set_materialize_grads(False)
        passing.begin(x, gates, experts)
        return passing.end(), *passing.found()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, *d_found: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        passing, ctx.passing = ctx.passing, None  # what it keeps goes with it
        if grad is None:
            grad = torch.zeros_like(passing.arrived.parts[0])
        d_x, d_centroids, d_gates, *weights = passing.backward(grad, Found(*d_found))
        return None, d_x, d_centroids, d_gates, None, *weights
