"""From the config's source URLs to sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from random import Random
from socket import gethostname

import meshlocal
from meshlocal.discovery.source import Source, SourceContext, SourceError
from meshlocal.net.log import get_log
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.model import Caller
from meshlocal.policy.problems import Problem
from meshlocal.policy.sources import KINDS, SourceKind

_log = get_log(__name__)

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")

GROUP = "meshlocal.sources"
"""The entry points by which other packages add kinds of registries."""


def load_kinds() -> None:
    """Add the kinds of registries that other installed packages bring to `KINDS`.

    One that cannot be loaded, or would take the place of another, costs nobody else anything: it is said, and left out.
    """
    for point in entry_points(group=GROUP):
        if point.name in KINDS:
            _log.warning(
                "source kind left out: there is one of this scheme", scheme=point.name, entry_point=point.value
            )
            continue
        try:
            kind = _loaded(point)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code
            problem = f"{type(error).__name__}: {error}"
            _log.warning("source kind left out", scheme=point.name, entry_point=point.value, problem=problem)
            continue
        KINDS[point.name] = kind


def _loaded(point: EntryPoint) -> SourceKind:
    """The kind that an entry point gives; raises whatever its module does, or why it is none."""
    if not _SCHEME.fullmatch(point.name):
        raise ValueError("its name is no scheme in lower case")
    kind = point.load()
    if not isinstance(kind, SourceKind):
        raise TypeError(f"{type(kind).__name__} is no SourceKind")
    parts = kind._asdict()
    unfit = [name for name, part in parts.items() if not (callable(part) if name == "parse" else isinstance(part, str))]
    if unfit:
        raise TypeError(f"its {' and '.join(unfit)} cannot be used")
    return kind


def make_sources(
    config: DiscoveryServerConfig, rng: Random, environment: Mapping[str, str], lineage: Lineage | None = None
) -> list[Source]:
    """The sources that the config names, in its order.

    It blocks while it reads what a URL needs to find its registry.

    Args:
        config: names them, and what holds for instances that say nothing else.
        rng: for jitter.
        environment: as `os.environ`.
        lineage: of this server, if others may learn from it.

    Raises:
        ConfigError: a registry cannot be found, or reached in the way that its options say; the text names the URL.
    """
    caller = Caller(gethostname(), software=f"meshlocal discovery {meshlocal.__version__}")
    context = SourceContext(rng, environment, config.zone or "", config.cluster or "", lineage, caller)
    problems: list[Problem] = []
    sources: list[Source] = []
    for position, url in enumerate(config.sources):
        try:
            sources += _factory(KINDS[url.scheme].factory)(url.options, context)
        except SourceError as error:
            problems.append(Problem(f"discovery.sources[{position}]", f"{url}: {error}"))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code, most likely
            problem = f"{url}: cannot be made: {type(error).__name__}: {error}"
            problems.append(Problem(f"discovery.sources[{position}]", problem))
    if problems:
        raise ConfigError(problems)
    return sources


def _factory(name: str) -> Callable[[object, SourceContext], Iterable[Source]]:
    module, _, function = name.partition(":")
    found: Callable[[object, SourceContext], Iterable[Source]] = getattr(import_module(module), function)
    return found
