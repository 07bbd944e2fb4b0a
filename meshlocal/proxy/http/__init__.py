"""HTTP through the proxy: each request picked, retried and accounted for on its own (behaviour rules A1 to A8).

    Listeners → HttpForwarder.serve        one task per client connection
                  h1.ClientConnection      its requests, one after the other; limits of time and size; the end
                    serve                  one request as a task: attempts, answers, waits
                    h1.Lane                plain requests without a task, in the relay loop
                      HttpRequest          what is decided of a request, and what is counted (a client.Account)
                      h1.H1Upstream        one request on one connection to one instance, until its response's end
                  HttpService              what is kept of one service: its pool, its retry budget, its counts
                  HttpShared               what all connections share: settings, services, who is told

What the bytes mean is decided in `meshlocal.wire.http1`, what to do about a failure in `meshlocal.policy.retry` and
`meshlocal.policy.search`; what is here waits, moves bytes and says what happened.

Times. A connection has one cancel scope, and a time at which it is cut unless something happens first; one sweep looks
at all connections, so that no byte that moves costs a timer. What a policy number promises exactly (`attempt_timeout`,
`response_deadline`) has cancel scopes of its own, which are made only where an instance did not answer at once.
"""
