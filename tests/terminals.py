"""A terminal for tests: a process on a pseudo-terminal, and the screen that a person would see, drawn by pyte."""

import copy
import fcntl
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import launcher
import pyte
from pyte.modes import DECAWM
from wcwidth import wcwidth

FULL = 1049

# All that openpista may send: its own looks, the moves of its painter, the modes that it sets. Nothing else.
LOOK = rb"(?:1|2|3|4|7|31|32|1;33|36)"
OURS = re.compile(
    rb"\x1b\[(?:0|"
    + LOOK
    + rb"(?:;"
    + LOOK
    + rb")*)m|\x1b\[\d+[AC]|\x1b\[[JKH]|\x1b\[2J|\x1b\[\?(?:7|25|2004|1049)[hl]"
)
CONTROLS = re.compile("[\x00-\x06\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def foreign(raw):
    """The first thing in the bytes that openpista may not send to a terminal, with what is around it; '' if none."""
    text = OURS.sub(b"", raw).decode("utf-8", "replace")
    found = CONTROLS.search(text)
    return repr(text[max(0, found.start() - 40) : found.end() + 40]) if found else ""


class Screen(pyte.Screen):
    """pyte's screen with what it lacks: scrollback, the alternate screen, wide characters at the edge, resizing.

    A resize wraps the lines anew, as tmux, VTE and kitty do; without reflow it cuts them, as xterm does.
    """

    def __init__(self, columns, lines, reflow=True):
        self.reflow, self.history, self._main = reflow, [], None
        super().__init__(columns, lines)

    @property
    def is_full(self):
        """Whether the alternate screen is shown."""
        return self._main is not None

    @property
    def display(self):
        """As pyte's, without the blanks at the ends; it looks only at cells that were drawn on."""
        return [self._shown(self.buffer[y]) if y in self.buffer else "" for y in range(self.lines)]

    def _shown(self, row):
        x, end, found = 0, min(max(row, default=-1) + 1, self.columns), []
        while x < end:
            data = row[x].data if x in row else " "
            assert len(data) == 1 or sum(map(wcwidth, data[1:])) == 0
            found.append(data)
            x += 2 if data[0] > "~" and wcwidth(data[0]) == 2 else 1
        return "".join(found).rstrip()

    def draw(self, data):
        for char in data:
            width, cursor = wcwidth(char), self.cursor
            if width <= 0 and cursor.x == self.columns:  # on the last cell, and not yet on the next line
                line = self.buffer[cursor.y]
                line[cursor.x - 1] = line[cursor.x - 1]._replace(data=line[cursor.x - 1].data + char)
                continue
            if DECAWM in self.mode and cursor.x + width > self.columns:
                cursor.x = self.columns
                self.buffer[cursor.y].goes_on = True
            super().draw(char)

    def index(self):
        if self.cursor.y == self.lines - 1 and not self.is_full:
            self.history.append(self.buffer[0])
        super().index()

    def erase_in_line(self, how=0, private=False):
        super().erase_in_line(how, private)
        if how != 1:
            self.buffer[self.cursor.y].goes_on = False

    def erase_in_display(self, how=0, *words, **more):
        super().erase_in_display(how, *words, **more)
        for y in range(self.cursor.y if how == 0 else 0, self.lines):
            self.buffer[y].goes_on = False

    def set_mode(self, *modes, **more):
        super().set_mode(*modes, **more)
        if FULL in modes and more.get("private") and not self.is_full:
            self._main = self.buffer, copy.copy(self.cursor), self.columns, self.lines
            self.buffer = copy.copy(self.buffer)
            self.buffer.clear()

    def reset_mode(self, *modes, **more):
        super().reset_mode(*modes, **more)
        if FULL in modes and more.get("private") and self.is_full:
            size = self.lines, self.columns
            hidden = self.cursor.hidden
            (self.buffer, self.cursor, self.columns, self.lines), self._main = self._main, None
            self.cursor.hidden = hidden
            self.resize(*size)

    def resize(self, lines=None, columns=None):
        lines, columns = lines or self.lines, columns or self.columns
        if (lines, columns) == (self.lines, self.columns):
            return
        above = [] if self.is_full else self.history
        rows = [*above, *(self.buffer[y] for y in range(self.lines))]
        at = len(above) + self.cursor.y
        while len(rows) > at + 1 and not self._used(rows[-1]):
            rows.pop()
        wrap = self.reflow and not self.is_full
        rows, at = self._wrapped(rows, at, columns) if wrap else ([self._cut(row, columns) for row in rows], at)
        top = 0 if self.is_full else min(max(len(rows) - lines, 0), at)
        above[:] = rows[:top]
        self.buffer.clear()
        self.buffer.update(enumerate(rows[top : top + lines]))
        self.lines, self.columns = lines, columns
        self.set_margins()
        self.cursor.y, self.cursor.x = min(at - top, lines - 1), min(self.cursor.x, columns)
        self.dirty.update(range(lines))

    def _used(self, row):
        """Columns up to the last that holds something."""
        return max((x + 1 for x, char in row.items() if char.data != " "), default=0)

    def _line(self, row, chars=(), goes_on=False):
        line = type(row)(row.default)
        line.update(enumerate(chars))
        line.goes_on = goes_on
        return line

    def _cut(self, row, columns):
        return self._line(row, [row[x] for x in range(min(self._used(row), columns))])

    def _wrapped(self, rows, at, columns):
        """The rows at a new width, and the cursor's row; its column is set."""
        found, chars, cursor, here = [], [], None, at
        for n, row in enumerate(rows):
            goes_on = getattr(row, "goes_on", False)
            if n == at:
                cursor = len(chars) + self.cursor.x
            width = max(self._used(row), self.columns - 1) if goes_on else self._used(row)
            chars += [row[x] for x in range(width)]
            if goes_on:
                continue
            start = 0
            while True:
                end = start + columns
                if end < len(chars) and chars[end].data == "":  # never half of a wide character
                    end -= 1
                last = end >= len(chars)
                if cursor is not None and (start <= cursor < end or last):
                    here, self.cursor.x, cursor = len(found), min(cursor - start, columns), None
                found.append(self._line(row, chars[start:end], not last))
                start = end
                if last:
                    break
            chars = []
        return found, here


class Terminal:
    """A process on a terminal of its own; stdin, stdout or stderr may be something else."""

    def __init__(self, words, env, cwd, columns=80, rows=40, argv=None, prepare="", reflow=True, **streams):
        master, slave = pty.openpty()
        self.master, self.raw, self.text, self.frames = master, b"", "", []  # frames: what each portion led to
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._modes = termios.tcgetattr(master)

        def own_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        streams = {"stdin": slave, "stdout": slave, "stderr": slave} | streams
        if argv:
            own = {"preexec_fn": own_terminal, "pass_fds": (slave,)}
            self.process = subprocess.Popen(argv, env=env, cwd=cwd, **own, **streams)
        else:
            self.process = launcher.Process(words, env, cwd, terminal=slave, prepare=prepare, **streams)
        os.close(slave)
        self.screen = Screen(columns or 80, rows or 24, reflow)
        self.stream = pyte.ByteStream(self.screen)

    def pump(self, seconds):
        """Read what comes within so many seconds; False at the end."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 65_536)
        except OSError:  # EIO: the last process has let go of the terminal
            data = b""
        self.raw += data
        self.stream.feed(data)
        self._look()
        return bool(data)

    def _look(self):
        self.text = "\n".join(self.screen.display).rstrip()
        self.frames.append(self.text)

    @property
    def lines(self):
        """What the screen shows now, line by line."""
        return self.text.splitlines()

    @property
    def scrolled(self):
        """What the screen shows now, and what went out of it at the top."""
        above = ["".join(row[x].data for x in range(max(row, default=-1) + 1)).rstrip() for row in self.screen.history]
        return "\n".join([*above, self.text])

    @property
    def cursor(self):
        """Row and column of the cursor."""
        return self.screen.cursor.y, self.screen.cursor.x

    def find(self, words):
        """Row and column where the words stand on the screen."""
        row = next(y for y, line in enumerate(self.lines) if words in line)
        return row, sum(max(wcwidth(char), 0) for char in self.lines[row].partition(words)[0])

    def look(self, words):
        """How the first character of the words looks: .bold, .fg, .reverse ..."""
        row, column = self.find(words)
        return self.screen.buffer[row][column]

    def wait(self, words, seconds=10):
        """Until the screen shows these words; then what it shows."""
        self.until(lambda: words in self.text, f"{words!r} was not shown", seconds)
        return self.text

    def gone(self, words, seconds=10):
        """Until the screen shows these words no more."""
        self.until(lambda: words not in self.text, f"{words!r} is still shown", seconds)
        return self.text

    def until(self, condition, what="it did not come to that", seconds=10):
        """Read on until something is true."""
        end = time.monotonic() + seconds
        while not condition():
            going = self.pump(0.05)
            assert (going or condition()) and time.monotonic() < end, f"{what}:\n{self.text}"

    def spend(self, seconds):
        """Read on for so long: for what must not happen, and for what depends on the clock."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.pump(left)

    def send(self, keys):
        """Type; what comes meanwhile is read, so that neither side waits for ever."""
        data = memoryview(keys if isinstance(keys, bytes) else keys.encode())
        end = time.monotonic() + 30
        while data:
            assert time.monotonic() < end, f"nobody reads the keys:\n{self.text}"
            readable, writable, _ = select.select([self.master], [self.master], [], 1)
            if readable:
                self.pump(0)
            if writable:
                data = data[os.write(self.master, data[:1024]) :]

    def resize(self, columns, rows):
        """As a person does with the mouse: what is shown moves first, then the process is told."""
        while select.select([self.master], [], [], 0)[0] and self.pump(0):
            pass
        self.screen.resize(rows, columns)
        self._look()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number):
        os.kill(self.process.pid, number)

    def hang_up(self):
        """The window is closed."""
        os.close(self.master)
        self.master = -1
        return self.process.wait(10)

    def end(self, seconds=10):
        """Read to the end; the exit code."""
        end = time.monotonic() + seconds
        while self.pump(0.1) or self.process.poll() is None:
            assert time.monotonic() < end, f"it did not end:\n{self.text}"
        return self.process.wait(5)

    def left_behind(self):
        """What is not as it was before the process had the terminal; [] if all is."""
        checks = {
            "modes": termios.tcgetattr(self.master) == self._modes,
            "cursor": not self.screen.cursor.hidden,
            "screen": not self.screen.is_full,
            "wrapping": DECAWM in self.screen.mode,
            "paste": self.raw.rfind(b"\x1b[?2004h") <= self.raw.rfind(b"\x1b[?2004l"),
            "look": self.screen.cursor.attrs == self.screen.default_char,
        }
        return [name for name, is_good in checks.items() if not is_good]

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        if self.master >= 0:
            os.close(self.master)


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
