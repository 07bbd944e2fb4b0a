"""How problems are worded."""

import pytest

from meshlocal.policy.problems import Problem, describe, did_you_mean, format_path, quote, unknown_key


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("proxy",), "proxy"),
        (("services", "b.default", 1, "port"), "services.b.default[1].port"),
        ((0, "a"), "[0].a"),
        (("a\nb",), "a\\nb"),
    ],
)
def test_paths(path: tuple[str | int, ...], text: str) -> None:
    assert format_path(path) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing (null)"),
        (True, "true"),
        (False, "false"),
        (0, "the number 0"),
        (1.5, "the number 1.5"),
        (float("nan"), "the number nan"),
        pytest.param(10**5000, "a huge number", id="huge"),
        ("x", "the text 'x'"),
        ("", "empty text"),
        ("a\x00\n", r"the text 'a\x00\n'"),
        ({}, "a mapping"),
        ([1], "a list"),
        ((), "a list"),
        ({1}, "a set"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert describe(value) == text


def test_long_text_is_cut() -> None:
    assert quote("x" * 100) == f"'{'x' * 59}…'"


def test_hints() -> None:
    assert did_you_mean("deadlin", ["deadline", "delay"]) == "; did you mean 'deadline'?"
    assert did_you_mean("x", ["deadline"]) == ""
    assert unknown_key("x", ["a", "b"]) == "unknown key; known here: a, b"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.b", "is bad", "f.yaml:1"), "f.yaml:1: a.b: is bad"),
        (Problem("", "is bad", "f.yaml"), "f.yaml: is bad"),
        (Problem("a", "is bad"), "a: is bad"),
    ],
)
def test_problems(problem: Problem, text: str) -> None:
    assert str(problem) == text
