import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.packing import TokenFile, Windows

BOS = 99


def windows(tmp_path, sizes, **kwargs):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(sum(sizes), dtype=np.uint16))
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    segments = np.stack([bounds[:-1], bounds[1:]], axis=1)
    return Windows(TokenFile(path), segments, bos_id=BOS, **kwargs)


def test_two_documents_by_hand(tmp_path):
    found = windows(tmp_path, [3, 2], seq_len=4)
    batch = found[0, [0, 1]]
    assert batch["tokens"].tolist() == [[BOS, 0, 1, BOS], [3, BOS, BOS, BOS]]
    assert batch["targets"].tolist() == [[0, 1, 2, 3], [4, IGNORE, IGNORE, IGNORE]]
    assert batch["n_bytes"].item() == 5
    assert "cu_seqlens" not in batch


def test_packed_documents_by_hand(tmp_path):
    found = windows(tmp_path, [3, 2], seq_len=4, packed=True)
    batch = found[0, [0, 1]]
    assert batch["tokens"].shape == batch["targets"].shape == (1, 8)
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 8]
    assert batch["cu_seqlens"].dtype == torch.int32


def test_context_is_read_but_not_scored_again(tmp_path):
    found = windows(tmp_path, [8], seq_len=4, context=2)
    batch = found[0, list(range(len(found)))]
    assert batch["tokens"].tolist() == [[BOS, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6]]
    assert batch["targets"].tolist() == [
        [0, 1, 2, 3],
        [IGNORE, IGNORE, 4, 5],
        [IGNORE] * 2 + [6, 7],
    ]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    seq_len=st.integers(1, 12),
    packed=st.booleans(),
    data=st.data(),
)
def test_every_token_is_a_target_once_and_reads_its_predecessor(
    tmp_path, sizes, seq_len, packed, data
):
    shift = data.draw(st.integers(0, sum(sizes) - 1))
    context = 0 if shift else data.draw(st.integers(0, seq_len - 1))
    found = windows(tmp_path, sizes, seq_len=seq_len, packed=packed, context=context)
    batch = found[shift, list(range(len(found)))]
    tokens, targets = batch["tokens"].flatten(), batch["targets"].flatten()
    scored = targets != IGNORE
    assert sorted(targets[scored].tolist()) == list(range(sum(sizes)))
    first = set(np.concatenate([[0], np.cumsum(sizes)]).tolist())
    for read, said in zip(tokens[scored].tolist(), targets[scored].tolist(), strict=True):
        assert read == (BOS if said in first else said - 1)
    if packed:  # the state is reset where a document begins
        starts = set(batch["cu_seqlens"].tolist())
        begins = [i for i, said in enumerate(targets.tolist()) if said in first]
        assert starts >= set(begins) | set(range(0, len(tokens) + 1, seq_len))
        assert starts - set(begins) - set(range(0, len(tokens) + 1, seq_len)) <= {
            i for i, read in enumerate(tokens.tolist()) if read == BOS
        }


def test_a_window_of_another_rank_scores_nothing(tmp_path):
    batch = windows(tmp_path, [5], seq_len=4)[0, [-1]]
    assert (batch["targets"] == IGNORE).all()
    assert batch["n_bytes"].item() == 0


def test_pickles_as_a_path(tmp_path):
    found = windows(tmp_path, [50_000], seq_len=4)
    before = found[7, [3, 5]]
    copy = pickle.dumps(found)
    assert len(copy) < 2_000
    assert torch.equal(pickle.loads(copy)[7, [3, 5]]["targets"], before["targets"])


def test_wrong_context(tmp_path):
    with pytest.raises(ValueError, match="0 <= context < seq_len=4"):
        windows(tmp_path, [5], seq_len=4, context=4)


def test_no_tokens(tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        windows(tmp_path, [0, 0], seq_len=4)
