"""Widths of heads, checked."""


def head_width(mixer: str, what: str, width: float, n_heads: int = 1) -> int:
    """Return ``width / n_heads``.

    Args:
        mixer: Name of the mixer, for the message.
        what: How the width comes about, for the message.
        width: Width of all heads.
        n_heads: Number of heads.

    Raises:
        ValueError: If that is no whole number of at least 1.
    """
    whole = round(width)
    if n_heads < 1 or whole < n_heads or abs(whole - width) > 1e-6 * width or whole % n_heads:
        raise ValueError(
            f"{mixer}: the width {width:g} ({what}) must be a whole multiple of {n_heads} heads."
        )
    return whole // n_heads
