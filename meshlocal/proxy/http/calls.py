"""Requests of HTTP/2 clients: most need no task, and the others get one at that moment.

As the lane is for HTTP/1.1, this is the short way for what is plain: an instance that has a connection which takes
another stream. It decides nothing. It calls what a task would call (`meshlocal.proxy.http.serve`), in the same order.
What a request needs a task for, it leaves to one: a snapshot or a connection to wait for, CONNECT, an instance that
speaks HTTP/1.1, another attempt.
"""

from __future__ import annotations

import trio

from meshlocal.net.log import get_log
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.ends import End
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.h2.body import Http2Body
from meshlocal.proxy.http.h2.client import H2Client, InstanceEnd
from meshlocal.proxy.http.h2.upstream import H2Upstream
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.serve import begin_on_kept, serve
from meshlocal.wire.http1.errors import ProtocolError

_log = get_log(__name__)


class Calls:
    """Serves the requests of one client's connection.

    Args:
        nursery: where requests that need a task have it.
        loop: the relay's loop; None if there is none.
    """

    def __init__(self, nursery: trio.Nursery, loop: RelayLoop | None) -> None:
        self._nursery = nursery
        self._loop = loop

    def begin(self, stream: H2Client, request: HttpRequest) -> None:
        """See `Requests.begin`."""
        request.find_service()
        service = request.service
        if request.refusal is not None or service is None:
            self._refuse(stream, request, request.refusal or answers.UNKNOWN_HOST)
            return
        if request.head.has_body:
            tunnel = request.head.method == b"CONNECT"
            limit = None if tunnel else request.shared.settings.config.max_body
            hold = 0 if tunnel else service.state.policy.replay_buffer
            try:
                stream.body = request.body = Http2Body(request.head, limit=limit, hold=hold)
            except ProtocolError as error:
                stream.conclude_with(request.reject(error))
                return
        if service.state.picker is None or request.head.method == b"CONNECT":
            self._in_task(stream, request, None)
            return
        now = stream.link.heard
        pick = request.try_next(now)
        if pick is None:
            self._refuse(stream, request, request.why_none())
            return
        upstream = begin_on_kept(request, service, pick)
        if isinstance(upstream, H2Upstream):
            upstream.start(now)
        else:
            self._in_task(stream, request, upstream)

    def _refuse(self, stream: H2Client, request: HttpRequest, answer: answers.Answer) -> None:
        request.refuse(answer)
        stream.conclude_with(answer)

    def resume(self, stream: H2Client, request: HttpRequest, upstream: InstanceEnd) -> None:
        """See `Requests.resume`."""
        assert isinstance(upstream, H2Upstream)
        self._in_task(stream, request, upstream)

    def _in_task(self, stream: H2Client, request: HttpRequest, upstream: H1Upstream | H2Upstream | None) -> None:
        self._nursery.start_soon(self._serve, stream, request, upstream)
        if self._loop is not None:
            self._loop.started(soon=True)

    async def _serve(self, stream: H2Client, request: HttpRequest, upstream: H1Upstream | H2Upstream | None) -> None:
        served = False

        async def run() -> End:
            nonlocal served
            served = True
            return await serve(request, upstream)

        try:
            try:
                await stream.run(run)
            finally:
                if upstream is not None and not served:
                    # It was over before the task's first step.
                    upstream.release(trio.current_time())
        except Exception:  # noqa: BLE001 - a fault of ours in one request must not take the others with it
            _log.exception("request failed by a fault in the proxy")
