import collections.abc as abc
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Protocol, TypedDict, TypeVar, Union, runtime_checkable

import pytest

from ndeflow.config.errors import ConfigError, near, nearest, written
from ndeflow.config.hints import Pending, fit, spell

T = TypeVar("T")


class Base:
    pass


class Child(Base):
    def __call__(self):
        return None


class Sized(Protocol):
    size: int


@runtime_checkable
class Runs(Protocol):
    def run(self) -> None: ...


class Row(TypedDict):
    x: int


child = Child()

FITS = [
    (1, int, 1),
    (1, float, 1),
    (1.5, float, 1.5),
    (True, bool, True),
    ("a", str, "a"),
    (None, None, None),
    (None, Optional[int], None),  # noqa: UP045
    (3, Union[int, str], 3),  # noqa: UP007
    ("x", int | str | None, "x"),
    (True, int | bool, True),
    ("a", Literal["a", "b"], "a"),
    (2, Literal[1, 2], 2),
    (1, Annotated[int, "unit"], 1),
    ([1, 2], list[int], [1, 2]),
    ([1, 2], list, [1, 2]),
    ([1, 2], tuple[int, int], (1, 2)),
    ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
    ([1, "a"], tuple[int, str], (1, "a")),
    ([1, "a"], tuple, (1, "a")),
    ([[1, 2], [3]], list[tuple[int, ...]], [(1, 2), (3,)]),
    ([[1, 2], [3]], tuple[list[int], ...], ([1, 2], [3])),
    ({"a": [1, 2]}, dict[str, tuple[int, int]], {"a": (1, 2)}),
    ({"a": 1}, abc.Mapping[str, float], {"a": 1}),
    ({1: 2}, dict, {1: 2}),
    ([1], abc.Sequence[float], [1]),
    ([1, 2], int | tuple[int, int], (1, 2)),
    ([1, 2], list[int] | tuple[int, int], [1, 2]),
    (child, Base, child),
    ([child], abc.Iterable[Base], [child]),
    (len, abc.Callable[..., int], len),
    (child, abc.Callable, child),
    # what names no class, or a class that cannot be asked, fits all
    (1, Any, 1),
    ("x", T, "x"),
    ("x", "unresolved", "x"),
    ("x", object, "x"),
    (1, Sized, 1),
    ({"x": "y"}, Row, {"x": "y"}),
]


@pytest.mark.parametrize(("value", "hint", "result"), FITS)
def test_what_fits(value, hint, result):
    fitted = fit(value, hint, "key")
    assert fitted == result
    assert type(fitted) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1.5, int, "k=1.5: expected int, got float"),
        (1e3, int, "k=1000.0: expected int, got float"),
        (True, int, "k=true: expected int, got bool"),
        (False, float, "k=false: expected float, got bool"),
        (1, bool, "k=1: expected bool, got int"),
        ("1e-3x", float, "k=1e-3x: expected float, got str"),
        (None, float, "k=null: expected float, got null"),
        (83, str | None, "k=83: expected str | None, got int; quote it to keep text"),
        (True, str, "k=true: expected str, got bool; quote it to keep text"),
        ("share", Literal["shared", "per_sample"], "k=share: expected 'shared' | 'per_sample', got str; "
         "did you mean shared?"),
        ("x", Literal["a"] | None, "k=x: expected 'a' | None, got str; allowed: a"),
        (True, Literal[1, 2], "k=true: expected 1 | 2, got bool"),
        (1.0, Literal[1, 2], "k=1.0: expected 1 | 2, got float"),
        (3, list[int], "k=3: expected list[int], got int"),
        ([1, "a"], list[int], "k[1]=a: expected int, got str"),
        ([1, "a"], tuple[float, float], "k[1]=a: expected float, got str"),
        ([1], tuple[float, float], "k=[1]: expected tuple[float, float], got list"),
        (["a"], list[int] | None, "k[0]=a: expected int, got str"),
        (["a"], list[int] | tuple[float, ...], "k=[a]: expected list[int] | tuple[float, ...], got list"),
        ({"a": {"b": 1}}, dict[str, dict[str, str]], "k.a.b=1: expected str, got int; quote it to keep text"),
        ({1: 1}, dict[str, int], "k=1: expected str, got int; quote it to keep text"),
        ("abc", abc.Sequence[str], "k=abc: expected Sequence[str], got str"),
        ({"x": 1}, Base, "k={x: 1}: expected Base, got dict; add its _target_"),
        ({"x": 1}, Base | None, "k={x: 1}: expected Base | None, got dict; add its _target_"),
        ({"x": 1}, int, "k={x: 1}: expected int, got dict"),
        ("tanh", abc.Callable[[int], int], "k=tanh: expected Callable, got str"),
        (child, int, "k: expected int, got Child"),
        (Base(), Runs, "k: expected Runs, got Base"),
        ("x" * 70, int, f"k={'x' * 57}...: expected int, got str"),
    ],
)  # fmt: skip
def test_what_does_not_fit(value, hint, message):
    with pytest.raises(ConfigError) as caught:
        fit(value, hint, "k")
    assert str(caught.value) == message


def test_the_error_knows_the_innermost_key():
    with pytest.raises(ConfigError) as caught:
        fit({"a": [1, "x"]}, dict[str, list[int]], "module.sizes")
    assert caught.value.key == "module.sizes.a[1]"


@pytest.mark.parametrize(
    ("pending", "hint", "fits"),
    [
        (Pending("m.Child", Child, True, False), Base, True),
        (Pending("m.Base", Base, True, False), Child, False),
        (Pending("m.Base", Base, True, False), str | Base | None, True),
        (Pending("m.Base", Base, True, False), float, False),
        (Pending("m.Base", Base, True, False), dict, False),
        # instances of Base cannot be called, although the class can
        (Pending("m.Child", Child, True, False), abc.Callable[[], None], True),
        (Pending("m.Base", Base, True, False), abc.Callable[[], None], False),
        # a function may return more than it promises
        (Pending("m.f", Base, False, False), Child, True),
        (Pending("m.f", Base, False, False), Path, False),
        (Pending("m.f", None, False, False), Path, True),
        # a partial is called by its owner, whatever it makes
        (Pending("m.Base", Base, True, True), abc.Callable[..., Base], True),
        (Pending("m.Base", Base, True, True), functools.partial, True),
        (Pending("m.Base", Base, True, True), Base, False),
    ],
)
def test_nodes_fit_by_what_they_become(pending, hint, fits):
    if fits:
        assert fit([pending], list[hint], "k") == [pending]
    else:
        with pytest.raises(ConfigError) as caught:
            fit([pending], list[hint], "k")
        assert str(caught.value) == f"k[0]: expected {spell(hint)}, got {pending}"


def test_a_partial_is_named_as_one():
    assert str(Pending("m.Base", Base, True, True)) == "m.Base with _partial_"


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"),
        (None, "None"),
        (Optional[Path], "Path | None"),  # noqa: UP045
        (dict[str, list[Base]], "dict[str, list[Base]]"),
        (tuple[float, ...], "tuple[float, ...]"),
        (abc.Callable[[int], str] | None, "Callable | None"),
        (Literal["a", 1, None], "'a' | 1 | None"),
        (Annotated[int, "unit"], "int"),
        (abc.Mapping[str, Any], "Mapping[str, Any]"),
    ],
)
def test_hints_as_text(hint, text):
    assert spell(hint) == text


def test_near_names():
    names = ["ReLU", "SiLU", "Softplus"]
    assert near("relu", names)[0] == "ReLU"
    assert nearest("softpluss", names) == "did you mean Softplus?"
    assert nearest("zzz", names) == "allowed: ReLU, SiLU, Softplus"
    assert nearest("zzz", []) == "allowed: none"


def test_values_as_a_config_writes_them():
    assert [written(value) for value in (True, None, 1, 1.5, "a", ["a"])] == ["true", "null", "1", "1.5", "a", "[a]"]
    assert len(written(list(range(100)))) == 60
