"""The standard reflection service, grpc.reflection.v1: clients such as grpcurl ask it what the server speaks.

Not imported by the client: an application that has grpcio-reflection registers the same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool

from meshlocal.net.grpc.server import Routes
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import StatusCode
from meshlocal.wire.pb import reflection_pb2 as pb

INFO = Method(
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    pb.ServerReflectionRequest,
    pb.ServerReflectionResponse,
    client_streaming=True,
    server_streaming=True,
)


class Reflection:
    """Describes `services`, full names whose descriptors are in the pool (the default one: that of `_pb2` modules)."""

    def __init__(self, services: Iterable[str], pool: DescriptorPool | None = None) -> None:
        self._services = sorted({*services, INFO.service})
        self._pool = pool or descriptor_pool.Default()

    def handlers(self) -> Routes:
        """The service's method, for `GrpcServer`."""
        return {INFO: self._info}

    async def _info(self, call: ServerCall[pb.ServerReflectionRequest, pb.ServerReflectionResponse]) -> None:
        async for request in call:
            response = self.answer(request)
            response.valid_host = request.host
            response.original_request.CopyFrom(request)
            await call.send(response)

    def answer(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        """The response to one request. What is not found is an error response, and the call goes on."""
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            services = [pb.ServiceResponse(name=name) for name in self._services]
            return pb.ServerReflectionResponse(list_services_response=pb.ListServiceResponse(service=services))
        answers: dict[str | None, Callable[[], pb.ServerReflectionResponse]] = {
            "file_by_filename": lambda: _files(self._pool.FindFileByName(request.file_by_filename)),
            "file_containing_symbol": lambda: _files(self._declaring(request.file_containing_symbol)),
            "file_containing_extension": lambda: self._extension(request.file_containing_extension),
            "all_extension_numbers_of_type": lambda: self._extensions(request.all_extension_numbers_of_type),
        }
        if kind not in answers:
            return _error(StatusCode.INVALID_ARGUMENT, "the request asks for nothing that this server knows")
        try:
            return answers[kind]()
        except KeyError:
            return _error(StatusCode.NOT_FOUND, f"{kind} {str(getattr(request, str(kind))).strip()!r} is not known")

    def _declaring(self, symbol: str) -> FileDescriptor:
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # The pool does not look methods up by their names.
            service, _, method = symbol.rpartition(".")
            return self._pool.FindServiceByName(service).methods_by_name[method].containing_service.file

    def _extension(self, request: pb.ExtensionRequest) -> pb.ServerReflectionResponse:
        message = self._pool.FindMessageTypeByName(request.containing_type)
        extension = self._pool.FindExtensionByNumber(message, request.extension_number)
        return _files(self._pool.FindFileContainingSymbol(extension.full_name))

    def _extensions(self, type_name: str) -> pb.ServerReflectionResponse:
        extensions = self._pool.FindAllExtensions(self._pool.FindMessageTypeByName(type_name))
        numbers = sorted(extension.number for extension in extensions)
        response = pb.ExtensionNumberResponse(base_type_name=type_name, extension_number=numbers)
        return pb.ServerReflectionResponse(all_extension_numbers_response=response)


def _files(file: FileDescriptor) -> pb.ServerReflectionResponse:
    """A file and all that it imports, itself first."""
    found: dict[str, FileDescriptor] = {}
    wanted = [file]
    while wanted:
        each = wanted.pop()
        if each.name not in found:
            found[each.name] = each
            wanted.extend(each.dependencies)
    response = pb.FileDescriptorResponse(file_descriptor_proto=[each.serialized_pb for each in found.values()])
    return pb.ServerReflectionResponse(file_descriptor_response=response)


def _error(code: StatusCode, message: str) -> pb.ServerReflectionResponse:
    return pb.ServerReflectionResponse(error_response=pb.ErrorResponse(error_code=code, error_message=message))
