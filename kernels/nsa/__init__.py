"""Native Sparse Attention: three branches over compressed, selected and recent keys, on packed documents."""

from shoal.kernels.nsa.attention import nsa_attention
from shoal.kernels.nsa.compress import compress, compress_mean
from shoal.kernels.nsa.layout import BlockSizes, Layout, make_layout

__all__ = ["BlockSizes", "Layout", "compress", "compress_mean", "make_layout", "nsa_attention"]
