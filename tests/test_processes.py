"""Processes: real children, their ends, their groups, their output, and what they may inherit."""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openpista
from openpista import Capture, Redactor, ToolError, child_environment, run_process, start_in_background

ROOT = Path(openpista.__file__).parent
BASH = shutil.which("bash")


def process(command, *, timeout=10, limit=10_000, shell=BASH, cwd=Path("/"), env=os.environ, stdin=""):
    return run_process([shell, "-c", command], cwd=cwd, env=env, timeout=timeout, limit=limit, stdin=stdin)


def sh(command, **options):
    return asyncio.run(process(command, **options))


def children():
    """The processes whose parent this one is, zombies too."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = file.read_text().partition(" (")
            if int(rest.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(pid))
    return found


def alive(pid):
    """Whether the process is there and no zombie of somebody else."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def soon(condition, seconds=5.0):
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return true


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def leaves_nothing():
    """No test of this file leaves a child or an open file behind."""
    before, files = children(), open_files()
    yield
    assert soon(lambda: set(children()) <= set(before), 2), "children are left"
    assert open_files() <= files, "files are left open"


# How a child ends

ENDINGS = [  # command line -> exit code or signal, output
    ("true", 0, ""),
    ("false", 1, ""),
    ("exit 255", 255, ""),
    ("echo out; echo err >&2", 0, "out\nerr\n"),
    ("echo before; exit 3", 3, "before\n"),
    ("nosuchcommand", 127, None),
    ("echo 'unclosed", 2, None),
    ("kill -KILL $$", -signal.SIGKILL, ""),
    ("echo hi; kill -SEGV $$", -signal.SIGSEGV, "hi\n"),
    ("kill -34 $$", -34, ""),
    ("trap 'echo bye; exit 7' TERM; kill $$", 7, "bye\n"),
    ("exec echo replaced", 0, "replaced\n"),
    ("yes | head -1", 0, "y\n"),
    ("set -o pipefail; yes | head -1", 141, "y\n"),
    ("cat", 0, ""),
    ("read line || echo no input", 0, "no input\n"),
    ("readlink /proc/self/fd/0", 0, "/dev/null\n"),
    ("test -t 0 || test -t 1 || echo no terminal", 0, "no terminal\n"),
    ("(: >/dev/tty) 2>/dev/null || echo no tty", 0, "no tty\n"),
    ("exec >&- 2>&-; sleep 0.05; exit 4", 4, ""),
    ("( sleep 0.05; echo late ) | cat", 0, "late\n"),
    ("echo a > >(cat)", 0, "a\n"),
    ("printf 'no newline'", 0, "no newline"),
    ("pwd", 0, "/\n"),
    ("ls /proc/self/fd | wc -l", 0, "4\n"),
    ("ulimit -c 0; exit 5", 5, ""),
]


@pytest.mark.parametrize(("command", "code", "output"), ENDINGS)
def test_how_a_child_ends(command, code, output):
    outcome = sh(command)
    assert (outcome.code, outcome.timed_out) == (code, False)
    assert output is None or outcome.output == output


def test_it_is_the_leader_of_its_own_session_and_group():
    pid, group, session = sh("echo $$; ps -o pgid= -o sid= -p $$ | tr -s ' ' '\\n' | grep .").output.split()
    assert pid == group == session != str(os.getpid())


def test_standard_input_is_what_is_given():
    assert sh("cat", stdin="가나\n" * 100_000).output.startswith("가나\n")
    assert sh("wc -c", stdin="x" * 1_000_000).output.strip() == "1000000"
    assert sh("head -1; exit 2", stdin="one\ntwo\n")[:2] == ("one\n", 2)
    assert sh("cat", stdin="half \ud800").output == "half ?"


# What cannot be started


def cannot(**options):
    with pytest.raises(ToolError) as caught:
        sh(options.pop("command", "true"), **options)
    return str(caught.value)


def test_what_cannot_be_started():
    assert "No such file" in cannot(cwd=Path("/no/such/folder"))
    assert "/no/such/folder" in cannot(cwd=Path("/no/such/folder"))
    assert "Not a directory" in cannot(cwd=Path("/etc/passwd"))
    assert "null byte" in cannot(command="echo a\0b")
    assert "No such file" in cannot(shell="/no/bash")
    assert "Permission denied" in cannot(shell="/etc/passwd")
    assert "environment variable name" in cannot(env={"A=B": "x"})
    assert "null byte" in cannot(env={"A": "x\0"})
    assert "too long" in cannot(command="x" * 200_000)
    assert cannot(command="echo \ud800")


# Time


def test_a_timeout_keeps_what_was_printed():
    outcome = sh("echo first; sleep 1000; echo never", timeout=0.3)
    assert outcome.timed_out
    assert outcome.output == "first\n"


STUBBORN = [  # command lines that do not go when asked; all say which processes there are
    "trap '' TERM; echo $$; sleep 1000 & echo $!; wait; sleep 1000",
    "trap '' TERM; (echo $BASHPID; sleep 1000; sleep 1000) & echo $$; while :; do sleep 0.05; done",
    "( trap '' TERM; echo $BASHPID; while :; do sleep 0.05; done ) & echo $$; wait",
    "trap '' TERM HUP INT; nohup sleep 1000 >/dev/null 2>&1 & echo $!; disown; echo $$; sleep 1000",
    "echo $$; kill -STOP $$",
]


def test_a_timeout_ends_the_whole_group():
    async def all_at_once():
        return await asyncio.gather(*(process(command, timeout=0.5) for command in STUBBORN))

    for command, outcome in zip(STUBBORN, asyncio.run(all_at_once()), strict=True):
        assert outcome.timed_out, command
        pids = outcome.output.split()
        assert pids, command
        assert soon(lambda pids=pids: not any(map(alive, pids))), command


def test_a_child_that_tidies_up_when_asked_has_time_for_it():
    outcome = sh("trap 'sleep 0.3; echo tidied; exit 0' TERM; echo on; sleep 1000 & wait", timeout=0.3)
    assert (outcome.output, outcome.timed_out) == ("on\ntidied\n", True)


LEFT_RUNNING = [
    "sleep 1000 & echo hi $!",
    "nohup sleep 1000 & disown; echo hi $!",
    "(sleep 1000 & echo hi $!)",
    "(trap '' TERM HUP; exec sleep 1000) & echo hi $!",
    "exec 3>&1; sleep 1000 & echo hi $! >&3",
    "bash -c 'sleep 1000 & echo hi $!; disown'",
]


@pytest.mark.parametrize("command", LEFT_RUNNING)
def test_it_returns_with_its_leader_and_what_it_left_running_is_gone(command):
    outcome = sh(command, timeout=60)
    word, pid = outcome.output.split()[-2:]
    assert (outcome.code, outcome.timed_out, word) == (0, False, "hi")
    assert soon(lambda: not alive(pid))


def test_what_left_its_group_does_not_keep_us():
    """A daemon may leave the group; nobody waits for it although it holds the pipe."""
    outcome = sh("setsid sleep 30 & echo hi $!", timeout=20)
    assert outcome.output.startswith("hi")
    assert not outcome.timed_out
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(outcome.output.split()[1]), signal.SIGKILL)


# Output


def expected(text, limit):
    return openpista.head_and_tail(text, limit)


@given(
    st.lists(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), max_size=30),
    st.integers(1, 60),
)
@settings(deadline=None)
def test_capture_is_the_same_in_any_portions(portions, limit):
    capture = Capture(limit)
    for portion in portions:
        capture.feed(portion)
    text = b"".join(portions).decode("utf-8", "replace")
    assert capture.text() == expected(text, limit)
    assert capture.total == len(text)


@pytest.mark.parametrize("limit", [1, 2, 3, 200, 10_001])
def test_capture_of_much(limit):
    capture, text = Capture(limit), ""
    for number in range(300):
        portion = f"{number} {'가a' * 300}\n"
        text += portion
        capture.feed(portion.encode())
        assert len(capture._head) + len(capture._tail) <= limit + (64 << 10) + 2 * Capture.MARGIN + 1000
    assert capture.text() == expected(text, limit)


@pytest.mark.parametrize("start", [*range(60, 110), *range(350, 410)])
def test_a_cut_leaves_no_half_of_a_secret(start):
    secret = "canary-0123456789-canary"
    redact = openpista.Redactor([secret])
    text = ("." * start + secret).ljust(470, ".")
    for size in (1, 7, 1_000):
        capture = Capture(200, redact.cover)
        for i in range(0, len(text), size):
            capture.feed(text[i : i + size].encode())
        shown = redact(capture.text())
        assert "270 characters left out" in shown
        assert not any(secret[i : i + 3] in shown for i in range(len(secret) - 3))


def test_utf8_is_split_anywhere():
    data = "한국어 👍 é\n".encode() * 3
    for size in range(1, 7):
        capture = Capture(1000)
        for i in range(0, len(data), size):
            capture.feed(data[i : i + size])
        assert capture.text() == data.decode()


def test_any_bytes_are_accepted():
    assert sh(r"printf '\xff\x00a\xc3'").output == "�\0a�"
    assert sh(r"printf '\xed\x95'; sleep 0.05; printf '\x9c'").output == "한"
    assert len(sh("head -c 100000 /dev/urandom", limit=500).output) < 600


def test_long_output_says_exactly_how_much_is_missing():
    assert sh("seq 1 100000", limit=1000).output == expected("".join(f"{i}\n" for i in range(1, 100_001)), 1000)
    assert sh("printf %1000d 7", limit=1000).output == " " * 999 + "7"
    assert "1 characters left out" in sh("printf %1001d 7", limit=1000).output


MEMORY = """
import asyncio, os, resource
from pathlib import Path
from openpista import run_process
def run(size):
    return asyncio.run(run_process(["bash", "-c", f"yes 0123456789 | head -c {size}"], cwd=Path("/"), env=os.environ,
                                   timeout=60, limit=10_000))
run(1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcome = run(30_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(outcome.output), "29,990,000" in outcome.output)
"""


def test_30_mb_of_output_cost_little_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    kilobytes, length, said = done.stdout.split()
    assert int(kilobytes) < 8_000
    assert int(length) < 10_100
    assert said == "True"


def test_the_loop_stays_free_while_much_is_read():
    """What prints without end must neither stop other work nor outlive its time."""

    async def both():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        outcome = await process("yes", timeout=0.5)
        ticking.cancel()
        return outcome, ticks

    outcome, ticks = asyncio.run(both())
    assert outcome.timed_out
    assert ticks >= 5


def test_a_child_that_left_its_group_and_session_is_ended_too(tmp_path):
    hidden = f"setsid sleep 995 & setsid bash -c 'echo $$ >{tmp_path}/pids; (sleep 996 & echo $! >>{tmp_path}/pids; sleep 997)' & sleep 0.3; echo hi"
    outcome = asyncio.run(process(hidden))
    assert outcome.output == "hi\n" and outcome.code == 0
    assert len(pids_in(tmp_path)) == 2 and soon(lambda: not any(map(alive, pids_in(tmp_path))))
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not {"sleep 995", "sleep 996", "sleep 997"} & set(shown.splitlines())


# Cancelling, and many at once


def pids_in(folder):
    return [pid for file in folder.glob("pids*") for pid in file.read_text().split()]


def test_cancelling_kills_the_groups(tmp_path):
    async def cancelled():
        runs = [process(f"exec 2>&1 >{tmp_path}/pids{i}; {STUBBORN[i]}") for i in range(3)]
        task = asyncio.gather(*runs)
        while len(pids_in(tmp_path)) < 6:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(2.5)  # the other two of a gather end a little later

    asyncio.run(cancelled())
    assert soon(lambda: not any(map(alive, pids_in(tmp_path))))


def test_cancelling_twice_leaves_nothing_either(tmp_path):
    async def cancelled():
        task = asyncio.create_task(process(f"trap '' TERM; echo $$ >{tmp_path}/pid; sleep 1000; sleep 1000"))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert soon(lambda: not alive((tmp_path / "pid").read_text().strip()))


def test_cancelling_at_any_moment():
    async def cancelled():
        for pause in (0, 0, 0.001, 0.005, 0.02):
            task = asyncio.create_task(process("echo hi; sleep 0.01"))
            await asyncio.sleep(pause)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.sleep(0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(cancelled()) == []


def test_fifty_runs_leave_no_file_open():
    async def many():
        await process("true")
        before = open_files()
        for _ in range(50):
            await process("echo hi")
        with pytest.raises(ToolError):
            await process("true", cwd=Path("/no/such"))
        return open_files() - before

    assert asyncio.run(many()) == 0


def test_twenty_side_by_side():
    async def many():
        return await asyncio.gather(*(process(f"sleep 0.2; echo {i}; exit {i}", timeout=30) for i in range(20)))

    assert [(o.output, o.code) for o in asyncio.run(many())] == [(f"{i}\n", i) for i in range(20)]


# Other systems, played by a child of its own

OTHER_SYSTEMS = [  # what the system lacks
    ("no pidfd", "del os.pidfd_open"),
    (
        "a kernel before 5.3",
        "def refused(pid): raise OSError(errno.ENOSYS, 'Function not implemented')\nos.pidfd_open = refused",
    ),
    ("macOS before Python 3.13", "del os.pidfd_open, os.waitid"),
]
ON_IT = """
import asyncio, errno, os
from pathlib import Path
from openpista import run_process
{lacks}
where = {{"cwd": Path("/"), "env": os.environ}}
run = lambda command: asyncio.run(run_process(["bash", "-c", command], timeout=1, limit=100, **where))
print(run("sleep 0.02; echo hi; exit 3"))
print(run("sleep 1000 & echo $!").output)
"""


@pytest.mark.parametrize("lacks", [pytest.param(case[1], id=case[0]) for case in OTHER_SYSTEMS])
def test_on_other_systems(lacks):
    done = subprocess.run([sys.executable, "-c", ON_IT.format(lacks=lacks)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    outcome, pid = done.stdout.strip().splitlines()
    assert outcome == str(openpista.Outcome("hi\n", 3))
    assert soon(lambda: not alive(pid))


# In the background

PARENT = """
import os, sys
from pathlib import Path
from openpista import start_in_background
print(start_in_background(sys.argv[1], sys.argv[2], cwd=Path("/"), env=os.environ, log_path=Path(sys.argv[3])))
"""


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_background_lives_on_after_its_parent(tmp_path, shell):
    log = tmp_path / "jobs" / "1.log"
    command = f"umask; readlink /proc/self/fd/0; echo begun; sleep 0.3; echo $PPID; touch {tmp_path}/end; sleep 1000"
    argv = [sys.executable, "-c", PARENT, shutil.which(shell), command, str(log)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    try:
        assert soon((tmp_path / "end").exists)
        assert "begun" in log.read_text()
        assert "/dev/null" in log.read_text()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
        assert os.getpgid(pid) == pid
        assert os.getpgid(0) != pid
        assert pid not in children()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def background(command, tmp_path, **options):
    where = {"cwd": tmp_path, "env": os.environ, "log_path": tmp_path / "log"} | options
    return start_in_background(BASH, command, **where)


def test_background_ends_without_a_zombie_of_ours(tmp_path):
    pid = background("echo done; exit 3", tmp_path)
    assert soon(lambda: (tmp_path / "log").read_text() == "done\n")
    assert soon(lambda: not alive(pid))
    assert pid not in children()


def test_background_works_in_its_folder_with_its_environment(tmp_path):
    background('echo "$PWD $SAYS"', tmp_path, env={"PATH": os.environ["PATH"], "SAYS": "hi; $(no) 'x'"})
    assert soon(lambda: (tmp_path / "log").read_text() == f"{tmp_path} hi; $(no) 'x'\n")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("true", {"cwd": Path("/no/such")}),
        ("a\0b", {}),
        ("x" * 200_000, {}),
        ("true", {"log_path": Path("/proc/nowhere/log")}),
        ("true", {"log_path": Path("/")}),
    ],
)
def test_background_that_cannot_be_started(tmp_path, command, options):
    with pytest.raises(ToolError, match="in the background"):
        background(command, tmp_path, **options)


# What a child may know

SECRETS = """OPENAI_API_KEY ANTHROPIC_API_KEY apikey TELEGRAM_BOT_TOKEN GH_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
CLIENT_SECRET DB_PASSWORD PGPASSWORD MYSQL_PASSWD SSH_PRIVATE_KEY MY_CREDENTIALS OPENPISTACRAB_API_KEY my_token
DJANGO_SECRET_KEY SECRET_KEY_BASE NPM_AUTH_TOKEN""".split()
PLAIN = "PATH HOME LANG EDITOR TOKENS SECRETARY KEYBOARD SSH_AUTH_SOCK MONKEY TOKENIZERS_PARALLELISM".split()


@pytest.mark.parametrize("name", SECRETS)
def test_what_is_named_like_a_secret_stays_here(name):
    assert name not in child_environment({name: "x"}, (), Redactor())
    assert child_environment({name: "x"}, (name,), Redactor())[name] == "x"


@pytest.mark.parametrize("name", PLAIN)
def test_the_rest_of_the_environment_goes_along(name):
    assert child_environment({name: "x"}, (), Redactor())[name] == "x"


def test_values_that_hold_a_loaded_secret_stay_here():
    environ = {"URL": "https://me:hunter2hunter2@host", "A": "hunter2hunter2", "B": "sk-" + "a" * 30, "C": "plain"}
    there = child_environment(environ, (), Redactor(["hunter2hunter2"]))
    assert there == openpista.QUIET | {"C": "plain"}
    assert "URL" in child_environment(environ, ("URL",), Redactor(["hunter2hunter2"]))


def test_nothing_asks_pages_or_colours():
    environ = {"PAGER": "less", "TERM": "xterm-256color", "GIT_TERMINAL_PROMPT": "1"}
    assert child_environment(environ, (), Redactor()) == openpista.QUIET
    assert child_environment(environ, ("TERM",), Redactor())["TERM"] == "xterm-256color"


def test_a_child_does_not_see_the_secrets(tmp_path):
    environ = dict(os.environ) | {"OPENAI_API_KEY": "canary-123456", "OTHER": "canary-123456"}
    env = child_environment(environ, (), Redactor(["canary-123456"]))
    assert "canary" not in sh("env; cat /proc/$$/environ", env=env).output


def test_bash_else_sh(tmp_path):
    code = "from openpista import find_shell; print(find_shell())"

    def found(path):
        env = {"PATH": str(path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert found(Path(BASH).parent) == BASH
    assert found(tmp_path) == "/bin/sh"
    (tmp_path / "sh").symlink_to("/bin/sh")
    assert found(tmp_path) == str(tmp_path / "sh")
    assert sh("echo hi", shell=str(tmp_path / "sh")).output == "hi\n"
