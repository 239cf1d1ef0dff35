"""``statezoo probe sampler``; torch is imported only where it is needed."""

from __future__ import annotations

import sys

__all__ = ["sampler"]


def sampler(
    *,
    model: str,
    tokens: int = 16384,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Test that a model draws from its own probabilities; exits with 1 if not.

    Rows of unequal prompts are continued together, with the cache, at temperature 1 and without
    the grammar of music or the alphabet of DNA; the mean of -log p - entropy over what was drawn,
    with p of a parallel pass, must be as near to 0 as the laws themselves say.

    Args:
        model: Checkpoint, folder of a run, exported folder, or name of a causal model.
        tokens: Tokens to draw, at least; four times as many halve the shift that is seen, which is
            wanted where the law is nearly uniform, as of DNA.
        batch_size: Rows that they are drawn in; more and shorter ones look closer at prompts.
        seed: The same seed draws the same tokens.
        device: Where to run: cpu, cuda, mps.

    Raises:
        ValueError: If a number is out of range, or there is no such model.
        SystemExit: With code 1 if the sampler does not draw from the model's law.
    """
    if min(tokens, batch_size) < 1 or seed < 0:
        raise ValueError(
            "probe sampler needs tokens and batch_size of at least 1 and a seed of at least 0, got "
            f"{tokens}, {batch_size} and {seed}."
        )
    from statezoo.evaluation.scoring import open_scorer
    from statezoo.probe.sampler import random_prompts, sampler_test

    opened = open_scorer(model, device, batch_size)
    prompts = random_prompts(
        batch_size, opened.tokenizer.bos_id, int(opened.net.config.vocab_size), seed
    )
    found = sampler_test(opened.net, prompts, new_tokens=-(-tokens // batch_size), seed=seed)
    sys.stdout.write(f"{found}\n")
    if not found.passed:
        raise SystemExit(1)
