"""What every benchmark writes, as JSON and as a table: rows with baselines, the machine, the software, the commit."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shoal
from shoal.workers.machine import cores

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
Document = dict[str, Any]
PACKAGES = ("torch", "triton", "ray")
_SHOWN = ("ms", "value", "unit", "baseline", "baseline_ms", "baseline_value", "ratio", "target")


def time_row(
    what: str, ms: float, baseline: str = "", baseline_ms: float | None = None, target: float | None = None, **more: Any
) -> Row:
    """A time in milliseconds. With a baseline, ratio = baseline_ms / ms: above 1 is faster than the baseline.

    target: the least ratio that is asked for. more: further facts of the row, kept as they are.
    """
    return _row(what, {"ms": ms}, "ms", baseline, baseline_ms, target, more)


def value_row(
    what: str,
    value: float,
    unit: str,
    baseline: str = "",
    baseline_value: float | None = None,
    target: float | None = None,
    **more: Any,
) -> Row:
    """A size: less is better, ratio = baseline_value / value. A rate has no baseline here: compare its time."""
    return _row(what, {"value": value, "unit": unit}, "value", baseline, baseline_value, target, more)


def _row(
    what: str, figure: Row, key: str, baseline: str, against: float | None, target: float | None, more: dict[str, Any]
) -> Row:
    row = {"what": what, **figure}
    if against is not None:
        row |= {"baseline": baseline, f"baseline_{key}": against, "ratio": against / figure[key]}
    if target is not None:
        row["target"] = target
    return row | more


def document(benchmark: str, rows: Sequence[Row], load: Sequence[float]) -> Document:
    """A benchmark's result. ``load``: load averages over one minute, before it ran (and after)."""
    commit, dirty = code_version()
    return {
        "benchmark": benchmark,
        "device": device(),
        "software": software(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(value, 2) for value in load],
        "rows": [_rounded(row) for row in rows],
    }


def write(result: Document, folder: Path) -> Path:
    """Writes ``folder/BENCHMARK.json`` at once: what was there stays until the new file is whole.

    Raises ValueError for figures that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
        part = Path(file.name)
        try:
            json.dump(result, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.close()
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def table(result: Document) -> Table:
    """The rows for people: figures, baselines, ratios, whether targets are met. What tells rows apart follows their
    names; what all of them share stands below."""
    from rich.text import Text

    from shoal.jobs.cli.common import grid

    out = grid(result["benchmark"], "measured", "baseline", "", "ratio", "target", right=(1, 3, 4))
    facts = [_facts(row) for row in result["rows"]]
    shared = dict(set.intersection(*(set(each.items()) for each in facts))) if len(facts) > 1 else {}
    for row, each in zip(result["rows"], facts, strict=True):
        baseline = _figure(row.get("baseline_ms"), "ms") or _figure(row.get("baseline_value"), row.get("unit", ""))
        measured = _figure(row.get("ms"), "ms") or _figure(row.get("value"), row.get("unit", ""))
        if not measured and "predicted_ms" in row:
            measured = f"predicted {_figure(row['predicted_ms'], 'ms')}"
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        own = _said({key: value for key, value in each.items() if key not in shared})
        name = f"{row['what']} ({own})" if own else str(row["what"])
        out.add_row(name, measured, row.get("baseline", ""), baseline, ratio, _verdict(row))
    if shared and facts:
        out.caption = Text(f"all: {_said({key: facts[0][key] for key in facts[0] if key in shared})}")
        out.caption_justify = "left"
    return out


def _facts(row: Row) -> dict[str, str | int]:
    """What was measured. Further figures of a row (fractions, bytes, predictions) are for the file."""
    figures = {key for key in row if "bytes" in key or key.startswith("predicted_")}
    return {k: v for k, v in row.items() if k not in (*_SHOWN, "what", *figures) and isinstance(v, str | int)}


def _said(facts: dict[str, str | int]) -> str:
    """Of what is true or false, the name of what is true."""
    return ", ".join(key if value is True else f"{key} {value}" for key, value in facts.items() if value is not False)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


def _verdict(row: Row) -> str:
    if "target" not in row:
        return ""
    if "ratio" not in row:
        return f"{row['target']:.3g}: not measured"
    return f"{row['target']:.3g}: {'met' if row['ratio'] >= row['target'] else 'MISSED'}"


def device() -> str:
    """The machine in words: its GPUs, or its processor; cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{_gpus() or _processor()}, {cores()} cores, {memory:.0f} GiB"


def _gpus() -> str:
    """``2 x NVIDIA H100 80GB HBM3``; empty without a GPU."""
    names = gpu_figures("name")
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def gpu_figures(what: str, gpus: str = "") -> list[str]:
    """What the driver says of each GPU, ``name`` or ``memory.used``, bytes in MiB; of some alone, as
    CUDA_VISIBLE_DEVICES names them. Nothing without a GPU. Needs no torch in this process."""
    if not shutil.which("nvidia-smi"):
        return []
    some = (f"--id={gpus}",) if gpus else ()
    return _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", *some).splitlines()


def gpu_kind() -> str:
    """What the first GPU is called for short: ``h100`` for an NVIDIA H100 80GB HBM3; empty without one."""
    found = re.search(r"\b[A-Z]+\d+\w*", _gpus().partition(" x ")[2])
    return found[0].lower() if found else ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {
        "shoal": shoal.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_version() -> tuple[str, bool]:
    """The commit of the code and whether files differ from it, results of benchmarks aside.

    ``SHOAL_COMMIT`` names it where the code lies without its history; otherwise ``unknown``.
    """
    root = Path(shoal.__file__).resolve().parents[1]
    if not _output("git", "-C", str(root), "ls-files", "shoal/__init__.py"):  # not ours, or no git at all
        return os.environ.get("SHOAL_COMMIT", "unknown"), False
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":(exclude)benchmarks")
    return _output("git", "-C", str(root), "rev-parse", "HEAD"), bool(changed)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: no clock here is better than that."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
