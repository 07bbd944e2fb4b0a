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

Why the way to the API server is this package's own, and not a client library's. Of the kept clients kr8s runs on trio.
Measured with kr8s 0.20 on CPython 3.11: importing it takes 21 MB of resident memory over trio and ssl, this whole
package 3 MB. And this package would use little of it, since lists and watches are followed here in any case:

- it reads a token file again only after a refusal, and knows no expiry of what a plugin printed; here files are read
  for every request, and a plugin runs again before its answer expires;
- it writes keys and certificates given as data to files that stay; here they never reach a disk;
- a kubeconfig at fault is a KeyError there; here the message names the file, the line and the key;
- its HTTP client leaves async generators unfinished where a stream is left early under trio, and bounds neither a line
  nor an answer.
"""
