"""Steps as text, and what becomes of their options."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from prunebench.errors import OptionError, RequestError, UnknownNameError
from prunebench.options import Step, build, canonical, option_facts, option_values, parse_step, split_steps
from prunebench.spec import option


@dataclass
class Schedule:
    """A group within a group."""

    warmup: float = option(0.1, "share of steps to warm up")


@dataclass
class Retrain:
    """A group of options."""

    steps: int = option(10, "how many")
    learning_rate: float = option(1e-4, "how fast")
    schedule: Schedule = field(default_factory=Schedule)


@dataclass
class Method:
    """One option of every kind."""

    name: ClassVar[str] = "method"

    alpha: float = option(0.5, "a share")
    rounds: int = option(3, "how often")
    fast: bool = option(False, "whether to hurry")
    compare: Literal["row", "matrix"] = option("row", "what is compared")
    text: str = option("c4", "where from")
    limit: int | None = option(7, "at most, or none")
    subset: tuple[Literal["norms", "biases", "head"], ...] = option(("norms",), "what is trained")
    seeds: list[int] = field(default_factory=list, metadata={"doc": "which"})
    shares: tuple[float, ...] = option((), "how much")
    retrain: Retrain = field(default_factory=Retrain)

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError("alpha is a share of at least 0.")


def parse_steps(text: str) -> list[Step]:
    return [parse_step(part) for part in split_steps(text)]


def method(text: str) -> Method:
    return build(Method, parse_step(text))


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("wanda", "wanda", {}),
        ("wanda++", "wanda++", {}),
        ("wanda[]", "wanda", {}),
        (" wanda [ a = 1 , b = x=y , ] ", "wanda", {"a": "1", "b": "x=y"}),
        ("perp[retrain.steps=4,subset=norms+biases]", "perp", {"retrain.steps": "4", "subset": "norms+biases"}),
        ("perplexity[data=/tmp/a b+c.txt]", "perplexity", {"data": "/tmp/a b+c.txt"}),
        ("m[a=]", "m", {"a": ""}),
    ],
)
def test_reads_a_step(text: str, name: str, options: dict[str, str]) -> None:
    assert parse_step(text) == Step(name, options)


@pytest.mark.parametrize("text", ["", "Wanda", "wanda[a=1", "wanda a=1", "[a=1]", "wanda[a]", "wanda[=1]", "wanda[a=1]x", "-x"])
def test_a_step_that_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(OptionError, match="cannot read") as caught:
        parse_step(text)
    assert text in str(caught.value)


def test_an_option_may_stand_once() -> None:
    with pytest.raises(OptionError, match="'a' stands twice"):
        parse_step("m[a=1,b=2,a=1]")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("wanda", ["wanda"]),
        ("magnitude + perp", ["magnitude", "perp"]),
        ("wanda++ + perp[subset=norms+biases] + dense", ["wanda++", "perp", "dense"]),
        ("a[x=1 + 2] + b[y=3 + 4]", ["a", "b"]),
        ("a  +\n b", ["a", "b"]),
    ],
)
def test_reads_steps_joined_by_plus(text: str, names: list[str]) -> None:
    assert [step.name for step in parse_steps(text)] == names


def test_a_plus_inside_brackets_belongs_to_the_value() -> None:
    assert parse_steps("a[x=1 + 2] + b[y=3]")[0].options == {"x": "1 + 2"}


@pytest.mark.parametrize("text", ["", "   ", "a + + b", "+ a", "a +", "a +b", "a b"])
def test_steps_that_cannot_be_read(text: str) -> None:
    with pytest.raises(OptionError):
        parse_steps(text)


def test_values_become_typed_fields() -> None:
    found = method(
        "method[alpha=2,rounds=4,fast=true,compare=matrix,text=a b,limit=none,subset=norms+head,seeds=1+2+3,"
        "shares=0.5 + 1e-3,retrain.steps=40,retrain.schedule.warmup=0]"
    )
    assert found == Method(
        alpha=2.0,
        rounds=4,
        fast=True,
        compare="matrix",
        text="a b",
        limit=None,
        subset=("norms", "head"),
        seeds=[1, 2, 3],
        shares=(0.5, 1e-3),
        retrain=Retrain(steps=40, schedule=Schedule(warmup=0.0)),
    )
    assert isinstance(found.alpha, float)
    assert isinstance(found.subset, tuple)


def test_what_is_not_given_keeps_its_default() -> None:
    found = method("method[retrain.learning_rate=0.01]")
    assert found == Method(retrain=Retrain(learning_rate=0.01))
    assert method("method") == Method()
    assert method("method").retrain is not method("method").retrain


def test_an_empty_list_is_an_empty_value() -> None:
    assert method("method[subset=]").subset == ()


@pytest.mark.parametrize(
    ("text", "option_name", "kind", "value"),
    [
        ("method[alpha=x]", "alpha", "float", "'x'"),
        ("method[alpha=nan]", "alpha", "float", "'nan'"),
        ("method[alpha=inf]", "alpha", "float", "'inf'"),
        ("method[rounds=1.5]", "rounds", "int", "'1.5'"),
        ("method[rounds=]", "rounds", "int", "''"),
        ("method[rounds=1+2]", "rounds", "int", "'1+2'"),
        ("method[fast=maybe]", "fast", "bool", "'maybe'"),
        ("method[compare=column]", "compare", "row | matrix", "'column'"),
        ("method[limit=x]", "limit", "int | none", "'x'"),
        ("method[subset=norms+tail]", "subset", "norms | biases | head, joined by +", "'norms+tail'"),
        ("method[seeds=1+x]", "seeds", "int, joined by +", "'1+x'"),
        ("method[shares=0.5+inf]", "shares", "float, joined by +", "'0.5+inf'"),
        ("method[retrain.steps=x]", "retrain.steps", "int", "'x'"),
    ],
)
def test_a_value_that_does_not_fit_names_option_type_and_value(text: str, option_name: str, kind: str, value: str) -> None:
    with pytest.raises(OptionError) as caught:
        method(text)
    assert str(caught.value) == f"method: the option {option_name} is {kind}, and {value} is not."


@pytest.mark.parametrize("key", ["alhpa", "retrain", "steps", "retrain.stpes", "retrain.schedule", "name", "alpha.x"])
def test_an_unknown_option_lists_what_there_is(key: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        method(f"method[{key}=1]")
    message = str(caught.value)
    assert f"method has no option {key!r}" in message
    for listed in ("alpha (float)", "compare (row | matrix)", "retrain.steps (int)", "retrain.schedule.warmup (float)"):
        assert listed in message


def test_a_class_without_options_says_so() -> None:
    @dataclass
    class Bare:
        """Nothing to choose."""

    with pytest.raises(UnknownNameError, match="Its options: none"):
        build(Bare, parse_step("bare[a=1]"))


def test_what_the_class_itself_declines_is_an_option_error() -> None:
    with pytest.raises(OptionError, match=r"method: alpha is a share of at least 0\."):
        method("method[alpha=-1]")


def test_errors_are_requests_that_nothing_was_started_for() -> None:
    assert issubclass(OptionError, RequestError)
    assert issubclass(UnknownNameError, RequestError)


@pytest.mark.parametrize(
    ("text", "canonical_text"),
    [
        ("method", "method"),
        ("method[alpha=0.50,rounds=3]", "method"),
        ("method[rounds=4,alpha=1]", "method[alpha=1,rounds=4]"),
        ("method[alpha=0.30000000000000004]", "method[alpha=0.30000000000000004]"),
        ("method[alpha=1e20]", "method[alpha=1e20]"),
        ("method[fast=1]", "method[fast=true]"),
        ("method[limit=none]", "method[limit=none]"),
        ("method[subset=norms]", "method"),
        ("method[subset=head + norms]", "method[subset=head+norms]"),
        ("method[subset=]", "method[subset=]"),
        ("method[shares=1e20+0.5]", "method[shares=1e20+0.5]"),
        ("method[retrain.schedule.warmup=0.2,retrain.steps=10]", "method[retrain.schedule.warmup=0.2]"),
    ],
)
def test_canonical_text_has_only_what_differs_in_field_order(text: str, canonical_text: str) -> None:
    found = method(text)
    assert canonical("method", found) == canonical_text
    assert method(canonical_text) == found


def test_canonical_text_gives_the_options_back() -> None:
    """A run's id hashes this text: two settings may never share one."""
    draw = random.Random(0)
    for _ in range(200):
        found = Method(
            alpha=draw.choice([draw.random(), draw.random() * 1e-9, draw.random() * 1e30]),
            rounds=draw.randrange(10**9),
            fast=draw.random() < 0.5,
            limit=draw.choice([None, 0, 12]),
            seeds=[draw.randrange(100) for _ in range(draw.randrange(4))],
            shares=tuple(draw.random() * 10.0 ** draw.randrange(-20, 20) for _ in range(draw.randrange(3))),
            retrain=Retrain(learning_rate=draw.random() * 1e-4),
        )
        assert method(canonical("method", found)) == found


def test_listing_has_every_option_with_type_default_and_text() -> None:
    facts = {fact.name: (fact.type, fact.default, fact.doc) for fact in option_facts(Method)}
    assert facts["alpha"] == ("float", "0.5", "a share")
    assert facts["fast"] == ("bool", "false", "whether to hurry")
    assert facts["compare"] == ("row | matrix", "row", "what is compared")
    assert facts["subset"] == ("norms | biases | head, joined by +", "norms", "what is trained")
    assert facts["retrain.learning_rate"] == ("float", "0.0001", "how fast")
    assert facts["retrain.schedule.warmup"] == ("float", "0.1", "share of steps to warm up")
    assert "retrain" not in facts
    assert "name" not in facts


def test_option_values_are_dotted_and_plain() -> None:
    values = option_values(method("method[fast=true,retrain.steps=4,subset=norms+head]"))
    assert values["fast"] is True
    assert values["retrain.steps"] == 4
    assert values["alpha"] == 0.5
    assert values["subset"] == "norms+head"


def test_the_nearest_name_is_offered() -> None:
    error = UnknownNameError.among("pruner", "wandda", ["magnitude", "wanda", "dense"])
    assert "'wandda'" in str(error)
    assert "did you mean 'wanda'?" in str(error)
    assert "dense, magnitude, wanda" in str(error)
    assert "did you mean" not in str(UnknownNameError.among("pruner", "zzz", ["magnitude"]))
    assert "none" in str(UnknownNameError.among("pruner", "x", []))


def test_an_unknown_option_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'retrain\.steps'"):
        method("method[retrain.stpes=1]")
