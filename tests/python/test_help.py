"""`--help` of every command and daemon: each option tells what it takes, in which unit, and what it
is where it is not given."""

import argparse
import re
from collections.abc import Iterator

import pytest

from loraserve import cli
from loraserve.command_line import Parser
from loraserve.controller import main as controller
from loraserve.gateway import main as gateway
from loraserve.node import main as node

# What a number of an option may be called; those without a unit are N, FACTOR and SHARE.
UNITS = {
    *("SECONDS", "PERIODS", "TIMES", "BYTES", "BYTES_PER_S", "MIB", "GIB", "TOKENS", "REQUESTS"),
    *("REQUESTS_PER_S", "ADAPTERS", "NODES", "COPIES", "THREADS", "PROCESSES", "PORT", "PID"),
    *("N", "FACTOR", "SHARE"),
}


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from leaves(below)


TOPS = (cli.make_parser(), node._parser(), controller._parser(), gateway._parser())
PARSERS = [parser for top in TOPS for parser in leaves(top)]


def shown(parser: argparse.ArgumentParser) -> list[tuple[argparse.Action, str]]:
    """The actions of which help tells, and what it says of each."""
    formatter = parser._get_formatter()
    return [
        (action, formatter._expand_help(action) if action.help else "")
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        if not isinstance(action, argparse._SubParsersAction)
    ]


def test_every_command_is_walked() -> None:
    names = {parser.prog for parser in PARSERS}
    assert names >= {
        *("loraserve", "loraserve serve", "loraserve adapter add", "loraserve node doctor"),
        *("loraserve bench profile", "loraserve simulate", "loraserve key create"),
        *("loraserve-node", "loraserve-controller", "loraserve-gateway"),
    }


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_each_option_tells_its_default_and_its_unit(parser: argparse.ArgumentParser) -> None:
    assert isinstance(parser, Parser)
    text = parser.format_help()
    assert "default: None" not in text
    assert "default: []" not in text
    assert "==SUPPRESS==" not in text
    for action, told in shown(parser):
        name = "/".join(action.option_strings) or action.dest
        assert re.sub(r"\(default: [^()]*\)", "", action.help or "").strip(), f"{name}: no help"
        assert told.count("(default") <= 1, f"{name}: {told}"
        if not action.option_strings or action.nargs == 0:
            continue
        assert action.required or "(default: " in told, f"{name}: {told}"
        if action.type in (int, float):
            assert action.metavar in UNITS, f"{name}: {action.metavar}"


def test_the_usage_of_serve_says_how_to_name_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    usage = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.removeprefix("usage:").strip() for line in usage] == [
        "loraserve serve MODEL [OPTIONS]",
        "loraserve serve --model MODEL [OPTIONS]",
        "loraserve serve --demo [OPTIONS]",
    ]
