"""Sampling under grammar and task, against the network run whole and against plain loops."""

import numpy as np
import pytest
import torch

from statezoo.datamodules.music.notes import Piece, TrackInfo
from statezoo.datamodules.music.tokenizers import music_tokenizer
from statezoo.music.decoding import Rules, Sampling, open_model, sample, score, state_after
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

KINDS = [
    ("satb", {}),
    ("satb", {"hold": True}),
    ("remi", {}),
    ("remi", {"programs": True}),
    ("tsd", {}),
    ("midilike", {}),
    ("midilike", {"programs": True}),
    ("performance", {}),
]
MIXERS = [["gla"], [{"name": "mamba2", "head_dim": 16, "d_state": 8}], ["gla", "attention"]]
BAR = 1920


def network(tokenizer, mixers=("gla",), spread=1.0):
    torch.manual_seed(0)
    config = StateZooConfig(vocab_size=tokenizer.vocab_size, d_model=16, mixers=[*mixers])
    net = StateZooForCausalLM(config).eval()
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight * 20 * spread)
    return net


def tune(bars=4, program=0):
    rng = np.random.default_rng(0)
    n = 8 * bars
    columns = np.arange(n) * 240, np.full(n, 240), rng.integers(60, 72, n), np.full(n, 80), 0 * n
    notes = np.stack(np.broadcast_arrays(*columns), axis=1)
    return Piece((TrackInfo("Tune", program),), notes, time_signatures=((0, 4, 4),))


def bounds(tokenizer, bars=4):
    return (8000, 16000) if tokenizer.kind == "performance" else (bars * BAR, 2 * bars * BAR)


def draw(tokenizer, net, rows=2, sampling=Sampling(seed=3), forced=None, **rules):  # noqa: B008
    prompt = tokenizer.encode_piece(tune())
    start, end = bounds(tokenizer)
    allowed = Rules(tokenizer, start=start, end=end, **rules)
    settings = {"rows": rows, "end": end, "allowed": allowed, "sampling": sampling}
    return prompt, sample(net, tokenizer, prompt, forced=forced, **settings)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_rows_end_exactly_and_hold_to_the_grammar(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    prompt, rows = draw(tokenizer, network(tokenizer, spread=0.1), rows=3)
    start, end = bounds(tokenizer)
    assert len({tuple(row.ids) for row in rows}) == 3
    for row in rows:
        state = state_after(tokenizer, prompt)
        for token in row.ids:
            assert state.tick < end
            assert tokenizer.allowed(state)[token]
            state = tokenizer.advance(state, token)
        assert state == row.state
        assert state.tick == end
        piece = tokenizer.decode_piece([*prompt, *row.ids])
        old = (piece.onset < start).sum()
        assert old == (tokenizer.decode_piece(prompt).onset < start).sum()


@pytest.mark.parametrize("mixers", MIXERS)
def test_log_probability_is_that_of_the_network_under_the_mask(mixers):
    tokenizer = music_tokenizer("remi")
    net = network(tokenizer, mixers)
    prompt, rows = draw(tokenizer, net)
    start, end = bounds(tokenizer)
    for row in rows:
        ids = torch.tensor([[tokenizer.bos_id, *prompt, *row.ids]])
        with torch.no_grad():
            logits = net(ids).logits[0].double()
        state, allowed = state_after(tokenizer, prompt), Rules(tokenizer, start=start, end=end)
        follow = type(row)(0, state)
        for place, token in enumerate(row.ids):
            mask = torch.from_numpy(allowed(follow))
            scores = logits[len(prompt) + place].masked_fill(~mask, -torch.inf)
            expected = scores.log_softmax(-1)[token].item()
            assert row.log_probs[place] == pytest.approx(expected, abs=2e-4)
            follow = follow.after(token, tokenizer.advance(follow.state, token), expected)
        assert row.log_prob == pytest.approx(sum(row.log_probs))


def test_the_same_seed_gives_the_same_tokens_however_many_rows():
    tokenizer = music_tokenizer("tsd")
    net = network(tokenizer, spread=0.1)
    one, again, more = (draw(tokenizer, net, rows=rows)[1] for rows in (2, 2, 4))
    other = draw(tokenizer, net, sampling=Sampling(seed=4))[1]
    assert [row.ids for row in one] == [row.ids for row in again]
    assert [row.ids for row in one] == [row.ids for row in more[:2]]
    assert [row.ids for row in one] != [row.ids for row in other]


def test_greedy_takes_the_likeliest_and_needs_no_seed():
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)
    rows = draw(tokenizer, net, sampling=Sampling(0.0, seed=1))[1]
    other = draw(tokenizer, net, rows=1, sampling=Sampling(0.0, seed=2))[1]
    assert rows[0].ids == rows[1].ids == other[0].ids
    ids = [tokenizer.bos_id, *tokenizer.encode_piece(tune())]
    for token in rows[0].ids[:40]:
        with torch.no_grad():
            logits = net(torch.tensor([ids])).logits[0, -1]
        logits[tokenizer.bos_id] = -torch.inf
        assert token == logits.argmax()
        ids.append(token)


def test_allowed_tokens_of_tiny_probability():
    tokenizer = music_tokenizer("remi")
    net = network(tokenizer)
    with torch.no_grad():
        net.lm_head.weight[tokenizer.names.index("Pitch_100")] *= 1e4  # what the mask forbids
    rows = draw(tokenizer, net, pitches=(48, 60))[1]
    for row in rows:
        assert np.isfinite(row.log_probs).all()
        assert "Pitch_100" not in [tokenizer.names[i] for i in row.ids]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_pitch_range(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    prompt, rows = draw(tokenizer, network(tokenizer, spread=0.1), pitches=(50, 53))
    start, _ = bounds(tokenizer)
    for row in rows:
        piece = tokenizer.decode_piece([*prompt, *row.ids])
        new = piece.pitch[(piece.onset >= start) & ~piece.drums]  # drums are apart
        assert len(new)
        assert set(new) <= {50, 51, 52, 53}


@pytest.mark.parametrize("kind", ["remi", "tsd", "midilike"])
def test_programs(kind):
    tokenizer = music_tokenizer(kind, programs=True)
    prompt, rows = draw(tokenizer, network(tokenizer, spread=0.1), rows=6, programs={32, -1})
    players = set()
    for row in rows:
        piece = tokenizer.decode_piece([*prompt, *row.ids])
        new = piece.notes[piece.onset >= bounds(tokenizer)[0]]
        players |= {(piece.tracks[i].is_drum, piece.tracks[i].program) for i in new[:, 4]}
    assert len(players) == 2
    assert all(drum or program == 32 for drum, program in players)


def test_merged_tokens_hold_to_the_rules():
    pieces = [tune().transposed(shift) for shift in range(-3, 4)]
    plain = music_tokenizer("remi")
    tokenizer = plain.train(pieces, plain.vocab_size + 12)
    assert any("+" in name for name in tokenizer.names)
    prompt, rows = draw(tokenizer, network(tokenizer, spread=0.05), rows=1, pitches=(50, 80))
    piece = tokenizer.decode_piece([*prompt, *rows[0].ids])
    new = piece.onset >= 4 * BAR
    assert (~new).sum() == 32
    assert set(piece.pitch[new]) <= {*range(50, 81)}
    assert rows[0].state.tick == 8 * BAR


def test_forced_tokens_come_whatever_the_rules_say():
    tokenizer = music_tokenizer("satb")
    net = network(tokenizer)
    soprano = tokenizer.names.index("Pitch_81")

    def forced(row):
        return soprano if row.state.voice == 0 else None

    _, rows = draw(tokenizer, net, forced=forced, pitches=(40, 60))
    for row in rows:
        assert set(row.ids[::4]) == {soprano}
        assert soprano not in row.ids[1::4]
        assert np.isfinite(row.log_probs).all()


def test_time_goes_on_in_a_crowd():
    """A network that would write programs and notes of one time for ever."""
    tokenizer = music_tokenizer("tsd", programs=True)
    net = network(tokenizer, spread=0.01)
    times = [i for i, name in enumerate(tokenizer.names) if name.startswith("TimeShift")]
    allowed = Rules(tokenizer, end=BAR)
    bias = torch.zeros(tokenizer.vocab_size)
    bias[times] = -1e4

    def hostile(*args, **kwargs):
        out = type(net).forward(net, *args, **kwargs)
        out.logits = out.logits + bias
        return out

    net.forward = hostile
    (row,) = sample(net, tokenizer, [], rows=1, end=BAR, allowed=allowed)
    assert row.state.tick == BAR


def test_score_is_a_plain_loop():
    tokenizer = music_tokenizer("tsd")
    net = network(tokenizer)
    ids = tokenizer.encode_piece(tune(1))
    found = score(net, tokenizer, ids)
    assert found.shape == (len(ids),)
    for place in (0, 1, len(ids) - 1):
        before = torch.tensor([[tokenizer.bos_id, *ids[:place]]])
        with torch.no_grad():
            logits = net(before).logits[0, -1].double()
        assert found[place] == pytest.approx(logits.log_softmax(-1)[ids[place]].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, 1.0), [0.5, 0.3, 0.2]),
        (Sampling(1.0, 0.6), [0.625, 0.375, 0]),
        (Sampling(1.0, 0.4), [1, 0, 0]),
        (Sampling(1.0, 1.0, 2), [0.625, 0.375, 0]),
        (Sampling(0.5), [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        (Sampling(0.0), [1, 0, 0]),
    ],
)
def test_weights(sampling, expected):
    scores = np.log([0.5, 0.3, 0.2, 0.9])
    scores[3] = -np.inf
    assert sampling.weights(scores) == pytest.approx([*expected, 0])


def test_mistakes(tmp_path):
    remi, several = music_tokenizer("remi"), music_tokenizer("remi", programs=True)
    with pytest.raises(ValueError, match=r"name no instruments, so programs cannot be chosen"):
        Rules(remi, end=1, programs={0})
    with pytest.raises(ValueError, match=r"0 to 127, or -1 for drums; got 0, 200\."):
        Rules(several, end=1, programs={0, 200})
    with pytest.raises(ValueError, match=r"36 to 81, is in the range 90 to 99\."):
        Rules(music_tokenizer("satb"), end=1, pitches=(90, 99))
    with pytest.raises(ValueError, match=r"top_p in \(0, 1\]; got -1, 0, 0, 1\."):
        draw(remi, network(remi), sampling=Sampling(-1))
    with pytest.raises(ValueError, match=r"at least one row, got 0\."):
        draw(remi, network(remi), rows=0)
    net = network(remi)
    nothing = np.zeros(remi.vocab_size, dtype=bool)
    with pytest.raises(ValueError, match=r"nothing may follow at tick 0 of row 0"):
        sample(net, remi, [], rows=1, end=BAR, allowed=lambda row: nothing)
    with pytest.raises(ValueError, match=r"cannot run on device 'nowhere'"):
        open_model((net, remi), "x", "nowhere")


def test_a_model_of_text_is_named_as_such(tmp_path):
    from statezoo.datamodules.tokenizers import Bytes

    net = StateZooForCausalLM(StateZooConfig(vocab_size=257, d_model=16, mixers=["gla"]))
    net.save_pretrained(tmp_path)
    Bytes().save(tmp_path)
    with pytest.raises(
        ValueError, match=r"music continue needs a model of music, and this one was made with bytes"
    ):
        open_model(str(tmp_path), "music continue")
