"""Measures openpista against its goals (DESIGN.md, section 11) and prints a table.

    python tests/bench.py [--short] [--universal] [--python PATH]... [row ...]

It builds the archive and runs it in fresh homes, in a clean environment. What is compared is measured side by side,
in pairs of runs, one after the other. A ratio is the median of the pairs' ratios, with their quartiles in brackets; a
time is CPU time (user and system, of the process and its children) unless it says wall. No time makes it fail: the
exit code is 1 only when a row could not be measured.

Add a row:   a generator of Rows under @row; what it needs of the world is in Lab.
"""

import argparse
import asyncio
import collections
import contextlib
import ctypes
import fcntl
import filecmp
import functools
import json
import os
import random
import select
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fakes import BotServer, ModelServer

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
LATER = (Row("kill -9, 200 times: lost; repeated; missing", "", "tests/torture.py kill", "", "0; 0; 0"),)


def row(name: str) -> Callable:
    """Makes a function a row that the command line can name."""
    return lambda measure: ROWS.setdefault(name, measure)


PARTS: dict[str, Callable[..., None]] = {}


def part(work: Callable[..., None]) -> Callable[..., None]:
    """Makes a function something that runs in a process of its own; what it prints is JSON, a line each."""
    return PARTS.setdefault(work.__name__, work)


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


class Served(NamedTuple):
    """A daemon that is ready."""

    process: subprocess.Popen
    took: float  # seconds from exec to READY=1
    invite: str


CONFIG = """
[gateway]
port = {port}
[agent]
provider = "{provider}"
[[cron]]
name = "morning"
schedule = "0 9 * * mon-fri"
prompt = "Good morning."
"""
TELEGRAM = """
[channels.telegram]
enabled = true
base_url = "{url}"
token = "{token}"
allowed_users = ["*"]
"""


def settle(home: Path, more: str = "", provider: str = "offline") -> int:
    """Write the configuration of a daemon; the port of its gateway, which is free now."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as found:
        found.bind(("::", 0))
        port = found.getsockname()[1]
    (home / "config.toml").write_text(CONFIG.format(port=port, provider=provider) + more)
    return port


@contextlib.contextmanager
def running_daemon(archive: Path | str, env: dict[str, str], cwd: Path | str) -> Iterator[tuple]:
    """A daemon, and how many seconds it took until it was ready, as it tells by sd_notify(3)."""
    with (
        tempfile.TemporaryDirectory(prefix="opb-") as folder,  # a short name: that of a socket may have 100 bytes
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
        open(f"{folder}/said", "w+") as said,
    ):
        ear.bind(f"{folder}/notify")
        ear.settimeout(LIMIT)
        env = env | {"NOTIFY_SOCKET": f"{folder}/notify"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, archive, "start"], env=env, cwd=cwd, **streams)
        try:
            while b"READY=1" not in heard(ear, process, said):
                pass
            yield process, time.perf_counter() - started
        finally:
            end(process)


def heard(ear: socket.socket, process: subprocess.Popen, said: Any) -> bytes:
    """What the daemon tells; Broken if it is gone."""
    for _ in range(LIMIT):
        if select.select([ear], [], [], 1.0)[0]:
            return ear.recv(65_536)
        if process.poll() is not None:
            said.seek(0)
            raise Broken(f"the daemon ended with {process.returncode}: {said.read()[-200:]!r}")
    raise Broken(f"the daemon was not ready within {LIMIT} s")


def resident(pid: int) -> int:
    """The bytes of memory that a process has now."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024


def cpu_time(pid: int) -> float:
    """The seconds of CPU that a process has taken, all its threads together; the kernel's finest count of it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


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

    def part(self, work: Callable[..., None], *words: object) -> list:
        """How a part is started; see `part`."""
        return [sys.executable, __file__, "--part", work.__name__, *map(str, words)]

    def found(self, work: Callable[..., None], *words: object, home: str = "plain") -> Any:
        """What a part has found."""
        env = self.home(home) | self.packages
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(self.part(work, *words), env=env, **pipes)
        try:
            said, problem = process.communicate(timeout=3 * LIMIT)
        finally:
            end(process)  # not killed at once: it may have children
        if process.returncode:
            raise Broken(problem.strip().rpartition("\n")[2] or f"{work.__name__} ended with {process.returncode}")
        return json.loads(said)

    @contextlib.contextmanager
    def beside(self, work: Callable[..., None], *words: object) -> Iterator[Any]:
        """A part that runs meanwhile; what it says first."""
        env = self.home("plain") | self.packages
        process = subprocess.Popen(self.part(work, *words), env=env, stdout=subprocess.PIPE, text=True)
        try:
            yield json.loads(process.stdout.readline() or "null")
        finally:
            end(process)
            process.stdout.close()

    @contextlib.contextmanager
    def daemon(self, home: str, more: str = "", provider: str = "offline", **env: str) -> Iterator["Served"]:
        """A daemon in this home, which has a device."""
        env = self.home(home) | env
        port = settle(Path(env["OPENPISTA_HOME"]), more, provider)
        add = [sys.executable, self.archive, "devices", "add", os.urandom(4).hex(), "--host", f"127.0.0.1:{port}"]
        done = subprocess.run(add, env=env, cwd=self.folder, capture_output=True, text=True, timeout=LIMIT, check=True)
        with running_daemon(self.archive, env, self.folder) as (process, took):
            yield Served(process, took, done.stdout.strip())

    @contextlib.contextmanager
    def bot_api(self) -> Iterator[tuple[BotServer, str, str]]:
        """A Bot API behind TLS: itself, the settings of a daemon that uses it, whose certificates it is to trust."""
        pem = self.folder / "trusted.pem"
        with BotServer() as bot, self.beside(tls_front, bot.url, pem) as port:
            yield bot, TELEGRAM.format(url=f"https://localhost:{port}", token=bot.token), str(pem)

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


# ===== 3. Parts ===============================================================
#
# What runs in processes of its own: the other ends, what lies between, and the
# clients with their clocks. Only these import openpista.


def tell(found: Any) -> None:
    """Say what was found."""
    print(json.dumps(found), flush=True)


async def ask(client: Any, token: str, **more: Any) -> dict[str, Any]:
    """One request and its answer over our client."""
    frame = {"type": "ping", "token": token, **more}
    answer = await client.open_stream(frame, True).receive()
    assert answer["type"] == "reply", answer
    return answer


def ours(invite: str) -> tuple[Any, str]:
    """Our client, not yet connected, and its token."""
    import openpista

    place = openpista.parse_invite(invite)
    return openpista.QuicClient(place.host, place.port, fingerprint=place.fingerprint), place.token


@part
def tls_front(url: str, trusted: str) -> None:
    """TLS before a plain server; and a file with the usual certificates, and with this one's."""
    from urllib.parse import urlsplit

    import certifi

    import openpista

    path, own = Path(trusted), openpista.new_certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path.write_text(own)
    context.load_cert_chain(path)
    path.write_text(own + certifi.contents())

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        await asyncio.gather(carry(reader, back, 0.0, 0.0), carry(there, writer, 0.0, 0.0), return_exceptions=True)

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        tell(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@part
def bare_echo(pem: str) -> None:
    """aioquic's own server, which echoes each stream."""
    from aioquic.asyncio import QuicConnectionProtocol, serve
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import StreamDataReceived

    class Echo(QuicConnectionProtocol):
        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, StreamDataReceived):
                self._quic.send_stream_data(event.stream_id, event.data, event.end_stream)
                self.transmit()

    async def run() -> None:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
        configuration.load_cert_chain(pem)
        server = await serve("127.0.0.1", 0, configuration=configuration, create_protocol=Echo)
        tell(server._transport.get_extra_info("sockname")[1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def bare_client(port: int, size: int) -> Any:
    """aioquic's own client: a function that sends so many bytes and waits for them."""
    from aioquic.asyncio import QuicConnectionProtocol, connect
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import StreamDataReceived

    class Client(QuicConnectionProtocol):
        waiting: dict[int, asyncio.Future[None]]

        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, StreamDataReceived) and event.end_stream:
                self.waiting.pop(event.stream_id).set_result(None)

    configuration = QuicConfiguration(is_client=True, alpn_protocols=["echo"], verify_mode=ssl.CERT_NONE)
    async with connect("127.0.0.1", port, configuration=configuration, create_protocol=Client) as client:
        client.waiting = {}

        async def echo() -> None:
            number = client._quic.get_next_available_stream_id()
            answer = client.waiting[number] = asyncio.get_running_loop().create_future()
            client._quic.send_stream_data(number, b"x" * size, True)
            client.transmit()
            await answer

        yield echo


async def one_by_one(request: Callable[[], Any], count: int) -> float:
    """The p50 of a request, in seconds."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await request()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def in_flight(request: Callable[[], Any], count: int, width: int = 64) -> float:
    """Requests a second with so many under way."""
    left = iter(range(count))

    async def go_on() -> None:
        for _ in left:
            await request()

    started = time.perf_counter()
    await asyncio.gather(*(go_on() for _ in range(width)))
    return count / (time.perf_counter() - started)


@part
def speed(invite: str, bare_port: str, rounds: str, count: str) -> None:
    """Pairs of p50, and pairs of rates: ours and a bare echo of 200 bytes."""

    async def run() -> None:
        client, token = ours(invite)
        async with client, bare_client(int(bare_port), 200) as bare:
            mine = functools.partial(ask, client, token, id="0123456789abcdef")
            for request in (mine, bare, mine, bare):
                await one_by_one(request, 50)
            pings, rates = [], []
            for _ in range(int(rounds)):
                pings.append((await one_by_one(mine, int(count)), await one_by_one(bare, int(count))))
                rates.append((await in_flight(mine, 4 * int(count)), await in_flight(bare, 4 * int(count))))
        tell({"pings": pings, "rates": rates})

    asyncio.run(run())


# The smallest TLS WebSocket: what RFC 6455 demands to open, and frames without pings


def frame_of(kind: int, data: bytes, mask: bytes = b"") -> bytes:
    """A frame; a client's has a mask."""
    marked = 0x80 if mask else 0
    size = bytes([marked | len(data)]) if len(data) < 126 else struct.pack(">BH", marked | 126, len(data))
    return bytes([0x80 | kind]) + size + mask + (bytes(b ^ mask[i % 4] for i, b in enumerate(data)) if mask else data)


def frames_in(buffer: bytearray) -> Iterator[bytes]:
    """Take the whole frames out of the buffer."""
    while len(buffer) >= 2:
        masked, size, start = buffer[1] & 0x80, buffer[1] & 0x7F, 2
        if size == 126:
            size, start = int.from_bytes(buffer[2:4], "big"), 4
        mask = bytes(buffer[start : start + 4]) if masked else b""
        start += len(mask)
        if len(buffer) < start + size:
            return
        data = bytes(buffer[start : start + size])
        del buffer[: start + size]
        yield bytes(b ^ mask[i % 4] for i, b in enumerate(data)) if masked else data


UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
UPGRADE += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
UPGRADED += b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
PIECE = 16 << 10
LOWAT = 25  # TCP_NOTSENT_LOWAT


def tcp_socket(congestion: str) -> socket.socket:
    """A TCP socket, tuned; '' is the system's congestion control."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, LOWAT, PIECE)
    if congestion:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return sock


@part
def websocket_server(pem: str, host: str, port: str = "0", congestion: str = "") -> None:
    """Echoes; a request that is a number is answered with so many bytes, in pieces, between which others fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with tcp_socket(congestion) as listener:
        listener.bind((host, int(port)))
        listener.listen()
        tell(listener.getsockname()[1])
        while True:
            plain, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as sock:
                websocket_serve(sock)


def websocket_serve(sock: ssl.SSLSocket) -> None:
    """One connection, to its end."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += sock.recv(4_096)
    sock.sendall(UPGRADED)
    sock.setblocking(False)
    came, out, answers, left = bytearray(), b"", [], 0
    while True:
        if not out and answers:
            out = answers.pop(0)
        elif not out and left:
            left -= (size := min(left, PIECE))
            out = frame_of(2, b"L" * (size - 1) + (b"L" if left else b"E"))
        select.select([sock], [sock] if out else [], [])
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := sock.recv(65_536):
                came += data
            return
        for request in frames_in(came):
            if request.isdigit():
                left += int(request)
            else:
                answers.append(frame_of(1, request))
        with contextlib.suppress(ssl.SSLWantWriteError):
            out = out[sock.send(out) :] if out else b""


def client_context() -> ssl.SSLContext:
    """What a client needs that pins a certificate: nobody else's word is asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def websocket_once(context: ssl.SSLContext, port: int) -> float:
    """Seconds from nothing to the echo of one request."""
    started = time.perf_counter()
    with tcp_socket("") as plain:
        plain.connect(("127.0.0.1", port))
        with context.wrap_socket(plain) as sock:
            sock.sendall(UPGRADE)
            while not sock.recv(4_096).endswith(b"\r\n\r\n"):
                pass
            sock.sendall(frame_of(1, b"hello", os.urandom(4)))
            sock.recv(4_096)
            return time.perf_counter() - started


class Relay(asyncio.DatagramProtocol):
    """Passes datagrams on to a server, and back, each later by the delay."""

    def __init__(self, target: tuple[str, int], delay: float):
        self.target, self.delay, self.back = target, delay, {}
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple) -> None:
        self.loop.call_later(self.delay, self.forward, data, address)

    def forward(self, data: bytes, address: tuple) -> None:
        if address not in self.back:
            sock = self.back[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(self.target)
            self.loop.add_reader(sock, self.reply, sock, address)
        self.back[address].send(data)

    def reply(self, sock: socket.socket, address: tuple) -> None:
        with contextlib.suppress(OSError):  # a server that has stopped listening
            self.loop.call_later(self.delay, self.transport.sendto, sock.recv(65_536), address)


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, start: float) -> None:
    """Pass on what comes, later by the delay, none of it as if it had come before the start."""
    loop, due = asyncio.get_running_loop(), 0.0
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            due = max(max(loop.time(), start) + delay, due + 1e-6)  # in order
            loop.call_at(due, writer.write, data)
    loop.call_later(2 * delay, writer.close)


@part
def relay(udp_port: str, tcp_port: str, delay: str) -> None:
    """Both, in front of two servers. A client of TCP may speak one round trip after it has begun to connect."""
    later = float(delay)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = asyncio.get_running_loop().time() + 2 * later
        back, forth = await asyncio.open_connection("127.0.0.1", int(tcp_port))
        await asyncio.gather(carry(reader, forth, later, start), carry(back, writer, later, 0.0))

    async def run() -> None:
        udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Relay(("127.0.0.1", int(udp_port)), later), local_addr=("127.0.0.1", 0)
        )
        tcp = await asyncio.start_server(accept, "127.0.0.1", 0)
        tell([udp.get_extra_info("sockname")[1], tcp.sockets[0].getsockname()[1]])
        await asyncio.Event().wait()

    asyncio.run(run())


@part
def connecting(invite: str, tcp_port: str, rounds: str) -> None:
    """Triples of seconds from request to reply: what `connect -e` does, first and second time, and a WebSocket."""
    import openpista

    openpista.open_quic(), openpista.open_crypto()
    context, wanted = client_context(), openpista.parse_invite(invite)

    async def remote(known: Any) -> tuple[float, bool]:
        started = time.perf_counter()
        async with openpista.RemoteDesk(None, wanted, known) as desk:
            await desk.turn(os.urandom(4).hex(), "hello", None, lambda progress: None)
            return time.perf_counter() - started, desk._client.early_accepted

    def round() -> tuple[float, ...]:
        with tempfile.TemporaryDirectory() as folder:
            known = openpista.KnownGateways(Path(folder))
            (first, cold), (second, warm) = asyncio.run(remote(known)), asyncio.run(remote(known))
        assert (cold, warm) == (False, True), "the second time was not early"
        return first, second, websocket_once(context, int(tcp_port))

    round()
    tell([round() for _ in range(int(rounds))])


@part
def crowd(invite: str, pid: str, count: str) -> None:
    """Bytes that the daemon grows by for each idle connection; some come before, which pay for caches."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def more(number: int) -> int:
                for _ in range(number):
                    client, token = ours(invite)
                    await ask(await stack.enter_async_context(client), token)
                await asyncio.sleep(1)
                return resident(int(pid))

            before = await more(20)
            tell((await more(int(count)) - before) / int(count))

    asyncio.run(run())


@part
def junk(port: str, seconds: str, rate: str) -> None:
    """Send Initials that nobody can read; how many there were."""

    def datagram() -> bytes:
        head = b"\xc3" + struct.pack(">I", 1) + b"\x08" + os.urandom(8) + b"\x08" + os.urandom(8) + b"\x00"
        return head + struct.pack(">H", 0x4000 | (1_200 - len(head) - 2)) + os.urandom(1_200 - len(head) - 2)

    sent, started = 0, time.perf_counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while (now := time.perf_counter() - started) < float(seconds):
            while sent < now * int(rate):
                sock.sendto(datagram(), ("127.0.0.1", int(port)))
                sent += 1
            time.sleep(0.001)
    tell(sent)


@part
def flooded(invite: str, pid: str, seconds: str, rate: str) -> None:
    """An honest client's times, a hundred a second, before and under a flood, and what the daemon grew by at most."""
    port = invite.partition("127.0.0.1:")[2].partition("/")[0]

    async def honest(client: Any, token: str, until: Callable[[], bool]) -> list[float]:
        times = []
        while not until():
            started = time.perf_counter()
            await ask(client, token)
            times.append(time.perf_counter() - started)
            most[0] = max(most[0], resident(int(pid)))
            await asyncio.sleep(0.01)
        return times

    async def run() -> None:
        client, token = ours(invite)
        async with client:
            soon = time.perf_counter() + 1
            quiet = await honest(client, token, lambda: time.perf_counter() > soon)
            before = most[0] = resident(int(pid))
            argv = [sys.executable, __file__, "--part", "junk", port, seconds, rate]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as flood:
                times = await honest(client, token, lambda: flood.poll() is not None)
                sent = int(flood.stdout.read())
        tell({"quiet": quiet, "times": times, "grown": most[0] - before, "sent": sent})

    most = [0]
    asyncio.run(run())


# Two network namespaces: the kernel's own TCP on both sides, and a forwarder between that delays and drops

NEWNET, IFF_TUN, IFF_NO_PI = 0x4000_0000, 0x0001, 0x1000
TUNSETIFF, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x4004_54CA, 0x8914, 0x8916, 0x891C


def new_network(address: str) -> int:
    """Go into a new network namespace, where there is one interface with this address: its TUN descriptor."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEWNET):
        raise OSError(ctypes.get_errno(), "no new network namespace")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", b"way", IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
            place = struct.pack("16sHH4s8x", b"way", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(sock, request, place)
        for name in (b"lo", b"way"):
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", name, 0x1))
    return tun


def forward(one: int, other: int, delay: float, loss: float, until: Callable[[], bool]) -> None:
    """Carry packets both ways, each later by the delay; of some nothing is ever seen again."""
    chance, waiting, ends = random.Random(4), collections.deque(), {one: other, other: one}
    while not until():
        pause = min(max(waiting[0][0] - time.monotonic(), 0.0), 0.1) if waiting else 0.1
        for end in select.select([one, other], [], [], pause)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(end, 65_536)
                    if chance.random() >= loss:
                        waiting.append((time.monotonic() + delay, ends[end], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, packet = waiting.popleft()
            with contextlib.suppress(BlockingIOError):  # a full queue: a loss like another
                os.write(end, packet)


@part
def two_networks(archive: str, invite: str, rounds: str) -> None:
    """Run `crowded` in one network against the servers in another; null where that cannot be had."""
    try:
        one = new_network(HERE)
    except (OSError, AttributeError):
        return tell(None)
    env, home = dict(os.environ), Path(os.environ["OPENPISTA_HOME"])
    offered = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    controls = [name for name in ("cubic", "bbr") if name in offered]
    with contextlib.ExitStack() as stack:
        plain = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        stack.enter_context(running_daemon(archive, plain, home))
        for number, name in enumerate(controls):
            argv = [sys.executable, __file__, "--part", "websocket_server"]
            argv += [str(home / "gateway.pem"), HERE, str(4_000 + number), name]
            server = subprocess.Popen(argv, stdout=subprocess.PIPE)
            stack.callback(end, server)
            server.stdout.readline()
        other = new_network(THERE)
        argv = [sys.executable, __file__, "--part", "crowded", invite, rounds, *controls]
        client = subprocess.Popen(argv)
        stack.callback(end, client)
        forward(one, other, 0.025, 0.02, lambda: client.poll() is not None)
        if client.returncode:
            raise Broken(f"the client ended with {client.returncode}")


HERE, THERE = "10.99.0.1", "10.99.0.2"
LARGE, SMALL, GAP = 580_000, 50, 0.08  # bytes of a large reply; small requests beside it; seconds between these
Times = tuple[list[float], list[float]]  # of small requests, of large ones


async def timed(request: Any, times: list[float]) -> None:
    """Note how long a request takes."""
    started = time.perf_counter()
    await request
    times.append(time.perf_counter() - started)


async def crowd_together(small: Callable[[int], Any], large: Callable[[], Any]) -> Times:
    """Small requests, each sent whatever became of the one before, while one large reply is always under way."""
    loop, times = asyncio.get_running_loop(), ([], [])
    started = loop.time()

    async def one(number: int) -> None:
        await asyncio.sleep(started + (2 + number) * GAP - loop.time())
        await timed(small(number), times[0])

    quick = asyncio.gather(*map(one, range(SMALL)))
    while not quick.done():
        await timed(large(), times[1])
    await quick
    return times


async def crowded_quic(invite: str) -> Times:
    """Both on one connection of ours."""
    client, token = ours(invite)

    async def large() -> None:
        answer = await ask(client, token, type="history", session_id="large", limit=1_000)
        size = len(json.dumps(answer, ensure_ascii=False).encode())
        assert abs(size / LARGE - 1) < 0.05, size

    async with client:
        await ask(client, token)
        return await crowd_together(lambda number: ask(client, token), large)


async def crowded_tcp(port: int, congestion: str) -> Times:
    """The same over a TLS WebSocket."""
    sock = tcp_socket(congestion)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (HERE, port))
    reader, writer = await asyncio.open_connection(sock=sock, ssl=client_context(), server_hostname="x")
    writer.write(UPGRADE)
    await reader.readuntil(b"\r\n\r\n")
    waiting: dict[bytes, asyncio.Future[None]] = {}

    def request(name: bytes, sent: bytes) -> asyncio.Future[None]:
        waiting[name] = asyncio.get_running_loop().create_future()
        writer.write(frame_of(1, sent, os.urandom(4)))
        return waiting[name]

    async def listen() -> None:
        came = bytearray()
        while data := await reader.read(65_536):
            came += data
            for frame in frames_in(came):
                name = b"large" if frame.endswith(b"E") else frame.strip()
                if not name.startswith(b"L"):
                    waiting.pop(name).set_result(None)

    def small(number: int) -> asyncio.Future[None]:
        return request(b"small %d" % number, (b"small %d" % number).ljust(100))

    listening = asyncio.create_task(listen())
    await small(-1)
    times = await crowd_together(small, lambda: request(b"large", b"%d" % LARGE))
    listening.cancel()
    writer.close()
    return times


@part
def crowded(invite: str, rounds: str, *controls: str) -> None:
    """Rounds of all, one after the other."""
    found: dict[str, Times] = {name: ([], []) for name in ("quic", *controls)}
    for _ in range(int(rounds)):
        for name, (small, large) in found.items():
            run = crowded_quic(invite) if name == "quic" else crowded_tcp(4_000 + controls.index(name), name)
            for mine, times in zip((small, large), asyncio.run(asyncio.wait_for(run, 60)), strict=True):
                mine += times
    tell(found)


# ===== 4. The rows ============================================================


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


@row("daemon")
def measure_daemon(lab: Lab) -> Iterator[Row]:
    """How soon the daemon is ready, and what it takes while it waits; Telegram's polls over TLS wait for 50 s."""
    times, seconds = [], 5 if lab.short else 60
    with lab.bot_api() as (bot, settings, trusted):
        served_by = functools.partial(lab.daemon, "daemon", settings, SSL_CERT_FILE=trusted)
        for _ in range(1 + (5 if lab.short else 15)):  # the first only warms up
            with served_by() as served:
                times.append(served.took)
        took = statistics.median(times[1:])
        figures = f"{took * 1000:.0f} ms", "nanobot 2.5 s", f"{took / 2.5:.2f}"
        yield Row("exec to ready, wall: QUIC, Telegram, cron", *figures, "<= 0.6 s", took <= 0.6)
        bot.reset()
        with served_by() as served:
            bot.wait_calls("setMyCommands")
            time.sleep(2)
            before, memory = cpu_time(served.process.pid), resident(served.process.pid) / (1 << 20)
            time.sleep(seconds)
            share = (cpu_time(served.process.pid) - before) / seconds * 100
            if not bot.state()["polling"]:
                raise Broken("the daemon does not poll")
    figures = f"{memory:.1f} MiB", "nanobot 95-117 MiB", f"{memory / 95:.2f}"
    yield Row("the same: memory while idle", *figures, "<= 50 MiB", memory <= 50)
    if not before:
        yield Row("the same: CPU while idle", "not measured:", "needs /proc", "", "<= 0.1 %")
        return
    figures = f"{share:.3f} %", "nanobot 0.5 %", f"over {seconds} s"
    yield Row("the same: CPU while idle", *figures, "<= 0.1 %", share <= 0.1)


@row("telegram")
def measure_telegram(lab: Lab) -> Iterator[Row]:
    """From a message at the Bot API to the message that is its answer; each in a chat of its own."""
    count, times = 15 if lab.short else 50, []
    model = lab.enter_context(ModelServer({"echo": True, "default": True, "times": -1}))
    env = {"OPENAI_API_KEY": "test-key-123456", "OPENAI_BASE_URL": model.url}
    with contextlib.ExitStack() as stack:
        bot, settings, trusted = stack.enter_context(lab.bot_api())
        stack.enter_context(lab.daemon("telegram", settings, "openai", SSL_CERT_FILE=trusted, **env))
        bot.wait_state(lambda state: state["polling"], LIMIT)
        for number in range(1, count + 4):
            told = bot.say(number, f"message {number}")
            (post,) = bot.wait(number, f"message {number}", LIMIT)
            times.append(post["times"][-1] - told["time"])
            time.sleep(0.1)
    times = times[3:]  # the first ones warm up
    median, p99 = statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")[-1]
    figures = f"{median * 1000:.0f} ms", "nanobot 440 ms", f"{median / 0.44:.2f}"
    yield Row("Telegram message to final answer, wall: p50", *figures, "<= 0.1 s", median <= 0.1)
    yield Row("the same: p99", f"{p99 * 1000:.0f} ms", f"of {count}", "", "<= 0.1 s", p99 <= 0.1)


def side_by_side(found: list[list[float]]) -> tuple[float, float, str, float]:
    """Medians of both sides, the ratios for the table, and their median."""
    low, ratio, high = statistics.quantiles([one / other for one, other in found], n=4, method="inclusive")
    mine, theirs = (statistics.median(pair[side] for pair in found) for side in (0, 1))
    return mine, theirs, f"{ratio:.2f} ({low:.2f}-{high:.2f})", ratio


def certificate(lab: Lab, home: str) -> Path:
    """The file of a daemon's certificate and key."""
    return Path(lab.home(home)["OPENPISTA_HOME"]) / "gateway.pem"


@row("ping")
def measure_ping(lab: Lab) -> Iterator[Row]:
    """The gateway's smallest request beside a bare echo of aioquic."""
    with lab.daemon("gateway") as served, lab.beside(bare_echo, certificate(lab, "gateway")) as port:
        found = lab.found(speed, served.invite, port, *((3, 200) if lab.short else (9, 500)))
    mine, theirs, ratios, ratio = side_by_side(found["pings"])
    figures = f"{mine * 1000:.2f} ms", f"bare aioquic {theirs * 1000:.2f} ms", ratios
    yield Row("gateway ping, one at a time, wall: p50", *figures, "<= 1.3", ratio <= 1.3)
    mine, theirs, ratios, ratio = side_by_side(found["rates"])
    yield Row("64 pings in flight", f"{mine:,.0f} /s", f"bare aioquic {theirs:,.0f} /s", ratios, ">= 1.7", ratio >= 1.7)


@row("connect")
def measure_connect(lab: Lab) -> Iterator[Row]:
    """A request to a daemon that is 25 ms away, beside a WebSocket as far away; both through relays of ours."""
    with (
        lab.daemon("gateway") as served,
        lab.beside(websocket_server, certificate(lab, "gateway"), "127.0.0.1") as tcp_port,
        lab.beside(relay, port_of(served.invite), tcp_port, 0.025) as (udp, tcp),
    ):
        invite = served.invite.replace(f":{port_of(served.invite)}/", f":{udp}/")
        found = lab.found(connecting, invite, tcp, 5 if lab.short else 20)
    for what, side, goal in (("first", 0, 0.6), ("second", 1, 0.35)):
        mine, theirs, ratios, ratio = side_by_side([(times[side], times[2]) for times in found])
        limit, most = (f"<= {goal}", 9.0) if what == "first" else (f"<= {goal}; 70 ms", 0.070)
        figures = f"{mine * 1000:.0f} ms", f"TLS WebSocket {theirs * 1000:.0f} ms", ratios
        name = f"connect -e, RTT 50 ms, wall: {what} time"
        yield Row(name, *figures, limit, ratio <= goal and mine <= most)


def port_of(invite: str) -> int:
    """The port in an invite."""
    return int(invite.partition("127.0.0.1:")[2].partition("/")[0])


@row("memory")
def measure_memory(lab: Lab) -> Iterator[Row]:
    """What idle connections and strangers cost the daemon."""
    with lab.daemon("gateway") as served:
        each = lab.found(crowd, served.invite, served.process.pid, 100 if lab.short else 200) / 1000
    figures = f"{each:.0f} KB", "TLS WebSocket 290 KB", f"{each / 290:.2f}"
    yield Row("memory of an idle connection", *figures, "<= 90 KB", each <= 90)
    with lab.daemon("gateway") as served:
        found = lab.found(flooded, served.invite, served.process.pid, 3 if lab.short else 8, 5_000)
    grown, what = found["grown"] / 1e6, f"{found['sent']:,} junk Initials, 5,000 /s: growth"
    yield Row(what, f"{grown:.2f} MB", "", "", "<= 5 MB", grown <= 5)
    quiet, p99 = (
        statistics.quantiles(found[name], n=100, method="inclusive")[-1] * 1000 for name in ("quiet", "times")
    )
    figures = f"{p99:.1f} ms", f"without {quiet:.1f} ms", f"of {len(found['times'])}"
    yield Row("the same: p99 of an honest client, wall", *figures, "<= 20 ms", p99 <= 20)


LARGE_SESSION = """
import pathlib, sys, openpista
with openpista.Store(pathlib.Path(sys.argv[1])) as store:
    session = store.session("large")
    for _ in range(10):  # each as long as a reply may be in a frame, of characters of four bytes
        store.append(session, openpista.Message(openpista.Role.USER, chr(0x1D11E) * 14_500))
"""


@row("loss")
def measure_loss(lab: Lab) -> Iterator[Row]:
    """Small requests beside a large reply where packets get lost."""
    what = f"{SMALL} requests, large reply, 2 % loss"
    env, served = lab.home("lossy"), Path(lab.home("lossy")["OPENPISTA_HOME"])
    port = settle(served)
    lab.start("lossy", "-c", LARGE_SESSION, served / "memory.db", **lab.packages)()
    add = [sys.executable, lab.archive, "devices", "add", "bench", "--host", f"{HERE}:{port}"]
    done = subprocess.run(add, env=env, cwd=lab.folder, capture_output=True, text=True, timeout=LIMIT, check=True)
    found = lab.found(two_networks, lab.archive, done.stdout.strip(), 2 if lab.short else 6, home="lossy")
    if not found:
        yield Row(what, "not measured:", "needs root and TUN", "", "<= 0.2; 250 ms")
        return
    (small, large), rows = found.pop("quic"), {"p50": 50, "p99": 99}
    for name, (others, bulk) in found.items():
        goals = zip((0.2, 0.25), ("<= 0.2", "<= 250 ms"), strict=True) if name == "cubic" else iter([(0.0, "")] * 2)
        for word, percent in rows.items():
            mine, theirs = (
                statistics.quantiles(some, n=100, method="inclusive")[percent - 1] for some in (small, others)
            )
            limit, goal = next(goals)
            reached = (mine / theirs if word == "p50" else mine) <= limit if goal else None
            figures = f"{mine * 1000:.0f} ms", f"TLS over {name} {theirs * 1000:.0f} ms", f"{mine / theirs:.2f}"
            yield Row(
                f"{what}: {word}" if goal else f"the same over TCP {name.upper()}: {word}", *figures, goal, reached
            )
        mine, theirs = statistics.median(large), statistics.median(bulk)
        yield Row("the large reply", f"{mine:.1f} s", f"TLS over {name} {theirs:.1f} s", f"{mine / theirs:.2f}")


# ===== 5. Command =============================================================

HEAD = Row("what", "figure", "beside", "ratio", "goal")
WIDTHS = (44, 13, 24, 17, 15)  # and 7 for the last column: 120


def show(row: Row) -> None:
    """Prints a line of the table."""
    reached = "reached" if row is HEAD else {True: "yes", False: "NO", None: "-"}[row.reached]
    cells = (f"{cell:<{width - 1}} " for cell, width in zip(row, WIDTHS, strict=False))
    print("".join(cells) + reached, flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    if sys.argv[1:2] == ["--part"]:
        return PARTS[sys.argv[2]](*sys.argv[3:]) or 0
    parser = argparse.ArgumentParser(description="Measures openpista against its goals.")
    parser.add_argument("--short", action="store_true", help="smaller and fewer: about two minutes")
    parser.add_argument("--universal", action="store_true", help="also build the archive for all platforms, twice")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="--version with this one too")
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all unless told")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    signal.signal(signal.SIGALRM, stop)
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
        print("\nThis is not measured here, it is torture:")
        for later in LATER:
            show(later)
    print(
        f"\nA ratio is the median of the pairs' (and their quartiles); a time is CPU time. It took {time.monotonic() - started:.0f} s."
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
