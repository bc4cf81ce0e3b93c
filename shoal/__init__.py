"""Shoal: DeepSeekMoE language models with Native Sparse Attention, trained and served as one Ray application."""

__version__ = "0.1.0"
