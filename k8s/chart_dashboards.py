"""Writes the Grafana dashboards in chart/dashboards from the tables below.

python k8s/chart_dashboards.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "chart" / "dashboards"
COLUMNS, WIDTH, HEIGHT = 2, 12, 8  # of the grid, which is 24 wide


@dataclass(frozen=True)
class Panel:
    """A chart. unit: as Grafana calls it. queries: legend and PromQL; ``T{…}`` stands for ray_shoal_train_, ``S{…}``
    for ray_shoal_serve_, ``M{…}`` for ray_shoal_, each with the run or the model that is looked at."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""
    stacked: bool = False


def quantiles(name: str) -> dict[str, str]:
    """Median, 95th and 99th percentile of a duration."""
    buckets = f"sum by (model, le) (rate(S:{name}_bucket[$__rate_interval]))"
    return {
        f"{{{{model}}}} {label}": f"histogram_quantile({q}, {buckets})"
        for label, q in (("median", 0.5), ("95%", 0.95), ("99%", 0.99))
    }


def per_second(name: str, by: str = "model") -> str:
    """Growth of a total of serving, 0 where nothing was counted yet."""
    nothing = f" or max by ({by}) (S:capacity) * 0" if by == "model" else ""
    return f"sum by ({by}) (rate(S:{name}_total[$__rate_interval])){nothing}"


TRAINING = (
    Panel("Loss", "none", {"{{run}}": "max by (run) (T:loss)", "{{run}} balance": "max by (run) (T:balance_loss)"}),
    Panel("Validation", "none", {"{{run}}": "max by (run) (M:eval_bits_per_byte)"}, "Bits per byte of text."),
    Panel("Tokens per second", "none", {"{{run}}": "max by (run) (T:tokens_per_second)"}),
    Panel(
        "Model FLOPs utilisation", "percentunit", {"{{run}}": "max by (run) (T:mfu)"},
        "FLOPs of the model, by the recipe's sizes, over what all devices could do: their maker's figure in 16 bits, "
        "or a measured product of matrices.",
    ),
    Panel("Progress", "percentunit", {"{{run}}": "max by (run) (T:step) / max by (run) (T:steps)"}, "Steps done."),
    Panel(
        "Time of a step, by part", "s", {"{{run}} {{part}}": "max by (run, part) (T:part_seconds)"},
        "Of rank 0; on a GPU, of its stream.", stacked=True,
    ),
    Panel(
        "Dispatch", "s",
        {
            "{{run}} waiting": "max by (run) (T:dispatch_seconds)",
            "{{run}} step": "max by (run) (T:step_seconds)",
        },
        "Time for which rank 0 waited for rows on their way to experts or back. It lies within forward and backward.",
    ),
    Panel(
        "Share of a step spent waiting for dispatch", "percentunit",
        {"{{run}}": "max by (run) (T:dispatch_seconds) / max by (run) (T:step_seconds)"},
    ),
    Panel(
        "Load of experts, by layer", "none",
        {
            "{{run}} layer {{layer}} busiest": "max by (run, layer) (M:expert_max_load)",
            "{{run}} layer {{layer}} idlest": "min by (run, layer) (M:expert_load)",
        },
        "As a multiple of a fair share of tokens. Where there are many experts the idlest are of some layers.",
    ),
    Panel(
        "Entropy of the load, by layer", "percentunit",
        {"{{run}} layer {{layer}}": "max by (run, layer) (M:expert_entropy)"},
        "Over a layer's experts, as a share of its maximum: 100% is even.",
    ),
    Panel(
        "Load of devices, by layer", "none",
        {"{{run}} layer {{layer}} busiest": "max by (run, layer) (M:layer_device_load)"},
        "As a multiple of a fair share of tokens.",
    ),
    Panel("Imbalance of experts", "none", {"{{run}}": "max by (run) (M:expert_imbalance)"}, "Busiest, mean of layers."),
    Panel(
        "Load of devices", "none", {"{{run}} place {{device}}": "max by (run, device) (M:device_load)"},
        "Tokens for the experts of each place in the dispatch group, as a multiple of a fair share.",
    ),
    Panel(
        "Gates of the branches", "percentunit", {"{{run}} {{branch}}": "avg by (run, branch) (M:gate)"},
        "Mean over layers, heads and tokens.",
    ),
    Panel(
        "Gate of the selected branch, by layer", "percentunit",
        {"{{run}} layer {{layer}}": "max by (run, layer) (M:gate{branch=\"selected\"})"},
    ),
    Panel(
        "Coverage of other ranks' pages, by layer", "percentunit",
        {"{{run}} layer {{layer}}": "max by (run, layer) (M:context_coverage)"},
        "Where ranks share sequences: pages of keys that a rank's queries chose, of all that they might read.",
    ),
    Panel(
        "Bytes of selected keys that a rank receives in a step", "bytes",
        {"{{run}} {{fetch}}": "sum by (run, fetch) (M:context_bytes)"},
        "Where ranks share sequences: of all layers, with gradients, by gathering what may be chosen and by pulling "
        "what was.",
    ),
    Panel("Norm of the gradient", "none", {"{{run}}": "max by (run) (T:grad_norm)"}, "Before clipping."),
    Panel("Learning rate", "none", {"{{run}}": "max by (run) (T:learning_rate)"}),
    Panel(
        "Failures recovered from", "none",
        {"{{run}}": "sum by (run) (M:failures_total) or max by (run) (T:step) * 0"}, "Since the job began.",
    ),
    Panel("Processors of the nodes", "percent", {"{{instance}}": "max by (instance) (ray_node_cpu_utilization)"}),
    Panel("Memory of the nodes", "bytes", {"{{instance}}": "max by (instance) (ray_node_mem_used)"}),
)  # fmt: skip

SERVING = (
    Panel("Time to the first token", "s", quantiles("ttft_seconds")),
    Panel("Time per token after it", "s", quantiles("tpot_seconds")),
    Panel("Time of a whole answer", "s", quantiles("request_seconds")),
    Panel(
        "Requests", "none",
        {
            "{{model}} waiting": "sum by (model) (S:waiting)",
            "{{model}} running": "sum by (model) (S:running)",
            "{{model}} room for": "sum by (model) (S:capacity)",
        },
        "Room for 0: the engines are gone.",
    ),
    Panel("Requests that ended", "reqps", {"{{model}} {{finish}}": per_second("requests", "model, finish")}),
    Panel(
        "Tokens per second", "none",
        {"{{model}} generated": per_second("generated_tokens"), "{{model}} prompts": per_second("prompt_tokens")},
    ),
    Panel(
        "Pages of the cache", "none",
        {
            "{{model}} held": "sum by (model) (S:pages_used)",
            "{{model}} kept for prefixes": "sum by (model) (S:pages_cached)",
            "{{model}} all": "sum by (model) (S:pages)",
        },
    ),
    Panel(
        "Prefix hits", "percentunit",
        {
            "{{model}}": f"({per_second('cached_tokens')}) / "
            f"(({per_second('cached_tokens')}) + ({per_second('prompt_tokens')}))"
        },
        "Share of prompt tokens that the cache had.",
    ),
    Panel(
        "Batch", "none",
        {
            "{{model}} tokens a step": "avg by (model) (S:step_tokens)",
            "{{model}} requests a step": "avg by (model) (S:step_sequences)",
        },
        "Of a rank, mean of the last seconds.",
    ),
    Panel(
        "Time of a step", "s",
        {"{{model}}": f"({per_second('step_seconds')}) / ({per_second('steps')})"},
    ),
    Panel(
        "Guesses that came true", "percentunit",
        {"{{model}}": f"({per_second('accepted_tokens')}) / clamp_min({per_second('proposed_tokens')}, 1e-9)"},
        "Of tokens guessed (serve.speculate).",
    ),
    Panel(
        "Load of experts, by layer", "none",
        {
            "{{model}} layer {{layer}} busiest": "max by (model, layer) (S:expert_max_load)",
            "{{model}} layer {{layer}} idlest": "min by (model, layer) (S:expert_load)",
            "{{model}} busiest rank": "max by (model) (S:rank_load)",
        },
        "As a multiple of a fair share of tokens; of ranks where copies follow the load (serve.expert_copies), else 0. "
        "Where there are many experts the idlest are of some layers.",
    ),
    Panel("Preemptions per second", "none", {"{{model}}": per_second("preemptions")}),
    Panel(
        "Starts of all ranks after a failure", "none",
        {"{{model}}": "sum by (model) (S:restarts_total) or max by (model) (S:capacity) * 0"},
    ),
)  # fmt: skip


def expression(text: str, label: str) -> str:
    """PromQL: the short names written out, each with the selection of ``label``."""
    chosen = f'{label}=~"${label}"'
    for short, long in (("T:", "ray_shoal_train_"), ("S:", "ray_shoal_serve_"), ("M:", "ray_shoal_")):
        parts = text.split(short)
        out = parts[0]
        for part in parts[1:]:
            end = next((i for i, c in enumerate(part) if not (c.isalnum() or c == "_")), len(part))
            name, rest = part[:end], part[end:]
            inside, rest = rest[1:].split("}", 1) if rest.startswith("{") else ("", rest)
            out += f"{long}{name}{{{', '.join(filter(None, (chosen, inside)))}}}{rest}"
        text = out
    return text


def dashboard(title: str, uid: str, label: str, known_by: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """A dashboard as Grafana imports it. label: that the series are told apart by; known_by: a metric that has it."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["shoal"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": label, "type": "query", "datasource": source, "query": f"label_values({known_by}, {label})",
                    "refresh": 2, "multi": True, "includeAll": True, "allValue": ".+", "current": {"value": "$__all"},
                },
            ]
        },
        "panels": [
            {
                "id": i + 1,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.text,
                "datasource": source,
                "gridPos": {"x": i % COLUMNS * WIDTH, "y": i // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
                "fieldConfig": {
                    "defaults": {
                        "unit": panel.unit,
                        "custom": {
                            "stacking": {"mode": "normal" if panel.stacked else "none"},
                            "fillOpacity": 30 if panel.stacked else 0,
                        },
                    },
                    "overrides": [],
                },
                "targets": [
                    {"refId": chr(ord("A") + n), "datasource": source, "legendFormat": legend,
                     "expr": expression(query, label)}
                    for n, (legend, query) in enumerate(panel.queries.items())
                ],
            }
            for i, panel in enumerate(panels)
        ],
    }  # fmt: skip


def dashboards() -> dict[str, str]:
    """The text of each file."""
    made = {
        "training.json": dashboard("Shoal: training", "shoal-training", "run", "ray_shoal_train_step", TRAINING),
        "serving.json": dashboard("Shoal: serving", "shoal-serving", "model", "ray_shoal_serve_capacity", SERVING),
    }
    return {name: json.dumps(each, indent=1) + "\n" for name, each in made.items()}


if __name__ == "__main__":
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
