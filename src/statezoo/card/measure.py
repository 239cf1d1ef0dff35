"""The numbers of a card, measured on the weights that it ships."""

from __future__ import annotations

import copy
import hashlib
import inspect
import statistics
import time
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from statezoo.card.run import Run
from statezoo.datamodules.batch import IGNORE
from statezoo.folder import fixture_nll
from statezoo.quiet import quiet

__all__ = ["baselines", "describe", "fingerprint", "fixture", "lightest", "results", "speed"]

ALLOWED = 1e-3
"""Nats per token by which narrower weights may change the loss."""
CHECKED_TOKENS, STEPS, DECODED, FIXTURE = 16_384, 6, 64, 60
BASELINE_LIMIT = 32_000_000
"""Bytes or bases that the baselines learn from."""
GRID = 4
"""Tokens of a sixteenth, and sixteenths of a quarter, on the grid of four voices."""


def lightest(run: Run) -> torch.dtype:
    """Return the narrowest type of weights that leaves the loss on the held-out split as it is."""
    batches: list[Any] = []
    for batch in run.data.test_dataloader():
        batches.append(batch)
        if sum(b["tokens"].numel() for b in batches) >= CHECKED_TOKENS:
            break
    net = run.module.net
    exact = _loss(run.module, batches)
    for dtype in (torch.float16, torch.bfloat16):
        run.module.net = copy.deepcopy(net).to(dtype).float()
        change = abs(_loss(run.module, batches) - exact)
        run.module.net = net
        if change <= ALLOWED:
            return dtype
    return torch.float32


@torch.inference_mode()
def _loss(module: Any, batches: list[Any]) -> float:
    """Nats per token of some batches."""
    module.eval()
    total = sum(float(module.evaluation_nll(batch, "sum")) for batch in batches)
    return total / sum(int((batch["targets"] != IGNORE).sum()) for batch in batches)


def fingerprint(run: Run) -> str:
    """Return a hash of the tokens that the test scores, in order: equal only for equal tests."""
    digest = hashlib.sha256()
    for batch in run.data.test_dataloader():
        targets = batch["targets"]
        digest.update(targets[targets != IGNORE].numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def results(run: Run) -> dict[str, float]:
    """Return what ``statezoo validate`` and ``statezoo test`` log.

    Without a test split, those of validation alone. On the grid of four voices also the nats of
    all four voices at a sixteenth, and of a quarter.
    """
    trainer = _trainer(accelerator="auto")
    with quiet():
        found = dict(trainer.validate(run.module, run.data, verbose=False)[0])
        if run.split == "test":
            found |= trainer.test(run.module, run.data, verbose=False)[0]
    run.module.cpu()
    run.data.trainer = None
    if getattr(getattr(run.data, "tokenizer", None), "kind", "") == "satb":
        for split in ("val", "test"):
            if f"{split}/nll" in found:
                found[f"{split}/nats_per_frame"] = GRID * found[f"{split}/nll"]
                found[f"{split}/nats_per_quarter"] = GRID**2 * found[f"{split}/nll"]
    return {name: float(value) for name, value in sorted(found.items())}


def baselines(run: Run) -> dict[str, float]:
    """Return bits per unit of the data module's simple models on the same split; none of others."""
    method = getattr(run.data, "baselines", None)
    settings = inspect.signature(method).parameters if method else {}
    if method is None or "split" not in settings:
        return {}
    limit = {"limit": BASELINE_LIMIT} if "limit" in settings else {}
    found: dict[str, float] = method(run.split, **limit)
    return found


def describe(net: Any, length: int) -> dict[str, Any]:
    """Return sizes and architecture of a network.

    Args:
        net: The network.
        length: Tokens of a training window.
    """
    config, mixers = net.config, net.model.mixers()
    kinds = {mixer.name: type(mixer) for mixer in mixers}
    size = sum(mixer.state_size(length) for mixer in mixers)
    channel = (config.channel or {}).get("name")
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "state_bytes": size,
        "state_bytes_at": length,
        "state_grows": sum(mixer.state_size(2 * length) for mixer in mixers) > size,
        "trained_length": length,
        "layers": [mixer.name for mixer in mixers],
        "width": config.d_model,
        "channel": channel,
        "vocab_size": config.vocab_size,
        "architecture": {
            name: (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
            for name, kind in kinds.items()
        },
    }


# ---------------------------------------------------------------- speed


class _Clock(Callback):
    """Tokens per second of the training steps after the first, loading included."""

    def __init__(self) -> None:
        self.tokens, self.ends = [0], [time.process_time()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens.append(batch["tokens"].numel())
        self.ends.append(time.process_time())

    def rate(self) -> float:
        spans = zip(self.tokens[2:], self.ends[1:-1], self.ends[2:], strict=True)
        return statistics.median(tokens / (end - start) for tokens, start, end in spans)


def speed(run: Run, command: str) -> dict[str, Any]:
    """Return tokens per second of processor time, training and writing one by one, on one thread.

    Training is the run's own, batches and precision; writing continues the first tokens of the
    held-out split, as many as a training window has. Processor time, because other work on the
    machine does not lengthen it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _speed(run, command)
    finally:
        torch.set_num_threads(threads)


def _speed(run: Run, command: str) -> dict[str, Any]:
    from statezoo.lightning_modules import checkpoint as ckpt

    decode = decoding_rate(run.module.net, _ids(run, int(run.data.seq_len)))
    clock, settings = _Clock(), run.config.get("trainer") or {}
    trainer = _trainer(
        accelerator="cpu",
        max_steps=STEPS,
        precision=settings.get("precision"),
        limit_val_batches=0,
        callbacks=[clock],
    )
    with quiet():
        trainer.fit(ckpt.load_checkpoint(run.checkpoint, map_location="cpu"), run.data)
    run.data.trainer = None
    return {
        "train_tokens_per_second": float(f"{clock.rate():.4g}"),
        "decode_tokens_per_second": float(f"{decode:.4g}"),
        "threads": 1,
        "command": command,
    }


@torch.inference_mode()
def decoding_rate(net: Any, context: list[int]) -> float:
    """Return tokens per second of processor time, one at a time after some others, as a median."""
    net.eval()
    out = net(torch.tensor([context]), use_cache=True)
    spans = []
    for _ in range(DECODED):
        start = time.process_time()
        token = out.logits[:, -1:].argmax(-1)
        out = net(token, past_key_values=out.past_key_values, use_cache=True)
        spans.append(time.process_time() - start)
    return 1 / statistics.median(spans)


# ---------------------------------------------------------------- fixture


def fixture(run: Run, net: Any) -> dict[str, Any]:
    """Return a short piece of the held-out split with its nats per token.

    Args:
        run: The run.
        net: The network as it is loaded from the card.
    """
    text = _piece(run)
    ids = _ids(run, FIXTURE) if text is None else run.data.tokenizer.encode(text)
    return {"input": text, "ids": list(ids), "nll": fixture_nll(net, ids)}


def _piece(run: Run) -> str | None:
    """Return some text or bases from the middle of the held-out split; None where it is neither."""
    from statezoo.datamodules import DNA, Text

    data = run.data
    if isinstance(data, Text):
        raw = data.raw(run.split)
        half = raw[raw.find(b"\n", len(raw) // 2) + 1 :] or raw
        words = half.decode("utf-8", "ignore").lstrip()[: 20 * FIXTURE].split(" ")
        counts = range(1, len(words) + 1)
        pieces = (" ".join(words[:n]) for n in counts)
        return next((p for p in pieces if len(data.tokenizer.encode(p)) >= FIXTURE), None)
    if isinstance(data, DNA):
        codes = max(data.codes(run.split), key=len)
        bases = FIXTURE * data.tokenizer.bases_per_token
        return "".join("ACGTN"[c] for c in codes[len(codes) // 2 :][:bases])
    return None


def _ids(run: Run, n: int) -> list[int]:
    """Return the first scored tokens of the held-out split, at most ``n``."""
    found: list[int] = []
    for batch in islice(run.data.test_dataloader(), 1 + n):
        targets = batch["targets"]
        found += targets[targets != IGNORE].tolist()
        if len(found) >= n:
            break
    return found[:n]


# ---------------------------------------------------------------- trainers


def _trainer(**settings: Any) -> Trainer:
    with quiet():
        return Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
