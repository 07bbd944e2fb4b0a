"""The library: instances of this node first, inside an application, with no sidecar (`meshlocal.open_mesh`)."""
