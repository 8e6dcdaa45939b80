"""Chat messages to a prompt, by the model's own Jinja template, as transformers renders it."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.utils import Namespace

from loraserve.errors import InvalidArgumentError, InvalidCheckpointError
from loraserve.text.template_sandbox import (
    BudgetedEnvironment,
    BudgetedTemplate,
    BudgetError,
    SecurityError,
)
from loraserve.text.tokenizer import Tokenizer

MAX_SOURCE_CHARACTERS = 256 << 10
MAX_OUTPUT_CHARACTERS = 8 << 20
MAX_MESSAGES = 10_000
MAX_DEPTH = 32

Message = Mapping[str, Any]

# Names under which clients send a model's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Refused(jinja2.TemplateError):
    """The template called raise_exception: it does not accept these messages."""


def _raise_exception(message: Any) -> None:
    raise _Refused(str(message)[:1000])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, this does not escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Namespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with the name {name!r}")


class _Dict:
    """`dict(...)` without the type itself, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _plain(field: str, value: Any, depth: int = 0) -> Any:
    """A copy made of plain JSON types: nothing else may get into a template's hands."""
    if depth > MAX_DEPTH:
        raise InvalidArgumentError(field, f"nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise InvalidArgumentError(field, "has a key that is not a string")
        return {key: _plain(field, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(field, item, depth + 1) for item in value]
    raise InvalidArgumentError(field, f"has a {type(value).__name__}, which is not JSON")


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidArgumentError("messages", "is not a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise InvalidArgumentError("messages", f"{len(messages)} messages, limit {MAX_MESSAGES}")
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(field, "is not an object")
        # As in transformers: clients send null for what they leave out, templates test presence.
        copy = {k: v for k, v in _plain(field, message).items() if v is not None}
        reasoning = next((copy[key] for key in _REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        plain.append(copy)
    return plain


class ChatTemplate:
    """A compiled chat template. Immutable; may be rendered from any thread."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tool_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` as in Tokenizer; `tool_source` renders chats with tools, if given.

        Raises InvalidCheckpointError if a source is not a template.
        """
        self._special_tokens = dict(special_tokens or {})
        environment = BudgetedEnvironment()
        environment.add_filter("tojson", _tojson)
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: now().strftime(format),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._plain_chat = _compiled(environment, source)
        self._with_tools = _compiled(environment, tool_source) if tool_source else self._plain_chat

    @classmethod
    def of_tokenizer(
        cls, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now
    ) -> "ChatTemplate | None":
        """The template that came with a tokenizer; None if it has none by the name "default"."""
        sources = tokenizer.chat_templates
        if "default" not in sources:
            return None
        return cls(
            sources["default"],
            tokenizer.special_tokens,
            tool_source=sources.get("tool_use"),
            now=now,
        )

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt. It has its special tokens: encode it with add_special_tokens=False.

        `variables` are further ones that the template may read, such as enable_thinking; one by
        the name of a special token takes its place. Raises InvalidArgumentError: "messages" if
        the template refuses them, "chat_template" if it cannot be rendered within the limits.
        """
        given = {
            **self._special_tokens,
            "documents": None,
            **_plain("chat_template variables", variables),
            "messages": _plain_messages(messages),
            "tools": None if tools is None else _plain("tools", list(tools)),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        template = self._plain_chat if tools is None else self._with_tools
        try:
            return template.render(given, MAX_OUTPUT_CHARACTERS)
        except _Refused as error:
            raise InvalidArgumentError("messages", f"the chat template says: {error}") from None
        except BudgetError as error:
            raise InvalidArgumentError("chat_template", str(error)) from None
        except (SecurityError, RecursionError, MemoryError) as error:
            text = f"{type(error).__name__}: {str(error)[:500]}"
            raise InvalidArgumentError("chat_template", text) from None
        except Exception as error:  # a template may run into any of Python's own
            text = f"the chat template fails: {type(error).__name__}: {str(error)[:500]}"
            raise InvalidArgumentError("messages", text) from None


def _compiled(environment: BudgetedEnvironment, source: str) -> BudgetedTemplate:
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise InvalidCheckpointError(
            "chat_template", f"{len(source)} characters, limit {MAX_SOURCE_CHARACTERS}"
        )
    try:
        return environment.compile_source(source)
    except Exception as error:  # SyntaxError, RecursionError and MemoryError of Python's compiler
        text = f"{type(error).__name__}: {str(error)[:500]}"
        raise InvalidCheckpointError("chat_template", text) from None
