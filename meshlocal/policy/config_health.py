"""The sections of the configuration for health, limits, return and spill (H1, H3, F2, F3)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshlocal.policy.config_types import Count, Seconds, Section


class EjectionConfig(Section, frozen=True):
    """When an instance on which requests fail is tried last of all, and for how long (H1)."""

    failures: Annotated[
        Count | None, Meta(description="Requests that fail on an instance in a row until it is ejected; null: never.")
    ] = 3
    time: Annotated[
        Seconds, Meta(description="Seconds of the first ejection; each further one is twice as long; before jitter.")
    ] = 5.0
    max_time: Annotated[Seconds, Meta(description="Seconds of an ejection at most, before jitter.")] = 60.0


class LimitsConfig(Section, frozen=True):
    """How much is taken on at once; what comes beyond is refused at once."""

    connections: Annotated[Count | None, Meta(description="Connections of clients, at most; null: no limit.")] = None
    requests: Annotated[
        Count | None,
        Meta(description="Requests under way, at most; a tcp connection is one request; null: no limit."),
    ] = None
    waiting: Annotated[
        Count | None, Meta(description="Requests that wait for an instance to be connected, at most; null: no limit.")
    ] = None
