"""``shoal data prepare``: documents in, a corpus folder out."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal.jobs.data.publish import publishing, sha256_file
from shoal.jobs.data.readers import Document, Source
from shoal.jobs.data.tokenizer import SETTINGS, CorpusTokenizer, Sample, load_tokenizer, settings_of, train_tokenizer
from shoal.jobs.data.writer import GROUP_TOKENS, Row, SplitWriter, write_in_hash_order
from shoal.workers.data.manifest import (
    MANIFEST,
    SPLITS,
    CorpusFile,
    Manifest,
    Split,
    TokenizerEntry,
    Totals,
    read_manifest,
)
from shoal.workers.errors import InvalidInput

TOKENIZER, UNIGRAM = "tokenizer.json", "unigram.npy"
BATCH_BYTES = 1 << 22

# Called with the stage, the bytes of text done in it, and about how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareOptions:
    """``tokenizer``: an existing tokenizer.json; None trains one of ``vocabulary`` tokens on ``sample_bytes`` of text.

    ``val_fraction``: share of the documents kept for validation, chosen by their hashes.
    """

    tokenizer: Path | None = None
    vocabulary: int = 4096
    val_fraction: float = 0.05
    sample_bytes: int = 1 << 25
    group_tokens: int = GROUP_TOKENS


def prepare(
    sources: Sequence[Source],
    out: Path,
    options: PrepareOptions,
    *,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Manifest:
    """Write the corpus folder ``out``, whole or not at all, and return its manifest.

    Memory holds a batch of texts, a row group, the sample for the tokenizer and 16 bytes a document, whatever the size
    of the corpus. Raises InvalidInput for input that cannot be used and for a folder that cannot be written.
    """
    if not 0 <= options.val_fraction < 1:
        raise InvalidInput(f"--val-fraction {options.val_fraction} is not in [0, 1): set it to, say, 0.05")
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    with publishing(out, force) as folder:
        tokenizer = given or _trained(sources, options, progress)
        build = _Build(folder, tokenizer, options)
        try:
            total = sum(source.size for source in sources)
            build.encode(_documents(sources, build.skipped), lambda done: progress("tokenise", done, total))
            build.finish_splits()
        finally:
            build.abandon()
        manifest = build.manifest(out.name)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def corpus_tokenizer(folder: Path) -> CorpusTokenizer:
    """The tokenizer of a prepared corpus, with the bos and eos of its manifest."""
    entry = read_manifest(folder).tokenizer
    loaded = load_tokenizer(folder / TOKENIZER, (entry.bos_token, entry.eos_token))
    return CorpusTokenizer(loaded.tokenizer, entry.bos, entry.eos, entry.added)


def _documents(sources: Iterable[Source], skipped: Counter[str]) -> Iterator[Document]:
    for source in sources:
        yield from source.documents(skipped)


def _trained(sources: Sequence[Source], options: PrepareOptions, progress: Progress) -> CorpusTokenizer:
    """Train on a sample that no order of the input changes; validation texts stay out of it."""
    sample, rest = Sample(options.sample_bytes), Sample(options.sample_bytes)
    done, total = 0, sum(source.size for source in sources)
    for document in _documents(sources, Counter()):
        data = document.text.encode()
        digest = hashlib.sha256(data).digest()
        (rest if _is_validation(digest, options.val_fraction) else sample).add(document.text, digest)
        done += len(data)
        progress("sample", done, total)
    progress("train tokenizer", 0, 0)
    return train_tokenizer(sample.texts() or rest.texts(), options.vocabulary)


def _is_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8]) < fraction * 2.0**64


@dataclass
class _Build:
    """A corpus while it is written into ``folder``."""

    folder: Path
    tokenizer: CorpusTokenizer
    options: PrepareOptions
    skipped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0

    def __post_init__(self) -> None:
        self._seen: set[bytes] = set()
        self._held: Row | None = None
        self._sources: dict[str, Totals] = defaultdict(Totals)
        self._splits: dict[Split, Totals] = {"train": Totals(), "val": Totals()}
        self._unigram = np.zeros(self.tokenizer.size, np.int64)
        self._hash = hashlib.sha256()
        dtype, group = self.tokenizer.dtype, self.options.group_tokens
        self._train = SplitWriter(self.folder, "train", dtype, group)
        self._spool = SplitWriter(self.folder, "val", dtype, group, prefix="spool-")
        self._val = SplitWriter(self.folder, "val", dtype, group)
        self._parquet: list[CorpusFile] = []
        text = self.tokenizer.tokenizer.to_str(pretty=True)
        (self.folder / TOKENIZER).write_text(text, encoding="utf-8")
        self._beside = [TOKENIZER, UNIGRAM]
        if self.options.tokenizer and (settings := settings_of(self.options.tokenizer)) is not None:
            (self.folder / SETTINGS).write_bytes(settings)
            self._beside.append(SETTINGS)
        self._tokenizer_hash = sha256_file(self.folder / TOKENIZER)
        self._hash.update(self._tokenizer_hash.encode())

    def encode(self, documents: Iterator[Document], progress: Callable[[int], None]) -> None:
        """Hash, drop exact duplicates, tokenise by batches and hand the rows to their split."""
        batch: list[tuple[Document, bytes, int]] = []
        done = pending = 0
        for document in documents:
            data = document.text.encode()
            digest = hashlib.sha256(data).digest()
            done += len(data)
            if digest[:16] in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(digest[:16])
            batch.append((document, digest, len(data)))
            pending += len(data)
            if pending >= BATCH_BYTES:
                self._take(batch)
                batch, pending = [], 0
                progress(done)
        self._take(batch)
        progress(done)

    def _take(self, batch: list[tuple[Document, bytes, int]]) -> None:
        encoded = self.tokenizer.encode([document.text for document, _, _ in batch])
        for (document, digest, size), tokens in zip(batch, encoded, strict=True):
            row = Row(tokens, document.source, digest.hex(), size)
            totals = Totals(documents=1, tokens=len(tokens), bytes=size)
            self._sources[document.source] += totals
            if _is_validation(digest, self.options.val_fraction):
                self._to_val(row)
            else:
                self._to_train(row)

    def _to_val(self, row: Row) -> None:
        self._splits["val"] += Totals(documents=1, tokens=len(row.tokens), bytes=row.bytes)
        self._spool.add(row)

    def _to_train(self, row: Row) -> None:
        """Write a training row; but hold the smallest hash back, for validation in case it gets no other document."""
        if self.options.val_fraction and not self._splits["val"].documents:
            held = self._held
            if held is None or row.hash < held.hash:
                self._held = row
                if held is None:
                    return
                row = held
        self._splits["train"] += Totals(documents=1, tokens=len(row.tokens), bytes=row.bytes)
        np.add.at(self._unigram, row.tokens[1:], 1)
        self._hash.update(row.hash.encode())
        self._train.add(row)

    def finish_splits(self) -> None:
        """Close the training files and write the validation files in the order of hashes."""
        held, self._held = self._held, None
        if held and self._splits["val"].documents:
            self._to_train(held)
        elif held:
            self._to_val(held)
        self._check_not_empty()
        self._parquet += self._train.close()
        spool = self._spool.close()
        for digest in write_in_hash_order(spool, self._val):
            self._hash.update(digest.encode())
        self._parquet += self._val.close()
        for file in spool:
            (self.folder / file.name).unlink()
        np.save(self.folder / UNIGRAM, self._unigram, allow_pickle=False)

    def abandon(self) -> None:
        """Close what a failure left open."""
        for writer in (self._train, self._spool, self._val):
            writer.abandon()

    def _check_not_empty(self) -> None:
        train, val = (self._splits[split].documents for split in SPLITS)
        if train + val == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()) if count)
            raise InvalidInput(f"the input holds no text (skipped: {reasons or 'nothing'}): give files with text")
        if train == 0:
            raise InvalidInput(
                f"the input holds {val} document{'s' * (val > 1)}, too few to split for validation: "
                "cut a long file into documents with --separator, give more, or raise --val-fraction"
            )

    def manifest(self, name: str) -> Manifest:
        """The manifest of the finished files."""
        t = self.tokenizer
        others = [
            CorpusFile(name=n, sha256=sha256_file(self.folder / n), size=(self.folder / n).stat().st_size)
            for n in self._beside
        ]
        return Manifest(
            name=name,
            vocabulary=t.size,
            vocabulary_asked=None if self.options.tokenizer else self.options.vocabulary,
            tokenizer=TokenizerEntry(
                sha256=self._tokenizer_hash,
                bos=t.bos,
                eos=t.eos,
                bos_token=t.name(t.bos),
                eos_token=t.name(t.eos),
                trained=self.options.tokenizer is None,
                added=t.added,
            ),
            val_fraction=self.options.val_fraction,
            splits=self._splits,
            sources=dict(sorted(self._sources.items())),
            files=(*self._parquet, *others),
            skipped={reason: count for reason, count in sorted(self.skipped.items()) if count},
            duplicates=self.duplicates,
            corpus_hash=self._hash.hexdigest(),
        )
