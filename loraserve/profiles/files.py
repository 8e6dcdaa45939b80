"""Profiles as JSON: the ones that ship (tools/make_profiles.py) and those of `loraserve bench
profile`."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.named_files import whole, wrong
from loraserve.placement.cost_model import CostModel, Profile

DEFAULT_PROFILE = "a100-llama-3-8b-proportional"
_SHIPPED = Path(__file__).parent


def shipped_profiles() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_profile(name: str) -> Profile:
    """By the name of a shipped one or the path of a file. Raises InvalidArgumentError."""
    path = _SHIPPED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        text = path.read_text()
    except OSError as error:
        if os.sep in name or path.exists():
            raise wrong("profile", path, error) from None
        names = ", ".join(shipped_profiles())
        raise InvalidArgumentError(
            "profile", f"{name!r} is no file ({whole(path)}) and none of: {names}"
        ) from None
    except UnicodeDecodeError:
        raise wrong("profile", path, "is not text") from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wrong("profile", path, f"is not JSON: {error}") from None
    return _profile(whole(path), raw)


def _profile(name: str, raw: Any) -> Profile:
    if isinstance(raw, Mapping):  # what `loraserve bench profile` tells beside the profile
        raw = {key: value for key, value in raw.items() if key != "measured"}
    values = _checked(name, raw, Profile)
    values["cost"] = CostModel(**_checked(f"{name}: cost", values["cost"], CostModel))
    profile = Profile(**values)
    if profile.cost.step_s <= 0 and profile.cost.decode_token_s <= 0:
        raise InvalidArgumentError("profile", f"{name}: a decode step must take time")
    if not 0 < profile.max_sequences <= profile.max_batch_tokens:
        raise InvalidArgumentError(
            "profile", f"{name}: max_sequences is not within 1 and max_batch_tokens"
        )
    return profile


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is int or wanted is float:
        if isinstance(value, bool) or not isinstance(value, int if wanted is int else int | float):
            return False
        return math.isfinite(value) and value >= 0
    return isinstance(value, wanted) if wanted in (str, bool) else True


def _checked(name: str, raw: Any, of: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, numbers finite and not negative."""
    if not isinstance(raw, Mapping):
        raise InvalidArgumentError("profile", f"{name} is not an object")
    known = {f.name: f for f in fields(of)}
    if unknown := sorted(set(raw) - set(known)):
        raise InvalidArgumentError("profile", f"{name}: unknown field {unknown[0]!r}")
    for field in known.values():
        if field.name not in raw:
            # Fields without a default are those that the class itself does not know a value for.
            if not hasattr(of, field.name):
                raise InvalidArgumentError("profile", f"{name}: {field.name} is missing")
            continue
        value = raw[field.name]
        if not _fits(value, field.type):
            raise InvalidArgumentError("profile", f"{name}: {field.name} is {value!r}")
    return dict(raw)
