from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class PreviousPrioritiesConfig(_message.Message):
    __slots__ = ("update_frequency",)
    UPDATE_FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    update_frequency: int
    def __init__(self, update_frequency: _Optional[int] = ...) -> None: ...
