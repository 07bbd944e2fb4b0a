"""What a manifest must keep that its schema cannot see. Each rule yields one line for each thing wrong.

A rule looks at one build: the documents that `kubectl kustomize` made of one folder. What depends on meshlocal's own
command line and configuration stands in manifest_commands.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]

OUR_IMAGE = "meshlocal"
VOLUMES = {"configMap", "secret", "emptyDir", "projected", "downwardAPI", "persistentVolumeClaim", "ephemeral", "csi"}
READABLE = {("discovery.k8s.io", "endpointslices"), ("", "endpoints"), ("", "nodes")}
VERBS = {"list", "watch"}
FOREIGN = {"cert-manager"}
"""Namespaces that are there before."""


@dataclass(frozen=True)
class Container:
    """A container of a pod template. `init` is its place among the init containers, None for an ordinary one."""

    where: str
    spec: Document
    init: int | None

    @property
    def sidecar(self) -> bool:
        return self.init is not None and self.spec.get("restartPolicy") == "Always"

    @property
    def ours(self) -> bool:
        return image_of(self.spec)[0].rsplit("/", 1)[-1] == OUR_IMAGE

    @property
    def role(self) -> str:
        return next(iter(self.spec.get("args") or ()), "")

    @property
    def ports(self) -> dict[str, int]:
        return {port.get("name", ""): port["containerPort"] for port in self.spec.get("ports", ())}


@dataclass(frozen=True)
class Pod:
    """A workload's pod template."""

    where: str
    namespace: str
    labels: Mapping[str, str]
    spec: Document
    workload: Document

    @property
    def containers(self) -> list[Container]:
        spec = self.spec
        listed: list[tuple[Document, int | None]] = [
            (each, place) for place, each in enumerate(spec.get("initContainers", ()))
        ]
        listed += [(each, None) for each in spec["containers"]]
        return [Container(f"{self.where}: container {each['name']}", each, place) for each, place in listed]


@dataclass
class Build:
    """One folder's documents.

    Attributes:
        services: the Services of all builds, by name and namespace.
        version: the package's.
    """

    name: str
    documents: Sequence[Document]
    version: str
    services: Mapping[tuple[str, str], Document] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] in kinds]

    def find(self, kind: str, name: str, namespace: str | None = None) -> Document | None:
        for each in self.of_kind(kind):
            if each["metadata"]["name"] == name and namespace in (None, each["metadata"].get("namespace")):
                return each
        return None

    @property
    def pods(self) -> list[Pod]:
        found = []
        for each in self.of_kind("Deployment", "DaemonSet", "StatefulSet", "Job"):
            meta, template = each["metadata"], each["spec"]["template"]
            labels = template.get("metadata", {}).get("labels", {})
            found.append(Pod(say(each), meta.get("namespace", ""), labels, template["spec"], each))
        return found

    def selected(self, namespace: str, labels: Mapping[str, str]) -> list[Pod]:
        return [pod for pod in self.pods if pod.namespace == namespace and labels.items() <= pod.labels.items()]


def say(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def image_of(container: Document) -> tuple[str, str]:
    """The image's name and tag; the tag is empty if there is none."""
    name, _, tag = container["image"].partition("@")[0].rpartition(":")
    return (name, tag) if name and "/" not in tag else (container["image"], "")


def pod_security(build: Build) -> Iterator[str]:
    """The Pod Security Standards' profile `restricted`, a read-only root, and no token for who needs none."""
    for pod in build.pods:
        spec, context = pod.spec, pod.spec.get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(key):
                yield f"{pod.where}: {key} is on"
        for volume in spec.get("volumes", ()):
            if other := volume.keys() - VOLUMES - {"name"}:
                yield f"{pod.where}: volume {volume['name']}: {', '.join(sorted(other))} is not restricted"
        for container in pod.containers:
            yield from _container_security(container, context)
        account = spec.get("serviceAccountName", "default")
        token = spec.get("automountServiceAccountToken", True)
        if token != ((account, pod.namespace) in _bound_accounts(build)):
            yield f"{pod.where}: automountServiceAccountToken is {token}, but the rights of its account say otherwise"


def _container_security(container: Container, pod_context: Document) -> Iterator[str]:
    where, context = container.where, container.spec.get("securityContext", {})
    both = {**pod_context, **context}
    capabilities = context.get("capabilities", {})
    wrong = {
        "runAsNonRoot is not true": both.get("runAsNonRoot") is not True,
        "runAsUser is not a number above 0": not both.get("runAsUser"),
        "seccompProfile is not RuntimeDefault": both.get("seccompProfile", {}).get("type") != "RuntimeDefault",
        "allowPrivilegeEscalation is not false": context.get("allowPrivilegeEscalation") is not False,
        "readOnlyRootFilesystem is not true": context.get("readOnlyRootFilesystem") is not True,
        "privileged is on": context.get("privileged", False),
        "capabilities.drop is not [ALL]": capabilities.get("drop") != ["ALL"],
        "capabilities.add has more than NET_BIND_SERVICE": set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"},
        "a hostPort is taken": any("hostPort" in port for port in container.spec.get("ports", ())),
    }
    yield from (f"{where}: {text}" for text, is_wrong in wrong.items() if is_wrong)


def namespaces(build: Build) -> Iterator[str]:
    """Everything stands in a namespace of the build, and that enforces `restricted`."""
    for each in build.of_kind("Namespace"):
        if each["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{say(each)}: does not enforce pod security: restricted"
    for each in build.documents:
        namespace = each["metadata"].get("namespace")
        if namespace and namespace not in FOREIGN and not build.find("Namespace", namespace):
            yield f"{say(each)}: no Namespace {namespace} is in the build"


def least_privilege(build: Build) -> Iterator[str]:
    """Roles list and watch what discovery reads, and are bound to accounts of the build."""
    roles = build.of_kind("Role", "ClusterRole")
    for role in roles:
        for rule in role["rules"]:
            if rule.get("nonResourceURLs"):
                yield f"{say(role)}: nonResourceURLs are not needed"
            if verbs := set(rule["verbs"]) - VERBS:
                yield f"{say(role)}: verbs {', '.join(sorted(verbs))}: only list and watch are needed"
            for group in rule.get("apiGroups", ()):
                for resource in rule.get("resources", ()):
                    if (group, resource) not in READABLE:
                        yield f"{say(role)}: {resource}{f'.{group}' if group else ''} is not needed"
    bound = set()
    for binding in build.of_kind("RoleBinding", "ClusterRoleBinding"):
        reference = binding["roleRef"]
        bound.add((reference["kind"], reference["name"]))
        if not build.find(reference["kind"], reference["name"]):
            yield f"{say(binding)}: no {reference['kind']} {reference['name']} is in the build"
        for subject in binding["subjects"]:
            if not build.find(subject["kind"], subject["name"], subject.get("namespace", "")):
                yield f"{say(binding)}: no {subject['kind']} {subject['name']} is in the build"
    for role in roles:
        if (role["kind"], role["metadata"]["name"]) not in bound:
            yield f"{say(role)}: nobody is bound to it"


def _bound_accounts(build: Build) -> set[tuple[str, str]]:
    bindings = build.of_kind("RoleBinding", "ClusterRoleBinding")
    return {(subject["name"], subject.get("namespace", "")) for each in bindings for subject in each["subjects"]}


def references(build: Build) -> Iterator[str]:
    """Selectors select, named ports and mounted config maps exist, and a disruption budget allows a disruption."""
    for pod in build.pods:
        selector = pod.workload["spec"].get("selector", {}).get("matchLabels", {})
        if not selector.items() <= pod.labels.items():
            yield f"{pod.where}: its selector does not match its own template"
        account = pod.spec.get("serviceAccountName", "default")
        if account != "default" and not build.find("ServiceAccount", account, pod.namespace):
            yield f"{pod.where}: no ServiceAccount {account}"
        for volume in pod.spec.get("volumes", ()):
            name = volume.get("configMap", {}).get("name")
            if name and not build.find("ConfigMap", name, pod.namespace):
                yield f"{pod.where}: volume {volume['name']}: no ConfigMap {name}"
            yield from _secret(build, pod, volume)
    for service in build.of_kind("Service"):
        pods = build.selected(service["metadata"].get("namespace", ""), service["spec"].get("selector", {}))
        yield from _ports_exist(say(service), pods, [port.get("targetPort") for port in service["spec"]["ports"]])
    for policy in build.of_kind("NetworkPolicy"):
        labels = policy["spec"]["podSelector"].get("matchLabels", {})
        pods = build.selected(policy["metadata"].get("namespace", ""), labels)
        rules = policy["spec"].get("ingress", ())
        yield from _ports_exist(say(policy), pods, [port["port"] for rule in rules for port in rule.get("ports", ())])
    for budget in build.of_kind("PodDisruptionBudget"):
        labels = budget["spec"]["selector"]["matchLabels"]
        pods = build.selected(budget["metadata"].get("namespace", ""), labels)
        yield from _ports_exist(say(budget), pods, [])
        least = budget["spec"].get("minAvailable", 0)
        if any(isinstance(least, int) and least >= pod.workload["spec"].get("replicas", 1) for pod in pods):
            yield f"{say(budget)}: minAvailable {least} lets no pod go"


def _secret(build: Build, pod: Pod, volume: Document) -> Iterator[str]:
    """A secret that is mounted is one of a certificate of the build, and not for everybody to read."""
    secret = volume.get("secret")
    if secret is None:
        return
    made = {
        each["spec"].get("secretName") for each in build.of_kind("Certificate") if _namespace(each) == pod.namespace
    }
    if secret["secretName"] not in made:
        yield f"{pod.where}: volume {volume['name']}: no Certificate makes Secret {secret['secretName']}"
    if secret.get("defaultMode", 0o644) & 0o007:
        yield f"{pod.where}: volume {volume['name']}: everybody may read it"
    elif secret["defaultMode"] & 0o040 and "fsGroup" not in pod.spec.get("securityContext", {}):
        yield f"{pod.where}: volume {volume['name']}: it is for a group, and the pod has no fsGroup"


def _namespace(document: Document) -> str:
    return str(document["metadata"].get("namespace", ""))


def _ports_exist(where: str, pods: Sequence[Pod], wanted: Sequence[object]) -> Iterator[str]:
    if not pods:
        yield f"{where}: its selector matches no pod template"
        return
    ports = [container.ports for pod in pods for container in pod.containers]
    known = {name for each in ports for name in each} | {number for each in ports for number in each.values()}
    yield from (f"{where}: no container has a port {port}" for port in wanted if port not in known)


def containers(build: Build) -> Iterator[str]:
    """Each has resources, probes of ports that it has, and an image of a known version."""
    for pod in build.pods:
        for container in pod.containers:
            where, spec = container.where, container.spec
            name, tag = image_of(spec)
            if tag in ("", "latest"):
                yield f"{where}: image {spec['image']} has no tag"
            elif container.ours and tag != build.version:
                yield f"{where}: image {name} is {tag}, the package {build.version}"
            resources = spec.get("resources", {})
            for path in ("requests.cpu", "requests.memory", "limits.memory"):
                kind, what = path.split(".")
                if what not in resources.get(kind, {}):
                    yield f"{where}: no resources.{path}"
            if container.init is None or container.sidecar:
                needed = {"readinessProbe"} | ({"livenessProbe", "startupProbe"} if container.ours else set())
                yield from (f"{where}: no {probe}" for probe in sorted(needed - spec.keys()))
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = spec.get(probe, {}).get("httpGet", {}).get("port")
                if port is not None and port not in container.ports and port not in container.ports.values():
                    yield f"{where}: {probe}: it has no port {port}"


RULES: tuple[Callable[[Build], Iterator[str]], ...] = (
    namespaces,
    pod_security,
    least_privilege,
    references,
    containers,
)
