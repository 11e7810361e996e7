"""What a line of the log looks like, and that set-up happens once per process, not once per call."""

import io
import logging
import warnings

import pytest

from tx.utils import log


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level, quiet = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in log._QUIET}
    yield io.StringIO()
    root.handlers[:], _ = handlers, root.setLevel(level)
    logging.captureWarnings(False)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)


def test_a_line_says_when_who_and_what(stream):
    log.set_up("engine", stream=stream)
    logging.getLogger("tx.anything").info("loaded %d tensors", 272)
    clock, process, message = stream.getvalue().strip().split(maxsplit=2)
    assert len(clock.split(":")) == 3
    assert (process, message) == ("engine", "loaded 272 tensors")


def test_warnings_name_their_level_and_tracebacks_follow(stream):
    log.set_up("api", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("tx.anything").exception("request 7 failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR: request 7 failed")
    assert rest[-1] == "ValueError: broken"


def test_level_filters_and_a_second_call_replaces_the_first(stream):
    log.set_up("api", "info", stream)
    log.set_up("api", "warning", stream)
    logging.getLogger("tx.anything").info("unheard")
    logging.getLogger("tx.anything").warning("heard")
    assert stream.getvalue().count("heard") == 1


def test_chatty_libraries_are_quiet_unless_debugging(stream):
    log.set_up("api", "info", stream)
    logging.getLogger("httpx").info("GET /x")
    assert stream.getvalue() == ""
    log.set_up("api", "debug", stream)
    logging.getLogger("httpx").info("GET /x")
    assert "GET /x" in stream.getvalue()


def test_python_warnings_reach_the_log(stream):
    log.set_up("api", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    assert "old thing" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (269e6, "269 MB"), (999.7e6, "1 GB"), (7.53e9, "7.53 GB"), (2e12, "2 TB")],
)
def test_human_bytes(count, text):
    assert log.human_bytes(count) == text
