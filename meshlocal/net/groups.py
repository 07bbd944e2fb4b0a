"""Exception groups where they tell of one failure only: its user handles the failure, and no group."""

from __future__ import annotations


def single(error: BaseException) -> BaseException:
    """What a group holds if that is one exception, however deep; else the group, or what is none."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def first_of(error: Exception) -> Exception:
    """The first exception of a group, however deep; or what is none."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
