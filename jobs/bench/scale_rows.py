"""Rows of ``shoal bench scale``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.jobs.bench.result import Row, time_row

if TYPE_CHECKING:
    from shoal.jobs.bench.scale_cases import Case, Facts, Line, Series
    from shoal.jobs.bench.scale_model import Curve, Link

SHARE = "a rank's share, as one rank alone does it"
PEAK = "the same FLOPs at the device's peak"
KEPT = (
    "bytes", "bytes_of_rows", "activation_bytes", "steps", "data_ms", "forward_ms", "backward_ms", "reduce_ms",
    "update_ms", "device_load", "device_loads", "settling", "rows_put", "losses", "ttft_ms", "tpot_ms", "failed",
    "date",
)  # fmt: skip
"""Facts of a case that stand in its row as they are."""


def scale_row(
    series: Series, line: Line, case: Case, facts: Facts | None, curve: Curve, one: Facts, link: Link, *, fitted: bool
) -> Row:
    """A row of one case, measured or not."""
    plan, ideal = series.plan(case, curve, one), series.ideal(case, line.mode, curve, one)
    seconds = plan.seconds(link)
    target = line.targets.get(case.ranks)
    alone = case.tokens in curve.measured or (line.mode == "weak" and series.flat)
    more: Row = {
        **about(series, line, case, fitted=fitted, measured=facts is not None),
        "one_rank": "measured" if alone else "by its curve",
        "predicted_ms": 1e3 * seconds,
        "predicted_tokens_per_second": case.tokens / seconds,
        "predicted_efficiency": ideal / seconds,
        "predicted_bytes": plan.bytes,
        "predicted_exposed_share": 1 - plan.compute / seconds,
    }
    if facts is None:
        return {"what": line.what, **({"target": target} if target else {}), **more}
    ms = float(facts["ms"])
    more |= {"efficiency": 1e3 * ideal / ms, "exposed_share": max(0.0, 1 - 1e3 * plan.compute / ms)}
    return time_row(line.what, ms, SHARE, 1e3 * ideal, target, **more, **figures(series, case, facts))


def lone_row(series: Series, line: Line, case: Case, facts: Facts) -> Row:
    """A row of a case whose series has no time of one rank to compare it with."""
    mine = about(series, line, case, fitted=False, measured=True)
    return {"what": line.what, "ms": float(facts["ms"]), **mine, **figures(series, case, facts)}


def about(series: Series, line: Line, case: Case, *, fitted: bool, measured: bool) -> Row:
    """What a case is."""
    return {
        "part": series.part,
        "mode": line.mode,
        "ranks": case.ranks,
        "fitted": fitted,
        "measured": measured,
        "tokens": case.tokens,
        "flops_per_token": series.flops(case) / case.tokens,
    }


def figures(series: Series, case: Case, facts: Facts) -> Row:
    """What was measured and does not depend on other cases."""
    ms, flops = float(facts["ms"]), series.flops(case)
    return {
        "tokens_per_second": case.tokens / ms * 1e3,
        "mfu": flops / (ms / 1e3 * case.ranks * facts["peak_flops"]) if facts["peak_flops"] else None,
        "dispatch_share": facts.get("dispatch_share"),
        "peak_bytes": int(facts["peak_bytes"]) or None,  # none is measured on a CPU
        **{key: facts[key] for key in KEPT if key in facts},
    }


def utilised_row(series: Series, line: Line, case: Case, facts: Facts) -> Row:
    """A row whose ratio is the share of the peak's FLOPs."""
    least = 1e3 * series.flops(case) / (case.ranks * facts["peak_flops"])
    mine: Row = {"part": series.part, "ranks": case.ranks, "measured": True, "tokens": case.tokens}
    mine |= {"date": facts["date"]} if "date" in facts else {}
    return time_row(f"{line.what}, utilisation", float(facts["ms"]), PEAK, least, line.utilisation, **mine)
