"""The manifests are good, and the checker says so only because it would find what is wrong."""

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def checker() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    try:
        import check_manifests

        yield check_manifests
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def builds(checker: Any) -> Any:
    found, findings = checker.build_all(checker.MANIFESTS)
    assert not findings
    return {build.name: build for build in found}


@pytest.fixture
def findings(checker: Any, builds: Any) -> Any:
    """What the rules find once `edit` has changed the build's document of that kind and name."""

    def find(name: Any, kind: Any, document_name: Any, edit: Any) -> Any:
        build = copy.deepcopy(builds[name])
        chosen = next(
            each
            for each in build.documents
            if each["kind"] == kind and each["metadata"]["name"].startswith(document_name)
        )
        edit(chosen)
        return [line for rule in (*checker.RULES, checker.meshlocal_containers) for line in rule(build)]

    return find


def test_the_manifests_are_good(checker: Any) -> None:
    found, count = checker.check()
    assert found == []
    assert count >= 30


def test_every_folder_is_built_and_every_version_checked(checker: Any, builds: Any) -> None:
    assert set(builds) == {
        "base/discovery",
        "components/ipv6",
        "components/network-policy",
        "components/nodes",
        "components/xds",
        "example",
        "mutual-tls/authority",
        "mutual-tls/discovery",
        "mutual-tls/example",
    }
    assert checker.versions()[0] == "1.29"
    assert len(checker.versions()) >= 9


def pod(document: Any) -> Any:
    return document["spec"]["template"]["spec"]


def sidecar(document: Any) -> Any:
    return pod(document)["initContainers"][0]


def config(key: Any, old: Any, new: Any) -> Any:
    def edit(document: Any) -> None:
        assert old in document["data"][key]
        document["data"][key] = document["data"][key].replace(old, new)

    return edit


def move_sidecar(document: Any) -> None:
    pod(document)["containers"].append(pod(document).pop("initContainers")[0])


DISCOVERY = ("base/discovery", "Deployment", "meshlocal-discovery")
CALLER = ("example", "Deployment", "caller")
PROXY_CONFIG = ("example", "ConfigMap", "meshlocal-proxy")
DISCOVERY_CONFIG = ("base/discovery", "ConfigMap", "meshlocal-discovery")
ROLE = ("base/discovery", "ClusterRole", "meshlocal-discovery")
BROKEN = {
    # Rights.
    "a verb": (ROLE, lambda d: d["rules"][0]["verbs"].append("get"), "verbs get: only list and watch are needed"),
    "every verb": (ROLE, lambda d: d["rules"][0].update(verbs=["*"]), "verbs *: only list and watch"),
    "secrets": (ROLE, lambda d: d["rules"][1]["resources"].append("secrets"), "secrets is not needed"),
    "another group": (ROLE, lambda d: d["rules"][1].update(apiGroups=["*"]), "endpoints.* is not needed"),
    "urls": (ROLE, lambda d: d["rules"][0].update(nonResourceURLs=["/"]), "nonResourceURLs are not needed"),
    "no role": (
        ("base/discovery", "ClusterRoleBinding", "meshlocal"),
        lambda d: d["roleRef"].update(name="other"),
        "no ClusterRole other is in the build",
    ),
    "no account": (
        ("base/discovery", "ClusterRoleBinding", "meshlocal"),
        lambda d: d["subjects"][0].update(namespace="other"),
        "no ServiceAccount meshlocal-discovery is in the build",
    ),
    "an account that nobody made": (
        DISCOVERY,
        lambda d: pod(d).update(serviceAccountName="other"),
        "no ServiceAccount other",
    ),
    "a token for nothing": (
        CALLER,
        lambda d: pod(d).pop("automountServiceAccountToken"),
        "automountServiceAccountToken is True",
    ),
    "no token": (
        DISCOVERY,
        lambda d: pod(d).update(automountServiceAccountToken=False),
        "automountServiceAccountToken is False",
    ),
    # Pod security.
    "pod security off": (
        ("example", "Namespace", "meshlocal-example"),
        lambda d: d["metadata"].update(labels={}),
        "does not enforce pod security",
    ),
    "no namespace": (
        ("example", "Service", "b"),
        lambda d: d["metadata"].update(namespace="other"),
        "no Namespace other is in the build",
    ),
    "root": (DISCOVERY, lambda d: pod(d)["securityContext"].update(runAsNonRoot=False), "runAsNonRoot is not true"),
    "user 0": (DISCOVERY, lambda d: pod(d)["securityContext"].update(runAsUser=0), "runAsUser is not a number above 0"),
    "no seccomp": (DISCOVERY, lambda d: pod(d)["securityContext"].pop("seccompProfile"), "seccompProfile is not"),
    "escalation": (
        CALLER,
        lambda d: sidecar(d)["securityContext"].pop("allowPrivilegeEscalation"),
        "container meshlocal: allowPrivilegeEscalation is not false",
    ),
    "writable root": (
        CALLER,
        lambda d: sidecar(d)["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem is not true",
    ),
    "privileged": (CALLER, lambda d: sidecar(d)["securityContext"].update(privileged=True), "privileged is on"),
    "capabilities kept": (
        CALLER,
        lambda d: sidecar(d)["securityContext"].pop("capabilities"),
        "capabilities.drop is not [ALL]",
    ),
    "capabilities added": (
        CALLER,
        lambda d: sidecar(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "capabilities.add has more",
    ),
    "host network": (CALLER, lambda d: pod(d).update(hostNetwork=True), "hostNetwork is on"),
    "host path": (
        CALLER,
        lambda d: pod(d)["volumes"].append({"name": "etc", "hostPath": {"path": "/etc"}}),
        "volume etc: hostPath is not restricted",
    ),
    "host port": (CALLER, lambda d: sidecar(d)["ports"][0].update(hostPort=15000), "a hostPort is taken"),
    # What refers to what.
    "a selector": (DISCOVERY, lambda d: d["spec"]["selector"].update(matchLabels={"a": "b"}), "does not match its own"),
    "no config map": (
        DISCOVERY,
        lambda d: pod(d)["volumes"][0]["configMap"].update(name="other"),
        "volume config: no ConfigMap other",
    ),
    "a service of nobody": (
        ("example", "Service", "b"),
        lambda d: d["spec"].update(selector={"a": "b"}),
        "Service b: its selector matches no pod template",
    ),
    "a service's port": (
        ("example", "Service", "b"),
        lambda d: d["spec"]["ports"][0].update(targetPort="other"),
        "Service b: no container has a port other",
    ),
    "a policy's port": (
        ("components/network-policy", "NetworkPolicy", "meshlocal"),
        lambda d: d["spec"]["ingress"][0]["ports"][0].update(port="other"),
        "no container has a port other",
    ),
    "a budget of nothing": (
        ("base/discovery", "PodDisruptionBudget", "meshlocal"),
        lambda d: d["spec"].update(minAvailable=2),
        "minAvailable 2 lets no pod go",
    ),
    # Containers.
    "no tag": (CALLER, lambda d: pod(d)["containers"][0].update(image="busybox"), "image busybox has no tag"),
    "no tag, but a port": (
        CALLER,
        lambda d: pod(d)["containers"][0].update(image="example.com:5000/busybox"),
        "has no tag",
    ),
    "another version": (
        CALLER,
        lambda d: sidecar(d).update(image="example.com/meshlocal:0.0.1"),
        "image example.com/meshlocal is 0.0.1, the package",
    ),
    "no memory limit": (CALLER, lambda d: sidecar(d)["resources"].pop("limits"), "no resources.limits.memory"),
    "no cpu request": (
        CALLER,
        lambda d: sidecar(d)["resources"]["requests"].pop("cpu"),
        "no resources.requests.cpu",
    ),
    "no readiness": (CALLER, lambda d: pod(d)["containers"][0].pop("readinessProbe"), "caller: no readinessProbe"),
    "no liveness": (DISCOVERY, lambda d: pod(d)["containers"][0].pop("livenessProbe"), "no livenessProbe"),
    "a probe's port": (
        DISCOVERY,
        lambda d: pod(d)["containers"][0]["livenessProbe"]["httpGet"].update(port="other"),
        "livenessProbe: it has no port other",
    ),
    # meshlocal's own.
    "a flag": (CALLER, lambda d: sidecar(d)["args"].append("--node"), "args: No such option"),
    "a command": (CALLER, lambda d: sidecar(d).update(args=["serve"]), "expected proxy or discovery first"),
    "nothing run": (CALLER, lambda d: sidecar(d)["args"].append("--help"), "the command would end at once"),
    "its command": (CALLER, lambda d: sidecar(d).update(command=["sh"]), "command: the image's own is replaced"),
    "no file": (
        CALLER,
        lambda d: sidecar(d).update(args=["proxy", "--config", "/etc/meshlocal/other.yaml"]),
        "no config map is mounted with /etc/meshlocal/other.yaml",
    ),
    "a key": (PROXY_CONFIG, config("proxy.yaml", "drain:", "drains:"), "proxy.drains"),
    "an address": (DISCOVERY_CONFIG, config("discovery.yaml", ":7070", ":70700"), "discovery.bind[0]"),
    "a variable": (
        CALLER,
        lambda d: sidecar(d)["env"].append({"name": "MESHLOCAL_PROXY__DRAIN__DELAY", "value": "soon"}),
        "proxy.drain.delay",
    ),
    "a short grace": (CALLER, lambda d: pod(d).update(terminationGracePeriodSeconds=4), "is less than drain.delay"),
    "a long drain": (
        DISCOVERY_CONFIG,
        config("discovery.yaml", "timeout: 10", "timeout: 26"),
        "terminationGracePeriodSeconds, 30, is less than drain.delay + drain.timeout, 31",
    ),
    "admin on loopback": (
        PROXY_CONFIG,
        config("proxy.yaml", "0.0.0.0:15000", "127.0.0.1:15000"),
        "the kubelet cannot reach 127.0.0.1:15000",
    ),
    "admin elsewhere": (
        PROXY_CONFIG,
        config("proxy.yaml", "0.0.0.0:15000", "0.0.0.0:15009"),
        "port 15000 is not the admin address, 0.0.0.0:15009",
    ),
    "a probe's path": (
        CALLER,
        lambda d: sidecar(d)["livenessProbe"]["httpGet"].update(path="/health"),
        "/health is none of /livez, /readyz",
    ),
    "discovery on loopback": (
        DISCOVERY_CONFIG,
        config("discovery.yaml", "0.0.0.0:7070", "127.0.0.1:7070"),
        "127.0.0.1:7070 cannot be reached",
    ),
    "no native sidecar": (
        CALLER,
        lambda d: sidecar(d).pop("restartPolicy"),
        "init container with restartPolicy: Always",
    ),
    "an ordinary container": (CALLER, move_sidecar, "init container with restartPolicy: Always"),
    "started too late": (
        CALLER,
        lambda d: pod(d)["initContainers"].insert(0, {"name": "migrate", "image": "busybox:1.37"}),
        "an init container before it has no proxy yet",
    ),
    "not awaited": (
        CALLER,
        lambda d: sidecar(d)["startupProbe"]["httpGet"].update(path="/livez"),
        "startupProbe: it is not /readyz",
    ),
    "impatience": (
        CALLER,
        lambda d: sidecar(d)["startupProbe"].update(failureThreshold=5),
        "startupProbe gives up after 5 s",
    ),
    "no node": (CALLER, lambda d: sidecar(d)["env"].pop(0), "env NODE_NAME is not the field spec.nodeName"),
    "no own namespace": (CALLER, lambda d: sidecar(d)["env"].pop(1), "env MESHLOCAL_PROXY__NAMESPACE is not the field"),
    "no discovery": (PROXY_CONFIG, config("proxy.yaml", "meshlocal.svc:7070", "other.svc:7070"), "no Service offers"),
    "no service": (PROXY_CONFIG, config("proxy.yaml", "15001=b", "15001=c"), "no Service c in meshlocal-example"),
    "a service's port name": (PROXY_CONFIG, config("proxy.yaml", "name: http", "name: grpc"), "has no port grpc"),
    "a port twice": (
        CALLER,
        lambda d: pod(d)["containers"][0].update(ports=[{"containerPort": 15001}]),
        "port 15001 is that of Deployment caller: container caller",
    ),
}


@pytest.mark.parametrize(("where", "edit", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_manifest_is_found(findings: Any, where: Any, edit: Any, expected: Any) -> None:
    found = findings(*where, edit)
    assert [line for line in found if expected in line], found
    assert all("\n" not in line for line in found)


@pytest.fixture
def broken_tree(checker: Any, tmp_path: Any, monkeypatch: Any) -> Any:
    ends = [checker.versions()[0], checker.versions()[-1]]
    monkeypatch.setattr(checker, "versions", lambda: ends)

    def change(file: Any, old: Any, new: Any) -> Any:
        tree = tmp_path / "manifests"
        shutil.copytree(checker.MANIFESTS, tree)
        text = (tree / file).read_text()
        assert old in text
        (tree / file).write_text(text.replace(old, new))
        return tree

    return change


def test_an_unknown_field_is_found_once_for_all_versions(checker: Any, broken_tree: Any) -> None:
    found, _ = checker.check(broken_tree("base/discovery/disruption-budget.yaml", "minAvailable:", "minAvailables:"))
    schema = [line for line in found if "(Kubernetes" in line]
    assert len(schema) == 1
    assert "base/discovery: PodDisruptionBudget meshlocal-discovery: spec: " in schema[0]
    assert "'minAvailables'" in schema[0]
    assert schema[0].endswith("(Kubernetes {} to {})".format(*checker.versions()))


def test_an_unknown_kind_is_found(checker: Any, broken_tree: Any) -> None:
    found, _ = checker.check(broken_tree("example/b.yaml", "apps/v1", "apps/v1beta1"))
    assert [line for line in found if "no DaemonSet of apps/v1beta1 is known" in line]


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("example/certificates.yaml", "secretName: b-tls", "secret: b-tls", "Certificate b: spec: "),
        ("example/certificates.yaml", "size: 256", "size: large", "Certificate caller: spec.privateKey.size: "),
        ("authority/authority.yaml", "selfSigned: {}", "vault: {}", "ClusterIssuer meshlocal-root: spec: "),
        ("example/certificates.yaml", "secretName: b-tls", "secretName: c", "no Certificate makes Secret b-tls"),
        ("example/b.yaml", "defaultMode: 0440", "defaultMode: 0444", "volume tls: everybody may read it"),
        ("example/inbound.yaml", "@127.0.0.1:8080", "@127.0.0.1:9", "proxy.listen: no container has a port 9"),
    ],
)
def test_what_is_wrong_with_the_overlay_is_found(
    checker: Any, broken_tree: Any, file: str, old: str, new: str, problem: str
) -> None:
    found, _ = checker.check(broken_tree(f"mutual-tls/{file}", old, new))
    assert [line for line in found if problem in line], found


def test_what_cannot_be_built_is_found(checker: Any, broken_tree: Any) -> None:
    found, _ = checker.check(broken_tree("example/kustomization.yaml", "b.yaml", "absent.yaml"))
    # The overlay that is built on it cannot be, either.
    assert [line.partition(":")[0] for line in found] == ["example", "mutual-tls/example"]
    assert all("cannot be built: " in line and "absent.yaml" in line for line in found)


def test_a_deprecated_kustomization_is_found(checker: Any, broken_tree: Any) -> None:
    found, _ = checker.check(
        broken_tree("example/kustomization.yaml", "labels:\n  - pairs:\n     ", "commonLabels:\n  ")
    )
    assert [line for line in found if "deprecated" in line]


def test_a_folder_without_kustomizations_is_found(checker: Any, tmp_path: Any) -> None:
    assert checker.check(tmp_path)[0] == [f"{tmp_path}: no kustomization.yaml"]


def test_findings_end_the_program_with_one_line_each(checker: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(checker, "check", lambda: (["one", "two"], 2))
    with pytest.raises(SystemExit) as ended:
        checker.main()
    assert ended.value.code == "one\ntwo"
