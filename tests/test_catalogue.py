"""Catalogue: what vendors' lists say, the cache and what stands in for a list, and whether a key is good."""

import asyncio
import contextlib
import datetime
import json
import os
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openpista as c
from openpista import PROVIDERS, AgentConfig, CredentialError, Endpoint, Key, Login, ProviderError, Unavailable

KEY = "sk-1234567890abcdef"
NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
REMOTE = {"path": "/models", "models": ["gpt-5", "gpt-5.5", "whisper-1"]}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """What a developer's machine sets must not decide here."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "home" / "cache" / "models"


def run(coroutine):
    return asyncio.run(coroutine)


def endpoint(url, provider="openai", key=KEY, format=""):
    spec = PROVIDERS[provider]
    return Endpoint(provider, spec, url, spec.model, Key(key, "$A_KEY" if key else ""), format or spec.format)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def load(where, folder, now=NOW, **options):
    return run(c.load_catalogue(where, folder, now=lambda: now, **options))


def ids(catalogue):
    return [info.id for info in catalogue.models]


def parse(provider, *rows, **more):
    return c.parse_models(provider, json.dumps({"data": rows} | more).encode())


# ---- what a list says ----

PAINTS = {"architecture": {"output_modalities": ["image"]}}
VENDORS = [  # provider, entry as documented, (id, context, in, out, status, chats)
    ("openai", {"id": "gpt-5", "object": "model", "owned_by": "system"}, ("gpt-5", 0, None, None, "", True)),
    ("openai", {"id": "text-embedding-3-small"}, ("text-embedding-3-small", 0, None, None, "", False)),
    ("openai", {"id": "gpt-4o-realtime-preview"}, ("gpt-4o-realtime-preview", 0, None, None, "preview", False)),
    ("openai", {"id": "dall-e-3"}, ("dall-e-3", 0, None, None, "", False)),
    ("anthropic", {"type": "model", "id": "claude", "max_input_tokens": 1_000_000}, ("claude", 1_000_000, None, None, "", True)),
    ("openrouter", {"id": "a/b", "context_length": 400_000, "pricing": {"prompt": "0.00000125", "completion": "0.00001"}, "expiration_date": None}, ("a/b", 400_000, 1.25, 10, "", True)),
    ("openrouter", {"id": "a/auto", "pricing": {"prompt": "-1", "completion": "-1"}}, ("a/auto", 0, None, None, "", True)),
    ("openrouter", {"id": "a/b:free", "pricing": {"prompt": "0", "completion": "0"}}, ("a/b:free", 0, 0, 0, "free", True)),
    ("openrouter", {"id": "a/b:free", "expiration_date": "2026-12-01"}, ("a/b:free", 0, None, None, "deprecated", True)),
    ("openrouter", {"id": "x/paint"} | PAINTS, ("x/paint", 0, None, None, "", False)),
    ("together", {"id": "z/GLM", "type": "chat", "context_length": 202_752, "pricing": {"input": 1, "output": 3.2}}, ("z/GLM", 202_752, 1, 3.2, "", True)),
    ("together", {"id": "a/dedicated", "type": "language", "pricing": {"input": 0, "output": 0}}, ("a/dedicated", 0, None, None, "", True)),
    ("together", {"id": "BAAI/big", "type": "embedding"}, ("BAAI/big", 0, None, None, "", False)),
    ("groq", {"id": "llama", "active": True, "context_window": 131_072}, ("llama", 131_072, None, None, "", True)),
    ("gemini", {"id": "models/gemini-2.5-pro"}, ("gemini-2.5-pro", 0, None, None, "", True)),
    ("mistral", {"id": "old", "max_context_length": 32_768, "deprecation": "2026-11-30T12:00:00Z"}, ("old", 32_768, None, None, "deprecated", True)),
    ("mistral", {"id": "m", "deprecation": None, "capabilities": {"completion_chat": False}}, ("m", 0, None, None, "", False)),
    ("custom", {"id": "llama.gguf", "meta": {"n_ctx_train": 131_072}}, ("llama.gguf", 131_072, None, None, "", True)),
    ("custom", {"id": "v", "max_model_len": 32_000}, ("v", 32_000, None, None, "", True)),
    ("opencode", {"id": "glm-5-free"}, ("glm-5-free", 0, None, None, "free", True)),
    ("opencode", {"id": "gemini-3-flash"}, ("gemini-3-flash", 0, None, None, "", False)),
    ("custom", {"id": "m", "context_length": -5, "pricing": "cheap", "status": ["x"]}, ("m", 0, None, None, "", True)),
    ("custom", {"id": "m", "context_length": "32768", "pricing": {"prompt": "NaN"}}, ("m", 32768, None, None, "", True)),
    ("custom", {"id": "m", "pricing": {"prompt": 10**400, "completion": "1e-6"}}, ("m", 0, None, 1, "", True)),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "row", "wanted"), VENDORS)
def test_what_vendors_list(provider, row, wanted):
    (info,) = parse(provider, row)
    shown = (info.id, info.context, info.input_price, info.output_price, info.status, info.chats)
    assert shown == wanted
    assert (info.source, info.recommended) == ("remote", False)


def test_a_bare_array_is_a_list_too():
    rows = [{"id": "a"}, {"id": "b"}]
    for payload in (rows, {"object": "list", "data": rows}):
        assert [info.id for info in c.parse_models("together", json.dumps(payload).encode())] == ["a", "b"]


BAD_IDS = [
    "", "a b", "a\nb", "a\x1b[31m", "a\x9b2J", "x" * 201, "a\u202eb", "a\u200eb", "\ud800", 5, None, ["a"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_bad_entry_is_left_out_and_a_list_of_them_is_useless(bad):
    assert [info.id for info in parse("custom", {"id": bad}, {"id": "good"}, 7, None, [], {"id": "good"})] == ["good"]
    with pytest.raises(ProviderError, match="no list of models") as caught:
        parse("custom", {"id": bad})
    assert str(caught.value).isprintable()


USELESS = [
    (b"<!doctype html><html><body>Sign in</body></html>", "no list of models \\('Sign in'\\); is base_url right"),
    (b"", "no list of models"),
    (b"{", "no list of models"),
    (b"\xff\xfe\xfa", "no list of models"),
    (b"[" * 100_000, "no list of models"),
    (b"1" * 5_000, "no list of models"),
    (b"null", "no list of models"),
    (b'"text"', "no list of models"),
    (b'{"error": {"message": "\\u001b[2Jbusy"}}', "no list of models \\('busy'\\)"),
    (b'{"data": {"id": "a"}}', "no list of models"),
    (b'{"data": "abc"}', "no list of models"),
    (b"[]", "lists no models"),
    (b'{"data": []}', "lists no models"),
    (b'{"object": "list", "data": null}', "lists no models"),
    (b" " * (16 << 20) + b"[]", "more than 16 MiB"),
]


@pytest.mark.parametrize(("raw", "why"), USELESS, ids=[repr(raw[:20]) for raw, _ in USELESS])
def test_a_useless_list_is_an_error(raw, why):
    with pytest.raises(ProviderError, match=why) as caught:
        c.parse_models("custom", raw)
    assert "\x1b" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from("id name pricing prompt input cost context_length limits deprecation status type capabilities "
                        "architecture output_modalities completion_chat active".split()) | st.text(max_size=5),
        inner,
        max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PROVIDERS)), VALUES | st.fixed_dictionaries({"data": st.lists(VALUES, max_size=4)}))
def test_any_json_gives_models_or_an_error_of_ours(provider, payload):
    try:
        models = c.parse_models(provider, json.dumps(payload).encode())
    except ProviderError:
        return
    for info in c.arranged(provider, models):
        assert info.id.isprintable() and " " not in info.id and 0 < len(info.id) <= 200
        assert len(c.model_row(info)) == 6 and c.detail(info, provider)
        assert isinstance(info.context, int) and info.context >= 0


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_models_or_an_error_of_ours(raw):
    with contextlib.suppress(ProviderError):
        c.parse_models("custom", raw)


def test_ten_thousand_models_are_read_and_arranged_quickly():
    rows = [{"id": f"vendor/model-{i}", "context_length": i, "pricing": {"prompt": "0.000001"}} for i in range(21_000)]
    raw, start = json.dumps({"data": rows}).encode(), time.process_time()
    models = c.arranged("openrouter", c.parse_models("openrouter", raw))
    assert time.process_time() - start < 3
    assert len(models) == 20_000 and models[2].id == "vendor/model-2" and models[10].id == "vendor/model-10"


# ---- what is known without asking ----


@pytest.mark.parametrize("provider", sorted(PROVIDERS))
def test_the_built_in_list_is_sound(provider):
    models = c.built_in(provider)
    assert bool(models) == (provider not in ("ollama", "lmstudio", "custom"))
    assert len({info.id for info in models}) == len(models)
    for info in models:
        assert provider == "offline" or 8_000 < info.context < 3_000_000, info
        assert 0 <= info.input_price <= info.output_price <= 200, info
        assert not info.recommended or (info.chats and info.status != "free"), info
    assert provider in ("offline", "ollama", "lmstudio", "custom") or any(info.recommended for info in models)


def test_zen_s_coding_models_are_on_top_and_nothing_free_is_recommended():
    models = c.arranged("opencode", c.built_in("opencode"))
    stars = [info.id for info in models if info.recommended]
    assert [info.id for info in models[: len(stars)]] == stars and "gpt-5-codex" in stars
    assert not any("free" in name or name == "big-pickle" for name in stars)
    assert [info.id for info in models if info.status == "free"] == ["big-pickle"]
    (listed,) = c.arranged("opencode", parse("opencode", {"id": "big-pickle"}))
    assert (listed.status, listed.source) == ("free", "remote")


def test_the_remote_list_counts_and_what_it_leaves_open_is_filled_in():
    models = parse(
        "anthropic",
        {"id": "claude-haiku-4-5-20251001", "max_input_tokens": 150_000},
        {"id": "claude-new"},
        {"id": "claude-sonnet-5", "pricing": {"input": 0, "output": 1}},
        {"id": "claude-opus-4-8", "deprecation": "2026-12-01"},
    )
    sonnet, haiku, *rest = c.arranged("anthropic", models)
    assert sonnet == c.ModelInfo("claude-sonnet-5", 1_000_000, 0, 1, "", True, "remote")
    assert haiku == c.ModelInfo("claude-haiku-4-5-20251001", 150_000, 1, 5, "", True, "remote")
    assert [info.id for info in rest] == ["claude-new", "claude-opus-4-8"] and not rest[1].recommended


SEEN = [
    ({"architecture": {"input_modalities": ["text", "image"]}}, True),
    ({"architecture": {"input_modalities": ["text"]}}, False),
    ({"capabilities": {"vision": True}}, True),
    ({"capabilities": {"vision": False}}, False),
    ({"capabilities": {"image_input": {"supported": True}}}, True),
    ({"capabilities": ["vision"]}, None),
    ({}, None),
]


@pytest.mark.parametrize("row, sees", SEEN)
def test_whether_a_model_sees_is_what_its_provider_says(row, sees, tmp_path):
    [info] = parse("openrouter", {"id": "m"} | row)
    assert info.sees is sees
    c.write_cache(tmp_path / "m.json", c.Cached("http://x", c.utc_now(), [info]))
    assert c.parse_models("openrouter", (tmp_path / "m.json").read_bytes()) == [info]
    assert [line for line in c.detail(info) if "pictures" in line] == {
        True: ["pictures: yes"], False: ["pictures: no"], None: []
    }[sees]  # fmt: skip


# ---- asking ----


def test_a_list_is_fetched_with_the_key(model):
    model.script(REMOTE)
    assert [info.id for info in run(c.fetch_models(endpoint(model.url)))] == ["gpt-5", "gpt-5.5", "whisper-1"]
    (row,) = model.requests()
    assert (row["method"], row["path"], row["headers"]["authorization"]) == ("GET", "/v1/models", f"Bearer {KEY}")


def test_anthropic_is_asked_for_all_of_its_list(model):
    names = [f"claude-{i}" for i in range(300)]
    model.script({"path": "/models", "models": names})
    assert [info.id for info in run(c.fetch_models(endpoint(model.url, "anthropic")))] == names
    assert model.requests()[0]["headers"]["anthropic-version"] == "2023-06-01"


FAULTS = [  # what the server does, the error, a word of it
    ({"status": 401}, CredentialError, "openai refused the key …cdef from \\$A_KEY \\(401"),
    ({"status": 403, "body": {"error": "no"}}, CredentialError, "403: no"),
    ({"status": 400, "body": {"error": f"Incorrect API key provided: {KEY}"}}, CredentialError, "provided: \\[secret"),
    (
        {"status": 400, "body": [{"error": {"message": "API key not valid. Please pass one."}}]},
        CredentialError,
        "not valid",
    ),
    ({"status": 400}, ProviderError, "answered 400"),
    ({"status": 404, "body": "no such page"}, ProviderError, "answered 404: no such page; is base_url right"),
    ({"status": 429}, Unavailable, "answered 429"),
    ({"status": 503, "body": "<h1>Busy</h1>\x1b[2J"}, Unavailable, "answered 503: Busy"),
    ({"status": 302, "headers": {"location": "http://127.0.0.1:9/v1/models"}}, ProviderError, "redirect to http://127"),
    ({"body": "<html>hello</html>"}, ProviderError, "no list of models"),
    ({"refuse": True}, Unavailable, "broke"),
    ({"delay": 3}, Unavailable, "silent for 0.3 s|no whole answer within 0.3 s"),
]


@pytest.mark.parametrize(("step", "kind", "said"), FAULTS)
def test_what_goes_wrong_becomes_an_error_of_ours(model, step, kind, said):
    model.script({"path": "/models"} | step)
    with pytest.raises(kind, match=said) as caught:
        run(c.fetch_models(endpoint(model.url), timeout=0.3 if "delay" in step else 5))
    assert isinstance(caught.value, Unavailable) == (kind is Unavailable)
    assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(model.requests()) == 1


def test_nobody_there(folder):
    where = endpoint(f"http://127.0.0.1:{closed_port()}/v1")
    with pytest.raises(Unavailable, match="connection refused"):
        run(c.fetch_models(where))
    with pytest.raises(Unavailable, match="connection refused"):
        run(c.try_key(where))


def test_a_list_without_end_is_cut_off(model):
    model.script({"path": "/models", "body": '{"data": ["' + "x" * (17 << 20)})
    with pytest.raises(ProviderError, match="more than 16 MiB"):
        run(c.fetch_models(endpoint(model.url)))


# ---- is the key good ----


@pytest.mark.parametrize("provider", ["openai", "groq", "gemini", "mistral", "custom", "ollama"])
def test_a_good_key_lists_models(model, provider):
    model.script(REMOTE)
    assert run(c.try_key(endpoint(model.url, provider))) == "3 models"


def test_anthropic_tries_a_key_with_its_own_header(model):
    assert run(c.try_key(endpoint(model.url, "anthropic"))) == "3 models"
    assert model.requests()[0]["headers"]["x-api-key"] == KEY


PROBES = [  # provider, path of its API, path that tells
    ("openrouter", "/api/v1", "/api/v1/key"),
    ("opencode", "/zen/v1", "/zen/go/v1/usage"),
    ("opencode", "/zen/go/v1", "/zen/go/v1/usage"),
]


@pytest.mark.parametrize(("provider", "base", "path"), PROBES)
def test_a_public_list_tells_nothing_about_a_key(model, provider, base, path):
    where = endpoint(model.origin + base, provider)
    assert run(c.try_key(where)) == ""
    with pytest.raises(CredentialError, match=f"{provider} refused the key … from .A_KEY"):
        run(c.try_key(endpoint(model.origin + base, provider, "bad-key")))
    model.add({"path": path, "status": 404})
    with pytest.raises(ProviderError, match="cannot be tried"):
        run(c.try_key(where))
    assert {row["path"] for row in model.requests()} == {path}
    assert len(run(c.fetch_models(endpoint(model.origin + base.replace("/go", ""), provider, "")))) == 6


def test_zen_knows_a_key_that_has_no_go_subscription(model):
    body = {"type": "error", "error": {"type": "EntitlementError", "message": "OpenCode Go subscription required."}}
    model.script({"path": "/usage", "status": 403, "body": body})
    assert run(c.try_key(endpoint(model.origin + "/zen/v1", "opencode"))) == ""


def test_a_key_that_may_not_list_models_was_not_refused(model):
    with pytest.raises(ProviderError, match=r"cannot be tried.*Missing scopes"):
        run(c.try_key(endpoint(model.url, key="forbidden-key")))
    with pytest.raises(CredentialError, match="openai refused a request without a key"):
        run(c.try_key(endpoint(model.url, key="")))


@pytest.mark.parametrize("provider", ["custom", "ollama", "lmstudio"])
def test_a_server_without_a_list_cannot_tell(model, provider):
    model.script({"path": "/models", "status": 404})
    with pytest.raises(ProviderError, match="cannot be tried"):
        run(c.try_key(endpoint(model.url, provider)))


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "a\x7f"])
def test_a_key_that_is_none_never_travels(model, key):
    with pytest.raises(CredentialError, match="characters that no key has"):
        run(c.try_key(endpoint(model.url, key=key)))
    assert model.requests() == []


# ---- the cache ----


def test_a_list_is_kept_for_a_day(model, folder):
    model.script(REMOTE | {"times": -1})
    where, day = endpoint(model.url), datetime.timedelta(days=1)
    first = load(where, folder)
    assert (ids(first), first.note) == (["gpt-5.5", "gpt-5", "whisper-1"], "")
    assert first.models[0] == c.ModelInfo("gpt-5.5", 1_050_000, 5, 30, "", True, "remote")
    assert first.fetched_at == "2026-11-22T12:00:00.000Z"
    later = load(where, folder, NOW + datetime.timedelta(hours=3))
    assert later == first._replace(note="from the cache of 2026-11-22 12:00 UTC")
    assert len(model.requests()) == 1
    assert load(where, folder, NOW + day).note == "", "stale"
    assert load(where, folder, NOW + day, refresh=True).note == "", "asked for"
    assert load(where, folder, NOW - day).note == "", "a clock that went backwards"
    assert len(model.requests()) == 4


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_the_cache_is_private(model, folder):
    load(endpoint(model.url), folder)
    for path, mode in (
        (folder / "openai.json", 0o600),
        (folder, 0o700),
        (folder.parent, 0o700),
        (folder.parents[1], 0o700),
    ):
        assert path.stat().st_mode & 0o777 == mode, path


def test_a_cache_of_another_address_does_not_count(model, folder):
    load(endpoint(model.url), folder)
    model.script({"path": "/models", "models": ["other"]})
    assert ids(load(endpoint(model.origin + "/openai/v1"), folder)) == ["other"]
    gone = load(endpoint(f"http://127.0.0.1:{closed_port()}/v1"), folder)
    assert gone.fetched_at == "" and gone.note.startswith("built-in list: cannot reach http://127.0.0.1")
    assert gone.note.endswith("connection refused") and gone.models[0].source == "built in"


def test_an_old_cache_is_better_than_none(model, folder):
    load(endpoint(model.url), folder)
    model.script({"path": "/models", "body": "<html>", "times": -1})
    old = load(endpoint(model.url), folder, NOW + datetime.timedelta(days=4))
    assert old.note.startswith("from the cache of 2026-11-22 12:00 UTC: openai sent no list of models")
    assert old.fetched_at and old.models[0].source == "remote"
    assert (folder / "openai.json").is_file(), "a failure changes nothing"


def test_without_cache_and_built_in_list_there_is_nothing(folder):
    found = load(endpoint(f"http://127.0.0.1:{closed_port()}/v1", "ollama", ""), folder)
    assert found.models == () and found.note.startswith("no list: cannot reach")
    assert not folder.exists()


DAMAGES = [
    b"", b"{", b"null", b"[]", b"\xff\x00", b"[" * 100_000, b'{"base_url": 1}', b"<html>",
    b'["gpt-5"]',
    b'{"base_url": "x", "fetched_at": "yesterday", "data": ["a"]}',
    b'{"base_url": "x", "fetched_at": 5, "data": ["a"]}',
    b'{"base_url": "x", "fetched_at": "0001-01-01T00:00:00+23:59", "data": ["a"]}',
    b'{"base_url": "x", "fetched_at": "2026-11-22T12:00:00Z", "data": [{"id": "\\u001b[2J"}]}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_cache_is_said_and_put_aside(model, folder, text):
    folder.mkdir(parents=True)
    (folder / "openai.json").write_bytes(text)
    found = load(endpoint(model.url), folder)
    assert found.note == f"the cache was damaged; it was put aside as {folder / 'openai.json.damaged'}"
    assert (folder / "openai.json.damaged").read_bytes() == text
    assert "gpt-5" in ids(found) and load(endpoint(model.url), folder).note == "from the cache of 2026-11-22 12:00 UTC"


def test_a_cache_with_escape_codes_gives_none_of_them(model, folder):
    load(endpoint(model.url), folder)
    path = folder / "openai.json"
    table = json.loads(path.read_text())
    table["data"] += [{"id": "evil\x1b[31m"}, {"id": "fine", "status": "\x1b[31m", "pricing": {"input": "lots"}}]
    path.write_text(json.dumps(table))
    found = load(endpoint(model.url), folder)
    assert "fine" in ids(found) and "\x1b" not in repr(found)


def test_a_folder_that_takes_nothing_is_said(model, tmp_path):
    (tmp_path / "home").write_text("a file")
    found = load(endpoint(model.url), tmp_path / "home" / "cache" / "models")
    assert "; not cached: cannot write " in found.note and "gpt-5" in ids(found)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(model, folder):
    folder.mkdir(parents=True)
    (folder / "openai.json").write_text("damaged")
    folder.chmod(0o500)
    try:
        note = load(endpoint(model.url), folder).note
    finally:
        folder.chmod(0o700)
    assert "openai.json: Permission denied; not cached: cannot write" in note


def test_a_directory_in_the_cache_s_place(model, folder):
    (folder / "openai.json").mkdir(parents=True)
    note = load(endpoint(model.url), folder).note
    assert note.startswith("cannot use the cache ") and "; not cached: cannot write " in note


def test_what_a_cache_keeps_comes_back_as_it_was(folder):
    models = [info for provider, row, _ in VENDORS for info in parse(provider, row)]
    where, path = endpoint("http://x/v1", "custom"), folder / "custom.json"
    cached = c.Cached(where.base_url, NOW, list({info.id: info for info in models}.values()))
    assert c.write_cache(path, cached) == "" and c.read_cache(where, path) == (cached, "")


def test_a_list_that_needs_a_key_is_not_asked_for_without_one(model, folder):
    found = load(endpoint(model.url, key=""), folder)
    assert found.note.startswith("built-in list: no key for openai; set OPENAI_API_KEY") and model.requests() == []
    public = load(endpoint(model.origin + "/zen/v1", "opencode", ""), folder)
    assert public.note == "" and public.fetched_at


def test_a_refused_key_is_said_and_the_known_models_are_shown(model, folder):
    found = load(endpoint(model.url, key="bad-key"), folder)
    assert "built-in list: openai refused the key" in found.note and found.models[0].recommended


def test_offline_has_one_model(folder):
    where = c.endpoint_of("offline", AgentConfig(), {}, {})
    assert load(where, folder) == c.Catalogue("offline", (c.ModelInfo("shell", 0, 0, 0, "free"),))
    assert run(c.try_key(where)) == ""


# ---- showing ----


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(0, ""), (8_192, "8k"), (128_000, "128k"), (200_000, "200k"), (999_999, "999k"), (1_000_000, "1M"),
     (1_048_576, "1M"), (1_999_999, "1.9M"), (10_000_000, "10M")],
)  # fmt: skip
def test_contexts_as_they_are_shown(tokens, shown):
    assert c.shown_context(tokens) == shown


@pytest.mark.parametrize(
    ("prices", "shown"),
    [((1.25, 10), "$1.25 / $10"), ((0, 0), "$0 / $0"), ((None, None), ""), ((0.075, None), "$0.075 / ?"),
     ((2.5, 180), "$2.5 / $180"), ((0.05, 100), "$0.05 / $100")],
)  # fmt: skip
def test_prices_as_they_are_shown(prices, shown):
    assert c.shown_price(c.ModelInfo("m", 0, *prices)) == shown


def test_a_row_and_its_detail():
    info = c.ModelInfo("gpt-5-codex", 400_000, 1.07, 8.5, "", True, "remote")
    assert c.model_row(info) == ("gpt-5-codex", "★", "", "400k", "$1.07 / $8.5", "remote")
    assert c.detail(info, "opencode") == (
        "gpt-5-codex", "context: 400,000 tokens", "price for 1M tokens, in / out: $1.07 / $8.5", "format: responses",
        "recommended", "source: remote",
    )  # fmt: skip
    free = "\n".join(c.detail(c.ModelInfo("mimo-v2.5-free", status="free"), "opencode"))
    assert "only inside OpenCode" in free and "context: unknown" in free
    assert "only inside OpenCode" not in "\n".join(c.detail(c.ModelInfo("a:free", status="free"), "openrouter"))
    assert "format: none that openpista can chat in" in c.detail(c.ModelInfo("whisper-1", chats=False), "openai")
    for status in c.STATUSES:
        assert f"{status}: " in "\n".join(c.detail(c.ModelInfo("m", status=status), "custom"))


# ---- where a provider is ----


def test_an_endpoint_without_key_or_model():
    where = c.endpoint_of("lmstudio", AgentConfig(), {}, {})
    assert (where.base_url, where.model, where.key.value) == ("http://localhost:1234/v1", "", "")
    where = c.endpoint_of("openai", AgentConfig(), {"openai": Login("openai", "k" * 12, "http://a/v1")}, {})
    assert (where.base_url, where.key.value) == ("http://a/v1", "k" * 12)


# ---- the command ----


def test_models_list_shows_the_recommended_first(openpista, openai, model):
    model.script(REMOTE)
    done = openpista("models", "list", env=openai)
    assert done.returncode == 0
    head, first, *rest = done.stdout.splitlines()
    assert head.split()[:2] == ["MODEL", "STATUS"] and first.split() == "gpt-5.5 ★ 1M $5 / $30 remote".split()
    assert len(rest) == 1 and done.stderr == "1 model left out; `openpista models list --all` lists all\n"
    done = openpista("models", "list", "--all", env=openai)
    assert "whisper-1" in done.stdout and done.stderr.startswith("from the cache of 20")
    model.script(REMOTE | {"models": ["new"]})
    done = openpista("models", "list", "--refresh", "--json", env=openai)
    answer = json.loads(done.stdout)
    assert (answer["provider"], answer["note"], [row["id"] for row in answer["models"]]) == ("openai", "", ["new"])
    assert answer["fetched_at"].startswith("20") and done.stderr == ""


def test_models_list_when_nothing_is_configured(openpista):
    gone = {"OPENPISTACRAB_BASE_URL": ""}
    done = openpista("models", "list", env=gone | {"HTTPS_PROXY": f"http://127.0.0.1:{closed_port()}"})
    assert done.returncode == 0 and "gpt-5-codex" in done.stdout and "gemini-" not in done.stdout
    assert "no provider is configured: these are OpenCode Zen's models, as far as they are known without" in done.stderr
    done = openpista("models", "list", "--refresh", env=gone | {"HTTPS_PROXY": f"http://127.0.0.1:{closed_port()}"})
    assert done.returncode == 0 and "cannot reach" in done.stderr


def test_models_list_of_a_provider_without_a_key(openpista):
    done = openpista("models", "list", "--provider", "anthropic")
    assert done.returncode == 0 and "claude-sonnet-5" in done.stdout
    assert "built-in list: no key for anthropic; set ANTHROPIC_API_KEY" in done.stderr
    done = openpista("models", "list", "--provider", "offline", "--json")
    assert [row["id"] for row in json.loads(done.stdout)["models"]] == ["shell"]


@pytest.mark.parametrize(
    ("provider", "code", "said"),
    [("opnai", 2, "unknown provider 'opnai', did you mean 'openai'?"), ("custom", 2, "custom needs an address")],
)
def test_models_list_of_a_provider_that_is_nowhere(openpista, provider, code, said):
    done = openpista("models", "list", "--provider", provider)
    assert done.returncode == code and said in done.stderr


def test_models_list_where_nothing_is_known(openpista):
    env = {"OLLAMA_HOST": f"127.0.0.1:{closed_port()}"}
    done = openpista("models", "list", "--provider", "ollama", "--json", env=env)
    assert done.returncode == 1 and "no list: cannot reach" in json.loads(done.stdout)["error"]


def test_models_list_passes_no_escape_codes_on(openpista, openai, model):
    model.script({"path": "/models", "models": ["evil\x1b]0;pwned\x07", "fine"]})
    done = openpista("models", "list", env=openai)
    assert "\x1b" not in done.stdout + done.stderr and "fine" in done.stdout and "evil" not in done.stdout


def test_models_list_of_ten_thousand(openpista, openai, model):
    model.script({"path": "/models", "models": [f"model-{i}" for i in range(10_000)]})
    start = time.monotonic()
    done = openpista("models", "list", env=openai)
    assert len(done.stdout.splitlines()) == 10_001 and time.monotonic() - start < 10
