"""The section of the configuration for http listeners."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from meshlocal.policy.config_types import Bytes, Count, Name, Percent, Seconds, Section, Window
from meshlocal.policy.model import ServiceKey


class RouteConfig(Section, frozen=True):
    """A route by path."""

    prefix: Annotated[Name, Meta(description="Of the path, from its first slash, in whole segments.")]
    service: Annotated[ServiceKey, Meta(description="Where such requests go.")]
    host: Annotated[Name | None, Meta(description="Only requests for this host, without a port; null: any.")] = None


class Http2Config(Section, frozen=True):
    """What holds for HTTP/2 on http listeners, and to instances that speak it."""

    max_streams: Annotated[
        Count, Meta(description="Requests at once on one client's connection; more are refused (REFUSED_STREAM).")
    ] = 100
    upstream_streams: Annotated[
        Count, Meta(description="Requests at once on one connection to an instance, if that allows so many.")
    ] = 100
    connections: Annotated[
        Count, Meta(description="Connections to one instance at most; then requests wait for one that is free.")
    ] = 8
    window: Annotated[
        Window, Meta(description="Bytes of one stream that were not passed on yet, at most; either way.")
    ] = 65535
    keepalive_interval: Annotated[
        Seconds,
        Meta(
            description="Seconds of silence, while requests are under way, after which a PING is sent; gRPC servers end"
            " a connection that pings more often than every 300."
        ),
    ] = 300.0
    keepalive_timeout: Annotated[
        Seconds, Meta(description="Seconds that a PING's answer may take before the connection is given up.")
    ] = 10.0
    resets: Annotated[
        Count, Meta(description="Streams that a client may reset at once after a while without; more ends it.")
    ] = 1000
    resets_per_second: Annotated[Count, Meta(description="Streams that a client may reset in a second.")] = 100
    control_frames: Annotated[
        Count, Meta(description="PING, SETTINGS and empty DATA frames of a client at once; more ends its connection.")
    ] = 1000
    control_frames_per_second: Annotated[Count, Meta(description="The same in a second.")] = 100
    continuations: Annotated[Count, Meta(description="CONTINUATION frames of one head, at most.")] = 8


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
    http2: Annotated[Http2Config, Meta(description="What holds for HTTP/2.")] = Http2Config()
    request_id: Annotated[
        Literal["keep", "make"],
        Meta(
            description="keep: X-Request-Id passes through, and an answer of the proxy's own gets one where a request"
            " has none; make: every request without one gets one, which its instance is told."
        ),
    ] = "keep"
    response_headers: Annotated[
        bool, Meta(description="Tell in x-meshlocal-instance, -tier, -reason and -attempts how a response came about.")
    ] = False
