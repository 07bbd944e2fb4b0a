"""Instances, snapshots and their differences."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model, version
from meshlocal.policy.model import (
    BaseMismatchError,
    Conditions,
    Instance,
    ModelError,
    ServiceKey,
    ServiceSnapshot,
    apply,
    diff,
    make_instance,
    parse_service_key,
)

B = ServiceKey("b")
instances = st.builds(
    make_instance,
    st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]),
    st.integers(1, 3),
    st.sampled_from(["", "grpc"]),
    st.dictionaries(st.sampled_from(["node", "zone"]), st.sampled_from(["", "a", "b"])),
    st.builds(Conditions, st.booleans(), st.booleans(), st.booleans()),
)
tables = st.lists(instances, max_size=8).map(model.index)


def at_version(name: str, table: dict[model.EndpointKey, Instance]) -> ServiceSnapshot:
    return ServiceSnapshot(B, name, table)


@given(tables, tables)
def test_apply_undoes_diff(old: dict[model.EndpointKey, Instance], new: dict[model.EndpointKey, Instance]) -> None:
    """The difference of two snapshots, applied to the one, is the other; it names nothing that stayed as it was."""
    before, after = at_version("1", old), at_version("2", new)
    change = diff(before, after)
    assert apply(before, change) == after
    assert all(old.get(each.key) != each for each in change.upserted)
    assert set(change.removed) == old.keys() - new.keys()
    assert bool(change) == (old != new)
    assert apply(at_version("", {}), diff(None, after)).instances == new


@given(tables, tables)
def test_versions_follow_from_content(
    old: dict[model.EndpointKey, Instance], new: dict[model.EndpointKey, Instance]
) -> None:
    """D1: equal instances have equal versions, others others; a version is reached by a change or from scratch."""
    before, after = version.total(old.values()), version.total(new.values())
    assert (before == after) == (old == new)
    change = diff(at_version("1", old), at_version("2", new))
    gone = [old[key] for key in change.removed] + [old[each.key] for each in change.upserted if each.key in old]
    assert version.changed(before, gone, change.upserted) == after


def test_apply_refuses_another_base() -> None:
    """D1: a change is applied to the snapshot that it was made from, or not at all."""
    one, two = at_version("1", {}), at_version("2", {})
    with pytest.raises(BaseMismatchError, match="from version '1' does not fit b at version '2'"):
        apply(two, diff(one, two))


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("", 1, "address: is empty"),
        ("  ", 1, "address: is empty"),
        ("db.local", 1, "address: 'db.local' is neither an IPv4 nor an IPv6 address"),
        ("0.0.0.0", 1, "address: '0.0.0.0' is no address of an instance"),
        ("::", 1, "address: '::' is no address of an instance"),
        ("224.0.0.1", 1, "address: '224.0.0.1' is no address of an instance"),
        ("10.0.0.1", 0, "port: 0 is not within 1 to 65535"),
        ("10.0.0.1", 70000, "port: 70000 is not within 1 to 65535"),
        ("10.0.0.1", -1, "port: -1 is not within 1 to 65535"),
    ],
)
def test_bad_instances_are_refused(address: str, port: int, message: str) -> None:
    """An instance with port 0 or 70000 or an empty address is refused, with the field's name."""
    with pytest.raises(ModelError) as refused:
        make_instance(address, port)
    assert str(refused.value) == message


def test_label_limits() -> None:
    """Labels are bounded: nobody's registry may fill a proxy's memory."""
    with pytest.raises(ModelError, match="labels: 65 of them; at most 64"):
        make_instance("10.0.0.1", 1, labels={str(i): "" for i in range(65)})
    with pytest.raises(ModelError, match=r"labels\.node: .*longer than 1024"):
        make_instance("10.0.0.1", 1, labels={"node": "x" * 1024})


@given(
    st.one_of(
        st.ip_addresses(v=4).map(str),
        st.lists(
            st.sampled_from(["0", "00", "1", "01", "9", "127", "199", "223", "224", "249", "255", "256", "300", ""])
        )
        .filter(lambda octets: 3 <= len(octets) <= 5)
        .map(".".join),
        st.text("0123456789. \n", max_size=16),
    )
)
def test_common_addresses_take_a_short_cut_that_changes_nothing(text: str) -> None:
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        parsed = None
    if parsed is None or parsed.is_unspecified or parsed.is_multicast:
        with pytest.raises(ModelError, match="address: "):
            make_instance(text, 1)
    else:
        assert make_instance(text, 1).key.address == str(parsed)


def test_addresses_have_one_spelling() -> None:
    """One instance has one key, however its address was written."""
    assert make_instance("FD00:0::0001", 1).key == make_instance("fd00::1", 1).key


@pytest.mark.parametrize("name", ["b", "b.default", "my-svc.ns-1", "a_b", "B", "0", "x" * 253])
def test_service_keys(name: str) -> None:
    assert parse_service_key(name) == name


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a-", ".a", "a.", "a/b", "é", "a\n", "x" * 254])
def test_bad_service_keys(name: str) -> None:
    with pytest.raises(ModelError, match=r"^service: "):
        parse_service_key(name)
