"""FLOPs of the model against closed forms worked out by hand, and the MFU that is logged."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statezoo.kernels._flops import visible_pairs
from statezoo.lightning_modules import Utilisation
from statezoo.lightning_modules.devices import DEVICES, find_device, measured_peak
from statezoo.lightning_modules.flops import count_flops
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]

D, W, T = 32, 50, 24


def of(mixer, T=T, **more):
    config = StateZooConfig(
        d_model=D, n_layers=2, vocab_size=W, mixers=[mixer], channel=None, **more
    )
    return count_flops(config, T)


def gla():  # heads 2, K 8 each, V 16 each, bottleneck of the gates 4
    projections = D * 16 + D * 16 + D * 32 + (D * 4 + 4 * 16) + D * 32 + 32 * D
    return 2 * projections + 4 * 2 * 8 * 16


def gated_deltanet():  # heads 2, K 8, V 16, a 3-tap convolution of q, k, v
    q, k, v = 16, 16, 32
    projections = D * (q + k + v) + D * 2 + D * 2 + D * v + v * D
    recurrence = 2 * (2 * 8 * 16 + 2 * 8 * 16 + 2 * 8 * 16)  # look up, correct, read
    return 2 * projections + 2 * 3 * (q + k + v) + recurrence


def mamba():  # 64 channels, 4 states, step sizes through 3, a 4-tap convolution
    E, N, R = 64, 4, 3
    projections = D * 2 * E + E * (R + 2 * N) + R * E + E * D
    return 2 * projections + 2 * 4 * E + (2 * E * N + 2 * E * N)


def mamba2():  # 4 heads of 16, 8 states, one group, a 4-tap convolution of x, B, C
    E, N, H = 64, 8, 4
    projections = D * (2 * E + 2 * N + H) + E * D
    return 2 * projections + 2 * 4 * (E + 2 * N) + H * (2 * N * 16 + 2 * N * 16)


def attention():  # 4 heads of 8, keys and values of 2
    projections = D * 32 + 2 * D * 16 + 32 * D
    pairs = sum(t + 1 for t in range(T)) / T
    return 2 * projections + pairs * 4 * (2 * 8 + 2 * 8)


def mom():  # the Gated DeltaNet above, 4 memories of which 2 and one more for all are written
    q, k, v = 16, 16, 32
    written = 3
    projections = D * q + D * v + v * D + D * 4 + written * (D * k + D * v + D * 2 + D * 2)
    recurrence = written * 2 * (3 * 2 * 8 * 16)
    return 2 * projections + written * 2 * 3 * (q + k + v) + recurrence


GDN = {"n_heads": 2, "head_dim": 8, "expand_v": 2.0, "d_conv": 3}
CASES = {
    "gla": ({"n_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "gate_rank": 4, "d_conv": 0}, gla),
    "gated_deltanet": (GDN, gated_deltanet),
    "mamba": ({"expand": 2.0, "d_state": 4, "dt_rank": 3, "d_conv": 4}, mamba),
    "mamba2": ({"expand": 2.0, "head_dim": 16, "d_state": 8, "d_conv": 4}, mamba2),
    "attention": ({"n_heads": 4, "n_kv_heads": 2}, attention),
    "mom": ({"inner_settings": GDN, "n_memories": 4, "top_k": 2}, mom),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_worked_out_by_hand(name):
    settings, forward = CASES[name]
    found = of({"name": name, **settings})
    want = 2 * forward() + 2 * D * W  # two layers, and the head
    assert found.forward == pytest.approx(want, rel=1e-12)
    assert found.training == pytest.approx(3 * want, rel=1e-12)
    assert sum(found.parts.values()) == pytest.approx(found.training, rel=1e-12)


def test_attention_grows_with_the_length_and_a_window_stops_it():
    full = [of("attention", T).forward for T in (16, 32, 64)]
    assert full[2] - full[1] == pytest.approx(2 * (full[1] - full[0]))
    windowed = [of({"name": "attention", "window": 4}, T).forward for T in (64, 128)]
    assert windowed[1] == pytest.approx(windowed[0], rel=0.01)
    assert of("gla", 16).forward == of("gla", 64).forward


@pytest.mark.parametrize("T", [1, 3, 7, 20])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (4, 0), (4, 2), (4, 30)])
def test_visible_pairs_are_those_of_the_definition(T, window, sinks):
    seen = [t - s < (window or T) or s < sinks for t in range(T) for s in range(T) if s <= t]
    assert visible_pairs(T, window, sinks) == sum(seen)


def test_torch_counts_a_real_step_alike():
    config = StateZooConfig(d_model=D, n_layers=2, vocab_size=W, mixers=["gla"])
    net = StateZooForCausalLM(config).train()
    tokens = torch.randint(0, W, (2, T))
    with FlopCounterMode(display=False) as counter:
        net(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == count_flops(config, T).training * 2 * T


def test_no_tokens_no_count():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        of("gla", 0)


# ------------------------------------------------------------------ devices, MFU


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L4", "L4"),
        ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("Tesla T4", "T4"), ("AMD Instinct", None),
        ("NVIDIA A10G", "A10G"), ("NVIDIA RTX A6000", "A6000"),
    ],
)  # fmt: skip
def test_cards_are_known_by_their_drivers_names(driver, card):
    assert find_device(driver) == (DEVICES[card] if card else None)


def test_the_measured_peak_is_a_rate_of_products():
    assert 1e8 < measured_peak(torch.device("cpu")) < 1e14


def test_mfu_is_flops_of_the_model_over_the_peak(trainer, tiny, batches):
    module = tiny()
    fit = trainer(max_steps=4, log_every_n_steps=2, callbacks=[Utilisation(peak=1e12)])
    fit.fit(module, batches([8] * 4))
    seen = {key: float(value) for key, value in fit.callback_metrics.items()}
    per_token = count_flops(module.net.config, 8).training
    want = seen["train/tokens_per_second"] * per_token / 1e12
    assert seen["train/mfu"] == pytest.approx(want, rel=1e-5)


def test_without_a_peak_there_is_no_mfu(trainer, tiny, batches):
    fit = trainer(max_steps=2, log_every_n_steps=1, callbacks=[Utilisation()])
    fit.fit(tiny(), batches([8] * 2))
    assert "train/mfu" not in fit.callback_metrics
    with pytest.raises(ValueError, match="peak above 0 FLOP/s or 'measured', got 0"):
        Utilisation(peak=0)
