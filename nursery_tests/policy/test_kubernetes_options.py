"""The options of a `kubernetes:` source URL."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.source_options import SourceOptionsError


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", KubernetesOptions()),
        ("?", KubernetesOptions()),
        ("?namespace=shop", KubernetesOptions(namespaces=("shop",))),
        ("?namespace=a&namespace=b-2", KubernetesOptions(namespaces=("a", "b-2"))),
        ("?selector=app%3Db%2Ctier+in+(x)", KubernetesOptions(selector="app=b,tier in (x)")),
        ("?kubeconfig=/etc/k/config&context=east", KubernetesOptions(kubeconfig="/etc/k/config", context="east")),
        ("?cluster=c1&nodes=no", KubernetesOptions(cluster="c1", nodes=False)),
        ("?nodes=yes", KubernetesOptions()),
    ],
)
def test_reads(text: str, options: KubernetesOptions) -> None:
    assert KubernetesOptions.parse(text) == options
    assert KubernetesOptions.parse(str(options)) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shop", "expected kubernetes: or kubernetes:?OPTION=VALUE, got 'shop' after it"),
        ("//host", "expected kubernetes: or kubernetes:?OPTION=VALUE, got '//host' after it"),
        ("?shop", "expected OPTION=VALUE, got 'shop'"),
        ("?nodes=no&", "expected OPTION=VALUE, got ''"),
        ("?namespaces=a", "'namespaces': unknown key; did you mean 'namespace'?"),
        ("?namespace=", "namespace: '' is no percent-encoded text"),
        ("?namespace=A", "namespace: 'A' is no namespace (small letters, digits, '-'; at most 63)"),
        ("?namespace=a/../b", "namespace: 'a/../b' is no namespace (small letters, digits, '-'; at most 63)"),
        ("?namespace=a&namespace=a", "namespace: 'a' stands twice"),
        ("?selector=%FF", "selector: '%FF' is no percent-encoded text"),
        ("?selector=%4", "selector: '%4' is no percent-encoded text"),
        ("?selector=a%0Ab", "selector: 'a%0Ab' is no percent-encoded text"),
        ("?context=a&context=b", "context stands twice"),
        ("?nodes=true", "nodes: expected yes or no, got 'true'"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(SourceOptionsError) as caught:
        KubernetesOptions.parse(text)
    assert str(caught.value) == message


def test_namespaces_are_bounded() -> None:
    with pytest.raises(SourceOptionsError, match="101 namespaces; at most 100"):
        KubernetesOptions.parse("?" + "&".join(f"namespace=n{number}" for number in range(101)))


_texts = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() and text.strip())


@given(st.builds(KubernetesOptions, selector=_texts, kubeconfig=_texts, context=_texts, cluster=_texts))
def test_what_it_prints_it_reads_again(options: KubernetesOptions) -> None:
    assert KubernetesOptions.parse(str(options)) == options
