"""The doctor: in broken set-ups it finds the fault and says the mend; in whole ones it finds none."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import time
from email.utils import formatdate

import pytest
from test_daemon import OFFLINE, house, until  # noqa: F401 - a fixture

import openpista as o


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


MODELS = {"path": "/models", "models": ["gpt-4o", "gpt-5"], "default": True}


class Doctor:
    """doctor --json in a home, with the fake server as OpenAI."""

    def __init__(self, openpista, home, env):
        self.run, self.home, self.env = openpista, home, env
        self.config("")

    def config(self, text, port=None):
        self.home.mkdir(mode=0o700, exist_ok=True)
        (self.home / "config.toml").write_text(f'[gateway]\nport = {port or free_port()}\nhost = "127.0.0.1"\n{text}')

    def __call__(self, *words, code=None, **env):
        done = self.run("doctor", "--json", *words, env=self.env | env)
        assert code is None or done.returncode == code, done
        self.stderr = done.stderr
        return json.loads(done.stdout)

    def ills(self, *words, **more):
        """What is not ok: {check: (level, what, mend)}"""
        rows = self(*words, **more)
        return {row["check"]: (row["level"], row["what"], row["mend"]) for row in rows if row["level"] != "ok"}


@pytest.fixture
def doctor(openpista, home, openai, model):
    model.script(MODELS)
    return Doctor(openpista, home, openai)


def only(ills, name, level="problem"):
    """The one thing that is wrong."""
    assert list(ills) == [name] and ills[name][0] == level, ills
    return ills[name][1:]


def test_all_is_well(doctor):
    rows = doctor(code=0)
    assert {row["level"] for row in rows} == {"ok"} and doctor.stderr == ""
    assert list(dict.fromkeys(row["check"] for row in rows)) == [
        check.__name__.removeprefix("check_") for check in o.CHECKS
    ]
    said = {row["check"]: row["what"] for row in rows}
    assert said["provider"] == "openai/gpt-4o, with the key …3456 from $OPENAI_API_KEY"
    assert not (doctor.home / "memory.db").exists() and not (doctor.home / "gateway.pem").exists(), "it changes nothing"


def test_lines_for_a_person(doctor, openpista):
    done = openpista("doctor", env=doctor.env | {"OPENAI_API_KEY": ""})
    assert done.returncode == 1
    assert re.search(
        r"^problem  provider       no key for any model\n {24}set a provider's variable", done.stdout, re.M
    )
    assert done.stdout.endswith("1 problem, 0 warnings\n") and "\x1b" not in done.stdout


def test_a_wrong_key(doctor, model):
    model.script({"path": "/models", "status": 401, "default": True})
    what, mend = only(doctor.ills(code=1), "provider")
    assert "openai refused the key …3456 from $OPENAI_API_KEY (401" in what and "correct $OPENAI_API_KEY" in mend
    assert "test-key-123456" not in str(doctor())


def test_a_model_that_does_not_exist(doctor):
    doctor.config('[agent]\nmodel = "gpt-4oo"\n')
    what, mend = only(doctor.ills(code=1), "provider")
    assert what == "openai/gpt-4oo: no such model, did you mean 'gpt-4o'?" and "models list" in mend


def test_nobody_answers(doctor):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        what, mend = only(doctor.ills(code=1, OPENAI_BASE_URL=url), "provider")
    assert "connection refused" in what and "the lines about the network" in mend


def test_a_stand_in_with_a_wrong_key(doctor, model):
    doctor.config('[agent]\nprovider = "offline"\nfallback = ["openai"]\n')
    model.script({"path": "/models", "status": 401, "default": True})
    assert "refused the key" in only(doctor.ills(code=1), "provider")[0]


@pytest.mark.parametrize(("off", "level", "words"), [(-600, "problem", "ahead of"), (100, "warning", "behind")])
def test_a_clock_that_is_off(doctor, model, off, level, words):
    date = formatdate(time.time() + off, usegmt=True)
    model.script(MODELS | {"headers": {"Date": date}})
    ill = doctor.ills()["clock"]
    assert ill[0] == level and words in ill[1] and "timedatectl" in ill[2]
    seconds = int(re.search(r"(\d+) seconds", ill[1])[1])
    assert abs(seconds - abs(off)) < 20


def test_a_damaged_database(doctor, home):
    with o.Store(home / "memory.db") as store:
        for number in range(50):
            store.append(store.session("main"), o.Message(o.Role.USER, f"{number}" * 900))
    path = home / "memory.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:20_480] + os.urandom(8_192) + whole[28_672:])
    what, mend = only(doctor.ills(code=1), "database")
    assert str(path) in what and "damaged" in what and "openpista restore" in mend
    path.write_bytes(b"not a database at all" * 500)
    what, mend = only({name: ill for name, ill in doctor.ills(code=1).items() if name != "jobs"}, "database")
    assert "no database" in what and "openpista restore" in mend


@pytest.mark.parametrize(
    ("pragma", "said"), [("user_version = 999", "newer openpista"), ("application_id = 7", "another program's")]
)
def test_a_database_that_is_not_ours(doctor, home, pragma, said):
    o.Store(home / "memory.db").close()
    with contextlib.closing(sqlite3.connect(home / "memory.db")) as db:
        db.execute(f"PRAGMA {pragma}")
    assert said in only(doctor.ills(code=1), "database")[0]


def test_an_older_database_is_not_brought_to_date(doctor, home):
    with contextlib.closing(sqlite3.connect(home / "memory.db")) as db:
        for statement in o.statements(o.migration_steps(o.read_asset("migrations.sql"))[0]):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {o.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
    (home / "memory.db").chmod(0o600)
    doctor(code=0)
    with contextlib.closing(sqlite3.connect(home / "memory.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_home_that_is_open_to_others(doctor, home):
    o.Store(home / "memory.db").close()
    home.chmod(0o755)
    (home / "history").write_text("secret\n")
    what, mend = only(doctor.ills(code=1), "home")
    assert "home, history" in what and f"chmod go-rwx {home}" in mend
    assert home.stat().st_mode & 0o777 == 0o755
    assert only(doctor.ills("--fix", code=0), "home", "fixed")
    assert home.stat().st_mode & 0o777 == 0o700 and (home / "history").stat().st_mode & 0o777 == 0o600
    assert doctor.ills(code=0) == {}


def test_a_key_in_a_file_that_others_can_read(doctor, home):
    doctor.config('[agent]\napi_key = "sk-not-a-real-key-123456"\n')
    (home / "config.toml").chmod(0o644)
    what, _ = only(doctor.ills(code=1), "configuration")
    assert "holds a key" in what and "sk-not" not in what
    doctor("--fix", code=0)
    assert doctor.ills(code=0) == {}


def test_a_broken_configuration(doctor, home):
    (home / "config.toml").write_text("[agent]\nmodle = 1\n")
    ills = doctor.ills(code=1)
    assert "unknown setting 'agent.modle', did you mean 'model'?" in ills["configuration"][1]
    assert str(home / "config.toml") in ills["configuration"][1] and doctor.stderr == ""


def test_a_port_that_another_program_has(doctor):
    port = free_port()
    doctor.config("", port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))
        what, mend = only(doctor.ills(code=1), "gateway")
    assert what == f"UDP port {port} of 127.0.0.1 is in use" and "another [gateway] port" in mend


def test_the_gateway_of_a_daemon(house, openpista):  # noqa: F811
    port = free_port()
    house.configure(OFFLINE.replace("port = 0", f'port = {port}\nhost = "127.0.0.1"'))
    daemon = house.start()
    done = openpista("doctor")
    assert done.returncode == 0 and re.search(
        rf"ok +gateway +answers within \d+ ms: 127.0.0.1:{port}, sha256", done.stdout
    )
    other = house.home / "other.pem"
    other.write_text(o.new_certificate())
    text = OFFLINE.replace("port = 0", f'port = {port}\nhost = "127.0.0.1"\ntls_cert = "{other}"')
    (house.home / "other.toml").write_text(text)
    done = openpista("doctor", "--config", str(house.home / "other.toml"))
    assert done.returncode == 1 and "the gateway shows another certificate than its file" in done.stdout
    house.end(daemon)


def unit(openpista, path, kind="--user"):
    path.parent.mkdir(parents=True)
    path.write_text(openpista("service", "print", kind).stdout)


def test_units(doctor, openpista, tmp_path):
    path = tmp_path / ".config/systemd/user/openpista.service"
    unit(openpista, path)
    text = path.read_text()
    assert doctor.ills(code=0) == {}
    path.write_text(text.replace("NoNewPrivileges=yes\n", ""))
    assert doctor.ills() == {}, "what its owner changed is no fault"
    path.write_text(re.sub("# template .*\n", "", text))
    what, mend = only(doctor.ills(code=0), "service", "warning")
    assert f"{path} is of an older openpista" in what and "openpista service print --user >" in mend
    path.write_text(text.replace(f'"{o.__file__}"', '"/nowhere/openpista.pyz"'))
    assert "/nowhere/openpista.pyz, which is not there" in only(doctor.ills(code=1), "service")[0]


def test_a_launchd_agent(doctor, openpista, tmp_path):
    path = tmp_path / "Library/LaunchAgents/openpista.plist"
    unit(openpista, path, "--launchd")
    assert doctor.ills(code=0) == {}
    path.write_text(path.read_text().replace(o.__file__, "/nowhere/openpista.pyz"))
    assert "/nowhere/openpista.pyz" in only(doctor.ills(code=1), "service")[0]


def test_jobs(doctor, home):
    with o.Store(home / "memory.db") as store:
        job = o.Job(0, "disks", "@daily", "Mars/Olympus", "look", "s", "", {}, "once", "command", "active", None)
        o.Jobs(store).add(job)
    what, mend = only(doctor.ills(code=1), "jobs")
    assert "the job disks" in what and "Mars/Olympus" in what and "cron remove disks" in mend
    doctor.config('[[cron]]\nschedule = "61 * * * *"\nprompt = "hi"\n')
    assert any("[[cron]] config-1" in row["what"] for row in doctor())


AGENTS = [  # settings -> level, what, of which check
    ("[agents.a]\nprompt_file = 'gone.md'", "problem", "agents", "cannot read the prompt_file"),
    ("[tools]\nworkdir = '/nowhere'", "problem", "agents", "no folder /nowhere"),
    ("[agents.a]\nprovider = 'xai'", "warning", "agents", "agent a cannot answer: no key for xai"),
    ("[[routes]]\nagent = 'default'\nchannel = 'telegarm'", "warning", "agents", "did you mean 'telegram'?"),
    ("[agents.a]\nmodel = 'gpt-55'", "problem", "provider", "openai/gpt-55: no such model, did you mean 'gpt-5'?"),
]


@pytest.mark.parametrize(("text", "level", "check", "words"), AGENTS)
def test_agents(doctor, text, level, check, words):
    doctor.config(text)
    what, mend = only(doctor.ills(code=int(level == "problem")), check, level)
    assert words in what and mend


def test_what_all_agents_lack_is_said_once(doctor):
    doctor.config("".join(f"[agents.a{i}]\nmodel = 'gpt-5'\n" for i in range(3)) + "[agent]\nfallback = ['xai/grok-4']")
    assert doctor.ills(code=0) == {} and doctor.stderr.count("fallback xai/grok-4 is left out") == 1


def test_stored_keys_that_cannot_be_read(doctor, home):
    (home / "credentials.toml").write_text("x=[")
    (home / "credentials.toml").chmod(0o600)
    what, mend = only({name: ill for name, ill in doctor.ills(code=1).items() if name != "agents"}, "provider")
    assert "is not valid TOML" in what and mend


def test_a_home_that_is_no_folder(openpista, tmp_path):
    (tmp_path / "taken").write_text("")
    done = openpista("doctor", env={"OPENPISTA_HOME": str(tmp_path / "taken")})
    assert done.returncode == 1 and re.search(r"problem +home +\S+/taken is no folder", done.stdout)


def test_skills(doctor, home):
    folder = home / "workspace/skills/bad"
    folder.mkdir(parents=True)
    (folder / "SKILL.md").write_text("no front matter\n")
    what, mend = only(doctor.ills(code=0), "skills", "warning")
    assert "bad/SKILL.md" in what and "skills validate" in mend


def test_a_proxy_that_is_dead(doctor):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://me:secret@127.0.0.1:{free.getsockname()[1]}"
        ills = doctor.ills(code=1, ALL_PROXY=url, NO_PROXY="127.0.0.1")
    what, mend = only(ills, "proxy")
    assert "refused" in what and "secret" not in what and "ALL_PROXY" in mend


def test_a_name_that_means_nothing(doctor):
    ills = doctor.ills(code=1, OPENAI_BASE_URL="http://nobody.invalid/v1")
    assert ills["dns"][0] == "problem" and "nobody.invalid" in ills["dns"][1] and "provider" in ills


def test_ipv6():
    cases = [
        (("silent for 3 s", ""), "warning"),
        (("", ""), "ok"),
        (("Network is unreachable", ""), "ok"),
        (("silent for 3 s", "silent for 3 s"), "ok"),  # the provider's line says so
    ]
    assert [o.ipv6_finding("host", *answers).level for answers, _ in cases] == [level for _, level in cases]


def telegram(bot, **settings):
    """The lines of a configuration with this bot."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in ({"base_url": bot.url} | settings).items()]
    return f'[channels.telegram]\nenabled = true\ntoken = "{bot.token}"\n{"".join(lines)}'


@pytest.fixture
def look(bot, home):
    """What the check of Telegram finds: [(level, what, mend)]"""
    home.mkdir(mode=0o700)

    def look(poll=0, other=None, **settings):
        settings = {"token": bot.token, "base_url": bot.url} | settings
        channels = o.ChannelsConfig(telegram=o.TelegramConfig(True, **settings))
        ctx = o.Context(None, o.Config()._replace(channels=channels), home, {}, o.Redactor())

        async def ask():
            task = o.asyncio.create_task(other()) if other else None
            if other:
                await o.asyncio.to_thread(bot.wait_state, lambda state: state["polling"])
            check = o.functools.partial(o.check_telegram, poll=poll)
            check.__name__ = "check_telegram"
            found = await o.findings_of(check, ctx, ())
            if task:
                task.cancel()
            return [finding[:3] for _, finding in found]

        return o.asyncio.run(ask())

    return look


def test_the_bot(look, bot, home):
    bot.say(42, "hi")  # what waits ends a poll at once
    [bad, good] = look()
    assert bad[:2] == ("warning", "nobody may speak to the bot") and "pair approve" in bad[2]
    assert good[:2] == ("ok", "the bot is @openpista_test_bot")
    assert [finding[0] for finding in look(allowed_users=(42,))] == ["ok"]
    [bad, good] = look(allowed_users=("*",))
    assert bad[0] == "warning" and "everybody" in bad[1] and bad[2]
    with o.Store(home / "memory.db") as store:
        o.People(store, "telegram").decide("42", "allowed", "Ada")
    assert [finding[0] for finding in look()] == ["ok"]
    assert bot.state()["pending"] == 1, "it is still there for openpista"


def test_what_telegram_refuses(look, bot):
    [found] = look(allowed_users=(42,), token="123456:" + "x" * 30)
    assert found[0] == "problem" and "refuses getMe" in found[1] and "telegram setup" in found[2]
    assert "xxx" not in str(found)
    [found] = look(allowed_users=(42,), token="something else")
    assert found[0] == "problem" and "does not look like one" in found[1]
    [found] = look(allowed_users=(42,), base_url="http://127.0.0.1:9")
    assert found[0] == "problem" and "cannot reach http://127.0.0.1:9" in found[1] and "network" in found[2]
    bot.fault("getMe", "drop")
    [found] = look(allowed_users=(42,))
    assert found[0] == "problem" and "broke" in found[1]


def test_a_webhook(doctor, bot):
    bot.webhook("https://example.com/secret")
    doctor.config(telegram(bot, allowed_users=[42]))
    (doctor.home / "config.toml").chmod(0o600)
    what, mend = only(doctor.ills(code=1), "telegram")
    assert what == "a webhook takes the bot's messages: example.com" and "telegram setup" in mend
    assert not bot.calls("getUpdates")


def test_another_program_polls(look, bot):
    """Telegram ends the older of two polls, so that the first one to notice is the other."""

    async def other():
        async with o.Bot(bot.token, bot.url) as theirs:
            while True:
                with contextlib.suppress(o.BotError):
                    await theirs.call("getUpdates", timeout=20)

    [good, bad] = look(poll=5, other=other, allowed_users=(42,))
    assert good[0] == "ok" and bad[0] == "problem"
    assert "Conflict" in bad[1] and "another program polls this bot" in bad[2]


def test_a_daemon_that_polls(house, openpista, bot):  # noqa: F811
    port = free_port()
    text = OFFLINE.replace("port = 0", f'port = {port}\nhost = "127.0.0.1"')
    house.configure(text + telegram(bot, allowed_users=[42]))
    (house.home / "config.toml").chmod(0o600)
    bot.fault("getUpdates", "status:500", -1)
    daemon = house.start()
    done = until(lambda: (found := openpista("doctor")).returncode and found)
    assert re.search(r"^problem +telegram +Telegram: Internal Server Error", done.stdout, re.M)
    assert {call["parameters"]["timeout"] for call in bot.calls("getUpdates")} == {"50"}, "ours would end its poll"
    house.end(daemon)


def test_telegram_without_a_token(doctor):
    doctor.config("[channels.telegram]\nenabled = true\n")
    what, mend = only(doctor.ills(code=1), "telegram")
    assert "no token" in what and "`openpista telegram setup`" in mend


def test_the_bots_token_is_the_owners(doctor, home, bot):
    (home / "telegram.token").write_text(bot.token)
    (home / "telegram.token").chmod(0o644)
    assert doctor.ills(code=0) == {}, "nobody else can enter the folder"
    home.chmod(0o755)
    assert "telegram.token" in only(doctor.ills(code=1), "home")[0]
    doctor("--fix", code=0)
    assert (home / "telegram.token").stat().st_mode & 0o777 == 0o600


def test_start_says_what_matters(house):  # noqa: F811
    (house.home / "config.toml").chmod(0o644)
    house.configure(OFFLINE.replace("[agent]", '[agent]\napi_key = "sk-not-a-real-key-123456"'))
    _, _, err = house.end(house.start())
    assert "config.toml holds a key, and others can read it; chmod 600" in err


def test_errors_are_findings(doctor, home):
    (home / "credentials.toml").write_text("broken =\n")
    (home / "credentials.toml").chmod(0o600)
    assert "credentials.toml is not valid TOML" in doctor.ills(code=1)["provider"][1]


def test_on_a_terminal_it_has_colours(terminal, home):
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(f"{OFFLINE}")
    screen = terminal("doctor")
    screen.wait("0 problems, 0 warnings")
    assert screen.look("ok ").fg == "green"
    assert screen.end() == 0
