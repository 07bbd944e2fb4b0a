"""A request's body that can be sent again while all that was read of it is held (A3)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable

import anyio


class ReplayableBody:
    """An async iterable of the body's pieces, which begins again with each iteration.

    Args:
        stream: the body.
        hold: bytes that are held of a stream; of one that is longer nothing is.
        whole: the caller has it in memory as a whole, which takes no holding, and is read without a wait.

    Attributes:
        failure: what the application's own stream failed with.
        on_wait: called before it is waited for the application's next piece.
        on_piece: called once that came, or the end.
    """

    def __init__(self, stream: AsyncIterable[bytes], hold: int, *, whole: bool = False) -> None:
        self._limit = hold
        self._size = 0
        self._chunks: list[bytes] | None = []
        self._rest: AsyncIterator[bytes] | None = None
        self._begun = False
        self.failure: Exception | None = None
        self.on_wait: Callable[[], None] = _nothing
        self.on_piece: Callable[[], None] = _nothing
        if whole:
            assert isinstance(stream, Iterable)
            self._chunks = list(stream)
        else:
            self._rest = stream.__aiter__()

    @property
    def held(self) -> bool:
        """Whether all that was read of it can be sent again."""
        return self._chunks is not None

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._begun and self._chunks is None:
            raise RuntimeError("the body was not held, and cannot be sent again")
        self._begun = True
        return _Pass(self)

    async def aclose(self) -> None:
        """Let the application's stream go, if it was not read to its end."""
        rest, self._rest = self._rest, None
        if isinstance(rest, AsyncGenerator):
            with anyio.CancelScope(shield=True):
                await rest.aclose()

    async def read(self, position: int) -> bytes:
        """The piece at a position: one that is held, or the next one of the stream.

        Raises:
            StopAsyncIteration: there is none.
        """
        chunks = self._chunks
        if chunks is not None and position < len(chunks):
            return chunks[position]
        if self._rest is None:
            raise StopAsyncIteration
        self.on_wait()
        try:
            piece = await anext(self._rest)
        except StopAsyncIteration:
            self._rest = None
            raise
        except BaseException as error:
            # A generator that was cancelled has nothing more to give.
            self._chunks = self._rest = None
            self.failure = error if isinstance(error, Exception) else None
            raise
        finally:
            self.on_piece()
        self._size += len(piece)
        if chunks is not None:
            if self._size <= self._limit:
                chunks.append(piece)
            else:
                self._chunks = None
        return piece


def _nothing() -> None:
    """Stands where nobody wants to be told of a body's end."""


class _Pass:
    """One iteration. No generator: what is left half-way needs no closing."""

    def __init__(self, body: ReplayableBody) -> None:
        self._body = body
        self._position = 0

    def __aiter__(self) -> _Pass:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._body.read(self._position)
        self._position += 1
        return piece
