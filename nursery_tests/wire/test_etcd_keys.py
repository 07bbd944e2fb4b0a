"""wire/etcd_keys: what stands in etcd, as JSON and as protobuf, and what is refused, by the key's name."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.model import Conditions, ServiceKey, make_instance
from meshlocal.wire.discovery_codec import instance_to_message
from meshlocal.wire.etcd_keys import EtcdKeyError, InstanceKey, instance_key, parse_key, parse_value, prefix_range

B = ServiceKey("b")
KEY = b"p/b/i"
DEFAULTS = {"zone": "z1", "cluster": ""}


def value(**fields: object) -> bytes:
    return json.dumps({"address": "10.0.0.1", "port": 9000, **fields}).encode()


def test_keys() -> None:
    assert parse_key(b"/a/b.shop/web-1", "/a") == InstanceKey(ServiceKey("b.shop"), "web-1")
    assert instance_key("/a", ServiceKey("b.shop"), "web-1") == b"/a/b.shop/web-1"
    assert prefix_range("a") == (b"a/", b"a0")


@pytest.mark.parametrize("key", ["p/b", "p/b/", "p/b/i/more", "p//i", "p/ä/i", "p/b c/i"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(EtcdKeyError, match=r"p/"):
        parse_key(key.encode(), "p")


@pytest.mark.parametrize("text", [value(), b" \n" + value()])
def test_json(text: bytes) -> None:
    found = parse_value(text, KEY, B, DEFAULTS)
    labels = {"service": "b", "registry": "etcd", "zone": "z1"}
    assert found == make_instance("10.0.0.1", 9000, labels=labels)


def test_all_that_json_may_say() -> None:
    text = value(port_name="grpc", labels={"node": "n1", "zone": "z2"}, ready=False, terminating=True)
    found = parse_value(text, KEY, B, DEFAULTS)
    assert found.key.port_name == "grpc"
    assert found.node == "n1"
    assert found.labels["zone"] == "z2"
    assert found.conditions == Conditions(ready=False, terminating=True)


def test_protobuf() -> None:
    sent = make_instance("fd00::1", 9000, "grpc", {"node": "n1"}, Conditions(ready=False))
    found = parse_value(instance_to_message(sent).SerializeToString(), KEY, B, DEFAULTS)
    assert found.key == sent.key
    assert found.conditions == sent.conditions
    assert found.labels == {"node": "n1", "service": "b", "registry": "etcd", "zone": "z1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "p/b/i"),
        (b"\xff\xff", "p/b/i: holds neither JSON nor a protobuf Instance"),
        (b"{", "p/b/i: is no JSON"),
        (b'{"port": 1}', "the key address is missing"),
        (value(port="9000"), "port: expected a whole number, got the text '9000'"),
        (value(port=0), "port"),
        (value(address="b.example"), "address"),
        (value(lables={}), "did you mean 'labels'"),
        (value(labels={"node": 5}), "labels.node: expected text, got the number 5"),
        (value(labels={"service": "c"}), "labels.service: is always 'b' here"),
        (value(ready="yes"), "ready: expected true or false"),
        (b"[" * 100_000, "p/b/i"),
        (b'{"labels":' * 100_000, "p/b/i"),
    ],
)
def test_refused(text: bytes, message: str) -> None:
    with pytest.raises(EtcdKeyError) as caught:
        parse_value(text, KEY, B, DEFAULTS)
    assert message in str(caught.value)


@given(st.binary(max_size=200))
def test_nothing_else_is_raised(text: bytes) -> None:
    for given_text in (text, b"{" + text):
        with contextlib.suppress(EtcdKeyError):
            parse_value(given_text, KEY, B, DEFAULTS)
