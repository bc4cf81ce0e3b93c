"""What a run left behind, in a form that two runs can be compared by; and ways to spoil it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from shoal.workers.model import Transformer

STEP = 7  # of the checkpoints that write_weights makes
TIMES = ("time", "tokens_per_second", "mfu")  # with …_seconds, the only figures that differ between two equal runs
Records = list[dict[str, Any]]


def records(run: Path, kind: str = "train") -> Records:
    """The records of one kind in metrics.jsonl, in order, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = lambda key: key in TIMES or key.endswith("_seconds")  # noqa: E731
    return [{k: v for k, v in line.items() if not timed(k)} for line in lines if line["kind"] == kind]


def events(run: Path) -> list[str]:
    """The names of what happened, in order."""
    return [record["event"] for record in records(run, "event")]


def tensors(run: Path, step: int) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, by name."""
    out: dict[str, np.ndarray] = {}
    for file in sorted((run / "checkpoints" / f"step-{step}").glob("*.safetensors")):
        part = load_file(file)
        assert not out.keys() & part.keys()
        out |= part
    return out


def state(run: Path, step: int) -> dict[str, Any]:
    """state.json of a checkpoint: the data position, the seed."""
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{step}" / "state.json").read_text())
    return found


def assert_same_bits(run: Path, reference: Path, step: int) -> None:
    """The same steps once each, in order, with the same figures; the same weights, optimizer and data position."""
    assert [r["step"] for r in records(run)] == list(range(1, step + 1))
    for kind in ("train", "eval", "load", "gates", "coverage"):
        assert records(run, kind) == records(reference, kind)
    assert state(run, step) == state(reference, step)
    mine, theirs = tensors(run, step), tensors(reference, step)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optim.") for name in mine)
    for name, tensor in mine.items():
        assert tensor.tobytes() == theirs[name].tobytes(), name


def write_weights(model: Transformer, folder: Path, **more: Any) -> None:
    """A checkpoint of step STEP, with a model's weights alone, as one rank writes it. more: of its state."""
    from shoal.workers.checkpoint import Checkpointer
    from shoal.workers.weights import weights_of

    writer = Checkpointer(folder, 1, None, 0, 1)
    writer.save(STEP, weights_of(model), {"step": STEP, "dtype": "float32", **more})
    writer.wait()


def poison(run: Path, step: int, part_of_name: str) -> str:
    """Puts a NaN into a weight of a checkpoint whose hashes hold afterwards; returns the weight's name."""
    folder = run / "checkpoints" / f"step-{step}"
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        for name in sorted(held):
            if name.startswith("model.") and part_of_name in name:
                held[name] = held[name].copy()
                held[name].flat[0] = np.nan
                save_file(held, file)
                manifest = json.loads((folder / "manifest.json").read_text())
                data = file.read_bytes()
                manifest["files"][file.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                (folder / "manifest.json").write_text(json.dumps(manifest))
                return name
    raise AssertionError(part_of_name)


def flip_a_byte(run: Path, step: int) -> Path:
    """Damages the last byte of a tensor file of a checkpoint; returns the file."""
    file = sorted((run / "checkpoints" / f"step-{step}").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file
