"""Sans-io: formats and protocols, from bytes to values and back. No tasks, no sockets, no clock."""
