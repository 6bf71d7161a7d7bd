"""Tortures a real daemon, and counts what is lost, doubled or missing.

    python tests/torture.py kill [--kills N] [--short] [--seed N] [--archive PATH]
    python tests/torture.py telegram [--seconds N] [--short] [--seed N] [--archive PATH]
    python tests/torture.py gateway [--seconds N] [--streams N] [--short] [--seed N] [--archive PATH]

kill       messages come over QUIC and from a job every second while the daemon is killed with -9, at random moments
           and at each named point of its journal, and started again at once. Each message's command writes its id
           into a file.
telegram   the same with people who write to the bot, press its buttons and send commands, and with a Bot API that
           breaks off, is silent, refuses, or does what it is told and does not say so.
gateway    junk, floods, damaged datagrams, half-open connections, slow readers, streams without end and bad frames
           come while an honest client asks.

It exits with 1 if anything was lost, doubled or missing; if the honest client was not answered, or the daemon's memory
grew by more than 40 MB. Nothing listens but on 127.0.0.1.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fakes import BotServer, ModelServer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import openpista as o  # noqa: E402

MODEL = {"shell": o.NOT_BEGUN, "default": True, "times": -1}  # it runs what it is told, and says what came of it
PATIENCE = 60.0  # seconds at the end until all is answered


# ===== 1. The daemon ==========================================================
#
# It is started through a prelude that can end it at a point of its journal: there,
# and not in the product, stand the points.

PRELUDE = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
wanted, _, left = sys.argv.pop(1).partition(":")
left = int(left or 1)
import openpista as o


def reach(point):
    global left
    left -= point == wanted
    if point == wanted and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def mortal(owner, method, name=None):
    plain, name = getattr(owner, method), name or (lambda *_: f"{owner.__name__}.{method}")

    def run(*args, **more):
        reach("before " + name(*args))
        result = plain(*args, **more)
        reach("after " + name(*args))
        return result

    setattr(owner, method, run)


if wanted:
    for place in POINTS:
        owner, _, method = place.partition(".")
        mortal(getattr(o, owner), method)
    mortal(o.Store, "append", lambda store, session, message: f"Store.append {message.role.value}")
sys.exit(o.main())
"""

PLACES = """Hub.submit Hub.open Hub._begin Hub._end Hub._announce Inbox.add Inbox.attempt Inbox.begin Inbox.finish
    Store.take_lease Store.add_usage Store.start_call Store.finish_call Child.__init__ Outbox.add Outbox.collected
    Jobs.fire Jobs.note Tickets.add Tickets.pop Listener.put Stream.finish""".split()
APPENDS = ["Store.append user", "Store.append assistant", "Store.append tool"]
CHAT_PLACES = """Telegram._take Chats.advance Chats.turn_to Inbox.show Outbox.start Outbox.sent
    Outbox.later Approvals.ask Approvals.show Approvals.decide Approvals.use Hub.halt""".split()


def points_of(places: Iterable[str]) -> list[str]:
    """Before and after each of them."""
    return [f"{when} {place}" for place in places for when in ("before", "after")]


POINTS = points_of(PLACES + APPENDS)


def free_port() -> int:
    """A UDP port that nobody uses now, nor will get: the system gives clients higher ones."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
            found.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("there is no free UDP port")


class House(contextlib.ExitStack):
    """A fresh home with its devices, a scripted model, and the daemon that runs there."""

    CONFIG = """
        [agent]
        provider = "openai"
        model = "fake-model"
        format = "chat"
        [gateway]
        host = "127.0.0.1"
        port = {port}
        grace = 20
        [tools]
        approval = "{approval}"
        workdir = "{work}"
        {more}
        """

    def __init__(self, archive: Path | None, devices: Iterable[str], more: str = "", approval: str = "never"):
        super().__init__()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="openpista-torture-")))
        self.home, self.work, self.log = self.folder / "home", self.folder / "work", self.folder / "log"
        self.model, self.port = self.enter_context(ModelServer(MODEL)), free_port()
        self.work.mkdir()
        self.home.mkdir(mode=0o700)
        (self.home / "config.toml").write_text(
            self.CONFIG.format(port=self.port, work=self.work, more=more, approval=approval)
        )
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
        self.env = kept | {"HOME": str(self.folder), "OPENPISTA_HOME": str(self.home)}
        self.env |= {"XDG_CACHE_HOME": str(self.folder), "OPENAI_API_KEY": "test-key-123456"}
        self.env["OPENAI_BASE_URL"] = self.model.url
        self.archive, self.packages = archive, str(ROOT)
        if archive:
            subprocess.run([sys.executable, archive, "skills", "list"], env=self.env, check=True, capture_output=True)
            self.packages = str(next(self.folder.glob("openpista/*/openpista.py")).parent)
        self.tokens = {name: o.new_token() for name in devices}
        with self.store() as store:
            for name, token in self.tokens.items():
                o.Devices(store).add(name, o.hash_token(token))
        self.fingerprint = o.load_certificate(o.make_certificate(self.home)).fingerprint
        self.process: subprocess.Popen | None = None
        self.callback(self.end)

    def store(self) -> o.Store:
        """The daemon's database."""
        return o.Store(self.home / "memory.db")

    def start(self, point: str = "") -> None:
        """Begin a life of the daemon, which may end at a point."""
        argv = [sys.executable, "-c", PRELUDE.replace("POINTS", repr(PLACES + CHAT_PLACES)), self.packages, point]
        if self.archive and not point:
            argv = [sys.executable, str(self.archive)]
        with self.log.open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen([*argv, "start"], env=self.env, cwd=self.work, **streams)

    def end(self, number: int = signal.SIGKILL, seconds: float = 30.0) -> int | None:
        """End the daemon; its exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def client(self, cls: type = o.QuicClient, **more: Any) -> o.QuicClient:
        """A connection to the daemon, to be opened."""
        return cls("127.0.0.1", self.port, **{"fingerprint": self.fingerprint, "time_limit": 2.0} | more)

    async def ready(self) -> float:
        """Wait until it answers; the seconds."""
        started, ping = time.monotonic(), {"type": "ping", "token": next(iter(self.tokens.values()))}
        while True:
            with contextlib.suppress(o.GatewayError):
                async with self.client(time_limit=0.5) as client:
                    o.checked(await client.open_stream(ping, True).receive())
                return time.monotonic() - started
            if self.process.poll() is not None or time.monotonic() - started > PATIENCE:
                raise RuntimeError(f"the daemon is not there: {self.words()[-2000:]}")
            await asyncio.sleep(0.02)

    def memory(self) -> float:
        """MB of memory that the daemon has now."""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{self.process.pid}/statm").read_text().split()
            return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
        return int(done.stdout or 0) * 1024 / 1e6

    def words(self) -> str:
        """What its lives have said."""
        return self.log.read_text(errors="replace")


def print_table(rows: Iterable[Iterable[Any]]) -> None:
    """Print rows, the first one their heads."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = map(str.rjust, row, widths)
        print("  ".join([first.strip().ljust(widths[0]), *rest]), flush=True)


# ===== 2. kill ================================================================


class Mail:
    """What was said to the daemon, and what it has answered."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}  # id -> device
        self.accepted: set[str] = set()
        self.answers: dict[str, set[tuple[str, bool]]] = collections.defaultdict(set)  # id -> text, is_error
        self.refused: list[str] = []


class Sender:
    """A device that sends messages until each is answered, and is unkind: it goes away, and asks twice."""

    SIDE_BY_SIDE, SESSIONS = 2, ("one", "two", "three")

    def __init__(self, house: House, name: str, mail: Mail, dice: random.Random):
        self.house, self.name, self.mail, self.dice = house, name, mail, dice
        self.numbers, self.closing = itertools.count(1), asyncio.Event()
        self._ticket: Any = None
        self._client: o.QuicClient | None = None
        self._pulse: asyncio.Task | None = None
        self._connecting = asyncio.Lock()

    async def run(self) -> None:
        """Send until it is closed, then wait for the last answers."""
        try:
            await asyncio.gather(*(self._talk() for _ in range(self.SIDE_BY_SIDE)))
        finally:
            await self._leave()

    async def _talk(self) -> None:
        while not self.closing.is_set():
            identity, session = f"{self.name}-{next(self.numbers)}", self.dice.choice(self.SESSIONS)
            self.mail.sent[identity] = self.name
            asks = [self._ask(identity, session) for _ in range(1 + (self.dice.random() < 0.15))]
            await asyncio.gather(*asks)
            if self.dice.random() < 0.2:
                await self._ask(identity, session)
            await asyncio.sleep(self.dice.uniform(0, 0.2))

    async def _ask(self, identity: str, session: str) -> None:
        """Send a message again and again until its answer is there."""
        text = f"{identity}, please:\necho {identity} >>effects; sleep 0.02; echo done {identity}"
        frame = {"type": "message", "id": identity, "session_id": session, "user_message": text}
        while True:
            with contextlib.suppress(o.GatewayError):
                client = await self._connected()
                stream = client.open_stream(frame | {"token": self.house.tokens[self.name]}, last=True)
                if await self._follow(stream, identity, client):
                    return
            await asyncio.sleep(self.dice.uniform(0.01, 0.15))

    async def _follow(self, stream: o.Stream, identity: str, client: o.QuicClient) -> bool:
        """Hear what becomes of a message; whether that is its end."""
        while frame := await stream.receive():
            if frame["type"] == "accepted":
                self.mail.accepted.add(identity)
                if self.dice.random() < 0.1:
                    client.close()  # the others on this connection have to come again too
            elif frame["type"] == "reply":
                self.mail.answers[identity].add((frame["content"], frame["is_error"]))
                return True
            elif frame["type"] == "error" and frame["code"] not in ("busy", "shutting_down", "unavailable"):
                self.mail.refused.append(f"{identity}: {frame}")
                return True
        return False

    async def _connected(self) -> o.QuicClient:
        """The connection, made anew if it has ended; with a ticket, if there is one, so with early data."""
        async with self._connecting:
            if self._client is None or self._client.problem:
                await self._leave()
                ticket, self._ticket = self._ticket, None
                client = self.house.client(ticket=ticket, on_ticket=self._keep)
                await client.__aenter__()
                self._client, self._pulse = client, asyncio.create_task(self._beat(client))
            return self._client

    def _keep(self, ticket: Any) -> None:
        self._ticket = ticket

    async def _beat(self, client: o.QuicClient) -> None:
        """Notice soon that the daemon was killed."""
        with contextlib.suppress(o.GatewayError):
            while True:
                await asyncio.sleep(0.25)
                await client.ping(0.75)

    async def _leave(self) -> None:
        client, self._client = self._client, None
        if client:
            self._pulse.cancel()
            await client.__aexit__()


class Audit:
    """Looks into the database, into the file of effects and into what the senders heard; what it finds wrong."""

    SQL = """
        SELECT i.id, i.channel, i.identity, i.state, (SELECT count(*) FROM outbox WHERE inbox_id = i.id AND piece = 0),
               (SELECT text FROM outbox WHERE inbox_id = i.id ORDER BY id LIMIT 1),
               (SELECT group_concat(arguments, char(10)) FROM tool_calls c
                 WHERE c.session_id = m.session_id AND c.message_id > m.id AND c.message_id < coalesce(
                       (SELECT min(id) FROM messages WHERE session_id = m.session_id AND role = 'user' AND id > m.id),
                       9e18)),
               (SELECT count(*) FROM messages WHERE session_id = m.session_id AND role = 'user' AND text = i.text)
          FROM inbox i LEFT JOIN messages m ON m.id = i.message_id ORDER BY i.id"""

    def __init__(self, house: House, mail: Any, left_out: set[str]):
        self.house, self.mail, self.left_out = house, mail, left_out
        self.found: dict[str, list[str]] = {"lost": [], "doubled": [], "missing": [], "unknown": []}
        self.jobs: list[str] = []  # when each was due
        path = house.work / "effects"
        self.effects = Counter(path.read_text().split() if path.exists() else [])
        with house.store() as store:
            self.rows = store.db.execute(self.SQL).fetchall()
        self._check()
        for mark in self.effects:
            self._note("doubled", f"{mark} ran, and nobody wanted that")

    def _check(self) -> None:
        for row in self.rows:
            self._check_row(*row)
        self._check_mail({row[2]: row[5] for row in self.rows})
        self._check_jobs()

    def _note(self, what: str, text: str) -> None:
        self.found[what].append(text)

    def _check_row(
        self, number: int, channel: str, name: str, state: str, count: int, text: str, calls: str, said: int
    ) -> None:
        """One answer, and one effect or a word that this is not known."""
        marks = set(re.findall(r"echo (\S+) >>effects", calls or ""))
        ran = sum(self.effects.pop(mark, 0) for mark in marks)
        unknown = o.UNKNOWN[:40] in (text or "")
        if channel == "job":
            self.jobs.append(name.partition(":")[2].partition(":")[2])
        elif said > 1:
            self._note("doubled", f"{name} stands {said} times in the transcript")
        if unknown:
            self._note("unknown", f"{name}: its command ran {ran} times")
        if count > 1 or ran > 1:
            self._note("doubled", f"{name}: {count} answers, its command ran {ran} times")
        if not count or (not ran and not unknown) or state != "done":
            self._note("missing", f"{name}: {state}, {count} answers, its command ran {ran} times: {text!r:.200}")

    def _check_mail(self, kept: dict[str, str]) -> None:
        for name in self.mail.sent:
            answers = self.mail.answers.get(name, set())
            if name not in kept and (answers or name in self.mail.accepted):
                self._note("lost", f"{name} was accepted and is not there")
            elif len(answers) != 1:
                self._note("doubled" if answers else "missing", f"{name} was answered with {answers}")
            elif {(kept[name], False)} != answers:
                self._note("doubled", f"{name} was answered with {answers}, and kept is {kept[name]!r}")
        for text in self.mail.refused:
            self._note("missing", text)

    def _check_jobs(self) -> None:
        """The job was fired for each second, but for those that its history says were left out."""
        due = [o.datetime.fromisoformat(text) for text in sorted(self.jobs)]
        for before, after in itertools.pairwise(due):
            while (before := before + o.timedelta(seconds=1)) < after:
                if o.iso(before) not in self.left_out:
                    self._note("lost", f"the job was not fired at {before}")
        for text, count in Counter(self.jobs).items():
            if count > 1:
                self._note("doubled", f"the job was fired {count} times for {text}")


class Killer:
    """Kills the daemon again and again, and starts it again."""

    DEVICES, POINTS = ("anna", "berta", "carl"), POINTS
    JOB = """
        [[cron]]
        name = "tick"
        schedule = "* * * * * *"
        prompt = "each second:\\necho job-{call} >>effects; echo done"
        """

    def __init__(self, house: House, dice: random.Random, kills: int, seconds: float):
        self.house, self.dice, self.kills, self.seconds = house, dice, kills, seconds
        self.mail, self.left_out, self.reached, self.fell = Mail(), set(), Counter(), []
        self.killed, self.life, self.lives, self.moments = 0, 1.0, (1,), []

    async def run(self) -> Audit:
        """The whole torture."""
        self.house.start()
        self.life = await self.house.ready() + 1.5
        senders = self.senders()
        work = asyncio.gather(*(sender.run() for sender in senders))
        points = itertools.cycle(self.dice.sample(self.POINTS, len(self.POINTS)))
        end = time.monotonic() + self.seconds
        await self._kill_soon()
        while self.killed < self.kills and time.monotonic() < end:
            if self.killed % 2:
                await self._kill_at(next(points))
            else:
                self.house.start()
                await self._kill_soon()
        self.house.start()
        await self.house.ready()
        for sender in senders:
            sender.closing.set()
        await self._finish(work)
        return self.audit()

    def senders(self) -> list[Any]:
        """Who talks to it: each has run(), and closing, which ends that."""
        return [Sender(self.house, name, self.mail, self.dice) for name in self.DEVICES]

    def audit(self) -> Audit:
        """What was wrong."""
        return Audit(self.house, self.mail, self.left_out)

    async def _kill_soon(self) -> None:
        await asyncio.sleep(self.dice.uniform(0.0, self.life) * self.dice.choice(self.lives))
        self._count("a random moment", self.house.end())

    async def _kill_at(self, point: str) -> None:
        """A life that ends at the named point, or somewhere if it is not reached."""
        self.house.start(f"{point}:{self.dice.choice((1, 1, 2, 3))}")
        end = time.monotonic() + self.life + 1.0
        while self.house.process.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.005)
        late = self.house.process.poll() is None
        self._count("a random moment" if late else point, self.house.end())

    def _count(self, where: str, code: int) -> None:
        self.killed += 1
        self.moments.append(time.monotonic())
        self.reached[where] += 1
        if code != -signal.SIGKILL:
            self.fell.append(f"the daemon ended by itself with {code}")
        with self.house.store() as store:
            rows = store.db.execute("SELECT due_at FROM job_runs WHERE inbox_id IS NULL")
            self.left_out |= {due for (due,) in rows}

    async def _finish(self, work: asyncio.Future) -> None:
        """Wait until all is answered, and end the daemon kindly."""
        with self.house.store() as store:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.rest(store, work)
            except TimeoutError:
                self.fell.append(f"not all was answered in {PATIENCE:g} s")
        if code := self.house.end(signal.SIGTERM):
            self.fell.append(f"the daemon ended with {code} when it was told to end")
        self.fell += [
            f"a traceback: {line}" for line in re.findall(r"^Traceback.*\n(?:[ ].*\n)*(.*)", self.house.words(), re.M)
        ]

    async def rest(self, store: o.Store, work: asyncio.Future) -> None:
        """Until nothing is left to do."""
        o.Jobs(store).pause("tick")
        await work
        while o.Inbox(store).waiting():
            await asyncio.sleep(0.05)


def report(killer: Killer, audit: Audit, seed: int, started: float, more: str) -> int:
    """Print what came of it; the exit code."""
    counts = {what: len(names) for what, names in audit.found.items()}
    named = killer.killed - killer.reached["a random moment"]
    points = f"{len(killer.reached) - 1} of {len(killer.POINTS)}"
    heads = ("kills", "at named points", "points", "messages", "jobs fired", *counts)
    print_table([heads, (killer.killed, named, points, len(killer.mail.sent), len(audit.jobs), *counts.values())])
    bad = [f"{what}: {text}" for what, texts in audit.found.items() if what not in ALLOWED for text in texts]
    for text in [*killer.fell, *bad][:20]:
        print(f"  {text}")
    print(f"seed {seed}, {time.monotonic() - started:.0f} s; {more}")
    return 1 if bad or killer.fell else 0


ALLOWED = ("unknown", "repeated", "left over")  # what is only counted


def torture_by_kills(options: argparse.Namespace) -> int:
    """The command kill."""
    started, dice = time.monotonic(), random.Random(options.seed)
    with House(options.archive, Killer.DEVICES, Killer.JOB) as house:
        killer = Killer(house, dice, options.kills, 6.0 if options.short else math.inf)
        audit = asyncio.run(killer.run())
    return report(killer, audit, options.seed, started, f"left out of a full queue: {len(killer.left_out)}")


# ===== 3. telegram ============================================================
#
# Where an attempt may have arrived or not, the answer may come twice, with a remark;
# and of a progress message whose number was not learned nobody can know. All else
# stands in the chats once, and nothing stands there besides.


class Word(NamedTuple):
    """What a person wrote."""

    chat: int
    time: float
    text: str
    asks: bool = False  # its command needs a yes, and leaves an effect


class Chatting:
    """What was written to the bot."""

    def __init__(self) -> None:
        self.sent: dict[str, Word] = {}  # number of the update -> a message
        self.commands: list[Word] = []


class Person:
    """Writes to the bot, answers its questions twice or not at all, and sends commands at bad moments."""

    def __init__(self, killer: "ChatKiller", chat: int):
        self.house, self.bot, self.dice = killer.house, killer.bot, killer.dice
        self.chat, self.chatting = chat, killer.mail
        self.most, self.slow = (1, 2.7) if killer.short else (2, 4.0)  # messages that wait, seconds of a command
        self.closing, self.numbers, self.decided = asyncio.Event(), itertools.count(1), set()
        self.user = chat if chat > 0 else 1
        self.name = "@openpista_test_bot " if chat < 0 else ""

    async def run(self) -> None:
        """Write until it is closed, then wait for the last answers."""
        with self.house.store() as store:
            while not self.closing.is_set() or self._open(store):
                if not self.closing.is_set():
                    await self._write(store)
                await self._decide(store)
                await asyncio.sleep(self.dice.uniform(0.1, 0.4))

    def _open(self, store: o.Store) -> int:
        """How many messages have no answer."""
        sql = """SELECT count(*) FROM inbox WHERE channel = ? AND state NOT IN ('waiting', 'running') AND id NOT IN
                 (SELECT inbox_id FROM outbox WHERE state IN ('waiting', 'sending') AND inbox_id IS NOT NULL)"""
        done = store.db.execute(sql, (f"telegram:{self.chat}",)).fetchone()[0]
        return sum(word.chat == self.chat for word in self.chatting.sent.values()) - done

    async def _do(self, work: Callable[..., Any], *words: Any, **more: Any) -> Any:
        return await asyncio.to_thread(work, self.chat, *words, sender=self.user, **more)

    async def _write(self, store: o.Store) -> None:
        if self.dice.random() < 0.05:
            await self._command(self.dice.choice(("/new", "/stop", "/stop", "/usage")))
        if self._open(store) >= self.most or self.dice.random() < (0.5 if self.chat > 0 else 0.9):
            return
        identity, chance = f"c{abs(self.chat)}-{next(self.numbers)}", self.dice.random()
        line = (
            f"echo {identity} >>effects; sleep 0.02"
            if chance < 0.4
            else f"sleep {self.dice.choice((0, 0, 0.3, self.slow))}"
        )
        line = f"seq 1 1500; {line}" if chance > 0.95 else line
        text = f"{self.name}{identity}, please:\n{line}; echo done {identity}"
        told = await self._do(self.bot.say, text)
        self.chatting.sent[str(told["update_id"])] = Word(self.chat, told["time"], text, chance < 0.4)

    async def _command(self, text: str) -> None:
        told = await self._do(self.bot.say, text)
        self.chatting.commands.append(Word(self.chat, told["time"], text))

    async def _decide(self, store: o.Store) -> None:
        """Answer what the bot asks, as its messages show it."""
        for question in o.Approvals(store).waiting(f"telegram:{self.chat}"):
            if not question.shown or question.id in self.decided or self.dice.random() < 0.6:
                continue
            self.decided.add(question.id)
            word = "deny" if self.dice.random() < 0.15 else "once"
            if self.dice.random() < 0.15:
                await self._command(f"/approve {question.id} {word}")
                continue
            for _ in range(1 + (self.dice.random() < 0.2)):
                await self._do(self.bot.press, int(question.shown), f"a:{question.id}:{word}")


class ChatAudit(Audit):
    """Looks also into what stands in the chats."""

    DOUBT = "\n\n_(It is not certain that this was delivered before.)_"
    LATE = 1.5  # seconds that a slow call may come after the answer; who goes on typing does so every four
    SLACK = 1.0  # seconds between a message that arrives and a kill before its number is noted
    OUTBOX = """SELECT id, channel, text, metadata, in_doubt, state, sent_at, inbox_id FROM outbox ORDER BY id"""

    def __init__(self, house: House, chatting: Chatting, bot: BotServer, kills: list[float]):
        self.bot, self.kills, self.posts = bot, kills, [post for post in bot.sent() if not post["deleted"]]
        with house.store() as store:
            self.outbox = store.db.execute(self.OUTBOX).fetchall()
            sql = "SELECT inbox_id, state, shown FROM approvals"
            self.questions = store.db.execute(sql).fetchall()
            self.cursor = store.db.execute("SELECT max(position) FROM cursors").fetchone()[0]
        # When messages arrived of which the bot did not hear.
        calls = [call for call in bot.calls("sendMessage") if call["fault"] in ("lost", "junk")]
        self.unheard = [(call["time"] - 0.05, call["answered"] + 0.05) for call in calls]
        super().__init__(house, chatting, set())

    def _check(self) -> None:
        self.found |= {"repeated": [], "left over": [], "typing": []}
        self.refused = {number for number, state, _ in self.questions if state not in ("once", "always")}
        kept = {row[2].rpartition(":")[2]: row for row in self.rows}
        for number, word in self.mail.sent.items():
            if number not in kept:
                self._note("lost", f"{word.text!r}")
        for name, row in kept.items():
            self._check_answer(row, self.mail.sent.get(name))
        self._check_commands()
        self._check_posts()
        self._check_typing(kept)
        self._check_offsets()

    def _check_answer(self, row: tuple, word: Word | None) -> None:
        """One answer; one effect, unless it was stopped, refused, or is not known."""
        number, _, name, state, count, text, calls, said = row
        marks = set(re.findall(r"echo (\S+) >>effects", calls or ""))
        ran = sum(self.effects.pop(mark, 0) for mark in marks)
        unknown = o.UNKNOWN[:40] in (text or "")
        if unknown:
            self._note("unknown", f"{name}: its command ran {ran} times")
        if word is None or said > 1 or count > 1 or ran > 1:
            self._note("doubled", f"{name}: {said} times said, {count} answers, its command ran {ran} times: {word}")
        excused = unknown or state == "stopped" or number in self.refused or not (word and word.asks)
        if state not in ("done", "stopped") or not count or (not ran and not excused):
            self._note("missing", f"{name}: {state}, {count} answers, its command ran {ran} times: {text!r:.200}")
        if ran and {question[1] for question in self.questions if question[0] == number} <= {"deny", "expired"}:
            self._note("doubled", f"{name} ran, and was refused")

    def _check_commands(self) -> None:
        """Each was done once."""
        said = Counter(word.text.partition(" ")[0] for word in self.mail.commands)
        told = Counter(text.partition(" ")[0] for _, _, text, _, _, _, _, inbox in self.outbox if inbox is None)
        new, usage = told["A"], told["this"]
        for name, count in (("/new", new), ("/usage", usage)):
            if count != said[name]:
                self._note("doubled" if count > said[name] else "lost", f"{name}: {said[name]} said, {count} answered")
        stopped = told["Nothing"] + sum(row[3] == "stopped" for row in self.rows)
        if stopped > said["/stop"]:
            self._note("doubled", f"/stop: {said['/stop']} said, {stopped} done")

    # ---- what stands in the chats ----

    def _check_posts(self) -> None:
        """Each text of the outbox stands in its chat once, and nothing besides."""
        want, doubtful = Counter(), Counter()
        channels = {row[0]: row[1] for row in self.rows}
        shown = {(channels[inbox], message) for inbox, _, message in self.questions}
        for number, channel, text, metadata, in_doubt, state, _, _ in self.outbox:
            known = json.loads(metadata)
            if state != "sent":
                self._note("missing", f"outbox {number} is {state}: {text!r:.200}")
            if "decided" in known:
                continue
            key = channel, o.telegram_html(f"⚠️ {text}" if known.get("is_error") else text)
            want[key] += "asks" not in known
            doubtful[key] += in_doubt
        self._compare(want, doubtful, shown)

    def _compare(self, want: Counter, doubtful: Counter, shown: set[tuple[str, str]]) -> None:
        remark = o.telegram_html(self.DOUBT).strip()
        for post in self.posts:
            key = f"telegram:{post['chat']}", post["source"] or post["text"]
            plain = key[0], key[1].removesuffix(remark).rstrip()
            if (key[0], str(post["message_id"])) in shown:
                if post["markup"] or "May I run this" in post["text"]:
                    self._note("missing", f"no verdict: {post['text']!r:.200}")
            elif want[key] > 0 or want[plain] > 0:
                want[key if want[key] > 0 else plain] -= 1
                if key[1].endswith(remark):
                    self._note("repeated", key[1][:200])
            elif doubtful[key] > 0 or doubtful[plain] > 0:
                self._note("repeated", key[1][:200])
            else:
                self._note("left over" if self._is_excused(post) else "doubled", f"stray: {post['texts']!r:.200}")
        for (channel, html), count in want.items():
            if count > 0:
                self._note("missing", f"{count} times not in {channel}: {html!r:.200}")

    def _is_excused(self, post: dict[str, Any]) -> bool:
        """Whether nobody could know of this message: a kill came too soon, or its answer got lost."""
        at = post["times"][0]
        killed = any(at - 0.05 <= kill <= at + self.SLACK for kill in self.kills)
        return killed or any(low <= at <= high for low, high in self.unheard)

    def _check_typing(self, kept: dict[str, tuple]) -> None:
        """The bot types only while a message waits for its answer."""
        drift, spans = time.time() - time.monotonic(), collections.defaultdict(list)
        ends = {
            row[7]: o.datetime.fromisoformat(row[6]).timestamp() - drift for row in self.outbox if row[7] and row[6]
        }
        for number, word in self.mail.sent.items():
            if number in kept and kept[number][0] in ends:
                spans[word.chat].append((word.time - 0.05, ends[kept[number][0]] + self.LATE))
        for row in self.bot.actions():
            if not any(low <= row["time"] <= high for low, high in spans[row["chat"]]):
                late = min((row["time"] - high for low, high in spans[row["chat"]] if high < row["time"]), default=0)
                self._note("typing", f"in {row['chat']}, {late:.2f} s after the end")

    def _check_offsets(self) -> None:
        asked = [int(call["parameters"].get("offset", 0)) for call in self.bot.calls("getUpdates")]
        if asked != sorted(asked):
            self._note("lost", "an offset went back")
        numbers = [int(number) for number in self.mail.sent]
        if self.cursor <= max(numbers) or self.bot.state()["pending"]:
            self._note("missing", f"read up to {self.cursor}, {self.bot.state()['pending']} updates are left")


class ChatKiller(Killer):
    """Kills the daemon, and breaks its Bot API."""

    DEVICES, POINTS = ("anna",), points_of(PLACES[:16] + APPENDS + CHAT_PLACES)
    CHATS, GROUP = tuple(range(1, 11)), -1_000_000_000_777
    CONFIG = """
        [channels.telegram]
        enabled = true
        base_url = "{url}"
        token = "{token}"
        allowed_users = [{users}]
        allowed_groups = [{group}]
        """
    METHODS = "getUpdates sendMessage sendMessage editMessageText sendChatAction deleteMessage getMe *".split()
    KINDS = ["drop", "lost", "lost", "status:500", "429:1", "junk", "html", "slow:1"] * 2 + ["silent"]

    def __init__(self, house: House, bot: BotServer, dice: random.Random, seconds: float, short: bool):
        super().__init__(house, dice, 1 << 30, seconds)
        self.mail, self.bot, self.faults, self.short = Chatting(), bot, Counter(), short
        self.lives = (1,) if short else (1, 2, 4)

    def senders(self) -> list[Any]:
        """People, and one who breaks things."""
        return [*(Person(self, chat) for chat in (*self.CHATS, self.GROUP)), Breaker(self)]

    def audit(self) -> Audit:
        """What was wrong."""
        return ChatAudit(self.house, self.mail, self.bot, self.moments)

    async def rest(self, store: o.Store, work: asyncio.Future) -> None:
        """Until all is answered, all is sent, and nothing comes any more."""
        await work
        while o.Inbox(store).waiting() or o.Outbox(store).unsent() or self.bot.state()["pending"]:
            await asyncio.sleep(0.05)
        await asyncio.sleep(o.View.TYPING + 0.3)


class Breaker:
    """Makes faults."""

    def __init__(self, killer: ChatKiller):
        self.killer, self.closing = killer, asyncio.Event()

    async def run(self) -> None:
        """Until it is closed."""
        killer, dice = self.killer, self.killer.dice
        while not self.closing.is_set():
            method, kind = dice.choice(killer.METHODS), dice.choice(killer.KINDS)
            if kind != "silent" or not killer.short:  # it takes half a minute, or until a kill
                killer.faults[kind.partition(":")[0]] += 1
                await asyncio.to_thread(killer.bot.fault, method, kind)
            await asyncio.sleep(dice.uniform(0.0, 1.5))
        killer.bot.calm()


def torture_telegram(options: argparse.Namespace) -> int:
    """The command telegram."""
    started, dice = time.monotonic(), random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        bot = stack.enter_context(BotServer())
        users = ", ".join(map(str, ChatKiller.CHATS))
        group = ChatKiller.GROUP
        config = ChatKiller.CONFIG.format(url=bot.url, token=bot.token, users=users, group=group)
        house = stack.enter_context(House(options.archive, ChatKiller.DEVICES, config, "risky"))
        killer = ChatKiller(house, bot, dice, 2.5 if options.short else options.seconds, options.short)
        audit = asyncio.run(killer.run())
    faults = ", ".join(f"{count} {kind}" for kind, count in killer.faults.items())
    return report(killer, audit, options.seed, started, f"faults: {faults}")


# ===== 4. gateway =============================================================
#
# The attackers are one process of their own, which is told what to do; this one is
# the honest client. Each side has its own addresses of the loopback, where the system
# has more than one.

RATE = 1_500  # datagrams of a flood in a second
PING = {"type": "ping"}
WRONG = [PING | {"token": word} for word in ("wrong", "", "x" * 1_000_000, "x" * 100_000, 5)]
LONG_SESSION = "long"  # what slow readers ask for


class Target(NamedTuple):
    """What is attacked, and with what."""

    port: int
    fingerprint: str
    token: str  # of a device that has turned against us
    seed: int
    seconds: float
    streams: int


class Elsewhere(o.QuicClient):
    """A client at another address of this machine."""

    source = 2

    async def _open(self, link: Any, sock: socket.socket, address: tuple) -> None:
        sock.close()
        await super()._open(link, socket_of(self.source), address)


class Attacker:
    """All that one can do to a gateway; each attack gives the number of what it has sent."""

    def __init__(self, target: Target):
        self.target, self.dice, self.problems = target, random.Random(target.seed), []
        self.end = time.monotonic() + target.seconds

    def client(self, source: int, **more: Any) -> Elsewhere:
        client = Elsewhere("127.0.0.1", self.target.port, fingerprint=self.target.fingerprint, **more)
        client.source = source
        return client

    @property
    def ping(self) -> dict[str, Any]:
        return PING | {"token": self.target.token}

    async def flood(self, make: Callable[[], bytes], rate: int = RATE) -> int:
        """So many datagrams a second, from several addresses."""
        sent = 0
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket_of(source)) for source in (2, 3, 4)]
            started = time.monotonic()
            while (now := time.monotonic()) < self.end:
                for _ in range(min(rate, int((now - started) * rate) - sent)):
                    with contextlib.suppress(OSError):
                        socks[sent % 3].sendto(make(), ("127.0.0.1", self.target.port))
                    sent += 1
                await asyncio.sleep(0.005)
        return sent

    # ---- strangers ----

    def initial(self) -> bytes:
        """An Initial that nobody can read."""
        head = b"\xc3\0\0\0\1\x08" + self.dice.randbytes(8) + b"\x08" + self.dice.randbytes(8) + b"\0"
        return head + (0x4000 | (1_198 - len(head))).to_bytes(2, "big") + self.dice.randbytes(1_198 - len(head))

    def first_flight(self) -> bytes:
        """The first datagram of a client."""
        quic = o.open_quic().quic.connection.QuicConnection(configuration=o.configured(server_name="x", verify_mode=0))
        quic.connect(("127.0.0.1", self.target.port), now=0.0)
        return quic.datagrams_to_send(now=0.0)[0][0]

    def damaged(self, data: bytes) -> bytes:
        """The same with some bits flipped, or cut short."""
        copy = bytearray(data)
        for _ in range(self.dice.choice((1, 1, 3, 30))):
            copy[self.dice.randrange(min(self.dice.choice((40, 1_200)), len(copy)))] ^= 1 << self.dice.randrange(8)
        return bytes(copy[: self.dice.randrange(len(copy))]) if self.dice.random() < 0.1 else bytes(copy)

    async def random_bytes(self) -> int:
        return await self.flood(lambda: self.dice.randbytes(self.dice.randrange(1, 1_400)))

    async def junk_initials(self) -> int:
        return await self.flood(self.initial)

    async def other_versions(self) -> int:
        return await self.flood(lambda: b"\xc0" + self.dice.randbytes(4) + self.initial()[5:])

    async def short_headers(self) -> int:
        return await self.flood(lambda: b"\x43" + self.dice.randbytes(self.dice.randrange(20, 1_200)))

    async def damaged_first_flights(self) -> int:
        flights = [self.first_flight() for _ in range(20)]
        return await self.flood(lambda: self.damaged(self.dice.choice(flights)), RATE // 3)

    async def half_open(self) -> int:
        """Handshakes that are begun and not gone on with."""
        return await self.flood(self.first_flight, 100)

    async def silent(self) -> int:
        """Connections that say nothing, as many as they let in from some addresses."""
        tasks = [asyncio.create_task(self._be_silent(5 + i % 2)) for i in range(24)]
        return sum(await asyncio.gather(*tasks))

    async def _be_silent(self, source: int) -> int:
        count = 0
        while time.monotonic() < self.end:
            with contextlib.suppress(o.GatewayError, TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.end - time.monotonic()):
                    async with self.client(source, time_limit=1.0) as client:
                        count += 1
                        while client.problem is None:
                            await asyncio.sleep(0.1)
            await asyncio.sleep(0.05)
        return count

    async def strangers(self) -> int:
        """Wrong tokens, long ones, too much at once, frames that are none; they are answered slowly, if at all."""
        count = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.end - time.monotonic()):
                while True:
                    with contextlib.suppress(o.GatewayError):
                        async with self.client(7, time_limit=1.0) as client:
                            streams = [client.open_stream(self.dice.choice(WRONG), True) for _ in range(3)]
                            streams.append(raw(client, self.dice.randbytes(200)))
                            count += len(streams)
                            for stream in streams:
                                frame = await stream.receive()
                                if frame and frame["type"] != "error":
                                    self.problems.append(f"a stranger was told {frame}")
                    await asyncio.sleep(0.01)
        return count

    # ---- a device ----

    async def damaged_datagrams(self) -> int:
        """A device's datagrams, and beside each of them some that are damaged."""
        async with self.client(8) as client:
            count, sock = 0, client.link.port.sock
            plain = client.link.port.send

            def send(data: bytes, address: tuple) -> None:
                nonlocal count
                for copy in [self.damaged(data) for _ in range(3)] + [data]:
                    count += 1
                    plain(copy, address)

            client.link.port.send = send
            while time.monotonic() < self.end and sock.fileno() >= 0:
                await self._expect("pong", client)
                await asyncio.sleep(0.01)
        return count

    async def _expect(self, content: str, client: o.QuicClient) -> None:
        try:
            async with asyncio.timeout(5.0):
                frame = await client.open_stream(self.ping, True).receive()
            if frame.get("content") != content:
                self.problems.append(f"a ping was answered with {frame}")
        except (o.GatewayError, TimeoutError) as error:
            self.problems.append(f"a ping was not answered: {error!r}")
            self.end = 0.0

    async def bad_frames(self) -> int:
        count = 0
        async with self.client(9) as client:
            await self._expect("pong", client)
            await self._borrow(client)
            while time.monotonic() < self.end:
                for data, code in bad_frames(self.target.token):
                    stream = raw(client, data, finish=self.dice.random() < 0.5 or code == "cut")
                    async with asyncio.timeout(5.0):
                        frame = await stream.receive()
                    count += 1
                    if frame.get("code") != code.replace("cut", "bad_request"):
                        self.problems.append(f"{data[:60]!r}… was answered with {str(frame)[:200]}, not {code}")
                        self.end = 0.0
                stream = client.open_stream(self.ping)  # its end, and a second frame, never come
                raw(client, b"\0\0\1\0{").reset()
                if (await stream.receive()).get("content") != "pong":
                    self.problems.append("a stream that was left open was not answered")
                count += 2
                await asyncio.sleep(0.01)
        return count

    async def _borrow(self, client: o.QuicClient) -> None:
        """The id of another device's message is ours too, with an answer of its own."""
        frame = {"type": "message", "id": "m1", "session_id": "mine", "user_message": "hi\necho mine"}
        stream = client.open_stream(frame | {"token": self.target.token}, True)
        while (frame := await stream.receive())["type"] not in ("reply", "error"):
            pass
        if "mine" not in frame.get("content", "") or "done" in frame["content"]:
            self.problems.append(f"another device's id was answered with {frame}")

    async def slow_readers(self) -> int:
        """Connections that ask for much and take nothing."""
        count, clients = 0, []
        try:
            while time.monotonic() < self.end:
                if len(clients) < 6:
                    clients.append(client := self.client(10 + len(clients) % 2))
                    await client.__aenter__()
                    frame = {"type": "history", "session_id": LONG_SESSION, "limit": 1000, "token": self.target.token}
                    client.open_stream(self.ping, True)
                    for _ in range(100):
                        client.open_stream(frame, True)
                    await asyncio.sleep(0.1)
                    client.link.port.received = lambda batch, port: None
                    count += 100
                await asyncio.sleep(0.02)
        finally:
            for client in clients:
                await client.__aexit__()
        return count

    async def many_streams(self) -> int:
        """Requests without end on one connection, 64 at a time."""
        rest = itertools.count(1)
        async with self.client(12) as client:
            await self._expect("pong", client)

            async def ask() -> None:
                while next(rest) <= self.target.streams and client.problem is None:
                    await client.open_stream(self.ping, True).receive()

            try:
                await asyncio.gather(*(ask() for _ in range(64)))
            except o.GatewayError as error:
                self.problems.append(f"streams: {error}")
        return min(next(rest), self.target.streams)

    async def streams_reset(self) -> int:
        """Streams that are opened and reset at once: they must not use up what a connection may have open."""
        count = 0
        async with self.client(13) as client:
            await self._expect("pong", client)
            while time.monotonic() < self.end:
                for _ in range(20):
                    stream = client.open_stream(self.ping, self.dice.random() < 0.5)
                    if self.dice.random() < 0.3:
                        await asyncio.sleep(0)
                    self.dice.choice((stream.reset, lambda one=stream: client.link.quic.reset_stream(one.number, 1)))()
                    count += 1
                await self._expect("pong", client)
        return count


ATTACKS = """random_bytes junk_initials other_versions short_headers damaged_first_flights half_open silent strangers
    damaged_datagrams bad_frames slow_readers streams_reset many_streams""".split()


def socket_of(source: int) -> socket.socket:
    """A UDP socket at 127.0.0.source, or where the system has no such address, at any."""
    with contextlib.suppress(OSError):
        return o.udp_socket(socket.AF_INET, (f"127.0.0.{source}", 0))
    return o.udp_socket(socket.AF_INET)


def raw(client: o.QuicClient, data: bytes, finish: bool = False) -> o.Stream:
    """A stream with these bytes."""
    stream = client.link.open()
    stream.write(data, finish)
    return stream


def packed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def bad_frames(token: str) -> Iterator[tuple[bytes, str]]:
    """Bytes of a device that are no good request, and the code that answers them; "cut": their end follows."""
    ping = PING | {"token": token}
    message = {"type": "message", "id": "1", "token": token, "user_message": "hi"}
    bodies = [b"{", b"", b"[1]", b"null", b"\xff{}", b'{"a":NaN}', b'{"a":1,"a":2}', b'{"a":"\\ud800"}', b"{} {}"]
    bodies += [b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b'{"a":' + b"9" * 5_000 + b"}"]
    frames = [{}, ping | {"type": 1}, ping | {"type": "pingg"}, {"type": "ping"}, ping | {"token": 5}]
    frames += [message | {"user_message": ["hi"]}, message | {"id": None}, message | {"metadata": "x"}]
    frames += [message | {"id": "job:1"}, message | {"channel_id": "quic:somebody"}, message | {"on_disconnect": "x"}]
    for body in bodies + [json.dumps(frame).encode() for frame in frames]:
        yield packed(body), "bad_request"
    for size in ((1 << 20) + 1, (1 << 32) - 1):
        yield size.to_bytes(4, "big"), "too_large"
    yield packed(json.dumps(ping | {"token": "x" * 1_000_000}).encode()), "too_large"
    yield packed(json.dumps(message | {"user_message": "x" * 900_001}).encode()), "too_large"
    yield packed(json.dumps(ping | {"token": "wrong" * 8}).encode())[:-5], "cut"
    yield b"\0\0", "cut"


def serve_attacks(pipe: Any) -> None:
    """The attackers' process: (target, names) -> (count, problems)."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            target, names = pipe.recv()
            pipe.send(asyncio.run(attack(target, names)))


async def attack(target: Target, names: list[str]) -> tuple[int, list[str]]:
    """These attacks side by side."""
    attackers = [Attacker(target) for _ in names]
    work = (getattr(one, name)() for one, name in zip(attackers, names, strict=True))
    counts = await asyncio.gather(*work, return_exceptions=True)
    problems = [f"{name}: {text}" for one, name in zip(attackers, names, strict=True) for text in one.problems]
    problems += [f"{name}: {n!r}" for n, name in zip(counts, names, strict=True) if isinstance(n, BaseException)]
    return sum(count for count in counts if isinstance(count, int)), problems


class Honest:
    """A client that is to be served all the while; how long each answer took."""

    LONGEST = 5.0  # seconds; more counts as no answer

    def __init__(self, house: House):
        self.house, self.token = house, house.tokens["honest"]
        self.pings: list[float] = []
        self.arrivals: list[float] = []  # a new connection, and the answer to its first request
        self.turns: list[float] = []
        self.problems: list[str] = []
        self.peak = 0.0
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._stay())
            tasks.create_task(self._arrive())
            tasks.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.house.memory())
            await asyncio.sleep(0.02)

    async def _stay(self) -> None:
        """Pings on one connection, and a message each second."""
        while True:
            with self._noted("a connection"):
                async with self.house.client() as client:
                    while client.problem is None:
                        started = time.monotonic()
                        while time.monotonic() < started + 1:
                            await self._ping(client, self.pings)
                            await asyncio.sleep(0.01)
                        await self._turn(client)
            await asyncio.sleep(0.1)

    async def _arrive(self) -> None:
        while True:
            started = time.monotonic()
            with self._noted("a newcomer"):
                async with asyncio.timeout(self.LONGEST), self.house.client(time_limit=self.LONGEST) as client:
                    await self._ping(client, [])
                    self.arrivals.append(time.monotonic() - started)
            await asyncio.sleep(0.2)

    async def _ping(self, client: o.QuicClient, times: list[float]) -> None:
        started = time.monotonic()
        async with asyncio.timeout(self.LONGEST):
            frame = await client.open_stream(PING | {"token": self.token}, True).receive()
        times.append(time.monotonic() - started)
        if frame != {"type": "reply", "content": "pong"}:
            self.problems.append(f"a ping was answered with {frame}")

    async def _turn(self, client: o.QuicClient) -> None:
        """A message with a command, on a session that stays short."""
        started, name = time.monotonic(), f"m{next(self._numbers)}"
        frame = {"type": "message", "id": name, "session_id": name, "user_message": f"hi\necho 'done {name}'"}
        async with asyncio.timeout(2 * self.LONGEST):
            stream = client.open_stream(frame | {"token": self.token}, True)
            while (frame := await stream.receive())["type"] != "reply":
                pass
        self.turns.append(time.monotonic() - started)
        if f"done {name}" not in frame["content"]:
            self.problems.append(f"{name} was answered with {frame}")

    @contextlib.contextmanager
    def _noted(self, who: str) -> Iterator[None]:
        try:
            yield
        except (o.GatewayError, TimeoutError) as error:
            self.problems.append(f"{who} was not served: {error!r}")

    def row(self, name: str, count: int) -> tuple[str, ...]:
        """What an attack has done to us; then all begins anew."""
        cells = (name, f"{count:,}", *map(figures, (self.pings, self.arrivals, self.turns)), f"{self.peak:.1f}")
        self.pings, self.arrivals, self.turns, self.peak = [], [], [], 0.0
        return cells


def figures(times: list[float]) -> str:
    """Median, 99th percentile, and how many they are of."""
    if len(times) < 2:
        return f"{times[0] * 1000:.1f} (1)" if times else "-"
    p99 = statistics.quantiles(times, n=100, method="inclusive")[-1]
    return f"{statistics.median(times) * 1000:.1f} {p99 * 1000:.1f} ({len(times)})"


async def endure(house: House, options: argparse.Namespace, pipe: Any) -> tuple[list[tuple], list[str], float]:
    """All attacks, one after the other and side by side: rows of the table, problems, growth of memory."""
    await house.ready()
    honest, loop, rows, problems = Honest(house), asyncio.get_running_loop(), [], []
    each = options.seconds / (len(ATTACKS) + 2)
    work = asyncio.create_task(honest.run())
    target = Target(house.port, house.fingerprint, house.tokens["mallory"], options.seed, each, options.streams)
    await asyncio.sleep(max(1.2, each))
    before = peak = house.memory()
    rows.append(honest.row("none", 0))
    for names in [[name] for name in ATTACKS] + [ATTACKS[:-1]]:
        pipe.send((target, names))
        count, found = await loop.run_in_executor(None, pipe.recv)
        problems += found
        peak = max(peak, honest.peak)
        rows.append(honest.row(names[0] if len(names) == 1 else "all of these at once", count))
    await asyncio.sleep(1.0 if options.short else 10.0)
    peak, after = max(peak, honest.peak), house.memory()
    rows.append(honest.row("none", 0))
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    print(f"memory: {before:.1f} MB before, {peak:.1f} MB at most, {after:.1f} MB after")
    return rows, problems + honest.problems, peak - before


def torture_the_gateway(options: argparse.Namespace) -> int:
    """The command gateway."""
    import multiprocessing

    started = time.monotonic()
    options.seconds = 6.0 if options.short else options.seconds
    options.streams = 1_500 if options.short else options.streams
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    attackers = context.Process(target=serve_attacks, args=(theirs,), daemon=True)
    attackers.start()
    theirs.close()
    with House(options.archive, ("honest", "mallory")) as house:
        with house.store() as store:
            session = store.session(LONG_SESSION)
            for _ in range(20):
                store.append(session, o.Message(o.Role.USER, "x" * 8_000))
        house.start()
        rows, problems, growth = asyncio.run(endure(house, options, ours))
        if code := house.end(signal.SIGTERM):
            problems.append(f"the daemon ended with {code} when it was told to end")
        said = Counter(re.sub(r"\d+", "N", line)[:150] for line in house.words().splitlines()[7:])
    ours.close()
    attackers.join(5)
    heads = ("attack", "sent", "ping: p50 p99 ms", "newcomer: p50 p99 ms", "turn: p50 p99 ms", "peak MB")
    print_table([heads, *rows])
    for text in problems[:20]:
        print(f"  {text}")
    for line, count in said.most_common(5):
        print(f"  log, {count} times: {line}")
    if growth > 40:
        print(f"  memory grew by {growth:.1f} MB")
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return 1 if problems or growth > 40 else 0


# ===== 5. Command =============================================================


def main() -> int:
    parser = argparse.ArgumentParser(description="Tortures a daemon, and counts what is lost, doubled or missing.")
    commands = parser.add_subparsers(dest="command", required=True)
    kill = commands.add_parser("kill", help="kill -9 while messages come")
    kill.add_argument("--kills", type=int, default=200)
    kill.set_defaults(run=torture_by_kills)
    telegram = commands.add_parser("telegram", help="kill -9 and a broken Bot API while people write to the bot")
    telegram.add_argument("--seconds", type=float, default=120.0)
    telegram.set_defaults(run=torture_telegram)
    gateway = commands.add_parser("gateway", help="attacks, while an honest client asks")
    gateway.add_argument("--seconds", type=float, default=120.0, help="for all attacks; streams take their own time")
    gateway.add_argument("--streams", type=int, default=1_000_000)
    gateway.set_defaults(run=torture_the_gateway)
    for command in (kill, telegram, gateway):
        command.add_argument("--short", action="store_true", help="less than 15 s")
        command.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
        command.add_argument("--archive", type=Path, help="this archive instead of the checkout")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the daemon is ended too
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
