"""Log lines as machines and people read them."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraserve.logs import JsonFormatter, TextFormatter, about


def record(message: str, *args: Any, **more: Any) -> logging.LogRecord:
    """As a call of a logger makes it; `extra` is that of the call."""
    log = logging.Logger("loraserve.test")
    extra = more.pop("extra", None)
    return log.makeRecord(log.name, logging.WARNING, "f", 1, message, args, None, extra=extra)


def as_json(*args: Any, **more: Any) -> Any:
    line = JsonFormatter("loraserve-node").format(record(*args, **more))
    assert "\n" not in line
    return json.loads(line)


def test_a_line_is_one_object_whatever_the_message_holds() -> None:
    line = as_json("from %s", 'a\n{"level": "fake"}\x00\ud800é')
    assert line["message"] == 'from a\n{"level": "fake"}\x00\ud800é'
    assert (line["level"], line["logger"]) == ("warning", "loraserve.test")
    assert line["service"] == "loraserve-node"
    assert line["ts"].endswith("Z")


def test_fields_are_beside_the_message_and_never_instead_of_its_own() -> None:
    fields = about(adapter="default/sql", revision="", node=None, attempt=0, where=Path("/x"))
    line = as_json("m", extra=fields)
    assert (line["adapter"], line["attempt"], line["where"]) == ("default/sql", 0, "/x")
    assert not {"revision", "node"} & line.keys()
    line = as_json("m", extra=about(level="fake", message="fake", ts=0))
    assert (line["level"], line["message"]) == ("warning", "m")


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    line = JsonFormatter("s").format(made)
    assert "\n" not in line
    assert "ValueError: broken\nin two" in json.loads(line)["exception"]


def test_text_shows_fields_where_the_message_does_not_say_them() -> None:
    formatter = TextFormatter()
    assert formatter.format(record("ended", extra=about(shown=True, node="n1"))).endswith(
        'loraserve.test: ended {"node": "n1"}'
    )
    assert formatter.format(record("node n1 went", extra=about(node="n1"))).endswith(
        ": node n1 went"
    )


def daemon(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraserve.controller.main", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_daemon_that_cannot_start_says_so_in_its_format(tmp_path: Path) -> None:
    options = ("--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    refused = ("--keys", str(tmp_path / "none"))
    text = daemon(*options, *refused)
    assert text.stderr.startswith("loraserve-controller: error: --keys: /")
    told = daemon(*options, *refused, "--log-format", "json")
    (line,) = [json.loads(line) for line in told.stderr.splitlines()]
    assert (line["level"], line["service"]) == ("error", "loraserve-controller")
    assert text.stderr.strip() == f"loraserve-controller: error: {line['message']}"
    assert text.returncode == told.returncode == 2
    wrong = daemon(*options, "--log-format", "xml")
    assert wrong.returncode == 2
    assert "--log-format" in wrong.stderr


def test_what_nobody_catches_is_a_line_in_a_thread_too() -> None:
    code = (
        "import threading; from loraserve.logs import set_up_logs;"
        "set_up_logs('loraserve-node', 'info', 'json');"
        "threads = [threading.Thread(target=f, name='copies') for f in (lambda: 1 / 0, exit)];"
        "[(t.start(), t.join()) for t in threads]; 1 / 0"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    in_thread, in_main = (json.loads(line) for line in told.stderr.splitlines())
    assert in_thread["message"] == "uncaught in thread copies"
    for line in (in_thread, in_main):
        assert line["level"] == "critical"
        assert "ZeroDivisionError" in line["exception"]
