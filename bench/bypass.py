"""What a connect within the node costs past the proxy: direct, by the bypass, through the proxy, and through others.

As root, on Linux with cgroups of version 2: the benchmark joins a cgroup of its own, which the bypass is at. One
caller, 64 bytes there and back, in interleaved rounds; direct is measured twice in each round, so that what two runs of
the same differ by is in the table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import report
from bench.latency import in_turns, sizes
from bench.machine import describe
from bench.peers import ENVOY, HAPROXY, NGINX, Instance, Job, present, started
from bench.processes import StartError, instances_file, meshlocal, module, port_in

DIRECT, AGAIN, BYPASS, PROXY = "direct", "direct, once more", "meshlocal, bypass", "meshlocal"
SERVICE = "b"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bypass", description=__doc__)
    sizes(parser)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup, with this process in it."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
    if not mounted or os.geteuid() != 0:
        raise StartError("takes root, and cgroups of version 2")
    [before] = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    made = Path(mounted[0]) / f"meshlocal-bench-{os.getpid()}"
    made.mkdir()
    try:
        (made / "cgroup.procs").write_text(str(os.getpid()))
        yield made
    finally:
        (Path(mounted[0]) / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        made.rmdir()


@contextmanager
def routes() -> Iterator[dict[str, int]]:
    """Everything up: the port of each route."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, (near,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        file = folder / "instances.yaml"
        instances_file(file, {SERVICE: [("127.0.0.1", near, "n1")]})
        flags = ["--discovery", f"file:{file}", "--listen", f"tcp://127.0.0.1:0={SERVICE}", "--admin", "none"]
        ports = {DIRECT: near, AGAIN: near}
        job = Job({SERVICE: [Instance("127.0.0.1", near)]})
        for peer in stack.enter_context(started(present((HAPROXY, NGINX, ENVOY), job), job, folder)):
            ports[peer.name] = peer.ports[SERVICE]
        pattern = rf"tcp://127\.0\.0\.1:(\d+)={SERVICE}"
        _, line = stack.enter_context(meshlocal("proxy", *flags, node="n1"))
        ports[PROXY] = port_in(line, pattern)
        # The proxies are in the cgroup of whoever starts them: that they connect is nothing to the bypass.
        made = stack.enter_context(cgroup())
        config = folder / "bypass.yaml"
        config.write_text(f"proxy: {{bypass: {{cgroup: {made}}}}}\n")
        _, line = stack.enter_context(meshlocal("proxy", *flags, "--config", str(config), node="n1"))
        ports[BYPASS] = port_in(line, pattern)
        yield ports


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("Connects within the node, past the proxy", machine)
    with routes() as ports:
        figures = in_turns(ports, asked)
    report.write("bypass", machine, figures, asked.output)


if __name__ == "__main__":
    main()
