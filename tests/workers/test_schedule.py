"""Learning-rate schedules against the papers' words."""

import pytest

from shoal.workers.config import TrainTable
from shoal.workers.schedule import learning_rate


def table(**changes: object) -> TrainTable:
    values = {"steps": 1000, "batch": 1, "sequence": 2, "learning_rate": 1e-3, "warmup": 100} | changes
    return TrainTable.model_validate(values)


def test_step_decay_is_deepseekmoes() -> None:
    """Warm-up, then the peak, times 0.316 at 80% and again at 90% of the steps."""
    t = table()
    rates = [learning_rate(s, t) for s in range(1, 1001)]
    assert rates[0] == pytest.approx(1e-5) and rates[49] == pytest.approx(5e-4)
    assert rates[99:800] == [1e-3] * 701
    assert rates[800:900] == [pytest.approx(3.16e-4)] * 100
    assert rates[900:] == [pytest.approx(3.16e-4 * 0.316)] * 100


def test_cosine_ends_at_its_final_rate() -> None:
    t = table(schedule="cosine", final_lr=0.1)
    assert learning_rate(100, t) == pytest.approx(1e-3)
    assert learning_rate(550, t) == pytest.approx(1e-3 * 0.55)
    assert learning_rate(1000, t) == pytest.approx(1e-4)
    rates = [learning_rate(s, t) for s in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_holds_and_then_falls_linearly() -> None:
    t = table(schedule="wsd", decay_from=0.8, final_lr=0.0)
    assert {learning_rate(s, t) for s in range(100, 801)} == {1e-3}
    assert learning_rate(900, t) == pytest.approx(5e-4)
    assert learning_rate(1000, t) == pytest.approx(0.0)


def test_no_decay_phase_means_a_constant_rate() -> None:
    assert {learning_rate(s, table(schedule="wsd", final_lr=1.0)) for s in range(100, 1001)} == {1e-3}
