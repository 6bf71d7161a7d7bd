"""Chat and login as a person uses them: real processes on real pseudo-terminals, a fake model server."""

import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import stat
import sys
import termios

import pytest
from launcher import START
from terminals import foreign, is_alive

PROMPT = "› "
TOOK = re.compile(r"tool calls? · [\d,]+ tokens · \d+\.\d s")
RUNS = re.compile(r"^[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] ", re.M)
SETTLE = 0.6  # seconds after which a key counts as an answer
ENTER, ESC, UP, DOWN = "\r", "\x1b", "\x1b[A", "\x1b[B"
EVIL = "\x1b[35mred\x1b[0m \x1b]0;owned\x07\x1b]52;c;aGk=\x1b\\ \x9b2J\u202egnp\x1b[3;7H\x1b[5B\x08\x7f"


def run(command, **others):
    """A step of a model that runs a command."""
    return {"tool_calls": [{"name": "system_run", "arguments": {"command": command} | others}]}


def paste(text):
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def chat(terminal):
    """chat("-s", "work", columns=20) -> a Terminal at its first prompt; whatever it is sent is looked at in the end."""
    opened = []

    def start(*words, hint="openai/gpt-4o", **more):
        opened.append(terminal("tui", *words, **more))
        opened[-1].until(lambda: len(opened[-1].lines) >= 3 and opened[-1].lines[-1].startswith(hint))
        return opened[-1]

    yield start
    for tty in opened:
        assert not foreign(tty.raw)


def answered(tty, count):
    """Until so many turns have ended, and nothing runs."""
    over = "{} turns have not ended".format
    tty.until(lambda: len(TOOK.findall(tty.scrolled.replace("\n", ""))) >= count, over(count))
    tty.until(lambda: not RUNS.search(tty.text), "it still runs")


def started(tty, pid):
    """The process of a tool that wrote its id into a file; `running` makes such a tool."""
    tty.until(lambda: pid.exists() and pid.read_text().strip(), "the tool did not start")
    return int(pid.read_text())


def running(pid, seconds=60):
    """A step of a model: a tool that runs for long."""
    return run(f"echo $$ > {pid}; sleep {seconds}; echo late")


def leave(tty, keys="\x04", code=0):
    tty.send(keys)
    assert tty.end() == code
    assert tty.left_behind() == []


def prompts(tty):
    """The lines of the screen that look like the input."""
    return [line for line in tty.lines if line.startswith("›")]


def questions(model):
    """What the person said, in the order in which it was asked."""
    return [
        [message["content"] for message in body["messages"] if message["role"] == "user"][-1] for body in model.bodies()
    ]


# An answer


def test_greeting_answer_and_leaving(model, chat):
    text = "# Head\nsome **bold** and `code` here\n- item\n\n```py\nx = 1\n```\nthe end"
    model.script({"text": text, "deltas": 9})
    tty = chat()
    assert re.match(r"openpista [\d.]+ · openai/gpt-4o · new session chat-[\w-]+\n›\n", tty.text)
    assert tty.cursor == (1, 2) and tty.look("openpista") != tty.look(PROMPT.strip())
    tty.send("hello" + ENTER)
    answered(tty, 1)
    shown = ["› hello", "Head", "some bold and code here", "• item", "", "```py", "x = 1", "```", "the end"]
    assert tty.lines[2 : 2 + len(shown)] == shown
    assert tty.look("bold").bold and not tty.look("some").bold and not tty.look("and code").bold
    assert tty.look("code here").fg == tty.look("x = 1").fg == "cyan"
    assert tty.look("Head").bold and tty.look("Head").fg == "cyan" and tty.look("the end").fg == "default"
    assert questions(model) == ["hello"]
    tty.send("not sent")
    tty.wait("› not sent")
    tty.send("\x15")
    tty.gone("not sent")
    leave(tty)
    assert "the end" in tty.text and tty.lines[-1].startswith("openai/gpt-4o · 0 tool calls")  # no input is left


def test_the_answer_streams_and_all_of_it_stays(model, chat):
    lines = [f"line number {n} of it" for n in range(80)]
    model.script({"text": "\n".join(lines), "deltas": 12, "pace": 0.03})
    tty = chat()
    tty.send("count" + ENTER)
    assert "number 79" not in tty.wait("line number 5")
    tty.wait("answering")
    assert prompts(tty)[-1] == "›"
    answered(tty, 1)
    assert [line for line in tty.scrolled.splitlines() if line.startswith("line")] == lines
    assert "answering" not in tty.text
    assert any(re.search(r". answering  0 s", frame) for frame in tty.frames)


def test_an_answer_that_breaks_off_is_said_again_whole(model, chat):
    model.script(
        {"text": "one two three four", "cut": 3}, {"text": "one two three four"}, {"status": 400, "body": "{}"}
    )
    tty = chat()
    tty.send("count" + ENTER)
    answered(tty, 1)
    assert "trying again in" in tty.text and tty.lines.count("one two three four") == 1
    tty.send("once more" + ENTER)
    tty.wait("✗ openai/gpt-4o answered 400")
    assert prompts(tty)[-1] == "›"


def test_a_tool_shows_what_it_does_and_says(model, chat):
    model.script(run("true"), run("sleep 0.4; seq 9"), {"text": "counted", "delay": 0.3})
    tty = chat()
    tty.send("\x0f")
    tty.wait("no output yet")
    tty.send("go" + ENTER)
    tty.wait("▶ sleep 0.4; seq 9")
    tty.wait("thinking")
    answered(tty, 1)
    assert any(re.search(r". ▶ sleep 0.4; seq 9  \d s · \d+ tokens", frame) for frame in tty.frames)
    assert any(re.search(r". thinking  \d s · \d+ tokens", frame) for frame in tty.frames)
    at = next(n for n, line in enumerate(tty.lines) if re.fullmatch(r"✓ sleep 0.4; seq 9  0\.\d s", line))
    folded = ["  │ 1", "  │ 2", "  │ 3", "  │ 4", "  … 5 more lines (Ctrl-O shows all)", "counted"]
    assert tty.lines[at + 1 : at + 7] == folded
    assert tty.look("✓").fg == "green"
    tty.send("\x0f")
    tty.wait("  8\n  9\n›")
    assert "1\n2\n3" in model.bodies()[-1]["messages"][-1]["content"]


# Approval


def test_a_risky_call_is_asked_about_with_one_key(model, chat, tmp_path):
    def risky(name):
        return run(f"rm -rf nothing; echo run >> {name}", workdir=str(tmp_path))

    def runs(name):
        return (tmp_path / name).read_text().count("run") if (tmp_path / name).exists() else 0

    model.script(
        *(risky("log"), {"text": "first done"}),
        *(risky("log"), {"text": "second done"}),
        *(risky("log"), {"text": "third done"}),
        *(risky("other"), risky("more"), {"text": "fourth done"}),
    )
    tty = chat()
    tty.send("one" + ENTER)
    shown = tty.wait("Run it?")
    assert f"  rm -rf nothing; echo run >> log\n  in {tmp_path}" in shown.replace("\n  " + str(tmp_path), str(tmp_path))
    assert "rm deletes files" in shown and tty.raw.count(b"\x07") == 1
    tty.send("y")  # too soon: it was typed before the question could be read
    tty.wait("› y")
    assert "Run it?" in tty.text and runs("log") == 0
    tty.send("\x7f")
    tty.spend(SETTLE)
    tty.send("x")  # no answer at all
    tty.send(paste("a") + ENTER)  # what is pasted is none either, and waits
    tty.wait("queued: xa")
    tty.spend(SETTLE)
    for letter in "yes":  # the first letter of a sentence is no answer either
        tty.send(letter)
    tty.wait("› yes")
    tty.spend(SETTLE)
    tty.send("y")  # nor is a letter behind words that are there
    tty.wait("› yesy")
    assert "Ctrl-U empties the input" in tty.text and runs("log") == 0
    tty.send("\x15")
    tty.spend(SETTLE)
    tty.send("y")
    tty.wait("  yes, once")
    answered(tty, 1)
    tty.wait("Run it?")  # about what was queued
    assert runs("log") == 1 and questions(model)[-1] == "xa" and prompts(tty)[-1] == "›"
    tty.spend(SETTLE)
    tty.send("ㅁ")  # the key of the a on a Korean keyboard
    tty.wait("  yes, and always this command in this session")
    answered(tty, 2)
    tty.send("three" + ENTER)
    answered(tty, 3)
    assert runs("log") == 3 and tty.raw.count(b"\x07") == 2
    tty.send("four" + ENTER)
    tty.wait("Run it?")
    tty.spend(SETTLE)
    tty.send("n")
    tty.wait("  no, and nothing risky in this turn")
    answered(tty, 4)
    assert runs("other") == runs("more") == 0 and tty.raw.count(b"\x07") == 3
    results = [message["content"] for message in model.bodies()[-1]["messages"] if message["role"] == "tool"]
    assert sum("denied by the person" in text or "said no in this turn" in text for text in results) == 2


def test_escape_says_no_and_ctrl_c_at_the_question_stops(model, chat):
    model.script(run("rm -rf nothing"), {"text": "then not"}, run("rm -rf nothing"), {"text": "back"})
    tty = chat()
    tty.send("one" + ENTER)
    tty.wait("Run it?")
    tty.spend(SETTLE)
    tty.send(ESC)
    tty.wait("  no, and nothing")
    answered(tty, 1)
    tty.send("two" + ENTER)
    tty.wait("Run it?")
    tty.send("\x03")
    tty.wait("\nstopped\n")
    tty.gone("Run it?")
    tty.send("three" + ENTER)
    tty.wait("\nback\n")
    assert all(row["status"] == 200 for row in model.requests())


# Stopping and leaving


def test_ctrl_c_during_a_tool(model, chat, tmp_path, openpista, openai):
    model.script(running(tmp_path / "pid"), {"text": "works again"})
    tty = chat("-s", "work", "--yes")
    tty.send("go" + ENTER)
    pid = started(tty, tmp_path / "pid")
    tty.wait("▶ echo")
    assert is_alive(pid)
    tty.send("\x03")
    tty.wait("\nstopped")
    tty.until(lambda: not is_alive(pid), "the child lives on")
    tty.send("again" + ENTER)
    tty.wait("\nworks again\n")
    answered(tty, 1)
    assert [row["status"] for row in model.requests()] == [200, 200]  # the server refuses a call without a result
    messages = model.bodies()[-1]["messages"]
    roles = [message["role"] for message in messages]
    assert roles[1:4] == ["user", "assistant", "tool"] and roles[-1] == "user"
    leave(tty)
    shown = openpista("sessions", "show", "work")
    assert shown.returncode == 0 and "works again" in shown.stdout and "late\n" not in shown.stdout


def test_a_turn_that_is_stopped_before_it_began(model, chat):
    tty = chat()
    tty.send("never asked" + ENTER + "\x03")
    tty.wait("\nstopped\n")
    tty.send("and on" + ENTER)
    tty.wait("\ndone\n")
    assert "never asked" not in questions(model)[-1]
    leave(tty)


def test_ctrl_c_twice_leaves_a_tool_that_will_not_stop(model, chat, tmp_path):
    model.script(run(f"trap '' INT TERM HUP; echo $$ > {tmp_path}/pid; sleep 60; sleep 60"))
    tty = chat("--yes")
    tty.send("go" + ENTER)
    pid = started(tty, tmp_path / "pid")
    tty.send("\x03")
    tty.wait("stopping")
    leave(tty, "\x03")
    assert not is_alive(pid) and "\nstopped" in tty.text


def test_ctrl_c_empties_the_input_and_twice_it_leaves(chat):
    tty = chat()
    tty.send("\x03")
    tty.wait("Ctrl-C once more leaves")
    tty.send("half a thought")
    tty.wait("› half a thought")
    assert "once more" not in tty.text
    tty.send("\x03")
    tty.gone("half a thought")
    leave(tty, "\x03")


@pytest.mark.parametrize("words", ["/quit", "/exit"])
def test_leaving_by_a_command_during_a_turn(model, chat, tmp_path, words):
    model.script(running(tmp_path / "pid"))
    tty = chat("--yes")
    tty.send("go" + ENTER)
    pid = started(tty, tmp_path / "pid")
    leave(tty, words + ENTER)
    assert not is_alive(pid)


# Typing meanwhile


def test_what_is_typed_during_a_turn_waits_for_its_end(model, chat):
    model.script({"text": "one done", "delay": 0.5}, *({"text": f"{word} done"} for word in ("two", "three", "four")))
    tty = chat()
    tty.send("one" + ENTER)
    tty.wait("thinking")
    tty.send("two" + ENTER)
    tty.wait("\nqueued: two\n")
    for word in ("three", "four", "five"):
        tty.send(word + ENTER)
    shown = tty.wait("more texts queued")
    assert "queued: two\nqueued: three\n… 2 more texts queued\n›" in shown
    tty.send("typing on")
    tty.wait("› typing on")
    answered(tty, 5)
    assert questions(model) == ["one", "two", "three", "four", "five"]
    assert "queued" not in tty.text and prompts(tty)[-1] == "› typing on"
    said = [line for line in tty.scrolled.splitlines() if line.startswith("› ")]
    assert said == ["› one", "› two", "› three", "› four", "› five", "› typing on"]


def test_after_a_stop_what_waited_is_in_the_input_again(model, chat):
    model.script({"text": "never", "delay": 20}, {"text": "at last"}, {"text": "never", "delay": 20})
    tty = chat()
    tty.send("one" + ENTER)
    tty.wait("thinking")
    tty.send("two" + ENTER + "three" + ENTER + "half")
    tty.wait("› half")
    tty.send("\x03")
    tty.wait("\nstopped\n› two\n  three\n  half")
    assert "queued" not in tty.text
    tty.send(ENTER)
    tty.wait("\nat last\n")
    assert questions(model)[-1] == "two\nthree\nhalf"
    tty.send("/stop" + ENTER)
    tty.wait("nothing runs")
    tty.send("slow" + ENTER)
    tty.wait("thinking")
    tty.send("/stop" + ENTER)
    tty.until(lambda: tty.text.count("\nstopped\n") == 2)


# Commands


def test_every_command(model, chat, home):
    skill = home / "workspace" / "skills" / "rain"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: rain\ndescription: Tell whether it rains.\n---\nx\n")
    model.script({"text": "fine"})
    tty = chat(rows=60)

    def says(command, *words):
        tty.send(command + ENTER)
        tty.until(lambda: all(word in tty.text.rpartition(f"› {command}")[2] for word in words), f"no {words}")

    says("/sessions", "no sessions yet")
    tty.send("how are you" + ENTER)
    answered(tty, 1)
    names = (
        "help login connection models model agent new sessions resume clear stop usage tools skills quit exit".split()
    )
    says("/help", *(f"  /{name} " for name in names), "Tab completes")
    says("/usage", "this session:", "tokens in", "cost unknown")
    says("/tools", "system.run", "skill.read", "You are asked before")
    says("/skills", "rain", "Tell whether it rains.")
    says("/model", "openai/gpt-4o (as configured)")
    says("/model gpt-5-codex", "openai/gpt-5-codex answers this session from now on")
    says("/model", "openai/gpt-5-codex (chosen for this session)")
    says("/model reset", "\nopenai/gpt-4o\n")
    says("/modles", "there is no /modles", "models", "/help")
    says("/resume nothing", "✗", "nothing")
    says("/model nobody/x", "✗")
    says("/new", "new session chat-")
    says("/stop", "nothing runs")
    tty.send("/clear" + ENTER)
    tty.until(lambda: tty.lines[:1] == ["›"] and len(tty.lines) == 2)
    tty.send("/HELP" + ENTER)
    tty.wait("/exit")
    tty.send("\x0c")  # Ctrl-L
    tty.gone("/exit")
    assert len(model.bodies()) == 1
    leave(tty)


@pytest.mark.parametrize("text", ["/etc/hosts", "/etc/hosts what is in it?", "//", "/a\nb"])
def test_a_text_that_only_looks_like_a_command(model, chat, text):
    tty = chat()
    tty.send(paste(text) + ENTER)
    answered(tty, 1)
    assert questions(model) == [text]


def test_tab_completes(model, chat, home, openpista, openai):
    model.script({"path": "/models", "models": ["gpt-4o", "gpt-5-codex", "gpt-5-mini"], "times": 9})
    assert openpista("models", "list", env=openai).returncode == 0
    assert openpista("run", "-e", "hi", "--session", "my own talk", env=openai).returncode == 0
    tty = chat()
    tty.send("/us\t")
    tty.wait("› /usage")
    assert tty.cursor[1] == 9
    tty.send("\x15/mo\t")
    shown = tty.wait("/models")
    assert "› /model\n" in shown and re.search(r"^ /models  /model$", shown, re.M)
    tty.send("\t")
    tty.wait("› /models")
    tty.send("\x15/model gpt-5-c\t")
    tty.wait("› /model gpt-5-codex")
    tty.send(ENTER)
    tty.wait("openai/gpt-5-codex answers")
    tty.send("/resume my o\t")
    tty.wait("› /resume my own talk")
    tty.send("\x15no command /us\t")
    tty.wait("› no command /us")
    assert "/usage" not in tty.lines[-2]
    tty.send("\x15")
    (home / "credentials.toml").write_text("broken [")
    tty.send("/model g\t")  # which needs the file
    tty.wait("› /model g")
    leave(tty, "\x15\x04")


# The input


def test_history_of_an_earlier_process(model, chat):
    first = chat()
    for number, text in enumerate(["first words", "second 한국어 words", "two\x1b\rlines"], 1):
        first.send(text + ENTER)
        answered(first, number)
    leave(first)
    tty = chat()
    tty.send(UP)
    tty.wait("› two\n  lines")
    tty.send(UP + UP)
    tty.wait("› second 한국어 words")
    tty.send(DOWN + DOWN * 2)
    tty.gone("second")
    tty.send("\x12FIRST")
    tty.wait("(search) FIRST: first words")
    tty.send(ENTER)
    tty.wait("› first words")
    tty.send(ENTER)
    answered(tty, 1)
    assert questions(model)[-1] == "first words"


def test_several_lines(model, chat):
    tty = chat()
    tty.send("one\x1b\rtwo\\\rthree")
    tty.wait("› one\n  two\n  three")
    assert tty.cursor == (3, 7)
    tty.send(ENTER)
    answered(tty, 1)
    assert questions(model) == ["one\ntwo\nthree"]
    assert "› one\n  two\n  three\n" in tty.text


def test_a_paste_of_10_000_lines(model, chat):
    text = "\n".join(f"line {n}" for n in range(10_000))
    tty = chat()
    tty.send(paste(text))
    tty.wait("  line 9999")
    assert len(tty.lines) < 30 and "more lines" in tty.text
    tty.spend(0.2)
    assert model.bodies() == []
    tty.send(ENTER)
    answered(tty, 1)
    assert questions(model) == [text]
    shown = [line for line in tty.scrolled.splitlines() if re.match(r"[› ] ?line \d", line)]
    assert shown == ["› line 0", *(f"  line {n}" for n in range(1, 12))]
    assert "  … 9,988 more lines" in tty.text


def test_korean(model, chat):
    model.script({"text": "네, **안녕**하세요 " * 12, "deltas": 30})
    tty = chat()
    tty.send("안녕")
    tty.wait("› 안녕")
    assert tty.cursor[1] == 2 + 4
    tty.send("하세요\x1b[D\x1b[D")
    tty.wait("› 안녕하세요")
    assert tty.cursor[1] == 2 + 6
    tty.send("\x7f참")
    tty.wait("› 안녕참세요")
    for byte in "끝".encode():  # in portions, as a slow line brings them
        tty.send(bytes([byte]))
    tty.wait("› 안녕참끝세요")
    tty.send(ENTER)
    answered(tty, 1)
    assert questions(model) == ["안녕참끝세요"]
    at = next(n for n, line in enumerate(tty.lines) if line.startswith("네,"))
    assert tty.look("안녕하").bold
    rows = list(itertools.takewhile(lambda line: "tool calls" not in line, tty.lines[at:]))
    assert " ".join(rows) == ("네, 안녕하세요 " * 12).strip()  # broken at spaces, nothing lost


# Sizes

SIZES = [(100, 40), (60, 40), (20, 40), (80, 40), (80, 24)]
LOW = [(80, 3), (20, 3), (20, 24), (80, 24)]


@pytest.mark.parametrize("reflow", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, LOW], ids=["wide", "low"])
def test_a_resize_during_an_answer(model, chat, reflow, sizes):
    words = [f"w{n:03}" for n in range(120)]
    model.script({"text": " ".join(words), "deltas": 40, "pace": 0.03})
    tty = chat(reflow=reflow)
    tty.send("go" + ENTER)
    tty.wait("w001")
    tty.send("typed")
    tty.wait("› typed")
    for columns, rows in sizes:
        tty.resize(columns, rows)
        before = len(tty.frames)
        tty.until(lambda before=before: len(tty.frames) > before)
    answered(tty, 1)
    tty.send(" on")
    tty.wait("› typed on")
    if reflow or sizes is LOW:  # where lines are cut instead of wrapped, too many are taken away in a narrower window
        assert "\n› go\n" in tty.scrolled
    assert tty.scrolled.count("typed") == 1
    assert len(re.findall(r"^openai/gpt-4o · c", tty.scrolled, re.M)) == 1
    found = re.findall(r"w\d{3}", tty.scrolled)
    if sizes is LOW:  # what was painted and went out at the top cannot be taken back, and is printed once more
        found = sorted(set(found))
    assert found == words
    assert tty.cursor[1] == 2 + len("typed on")
    leave(tty, "\x15\x04")


def test_a_resize_of_the_input(model, chat):
    tty = chat()
    tty.send("typed")
    tty.wait("› typed")
    hint = tty.lines[-1]
    for columns, rows in SIZES + LOW:
        tty.resize(columns, rows)
        below = ([hint] if len(hint) < columns else [hint[: columns - 2] + "…"]) if rows > 4 else []
        tty.until(lambda below=below: tty.lines[-1 - len(below) :] == ["› typed", *below], f"{columns}x{rows}")
        assert tty.scrolled.count("typed") == 1 and tty.cursor[1] == 7
        above = tty.scrolled.rpartition("› typed")[0].replace("\n", "")
        assert re.fullmatch(r"openpista [\d.]+ · openai/gpt-4o · new session [\w-]+", above)
    leave(tty, "\x15\x04")


@pytest.mark.parametrize("reflow", [True, False])
def test_a_resize_of_a_picker(model, chat, reflow):
    model.script({"path": "/models", "models": [f"model-{n:02}" for n in range(60)]})
    tty = chat(reflow=reflow)
    tty.send("before" + ENTER)
    answered(tty, 1)
    tty.send("/models" + ENTER)
    tty.wait("model-01")
    tty.send(DOWN * 5)
    tty.wait("6/60")
    for columns, rows in SIZES + LOW:
        tty.resize(columns, rows)
        tty.until(
            lambda: any(line.startswith("›") and tty.screen.buffer[y][0].reverse for y, line in enumerate(tty.lines)),
            "no selection is shown",
        )
        assert len(tty.lines) <= rows and "before" not in tty.text
    tty.send(ESC)
    tty.wait("› /models")
    tty.send("typed")
    tty.wait("› typed")
    assert len(re.findall(r"^openai/gpt-4o · c", tty.scrolled, re.M)) == 1
    assert [line for line in tty.scrolled.splitlines() if line.startswith("›")] == ["› before", "› /models", "› typed"]


def test_20_columns(model, chat):
    model.script(
        run("printf '%s' 한국어한국어한국어한국어; sleep 0.3; rm -rf nothing"),
        {"text": "a word 한국어 " * 5},
        {"text": "x"},
    )
    tty = chat(columns=20, rows=12)
    tty.send("a long line of words that wraps" + ENTER)
    tty.wait("Run it?")
    tty.spend(SETTLE)
    tty.send("y")
    answered(tty, 1)
    for frame in tty.frames:
        assert sum(line.startswith("›") for line in frame.splitlines()) <= 3
    assert ("a word 한국어 " * 5).strip() in tty.scrolled.replace("\n", " ")
    tty.send("/help" + ENTER)
    tty.wait("Ctrl-L")
    tty.send("/models" + ENTER)
    tty.wait("gpt-5-codex")
    tty.send(ESC)
    tty.wait("› /models")
    leave(tty)


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGHUP, 130)])
def test_a_signal_during_a_turn(model, chat, tmp_path, number, code):
    model.script(running(tmp_path / "pid"))
    tty = chat("--yes")
    tty.send("go" + ENTER)
    pid = started(tty, tmp_path / "pid")
    tty.signal(number)
    assert tty.end() == code
    assert tty.left_behind() == [] and "Traceback" not in tty.text
    assert not is_alive(pid)


def test_the_terminal_goes_away_during_a_turn(model, chat, tmp_path):
    model.script(running(tmp_path / "pid"))
    with (tmp_path / "err").open("wb") as err:
        tty = chat("--yes", stderr=err)
        tty.send("go" + ENTER)
        pid = started(tty, tmp_path / "pid")
        assert tty.hang_up() == 130
    assert not is_alive(pid)
    assert (tmp_path / "err").read_text() == "openpista: interrupted\n"


def test_a_signal_in_a_picker(model, chat):
    tty = chat()
    tty.send("/models" + ENTER)
    tty.wait("gpt-5-codex")
    tty.signal(signal.SIGTERM)
    assert tty.end() == 130
    assert tty.left_behind() == [] and "gpt-5-codex" not in tty.text


def test_an_exception_leaves_the_terminal_as_it_was(model, chat, tmp_path):
    boom = "\nasync def boom(*_):\n  raise RuntimeError('kaputt')\n"
    boom += "o.CHAT_COMMANDS['boom'] = o.ChatCommand(boom, 'fails', at_once=True)\n"
    model.script(running(tmp_path / "pid"))
    tty = chat("--yes", prepare=boom)
    tty.send("go" + ENTER)
    pid = started(tty, tmp_path / "pid")
    tty.send("/boom" + ENTER)
    assert tty.end() == 1
    assert tty.left_behind() == [] and "RuntimeError: kaputt" in tty.text
    assert not is_alive(pid)


@pytest.mark.parametrize("by", ["key", "signal"])
def test_a_shell_stops_it_and_goes_on(model, terminal, tmp_path, by):
    model.script(run("sleep 1; echo up"), {"text": "and here it is"})
    shell = ["bash", "--norc", "--noprofile", "--noediting", "-i"]
    tty = terminal(argv=shell, PROGRAM=START + "sys.exit(o.main())", PYTHON=sys.executable, PS1="shell> ")
    tty.wait("shell>")
    cooked = termios.tcgetattr(tty.master)
    tty.send('$PYTHON -c "$PROGRAM"\n')
    tty.wait("openai/gpt-4o · chat")
    raw = termios.tcgetattr(tty.master)
    assert raw != cooked
    tty.send("go" + ENTER)
    tty.wait("▶ sleep")
    tty.send("typed")
    tty.wait("› typed")
    if by == "key":
        tty.send("\x1a")
    else:
        group = os.tcgetpgrp(tty.master)
        os.killpg(group, signal.SIGTSTP)
    tty.wait("Stopped")
    tty.until(lambda: termios.tcgetattr(tty.master) == cooked, "the terminal is still raw")
    assert not tty.screen.cursor.hidden and tty.raw.rfind(b"2004l") > tty.raw.rfind(b"2004h")
    tty.send("fg\n")
    tty.wait("and here it is")
    tty.until(lambda: TOOK.search(tty.text), "the turn has not ended")
    tty.until(lambda: tty.lines[-2:-1] == ["› typed"], "the input is not there")
    assert termios.tcgetattr(tty.master) == raw
    if by == "key":
        assert tty.text.count("› typed") == 1
    tty.send("\x15\x04")
    tty.wait("shell>")
    tty.until(lambda: tty.lines[-1] == "shell>", "it did not leave")
    assert termios.tcgetattr(tty.master) == cooked
    tty.send("exit\n")
    assert tty.end() == 0
    assert not foreign(tty.raw)


# Plain lines


@pytest.mark.parametrize("settings", [{"TERM": "dumb"}, {"TERM": ""}, {"columns": 0, "rows": 0}], ids=str)
def test_a_terminal_that_can_do_little(model, terminal, settings):
    model.script(run("echo hi"), {"text": f"an answer {EVIL}"}, run("rm -rf nothing"), {"text": "so be it"})
    tty = terminal("tui", **settings)
    tty.wait("\n›")
    tty.send("hello\n")
    tty.wait("an answer")
    answered(tty, 1)
    tty.send("delete\n")
    tty.wait("Run it?")
    tty.send("n\n")
    answered(tty, 2)
    assert tty.text.count("so be it") == 1 and "so be i\n" not in tty.text  # streamed, and not said again
    tty.send("one \\\n")
    tty.wait("…")
    tty.send("two\n/usage\n/nope\n/login\n")
    tty.wait("auth login")
    assert questions(model)[-1] == "one \ntwo"
    assert "this session:" in tty.text and "there is no /nope" in tty.text
    tty.send("\x04")
    tty.end()
    assert b"\x1b" not in tty.raw and not foreign(tty.raw)
    assert tty.left_behind() == []


def test_ctrl_c_on_a_terminal_that_can_do_little(model, terminal, tmp_path):
    model.script(running(tmp_path / "pid"), {"text": "works again"})
    tty = terminal("tui", "--yes", TERM="dumb")
    tty.wait("\n›")
    tty.send("go\n")
    pid = started(tty, tmp_path / "pid")
    tty.send("\x03")
    tty.wait("stopped")
    assert not is_alive(pid)
    tty.send("again\n")
    tty.wait("works again")
    answered(tty, 1)
    tty.send("\x03")
    assert tty.end() == 130 and "Traceback" not in tty.text


def test_no_colours(model, chat):
    model.script(run("seq 9"), {"text": "**bold** text"})
    tty = chat(NO_COLOR="1")
    tty.send("go" + ENTER)
    answered(tty, 1)
    tty.send("/models" + ENTER)
    tty.wait("gpt-5-codex")
    assert not re.search(rb"\x1b\[[1-9][\d;]*m", tty.raw)


def test_piped_lines(model, openpista, openai):
    model.script({"text": "an answer\nof two lines"})
    done = openpista("tui", env=openai, input="hi\n/usage\n/quit\nnever sent\n")
    assert done.returncode == 0
    assert done.stdout.startswith("an answer\nof two lines\n") and "this session:" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert questions(model) == ["hi"]
    model.script({"status": 400, "body": "{}"}, {"text": "then this"})
    done = openpista(env=openai, input="one\ntwo")  # without a command, and without a last line end
    assert done.returncode == 1
    assert done.stdout == "then this\n" and "answered 400" in done.stderr
    assert openpista("tui", env=openai, input="").returncode == 0
    assert openpista("tui", "-s", "\x1b[35m", env=openai).returncode == 2
    lines = [
        "/sessions",
        "/models",
        "/model m2",
        "/connection",
        "/stop",
        "/help",
        "/skills",
        "/new",
        "/clear",
        "/tools",
    ]
    done = openpista("tui", env=openai, input="\n".join(lines))
    assert done.returncode == 2 and "BEGINS WITH" in done.stdout and "gpt-5-codex" in done.stdout
    assert "auth login" in done.stderr and not foreign(done.stdout.encode() + done.stderr.encode())
    done = openpista("tui", env=openai, input=f"/model {EVIL}\n/nope\x1b[35m\n")
    assert not foreign(done.stdout.encode() + done.stderr.encode())


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_piped_lines_answered_on_a_terminal(model, terminal, tmp_path, kind):
    model.script(run("echo hi"), {"text": f"the answer {EVIL}"})
    if kind == "pipe":
        stdin, write = os.pipe()
        os.write(write, b"hi\n/quit\n")
        os.close(write)
    else:
        (tmp_path / "in").write_text("hi\n/quit\n")
        stdin = os.open(tmp_path / "in", os.O_RDONLY)
    tty = terminal("tui", stdin=stdin)
    os.close(stdin)
    assert tty.end() == 0
    assert "the answer red" in tty.text
    assert b"\x1b" not in tty.raw and not foreign(tty.raw)


def test_exit_codes(model, chat, terminal, openpista, openai, home):
    tty = terminal("tui", "--provider", "nobody")
    tty.end()
    assert tty.process.returncode == 2 and "unknown provider" in tty.text
    tty = terminal()  # no command at all is the chat
    tty.wait("· chat-")
    leave(tty)
    (home / "config.toml").write_text("")  # else it would be the first start
    tty = chat("-s", "x", hint="no model", OPENAI_API_KEY=None)
    assert "✗ no key for any model" in tty.text
    tty.send("hi" + ENTER)
    tty.until(lambda: tty.text.count("✗ no key for any model") == 2)
    leave(tty)


# What must not reach the terminal


@pytest.mark.parametrize("deltas", [1, 60])
def test_no_escape_of_a_model_or_a_tool_arrives(model, chat, deltas, tmp_path):
    (tmp_path / "evil").write_text(EVIL + "\n" + EVIL)
    steps = [
        {"text": f"start {EVIL} end", "deltas": deltas, "pace": 0.025},
        {"text": f"look {EVIL}", "deltas": deltas, **run(f"cat {tmp_path}/evil")},
        run(f"rm -rf nothing # {EVIL}"),
        {"tool_calls": [{"name": f"no{EVIL}", "arguments": {"command": EVIL}}]},
        {"text": "that is it"},
        {"status": 400, "body": f"no {EVIL}"},
    ]
    model.script(*steps)
    tty = chat()  # which looks at all that came
    tty.send("one" + ENTER)
    answered(tty, 1)
    assert "start red" in tty.text and "end" in tty.text and "owned" not in tty.text
    assert not any("[3" in frame or "]5" in frame for frame in tty.frames)  # nor half of one, for a moment
    tty.send("two" + ENTER)
    tty.wait("Run it?")
    assert tty.raw.count(b"\x07") == 1
    tty.spend(SETTLE)
    tty.send("n")
    tty.wait("that is it")
    answered(tty, 2)
    assert "│ red  2Jgnp" in tty.text
    tty.send("\x0f" + "three" + ENTER)
    tty.wait("answered 400")
    assert tty.raw.count(b"\x07") == 1


def test_no_escape_of_a_name_arrives(model, chat, home, openpista, openai):
    evil = "\x1b[35mname\x1b[3;7H\x9b5B"
    assert openpista("run", "-e", f"said {EVIL}", "--session", "s", env=openai).returncode == 0
    with sqlite3.connect(home / "memory.db") as database:
        table = next(name for (name,) in database.execute("select name from sqlite_master where name like '%sessions'"))
        database.execute(f"update {table} set name = ?, model = ?", (evil, f"openai/{evil}"))
    tty = chat("--model", evil, hint="openai/")
    tty.send("/model" + ENTER)
    tty.wait("(as configured)")
    tty.send("/sessions" + ENTER)
    tty.wait("LAST USED")
    tty.send(ENTER)
    tty.wait("› said")
    tty.send("hi" + ENTER)
    answered(tty, 1)
    tty.send("/resume \t")
    tty.wait("/resume name")
    tty.send("\x15/model " + paste(evil) + ENTER)
    tty.wait("answers this session")


def test_the_key_in_an_answer_is_masked(model, chat):
    model.script(
        {"text": "the key is test-key-123456 indeed", "deltas": 9}, run("echo test-key-123456"), {"text": "ok"}
    )
    tty = chat()
    tty.send("one" + ENTER)
    answered(tty, 1)
    tty.send("two" + ENTER)
    answered(tty, 2)
    assert "the key is [secret] indeed" in tty.text and "│ [secret]" in tty.text
    assert b"test-key" not in tty.raw


def test_what_is_logged_stands_above_the_input(model, chat, terminal):
    model.script(run("sleep 0.2"), {"text": "all done"})
    tty = chat("--debug")
    tty.send("go" + ENTER)
    tty.send("typed")
    answered(tty, 1)
    tty.wait("› typed")
    assert re.search(r"^.*POST http://127.*chat/completions", tty.scrolled.replace("\n", ""))
    assert tty.scrolled.count("› typed") == 1 and len(re.findall(r"^openai/gpt-4o · c", tty.scrolled, re.M)) == 1
    assert tty.lines[-2] == "› typed"


# Signing in


KEY = "sk-typed-0123456789abcdef"


@pytest.fixture
def zen(model, home):
    """OpenCode Zen is where the fake server is."""
    home.mkdir(mode=0o700)
    store(home, f'[opencode]\nbase_url = "{model.origin}/zen/v1"\n')
    return model


def store(home, text):
    path = home / "credentials.toml"
    path.write_text(text)
    path.chmod(0o600)


def stored(home):
    path = home / "credentials.toml"
    return path.read_text() if path.exists() else ""


@pytest.fixture
def login(terminal):
    """login() -> a Terminal at the first picker of `auth login`"""
    opened = []

    def start(*words, shows="whose models?", **more):
        settings = {"OPENAI_API_KEY": None, "OPENAI_BASE_URL": None} | more
        opened.append(terminal("auth", "login", *words, **settings))
        opened[-1].wait(shows)
        return opened[-1]

    yield start
    for tty in opened:
        assert not foreign(tty.raw) and b"typed-0123" not in tty.raw


def pick_zen(tty):
    tty.wait("whose models?")
    tty.send("open")
    tty.wait("1/3")
    tty.send(DOWN)
    tty.wait("2/3")
    tty.send(ENTER)
    tty.wait("The key for opencode")


def test_auth_login(zen, login, home, openpista):
    tty = login()
    assert tty.screen.is_full and re.search(r"✓ opencode\s+address stored", tty.text)
    tty.send("nothing like it")
    tty.wait("nothing found")
    tty.send(ENTER + ESC)
    tty.wait("1/13")
    pick_zen(tty)
    tty.send(KEY)
    tty.wait("•" * len(KEY))
    tty.send(ENTER)
    assert tty.end() == 0
    assert tty.left_behind() == []
    assert tty.lines == [line for line in tty.lines if line] and "…cdef for opencode" in tty.text.replace("\n", "")
    assert tty.raw.count(b"\x1b[?1049h") == 1  # from one picker to the next nothing flickers
    assert KEY in stored(home) and zen.origin in stored(home)
    assert stat.S_IMODE((home / "credentials.toml").stat().st_mode) == 0o600
    row = zen.requests()[0]
    assert row["path"] == "/zen/go/v1/usage" and row["headers"]["authorization"] == f"Bearer {KEY}"
    status = openpista("auth", "status")
    assert re.search(r"\* +opencode +…cdef", status.stdout) and "typed" not in status.stdout


def test_a_refused_key(zen, login, home):
    zen.script(*({"path": "/usage", "status": 401, "delay": 0.2 * (n == 1)} for n in range(3)))
    tty = login()
    pick_zen(tty)
    tty.send(KEY + ENTER)
    tty.wait("opencode refuses this key")
    shown = tty.wait("go on all the same")
    assert shown.index("go back") < shown.index("go on all the same")  # the first is the default
    tty.send("once" + ENTER)
    tty.wait("Trying opencode")
    tty.wait("refuses this key")
    tty.send(ENTER)
    tty.wait("whose models?")
    assert KEY not in stored(home)
    pick_zen(tty)
    tty.send(KEY + ENTER)
    tty.wait("refuses this key")
    tty.send("all the same" + ENTER)
    assert tty.end() == 0
    assert KEY in stored(home) and len(zen.requests()) == 3


@pytest.mark.parametrize(("keys", "is_stored"), [(ENTER, True), (ESC, False)], ids=["agreed", "left"])
def test_a_provider_that_cannot_be_reached(model, login, home, keys, is_stored):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        home.mkdir(mode=0o700)
        store(home, f'[opencode]\nbase_url = "http://127.0.0.1:{nobody.getsockname()[1]}/zen/v1"\n')
        tty = login()
        pick_zen(tty)
        tty.send(KEY + ENTER)
        tty.wait("opencode could not be asked")
        tty.wait("127.0.0.1")
        tty.send(keys)
        if not is_stored:
            tty.wait("whose models?")
            tty.send(ESC)
        assert tty.end() == (0 if is_stored else 130)
    assert (KEY in stored(home)) is is_stored


def test_a_key_can_be_stored_without_a_try(zen, login, home):
    zen.script({"path": "/usage", "delay": 30, "times": 2})
    tty = login()
    pick_zen(tty)
    tty.send(KEY + ENTER)
    tty.wait("Trying opencode")
    tty.send(ESC)  # back, and nothing is stored
    tty.wait("whose models?")
    assert KEY not in stored(home)
    pick_zen(tty)
    tty.send(KEY + ENTER)
    tty.wait("Trying opencode")
    tty.send(ENTER)
    assert tty.end() == 0
    assert KEY in stored(home)


def test_keys_that_are_none_and_the_way_back(zen, login, home):
    tty = login()
    pick_zen(tty)
    tty.send(ENTER)
    tty.wait("the key is empty")
    tty.send(paste("sk-first\nsk-second"))
    tty.wait("several lines")
    assert "•" not in tty.text
    tty.send("a b" + ENTER)
    tty.wait("characters that no key has")
    tty.send("\x15한" + ENTER)
    tty.wait("characters that no key has")
    tty.send(ESC)
    tty.wait("whose models?")
    tty.send(ESC)
    assert tty.end() == 130
    assert "nothing was stored" in tty.text and tty.left_behind() == []
    assert "api_key" not in stored(home) and zen.requests() == []
    tty = login("--provider", "opencode", shows="The key for opencode")
    tty.send(paste(f"  {KEY}\r\n"))
    tty.wait("•")
    tty.send(ENTER)
    assert tty.end() == 0
    assert f'"{KEY}"' in stored(home)


def test_a_key_is_tried_where_requests_go(model, login, home):
    """A variable gives the address, so a key for that address must not go to the vendor."""
    tty = login("--provider", "openai", shows="The key for openai", OPENAI_BASE_URL=model.url)
    tty.send(KEY + ENTER)
    assert tty.end() == 0
    assert [row["path"] for row in model.requests()] == ["/v1/models"] and KEY in stored(home)


def test_a_provider_of_ones_own(model, login, home, chat):
    tty = login()
    tty.send("custom" + ENTER)
    tty.wait("address of the server")
    tty.send(ENTER)
    tty.wait("the address is empty")
    tty.send("ftp://x" + ENTER)
    tty.wait("is not an http or https address")
    tty.send("\x15" + model.url + ENTER)
    tty.wait("empty if the server needs none")
    tty.send(KEY + ENTER)
    tty.wait("Models of custom")  # it has no default one, so that what is picked is stored too
    tty.wait("m2")
    tty.send("/m2" + ENTER)
    assert tty.end() == 0
    assert model.url in stored(home) and KEY in stored(home) and "m2" in stored(home)
    tty = chat(hint="custom/m2", OPENAI_API_KEY=None)
    tty.send("hi" + ENTER)
    answered(tty, 1)
    assert model.bodies()[-1]["model"] == "m2" and model.requests()[-1]["headers"]["authorization"] == f"Bearer {KEY}"


def test_a_broken_file_of_keys_is_kept_aside(model, login, home):
    home.mkdir(mode=0o700)
    store(home, "my precious [")
    tty = login("--provider", "openai", shows="The key for openai", OPENAI_BASE_URL=model.url)
    tty.send(KEY + ENTER)
    assert tty.end() == 0
    said = "".join(tty.scrolled.split())  # a space where the terminal breaks the line is not seen
    aside = [path for path in home.iterdir() if path.name.startswith("credentials.toml.")]
    assert [path.read_text() for path in aside] == ["my precious ["]
    assert KEY in stored(home) and f"itiskeptas{aside[0]}" in said


@pytest.mark.parametrize("command", ["/login", "/connection"])
def test_signing_in_from_the_chat(zen, chat, home, command):
    tty = chat(HTTPS_PROXY="http://127.0.0.1:9")
    tty.send("before" + ENTER)
    answered(tty, 1)
    before = tty.lines[:-2]
    tty.send(command + ENTER)
    pick_zen(tty)
    tty.send(ESC)
    tty.wait("whose models?")
    pick_zen(tty)
    tty.send(KEY)
    tty.wait("•" * len(KEY))
    tty.send(ENTER)
    tty.wait("now asking opencode/gpt-5-codex")
    assert tty.lines[: len(before)] == before and not tty.screen.is_full
    assert tty.lines[len(before) :][:2] == [f"› {command}", "now asking opencode/gpt-5-codex"]
    tty.send("and after" + ENTER)
    answered(tty, 2)
    row = zen.requests()[-1]
    assert row["path"] == "/zen/v1/responses" and row["headers"]["authorization"] == f"Bearer {KEY}"
    assert KEY in stored(home) and b"typed-0123" not in tty.raw
    tty.send(command + ENTER)
    tty.wait("whose models?")
    tty.send(ESC)
    tty.until(lambda: not tty.screen.is_full and tty.lines[-1].startswith("opencode/gpt-5-codex"))
    leave(tty)


def test_signing_in_from_a_chat_without_a_model(zen, chat, home):
    store(home, "broken [")
    tty = chat(hint="no model", OPENAI_API_KEY=None)
    assert "✗ " in tty.text and "credentials.toml" in tty.text.replace("\n", "")
    tty.send("/login" + ENTER)
    tty.wait("whose models?")
    tty.send("custom" + ENTER)
    tty.wait("address of the server")
    tty.send(zen.url + ENTER)
    tty.wait("empty if the server needs none")
    tty.send(KEY + ENTER)
    tty.wait("Models of custom")
    tty.wait("o4-mini")
    tty.send("/m2" + ENTER)
    tty.wait("now asking custom/m2")
    assert "it is kept as" in tty.text.replace("\n", " ")
    tty.send("hi" + ENTER)
    answered(tty, 1)
    assert zen.bodies()[-1]["model"] == "m2"


# Models


def test_browsing_models(model, chat):
    tty = chat()
    tty.send("before" + ENTER)
    answered(tty, 1)
    before = tty.lines[:-2]
    tty.send("/models" + ENTER)
    tty.wait("gpt-5-codex")
    assert tty.screen.is_full and "Models of openai" in tty.text and "before" not in tty.text
    fetched = len(model.requests())
    tty.send("r")
    tty.until(lambda: len(model.requests()) == fetched + 1, "it did not fetch again")
    assert model.requests()[-1]["path"] == "/v1/models"
    tty.send("/codex")
    tty.wait("/ codex")
    tty.gone("o4-mini")
    tty.send(ESC)
    tty.wait("o4-mini")
    tty.send(ESC)
    tty.wait("› before")
    tty.until(lambda: not tty.screen.is_full and tty.lines[:-2] == [*before, "› /models"])
    assert tty.raw.count(b"\x1b[?1049h") == 1  # a list that comes later does not flicker
    tty.send("/models" + ENTER)
    tty.wait("gpt-5-codex")
    tty.send("/codex" + ENTER)
    tty.wait("openai/gpt-5-codex answers this session from now on")
    tty.send("who" + ENTER)
    answered(tty, 2)
    assert model.bodies()[-1]["model"] == "gpt-5-codex"
    tty.until(lambda: tty.lines[-1].startswith("openai/gpt-5-codex · "))  # a paint may be due
    assert len(model.requests()) == fetched + 2  # the list came from the cache
    leave(tty)


def test_10_000_models(model, chat):
    model.script({"path": "/models", "models": [f"model-{n:05}" for n in range(10_000)]})
    tty = chat()
    tty.send("/models" + ENTER)
    tty.wait("1/10,000")
    tty.send("\x1b[F")
    tty.wait("10,000/10,000")
    tty.send("s0777")
    tty.wait("model-07770")
    tty.send(DOWN)
    tty.wait("2/11")
    tty.send(ENTER)
    tty.wait("openai/model-07770 answers")


LISTS = [
    ({"body": "<html><title>Log in</title></html>"}, "built-in list"),
    ({"models": []}, ""),
    ({"status": 500}, "500"),
    ({"models": [f"good-model{EVIL}", "\x1b[35mred-model", "plain-model"]}, ""),
]


@pytest.mark.parametrize(("step", "said"), LISTS, ids=["html", "empty", "500", "escapes"])
def test_lists_of_models_that_are_no_good(model, chat, step, said):
    model.script({"path": "/models", **step, "times": 9})
    tty = chat()
    tty.send("/models" + ENTER)
    tty.wait("Models of openai")
    tty.gone("fetching")
    tty.wait(said)
    assert "red-model" not in tty.text or "35m" not in tty.text
    tty.send(ESC)
    tty.wait("› /models")
    tty.send("still here" + ENTER)
    answered(tty, 1)


# Sessions


def test_sessions_are_gone_on_with(model, chat):
    model.script({"text": "one", **run("echo a tool")}, {"text": "the **first** answer"}, {"text": "the next answer"})
    tty = chat("-s", "work")
    assert "new session work" in tty.text
    tty.send("/model m2" + ENTER)
    tty.wait("openai/m2 answers")
    tty.send("first question" + ENTER)
    answered(tty, 1)
    leave(tty)
    tty = chat("-s", "work", hint="openai/m2")
    past = tty.wait("answer")
    assert re.match(r"openpista [\d.]+ · openai/m2 · session work\n", past)
    assert "› first question\n" in past and "· echo a tool\n" in past and "the first answer" in past
    tty.send("next question" + ENTER)
    answered(tty, 1)
    last = model.bodies()[-1]
    assert last["model"] == "m2" and "first question" in json.dumps(last["messages"])
    tty.send("/new" + ENTER)
    tty.wait("openai/gpt-4o · new session chat-")
    tty.send("fresh" + ENTER)
    answered(tty, 2)
    last = model.bodies()[-1]
    assert last["model"] == "gpt-4o" and "first question" not in json.dumps(last["messages"])
    before = len(tty.frames)
    tty.send("/sessions" + ENTER)
    tty.wait("BEGINS WITH")
    assert re.search(r"^. *work +\d", tty.text, re.M) and "fresh" in tty.text
    tty.send("work" + ENTER)
    tty.until(lambda: tty.lines[-1].startswith("openai/m2 · work") and not tty.screen.is_full)
    assert any("› next question" in frame for frame in tty.frames[before:])
    tty.send("/new" + ENTER)
    tty.until(lambda: tty.lines[-1].startswith("openai/gpt-4o · chat-"))
    tty.send("/resume work" + ENTER)
    tty.until(lambda: tty.lines[-1].startswith("openai/m2 · work"))
    leave(tty)


# Agents


def test_an_agent_is_chosen_for_the_session(model, chat, openai, tmp_path):
    (tmp_path / "crew.toml").write_text(
        '[agents.ops]\nmodel = "m1"\ndaily_tokens = 5000\n[[routes]]\nagent = "ops"\nprefix = "!ops "\n'
    )
    model.script(*({"model": name, "text": f"I am {name}.", "times": -1} for name in ("m1", "gpt-4o")))
    tty = chat("--config", str(tmp_path / "crew.toml"))
    tty.send("!ops who?" + ENTER)
    tty.wait("ops, openai/m1 · 0 tool calls")
    tty.send("/agent nobody" + ENTER)
    tty.wait("✗ there is no agent 'nobody'; known: default, ops")
    tty.send("/agent o\t" + ENTER)
    tty.wait("ops answers this session; /agent reset ends that")
    tty.send("who now?" + ENTER)
    answered(tty, 2)
    assert [body["model"] for body in model.bodies()] == ["m1", "m1"]
    assert questions(model)[0] == "who?"
    tty.send("/agent reset" + ENTER)
    tty.wait("[[routes]] say who answers this session")
    tty.send("and now?" + ENTER)
    tty.wait("I am gpt-4o.")
    tty.send("/usage" + ENTER)
    tty.wait("of 5,000 tokens, 2 calls today")
    leave(tty)


def test_who_works_is_shown(model, terminal, tmp_path):
    (tmp_path / "crew.toml").write_text('[agents.hand]\nmodel = "m1"\ntools = ["system.run"]\n')
    asks = {"tool_calls": [{"name": "agent_ask", "arguments": {"agent": "hand", "task": "look"}}]}
    model.script(
        asks | {"model": "gpt-4o"}, run("echo seen") | {"model": "m1"}, {"text": "a"}, {"text": "It is there."}
    )
    tty = terminal("--config", str(tmp_path / "crew.toml"), "run", "-e", "look")
    tty.wait("It is there.")
    assert "✓ hand: echo seen" in tty.text and "✓ agent.ask hand" in tty.text
    assert tty.end() == 0
