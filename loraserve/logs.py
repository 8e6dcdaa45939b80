"""The daemons' logs: lines of text for people, or one JSON object per line for machines.

What a log line never holds is a prompt or an answer, at any level.
"""

import argparse
import json
import logging
import sys
import threading
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_LIBRARIES = ("asyncio", "fsspec", "grpc", "opentelemetry", "urllib3", "uvicorn")
_FIELDS = "fields"
_SHOWN = "fields_shown"


def about(shown: bool = False, **fields: Any) -> dict[str, Any]:
    """For `extra` of a log call: what the event is about, such as request, adapter, revision, node
    and attempt. None and empty ones are left out. `shown`: in text as well, where the message does
    not say them."""
    told = {name: value for name, value in fields.items() if value not in (None, "")}
    return {_FIELDS: told, _SHOWN: shown}


class JsonFormatter(logging.Formatter):
    """One object: ts (UTC), level, logger, message, service, pid, the event's own fields, and
    exception where there is one."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "ts": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service,
            "pid": record.process,
        }
        for name, value in getattr(record, _FIELDS, {}).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if getattr(record, _SHOWN, False):
            line += " " + json.dumps(getattr(record, _FIELDS), default=str)
        return line


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", default="info", choices=LEVELS, help="the least that is told"
    )
    parser.add_argument(
        "--log-format", default="text", choices=FORMATS, help="json: one object per line"
    )


def set_up_logs(service: str, level: str, log_format: str) -> None:
    """Of this process, to stderr. With "json" uncaught exceptions, also
    of threads, and warnings are lines too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in _LIBRARIES:  # what they say at debug level is theirs alone to read
        logging.getLogger(name).setLevel(max(logging.INFO, logging.root.level))
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("loraserve").critical("uncaught", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:  # ends a thread, quietly
        return
    name = args.thread.name if args.thread is not None else "unknown"
    error = args.exc_value or args.exc_type()
    logging.getLogger("loraserve").critical(
        "uncaught in thread %s", name, exc_info=(args.exc_type, error, args.exc_traceback)
    )
