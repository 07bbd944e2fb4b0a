"""WebSocket frames made by hand, right or wrong (RFC 6455, 5.2)."""

from __future__ import annotations

import struct
from typing import NamedTuple

MASK = b"\x01\x02\x03\x04"
TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """A frame; a client's are masked."""
    head = bytes([fin << 7 | reserved << 4 | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([masked << 7 | size])
    elif size < 1 << 16:
        head += bytes([masked << 7 | 126]) + struct.pack("!H", size)
    else:
        head += bytes([masked << 7 | 127]) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))


class Frame(NamedTuple):
    opcode: int
    payload: bytes
    masked: bool = False


def close_frame(code: int, reason: str = "", *, masked: bool = True) -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason.encode(), masked=masked)


def cut(data: bytes) -> tuple[Frame, bytes] | None:
    """The first frame of what was received, unmasked, and the rest; None until it is whole."""
    if len(data) < 2:
        return None
    size, at = data[1] & 127, 2
    if size == 126:
        size, at = int.from_bytes(data[2:4], "big"), 4
    masked = bool(data[1] & 128)
    mask = data[at : at + 4] if masked else b"\0\0\0\0"
    at += 4 * masked
    if len(data) < at + size:
        return None
    payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data[at : at + size]))
    return Frame(data[0] & 15, payload, masked), data[at + size :]


def code_of(payload: bytes) -> int:
    """A close frame's code; 1005 if it has none."""
    return int.from_bytes(payload[:2], "big") if payload else 1005
