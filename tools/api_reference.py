"""Writes docs/api-reference.md from the comments of proto/.

Usage: python tools/api_reference.py
A test fails where the file is not what the protos say now.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"
REFERENCE = ROOT / "docs" / "api-reference.md"
PACKAGE = ".loraserve.v1."

INTRODUCTION = """# API reference

The gRPC interface, package `loraserve.v1`. Made from the comments of [`proto/`](../proto) by
`python tools/api_reference.py`; change them, not this file. The HTTP interface is in
[openai.md](openai.md). Every daemon also answers gRPC's health and reflection services.
"""

# Field numbers of FileDescriptorProto and its parts: what the paths of source info are made of.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _METHODS, _VALUES = 2, 2, 2

_SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}


def described_files() -> list[FileDescriptorProto]:
    """The protos by name, with their comments. Raises RuntimeError where protoc fails."""
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "protos"
        arguments = [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--descriptor_set_out={made}",
            "--include_source_info",
        ]
        if protoc.main([*arguments, *sources]) != 0:
            raise RuntimeError("protoc failed; its message is above")
        return list(descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()).file)


class Comments:
    """Of one file, by the path of what they stand before."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._by_path = {
            tuple(location.path): location.leading_comments or location.trailing_comments
            for location in file.source_code_info.location
        }
        detached = [
            comment
            for location in file.source_code_info.location
            for comment in location.leading_detached_comments
        ]
        self.of_file = [" ".join(comment.split()) for comment in detached]

    def of(self, *path: int) -> str:
        """As one line; empty where there is none."""
        return " ".join(self._by_path.get(path, "").split())


def _link(type_name: str) -> str:
    """`.package.Name` as a link to its heading, or as code where it is another package's."""
    if type_name.startswith(PACKAGE):
        name = type_name.removeprefix(PACKAGE)
        return f"[{name}](#{name.lower()})"
    return f"`{type_name.removeprefix('.')}`"


def _map_entry(field: FieldDescriptorProto, message: descriptor_pb2.DescriptorProto) -> str | None:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
            key, value = (_type(part, nested) for part in nested.field)
            return f"map of {key} to {value}"
    return None


def _type(field: FieldDescriptorProto, message: descriptor_pb2.DescriptorProto) -> str:
    entry = _map_entry(field, message)
    if entry is not None:
        return entry
    name = _link(field.type_name) if field.type_name else _SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _services(file: FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for number, service in enumerate(file.service):
        yield from (f"## {service.name}", "", comments.of(_SERVICES, number), "")
        for index, method in enumerate(service.method):
            sent = "stream " * method.client_streaming + _link(method.input_type)
            answered = "stream " * method.server_streaming + _link(method.output_type)
            yield from (f"### {service.name}.{method.name}", "", f"{sent} → {answered}", "")
            yield from (comments.of(_SERVICES, number, _METHODS, index), "")


def _messages(file: FileDescriptorProto, comments: Comments) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each."""
    for number, message in enumerate(file.message_type):
        lines = [f"### {message.name}", ""]
        comment = comments.of(_MESSAGES, number)
        if comment:
            lines += [comment, ""]
        rows = [
            (
                f"`{field.name}`",
                str(field.number),
                _type(field, message),
                comments.of(_MESSAGES, number, _FIELDS, index),
            )
            for index, field in enumerate(message.field)
        ]
        lines += (
            [*_table(("field", "number", "type", "meaning"), rows), ""] if rows else ["Empty.", ""]
        )
        yield message.name, lines


def _enums(file: FileDescriptorProto, comments: Comments) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each."""
    for number, enum in enumerate(file.enum_type):
        rows = [
            (f"`{value.name}`", str(value.number), comments.of(_ENUMS, number, _VALUES, index))
            for index, value in enumerate(enum.value)
        ]
        lines = [f"### {enum.name}", "", comments.of(_ENUMS, number), ""]
        yield enum.name, [*lines, *_table(("value", "number", "meaning"), rows), ""]


def reference() -> str:
    """The whole document."""
    described = [(file, Comments(file)) for file in described_files()]
    lines = [INTRODUCTION]
    for _, comments in described:
        lines += [line for comment in comments.of_file for line in (comment, "")]
    for file, comments in described:
        lines += _services(file, comments)
    types = [kind for file, comments in described for kind in _messages(file, comments)]
    types += [kind for file, comments in described for kind in _enums(file, comments)]
    lines += ["## Messages and enums", ""]
    for _, text in sorted(types):
        lines += text
    return "\n".join(lines).rstrip("\n") + "\n"


def uncommented() -> list[str]:
    """Services, methods, messages, fields, enums and their values whose comment is empty. The
    message that a method takes or answers is told by the method, the value 0 by the enum."""
    found = []
    for file in described_files():
        comments = Comments(file)
        told = {
            kind for s in file.service for m in s.method for kind in (m.input_type, m.output_type)
        }
        for number, service in enumerate(file.service):
            found += [service.name] * (not comments.of(_SERVICES, number))
            for index, method in enumerate(service.method):
                path = (_SERVICES, number, _METHODS, index)
                found += [f"{service.name}.{method.name}"] * (not comments.of(*path))
        for number, message in enumerate(file.message_type):
            if PACKAGE + message.name not in told:
                found += [message.name] * (not comments.of(_MESSAGES, number))
            for index, field in enumerate(message.field):
                path = (_MESSAGES, number, _FIELDS, index)
                found += [f"{message.name}.{field.name}"] * (not comments.of(*path))
        for number, enum in enumerate(file.enum_type):
            found += [enum.name] * (not comments.of(_ENUMS, number))
            for index, value in enumerate(enum.value):
                path = (_ENUMS, number, _VALUES, index)
                found += [value.name] * bool(value.number and not comments.of(*path))
    return found


def main() -> int:
    REFERENCE.write_text(reference())
    print(REFERENCE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
