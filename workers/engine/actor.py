"""The Ray actor that serves one rank of a model: its shards, and an engine that steps along with the other ranks'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.workers.actor import RankActor
from shoal.workers.config import Recipe, ServeTable
from shoal.workers.engine.request import Limits, Load, Output, Request
from shoal.workers.expert_plan import Plan
from shoal.workers.placement import Placement

if TYPE_CHECKING:
    from shoal.workers.engine.loop import EngineLoop

THREADS = 32
"""Calls that an actor answers at once: those for news, the end and experts that move wait, others take an instant."""


class EngineActor(RankActor):
    """One rank that serves. Requests and tokens come and go by Ray calls, activations by torch.distributed."""

    fixed: bool | None = None  # whether decode steps have fixed shapes; None: where CUDA graphs can hold them
    allocator = ""  # PyTorch's default: what a replica allocates is allocated once, for the most part by CUDA graphs

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks)
        self.loop: EngineLoop | None = None

    def open(self, recipe: dict[str, Any], checkpoints: str, step: int, device: str, plan: Plan | None = None) -> None:
        """Loads this rank's weights and begins to step; all ranks must. checkpoints: a path, or the URL of the run.
        plan: where the routed experts lie; None: in equal runs."""
        import torch

        from shoal.workers.engine.engine import Engine
        from shoal.workers.engine.loop import EngineLoop
        from shoal.workers.machine import free_memory, spare_collector
        from shoal.workers.mesh import make_mesh
        from shoal.workers.run_store import checkpoints_here
        from shoal.workers.weights import load_model

        checked = Recipe.model_validate(recipe)
        mesh = make_mesh(Placement.of(checked), self.rank, device)
        model = load_model(checked, checkpoints_here(checkpoints, step), step, mesh, torch.device(device), plan)
        memory = int(free_memory(device) * checked.serve.memory / (1 if device == "cuda" else self.ranks))
        engine = Engine(model, limits_of(checked.serve, device), memory, self.fixed)
        engine.warm_up()
        self.loop = EngineLoop(engine)
        spare_collector()

    def submit(self, request: Request, again: bool = False) -> None:
        """Queues a request. again: it was accepted before, by an engine that is gone: a full queue takes it too.

        Raises: InvalidInput, Busy.
        """
        self._running().submit(request, again)

    def cancel(self, request: str) -> bool:
        """Ends a request; False when it has ended."""
        return self._running().cancel(request)

    def take(self, seconds: float) -> list[Output]:
        """News since the last call; waits for some, no longer than ``seconds``."""
        return self._running().take(seconds)

    def load(self) -> Load:
        """How busy this rank is."""
        return self._running().load()

    def place_experts(self, plan: Plan) -> None:
        """Moves experts to the ranks that a plan says, between steps; returns when that is done. All ranks must be
        told."""
        self._running().place(plan)

    def watch(self) -> None:
        """Returns when the engine has ended; raises when that was an error."""
        self._running().wait()

    def stop(self) -> None:
        """Ends the engine after its step; all ranks end together."""
        self._running().stop()

    def _running(self) -> EngineLoop:
        assert self.loop is not None, "open() comes first"
        return self.loop


def limits_of(s: ServeTable, device: str) -> Limits:
    """A recipe's ``[serve]`` table as an engine on a device of this type takes it.

    A layer costs a GPU's host some milliseconds, and a read of all experts' weights, whatever its tokens are, so that
    long chunks suit it.
    """
    step = s.step_tokens or (4096 if device == "cuda" else 512)
    return Limits(s.sequences, step, s.waiting, s.pages, s.speculate, s.prefix_cache, s.cuda_graphs)
