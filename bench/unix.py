"""Unix sockets beside loopback TCP: directly, through the proxy, and through HAProxy and nginx.

One caller, 64 bytes there and back, in interleaved rounds. Through a proxy, both sides are what the row says.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import report
from bench.latency import Place, in_turns, sizes
from bench.load import find
from bench.machine import describe
from bench.peers import nginx_base, stream_module
from bench.processes import instances_file, listening, meshlocal, module, port_in

SERVICE = "b"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.unix", description=__doc__)
    sizes(parser)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


@contextmanager
def routes() -> Iterator[dict[str, Place]]:
    """Everything up: where each route begins."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        path = str(folder / "instance")
        _, (near, _) = stack.enter_context(module("bench.echo", "127.0.0.1", path))
        found: dict[str, Place] = {"direct": near, "direct, Unix": path}
        for name, command in (("HAProxy", _haproxy(folder, path)), ("nginx", _nginx(folder, path))):
            if command is None:
                print(f"without {name}: it is not installed")
                continue
            stack.enter_context(listening(command, folder / f"{name}.log", [folder / name]))
            found[f"{name}, Unix"] = str(folder / name)
        file = folder / "instances.yaml"
        instances_file(file, {SERVICE: [("127.0.0.1", near, "n1")]})
        listen = f"tcp://127.0.0.1:0={SERVICE}"
        flags = ["--discovery", f"file:{file}", "--admin", "none"]
        _, line = stack.enter_context(meshlocal("proxy", *flags, "--listen", listen, node="n1"))
        found["meshlocal"] = port_in(line, rf"tcp://127\.0\.0\.1:(\d+)={SERVICE}")
        row = f"{{address: 127.0.0.1, port: {near}, labels: {{node: n1, socket: instance}}}}"
        (folder / "unix.yaml").write_text(f"services: {{{SERVICE}: [{row}]}}\n")
        (folder / "proxy.yaml").write_text(f"proxy: {{socket_folder: {folder}}}\n")
        flags = ["--config", str(folder / "proxy.yaml"), "--discovery", f"file:{folder}/unix.yaml", "--admin", "none"]
        listen = f"tcp://unix:{folder}/meshlocal={SERVICE}"
        stack.enter_context(meshlocal("proxy", *flags, "--listen", listen, node="n1"))
        found["meshlocal, Unix"] = f"{folder}/meshlocal"
        yield found


def _haproxy(folder: Path, path: str) -> list[str] | None:
    config = folder / "haproxy.cfg"
    config.write_text(
        "global\n nbthread 1\n"
        "defaults\n mode tcp\n timeout connect 1s\n timeout client 1h\n timeout server 1h\n"
        f"listen b\n bind unix@{folder}/HAProxy\n server s unix@{path}\n"
    )
    program = find("haproxy")
    return None if program is None else [program, "-db", "-f", str(config)]


def _nginx(folder: Path, path: str) -> list[str] | None:
    config = folder / "nginx.conf"
    stream = f"stream {{ server {{ listen unix:{folder}/nginx; proxy_pass unix:{path}; }} }}\n"
    config.write_text(f"{stream_module()}{nginx_base(folder) % ''}}}\n{stream}")
    program = find("nginx")
    return None if program is None else [program, "-c", str(config)]


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("Unix sockets beside loopback TCP", machine)
    with routes() as places:
        figures = in_turns(places, asked)
    report.write("unix", machine, figures, asked.output)


if __name__ == "__main__":
    main()
