"""Keeping house: what the daemon forgets, and that no file of it grows for ever."""

import logging
import os
import re
import stat
import subprocess
import sys
import time

import pytest
from fakes import FakeClock
from launcher import START
from test_daemon import OFFLINE, house, until  # noqa: F401 - a fixture

import openpista as o

DAY = 86_400


@pytest.fixture
def clock():
    return FakeClock(o.datetime(2030, 1, 1, tzinfo=o.UTC))


@pytest.fixture
def store(tmp_path, clock):
    with o.Store(tmp_path / "memory.db", clock.now) as store:
        yield store


def names(store):
    return {info.name for info in store.sessions()}


def fill(store, name, count=1):
    session = store.session(name)
    for number in range(count):
        store.append(session, o.Message(o.Role.USER, f"message {number}"))
    return session


# Sessions


def test_old_sessions_are_forgotten(store, clock):
    fill(store, "old")
    clock.advance(o.timedelta(days=31))
    fill(store, "new")
    upkeep = o.Upkeep(store)
    assert upkeep.forget_sessions(30) and not upkeep.forget_sessions(30)
    assert names(store) == {"new"}


@pytest.mark.parametrize("answer", ["done", None], ids=["answered", "stopped"])
def test_an_agent_that_was_asked_keeps_its_session_until_that_is_over(store, clock, answer):
    asker, call = store.session("telegram:42"), o.ToolCall("c", "agent.ask", {})
    handover = store.hand_over(
        asker, number := store.append(asker, o.Message(o.Role.ASSISTANT, "", (call,))), "c", "hand"
    )
    clock.advance(o.timedelta(days=31))
    assert not o.Upkeep(store).forget_sessions(30)
    store.note_handover(handover, answer=answer)
    store.finish_call(asker, number, o.ToolResult("c", answer or o.STOPPED, answer is None))
    assert o.Upkeep(store).forget_sessions(30)
    assert names(store) == {"telegram:42"}


def test_what_was_granted_and_asked_goes_with_a_session(store, clock):
    for name in ("old", "telegram:7"):
        fill(store, name)
        o.Grants(store, name).add("[]")
    inbox = o.Inbox(store)
    number = inbox.add(o.Event("telegram:7", "1", "old", "hi")).id
    o.Approvals(store).ask(number, o.ToolCall("a", "system.run", {"command": "rm x"}), "rm deletes", 60)
    store.db.execute("UPDATE inbox SET state = 'done', done_at = ?", [store.now().isoformat()])
    clock.advance(o.timedelta(days=31))
    while o.Upkeep(store).forget_sessions(30):
        pass
    assert names(store) == {"telegram:7"}
    assert not o.Grants(store, "old").list() and o.Grants(store, "telegram:7").list() and not o.Approvals(store).get(1)


def test_a_long_session_goes_some_at_a_time(store, clock):
    session = fill(store, "old", 25)
    clock.advance(o.timedelta(days=31))
    upkeep, left = o.Upkeep(store), []
    while upkeep.forget_sessions(30, most=10):
        left.append(len(list(store.transcript(session))))
    assert left == [15, 5, 0] and names(store) == set()


def test_only_runs(store, clock):
    run = o.new_session_name(clock.now(), "run")
    for name in (run, "run-away", "main"):
        fill(store, name)
    clock.advance(o.timedelta(days=31))
    while o.Upkeep(store).forget_sessions(30, o.Upkeep.RUNS):
        pass
    assert names(store) == {"run-away", "main"}


def test_what_somebody_needs_is_kept(store, clock):
    kept = ("leased", "waiting", "cron-disks", "chosen", "telegram:42")
    for name in (*kept, "telegram:7", "old"):
        fill(store, name)
    o.Inbox(store).add(o.Event("job", "1", "waiting", "hi"))
    job = o.Job(0, "disks", "@daily", "", "look", "cron-disks", "", {}, "once", "command", "paused", None)
    o.Jobs(store).add(job)
    store.db.execute("INSERT INTO chats (place, session) VALUES ('telegram:7', 'chosen')")
    clock.advance(o.timedelta(days=31))
    assert store.take_lease(store.find_session("leased"))
    while o.Upkeep(store).forget_sessions(30):
        pass
    assert names(store) == set(kept)


def test_the_daemon_keeps_house(house):  # noqa: F811
    house.configure(OFFLINE + "keep_outputs_days = 2\n[database]\nkeep_sessions_days = 5\n")
    (house.home / "jobs").mkdir()
    old, new = house.home / "jobs/a.log", house.home / "jobs/b.log"
    for path in (old, new):
        path.write_text("said\n")
    os.utime(old, (time.time() - 3 * DAY,) * 2)
    with o.Store(house.home / "memory.db") as store:
        fill(store, "old")
        store.db.execute("UPDATE sessions SET updated_at = '2001-01-01T00:00:00.000Z'")
        fill(store, "new")
        house.start()
        until(lambda: names(store) == {"new"} and not old.exists())
    assert new.exists()


# The write-ahead log


def test_a_long_wal_is_cut(store):
    wal = store.path.with_name("memory.db-wal")
    store.db.execute("PRAGMA wal_autocheckpoint = 0")
    upkeep = o.Upkeep(store)
    fill(store, "main", 3)
    assert not upkeep.wal_is_long, "a short one is left alone"
    upkeep.WAL_LIMIT = 1_000
    assert upkeep.wal_is_long
    reader = o.Store(store.path)
    reader.db.execute("BEGIN")
    reader.sessions()
    fill(store, "main", 3)
    start = time.monotonic()
    upkeep.checkpoint()
    assert wal.stat().st_size > 0 and time.monotonic() - start < o.Store.BUSY, "a reader is not waited for"
    reader.close()
    upkeep.checkpoint()
    upkeep.optimize()
    assert wal.stat().st_size < 10_000 and len(list(store.transcript(store.find_session("main")))) == 6


# The log


CHATTER = """
import logging, os, pathlib, subprocess, threading
path = pathlib.Path(sys.argv[1])
log_file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for stream in (1, 2):
    os.dup2(log_file, stream)
o.setup_logging("info", o.Redactor())
logging.getLogger().addHandler(o.LogFile(path, 20_000))
def talk(name):
    for number in range(150):
        o.log.info("%s-%d %s", name, number, "x" * 50)
threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
for thread in threads:
    thread.start()
for number in range(100):
    os.write(1, b"d-%d\\n" % number)
for thread in threads:
    thread.join()
subprocess.run(["sh", "-c", "echo e-0; echo e-1 >&2"])
"""


def test_the_log_is_rotated_and_no_line_is_lost(tmp_path):
    path = tmp_path / "openpista.log"
    subprocess.run([sys.executable, "-c", START + CHATTER, path], check=True, cwd=os.path.dirname(o.__file__))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["openpista.log", "openpista.log.1", "openpista.log.2"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    lines = re.findall(r"\b([a-e]-\d+)\b", "".join(file.read_text() for file in files))
    expected = [
        f"{name}-{n}"
        for name, count in (("a", 150), ("b", 150), ("c", 150), ("d", 100), ("e", 2))
        for n in range(count)
    ]
    assert sorted(lines) == sorted(expected)


def test_five_logs_are_kept(tmp_path):
    script = CHATTER.replace("20_000", "1_000")
    subprocess.run(
        [sys.executable, "-c", START + script, tmp_path / "log"], check=True, cwd=os.path.dirname(o.__file__)
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2", "log.3", "log.4"]
    assert "e-0" in (tmp_path / "log").read_text()


def test_a_log_that_is_somebody_elses_is_left_alone(tmp_path):
    path = tmp_path / "openpista.log"
    path.write_bytes(b"x" * 100)
    o.LogFile(path, 10).handle(logging.makeLogRecord({"msg": "hi"}))  # stderr is not this file
    assert [file.name for file in tmp_path.iterdir()] == ["openpista.log"]


def test_the_daemon_begins_a_new_log(house, openpista):  # noqa: F811
    log = house.home / "openpista.log"
    log.write_bytes(b"x" * (o.LOG_LIMIT + 1) + b"\n")
    log.chmod(0o600)
    assert openpista("start", "--detach").returncode == 0
    house.detached = int(house.pid_file.read_text().split()[0])
    until(lambda: (house.home / "openpista.log.1").exists() and log.exists())
    openpista("stop")
    logs = sorted(path.name for path in house.home.glob("*.log*"))
    assert logs == ["openpista.log", "openpista.log.1"] and log.stat().st_size < 10_000
