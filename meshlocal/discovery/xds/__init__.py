"""xDS: what the hub holds, for gRPC clients and Envoys without a sidecar."""
