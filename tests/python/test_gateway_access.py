"""Who may call which path of a gateway, and what a path may name."""

import logging
import os
from pathlib import Path

import pytest
from fake_node import BASE, FakeEngine
from http_site import ask, connected, fronted
from node_calls import run

from loraserve.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from loraserve.gateway.access import ACCESS, Gate
from loraserve.gateway.adapters import AdapterRoots
from loraserve.security import Role, TlsFiles, create_key

# Said twice on purpose, here and in ACCESS: a slip in one of them is found by the other.
WHO = {
    "GET /health": "",
    "GET /ping": "",
    "POST /ping": "",
    "GET /ready": "",
    "GET /version": "",
    "GET /openapi.json": "",
    "GET /metrics": "admin",
    "GET /v1/models": "admin user",
    "GET /v1/models/": "admin user",
    "POST /v1/completions": "admin user",
    "POST /v1/chat/completions": "admin user",
    "POST /tokenize": "admin user",
    "POST /detokenize": "admin user",
    "POST /v1/load_lora_adapter": "admin",
    "POST /v1/unload_lora_adapter": "admin",
}


def test_what_is_allowed_is_said_for_every_path() -> None:
    told = {
        f"{method} {path}": " ".join(sorted(role.value for role in roles))
        for (method, path), roles in ACCESS.items()
    }
    assert told == WHO


def test_each_role_gets_what_it_may_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {role.value: create_key(path, role.value, "acme", role) for role in Role}

    async def test() -> None:
        async with fronted(FakeEngine(), keys=path) as server:
            app = server._app
            assert {f"{method} {p}" for method, p in app._endpoints} == set(WHO)
            for name, roles in WHO.items():
                method, route = name.split()
                body = {} if method == "POST" else None
                route = route + BASE if route.endswith("/") else route
                strangers = [None, "Bearer", "Bearer ", "Basic x", "Bearer lsk_wrong", keys["user"]]
                for value in strangers:
                    headers = {} if value is None else {"authorization": value}
                    answer = await ask(server.address, route, body, method, headers)
                    if not roles:
                        assert answer.status == 200, (name, value)
                        continue
                    assert answer.status == 401, (name, value, answer)
                    assert answer.error["type"] == "authentication_error"
                for role, key in keys.items():
                    headers = {"authorization": f"Bearer {key}"}
                    answer = await ask(server.address, route, body, method, headers)
                    may = not roles or role in roles.split()
                    assert (answer.status not in (401, 403)) == may, (name, role, answer)

    run(test)


def test_the_node_hears_the_callers_own_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ann = create_key(path, "ann", "acme", Role.USER)
    bob = create_key(path, "bob", "bobs", Role.USER)
    body = {"model": BASE, "prompt": [5], "max_tokens": 2}

    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine, keys=path) as server:
            for key in (ann, bob, ann):
                headers = {"authorization": f"bearer {key}"}
                answer = await ask(server.address, "/v1/completions", body, headers=headers)
                assert answer.status == 200
            assert [call["tenant"] for call in engine.calls] == ["acme", "bobs", "acme"]

    run(test)


def test_clients_are_kept_for_so_many_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = [create_key(path, f"k{i}", "acme", Role.USER) for i in range(5)]
    body = {"model": BASE, "prompt": [5], "max_tokens": 2}

    async def test() -> None:
        async with fronted(FakeEngine(), keys=path) as server:
            sessions = server._site.sessions
            sessions._max_clients = 3
            for key in (*keys, *keys):
                headers = {"authorization": f"Bearer {key}"}
                answer = await ask(server.address, "/v1/completions", body, headers=headers)
                assert answer.status == 200
                assert len(sessions._clients) <= 3
            assert None in sessions._clients  # the gateway's own

    run(test)


def test_other_machines_are_served_with_keys_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidArgumentError, match="needs a key file"):
        Gate("0.0.0.0:8000", None)
    create_key(tmp_path / "keys", "ann", "acme", Role.USER)
    Gate("0.0.0.0:8000", tmp_path / "keys")
    assert caplog.messages == ["0.0.0.0:8000 is not encrypted: keys can be read on the way"]
    caplog.clear()
    Gate("0.0.0.0:8000", tmp_path / "keys", TlsFiles(Path("cert"), Path("key")))
    assert caplog.messages == []


def test_paths_of_adapters_stay_under_the_roots(tmp_path: Path) -> None:
    inside, other, outside = (tmp_path / name for name in ("in", "other", "out"))
    for folder in (inside / "sql", other / "x", outside / "secret"):
        folder.mkdir(parents=True)
    (inside / "link").symlink_to(outside / "secret")
    (inside / "fine").symlink_to(inside / "sql")
    roots = AdapterRoots([inside, other])
    assert roots.find("sql") == (inside / "sql").resolve()
    assert roots.find(str(inside / "sql")) == (inside / "sql").resolve()
    assert roots.find(str(other / "x")) == (other / "x").resolve()
    assert roots.find("fine") == (inside / "sql").resolve()
    assert roots.find("sql/../sql/.") == (inside / "sql").resolve()
    for path in (
        *("..", "../out/secret", "/etc/passwd", "link", "/", "~", "sql/../../out"),
        *(str(outside), str(inside) + "-more", f"{inside}/../out/secret", "//etc"),
    ):
        if path != "~":
            with pytest.raises(PermissionDeniedError, match="lora_path"):
                roots.find(path)
    for path in ("absent", "~", str(inside / "absent")):
        with pytest.raises(NotFoundError, match="lora_path"):
            roots.find(path)
    for path in ("a\0b", "x" * 5000):
        with pytest.raises((InvalidArgumentError, NotFoundError)):
            roots.find(path)
    with pytest.raises(PermissionDeniedError, match="no --adapter-root"):
        AdapterRoots([]).find(os.fspath(inside))
    with pytest.raises(InvalidArgumentError, match="adapter-root"):
        AdapterRoots([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "http://[::1]"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_keys_other_sites_are_refused(headers: dict[str, str], status: int) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            answer = await ask(server.address, "/v1/models", headers=headers)
            assert answer.status == status
            if status == 403:
                assert answer.error["param"] in ("Host", "Origin")
            assert (await ask(server.address, "/health", headers=headers)).status == 200

    run(test)


def test_a_body_of_no_type_is_refused() -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server, connected(server.address) as client:
            body = b'{"prompt": "x"}'
            await client.send(
                b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            answer = await client.answer()
            assert answer.status == 415
            assert answer.error["param"] == "Content-Type"

    run(test)


def test_what_strangers_have_refused_is_below_the_logs_level(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys"
    user = {"authorization": f"Bearer {create_key(keys, 'u', 'acme', Role.USER)}"}
    caplog.set_level(logging.DEBUG, "loraserve.gateway.requests")

    async def levels(address: str, path: str, headers: dict[str, str]) -> list[str]:
        caplog.clear()
        answer = await ask(address, path, {"model": BASE, "nothing": 1}, headers=headers)
        assert 400 <= answer.status < 500, path
        ended = [r for r in caplog.records if r.message.startswith("request ended")]
        return [r.levelname for r in ended]

    async def test() -> None:
        async with fronted(FakeEngine(), keys=keys) as server:
            for path in ("/v1/completions", "/tokenize", "/v1/load_lora_adapter", "/none"):
                assert await levels(server.address, path, {}) == ["DEBUG"], path
            assert await levels(server.address, "/tokenize", user) == ["DEBUG"]
            plain = {"content-type": "text/plain"}
            for headers in (user, user | plain):
                assert await levels(server.address, "/v1/completions", headers) == ["INFO"]

    run(test)
