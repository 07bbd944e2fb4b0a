"""The sections of the configuration that say who may ask a server."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshlocal.policy.config_types import Name, Section


class AdminAccessConfig(Section, frozen=True):
    """Who may read the pages of the admin address. /livez and /readyz are open to all."""

    names: Annotated[
        tuple[Name, ...],
        Meta(
            description="Host names and addresses by which the pages are asked for, beside localhost, loopback"
            " addresses and the address that was connected to; others are refused, so that no page of the web can read"
            " them."
        ),
    ] = ()
    token_file: Annotated[
        Name | None,
        Meta(
            description="A file with a token that who asks must send, as a bearer token or as a password of any user;"
            " null: none. It is read again when it changes."
        ),
    ] = None
    certificate_file: Annotated[
        Name | None,
        Meta(description="A certificate, in PEM, with which the pages are served over TLS; null: without TLS."),
    ] = None
    key_file: Annotated[
        Name | None, Meta(description="The certificate's key, in PEM; null: it stands in certificate_file.")
    ] = None


class AllowConfig(Section, frozen=True):
    """What one caller of a discovery server, or each of several, may see."""

    identity: Annotated[
        Name,
        Meta(
            description="Who: a URI of a client's certificate such as spiffe://example/ns/*/sa/web, with * for a"
            " segment of the path; a DNS name of it; or the name that stands behind a token in tokens_file."
        ),
    ]
    services: Annotated[
        tuple[Name, ...],
        Meta(min_length=1, description="Services that it may see; * stands for any characters: b, *.shop, *."),
    ]
