"""Jobs: when they fire, what becomes of missed times, the configuration's, the commands, the agent's tools."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from fakes import FakeClock, ScriptedModels

import openpista
from openpista import (
    CRON_TOOLS,
    Agent,
    AgentConfig,
    Bench,
    Completion,
    ConfigError,
    CronConfig,
    CronError,
    Decision,
    Event,
    Gate,
    Hub,
    Inbox,
    Job,
    Jobs,
    Message,
    Outlet,
    Redactor,
    Role,
    Scheduler,
    Store,
    StoreError,
    Toolbox,
    ToolCall,
    ToolsConfig,
    Usage,
    iso,
)

ROOT = Path(openpista.__file__).parent
NINE = datetime(2026, 3, 2, 9, tzinfo=UTC)  # a Monday
SEOUL, BERLIN = ZoneInfo("Asia/Seoul"), ZoneInfo("Europe/Berlin")
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class House:
    """A database, a clock, and a scheduler on them; `restart` makes another one."""

    def __init__(self, folder, moment=NINE, zone=UTC):
        self.clock, self.zone, self.woken = FakeClock(moment), zone, []
        self.store = Store(folder / "memory.db", now=self.clock.now)
        self.jobs, self.inbox = Jobs(self.store), Inbox(self.store)
        self.restart()

    def restart(self, zone=None):
        self.zone = zone or self.zone
        self.scheduler = Scheduler(self.store, self.woken.append, zone=self.zone, sleep=self.clock.sleep)

    def add(self, schedule="0 9 * * *", name="backup", once="", **more):
        fields = {"tz": "", "prompt": "back up", "session": "", "channel": "", "reply_to": {}, "catch_up": "once"}
        job = Job(0, name, schedule, **(fields | {"origin": "command", "state": "active", "next_at": None} | more))
        return openpista.add_job(self.jobs, job, self.zone, once)

    def look(self, after=timedelta(0)):
        """Let so much time pass, and look."""
        self.clock.advance(after)
        return self.scheduler.look()

    @property
    def fired(self):
        """The due times that were put into the inbox."""
        rows = self.store.db.execute("SELECT metadata FROM inbox ORDER BY id")
        return [datetime.fromisoformat(json.loads(row[0])["due_at"]) for row in rows]

    def next(self, name="backup"):
        at = self.jobs.find(name).next_at
        return at and datetime.fromisoformat(at)

    def notes(self, name="backup"):
        return [run.note for run in self.jobs.history(name)]


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.store.close()


# Firing


def test_a_due_job_fires_once(house):
    house.add("30 9 * * *")
    assert house.look() == Scheduler.LOOK
    assert house.look(30 * MINUTE - timedelta(seconds=1)) == 1
    assert (house.fired, house.woken) == ([], [])
    house.look(timedelta(seconds=1))
    house.look(timedelta(seconds=1))
    assert house.fired == [NINE + 30 * MINUTE]
    assert house.woken == ["cron-backup"] * 2, "whatever lies in the inbox is taken up"
    assert house.next() == NINE + 30 * MINUTE + DAY
    house.restart()
    house.look()
    assert len(house.fired) == 1


def test_run_sleeps_until_the_next_one(house):
    house.add("*/10 * * * *")
    looks = []

    async def sleep(seconds):
        looks.append(seconds)
        await house.clock.sleep(seconds)

    async def go():
        house.scheduler.sleep = sleep
        running = asyncio.create_task(house.scheduler.run())
        while len(house.fired) < 3:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(go())
    assert house.fired == [NINE + 10 * MINUTE * n for n in (1, 2, 3)]
    assert min(looks) > 0 and max(looks) <= Scheduler.LOOK
    assert len(looks) == pytest.approx(900, abs=60)


def test_a_locked_database_is_waited_for(house, caplog):
    house.add("* * * * *")
    house.store.BUSY = 0
    house.store.db.execute("PRAGMA busy_timeout = 0")

    async def go():
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            with Store(house.store.path) as other, other.atomic():
                running = tasks.create_task(house.scheduler.run())
                house.clock.advance(MINUTE)
                while not caplog.records:
                    await asyncio.sleep(0)
                assert house.fired == []
            while not house.fired:
                await asyncio.sleep(0)
            running.cancel()

    asyncio.run(go())
    assert "locked by another process" in caplog.text


def test_seconds_fire_each(house):
    house.add("*/15 * * * * *")
    house.look(MINUTE)
    for _ in range(9):
        house.look()
    assert house.fired == [NINE + timedelta(seconds=n) for n in (15, 30, 45, 60)]


def test_once_is_once(house):
    house.add("", once="+10m")
    house.look(10 * MINUTE)
    house.look(DAY)
    assert house.fired == [NINE + 10 * MINUTE]
    assert house.jobs.find("backup").state == "done"
    house.add("", "late", once="+1h")
    house.add("", "skipped", once="+1h", catch_up="skip")
    house.look(DAY)
    assert house.fired[1:] == [NINE + DAY + 10 * MINUTE + HOUR], "late, but once"
    assert house.jobs.find("skipped").state == "done" and "missed" in house.notes("skipped")[0]


def test_paused_jobs_rest(house):
    house.add()
    house.jobs.pause("backup")
    house.look(DAY)
    assert house.fired == []


def test_what_is_long_done_makes_room(house):
    house.add("", "old", once="+1m")
    house.look(MINUTE)
    house.add("", "new", once="+29d")
    assert house.jobs.find("old")
    house.look(40 * DAY)
    house.add()
    assert [job.name for job in house.jobs.list()] == ["backup", "new"], "new was done this day"


def test_a_slow_session_does_not_pile_up(house):
    house.add("* * * * *")
    for _ in range(30):
        house.look(MINUTE)
    assert len(house.fired) == openpista.JOB_QUEUE
    assert house.notes()[0] == "left out: the session's queue is full"


def test_jobs_at_each_start(house):
    assert house.add("@reboot", "boot").next_at is None
    house.add("@Reboot", "resting")
    house.jobs.pause("resting")
    for _ in range(2):
        house.restart()
        house.scheduler.run_reboot_jobs()
        house.look(HOUR)
    assert house.fired == [NINE, NINE + HOUR]


# Missed times

MISSED = [  # catch_up, schedule, minutes without a daemon, minutes after nine that fired, the next one
    ("once", "*/10 * * * *", 35, [10], 40),
    ("skip", "*/10 * * * *", 35, [], 40),
    ("all", "*/10 * * * *", 35, [10, 20, 30], 40),
    ("once", "*/10 * * * *", 30.5, [10], 40),
    ("skip", "*/10 * * * *", 30.5, [30], 40),
    ("all", "*/10 * * * *", 30.5, [10, 20, 30], 40),
    ("skip", "*/10 * * * *", 11, [10], 20),  # a minute late is not missed
    ("once", "*/10 * * * *", 9, [], 10),
]


@pytest.mark.parametrize("catch_up, schedule, minutes, fired, following", MISSED)
def test_missed_times(house, catch_up, schedule, minutes, fired, following):
    house.add(schedule, catch_up=catch_up)
    house.look()
    house.clock.advance(MINUTE * minutes)
    house.restart()
    for _ in range(3):
        house.look()
    assert [(moment - NINE) / MINUTE for moment in house.fired] == fired
    assert house.next() == NINE + following * MINUTE


def test_all_is_bounded(house):
    house.add("* * * * *", catch_up="all")
    house.look(DAY)
    assert house.fired == [NINE + MINUTE * n for n in range(1, 101)]
    assert house.notes()[0].startswith("missed")
    assert house.next() == NINE + DAY, "what is not yet missed is fired"
    house.look()
    assert len(house.fired) == 100 and house.next() == NINE + DAY + MINUTE, "but the queue is full"


def test_a_year_without_a_daemon_is_soon_made_up_for(house):
    for catch_up in openpista.CATCH_UPS:
        house.add("* * * * * *", catch_up, catch_up=catch_up)
    started = time.monotonic()
    house.look(365 * DAY)
    assert time.monotonic() - started < 2


# Clocks and zones


def test_a_clock_set_back_by_a_day(house):
    house.add("0 * * * *")
    house.look(HOUR)
    house.look(DAY)  # the clock was wrong
    assert house.next() == NINE + DAY + 2 * HOUR
    house.look(-DAY)
    assert house.next() == NINE + 2 * HOUR
    fired = len(house.fired)
    house.look(HOUR)
    assert len(house.fired) == fired, "eleven was fired when the clock was wrong"
    house.look(HOUR)
    assert len(house.fired) == fired + 1


def test_a_clock_set_back_does_not_fire_again(house):
    house.add("0 * * * *")
    house.look(HOUR)
    for back in (timedelta(seconds=30), 5 * MINUTE):
        house.look(-back)
        house.restart()
        house.look(back)
        assert house.fired == [NINE + HOUR]
        assert house.next() == NINE + 2 * HOUR
    assert len(house.notes()) == 1


def test_the_machine_moves(house):
    house.add("0 12 * * *", "here")
    house.add("0 12 * * *", "there", tz="Europe/Berlin")
    house.look()
    house.restart(SEOUL)
    house.look()
    assert house.next("here") == datetime(2026, 3, 3, 3, tzinfo=UTC)
    assert house.next("there") == datetime(2026, 3, 2, 11, tzinfo=UTC)


def test_daylight_saving(tmp_path):
    house = House(tmp_path, datetime(2026, 3, 28, 12, tzinfo=UTC), BERLIN)
    house.add("30 2 * * *")
    for _ in range(24 * 60):
        house.look(2 * MINUTE)
    assert house.fired == [datetime(2026, 3, 29, 1, tzinfo=UTC), datetime(2026, 3, 30, 0, 30, tzinfo=UTC)]
    house = House(tmp_path, datetime(2026, 10, 24, 12, tzinfo=UTC), BERLIN)
    house.store.db.execute("DELETE FROM inbox")
    house.scheduler.look()
    for _ in range(24 * 30):
        house.look(2 * MINUTE)
    assert house.fired[-1:] == [datetime(2026, 10, 25, 0, 30, tzinfo=UTC)], "the first half past two of two"


def test_a_zone_that_is_gone_pauses_the_job(house, caplog):
    house.add("* * * * *", "other")
    job = house.add("* * * * *")
    house.jobs.change(job, job._replace(tz="Mars/Olympus"))
    house.look(MINUTE)
    assert len(house.fired) == 1, "the other one"
    assert house.jobs.find("backup").state == "paused"
    assert house.notes()[0].startswith("paused: no time zone 'Mars/Olympus'")
    assert "the job backup is paused" in caplog.text


# What a job may be

WRONG = [
    ({"schedule": "0 9 * *"}, "five fields, or six, not 4"),
    ({"schedule": "0 9 30 2 *"}, "no year has such a day"),
    ({"schedule": "2026-03-04T09:00"}, "five fields, or six, not 1"),
    ({"schedule": "61 * * * *"}, "minute: '61' .character 1. is not 0-59"),
    ({"tz": "Asia/Soul"}, "no time zone 'Asia/Soul', did you mean 'Asia/Seoul'"),
    ({"schedule": "@reboot", "tz": "x"}, "no time zone"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"channel": "telegarm:1"}, "no channel 'telegarm:1', did you mean 'telegram'"),
    ({"channel": "telegram"}, "no channel 'telegram'"),
    ({"channel": "telegram:"}, "no channel"),
    ({"name": "a\nb"}, "a job's name must be"),
    ({"name": " a"}, "a job's name must be"),
    ({"name": "a" * 61}, "a job's name must be"),
    ({"session": "\x1b[31m"}, "a job's session must be"),
    ({"once": "2020-01-01T00:00"}, "'2020-01-01T00:00' is past"),
    ({"once": "soon"}, "cannot read the time 'soon'"),
]


@pytest.mark.parametrize("fields, said", WRONG)
def test_what_is_refused(house, fields, said):
    with pytest.raises(CronError, match=said):
        house.add(**fields)
    assert house.jobs.list() == []


def test_names_are_given(house):
    names = [house.add(name="").name for _ in range(3)]
    assert names == ["job-1", "job-2", "job-3"]
    house.jobs.remove("job-2")
    assert house.add(name="").name == "job-2"
    with pytest.raises(StoreError, match="there is a job named"):
        house.add(name="job-1")


# The configuration


def test_tables_of_the_configuration_are_kept_in_step(house):
    house.add(name="mine")
    morning = CronConfig("morning", "0 8 * * *", "Good morning", "Asia/Seoul", "telegram:42")
    house.scheduler.sync_config([morning, CronConfig(schedule="@daily", prompt="tidy up")])
    job = house.jobs.find("morning")
    assert (job.origin, job.session, job.channel, job.catch_up) == ("config", "cron-morning", "telegram:42", "once")
    assert {job.name for job in house.jobs.list()} == {"mine", "morning", "config-2"}
    missed = house.next("morning")
    house.clock.advance(3 * DAY)
    house.restart()
    house.scheduler.sync_config([morning._replace(prompt="Hello")])
    assert house.next("morning") == missed, "nothing is lost of what was missed"
    assert house.jobs.find("morning").prompt == "Hello" and house.jobs.find("config-2") is None
    house.look()
    assert missed in house.fired
    house.jobs.pause("morning")
    house.scheduler.sync_config([morning._replace(schedule="0 7 * * *")])
    job = house.jobs.find("morning")
    assert (job.state, house.next("morning").astimezone(SEOUL).hour) == ("paused", 7)
    house.scheduler.sync_config([])
    assert [job.name for job in house.jobs.list()] == ["mine"]


BAD_TABLES = [
    ([CronConfig("a", "0 9 * * 8", "x")], r"\[\[cron\]\] a: day of week: '8'"),
    ([CronConfig(schedule="", prompt="x")], r"\[\[cron\]\] config-1: a schedule has five fields"),
    ([CronConfig("a", "@daily", "")], r"\[\[cron\]\] a: the prompt is empty"),
    ([CronConfig("a", "@daily", "x")] * 2, "two .* have the name 'a'"),
    ([CronConfig("mine", "@daily", "x")], r"\[\[cron\]\] mine: there is a job of this name"),
    ([CronConfig("a", "@daily", "x", channel="fax:1")], "no channel 'fax:1'"),
]


@pytest.mark.parametrize("tables, said", BAD_TABLES)
def test_a_bad_table_changes_nothing(house, tables, said):
    house.add(name="mine")
    house.scheduler.sync_config([CronConfig("old", "@daily", "x")])
    before = house.jobs.list()
    with pytest.raises(ConfigError, match=said):
        house.scheduler.sync_config(tables)
    assert house.jobs.list() == before


def test_a_job_of_the_configuration_is_removed_there(house):
    house.scheduler.sync_config([CronConfig("old", "@daily", "x")])
    with pytest.raises(ConfigError, match="stands in the configuration; remove its"):
        openpista.remove_job(house.jobs, "old", UTC)


# With a hub, and in two processes


def said(text):
    return Completion(Message(Role.ASSISTANT, text), Usage(), "fake/model")


def hub_of(store, answers, outlets, zone=UTC, **settings):
    """A hub whose agent has the tools on jobs."""
    bench = Bench(ToolsConfig(workdir=str(ROOT)), dict(os.environ), ROOT, Redactor())
    toolbox = Toolbox(bench)
    toolbox.add(openpista.cron_tools(Jobs(store), zone))
    models = ScriptedModels(answers)
    agent = Agent(lambda *_: models, toolbox, store, settings=AgentConfig(), system="")
    return Hub(store, agent, outlets, **settings)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_job_is_answered_in_its_channel_and_the_next_waits(house):
    house.add("* * * * *", channel="telegram:42", reply_to={"thread": 7})
    sent, turns, go_on = [], [], asyncio.Event()

    async def send(delivery):
        sent.append(delivery)

    async def answer(request):
        turns.append(request.messages[-1].text)
        await go_on.wait()
        return said(f"done {len(turns)}")

    async def go():
        hub = hub_of(house.store, answer, {"telegram": Outlet(send)})
        house.scheduler.wake = hub.wake
        async with hub:
            for _ in range(3):
                house.look(MINUTE)
                await asyncio.sleep(0.02)
            assert (turns, hub.inbox.waiting()) == (["back up"], {"cron-backup": 3})
            go_on.set()
            await until(lambda: len(sent) == 3)

    asyncio.run(go())
    assert [(d.channel, d.reply_to, d.text) for d in sent] == [
        ("telegram:42", {"thread": 7}, f"done {n}") for n in (1, 2, 3)
    ]
    assert [run.answer for run in house.jobs.history("backup")] == ["done 3", "done 2", "done 1"]


LOOKER = """
import sys
sys.path.insert(0, sys.argv[1])
from openpista import *
from openpista import Jobs, Scheduler, Store, UTC, Path
clock = datetime(2026, 3, 2, 9, tzinfo=UTC)
with Store(Path(sys.argv[2]), now=lambda: clock) as store:
    scheduler = Scheduler(store, lambda session: None, zone=UTC)
    sys.stdin.readline()
    for _ in range(400):
        clock += timedelta(seconds=5)
        scheduler.look()
"""


def test_two_processes_look_at_once(house):
    for number in range(5):
        house.add("*/20 * * * * *", f"job{number}", catch_up="all", session=f"{number}")
    argv = [sys.executable, "-c", LOOKER, str(ROOT), str(house.store.path)]
    children = [subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[1] for child in children] == ["", ""]
    rows = house.store.db.execute("SELECT j.name, r.due_at, r.inbox_id FROM job_runs r JOIN jobs j ON j.id = job_id")
    runs = rows.fetchall()
    assert len(runs) == len(set(runs)) == 5 * 100, "2,000 seconds are 100 times, and so many are kept"
    taken = [run[2] for run in runs if run[2]]
    assert len(taken) == len(set(taken)) == len(house.fired) == 5 * openpista.JOB_QUEUE


# The tools


def calls(tool, **arguments):
    call = ToolCall(f"c{time.monotonic_ns()}", tool, arguments)
    return Completion(Message(Role.ASSISTANT, "", (call,)), Usage(), "fake/model")


def test_remind_me_every_weekday_at_nine(house):
    asked, sent = [], []

    async def approve(call, danger):
        asked.append((call.name, danger))
        return Decision.ONCE

    async def send(delivery):
        sent.append(delivery)

    words = {"name": "stretch", "schedule": "0 9 * * mon-fri", "tz": "Asia/Seoul", "prompt": "Tell me to stretch."}

    async def go():
        answers = [calls("cron.add", **words), calls("cron.list"), said("I will."), said("Stretch!")]
        hub = hub_of(house.store, answers, {"telegram": Outlet(send, lambda item: approve)})
        house.scheduler.wake = hub.wake
        async with hub:
            event = Event("telegram:42", "1", "main", "remind me every weekday at nine", reply_to={"thread": 7})
            answer = await hub.watch(hub.submit(event).id, lambda progress: None)
            assert answer.text == "I will."
            house.look(DAY - 9 * HOUR)
            await until(lambda: len(sent) == 2)

    asyncio.run(go())
    assert asked == [("cron.add", "has openpista act later by itself")]
    job = house.jobs.find("stretch")
    assert (job.session, job.channel, job.reply_to, job.origin) == ("main", "telegram:42", {"thread": 7}, "agent")
    assert [(d.channel, d.reply_to, d.text) for d in sent][1:] == [("telegram:42", {"thread": 7}, "Stretch!")]
    results = [entry.message for entry in house.store.transcript(house.store.session("main")) if entry.message.call_id]
    assert results[0].text == "job stretch, next: Tue 2026-03-03 09:00 KST"
    assert results[1].text.startswith("stretch: 0 9 * * mon-fri Asia/Seoul (next: Tue 2026-03-03 09:00 KST): Tell me")


ASKED = Event("telegram:1", "1", "main", "")


def use(house, tool, event=ASKED, mode="never", **arguments):
    """What a call gives in the turn that answers an event."""
    toolbox = Toolbox(Bench(ToolsConfig(), {}, ROOT, Redactor()))
    toolbox.add(openpista.cron_tools(house.jobs, UTC))

    async def go():
        openpista.ASKED_IN.set(event)
        call = ToolCall("c", tool, arguments)
        refusal = await toolbox.refusal(call, Gate(mode, None))
        return refusal or (await toolbox.run(call)).output

    return asyncio.run(go())


def test_the_tools_say_what_is_wrong(house):
    assert use(house, "cron.list") == "no jobs"
    assert "give either" in use(house, "cron.add", prompt="x")
    assert "give either" in use(house, "cron.add", prompt="x", schedule="@daily", once="+1h")
    assert "minute: '99'" in use(house, "cron.add", prompt="x", schedule="99 * * * *")
    assert "no conversation" in use(house, "cron.add", None, prompt="x", once="+1h")
    assert use(house, "cron.add", prompt="x", once="+1h", tz=None) == "job job-1, next: Mon 2026-03-02 10:00 UTC"
    assert "there is a job named" in use(house, "cron.add", prompt="x", once="+1h", name="job-1")
    assert "did you mean 'job-1'" in use(house, "cron.remove", name="job1")
    assert use(house, "cron.remove", name="job-1") == "removed job-1"
    assert use(house, "cron.list") == "no jobs"


def test_who_is_asked_about_jobs(house):
    assert use(house, "cron.add", mode="risky", prompt="x", once="+1h").startswith("denied: has openpista act later")
    assert use(house, "cron.remove", mode="risky", name="x").startswith("denied: ends a job")
    assert use(house, "cron.list", mode="risky") == "no jobs"
    assert house.jobs.list() == []


@pytest.mark.parametrize("format", openpista.FORMATS)
def test_a_first_request_with_these_tools_is_small(house, format):
    toolbox = Toolbox(Bench(ToolsConfig(), {}, ROOT, Redactor(), (None,)))
    assert not set(CRON_TOOLS) & set(toolbox.tools), "only where a scheduler runs"
    toolbox.add(openpista.cron_tools(house.jobs, UTC))
    assert set(CRON_TOOLS) < {spec.name for spec in toolbox.specs}
    assert len(set(openpista.wire_names(toolbox.specs).values())) == len(toolbox.specs)
    where = openpista.describe_machine(Path("/home/somebody"), {"USER": "somebody"})
    system = openpista.build_prompt("", (), where, "2026-03-01")
    assert len(system.encode()) + len(openpista.to_json(toolbox.specs).encode()) < 1_500 * 3
    request = openpista.Request(system, (Message(Role.USER, "Hi"),), toolbox.specs, model="a-model")
    assert len(json.dumps(openpista.FORMATS[format].encode(request)).encode()) < 4_000


# The commands


@pytest.fixture
def cron(openpista, environ):
    """cron("list", "--json") -> CompletedProcess, in a machine in Seoul."""
    return lambda *words: openpista("cron", *words, env={"TZ": "Asia/Seoul"})


def test_a_job_from_the_command_line(cron, home):
    assert "there is no channel 'quic:laptop'" in cron("add", "0 9 * * *", "hi", "--channel", "quic:laptop").stderr
    done = cron("add", "0 9 * * mon-fri", "Good morning", "--name", "morning", "--channel", "telegram:42")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("added morning, next: ") and done.stdout.endswith(" 09:00 KST\n")
    done = cron("add", "--tz", "Europe/Berlin", "0 9 1 1 *", "--catch-up", "all", "Happy new year", "--session", "s")
    assert done.stdout.startswith("added job-1, next: ") and done.stdout.endswith("-01-01 09:00 CET\n")
    assert cron("add", "--once", "+2h", "Take the cake out").stdout.startswith("added job-2, next: ")
    jobs = {job["name"]: job for job in json.loads(cron("list", "--json").stdout)}
    assert jobs["job-1"] | {"id": 0, "next_at": ""} == {
        "id": 0,
        "name": "job-1",
        "schedule": "0 9 1 1 *",
        "tz": "Europe/Berlin",
        "prompt": "Happy new year",
        "session": "s",
        "channel": "",
        "reply_to": {},
        "catch_up": "all",
        "origin": "command",
        "state": "active",
        "next_at": "",
        "last": None,
    }
    assert jobs["morning"]["session"] == "cron-morning"
    assert cron("history", "morning").stdout == "morning has not run yet\n"
    assert cron("run", "morning").returncode == 0
    lines = cron("list").stdout.splitlines()
    assert lines[0].split() == ["JOB", "SCHEDULE", "NEXT", "LAST", "PROMPT"] and len(lines) == 4
    assert any("once" in line and "cake" in line for line in lines)
    assert any("waiting" in line and "09:00 KST" in line for line in lines)
    with Store(home / "memory.db") as store:
        assert Inbox(store).get(1).event[:1] == ("telegram:42",)
        Inbox(store).finish(1, "done")
        openpista.Outbox(store).add("telegram:42", {}, ["Good morning to you"], {}, 1)
    assert "Good morning to you" in cron("history", "morning").stdout
    assert json.loads(cron("history", "morning", "--json").stdout)[0]["state"] == "done"


def test_jobs_are_paused_resumed_and_removed_by_name(cron):
    assert cron("list").stdout == "no jobs\n"
    assert json.loads(cron("list", "--json").stdout) == []
    cron("add", "@hourly", "한국어 알림", "--name", "아침 알림")
    cron("add", "@reboot", "hello", "--name", "boot")
    assert cron("pause", "아침 알림").stdout == "paused 아침 알림\n"
    assert "paused" in cron("list").stdout and "at each start" in cron("list").stdout
    done = cron("pause", "아침 알림")
    assert (done.returncode, done.stderr) == (1, "openpista: 아침 알림 is paused, not active\n")
    assert cron("resume", "아침 알림").stdout.startswith("resumed 아침 알림, next: ")
    assert cron("resume", "아침 알림").returncode == 1
    cron("pause", "boot")
    assert cron("resume", "boot").stdout == "resumed boot, next: at each start\n"
    assert cron("remove", "boot").stdout == "removed boot\n"
    for word in ("remove", "pause", "resume", "run", "history"):
        done = cron(word, "boot")
        assert (done.returncode, done.stderr) == (
            1,
            "openpista: no job named 'boot'; see `openpista cron list`\n",
        )


def test_a_moment_that_passed_is_not_resumed(cron, home):
    cron("add", "--once", "+1h", "x")
    cron("pause", "job-1")
    with Store(home / "memory.db") as store:
        store.db.execute("UPDATE jobs SET schedule = '2020-01-01T00:00:00.000Z'")
    done = cron("resume", "job-1")
    assert done.returncode == 1 and "the time of job-1 is past; openpista cron remove job-1" in done.stderr


REFUSED = [
    (["add", "x"], "needs either SCHEDULE or --once"),
    (["add", "@daily", "x", "--once", "+1h"], "needs either SCHEDULE or --once"),
    (["add"], "required: PROMPT"),
    (["add", "0 9 30 2 *", "x"], "no year has such a day"),
    (["add", "@dayly", "x"], "did you mean '@daily'"),
    (["add", "@daily", ""], "the prompt is empty"),
    (["add", "@daily", "x", "--catch-up", "never"], "invalid choice"),
    (["add", "--once", "yesterday", "x"], "cannot read the time"),
    (["add", "@daily", "x", "y"], "unrecognized arguments: y"),
    (["run"], "required: NAME"),
]


@pytest.mark.parametrize("words, wrong", REFUSED)
def test_a_command_that_makes_no_sense(cron, home, words, wrong):
    done = cron(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and wrong in done.stderr


def test_a_running_scheduler_sees_what_commands_do(cron, home):
    """Another process adds a job, and it fires within seconds."""

    async def go():
        with Store(home / "memory.db") as store:
            running = asyncio.create_task(Scheduler(store, lambda session: None, zone=UTC).run())
            await asyncio.to_thread(cron, "add", "--once", "+1s", "x")
            await until(lambda: Inbox(store).waiting() == {"cron-job-1": 1})
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    asyncio.run(go())


def test_too_much_waits(cron, home):
    cron("add", "@daily", "x")
    with Store(home / "memory.db") as store:
        for number in range(openpista.JOB_QUEUE):
            Jobs(store).run(Jobs(store).get("job-1"), iso(NINE + number * MINUTE), openpista.JOB_QUEUE)
    done = cron("run", "job-1")
    assert done.returncode == 1 and "too much waits in the session 'cron-job-1'" in done.stderr
