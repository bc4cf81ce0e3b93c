"""The loader against a plain simulation of its rule: rows out of whole documents, whatever the shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from shoal.jobs.data.prepare import PrepareOptions, prepare
from shoal.jobs.data.readers import TextSource
from shoal.workers.data import loader as loader_module
from shoal.workers.data.ahead import Ahead
from shoal.workers.data.batch import IGNORE, PackedBatch
from shoal.workers.data.loader import TrainLoader, ValLoader
from shoal.workers.data.manifest import read_manifest, read_row_group
from shoal.workers.errors import InvalidInput, NotFound


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of 1 to 200 words in some 15 row groups of about 512 tokens."""
    words = np.random.default_rng(1)
    texts = [" ".join(f"w{w}" for w in words.integers(0, 500, words.integers(1, 200))) for _ in range(120)]
    folder = tmp_path_factory.mktemp("corpora") / "words"
    options = PrepareOptions(vocabulary=600, val_fraction=0.2, group_tokens=512)
    manifest = prepare([TextSource("words", texts)], folder, options)
    assert manifest.parquet("train")[0].row_groups > 10
    return folder


def documents(folder: Path, split: str) -> list[list[int]]:
    """All documents of a split, read without the project's own reader."""
    return [d for path in sorted(folder.glob(f"{split}-*.parquet")) for d in pq.read_table(path)["tokens"].to_pylist()]


def pieces(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of each piece."""
    bounds = list(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True))
    return [(batch.tokens[a:b].tolist(), batch.targets[a:b].tolist()) for a, b in bounds]


def same(one: PackedBatch, other: PackedBatch) -> bool:
    tensors = ("tokens", "targets", "positions")
    return one.cu_seqlens == other.cu_seqlens and all(torch.equal(getattr(one, t), getattr(other, t)) for t in tensors)


def join(batches: list[PackedBatch]) -> PackedBatch:
    """Shards laid end to end."""
    bounds, total = [0], 0
    for batch in batches:
        bounds += [total + b for b in batch.cu_seqlens[1:]]
        total += len(batch.tokens)
    tokens, targets, positions = (
        torch.cat([getattr(b, t) for b in batches]) for t in ("tokens", "targets", "positions")
    )
    return PackedBatch(tokens, targets, positions, tuple(bounds))


def check_form(batch: PackedBatch, sequence: int) -> None:
    """Types, row boundaries, positions from 0 in each piece, targets that follow."""
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens)
    assert set(range(0, len(batch.tokens), sequence)) <= set(batch.cu_seqlens)
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert batch.positions[start:end].tolist() == list(range(end - start)) and end > start
        assert torch.equal(batch.targets[start : end - 1], batch.tokens[start + 1 : end])


def epoch_of_documents(folder: Path, loader: TrainLoader, rows: int, sequence: int) -> list[tuple[int, ...]]:
    """Put the documents of the stream's first epoch together again, from pieces and targets alone."""
    train = documents(folder, "train")
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    while len(found) < len(train):
        for batch in loader.next():
            check_form(batch, sequence)
            for tokens, targets in pieces(batch):
                current += tokens
                if targets[-1] == IGNORE:
                    found.append(tuple(current))
                    current = []
                elif len(found) < len(train):
                    assert IGNORE not in targets
    return found[: len(train)]


@pytest.mark.parametrize("sequence", [2, 7, 64, 1000])
def test_an_epoch_is_every_document_once_and_every_token_predicted_once(corpus: Path, sequence: int) -> None:
    loader = TrainLoader(corpus, sequence, 4, 2, seed=3, shuffle_groups=4, shuffle_tokens=1, shard=(0, 1))
    found = epoch_of_documents(corpus, loader, 4, sequence)
    assert Counter(found) == Counter(map(tuple, documents(corpus, "train")))


def test_targets_of_an_epoch_are_all_tokens_but_the_first_of_each_document(corpus: Path) -> None:
    total = read_manifest(corpus).splits["train"].tokens
    loader = TrainLoader(
        corpus, total, 1, 1, seed=0, shuffle_groups=2, shuffle_tokens=1, shard=(0, 1)
    )  # a row is an epoch
    for _ in range(3):
        (batch,) = loader.next()
        expected = Counter(token for document in documents(corpus, "train") for token in document[1:])
        assert Counter(t for t in batch.targets.tolist() if t != IGNORE) == expected


@given(data=st.data(), sequence=st.integers(2, 90), micro=st.integers(1, 3), shards=st.integers(1, 4))
def test_the_stream_does_not_depend_on_the_number_of_shards(
    corpus: Path, data: st.DataObject, sequence: int, micro: int, shards: int
) -> None:
    batch = micro * shards * data.draw(st.integers(1, 3))
    seed, groups = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 20))
    mixed = data.draw(st.integers(1, 2000))
    whole = TrainLoader(corpus, sequence, batch, micro, seed, groups, mixed, (0, 1))
    parts = [TrainLoader(corpus, sequence, batch, micro, seed, groups, mixed, (r, shards)) for r in range(shards)]
    experts_only = TrainLoader(corpus, sequence, batch, micro, seed, groups, mixed, (None, shards))
    for _ in range(6):
        expected = whole.next()
        got = [part.next() for part in parts]
        assert all(len(b.tokens) == sequence * batch // micro // shards for part in got for b in part)
        assert all(same(join([part[m] for part in got]), expected[m]) for m in range(micro))
        assert [len(b.tokens) for b in experts_only.next()] == [0] * micro
        assert all(loader.state() == whole.state() for loader in (*parts, experts_only))


def test_accumulation_cuts_the_same_global_batch(corpus: Path) -> None:
    one, four = (TrainLoader(corpus, 33, 8, m, 5, 3, 700, (0, 1)) for m in (1, 4))
    for _ in range(10):
        assert same(join(four.next()), one.next()[0])


@pytest.mark.parametrize("shard", [(0, 1), (1, 2), (None, 2)])
def test_resuming_at_every_position_gives_the_same_batches(corpus: Path, shard: tuple[int | None, int]) -> None:
    arguments = (corpus, 61, 6, 3, 11, 3, 800)
    loader = TrainLoader(*arguments, shard)
    states, batches = [], []
    while loader.state()["epoch"] < 2:
        states.append(json.loads(json.dumps(loader.state())))
        batches.append(loader.next())
    assert len({s["window"] for s in states}) > 3
    for i, state in enumerate(states):
        resumed = TrainLoader(*arguments, shard, state)
        for expected in batches[i : i + 3]:
            assert all(same(a, b) for a, b in zip(resumed.next(), expected, strict=True))


def _whole(batch: PackedBatch) -> PackedBatch:
    return batch


def test_reading_ahead_changes_neither_batches_nor_positions(corpus: Path, tmp_path: Path) -> None:
    """A damaged file is told of where the first batch of it is asked for, not a batch before."""
    arguments = (61, 6, 3, 11, 3, 800, (1, 2))
    plain, ahead = TrainLoader(corpus, *arguments), Ahead(TrainLoader(corpus, *arguments), _whole)
    for _ in range(20):
        assert ahead.state() == plain.state()
        resumed = Ahead(TrainLoader(corpus, *arguments, ahead.state()), _whole)
        expected = plain.next()
        for other in (ahead, resumed):
            assert all(same(a, b) for a, b in zip(other.next(), expected, strict=True))
    damaged = copy(corpus, tmp_path / "damaged")
    reads: list[TrainLoader | Ahead] = [TrainLoader(damaged, *arguments)]
    reads.append(Ahead(TrainLoader(damaged, *arguments), _whole))
    first = [loader.next() for loader in reads]
    assert all(same(a, b) for a, b in zip(*first, strict=True))
    (damaged / read_manifest(damaged).parquet("train")[0].name).unlink()
    read = [0, 0]
    for i, loader in enumerate(reads):
        with pytest.raises((InvalidInput, NotFound), match="train-"):
            for _ in range(1000):
                loader.next()
                read[i] += 1
    assert read[0] <= read[1] <= read[0] + 1  # one was read before the file went


def test_rows_are_shuffled_among_those_that_follow_one_another(corpus: Path) -> None:
    """20 rows at a time: the same rows as without shuffling, in another order, another one in each block."""
    plain = TrainLoader(corpus, 25, 20, 1, 0, 4, 1, (0, 1))
    mixed = TrainLoader(corpus, 25, 20, 1, 0, 4, 500, (0, 1))
    orders = []
    for _ in range(5):
        before, after = (loader.next()[0].tokens.view(20, 25).tolist() for loader in (plain, mixed))
        assert sorted(before) == sorted(after)
        orders.append(tuple(before.index(row) for row in after))
    assert len(set(orders)) == 5 and tuple(range(20)) not in orders


def test_a_state_opens_on_another_number_of_shards(corpus: Path) -> None:
    one = TrainLoader(corpus, 40, 4, 1, 0, 2, 500, (0, 1))
    for _ in range(7):
        one.next()
    two = [TrainLoader(corpus, 40, 4, 1, 0, 2, 500, (r, 2), one.state()) for r in range(2)]
    for _ in range(5):
        assert same(join([loader.next()[0] for loader in two]), one.next()[0])


def test_seed_and_epoch_change_the_order_and_nothing_else(corpus: Path) -> None:
    total = read_manifest(corpus).splits["train"].tokens

    def epochs(seed: int) -> list[list[int]]:
        loader = TrainLoader(corpus, total, 1, 1, seed, 2, 1, (0, 1))
        return [loader.next()[0].tokens.tolist() for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    orders = [*first, *other]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    unshuffled = [token for document in documents(corpus, "train") for token in document]
    assert unshuffled not in orders


def test_memory_holds_one_window(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups are read by the window only, and a window never holds more than its row groups' tokens."""
    read: list[int] = []
    original = read_row_group

    def counted(path: Path, group: int, columns: list[str]) -> object:
        table = original(path, group, columns)
        read.append(int(pq.ParquetFile(path).metadata.row_group(group).num_rows))
        assert table.column_names == ["tokens"]
        return table

    monkeypatch.setattr(loader_module, "read_row_group", counted)
    loader = TrainLoader(corpus, 16, 1, 1, 0, 3, 1, (0, 1))
    assert len(read) == 3
    groups = read_manifest(corpus).parquet("train")[0].row_groups
    largest = 3 * (512 + max(map(len, documents(corpus, "train"))))
    while loader.state()["epoch"] == 0:
        before, window = len(read), loader._stream.window
        loader.next()
        entered = (loader._stream.window - window) % -(-groups // 3)
        assert len(read) - before <= 3 * entered
        assert len(loader._stream._text.tokens) <= largest
    assert loader._stream._text.tokens.dtype == np.uint16


@given(sequence=st.integers(2, 200), batch=st.integers(1, 9), shards=st.integers(1, 4), tokens=st.integers(1, 3000))
def test_validation_is_the_same_text_for_any_number_of_shards(
    corpus: Path, sequence: int, batch: int, shards: int, tokens: int
) -> None:
    table = pq.read_table(sorted(corpus.glob("val-*.parquet"))[0]).sort_by("hash").to_pylist()
    expected, predicted = [], 0
    for row in table:
        expected.append(row)
        predicted += len(row["tokens"]) - 1
        if predicted >= tokens:
            break
    loaders = [ValLoader(corpus, sequence, tokens, batch, (r, shards)) for r in range(shards)]
    steps = [list(loader) for loader in loaders]
    assert {len(s) for s in steps} == {len(loaders[0])}
    assert {(loader.tokens, loader.bytes) for loader in loaders} == {(predicted, sum(r["bytes"] for r in expected))}
    stream = [token for row in expected for token in row["tokens"]]
    targets = [t for row in expected for t in [*row["tokens"][1:], IGNORE]]
    for i in range(len(steps[0])):
        step = join([shard[i] for shard in steps])
        start = i * batch * sequence
        check_form(step, sequence)
        assert step.tokens.tolist() == stream[start : start + batch * sequence]
        assert step.targets.tolist() == targets[start : start + batch * sequence]
    assert sum(b.targets_count for s in steps for b in s) == predicted


def test_a_rank_without_tokens_validates_in_step(corpus: Path) -> None:
    tokens, none = ValLoader(corpus, 32, 999, 4, (0, 2)), ValLoader(corpus, 32, 999, 4, (None, 2))
    assert [len(b.tokens) for b in none] == [0] * len(list(tokens))


def copy(corpus: Path, to: Path) -> Path:
    to.mkdir()
    for path in corpus.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_missing_or_cut_file_is_named(corpus: Path, tmp_path: Path) -> None:
    cut = copy(corpus, tmp_path / "cut")
    path = cut / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=r"train-00000\.parquet is damaged .* bytes instead of"):
        TrainLoader(cut, 8, 1, 1, 0, 8, 1, (0, 1))
    path.unlink()
    with pytest.raises(InvalidInput, match=r"train-00000\.parquet is missing: restore it"):
        TrainLoader(cut, 8, 1, 1, 0, 8, 1, (0, 1))
    (cut / "val-00000.parquet").unlink()
    with pytest.raises(InvalidInput, match=r"val-00000\.parquet is missing: restore it"):
        ValLoader(cut, 8, 100, 1, (0, 1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_flipped_bytes_are_found_before_a_model_sees_them(corpus: Path, tmp_path: Path, split: str) -> None:
    folder = copy(corpus, tmp_path / "flipped")
    path = folder / f"{split}-00000.parquet"
    data = bytearray(path.read_bytes())
    data[200:208] = bytes(b ^ 0xFF for b in data[200:208])  # within the first page of tokens
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=rf"{split}-00000\.parquet is damaged"):
        if split == "train":
            TrainLoader(folder, 8, 1, 1, 0, 100, 1, (0, 1))
        else:
            ValLoader(folder, 8, 10**6, 1, (0, 1))


def test_a_state_of_other_data_or_another_order_is_refused(corpus: Path) -> None:
    state = TrainLoader(corpus, 8, 1, 1, 0, 8, 1, (0, 1)).state()
    with pytest.raises(InvalidInput, match=r"train\.seed .*seed 1, was 0"):
        TrainLoader(corpus, 8, 1, 1, 1, 8, 1, (0, 1), state)
    with pytest.raises(InvalidInput, match=r"data\.shuffle_groups"):
        TrainLoader(corpus, 8, 1, 1, 0, 4, 1, (0, 1), state)
    with pytest.raises(InvalidInput, match=r"data\.corpus"):
        TrainLoader(corpus, 8, 1, 1, 0, 8, 1, (0, 1), {**state, "corpus": "0" * 64})


def test_folders_that_are_no_corpus_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a prepared corpus"):
        TrainLoader(tmp_path, 8, 1, 1, 0, 8, 1, (0, 1))
    broken = copy(corpus, tmp_path / "broken")
    (broken / "manifest.json").write_text('{"format": "shoal-corpus", "version": 2}')
    with pytest.raises(InvalidInput, match=r"manifest\.json is damaged \(version"):
        ValLoader(broken, 8, 100, 1, (0, 1))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0"])
def test_a_batch_that_is_on_a_device_stays_as_it_is(device: str) -> None:
    """On a GPU too, whose tensors exist here as shapes alone."""
    with FakeTensorMode():
        tokens = torch.empty(3, dtype=torch.int64, device=device)
        batch = PackedBatch(tokens, tokens, tokens, (0, 3))
        assert batch.to(device) is batch
        assert batch.to(torch.device(device).type) is batch
