"""The Ray actor that hosts the shards of one rank. The driver imports this module: torch comes in only inside calls."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.workers.config import Recipe
from shoal.workers.errors import TrainingFailed
from shoal.workers.expert_plan import Plan
from shoal.workers.machine import cores, peak_flops, spare_collector
from shoal.workers.placement import Placement

if TYPE_CHECKING:
    from shoal.workers.trainer import Trainer

Record = dict[str, Any]


class RankActor:
    """One rank: a process, a device, its shards. Data moves between ranks by torch.distributed, never through Ray."""

    # Experts get another number of rows in each layer and step, for which no block of memory of another one fits.
    allocator = "expandable_segments:True"

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.trainer: Trainer | None = None
        self.store: Any = None
        self.failed = self.under_way = False

    def pid(self) -> int:
        """Process id, for people and for tests."""
        return os.getpid()

    def open_store(self) -> tuple[str, int]:
        """Rank 0 opens the meeting point of the process group on a free port; returns its address."""
        import ray
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
        self.store = TCPStore(host, 0, self.ranks, is_master=True, wait_for_workers=False)
        return host, int(self.store.port)

    def join(self, address: tuple[str, int], threads: int, here: int, device: str) -> str:
        """Joins the process group; returns what the rank runs on.

        threads: of this process, 0 for one beside a GPU, else this machine's cores over ``here``, the ranks on it.

        Raises: what torch.distributed raises when the ranks do not meet.
        """
        # cuBLAS keeps to one result only with a workspace of its own; it reads this when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.allocator:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", self.allocator)
        import torch
        import torch.distributed as dist

        from shoal.workers.mesh import COLLECTIVE_TIMEOUT

        # What a host computes for its GPU is small: to wake other threads for it takes longer, a hundred times as long
        # where these do not get a core at once.
        threads = threads or (1 if device == "cuda" else max(1, cores() // here))
        torch.set_num_threads(threads)
        if self.ranks > 1:
            if self.store is None:
                self.store = dist.TCPStore(*address, self.ranks, is_master=False)
            if device == "cuda":
                torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.ranks, timeout=COLLECTIVE_TIMEOUT
            )
        return torch.cuda.get_device_name(0) if device == "cuda" else f"{socket.gethostname()}, {threads} threads"

    def build(self, recipe: dict[str, Any], corpus: str, checkpoints: str | None, step: int | None, device: str) -> int:
        """Builds model, optimizer and loader, from the checkpoint of ``step`` if given. Returns the step reached."""
        import torch

        from shoal.workers.mesh import make_mesh
        from shoal.workers.trainer import Trainer

        checked = Recipe.model_validate(recipe)
        mesh = make_mesh(Placement.of(checked), self.rank, device)
        folder = Path(checkpoints) if checkpoints else None
        self.trainer = Trainer(checked, Path(corpus), folder, mesh, torch.device(device))
        if step is not None:
            self.trainer.restore(step)
        elif checked.train.initial:
            self.trainer.begin_with(Path(checked.train.initial))
        return self.trainer.step

    def peak(self) -> float:
        """FLOP/s that this rank's device could do at most."""
        trainer = self._ready()
        return peak_flops(trainer.device.type, str(trainer.model.dtype).removeprefix("torch."))

    def dispatch(self) -> str:
        """Which way rows travel to other ranks' experts, in a sentence; "" where none do."""
        return self._ready().dispatch

    def run(self, until: int, save: bool = False) -> list[Record]:
        """Trains up to step ``until``, with validations on the way. Rank 0 returns the records.

        save: first starts to write a checkpoint of the step reached, unless there is one. Whoever calls has filed the
        records up to that step: they are not computed again by who goes on from the checkpoint.

        Numbers that are not finite end the call with a ``failed`` record on every rank.
        """
        from shoal.workers.inboxes import rows_awaited
        from shoal.workers.trainer import NotFinite

        trainer, records = self._ready(), []
        try:
            trainer.check_saving()
            # a second call may be in flight when a step fails: it must not go on from there
            if save and not self.failed:
                trainer.save()
            while trainer.step < until and not self.failed:
                with rows_awaited(trainer.model):
                    records += trainer.advance()
                if not self.under_way:  # what the first step makes stays, kernels for example
                    spare_collector()
                    self.under_way = True
        except NotFinite as error:
            self.failed = True
            records += error.records
            records.append({"kind": "event", "step": trainer.step, "event": "failed", "text": str(error)})
        except BaseException:
            self.failed = True  # in the midst of a step: others wait for what comes next in it, not for another one
            raise
        return records if self.rank == 0 else []

    def evaluate(self) -> Record:
        """One validation."""
        from shoal.workers.inboxes import rows_awaited

        with rows_awaited(self._ready().model):
            return self._ready().evaluate()

    def save(self) -> int:
        """Writes a checkpoint of the step reached, unless there is one, and waits for it. Returns the step.

        Raises: ``TrainingFailed`` on every rank when the weights are not finite.
        """
        from shoal.workers.trainer import NotFinite

        trainer = self._ready()
        try:
            trainer.save()
        except NotFinite as error:
            raise TrainingFailed(f"training stopped at {error}") from None
        trainer.settle()
        return trainer.step

    def expert_load(self) -> tuple[list[list[float]], Plan]:
        """What experts had to do so far, the last steps for more, ``[MoE layers][experts]``; and where they lie."""
        trainer = self._ready()
        load: list[list[float]] = trainer.measured.tolist()
        return load, trainer.plan

    def place_experts(self, plan: Plan) -> None:
        """Moves experts to the ranks that a plan says, between two steps."""
        self._ready().place_experts(plan)

    def settle(self) -> None:
        """Waits for a checkpoint that is being written."""
        self._ready().settle()

    def sample(self, prompt: list[int], count: int, options: dict[str, Any]) -> list[int]:
        """New tokens after ``prompt``; on ranks that do not lead, an empty list."""
        from shoal.workers.inboxes import rows_exchanged
        from shoal.workers.sample import sample

        with rows_exchanged(self._ready().model):
            return sample(self._ready().model, prompt, count, **options)

    def _ready(self) -> Trainer:
        assert self.trainer is not None, "build() comes first"
        return self.trainer


def device_of(recipe: Recipe, gpus: int) -> str:
    """``cuda`` or ``cpu``, as the recipe says; ``auto`` takes GPUs when there is one a rank."""
    wanted = recipe.parallel.device
    if wanted != "auto":
        return wanted
    return "cuda" if gpus >= recipe.parallel.ranks else "cpu"
