"""Finding the cluster: kubeconfigs, as kubectl reads them, and a pod's service account."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshlocal.discovery.kubernetes.access import find_access
from meshlocal.discovery.kubernetes.kubeconfig import Access, Content, ExecPlugin, KubeconfigError, parse_kubeconfigs
from meshlocal.policy.kubernetes_options import KubernetesOptions

HERE = Path("/etc/k")


def config(cluster: Any = None, user: Any = None, **more: Any) -> Any:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443"} | (cluster or {})}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    } | more


def parse(document: Any, context: Any = "", name: Any = "config") -> Any:
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    return parse_kubeconfigs([(HERE / name, text)], context)


def test_the_least() -> None:
    assert parse(config()) == Access(origin="/etc/k/config (context x)", scheme="https", host="10.0.0.1", port=6443)


@pytest.mark.parametrize(
    ("server", "read"),
    [
        ("https://k.example:8443/", ("https", "k.example", 8443, "")),
        ("https://k.example/k8s/clusters/c-1/", ("https", "k.example", 443, "/k8s/clusters/c-1")),
        ("http://127.0.0.1:8001", ("http", "127.0.0.1", 8001, "")),
        ("https://[fd00::1]:6443", ("https", "fd00::1", 6443, "")),
        ("http://h", ("http", "h", 80, "")),
    ],
)
def test_servers(server: Any, read: Any) -> None:
    found = parse(config({"server": server}))
    assert (found.scheme, found.host, found.port, found.path) == read


def test_everything_of_a_cluster() -> None:
    """Files are relative to the kubeconfig; data goes before files."""
    found = parse(
        config(
            {
                "certificate-authority": "pki/ca.crt",
                "insecure-skip-tls-verify": True,
                "tls-server-name": "kubernetes",
                "proxy-url": "http://me:p%40ss@proxy:3128",
            }
        )
    )
    assert found.authority == Content(file=HERE / "pki/ca.crt")
    assert (found.insecure, found.server_name) == (True, "kubernetes")
    assert found.proxy == ("proxy", 3128, "Basic " + base64.b64encode(b"me:p@ss").decode())
    data = {"certificate-authority-data": base64.b64encode(b"PEM").decode(), "certificate-authority": "pki/ca.crt"}
    assert parse(config(data)).authority == Content(b"PEM")


@pytest.mark.parametrize(
    ("user", "fields"),
    [
        ({"token": "abc"}, {"token": Content(b"abc")}),
        ({"token": "abc", "tokenFile": "token"}, {"token": Content(file=HERE / "token")}),
        ({"tokenFile": "/run/token"}, {"token": Content(file=Path("/run/token"))}),
        (
            {"client-certificate": "c.crt", "client-key-data": "a2V5"},
            {"certificate": Content(file=HERE / "c.crt"), "key": Content(b"key")},
        ),
        (
            {
                "exec": {
                    "apiVersion": "client.authentication.k8s.io/v1",
                    "command": "bin/login",
                    "args": ["--now"],
                    "env": [{"name": "A", "value": "1"}],
                    "installHint": "apt install login\n",
                    "interactiveMode": "IfAvailable",
                }
            },
            {
                "plugin": ExecPlugin(
                    "client.authentication.k8s.io/v1",
                    str(HERE / "bin/login"),
                    ("--now",),
                    {"A": "1"},
                    "apt install login",
                )
            },
        ),
        (None, {}),
    ],
)
def test_users(user: Any, fields: Any) -> None:
    found = parse(config(user=user))
    wanted = {"token": Content(), "certificate": Content(), "key": Content(), "plugin": None} | fields
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_what_a_plugin_is_told_of_the_cluster() -> None:
    extension = {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": "login",
        "provideClusterInfo": True,
    }
    cluster = {"extensions": [{"name": "other", "extension": 1}, extension], "certificate-authority": "ca.crt"}
    found = parse(config(cluster, {"exec": plugin})).plugin
    assert found.command == "login"
    assert found.cluster == {"server": "https://10.0.0.1:6443", "config": {"audience": "x"}}


def test_a_context_by_name() -> None:
    document = config(contexts=[{"name": "x", "context": {}}, {"name": "y", "context": {"cluster": "c"}}])
    assert parse(document, "y").origin == "/etc/k/config (context y)"


def test_json_is_read_too() -> None:
    assert parse(json.dumps(config())).host == "10.0.0.1"


def test_files_are_merged() -> None:
    """Of entries with one name, and of current contexts, the first file's wins; paths are each file's own."""
    first = {"users": [{"name": "u", "user": {"tokenFile": "one"}}], "current-context": "x"}
    second = config({"certificate-authority": "ca"}, {"tokenFile": "two"}, **{"current-context": "y"})
    files = [(Path("/a/config"), yaml.safe_dump(first)), (Path("/b/config"), yaml.safe_dump(second))]
    found = parse_kubeconfigs(files)
    assert found.token == Content(file=Path("/a/one"))
    assert found.authority == Content(file=Path("/b/ca"))
    assert found.origin == "/a/config, /b/config (context x)"


EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "command": "login"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("a: [", "/etc/k/config:"),
        ("- a", "/etc/k/config:1: expected a mapping"),
        ("", "/etc/k/config: has no current-context; name a context"),
        (config(**{"current-context": "z"}), "contexts: has no 'z' (from current-context)"),
        (config(**{"current-context": "xx"}), "did you mean 'x'?"),
        (config(contexts=[{"name": "x", "context": {"user": "u"}}]), "contexts[0].context: names no cluster"),
        (config(clusters=None), "clusters: has no 'c' (from context 'x')"),
        (config(users=7), "users: expected a list, got the number 7"),
        (
            config({"server": "10.0.0.1"}),
            "clusters[0].cluster.server: expected https://HOST[:PORT][/PATH], got '10.0.0.1'",
        ),
        (config({"server": "https://u:p@h"}), "server: expected https://HOST"),
        (config({"server": "https://h:99999"}), "server: 'https://h:99999' is no URL"),
        (config({"server": 7}), "server: expected text, got the number 7; put it between quotes"),
        (
            config({"insecure-skip-tls-verify": "yes"}),
            "insecure-skip-tls-verify: expected true or false, got the text 'yes'",
        ),
        (config({"certificate-authority-data": "%%%"}), "certificate-authority-data: is no base64"),
        (config({"proxy-url": "socks5://h"}), "proxy-url: only http:// proxies are supported"),
        (config(user={"username": "u", "password": "p"}), "users[0].user.username: passwords are not supported"),
        (config(user={"auth-provider": {"name": "gcp"}}), "auth-provider: is not supported"),
        (config(user={"as": "root"}), "users[0].user.as: impersonation is not supported"),
        (config(user={"client-certificate": "c"}), "has a client certificate, but no client key"),
        (config(user={"client-key-data": "a2V5"}), "has a client key, but no client certificate"),
        (config(user={"exec": EXEC | {"apiVersion": "v1"}}), "exec.apiVersion: expected one of client.auth"),
        (config(user={"exec": {"apiVersion": EXEC["apiVersion"]}}), "exec.command: is missing"),
        (config(user={"exec": EXEC | {"interactiveMode": "Always"}}), "a plugin that needs a terminal"),
        (config(user={"exec": EXEC | {"args": [1]}}), "exec.args[0]: expected text, got the number 1"),
    ],
)
def test_what_cannot_be_used(document: Any, message: Any) -> None:
    """The message names the file, the line where there is one, the key, and what is wrong."""
    with pytest.raises(KubeconfigError) as caught:
        parse(document)
    assert message in str(caught.value)
    assert str(caught.value).startswith("/etc/k/config")


def test_secrets_are_not_repeated() -> None:
    """What is wrong with a secret is told without the secret."""
    for user in ({"token": ["hunter2"]}, {"client-key-data": "hunter2!"}, {"username": "u", "password": "hunter2"}):
        with pytest.raises(KubeconfigError) as caught:
            parse(config(user=user))
        assert "hunter2" not in str(caught.value)


# Where it is looked for.


@pytest.fixture
def place(tmp_path: Any) -> Any:
    """A home with a kubeconfig, another beside it, and a pod's service account."""
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(yaml.safe_dump(config({"server": "https://home"})))
    (tmp_path / "other").write_text(yaml.safe_dump(config({"server": "https://other"})))
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("t")

    def find(options: Any = "", **environment: Any) -> Any:
        return find_access(KubernetesOptions.parse(options), environment, tmp_path, account)

    finder: Any = find
    finder.path = tmp_path
    return finder


IN_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}


def test_order(place: Any) -> None:
    """The options' file; KUBECONFIG's; the pod's service account; the home's."""
    other = str(place.path / "other")
    assert place(f"?kubeconfig={other}", KUBECONFIG="/nope", **IN_POD).host == "other"
    assert place(KUBECONFIG=f"/nope:{other}", **IN_POD).host == "other"
    assert place(**IN_POD).host == "10.96.0.1"
    assert place("?context=x", **IN_POD).host == "home", "a context is one of a kubeconfig"
    assert place().host == "home"
    (place.path / "account" / "token").unlink()
    assert place(**IN_POD).host == "home"


def test_in_a_pod(place: Any) -> None:
    account = place.path / "account"
    assert place(**IN_POD) == Access(
        origin="the pod's service account",
        scheme="https",
        host="10.96.0.1",
        port=6443,
        authority=Content(file=account / "ca.crt"),
        token=Content(file=account / "token"),
    )
    with pytest.raises(KubeconfigError, match=r"KUBERNETES_SERVICE_PORT: 'tcp://x' is not within 1 to 65535"):
        place(KUBERNETES_SERVICE_HOST="h", KUBERNETES_SERVICE_PORT="tcp://x")


def test_nowhere(place: Any) -> None:
    (place.path / ".kube" / "config").unlink()
    with pytest.raises(KubeconfigError, match="no cluster to read: no kubeconfig is given, KUBECONFIG is not set"):
        place()
    with pytest.raises(KubeconfigError, match="/nope: cannot be read: No such file"):
        place(KUBECONFIG="/nope")
    (place.path / "latin").write_bytes(b"\xff")
    with pytest.raises(KubeconfigError, match="latin: is not UTF-8 at byte 0"):
        place(f"?kubeconfig={place.path}/latin")
