"""Labelled texts: the same files read anew by plain loops, in every form and of every kind."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.labelled_text import LabelledText
from statezoo.datamodules.tokenizers import Bytes, train_bpe

rng = np.random.default_rng(2)
WORDS = ["the", "a", "cat", "dog", "saw", "heard", "Zürich", "東京", "of", "quickly", "yesterday"]


def text(n=None):
    return " ".join(rng.choice(WORDS, size=n or int(rng.integers(3, 12))).tolist())


def some(n=40):
    """Distinct texts with a class each."""
    return [(f"{i} {text()}", ("no", "yes", "yes")[i % 3]) for i in range(n)]


def table(path, header, rows, sep=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=sep).writerows([header, *rows])
    return str(path)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def by_text(data):
    """Label of each text, whatever its split."""
    return {
        s.decode(): y
        for split in ("train", "val", "test")
        for s, y in zip(*data.rows(split), strict=True)
    }


def tokenizers(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(text(9) for _ in range(300)), encoding="utf-8")
    bpe = train_bpe([tmp_path / "corpus.txt"], 300, tmp_path / "bpe")
    return {"bytes": Bytes(), str(tmp_path / "bpe"): bpe}


# -------------------------------------------------------------------------- forms


def test_all_forms_of_the_same_rows_are_the_same(tmp_path):
    rows = some()
    data = {"csv": LabelledText(table(tmp_path / "a.csv", ["text", "label"], rows))}
    path = table(tmp_path / "a.tsv", ["Sentence", "target"], rows, "\t")
    data["tsv"] = LabelledText(path)
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    data["gz"] = LabelledText(str(packed))
    records = [{"said": x, "by": y, "other": 1} for x, y in rows]
    path = jsonl(tmp_path / "a.jsonl", records)
    data["jsonl"] = LabelledText(path, text_field="said", label_field="by")
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {"content": [x for x, _ in rows], "class": [y for _, y in rows]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data["parquet"] = LabelledText(str(tmp_path / "a.parquet"))
    want = {split: data["csv"].rows(split)[0] for split in ("train", "val", "test")}
    assert [len(x) for x in want.values()] == [35, 5, 0]  # 2 of 13 and 3 of 27
    for form, found in data.items():
        assert found.class_names == ["no", "yes"], form
        assert {x: found.class_names[y] for x, y in by_text(found).items()} == dict(rows), form
        assert {split: found.rows(split)[0] for split in want} == want, form


@pytest.mark.parametrize("form", ["files", "column", "folders", "classes"])
def test_splits(tmp_path, form):
    place = tmp_path / "d"
    place.mkdir()
    parts = {"train": some(20), "valid": some(6), "test": some(9)}
    if form == "files":
        for split, rows in parts.items():
            table(place / f"{split}.csv", ["text", "label"], rows)
    elif form == "column":
        rows = [(x, y, split) for split, part in parts.items() for x, y in part]
        place = Path(table(place / "a.csv", ["text", "label", "split"], rows))
    else:
        for split, rows in parts.items():
            for i, (x, y) in enumerate(rows):
                file = place / (f"{split}/{y}" if form == "folders" else y) / f"{split}{i}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(x, encoding="utf-8")
    data = LabelledText(str(place), test_fraction=0.2)
    assert data.class_names == ["no", "yes"]
    found = {split: {x.decode() for x in data.rows(split)[0]} for split in ("train", "val", "test")}
    named = {split: {x for x, _ in part} for split, part in parts.items()}
    if form == "classes":  # nothing says the split
        assert found["train"] | found["val"] | found["test"] == set().union(*named.values())
        assert min(map(len, found.values())) >= 2
        sizes = [len(found[split]) for split in ("test", "val")]
        assert sizes == [3 + 5, 1 + 2]
    else:
        assert list(found.values()) == list(named.values())


def test_held_out_texts_take_along_those_that_differ_in_case_and_blanks(tmp_path, caplog):
    rows = some(60)
    twins = [(f"  {x.upper()}  ", y) for x, y in rows[:30]]
    data = LabelledText(table(tmp_path / "a.csv", ["text", "label"], rows + twins))
    sides = {
        split: {" ".join(x.decode().casefold().split()) for x in data.rows(split)[0]}
        for split in ("train", "val")
    }
    assert not sides["train"] & sides["val"]
    named = [(x, y, "train") for x, y in rows] + [(x, y, "val") for x, y in [*twins[:3], rows[50]]]
    LabelledText(table(tmp_path / "b.csv", ["text", "label", "split"], named)).setup()
    assert (
        f"{tmp_path / 'b.csv'}: 1 rows of val are in train as well, 4 but for case and blanks: the "
        "score on val is too good"
    ) in caplog.text


# ------------------------------------------------------------------ batches and kinds


def test_padding_masks_and_what_is_too_long(tmp_path, caplog):
    rows = some()
    path = table(tmp_path / "a.csv", ["text", "label"], rows)
    for name, tokenizer in tokenizers(tmp_path).items():
        caplog.clear()
        data = LabelledText(path, name, max_length=9, batch_size=8)
        assert data.vocab_size == tokenizer.vocab_size
        wanted, seen, cut = dict(rows), 0, 0
        encoded = {tuple(tokenizer.encode(x)[:9]): y for x, y in rows}
        for batch in data.train_dataloader():
            mask = batch.get("attention_mask", torch.ones_like(batch["tokens"]))
            assert batch["labels"].dtype == torch.int64
            for ids, inside, label in zip(batch["tokens"], mask, batch["labels"], strict=True):
                n = int(inside.sum())
                assert inside.tolist() == [1] * n + [0] * (len(ids) - n)
                assert not ids[n:].any()
                assert encoded[tuple(ids[:n].tolist())] == data.class_names[label]
                seen += 1
        assert seen == len(data.rows("train")[0])
        for letters in data.rows("train")[0]:
            cut += len(tokenizer.encode(letters.decode())) > 9
        assert wanted.keys() == by_text(data).keys()
        assert cut > 0
        assert f"{cut} of 35 texts cut to their first 9 tokens: raise max_length" in caplog.text


def test_several_labels_and_numbers(tmp_path):
    sets = (["joy"], ["joy", "fear"], [], ["anger", "fear"])
    records = [{"text": x, "labels": sets[i % 4], "value": i / 4, "wide": None if i == 3 else i}
               for i, (x, _) in enumerate(some())]  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", records)
    data = LabelledText(path, kind="classes")
    assert data.class_names == ["anger", "fear", "joy"]
    found = by_text(data)
    for record in records:
        assert found[record["text"]].tolist() == [x in record["labels"] for x in data.class_names]
    numbers = LabelledText(path, kind="number", label_fields=["value", "wide"])
    found = by_text(numbers)
    for record in records:
        wide = np.nan if record["wide"] is None else record["wide"]
        np.testing.assert_array_equal(found[record["text"]], [record["value"], wide])
    assert LabelledText(path, kind="number").class_names == ["label"]
    mean, _ = numbers.number_stats
    trained = {x.decode() for x in numbers.rows("train")[0]}
    values = [r["value"] for r in records if r["text"] in trained]
    assert mean[0] == pytest.approx(sum(values) / len(values))


def sentences(n=24):
    """Words, and a tag for each: a name, another word, or not known."""
    found = []
    for i in range(n):
        words = [*text().split(), f"w{i}"]
        tags = ["NAME" if w in ("Zürich", "東京") else "?" if w == "of" else "O" for w in words]
        found.append((words, tags))
    return found


def test_words_with_tags_in_all_forms(tmp_path):
    some = sentences()
    some[0] = (["Zürich", "saw", "w0"], ["NAME", "O", "O"])
    wanted = {" ".join(words): tags for words, tags in some}
    lines = ["-DOCSTART-\tO\n\n", "# a comment\n"]
    lines += ["".join(f"{w}\tx\t{t}\n" for w, t in zip(*s, strict=True)) + "\n" for s in some]
    (tmp_path / "a.conll").write_text("".join(lines).rstrip(), encoding="utf-8")
    blank = "".join(lines).replace("\t", " ").replace("# a comment\n", "")
    (tmp_path / "b.txt").write_text(blank, encoding="utf-8")
    records = [{"tokens": w, "tags": [None if x == "?" else x for x in t]} for w, t in some]
    rows = [(" ".join(w), " ".join(t)) for w, t in some]
    paths = [tmp_path / "a.conll", tmp_path / "b.txt", jsonl(tmp_path / "a.jsonl", records),
             table(tmp_path / "a.csv", ["text", "tags"], rows)]  # fmt: skip
    for path in paths:
        data = LabelledText(str(path), kind="tags")
        assert data.class_names == ["NAME", "O"]
        found = by_text(data)
        assert found.keys() == wanted.keys(), path
        for words, tags in wanted.items():
            assert [("NAME", "O", "?")[y] for y in found[words]] == tags
        trained = [t for x in data.rows("train")[0] for t in wanted[x.decode()]]
        assert data.class_counts == [trained.count("NAME"), trained.count("O")]


def test_the_last_token_of_a_word_has_its_tag(tmp_path):
    some = sentences()
    records = [{"tokens": w, "tags": t} for w, t in some]
    path = jsonl(tmp_path / "a.jsonl", records)
    for name, tokenizer in tokenizers(tmp_path).items():
        data = LabelledText(path, name, kind="tags", batch_size=4, max_length=60)
        known = {" ".join(w): (w, t) for w, t in some}
        wanted = {}
        for joined, (words, tags) in known.items():
            labels = [IGNORE] * len(tokenizer.encode(joined))
            for i, tag in enumerate(tags):  # the prefix that ends with this word
                at = len(tokenizer.encode(" ".join(words[: i + 1]))) - 1
                labels[at] = data.class_names.index(tag) if tag != "?" else IGNORE
            wanted[tuple(tokenizer.encode(joined)[:60])] = labels[:60]
        assert any(len(x) == 60 for x in wanted) or name != "bytes"
        for batch in data.train_dataloader():
            assert batch["labels"].shape == batch["tokens"].shape
            mask = batch.get("attention_mask", torch.ones_like(batch["tokens"]))
            for ids, labels, inside in zip(batch["tokens"], batch["labels"], mask, strict=True):
                n = int(inside.sum())
                assert labels[:n].tolist() == wanted[tuple(ids[:n].tolist())]
                assert set(labels[n:].tolist()) <= {IGNORE}


def test_prediction(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"tokens": w, "tags": t} for w, t in sentences()])
    trained = LabelledText(path, kind="tags")
    (tmp_path / "new.txt").write_text("a cat  saw\n\nZürich\n", encoding="utf-8")
    data = LabelledText(predict=str(tmp_path / "new.txt"))
    data.load_state_dict(trained.state_dict())
    (batch,) = data.predict_dataloader()
    assert batch["ids"] == ["1", "3"]  # lines
    assert data.label_kind == "tags"
    ends = [[0, 4, 8], [6]]  # a cat saw; ü has two bytes
    assert [row.nonzero().flatten().tolist() for row in batch["tagged"]] == ends
    assert set(batch["labels"].flatten().tolist()) == {IGNORE}
    rows = table(tmp_path / "b.csv", ["id", "text", "label"], [("x", "one", 1), ("y", "two", 2)])
    classes = LabelledText(predict=rows)
    (batch,) = classes.predict_dataloader()
    assert batch["ids"] == ["x", "y"]
    assert batch["labels"].tolist() == [IGNORE, IGNORE]
    own = LabelledText(table(tmp_path / "c.csv", ["text", "label"], some()))
    (batch,) = own.predict_dataloader()
    assert len(batch["ids"]) == len(own.rows("val")[0])
    assert batch["labels"].tolist() == own.rows("val")[1].tolist()


def test_ten_rows_and_all_defaults(tmp_path):
    labels = {"class": "ab", "classes": ["a;b", "c"], "number": "12", "tags": ["x y", "y x"]}
    for kind, two in labels.items():
        rows = [(f"word{i} other", two[i % 2]) for i in range(10)]
        column = "tags" if kind == "tags" else "label"
        data = LabelledText(table(tmp_path / f"{kind}.csv", ["text", column], rows), kind=kind)
        sizes = [len(data.rows(split)[0]) for split in ("train", "val")]
        assert sizes == ([8, 2] if kind in ("class", "classes") else [9, 1])
        assert len(list(data.test_dataloader())) == 1


def test_default_is_the_language_reference():
    data = LabelledText()
    assert len(data.class_names) == 3
    assert min(data.class_counts) > 50
    again = LabelledText(seed=1)
    assert by_text(data).keys() == by_text(again).keys()
    assert data.rows("val")[0] != again.rows("val")[0]
    assert all(len(x) >= 60 for x in by_text(data))


# ------------------------------------------------------------------------- mistakes

MISTAKES = {
    "no text": ("class", {}, ["review", "label"], [("x", "y")],
        "PATH has no column 'text'; it has 'review', 'label': set text_field to one of them."),
    "no label": ("class", {}, ["text", "stars"], [("x", "y")],
        "PATH has no column 'label'; it has 'text', 'stars': set label_field to one of them."),
    "two rows": ("class", {}, ["text", "label"], [("x", "a"), ("y", "b")],
        "There are 2 rows to train on and 0 to validate on (0 are for the test): validation needs "
        "2 different rows of a class, or rows of its own in a split val; add some."),
    "copies": ("number", {}, ["text", "label"], [("x", "1"), (" X", "2")], "There are 2 rows to "
        "train on and 0 to validate on (0 are for the test): validation needs 2 different rows,"),
    "empty": ("class", {}, ["text", "label"], [("", "a"), (" ", "b")],
        "no text that can be used: add some.\n  2 rows, the first PATH, row 1: empty text"),
    "stars": ("number", {}, ["text", "label"], [("x", "5"), ("y", "five")],
        "PATH: 1 of 2 labels in 'label' are not numbers: ['five'] (PATH, row 2)."),
    "tags": ("tags", {}, ["text", "tags"], [("one two", "x")],
        "1 row, the first PATH, row 1: the text has not as many words as it has tags"),
    "no tags": ("tags", {}, ["word", "pos"], [("a", "b")], "PATH has no column 'tokens'; it has "
        "'word', 'pos': name a file of words with tags .conll, or set text_field to one of them."),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_table(tmp_path, mistake):
    kind, settings, header, rows, message = MISTAKES[mistake]
    path = table(tmp_path / "a.csv", header, rows)
    data = LabelledText(path, kind=kind, **settings)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared below
        data.setup()
    assert message.replace("PATH", path) in str(error.value)


def test_mistakes_with_files(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "a.txt").write_text("one text\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "a.conll").write_text("word\tO\nalone\n")
    (tmp_path / "blank.jsonl").write_text('{"tokens": ["a b"], "tags": ["O"]}\n')
    lists = jsonl(tmp_path / "lists.jsonl", [{"text": x, "label": ["a"]} for x in "xyz"])
    (tmp_path / "none").mkdir()
    for name, kind, message in (
        ("a.docx", "class", "is no file of labelled texts: accepted are names ending in .csv, "
         ".tsv, .jsonl, .parquet, .conll, also with .gz."),
        ("a.txt", "class", "a.txt is no file of labelled texts"),
        ("bad.jsonl", "class", "bad.jsonl, line 2, is no JSON (Expecting value): mend it."),
        ("list.jsonl", "class", "line 1, is no record: needed is an object with a name for each "
         "column, got '[1, 2]'."),
        ("a.conll", "tags", "a.conll, line 2: needs a word, a tab and its tag, got 'alone'."),
        ("blank.jsonl", "tags", "row 1: a word is empty or has a blank in it"),
        (Path(lists).name, "class", "3 of 3 labels are lists: ['a'] ("),
        ("none", "class", "has no file that can be read: give tables, or a folder of .txt files "
         "for each class."),
        ("gone.csv", "class", "No file or folder "),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            LabelledText(str(tmp_path / name), kind=kind).setup()
        assert message in str(error.value)


def test_mistakes_in_settings(tmp_path):
    from statezoo.datamodules.dna.tokenizers import Nucleotides

    Nucleotides().save(tmp_path / "dna")
    for settings, message in (
        ({"max_length": 0}, "LabelledText needs max_length of at least 1, got 0"),
        ({"kind": "tags"}, "The Python language reference has classes alone, no tags: set path."),
        ({"tokenizer": "characters"}, "takes the tokenizer of a model, not characters: give bytes"),
        ({"tokenizer": str(tmp_path / "dna")}, r"is a tokenizer of DNA \(nucleotides\)"),
        ({"val_fraction": 0.0}, "needs val_fraction between 0 and 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelledText(**settings)
