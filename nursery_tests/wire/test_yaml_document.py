"""YAML as configuration and instances files use it: what it resolves to, what is refused, where things stand."""

import json
import math
import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from meshlocal.wire import yaml_document
from meshlocal.wire.yaml_document import MAX_DEPTH, MAX_TEXT, YamlError, parse_yaml

LOADERS = [pytest.param(yaml.SafeLoader, id="python")]
if hasattr(yaml, "CSafeLoader"):
    LOADERS.append(pytest.param(yaml.CSafeLoader, id="libyaml"))


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test that asks for it runs with each of PyYAML's parsers."""
    monkeypatch.setattr(yaml_document, "LOADER", request.param)


def refused(text: str) -> str:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text, "f.yaml")
    error = caught.value
    assert str(error) == f"f.yaml:{error.line}:{error.column}: {error.message}"
    return str(error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("nULL", "nULL"),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("12", 12),
        ("-12", -12),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1.20", 1.2),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("-1.5E-1", -0.15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("10.0.1.10", "10.0.1.10"),
        (".", "."),
        ("'12'", "12"),
        ('"true"', "true"),
        ("''", ""),
        ("!!str 12", "12"),
        ("! 12", "12"),
        ("|\n  12\n", "12\n"),
        ("a: <<", {"a": "<<"}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("a:\nb: []\nc: {}", {"a": None, "b": [], "c": {}}),
        ("{a, b: [1, [2, {c: d}], ]}", {"a": None, "b": [1, [2, {"c": "d"}]]}),
        ("? a\n: - 1\n  - 2", {"a": [1, 2]}),
        ("'': 1", {"": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ("%YAML 1.2\n---\na\n...\n", "a"),
        ("!!map {a: !!seq [1]}", {"a": [1]}),
    ],
)
def test_resolves_as_the_core_schema(loader: None, text: str, value: object) -> None:
    data = parse_yaml(text, "f.yaml").data
    assert data == value
    assert type(data) is type(value)


def test_not_a_number(loader: None) -> None:
    data = parse_yaml(".nan", "f.yaml").data
    assert isinstance(data, float)
    assert math.isnan(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: the key 'a' is already on line 1"),
        ("x: {a: 1,\n 'a': 2}", "f.yaml:2:2: the key 'a' is already on line 1"),
        ("1: x", "f.yaml:1:1: the key 1 is not text; put it between quotes"),
        ("a: 1\ntrue: x", "f.yaml:2:1: the key true is not text; put it between quotes"),
        ("null: x", "f.yaml:1:1: the key null is not text; put it between quotes"),
        ("~: x", "f.yaml:1:1: the key ~ is not text; put it between quotes"),
        ("? [a]\n: x", "f.yaml:1:3: a key is text, not a list"),
        ("? {a: b}\n: x", "f.yaml:1:3: a key is text, not a mapping"),
        ("a\n---\nb", "f.yaml:2:1: a second document; one is expected"),
        ("a: &x [1]\nb: *x", "f.yaml:2:4: aliases (*x) are not supported; write the value out"),
        ("a: !include x", "f.yaml:1:4: the tag '!include' is not supported"),
        (
            "!!python/object/apply:os.system [x]",
            "f.yaml:1:1: the tag '!!python/object/apply:os.system' is not supported",
        ),
        ("a: !!int 3", "f.yaml:1:4: the tag '!!int' is not supported"),
        ("!x {a: 1}", "f.yaml:1:1: the tag '!x' is not supported"),
        ("!!seq {a: 1}", "f.yaml:1:1: the tag '!!seq' is not supported"),
        ("[" * 500, f"f.yaml:1:{MAX_DEPTH + 1}: nested more than {MAX_DEPTH} deep"),
        ("{a: " * 1000, f"f.yaml:1:{4 * MAX_DEPTH + 1}: nested more than {MAX_DEPTH} deep"),
        ("a: " + "9" * 5000, "f.yaml:1:4: a number of more than 400 characters"),
        ("a: b\nc: \x07", "f.yaml:2:4: a character that YAML does not allow"),
        ("a: \x00", "f.yaml:1:4: a character that YAML does not allow"),
        ("a: b\nc: \ud800", "f.yaml:2:4: a lone surrogate is no character"),
        (" " * (MAX_TEXT + 1), f"f.yaml:1:1: longer than {MAX_TEXT} characters"),
    ],
)
def test_refuses(loader: None, text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: b: c", "f.yaml:1:5: "),
        ("a:\n  - b\n c: d", "f.yaml:3:2: "),
        ("a: 1\n\tb: 2", "f.yaml:2:1: "),
        ('a: "\\xzz"', "f.yaml:1:7: "),
        ("%YAML 3.0\n---\na", "f.yaml:1:1: "),
    ],
)
def test_syntax_errors_have_a_place(loader: None, text: str, where: str) -> None:
    assert refused(text).startswith(where)


def test_nesting_of_any_depth_is_refused(loader: None) -> None:
    """Libyaml reads ahead: from PyYAML 6.0.4 on it may meet its own bound before ours, and words it differently."""
    assert re.search(rf"nested more than {MAX_DEPTH} deep|exceeded maximum nesting depth", refused("[" * 100_000))


def test_nesting_up_to_the_bound_is_fine(loader: None) -> None:
    data = parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f.yaml").data
    for _ in range(MAX_DEPTH - 1):
        assert isinstance(data, list)
        (data,) = data
    assert data == []


def test_an_alias_bomb_is_refused_before_it_grows(loader: None) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 200))
    assert refused(bomb) == "f.yaml:2:10: aliases (*a0) are not supported; write the value out"


LINES = """\
# comment

zone: z1
services:
  b:
    - {address: 10.0.0.1, port: 1}
    - address: 10.0.0.2
      port: 2
      labels:
        node: n1
  c:
    [1,
     2]
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 3),
        (("zone",), 3),
        (("services", "b"), 5),
        (("services", "b", 0), 6),
        (("services", "b", 0, "port"), 6),
        (("services", "b", 1), 7),
        (("services", "b", 1, "port"), 8),
        (("services", "b", 1, "labels", "node"), 10),
        (("services", "c", 1), 13),
        (("services", "b", 1, "labels", "zone", 3), 9),
        (("services", "b", 7, "port"), 5),
        (("services", 0), 4),
        (("zone", "x"), 3),
        (("nothing", "there"), 3),
    ],
)
def test_lines(loader: None, path: tuple[str | int, ...], line: int) -> None:
    assert parse_yaml(LINES, "f.yaml").line_of(path) == line


def test_a_parsed_document_keeps_its_name() -> None:
    assert parse_yaml("a", "some.yaml").name == "some.yaml"


# JSON writes what is beyond the basic plane as two escaped surrogates, and DEL as it is, neither of which YAML has.
text = st.text(alphabet=st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"], exclude_characters="\x7f"))
# A key has at most 1024 characters, escapes counted as they are written.
keys = text.filter(lambda key: len(json.dumps(key)) <= 1024)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(plain)
def test_json_is_yaml(data: object) -> None:
    """What JSON says, YAML says too."""
    assert parse_yaml(json.dumps(data), "f.json").data == data


@given(st.text(alphabet=st.sampled_from("ab1:-?,[]{}&*!|>'\"%#@`\\~ \n\t.0xe"), max_size=60) | st.text(max_size=40))
@example("? ")
@example("- ? : -")
@example("!<tag:yaml.org,2002:str> 1: 2")
@example("\x85")
def test_nothing_but_yaml_errors(text: str) -> None:
    for loader in (yaml.SafeLoader, yaml_document.LOADER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yaml_document, "LOADER", loader)
            try:
                line = parse_yaml(text, "f.yaml").line_of(())
            except YamlError as error:
                line = min(error.line, error.column)
            assert line >= 1
