"""The admin pages' HTML: headings, notes and tables, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The standard library's html.escape comes with every named entity of HTML: half a megabyte in every sidecar.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})

REFRESH = 5
"""Seconds after which a page that shows what changes is loaded again."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #b43c0b; --good: #15753a; }
@media (prefers-color-scheme: dark) { :root { --bad: #fb923c; --good: #4ade80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; } .bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin-top: .7rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; }
th { border-bottom: 1px solid var(--line); font-weight: 600; } td { border-bottom: 1px solid var(--soft); }
code, td { font-variant-numeric: tabular-nums; } code { font-family: ui-monospace, monospace; font-size: .92em; }
nav { margin-bottom: 1rem; } nav a { margin-right: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; } dt { opacity: .7; }
dd { margin: 0; } meter { width: 9rem; height: .9rem; vertical-align: -.1rem; }
"""


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
    """What wants attention."""
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


def share(part: int, whole: int) -> Html:
    """A part of a whole as a bar, with its percentage."""
    percent = 100 * part // whole if whole else 0
    return Html(f'<meter value="{part}" max="{whole}"></meter> {percent} %')


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table; one word if it has no rows."""
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return paragraph("none")
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    return Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def page(title: str, links: Iterable[str], parts: Iterable[Html], *, refresh: int | None = None) -> bytes:
    """A whole page; one that shows what changes is loaded again every `refresh` seconds."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh is not None else ""
    nav = "".join(link(target, target) for target in links)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width">{again}<style>{_STYLE}</style></head>'
        f"<body><h1>{text(title)}</h1><nav>{nav}</nav>{''.join(parts)}</body></html>\n"
    ).encode()
