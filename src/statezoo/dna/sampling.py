"""New DNA drawn from a model, base by base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statezoo.dna.output import Lines
from statezoo.dna.scoring import Model, Prefix, extend, open_model

__all__ = ["generate"]


def generate(
    model: str | Model,
    out: str | Path,
    *,
    prompt: str = "",
    n: int = 1,
    tokens: int = 400,
    temperature: float = 1.0,
    top_k: int = 4,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write sequences that go on from a prompt as FASTA; nothing but A, C, G and T is drawn.

    The same arguments give the same file on one machine.

    Args:
        model: Checkpoint, folder of a run, exported folder or Hub id of a causal model; or an
            opened one.
        out: File to write, ``.fa`` or ``.fa.gz``; each sequence begins with the prompt.
        prompt: Bases to go on from, any case; N may be among them.
        n: Sequences.
        tokens: Tokens to draw for each; with single bases, bases.
        temperature: 0 takes the likeliest, 1 draws from the model's probabilities.
        top_k: Draw from this many likeliest tokens; 0 from all.
        seed: The same seed gives the same sequences.
        batch_size: Sequences at once; part of what a seed means.
        device: Where to run.

    Returns:
        Counts of sequences and drawn tokens.

    Raises:
        ValueError: If the prompt is no DNA, a number is out of range, or the model is no causal
            model of DNA.
    """
    if min(n, tokens, batch_size) < 1 or min(temperature, top_k, seed) < 0:
        raise ValueError(
            "dna generate needs n, tokens and batch_size of at least 1, temperature, top_k and "
            f"seed of at least 0; got {n}, {tokens}, {batch_size}, {temperature}, {top_k}, {seed}."
        )
    prompt = prompt.upper()
    if set(prompt) - {*"ACGTN"}:
        wrong = sorted(set(prompt) - {*"ACGTN"})
        raise ValueError(f"a prompt is made of A, C, G, T and N; got {' '.join(wrong)}.")
    opened = open_model(model, device, "dna generate", ("causal",), single=False)
    drawn = [*opened.tokenizer.scored]
    settings = {"prompt": prompt, "n": n, "tokens": tokens, "temperature": temperature}
    settings |= {"top_k": top_k, "seed": seed, "batch_size": batch_size}
    settings["weights"] = opened.fingerprint
    summary = {"sequences": n, "tokens": n * tokens}
    with Lines(out, "dna generate", settings) as lines:
        if lines.finished is None:
            for number, start in enumerate(range(0, n, batch_size)):
                rows = min(batch_size, n - start)
                if lines.skip(2 * rows):
                    continue
                own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
                random = torch.Generator(device).manual_seed(own)
                ids = _draw(opened, prompt, rows, tokens, temperature, top_k, random, drawn)
                for i, row in enumerate(ids.tolist(), start + 1):
                    name = f">generated_{i} prompt={len(prompt)} seed={seed}"
                    lines.write([name, prompt + opened.tokenizer.decode(row)])
            lines.finish(summary)
    return summary


@torch.inference_mode()
def _draw(
    model: Model,
    prompt: str,
    rows: int,
    tokens: int,
    temperature: float,
    top_k: int,
    random: torch.Generator,
    drawn: list[int],
) -> Tensor:
    """Draw ``[rows tokens]`` after the prompt."""
    allowed = torch.tensor(drawn, device=model.net.device)
    start = torch.tensor([[model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]] * rows)
    state = extend(model, start)
    found = []
    for _ in range(tokens):
        scores = state.log_probs[:, allowed]
        if 0 < top_k < len(drawn):
            least = scores.topk(top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if temperature == 0:
            choice = scores.argmax(-1, keepdim=True)
        else:
            choice = torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)
        found.append(allowed[choice])
        state = _next(model, state, found[-1])
    return torch.cat(found, 1).cpu()


def _next(model: Model, state: Prefix, ids: Tensor) -> Prefix:
    """Read one more token; the state is replaced, never written in place."""
    return extend(model, ids, state)
