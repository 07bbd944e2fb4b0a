"""The discovery server's page that watches a service live, in a browser, over WebSocket with JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable

from meshlocal.admin.messages import Response
from meshlocal.app import html
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import BEARER, JSON

_SCRIPT = html.content("watch.js")

_STYLE = html.content("watch.css")
_BODY = html.template("watch.html")
_STYLE_SOURCE = html.source(f"\n{_STYLE}")
_SCRIPT_SOURCE = html.source(f"\n{_SCRIPT}")
_TOKEN = '<input id="token" type="password" placeholder="token" autocomplete="off">'


def watch_page(title: str, host: str, port: int | None, services: Iterable[str], *, tls: bool, token: bool) -> Response:
    """The page.

    Args:
        title: of the page.
        host: by which it was asked for, and under which it connects, as a URL has it.
        port: of the WebSocket server; None if there is none.
        services: to choose from.
        tls: whether that server is served over TLS.
        token: whether it wants a token.
    """
    if port is None:
        missing = "No WebSocket server is configured: set discovery.websocket_bind, or --websocket-bind."
        return html.page(title, ["/"], [html.paragraph(html.bad(missing))])
    names = list(services)
    settings = {"port": port, "tls": tls, "path": WATCH_INSTANCES.path, "subprotocol": JSON, "bearer": BEARER}
    options = "".join(f'<option value="{html.text(name)}">' for name in names)
    body = _BODY.substitute(
        style=_STYLE,
        first=html.text(names[0]) if names else "",
        options=options,
        token=_TOKEN if token else "",
        # In a script element nothing but its end tag is markup.
        settings=json.dumps(settings).replace("<", "\\u003c"),
        script=_SCRIPT,
    )
    scheme = "wss" if tls else "ws"
    # A source's host is a name or an IPv4 address (CSP 3, 2.3.1): an IPv6 address can only be allowed with all others.
    server = f"{scheme}:" if host.startswith("[") else f"{scheme}://{host}:{port}"
    policy = f"script-src {_SCRIPT_SOURCE}; connect-src {server}"
    return html.page(title, ["/", "/services"], [html.Html(body)], styles=_STYLE_SOURCE, policy=policy)
