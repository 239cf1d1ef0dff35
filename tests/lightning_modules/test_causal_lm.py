"""Loss, metrics and checkpoints of the task."""

import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from statezoo.lightning_modules import GLA, CausalLM, Hybrid, load_checkpoint, load_network
from statezoo.lightning_modules.checkpoint import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
SGD = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}


def gradients(module, trainer, loader, **settings):
    """Fit one step, and return the gradient that the optimiser saw."""
    seen = {}

    def keep(*_args, **_kwargs):
        seen.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    module.clip_gradients = keep
    trainer(max_steps=1, **settings).fit(module, loader)
    return seen


def loader(*made):
    return DataLoader(made, batch_size=None)


def concatenated(parts):
    return {key: torch.cat([part[key] for part in parts]) for key in ("tokens", "targets")}


def test_accumulated_gradient_is_that_of_the_big_batch(tiny, trainer, batches):
    parts = batches([8, 1, 0, 3])
    whole = gradients(tiny(optim=SGD), trainer, loader(concatenated(parts)))
    split = gradients(tiny(optim=SGD), trainer, parts, accumulate_grad_batches=4)
    net = tiny().net
    big = concatenated(parts)
    F.cross_entropy(net(big["tokens"]).logits.flatten(0, 1), big["targets"].flatten()).backward()
    by_hand = {f"net.{n}": p.grad for n, p in net.named_parameters()}
    assert whole.keys() == split.keys() == by_hand.keys()
    for name in whole:  # float32 sums in another order
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(by_hand[name], whole[name], rtol=1e-4, atol=1e-6)


def test_last_window_of_an_epoch_may_be_short(tiny, trainer, batches):
    parts = batches([5, 2])
    whole = gradients(tiny(optim=SGD), trainer, loader(concatenated(parts)))
    short = gradients(tiny(optim=SGD), trainer, parts, accumulate_grad_batches=3)
    for name in whole:
        torch.testing.assert_close(short[name], whole[name], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_by_default(tiny, trainer, batches):
    module = tiny(optim={"clip_norm": 0.01})
    lengths = []
    original = module.clip_gradients

    def keep(*args, **kwargs):
        original(*args, **kwargs)
        squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
        lengths.append(float(torch.stack(squares).sum().sqrt()))

    module.clip_gradients = keep
    trainer(max_steps=1).fit(module, batches([8]))
    assert lengths == pytest.approx([0.01], rel=1e-3)


def test_metrics_are_means_over_tokens_and_bytes(tiny, trainer, batches):
    module, parts = tiny(), batches([8, 1])
    (found,) = trainer().validate(module, parts, verbose=False)
    nats = tokens = 0
    for part in parts:
        logits = module.net(part["tokens"]).logits.flatten(0, 1)
        nats += float(F.cross_entropy(logits, part["targets"].flatten(), reduction="sum").detach())
        tokens += int((part["targets"] != -100).sum())
    assert found["val/nll"] == pytest.approx(nats / tokens, rel=1e-5)
    bits = nats / math.log(2) / (2 * tokens)  # batches say two bytes per token
    assert found["val/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_no_bits_where_bytes_are_unknown(tiny, trainer, batches):
    parts = loader({k: v for k, v in batches([8])[0].items() if k != "n_bytes"})
    (found,) = trainer().validate(tiny(), parts, verbose=False)
    assert set(found) == {"val/nll"}


def test_a_loss_that_is_no_number_stops_and_names_the_step(tiny, trainer, batches):
    module = tiny()
    broken = trainer(max_steps=5)

    def spoil(*_):
        if broken.global_step == 2:
            with torch.no_grad():
                module.net.lm_head.weight.fill_(float("nan"))

    module.on_train_batch_end = spoil
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 2"):
        broken.fit(module, batches([8] * 5))


def test_predictions_are_nats_of_each_position(tiny, trainer, batches):
    parts = batches([3])
    module = tiny()
    (found,) = trainer().predict(module, parts)
    logits = module.net(parts[0]["tokens"]).logits
    want = F.cross_entropy(logits.transpose(1, 2), parts[0]["targets"], reduction="none")
    torch.testing.assert_close(found["nll"], want.detach(), rtol=1e-4, atol=1e-5)
    assert found["scored"].sum() == 6


def test_schedule_ends_with_the_epochs(tiny, trainer, batches):
    module = tiny(optim={"warmup_steps": 0, "final_lr": 0.0, "lr": 1.0})
    fitted = trainer(max_epochs=2, accumulate_grad_batches=2)
    rates = []
    module.on_before_zero_grad = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    fitted.fit(module, batches([8] * 3))
    assert module.total_steps() == 4
    assert fitted.global_step == 4
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)


def test_checkpoint_is_plain_data_and_comes_back_by_its_class(tiny, trainer, batches, tmp_path):
    module = GLA(vocab_size=16, d_model=16, n_layers=1, n_heads=2, optim={"lr": 0.01})
    fitted = trainer(max_steps=1)
    fitted.fit(module, batches([8]))
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["hyper_parameters"]["n_heads"] == 2
    assert content["hyper_parameters"]["optim"]["lr"] == 0.01
    for again in (
        GLA.load_from_checkpoint(tmp_path / "x.ckpt"),
        load_checkpoint(tmp_path / "x.ckpt"),
    ):
        assert type(again) is GLA
        assert dict(again.hparams) == dict(module.hparams)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    tokens = batches([8])[0]["tokens"]
    net = load_network(tmp_path / "x.ckpt").eval()
    torch.testing.assert_close(net(tokens).logits, module.eval().net(tokens).logits)


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nope"):
        load_checkpoint(tmp_path / "nope.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.ckpt' is no checkpoint"):
        load_checkpoint(tmp_path / "text.ckpt")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of a Lightning module"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_modules_pickle():
    module = GLA(vocab_size=16, d_model=16, n_layers=1)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is GLA
    assert again.hparams == module.hparams


def test_hybrid_takes_names_and_mappings():
    module = Hybrid(["gla", {"name": "attention", "n_heads": 2}], d_model=16, n_layers=2)
    assert [m["name"] for m in module.hparams["mixers"]] == ["gla", "attention"]
    assert module.hparams["mixers"][1]["n_heads"] == 2
    assert isinstance(module, CausalLM)


def test_pretrained_brings_shape_and_weights(tmp_path, trainer, batches):
    first = GLA(vocab_size=16, d_model=24, n_layers=1, n_heads=2)
    fitted = trainer(max_steps=1)
    fitted.fit(first, batches([8]))
    path = str(tmp_path / "x.ckpt")
    fitted.save_checkpoint(path)
    again = GLA(vocab_size=16, pretrained=path)
    assert (again.hparams["d_model"], again.hparams["n_heads"]) == (24, 2)
    assert again.hparams["pretrained"] is None
    torch.testing.assert_close(again.net.lm_head.weight, first.net.lm_head.weight)
    with pytest.raises(ValueError, match="has d_model 24, asked for was 32"):
        GLA(vocab_size=16, d_model=32, pretrained=path)
    with pytest.raises(ValueError, match="has n_heads 2, asked for was 8"):
        GLA(vocab_size=16, n_heads=8, pretrained=path)
    with pytest.raises(ValueError, match="of another architecture"):
        Hybrid(["attention"], vocab_size=16, n_layers=1, pretrained=path)
    with pytest.raises(ValueError, match="has vocab_size 16"):
        GLA(vocab_size=20, pretrained=path)
