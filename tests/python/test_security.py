"""The gate: every RPC is refused without a key, and every key opens what its role may open."""

import asyncio
import importlib
import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from certificates import certificate
from every_rpc import FILES, OPEN, RPCS, call
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraserve.errors import InvalidArgumentError, UnauthenticatedError
from loraserve.security import (
    ACCESS,
    KeyRing,
    Role,
    TlsFiles,
    authenticator,
    channel_credentials,
    check_exposure,
    create_key,
    current_identity,
    server_credentials,
)
from loraserve.wire import SERVER_OPTIONS, bearer_metadata, bind, dial


class Echo:
    """A servicer of any service: answers with who calls, in `details` of an abort."""

    def __getattr__(self, name: str) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            who = current_identity()
            roles = ",".join(sorted(role.value for role in who.roles))
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"{who.name} {who.tenant} {roles}")

        return answer


async def serve(gate: Any, credentials: Any = None) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS)
    for name in FILES:
        module = importlib.import_module(f"loraserve.v1.{name}_pb2_grpc")
        for attribute in dir(module):
            if attribute.startswith("add_"):
                getattr(module, attribute)(Echo(), server)
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
    address = bind(server, "127.0.0.1:0", credentials)
    await server.start()
    return server, address


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys.jsonl"
    made = {role.value: create_key(path, f"{role.value}1", "acme", role) for role in Role}
    return made | {"path": str(path)}


def test_the_table_names_every_rpc_and_nothing_else() -> None:
    assert set(RPCS) - set(ACCESS) == set()
    extra = set(ACCESS) - set(RPCS)
    assert extra == {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}
    assert {path for path, roles in ACCESS.items() if not roles} == OPEN


def test_every_rpc_is_refused_without_a_key_and_allowed_by_role(keys: dict[str, str]) -> None:
    async def run() -> None:
        server, address = await serve(authenticator("127.0.0.1:1", Path(keys["path"])))
        async with dial(address) as channel:
            for path in RPCS:
                if path in OPEN:
                    assert (await call(channel, path))[0] in ("OK", "CANCELLED"), path
                    continue
                for metadata in ((), bearer_metadata("lsk_wrong"), (("authorization", "Basic x"),)):
                    assert (await call(channel, path, metadata))[0] == "UNAUTHENTICATED", path
                for role in Role:
                    code, details = await call(channel, path, bearer_metadata(keys[role.value]))
                    if role not in ACCESS[path]:
                        assert code == "PERMISSION_DENIED", (path, role)
                    elif path.startswith("/loraserve."):
                        assert (code, details) == (
                            "OUT_OF_RANGE",
                            f"{role.value}1 acme {role.value}",
                        ), path
                    else:
                        assert code in ("OK", "CANCELLED", "UNIMPLEMENTED"), (path, role)
        await server.stop(None)

    asyncio.run(run())


def test_an_rpc_outside_the_table_is_refused_whatever_the_key(keys: dict[str, str]) -> None:
    async def run() -> tuple[str, str]:
        server, address = await serve(authenticator("127.0.0.1:1", Path(keys["path"])))
        async with dial(address) as channel:
            path = "/loraserve.v1.InferenceService/Erase"
            stranger = await call(channel, path)
            admin = await call(channel, path, bearer_metadata(keys["admin"]))
        await server.stop(None)
        return stranger[0], admin[0]

    assert asyncio.run(run()) == ("UNAUTHENTICATED", "PERMISSION_DENIED")


def test_two_calls_at_once_do_not_mix_identities(keys: dict[str, str], tmp_path: Path) -> None:
    path = Path(keys["path"])
    other = create_key(path, "other", "umbrella", Role.USER)

    async def run() -> None:
        server, address = await serve(authenticator("127.0.0.1:1", path))
        async with dial(address) as channel:
            rpc = "/loraserve.v1.AdapterService/GetAdapter"
            calls = [call(channel, rpc, bearer_metadata(key)) for key in (keys["user"], other) * 20]
            answers = [details for _, details in await asyncio.gather(*calls)]
        assert answers == ["user1 acme user", "other umbrella user"] * 20
        await server.stop(None)

    asyncio.run(run())


def test_outside_an_rpc_there_is_nobody() -> None:
    with pytest.raises(UnauthenticatedError):
        current_identity()


def test_without_keys_loopback_is_open_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        gate = authenticator("127.0.0.1:7000", None)
    assert "no key file" in caplog.text

    async def run() -> tuple[str, str]:
        server, address = await serve(gate)
        async with dial(address) as channel:
            answer = await call(channel, "/loraserve.v1.ControllerService/Heartbeat")
        await server.stop(None)
        return answer

    assert asyncio.run(run()) == ("OUT_OF_RANGE", "anyone default admin,node,user")


@pytest.mark.parametrize("address", ["0.0.0.0:70", "[::]:70", "10.1.2.3:70", "some-host:70"])
def test_without_keys_nothing_but_loopback(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidArgumentError, match=r"keys: .*needs a key file"):
        check_exposure(address, keys=False, tls=None)
    assert caplog.messages == []
    check_exposure(address, keys=True, tls=None)
    assert caplog.messages == [f"{address} is not encrypted: keys can be read on the way"]
    caplog.clear()
    check_exposure(address, keys=True, tls=TlsFiles(Path("cert"), Path("key")))
    assert caplog.messages == []


def test_the_key_file_holds_no_key(keys: dict[str, str]) -> None:
    path = Path(keys["path"])
    text = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    for role in Role:
        key = keys[role.value]
        assert key not in text
        assert len(key) >= 40
        found = KeyRing.load(path).identify(key)
        assert found is not None
        assert found.roles == {role}
        assert KeyRing.load(path).identify(key[:-1]) is None
    assert KeyRing.load(path).identify("x" * 10_000_000) is None


def test_a_name_has_one_key(keys: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="user1"):
        create_key(Path(keys["path"]), "user1", "acme", Role.USER)


GOOD = {"name": "a", "tenant": "t", "role": "user", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[]", "needs exactly"),
        (json.dumps({**GOOD, "role": "root"}), "role"),
        (json.dumps({**GOOD, "sha256": "0" * 63}), "sha256"),
        (json.dumps({**GOOD, "sha256": 7}), "string"),
        (json.dumps({**GOOD, "tenant": "../other"}), "tenant"),
        (json.dumps({**GOOD, "key": "plain"}), "needs exactly"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "two keys of one name"),
        ("", "no key in it"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidArgumentError, match=f"^keys: {path}: .*{named}"):
        KeyRing.load(path)
    with pytest.raises(InvalidArgumentError, match=r"/absent: No such file or directory$"):
        KeyRing.load(tmp_path / "absent")


def test_a_client_certificate_is_an_identity(tmp_path: Path) -> None:
    certificate(tmp_path, "ca", "", None)
    files = certificate(tmp_path, "server", "IP:127.0.0.1,DNS:localhost", "ca")
    node = certificate(tmp_path, "node", "URI:loraserve://acme/node/n1", "ca")
    nobody = certificate(tmp_path, "nobody", "URI:loraserve://acme/root/n1", "ca")

    async def answer(address: str, credentials: Any, path: str) -> tuple[str, str]:
        async with dial(address, credentials) as channel:
            return await call(channel, f"/loraserve.v1.ControllerService/{path}")

    async def run() -> None:
        gate = authenticator("127.0.0.1:1", None, files)
        server, address = await serve(gate, server_credentials(files))
        for path in ("RegisterNode", "Heartbeat", "WatchRoutes"):
            code = await answer(address, channel_credentials(node), path)
            assert code == ("OUT_OF_RANGE", "n1 acme node")
            refused, _ = await answer(address, channel_credentials(nobody), path)
            assert refused == "UNAUTHENTICATED"
        stranger = channel_credentials(TlsFiles(ca=tmp_path / "ca.pem"))
        assert (await answer(address, stranger, "WatchRoutes"))[0] == "UNAVAILABLE"
        async with dial(address, channel_credentials(node)) as channel:
            denied = await call(channel, "/loraserve.v1.InferenceService/Generate")
            assert denied[0] == "PERMISSION_DENIED"
        await server.stop(None)

    asyncio.run(run())


def test_tls_files_are_checked_at_start(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("not a certificate")
    with pytest.raises(InvalidArgumentError, match="go together"):
        TlsFiles(cert=tmp_path / "x.pem")
    with pytest.raises(InvalidArgumentError, match=r"tls-cert: .*not a PEM"):
        server_credentials(TlsFiles(tmp_path / "x.pem", tmp_path / "x.pem"))
    with pytest.raises(InvalidArgumentError, match=r"^tls-ca: .*/absent: No such file"):
        channel_credentials(TlsFiles(ca=tmp_path / "absent"))


def test_tls_files_that_only_look_right_are_named(tmp_path: Path) -> None:
    one = certificate(tmp_path, "ca", "", None)
    two = certificate(tmp_path, "two", "IP:127.0.0.1", "ca")
    for kind in ("CERTIFICATE", "PRIVATE KEY"):
        text = f"-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n"
        (tmp_path / f"{kind[:4]}.pem").write_text(text)
    bad_cert, bad_key = tmp_path / "CERT.pem", tmp_path / "PRIV.pem"
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", one.key, "-out", locked, "-passout", "pass:x"]
    subprocess.run(command, check=True, capture_output=True)
    for make, ca in ((server_credentials, "tls-client-ca"), (channel_credentials, "tls-ca")):
        make(one)
        make(two)
        for files, field in (
            (TlsFiles(bad_cert, one.key), "tls-cert"),
            (TlsFiles(one.cert, bad_key), "tls-key"),
            (TlsFiles(one.cert, two.key), "tls-key"),
            (TlsFiles(one.cert, locked), "tls-key"),
            (TlsFiles(one.cert, one.key, bad_cert), ca),
            (TlsFiles(one.cert, one.key, bad_key), ca),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                make(files)
            assert caught.value.field == field
            assert str(tmp_path) in caught.value.message


def test_a_key_file_without_its_last_newline_can_be_added_to(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    create_key(path, "one", "acme", Role.USER)
    path.write_text(path.read_text().rstrip("\n"))
    create_key(path, "two", "acme", Role.USER)
    create_key(path, "three", "acme", Role.USER)
    assert KeyRing.load(path).names == {"one", "two", "three"}
    assert "\n\n" not in path.read_text()
