"""`loraserve serve`: one command from a model directory to an OpenAI-compatible endpoint."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraserve.checkpoint.adapter_source import MAX_RANK
from loraserve.command_line import HelpFormatter, exit_code, told
from loraserve.commands.daemon_words import check_words
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.demo.skills import SKILLS
from loraserve.errors import InvalidArgumentError, LoraServeError
from loraserve.logs import FORMATS, LEVELS, set_up_logs
from loraserve.option_sources import OptionSources, section_words
from loraserve.serve.check import check_start
from loraserve.serve.options import ServeOptions
from loraserve.serve.tree import serve
from loraserve.wire import is_loopback

_log = logging.getLogger("loraserve.serve")

# All of the options would be twelve lines.
_USAGE = """loraserve serve MODEL [OPTIONS]
       loraserve serve --model MODEL [OPTIONS]
       loraserve serve --demo [OPTIONS]

MODEL is the directory of a Hugging Face model; --demo serves the one that ships."""
# Options of other servers that mean nothing here: ranks and adapters have no fixed slots.
_WITHOUT_EFFECT = ("enable-lora", "max-loras", "max-cpu-loras", "max-lora-rank")
# Options that every node gets as they are, where they are given.
_OF_NODES = ("max-num-seqs", "max-num-batched-tokens", "dtype")


def _adapter(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(path)


class _WithoutEffect(argparse.Action):
    """Remembers that the option was there."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), option])


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model and its adapters on this machine, with an OpenAI-compatible endpoint",
        description="Starts a controller, nodes and a gateway as one process tree, says when it is "
        "ready, and stops everything on SIGTERM or Ctrl-C. Sections `controller`, `node` and "
        "`gateway` of the file hold further options of these daemons (--help of each).",
        usage=_USAGE,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    sources = OptionSources(parser)
    _add_places(parser)
    _add_limits(parser)
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        try:
            words = sources.words(args)
        except InvalidArgumentError as error:
            parser.error(told(parser, error))
        return parse([*words, *args], namespace)

    parser.parse_known_args = parse_known_args
    parser.set_defaults(run=_serve)


def _add_places(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model_dir", nargs="?", type=Path, metavar="MODEL", help="Hugging Face directory")
    add("--model", type=Path, metavar="MODEL", help="the same as MODEL without a name")
    add("--demo", action="store_true", help="the shipped model and its ten adapters")
    add(
        *("--adapter", "--lora-modules"),
        type=_adapter,
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="PEFT directories, or packed files; a name is the model of its requests",
    )
    add("--base", metavar="NAME", help="of the base model (default: the directory's)")
    add(
        "--served-model-name",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names of the base model",
    )
    add("--chat-template", type=Path, metavar="FILE", help="Jinja (default: the model's)")
    add("--host", default="127.0.0.1", help="to listen on; others than loopback need keys")
    add("--port", type=int, default=8000, metavar="PORT", help="0 takes a free one")
    add("--keys", type=Path, metavar="FILE", help="key file; without one only loopback is served")
    add("--api-key", metavar="KEY", help="one key for everything, instead of --keys")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="of the cluster (default: a temporary one, which goes in the end)",
    )
    add(
        "--adapter-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="under which POST /v1/load_lora_adapter may read; may be given repeatedly",
    )
    add("--allow-base-mismatch", action="store_true", help="take adapters made for other bases")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="NODES", help="each with a copy of the model")
    add("--device", default="cpu", help="cpu or cuda")
    add(
        "--threads",
        type=int,
        default=0,
        metavar="THREADS",
        help="of each engine; 0: the machine's cores, shared",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of the weights (default: auto)")
    add(
        "--max-num-seqs",
        type=int,
        metavar="REQUESTS",
        help="in one engine step (default: 64)",
    )
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="TOKENS",
        help="in one engine step (default: 512)",
    )
    add(
        "--start-timeout-s",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for each part",
    )
    add(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for requests that run at the end",
    )
    add("--log-level", choices=LEVELS, help="the least that is told (default: info)")
    add("--log-format", choices=FORMATS, help="json: one object per line (default: text)")
    add("--otlp-endpoint", metavar="URL", help="OTLP/HTTP collector that gets traces")
    for name in _WITHOUT_EFFECT:
        add(
            f"--{name}",
            action=_WithoutEffect,
            nargs="?",
            dest="without_effect",
            default=[],
            help=argparse.SUPPRESS,
        )


def _extra(arguments: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Options for the daemons, by kind: those for all of them, then their sections."""
    every = [f"--log-level={arguments.log_level}"] if arguments.log_level else []
    if arguments.log_format:
        every.append(f"--log-format={arguments.log_format}")
    extra: dict[str, tuple[str, ...]] = {}
    for kind in ("controller", "node", "gateway"):
        words = list(every)
        if arguments.otlp_endpoint and kind != "controller":
            words.append(f"--otlp-endpoint={arguments.otlp_endpoint}")
        for name in _OF_NODES if kind == "node" else ():
            value = getattr(arguments, name.replace("-", "_"))
            words += [] if value is None else [f"--{name}={value}"]
        extra[kind] = (*words, *section_words(arguments.sections.get(kind, {})))
    return extra


def _options(arguments: argparse.Namespace) -> ServeOptions:
    """Raises InvalidArgumentError."""
    models = [m for m in (arguments.model, arguments.model_dir) if m is not None]
    if arguments.demo:
        models.append(MODEL_DIRECTORY)
    if len(models) != 1:
        raise InvalidArgumentError(
            "model", "exactly one of MODEL, --model MODEL and --demo is needed"
        )
    adapters = dict(arguments.adapter)
    if len(adapters) != len(arguments.adapter):
        names = [name for name, _ in arguments.adapter]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgumentError("adapter", f"{twice!r} is given twice")
    base = arguments.base or models[0].resolve().name
    if arguments.demo:
        base = arguments.base or MODEL_NAME
        adapters = {skill.name: adapter_directory(skill.name) for skill in SKILLS} | adapters
    if not 0 <= arguments.port <= 65535:
        raise InvalidArgumentError("port", f"{arguments.port} is not within 0 and 65535")
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    options = ServeOptions(
        model=models[0],
        base=base,
        adapters=adapters,
        nodes=arguments.nodes,
        device=arguments.device,
        threads=arguments.threads,
        listen=f"{host}:{arguments.port}",
        data_dir=arguments.data_dir,
        keys=arguments.keys,
        api_key=arguments.api_key,
        aliases=tuple(arguments.served_model_name),
        chat_template=arguments.chat_template,
        adapter_roots=tuple(arguments.adapter_root),
        allow_base_mismatch=arguments.allow_base_mismatch,
        start_timeout_s=arguments.start_timeout_s,
        drain_timeout_s=arguments.drain_timeout_s,
        extra=_extra(arguments),
    )
    check_words(options.extra)
    check_start(options)
    return options


def _exposed(options: ServeOptions) -> str | None:
    """What is allowed but weak; None where nothing is."""
    tls = any(word.startswith("--tls-cert=") for word in options.extra.get("gateway", ()))
    if tls or is_loopback(options.listen):
        return None
    return f"warning: {options.listen} is not encrypted: keys can be read on the way"


def _say(line: str) -> None:
    print(f"loraserve: {line}", file=sys.stderr, flush=True)


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.log_format != "json":
        return _run(arguments, _say)
    set_up_logs("loraserve", arguments.log_level or "info", arguments.log_format)
    try:
        return _run(arguments, lambda line: _log.info("%s", line))
    except (LoraServeError, OSError) as error:
        _log.error("%s", told(arguments.parser, error))
        return exit_code(error)


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Raises LoraServeError."""
    options = _options(arguments)
    for name in sorted(set(arguments.without_effect)):
        say(f"{name} has no effect: any number of adapters of any rank up to {MAX_RANK} is served")
    if weak := _exposed(options):
        say(weak)

    async def run() -> None:
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await serve(options, stopping, say)

    asyncio.run(run())
    return 0
