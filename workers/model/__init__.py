"""The transformer of one rank: attention shards, expert shards, and the layers that join them."""

from shoal.workers.model.transformer import StepContext, Transformer

__all__ = ["StepContext", "Transformer"]
