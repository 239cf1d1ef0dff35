"""A batch in parts: the same training, whatever fits."""

import pytest
import torch

from statezoo.datamodules import Music, Text
from statezoo.lightning_modules import CausalLM, LengthWarmup, MicroBatches
from statezoo.lightning_modules import micro_batches as found

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture
def data(tmp_path):
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (9000,), generator=draw)
    (tmp_path / "a.txt").write_bytes(bytes(letters.tolist()))

    def make(**settings):
        given = {"path": str(tmp_path / "a.txt"), "seq_len": 32, "batch_size": 12}
        return Text(tokenizer="bytes", **{**given, **settings})

    return make


def module():
    torch.manual_seed(0)
    return CausalLM(["gla"], vocab_size=257, d_model=16, n_layers=1, optim={"total_steps": 4})


def weights(fit, datamodule):
    net = module()
    fit.fit(net, datamodule=datamodule)
    return net.state_dict()


def fails_above(rows, monkeypatch):
    """Let memory run out, as a GPU says it, where more sequences come at once."""
    real = CausalLM.training_loss

    def loss(self, batch):
        if len(batch["tokens"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, batch)

    monkeypatch.setattr(CausalLM, "training_loss", loss)


@pytest.mark.parametrize(("rows", "parts"), [(12, 1), (11, 2), (5, 3), (3, 4), (1, 12)])
def test_survives_running_out_and_learns_the_same(rows, parts, data, trainer, monkeypatch):
    want = weights(trainer(max_steps=3, precision="64-true"), datamodule=data())
    fails_above(rows, monkeypatch)
    divided = MicroBatches()
    fit = trainer(max_steps=3, callbacks=[divided], precision="64-true")
    source = data()
    got = weights(fit, datamodule=source)
    assert divided.parts == parts
    assert fit.global_step == 3
    assert (source.batch_size, fit.accumulate_grad_batches) == (12, 1), "left as it was"
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-9, rtol=1e-9)


def test_an_epoch_has_as_many_steps(data, trainer, monkeypatch):
    plain, divided = (trainer(max_epochs=1, callbacks=given) for given in ([], [MicroBatches()]))
    weights(plain, datamodule=data())
    fails_above(3, monkeypatch)
    weights(divided, datamodule=data())
    assert divided.global_step == plain.global_step > 10


def test_parts_by_what_memory_there_is(data, trainer):
    seen = []
    for memory in (10.0, 0.01):
        divided = MicroBatches(memory=memory)
        weights(trainer(max_steps=1, callbacks=[divided]), datamodule=data(seq_len=512))
        seen.append(divided.parts)
    assert seen[0] == 1 < seen[1]


def test_validation_comes_after_as_many_steps(data, trainer, monkeypatch):
    fails_above(6, monkeypatch)
    fit = trainer(
        max_steps=4, callbacks=[MicroBatches()], val_check_interval=2, check_val_every_n_epoch=None
    )
    steps = []
    net = module()
    monkeypatch.setattr(
        type(net), "on_validation_end", lambda self: steps.append(self.trainer.global_step)
    )
    fit.fit(net, datamodule=data())
    assert steps == [2, 4]


def test_resumes_with_the_parts_it_had(data, trainer, monkeypatch, tmp_path):
    want = weights(trainer(max_steps=4, precision="64-true"), datamodule=data())
    with monkeypatch.context() as patch:
        fails_above(4, patch)
        fit = trainer(max_steps=2, callbacks=[MicroBatches()], precision="64-true")
        net = module()
        fit.fit(net, datamodule=data())
        fit.save_checkpoint(tmp_path / "a.ckpt")
    again, net = MicroBatches(), module()
    trainer(max_steps=4, callbacks=[again], precision="64-true").fit(
        net, datamodule=data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert again.parts == 3
    for name, tensor in want.items():
        torch.testing.assert_close(net.state_dict()[name], tensor, atol=1e-9, rtol=1e-9)


def test_says_when_nothing_fits(data, trainer, monkeypatch):
    with monkeypatch.context() as patch:
        fails_above(0, patch)
        with pytest.raises(ValueError, match=r"one sequence needs more, there are"):
            weights(trainer(max_steps=1, callbacks=[MicroBatches()]), datamodule=data())
    with pytest.raises(ValueError, match=r"one sequence needs about .*there are 10.0 MB: shorten"):
        weights(
            trainer(max_steps=1, callbacks=[MicroBatches(memory=0.01)]),
            datamodule=data(seq_len=4096),
        )


def test_other_errors_are_told_as_they_are(data, trainer, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr(CausalLM, "training_loss", broken)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        weights(trainer(max_steps=1, callbacks=[MicroBatches()]), datamodule=data())


def test_says_what_it_cannot_divide(data, trainer):
    with pytest.raises(ValueError, match="memory above 0 GB, got 0"):
        MicroBatches(memory=0)
    with pytest.raises(ValueError, match=r"divide LengthWarmup's batches: leave one out"):
        weights(trainer(max_steps=1, callbacks=[MicroBatches(), LengthWarmup()]), datamodule=data())
    fit = trainer(max_steps=1, callbacks=[MicroBatches()])
    with pytest.raises(ValueError, match=r"in any number at once.*got CausalLM and NoneType"):
        MicroBatches().setup(fit, module(), "fit")


@pytest.mark.parametrize(
    ("settings", "got"),
    [({"carry": True}, "StreamLoader"), ({"packing": "decomposed"}, "PieceLoader")],
)
def test_refuses_batches_that_depend_on_their_size(settings, got, data, trainer):
    with pytest.raises(ValueError, match=rf"not carried, decomposed .*got CausalLM and {got}"):
        weights(
            trainer(max_steps=1, callbacks=[MicroBatches()]),
            datamodule=data(seq_len=64, **settings),
        )


def test_music_can_be_divided():
    assert Music.loader is found.SeekableLoader
