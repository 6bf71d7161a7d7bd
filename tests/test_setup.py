"""The first start as a newcomer sees it: from nothing to a first answer, and to nothing written if they leave."""

import fcntl
import pathlib
import re
import socket
import stat
import tempfile
import time
import tomllib

import pytest
from terminals import foreign

import openpista as o

ENTER, ESC, DOWN, CTRL_C = "\r", "\x1b", "\x1b[B", "\x03"
KEY = "typed-0123456789-abcdef"
EXAMPLE = pathlib.Path(o.__file__).with_name("config.example.toml").read_text("utf-8")
GREETING = {"text": "Hello from the model."}

# A program whose settings lead to another Bot API; nothing but that address is given.
WITH_BOT = """
import os
entry, args = o.parse(["tui"])
telegram = o.TelegramConfig(base_url={url!r})
config, redact = o.Config(channels=o.ChannelsConfig(telegram=telegram)), o.Redactor()
o.setup_logging("warning", redact)
sys.exit(entry.run(o.Context(args, config, o.home(os.environ), os.environ, redact)))
"""


@pytest.fixture
def newcomer(terminal, model):
    """newcomer("start", rows=12) -> a Terminal at the first picker; OpenAI is where the fake server is."""
    opened = []

    def start(*words, **more):
        opened.append(terminal(*words, **{"OPENAI_API_KEY": None} | more))
        opened[-1].wait("Welcome to openpista")
        return opened[-1]

    yield start
    for tty in opened:
        assert not foreign(tty.raw) and KEY.encode() not in tty.raw


def give_key(tty, key=KEY, shows="Models of openai"):
    """From the first picker to the models."""
    tty.send("openai" + ENTER)
    tty.wait("The key for openai")
    tty.send(key + ENTER)
    tty.wait(shows)


def pick(tty, name):
    tty.wait(name)
    tty.send("/" + name)
    tty.until(lambda: f"/ {name}" in tty.text and "1/1" in tty.text)
    tty.send(ENTER)


def chats(tty, name="openai/gpt-5"):
    prompt = re.compile(rf"\n› ?\n{name} · chat-[^\n]*\Z")
    tty.until(lambda: not tty.screen.is_full and prompt.search(tty.text), "there is no chat")


def leave(tty):
    tty.send("/quit" + ENTER)
    assert tty.end() == 0 and tty.left_behind() == []


def unread(path):
    """Its text, '' if there is none."""
    return path.read_text("utf-8") if path.exists() else ""


@pytest.mark.parametrize("size", [(80, 24), (40, 12)], ids=["80x24", "40x12"])
@pytest.mark.parametrize("colours", [None, "1"], ids=["colours", "NO_COLOR"])
def test_from_nothing_to_the_chat(newcomer, model, home, size, colours):
    model.script(GREETING)
    tty = newcomer(columns=size[0], rows=size[1], NO_COLOR=colours)
    give_key(tty)
    assert not home.exists()
    pick(tty, "m2")
    tty.wait("openai/m2 answers")
    tty.wait("“Hello from the model.”")
    assert not home.exists()
    tty.send(ENTER)
    chats(tty, "openai/m2")
    said = tty.scrolled.replace("\n", "")
    assert "openai/m2 answers: Hello from the model." in said and f"wrote {home}/config.toml" in said
    assert (b"\x1b[1m" in tty.raw) is (colours is None)
    assert KEY in unread(home / "credentials.toml") and KEY not in unread(home / "config.toml")
    assert [stat.S_IMODE((home / name).stat().st_mode) for name in ("config.toml", "credentials.toml")] == [0o600] * 2
    asked = model.bodies()[-1]
    assert asked["model"] == "m2" and asked["messages"][-1]["content"] == o.FirstStart.GREETING and asked["tools"]
    tty.send("안녕하세요" + ENTER)
    tty.wait("tool calls" if size[0] == 80 else "calls")
    assert model.bodies()[-1]["messages"][-1]["content"] == "안녕하세요"
    leave(tty)


def test_what_it_writes_is_the_example_with_what_was_chosen(newcomer, home):
    tty = newcomer()
    give_key(tty)
    pick(tty, "m1")
    tty.wait("openai/m1 answers")
    tty.send(ENTER)
    chats(tty, "openai/m1")
    leave(tty)
    written = unread(home / "config.toml").splitlines()
    changed = [(old, new) for old, new in zip(EXAMPLE.splitlines(), written, strict=True) if old != new]
    assert [new.split("  ")[0] for _, new in changed] == ['provider = "openai"', 'model = "m1"']
    assert [old.index("# ") for old, _ in changed] == [new.index("# ") for _, new in changed]
    assert [old.partition("# ")[2] for old, _ in changed] == [new.partition("# ")[2] for _, new in changed]
    assert o.load_config(home / "config.toml", {}).agent == o.AgentConfig(provider="openai", model="m1")


def test_example_is_what_it_writes_with_all_defaults():
    default = o.Config()
    assert o.config_text(default.agent.provider, default.agent.model, default.channels.telegram.enabled) == EXAMPLE


def test_a_second_start_is_the_chat(newcomer, terminal, model, home):
    tty = newcomer()
    give_key(tty)
    pick(tty, "m1")
    tty.wait("answers")
    tty.send(ENTER)
    chats(tty, "openai/m1")
    leave(tty)
    model.script()
    tty = terminal(OPENAI_API_KEY=None)
    chats(tty, "openai/m1")
    assert "Welcome" not in "".join(tty.frames) and model.requests() == []
    leave(tty)


def test_a_wrong_key_and_then_the_right_one(newcomer, model, home):
    model.script({"path": "/models", "status": 401})
    tty = newcomer()
    give_key(tty, "wrong-0123456789", shows="openai refuses this key")
    tty.wait("…6789")
    tty.send(ENTER)  # back to the key
    tty.wait("The key for openai")
    tty.send(KEY + ENTER)
    pick(tty, "m1")
    tty.wait("answers")
    tty.send(ENTER)
    chats(tty, "openai/m1")
    assert KEY in unread(home / "credentials.toml") and "wrong" not in unread(home / "credentials.toml")
    leave(tty)


def test_a_key_that_only_the_try_finds_wrong(newcomer, model, home):
    model.script({"path": "/chat/completions", "status": 401})
    tty = newcomer()
    give_key(tty, "wrong-0123456789")
    pick(tty, "m1")
    tty.wait("openai/m1 gave no answer")
    tty.wait("› another key")  # the first is the default
    tty.send(ENTER)
    tty.wait("The key for openai")
    tty.send(KEY + ENTER)
    tty.wait("openai/m1 answers")  # the model is still known
    assert model.requests()[-1]["headers"]["authorization"] == f"Bearer {KEY}"
    tty.send(ENTER)
    chats(tty, "openai/m1")
    leave(tty)


def test_a_model_that_fails_and_then_another(newcomer, model, home):
    model.script(
        {"model": "m1", "status": 400, "body": '{"error": {"message": "m1 does not support tools"}}'}, GREETING
    )
    tty = newcomer()
    give_key(tty)
    pick(tty, "m1")
    tty.wait("openai/m1 gave no answer")
    tty.wait("m1 does not support tools")
    tty.wait("› another model")
    tty.send(ENTER)
    tty.wait("Models of openai")
    pick(tty, "m2")
    tty.wait("openai/m2 answers")
    tty.send("try another" + ENTER)  # it can be another one still
    pick(tty, "gpt-4o-mini")
    tty.wait("openai/gpt-4o-mini answers")
    tty.send(ENTER)
    chats(tty, "openai/gpt-4o-mini")
    leave(tty)


def test_another_try_and_another_provider(newcomer, model, home):
    model.script({"status": 404, "body": '{"error": {"message": "the model is away"}}', "times": 2}, GREETING)
    tty = newcomer()
    give_key(tty)
    pick(tty, "m1")
    tty.wait("gave no answer")
    tty.send("once more" + ENTER)
    tty.until(lambda: len(model.bodies()) == 2)
    tty.wait("gave no answer")
    tty.send("another provider" + ENTER)
    tty.wait("Welcome to openpista")
    tty.send("custom" + ENTER)
    tty.wait("address of the server")
    tty.send(model.url + ENTER)
    tty.wait("empty if the server needs none")
    tty.send(KEY + ENTER)
    tty.wait("Models of custom")
    tty.send("t")
    tty.wait("The id of a model")
    tty.send("한국 어" + ENTER)
    tty.wait("an id is a word")
    tty.send("\x15m1" + ENTER)
    tty.wait("custom/m1 answers")
    tty.send(ENTER)
    chats(tty, "custom/m1")
    config = tomllib.loads(unread(home / "config.toml"))
    assert config["agent"]["provider"] == "custom" and config["agent"]["base_url"] == ""
    assert model.url in unread(home / "credentials.toml")
    leave(tty)


STEPS = ["provider", "address", "key", "check", "models", "try", "mend", "offer"]


def go_to(tty, model, step):
    """From the first picker to this step of the way."""
    model.script({"path": "/models", "delay": 30 * (step == "check")}, *go_to_faults(step))
    if step == "provider":
        return
    tty.send(("custom" if step == "address" else "openai") + ENTER)
    tty.wait("address of the server" if step == "address" else "The key for openai")
    if step in ("address", "key"):
        return
    tty.send(KEY + ENTER)
    tty.wait("Trying openai" if step == "check" else "Models of openai")
    if step in ("check", "models"):
        return
    pick(tty, "m1")
    tty.wait({"try": "Asking openai/m1", "mend": "gave no answer", "offer": "openai/m1 answers"}[step])


def go_to_faults(step):
    faults = {"try": {"delay": 30}, "mend": {"status": 404, "body": '{"error": {"message": "no such model"}}'}}
    return [faults[step]] if step in faults else []


@pytest.mark.parametrize("key", [ESC, CTRL_C], ids=["Esc", "Ctrl-C"])
@pytest.mark.parametrize("step", STEPS)
def test_leaving_writes_nothing(newcomer, model, home, step, key):
    tty = newcomer()
    go_to(tty, model, step)
    for _ in range(100):  # a step back each time; two that are read at once are Alt-Esc, and lost
        if "nothing was set up" in tty.text:
            break
        tty.send(key)
        tty.spend(0.1)
    assert tty.end() == 130 and tty.left_behind() == []
    assert "nothing written" in tty.text and not home.exists()


@pytest.mark.parametrize("step", ["key", "try", "offer"])
def test_a_terminal_that_is_gone_writes_nothing(newcomer, model, home, step):
    tty = newcomer()
    go_to(tty, model, step)
    assert tty.hang_up() != 0 and not home.exists()


@pytest.mark.parametrize("words", [(), ("tui",)], ids=["alone", "tui"])
def test_without_a_terminal_nothing_is_asked(openpista, words):
    done = openpista(*words)
    assert done.returncode == 3 and "no key for any model" in done.stderr and "Welcome" not in done.stdout


NOT_NEW = [{"OPENAI_API_KEY": "test-key-123456"}, {"OPENPISTA_PROVIDER": "offline"}, {"TERM": "dumb"}]


@pytest.mark.parametrize("env", NOT_NEW, ids=["key", "provider", "dumb"])
def test_who_is_no_newcomer(terminal, home, env):
    tty = terminal(**{"OPENAI_API_KEY": None} | env)
    tty.wait("openpista 0.1.0 ·")
    assert "Welcome" not in "".join(tty.frames)
    tty.send("/quit\n" if env.get("TERM") else "/quit" + ENTER)
    tty.end()
    assert not (home / "config.toml").exists()


def test_a_file_that_is_named_and_not_there_is_no_first_start(terminal):
    tty = terminal("--config", "none.toml", OPENAI_API_KEY=None)
    assert tty.end() == 2 and "no configuration file none.toml" in tty.text


# The daemon


@pytest.fixture
def usual_port():
    """The port that is taken when no setting names one, for one test at a time, of all on this machine."""
    with open(pathlib.Path(tempfile.gettempdir(), "openpista-tests-4433"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end = time.monotonic() + 30
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
                try:
                    port.bind(("127.0.0.1", o.GatewayConfig().port))
                    break
                except OSError:
                    assert time.monotonic() < end, "another program uses the port"
            time.sleep(0.05)
        yield


@pytest.mark.usefixtures("usual_port")
def test_start_leads_to_the_daemon_with_its_chat(newcomer, home):
    tty = newcomer("start", rows=40, columns=120)
    give_key(tty)
    pick(tty, "m1")
    tty.wait("answers")
    tty.send(ENTER)
    chats(tty, "openai/m1")
    said = tty.scrolled
    assert f"configuration  {home}/config.toml" in said and "model          openai/m1" in said
    assert "  next" not in said
    leave(tty)


@pytest.mark.usefixtures("usual_port")
def test_start_with_a_key_alone_says_what_is_next(terminal, openpista):
    tty = terminal("start", columns=120)
    chats(tty, "openai/gpt-4o")
    assert "  next           openpista telegram setup, devices add" in tty.text and "Welcome" not in "".join(tty.frames)
    leave(tty)
    assert openpista("cron", "add", "0 0 1 1 *", "$ date").returncode == 0
    tty = terminal("start", columns=120)
    chats(tty, "openai/gpt-4o")
    assert "  jobs" in tty.text and "  next" not in tty.text
    leave(tty)


# Telegram


@pytest.fixture
def at_the_offer(newcomer, bot):
    """A Terminal at the question about Telegram."""
    tty = newcomer(prepare=WITH_BOT.format(url=bot.url))
    give_key(tty)
    pick(tty, "m1")
    tty.wait("openai/m1 answers")
    tty.send("telegram first" + ENTER)
    tty.wait("The bot's token")
    return tty


def test_telegram_at_once(at_the_offer, bot, home):
    tty = at_the_offer
    tty.send(bot.token + "\n")
    tty.wait("press Start")
    assert not home.exists()
    code = re.search(r"\?start=(\w+)", tty.text.replace("\n", ""))[1]
    bot.say(42, f"/start {code}", sender={"id": 42, "is_bot": False, "first_name": "Kim"})
    tty.wait("paired with Kim")
    chats(tty, "openai/m1")
    assert "Telegram answers while `openpista start` runs" in tty.text and b"fake_fake" not in tty.raw
    assert unread(home / o.TOKEN_FILE).strip() == bot.token and bot.token not in unread(home / "config.toml")
    telegram = o.load_config(home / "config.toml", {}).channels.telegram
    assert telegram == o.TelegramConfig(enabled=True)
    assert "enabled = true         # nobody is served until you say so" in unread(home / "config.toml")
    with o.Store(home / "memory.db") as store:
        assert o.People(store, "telegram").allowed() == ["42"]
    leave(tty)


def test_a_wrong_token_and_then_without(at_the_offer, home):
    tty = at_the_offer
    tty.send("123:no\n")
    tty.wait("does not look like one")
    tty.send("y\n")
    tty.until(lambda: tty.text.count("The bot's token") == 2)
    tty.send(CTRL_C)
    tty.until(lambda: tty.text.count("Try Telegram once more?") == 2)
    assert not home.exists()
    tty.send("\n")
    chats(tty, "openai/m1")
    assert not o.load_config(home / "config.toml", {}).channels.telegram.enabled and not (home / o.TOKEN_FILE).exists()
    leave(tty)


def test_leaving_while_telegram_waits_writes_nothing(at_the_offer, bot, home):
    tty = at_the_offer
    tty.send(bot.token + "\n")
    tty.wait("press Start")
    tty.send(CTRL_C)
    tty.wait("Try Telegram once more?")
    while tty.process.poll() is None:  # Python misses a signal between its prompt and its wait for a line
        tty.send(CTRL_C)
        tty.spend(0.2)
    assert tty.end() != 0 and not home.exists()


@pytest.mark.parametrize("ignored", [False, True], ids=["SIGHUP", "nohup"])
def test_a_terminal_that_is_gone_is_no_yes_to_go_on_without(newcomer, bot, home, ignored):
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if ignored else ""
    tty = newcomer(prepare=ignore + WITH_BOT.format(url=bot.url))
    give_key(tty)
    pick(tty, "m1")
    tty.wait("openai/m1 answers")
    tty.send("telegram first" + ENTER)
    tty.wait("The bot's token")
    assert tty.hang_up() != 0 and not home.exists()


# with_setting

SETTINGS = [  # a text, what becomes of it with [a] b = 1
    ("", "[a]\nb = 1\n"),
    ("[c]\nb = 2\n", "[c]\nb = 2\n\n[a]\nb = 1\n"),
    ("[a]\nb = 2 # why\n", "[a]\nb = 1  # why\n"),
    ('[a]\nb = "x # y"   # why\n[c]\n', "[a]\nb = 1         # why\n[c]\n"),
    ("[a]\nb=2\nbb = 3\n", "[a]\nb=1\nbb = 3\n"),
    ("[a]  # all\nc = 3\n[c]\nb = 5\n", "[a]  # all\nb = 1\nc = 3\n[c]\nb = 5\n"),
    ("[a]\n#b = 2\n", "[a]\nb = 1\n#b = 2\n"),
]


@pytest.mark.parametrize(("before", "after"), SETTINGS)
def test_with_setting(before, after):
    assert o.with_setting(before, "a", "b", "1") == after
    assert tomllib.loads(after)["a"]["b"] == 1


def test_a_value_has_backslashes_and_makes_the_comment_move():
    text = o.with_setting('[a]\nb = ""  # why\n', "a", "b", o.toml_string(r"C:\1 long"))
    assert text == '[a]\nb = "C:\\\\1 long"  # why\n'
