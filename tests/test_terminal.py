"""Terminal: what a person sees, on a real pseudo-terminal whose screen pyte draws."""

import re
import time

import pytest
from wcwidth import wcswidth

from openpista import cells, fit_cells, printable

ESCAPES = re.compile(rb"\x1b|\xc2[\x80-\x9f]")
OURS = re.compile(rb"\x1b\[2m|\x1b\[0m|\r\x1b\[K")  # dim, plain, clear the line: all that `run` sends


def ask(command, *more, **others):
    """Steps of a model that runs a command, then answers."""
    call = {"name": "system_run", "arguments": {"command": command} | others}
    return [{"tool_calls": [call]}, {"text": "All done."}, *more]


# Text

PRINTABLE = [
    ("plain 한국어 ✓\n\ttab", "plain 한국어 ✓\n\ttab"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[2J\x1b[1;1Hhome", "home"),
    ("\x1b[?1049h\x1b[>4;2mmode", "mode"),
    ("\x1b]0;title\x07after", "after"),
    ("\x1b]52;c;cm0gLXJm\x1b\\after", "after"),  # the clipboard
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP1$q\x1b\\dcs \x1b_apc\x1b\\ \x1b^pm\x1b\\", "dcs  "),
    ("\x9b31mC1", "31mC1"),
    ("bell\x07 back\x08 \x7f nul\0", "bell back  nul"),
    ("over\rwrite", "overwrite"),
    ("\u202eevil\u202c \u2066x\u2069 \u200e\u200f", "evil x "),
    ("\x1b", ""),
    ("\x1b[", "["),
]


@pytest.mark.parametrize(("text", "shown"), PRINTABLE)
def test_printable(text, shown):
    assert printable(text) == shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printable(text))


CELLS = [
    ("", 0),
    ("abc", 3),
    ("한국어", 6),
    ("ｆｕｌｌ", 8),
    ("日本", 4),
    ("é", 1),
    ("e\u0301", 1),
    ("\u1112\u1161\u11ab", 2),  # 한 in three letters, as macOS writes the names of files
    ("a\u200bb", 2),
    ("✓ …", 3),
    ("\u2601\ufe0e", 1),
]


@pytest.mark.parametrize(("text", "width"), CELLS)
def test_cells(text, width):
    assert wcswidth(text) == width  # what terminals hold
    assert cells(text) == width


FITTED = [
    ("abc", 3, "abc"),
    ("abcd", 3, "ab…"),
    ("한국어", 6, "한국어"),
    ("한국어", 5, "한국…"),
    ("한국어", 4, "한…"),
    ("한국어", 1, "…"),
]


@pytest.mark.parametrize(("text", "width", "fitted"), FITTED)
def test_fit_cells(text, width, fitted):
    assert fit_cells(text, width) == fitted
    assert cells(fitted) <= width


# Progress and the answer


def test_progress_comes_and_goes(model, terminal):
    steps = ask("sleep 0.6; echo hi")
    steps[0]["delay"] = steps[1]["delay"] = 0.5
    model.script(*steps)
    tty = terminal("run", "-e", "do it", "--yes")
    tty.wait("thinking")
    tty.wait("▶ sleep 0.6; echo hi")
    assert tty.end() == 0
    assert "thinking" not in tty.text and "▶" not in tty.text
    assert re.search(r"^✓ sleep 0.6; echo hi  0\.\d s$", tty.text, re.M)
    assert re.search(r"^All done\.$", tty.text, re.M)
    assert re.search(r"openai/gpt-4o · 1 tool call · [\d,]+ tokens · \d+\.\d s$", tty.text)
    seconds = {match for frame in tty.frames for match in re.findall(r"▶ .*?  (0\.\d) s", frame)}
    assert len(seconds) >= 2  # the line is alive
    assert OURS.search(tty.raw) and not ESCAPES.search(OURS.sub(b"", tty.raw))


def test_the_answer_streams(model, terminal):
    model.script({"text": "first words, then the very last", "deltas": 6, "pace": 0.15})
    tty = terminal("run", "-e", "speak")
    assert "last" not in tty.wait("first")
    tty.wait("very last")
    assert tty.end() == 0
    assert tty.text.count("first words, then the very last") == 1


def test_a_failed_tool_is_marked(model, terminal):
    model.script(*ask("false"))
    tty = terminal("run", "-e", "x")
    assert tty.end() == 0
    assert re.search(r"^✗ false", tty.text, re.M)


def test_words_before_a_tool_stand_on_a_line_of_their_own(model, terminal):
    model.script({"text": "I will look.", **ask("echo hi")[0]}, {"text": "It says hi."})
    tty = terminal("run", "-e", "look")
    assert tty.end() == 0
    lines = tty.text.splitlines()
    assert lines[0] == "I will look." and lines[1].startswith("✓ echo hi") and lines[2] == "It says hi."


def test_an_answer_that_breaks_off_is_said_again_whole(model, terminal):
    model.script({"text": "one two three four", "cut": 3}, {"text": "one two three four"})
    tty = terminal("run", "-e", "count")
    assert tty.end(20) == 0
    assert "trying again in" in tty.text
    assert "one two three four" in tty.text.splitlines()


def test_a_small_terminal(model, terminal):
    steps = ask("printf '%s' 한국어한국어한국어한국어; sleep 0.4")
    steps[0]["delay"] = 0.4
    model.script(*steps)
    tty = terminal("run", "-e", "x", columns=20)
    assert tty.end() == 0
    status = [line for frame in tty.frames for line in frame.splitlines() if line.startswith("▶")]
    assert status and all(line.endswith("…") for line in status)
    assert "thinking" not in tty.text and "▶" not in tty.text


def test_a_small_terminal_when_the_answer_goes_to_a_file(model, terminal, tmp_path):
    steps = ask("printf '%s' a-long-command-line-that-does-not-fit; sleep 0.4")
    model.script(*steps)
    with (tmp_path / "out").open("wb") as out:
        tty = terminal("run", "-e", "x", columns=20, stdout=out)
        assert tty.end() == 0
    assert "▶" not in tty.text
    assert (tmp_path / "out").read_text() == "All done.\n"


PLAIN = [{"TERM": "dumb"}, {"TERM": ""}, {"NO_COLOR": "1"}]


@pytest.mark.parametrize("env", PLAIN, ids=str)
def test_no_colours(model, terminal, env):
    steps = ask("sleep 0.4")
    model.script(*steps)
    tty = terminal("run", "-e", "x", **env)
    assert tty.end() == 0
    assert b"\x1b[2m" not in tty.raw
    if "TERM" in env:
        assert not ESCAPES.search(tty.raw) and b"\r" not in tty.raw.replace(b"\r\n", b"")
    assert "✓ sleep 0.4" in tty.text and "All done." in tty.text


# Which of the three is a terminal


def test_stdout_in_a_file(model, terminal, tmp_path):
    steps = ask("echo hi")
    steps[0]["delay"] = 0.5
    model.script(*steps)
    with (tmp_path / "out").open("wb") as out:
        tty = terminal("run", "-e", "x", stdout=out)
        tty.wait("thinking")
        assert tty.end() == 0
    assert (tmp_path / "out").read_bytes() == b"All done.\n"
    assert "All done." not in tty.text and "thinking" not in tty.text
    assert "✓ echo hi" in tty.text


def test_stderr_in_a_file(model, terminal, tmp_path):
    model.script(*ask("rm -rf nothing-here"))
    with (tmp_path / "err").open("wb") as err:
        tty = terminal("run", "-e", "x", stderr=err)
        assert tty.end() == 0
    assert (tmp_path / "err").read_bytes() == b""
    assert tty.text == "All done." and not ESCAPES.search(tty.raw)
    assert "nobody" in model.bodies()[1]["messages"][-1]["content"]


def test_stdin_in_a_pipe(model, terminal, tmp_path):
    (tmp_path / "in").write_text("the piped words")
    model.script(*ask("rm -rf nothing-here"))
    with (tmp_path / "in").open("rb") as stdin:
        tty = terminal("run", "-e", "x", stdin=stdin)
        tty.wait("Run it?")  # the terminal is still there to answer on
        tty.send("y\n")
        assert tty.end() == 0
    assert "All done." in tty.text
    first, second = model.bodies()
    assert "the piped words" in first["messages"][-1]["content"]
    assert "(no output)" in second["messages"][-1]["content"]


def test_json_on_a_terminal_is_json_alone(model, terminal, tmp_path):
    model.script({"text": "hi \x9b31m\u202e \x1b[31m there"})
    with (tmp_path / "err").open("wb") as err:
        tty = terminal("run", "-e", "x", "--json", stderr=err)
        assert tty.end() == 0
    assert tty.text.startswith("{") and tty.text.endswith("}")
    assert not ESCAPES.search(tty.raw) and "\u202e".encode() not in tty.raw


# The question

ANSWERS = [
    ("y\n", 1),
    (" YES \n", 1),
    ("n\n", 0),
    ("\n", 0),
    ("뭐?\n", 0),
    ("\x04", 0),
    ("a\n", 2),
]


@pytest.mark.parametrize(("keys", "runs"), ANSWERS, ids=repr)
def test_the_question(model, terminal, tmp_path, keys, runs):
    (tmp_path / "victim").mkdir()
    command = "rm -r victim; mkdir victim; echo run >> log"
    call = {"name": "system_run", "arguments": {"command": command, "workdir": str(tmp_path)}}
    model.script({"tool_calls": [call]}, {"tool_calls": [call]}, {"text": "All done."})
    tty = terminal("run", "-e", "x")
    shown = tty.wait("Run it?")
    assert "  " + command in shown and "rm deletes files" in shown
    tty.send(keys)
    if runs == 1:  # y is for once: the second time it asks again
        tty.wait("✓")
        end = time.monotonic() + 5
        while tty.text.count("Run it?") < 2 and time.monotonic() < end:
            tty.pump(0.1)
        tty.send("n\n")
    assert tty.end() == 0
    log = tmp_path / "log"
    assert (log.read_text() if log.exists() else "").count("run") == runs
    assert "All done." in tty.text
    results = [message["content"] for message in model.bodies()[-1]["messages"] if message["role"] == "tool"]
    refused = ["denied by the person" in text or "said no in this turn" in text for text in results]
    assert sum(refused) == 2 - runs
    assert tty.text.count("Run it?") == (2 if runs == 1 else 1)  # no is final, a is for ever


def test_ctrl_c_at_the_question(model, terminal, openpista, openai):
    model.script(*ask("rm -rf nothing-here"))
    tty = terminal("run", "-e", "x", "--session", "s")
    tty.wait("Run it?")
    tty.send("\x03")
    assert tty.end() == 130
    assert "openpista: interrupted" in tty.text
    model.script({"text": "back"})
    assert openpista("run", "-e", "again", "--session", "s", env=openai).stdout == "back\n"


def test_what_was_typed_before_the_question_does_not_answer_it(model, terminal):
    steps = ask("rm -rf nothing-here")
    steps[0]["delay"] = 0.6
    model.script(*steps)
    tty = terminal("run", "-e", "x")
    tty.wait("thinking")
    tty.send("y\n")
    tty.wait("Run it?")
    tty.send("n\n")
    assert tty.end() == 0
    assert "denied by the person" in model.bodies()[1]["messages"][-1]["content"]


def test_the_question_shows_all_that_counts(model, terminal):
    """Where it would run, and the variables that are set for it, may be what makes it dangerous."""
    model.script(*ask("rm -rf logs", workdir="/usr", env={"LANG": "canary-value"}))
    tty = terminal("run", "-e", "x")
    shown = tty.wait("Run it?")
    tty.send("n\n")
    assert tty.end() == 0
    assert "/usr" in shown and "LANG=canary-value" in shown


def test_the_question_hides_nothing_behind_escapes(model, terminal):
    model.script(*ask("rm -rf nothing-here #\x1b[2K\r\x1b[8m\x1b]0;t\x07 한국어\necho second"))
    tty = terminal("run", "-e", "x")
    shown = tty.wait("Run it?")
    tty.send("n\n")
    assert tty.end() == 0
    assert "  rm -rf nothing-here #\\x1b[2K\\r\\x1b[8m\\x1b]0;t\\x07 한국어\n  echo second" in shown
    assert not ESCAPES.search(OURS.sub(b"", tty.raw))


# What must not reach the terminal

EVIL = "\x1b[31mred\x1b[0m \x1b]0;owned\x07\x1b]52;c;aGk=\x1b\\ \x9b2J\u202egnp"


@pytest.mark.parametrize("deltas", [1, 4, 60])
def test_no_escape_of_a_model_arrives(model, terminal, deltas):
    model.script({"text": f"start {EVIL} end", "deltas": deltas})
    tty = terminal("run", "-e", "x")
    assert tty.end() == 0
    assert not ESCAPES.search(OURS.sub(b"", tty.raw)) and "\u202e".encode() not in tty.raw and b"\x07" not in tty.raw
    assert "red" in tty.text and "end" in tty.text and "owned" not in tty.text


def test_no_escape_of_a_tool_or_a_name_arrives(model, terminal, home):
    evil = home / "workspace" / "skills" / "\x1b[31mevil\x07"
    evil.mkdir(parents=True)
    (evil / "SKILL.md").write_text("---\nname: \x1b[31mevil\ndescription: [\x1b[31m\n---\nx\n")
    calls = [
        {"name": "system_run", "arguments": {"command": "printf '\\033[31mred\\033]0;t\\007'; # \x1b[31m\x07"}},
        {"name": "no\x1b[31m_such", "arguments": {"command": "\x1b[31m"}},
    ]
    model.script({"tool_calls": calls[:1]}, {"tool_calls": calls[1:]}, {"status": 400, "body": "\x1b[31mno\x07"})
    for words in (["run", "-e", "x", "--yes", "--session", "s"], ["sessions", "show", "s"], ["sessions", "list"]):
        tty = terminal(*words)
        tty.end()
        assert not ESCAPES.search(OURS.sub(b"", tty.raw)) and b"\x07" not in tty.raw, words
    for words in (["skills", "list"], ["skills", "validate"], ["run", "--model", "\x1b[31m", "-e", "\x1b[31mx"]):
        tty = terminal(*words)
        tty.end()
        assert not ESCAPES.search(OURS.sub(b"", tty.raw)) and b"\x07" not in tty.raw, words


def test_no_escape_arrives_in_a_traceback(model, terminal):
    model.script({"status": 400, "body": "\x1b[31mno\x07"})
    tty = terminal("--debug", "run", "-e", "x")
    assert tty.end() == 1
    assert b"Traceback" in tty.raw
    assert not ESCAPES.search(OURS.sub(b"", tty.raw)) and b"\x07" not in tty.raw


@pytest.mark.parametrize("deltas", [1, 9])
def test_the_key_in_an_answer_is_masked_and_said_once(model, terminal, deltas):
    model.script({"text": "the key is test-key-123456 indeed", "deltas": deltas})
    tty = terminal("run", "-e", "x")
    assert tty.end() == 0
    assert "the key is [secret] indeed" in tty.text
    assert "test-key" not in tty.text and tty.text.count("the key is") == 1


# Two at a terminal


def test_the_second_on_a_session_waits_and_says_so(model, terminal):
    model.script(
        {"model": "a", "tool_calls": [{"name": "system_run", "arguments": {"command": "sleep 1"}}]},
        {"model": "a", "text": "first answer"},
        {"model": "b", "text": "second answer"},
    )
    one = terminal("run", "-e", "one", "--session", "s", "--model", "a")
    one.wait("▶ sleep 1")
    two = terminal("run", "-e", "two", "--session", "s", "--model", "b")
    two.wait("session s is in use by")
    assert f":{one.process.pid}; waiting for it" in two.text.replace("\n", "")
    assert (one.end(), two.end()) == (0, 0)
    assert "first answer" in one.text and "second answer" in two.text
    assert "first answer" in str(model.bodies()[-1]["messages"])


# A key, typed where pickers cannot be painted


def test_a_key_is_typed_without_echo(terminal, home):
    tty = terminal("auth", "login", "--provider", "groq", TERM="dumb")
    tty.wait("Key for groq:")
    tty.send("typed-key-0123456789\n")
    assert tty.end() == 0
    assert b"typed-key" not in tty.raw and "stored the key …6789 for groq" in tty.text.replace("\n", "")
    assert "typed-key-0123456789" in (home / "credentials.toml").read_text()


@pytest.mark.parametrize(("keys", "code"), [("\x03", 130), ("\x04", 2), ("\n", 2), ("a b\n", 2)], ids=repr)
def test_no_key_is_typed(terminal, home, keys, code):
    tty = terminal("auth", "login", "--provider", "groq", TERM="dumb")
    tty.wait("Key for groq:")
    tty.send(keys)
    assert tty.end() == code
    assert "Traceback" not in tty.text and "openpista: " in tty.text
    assert not (home / "credentials.toml").exists()


def test_an_answer_that_comes_in_lines_is_shown_once(model, terminal):
    model.script({"text": "- a\n- b\n- c\nend\n", "deltas": 4})
    tty = terminal("run", "-e", "x")
    assert tty.end() == 0
    assert [line.strip() for line in tty.text.splitlines() if line.strip()][:4] == ["- a", "- b", "- c", "end"]
    assert tty.text.count("- b") == 1
