"""What ``shoal bench nsa`` compares and tells: decode in small, in Triton's interpreter; the passes need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import triton_on_cpu
from shell import shoal
from torch import Tensor
from triton_on_cpu import DEVICE, close

triton_on_cpu.prepare()

from shoal.jobs.bench import nsa, nsa_decode, nsa_dense, nsa_groups, nsa_plot, registry  # noqa: E402
from shoal.jobs.bench.nsa_decode import Case, Layer, Step  # noqa: E402
from shoal.jobs.bench.registry import Settings, parts_of  # noqa: E402
from shoal.jobs.bench.result import Document, Row, time_row  # noqa: E402
from shoal.kernels.nsa import BlockSizes  # noqa: E402
from shoal.kernels.nsa.paged import PagedCache, paged_decode  # noqa: E402
from shoal.kernels.nsa.paged_store import Heads, Phi, store_compressed, store_tokens  # noqa: E402
from shoal.workers.errors import InvalidInput, UsageError  # noqa: E402

SMALL = BlockSizes(4, 2, 8, 4, 1, 2, 11)
MEMORY = 78 << 30


def small(*lengths: int) -> Case:
    return Case(lengths, heads=4, kv_heads=2, dim=8, sizes=SMALL, device=DEVICE, dtype=torch.float32)


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa_decode, "COLD", 1)


# Decode


@pytest.mark.parametrize("lengths", [(80, 80, 80), (96, 5, 43)])
def test_a_step_is_that_of_the_engine_in_float64(lengths: tuple[int, ...]) -> None:
    """With a row that ends and without: what was written is read, and of each sequence its own pages."""
    case = small(*lengths)
    step = Step(case)
    layer = Layer(case, step)

    def wide(x: Tensor) -> Tensor:
        return x.cpu().double()

    cache = PagedCache(*(wide(getattr(layer.cache, f.name)) for f in fields(PagedCache)))
    heads = Heads(wide(layer.heads.q), wide(layer.heads.k), wide(layer.heads.v))
    names = ("positions", "far", "near", "near_first")
    tables = replace(step.tables, **{name: getattr(step.tables, name).cpu() for name in names})
    cos, sin = step.rotation
    q = store_tokens(heads, (wide(cos), wide(sin)), cache, step.far.cpu(), step.near.cpu(), triton=False)

    def want() -> Tensor:
        return paged_decode(q, wide(layer.gates), cache, tables, SMALL, case.scale, "torch")

    close(layer.decode(), want(), torch.float32)
    new = step.compressed
    turned = wide(new.rotation[0]), wide(new.rotation[1])
    new = replace(new, index=new.index.cpu(), raw_page=new.raw_page.cpu(), raw_row=new.raw_row.cpu(), rotation=turned)
    phi = tuple(Phi(wide(p.position), wide(p.w1), wide(p.w2)) for p in layer.phi)
    store_compressed(new, cache, (phi[0], phi[1]), triton=False)
    close(layer.decode_compressed(), want(), torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [(24, 24), (40, 9, 17)])
def test_every_dense_way_computes_what_is_defined(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run here: over all keys of a sequence, its new ones too, and over no other's."""
    monkeypatch.setattr(nsa_dense, "CONTEXTS", (max(lengths),))
    case = small(*lengths)
    layer, ran = nsa_dense.Layer.draw(case), set()
    want = nsa_dense.defined(layer)
    for i, length in enumerate(lengths):
        k, v = (x[i, :, :length].double() for x in layer.by_head)
        q = layer.q[i, :, 0].double().view(2, 2, 8)
        out = torch.softmax(q @ k.transpose(1, 2) * case.scale, -1) @ v
        torch.testing.assert_close(want[i].double(), out.view(4, 8), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(k[:, -1], layer.new[0, i].double())
    for (name, _), way in nsa_dense.ways(case).items():
        try:
            out = way(layer)
        except RuntimeError:
            continue
        ran.add(name)
        torch.testing.assert_close(out.reshape(want.shape).float(), want, rtol=1e-4, atol=1e-5)
    assert ran >= ({"flex_attention"} if case.ragged else {"flex_attention", "matmul"})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_compare_each_dense_way_and_the_best_has_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa_decode, "TARGETS", {(32, 2): 3.5})
    monkeypatch.setattr(nsa_dense, "CONTEXTS", (32,))
    said: list[str] = []
    rows = list(nsa_decode.run(Settings(say=said.append), [small(32, 32), small(32, 9)]))
    assert said[0] == "decode, context 32, batch 2"
    decode = [row for row in rows if row["what"] == nsa_decode.DECODE and "lengths" not in row]
    (best,) = [row for row in decode if row["best"]]
    assert {"matmul", best["baseline"]} <= {row["baseline"] for row in decode}
    assert best["baseline_ms"] == min(row["baseline_ms"] for row in decode)
    assert [row for row in decode if "target" in row] == [best]
    (whole,) = [row for row in rows if row["what"].endswith("with compression") and "lengths" not in row]
    assert (whole["baseline"], whole["target"], whole["compressed_every"]) == (best["baseline"], 3.5, SMALL.cmp_stride)
    assert [row for row in rows if "lengths" in row and "target" in row] == []
    assert {(row["phase"], row["heads"], row["group"], row["d_qk"], row["d_v"]) for row in rows} == {
        ("decode", 4, 2, 8, 8)
    }


def test_a_dense_way_with_a_wrong_output_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa_dense, "products", lambda layer: 1.1 * layer.rows)
    monkeypatch.setattr(nsa_dense, "ways", lambda case: {("matmul", ""): nsa_dense.products})
    said: list[str] = []
    assert "matmul" not in nsa_dense.dense_ms(small(16, 16), said.append)
    assert any(text.startswith("left out, matmul") and "off by" in text for text in said)


def test_the_cases_are_those_with_targets_and_fit_into_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cases = nsa_decode.cases()
    assert {(c.context, len(c.lengths)) for c in cases if not c.ragged} >= set(nsa_decode.TARGETS)
    assert sum(c.ragged for c in cases) == 1
    for case in cases:
        kept = case.layers * case.row_bytes * (sum(case.lengths) * 17 // 16 + len(case.lengths) * 2 * 640)
        scores = 8 * case.heads * sum(case.lengths)
        assert max(kept + case.layers * (34 << 20), case.layers * case.dense_bytes + scores) < MEMORY
        assert case.layers * case.nsa_bytes >= 4 * (60 << 20)  # an L2 cache has 50 MB or 60
    one = next(c for c in cases if (c.context, len(c.lengths)) == (65536, 1))
    assert one.dense_bytes == 2 * 65536 * 4 * 128 * 2
    assert one.nsa_bytes == 2 * (65536 // 16 + 16 * 64 + 512) * 4 * 128 * 2


def test_at_full_size_each_sequence_has_pages_of_its_own() -> None:
    case = Case(tuple(range(4096, 65537, 4096)), device="cpu")
    step = Step(case)
    pages = [step.tables.far[i, 0, : n // 64] // 4 for i, n in enumerate(case.lengths)]
    assert torch.equal(torch.cat(pages).sort().values, torch.arange(sum(case.lengths) // 64))
    assert step.tables.near.shape == (16, 4, 10)  # as many as the engine's graphs have
    assert step.compressed.raw_page.shape == (16, 32)
    assert torch.equal(step.compressed.raw_row[:, -1], torch.full((16,), 63))


# Passes that compress


@pytest.mark.parametrize("how", nsa.COMPRESSIONS)
def test_a_pass_that_compresses_reaches_keys_that_are_not_compressed(how: str) -> None:
    """Its output is the attention over what was compressed; gradients are those of all that it takes."""
    problem = nsa.Problem.draw(70, (8, 4), 8, "cpu")
    passes = nsa.Passes.compressing(problem, how)
    out = passes.forward()
    gradients = passes.back(out)
    assert isinstance(gradients, tuple)
    weights = 1 if how == "block means" else 4
    assert len(gradients) == 6 + 2 * weights
    assert [g.shape for g in gradients[1 : 1 + 2 * weights : weights]] == [(70, 4, 8), (70, 4, 4)]
    assert all(g.any() for g in gradients)
    compressed, taken = problem.compressing(how, 8)
    assert compressed(*taken).shape == problem.inputs[1].shape
    assert torch.equal(out[:31], nsa.Passes.of(problem).forward()[:31])  # before the first block ends


# Groups


def test_the_selected_branch_is_the_sum_of_its_parts_beside_its_limit() -> None:
    parts = [time_row(w, ms, phase="forward", group=1) for w, ms in (
        ("compressed", 9.0), ("selected, forced", 0.5), ("selected, others, and gates", 2.0)
    )]  # fmt: skip
    whole, *rest = nsa_groups.selected_rows(parts)
    assert rest == parts[1:]
    assert (whole["ms"], whole["baseline"], whole["baseline_ms"], whole["target"]) == (2.5, "limit", 4.0, 1.0)
    assert (whole["ratio"], whole["group"]) == (1.6, 1)


# Parts, and the picture


def test_parts_are_named_or_refused() -> None:
    assert parts_of("nsa", "") == parts_of("nsa", "groups, decode,wide,passes") == ()
    assert parts_of("nsa", "groups,decode") == ("decode", "groups")
    assert parts_of("moe", "") == ()
    with pytest.raises(UsageError, match=r"prefill is none of passes, wide, decode, groups"):
        parts_of("nsa", "decode,prefill")
    with pytest.raises(UsageError, match=r"shoal bench moe has no parts"):
        parts_of("moe", "decode")


def test_a_wrong_part_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    result = shoal("bench", "nsa", "--parts", "decode,prefill", cwd=tmp_path)
    assert result.returncode == 2
    assert "--parts prefill is none of" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_parts_alone_do_not_take_the_place_of_a_whole_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def run(settings: Settings) -> list[Row]:
        asked.append(settings.parts)
        return [{"what": "a row"}]

    monkeypatch.setattr(nsa, "run", run)
    monkeypatch.setattr(registry, "gpu_kind", lambda: "h100")
    whole = registry.measure("nsa", Settings())
    some = registry.measure("nsa", Settings(parts=("decode", "groups")))
    assert asked == [(), ("decode", "groups")]
    assert (whole["benchmark"], whole["parts"]) == ("nsa-h100", ["passes", "wide", "decode", "groups"])
    assert (some["benchmark"], some["parts"]) == ("nsa-h100-decode-groups", ["decode", "groups"])


def test_every_part_has_its_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measuring(part: str) -> Callable[[Settings], list[Row]]:
        return lambda settings: [{"what": part}]

    for module, name, part in (
        (nsa, "_passes", "passes"), (nsa, "_wide", "wide"), (nsa_decode, "run", "decode"), (nsa_groups, "run", "groups")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, measuring(part))
    monkeypatch.setattr(nsa, "wants_gpu", lambda name: None)
    assert [row["what"] for row in nsa.run(Settings())] == list(registry.PARTS["nsa"])
    assert [row["what"] for row in nsa.run(Settings(parts=("groups",)))] == ["groups"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InvalidInput, match="shoal bench nsa needs a CUDA GPU"):
        next(nsa.run(Settings()))


def test_the_picture_has_a_panel_for_each_phase_that_was_measured(tmp_path: Path) -> None:
    facts = {"d_qk": 128, "heads": 64}
    decode = [
        time_row(nsa_decode.DECODE, 0.02, "sdpa_flash", 0.07, 3.5 if context == 65536 else None, best=True,
                 phase="decode", context=context, batch=batch, **facts)
        for context in (8192, 65536) for batch in (1, 16)
    ]  # fmt: skip
    slower = time_row(nsa_decode.DECODE, 0.02, "matmul", 0.9, phase="decode", context=8192, batch=1, **facts)
    ragged = {**decode[-1], "ratio": 9.0, "lengths": "4096 to 65536"}  # of 16 as well, but of other lengths
    grouped = time_row("NSA, whole, by groups", 9.0, "sdpa_cudnn", 30.0, phase="forward", context=65536, **facts)
    ((title, lines),) = nsa_plot.panels_of([*decode, slower, ragged, grouped])
    assert title.startswith("decode")
    assert [(line.label, len(line.rows)) for line in lines] == [("batch 1", 2), ("batch 16", 2)]
    whole = [
        time_row(what, ms, name, 30.0, 2.0, phase=phase, context=8192, **facts)
        for what, ms in ((nsa.WHOLE, 9.0), (nsa.WITH_PHI, 10.0))
        for phase in ("forward", "backward") for name in ("sdpa_flash", "sdpa_cudnn")
    ]  # fmt: skip
    document: Document = {"benchmark": "nsa-h100", "rows": [*whole, *decode]}
    path = registry.draw("nsa", document, tmp_path)
    assert path == tmp_path / "nsa-h100.png" and path.read_bytes().startswith(b"\x89PNG")
    panels = dict(nsa_plot.panels_of(document["rows"]))
    assert [title.split(",")[0] for title in panels] == ["forward", "backward", "decode"]
    assert [row["ms"] for line in next(iter(panels.values())) for row in line.rows] == [10.0, 10.0]  # φ included
    assert registry.draw("nsa", {"benchmark": "nsa-h100-groups", "rows": [grouped]}, tmp_path) is None
    assert not (tmp_path / "nsa-h100-groups.png").exists()
