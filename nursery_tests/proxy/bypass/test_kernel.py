"""The program in the kernel: which connects it sends where (B1, B2)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import meshlocal.proxy.bypass.kernel as kernel_module
from meshlocal.net import bpf
from meshlocal.net.bpf import ARRAY, HASH, INET4_CONNECT, SOCK_ADDR, BpfError, Map, Program, with_maps
from meshlocal.proxy.bypass.kernel import SLOTS, Kernel, detach_pinned, read_pinned
from nursery_tests.proxy.bypass.parts import connecting

FOLDER = Path(kernel_module.__file__).parent


class Server:
    """Answers each connection with its name."""

    def __init__(self, name: str, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=512)
        self.place: tuple[str, int] = self._socket.getsockname()[:2]
        self._name = name.encode()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                client.recv(64)
                client.sendall(self._name)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def kernel(cgroup: Path) -> Iterator[Kernel]:
    made = Kernel(str(cgroup))
    yield made
    made.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(name: str, host: str = "127.0.0.1", port: int = 0) -> Server:
            made = Server(name, host, port)
            stack.callback(lambda: made.close() if made._socket.fileno() >= 0 else None)
            return made

        yield start


Serve = Callable[..., Server]


def test_connects_take_turns_among_those_that_listen(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    """B1, O2; and what finds nobody reaches the listener."""
    proxy, a, b = serve("proxy"), serve("a"), serve("b")
    with connecting(cgroup, proxy.place) as client:
        assert client.order("connect 10") == {"proxy": 10}
        kernel.set(proxy.place, [a.place, b.place])
        assert client.order("connect 100") == {"a": 50, "b": 50}
        a.close()
        assert client.order("connect 100") == {"b": 100}
        b.close()
        assert client.order("connect 10") == {"proxy": 10}
        assert kernel.counts(proxy.place) == ({a.place: 50, b.place: 150}, 10)
        again = serve("a", port=a.place[1])
        assert client.order("connect 10") == {"a": 10}
        assert again.place == a.place
        kernel.remove(proxy.place)
        assert client.order("connect 10") == {"proxy": 10}
        assert kernel.counts(proxy.place) == ({a.place: 60, b.place: 150}, 10)


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_who_does_not_listen_has_no_turn(cgroup: Path, kernel: Kernel, serve: Serve, dead: int) -> None:
    """O2: the others have as many as each other, wherever it stands."""
    proxy, *others = (serve(name) for name in ("proxy", "a", "b", "c", "d"))
    kernel.set(proxy.place, [each.place for each in others])
    for each in others[:dead]:
        each.close()
    with connecting(cgroup, proxy.place) as client:
        counts = client.order("connect 120")
    assert counts == dict.fromkeys("abcd"[dead:], 120 // (4 - dead))


def test_lists_of_other_listeners_are_not_mixed_up(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    """B2: the kernel may give an entry's memory to another while somebody reads it."""
    proxy, other, a, b = (serve(name) for name in ("proxy", "other", "a", "b"))
    with connecting(cgroup, proxy.place) as client:
        kernel.set(proxy.place, [a.place])
        client.order("start 4")
        for _ in range(100_000):
            kernel.set(other.place, [b.place])
            kernel.set(proxy.place, [a.place])
            if kernel.counts(proxy.place).connects[a.place] > 500:
                break
        counts = client.order("stop")
    # What it finds mixed up reaches the listener.
    assert counts.keys() <= {"a", "proxy"}
    assert counts["a"] > 500


def test_a_list_is_replaced_whole_and_its_turns_go_on(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    """B2, under load: nobody goes to whom no list had, and nobody fails."""
    proxy, *others = (serve(name) for name in ("proxy", "a", "b", "c", "d"))
    a, b, c, d = (each.place for each in others)
    kernel.set(proxy.place, [a, b])
    with connecting(cgroup, proxy.place) as client:
        client.order("start 4")
        for _ in range(100_000):
            kernel.set(proxy.place, [a, b])
            kernel.set(proxy.place, [b, c, a])
            kernel.set(proxy.place, [a])
            if kernel.counts(proxy.place).connects[a] > 300:
                break
        counts = client.order("stop")
    assert counts.keys() <= {"a", "b", "c"}
    told, missed = kernel.counts(proxy.place)
    assert {"a": told[a], "b": told[b], "c": told[c]} == {name: counts.get(name, 0) for name in "abc"}
    assert (d in told, missed) == (False, 0)


@pytest.mark.parametrize("hosts", [("127.0.0.1", "127.0.0.1"), ("::1", "::1")])
def test_both_families(cgroup: Path, kernel: Kernel, serve: Serve, hosts: tuple[str, str]) -> None:
    proxy, a = serve("proxy", hosts[0]), serve("a", hosts[1])
    kernel.set(proxy.place, [a.place])
    with connecting(cgroup, proxy.place) as client:
        assert client.order("connect 10") == {"a": 10}


def test_an_ipv4_address_as_ipv6_has_it(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    """RFC 4291, 2.5.5.2: as a socket of both families connects it."""
    proxy, a = serve("proxy"), serve("a")
    kernel.set(proxy.place, [a.place])
    with connecting(cgroup, (f"::ffff:{proxy.place[0]}", proxy.place[1])) as client:
        assert client.order("connect 10") == {"a": 10}


def test_an_instance_at_every_address_is_one_that_listens(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    proxy, everywhere = serve("proxy"), serve("a", "0.0.0.0")
    kernel.set(proxy.place, [("127.0.0.7", everywhere.place[1])])
    with connecting(cgroup, proxy.place) as client:
        assert client.order("connect 10") == {"a": 10}


def test_others_are_left_alone(cgroup: Path, kernel: Kernel, serve: Serve) -> None:
    """Who is not in the cgroup, other ports, and what is no TCP."""
    proxy, other, a = serve("proxy"), serve("other"), serve("a")
    kernel.set(proxy.place, [a.place])
    with connecting(None, proxy.place) as client:
        assert client.order("connect 10") == {"proxy": 10}
    with connecting(cgroup, other.place) as client:
        assert client.order("connect 10") == {"other": 10}
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, socket, sys\n"
            "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "sock.connect(('127.0.0.1', int(sys.argv[2])))\n"
            "print(sock.getpeername()[1])",
            str(cgroup),
            str(proxy.place[1]),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(said.stdout) == proxy.place[1]
    assert kernel.counts(proxy.place).connects == {a.place: 0}


def test_another_network_namespace_is_left_alone(
    cgroup: Path, kernel: Kernel, serve: Serve, program: Callable[[str], str]
) -> None:
    """127.0.0.1 there is another address: nobody listens."""
    proxy, a = serve("proxy"), serve("a")
    kernel.set(proxy.place, [a.place])
    with connecting(cgroup, proxy.place, [program("unshare"), "--net"]) as client:
        told = client.order("connect 3")
    assert sum(told.values()) == 3
    assert not told.keys() & {"a", "proxy"}
    assert kernel.counts(proxy.place) == ({a.place: 0}, 0)


def test_what_is_closed_is_detached(cgroup: Path, serve: Serve) -> None:
    proxy, a = serve("proxy"), serve("a")
    before = len(os.listdir("/proc/self/fd"))
    made = Kernel(str(cgroup))
    made.set(proxy.place, [a.place])
    with connecting(cgroup, proxy.place) as client:
        assert client.order("connect 1") == {"a": 1}
        made.close()
        assert client.order("connect 10") == {"proxy": 10}
    assert len(os.listdir("/proc/self/fd")) == before


def test_how_many_there_may_be(kernel: Kernel) -> None:
    places = [("127.0.0.1", port) for port in range(1, SLOTS + 2)]
    kernel.set(("127.0.0.1", 80), places[:SLOTS])
    for wrong in ([], places):
        with pytest.raises(ValueError, match="a list takes 1 to 16"):
            kernel.set(("127.0.0.1", 80), wrong)


def test_counters_are_given_back(kernel: Kernel) -> None:
    """P2: instances that come and go, and listeners that do, take no more than there is."""
    free = len(kernel._free)
    listener = ("127.0.0.1", 80)
    for port in range(1, 1000):
        kernel.set(listener, [("127.0.0.1", port)])
    assert len(kernel.counts(listener).connects) <= 8 * SLOTS + 1
    kernel.forget(listener)
    kernel.forget(listener)
    assert len(kernel._free) == free
    assert kernel.counts(listener) == ({}, 0)


def test_a_full_table_says_so(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel._free = deque([1, 2])
    with pytest.raises(OSError, match="more than 16384 counters"):
        kernel.set(("127.0.0.1", 80), [("127.0.0.1", 1)])
    # What there was of it is given back.
    kernel._free.append(3)
    kernel.set(("127.0.0.1", 80), [("127.0.0.1", 1)])


@pytest.mark.parametrize(
    ("cgroup_", "message"),
    [("/nowhere/at/all", "No such file or directory"), ("/proc", "cannot attach to the cgroup: .*")],
)
def test_a_folder_that_is_no_cgroup(root: None, cgroup_: str, message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=message):
        Kernel(cgroup_)
    assert len(os.listdir("/proc/self/fd")) == before


def as_child(cgroup: Path, *lines: str) -> str:
    """What a process prints that has `Kernel`, and a cgroup as its argument."""
    script = "\n".join(("import ctypes, os, struct, sys", "from meshlocal.proxy.bypass.kernel import Kernel", *lines))
    command = [sys.executable, "-c", script, str(cgroup)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout


def test_a_process_that_may_not(cgroup: Path) -> None:
    said = as_child(
        cgroup,
        "os.setuid(65534)",
        "try: Kernel(sys.argv[1])",
        "except OSError as error: print(error.strerror)",
    )
    assert said == "cannot make a map: Operation not permitted\n"


def test_two_capabilities_are_enough(cgroup: Path) -> None:
    """What deploy/systemd/bypass.conf gives: CAP_BPF and CAP_NET_ADMIN, and no root (capabilities(7))."""
    said = as_child(
        cgroup,
        "libc = ctypes.CDLL(None, use_errno=True)",
        "libc.prctl(8, 1, 0, 0, 0)",  # PR_SET_KEEPCAPS
        "os.setuid(65534)",
        "low, high = 1 << 12, 1 << (39 - 32)",  # CAP_NET_ADMIN, CAP_BPF
        "caps = struct.pack('6I', low, low, 0, high, high, 0)",
        "assert libc.capset(struct.pack('Ii', 0x20080522, 0), caps) == 0",
        "made = Kernel(sys.argv[1])",
        "made.set(('127.0.0.1', 80), [('127.0.0.1', 81)])",
        "print(os.getuid(), made.counts(('127.0.0.1', 80)).missed)",
    )
    assert said == "65534 0\n"


def test_the_verifiers_words_are_told(root: None) -> None:
    """A program that ends without a result."""
    with pytest.raises(BpfError, match=r"cannot load odd: .*; the verifier says: .*R0 !read_ok"):
        Program(SOCK_ADDR, INET4_CONNECT, bytes([0x95, 0, 0, 0, 0, 0, 0, 0]), "odd", "GPL")


def test_the_programs_are_those_of_their_source(program: Callable[[str], str], tmp_path: Path) -> None:
    """What stands beside program.c was made of it."""
    sys.path.insert(0, str(FOLDER.parents[2] / "tools"))
    try:
        from compile_bypass import compile_programs
    finally:
        sys.path.pop(0)
    made = compile_programs(program("clang"), program("llvm-objcopy"), tmp_path)
    assert {name: (FOLDER / name).read_bytes() for name in made} == made


def test_maps_are_put_where_the_program_names_them(root: None) -> None:
    with Map(HASH, 8, 8, 4) as first, Map(ARRAY, 4, 8, 4) as second:
        named = bytes([0x18, 1, 0, 0, 1, 0x6D, 0x6C, 0x6D]) + bytes(8)
        code = with_maps(named + bytes(8), {0x6D6C6D01: first})
        assert code[:8] == bytes([0x18, 0x11, 0, 0]) + first.descriptor.to_bytes(4, "little")
        with pytest.raises(ValueError, match="names the maps 0x6d6c6d02"):
            with_maps(named, {0x6D6C6D01: first, 0x6D6C6D02: second})
        with pytest.raises(ValueError, match="7 bytes are no whole number of instructions"):
            with_maps(bytes(7), {})
        # The second half of a wide instruction is none, whatever it looks like.
        hidden = bytes([0x18, 1, 0, 0, 0, 0, 0, 0]) + named[:8]
        with pytest.raises(ValueError, match="names the maps"):
            with_maps(hidden, {0x6D6C6D01: first})


def test_a_map_keeps_what_is_put_there(root: None) -> None:
    with Map(HASH, 4, 8, 1) as made:
        assert made.get(b"aaaa") is None
        made.set(b"aaaa", b"12345678")
        assert made.get(b"aaaa") == b"12345678"
        with pytest.raises(BpfError, match="cannot write to a map"):
            made.set(b"bbbb", bytes(8))
        made.delete(b"aaaa")
        made.delete(b"aaaa")
        assert made.get(b"aaaa") is None


def test_a_machine_whose_number_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(BpfError, match="no known number on pdp11"):
        Map(HASH, 4, 4, 1)


def test_a_kernel_that_tells_no_namespaces_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "_SO_NETNS_COOKIE", 9999)
    with pytest.raises(BpfError, match=r"it takes Linux 5\.14"):
        bpf.netns_cookie()


def test_what_is_pinned_goes_on_and_is_taken_over(cgroup: Path, bpffs: Path, serve: Serve) -> None:
    """B1's exception: nobody has it open, and connects go where its last lists say; the next one counts on."""
    proxy, a, b = serve("proxy"), serve("a"), serve("b")
    pin = str(bpffs / "meshlocal")
    first = Kernel(str(cgroup), pin)
    assert first.adopted() == {}
    first.set(proxy.place, [a.place, b.place])
    with pytest.raises(OSError, match=f"another proxy has {pin}"):
        Kernel(str(cgroup), pin)
    with connecting(cgroup, proxy.place) as client:
        assert client.order("connect 10") == {"a": 5, "b": 5}
        first.close()
        assert client.order("connect 10") == {"a": 5, "b": 5}
        second = Kernel(str(cgroup), pin)
        assert second.adopted() == {proxy.place: (a.place, b.place)}
        assert client.order("connect 10") == {"a": 5, "b": 5}
        assert second.counts(proxy.place) == ({a.place: 15, b.place: 15}, 0)
        second.set(proxy.place, [b.place])
        assert client.order("connect 10") == {"b": 10}
        # Counters of what was taken over are not given to others.
        other = ("127.0.0.9", 80)
        second.set(other, [("127.0.0.9", port) for port in range(1, 10)])
        assert second.counts(proxy.place).connects[b.place] == 25
        assert set(second.counts(other).connects.values()) == {0}
        [shown, _] = sorted(read_pinned(pin), key=lambda each: each.listener != proxy.place)
        assert shown == (True, proxy.place, ({b.place: 25}, 0))
        second.close()
        detach_pinned(pin)
        assert client.order("connect 10") == {"proxy": 10}
    assert not (bpffs / "meshlocal").exists()
    with pytest.raises(OSError, match="No such file"):
        read_pinned(pin)
    # A folder in which nothing is pinned is left alone.
    (bpffs / "other").mkdir()
    with pytest.raises(OSError, match="No such file"):
        detach_pinned(str(bpffs / "other"))
    assert (bpffs / "other").exists()


def test_another_cgroup_has_it_alone(cgroup: Path, bpffs: Path, serve: Serve) -> None:
    """What is pinned moves with the configuration; where it was, connects are left alone."""
    proxy, a = serve("proxy"), serve("a")
    pin = str(bpffs / "meshlocal")
    below = [cgroup / "one", cgroup / "two"]
    for each in below:
        each.mkdir()
    try:
        first = Kernel(str(below[0]), pin)
        first.set(proxy.place, [a.place])
        first.close()
        Kernel(str(below[1]), pin).close()
        for place, served in zip(below, ("proxy", "a"), strict=True):
            with connecting(place, proxy.place) as client:
                assert client.order("connect 3") == {served: 3}
        # One whose cgroup is gone is begun anew.
        below[1].rmdir()
        again = Kernel(str(below[0]), pin)
        with connecting(below[0], proxy.place) as client:
            assert client.order("connect 3") == {"a": 3}
        again.close()
    finally:
        for each in below:
            if each.exists():
                _remove(each)


def _remove(folder: Path) -> None:
    for _ in range(10_000):
        try:
            folder.rmdir()
        except OSError:
            os.sched_yield()
        else:
            return


def test_a_folder_that_is_on_no_bpf_file_system(cgroup: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BpfError, match="it must be on a BPF file system, such as /sys/fs/bpf"):
        Kernel(str(cgroup), str(tmp_path / "pin"))
    assert len(os.listdir("/proc/self/fd")) == before
