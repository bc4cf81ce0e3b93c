"""Rotary embedding: transformers' Llama as the reference, and the properties that attention relies on."""

import pytest
import torch

from shoal.kernels.rope import Yarn, rope_tables, rotate


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_rotate_is_llamas(dim: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # seconds, for whoever runs other files

    x = torch.randn(11, 3, dim, dtype=torch.float64)
    cos, sin = rope_tables(torch.arange(11) + 5, dim, 10000.0, torch.float64)
    theirs, _ = apply_rotary_pos_emb(x, x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    torch.testing.assert_close(rotate(x, cos, sin), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "base", "factor", "original"),
    [(128, 10000.0, 8.0, 8192), (64, 500000.0, 4.0, 2048), (16, 10000.0, 40.0, 64), (8, 100.0, 1.0, 512)],
)
def test_yarn_is_transformers(dim: int, base: float, factor: float, original: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=int(factor * original),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": original,
        },
    )
    rates, temperature = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    yarn = Yarn(factor, original)
    assert yarn.temperature == pytest.approx(temperature)
    positions = torch.tensor([0, 1, 7, original, int(factor * original) - 1])
    cos, sin = rope_tables(positions, dim, base, torch.float64, yarn)
    angles = positions[:, None].double() * rates.double()
    bound = 1e-6 * positions[:, None] + 1e-9  # their rates are float32
    assert ((cos - temperature * angles.cos()).abs() <= bound).all()
    assert ((sin - temperature * angles.sin()).abs() <= bound).all()


def test_yarn_keeps_fast_pairs_and_slows_the_others() -> None:
    """At a base of 10000 and 8192 tokens: pair 0 turns 1304 times and is kept, the last turns 0.15 times."""
    plain = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    scaled = Yarn(8.0, 8192).rates(plain, 10000.0)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 40], plain[turns > 40])
    torch.testing.assert_close(scaled[turns < 0.8], plain[turns < 0.8] / 8)
    assert (scaled.diff() < 0).all()


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)

    def score(m: int, n: int) -> torch.Tensor:
        rotated = (rotate(x, *rope_tables(torch.tensor([p]), 16, 500.0, torch.float64)) for x, p in ((q, m), (k, n)))
        a, b = rotated
        return (a * b).sum()

    torch.testing.assert_close(score(7, 3), score(70007, 70003), rtol=1e-9, atol=1e-9)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_float32_tables_hold_at_long_positions() -> None:
    positions = torch.tensor([0, 65535, 1_000_000])
    exact = rope_tables(positions, 64, 10000.0, torch.float64)
    for table, want in zip(rope_tables(positions, 64, 10000.0), exact, strict=True):
        assert table.dtype == torch.float32
        assert table.shape == (3, 32)
        torch.testing.assert_close(table.double(), want, rtol=0, atol=1e-7)


def test_bfloat16_is_rotated_in_float32_and_no_tokens_pass() -> None:
    x = torch.randn(9, 2, 8).bfloat16()
    cos, sin = rope_tables(torch.arange(9), 8, 10000.0)
    got = rotate(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), cos, sin).bfloat16())
    none = rope_tables(torch.zeros(0, dtype=torch.int64), 8, 10000.0)
    assert rotate(x[:0], *none).shape == (0, 2, 8)
