"""Learning rates, as shares of the peak: DeepSeekMoE's steps, cosine, and warm-up-stable-decay."""

from __future__ import annotations

import math

from shoal.workers.config import TrainTable

STEP_FACTOR = 0.316  # DeepSeekMoE section 4.1.2: at 80% and again at 90% of the steps
STEP_MARKS = (0.8, 0.9)


def learning_rate(step: int, table: TrainTable) -> float:
    """The rate of step ``step``, counted from 1."""
    peak, done = table.learning_rate, (step - 1) / table.steps
    if step <= table.warmup:
        return peak * step / table.warmup
    if table.schedule == "step":
        return peak * STEP_FACTOR ** sum(done >= mark for mark in STEP_MARKS)
    if table.schedule == "cosine":
        span = max(1, table.steps - table.warmup)
        share = (step - table.warmup) / span
        return peak * (table.final_lr + (1 - table.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))
    if done < table.decay_from:
        return peak
    share = (step - table.decay_from * table.steps) / max(1.0, (1 - table.decay_from) * table.steps)
    return peak * (1 - (1 - table.final_lr) * min(1.0, share))
