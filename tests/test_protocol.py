"""The protocol openpista/1: a daemon-like process of its own, and real QUIC to it; `connect` and `devices`."""

import argparse
import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_quic import rebind

import openpista as pista
from openpista import (
    Code,
    Config,
    ConfigError,
    Context,
    CredentialError,
    Decision,
    Devices,
    Gateway,
    GatewayConfig,
    GatewayError,
    Invite,
    KnownGateways,
    Limits,
    QuicClient,
    Redactor,
    RemoteDesk,
    Store,
    StoreError,
    UsageError,
    WrongServer,
    hash_token,
    parse_invite,
)

# The process: a hub with the offline provider behind a gateway


def context(home, port=0, host="127.0.0.1", **gateway):
    config = Config()._replace(
        agent=pista.AgentConfig(provider="offline"),
        tools=pista.ToolsConfig(workdir=str(home)),
        gateway=GatewayConfig(port=port, host=host, **gateway),
    )
    return Context(argparse.Namespace(yes=False), config, home, dict(os.environ), Redactor(["hidden-secret-1"]))


@contextlib.asynccontextmanager
async def opened(ctx, approval="risky", **settings):
    """A gateway with a hub behind it, in this process."""
    async with pista.open_app(ctx) as app:
        hub = pista.Hub(app.store, app.agent, {}, approval=approval, redact=ctx.redact, queue=3)
        status = {"version": pista.__version__, "pid": os.getpid()}
        gateway = Gateway(hub, app.store, status=lambda: status, desk=pista.Local(ctx, app))
        gateway.LOOK = settings.pop("look", 1.0)
        try:
            await gateway.open(ctx.home, ctx.config.gateway, Limits(**settings))
            async with hub:
                yield gateway
        finally:
            await gateway.close()


async def serve(home, port, approval):
    async with opened(context(home, port), approval, frame=0.5, idle=5.0) as gateway:
        print(json.dumps([*gateway.addresses[0], gateway.fingerprint]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


class Daemon:
    """The process, which can be killed and started again."""

    def __init__(self, home, approval="risky"):
        self.home, self.port, self.approval, self.process = home, 0, approval, None
        self.token = self.add("laptop")
        self.start()

    def add(self, name):
        token = pista.new_token()
        with Store(self.home / "memory.db") as store:
            Devices(store).add(name, hash_token(token))
        return token

    def start(self):
        argv = [sys.executable, __file__, str(self.home), str(self.port), self.approval]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.host, self.port, self.fingerprint = json.loads(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def client(self, **options):
        return QuicClient(self.host, self.port, fingerprint=self.fingerprint, **options)

    def invite(self, token=None):
        return Invite(self.host, self.port, token or self.token, self.fingerprint)

    def rows(self, sql, *values):
        with contextlib.closing(sqlite3.connect(self.home / "memory.db")) as db:
            return db.execute(sql, values).fetchall()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("gateway") / "home")
    yield daemon
    daemon.end()


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """One that asks nobody."""
    daemon = Daemon(tmp_path_factory.mktemp("free") / "home", "never")
    yield daemon
    daemon.end()


@pytest.fixture
def mortal(tmp_path):
    """One that may be killed."""
    daemon = Daemon(tmp_path / "server", "never")
    yield daemon
    daemon.kill()


@pytest.fixture
def run():
    """Runs a test's coroutine, for a limited time."""

    def run(coroutine, seconds=20):
        async def limited():
            async with asyncio.timeout(seconds):
                return await coroutine

        return asyncio.run(limited())

    return run


def new_id():
    return os.urandom(8).hex()


def message(text, **more):
    return {"type": "message", "id": new_id(), "user_message": text, "session_id": f"s-{new_id()}", **more}


async def frames(stream, until=None):
    """What comes until the end, or until a frame of a type."""
    found = []
    while (frame := await stream.receive()) is not None:
        found.append(frame)
        if frame["type"] == until:
            break
    return found


async def ask(daemon, client, frame, last=True, token=None):
    """All frames that answer a request."""
    return await frames(client.open_stream({"token": token or daemon.token, **frame}, last))


def raw(client, data, finish=False):
    stream = client.link.open()
    stream.write(data, finish)
    return stream


async def until(true, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


def desk_of(daemon, folder, **more):
    ctx = context(folder)
    desk = RemoteDesk(ctx, daemon.invite(), KnownGateways(folder))
    desk.PULSE = 0.3
    return desk


# ---- frames ----


def test_each_request_has_a_handler_and_is_documented():
    text = (Path(pista.__file__).parent / "docs" / "gateway-protocol.md").read_text("utf-8")
    assert pista.HANDLERS.keys() == pista.REQUESTS.keys()
    for kind, fields in pista.REQUESTS.items():
        assert f"`{kind}`" in text
        for field in fields:
            assert f"`{field.rstrip('?')}`" in text, (kind, field)
    words = {word for _, word in pista.ERROR_WORDS} | {"unauthorized", "too_large", "too_slow", "busy", "unavailable"}
    for word in words | {str(code.value) for code in Code}:
        assert f"`{word}`" in text, word


def test_a_message_and_its_answer(daemon, run):
    async def main():
        async with daemon.client() as client:
            request = message("$ echo one; echo hidden-secret-1", channel_id="quic:laptop", metadata={"a": [1]})
            accepted, *told, reply = await ask(daemon, client, request)
            assert accepted == {"type": "accepted", "id": request["id"], "duplicate": False, "ahead": 0}
            assert [frame.get("event") for frame in told if frame["type"] == "progress"] == [
                "thinking", "tool_started", "tool_finished", "thinking",
            ]  # fmt: skip
            (finished,) = [frame for frame in told if frame.get("event") == "tool_finished"]
            assert finished["call"]["arguments"] == {"command": "echo one; echo [secret]"}
            assert finished["result"]["output"] == "one\n[secret]" and finished["result"]["is_error"] is False
            assert "".join(frame["text"] for frame in told if frame["type"] == "delta") == reply["content"]
            assert reply["content"] == "one\n[secret]" and reply["is_error"] is False and reply["state"] == "done"
            assert reply["usage"]["input"] == 0 and reply["model"] == "offline/shell"
            assert reply["session_id"] == request["session_id"] and reply["id"] == request["id"]
            await until(lambda: daemon.rows("SELECT state FROM outbox WHERE text = ?", "one\n[secret]") == [("sent",)])
        sql = "SELECT channel, sender, metadata FROM inbox WHERE identity = ?"
        assert daemon.rows(sql, request["id"]) == [("quic:laptop", "laptop", '{"a":[1]}')]
        (seen,) = daemon.rows("SELECT last_seen FROM devices WHERE name = 'laptop'")
        assert seen[0] and daemon.token not in (daemon.home / "memory.db").read_bytes().decode("latin-1")

    run(main())


def test_a_duplicate_finds_the_answer_or_the_turn_and_never_runs_again(free, run):
    mark = free.home / f"mark-{new_id()}"

    async def main():
        request = message(f"$ echo x >> {mark}; sleep 0.5; echo done")
        async with free.client() as one, free.client() as two:
            first = one.open_stream({**request, "token": free.token})
            await frames(first, "progress")
            second = await ask(free, two, request)
            assert second[0]["duplicate"] is True and second[-1]["content"] == "done"
            assert (await frames(first))[-1] == second[-1]
            again = await ask(free, one, request)
            assert [frame["type"] for frame in again] == ["accepted", "reply"] and again[-1] == second[-1]
            (other,) = await ask(free, one, request | {"user_message": "something else"})
            assert other["code"] == "bad_request" and "another message" in other["message"]
        assert mark.read_text() == "x\n"

    run(main())


def test_an_id_of_another_device_is_its_own(daemon, run):
    token = daemon.add(f"phone-{new_id()}")

    async def main():
        async with daemon.client() as client:
            request = message("$ echo mine")
            await ask(daemon, client, request)
            accepted, *_, reply = await ask(daemon, client, request | {"user_message": "$ echo other"}, token=token)
            assert accepted["duplicate"] is False and reply["content"] == "other"

    run(main())


def test_what_else_can_be_asked(daemon, run):
    async def main():
        async with daemon.client() as client:

            async def answer(**frame):
                (reply,) = await ask(daemon, client, frame)
                assert reply.pop("type") == "reply", reply
                return reply

            done = message("$ echo 안녕")
            name = done["session_id"]
            await ask(daemon, client, done)
            assert await answer(type="ping", id="7") == {"id": "7", "content": "pong"}
            assert (await answer(type="status"))["status"]["version"] == pista.__version__
            assert name in [session["name"] for session in (await answer(type="sessions"))["sessions"]]
            history = (await answer(type="history", session_id=name))["messages"]
            assert [entry["role"] for entry in history] == ["user", "assistant", "tool", "assistant"]
            assert history[1]["tool_calls"][0]["arguments"] == {"command": "echo 안녕"} and history[3]["text"] == "안녕"
            assert len((await answer(type="history", session_id=name, limit=1))["messages"]) == 1
            assert (await answer(type="usage", session_id=name))["usage"]["input"] == 0
            assert (await answer(type="model")) == {"model": "offline/shell", "chosen": ""}
            assert (await answer(type="model", session_id=name, model="offline"))["chosen"] == "offline"
            assert (await answer(type="model", session_id=name))["chosen"] == "offline"
            assert (await answer(type="model", session_id=name, model=""))["chosen"] == ""
            agents = {"agents": [{"name": "default", "description": ""}], "model": "offline/shell"}
            who = "default answers this session"
            assert await answer(type="agent", session_id=name) == {
                "content": f"{who}. There are: default",
                "agent": "",
                **agents,
            }
            chosen = await answer(type="agent", session_id=name, agent="default")
            assert chosen == {"content": f"{who}; /agent reset ends that", "agent": "default", **agents}
            assert (await answer(type="agent", session_id=name, agent="reset")) == {
                "content": who,
                "agent": "",
                **agents,
            }
            [spent] = (await answer(type="usage", session_id=name))["agents"]
            assert spent["agent"] == "default" and spent["calls"] >= 2 and spent["daily_tokens"] == 0
            tools = await answer(type="tools")
            assert tools["tools"][0]["name"] == "system.run" and tools["approval"] == "risky"
            assert (await answer(type="skills"))["skills"] == []
            assert (await answer(type="models", provider="offline", refresh=False))["models"][0]["id"] == "shell"
            assert (await answer(type="stop", session_id=name))["content"] == "Nothing is running."
            assert (await answer(type="stop", message_id="never"))["content"] == "Nothing is running."

    run(main())


ERRORS = [
    ({"type": "message", "id": "job:1:x", "user_message": "x"}, "bad_request", "job"),
    ({"type": "message", "id": "1", "user_message": "x", "channel_id": "quic:other"}, "bad_request", "quic:laptop"),
    ({"type": "message", "id": "1", "user_message": "x", "on_disconnect": "burn"}, "bad_request", "on_disconnect"),
    ({"type": "message", "id": "1", "user_message": "x", "session_id": "a\nb"}, "bad_request", "printable"),
    ({"type": "message", "user_message": "x"}, "bad_request", "id is missing"),
    ({"type": "message", "id": "1"}, "bad_request", "user_message is missing"),
    ({"type": "message", "id": "1", "user_message": 5}, "bad_request", "must be a string"),
    ({"type": "models", "refresh": 1}, "bad_request", "true or false"),
    ({"type": "nonsense"}, "bad_request", "unknown type"),
    ({"type": "history", "session_id": "no such one"}, "not_found", "no session"),
    ({"type": "usage", "session_id": "no such one"}, "not_found", "no session"),
    ({"type": "model", "session_id": "no such one"}, "not_found", "no session"),
    ({"type": "model", "model": "anthropic/x"}, "no_key", "key"),
    ({"type": "model", "model": "nobody/x"}, "bad_request", "nobody"),
    ({"type": "models", "provider": "nobody"}, "bad_request", "nobody"),
    ({"type": "agent", "agent": "nobody"}, "bad_request", "there is no agent 'nobody'"),
]


def test_errors(daemon, run):
    async def main():
        async with daemon.client() as client:
            await ask(daemon, client, {"type": "ping"})
            for frame, word, text in ERRORS:
                (error,) = await ask(daemon, client, frame)
                assert (error["type"], error["code"]) == ("error", word), (frame, error)
                assert text in error["message"], error
            assert (await ask(daemon, client, {"type": "ping"}))[-1]["content"] == "pong"

    run(main())


def test_frames_that_are_none(daemon, run):
    """Lengths, JSON, ends and resets in the middle, a first frame that never comes whole, and a huge token."""
    cases = [
        ((2**20 + 1).to_bytes(4, "big"), True, "too_large"),
        (b"\0\0\0\5hello", True, "bad_request"),
        (b"\0\0\0\2[]", True, "bad_request"),
        (b"\0\0\1\0{", True, "bad_request"),
        (b"", True, "bad_request"),
        (b"\0\0", False, "too_slow"),
    ]

    async def main():
        async with daemon.client() as client:
            await ask(daemon, client, {"type": "ping"})
            for data, finish, word in cases:
                assert [frame["code"] for frame in await frames(raw(client, data, finish))] == [word], data
            raw(client, b"\0\0\1\0{").reset()
            (error,) = await ask(daemon, client, {"type": "ping", "token": "x" * 900_000})
            assert error["code"] == "too_large"
            bad = client.open_stream({**message("$ sleep 0.2"), "token": daemon.token})
            await frames(bad, "accepted")
            await bad.send({"type": "approval_answer", "approval_id": "7"})
            assert (await frames(bad))[-1]["code"] == "bad_request"
            assert (await ask(daemon, client, {"type": "ping"}))[-1]["content"] == "pong"
        async with daemon.client() as stranger:
            (error,) = await ask(daemon, stranger, {"type": "ping", "token": "y" * 60_000})
            assert error["code"] == "too_large"
        async with daemon.client() as stranger:
            (error,) = await ask(daemon, stranger, {"type": "ping"}, token="wrong")
            assert error == {"type": "error", "code": "unauthorized", "message": "this token is not known here"}

    run(main())


def test_a_full_queue_is_busy(daemon, run):
    async def main():
        async with daemon.client() as client:
            same = {"session_id": f"s-{new_id()}", "on_disconnect": "cancel"}
            first = client.open_stream({**message("$ sleep 20", **same), "token": daemon.token})
            await frames(first, "progress")
            others = [client.open_stream({**message("x", **same), "token": daemon.token}) for _ in range(3)]
            for ahead, stream in enumerate(others, 1):
                assert (await stream.receive())["ahead"] == ahead
            (error,) = await ask(daemon, client, message("x", **same))
            assert error["code"] == "busy" and "waiting" in error["message"]
            for stream in (*others, first):  # those that wait are taken out, the one that runs is stopped
                stream.reset()
            sql = "SELECT state FROM inbox WHERE session = ?"
            await until(lambda: set(daemon.rows(sql, same["session_id"])) == {("stopped",)})
            assert daemon.rows("SELECT count(*) FROM messages WHERE text = 'x'") == [(0,)]

    run(main())


# ---- stop, questions, ends ----


def test_stop_of_a_session_and_of_one_message(daemon, run):
    async def main():
        async with daemon.client() as client:
            for by in ("session_id", "message_id"):
                request = message("$ sleep 20")
                turn = client.open_stream({**request, "token": daemon.token})
                await frames(turn, "progress")
                queued = message("$ echo next", session_id=request["session_id"])
                behind = client.open_stream({**queued, "token": daemon.token})
                await frames(behind, "accepted")
                await asyncio.sleep(0.3)
                (reply,) = await ask(daemon, client, {"type": "stop", by: request[{"message_id": "id"}.get(by, by)]})
                assert reply["content"].startswith("Stopped (1 command")
                last = (await frames(turn))[-1]
                assert last["is_error"] is True and last["state"] == "stopped"
                assert (await frames(behind))[-1]["content"] == "next"

    run(main())


@pytest.mark.parametrize("decision", ["once", "always", "deny"])
def test_a_question_over_the_wire(daemon, run, decision):
    victim = daemon.home / f"victim-{new_id()}"
    victim.write_text("")

    async def main():
        async with daemon.client() as client:
            request = message(f"$ rm {victim}")
            turn = client.open_stream({**request, "token": daemon.token})
            question = (await frames(turn, "approval"))[-1]
            assert question["tool"] == "system.run" and question["arguments"] == {"command": f"rm {victim}"}
            assert question["reason"]
            async with daemon.client() as other:  # a second look at the same turn is asked the same
                second = other.open_stream({**request, "token": daemon.token})
                assert (await frames(second, "approval"))[-1] == question
            await turn.send({"type": "approval_answer", "approval_id": 999_999, "decision": "once"})  # nobody's
            answer = {"type": "approval_answer", "approval_id": question["approval_id"], "decision": decision}
            await turn.send(answer)
            reply = (await frames(turn))[-1]
            assert victim.exists() == (decision == "deny") and ("denied" in reply["content"]) == (decision == "deny")
            if decision == "always":
                victim.write_text("")
                again = await ask(daemon, client, message(f"$ rm {victim}", session_id=request["session_id"]), False)
                assert not victim.exists() and "approval" not in [frame["type"] for frame in again]

    run(main())


def test_who_has_said_all_cannot_be_asked(daemon, run):
    async def main():
        async with daemon.client() as client:
            *_, reply = await ask(daemon, client, message("$ rm /nonexistent/x"))
            assert "nobody can be asked" in reply["content"]
            turn = client.open_stream({**message("$ rm /nonexistent/y"), "token": daemon.token})
            await frames(turn, "approval")
            turn.finish()
            assert "denied" in (await frames(turn))[-1]["content"]

    run(main())


@pytest.mark.parametrize("way", ["go on", "cancel", "cancel, but another listens"])
def test_a_client_that_goes(free, run, way):
    mark = free.home / f"mark-{new_id()}"

    async def main():
        more = {} if way == "go on" else {"on_disconnect": "cancel"}
        request = message(f"$ sleep 0.8; touch {mark}; echo done", **more)
        async with free.client() as other:
            async with free.client() as client:
                turn = client.open_stream({**request, "token": free.token})
                await frames(turn, "progress")
                if way.endswith("listens"):
                    second = other.open_stream({**request, "token": free.token})
                    await frames(second, "accepted")
                turn.reset()
            await asyncio.sleep(0.2)  # who comes back at once finds the turn still there
            last = (await ask(free, other, request))[-1]
            assert last["state"] == ("stopped" if way == "cancel" else "done")
            assert mark.exists() == (way != "cancel")

    run(main())


def test_the_socket_changes_in_the_middle_of_a_turn(daemon, run):
    async def main():
        async with daemon.client() as client:
            turn = client.open_stream({**message("$ sleep 0.5; echo moved"), "token": daemon.token})
            await frames(turn, "progress")
            before = client.link.port.sock.getsockname()
            await rebind(client)
            assert client.link.port.sock.getsockname() != before
            assert (await frames(turn))[-1]["content"] == "moved" and client.problem is None

    run(main())


def test_a_large_answer_comes(daemon, run):
    async def main():
        async with daemon.client() as client:
            done = message("$ head -c 100000 /dev/zero | tr '\\0' '\\001'")
            *_, reply = await ask(daemon, client, done)
            assert reply["content"].startswith("\x01" * 1_000)
            (history,) = await ask(daemon, client, {"type": "history", "session_id": done["session_id"]})
            assert history["type"] == "reply"

    run(main())


def test_a_slow_reader_misses_progress_and_not_the_answer():
    sent = []

    class Slow:
        ended = False

        async def send(self, frame):
            await asyncio.sleep(0.01)
            sent.append(frame)

    async def main():
        listener = pista.Listener(Slow(), Redactor(["hidden-secret-1"]))
        task = asyncio.create_task(listener.run())
        for _ in range(1_000):
            listener.tell(pista.Progress("delta", "x" * 1_000))
        assert listener._size < pista.UNHEARD + 2_000 and len(listener._queue) < 5
        listener.put({"type": "approval"})
        await until(lambda: sent and sent[-1]["type"] == "approval")
        for part in ("the hidden-", "secret-1 and hid", "e"):
            listener.tell(pista.Progress("delta", part))
        listener.tell(pista.Progress("again", "hidden-secret-1"))
        await until(lambda: sent[-1].get("event") == "again")
        task.cancel()
        said = "".join(frame["text"] for frame in sent if frame["type"] == "delta")
        assert said.lstrip("x") == "the [secret] and hide" and sent[-1]["text"] == "[secret]"

    asyncio.run(main())


# ---- kill -9, restarts, 0-RTT ----


def test_a_killed_server_and_a_desk_that_collects_the_answer(mortal, tmp_path, run):
    mark, told = mortal.home / "mark", []

    async def main():
        async with desk_of(mortal, tmp_path / "client") as desk:
            line = f"$ echo x >> {mark}; sleep 30"
            turn = asyncio.create_task(desk.turn("main", f"{line}\n$ echo after", None, told.append))
            await until(mark.exists)
            mortal.kill()
            await until(lambda: any(step.kind == "again" for step in told))
            mortal.start()
            reply = await turn
            assert "interrupted by a restart" in reply.text and "after" in reply.text
            assert [call.arguments["command"] for call, _ in reply.tool_calls] == ["echo after"]
        assert mark.read_text() == "x\n"

    run(main())


def test_early_data_after_a_restart_and_a_replay_of_it(mortal, tmp_path, run):
    mark, kept = mortal.home / "mark", []

    async def main():
        async with mortal.client(on_ticket=kept.append) as client:
            await ask(mortal, client, {"type": "ping"})
            await until(lambda: kept)
        mortal.kill()
        mortal.start()
        flight = []
        async with mortal.client(ticket=kept[0]) as client:
            send = client.link.port.sock
            client.link.port.send = lambda data, address: (flight.append(data), send.sendto(data, address))
            reply = (await ask(mortal, client, message(f"$ echo x >> {mark}")))[-1]
            assert client.early_accepted and reply["state"] == "done" and mark.read_text() == "x\n"
        mortal.kill()
        with contextlib.closing(sqlite3.connect(mortal.home / "memory.db")) as db, db:
            db.execute("DELETE FROM inbox")  # else it would know the id: here the ticket alone must stop it
        mortal.start()
        before = mortal.rows("SELECT count(*) FROM tickets")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, remote_addr=(mortal.host, mortal.port)
        )
        for data in flight[:3]:
            transport.sendto(data)
        await asyncio.sleep(0.5)
        transport.close()
        assert mark.read_text() == "x\n" and mortal.rows("SELECT count(*) FROM inbox") == [(0,)]
        assert mortal.rows("SELECT count(*) FROM tickets") == before

    run(main())


def test_the_second_request_of_a_desk_goes_out_early(daemon, tmp_path, run):
    async def main():
        early = []
        for _ in range(3):
            async with desk_of(daemon, tmp_path) as desk:
                reply = await desk.turn(f"s-{new_id()}", "$ echo hi", None, lambda progress: None)
                assert reply.text == "hi" and reply.tool_calls[0][1].output == "hi"
                early.append(desk._client.early_accepted)
        assert early == [False, True, True]
        for name in ("known_gateways", "gateway_tickets"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert KnownGateways(tmp_path).find(Invite(daemon.host, daemon.port)) == daemon.invite()

    run(main())


def test_a_ticket_does_not_outlive_its_certificate(mortal, tmp_path, run):
    invite = mortal.invite()

    async def main():
        known = tmp_path / "client"
        async with desk_of(mortal, known) as desk:
            assert (await desk.turn("one", "$ echo hi", None, lambda progress: None)).text == "hi"
        mortal.kill()
        (mortal.home / "gateway.pem").unlink()
        mortal.start()
        assert mortal.fingerprint != invite.fingerprint
        mortal.fingerprint = invite.fingerprint  # what the desk has pinned
        async with desk_of(mortal, known) as desk:
            with pytest.raises(WrongServer):
                await desk.turn("two", "$ echo never", None, lambda progress: None)
        assert mortal.rows("SELECT count(*) FROM sessions WHERE name = 'two'") == [(0,)]

    run(main())


def test_a_large_message_is_the_first(free, tmp_path, run):
    async def main():
        for name in ("first", "second"):  # the second time early data is allowed
            async with desk_of(free, tmp_path) as desk:
                text = f"$ echo {name}\n" + "가" * 60_000
                assert (await desk.turn(f"{name}-{new_id()}", text, None, lambda progress: None)).text == name
        await until(lambda: free.rows("SELECT count(*) FROM outbox WHERE state = 'waiting'") == [(0,)])

    run(main())


def test_a_revoked_device_is_cut_off(daemon, run):
    name = f"lost-{new_id()}"
    token = daemon.add(name)

    async def main():
        async with daemon.client() as client, daemon.client() as other:
            request = message("$ sleep 20")
            turn = client.open_stream({**request, "token": token})
            await frames(turn, "progress")
            with Store(daemon.home / "memory.db") as store:
                assert Devices(store).revoke(name)
            with pytest.raises(GatewayError) as caught:
                await frames(turn)
            assert caught.value.code == Code.REVOKED
            sql = "SELECT state FROM inbox WHERE identity = ?"
            await until(lambda: daemon.rows(sql, request["id"]) == [("stopped",)])
            (error,) = await ask(daemon, other, {"type": "ping"}, token=token)
            assert error["code"] == "unauthorized"

    run(main())


@pytest.mark.parametrize("killed", [False, True])
def test_the_turns_of_a_device_that_was_revoked_while_away_end(mortal, tmp_path, run, killed):
    mark = tmp_path / "mark"
    requests = [message(text, session_id="main") for text in ("$ sleep 3", f"$ echo x >> {mark}")]
    kept = message("$ echo kept", session_id="other")

    async def main():
        async with mortal.client() as client:
            turns = [client.open_stream({**request, "token": mortal.token}) for request in requests]
            await frames(turns[0], "progress")
            await frames(turns[1], "accepted")
        if killed:
            mortal.kill()
        with Store(mortal.home / "memory.db") as store:
            Devices(store).revoke("laptop")
            pista.Inbox(store).add(pista.Event("quic:laptop", "job:1:x", "other", "$ echo job", "cron"))
        if killed:
            mortal.start()
        sql = "SELECT state FROM inbox ORDER BY id"
        await until(lambda: mortal.rows(sql)[:2] == [("stopped",)] * 2, 3.0)
        token = mortal.add("other")
        async with mortal.client() as client:
            assert (await ask(mortal, client, kept, token=token))[-1]["content"] == "kept"
        await asyncio.sleep(3.0)
        assert not mark.exists() and ("stopped",) not in mortal.rows(sql)[2:]

    run(main())


# ---- the gateway itself ----


def test_where_it_listens(tmp_path, run):
    device = pista.Device("laptop", "", None, None)
    local, gone = device._replace(name="local"), device._replace(revoked_at="2030")
    auto, public = GatewayConfig(), GatewayConfig(host="0.0.0.0")
    for devices in ([], [local], [local, gone]):
        assert pista.gateway_hosts(auto, devices) == ["127.0.0.1", "::1"]
        assert pista.gateway_hosts(GatewayConfig(host="::1"), devices) == ["::1"]
        for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
            with pytest.raises(ConfigError, match="devices add"):
                pista.gateway_hosts(GatewayConfig(host=host), devices)
    assert pista.gateway_hosts(auto, [local, device]) == ["0.0.0.0", "::"]
    assert pista.gateway_hosts(public, [local, device]) == ["0.0.0.0"]


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_over_ipv6(tmp_path, run):
    async def main():
        async with opened(context(tmp_path, host="::1")) as gateway:
            host, port = gateway.addresses[0]
            config = GatewayConfig(port=port, host=host)
            assert (await pista.ask_daemon(tmp_path, config, {"type": "ping", "id": "1"}, 5))["content"] == "pong"
            with pytest.raises(StoreError, match="no session"):
                await pista.ask_daemon(tmp_path, config, {"type": "usage"}, 5)

    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    run(main())


def test_a_first_device_opens_the_door_and_connections_go_on(tmp_path, run):
    ctx = context(tmp_path, free_port(), "auto")

    async def main():
        async with opened(ctx, look=0.1) as gateway:
            assert {host for host, _ in gateway.addresses} <= {"127.0.0.1", "::1"}
            pin = {"fingerprint": gateway.fingerprint}
            token = (tmp_path / "local.token").read_text().strip()
            assert (tmp_path / "local.token").stat().st_mode & 0o777 == 0o600
            assert pista.local_device(tmp_path, gateway.devices) == token
            asked = await pista.ask_daemon(tmp_path, ctx.config.gateway, {"type": "status"}, 5)
            assert asked["status"]["pid"] == os.getpid()
            async with QuicClient("127.0.0.1", ctx.config.gateway.port, **pin) as client:
                turn = client.open_stream({**message("$ sleep 0.4; echo hi"), "token": token})
                await frames(turn, "progress")
                with Store(ctx.database) as store:
                    Devices(store).add("laptop", hash_token("x"))
                await until(lambda: "0.0.0.0" in {host for host, _ in gateway.addresses})
                assert (await frames(turn))[-1]["content"] == "hi"
            with Store(ctx.database) as store:
                Devices(store).revoke("laptop")
            await until(lambda: "0.0.0.0" not in {host for host, _ in gateway.addresses})

    run(main())


def test_a_certificate_that_cannot_be_made_anew_is_waited_for(tmp_path, run, monkeypatch, caplog):
    ctx = context(tmp_path)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main():
        async with opened(ctx, look=0.05) as gateway:
            first = gateway.fingerprint
            with monkeypatch.context() as patched:
                patched.setattr(pista, "write_private", full)
                (tmp_path / "gateway.pem").unlink()
                await until(lambda: "cannot write the gateway's certificate" in caplog.text)
                assert gateway.fingerprint == first
            await until(lambda: gateway.fingerprint != first)

    run(main())


def test_a_certificate_of_ones_own_is_reread(tmp_path, run):
    one, two = (pista.make_certificate(tmp_path / name) for name in ("one", "two"))
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(one.read_bytes())
    key.write_bytes(one.read_bytes())
    ctx = context(tmp_path / "home", tls_cert=str(cert), tls_key=str(key))

    async def main():
        async with opened(ctx, look=0.1) as gateway:
            first = gateway.fingerprint
            cert.write_bytes(two.read_bytes())  # does not fit the key: the old one stays
            await asyncio.sleep(0.3)
            assert gateway.fingerprint == first
            key.write_bytes(two.read_bytes())
            await until(lambda: gateway.fingerprint != first)
            assert gateway.fingerprint == pista.load_certificate(two).fingerprint
            await gateway.reload(GatewayConfig(port=0, host="127.0.0.1"))
            assert gateway.fingerprint == pista.load_certificate(ctx.home / "gateway.pem").fingerprint
            with pytest.raises(ConfigError):
                await gateway.reload(GatewayConfig(port=0, host="0.0.0.0"))

    run(main())


def test_a_message_that_the_database_cannot_take_stays_with_its_sender(tmp_path, run):
    ctx = context(tmp_path)

    async def main():
        async with opened(ctx) as gateway:
            gateway.store.db.execute("PRAGMA busy_timeout = 50")
            token = (tmp_path / "local.token").read_text().strip()
            request = message("$ echo hi", token=token)
            async with QuicClient(*gateway.addresses[0], fingerprint=gateway.fingerprint) as client:
                with contextlib.closing(sqlite3.connect(ctx.database, isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    (error,) = await frames(client.open_stream(request, True))
                    assert error["code"] == "unavailable" and "locked" in error["message"]
                    (reply,) = await frames(client.open_stream({"type": "ping", "token": token}, True))
                    assert reply["content"] == "pong"
                accepted, *_, reply = await frames(client.open_stream(request, True))
                assert accepted["duplicate"] is False and reply["content"] == "hi"

    run(main())


def test_a_hub_that_closes_says_so_and_answers_after_the_next_start(tmp_path, run):
    ctx = context(tmp_path)

    async def main():
        request = message("$ sleep 0.4; echo late")
        async with opened(ctx) as gateway:
            request["token"] = (tmp_path / "local.token").read_text().strip()
            async with QuicClient(*gateway.addresses[0], fingerprint=gateway.fingerprint) as client:
                turn = client.open_stream(request, True)
                await frames(turn, "progress")
                await gateway.hub.close()
                assert (await frames(turn))[-1]["code"] == "shutting_down"
                (error,) = await frames(client.open_stream(request | {"id": "other"}, True))
                assert error["code"] == "shutting_down"
        async with opened(ctx) as gateway, QuicClient(*gateway.addresses[0], fingerprint=gateway.fingerprint) as client:
            accepted, *_, reply = await frames(client.open_stream(request, True))
            assert accepted["duplicate"] is True and reply["state"] == "done"

    run(main())


def test_ask_daemon_says_that_nobody_is_there(tmp_path, run):
    with pytest.raises(GatewayError, match="no daemon"):
        run(pista.ask_daemon(tmp_path, GatewayConfig(), {"type": "ping"}, 1))
    (tmp_path / "local.token").write_text("x")
    with pytest.raises(GatewayError, match="nobody listens|did not answer"):
        run(pista.ask_daemon(tmp_path, GatewayConfig(port=free_port()), {"type": "ping"}, 1))


# ---- the client ----


def test_invites():
    pin = "ab" * 32
    invite = Invite("example.org", 4433, "To-ken_1", pin)
    assert parse_invite(str(invite)) == invite == parse_invite(f" {invite}\n")
    assert parse_invite("Example.org") == Invite("example.org", 4433)
    assert parse_invite("example.org:5", 9) == Invite("example.org", 5) and parse_invite("h", 9).port == 9
    for text in ("::1", "[::1]", "[::1]:4433", "openpista://[::1]/"):
        assert parse_invite(text) == Invite("::1", 4433)
    assert str(Invite("::1", 1, "t", pin)) == f"openpista://t@[::1]:1/#sha256={pin}"
    for text in (
        "",
        "http://x",
        "x:y",
        "x:99999",
        f"openpista://t@h/#sha256={pin[:-1]}",
        "openpista://t@h/#x",
        "a/b",
        "[::1",
    ):
        with pytest.raises(UsageError):
            parse_invite(text)


def test_a_desk_has_what_a_chat_asks_for(daemon, tmp_path, run):
    async def main():
        async with desk_of(daemon, tmp_path) as desk:
            await desk.use("")
            assert (desk.model, desk.provider, desk.ready) == ("offline/shell", "offline", True)
            with pytest.raises(StoreError):
                await desk.resume("never heard of")
            with pytest.raises(CredentialError):
                await desk.use("anthropic/x")
            name = f"s-{new_id()}"
            await desk.use("offline")
            told = []
            assert (await desk.turn(name, "$ echo hi", None, told.append)).text == "hi"
            assert [step.kind for step in told] == ["thinking", "tool_started", "tool_finished", "thinking"]
            await desk.use("")
            await desk.resume(name)
            assert desk.chosen == "offline"
            roles = [m.role for m in await desk.recent(name)]
            assert roles == ["user", "assistant", "tool", "assistant"]
            assert name in [session.name for session in await desk.sessions()] and name in desk.known_sessions()
            assert (await desk.usage(name)) == (await desk.usage("new one")) == pista.Usage(cost=None)
            assert (await desk.tools())[0][0] == "system.run" and desk.approval == "risky"
            assert await desk.skills() == []
            assert (await desk.catalogue("openai")).models and desk.known_models()
            assert (await desk.appoint(name, "")).startswith("default answers this session. There are")
            assert await desk.appoint(name, "default") == "default answers this session; /agent reset ends that"
            assert (desk.agent, desk.chosen, desk.model) == ("default", "", "offline/shell")
            assert desk.known_agents() == ["default"]
            with pytest.raises(pista.UsageError, match="no agent 'x'"):
                await desk.appoint(name, "x")
            assert [spent.agent for spent in await desk.spent(name)] == ["default"]
            assert await desk.spent("new one") == []

    run(main())


def test_a_desk_asks_its_person_and_stops_its_turn(daemon, tmp_path, run):
    asked = []

    async def approve(call, danger):
        asked.append((call.arguments["command"], danger))
        return Decision.ONCE

    async def main():
        async with desk_of(daemon, tmp_path) as desk:
            name, victim = f"s-{new_id()}", tmp_path / "victim"
            victim.write_text("")
            await desk.turn(name, f"$ rm {victim}", approve, lambda progress: None)
            assert not victim.exists() and asked[0][0] == f"rm {victim}" and asked[0][1]
            told = []
            turn = asyncio.create_task(desk.turn(name, "$ sleep 20", approve, told.append))
            await until(lambda: any(step.kind == "tool_started" for step in told))
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
            sql = "SELECT state FROM inbox WHERE session = ? ORDER BY id DESC LIMIT 1"
            assert daemon.rows(sql, name) == [("stopped",)]

    run(main())


@pytest.mark.parametrize("found", [{}, {"sessions": 5}, {"sessions": [{}]}, {"sessions": ["x"]}])
def test_an_answer_of_another_version(tmp_path, run, found):
    class Other(RemoteDesk):
        async def ask(self, kind, **fields):
            return found

    async def main():
        await Other(context(tmp_path), Invite("h", 1), KnownGateways(tmp_path)).sessions()

    with pytest.raises(GatewayError, match="h:1 answered sessions in a way .* another version"):
        run(main())


def test_a_usage_that_is_none_counts_as_nothing():
    assert pista.usage_in({"usage": {"input": "5", "cached": None, "output": 2, "cost": []}}) == pista.Usage(output=2)
    assert pista.usage_in({}) == pista.usage_in({"usage": 7}) == pista.Usage()


def test_what_a_frame_cannot_hold_is_left_out():
    secret = Redactor(["hidden-secret-1"])
    odd = {"a": [float("nan"), float("inf"), 1.5, None, True, 10**400], "hidden-secret-1": "hidden-secret-1"}
    assert pista.told(odd, secret) == {"a": ["…", "…", 1.5, None, True, 10**400], "[secret]": "[secret]"}
    deep = []
    for _ in range(100):
        deep = [deep]
    assert pista.told(deep, str) == [[[[[[[["…"]]]]]]]]
    assert len(pista.told("x" * 10**6, str)) < pista.TOLD_TEXT + 100


def test_known_gateways_that_are_damaged(tmp_path):
    known, invite = KnownGateways(tmp_path), Invite("h", 1, "t", "ab" * 32)
    known.keep(invite)
    assert known.find(Invite("h", 1)) == invite and known.find(Invite("h", 2)) == Invite("h", 2)
    assert known.find(Invite("h", 1, "new", "cd" * 32)) == Invite("h", 1, "new", "cd" * 32)
    for text in ("{", "[]", '{"h:1": 5}', "\udcff"):
        known.path.write_text(text, errors="surrogateescape")
        known.tickets.write_text(text, errors="surrogateescape")
        assert known.ticket(invite) is None
        with pytest.raises(ConfigError, match="known_gateways"):
            known.find(invite)


# ---- the commands ----


@pytest.fixture
def connect(daemon, openpista):
    """Runs `connect` as a process: the invite comes on standard input."""

    def connect(*words, invite=None, input="", **more):
        return openpista("connect", "-", *words, input=f"{invite or daemon.invite()}\n{input}", **more)

    return connect


START = f"import sys; sys.path.insert(0, {str(Path(pista.__file__).parent)!r}); import openpista; sys.exit(openpista.main())"


def begun(environ, words, lines):
    """A command as a process, with these lines on its standard input."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", START, *words], env=environ, text=True, **pipes)
    process.stdin.write(lines)
    process.stdin.close()
    return process


@pytest.fixture
def background(environ):
    return lambda *words, lines="": begun(environ, words, lines)


@pytest.fixture(scope="module", autouse=True)
def unheard(tmp_path_factory):
    """What comes of `connect` to a socket that says nothing, and how long it takes: beside the other tests."""
    environ = os.environ | {"OPENPISTA_HOME": str(tmp_path_factory.mktemp("unheard"))}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, ThreadPoolExecutor() as threads:
        silent.bind(("127.0.0.1", 0))
        invite = Invite("127.0.0.1", silent.getsockname()[1], "t", "ab" * 32)

        def wait():
            started = time.monotonic()
            process = begun(environ, ("connect", "-", "-e", "x"), f"{invite}\n")
            return process.wait(20), process.stderr.read(), time.monotonic() - started

        yield threads.submit(wait)


def test_connect_to_silence_says_what_may_be_wrong(unheard):
    code, said, seconds = unheard.result()
    assert code == 1 and "may block UDP" in said and 5 <= seconds < 12


def test_connect_with_one_request(daemon, connect, openpista, home):
    done = connect("-e", "$ cat", input="piped\n$ echo 안녕")
    assert (done.returncode, done.stdout, done.stderr) == (0, "(no output)\n안녕\n", "")
    done = openpista("connect", f"{daemon.host}:{daemon.port}", "-e", "$ echo 1", "--json", "-s", "other")
    found = json.loads(done.stdout)
    assert (found["answer"], found["session"], found["provider"]) == ("1", "other", "offline")
    assert found["tool_calls"][0]["output"] == "1" and found["usage"]["input_tokens"] == 0
    assert daemon.token not in done.stdout + done.stderr
    done = openpista("connect", f"{daemon.host}:{daemon.port}", "-e", "$ sleep 9", "--timeout", "0.5")
    assert done.returncode == 1 and "no answer within 0.5 s" in done.stderr and not done.stdout


def test_connect_that_is_refused(daemon, background, tmp_path):
    place = f"{daemon.host}:{daemon.port}"
    (tmp_path / "token").write_text(daemon.token)
    stale, nobody = daemon.invite()._replace(fingerprint="ab" * 32), Invite("127.0.0.1", free_port(), "t", "ab" * 32)
    cases = [
        ((place,), "", 3, "no token for .*devices add"),
        ((place, "--token", str(tmp_path / "token")), "", 2, "not known here, and nobody can be asked .* fingerprint"),
        ((place, "--token", daemon.token), "", 2, "for all to see"),
        (("-",), daemon.invite("wrong-token-of-nobody"), 3, "this token is not known here"),
        (("-",), stale, 1, "another certificate than the pinned one.* new invite.*known_gateways"),
        (("-",), nobody, 1, "nobody listens there"),
        (("not a place",), "", 2, "no HOST"),
        ((place, "-s", "a\nb"), "", 2, "--session"),
        (("-", "--token", "-"), daemon.invite(), 2, "leave out --token"),
    ]
    running = [background("connect", *words, "-e", "x", lines=f"{lines}\n") for words, lines, _, _ in cases]
    for process, (words, _, code, text) in zip(running, cases, strict=True):
        out, err = process.stdout.read(), process.stderr.read()
        assert (process.wait(20), out) == (code, "") and re.fullmatch(rf"openpista: .*{text}.*\n", err), (words, err)
        assert "wrong-token" not in err


def test_connect_interrupted(free, background, tmp_path):
    mark, deadline = tmp_path / "mark", time.monotonic() + 10
    process = background("connect", "-", "-e", f"$ touch {mark}; sleep 30", lines=f"{free.invite()}\n")
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and "interrupted" in process.stderr.read()
    assert free.rows("SELECT state FROM inbox WHERE text LIKE ?", f"%{mark}%") == [("stopped",)]


def test_connect_as_a_chat_in_lines(daemon, connect):
    name = f"s-{new_id()}"
    lines = "$ echo one\n/usage\n/tools\n/skills\n/sessions\n/login\n/model\n/nonsense\n"
    done = connect("-s", name, input=lines)
    assert "one\n" in done.stdout and "system.run" in done.stdout and name in done.stdout
    assert "this session: 0 tokens in" in done.stdout and f"no skills in {daemon.host}:{daemon.port}" in done.stdout
    assert "keys are kept on 127.0.0.1" in done.stderr and "there is no /nonsense" in done.stderr
    done = connect("-s", name, input="$ echo two\n")
    assert "› $ echo one" in done.stdout and "two\n" in done.stdout and done.returncode == 0


def test_a_fingerprint_is_shown_and_pinned(daemon, terminal, tmp_path):
    (tmp_path / "token").write_text(daemon.token)
    words = ("connect", f"{daemon.host}:{daemon.port}", "--token", str(tmp_path / "token"))
    first = terminal(*words)
    first.wait(re.escape(daemon.fingerprint[:40]))
    first.wait("Is it the same")
    first.send("n\r")
    first.wait("not connected")
    second = terminal(*words)
    second.wait("Is it the same")
    second.send("y\r")
    second.wait("offline/shell")
    second.send("$ echo 6$((6))6\r")
    second.wait("Run it?")
    time.sleep(pista.Question.SETTLE + 0.1)
    second.send("y")
    second.wait("666")
    second.send("\x04")
    third = terminal("connect", f"{daemon.host}:{daemon.port}")
    third.wait("offline/shell")
    third.send("\x04")


def test_devices(openpista, home):
    done = openpista("devices", "list")
    assert (done.returncode, done.stdout) == (0, "no devices yet\n")
    done = openpista("devices", "add", "laptop", "--host", "example.org")
    invite = parse_invite(done.stdout)
    assert (invite.host, invite.port, len(invite.token)) == ("example.org", 4433, 43) and "connect -" in done.stderr
    assert invite.fingerprint == pista.load_certificate(home / "gateway.pem").fingerprint
    with Store(home / "memory.db") as store:
        assert Devices(store).find(hash_token(invite.token)) == "laptop"
        assert invite.token not in str(store.db.execute("SELECT * FROM devices").fetchall())
    assert openpista("devices", "add", "laptop").returncode == 1
    for name in ("local", "a b"):
        assert openpista("devices", "add", name).returncode == 2
    assert re.search(r"laptop +\S+ \S+ +never +active", openpista("devices", "list").stdout)
    assert openpista("devices", "revoke", "laptob").returncode == 2
    assert "is this machine itself" in openpista("devices", "revoke", "local").stderr
    assert openpista("devices", "revoke", "laptop").stdout == "revoked 1 device\n"
    (row,) = json.loads(openpista("devices", "list", "--json").stdout)
    assert row["name"] == "laptop" and row["revoked_at"] and row["last_seen"] is None


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
