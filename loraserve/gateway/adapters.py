"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's bodies."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from loraserve.client.route_table import RouteTable
from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
)
from loraserve.gateway.access import Caller
from loraserve.gateway.http import Request
from loraserve.gateway.models import table_of
from loraserve.gateway.schema import Schema
from loraserve.gateway.site import GatewaySite
from loraserve.named_files import wrong
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
            raise NotFoundError("lora_path", "is not there")
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
def _named_as_asked() -> Iterator[None]:
    """Errors name the fields of the request."""
    try:
        yield
    except LoraServeError as error:
        error.field = _FIELDS.get(error.field, error.field)
        raise


class LoadAdapter:
    schema = LOAD

    def __init__(self, site: GatewaySite, roots: AdapterRoots) -> None:
        self._site = site
        self._roots = roots

    async def __call__(self, request: Request, caller: Caller) -> None:
        with _named_as_asked():
            await self._answer(request, caller)

    async def _answer(self, request: Request, caller: Caller) -> None:
        site = self._site
        body = await request.json(self.schema, site.max_body_bytes)
        client = site.sessions.of(caller)
        name = site.names.check_new(body["lora_name"], await table_of(client))
        base = site.names.base_of(body.get("base_model_name"))
        path = self._roots.find(body["lora_path"])
        mismatch = site.allow_base_mismatch
        try:
            info = await client.adapters.add(name, path, base=base, allow_base_mismatch=mismatch)
        except AlreadyExistsError:
            if not body.get("load_inplace", False):
                raise
            info = await client.adapters.update(name, path, base=base, allow_base_mismatch=mismatch)
        await client.wait_routes(
            lambda table: _revision(table, info.base, name) == info.revision, ROUTES_TIMEOUT_S
        )
        await client.wait_routable([name], base=info.base, timeout_s=ROUTABLE_TIMEOUT_S)
        text = f"Success: LoRA adapter '{name}' added successfully."
        await request.send_bytes(text.encode(), content_type=b"text/plain; charset=utf-8")


class UnloadAdapter:
    schema = UNLOAD

    def __init__(self, site: GatewaySite) -> None:
        self._site = site

    async def __call__(self, request: Request, caller: Caller) -> None:
        with _named_as_asked():
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
