"""Plans: memory within a tenth of real training steps, shapes, mistakes, what is written."""

import json
import logging

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from statezoo.lightning_modules import ActivationCheckpointing, CausalLM
from statezoo.lightning_modules.estimate import sizes, step_peak
from statezoo.lightning_modules.memory import LiveBytes
from statezoo.main import main
from statezoo.plan.cost import Costs, Job, Machine, Way
from statezoo.plan.shapes import find_shape, number
from statezoo.zoo import StateZooConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
FAMILIES = ["gla", "gated_deltanet", "mamba2", "mamba", "mom", "attention"]
SHAPES = [(2, 64, 32, 5), (3, 96, 48, 4)]  # windows, tokens, width, layers


def measured(mixers, shape, recompute, accumulate, tmp_path):
    """Bytes of all tensors, weights included, at the worst moment of a real fit of three steps."""
    rows, T, width, layers = shape
    seed_everything(0, verbose=False)
    module = CausalLM(mixers, vocab_size=64, d_model=width, n_layers=layers)
    counter = LiveBytes([*module.parameters()])
    counter.now = counter.peak = sum(p.nbytes for p in module.parameters())
    tokens = torch.randint(0, 64, (rows, T))
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=3, accumulate_grad_batches=accumulate,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False,
        callbacks=[ActivationCheckpointing()] if recompute else [],
    )  # fmt: skip
    with counter:
        made = [{"tokens": tokens, "targets": tokens}] * 3 * accumulate
        trainer.fit(module, DataLoader(made, batch_size=None))
    return module.net.config, counter.peak


def estimated(config, shape, recompute, accumulate):
    """Bytes that a plan for one processor says."""
    rows, T = shape[:2]
    machine = Machine("cpu", 1, 1e12, 1e10, 0.5, 1e9, gpu=False)
    costs = Costs(Job(config, 1e6, rows * T * accumulate, T, "32-true"), machine)
    way = costs.of(Way("auto", recompute, rows=rows))
    assert way.accumulate == accumulate
    return way.memory["total"]


def check(mixers, shape, recompute, accumulate, tmp_path):
    config, truth = measured(mixers, shape, recompute, accumulate, tmp_path)
    found = estimated(config, shape, recompute, accumulate)
    assert found == pytest.approx(truth, rel=0.1), f"{found / truth:.3f} of {truth}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_within_a_tenth_of_a_measured_fit(name, recompute, tmp_path):
    check([name], SHAPES[0], recompute, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "deltaproduct", "hgrn2", "kda", "retnet", "mamba3"])
def test_memory_of_more_families_and_accumulated_batches(name, recompute, accumulate, tmp_path):
    check([name], SHAPES[1], recompute, accumulate, tmp_path)


def test_deep_networks_follow_from_shallow_ones():
    config = StateZooConfig(d_model=32, n_layers=7, vocab_size=64, mixers=["gla", "attention"])
    whole = StateZooConfig(
        d_model=32, n_layers=7, vocab_size=64, mixers=["gla", "attention"] * 3 + ["gla"]
    )
    # the second names each layer, so it runs as a whole
    followed, run = (step_peak(c, 2, 32) for c in (config, whole))
    assert followed == pytest.approx(run, rel=0.01)


def test_sizes_are_those_of_the_network():
    from statezoo.zoo import StateZooForCausalLM

    config = StateZooConfig(d_model=32, n_layers=5, vocab_size=64, mixers=["gla", "mamba"])
    net = StateZooForCausalLM(config)
    assert sizes(config).all == sum(p.numel() for p in net.parameters())
    assert sizes(config).largest == max(p.numel() for p in net.parameters())


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("text", "value"), [("1.3B", 1.3e9), ("500M", 5e8), ("2k", 2e3), ("7", 7.0), ("1T", 1e12)]
)
def test_numbers_have_units(text, value):
    assert number(text, "--tokens") == value


def test_a_size_is_met():
    config = find_shape("1.3B-gla", {}, None)
    assert (config.d_model, config.n_layers, config.vocab_size) == (2048, 24, 32000)
    assert sizes(config).all == pytest.approx(1.3e9, rel=0.06)
    assert find_shape("1.3B-gla", {"d_model": 1024}, None).d_model == 1024
    assert find_shape("1.3B-mamba", {}, None).n_layers == 48


def test_shapes_come_from_configs_and_models_too():
    assert find_shape("gla_340m", {}, None).d_model == 1024
    assert find_shape("GLA", {"d_model": 64, "n_layers": 3}, 100).vocab_size == 100
    assert find_shape("gla-yeast", {}, None).vocab_size < 32000


# ------------------------------------------------------------------ costs by hand


def costs(count, **more):
    config = StateZooConfig(d_model=32, n_layers=2, vocab_size=64, mixers=["gla"])
    machine = Machine("X", count, 1e12, 1e10, 0.5, 1e9, gpu=False)
    return Costs(Job(config, 1e6, 8 * 64, 64, "32-true"), machine)


def test_traffic_is_that_of_rings():
    four = costs(4)
    P = 4 * four.sizes.all
    assert four.of(Way("ddp", False)).traffic == {"all-reduce of gradients": 2 * 3 / 4 * P}
    sharded = four.of(Way("fsdp2", False))
    assert sharded.accumulate == 2
    assert sum(sharded.traffic.values()) == pytest.approx(2 * 3 * 3 / 4 * P)
    S = 2 * 4 * (4 * 4 * 8)  # 2 layers, float32, heads x K x V, half as wide keys
    sliced = four.of(Way("SequenceParallel", False, slices=4))
    states = sliced.traffic["all-gather of states"]
    assert states == 3 * 2 * sliced.accumulate * S
    assert sharded.memory["weights"] == P / 4


def test_time_is_work_over_rate():
    one = costs(1)
    way = one.of(Way("auto", False, rows=2))
    assert way.seconds["compute"] == pytest.approx(one.flops.training * way.batch / 5e9)
    assert way.seconds["communication"] == 0
    again = one.of(Way("auto", True, rows=2))
    assert way.seconds["compute"] < again.seconds["compute"] < 4 / 3 * way.seconds["compute"]


# ------------------------------------------------------------------ the command


SMALL = ["--settings.d_model", "32", "--settings.n_layers", "2", "--vocab_size", "64",
         "--length", "32", "--batch", "512", "--tokens", "1M"]  # fmt: skip


def test_the_command_writes_a_plan(tmp_path, capsys):
    out = tmp_path / "plan.json"
    main(["plan", "--model", "GLA", *SMALL, "--gpus", "4xH100", "--out", str(out)])
    said = capsys.readouterr().out
    assert "ASSUMED, not measured" in said
    assert max(map(len, said.splitlines()[:-2])) <= 100
    content = json.loads(out.read_text())
    best = content["best"]
    assert content["machine"]["peak"] == 989.5e12
    assert best["fits"]
    assert best["batch_size"] * best["accumulate"] * best["replicas"] * 32 == 512
    assert content["steps"] == -(-1_000_000 // 512)
    assert content["days"] == pytest.approx(content["steps"] * best["seconds"]["step"] / 86400)
    assert {way["strategy"] for way in content["ways"]} == {"ddp", "fsdp2", "SequenceParallel"}


def test_this_machine_is_measured(capsys):
    main(["plan", "--model", "GLA", *SMALL, "--gpus", "cpu", "--calibrate"])
    said = capsys.readouterr().out
    assert "measured here: 1 layers, one window" in said
    assert "best: auto" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "8xH101"], "no device 'H101' (did you mean H100?)"),
        (["--gpus", "0xH100"], "--gpus must be a number and a name such as 64xH100"),
        (["--gpus", "8xT4"], "T4 cannot multiply in bfloat16"),
        (["--gpus", "8xH100", "--tokens", "much"], "--tokens must be a number above 0"),
        (["--gpus", "8xH100", "--model", "1B-glaa"], "no architecture 'glaa' (did you mean gla?)"),
        (["--gpus", "8xH100", "--efficiency", "2"], "--efficiency must lie in (0, 1], got 2.0"),
        (["--gpus", "2xH100", "--memory", "0.001"], "nothing fits: one window of 32 tokens needs"),
        (["--gpus", "1xH100", "--length", "0"], "--length must be at least 1 token, got 0"),
    ],
)
def test_mistakes_are_told(more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", "GLA", *SMALL, *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _quiet():
    """Drop Lightning's log handlers: they write to what was standard error on import."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
