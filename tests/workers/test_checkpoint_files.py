"""Checkpoints as files: whatever happens to them is named, and what is damaged is never chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shoal.workers import checkpoint_files as files
from shoal.workers.checkpoint import Checkpointer
from shoal.workers.errors import InvalidInput, NotFound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 20 and 40."""
    return _two_checkpoints(tmp_path / "checkpoints")


def _two_checkpoints(folder: Path) -> Path:
    checkpointer = Checkpointer(folder, keep=3, group=None, rank=0, world=1)
    for step in (20, 40):
        checkpointer.save(step, {"w": torch.full((64,), float(step)), "n": torch.arange(8)}, {"step": step, "rng": [1]})
    checkpointer.wait()
    return folder


def _tensor_file(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def _edit_manifest(path: Path, edit: Callable[[dict], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _truncate(path: Path) -> str:
    file = _tensor_file(path)
    file.write_bytes(file.read_bytes()[:-1])
    return f"file {file.name}: {file.stat().st_size} bytes instead of {file.stat().st_size + 1}"


def _flip_a_byte(path: Path) -> str:
    file = _tensor_file(path)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return f"file {file.name}: hash differs"


def _lose_a_file(path: Path) -> str:
    file = _tensor_file(path)
    file.unlink()
    return f"file {file.name}: missing"


def _lose_the_state(path: Path) -> str:
    (path / "state.json").unlink()
    return "file state.json: missing"


def _lose_the_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "file manifest.json: missing"


def _cut_the_manifest(path: Path) -> str:
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])
    return "file manifest.json: Invalid JSON"


def _another_format(path: Path) -> str:
    _edit_manifest(path, lambda manifest: manifest.update(format=2))
    return "file manifest.json: format: Input should be 1"


def _point_outside(path: Path) -> str:
    outside = path.parent / "outside.safetensors"
    save_file({"w": torch.zeros(64)}, outside)
    entry = files.digest(outside).model_dump()
    _edit_manifest(path, lambda manifest: manifest["files"].update({"../outside.safetensors": entry}))
    return "'../outside.safetensors' is a path"


def _link_outside(path: Path) -> str:
    file = _tensor_file(path)
    file.rename(path.parent / "elsewhere.safetensors")
    file.symlink_to(path.parent / "elsewhere.safetensors")
    return f"file {file.name}: not a regular file"


def _slip_tensors_in(path: Path) -> str:
    save_file({"w": torch.zeros(64)}, path / "extra.safetensors")
    return "file extra.safetensors: not in the manifest"


def _copy_of_another_step(path: Path) -> str:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-20", path)
    return "file manifest.json: it is of step 20"


def _empty_folder(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "file manifest.json: missing"


def _spoil_the_state_and_vouch_for_it(path: Path) -> str:
    (path / "state.json").write_text('{"step": ')
    entry = files.digest(path / "state.json").model_dump()
    _edit_manifest(path, lambda manifest: manifest["files"].update({"state.json": entry}))
    return "state.json is not valid JSON"


DAMAGE = [
    _truncate,
    _flip_a_byte,
    _lose_a_file,
    _lose_the_state,
    _lose_the_manifest,
    _cut_the_manifest,
    _another_format,
    _point_outside,
    _link_outside,
    _slip_tensors_in,
    _copy_of_another_step,
    _empty_folder,
    _spoil_the_state_and_vouch_for_it,
]


def test_whole_checkpoints_are_listed_and_the_newest_is_chosen(folder: Path) -> None:
    listed = files.list_checkpoints(folder)
    assert [(info.step, info.path.name) for info in listed] == [(20, "step-20"), (40, "step-40")]
    assert listed[0].bytes == sum(f.stat().st_size for f in listed[0].path.iterdir() if f.name != "manifest.json")
    assert [files.verify(info.path) for info in listed] == [[], []]
    assert files.last_good(folder) == (listed[1], [])
    assert files.read_state(folder / "step-20") == {"step": 20, "rng": [1]}
    assert files.tensor_names(folder / "step-20") == ["n", "w"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_named_and_skipped(folder: Path, damage: Callable[[Path], str]) -> None:
    named = damage(folder / "step-40")
    assert any(named in problem for problem in files.verify(folder / "step-40")), files.verify(folder / "step-40")
    good, skipped = files.last_good(folder)
    assert good is not None
    assert good.step == 20
    (sentence,) = skipped
    assert sentence.startswith(f"checkpoint {folder / 'step-40'} is damaged (")
    assert sentence.endswith(": skipped, using step-20")
    assert named in sentence


# A flipped byte is found by its hash alone, which loading does not compute again.
@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in (_flip_a_byte, _spoil_the_state_and_vouch_for_it)])
def test_damage_is_not_loaded(folder: Path, damage: Callable[[Path], str]) -> None:
    named = damage(folder / "step-40")
    tensors = {"w": torch.full((64,), -1.0)}
    with pytest.raises(InvalidInput) as raised:
        Checkpointer(folder, 3, None, 0, 1).load(40, tensors)
    assert named in str(raised.value)
    assert (tensors["w"] == -1).all()


def test_nothing_good_is_said(folder: Path) -> None:
    for step in (20, 40):
        _flip_a_byte(folder / f"step-{step}")
    good, skipped = files.last_good(folder)
    assert good is None
    assert len(skipped) == 2
    assert all(sentence.endswith("skipped, and there is no older one that is whole") for sentence in skipped)


def test_garbage_beside_checkpoints_is_named(folder: Path) -> None:
    (folder / "step-last").mkdir()
    (folder / "step-60").write_text("a file")
    (folder / "notes").mkdir()
    good, skipped = files.last_good(folder)
    assert good is not None
    assert good.step == 40
    assert skipped == [
        f"{folder / name} is not a checkpoint (no folder named step-N): skipped, using step-40"
        for name in ("step-60", "step-last")
    ]


def test_no_folder_and_no_checkpoint(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path / "none") == []
    assert files.last_good(tmp_path / "none") == (None, [])
    with pytest.raises(NotFound, match=r"state\.json does not exist"):
        files.read_state(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flip_and_any_cut_is_found(folder: Path, data: st.DataObject) -> None:
    path = folder / "step-40"
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    # the manifest has words that vouch for nothing (its time): there, only a cut must be found
    if file.name == "manifest.json" or data.draw(st.booleans()):
        spoilt = content[:position]
    else:
        spoilt = (
            content[:position] + bytes([content[position] ^ data.draw(st.integers(1, 255))]) + content[position + 1 :]
        )
    file.write_bytes(spoilt)
    try:
        good, _ = files.last_good(folder)
        assert good is not None
        assert good.step == 20
    finally:
        file.write_bytes(content)


def test_last_ones_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2, group=None, rank=0, world=1)
    for step in (1, 2, 3, 10):
        checkpointer.save(step, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]


def test_a_damaged_later_one_costs_no_good_one_and_is_replaced(folder: Path) -> None:
    _flip_a_byte(folder / "step-40")
    checkpointer = Checkpointer(folder, keep=1, group=None, rank=0, world=1)
    checkpointer.save(30, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    good, _ = files.last_good(folder)
    assert good is not None
    assert good.step == 30
    checkpointer.save(40, {"w": torch.ones(3)}, {"again": True})
    checkpointer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["step-40"]
    assert files.verify(folder / "step-40") == []
    assert files.read_state(folder / "step-40") == {"again": True}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(folder: Path) -> None:
    (folder / ".step-60.tmp-0123abcd").mkdir()
    (folder / ".step-60.tmp-0123abcd" / "shard.safetensors").write_text("half")
    (folder / ".step-10.old-0123abcd").mkdir()
    (folder / "step-40").rename(folder / ".step-40.replaced-0123abcd")
    shutil.copytree(folder / "step-20", folder / ".step-20.replaced-0123abcd")
    with files.draft(folder, 80) as living:
        Checkpointer(folder, keep=3, group=None, rank=0, world=1)
        assert sorted(path.name for path in folder.iterdir()) == [living.name, "step-20", "step-40"]
    assert files.verify(folder / "step-40") == []


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InvalidInput, match=r"file/checkpoints cannot be written \(Not a directory\): .* choose another"
    ):
        Checkpointer(tmp_path / "file" / "checkpoints", keep=3, group=None, rank=0, world=1)
