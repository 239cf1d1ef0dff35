"""Whether a sampler draws from the law that its model states: log-probability against entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statezoo.evaluation.scoring import LOGITS

__all__ = ["ERROR", "SamplerTest", "random_prompts", "sampler_test"]

ERROR = 1e-6
"""Probability that a sound sampler is called broken."""
TILTS = torch.tensor([s * 2.0**-k for s in (1, -1) for k in range(1, 9)], dtype=torch.float64)
"""At which cumulants bound the sum: above 0 from above, below 0 from below."""
LOWEST = -700.0
"""Nats of a log-probability that is taken for none."""
LENGTHS = (1, 6, 11, 16)
"""Tokens of random prompts."""


class SamplerTest(NamedTuple):
    """What :func:`sampler_test` found.

    Attributes:
        tokens: Drawn tokens.
        mean: Of ``-log p - entropy`` over them, in nats; 0 is expected of a sound sampler.
        low: Least mean that chance explains, in nats.
        high: Greatest mean that chance explains, in nats.
        z: The mean in its standard deviations.
        entropy: Of the model's law, a mean over the same places, in nats.
        error: Probability that chance alone leads out of ``low`` and ``high``.
    """

    tokens: int
    mean: float
    low: float
    high: float
    z: float
    entropy: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether chance explains the mean; False where that is no number."""
        return self.low <= self.mean <= self.high

    def __str__(self) -> str:
        numbers = (
            f"{self.tokens} tokens: mean of -log p - entropy {self.mean:+.4f} nats, bounds "
            f"{self.low:+.4f} and {self.high:+.4f} (error {self.error:g}), z {self.z:+.1f}, "
            f"entropy {self.entropy:.3f} nats"
        )
        if self.passed:
            return f"{numbers}: the sampler draws from the model's law"
        if self.mean < self.low:
            why = "likely tokens come too often, as with a temperature below 1, top-k or top-p"
        else:
            why = (
                "unlikely tokens come too often, as with a lost state, wrong positions, padding "
                "that is read, dropout, or a temperature above 1"
            )
        return f"{numbers}: the sampler does not draw from the model's law; {why}"


def sampler_test(
    net: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    seed: int = 0,
    error: float = ERROR,
) -> SamplerTest:
    r"""Hold tokens that a model draws against its probabilities, as a martingale.

    .. math::
        M_n = \sum_{t \le n} \bigl(-\log p(x_t \mid x_{<t}) - H_t\bigr), \qquad
        K_t(\lambda) = \log \sum_x p(x \mid x_{<t})^{1 - \lambda} - \lambda H_t

    For tokens drawn from ``p``, ``exp(lambda M - sum K(lambda))`` has mean 1, so that ``lambda M``
    exceeds ``log(m / error) + sum K(lambda)`` for one of ``m`` fixed ``lambda`` with probability
    ``error`` at most. These are Freedman's bounds before the cumulant ``K`` of each step, known
    here, is bounded by its variance and range; nothing is assumed of lengths or laws.

    Tokens are drawn with ``net.generate`` at temperature 1 from the whole vocabulary: as one batch,
    padded on the left, with the cache, in the mode that ``net`` is in; an end token does not end a
    row. Probabilities are of one parallel pass in evaluation mode, without padding or cache.

    A fault is seen where it shifts the mean beyond the bounds, so best with a net whose law is far
    from uniform and leans on its state; where the state hardly matters, its loss hardly shows.

    Args:
        net: Causal network.
        prompts: Tokens to go on from, at least one each; of unequal lengths they test padding.
        new_tokens: Tokens to draw after each.
        seed: The same seed draws the same tokens; the generators of torch are left as they are.
        error: Probability that a sound sampler is called broken.

    Raises:
        ValueError: If there is nothing to draw, or a number is out of range.

    Source: log-perplexity against entropy after Radvand et al., arXiv:2501.02406v4; bounds after
    Howard et al., arXiv:1808.03204, where Freedman's (1975) is a case.
    """
    if not prompts or min(map(len, prompts)) < 1:
        raise ValueError("sampler_test needs prompts of at least one token each.")
    if new_tokens < 1 or not 0 < error < 1:
        raise ValueError(
            "sampler_test needs new_tokens of at least 1 and an error in (0, 1), "
            f"got {new_tokens} and {error}."
        )
    drawn = _draw(net, prompts, new_tokens, seed)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        total = torch.zeros(3 + len(TILTS), dtype=torch.float64)
        for length in sorted({len(prompt) for prompt in prompts}):  # rows that need no padding
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            past = torch.tensor([list(prompts[i]) for i in rows], device=drawn.device)
            for part in torch.cat([past, drawn[rows]], 1).split(_rows(net, new_tokens)):
                with torch.inference_mode():
                    logits = net(part, logits_to_keep=new_tokens + 1).logits[:, :-1]
                total += law_sums(logits.flatten(0, 1), part[:, length:].flatten())
    finally:
        for module, mode in modes:
            module.training = mode
    return conclude(total, drawn.numel(), error)


def _rows(net: Any, new_tokens: int) -> int:
    """Return how many rows are scored at once; in float64, some copies of each logit are held."""
    return max(1, LOGITS // (8 * new_tokens * int(net.config.vocab_size)))


def _draw(net: Any, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int) -> Tensor:
    """Return the tokens ``[B new_tokens]`` that the model draws after the prompts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = torch.device(net.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        found: Tensor = net.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[:, longest:]


def law_sums(logits: Tensor, drawn: Tensor) -> Tensor:
    """Sum over places what :func:`conclude` needs.

    Args:
        logits: ``[n W]``, of any scale.
        drawn: Tokens ``[n]``.

    Returns:
        Sums of ``-log p - entropy``, of its variance, of the entropy, and of the cumulant at each
        of ``TILTS``: float64 on the CPU.
    """
    log_p = logits.double().log_softmax(-1)
    found = -log_p.gather(-1, drawn[:, None])[:, 0]
    log_p = log_p.clamp(min=LOWEST)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p + entropy[:, None]).square()).sum(-1)
    sums = [(found - entropy).sum(), variance.sum(), entropy.sum()]
    sums += [(((1 - t) * log_p).logsumexp(-1) - t * entropy).sum() for t in TILTS.tolist()]
    return torch.stack(sums).cpu()


def conclude(sums: Tensor, tokens: int, error: float) -> SamplerTest:
    """Bound the mean from :func:`law_sums` over ``tokens`` places."""
    total, variance, entropy = sums[:3].tolist()
    ends = (math.log(len(TILTS) / error) + sums[3:]) / TILTS
    return SamplerTest(
        tokens=tokens,
        mean=total / tokens,
        low=float(ends[TILTS < 0].max()) / tokens,
        high=float(ends[TILTS > 0].min()) / tokens,
        z=total / math.sqrt(max(variance, 1e-300)),
        entropy=entropy / tokens,
        error=error,
    )


def random_prompts(n: int, first: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts of 1, 6, 11 and 16 tokens in turn; all tokens but the first are uniform.

    Args:
        n: Prompts.
        first: Token that each begins with.
        vocab_size: Number of tokens.
        seed: The same seed gives the same prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(vocab_size, (n, max(LENGTHS) - 1), generator=generator).tolist()
    return [[first, *row[: LENGTHS[i % len(LENGTHS)] - 1]] for i, row in enumerate(more)]
