"""The options of a `kubernetes:` source URL: which cluster, and what of it."""

from __future__ import annotations

import re

import msgspec

from meshlocal.policy.problems import quote
from meshlocal.policy.source_options import SourceOptionsError, read_options, write_options, yes_or_no

_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123, section 2.1, as Kubernetes has it
_OPTIONS = ("namespace", "selector", "kubeconfig", "context", "cluster", "nodes")
MAX_NAMESPACES = 100


class KubernetesOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What stands behind `kubernetes:`, written `?namespace=a&namespace=b&selector=app%3Db`.

    Attributes:
        namespaces: whose services are read; none: all of them, which takes the right to read all.
        selector: a Kubernetes label selector for the slices, which carry their service's labels; empty: all.
        kubeconfig: a kubeconfig file; empty: `$KUBECONFIG`, else the pod's service account, else `~/.kube/config`.
        context: a context of the kubeconfig; empty: its current one.
        cluster: the labels `cluster` and `cluster_id` of its instances; empty: those of the discovery server.
        nodes: whether to read the nodes' topology labels (zone, region), where that is allowed.
    """

    namespaces: tuple[str, ...] = ()
    selector: str = ""
    kubeconfig: str = ""
    context: str = ""
    cluster: str = ""
    nodes: bool = True

    def __str__(self) -> str:
        pairs = [("namespace", namespace) for namespace in self.namespaces]
        single = ("selector", "kubeconfig", "context", "cluster")
        pairs += [(name, value) for name in single if (value := getattr(self, name))]
        if not self.nodes:
            pairs.append(("nodes", "no"))
        return write_options(pairs)

    @classmethod
    def parse(cls, text: str) -> KubernetesOptions:
        """Read what follows `kubernetes:`: nothing, or `?` and `name=value` pairs, percent-encoded, joined by `&`.

        Raises:
            SourceOptionsError: it is written otherwise, names an unknown option, or one but `namespace` twice.
        """
        if text in ("", "?"):
            return cls()
        if not text.startswith("?"):
            raise SourceOptionsError(f"expected kubernetes: or kubernetes:?OPTION=VALUE, got {quote(text)} after it")
        found: dict[str, str] = {}
        namespaces: list[str] = []
        for name, value in read_options(text[1:], _OPTIONS, ("namespace",)):
            if name == "namespace":
                namespaces.append(_namespace(value, namespaces))
            else:
                found[name] = value
        if len(namespaces) > MAX_NAMESPACES:
            raise SourceOptionsError(f"{len(namespaces)} namespaces; at most {MAX_NAMESPACES}")
        nodes = yes_or_no(found, "nodes", default=True)
        return cls(namespaces=tuple(namespaces), nodes=nodes, **found)


def _namespace(value: str, before: list[str]) -> str:
    if not _NAMESPACE.fullmatch(value):
        what = "is no namespace (small letters, digits, '-'; at most 63)"
        raise SourceOptionsError(f"namespace: {quote(value)} {what}")
    if value in before:
        raise SourceOptionsError(f"namespace: {quote(value)} stands twice")
    return value
