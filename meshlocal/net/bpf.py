"""bpf(2), as far as programs of a cgroup need it: maps, programs, links (Linux 5.14 or newer).

The kernel's interface is documented in bpf(2) and include/uapi/linux/bpf.h. There is no kept library for it that needs
no compiler: libbpf's bindings bring one, or build at installation.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from functools import cache
from types import TracebackType
from typing import Self

_SYSCALLS = {"x86_64": 321, "aarch64": 280}
"""The number of bpf(2), by machine."""

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD, _PIN, _GET = range(8)
_INFO, _LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 15, 28, 29, 34

HASH, ARRAY = 1, 2
"""Types of maps."""

SOCK_ADDR = 18
"""The type of programs that see addresses of sockets."""

INET4_CONNECT, INET6_CONNECT = 10, 11
"""What of a cgroup such a program is attached to."""

_SO_NETNS_COOKIE = 71
_LOG = 1 << 16
_ATTRIBUTE = 144
"""Bytes of the largest union bpf_attr that is used here; what is longer than the kernel knows must be zero."""

_LOAD_IMMEDIATE = 0x18
_PSEUDO_MAP = 1
_INSTRUCTION = struct.Struct("<BBhi")


_ELSEWHERE = (errno.EPERM, errno.EINVAL)
"""What the kernel says of a path that is on another file system."""


class BpfError(OSError):
    """The kernel refused. The text says what, and why as far as it said."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attribute: bytes, what: str) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, f"{what}: bpf(2) has no known number on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attribute, _ATTRIBUTE)
    result: int = _libc().syscall(number, command, buffer, _ATTRIBUTE)
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError(code, f"{what}: {os.strerror(code)}")
    return result


def pinned(path: str) -> int:
    """The descriptor of what is pinned at a path.

    Raises:
        BpfError: nothing is.
    """
    named = ctypes.create_string_buffer(path.encode())
    return _bpf(_GET, struct.pack("<QII", ctypes.addressof(named), 0, 0), f"cannot open {path}")


class _Owned:
    """A descriptor of the kernel's, closed at the end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_inheritable(descriptor, False)

    def pin(self, path: str) -> None:
        """Have it at a path of a BPF file system, so that it stays when nobody has it open.

        Raises:
            BpfError: it cannot be there.
        """
        named = ctypes.create_string_buffer(path.encode())
        attribute = struct.pack("<QII", ctypes.addressof(named), self.descriptor, 0)
        try:
            _bpf(_PIN, attribute, f"cannot pin to {path}")
        except BpfError as error:
            hint = "; it must be on a BPF file system, such as /sys/fs/bpf" if error.errno in _ELSEWHERE else ""
            raise BpfError(error.errno, f"{error.strerror}{hint}") from None

    def close(self) -> None:
        """Let it go; what nothing else holds is gone with it."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Map(_Owned):
    """A map.

    Args:
        kind: `HASH` or `ARRAY`.
        key: bytes of a key.
        value: bytes of a value.
        entries: at most; of an array, how many there are.
        descriptor: of one that is there already, and is of this kind; None: a new one is made.

    Raises:
        BpfError: the kernel made none.
    """

    def __init__(self, kind: int, key: int, value: int, entries: int, descriptor: int | None = None) -> None:
        self._key = key
        self._value = value
        if descriptor is None:
            attribute = struct.pack("<5I", kind, key, value, entries, 0)
            descriptor = _bpf(_MAP_CREATE, attribute, "cannot make a map")
        super().__init__(descriptor)

    def _element(self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None, what: str) -> None:
        named = ctypes.create_string_buffer(key, len(key))
        at = ctypes.addressof(value) if value is not None else 0
        attribute = struct.pack("<IxxxxQQQ", self.descriptor, ctypes.addressof(named), at, 0)
        _bpf(command, attribute, what)

    def set(self, key: bytes, value: bytes) -> None:
        """Put a value there. Of a hash, a program that found the one before may still read its memory, which the kernel
        may have given to another entry by then.

        Raises:
            BpfError: there is no room.
        """
        self._element(_UPDATE, key, ctypes.create_string_buffer(value, self._value), "cannot write to a map")

    def get(self, key: bytes) -> bytes | None:
        """The value there; None: there is none."""
        found = ctypes.create_string_buffer(self._value)
        try:
            self._element(_LOOKUP, key, found, "cannot read a map")
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return found.raw

    def keys(self) -> list[bytes]:
        """The keys that there are. Nobody else may change them meanwhile."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(self._key)
        while True:
            before = ctypes.create_string_buffer(found[-1], self._key) if found else None
            at = ctypes.addressof(before) if before is not None else 0
            attribute = struct.pack("<IxxxxQQQ", self.descriptor, at, ctypes.addressof(following), 0)
            try:
                _bpf(_NEXT_KEY, attribute, "cannot read a map")
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    return found
                raise
            found.append(following.raw)

    def delete(self, key: bytes) -> None:
        """Have nothing there, whether there was something or not."""
        try:
            self._element(_DELETE, key, None, "cannot write to a map")
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise


def with_maps(code: bytes, maps: dict[int, Map]) -> bytes:
    """A program in which numbers stand for maps, with the maps in their place.

    Args:
        code: its instructions (BPF instruction set, RFC 9669, 4).
        maps: by the number that an instruction loads which names one.

    Raises:
        ValueError: it names none of one of them, or is not whole.
    """
    if len(code) % _INSTRUCTION.size:
        raise ValueError(f"{len(code)} bytes are no whole number of instructions")
    made, missing = bytearray(code), set(maps)
    at = 0
    while at < len(made):
        operation, registers, _, immediate = _INSTRUCTION.unpack_from(made, at)
        # The second half of a wide instruction is none of its own.
        wide = operation == _LOAD_IMMEDIATE
        if wide and immediate in maps and registers >> 4 == 0:
            missing.discard(immediate)
            named = registers & 15 | _PSEUDO_MAP << 4
            _INSTRUCTION.pack_into(made, at, operation, named, 0, maps[immediate].descriptor)
        at += _INSTRUCTION.size * (2 if wide else 1)
    if missing:
        raise ValueError(f"no instruction names the maps {', '.join(map(hex, sorted(missing)))}")
    return bytes(made)


class Program(_Owned):
    """A program that the kernel has verified.

    Args:
        kind: its type, such as `SOCK_ADDR`.
        attach: what it is for, such as `INET4_CONNECT`.
        code: its instructions.
        name: for people who list programs.
        licence: as the kernel wants to know it.

    Raises:
        BpfError: it was refused; the text has the verifier's last word.
    """

    def __init__(self, kind: int, attach: int, code: bytes, name: str, licence: str) -> None:
        instructions = ctypes.create_string_buffer(code, len(code))
        named = ctypes.create_string_buffer(licence.encode())

        def attribute(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
            level, size, at = (0, 0, 0) if log is None else (1, len(log), ctypes.addressof(log))
            head = (kind, len(code) // _INSTRUCTION.size, ctypes.addressof(instructions), ctypes.addressof(named))
            return struct.pack("<IIQQIIQII16sII", *head, level, size, at, 0, 0, name.encode()[:15], 0, attach)

        try:
            descriptor = _bpf(_PROG_LOAD, attribute(None), f"cannot load {name}")
        except BpfError as error:
            # Once more, for the verifier's words: a log costs time, and may itself not fit.
            log = ctypes.create_string_buffer(_LOG)
            try:
                descriptor = _bpf(_PROG_LOAD, attribute(log), f"cannot load {name}")
            except BpfError:
                said = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
                words = f"; the verifier says: {said[-2] if len(said) > 1 else said[-1]}" if said else ""
                raise BpfError(error.errno, f"{error.strerror}{words}") from None
        super().__init__(descriptor)


class Link(_Owned):
    """A program at a cgroup, for as long as this is open, or pinned."""

    @classmethod
    def to(cls, program: Program, cgroup: int, attach: int) -> Link:
        """Attach a program.

        Args:
            program: which.
            cgroup: a descriptor of the cgroup's folder.
            attach: what it is for.

        Raises:
            BpfError: it cannot be there.
        """
        attribute = struct.pack("<4I", program.descriptor, cgroup, attach, 0)
        return cls(_bpf(_LINK_CREATE, attribute, "cannot attach to the cgroup"))

    def cgroup(self) -> int:
        """The number of the cgroup that it is at; 0: that is gone.

        Raises:
            BpfError: it is at none.
        """
        # struct bpf_link_info: type, id, program, and for a cgroup its number behind them.
        info = ctypes.create_string_buffer(64)
        attribute = struct.pack("<IIQ", self.descriptor, len(info), ctypes.addressof(info))
        _bpf(_INFO, attribute, "cannot look at a link")
        return int.from_bytes(info.raw[16:24], "little")

    def update(self, program: Program) -> None:
        """Have another program in the place of the one that is there, in one step.

        Raises:
            BpfError: it cannot be there; the one before stays.
        """
        _bpf(_LINK_UPDATE, struct.pack("<4I", self.descriptor, program.descriptor, 0, 0), "cannot replace the program")

    def detach(self) -> None:
        """Take the program away, whoever has this open.

        Raises:
            BpfError: it is not there.
        """
        _bpf(_LINK_DETACH, struct.pack("<I", self.descriptor), "cannot detach the program")


def netns_cookie() -> int:
    """The number by which the kernel knows this process's network namespace.

    Raises:
        BpfError: this kernel has none: Linux 5.14 is the first that tells.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        except OSError as error:
            text = f"this kernel does not tell network namespaces apart ({error.strerror}); it takes Linux 5.14"
            raise BpfError(error.errno or errno.ENOPROTOOPT, text) from None
