"""Mixture of memories against a loop over tokens and memories, and what routing must not break."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.cases import make, small, tokens
from tests.zoo.oracle import randomize
from tests.zoo.test_presets import preset
from torch.func import functional_call

from statezoo.zoo import StateZooConfig, StateZooForCausalLM, build_mixer
from statezoo.zoo.mom import MoM
from statezoo.zoo.routing import EachMemory

D = 16
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64, the same sums in another order
INNERS = ["gla", "mamba2", "gated_deltanet", "deltanet"]
ALL = [*INNERS, "deltaproduct", "kda", "hgrn2", "retnet", "linear_attention"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def settings_of(inner):
    own = {k: v for k, v in small(inner).items() if k != "name"}
    return own | ({"d_conv": 4} if inner == "gla" else {})  # off by default


def mom(inner="gated_deltanet", **settings):
    mixer = MoM(D, inner=inner, inner_settings=settings_of(inner), **settings)
    return randomize(mixer.double())


class Half(torch.nn.Module):
    """One half of a mixer, for ``functional_call``."""

    def __init__(self, mixer, half):
        super().__init__()
        self.mixer, self.half = mixer, half

    def forward(self, *args):
        return getattr(self.mixer, self.half)(*args)


def of_memory(mixer, m):
    """The inner mixer alone, and its parameters cut out for memory ``m``."""
    plain = build_mixer({"name": mixer.inner.name, **settings_of(mixer.inner.name)}, D).double()
    parameters, cut = dict(mixer.inner.named_parameters()), {}
    for name, like in plain.named_parameters():
        value = parameters[name]
        if value.shape != like.shape:
            assert name.split(".")[0] in plain.writes, f"{name} is no memory's own"
            first = plain.read_width
            each = value[first:].unflatten(0, (mixer.n, -1))
            value = torch.cat([value[:first], each[m]])
        cut[f"mixer.{name}"] = value
    return plain, cut


def by_hand(mixer, x):
    """One sequence ``[T D]``: every memory is a mixer of its own, fed its tokens one by one."""
    memories = [of_memory(mixer, m) for m in range(mixer.n)]
    p = (x @ mixer.gate.weight.T).softmax(-1)
    states, out = [None] * mixer.n, []
    for t in range(len(x)):
        token = x[t].view(1, 1, D)
        chosen = sorted(range(mixer.n_memories), key=lambda m: -p[t, m].item())[: mixer.top_k]
        weights = {0: 1.0} if mixer.shared else {}
        weights |= {mixer.shared + m: p[t, m] / sum(p[t, j] for j in chosen) for m in chosen}
        o = 0
        for m, weight in weights.items():
            plain, cut = memories[m]
            read, states[m] = functional_call(Half(plain, "recur"), cut, (token, states[m]))
            o = o + weight * read
        plain, cut = memories[0]
        out.append(functional_call(Half(plain, "read_out"), cut, (o, token)))
    return torch.cat(out, 1)[0]


def values_and_gradients(mixer, x, y):
    """Outputs, and gradients of a fixed sum over them by name."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view(y.shape)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters])
    return dict(zip(("y", "x", *names), (y, *found), strict=True))


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("train", {}),
        ("eval", {}),
        ("train", {"shared_memory": False, "n_memories": 3}),
        ("train", {"single_kv": True}),
        ("train", {"top_k": 4}),
    ],
    ids=["train", "eval", "alone", "single", "all"],
)
@pytest.mark.parametrize("inner", ALL)
def test_is_a_loop_over_tokens_and_memories(inner, settings, mode):
    mixer = mom(inner, **settings).train(mode == "train")
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    got = values_and_gradients(mixer, x, mixer(x)[0])
    want = values_and_gradients(mixer, x, torch.stack([by_hand(mixer, one) for one in x]))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("inner", ALL)
def test_one_memory_is_the_inner_mixer(inner, single):
    mixer = mom(inner, n_memories=1, top_k=1, shared_memory=False, single_kv=single)
    plain = build_mixer({"name": inner, **settings_of(inner)}, D).double()
    plain.load_state_dict(mixer.inner.state_dict())
    bounds = torch.tensor([0, 9, 9, 20], dtype=torch.int32)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    (y, state), (want, old) = mixer(x, None, bounds), plain(x, None, bounds)
    torch.testing.assert_close(y, want, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(state[0][:, 0], old[0], atol=0, rtol=0)


@pytest.mark.parametrize("inner", INNERS)
def test_training_sees_neither_the_future_nor_other_samples(inner):
    """With short convolutions; the published code lets both leak."""
    mixer = mom(inner).train()
    x = torch.randn(2, 64, D, dtype=torch.float64)
    y, edited = mixer(x)[0], x.clone()
    edited[:, 60:] = torch.randn(2, 4, D)
    torch.testing.assert_close(mixer(edited)[0][:, :60], y[:, :60], atol=1e-13, rtol=1e-13)
    edited = x.clone()
    edited[0] = torch.randn(64, D)
    torch.testing.assert_close(mixer(edited)[0][1], y[1], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("inner", ["gla", "mamba2"])
def test_memories_may_change_places(inner):
    mixer = mom(inner)
    other, order = copy.deepcopy(mixer), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other.gate.weight.copy_(mixer.gate.weight[order])
        for part in other.inner.modules():
            if isinstance(part, EachMemory) and part.n > 1:
                for parameter in part.parameters():
                    each = parameter[part.common :].unflatten(0, (part.n, -1))
                    each[1:] = each[1:][order].clone()
    x = torch.randn(2, 12, D, dtype=torch.float64)
    torch.testing.assert_close(other(x)[0], mixer(x)[0], **EXACT)


def test_other_memories_hold_still():
    """Neither decay nor convolution goes on where a token is not sent."""
    mixer = mom("gated_deltanet").eval()
    _, state = mixer(torch.randn(1, 9, D, dtype=torch.float64))
    x = torch.randn(1, 1, D, dtype=torch.float64)
    chosen = mixer.choose(x[0])[0][0].tolist()
    _, after = mixer(x, state)
    for m in range(5):
        assert torch.equal(after.S[0, m], state.S[0, m]) == (m not in chosen)
        assert torch.equal(after.conv[1][0, m], state.conv[1][0, m]) == (m not in chosen)


def test_a_memory_without_tokens():
    mixer = mom("gla").train()
    x = torch.randn(2, 10, D, dtype=torch.float64).abs()
    with torch.no_grad():
        mixer.gate.weight[3] = -10.0
    y, state = mixer(x)
    assert not state.S[:, 4].any()
    assert state.S[:, :2].any()
    torch.testing.assert_close(y[0], by_hand(mixer, x[0]), **EXACT)
    (grad,) = torch.autograd.grad(y.sum(), mixer.inner.k_proj.weight)
    grad = grad.unflatten(0, (5, -1))
    assert not grad[4].any()
    assert grad[:4].flatten(1).any(1).all()
    assert mixer.auxiliary["router_load"][3] == 0


def test_equal_probabilities_go_to_the_first():
    mixer = mom(n_memories=6).train()
    with torch.no_grad():
        mixer.gate.weight.zero_()
    memory, weight = mixer.choose(torch.randn(50, D, dtype=torch.float64))
    assert torch.equal(memory, torch.tensor([[0, 1, 2]]).expand(50, 3))
    assert torch.equal(weight, torch.tensor([[1, 0.5, 0.5]]).double().expand(50, 3))


def test_the_router_learns_from_the_output_and_from_the_balance():
    x = torch.randn(1, 12, D, dtype=torch.float64)
    for k, learns in ((2, True), (1, False)):  # the weight of one memory is 1
        mixer = mom(top_k=k).train()
        (grad,) = torch.autograd.grad(mixer(x)[0].sin().sum(), mixer.gate.weight)
        assert bool(grad.norm() > 1e-3) == learns
        mixer(x)
        (grad,) = torch.autograd.grad(mixer.auxiliary["loss"], mixer.gate.weight)
        assert grad.norm() > 1e-6


@pytest.mark.parametrize(("M", "k"), [(4, 2), (6, 1), (3, 3)])
def test_balance_is_k_when_all_get_the_same(M, k):
    mixer = mom(n_memories=M, top_k=k, balance_coefficient=0.5)
    p = torch.full((M, M), 1 / M, dtype=torch.float64)
    memory = (torch.arange(M)[:, None] + torch.arange(k)) % M
    told = mixer.report(p, memory)
    assert told["router_balance"].item() == pytest.approx(k)
    assert told["loss"].item() == pytest.approx(k / 2)
    assert told["router_entropy"].item() == pytest.approx(torch.tensor(float(M)).log().item())
    assert told["router_load"].tolist() == pytest.approx([1 / M] * M)
    sure = F.one_hot(torch.zeros(M, dtype=torch.long), M).double()
    told = mixer.report(sure, memory * 0 + torch.arange(k))
    assert told["router_balance"].item() == pytest.approx(M), "all to one memory"
    assert told["router_entropy"].item() == 0


def losses(net, ids, **kw):
    net.zero_grad()
    loss = net(ids, labels=ids, **kw).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}


def test_the_balance_joins_the_training_loss_alone():
    net, ids = make("mom"), tokens(2, 12)
    x = net.model(ids).last_hidden_state
    nll = F.cross_entropy(net.lm_head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert net(ids, labels=ids).loss.item() == pytest.approx(nll)
    net.train()
    told = net.model(ids).auxiliary
    assert list(told) == [0, 1]
    balance = sum(told[i]["router_balance"].item() for i in told) / 2
    assert 1 < balance < 4
    assert net(ids, labels=ids).loss.item() == pytest.approx(nll + 0.01 * balance)
    part = net(ids, labels=ids, num_items_in_batch=44).loss.item()
    assert part == pytest.approx((nll + 0.01 * balance) / 2)
    assert net.eval().model(ids).auxiliary is None


def test_checkpointing_counts_the_balance_once():
    net, ids = make("mom").train(), tokens(2, 12)
    want = losses(net, ids)
    old = net.gradient_checkpointing_enable  # its name up to transformers 5.22
    enable = getattr(net, "activation_checkpointing_enable", old)
    enable({"use_reentrant": False})
    got = losses(net, ids)
    assert torch.equal(got[0], want[0])
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, **EXACT)
    enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        losses(net, ids)


@pytest.mark.parametrize("case", ["mom", "mom-mamba2"])
def test_compiles_without_graph_breaks(case):
    net, ids = make(case, torch.float32, n_layers=1), tokens(2, 20)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, net(ids).logits)
    net.train()
    loss = compiled(ids, labels=ids).loss
    got = torch.autograd.grad(loss, net.parameters())
    want = torch.autograd.grad(net(ids, labels=ids).loss, net.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # float32 sums in another order


def test_initial_values_are_those_of_the_inner_mixer():
    for inner, std in (("gated_deltanet", 0.02), ("mamba2", 64**-0.5 / 3**0.5)):
        own = {"head_dim": 16}
        config = StateZooConfig(
            d_model=64, n_layers=3, mixers=[{"name": "mom", "inner": inner, "inner_settings": own}]
        )
        mixer = StateZooForCausalLM(config).model.layers[0].mixer
        name = "in_proj" if inner == "mamba2" else "k_proj"
        assert getattr(mixer.inner, name).weight.std().item() == pytest.approx(std, rel=0.05)
        assert mixer.gate.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert mixer.inner.out_proj.weight.abs().max() < 128**-0.5 / 3**0.5, "by depth"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "top_k must lie in 1 to n_memories=4, got 5"),
        ({"top_k": 0}, "top_k must lie in 1"),
        ({"inner": "attention"}, "'attention' has no matrix memory; these do: deltanet"),
        ({"inner": "mom"}, "'mom' has no matrix memory"),
        ({"inner": "glaa"}, "did you mean 'gla'"),
        ({"inner_settings": {"n_headz": 2}}, "no setting 'n_headz' .did you mean 'n_heads'"),
        ({"inner_settings": {"name": "gla"}}, "the setting 'inner'"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        MoM(D, **settings)
    if "top_k" not in settings:
        with pytest.raises(ValueError, match=words):
            StateZooConfig(mixers=[{"name": "mom", **settings}])


def test_inner_settings_are_written_out():
    (entry,) = StateZooConfig(mixers=["mom"]).mixers
    assert entry["inner_settings"]["d_conv"] == 4
    with pytest.raises(TypeError, match=r"gated_deltanet\.n_heads: expected int"):
        StateZooConfig(mixers=[{"name": "mom", "inner_settings": {"n_heads": "two"}}])


def test_published_count():
    """444 million parameters at work in the model of 24 layers and width 1024, specs section 6."""
    net = preset("mom_512m")
    count = sum(p.numel() for p in net.parameters()) + net.lm_head.weight.numel()  # untied
    for block in net.model.layers:
        for part in block.mixer.inner.modules():
            if isinstance(part, EachMemory) and part.n > 1:  # two of four are not at work
                count -= 2 * sum(p.numel() for p in part.parameters()) // part.n
    assert round(count / 1e6) == 444
