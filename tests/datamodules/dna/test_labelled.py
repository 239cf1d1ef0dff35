"""Labelled sequences: every form of file gives the same rows; mistakes are told as they are."""

import gzip
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.dna.labelled import LabelledDNA
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.synthetic import NAME

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "dna" / "labelled"
rng = np.random.default_rng(0)


def dna(n):
    return rng.choice(np.frombuffer(b"ACGT", np.uint8), size=n).tobytes().decode()


def some(n=60, length=30):
    """Name, sequence, label of distinct sequences of one length."""
    return [(f"s{i}", dna(length), ("no", "yes", "yes")[i % 3]) for i in range(n)]


def csv(path, rows, header="id,sequence,label", sep=","):
    text = "\n".join([header.replace(",", sep), *(sep.join(map(str, row)) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def epoch(loader):
    return list(loader)


def content(data):
    """All rows of a data module, by split."""
    return {
        split: list(zip(*(x if isinstance(x, list) else x.tolist() for x in data.rows(split)),
                        strict=True))
        for split in ("train", "val", "test")
    }  # fmt: skip


@pytest.fixture
def rows():
    return some()


def test_all_forms_of_the_same_rows_give_identical_batches(tmp_path, rows):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    forms = {"csv": LabelledDNA(csv(tmp_path / "a.csv", rows))}
    forms["csv.gz"] = LabelledDNA(csv(tmp_path / "a.csv.gz", rows))
    forms["tsv"] = LabelledDNA(csv(tmp_path / "a.tsv", rows, sep="\t"))
    names, sequences, labels = map(list, zip(*rows, strict=True))
    table = pa.table({"id": names, "s": sequences, "y": labels})
    pq.write_table(table, tmp_path / "a.parquet")
    forms["parquet"] = LabelledDNA(str(tmp_path / "a.parquet"), sequence_field="s", label_field="y")
    fasta = tmp_path / "a.fa"
    fasta.write_text("".join(f">{n} more words\n{s[:13]}\n{s[13:]}\n" for n, s, _ in rows))
    csv(tmp_path / "y.csv", [(n, y) for n, _, y in rows][::-1], "id,label")
    forms["fasta"] = LabelledDNA(str(fasta), labels=str(tmp_path / "y.csv"))
    piped = tmp_path / "b.fa"
    piped.write_text("".join(f">{n}|{y}\n{s}\n" for n, s, y in rows))
    forms["piped"] = LabelledDNA(str(piped))
    # BED: the sequences end to end on one contig, every other one on the reverse strand
    strands = ["+-"[i % 2] for i in range(len(rows))]
    placed = [
        s if strand == "+" else reverse_complement(s)
        for s, strand in zip(sequences, strands, strict=True)
    ]
    (tmp_path / "g.fa").write_text(">chr1\n" + "".join(placed) + "\n")
    bed = [f"1\t{30 * i}\t{30 * i + 30}\t{y}\t0\t{strands[i]}" for i, y in enumerate(labels)]
    (tmp_path / "a.bed").write_text("track name=x\n" + "\n".join(bed) + "\n")
    forms["bed"] = LabelledDNA(str(tmp_path / "a.bed"), genome=str(tmp_path / "g.fa"))
    want = content(forms["csv"])
    assert Counter(map(len, want.values())) == Counter([54, 6, 0])
    batches = epoch(forms["csv"].train_dataloader())
    for form, data in forms.items():
        assert data.class_names == ["no", "yes"], form
        assert content(data) == want, form
        for mine, theirs in zip(epoch(data.train_dataloader()), batches, strict=True):
            assert torch.equal(mine["tokens"], theirs["tokens"]), form
            assert torch.equal(mine["labels"], theirs["labels"]), form


def test_saved_dataset_keeps_the_names_of_its_classes(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    names, sequences, labels = map(list, zip(*rows, strict=True))
    table = {"id": names, "sequence": sequences, "label": [int(y == "yes") for y in labels]}
    kinds = datasets.Features(
        id=datasets.Value("string"),
        sequence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    data = datasets.Dataset.from_dict(table, features=kinds)
    datasets.DatasetDict(train=data, test=data.select(range(9))).save_to_disk(tmp_path / "d")
    found = LabelledDNA(str(tmp_path / "d"))
    assert found.class_names == ["no", "yes"]
    assert len(found.rows("test")[0]) == 9
    assert found.rows("test")[1].tolist() == table["label"][:9]


@pytest.mark.parametrize("form", ["nt", "gue", "fasta per class", "folder per class", "no splits"])
def test_folders(tmp_path, form):
    rows = {"train": some(30), "dev": some(12), "test": some(9)}
    for split, part in rows.items():
        place = tmp_path / split
        if form == "gue":
            csv(tmp_path / f"{split}.csv", part)
        elif form == "nt" and split != "dev":
            text = "".join(f">{n}|{y}\n{s}\n" for n, s, y in part)
            (tmp_path / f"{split}.fna").write_text(text)
        elif form in ("fasta per class", "folder per class") and split != "dev":
            for label in ("no", "yes"):
                kept = [(n, s) for n, s, y in part if y == label]
                if form == "fasta per class":
                    place.mkdir(exist_ok=True)
                    text = "".join(f">{n}\n{s}\n" for n, s in kept)
                    (place / f"{label}.fa").write_text(text)
                else:  # as GenomicBenchmarks writes them: a sequence per file
                    (place / label).mkdir(parents=True)
                    for n, s in kept:
                        (place / label / f"{n}.txt").write_text(s)
        elif form == "no splits" and split == "train":
            for label in ("no", "yes"):
                kept = [(n, s) for n, s, y in part if y == label]
                csv(tmp_path / f"{label}.csv", kept, "id,sequence")
    data = LabelledDNA(str(tmp_path))
    assert data.class_names == ["no", "yes"]
    found = {split: {s.decode() for s, _ in part} for split, part in content(data).items()}
    train, dev, test = ({s for _, s, _ in rows[split]} for split in rows)
    if form == "gue":
        assert (found["train"], found["val"], found["test"]) == (train, dev, test)
    else:  # the validation is carved from train, never from test
        assert found["train"] | found["val"] == train
        assert len(found["val"]) == 3
        assert found["test"] == (set() if form == "no splits" else test)
    assert data.test_split == ("val" if form == "no splits" else "test")


def test_numbers_are_classes_in_their_order(tmp_path):
    rows = [(dna(20), (10, 9.0, 2)[i % 3]) for i in range(30)]
    data = LabelledDNA(csv(tmp_path / "a.csv", rows, "sequence,label"))
    assert data.class_names == ["2", "9.0", "10"]
    assert data.class_counts == [9, 9, 9]


def test_case_and_ambiguity(tmp_path, rows, caplog):
    changed = [(n, s.lower() if i % 2 else s, y) for i, (n, s, y) in enumerate(rows)]
    changed[0] = ("s0", "acgtnRYK" + rows[0][1][8:], "no")
    with caplog.at_level(logging.INFO):
        data = LabelledDNA(csv(tmp_path / "a.csv", changed), batch_size=60)
        data.setup()
        assert data.class_names == ["no", "yes"]
    assert "1 N, 3 other IUPAC codes read as N" in caplog.text
    all_rows = [s.decode() for split in ("train", "val") for s in data.rows(split)[0]]
    assert changed[0][1] in all_rows  # the case is kept until it is encoded
    ids = data.tokenizer.encode_array(np.frombuffer(b"acgtnRYK", dtype=np.uint8))[0]
    assert ids.tolist() == [3, 4, 5, 6, 7, 7, 7, 7]


def test_held_out_rows_are_stratified_and_take_their_copies_along(tmp_path):
    base = [(dna(25), "ab"[i % 4 == 0]) for i in range(200)]
    copies = [(reverse_complement(s).lower(), y) for s, y in base[:80]]
    path = csv(tmp_path / "a.csv", base + copies, "sequence,label")
    data = LabelledDNA(path, val_fraction=0.2, seed=3)
    found = content(data)
    keys = {
        split: {min(s.upper(), reverse_complement(s.upper())) for s, _ in part}
        for split, part in found.items()
    }
    assert not keys["train"] & keys["val"]
    share = Counter(y for _, y in found["val"])
    assert 0.18 * 70 < share[1] < 0.25 * 70  # 50 + 20 rows of class b
    assert 0.18 * 210 < share[0] < 0.25 * 210
    assert content(LabelledDNA(path, val_fraction=0.2, seed=3)) == found
    assert content(LabelledDNA(path, val_fraction=0.2, seed=4)) != found


def test_contigs_to_validate_on(tmp_path):
    genome = {name: dna(500) for name in ("chr1", "chr2")}
    (tmp_path / "g.fa").write_text("".join(f">{n}\n{s}\n" for n, s in genome.items()))
    lines = [f"chr{1 + i % 2}\t{i * 10}\t{i * 10 + 10}\t{'ab'[i % 3 == 0]}" for i in range(40)]
    (tmp_path / "a.bed").write_text("\n".join(lines))
    settings = {"path": str(tmp_path / "a.bed"), "genome": str(tmp_path / "g.fa")}
    data = LabelledDNA(**settings, val_contigs=["2"], window=50)
    sequences, _ = data.rows("val")
    assert len(sequences) == 20
    at = 3 * 10 + 5 - 25  # the second interval of chr2 is 30-40
    assert sequences[1].decode() == genome["chr2"][at : at + 50]
    first = 10 + 5 - 25  # that of the first begins before the contig does
    assert sequences[0].decode() == "N" * -first + genome["chr2"][: 50 + first]
    with pytest.raises(ValueError, match=r"names 'chr7', on which no interval is; there are chr1,"):
        LabelledDNA(**settings, val_contigs=["chr7"]).setup()


def test_batches_are_padded_and_masked_only_where_lengths_differ(tmp_path, rows):
    same = LabelledDNA(csv(tmp_path / "a.csv", rows), batch_size=8)
    for batch in same.train_dataloader():
        assert "attention_mask" not in batch
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    mixed = [(n, s[: 2 + 7 * i % 29], y) for i, (n, s, y) in enumerate(rows)]
    data = LabelledDNA(csv(tmp_path / "b.csv", mixed), batch_size=7)
    sequences, labels = data.rows("val")
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == labels.tolist()
    assert batch["tokens"].shape == (len(sequences), max(map(len, sequences)))
    for letters, ids, mask in zip(sequences, batch["tokens"], batch["attention_mask"], strict=True):
        assert mask.tolist() == [1] * len(letters) + [0] * (len(mask) - len(letters))
        assert data.tokenizer.decode(ids[mask == 1].tolist()) == letters.decode()
        assert not ids[mask == 0].any()  # [PAD]


def test_like_lengths_share_a_batch_and_every_row_comes_once(tmp_path):
    rows = [(dna(int(rng.integers(2, 200))), "ab"[i % 2]) for i in range(400)]
    data = LabelledDNA(csv(tmp_path / "a.csv", rows, "sequence,label"), batch_size=16)
    loader = data.train_dataloader()
    batches = epoch(loader)
    read = Counter(
        data.tokenizer.decode(ids[ids > 0].tolist()) for b in batches for ids in b["tokens"]
    )
    assert read == Counter(s.decode() for s in data.rows("train")[0])
    padding = sum(int((b["tokens"] == 0).sum()) for b in batches) / sum(
        b["tokens"].numel() for b in batches
    )
    assert padding < 0.1  # unsorted: about one half
    widths = [b["tokens"].shape[1] for b in batches]
    assert widths != sorted(widths)
    again = epoch(loader)  # the next epoch, in another order
    assert [b["tokens"].shape for b in again] != [b["tokens"].shape for b in batches]


def test_resumes_where_it_was(tmp_path, rows):
    path = csv(tmp_path / "a.csv", rows)
    data = LabelledDNA(path, batch_size=10)
    data.rc_augment = True
    whole = [b["tokens"] for _ in range(1) for b in epoch(data.train_dataloader())]
    loader = data.train_dataloader()
    reader = iter(loader)
    next(reader), next(reader)
    other = LabelledDNA(path, batch_size=10)
    other.rc_augment = True
    resumed = other.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    for mine, theirs in zip([b["tokens"] for b in epoch(resumed)], whole[2:], strict=True):
        assert torch.equal(mine, theirs)


def test_either_strand_is_read_in_training_alone(tmp_path, rows):
    data = LabelledDNA(csv(tmp_path / "a.csv", rows), batch_size=54)
    data.rc_augment = True
    loader = data.train_dataloader()
    given = {s.decode() for s in data.rows("train")[0]}
    other = {reverse_complement(s) for s in given}
    parts = []
    for _ in range(2):
        (batch,) = loader
        read = {data.tokenizer.decode(ids.tolist()) for ids in batch["tokens"]}
        assert read <= given | other
        assert 10 < len(read & given) < 44
        parts.append(read)
    assert parts[0] != parts[1]  # drawn anew each epoch
    (batch,) = data.val_dataloader()
    assert {data.tokenizer.decode(ids.tolist()) for ids in batch["tokens"]} == {
        s.decode() for s in data.rows("val")[0]
    }


def test_prediction_keeps_names_and_order(tmp_path, rows):
    fasta = tmp_path / "new.fa"
    fasta.write_text("".join(f">{n} x\n{s}\n" for n, s, _ in rows[:5]))
    table = csv(tmp_path / "new.csv", [(n, s) for n, s, _ in rows[:5]], "id,sequence")
    for path in (str(fasta), table):
        data = LabelledDNA(predict=path, batch_size=2)
        data.setup("predict")
        batches = epoch(data.predict_dataloader())
        assert [name for b in batches for name in b["ids"]] == ["s0", "s1", "s2", "s3", "s4"]
        assert {int(y) for b in batches for y in b["labels"]} == {IGNORE}
        read = [data.tokenizer.decode(ids.tolist()) for b in batches for ids in b["tokens"]]
        assert read == [s for _, s, _ in rows[:5]]
    trained = LabelledDNA(csv(tmp_path / "a.csv", rows))
    data.load_state_dict(trained.state_dict())
    assert data.class_names == ["no", "yes"]
    own = epoch(trained.predict_dataloader())
    assert len([name for b in own for name in b["ids"]]) == len(trained.rows("val")[0])


def test_checkpoint_of_other_classes_is_refused(tmp_path, rows):
    data = LabelledDNA(csv(tmp_path / "a.csv", rows))
    other = LabelledDNA(csv(tmp_path / "b.csv", [(n, s, y + "!") for n, s, y in rows]))
    with pytest.raises(ValueError, match="has the classes no!, yes!, this data no, yes"):
        data.load_state_dict(other.state_dict())
    words = LabelledDNA(csv(tmp_path / "c.csv", rows), tokenizer="kmer3")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        data.load_state_dict(words.state_dict())


def test_rows_that_cannot_be_used_are_counted(tmp_path, rows, caplog):
    bad = [("e", "", "no"), ("u", "ACGU", "no"), ("v", "AUUU", "yes"), ("w", dna(30), "")]
    data = LabelledDNA(csv(tmp_path / "a.csv", rows + bad))
    data.setup()
    name = tmp_path / "a.csv"
    for line in (
        f"{name}: skipped 1 row, the first {name}, row 61: empty sequence",
        f"{name}: skipped 2 rows, the first {name}, row 62: the sequence has 'U', which is no "
        "letter of DNA; this is RNA: write T for U, for example with seqkit seq --rna2dna",
        f"{name}: skipped 1 row, the first {name}, row 64: no label",
    ):
        assert line in caplog.text
    assert sum(len(data.rows(split)[0]) for split in ("train", "val")) == len(rows)


def test_rows_in_two_splits_are_counted_and_told(tmp_path, caplog):
    rows = [(s, y, "train") for _, s, y in some(40)]
    rows += [(rows[0][0], "no", "test"), (reverse_complement(rows[1][0]), "yes", "test")]
    rows += [(s, y, ("val", "test")[i % 2]) for i, (_, s, y) in enumerate(some(10))]
    LabelledDNA(csv(tmp_path / "a.csv", rows, "sequence,label,split")).setup()
    assert (
        f"{tmp_path / 'a.csv'}: 1 rows of test are in train as well, 2 counting reverse "
        "complements: the score on test is too good"
    ) in caplog.text


def test_long_sequences_are_cut_to_their_middle(tmp_path, rows, caplog):
    data = LabelledDNA(csv(tmp_path / "a.csv", rows), window=10)
    wanted = {s[10:20] for _, s, _ in rows}
    assert {s.decode() for split in ("train", "val") for s in data.rows(split)[0]} == wanted
    assert "60 sequences cut to the middle 10 bases" in caplog.text


def test_validation_only_split_is_trained_on(tmp_path, caplog):
    rows = [(s, y, ("valid", "test")[i % 2]) for i, (_, s, y) in enumerate(some(60))]
    data = LabelledDNA(csv(tmp_path / "a.csv", rows, "sequence,label,split"))
    assert {k: len(v) for k, v in content(data).items()} == {"train": 27, "val": 3, "test": 30}
    assert "no training split: the validation split is trained on" in caplog.text


MISTAKES = {
    "no column": ("id,sequence,y", [("a", "ACGT", 1)], "has no column 'label'; it has 'id', "
                  "'sequence', 'y': set label_field to one of them."),
    "no header": ("ACGTACGTACGTACGTACGTACGT,1", [("ACGA", 0)], "its first line looks like data"),
    "no rows": ("sequence,label", [], "is empty: it has no rows."),
    "no DNA": ("sequence,label", [("MKVLE", 1), ("PLLQ", 0)], "has no sequence that can be used: "
               "add some.\n  1 row, the first"),
    "protein": ("sequence,label", [("MELF", 1), ("PLLQ", 0)], "this looks like protein"),
    "one class": ("sequence,label", [("ACGT", 1), ("AAAA", 1)], "has one class only, '1' (2 rows)"),
    "measurements": ("sequence,label", [(dna(12), i / 7) for i in range(300)],
                     "has 300 different labels in 300 rows"),
    "split": ("sequence,label,split", [("ACGT", 1, "holdout")], "has the split 'holdout': use one "
              "of train, training, val"),
    "two rows": ("sequence,label", [("ACGT", 1), ("AAAA", 0)], "There are 2 rows to train on"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_table(tmp_path, mistake):
    header, rows, message = MISTAKES[mistake]
    data = LabelledDNA(csv(tmp_path / "a.csv", rows, header))
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared below
        data.class_names  # noqa: B018
    assert message in str(error.value)
    assert str(tmp_path / "a.csv") in str(error.value) or mistake == "two rows"


def test_mistakes_with_files(tmp_path, rows):
    fasta = tmp_path / "a.fa"
    fasta.write_text("".join(f">{n}\n{s}\n" for n, s, _ in rows))
    (tmp_path / "empty.fa").touch()
    (tmp_path / "text.fa").write_text("hello\n")
    (tmp_path / "a.bed").write_text("chr1\t0\t10\tx\n")
    (tmp_path / "far.bed").write_text("s1\t0\t31\tx\n")
    (tmp_path / "short.bed").write_text("s1\t0\t10\n")
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "none").mkdir()
    packed = gzip.compress(Path(csv(tmp_path / "a.csv", rows)).read_bytes())
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    other = csv(tmp_path / "y.csv", [("t1", "no"), ("t2", "yes")], "id,label")
    nameless = csv(tmp_path / "z.csv", [("t1", "no")], "key,label")
    genome = {"genome": str(fasta)}
    cases = [
        ("a.fa", {}, "a.fa has no labels: set labels to a table with columns id and label"),
        ("a.fa", {"labels": other}, "No name of .*a.fa is in .*y.csv, which has 't1' and 1 more; "
         "the FASTA has 's59'"),
        ("a.fa", {"labels": nameless}, "has no column 'id'; it has 'key', 'label': rename one"),
        ("a.fa", {"labels": str(tmp_path / "q.csv")}, "No table of labels"),
        ("empty.fa", {}, "empty.fa is empty: add rows or remove it"),
        ("text.fa", {"labels": other}, "no FASTA file: it begins with 'hello' instead of '>'"),
        ("cut.csv.gz", {}, "cut.csv.gz is a damaged or truncated gzip file"),
        ("a.bed", {}, "a.bed needs the genome that its intervals are of: set genome"),
        ("a.bed", genome, "has no contig 'chr1'; nearest is 's1'"),
        ("far.bed", genome, "line 1: s1:0-31 is no interval of the contig, which has 30 bases"),
        ("short.bed", genome, "line 1: needs contig, start, end and label, got"),
        ("a.docx", {}, "is no file of labelled sequences: accepted are names ending in .csv"),
        ("none", {}, "has no file that can be read"),
    ]  # fmt: skip
    for file, more, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            LabelledDNA(str(tmp_path / file), **more).setup()
    with pytest.raises(FileNotFoundError, match=r"No file or folder '.*gone.csv' \(.* exists\)"):
        LabelledDNA(str(tmp_path / "gone.csv")).setup()


def test_mistakes_in_settings():
    for settings, message in (
        ({"batch_size": 0}, "LabelledDNA needs batch_size of at least 1, got 0"),
        ({"window": 0}, "LabelledDNA needs window of at least 1, got 0"),
        ({"val_fraction": 1.0}, "needs val_fraction between 0 and 1, got 1.0"),
        ({"labels": "y.csv"}, "labels needs path"),
        ({"tokenizer": "words"}, "No tokenizer 'words' for DNA"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelledDNA(**settings)


def test_default_is_synthetic_and_says_so():
    data = LabelledDNA()
    data.setup()
    assert data.class_names == ["coding", "noncoding"]
    one, other = data.class_counts
    assert min(one, other) > 4000
    assert abs(one - other) < 0.03 * one
    sequences, labels = data.rows("test")
    assert {len(s) for s in sequences} == {60}
    assert 900 < len(labels) < 1500
    batch = next(iter(data.predict_dataloader()))
    assert all(name.startswith(f"{NAME}:") for name in batch["ids"])


def test_real_splice_junctions():
    if not DATA.is_dir():
        pytest.skip("the shared data is not here")
    data = LabelledDNA(str(DATA / "uci_splice.csv.gz"))
    assert data.class_names == ["EI", "IE", "N"]
    assert [len(data.rows(split)[0]) for split in ("train", "val", "test")] == [2399, 321, 470]
