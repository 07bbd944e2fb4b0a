"""gRPC over HTTP/2 without I/O: statuses, message framing, metadata, methods."""
