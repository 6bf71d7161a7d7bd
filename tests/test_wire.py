"""Wire: values to JSON and back, in three formats; every bend of a vendor has its recorded stream in data/streams."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpista import (
    FORMATS,
    Completion,
    ContextTooLong,
    Image,
    Message,
    PistaError,
    ProviderError,
    Request,
    Role,
    SSEDecoder,
    ToolCall,
    ToolSpec,
    Unavailable,
    Usage,
    described,
    encode_chat,
    encode_messages,
    encode_responses,
    error_of,
    marked,
    parse_arguments,
    reasons,
    to_json,
    vendor_message,
    wire_id,
    wire_name,
    wire_names,
)

STREAMS = Path(__file__).parent / "data" / "streams"
NAMES = {"system.run": "system_run", "skill.read": "skill_read"}
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
TOOLS = (ToolSpec("system.run", "Run it.", SCHEMA), ToolSpec("skill.read", "Read it.", {"type": "object"}))


# Server-sent events


def sse(raw, sizes=()):
    """The events of raw, fed in portions of these sizes and then the rest."""
    decoder, found, at = SSEDecoder(), [], 0
    for size in (*sizes, len(raw)):
        found += decoder.feed(raw[at : at + size])
        at += size
    return found


EVENTS = [
    (b"data: one\n\n", [("", "one")]),
    (b"data:one\n\n", [("", "one")]),
    (b"data:  one \n\n", [("", " one ")]),
    (b"event: ping\ndata: {}\n\n", [("ping", "{}")]),
    (b"data: {}\nevent: ping\n\n", [("ping", "{}")]),
    (b"data: one\ndata: two\n\n", [("", "one\ntwo")]),
    (b"data\n\n", [("", "")]),
    (b"data: one\n\ndata: two\n\n", [("", "one"), ("", "two")]),
    (b"event: a\ndata: 1\n\ndata: 2\n\n", [("a", "1"), ("", "2")]),
    (b"event: a\n\ndata: 2\n\n", [("", "2")]),  # an event without data is none, and its name is forgotten
    (b": comment\n\ndata: one\n: comment\n\n", [("", "one")]),
    (b":\n\n:\n\n", []),
    (b"id: 7\nretry: 10\nfoo: bar\nfoo\ndata: one\n\n", [("", "one")]),
    (b"data: a:b: c\n\n", [("", "a:b: c")]),
    (b"data: one\r\n\r\ndata: two\r\n\r\n", [("", "one"), ("", "two")]),
    (b"data: one\r\rdata: two\r\r", [("", "one"), ("", "two")]),
    (b"data: one\rdata: two\r\n\r\n", [("", "one\ntwo")]),
    (b"\n\n\r\n\rdata: one\n\n", [("", "one")]),
    (b"\xef\xbb\xbfdata: one\n\n", [("", "one")]),
    (b"data: \xed\x95\x9c\n\n", [("", "한")]),
    (b"data: \xff\xed\x95\n\n", [("", "\ufffd\ufffd")]),
    (b"data: a\xe2\x80\xa8b\x0bc\x85\n\n", [("", "a\u2028b\x0bc\ufffd")]),  # only CR and LF end a line
    (b"data: one\n", []),  # what has no blank line after it has not ended
    (b"data: one", []),
    (b"", []),
]


@pytest.mark.parametrize("raw, events", EVENTS, ids=[repr(raw)[2:32] for raw, _ in EVENTS])
def test_sse(raw, events):
    assert sse(raw) == events
    assert sse(raw, [1] * len(raw)) == events


PIECES = [
    b"data: ",
    b"data:",
    b"event: x",
    b"{}",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\r\n\r\n",
    b":",
    b" ",
    "한".encode(),
    b"\xff",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40), st.lists(st.integers(0, 7), max_size=40))
def test_sse_in_any_portions(pieces, sizes):
    raw = b"".join(pieces)
    assert sse(raw, sizes) == sse(raw)


def test_an_event_over_the_limit_is_refused_and_many_small_ones_are_not():
    for raw in (b"data: " + b"x" * 200, b"data: xxxxxxxxxx\n" * 20, b"data:\n" * 200, b"x" * 200, b": " + b"x" * 200):
        with pytest.raises(ProviderError, match="an event of more than"):
            list(SSEDecoder(limit=100).feed(raw))
    assert len(list(SSEDecoder(limit=100).feed(b"data: x\n\n" * 1_000))) == 1_000


def test_a_long_line_fed_in_many_portions_takes_no_quadratic_time():
    decoder = SSEDecoder()
    for _ in range(70_000):
        assert not list(decoder.feed(b"x" * 100))


# Names, ids, marks


WIRE_NAMES = [
    (["system.run", "skill.read"], ["system_run", "skill_read"]),
    (["7zip"], ["_7zip"]),
    (["-x"], ["_-x"]),
    (["node:phone-1:camera.snap"], ["node_phone-1_camera_snap"]),
    (["한글"], ["__"]),
    (["x" * 70], ["x" * 64]),
    (["7" * 70], ["_" + "7" * 63]),
    ([""], ["_"]),
]


@pytest.mark.parametrize("names, expected", WIRE_NAMES, ids=range(len(WIRE_NAMES)))
def test_wire_names(names, expected):
    assert list(wire_names(ToolSpec(name, "", {}) for name in names).values()) == expected


@given(st.lists(st.text("ab._-:한7", max_size=70), unique=True, max_size=30))
def test_wire_names_can_be_reversed_whatever_the_names(names):
    table = wire_names(ToolSpec(name, "", {}) for name in names)
    assert list(table) == names and len(set(table.values())) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}", name) for name in table.values())


def test_a_name_that_is_fit_stays():
    assert wire_name("system_run") == "system_run"


IDS = [
    (Request("", ()).id_pattern, "call_Ab-1", "call_Ab-1"),
    (Request("", ()).id_pattern, "c" * 40, "c" * 40),
    ("[a-zA-Z0-9]{9}", "abcDEF123", "abcDEF123"),
]
HASHED = [
    (Request("", ()).id_pattern, "c" * 41),
    (Request("", ()).id_pattern, "call|1"),
    (Request("", ()).id_pattern, ""),
    (Request("", ()).id_pattern, "call_1\n"),
    ("[a-zA-Z0-9]{9}", "call_1"),
]


@pytest.mark.parametrize("pattern, call_id, expected", IDS)
def test_an_id_that_the_vendor_takes_stays(pattern, call_id, expected):
    assert wire_id(Request("", (), id_pattern=pattern), call_id) == expected


@pytest.mark.parametrize("pattern, call_id", HASHED)
def test_an_id_that_the_vendor_refuses_becomes_another_one_always_the_same(pattern, call_id):
    request = Request("", (), id_pattern=pattern)
    assert re.fullmatch("[a-z0-9]{9}", wire_id(request, call_id))
    assert wire_id(request, call_id) == wire_id(request, call_id) != wire_id(request, call_id + "x")


def test_a_tools_output_stands_between_marks_of_its_call():
    one, two = (marked(Message(Role.TOOL, "out", call_id=call_id)) for call_id in ("a", "b"))
    assert re.fullmatch(r"<data ([0-9a-f]{6})>\nout\n</data \1>", one) and one != two


# Encoding


def conversation(*messages, **more):
    return Request("Be brief.", messages, TOOLS, **{"model": "m", **more})


USER = Message(Role.USER, "Who am I?")
CALL = ToolCall("call_1", "system.run", {"command": "whoami"})
CALLS = (CALL, ToolCall("call_2", "skill.read", {"name": "x"}))
ASKS = Message(Role.ASSISTANT, "", CALLS)
RESULTS = (Message(Role.TOOL, "root", call_id="call_1"), Message(Role.TOOL, "gone", call_id="call_2", is_error=True))
TALK = (USER, ASKS, *RESULTS, Message(Role.ASSISTANT, "You are root."), Message(Role.USER, "Thanks."))


def chat_call(call_id, name, arguments, **more):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_chat_body():
    assert encode_chat(conversation(*TALK, max_tokens=100)) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who am I?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    chat_call("call_1", "system_run", '{"command":"whoami"}'),
                    chat_call("call_2", "skill_read", '{"name":"x"}'),
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": marked(RESULTS[0])},
            {"role": "tool", "tool_call_id": "call_2", "content": marked(RESULTS[1])},
            {"role": "assistant", "content": "You are root."},
            {"role": "user", "content": "Thanks."},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {"type": "function", "function": {"name": "system_run", "description": "Run it.", "parameters": SCHEMA}},
            {
                "type": "function",
                "function": {"name": "skill_read", "description": "Read it.", "parameters": {"type": "object"}},
            },
        ],
        "max_tokens": 100,
    }


def test_responses_body():
    assert encode_responses(conversation(*TALK, max_tokens=100)) == {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": "Who am I?"},
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "system_run",
                "arguments": '{"command":"whoami"}',
            },
            {"type": "function_call", "call_id": "call_2", "name": "skill_read", "arguments": '{"name":"x"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": marked(RESULTS[0])},
            {"type": "function_call_output", "call_id": "call_2", "output": marked(RESULTS[1])},
            {"role": "assistant", "content": "You are root."},
            {"role": "user", "content": "Thanks."},
        ],
        "stream": True,
        "store": False,
        "tools": [
            {
                "type": "function",
                "strict": False,
                "name": "system_run",
                "description": "Run it.",
                "parameters": SCHEMA,
            },
            {
                "type": "function",
                "strict": False,
                "name": "skill_read",
                "description": "Read it.",
                "parameters": {"type": "object"},
            },
        ],
        "max_output_tokens": 100,
    }


def test_messages_body():
    mark = {"cache_control": {"type": "ephemeral"}}
    assert encode_messages(conversation(*TALK, max_tokens=100)) == {
        "model": "m",
        "max_tokens": 100,
        "system": [{"type": "text", "text": "Be brief.", **mark}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Who am I?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "call_1", "name": "system_run", "input": {"command": "whoami"}},
                    {"type": "tool_use", "id": "call_2", "name": "skill_read", "input": {"name": "x"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": marked(RESULTS[0])},
                    {"type": "tool_result", "tool_use_id": "call_2", "content": marked(RESULTS[1]), "is_error": True},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "You are root."}]},
            {"role": "user", "content": [{"type": "text", "text": "Thanks.", **mark}]},
        ],
        "stream": True,
        "tools": [
            {"name": "system_run", "description": "Run it.", "input_schema": SCHEMA},
            {"name": "skill_read", "description": "Read it.", "input_schema": {"type": "object"}},
        ],
    }


def test_messages_of_one_role_are_merged_results_first():
    body = encode_messages(conversation(USER, ASKS, *RESULTS, Message(Role.USER, "And?"), Message(Role.USER, "Well?")))
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    kinds = [block["type"] for block in body["messages"][-1]["content"]]
    assert kinds == ["tool_result", "tool_result", "text", "text"]


def test_messages_have_no_empty_text():
    body = encode_messages(
        conversation(Message(Role.USER, ""), USER, Message(Role.ASSISTANT, " \n"), Message(Role.USER, "x"))
    )
    assert [block["text"] for message in body["messages"] for block in message["content"]] == ["Who am I?", "x"]


def test_only_the_prefix_and_the_last_block_are_marked_for_the_cache_and_nothing_of_ours_is_changed():
    said = Message(Role.ASSISTANT, "", (CALL,), echo={"model": "m", "blocks": [{"type": "thinking", "thinking": "a"}]})
    request = conversation(USER, said)
    before = copy.deepcopy(request)
    for encode in (encode_chat, encode_responses, encode_messages):
        encode(request)
        assert request == before
    raw = json.dumps(encode_messages(conversation(*TALK)))
    assert raw.count("cache_control") == 2


PICTURE = Image("/tmp/a.png", "image/png", b"\x89PNG")
LOOK = Message(Role.USER, "Look.", images=(PICTURE, PICTURE._replace(media_type="image/webp")))
PNG, WEBP = "data:image/png;base64,iVBORw==", "data:image/webp;base64,iVBORw=="
BASE64 = {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}


def test_pictures_stand_beside_the_words():
    request = conversation(USER, LOOK, note="Be quick.")
    words = "Look.\n\n[openpista: Be quick.]"
    assert encode_chat(request)["messages"][2]["content"] == [
        {"type": "text", "text": words},
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": {"url": WEBP}},
    ]
    assert encode_responses(request)["input"][1]["content"] == [
        {"type": "input_text", "text": words},
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
        {"type": "input_image", "image_url": WEBP, "detail": "auto"},
    ]
    assert encode_messages(request)["messages"][0]["content"] == [
        {"type": "text", "text": "Who am I?"},
        {"type": "image", "source": BASE64},
        {"type": "image", "source": BASE64 | {"media_type": "image/webp"}},
        {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}},
    ]


def test_a_picture_without_words():
    request = conversation(Message(Role.USER, " ", images=(PICTURE,)))
    assert [part["type"] for part in encode_chat(request)["messages"][1]["content"]] == ["image_url"]
    assert [part["type"] for part in encode_responses(request)["input"][0]["content"]] == ["input_image"]
    [block] = encode_messages(request)["messages"][0]["content"]
    assert block == {"type": "image", "source": BASE64, "cache_control": {"type": "ephemeral"}}


def test_words_in_the_place_of_pictures():
    second = LOOK.images[1]
    assert described(LOOK, "gone: {}") is LOOK
    assert described(LOOK, "gone: {}", second) == LOOK._replace(text="Look.\n(gone: /tmp/a.png)", images=(PICTURE,))
    empty = Message(Role.USER, "", images=(Image("/tmp/{0}", "image/png"),))
    assert described(empty, "gone: {}", *empty.images) == Message(Role.USER, "(gone: /tmp/{0})")


@pytest.mark.parametrize("format", FORMATS)
def test_the_body_is_the_same_for_the_same_request_and_its_prefix_stays(format):
    encode = FORMATS[format].encode
    assert json.dumps(encode(conversation(*TALK))) == json.dumps(encode(conversation(*TALK)))
    short, whole = encode(conversation(*TALK[:1])), encode(conversation(*TALK))
    assert [short[key] for key in short if key not in ("messages", "input")] == [
        whole[key] for key in whole if key not in ("messages", "input")
    ]


CHOICES = [("chat", "none"), ("responses", "none"), ("messages", {"type": "none"})]


@pytest.mark.parametrize("format, none", CHOICES)
def test_tools_that_may_not_be_called_are_still_told(format, none):
    body = FORMATS[format].encode(conversation(*TALK, may_call=False))
    assert body["tool_choice"] == none and len(body["tools"]) == 2
    assert "tool_choice" not in FORMATS[format].encode(conversation(*TALK))


@pytest.mark.parametrize("format", FORMATS)
def test_without_tools_there_is_no_word_of_them(format):
    body = FORMATS[format].encode(Request("Be brief.", (USER,), model="m", may_call=False))
    assert "tools" not in body and "tool_choice" not in body


LIMITS = [
    ("chat", "gpt-4o", "max_tokens"),
    ("chat", "gpt-5", "max_completion_tokens"),
    ("chat", "o3-mini", "max_completion_tokens"),
    ("chat", "openai/gpt-5.1", "max_completion_tokens"),
    ("chat", "llama-3", "max_tokens"),
    ("responses", "gpt-5", "max_output_tokens"),
    ("messages", "claude-sonnet-4-5", "max_tokens"),
]


@pytest.mark.parametrize("format, model, key", LIMITS)
def test_the_name_of_the_limit(format, model, key):
    names = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
    body = FORMATS[format].encode(conversation(USER, model=model, max_tokens=77))
    assert {name: body[name] for name in names & set(body)} == {key: 77}
    body = FORMATS[format].encode(conversation(USER, model=model))
    assert names & set(body) == ({"max_tokens"} if format == "messages" else set())


REASONS = [
    ("o1", True), ("o3-mini", True), ("gpt-5", True), ("gpt-5-codex", True), ("gpt-6.1", True), ("codex-mini", True),
    ("openai/o4-mini", True), ("openrouter/openai/gpt-5", True), ("gpt-4o", False), ("gpt-4.1", False),
    ("gpt-5-chat-latest", False), ("openhermes", False), ("olmo", False), ("claude-opus-4-5", False), ("", False),
]  # fmt: skip


@pytest.mark.parametrize("model, expected", REASONS)
def test_which_models_reason(model, expected):
    assert reasons(model) is expected


def test_responses_ask_for_the_reasoning_of_models_that_have_it():
    assert encode_responses(conversation(USER, model="gpt-5"))["include"] == ["reasoning.encrypted_content"]
    assert "include" not in encode_responses(conversation(USER, model="gpt-4o"))


@pytest.mark.parametrize("format", FORMATS)
def test_ids_that_the_vendor_does_not_take_change_on_both_sides(format):
    calls = (ToolCall("toolu_with|pipe", "system.run", {}),)
    talk = (USER, Message(Role.ASSISTANT, "", calls), Message(Role.TOOL, "x", call_id="toolu_with|pipe"))
    raw = json.dumps(FORMATS[format].encode(conversation(*talk, id_pattern="[a-zA-Z0-9]{9}")))
    ids = re.findall(r'"(?:id|call_id|tool_call_id|tool_use_id)": "([^"]*)"', raw)
    assert len(ids) == 2 and ids[0] == ids[1] and re.fullmatch("[a-zA-Z0-9]{9}", ids[0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_call_of_an_unknown_tool_still_has_a_name_that_the_vendor_takes(format):
    calls = (ToolCall("c1", "no such tool!", {}),)
    talk = (USER, Message(Role.ASSISTANT, "", calls), Message(Role.TOOL, "x", call_id="c1"))
    assert '"no_such_tool_"' in json.dumps(FORMATS[format].encode(conversation(*talk)))


# What the same model wants to see again


def echo_of(file, model="m"):
    """The message of a recorded answer, as if a model had just given it."""
    return decode(file, model=model).message


def test_reasoning_content_goes_back_to_the_same_model_only():
    said = echo_of("chat-reasoning-content")
    assert encode_chat(conversation(USER, said))["messages"][2]["reasoning_content"] == "First look."
    other = encode_chat(conversation(USER, said, model="other"))["messages"][2]
    assert set(other) == {"role", "content", "tool_calls"}


def test_reasoning_details_go_back_as_they_came():
    details = encode_chat(conversation(USER, echo_of("chat-reasoning-details")))["messages"][2]["reasoning_details"]
    assert [part["type"] for part in details] == ["reasoning.summary", "reasoning.encrypted"]


def test_a_thought_signature_goes_back_with_its_call_to_the_same_model_only():
    said = echo_of("chat-thought-signature")
    first, second = encode_chat(conversation(USER, said))["messages"][2]["tool_calls"]
    assert first["extra_content"] == {"google": {"thought_signature": "CpwBAVSoXO4="}}
    assert "extra_content" not in second
    other = encode_chat(conversation(USER, said, model="gpt-4o"))["messages"][2]["tool_calls"]
    assert [set(call) for call in other] == [{"id", "type", "function"}] * 2, "OpenAI refuses unknown keys"


def test_thinking_goes_back_first_with_its_signature_to_the_same_model_only():
    said = echo_of("messages-thinking")
    blocks = encode_messages(conversation(USER, said, *results_for(said)))["messages"][1]["content"]
    assert blocks[0] == {"type": "thinking", "thinking": "First look.", "signature": "EqoBCkgI="}
    assert [block["type"] for block in blocks] == ["thinking", "tool_use"]
    other = encode_messages(conversation(USER, said, *results_for(said), model="other"))["messages"][1]["content"]
    assert [block["type"] for block in other] == ["tool_use"]


def results_for(said):
    return [Message(Role.TOOL, "x", call_id=call.id) for call in said.tool_calls]


def test_reasoning_items_go_back_beside_their_call_to_the_same_model_only():
    said = echo_of("responses-reasoning-encrypted")
    items = encode_responses(conversation(USER, said, *results_for(said)))["input"]
    assert [item.get("type") for item in items] == [None, "reasoning", "function_call", "function_call_output"]
    assert items[1]["encrypted_content"] == "gAAAAAB=" and not any("status" in item for item in items)
    other = encode_responses(conversation(USER, said, *results_for(said), model="other"))["input"]
    assert [item.get("type") for item in other] == [None, "function_call", "function_call_output"]


def test_an_item_whose_call_was_not_taken_does_not_go_back():
    said = echo_of("responses-reasoning-encrypted")._replace(tool_calls=())
    items = encode_responses(conversation(USER, said))["input"]
    assert [item["type"] for item in items if "type" in item] == ["reasoning"]


def test_reasoning_without_its_encrypted_form_does_not_go_back():
    said = echo_of("responses-reasoning-plain")
    assert said.echo is None


def test_broken_arguments_do_not_go_back():
    said = echo_of("responses-arguments-broken")
    items = encode_responses(conversation(USER, said, *results_for(said)))["input"]
    calls = [item for item in items if item.get("type") == "function_call"]
    assert [json.loads(call["arguments"]) for call in calls] == [{}], "what is no JSON would poison the transcript"


def test_the_ids_of_items_that_go_back_are_those_of_their_results():
    said = echo_of("responses-reasoning-encrypted")
    items = encode_responses(conversation(USER, said, *results_for(said), id_pattern="[a-zA-Z0-9]{9}"))["input"]
    assert items[2]["call_id"] == items[3]["call_id"]


# Decoding the recorded streams


def decode(file, sizes=(), model="m"):
    """The Completion of a recorded stream, fed in portions of these sizes and then the rest."""
    raw = (STREAMS / f"{file}.sse").read_bytes()
    events, decoder, at = SSEDecoder(), FORMATS[file.partition("-")[0]].decoder(), 0
    told = ""
    for size in (*sizes, len(raw)):
        for _, data in events.feed(raw[at : at + size]):
            if data.strip() == "[DONE]":
                break
            told += decoder.feed(data)
        at += size
    completion = decoder.completion(f"p/{model}", NAMES)
    assert told == completion.message.text, "what was told piece by piece is the answer"
    return completion


HELLO = "Hello, 세계!"
RUN = [("call_1", "system.run", {"command": "ls -l"})]
BOTH = [*RUN, ("call_2", "skill.read", {"name": "x"})]
TOOLU = [("toolu_1", "system.run", {"command": "ls -l"})]
SPENT = Usage(90, 64, 12)
NONE = Usage()
NEW = "new"  # an id that the decoder had to make up

ANSWERS = [
    # file, words, calls, usage
    ("chat-text", HELLO, [], SPENT),
    ("chat-tool-call", "", RUN, SPENT),
    ("chat-two-calls", "", BOTH, SPENT),
    ("chat-two-calls-interleaved", "", BOTH, SPENT),
    ("chat-missing-index", "", RUN, SPENT),
    ("chat-missing-index-two-calls", "", BOTH, NONE),
    ("chat-missing-id", "", [(NEW, *RUN[0][1:]), (NEW, *BOTH[1][1:])], SPENT),
    ("chat-missing-id-and-index", "", [(NEW, *RUN[0][1:]), (NEW, *BOTH[1][1:])], SPENT),
    ("chat-missing-id-and-index-same-tool", "", [(NEW, *RUN[0][1:]), (NEW, "system.run", {"command": "pwd"})], SPENT),
    ("chat-id-null-and-empty", "", RUN, SPENT),
    ("chat-id-number", "", [("7", *RUN[0][1:])], SPENT),
    ("chat-id-repeated", "", RUN, SPENT),
    ("chat-id-twice-the-same", "", [RUN[0], (NEW, *BOTH[1][1:])], SPENT),
    ("chat-arguments-whole", "", RUN, SPENT),
    ("chat-arguments-object", "", RUN, SPENT),
    ("chat-arguments-object-then-empty", "", RUN, SPENT),
    ("chat-arguments-encoded-twice", "", RUN, SPENT),
    ("chat-arguments-empty", "", [("call_1", "system.run", {})], SPENT),
    ("chat-arguments-none", "", [("call_1", "system.run", {})], SPENT),
    ("chat-name-split", "", RUN, SPENT),
    ("chat-name-repeated", "", RUN, SPENT),
    ("chat-name-dotted", "", RUN, SPENT),
    ("chat-all-index-0", "", BOTH, SPENT),
    ("chat-words-and-call", "I look.", RUN, SPENT),
    ("chat-finish-stop-with-calls", "", RUN, SPENT),
    ("chat-no-done", HELLO, [], SPENT),
    ("chat-usage-in-finish", HELLO, [], SPENT),
    ("chat-usage-in-every-chunk", HELLO, [], SPENT),
    ("chat-no-usage", HELLO, [], NONE),
    ("chat-crlf", HELLO, [], SPENT),
    ("chat-cr", HELLO, [], SPENT),
    ("chat-byte-order-mark", HELLO, [], SPENT),
    ("chat-no-space", HELLO, [], SPENT),
    ("chat-comments", HELLO, [], SPENT),
    ("chat-empty-data", HELLO, [], SPENT),
    ("chat-event-names-ids-retries", HELLO, [], SPENT),
    ("chat-data-on-two-lines", HELLO, [], SPENT),
    ("chat-nulls", HELLO, [], SPENT),
    ("chat-no-choices-key", HELLO, [], SPENT),
    ("chat-reasoning-content", "", RUN, SPENT),
    ("chat-reasoning-details", "", RUN, Usage(90, 64, 12, 0.00125)),
    ("chat-reasoning-key", HELLO, [], SPENT),
    (
        "chat-thought-signature",
        "",
        [("function-call-1", *RUN[0][1:]), ("function-call-2", *BOTH[1][1:])],
        Usage(90, 0, 12),
    ),
    ("chat-content-list", HELLO, [], Usage(90, 0, 12)),
    ("chat-refusal", "I can not do that.", [], SPENT),
    ("chat-surrogates", "half \ud83d of one", [], SPENT),
    ("responses-text", HELLO, [], SPENT),
    ("responses-tool-call", "", RUN, SPENT),
    ("responses-two-calls", "", BOTH, SPENT),
    ("responses-reasoning-encrypted", "", RUN, SPENT),
    ("responses-reasoning-plain", "", RUN, SPENT),
    ("responses-reasoning-and-words", HELLO, [], SPENT),
    ("responses-arguments-empty", "", [("call_1", "system.run", {})], SPENT),
    ("responses-refusal", "I can not do that.", [], SPENT),
    ("responses-unknown-events", HELLO, [], SPENT),
    ("responses-crlf", HELLO, [], SPENT),
    ("responses-comments", HELLO, [], SPENT),
    ("responses-no-usage", HELLO, [], NONE),
    ("messages-text", HELLO, [], SPENT),
    ("messages-tool-call", "I look.", TOOLU, SPENT),
    ("messages-two-calls", "", [*TOOLU, ("toolu_2", "skill.read", {"name": "x"})], SPENT),
    ("messages-two-calls-interleaved", "", [*TOOLU, ("toolu_2", "skill.read", {"name": "x"})], SPENT),
    ("messages-thinking", "", TOOLU, SPENT),
    ("messages-thinking-redacted", "", TOOLU, SPENT),
    ("messages-arguments-empty", "", [("toolu_1", "system.run", {})], SPENT),
    ("messages-arguments-none", "", [("toolu_1", "system.run", {})], SPENT),
    ("messages-input-whole", "", TOOLU, SPENT),
    ("messages-input-whole-then-empty", "", TOOLU, SPENT),
    ("messages-cached-usage", HELLO, [], SPENT),
    ("messages-usage-only-at-start", HELLO, [], SPENT),
    ("messages-usage-only-at-end", HELLO, [], SPENT),
    ("messages-unknown-events", HELLO, [], SPENT),
    ("messages-unknown-delta", HELLO, [], SPENT),
    ("messages-crlf", HELLO, [], SPENT),
    ("messages-comments", HELLO, [], SPENT),
    ("messages-stop-sequence", HELLO, [], SPENT),
]
CUT = [  # the model ran into its limit of output; the answer counts, and says so
    "chat-length", "chat-length-mistral", "chat-length-in-arguments", "responses-length", "messages-length",
    "messages-length-window",
]  # fmt: skip
PROBLEMS = [  # the model hears what is wrong with the arguments of its call
    ("chat-arguments-broken", "the arguments are not valid JSON"),
    ("chat-arguments-array", "the arguments must be a JSON object"),
    ("chat-arguments-not-a-number", "the arguments are not valid JSON"),
    ("responses-arguments-broken", "the arguments are not valid JSON"),
    ("messages-arguments-broken", "the arguments are not valid JSON"),
]
FAILURES = [
    # file, error, words
    ("chat-cut", Unavailable, "the answer ended in the middle"),
    ("chat-cut-in-call", Unavailable, "the answer ended in the middle"),
    ("chat-cut-in-event", Unavailable, "the answer ended in the middle"),
    ("chat-empty", Unavailable, "the answer ended in the middle"),
    ("chat-only-comments", Unavailable, "the answer ended in the middle"),
    ("chat-content-filter", ProviderError, "the provider's filter stopped the answer"),
    ("chat-finish-error", Unavailable, "error"),
    ("chat-finish-no-resource", Unavailable, "insufficient_system_resource"),
    ("chat-error-overloaded", Unavailable, "The server had an error"),
    ("chat-error-in-choice", Unavailable, "Provider returned error: upstream reset"),
    ("chat-error-rate-limit", Unavailable, "Rate limit reached"),
    ("chat-error-for-good", ProviderError, "Invalid schema for function 'x'"),
    ("chat-error-too-long", ContextTooLong, "maximum context length"),
    ("chat-error-text", ProviderError, "model runner has unexpectedly stopped"),
    ("chat-not-json", Unavailable, "an event that is no JSON object: '{oops'"),
    ("chat-not-an-object", Unavailable, "an event that is no JSON object: 'null'"),
    ("chat-odd-content", ProviderError, "an event of an unknown form"),
    ("chat-odd-call", ProviderError, "an event of an unknown form"),
    ("chat-odd-arguments-name", ProviderError, "an event of an unknown form"),
    ("chat-odd-usage", ProviderError, "an event of an unknown form"),
    ("responses-content-filter", ProviderError, "the provider's filter stopped the answer"),
    ("responses-failed", Unavailable, "The model failed to generate a response."),
    ("responses-failed-for-good", ProviderError, "Your prompt was flagged."),
    ("responses-error-event", Unavailable, "Slow down."),
    ("responses-error-object", ContextTooLong, "exceeds the context window"),
    ("responses-cut", Unavailable, "the answer ended in the middle"),
    ("responses-cut-in-call", Unavailable, "the answer ended in the middle"),
    ("responses-cancelled", Unavailable, "the answer ended in the middle"),
    ("responses-odd-delta", ProviderError, "an event of an unknown form"),
    ("responses-odd-item", ProviderError, "an event of an unknown form"),
    ("messages-refusal", ProviderError, "the provider's filter stopped the answer"),
    ("messages-error-overloaded", Unavailable, "Overloaded"),
    ("messages-error-for-good", ProviderError, "roles must alternate"),
    ("messages-error-too-long", ContextTooLong, "prompt is too long"),
    ("messages-cut", Unavailable, "the answer ended in the middle"),
    ("messages-cut-before-stop", Unavailable, "the answer ended in the middle"),
    ("messages-cut-in-call", Unavailable, "the answer ended in the middle"),
    ("messages-odd-delta", ProviderError, "an event of an unknown form"),
    ("messages-odd-index", ProviderError, "an event of an unknown form"),
]


def one_by_one(file):
    return [1] * (STREAMS / f"{file}.sse").stat().st_size


def shown(completion, calls):
    """The calls with NEW in place of an id that was made up."""
    found = completion.message.tool_calls
    assert len({call.id for call in found}) == len(found)
    known = {call_id for call_id, _, _ in calls}
    return [(call.id if call.id in known else NEW, call.name, call.arguments) for call in found]


@pytest.mark.parametrize("file, words, calls, usage", ANSWERS, ids=[row[0] for row in ANSWERS])
def test_a_recorded_answer(file, words, calls, usage):
    whole = decode(file)
    assert (whole.message.text, shown(whole, calls), whole.usage) == (words, calls, usage)
    assert not any(call.problem for call in whole.message.tool_calls)
    assert (whole.cut, whole.model, whole.message.role) == (False, "p/m", Role.ASSISTANT)
    bytewise = decode(file, one_by_one(file))
    assert (bytewise.message.text, shown(bytewise, calls), bytewise.usage) == (words, calls, usage)
    assert bytewise.message.echo == whole.message.echo


@pytest.mark.parametrize("file", CUT)
def test_a_recorded_answer_that_ran_into_its_limit(file):
    assert decode(file).cut and decode(file, one_by_one(file)).cut


@pytest.mark.parametrize("file, problem", PROBLEMS)
def test_recorded_arguments_that_cannot_be_read(file, problem):
    [call] = decode(file).message.tool_calls
    assert call.problem.startswith(problem) and call.arguments == {} and call.name == "system.run"


@pytest.mark.parametrize("file, error, words", FAILURES, ids=[row[0] for row in FAILURES])
def test_a_recorded_answer_that_is_none(file, error, words):
    for sizes in ((), one_by_one(file)):
        with pytest.raises(PistaError) as caught:
            decode(file, sizes)
        assert type(caught.value) is error and words in str(caught.value) and "\n" not in str(caught.value)


def test_every_recorded_stream_is_in_a_table_and_each_format_is_cut_somewhere():
    rows = [row[0] for table in (ANSWERS, PROBLEMS, FAILURES) for row in table] + CUT
    assert sorted(set(rows)) == sorted(path.stem for path in STREAMS.iterdir())
    for name in FORMATS:
        assert {f"{name}-cut", f"{name}-length", f"{name}-tool-call", f"{name}-text"} <= set(rows)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([row[0] for row in ANSWERS]), st.lists(st.integers(0, 200), max_size=30))
def test_recorded_answers_in_any_portions(file, sizes):
    completion = decode(file, sizes)
    assert completion.message.text == decode(file).message.text and completion.usage == decode(file).usage


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([row[0] for row in ANSWERS if "-text" in row[0] or "-tool-call" in row[0]]), st.data())
def test_an_answer_that_is_cut_anywhere_is_the_answer_or_an_error_but_never_a_part_of_it(file, data):
    raw, whole = (STREAMS / f"{file}.sse").read_bytes(), decode(file)
    end = data.draw(st.integers(0, len(raw)))
    events, decoder = SSEDecoder(), FORMATS[file.partition("-")[0]].decoder()
    for _, words in events.feed(raw[:end]):
        if words == "[DONE]":
            break
        decoder.feed(words)
    try:
        completion = decoder.completion("p/m", NAMES)
    except Unavailable:
        return
    assert completion.message == whole.message


ODD = st.recursive(
    st.sampled_from([None, True, 0, -1, 5, 1.5, "", "x", "{}", [], {}]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["type", "text", "content", "name", "id", "function", "arguments"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([row[0] for row in ANSWERS]), st.data())
def test_an_event_with_anything_in_one_place_is_an_answer_or_an_error_of_ours(file, data):
    """Takes a recorded stream and puts something odd into one place of one event."""
    raw = (STREAMS / f"{file}.sse").read_bytes()
    events = [json.loads(text) for _, text in SSEDecoder().feed(raw) if text not in ("[DONE]", "")]
    node = data.draw(st.sampled_from(events))
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ODD)
    decoder = FORMATS[file.partition("-")[0]].decoder()
    try:
        for event in events:
            assert isinstance(decoder.feed(json.dumps(event)), str)
        completion = decoder.completion("p/m", NAMES)
    except PistaError:
        return
    check_types(completion)
    again = FORMATS[file.partition("-")[0]].encode(
        conversation(USER, completion.message, *results_for(completion.message))
    )
    json.dumps(again)


def check_types(completion: Completion):
    message, usage = completion.message, completion.usage
    assert isinstance(message.text, str)
    for call in message.tool_calls:
        assert isinstance(call.id, str) and isinstance(call.name, str) and isinstance(call.arguments, dict)
    assert all(isinstance(count, int) for count in usage[:3]) and isinstance(usage.cost, (float, type(None)))


ARGUMENTS = [
    ("", {}, ""),
    ("  ", {}, ""),
    ("{}", {}, ""),
    ({"a": 1}, {"a": 1}, ""),
    ('{"a":1}', {"a": 1}, ""),
    ('"{\\"a\\":1}"', {"a": 1}, ""),
    ("[1]", {}, "the arguments must be a JSON object"),
    ("5", {}, "the arguments must be a JSON object"),
    ('{"a":', {}, "the arguments are not valid JSON"),
    ('{"a":1}{"b":2}', {}, "the arguments are not valid JSON"),
    ('{"a":NaN}', {}, "the arguments are not valid JSON"),  # would come back as a body that no vendor can read
    ('{"a":1e999}', {}, "the arguments are not valid JSON"),
    ("[" * 100_000, {}, "the arguments are not valid JSON"),
    ('{"a":' + "9" * 5_000 + "}", {}, "the arguments are not valid JSON"),
    ('{"a":"' + "x" * 1_000_000 + '"}', {"a": "x" * 1_000_000}, ""),
]


@pytest.mark.parametrize("raw, arguments, problem", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_parse_arguments(raw, arguments, problem):
    found, why = parse_arguments(raw)
    assert found == arguments and why.startswith(problem) and bool(why) == bool(problem)


# Errors as vendors write them


ERRORS = [
    ({"error": {"message": "No.", "type": "t", "code": "c"}}, ("No.", "c")),
    ({"error": {"message": "No.", "type": "t", "code": None}}, ("No.", "t")),
    ({"error": {"message": "No.", "code": 429}}, ("No.", "429")),
    ({"error": "No."}, ("No.", "")),
    ({"error": "No.", "code": 7}, ("No.", "7")),
    ([{"error": {"message": "No.", "code": 400, "status": "INVALID_ARGUMENT"}}], ("No.", "400")),  # Gemini
    ({"message": "No.", "request_id": "r"}, ("No.", "")),  # Mistral, Cohere
    ({"object": "error", "message": "No.", "type": "invalid", "code": "3280"}, ("No.", "3280")),
    ({"detail": "No."}, ("No.", "")),
    ({"detail": [{"loc": ["body", "x"], "msg": "No."}]}, ('[{"loc":["body","x"],"msg":"No."}]', "")),
    ({"type": "error", "error": {"type": "overloaded_error", "message": "No."}}, ("No.", "overloaded_error")),
    ({"error": {"message": "No.", "code": 502, "metadata": {"raw": "because"}}}, ("No.: because", "502")),
    ({"error": {"message": "No.", "metadata": "text"}}, ("No.", "")),
    ("No.", ("No.", "")),
    ([], ("[]", "")),
    (None, ("None", "")),
    ({}, ("{}", "")),
    ({"error": {"message": "two\nlines"}}, ("two lines", "")),
    ({"error": {"message": "x" * 5_000}}, ("x" * 299 + "…", "")),
]


@pytest.mark.parametrize("payload, expected", ERRORS, ids=range(len(ERRORS)))
def test_vendor_message(payload, expected):
    assert vendor_message(payload) == expected


KINDS = [
    ("context_length_exceeded", "", ContextTooLong),
    ("", "prompt is too long: 250000 tokens > 200000 maximum", ContextTooLong),
    ("", "Your input exceeds the context window of this model.", ContextTooLong),
    ("", "the request exceeds the available context size", ContextTooLong),  # llama.cpp
    ("", "Please reduce the length: input is too long for requested model", ContextTooLong),
    ("overloaded_error", "Overloaded", Unavailable),
    ("rate_limit_exceeded", "slow down", Unavailable),
    ("server_error", "oops", Unavailable),
    ("429", "", Unavailable),
    ("503", "", Unavailable),
    ("", "Please try again later", Unavailable),
    ("invalid_request_error", "No.", ProviderError),
    ("404", "No.", ProviderError),
]


@pytest.mark.parametrize("code, words, kind", KINDS)
def test_what_an_error_in_a_stream_means(code, words, kind):
    assert type(error_of({"error": {"message": words, "code": code}})) is kind


def test_headers_show_the_key_as_each_format_does():
    assert FORMATS["chat"].headers("k") == FORMATS["responses"].headers("k") == {"authorization": "Bearer k"}
    assert FORMATS["messages"].headers("k") == {"anthropic-version": "2023-06-01", "x-api-key": "k"}
    assert FORMATS["chat"].headers("") == {} and "x-api-key" not in FORMATS["messages"].headers("")


def test_arguments_are_written_as_compact_json_in_every_format():
    assert to_json({"b": 1, "a": "한"}) == '{"a":"한","b":1}'


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("last", [Message(Role.USER, "hi"), RESULTS[1]], ids=["user", "tool"])
def test_our_note_stands_behind_the_last_message_outside_of_its_marks(name, last):
    before = [] if last.role is Role.USER else [USER, ASKS, RESULTS[0]]
    request = Request("system", (*before, last), TOOLS, model="m", note="No more tools.")
    sent = json.dumps(FORMATS[name].encode(request))
    assert sent.count("[openpista: No more tools.]") == 1
    end = "hi" if last.role is Role.USER else marked(last).splitlines()[-1]
    assert f"{end}\\n\\n[openpista: No more tools.]" in sent
