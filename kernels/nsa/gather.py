"""Selected attention that reads the chosen blocks only: what long documents need."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 22
"""Most elements of keys and values that are copied at a time."""


def gather_forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, position: int, block: int, out: Tensor, elements: int = ELEMENTS
) -> None:
    """Fill ``out`` with each row's attention over its own blocks, causal inside them.

    q: ``[KV, rows, G, Dqk]``, scaled. k, v: ``[KV, blocks * block, D]``, the document from its start. index:
    ``[KV, rows, n]`` int64, blocks of each row; those that begin after the row (also ``blocks`` itself) are ignored.
    position: of the first row in the document; the others follow. out: ``[KV, rows, G, Dv]``. elements: of keys and
    values that are copied at a time.
    """
    for head, rows in _chunks(index, block, k, v, elements):
        chosen = index[head, rows]
        p = _weights(q[head, rows], _read(k[head], chosen, block), chosen, position + rows.start, block)
        torch.bmm(p, _read(v[head], chosen, block), out=out[head, rows])


def gather_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_out: Tensor,
    d_q: Tensor,
    index: Tensor,
    position: int,
    block: int,
) -> None:
    """Add the gradients of :func:`gather_forward` to d_q, d_k, d_v (shapes of q, k, v), given d_out's."""
    for head, rows in _chunks(index, block, k, v):
        chosen, q_rows = index[head, rows], q[head, rows]
        keys, values = _read(k[head], chosen, block), _read(v[head], chosen, block)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        p = _weights(q_rows, keys, chosen, position + rows.start, block)
        sides = (keys, values, d_keys, d_values)
        attend_backward(p, q_rows, *sides, d_out[head, rows], d_q[head, rows])
        _add(d_k[head], chosen, d_keys, block)
        _add(d_v[head], chosen, d_values, block)


def attend_backward(
    p: Tensor, q: Tensor, k: Tensor, v: Tensor, d_k: Tensor, d_v: Tensor, d_out: Tensor, d_q: Tensor
) -> None:
    """Add the gradients of ``softmax(q kᵀ) v`` to d_q, d_k and d_v; all tensors are ``[batch, rows or keys, …]``.

    p: the weights. The softmax's own backward operation sums ``p · d_p`` from the very values it subtracts from: where
    one weight is nearly 1 that loses far less than ``Σ d_out · out`` would.
    """
    d_v.baddbmm_(p.transpose(1, 2), d_out)
    d_p = torch.bmm(d_out, v.transpose(1, 2))
    d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
    d_q.baddbmm_(d_scores, k)
    d_k.baddbmm_(d_scores.transpose(1, 2), q)


def _chunks(index: Tensor, block: int, k: Tensor, v: Tensor, elements: int = ELEMENTS) -> Iterator[tuple[int, slice]]:
    """KV heads, and within them rows few enough that the copies of their keys and values stay small."""
    heads, rows, n = index.shape
    step = max(1, elements // (n * block * (k.shape[-1] + v.shape[-1])))
    for head in range(heads):
        for start in range(0, rows, step):
            yield head, slice(start, min(start + step, rows))


def _weights(q: Tensor, keys: Tensor, chosen: Tensor, position: int, block: int) -> Tensor:
    """Attention weights ``[rows, G, n * block]`` of q ``[rows, G, D]`` on keys ``[rows, n * block, D]``."""
    scores = torch.bmm(q, keys.transpose(1, 2))
    at = (chosen[:, :, None] * block + torch.arange(block, device=q.device)).flatten(1)
    rows = torch.arange(position, position + q.shape[0], device=q.device)
    return torch.softmax(scores.masked_fill_((at > rows[:, None])[:, None], -torch.inf), -1)


def _read(x: Tensor, chosen: Tensor, block: int) -> Tensor:
    """Blocks of x ``[blocks * block, D]`` that ``chosen [rows, n]`` names: ``[rows, n * block, D]``."""
    by_block = x.view(-1, block * x.shape[-1])
    index = chosen.flatten().clamp(max=by_block.shape[0] - 1)
    return by_block.index_select(0, index).view(chosen.shape[0], -1, x.shape[-1])


def _add(x: Tensor, chosen: Tensor, values: Tensor, block: int) -> None:
    """Add ``values [rows, n * block, D]`` to the blocks of x that ``chosen`` names."""
    by_block = x.view(-1, block * x.shape[-1])
    index = chosen.flatten().clamp(max=by_block.shape[0] - 1)
    by_block.index_add_(0, index, values.view(index.numel(), -1))
