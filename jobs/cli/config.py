"""``shoal config``: show and check recipes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.jobs.cli.common import Output, OutputOption, RecipeArgument, SetOption, console, emit, grid

if TYPE_CHECKING:
    from shoal.jobs.estimate import Estimate
    from shoal.workers.config import Recipe

app = typer.Typer(
    help="Show and check recipes, with what they cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

GPU = 80 << 30  # bytes; of an H100


class RecipeFormat(StrEnum):
    """How ``shoal config show`` prints a recipe."""

    table = "table"
    json = "json"
    toml = "toml"


@app.command()
def show(
    recipe: RecipeArgument,
    sets: SetOption = None,
    output: Annotated[RecipeFormat, typer.Option("--output", "-o", help="toml prints the recipe alone.")] = (
        RecipeFormat.table
    ),
) -> None:
    """Print a recipe with its parameters, FLOPs a token and memory a rank; nothing is allocated.

    Examples:

    - `shoal config show deepseekmoe-16b`

    - `shoal config show nsa-27b --set train.sequence=65536 -o json`

    - `shoal config show tiny -o toml > mine.toml` begins a recipe of one's own
    """
    from shoal.jobs.estimate import estimate
    from shoal.jobs.recipe import load_recipe, recipe_to_toml

    found = load_recipe(recipe, sets or ())
    if output is RecipeFormat.toml:
        print(recipe_to_toml(found), end="", flush=True)
        return
    costs = estimate(found)
    emit(_as_data(found, costs), Output(output.value), lambda: _render(found, costs))


@app.command("list")
def list_(output: OutputOption = Output.table) -> None:
    """List the built-in recipes.

    Example: `shoal config list -o json`
    """
    from shoal.jobs.estimate import estimate
    from shoal.jobs.recipe import builtin_recipes, load_recipe

    found = [(recipe, estimate(recipe).parameters) for recipe in map(load_recipe, builtin_recipes())]

    def render() -> None:
        table = grid("recipe", "total", "active", "", right=(1, 2))
        for recipe, count in found:
            table.add_row(recipe.name, si(count.total), si(count.active), recipe.description)
        console().print(table)

    rows = [
        {"name": recipe.name, "total": count.total, "active": count.active, "description": recipe.description}
        for recipe, count in found
    ]
    emit(rows, output, render)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file, or a built-in recipe.")],
    sets: SetOption = None,
    output: OutputOption = Output.table,
) -> None:
    """Check a recipe; exit code 3 and one sentence if it is wrong.

    Example: `shoal config check mine.toml`
    """
    from shoal.jobs.recipe import load_recipe, recipe_hash

    found = load_recipe(file, sets or ())
    data = {"ok": True, "name": found.name, "file": file, "hash": recipe_hash(found)}
    emit(data, output, lambda: print(f"{file}: recipe {found.name} is valid"))


def si(value: float) -> str:
    """A count in three digits or four: 12.3k, 3.40M, 144.6B."""
    for power, letter in ((15, "P"), (12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**power:
            scaled = value / 10**power
            return f"{scaled:.{2 if scaled < 9.995 else 1}f}{letter}"
    return f"{value:.0f}"


def _as_data(recipe: Recipe, costs: Estimate) -> dict[str, Any]:
    p, f = costs.parameters, costs.flops
    parts = {key: value for key, value in vars(p).items() if key != "unused"}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "parameters": {"total": p.total, "active": p.active, **parts},
        "flops_per_token": {"forward": f.forward, "training": f.training, **vars(f)},
        "memory_per_rank": {kind: {"total": memory.total, **vars(memory)} for kind, memory in costs.memory.items()},
    }


def _render(recipe: Recipe, costs: Estimate) -> None:
    from shoal.jobs.memory import beyond, keys_that_fit
    from shoal.jobs.recipe import toml_value

    out = console()
    out.print(f"{recipe.name}  {recipe.description}", style="bold")
    keys = grid("table", "values")
    for name, values in recipe.model_dump().items():
        if isinstance(values, dict):
            keys.add_row(name, "  ".join(f"{key}={toml_value(value)}" for key, value in values.items()))
    out.print(keys)
    p, f = costs.parameters, costs.flops
    counts = grid("parameters", f"{si(p.total)} total", f"{si(p.active)} active", right=(1, 2))
    for part, count in vars(p).items():
        if count and part != "unused":
            used = count - (p.unused if part == "routed_experts" else 0)
            counts.add_row(part.replace("_", " "), si(count), si(used))
    out.print(counts)
    out.print(
        f"FLOPs a token   forward {si(f.forward)} (projections {si(f.projections)}, attention {si(f.attention)}, "
        f"compression {si(f.compression)}), training {si(f.training)}, at {recipe.train.sequence:,} tokens a sequence"
    )
    ranks = costs.memory.values()
    memory = grid("GiB a rank", *costs.memory, right=range(1, 1 + len(ranks)))
    memory.add_row("ranks", *(str(rank.ranks) for rank in ranks))
    for part in ("weights", "optimizer", "gradients", "activations", "slots", "total"):
        sizes = [getattr(rank, part) for rank in ranks]
        if part != "slots" or any(sizes):
            memory.add_row("at most" if part == "total" else part, *(f"{size / 2**30:.2f}" for size in sizes))
    out.print(memory)
    if recipe.parallel.device != "cpu" and beyond(costs.memory, GPU):
        fitting = keys_that_fit(recipe, lambda ranks: not beyond(ranks, GPU))
        remedy = f"with {fitting} it does" if fitting else "more ranks need less"
        out.print(f"a GPU of 80 GiB does not hold a rank; {remedy}", soft_wrap=True)
