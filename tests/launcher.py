"""Processes of openpista that need not import it: one process has done so, and forks for each that is wanted.

What a test gets is a process like any other: its words, environment, folder, streams, terminal, signals and end are
its own. Only the start of Python is shared, which is most of what a short command costs. Where that start is what
counts (Python's own variables, a shell that starts the program), use subprocess.

Between a test and its process stands a keeper, the parent of the process: it tells the test how the process ended,
and leaves the dead one to be seen, as any parent does, until the test has asked.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import pathlib
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
# What a child of a test may inherit: nothing that configures openpista or holds a key.
KEPT = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "TMPDIR")
# For a process that is not forked. Imported, not run as a script: so Python keeps it compiled.
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import openpista as o; "
PROGRAM = [sys.executable, "-c", f"{START}sys.exit(o.main())"]
MOST_NEED = ("httpx", "httpcore", "anyio", "anyio._backends._asyncio")  # to ask a model
OF_PYTHON = re.compile("PYTHON|LANG|LC_|LD_|MALLOC_|GLIBC_|OPENSSL_")  # what counts when Python starts
NUMBER = struct.Struct("!i")


def inherited():
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return kept | {"PYTHON_COLORS": "0"}  # from 3.13 on Python colours tracebacks: the escapes would not be ours


def starts_alike(env):
    """Whether Python starts with this environment as the launcher's has started."""
    ours, theirs = ({name: each[name] for name in each if OF_PYTHON.match(name)} for each in (inherited(), env))
    return ours == theirs


def receive(connection, size):
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the other side has ended")
        data += part
    return data


# In the test


class Launcher:
    """The process that has imported openpista; it ends with the one that holds this."""

    def __init__(self):
        self.lock, (self.control, theirs) = threading.Lock(), socket.socketpair()
        argv = [sys.executable, "-P", __file__, str(theirs.fileno())]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
        self.process = subprocess.Popen(argv, env=inherited(), cwd=ROOT, **streams)
        theirs.close()

    def close(self):
        self.control.close()
        self.process.wait(30)

    def start(self, request, streams):
        """A connection to the keeper of a new process."""
        ours, theirs = socket.socketpair()
        with theirs, self.lock:
            socket.send_fds(self.control, [b"!"], [theirs.fileno(), *streams])
        data = json.dumps(request).encode()
        ours.sendall(NUMBER.pack(len(data)) + data)
        return ours


launcher = functools.cache(Launcher)


def close():
    if launcher.cache_info().currsize:
        launcher().close()
        launcher.cache_clear()


def umask():
    """This process's, without a moment in which it is another."""
    return int(re.search(r"^Umask:\s*(\d+)", pathlib.Path("/proc/self/status").read_text(), re.M)[1], 8)


class Process:
    """What subprocess.Popen is: Process(["run", "-e", "hi"], env, cwd, stdout=PIPE); text in and out.

    With a terminal, the process is the first of a session of its own, which that terminal controls.
    """

    def __init__(self, words, env, cwd, stdin=None, stdout=None, stderr=None, terminal=None, prepare=""):
        self.args, self.returncode = [*PROGRAM, *words], None
        theirs, self.stdin, self.stdout, self.stderr = [], None, None, None
        with contextlib.ExitStack() as stack:
            for number, (name, stream) in enumerate({"stdin": stdin, "stdout": stdout, "stderr": stderr}.items()):
                if stream == subprocess.PIPE:
                    ends = os.pipe()
                    theirs.append(ends[number > 0])
                    setattr(self, name, open(ends[number == 0], "r" if number else "w"))  # noqa: SIM115
                elif stream == subprocess.DEVNULL:
                    theirs.append(os.open(os.devnull, os.O_RDWR))
                else:
                    theirs.append(number if stream is None else stream if isinstance(stream, int) else stream.fileno())
                    continue
                stack.callback(os.close, theirs[-1])
            if terminal is not None:
                theirs.append(terminal)
            request = {
                "words": [os.fsdecode(word) for word in words],
                "env": {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()},
                "cwd": os.fsdecode(cwd),
                "umask": umask(),
                "prepare": prepare,
            }
            self.keeper = launcher().start(request, theirs)
        self.pid = NUMBER.unpack(receive(self.keeper, NUMBER.size))[0]

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self.keeper.settimeout(None)
            with selectors.DefaultSelector() as selector:
                selector.register(self.keeper, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = NUMBER.unpack(receive(self.keeper, NUMBER.size))[0]
            self.keeper.shutdown(socket.SHUT_WR)
            self.keeper.recv(1)  # its end: now there is no such process any more
            self.keeper.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input="", timeout=None):
        """Feed it, read all that it says, and wait for it: (stdout, stderr)."""
        end = None if timeout is None else time.monotonic() + timeout
        data, said = memoryview((input or "").encode()), {}
        with selectors.DefaultSelector() as selector:
            for stream in (self.stdout, self.stderr):
                if stream and not stream.closed:
                    said[stream] = bytearray()
                    selector.register(stream, selectors.EVENT_READ)
            if self.stdin and data:
                os.set_blocking(self.stdin.fileno(), False)
                selector.register(self.stdin, selectors.EVENT_WRITE)
            elif self.stdin:
                self.stdin.close()
            while selector.get_map():
                ready = selector.select(None if end is None else max(0, end - time.monotonic()))
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                for key, _ in ready:
                    if key.fileobj is self.stdin:
                        try:
                            data = data[os.write(key.fd, data[:65_536]) :]
                        except BrokenPipeError:
                            data = b""
                        if data:
                            continue
                    elif part := os.read(key.fd, 65_536):
                        said[key.fileobj] += part
                        continue
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
        self.wait(None if end is None else max(0, end - time.monotonic()))
        texts = (bytes(said[stream]).decode() if stream in said else None for stream in (self.stdout, self.stderr))
        return tuple(text and re.sub("\r\n?", "\n", text) for text in texts)


def run(words, env, cwd, input="", timeout=60, fresh=False):
    """openpista with these words -> CompletedProcess; fresh: with a start of Python that is its own."""
    if fresh or not starts_alike(env):
        argv = [*PROGRAM, *words]
        return subprocess.run(argv, env=env, input=input, cwd=cwd, timeout=timeout, capture_output=True, text=True)
    process = Process(words, env, cwd, *[subprocess.PIPE] * 3)
    try:
        out, err = process.communicate(input, timeout)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# In the launcher


def keep(connection, pid):
    """The keeper: tell how the process ends; it stays to be seen until the test has asked."""
    with contextlib.suppress(OSError):  # the test is gone
        connection.sendall(NUMBER.pack(pid))
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        connection.sendall(NUMBER.pack(code))
        connection.recv(1)
    os.waitpid(pid, 0)
    os._exit(0)


def next_request(control):
    """Forks for each request, and returns in the new process: (request, its streams)."""
    while True:
        _, handles, _, _ = socket.recv_fds(control, 1, 8)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if handles else 0)[0]:
                pass
        if not handles:
            os._exit(0)
        if os.fork():
            for handle in handles:
                os.close(handle)
            continue
        control.close()
        connection = socket.socket(fileno=handles[0])
        request = json.loads(receive(connection, NUMBER.unpack(receive(connection, NUMBER.size))[0]))
        pid = os.fork()
        if pid:
            for handle in handles[1:]:
                os.close(handle)
            keep(connection, pid)
        connection.close()
        return request, handles[1:]


def stream(number, mode, like):
    """A standard stream as Python makes it."""
    buffer = open(number, f"{mode}b", closefd=False)  # noqa: SIM115
    buffer.raw.name = like.name
    by_line = number == 2 or buffer.isatty()
    text = io.TextIOWrapper(buffer, like.encoding, like.errors, newline="\n", line_buffering=by_line)
    text.mode = mode
    return text


def become(request, handles):
    """Be what was asked for."""
    if handles[3:]:
        os.setsid()
        fcntl.ioctl(handles[3], termios.TIOCSCTTY, 0)  # kept open: the terminal's last process ends it
    for number, handle in enumerate(handles[:3]):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = sys.__stdin__ = stream(0, "r", sys.__stdin__)
    sys.stdout = sys.__stdout__ = stream(1, "w", sys.__stdout__)
    sys.stderr = sys.__stderr__ = stream(2, "w", sys.__stderr__)
    coerced = {name: os.environ[name] for name in ("LC_CTYPE",) if name in os.environ}  # by Python: PEP 538
    os.environ.clear()
    os.environ.update(coerced | request["env"])
    time.tzset()
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["words"]]


if __name__ == "__main__":
    shared = {}
    # Left alone at the end of each process: to take apart what all share would cost more than all else. Not so
    # openpista itself. Registered first, and so called last.
    atexit.register(lambda: [sys.modules.pop(name) for name in shared])
    sys.path[:0] = [str(ROOT), ""]
    for name in MOST_NEED:
        importlib.import_module(name)
    import openpista as o

    shared.update(
        {name: sys.modules[name] for name in sys.modules.keys() - {"__main__", "builtins", "openpista", "sys"}}
    )
    for_ever = [dict(shared)]  # a cycle, frozen: it is never collected
    for_ever.append(for_ever)
    del for_ever
    gc.freeze()
    try:
        request, handles = next_request(socket.socket(fileno=int(sys.argv[1])))
    except KeyboardInterrupt:
        os._exit(130)
    become(request, handles)
    exec(request["prepare"], {"o": o, "sys": sys})
    sys.exit(o.main())
