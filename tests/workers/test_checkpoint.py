"""Saving and loading over real ranks: any number of ranks, any ownership, the same bits; failures are survived."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor

from shoal.workers import checkpoint_files as files
from shoal.workers.checkpoint import Checkpointer
from shoal.workers.errors import InvalidInput, NotFound, ShoalError

EXPERTS = 6
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int64)
STATE = {"step": 7, "data": {"epoch": 1, "row": 12}, "rng": [1, 2, 3], "loss": 0.1}


def _tensor(name: str) -> Tensor:
    """The value that belongs to a name: random bits, so NaNs, infinities and denormals too."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    dtype = DTYPES[len(name) % len(DTYPES)]
    shape = (3, 5, 8)[: 1 + len(name) % 3]
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def _names(rank: int, world: int) -> list[str]:
    """Replicated weights on all ranks but a last one of four, which owns nothing; experts dealt out in turns."""
    if (rank, world) == (3, 4):
        return []
    dealt_to = min(world, 3)
    owned = ["model.embed", "model.layers.0.attention.q", "model.layers.0.norm.weight_"]
    owned += [f"model.layers.0.moe.experts.{e}.gate_up{'_' * e}" for e in range(rank, EXPERTS, dealt_to)]
    return [prefix + name for name in owned for prefix in ("", "optim.exp_avg.", "optim.master.")]


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _checkpointer(folder: Path, rank: int, world: int, **options: Any) -> Checkpointer:
    group = dist.new_group(backend="gloo") if world > 1 else None
    return Checkpointer(folder, options.pop("keep", 3), group, rank, world, **options)


def _save(rank: int, world: int, folder: Path, file_bytes: int) -> None:
    checkpointer = _checkpointer(folder, rank, world, file_bytes=file_bytes)
    tensors = {name: _tensor(name) for name in _names(rank, world)}
    checkpointer.save(7, tensors, STATE)
    # training goes on at once: it changes the tensors, and its collectives do not meet the checkpoint's
    for tensor in tensors.values():
        tensor.zero_()
    for turn in range(50):
        total = torch.tensor([rank + turn])
        dist.all_reduce(total)
        assert int(total) == sum(range(world)) + turn * world
    checkpointer.wait()


def _load(rank: int, world: int, folder: Path) -> int:
    tensors = {name: torch.zeros_like(_tensor(name)) for name in _names(rank, world)}
    assert _checkpointer(folder, rank, world).load(7, tensors) == STATE
    for name, tensor in tensors.items():
        assert _bits(tensor) == _bits(_tensor(name)), name
    return len(tensors)


@pytest.mark.parametrize(
    ("file_bytes", "worlds"), [(1 << 28, (2, 3)), (512, (4,))], ids=["one file a rank", "many files a rank"]
)
def test_saved_on_four_ranks_loads_on_any_number(tmp_path: Path, file_bytes: int, worlds: tuple[int, ...]) -> None:
    run_ranks(4, _save, tmp_path, file_bytes)
    everything = sorted({name for rank in range(4) for name in _names(rank, 4)})
    assert files.verify(tmp_path / "step-7") == []
    assert files.tensor_names(tmp_path / "step-7") == everything
    written = Counter(name for file in (tmp_path / "step-7").glob("*.safetensors") for name in _keys(file))
    assert set(written.values()) == {1}
    assert _load(0, 1, tmp_path) == len(everything)
    for world in worlds:
        loaded = run_ranks(world, _load, tmp_path)
        assert sum(loaded) >= len(everything)
        assert loaded[3:] in ([], [0])


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_saved_on_one_rank_without_torch_distributed_loads_on_three(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    tensors = {name: _tensor(name) for name in _names(0, 1)}
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1)
    checkpointer.save(7, tensors, STATE)
    checkpointer.wait()
    assert run_ranks(3, _load, tmp_path) == [15, 15, 15]


def test_files_stay_below_their_size(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1, file_bytes=4096)
    checkpointer.save(0, {f"w{i}": torch.rand(256) for i in range(20)}, {})
    checkpointer.wait()
    sizes = [sum(len(_bits(t)) for t in _read(file).values()) for file in (tmp_path / "step-0").glob("*.safetensors")]
    assert sizes == [4096] * 5


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_any_view_and_any_shape(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"base": base, "transposed": base.t(), "part": base[1:3, ::2], "scalar": torch.tensor(2.5)}
    tensors |= {"empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2)), "flags": base > 3}
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1)
    checkpointer.save(1, tensors, {})
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    into["transposed"] = torch.zeros(4, 6).t()
    into["parameter"] = torch.nn.Parameter(torch.zeros(2))
    checkpointer.wait()
    checkpointer.load(1, into)
    for name, tensor in tensors.items():
        assert torch.equal(into[name], tensor), name


def test_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    run_ranks(2, _save, tmp_path, 1 << 28)
    for file in (tmp_path / "step-7").iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors"
            content = file.read_bytes()
            head = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + head])
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            assert 8 + head + max(ends) == len(content)
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(file.read_bytes())


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


def test_a_pickle_in_place_of_a_file_does_not_run(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1)
    checkpointer.save(7, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    path = tmp_path / "step-7"
    (tensors,) = path.glob("*.safetensors")
    tensors.write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    (path / ".metadata").write_bytes(tensors.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][tensors.name] = files.digest(tensors).model_dump()  # a forger knows how to hash
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert files.verify(path) == []
    with pytest.raises(InvalidInput, match=r"step-7 cannot be read \("):
        checkpointer.load(7, {"w": torch.ones(3)})
    with pytest.raises(InvalidInput, match="is not a safetensors file"):
        files.tensor_names(path)
    assert not (tmp_path / "boom").exists()
    pickle.loads(tensors.read_bytes())  # the bomb is real
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"other": torch.zeros(3)}, r"tensor 'other' is not in checkpoint .*step-7: load it with the recipe"),
        ({"w": torch.zeros(4)}, r"tensor 'w' is torch.float32 \[3\] in checkpoint .*step-7, not torch.float32 \[4\]: "),
        ({"w": torch.zeros(3).half()}, r"is torch.float32 \[3\] in checkpoint .*step-7, not torch.float16 \[3\]: "),
    ],
)
def test_tensor_that_does_not_fit_is_named(tmp_path: Path, asked: dict[str, Tensor], message: str) -> None:
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1)
    checkpointer.save(7, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    with pytest.raises(InvalidInput, match=message):
        checkpointer.load(7, asked)


def test_step_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 3, None, 0, 1)
    checkpointer.save(7, {"w": torch.ones(3)}, {})
    checkpointer.wait()
    with pytest.raises(NotFound, match=r"step-8 does not exist: .* holds step-7$"):
        checkpointer.load(8, {})


# Disks


def _save_twice(rank: int, world: int, folder: Path, limited_rank: int, limit: int) -> str:
    """A first checkpoint, then on one rank a limit on file sizes, then a second one that is larger than that."""
    checkpointer = _checkpointer(folder, rank, world)
    checkpointer.save(1, {f"w{rank}": torch.ones(100)}, {})
    checkpointer.wait()
    if rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpointer.save(2, {f"w{rank}": torch.ones(1 << 20)}, {})
    with pytest.raises(ShoalError) as raised:
        checkpointer.wait()
    if rank == limited_rank:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    checkpointer.wait()  # said once
    checkpointer.save(3, {f"w{rank}": torch.ones(1 << 20)}, {})  # and the next one has another chance
    checkpointer.wait()
    return str(raised.value)


@pytest.mark.parametrize("limited_rank", [0, 1])
def test_write_that_fails_on_one_rank_is_told_on_all(tmp_path: Path, limited_rank: int) -> None:
    sentences = run_ranks(2, _save_twice, tmp_path, limited_rank, 1 << 20)
    assert sentences[0] == sentences[1]
    assert sentences[0] == (
        f"checkpoint {tmp_path / 'step-2'} could not be written (File too large on rank {limited_rank}), "
        "earlier ones are untouched (step-1): raise the limit on file sizes (ulimit -f)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]
    assert files.verify(tmp_path / "step-1") == files.verify(tmp_path / "step-3") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_full_disk(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpointer = Checkpointer(folder, 3, None, 0, 1)
    checkpointer.save(1, {"w": torch.ones(1000)}, {})
    checkpointer.save(2, {"w": torch.ones(1 << 20)}, {})
    with pytest.raises(ShoalError) as raised:
        checkpointer.wait()
    assert str(raised.value) == (
        f"checkpoint {folder / 'step-2'} could not be written (No space left on device), "
        "earlier ones are untouched (step-1): free space there or lower checkpoint.keep"
    )
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    assert files.last_good(folder)[0] == files.list_checkpoints(folder)[0]


@contextlib.contextmanager
def _not_root() -> Iterator[None]:
    """Root writes everywhere: be somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def _save_into_read_only(rank: int, world: int, folder: Path) -> tuple[str, str]:
    folder.chmod(0o555)
    with _not_root(), pytest.raises(InvalidInput) as refused:
        Checkpointer(folder, 3, None, rank, world)
    folder.chmod(0o755)
    checkpointer = Checkpointer(folder, 3, None, rank, world)
    folder.chmod(0o555)
    with _not_root(), pytest.raises(ShoalError) as failed:
        checkpointer.save(2, {"w": torch.ones(3)}, {})
        checkpointer.wait()
    folder.chmod(0o755)
    return str(refused.value), str(failed.value)


def test_read_only_folder(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):  # pytest's folders are closed to others
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o111)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    ((refused, failed),) = run_ranks(1, _save_into_read_only, folder)
    remedy = "make it writable or choose another run folder"
    assert refused == f"checkpoint folder {folder} cannot be written (Permission denied): {remedy}"
    assert failed == (
        f"checkpoint {folder / 'step-2'} could not be written (Permission denied), there is no earlier one: {remedy}"
    )
    assert list(folder.iterdir()) == []
