"""Recorded requests: times and lengths. None of these traces names an adapter."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import whole, wrong
from loraserve.sim.workload import Floats, Ints

_DATA = Path(__file__).parent / "data"
AZURE_CONV = _DATA / "azure-llm-2023/AzureLLMInferenceTrace_conv.csv.gz"
AZURE_CODE = _DATA / "azure-llm-2023/AzureLLMInferenceTrace_code.csv.gz"
_MAX_TOKENS = 10_000_000


class MalformedTraceError(InvalidArgumentError):
    """A trace file cannot be read; says file, line and column (of the line, from 1)."""

    def __init__(self, path: Path, line: int, column: int, why: str) -> None:
        super().__init__("trace", f"{whole(path)}, line {line}, column {column}: {why}")
        self.path, self.line, self.column = path, line, column


@dataclass(frozen=True)
class Trace:
    """In order of time; the first request is at 0."""

    time_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints


def read_trace(path: Path) -> Trace:
    """By the name's ending: .csv (Azure) or .jsonl (Mooncake), gzipped or not. Raises
    MalformedTraceError, InvalidArgumentError, OSError."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return read_azure(path)
    if name.endswith(".jsonl"):
        return read_mooncake(path)
    raise wrong("trace", path, "the name ends in none of .csv, .jsonl, .parquet")


def read_azure(path: Path) -> Trace:
    """Azure LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens."""
    with _open(path) as file:
        return _trace(path, _azure_rows(path, file))


def read_mooncake(path: Path) -> Trace:
    """Mooncake traces: one object a line with timestamp (ms), input_length, output_length."""
    with _open(path) as file:
        return _trace(path, _mooncake_rows(path, file))


def _open(path: Path) -> IO[str]:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise wrong("trace", path, error) from None


_Row = tuple[float, int, int]


def _azure_rows(path: Path, file: IO[str]) -> Iterator[_Row]:
    header = file.readline().strip()
    if header != "TIMESTAMP,ContextTokens,GeneratedTokens":
        raise MalformedTraceError(path, 1, 1, f"{header[:80]!r} is not the header of Azure's files")
    for number, line in enumerate(file, 2):
        fields = next(csv.reader([line]), [])
        if not fields:
            continue
        if len(fields) != 3:
            raise MalformedTraceError(path, number, 1, f"{len(fields)} fields instead of 3")
        column = 1
        values = []
        parsers: tuple[Callable[[str], float], ...] = (_timestamp, _tokens, _tokens)
        for field, parse in zip(fields, parsers, strict=True):
            try:
                values.append(parse(field))
            except ValueError as error:
                raise MalformedTraceError(path, number, column, str(error)) from None
            column += len(field) + 1
        yield values[0], int(values[1]), int(values[2])


def _mooncake_rows(path: Path, file: IO[str]) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise MalformedTraceError(path, number, error.colno, error.msg) from None
        except RecursionError:
            raise MalformedTraceError(path, number, 1, "nested too deep") from None
        values = []
        for key, parse in (
            ("timestamp", _milliseconds),
            ("input_length", _tokens),
            ("output_length", _tokens),
        ):
            column = line.find(f'"{key}"') + 1
            if not isinstance(row, dict) or key not in row:
                raise MalformedTraceError(path, number, 1, f"{key} is missing")
            if isinstance(row[key], bool) or not isinstance(row[key], int | float):
                raise MalformedTraceError(path, number, column, f"{key} is {row[key]!r}")
            try:
                values.append(parse(str(row[key])))
            except ValueError as error:
                raise MalformedTraceError(path, number, column, f"{key}: {error}") from None
        yield values[0], int(values[1]), int(values[2])


def _timestamp(text: str) -> float:
    # Seven decimals: more than Python's datetime takes.
    whole, _, fraction = text.partition(".")
    if fraction and not fraction.isdecimal():
        raise ValueError(f"{text[:40]!r} is no time")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def _milliseconds(text: str) -> float:
    value = float(text) / 1000
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"{text} is no time")
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if not 0 <= value <= _MAX_TOKENS:
        raise ValueError(f"{value} is not within 0 and {_MAX_TOKENS}")
    return value


def _trace(path: Path, rows: Iterator[_Row]) -> Trace:
    """Requests without a token of prompt or output have one."""
    try:
        found = list(rows)
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise wrong("trace", path, error) from None
    if not found:
        raise wrong("trace", path, "no requests")
    table = np.array(found, dtype=float)
    table = table[np.argsort(table[:, 0], kind="stable")]
    lengths = np.maximum(table[:, 1:].astype(np.int64), 1)
    return Trace(table[:, 0] - table[0, 0], lengths[:, 0], lengths[:, 1])
