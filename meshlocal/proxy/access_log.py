"""The access log: one line for each request, at its end (R1)."""

from __future__ import annotations

from collections.abc import Mapping

from meshlocal.client.account import Account
from meshlocal.client.statistics import Outcome
from meshlocal.net.log import get_log
from meshlocal.net.sockets import format_address

_log = get_log("meshlocal.access")


def log_request(
    account: Account,
    outcome: Outcome,
    now: float,
    *,
    peer: object,
    identity: str = "",
    ids: Mapping[str, object] | None = None,
    sent: int,
    received: int,
    asked: Mapping[str, object] | None = None,
    problem: Mapping[str, object],
) -> None:
    """Write a request's line.

    Args:
        account: the request's.
        outcome: how it ended.
        now: when it did, by the clock of its start.
        peer: the client's address.
        identity: who the client proved to be; empty if it proved nothing.
        ids: fields that say which request it was.
        sent: bytes of it that went to the instance.
        received: bytes that came from there.
        asked: fields that say what it asked for.
        problem: fields that say what was wrong, if something was.
    """
    pick = account.pick
    _log.info(
        "request",
        service=account.state.key if account.state is not None else None,
        client=format_address(peer),
        **({"identity": identity} if identity else {}),
        **(ids or {}),
        **(asked or {}),
        instance=str(pick.instance.key) if pick is not None else None,
        node=(pick.instance.node or None) if pick is not None else None,
        tier=account.tier or None,
        reason=account.reason or None,
        attempts=account.attempts,
        outcome=outcome,
        **problem,
        sent=sent,
        received=received,
        seconds=round(now - account.started, 6),
    )


def log_refused(peer: object, status: int, reason: str) -> None:
    """Write the line for what is no request, or never became one."""
    _log.info("request", client=format_address(peer), status=status, error=reason)
