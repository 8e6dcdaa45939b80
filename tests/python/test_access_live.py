"""Who may call what, asked of the running daemons RPC by RPC."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from certificates import certificate
from controller_fixtures import controller
from every_rpc import OPEN, RPCS, call
from fake_node import BASE, FakeEngine, blob, serving, until
from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from node_calls import answers, generate, refused, run

from loraserve.controller.admission import PackedCheck
from loraserve.security import ACCESS, Role, channel_credentials, create_key
from loraserve.security.tls import TlsFiles
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc
from loraserve.wire import bearer_metadata, dial

# Said twice on purpose, here and in ACCESS: a slip in one of them is found by the other.
WHO = {
    "Generate": "admin user",
    "StepStream": "admin user",
    "CreateAdapter": "admin user",
    "UpdateAdapter": "admin user",
    "GetAdapter": "admin user",
    "ListAdapters": "admin user",
    "DeleteAdapter": "admin user",
    "ReadAdapter": "node",
    "LoadAdapter": "admin node",
    "UnloadAdapter": "admin node",
    "ListResidency": "admin node",
    "GetNodeInfo": "admin node user",
    "Drain": "admin node",
    "Abort": "admin user",
    "LeaseCopy": "node",
    "ReleaseCopy": "node",
    "ReadCopy": "node",
    "RegisterNode": "node",
    "Heartbeat": "node",
    "WatchRoutes": "admin node user",
    "ResolveAdapter": "node",
    "GetClusterStatus": "admin",
    "Check": "",
    "Watch": "admin node user",
    "List": "admin node user",
    "ServerReflectionInfo": "admin node user",
}
SERVED_BY = {
    "node": ("InferenceService", "NodeService", "PeerService", "Health", "ServerReflection"),
    "controller": ("AdapterService", "ControllerService", "Health", "ServerReflection"),
}
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def keys_in(path: Path) -> dict[str, Any]:
    path.unlink(missing_ok=True)
    return {r.value: bearer_metadata(create_key(path, r.value, "acme", r)) for r in Role}


async def ask_everything(daemon: str, channel: grpc.aio.Channel, keys: dict[str, Any]) -> None:
    strangers = [(), bearer_metadata("lsk_wrong"), bearer_metadata(""), (("authorization", "x"),)]
    strangers.append((("authorization", "Basic x"),))
    twice = keys["admin"] * 2
    for path in sorted(RPCS, key=lambda path: path.endswith("/Drain")):  # the last of all
        service, name = path.split("/")[1:]
        served = service.rsplit(".", 1)[1] in SERVED_BY[daemon]
        if path in OPEN:
            assert (await call(channel, path))[0] not in REFUSALS, path
            continue
        for metadata in (*strangers, twice):
            assert (await call(channel, path, metadata))[0] == "UNAUTHENTICATED", path
        for role in Role:
            code, details = await call(channel, path, keys[role.value])
            if role.value not in WHO[name].split():
                assert code == "PERMISSION_DENIED", (path, role, details)
            elif served:
                assert code not in REFUSALS, (path, role, details)
                assert not details.startswith("Method not"), (path, role, details)
            else:
                assert (code, details[:10]) == ("UNIMPLEMENTED", "Method not"), (path, role)


def test_what_is_allowed_is_said_for_every_rpc() -> None:
    names = {path.rsplit("/", 1)[1] for path in RPCS}
    assert len(names) == len(RPCS)
    assert names == set(WHO)
    for path, roles in ACCESS.items():
        told = " ".join(sorted(role.value for role in roles))
        assert told == WHO[path.rsplit("/", 1)[1]], path


def test_the_node_opens_to_each_role_what_it_may_call_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        keys = keys_in(tmp_path / "keys")
        async with serving(FakeEngine(), keys=tmp_path / "keys") as (_, channel):
            await ask_everything("node", channel, keys)
            for name in ("/loraserve.v1.NodeService/Erase", "/x/y"):
                assert (await call(channel, name))[0] == "UNAUTHENTICATED"
                assert (await call(channel, name, keys["admin"]))[0] == "PERMISSION_DENIED"

    run(test)


def test_the_controller_opens_to_each_role_what_it_may_call_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with controller(tmp_path, metrics_listen="127.0.0.1:0") as site:
            keys = keys_in(tmp_path / "others")
            for name in ("node", "admin"):
                keys[name] = site.auth(name)
            keys["user"] = site.auth("acme")
            async with dial(site.server.address) as channel:
                await ask_everything("controller", channel, keys)
                await call(channel, "/x/y", keys["admin"])
            series = site.server.metrics.registry.get_sample_value
            assert series("loraserve_requests_total", {"method": "/x/y"}) is None

    run(test)


def test_names_that_no_service_has_leave_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        user = keys_in(tmp_path / "keys")["user"]
        async with serving(FakeEngine(), keys=tmp_path / "keys") as (server, channel):
            health: Any = health_pb2_grpc.HealthStub(channel)
            for index in range(3):
                unknown = health_pb2.HealthCheckRequest(service=str(index) * 200_000)
                for call in (
                    health.Check(unknown),
                    health.Watch(unknown, metadata=user).read(),
                ):
                    assert (await refused(call)).code == "NOT_FOUND"
                with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                    await health.Watch(unknown).read()
            assert not server._health._server_watchers
            assert len(server._health._server_status) == 4
            watching = health.Watch(health_pb2.HealthCheckRequest(), metadata=user)
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            watching.cancel()

    run(test)


def fields_of(message: Descriptor, seen: set[str]) -> Iterator[str]:
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field.full_name
        if field.message_type is not None:
            yield from fields_of(field.message_type, seen)


def test_no_message_of_a_user_can_name_a_tenant() -> None:
    for path, roles in ACCESS.items():
        if Role.USER in roles and path in RPCS:
            named = [f for f in fields_of(RPCS[path].input_type, set()) if "tenant" in f]
            assert not named, path


# TLS


def test_tls_with_keys(tmp_path: Path) -> None:
    certificate(tmp_path, "ca", "", None)
    certificate(tmp_path, "other-ca", "", None)
    own = certificate(tmp_path, "server", "IP:127.0.0.1", "ca")
    only_server = TlsFiles(own.cert, own.key)
    trusting = channel_credentials(TlsFiles(ca=own.ca))
    doubting = channel_credentials(TlsFiles(ca=tmp_path / "other-ca.pem"))

    async def test() -> None:
        keys = keys_in(tmp_path / "keys")
        options = {"keys": tmp_path / "keys", "tls": only_server}
        async with serving(FakeEngine(), **options) as (server, plain):
            async with dial(server.address, trusting) as channel:
                assert len(await answers(channel, metadata=keys["user"])) == 3
                assert (await refused(answers(channel))).code == "UNAUTHENTICATED"
            async with dial(server.address, doubting) as channel:
                error = await refused(answers(channel, metadata=keys["user"]))
                assert error.code == "UNAVAILABLE"
            assert (await refused(answers(plain, metadata=keys["user"]))).code == "UNAVAILABLE"

    run(test)


def test_a_cluster_of_certificates_alone(tmp_path: Path) -> None:
    """No key anywhere: everybody is who the certificate says, tokens and all."""
    certificate(tmp_path, "ca", "", None)
    hosts = "IP:127.0.0.1,DNS:localhost"
    lead = certificate(tmp_path, "lead", hosts, "ca")
    one = certificate(tmp_path, "one", f"URI:loraserve://cluster/node/n1,{hosts}", "ca")
    ann, bob = (
        channel_credentials(certificate(tmp_path, who, f"URI:loraserve://{who}/user/{who}", "ca"))
        for who in ("ann", "bob")
    )
    stranger = channel_credentials(TlsFiles(ca=lead.ca))

    async def create(address: str) -> Any:
        async with dial(address, ann) as channel:
            stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
            about = adapter_pb2.CreateAdapterDescription(
                base=BASE, name="sql", size_bytes=len(blob("a"))
            )
            first = adapter_pb2.CreateAdapterRequest(description=about)
            chunk = adapter_pb2.CreateAdapterRequest(chunk=blob("a"))
            made = (await stub.CreateAdapter([first, chunk])).adapter
            await call(channel, "/made.up/Name")
            return made

    async def test() -> None:
        engine = FakeEngine(step_s=0.005)
        secured = {"controller_tls": one, "tls": one}
        async with controller(tmp_path, new_check=PackedCheck, keys={}, tls=lead) as site:
            made = await create(site.server.address)
            assert made.tenant == "ann"
            series = site.server.metrics.registry.get_sample_value
            assert series("loraserve_requests_total", {"method": "/made.up/Name"}) is None
            async with serving(engine, controller=site.server.address, **secured) as (server, _):
                await until(lambda: bool(engine.loaded), "placed and loaded")
                sql = {"name": "sql"}
                async with dial(server.address, ann) as channel:
                    out = await answers(channel, adapter=sql)
                    assert [list(m.token_ids) for m in out] == [[2], [3], [4]]
                    assert engine.calls[0]["tenant"] == "ann"
                    running = generate(channel, sampling={"max_tokens": 10000})
                    await running.read()
                    running.cancel()
                    await until(lambda: not engine.live, "freed")
                    drain = await call(channel, "/loraserve.v1.NodeService/Drain")
                    assert drain[0] == "PERMISSION_DENIED"
                async with dial(server.address, bob) as channel:
                    assert (await refused(answers(channel, adapter=sql))).code == "NOT_FOUND"
                    bearer = bearer_metadata("lsk_made_up")
                    error = await refused(answers(channel, metadata=bearer))
                    assert error.code == "UNAUTHENTICATED"
                async with dial(server.address, stranger) as channel:
                    assert (await refused(answers(channel))).code == "UNAVAILABLE"

    run(test)
