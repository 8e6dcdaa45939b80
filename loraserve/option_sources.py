"""Where an option's value comes from: the command line, else the environment, else a YAML file,
else its default.

`--max-sequences 8`, `LORASERVE_MAX_SEQUENCES=8` and `max-sequences: 8` mean the same. One file may
drive everything: `loraserve serve` reads its top level and hands the sections `controller`, `node`
and `gateway` to these daemons; a daemon that is started alone reads its section, and of the top
level what concerns it too.
"""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import whole, wrong

PREFIX = "LORASERVE_"
SECTIONS = ("controller", "node", "gateway")
# Variables that are no options: those of libraries that are loaded.
OTHER_VARIABLES = frozenset({"LORASERVE_UCX_PREFIX", "LORASERVE_CUBLASLT", "LORASERVE_CUDA_GRAPHS"})
MAX_FILE_BYTES = 1 << 20
# What the top level of a file may hold beside the sections: the options of `loraserve serve`.
SERVE_OPTIONS = frozenset(
    {
        *("model", "adapter", "base", "served-model-name", "nodes", "device", "threads"),
        *("host", "port", "data-dir", "keys", "api-key", "chat-template", "adapter-root"),
        *("allow-base-mismatch", "start-timeout-s", "drain-timeout-s", "demo"),
        *("log-level", "log-format", "otlp-endpoint"),
        *("max-num-seqs", "max-num-batched-tokens", "dtype"),
    }
)
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.YAMLError(f"{_line(key)}: {name!r} is no option's name")
            if name in seen:
                raise yaml.YAMLError(f"{_line(key)}: {name!r} occurs twice")
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def read_file(path: Path) -> dict[str, Any]:
    """The options in a file; names with dashes. Raises InvalidArgumentError that names it."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise wrong("config", path, f"over {MAX_FILE_BYTES} bytes")
        found = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise wrong("config", path, error) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise wrong("config", path, "is no mapping of options to values")
    options = {name.replace("_", "-"): value for name, value in found.items()}
    for name, value in options.items():
        if name in SECTIONS and not isinstance(value, dict | None):
            raise wrong("config", path, f"section {name} is no mapping")
        if name not in SECTIONS and name not in SERVE_OPTIONS:
            raise wrong("config", path, f"there is no option {name!r}")
    return options


def section_words(section: Mapping[str, Any]) -> list[str]:
    """A section as words of a command line, for the daemon itself to check."""
    return [word for name, value in section.items() for word in _words(f"--{name}", value)]


def _texts(value: Any) -> list[str]:
    """A value, a list of them, or a mapping of names to paths. Raises InvalidArgumentError."""
    if isinstance(value, dict):
        return [f"{key}={item}" for key, item in value.items()]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float | bool) for item in values):
        raise InvalidArgumentError("config", f"{value!r} is no option's value")
    return ["true" if v is True else "false" if v is False else str(v) for v in values]


def _words(option: str, value: Any) -> list[str]:
    option = option.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    # One word: a value may begin with a dash.
    return [f"{option}={text}" for text in _texts(value)]


def _given(action: argparse.Action, argv: Sequence[str]) -> bool:
    return any(
        word == option or word.startswith(f"{option}=")
        for word in argv
        for option in action.option_strings
    )


def _checked(action: argparse.Action, texts: Iterable[str], source: str) -> list[str]:
    """The words for values of one option. Raises InvalidArgumentError that says where one is
    from."""
    option = action.option_strings[0]
    name = option.lstrip("-")
    words = []
    for text in texts:
        if action.nargs == 0:
            if text.lower() not in (*_YES, *_NO):
                raise InvalidArgumentError(name, f"{text!r} is not yes or no (from {source})")
            words += [option] if text.lower() in _YES else []
            continue
        convert: Any = action.type or str
        try:
            value = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise InvalidArgumentError(name, f"{text!r}: {error} (from {source})") from None
        if action.choices is not None and value not in action.choices:
            wanted = ", ".join(map(str, action.choices))
            raise InvalidArgumentError(name, f"{text!r} is none of {wanted} (from {source})")
        words.append(f"{option}={text}")
    return words


class OptionSources:
    """Of one parser, whose `--config` it adds."""

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        section: str = "",
        shared: Mapping[str, str] = {},
        rivals: frozenset[str] = frozenset(),
    ) -> None:
        """`section`: the daemon's; empty for `loraserve serve`. `shared`: options of the file's top
        level to the daemon's own that they mean. `rivals`: options that say the same in several
        ways; the best source that names any of them counts alone."""
        self._parser = parser
        self._section = section
        self._shared = shared
        self._rivals = rivals
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help=f"YAML file of options (default: ${PREFIX}CONFIG, or none); each option may also "
            f"be a variable, as ${PREFIX}LOG_LEVEL for --log-level",
        )
        parser.set_defaults(sections={})

    def _file(self, argv: Sequence[str]) -> Path | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        path: Path | None = finder.parse_known_args(list(argv))[0].config
        named = os.environ.get(f"{PREFIX}CONFIG")
        return path or (Path(named) if named else None)

    def _of_file(self, path: Path) -> dict[str, Any]:
        """This parser's options in the file. Raises InvalidArgumentError."""
        options = read_file(path)
        if not self._section:
            self._parser.set_defaults(sections={n: options.pop(n, None) or {} for n in SECTIONS})
            return options
        own = {mine: options[name] for name, mine in self._shared.items() if name in options}
        section = options.get(self._section) or {}
        return own | {str(name).replace("_", "-"): value for name, value in section.items()}

    def words(self, argv: Sequence[str]) -> list[str]:
        """What stands before the words of the command line. Raises InvalidArgumentError."""
        path = self._file(argv)
        of_file = self._of_file(path) if path else {}
        words: list[str] = []
        rivals = [a for a in self._parser._actions if self._rivals & set(_names(a))]
        rival_given = any(_given(action, argv) for action in rivals)
        rival_in_environment = any(_in_environment(action) for action in rivals)
        for action in self._parser._actions:
            names = _names(action)
            if not names or names[0] in ("help", "config"):
                continue
            found = [of_file.pop(name) for name in names if name in of_file]
            if _given(action, argv) or (action in rivals and rival_given):
                continue
            in_environment = _in_environment(action)
            if action in rivals and rival_in_environment:
                found = []
            if in_environment is not None:
                text = os.environ[in_environment]
                several = isinstance(action, argparse._AppendAction | argparse._ExtendAction)
                texts = text.split(",") if several else [text]
                words += _checked(action, texts, f"${in_environment}")
            elif found and found[-1] is not None:
                words += _checked(action, _texts(found[-1]), whole(path or ""))
        for name in of_file:
            raise wrong("config", path or "", f"there is no option {name!r} here")
        return words


def _names(action: argparse.Action) -> list[str]:
    """Of an option, without dashes before them."""
    return [o.lstrip("-") for o in action.option_strings if o.startswith("--")]


def _in_environment(action: argparse.Action) -> str | None:
    """The variable that holds the option."""
    return next((n for n in map(_variable, _names(action)) if n in os.environ), None)


def _variable(name: str) -> str:
    return PREFIX + name.upper().replace("-", "_")
