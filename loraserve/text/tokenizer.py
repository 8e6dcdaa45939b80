"""The tokenizer of a Hugging Face directory, as transformers would load it."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import tokenizers
from tokenizers import AddedToken
from tokenizers.models import Unigram

from loraserve.checkpoint.bounded_json import parse_object
from loraserve.errors import InvalidArgumentError, InvalidCheckpointError, LoraServeError

MAX_TOKENIZER_BYTES = 128 << 20
MAX_CONFIG_BYTES = 8 << 20
MAX_TEMPLATE_BYTES = 1 << 20

_NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
_CONFIG = "tokenizer_config.json"
TOKENIZER_NAME = "tokenizer.json"
_LONG_CHARACTERS = 4096


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise InvalidCheckpointError(path.name, f"more than the limit of {limit} bytes")
    return raw


def _added_token(field: str, value: Any) -> AddedToken:
    """A token written as a string or as an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InvalidCheckpointError(field, "is not a token")
    flags = {
        key: bool(value[key])
        for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if key in value
    }
    return AddedToken(value["content"], **flags)


class _Settings:
    """tokenizer_config.json, completed by special_tokens_map.json where that still counts."""

    def __init__(self, path: Path) -> None:
        self.values: dict[str, Any] = {}
        if (path / _CONFIG).is_file():
            raw = _read(path / _CONFIG, MAX_CONFIG_BYTES)
            self.values = parse_object(_CONFIG, raw, MAX_CONFIG_BYTES)
        old = path / "special_tokens_map.json"
        if "added_tokens_decoder" not in self.values and old.is_file():
            raw = _read(old, MAX_CONFIG_BYTES)
            self.values |= parse_object(old.name, raw, MAX_CONFIG_BYTES)

    def named(self) -> dict[str, AddedToken]:
        """bos_token and the others of their kind."""
        return {
            key: _added_token(f"{_CONFIG} {key}", self.values[key])
            for key in _NAMED
            if self.values.get(key) is not None
        }

    def extra(self) -> list[AddedToken]:
        """Special tokens without one of the usual roles."""
        found: list[Any] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.values.get(key) or []
            if not isinstance(value, list | dict):
                raise InvalidCheckpointError(f"{_CONFIG} {key}", "is not a list of tokens")
            found += value.values() if isinstance(value, dict) else value
        for key, value in self.values.items():
            if key.endswith("_token") and key not in _NAMED and isinstance(value, str):
                found.append(value)
        return [_added_token(f"{_CONFIG} extra_special_tokens", token) for token in found]

    def added(self) -> list[AddedToken]:
        """In the order of their ids."""
        key = "added_tokens_decoder"
        value = self.values.get(key) or {}
        field = f"{_CONFIG} {key}"
        if not isinstance(value, dict) or not all(k.isdecimal() and len(k) < 10 for k in value):
            raise InvalidCheckpointError(field, "is not an object from ids to tokens")
        return [_added_token(field, value[k]) for k in sorted(value, key=int)]

    def chat_templates(self, path: Path) -> dict[str, str]:
        """By name; "default" is the usual one. A file chat_template.jinja takes precedence."""
        field = f"{_CONFIG} chat_template"
        file = path / "chat_template.jinja"
        if file.is_file():
            try:
                # As Python reads text: line ends become "\n".
                text = _read(file, MAX_TEMPLATE_BYTES).decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidCheckpointError(file.name, f"not UTF-8: {error}") from None
            return {"default": text.replace("\r\n", "\n").replace("\r", "\n")}
        value = self.values.get("chat_template")
        if value is None:
            return {}
        if isinstance(value, str):
            return {"default": value}
        if not isinstance(value, list) or not all(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
            for entry in value
        ):
            raise InvalidCheckpointError(field, "is neither a string nor a list of named ones")
        return {entry["name"]: entry["template"] for entry in value}


@contextlib.contextmanager
def _typed(kind: type[LoraServeError], field: str) -> Iterator[None]:
    """What the Rust library raises, as an error of this kind."""
    try:
        yield
    except BaseException as error:
        # Its panics derive from BaseException; they are the broken file's fault too.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(field, str(error)[:500]) from None


_Key = TypeVar("_Key")


class KeptTexts(Generic[_Key]):
    """Texts that were decoded before, as long as they are not too many: most of what streams say
    was said before, and asking the Rust library again costs ten times as much. For any thread."""

    MOST = 1 << 16

    def __init__(self) -> None:
        self._texts: dict[_Key, str] = {}

    def get(self, key: _Key) -> str | None:
        return self._texts.get(key)

    def put(self, key: _Key, text: str) -> str:
        """Returns the text."""
        if len(self._texts) >= self.MOST:
            self._texts = {}
        self._texts[key] = text
        return text


class Tokenizer:
    """Text to token ids and back. Immutable; every method may be called from any thread."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        """Role ("bos_token", ...) to its text."""
        self.chat_templates = dict(chat_templates)
        """Name to Jinja source; empty where the model has none."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Added tokens included. The model's may be larger: such ids decode to nothing."""
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.texts_of_tokens: KeptTexts[int] = KeptTexts()
        """What `decode` says of one token."""
        self.texts_of_pairs: KeptTexts[tuple[int, int]] = KeptTexts()
        """What a token adds behind another one."""
        self._byte_of = self._byte_tokens()
        self.longest_token_bytes = self._longest_token_bytes()
        """Of text that one token can stand for, at most; None where an unknown token may stand for
        text of any length."""
        self.replacement_ids = self._replacement_ids()
        """How U+FFFD itself is written; empty where it cannot be."""

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Of tokenizer.json with tokenizer_config.json, both in `path`.

        Which special tokens `encode` adds is for tokenizer.json alone to say: as in transformers,
        add_bos_token and add_eos_token of the configuration do not count beside it.

        Raises InvalidCheckpointError naming the file and the key.
        """
        if not (path / "tokenizer.json").is_file():
            raise InvalidCheckpointError("tokenizer.json", f"not found in {path.name!r}")
        settings = _Settings(path)
        raw = _read(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
        added, named, extra = settings.added(), settings.named(), settings.extra()
        with _typed(InvalidCheckpointError, "tokenizer.json"):
            backend = tokenizers.Tokenizer.from_buffer(raw)
            backend.no_truncation()
            backend.no_padding()
            known = {token.content for token in backend.get_added_tokens_decoder().values()}
            backend.add_tokens([token for token in added if token.content not in known])
            backend.add_special_tokens([*named.values(), *extra])
        special_tokens = {role: token.content for role, token in named.items()}
        return cls(backend, special_tokens, settings.chat_templates(path))

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def _byte_tokens(self) -> dict[int, int]:
        probe = self._backend.token_to_id("<0x41>")
        if probe is None or self._backend.decode([probe]) != "A":
            return {}
        ids = ((self._backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        return {token: byte for token, byte in ids if token is not None}

    def _longest_token_bytes(self) -> int | None:
        if not self._byte_of and self._has_unknown():
            return None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return max((len(token.encode("utf-8", "replace")) for token in vocabulary), default=None)

    def _has_unknown(self) -> bool:
        model = self._backend.model
        if getattr(model, "unk_token", None) is not None:
            return True
        # Unigram has it by its id, which this library tells in its JSON alone.
        return (
            isinstance(model, Unigram)
            and json.loads(self._backend.to_str())["model"].get("unk_id") is not None
        )

    def _replacement_ids(self) -> tuple[int, ...]:
        try:
            before = self.encode("x", add_special_tokens=False)
            ids = self.encode("x\ufffd", add_special_tokens=False)
        except InvalidArgumentError:  # it has neither the character nor an unknown token
            return ()
        written = ids[: len(before)] == before and self.decode(ids) == "x\ufffd"
        return tuple(ids[len(before) :]) if written else ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the special tokens that the model expects around a text, if wanted.

        Special tokens that are written out in `text` become their ids. Raises InvalidArgumentError
        where `text` is not Unicode text, or the tokenizer has no tokens for it.
        """
        with _typed(InvalidArgumentError, "text"):
            if len(text) > _LONG_CHARACTERS:
                # Unlike `encode` it lets other threads run meanwhile.
                (found,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
                return found.ids
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that the tokenizer does not know are left out."""
        with _typed(InvalidArgumentError, "ids"):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def has_text(self, token: int) -> bool:
        """False for special tokens and unknown ids: `decode` skips them."""
        if token < 0 or token >= 1 << 32 or token in self.special_ids:
            return False
        return self._backend.id_to_token(token) is not None

    def name_of(self, token: int) -> str:
        """The token as the vocabulary writes it, such as "\u0120the"; empty for unknown ids."""
        return self._backend.id_to_token(token) or "" if 0 <= token < 1 << 32 else ""

    def byte_of(self, token: int) -> int | None:
        """The byte of a byte-fallback token (Llama 2's "<0xE2>"), None for all others."""
        return self._byte_of.get(token)
