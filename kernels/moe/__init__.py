"""Mixture of experts on one device: routing, the balance losses, and the grouped expert FFN."""

from shoal.kernels.moe.experts import grouped_ffn, swiglu_ffn
from shoal.kernels.moe.router import (
    Router,
    Routing,
    balance_loss,
    hash_route,
    load_fractions,
    route,
    sequence_counts,
    sequence_loss,
    shares_of,
)

__all__ = [
    "Router",
    "Routing",
    "balance_loss",
    "grouped_ffn",
    "hash_route",
    "load_fractions",
    "route",
    "sequence_counts",
    "sequence_loss",
    "shares_of",
    "swiglu_ffn",
]
