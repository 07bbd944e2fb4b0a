"""Trio primitives: listen, dial, relay, gRPC connections, logging."""
