"""What README.md, README_ko.md, docs/ and config.example.toml say is what the program does, and all of it."""

import ast
import contextlib
import os
import pathlib
import platform
import re
import select
import shlex
import socket
import subprocess
import sys
import termios
import time
import tomllib

import pyte
import pytest
from botapi import BOT

import openpista as pista

ROOT = pathlib.Path(__file__).parent.parent
README, KOREAN, EXAMPLE = (
    (ROOT / name).read_text("utf-8") for name in ("README.md", "README_ko.md", "config.example.toml")
)
DOCS = ROOT / "docs"
GUIDES = {str(path.relative_to(DOCS)): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
CHAT, DAEMON, SETTINGS, TELEGRAM, SECURITY, SKILLS, GATEWAY = (
    GUIDES[f"{name}.md"]
    for name in ("chat", "daemon", "settings", "telegram", "security", "skills", "gateway-protocol")
)
PAGES = {"README.md": README, **GUIDES}
GLOBAL = {"--config", "--log-level", "--debug", "--version", "--help"}
BUILDER = {"--universal"}
KEY = "sk-not-a-real-key-123456"


def blocks(text):
    """[(kind, body), ...] of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def spans(text):
    """The `code` outside of the blocks, on one line each."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def calls(text):
    """[(command, options), ...] for each time the text calls openpista."""
    typed = {kind: re.compile(r"^\$ .+" if kind == "console" else r"^.+", re.M) for kind, _ in blocks(text)}
    lines = [line for kind, body in blocks(text) for line in typed[kind].findall(body)] + spans(text)
    for line in lines:
        if match := re.search(r"\bopenpista(?:\.pyz)? +([-a-z].*)", line):
            words = shlex.split(match[1])
            words = words[: next((i for i, word in enumerate(words) if word in ("|", "<", "&&")), None)]
            two, given = " ".join(words[:2]), {word for word in words if re.match(r"--?[a-z]", word)}
            first = "tui" if words[0] in given - GLOBAL else words[0]  # without a command it is the chat
            yield two if two in pista.COMMANDS else first, given


def options(command):
    return {name for names, _ in pista.COMMANDS[command].options for name in names if name.startswith("-")}


def chat_commands(text):
    """The names of the chat's commands that stand there as `code`."""
    return {match[1] for span in spans(text) if (match := re.match(r"/([a-z]+)\b(?!/)", span))}


def row(*cells):
    return f"| {' | '.join(cells)} |"


def code(*words):
    return ", ".join(f"`{word}`" for word in words if word) or "–"


# README


def test_readme_is_short():
    assert README.count("\n") <= 220


def test_readme_opens_with_the_two_commands():
    build, tests = (body for _, body in blocks(README)[:2])
    assert build == "python3 build_zipapp.py && python3 openpista.pyz run --provider offline -e '$ uname -a'\n"
    assert tests == (
        "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
        ".venv/bin/pip install -q -r tests/requirements.txt && .venv/bin/python -m pytest -q tests\n"
    )
    assert [line for line in README.splitlines() if line.startswith("python3 -m venv ")] == [tests.strip()]  # .ci/run


def test_readme_names_each_command_and_no_other():
    called = {command for command, _ in calls(README)}
    assert called == {*pista.COMMANDS, "--version"}


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_only_commands_and_options_that_exist_are_named(text):
    assert {command for command, _ in calls(text)} <= {*pista.COMMANDS, "--version"}
    for command, given in calls(text):
        assert given <= GLOBAL | (options(command) if command in pista.COMMANDS else set()), command
    alone = {span.split()[0] for span in spans(text) if re.match(r"--?[a-z]", span)}
    assert alone <= GLOBAL.union(*map(options, pista.COMMANDS))


def test_readme_names_the_global_options():
    alone = {span.split()[0] for span in spans(README) if span.startswith("--")}
    assert alone.union(*(given for _, given in calls(README))) >= GLOBAL
    assert {word for span in spans(README) if "build_zipapp" in span for word in re.findall(r"--\w+", span)} <= BUILDER


@pytest.mark.parametrize("command", pista.COMMANDS)
def test_each_option_is_named_somewhere(command):
    pages = [text for text in PAGES.values() if command in {name for name, _ in calls(text)}]
    named = {span.split()[0] for text in pages for span in spans(text) if span.startswith("-")}
    named = named.union(*(given for text in pages for name, given in calls(text) if name == command))
    every = [{*names} for names, _ in pista.COMMANDS[command].options if names[0].startswith("-")]
    assert [names for names in every if not names & named] == []


def test_each_option_explains_itself():
    silent = {
        (name, *names)
        for name, command in pista.COMMANDS.items()
        for names, settings in command.options
        if names[0].startswith("-") and not settings.get("help")
    }
    assert silent == set()


def test_global_options_are_all():
    parser = pista.global_options(pista.argparse.ArgumentParser())
    assert {name for action in parser._actions for name in action.option_strings if name[:2] == "--"} == (
        GLOBAL - {"--version"}
    )


def test_provider_table():
    assert {*pista.PROVIDERS} <= {*spans(README)}
    table = re.findall(r"^\| `.+\n", SETTINGS[SETTINGS.index("## Providers") :], re.M)
    rows = [row(code(name), code(*spec.key_env), code(spec.model)) for name, spec in pista.PROVIDERS.items()]
    assert [line.strip() for line in table] == rows


def variables_read():
    """The names of the environment's variables that the code reads, as far as they stand in it."""
    for name in ("openpista.py", "bootstrap.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("get", "env", "variable"):
                called, first = ast.unparse(node.func), node.args[:1]
                if first and re.search(r"environ\b|^env$|^variable$", called) and isinstance(first[0], ast.Constant):
                    yield f"OPENPISTA_{first[0].value}" if called == "variable" else first[0].value
    yield from (f"OPENPISTA_{name}" for name in pista.ENVIRONMENT)
    for spec in pista.PROVIDERS.values():
        yield from filter(None, (*spec.key_env, spec.url_env))
    yield from (*pista.Notifier.VARIABLES, pista.Child.MARK)


def test_table_of_variables_is_true():
    everywhere = {"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "HOME", "PATH", "LANG"}  # what libraries read
    for text in (README, KOREAN):
        rows = re.findall(r"^\| (`[A-Z][A-Z_]+`.*?) \|", text, re.M)
        assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == {*variables_read()} | everywhere


def test_table_of_settings_is_true():
    for text in (README, KOREAN):
        rows = re.findall(r"^\| `\[+([a-zA-Z.]+)\]+` \| (.+?) \|$", text, re.M)
        named = [f"{section}.{name}" for section, cell in rows for name in re.findall(r"`(.+?)`", cell)]
        tables = {"cron": pista.CronConfig, "agents": pista.RoleConfig, "routes": pista.RouteConfig}  # of any number
        many = {"agents": "agents.NAME"}
        inner = [f"{many.get(name, name)}.{field}" for name, kind in tables.items() for field in kind._fields]
        assert sorted(named) == sorted([*(name for name in settings(pista.Config()) if name not in tables), *inner])


def test_settings_that_pages_name_exist():
    known = {*settings(pista.Config())}
    for text in PAGES.values():
        named = {f"{match[1]}.{match[2]}" for span in spans(text) if (match := re.match(r"\[([\w.]+)\] (\w+)", span))}
        assert named <= known


def test_version():
    assert f"Version {pista.__version__} " in README
    assert f"## {pista.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def anchors(text):
    """What a link may name of a page: its headings, as GitHub writes them."""
    heads = re.findall(r"^#+ (.+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    guides = ((text, (DOCS / name).parent) for name, text in GUIDES.items())
    for text, folder in ((README, ROOT), (KOREAN, ROOT), *guides):
        for name, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text)):
            if "://" not in name:
                assert not name or (folder / name).is_file(), name
                assert not anchor or anchor in anchors((folder / name).read_text("utf-8") if name else text), anchor
    assert [name for name in GUIDES if f"](docs/{name})" not in README or f"](docs/{name})" not in KOREAN] == []


# docs/chat.md


def test_page_has_each_chat_command_and_no_other():
    rows = re.findall(r"^\| `/(\w+)(?: (\w+))?` \|", CHAT, re.M)
    assert rows == [(name, entry.takes) for name, entry in pista.CHAT_COMMANDS.items()]
    assert chat_commands(CHAT) == {*pista.CHAT_COMMANDS}


def test_no_other_page_has_chat_commands_that_do_not_exist():
    pages = [text for name, text in PAGES.items() if name != "telegram.md"]
    assert set().union(*map(chat_commands, pages)) == {*pista.CHAT_COMMANDS}


def test_page_says_which_commands_work_during_a_turn():
    [said] = re.findall(r"^(`/help`.*) work during a turn", CHAT, re.M)
    same = {"exit"}  # the other name of /quit
    assert chat_commands(said) | same == {name for name, entry in pista.CHAT_COMMANDS.items() if entry.at_once}


# docs/telegram.md


def test_page_has_each_command_of_telegram_and_no_other():
    assert re.findall(r"^\| `/(\w+)` \|", TELEGRAM, re.M) == [*pista.MENU.orders]
    assert chat_commands(TELEGRAM) - {"newbot"} == {*pista.MENU.orders}  # which is @BotFather's


def test_page_has_each_setting_of_telegram_and_no_other():
    table = TELEGRAM[TELEGRAM.index("| Setting | Meaning |") :]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == [*pista.TelegramConfig._fields]


def test_page_shows_a_question_as_it_is():
    call = pista.ToolCall("1", "system.run", {"command": "rm -r build"})
    values = {"id": 1, "call": call, "danger": "rm deletes files"}
    note = pista.question_note(pista.Approval(*map(values.get, pista.Approval._fields)))
    assert ("text", note.text.replace("```\n", "").replace("\n```", "") + "\n") in blocks(TELEGRAM)
    assert [label for row in note.buttons for label, _ in row if f'"{label}"' not in TELEGRAM] == []


def test_limits_of_the_page():
    assert (pista.MOST_FETCHED, pista.MOST_UPLOADED) == (20 << 20, 50 << 20)
    assert (pista.People.MINUTES, pista.People.MOST, pista.People.KEPT_HOURS) == (10, 20, 24)
    assert (pista.SETUP_SECONDS, round(pista.Questions.EXPIRES, -2), pista.MANY_PIECES) == (600, 3_600, 5)
    assert {name for name, spec in pista.PROVIDERS.items() if spec.hears} == {"openai", "groq", "mistral"}


# docs/daemon.md


def test_page_has_each_schedule_and_policy():
    words = {word for span in spans(DAEMON) for word in span.split()}
    assert words >= {*pista.CRON_MACROS, "@reboot", *pista.CATCH_UPS, *pista.CRON_TOOLS}
    assert {word for word in words if word.startswith("@")} == {*pista.CRON_MACROS, "@reboot"}
    assert all(pista.Cron.parse(word) for word in words if word.startswith("@"))


def test_schedules_of_the_page_mean_something():
    table = DAEMON[DAEMON.index("| Written | Means |") :]
    for row in re.findall(r"^\| `([^@].*?)` \|", table[: table.index("\n\n")], re.M):
        for word in re.findall(r"`([^`]+)`", f"`{row}`"):
            fields = (f"{word} * * * *", f"* * {word} * *", f"* * * {word} *", f"* * * * {word}")
            assert any(is_schedule(text) for text in fields), word


def is_schedule(text):
    with contextlib.suppress(pista.CronError):
        return bool(pista.Cron.parse(text))
    return False


# docs/security.md


def test_examples_of_what_asks_are_true():
    harmless, risky = (body for kind, body in blocks(SECURITY) if kind == "text")
    assert [line for line in harmless.splitlines() if pista.risk(line)] == []
    commands = [re.sub(r"\s+#.*", "", line) for line in risky.splitlines()]
    assert [line for line in commands if not pista.risk(line)] == []


def test_ways_of_approval_are_all():
    table = SECURITY[SECURITY.index("| `[tools] approval` |") :]
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', table, re.M)) == pista.CHOICES["tools.approval"]
    assert pista.Hub.ASKING == 3_600 and pista.ABSENT == 120


# docs/skills.md


def test_fields_and_limits_of_a_skill():
    assert sorted(re.findall(r"^\| `([a-z-]+)` \|", SKILLS, re.M)) == pista.SKILL_FIELDS
    assert {*pista.SKILL_ENTRIES} <= {*spans(SKILLS)}
    assert (pista.SKILL_MD_BYTES, pista.SKILL_NAME_CHARS, pista.SKILL_BODY_CHARS) == (256 << 10, 64, 60_000)
    assert (pista.CATALOGUE_CHARS, pista.CATALOGUE_DESCRIPTION) == (4_000, 200)
    assert (pista.SKILL_RESOURCES, pista.SKILL_FOLDERS) == (50, 2_000)


def test_a_program_for_a_skill(fresh):
    [block] = [body for kind, body in blocks(SKILLS) if kind == "sh"]
    printed = bash(f"set -e\n{block}openpista skills list", fresh)
    assert "\n.: valid\n" in f"\n{printed}" and "weather  The weather of a place." in printed


# docs/gateway-protocol.md


def test_requests_of_the_page_are_all_with_their_fields():
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\|", GATEWAY[: GATEWAY.index("## A message")], re.M)
    assert sorted(name for name, _ in rows[1:]) == sorted(pista.REQUESTS)
    for name, cell in rows[1:]:
        fields = {field.rstrip("?") for field in pista.REQUESTS[name]} - {"id", "token"}
        assert name == "message" or {*re.findall(r"`(\w+)`", cell)} == fields, name
    assert {field.rstrip("?") for field in pista.REQUESTS["message"]} <= {*re.findall(r"\w+", GATEWAY)}


def test_error_codes_of_the_page_are_all():
    source = (ROOT / "openpista.py").read_text("utf-8")
    words = {word for _, word in pista.ERROR_WORDS} | {*re.findall(r'WireError\(\s*"(\w+)"', source), "unavailable"}
    assert {*re.findall(r"^\| `(\w+)` \|", GATEWAY[GATEWAY.index("## Errors") :], re.M)} == words | {"code"}
    [codes] = re.findall(r"^Codes with which.*\Z", GATEWAY, re.M | re.S)
    assert [int(code) for code in re.findall(r"`(\d+)`", codes)] == [*pista.Code]


def test_limits_of_the_protocol():
    limits = pista.Limits()
    assert (pista.FRAME_LIMIT, pista.SMALL_FRAME, pista.DEPTH_LIMIT) == (1 << 20, 64 << 10, 64)
    assert (limits.bytes_before, limits.streams_before, limits.streams) == (128 << 10, 8, 128)
    assert (limits.first_frame, limits.frame, limits.idle, limits.stall) == (5, 60, 60, 30)
    assert (limits.failures, limits.strangers, limits.connections) == (3, 16, 256)


# README_ko.md


def test_translation_is_short():
    assert KOREAN.count("\n") <= 220


def test_translation_has_the_same_parts():
    assert re.findall(r"^#+(?= )", KOREAN, re.M) == re.findall(r"^#+(?= )", README, re.M)
    tables = [
        [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text, re.M)] for text in (README, KOREAN)
    ]
    assert tables[0] == tables[1]
    assert blocks(KOREAN) == blocks(README)
    assert set(spans(KOREAN)) == set(spans(README))


# config.example.toml


def settings(part, where=""):
    """The names of all settings, a table's with its own before them."""
    for name, value in part._asdict().items():
        yield from settings(value, f"{where}{name}.") if hasattr(value, "_fields") else [where + name]


def keys(table, where=""):
    """The same of a TOML table."""
    for name, value in table.items():
        yield from keys(value, f"{where}{name}.") if isinstance(value, dict) else [where + name]


def test_example_is_the_default():
    assert pista.load_config(ROOT / "config.example.toml", {}) == pista.Config()


def test_example_has_every_setting_and_says_why():
    tables = ["cron", "agents", "routes"]
    assert sorted([*keys(tomllib.loads(EXAMPLE)), *tables]) == sorted(settings(pista.Config()))
    assert [line for line in EXAMPLE.splitlines() if re.match(r"\w+ =", line) and "  # " not in line] == []


@pytest.mark.parametrize("kind, head", [(pista.RoleConfig, "[agents.NAME]"), (pista.RouteConfig, "[[routes]]")])
def test_example_of_an_agent_and_a_route(kind, head):
    table = EXAMPLE[EXAMPLE.index(f"# {head}") :].partition("\n\n")[0]
    assert [line for line in table.splitlines()[1:] if not re.match(r"# \w+ = .+  ?# ", line)] == []
    found = tomllib.loads(re.sub(r"^# ", "", table, flags=re.M))
    [row] = found["agents"].values() if kind is pista.RoleConfig else found["routes"]
    assert list(row) == list(kind._fields)
    assert pista.build(kind, row)


def test_page_has_each_condition_of_a_route():
    rows = re.findall(r"^\| `(\w+)` \|", GUIDES["agent-orchestration/routing-rules.md"], re.M)
    assert rows == list(pista.RouteConfig._fields[1:])


def test_example_of_a_job():
    job = re.sub(r"^# ", "", EXAMPLE[EXAMPLE.index("# [[cron]]") :], flags=re.M)
    assert sorted(keys(tomllib.loads(job)["cron"][0])) == sorted(pista.CronConfig._fields)
    assert pista.build(pista.Config, tomllib.loads(job)).cron == (pista.CronConfig(),)


# The sessions, as they are shown


@pytest.fixture(scope="module")
def path(archive, tmp_path_factory):
    """A folder for PATH, as after the installation in the README."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "openpista").symlink_to(archive)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python3").chmod(0o755)
    return folder


@pytest.fixture
def fresh(path, archive, tmp_path):
    """The environment of a person who has just installed it: an empty home, openpista.pyz in the folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/openpista.pyz").symlink_to(archive)
    search = f"{tmp_path}/.local/bin:{path}:{os.environ['PATH']}"
    return {"HOME": str(tmp_path), "PATH": search, "TERM": "dumb", "OPENPISTA_CACHE": f"{path}/cache"}


def bash(line, env):
    done = subprocess.run(
        ["bash", "-c", line],
        env=env,
        cwd=f"{env['HOME']}/work",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.stdout


def steps(block):
    """[(command line, what it prints), ...] of a console block; a line that begins with > goes on with the command."""
    block = re.sub(r"\n> ?", "\0", block)
    return [
        (line.replace("\0", "\n"), shown) for line, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.M)
    ]


def looks_like(printed, shown):
    """The same but for numbers, days of the week, and what … stands for."""
    day = rf"\b(?:{'|'.join(pista.WEEKDAY_NAMES)})(?= \d)"
    shown, printed = (re.sub(r"\d+", "0", re.sub(day, "day", text, flags=re.I)) for text in (shown, printed))
    return re.fullmatch(re.escape(shown).replace("…", ".*"), printed) is not None


TALK = "$ openpista -s tidy\n"
CONSOLE = [body for text in PAGES.values() for kind, body in blocks(text) if kind == "console" and body[0] == "$"]
SERVED = [body for body in CONSOLE if re.search(r"^\$ openpista (start|devices|connect|cron)\b", body, re.M)]
BOTS = [body for body in CONSOLE if re.search(r"^\$ openpista (telegram|pair)\b", body, re.M)]
SHOWN = [body for body in CONSOLE if body not in SERVED + BOTS and not body.startswith(TALK)]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.split("-e")[0][2:40].strip())
def test_session_is_true(block, fresh):
    for line, shown in steps(block):
        printed = bash(line, fresh)
        assert looks_like(printed, shown), f"{line}\n{printed}"


@pytest.fixture
def served(fresh, model):
    """The environment of a person who has a daemon, or starts one: its home has a free port and a model."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = pathlib.Path(fresh["HOME"], ".openpista")
    folder.mkdir(mode=0o700)
    (folder / "config.toml").write_text(f'[gateway]\nport = {port}\nhost = "127.0.0.1"\ngrace = 1\n')
    env = fresh | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": model.url, "TZ": "Asia/Seoul"}
    bash("openpista --version", env)  # unpacked, which is said once
    yield env
    bash("openpista stop", env)


@pytest.mark.parametrize("block", SERVED, ids=lambda block: " ".join(block.split()[2:4]))
def test_session_with_the_daemon_is_true(block, served, model):
    home = pathlib.Path(served["HOME"])
    port = re.search(r"port = (\d+)", (home / ".openpista/config.toml").read_text())[1]
    if "openpista start" not in block:
        bash("openpista start --detach", served)
    model.script({"text": "No, the fullest is / with 41 %."})  # what docs/daemon.md shows
    for line, shown in steps(block):
        shown = shown.replace("server.example.com:4433", f"127.0.0.1:{port}").replace(", [::1]:4433", "")
        shown = shown.replace("/home/you", str(home))
        end = time.monotonic() + (20 if "history" in line else 0)  # the daemon takes its time
        while True:
            printed = bash(line.replace("server.example.com", f"127.0.0.1:{port}"), served)
            if "cron list" in line:  # which one comes first depends on the hour
                printed, shown = ("\n".join(sorted(text.splitlines())) for text in (printed, shown))
            if looks_like(printed, shown) or time.monotonic() > end:
                break
        assert looks_like(printed, shown), f"{line}\n{printed}"


def test_an_invite_is_enough(served, model):
    port = re.search(r"port = (\d+)", pathlib.Path(served["HOME"], ".openpista/config.toml").read_text())[1]
    bash("openpista start --detach; openpista devices add laptop --host 127.0.0.1 > invite 2> /dev/null", served)
    away = served | {"OPENPISTA_HOME": f"{served['HOME']}/away"}
    model.script({"text": "first"}, {"text": "second"})
    assert bash("openpista connect - -e hi < invite", away) == "first\n"
    assert bash(f"openpista connect 127.0.0.1:{port} -e hi", away) == "second\n"
    assert bash("openpista devices revoke laptop", served) == "revoked 1 device\n"
    assert "not known here" in bash(f"openpista connect 127.0.0.1:{port} -e hi", away)


def test_files_in_the_home_are_named(served):
    bash("openpista start --detach; openpista devices add laptop --host 127.0.0.1 > invite 2> /dev/null", served)
    bash("openpista connect - -e hi < invite", served)
    found = {path.name for path in pathlib.Path(served["HOME"], ".openpista").iterdir()}
    named = {span.strip("/") for text in (README, DAEMON) for span in spans(text)} | {"memory.db-shm", "memory.db-wal"}
    assert {name for name in found if name not in named and name != "config.toml"} == set()
    assert {
        "openpista.pid",
        "openpista.log",
        "gateway.pem",
        "local.token",
        "known_gateways",
        "gateway_tickets",
    } <= found


def test_first_command_is_true(fresh):
    line = blocks(README)[0][1].removeprefix("python3 build_zipapp.py && ")
    assert bash(line, fresh).split()[0] == platform.uname().system


def test_installation_is_true(fresh):
    home = pathlib.Path(fresh["HOME"])
    (home / "work/key.txt").write_text(KEY + "\n")
    block = "".join(
        body for kind, body in blocks(README) if kind == "sh" and ("cp openpista" in body or "auth" in body)
    )
    printed = bash(f"set -e\n{block}which openpista\nopenpista auth status", fresh)
    assert f"{home}/.local/bin/openpista\n" in printed
    assert re.search(r"anthropic +…3456 +`auth login`", printed) and "$OPENAI_API_KEY" in printed
    assert (home / ".openpista/credentials.toml").stat().st_mode & 0o777 == 0o600


def test_request_of_a_script_is_true(fresh, model):
    [block] = [body for kind, body in blocks(README) if kind == "sh" and body.startswith("journalctl")]
    reader = pathlib.Path(fresh["HOME"], ".local/bin/journalctl")
    reader.parent.mkdir(parents=True)
    reader.write_text("#!/bin/sh\necho nginx failed\n")
    reader.chmod(0o755)
    model.script({"text": "nginx."})
    bash("openpista --version; openpista skills list", fresh)  # unpacked, which is said once
    assert bash(block, fresh | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": model.url}) == "nginx.\n"
    assert "nginx failed" in str(model.requests())


def test_backup_of_the_page_is_true(fresh):
    [block] = [body for kind, body in blocks(GUIDES["deploy.md"]) if kind == "sh" and "--dry-run" in body]
    pathlib.Path(fresh["HOME"], ".backup-passphrase").write_text("eight letters\n")
    printed = bash(f"set -e\nopenpista run --provider offline -e '$ echo hi'\n{block}", fresh)
    assert "whole; nothing was changed" in printed and "memory.db" in printed


@pytest.mark.parametrize("kind", ["user", "system", "launchd"])
def test_a_unit_has_what_the_page_says(kind, fresh):
    own = {"OPENPISTA_HOME": f"{fresh['HOME']}/state", "OPENPISTA_CONFIG": f"{fresh['HOME']}/work/c.toml"}
    pathlib.Path(own["OPENPISTA_CONFIG"]).write_text("")
    printed = bash(f"openpista service print --{kind}", fresh | own)
    assert [word for word in ("PATH", *own, *own.values(), fresh["HOME"], "start") if word not in printed] == []


class Terminal:
    """A terminal with a process in it, whose screen pyte draws."""

    def __init__(self, argv, env):
        self.ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = subprocess.Popen(argv, env=env, start_new_session=True, **streams)
        os.close(theirs)
        self.screen = pyte.Screen(100, 40)
        self.stream = pyte.ByteStream(self.screen)

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip() + "\n"

    def wait(self, pattern, seconds=30):
        """Until the screen shows this."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            if time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"{pattern!r} was not shown:\n{self.text}")
            if select.select([self.ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # Linux says so at the end
                    self.stream.feed(os.read(self.ours, 65_536))

    def type(self, keys):
        os.write(self.ours, keys.encode())

    def end(self):
        self.type("\x04")
        code = self.process.wait(10)
        os.close(self.ours)
        return code


def test_chat_is_true(fresh, model):
    [block] = [body for _, body in blocks(CHAT) if body.startswith(TALK)]
    [(line, shown)] = steps(block)
    ls, rm = re.findall(r"^✓ (.+)  \d", shown, re.M)
    [request] = re.findall(r"^› (.+)", shown, re.M)
    called = [{"tool_calls": [{"name": "system_run", "arguments": {"command": command}}]} for command in (ls, rm)]
    said = {"text": shown.splitlines()[-2], "usage": {"input": 2_000, "output": 656}}
    model.script(*(step | {"usage": {"input": 0, "output": 0}} for step in called), said)
    logs = pathlib.Path(fresh["HOME"], "app")
    logs.mkdir()
    for name, text in {"app.log": "1\n2\n", "old.log": "", "test.log": ""}.items():
        (logs / name).write_text(text)
    bash("openpista --version; openpista skills list", fresh)  # unpacked, which is said once
    env = fresh | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": model.url, "TERM": "xterm-256color"}
    terminal = Terminal(shlex.split(line), env)
    terminal.wait("new session")
    terminal.type(f"{request}\r")
    terminal.wait(re.escape(pista.ONE_KEY))
    time.sleep(pista.Question.SETTLE + 0.1)
    terminal.type("y")
    terminal.wait(r"2 tool calls .+ s\n›")  # and no status any more
    printed = terminal.text.rpartition("\n›")[0] + "\n"
    assert terminal.end() == 0
    assert looks_like(printed, shown), printed
    assert [path.name for path in logs.iterdir()] == ["app.log"]


MINA, BOB = ({"id": 123_456_789, "first_name": "Mina"}, {"id": 987_654_321, "first_name": "Bob"})  # of docs/telegram.md


def set_up(env, bot):
    """What `telegram setup` prints when Mina pairs herself."""
    terminal = Terminal(["openpista", "telegram", "setup"], env)
    terminal.wait("not shown")
    terminal.type(f"{bot.token}\r")
    terminal.wait(r"press Start\.")
    bot.say(MINA["id"], f"/start {re.search('start=([A-Z0-9]+)', terminal.text)[1]}", sender=MINA)
    terminal.wait("Now: openpista start")
    assert terminal.end() == 0
    return terminal.text


@pytest.fixture
def telegram(served, bot):
    """The environment of a person who has a token of a bot, and no more."""
    with pathlib.Path(served["HOME"], ".openpista/config.toml").open("a") as file:
        file.write(f'\n[channels.telegram]\nbase_url = "{bot.url}"\n')
    return served


def test_telegram_page_is_true(telegram, bot):
    setup, *looks = [step for block in BOTS for step in steps(block)]
    name, home = BOT["username"], telegram["HOME"]
    shown = setup[1].replace("my_bot", name).replace("/home/you", home)
    printed = set_up(telegram, bot)
    assert looks_like("".join(printed.split()), "".join(shown.split())), printed  # the terminal breaks lines
    bash("openpista start --detach", telegram)
    bot.wait_state(lambda state: state["polling"], 20)
    bot.say(BOB["id"], "hi", sender=BOB)
    code = re.search(r"[A-Z0-9]{4}-[A-Z0-9]{4}", bot.wait(BOB["id"])[0]["text"])[0]
    for line, shown in looks:
        printed = bash(line.replace("X3Y5-J7KP", code), telegram).replace(code, "X3Y5-J7KP").replace(name, "my_bot")
        assert looks_like(printed, shown), f"{line}\n{printed}"


def test_a_new_token_takes_the_place_of_one_that_was_revoked(telegram, bot):
    stored = pathlib.Path(telegram["HOME"], ".openpista/telegram.token")
    stored.write_text(f"123456:{'A' * 35}\n")
    assert "`openpista telegram setup` takes a new one" in bash("openpista telegram status", telegram)
    assert "Enter keeps the stored one" in set_up(telegram, bot)
    assert stored.read_text() == f"{bot.token}\n"
    assert re.search(r"daemon +does not run\n", bash("openpista telegram status", telegram))


def test_who_is_listed_and_paired_is_shown_once(telegram, bot):
    set_up(telegram, bot)
    assert re.search(
        r"people +123456789\n", bash("TELEGRAM_ALLOWED_USERS=123456789 openpista telegram status", telegram)
    )
