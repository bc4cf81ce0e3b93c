"""One rank's part of training: the step, validation, sampling and checkpoints."""

from __future__ import annotations

import math
import time
from functools import partial, reduce
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shoal.kernels.moe import load_fractions
from shoal.workers.checkpoint import Checkpointer
from shoal.workers.config import Recipe
from shoal.workers.data.ahead import Ahead
from shoal.workers.data.batch import PackedBatch
from shoal.workers.data.loader import TrainLoader, ValLoader
from shoal.workers.expert_plan import Plan, place_loads, places_of, plan_of
from shoal.workers.guard import bad_weight, first_bad_layer
from shoal.workers.inboxes import open_inbox
from shoal.workers.mesh import Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import MoE
from shoal.workers.model.load import MoELoad
from shoal.workers.optimizer import MasterAdamW
from shoal.workers.profile import StepProfile, span
from shoal.workers.records import load_figures
from shoal.workers.replica_traffic import GradientSums, WeightSpread
from shoal.workers.replicas import in_order, replicas_of
from shoal.workers.schedule import learning_rate
from shoal.workers.shards import shard_dense
from shoal.workers.training_tensors import move_experts, take_weights, tensors_of
from shoal.workers.transfer import on_host
from shoal.workers.validate import validate
from shoal.workers.watch import StepWatch

NEW_LOAD = 0.02  # weight of a step's load in the running mean of it that experts are placed by
LOAD_RECORDS = 200  # about so many expert loads, means of gates and coverages are recorded in a run
Record = dict[str, Any]


class NotFinite(Exception):
    """The loss, a gradient or a weight is not finite; the message names step and layer. Raised on every rank alike.

    ``records``: what the step that failed had computed before.
    """

    def __init__(self, text: str, records: list[Record] | None = None) -> None:
        super().__init__(text)
        self.records = records or []


class Trainer:
    """The model, optimizer, data and checkpoints of one rank. Every rank calls the same methods in the same order."""

    def __init__(
        self, recipe: Recipe, corpus: Path, checkpoints: Path | None, mesh: Mesh, device: torch.device
    ) -> None:
        # as use_deterministic_algorithms, which imports the compiler to tell it as well: 0.6 s of each rank's start
        exact = recipe.train.deterministic and device.type == "cuda"
        torch.set_deterministic_debug_mode("error" if exact else "default")
        self.recipe, self.corpus, self.mesh, self.device = recipe, corpus, mesh, device
        self.model = Transformer(recipe, mesh, device)
        self.dispatch = open_inbox(self.model)  # which way rows travel, in a sentence
        if recipe.parallel.shard_dense:
            shard_dense(self.model, mesh)
        self.parameters = dict(self.model.named_parameters())
        weights, replicas = list(self.parameters.values()), replicas_of(self.model, mesh)
        self.own = [piece for each in replicas for piece in each.own]
        self.optimizer = MasterAdamW(weights, recipe.train, self.own, self.model.dtype)
        buckets = in_order(replicas, weights)
        self.sums, self.weights, self.last_backward = GradientSums(buckets), WeightSpread(buckets, self.model), False
        for i, parameter in enumerate(weights):
            if not isinstance(parameter, DTensor):  # FSDP2 sums gradients of parts, and keeps them
                # weak: Python's collector does not see a tensor's hooks, and what they hold would never go
                parameter.register_post_accumulate_grad_hook(partial(_came, ref(self), i))
        self.reads = [m.dispatcher.reads for m in self.model.modules() if isinstance(m, MoE)]
        # Begins at nothing, so it counts as shares only: the mean of the steps so far, the last ones for more.
        self.measured = torch.zeros(len(self.model.moe_layers), recipe.moe.experts, dtype=torch.float64)
        self.watch = StepWatch(self.model, mesh, device)
        self.profile = StepProfile(recipe.train, checkpoints and checkpoints.parent, mesh.rank, device)
        self.step = self.saved_step = 0
        self.loader = self._loader(None)
        self.checkpointer: Checkpointer | None = None
        if checkpoints is not None:
            self.checkpointer = Checkpointer(
                checkpoints, recipe.checkpoint.keep, mesh.checkpoint, mesh.rank, mesh.world.size
            )

    def advance(self) -> list[Record]:
        """A step, and the validation that is due after it; returns their records.

        Raises: ``NotFinite``; the trainer must not go on then.
        """
        t = self.recipe.train
        with self.profile.step(self.step + 1):
            record = self.train_step()
        load, gates, coverage = (record.pop(key) for key in ("load", "gates", "coverage"))
        last = self.step == t.steps
        records = [record] if self._logged() else []
        if self.profile.ends(self.step):
            self.weights.finish()
            records.append(self.profile.finish(self.step))
        if self._spread():
            if load:
                records.append({"kind": "load", "step": self.step, **load_figures(load, self.by_place(load))})
            if gates:
                records.append({"kind": "gates", "step": self.step, "gates": gates})
            if coverage:
                records.append({"kind": "coverage", "step": self.step, **coverage})
        if last or (t.eval_every and self.step % t.eval_every == 0):
            evaluation = self.evaluate()
            if not math.isfinite(evaluation["loss"]):
                where = self._bad_weight() or "the validation loss is not finite"
                raise NotFinite(f"step {self.step}: {where}", records)
            records.append(evaluation)
        return records

    def _logged(self) -> bool:
        t = self.recipe.train
        return self.step == t.steps or self.step % t.log_every == 0

    def _spread(self) -> bool:
        """Whether the loads of experts, the means of gates and coverage are recorded at this step."""
        t = self.recipe.train
        return self.step == t.steps or self.step % max(1, t.steps // LOAD_RECORDS) == 0

    def by_place(self, load: list[list[float]]) -> list[list[float]]:
        """Of each layer's load of experts that of the places in a set of expert ranks; 1.0 is a fair share."""
        return [place_loads(*each, self.mesh.placement.set_size) for each in zip(load, self.plan, strict=True)]

    # -- a step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> Record:
        """One optimizer step on the next global batch; returns its record (the same on every rank but for times)."""
        t, started, clock = self.recipe.train, time.perf_counter(), self.watch.clock
        reads, waited = self._reads()
        self._begin_step()
        with clock.part("data"):
            here = self.loader.next()
            targets = self._global_targets(here)
            micro = [batch.to(self.device) for batch in here]
        losses, counts, looks = self._forward_backward(micro, targets)
        gradients = self.optimizer.gradients()
        with clock.part("reduce"):
            self.sums.finish(gradients)
        fractions = None if counts is None else on_host(load_fractions(counts))
        loss, balance, norm = self._totals(losses, gradients)
        # here, where the GPU was waited for anyway: the update of the weights goes on when the next step begins
        load = [] if fractions is None else fractions.tolist()
        gates, coverage = self.watch.totals(looks, t.batch * t.sequence)
        if not (math.isfinite(loss) and math.isfinite(balance) and math.isfinite(norm)):
            where = first_bad_layer(self.model, micro, dict(zip(self.parameters, gradients, strict=True)))
            raise NotFinite(f"step {self.step}: {where} (loss {loss:.4g}, gradient norm {norm:.4g})")
        with span("update"):
            rate = self._update(gradients, norm, counts)
        seconds = time.perf_counter() - started
        parts, clock.on = self.watch.parts(seconds) if clock.on else {}, False  # a validation is none of it
        if load:
            self.measured.lerp_(torch.tensor(load, dtype=torch.float64), NEW_LOAD)
        return {
            "kind": "train",
            "step": self.step,
            "tokens": self.step * t.batch * t.sequence,
            "loss": loss,
            "balance_loss": balance,
            "learning_rate": rate,
            "grad_norm": norm,
            "step_seconds": seconds,
            **parts,
            "tokens_per_second": t.batch * t.sequence / seconds,
            "dispatch_reads": self._reads()[0] - reads,
            "dispatch_wait_seconds": self._reads()[1] - waited,
            "expert_imbalance": sum(map(max, load)) / len(load) if load else 1.0,
            "time": time.time(),
            "load": load,
            "gates": gates,
            "coverage": coverage,
        }

    def _begin_step(self) -> None:
        """Turns to the next step: its random numbers, and what is measured of it."""
        self.step += 1
        self.watch.clock.on = self._logged()
        # every step has its own seed: random numbers do not depend on what ran before, so a resumed run draws the same
        torch.manual_seed((self.recipe.train.seed * 1_000_003 + self.step) % 2**63)

    def _reads(self) -> tuple[int, float]:
        """How often this rank's host read sizes of the dispatch so far, and for how many seconds it waited for them."""
        return sum(r.count for r in self.reads), sum(r.seconds for r in self.reads)

    def _update(self, gradients: list[Tensor], norm: float, counts: Tensor | None) -> float:
        """Clips the gradients, moves weights and biases; returns the learning rate."""
        t = self.recipe.train
        if t.clip and norm > t.clip:
            torch._foreach_mul_([piece.of(gradients) for piece in self.own], t.clip / norm)
        rate = learning_rate(self.step, t)
        self.optimizer.step(rate)
        self.weights.begin()
        if counts is not None:
            self.model.nudge(counts.unbind())
        return rate

    def _forward_backward(self, micro: list[PackedBatch], targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the global batch's loss, over so many targets, from this rank's rows; ``[cross entropy,
        balance]`` parts, counts as :class:`MoELoad` has them, and what the watch adds up."""
        t = self.recipe.train
        fractions = self._fractions(micro) if self.recipe.counts_first else None
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        counts: Tensor | None = None
        looks: list[Tensor] = []
        clock = self.watch.clock
        for batch in micro:
            load = MoELoad(t.batch * t.sequence, fractions, sequences=self._sequences(batch))
            self.watch.look(self._spread())  # at nothing that is computed before, or for the backward pass again
            with clock.part("forward"):
                cross_entropy = self.model.loss_sum(self.model(batch, load), batch.targets) / targets
                balance = load.loss(self.recipe.balance)
                balance = cross_entropy.new_zeros(()) if balance is None else balance
            looks.append(self.watch.sums())
            with clock.part("backward"):
                self.last_backward = batch is micro[-1]
                (cross_entropy + balance).backward()
            sums += torch.stack([cross_entropy.detach().double(), balance.detach().double()])
            counts = _added(counts, load.counts)
        return sums, counts, reduce(torch.add, looks)

    def take(self, index: int) -> None:
        """A backward pass has made the gradient of the parameter of that number."""
        total = self.optimizer.take(index)
        if self.last_backward:
            self.sums.came(index, total)

    def _sequences(self, batch: PackedBatch) -> tuple[Tensor, int] | None:
        """Which sequence each of this rank's tokens is in, and how many there are, where there is a loss of them."""
        length = self.recipe.train.sequence
        if not self.recipe.balance.sequence:
            return None
        at = batch.rows.indices(self.device) if batch.rows else torch.arange(len(batch.tokens), device=self.device)
        return at // length, batch.cu_seqlens[-1] // length

    def _global_targets(self, micro: list[PackedBatch]) -> Tensor:
        """Predicted tokens of the global batch, over all ranks, at least 1: on the device, since to wait for
        a number there means to wait for the last step's update. micro: on the host."""
        count = torch.full((), sum(b.targets_count for b in micro), device=self.device)  # a copy would be waited for
        return self.mesh.world.all_reduce(count).clamp_(min=1)  # weights are under way in the groups of replicas

    @torch.no_grad()
    def _fractions(self, micro: list[PackedBatch]) -> Tensor | None:
        """f ``[MoE layers, experts]`` over all micro-batches, from a forward pass of its own: the loss multiplies f of
        all by P of each."""
        total: Tensor | None = None
        for batch in micro:
            load = MoELoad(1)
            self.model(batch, load)
            total = _added(total, load.counts)
        return None if total is None else load_fractions(total)

    def _totals(self, losses: Tensor, gradients: list[Tensor]) -> tuple[float, float, float]:
        """Loss, balance loss and gradient norm over all ranks; each piece of a gradient counts where it was summed."""
        own = [piece.of(gradients) for piece in self.own]
        norms = torch._foreach_norm(own, dtype=torch.float64) if own else ()  # one pass, and no copies in float64
        square = torch.stack([losses.new_zeros(()), *norms]).square().sum()
        total = self.mesh.world.all_reduce(torch.cat([losses, square[None]]))
        loss, balance, squares = total.tolist()
        return loss, balance, math.sqrt(squares) if squares >= 0 else math.nan

    # -- validation -------------------------------------------------------------------------------------

    def evaluate(self) -> Record:
        """A record of the loss over whole validation documents."""
        t = self.recipe.train
        loader = ValLoader(self.corpus, t.sequence, t.eval_tokens, t.batch // t.accumulate, self._shard())
        return {"kind": "eval", "step": self.step, **validate(self.model, loader)}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds of this rank, by placement-independent names. Parts of tensors are DTensors."""
        self.weights.finish()
        return tensors_of(self.model, self.parameters, self.optimizer)

    @property
    def plan(self) -> Plan:
        """Where the routed experts lie."""
        return tuple(layer.homes for layer in self.model.moe_layers)

    def place_experts(self, plan: Plan) -> None:
        """Moves experts, their weights and what the optimizer knows of them, between two steps. Collective."""
        move_experts(self.model, plan, self.tensors)

    def save(self) -> None:
        """Starts writing a checkpoint of this step, in the background, unless there is one.

        Raises: ``NotFinite`` on every rank when a weight is not finite on one; ``ShoalError`` of the previous one.
        """
        assert self.checkpointer is not None
        if self.saved_step == self.step:
            return
        if bad := self._bad_weight():
            raise NotFinite(f"step {self.step}: {bad}")
        dtype = str(self.model.dtype).removeprefix("torch.")
        state = {"step": self.step, "seed": self.recipe.train.seed, "dtype": dtype, "data": self.loader.state()}
        state |= {"expert_load": self.measured.tolist(), "expert_plan": self.plan}
        state["biased"] = bool(self.recipe.balance.bias_rate)
        state |= self.watch.coverage.state()
        self.checkpointer.save(self.step, self.tensors(), state)
        self.saved_step = self.step

    def _bad_weight(self) -> str:
        """Where a weight is not finite on any rank, in words; else an empty string. Collective."""
        self.weights.finish()
        return bad_weight(self.parameters, len(self.model.layers), self.mesh.world, self.device)

    def check_saving(self) -> None:
        """Raises what went wrong with the last checkpoint, if that is known by now; does not wait for it."""
        if self.checkpointer and self.checkpointer.done:
            self.checkpointer.wait()

    def settle(self) -> None:
        """Waits until no checkpoint is being written; raises what went wrong with it."""
        if self.checkpointer:
            self.checkpointer.wait()

    def restore(self, step: int) -> None:
        """Goes on from the checkpoint of ``step``, whatever ranks and placement wrote it."""
        assert self.checkpointer is not None
        state = self.checkpointer.load(step, self.tensors())
        self.step = self.saved_step = int(state["step"])
        self.optimizer.set_steps(self.step)
        self.loader = self._loader(state["data"])
        self.watch.coverage.restore(state)
        if load := state.get("expert_load"):  # older checkpoints have none
            self.measured = torch.tensor(load, dtype=torch.float64)
            plan = plan_of(state["expert_plan"])
            if places_of(plan) == self.mesh.placement.set_size:
                self.place_experts(plan)

    def begin_with(self, checkpoint: Path) -> None:
        """Takes over the weights of another run's checkpoint; step, data and the optimizer's moments begin anew.

        Raises: ``InvalidInput`` for weights of other sizes, or of another dtype.
        """
        take_weights(checkpoint, self.tensors())

    def _loader(self, state: dict[str, Any] | None) -> Ahead:
        t, data = self.recipe.train, self.recipe.data
        sizes = t.sequence, t.batch, t.accumulate
        shuffling = t.seed, data.shuffle_groups, data.shuffle_tokens
        loader = TrainLoader(self.corpus, *sizes, *shuffling, self._shard(), state)
        return Ahead(loader, self.model.own_part, self.device)

    def _shard(self) -> tuple[int | None, int]:
        """Which part of the rows is read here: all ranks of a context group read the same one."""
        group, placement = self.mesh.attention, self.mesh.placement
        return (group.index // placement.context if group else None), len(placement.context_groups())


def _came(trainer: ref[Trainer], index: int, _parameter: Tensor) -> None:
    if (there := trainer()) is not None:
        there.take(index)


def _added(total: Tensor | None, counts: Tensor | None) -> Tensor | None:
    """Counts of one pass more; None without MoE layers."""
    return counts if total is None or counts is None else total + counts
