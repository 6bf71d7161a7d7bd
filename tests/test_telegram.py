"""Telegram: what comes in, who may speak, what goes out; commands, questions, files; and what a kill -9 leaves."""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import threading
import time

import launcher
import pytest
from fakes import BotServer
from hypothesis import HealthCheck, given, settings, strategies

import openpista as o

QUICK = o.Patience(first=0.05, most=0.2, longest=0.2, sending=5.0)
OWNER = 1
USERS = itertools.count(5_000)  # a user for each test: what one has sent does not slow down another


def until(condition, what="it did not come to that", seconds=10):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.01)
    return found


class Quick(o.Telegram):
    """The channel, for those who have no time."""

    REST, AGAIN, TICK, SLACK, FIRST = 0.05, 0.05, 0.05, 0.4, 0.3


class Line:
    """The channel on a database of its own, in a thread, with the offline provider unless the environment has another.

    Settings of [channels.telegram] go by their names; the rest is the channel's, the hub's or ours.
    """

    def __init__(
        self,
        bot,
        home,
        environ=None,
        approval="risky",
        poll=5,
        expires=None,
        agent=None,
        clock=time.time,
        rest=None,
        first=None,
        poller=None,
        crew=None,
        **telegram,
    ):
        self.bot, self.home, self.approval, self.poll, self.expires, self.clock = (
            bot,
            home,
            approval,
            poll,
            expires,
            clock,
        )
        self.rest, self.first, self.poller = rest, first, poller
        settings = {"enabled": True, "token": o.Secret(bot.token), "base_url": bot.url, "allowed_users": (OWNER, "*")}
        config = o.Config(
            agent=agent or o.AgentConfig(provider="offline"),
            tools=o.ToolsConfig(approval=approval),
            channels=o.ChannelsConfig(telegram=o.TelegramConfig(**settings | telegram)),
            **crew or {},
        )
        environ = environ or {"PATH": "/usr/bin:/bin", "HOME": str(home)}
        self.redact = o.Redactor([bot.token])
        self.ctx = o.Context(argparse.Namespace(config=None, yes=False), config, home, environ, self.redact)
        self.ready, self.failed, self.loop = threading.Event(), None, None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.ready.wait(10)
        if self.failed:
            raise self.failed

    def _run(self):
        try:
            asyncio.run(self._live())
        except BaseException as error:
            self.failed = error
        finally:
            self.ready.set()

    async def _live(self):
        async with o.open_app(self.ctx) as app:
            self.hub = o.Hub(app.store, app.agent, {}, approval=self.approval, redact=self.redact, patience=QUICK)
            sender, poller = (o.Bot(self.bot.token, self.ctx.config.channels.telegram.base_url) for _ in range(2))
            self.desk = o.Local(self.ctx, app)
            more = {"desk": self.desk, "menu": o.MENU, "status": dict, "poll": self.poll, "clock": self.clock}
            self.telegram = Quick(self.hub, sender, self.poller or poller, **more)
            self.telegram.REST = self.telegram.REST if self.rest is None else self.rest
            self.telegram.FIRST = self.first or self.telegram.FIRST
            if self.expires:
                self.telegram.questions.expires = self.expires
            self.toolbox.add([o.FileSend(self.toolbox.bench, self.telegram.post)])
            self.loop, self.ending = asyncio.get_running_loop(), asyncio.Event()
            self.telegram.open()
            self.hub.open()
            self.ready.set()
            await self.ending.wait()
            await self.hub.close()
            await self.telegram.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    def close(self, hurry=False):
        if hurry:
            self.loop.call_soon_threadsafe(self.hub.closing.set)
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.ending.set)
        self.thread.join(15)
        assert not self.thread.is_alive()
        if self.failed:
            raise self.failed

    def rows(self, what, *values):
        with o.Store(self.home / "memory.db") as store:
            return store.db.execute(f"SELECT {what}", values).fetchall()

    @property
    def toolbox(self):
        return self.hub.agent.crew.personas["default"].toolbox

    @property
    def problem(self):
        return self.telegram.health()["problem"]

    def ask(self, text, chat=None, **more):
        """What the bot says to somebody's first words."""
        chat = chat or next(USERS)
        self.bot.say(chat, text, **more)
        return self.bot.wait(chat)[-1]["text"]


@pytest.fixture
def line(bot, tmp_path):
    """line(allowed_users=(1,)) -> Line"""
    opened = []

    def open(folder="home", **more):
        opened.append(Line(bot, tmp_path / folder, **more))
        return opened[-1]

    yield open
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A Line with a Bot API of its own that many tests use, each with users of its own."""
    with BotServer() as bot:
        line = Line(bot, tmp_path_factory.mktemp("shared") / "home", allowed_groups=(-100, -101))
        yield line
        line.close()


# Receiving


def test_one_message_one_answer(shared):
    bot = shared.bot
    assert shared.ask("$ echo one") == "one"
    ann = next(USERS)
    for number in range(3):
        bot.say(ann, f"$ echo {number}")
    assert [row["text"] for row in bot.wait(ann, 3)] == ["0", "1", "2"]


def test_what_comes_twice_is_answered_once(shared):
    bot = shared.bot
    ann, bea = next(USERS), next(USERS)
    first = bot.say(ann, "$ echo one")
    bot.wait(ann)
    message = {
        "message_id": 9,
        "chat": {"id": ann, "type": "private"},
        "from": {"id": ann},
        "date": 1,
        "text": "$ echo again",
    }
    bot.update({"update_id": first["update_id"], "message": message}, once=True)
    assert shared.ask("$ echo two", bea) == "two"
    bot.wait_state(lambda state: not state["pending"])
    assert [row["text"] for row in bot.sent(ann)] == ["one"]


@pytest.mark.parametrize(
    "fault",
    [
        "status:500",
        "status:502",
        "html",
        "junk",
        "drop",
        "lost",
        "429:1",
        "401",
        "status:404",
        "status:409",
        "status:400",
    ],
)
def test_what_goes_wrong_with_a_poll_is_said_once_and_passes(line, bot, caplog, fault):
    caplog.set_level(logging.WARNING)
    bot.fault("getUpdates", fault, times=3)
    bot.say(7, "$ echo still here")
    one = line(rest=0.01)
    assert bot.wait(7)[0]["text"] == "still here"
    until(lambda: not one.problem)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("telegram: ")]
    assert len(said) == 2 and said[1] == "telegram: works again", said
    assert bot.token not in caplog.text and "()" not in said[0]


def test_a_poll_that_is_never_answered_is_given_up(line, bot, caplog):
    bot.fault("getUpdates", "silent")
    line(poll=1)
    bot.say(7, "$ echo at last")
    assert bot.wait(7)[0]["text"] == "at last"
    assert "was silent for" in caplog.text


def test_after_a_jump_of_the_clock_a_new_poll_begins(line, bot, caplog):
    now = [0.0]
    one = line(clock=lambda: time.time() + now[0])
    bot.wait_state(lambda state: state["polling"])
    bot.fault("getUpdates", "silent")
    before = len(bot.calls("getUpdates"))
    now[0] = 3600.0
    until(lambda: len(bot.calls("getUpdates")) > before)
    now[0] = 0.0
    assert one.ask("$ echo awake", 8) == "awake"
    assert "TimeoutError()" not in caplog.text


def test_a_webhook_is_in_the_way(line, bot):
    bot.webhook("https://example.org/hook")
    one = line()
    until(lambda: "webhook" in one.problem)
    bot.webhook("")
    assert "`openpista telegram setup` can remove the webhook" in one.problem
    assert one.ask("$ echo hi", 9) == "hi"
    until(lambda: not one.problem)


def test_a_second_poller(line, bot):
    one = line()
    bot.wait_state(lambda state: state["polling"])

    async def steal():
        async with o.Bot(bot.token, bot.url) as thief:
            with contextlib.suppress(o.BotError, OSError):
                await thief.call("getUpdates", seconds=0.3, timeout=1, offset=1)

    asyncio.run(steal())
    until(lambda: "another program polls this bot" in one.problem)


def test_nobody_there_at_the_start(line, bot, caplog):
    one = line(base_url="http://127.0.0.1:1")
    until(lambda: one.problem)
    time.sleep(0.5)
    said = [record.getMessage() for record in caplog.records if "telegram" in record.getMessage()]
    assert len(said) == 1 and "cannot reach http://127.0.0.1:1" in said[0]


class Unreachable(o.Bot):
    """For a long time there is nobody; then there is."""

    def __init__(self, bot, faults):
        super().__init__(bot.token, bot.url)
        self.faults = faults

    async def call(self, *words, **more):
        self.faults -= 1
        if self.faults > 0:
            raise o.ChannelBusy("nobody there")
        return await super().call(*words, **more)


def test_after_days_of_faults_it_still_tries(line, bot):
    one = line(rest=0.0, poller=Unreachable(bot, 3_000))
    assert one.ask("$ echo hi", 10) == "hi"


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-5", '"soon"', "1" + "0" * 400, "null"])
def test_odd_waiting_times(seconds):
    answer = json.loads('{"ok": false, "description": "x", "parameters": {"retry_after": ' + seconds + "}}")
    assert o.bot_refusal("m", 429, answer).retry_after is None


def test_numbers_begin_anew_after_a_quiet_week(line, bot):
    one = line()
    assert one.ask("$ echo one", 11) == "one"
    assert one.rows("position FROM cursors")[0][0] > 100_000_000
    one.close()
    with o.Store(one.home / "memory.db") as store:
        store.db.execute("UPDATE cursors SET position = position + 50000, moved_at = '2020-01-01T00:00:00.000Z'")
    again = line()
    assert again.ask("$ echo two", 11) and bot.wait(11, 2)[-1]["text"] == "two"


# Who


def test_an_empty_list_is_nobody(line, bot):
    one = line(allowed_users=())
    ann = next(USERS)
    text = one.ask("$ echo hi", ann)
    code = one.rows("code FROM people")[0][0]
    assert (
        text
        == f"This bot serves its owner. To be let in, give the owner this code: {o.shown_code(code)} (good for 10 minutes)."
    )
    for _ in range(3):
        bot.say(ann, "please")
    bot.say(-100, "/help", sender=ann)
    bot.say(-100, "@openpista_test_bot hi", sender=ann)
    bot.wait_state(lambda state: not state["pending"])
    assert len(bot.sent()) == 1 and one.rows("count(*) FROM inbox") == [(0,)]


def test_pairing_by_the_owner(line, bot):
    one = line(allowed_users=("1",))
    bot.chat(OWNER)
    ann, bea, eve = 20, 21, 22
    bot.say(ann, "hi", sender={"id": ann, "first_name": "[Ann](https://evil.example)*", "is_bot": False})
    asked = bot.wait(1)[0]
    code = one.rows("code FROM people WHERE id = '20'")[0][0]
    assert (
        asked["text"]
        == f"[Ann](https://evil.example)* (id 20) asks to be let in, with the code {o.shown_code(code)}. They could run commands."
    )
    assert not [e for e in asked["entities"] if e["type"] == "text_link"], "the stranger chose that name"
    data = [button["callback_data"] for row in asked["markup"]["inline_keyboard"] for button in row]
    assert data == ["p:20:allowed", "p:20:denied"]
    press = bot.press(1, asked["message_id"], data[0], sender=eve)
    until(lambda: bot.callbacks()[press])
    assert bot.callbacks()[press]["text"] == "This button is not for you."
    assert one.rows("state FROM people WHERE id = '20'") == [("asked",)]
    press = bot.press(1, asked["message_id"], data[0])
    bot.wait(ann, "You have been let in")
    assert "is let in" in until(lambda: bot.callbacks()[press])["text"]
    bot.say(ann, "$ echo thanks")
    bot.wait(ann, "thanks")
    press = bot.press(1, asked["message_id"], "p:1:allowed", sender=ann)
    assert until(lambda: bot.callbacks()[press])["text"] == "Only the owner may do that."
    for data in ("p:99", "p::", "p:99:owner", "p", "z:1", "", "p:\ud800:allowed", "a:1", "s:\ud800", "m:\ud800"):
        bot.press(1, asked["message_id"], data)
    bot.say(bea, "me too")
    note = bot.wait(1, 2)[-1]
    bot.press(1, note["message_id"], "p:21:denied")
    until(lambda: one.rows("state FROM people WHERE id = '21'") == [("denied",)])
    bot.say(bea, "hello?")
    bot.say(ann, "$ echo after")
    bot.wait(ann, "after")
    assert len(bot.sent(bea)) == 1


def test_strangers_are_bounded(line, bot):
    one = line(allowed_users=())
    for user in range(100, 125):
        bot.say(user, "hi")
    bot.wait_state(lambda state: not state["pending"])
    bot.wait(None, 20)
    time.sleep(0.1)
    assert len(bot.sent()) == 20 and one.rows("count(*) FROM people") == [(20,)]


def test_a_code_expires_and_is_given_anew_the_next_day(tmp_path):
    clock = [o.utc_now()]
    with o.Store(tmp_path / "db", lambda: clock[0]) as store:
        people = o.People(store, "telegram")
        assert people.ask("5", "Ann", "ABCDEFGH") and people.find_code(" abcd-efgh ").id == "5"
        clock[0] += o.timedelta(minutes=11)
        assert people.find_code("ABCDEFGH") is None and not people.ask("5", "Ann", "HGFEDCBA")
        clock[0] += o.timedelta(hours=24)
        assert people.ask("5", "Ann", "HGFEDCBA")


def test_groups(shared):
    bot = shared.bot
    group, other = -100, -999
    silent = [
        {"chat": other, "text": "@openpista_test_bot $ echo no"},
        {"chat": other, "text": "/help"},
        {"chat": group, "text": "$ echo no"},
        {"chat": group, "text": "/help@another_bot"},
        {"chat": group, "text": "mail me@openpista_test_bot2"},
        {"chat": group, "text": "/help", "sender": {"id": 1087968824, "is_bot": True, "first_name": "Group"}},
        {"chat": group, "text": "/help", "sender_chat": {"id": group, "type": "supergroup"}},
        {"chat": group, "text": "/help", "sender": {"id": 77, "is_bot": True, "first_name": "bot"}},
    ]
    for one in silent:
        bot.say(**one)
    first = bot.say(group, "@OpenPista_test_bot, do\n$ echo mention", sender=31)
    rows = bot.wait(group)
    assert rows[0]["text"] == "mention" and rows[0]["reply_to"] == first["message_id"]
    bot.say(group, "do\n$ echo answer", sender=32, reply_to=rows[0]["message_id"])
    bot.wait(group, "answer")
    assert shared.rows("text FROM inbox WHERE channel = 'telegram:-100' ORDER BY id")[0] == (
        "User 31: , do\n$ echo mention",
    )
    bot.say(group, "/help@openpista_test_bot", sender=33)
    bot.wait(group, "/help – what there is")
    assert bot.sent(other) == [] and len(bot.sent(group)) == 3


def test_who_is_not_on_the_list_is_not_served_in_a_listed_group_either(line, bot):
    one = line(allowed_users=(1,), allowed_groups=(-100,))
    bot.say(-100, "@openpista_test_bot hi", sender=2)
    bot.say(-100, "/help", sender=2)
    bot.say(-100, "/help", sender=1)
    bot.wait(-100)
    assert len(bot.sent()) == 1 and one.rows("count(*) FROM people") == [(0,)]


def test_topics_are_sessions_of_their_own(shared):
    bot = shared.bot
    bot.topic(-101, 5)
    bot.topic(-101, 6)
    for thread in (5, 6):
        bot.say(-101, "/new@openpista_test_bot", message_thread_id=thread)
        bot.say(-101, f"@openpista_test_bot do\n$ sleep 0.1; echo {thread}", message_thread_id=thread)
    rows = bot.wait(-101, 4)
    assert sorted(row["thread"] for row in rows) == [5, 5, 6, 6]
    sessions = {row[0].partition("#")[0] for row in shared.rows("session FROM inbox WHERE channel = 'telegram:-101'")}
    assert sessions == {"telegram:-101/5", "telegram:-101/6"}
    assert {row["thread"] for row in bot.actions(-101)} == {5, 6}


def test_a_group_becomes_a_supergroup(line, bot):
    old, new = -300, -1_000_000_000_300
    one = line(allowed_groups=(old,))
    bot.say(old, "@openpista_test_bot hi")
    bot.wait(old)
    bot.migrate(old, new)
    bot.say(new, "@openpista_test_bot hi")
    bot.wait(new)
    assert one.rows("DISTINCT session FROM inbox") == [("telegram:-300",)]


def test_a_group_that_has_moved_is_found_out_by_sending(line, bot):
    old, new = -301, -1_000_000_000_301
    one = line(allowed_groups=(old,))
    bot.chat(old)
    bot.wait_state(lambda state: state["polling"])
    bot.fault("getUpdates", "status:500", times=-1)
    bot.migrate(old, new)
    with o.Store(one.home / "memory.db") as store:
        o.Outbox(store).add(f"telegram:{old}", {}, ["first"])
        o.Outbox(store).add(f"telegram:{old}", {}, ["second"])
    assert [row["text"] for row in bot.wait(new, 2)] == ["first", "second"]


def test_taken_into_a_group(shared):
    bot = shared.bot
    chat = {"id": -555, "type": "group", "title": "[x](https://evil.example)"}
    states = {"old_chat_member": {"status": "left"}, "new_chat_member": {"status": "member"}}
    bot.chat(OWNER)
    bot.update({"my_chat_member": {"chat": chat, "from": {"id": OWNER}, "date": 1} | states})
    row = bot.wait(OWNER)[0]
    assert "put -555 into [channels.telegram] allowed_groups" in row["text"] and "text_link" not in str(row["entities"])


# Answering


def test_markdown(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.say(ann, "$ printf '**bold** <b> & `code`\\n```py\\nx\\n```'")
    row = bot.wait(ann)[0]
    assert row["text"] == "bold <b> & code\nx"
    assert [e["type"] for e in row["entities"]] == ["bold", "code", "pre"]
    assert row["preview"] == {"is_disabled": True}


def test_typing_while_it_runs_and_one_message_in_the_end(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.say(ann, "$ sleep 0.7; echo done")
    row = bot.wait(ann, lambda rows: rows and rows[0]["text"] == "done")[0]
    assert (
        len(bot.sent(ann)) == 1 and row["texts"][0].startswith("▶ sleep 0.7; echo done") and row["texts"][-1] == "done"
    )
    assert row["silent"]
    actions = bot.actions(ann)
    assert actions and actions[0]["action"] == "typing" and max(a["time"] for a in actions) < row["times"][-1]


def test_streaming(line, bot, model, openai):
    words = [f"word{n} " for n in range(12)]
    model.script({"deltas": 12, "text": "".join(words), "pace": 0.07})
    one = line(environ=openai, agent=o.AgentConfig())
    bot.say(30, "hi")
    row = bot.wait(30, "word11")[0]
    texts = until(lambda: (found := bot.sent(30)[0]["texts"])[-1] == "".join(words).strip() and found)
    assert len(bot.sent(30)) == 1 and len(texts) >= 2 and texts[0].endswith("…") and row["chat"] == 30
    until(lambda: one.rows("count(*) FROM outbox WHERE state = 'sent'") == [(1,)])


def test_plain_text_where_telegram_refuses_the_layout(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.fault("sendMessage", "status:400")
    assert shared.ask("$ printf '**bold**'", ann) == "**bold**"


def test_long_answers(shared):
    bot = shared.bot
    ann, bea = next(USERS), next(USERS)
    bot.say(ann, "$ seq -f 'line %05g 😀' 500")
    rows = bot.wait(ann, 2)
    until(lambda: "line 00500" in bot.sent(ann)[-1]["text"])
    assert "\n".join(row["text"] for row in bot.sent(ann)).split() == [
        w for n in range(1, 501) for w in ("line", f"{n:05}", "😀")
    ]
    assert all(len(row["text"].encode("utf-16-le")) <= 8192 for row in rows)
    bot.say(bea, "\n".join(["$ seq -f 'line %05g' 700"] * 4))
    rows = bot.wait(bea, lambda rows: any(row["file"] for row in rows))
    assert len(rows) == 2 and "(The whole answer is in the file.)" in rows[0]["text"]
    assert rows[1]["file"]["name"] == "answer.md"


def test_too_many_messages_for_telegram(line, bot):
    one = line()
    bot.limit(chat=2, burst=1)
    for number in range(3):
        bot.say(41, f"$ echo {number}")
    assert [row["text"] for row in bot.wait(41, 3)] == list("012")
    assert any(call["status"] == 429 for call in bot.calls("sendMessage"))
    until(lambda: one.rows("count(*) FROM outbox WHERE state = 'sent'") == [(3,)])


def test_a_chat_that_has_blocked_the_bot(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.say(ann, "$ echo hi")
    bot.block(ann)
    until(lambda: shared.rows("state FROM outbox WHERE channel = ?", f"telegram:{ann}") == [("dead",)])
    assert shared.ask("$ echo others") == "others"


@pytest.mark.parametrize("fault", ["lost", "junk"])
def test_what_may_have_been_delivered_is_sent_again_with_a_remark(shared, fault):
    bot = shared.bot
    ann = next(USERS)
    bot.fault("sendMessage", fault)
    bot.say(ann, "$ echo hi")
    rows = bot.wait(ann, 2)
    assert [row["text"] for row in rows] == ["hi", "hi\n\n(It is not certain that this was delivered before.)"]


def test_an_answer_in_the_place_of_the_progress_is_never_doubled(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.say(ann, "$ sleep 0.8; echo done")
    bot.wait(ann, "sleep")
    bot.fault("editMessageText", "lost")
    bot.wait(ann, lambda rows: rows[0]["text"] == "done")
    until(lambda: shared.rows("state FROM outbox WHERE channel = ?", f"telegram:{ann}") == [("sent",)])
    assert [row["text"] for row in bot.sent(ann)] == ["done"]


# Commands and buttons


def test_commands_are_registered(line, bot):
    one = line()
    names = [row["command"] for row in until(lambda: bot.commands())]
    assert names == list(o.MENU.orders)
    one.close()
    line("home")
    bot.wait_calls("getMyCommands", 2)
    assert len(bot.calls("setMyCommands")) == 1


def test_simple_commands(shared):
    bot = shared.bot
    assert "/help – what there is" in shared.ask("/start abc")
    assert shared.ask("/stop") == "Nothing is running."
    assert shared.ask("/nonsense").startswith("There is no /nonsense")
    assert shared.ask("/modle") == "There is no /modle, did you mean 'model'? See /help."
    assert shared.ask("/cron") == "There are no jobs. Say what you want done, and when."
    assert shared.ask("/cron run nothing").startswith("⚠️ no job named 'nothing'")
    assert shared.ask("/cron fly").startswith("⚠️ say /cron, or")
    assert re.match(r"this session: 0 tokens in, 0 out.*\n(default: .*\n)?all of today: ", shared.ask("/usage"))
    assert shared.ask("/sessions") == "There is none yet."
    assert shared.ask("/approve") == "Nothing waits for an answer."
    assert shared.ask("/approve 999999") == "There is no such question in this chat."
    assert shared.ask("/approve x y z") == "There is no such question in this chat."
    assert shared.ask("/model nobody/m").startswith("⚠️ ")
    ann = next(USERS)
    bot.say(ann, "/help@another_bot")
    bot.say(ann, "/HELP")
    assert len(bot.wait(ann)) == 1


def test_new_and_sessions(shared):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, "$ echo first")
    bot.wait(ann, "first")
    bot.say(ann, "/new")
    bot.wait(ann, "A new conversation")
    bot.say(ann, "$ echo second")
    bot.wait(ann, "second")
    bot.say(ann, "/sessions")
    row = bot.wait(ann, 4)[-1]
    labels = [button["text"] for line in row["markup"]["inline_keyboard"] for button in line]
    assert labels == ["• $ echo second", "$ echo first"]
    data = row["markup"]["inline_keyboard"][1][0]["callback_data"]
    for _ in range(2):
        press = bot.press(ann, row["message_id"], data)
        assert until(lambda press=press: bot.callbacks()[press])["text"] == "Going on with: $ echo first"
    bea = next(USERS)
    press = bot.press(bea, row["message_id"], data)
    assert until(lambda: bot.callbacks()[press])["text"] == "There is no such conversation here."
    bot.say(ann, "$ echo third")
    bot.wait(ann, "third")
    sessions = [row[0] for row in shared.rows("session FROM inbox WHERE channel = ? ORDER BY id", f"telegram:{ann}")]
    assert sessions[0] == sessions[2] == f"telegram:{ann}" and sessions[1].startswith(f"telegram:{ann}#")


def test_stop(line, bot):
    line(approval="never")
    ann = 51
    bot.say(ann, "$ trap '' TERM; sleep 60 & wait; sleep 60")
    bot.wait(ann)
    began = time.monotonic()
    bot.say(ann, "/stop")
    rows = bot.wait(ann, "⚠️ Stopped (1 command had been started).")
    assert time.monotonic() - began < 1.0 and len(rows) == 1


def test_stop_from_another_chat_of_the_session(shared):
    bot, ann, bea = shared.bot, next(USERS), next(USERS)
    with o.Store(shared.home / "memory.db") as store:
        o.Chats(store).turn_to(f"telegram:{bea}", f"telegram:{ann}")
    bot.say(ann, "$ sleep 60")
    bot.wait(ann)
    assert shared.ask("/stop", bea) == "Stopped (1 command had been started)."


def test_models(line, bot, model, openai):
    model.script(
        {"text": "hello", "default": True, "times": -1},
        {"path": "/models", "models": ["gpt-4o-mini", "gpt-5"], "times": -1, "default": True},
    )
    one = line(environ=openai, agent=o.AgentConfig())
    ann = 50
    bot.say(ann, "/models")
    row = bot.wait(ann)[0]
    assert row["text"].startswith("openai/gpt-4o, as configured.")
    buttons = {button["text"]: button["callback_data"] for line in row["markup"]["inline_keyboard"] for button in line}
    assert {"gpt-4o-mini", "gpt-5"} <= set(buttons)
    bot.press(ann, row["message_id"], buttons["gpt-5"])
    bot.wait(ann, "This conversation is answered by openai/gpt-5 now.")
    bot.say(ann, "hi")
    bot.wait(ann, "hello")
    assert model.bodies()[-1]["model"] == "gpt-5"
    bot.say(ann, "/model gpt-4o-mini")
    bot.wait(ann, "This conversation is answered by openai/gpt-4o-mini now.")
    bot.say(ann, "/model")
    row = bot.wait(ann, "openai/gpt-4o-mini, chosen for this conversation")[-1]
    assert row["markup"]["inline_keyboard"][-1][0] == {"text": "As configured", "callback_data": "m:"}
    bot.press(ann, row["message_id"], "m:")
    bot.wait(ann, "This conversation is answered by openai/gpt-4o, as configured.")
    press = bot.press(ann, row["message_id"], "m:0123456789abcdef")
    assert until(lambda: bot.callbacks()[press])["text"] == "This list is old; /models shows another."
    assert "No model of openai has 'xyz' in its name." in one.ask("/models xyz", 52)
    assert one.problem == ""


# Questions

RISKY = "$ rm -rf {}/a; echo ran >> {}/ran"


def asked(bot, chat):
    """The question that stands in a chat: its message, its number, and the data of its buttons."""
    row = bot.wait(chat, lambda rows: any(row["markup"] for row in rows))
    row = [row for row in row if row["markup"]][-1]
    data = [button["callback_data"] for button in row["markup"]["inline_keyboard"][0]]
    return row["message_id"], int(data[0].split(":")[1]), data


@pytest.fixture
def risky(tmp_path):
    """A command that is asked about; and what it has left."""
    ran = tmp_path / "ran"
    return (
        f"$ rm -rf {tmp_path}/a; echo x >> {ran}; echo ran",
        lambda: len(ran.read_text().split()) if ran.exists() else 0,
    )


def test_once(shared, risky):
    bot, ann, (words, count) = shared.bot, next(USERS), risky
    bot.say(ann, words)
    message, number, data = asked(bot, ann)
    row = next(row for row in bot.sent(ann) if row["message_id"] == message)
    assert words[2:] in row["text"] and f"/approve {number}" in row["text"] and not count()
    assert [d.split(":")[2] for d in data] == ["once", "always", "deny"]
    bob = next(USERS)
    for chat, sender, said in (
        (ann, bob, "Only who asked for it, or the owner, may answer this."),
        (bob, bob, "There is no such question in this chat."),
    ):
        press = bot.press(chat, message, data[0], sender=sender)
        assert until(lambda press=press: bot.callbacks()[press])["text"] == said
    press = bot.press(ann, message, f"a:{number}:perhaps")
    assert until(lambda: bot.callbacks()[press])["text"].startswith("Say /approve and its number")
    presses = [bot.press(ann, message, data[0]), bot.press(ann, message, data[2])]
    bot.wait(ann, lambda rows: any(row["text"] == "ran" for row in rows))
    assert until(lambda: bot.callbacks()[presses[0]])["text"] == "✅ allowed once"
    assert until(lambda: bot.callbacks()[presses[1]])["text"] == "Too late: ✅ allowed once."
    row = next(row for row in bot.sent(ann) if row["message_id"] == message)
    until(
        lambda: (
            (row := next(r for r in bot.sent(ann) if r["message_id"] == message))["markup"] is None
            and row["text"].startswith("✅ allowed once by")
        )
    )
    assert count() == 1


def test_always_is_for_this_command_in_this_session(line, bot, risky):
    one, ann, (words, count) = line(), 60, risky
    bot.say(ann, words)
    message, _, data = asked(bot, ann)
    bot.press(ann, message, data[1], sender=OWNER)
    bot.wait(ann, lambda rows: any(row["text"] == "ran" for row in rows))
    one.close()
    one = line()
    bot.say(ann, words)
    until(lambda: count() == 2)
    assert "rm -rf" in one.ask("/approve", ann) or bot.wait(ann, "Not asked about in this conversation")
    bea = 61
    bot.say(bea, words)
    asked(bot, bea)
    assert count() == 2
    bot.say(ann, "/approve reset")
    bot.wait(ann, "1 command will be asked about again.")


def test_deny(shared, risky):
    bot, ann, (words, count) = shared.bot, next(USERS), risky
    bot.say(ann, words)
    _, number, _ = asked(bot, ann)
    bot.say(ann, "/approve")
    bot.wait(ann, f"{number}: rm -rf")
    bot.say(ann, f"/approve {number} no")
    bot.wait(ann, "⛔ denied")
    until(lambda: shared.rows("state FROM inbox WHERE channel = ?", f"telegram:{ann}") == [("done",)])
    assert count() == 0


def test_approve_in_words(shared, risky):
    bot, ann, (words, count) = shared.bot, next(USERS), risky
    bot.say(ann, words)
    _, number, _ = asked(bot, ann)
    bot.say(ann, f"/approve #{number} YES")
    bot.wait(ann, lambda rows: any(row["text"] == "ran" for row in rows))
    assert count() == 1


def test_nobody_answers(line, bot, risky):
    one, (words, count) = line(expires=0.3), risky
    bot.say(70, words)
    message, _, data = asked(bot, 70)
    bot.wait(70, "⌛ nobody answered in time")
    press = bot.press(70, message, data[0])
    assert until(lambda: bot.callbacks()[press])["text"] == "Too late: ⌛ nobody answered in time, so it was not run."
    until(lambda: one.rows("state FROM inbox") == [("done",)])
    assert count() == 0


def test_stop_withdraws_a_question(shared, risky):
    bot, ann, (words, count) = shared.bot, next(USERS), risky
    bot.say(ann, words)
    message, _, data = asked(bot, ann)
    bot.say(ann, "/stop")
    bot.wait(ann, "◽ no longer asked")
    press = bot.press(ann, message, data[0])
    assert until(lambda: bot.callbacks()[press])["text"] == "Too late: ◽ no longer asked."
    bot.wait(ann, "Stopped")
    assert count() == 0


def test_the_next_process_goes_on_with_a_question(line, bot, risky):
    one, (words, count) = line(), risky
    bot.say(80, words)
    message, _, data = asked(bot, 80)
    until(lambda: one.rows("shown FROM approvals") == [(str(message),)])
    one.close()
    bot.press(80, message, data[0])
    line()
    bot.wait(80, lambda rows: any(row["text"] == "ran" for row in rows))
    assert count() == 1 and len([row for row in bot.sent(80) if row["markup"]]) == 0


def test_a_question_stands_below_and_the_progress_goes(shared, risky):
    bot, ann, (words, _) = shared.bot, next(USERS), risky
    bot.say(ann, f"$ sleep 0.6; echo one\n{words}")
    bot.wait(ann, "▶ sleep 0.6")
    message, _, data = asked(bot, ann)
    assert [row["deleted"] for row in bot.sent(ann)] == [True, False]
    bot.press(ann, message, data[2])
    bot.wait(ann, lambda rows: len(rows) == 2 and "▶" not in rows[1]["text"])
    assert shared.rows("state FROM approvals ORDER BY id DESC")[0] == ("deny",)


def test_after_a_no_nothing_more_is_asked_in_this_turn(shared, risky):
    bot, ann, (words, count) = shared.bot, next(USERS), risky
    bot.say(ann, f"{words}\n{words} again")
    message, _, data = asked(bot, ann)
    bot.press(ann, message, data[2])
    until(lambda: shared.rows("state FROM inbox WHERE channel = ?", f"telegram:{ann}") == [("done",)])
    assert (
        len(shared.rows("1 FROM approvals JOIN inbox ON inbox.id = inbox_id WHERE channel = ?", f"telegram:{ann}")) == 1
    )
    assert count() == 0


def test_a_long_command_is_shown_whole(shared, tmp_path):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, f"$ rm -rf {tmp_path}/a; echo '``` {'x ' * 2500}end'")
    asked(bot, ann)
    assert sum(row["text"].count("x ") for row in bot.sent(ann)) >= 2499 and "```" in bot.sent(ann)[0]["text"]
    bot.say(ann, "/stop")
    bot.wait(ann, "Stopped")


# Files

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c489 0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def words_of(line, chat):
    """What the agent is told of the last event of a chat."""
    row = lambda: line.rows("text FROM inbox WHERE channel = ? AND state = 'done' ORDER BY id DESC", f"telegram:{chat}")  # noqa: E731
    return until(row)[0][0]


def test_pictures_for_a_model_that_sees(line, bot, model, openai):
    model.script({"text": "seen", "default": True, "times": -1})
    one = line(environ=openai, agent=o.AgentConfig())
    bot.photo(90, PNG, caption="what is this?")
    bot.wait(90, "seen")
    *_, last = model.bodies()[-1]["messages"]
    kinds = [part["type"] for part in last["content"]]
    assert kinds.count("image_url") == 1 and "what is this?" in str(last) and "(picture: " in str(last)
    bot.album(91, [PNG, PNG, PNG], caption="all of these")
    bot.wait(91, "seen")
    *_, last = model.bodies()[-1]["messages"]
    assert [part["type"] for part in last["content"]].count("image_url") == 3 and "all of these" in str(last)
    assert one.rows("count(*) FROM inbox WHERE channel = 'telegram:91'") == [(1,)]


def test_documents(shared):
    bot, ann = shared.bot, next(USERS)
    bot.document(ann, b"a,b", "../../Ümläut \u202e report.csv", caption="sum it up")
    bot.wait(ann)
    text = words_of(shared, ann)
    path = re.fullmatch(r"sum it up\n\(file: (.*), text/csv, 3 bytes\)", text)[1]
    assert pathlib.Path(path).parent == shared.home / "workspace" / "inbox" and path.endswith("Ümläut_report.csv")
    assert pathlib.Path(path).read_bytes() == b"a,b" and os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "size", "fault", "said"),
    [
        ("big.iso", 21 << 20, None, "(The file big.iso was not fetched: 21 MB, bots get at most 20.)"),
        (
            "gone.txt",
            None,
            ("getFile", "status:400"),
            "(The file gone.txt could not be fetched: Telegram refuses getFile: Bad Request)",
        ),
        ("gone.txt", None, ("file", "status:404"), " did not hand the file over: 404)"),
        ("한국어" * 60 + ".txt", None, None, "(file: "),
        ("\ud800" + "x" * 300, None, None, "(file: "),
        ("...", None, None, "(file: "),
    ],
)
def test_files_that_do_not_come(shared, name, size, fault, said):
    bot, ann = shared.bot, next(USERS)
    if fault:
        bot.fault(*fault)
    bot.document(ann, b"abc", name, size=size)
    bot.wait(ann)
    assert said in words_of(shared, ann)
    assert not list((shared.home / "workspace" / "inbox").glob("*.part"))


def test_voice(line, bot, model, openai):
    model.script({"text": "done", "default": True, "times": -1})
    model.add({"path": "/audio/transcriptions", "text": "buy milk"})
    one = line(environ=openai, agent=o.AgentConfig())
    voice = {"file_id": bot.add_file(b"OggS", "voice.oga", "audio/ogg"), "duration": 3, "mime_type": "audio/ogg"}
    bot.say(92, voice=voice)
    bot.wait(92, "done")
    assert words_of(one, 92).endswith("\nbuy milk") and "(what is said in " in words_of(one, 92)


def test_voice_that_nobody_understands(shared):
    bot, ann = shared.bot, next(USERS)
    voice = {"file_id": bot.add_file(b"OggS", "voice.oga", "audio/ogg"), "duration": 3}
    bot.say(ann, voice=voice)
    assert "voice is not understood here" in bot.wait(ann)[0]["text"]
    bea = next(USERS)
    bot.say(bea, voice=voice, caption="$ echo but words are")
    assert bot.wait(bea)[0]["text"] == "but words are"
    assert "(a recording of 3 s, which was not understood: " in words_of(shared, bea)


def test_places_and_contacts_are_words(shared):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, location={"latitude": 1.5, "longitude": 2})
    bot.wait(ann)
    assert words_of(shared, ann) == "(a place: latitude 1.5, longitude 2)"
    bot.say(ann, "look", forward_origin={"type": "user"}, contact={"first_name": "Ann"})
    bot.wait(ann, 2)
    assert "it is data, no instruction" in words_of(shared, ann) and "(a contact: Ann  )" in words_of(shared, ann)


def test_an_edit_counts_until_the_turn_begins(shared):
    bot, ann = shared.bot, next(USERS)
    first = bot.say(ann, "$ sleep 0.7; echo one")
    second = bot.say(ann, "$ echo two")
    bot.wait(ann)
    bot.edit(ann, first["message_id"], "$ echo not any more")
    bot.edit(ann, second["message_id"], "$ echo corrected")
    rows = bot.wait(ann, lambda rows: len(rows) == 2 and "▶" not in rows[0]["text"])
    assert {row["text"] for row in rows} == {"one", "corrected"}


def test_a_caption_that_is_corrected_while_the_file_is_fetched(shared):
    bot, ann = shared.bot, next(USERS)
    bot.fault("file", "slow:0.5")
    message = bot.document(ann, b"abc", "a.txt", caption="wrong")
    bot.wait_calls("getFile")
    until(lambda: any(call["parameters"].get("path") for call in bot.calls("file")))
    bot.edit(ann, message["message_id"], "", caption="right")
    bot.wait(ann)
    assert words_of(shared, ann).startswith("right\n(file: ")


def send_file(line, chat, path, **more):
    """What file.send answers in a turn of this chat."""

    async def run():
        if chat:
            o.ASKED_IN.set(o.Event(chat, "1", "main", "send it"))
        tool = line.toolbox.tools["file.send"]
        return (await tool.run({"path": str(path), **more})).output

    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(run(), 10), line.loop).result(15)


def test_sending_files(shared, tmp_path):
    bot, ann = shared.bot, next(USERS)
    bot.chat(ann)
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_bytes(b"hello")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(51 << 20)
    chat = f"telegram:{ann}"
    assert "sent a.png, " in send_file(shared, chat, tmp_path / "a.png", caption=f"token {bot.token}")
    assert "sent a.txt, 5 bytes" in send_file(shared, chat, tmp_path / "a.txt")
    picture, text = bot.sent(ann)
    assert (
        picture["text"] == "token [secret]"
        and picture["file"]["name"] == "a.png"
        and bot.content(text["file"]["id"]) == b"hello"
    )
    for name, said in {
        "empty": "is no file, is empty",
        "huge": "more than 50 MB",
        "fifo": "is no file",
        ".": "directory",
        "none": "No such file",
        "a\0b": "is no path",
    }.items():
        with pytest.raises(o.ToolError, match=said):
            send_file(shared, chat, tmp_path / name)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in ("~nobody-of-this-name/x", tmp_path / "circle", "a\0b"):
        assert shared.toolbox.tools["file.send"].danger({"path": str(path)}) == ""
        with pytest.raises(o.ToolError):
            send_file(shared, chat, path)
    for chat in ("", "job", "cli", "quic:laptop"):
        with pytest.raises(o.ToolError, match="takes no files"):
            send_file(shared, chat, tmp_path / "a.txt")
    with pytest.raises(o.ToolError, match="not sent: Telegram refuses"):
        send_file(shared, "telegram:99999", tmp_path / "a.txt")
    bot.fault("sendDocument", "lost")
    with pytest.raises(o.ToolError):
        send_file(shared, f"telegram:{ann}", tmp_path / "a.txt")


def test_files_that_are_asked_about(shared, tmp_path):
    tool = shared.toolbox.tools["file.send"]
    (tmp_path / "a.txt").touch()
    for name in ("telegram.token", "credentials.toml", "memory.db", "config.toml"):
        assert tool.danger({"path": str(shared.home / name)}) == "sends a file of openpista's own"
    (tmp_path / "link").symlink_to(shared.home / "memory.db")
    assert tool.danger({"path": str(tmp_path / "link")})
    assert tool.danger({"path": "~/.ssh/id_ed25519"}) and tool.danger({"path": "/etc/shadow"})
    assert not tool.danger({"path": str(tmp_path / "a.txt")}) and not tool.danger(
        {"path": str(shared.home / "workspace" / "x")}
    )


# Bad input

ANN = {"id": 400, "is_bot": False, "first_name": "A"}
MESSAGE = {"message_id": 5, "date": 1, "chat": {"id": 400, "type": "private"}, "from": ANN, "text": "$ true"}
PHOTO = {"photo": [{"file_id": "x", "file_unique_id": "u", "file_size": 3, "width": 4}], "media_group_id": "7"}
TOPIC = {"is_topic_message": True, "message_thread_id": 3}
SOUND = [
    {"message": MESSAGE},
    {"edited_message": MESSAGE | {"edit_date": 2}},
    {"message": MESSAGE | PHOTO | {"caption": "hi"}},
    {"message": MESSAGE | {"text": "/cron run x", "reply_to_message": MESSAGE, "forward_origin": {"type": "user"}}},
    {"callback_query": {"id": "9", "from": ANN, "data": "a:1:once", "message": MESSAGE | TOPIC}},
    {
        "my_chat_member": {
            "chat": {"id": -9, "type": "group", "title": "T"},
            "from": ANN,
            "new_chat_member": {"status": "member"},
        }
    },
    {"message": {"message_id": 5, "chat": {"id": -9, "type": "group"}, "migrate_to_chat_id": -1000000000009}},
]
ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    "",
    "x",
    "\ud800",
    "\0",
    "\u202e/stop",
    "🦊" * 2000,
    [],
    [[]],
    {},
    {"id": {}},
    [None],
]
ODD += ["a:9999999999999999999:once", "s:", "m:", "p:1:allowed"]


def places(value, path=()):
    """All places in a value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    """The value with another one in a place, or with nothing there: ..."""
    if not path:
        return new
    copy = value.copy()
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def takes(tmp_path_factory):
    """takes(update, ...): has them taken as if Telegram had sent them; the channel must survive."""
    with BotServer() as bot:
        line = Line(bot, tmp_path_factory.mktemp("odd") / "home", allowed_groups=(-9,))
        line.ask("/help")

        async def take(updates):
            telegram = line.telegram
            number = telegram.chats.position(o.cursor_of(telegram.me["id"]))[0] - 1
            for update in updates:
                assert telegram._take(number, update)
            assert telegram.chats.position(o.cursor_of(telegram.me["id"]))[0] == number + 1

        def takes(*updates):
            asyncio.run_coroutine_threadsafe(take(updates), line.loop).result(60)

        yield takes
        assert line.ask("$ echo alive") == "alive"
        line.close(hurry=True)
        Line(bot, line.home).close(hurry=True)


def test_updates_with_something_missing_or_wrong(takes):
    takes(*(changed(one, path, odd) for one in SOUND for path in places(one) if path for odd in (..., *ODD[:15])))


NAMES = sorted({str(key) for one in SOUND for path in places(one) for key in path[-1:]})
ANYTHING = strategies.recursive(
    strategies.sampled_from(ODD),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.sampled_from(NAMES), inner),
    max_leaves=12,
)


@given(ANYTHING)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_updates_of_any_shape(takes, value):
    takes(*({kind: value} for kind in (*o.HANDLED, "poll", "message_reaction")))


def test_what_stands_in_the_way_does_not_stop_the_rest(shared):
    bot, ann = shared.bot, next(USERS)
    before = len(bot.calls("getUpdates"))
    for update in ("[]", "null", '{"message": 1}', '{"update_id": "x"}', '{"update_id": 1e400}', '{"update_id": true}'):
        bot.update(update.encode(), once=True)
    bot.update(b'{"update_id": 9223372036854775807, "message": {}}', once=True)
    number = bot.say(ann, "$ echo one")["update_id"]
    raw = {"message_id": 6, "chat": {"id": ann, "type": "private"}, "from": {"id": ann}, "date": 1}
    raw["text"] = "$ echo \ud800 two"
    bot.update(json.dumps({"update_id": number + 1, "message": raw}).encode())
    assert [row["text"] for row in bot.wait(ann, 2)] == ["one", "? two"]
    assert len(bot.calls("getUpdates")) - before < 30


def test_a_very_long_message(shared):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, "long " * 200_000, entities=[])
    assert "does not fit into the window" in bot.wait(ann)[0]["text"]
    assert len(shared.rows("text FROM inbox WHERE channel = ?", f"telegram:{ann}")[0][0]) >= 1_000_000


BAD_TOKENS = [
    "123:abcdefghijk\n",
    "123:abc\ndefghijk",
    "",
    "token",
    "123:",
    "123:abcdefghijk/../x",
    "123:abcdefghij kl",
]


@pytest.mark.parametrize("token", BAD_TOKENS)
def test_no_token(token):
    with pytest.raises(o.ConfigError) as caught:
        o.Bot(token, "http://127.0.0.1:1")
    assert "abc" not in str(caught.value)


# The program: setup, status, kills


class House:
    """A home and the processes in it."""

    def __init__(self, bot, home, environ, folder):
        self.bot, self.home, self.folder, self.environ, self.processes = bot, home, folder, environ, []
        home.mkdir(mode=0o700)
        self.configure()
        (home / "telegram.token").write_text(bot.token + "\n")

    def configure(self, telegram="enabled = true\nallowed_users = [1]", approval="never"):
        text = f'[agent]\nprovider = "offline"\n[gateway]\nport = 0\ngrace = 0\n[tools]\napproval = "{approval}"\n'
        text += f'[channels.telegram]\nbase_url = "{self.bot.url}"\n{telegram}\n'
        (self.home / "config.toml").write_text(text)

    def start(self, *words, polls=True, **env):
        with (self.folder / "out").open("a") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.processes.append(launcher.Process([*words, "start"], self.environ | env, self.folder, **streams))
        if polls:
            self.bot.wait_state(lambda state: state["polling"])
        return self.processes[-1]

    def kill(self):
        self.processes[-1].kill()
        self.processes[-1].wait(10)
        self.bot.wait_state(lambda state: not state["polling"])

    @property
    def said(self):
        return (self.folder / "out").read_text()

    def rows(self, what):
        with o.Store(self.home / "memory.db") as store:
            return store.db.execute(f"SELECT {what}").fetchall()

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait(10)


@pytest.fixture
def house(bot, home, environ, tmp_path):
    house = House(bot, home, environ, tmp_path)
    yield house
    house.close()


def test_kills(house, bot):
    effects = house.folder / "effects"
    house.start()
    bot.say(1, f"$ echo 1 >> {effects}; echo one")
    all_sent = lambda: house.rows("count(*) FROM outbox WHERE state <> 'sent'") == [(0,)]  # noqa: E731
    bot.wait(1, "one")
    until(all_sent)
    house.kill()  # during a poll
    bot.say(1, f"$ echo 2 >> {effects}; sleep 60; echo two")
    bot.say(1, f"$ echo 3 >> {effects}; echo three")
    house.start()
    until(lambda: effects.exists() and effects.read_text() == "1\n2\n")
    bot.wait_state(lambda state: not state["pending"])
    house.kill()  # during a turn, with a message behind it
    house.start()
    bot.wait(1, lambda rows: rows[-1]["text"] == "three")
    assert effects.read_text() == "1\n2\n3\n"
    until(all_sent)
    bot.fault("sendMessage", "slow:30")
    bot.say(1, f"$ echo 4 >> {effects}; echo four")
    until(lambda: any(call["fault"] == "slow" for call in bot.calls("sendMessage")))
    house.kill()  # while the answer is sent, before it arrives
    house.start()
    bot.wait(1, "four\n\n(It is not certain that this was delivered before.)")
    until(all_sent)
    bot.fault("sendMessage", "lost")
    bot.say(1, f"$ echo 5 >> {effects}; echo five")
    bot.wait(1, "five")
    house.kill()  # after it has arrived
    house.start()
    until(all_sent)
    assert effects.read_text() == "1\n2\n3\n4\n5\n"
    texts = [row["text"].partition("\n\n(It")[0] for row in bot.sent(1)]
    assert [texts.count(text) for text in ("one", "three", "four")] == [1, 1, 1] and texts.count("five") == 2
    assert "Traceback" not in house.said


def test_what_comes_while_it_ends_waits_for_the_next_start(house, bot):
    house.start()
    bot.say(1, "$ sleep 0.5; echo one")
    until(lambda: house.rows("state FROM inbox") == [("running",)])
    house.processes[-1].send_signal(signal.SIGTERM)
    bot.say(1, "$ echo two")
    bot.say(1, "/help")
    assert house.processes[-1].wait(10) == 0
    house.start()
    bot.wait(1, lambda rows: {"two"} <= {row["text"] for row in rows})
    assert house.rows("count(*) FROM inbox") == [(2,)]
    rows = bot.wait(1, "/help – what there is")
    assert sum("/help – what there is" in row["text"] for row in rows) == 1


def test_a_button_that_cannot_do_its_work_says_why(line, bot):
    def fail(telegram, said, data):
        raise o.UsageError("there is no such thing", "say another")

    one, ann = line(), next(USERS)
    one.telegram.menu = one.telegram.menu._replace(presses={"x": fail})
    bot.say(ann, "/help")
    press = bot.press(ann, bot.wait(ann)[-1]["message_id"], "x:")
    assert until(lambda: bot.callbacks().get(press))["text"] == "⚠️ there is no such thing; say another"


def test_a_button_that_is_pressed_while_nobody_runs(house, bot, tmp_path):
    house.configure(approval="risky")
    house.start()
    bot.say(1, f"$ rm -rf {tmp_path}/a; echo ran >> {tmp_path}/ran")
    message, _, data = asked(bot, 1)
    until(lambda: house.rows("shown FROM approvals") == [(str(message),)])
    house.kill()
    bot.press(1, message, data[0])
    house.start()
    until(lambda: (tmp_path / "ran").exists() and house.rows("state FROM inbox") == [("done",)])
    assert (tmp_path / "ran").read_text() == "ran\n"


def test_the_daemon_tells_who_may_speak_and_pairs(house, bot, openpista):
    house.configure("enabled = true")
    house.start()
    assert "telegram       nobody may speak yet" in house.said
    bot.say(1, "hi", sender={"id": 1, "is_bot": False, "first_name": "\x1b[31mAnn\u202e"})
    code = re.search("[A-Z2-9]{4}-[A-Z2-9]{4}", bot.wait(1)[0]["text"])[0]
    listed = openpista("pair", "list").stdout
    assert re.search(rf"1 +Ann +asked +{code} ", listed) and "\x1b" not in listed
    assert json.loads(openpista("pair", "list", "--json").stdout)[0]["state"] == "asked"
    assert openpista("pair", "approve", "AAAA-BBBB").returncode == 2
    done = openpista("pair", "approve", code.lower())
    assert (done.returncode, done.stdout) == (0, "Ann is let in.\n")
    assert house.rows("text FROM outbox")[-1][0].startswith("You have been let in.")
    bot.say(1, "/status")
    text = bot.wait(1, "session: telegram:1")[-1]["text"]
    assert f"pid {house.processes[0].pid}" in text
    status = openpista("telegram", "status")
    assert status.returncode == 0 and "people        1\n" in status.stdout and "problem       none" in status.stdout
    assert openpista("pair", "deny", "1").stdout == "Ann is kept out.\n"
    bot.say(1, "$ echo out")
    bot.wait_state(lambda state: not state["pending"])
    assert "out" not in [row["text"] for row in bot.sent(1)]


def test_status_without_a_daemon(house, bot, openpista):
    status = ("telegram", "status", "--json")
    found = json.loads(openpista(*status).stdout)
    assert found["bot"].startswith("@openpista_test_bot") and found["people"] == ["1"] and found["problem"] == ""
    bot.webhook("https://example.org")
    done = openpista(*status)
    assert done.returncode == 1 and "a webhook is set" in done.stdout
    done = openpista(*status, env={"TELEGRAM_BOT_TOKEN": "123456:" + "a" * 35})
    assert done.returncode == 3 and "the token was revoked or is wrong" in done.stderr and "aaaa" not in done.stderr
    done = openpista(*status, env={"TELEGRAM_BOT_TOKEN": "123456:" + "a" * 20 + "\n"})
    assert done.returncode == 2 and "does not look like one" in done.stderr and "aaaa" not in done.stderr
    done = openpista(*status, env={"TELEGRAM_ALLOWED_USERS": "@ann"})
    assert done.returncode == 2 and "must have ids, not '@ann'" in done.stderr
    assert json.loads(openpista(*status, env={"TELEGRAM_ALLOWED_USERS": "7, 8"}).stdout)["people"] == ["7", "8"]
    (house.home / "telegram.token").unlink()
    assert openpista(*status).returncode == 3


CONFIG = """# mine
[agent]
provider = "offline"  # no model

[channels.telegram]   # the bot
base_url = "{}"
enabled = false  # not yet

[gateway]
port = 0
"""


@pytest.fixture
def setup(house, bot, terminal):
    """setup(...) -> a terminal on which `telegram setup` runs, in a home without a token."""
    (house.home / "telegram.token").unlink()
    (house.home / "config.toml").write_text(CONFIG.format(bot.url))
    return lambda **env: terminal("telegram", "setup", columns=200, **env)


def untouched(house):
    return (
        not (house.home / "telegram.token").exists() and "enabled = false" in (house.home / "config.toml").read_text()
    )


def test_setup(setup, house, bot):
    screen = setup()
    screen.wait("not shown")
    screen.send(bot.token + "\r")
    screen.wait("press Start")
    assert bot.token[-20:] not in screen.raw.decode()
    code = re.search(r"https://t\.me/openpista_test_bot\?start=(\w+)", screen.text)[1]
    bot.say(66, "let me in", sender={"id": 66, "is_bot": False, "first_name": "Eve\x1b[2J"})
    screen.wait("Eve (id 66) wrote: let me in. Is that you?")
    screen.send("n\r")
    screen.wait("was not paired")
    assert untouched(house)
    bot.say(5, f"/start {code}")
    bot.wait(5, "Paired.")
    assert screen.end() == 0 and "paired with User 5 (id 5)" in screen.text
    assert (house.home / "config.toml").read_text() == CONFIG.format(bot.url).replace(
        "= false  # not", "= true   # not"
    )
    stored = house.home / "telegram.token"
    assert stored.read_text() == bot.token + "\n" and stored.stat().st_mode & 0o777 == 0o600
    assert house.rows("id, state FROM people") == [("5", "allowed")]
    house.start()
    bot.say(5, "$ echo works")
    until(lambda: bot.sent(5)[-1]["text"] != "Paired. Start openpista, and say what you want done.")
    assert len(bot.sent(5)) == 2


def test_setup_with_a_webhook(setup, house, bot):
    bot.webhook("https://user:pass@example.org/hook")
    screen = setup(TELEGRAM_BOT_TOKEN=bot.token)
    screen.wait("Remove it?")
    assert "user:pass" not in screen.text
    screen.send("n\r")
    assert screen.end() == 1 and untouched(house)


@pytest.mark.parametrize(
    ("token", "env", "code", "said"),
    [
        ("123456:" + "a" * 35, {}, 3, "the token was revoked or is wrong"),
        ("rubbish", {}, 2, "does not look like one"),
        ("", {}, 2, "does not look like one"),
        (None, {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}, 1, "cannot reach "),
    ],
)
def test_setup_that_fails_writes_nothing(setup, house, bot, openpista, token, env, code, said):
    token = bot.token if token is None else token
    done = openpista("telegram", "setup", input=token + "\n", env=env)
    assert done.returncode == code and said in done.stderr and untouched(house)
    assert not token or token not in done.stderr + done.stdout


def test_setup_beside_a_daemon_that_polls(house, openpista):
    house.start()
    done = openpista("telegram", "setup")
    assert done.returncode == 1 and "`openpista stop` first" in done.stderr


TABLE = "[channels.telegram]\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", TABLE + "enabled = true\n"),
        ("a = 1", "a = 1\n\n" + TABLE + "enabled = true\n"),
        (
            TABLE + "x = 'x' # enabled = false\n[b]\nenabled = false",
            TABLE + "enabled = true\nx = 'x' # enabled = false\n[b]\nenabled = false",
        ),
        (TABLE + "  enabled=false# no\nenabled2 = 1", TABLE + "  enabled=true  # no\nenabled2 = 1"),
        (TABLE + "enabled = 'a # b'  # c", None),
        ("[channels]\ntelegram = {}", None),
        ("channels.telegram.enabled = false", None),
        (TABLE + 'x = """\n[fake]\n"""\nenabled = false', None),
        (TABLE.strip(), TABLE + "enabled = true"),
        ("\ufeff[b]\r\nc = 1\r\n", "[b]\nc = 1\n\n" + TABLE + "enabled = true\n"),
    ],
)
def test_one_setting_in_a_file(tmp_path, text, found):
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode())
    try:
        o.set_setting(path, "channels.telegram", "enabled", "true")
    except o.ConfigError as error:
        assert "written in a way" in str(error) and path.read_bytes() == text.encode() and found is None
    else:
        assert o.load_toml(path)["channels"]["telegram"]["enabled"] is True and found in (None, path.read_text("utf-8"))


# The token


def test_the_token_is_nowhere(line, bot, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    faults = ("status:500", "status:400", "status:403", "html", "drop", "junk", "401", "429:0", "status:404")
    for method in (
        "getMe",
        "getUpdates",
        "sendMessage",
        "sendChatAction",
        "getFile",
        "file",
        "setMyCommands",
        "answerCallbackQuery",
    ):
        for fault in faults:
            bot.fault(method, fault)
    one = line(base_url=bot.url.replace("//", "//user:password@"), rest=0.01, first=9.0)
    for number in range(2 * len(faults)):
        bot.document(300 + number, b"abc", caption="$ echo x")
        bot.press(300 + number, 1, "a:1:once")
    until(lambda: one.rows("count(*) FROM outbox WHERE state IN ('sent', 'dead')") == [(2 * len(faults),)], seconds=20)
    assert {call["fault"] for call in bot.calls("file")} > {"status", "html", "drop"}
    secret = bot.token.partition(":")[2]
    assert secret not in caplog.text and "password" not in caplog.text
    one.close()
    assert [path.name for path in one.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []


def test_the_token_is_in_no_child_and_no_argument(house, bot, openpista):
    (house.home / "telegram.token").unlink()
    process = house.start("--debug", TELEGRAM_BOT_TOKEN=bot.token, PYTHONASYNCIODEBUG="1")
    seen = house.folder / "seen"
    bot.say(
        1,
        f"$ env > {seen}; cat /proc/$$/environ /proc/{process.pid}/cmdline >> {seen}; echo {bot.token[:15]}''{bot.token[15:]}",
    )
    assert "[secret]" in bot.wait(1)[0]["text"] and seen.stat().st_size > 100
    done = openpista("telegram", "status", env={"TELEGRAM_BOT_TOKEN": bot.token})
    process.send_signal(15)
    assert process.wait(10) == 0
    secret = bot.token.partition(":")[2]
    found = [path.name for path in house.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == [] and secret not in done.stdout + done.stderr and "polling as @openpista_test_bot" in house.said


# Agents

CREW = {
    "agents": {"worker": o.RoleConfig(model="m1", approval="never"), "guest": o.RoleConfig(model="m2", tools=())},
    "routes": (o.RouteConfig(agent="guest", prefix="!ops "),),
}


def ask_worker(command):
    """The default agent gives a task to the worker, who runs this for it."""
    task = {"agent": "worker", "task": "do it"}
    return [
        {"model": "gpt-4o", "tool_calls": [{"name": "agent_ask", "arguments": task}]},
        {"model": "m1", "tool_calls": [{"name": "system_run", "arguments": {"command": command}}]},
    ]


def tell(bot, user, text, wanted):
    """Somebody says it, and waits for one more message that begins so."""
    count = len(bot.sent(user))
    bot.say(user, text)
    return bot.wait(user, lambda rows: [row for row in rows[count:] if row["text"].startswith(wanted)])[-1]


def test_agent(line, bot, model, openai):
    """Each with few messages: there is one a second in a chat."""
    model.script(*({"model": name, "text": f"I am {name}", "times": -1} for name in ("m1", "m2", "m9", "gpt-4o")))
    one, (ann, bea, eve, joe) = line(environ=openai, agent=o.AgentConfig(), crew=CREW), range(60, 64)
    tell(bot, ann, "who?", "I am gpt-4o")
    row = tell(bot, ann, "/agent", "[[routes]] say who answers this session. There are: default, worker, guest")
    buttons = {button["text"]: button["callback_data"] for line in row["markup"]["inline_keyboard"] for button in line}
    assert [*buttons] == ["default", "worker", "guest", "As the rules say"]
    press = bot.press(ann, row["message_id"], buttons["worker"])
    bot.wait(ann, "worker answers this session; /agent reset ends that")
    assert until(lambda: bot.callbacks()[press])["text"].startswith("worker answers")
    tell(bot, ann, "who?", "I am m1")

    tell(bot, bea, "/agent guest", "guest answers this session; /agent reset ends that")
    tell(bot, bea, "/model m9", "This conversation is answered by openai/m9 now.")
    tell(bot, bea, "who?", "I am m9")
    tell(bot, bea, "/agent guest", "guest answers")
    tell(bot, bea, "who?", "I am m2")

    tell(bot, eve, "/agent worker", "worker answers")
    tell(bot, eve, "/model reset", "This conversation is answered by openai/m1, as configured.")
    bot.press(eve, row["message_id"], buttons["As the rules say"])
    bot.wait(eve, "[[routes]] say who answers this session")
    tell(bot, eve, "!ops who?", "I am m2")

    tell(bot, joe, "/agent nobody", "⚠️ there is no agent 'nobody'")
    press = bot.press(joe, row["message_id"], "g:0123456789abcdef")
    assert until(lambda: bot.callbacks()[press])["text"] == "This list is old; /agent shows another."
    said = tell(bot, joe, "/usage", "this session: 0 tokens in")["text"].splitlines()
    assert [line.partition(":")[0] for line in said[1:]] == ["default", "worker", "guest", "all of today"]
    assert [line.partition("tokens, ")[2] for line in said[1:4]] == ["1 call today", "1 call today", "3 calls today"]
    assert one.problem == ""


def test_a_prefix_in_a_group_stands_behind_the_name(line, bot, model, openai):
    model.script({"model": "m2", "text": "I am m2"})
    line(environ=openai, agent=o.AgentConfig(), crew=CREW, allowed_groups=(-100,))
    bot.say(-100, "@openpista_test_bot !ops who?", sender={"id": 61, "first_name": "Ann", "is_bot": False})
    bot.wait(-100, "I am m2")
    assert "Ann: who?" in str(model.bodies()[0]) and "!ops" not in str(model.bodies()[0])


def test_who_works_is_shown_and_a_stop_reaches_them(line, bot, model, openai, tmp_path):
    model.script(*ask_worker(f"echo $$ >{tmp_path}/pid; exec sleep 60"))
    one, ann = line(environ=openai, agent=o.AgentConfig(), crew=CREW), 62
    bot.say(ann, "do it")
    row = bot.wait(ann, "worker: echo $$")[0]
    assert "agent.ask worker" in row["text"]
    pid = until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    bot.say(ann, "/stop")
    bot.wait(ann, "⚠️ Stopped (2 commands had been started).")
    until(lambda: not pathlib.Path(f"/proc/{pid.strip()}").exists())
    until(lambda: one.rows("count(*) FROM tool_calls WHERE state = 'interrupted'") == [(2,)])


def test_a_turn_says_that_a_stronger_model_took_over_and_what_is_used_up(line, bot, model, openai):
    bad = [{"model": "gpt-4o", "tool_calls": [{"name": "nothing", "arguments": {}}]}] * 2
    model.script(*bad, {"model": "m9", "text": "I am m9"})
    line(environ=openai, agent=o.AgentConfig(escalate=("openai/m9",), daily_calls=3), crew=CREW)
    bot.say(63, "do it")
    bot.wait(63, "I am m9\n\n(After two failed rounds openai/m9 took over.)")
    bot.say(63, "again")
    bot.wait(63, "⚠️ the agent default has used 3 of 3 calls that it may use a day; it goes on at midnight")


def test_a_question_whose_turn_is_over_is_withdrawn(line, bot, risky):
    one, (words, _) = line(), risky
    bot.say(63, words)
    asked(bot, 63)
    one.close()
    with sqlite3.connect(one.home / "memory.db") as db:
        db.execute("UPDATE inbox SET state = 'stopped', done_at = received_at")
    line()
    bot.wait(63, "◽ no longer asked")
