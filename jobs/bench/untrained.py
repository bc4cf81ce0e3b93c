"""A run that was never trained, to measure its server.

``python -m shoal.jobs.bench.untrained NAME RECIPE [KEY=VALUE…]`` makes ``runs/NAME`` (``SHOAL_RUNS`` names another
folder than ``runs``): the recipe with its changes, the tokenizer of its corpus, and a checkpoint of step 1 that holds
random weights. They are drawn on a GPU where there is one, and are bfloat16 then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.jobs.run_folder import RunFolder, new_run, write_identity
from shoal.workers.errors import ShoalError

STEP = 1


def make(name: str, recipe: str, sets: Sequence[str], runs: Path, data: Path = Path("data")) -> RunFolder:
    """The run's folder, once it is whole. Raises ShoalError, as for a wrong recipe, or a name that is taken."""
    import torch

    from shoal.jobs.data.corpus import ensure_corpus
    from shoal.jobs.recipe import load_recipe
    from shoal.workers.checkpoint import Checkpointer
    from shoal.workers.model import Transformer
    from shoal.workers.weights import weights_of

    alone = {"parallel.ranks": 1, "parallel.placement": "colocated", "parallel.expert": 0, "parallel.context": 1}
    checked = load_recipe(recipe, sets, {**alone, "train.batch": 1, "train.accumulate": 1})
    corpus = ensure_corpus(checked.data.corpus, checked.model.vocab, data)
    folder = new_run(runs, name, checked)
    write_identity(folder, checked, corpus, "")
    model = Transformer(checked, device="cuda" if torch.cuda.is_available() else "cpu")
    checkpointer = Checkpointer(folder.path / "checkpoints", 1, None, 0, 1)
    dtype = str(model.dtype).removeprefix("torch.")
    checkpointer.save(STEP, weights_of(model), {"step": STEP, "seed": checked.train.seed, "dtype": dtype})
    checkpointer.wait()
    return folder


def main(name: str, recipe: str, *sets: str) -> None:
    """Makes the run and says where it is."""
    try:
        folder = make(name, recipe, sets, Path(os.environ.get("SHOAL_RUNS", "runs")))
    except ShoalError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(folder.path)


if __name__ == "__main__":
    main(*sys.argv[1:])
