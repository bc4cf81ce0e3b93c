"""A group of ranks: Ray actors in one placement group, joined to one process group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from shoal.cluster.local import RaySession
from shoal.workers.actor import RankActor, device_of
from shoal.workers.config import Recipe
from shoal.workers.errors import ClusterRefused, ShoalError, last_line

PLACE_TIMEOUT = 120.0  # seconds to wait for the cluster to give the ranks a place
LOOK = 1  # seconds between two looks at what whoever waits has to say
LINGER = 10.0  # seconds the other ranks have to say why they stopped, once one has


class RankLost(Exception):
    """A rank died or could not go on; the group is of no use any more."""


class RankGroup:
    """The actors of one run, in rank order. Use as a context manager: leaving it ends every actor.

    kind: their class. calls: how many calls an actor answers at a time. seconds: how long the cluster may take to make
    room for them. waiting: is called every second meanwhile, with the seconds waited; what it raises ends the waiting.
    """

    def __init__(
        self,
        recipe: Recipe,
        session: RaySession,
        kind: type[RankActor] = RankActor,
        calls: int = 1,
        seconds: float = PLACE_TIMEOUT,
        waiting: Callable[[float], object] = lambda waited: None,
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.recipe = recipe
        ranks = recipe.parallel.ranks
        self.device = device_of(recipe, session.gpus)
        self._refuse_impossible(session)
        needs = {"CPU": 1.0, "GPU": 1.0} if self.device == "cuda" else {"CPU": 1.0}
        self.place = placement_group([needs] * ranks, strategy="PACK")
        try:
            self._await_place(seconds, waiting, f"{ranks} ranks of {needs}")
        except BaseException:
            ray.util.remove_placement_group(self.place)
            raise
        # ranks on each rank's machine, which share its cores
        nodes = ray.util.placement_group_table(self.place)["bundles_to_node_id"]
        self.nodes = [str(nodes[rank]) for rank in range(ranks)]
        self.neighbours = [self.nodes.count(node) for node in self.nodes]
        actor = ray.remote(kind)
        self.actors: list[Any] = [
            actor.options(
                num_cpus=1,
                num_gpus=needs.get("GPU", 0),
                max_restarts=0,
                max_concurrency=calls,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, placement_group_bundle_index=rank),
            ).remote(rank, ranks)
            for rank in range(ranks)
        ]

    def _await_place(self, seconds: float, waiting: Callable[[float], object], what: str) -> None:
        begun = time.monotonic()
        while not self.place.wait(LOOK):
            waited = time.monotonic() - begun
            if waited > seconds:
                raise ClusterRefused(
                    f"the cluster had no room for {what} within {seconds:.0f} s: add nodes or lower parallel.ranks"
                )
            waiting(waited)

    def _refuse_impossible(self, session: RaySession) -> None:
        ranks = self.recipe.parallel.ranks
        if self.device == "cuda" and session.local and session.gpus < ranks:
            raise ClusterRefused(
                f"parallel.ranks={ranks} with parallel.device='cuda' needs {ranks} GPUs, and this machine has "
                f"{session.gpus}: lower parallel.ranks or set parallel.device to cpu"
            )

    def connect(self) -> list[str]:
        """Forms the process group; returns what each rank runs on."""
        address = self.get([self.actors[0].open_store.remote()])[0] if len(self.actors) > 1 else ("", 0)
        return self.get(
            [
                actor.join.remote(address, self.recipe.parallel.threads, here, self.device)
                for actor, here in zip(self.actors, self.neighbours, strict=True)
            ]
        )

    def build(self, corpus: str, checkpoints: str | None, step: int | None) -> int:
        """Builds the shards on every rank; returns the step they stand at."""
        recipe = self.recipe.model_dump()
        return int(self.get(self.call("build", recipe, corpus, checkpoints, step, self.device))[0])

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method on every rank without waiting; the references, in rank order."""
        return [getattr(actor, method).remote(*arguments) for actor in self.actors]

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Waits for all ranks.

        Raises: the ``ShoalError`` of a rank that refused its work; ``RankLost`` when one died or broke off.
        """
        import ray

        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                raise self._reason(error, references) from error
        return list(ray.get(list(references)))

    def _reason(self, first: Exception, references: Sequence[Any]) -> Exception:
        """What to tell: a death, which explains what the other ranks say, before a rank's refusal, before the rest.

        references: of the call that failed. All ranks are asked as well: whoever is dead fails that at once; whoever
        waits for the dead in a collective does not answer. A rank that said what is wrong may have died of it since.
        """
        import ray

        asked = [actor.pid.remote() for actor in self.actors]
        said = dict(zip(asked, references, strict=True)) if len(references) == len(asked) else {}
        errors: list[Any] = [first]
        waiting = [*references, *asked]
        while waiting and not any(isinstance(e, ray.exceptions.RayActorError) for e in errors):
            done, waiting = ray.wait(waiting, num_returns=1, timeout=LINGER)
            if not done:
                break
            error = _failure(done[0])
            if isinstance(error, ray.exceptions.RayActorError) and done[0] in said:
                error = _failure(said[done[0]]) or error
            errors += [error] if error else []
        if isinstance(errors[-1], ray.exceptions.RayActorError):
            return RankLost(self._death(errors[-1]))
        refusals = [e.cause for e in errors if isinstance(getattr(e, "cause", None), ShoalError)]
        return refusals[0] if refusals else RankLost(last_line(errors[0]))

    def _death(self, error: Any) -> str:
        """Says which rank died. error: Ray's RayActorError."""
        if error.actor_init_failed:
            return f"a rank could not start ({last_line(error)})"
        ids = [actor._actor_id.hex() for actor in self.actors]
        which = f"rank {ids.index(error.actor_id)}" if error.actor_id in ids else "a rank"
        part = "node" if "its node has died" in str(error) else "process"
        return f"the {part} of {which} died"

    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self.get(self.call("pid"))

    def close(self) -> None:
        """Ends every actor at once and gives their place back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        ray.util.remove_placement_group(self.place)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _failure(reference: Any) -> Exception | None:
    """What a call has failed with by now."""
    import ray

    try:
        if ray.wait([reference], timeout=0)[0]:
            ray.get(reference)
    except ray.exceptions.RayError as error:
        return cast(Exception, error)
    return None
