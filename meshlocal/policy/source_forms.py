"""How the URLs of registries are written, for messages."""

FILE = "file:PATH"
ETCD = "etcd://HOST:PORT/PREFIX"
DNS = "dns:NAME?service=SERVICE"
MESHLOCAL = "meshlocal:grpc://HOST:PORT"
KUBERNETES = "kubernetes:"
