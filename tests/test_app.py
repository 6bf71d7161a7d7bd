"""App: the objects together, as processes: sessions, signals, kill -9, two at once, twelve at once."""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import signal
import sqlite3
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launcher import PROGRAM, Process

import openpista as o


@pytest.fixture
def start(openai, tmp_path):
    """Starts a process that goes on: start("run", "-e", "hi", stdin=...) -> what can be waited for"""
    started = []

    def begin(*words, env=None, wrapper=(), **more):
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        env = openai | (env or {})
        if wrapper:
            started.append(subprocess.Popen([*wrapper, *PROGRAM, *words], env=env, cwd=tmp_path, text=True, **more))
        else:
            started.append(Process(words, env, tmp_path, **more))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def system_run(command, **others):
    return {"name": "system_run", "arguments": {"command": command} | others}


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def alive(group):
    """Whether a process group has a process that is no zombie."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


@pytest.fixture
def long_tool(model, start, tmp_path):
    """long_tool(*words): a run whose tool has begun and would sleep for long -> (process, the tool's group)"""
    groups = []

    def begin(*words, before="", **more):
        command = f"{before} echo once >> effect; echo $$ > pid; sleep 50 & sleep 50; wait; sleep 50"
        model.script({"tool_calls": [system_run(command, workdir=str(tmp_path))]})
        process = start("run", "-e", "go", "--yes", "--session", "s", *words, **more)
        groups.append(int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())))
        return process, groups[-1]

    yield begin
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def goes_on(model, openpista, openai, tmp_path):
    """The next run on the session is taken by the strict server and repeats nothing; the tool's result as it was sent."""
    model.script({"text": "back"})
    done = openpista("run", "-e", "what was that?", "--session", "s", env=openai)
    assert (done.stdout, done.stderr, done.returncode) == ("back\n", "", 0)
    assert (tmp_path / "effect").read_text() == "once\n"
    (body,) = model.bodies()
    roles = [message["role"] for message in body["messages"] if message["role"] != "system"]
    assert roles[:3] == ["user", "assistant", "tool"] and roles[-1] == "user"
    return next(message["content"] for message in body["messages"] if message["role"] == "tool")


# Signals

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_stops_the_tool(long_tool, model, openpista, openai, tmp_path, number):
    process, group = long_tool()
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 1.5
    assert (out, err, process.returncode) == ("", "openpista: interrupted\n", 130)
    assert not alive(group)
    assert "stopped while it ran" in goes_on(model, openpista, openai, tmp_path)


def test_a_tool_that_will_not_stop_is_killed(long_tool, model, openpista, openai, tmp_path):
    process, group = long_tool(before="trap '' TERM HUP INT;")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 130 and not alive(group)
    goes_on(model, openpista, openai, tmp_path)


@pytest.mark.parametrize("number", STOPS[:2], ids=lambda number: number.name)
def test_a_second_signal_does_not_wait(long_tool, model, openpista, openai, tmp_path, number):
    process, group = long_tool(before="trap '' TERM HUP INT;")
    process.send_signal(number)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 1
    assert process.returncode == 130 and err == "openpista: interrupted\n"
    assert not alive(group)
    goes_on(model, openpista, openai, tmp_path)


def test_a_signal_while_the_model_thinks(model, start, openpista, openai):
    model.script({"text": "late", "delay": 20})
    process = start("run", "-e", "go", "--session", "s")
    model.wait()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "openpista: interrupted\n")
    assert process.returncode == 130 and time.monotonic() - began < 1
    model.script({"text": "back"})
    assert openpista("run", "-e", "again", "--session", "s", env=openai).stdout == "back\n"
    assert [m["content"] for m in model.bodies()[0]["messages"] if m["role"] == "user"] == ["go", "again"]


def test_a_signal_while_standard_input_is_open(start):
    process = start("run", "-e", "go", stdin=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert process.stderr.read() == "openpista: interrupted\n"


def test_a_signal_with_json(long_tool):
    process, _ = long_tool("--json")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert err == "openpista: interrupted\n"
    assert json.loads(out) == {"error": "interrupted", "exit_code": 130}


def test_nohup_is_honoured(model, start):
    model.script({"tool_calls": [system_run("sleep 1")]}, {"text": "done"})
    process = start("run", "-e", "go", wrapper=["nohup"])
    model.wait()
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=10)[0] == "done\n"
    assert process.returncode == 0


def test_a_timeout_stops_the_tool(long_tool, model, openpista, openai, tmp_path):
    process, group = long_tool("--timeout", "1.5", "--json")
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1 and not alive(group)
    assert err == "openpista: no answer within 1.5 s; session s has what was done\n"
    assert json.loads(out) == {"error": err.removeprefix("openpista: ").strip(), "exit_code": 1}
    goes_on(model, openpista, openai, tmp_path)


# kill -9


def test_a_kill_in_a_tool_repeats_nothing(long_tool, model, openpista, openai, tmp_path):
    process, _ = long_tool()
    process.kill()
    process.communicate()
    assert "its outcome is unknown" in goes_on(model, openpista, openai, tmp_path)


def test_a_kill_between_two_tools(model, start, openpista, openai, tmp_path):
    """One call has ended, one runs: the first one's result is kept."""
    calls = [
        system_run("echo first", workdir=str(tmp_path)),
        system_run("echo $$ > pid; sleep 50", workdir=str(tmp_path)),
    ]
    model.script({"tool_calls": calls})
    process = start("run", "-e", "go", "--yes", "--session", "s")
    group = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    time.sleep(0.2)
    process.kill()
    process.communicate()
    os.killpg(group, signal.SIGKILL)
    model.script({"text": "back"})
    assert openpista("run", "-e", "again", "--session", "s", env=openai).stdout == "back\n"
    first, second = [m["content"] for m in model.bodies()[0]["messages"] if m["role"] == "tool"]
    assert "first" in first and "unknown" in second


def test_a_kill_while_the_model_thinks(model, start, openpista, openai):
    model.script({"text": "late", "delay": 20})
    process = start("run", "-e", "my words", "--session", "s")
    model.wait()
    process.kill()
    process.communicate()
    model.script({"text": "back"})
    assert openpista("run", "-e", "again", "--session", "s", env=openai).stdout == "back\n"
    assert [m["content"] for m in model.bodies()[0]["messages"] if m["role"] == "user"] == ["my words", "again"]


# Side by side


def test_two_on_one_session(model, start, openpista, openai):
    model.script(
        {"model": "a", "tool_calls": [system_run("sleep 0.7")]},
        {"model": "a", "text": "first answer"},
        {"model": "b", "text": "second answer"},
    )
    one = start("run", "-e", "one", "--session", "s", "--model", "a")
    model.wait()
    two = start("run", "-e", "two", "--session", "s", "--model", "b")
    assert one.communicate(timeout=10) == ("first answer\n", "")
    assert two.communicate(timeout=10) == ("second answer\n", "")
    said = [m["content"] for m in model.bodies()[-1]["messages"] if m["role"] in ("user", "assistant") and m["content"]]
    assert said == ["one", "first answer", "two"]


def test_a_waiting_run_can_be_stopped(long_tool, start):
    long_tool()
    began = time.monotonic()
    two = start("run", "-e", "two", "--session", "s", "--timeout", "0.5")
    assert two.communicate(timeout=10)[1] == "openpista: no answer within 0.5 s; session s has what was done\n"
    assert two.returncode == 1 and time.monotonic() - began < 3


def test_a_session_in_use_is_not_deleted(long_tool, openpista):
    process, _ = long_tool()
    done = openpista("sessions", "delete", "s")
    assert done.returncode == 1 and done.stdout == ""
    assert "session 's' is in use by " in done.stderr and f":{process.pid}; try again" in done.stderr
    assert openpista("sessions", "list").stdout.count("s ") >= 1


def test_twelve_first_runs_at_once(openpista, home):
    def run(number):
        return openpista("run", "--provider", "offline", "-e", f"$ echo {number}", "--session", f"s{number}")

    with ThreadPoolExecutor(12) as pool:
        done = list(pool.map(run, range(12)))
    assert [(one.stdout, one.stderr, one.returncode) for one in done] == [(f"{i}\n", "", 0) for i in range(12)]
    listed = json.loads(openpista("sessions", "list", "--json").stdout)
    assert {session["name"] for session in listed} == {f"s{i}" for i in range(12)}
    assert {session["messages"] for session in listed} == {4}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_runs_of_one_second_have_sessions_of_their_own(openpista):
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda i: openpista("run", "--provider", "offline", "-e", f"w{i}"), range(4)))
    assert all(one.returncode == 0 for one in done)
    assert len(json.loads(openpista("sessions", "list", "--json").stdout)) == 4


# The home


def test_all_in_the_home_is_private(openpista, model, openai, home):
    model.script(
        {"tool_calls": [system_run("echo hi", background=True)]},
        {"text": "done"},
    )
    old = os.umask(0)
    try:
        assert openpista("run", "-e", "go", "--yes", env=openai).stdout == "done\n"
        login = ["auth", "login", "--non-interactive", "--provider", "groq", "--api-key", "-"]
        assert openpista(*login, input="a-key-that-is-stored").returncode == 0
    finally:
        os.umask(old)
    modes = {path.relative_to(home): stat.S_IMODE(path.stat().st_mode) for path in [home, *home.rglob("*")]}
    assert {path.name for path in modes} >= {"memory.db", "credentials.toml", "jobs"}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_an_open_home_is_closed_and_that_is_said(openpista, home):
    home.mkdir(mode=0o755)
    done = openpista("run", "--provider", "offline", "-e", "$ echo hi")
    assert done.stdout == "hi\n" and f"{home} was open to others" in done.stderr
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert openpista("run", "--provider", "offline", "-e", "$ echo hi").stderr == ""


def test_a_home_that_holds_other_things_keeps_its_mode(openpista, home):
    home.mkdir(mode=0o755)
    (home / "somebody's").write_text("file")
    done = openpista("run", "--provider", "offline", "-e", "$ echo hi")
    assert (done.stdout, done.stderr) == ("hi\n", "") and stat.S_IMODE(home.stat().st_mode) == 0o755
    assert stat.S_IMODE((home / "memory.db").stat().st_mode) == 0o600


def test_a_home_that_others_may_write_into_is_refused(openpista, home):
    home.mkdir()
    home.chmod(0o1777)
    (home / "somebody's").write_text("file")
    done = openpista("run", "--provider", "offline", "-e", "$ echo hi")
    assert done.returncode == 1 and f"others may write into the home folder {home}" in done.stderr
    assert stat.S_IMODE(home.stat().st_mode) == 0o1777 and not (home / "memory.db").exists()


PLACES = [  # configuration -> where the database is
    ("", "home/memory.db"),
    ('[database]\nurl = "{tmp}/there/own.db"', "there/own.db"),
    ('[database]\nurl = "sqlite:///{tmp}/own.db"', "own.db"),
    ('[database]\nurl = "~/tilde.db"', "tilde.db"),
]


@pytest.mark.parametrize(("text", "place"), PLACES)
def test_where_the_database_is(openpista, tmp_path, text, place):
    (tmp_path / "config.toml").write_text(text.replace("{tmp}", str(tmp_path)))
    assert openpista("run", "--provider", "offline", "-e", "$ echo hi").stdout == "hi\n"
    with contextlib.closing(sqlite3.connect(tmp_path / place)) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (4,)


# Who answers


def test_the_stand_in_answers(openpista, model, openai, tmp_path):
    (tmp_path / "config.toml").write_text('[agent]\nprovider = "openai"\nfallback = ["groq", "anthropic/claude-x"]')
    env = openai | {"ANTHROPIC_API_KEY": "test-key-anthropic", "ANTHROPIC_BASE_URL": model.url}
    model.script({"model": "gpt-4o", "status": 404}, {"model": "claude-x", "text": "I stand in"})
    done = openpista("run", "-e", "hi", "--json", env=env)
    assert json.loads(done.stdout)["answer"] == "I stand in"
    assert json.loads(done.stdout)["provider"] == "anthropic" and json.loads(done.stdout)["model"] == "claude-x"
    assert "fallback groq is left out" in done.stderr


async def ask(app, name, text="hi", model=None):
    session = app.store.session(name)
    if model is not None:
        app.store.set_model(session, model)
    return (await app.agent.turn(app.store.session(name), text, o.Gate("never", None), lambda progress: None)).model


def test_sessions_side_by_side_have_models_of_their_own(model, openai, home):
    """And a turn that is asking when keys change ends with what it began with, which is then closed."""
    model.script({"model": "m1", "delay": 0.3, "text": "slow"}, {"text": "Hi.", "times": -1})
    ctx = o.Context(argparse.Namespace(), o.Config(), home, openai, o.Redactor())

    async def go():
        async with o.open_app(ctx) as app:
            turns = ask(app, "a", model="openai/m1"), ask(app, "b", model="openai/m2"), ask(app, "c")
            slow, *others = map(asyncio.ensure_future, turns)
            assert await asyncio.gather(*others) == ["openai/m2", "openai/gpt-4o"]
            first, asking = app.models.pick(""), app.models.pick("openai/m1")
            await app.models.renew(ctx._replace(environ=openai | {"OPENAI_API_KEY": "another-key-1"}))
            assert await slow == "openai/m1" and asking.providers[0]._client is None, "closed behind its answer"
            assert app.models.pick("") is not first and await ask(app, "b") == "openai/m2"
            assert model.requests()[-1]["headers"]["authorization"] == "Bearer another-key-1"
            with pytest.raises(o.CredentialError, match="no key for groq"):
                await ask(app, "d", model="groq/x")

    asyncio.run(go())


def test_a_skill_is_offered_read_and_run(openpista, model, openai, home):
    place = home / "workspace" / "skills" / "dog"
    home.mkdir(mode=0o700)
    place.mkdir(parents=True)
    (place / "SKILL.md").write_text("---\nname: dog\ndescription: Walks the dog.\n---\nTake the lead.\n")
    (place / "run.sh").write_text("echo walked $1\n")
    model.script(
        {"tool_calls": [{"name": "skill_read", "arguments": {"name": "dog"}}], "expect": "Walks the dog."},
        {
            "tool_calls": [{"name": "skill_run", "arguments": {"name": "dog", "args": ["far"]}}],
            "expect": "Take the lead",
        },
        {"text": "woof", "expect": "walked far"},
    )
    done = openpista("run", "-e", "walk", env=openai)
    assert (done.stdout, done.stderr) == ("woof\n", "")


def test_a_stored_key_that_is_not_asked_is_hidden_too(openpista, home):
    """A tool can read credentials.toml, whatever the model that is asked."""
    for provider in ("groq", "mistral"):
        openpista("auth", "login", "--provider", provider, "--api-key", "-", input=f"canary-of-{provider}")
    done = openpista("run", "--yes", "--provider", "offline", "-e", f"$ cat {home}/credentials.toml")
    assert done.stdout.count("[secret]") == 2 and "canary" not in done.stdout


def test_a_key_on_its_way_without_encryption_is_said(openpista):
    login = ("auth", "login", "--provider", "custom", "--api-key", "-", "--endpoint")
    assert openpista(*login, "http://me:hunter2@no-such-host.invalid/v1", input="test-key-123456").returncode == 0
    done = openpista("run", "--model", "m", "--timeout", "0.1", "-e", "hi")
    assert "the key for custom goes to http://…@no-such-host.invalid/v1 without encryption" in done.stderr
    assert "hunter2" not in done.stderr + openpista("auth", "status").stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_that_cannot_be_stored_is_one_answer(openpista, home, as_json):
    """The same for a script: one JSON object, that has the answer and what went wrong with it."""
    assert openpista("run", "--provider", "offline", "-e", "hi").returncode == 0
    with contextlib.closing(sqlite3.connect(home / "memory.db")) as db:
        db.execute(
            "CREATE TRIGGER no BEFORE INSERT ON messages WHEN NEW.role = 'assistant' AND NEW.tool_calls IS NULL "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    done = openpista("run", "--provider", "offline", "-e", "$ echo hey", *["--json"] * as_json)
    assert done.returncode == 1 and "the answer could not be stored" in done.stderr
    if as_json:
        found = json.loads(done.stdout)
        assert found["answer"] == "hey" and "could not be stored" in found["error"] and found["exit_code"] == 1
    else:
        assert done.stdout == "hey\n"


def test_a_working_folder_that_is_not_there_is_a_wrong_setting(openpista, tmp_path):
    (tmp_path / "config.toml").write_text('[tools]\nworkdir = "/no/such"\n')
    done = openpista("run", "--provider", "offline", "-e", "$ true")
    assert (done.returncode, done.stderr) == (2, "openpista: no folder /no/such; see [tools] workdir\n")
