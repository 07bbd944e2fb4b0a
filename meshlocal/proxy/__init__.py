"""The sidecar's data path: listeners, services, connections."""
