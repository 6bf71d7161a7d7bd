"""Credentials: where keys are kept, who may read them, which one counts, and that none is shown."""

import json
import logging
import os
import stat
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpista import (
    AgentConfig,
    ConfigError,
    CredentialError,
    Credentials,
    Key,
    Login,
    Secret,
    find_key,
    main_provider,
)


@pytest.fixture
def store(home):
    return Credentials(home / "credentials.toml")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# The file


def test_nothing_is_stored_at_first(store):
    assert store.logins() == {} and store.remove("openai") is False
    assert not store.path.exists()


def test_a_login_is_kept_privately(store):
    old = os.umask(0)
    try:
        store.save(Login("openai", "sk-one"))
    finally:
        os.umask(old)
    assert store.logins() == {"openai": Login("openai", "sk-one")}
    assert mode(store.path) == 0o600 and mode(store.path.parent) == 0o700
    assert os.listdir(store.path.parent) == ["credentials.toml"]


def test_the_last_login_is_the_last(store):
    for login in [Login("openai", "a"), Login("groq", "b"), Login("custom", "", "http://box/v1"), Login("openai", "c")]:
        store.save(login)
    assert list(store.logins().values()) == [
        Login("groq", "b"),
        Login("custom", "", "http://box/v1"),
        Login("openai", "c"),
    ]


def test_a_login_is_forgotten_and_the_rest_stays(store):
    store.save(Login("openai", "a"))
    store.save(Login("groq", "b"))
    assert store.remove("openai") is True and store.remove("openai") is False
    assert list(store.logins()) == ["groq"]


def test_the_file_says_what_it_is_and_is_toml(store):
    store.save(Login("openai", 'a"b\\c', "http://box/한글"))
    text = store.path.read_text()
    assert text.startswith("# Written by `openpista auth login`.")
    assert tomllib.loads(text) == {"openai": {"api_key": 'a"b\\c', "base_url": "http://box/한글"}}


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x2FF)))
def test_whatever_is_saved_is_read_again(tmp_path_factory, text):
    store = Credentials(tmp_path_factory.mktemp("any") / "credentials.toml")
    store.save(Login("custom", text, text))
    assert store.logins() == {"custom": Login("custom", text, text)}


CORRUPT = [
    "[openai",
    "openai = 'sk-one'",
    "[openai]\napi_key = 5",
    "[openai]\napi_kye = 'x'",
    "[openai]\napi_key = 'x'\n[openai.more]\na = 1",
    "\udcff",
]


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_file_is_an_error_and_is_not_overwritten(store, text, caplog):
    store.path.parent.mkdir()
    store.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    store.path.chmod(0o600)
    before = store.path.read_bytes()
    for act in (store.logins, lambda: store.remove("openai")):
        with pytest.raises(ConfigError) as caught:
            act()
        assert str(store.path) in str(caught.value) and "sk-one" not in str(caught.value)
    assert store.path.read_bytes() == before
    for number, aside in enumerate(("credentials.toml.damaged", "credentials.toml.damaged-2")):
        store.path.write_bytes(before)
        with caplog.at_level(logging.WARNING, "openpista"):
            store.save(Login("groq", "new"))
        assert store.path.with_name(aside).read_bytes() == before
        assert list(store.logins()) == ["groq"] and aside in caplog.records[number].getMessage()


def test_a_file_that_others_could_read_is_tightened_and_that_is_said(store, caplog):
    store.save(Login("openai", "sk-one"))
    store.path.chmod(0o644)
    with caplog.at_level(logging.WARNING, "openpista"):
        store.logins()
        store.logins()
    assert mode(store.path) == 0o600
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.path} could be read by others; its mode is now 0600"
    ]


def test_a_home_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    store = Credentials(tmp_path / "home" / "credentials.toml")
    with pytest.raises(ConfigError, match="cannot write .*credentials.toml: (Not a directory|File exists)"):
        store.save(Login("openai", "sk-one"))


def test_a_folder_in_place_of_the_file_is_one_clear_error_and_stays_as_it_is(store):
    store.path.mkdir(parents=True, mode=0o755)
    with pytest.raises(ConfigError, match="cannot read .*Is a directory"):
        store.logins()
    assert mode(store.path) == 0o755


# Which key counts


MAIN = AgentConfig(provider="openai", api_key=Secret("file-key"))
LOGINS = {name: Login(name, f"{name}-login") for name in ("openai", "groq", "gemini")}
FOUND = [
    # provider, environment, settings, logins, key, source
    ("openai", {"OPENPISTACRAB_API_KEY": "a", "OPENPISTA_API_KEY": "b", "OPENAI_API_KEY": "c"}, MAIN, LOGINS, "a", "$OPENPISTACRAB_API_KEY"),
    ("openai", {"OPENPISTA_API_KEY": "b", "OPENAI_API_KEY": "c"}, MAIN, LOGINS, "b", "$OPENPISTA_API_KEY"),
    ("openai", {"OPENAI_API_KEY": "c"}, MAIN, LOGINS, "c", "$OPENAI_API_KEY"),
    ("openai", {"OPENAI_API_KEY": " c\n"}, MAIN, LOGINS, "c", "$OPENAI_API_KEY"),
    ("openai", {"OPENAI_API_KEY": ""}, MAIN, LOGINS, "file-key", "[agent] api_key of the configuration file"),
    ("openai", {}, MAIN, LOGINS, "file-key", "[agent] api_key of the configuration file"),
    ("openai", {}, AgentConfig(provider="openai"), LOGINS, "openai-login", "`auth login`"),
    ("openai", {}, AgentConfig(provider="openai"), {}, "", ""),
    # another than the main one: neither the general variable nor [agent] api_key
    ("groq", {"OPENPISTACRAB_API_KEY": "a"}, MAIN, LOGINS, "groq-login", "`auth login`"),
    ("groq", {"OPENPISTACRAB_API_KEY": "a"}, MAIN, {}, "", ""),
    ("groq", {"GROQ_API_KEY": "g"}, MAIN, LOGINS, "g", "$GROQ_API_KEY"),
    # several names for one key, in order
    ("gemini", {"GOOGLE_API_KEY": "2", "GEMINI_API_KEY": "1"}, MAIN, LOGINS, "1", "$GEMINI_API_KEY"),
    ("gemini", {"GOOGLE_GENERATIVE_AI_API_KEY": "3", "GOOGLE_API_KEY": "2"}, MAIN, LOGINS, "2", "$GOOGLE_API_KEY"),
    ("custom", {}, MAIN, {"custom": Login("custom", "", "http://box")}, "", ""),
]  # fmt: skip


@pytest.mark.parametrize("provider, environ, agent, logins, value, source", FOUND, ids=range(len(FOUND)))
def test_which_key_counts(provider, environ, agent, logins, value, source):
    assert find_key(provider, agent, logins, environ) == Key(value, source)


MAINS = [
    # settings, logins, environment, provider
    (AgentConfig(provider="groq"), {}, {"OPENAI_API_KEY": "x"}, "groq"),
    (AgentConfig(), {}, {"OPENAI_API_KEY": "x", "ANTHROPIC_API_KEY": "y"}, "openai"),
    (AgentConfig(), LOGINS, {"ANTHROPIC_API_KEY": "y"}, "anthropic"),
    (AgentConfig(), LOGINS, {}, "gemini"),  # the last login
    (AgentConfig(base_url="http://box/v1"), {}, {}, "custom"),
    (AgentConfig(api_key=Secret("x")), {}, {}, "openai"),
    (AgentConfig(), {}, {"OPENPISTACRAB_API_KEY": "x"}, "openai"),
    (AgentConfig(), {}, {"OPENPISTA_API_KEY": "x"}, "openai"),
]


@pytest.mark.parametrize("agent, logins, environ, provider", MAINS, ids=range(len(MAINS)))
def test_which_provider_is_asked(agent, logins, environ, provider):
    assert main_provider(agent, logins, environ) == provider


def test_the_general_key_is_not_shown_to_a_vendor_that_has_its_own():
    environ = {"OPENPISTACRAB_API_KEY": "openai-key", "GROQ_API_KEY": "groq-key"}
    agent = AgentConfig(provider=main_provider(AgentConfig(), {}, environ))
    key = find_key(agent.provider, agent, {}, environ)
    assert (agent.provider, key.value) in (("openai", "openai-key"), ("groq", "groq-key"))


def test_no_key_at_all_names_the_three_ways_on():
    with pytest.raises(CredentialError) as caught:
        main_provider(AgentConfig(), {}, {})
    said = str(caught.value)
    assert all(way in said for way in ("OPENAI_API_KEY", "`openpista auth login`", "`--provider offline`"))
    assert caught.value.exit_code == 3


# What is shown of a key


MASKED = [("sk-1234567890abcd", "…abcd"), ("123456789012", "…9012"), ("12345678901", "…"), ("", "…")]


@pytest.mark.parametrize("value, shown", MASKED)
def test_masked(value, shown):
    assert Key(value).masked == shown


def test_a_key_shows_itself_in_no_repr():
    assert repr(Key("sk-secret", "$OPENAI_API_KEY")) == "Key(from $OPENAI_API_KEY)"
    assert repr(Key()) == "Key(from nowhere)"
    assert "sk-secret" not in repr([Login("openai", "sk-secret")])


# The commands


def test_a_key_from_standard_input_is_stored_and_shown_masked(openpista, home):
    done = openpista(
        "auth", "login", "--non-interactive", "--provider", "openai", "--api-key", "-", input="sk-1234567890abcd\n"
    )
    assert done.returncode == 0 and "…abcd" in done.stdout and "567890" not in done.stdout + done.stderr
    assert mode(home / "credentials.toml") == 0o600
    rows = json.loads(openpista("auth", "status", "--json").stdout)
    assert [(row["provider"], row["key"], row["source"]) for row in rows if row["source"]] == [
        ("openai", "…abcd", "`auth login`")
    ]


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-é-123456", "sk one", "a\x7fb"])
def test_a_key_that_cannot_be_one_is_refused(openpista, home, key):
    done = openpista("auth", "login", "--non-interactive", "--provider", "openai", "--api-key", key)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (home / "credentials.toml").exists()


def test_a_login_with_an_odd_name_survives_the_next_login(tmp_path):
    path = tmp_path / "credentials.toml"
    path.write_text('["my own"]\napi_key = "one-key"\n')
    path.chmod(0o600)
    Credentials(path).save(Login("openai", "two-key"))
    assert [login.api_key for login in Credentials(path).logins().values()] == ["one-key", "two-key"]
