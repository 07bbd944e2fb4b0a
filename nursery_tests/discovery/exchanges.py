"""What a client and a discovery server say to each other, as one version of the interface has it.

A version that others may still run is kept in `versions/`: its interface, and what it said. To record this one:

    python -m nursery_tests.discovery.exchanges versions/NAME
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import trio
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Publisher
from meshlocal.net.grpc.client import channel_over
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.policy import model
from meshlocal.policy.model import Conditions, Instance, ServiceKey, make_instance
from meshlocal.wire.discovery_methods import METHODS
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import discovery_pb2

B = ServiceKey("b")
FIRST = make_instance("10.0.0.1", 9000, "grpc", {"node": "n1", "zone": "z1", "cluster": "c1"})
SECOND = make_instance("fd00::2", 9001, "", {"node": "n2"}, Conditions(ready=False, serving=True, terminating=True))
THIRD = make_instance("10.0.0.3", 9002, "dns", {}, protocol="udp")


class Interface:
    """The messages and methods of one version.

    Args:
        file: its `discovery.proto`, as a FileDescriptorProto.
    """

    def __init__(self, file: bytes) -> None:
        pool = DescriptorPool()
        self.file = file
        found = pool.AddSerializedFile(file)
        service = next(iter(found.services_by_name.values()))
        self.methods: dict[str, Method[Any, Any]] = {
            name: Method(
                f"/{service.full_name}/{name}",
                message_factory.GetMessageClass(method.input_type),
                message_factory.GetMessageClass(method.output_type),
                server_streaming=method.server_streaming,
            )
            for name, method in service.methods_by_name.items()
        }


def today() -> Interface:
    """This version's."""
    file = FileDescriptorProto()
    discovery_pb2.DESCRIPTOR.CopyToProto(file)
    assert {method.path.rpartition("/")[2] for method in METHODS} == {each.name for each in file.service[0].method}
    return Interface(file.SerializeToString())


class _Registry:
    name = "registry"

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        self.hold(FIRST, SECOND)
        task_status.started()
        await trio.sleep_forever()

    def hold(self, *instances: Instance) -> None:
        self.publisher.update(B, model.index(instances))


ASKED: Mapping[str, list[dict[str, Any]]] = {
    "ListZones": [{}],
    "ListClusters": [{}, {"zone": "z1"}],
    "ListServices": [{}, {"zone": "z9"}],
    "ListInstances": [{"service": "b"}, {"service": "b", "selector": {"node": "n1"}}, {"service": "x"}],
}


def _dict(message: Any) -> Any:
    found = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for part in (found, *found.values()):
        if isinstance(part, dict) and "instances" in part:
            part["instances"].sort(key=lambda each: json.dumps(each, sort_keys=True))
    return found


async def conversation(interface: Interface) -> dict[str, Any]:
    """What this server says to a client of some version, step by step."""
    said: dict[str, Any] = {}
    registry = _Registry()
    hub = Hub([registry], Random(0))
    service = DiscoveryService(hub, 1000.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await hub.wait_in_sync()
        near, far = memory_stream_pair()
        nursery.start_soon(GrpcServer(service.handlers()).serve_stream, far)
        async with channel_over(near) as channel:
            for name, requests in ASKED.items():
                method = interface.methods[name]
                for position, fields in enumerate(requests):
                    try:
                        answer = _dict(await channel.unary(method, method.request_type(**fields)))
                    except GrpcError as error:
                        answer = error.code.name
                    said[f"{name} {position}"] = answer
            watch = interface.methods["WatchInstances"]
            request = watch.request_type(subscriptions=[{"service": "b"}, {"service": "x"}])
            async with channel.call(watch) as call:
                await call.send(request, end=True)
                said["WatchInstances"] = [_dict(await call.receive()) for _ in range(3)]
                for instances in ((FIRST, THIRD), (THIRD,), (FIRST, SECOND, THIRD)):
                    registry.hold(*instances)
                    said["WatchInstances"].append(_dict(await call.receive()))
                registry.publisher.update(B, None)
                said["WatchInstances"].append(_dict(await call.receive()))
            if "WatchServices" in interface.methods:
                services = interface.methods["WatchServices"]
                async with channel.call(services) as call:
                    await call.send(services.request_type(), end=True)
                    said["WatchServices"] = [_dict(await call.receive()) for _ in range(3)]
                    registry.hold(FIRST)
                    said["WatchServices"].append(_dict(await call.receive()))
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return said


def main() -> None:
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir(parents=True)
    interface = today()
    (folder / "interface.binpb").write_bytes(interface.file)
    said = trio.run(conversation, interface)
    (folder / "said.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
