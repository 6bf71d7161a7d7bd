"""Bad input: each gets one clear line on stderr and the right exit code, and what was said is kept."""

import contextlib
import os
import re
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import ModelServer
from launcher import Process, inherited

from openpista import cells

OFFLINE = ("run", "--provider", "offline", "--session", "s", "-e")
ROOTLESS = os.name != "posix" or os.getuid() != 0


def one_line(done, code, text):
    """It failed with this code and one line on stderr that says this; nothing on stdout."""
    assert "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(r"openpista: [^\n]+\n", done.stderr) and re.search(text, done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    return True


def words_of(path):
    """What the person has said, by the database."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT text FROM messages WHERE role = 'user' ORDER BY id")]


def ended(process, timeout):
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# Configuration

CONFIGS = [  # bytes of config.toml -> what is said
    (b"[agent", r"config\.toml is not valid TOML: Expected"),
    (b"[agent]\nmodel = 'x\n", r"config\.toml is not valid TOML"),
    (b'[agent]\nmodel = "\xff"', r"config\.toml is not UTF-8: byte 17 is 0xff"),
    (b"\x00\x01\x02", r"config\.toml is not valid TOML"),
    (b"SQLite format 3\x00", r"config\.toml is not valid TOML"),
    ("agent.model = 'x'".encode("utf-16"), r"config\.toml is not UTF-8"),
    (b"[agnet]", r"unknown setting 'agnet', did you mean 'agent'\?"),
    (b"a = " + b"[" * 5_000 + b"]" * 5_000, r"config\.toml"),
    (b"[agent]\nbase_url = 'http://x y/'\nprovider = 'custom'\nmodel = 'm'", r"'http://x y/' is not an http"),
    (b'[database]\nurl = "a\\u0000b"', r"database\.url must not hold a NUL character"),
    (b"[agent]\ntimeout = nan", r"agent\.timeout must be"),
]


def test_configuration(openpista, tmp_path, home):
    def run(number):
        place = tmp_path / f"case{number}"
        place.mkdir()
        (place / "config.toml").write_bytes(CONFIGS[number][0])
        return openpista(
            "run", "-e", "x", cwd=place, env={"OPENAI_API_KEY": "test-key-123456", "OPENPISTA_CONFIG": "config.toml"}
        )

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(run, range(len(CONFIGS))))
    bad = []
    for (text, said), one in zip(CONFIGS, done, strict=True):
        try:
            one_line(one, 2, said)
        except AssertionError:
            bad.append((text[:40], one.returncode, one.stderr[-200:]))
    assert bad == []
    assert not home.exists()


def test_a_configuration_that_cannot_be_read(openpista, home):
    (home / "config.toml").mkdir(parents=True)
    home.chmod(0o700)
    assert openpista(*OFFLINE, "$ echo hi").stdout == "hi\n"  # a folder is no configuration file
    assert one_line(openpista("--config", str(home), *OFFLINE, "x"), 2, "no configuration file")
    (home / "credentials.toml").write_text("[openai]\napi_key = 3\n")
    (home / "credentials.toml").chmod(0o600)
    assert one_line(openpista("run", "-e", "x"), 2, r"credentials\.toml: \[openai\] is not a login; mend it")
    (home / "credentials.toml").write_bytes(b"\xff\xfe")
    assert one_line(openpista("auth", "status"), 2, r"credentials\.toml is not UTF-8")


# The database


def newer(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 999")


def foreign(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")


def folder(path):
    path.unlink()
    path.mkdir()


def damaged(path):
    data = bytearray(path.read_bytes())
    data[8_192:] = b"\xa5" * (len(data) - 8_192)
    path.write_bytes(data)


DATABASES = [
    (newer, r"memory\.db was made by a newer openpista \(schema 999, this one knows \d+\); use the newer"),
    (lambda path: path.write_bytes(b"this is no database" * 100), r"memory\.db is damaged or no database"),
    (foreign, r"memory\.db is another program's database; name another file"),
    (folder, r"memory\.db: Is a directory"),
    (damaged, r"memory\.db is damaged or no database.*move it away"),
]


@pytest.mark.parametrize(("spoil", "said"), DATABASES, ids=["newer", "no database", "foreign", "folder", "damaged"])
def test_a_database_that_is_none(openpista, home, spoil, said):
    assert openpista(*OFFLINE, "$ echo hi").stdout == "hi\n"
    path = home / "memory.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    assert one_line(openpista(*OFFLINE, "$ echo again"), 1, said)
    assert one_line(openpista("sessions", "show", "s"), 1, said)
    assert (path.read_bytes() if path.is_file() else None) == before  # it was not touched


# The disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system with little room: (its folder, a function that fills it, one that makes it read-only)."""
    place = tmp_path / "disk"
    place.mkdir()
    if ROOTLESS or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", place]).returncode:
        pytest.skip("only root may mount a small file system")

    def fill():
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)

    yield place, fill, remount
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(openpista, small_disk):
    disk, fill, _ = small_disk
    env = {"OPENPISTA_HOME": str(disk)}
    fill()
    assert one_line(
        openpista(*OFFLINE, "$ echo first", env=env), 1, "cannot (write|open) the database .*memory.db: .*full|No space"
    )
    (disk / "filler").unlink()
    assert openpista(*OFFLINE, "$ echo first", env=env).stdout == "first\n"
    fill()
    login = ["auth", "login", "--provider", "groq", "--api-key", "-"]
    assert one_line(
        openpista(*login, input="a-key-0123456789", env=env), 2, "cannot write .*credentials.toml: No space"
    )
    assert one_line(openpista(*OFFLINE, f"$ echo {'long ' * 20_000}", env=env), 1, "make room on the disk")
    (disk / "filler").unlink()
    assert openpista(*OFFLINE, "$ echo again", env=env).stdout == "again\n"
    assert words_of(disk / "memory.db")[0] == "$ echo first" and words_of(disk / "memory.db")[-1] == "$ echo again"


def test_a_disk_that_fills_during_a_turn(openpista, small_disk, model, openai):
    disk, _, _ = small_disk
    env = openai | {"OPENPISTA_HOME": str(disk)}
    fill = f"head -c 3000000 /dev/zero >{disk}/filler 2>/dev/null; printf '%09999d' 1"
    model.script(
        {"tool_calls": [{"name": "system_run", "arguments": {"command": fill}}]}, {"text": "The answer. " * 9_000}
    )
    done = openpista("run", "-e", "x", "--yes", "--session", "s", env=env)
    assert done.returncode == 1 and "make room on the disk" in done.stderr and done.stderr.count("\n") == 1
    (disk / "filler").unlink()
    model.script({"text": "back"})
    assert openpista("run", "-e", "again", "--session", "s", env=env).stdout == "back\n"
    assert words_of(disk / "memory.db") == ["x", "again"]


def test_a_disk_that_cannot_be_written(openpista, small_disk):
    disk, _, remount = small_disk
    env = {"OPENPISTA_HOME": str(disk)}
    assert openpista(*OFFLINE, "$ echo hi", env=env).returncode == 0
    remount("ro")
    assert one_line(openpista(*OFFLINE, "$ echo hi", env=env), 1, "cannot (write|open) the database .*memory.db")
    done = openpista("auth", "login", "--provider", "groq", "--api-key", "a-key-0123456789", env=env)
    assert one_line(done, 2, "cannot write .*credentials.toml: Read-only")
    assert one_line(openpista(*OFFLINE, "x", env={"OPENPISTA_HOME": f"{disk}/home"}), 1, "cannot make the home folder")


HOMES = ["/dev/null/home", "/proc/home"]


@pytest.mark.parametrize("place", HOMES)
def test_a_home_that_cannot_be(openpista, place):
    env = {"OPENPISTA_HOME": place}
    assert one_line(
        openpista(*OFFLINE, "$ echo hi", env=env), 1, f"cannot make the home folder {place}: .*; set OPENPISTA_HOME"
    )
    assert one_line(openpista("sessions", "list", env=env), 1, place)
    login = ["auth", "login", "--provider", "groq", "--api-key", "a-key-0123456789"]
    assert one_line(openpista(*login, env=env), 1, f"cannot make the home folder {place}")


@pytest.mark.skipif(not ROOTLESS, reason="root may write everywhere")
def test_a_home_of_somebody_else(openpista, home):
    home.mkdir(mode=0o500)
    assert one_line(openpista(*OFFLINE, "$ echo hi"), 1, "Permission denied|unable to open")


# The model's server

SERVERS = {  # name, also of the model -> its steps, exit code, what is said
    "html": (
        {"body": "<html><b>It works!</b></html>", "status": 200, "headers": {"content-type": "text/html"}},
        1,
        r"answered text/html, no event stream .*; is base_url right\?",
    ),
    "html500": (
        {"body": "<html><b>Bad gateway</b></html>", "status": 502, "headers": {"retry-after-ms": "1"}},
        1,
        r"answered 502: Bad gateway",
    ),
    "garbage": ({"garbage": True}, 1, r"openai/garbage|127\.0\.0\.1"),
    "bytes": ({"garbage": 100_000}, 1, r"openai/bytes|127\.0\.0\.1"),
    "half": ({"text": "half an answer", "cut_bytes": 700, "clean": True}, 1, r"openai/half: "),
    "cut": ({"text": "half an answer", "cut": 2}, 1, r"openai/cut: "),
    "reset": ({"text": "half an answer", "cut": 2, "reset": True}, 1, r"openai/reset: "),
    "refuse": ({"refuse": True}, 1, r"openai/refuse: the connection to .* broke"),
    "line": ({"text": "x", "long_line": 10_000_000}, 1, r"openai/line"),
    "silence": ({"delay": 30}, 1, r"openai/silence: .* was silent for 1 s"),
    "stall": ({"text": "a b c d", "stall": 30, "after": 2}, 1, r"openai/stall: .* was silent for 1 s"),
    "redirect": (
        {"status": 307, "headers": {"location": "https://elsewhere/"}, "body": ""},
        1,
        r"redirect to https://elsewhere/\); set base_url",
    ),
    "empty": ({"text": ""}, 1, r"answered nothing, twice"),
    "event": ({"error_event": "the engine fell over", "text": "a b c d"}, 1, r"the engine fell over"),
    "numbers": (
        {"body": "[1,2,3]", "status": 200, "headers": {"content-type": "application/json"}},
        1,
        r"openai/numbers|127\.0\.0\.1",
    ),
    "deep": ({"raw": "data: " + "[" * 100_000 + "\n\n"}, 1, r"openai/deep|127\.0\.0\.1"),
    "nobody": ({"text": "never asked"}, 1, r"openai/nobody: cannot reach http://127\.0\.0\.1:1/v1"),
    "locked": ({"text": "never asked"}, 1, r"memory\.db is locked by another process \(waited 5 s\); try again"),
}


@pytest.fixture(scope="module", autouse=True)
def outcomes(tmp_path_factory):
    """Each of SERVERS asked by a process with a home of its own: name -> future of (process, home).

    They wait most of the time, and so all begin when the first test of this file does.
    """
    root = tmp_path_factory.mktemp("servers")
    (root / "config.toml").write_text("[agent]\nidle_timeout = 1\n")
    kept = inherited() | {"HOME": str(root), "OPENAI_API_KEY": "test-key-123456"}
    (root / "locked").mkdir(mode=0o700)

    def run(name):
        words = ["run", "--session", "s", "--model", name, "-e", f"words for {name}"]
        url = "http://127.0.0.1:1/v1" if name == "nobody" else server.url
        env = kept | {"OPENAI_BASE_URL": url, "OPENPISTA_HOME": str(root / name)}
        return ended(Process(words, env, root, subprocess.DEVNULL, subprocess.PIPE, subprocess.PIPE), 60), root / name

    lock = sqlite3.connect(root / "locked" / "memory.db", isolation_level=None)
    with ModelServer() as server, contextlib.closing(lock), ThreadPoolExecutor(len(SERVERS)) as pool:
        server.script(*({"model": name, "times": -1} | step for name, (step, _, _) in SERVERS.items()))
        lock.execute("BEGIN EXCLUSIVE")
        yield {name: pool.submit(run, name) for name in SERVERS}


# Much of it


def test_a_megabyte_as_an_argument(openpista, model, openai, tmp_path):
    text = "x" * 1_000_000
    calls = [
        {"name": "system_run", "arguments": {"command": f"printf %s {text} | wc -c"}},
        {"name": "system_run", "arguments": {"command": "true", text: text}},
        {"name": "system_run", "arguments": '{"command": "' + text},
        {"name": text[:100], "arguments": {"command": text}},
    ]
    model.script({"tool_calls": calls}, {"text": "survived"})
    (tmp_path / "config.toml").write_text("[agent]\ncontext_tokens = 4000000\n")
    done = openpista("run", "-e", "x", "--session", "s", "--yes", env=openai)
    assert (done.stdout, done.stderr, done.returncode) == ("survived\n", "", 0)
    results = [m["content"] for m in model.bodies()[1]["messages"] if m["role"] == "tool"]
    assert "1000000" in results[0] and "unknown" in results[1] and "JSON" in results[2] and "no tool" in results[3]
    assert max(map(len, results)) < 20_000
    model.script({"text": "and goes on"})
    assert openpista("run", "-e", "again", "--session", "s", env=openai).stdout == "and goes on\n"


def test_a_megabyte_as_the_question(openpista, model, openai, home):
    model.script({"text": "read it"})
    text = "begin " + "word " * 200_000 + "finish"
    done = openpista("run", "--session", "s", env=openai, input=text)
    assert done.stdout == "read it\n" and re.fullmatch(r"openpista: standard input was cut to .*\n", done.stderr)
    (kept,) = words_of(home / "memory.db")
    assert "begin" in kept and "finish" in kept


def test_input_that_does_not_end(openai, tmp_path):
    read, write = os.pipe()
    try:
        words = ["run", "-e", "x", "--timeout", "0.5"]
        done = ended(Process(words, openai, tmp_path, read, subprocess.PIPE, subprocess.PIPE), 15)
    finally:
        os.close(write)
        os.close(read)
    assert one_line(done, 1, r"standard input did not end within 0\.5 s")


# What came of SERVERS


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_answers(outcomes, name):
    (done, home), (_, code, said) = outcomes[name].result(), SERVERS[name]
    assert one_line(done, code, said)
    assert cells(done.stderr) < 400  # a line, not a page
    if name != "locked":
        assert words_of(home / "memory.db") == [f"words for {name}"]
