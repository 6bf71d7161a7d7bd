"""Terminal: text in cells, keys out of bytes, lines painted on pyte's screen, raw mode on a real pseudo-terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpista import KeyDecoder, Painter, Style, Tty, cells, fit_cells, usable, wrap_cells

# ---- text in cells ----


@pytest.mark.parametrize(
    ("text", "width", "fitted"),
    [
        ("\x1b[1mabc\x1b[0m", 3, "\x1b[1mabc\x1b[0m"),
        ("\x1b[1mabcd\x1b[0m", 3, "\x1b[1mab…\x1b[0m"),
        ("\x1b[1mab\x1b[0mcd", 3, "\x1b[1mab\x1b[0m…"),
        ("한국어", 5, "한국…"),
        ("한국어", 4, "한…"),
    ],
)
def test_fit_cells_closes_what_it_cut(text, width, fitted):
    assert fit_cells(text, width) == fitted
    assert cells(fitted) <= width


@pytest.mark.parametrize(
    ("text", "width", "rows"),
    [
        ("", 5, [""]),
        ("one two three", 7, ["one two", "three"]),
        ("    indented words", 12, ["    indented", "words"]),
        ("abcdefghij k", 4, ["abcd", "efgh", "ij k"]),
        ("ab abcdefgh", 4, ["ab", "abcd", "efgh"]),
        ("      abcdef", 8, ["      ab", "cdef"]),
        ("한국어 말", 4, ["한국", "어", "말"]),
        ("a\tb\tc", 20, ["a   b   c"]),
        ("한\tb", 20, ["한  b"]),
        ("a\n\nb", 4, ["a", "", "b"]),
        ("e\u0301e\u0301e\u0301", 2, ["e\u0301e\u0301", "e\u0301"]),
        ("\x1b[1mone two\x1b[0m three", 5, ["\x1b[1mone\x1b[0m", "\x1b[1mtwo\x1b[0m", "three"]),
        ("한국", 1, ["한", "국"]),  # two columns are the least
    ],
)
def test_wrap_cells(text, width, rows):
    assert wrap_cells(text, width) == rows


@given(st.text(alphabet="ab 한\u0301\t\n"), st.integers(2, 9))
def test_wrapped_rows_fit_and_lose_only_spaces(text, width):
    rows = wrap_cells(text, width)
    assert max(map(cells, rows)) <= width
    assert "".join("".join(rows).split()) == "".join(text.split())


@pytest.mark.parametrize("text", ["한국어" * 33_000, " " * 100_000, "ab " * 33_000, "\x1b[1m한\x1b[0m" * 10_000])
def test_wrapping_takes_time_in_proportion(text):
    started = time.process_time()
    wrap_cells(text, 80)
    assert time.process_time() - started < 0.5  # what was quadratic took 40 s


def test_styles():
    style = Style(True)
    assert style("a", "bold") == "\x1b[1ma\x1b[0m"
    assert style(f"a{style('b', 'bold')}c", "dim") == "\x1b[2ma\x1b[1mb\x1b[0m\x1b[2mc\x1b[0m"
    assert style("", "bold") == ""
    assert Style(False)("a", "bold") == "a"


# ---- keys ----


def keys_of(data):
    """The keys of these bytes, as name or as character in quotes."""
    decoder = KeyDecoder()
    return [repr(key.text) if key.name == "text" else key.name for key in decoder.feed(data) + decoder.flush()]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"\r\n\t\x7f\x08\x00", "enter ctrl-j tab backspace backspace ctrl-space"),
        (b"\x01\x1a\x1f", "ctrl-a ctrl-z ctrl-_"),
        (b"\x1b", "escape"),
        (b"\x1b\x1b", "escape escape"),
        (b"\x1b[", "alt-["),
        (b"\x1bO", "alt-O"),
        (b"\x1b]", "alt-]"),
        (b"\x1bb\x1b\r\x1b\x7f\x1b \x1b\x01", "alt-b alt-enter alt-backspace alt-space alt-ctrl-a"),
        (b"\x1b[A\x1bOB\x1b[H\x1bOF", "up down home end"),
        (b"\x1b[1~\x1b[2~\x1b[3~\x1b[4~\x1b[5~\x1b[6~", "home insert delete end pageup pagedown"),
        (b"\x1bOP\x1b[15~\x1b[24~", "f1 f5 f12"),
        (b"\x1b[1;5D\x1b[1;3C\x1b[1;2A\x1b[3;5~", "ctrl-left alt-right shift-up ctrl-delete"),
        (b"\x1b[1;9A\x1b\x1b[A", "alt-up alt-up"),
        (b"\x1b[Z\x1b[9;2u", "shift-tab shift-tab"),
        (b"\x1b[13;2u\x1b[27;2;13~\x1b[13u", "shift-enter shift-enter enter"),
        (b"\x1b[97;5u\x1b[27;5;97~\x1b[97;3u\x1b[32;5u", "ctrl-a ctrl-a alt-a ctrl-space"),
        (b"\x1b[<0;10;10M\x1b[<0;10;10m\x1b[I\x1b[Mx", "unknown unknown unknown unknown 'x'"),  # the mouse, the focus
        (b"\x1b[1;0A\x1b[;2A\x1b[97:65;6:1u", "up shift-up unknown"),
        (b"\x1b]11;rgb:0/0/0\x1b\\a\x1bP1$r\x07b", "unknown 'a' unknown 'b'"),
        (b"\x1b[?62;4c\x1b[24;80R\x1b[[Ax", "unknown unknown unknown 'x'"),
        (b"\x1b[1;\x1b[A", "unknown up"),
        (b"\x1b[1;", "unknown"),
        (b"\x1b[" + b"1" * 99_999 + b"Ax", "unknown 'x'"),
        (b"\x1b[55296u\x1b[9999999999u\x1b[57358u", "unknown unknown unknown"),
        ("é한\u202e\x85".encode(), "'é' '한' unknown unknown"),
        (b"\xffa\xc3\x1b[A", "'\ufffd' 'a' '\ufffd' up"),
    ],
)
def test_keys(data, names):
    assert keys_of(data) == names.split()


def paste_of(data):
    (key,) = KeyDecoder().feed(b"\x1b[200~" + data + b"\x1b[201~")
    assert key.name == "paste"
    return key.text


def test_a_paste_is_text_only():
    assert paste_of(b"a\r\nb\rc\n\td") == "a\nb\nc\n\td"
    assert paste_of(b"\x1b[31mred\x1b[0m \x03\x04\x1b]0;title\x07.\x1b[20~") == "red ."
    assert paste_of(b"") == ""


def test_a_paste_has_a_bound():
    decoder = KeyDecoder()
    keys = decoder.feed(b"\x1b[200~")
    for _ in range(6):
        keys += decoder.feed(b"x" * (1 << 20))
    keys += decoder.feed(b"\x1b[201~y")
    assert [(key.name, len(key.text)) for key in keys] == [("paste", 4 << 20), ("text", 1)]


def test_a_paste_without_an_end_comes_only_if_asked_for():
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b[200~ab\x1b[20") == []
    assert decoder.flush() == [] and not decoder.waiting
    assert [key.name for key in decoder.flush(paste=True)] == ["paste"]
    assert decoder.feed(b"c")[0].text == "c"


def test_only_what_may_go_on_is_waited_for():
    for data, waits in ((b"\x1b", True), (b"\x1b[1", True), (b"\x1b]1", True), (b"a", False), (b"\xc3", False)):
        decoder = KeyDecoder()
        decoder.feed(data)
        assert decoder.waiting == waits, data
        decoder.flush()
        assert not decoder.waiting


def test_half_a_character_waits_longer_than_half_a_sequence():
    decoder = KeyDecoder()
    assert decoder.feed("é".encode()[:1]) + decoder.flush() == []
    assert decoder.feed("é".encode()[1:])[0].text == "é"


def test_a_broken_sequence_is_one_key_in_pieces_too():
    decoder = KeyDecoder()
    assert [key for byte in b"\x1b[ 1;5" for key in decoder.feed(bytes([byte]))] == []
    assert [key.name for key in decoder.flush()] == ["unknown"]


PIECES = st.sampled_from(
    [b"\x1b", b"[", b"O", b"]", b"P", b"M", b"200~", b"\x1b[200~", b"\x1b[201~", b"1;5", b"~", b"u", b"A", b"\x07"]
    + [b"\\", b"\xed\x95\x9c", b"\xed", b"\x9c", b"\xff", b"a", b"\r", b" ", b"27;2;13", b"$", b"?", b":", b"1" * 70]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(PIECES, st.binary(max_size=4)), max_size=14), st.data())
def test_any_split_gives_the_same_keys(pieces, data):
    whole = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    for marks in (cuts, range(len(whole))):
        once, often = KeyDecoder(), KeyDecoder()
        expected = once.feed(whole) + once.flush(paste=True)
        got = [k for a, b in zip([0, *marks], [*marks, len(whole)], strict=True) for k in often.feed(whole[a:b])]
        assert got + often.flush(paste=True) == expected
        assert not often.waiting


# ---- painting ----


class Screen:
    """A painter on a terminal with scrollback, which pyte draws."""

    def __init__(self, columns=40, rows=10, inline=True):
        self.pyte = pyte.HistoryScreen(columns, rows, history=1_000)
        self.stream = pyte.Stream(self.pyte)
        self.painter, self.size, self.written = Painter(self.write, inline), (columns, rows), []

    def write(self, text):
        self.written.append(text)
        self.stream.feed(text)

    def paint(self, *lines, cursor=None):
        """Paint; what was written for it."""
        self.written.clear()
        self.painter.paint(lines, self.size, cursor)
        assert len(self.written) <= 1
        return "".join(self.written)

    def print(self, text):
        self.painter.print(text, self.size)

    @property
    def cursor(self):
        return self.pyte.cursor.y, self.pyte.cursor.x

    @property
    def shown(self):
        """The rows on the screen, without the empty ones at the end."""
        rows = [row.rstrip() for row in self.pyte.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def all(self):
        """The scrollback and the screen."""
        width = self.pyte.columns
        return ["".join(row[x].data for x in range(width)).rstrip() for row in self.pyte.history.top] + self.shown

    def resize(self, columns, rows):
        """As terminals do that wrap their lines anew; each row is a line of its own here, and the cursor in one."""
        old, (y, x) = [row.rstrip() for row in self.pyte.display], self.cursor
        self.size = (columns, rows)
        self.pyte = pyte.HistoryScreen(columns, rows, history=1_000)
        self.stream = pyte.Stream(self.pyte)
        self.stream.feed("\r\n".join(old[:y] + [old[y][: x + 1].ljust(x + 1)]))
        self.stream.feed("\x1b7" + old[y][x + 1 :] + "".join("\r\n" + row for row in old[y + 1 :] if row))
        self.stream.feed("\x1b8" + ("\b" if x % columns < columns - 1 else ""))


def numbered(count):
    return [f"line {number}" for number in range(count)]


def test_only_what_changed_is_written():
    screen = Screen(80, 24)
    lines = numbered(20)
    assert len(screen.paint(*lines, cursor=(19, 3))) > 150
    assert screen.paint(*lines, cursor=(19, 3)) == ""
    lines[5] = "a line that is about sixty characters long, as most lines are"
    assert 60 < len(screen.paint(*lines, cursor=(19, 3))) < 100
    assert len(screen.paint(*lines, cursor=(19, 4))) < 10
    assert screen.shown == lines
    assert screen.cursor == (19, 4)


def test_inline_lines_stay_below_what_is_printed():
    screen = Screen()
    screen.paint("> a", "status", cursor=(0, 3))
    screen.print("one")
    screen.print("two\nthree")
    assert screen.shown == ["one", "two", "three", "> a", "status"]
    assert screen.cursor == (3, 3)


def test_each_printed_line_is_kept_once():
    screen = Screen(20, 6)
    screen.paint("input", "status", cursor=(0, 2))
    for number in range(30):
        screen.print(f"{number}")
        screen.paint("input", *(f"hint {n}" for n in range(number % 4)), f"status {number}", cursor=(0, 2))
    screen.print("\n".join(f"more {n}" for n in range(15)) + "\n" + "x" * 30)
    screen.painter.clear()
    assert screen.all == [*map(str, range(30)), *(f"more {n}" for n in range(15)), "x" * 20, "x" * 10]


def test_growing_at_the_bottom_scrolls_and_shrinking_leaves_nothing():
    screen = Screen(20, 6)
    for number in range(5):
        screen.print(f"old {number}")
    screen.paint("a")
    screen.paint("a", "b", "c", cursor=(2, 0))
    assert screen.all == [*(f"old {n}" for n in range(5)), "a", "b", "c"]
    screen.paint("A")
    assert screen.all == [*(f"old {n}" for n in range(5)), "A"]
    screen.print("new")
    assert screen.all == [*(f"old {n}" for n in range(5)), "new", "A"]
    screen.painter.clear()
    assert screen.all == [*(f"old {n}" for n in range(5)), "new"]
    assert screen.cursor == (len(screen.shown), 0)


def test_inline_shows_the_last_lines_that_there_is_room_for():
    screen = Screen(20, 5)
    screen.print("above")
    screen.paint(*numbered(9), cursor=(7, 1))
    assert screen.shown[1:] == numbered(9)[5:]
    assert screen.cursor == (3, 1)
    screen.paint(*numbered(9), cursor=(2, 1))
    assert screen.pyte.cursor.hidden


@pytest.mark.parametrize("inline", [True, False])
def test_the_last_column_is_used_and_nothing_wraps(inline):
    screen = Screen(10, 4, inline)
    wide = ["x" * 10, "한국어한국", "a한국어한국", "\x1b[1m" + "y" * 11]
    screen.paint(*wide[:3], cursor=(2, 12))
    joined = [row.replace(" ", "") for row in screen.shown]  # pyte puts nothing into a wide one's second cell
    assert joined == ["x" * 10, "한국어한국", "a한국어한…"]
    assert screen.cursor[0] == 2 and screen.cursor[1] <= 9
    screen.paint("x", wide[1], wide[3], cursor=(0, 0))
    assert [row.replace(" ", "") for row in screen.shown] == ["x", "한국어한국", "y" * 9 + "…"]
    assert screen.paint("x", wide[1], wide[3], cursor=(0, 0)) == ""


def test_a_line_that_is_wider_than_we_think_breaks_nothing():
    screen = Screen(10, 4)
    screen.paint("\xad" * 5 + "z" * 10, "below")  # a soft hyphen: nothing to us, a column to pyte
    assert screen.shown == ["\xad" * 5 + "z" * 5, "below"]


def test_a_style_does_not_leak_into_the_next_line():
    screen = Screen()
    screen.paint("\x1b[1mbold", "plain\ttab\nfeed")
    assert screen.pyte.buffer[0][0].bold and not screen.pyte.buffer[1][0].bold
    assert screen.shown == ["bold", "plain tab feed"]


@pytest.mark.parametrize(("columns", "rows"), [(40, 10), (15, 10), (7, 10), (80, 10), (40, 20)])
def test_inline_after_a_resize(columns, rows):
    screen = Screen(30, 10)
    screen.print("kept")
    screen.paint("a line of twenty-two c", "second line", "third", cursor=(1, 11))
    screen.resize(columns, rows)
    screen.paint("new", "lines", cursor=(0, 0))
    assert screen.shown == ["kept", "new", "lines"]


def test_inline_when_the_screen_gets_lower_than_the_lines():
    screen = Screen(30, 10)
    screen.paint(*numbered(8), cursor=(7, 0))
    screen.pyte.resize(4, 30)
    screen.size = (30, 4)
    screen.paint(*numbered(8), cursor=(7, 0))
    assert [row for row in screen.shown if row] == numbered(8)[5:]


def test_a_screen_of_its_own():
    screen = Screen(20, 4, inline=False)
    screen.stream.feed("somebody's\r\ntext")
    screen.paint(*numbered(4), cursor=None)
    assert screen.all == numbered(4)
    assert screen.pyte.cursor.hidden
    screen.stream.feed("\x1b[2J\x1b[Hgarbage")
    screen.painter.forget()
    screen.paint(*numbered(3), cursor=(1, 1))
    assert screen.all == numbered(3) and screen.cursor == (1, 1) and not screen.pyte.cursor.hidden
    screen.painter.clear()
    assert screen.all == [] and screen.cursor == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.sampled_from(["", "a", "한국", "long " * 6]), max_size=9)), max_size=8
    )
)
def test_whatever_is_painted_is_what_is_shown(steps):
    screen, printed = Screen(12, 5), []
    for prints, lines in steps:
        if prints:
            screen.print("\n".join(f"{n}:{len(printed)}" for n in range(len(lines) + 1)))
            printed += [f"{n}:{len(printed)}" for n in range(len(lines) + 1)]
        screen.paint(*lines)
        expected = [fit_cells(line, 12).rstrip() for line in lines[-4:]]
        while expected and not expected[-1]:
            expected.pop()
        shown = [re.sub(r"([가-힣]) ?", r"\1", row) for row in screen.all]
        assert shown == [*printed, *expected]


# ---- the terminal ----

JOB = """
import asyncio, os, signal, sys, time
from {module} import KeyPress, Painter, Style, Tty, converse
def say(*words):
    os.write({report}, (" ".join(map(str, words)) + "\\n").encode())
while os.tcgetpgrp(0) != os.getpgrp():
    time.sleep(0.001)
async def main():
{body}
asyncio.run(main())
"""
# As a shell: the job in a group of its own, in front; told about what becomes of it, and continues it.
SHELL = """
import os, signal, sys
report, commands, job = int(sys.argv[1]), int(sys.argv[2]), os.fork()
if not job:
    os.setpgid(0, 0)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[3]])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
try:
    os.setpgid(job, job)
except PermissionError:  # it has done so itself, and runs already
    pass
os.tcsetpgrp(0, job)
os.write(report, b"job %d\\n" % job)
while os.WIFSTOPPED(status := os.waitpid(job, os.WUNTRACED)[1]):
    os.tcsetpgrp(0, os.getpgrp())
    os.write(report, b"stopped %d\\n" % os.WSTOPSIG(status))
    if os.read(commands, 2) == b"fg":
        os.tcsetpgrp(0, job)
    os.killpg(job, signal.SIGCONT)
os.write(report, b"ended %d\\n" % os.waitstatus_to_exitcode(status))
"""


class Job:
    """A program with a Tty, started by a shell on a terminal of its own."""

    def __init__(self, body):
        self.master, self.slave = pty.openpty()
        self.window(80, 24)
        self.before = termios.tcgetattr(self.slave)
        self.report, report = os.pipe()
        commands, self.commands = os.pipe()
        body = "".join(f"    {line}\n" for line in body.strip().splitlines())
        job = JOB.format(path=sys.path, module=Tty.__module__, report=report, body=body)

        def own_terminal():
            os.setsid()
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.slave)
        argv = [sys.executable, "-c", SHELL, str(report), str(commands), job]
        self.shell = subprocess.Popen(argv, pass_fds=(report, commands), preexec_fn=own_terminal, **streams)
        os.close(report)
        os.close(commands)
        self.said, self.painted = "", b""

    def __enter__(self):
        self.wait("job ")
        self.pid = int(re.search(r"job (\d+)", self.said)[1])
        return self

    def __exit__(self, *_):
        for pid in (self.pid, self.shell.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.shell.wait()
        for handle in (self.master, self.slave, self.report, self.commands):
            with contextlib.suppress(OSError):
                os.close(handle)

    def wait(self, words, seconds=10):
        """Until the job or the shell reported this."""
        end = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < end, f"{words!r} not in {self.said!r}; {self.painted!r}"
            for handle in select.select([self.master, self.report], [], [], 0.1)[0]:
                if handle == self.report:
                    self.said += os.read(handle, 4_096).decode()
                else:
                    self.painted += os.read(handle, 65_536)
        self.drain()

    def drain(self):
        while select.select([self.master], [], [], 0)[0]:
            self.painted += os.read(self.master, 65_536)

    def send(self, data):
        os.write(self.master, data)

    def window(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def is_raw(self):
        now = termios.tcgetattr(self.slave)
        off = termios.ECHO | termios.ICANON | termios.ISIG
        return not now[3] & off and not now[0] & termios.ICRNL and bool(now[1] & termios.OPOST)

    @property
    def is_as_before(self):
        return termios.tcgetattr(self.slave) == self.before


KEY_LOOP = """
with Tty(0, sys.stdout, os.environ) as tty:
    say("ready")
    while True:
        key = await tty.key()
        say("key", *key)
        if key.name == "ctrl-z":
            tty.suspend()
        if key.name == "ctrl-c":
            break
"""


def test_keys_come_in_raw_mode_and_all_is_restored():
    with Job(KEY_LOOP) as job:
        job.wait("ready")
        assert job.is_raw and job.painted == b"\x1b[?2004h"
        job.send("a한\r\x1b[A\x1b[200~x\ry\x1b[201~".encode())
        job.wait("key text a\nkey text 한\nkey enter \nkey up \nkey paste x\ny\n")
        job.send(b"\x1b")
        job.wait("key escape")
        job.send(b"\x03")
        job.wait("ended 0")
        assert job.is_as_before
        assert job.painted.endswith(b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?2004l")


def test_a_paste_that_never_ends_does_not_lock_the_keyboard():
    with Job(KEY_LOOP) as job:
        job.wait("ready")
        job.send(b"\x1b[200~half")
        time.sleep(0.3)  # till the job has read it
        job.send(b"\x03")
        job.wait("ended 0")
        assert "key paste half\nkey ctrl-c" in job.said


ENDS = [
    ("raise KeyError('x')", "ended 1"),
    ("sys.exit(3)", "ended 3"),
    ("asyncio.current_task().cancel(); await tty.key()", "ended 1"),
]


@pytest.mark.parametrize(("how", "end"), ENDS, ids=["exception", "exit", "cancelled"])
def test_the_terminal_is_restored(how, end):
    body = f'with Tty(0, sys.stdout, os.environ) as tty, tty.full_screen():\n    say("ready")\n    await tty.key()\n    {how}'
    with Job(body) as job:
        job.wait("ready")
        assert job.is_raw
        job.send(b"x")
        job.wait(end)
        assert job.is_as_before
        assert b"\x1b[?1049l" in job.painted and b"\x1b[?2004l" in job.painted


def test_the_terminal_is_restored_when_its_owner_is_told_to_end():
    body = """
asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
with Tty(0, sys.stdout, os.environ) as tty:
    say("ready")
    await tty.key()
"""
    with Job(body) as job:
        job.wait("ready")
        assert job.is_raw
        os.kill(job.pid, signal.SIGTERM)
        job.wait("ended 1")
        assert job.is_as_before


@pytest.mark.parametrize("how", ["key", "signal"])
def test_suspend_and_continue(how):
    with Job(KEY_LOOP) as job:
        job.wait("ready")
        job.send(b"\x1a") if how == "key" else os.kill(job.pid, signal.SIGTSTP)
        job.wait(f"stopped {int(signal.SIGTSTP)}")
        assert job.is_as_before and job.painted.endswith(b"\x1b[?2004l")
        os.write(job.commands, b"fg")
        job.wait("key resume")
        assert job.is_raw and job.painted.endswith(b"\x1b[?2004h")
        job.send(b"\x03")
        job.wait("ended 0")
        assert job.is_as_before and job.said.count("resume") == 1


def test_continued_in_the_background_it_stops_again():
    with Job(KEY_LOOP) as job:
        job.wait("ready")
        job.send(b"\x1a")
        job.wait("stopped")
        os.write(job.commands, b"bg")
        job.wait(f"stopped {int(signal.SIGTTOU)}")
        assert job.is_as_before
        os.write(job.commands, b"fg")
        job.wait("key resume")
        assert job.is_raw


def test_stopped_without_a_word_it_takes_the_terminal_again():
    with Job(KEY_LOOP) as job:
        job.wait("ready")
        os.kill(job.pid, signal.SIGSTOP)
        job.wait(f"stopped {int(signal.SIGSTOP)}")
        termios.tcsetattr(job.slave, termios.TCSANOW, job.before)  # as a shell does
        os.write(job.commands, b"fg")
        job.wait("key resume")
        assert job.is_raw
        job.send(b"\x03")
        job.wait("ended 0")
        assert job.is_as_before


def test_a_new_size_is_a_key():
    body = """
with Tty(0, sys.stdout, os.environ) as tty:
    say("ready", *tty.size)
    say((await tty.key()).name, *tty.size)
"""
    with Job(body) as job:
        job.wait("ready 80 24")
        job.window(100, 30)
        job.wait("resize 100 30")


def test_a_terminal_that_is_gone():
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Tty(0, sys.stdout, os.environ) as tty, tty.full_screen():
    say("ready")
    say(*[(await tty.key()).name for _ in range(3)])
    tty.write("nobody sees this")
say("left")
"""
    with Job(body) as job:
        job.wait("ready")
        os.close(job.master)
        job.master = os.open(os.devnull, os.O_WRONLY)
        end = time.monotonic() + 10
        while "left" not in job.said and time.monotonic() < end and select.select([job.report], [], [], 1)[0]:
            job.said += os.read(job.report, 4_096).decode()
        assert "gone gone gone\nleft" in job.said


def test_full_screens_inside_each_other_are_one():
    body = """
with Tty(0, sys.stdout, os.environ) as tty:
    with tty.full_screen(), tty.full_screen():
        tty.write("in")
    tty.write("out")
"""
    with Job(body) as job:
        job.wait("ended 0")
        assert job.painted.count(b"\x1b[?1049h") == job.painted.count(b"\x1b[?1049l") == 1
        assert job.painted.index(b"in") < job.painted.index(b"\x1b[?1049l") < job.painted.index(b"out")


WIDGET = """
class Widget:
    text = ""
    def lines(self, columns, rows, style):
        say("lines", columns, self.text)
        return [style(self.text, "bold")], (0, len(self.text))
    def press(self, key):
        say("pressed", key.name)
        self.text += key.text
        return {"enter": self.text, "ctrl-c": "cancelled"}.get(key.name)
widget = Widget()
with Tty(0, sys.stdout, os.environ) as tty:
    asyncio.get_running_loop().call_later(0.01, tty.press, KeyPress("wake"))
    say("result", await converse(tty, widget, Style(True)), len(asyncio.all_tasks()))
"""


def test_a_widget_has_the_screen_until_its_result():
    with Job(WIDGET) as job:
        job.wait("lines 80 \nlines 80 \n")  # the second one: it was woken
        job.send("한글".encode())
        job.wait("lines 80 한글")
        job.window(90, 20)
        job.wait("lines 90 한글")
        job.send(b"\x1a")
        job.wait("stopped")
        assert job.painted.endswith(b"\x1b[?1049l")
        os.write(job.commands, b"fg")
        job.painted = b""
        deadline = time.monotonic() + 10
        while "\x1b[1m한글".encode() not in job.painted:
            assert time.monotonic() < deadline
            job.drain()
        job.send(b"\r")
        job.wait("ended 0")
        assert "result 한글" in job.said and "pressed resize" not in job.said


def test_only_terminals_are_usable(tmp_path):
    master, slave = pty.openpty()
    with open(slave, "w") as out, open(tmp_path / "file", "w+") as file:
        assert not usable(slave, out, {"TERM": "xterm"})  # no columns, no rows
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        assert usable(slave, out, {"TERM": "xterm"})
        assert not usable(slave, out, {"TERM": "dumb"})
        assert not usable(slave, out, {})
        assert not usable(file.fileno(), out, {"TERM": "xterm"})
        assert not usable(slave, file, {"TERM": "xterm"})
    os.close(master)
