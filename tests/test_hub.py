"""The hub: queues, workers, answers and their delivery; and what a kill -9 at any point leaves."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes import FakeClock, ScriptedModels

import openpista
from openpista import (
    Agent,
    AgentConfig,
    Answer,
    Bench,
    ChannelBusy,
    ChannelError,
    Completion,
    Courier,
    Decision,
    Event,
    Hub,
    Message,
    Outlet,
    Patience,
    ProviderError,
    Receipt,
    Redactor,
    Role,
    Store,
    StoreError,
    Toolbox,
    ToolCall,
    ToolsConfig,
    Unavailable,
    Usage,
)

ROOT = Path(openpista.__file__).parent
QUICK = Patience(first=0.01, most=0.05, sending=0.3)


def said(text):
    return Completion(Message(Role.ASSISTANT, text), Usage(1, 0, 1), "fake/model")


def asks(command, name="c"):
    call = ToolCall(f"{name}{time.monotonic_ns()}", "system.run", {"command": command})
    return Completion(Message(Role.ASSISTANT, "", (call,)), Usage(), "fake/model")


def event(text="hi", session="main", channel="fake:1", identity=None, **more):
    return Event(channel, identity or os.urandom(4).hex(), session, text, **more)


def asked(request):
    """The person's words that this request is about, and what tools have said since."""
    start = max(i for i, message in enumerate(request.messages) if message.role is Role.USER)
    return request.messages[start].text, [m.text for m in request.messages[start:] if m.role is Role.TOOL]


def shell(request):
    """A model that runs what it is told, and says what came of it."""
    text, results = asked(request)
    return said(results[-1]) if results else asks(text)


async def until(condition, seconds=5.0):
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def reply_for(hub, channel, identity):
    """What became of an event so far."""
    item = hub.inbox.find(channel, identity)
    return item and hub.outbox.answer(item)


def is_gone(pid):
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Post:
    """A channel: what it was given, and how it fails."""

    def __init__(self, *faults, **more):
        self.faults, self.got = list(faults), []
        self.outlet = Outlet(self.send, **more)

    async def send(self, delivery):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, (int, float)):
            await asyncio.sleep(fault)
        elif fault is not None:
            raise fault
        self.got.append(delivery)

    @property
    def texts(self):
        return [delivery.text for delivery in self.got]


class House:
    """A hub on a database, with a scripted model and one channel; open it as often as you like."""

    def __init__(self, folder):
        self.folder, self.post, self.clock = folder, Post(), None

    def open(self, answers=shell, **settings):
        store = Store(self.folder / "memory.db", *([self.clock.now] if self.clock else []))
        store.db.execute("PRAGMA synchronous = OFF")  # what a power cut leaves is not tested here
        self.models = ScriptedModels(answers)
        bench = Bench(ToolsConfig(workdir=str(self.folder)), {"PATH": "/usr/bin:/bin"}, self.folder, Redactor())
        agent = Agent(lambda *_: self.models, Toolbox(bench), store, settings=AgentConfig(), system="")
        settings = {"approval": "never", "patience": QUICK} | settings
        self.hub = Hub(store, agent, {"fake": self.post.outlet, "fetch": Outlet()}, **settings)
        return self

    async def __aenter__(self):
        await self.hub.__aenter__()
        return self.hub

    async def __aexit__(self, *exc):
        await self.hub.__aexit__(*exc)
        self.hub.store.close()
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    def rows(self, what, *values):
        with Store(self.folder / "memory.db") as store:
            return store.db.execute(f"SELECT {what}", values).fetchall()

    @property
    def states(self):
        return [row[0] for row in self.rows("state FROM inbox ORDER BY id")]


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def nothing(progress):
    pass


# What comes in


def test_a_message_is_answered_once_however_often_it_comes(house):
    async def go():
        async with house.open() as hub:
            first = hub.submit(event("echo one >>effects; echo one", identity="7"))
            assert first == Receipt("accepted", 1, 0)
            assert hub.submit(event("echo other", identity="7")) == Receipt("duplicate", 1)
            assert hub.submit(event("echo two", channel="fake:2", identity="7")).answer == "accepted", "another's 7"
            assert (await hub.watch(first.id, nothing)).text == "one"
            assert hub.submit(event("echo again", identity="7")) == Receipt("duplicate", 1)
            await until(lambda: len(house.post.got) == 2)
        assert (house.folder / "effects").read_text() == "one\n"
        assert sorted(house.post.texts) == ["one", "two"]

    asyncio.run(go())


def test_a_session_answers_in_order_and_a_full_one_says_so(house):
    async def go():
        async with house.open(queue=3) as hub:
            got = [hub.submit(event("sleep 0.2; echo 0"))]
            await until(lambda: hub.inbox.get(1).state == "running")
            assert hub.running == {"main": 1}
            got += [hub.submit(event(f"echo {i}")) for i in range(1, 5)]
            assert [receipt.answer for receipt in got] == ["accepted"] * 4 + ["full"]
            assert [receipt.ahead for receipt in got[:4]] == [0, 1, 2, 3]
            assert got[4].id == 0
            assert hub.submit(event("echo elsewhere", session="other")).answer == "accepted", "another queue"
            assert hub.inbox.waiting() == {"main": 4, "other": 1}
            await until(lambda: len(house.post.got) == 5)
            assert [text for text in house.post.texts if text.isdigit()] == ["0", "1", "2", "3"]
            assert house.post.texts[0] == "elsewhere", "sessions run side by side"

    asyncio.run(go())


def test_turns_side_by_side_are_bounded(house):
    now, most = [], []

    async def think(request):
        now.append(1)
        most.append(len(now))
        await asyncio.sleep(0.02)
        now.pop()
        return said("ok")

    async def go():
        async with house.open(think, side_by_side=3) as hub:
            for i in range(12):
                hub.submit(event(session=f"s{i}"))
            await until(lambda: len(house.post.got) == 12)

    asyncio.run(go())
    assert max(most) == 3


def test_a_watcher_sees_how_it_goes_and_the_answer(house):
    async def go():
        async with house.open() as hub:
            seen = []
            receipt = hub.submit(event("echo one"))
            answer = await hub.watch(receipt.id, seen.append)
            assert [progress.kind for progress in seen] == ["thinking", "tool_started", "tool_finished", "thinking"]
            assert answer[:3] == ("done", "one", False)
            assert answer.metadata["model"] == "fake/model"
            assert answer.metadata["usage"]["input"] == 1
            assert await hub.watch(receipt.id, nothing) == answer, "it can be had again"
            with pytest.raises(StoreError, match="no message 99"):
                await hub.watch(99, nothing)
            receipt = hub.submit(event("sleep 0.1; echo two"))
            watching = asyncio.create_task(hub.watch(receipt.id, nothing))
            await asyncio.sleep(0.05)
            watching.cancel()
            await until(lambda: "two" in house.post.texts)
            assert hub._watchers == hub._running == hub._workers == {}

    asyncio.run(go())


def test_a_channel_that_fetches_its_answers(house):
    async def go():
        async with house.open() as hub:
            assert reply_for(hub, "fetch:me", "1") is None
            receipt = hub.submit(event("sleep 0.1; echo one", channel="fetch:me", identity="1"))
            assert reply_for(hub, "fetch:me", "1") == Answer("waiting")
            await until(lambda: reply_for(hub, "fetch:me", "1").state == "running")
            await hub.watch(receipt.id, nothing)
        async with house.open() as hub:
            assert reply_for(hub, "fetch:me", "1")[:3] == ("done", "one", False)
            assert hub.outbox.channels() == ["fetch:me"]
            hub.collected("fetch:me", "1")
            assert hub.outbox.channels() == []
            assert reply_for(hub, "fetch:me", "1").text == "one", "a request that is replayed finds its reply"
            assert reply_for(hub, "fetch:other", "1") is None

    asyncio.run(go())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Unavailable("overloaded by sk-secret-123"), "overloaded by [secret]"),
        (ProviderError("nonsense"), "nonsense"),
        (ZeroDivisionError("a bug"), "openpista failed: ZeroDivisionError('a bug'); this is a bug"),
    ],
)
def test_a_turn_that_fails_is_answered_too_and_hurts_nobody(house, fault, words):
    async def go():
        def answer(request):
            return fault if "fail" in asked(request)[0] else shell(request)

        async with house.open(answer, redact=Redactor(["sk-secret-123"])) as hub:
            receipt = hub.submit(event("fail"))
            for session in ("main", "other"):
                hub.submit(event("echo fine", session=session))
            answer = await hub.watch(receipt.id, nothing)
            assert (answer.state, answer.is_error) == ("failed", True)
            assert words in answer.text
            await until(lambda: len(house.post.got) == 3)
            told = {(delivery.text, delivery.metadata.get("is_error", False)) for delivery in house.post.got}
            assert told == {("fine", False), (answer.text, True)}
        assert sorted(house.states) == ["done", "done", "failed"]

    asyncio.run(go())


def test_what_another_process_puts_there_is_taken_up(house):
    async def go():
        async with house.open() as hub:
            with Store(house.folder / "memory.db") as other:
                openpista.Inbox(other).add(event("echo from elsewhere"))
                openpista.Outbox(other).add("fake:3", {}, ["a note"])
                job = openpista.Job(0, "j", "", "", "echo a job", "main", "", {}, "once", "command", "active", None)
                openpista.Jobs(other).run(openpista.Jobs(other).add(job), "2026-03-01T09:00:00.000Z")
            hub.look()
            await until(lambda: sorted(house.post.texts) == ["a note", "from elsewhere"])
            done = ("done", "a job")  # kept, though it has no channel
            await until(lambda: [(run.state, run.answer) for run in openpista.Jobs(hub.store).history("j")] == [done])
            await until(lambda: not hub.outbox.channels())

    asyncio.run(go())


def test_a_session_that_another_process_works_on_is_waited_for(house):
    async def go():
        async with house.open() as hub:
            with Store(house.folder / "memory.db") as other:
                other.owner = "elsewhere:1"
                session = other.session("main")
                assert other.take_lease(session)
                seen = []
                receipt = hub.submit(event("echo one"))
                watching = asyncio.create_task(hub.watch(receipt.id, seen.append))
                await until(lambda: seen)
                assert "in use by elsewhere:1" in seen[0].text
                assert hub.inbox.get(receipt.id).state == "waiting"
                other.drop_lease(session)
                assert (await watching).text == "one"

    asyncio.run(go())


# Asking a person


@pytest.mark.parametrize(("decision", "ran"), [(Decision.ONCE, True), (Decision.DENY, False), (None, False)])
def test_the_channel_is_asked_about_risky_calls(house, decision, ran):
    asked_about = []

    def approver(item):
        async def approve(call, danger):
            asked_about.append((item.event.text, call.arguments["command"]))
            return decision

        return approve if decision else None

    async def go():
        house.post.outlet = house.post.outlet._replace(approver=approver)
        async with house.open(approval="risky") as hub:
            await hub.watch(hub.submit(event("rm -f nothing; touch ran")).id, nothing)

    asyncio.run(go())
    assert (house.folder / "ran").exists() == ran
    assert asked_about == ([("rm -f nothing; touch ran",) * 2] if decision else [])


def test_a_question_keeps_no_other_session_waiting(house):
    async def go():
        asking, answers = asyncio.Event(), asyncio.Event()

        async def approve(call, danger):
            asking.set()
            await answers.wait()
            return Decision.ONCE

        house.post.outlet = house.post.outlet._replace(approver=lambda item: approve)
        async with house.open(approval="risky", side_by_side=1) as hub:
            slow = hub.submit(event("rm -f nothing; echo slow"))
            await asking.wait()
            quick = hub.submit(event("echo quick", session="other"))
            assert (await hub.watch(quick.id, nothing)).text == "quick"
            answers.set()
            assert (await hub.watch(slow.id, nothing)).text == "slow"
            asking.clear(), answers.clear()
            hub.submit(event("rm -f nothing; echo never"))
            await asking.wait()
            assert (await hub.stop("main")).startswith("Stopped (0 commands")
            assert hub._places._value == 1, "each place was given back once"

    asyncio.run(go())


def test_a_question_that_nobody_answers_counts_as_a_no(house):
    async def go():
        house.post.outlet = house.post.outlet._replace(approver=lambda item: lambda call, danger: asyncio.sleep(100))
        async with house.open(approval="risky") as hub:
            hub.ASKING = 0.05
            answer = await hub.watch(hub.submit(event("rm -f nothing; touch ran")).id, nothing)
            assert answer.text.startswith("denied by the person")

    asyncio.run(go())


# Stopping


def test_stop_ends_the_turn_and_its_processes_within_a_second(house):
    async def go():
        async with house.open() as hub:
            assert await hub.stop("main") == "Nothing is running."
            command = "trap '' TERM; echo $$ >pid; (sleep 999 & echo $! >child; wait) & sleep 999"
            receipt = hub.submit(event(command))
            behind = hub.submit(event("echo next"))
            watching = asyncio.create_task(hub.watch(receipt.id, nothing))
            await until(lambda: (house.folder / "child").exists() and (house.folder / "child").read_text())
            started = time.monotonic()
            assert await hub.stop("main") == "Stopped (1 command had been started)."
            assert time.monotonic() - started < 1.5, "a second, and what a busy machine adds"
            answer = await watching
            assert answer == Answer("stopped", "Stopped (1 command had been started).", True)
            assert (await hub.watch(behind.id, nothing)).text == "next", "what waits goes on"
            for name in ("pid", "child"):
                await until(lambda path=house.folder / name: is_gone(int(path.read_text())))
            assert [e.message.text for e in hub.store.transcript(hub.store.session("main"))][2] == openpista.STOPPED
        assert house.states == ["stopped", "done"]
        assert house.post.texts == [answer.text, "next"]

    asyncio.run(go())


def test_stop_while_the_turn_waits_for_a_place(house):
    async def go():
        async with house.open(side_by_side=1) as hub:
            hub.submit(event("sleep 0.3; echo one", session="other"))
            await until(lambda: hub.inbox.get(1).state == "running")
            hub.submit(event("touch ran"))
            await asyncio.sleep(0.02)
            assert await hub.stop("main") == "Stopped (0 commands had been started)."
            await until(lambda: len(house.post.got) == 2)
        assert not (house.folder / "ran").exists()
        assert house.states == ["done", "stopped"]

    asyncio.run(go())


# Shutting down


def test_a_turn_may_end_within_the_grace(house):
    async def go():
        async with house.open() as hub:
            receipt = hub.submit(event("sleep 0.3; echo done", identity="1"))
            hub.submit(event("echo queued"))
            watching = asyncio.create_task(hub.watch(receipt.id, nothing))
            await until(lambda: hub.inbox.get(receipt.id).state == "running")
            closing = asyncio.create_task(hub.close(5))
            await asyncio.sleep(0.05)
            assert hub.submit(event("echo late")) == Receipt("closing")
            assert hub.submit(event("echo late", identity="1")) == Receipt("duplicate", receipt.id)
            await closing
            assert (await watching).text == "done"
            with pytest.raises(ChannelBusy, match="shutting down"):
                await hub.watch(2, nothing)
        assert house.post.texts == ["done"], "sent before the end"
        assert house.states == ["done", "waiting"]
        async with house.open():
            await until(lambda: house.post.texts == ["done", "queued"])

    asyncio.run(go())


@pytest.mark.parametrize("grace", [0.1, 60])
def test_a_turn_that_is_cut_off_goes_on_at_the_next_start(house, grace):
    async def go():
        async with house.open() as hub:
            receipt = hub.submit(event("echo x >>effects; sleep 60"))
            watching = asyncio.create_task(hub.watch(receipt.id, nothing))
            await until((house.folder / "effects").exists)
            started = time.monotonic()
            closing = asyncio.create_task(hub.close(grace))
            await asyncio.sleep(0.05)
            if grace > 1:
                await hub.close()  # a second signal
            await closing
            assert time.monotonic() - started < 2.0
            with pytest.raises(ChannelBusy, match="after the next start"):
                await watching
        assert house.states == ["running"]
        async with house.open() as hub:
            answer = await hub.watch(receipt.id, nothing)
            assert answer.text == openpista.STOPPED
        assert (house.folder / "effects").read_text() == "x\n"
        assert house.post.texts == [openpista.STOPPED]

    asyncio.run(go())


def test_a_turn_that_ends_openpista_again_and_again_is_given_up(house):
    async def go():
        async with house.open() as hub:
            receipt = hub.submit(event("echo one"))
            hub.store.db.execute("UPDATE inbox SET attempts = 20")
            answer = await hub.watch(receipt.id, nothing)
            assert (answer.state, answer.is_error) == ("failed", True)
            assert "ended 20 times" in answer.text

    asyncio.run(go())


def test_a_session_that_was_deleted_before_its_turn_could_go_on(house):
    async def go():
        async with house.open([asks("echo x >>effects; sleep 60")]) as hub:
            receipt = hub.submit(event("secret words"))
            await until((house.folder / "effects").exists)
        with Store(house.folder / "memory.db") as store:
            store.delete_session("main")
        async with house.open([]) as hub:
            answer = await hub.watch(receipt.id, nothing)
            assert answer.state == "failed"
            assert "deleted" in answer.text
            await until(lambda: house.post.got and not hub.outbox.channels())
            hub.store.session("main")
            hub.store.delete_session("main")
        assert house.rows("text FROM inbox UNION SELECT text FROM outbox") == [("",)], "what was said goes with it"

    asyncio.run(go())


# What goes out


@contextlib.asynccontextmanager
async def courier(store, post, patience=QUICK):
    """A courier for what lies in the outbox, closed in the end."""
    closing = asyncio.Event()
    courier = Courier(openpista.Outbox(store), {"fake": post.outlet}, closing, patience)
    courier.open()
    yield courier
    closing.set()
    await courier.close(1.0)


def outbox_states(store):
    return store.db.execute("SELECT state, attempts, error FROM outbox ORDER BY id").fetchall()


SENDING = [  # how the channel fails, may it come twice -> what is sent in the end, and the first row's end
    ([ChannelBusy("later")] * 4, True, ["a", "b"], ("sent", 5, "")),
    ([ChannelBusy("later", retry_after=0.05)], False, ["a", "b"], ("sent", 2, "")),
    ([Unavailable("no network")], False, ["a", "b"], ("sent", 2, "")),
    ([ConnectionResetError("reset")], True, ["a", "b"], ("sent", 2, "")),
    ([ConnectionResetError("reset")], False, ["b"], ("unknown", 1, "ConnectionResetError('reset')")),
    ([2.0], True, ["a", "b"], ("sent", 2, "")),
    ([2.0], False, ["b"], ("unknown", 1, "TimeoutError()")),
    ([ChannelError("the chat is gone")], True, ["b"], ("dead", 1, "the chat is gone")),
    ([KeyError("a bug")], True, ["b"], ("dead", 1, "'a bug'")),
    ([StoreError("the disk is full")], True, ["a", "b"], ("sent", 2, "")),
]


@pytest.mark.parametrize(("faults", "repeats", "texts", "end"), SENDING)
def test_delivery(house, faults, repeats, texts, end):
    async def go():
        post = Post(*faults, repeats=repeats)
        with Store(house.folder / "memory.db") as store:
            openpista.Outbox(store).add("fake:1", {"thread": 5}, ["a", "b"], {"is_error": False})
            async with courier(store, post):
                await until(lambda: [row[0] for row in outbox_states(store)][1] == "sent")
            assert post.texts == texts
            assert {d.channel for d in post.got} == {"fake:1"}
            assert post.got[-1].reply_to == {"thread": 5}
            assert outbox_states(store)[0] == end

    asyncio.run(go())


def test_what_only_waits_for_its_channel_is_not_in_doubt(house):
    async def go():
        post, waits = Post(repeats=False), [2.0, ChannelBusy("later"), 3_600.0]

        async def ready(delivery):
            fault = waits.pop(0) if waits else 0.0
            if isinstance(fault, Exception):
                raise fault
            await asyncio.sleep(fault)

        post.outlet = post.outlet._replace(ready=ready)
        with Store(house.folder / "memory.db") as store:
            openpista.Outbox(store).add("fake:1", {}, ["a"])
            async with courier(store, post) as first:
                await until(lambda: not waits)
                await first.close(0.0)
            assert outbox_states(store) == [("waiting", 0, "later")], "a restart while it waited"
            async with courier(store, post):
                await until(lambda: post.texts == ["a"])
            assert outbox_states(store) == [("sent", 1, "")]
            assert not post.got[0].in_doubt

    asyncio.run(go())


def test_one_recipient_that_fails_holds_up_no_other_and_its_order_is_kept(house):
    async def go():
        got = []

        async def send(delivery):
            if delivery.channel == "fake:1" and len(got) < 3:
                raise ChannelBusy("later")
            got.append((delivery.channel, delivery.text))

        with Store(house.folder / "memory.db") as store:
            outbox, post = openpista.Outbox(store), Post()
            post.outlet = Outlet(send)
            for text in "abc":
                for channel in ("fake:1", "fake:2", "absent:1"):
                    outbox.add(channel, {}, [text])
            async with courier(store, post):
                await until(lambda: len(got) == 6)
            assert got == [("fake:2", text) for text in "abc"] + [("fake:1", text) for text in "abc"]
            assert outbox.channels() == ["absent:1"], "kept for when the channel is there again"

    asyncio.run(go())


def test_what_is_deleted_while_it_waits_holds_nothing_up(house):
    async def go():
        waiting, ready = asyncio.Event(), asyncio.Event()

        async def until_ready(delivery):
            waiting.set()
            await ready.wait()

        with Store(house.folder / "memory.db") as store:
            outbox, post = openpista.Outbox(store), Post()
            post.outlet = post.outlet._replace(ready=until_ready)
            for text in "ab":
                outbox.add("fake:1", {}, [text])
            async with courier(store, post):
                await waiting.wait()
                store.db.execute("DELETE FROM outbox WHERE text = 'a'")
                ready.set()
                await until(lambda: post.texts == ["b"])

    asyncio.run(go())


def test_when_to_try_again_and_when_to_give_up(house):
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))

    async def go():
        with Store(house.folder / "memory.db", now=clock.now) as store:
            courier = Courier(openpista.Outbox(store), {}, asyncio.Event(), Patience())
            pauses = [courier._pause(attempt, None) for attempt in range(1, 40)]
            assert 0.5 <= pauses[0] <= 1.0
            assert all(150 <= pause <= 300 for pause in pauses[12:])
            assert courier._pause(1, 42.0) == 42.0
            assert courier._pause(1, 999_999.0) == 3_600.0, "no server may silence us for days"
            assert courier._pause(1, -5.0) == 0.0
            courier.outbox.add("fake:1", {}, ["a"])
            delivery = courier.outbox.next("fake:1")
            assert not courier._is_hopeless(delivery._replace(attempts=500))
            clock.advance(timedelta(days=1, seconds=1))
            assert not courier._is_hopeless(delivery), "the clock may have jumped"
            assert courier._is_hopeless(delivery._replace(attempts=11))

    asyncio.run(go())


def test_a_clock_that_is_set_back_delays_no_answer_for_a_day(house):
    clock = FakeClock(datetime(2026, 3, 2, tzinfo=UTC))

    async def go():
        post = Post(ChannelBusy("later"))
        with Store(house.folder / "memory.db", now=clock.now) as store:
            openpista.Outbox(store).add("fake:1", {}, ["a"])
            async with courier(store, post, QUICK._replace(longest=0.1)):
                await until(lambda: not post.faults)
                clock.advance(timedelta(days=-1))
                await until(lambda: post.texts == ["a"])

    asyncio.run(go())


def test_a_long_answer_goes_out_in_pieces_and_is_one_again(house):
    async def go():
        house.post.outlet = house.post.outlet._replace(split=lambda text: text.split())
        async with house.open([said("one two three")]) as hub:
            receipt = hub.submit(event(identity="1", reply_to={"thread": 4}))
            await hub.watch(receipt.id, nothing)
            await until(lambda: house.post.texts == ["one", "two", "three"])
            assert [(d.piece, d.reply_to) for d in house.post.got] == [(i, {"thread": 4}) for i in range(3)]
            assert reply_for(hub, "fake:1", "1").text == "one\n\ntwo\n\nthree"

    asyncio.run(go())


# The database cannot be written


def fill(store):
    """No page more goes into this database."""
    store.db.execute(f"PRAGMA max_page_count = {store.db.execute('PRAGMA page_count').fetchone()[0]}")


def make_room(store):
    store.db.execute("PRAGMA max_page_count = 1000000")


def test_a_full_disk_while_a_message_arrives(house):
    async def go():
        async with house.open() as hub:
            fill(hub.store)
            with pytest.raises(StoreError, match="full"):
                hub.submit(event("x" * 100_000, identity="1"))
            make_room(hub.store)
            assert hub.submit(event("echo one", identity="1")).answer == "accepted", "the sender had kept it"
            await until(lambda: house.post.texts == ["one"])

    asyncio.run(go())


def test_a_full_disk_at_the_end_of_a_turn(house):
    async def go():
        async def full(request):
            if not asked(request)[1]:
                return asks("echo x >>effects")
            fill(house.hub.store)
            return said("precious " * 10_000)

        async with house.open(full) as hub:
            receipt = hub.submit(event())
            answer = await hub.watch(receipt.id, nothing)
            assert answer.text == "precious " * 10_000, "whoever waits has it at once"
            assert "could not be stored" in answer.metadata["problem"]
            await asyncio.sleep(0.2)
            assert hub.inbox.get(receipt.id).state == "running"
            make_room(hub.store)
            await until(lambda: house.post.texts == ["precious " * 10_000])
        assert house.states == ["done"]
        assert len(house.models.requests) == 2

    asyncio.run(go())


def test_a_full_disk_in_the_middle_of_a_turn(house):
    async def go():
        def full(request):
            if not asked(request)[1]:
                fill(house.hub.store)
                return asks(f"echo x >>effects; : {'x' * 50_000}")
            return said("fine")

        async with house.open(full) as hub:
            receipt = hub.submit(event())
            answer = await hub.watch(receipt.id, nothing)
            assert "make room on the disk" in answer.text
            make_room(hub.store)
            await until(lambda: len(house.post.got) == 1)
        assert house.states == ["failed"]
        assert not (house.folder / "effects").exists()

    asyncio.run(go())


def test_a_locked_database_while_the_hub_works(house):
    async def go():
        async with house.open() as hub:
            hub.store.db.execute("PRAGMA busy_timeout = 50")
            receipt = hub.submit(event("sleep 0.2; echo one"))
            await until(lambda: hub.inbox.get(receipt.id).state == "running")
            with Store(house.folder / "memory.db") as other, other.atomic():
                with pytest.raises(StoreError, match="locked"):
                    hub.submit(event("echo two"))
                await asyncio.sleep(0.4)
            answer = await hub.watch(receipt.id, nothing)
            assert (answer.state, "locked" in answer.text) == ("failed", True)
            await until(lambda: len(house.post.got) == 1)

    asyncio.run(go())


# kill -9

NURSERY = '''
"""Lives of a hub, each a process of its own that may be killed; one line of JSON on stdin starts one."""
import asyncio, json, os, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from fakes import ScriptedModels
from openpista import *


def note(path, line):
    with open(path, "a") as file:
        file.write(line + "\\n")


class Life:
    def __init__(self, folder, point, events, repeats):
        self.folder, self.point, self.events, self.repeats = Path(folder), point, events, repeats

    def reach(self, point):
        if point == self.point:
            os.kill(os.getpid(), signal.SIGKILL)

    async def model(self, request):
        start = max(i for i, message in enumerate(request.messages) if message.role is Role.USER)
        text, results = request.messages[start].text.split()[-1], []
        for message in request.messages[start:]:
            if message.role is Role.TOOL and message.text != NOT_BEGUN:
                results.append(message.text)
        self.reach("second" if results else "begun")
        await asyncio.sleep(0.002)
        if results:
            return said(("unknown " if "outcome is unknown" in results[0] else "done ") + text)
        kill = "kill -9 $PPID; sleep 0.2" if self.point == "running" else "true"
        call = ToolCall(f"c{time.monotonic_ns()}", "system.run", {"command": f"echo {text} >>effects; {kill}"})
        return Completion(Message(Role.ASSISTANT, "", (call,)), Usage(), "fake/model")

    async def send(self, delivery):
        self.reach("sending")
        note(self.folder / "sent", f"{delivery.inbox_id} {delivery.text}")
        self.reach("sent")

    async def run(self):
        life = self

        class MortalStore(Store):
            def append(self, session, message):
                number = super().append(session, message)
                if message.role is Role.USER:
                    life.reach("words")
                if message.role is Role.ASSISTANT:
                    life.reach("asked" if message.tool_calls else "answering")
                return number

            def start_call(self, message_id, call):
                life.reach("starting")
                super().start_call(message_id, call)
                life.reach("started")

            def finish_call(self, session, message_id, result, state="finished"):
                life.reach("finishing")
                super().finish_call(session, message_id, result, state)
                life.reach("finished")

        class MortalHub(Hub):
            def _announce(self, item, answer):
                life.reach("answered")

        with MortalStore(self.folder / "memory.db") as store:
            store.db.execute("PRAGMA synchronous = OFF")  # the system lives on, only the process does not
            bench = Bench(ToolsConfig(workdir=str(self.folder)), os.environ, self.folder, Redactor())
            models = ScriptedModels(self.model)
            agent = Agent(lambda *_: models, Toolbox(bench), store, settings=AgentConfig(), system="")
            outlets = {"fake": Outlet(self.send, repeats=self.repeats)}
            async with MortalHub(store, agent, outlets, approval="never") as hub:
                for identity, session in self.events:
                    receipt = hub.submit(Event("fake:1", identity, session, f"do {identity}"))
                    if receipt.id:  # else the queue was full, and it was not taken
                        note(self.folder / "taken", f"{receipt.id} {identity}")
                self.reach("submitted")
                while hub.inbox.waiting() or hub.outbox.channels():
                    await asyncio.sleep(0.005)


def said(text):
    return Completion(Message(Role.ASSISTANT, text), Usage(), "fake/model")


for line in sys.stdin:
    order = json.loads(line)
    seconds = order.pop("seconds", None)
    pid = os.fork()
    if not pid:
        try:
            asyncio.run(asyncio.wait_for(Life(**order).run(), 20))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


class Nursery:
    """Starts lives of a hub."""

    def __init__(self):
        argv = [sys.executable, "-c", NURSERY, str(ROOT)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def live(self, folder, point="", events=(), repeats=True, seconds=None):
        """One life, killed at a point or after some seconds; its exit code."""
        order = {"folder": str(folder), "point": point, "events": events, "repeats": repeats, "seconds": seconds}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def check(folder, extra=0):
    """Nothing that was taken is lost, no command ran twice, each has one answer; (answers by identity, in doubt)."""
    taken = {line.split()[1] for line in lines(folder / "taken")}
    effects, sent, answers = Counter(lines(folder / "effects")), Counter(), {}
    for line in lines(folder / "sent"):
        _, answers_state, identity = line.split()
        sent[identity] += 1
        answers[identity] = answers_state
    with Store(folder / "memory.db") as store:
        rows = store.db.execute("SELECT i.identity, i.state, o.state FROM inbox i JOIN outbox o ON o.inbox_id = i.id")
        ends = {identity: (state, out) for identity, state, out in rows}
        count = store.db.execute("SELECT (SELECT count(*) FROM inbox), (SELECT count(*) FROM outbox)").fetchone()
        words = store.db.execute("SELECT text, count(*) FROM messages WHERE role = 'user' GROUP BY 1").fetchall()
    unknown = {identity for identity, end in ends.items() if end == ("done", "unknown")}
    assert set(ends.values()) <= {("done", "sent"), ("done", "unknown")}
    assert count == (len(ends), len(ends)), "one answer for each"
    assert taken <= set(ends), "lost"
    assert set(ends) == set(sent) | unknown, "an answer is missing"
    assert sum(sent.values()) - len(sent) <= extra, "sent twice"
    assert sorted(words) == sorted((f"do {identity}", 1) for identity in ends), "each was said once"
    assert set(effects.values()) <= {1}, "run twice"
    assert all(effects[identity] == 1 for identity, state in answers.items() if state == "done")
    return answers, unknown


EVENTS = [("e1", "main"), ("e2", "main"), ("e3", "main")]
POINTS = {  # where it is killed -> what the first answer says of the command, which is true
    "submitted": "done",
    "words": "done",
    "begun": "done",
    "asked": "done",
    "starting": "done",
    "started": "unknown",
    "running": "unknown",
    "finishing": "unknown",
    "finished": "done",
    "second": "done",
    "answering": "done",
    "answered": "done",
    "sending": "done",
    "sent": "done",
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_this_point_loses_nothing_and_repeats_nothing(nursery, tmp_path, point):
    assert nursery.live(tmp_path, point, EVENTS) == -signal.SIGKILL
    assert nursery.live(tmp_path) == 0
    assert check(tmp_path, extra=point == "sent") == ({"e1": POINTS[point], "e2": "done", "e3": "done"}, set())
    effects = lines(tmp_path / "effects")
    assert effects == ["e2", "e3"] if point == "started" else ["e1", "e2", "e3"]


@pytest.mark.parametrize("point", ["sending", "sent"])
def test_an_answer_in_doubt_is_marked_where_it_must_not_come_twice(nursery, tmp_path, point):
    assert nursery.live(tmp_path, point, EVENTS[:1], repeats=False) == -signal.SIGKILL
    assert nursery.live(tmp_path, repeats=False) == 0
    assert check(tmp_path)[1] == {"e1"}
    assert len(lines(tmp_path / "sent")) == (point == "sent")


@pytest.mark.parametrize("repeats", [True, False])
def test_kills_at_random_moments(nursery, tmp_path, repeats):
    dice, kills = random.Random(), 15
    for life in range(kills):
        events = [(f"r{life}-{i}", dice.choice(["main", "other", "third"])) for i in range(3)]
        seconds = dice.uniform(0.02, 0.15)
        assert nursery.live(tmp_path, events=events, repeats=repeats, seconds=seconds) in (0, -signal.SIGKILL)
    assert nursery.live(tmp_path, repeats=repeats) == 0
    # There is one recipient, and so one send that each kill can cut off.
    unknown = check(tmp_path, extra=kills if repeats else 0)[1]
    assert len(unknown) <= (0 if repeats else kills)


# What grows


def test_no_statement_reads_a_whole_table(house):
    """Each search goes through an index, so that a million rows cost as much as a hundred."""
    seen = set()

    async def go():
        async with house.open() as hub:
            hub.store.db.set_trace_callback(seen.add)
            await hub.watch(hub.submit(event("echo 1", identity="1")).id, nothing)
            hub.submit(event("echo 2", channel="fetch:1", identity="2"))
            reply_for(hub, "fetch:1", "2")
            await until(lambda: not hub.inbox.waiting())
            hub.collected("fetch:1", "2")
            hub.courier.open()
            hub.look()
            await until(lambda: len(house.post.got) == 1)
            hub.store.delete_session("main")
            hub.store.db.set_trace_callback(None)
            words = ("SELECT", "UPDATE", "DELETE", "INSERT")
            plans = {}
            for statement in filter(lambda text: text.lstrip().startswith(words), seen):
                for row in hub.store.db.execute(f"EXPLAIN QUERY PLAN {statement}"):
                    plans.setdefault(row[3], statement)
            scans = {plan: sql for plan, sql in plans.items() if plan.startswith("SCAN") and "inbox_open" not in plan}
            assert {plan for plan in scans if "outbox_open" not in plan and plan != "SCAN CONSTANT ROW"} == set(), scans

    asyncio.run(go())


def test_what_is_old_is_forgotten(house):
    house.clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))

    async def go():
        async with house.open() as hub:
            hub.submit(event("echo 1", identity="1"))
            hub.outbox.add("fake:1", {}, ["nobody asked"])
            hub.look()
            await until(lambda: len(house.post.got) == 2)
        house.clock.advance(timedelta(days=29))
        async with house.open() as hub:
            await asyncio.sleep(0.05)
            assert hub.submit(event("echo 1", identity="1")).answer == "duplicate"
        house.clock.advance(timedelta(days=2))
        async with house.open() as hub:
            await until(lambda: not hub.inbox.find("fake:1", "1"))
            await until(lambda: hub.store.db.execute("SELECT count(*) FROM outbox").fetchone() == (0,))
            assert len(list(hub.store.transcript(hub.store.session("main")))) == 4, "the transcript stays"

    asyncio.run(go())


# Agents


def head(request):
    """Gives all that it is told to the hand."""
    text, results = asked(request)
    call = ToolCall(f"p{time.monotonic_ns()}", "agent.ask", {"agent": "hand", "task": text})
    ask = Completion(Message(Role.ASSISTANT, "", (call,)), Usage(), "fake/head")
    return said(f"head: {results[-1]}") if results else ask


def hand(request):
    """Runs what it is told."""
    text, results = asked(request)
    return said(results[-1]) if results else asks(text.splitlines()[-1])


def staff(hub):
    """Let a head and a hand work in a hub."""
    main = hub.agent.crew.personas["default"]
    tools = main.toolbox.only(lambda name: name == "agent.ask", [openpista.AgentAsk({"hand": ""})])
    hub.agent.crew = openpista.Crew({"default": main._replace(toolbox=tools), "hand": main._replace(name="hand")})
    hub.agent.pick = lambda name, agent="default": ScriptedModels(hand if agent == "hand" else head)


async def begun(house):
    """The process that the command runs in."""
    await until(lambda: (house.folder / "pid").exists() and (house.folder / "pid").read_text())
    return int((house.folder / "pid").read_text())


def test_a_stop_ends_the_agents_that_were_asked_too(house):
    """The hub's /stop, while another agent runs a command: within a second all is over, and what waits goes on."""

    async def go():
        async with house.open() as hub:
            staff(hub)
            hub.submit(event("echo $$ >pid; sleep 60"))
            hub.submit(event("echo next"))
            pid = await begun(house)
            assert await hub.stop("main") == "Stopped (2 commands had been started)."
            await until(lambda: len(house.post.got) == 2)
            assert house.post.texts[1] == "head: next"
            assert is_gone(pid)
        assert {row[0] for row in house.rows("state FROM tool_calls")} == {"interrupted", "finished"}
        assert house.rows("count(*) FROM handovers WHERE answer IS NOT NULL") == [(1,)]

    asyncio.run(go())


def test_after_an_orderly_end_a_hand_over_goes_on(house):
    """What the other agent ran is not run again; its answer still comes."""

    async def go():
        async with house.open() as hub:
            staff(hub)
            hub.submit(event("echo $$ >pid; echo ran >>ran; sleep 60"))
            pid = await begun(house)
        assert is_gone(pid)
        assert sorted(house.rows("name, state FROM tool_calls")) == [
            ("agent.ask", "started"),
            ("system.run", "interrupted"),
        ]
        async with house.open() as hub:
            staff(hub)
            await until(lambda: house.post.got)
        assert house.post.texts == [f"head: {openpista.STOPPED}"]
        assert (house.folder / "ran").read_text() == "ran\n"
        assert house.rows("count(*) FROM handovers WHERE answer IS NOT NULL") == [(1,)]

    asyncio.run(go())
