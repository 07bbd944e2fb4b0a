"""The sections of the configuration for TLS (T1 to T4)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from meshlocal.policy.config_types import Name, PortNumber, Seconds, Section

TlsVersion: TypeAlias = Literal["1.2", "1.3"]

_MinVersion = Annotated[TlsVersion, Meta(description="The least version of TLS that is spoken.")]


_WorkloadApi = Annotated[
    Name | None,
    Meta(
        description="The socket of a SPIFFE agent, such as unix:///run/spire/agent.sock: what has no certificate_file"
        " or ca_file of its own has the certificate and the authorities that the agent gives; null: none."
    ),
]


class TlsConfig(Section, frozen=True):
    """The proxy's own certificate, and whom its tls and https listeners let in."""

    workload_api: _WorkloadApi = None

    certificate_file: Annotated[
        Name | None,
        Meta(
            description="The proxy's certificate and those between it and its authority, in PEM. It is read again when"
            " it changes."
        ),
    ] = None
    key_file: Annotated[
        Name | None, Meta(description="The certificate's key, in PEM; null: it stands in certificate_file.")
    ] = None
    client_ca_file: Annotated[
        Name | None,
        Meta(
            description="The authorities, in PEM, of which one must have signed a client's certificate; null: clients"
            " are not asked for one."
        ),
    ] = None
    client_certificate: Annotated[
        Literal["required", "optional"], Meta(description="With client_ca_file: whether clients must have one.")
    ] = "required"
    allow: Annotated[
        tuple[Name, ...],
        Meta(
            description="Identities of clients that are let in: URIs such as spiffe://example/ns/*/sa/web, with * for a"
            " segment of the path, and DNS names; empty: every client that client_ca_file admits."
        ),
    ] = ()
    min_version: _MinVersion = "1.3"
    handshake_timeout: Annotated[Seconds, Meta(description="Seconds that a client's handshake may take.")] = 5.0


class UpstreamTlsConfig(Section, frozen=True):
    """How the instances of a service are spoken to over TLS, and what they must prove. Nothing falls back to plaintext
    (T1)."""

    ca_file: Annotated[
        Name | None,
        Meta(
            description="The authorities, in PEM, of which one must have signed an instance's certificate; null: those"
            " of workload_api, else of the system."
        ),
    ] = None
    server_name: Annotated[
        Name | None,
        Meta(description="The name that instances are asked for, and must prove unless identity says otherwise."),
    ] = None
    identity: Annotated[
        Name | None,
        Meta(
            description="The URI or DNS name that an instance must prove; a label of its own in braces:"
            " spiffe://example/ns/{namespace}/sa/{service_account}. null: server_name."
        ),
    ] = None
    certificate_file: Annotated[
        Name | None, Meta(description="The proxy's certificate towards them, in PEM; null: that of proxy.tls, if any.")
    ] = None
    key_file: Annotated[
        Name | None, Meta(description="That certificate's key, in PEM; null: it stands in certificate_file.")
    ] = None
    port: Annotated[
        PortNumber | None, Meta(description="The port on which instances speak TLS; null: the instance's own.")
    ] = None
    skip_tiers: Annotated[
        tuple[Name, ...],
        Meta(
            description="Tiers, such as node, whose instances are spoken to in plaintext at their own port, if their"
            " address is one of this host's own: nothing of it leaves the machine."
        ),
    ] = ()
    min_version: _MinVersion = "1.3"

    @property
    def summary(self) -> str:
        """How instances are spoken to, for people."""
        who = f"identity {self.identity}" if self.identity is not None else f"name {self.server_name}"
        parts = [f"TLS {self.min_version} or newer; an instance must prove the {who}"]
        if self.port is not None:
            parts.append(f"at port {self.port}")
        if self.skip_tiers:
            parts.append(f"in plaintext to this host's own addresses in tier {', '.join(self.skip_tiers)}")
        return "; ".join(parts)
