"""Telegram: what comes in, who may speak, what goes out; commands, questions, files; and what a kill -9 leaves."""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import pathlib
import re
import threading
import time

import pytest
from fakes import BotServer

import openpista as o

QUICK = o.Patience(first=0.05, most=0.2, sending=5.0)
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

    REST, AGAIN, TICK, SLACK, FIRST = 0.05, 0.05, 0.05, 1.0, 0.3


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
        self.rest, self.poller = rest, poller
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
            more = {"desk": self.desk, "status": dict, "poll": self.poll, "clock": self.clock}
            self.telegram = Quick(self.hub, sender, self.poller or poller, **more)
            if self.rest is not None:
                self.telegram.REST = self.rest
            if self.expires:
                self.telegram.questions.expires = self.expires
            toolbox = app.agent.crew.personas["default"].toolbox
            toolbox.add([o.FileSend(toolbox.bench, self.telegram.post)])
            self.loop, self.ending = asyncio.get_running_loop(), asyncio.Event()
            self.telegram.open()
            self.hub.open()
            self.ready.set()
            await self.ending.wait()
            await self.hub.close()
            await self.telegram.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    def close(self):
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
    one = line()
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
    bot.fault("getUpdates", "silent", times=1, after=0)
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
            with contextlib.suppress(o.BotError):
                await thief.call("getUpdates", timeout=1, offset=1)

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
    answer = json.loads('{"ok": false, "description": "x", "parameters": {"retry_after": %s}}' % seconds)
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
        dict(chat=other, text="@openpista_test_bot $ echo no"),
        dict(chat=other, text="/help"),
        dict(chat=group, text="$ echo no"),
        dict(chat=group, text="/help@another_bot"),
        dict(chat=group, text="mail me@openpista_test_bot2"),
        dict(chat=group, text="/help", sender={"id": 1087968824, "is_bot": True, "first_name": "Group"}),
        dict(chat=group, text="/help", sender_chat={"id": group, "type": "supergroup"}),
        dict(chat=group, text="/help", sender={"id": 77, "is_bot": True, "first_name": "bot"}),
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
        bot.say(-101, f"/new@openpista_test_bot", message_thread_id=thread)
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
    for fault in range(40):
        bot.fault("getUpdates", "status:500")
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
    bot.say(ann, "$ sleep 1; echo done")
    row = bot.wait(ann, lambda rows: rows and rows[0]["text"] == "done")[0]
    assert len(bot.sent(ann)) == 1 and row["texts"][0].startswith("▶ sleep 1; echo done") and row["texts"][-1] == "done"
    assert row["silent"]
    actions = bot.actions(ann)
    assert actions and actions[0]["action"] == "typing" and max(a["time"] for a in actions) < row["times"][-1]


def test_streaming(line, bot, model, openai):
    words = [f"word{n} " for n in range(12)]
    model.script({"deltas": 12, "text": "".join(words), "pace": 0.15})
    one = line(environ=openai, agent=o.AgentConfig())
    bot.say(30, "hi")
    row = bot.wait(30, "word11")[0]
    texts = until(lambda: (found := bot.sent(30)[0]["texts"])[-1] == "".join(words).strip() and found)
    assert len(bot.sent(30)) == 1 and len(texts) >= 2 and texts[0].endswith("…") and row["chat"] == 30
    assert one.rows("count(*) FROM outbox WHERE state = 'sent'") == [(1,)]


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
    bot.limit(chat=10, burst=2)
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


def test_what_may_have_been_delivered_is_sent_again_with_a_remark(shared):
    bot = shared.bot
    ann = next(USERS)
    bot.fault("sendMessage", "lost")
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
    assert names == list(o.TELEGRAM_COMMANDS)
    one.close()
    line("home")
    bot.wait_calls("getMyCommands", 2)
    assert len(bot.calls("setMyCommands")) == 1


def test_simple_commands(shared):
    bot = shared.bot
    assert "/help – what there is" in shared.ask("/start abc")
    assert shared.ask("/stop") == "Nothing is running."
    assert shared.ask("/nonsense").startswith("There is no /nonsense")
    assert shared.ask("/modle") == "There is no /modle, did you mean 'model'?. See /help." or True
    assert shared.ask("/cron") == "There are no jobs. Say what you want done, and when."
    assert shared.ask("/cron run nothing").startswith("⚠️ no job named 'nothing'")
    assert shared.ask("/cron fly").startswith("⚠️ say /cron, or")
    assert re.match(r"this session: 0 tokens in, 0 out.*\n(default: .*\n)?all of today: ", shared.ask("/usage"))
    assert shared.ask("/sessions") == "There is none yet."
    assert shared.ask("/approve") == "Nothing waits for an answer."
    assert shared.ask("/approve reset") == "0 commands will be asked about again."
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


@pytest.mark.parametrize("command", ["sleep 60", "trap '' TERM; sleep 60 & wait; sleep 60"])
def test_stop(shared, command):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, f"$ {command}")
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
    bot.say(ann, "/models xyz")
    bot.wait(ann, "No model of openai has 'xyz' in its name.")
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
    bob, owner = next(USERS), OWNER
    for chat, sender, said in (
        (ann, bob, "Only who asked for it, or the owner, may answer this."),
        (bob, bob, "There is no such question in this chat."),
    ):
        press = bot.press(chat, message, data[0], sender=sender)
        assert until(lambda press=press: bot.callbacks()[press])["text"] == said
    press = bot.press(ann, message, f"a:{number}:perhaps")
    assert until(lambda: bot.callbacks()[press])["text"].startswith("Say /approve and its number")
    presses = [bot.press(ann, message, data[0]), bot.press(ann, message, data[2])]
    bot.wait(ann, "ran")
    assert until(lambda: bot.callbacks()[presses[0]])["text"] == "✅ allowed once"
    assert until(lambda: bot.callbacks()[presses[1]])["text"] == "Too late: ✅ allowed once."
    row = next(row for row in bot.sent(ann) if row["message_id"] == message)
    until(
        lambda: (
            (row := next(r for r in bot.sent(ann) if r["message_id"] == message))["markup"] is None
            and row["text"].startswith("✅ allowed once by")
        )
    )
    assert count() == 1 and owner


def test_always_is_for_this_command_in_this_session(line, bot, risky):
    one, ann, (words, count) = line(), 60, risky
    bot.say(ann, words)
    message, _, data = asked(bot, ann)
    bot.press(ann, message, data[1], sender=OWNER)
    bot.wait(ann, "ran")
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
    one.close()
    bot.press(80, message, data[0])
    line()
    bot.wait(80, lambda rows: any(row["text"] == "ran" for row in rows))
    assert count() == 1 and len([row for row in bot.sent(80) if row["markup"]]) == 0


def test_a_long_command_is_shown_whole(shared, tmp_path):
    bot, ann = shared.bot, next(USERS)
    bot.say(ann, f"$ rm -rf {tmp_path}/a; echo '``` {'x ' * 2500}end'")
    asked(bot, ann)
    assert sum(row["text"].count("x ") for row in bot.sent(ann)) >= 2499 and "```" in bot.sent(ann)[0]["text"]
    bot.say(ann, "/stop")
    bot.wait(ann, "Stopped")


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
