"""Values of the wrong kind: every field answers with a result or a typed error, never with less."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loraserve import Engine, EngineConfig, SamplingParams, demo
from loraserve.errors import InvalidArgumentError, LoraServeError, NotFoundError

JUNK: list[Any] = [
    *(None, True, -1, 0, 3, 2**31, 2**63, 2**64, -(2**31) - 1, 1.5, math.nan, math.inf),
    *("x", b"x", "\ud800", "\0", "x" * 5000, [], [1], ["a"], [None], [1.5], [2**40], [""], (1, 2)),
    *({}, {1: 2}, {"a": 1}, {1: "b"}, {2**40: 1.0}, {1: math.nan}, object()),
]
PLAIN = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(EngineConfig(model=demo.MODEL_DIRECTORY)) as engine:
        yield engine


def all_end_well(call: Callable[[Any], object]) -> None:
    """None of JUNK ends in anything but a result or an error that names a field."""
    for value in JUNK:
        try:
            call(value)
        except LoraServeError as error:
            if not (error.field and error.message):
                raise AssertionError(f"{value!r}: {error!r}") from error
        except Exception as error:
            raise AssertionError(f"{value!r}: {error!r}") from error


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_sampling_params(engine: Engine, field: str) -> None:
    all_end_well(
        lambda value: engine.submit(
            [1, 2], SamplingParams(**{"max_tokens": 2, field: value})
        ).result(60)
    )


@pytest.mark.parametrize(
    "argument", ["adapter", "request_id", "priority", "tenant", "timeout_s", "start_index"]
)
def test_arguments_of_a_request(engine: Engine, argument: str) -> None:
    all_end_well(lambda value: engine.submit([1, 2], PLAIN, **{argument: value}).result(60))


def test_prompts(engine: Engine) -> None:
    all_end_well(lambda value: engine.submit(value, PLAIN).result(60))


def test_adapters(engine: Engine) -> None:
    def load_and_forget(name: Any) -> None:
        engine.load_adapter(name, demo.adapter_directory("upper"))
        engine.unload_adapter(name)

    all_end_well(load_and_forget)
    all_end_well(lambda value: engine.load_adapter("a", value))
    all_end_well(lambda value: engine.load_adapter("a", {"x": 1}, value))
    all_end_well(lambda value: engine.load_adapter("a", {"x": value}, {"r": 1}))
    assert engine.adapters() == []
    with pytest.raises(NotFoundError):
        engine.unload_adapter("a")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineConfig)])
def test_engine_options(field: str) -> None:
    def open_and_close(value: Any) -> None:
        if value is None and field == "memory_bytes":
            return  # the default
        given = {"model": demo.MODEL_DIRECTORY, "memory_bytes": 1 << 20, field: value}
        with contextlib.closing(Engine(EngineConfig(**given))):
            pass

    all_end_well(open_and_close)


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan, "soon"])
def test_a_timeout_is_positive(engine: Engine, timeout_s: Any) -> None:
    """A deadline that was silently none would be worse than an error."""
    with pytest.raises(InvalidArgumentError) as caught:
        engine.submit([1], PLAIN, timeout_s=timeout_s)
    assert caught.value.field == "timeout_s"
