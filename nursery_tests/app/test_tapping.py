"""app/tapping: what is told of requests as they end, to whom, how much of it, and for how long (R1)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from meshlocal.admin.messages import Request
from meshlocal.app.request_view import request_view
from meshlocal.app.tapping import HELD, MOST, PATIENCE, PER_SECOND, Taps
from meshlocal.cli.tap import request_line
from meshlocal.client.ended import Asked, EndedRequest, FailedAttempt
from meshlocal.client.services import ServiceState
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.policy.picker import Pick

B = ServiceKey("b")
NEAR = make_instance("10.0.0.1", 9000, labels={"node": "n1"})
FAR = make_instance("10.0.0.2", 9000, labels={"node": "n2"})


class Proxy:
    def __init__(self) -> None:
        self.now = 100.0
        self.state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
        self.taps = Taps(lambda name: self.state if name == "b" else None, lambda: self.now, lambda: 1e9 + self.now)

    def poll(self, query: str = "service=b&reader=1") -> list[dict[str, Any]]:
        response = self.taps.page(Request("GET", "/tap/poll", query, {}))
        assert response.status == 200, response.body
        return [json.loads(line) for line in response.body.splitlines()]

    def refusal(self, query: str) -> tuple[int, str]:
        response = self.taps.page(Request("GET", "/tap/poll", query, {}))
        return response.status, response.body.decode().strip()

    def serve(self, path: str = "/", *, left: bool = False, failed: bool = False, retried: bool = False) -> None:
        attempt = FailedAttempt(Pick(NEAR, 0, None, False), 1, "node", "refused", 111, self.now - 0.5, 0.25)
        request = EndedRequest(
            B,
            ("127.0.0.1", 5),
            Asked("1.1", "GET", path, 502 if failed else 200),
            self.now - 0.5,
            0.5,
            "failed" if failed else "served",
            failed,
            "other" if left else "node",
            "local_failed" if left else "",
            "",
            FAR if left else NEAR,
            1 + retried,
            (attempt,) * retried,
        )
        told = self.state.told
        told.add(request, told.wanting(request.ended, request.reason, request.stumbled))


@pytest.fixture
def proxy() -> Proxy:
    made = Proxy()
    made.poll()
    return made


def test_a_request_is_told_once_to_each_reader(proxy: Proxy) -> None:
    proxy.poll("service=b&reader=2")
    proxy.serve("/a")
    assert [row["path"] for row in proxy.poll()] == ["/a"]
    assert proxy.poll() == []
    assert [row["path"] for row in proxy.poll("service=b&reader=2")] == ["/a"]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("", ["plain", "left", "failed", "retried"]),
        ("&left=1", ["left"]),
        ("&failed=1", ["failed", "retried"]),
        ("&left=1&failed=1", ["left", "failed", "retried"]),
        ("&left=0&failed=yes", ["plain", "left", "failed", "retried"]),
    ],
)
def test_which_are_told(wanted: str, told: list[str]) -> None:
    proxy = Proxy()
    query = f"service=b&reader=1{wanted}"
    proxy.poll(query)
    proxy.serve("plain")
    proxy.serve("left", left=True)
    proxy.serve("failed", failed=True)
    proxy.serve("retried", retried=True)
    assert [row["path"] for row in proxy.poll(query)] == told


def test_of_a_busy_service_some_are_told_and_the_others_counted(proxy: Proxy) -> None:
    for _ in range(PER_SECOND + 30):
        proxy.serve()
    proxy.now += 1
    for _ in range(10):
        proxy.serve()
    *told, skipped = proxy.poll()
    assert len(told) == PER_SECOND + 10
    assert skipped == {"service": "b", "skipped": 30}
    assert proxy.poll() == []


def test_what_is_held_is_bounded(proxy: Proxy) -> None:
    """A reader that asks seldom has no more kept for it than one page holds."""
    for _ in range(HELD // PER_SECOND + 3):
        proxy.now += 1
        for _ in range(PER_SECOND):
            proxy.serve()
            [tap] = proxy.state.told.followers
            tap.until = proxy.now + PATIENCE  # type: ignore[attr-defined]  # as if it were asked for nothing
    *told, skipped = proxy.poll()
    assert len(told) == HELD
    assert skipped["skipped"] == 3 * PER_SECOND


def test_nobody_asks_and_it_costs_nothing_any_more(proxy: Proxy) -> None:
    """The next request finds that the reader is gone; and so does the next reader."""
    proxy.now += PATIENCE + 1
    proxy.serve()
    assert not proxy.state.told.followers
    assert proxy.poll() == []
    assert len(proxy.state.told.followers) == 1
    proxy.now += PATIENCE + 1
    proxy.poll("service=b&reader=2")
    assert len(proxy.state.told.followers) == 1


def test_so_many_and_no_more(proxy: Proxy) -> None:
    for number in range(2, MOST + 1):
        proxy.poll(f"service=b&reader={number}")
    assert proxy.refusal("service=b&reader=x") == (503, "16 taps are open already")
    proxy.now += PATIENCE + 1
    assert proxy.poll("service=b&reader=x") == []


def test_a_service_that_is_none_is_named(proxy: Proxy) -> None:
    assert proxy.refusal("service=c&reader=1") == (404, "no such service: 'c'")
    assert proxy.refusal("") == (404, "no such service: ''")


def test_a_service_that_was_forgotten_and_is_back_is_followed_again(proxy: Proxy) -> None:
    """S2."""
    before = proxy.state
    proxy.state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
    proxy.poll()
    assert not before.told.followers
    proxy.serve("/again")
    assert [row["path"] for row in proxy.poll()] == ["/again"]


def test_what_is_told_of_a_request(proxy: Proxy) -> None:
    proxy.serve("/a", left=True, retried=True)
    [row] = proxy.poll()
    assert row == {
        "time": "2001-09-09T01:48:20.000Z",
        "service": "b",
        "client": "127.0.0.1:5",
        "protocol": "HTTP/1.1",
        "method": "GET",
        "path": "/a",
        "status": 200,
        "outcome": "served",
        "instance": "10.0.0.2:9000",
        "node": "n2",
        "tier": "other",
        "reason": "local_failed",
        "attempts": 2,
        "failed": [{"instance": "10.0.0.1:9000", "node": "n1", "tier": "node", "error": "refused", "seconds": 0.25}],
        "seconds": 0.5,
    }
    assert request_line(row) == (
        "01:48:20.000  GET  /a  200  served  500.0ms  10.0.0.2:9000 (n2, other)  local_failed"
        "  after 10.0.0.1:9000 (node) refused 250.0ms"
    )


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (
            EndedRequest(B, None, Asked("tcp"), 9.0, 2.0, "no_instance", True, "", "", "", None, 0, ()),
            "01:46:40.000  tcp  no_instance  2.0s",
        ),
        (
            EndedRequest(B, None, Asked("tcp"), 9.0, 2.0, "cut", True, "node", "", "reset", NEAR, 1, ()),
            "01:46:40.000  tcp  cut  2.0s  10.0.0.1:9000 (n1, node)  error=reset",
        ),
    ],
)
def test_lines_for_people(request_: EndedRequest, line: str) -> None:
    assert request_line(request_view(request_, 11.0, 1e9)) == line


def test_a_line_says_what_was_left_out() -> None:
    assert request_line({"service": "b", "skipped": 3}) == "… 3 more: too many to show"
