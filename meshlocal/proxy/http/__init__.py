"""HTTP/1.1 through the proxy: each request picked, retried and accounted for on its own (behaviour rules A1 to A8).

    Listeners → HttpForwarder.serve        one task per client connection
                  ClientConnection         its requests, one after the other; limits of time and size; the end
                    Exchange               one request: pick, attempts, what follows from a failure, the account
                      Attempt              one request on one connection to one instance, until its response's end
                    tunnel                 CONNECT and Upgrade: bytes both ways
                  HttpService              what is kept of one service: its pool, its retry budget, its counts

What the bytes mean is decided in `meshlocal.wire.http1`, what to do about a failure in `meshlocal.policy.retry`; what
is here waits, moves bytes and counts.

Times. A connection has one cancel scope, and a time at which it is cut unless something happens first; one sweep looks
at all connections, so that no byte that moves costs a timer. What a policy number promises exactly (`attempt_timeout`,
`response_deadline`) has cancel scopes of its own, which are made only where an instance did not answer at once.
"""
