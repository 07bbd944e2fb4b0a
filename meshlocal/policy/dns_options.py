"""The options of a `dns:` source URL: which name, whose instances it has, and on which nodes they are."""

from __future__ import annotations

import ipaddress
from typing import Literal, cast

import msgspec

from meshlocal.policy.addresses import AddressError, check_host, format_host_port, parse_host_port
from meshlocal.policy.model import ModelError, ServiceKey, parse_service_key
from meshlocal.policy.problems import quote
from meshlocal.policy.source_forms import DNS as FORM
from meshlocal.policy.source_options import SourceOptionsError, read_options, write_options

_OPTIONS = ("service", "type", "port", "port_name", "server", "node")
MAX_NODES = 10_000

RecordType = Literal["SRV", "A", "AAAA", "HOST"]
"""Of records; HOST: A and AAAA."""


class NodeOf(msgspec.Struct, frozen=True):
    """On which node addresses of a network are, as DNS does not say.

    Attributes:
        network: as `10.0.1.0/24`; a single address is one of its own.
        node: the node's name.
    """

    network: str
    node: str


class DnsOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What stands behind `dns:`, written `NAME?service=b&OPTION=VALUE`.

    Attributes:
        name: that is asked for.
        service: whose instances its records are.
        kind: of records: SRV by default where the name begins with an underscore, else HOST.
        port: where they listen; 0: SRV says so.
        port_name: of that port; empty: none.
        server: whom is asked, host and port; None: the system's resolvers.
        nodes: in their order; the narrowest network that has an address counts.
    """

    name: str
    service: ServiceKey
    kind: RecordType
    port: int = 0
    port_name: str = ""
    server: tuple[str, int] | None = None
    nodes: tuple[NodeOf, ...] = ()

    def __str__(self) -> str:
        pairs = [("service", str(self.service)), ("type", self.kind)]
        if self.port:
            pairs.append(("port", str(self.port)))
        if self.port_name:
            pairs.append(("port_name", self.port_name))
        if self.server is not None:
            pairs.append(("server", format_host_port(*self.server)))
        pairs += [("node", f"{each.network}={each.node}") for each in self.nodes]
        return f"{self.name}{write_options(pairs)}"

    @classmethod
    def parse(cls, text: str) -> DnsOptions:
        """Read what follows `dns:`.

        Raises:
            AddressError, SourceOptionsError: it is written otherwise.
        """
        name, question, query = text.partition("?")
        name = name.removeprefix("//").removesuffix(".")
        if not name or not question:
            raise AddressError(f"expected {FORM}, got {quote('dns:' + text)}")
        name = check_host(name).lower()
        if _is_address(name):
            raise AddressError(f"{quote(name)} is an address, and no name to ask for")
        found: dict[str, str] = {}
        nodes: list[NodeOf] = []
        for option, value in read_options(query, _OPTIONS, ("node",)):
            if option == "node":
                nodes.append(_node(value))
            else:
                found[option] = value
        if len(nodes) > MAX_NODES:
            raise SourceOptionsError(f"{len(nodes)} of node; at most {MAX_NODES}")
        if "service" not in found:
            raise SourceOptionsError("service is missing: whose instances the records are")
        try:
            service = parse_service_key(found["service"])
        except ModelError as error:
            raise SourceOptionsError(f"service: {error.what}") from None
        kind = found.get("type", "SRV" if name.startswith("_") else "HOST")
        if kind not in ("SRV", "A", "AAAA", "HOST"):
            raise SourceOptionsError(f"type: expected SRV, A, AAAA or HOST, got {quote(kind)}")
        port = _port(found.get("port"))
        if (kind == "SRV") == bool(port):
            what = "SRV records say the port: leave port out" if port else f"records of type {kind} take port"
            raise SourceOptionsError(what)
        return cls(
            name=name,
            service=service,
            kind=cast("RecordType", kind),
            port=port,
            port_name=found.get("port_name", ""),
            server=_server(found.get("server")),
            nodes=tuple(nodes),
        )


def _port(text: str | None) -> int:
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 65535:
        raise SourceOptionsError(f"port: {quote(text)} is not within 1 to 65535")
    return int(text)


def _server(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    if ":" not in text or _is_address(text):
        host, port = text, 53
    else:
        try:
            host, port = parse_host_port(text, "IP:PORT", text)
        except AddressError as error:
            raise SourceOptionsError(f"server: {error}") from None
    if not _is_address(host) or not port:
        raise SourceOptionsError(f"server: expected IP or IP:PORT, got {quote(text)}")
    return host, port


def _node(text: str) -> NodeOf:
    network, separator, node = text.rpartition("=")
    if not separator or not node.strip():
        raise SourceOptionsError(f"node: expected NETWORK=NODE such as 10.0.1.0/24=n1, got {quote(text)}")
    try:
        return NodeOf(str(ipaddress.ip_network(network)), node)
    except ValueError as error:
        raise SourceOptionsError(f"node: {quote(network)} is no network: {error}") from None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class NodeMap:
    """Finds the node of an address.

    Args:
        nodes: networks and their nodes.
    """

    def __init__(self, nodes: tuple[NodeOf, ...]) -> None:
        self._by_length: dict[tuple[int, int], dict[int, str]] = {}
        """By IP version and length of the prefix: nodes by what the prefix is."""
        for each in nodes:
            network = ipaddress.ip_network(each.network)
            shift = network.max_prefixlen - network.prefixlen
            known = self._by_length.setdefault((network.version, shift), {})
            known.setdefault(int(network.network_address) >> shift, each.node)
        # The narrowest first.
        self._by_length = dict(sorted(self._by_length.items(), key=lambda item: item[0][1]))

    def node(self, address: str) -> str | None:
        """The node of the narrowest network that has the address; None: none has."""
        found = ipaddress.ip_address(address)
        for (version, shift), nodes in self._by_length.items():
            if version == found.version and (node := nodes.get(int(found) >> shift)) is not None:
                return node
        return None
