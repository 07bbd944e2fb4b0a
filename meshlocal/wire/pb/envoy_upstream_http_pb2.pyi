from meshlocal.wire.pb import envoy_core_pb2 as _envoy_core_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HttpProtocolOptions(_message.Message):
    __slots__ = ("use_downstream_protocol_config",)
    class UseDownstreamHttpConfig(_message.Message):
        __slots__ = ("http_protocol_options", "http2_protocol_options")
        HTTP_PROTOCOL_OPTIONS_FIELD_NUMBER: _ClassVar[int]
        HTTP2_PROTOCOL_OPTIONS_FIELD_NUMBER: _ClassVar[int]
        http_protocol_options: _envoy_core_pb2.Http1ProtocolOptions
        http2_protocol_options: _envoy_core_pb2.Http2ProtocolOptions
        def __init__(self, http_protocol_options: _Optional[_Union[_envoy_core_pb2.Http1ProtocolOptions, _Mapping]] = ..., http2_protocol_options: _Optional[_Union[_envoy_core_pb2.Http2ProtocolOptions, _Mapping]] = ...) -> None: ...
    USE_DOWNSTREAM_PROTOCOL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    use_downstream_protocol_config: HttpProtocolOptions.UseDownstreamHttpConfig
    def __init__(self, use_downstream_protocol_config: _Optional[_Union[HttpProtocolOptions.UseDownstreamHttpConfig, _Mapping]] = ...) -> None: ...
