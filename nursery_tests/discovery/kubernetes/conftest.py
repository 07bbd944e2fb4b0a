"""What the tests of the Kubernetes source share: an API server (`apiserver`), and a source that follows it."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trustme

from meshlocal.discovery.kubernetes.api import Api
from meshlocal.discovery.kubernetes.kubeconfig import Access, Content
from meshlocal.discovery.kubernetes.listwatch import Limits
from meshlocal.discovery.kubernetes.source import KubernetesSource
from meshlocal.policy.kubernetes_options import KubernetesOptions


def _load(name: Any) -> Any:
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(f"kubernetes_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


apiserver = _load("apiserver")

FAST = Limits(backoff_initial=0.01, backoff_max=0.05, steady=0.02)
"""For tests over sockets: what matters there is the order of things, not how long they take."""


async def until(holds: Any) -> None:
    """Wait for something that cannot be waited for otherwise."""
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110 - counters have no event
            await trio.sleep(0.002)


class Publications:
    """A `Publisher` that keeps what it is told."""

    def __init__(self) -> None:
        self.services: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.problem = None
        self.problems: list[Any] = []
        self._changed = trio.Event()

    def replace(self, services: Any) -> None:
        self.services = dict(services)
        self.calls.append(("replace", sorted(services)))
        self._wake()

    def update(self, service: Any, instances: Any) -> None:
        if instances is None:
            del self.services[service]
        else:
            self.services[service] = instances
        self.calls.append(("update", service))
        self._wake()

    def report(self, problem: Any) -> None:
        self.problem = problem
        self.problems.append(problem)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, predicate: Any) -> None:
        """Wait for something that was published or reported."""
        with trio.fail_after(20):
            while not predicate():
                await self._changed.wait()


def show(services: Any) -> Any:
    """What is published, in full, as text: service → instances."""
    return {service: {_show(instance) for instance in instances.values()} for service, instances in services.items()}


def _show(instance: Any) -> Any:
    conditions = instance.conditions
    letters = "".join(
        letter
        for letter, on in (("r", conditions.ready), ("s", conditions.serving), ("t", conditions.terminating))
        if on
    )
    labels = " ".join(f"{name}={value}" for name, value in sorted(instance.labels.items()))
    return f"{instance.key}/{instance.key.protocol} {instance.key.port_name} {letters or '-'} {labels}"


@pytest.fixture(scope="session")
def authority() -> Any:
    """A certificate authority of this run."""
    return trustme.CA()


@pytest.fixture
def kube(authority: Any, tmp_path: Any) -> Any:
    """What the tests share: constants, helpers, and the authority's certificate as a file."""
    ca = tmp_path / "ca.crt"
    authority.cert_pem.write_to_path(str(ca))

    def access(server: Any, **more: Any) -> Any:
        more = {"token": Content(b"t"), "authority": Content(authority.cert_pem.bytes())} | more
        return Access(origin="test", scheme="https", host="127.0.0.1", port=server.port, **more)

    def source_of(server: Any, options: Any = "", *, find: Any = None, limits: Any = FAST, **more: Any) -> Any:
        api = Api(find or (lambda: access(server)), lambda: datetime.now(UTC))
        return KubernetesSource(api, KubernetesOptions.parse(options), Random(0), limits=limits, **more)

    @asynccontextmanager
    async def following(
        server: Any, options: Any = "", *, find: Any = None, limits: Any = FAST, in_sync: Any = True, **more: Any
    ) -> AsyncIterator[Any]:
        """A source of the server's, running: it, and what it publishes."""
        source = source_of(server, options, find=find, limits=limits, **more)
        publications = Publications()
        async with trio.open_nursery() as nursery:
            if in_sync:
                with trio.fail_after(20):
                    await nursery.start(source.run, publications)
            else:
                nursery.start_soon(partial(nursery.start, source.run, publications))
            yield source, publications
            nursery.cancel_scope.cancel()

    return SimpleNamespace(
        slices=apiserver.SLICES,
        endpoints=apiserver.ENDPOINTS,
        nodes=apiserver.NODES,
        access=access,
        fast=FAST,
        source=source_of,
        following=following,
        serving=partial(apiserver.serving, authority),
        until=until,
        publications=Publications,
        show=show,
        lines=apiserver.lines,
        ca=ca,
        ca_pem=authority.cert_pem.bytes(),
        authority=authority,
    )


@pytest.fixture(scope="session")
def reference() -> Any:
    """The module `reference`: a second account of what slices mean."""
    return _load("reference")
