"""The service as one Ray Serve application: a replica in front of the engines, which answers HTTP and gRPC.

HTTP comes through Serve's proxy. gRPC does not: Serve's gRPC proxy listens on every interface of the machine, knows no
TLS, and loses the trailing metadata of a call that fails, where "retry-after" stands. So the replica runs a gRPC server
of its own, on the head node, where the HTTP proxy is; there is one replica, because there is one such port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shoal.cluster.serving import HEAD, Listen
from shoal.jobs.serve.client import Client, ModelInfo
from shoal.jobs.serve.intake import Intake

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shoal.jobs.data.tokenizer import CorpusTokenizer
    from shoal.jobs.serve.gate import Settings

# HTTP calls beside those that the settings allow: Serve lets in more than the service does, so that it is the service
# that refuses (with an error body that clients know), and that a busy one still answers /readyz.
OTHERS = 64
TELLING = 1.0  # seconds to tell those who watch the health; one who does not read them would hold that up for ever
CLOSING = 5.0  # seconds that answers which are made already have to reach their clients


@dataclass(frozen=True)
class Served:
    """Engines that run, and what the service must know of them. close: ends them."""

    client: Client
    info: ModelInfo
    tokenizer: CorpusTokenizer
    close: Callable[[], Awaitable[None]]


# Starts the engines; called in the replica, so that they end with it.
Factory = Callable[..., Awaitable[Served]]


class Replica:
    """What Serve runs: the engines' Client, the FastAPI app over it, and the gRPC server beside it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, factory: str, options: Mapping[str, Any], listen: Listen, settings: Settings
    ) -> None:
        """Starts the engines, then gRPC. factory: a Factory as ``module:function``. options: its keyword arguments.

        Raises: whatever the factory raises; ClusterRefused when the gRPC port is taken.
        """
        from shoal.cluster.serve_metrics import ServeMetrics
        from shoal.jobs.serve.http import make_app
        from shoal.jobs.serve.measured import Measured
        from shoal.jobs.serve.rpc import RpcServer

        module, _, function = factory.partition(":")
        open_engines: Factory = getattr(import_module(module), function)
        self.served = await open_engines(**options)
        self.measured = Measured(self.served.client, ServeMetrics(self.served.info.name))
        self.intake = Intake(self.measured)
        known = self.intake, self.served.info, self.served.tokenizer, settings
        try:
            self.http = make_app(*known)
            self.http.state.service.apart.start()
            self.rpc = RpcServer(*known, listen)
            await self.rpc.start()
        except BaseException:
            await self.served.close()
            raise

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP app; Serve asks for it after the constructor."""
        return self.http

    async def check_health(self) -> None:
        """Serve asks this every few seconds and starts another replica when it raises.

        Ranks that die are not its business: they come back by themselves, and the requests with them. Engines that were
        given up do not; another replica begins with new ones.
        """
        if self.rpc.ended:
            raise RuntimeError("the gRPC server ended")
        dead = getattr(self.served.client, "dead", None)
        if dead:
            raise dead

    async def drain(self, seconds: float) -> int:
        """Refuses new requests from now on; returns when none is under way, or after ``seconds``: how many are."""
        told = asyncio.create_task(self.rpc.refuse())
        left = await self.intake.drain(seconds)
        await asyncio.wait([told], timeout=TELLING)
        return left

    async def model(self) -> ModelInfo:
        """What is served."""
        return self.served.info

    async def __del__(self) -> None:
        """Serve awaits this once, after its last HTTP call. A constructor that raised has closed what it opened."""
        if hasattr(self, "rpc"):
            await self.rpc.stop(CLOSING)
            self.http.state.service.apart.close()
            await self.measured.close()
            await self.served.close()


def serve_application(factory: str, options: Mapping[str, Any], listen: Listen, settings: Settings) -> Any:
    """The Serve application: one replica on the head node. factory: a Factory as ``module:function``."""
    from ray import serve

    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="service",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
        max_ongoing_requests=settings.most_calls + OTHERS,
        max_queued_requests=settings.most_calls,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=2 * CLOSING,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
    )
    return deployment.bind(factory, dict(options), listen, settings)
