"""The discovery server: sources, the hub that merges them, and the gRPC service over it."""
