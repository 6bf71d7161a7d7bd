"""The fake model server tells the truth: it answers as documented, and it refuses what the vendors refuse.

The last section drives it with the vendors' own client libraries, where they are installed.
"""

import http.client
import json
import socket
import time
from base64 import b64encode

import pytest
from fakes import IMAGE_STARTS, ModelServer, check_steps


@pytest.fixture(scope="module")
def server():
    """One of its own: what a vendor refuses depends on what it has said before."""
    with ModelServer() as server:
        yield server


OPENAI = {"authorization": "Bearer key", "content-type": "application/json"}
ANTHROPIC = {"x-api-key": "key", "anthropic-version": "2023-06-01", "content-type": "application/json"}
USER = {"role": "user", "content": "hello"}
RUN = {"name": "system_run", "arguments": {"command": "echo 'ü'"}}
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
CHAT_TOOLS = [{"type": "function", "function": {"name": "system_run", "parameters": SCHEMA}}]
RESPONSES_TOOLS = [{"type": "function", "name": "system_run", "parameters": SCHEMA, "strict": False}]
MESSAGES_TOOLS = [{"name": "system_run", "input_schema": SCHEMA}]
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def body_for(kind, **more):
    """The smallest sound request of a kind."""
    said = {"input": "hello"} if kind == "responses" else {"messages": [USER]}
    return {"model": "m1", **({"max_tokens": 100} if kind == "messages" else {}), **said, **more}


def ask(model, kind, body=None, headers=None, path=None):
    """(status, headers, raw body)"""
    connection = http.client.HTTPConnection(model.origin.removeprefix("http://"), timeout=10)
    raw = body if isinstance(body, bytes) else json.dumps(body if body is not None else body_for(kind))
    headers = (ANTHROPIC if kind == "messages" else OPENAI) if headers is None else headers
    try:
        connection.request("POST", path or PATHS[kind], raw, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def stream(model, kind, **more):
    """[(event name, data), ...] of a stream."""
    status, _, raw = ask(model, kind, body_for(kind, stream=True, **more))
    assert status == 200, raw
    return events(raw)


def events(raw):
    rows = []
    for block in raw.decode().replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        fields = dict(line.replace(": ", ":", 1).split(":", 1) for line in lines)
        if fields:
            data = fields["data"]
            rows.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return rows


def calls_of(rows):
    """The tool call deltas of a chat stream."""
    deltas = [data["choices"][0]["delta"] for _, data in rows if data != "[DONE]" and data["choices"]]
    return [call for delta in deltas for call in delta.get("tool_calls") or ()]


# ---- what it refuses ----


def chat_call(call_id="c1", **more):
    function = {"name": "system_run", "arguments": "{}"} | more
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def chat_result(call_id="c1"):
    return {"role": "tool", "tool_call_id": call_id, "content": "ok"}


def chat_picture(url, **more):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url} | more}]}


PNG = f"data:image/png;base64,{b64encode(IMAGE_STARTS['png'] + b'a').decode()}"


def tool(**more):
    return [{"type": "function", "function": {"name": "t", "parameters": SCHEMA} | more}]


WRONG_CHAT = [
    ({"model": ""}, "you must provide a model"),
    ({"foo": 1}, "Unknown parameter: 'foo'"),
    ({"messages": []}, "empty array"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": None}]}, "got null"),
    ({"messages": [USER | {"id": 7}]}, "messages[0].id"),
    ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]}, "input_text"),
    ({"messages": [chat_picture("data:image/bmp;base64,Qk0=")]}, "base64-encoded data URL"),
    ({"messages": [chat_picture(PNG[:-1])]}, "does not represent a valid image"),
    ({"messages": [chat_picture(f"data:image/png;base64,{b64encode(b'text').decode()}")]}, "a valid image"),
    ({"messages": [chat_picture(PNG, name="x")]}, "image_url.name"),
    ({"model": "blind", "messages": [chat_picture(PNG)]}, "only supported by certain models"),
    ({"messages": [USER, chat_call()]}, "must be followed by tool messages"),
    ({"messages": [USER, chat_call(), USER, chat_result()]}, "must be followed by tool messages"),
    ({"messages": [USER, chat_call(), chat_result(), chat_result()]}, "must be a response to a preceeding"),
    ({"messages": [USER, chat_result()]}, "must be a response to a preceeding"),
    ({"messages": [USER, chat_call(arguments={}), chat_result()]}, "expected a string, but got dict"),
    ({"messages": [USER, chat_call(arguments="{"), chat_result()]}, "not a JSON object"),
    ({"messages": [USER, chat_call(arguments="[]"), chat_result()]}, "not a JSON object"),
    ({"messages": [USER, chat_call(name="system.run"), chat_result()]}, "pattern"),
    ({"messages": [USER, chat_call("c" * 41), chat_result("c" * 41)]}, "maximum length 40"),
    ({"messages": [USER, {"role": "assistant", "content": "x", "reasoning_content": "y"}]}, "reasoning_content"),
    ({"tools": []}, "empty array"),
    ({"tools": tool(name="system.run")}, "pattern"),
    ({"tools": tool(name="t" * 65)}, "pattern"),
    ({"tools": tool(parameters={})}, "schema must be"),
    ({"tools": tool(parameters={"type": "object", "properties": {"a": {"type": "array"}}})}, "missing items"),
    ({"tools": tool(strict=True)}, "additionalProperties"),
    ({"tools": RESPONSES_TOOLS}, "Unknown parameter"),
    ({"tool_choice": "auto"}, "only allowed when 'tools'"),
    ({"stream_options": {"include_usage": True}}, "only allowed when 'stream'"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"model": "gpt-5-mini", "max_tokens": 10}, "Use 'max_completion_tokens' instead"),
    ({"model": "o4-mini", "max_tokens": 10}, "Use 'max_completion_tokens' instead"),
    ({"model": "old-1", "max_completion_tokens": 10}, "max_completion_tokens"),
    ({"model": "gpt-5-codex"}, "only supported in v1/responses"),
    ({"model": "missing-1"}, "does not exist"),
]

CALL = {"type": "function_call", "call_id": "c1", "name": "system_run", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "ok"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": []}

WRONG_RESPONSES = [
    ({"messages": [USER]}, "moved to 'input'"),
    ({"max_tokens": 100}, "moved to 'max_output_tokens'"),
    ({"max_output_tokens": 10}, "Expected a value >= 16"),
    ({"input": []}, "empty array"),
    ({"input": None}, "Missing required parameter: 'input'"),
    ({"input": [USER, CALL]}, "No tool output found for function call c1"),
    ({"input": [USER, OUTPUT]}, "No tool call found"),
    ({"input": [USER, OUTPUT, CALL]}, "No tool call found"),
    ({"input": [USER, CALL, OUTPUT, OUTPUT]}, "Duplicate"),
    ({"input": [USER, CALL | {"id": "call_1"}, OUTPUT]}, "begins with 'fc'"),
    ({"input": [USER, CALL | {"arguments": {}}, OUTPUT]}, "expected a string"),
    ({"input": [USER, CALL | {"foo": 1}, OUTPUT]}, "input[1].foo"),
    ({"input": [{"role": "tool", "content": "x"}]}, "Invalid value: 'tool'"),
    ({"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]}, "'output_text'"),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "'input_text'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": {"url": PNG}}]}]}, "image_url'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG[:-2]}]}]}, "a valid image"),
    ({"input": [USER, THOUGHT]}, "without its required following item"),
    ({"input": [USER, THOUGHT, CALL, OUTPUT], "store": False}, "not persisted"),
    ({"tools": CHAT_TOOLS}, "tools[0].name"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage"),
    ({"model": "o3", "temperature": 0.5}, "temperature"),
    ({"previous_response_id": "resp_1"}, "not found"),
]


def block(role, *blocks):
    return {"role": role, "content": list(blocks)}


def picture(data="", kind="image/png", **more):
    source = {"type": "base64", "media_type": kind, "data": data or PNG.partition(",")[2]}
    return {"messages": [block("user", {"type": "image", "source": source | more})]}


USE = {"type": "tool_use", "id": "t1", "name": "system_run", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "ok"}
TEXT = {"type": "text", "text": "hello"}

WRONG_MESSAGES = [
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"foo": 1}, "foo: Extra inputs"),
    ({"messages": []}, "at least one message"),
    ({"messages": [{"role": "system", "content": "x"}, USER]}, "top-level `system`"),
    ({"messages": [{"role": "assistant", "content": "x"}, USER]}, "first message"),
    ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "prefill"),
    ({"messages": [{"role": "user", "content": ""}]}, "non-empty"),
    ({"messages": [block("user", {"type": "text", "text": ""})]}, "text content blocks must be non-empty"),
    ({"messages": [block("user", {"type": "text", "text": " \n"})]}, "non-whitespace"),
    ({"messages": [block("user", TEXT | {"id": 1})]}, "text.id: Extra inputs"),
    (picture(kind="image/jpeg"), "does not match the provided media type"),
    (picture(kind="image/bmp"), "media_type: Input should be one of"),
    (picture("Qk0="), "Could not process image"),
    (picture("A" * ((10 << 20) + 4)), "image exceeds 10 MB maximum"),
    (picture(path="/x"), "path: Extra inputs"),
    ({"messages": [USER, block("assistant", USE), block("user", TEXT)]}, "without `tool_result` blocks"),
    ({"messages": [USER, block("assistant", USE), block("user", TEXT, RESULT)]}, "must come first"),
    ({"messages": [USER, block("assistant", USE), block("user", RESULT, RESULT)]}, "single result"),
    ({"messages": [USER, block("assistant", TEXT), block("user", RESULT)]}, "unexpected `tool_use_id`"),
    ({"messages": [USER, block("assistant", USE | {"input": "{}"}), block("user", RESULT)]}, "valid dictionary"),
    ({"messages": [USER, block("assistant", USE | {"id": "a:b"}), block("user", RESULT)]}, "should match pattern"),
    ({"messages": [USER, block("assistant", USE | {"name": "a.b"}), block("user", RESULT)]}, "should match pattern"),
    ({"messages": [block("user", USE)]}, "does not match any of the expected tags"),
    ({"tools": CHAT_TOOLS}, "Extra inputs"),
    ({"tools": [{"name": "a", "input_schema": {}}]}, "should be 'object'"),
    ({"tools": MESSAGES_TOOLS * 2}, "unique"),
    ({"temperature": 1.5}, "temperature"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "greater than `thinking.budget_tokens`"),
    ({"model": "missing"}, "model: missing"),
    (
        {"messages": [USER, block("assistant", {"type": "thinking", "thinking": "a", "signature": "b"}), USER]},
        "Invalid `signature`",
    ),
]
WRONG = [("chat", *row) for row in WRONG_CHAT]
WRONG += [("responses", *row) for row in WRONG_RESPONSES]
WRONG += [("messages", *row) for row in WRONG_MESSAGES]


@pytest.mark.parametrize("kind, change, expected", WRONG)
def test_it_refuses_what_the_vendor_refuses(model, kind, change, expected):
    model.script({"text": "never"})
    status, _, raw = ask(model, kind, body_for(kind) | change)
    assert 400 <= status < 500
    error = json.loads(raw)["error"]
    assert expected in error["message"]
    assert set(error) == ({"type", "message"} if kind == "messages" else {"message", "type", "param", "code"})
    assert model.left() == 1  # a refused request takes nothing from the script


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 100_000])
def test_it_refuses_what_is_not_json(model, kind, raw):
    assert ask(model, kind, raw)[0] == 400


@pytest.mark.parametrize(
    "key, status, expected",
    [
        (None, 401, {"chat": "didn't provide an API key", "messages": "x-api-key header is required"}),
        ("", 401, {"chat": "didn't provide an API key", "messages": "x-api-key header is required"}),
        ("bad-key", 401, {"chat": "Incorrect API key", "messages": "invalid x-api-key"}),
        ("forbidden-key", 403, {"chat": "insufficient permissions", "messages": "does not have permission"}),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "messages"])
def test_it_wants_a_key(model, kind, key, status, expected):
    name, lead = ("x-api-key", "") if kind == "messages" else ("authorization", "Bearer ")
    headers = dict(ANTHROPIC if kind == "messages" else OPENAI)
    del headers[name]
    got, _, raw = ask(model, kind, headers=headers | ({} if key is None else {name: lead + key}))
    assert (got, expected[kind] in raw.decode()) == (status, True)


def test_it_wants_a_version_and_a_path_it_knows(model):
    headers = {name: value for name, value in ANTHROPIC.items() if name != "anthropic-version"}
    assert b"anthropic-version: header is required" in ask(model, "messages", headers=headers)[2]
    assert b"not a valid version" in ask(model, "messages", headers=ANTHROPIC | {"anthropic-version": "2024-01-01"})[2]
    assert ask(model, "chat", path="/v1/v1/chat/completions")[0] == 404
    assert ask(model, "chat", path="/chat/completions")[0] == 404
    assert ask(model, "chat", path="/openai/v1/chat/completions")[0] == 200


def test_anthropic_versions(model):
    warm, bearer = body_for("messages", temperature=1), {"authorization": "Bearer key"} | ANTHROPIC
    del bearer["x-api-key"]
    newest = bearer | {"anthropic-version": "2026-10-21"}
    assert ask(model, "messages", warm, bearer)[0] == 200
    assert ask(model, "messages", headers=newest)[0] == 200
    assert b"temperature: Extra inputs are not permitted" in ask(model, "messages", warm, newest)[2]


SOUND = [
    ("chat", {"messages": [USER, chat_call(), chat_result(), {"role": "assistant", "content": "x"}, USER]}),
    ("chat", {"messages": [USER, chat_call(), chat_result(), USER], "tools": CHAT_TOOLS, "tool_choice": "none"}),
    ("chat", {"model": "gpt-5", "max_completion_tokens": 10}),
    ("chat", {"messages": [chat_picture(PNG, detail="low"), chat_picture("https://example.com/a.png")]}),
    ("responses", {"input": [block("user", {"type": "input_image", "image_url": PNG, "detail": "auto"})]}),
    ("messages", picture()),
    ("responses", {"input": [USER, CALL, OUTPUT], "tools": RESPONSES_TOOLS, "instructions": "be brief"}),
    ("responses", {"input": [USER, THOUGHT, CALL, OUTPUT]}),
    ("messages", {"messages": [USER, USER], "system": "be brief", "tools": MESSAGES_TOOLS}),
    ("messages", {"messages": [USER, block("assistant", TEXT, USE), block("user", RESULT, TEXT)]}),
    ("messages", {"messages": [USER, block("assistant", USE), block("user", RESULT), USER]}),
]


@pytest.mark.parametrize("kind, change", SOUND)
def test_it_accepts_what_the_vendor_accepts(model, kind, change):
    status, _, raw = ask(model, kind, body_for(kind) | change)
    assert status == 200, raw


# ---- the script ----


def test_steps_answer_in_order_and_by_model(model):
    model.script({"text": "for m2", "model": "m2"}, {"text": "one"}, {"text": "twice", "times": 2})

    def said(name):
        return json.loads(ask(model, "chat", body_for("chat", model=name))[2])["choices"][0]["message"]["content"]

    assert [said("m1"), said("m1"), said("m2"), said("m2"), said("m1")] == ["one", "twice", "for m2", "twice", "done"]
    model.add({"text": "again"}, {"text": "always", "default": True})
    assert model.left() == 1
    assert [said("m1"), said("m1"), said("m1")] == ["again", "always", "always"]


def test_echo_result_and_expect(model):
    model.script({"echo": True, "expect": ["hello"]}, {"tool_result_text": True}, {"text": "x", "expect": "absent"})
    assert b'"content":"hello"' in ask(model, "chat")[2]
    messages = [USER, chat_call(), chat_result()]
    assert b'"content":"ok"' in ask(model, "chat", body_for("chat", messages=messages))[2]
    status, _, raw = ask(model, "chat")
    assert (status, b"'absent'" in raw, model.left()) == (400, True, 1)


def test_the_record(model):
    ask(model, "responses")
    ask(model, "chat", b"{")
    first, second = model.requests()
    assert (first["path"], first["body"]["input"], first["status"]) == ("/v1/responses", "hello", 200)
    assert first["headers"]["authorization"] == "Bearer key"
    assert first["size"] == len(json.dumps(body_for("responses")))
    assert 0 <= time.monotonic() - second["time"] < 5
    assert (second["body"], second["status"]) == (None, 400)
    assert len(model.bodies()) == 2


def test_a_misspelt_step_is_an_error(model):
    with pytest.raises(ValueError, match="txet"):
        model.script({"txet": "x"})
    with pytest.raises(ValueError, match="no_such"):
        model.add({"quirks": ["no_such"]})
    check_steps([{"text": "x", "quirks": ["crlf"]}])


def test_models(model):
    def listed(headers, query=""):
        connection = http.client.HTTPConnection(model.origin.removeprefix("http://"))
        connection.request("GET", "/v1/models" + query, headers=headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    assert listed({})[0] == 401
    assert listed(OPENAI)[1]["data"][0]["object"] == "model"
    page = listed(ANTHROPIC, "?limit=2")[1]
    assert (len(page["data"]), page["has_more"]) == (2, True)
    assert listed(ANTHROPIC, f"?limit=2&after_id={page['last_id']}")[1]["has_more"] is False
    model.script({"text": "for a question"}, {"path": "/models", "models": ["a"], "bare": True})
    assert [row["id"] for row in listed(OPENAI)[1]] == ["a"]
    assert model.left() == 1


# ---- what it answers ----


def test_chat_stream(model):
    model.script({"text": "hello wörld", "tool_calls": [RUN], "usage": {"input": 9, "output": 4, "cached": 3}})
    rows = stream(model, "chat", stream_options={"include_usage": True}, tools=CHAT_TOOLS)
    deltas = [data["choices"][0]["delta"] for _, data in rows[:-2]]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello wörld"
    first, *rest = calls_of(rows[:-2])
    assert (first["index"], first["type"], first["function"]) == (
        0,
        "function",
        {"name": "system_run", "arguments": ""},
    )
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest)
    assert json.loads("".join(call["function"]["arguments"] for call in rest)) == RUN["arguments"]
    assert rows[-3][1]["choices"][0]["finish_reason"] == "tool_calls"
    assert (rows[-2][1]["choices"], rows[-2][1]["usage"]["total_tokens"], rows[-1][1]) == ([], 13, "[DONE]")
    assert not any(data["choices"] == [] for _, data in stream(model, "chat")[:-1])  # only when asked


def test_responses_stream(model):
    model.script({"reasoning": "hm", "text": "hello", "tool_calls": [RUN], "deltas": 1})
    rows = stream(model, "responses")
    assert [data["sequence_number"] for _, data in rows] == list(range(len(rows)))
    assert all(name == data["type"] for name, data in rows)
    assert [name.removeprefix("response.") for name, _ in rows] == [
        *("created", "in_progress"),
        *("output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"),
        *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    response = rows[-1][1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert response["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    "finish, status, reason",
    [
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
        ("failed",) * 2 + (None,),
    ],
)
def test_responses_that_end_otherwise(model, finish, status, reason):
    model.script({"text": "half", "finish": finish})
    name, data = stream(model, "responses")[-1]
    assert (name, data["response"]["status"]) == (f"response.{status}", status)
    assert (data["response"]["incomplete_details"] or {}).get("reason") == reason
    assert bool(data["response"]["error"]) == (status == "failed")


def test_messages_stream(model):
    model.script({"reasoning": "hm", "text": "hello", "tool_calls": [RUN], "deltas": 1})
    rows = stream(model, "messages")
    assert all(name == data["type"] for name, data in rows)
    kinds = [data.get("delta", {}).get("type") or name for name, data in rows]
    assert kinds == [
        *("message_start", "content_block_start", "ping", "thinking_delta", "signature_delta", "content_block_stop"),
        *("content_block_start", "text_delta", "content_block_stop"),
        *("content_block_start", "input_json_delta", "input_json_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert rows[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


# ---- what must come back ----


def test_gemini_wants_its_signature_back(model):
    model.script({"tool_calls": [RUN, RUN], "quirks": ["extra_content"]})
    calls = json.loads(ask(model, "chat")[2])["choices"][0]["message"]["tool_calls"]
    results = [chat_result(call["id"]) for call in calls]

    def again(calls):
        messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
        return ask(model, "chat", body_for("chat", messages=messages))

    bare = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    assert "extra_content" in calls[0] and "extra_content" not in calls[1]
    assert again(calls)[0] == 200
    assert b"thought_signature" in again(bare)[2]


def test_deepseek_wants_its_reasoning_back(model):
    model.script({"tool_calls": [RUN], "reasoning": "hm", "quirks": ["reasoning_required"]})
    message = json.loads(ask(model, "chat")[2])["choices"][0]["message"]
    answer = {key: message[key] for key in ("role", "content", "tool_calls")}
    result = chat_result(message["tool_calls"][0]["id"])
    for more, status in (({}, 400), ({"reasoning_content": "hm"}, 200)):
        assert ask(model, "chat", body_for("chat", messages=[USER, answer | more, result]))[0] == status


def test_mistral_wants_short_ids(model):
    model.script({"tool_calls": [RUN], "quirks": ["mistral_ids"]}, {"text": "x", "quirks": ["mistral_ids"]})
    message = json.loads(ask(model, "chat")[2])["choices"][0]["message"]
    own = message["tool_calls"][0]["id"]
    assert len(own) == 9 and own.isalnum()
    assert ask(model, "chat", body_for("chat", messages=[USER, chat_call(), chat_result()]))[0] == 400
    assert ask(model, "chat", body_for("chat", messages=[USER, chat_call(own), chat_result(own)]))[0] == 200


def test_anthropic_wants_its_thinking_back(model):
    model.script({"reasoning": "hm", "tool_calls": [RUN]})
    thinking, use = json.loads(ask(model, "messages")[2])["content"]
    result = block("user", RESULT | {"tool_use_id": use["id"]})
    for blocks, status in (((thinking, use), 200), ((use,), 400)):
        messages = [USER, block("assistant", *blocks), result]
        assert ask(model, "messages", body_for("messages", messages=messages))[0] == status
    # an older turn may do without
    messages = [USER, block("assistant", use), result, block("assistant", TEXT), USER]
    assert ask(model, "messages", body_for("messages", messages=messages))[0] == 200


def test_responses_wants_its_reasoning_back(model):
    model.script({"reasoning": "hm", "tool_calls": [RUN]})
    thought, call = json.loads(ask(model, "responses")[2])["output"]
    output = OUTPUT | {"call_id": call["call_id"]}
    for items, status in (((thought, call), 200), ((call,), 400)):
        assert ask(model, "responses", body_for("responses", input=[USER, *items, output], store=False))[0] == status


# ---- quirks ----


@pytest.mark.parametrize(
    "quirk, holds",
    [
        ("no_index", lambda calls: not any("index" in call for call in calls)),
        ("no_id", lambda calls: not any("id" in call for call in calls)),
        ("all_index_0", lambda calls: {call["index"] for call in calls} == {0}),
        ("whole_call", lambda calls: len(calls) == 2 and calls[1]["index"] == 1),
        ("arguments_object", lambda calls: calls[0]["function"]["arguments"] == RUN["arguments"]),
        ("empty_arguments", lambda calls: [call["function"]["arguments"] for call in calls] == ["", ""]),
        ("name_repeated", lambda calls: {call["function"]["name"] for call in calls} == {"system_run"}),
        ("name_split", lambda calls: [call["function"].get("name") for call in calls[:2]] == ["syste", "m_run"]),
        ("id_repeated", lambda calls: all("id" in call for call in calls)),
    ],
)
def test_tool_call_quirks(model, quirk, holds):
    model.script({"tool_calls": [RUN, RUN], "quirks": [quirk]})
    assert holds(calls_of(stream(model, "chat")))


def test_other_quirks(model):
    def first(quirk, **step):
        model.script({"text": "hello", "quirks": [quirk], **step})
        return ask(model, "chat", body_for("chat", stream=True))[2]

    assert first("crlf").count(b"\r\n") == first("crlf").count(b"\n") > 0
    assert b": OPENROUTER PROCESSING\n\ndata: {" in first("keepalive_comments")
    assert b"data:{" in first("no_space")
    assert b'"content":[{"type":"text","text":"' in first("content_list")
    assert b'"finish_reason":"stop"' in first("finish_stop", tool_calls=[RUN])
    assert b'"reasoning":"hm"' in first("reasoning_key", reasoning="hm", deltas=1)
    assert b'"finish_reason":"stop"' not in first("no_finish")
    assert b'"tool_calls":null' in first("nulls")
    assert b'"usage":{' in first("usage_in_finish")
    assert b'"choices":[]' in first("unknown_events")


# ---- faults ----


@pytest.mark.parametrize("kind", PATHS)
def test_plain_answers(model, kind):
    model.script(
        {"status": 429, "headers": {"Retry-After": "2"}},
        {"status": 529},
        {"status": 200, "body": "<html>"},
        {"status": 307, "headers": {"Location": "/elsewhere"}},
        {"overflow": True},
        {"context": 10},
    )
    status, headers, raw = ask(model, kind)
    assert (status, headers["retry-after"], "error" in json.loads(raw)) == (429, "2", True)
    assert ask(model, kind)[0] == 529
    status, headers, raw = ask(model, kind)
    assert (status, headers["content-type"], raw) == (200, "text/html; charset=utf-8", b"<html>")
    status, headers, _ = ask(model, kind)
    assert (status, headers["location"]) == (307, "/elsewhere")
    assert [ask(model, kind)[0] for _ in range(3)] == [400, 400, 400]
    assert model.left() == 1  # the last step waits for a shorter request


def ended_early(model, kind, **step):
    """What a stream gave before it broke off, or None if it did not."""
    model.script({"text": "hello there", **step})
    try:
        ask(model, kind, body_for(kind, stream=True))
    except http.client.IncompleteRead as error:
        return error.partial
    except (ConnectionError, http.client.HTTPException):
        return b""


@pytest.mark.parametrize("kind", PATHS)
def test_broken_streams(model, kind):
    assert len(events(ended_early(model, kind, cut=2))) == 2
    assert len(ended_early(model, kind, cut_bytes=100)) == 100
    assert ended_early(model, kind, refuse=True) == b""
    assert ended_early(model, kind, cut=2, reset=True) is not None
    assert ended_early(model, kind, cut=2, clean=True) is None
    assert ended_early(model, kind, cut=2, close_delimited=True) is None


def test_odd_streams(model):
    def got(kind="chat", **step):
        model.script({"text": "hellö there", **step})
        return ask(model, kind, body_for(kind, stream=True))[2]

    assert b"[DONE]" not in got(no_done=True)
    assert b"response.completed" not in got("responses", no_done=True)
    assert b"message_stop" not in got("messages", no_done=True)
    assert events(got(error_event="boo"))[-1] == (
        None,
        {"error": {"message": "boo", "type": "server_error", "param": None, "code": None}},
    )
    assert events(got("messages", error_event=True))[-1][1]["error"]["type"] == "overloaded_error"
    assert events(got("responses", error_event=True))[-1][0] == "error"
    assert max(map(len, got(long_line=100_000).split(b"\n"))) > 100_000
    assert got(raw="data: \udcff\n\n") == b"data: \xff\n\n"
    assert len(got(garbage=10_000)) >= 10_000
    assert "hellö" in "".join(data["choices"][0]["delta"].get("content", "") for _, data in events(got(split=1))[:-1])


def test_silence(model):
    def taken(**step):
        model.script({"text": "a b", **step})
        start = time.monotonic()
        stream(model, "chat")
        return time.monotonic() - start

    assert taken() < 0.1 < taken(delay=0.15)
    assert taken(stall=0.15) > 0.14
    assert taken(pace=0.05) > 0.14


def test_it_notices_a_client_that_leaves(model):
    model.script({"text": "never", "stall": 60})
    with socket.create_connection(("127.0.0.1", int(model.origin.rpartition(":")[2]))) as client:
        body = json.dumps(body_for("chat", stream=True)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    end = time.monotonic() + 5
    while not model.requests()[0]["gone"]:
        assert time.monotonic() < end


def test_it_is_quick_and_keeps_connections(model):
    connection = http.client.HTTPConnection(model.origin.removeprefix("http://"), timeout=10)
    body, times = json.dumps(body_for("chat", stream=True)), []
    for _ in range(50):
        start = time.perf_counter()
        connection.request("POST", PATHS["chat"], body, OPENAI)
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        times.append(time.perf_counter() - start)
    assert sorted(times)[5] < 0.02  # about 1 ms on an idle machine; 40 each if one side waited for the other
    assert len({row["connection"] for row in model.requests()}) == 1


# ---- the vendors' own libraries ----


@pytest.fixture
def openai(model):
    library = pytest.importorskip("openai")
    with library.OpenAI(api_key="key", base_url=model.url, max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic(model):
    library = pytest.importorskip("anthropic")
    with library.Anthropic(api_key="key", base_url=model.origin, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_chat(model, openai, streamed):
    model.script({"text": "let me see", "tool_calls": [RUN, RUN]}, {"tool_result_text": True})
    messages = [USER]

    def turn():
        if not streamed:
            return openai.chat.completions.create(model="m1", messages=messages, tools=CHAT_TOOLS)
        with openai.chat.completions.stream(
            model="m1", messages=messages, tools=CHAT_TOOLS, stream_options={"include_usage": True}
        ) as events:
            return events.get_final_completion()

    answer = turn()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.total_tokens > 0
    message = answer.choices[0].message
    assert json.loads(message.tool_calls[1].function.arguments) == RUN["arguments"]
    # parsed and annotations are the library's; the API takes neither back
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}}
        for c in message.tool_calls
    ]
    messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
    messages += [chat_result(call.id) for call in message.tool_calls]
    assert turn().choices[0].message.content == "ok"


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_responses(model, openai, streamed):
    model.script({"reasoning": "hm", "text": "let me see", "tool_calls": [RUN]}, {"tool_result_text": True})
    items = [USER]

    def turn():
        asked = {"model": "m1", "input": items, "tools": RESPONSES_TOOLS, "store": False}
        if not streamed:
            return openai.responses.create(**asked)
        with openai.responses.stream(**asked) as events:
            return events.get_final_response()

    answer = turn()
    assert (answer.status, answer.output_text) == ("completed", "let me see")
    assert answer.usage.total_tokens > 0
    call = answer.output[-1]
    assert json.loads(call.arguments) == RUN["arguments"]
    known = ("id", "type", "summary", "encrypted_content", "status", "content", "role", "call_id", "name", "arguments")
    items += [item.model_dump(exclude_none=True, include=set(known)) for item in answer.output]
    items.append(OUTPUT | {"call_id": call.call_id})
    assert turn().output_text == "ok"


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropic_messages(model, anthropic, streamed):
    model.script({"reasoning": "hm", "text": "let me see", "tool_calls": [RUN]}, {"tool_result_text": True})
    messages = [USER]

    def turn():
        asked = {"model": "claude-x", "max_tokens": 100, "messages": messages, "tools": MESSAGES_TOOLS}
        if not streamed:
            return anthropic.messages.create(**asked)
        with anthropic.messages.stream(**asked) as events:
            return events.get_final_message()

    answer = turn()
    assert answer.stop_reason == "tool_use"
    assert [part.type for part in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.content[-1].input == RUN["arguments"]
    assert answer.usage.output_tokens > 0
    known = {"type", "thinking", "signature", "text", "id", "name", "input"}
    blocks = [part.model_dump(exclude_none=True, include=known) for part in answer.content]
    messages += [block("assistant", *blocks), block("user", RESULT | {"tool_use_id": answer.content[-1].id})]
    assert turn().content[0].text == "ok"


def test_the_libraries_know_the_errors(model, openai, anthropic):
    import anthropic as anthropic_library
    import openai as openai_library

    for status, name in ((401, "AuthenticationError"), (403, "PermissionDeniedError"), (429, "RateLimitError")):
        model.script({"status": status, "times": 2})
        with pytest.raises(getattr(openai_library, name)) as caught:
            openai.chat.completions.create(model="m1", messages=[USER])
        assert caught.value.request_id.startswith("req_")
        with pytest.raises(getattr(anthropic_library, name)):
            anthropic.messages.create(model="m1", max_tokens=100, messages=[USER])
    assert [row.id for row in openai.models.list()][:2] == ["gpt-4o-mini", "gpt-5"]
    assert [row.id for row in anthropic.models.list(limit=1)][0] == "claude-opus-4-5"
