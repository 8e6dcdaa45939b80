"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's bodies."""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraserve.checkpoint.base_names import names_served_model
from loraserve.checkpoint.packed_adapter import PackedAdapter, load_adapter_source
from loraserve.client.route_table import RouteTable
from loraserve.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from loraserve.gateway.access import Caller
from loraserve.gateway.http import Request
from loraserve.gateway.models import table_of
from loraserve.gateway.openai_errors import named_as_asked
from loraserve.gateway.schema import Schema
from loraserve.gateway.site import GatewaySite
from loraserve.named_files import why, wrong
from loraserve.security.identity import check_name

ROUTABLE_TIMEOUT_S = 60.0
# For the table to follow what the controller has confirmed.
ROUTES_TIMEOUT_S = 5.0

_NAME: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": 64,
    "description": "a-z 0-9 . _ - beginning with a letter or digit, without two dots in a row.",
}
LOAD: Schema = {
    "type": "object",
    "required": ["lora_name", "lora_path"],
    "additionalProperties": False,
    "properties": {
        "lora_name": _NAME,
        "lora_path": {
            "type": "string",
            "minLength": 1,
            "maxLength": 4096,
            "description": "A PEFT directory or a packed file under an --adapter-root; where it is "
            "relative, under the first of them.",
        },
        "load_inplace": {
            "type": "boolean",
            "default": False,
            "description": "The name may be taken: it then means the new adapter.",
        },
        "base_model_name": {
            "type": "string",
            "maxLength": 128,
            "description": "What the adapter was made for; the gateway's base model by default.",
        },
        "is_3d_lora_weight": {
            "type": "boolean",
            "enum": [False],
            "default": False,
            "description": "Experts are not supported.",
        },
    },
}
UNLOAD: Schema = {
    "type": "object",
    "required": ["lora_name"],
    "additionalProperties": False,
    "properties": {
        "lora_name": _NAME,
        "lora_int_id": {"description": "Taken and without effect: names are unique."},
    },
}


class AdapterRoots:
    """The directories that adapters may be loaded from."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raises InvalidArgumentError where one is no directory."""
        for root in roots:
            if not root.is_dir():
                raise wrong("adapter-root", root, "is no directory")
        self._roots = [Path(os.path.realpath(root)) for root in roots]

    def find(self, path: str) -> Path:
        """Where `path` leads, all links followed.

        Raises PermissionDeniedError for everything outside of the roots, whether it is there or
        not, NotFoundError for what is not there.
        """
        if not self._roots:
            raise PermissionDeniedError("lora_path", "this gateway has no --adapter-root")
        try:
            real = Path(os.path.realpath(self._roots[0] / path))
        except ValueError as error:  # a null byte
            raise InvalidArgumentError("lora_path", str(error)) from None
        if not any(real.is_relative_to(root) for root in self._roots):
            raise PermissionDeniedError("lora_path", "lies under no --adapter-root")
        try:
            there = real.exists()
        except OSError as error:  # a name that is too long
            raise InvalidArgumentError("lora_path", error.strerror or "is no path") from None
        if not there:
            raise NotFoundError("lora_path", "is not there, under --adapter-root")
        return real


def _revision(table: RouteTable, base: str, name: str) -> str | None:
    route = table.find(base, name)
    return None if route is None else route.revision


# The controller's names of what these bodies hold.
_FIELDS = {
    **dict.fromkeys(("name", "adapter", "adapter.name"), "lora_name"),
    "base": "base_model_name",
}


@contextlib.contextmanager
def _about_the_path() -> Iterator[None]:
    """What is wrong with an adapter itself, a tensor or a field of its files, is the path's."""
    try:
        yield
    except (InvalidArgumentError, FailedPreconditionError) as error:
        if error.field not in _FIELDS and error.field not in LOAD["properties"]:
            error.message = f"{error.field}: {error.message}"
            error.field = "lora_path"
        raise


def _read(path: Path) -> PackedAdapter:
    """Blocks. Raises InvalidArgumentError where it is none, or cannot be read."""
    try:
        return load_adapter_source(path)
    except OSError as error:
        raise InvalidArgumentError("lora_path", f"cannot be read: {why(error)}") from None


class LoadAdapter:
    schema = LOAD

    def __init__(self, site: GatewaySite, roots: AdapterRoots) -> None:
        self._site = site
        self._roots = roots

    async def __call__(self, request: Request, caller: Caller) -> None:
        with named_as_asked(_FIELDS):
            await self._answer(request, caller)

    async def _answer(self, request: Request, caller: Caller) -> None:
        site = self._site
        body = await request.json(self.schema, site.max_body_bytes)
        client = site.sessions.of(caller)
        name = site.names.check_new(body["lora_name"], await table_of(client))
        base = site.names.base_of(body.get("base_model_name"))
        path = self._roots.find(body["lora_path"])
        added = True
        with _about_the_path():
            packed = await asyncio.to_thread(_read, path)
            about: Any = {"base": base, "allow_base_mismatch": self._allows(packed)}
            try:
                info = await client.adapters.add(name, packed, **about)
            except AlreadyExistsError as error:
                if not body.get("load_inplace", False):
                    raise AlreadyExistsError(
                        "lora_name", f"{error.message} (load_inplace)"
                    ) from None
                info = await client.adapters.update(name, packed, **about)
                added = False
        if added:
            with _about_the_path():
                await client.wait_admitted([info], timeout_s=ROUTABLE_TIMEOUT_S)
        else:
            await client.wait_routable(
                [name], base=info.base, timeout_s=ROUTABLE_TIMEOUT_S, revision=info.revision
            )
        text = f"Success: LoRA adapter '{name}' added successfully."
        await request.send_bytes(text.encode(), content_type=b"text/plain; charset=utf-8")

    def _allows(self, packed: PackedAdapter) -> bool:
        """Whether it may enter whatever base it names: also where that is the very directory which
        is served, and no digest says otherwise."""
        served = self._site.model_directory
        named_it = served is not None and names_served_model(packed, served)
        return self._site.allow_base_mismatch or named_it


class UnloadAdapter:
    schema = UNLOAD

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        with named_as_asked(_FIELDS):
            await self._answer(request, caller)

    async def _answer(self, request: Request, caller: Caller) -> None:
        site = self._site
        body = await request.json(self.schema, site.max_body_bytes)
        name = check_name("lora_name", body["lora_name"])
        client, base = site.sessions.of(caller), site.names.base_of(None)
        await client.adapters.remove(name, base=base)
        await client.wait_routes(
            lambda table: _revision(table, base, name) is None, ROUTES_TIMEOUT_S
        )
        text = f"Success: LoRA adapter '{name}' removed successfully."
        await request.send_bytes(text.encode(), content_type=b"text/plain; charset=utf-8")
