"""One type of resources on one stream: what the client wants of it, what it was sent, and what it is owed.

Pure: no tasks, no I/O. The protocol is xDS's state of the world (Envoy's description of it, and gRFC A27):

- A request names all resources of its type that the client wants from now on. Of listeners and clusters, none, if no
  request of the stream named any before, or `*`, means all that there are.
- A response is answered by the request that carries its nonce, which accepts it, or rejects it and says why. A
  request with another nonce crossed a later response on its way; the answer to that one follows, and says all anew.
- One response of a type is under way at a time: what changes meanwhile goes with the next one, in its latest state
  (D4).
- Listeners and clusters are sent whole, and what a response lacks does not exist. Of the others, what changed is sent.
- What a client was sent is not sent again, whether it accepted it or not: only something else is, or what it gave up
  and wants anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from sys import intern
from typing import NamedTuple

from meshlocal.wire.xds import ResourceType

ALL = "*"


class Content(NamedTuple):
    """A resource as it is sent.

    Attributes:
        body: its encoded message.
        digest: of that; equal for equal bodies.
    """

    body: bytes
    digest: bytes

    @classmethod
    def of(cls, body: bytes) -> Content:
        """The content with this body."""
        return cls(body, blake2b(body, digest_size=8).digest())


class Answer(NamedTuple):
    """What a request said of the response before it.

    Attributes:
        answered: it answers the response that was under way.
        changed: it wants others than before.
    """

    answered: bool
    changed: bool


@lru_cache(maxsize=64)
def _shared(names: tuple[str, ...]) -> tuple[tuple[str, ...], Mapping[str, None]]:
    """What is asked for, and the names in it: thousands of clients ask for the same, of four types each."""
    names = tuple(map(intern, names))
    return names, {name: None for name in names if name != ALL}


class Subscription:
    """What one stream has to do with one type.

    Attributes:
        kind: the type.
        wildcard: the client wants all that there are.
        names: what it wants by name.
        under_way: a response waits for its answer.
        nonce: of the last response; empty: there was none.
    """

    __slots__ = (
        "_answering",
        "_asked",
        "_due",
        "_may_hold",
        "_named",
        "_number",
        "_owes",
        "_sent",
        "_taken",
        "kind",
        "names",
        "nonce",
        "under_way",
        "wildcard",
    )

    def __init__(self, kind: ResourceType) -> None:
        self.kind = kind
        self.wildcard = False
        self.names: Mapping[str, None] = {}
        self.under_way = False
        self.nonce = ""
        self._asked: tuple[str, ...] | None = None
        """As the last request said it."""
        self._named = False
        self._number = 0
        self._sent: dict[str, bytes] = {}
        """By name, the digest of what the client was sent last."""
        self._due: dict[str, None] = {}
        self._owes = False
        """A response is due even if it holds nothing new: that something does not exist is an answer too."""
        self._answering = False
        """That was so of what was taken last."""
        self._taken: list[str] = []
        """What was due of it."""
        self._may_hold: Collection[str] | None = ()
        """What the client may have from a stream before, and was not sent on this one; None: anything."""

    @property
    def version(self) -> str:
        """Of the last response."""
        return str(self._number)

    @property
    def is_due(self) -> bool:
        """Whether there may be something to send."""
        return bool(self._due or self._owes) and not self.under_way

    @property
    def asked(self) -> tuple[str, ...] | None:
        """The names of the last request; None: there was none."""
        return self._asked

    def may_hold(self, name: str) -> bool:
        """Whether the client has a resource, as far as one can know: from this stream, or from one before."""
        return name in self._sent or self._may_hold is None or name in self._may_hold

    def wants(self, name: str) -> bool:
        """Whether the client wants a resource."""
        return self.wildcard or name in self.names

    def is_stale(self, nonce: str) -> bool:
        """Whether a request with this nonce crossed a later response: nothing of it counts."""
        return bool(nonce and self.nonce) and nonce != self.nonce

    def request(self, names: Iterable[str], nonce: str, version: str = "") -> Answer:
        """Take a request that is not stale.

        Args:
            names: what it wants.
            nonce: of the response that it answers; empty: of none.
            version: that it accepted last; in a stream's first request, that is one of a stream before.
        """
        answered = bool(nonce) and self.under_way
        if answered:
            self.under_way = False
        asked = tuple(names)
        first = self._asked is None
        # Most requests say the same again, with their answer.
        changed = asked != self._asked
        if changed:
            self._asked, wanted = _shared(asked)
            self._want(self._asked, wanted)
        if first and version:
            self._may_hold = None if self.wildcard else frozenset(self.names)
        return Answer(answered=answered, changed=changed)

    def _want(self, names: Collection[str], wanted: Mapping[str, None]) -> None:
        everything = self.kind.whole and (ALL in names or (not names and not self._named))
        self._named = self._named or bool(names)
        new = [name for name in wanted if name not in self.names]
        gone = [name for name in self.names if name not in wanted]
        if everything != self.wildcard:
            self.wildcard = everything
            if everything:
                self._owes = True
            else:
                gone += [name for name in self._sent if name not in wanted]
        self.names = wanted
        if not everything:
            for name in gone:
                self._sent.pop(name, None)
                self._due.pop(name, None)
        for name in new:
            self._sent.pop(name, None)
            self._due[name] = None
        self._owes = self._owes or bool(new)

    def mark(self, name: str) -> None:
        """Something about a resource may have changed: it is looked at."""
        if self.wants(name) or name in self._sent:
            self._due[name] = None

    def take(self, known: Iterable[str] = ()) -> list[str]:
        """The resources that a response is to be made of; they no longer count as due.

        Args:
            known: all that there are, for a wildcard.
        """
        self._taken = list(self._due)
        self._due.clear()
        self._answering, self._owes = self._owes, False
        if not self.kind.whole:
            return self._taken
        return [*self.names, *(name for name in known if name not in self.names)] if self.wildcard else [*self.names]

    def put_back(self, names: Iterable[str]) -> None:
        """Of what was taken, this is still due."""
        for name in names:
            self.mark(name)

    def hold(self) -> None:
        """No response can be made yet: what was taken is due again."""
        self._owes = self._owes or self._answering
        self.put_back(self._taken)

    def is_news(self, name: str, content: Content) -> bool:
        """Whether a content is another than what the client was sent."""
        return self._sent.get(name) != content.digest

    def respond(self, contents: Mapping[str, Content | None]) -> list[bytes] | None:
        """What is sent, after which a response is under way; None: nothing.

        Args:
            contents: what was taken; None: it does not exist.
        """
        found = {name: content for name, content in contents.items() if content is not None and self.wants(name)}
        answering, self._answering, self._taken = self._answering, False, []
        if self.kind.whole:
            sent = {name: content.digest for name, content in found.items()}
            if sent == self._sent and not answering:
                return None
            self._sent = sent
            # What it lacks, the client has no longer.
            self._may_hold = ()
        else:
            for name in contents:
                if name not in found:
                    self._sent.pop(name, None)
            found = {name: content for name, content in found.items() if self.is_news(name, content)}
            if not found:
                return None
            self._sent.update((name, content.digest) for name, content in found.items())
        self._number += 1
        self.nonce = str(self._number)
        self.under_way = True
        return [content.body for content in found.values()]
