"""transformers' continuous batching as a benchmark has it: the same shape, steps in common, and what it may refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.jobs.bench import engine, engine_peer
from shoal.jobs.bench.engine_peer import Decoded, PeerError, decode_steps
from shoal.jobs.estimate import estimate

TINY = engine.recipe_of(engine.SCALES["cpu"][0], "full")


@pytest.mark.parametrize("scale", [engine.SCALES["cpu"][0], engine.SCALES["cuda"][1]], ids=lambda scale: scale.recipe)
def test_the_model_has_the_shape_of_the_recipe(scale: engine.Scale) -> None:
    """As many parameters as ours with full attention, and beyond them the gates of shared experts."""
    pytest.importorskip("transformers")
    recipe = engine.recipe_of(scale, "full")
    model, _ = engine_peer._model(recipe, "meta")
    gates = (recipe.model.layers - recipe.model.dense_layers) * recipe.model.hidden
    assert sum(each.numel() for each in model.parameters()) == estimate(recipe).parameters.total + gates


def test_steps_are_measured_while_all_sequences_generate() -> None:
    """The second one starts two steps later; the first step that both take part in is not counted."""
    first = [0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 9.0]
    second = [2.0, 3.0, 5.0, 6.0, 9.0, 10.0, 11.0]
    assert engine_peer._median_ms([first, second], warm=1) == 2000  # of 2, 1 and 3 s


@pytest.mark.parametrize("second", [[3.0, 4.0], [1.0, 3.0]], ids=["one after the other", "not in each step"])
def test_sequences_that_do_not_share_their_steps_are_no_measurement(second: list[float]) -> None:
    with pytest.raises(PeerError, match="2 sequences did not generate at one time"):
        engine_peer._median_ms([[0.0, 1.0, 1.5, 2.0, 2.5], second], warm=0)


def test_where_it_refuses_it_says_so_and_keeps_what_was_measured() -> None:
    """There are more sequences than tokens that could tell them apart."""
    pytest.importorskip("transformers")
    said: list[str] = []
    (measured,) = decode_steps(TINY, "cpu", 256, (1, TINY.model.vocab + 1, 2), 2, 1, said.append)
    assert isinstance(measured, Decoded)
    assert measured.at_once == 1
    assert measured.ms > 0
    assert "sdpa" in measured.attention or "flash" in measured.attention
    assert said[1:] == [
        "transformers' continuous batching, 256 tokens: 2049 at once: Sample larger than population or is negative"
    ]


def test_without_transformers_a_sentence_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('it is not here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    said: list[str] = []
    assert decode_steps(TINY, "cpu", 256, (1,), 2, 1, said.append) == []
    assert said == [
        "transformers' continuous batching, 256 tokens: transformers with its mixture of experts cannot be imported "
        "(it is not here)"
    ]


def test_it_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_peer, "PATIENCE", 0.1)
    said: list[str] = []
    assert decode_steps(TINY, "cpu", 256, (1,), 2, 1, said.append) == []
    assert said == ["transformers' continuous batching, 256 tokens: not done after 0 s"]
