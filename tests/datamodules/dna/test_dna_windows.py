import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from statezoo.datamodules import DNA
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.tokenizers import train_dna_bpe


def letters(n, seed=0, alphabet="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(alphabet), size=n))


def put(folder, contigs, name="g.fa"):
    path = folder / name
    path.write_text("".join(f">{c} x\n{text}\n" for c, text in contigs.items()))
    return str(path)


def ready(*args, **kwargs):
    data = DNA(*args, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def said(data, batch):
    """Bases that the scored targets of each row stand for."""
    rows = [row[row != IGNORE].tolist() for row in batch["targets"]]
    return [data.tokenizer.decode(row) for row in rows]


def epoch(loader, n):
    """Batches of epoch ``n``."""
    loader.done = n * loader.epoch_length
    return list(loader)


@pytest.mark.parametrize(
    ("tokenizer", "seq_len"), [("characters", 7), ("characters", 50), ("kmer3", 5), ("kmer3", 64)]
)
@pytest.mark.parametrize("rc_augment", [False, True])
def test_every_base_is_a_target_once_per_epoch(tmp_path, tokenizer, seq_len, rc_augment):
    contigs = {"a": letters(997, 1), "b": letters(30, 2), "c": letters(203, 3, "ACGTacgtNR")}
    data = ready(
        put(tmp_path, contigs), tokenizer, seq_len=seq_len, batch_size=4, rc_augment=rc_augment
    )
    want = Counter()
    for text in contigs.values():
        part = text[: int(0.9 * len(text))].upper()
        want += Counter(base for base in part if base in "ACGT")
    want_both = want + Counter(reverse_complement("".join(want.elements())))
    bounds = set()
    for n in range(3):
        batches = epoch(data.train_dataloader(), n)
        found = [text for batch in batches for text in said(data, batch)]
        counts = Counter("".join(found))
        assert sum(int(batch["n_bytes"]) for batch in batches) == counts.total() == want.total()
        both = counts + Counter(reverse_complement("".join(found)))
        assert both == want_both
        if not rc_augment:
            assert counts == want
        bounds.add(tuple(sorted(map(len, found))))
    assert len(bounds) > 1, "the bounds of windows must move from epoch to epoch"


def test_shifted_windows_tile_every_region(tmp_path):
    contigs = {"a": letters(997), "b": letters(5), "c": letters(64)}
    data = ready(put(tmp_path, contigs), seq_len=8)
    windows = data.train_dataloader().windows
    for shift in range(60):
        spans = [windows.bounds(shift, w) for w in range(len(windows))]
        for i, length in enumerate(windows.lengths):
            mine = [(a, b) for region, a, b in spans if region == i]
            assert [b for _, b in mine[:-1]] == [a for a, _ in mine[1:]]
            assert (mine[0][0], mine[-1][1]) == (0, length)
            assert all(b - a <= 8 for a, b in mine)


@pytest.mark.parametrize(("seq_len", "val_context"), [(7, 0), (16, 5), (400, 100), (3000, 0)])
def test_validation_reads_the_base_before(tmp_path, seq_len, val_context):
    contigs = {"a": letters(1500, 1, "ACGTNr"), "b": letters(700, 2)}
    path = put(tmp_path, contigs | {"t": "ACGT" * 9})
    data = ready(path, seq_len=seq_len, val_context=val_context, val_contigs=["b", "a"])
    table = data.tokenizer.table
    streams = [table[np.frombuffer(t.encode(), np.uint8)].tolist() for t in contigs.values()]
    found = []
    for batch in data.val_dataloader():
        for tokens, targets in zip(
            batch["tokens"].tolist(), batch["targets"].tolist(), strict=True
        ):
            scored = [i for i, t in enumerate(targets) if t != IGNORE]
            found += [targets[i] for i in scored]
            for i in scored[1:]:
                if targets[i - 1] != IGNORE:
                    assert tokens[i] == targets[i - 1]
    assert found == [i for stream in streams for i in stream if i != 7]
    first = next(iter(data.val_dataloader()))["tokens"][0].tolist()
    assert first == ([1, *streams[0]])[: len(first)]


def test_a_causal_window_equals_a_plain_loop(tmp_path):
    text = letters(300, 4, "ACGTacgtN")
    data = ready(put(tmp_path, {"c": text}), seq_len=20, rc_augment=True, soft_mask_weight=0.25)
    windows = data.train_dataloader().windows
    ids = dict(zip("ACGTN", range(3, 8), strict=True))
    turned = 0
    for shift in (0, 3, 17):
        for w in range(len(windows)):
            _, start, stop = windows.bounds(shift, w)
            batch = windows[shift, [w]]
            size = stop - start
            ways = []
            for strand in (0, 1):
                if strand:
                    whole = reverse_complement(text)
                    a, b = len(text) - stop, len(text) - start
                else:
                    whole, a, b = text, start, stop
                before = ids[whole[a - 1].upper()] if a else 1
                read = [before, *(ids[c.upper()] for c in whole[a : b - 1])]
                want = [ids[c.upper()] if c not in "Nn" else IGNORE for c in whole[a:b]]
                weight = [0.25 if c.islower() else 1.0 for c in whole[a:b]]
                ways.append((read, want, weight))
            keys = ("tokens", "targets", "weights")
            got = tuple(batch[key][0, :size].tolist() for key in keys)
            assert got in ways
            turned += got == ways[1]
    assert 0.25 < turned / (3 * len(windows)) < 0.75


def test_weights_only_where_they_differ(tmp_path):
    path = put(tmp_path, {"c": letters(300, 4, "ACGTacgt")})
    assert "weights" not in next(iter(ready(path).train_dataloader()))
    data = ready(path, "kmer2", soft_mask_weight=0.0, seq_len=500)
    batch = data.train_dataloader().windows[0, [0]]
    text = data.genome.fetch("c", 0, 270).tobytes().decode()
    pairs = [text[i : i + 2] for i in range(0, 270, 2)]
    assert batch["weights"][0].tolist() == [sum(c.isupper() for c in p) / 2 for p in pairs]


@pytest.mark.parametrize("tokenizer", ["characters", "kmer3"])
def test_masked_objective(tmp_path, tokenizer):
    text = letters(40_000, 5, "ACGTN")
    path = put(tmp_path, {"c": text, "d": letters(35, 6)})
    data = ready(path, tokenizer, objective="masked", seq_len=500, mask_fraction=0.2)
    kinds, drawn, total, scored = Counter(), Counter(), 0, 0
    for batch in data.train_dataloader():
        tokens, targets = batch["tokens"], batch["targets"]
        assert not (targets == 7).any()
        assert not (tokens == 1).any()
        total += int(((tokens != 7) & (tokens != 0)).sum())
        at = targets != IGNORE
        scored += int(at.sum())
        for token, target in zip(tokens[at].tolist(), targets[at].tolist(), strict=True):
            kind = "mask" if token == 2 else "same" if token == target else "random"
            kinds[kind] += 1
            if kind == "random":
                drawn[token] += 1
        assert int(batch["n_bytes"]) == sum(map(len, said(data, batch)))
    assert scored / total == pytest.approx(0.2, abs=0.005)
    assert kinds["mask"] / scored == pytest.approx(0.8, abs=0.03)
    assert 0.05 < kinds["random"] / scored < 0.12
    assert set(drawn) <= set(data.tokenizer.replacements)
    if tokenizer == "characters":
        assert set(drawn) == {3, 4, 5, 6}


def test_masks_are_drawn_anew_for_training_and_fixed_for_validation(tmp_path):
    path = put(tmp_path, {"c": letters(3000, 5)})
    data = ready(path, objective="masked", seq_len=50, seed=3)
    again = ready(path, objective="masked", seq_len=50, seed=3)
    other = ready(path, objective="masked", seq_len=50, seed=4)

    def val(d):
        return torch.cat([b["targets"].flatten() for b in d.val_dataloader()]).tolist()

    assert val(data) == val(data) == val(again) != val(other)
    windows = data.train_dataloader().windows
    assert windows[7, [3]]["targets"].tolist() == windows[7, [3]]["targets"].tolist()
    hidden = {tuple((windows[s, [0]]["targets"][0, :10] != IGNORE).tolist()) for s in range(20)}
    assert len(hidden) > 3


def test_masked_rows_of_different_length_carry_a_mask(tmp_path):
    path = put(tmp_path, {"c": letters(100), "d": letters(30)})
    data = ready(path, objective="masked", seq_len=64, batch_size=8, val_contigs=["c"])
    [batch] = data.val_dataloader()
    assert batch["attention_mask"].sum(1).tolist() == [64, 36]
    assert (batch["tokens"][1, 36:] == 0).all()
    empty = data.val_dataloader().windows[0, [-1, 0]]
    assert (empty["targets"][0] == IGNORE).all()
    assert empty["attention_mask"].sum(1).tolist() == [1, 64]
    causal = ready(path, seq_len=64, val_contigs=["c"])
    assert "attention_mask" not in next(iter(causal.val_dataloader()))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_order_is_a_function_of_the_seed_alone(tmp_path, objective):
    path = put(tmp_path, {"c": letters(4000, 5, "ACGTn"), "d": letters(500, 6)})

    def batches(workers, seed=1):
        data = ready(path, objective=objective, seq_len=64, batch_size=4, num_workers=workers,
                     rc_augment=True, seed=seed)  # fmt: skip
        return [batch["tokens"].tolist() for batch in data.train_dataloader()]

    assert batches(0) == batches(2)
    assert batches(0) != batches(0, seed=2)


def test_goes_on_in_the_middle_of_an_epoch(tmp_path):
    path = put(tmp_path, {"c": letters(4000)})

    def loader():
        return ready(path, seq_len=64, batch_size=4, rc_augment=True).train_dataloader()

    first = loader()
    whole = [batch["tokens"].tolist() for batch in first]
    part = loader()
    reader = iter(part)
    for _ in range(5):
        next(reader)
    state = json.loads(json.dumps(part.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert [batch["tokens"].tolist() for batch in resumed] == whole[5:]


def test_strands_can_be_switched_on_before_the_loader_is_made(tmp_path):
    data = ready(put(tmp_path, {"c": "A" * 2000}), seq_len=50)

    def train():
        targets = torch.cat([batch["targets"].flatten() for batch in data.train_dataloader()])
        return targets[targets != IGNORE]

    assert set(train().tolist()) == {3}
    data.rc_augment = True
    assert set(train().tolist()) == {3, 6}
    assert 0.25 < float((train() == 6).float().mean()) < 0.75
    val = torch.cat([b["targets"].flatten() for b in data.val_dataloader()])
    assert set(val[val != IGNORE].tolist()) == {3}


def test_windows_pickle(tmp_path):
    windows = ready(put(tmp_path, {"c": letters(300)}), seq_len=9).train_dataloader().windows
    again = pickle.loads(pickle.dumps(windows))
    assert again[5, [0, 2]]["tokens"].tolist() == windows[5, [0, 2]]["tokens"].tolist()


def test_bits_per_base_never_include_n(tmp_path):
    text = letters(500, 1, "ACGTNRY")
    data = ready(put(tmp_path, {"c": text}), seq_len=33, val_fraction=0.5)
    n = sum(int(batch["n_bytes"]) for batch in data.val_dataloader())
    assert n == sum(base in "ACGT" for base in text[250:])
    scored = torch.cat([batch["targets"].flatten() for batch in data.val_dataloader()])
    assert n == int((scored != IGNORE).sum())
    assert not (scored == 7).any()


def test_a_window_of_kmers_equals_a_plain_loop(tmp_path):
    text = letters(400, 4, "ACGTacgtACGTN")
    data = ready(put(tmp_path, {"c": text}), "kmer3", seq_len=10, val_context=4, val_fraction=0.5)
    encode = data.tokenizer.encode
    windows = data.val_dataloader().windows
    at = 200
    for w in range(len(windows)):
        _, start, stop = windows.bounds(0, w)
        assert 200 + start == at
        at = 200 + stop
        low = at - (stop - start) - (12 if w else 0)  # 4 words of context
        context, body = encode(text[low : 200 + start]), encode(text[200 + start : at])
        batch = windows[0, [w]]
        read = [encode(text[low - 3 : low])[-1], *context, *body][:-1]
        assert batch["tokens"][0].tolist() == read
        want = [IGNORE] * len(context) + [i if i != 7 else IGNORE for i in body]
        assert batch["targets"][0].tolist() == want
    assert at == 400


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_learnt_pieces_cover_every_base(tmp_path, objective):
    text = letters(3000, 1, "ACGTN")
    path = put(tmp_path, {"c": text})
    train_dna_bpe([path], 30, tmp_path / "tok")
    data = ready(path, str(tmp_path / "tok"), objective=objective, seq_len=20, rc_augment=True,
                 mask_fraction=1.0)  # fmt: skip
    n = sum(int(batch["n_bytes"]) for batch in data.train_dataloader())
    assert n == sum(base != "N" for base in text[:2700])
    assert data.complement is None


@pytest.mark.slow
def test_a_genome_of_a_billion_bases_costs_no_memory(tmp_path):
    width, rows = 80, 12_500  # lines of 80 bases; a block of 1 Mb
    block = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", np.uint8), size=(rows, width))
    lines = np.concatenate([block, np.full((rows, 1), 10, np.uint8)], axis=1).tobytes()
    path = tmp_path / "big.fa"
    with path.open("wb") as out:
        for n in range(4):
            out.write(b">chr%d\n" % n)
            for _ in range(250):
                out.write(lines)
    code = f"""
import json, os, time
from statezoo.datamodules import DNA

def private(pid):  # kB that this process has for itself, its share of what others share added
    with open(f"/proc/{{pid}}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))

def all_pss():
    me = os.getpid()
    with open(f"/proc/{{me}}/task/{{me}}/children") as file:
        return sum(map(private, [me, *map(int, file.read().split())])) / 1024

before = all_pss()
data = DNA({str(path)!r}, seq_len=131072, batch_size=2, num_workers=2, val_contigs=["chr3"])
data.prepare_data()
data.setup()
started, first, most, bases = time.time(), None, 0, 0
for n, batch in enumerate(data.train_dataloader()):
    first = first or time.time() - started
    bases += int(batch["n_bytes"])
    if n % 50 == 0:
        most = max(most, all_pss())
    if n == 400:
        break
print(json.dumps([before, most, first, bases / (time.time() - started)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, most, first, speed = json.loads(done.stdout.splitlines()[-1])
    assert most - before < 300, (before, most, first, speed)
    assert first < 10, (before, most, first, speed)
