"""ReadCopyResponse as bytes: messages of a megabyte would be copied once more on their way through
a message object."""

CHUNK_FIELD, SIZE_FIELD = 1, 2
_VARINT, _BYTES = 0, 2


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(chunk: memoryview, size_bytes: int | None = None) -> bytes:
    """The serialized message. `chunk`: contiguous bytes; `size_bytes` None leaves the field out."""
    head = bytes((CHUNK_FIELD << 3 | _BYTES,)) + _varint(len(chunk))
    if size_bytes:
        head = bytes((SIZE_FIELD << 3 | _VARINT,)) + _varint(size_bytes) + head
    return b"".join((head, chunk))
