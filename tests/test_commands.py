"""Commands, as a person or a script runs them: what goes to stdout, what to stderr, and the exit code."""

import json
import os
import pathlib
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import IMAGE_STARTS

from openpista import COMMANDS, STDIN_LIMIT

ROOT = pathlib.Path(__file__).parent.parent
# Imported, not run as a script: so Python keeps it compiled, and each process starts in half the time.
PROGRAM = [
    sys.executable,
    "-P",
    "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import openpista as o; sys.exit(o.main())",
]
OFFLINE = ("run", "--provider", "offline", "-e")


def together(run, cases):
    """The cases, several at a time: [(case, run(case)), ...]"""
    with ThreadPoolExecutor(4) as pool:
        return list(zip(cases, pool.map(run, cases), strict=True))


def ask(command, **others):
    return {"tool_calls": [{"name": "system_run", "arguments": {"command": command} | others}]}


def said(body):
    """The person's last words in a request."""
    return body["messages"][-1]["content"]


def one_line(text):
    """Whether it is one error line, as a person should see it."""
    return re.fullmatch(r"openpista: [^\n]+\n", text) and "Traceback" not in text


# run


def test_stdout_is_the_answer_alone(openpista, model, openai):
    model.script(ask("echo hi; echo err >&2"), {"text": "It said hi.\nTwice 한국어."})
    done = openpista("run", "-e", "say hi", env=openai)
    assert (done.stdout, done.stderr, done.returncode) == ("It said hi.\nTwice 한국어.\n", "", 0)
    first, second = model.bodies()
    assert said(first) == "say hi" and "hi\nerr" in said(second)
    assert first["model"] == "gpt-4o" and first["stream"] is True


def test_json(openpista, model, openai):
    model.script(
        ask("echo hi") | {"usage": {"input": 10, "cached": 4, "output": 5}},
        {"text": "done", "usage": {"input": 20, "output": 1}},
    )
    done = openpista("run", "-e", "x", "--json", "--session", "s", env=openai)
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == {
        "answer": "done",
        "session": "s",
        "agent": "default",
        "provider": "openai",
        "model": "gpt-4o",
        "tool_calls": [{"name": "system.run", "arguments": {"command": "echo hi"}, "output": "hi", "is_error": False}],
        "usage": {"input_tokens": 30, "cached_tokens": 4, "output_tokens": 6, "cost_usd": None},
    }


ERRORS = [  # words, step, exit code, what is said
    (["--model", "e1"], {"status": 400, "body": "no"}, 1, r"openai/e1 answered 400: no"),
    (["--model", "e2"], {"status": 401}, 3, r"openai refused the key …3456 from \$OPENAI_API_KEY \(401.*auth login"),
    (["--model", "e3", "--timeout", "0.5"], {"delay": 3, "text": "late"}, 1, r"no answer within 0\.5 s"),
    (["--provider", "opnai"], None, 2, r"unknown provider 'opnai', did you mean 'openai'\?"),
    (["--provider", "groq"], None, 3, r"no key for groq; set GROQ_API_KEY, or run `openpista auth login --provider"),
    (["--timeout", "0"], None, 2, r"--timeout must be more than 0"),
    (["--timeout", "nan"], None, 2, r"--timeout must be more than 0"),
    (["--timeout", "soon"], None, 2, r"--timeout: invalid float value: 'soon'"),
    (["--session", ""], None, 2, r"--session must be 1 to 200"),
    (["--session", "a\nb"], None, 2, r"--session must be 1 to 200"),
    (["--bogus"], None, 2, r"unrecognized arguments: --bogus"),
    (["--agent", "ops"], None, 2, r"there is no agent 'ops'"),
    (["--agent", "ops", "--model", "x"], None, 2, r"--agent has a model of its own; leave out --provider and --model"),
    (["--config", "/nowhere/c.toml"], None, 2, r"no configuration file /nowhere/c\.toml"),
]


def test_errors_and_exit_codes(openpista, model, openai):
    model.script(*({"model": words[1]} | step for words, step, _, _ in ERRORS if step))
    for (words, _, code, text), done in together(
        lambda case: openpista("run", "-e", "x", "--json", *case[0], env=openai), ERRORS
    ):
        assert one_line(done.stderr) and re.search(text, done.stderr), done.stderr
        assert done.returncode == code, words
        expected = {"error": done.stderr.removeprefix("openpista: ").strip(), "exit_code": code}
        assert json.loads(done.stdout or "null") == expected, words


def test_no_key_names_three_ways_on(openpista, home):
    for words in (["run", "-e", "x"], ["run"]):
        done = openpista(*words)
        assert done.returncode == 3 and done.stdout == "" and one_line(done.stderr)
        assert all(way in done.stderr for way in ("OPENAI_API_KEY", "openpista auth login", "--provider offline"))
    assert not home.exists()


def test_offline(openpista):
    done = openpista(*OFFLINE, "$ echo one\n$ echo two\nnot a command")
    assert (done.stdout, done.stderr, done.returncode) == ("one\ntwo\n", "", 0)
    assert "not a model" in openpista(*OFFLINE, "hello").stdout


EMPTY = [(["run", "-e", ""], ""), (["run", "-e", "  \n"], "\n \t"), (["run"], "")]


def test_an_empty_request(openpista, openai):
    for (words, _), done in together(lambda case: openpista(*case[0], input=case[1], env=openai), EMPTY):
        assert done.returncode == 2 and done.stdout == "", words
        assert one_line(done.stderr) and "nothing to do" in done.stderr and "-e TEXT" in done.stderr


# Pictures


def test_pictures_are_shown(openpista, model, openai, tmp_path):
    model.script({"text": "two cats"}, {"text": "the same"})
    for name, kind in {"a.png": "png", "b c.jpg": "jpeg"}.items():
        (tmp_path / name).write_bytes(IMAGE_STARTS[kind] + b"x")
    words = ("run", "-e", "look", "--session", "s")
    done = openpista(*words, "--image", "a.png", "--image", tmp_path / "b c.jpg", env=openai)
    assert (done.stdout, done.stderr) == ("two cats\n", "")
    assert openpista(*words, env=openai).stdout == "the same\n"
    for body in model.bodies():
        text, *pictures = body["messages"][1]["content"]
        assert text["text"] == f"look\n\n(picture {tmp_path}/a.png)\n\n(picture {tmp_path}/b c.jpg)"
        assert [part["image_url"]["url"][:15] for part in pictures] == ["data:image/png;", "data:image/jpeg"]


NO_PICTURES = [  # a file -> what is said
    ("none.png", r"cannot read \S+/none\.png: No such file or directory"),
    ("folder", r"\S+/folder is a directory"),
    ("large.png", r"\S+/large\.png is larger than 5 MB"),
    ("text.png", r"\S+/text\.png is no picture that models take; make it a JPEG, PNG, GIF or WebP"),
    ("/dev/null", r"/dev/null is no file"),
    ("", r"\S+ is a directory"),
]


def test_what_is_no_picture(openpista, openai, model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "large.png").write_bytes(IMAGE_STARTS["png"].ljust(5_000_001))
    for (name, text), done in together(lambda case: openpista(*OFFLINE, "hi", "--image", case[0]), NO_PICTURES):
        assert done.returncode == 2 and one_line(done.stderr), done.stderr
        assert re.fullmatch(rf"openpista: --image: {text}\n", done.stderr), (name, done.stderr)


# Standard input


def test_piped_input_is_added(openpista, model, openai):
    model.script({"text": "ok", "times": -1})
    assert openpista("run", "-e", "sum it up", input="the piped\nwords\n", env=openai).stdout == "ok\n"
    assert openpista("run", input="only piped", env=openai).stdout == "ok\n"
    first, second = map(said, model.bodies())
    assert first == "sum it up\n\n<stdin>\nthe piped\nwords\n</stdin>"
    assert "only piped" in second


def test_piped_input_is_bounded_and_that_is_said(openpista, model, openai):
    model.script({"text": "ok"})
    text = "begin" + "가" * 1_000_000 + "finish"
    done = openpista("run", "-e", "x", input=text, env=openai)
    assert done.stdout == "ok\n"
    assert re.fullmatch(r"openpista: standard input was cut to [\d,]+ of 1,000,011 characters\n", done.stderr)
    sent = said(model.bodies()[0])
    assert "begin" in sent and "finish" in sent and "characters left out" in sent
    assert len(sent) < STDIN_LIMIT + 200


def test_any_bytes_are_taken(model, openai, tmp_path):
    model.script({"text": "ok", "times": -1})
    argv = [*PROGRAM, "run", "--session", "s", "-e", b"a \xff\xfe b \xed\xa0\x80 \xea\xb0\x80"]
    done = subprocess.run(argv, env=openai, cwd=tmp_path, input=b"in \xff\x00\x1b[0m \xea\xb0", capture_output=True)
    assert (done.stdout, done.stderr, done.returncode) == (b"ok\n", b"", 0)
    sent = said(model.bodies()[0])
    assert "a �� b" in sent and "가" in sent and "in �" in sent


NOT_UTF8 = [  # words with a byte that is not UTF-8
    ["run", "--session", b"s\xff", "-e", "x"],
    ["run", "--provider", b"p\xff", "-e", "x"],
    ["run", "--config", b"/c\xff", "-e", "x"],
    ["sessions", "show", b"s\xff"],
    ["sessions", "delete", b"s\xff"],
    ["auth", "login", "--provider", "custom", "--api-key", "a-key-12345678", "--endpoint", b"http://h\xff/"],
    ["auth", "login", "--provider", "custom", "--api-key", "a-key-12345678", "--endpoint", b"http://h/\xff"],
    ["auth", "login", "--provider", "groq", "--api-key", b"a-key-12345678\xff"],
    ["auth", "logout", "--provider", b"\xff"],
    [b"\xff"],
]


def test_names_that_are_not_utf8_are_refused(openpista, model, openai):
    model.script({"text": "ok", "times": -1})
    bad = [
        (words, done.stderr[-200:])
        for words, done in together(lambda words: openpista(*words, env=openai), NOT_UTF8)
        if done.returncode not in (1, 2) or not one_line(done.stderr)
    ]
    assert bad == []


ODD_STREAMS = [  # shell redirections, exit code, stdout
    ("</dev/null", 0, "hi\n"),
    ("<&-", 0, "hi\n"),
    ("</dev/null >&-", 0, ""),
    ("</dev/null 2>&-", 0, "hi\n"),
    ("<&- >&- 2>&-", 0, ""),
    ("</dev/null >/dev/full", 1, ""),
    ("</dev/null | head -0", 1, ""),
]


@pytest.mark.parametrize(("streams", "code", "out"), ODD_STREAMS)
def test_odd_streams(openpista, environ, tmp_path, streams, code, out):
    line = f'set -o pipefail; "$@" run --provider offline --session s -e "\\$ sleep 0.2; echo hi" {streams}'
    argv = ["bash", "-c", line, "bash", *PROGRAM]
    done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert done.stderr == "" or one_line(done.stderr)
    assert "no file" not in done.stderr
    done = openpista("sessions", "show", "s")
    assert done.stdout.endswith("assistant\n  hi\n")  # what was answered is kept in any case


def test_no_streams_for_the_other_commands(environ, tmp_path):
    cases = [
        "sessions list >&-",
        "bogus 2>&-",
        "auth login --provider groq --api-key - <&-",
        "auth login --provider groq <&-",
    ]

    def run(words):
        argv = ["bash", "-c", f'"$@" {words}', "bash", *PROGRAM]
        return subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True)

    for (words, code), (_, done) in zip(zip(cases, (0, 2, 2, 2), strict=True), together(run, cases), strict=True):
        assert done.returncode == code and done.stdout == "", words
        assert done.stderr == "" or one_line(done.stderr)


def test_a_terminal_that_knows_ascii_only(openpista, environ):
    env = {"PYTHONIOENCODING": "ascii"}
    done = openpista(*OFFLINE, "$ echo 한국어 end", env=env)
    assert done.returncode == 0 and done.stdout.endswith(" end\n") and done.stderr == ""
    assert openpista("--help", env=env).returncode == 0


# Sessions, models, permission


def test_a_session_goes_on(openpista, model, openai):
    model.script({"text": "first answer"}, {"text": "second answer"}, {"text": "third answer"})
    openpista("run", "-e", "one", "--session", "한국", env=openai)
    openpista("run", "-e", "two", "--session", "한국", env=openai)
    openpista("run", "-e", "three", env=openai)
    sent = [[m["content"] for m in body["messages"] if m["role"] != "system"] for body in model.bodies()]
    assert sent == [["one"], ["one", "first answer", "two"], ["three"]]


def test_model_and_provider(openpista, model, openai, tmp_path):
    model.script({"text": "ok", "times": -1})
    (tmp_path / "config.toml").write_text('[agent]\nprovider = "openai"\nmodel = "own"\n')
    env = openai | {"ANTHROPIC_API_KEY": "test-key-anthropic", "ANTHROPIC_BASE_URL": model.url}
    cases = [
        ([], "own", "/chat/completions"),
        (["--model", "other"], "other", "/chat/completions"),
        (["--model", "gpt-5"], "gpt-5", "/responses"),
        (["--provider", "anthropic"], "claude-sonnet-4-5", "/messages"),
        (["--provider", "anthropic", "--model", "claude-x"], "claude-x", "/messages"),
    ]
    for words, name, path in cases:
        model.script({"text": "ok"})
        assert openpista("run", "-e", "x", *words, env=env).stdout == "ok\n"
        (row,) = model.requests()
        assert row["body"]["model"] == name and row["path"].endswith(path)


def test_risky_without_a_terminal(openpista, model, openai, tmp_path):
    (tmp_path / "victim").mkdir()
    steps = [ask("rm -r victim", workdir=str(tmp_path)), {"tool_result_text": True}]
    model.script(*steps)
    done = openpista("run", "-e", "x", env=openai)
    assert done.returncode == 0 and (tmp_path / "victim").exists()
    assert re.search(r"denied: rm deletes files, and nobody .*--yes", done.stdout)
    model.script(*steps)
    done = openpista("run", "-e", "x", "--yes", env=openai)
    assert "no output" in done.stdout and not (tmp_path / "victim").exists()


def test_nothing_runs_when_every_call_is_asked_for(openpista, model, openai, tmp_path):
    (tmp_path / "config.toml").write_text('[tools]\napproval = "always"\n')
    model.script(ask("echo hi"), {"tool_result_text": True})
    assert "denied: every call is asked for" in openpista("run", "-e", "x", env=openai).stdout


# Logging in

KEY = "planted-canary-key-0123456789"


def test_a_stored_login_is_used(openpista, model, home):
    login = ["auth", "login", "--non-interactive", "--provider", "custom", "--endpoint", model.url]
    done = openpista(*login, "--api-key", KEY)
    assert done.returncode == 0 and "stored the key …6789 for custom" in done.stdout and KEY not in done.stdout
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "credentials.toml").stat().st_mode) == 0o600
    model.script({"text": "hello"})
    assert openpista("run", "-e", "hi", "--model", "m").stdout == "hello\n"
    assert model.requests()[0]["headers"]["authorization"] == f"Bearer {KEY}"


def test_status_and_logout(openpista, home):
    assert "no provider has a key" in openpista("auth", "status").stdout
    assert openpista("auth", "status", "--json").stdout == "[]\n"
    for provider in ("groq", "xai"):
        words = ["auth", "login", "--non-interactive", "--provider", provider, "--api-key", "-"]
        assert openpista(*words, input=f"  {KEY}\n").returncode == 0
    status = openpista("auth", "status")
    assert KEY not in status.stdout and re.search(r"^\* +xai +…6789 +`auth login`$", status.stdout, re.M)
    rows = json.loads(openpista("auth", "status", "--json", env={"OPENAI_API_KEY": "another-key-000"}).stdout)
    assert [(row["provider"], row["key"], row["source"], row["used"]) for row in rows] == [
        ("openai", "…-000", "$OPENAI_API_KEY", True),
        ("groq", "…6789", "`auth login`", False),
        ("xai", "…6789", "`auth login`", False),
    ]
    assert openpista("auth", "logout", "--provider", "xai").stdout == "forgot the key for xai\n"
    again = openpista("auth", "logout", "--provider", "xai")
    assert again.returncode == 1 and "nothing is stored for xai" in again.stderr
    assert "xai" not in openpista("auth", "status").stdout
    assert KEY in (home / "credentials.toml").read_text()  # groq's


LOGINS = [  # words after `auth login --non-interactive`, stdin, what is said
    ([], "", "--provider NAME; known: openai, anthropic"),
    (["--provider", "opnai", "--api-key", KEY], "", "unknown provider 'opnai', did you mean 'openai'"),
    (["--provider", "openai"], "", "no key for openai; give it on standard input with --api-key -"),
    (["--provider", "openai", "--api-key", ""], "", "the key is empty"),
    (["--provider", "openai", "--api-key", "-"], "", "the key is empty"),
    (["--provider", "openai", "--api-key", "-"], f"{KEY}\n{KEY}\n", "line break"),
    (["--provider", "openai", "--api-key", f"{KEY[:9]} {KEY[9:]}"], "", "characters that no key has"),
    (["--provider", "openai", "--api-key", f"{KEY}\n{KEY}"], "", "line break"),
    (["--provider", "openai", "--api-key", f"{KEY}\t{KEY}"], "", "characters that no key has"),
    (["--provider", "openai", "--api-key", f"{KEY}…"], "", "characters that no key has"),
    (["--provider", "openai", "--api-key", f"“{KEY}”"], "", "characters that no key has"),
    (["--provider", "custom", "--api-key", KEY], "", "custom needs --endpoint URL"),
    (["--provider", "custom", "--api-key", KEY, "--endpoint", "ftp://x"], "", "'ftp://x' is not an http"),
    (["--provider", "offline", "--api-key", KEY], "", "offline needs no key"),
    (["--provider", "ollama"], "", "it needs no key"),
]


def test_what_is_no_login(openpista, home):
    def run(case):
        return openpista("auth", "login", "--non-interactive", *case[0], input=case[1])

    for (words, _, text), done in together(run, LOGINS):
        assert done.returncode == 2 and done.stdout == "", words
        assert one_line(done.stderr) and text in done.stderr, done.stderr
        assert KEY[:9] not in done.stderr
    assert not home.exists()


def test_an_endpoint_is_not_called_base_url(openpista):
    words = ["--provider", "custom", "--api-key", KEY, "--endpoint", "ftp://x"]
    assert "base_url" not in openpista("auth", "login", "--non-interactive", *words).stderr


LEAKS = [  # words, environment, configuration, the model's step
    (["run", "-e", "x", "--model", "m0"], {}, "", {"status": 401, "body": f"Incorrect API key provided: {KEY}"}),
    (["run", "-e", "x", "--model", "m1"], {}, "", {"status": 400, "body": {"error": {"message": f"bad {KEY}"}}}),
    (
        ["run", "-e", "x", "--model", "m2"],
        {},
        "",
        {"status": 307, "headers": {"location": f"http://x/{KEY}"}, "body": ""},
    ),
    (["run", "-e", "x", "--model", "m3"], {}, "", {"garbage": KEY * 30}),
    (["run", "-e", "x", "--model", "m4"], {}, "", {"text": f"I say {KEY}"}),
    (["run", "-e", "x", "--yes", "--model", "m5"], {}, "", ask("env; cat /proc/$PPID/environ; cat $F")),
    (["run", "-e", "x", "--model", "m6", "--json"], {}, "", ask("env; echo $OPENAI_API_KEY")),
    (["run", "-e", "x", "--model", "m7"], {"MY_COPY": KEY}, "", ask("env")),
    (["run", "-e", "x"], {}, f'[agent]\napi_key = "{KEY}"\nbase_url = "http://127.0.0.1:1"\nmodle = 1', None),
    (["run", "-e", "x"], {}, f'[agent]\napi_key = ["{KEY}"]', None),
    (["run", "-e", "x"], {}, f'[agent]\napi_key = "{KEY}', None),
    (["run", "-e", "x", "--timeout", "1"], {"OPENAI_BASE_URL": f"http://user:{KEY}@127.0.0.1:1/"}, "", None),
    (["run", "-e", "x"], {"OPENAI_API_KEY": f"{KEY}…"}, "", None),
    (["run", "-e", "x", "--provider", KEY], {}, "", None),
    (["auth", "status"], {}, "", None),
    (["auth", "status", "--json"], {}, "", None),
    (["auth", "login", "--provider", "custom", "--api-key", KEY], {}, "", None),
    (["sessions", "list"], {}, "", None),
    (["sessions", "show", KEY], {}, "", None),
]


def test_the_key_is_never_shown_or_kept(openpista, model, openai, home, tmp_path):
    """A planted key: not in stdout, stderr, the database or any other file of the home, in a row of error paths."""
    home.mkdir(mode=0o700)
    credentials = home / "credentials.toml"
    steps = []
    for words, _, _, step in LEAKS:
        if step:
            name = words[words.index("--model") + 1]
            steps.append({"model": name, "times": 1 if "tool_calls" in step else -1} | step)
            steps += [{"model": name, "tool_result_text": True}] if "tool_calls" in step else []
    model.script(*steps)

    def run(number):
        words, env, text, _ = LEAKS[number]
        place = tmp_path / f"case{number}"
        place.mkdir()
        (place / "config.toml").write_text(text)
        env = openai | {"OPENAI_API_KEY": KEY, "F": str(credentials)} | env
        return openpista("--debug", *words, env=env, cwd=place)

    shown = []
    for number, done in together(run, range(len(LEAKS))):
        shown += [(LEAKS[number][0], stream) for stream in ("stdout", "stderr") if KEY in getattr(done, stream)]
        assert done.returncode in (0, 1, 2, 3) and done.stdout + done.stderr, number
    assert shown == []
    kept = [path.name for path in home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert kept == []
    assert [row["body"]["model"] for row in model.requests() if KEY in json.dumps(row["body"])] == []


def test_children_do_not_see_the_key(openpista, model, openai, tmp_path):
    command = "env; tr '\\0' ' ' </proc/self/cmdline; tr '\\0' ' ' </proc/$PPID/cmdline"
    model.script(ask(command), {"text": "ok"})
    env = openai | {"OPENAI_API_KEY": KEY, "GITHUB_TOKEN": "hidden-0123456789", "PLAIN": "seen-0123456789"}
    assert openpista("run", "-e", "x", "--yes", env=env, fresh=True).stdout == "ok\n"
    output = said(model.bodies()[1])
    assert "seen-0123456789" in output
    assert KEY not in output and "[secret]" not in output and "hidden-0123456789" not in output


# sessions


def test_sessions(openpista, home):
    assert openpista("sessions", "list").stdout == "no sessions yet\n"
    assert openpista("sessions", "list", "--json").stdout == "[]\n"
    openpista(*OFFLINE, "$ echo one", "--session", "alpha")
    openpista(*OFFLINE, "$ echo 둘", "--session", "베타")
    lines = openpista("sessions", "list").stdout.splitlines()
    assert lines[0].split() == ["SESSION", "MESSAGES", "LAST", "USED", "(UTC)", "BEGINS", "WITH"]
    assert [line.split()[:2] for line in lines[1:]] == [["베타", "4"], ["alpha", "4"]]
    assert lines[1].index("4") + 2 == lines[2].index("4")  # 베타 takes four columns with two characters
    listed = json.loads(openpista("sessions", "list", "--json").stdout)
    assert [set(row) for row in listed] == [{"name", "messages", "updated_at", "first"}] * 2
    shown = openpista("sessions", "show", "alpha").stdout
    assert re.sub(r"\[[-\d]+ [:\d]+\] ", "", shown) == (
        'user\n  $ echo one\nassistant\n  calls system.run {"command":"echo one"}\ntool echo one\n  one\nassistant\n  one\n'
    )
    rows = [json.loads(line) for line in openpista("sessions", "show", "베타", "--json").stdout.splitlines()]
    assert [row["role"] for row in rows] == ["user", "assistant", "tool", "assistant"]
    assert rows[2]["text"] == "둘" and rows[1]["tool_calls"][0]["name"] == "system.run"

    for words in (["show", "alpa"], ["delete", "alpa"], ["delete", "베타", "alpa"]):
        done = openpista("sessions", *words)
        assert done.returncode == 1 and done.stdout == "" and one_line(done.stderr)
        assert "no session named 'alpa', did you mean 'alpha'?" in done.stderr
        assert "`openpista sessions list`" in done.stderr
    done = openpista("sessions", "show", "alpa", "--json")
    assert json.loads(done.stdout)["exit_code"] == 1
    assert openpista("sessions", "delete", "alpha", "alpha", "베타").stdout == "deleted 2 sessions\n"
    assert openpista("sessions", "list").stdout == "no sessions yet\n"


# skills


def test_skills(openpista, home, tmp_path):
    root = home / "workspace" / "skills"
    assert openpista("skills", "list").stdout == f"no skills in {root}\n"
    assert openpista("skills", "list", "--json").stdout == "[]\n"
    home.mkdir(mode=0o700)
    for name, text in {"good": "name: good\ndescription: Does good.", "odd": "name: other\ndescription: x"}.items():
        (root / name).mkdir(parents=True)
        (root / name / "SKILL.md").write_text(f"---\n{text}\n---\nbody\n")
    (root / "broken").mkdir()
    (root / "broken" / "SKILL.md").write_text("nothing here")
    done = openpista("skills", "list")
    assert done.returncode == 0 and re.search(r"^good +Does good\.$", done.stdout, re.M)
    assert "warning: " in done.stderr and "broken" in done.stderr and "odd" in done.stderr
    assert "good" in [row["name"] for row in json.loads(openpista("skills", "list", "--json").stdout)]
    done = openpista("skills", "validate")
    assert done.returncode == 1 and done.stderr == ""
    assert f"{root / 'good'}: valid\n" in done.stdout and f"{root / 'broken'}: invalid\n  - " in done.stdout
    for path in (root / "good", root / "good" / "SKILL.md", "."):
        done = openpista("skills", "validate", str(path), cwd=root / "good")
        assert done.returncode == 0, done.stdout
    done = openpista("skills", "validate", "/no/such")
    assert done.returncode == 1 and "/no/such" in done.stdout


# The command line itself


def test_every_command_has_help(openpista):
    for name, done in together(lambda name: openpista(*name.split(), "--help"), list(COMMANDS)):
        assert done.returncode == 0 and done.stderr == "", name
        assert done.stdout.startswith(f"usage: openpista {name}")
        first = COMMANDS[name].run.__doc__.splitlines()[0]
        assert first in done.stdout and first.endswith(".")
        assert first.rstrip(".") in openpista("--help").stdout if name == "run" else True


def test_help_and_version(openpista, home):
    for words in (["--help"], ["-h"]):
        done = openpista(*words)
        assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: openpista")
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert re.fullmatch(r"openpista \d+\.\d+\.\d+\n", openpista("--version").stdout)
    assert not home.exists()


GROUPS = [["auth", "--help"], ["cron", "--help"], ["sessions", "--help"], ["skills", "-h"]]


def test_a_group_has_help(openpista):
    for words, done in together(lambda words: openpista(*words), GROUPS):
        assert done.returncode == 0 and done.stderr == "", words
        assert all(name in done.stdout for name in COMMANDS if name.startswith(f"{words[0]} "))


UNKNOWN = [
    (["rnu"], "unknown command 'rnu', did you mean 'run'?"),
    (["rnu", "-e", "x"], "unknown command 'rnu', did you mean 'run'?"),
    (["sesions", "list"], "unknown command 'sesions', did you mean 'sessions'?"),
    (["sessions", "lst"], "sessions what? list, show, delete"),
    (["auth"], "auth what? login, status, logout; see `openpista"),
    (["sessions"], "sessions what? list, show, delete; see `openpista"),
    (["zzz"], "unknown command 'zzz'; see `openpista --help`"),
    (["--bogus", "run"], "--bogus"),
    (["run", "text"], "unrecognized arguments: text; see `openpista run --help`"),
    (["sessions", "show"], "the following arguments are required: name; see `openpista sessions show --help`"),
    (["auth", "logout"], "--provider"),
    (["--log-level", "loud", "run"], "'loud'"),
]


def test_unknown_words(openpista):
    for (words, text), done in together(lambda case: openpista(*case[0]), UNKNOWN):
        assert done.returncode == 2 and done.stdout == "", words
        assert one_line(done.stderr) and text in done.stderr, done.stderr


def test_an_option_that_is_cut_short_is_not_guessed(openpista):
    """A script that says --y today must not mean something else when an option is added."""
    done = openpista(*OFFLINE, "$ echo hi", "--ye")
    assert done.returncode == 2 and "--ye" in done.stderr


def test_global_options_before_and_after(openpista, tmp_path):
    (tmp_path / "own.toml").write_text('[agent]\nprovider = "offline"\n')
    (tmp_path / "bad.toml").write_text("[agent]\nmodle = 1\n")
    run = ["run", "-e", "$ echo hi"]
    for words in (["--config", "own.toml", *run], [*run, "--config", "own.toml"], ["--config=own.toml", *run]):
        assert openpista(*words).stdout == "hi\n", words
    for words in (["--debug", *OFFLINE], ["--log-level", "debug", *OFFLINE]):
        done = openpista(*words, "$ echo hi")
        assert done.stdout == "hi\n" and "DEBUG" in done.stderr
    for words in (["--debug", *run], [*run, "--debug"]):
        done = openpista(*words, "--config", "bad.toml")
        assert done.returncode == 2 and "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].endswith("bad.toml: unknown setting 'agent.modle', did you mean 'model'?")
    assert openpista("sessions", "list", env={"OPENPISTA_CONFIG": "bad.toml"}).returncode == 2
    assert openpista("--config", "own.toml", *run, env={"OPENPISTA_CONFIG": "bad.toml"}).stdout == "hi\n"


def test_a_folder_that_is_gone(openpista, tmp_path, environ):
    gone = tmp_path / "gone"
    gone.mkdir()
    line = 'rmdir "$PWD"; "$@" run --provider offline -e "\\$ echo hi" </dev/null'
    argv = ["bash", "-c", line, "bash", *PROGRAM]
    done = subprocess.run(argv, env=environ | {"HOME": str(tmp_path)}, cwd=gone, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("hi\n", "", 0)
    assert not os.path.exists(gone)


def test_an_error_of_the_system_is_one_json_object_too(openpista, tmp_path):
    (tmp_path / "openpista.pid").mkdir()
    done = openpista("status", "--json", env={"OPENPISTA_HOME": str(tmp_path)})
    found = json.loads(done.stdout)
    assert (found["exit_code"], done.returncode) == (1, 1) and found["error"].startswith("Is a directory: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("streams", ["2>/dev/full", ">/dev/full", ">/dev/full 2>&1", "2>&-", ">&- 2>&-", "| true"])
def test_the_exit_code_tells_even_if_nothing_can_be_said(environ, tmp_path, streams):
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import openpista; sys.exit(openpista.main())"
    script = f'set -o pipefail; "$0" -c "$1" run --no-such-option --json {streams}'
    done = subprocess.run(["bash", "-c", script, sys.executable, start], env=environ, cwd=tmp_path, timeout=60,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
