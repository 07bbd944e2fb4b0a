"""The section of the configuration for http listeners."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from meshlocal.policy.config_types import Bytes, Count, Name, Percent, Seconds, Section
from meshlocal.policy.model import ServiceKey


class RouteConfig(Section, frozen=True):
    """A route by path."""

    prefix: Annotated[Name, Meta(description="Of the path, from its first slash, in whole segments.")]
    service: Annotated[ServiceKey, Meta(description="Where such requests go.")]
    host: Annotated[Name | None, Meta(description="Only requests for this host, without a port; null: any.")] = None


class HttpConfig(Section, frozen=True):
    """What holds for http listeners."""

    routes: Annotated[
        tuple[RouteConfig, ...],
        Meta(description="Routes by path prefix, for listeners that name no service; other requests go by their host."),
    ] = ()
    cluster_domain: Annotated[
        Name, Meta(description="The domain of full service names: SERVICE.NAMESPACE.svc.DOMAIN.")
    ] = "cluster.local"
    max_services: Annotated[
        Count, Meta(description="Services that are followed because a request named them, at most.")
    ] = 256
    service_idle_timeout: Annotated[
        Seconds, Meta(description="Seconds without a request after which such a service is followed no longer.")
    ] = 600.0
    max_head: Annotated[Bytes, Meta(description="Bytes of a request's or response's head; more: 431.")] = 65536
    max_headers: Annotated[Count, Meta(description="Header lines of a request or response; more: 431.")] = 128
    max_target: Annotated[Bytes, Meta(description="Bytes of a request's target; more: 414.")] = 16384
    max_body: Annotated[Bytes | None, Meta(description="Bytes of a request's body; more: 413; null: no limit.")] = None
    header_timeout: Annotated[
        Seconds,
        Meta(
            description="Seconds from a request's first byte, or the connection's start, to the head's end; then 408."
        ),
    ] = 10.0
    body_timeout: Annotated[
        Seconds, Meta(description="Seconds without a byte of a request's body after which it is given up with 408.")
    ] = 60.0
    keep_alive_timeout: Annotated[
        Seconds, Meta(description="Seconds that a client's connection may stay open between requests.")
    ] = 600.0
    pool_size: Annotated[Count, Meta(description="Unused connections kept open to one instance, at most.")] = 256
    pool_idle_timeout: Annotated[
        Seconds, Meta(description="Seconds that an unused connection to an instance is kept open.")
    ] = 60.0
    retry_percent: Annotated[
        Percent, Meta(description="Retries after an answer (retry_on), in percent of a service's requests.")
    ] = 20
    retry_floor: Annotated[
        Bytes, Meta(description="Such retries that are allowed in ten seconds however few the requests are.")
    ] = 10
    x_forwarded: Annotated[
        Literal["keep", "append", "remove"],
        Meta(description="What becomes of X-Forwarded-For and X-Forwarded-Proto in requests."),
    ] = "keep"
    via: Annotated[
        Name | None, Meta(description="The name that Via gets, in requests and responses; null: no Via is added.")
    ] = None
    response_headers: Annotated[
        bool, Meta(description="Tell in x-meshlocal-instance, -tier, -reason and -attempts how a response came about.")
    ] = False
