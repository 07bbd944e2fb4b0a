"""gRPC client and server over HTTP/2, for trio and any other loop that anyio runs on."""
