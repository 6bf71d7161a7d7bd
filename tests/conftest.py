"""Fixtures that several test files use."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import launcher
import pytest
from fakes import BotServer, ModelServer
from terminals import Terminal

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = False  # whatever the environment says: to compile all tests takes a worker seven seconds

# Whoever started pytest may have had these ignored (nohup, & in a script), and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores for each two: much of the time is waiting."""
    return (len(os.sched_getaffinity(0)) * 3 + 1) // 2


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The first worker compiles the tests, the others wait for that."""
    folder = os.open(ROOT / "tests", os.O_RDONLY)
    try:
        if hasattr(session.config, "workerinput"):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(folder, fcntl.LOCK_SH)
        return (yield)
    finally:
        os.close(folder)


def pytest_collection_modifyitems(items):
    """What needs the archive comes first: it is long in the making; and before all what makes it twice."""
    need = {item.path for item in items if "archive" in item.fixturenames}
    items.sort(key=lambda item: (item.path not in need, item.path.name != "test_zipapp.py"))


@pytest.fixture(scope="session", autouse=True)
def launched():
    """What starts openpista ends with the tests."""
    yield
    launcher.close()


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """openpista.pyz, built once for all tests and all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "openpista.pyz"
    with (folder / "archive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            subprocess.run([sys.executable, ROOT / "build_zipapp.py", "--output", path], check=True)
    return path


@pytest.fixture
def home(tmp_path):
    """A fresh folder for OPENPISTA_HOME that is not made yet."""
    return tmp_path / "home"


@pytest.fixture
def environ(home, tmp_path):
    """A clean environment for a child: no key, no configuration, a home of its own."""
    return launcher.inherited() | {"HOME": str(tmp_path), "OPENPISTA_HOME": str(home), "TERM": "xterm"}


@pytest.fixture(scope="session")
def server():
    """A fake model server, a process of its own."""
    with ModelServer() as server:
        yield server


@pytest.fixture
def model(server):
    """The fake model server, with nothing in its script or its records."""
    server.script()
    return server


@pytest.fixture(scope="session")
def bot_server():
    """A fake of Telegram's Bot API, a process of its own."""
    with BotServer() as server:
        yield server


@pytest.fixture
def bot(bot_server):
    """The fake Bot API, with nobody in it."""
    bot_server.reset()
    return bot_server


@pytest.fixture
def openai(environ, model):
    """The environment in which openpista asks the fake server as if it were OpenAI."""
    return environ | {"OPENAI_API_KEY": "test-key-123456", "OPENAI_BASE_URL": model.url}


@pytest.fixture
def terminal(openai, tmp_path):
    """terminal("run", "-e", "hi", columns=20, TERM="dumb") -> Terminal"""
    opened = []
    own = ("columns", "rows", "argv", "prepare", "reflow", "stdin", "stdout", "stderr")

    def start(*words, **more):
        settings = {name: more.pop(name) for name in own if name in more}
        env = {name: value for name, value in (openai | more).items() if value is not None}
        opened.append(Terminal(words, env, tmp_path, **settings))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def openpista(environ, tmp_path):
    """Runs a command as a process: openpista("run", "-e", "hi", env=..., input=...) -> CompletedProcess."""

    def run(*words, env=None, cwd=tmp_path, **more):
        return launcher.run(words, environ | (env or {}), cwd, **more)

    return run
