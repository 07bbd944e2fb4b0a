"""The section of the configuration for traces."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshlocal.policy.addresses import CollectorUrl
from meshlocal.policy.config_types import AnyPercent, Name, Section


class TracingConfig(Section, frozen=True):
    """What is told of single HTTP requests, by OTLP over HTTP."""

    endpoint: Annotated[
        CollectorUrl | None,
        Meta(
            description="A collector of OTLP over HTTP, such as http://127.0.0.1:4318; without a path, /v1/traces is"
            " asked. null: nothing is recorded, and traceparent passes through."
        ),
    ] = None
    sample_percent: Annotated[
        AnyPercent,
        Meta(
            description="Of requests without traceparent, those of which a trace begins here, in percent; where there"
            " is one, its caller has decided."
        ),
    ] = 1.0
    service_name: Annotated[Name, Meta(description="What the spans' service.name is.")] = "meshlocal"
    token_file: Annotated[
        Name | None,
        Meta(description="A file with a token, which the collector gets as Authorization: Bearer; null: none."),
    ] = None
    ca_file: Annotated[
        Name | None, Meta(description="The authorities, in PEM, of an https collector; null: the system's.")
    ] = None

    @property
    def share(self) -> float | None:
        """The share of requests without a trace whose trace begins here, from 0 to 1; None: nothing is recorded."""
        return self.sample_percent / 100 if self.endpoint is not None else None
