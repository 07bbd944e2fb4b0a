"""What a caller of a discovery server may see."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from meshlocal.policy.config_access import AllowConfig
from meshlocal.policy.identity import IdentityPattern
from meshlocal.policy.model import ServiceKey


class View:
    """The services that one caller may see.

    Args:
        caller: who it is, for messages.
        services: patterns of names, in which `*` stands for any characters.
    """

    __slots__ = ("_pattern", "caller")

    def __init__(self, caller: str, services: Iterable[str]) -> None:
        self.caller = caller
        parts = [".*".join(map(re.escape, pattern.split("*"))) for pattern in services]
        self._pattern = re.compile("|".join(f"(?:{part})" for part in parts))

    def sees(self, service: ServiceKey) -> bool:
        """Whether it may see a service."""
        return self._pattern.fullmatch(service) is not None


ALL = View("", ["*"])
"""Of whoever is let in, where nobody said more."""


class Visibility:
    """Who may see what.

    Args:
        entries: `discovery.allow`.
    """

    def __init__(self, entries: Sequence[AllowConfig]) -> None:
        self._entries = [(IdentityPattern(each.identity), each.services) for each in entries]

    def view(self, identities: Sequence[str]) -> View | None:
        """What a caller sees with all the identities that it proved; None: nothing, it is nobody that is known."""
        if not self._entries:
            return ALL
        services = [
            pattern
            for identity, patterns in self._entries
            if any(map(identity.matches, identities))
            for pattern in patterns
        ]
        return View(", ".join(identities), services) if services else None
