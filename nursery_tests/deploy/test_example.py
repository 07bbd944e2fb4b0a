"""The Kubernetes example, without Kubernetes: its containers' own commands and configuration, as processes.

Of what a pod has to itself, the folders are replaced by folders of the test, and the ports by free ones.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import yaml

from nursery_tests.ports import free_port

MESHLOCAL = str(Path(sys.executable).with_name("meshlocal"))
FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"


class Pods:
    """Processes that end with the test.

    Args:
        folder: where their files are.
        stack: ends them.
    """

    def __init__(self, folder: Any, stack: Any) -> None:
        self.folder = folder
        self.stack = stack
        built: list[str | Path] = [Path(sys.executable).with_name("kubectl"), "kustomize", FOLDER / "example"]
        output = subprocess.run(built, capture_output=True, check=True, text=True).stdout
        self.documents = list(yaml.safe_load_all(output))
        self.ports = {"8080": free_port(), "15000": free_port(), "15001": free_port(), "7070": free_port()}

    def find(self, kind: Any, name: Any) -> Any:
        return next(
            each for each in self.documents if each["kind"] == kind and each["metadata"]["name"].startswith(name)
        )

    def start(self, name: Any, command: Any, node: Any, replaced: Any) -> Any:
        """Start a container's command on a node; every text of `replaced` stands for another one."""
        environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin", "NODE_NAME": node}
        environment["MESHLOCAL_PROXY__NAMESPACE"] = "meshlocal-example"
        words = [self.replace(word, replaced) for word in command]
        log = self.stack.enter_context((self.folder / f"{name}.log").open("w"))
        process = subprocess.Popen(words, env=environment, stdout=PIPE, stderr=log, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return process

    def replace(self, text: Any, replaced: Any) -> Any:
        """All at once: what was put in is not looked at again."""
        pattern = "|".join(map(re.escape, sorted(replaced, key=len, reverse=True)))
        return re.sub(pattern, lambda match: replaced[match[0]], text) if replaced else text

    def write(self, name: Any, text: Any, replaced: Any) -> None:
        (self.folder / name).write_text(self.replace(text, replaced))


@pytest.fixture
def pods(program: Any, tmp_path: Any) -> Iterator[Any]:
    for name in ("nginx", "wget", "sed"):
        program(name)
    with ExitStack() as stack:
        yield Pods(tmp_path, stack)


def template(document: Any) -> Any:
    return document["spec"]["template"]["spec"]


def start_b(pods: Any, number: Any) -> Any:
    """b's pod on a node, at a loopback address of its own."""
    (container,) = template(pods.find("DaemonSet", "b"))["containers"]
    private = pods.folder / f"tmp-{number}"
    private.mkdir()
    own = {"/tmp/": f"{private}/", "listen 8080": f"listen 127.0.0.1{number}:{pods.ports['8080']}"}
    pods.write(f"nginx-{number}.conf", pods.find("ConfigMap", "b-")["data"]["nginx.conf"], own)
    replaced = {"/etc/b/nginx.conf": str(pods.folder / f"nginx-{number}.conf"), "/tmp/": f"{private}/"}
    return pods.start(f"b-{number}", container["command"] + container["args"], f"node-{number}", replaced)


def start_discovery(pods: Any) -> Any:
    rest = f"port: {pods.ports['8080']}, port_name: http"
    rows = [f"    - {{address: 127.0.0.1{number}, {rest}, labels: {{node: node-{number}}}}}" for number in (1, 2)]
    pods.write("instances.yaml", "services:\n  b.meshlocal-example:\n" + "\n".join(rows) + "\n", {})
    own = {"kubernetes:": f"file:{pods.folder}/instances.yaml", "0.0.0.0:7070": f"127.0.0.1:{pods.ports['7070']}"}
    own |= {"0.0.0.0:15000": "127.0.0.1:0", "delay: 5": "delay: 0"}
    pods.write("discovery.yaml", (FOLDER / "base/discovery/discovery.yaml").read_text(), own)
    command = [MESHLOCAL, "discovery", "--config", str(pods.folder / "discovery.yaml")]
    discovery = pods.start("discovery", command, "node-1", {})
    assert discovery.stdout.readline().startswith("meshlocal discovery ready")
    return discovery


def start_sidecar(pods: Any) -> Any:
    (container,) = template(pods.find("Deployment", "caller"))["initContainers"]
    own = {
        "meshlocal-discovery.meshlocal.svc:7070": f"127.0.0.1:{pods.ports['7070']}",
        ":15001=": f":{pods.ports['15001']}=",
        "0.0.0.0:15000": f"127.0.0.1:{pods.ports['15000']}",
    }
    pods.write("proxy.yaml", pods.find("ConfigMap", "meshlocal-proxy")["data"]["proxy.yaml"], own)
    command = [MESHLOCAL, *container["args"]]
    sidecar = pods.start("sidecar", command, "node-1", {"/etc/meshlocal/": f"{pods.folder}/"})
    assert sidecar.stdout.readline().startswith("meshlocal proxy ready: node=node-1 ")
    return sidecar


def start_caller(pods: Any) -> Any:
    (container,) = template(pods.find("Deployment", "caller"))["containers"]
    replaced = {"/tmp/": f"{pods.folder}/", ":15001/": f":{pods.ports['15001']}/"}
    return pods.start("caller", container["command"] + container["args"], "node-1", replaced)


def until(process: Any, wanted: Any) -> Any:
    """Read lines until one is as wanted, and return those before it."""
    before: list[str] = []
    for line in process.stdout:
        if line.rstrip("\n") == wanted:
            return before
        before.append(line)
    pytest.fail(f"ended after {before}")


def test_the_example_keeps_to_its_node_and_leaves_it_when_it_must(pods: Any) -> None:
    """O1 and S1, with the manifests' commands: local first, another node when the local one has gone; clean stops."""
    local, remote = start_b(pods, 1), start_b(pods, 2)
    for number in (1, 2):
        wait_for(f"127.0.0.1{number}", pods.ports["8080"])
    discovery, sidecar = start_discovery(pods), start_sidecar(pods)
    caller = start_caller(pods)
    answered = f"caller on node-1, answered by {socket.gethostname()} on "
    assert until(caller, answered + "node-1") == []

    local.terminate()
    assert local.wait() == 0
    before = until(caller, answered + "node-2")
    assert set(before) <= {answered + "node-1\n"}, "a request failed"
    assert (pods.folder / "answered").exists(), "what the readiness probe looks for"

    # In the order in which the kubelet stops a pod: the application, then its sidecar.
    caller.terminate()
    assert caller.wait() == 0
    for process in (sidecar, remote, discovery):
        process.terminate()
        assert process.wait() == 0


def wait_for(host: Any, port: Any) -> None:
    """Until it listens: what the readiness probe waits for."""
    done = subprocess.run(
        [
            "wget",
            "-q",
            "-O",
            "-",
            "--tries=50",
            "--waitretry=1",
            "--retry-connrefused",
            f"http://{host}:{port}/healthz",
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == "ok\n"
