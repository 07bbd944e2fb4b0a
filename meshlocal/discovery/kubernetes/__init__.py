"""The Kubernetes registry.

    objects      what is read of the API's JSON
    mapping      an EndpointSlice or Endpoints object → instances; pure
    table        objects of one service merged, and what changed since it was last asked; pure
    kubeconfig   a kubeconfig → how to reach a cluster, and as whom; pure
    access       finds the cluster: kubeconfig, or the pod's service account
    credentials  tokens and certificates: given, in files that rotate, or from a plugin
    http         one GET over HTTP/1.1 and TLS
    api          requests to the API server, with its errors
    listwatch    list, watch, resume, list again
    stores       where listed and watched objects go
    source       the whole, as a `Source`

Nothing outside this package imports it but the discovery server that has a `kubernetes:` source.
"""
