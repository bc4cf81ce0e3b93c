"""What models that learn nothing reach on the validation text: token frequencies, and gzip."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.jobs.data.prepare import UNIGRAM, corpus_tokenizer
from shoal.workers.data.manifest import read_manifest, validation_text
from shoal.workers.errors import InvalidInput


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of text, and the text they are measured on. ``tokens`` are those predicted: eos is, bos is not."""

    unigram_bits_per_byte: float
    gzip_bits_per_byte: float
    documents: int
    tokens: int
    bytes: int


def baselines(folder: Path, eval_tokens: int) -> Baselines:
    """Measure both on the validation text of ``eval_tokens``, the text that :class:`ValLoader` yields.

    Unigram: p(t) = (n_t + 1) / (N + V), with the counts n of the training split. gzip: level 9 over the documents'
    texts end to end. Raises NotFound and InvalidInput for a folder that is no corpus, is damaged or has no validation.
    """
    text = validation_text(folder, eval_tokens)
    counts = _unigram(folder)
    bits = -np.log2((counts + 1) / (counts.sum() + len(counts)))
    tokenizer = corpus_tokenizer(folder)
    plain = "".join(tokenizer.decode(document.tolist()) for document in text.documents).encode()
    return Baselines(
        unigram_bits_per_byte=math.fsum(float(bits[d[1:]].sum()) for d in text.documents) / text.bytes,
        gzip_bits_per_byte=8 * len(gzip.compress(plain, 9)) / text.bytes,
        documents=len(text.documents),
        tokens=text.predicted,
        bytes=text.bytes,
    )


def _unigram(folder: Path) -> npt.NDArray[np.int64]:
    path = folder / UNIGRAM
    vocabulary = read_manifest(folder).vocabulary
    try:
        counts = np.load(path, allow_pickle=False)
        if counts.shape != (vocabulary,):
            raise ValueError(f"shape {counts.shape}, not ({vocabulary},)")
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(f"{path} is missing or damaged ({error}): prepare the corpus again") from None
    return counts
