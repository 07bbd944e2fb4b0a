"""What a caller of a discovery server may see."""

from __future__ import annotations

import pytest

from meshlocal.policy.config_access import AllowConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.visibility import ALL, Visibility

ENTRIES = (
    AllowConfig(identity="spiffe://example/ns/*/sa/web", services=("*.shop", "flags")),
    AllowConfig(identity="ops", services=("*",)),
    AllowConfig(identity="batch.example", services=("shop/*", "a+b")),
)


@pytest.mark.parametrize(
    ("identities", "seen", "hidden"),
    [
        (["spiffe://example/ns/x/sa/web"], ["cart.shop", "a.b.shop", "flags"], ["shop", "cart.shops", "flags2", "x"]),
        (["ops"], ["anything", "cart.shop"], []),
        (["batch.example"], ["shop/", "shop/cart/x", "a+b"], ["shop", "aab", "cart.shop"]),
        (["spiffe://example/ns/x/sa/web", "batch.example"], ["cart.shop", "shop/x"], ["x"]),
        (["unknown", "ops"], ["x"], []),
    ],
)
def test_a_caller_sees_what_any_of_its_identities_may(
    identities: list[str], seen: list[str], hidden: list[str]
) -> None:
    view = Visibility(ENTRIES).view(identities)
    assert view is not None
    assert view.caller == ", ".join(identities)
    assert [name for name in [*seen, *hidden] if view.sees(ServiceKey(name))] == seen


@pytest.mark.parametrize(
    "identities", [[], ["unknown"], ["spiffe://example/ns/x/y/sa/web"], ["spiffe://other/ns/x/sa/web"]]
)
def test_who_is_nobody_sees_nothing(identities: list[str]) -> None:
    assert Visibility(ENTRIES).view(identities) is None


def test_without_entries_all_is_seen() -> None:
    assert Visibility(()).view([]) is ALL
    assert ALL.sees(ServiceKey("any"))
