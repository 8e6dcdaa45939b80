"""The one gate of every server: no RPC runs unless its row here names a role of the caller."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from loraserve.errors import LoraServeError, PermissionDeniedError, UnauthenticatedError
from loraserve.security.identity import Identity, Role, check_name
from loraserve.security.keys import KeyRing
from loraserve.wire_errors import abort

_USER = frozenset({Role.USER, Role.ADMIN})
_OPERATOR = frozenset({Role.ADMIN, Role.NODE})
_ADMIN = frozenset({Role.ADMIN})
_NODE = frozenset({Role.NODE})
_ALL = frozenset(Role)

# An empty set: open, even without a key.
ACCESS: Mapping[str, frozenset[Role]] = {
    "/loraserve.v1.InferenceService/Generate": _USER,
    "/loraserve.v1.InferenceService/StepStream": _USER,
    "/loraserve.v1.AdapterService/CreateAdapter": _USER,
    "/loraserve.v1.AdapterService/UpdateAdapter": _USER,
    "/loraserve.v1.AdapterService/GetAdapter": _USER,
    "/loraserve.v1.AdapterService/ListAdapters": _USER,
    "/loraserve.v1.AdapterService/DeleteAdapter": _USER,
    "/loraserve.v1.AdapterService/ReadAdapter": _NODE,
    "/loraserve.v1.NodeService/LoadAdapter": _OPERATOR,
    "/loraserve.v1.NodeService/UnloadAdapter": _OPERATOR,
    "/loraserve.v1.NodeService/ListResidency": _OPERATOR,
    "/loraserve.v1.NodeService/GetNodeInfo": _ALL,
    "/loraserve.v1.NodeService/Drain": _OPERATOR,
    "/loraserve.v1.NodeService/Abort": _USER,
    "/loraserve.v1.PeerService/LeaseCopy": _NODE,
    "/loraserve.v1.PeerService/ReleaseCopy": _NODE,
    "/loraserve.v1.PeerService/ReadCopy": _NODE,
    "/loraserve.v1.ControllerService/RegisterNode": _NODE,
    "/loraserve.v1.ControllerService/Heartbeat": _NODE,
    "/loraserve.v1.ControllerService/WatchRoutes": _ALL,
    "/loraserve.v1.ControllerService/ResolveAdapter": _NODE,
    "/loraserve.v1.ControllerService/GetClusterStatus": _ADMIN,
    "/grpc.health.v1.Health/Check": frozenset(),
    "/grpc.health.v1.Health/List": _ALL,
    "/grpc.health.v1.Health/Watch": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ALL,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _ALL,
}

_identity: contextvars.ContextVar[Identity] = contextvars.ContextVar("loraserve_identity")


def current_identity() -> Identity:
    """The caller of the RPC that runs in this task.

    Raises UnauthenticatedError outside an RPC that passed the gate, so a servicer that is served
    without one serves nobody.
    """
    try:
        return _identity.get()
    except LookupError:
        raise UnauthenticatedError("authorization", "the call passed no access check") from None


def identity_of_certificate(auth_context: Mapping[str, Any]) -> Identity | None:
    """The caller that a verified client certificate names by a SAN URI
    `loraserve://TENANT/ROLE/NAME`; None without one."""
    for value in auth_context.get("peer_uri", ()):
        uri = urlsplit(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
        parts = uri.path.split("/")
        if uri.scheme != "loraserve" or len(parts) != 3:
            continue
        try:
            role = frozenset({Role(parts[1])})
            return Identity(check_name("name", parts[2]), check_name("tenant", uri.netloc), role)
        except (ValueError, LoraServeError):
            continue
    return None


def _check(method: str, identity: Identity | None) -> Identity:
    roles = ACCESS.get(method, frozenset())
    if identity is None:
        raise UnauthenticatedError(
            "authorization",
            "needs `Bearer KEY` with a key of this cluster (of commands: --api-key-file, or "
            "LORASERVE_API_KEY)",
        )
    if not roles & identity.roles:
        held = ", ".join(sorted(role.value for role in identity.roles))
        raise PermissionDeniedError("authorization", f"role {held} may not call {method}")
    return identity


def _refusal(error: LoraServeError) -> grpc.RpcMethodHandler[Any, Any]:
    """Answers any kind of call before it reads a message of it."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _checked_by_certificate(
    method: str, handler: grpc.RpcMethodHandler[Any, Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler` behind a check that needs the connection, which only its context knows."""

    async def enter(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            _identity.set(_check(method, identity_of_certificate(context.auth_context())))
        except LoraServeError as error:
            await abort(context, error)

    run: Any = (
        (handler.stream_stream or handler.unary_stream)
        if handler.response_streaming
        else (handler.stream_unary or handler.unary_unary)
    )

    async def call(request: Any, context: Any) -> Any:
        await enter(context)
        return await run(request, context)

    async def stream(request: Any, context: Any) -> Any:
        await enter(context)
        answers = run(request, context)
        if not hasattr(answers, "__aiter__"):
            await answers
            return
        async for answer in answers:
            yield answer

    kinds: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return kinds[handler.request_streaming, handler.response_streaming](
        stream if handler.response_streaming else call,
        handler.request_deserializer,
        handler.response_serializer,
    )


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that ACCESS does not allow, before its first message is read."""

    def __init__(
        self,
        keys: KeyRing | None,
        certificates: bool = False,
        everyone: Identity | None = None,
    ) -> None:
        """`keys` identify bearers; `certificates`: also take SAN URIs of client certificates;
        `everyone`: who a call without a key is, for servers without keys."""
        self._keys = keys
        self._certificates = certificates
        self._everyone = everyone

    def _bearer(self, details: grpc.HandlerCallDetails) -> str | None:
        found = [v for k, v in details.invocation_metadata or () if k == "authorization"]
        if not found:
            return None
        if len(found) > 1:
            raise UnauthenticatedError("authorization", "given more than once")
        text = found[0].decode("latin-1") if isinstance(found[0], bytes) else found[0]
        scheme, _, key = text.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError("authorization", "is not `Bearer KEY`")
        return key

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if method in ACCESS and not ACCESS[method]:
            return await continuation(handler_call_details)
        try:
            bearer = self._bearer(handler_call_details)
            if bearer is None and self._certificates:
                # Who calls is known with the connection only; what is called can be checked now.
                handler = await continuation(handler_call_details) if method in ACCESS else None
                if handler is None:
                    raise PermissionDeniedError("method", f"no such RPC here: {method}")
                return _checked_by_certificate(method, handler)
            identity = self._everyone
            if bearer is not None and self._keys is not None:
                identity = self._keys.identify(bearer)
            # Set in the task that goes on to run the RPC's code.
            _identity.set(_check(method, identity))
        except LoraServeError as error:
            return _refusal(error)
        return await continuation(handler_call_details)
