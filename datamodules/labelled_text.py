"""Texts with labels, as batches for classifiers, taggers and regressions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.examples import Unusable
from statezoo.datamodules.labelled import LabelledData
from statezoo.datamodules.labelled_batches import LabelledRows
from statezoo.datamodules.labelled_rows import Row
from statezoo.datamodules.labels import Kind, Labels
from statezoo.datamodules.text_rows import TextRows, paragraphs
from statezoo.datamodules.tokenizers import Tokenizer, load_tokenizer

__all__ = ["LabelledText", "last_tokens"]

log = logging.getLogger(__name__)


class LabelledText(LabelledData):
    """Texts with labels: yours, or paragraphs of the Python language reference by their part.

    Tables have columns for the text (``text``, ``sentence`` or ``content``) and the label
    (``label``, ``class`` or ``target``), and may have ``split`` (train, val or valid or dev, test)
    and ``id``. A folder has files called train, val and test, or sub-folders for each class with
    .txt files, or such sub-folders within folders of these names. Where there is no validation
    split, a part of the training rows of each class is held out, texts that differ in case and
    blanks alone together; without a test split, the test is run on the validation split.

    Labels are of one ``kind``. ``class``: one of several. ``classes``: any of several; a cell as
    ``a;b`` or ``a,b``, ``-`` for none, a list, or a column of 0 and 1 for each (``label_fields``).
    ``number``: a measurement, or several (``label_fields``). ``tags``: one for each word; columns
    ``tokens`` and ``tags`` with lists or with words between blanks, or a .conll file: a word, a
    tab and its tag on each line (of more columns the first and the last count), a blank line
    between sentences; ``?`` where a tag is not known.

    The tag of a word is that of its last token, and its other tokens have none: a causal model has
    read the whole word only there, and a bidirectional one sees all of it anywhere. Words are read
    with one blank between them.

    Args:
        path: .csv, .tsv, .jsonl, .parquet or .conll, packed with gzip or not, a folder of these or
            of a sub-folder for each class, or a dataset on the Hub, ``org/name`` or
            ``org/name:config``. Default: paragraphs of the Python language reference that ships
            with the interpreter, on statements, expressions or data.
        tokenizer: That of the pretrained model: ``bytes``, a ``tokenizer.json``, a folder with
            one, the .ckpt of a run, or a model's name.
        predict: Texts to predict, in any of these formats, without labels, or a .txt file with one
            on each line; default those of the test. With ``path`` left out, nothing else is read.
        kind: What labels are: ``class``, ``classes``, ``number`` or ``tags``.
        max_length: Tokens that are read of a text, from its beginning; longer ones are counted.
        text_field: Column with the text; default text, sentence or content; of tags, tokens.
        label_field: Column with the label; default label, class or target; of tags, tags.
        label_fields: Columns of several labels of 0 and 1, or of several numbers, instead.
        val_fraction: Part of the training rows to validate on where no split says it.
        test_fraction: Part of the training rows to test on where no split says it.
        batch_size: Texts per batch and process.
        seed: Draws the held-out rows and the order of training.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: If a setting is out of range, or a file cannot be used; says what it has.
        FileNotFoundError: If there is no such file.
    """

    unit = "byte"
    default = "the Python language reference"
    what = "text"
    nearly = "but for case and blanks"

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str = "bytes",
        predict: str | None = None,
        *,
        kind: Kind = "class",
        max_length: int = 512,
        text_field: str | None = None,
        label_field: str | None = None,
        label_fields: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.predict, self.kind = path, predict, kind
        self.max_length, self.text_field = max_length, text_field
        self.label_field, self.label_fields = label_field, label_fields or []
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.check(("max_length", 1))
        if path is None and predict is None and kind != "class":
            raise ValueError(
                f"The Python language reference has classes alone, no {kind}: set path."
            )
        self.tokenizer: Tokenizer = _tokenizer(tokenizer)

    def source(self, path: str, *, labelled: bool) -> TextRows:
        """What reads ``path``."""
        return TextRows(
            path, self.row_kind, self.text_field, self.label_field, self.label_fields, labelled
        )

    def default_rows(self) -> Iterable[Row]:
        """Paragraphs of the Python language reference."""
        return paragraphs()

    def fit(self, row: Row) -> Iterator[Row]:
        """Bring words with tags into the form in which they are read."""
        if self.row_kind != "tags":
            yield row
            return
        words = (row.content or b"").split()
        tags = row.label.split() if isinstance(row.label, str) else row.label
        if isinstance(tags, list) and len(tags) != len(words):
            raise Unusable("the text has not as many words as it has tags")
        yield row._replace(content=b" ".join(words), label=tags)

    def places(self, content: bytes) -> int:
        """Words of a text."""
        return len(content.split())

    def keys(self, contents: Sequence[bytes]) -> tuple[list[object], list[bytes]]:
        """Alike for equal texts; for those that differ in case and blanks alone."""
        return [hash(text) for text in contents], [_key(text) for text in contents]

    def batches(
        self, contents: list[bytes], labels: Labels, *, train: bool, names: list[str] | None
    ) -> LabelledRows:
        """Batches of some texts; says how many were cut."""
        parts, tags, cut, shared = [], [], 0, 0
        for row, text in enumerate(contents):
            ids, sizes = self.tokenizer.encode_document(text)
            ids = ids if len(ids) else np.array([self.tokenizer.bos_id])
            if labels.kind == "tags":
                at = last_tokens(text, len(ids), sizes)
                shared += len(at) - len(np.unique(at))
                own = np.full(len(ids), IGNORE, dtype=np.int16)
                own[at] = labels.tags(row)
                tags.append(own[: self.max_length])
            cut += len(ids) > self.max_length
            parts.append(ids[: self.max_length].astype(self.tokenizer.dtype))
        if labels.kind == "tags":
            labels = Labels("tags", labels.names, tags)
        if cut and self.tells():
            log.warning(
                f"{cut:,} of {len(contents):,} texts cut to their first {self.max_length} tokens: "
                "raise max_length to read more."
            )
        if shared and self.tells():
            log.warning(f"{shared:,} words end in one token with others: the last one's tag counts")
        return LabelledRows(parts, labels, pad_id=0, blank=self.tokenizer.bos_id, names=names)


def last_tokens(text: bytes, n: int, sizes: NDArray[np.uint32] | None) -> NDArray[np.int64]:
    """``[words]`` number of the token in which each word ends.

    Args:
        text: Words with one blank between them.
        n: Tokens of the text.
        sizes: ``[n]`` bytes of each token; None is one each.
    """
    words = np.array([len(word) for word in text.split(b" ")], dtype=np.int64)
    ends = np.cumsum(words + 1) - 1
    bounds = np.arange(1, n + 1) if sizes is None else np.cumsum(sizes, dtype=np.int64)
    first = np.searchsorted(bounds, ends)  # the token in which the last byte is
    # what stands for part of a character has no bytes of its own but belongs to the word
    last = np.searchsorted(bounds, ends, side="right") - 1
    found: NDArray[np.int64] = np.minimum(np.maximum(first, last), n - 1)
    return found


def _key(text: bytes) -> bytes:
    plain = " ".join(text.decode("utf-8", "replace").casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=12).digest()


def _tokenizer(source: str) -> Tokenizer:
    """A tokenizer of text that does not depend on the labelled texts.

    Raises:
        ValueError: If it would, or is one of DNA.
    """
    from statezoo.datamodules.dna.tokenizers import DNATokenizer

    wanted = "give bytes, a tokenizer.json, its folder, the .ckpt of a run, or a model's name"
    if source == "characters":
        raise ValueError(f"LabelledText takes the tokenizer of a model, not characters: {wanted}.")
    found: Any = load_tokenizer(source)
    if isinstance(found, DNATokenizer):
        raise ValueError(f"{source} is a tokenizer of DNA ({found.kind}): {wanted}.")
    return found  # type: ignore[no-any-return]
