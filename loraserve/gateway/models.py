"""The models that a caller sees: base models, and the adapters of its tenant."""

import time
from typing import Any

from loraserve.client import AsyncClient
from loraserve.client.route_table import AdapterRoute, RouteTable
from loraserve.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from loraserve.security.identity import check_base, check_name

FIRST_TABLE_TIMEOUT_S = 3.0


class ModelNames:
    """What `model` of a request means."""

    def __init__(
        self, base: str = "", aliases: tuple[str, ...] = (), *, one_base: bool = False
    ) -> None:
        """`base`: name of the base model, where the gateway serves one of several. `aliases`: other
        names of it. `one_base`: other base models are refused, as the gateway's tokenizer is not
        theirs."""
        self._one_base = one_base
        self._base = base
        self._aliases = frozenset(aliases)
        self._started_s = int(time.time())

    def resolve(self, model: str, table: RouteTable) -> tuple[str, str | None]:
        """As `_named`. Raises InvalidArgumentError for other base models too, where the gateway
        serves one."""
        base, adapter = self._named(model, table)
        if self._one_base:
            own = self._base or next(iter(table.bases()), "")
            if not self._base and len(table.bases()) > 1:
                raise InvalidArgumentError("model", "the cluster has several bases: set --base")
            if base not in ("", own):
                raise InvalidArgumentError("model", f"this gateway serves {own!r}, not {base!r}")
        return base, adapter

    def _named(self, model: str, table: RouteTable) -> tuple[str, str | None]:
        """(base, adapter) of `model`: an adapter's name, a base model's, or `base:adapter`. An
        adapter that the table does not know is the nodes' to find or refuse.

        Raises InvalidArgumentError where no model can have the name.
        """
        if self._is_base(model, table):
            return (self._base if model in self._aliases else model), None
        base, colon, adapter = model.rpartition(":")
        if not colon:
            return self._base, check_name("model", model)
        if base in self._aliases:
            base = self._base
        return check_base("model", base), check_name("model", adapter)

    def _is_base(self, model: str, table: RouteTable) -> bool:
        return model in self._aliases or model == self._base or model in table.bases()

    def served_base(self, table: RouteTable) -> str:
        """The base model's name, for metrics; where there are several, all of them."""
        return self._base or ",".join(sorted(base for base in table.bases() if base))

    def base_of(self, named: str | None) -> str:
        """The base model that is meant where a request names it or does not. Raises
        InvalidArgumentError."""
        if named is None or named in self._aliases:
            return self._base
        return check_base("base_model_name", named)

    def check_new(self, adapter: str, table: RouteTable) -> str:
        """The name for a new adapter. Raises InvalidArgumentError where it is that of a base."""
        check_name("lora_name", adapter)
        if self._is_base(adapter, table):
            raise InvalidArgumentError("lora_name", f"{adapter!r} is the base model's name")
        return adapter

    def list(self, table: RouteTable) -> dict[str, Any]:
        """What GET /v1/models answers."""
        bases = sorted(base for base in table.bases() | {self._base} if base)
        if self._base:
            bases = [self._base]
        entries = [self._entry(name, base) for base in bases for name in (base, *self._aliases)]
        unique = len(bases) <= 1
        for route in sorted(
            table.adapters.values(), key=lambda r: (r.adapter.base, r.adapter.name)
        ):
            if route.adapter.base in bases:
                entries.append(self._adapter_entry(route, unique))
        return {"object": "list", "data": entries}

    def find(self, model: str, table: RouteTable) -> dict[str, Any]:
        """What GET /v1/models/{model} answers. Raises NotFoundError."""
        for entry in self.list(table)["data"]:
            if entry["id"] == model:
                found: dict[str, Any] = entry
                return found
        raise NotFoundError("model", f"there is no {model[:80]!r}")

    def _entry(self, name: str, root: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "loraserve",
            "root": root,
            "parent": None,
        }

    def _adapter_entry(self, route: AdapterRoute, unique: bool) -> dict[str, Any]:
        name = route.adapter.name
        entry = self._entry(name if unique else f"{route.adapter.base}:{name}", route.revision)
        return entry | {"parent": route.adapter.base}


async def resolve(client: AsyncClient, names: ModelNames, model: str) -> tuple[str, str | None]:
    """(base, adapter) of `model`, for this client's caller.

    An adapter that the routes do not name is asked of the controller: it may be new, and one that
    was removed may still lie on a node, which would answer. Raises InvalidArgumentError,
    NotFoundError, UnavailableError.
    """
    table = await table_of(client)
    base, adapter = names.resolve(model, table)
    if adapter is not None and not table.every_node and table.find(base, adapter) is None:
        try:
            await client.adapters.get(adapter, base=base)
        except (UnavailableError, DeadlineExceededError):
            pass  # without a controller nodes know best
        except NotFoundError:
            raise NotFoundError("model", f"there is no {model[:80]!r}") from None
    return base, adapter


async def table_of(client: AsyncClient) -> RouteTable:
    """The client's routes, once there are any. Raises UnavailableError."""
    await client.wait_table(FIRST_TABLE_TIMEOUT_S)
    return client.routes
