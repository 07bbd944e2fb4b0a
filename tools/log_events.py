"""What each event of the log means to an operator, and what there is to do: a part of tools/generate_reference.py.

The events themselves stand in the code, where they are found: one without a line here, or a line without an event, is
an error. An event at the level debug needs none.
"""

from __future__ import annotations

OURS = "A fault of this program, in one {}; all else goes on. Report it, with the traceback."

EVENTS = {
    # Configuration and life of a process
    "config applied": "A configuration that was read again (SIGHUP) holds now.",
    "config applied to all workers": "The same, in each worker.",
    "config not applied": "What was read again is wrong, and nothing of it holds: mend what `problem` names, and send"
    " SIGHUP again.",
    "config not applied, by a fault of this program": OURS.format("reload"),
    "configuration key has no use": "It was given and does nothing: most likely it is misspelt. `meshlocal check` says"
    " the same.",
    "environment variable has no use": "Likewise: two underscores join the steps of a key.",
    "own label unknown": "The proxy does not know its node, or another label that `prefer` names: nothing counts as"
    " local. Set what `problem` names.",
    "SIGHUP ignored: nothing to read again": "The process has no configuration that could change.",
    "draining": "Told to stop: not ready from now on, and no new connections after drain.delay (S1).",
    "stopping now": "Told twice: what is open is cut.",
    "connections cut at the end of the drain": "They lasted longer than drain.timeout: give it more, or have clients"
    " end them.",
    "open beyond this machine": "Whoever reaches the address can read it, or use it: set what `problem` names, or"
    " listen on loopback.",
    "log level changed": "By `PUT /log`; it holds until the configuration is applied again.",
    "few files may be open; each connection takes two": "Raise the limit of open files (LimitNOFILE=, ulimit -n).",
    "the limit of open files stays as it is": "The system refused a higher one; likewise.",
    "relays take the slow path": "This version of Trio is not known: all works, and takes more CPU. Use a version that"
    " the lock files name.",
    "task failed": OURS.format("task") + " It is begun again.",
    "task is begun again": "After a failure, later each time.",
    "task failed while it was cancelled": OURS.format("task, as it ended"),
    "the data path is dead: ending": "It failed again and again, by a fault of this program. The process ends with"
    " status 70, for its supervisor to start it anew. Report it.",
    "the relay loop failed by a fault in the proxy": "As above.",
    # Files and certificates
    "files read again": "Certificates or tokens changed, and the new ones are used.",
    "file not read again": "A certificate or token changed and cannot be used; the one before is, as long as it lasts."
    " `problem` names the file.",
    "certificate ends soon": "Whatever renews it has not.",
    "svid received": "The SPIFFE agent gave a certificate.",
    "workload api cannot be followed": "The SPIFFE agent is away: what it gave last is used. See its socket and log.",
    "workload api makes no sense": "The agent sent what is no certificate; what it gave last is used.",
    # The proxy's knowledge
    "discovery is watched": "A discovery server answers.",
    "discovery is away; going on with what is known": "It is tried again. While it is away, instances that come and go"
    " are not seen; those that fail are ejected.",
    "discovery is away, and nothing is known yet": "Requests fail until it answers: see proxy.discovery.urls, and"
    " whether the server listens. With a cache_file a proxy starts with what it knew.",
    "the watch on discovery failed by a fault of this program": OURS.format("watch") + " It begins anew.",
    "instance refused": "A discovery server sent an instance that is malformed; it is left out, the others count.",
    "every attempt fails; asking discovery again": "What is known may be old: the service is asked for anew.",
    "no registry knows the service": "A request or a listener named it: see its spelling, and"
    " `meshlocal get services`.",
    "instances with several port names; set port_name": "The service has several ports, and all of them are used: say"
    " which with the key that `config_key` names.",
    "no instance of any watched service is on this node; every request leaves it": "Most likely NODE_NAME is spelt"
    " otherwise than discovery spells it: `meshlocal get nodes`.",
    "starting from the cache file": "Discovery is away; what was known `age` seconds ago is used until it is back.",
    "cache file ignored": "It cannot be read, or is damaged: the proxy waits for discovery.",
    "cache file cannot be written": "A restart without discovery would know nothing: see the path and its file system.",
    # Requests
    "request": "The access log's: one for each request (access_log).",
    "request failed": "HTTP: no instance answered, or there is none. `tried` has each attempt; `meshlocal tap SERVICE"
    " --failed` shows all of them.",
    "request failed: no instance connected": "TCP: likewise.",
    "bypass is attached": "Connects within proxy.bypass.cgroup may go straight to instances of this node.",
    "no bypass; the proxy serves without": "See its problem: the kernel is older than Linux 5.14, CAP_BPF or"
    " CAP_NET_ADMIN is missing, or proxy.bypass.cgroup is no cgroup of version 2.",
    "listener is bypassed": "Connects to it go straight to these instances, while they listen.",
    "listener is not bypassed": "Connects to it reach the proxy; the problem says why.",
    "bypass of a listener failed": "The kernel takes no more lists; connects reach the proxy.",
    "instance ejected": "It failed as often as `ejection` allows: it is tried last of all, until a trial works.",
    "instance readmitted": "It works again.",
    "instance fails its health checks": "As services.NAME.health_check has it.",
    "cannot accept; trying again": "Descriptors or memory are short: raise the limit of open files.",
    "tls connection refused": "A client's handshake failed, or its certificate is not in allow.",
    "http2 connection ended": "A client broke a rule of HTTP/2, or was not heard of.",
    "check failed by a fault in the proxy": OURS.format("health check"),
    "connection failed by a fault in the proxy": OURS.format("connection"),
    "connection to an instance failed by a fault in the proxy": OURS.format("connection to an instance"),
    "relay failed by a fault in the proxy": OURS.format("connection"),
    "request failed by a fault in the proxy": OURS.format("request"),
    "what was to be sent was lost by a fault in the proxy": OURS.format("connection"),
    "spans not exported": "The collector is away, slow, or refuses: see proxy.tracing.endpoint. Requests do not wait"
    " for it; meshlocal_trace_spans_total counts what is lost.",
    # Workers
    "worker ended: starting another": "Its connections are gone. `status` 70: the data path was dead; see its lines"
    " before.",
    "worker ended before the proxy was ready: stopping": "The configuration cannot be served: see the worker's lines.",
    "worker hangs, and is killed": "It gave no sign of life: report it.",
    "workers did not end in time, and were killed": "The drain was over.",
    "worker cannot answer": OURS.format("worker's answer"),
    "the process above is gone: draining": "The supervisor of the workers was killed: they end, and the service"
    " manager starts anew.",
    "a message between the processes of this proxy cannot be read; was it upgraded?": "Restart it.",
    # The discovery server
    "source in sync": "All of the registry was read.",
    "source failed": "A fault in following a registry; it is begun again, and the last state stays served.",
    "source kind left out": "A plugin cannot be loaded; `problem` says why. URLs of its scheme are refused.",
    "source kind left out: there is one of this scheme": "Two plugins have the same scheme: uninstall one.",
    "registry cannot be followed": "It is away or refuses; `problem` says how. The last state stays served.",
    "registry followed again": "It answers.",
    "discovery server refused": "It is this server, or learns from it: `problem` says which. It is not followed.",
    "listing again": "The registry asked for it.",
    "a list expired half-way": "It was too slow, or changes were too many; it begins anew.",
    "kubernetes followed": "All of a kind was read.",
    "kubernetes object refused": "It is malformed: `problem` says what. `served` is used in its place.",
    "kubernetes endpoint left out": "Likewise, one endpoint of it.",
    "kubernetes data is not all that it could be": "Said once of the first such object: `problem`.",
    "the API server has no EndpointSlices; v1 Endpoints are read instead": "It is older than Kubernetes 1.21.",
    "nodes are not read: zone comes from the slices alone, region is unknown": "The service account may not: add the"
    " component nodes, or `nodes=never`.",
    "the environment's HTTP proxy is not used": "It is written in a way that is not supported; the API server is asked"
    " straight.",
    "instances file read again": "It changed.",
    "instances file refused": "It is malformed: nothing of it counts, and what it said before is served. `problem` has"
    " the line.",
    "instances file cannot be looked at; what it said before is served": "See the path and its file system.",
    "etcd key refused": "It, or what it holds, is no instance: `problem` names it and says why. `served` is used in its"
    " place.",
    "registered": "The instance stands in etcd, for as long as this process lives (`meshlocal register`).",
    "registration cannot be kept": "etcd is away or refuses: the key ends with its lease, and is there again once etcd"
    " answers. The command goes on.",
    "lease lost; registering again": "etcd was away for longer than the lease lasts, or somebody revoked it.",
    "lease not revoked: it ends by itself": "etcd is away: the key stays for as long as the lease lasts.",
    "the instance fails its health check": "It is not ready until it works again (`meshlocal register`).",
    "the command did not end in time, and is killed": "It got SIGTERM, and --stop-timeout is over.",
    "somebody keeps the instances file open for writing": "It is read once that is over; write a new file and rename"
    " it instead.",
    "service hidden from a caller": "As discovery.allow has it: the caller asked for what it may not see.",
    "xds response rejected": "An xDS client cannot use what it was sent, and says why: its version may be too old."
    " Please report it.",
    "xds type not served": "An xDS client asked for what discovery does not have, such as runtime or secrets. It goes"
    " on without.",
    "xds stream refused": "An xDS client asks for more names than discovery.limits has for one watch.",
    "xds resource name refused": "An xDS client's target is neither xds:///SERVICE nor xds:///SERVICE:PORT_NAME.",
    "discovery call refused": "A caller proved nothing, or is not allowed: see its token or certificate.",
    "connection refused: too many are open": "discovery.limits.connections, or what one client may have.",
    "admin server cannot accept": "Descriptors are short; likewise.",
    "admin connection failed": OURS.format("page"),
    "admin route failed": OURS.format("page"),
    "grpc accept failed": "Descriptors are short: raise the limit of open files.",
    "grpc client resets too many calls, and is cut off": "A client attacks, or is broken (CVE-2023-44487).",
    "grpc connection failed": OURS.format("connection"),
    "grpc handler failed": OURS.format("call"),
    "grpc handshake failed": OURS.format("connection"),
    "grpc trailing metadata cannot be sent": OURS.format("answer"),
    "grpc trailing metadata exceeds the client's limit": "The client allows too little: it learns the status alone.",
    "websocket accept failed": "Descriptors are short: raise the limit of open files.",
    "websocket connection failed": OURS.format("connection"),
    "websocket handler failed": OURS.format("call"),
}
