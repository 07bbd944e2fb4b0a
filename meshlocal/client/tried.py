"""What was tried for a request, in words: for logs and for errors."""

from __future__ import annotations

from collections.abc import Sequence

from meshlocal.policy.model import EndpointKey

_SHOWN = 3
"""Attempts told of at either end of a long row of them."""


def attempt_text(key: EndpointKey, tier: str, error: str) -> str:
    """One attempt that failed.

    Args:
        key: of the instance.
        tier: its tier's name.
        error: how it failed, in a word.
    """
    return f"{key} ({tier}) {error}"


def in_a_row(attempts: Sequence[str]) -> str:
    """Several in their order; of many the first, which are the nearest ones, and the last."""
    shown = list(attempts)
    if len(shown) > 2 * _SHOWN:
        shown[_SHOWN:-_SHOWN] = [f"… {len(shown) - 2 * _SHOWN} more …"]
    return ", ".join(shown)
