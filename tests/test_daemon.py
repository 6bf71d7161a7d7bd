"""The daemon as a process: one at a time, signals, settings, the chat beside it, and what a kill -9 leaves."""

import configparser
import contextlib
import json
import os
import pathlib
import plistlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from launcher import Process

import openpista as o

OFFLINE = '[agent]\nprovider = "offline"\n[gateway]\nport = 0\ngrace = 1\n[tools]\napproval = "never"\n'


def until(condition, what="it did not happen", seconds=10):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.01)
    return found


def is_gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Listener:
    """What sd_notify sends, on a socket in the file system or an abstract one."""

    def __init__(self, folder=None):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"openpista-test-{os.getpid()}-{os.urandom(4).hex()}"
        self.socket.bind(f"/tmp/{name}" if folder else f"\0{name}")
        self.address = f"/tmp/{name}" if folder else f"@{name}"
        self.told = []

    def wait(self, word, seconds=10):
        """The next message that has this line, and those before it."""
        end = time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                self.told.append(self.socket.recv(4_096).decode())
            except TimeoutError:
                raise AssertionError(f"{word} did not come, but {self.told}") from None
            if word in self.told[-1].split("\n"):
                return self.told[-1]

    def close(self):
        self.socket.close()
        if self.address.startswith("/"):
            os.unlink(self.address)


class House:
    """A home, the daemons that are started in it, and what its database holds."""

    def __init__(self, home, environ, folder):
        self.home, self.environ, self.folder, self.processes, self.heard = home, environ, folder, [], Listener()
        self.detached = 0
        home.mkdir(mode=0o700)
        self.configure(OFFLINE)

    def configure(self, text):
        (self.home / "config.toml").write_text(text)

    def start(self, *words, ready=True, **env):
        env = self.environ | {"NOTIFY_SOCKET": self.heard.address} | env
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.processes.append(Process(["start", *words], env, self.folder, **streams))
        if ready:
            self.heard.wait("READY=1")
        return self.processes[-1]

    def end(self, process, number=signal.SIGTERM, seconds=10):
        """Exit code, standard output, standard error."""
        process.send_signal(number)
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err

    def put(self, text, session="main", channel="job"):
        with o.Store(self.home / "memory.db") as store:
            return o.Inbox(store).add(o.Event(channel, os.urandom(4).hex(), session, text)).id

    def answer(self, number):
        """What became of an event, once it is over."""

        def look():
            with o.Store(self.home / "memory.db") as store:
                found = o.Outbox(store).answer(o.Inbox(store).get(number))
            return found if found.state not in ("waiting", "running") else None

        return until(look, "it was not answered")

    @property
    def pid_file(self):
        return self.home / "openpista.pid"

    def close(self):
        if self.detached:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.detached, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.communicate()
        self.heard.close()


@pytest.fixture
def house(home, environ, tmp_path):
    house = House(home, environ, tmp_path)
    yield house
    house.close()


def numbers(path):
    """The numbers that commands have written into a file, one a line."""
    return [int(word) for word in path.read_text().split()] if path.exists() else []


# One at a time


def test_first_lines_and_the_end(house, openpista):
    daemon = house.start()
    pid, machine = house.pid_file.read_text().split()
    assert int(pid) == daemon.pid and machine == o.machine_name()
    assert stat.S_IMODE(house.pid_file.stat().st_mode) == 0o600
    second = openpista("start")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"openpista: openpista runs already, pid {daemon.pid}; `openpista stop` ends it\n"
    shared = f'[database]\nurl = "{house.home}/memory.db"\n' + OFFLINE
    (house.folder / "other.toml").write_text(shared)
    other = openpista("start", "--config", "other.toml", env={"OPENPISTA_HOME": str(house.folder / "other")})
    assert other.returncode == 1 and f"is used by another openpista, pid {daemon.pid}" in other.stderr
    assert not (house.folder / "other" / "openpista.pid").exists()

    code, out, err = house.end(daemon)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"openpista {re.escape(o.__version__)}, pid {daemon.pid}\n"
        rf"  configuration  {re.escape(str(house.home))}/config.toml\n  gateway        off .*\n"
        r"  channels       none\n  jobs           none\n  model          offline/shell\n",
        out,
    )
    assert house.heard.wait("STOPPING=1")
    assert sorted(path.name for path in house.home.iterdir()) == ["config.toml", "memory.db"]


def test_a_stale_pid_file(house, openpista):
    daemon = house.start()
    assert house.end(daemon, signal.SIGKILL)[0] == -signal.SIGKILL
    assert house.pid_file.exists()
    for words in (["stop"], ["status"]):
        done = openpista(*words)
        assert done.returncode == 1 and done.stderr.startswith("openpista: openpista is not running; ")
    house.pid_file.write_text("1\nelsewhere\n")  # the number of somebody else meanwhile
    assert openpista("stop").returncode == 1
    assert house.end(house.start())[0] == 0


def test_stop_and_status(house, openpista):
    daemon = house.start()
    done = openpista("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"openpista runs, pid {daemon.pid}; no more can be asked: its gateway is off")
    assert json.loads(openpista("status", "--json").stdout) == {"pid": daemon.pid, "gateway": "off"}
    done = openpista("stop")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"stopped openpista, pid {daemon.pid}\n", "")
    assert daemon.wait(5) == 0 and not house.pid_file.exists()
    assert json.loads(openpista("status", "--json").stdout)["exit_code"] == 1


def test_a_daemon_in_another_container_is_not_killed(house, openpista):
    import fcntl

    house.pid_file.write_text(f"{os.getpid()}\nanother-machine/1\n")
    with house.pid_file.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = openpista("stop")
    assert done.returncode == 1 and "runs on another-machine/1" in done.stderr


def test_stopping_what_has_just_ended(home, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    o.end_daemon(o.Context(None, o.Config(), home, {}, o.Redactor()), o.Holder(ended.pid, o.machine_name()))
    assert capsys.readouterr().out == f"stopped openpista, pid {ended.pid}\n"


def test_what_is_wrong_after_the_start_is_not_written_where_the_pipe_was(house, tmp_path):
    told, tell = os.pipe()
    ctx = o.Context(None, o.Config(), house.home, {}, o.Redactor())
    other = tmp_path / "other"

    async def serve(ctx, ready):
        ready("lines")
        handle = os.open(other, os.O_WRONLY | os.O_CREAT)
        if handle != tell:
            os.dup2(handle, tell)
            os.close(handle)
        raise o.PistaError("wrong later")

    if not (pid := os.fork()):
        try:
            o.in_background(ctx, tmp_path / "log", tell, serve)
        except o.PistaError as error:
            os._exit(7 if "wrong later" in str(error) else 1)
        finally:
            os._exit(2)
    os.close(tell)
    with open(told, "rb") as pipe:
        assert pipe.read() == b"ready\nlines"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and other.read_bytes() == b""


def test_detached(house, openpista):
    house.configure(OFFLINE + '[[cron]]\nschedule = "0 0 1 1 *"\nprompt = "happy new year"\n')
    done = openpista("start", "--detach")
    assert (done.returncode, done.stderr) == (0, ""), "and nobody holds the pipes, or this would wait"
    pid = house.detached = int(house.pid_file.read_text().split()[0])
    assert done.stdout.startswith(f"openpista {o.__version__}, pid {pid}\n") and "runs in the background" in done.stdout
    assert re.search(r"  jobs           1, the next at \d{4}-", done.stdout)
    log = house.home / "openpista.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and f"pid {pid}" in log.read_text()
    again = openpista("start", "--detach")
    assert again.returncode == 1 and f"openpista runs already, pid {pid}" in again.stderr
    with (house.home / "config.toml").open("a") as file:
        file.write("\nbogus = 1\n")  # a slip of the pen must not keep the owner from stopping it
    done = openpista("stop")
    assert done.stdout == f"stopped openpista, pid {pid}\n" and is_gone(pid) and "going on as if" in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[agent]\nprovider = "nobody"', "unknown provider 'nobody'"),
        ('[[cron]]\nschedule = "61 * * * *"\nprompt = "hi"', "[[cron]] config-1"),
        ('[tools]\nworkdir = "/nowhere"', "no folder /nowhere"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--detach"]])
def test_settings_with_which_it_cannot_begin(house, openpista, config, said, words):
    house.configure("[gateway]\nport = 0\n" + config)
    done = openpista("start", *words)
    assert said in done.stderr and done.returncode == 2
    assert not house.pid_file.exists()


def test_without_a_key_it_starts_and_says_so(house):
    house.configure("[gateway]\nport = 0")
    number = house.put("hi")
    daemon = house.start()
    answer = house.answer(number)
    assert (answer.state, answer.is_error) == ("failed", True) and answer.text.startswith("no key for any model")
    code, out, _ = house.end(daemon, signal.SIGINT)
    assert code == 0 and "  model          none: no key for any model; set a provider's variable" in out


def free_port():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as found:
        found.bind(("::", 0))
        return found.getsockname()[1]


def test_status_over_the_gateway(house, openpista):
    port = free_port()
    house.configure(OFFLINE.replace("port = 0", f"port = {port}"))
    house.put("$ sleep 60", "busy")
    house.put("$ true", "busy")
    daemon = house.start()
    found = json.loads(openpista("status", "--json").stdout)
    assert found["pid"] == daemon.pid and found["running"] == ["busy"] and found["queue"] == 2
    assert found["sessions"] == 1 and found["model"] == "offline/shell" and found["channels"]["quic"]
    assert found["jobs"] == {"active": 0, "next_at": None} and found["usage_today"]["input"] == 0
    assert 10 << 20 < found["memory"] < 500 << 20 and 0 <= found["uptime"] < 60
    shown = openpista("status").stdout
    assert (
        f"openpista     {o.__version__}, pid {daemon.pid}, up " in shown
        and "sessions      1, in a turn: busy\n" in shown
    )
    assert re.search(r"\nchannels      quic \(\d+ s ago\)\n", shown) and "\nused today    0 tokens\n" in shown

    (house.folder / "other.toml").write_text(OFFLINE.replace("port = 0", f"port = {port}"))
    other = openpista("start", "--config", "other.toml", env={"OPENPISTA_HOME": str(house.folder / "other")})
    assert other.returncode == 1 and str(port) in other.stderr and "Traceback" not in other.stderr
    house.configure(OFFLINE.replace("port = 0", f"port = {free_port()}"))
    done = openpista("status")
    assert done.returncode == 1 and f"openpista runs, pid {daemon.pid}, but cannot be asked: " in done.stderr
    code, out, _ = house.end(daemon)
    assert code == 0 and re.search(
        rf"gateway        127.0.0.1:{port}.*, sha256 [0-9a-f]{{64}}\n  channels       quic\n", out
    )


CREW = """
[gateway]
port = {port}
grace = 1
[agents.worker]
model = "m1"
tools = []
[agents.guest]
model = "m2"
[agents.phone]
model = "m3"
tools = ["file.*"]
[[routes]]
agent = "worker"
job = "disks"
[[routes]]
agent = "guest"
channel = "quic:laptop"
[[routes]]
agent = "phone"
channel = "telegram"
chat = "42"
"""
TELEGRAM = """
[channels.telegram]
enabled = true
allowed_users = [42]
base_url = "{url}"
"""


def test_one_daemon_a_model_for_each_channel(house, openpista, openai, model, bot):
    """A job, a device, a chat and a terminal get an agent each, and `routes test` says the same."""
    house.configure(CREW.format(port=free_port()) + TELEGRAM.format(url=bot.url))
    model.script(*({"model": name, "text": f"I am {name}", "times": -1} for name in ("m1", "m2", "m3", "gpt-4o")))
    keys = {name: openai[name] for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")}
    house.start(**keys, TELEGRAM_BOT_TOKEN=bot.token)
    bot.say(42, "who?")
    bot.wait(42, "I am m3")
    invite = openpista("devices", "add", "laptop", "--host", "127.0.0.1").stdout
    away = {"OPENPISTA_HOME": str(house.folder / "away")}
    until(lambda: openpista("connect", "-", "-e", "who?", env=away, input=invite).stdout == "I am m2\n")
    openpista("cron", "add", "--once", "+1d", "who?", "--name", "disks")
    openpista("cron", "run", "disks")
    until(lambda: "I am m1" in openpista("cron", "history", "disks").stdout)
    assert openpista("run", "-e", "who?", env=keys).stdout == "I am gpt-4o\n"
    assert {body["model"]: bool(body.get("tools")) for body in model.bodies()} == {
        "m1": False,
        "m2": True,
        "m3": True,
        "gpt-4o": True,
    }
    [offered] = [body["tools"] for body in model.bodies() if body["model"] == "m3"]
    assert [tool["function"]["name"] for tool in offered] == ["file_send"]

    for words, agent in (
        (["quic:laptop"], "guest, openai/m2"),
        (["job", "--job", "disks"], "worker, openai/m1"),
        (["telegram:42"], "phone, openai/m3"),
        (["telegram:43"], "default, openai/gpt-4o"),
        (["cli"], "default, openai/gpt-4o"),
    ):
        said = openpista("routes", "test", words[0], "who?", *words[1:], env=keys).stdout
        assert said.splitlines()[-1] == f"agent {agent}, gets: who?"
    assert (
        "route 1 (worker) does not match: job is '', not 'disks'\nroute 2 matches: channel = "
        in openpista("routes", "test", "quic:laptop", "who?", env=keys).stdout
    )
    rows = {
        row["name"]: row["today"]["calls"] for row in json.loads(openpista("agents", "list", "--json", env=keys).stdout)
    }
    assert rows == {"default": 1, "worker": 1, "guest": 1, "phone": 1}
    bot.say(42, "/agent guest")
    bot.wait(42, "guest answers this session")
    assert "/agent guest was said in session telegram:42" in openpista("routes", "test", "telegram:42", "x").stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_question_of_an_agent_that_was_asked_outlives_the_daemon(house, openai, model, bot, number):
    """Nothing is asked twice, no command runs twice, and the button that stands there works."""
    ask = {"name": "agent_ask", "arguments": {"agent": "hand", "task": "clean up"}}
    run = {"name": "system_run", "arguments": {"command": "rm -f nothing; echo ran >>ran"}}
    model.script(
        {"model": "gpt-4o", "tool_calls": [ask]},
        {"model": "m1", "tool_calls": [run]},
        {"model": "m1", "text": "cleaned"},
        {"model": "gpt-4o", "text": "all clean"},
    )
    house.configure(f'[gateway]\nport = 0\ngrace = 0\n[agents.hand]\nmodel = "m1"\n{TELEGRAM.format(url=bot.url)}')
    keys = {name: openai[name] for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")}
    daemon = house.start(**keys, TELEGRAM_BOT_TOKEN=bot.token)
    bot.say(42, "clean up")
    question = bot.wait(42, "May I run this?")[-1]
    assert "hand asks for it" in question["text"]
    buttons = question["markup"]["inline_keyboard"][0]
    with o.Store(house.home / "memory.db") as store:  # the press must find under which message it stands
        until(lambda: store.db.execute("SELECT shown FROM approvals").fetchone()[0])
    house.end(daemon, number)
    bot.press(42, question["message_id"], buttons[0]["callback_data"])
    house.start(**keys, TELEGRAM_BOT_TOKEN=bot.token)
    bot.wait(42, "all clean")
    assert (house.folder / "ran").read_text() == "ran\n"
    assert [body["model"] for body in model.bodies()] == ["gpt-4o", "m1", "m1", "gpt-4o"]
    assert sum("May I run this?" in row["texts"][0] for row in bot.sent(42)) == 1


BROKEN = [  # settings that cannot be -> what is said
    ("[agents.a]\nprompt_file = 'gone.md'", "cannot read the prompt_file"),
    ("[agents.a]\nprovider = 'ofline'", "agents.a: unknown provider 'ofline', did you mean 'offline'"),
    ("[[routes]]\nagent = 'a'", "route 1: there is no agent 'a'"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_agents_that_cannot_be_are_refused_at_the_start_and_later(house, text, words):
    house.configure(f"{OFFLINE}{text}")
    daemon = house.start(ready=False)
    assert daemon.wait(10) == 2 and words in daemon.stderr.read()
    house.configure(OFFLINE)
    daemon = house.start()
    house.configure(f"{OFFLINE}{text}")
    daemon.send_signal(signal.SIGHUP)
    house.heard.wait("READY=1")
    house.put("$ echo on")
    _, out, _ = house.end(daemon)
    assert "settings refused, the old ones stay" in out and words in out


def test_odd_agents_are_said_at_the_start(house):
    house.configure(
        f"{OFFLINE}[agents.a]\nprovider = 'groq'\n[[routes]]\nagent = 'a'\n[[routes]]\nagent = 'default'\nprefix = '!'"
    )
    number = house.put("hello")
    daemon = house.start()
    assert house.answer(number).text.startswith("no key for groq")
    _, _, err = house.end(daemon)
    assert (
        "route 2 (agent default) is never reached: route 1" in err and "agent a cannot answer: no key for groq" in err
    )


# Who started it


@pytest.mark.parametrize("in_a_folder", [True, False])
def test_sd_notify(house, tmp_path, in_a_folder):
    heard = house.heard if not in_a_folder else Listener(tmp_path)
    env = tmp_path / "env"
    number = house.put(f"$ env > {env}")
    daemon = house.start(ready=False, NOTIFY_SOCKET=heard.address, WATCHDOG_USEC="200000")
    assert heard.wait("READY=1") == "READY=1\nSTATUS=answering with offline/shell"
    started = time.monotonic()
    for _ in range(5):
        heard.wait("WATCHDOG=1", 1)
    assert 0.25 < time.monotonic() - started < 2, "every 0.1 s"
    daemon.send_signal(signal.SIGSTOP)  # a daemon that hangs feeds no watchdog
    with pytest.raises(AssertionError):
        while True:
            heard.wait("WATCHDOG=1", 0.3)
    daemon.send_signal(signal.SIGCONT)
    house.answer(number)
    assert not re.search(r"NOTIFY|WATCHDOG", env.read_text()), "that is not for commands"
    assert house.end(daemon)[0] == 0
    assert "EXTEND_TIMEOUT_USEC=21000000" in heard.wait("STOPPING=1")
    if in_a_folder:
        heard.close()


def test_nobody_listens(house):
    daemon = house.start(ready=False, NOTIFY_SOCKET="/nowhere/at/all")
    until(house.pid_file.exists)
    until(lambda: "model" in daemon.stdout.readline())
    assert house.end(daemon)[0] == 0


# The end of turns


def test_a_turn_may_end_within_the_grace(house, tmp_path):
    house.configure(OFFLINE.replace("grace = 1", "grace = 20"))
    number = house.put(f"$ touch {tmp_path}/begun; sleep 0.7; echo whole")
    daemon = house.start()
    until((tmp_path / "begun").exists)
    code, out, _ = house.end(daemon)
    assert code == 0 and "ending: 1 turn may run on for 20 s" in out
    assert house.answer(number).text == "whole"


@pytest.mark.parametrize(("grace", "signals"), [(0, 1), (60, 2)])
def test_a_turn_that_is_cut_off_goes_on_at_the_next_start(house, tmp_path, grace, signals):
    house.configure(OFFLINE.replace("grace = 1", f"grace = {grace}"))
    number = house.put(f"$ echo $$ >> {tmp_path}/pids; sleep 60")
    daemon = house.start()
    (pid,) = until(lambda: numbers(tmp_path / "pids"))
    started = time.monotonic()
    for _ in range(signals - 1):
        daemon.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert daemon.poll() is None
    assert house.end(daemon, seconds=5)[0] == 0 and time.monotonic() - started < 4 and is_gone(pid)
    daemon = house.start()
    assert "stopped while it ran" in house.answer(number).text
    assert house.end(daemon)[0] == 0 and numbers(tmp_path / "pids") == [pid]


def test_a_kill_leaves_no_command_running_and_the_turn_goes_on(house, tmp_path):
    """But what was to go on in the background does, and so does what is not this daemon's."""
    number = house.put(f"$ echo $$ >> {tmp_path}/pids; setsid sleep 61 & echo $! >> {tmp_path}/pids; sleep 61")
    daemon = house.start()
    pids = until(lambda: len(found := numbers(tmp_path / "pids")) == 2 and found)
    house.end(daemon, signal.SIGKILL)
    strangers = [
        subprocess.Popen(["sleep", "62"], env={"OPENPISTA_CALL": mark})
        for mark in ("daemon-0123456789abcdef.1", ".1", o.daemon_mark(house.home))
    ]
    try:
        assert not any(map(is_gone, pids)), "nobody could end them"
        daemon = house.start()
        assert all(map(is_gone, pids))
        assert house.answer(number).text.startswith("interrupted by a restart; its outcome is unknown")
        assert [process.poll() for process in strangers] == [None] * 3
    finally:
        for process in strangers:
            process.kill()
            process.wait()
    code, _, err = house.end(daemon)
    assert code == 0 and "ended what a killed openpista had left running: 2 commands" in err
    assert numbers(tmp_path / "pids") == pids, "nothing ran twice"


def test_what_goes_on_in_the_background_has_no_mark(tmp_path):
    env = {"PATH": os.environ["PATH"], o.Child.MARK: "daemon-1"}
    o.start_in_background("/bin/sh", "env; sleep 0", cwd=tmp_path, env=env, log_path=tmp_path / "log")
    assert "PATH=" in until((tmp_path / "log").read_text) and o.Child.MARK not in (tmp_path / "log").read_text()


# Settings


def test_a_hang_up_rereads_the_settings(house, tmp_path):
    house.configure(OFFLINE.replace("never", "always"))
    number = house.put("$ echo one")
    daemon = house.start()
    assert house.answer(number).text.startswith("denied")

    changed = '[[cron]]\nname = "morning"\nschedule = "0 9 * * *"\nprompt = "hi"\n[channels.cli]\nenabled = false\n'
    house.configure(OFFLINE.replace("port = 0", "port = 4433") + changed)
    daemon.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in house.heard.wait("RELOADING=1")
    house.heard.wait("READY=1")
    assert house.answer(house.put("$ echo two")).text == "two"
    with o.Store(house.home / "memory.db") as store:
        assert [job.name for job in o.Jobs(store).list()] == ["morning"]

    bad = ("agent = 1", changed + OFFLINE.replace("offline", "ofline"), OFFLINE + changed.replace("0 9", "0 99"))
    for text in bad:
        house.configure(text)
        daemon.send_signal(signal.SIGHUP)
        house.heard.wait("READY=1")
    with o.Store(house.home / "memory.db") as store:
        assert [job.schedule for job in o.Jobs(store).list()] == ["0 9 * * *"]

    code, out, _ = house.end(daemon)
    said = out.splitlines()[6:]
    assert code == 0 and said[0] == "gateway.port and channels will count after a restart"
    assert said[1] == f"settings read from {house.home}/config.toml" and len(said) == 5
    assert all(line.startswith("settings refused, the old ones stay: ") for line in said[2:])
    assert "did you mean 'offline'?" in said[3] and "99" in said[4]


def test_with_refused_settings_the_agents_stay_as_they_were(house):
    path = house.home / "a.md"
    house.configure(f"{OFFLINE}[agents.a]\nprompt_file = 'a.md'\n[[routes]]\nagent = 'a'\n")
    path.write_text("be brief")
    daemon = house.start()
    path.unlink()
    daemon.send_signal(signal.SIGHUP)
    house.heard.wait("READY=1")
    house.put("$ echo on > there")
    until((house.folder / "there").exists)
    _, out, _ = house.end(daemon)
    assert "settings refused, the old ones stay: agents.a: cannot read the prompt_file" in out


@pytest.mark.parametrize("wrong", ["gateway", "cron"])
def test_refused_settings_leave_the_jobs_and_the_gateway_alone(house, openpista, wrong):
    port, other = free_port(), free_port()
    old = OFFLINE.replace("port = 0", f"port = {port}") + CRON.format("morning", 9)
    house.configure(old)
    daemon = house.start()
    assert openpista("cron", "pause", "morning").returncode == 0
    with o.Store(house.home / "memory.db") as store:
        o.Jobs(store).note(o.Jobs(store).get("morning"), "2026-03-01T00:00:00.000Z", None, "of old")
    new = old.replace(str(port), f"{other}\ntls_cert = '/nowhere'" if wrong == "gateway" else str(other))
    house.configure(new.replace("morning", "evening") + CRON.format("worse", 9 if wrong == "gateway" else 99))
    daemon.send_signal(signal.SIGHUP)
    house.heard.wait("READY=1")
    with o.Store(house.home / "memory.db") as store:
        (job,) = o.Jobs(store).list()
        assert (job.name, job.state) == ("morning", "paused")
        assert [run.note for run in o.Jobs(store).history("morning")] == ["of old"]
    house.configure(old)
    assert json.loads(openpista("status", "--json").stdout)["pid"] == daemon.pid
    code, out, _ = house.end(daemon)
    assert code == 0 and "settings refused, the old ones stay" in out


CRON = '[[cron]]\nname = "{}"\nschedule = "0 {} * * *"\nprompt = "hi"\n'


# The chat beside it


@pytest.fixture
def chat(house, terminal, tmp_path):
    def start(config=OFFLINE, hint="offline/shell", **more):
        house.configure(config)
        tty = terminal("start", NOTIFY_SOCKET=house.heard.address, OPENAI_API_KEY=None, **more)
        house.heard.wait("READY=1")
        tty.until(lambda: tty.lines and tty.lines[-1].startswith(hint))
        return tty

    return start


def test_the_chat_in_the_foreground(house, chat, tmp_path):
    house.put("$ echo from; echo elsewhere", "other", "cli")
    tty = chat()
    tty.wait("from\nelsewhere")
    assert tty.lines[0].startswith("openpista ") and "  channels       cli" in tty.lines
    assert "Leaving the chat ends openpista." in tty.text
    tty.send("$ echo one two\r")
    tty.wait("✓ echo one two")
    tty.wait("offline/shell · 1 tool call")
    assert "\none two\n" in tty.text

    tty.send(f"$ echo $$ > {tmp_path}/pid; sleep 60\r")
    (pid,) = until(lambda: numbers(tmp_path / "pid"))
    tty.wait("▶ echo")
    tty.send("\x03")
    tty.wait("stopped")
    until(lambda: is_gone(pid))

    house.configure("agent = 1")
    tty.signal(signal.SIGHUP)
    tty.wait("settings refused, the old ones stay")
    with o.Store(house.home / "memory.db") as store:
        assert set(store.db.execute("SELECT channel, state FROM inbox")) == {("cli", "done"), ("cli", "stopped")}
        assert o.Outbox(store).channels() == []
    tty.send("\x04")
    assert tty.end() == 0 and tty.left_behind() == [] and not house.pid_file.exists()


def test_a_risky_command_is_asked_about_in_the_chat(house, chat, tmp_path):
    tty = chat(OFFLINE.replace("never", "risky"))
    tty.send(f"$ rm -r {tmp_path}/nothing\r")
    tty.wait("Run it?")
    tty.spend(0.6)
    tty.send("n")
    tty.wait("denied")
    tty.send("/quit\r")
    assert tty.end() == 0


def test_a_signal_while_the_chat_has_a_turn(house, chat, tmp_path):
    """The terminal is left as it was, and the turn goes on at the next start, which shows its answer."""
    tty = chat(OFFLINE.replace("grace = 1", "grace = 0"))
    tty.send(f"$ echo x >> {tmp_path}/effect; sleep 60\r")
    until((tmp_path / "effect").exists)
    tty.signal(signal.SIGTERM)
    assert tty.end() == 0 and tty.left_behind() == [] and not house.pid_file.exists()
    tty = chat()
    tty.wait("stopped while it ran")
    assert (tmp_path / "effect").read_text() == "x\n"
    tty.send("\x04")
    assert tty.end() == 0


def test_leaving_waits_for_the_turns_of_others(house, chat, tmp_path):
    number = house.put(f"$ touch {tmp_path}/begun; sleep 0.8; echo whole")
    tty = chat(OFFLINE.replace("grace = 1", "grace = 60"))
    until((tmp_path / "begun").exists)
    tty.send("/quit\r")
    tty.wait("ending: 1 turn may run on for 60 s")
    assert tty.end() == 0 and tty.left_behind() == []
    assert house.answer(number).text == "whole"


def test_no_chat_if_it_is_not_wanted(house, terminal):
    house.configure(OFFLINE + "[channels.cli]\nenabled = false")
    tty = terminal("start", NOTIFY_SOCKET=house.heard.address, OPENAI_API_KEY=None)
    house.heard.wait("READY=1")
    tty.wait("model          offline/shell")
    assert "  channels       none" in tty.lines and "Leaving" not in tty.text
    tty.send("\x03")  # in a terminal that is not raw: SIGINT
    assert tty.end() == 0 and tty.left_behind() == []


def test_the_window_is_closed(house, chat, tmp_path):
    tty = chat()
    assert tty.hang_up() == 0 and not house.pid_file.exists()


# Services


@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_a_systemd_unit(house, openpista, kind, tmp_path):
    done = openpista("service", "print", kind, env={"PATH": f'{os.environ["PATH"]}:/odd %h $X "dir'})
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(done.stdout)
    service = dict(unit["Service"])
    assert (
        service["Type"] == "notify"
        and service["KillMode"] == "mixed"  # a command that runs is not ended while its turn has its grace
        and ("User" in service) == (kind == "--system")
    )
    program = f'"{sys.executable}" "{o.__file__}" "start"'
    assert service["ExecStart"] == program and int(service["TimeoutStopSec"]) > 1
    assert done.stdout.count("\n[") == 3 and r':/odd %%h $X \"dir"' in done.stdout
    if shutil.which("systemd-analyze"):
        path = tmp_path / "openpista.service"
        path.write_text(done.stdout)
        checked = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_a_launchd_agent(house, openpista):
    agent = plistlib.loads(
        openpista("service", "print", "--launchd", "--config", str(house.home / "config.toml")).stdout.encode()
    )
    assert agent["ProgramArguments"][2:] == ["start", "--config", str(house.home / "config.toml")]
    assert agent["EnvironmentVariables"]["OPENPISTA_HOME"] == str(house.home)
