import gzip
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from statezoo.datamodules import Text
from statezoo.datamodules.readers import Document, source_for
from statezoo.datamodules.records import Report


def read(path, text_field="text"):
    report = Report()
    return list(source_for(str(path), text_field).documents(report)), report


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def test_all_kinds_in_sub_folders(tmp_path):
    deep = tmp_path / "sub/deep"
    deep.mkdir(parents=True)
    (tmp_path / "a.TXT").write_text("one\r\nline")
    (deep / "b.txt.gz").write_bytes(gzip.compress("zwei é".encode()))
    (deep / "c.jsonl").write_text('{"text": "three", "n": 1}\n\n"four"\n')
    (deep / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}'))
    parquet(tmp_path / "sub/e.parquet", text=["six", "seven"], n=[1, 2])
    (tmp_path / ".hidden.txt").write_text("no")
    documents, report = read(tmp_path)
    texts = ["one\r\nline", "zwei é", "three", "four", "five", "six", "seven"]
    assert [doc.text.decode() for doc in documents] == texts
    assert not report
    assert read(deep / "c.jsonl")[0] == [Document(b"three"), Document(b"four")]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts/sub/a.txt").write_text("one")
    (tmp_path / "elsewhere/b.txt").write_text("two")
    (tmp_path / "texts/sub/up").symlink_to(tmp_path / "texts")
    (tmp_path / "texts/zwei").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/drei").symlink_to(tmp_path / "elsewhere")
    assert [doc.text for doc in read(tmp_path / "texts")[0]] == [b"two", b"one"]


def test_what_is_skipped_is_said_with_place_reason_and_remedy(tmp_path, caplog):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 5000)[:-12])
    (tmp_path / "not.txt.gz").write_bytes(b"plain")
    (tmp_path / "mixed.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n{"text": 3}\n{"other": 1}\n{"text": "\xff"}\n{"text": ""}\n'
        b'{"text": "\\ud800"}\n{"text": "more"}'
    )
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "nothing.jsonl").write_text("")
    documents, report = read(tmp_path)
    assert [doc.text for doc in documents] == [b"good", b"more"]
    text = "\n".join(report)
    for part in (
        "bad.txt: byte 0xe9 at offset 3 is not UTF-8; convert",
        "empty.txt: empty",
        "cut.txt.gz: cannot be read to its end",
        "not.txt.gz: cannot be read to its end",
        "mixed.jsonl: 1 line, the first number 2: not JSON",
        "mixed.jsonl: 2 lines, the first number 3: no text in field 'text'",
        "the first number 5: byte 0xff is not UTF-8",
        "the first number 6: empty text",
        "the first number 7: half a character",
        "broken.parquet: not a whole parquet file",
        "1 files of other kinds (.md)",
        "nothing.jsonl: empty",
    ):
        assert part in text, part
    with caplog.at_level(logging.WARNING):
        Text(str(tmp_path)).setup()
    assert "skipped" in caplog.text
    assert "bad.txt: byte 0xe9 at offset 3" in caplog.text
    caplog.clear()
    Text(str(tmp_path)).setup()  # from the cache
    assert "bad.txt: byte 0xe9 at offset 3" in caplog.text


def test_marks_of_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("utf-8-sig"))
    (tmp_path / "b.txt").write_bytes("é".encode("utf-16"))
    (tmp_path / "c.jsonl").write_bytes('"é"'.encode("utf-8-sig"))
    assert [doc.text for doc in read(tmp_path)[0]] == ["é".encode()] * 3


def test_missing_path_says_what_exists():
    with pytest.raises(FileNotFoundError, match=r"No file or folder './nowhere/x' .*\.jsonl"):
        Text("./nowhere/x")


def test_folder_without_text_lists_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"found no file at all, accepted .*\.txt"):
        Text(str(tmp_path))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"found a\.pdf, accepted .*\.txt\.gz"):
        Text(str(tmp_path))
    with pytest.raises(ValueError, match=r"found a\.pdf, accepted"):
        Text(str(tmp_path / "a.pdf"))


def test_only_empty_files(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"No text in (.|\n)*a\.txt: empty; add text"):
        Text(str(tmp_path)).setup()


def test_one_byte_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="add text"):
        Text(str(tmp_path)).setup()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_unknown_field_names_those_there_are(tmp_path, kind):
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "title": "y"}))
    else:
        parquet(tmp_path / "a.parquet", body=["x"], title=["y"])
    with pytest.raises(ValueError, match="'text'; it has 'body', 'title': set text_field"):
        read(tmp_path)
    assert read(tmp_path, "body")[0] == [Document(b"x")]


def test_parquet_without_its_package(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pyarrow: pip install 'statezoo\[data\]'"):
        Text(str(tmp_path))


def test_saved_datasets(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict(train=one, validation=datasets.Dataset.from_dict({"text": ["v"]}))
    both.save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "one")[0] == [Document(b"a"), Document(b"b")]
    assert read(tmp_path / "both")[0] == [
        Document(b"a", "train"), Document(b"b", "train"), Document(b"v", "val"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"\[train\]: row 0 has no field 'body'; it has 'text'"):
        read(tmp_path / "both", "body")


def test_hub_datasets_are_streamed(monkeypatch):
    class Info:
        sha = "abc"

    def load_dataset(name, config, *, revision, streaming):
        assert (name, config, revision, streaming) == ("org/stories", "small", "abc", True)
        rows = datasets.Dataset.from_dict({"text": ["once", "upon", "a time"]})
        return datasets.IterableDatasetDict(train=rows.to_iterable_dataset())

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name: Info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Text("org/stories:small", max_bytes=10)
    data.setup()
    assert sorted(data.raw("train") + data.raw("val")) == sorted(b"onceupona ")


def test_hub_name_that_is_not_there(monkeypatch):
    def fail(self, name):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(ValueError, match=r"'org/x' is neither a file .* no route"):
        Text("org/x")
