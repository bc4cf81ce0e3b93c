"""Two GPUs or more: decode steps in CUDA graphs that exchange rows give what the same operations give one by one, and
follow steps of any shape, and one GPU alone; whatever each rank has to do, and where attention and experts are apart.

Needs no Ray: ``pytest tests/workers/test_gpu_graphs_ranks.py`` on a machine with two Hopper GPUs, or four.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import small_recipe
from test_engine_ranks import COPIES, requests_of, tokens_of
from test_gpu_graphs import KINDS, SIZES, _filled, _one_by_one, _parts
from torch import Tensor

from shoal.workers.config import Recipe
from shoal.workers.data.batch import PackedBatch
from shoal.workers.engine.cache import PagedAttention
from shoal.workers.engine.decode import capturable
from shoal.workers.engine.engine import Engine
from shoal.workers.engine.request import Limits, Turn
from shoal.workers.engine.tables import Part, StepTables
from shoal.workers.expert_plan import Plan
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement

STARTS: list[tuple[list[int], list[int]]] = [
    ([5], []), ([], [4000]), ([15, 700, 31], [0]), ([0, 63, 2047, 3999], [*range(100, 1700, 100)]), ([1023], [7, 9]),
]  # fmt: skip
"""Of each rank with attention, where its tokens stand, in steps that follow one another."""
PLACES = {"colocated": 2, "1A:1F": 2, "2A:2F": 4}
"""On so many GPUs."""


def _model(
    kind: str, placement: str, ranks: int, rank: int, device: torch.device, plan: Plan | None = None
) -> Transformer:
    attention = {"kind": kind, "cmp_block": 32, "cmp_stride": 16, "slc_block": 64, "slc_count": 4, "window": 100}
    sizes = SIZES | {"train__dtype": "bfloat16", "parallel__device": device.type}
    sizes |= {
        "parallel__ranks": ranks,
        "parallel__placement": placement,
        "serve__expert_copies": 2 * (plan is not None),
    }
    recipe = Recipe.model_validate({**small_recipe(**sizes), "attention": attention})
    return Transformer(recipe, make_mesh(Placement.of(recipe), rank % ranks, device), device, plan=plan).eval()


def _of_any_shape(engine: Engine, parts: list[Part]) -> Tensor:
    """Logits by a step whose exchanges have the sizes that they need."""
    tables = StepTables(engine.model.recipe, parts, engine.model.dtype, engine.device)
    batch = PackedBatch(tables.tokens, tables.tokens, tables.positions, (0, len(parts)))
    attention = PagedAttention(tables, engine.caches) if engine.model.hosts_attention else None
    hidden = engine.model(batch, MoELoad(1, balance=False), attention)
    return engine.model.logits(hidden) if engine.model.hosts_attention else hidden


@torch.inference_mode()
def _steps(kind: str, placement: str, rank: int, device: torch.device) -> dict[str, Any]:
    """Whether graphs have the bits of their operations, and relative errors of rows against two other ways."""
    spread = _filled(_model(kind, placement, PLACES[placement], rank, device))
    alone = _filled(_model(kind, "colocated", 1, 0, device))
    assert spread.decode is not None and alone.decode is not None
    plain, mesh = _one_by_one(spread), spread.model.mesh
    same, errors, finite = [], [], True
    for step, starts in enumerate(STARTS):
        mine = starts[rank] if spread.model.hosts_attention and rank < len(starts) else []
        parts, others = (_parts(engine, mine, random.Random(step)) for engine in (spread, alone))
        need = Turn.together(mesh.tell(Turn(0, False, spread.decode.need(parts)).numbers())).shape
        want = plain.logits(parts, need).clone()
        got = spread.decode.logits(parts, need).clone()
        again = spread.decode.logits(parts, need).clone()
        same += [torch.equal(got, want), torch.equal(again, want)]
        exact = _of_any_shape(spread, parts)
        finite &= not bool(got.isnan().any())
        if parts:
            for other in (exact, alone.decode.logits(others)):
                error = (got.double() - other.double()).norm(dim=-1) / other.double().norm(dim=-1)
                errors.append(error.tolist())
    return {"same": same, "finite": finite, "errors": errors, "graphs": len(getattr(spread.decode, "graphs", ()))}


def _mixes(kind: str, placement: str, rank: int, device: torch.device) -> dict[str, Any]:
    """Tokens of requests that come and end, with graphs and without; graphs that were made before and after."""
    model = _model(kind, placement, PLACES[placement], rank, device)
    attention = model.mesh.placement.attention
    found: dict[str, Any] = {"same": [], "counted": [], "made": []}
    graphs, plain = (Engine(model, Limits(sequences=9, step=64, speculate=3)) for _ in range(2))
    graphs.warm_up()
    plain.decode = _one_by_one(plain)
    made = dict(graphs.decode.graphs) if graphs.decode else {}
    for shares in ([14, 3], [0, 5], [1, 0]):
        spread = [sum(shares), 0] if len(attention) == 1 else shares
        requests = requests_of(spread, 7)[rank] if rank in attention else []
        want, got = tokens_of(plain, requests), tokens_of(graphs, requests)
        ids = [{name: [i for i, _ in news] for name, news in each.items()} for each in (want, got)]
        found["same"].append(ids[0] == ids[1])
        found["counted"].append(graphs.load().expert_tokens == plain.load().expert_tokens)
    if graphs.decode:
        found["made"] = [set(made) == set(graphs.decode.shapes()), graphs.decode.graphs == made]
    return found


def _moves(kind: str, placement: str, rank: int, device: torch.device) -> dict[str, Any]:
    """Tokens of requests under way while experts move, with graphs and without; graphs that were made before."""
    found: dict[str, Any] = {"same": [], "moved": [], "made": []}
    news, engines = [], []
    for graphs in (False, True):
        engine = Engine(_model(kind, placement, PLACES[placement], rank, device, COPIES), Limits(sequences=9, step=64))
        if graphs:
            engine.warm_up()
        else:
            engine.decode = _one_by_one(engine)
        made = dict(getattr(engine.decode, "graphs", {}))
        attention = engine.model.mesh.placement.attention
        requests = requests_of([8, 5], 7)[rank] if rank in attention else []
        plans: dict[int, Any] = {
            step + rank: plan for step, plan in ((2, COPIES[::-1]), (8, COPIES), (14, COPIES[::-1]))
        }
        news.append(tokens_of(engine, requests, plans=plans))
        engines.append(engine)
        found["moved"].append(tuple(layer.homes for layer in engine.model.moe_layers) == COPIES[::-1])
        found["made"].append(not graphs or (len(made) > 1 and getattr(engine.decode, "graphs", {}) == made))
    ids = [{name: [i for i, _ in tokens] for name, tokens in each.items()} for each in news]
    found["same"] = [ids[0] == ids[1], engines[0].load().expert_tokens == engines[1].load().expert_tokens]
    return found


def on_rank(rank: int, port: int, folder: str, kind: str, placement: str) -> None:
    """Leaves what was found; nothing where no graph can be had."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast wants rights that containers lack
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=120))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=PLACES[placement], timeout=timedelta(seconds=120)
    )
    found: dict[str, Any] = {}
    if capturable(_model(kind, placement, PLACES[placement], rank, device)):
        found = {"steps": _steps(kind, placement, rank, device), "mixes": _mixes(kind, placement, rank, device)}
        if placement != "1A:1F":  # a rank with all experts has no copies
            found["moves"] = _moves(kind, placement, rank, device)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))
    gc.collect()  # graphs go before what they exchange with
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", PLACES)
def test_gpus_in_graphs(placement: str, kind: str) -> None:
    """In bf16. Graphs give bits and tokens of their operations; other ways differ by rounding, which may swap two
    equally good experts or blocks: hence the median over rows."""
    ranks = PLACES[placement]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA GPUs")
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=120), wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (store.port, folder, kind, placement), nprocs=ranks, start_method="spawn")
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]
    if not all(results):
        pytest.skip("graphs of experts need Hopper GPUs")
    for result in results:
        steps, mixes = result["steps"], result["mixes"]
        assert steps["finite"] and all(steps["same"])
        assert steps["graphs"] > 1  # fewer than steps: some need the same shapes
        assert all(mixes["same"]) and all(mixes["counted"])
        assert mixes["made"] == [True, True]
        assert all(map(all, result.get("moves", {}).values()))
    for way in range(2):  # of all ranks, one row beside the other
        rows = sorted(e for result in results for errors in result["steps"]["errors"][way::2] for e in errors)
        assert rows[len(rows) // 2] < 0.03, (way, rows)
