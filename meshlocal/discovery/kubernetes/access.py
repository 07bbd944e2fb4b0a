"""Finds the API server: in a kubeconfig, or in what Kubernetes gives every pod."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec

from meshlocal.discovery.kubernetes.connect_proxy import proxy_of_environment
from meshlocal.discovery.kubernetes.kubeconfig import Access, Content, KubeconfigError, parse_kubeconfigs
from meshlocal.net.log import get_log
from meshlocal.policy.kubernetes_options import KubernetesOptions

_log = get_log(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token (which is replaced from time to time) and the API server's CA."""


def find_access(
    options: KubernetesOptions, environment: Mapping[str, str], home: Path, service_account: Path = SERVICE_ACCOUNT
) -> Access:
    """Read how to reach the cluster. It blocks.

    Where nothing else names an HTTP proxy, the environment's is used (HTTPS_PROXY, NO_PROXY), as kubectl does.

    The first of these that there is: the kubeconfig that the options name; those that `KUBECONFIG` names, separated
    by colons; in a pod, its service account, unless the options name a context; `~/.kube/config`.

    Raises:
        KubeconfigError: there is none, or it cannot be used.
    """
    access = _find_access(options, environment, home, service_account)
    if access.proxy is not None:
        return access
    try:
        proxy = proxy_of_environment(access.scheme, access.host, access.port, environment)
    except ValueError as error:
        # It may be there for other programs, which can use it.
        _say_once(str(error))
        return access
    return msgspec.structs.replace(access, proxy=proxy)


@cache
def _say_once(problem: str) -> None:
    _log.warning("the environment's HTTP proxy is not used", problem=problem)


def _find_access(
    options: KubernetesOptions, environment: Mapping[str, str], home: Path, service_account: Path
) -> Access:
    if options.kubeconfig:
        return parse_kubeconfigs([_read(Path(options.kubeconfig).expanduser())], options.context)
    if listed := [Path(name).expanduser() for name in environment.get("KUBECONFIG", "").split(":") if name]:
        # As kubectl does: of several, those that are missing do not matter.
        found = [path for path in listed if path.exists()] or listed[:1]
        return parse_kubeconfigs([_read(path) for path in found], options.context)
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if host and not options.context and (service_account / "token").exists():
        return in_cluster(host, port, service_account)
    default = home / ".kube" / "config"
    if default.exists():
        return parse_kubeconfigs([_read(default)], options.context)
    raise KubeconfigError(
        f"no cluster to read: no kubeconfig is given, KUBECONFIG is not set, there is no {service_account / 'token'}"
        f" (or no KUBERNETES_SERVICE_HOST), and no {default}"
    )


def in_cluster(host: str, port: str, service_account: Path) -> Access:
    """Access with a pod's service account.

    Raises:
        KubeconfigError: the port is no port.
    """
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise KubeconfigError(f"KUBERNETES_SERVICE_PORT: {port!r} is not within 1 to 65535")
    return Access(
        origin="the pod's service account",
        scheme="https",
        host=host,
        port=int(port),
        authority=Content(file=service_account / "ca.crt"),
        token=Content(file=service_account / "token"),
    )


def _read(path: Path) -> tuple[Path, str]:
    try:
        return path, path.read_bytes().decode()
    except OSError as error:
        raise KubeconfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise KubeconfigError(f"{path}: is not UTF-8 at byte {error.start}") from None
