"""A client, a controller and two nodes: answers, errors and adapters, over real sockets."""

import contextlib
import itertools
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loraserve import Client, Engine, EngineConfig, SamplingParams
from loraserve.cli import main
from loraserve.client import RetryPolicy
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import SKILLS, expected_answer, held_out_words, prompt
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
)

Site = tuple[Cluster, Client]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
# Nothing waits so long but what hangs.
PATIENCE_S = 60.0
NAMES: list[str | None] = [None, *(skill.name for skill in SKILLS)]


def test_answers_equal_those_of_the_embedded_engine(cluster: Site) -> None:
    _, client = cluster
    words = held_out_words(22, seed=5)
    cases = [
        (
            prompt(word),
            NAMES[i % len(NAMES)],
            SamplingParams(
                max_tokens=24,
                temperature=(0.0, 1.3)[i % 2],
                seed=1000 + i,
                logprobs=2,
                ignore_eos=i % 3 == 0,
            ),
        )
        for i, word in enumerate(words)
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        served = list(
            pool.map(lambda case: client.generate(case[0], case[2], adapter=case[1]), cases)
        )
    with Engine(EngineConfig(model=MODEL_DIRECTORY)) as engine:
        for skill in SKILLS:
            engine.load_adapter(skill.name, adapter_directory(skill.name))
        for (text, name, params), got in zip(cases, served, strict=True):
            (want,) = engine.generate([text], params, [name])
            assert got.token_ids == want.token_ids
            assert got.text == want.text
            assert got.finish_reason == want.finish_reason
            assert got.logprobs == pytest.approx(np.array(want.logprobs, np.float32), abs=0)
            assert got.revision == want.revision
            assert got.seed == params.seed
            assert got.prompt_tokens == want.prompt_tokens
    assert {completion.node_id for completion in served} == {"node-1", "node-2"}


def test_a_stream_brings_every_token_once(cluster: Site) -> None:
    _, client = cluster
    word = "sabrodel"
    with client.stream(prompt(word), GREEDY, adapter="stutter") as stream:
        chunks = list(stream)
    completion = stream.completion()
    assert completion.text == "".join(c.text for c in chunks) == expected_answer("stutter", word)
    assert [i for c in chunks for i in c.token_ids] == completion.token_ids
    index = 0
    for chunk in chunks:
        assert chunk.first_index == index
        index += len(chunk.token_ids)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "stop"


def test_stop_strings_never_reach_the_client(cluster: Site) -> None:
    _, client = cluster
    answer = expected_answer("upper", "kavoti")
    params = SamplingParams(max_tokens=24, temperature=0.0, stop=[answer[2:4]])
    completion = client.generate(prompt("kavoti"), params, adapter="upper")
    assert completion.text == answer[:2]
    assert completion.stop_reason == answer[2:4]


@pytest.mark.parametrize(
    ("wanted", "field", "change"),
    [
        (NotFoundError, "adapter", {"adapter": "nobody"}),
        (NotFoundError, "base", {"base": "another-model", "adapter": None}),
        (NotFoundError, "adapter", {"adapter": "upper", "revision": "0" * 64}),
        (InvalidArgumentError, "adapter", {"adapter": "../etc"}),
        (InvalidArgumentError, "token_ids", {"prompt": []}),
        (InvalidArgumentError, "prompt", {"prompt": [3, 10_000_000]}),
        (InvalidArgumentError, "prompt", {"prompt": [-1]}),
        (InvalidArgumentError, "token_ids", {"prompt": [3] * 100_000}),
        (InvalidArgumentError, "max_tokens", {"params": SamplingParams(max_tokens=0)}),
        (InvalidArgumentError, "temperature", {"params": SamplingParams(temperature=-1.0)}),
        (InvalidArgumentError, "top_p", {"params": SamplingParams(top_p=float("nan"))}),
        (InvalidArgumentError, "logit_bias", {"params": SamplingParams(logit_bias={10**6: 1.0})}),
        (InvalidArgumentError, "request_id", {"request_id": "x" * 129}),
        (DeadlineExceededError, "timeout", {"timeout_s": 1e-6}),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    cluster: Site, wanted: type[LoraServeError], field: str, change: dict[str, object]
) -> None:
    _, client = cluster
    request: dict[str, object] = {"prompt": prompt("word"), "params": GREEDY, "adapter": "upper"}
    request |= change
    with pytest.raises(wanted) as caught:
        client.generate(**request)  # type: ignore[arg-type]
    assert field in caught.value.field
    assert client.generate(prompt("word"), GREEDY, adapter="upper").text == "WORD"


def test_a_request_id_in_use_is_refused(cluster: Site) -> None:
    _, client = cluster
    endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    # On one node, so that both come to the same.
    node = next(iter(client.routes.nodes.values()))

    def ask(name: str) -> AlreadyExistsError | None:
        try:
            assert len(direct.generate(prompt("word"), endless, request_id=name).token_ids) == 200
        except AlreadyExistsError as error:
            return error
        return None

    deadline = time.monotonic() + PATIENCE_S
    with Client(nodes=[node.address]) as direct, ThreadPoolExecutor(2) as pool:
        # Both at once: whichever comes first takes long. Where a thread of ours stands still, it
        # may have ended when the other comes.
        for attempt in itertools.count():
            refusals = [error for error in pool.map(ask, [f"twice-{attempt}"] * 2) if error]
            if refusals:
                break
            assert time.monotonic() < deadline, "nobody was refused"
    (refused,) = refusals
    assert refused.field == "request_id"
    assert "twice" in refused.message


def test_left_streams_give_back_what_they_held(cluster: Site) -> None:
    _, client = cluster
    endless = SamplingParams(max_tokens=240, temperature=0.0, ignore_eos=True)
    # Where we are slow some have come to their last token when the node hears that they are left;
    # those that have not are ended.
    before, deadline = cancelled_requests(cluster), time.monotonic() + 2 * PATIENCE_S
    while cancelled_requests(cluster) < before + 8:
        assert time.monotonic() < deadline, "streams that are left go on"
        with contextlib.ExitStack() as leaving:
            for _ in range(8):
                stream = client.stream(prompt("word"), endless, adapter="sort")
                next(leaving.enter_context(stream))
    assert client.generate(prompt("word"), GREEDY, adapter="sort").finish_reason == "stop"
    deadline = time.monotonic() + PATIENCE_S
    while running_requests(cluster):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running_requests(site: Site) -> int:
    return metric(site, "loraserve_requests_running ", "loraserve_queue_depth ")


def cancelled_requests(site: Site) -> int:
    return metric(site, 'loraserve_requests_total{code="CANCELLED"} ')


def metric(site: Site, *names: str) -> int:
    """The sum over the nodes."""
    total = 0.0
    for node in site[0].nodes.values():
        with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(names):
                    total += float(line.split()[1])
    return int(total)


def test_the_controller_adds_up_what_nodes_measure(cluster: Site) -> None:
    site, client = cluster
    client.generate(prompt("count"), GREEDY, adapter="upper")
    assert site.controller is not None
    deadline = time.monotonic() + PATIENCE_S
    seen: dict[str, float] = {}
    while not (seen.get("ttft", 0) > 0 and seen.get("tbt", 0) > 0):
        assert time.monotonic() < deadline
        url = f"http://{site.controller.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        for word in ("ttft", "tbt"):
            sums = [v for v in lines if v.startswith(f"loraserve_{word}_seconds_sum{{node=")]
            assert len(sums) == 2
            seen[word] = sum(float(line.split()[1]) for line in sums)
        time.sleep(0.1)
    series = {line.split("{")[0].split()[0] for line in lines if not line.startswith("#")}
    assert {"loraserve_requests_total", "loraserve_queue_depth", "loraserve_pages"} <= series
    assert "loraserve_adapter_resident" in series


# Adapters, by the command line


def answer_of(client: Client, name: str) -> str | None:
    """To "word"; None where there is no such adapter."""
    try:
        return client.generate(prompt("word"), GREEDY, adapter=name).text
    except (NotFoundError, FailedPreconditionError):
        return None


def command(site: Site, *words: str) -> int:
    return main([*words, "--controller", site[0].address])


def test_the_life_of_an_adapter(
    cluster: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, client = cluster
    packed = tmp_path / "mine.lora"
    assert main(["adapter", "pack", str(adapter_directory("upper")), str(packed)]) == 0
    revision = capsys.readouterr().out.split()[-1]
    assert main(["adapter", "inspect", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revision"] == revision

    add = ("adapter", "add", "mine", str(packed), "--wait", "120")
    assert command(cluster, *add) == 0
    assert revision in capsys.readouterr().out
    assert client.generate(prompt("life"), GREEDY, adapter="mine").text == "LIFE"
    assert command(cluster, *add) == 1
    assert "mine" in capsys.readouterr().err

    # Another revision under the same name: at once for new requests, and no stale prefix cache.
    other = ("adapter", "add", "mine", str(adapter_directory("reverse")), "--replace")
    assert command(cluster, *other) == 0
    capsys.readouterr()
    assert command(cluster, "adapter", "show", "mine", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["revision"] != revision
    assert shown["max_rank"] == 128
    deadline = time.monotonic() + PATIENCE_S
    while (text := client.generate(prompt("life"), GREEDY, adapter="mine").text) != "efil":
        assert text == "LIFE"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pinned = client.generate(prompt("life"), GREEDY, adapter="mine", revision=shown["revision"])
    assert pinned.revision == shown["revision"]

    # Whoever comes after a command that waited gets what it brought.
    for name, answer in (("upper", "LIFE"), ("reverse", "efil"), ("upper", "LIFE")):
        back = ("adapter", "add", "mine", str(adapter_directory(name)), "--replace")
        assert command(cluster, *back, "--wait", "60") == 0
        with Client(cluster[0].address) as fresh:
            assert fresh.generate(prompt("life"), GREEDY, adapter="mine").text == answer
    capsys.readouterr()

    assert command(cluster, "adapter", "list", "--json") == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert names == sorted([*(skill.name for skill in SKILLS), "mine"])
    assert command(cluster, "adapter", "list") == 0
    assert "mine" in capsys.readouterr().out

    assert command(cluster, "adapter", "remove", "mine") == 0
    with pytest.raises(NotFoundError):
        client.adapters.get("mine")
    deadline = time.monotonic() + PATIENCE_S
    while answer_of(client, "mine") is not None:  # nodes drop their copies a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert command(cluster, "adapter", "show", "mine") == 1
    assert "mine" in capsys.readouterr().err


def test_an_adapter_that_cannot_be_is_not_admitted(cluster: Site, tmp_path: Path) -> None:
    _, client = cluster
    broken = tmp_path / "broken.lora"
    main(["adapter", "pack", str(adapter_directory("upper")), str(broken)])
    data = bytearray(broken.read_bytes())
    data[-5] ^= 1
    broken.write_bytes(data)
    with pytest.raises(InvalidCheckpointError):
        client.adapters.add("broken", broken)
    with pytest.raises(InvalidCheckpointError):
        client.adapters.add("broken", tmp_path)
    with pytest.raises(InvalidArgumentError, match="name"):
        client.adapters.add("no/slash", adapter_directory("upper"))
    with pytest.raises(NotFoundError):
        client.adapters.get("broken")


def test_an_adapter_of_other_weights_serves_where_that_was_allowed(
    cluster: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, client = cluster
    foreign = tmp_path / "foreign.lora"
    pack = ("adapter", "pack", str(adapter_directory("upper")), str(foreign))
    assert main([*pack, "--base-digest", "ab" * 32]) == 0
    add = ("adapter", "add", "foreign", str(foreign), "--wait", "120")
    assert command(cluster, *add) == 1
    assert "base: the adapter was made for weights abab" in capsys.readouterr().err
    assert command(cluster, *add, "--allow-base-mismatch") == 0
    assert client.generate(prompt("word"), GREEDY, adapter="foreign").text == "WORD"
    client.adapters.remove("foreign")


def test_a_removed_adapter_does_not_answer_for_the_next_of_its_name(cluster: Site) -> None:
    _, client = cluster
    client.adapters.add("mine", adapter_directory("upper"), base=MODEL_NAME)
    client.wait_routable(["mine"])
    assert client.generate(prompt("word"), GREEDY, adapter="mine").text == "WORD"
    client.adapters.remove("mine")
    next_one = client.adapters.add("mine", adapter_directory("stars"), base=MODEL_NAME)
    client.wait_admitted([next_one], timeout_s=PATIENCE_S)
    assert answer_of(client, "mine") == expected_answer("stars", "word") != "WORD"
    # The nodes drop what they have of the removed one, so that its name alone does not find it.
    addresses = [node.address for node in client.routes.nodes.values()]
    deadline = time.monotonic() + PATIENCE_S
    for address in addresses:
        with Client(nodes=[address], retry=RetryPolicy(max_attempts=1)) as direct:
            while answer_of(direct, "mine") == "WORD":
                assert time.monotonic() < deadline
                time.sleep(0.1)
    client.adapters.remove("mine")


def test_generate_prints_what_the_client_gets(
    cluster: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(cluster, "generate", prompt("mirror"), "--adapter", "reverse") == 0
    assert capsys.readouterr().out == "rorrim\n"
    words = ("generate", prompt("mirror"), "--adapter", "reverse", "--json")
    assert command(cluster, *words) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "rorrim"
    node = next(iter(cluster[0].nodes.values())).address
    assert main(["generate", prompt("mirror"), "--node", node]) == 0
    assert capsys.readouterr().out == "mirror\n"
    monkeypatch.setenv("LORASERVE_CONTROLLER", cluster[0].address)
    assert main(["generate", prompt("mirror"), "--adapter", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


def test_the_base_model_is_named_by_its_own_name(cluster: Site) -> None:
    _, client = cluster
    assert client.routes.bases() == {MODEL_NAME}
    assert client.generate(prompt("same"), GREEDY, base=MODEL_NAME).text == "same"
