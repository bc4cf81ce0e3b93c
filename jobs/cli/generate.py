"""``shoal generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.jobs.cli.common import RUNS_DIR, Output, OutputOption, RunsDirOption, emit


def generate(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint; default: the newest whole one.")] = None,
    runs_dir: RunsDirOption = RUNS_DIR,
    output: OutputOption = Output.table,
) -> None:
    """Continue a text with a trained model.

    Examples:

      shoal generate tiny --prompt "class "

      shoal generate runs/tiny --prompt "def main" --temperature 0 -o json
    """
    from shoal.jobs.data.prepare import corpus_tokenizer
    from shoal.jobs.load import choose_step, find_run, load_trained

    folder = find_run(run, runs_dir)
    chosen, damaged = choose_step(folder, step)
    for sentence in damaged:
        typer.echo(sentence, err=True)
    trained = load_trained(folder, chosen)
    tokenizer = corpus_tokenizer(trained.corpus)
    ids = [int(t) for t in tokenizer.encode([prompt])[0][:-1]]

    from shoal.workers.sample import sample

    new = sample(
        trained.model,
        ids,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tokenizer.eos,
    )
    text = tokenizer.decode(new)
    facts = {"run": str(folder.path), "step": chosen, "prompt": prompt, "text": text, "tokens": len(new)}
    emit(facts, output, lambda: typer.echo(prompt + text))
