"""For tests of applications: instances that fail on cue, a registry in memory, and a clock that jumps.

source = FakeSource()
async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
    source.set("b", near.instance, far.instance)
    async with meshlocal.open_mesh(source, node_name="n1") as mesh:
        near.refuse()
        async with await mesh.open_tcp_stream("b") as stream:
            ...                             # far answers
"""

from meshlocal.testing.behaviours import answer, echo, http, reset, silent
from meshlocal.testing.clock import run, virtual_clock
from meshlocal.testing.http import HttpRequest, HttpResponse
from meshlocal.testing.source import FakeSource
from meshlocal.testing.upstream import Behaviour, Upstream, UpstreamConnection, open_upstream

__all__ = [
    "Behaviour",
    "FakeSource",
    "HttpRequest",
    "HttpResponse",
    "Upstream",
    "UpstreamConnection",
    "answer",
    "echo",
    "http",
    "open_upstream",
    "reset",
    "run",
    "silent",
    "virtual_clock",
]
