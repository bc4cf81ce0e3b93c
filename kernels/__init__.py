"""Tensors in, tensors out: NSA and MoE, each with its oracle in plain PyTorch."""
