"""Requests to the API server, and what its errors mean."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlencode

import msgspec
import trio

from meshlocal.discovery.kubernetes.credentials import Credentials, CredentialsError, Secrets, UtcNow, make_tls
from meshlocal.discovery.kubernetes.kubeconfig import Access, KubeconfigError
from meshlocal.discovery.kubernetes.objects import UNREADABLE, Status, decode_status
from meshlocal.net import http_client
from meshlocal.net.blocking import Blocking
from meshlocal.net.http_client import HttpError, Origin, Response

HEAD_TIMEOUT = 30.0
"""Seconds to connect and to get an answer's head."""
FILES_TIMEOUT = 30.0
"""Seconds that reading kubeconfigs may take."""
MAX_ERROR = 65536
"""Bytes of an error's body."""
MAX_RETRY_AFTER = 300.0
"""Seconds that a server may ask to be left alone."""


class ApiError(Exception):
    """The server's refusal.

    Attributes:
        status: the HTTP status, or the code of an ERROR event.
        message: the server's own words.
        retry_after: seconds that it asks to be left alone; 0: it does not say.
        in_stream: it came as an event of a watch that had begun.
    """

    def __init__(self, status: int, message: str, retry_after: float = 0.0, *, in_stream: bool = False) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.retry_after = min(max(retry_after, 0.0), MAX_RETRY_AFTER)
        self.in_stream = in_stream

    @classmethod
    def from_status(cls, status: Status, code: int = 0, retry_after: float = 0.0) -> ApiError:
        """From a Status object: of an answer with this `code`, or of an ERROR event."""
        if status.details is not None and status.details.retry_after_seconds is not None:
            retry_after = retry_after or status.details.retry_after_seconds
        message = status.message or status.reason or "no reason given"
        return cls(code or status.code, message[:500], retry_after, in_stream=not code)


class DataError(Exception):
    """An answer, or a line of a watch, that is not what the API promises."""


class StreamError(Exception):
    """A watch that ended as soon as it had begun."""


class SilenceError(Exception):
    """A watch that fell silent."""


FAILURES = (
    OSError,
    trio.BrokenResourceError,
    trio.TooSlowError,
    HttpError,
    ApiError,
    DataError,
    StreamError,
    SilenceError,
    KubeconfigError,
    CredentialsError,
)
"""What a request may end with through no fault of this program."""


def describe_failure(error: BaseException) -> str:
    """A failure in one line."""
    if isinstance(error, ApiError):
        return f"the API server answered {error}"
    if isinstance(error, trio.TooSlowError):
        return "no answer in time"
    seen = [error]
    while (cause := seen[-1].__cause__) is not None and len(seen) < 5:
        seen.append(cause)
    if isinstance(seen[-1], BaseExceptionGroup):
        seen[-1:] = seen[-1].exceptions[:3]
    texts = [text for each in seen if (text := _text_of(each))]
    return ": ".join(dict.fromkeys(texts)) or type(error).__name__


def _text_of(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


class Api:
    """One API server.

    Args:
        find: reads how to reach it, blocking; called at the first request, and after a refusal for bad credentials.
        utc_now: the time of day.
        user_agent: the User-Agent header.
        head_timeout: seconds to connect and to get an answer's head.
    """

    def __init__(
        self,
        find: Callable[[], Access],
        utc_now: UtcNow,
        user_agent: str = "meshlocal",
        head_timeout: float = HEAD_TIMEOUT,
    ) -> None:
        self._find = find
        self._utc_now = utc_now
        self._user_agent = user_agent
        self._head_timeout = head_timeout
        self._files = Blocking(limit=FILES_TIMEOUT)
        self._lock = trio.Lock()
        self._known: tuple[Access, Credentials] | None = None
        self._tls: tuple[Secrets, Access, ssl.SSLContext] | None = None

    @asynccontextmanager
    async def get(self, path: str, query: Mapping[str, str], accept: str) -> AsyncIterator[Response]:
        """Send a request, and wait for the head of an answer with status 200.

        An answer with status 401 makes it read the credentials anew, and try again, once.

        Raises:
            ApiError: the server refused.
            CredentialsError, HttpError, KubeconfigError, OSError, trio.BrokenResourceError, trio.TooSlowError: there
                was no answer, or no request.
        """
        for last_try in (False, True):
            error: ApiError | None = None
            async with AsyncExitStack() as stack:
                # A plugin has a time of its own, which is longer; files have theirs.
                known = await self._find_once()
                origin, headers, prefix = await self._prepare(*known, accept)
                with trio.fail_after(self._head_timeout):
                    target = f"{prefix}{path}?{urlencode(query)}" if query else prefix + path
                    response = await stack.enter_async_context(http_client.send(origin, "GET", target, headers))
                    if response.status != 200:
                        error = await _read_error(response)
                if error is None:
                    yield response
                    return
            if error.status != 401 or last_try:
                raise error
            if self._known is known:
                # Unless somebody else, refused likewise, has found new ones by now.
                self._known = None

    async def _find_once(self) -> tuple[Access, Credentials]:
        # Several watches start at once, and are refused at once; a plugin runs for the first of them only.
        async with self._lock:
            if self._known is None:
                access = await self._files.run(self._find)
                self._known = access, Credentials(access, self._utc_now)
            return self._known

    async def _prepare(
        self, access: Access, credentials: Credentials, accept: str
    ) -> tuple[Origin, dict[str, str], str]:
        """Where the next request goes, its headers, and what stands before its path."""
        secrets = await credentials.get()
        headers = {"Accept": accept, "User-Agent": self._user_agent}
        if secrets.token:
            headers["Authorization"] = f"Bearer {secrets.token}"
        tls = self._tls_for(access, secrets) if access.scheme == "https" else None
        origin = Origin(access.host, access.port, tls, access.server_name, access.proxy)
        return origin, headers, access.path

    def _tls_for(self, access: Access, secrets: Secrets) -> ssl.SSLContext:
        # All but the token, which changes most often and has no part in it.
        wanted = msgspec.structs.replace(secrets, token="")
        if self._tls is None or self._tls[0] != wanted or self._tls[1] != access:
            self._tls = (wanted, access, make_tls(access, secrets))
        return self._tls[2]


async def _read_error(response: Response) -> ApiError:
    retry_after = 0.0
    text = response.headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        # The other form, a date, is none that API servers send.
        retry_after = float(text[:6])
    try:
        body = await response.receive_all(MAX_ERROR)
    except (HttpError, trio.BrokenResourceError):
        body = b""
    try:
        status = decode_status(body)
    except UNREADABLE:
        # A proxy's error page, or the API server's own "404 page not found".
        status = Status(message=body[:200].decode("utf-8", "replace").strip())
    return ApiError.from_status(status, response.status, retry_after)
