"""app/html: nothing that anybody sends becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from meshlocal.app import html
from meshlocal.app.watch_page import watch_page

HOSTILE = "<script>\"'&"
ESCAPED = "&lt;script&gt;&quot;&#x27;&amp;"


@pytest.mark.parametrize(
    ("made", "markup"),
    [
        (html.text(HOSTILE), ESCAPED),
        (html.good(HOSTILE), f'<span class="good">{ESCAPED}</span>'),
        (html.bad(HOSTILE), f'<span class="bad">{ESCAPED}</span>'),
        (html.code(HOSTILE), f"<code>{ESCAPED}</code>"),
        (html.link(HOSTILE, HOSTILE), f'<a href="{ESCAPED}">{ESCAPED}</a>'),
        (html.heading(HOSTILE), f"<h2>{ESCAPED}</h2>"),
        (html.paragraph("a ", html.code(HOSTILE)), f"<p>a <code>{ESCAPED}</code></p>"),
        (html.facts([(HOSTILE, [HOSTILE, 1])]), f"<dl><dt>{ESCAPED}</dt><dd>{ESCAPED} 1</dd></dl>"),
    ],
)
def test_text_is_escaped_once(made: str, markup: str) -> None:
    assert made == markup
    assert html.text(made) == markup


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "&ndash;"), ("", "&ndash;"), (True, "yes"), (False, "no"), (0, "0"), (1.5, "1.5")]
)
def test_values(value: object, shown: str) -> None:
    assert html.text(value) == shown


def test_a_table_and_its_absence() -> None:
    made = html.table(HOSTILE, ("A", "<B>"), [(1, HOSTILE)])
    assert "<th>A</th><th>&lt;B&gt;</th>" in made
    assert f"<td>1</td><td>{ESCAPED}</td>" in made
    assert f'aria-label="{ESCAPED}"' in made
    assert html.table("A", ("A",), []) == "<p>none</p>"


def test_a_page_is_well_formed() -> None:
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    page = html.page(HOSTILE, ["/a", "/b"], [html.table("A", ("A",), [(1,)]), html.facts([("x", ["y"])])])
    checker.feed(page.body.decode())
    assert checker.open == []
    assert f"<title>{ESCAPED}</title>".encode() in page.body


@pytest.mark.parametrize(
    ("host", "tls", "source"),
    [
        ("localhost", False, "ws://localhost:7071"),
        ("ops.example", True, "wss://ops.example:7071"),
        ("[::1]", False, "ws:"),
        ("[::1]", True, "wss:"),
    ],
)
def test_the_watch_page_may_connect_to_its_own_server_only(host: str, tls: bool, source: str) -> None:
    """As far as a policy can say it: it knows no IPv6 addresses."""
    page = watch_page("t", host, 7071, ["b"], tls=tls, token=False)
    directives = page.policy.split("; ")
    assert f"connect-src {source}" in directives
    assert "default-src 'none'" in directives
    assert [each for each in directives if each.startswith("script-src 'sha256-")]
