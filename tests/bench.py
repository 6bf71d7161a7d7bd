"""Measures openpista against its goals (DESIGN.md, section 11) and prints a table.

    python tests/bench.py [--short] [--universal] [--python PATH]... [row ...]

It builds the archive and runs it in fresh homes, in a clean environment. What is compared is measured side by side,
in pairs of runs, one after the other. A ratio is the median of the pairs' ratios, with their quartiles in brackets; a
time is CPU time (user and system, of the process and its children) unless it says wall. No time makes it fail: the
exit code is 1 only when a row could not be measured.

Add a row:   a generator of Rows under @row; what it needs of the world is in Lab.
"""

import argparse
import contextlib
import filecmp
import functools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from fakes import ModelServer

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds that one run may take; a build ten times as long


class Broken(Exception):
    """A row cannot be measured; the text says why."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figure: str = ""
    beside: str = ""
    ratio: str = ""
    goal: str = ""
    reached: bool | None = None  # None: not measured, or no goal


ROWS: dict[str, Callable[["Lab"], Iterator[Row]]] = {}
LATER = (
    Row("exec to ready, with QUIC, Telegram and cron", "", "nanobot 2.5 s", "", "<= 0.6 s"),
    Row("the same: idle memory; idle CPU", "", "nanobot 95 MiB; 0.5 %", "", "50 MiB; 0.1 %"),
    Row("Telegram message to final answer", "", "nanobot 0.44 s", "", "<= 0.1 s"),
    Row("gateway ping, p50; 64 in flight, rate", "", "a bare aioquic echo", "", "<= 1.3; >= 1.7"),
    Row("connect -e, RTT 50 ms: first; second time", "", "a TLS WebSocket", "", "<= 0.6; 0.35"),
    Row("50 requests beside a large reply: p50; p99", "", "a TLS WebSocket", "", "<= 0.2; 250 ms"),
    Row("idle connection; flood of Initials: memory", "", "TLS WebSocket 290 KB", "", "90 KB; 5 MB"),
    Row("kill -9, 200 times: lost; repeated; missing", "", "", "", "0; 0; 0"),
)


def row(name: str) -> Callable:
    """Makes a function a row that the command line can name."""
    return lambda measure: ROWS.setdefault(name, measure)


# ===== 1. Processes ===========================================================
#
# A peak of memory is never below that of the process that forked, so this one
# stays small: whatever needs openpista or much memory is a child.


class Cost(NamedTuple):
    """What a process and its children took."""

    cpu: float  # seconds
    wall: float  # seconds
    peak: float  # MiB, of the largest of them


T = TypeVar("T")
Run = Callable[[], Cost]
Pairs = list[tuple[Cost, Cost]]


def spend(argv: list, env: dict[str, str], cwd: Path, expect: str = "") -> Cost:
    """Runs a process to its end; Broken if it fails or does not print what is expected."""
    with tempfile.TemporaryFile() as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        started = time.perf_counter()
        process = subprocess.Popen(argv, env=env, cwd=cwd, **streams)
        try:
            signal.alarm(LIMIT)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            signal.alarm(0)
            end(process)
        wall = time.perf_counter() - started
        output.seek(0)
        said = output.read().decode("utf-8", "replace").strip()
    if process.returncode or expect not in said:
        last = said.rpartition("\n")[2] or "it printed nothing"
        raise Broken(f"`{' '.join(map(str, argv))[-60:]}` ended with {process.returncode}: {last}")
    return Cost(used.ru_utime + used.ru_stime, wall, used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1024))


def stop(number: int, _: object) -> None:
    """An alarm ends one row, another signal the whole."""
    raise Broken(f"a process took more than {LIMIT} s") if number == signal.SIGALRM else SystemExit(128 + number)


def end(process: subprocess.Popen) -> None:
    """Ends a process that is still there; TERM first, so that it can end its own children."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def pairs(count: int, one: Callable[[], T], other: Callable[[], T]) -> list[tuple[T, T]]:
    """Both, so many times, in alternating order, after one run each that only warms up."""
    one(), other()
    return [(one(), other()) if number % 2 else (other(), one())[::-1] for number in range(count)]


def middle(costs: Pairs, side: int, field: str) -> float:
    """The median of one side of the pairs."""
    return statistics.median(getattr(pair[side], field) for pair in costs)


def compared(what: str, costs: Pairs, beside: str, goal: float = 0.0, field: str = "cpu") -> Row:
    """The row of a comparison of times."""
    mine, theirs = middle(costs, 0, field) * 1000, middle(costs, 1, field) * 1000
    ratios = [getattr(one, field) / getattr(other, field) for one, other in costs]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    limit = (f"<= {goal}", median <= goal) if goal else ()
    return Row(what, f"{mine:.0f} ms", f"{beside} {theirs:.0f} ms", f"{median:.2f} ({low:.2f}-{high:.2f})", *limit)


class Screen:
    """A process on a pseudo-terminal."""

    def __init__(self, argv: list, env: dict[str, str], cwd: Path):
        self.ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        own = functools.partial(os.login_tty, theirs)
        self.process = subprocess.Popen(argv, env=env, cwd=cwd, preexec_fn=own, pass_fds=(theirs,))
        os.close(theirs)
        self.seen = b""  # since the last keys

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        os.close(self.ours)

    def type(self, keys: str) -> float:
        """When the keys were pressed."""
        self.seen, now = b"", time.perf_counter()
        os.write(self.ours, keys.encode())
        return now

    def wait(self, words: str) -> float:
        """When these words came; they must come in one piece."""
        while words.encode() not in self.seen:
            if not select.select([self.ours], [], [], LIMIT)[0]:
                raise Broken(f"{words!r} did not come within {LIMIT} s")
            try:
                self.seen += os.read(self.ours, 65_536)
            except OSError:  # nobody has the terminal any more
                raise Broken(f"it ended before {words!r} came: {self.seen[-200:]!r}") from None
        return time.perf_counter()

    def rest(self, seconds: float) -> None:
        """Let pass what comes until nothing has come for so long."""
        while select.select([self.ours], [], [], seconds)[0]:
            os.read(self.ours, 65_536)


# ===== 2. The laboratory ======================================================


class Lab(contextlib.ExitStack):
    """The archive, homes to run it in, and a scripted model; all of it under one temporary folder."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.short, self.universal, self.pythons = options.short, options.universal, options.python
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="openpista-bench-")))
        self.env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "XDG_CACHE_HOME": str(self.folder / "cache")}

    def build(self, name: str, *options: str) -> Path:
        """An archive; its builder may use the network and pip's settings, so it gets the whole environment."""
        path = self.folder / name
        argv = [sys.executable, ROOT / "build_zipapp.py", "--output", path, *options]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10 * LIMIT)
        if done.returncode:
            raise Broken(done.stderr.strip().rpartition("\n")[2] or "build_zipapp.py failed")
        return path

    @functools.cached_property
    def archive(self) -> Path:
        """The archive for this platform."""
        return self.build("openpista.pyz")

    @functools.cached_property
    def packages(self) -> dict[str, str]:
        """What lets a Python import openpista and its packages: from where the archive has unpacked them."""
        self.start("plain", self.archive, "skills", "list")()
        return {"PYTHONPATH": str(next(self.folder.glob("cache/openpista/*/openpista.py")).parent)}

    @functools.cached_property
    def model(self) -> ModelServer:
        """A scripted model."""
        return self.enter_context(ModelServer())

    def home(self, name: str) -> dict[str, str]:
        """The environment of a home; the folder is new when its name is."""
        folder = self.folder / "homes" / name
        folder.mkdir(parents=True, exist_ok=True)
        return self.env | {"HOME": str(folder), "OPENPISTA_HOME": str(folder / ".openpista")}

    def start(self, home: str, *words: str | Path, expect: str = "", **env: str) -> Run:
        """A run of this Python."""
        return functools.partial(spend, [sys.executable, *words], self.home(home) | env, self.folder, expect)

    def ask(self, home: str, *words: str, command: str = "echo o''k-done", result: str = "ok-done") -> Run:
        """A `run -e` in which the model calls for one command, is shown its result, and answers."""
        env = {"OPENAI_API_KEY": "test-key-123456", "OPENAI_BASE_URL": self.model.url}
        words = ("run", "--yes", "-e", "Do what is to be done.", *words)
        run = self.start(home, self.archive, *words, expect="It is done.", **env)
        call = {"tool_calls": [{"name": "system_run", "arguments": {"command": command}}]}
        script = functools.partial(self.model.script, call, {"text": "It is done.", "expect": result})
        return lambda: (script(), run())[1]

    def httpx(self) -> Run:
        """`import httpx` in a virtual environment: this one's, or a new one with the requirements."""
        code, venv = ["-c", "import httpx"], self.folder / "venv"
        with contextlib.suppress(Broken):
            self.start("plain", *code)()
            return self.start("plain", *code)
        python = venv / "bin" / "python"
        spend([sys.executable, "-m", "venv", venv], dict(os.environ), self.folder)
        spend([python, "-m", "pip", "install", "-qr", ROOT / "requirements.txt"], dict(os.environ), self.folder)
        return functools.partial(spend, [python, *code], self.home("plain"), self.folder)


# ===== 3. The rows ============================================================


@row("archive")
def measure_archive(lab: Lab) -> Iterator[Row]:
    """How large the archive is, and whether two builds give the same bytes."""
    rust = "Rust 10 MB each"
    for name, beside, theirs, goal in (("one platform", "shiv 6.14 MB", 6.14, 4.5), ("universal", rust, 50, 18)):
        options = ["--universal"] if name == "universal" else []
        if options and not lab.universal:
            yield Row("archive, universal", "not asked", "", "", f"<= {goal} MB")
            continue
        path = lab.build("universal.pyz", *options) if options else lab.archive
        # In portions: a child's peak of memory counts from that of the process that forked it.
        same = lab.short or filecmp.cmp(lab.build("again.pyz", *options), path, shallow=False)
        twice = "" if lab.short else ", twice: the same" if same else ", twice: NOT THE SAME"
        size = path.stat().st_size / 1e6
        figures = f"{size:.2f} MB", beside, f"{size / theirs:.2f}", f"<= {goal} MB"
        yield Row(f"archive, {name}{twice}", *figures, same and size <= goal)


@row("version")
def measure_version(lab: Lab) -> Iterator[Row]:
    """The quickest command beside an interpreter that does nothing."""
    for python in (sys.executable, *lab.pythons):
        run = functools.partial(spend, env=lab.home("plain"), cwd=lab.folder)
        version = functools.partial(run, [python, lab.archive, "--version"], expect="openpista ")
        costs = pairs(20 if lab.short else 50, version, functools.partial(run, [python, "-c", "pass"]))
        name = subprocess.run([python, "-V"], capture_output=True, text=True).stdout.strip()
        yield compared(f"--version, {name}", costs, "python -c pass", 2.0 if "3.11." in name else 1.6)


@row("run")
def measure_run(lab: Lab) -> Iterator[Row]:
    """A request with one tool call beside its largest import; its memory; how much the provider is sent at first."""
    costs = pairs(9 if lab.short else 25, lab.ask("one-call"), lab.httpx())
    yield compared("run -e with one tool call", costs, "import httpx", 2.0)
    peak, size = middle(costs, 0, "peak"), lab.model.requests()[0]["size"]
    figures = f"{peak:.1f} MiB", "nanobot 116 MiB", f"{peak / 116:.2f}"
    yield Row("the same: peak memory", *figures, "<= 50 MiB", peak <= 50)
    figures = f"{size:,} bytes", "nanobot 31,854 bytes", f"{size / 31_854:.2f}"
    yield Row("its first request: system prompt and tools", *figures, "<= 6,000 bytes", size <= 6_000)


@row("output")
def measure_output(lab: Lab) -> Iterator[Row]:
    """What the output of a command costs in memory when there is far too much of it."""
    count = 30 if lab.short else 300
    much = lab.ask("output", command=f"yes | head -c {count}000000", result="characters left out")
    costs = pairs(2 if lab.short else 3, much, lab.ask("output", command="echo o''k", result="ok"))
    most, least = middle(costs, 0, "peak"), middle(costs, 1, "peak")
    figures = f"{most - least:.1f} MiB", f"3 bytes: peak {least:.1f} MiB", f"{most / least:.2f}"
    yield Row(f"output of {count} MB: growth of peak memory", *figures, "<= 20 MiB", most - least <= 20)


FILL = """
import pathlib, sys, openpista
count = int(sys.argv[2])
with openpista.Store(pathlib.Path(sys.argv[1])) as store:
    session = store.session("talk")
    store.db.execute('''
        WITH RECURSIVE number(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM number WHERE i < ?)
        INSERT INTO messages (session_id, role, text, created_at)
        SELECT ?, iif(i % 2, 'user', 'assistant'), 'This is message ' || i || ' of a conversation.',
               '2026-01-01T00:00:00.000Z' FROM number''', (count, session.id))
    store.summarise(session, count - 100, "They spoke of this and that.")
"""


@row("million")
def measure_million(lab: Lab) -> Iterator[Row]:
    """A turn at the end of a very long session, all but its last 100 messages summarised, as openpista leaves them."""
    count = 50_000 if lab.short else 1_000_000
    for home, size in (("long", count), ("short", 100)):
        database = Path(lab.home(home)["OPENPISTA_HOME"]) / "memory.db"
        lab.start(home, "-c", FILL, database, str(size), **lab.packages)()
    long, short = (lab.ask(home, "--session", "talk") for home in ("long", "short"))
    costs = pairs(5 if lab.short else 15, long, short)
    yield compared(f"a turn in a session of {count:,} messages", costs, "of 100:", 1.5)
    yield compared("the same, wall time", costs, "of 100:", 1.5, "wall")


@row("skills")
def measure_skills(lab: Lab) -> Iterator[Row]:
    """What many skills cost at the start."""
    for number in range(200):
        folder = Path(lab.home("skilled")["OPENPISTA_HOME"]) / "workspace" / "skills" / f"skill-{number}"
        folder.mkdir(parents=True)
        head = (
            f"---\nname: skill-{number}\ndescription: Does thing {number}. Use it when thing {number} is wanted.\n---\n"
        )
        (folder / "SKILL.md").write_text(head + "Read this, then do it.\n" * 40)
    words = (lab.archive, "run", "--provider", "offline", "-e", "hello")
    many, none = (lab.start(home, *words, expect="offline") for home in ("skilled", "unskilled"))
    yield compared("run -e with 200 skills, no model", pairs(5 if lab.short else 15, many, none), "none:")


BARE = """
import asyncio, json, sys, time, httpx

async def ask(client, wanted):
    seen, took, started = b"", 0.0, time.perf_counter()
    async with client.stream("POST", wanted["url"], json=wanted["body"], headers=wanted["headers"]) as response:
        async for data in response.aiter_raw():
            seen += data
            if not took and b"Zebra" in seen:
                took = time.perf_counter() - started
    return took

async def main():
    for line in sys.stdin:
        wanted = json.loads(line)
        if wanted["new"]:
            client = httpx.AsyncClient(verify=False, timeout=60)
        print(await ask(client, wanted), flush=True)

asyncio.run(main())
"""


@row("chat")
def measure_chat(lab: Lab) -> Iterator[Row]:
    """From Enter on a terminal to the answer's first character, beside a warm client that streams the same."""
    key, argv = "test-key-123456", [sys.executable, lab.archive, "tui"]
    home = lab.home("chat") | {"TERM": "xterm-256color", "OPENAI_API_KEY": key, "OPENAI_BASE_URL": lab.model.url}
    # The answer begins 0.1 s after the request; its pieces are 30 ms apart, so that the first comes alone.
    answer = {"text": "Zebras run far. " * 3, "deltas": 3, "delay": 0.1, "pace": 0.03}
    bare = {"url": f"{lab.model.url}/chat/completions", "headers": {"authorization": f"Bearer {key}"}}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def ask(screen: Screen) -> float:
        lab.model.script(answer)
        screen.type("What runs?")
        screen.wait("What runs?")
        screen.rest(0.1)
        pressed = screen.type("\r")
        took = screen.wait("Zebra") - pressed
        screen.wait("0 tool calls")
        screen.rest(0.1)
        return took

    def ask_first() -> float:
        with Screen(argv, home, lab.folder) as screen:
            screen.wait("new session")
            screen.rest(0.5)  # nobody types sooner
            return ask(screen)

    def ask_bare(new: bool) -> float:
        body = lab.model.requests()[-1]["body"]
        lab.model.script(answer)
        client.stdin.write(json.dumps(bare | {"body": body, "new": new}) + "\n")
        client.stdin.flush()
        if took := float(client.stdout.readline() or 0):
            return took
        raise Broken("the bare client got no answer")

    with subprocess.Popen([sys.executable, "-c", BARE], env=lab.home("plain") | lab.packages, **pipes) as client:
        first = pairs(3 if lab.short else 15, ask_first, functools.partial(ask_bare, True))
        with Screen(argv, home, lab.folder) as screen:
            screen.wait("new session")
            later = pairs(7 if lab.short else 40, functools.partial(ask, screen), functools.partial(ask_bare, False))
    for what, found in (("Enter to first character, wall: first turn", first), ("the same, later turns", later)):
        added = statistics.median(one - other for one, other in found) * 1000
        beside = f"bare httpx {statistics.median(other for _, other in found) * 1000:.0f} ms"
        yield Row(what, f"adds {added:.3g} ms", beside, f"median of {len(found)}", "<= 20 ms", added <= 20)


PICK = """
import itertools, json, sys, time, openpista as pista
makers = "anthropic openai google meta-llama mistralai qwen deepseek x-ai moonshotai z-ai".split()
families = "claude-sonnet gpt-codex gemini-flash llama-instruct codestral coder-plus chat-large kimi-code".split()
names = (f"{maker}/{family}-{version}.{minor}" for version, minor, maker, family in
         itertools.product(range(1, 26), range(5), makers, families))
rows = [{"id": name, "context_length": 200_000, "pricing": {"prompt": "0.000001", "completion": "0.000004"}}
        for name in itertools.islice(names, int(sys.argv[1]))]
models = pista.arranged("openrouter", pista.parse_models("openrouter", json.dumps({"data": rows}).encode()))
size, style = (120, 40), pista.Style(True)
choices = [pista.model_choice(info, "openrouter", "openai/gpt-4o", "all") for info in models]
picker = pista.Picker("Models", choices, heads=pista.MODEL_HEADS, actions={"r": "refresh"})
painter = pista.Painter(lambda text: None, inline=False)

def press(name, text=""):
    started = time.process_time()
    picker.press(pista.KeyPress(name, text))
    lines, cursor = picker.lines(*size, style)
    painter.paint(lines, size, cursor)
    return (time.process_time() - started) * 1000

def typed(words):
    press("text", "/")
    times = [press("text", letter) for letter in words] + [press("backspace") for _ in words]
    press("escape")
    return times

words = ("codex", "openai gpt-codex-7", "sonnet", "25", "e", "nothing has this name", "moonshotai/kimi")
rounds = int(sys.argv[2])
print(json.dumps({
    "count": len(choices),
    "typing": [took for _ in range(rounds) for word in words for took in typed(word)],
    "arrows": [press(name) for name in ["down"] * 60 * rounds + ["up"] * 60 * rounds],
    "pages": [press(name) for _ in range(rounds) for name in ["pagedown"] * 20 + ["end"] + ["pageup"] * 20 + ["home"]],
}))
"""


@row("picker")
def measure_picker(lab: Lab) -> Iterator[Row]:
    """What a keystroke in a long list of models takes until it is painted; no terminal takes part."""
    argv = [sys.executable, "-c", PICK, "10000", "2" if lab.short else "10"]
    env = lab.home("plain") | lab.packages
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT, check=True)
    found = json.loads(done.stdout)
    for keys, what in (("typing", "letters in the search"), ("arrows", "arrows"), ("pages", "PgDn, PgUp, Home, End")):
        median, p99 = statistics.median(found[keys]), statistics.quantiles(found[keys], n=100, method="inclusive")[-1]
        figures = f"{median:.2f} ms", f"p99 {p99:.2f} ms", f"median of {len(found[keys]):,}"
        yield Row(f"{found['count']:,} models: {what}", *figures, "<= 5 ms", p99 <= 5)


# ===== 4. Command =============================================================

HEAD = Row("what", "figure", "beside", "ratio", "goal")
WIDTHS = (44, 13, 24, 17, 15)  # and 7 for the last column: 120


def show(row: Row) -> None:
    """Prints a line of the table."""
    reached = "reached" if row is HEAD else {True: "yes", False: "NO", None: "-"}[row.reached]
    cells = (f"{cell:<{width - 1}} " for cell, width in zip(row, WIDTHS, strict=False))
    print("".join(cells) + reached, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures openpista against its goals.")
    parser.add_argument("--short", action="store_true", help="smaller and fewer: less than a minute")
    parser.add_argument("--universal", action="store_true", help="also build the archive for all platforms, twice")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="--version with this one too")
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all unless told")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, stop)
    started, broken = time.monotonic(), 0
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    show(HEAD)
    with Lab(options) as lab:
        for name in options.rows or ROWS:
            try:
                for found in ROWS[name](lab):
                    show(found)
            except (Broken, OSError, ValueError, subprocess.SubprocessError) as error:
                broken += 1
                print(f"{name}: could not be measured: {error}", flush=True)
    if not options.rows:
        print("\nThese come with the daemon:")
        for later in LATER:
            show(later)
    print(
        f"\nA ratio is the median of the pairs' (and their quartiles); a time is CPU time. It took {time.monotonic() - started:.0f} s."
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
