"""Config: every setting and its default, what is refused and in which words, and what the environment changes."""

import os
import subprocess
import typing
from pathlib import Path

import pytest
from launcher import Process

import openpista
from openpista import CHOICES, ENVIRONMENT, RANGES, Config, ConfigError, Secret, build, load_config

DEFAULTS = [
    ("gateway.port", 4433),
    ("gateway.host", "auto"),
    ("gateway.tls_cert", ""),
    ("gateway.tls_key", ""),
    ("gateway.grace", 20),
    ("agent.provider", ""),
    ("agent.model", ""),
    ("agent.api_key", ""),
    ("agent.base_url", ""),
    ("agent.format", ""),
    ("agent.fallback", ()),
    ("agent.escalate", ()),
    ("agent.tools", ("*",)),
    ("agent.max_tool_rounds", 10),
    ("agent.max_tokens", 0),
    ("agent.context_tokens", 0),
    ("agent.daily_tokens", 0),
    ("agent.daily_calls", 0),
    ("agent.ask_tokens", 0),
    ("agent.timeout", 300.0),
    ("agent.idle_timeout", 60.0),
    ("agent.prompt", ""),
    ("tools.approval", "risky"),
    ("tools.timeout", 30),
    ("tools.max_timeout", 300),
    ("tools.output_limit", 10_000),
    ("tools.keep_outputs_days", 30),
    ("tools.workdir", ""),
    ("tools.keep_env", ()),
    ("tools.reviewer", ""),
    ("channels.telegram.enabled", False),
    ("channels.telegram.token", ""),
    ("channels.telegram.allowed_users", ()),
    ("channels.telegram.allowed_groups", ()),
    ("channels.telegram.base_url", "https://api.telegram.org"),
    ("channels.cli.enabled", True),
    ("database.url", ""),
    ("database.keep_sessions_days", 0),
    ("database.keep_runs_days", 0),
    ("skills.workspace", ""),
    ("cron", ()),
    ("agents", {}),
    ("routes", ()),
]


def put(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def load(tmp_path, text, environ=()):
    return load_config(put(tmp_path, text), dict(environ))


def settings_of(config, where=""):
    """Every setting as ('agent.model', value)."""
    for name, value in config._asdict().items():
        if hasattr(value, "_fields"):
            yield from settings_of(value, f"{where}{name}.")
        else:
            yield where + name, value


def test_every_default():
    assert list(settings_of(load_config(None, {}))) == DEFAULTS


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(tmp_path, "") == Config()


WHOLE = """
[gateway]
port = 0
host = "127.0.0.1"
tls_cert = "/c"
tls_key = "/k"
grace = 5
[agent]
provider = "custom"
model = "m"
api_key = "abcdefghijkl"
base_url = "http://box/v1"
format = "messages"
fallback = ["openai/gpt-4o", "groq"]
escalate = ["openai/gpt-5"]
tools = ["system.*"]
daily_tokens = 1000
daily_calls = 10
ask_tokens = 100
max_tool_rounds = 3
max_tokens = 500
context_tokens = 9000
timeout = 60
idle_timeout = 2.5
prompt = "Be brief."
[tools]
approval = "never"
timeout = 10
max_timeout = 20
output_limit = 500
keep_outputs_days = 7
workdir = "/srv"
keep_env = ["CI_TOKEN"]
reviewer = "guard"
[channels.telegram]
enabled = true
token = "123456:abc"
allowed_users = [17, "*"]
allowed_groups = [-100]
base_url = "http://telegram"
[channels.cli]
enabled = false
[database]
url = "/srv/memory.db"
keep_sessions_days = 90
keep_runs_days = 9
[skills]
workspace = "/srv/skills"
[[cron]]
name = "morning"
schedule = "0 9 * * *"
prompt = "Say hello."
tz = "Asia/Seoul"
channel = "telegram:17"
[[cron]]
name = "second"
[agents.guard]
provider = "groq"
[[routes]]
agent = "guard"
"""


def test_every_setting_can_be_set(tmp_path):
    config = load(tmp_path, WHOLE)
    same = [name for name, value in settings_of(config) if (name, value) in DEFAULTS]
    assert same == []
    assert config.agent.fallback == ("openai/gpt-4o", "groq") and config.agent.timeout == 60.0
    assert isinstance(config.agent.timeout, float)
    assert config.channels.telegram.allowed_users == (17, "*")
    assert [job.name for job in config.cron] == ["morning", "second"] and config.cron[0].tz == "Asia/Seoul"


WRONG = [
    # unknown keys, with the nearest one
    ("[agent]\nmodle = 'x'", "unknown setting 'agent.modle', did you mean 'model'?"),
    ("[agnet]\nmodel = 'x'", "unknown setting 'agnet', did you mean 'agent'?"),
    ("[agent]\nxyzzy = 1", "unknown setting 'agent.xyzzy'"),
    ("[channels.telegarm]\nenabled = true", "unknown setting 'channels.telegarm', did you mean 'telegram'?"),
    ("[channels.telegram]\nallowed_user = []", "unknown setting 'channels.telegram.allowed_user', did you mean 'allowed_users'?"),
    ("[[cron]]\nschedul = ''", "unknown setting 'cron[0].schedul', did you mean 'schedule'?"),
    # wrong types
    ("[gateway]\nport = '80'", "gateway.port must be a whole number, not '80'"),
    ("[gateway]\nport = 80.5", "gateway.port must be a whole number, not 80.5"),
    ("[gateway]\nport = true", "gateway.port must be a whole number, not True"),
    ("[agent]\nmodel = 4", "agent.model must be a string, not 4"),
    ("[agent]\ntimeout = 'long'", "agent.timeout must be a number, not 'long'"),
    ("[agent]\ntimeout = false", "agent.timeout must be a number, not False"),
    ("[agent]\nfallback = 'openai'", "agent.fallback must be a list, not 'openai'"),
    ("[agent]\nfallback = ['a', 2]", "agent.fallback[1] must be a string, not 2"),
    ("[channels.cli]\nenabled = 1", "channels.cli.enabled must be true or false, not 1"),
    ("[channels.telegram]\nallowed_users = [1.5]", "channels.telegram.allowed_users[0] must be a whole number or a string, not 1.5"),
    ("[channels.telegram]\nallowed_groups = ['x']", "channels.telegram.allowed_groups[0] must be a whole number, not 'x'"),
    ("[tools]\nworkdir = 2026-01-01", "tools.workdir must be a string, not datetime.date(2026, 1, 1)"),
    ("agent = 5", "agent must be a table, not 5"),
    ("[[agent]]\nmodel = 'x'", "agent must be a table, not [{'model': 'x'}]"),
    ("[cron]\nname = 'x'", "cron must be a list, not {'name': 'x'}"),
    ("cron = ['x']", "cron[0] must be a table, not 'x'"),
    # out of range, not among the words
    ("[gateway]\nport = 65536", "gateway.port must be between 0 and 65535, not 65536"),
    ("[gateway]\nport = -1", "gateway.port must be between 0 and 65535, not -1"),
    ("[agent]\ntimeout = 0", "agent.timeout must be between 1 and 86400, not 0.0"),
    ("[agent]\ntimeout = nan", "agent.timeout must be between 1 and 86400, not nan"),
    ("[agent]\nidle_timeout = inf", "agent.idle_timeout must be between 1 and 86400, not inf"),
    ("[agent]\ntimeout = 1" + "0" * 400, "agent.timeout must be"),
    ("[tools]\noutput_limit = 10", "tools.output_limit must be between 200 and 1000000, not 10"),
    ("[tools]\napproval = 'allways'", "tools.approval must be one of 'risky', 'always', 'never', not 'allways', did you mean 'always'?"),
    ("[agent]\nformat = 'grpc'", "agent.format must be one of '', 'chat', 'responses', 'messages', not 'grpc'"),
]  # fmt: skip


@pytest.mark.parametrize("text, words", WRONG, ids=[text.replace("\n", " ")[:40] for text, _ in WRONG])
def test_what_is_wrong_is_said_with_its_file(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'config.toml'}: {words}") and "\n" not in said
    assert caught.value.exit_code == 2


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path):
    for text in ("[agent]\napi_key = 123456789", "[channels.telegram]\ntoken = ['123456789']"):
        with pytest.raises(ConfigError, match=r"must be a string, not '…'") as caught:
            load(tmp_path, text)
        assert "123456789" not in str(caught.value)


def test_a_control_character_in_a_key_does_not_reach_the_terminal(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, '[agent]\n"a\\u001b[2J\\nb" = 1')
    assert str(caught.value).isprintable()


def field_type(where):
    kind = Config
    for name in where.split("."):
        kind = typing.get_type_hints(kind)[name]
    return kind


def test_every_range_and_choice_is_about_a_setting_and_holds_its_default():
    known = dict(DEFAULTS)
    assert set(RANGES) | set(CHOICES) <= set(known)
    assert all(low <= known[where] <= high for where, (low, high) in RANGES.items())
    assert all(known[where] in words for where, words in CHOICES.items())


def test_every_number_has_a_range():
    assert [where for where, _ in DEFAULTS if field_type(where) in (int, float) and where not in RANGES] == []


@pytest.mark.parametrize("where", RANGES)
def test_the_ends_of_every_range(where):
    section, key = where.split(".")
    low, high = RANGES[where]
    for value in (low, high):
        assert getattr(getattr(build(Config, {section: {key: value}}), section), key) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match="must be between"):
            build(Config, {section: {key: value}})


@pytest.mark.parametrize("where", CHOICES)
def test_every_choice(where):
    section, key = where.split(".")
    for word in CHOICES[where]:
        assert getattr(getattr(build(Config, {section: {key: word}}), section), key) == word


# The environment


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_wins_over_the_file(tmp_path, name):
    section, key = ENVIRONMENT[name]
    text = f"[{section}]\n{key} = 'file'"
    steps = [
        ({}, "file"),
        ({f"OPENPISTA_{name}": "second"}, "second"),
        ({f"OPENPISTA_{name}": "second", f"OPENPISTACRAB_{name}": "first"}, "first"),
        ({f"OPENPISTA_{name}": "second", f"OPENPISTACRAB_{name}": ""}, "second"),
        ({f"OPENPISTACRAB_{name}": ""}, "file"),
    ]
    for environ, expected in steps:
        assert getattr(getattr(load(tmp_path, text, environ), section), key) == expected


def test_telegrams_token_from_the_environment(tmp_path):
    text = "[channels.telegram]\nenabled = true\ntoken = 'file'"
    telegram = load(tmp_path, text, {"TELEGRAM_BOT_TOKEN": "from-outside"}).channels.telegram
    assert telegram.token == "from-outside" and telegram.enabled and isinstance(telegram.token, Secret)


def test_variable_says_where_it_was_found():
    assert openpista.variable("X", {"OPENPISTA_X": "b"}) == ("b", "OPENPISTA_X")
    assert openpista.variable("X", {}) == ("", "")


def test_secrets_are_in_no_repr(tmp_path):
    config = load(tmp_path, WHOLE)
    for text in (repr(config), str(config), f"{config.agent}", repr([config.agent.api_key])):
        assert "abcdefghijkl" not in text and "123456:abc" not in text
    assert config.secrets() == ["abcdefghijkl", "123456:abc"]
    assert repr(Secret()) == "Secret('')" and str(Secret("shown")) == "shown"


# Which file


def files_for(tmp_path):
    """(a folder to stand in, the home); four files, the first named counts."""
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home):
        folder.mkdir()
    paths = [tmp_path / "chosen.toml", tmp_path / "named.toml", here / "config.toml", home / "config.toml"]
    for path in paths:
        path.write_text("")
    return here, home, paths


def test_the_order_in_which_files_are_looked_for(tmp_path, monkeypatch):
    here, home, (chosen, named, local, own) = files_for(tmp_path)
    monkeypatch.chdir(here)
    environ = {"OPENPISTA_HOME": str(home), "OPENPISTA_CONFIG": str(named)}
    assert openpista.find_config(str(chosen), environ) == chosen
    assert openpista.find_config(None, environ) == named
    assert openpista.find_config(None, environ | {"OPENPISTA_CONFIG": ""}) == Path.cwd() / "config.toml"
    local.unlink()
    assert openpista.find_config(None, {"OPENPISTA_HOME": str(home)}) == own
    own.unlink()
    assert openpista.find_config(None, {"OPENPISTA_HOME": str(home)}) is None


def test_a_file_that_was_named_must_be_there(tmp_path):
    gone = str(tmp_path / "gone.toml")
    for chosen, environ in [(gone, {}), (None, {"OPENPISTA_CONFIG": gone}), (str(tmp_path), {})]:
        with pytest.raises(ConfigError, match="no configuration file"):
            openpista.find_config(chosen, environ)


def test_a_folder_called_config_toml_is_no_configuration(tmp_path, monkeypatch):
    (tmp_path / "config.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    assert openpista.find_config(None, {"OPENPISTA_HOME": str(tmp_path / "home")}) is None


LOOK = """
import os, sys
from openpista import find_config
os.chdir(sys.argv[1])
if os.getuid() == 0:  # for root no mode counts
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
else:
    os.chmod(".", 0)
print(find_config(None, {"OPENPISTA_HOME": sys.argv[1]}))
sys.exit()
"""


def test_a_folder_that_one_may_not_look_into(tmp_path):
    """As with `sudo -u`, in the home of somebody else."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    (folder / "config.toml").touch()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = Process([str(folder)], os.environ, Path(openpista.__file__).parent, prepare=LOOK, **pipes)
    assert child.communicate(timeout=20) == ("None\n", "")
    folder.chmod(0o700)


COMMAND_LINES = [
    (b"[agent]\nmodle = 1", "unknown setting 'agent.modle', did you mean 'model'?"),
    (b"[agent\n", "is not valid TOML"),
    (b"[agent]\nmodel = '\xff'", "is not UTF-8"),
    (b"a = " + b"[" * 50_000, "is not valid TOML"),
]


@pytest.mark.parametrize("raw, words", COMMAND_LINES, ids=range(len(COMMAND_LINES)))
def test_the_command_line_says_it_in_one_line_and_exits_with_2(openpista, tmp_path, raw, words):
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    done = openpista("--config", str(path), "auth", "status")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr and str(path) in done.stderr


DISTRUSTED = [  # a setting of a file that nobody named -> what is said of it; '' if it may
    ('[agent]\nbase_url = "https://evil.example/v1"', "sends your key to another address (agent.base_url)"),
    ('[agent]\nbase_url = "http://127.0.0.1.evil.example/v1"', "agent.base_url"),
    ('[agent]\nbase_url = "http://127.0.0.1@evil.example/v1"', "agent.base_url"),
    ('[agent]\nbase_url = "http://[oops/v1"', "agent.base_url"),
    ('[agent]\nbase_url = "evil:80"', "agent.base_url"),
    ('[agent]\nbase_url = "http://localhost:8000/v1"', ""),
    ('[agent]\nbase_url = "127.0.0.1:8000"', ""),
    ('[agent]\nbase_url = "https://box/v1"\napi_key = "its-own"', "agent.base_url"),
    ('[agent]\nprovider = "groq"\nmodel = "m"', ""),
    ('[tools]\napproval = "never"', "lets commands run unasked (tools.approval)"),
    ('[tools]\napproval = "always"', ""),
    ('[tools]\nkeep_env = ["GITHUB_TOKEN"]', "tools.keep_env"),
    ('[skills]\nworkspace = "."', "skills.workspace"),
]


@pytest.mark.parametrize("text, words", DISTRUSTED)
def test_a_file_that_counts_only_for_its_place_must_not_loosen(tmp_path, text, words):
    path, environ = tmp_path / "config.toml", {"OPENPISTA_HOME": str(tmp_path / "home")}
    path.write_text(text)
    openpista.load_config(path, environ)  # it was named
    openpista.load_config(path, {"OPENPISTA_HOME": str(tmp_path)}, named=False)  # it is the home's
    if not words:
        openpista.load_config(path, environ, named=False)
        return
    with pytest.raises(ConfigError) as caught:
        openpista.load_config(path, environ, named=False)
    assert words in str(caught.value) and f"--config {path}" in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_counts_only_by_name(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    os.chown(path, 65534, 65534)
    openpista.load_config(path, {})
    with pytest.raises(ConfigError, match="belongs to another user; if you trust it, name it"):
        openpista.load_config(path, {}, named=False)


def test_the_command_line_distrusts_the_folders_own_file(openpista, tmp_path):
    (tmp_path / "config.toml").write_text('[tools]\napproval = "never"\n')
    done = openpista("auth", "status")
    assert done.returncode == 2 and "lets commands run unasked" in done.stderr and done.stderr.count("\n") == 1
    assert openpista("--config", "config.toml", "auth", "status").returncode == 0
    assert openpista("auth", "status", env={"OPENPISTA_CONFIG": "config.toml"}).returncode == 0
