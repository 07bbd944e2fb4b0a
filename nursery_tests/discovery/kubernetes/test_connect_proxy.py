"""The HTTP proxy of the environment, on the way to an API server."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlocal.discovery.kubernetes.access import find_access
from meshlocal.discovery.kubernetes.connect_proxy import proxy_of_environment
from meshlocal.net.http_client import ConnectProxy
from meshlocal.policy.kubernetes_options import KubernetesOptions

PROXY = ConnectProxy("proxy.example", 3128, "")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"HTTP_PROXY": "http://proxy.example:3128"}, None),
        ({"HTTPS_PROXY": ""}, None),
        ({"HTTPS_PROXY": "http://proxy.example:3128"}, PROXY),
        ({"https_proxy": "http://proxy.example:3128"}, PROXY),
        ({"HTTPS_PROXY": "proxy.example:3128"}, PROXY),
        ({"HTTPS_PROXY": "http://proxy.example"}, ConnectProxy("proxy.example", 80, "")),
        ({"HTTPS_PROXY": "http://me:x@proxy.example"}, ConnectProxy("proxy.example", 80, "Basic bWU6eA==")),
    ],
)
def test_the_environment_names_a_proxy(environment: dict[str, str], found: ConnectProxy | None) -> None:
    assert proxy_of_environment("https", "api.example", 6443, environment) == found


def test_an_api_server_without_tls_has_a_variable_of_its_own() -> None:
    environment = {"HTTP_PROXY": "http://proxy.example:3128", "HTTPS_PROXY": "http://other.example"}
    assert proxy_of_environment("http", "api.example", 80, environment) == PROXY


@pytest.mark.parametrize(
    ("host", "excepted", "straight"),
    [
        ("api.example", "*", True),
        ("api.example", "api.example", True),
        ("API.example", "api.EXAMPLE", True),
        ("api.example", "example", True),
        ("api.example", ".example", True),
        ("api.example", "*.example", True),
        ("example", ".example", False),
        ("example", "example", True),
        ("myexample", "example", False),
        ("api.example", "other.test, api.example", True),
        ("api.example", "api.example:6443", True),
        ("api.example", "api.example:443", False),
        ("api.example", " , .", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.0/8", True),
        ("10.0.0.1", "10.0.0.1:6443", True),
        ("11.0.0.1", "10.0.0.0/8", False),
        ("110.0.0.1", "10.0.0.1", False),
        ("fd00::1", "fd00::/8", True),
        ("localhost", "", True),
        ("127.0.0.9", "", True),
        ("::1", "", True),
    ],
)
def test_what_no_proxy_excepts(host: str, excepted: str, straight: bool) -> None:
    environment = {"HTTPS_PROXY": "http://proxy.example:3128", "no_proxy": excepted}
    assert (proxy_of_environment("https", host, 6443, environment) is None) is straight


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("socks5://me:secret@h", "environment HTTPS_PROXY: only http:// proxies are supported"),
        ("http://h:secret", "environment HTTPS_PROXY: is no URL"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_not_shown(value: str, told: str) -> None:
    with pytest.raises(ValueError, match="environment") as caught:
        proxy_of_environment("https", "api.example", 6443, {"HTTPS_PROXY": value})
    assert str(caught.value) == told


def kubeconfig(folder: Path, proxy: str = "") -> KubernetesOptions:
    file = folder / "config"
    file.write_text(
        "{current-context: c, contexts: [{name: c, context: {cluster: k}}],"
        f" clusters: [{{name: k, cluster: {{server: 'https://api.example:6443'{proxy}}}}}]}}"
    )
    return KubernetesOptions(kubeconfig=str(file))


def test_a_kubeconfigs_own_proxy_goes_first(tmp_path: Path) -> None:
    environment = {"HTTPS_PROXY": "http://proxy.example:3128"}
    assert find_access(kubeconfig(tmp_path), environment, tmp_path).proxy == PROXY
    own = kubeconfig(tmp_path, ", proxy-url: 'http://own.example:1'")
    assert find_access(own, environment, tmp_path).proxy == ConnectProxy("own.example", 1, "")
    assert find_access(kubeconfig(tmp_path), {}, tmp_path).proxy is None
    # One that is there for other programs keeps nobody from going straight there.
    assert find_access(kubeconfig(tmp_path), {"HTTPS_PROXY": "socks5://h"}, tmp_path).proxy is None


def test_a_pods_service_account_goes_through_it_too(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HTTPS_PROXY": "http://proxy.example:3128"}
    assert find_access(KubernetesOptions(), environment, tmp_path, tmp_path).proxy == PROXY
    environment["NO_PROXY"] = "10.96.0.0/12,.svc"
    assert find_access(KubernetesOptions(), environment, tmp_path, tmp_path).proxy is None
