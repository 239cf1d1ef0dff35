"""A tokenizer with more symbols than another has, whose ids stay."""

from __future__ import annotations

from collections.abc import Sequence

from statezoo.datamodules.tokenizers import BPE, Bytes, Characters, Tokenizer

__all__ = ["extend_tokenizer"]


def extend_tokenizer(base: Tokenizer, tokens: Sequence[str]) -> BPE:
    """Return a tokenizer that reads each of ``tokens`` as one symbol, and all else as ``base``.

    Args:
        base: A tokenizer of text.
        tokens: The new symbols, which get the next ids in turn. Where one begins another, the
            longest is read.

    Raises:
        ValueError: If the base is not for text, or a token is empty, given twice or known.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    if not isinstance(base, (BPE, Bytes, Characters)):
        raise ValueError(
            f"only tokenizers of text can be extended, this one is of kind {base.kind!r}: for "
            "other symbols of DNA or music choose another tokenizer and --model.vocabulary new."
        )
    if not tokens or not all(tokens) or len(set(tokens)) < len(tokens):
        raise ValueError(f"needs new symbols, each once and none empty, got {list(tokens)}.")
    backend = Backend.from_str(base.backend().to_str())  # a copy
    if known := [token for token in tokens if backend.token_to_id(token) is not None]:
        raise ValueError(f"{known[0]!r} is a symbol of the tokenizer already: leave it out.")
    bos = backend.id_to_token(base.bos_id)
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    extended = BPE(backend, bos, {k: v for k, v in base._special().items() if v is not None})
    if extended.vocab_size != base.vocab_size + len(tokens):
        raise ValueError(
            f"the tokenizer numbers {base.vocab_size} symbols with gaps, which the new ones would "
            "fill: give a tokenizer whose numbers are whole."
        )
    return extended
