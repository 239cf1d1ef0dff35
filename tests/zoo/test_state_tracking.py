"""State tracking by construction: weights written by hand, nothing trained.

A write of strength 2 reflects the memory, a transposition of two items is a reflection, and so is
a mirror: four writes a token make any permutation of five items, two any rotation in space.
"""

from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from statezoo.kernels.gated_delta_rule import gated_delta_rule
from statezoo.zoo.deltaproduct import DeltaProduct

STEPS = 1000


def reflect(u: Tensor) -> Tensor:
    """The mirror across the plane that ``u``, of unit length, stands on."""
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u)


def symmetric_group() -> tuple[Tensor, Tensor]:
    """S5: its 120 matrices, and for each up to four mirrors ``[120 4 5]``, zero if unneeded."""
    one = torch.eye(5, dtype=torch.float64)
    matrices, mirrors = [], []
    for images in permutations(range(5)):
        mirror, place = torch.zeros(4, 5, dtype=torch.float64), list(range(5))
        for i in range(4):  # selection sort: transpose item i into its place
            j = place.index(images[i])
            if i != j:
                place[i], place[j] = place[j], place[i]
                mirror[i] = (one[i] - one[j]) / 2**0.5
        matrices.append(one[list(images)])
        mirrors.append(mirror)
    return torch.stack(matrices), torch.stack(mirrors)


def alternating_group() -> tuple[Tensor, Tensor]:
    """A5: the 60 rotations of an icosahedron, and two mirrors for each, ``[60 2 3]``."""
    golden = (1 + 5**0.5) / 2
    vertices = torch.tensor(
        [
            [(0.0, a, b * golden)[(i - s) % 3] for i in range(3)]
            for a, b, s in product((1, -1), (1, -1), range(3))
        ],
        dtype=torch.float64,
    )
    edges = vertices[:, None] - vertices  # across each lies a mirror of the solid
    length = edges.norm(dim=-1)
    axes = edges[(length > 0) & (length < 2.1)]
    axes = axes / axes.norm(dim=-1, keepdim=True)
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for a, b in product(axes, axes):
        matrix = reflect(b) @ reflect(a)
        found.setdefault(
            tuple((matrix * 100).round().flatten().int().tolist()), (matrix, torch.stack([a, b]))
        )
    matrices, mirrors = zip(*found.values(), strict=True)
    return torch.stack(matrices), torch.stack(mirrors)


GROUPS = {"S5": (symmetric_group, 120, 4), "A5": (alternating_group, 60, 2)}


@pytest.mark.parametrize("group", GROUPS)
def test_the_mirrors_make_the_group(group):
    make, order, n = GROUPS[group]
    matrices, mirrors = make()
    assert matrices.shape[0] == order
    assert mirrors.shape[1] == n
    for matrix, own in zip(matrices, mirrors, strict=True):
        made = torch.eye(len(matrix), dtype=torch.float64)
        for u in own:
            made = reflect(u) @ made
        torch.testing.assert_close(made, matrix)
    products = (matrices[:, None] @ matrices).flatten(0, 1)  # closed: every product is an element
    distance = torch.cdist(products.flatten(1), matrices.flatten(1)).min(1).values
    assert distance.max() < 1e-6  # cdist takes roots of rounded squares
    ranks = torch.linalg.matrix_rank(torch.eye(matrices.shape[-1]) - matrices, atol=1e-6)
    assert ranks.max() == n, "fewer mirrors cannot make the element that moves most"


def words(order: int) -> Tensor:
    """A thousand random elements."""
    return torch.randint(order, (STEPS,), generator=torch.Generator().manual_seed(1))


def running_products(matrices: Tensor, word: Tensor) -> Tensor:
    """Products of the first ``t`` elements, latest on the left, as indices into the group."""
    table = torch.cdist(
        (matrices[:, None] @ matrices).flatten(0, 1).flatten(1), matrices.flatten(1)
    )
    table = table.argmin(1).view(len(matrices), -1)  # [later, earlier]
    at = int(
        torch.cdist(
            torch.eye(matrices.shape[-1]).double().view(1, -1), matrices.flatten(1)
        ).argmin()
    )
    found = []
    for element in word.tolist():
        at = int(table[element, at])
        found.append(at)
    return torch.tensor(found)


def nearest(memories: Tensor, matrices: Tensor) -> Tensor:
    """Decode ``[T K V]`` to the group element of the nearest matrix."""
    return torch.cdist(memories.flatten(1).double(), matrices.flatten(1)).argmin(1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("group", GROUPS)
def test_delta_rule_tracks_the_group_over_a_thousand_steps(group, backend):
    make, order, n = GROUPS[group]
    matrices, mirrors = make()
    word, K = words(order), matrices.shape[-1]
    k = mirrors.float()[word][None, :, :, None].expand(1, STEPS, n, K, K)  # K heads, one per row
    o, S = gated_delta_rule(
        torch.eye(K).expand(1, STEPS, K, K),
        k,
        torch.zeros_like(k),
        2.0 * torch.ones(1, STEPS, n, K),
        scale=1.0,
        initial_state=torch.eye(K).expand(1, K, K, K),
        backend=backend,
    )
    truth = running_products(matrices, word)
    assert torch.equal(nearest(o[0], matrices), truth)
    assert (o[0] - matrices[truth]).abs().max() < 1e-4  # thousands of mirrors in float32
    assert (S[0, 0] - matrices[truth[-1]]).abs().max() < 1e-4


def silu_inverse(y: Tensor) -> Tensor:
    """Solve ``silu(x) = y`` on the rising branch, ``y > -0.27``, by Newton's method."""
    x = y.clone()
    for _ in range(50):
        s = x.sigmoid()
        x = (x - (x * s - y) / (s * (1 + x * (1 - s)))).clamp(min=-1.2)
    return x


def by_hand(mirrors: Tensor) -> tuple[DeltaProduct, int]:
    """A layer that reads one-hot group elements, after tokens that write the identity.

    Head ``i`` reads row ``i`` of the product. Returns the layer and the number of those tokens.
    """
    order, n, K = mirrors.shape
    starts = -(-K // n)
    D = order + starts
    layer = DeltaProduct(D, n_heads=K, head_dim=K, expand_v=1.0, n_householder=n, d_conv=0)
    keys, values = torch.zeros(2, D, n, K, dtype=torch.float64)
    beta = torch.full((D, n), -100.0)  # sigmoid 0: no write
    keys[:order] = mirrors
    beta[:order][mirrors.any(-1)] = 100.0  # 2 * sigmoid is 2 exactly: a mirror
    for i in range(K):
        keys[order + i // n, i % n, i] = values[order + i // n, i % n, i] = 1.0
        beta[order + i // n, i % n] = 0.0  # 1: a plain write
    rows = {
        "q": silu_inverse(torch.eye(K).double())[:, None].expand(K, D, K),  # [H D K]
        "k": silu_inverse(0.25 * keys)[None].expand(K, D, n, K),
        "v": silu_inverse(values)[None].expand(K, D, n, K),
        "b": beta[None].expand(K, D, n),
    }
    with torch.no_grad():
        layer.q_proj.weight.copy_(rows["q"].permute(0, 2, 1).flatten(0, 1))
        for name in "kv":  # rows in the layout (n h d)
            getattr(layer, f"{name}_proj").weight.copy_(
                rows[name].permute(2, 0, 3, 1).flatten(0, 2)
            )
        layer.b_proj.weight.copy_(rows["b"].permute(2, 0, 1).flatten(0, 1))
        layer.g_proj.weight.fill_(1.0)  # the gate is open for every token
        layer.o_proj.weight.copy_(torch.eye(D, K * K))  # the stream shows the rows
    return layer, starts


@pytest.mark.parametrize("group", GROUPS)
def test_deltaproduct_layer_tracks_the_group_over_a_thousand_tokens(group):
    """Weights alone: the first tokens write the identity, each later one is a group element."""
    make, order, _ = GROUPS[group]
    matrices, mirrors = make()
    layer, starts = by_hand(mirrors)
    word, K = words(order), matrices.shape[-1]
    tokens = torch.cat([torch.arange(order, order + starts), word])
    x = torch.nn.functional.one_hot(tokens, order + starts).float()[None]
    with torch.no_grad():
        y, _ = layer(x)
    rows = y[0, starts:, : K * K].unflatten(-1, (K, K))
    rows = rows / rows.norm(dim=-1, keepdim=True)  # the layer's norm and gate scale them
    assert torch.equal(nearest(rows, matrices), running_products(matrices, word))


def returns(layer: DeltaProduct, repeats: int) -> tuple[float, float]:
    """Distance of the memory from where it was, after one and after ``repeats`` equal tokens."""
    D = layer.q_proj.in_features
    with torch.no_grad():
        _, before = layer(torch.randn(1, 4, D, dtype=torch.float64))
        state, distances = before, []
        token = torch.randn(1, 1, D, dtype=torch.float64)
        for _ in range(repeats):
            _, state = layer(token, state)
            distances.append((state.S - before.S)[0, 0].norm().item())
    return distances[0], distances[-1]


@pytest.mark.parametrize(("cycle", "least"), [(3, 0.75), (5, 0.67)])
def test_one_write_a_token_cannot_return_after_three_or_five_equal_tokens(cycle, least):
    """No weights let ``n_householder=1`` count modulo 3 or 5, as every cycle of A5 and S5 demands.

    A repeated token maps ``S -> M S + c`` with ``M = I - beta k k^T``, whose eigenvalues are 1 and
    ``r = 1 - beta`` in [-1, 1]. So ``S_m - S_0 = (1 + M + ... + M^(m-1)) (S_1 - S_0)``, and for odd
    ``m`` the sum ``(1 - r^m) / (1 - r)`` stays above 3/4 (``m = 3``) or 0.67 (``m = 5``): a memory
    that has moved never comes back, whatever is written.
    """
    r = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    assert sum(r**i for i in range(cycle)).min() >= least
    for seed in range(100):
        torch.manual_seed(seed)
        layer = DeltaProduct(8, n_heads=1, head_dim=4, n_householder=1, d_conv=0).double()
        layer.b_proj.weight.data *= 10  # strengths from 0 to 2
        once, after = returns(layer, cycle)
        assert after >= (least - 1e-4) * once  # keys are of unit length to 1e-6


@pytest.mark.parametrize("cycle", [3, 5])
def test_two_writes_a_token_return(cycle):
    """The counterpart: two mirrors at half the angle of the cycle turn the memory all round."""
    angle = torch.tensor(torch.pi / cycle)
    mirrors = torch.stack([torch.tensor([1.0, 0.0]), torch.stack([angle.cos(), angle.sin()])])
    layer, starts = by_hand(mirrors[None].double())
    D = layer.q_proj.in_features
    x = torch.eye(D)[None]
    with torch.no_grad():
        _, state = layer(x[:, 1 : 1 + starts])
        before, distances = state.S, []
        for _ in range(cycle):
            _, state = layer(x[:, :1], state)
            distances.append((state.S - before).norm().item())
    assert distances[0] > 1
    assert distances[-1] < 1e-3
