"""The two ends of HTTP/2: a client's connection and its streams, and connections to instances that many streams share.

    H2ClientLink      one client's connection; each of its streams is a request of its own (rule C1)
      H2Client        the client's end of one request
    UpstreamLink      one connection to an instance, which all clients of a service share (`SharedLinks`)
      H2Upstream      the instance's end of one request, for a client that speaks HTTP/2
      Http1Stream     the same for one that speaks HTTP/1.1, to which it looks like a connection of its own

Theory of operation. A `Link` turns the bytes of a connection into calls on its streams, in the relay's loop or, without
one, in its task. Between a client and an instance that both speak HTTP/2 a stream needs no task: what comes on one side
is queued on the other in the same turn, and at the turn's end each connection sends all that it has in one write (C4).
Credit goes back for what the other side's socket took (C2), so that a stream holds no more than its window, and one
that stalls costs its window and holds up no other. Of the rules the streams know nothing: they call `HttpRequest`, as
HTTP/1.1's ends do. What has to wait (a connection that must be made, an answer of the proxy's own, another attempt) is
for a task (`meshlocal.proxy.http.serve`), which the stream gets at that moment.
"""
