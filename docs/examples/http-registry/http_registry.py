"""A registry of another kind: JSON at a URL, which is asked for every few seconds.

{"services": {"b": [{"address": "10.0.1.10", "port": 9000, "labels": {"node": "n1"}}]}}
"""

import json
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

import trio

from meshlocal.discovery.source import Publisher, Source, SourceContext
from meshlocal.policy.model import ServiceKey, index, make_instance, parse_service_key
from meshlocal.policy.sources import SourceKind

INTERVAL = 2.0
TIMEOUT = 5.0
LARGEST = 10_000_000


class Options(NamedTuple):
    """What stands behind `http-registry:`."""

    url: str

    def __str__(self) -> str:
        return self.url


def parse(text: str) -> Options:
    """Read it. What is wrong is a ValueError, whose text says what."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"expected http-registry:http://HOST/PATH, got {text!r}")
    return Options(text)


def open_sources(options: object, context: SourceContext) -> Iterator[Source]:
    """The sources of one URL: most kinds have one."""
    assert isinstance(options, Options)
    yield HttpRegistry(options.url, context)


class HttpRegistry:
    """Follows one URL."""

    def __init__(self, url: str, context: SourceContext) -> None:
        self.name = f"http-registry:{url}"
        self._url = url
        self._defaults = {"zone": context.zone, "cluster": context.cluster}

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """Publish what it says, for ever. An outage publishes nothing: what was known stays."""
        in_sync = False
        while True:
            try:
                # It blocks, so it is done in a thread; that may be left alone when discovery ends.
                text = await trio.to_thread.run_sync(self._fetch, abandon_on_cancel=True)
                services = self._read(text)
            except (OSError, ValueError) as error:
                publisher.report(f"{self._url}: {error}")
            else:
                publisher.report(None)
                publisher.replace(services)
                if not in_sync:
                    # All that the registry holds was published: from now on it is served.
                    in_sync = True
                    task_status.started()
            await trio.sleep(INTERVAL)

    def _fetch(self) -> bytes:
        with urllib.request.urlopen(self._url, timeout=TIMEOUT) as answer:
            text: bytes = answer.read(LARGEST)
            return text

    def _read(self, text: bytes) -> dict[ServiceKey, object]:
        """What is wrong with it is a ValueError: all of it counts, or nothing."""
        try:
            listed = json.loads(text)["services"].items()
            return {
                parse_service_key(name): index(self._instance(name, each) for each in items) for name, items in listed
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"is not as expected: {type(error).__name__}: {error}") from None

    def _instance(self, service: str, said: dict) -> object:
        labels = {name: value for name, value in self._defaults.items() if value}
        labels |= said.get("labels", {}) | {"service": service, "registry": "http-registry"}
        return make_instance(said["address"], said["port"], labels=labels)


KIND = SourceKind("http-registry:URL", parse, "http_registry:open_sources")
