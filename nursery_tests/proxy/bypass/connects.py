"""Connects, as a process within a cgroup: `connects.py CGROUP HOST PORT`.

It reads orders on standard input, and answers each with a line of JSON: who answered how many connects, or how those
failed that did. `connect N` makes N of them, one after the other; `start N` goes on from N places at once; `stop` ends
that; `count` tells how many there were so far, and goes on.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections import Counter
from pathlib import Path


def main() -> None:
    cgroup, host, port = sys.argv[1:]
    if cgroup != "-":
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def one() -> None:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.settimeout(20)
                sock.connect((host, int(port)))
                sock.sendall(b"who are you?\n")
                answer = sock.recv(64).decode().strip() or "nothing"
        except OSError as error:
            answer = type(error).__name__
        with lock:
            counts[answer] += 1

    def go_on() -> None:
        while not stop.is_set():
            one()

    for line in sys.stdin:
        order, _, number = line.strip().partition(" ")
        if order == "connect":
            for _ in range(int(number)):
                one()
        elif order == "start":
            stop.clear()
            threads = [threading.Thread(target=go_on) for _ in range(int(number))]
            for thread in threads:
                thread.start()
        elif order == "stop":
            stop.set()
            for thread in threads:
                thread.join()
        with lock:
            told = {} if order == "start" else dict(counts)
        if order not in ("start", "count"):
            counts.clear()
        sys.stdout.write(f"{json.dumps(told)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
