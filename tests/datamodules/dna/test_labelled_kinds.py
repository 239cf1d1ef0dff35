"""Several labels, numbers and tags of DNA: the same files read anew by plain loops."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.dna.features import paint
from statezoo.datamodules.dna.labelled import LabelledDNA

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "dna"
rng = np.random.default_rng(1)


def dna(n):
    return rng.choice(np.frombuffer(b"ACGT", np.uint8), size=n).tobytes().decode()


def table(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def by_sequence(data):
    """Label of each sequence, whatever its split."""
    return {
        s.decode(): y
        for split in ("train", "val", "test")
        for s, y in zip(*data.rows(split), strict=True)
    }


def error_of(data):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.setup()
    return str(error.value)


def test_labels_in_one_cell_and_in_columns_of_0_and_1_are_the_same(tmp_path):
    some = [(dna(20), labels) for labels in ("a;b", "b", "-", "c; a", "b;c", "a") * 8]
    one = LabelledDNA(table(tmp_path / "a.csv", ["sequence", "label"], some), kind="classes")
    columns = [[s, *(int(x in y.replace(" ", "").split(";")) for x in "abc")] for s, y in some]
    path = table(tmp_path / "b.csv", ["sequence", "a", "b", "c"], columns)
    many = LabelledDNA(path, kind="classes", label_fields=["a", "b", "c"])
    commas = [(s, y.replace(";", ",")) for s, y in some]
    other = LabelledDNA(table(tmp_path / "c.csv", ["sequence", "label"], commas), kind="classes")
    wanted = {row[0]: row[1:] for row in columns}
    for data in (one, many, other):
        assert data.label_kind == "classes"
        assert data.class_names == ["a", "b", "c"]
        assert {s: y.tolist() for s, y in by_sequence(data).items()} == wanted
        trained = np.array([wanted[s.decode()] for s in data.rows("train")[0]])
        assert data.class_counts == trained.sum(axis=0).tolist()
        batch = next(iter(data.val_dataloader()))
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].shape == (len(data.rows("val")[0]), 3)
        assert len(batch["labels"]) >= 3  # at least one of each rarest label


def test_an_empty_cell_of_a_column_is_unknown(tmp_path):
    rows = [(dna(20), i % 2, "" if i % 3 else 1 - i % 2) for i in range(30)]
    rows.append((dna(20), "", ""))
    path = table(tmp_path / "a.csv", ["sequence", "x", "y"], rows)
    data = LabelledDNA(path, kind="classes", label_fields=["x", "y"])
    found = by_sequence(data)
    assert len(found) == 30  # a row without any label is left out
    for sequence, x, y in rows[:30]:
        assert found[sequence][0] == x
        assert np.isnan(found[sequence][1]) if y == "" else found[sequence][1] == y


def test_numbers_and_their_statistics(tmp_path):
    rows = [(dna(20), i / 7 - 1, "" if i == 5 else f"{i}e-2") for i in range(40)]
    path = table(tmp_path / "a.csv", ["sequence", "y", "z"], rows)
    data = LabelledDNA(path, kind="number", label_fields=["y", "z"], test_fraction=0.2)
    assert data.class_names == ["y", "z"]
    wanted = {s: (np.float32(y), np.float32(z or "nan")) for s, y, z in rows}
    found = by_sequence(data)
    assert found.keys() == wanted.keys()
    for sequence, values in found.items():
        np.testing.assert_array_equal(values, wanted[sequence])
    sizes = {split: len(data.rows(split)[0]) for split in ("train", "val", "test")}
    assert sizes == {"train": 28, "val": 4, "test": 8}
    trained = np.array([wanted[s.decode()] for s in data.rows("train")[0]])
    assert data.class_counts == (~np.isnan(trained)).sum(axis=0).tolist()
    mean, std = data.number_stats
    np.testing.assert_allclose(mean, np.nanmean(trained, axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(trained, axis=0), rtol=1e-6)
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].shape == (4, 2)


def test_one_number_from_a_bed_file_with_scores_for_names(tmp_path):
    (tmp_path / "g.fa").write_text(f">c\n{dna(400)}\n")
    bed = "".join(f"c\t{10 * i}\t{10 * i + 10}\t{i * 0.25}\n" for i in range(40))
    (tmp_path / "a.bed").write_text(bed)
    data = LabelledDNA(str(tmp_path / "a.bed"), genome=str(tmp_path / "g.fa"), kind="number")
    assert data.class_names == ["label"]
    assert sorted(y for split in ("train", "val") for y in data.rows(split)[1][:, 0]) == [
        i * 0.25 for i in range(40)
    ]


def tagged(n=30):
    """Sequences with tags: those of A and C are s, those of G and T w, the first is not known."""
    found = []
    for i in range(n):
        sequence = dna(10 + i)
        tags = "?" + "".join("s" if base in "AC" else "w" for base in sequence[1:])
        found.append((sequence, tags))
    return found


def test_tags_in_letters_lists_and_json_are_the_same(tmp_path):
    rows = tagged()
    forms = [table(tmp_path / "a.csv", ["sequence", "tags"], rows)]
    lists = [(s, [None, *tags[1:]]) for s, tags in rows]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"sequence": s, "tags": tags}) + "\n" for s, tags in lists)
    )
    cells = [(s, json.dumps(tags)) for s, tags in lists]
    forms += [str(tmp_path / "a.jsonl"), table(tmp_path / "b.csv", ["sequence", "tags"], cells)]
    for path in forms:
        data = LabelledDNA(path, kind="tags", batch_size=8)
        assert data.class_names == ["s", "w"]
        found = by_sequence(data)
        assert found.keys() == dict(rows).keys()
        for sequence, tags in rows:
            assert ["sw?"[y] for y in found[sequence]] == list(tags)
        trained = "".join(dict(rows)[s.decode()] for s in data.rows("train")[0])
        assert data.class_counts == [trained.count("s"), trained.count("w")]


def test_batches_of_tags_are_padded_like_their_tokens(tmp_path):
    rows = tagged()
    data = LabelledDNA(table(tmp_path / "a.csv", ["sequence", "tags"], rows), kind="tags")
    for batch in data.train_dataloader():
        assert batch["labels"].shape == batch["tokens"].shape
        assert batch["labels"].dtype == torch.int64
        for ids, mask, labels in zip(
            batch["tokens"], batch["attention_mask"], batch["labels"], strict=True
        ):
            n = int(mask.sum())
            assert set(labels[n:].tolist()) <= {IGNORE}
            tags = dict(rows)[data.tokenizer.decode(ids[:n].tolist())]
            wanted = [{"s": 0, "w": 1, "?": IGNORE}[tag] for tag in tags]
            assert labels[:n].tolist() == wanted


def test_tags_go_with_their_bases_on_the_other_strand(tmp_path):
    # on the other strand A and C are T and G: what was tagged s must now stand on T and G
    rows = [(s, tags.replace("?", "s" if s[0] in "AC" else "w")) for s, tags in tagged(200)]
    path = table(tmp_path / "a.csv", ["sequence", "tags"], rows)
    data = LabelledDNA(path, kind="tags", batch_size=64)
    data.rc_augment = True
    strands = {True: 0, False: 0}
    for batch in data.train_dataloader():
        for ids, labels in zip(batch["tokens"], batch["labels"], strict=True):
            letters = data.tokenizer.decode(ids.tolist())
            tags = "".join("sw"[y] for y in labels.tolist() if y != IGNORE)
            same = tags == "".join("s" if base in "AC" else "w" for base in letters)
            other = tags == "".join("s" if base in "GT" else "w" for base in letters)
            assert same != other
            strands[same] += 1
    assert min(strands.values()) > 60


def test_long_sequences_with_tags_are_cut_into_pieces(tmp_path):
    rows = tagged()
    path = table(tmp_path / "a.csv", ["sequence", "tags"], rows)
    data = LabelledDNA(path, kind="tags", window=7)
    pieces = [(s[i : i + 7], y[i : i + 7]) for s, y in rows for i in range(0, len(s), 7)]
    found = [
        (s.decode(), "".join("sw?"[y] for y in tags))
        for split in ("train", "val")
        for s, tags in zip(*data.rows(split), strict=True)
    ]
    assert sorted(found) == sorted(pieces)


def test_prediction_of_tags_says_where_they_are_due(tmp_path):
    trained = LabelledDNA(table(tmp_path / "a.csv", ["sequence", "tags"], tagged()), kind="tags")
    new = table(tmp_path / "new.csv", ["id", "sequence"], [("x", "ACGTA"), ("y", "ACG")])
    data = LabelledDNA(predict=new)
    assert not hasattr(data, "label_kind")
    data.load_state_dict(trained.state_dict())
    assert (data.label_kind, data.class_names) == ("tags", ["s", "w"])
    (batch,) = data.predict_dataloader()
    assert batch["ids"] == ["x", "y"]
    assert set(batch["labels"].flatten().tolist()) == {IGNORE}
    assert batch["tagged"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_the_shortest_feature_wins_then_the_first():
    features = [(0, 10, "long"), (2, 6, "short"), (4, 8, "equal"), (11, 12, "other")]
    names, codes = paint(14, features)
    assert [names[c] for c in codes] == (
        ["long"] * 2 + ["short"] * 4 + ["equal"] * 2 + ["long"] * 2 + ["none", "other"]
        + ["none"] * 2
    )  # fmt: skip


def genome(tmp_path):
    letters = {"chr1": dna(1000), "chr2": "N" * 100 + dna(450), "chr3": dna(99)}
    (tmp_path / "g.fa").write_text("".join(f">{n}\n{s}\n" for n, s in letters.items()))
    return letters, str(tmp_path / "g.fa")


def test_bed_and_gff_tag_the_same_bases(tmp_path):
    letters, fasta = genome(tmp_path)
    features = [("chr1", 10, 200, "CDS"), ("chr1", 150, 400, "CDS"), ("2", 120, 130, "tRNA"),
                ("chr1", 990, 1000, "tRNA")]  # fmt: skip
    bed = tmp_path / "a.bed"
    bed.write_text("# x\n" + "".join("\t".join(map(str, f)) + "\n" for f in features))
    gff = tmp_path / "a.gff3.gz"
    lines = [f"{c}\t.\t{kind}\t{a + 1}\t{b}\t.\t-\t.\t." for c, a, b, kind in features]
    lines += ["chr1\t.\tgene\t1\t1000\t.\t+\t.\t.", "chr9\t.\tCDS\t1\t10\t.\t+\t.\t."]
    gff.write_bytes(gzip.compress(("##gff-version 3\n" + "\n".join(lines) + "\n").encode()))
    wanted = {name: ["none"] * len(s) for name, s in letters.items()}
    for contig, start, end, kind in features:
        name = contig if contig in letters else f"chr{contig}"
        for base in range(start, end):
            wanted[name][base] = kind
    for path in (str(bed), f"{gff}:CDS,tRNA"):
        data = LabelledDNA(path, genome=fasta, kind="tags", window=50, test_fraction=0.2)
        assert data.class_names == ["CDS", "none", "tRNA"]
        found = {split: [] for split in ("train", "val", "test")}
        for split, names in found.items():
            for batch in data.load(data.windows(split, list(map(str, range(99))))):
                names += batch["ids"]
        assert [len(x) for x in found.values()] == [14 + 6, 2 + 1, 4 + 2]  # 2 of chr2 are N
        pieces = [
            (s.decode(), [data.class_names[y] for y in tags])
            for split in found
            for s, tags in zip(*data.rows(split), strict=True)
        ]
        cut = [
            (letters[name][at : at + 50], wanted[name][at : at + 50])
            for name in ("chr1", "chr2")  # chr3 has no feature
            for at in range(0, len(letters[name]), 50)
            if set(letters[name][at : at + 50]) != {"N"}
        ]
        assert sorted(pieces) == sorted(cut)
        # the end of each contig is held out
        ends = {letters["chr1"][at : at + 50] for at in range(800, 1000, 50)}
        ends |= {letters["chr2"][at : at + 50] for at in (450, 500)}
        assert {s.decode() for s in data.rows("test")[0]} == ends
    contigs = LabelledDNA(str(bed), genome=fasta, kind="tags", window=50, val_contigs=["2"])
    assert {s.decode() for s in contigs.rows("val")[0]} <= {
        letters["chr2"][at : at + 50] for at in range(0, 550, 50)
    }


def test_default_tags_are_of_the_synthetic_genome():
    data = LabelledDNA(kind="tags", window=4096)
    assert "none" in data.class_names
    assert "CDS" in data.class_names
    assert sum(data.class_counts) == sum(map(len, data.rows("train")[0]))
    assert all(len(data.rows(split)[0]) > 10 for split in ("train", "val", "test"))


def test_real_genes_of_e_coli(tmp_path):
    gff, fasta = DATA / "ecoli_k12_mg1655.gff.gz", DATA / "ecoli_k12_mg1655.fa.gz"
    if not gff.is_file():
        pytest.skip("the shared data is not here")
    data = LabelledDNA(f"{gff}:CDS,tRNA,rRNA", genome=str(fasta), kind="tags", window=4096)
    features = []
    for line in gzip.decompress(gff.read_bytes()).decode().splitlines():
        fields = line.split("\t")
        if len(fields) > 4 and fields[2] in ("CDS", "tRNA", "rRNA"):
            features.append((int(fields[4]) - int(fields[3]) + 1, int(fields[3]) - 1, fields[2]))
    free, wanted = np.ones(4641652, dtype=bool), Counter()
    for size, start, kind in sorted(features):  # the shortest takes its bases first
        wanted[kind] += int(free[start : start + size].sum())
        free[start : start + size] = False
    wanted["none"] = int(free.sum())
    assert data.class_names == ["CDS", "none", "rRNA", "tRNA"]
    found = np.zeros(4, dtype=int)
    for split in ("train", "val"):
        for tags in data.rows(split)[1]:
            found += np.bincount(tags, minlength=4)
    assert dict(zip(data.class_names, found.tolist(), strict=True)) == wanted
    assert [len(data.rows(split)[0]) for split in ("train", "val")] == [1021, 113]


def test_real_splice_junctions_as_several_labels():
    path = DATA / "labelled" / "uci_splice.csv.gz"
    if not path.is_file():
        pytest.skip("the shared data is not here")
    one, many = LabelledDNA(str(path)), LabelledDNA(str(path), kind="classes")
    assert many.class_names == one.class_names == ["EI", "IE", "N"]
    assert [len(many.rows(s)[0]) for s in ("train", "val", "test")] == [2399, 321, 470]
    assert (many.rows("test")[1].argmax(axis=1) == one.rows("test")[1]).all()


def test_ten_rows_and_all_defaults(tmp_path):
    for kind, label in (("class", "ab"), ("classes", "ab"), ("number", "12"), ("tags", "xy")):
        rows = [(dna(8), (label[0] * 4 + label[1] * 4) if kind == "tags" else label[i % 2])
                for i in range(10)]  # fmt: skip
        column = "tags" if kind == "tags" else "label"
        path = table(tmp_path / f"{kind}.csv", ["sequence", column], rows)
        data = LabelledDNA(path, kind=kind)
        sizes = [len(data.rows(split)[0]) for split in ("train", "val")]
        assert sizes == ([8, 2] if kind in ("class", "classes") else [9, 1])
        assert len(list(data.test_dataloader())) == 1


MISTAKES = {
    "words for numbers": ("number", {}, [("ACGT", "high"), ("ACGA", "2")],
        "a.csv: 1 of 2 labels in 'label' are not numbers: ['high'] (PATH, row 1). Kind number "
        "needs numbers, and an empty cell where it is unknown; for names of classes set kind: "
        "class."),
    "infinite": ("number", {}, [("ACGT", "inf"), ("ACGA", "2")], "are not numbers: ['inf']"),
    "numbers for classes": ("class", {}, [(dna(9), i / 8) for i in range(10)],
        "has 10 different labels in 10 rows ('0.0', '0.125', '0.25', ...): 'label' holds "
        "measurements or names. Set label_field to a column of classes, or kind: number to "
        "predict measurements."),
    "no answers": ("classes", {"label_fields": ["label"]}, [("ACGT", "2"), ("ACGA", "1")],
        "1 of 2 labels in 'label' are not 0 or 1: ['2'] (PATH, row 1). Kind classes needs 0 or 1"),
    "no column": ("classes", {"label_fields": ["label", "b"]}, [("ACGT", "1")],
        "has no column 'b'; it has 'sequence', 'label': set label_fields to the names of columns."),
    "tags too short": ("tags", {"label_field": "label"}, [("ACGT", "xyx"), ("ACGA", "xy")],
        "no sequence that can be used: add some.\n  2 rows, the first PATH, row 1: the sequence "
        "has not as many letters as it has tags"),
    "one tag": ("tags", {}, [("ACGT", "xxxx")], "has one class only, 'x' (1 rows)"),
    "one row": ("number", {}, [("ACGT", "1")], "There are 1 rows to train on and 0 to validate on "
        "(0 are for the test): validation needs 2 different rows, or rows of its own in a split "
        "val; add some."),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_table(tmp_path, mistake):
    kind, settings, rows, message = MISTAKES[mistake]
    path = table(tmp_path / "a.csv", ["sequence", "label"], rows)
    data = LabelledDNA(path, kind=kind, **settings)
    assert message.replace("PATH", path) in error_of(data)


def test_mistakes_with_features(tmp_path):
    _, fasta = genome(tmp_path)
    gff = tmp_path / "a.gff"
    gff.write_text("chr1\t.\tgene\t1\t2000\t.\t+\t.\t.\nchr1\t.\tgene\t1\t20\t.\t+\t.\t.\n")
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t1\t20\n")
    for path, message in (
        (gff, f"{gff}, line 1: chr1:0-2000 is no interval of the contig, which has 1000 bases"),
        (f"{gff}:CDS", f"{gff} has no feature 'CDS'; it has gene (2): write the kinds after the "
         "file's name, as in a.gff:CDS,tRNA."),
        (bed, f"{bed}, line 1: needs contig, start, end and name, got 'chr1 1 20'."),
    ):  # fmt: skip
        assert message in error_of(LabelledDNA(str(path), genome=fasta, kind="tags"))
    message = f"{gff} needs the genome that its features are of: set genome."
    assert error_of(LabelledDNA(str(gff), kind="tags")) == message


def test_mistakes_in_settings():
    for settings, message in (
        ({"kind": "labels"}, "needs kind of class, classes, number, tags, got 'labels'"),
        ({"kind": "number"}, "The SYNTHETIC genome has classes and tags, no number: set path."),
        ({"kind": "tags", "tokenizer": "kmer3"}, "Tags need a token for each base, tokenizer kmer3 "
         "has up to 3 in one: set tokenizer: characters."),
        ({"label_fields": ["a"]}, r"reads one column for kind class: set label_field instead of "
         r"label_fields=\['a'\], or kind: classes or number."),
        ({"kind": "number", "label_fields": ["a"], "label_field": "b"}, "takes label_field or "
         "label_fields, not both"),
        ({"test_fraction": 0.9}, "test_fraction of at least 0 and rows left to train on"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LabelledDNA(**settings)
    with pytest.raises(ValueError, match="number_stats needs kind: number, this data has class"):
        LabelledDNA().number_stats  # noqa: B018


def test_checkpoint_of_another_kind_is_refused(tmp_path):
    rows = [(dna(9), i % 2) for i in range(20)]
    path = table(tmp_path / "a.csv", ["sequence", "label"], rows)
    state = LabelledDNA(path, kind="number").state_dict()
    with pytest.raises(ValueError, match="predicts labels of kind number, this data has class"):
        LabelledDNA(path).load_state_dict(state)
