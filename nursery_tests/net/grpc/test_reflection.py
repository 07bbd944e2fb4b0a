"""The reflection service."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from meshlocal.net.grpc.reflection import INFO, Reflection
from meshlocal.wire.grpc.status import StatusCode
from meshlocal.wire.pb import discovery_pb2
from meshlocal.wire.pb import reflection_pb2 as pb

DISCOVERY = "meshlocal.discovery.v1.Discovery"


def ask(**request: Any) -> pb.ServerReflectionResponse:
    assert discovery_pb2.DESCRIPTOR.package
    return Reflection([DISCOVERY]).answer(pb.ServerReflectionRequest(**request))


def test_services_are_listed() -> None:
    names = [each.name for each in ask(list_services="*").list_services_response.service]
    assert names == ["grpc.reflection.v1.ServerReflection", DISCOVERY]


@pytest.mark.parametrize(
    "request_fields",
    [
        {"file_containing_symbol": DISCOVERY},
        {"file_containing_symbol": f"{DISCOVERY}.WatchInstances"},
        {"file_containing_symbol": "meshlocal.discovery.v1.Instance"},
        {"file_by_filename": "meshlocal/discovery/v1/discovery.proto"},
    ],
)
def test_files_are_found(request_fields: dict[str, str]) -> None:
    (file,) = ask(**request_fields).file_descriptor_response.file_descriptor_proto
    described = descriptor_pb2.FileDescriptorProto.FromString(file)
    assert [service.name for service in described.service] == ["Discovery"]


def test_a_file_comes_with_what_it_imports() -> None:
    response = Reflection([]).answer(pb.ServerReflectionRequest(file_by_filename="google/protobuf/type.proto"))
    if response.HasField("error_response"):  # nobody imported it yet
        from google.protobuf import type_pb2

        assert type_pb2.DESCRIPTOR.name
        response = Reflection([]).answer(pb.ServerReflectionRequest(file_by_filename="google/protobuf/type.proto"))
    files = response.file_descriptor_response.file_descriptor_proto
    names = [descriptor_pb2.FileDescriptorProto.FromString(each).name for each in files]
    assert names[0] == "google/protobuf/type.proto"
    assert set(names) == {f"google/protobuf/{name}.proto" for name in ("type", "any", "source_context")}


@pytest.mark.parametrize(
    ("request_fields", "code"),
    [
        ({"file_by_filename": "no/such.proto"}, StatusCode.NOT_FOUND),
        ({"file_containing_symbol": "no.Such"}, StatusCode.NOT_FOUND),
        ({"file_containing_symbol": f"{DISCOVERY}.NoSuch"}, StatusCode.NOT_FOUND),
        ({"all_extension_numbers_of_type": "no.Such"}, StatusCode.NOT_FOUND),
        (
            {"file_containing_extension": {"containing_type": "meshlocal.discovery.v1.Zone", "extension_number": 9}},
            StatusCode.NOT_FOUND,
        ),
        ({}, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_is_not_known_is_an_error_response(request_fields: dict[str, Any], code: StatusCode) -> None:
    assert ask(**request_fields).error_response.error_code == code


def test_a_type_without_extensions_has_none() -> None:
    response = ask(all_extension_numbers_of_type="meshlocal.discovery.v1.Zone").all_extension_numbers_response
    assert (response.base_type_name, list(response.extension_number)) == ("meshlocal.discovery.v1.Zone", [])


async def test_an_error_does_not_end_the_call(connect: Any) -> None:
    async with connect(Reflection([]).handlers()) as link, link.channel.call(INFO) as call:
        wrong = pb.ServerReflectionRequest(host="h", file_by_filename="no/such.proto")
        await call.send(wrong)
        response = await call.receive()
        assert (response.valid_host, response.original_request) == ("h", wrong)
        assert response.error_response.error_code == StatusCode.NOT_FOUND
        await call.send(pb.ServerReflectionRequest(list_services=""), end=True)
        assert (await call.receive()).HasField("list_services_response")
        assert await call.receive() is None
