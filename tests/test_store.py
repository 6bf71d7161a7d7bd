"""Store: the file and its migrations, transcripts that come back as they went in, the journal, the lease, usage."""

import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes import FakeClock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launcher import Process

import openpista
from openpista import Image, Message, Role, Store, StoreError, ToolCall, ToolResult, Usage

ROOT = Path(openpista.__file__).parent


class Impatient(Store):
    """A Store that does not wait long for another process."""

    BUSY = 0.2


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


@pytest.fixture
def store(path):
    with Store(path) as store:
        yield store


@pytest.fixture
def session(store):
    return store.session("main")


def user(text):
    return Message(Role.USER, text)


def asking(*ids, name="system.run"):
    """An assistant's message that asks for calls with these ids."""
    return Message(Role.ASSISTANT, "", tuple(ToolCall(i, name, {"command": "true"}) for i in ids))


def messages(store, session):
    return [entry.message for entry in store.transcript(session)]


def python(code, *words, **options):
    """A child that has openpista at hand."""
    code = f"import os, sys; from pathlib import Path; from openpista import *\n{code}\nsys.exit()"
    return Process(words, os.environ, ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, prepare=code, **options)


NOBODY = """
if os.getuid() == 0:  # for root no mode counts
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
"""


def as_nobody(code, path):
    """What a child prints that is not root."""
    for folder in (path.parent, *path.parent.parents):
        if os.getuid() == 0 and folder.owner() == "root" and len(folder.parts) > 2 and folder.stat().st_mode & 1 == 0:
            folder.chmod(0o755)
    child = python(NOBODY + code, str(path))
    out, err = child.communicate(timeout=20)
    assert not err, err
    return out


# The file


def test_a_new_file_has_every_step_and_is_private(path):
    with Store(path) as store:
        assert store.sessions() == []
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(steps()),)
        assert db.execute("PRAGMA application_id").fetchone() == (openpista.APPLICATION_ID,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for file in path.parent.glob("memory.db*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def steps():
    sql = openpista.read_asset("migrations.sql")
    return [list(openpista.statements(step)) for step in openpista.migration_steps(sql)]


def test_each_step_of_the_migrations_has_statements_that_are_whole():
    sql = (ROOT / "migrations.sql").read_text()
    assert len(steps()) == sql.count("\n-- step ") > 0
    for step in steps():
        assert step
        assert all(sqlite3.complete_statement(statement) for statement in step)
    assert sum(map(len, steps())) == sqlite_statements(sql)


def sqlite_statements(sql):
    """How many statements a text holds, counted another way: semicolons outside of comments."""
    return sum(line.split("--")[0].count(";") for line in sql.splitlines())


def test_connections_are_set_up(store):
    assert store.db.execute("PRAGMA foreign_keys").fetchone() == (1,)
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store.db.execute("PRAGMA busy_timeout").fetchone()[0] >= 1000


def test_opening_again_keeps_what_is_there(path):
    for number in range(3):
        with Store(path) as store:
            session = store.session("main")
            assert len(messages(store, session)) == number
            store.append(session, user("hi"))


def test_folders_are_made_and_closed_to_others(tmp_path):
    with Store(tmp_path / "a" / "b" / "memory.db"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def newer(path):
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


def other_program(*pragmas):
    def make(path):
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE bookmarks (url)")
            for pragma in pragmas:
                db.execute(f"PRAGMA {pragma}")

    return make


def truncated(path):
    with Store(path) as store:
        session = store.session("main")
        store.append(session, user("x" * 100_000))
    os.truncate(path, 10_000)


REFUSED = [  # what lies there -> what the error says
    ("newer", newer, "newer openpista (schema 99"),
    ("another program's", other_program(), "another program's database"),
    ("another's with a version", other_program("user_version = 1"), "another program's database"),
    ("another's with a high version", other_program("user_version = 77"), "another program's database"),
    ("another's with an id", other_program("application_id = 7"), "another program's database"),
    ("text", lambda path: path.write_text("dear diary " * 1000), "damaged or no database"),
    ("noise", lambda path: path.write_bytes(os.urandom(5000)), "damaged or no database"),
    ("a folder", lambda path: path.mkdir(), "cannot open the database"),
]


@pytest.mark.parametrize(("make", "words"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_what_is_refused(path, make, words):
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError) as caught:
        Store(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert path.read_bytes() == before, "it was changed all the same"


def test_a_truncated_file_is_an_error_not_a_traceback(path):
    truncated(path)
    with pytest.raises(StoreError, match=r"damaged|malformed"), Store(path) as store:
        messages(store, store.session("main"))
        store.db.execute("PRAGMA quick_check")


def test_a_file_where_the_folder_should_be(path):
    path.touch()
    with pytest.raises(StoreError, match="cannot open the database"):
        Store(path / "memory.db")


def test_an_empty_file_counts_as_new(path):
    path.touch()
    with Store(path) as store:
        assert store.session("main").name == "main"


OPEN = """
try:
    with Store(Path(sys.argv[1])) as store: print(store.session('main').name)
except StoreError as error: print(error)
"""


def test_a_file_that_may_not_be_written(path):
    Store(path).close()
    path.chmod(0o444)
    out = as_nobody(OPEN, path)
    assert "Permission denied" in out or "readonly" in out
    assert str(path) in out


def test_a_folder_that_may_not_be_written(tmp_path):
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    assert "Permission denied" in as_nobody(OPEN, place / "memory.db")


def test_locked_by_another_process(path):
    with Store(path) as store:
        session = store.session("main")
        with sqlite3.connect(path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            with Impatient(path) as second:
                assert messages(second, session) == [], "reading goes on"
                with pytest.raises(StoreError, match="locked by another process") as caught:
                    second.append(session, user("hi"))
                assert str(path) in str(caught.value)
                other.execute("COMMIT")
                second.append(session, user("hi"))
        assert len(messages(store, session)) == 1


def test_a_reader_of_a_file_without_wal_is_waited_for_once(path):
    """SQLite waits here by itself, at each try; it took more than four minutes."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("PRAGMA user_version = 0")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM sqlite_master").fetchall()
        started = time.monotonic()
        with pytest.raises(StoreError, match="locked by another process"):
            Impatient(path)
        assert time.monotonic() - started < 10 * Impatient.BUSY


def test_a_new_file_that_is_locked(path):
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked by another process"):
            Impatient(path)
        other.execute("COMMIT")
    other.close()
    Impatient(path).close()


def test_a_full_disk_loses_nothing(store, session):
    store.append(session, user("first"))
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full") as caught:
        store.append(session, user("x" * 100_000))
    assert "make room on the disk" in str(caught.value)
    assert messages(store, session) == [user("first")]
    assert not store.db.in_transaction
    store.db.execute("PRAGMA max_page_count = 100000")
    store.append(session, user("x" * 100_000))
    assert len(messages(store, session)) == 2


def test_a_full_disk_at_the_start(path):
    class Tight(Store):
        def _use_wal(self):
            super()._use_wal()
            self.db.execute("PRAGMA max_page_count = 3")

    with pytest.raises(StoreError, match="full"):
        Tight(path)
    with Store(path) as store:  # the step was undone as a whole, and is done now
        assert store.sessions() == []


def test_closing_twice_is_harmless(path):
    store = Store(path)
    store.close()
    store.close()


def test_twelve_open_a_new_file_at_once(path):
    code = """
sys.stdin.readline()
with Store(Path(sys.argv[1])) as store:
    session = store.session("main")
    for i in range(2):
        store.append(session, Message(Role.USER, f"{sys.argv[2]} {i}"))
"""
    children = [python(code, str(path), str(number), stdin=subprocess.PIPE) for number in range(12)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate(timeout=30)[1] for child in children] == [""] * 12
    with Store(path) as store:
        texts = [message.text for message in messages(store, store.session("main"))]
    assert sorted(texts) == sorted(f"{number} {i}" for number in range(12) for i in range(2))


def test_a_file_that_another_process_makes_while_we_look_at_it(path):
    """Between two looks at the file another openpista may have made the whole schema."""

    class Slow(Store):
        def _pragma(self, name):
            value = super()._pragma(name)
            if name == "application_id":
                Store(path).close()
            return value

    with Slow(path) as store:
        assert store.session("main").name == "main"


def test_a_step_that_another_process_has_just_done_is_not_done_twice(path):
    class Slow(Store):
        def _migrate(self, steps):
            Store(path).close()
            super()._migrate(steps)

    Slow(path).close()


def test_a_later_step_is_applied_to_an_old_file(path):
    class Later(Store):
        def _migrate(self, steps):
            super()._migrate([*steps, "CREATE TABLE more (id);\nINSERT INTO more VALUES (1);\n"])

    class Broken(Store):
        def _migrate(self, steps):
            super()._migrate([*steps, "CREATE TABLE more (id);\nINSERT INTO nowhere VALUES (1);\n"])

    with Store(path) as store:
        store.append(store.session("main"), user("hi"))
    with pytest.raises(StoreError, match="nowhere"):
        Broken(path)
    Store(path).close()  # half a step is no step
    with Later(path) as store:
        assert store.db.execute("SELECT id FROM more").fetchall() == [(1,)]
        assert messages(store, store.session("main")) == [user("hi")]
    with pytest.raises(StoreError, match="newer"):
        Store(path)


# Atomic


def test_atomic_is_all_or_nothing(store, session):
    with pytest.raises(ZeroDivisionError), store.atomic():
        store.append(session, user("lost"))
        1 / 0  # noqa: B018
    assert messages(store, session) == []
    with store.atomic():
        store.append(session, user("kept"))
    assert messages(store, session) == [user("kept")]


def test_nested_blocks_count_as_the_outermost(store, session):
    with pytest.raises(ZeroDivisionError), store.atomic():
        with store.atomic():
            store.append(session, user("lost"))
        1 / 0  # noqa: B018
    assert messages(store, session) == []
    assert not store.db.in_transaction
    with store.atomic(), store.atomic(), store.atomic():
        store.append(session, user("kept"))
    assert messages(store, session) == [user("kept")]


def test_nothing_is_seen_from_outside_before_the_end(path, store, session):
    with Store(path) as other, store.atomic():
        store.append(session, user("not yet"))
        assert messages(other, session) == []


def test_a_block_works_after_one_that_could_not_begin(path, store, session):
    with sqlite3.connect(path, isolation_level=None) as other, Impatient(path) as second:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"), second.atomic():
            pass
        other.execute("ROLLBACK")
        second.append(session, user("hi"))
    assert len(messages(store, session)) == 1


# Sessions


def test_sessions_are_made_once(store):
    assert store.session("a") == store.session("a") == store.find_session("a")
    assert store.session("b").id != store.session("a").id


def test_a_session_that_is_not_there(store):
    store.session("holiday")
    with pytest.raises(StoreError, match="no session named 'holyday', did you mean 'holiday'"):
        store.find_session("holyday")


def test_list_of_sessions_has_the_last_used_first(path):
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))
    with Store(path, clock.now) as store:
        for name in ("old", "new", "empty"):
            store.session(name)
        for name, text in [("old", "one"), ("new", "two"), ("new", "three")]:
            clock.advance(timedelta(seconds=1))
            store.append(store.session(name), user(text))
        listed = [(info.name, info.messages, info.first) for info in store.sessions()]
        assert listed == [("new", 2, "two"), ("old", 1, "one"), ("empty", 0, "")]
        assert [info.name for info in store.sessions(limit=1)] == ["new"]
        assert store.sessions()[0].updated_at == "2026-03-01T00:00:03.000Z"


NAMES = ["main", "", "a b", "한국어 세션", "x" * 5000, "'; DROP TABLE sessions; --", "\n", "half \udcff", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_stored_or_refused_in_our_words(store, name):
    try:
        session = store.session(name)
    except openpista.PistaError:
        return
    assert store.find_session(name).id == session.id
    store.delete_session(name)
    assert store.sessions() == []


def test_deleting_takes_all_but_usage(path, store, session):
    other = store.session("other")
    for each in (session, other):
        message_id = store.append(each, asking("c1", "c2"))
        store.start_call(message_id, ToolCall("c1", "system.run", {}))
        store.finish_call(each, message_id, ToolResult("c1", "done"))
        store.summarise(each, message_id, "in short")
        store.add_usage(each, "fake/model", Usage(1, 0, 1), 0.1)
    store.delete_session("main")
    counts = [
        store.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("sessions", "messages", "summaries", "tool_calls", "usage")
    ]
    assert counts == [1, 2, 1, 2, 2]
    assert store.db.execute("SELECT count(*) FROM usage WHERE session_id IS NULL").fetchone() == (1,)
    assert store.db.execute("PRAGMA foreign_key_check").fetchall() == []
    with pytest.raises(StoreError, match="no session"):
        store.delete_session("main")


def test_every_table_says_what_happens_when_its_session_is_deleted(store):
    tables = [row[0] for row in store.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        for row in store.db.execute(f"PRAGMA foreign_key_list({table})"):
            assert row[6] in ("CASCADE", "SET NULL"), table


# Messages

any_text = st.text(st.characters(exclude_categories=()), max_size=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(any_text, json_values, max_size=3)
any_id = st.text(max_size=40)  # the Wire section lets no lone surrogate in
any_call = st.builds(ToolCall, any_id, any_text, json_objects, any_text, st.none() | json_objects)
any_message = st.builds(
    Message,
    st.sampled_from(Role),
    any_text,
    st.lists(any_call, max_size=3, unique_by=lambda call: call.id).map(tuple),
    any_id,
    st.booleans(),
    st.none() | json_objects,
    st.lists(st.builds(Image, any_text, any_text, st.just(b"")), max_size=2).map(tuple),
)


def plain(value):
    """The value with each lone surrogate and NUL of its texts as one mark, since these may change."""
    if isinstance(value, str):
        return "".join("¿" if c in "\0␀?" or "\ud800" <= c <= "\udfff" else c for c in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def test_of_a_picture_its_path_is_stored_and_not_its_bytes(store, session):
    shown = Image("/tmp/a.png", "image/png", b"canary")
    store.append(session, user("look")._replace(images=(shown,)))
    assert messages(store, session) == [user("look")._replace(images=(shown._replace(data=b""),))]
    assert "canary" not in repr(shown) and b"canary" not in store.path.with_name("memory.db-wal").read_bytes()
    row = store.db.execute("SELECT images FROM messages").fetchone()
    assert row == ('[{"media_type":"image/png","path":"/tmp/a.png"}]',)
    store.append(session, user("nothing to see"))
    assert store.db.execute("SELECT count(images) FROM messages").fetchone() == (1,)


@pytest.mark.parametrize("damaged", ["{", "[1]", '[{"name": "x"}]', "7"])
def test_pictures_that_are_damaged_are_our_error(store, session, damaged):
    store.append(session, user("look"))
    store.db.execute("UPDATE messages SET images = ?", (damaged,))
    with pytest.raises(StoreError, match="message 1 in .* is damaged"):
        messages(store, session)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_message, max_size=4))
def test_transcripts_come_back_as_they_went_in(store, said):
    store.db.execute("DELETE FROM sessions")
    session = store.session("main")
    ids = [store.append(session, message) for message in said]
    entries = list(store.transcript(session))
    expected = [plain(m._replace(echo=m.echo or None)) for m in said]
    assert [plain(entry.message) for entry in entries] == expected
    assert [entry.id for entry in entries] == ids == sorted(ids)
    assert store.tail(session, 10**9) == entries


@given(any_text)
def test_storable_text_is_the_same_unless_it_cannot_be(text):
    stored = openpista.storable(text)
    assert stored.encode() is not None
    assert "\0" not in stored
    assert plain(stored) == plain(text)
    assert openpista.storable(stored) == stored


LARGE = [
    ("1 MB", "x" * 1_000_000),
    ("1 MB of Korean", "가" * 350_000),
    ("emoji", "👩‍👩‍👧‍👦" * 1000),
    ("CRLF", "a\r\nb\r\r\n\n"),
]


@pytest.mark.parametrize("text", [pytest.param(case[1], id=case[0]) for case in LARGE])
def test_large_and_odd_texts(store, session, text):
    call = ToolCall("c1", "system.run", {"command": text}, extra={"signature": text})
    store.append(session, Message(Role.ASSISTANT, text, (call,), echo={"thinking": text}))
    assert messages(store, session) == [Message(Role.ASSISTANT, text, (call,), echo={"thinking": text})]


def test_columns_are_what_a_person_wants_to_read(store, session):
    store.append(
        session, Message(Role.ASSISTANT, "Ich sehe nach", (ToolCall("c1", "system.run", {"command": "ls 한"}),))
    )
    role, text, calls = store.db.execute("SELECT role, text, tool_calls FROM messages").fetchone()
    assert (role, text) == ("assistant", "Ich sehe nach")
    assert json.loads(calls)[0]["arguments"] == {"command": "ls 한"}
    assert "한" in calls


def test_tail_is_the_newest_in_order(store, session):
    ids = [store.append(session, user("x" * 900)) for _ in range(20)]
    assert [entry.id for entry in store.tail(session, 10**9)] == ids
    some = [entry.id for entry in store.tail(session, 5_000)]
    assert some == ids[-len(some) :]
    assert 5 <= len(some) <= 7
    assert [entry.id for entry in store.tail(session, 10**9, after=ids[-4])] == ids[-3:]
    assert [entry.id for entry in store.tail(session, 0)] == ids[-1:]
    assert store.tail(store.session("other"), 10**9) == []


def steps_of(store, work):
    """How many steps of SQLite's virtual machine some work takes: counted, not timed."""
    count = 0

    def tick():
        nonlocal count
        count += 1

    store.db.set_progress_handler(tick, 1)
    try:
        work()
    finally:
        store.db.set_progress_handler(None, 0)
    return count


def test_a_turn_costs_the_same_in_a_session_of_200_000_messages(store):
    small, large = store.session("small"), store.session("large")
    with store.atomic():
        sql = """INSERT INTO messages (session_id, role, text, created_at)
                 WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
                 SELECT ?, 'user', printf('message %d', i), '2026-03-01T00:00:00.000Z' FROM n"""
        store.db.execute(sql, (100, small.id))
        store.db.execute(sql, (200_000, large.id))
    work = {
        "tail": lambda session: store.tail(session, 4_000),
        "after": lambda session: store.tail(session, 4_000, after=50),
        "append": lambda session: store.append(session, asking("a", "b")),
        "open calls": lambda session: store.open_calls(session),
        "summary": lambda session: store.summary(session),
        "session": lambda session: store.session(session.name),
        "lease": lambda session: store.take_lease(session),
        "first of all": lambda session: next(store.transcript(session)),
    }
    for name, do in work.items():
        few, many = steps_of(store, lambda do=do: do(small)), steps_of(store, lambda do=do: do(large))
        assert many <= few * 1.5 + 20, name


def test_a_turn_costs_the_same_after_50_000_calls(store):
    small, large = store.session("small"), store.session("large")
    message_id = store.append(large, user("x"))
    with store.atomic():
        store.db.execute(
            """INSERT INTO tool_calls (session_id, message_id, call_id, name, arguments, state)
               WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)
               SELECT ?, ?, i, 'system.run', '{}', 'finished' FROM n""",
            (large.id, message_id),
        )
        for _ in range(1000):
            store.add_usage(large, "fake/model", Usage(1), 0.1)

    def turn(session):
        store.open_calls(session)
        asked = store.append(session, asking("new"))
        store.start_call(asked, ToolCall("new", "system.run", {}))
        store.finish_call(session, asked, ToolResult("new", "ok"))
        store.add_usage(session, "fake/model", Usage(1), 0.1)

    few, many = steps_of(store, lambda: turn(small)), steps_of(store, lambda: turn(large))
    assert many <= few * 1.5 + 20


# Elision and summaries


def test_the_mark_of_what_is_elided_is_kept(store, session):
    assert store.elide(session, 7).elided_upto == 7
    assert store.session("main").elided_upto == store.find_session("main").elided_upto == 7


def test_the_newest_summary_counts(store, session):
    assert store.summary(session) == (0, "")
    store.summarise(session, 5, "five")
    store.summarise(session, 9, "nine \ud800")
    assert store.summary(session) == (9, "nine ?")
    assert store.summary(store.session("other")) == (0, "")


# The journal


def states(store):
    return store.db.execute("SELECT call_id, state FROM tool_calls ORDER BY id").fetchall()


def test_states_of_a_call(path):
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))
    with Store(path, clock.now) as store:
        session = store.session("main")
        message_id = store.append(session, asking("c1", "c2", "c3"))
        call = ToolCall("c1", "system.run", {})
        assert store.open_calls(session) == [(message_id, c, "asked") for c in ("c1", "c2", "c3")]
        clock.advance(timedelta(seconds=1))
        store.start_call(message_id, call)
        assert store.open_calls(session)[0] == (message_id, "c1", "started")
        clock.advance(timedelta(seconds=1))
        store.finish_call(session, message_id, ToolResult("c1", "one", True))
        store.finish_call(session, message_id, ToolResult("c2", "not run"), "interrupted")
        assert states(store) == [("c1", "finished"), ("c2", "interrupted"), ("c3", "asked")]
        times = store.db.execute("SELECT started_at, finished_at FROM tool_calls").fetchall()
        assert times[0] == ("2026-03-01T00:00:01.000Z", "2026-03-01T00:00:02.000Z")
        assert times[2] == (None, None)
        assert messages(store, session)[1:] == [
            Message(Role.TOOL, "one", call_id="c1", is_error=True),
            Message(Role.TOOL, "not run", call_id="c2"),
        ]


def test_a_result_and_its_mark_are_written_together(store, session):
    message_id = store.append(session, asking("c1"))
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError):
        store.finish_call(session, message_id, ToolResult("c1", "x" * 100_000))
    assert states(store) == [("c1", "asked")]
    assert len(messages(store, session)) == 1


def test_a_message_and_its_calls_are_written_together(store, session):
    twice = asking("same", "same")
    with pytest.raises(StoreError):
        store.append(session, twice)
    assert messages(store, session) == []
    assert states(store) == []


def test_the_same_id_in_two_messages(store, session):
    first, second = store.append(session, asking("call_0")), store.append(session, asking("call_0"))
    store.finish_call(session, second, ToolResult("call_0", "done"))
    assert store.open_calls(session) == [(first, "call_0", "asked")]


@pytest.mark.parametrize("call_id", ["", "한", "a\0b", "x" * 100_000])
def test_any_id_of_a_call(store, session, call_id):
    """Ids come from a model's server."""
    message_id = store.append(session, asking(call_id))
    call = messages(store, session)[0].tool_calls[0]
    store.start_call(message_id, ToolCall(call_id, "system.run", {}))
    assert [row[2] for row in store.open_calls(session)] == ["started"]
    store.finish_call(session, message_id, ToolResult(call_id, "done"))
    assert store.open_calls(session) == []
    assert messages(store, session)[1].call_id == call.id


def test_an_id_that_cannot_be_stored_is_an_error_of_ours(store, session):
    with pytest.raises(StoreError):
        store.append(session, asking("\ud800"))
    assert messages(store, session) == []


WRITER = """
with Store(Path(sys.argv[1])) as store:
    session = store.session("main")
    print("ready", flush=True)
    for i in range(100_000):
        store.append(session, Message(Role.USER, f"do {i}"))
        call = ToolCall(f"c{i}", "system.run", {"command": f"echo {i}"})
        place = store.append(session, Message(Role.ASSISTANT, "", (call,)))
        store.start_call(place, call)
        store.finish_call(session, place, ToolResult(call.id, f"done {i}"))
        print(i, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 3, 6, 11])
def test_killed_in_the_middle(path, lines):
    child = python(WRITER, str(path))
    last = [child.stdout.readline() for _ in range(lines)][-1]
    child.send_signal(signal.SIGKILL)
    rest = child.communicate()[0].split()
    printed = (rest or [last.strip()])[-1]
    acknowledged = int(printed) + 1 if printed.isdigit() else 0
    with Store(path) as store:
        assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        session = store.session("main")
        said = messages(store, session)
        results = [message for message in said if message.role is Role.TOOL]
        assert len(results) >= acknowledged, "what was acknowledged is lost"
        roles = "".join(message.role[0] for message in said)
        assert roles in "uat" * (len(results) + 1)
        assert len(store.open_calls(session)) == (1 if roles.endswith("a") else 0)


# The lease

HOLD = """
with Store(Path(sys.argv[1])) as store:
    session = store.session("main")
    print(store.take_lease(session), flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "drop":
        store.drop_lease(session)
        print("dropped", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("way", ["drop", "die"])
def test_one_process_at_a_time_works_on_a_session(path, store, session, way):
    child = python(HOLD, str(path), way, stdin=subprocess.PIPE)
    assert child.stdout.readline() == "True\n"
    assert store.take_lease(session) is False
    assert store.lease_holder(session) == f"{store.owner.rpartition(':')[0]}:{child.pid}"
    store.drop_lease(session)  # what is not ours stays
    assert store.take_lease(session) is False
    assert store.take_lease(store.session("other")) is True
    with pytest.raises(StoreError, match=f"in use by .*:{child.pid}"):
        store.delete_session("main")
    if way == "drop":
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "dropped\n"
    else:
        child.kill()
        child.wait()
    end = time.monotonic() + Store.LEASE / 3
    while store.lease_holder(session) and time.monotonic() < end:
        time.sleep(0.01)  # a dead process is there until its parent has been told
    assert store.lease_holder(session) == ""
    assert store.take_lease(session) is True
    child.kill()
    child.communicate()


def test_a_container_with_the_hosts_name_cannot_tell_who_is_gone(path, store, session):
    """`docker run --network host` takes the host's name; its process numbers are its own."""
    look = "import sys; from pathlib import Path; from openpista import Store; s = Store(Path(sys.argv[1])); "
    look += "print(s.take_lease(s.session('main')))"
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--map-root-user", sys.executable, "-c", look, str(path)]
    assert store.take_lease(session)
    try:
        done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode:
        pytest.skip(f"no namespaces here: {done.stderr}")
    assert done.stdout == "False\n"


def test_a_lease_runs_out_without_a_heartbeat(path):
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))
    with Store(path, clock.now) as one, Store(path, clock.now) as two:
        one.owner, two.owner = "elsewhere:1", "nowhere:2"  # other machines: nobody can look whether they live
        session = one.session("main")
        assert one.take_lease(session)
        clock.advance(timedelta(seconds=Store.LEASE - 1))
        assert not two.take_lease(session)
        assert one.take_lease(session), "a heartbeat"
        clock.advance(timedelta(seconds=Store.LEASE - 1))
        assert not two.take_lease(session)
        clock.advance(timedelta(seconds=2))
        assert two.take_lease(session)
        assert not one.take_lease(session)
        assert one.lease_holder(session) == "nowhere:2"


OWNERS = [  # who is written there -> whether the session is free
    ("elsewhere:1", False),
    ("{host}:{me}", False),
    ("{host}:1", False),
    ("{host}:4194303", True),
    ("{host}:nonsense", False),
    ("{host}:99999999999999999999", False),
    ("nonsense", False),
]


@pytest.mark.parametrize(("owner", "free"), OWNERS)
def test_who_holds_a_lease(store, session, owner, free):
    owner = owner.format(host=store.owner.rpartition(":")[0], me=os.getppid())
    assert store.take_lease(session)
    store.db.execute("UPDATE sessions SET owner = ?", (owner,))
    assert store.lease_holder(session) == ("" if free else owner)


# Usage


def test_usage_adds_up(store, session):
    assert store.usage(session) == Usage()
    store.add_usage(session, "fake/model", Usage(100, 40, 10), 1.23456)
    store.add_usage(session, "fake/org/model:free", Usage(1, 0, 1, 0.5), 0)
    store.add_usage(session, "fake", Usage(1, 0, 1, 0.25), 0)
    assert store.usage(session) == Usage(102, 40, 12, 0.75)
    assert store.usage(store.session("other")) == Usage()
    rows = store.db.execute("SELECT provider, model, cost_usd, seconds FROM usage ORDER BY id").fetchall()
    assert rows == [("fake", "model", None, 1.235), ("fake", "org/model:free", 0.5, 0), ("fake", "", 0.25, 0)]


def test_names_of_new_sessions():
    name = openpista.new_session_name(datetime(2026, 3, 1, 9, 0, 0, tzinfo=UTC), "run")
    assert name.startswith("run-20260301-090000-")
    assert len({openpista.new_session_name(datetime(2026, 3, 1, tzinfo=UTC), "run") for _ in range(20)}) > 15


def test_what_is_written_unsynced_is_only_that(tmp_path):
    with Store(tmp_path / "memory.db") as store:
        with store.unsynced():
            assert store._pragma("synchronous") == 1
        with store.atomic(), store.unsynced():  # the outermost block counts
            store.add_usage(store.session("main"), "offline/shell", Usage(), 0.0)
            assert store._pragma("synchronous") == 2
        with pytest.raises(StoreError), store.unsynced():
            store._run("nonsense")
        assert store._pragma("synchronous") == 2
