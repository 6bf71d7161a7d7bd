"""Providers: who is asked and how; retries, mends, fallback; against a model server that is a process of its own."""

import asyncio
import datetime
import ipaddress
import json
import re
import shutil
import socket
import subprocess
import sys
from email.utils import format_datetime

import pytest
from fakes import IMAGE_STARTS

import openpista
from openpista import (
    FORMATS,
    MENDS,
    PROVIDERS,
    AgentConfig,
    ConfigError,
    ContextTooLong,
    CredentialError,
    Endpoint,
    HttpProvider,
    Image,
    Key,
    Login,
    Message,
    Models,
    OfflineProvider,
    PistaError,
    ProviderError,
    Request,
    Role,
    Secret,
    ToolCall,
    ToolSpec,
    Unavailable,
    Usage,
    resolve,
    transcribe,
)

KEY = "sk-1234567890abcdef"
TOOLS = (ToolSpec("system.run", "Run it.", {"type": "object", "properties": {"command": {"type": "string"}}}),)
ASK = Request("Be brief.", (Message(Role.USER, "Who am I?"),), TOOLS)
RUN = {"name": "system_run", "arguments": {"command": "whoami"}}
PATHS = {name: "/v1" + form.path for name, form in FORMATS.items()}
MODELS = {"chat": "m1", "responses": "m1", "messages": "claude-sonnet-4-5"}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """What a developer's machine sets must not decide here."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


class Trial:
    """A provider that sleeps in no time; what it waited and told is written down."""

    def __init__(self, url, format="chat", provider="openai", name="", key=KEY, source="$OPENAI_API_KEY", **limits):
        self.waits, self.told = [], []
        endpoint = Endpoint(provider, PROVIDERS[provider], url, name or MODELS[format], Key(key, source), format)
        self.provider = HttpProvider(endpoint, sleep=self.sleep, chance=lambda: 1.0, **limits)

    async def sleep(self, seconds):
        self.waits.append(seconds)

    async def _ask(self, requests):
        try:
            return [await self.provider.complete(request, self.told.append) for request in requests]
        finally:
            await self.provider.aclose()

    def ask(self, *requests):
        """The answers to these requests, one after another; to one request its answer alone."""
        answers = asyncio.run(self._ask(requests or (ASK,)))
        return answers if len(requests) > 1 else answers[0]

    def fails(self, kind, *requests):
        """The error that comes instead; always one line, never with the key."""
        with pytest.raises(kind) as caught:
            self.ask(*requests)
        assert type(caught.value) is kind, repr(caught.value)
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)
        return str(caught.value)


# The rows


VARIABLES = {row.key_env[0]: KEY for row in PROVIDERS.values() if row.key_env}
DEFAULTS = [
    # provider, address, model, format
    ("openai", "https://api.openai.com/v1", "gpt-4o", "chat"),
    ("anthropic", "https://api.anthropic.com/v1", "claude-sonnet-4-5", "messages"),
    ("opencode", "https://opencode.ai/zen/v1", "gpt-5-codex", "responses"),
    ("openrouter", "https://openrouter.ai/api/v1", "openai/gpt-4o", "chat"),
    ("together", "https://api.together.xyz/v1", "meta-llama/Llama-3.3-70B-Instruct-Turbo", "chat"),
    ("ollama", "http://localhost:11434/v1", "llama3.2", "chat"),
    ("groq", "https://api.groq.com/openai/v1", "llama-3.3-70b-versatile", "chat"),
    ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-flash", "chat"),
    ("deepseek", "https://api.deepseek.com/v1", "deepseek-chat", "chat"),
    ("mistral", "https://api.mistral.ai/v1", "mistral-large-latest", "chat"),
    ("xai", "https://api.x.ai/v1", "grok-4", "chat"),
    ("lmstudio", "http://localhost:1234/v1", "given", "chat"),
    ("custom", "http://box:8000/v1", "given", "chat"),
    ("offline", "", "shell", ""),
]


@pytest.mark.parametrize("provider, url, name, format", DEFAULTS)
def test_every_row_resolves(provider, url, name, format):
    agent = AgentConfig(base_url="http://box:8000/v1" if provider == "custom" else "", provider=provider)
    wanted = f"{provider}/given" if name == "given" else provider
    endpoint = resolve(wanted, agent, {}, VARIABLES)
    assert (endpoint.base_url, endpoint.model, endpoint.format) == (url, name, format)
    assert endpoint.name == f"{provider}/{name}" and endpoint.window >= 8_000
    assert bool(endpoint.key.value) is bool(PROVIDERS[provider].key_env)
    opened = openpista.open_provider(endpoint, timeout=1, idle_timeout=1)
    assert opened.name == endpoint.name and opened.window == endpoint.window


def test_every_row_is_in_the_table_and_speaks_a_format_that_there_is():
    assert [row[0] for row in DEFAULTS] == list(PROVIDERS)
    assert {row.format for row in PROVIDERS.values()} - {""} <= set(FORMATS)
    assert all(re.compile(row.id_pattern).fullmatch("abcDEF123") for row in PROVIDERS.values())


MAIN = AgentConfig(provider="openai", model="mine", base_url="http://box/v1", format="chat", api_key=Secret("filekey"))
RESOLVED = [
    # wanted, settings, logins, environment -> address, model, format
    ("openai", MAIN, {}, {}, "http://box/v1", "mine", "chat"),
    ("openai/o3", MAIN, {}, {}, "http://box/v1", "o3", "chat"),
    ("groq", MAIN, {}, {"GROQ_API_KEY": "g"}, "https://api.groq.com/openai/v1", "llama-3.3-70b-versatile", "chat"),
    ("openrouter/a/b:free", MAIN, {}, {"OPENROUTER_API_KEY": "r"}, "https://openrouter.ai/api/v1", "a/b:free", "chat"),
    ("openai", AgentConfig(provider="openai"), {"openai": Login("openai", "k", "http://login/v1")}, {}, "http://login/v1", "gpt-4o", "chat"),
    ("openai", AgentConfig(provider="openai"), {"openai": Login("openai", "k", "http://login/v1")}, {"OPENAI_BASE_URL": "http://env/v1"}, "http://env/v1", "gpt-4o", "chat"),
    ("openai", AgentConfig(provider="openai"), {}, {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://env:80/"}, "http://env:80/v1", "gpt-4o", "chat"),
    ("openai/gpt-5", AgentConfig(provider="openai"), {}, {"OPENAI_API_KEY": "k"}, "https://api.openai.com/v1", "gpt-5", "responses"),
    ("openai/gpt-5-chat-latest", AgentConfig(provider="openai"), {}, {"OPENAI_API_KEY": "k"}, "https://api.openai.com/v1", "gpt-5-chat-latest", "chat"),
    ("anthropic", AgentConfig(provider="anthropic"), {}, {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "https://gate.example"}, "https://gate.example/v1", "claude-sonnet-4-5", "messages"),
    ("opencode/claude-opus-4-5", AgentConfig(), {}, {"OPENCODE_API_KEY": "k"}, "https://opencode.ai/zen/v1", "claude-opus-4-5", "messages"),
    ("opencode/kimi-k2", AgentConfig(), {}, {"OPENCODE_API_KEY": "k"}, "https://opencode.ai/zen/v1", "kimi-k2", "chat"),
    ("opencode/qwen3.6-plus-free", AgentConfig(), {}, {"OPENCODE_API_KEY": "k"}, "https://opencode.ai/zen/v1", "qwen3.6-plus-free", "messages"),
    ("opencode/minimax-m3", AgentConfig(), {}, {"OPENCODE_API_KEY": "k"}, "https://opencode.ai/zen/v1", "minimax-m3", "chat"),
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "box:11434"}, "http://box:11434/v1", "llama3.2", "chat"),
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "http://box:1/"}, "http://box:1/v1", "llama3.2", "chat"),
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "https://box/ollama/v1"}, "https://box/ollama/v1", "llama3.2", "chat"),
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "box"}, "http://box:11434/v1", "llama3.2", "chat"),  # Ollama's own rule
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "0.0.0.0"}, "http://0.0.0.0:11434/v1", "llama3.2", "chat"),
    ("ollama", AgentConfig(), {}, {"OLLAMA_HOST": "[::1]:99"}, "http://[::1]:99/v1", "llama3.2", "chat"),
]  # fmt: skip


@pytest.mark.parametrize("wanted, agent, logins, environ, url, name, format", RESOLVED, ids=range(len(RESOLVED)))
def test_resolve(wanted, agent, logins, environ, url, name, format):
    endpoint = resolve(wanted, agent, logins, environ)
    assert (endpoint.base_url, endpoint.model, endpoint.format) == (url, name, format)


UNRESOLVED = [
    # wanted, settings, environment, error, words
    ("opanai", AgentConfig(), {}, ConfigError, "unknown provider 'opanai', did you mean 'openai'?; known: openai, anthropic"),
    ("lmstudio", AgentConfig(), {}, ConfigError, "lmstudio needs a model; --model NAME"),
    ("custom/m", AgentConfig(), {}, ConfigError, "custom needs an address; [agent] base_url"),
    ("groq", AgentConfig(), {}, CredentialError, "no key for groq; set GROQ_API_KEY, or run `openpista auth login --provider groq`"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "  "}, CredentialError, "no key for openai"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "sk-1\nsk-2"}, CredentialError, "the key from $OPENAI_API_KEY has characters that no key has"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "sk-é"}, CredentialError, "the key from $OPENAI_API_KEY has characters"),
    ("openai", AgentConfig(provider="openai", api_key=Secret("a\r\nx-evil: 1")), {}, CredentialError, "the key from [agent] api_key"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "ftp://box"}, ConfigError, "'ftp://box' is not an http or https address"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://"}, ConfigError, "is not an http or https address"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://a b"}, ConfigError, "is not an http or https address"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://a:99999/v1"}, ConfigError, "is not an http or https address"),
    ("openai", AgentConfig(), {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://a/v1?x=1"}, ConfigError, "is not an http or https address"),
]  # fmt: skip


@pytest.mark.parametrize("wanted, agent, environ, kind, words", UNRESOLVED, ids=range(len(UNRESOLVED)))
def test_what_does_not_resolve_is_one_clear_error(wanted, agent, environ, kind, words):
    with pytest.raises(kind) as caught:
        resolve(wanted, agent, {}, environ)
    assert type(caught.value) is kind and words in str(caught.value) and "\n" not in str(caught.value)
    assert "sk-1" not in str(caught.value) and "x-evil" not in str(caught.value)


WINDOWS = [
    ("openai", "gpt-4o", 128_000), ("openai", "gpt-4.1-mini", 1_000_000), ("openai", "gpt-5", 400_000),
    ("anthropic", "claude-opus-4-5", 200_000), ("openrouter", "anthropic/claude-x", 200_000),
    ("ollama", "llama3.2", 8_192), ("custom", "whatever", 128_000),
]  # fmt: skip


@pytest.mark.parametrize("provider, name, window", WINDOWS)
def test_window(provider, name, window):
    assert Endpoint(provider, PROVIDERS[provider], "", name, Key(), "chat").window == window


# A round trip in each format


@pytest.mark.parametrize("format", FORMATS)
def test_a_call_and_then_words(model, format):
    usage = {"input": 90, "output": 12, "cached": 64}
    model.script(
        {"text": "I look.", "tool_calls": [RUN], "usage": usage},
        {"tool_result_text": True, "expect": ["system_run", "Who am I?"]},
    )
    trial = Trial(model.url, format)
    first = trial.ask()
    [call] = first.message.tool_calls
    assert (call.name, call.arguments, call.problem) == ("system.run", {"command": "whoami"}, "")
    assert (first.message.text, first.usage, first.cut) == ("I look.", Usage(90, 64, 12), False)
    result = Message(Role.TOOL, "root", call_id=call.id)
    trial = Trial(model.url, format)
    second = trial.ask(ASK._replace(messages=(*ASK.messages, first.message, result)))
    assert "root" in second.message.text and second.model == f"openai/{MODELS[format]}"
    assert "".join(progress.text for progress in trial.told if progress.kind == "delta") == second.message.text
    assert [row["path"] for row in model.requests()] == [PATHS[format]] * 2
    assert [row["status"] for row in model.requests()] == [200, 200] and trial.waits == []


HEADERS = [
    ("chat", "openai", {"authorization": f"Bearer {KEY}"}, ["x-api-key"]),
    ("responses", "openai", {"authorization": f"Bearer {KEY}"}, ["x-api-key"]),
    ("messages", "anthropic", {"x-api-key": KEY, "anthropic-version": "2023-06-01"}, ["authorization"]),
    ("messages", "opencode", {"x-api-key": KEY, "authorization": f"Bearer {KEY}"}, []),
]


@pytest.mark.parametrize("format, provider, has, lacks", HEADERS)
def test_headers(model, format, provider, has, lacks):
    Trial(model.url, format, provider).ask()
    headers = model.requests()[0]["headers"]
    assert {name: headers[name] for name in has} == has and not set(lacks) & set(headers)
    assert headers["user-agent"] == f"openpista/{openpista.__version__}"


QUIRKS = [
    *((format, quirk) for format in FORMATS for quirk in ("crlf", "no_space", "keepalive_comments", "unknown_events")),
    *(
        ("chat", quirk)
        for quirk in """no_index no_id all_index_0 id_repeated name_repeated name_split whole_call arguments_object
        finish_stop extra_content reasoning_required mistral_ids no_user_after_tool content_list nulls reasoning_key
        usage_in_finish""".split()
    ),
]


@pytest.mark.parametrize("format, quirk", QUIRKS)
def test_a_round_trip_with_a_vendor_that_bends_the_format(model, format, quirk):
    both = [RUN, {"name": "system_run", "arguments": {"command": "pwd"}}]
    model.script({"text": "Hm.", "reasoning": "First look.", "tool_calls": both, "quirks": [quirk]}, {"text": "Done."})
    said = Trial(model.url, format, "mistral" if quirk == "mistral_ids" else "openai").ask().message
    assert [call.arguments for call in said.tool_calls] == [{"command": "whoami"}, {"command": "pwd"}]
    assert said.text == "Hm." and len({call.id for call in said.tool_calls}) == 2
    results = [Message(Role.TOOL, "root", call_id=call.id) for call in said.tool_calls]
    again = ASK._replace(messages=(*ASK.messages, said, *results))
    answer = Trial(model.url, format, "mistral" if quirk == "mistral_ids" else "openai").ask(again)
    assert answer.message.text == "Done." and model.requests()[-1]["error"] is None


def test_empty_arguments(model):
    model.script({"tool_calls": [RUN], "quirks": ["empty_arguments"]})
    assert [call.arguments for call in Trial(model.url).ask().message.tool_calls] == [{}]


def test_a_stream_that_says_it_is_done_but_not_why_is_an_answer(model):
    model.script({"text": "Hello.", "quirks": ["no_finish"]})
    assert Trial(model.url).ask().message.text == "Hello."


@pytest.mark.parametrize("format", FORMATS)
def test_the_body_comes_in_packets_of_any_size(model, format):
    model.script({"text": "한국어 🙂 text", "split": 7})
    assert Trial(model.url, format).ask().message.text == "한국어 🙂 text"


@pytest.mark.parametrize("format", FORMATS)
def test_a_connection_serves_two_requests(model, format):
    Trial(model.url, format).ask(ASK, ASK)
    assert len({row["connection"] for row in model.requests()}) == 1


def test_lone_surrogates_and_a_megabyte_do_not_stop_a_request(model):
    model.script({"echo": True})
    text = "x" * 1_000_000 + "\udcff end"
    answer = Trial(model.url).ask(ASK._replace(messages=(Message(Role.USER, text),)))
    assert answer.message.text == "x" * 1_000_000 + "? end"


def test_a_server_that_does_not_stream(model):
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    model.script({"body": json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})})
    trial = Trial(model.url)
    answer = trial.ask()
    assert (answer.message.text, answer.usage) == ("Hello.", Usage(5, 0, 2))


# Trying again


MOMENTARY = [
    ({"status": 429}, "429"),
    ({"status": 500}, "500"),
    ({"status": 502, "body": "<html><h1>Bad gateway</h1></html>"}, "502: Bad gateway"),
    ({"status": 503}, "503"),
    ({"status": 529}, "529"),
    ({"status": 408}, "408"),
    ({"refuse": True}, "broke"),
    ({"text": "Hello, world.", "cut": 2}, "broke"),
    ({"text": "Hello, world.", "cut": 2, "reset": True}, "broke"),
    ({"text": "Hello, world.", "cut": 2, "clean": True}, "the answer ended in the middle"),
    ({"text": "Hello, world.", "cut_bytes": 150}, "broke"),
    ({"garbage": True}, "the answer ended in the middle"),
    ({"garbage": "data: {oops\n\n"}, "no JSON object"),
    ({"text": "Hello, world.", "error_event": True}, ""),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("step, words", MOMENTARY, ids=range(len(MOMENTARY)))
def test_what_passes_is_tried_again(model, format, step, words):
    model.script(step, {"text": "Here I am."})
    trial = Trial(model.url, format)
    assert trial.ask().message.text == "Here I am."
    [again] = [progress.text for progress in trial.told if progress.kind == "again"]
    assert words in again and again.endswith("trying again in 1.0 s") and trial.waits == [1.0]
    assert again.count(trial.provider.name) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_never_more_than_four_tries_and_the_ceiling_doubles(model, format):
    model.script({"status": 503, "times": -1})
    trial = Trial(model.url, format)
    said = trial.fails(Unavailable)
    assert len(model.requests()) == 4 and trial.waits == [1.0, 2.0, 4.0]
    assert "503" in said and said.count(trial.provider.name) == 1


def test_chance_makes_the_wait_shorter(model):
    model.script({"status": 500}, {"text": "Hello."})
    trial = Trial(model.url)
    trial.provider.chance = lambda: 0.25
    trial.ask()
    assert trial.waits == [0.25]


def date_in(seconds):
    return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True)


WAITS = [
    ({"Retry-After": "7"}, 7.0),
    ({"Retry-After": "0.5"}, 0.5),
    ({"retry-after-ms": "250"}, 0.25),
    ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25),
    ({"retry-after-ms": "soon", "Retry-After": "7"}, 7.0),
    ({"Retry-After": "30"}, 30.0),
    ({"Retry-After": "soon"}, 1.0),
    ({"Retry-After": "0"}, 1.0),
    ({"Retry-After": "-5"}, 1.0),
    ({"Retry-After": "nan"}, 1.0),
]


@pytest.mark.parametrize("headers, wait", WAITS, ids=range(len(WAITS)))
def test_the_wait_that_the_server_asks_for(model, headers, wait):
    model.script({"status": 429, "headers": headers}, {"text": "Hello."})
    trial = Trial(model.url)
    assert trial.ask().message.text == "Hello." and trial.waits == [wait]


def test_the_wait_as_a_date(model):
    model.script({"status": 503, "headers": {"Retry-After": date_in(10)}}, {"text": "Hello."})
    trial = Trial(model.url)
    trial.ask()
    assert len(trial.waits) == 1 and 7 < trial.waits[0] <= 10


@pytest.mark.parametrize("value", ["31", "3600", "1e9", "inf", date_in(600)], ids=range(5))
def test_a_server_that_asks_for_a_long_wait_is_given_up_at_once(model, value):
    model.script({"status": 429, "headers": {"Retry-After": value}, "times": -1})
    trial = Trial(model.url)
    assert "429" in trial.fails(Unavailable)
    assert trial.waits == [] and len(model.requests()) == 1


RETRY_AFTER = [
    ({}, None), ({"retry-after": "x"}, None), ({"retry-after": "3"}, 3.0), ({"retry-after": "-3"}, 0.0),
    ({"retry-after-ms": "1500"}, 1.5), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("headers, seconds", RETRY_AFTER, ids=range(len(RETRY_AFTER)))
def test_retry_after(headers, seconds):
    assert openpista.retry_after(headers) == seconds


@pytest.mark.parametrize("fault", ["delay", "stall"])
def test_silence_before_and_in_an_answer_is_tried_again(model, fault):
    model.script({fault: 5, "text": "late"}, {"text": "Hello."})
    trial = Trial(model.url, idle_timeout=0.2)
    assert trial.ask().message.text == "Hello."
    assert [f"{model.url} was silent for 0.2 s" in p.text for p in trial.told if p.kind == "again"] == [True]


def test_the_time_for_all_of_it_has_an_end(model):
    model.script({"text": "x" * 400, "deltas": 400, "pace": 0.02})
    said = Trial(model.url, timeout=0.2).fails(Unavailable)
    assert said == "openai/m1 gave no whole answer within 0.2 s"


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    trial = Trial(url)
    assert f"cannot reach {url}" in trial.fails(Unavailable) and len(trial.waits) == 3


ADDRESSES = ["http://127.0.0.1:port/v1", "http://[::1/v1", "http://nobody.invalid/v1"]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_is_none_is_one_clear_error(url):
    trial = Trial(url)
    with pytest.raises(ProviderError) as caught:
        trial.ask()
    assert url in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_connection_that_breaks_after_the_end_of_an_answer_breaks_nothing(model, format):
    model.script({"text": "Hello.", "cut": 1_000})
    trial = Trial(model.url, format)
    assert trial.ask().message.text == "Hello." and trial.waits == []


@pytest.mark.parametrize("format", FORMATS)
def test_an_answer_whose_connection_stays_open_is_not_waited_for(model, format):
    model.script({"text": "Hello.", "stall": 5, "after": 1_000})
    trial = Trial(model.url, format, idle_timeout=0.4)
    assert trial.ask().message.text == "Hello." and trial.waits == []


# Refusals


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_its_source_and_how_to_set_another(model, format, status):
    model.script({"status": status, "times": -1})
    trial = Trial(model.url, format)
    said = trial.fails(CredentialError)
    assert said.startswith(f"openai refused the key …cdef from $OPENAI_API_KEY ({status}")
    assert said.endswith("; correct $OPENAI_API_KEY, or unset it and run `openpista auth login --provider openai`")
    assert len(model.requests()) == 1 and trial.waits == []


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_vendor_that_repeats_the_key_does_not_make_us_show_it(model, status):
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}."}})
    model.script({"status": status, "body": body, "times": -1})
    trial = Trial(model.url)
    with pytest.raises((CredentialError, ProviderError)) as caught:
        trial.ask()
    assert KEY not in str(caught.value) and not any(KEY in progress.text for progress in trial.told)


BAD_KEYS = ["API key not valid. Please pass a valid API key.", "Incorrect API key provided", "invalid_api_key"]


@pytest.mark.parametrize("words", BAD_KEYS)
def test_gemini_and_xai_refuse_a_key_with_400(model, words):
    model.script({"status": 400, "body": json.dumps([{"error": {"code": 400, "message": words}}])})
    assert Trial(model.url, "chat", "xai").fails(CredentialError).startswith("xai refused the key …cdef")


def test_a_request_without_a_key_that_wants_one(model):
    said = Trial(model.url, "chat", "custom", key="", source="").fails(CredentialError)
    assert "custom refused a request without a key (401" in said and "auth login --provider custom" in said


QUOTA = {
    "error": {"message": "You exceeded your current quota.", "type": "insufficient_quota", "code": "insufficient_quota"}
}
FOR_GOOD = [
    ({"status": 429, "body": json.dumps(QUOTA)}, "openai/m1 answered 429: You exceeded your current quota."),
    ({"status": 402, "body": '{"error":{"message":"Insufficient credits","code":402}}'}, "answered 402: Insufficient credits"),
    ({"status": 404}, "answered 404: The model does not exist"),
    ({"status": 400, "body": '{"error":{"message":"Invalid schema"}}'}, "openai/m1 answered 400: Invalid schema"),
    ({"status": 400, "body": "plain\nwords"}, "answered 400: plain words"),
    ({"status": 400, "body": ""}, "answered 400"),
    ({"status": 422, "body": '{"detail":[{"loc":["body","x"],"msg":"extra"}]}'}, "answered 422"),
    ({"status": 204}, "answered 204"),
    ({"status": 302, "headers": {"Location": "https://new.example/v1"}}, "(redirect to https://new.example/v1); set base_url to it"),
    ({"status": 308, "headers": {}}, "(redirect to nowhere)"),
    ({"status": 200, "body": "<html><body>Please log in</body></html>"}, "answered text/html, no event stream"),
    ({"text": "Hi.", "long_line": 10_000_000}, "an event of more than 8 MiB"),
    ({"finish": "content_filter", "text": "Hi."}, "filter stopped the answer"),
    ({"text": "Hi.", "error_event": {"message": "Your prompt was flagged.", "type": "invalid_request_error"}}, "Your prompt was flagged."),
]  # fmt: skip


@pytest.mark.parametrize("step, words", FOR_GOOD, ids=range(len(FOR_GOOD)))
def test_what_does_not_pass_is_not_tried_again(model, step, words):
    model.script(step | {"times": -1})
    trial = Trial(model.url)
    assert words in trial.fails(ProviderError)
    assert trial.waits == [] and len(model.requests()) == 1


def test_geminis_limit_per_minute_speaks_of_quota_too_and_passes(model):
    words = "You exceeded your current quota, please check your plan and billing details. Please retry in 12.5s."
    body = json.dumps([{"error": {"code": 429, "message": words, "status": "RESOURCE_EXHAUSTED"}}])
    model.script({"status": 429, "body": body}, {"text": "Hello."})
    assert Trial(model.url, "chat", "gemini").ask().message.text == "Hello."


@pytest.mark.parametrize("format", FORMATS)
def test_html_instead_of_an_answer(model, format):
    model.script({"status": 200, "body": "<html>\n<h1>Welcome</h1></html>", "times": -1})
    said = Trial(model.url, format).fails(ProviderError)
    assert f": {model.url} answered text/html, no event stream ('<html> <h1>Welcome" in said
    assert said.endswith("; is base_url right?")


def test_a_page_that_is_not_there_asks_whether_the_address_is_right(model):
    said = Trial(model.origin + "/nothing").fails(ProviderError)
    assert "404" in said and "base_url" in said


@pytest.mark.parametrize("format", FORMATS)
def test_a_transcript_that_does_not_fit(model, format):
    model.script({"overflow": True, "times": -1})
    trial = Trial(model.url, format)
    assert "answered 4" in trial.fails(ContextTooLong)
    assert trial.waits == [] and len(model.requests()) == 1


def test_a_request_that_is_too_large(model):
    model.script({"status": 413, "body": '{"error":{"message":"Request too large"}}'})
    Trial(model.url).fails(ContextTooLong)


def test_an_answer_over_the_limit_is_given_up(model):
    model.script({"text": "x" * 9_000_000, "deltas": 9})
    trial = Trial(model.url)
    trial.provider.MOST_BYTES = 4 << 20
    assert "an answer of more than 4 MiB" in trial.fails(ProviderError)


# What a vendor refuses is mended, and remembered


def test_a_model_of_another_format_is_asked_in_it_from_then_on(model):
    trial = Trial(model.url, "chat", name="x-codex")
    first, second = trial.ask(ASK, ASK)
    assert first.message.text == second.message.text == "done"
    assert [row["path"] for row in model.requests()] == [PATHS["chat"], PATHS["responses"], PATHS["responses"]]
    assert trial.waits == []


def test_a_server_without_responses_is_asked_for_chat(model):
    model.script({"path": "/responses", "status": 404, "body": "404 page not found"}, {"text": "Hello.", "times": 2})
    trial = Trial(model.url, "responses")
    trial.ask(ASK, ASK)
    assert [row["path"] for row in model.requests()] == [PATHS["responses"], PATHS["chat"], PATHS["chat"]]


def test_a_format_that_did_not_help_is_not_kept(model):
    model.script(
        {"path": "/chat/completions", "status": 404, "body": "not found"},
        {"path": "/responses", "status": 400, "body": "no"},
        {"text": "Hello."},
    )
    trial = Trial(model.url)
    trial.fails(ProviderError)
    assert trial.provider.format == "chat"


MENDED = [
    # format, model, step, changes to the request, (key that goes, key that comes)
    ("chat", "gpt-5-chat", {}, {"max_tokens": 50}, ("max_tokens", "max_completion_tokens")),
    ("chat", "old-/gpt-5", {}, {"max_tokens": 50}, ("max_completion_tokens", "max_tokens")),
    ("chat", "m1", {"reject": ["stream_options"]}, {}, ("stream_options", None)),
    ("chat", "m1", {"reject": ["tool_choice"]}, {"may_call": False}, ("tool_choice", None)),
    ("responses", "gpt-5", {"reject": ["include"]}, {}, ("include", None)),
    ("responses", "m1", {"reject": ["tool_choice"]}, {"may_call": False}, ("tool_choice", None)),
]


@pytest.mark.parametrize("format, name, step, changes, keys", MENDED, ids=range(len(MENDED)))
def test_what_the_vendor_refuses_is_left_out_or_renamed_from_then_on(model, format, name, step, changes, keys):
    model.script({"text": "Hello.", "times": 2, **step})
    trial = Trial(model.url, format, name=name)
    request = ASK._replace(**changes)
    answers = trial.ask(request, request)
    gone, come = keys
    assert [answer.message.text for answer in answers] == ["Hello."] * 2 and trial.waits == []
    bodies = model.bodies()
    assert [row["status"] for row in model.requests()] == [400, 200, 200]
    assert gone in bodies[0] and all(gone not in body for body in bodies[1:])
    assert come is None or all(body[come] == bodies[0][gone] for body in bodies[1:])


def test_several_things_are_mended_one_after_another(model):
    model.script({"text": "Hello.", "reject": ["stream_options", "tool_choice"]})
    Trial(model.url, name="gpt-5-chat").ask(ASK._replace(max_tokens=50, may_call=False))
    assert [row["status"] for row in model.requests()] == [400, 400, 400, 200]


def test_a_mend_that_does_not_help_ends_with_the_error(model):
    body = json.dumps({"error": {"message": "max_completion_tokens and max_tokens: neither is supported"}})
    model.script({"status": 400, "body": body, "times": -1})
    assert "neither is supported" in Trial(model.url).fails(ProviderError, ASK._replace(max_tokens=50))
    assert len(model.requests()) <= 1 + len(MENDS)


# Pictures

PICTURES = tuple(Image(f"/tmp/{name}.png", "image/png", IMAGE_STARTS["png"] + name.encode()) for name in ("a", "b"))
LOOK = ASK._replace(messages=(Message(Role.USER, "Look.", images=PICTURES[:1]),))
LOOK_AGAIN = ASK._replace(messages=(Message(Role.USER, "Look again.", images=PICTURES[1:]),))


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_sent_as_the_vendor_takes_it(model, format):
    Trial(model.url, format).ask(LOOK)
    assert [row["status"] for row in model.requests()] == [200]
    assert "iVBORw0KGgph" in json.dumps(model.bodies())


def last_words(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


REFUSED_ONCE = [  # what vendors say -> whether the model is blind, or only these pictures are at fault
    (400, "Invalid content type. image_url is only supported by certain models.", True),
    (404, "No endpoints found that support image input", True),
    (400, "Failed to deserialize the JSON body: messages[1]: unknown variant `image_url`, expected `text` at 1", True),
    (400, "'messages.1' : for 'role:user' the following must be satisfied[content must be a string]", True),
    (400, "llama3.2 is not a multimodal model", True),
    (400, "Model does not support images. Please use a model that does.", True),
    (415, "This model has no vision", True),
    (422, "Input should be a valid string", True),
    (500, "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj", True),
    (400, "messages.0.content.0.image.source.base64.data: Could not process image", False),
    (400, "image exceeds 10 MB maximum: 13474984 bytes > 10485760 bytes", False),
    (400, "At least one of the image dimensions exceed max allowed size: 8000 pixels", False),
    (400, "You uploaded an unsupported image. Please make sure your image has one of the following formats", False),
    (400, "Too many images provided. This model supports up to 5 images", False),
    (413, "Request Entity Too Large", False),
]


@pytest.mark.parametrize("status, words, blind", REFUSED_ONCE, ids=range(len(REFUSED_ONCE)))
def test_a_refused_picture_is_left_out_at_once_and_from_then_on(model, status, words, blind):
    refused = {"status": status, "body": json.dumps({"error": {"message": words}})}
    model.script(refused, {"text": "Hello.", "times": 3})
    trial = Trial(model.url)
    assert [answer.message.text for answer in trial.ask(LOOK, LOOK, LOOK_AGAIN)] == ["Hello."] * 3
    assert trial.waits == [] and [row["status"] for row in model.requests()] == [status, 200, 200, 200]
    shown = ["image_url" in json.dumps(body) for body in model.bodies()]
    assert shown == [True, False, False, not blind]
    said = "this model cannot see pictures" if blind else "the provider does not take this picture"
    assert last_words(model.bodies()[2]) == f"Look.\n({said}; /tmp/a.png)"
    assert [told.text.startswith("openai/m1 refused a picture (") for told in trial.told[:1]] == [True]


def test_a_blind_model_is_shown_one_picture(model):
    trial = Trial(model.url, name="blind")
    trial.ask(LOOK, LOOK_AGAIN, ASK)
    assert [row["status"] for row in model.requests()] == [400, 200, 200, 200]


@pytest.mark.parametrize("status, words", [(400, "image_url: no"), (500, "image worker crashed"), (401, "no image")])
def test_what_is_not_about_pictures_is_the_error_it_was(model, status, words):
    model.script({"status": status, "body": json.dumps({"error": {"message": words}}), "times": -1})
    with pytest.raises((ProviderError, CredentialError), match=words):
        Trial(model.url).ask(ASK if status == 400 else LOOK)
    assert all(("image_url" in json.dumps(body)) is (status != 400) for body in model.bodies())


def test_pictures_in_a_transcript_that_is_too_long_are_no_matter_of_pictures(model):
    model.script({"overflow": True})
    Trial(model.url).fails(ContextTooLong, LOOK)
    assert len(model.requests()) == 1


def test_offline_ignores_pictures():
    answer = asyncio.run(OfflineProvider().complete(LOOK, lambda progress: None))
    assert "offline provider" in answer.message.text


# Speech


def speech(url, path, provider="openai", **more):
    endpoint = Endpoint(provider, PROVIDERS[provider], url, "m1", Key(KEY, "$OPENAI_API_KEY"), "responses")
    return asyncio.run(transcribe(endpoint, path, **more))


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "my voice.oga"
    path.write_bytes(b"OggS" + bytes(2_000))
    return path


@pytest.mark.parametrize("provider", ["openai", "groq", "mistral"])
def test_speech_becomes_text(model, sound, provider):
    model.script({"path": "/audio/transcriptions", "text": " 안녕하세요. \n"})
    assert speech(model.url, sound, provider) == "안녕하세요."
    [row] = model.requests()
    assert row["body"]["model"] == PROVIDERS[provider].hears
    assert row["body"]["file"] == {"name": "speech.ogg", "size": 2_004, "start": "OggS" + "\0" * 16}
    assert row["headers"]["authorization"] == f"Bearer {KEY}"


def test_speech_is_not_sent_where_nobody_listens(model, sound, tmp_path):
    with pytest.raises(
        ProviderError, match="anthropic does not turn speech into text; these do: openai, groq, mistral"
    ):
        speech(model.url, sound, "anthropic")
    with pytest.raises(PistaError, match="No such file"):
        speech(model.url, tmp_path / "none.ogg")
    with pytest.raises(PistaError, match="is a directory"):
        speech(model.url, tmp_path)
    with sound.open("r+b") as file:
        file.truncate(25_000_001)
    with pytest.raises(PistaError, match="larger than 25 MB"):
        speech(model.url, sound)
    assert model.requests() == []


UNHEARD = [
    ({"status": 401}, CredentialError, "refused the key …cdef"),
    ({"status": 503}, Unavailable, "answered 503"),
    ({"status": 404, "body": "not found"}, ProviderError, "is base_url right?"),
    ({"body": "<html>hello</html>"}, ProviderError, "sent no text: 'hello'"),
    ({"body": "[]"}, ProviderError, "sent no text"),
    ({"body": '{"text": 7}'}, ProviderError, "sent no text"),
    ({"refuse": True}, Unavailable, "broke"),
    ({"delay": 5}, Unavailable, "0.3 s"),
]


@pytest.mark.parametrize("step, kind, words", UNHEARD, ids=range(len(UNHEARD)))
def test_speech_that_the_server_does_not_understand(model, sound, caplog, step, kind, words):
    model.script({"path": "/audio/transcriptions", **step})
    with caplog.at_level("DEBUG"), pytest.raises(kind) as caught:
        speech(model.url, sound, timeout=0.3 if "delay" in step else 10)
    assert words in str(caught.value) and KEY not in str(caught.value) + caplog.text


def test_speech_of_a_kind_that_the_server_does_not_take(model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    with pytest.raises(ProviderError, match="Unrecognized file format"):
        speech(model.url, tmp_path / "a.txt")


def test_groqs_failed_generation_is_tried_again_each_time(model):
    message = "Failed to call a function. Please adjust your prompt. See 'failed_generation' for more details."
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": "tool_use_failed"}})
    failed = {"status": 400, "body": body}
    model.script(failed, {"text": "One."}, failed, {"text": "Two."})
    answers = Trial(model.url, "chat", "groq").ask(ASK, ASK)
    assert [answer.message.text for answer in answers] == ["One.", "Two."]


# Those that stand in


def models_for(model, *names):
    """Models over the fake server, each with one try."""
    trials = [Trial(model.url, name=name) for name in names]
    for trial in trials:
        trial.provider.TRIES = 1
    return Models([trial.provider for trial in trials])


def ask_all(models, count=1):
    told = []

    async def go():
        try:
            return [await models.complete(ASK, told.append) for _ in range(count)]
        finally:
            await models.retire()

    return asyncio.run(go()), [progress.text for progress in told if progress.kind == "notice"]


def test_two_turns_that_fail_at_once_do_not_turn_the_line_back(model):
    """Sessions share the models: the second failure of m1 must not bring it to the front again."""
    model.script({"model": "m1", "status": 503, "delay": 0.2, "times": 2}, {"model": "m2", "text": "Hi.", "times": -1})
    models = models_for(model, "m1", "m2", "m3")

    async def go():
        try:
            return await asyncio.gather(*(models.complete(ASK, lambda progress: None) for _ in range(2)))
        finally:
            await models.retire()

    assert [answer.model for answer in asyncio.run(go())] == ["openai/m2"] * 2
    assert [provider.name for provider in models.providers] == ["openai/m2", "openai/m3", "openai/m1"]


def test_the_mends_of_one_format_leave_another_one_alone(model):
    body = {"model": "m", "messages": []}
    for mend in MENDS:
        mend.change(body)
    assert body == {"model": "m", "messages": []}


def test_a_password_in_an_address_is_not_shown():
    trial = Trial("http://me:hunter2@127.0.0.1:9/v1")
    said = trial.fails(Unavailable)
    assert "hunter2" not in said and "http://…@127.0.0.1:9/v1" in said
    assert "hunter2" not in str([progress.text for progress in trial.told])
    with pytest.raises(ConfigError, match="is not an http") as caught:
        openpista.whole_url("ftp://me:hunter2@box/", PROVIDERS["custom"])
    assert "hunter2" not in str(caught.value)


IN_THE_OPEN = [
    ("http://box:8000/v1", KEY, True),
    ("http://192.168.1.7/v1", KEY, True),
    ("http://127.0.0.1.example.com/v1", KEY, True),
    ("http://box:8000/v1", "", False),
    ("https://box/v1", KEY, False),
    ("http://localhost:11434/v1", KEY, False),
    ("http://127.0.0.1:1/v1", KEY, False),
    ("http://[::1]:1/v1", KEY, False),
]


@pytest.mark.parametrize(("url", "key", "open_"), IN_THE_OPEN)
def test_a_key_that_goes_without_encryption(url, key, open_):
    assert openpista.goes_in_the_open(Endpoint("openai", PROVIDERS["openai"], url, "m", Key(key), "chat")) is open_


def test_the_next_model_answers_and_says_who_it_is(model):
    model.script({"model": "m1", "status": 503}, {"model": "m2", "status": 429}, {"model": "m3", "text": "Hello."})
    [answer], notices = ask_all(models_for(model, "m1", "m2", "m3"))
    assert (answer.message.text, answer.model) == ("Hello.", "openai/m3")
    assert [notice.rpartition("; ")[2] for notice in notices] == ["asking openai/m2", "asking openai/m3"]
    assert [body["model"] for body in model.bodies()] == ["m1", "m2", "m3"]


def test_a_refused_key_of_one_leads_to_the_next(model):
    model.script({"model": "m1", "status": 401}, {"model": "m2", "text": "Hello."})
    [answer], _ = ask_all(models_for(model, "m1", "m2"))
    assert answer.model == "openai/m2"


def test_the_one_that_answered_is_asked_first_the_next_time(model):
    model.script({"model": "m1", "status": 503}, {"text": "Hello.", "times": 2})
    answers, _ = ask_all(models_for(model, "m1", "m2"), 2)
    assert [answer.model for answer in answers] == ["openai/m2"] * 2
    assert [body["model"] for body in model.bodies()] == ["m1", "m2", "m2"]


def test_when_all_fail_the_first_error_counts(model):
    model.script({"model": "m1", "status": 503}, {"model": "m2", "status": 401})
    models = models_for(model, "m1", "m2")
    with pytest.raises(Unavailable, match="openai/m1.*503"):
        ask_all(models)
    assert models.name == "openai/m1"


def test_a_transcript_that_is_too_long_goes_to_nobody_else(model):
    model.script({"model": "m1", "overflow": True})
    with pytest.raises(ContextTooLong):
        ask_all(models_for(model, "m1", "m2"))
    assert len(model.requests()) == 1


# Proxies


def test_a_proxy_of_the_environment_is_used(model, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", model.origin)
    Trial("http://model.invalid/v1").fails(ProviderError)
    assert model.requests()[0]["path"] == "http://model.invalid/v1/chat/completions"


def test_no_proxy_is_honoured(model, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert Trial(model.url).ask().message.text == "done"


@pytest.mark.parametrize("proxy", ["ftp://proxy", "http://proxy:port", "socks5://127.0.0.1:1", "nonsense://"])
def test_a_proxy_that_cannot_be_one_is_one_clear_error(model, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert "the proxy of the environment cannot be used" in Trial(model.url).fails(ConfigError)


# TLS

TLS_SERVER = """
import os, socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
body = b'data: {"choices":[{"index":0,"delta":{"content":"Safe."},"finish_reason":"stop"}]}\\n\\ndata: [DONE]\\n\\n'
head = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
listener = socket.create_server(("127.0.0.1", 0))
def serve():
    while True:
        conn, _ = listener.accept()
        try:
            with context.wrap_socket(conn, server_side=True) as conn:
                conn.recv(65536)
                conn.sendall(head + body)
        except OSError:
            pass
threading.Thread(target=serve, daemon=True).start()
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "model")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1)).add_extension(address, critical=False)
    path = tmp_path_factory.mktemp("tls") / "model.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture(scope="module")
def tls_url(certificate):
    argv = [sys.executable, "-I", "-S", "-c", TLS_SERVER, str(certificate)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield f"https://127.0.0.1:{child.stdout.readline().strip()}/v1"
        child.stdin.close()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_certificate_that_the_environment_trusts(tls_url, certificate, monkeypatch, variable):
    monkeypatch.setenv(variable, str(certificate))
    assert Trial(tls_url).ask().message.text == "Safe."


@pytest.mark.parametrize("variable", ["SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_a_folder_of_certificates_that_the_environment_trusts(tls_url, certificate, tmp_path, monkeypatch, variable):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to name the file")
    name = subprocess.check_output(["openssl", "x509", "-noout", "-hash", "-in", certificate], text=True).strip()
    (tmp_path / f"{name}.0").write_bytes(certificate.read_bytes())
    monkeypatch.setenv(variable, str(tmp_path))
    assert Trial(tls_url).ask().message.text == "Safe."


def test_a_certificate_that_nobody_trusts_is_one_clear_error(tls_url):
    trial = Trial(tls_url)
    assert (
        trial.fails(ProviderError) == f"openai/m1: {tls_url} has a certificate that is not trusted; see SSL_CERT_FILE"
    )
    assert trial.waits == []


def test_plain_http_where_tls_is_spoken_and_the_other_way_round(tls_url, model, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for url in (tls_url.replace("https:", "http:"), model.url.replace("http:", "https:")):
        assert url in Trial(url, idle_timeout=0.5).fails(Unavailable)


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_certificates_that_cannot_be_read(tls_url, tmp_path, monkeypatch, text):
    path = tmp_path / "certificates.pem"
    if text:
        path.write_text(text)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    assert f"cannot read the certificates of {path}" in Trial(tls_url).fails(ConfigError)


# Offline


def offline(text, *results, may_call=True):
    told = []
    messages = [Message(Role.USER, "$ earlier"), Message(Role.ASSISTANT, "x"), Message(Role.USER, text)]
    for i, result in enumerate(results):
        messages.append(Message(Role.ASSISTANT, "", (ToolCall(f"c{i}", "system.run", {}),)))
        messages.append(Message(Role.TOOL, result, call_id=f"c{i}"))
    request = Request("", tuple(messages), TOOLS, may_call)
    return asyncio.run(OfflineProvider().complete(request, told.append)), told


def test_offline_runs_the_lines_that_begin_with_a_dollar():
    first, _ = offline("$ uname -a\nnot this\n$ pwd")
    [call] = first.message.tool_calls
    assert (call.name, call.arguments) == ("system.run", {"command": "uname -a"}) and first.message.text == ""
    second, _ = offline("$ uname -a\nnot this\n$ pwd", "Linux")
    assert second.message.tool_calls[0].arguments == {"command": "pwd"}
    assert second.message.tool_calls[0].id != call.id
    last, told = offline("$ uname -a\nnot this\n$ pwd", "Linux", "/root")
    assert last.message.text == "Linux\n/root" and not last.message.tool_calls
    assert [progress.text for progress in told] == ["Linux\n/root"]
    assert (last.model, last.usage) == ("offline/shell", Usage())


def test_offline_says_what_it_is_and_calls_nothing_when_it_may_not():
    answer, _ = offline("hello")
    assert "not a model" in answer.message.text
    answer, _ = offline("$ uname\n$ pwd", "Linux", may_call=False)
    assert answer.message.text == "Linux" and not answer.message.tool_calls


def test_a_key_that_the_server_repeats_is_not_clipped_before_it_is_masked(model):
    model.script({"status": 400, "body": json.dumps({"error": {"message": f"{'x' * 285} {KEY} is bad"}})})
    assert KEY[:8] not in Trial(model.url).fails(ProviderError)
