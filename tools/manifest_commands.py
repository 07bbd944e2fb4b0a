"""Whether the manifests' meshlocal containers would run: their arguments and configuration are read as meshlocal reads
them, and what the manifest says beside them must fit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from unittest.mock import patch

import click
from manifest_rules import Build, Container, Pod

from meshlocal.cli.main import cli
from meshlocal.policy.addresses import fixed_place
from meshlocal.policy.config import Config, DrainConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.model import is_fixed

DEFAULT_GRACE = 30
ADMIN_PATHS = {"/livez", "/readyz"}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
FIELDS = {"spec.nodeName": "node-1", "metadata.name": "pod-1", "status.podIP": "10.0.0.1", "status.hostIP": "10.0.0.2"}
"""What stands for the fields of a pod that its environment refers to."""


def meshlocal_containers(build: Build) -> Iterator[str]:
    """Their command line and configuration are good, and the manifest fits them."""
    for pod in build.pods:
        for container in pod.containers:
            if not container.ours:
                continue
            try:
                config = load_as_run(build, pod, container)
            except click.ClickException as error:
                yield f"{container.where}: args: {error.format_message()}"
            except ConfigError as error:
                yield from (f"{container.where}: {problem}" for problem in error.problems)
            except LookupError as error:
                yield f"{container.where}: {error.args[0]}"
            else:
                yield from _fits(build, pod, container, config)


def load_as_run(build: Build, pod: Pod, container: Container) -> Config:
    """The configuration that the container's command would run with.

    Raises:
        click.ClickException: the arguments are none of meshlocal's.
        ConfigError: the configuration cannot be used.
        LookupError: the manifest does not give what the command reads.
    """
    arguments = list(container.spec.get("args") or ())
    if container.spec.get("command"):
        raise LookupError("command: the image's own is replaced")
    if container.role not in ("proxy", "discovery"):
        raise LookupError(f"args: expected proxy or discovery first, got {container.role!r}")
    captured: list[Callable[[], Config]] = []
    with tempfile.TemporaryDirectory() as folder:
        for position, argument in enumerate(arguments[:-1]):
            if argument == "--config":
                file = Path(folder, PurePosixPath(arguments[position + 1]).name)
                file.write_text(_mounted(build, pod, container, arguments[position + 1]))
                arguments[position + 1] = str(file)
        with (
            patch("meshlocal.app.run.run_proxy", captured.append),
            patch("meshlocal.app.run.run_discovery", captured.append),
            patch.dict(os.environ, _environment(pod, container), clear=True),
        ):
            cli.commands[container.role].main(arguments[1:], prog_name=container.role, standalone_mode=False)
            if not captured:
                raise LookupError("args: the command would end at once")
            return captured[0]()


def _mounted(build: Build, pod: Pod, container: Container, path: str) -> str:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    for mount in container.spec.get("volumeMounts", ()):
        name = volumes.get(mount["name"], {}).get("configMap", {}).get("name")
        if name and str(PurePosixPath(path).parent) == mount["mountPath"]:
            data = (build.find("ConfigMap", name, pod.namespace) or {}).get("data", {})
            if PurePosixPath(path).name in data:
                return str(data[PurePosixPath(path).name])
    raise LookupError(f"args: no config map is mounted with {path}")


def _environment(pod: Pod, container: Container) -> dict[str, str]:
    fields = {**FIELDS, "metadata.namespace": pod.namespace}
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    for each in container.spec.get("env", ()):
        reference = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if "value" in each:
            environment[each["name"]] = each["value"]
        elif reference in fields:
            environment[each["name"]] = fields[reference]
    return environment


def _fits(build: Build, pod: Pod, container: Container, config: Config) -> Iterator[str]:
    where, spec = container.where, container.spec
    part = config.proxy if container.role == "proxy" else config.discovery
    yield from _grace(pod, container, part.drain)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = spec.get(probe, {}).get("httpGet")
        if get is None:
            continue
        port = container.ports.get(get["port"], get["port"])
        if part.admin is None or port != part.admin.port:
            yield f"{where}: {probe}: port {port} is not the admin address, {part.admin}"
        elif part.admin.host in LOOPBACK:
            yield f"{where}: {probe}: the kubelet cannot reach {part.admin}"
        if get["path"] not in ADMIN_PATHS:
            yield f"{where}: {probe}: {get['path']} is none of {', '.join(sorted(ADMIN_PATHS))}"
    if container.role == "discovery":
        yield from (
            f"{where}: discovery.bind: {bound} cannot be reached from outside of the pod"
            for bound in config.discovery.bind
            if bound.host in LOOPBACK
        )
    else:
        yield from _sidecar(build, pod, container, config)


def _grace(pod: Pod, container: Container, drain: DrainConfig) -> Iterator[str]:
    grace = pod.spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE)
    if grace < drain.delay + drain.timeout:
        needs = f"drain.delay + drain.timeout, {drain.delay + drain.timeout:g}"
        yield f"{container.where}: terminationGracePeriodSeconds, {grace}, is less than {needs}"


def _sidecar(build: Build, pod: Pod, container: Container, config: Config) -> Iterator[str]:
    where, spec, proxy = container.where, container.spec, config.proxy
    if not container.sidecar:
        yield f"{where}: a proxy is an init container with restartPolicy: Always, so that it outlasts the application"
    elif any(
        other.init is not None and not other.sidecar and other.init < (container.init or 0) for other in pod.containers
    ):
        yield f"{where}: an init container before it has no proxy yet"
    startup = spec.get("startupProbe", {})
    if startup.get("httpGet", {}).get("path") != "/readyz":
        yield f"{where}: startupProbe: it is not /readyz that the application's start waits for"
    allowed = startup.get("failureThreshold", 3) * startup.get("periodSeconds", 10)
    if allowed <= proxy.attempts.first_snapshot_wait:
        yield f"{where}: startupProbe gives up after {allowed} s, first_snapshot_wait is longer"
    references = {
        each["name"]: each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") for each in spec.get("env", ())
    }
    wanted = (("NODE_NAME", "spec.nodeName"), ("MESHLOCAL_PROXY__NAMESPACE", "metadata.namespace"))
    fixed = all(listener.service is not None and is_fixed(listener.service) for listener in proxy.listen)
    for name, path in () if fixed else wanted:
        if references.get(name) != path:
            yield f"{where}: env {name} is not the field {path}"
    for url in proxy.discovery.urls:
        name, _, namespace = url.host.removesuffix(".cluster.local").removesuffix(".svc").partition(".")
        service = build.services.get((name, namespace or pod.namespace))
        if service is None or url.port not in [port["port"] for port in service["spec"]["ports"]]:
            yield f"{where}: proxy.discovery.urls: no Service offers {url}"
    taken = {port: other.where for other in pod.containers if other != container for port in other.ports.values()}
    for listener in proxy.listen:
        if listener.port in taken:
            yield f"{where}: proxy.listen: port {listener.port} is that of {taken[listener.port]}"
        if listener.service is None:
            continue
        place = fixed_place(listener.service)
        if place is not None:
            if place.port not in taken:
                yield f"{where}: proxy.listen: no container has a port {place.port}"
            continue
        name, _, namespace = proxy.service_key(listener.service).partition(".")
        service = build.services.get((name, namespace))
        port_name = proxy.service(listener.service).port_name
        if service is None:
            yield f"{where}: proxy.listen: no Service {name} in {namespace}"
        elif port_name is not None and port_name not in [port.get("name") for port in service["spec"]["ports"]]:
            yield f"{where}: proxy.services.{listener.service}.port_name: Service {name} has no port {port_name}"
