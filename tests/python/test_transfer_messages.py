"""The two sides of the sidecar's protocol against each other, and against garbage."""

import contextlib

import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve import _testing, errors
from loraserve.node.transfer import messages

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
blob = st.binary(max_size=300)
text = st.text(max_size=40).filter(lambda word: "," not in word)


def taken(frame: bytes) -> tuple[int, tuple[object, ...]]:
    left, found = _testing.transfer_take_request(frame)
    assert left == b""
    assert found is not None
    return found


def decoded(frame: bytes) -> messages.Answer:
    kind, length, _ = messages.head(frame[: messages.HEAD_BYTES])
    assert len(frame) == messages.HEAD_BYTES + length
    return messages.decode(kind, frame[messages.HEAD_BYTES :])


@settings(max_examples=examples(50), deadline=None)
@given(u64, u64, u64)
def test_small_requests_arrive_as_they_were_sent(request_id: int, one: int, other: int) -> None:
    for kind, body, fields in (
        (messages.HELLO, messages.hello(one), ("hello", one)),
        (messages.EXPORT, messages.export(one, other), ("export", one, other)),
        (messages.WITHDRAW, messages.withdraw(one), ("withdraw", one)),
        (messages.CANCEL, b"", ("cancel",)),
        (messages.PING, b"", ("ping",)),
    ):
        assert taken(messages.encode(kind, request_id, body)) == (request_id, fields)


@settings(max_examples=examples(50), deadline=None)
@given(u64, u64, u64, u64, u64, st.integers(1, 86_400_000_000), u32, blob, blob)
def test_a_read_arrives_as_it_was_asked_for(
    address: int,
    generation: int,
    size_bytes: int,
    skip_bytes: int,
    local_offset: int,
    timeout_us: int,
    header_bytes: int,
    worker_address: bytes,
    rkey: bytes,
) -> None:
    body = messages.read(
        address=address,
        generation=generation,
        size_bytes=size_bytes,
        skip_bytes=skip_bytes,
        local_offset=local_offset,
        timeout_s=timeout_us / 1e6,
        header_bytes=header_bytes,
        worker_address=worker_address,
        rkey=rkey,
    )
    _, fields = taken(messages.encode(messages.READ, 1, body))
    assert fields[:6] == ("read", address, generation, size_bytes, skip_bytes, local_offset)
    assert abs(fields[6] - timeout_us) <= 1  # type: ignore[operator]
    assert fields[7:] == (header_bytes, worker_address, rkey)


@settings(max_examples=examples(50), deadline=None)
@given(u64, u64, text, text, st.lists(text.filter(bool), max_size=3), blob)
def test_answers_arrive_as_they_were_given(
    request_id: int, number: int, version: str, host: str, transports: list[str], some: bytes
) -> None:
    words = ",".join(transports)
    assert decoded(
        _testing.transfer_ready(request_id, version, host, words, some)
    ) == messages.Ready(version, host, tuple(transports), some)
    assert decoded(_testing.transfer_exported(request_id, number, some)) == messages.Exported(
        number, some
    )
    assert decoded(_testing.transfer_progress(request_id, number)) == messages.Progress(number)
    assert decoded(_testing.transfer_ended(request_id, words)) == messages.Ended(tuple(transports))
    frame = _testing.transfer_ended(request_id, words)
    assert messages.head(frame[: messages.HEAD_BYTES])[2] == request_id


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, errors.CancelledError),
        (2, errors.InvalidArgumentError),
        (3, errors.UnavailableError),
        (4, errors.NotFoundError),
        (5, errors.AlreadyExistsError),
        (6, errors.FailedPreconditionError),
        (7, errors.ResourceExhaustedError),
        (8, errors.UnavailableError),
        (99, errors.LoraServeError),
    ],
)
def test_a_failure_keeps_its_code_and_field(code: int, error: type[errors.LoraServeError]) -> None:
    answer = decoded(_testing.transfer_failed(1, code, "rkey: is cut off: here"))
    assert isinstance(answer, messages.Failed)
    assert type(answer.error) is error
    assert (answer.error.field, answer.error.message) == ("rkey", "is cut off: here")
    answer = decoded(_testing.transfer_failed(1, code, "x" * 5000))
    assert isinstance(answer, messages.Failed)
    assert len(answer.error.message) == 1024


FRAMES = b"".join(
    messages.encode(kind, 5, body)
    for kind, body in (
        (messages.PING, b""),
        (messages.EXPORT, messages.export(1, 2)),
        (messages.CANCEL, b""),
    )
)


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(0, len(FRAMES)))
def test_a_frame_that_is_not_whole_waits_for_the_rest(length: int) -> None:
    stream, count = FRAMES[:length], 0
    while True:
        left, found = _testing.transfer_take_request(stream)
        if found is None:
            assert left == stream
            break
        assert len(left) < len(stream)
        stream, count = left, count + 1
    assert count == sum(length >= end for end in (16, 48, 64))


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255))))
def test_garbage_is_an_error_or_a_request(tail: bytes, changes: list[tuple[int, int]]) -> None:
    for stream in (tail, FRAMES + tail):
        changed = bytearray(stream)
        for at, value in changes:
            if at < len(changed):
                changed[at] = value
        left = bytes(changed)
        with contextlib.suppress(_testing.StatusError):
            while True:
                shorter, found = _testing.transfer_take_request(left)
                if found is None:
                    break
                assert len(shorter) < len(left)
                left = shorter


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(0, 255), st.binary(max_size=100))
def test_answers_that_are_none_are_protocol_errors(kind: int, body: bytes) -> None:
    try:
        answer = messages.decode(kind, body)
    except messages.ProtocolError:
        return
    assert isinstance(answer, messages.Answer)


def test_heads_of_another_protocol_are_refused() -> None:
    good = messages.encode(messages.PING, 1)
    for at, value in ((0, 0), (1, 0), (2, 2), (6, 2), (7, 1)):
        bad = bytearray(good)
        bad[at] = value
        with pytest.raises(messages.ProtocolError):
            messages.head(bytes(bad))


def test_what_does_not_fit_its_field_is_refused_before_it_is_sent() -> None:
    fine = dict.fromkeys(
        ("address", "generation", "size_bytes", "skip_bytes", "local_offset", "header_bytes"), 1
    )
    for wrong in (
        {"address": -1},
        {"address": 1 << 64},
        {"header_bytes": 1 << 32},
        {"rkey": b"x" * 20_000},
        {"worker_address": b"x" * (1 << 20)},
    ):
        arguments = fine | {"timeout_s": 1.0, "rkey": b"", "worker_address": b""} | wrong
        with pytest.raises(errors.InvalidArgumentError):
            messages.read(**arguments)


@settings(max_examples=examples(100), deadline=None)
@given(st.sampled_from([1, 2]), st.binary(min_size=1, max_size=200), st.data())
def test_an_envelope_finds_accidents(kind: int, content: bytes, data: st.DataObject) -> None:
    wrapped = _testing.transfer_wrap(kind, content)
    assert _testing.transfer_unwrap(kind, wrapped) == content
    at = data.draw(st.integers(0, len(wrapped) - 1))
    flipped = bytearray(wrapped)
    flipped[at] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(flipped), wrapped[:at], wrapped + b"x", content):
        with pytest.raises(_testing.StatusError):
            _testing.transfer_unwrap(kind, wrong)
    with pytest.raises(_testing.StatusError):
        _testing.transfer_unwrap(3 - kind, wrapped)
