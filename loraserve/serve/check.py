"""What is known to fail before anything starts: a mistake must not cost the time that a model takes
to load."""

import os
import socket
from pathlib import Path

from loraserve.checkpoint.adapter_outline import read_outline
from loraserve.checkpoint.base_names import check_base_name, names_served_model
from loraserve.checkpoint.model_config import read_model_config
from loraserve.checkpoint.model_shape import ModelShape, check_shapes, shape_of
from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
)
from loraserve.named_files import named, why, wrong
from loraserve.security.keys import KeyRing, check_key
from loraserve.serve.options import ServeOptions
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.tokenizer import TOKENIZER_NAME
from loraserve.wire import split_address


def check_start(options: ServeOptions) -> None:
    """Blocks for moments. Raises InvalidArgumentError that names the option."""
    if options.keys is not None:
        KeyRing.load(options.keys)
    if options.api_key is not None:
        try:
            check_key(options.api_key)
        except InvalidArgumentError as error:
            raise InvalidArgumentError("api-key", error.message) from None
    if options.data_dir is not None:
        _check_data_dir(options.data_dir)
    _check_address(options.listen)
    shape = _model_shape(options.model)
    if options.chat_template is not None:
        with named("chat-template", options.chat_template):
            ChatTemplate(options.chat_template.read_text("utf-8"))
    for path in options.adapters.values():
        _check_adapter(path, options, shape)


def _check_data_dir(path: Path) -> None:
    """The directory, or the next one above it that is there."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise wrong("data-dir", there, "is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise wrong("data-dir", there, "cannot be written to")


def _check_address(listen: str) -> None:
    """The gateway binds it when all else is there; so that it could, by the same options."""
    host, port = split_address(listen, "listen")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidArgumentError("port", f"cannot listen on {listen}: {why(error)}") from None


def _model_shape(path: Path) -> ModelShape:
    with named("model", path):
        shape = shape_of(read_model_config(path))
        # For the gateway, which reads it when the nodes are there.
        if not (path / TOKENIZER_NAME).is_file():
            raise InvalidCheckpointError(TOKENIZER_NAME, "is missing")
    return shape


def _check_adapter(path: Path, options: ServeOptions, shape: ModelShape) -> None:
    with named("adapter", path):
        outline = read_outline(path)
    told = outline.base_digest or options.allow_base_mismatch  # nodes know the digest of theirs
    try:
        if not told and not names_served_model(outline, options.model):
            check_base_name(outline.base_name, options.base)
        check_shapes(outline.modules, shape, options.base)
    except FailedPreconditionError as error:
        raise wrong("adapter", path, str(error)) from None
