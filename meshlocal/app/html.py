"""The admin pages' HTML: headings, notes and tables, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from string import Template

from meshlocal.admin.messages import Response

# The standard library's html.escape comes with every named entity of HTML: half a megabyte in every sidecar.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})

REFRESH = 2
"""Seconds after which a page that shows what changes asks for that again."""

_FILES = Path(__file__).with_name("pages")


def template(name: str) -> Template:
    """A file of the package's folder `pages`, to be filled in. Call it at import: later nothing may read files (P1)."""
    return Template((_FILES / name).read_text())


def content(name: str) -> str:
    """A file of that folder as it is. Call it at import, too."""
    return (_FILES / name).read_text()


_PAGE = template("page.html")
_STYLE = content("page.css")
_AGAIN = "\n" + content("again.js")


def source(text: str) -> str:
    """What allows one inline style or script, and no other, in a Content-Security-Policy (CSP 3, 2.3.1).

    Args:
        text: what stands in its element, to the byte.
    """
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


_STYLE_SOURCE = source(f"\n{_STYLE}")
_AGAIN_POLICY = f"script-src {source(_AGAIN)}; connect-src 'self'"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Any value as escaped text; a dash for what is missing."""
    if isinstance(value, Html):
        return value
    if value is None or value == "":
        return Html("&ndash;")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    return Html(str(value).translate(_ESCAPES))


def good(value: object) -> Html:
    """What is as it should be."""
    return Html(f'<span class="good">{text(value)}</span>')


def bad(value: object) -> Html:
    """Text that wants attention."""
    return Html(f'<span class="bad">{text(value)}</span>')


def code(value: object) -> Html:
    """A name or an address."""
    return Html(f"<code>{text(value)}</code>")


def link(target: str, label: object) -> Html:
    """A link on this server."""
    return Html(f'<a href="{target.translate(_ESCAPES)}">{text(label)}</a>')


def heading(value: object) -> Html:
    """A section's heading."""
    return Html(f"<h2>{text(value)}</h2>")


def paragraph(*parts: object) -> Html:
    """A line of text and markup."""
    return Html(f"<p>{''.join(text(part) for part in parts)}</p>")


def facts(pairs: Iterable[tuple[str, Sequence[object]]]) -> Html:
    """Names, and beside each what is to be said of it."""
    rows = (f"<dt>{text(name)}</dt><dd>{' '.join(text(part) for part in parts)}</dd>" for name, parts in pairs)
    return Html(f"<dl>{''.join(rows)}</dl>")


def table(label: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table; one word if it has no rows. One that is wider than the window scrolls by itself, also by keyboard.

    Args:
        label: what it is, for who does not see it.
        header: names of its columns.
        rows: their cells.
    """
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return paragraph("none")
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    made = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return Html(f'<div class="wide" role="region" aria-label="{text(label)}" tabindex="0">{made}</div>')


def page(
    title: str,
    links: Iterable[str],
    parts: Iterable[Html],
    *,
    refresh: int | None = None,
    styles: str = "",
    policy: str = "",
) -> Response:
    """A whole page.

    Args:
        title: its heading too.
        links: to other pages of this server.
        parts: what it says.
        refresh: seconds after which one that shows what changes asks for that again, without a reload.
        styles: `source` of styles that the parts hold.
        policy: what the page may do beside being shown, as directives of a Content-Security-Policy.
    """
    again = state = ""
    if refresh is not None:
        again = f'<script data-seconds="{refresh}">{_AGAIN}</script>'
        state = '<p role="status" id="state">as it was when this page was loaded</p>'
        policy = "; ".join(filter(None, (policy, _AGAIN_POLICY)))
    nav = "".join(link(target, target) for target in links)
    body = _PAGE.substitute(
        title=text(title), state=state, again=again, style=_STYLE, nav=nav, parts="".join(parts)
    ).encode()
    allowed = f"style-src {_STYLE_SOURCE} {styles}".rstrip()
    told = "; ".join(filter(None, (Response().policy, allowed, policy)))
    return Response(200, "text/html; charset=utf-8", body, policy=told)
