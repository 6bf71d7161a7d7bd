"""Every fake the tests and the benchmarks use; the Bot API's own process is botapi.py.

Map. Each section uses only those above it.

    1. Wire        JSON, refusals, what a scripted answer holds
    2. Chat        OpenAI Chat Completions: what it accepts, what it answers
    3. Responses   OpenAI Responses
    4. Messages    Anthropic Messages
    5. Speech      the form with a sound, and its text
    6. Script      which step answers which request, and the record
    7. Server      sockets: a process that speaks all three
    8. Client      ModelServer starts that process and steers it; BotServer the one in botapi.py
    9. Command     python tests/fakes.py model [--port N] [--script FILE] [--stay]

The model server accepts what the vendors document and refuses the rest with their errors. It answers by a
script, a list of steps; the step's keys are listed above STEP_KEYS and QUIRKS.

The standard library only, and little of it: the server starts in well under 150 ms.
"""

import binascii
import json
import os
import re
import select
import socket
import sys
import threading
import time

# ===== 1. Wire ================================================================
#
# A request that breaks a documented rule raises Wrong; each format turns it into
# its own error JSON. A Reply is one step, made concrete for one request.

# What is said
#   text           the answer; streamed in `deltas` pieces (4 unless told)
#   reasoning      thought before it: reasoning_content, a thinking block with signature, a reasoning item
#   tool_calls     [{"name", "arguments": object or raw string, "id"?}]
#   echo           true: text is the last user message; tool_result_text: true: text is the last tool result
#   shell          text: chat only; the last line of the user's words is called as system_run ("{call}" in it is the
#                  call's id), again if its result has this text; then the result is said
#   usage          {"input" (cached ones included), "output", "cached", "reasoning", "cost"}; null: none is sent
#   finish         "length", "content_filter", "failed", or the vendor's own word
#   models, bare   for path "/models": the ids to list; a bare array instead of an object
# Which request takes the step, and how often
#   model, path    only requests for this model; only paths with this ending ("/chat/completions", "/models")
#   times          how often the step answers (1); -1 for ever
#   default        true: not queued; answers when nothing queued matches
# What the request must be like; else 4xx, and the step stays
#   expect         text, a list of texts, or {"has": [...], "not": [...]}: looked for in the raw body
#   allow, reject  further top-level or message keys that pass; keys that get 400 unsupported_parameter
#   context        bytes: a longer request gets the vendor's context overflow error
# Faults
#   status, headers, body   a plain HTTP answer; without body, the vendor's error for that status
#   overflow       true: the vendor's context overflow error
#   delay          seconds before the headers; stall: of silence in the stream; pace: between events
#   after          how many events come before stall, error_event, long_line (half of them)
#   cut            N events, then the connection closes; cut_bytes: N bytes of body; reset: true: by RST;
#                  clean: true: the HTTP body ends well formed all the same
#   garbage        text, a number of bytes, or true: instead of the events
#   long_line      a text delta whose line is at least N bytes
#   error_event    true, a message or an error object: in the middle of a stream that began with 200
#   no_done        no [DONE], no message_stop, no response.completed
#   raw            the body verbatim; a lone surrogate such as \udcff is the byte 0xff
#   refuse         true: the connection closes without an answer
#   split          the body in pieces of N bytes, each in a packet of its own
#   close_delimited  no chunked coding: the body ends where the connection does
STEP_KEYS = frozenset(
    """text deltas reasoning tool_calls echo tool_result_text shell usage finish models bare model path times default
    expect allow reject context status headers body overflow delay stall pace after cut cut_bytes reset clean
    garbage long_line error_event no_done raw refuse split close_delimited quirks""".split()
)

# quirks of any format
#   crlf, no_space, keepalive_comments   line ends, "data:{", ": OPENROUTER PROCESSING" before each event
#   unknown_events       an event of a new type; for chat Azure's first chunk without choices
#   empty_arguments      the empty string for every call's arguments
# quirks of chat only: tool calls
#   no_index, no_id, all_index_0, id_repeated, name_repeated, name_split (in two deltas)
#   whole_call           one delta holds it all; arguments_object: and its arguments are an object
#   finish_stop          finish_reason stop although there are calls; no_finish: never a finish_reason
# quirks of chat only: what must come back, else 400
#   extra_content        Gemini's thought_signature, with the first call of each answer, within the turn
#   reasoning_required   DeepSeek's reasoning_content, with every call
#   mistral_ids          ids of 9 letters and digits: given, and wanted in the whole transcript
#   no_user_after_tool   Mistral refuses a user message directly after a tool message
# quirks of chat only: the rest
#   content_list         content is a list of parts; nulls: deltas full of nulls
#   reasoning_key        the field is reasoning, not reasoning_content
#   usage_in_finish      usage comes with the last choice, asked for or not
#   error_in_choice      OpenRouter's form of error_event
QUIRKS = frozenset(
    """crlf keepalive_comments no_space unknown_events empty_arguments
    no_index no_id all_index_0 whole_call arguments_object finish_stop name_repeated name_split id_repeated
    extra_content reasoning_required reasoning_key mistral_ids no_user_after_tool content_list usage_in_finish
    no_finish nulls error_in_choice""".split()
)

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
REASONING_MODEL = re.compile(r"gpt-[5-9]|o\d")
IMAGE_STARTS = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "gif": b"GIF8", "webp": b"RIFF"}
IMAGE_LIMIT = 10 << 20  # characters of base64, Anthropic
STRING_LIMIT = 10_485_760  # characters, OpenAI
ANTHROPIC_LIMIT = 32 << 20  # bytes
EPOCH = 1_700_000_000


class Wrong(Exception):
    """The request breaks a documented rule."""

    def __init__(self, message, param=None, code=None, status=400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def need(ok, *wrong, **more):
    if not ok:
        raise Wrong(*wrong, **more)


def dump(value) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # lone surrogates: a model can write them, as escapes
        return json.dumps(value, separators=(",", ":")).encode()


def verbatim(value) -> bytes:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else dump(value)


def pieces(text: str, count: int) -> list[str]:
    size = max(1, -(-len(text) // max(1, count)))
    return [text[i : i + size] for i in range(0, len(text), size)]


def parsed(raw: bytes):
    """The body as JSON, or ValueError: strict about UTF-8 and lone surrogates as the vendors are."""
    value = json.loads(raw.decode("utf-8"))
    if b"\\ud" in raw or b"\\uD" in raw:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def texts(content, *kinds) -> str:
    """The text of a content that is a string or a list of parts."""
    if not isinstance(content, list):
        return content or ""
    return "".join(part.get("text", "") for part in content if part.get("type") in kinds)


def signature(text: str) -> str:
    return f"Eq{binascii.crc32(text.encode('utf-8', 'surrogatepass')):08x}" * 2


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def object_text(text) -> bool:
    """Whether text is a JSON object, as tool arguments must be."""
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


class Numbers:
    """Ids that never repeat within one server."""

    def __init__(self):
        self._lock, self._last = threading.Lock(), 0

    def __call__(self) -> int:
        with self._lock:
            self._last += 1
            return self._last


NUMBER = Numbers()
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def new_id(prefix: str, size: int = 24) -> str:
    number, letters = NUMBER() * 7_919 + 1_000_003, []
    for _ in range(size):
        number = (number * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % (1 << 64)
        letters.append(ALPHABET[(number >> 33) % 62])
    return prefix + "".join(letters)


class Call:
    """One tool call of a reply: its arguments as text, and as an object if they are one."""

    def __init__(self, wanted: dict, call_id: str, empty: bool):
        self.name, self.id = wanted["name"], wanted.get("id") or call_id
        arguments = "" if empty else wanted.get("arguments", {})
        self.text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.object = json.loads(self.text) if object_text(self.text) else {"raw": self.text} if self.text else {}


class Reply:
    """One step, made concrete for one request."""

    def __init__(self, step: dict, body: dict, size: int, format):
        self.step, self.body, self.model = step, body, body["model"]
        self.quirks = frozenset(step.get("quirks", ()))
        self.text = step.get("text")
        if step.get("echo"):
            self.text = format.last_user(body)
        if step.get("tool_result_text"):
            self.text = format.last_result(body)
        self.reasoning, self.finish = step.get("reasoning"), step.get("finish")
        new = (lambda: new_id("", 9)) if "mistral_ids" in self.quirks else format.new_call_id
        empty = "empty_arguments" in self.quirks
        calls = step.get("tool_calls", ())
        if "shell" in step:
            self.text, calls = shell(step["shell"], body["messages"], new_id("call_", 24))
        self.calls = [Call(wanted, new(), empty) for wanted in calls]
        said = len(self.text or "") + len(self.reasoning or "") + sum(len(call.text) for call in self.calls)
        known = step.get("usage", {})
        self.usage = None if known is None else {"input": size // 4 + 1, "output": said // 4 + 1} | known

    def pieces(self, text: str, count: int = 4) -> list[str]:
        return pieces(text, self.step.get("deltas", count))

    def used(self, name: str) -> int:
        return (self.usage or {}).get(name, 0)


def shell(again: str, messages: list, call_id: str) -> tuple[str | None, list[dict]]:
    """What a model says that runs what it is told: text, calls."""
    last = texts(messages[-1]["content"], "text")
    if messages[-1]["role"] == "tool" and again not in last:
        return last, []
    words = next(texts(m["content"], "text") for m in reversed(messages) if m["role"] == "user")
    command = words.splitlines()[-1].replace("{call}", call_id)
    return None, [{"name": "system_run", "arguments": {"command": command}, "id": call_id}]


def check_schema(schema, name: str, path: str):
    """What OpenAI says of a tool's parameters: an object; arrays have items."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    message = f"Invalid schema for function '{name}': schema must be a JSON Schema of 'type: \"object\"', got 'type: "
    need(kind == "object", f'{message}"{kind}"\'.', path, "invalid_function_parameters")
    stack = [schema]
    while stack:
        node = stack.pop()
        bad = node.get("type") == "array" and "items" not in node
        need(
            not bad,
            f"Invalid schema for function '{name}': array schema missing items.",
            path,
            "invalid_function_parameters",
        )
        properties = node.get("properties", {})
        need(
            isinstance(properties, dict), f"Invalid schema for function '{name}'.", path, "invalid_function_parameters"
        )
        children = [*properties.values(), node.get("items"), *node.get("anyOf", ())]
        stack += [child for child in children if isinstance(child, dict)]


def check_strict(function: dict, path: str):
    if function.get("strict") is not True:
        return
    schema = function.get("parameters") or {}
    start = f"Invalid schema for function '{function['name']}': In context=(), "
    closed = schema.get("additionalProperties") is False
    message = start + "'additionalProperties' is required to be supplied and to be false."
    need(closed, message, path, "invalid_function_parameters")
    every = set(schema.get("properties", ())) == set(schema.get("required", ()))
    message = start + "'required' is required to be supplied and to be an array including every key in properties."
    need(every, message, path, "invalid_function_parameters")


def check_name(name, path: str):
    need(isinstance(name, str) and name, f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
    message = (
        f"Invalid '{path}': string does not match pattern. Expected a string that matches the pattern "
        "'^[a-zA-Z0-9_-]+$'."
    )
    need(TOOL_NAME.fullmatch(name), message, path, "invalid_value")


def check_keys(value, allowed, path: str):
    need(isinstance(value, dict), f"Invalid type for '{path}': expected an object.", path, "invalid_type")
    for key in value:
        need(key in allowed, f"Unknown parameter: '{path}.{key}'.", f"{path}.{key}", "unknown_parameter")


def check_text(value, path: str):
    need(isinstance(value, str), f"Invalid type for '{path}': expected a string.", path, "invalid_type")
    message = f"Invalid '{path}': string too long. Expected a string with maximum length {STRING_LIMIT}."
    need(len(value) <= STRING_LIMIT, message, path, "string_above_max_length")


def check_id(value, limit: int, path: str):
    need(isinstance(value, str), f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
    need(value, f"Invalid '{path}': empty string. Expected a string with minimum length 1.", path, "empty_string")
    message = f"Invalid '{path}': string too long. Expected a string with maximum length {limit}, but got {len(value)}."
    need(len(value) <= limit, message, path, "string_above_max_length")


# ===== 2. Chat ================================================================
#
# OpenAI Chat Completions, and by quirks its many relatives. OpenAI holds what Chat
# and Responses share: the key, the errors, the checks on a model's parameters.

NUMBER_RANGES = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}


class OpenAI:
    request_id_header = "x-request-id"

    def authorise(self, headers: dict, path: str):
        key = headers.get("authorization", "")
        key = key[7:].strip() if key[:7].lower() == "bearer " else ""
        if path.startswith("/openai/v1"):  # Azure's header; its base URL ends so
            key = key or headers.get("api-key", "")
        message = (
            "You didn't provide an API key. You need to provide your API key in an Authorization header "
            "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
        need(key, message, status=401)
        need(key != "bad-key", f"Incorrect API key provided: {key}.", None, "invalid_api_key", status=401)
        message = "You have insufficient permissions for this operation. Missing scopes: model.request."
        need(key != "forbidden-key", message, status=403)

    def error(self, wrong: Wrong, request_id: str) -> dict:
        kind = {429: "requests"}.get(wrong.status, "server_error" if wrong.status >= 500 else "invalid_request_error")
        return {"error": {"message": wrong.message, "type": kind, "param": wrong.param, "code": wrong.code}}

    def fault(self, status: int) -> Wrong:
        """The vendor's error for a status, when the step gives no body."""
        known = {
            401: ("Incorrect API key provided.", None, "invalid_api_key"),
            404: ("The model does not exist or you do not have access to it.", "model", "model_not_found"),
            429: ("Rate limit reached for requests.", None, "rate_limit_exceeded"),
            503: ("The engine is currently overloaded, please try again later.", None, None),
        }
        text = "The server had an error while processing your request. Sorry about that!"
        return Wrong(*known.get(status, (text, None, None)), status=status)

    def unreadable(self) -> Wrong:
        return Wrong("We could not parse the JSON body of your request. The OpenAI API expects a JSON payload.")

    def models(self, ids: list, bare: bool, query: dict):
        rows = [{"id": i, "object": "model", "created": EPOCH, "owned_by": "system"} for i in ids]
        return rows if bare else {"object": "list", "data": rows}

    def check_parameters(self, body: dict, known: frozenset, step: dict):
        for key in body:
            need(key in known or key in step.get("allow", ()), f"Unknown parameter: '{key}'.", key, "unknown_parameter")
        for key in step.get("reject", ()):
            message = f"Unsupported parameter: '{key}' is not supported with this model."
            need(key not in body, message, key, "unsupported_parameter")
        model = body.get("model")
        need(isinstance(model, str) and model, "you must provide a model parameter")
        message = f"The model `{model}` does not exist or you do not have access to it."
        need(not model.startswith("missing"), message, None, "model_not_found", status=404)
        for key, (low, high) in NUMBER_RANGES.items():
            value = body.get(key)
            fits = value is None or (is_number(value) and low <= value <= high)
            need(fits, f"Invalid '{key}': expected a number from {low} to {high}.", key, "invalid_value")
        for key in ("stream", "store", "parallel_tool_calls"):
            fits = body.get(key) is None or isinstance(body[key], bool)
            need(fits, f"Invalid type for '{key}': expected a boolean.", key, "invalid_type")
        for key in ("tool_choice", "parallel_tool_calls"):
            alone = body.get(key) is not None and not body.get("tools")
            need(not alone, f"Invalid value for '{key}': '{key}' is only allowed when 'tools' are specified.", key)
        clash = re.match(r"o\d", model) and body.get("parallel_tool_calls") is not None
        message = "Unsupported parameter: 'parallel_tool_calls' is not supported with this model."
        need(not clash, message, "parallel_tool_calls", "unsupported_parameter")

    def check_stream_options(self, body: dict, known: set):
        options = body.get("stream_options")
        if options is None:
            return
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        need(body.get("stream"), message, "stream_options")
        check_keys(options, known, "stream_options")

    def check_function(self, function: dict, path: str):
        check_keys(function, {"name", "description", "parameters", "strict", "type"}, path)
        check_name(function.get("name"), f"{path}.name")
        if function.get("description") is not None:
            check_text(function["description"], f"{path}.description")
        if function.get("parameters") is not None:
            check_schema(function["parameters"], function["name"], f"{path}.parameters")
        check_strict(function, f"{path}.parameters")

    def check_tool_list(self, tools):
        need(
            isinstance(tools, list), "Invalid type for 'tools': expected an array of objects.", "tools", "invalid_type"
        )
        message = (
            "Invalid 'tools': empty array. Expected an array with minimum length 1, but got an empty array instead."
        )
        need(tools, message, "tools", "empty_array")
        message = f"Invalid 'tools': array too long. Expected an array with maximum length 128, but got {len(tools)}."
        need(len(tools) <= 128, message, "tools", "array_above_max_length")

    def check_arguments(self, arguments, path: str):
        message = f"Invalid type for '{path}': expected a string, but got {type(arguments).__name__} instead."
        need(isinstance(arguments, str), message, path, "invalid_type")
        need(object_text(arguments), f"Invalid '{path}': not a JSON object.", path, "invalid_value")


CHAT_KEYS = frozenset(
    """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages
    metadata modalities model moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key
    prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier
    stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
    web_search_options""".split()
)
CHAT_MESSAGE_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal", "audio", "function_call"},
    "tool": {"role", "content", "tool_call_id"},
}
CHAT_PARTS = {
    "system": {"text"},
    "developer": {"text"},
    "user": {"text", "image_url", "input_audio", "file"},
    "assistant": {"text", "refusal"},
    "tool": {"text"},
}


class Chat(OpenAI):
    path = "/chat/completions"

    def __init__(self):
        self.spoke_reasoning = False  # whether reasoning_content may come back
        self.signatures, self.thoughts = {}, {}  # by tool call id: what must come back with it

    def new_call_id(self) -> str:
        return new_id("call_")

    def overflow(self, size: int) -> Wrong:
        message = (
            "This model's maximum context length is 128000 tokens. However, your messages resulted in "
            f"{max(size // 4, 128001)} tokens. Please reduce the length of the messages."
        )
        return Wrong(message, "messages", "context_length_exceeded")

    def last_user(self, body: dict) -> str:
        return next((texts(m["content"], "text") for m in reversed(body["messages"]) if m["role"] == "user"), "")

    def last_result(self, body: dict) -> str:
        return next((texts(m["content"], "text") for m in reversed(body["messages"]) if m["role"] == "tool"), "")

    # ---- what it accepts ----

    def check(self, body: dict, step: dict, headers: dict):
        self.check_parameters(body, CHAT_KEYS, step)
        self.check_limits(body)
        self.check_stream_options(body, {"include_usage", "include_obfuscation"})
        if body.get("tools") is not None:
            self.check_tools(body["tools"])
        messages = body.get("messages")
        need(messages is not None, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
        need(isinstance(messages, list), "Invalid type for 'messages': expected an array.", "messages", "invalid_type")
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        need(messages, message, "messages", "empty_array")
        for i, message in enumerate(messages):
            self.check_message(message, f"messages[{i}]", step)
        text = "Invalid content type. image_url is only supported by certain models."
        need(not (body["model"].startswith("blind") and '"image_url"' in json.dumps(messages)), text, "messages")
        self.check_pairs(messages)
        self.check_echoes(messages)
        self.check_mistral(messages, step.get("quirks", ()))

    def check_limits(self, body: dict):
        model = body["model"]
        message = "This model is only supported in v1/responses and not in v1/chat/completions."
        need("codex" not in model, message, "model", status=404)
        for key in ("max_tokens", "max_completion_tokens"):
            fits = body.get(key) is None or is_count(body[key])
            need(fits, f"Invalid '{key}': expected an integer of at least 1.", key, "integer_below_min_value")
        start = "Unsupported parameter: '{}' is not supported with this model."
        if REASONING_MODEL.match(model):
            message = start.format("max_tokens") + " Use 'max_completion_tokens' instead."
            need("max_tokens" not in body, message, "max_tokens", "unsupported_parameter")
            message = (
                f"Unsupported value: 'temperature' does not support {body.get('temperature')} with this "
                "model. Only the default (1) value is supported."
            )
            fits = body.get("temperature") in (None, 1) or body.get("reasoning_effort") == "none"
            need(fits, message, "temperature", "unsupported_value")
        elif model.startswith("old-"):
            message = start.format("max_completion_tokens")
            need("max_completion_tokens" not in body, message, "max_completion_tokens", "unsupported_parameter")
        both = "max_tokens" in body and "max_completion_tokens" in body
        need(not both, "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.")

    def check_tools(self, tools):
        self.check_tool_list(tools)
        for i, tool in enumerate(tools):
            path = f"tools[{i}]"
            check_keys(tool, {"type", "function"}, path)
            need(tool.get("type") == "function", f"Invalid value for '{path}.type'.", f"{path}.type", "invalid_value")
            self.check_function(tool.get("function"), f"{path}.function")

    def check_message(self, message, path: str, step: dict):
        role = message.get("role") if isinstance(message, dict) else None
        known = isinstance(role, str) and role in CHAT_MESSAGE_KEYS
        need(known, f"Invalid value for '{path}.role': {role!r}.", f"{path}.role", "invalid_value")
        extra = set(step.get("allow", ()))
        if role == "assistant" and self.spoke_reasoning:
            extra |= {"reasoning_content", "reasoning"}
        check_keys(message, CHAT_MESSAGE_KEYS[role] | extra, path)
        calls = message.get("tool_calls")
        if calls is not None:
            self.check_calls(calls, f"{path}.tool_calls")
        if role == "tool":
            check_id(message.get("tool_call_id"), 40, f"{path}.tool_call_id")
        self.check_content(message.get("content"), role, bool(calls or message.get("refusal")), f"{path}.content")

    def check_content(self, content, role: str, may_lack: bool, path: str):
        if content is None:
            wrong = f"Invalid value for '{path}': expected a string, got null.", path
            return need(role == "assistant" and may_lack, *wrong)
        if isinstance(content, str):
            return check_text(content, path)
        wrong = f"Invalid type for '{path}': expected a string or a non-empty array of parts.", path, "invalid_type"
        need(isinstance(content, list) and content, *wrong)
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            allowed = sorted(CHAT_PARTS[role])
            message = f"Invalid value: {kind!r}. Supported values are: {allowed}."
            need(kind in allowed, message, f"{path}[{i}].type", "invalid_value")
            if kind == "text":
                check_text(part.get("text"), f"{path}[{i}].text")
            if kind == "image_url":
                check_keys(part, {"type", "image_url"}, f"{path}[{i}]")
                check_keys(part.get("image_url"), {"url", "detail"}, f"{path}[{i}].image_url")
                check_image(part["image_url"], "url", f"{path}[{i}].image_url")

    def check_calls(self, calls, path: str):
        wrong = f"Invalid '{path}': empty array. Expected an array with minimum length 1.", path, "empty_array"
        need(isinstance(calls, list) and calls, *wrong)
        extra = {"extra_content"} if self.signatures else set()
        for i, call in enumerate(calls):
            here = f"{path}[{i}]"
            check_keys(call, {"id", "type", "function"} | extra, here)
            check_id(call.get("id"), 40, f"{here}.id")
            need(call.get("type") == "function", f"Invalid value for '{here}.type'.", f"{here}.type", "invalid_value")
            check_keys(call.get("function"), {"name", "arguments"}, f"{here}.function")
            check_name(call["function"].get("name"), f"{here}.function.name")
            self.check_arguments(call["function"].get("arguments"), f"{here}.function.arguments")

    def check_pairs(self, messages: list):
        """Directly after an assistant message with tool calls: one tool message for each, and no others anywhere."""
        waiting = []
        for i, message in enumerate([*messages, {"role": "end"}]):
            here = f"messages.[{i}].role"
            if message["role"] == "tool":
                text = (
                    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message "
                    "with 'tool_calls'."
                )
                need(message["tool_call_id"] in waiting, text, here)
                waiting.remove(message["tool_call_id"])
                continue
            text = (
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                "'tool_call_id'. The following tool_call_ids did not have response messages: "
            )
            need(not waiting, text + ", ".join(waiting), here)
            waiting = [call["id"] for call in message.get("tool_calls") or ()]
            need(
                len(set(waiting)) == len(waiting),
                f"Duplicate tool call id in messages[{i}].",
                f"messages[{i}].tool_calls",
            )

    def check_echoes(self, messages: list):
        """Gemini's signatures within the current turn, DeepSeek's reasoning everywhere."""
        turn = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        for i, message in enumerate(messages):
            for call in message.get("tool_calls") or ():
                given, thought = self.signatures.get(call["id"]), self.thoughts.get(call["id"])
                extra = call.get("extra_content") or {}
                back = (extra.get("google") or {}).get("thought_signature")
                text = (
                    "Function call is missing a thought_signature in functionCall parts. Function call "
                    f"`{call['function']['name']}`, position {i}."
                )
                need(not given or i < turn or back == given, text, code="INVALID_ARGUMENT")
                text = "The `reasoning_content` in the thinking mode must be passed back to the API."
                need(not thought or message.get("reasoning_content") == thought, text)

    def check_mistral(self, messages: list, quirks):
        ids = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
        for call_id in ids if "mistral_ids" in quirks else ():
            message = f"Tool call id was {call_id} but must be a-z, A-Z, 0-9, with a length of 9."
            need(re.fullmatch(r"[a-zA-Z0-9]{9}", call_id), message, code="3280")
        roles = [message["role"] for message in messages]
        clash = "no_user_after_tool" in quirks and ("tool", "user") in zip(roles, roles[1:], strict=False)
        need(not clash, "Unexpected role 'user' after role 'tool'", code="3230")

    # ---- what it answers ----

    def usage(self, reply: Reply) -> dict:
        fields = {
            "prompt_tokens": reply.used("input"),
            "completion_tokens": reply.used("output"),
            "total_tokens": reply.used("input") + reply.used("output"),
            "prompt_tokens_details": {"cached_tokens": reply.used("cached"), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reply.used("reasoning"),
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
        return fields | ({"cost": reply.usage["cost"]} if "cost" in reply.usage else {})

    def finish(self, reply: Reply) -> str:
        if reply.finish:
            return reply.finish
        return "tool_calls" if reply.calls and "finish_stop" not in reply.quirks else "stop"

    def remember(self, reply: Reply):
        self.spoke_reasoning |= bool(reply.reasoning)
        for call in reply.calls:
            if "reasoning_required" in reply.quirks:
                self.thoughts[call.id] = reply.reasoning
        if "extra_content" in reply.quirks and reply.calls:
            self.signatures[reply.calls[0].id] = signature(reply.calls[0].id)

    def reasoning_field(self, reply: Reply) -> str:
        return "reasoning" if "reasoning_key" in reply.quirks else "reasoning_content"

    def content(self, text, reply: Reply):
        return [{"type": "text", "text": text}] if text and "content_list" in reply.quirks else text

    def signed(self, call: Call) -> dict:
        given = self.signatures.get(call.id)
        return {"extra_content": {"google": {"thought_signature": given}}} if given else {}

    def whole(self, reply: Reply) -> dict:
        self.remember(reply)
        message = {"role": "assistant", "content": self.content(reply.text, reply), "refusal": None, "annotations": []}
        if reply.reasoning:
            message[self.reasoning_field(reply)] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [self.call(call, reply.quirks) for call in reply.calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish(reply)}
        frame = self.frame(reply, "chat.completion") | {"choices": [choice]}
        return frame | ({"usage": self.usage(reply)} if reply.usage else {})

    def call(self, call: Call, quirks) -> dict:
        arguments = call.object if "arguments_object" in quirks else call.text
        row = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
        if "no_id" in quirks:
            del row["id"]
        return row | self.signed(call)

    def frame(self, reply: Reply, kind: str) -> dict:
        return {
            "id": new_id("chatcmpl-"),
            "object": kind,
            "created": EPOCH,
            "model": reply.model,
            "service_tier": "default",
            "system_fingerprint": "fp_0123456789",
        }

    def call_deltas(self, index: int, call: Call, reply: Reply):
        """One tool call as the stream has it: id and name first, then fragments of arguments; or as a quirk has it."""
        quirks, half = reply.quirks, len(call.name) // 2
        if quirks & {"whole_call", "arguments_object"}:
            rows = [self.call(call, quirks)]
        else:
            name = call.name[:half] if "name_split" in quirks else call.name
            rows = [
                {"id": call.id, "type": "function", "function": {"name": name, "arguments": ""}} | self.signed(call)
            ]
            rows += [{"function": {"name": call.name[half:]}}] if "name_split" in quirks else []
            rows += [{"function": {"arguments": piece}} for piece in reply.pieces(call.text, 3)]
        for row in rows:
            if "name_repeated" in quirks:
                row["function"]["name"] = call.name
            if "id_repeated" in quirks:
                row["id"] = call.id
            if "no_id" in quirks:
                row.pop("id", None)
            yield row if "no_index" in quirks else {"index": 0 if "all_index_0" in quirks else index} | row

    def deltas(self, reply: Reply) -> list[dict]:
        rows = [{self.reasoning_field(reply): piece} for piece in reply.pieces(reply.reasoning or "")]
        rows += [{"content": self.content(piece, reply)} for piece in reply.pieces(reply.text or "")]
        for i, call in enumerate(reply.calls):
            rows += [{"tool_calls": [row]} for row in self.call_deltas(i, call, reply)]
        if rows and "tool_calls" in rows[0]:
            rows[0] = {"role": "assistant", "content": None, "refusal": None} | rows[0]
        else:
            rows.insert(0, {"role": "assistant", "content": "", "refusal": None})
        if "nulls" in reply.quirks:
            rows = [{"content": None, "tool_calls": None, "reasoning_content": None} | row for row in rows]
        return rows

    def stream(self, reply: Reply) -> list:
        """[(event name or None, data), ...] as documented, [DONE] last."""
        self.remember(reply)
        asked = (reply.body.get("stream_options") or {}).get("include_usage") and reply.usage
        frame = self.frame(reply, "chat.completion.chunk") | ({"usage": None} if asked else {})

        def chunk(delta, finish=None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return None, frame | {"choices": [choice]}

        events = [chunk(delta) for delta in self.deltas(reply)]
        if "unknown_events" in reply.quirks:  # Azure's first chunk
            events.insert(0, (None, frame | {"choices": [], "prompt_filter_results": []}))
        if reply.finish == "failed":
            return [*events, *self.stream_error(reply, True)]
        last = chunk({}, None if "no_finish" in reply.quirks else self.finish(reply))
        if "usage_in_finish" in reply.quirks and reply.usage:
            last[1]["usage"] = self.usage(reply)
        elif asked:
            return [*events, last, (None, frame | {"choices": [], "usage": self.usage(reply)}), (None, "[DONE]")]
        return [*events, last, (None, "[DONE]")]

    def ending(self, event) -> bool:
        return event[1] == "[DONE]"

    def stream_error(self, reply: Reply, error) -> list:
        message = error if isinstance(error, str) else "The server had an error while processing your request."
        known = {"message": message, "type": "server_error", "param": None, "code": None}
        known = error if isinstance(error, dict) else known
        if "error_in_choice" not in reply.quirks:
            return [(None, {"error": known})]
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
        return [(None, self.frame(reply, "chat.completion.chunk") | {"error": known, "choices": [choice]})]

    def long_event(self, text: str, reply: Reply):
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        return None, self.frame(reply, "chat.completion.chunk") | {"choices": [choice]}


def check_image(part: dict, key: str, path: str):
    """What OpenAI says of a picture: an address, or a data URL whose bytes are what they begin as."""
    url, detail = part.get(key), part.get("detail", "auto")
    need(isinstance(url, str), f"Missing required parameter: '{path}.{key}'.", path, "missing_required_parameter")
    need(detail in ("auto", "low", "high", "original"), f"Invalid value: '{detail}'.", f"{path}.detail")
    if re.match("https?://", url):
        return
    message = f"Invalid '{path}.{key}'. Expected a base64-encoded data URL with an image MIME type."
    data = re.fullmatch(r"data:image/(png|jpeg|gif|webp);base64,([A-Za-z0-9+/]+=*)", url)
    need(data, message, path, "invalid_value")
    message = "The image data you provided does not represent a valid image. Please check your input and try again."
    need(kind_of(data[2]), message, path, "invalid_image")


def kind_of(data: str) -> str:
    """What the bytes are that stand there in base64; '' for none that a vendor takes."""
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error:
        return ""
    return next((kind for kind, start in IMAGE_STARTS.items() if raw.startswith(start)), "")


# ===== 3. Responses ===========================================================
#
# OpenAI Responses. The transcript is a list of items; a call and its output find
# each other by call_id.

RESPONSES_KEYS = frozenset(
    """access_programs background background_options context_management conversation image include input instructions
    max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt
    prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store stream
    stream_options temperature text tool_choice tools top_logprobs top_p truncation user""".split()
)
MOVED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
ITEM_KEYS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status", "namespace"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
}
ITEM_PARTS = {
    "user": ("input_text", "input_image", "input_file"),
    "system": ("input_text",),
    "developer": ("input_text",),
    "assistant": ("output_text", "refusal"),
    "output": ("input_text", "input_image", "input_file"),
}


class Responses(OpenAI):
    path = "/responses"

    def __init__(self):
        self.thought_of = {}  # function_call item id: the reasoning item that must come before it

    def new_call_id(self) -> str:
        return new_id("call_")

    def overflow(self, size: int) -> Wrong:
        message = "Your input exceeds the context window of this model. Please adjust your input and try again."
        return Wrong(message, "input", "context_length_exceeded")

    def last_user(self, body: dict) -> str:
        if isinstance(body["input"], str):
            return body["input"]
        users = (item for item in reversed(body["input"]) if item.get("role") == "user")
        return next((texts(item["content"], "input_text") for item in users), "")

    def last_result(self, body: dict) -> str:
        items = body["input"] if isinstance(body["input"], list) else []
        outputs = (item for item in reversed(items) if item.get("type") == "function_call_output")
        return next((texts(item["output"], "input_text") for item in outputs), "")

    # ---- what it accepts ----

    def check(self, body: dict, step: dict, headers: dict):
        for old, new in MOVED.items():
            message = (
                f"Unsupported parameter: '{old}'. In the Responses API, this parameter has moved to '{new}'. "
                "Try again with the new parameter."
            )
            need(old not in body or old in step.get("allow", ()), message, old, "unsupported_parameter")
        self.check_parameters(body, RESPONSES_KEYS, step)
        self.check_stream_options(body, {"include_obfuscation"})
        self.check_limits(body)
        if body.get("tools") is not None:
            self.check_tools(body["tools"])
        items = body.get("input")
        need(items is not None, "Missing required parameter: 'input'.", "input", "missing_required_parameter")
        if isinstance(items, str):
            return check_text(items, "input")
        need(
            isinstance(items, list), "Invalid type for 'input': expected a string or an array.", "input", "invalid_type"
        )
        message = "Invalid 'input': empty array. Expected an array with minimum length 1."
        need(items, message, "input", "empty_array")
        for i, item in enumerate(items):
            self.check_item(item, f"input[{i}]")
        self.check_pairs(items)
        self.check_neighbours(items, body)

    def check_limits(self, body: dict):
        limit, before = body.get("max_output_tokens"), body.get("previous_response_id")
        fits = limit is None or (is_count(limit) and limit >= 16)
        message = "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16."
        need(fits, message, "max_output_tokens", "integer_below_min_value")
        message = f"Previous response with id '{before}' not found."
        need(before is None, message, "previous_response_id", "previous_response_not_found")
        for key in ("temperature", "top_p"):
            thinks = REASONING_MODEL.match(body["model"]) and (body.get("reasoning") or {}).get("effort") != "none"
            clash = thinks and body.get(key) is not None
            message = f"Unsupported parameter: '{key}' is not supported with this model."
            need(not clash, message, key, "unsupported_parameter")
        instructions = body.get("instructions")
        fits = instructions is None or isinstance(instructions, str)
        need(fits, "Invalid type for 'instructions': expected a string.", "instructions", "invalid_type")

    def check_tools(self, tools):
        self.check_tool_list(tools)
        for i, tool in enumerate(tools):
            path = f"tools[{i}]"
            kind = tool.get("type") if isinstance(tool, dict) else None
            need(kind == "function", f"Invalid value: {kind!r}.", f"{path}.type", "invalid_value")
            need(
                "name" in tool,
                f"Missing required parameter: '{path}.name'.",
                f"{path}.name",
                "missing_required_parameter",
            )
            self.check_function(tool, path)

    def check_item(self, item, path: str):
        need(isinstance(item, dict), f"Invalid type for '{path}': expected an object.", path, "invalid_type")
        kind = item.get("type") or ("message" if "role" in item else None)
        need(kind in ITEM_KEYS, f"Invalid value: {kind!r}.", f"{path}.type", "invalid_value")
        check_keys(item, ITEM_KEYS[kind], path)
        checks = {
            "message": self.check_message,
            "function_call": self.check_call,
            "function_call_output": self.check_output,
            "reasoning": self.check_reasoning,
        }
        checks[kind](item, path)

    def check_message(self, item: dict, path: str):
        role = item.get("role")
        known = role in ("user", "assistant", "system", "developer")
        need(known, f"Invalid value: {role!r}.", f"{path}.role", "invalid_value")
        self.check_own_id(item, "msg", path)
        self.check_parts(item.get("content"), role, f"{path}.content")

    def check_call(self, item: dict, path: str):
        self.check_own_id(item, "fc", path)
        check_id(item.get("call_id"), 64, f"{path}.call_id")
        check_name(item.get("name"), f"{path}.name")
        self.check_arguments(item.get("arguments"), f"{path}.arguments")

    def check_output(self, item: dict, path: str):
        check_id(item.get("call_id"), 64, f"{path}.call_id")
        self.check_parts(item.get("output"), "output", f"{path}.output")

    def check_reasoning(self, item: dict, path: str):
        need(item.get("id"), f"Missing required parameter: '{path}.id'.", f"{path}.id", "missing_required_parameter")
        self.check_own_id(item, "rs", path)
        message = f"Missing required parameter: '{path}.summary'."
        need(isinstance(item.get("summary"), list), message, f"{path}.summary", "missing_required_parameter")
        sealed = item.get("encrypted_content")
        message = f"The encrypted content for item {item['id']} could not be verified."
        need(sealed in (None, signature(item["id"])), message, None, "invalid_encrypted_content")

    def check_own_id(self, item: dict, prefix: str, path: str):
        own = item.get("id")
        message = f"Invalid '{path}.id': '{own}'. Expected an ID that begins with '{prefix}'."
        need(own is None or str(own).startswith(prefix), message, f"{path}.id", "invalid_value")

    def check_parts(self, content, role: str, path: str):
        if isinstance(content, str):
            return check_text(content, path)
        message = f"Invalid type for '{path}': expected a string or an array of parts."
        need(isinstance(content, list), message, path, "invalid_type")
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            supported = " and ".join(f"'{name}'" for name in ITEM_PARTS[role])
            message = f"Invalid value: '{kind}'. Supported values are: {supported}."
            need(kind in ITEM_PARTS[role], message, f"{path}[{i}]", "invalid_value")
            if kind.endswith("_text"):
                check_text(part.get("text"), f"{path}[{i}].text")
            if kind == "input_image":
                check_keys(part, {"type", "image_url", "file_id", "detail"}, f"{path}[{i}]")
                if "file_id" not in part:
                    check_image(part, "image_url", f"{path}[{i}]")

    def check_pairs(self, items: list):
        calls, answered = [], []
        for item in items:
            if item.get("type") == "function_call":
                need(item["call_id"] not in calls, f"Duplicate function call with call_id {item['call_id']}.", "input")
                calls.append(item["call_id"])
            elif item.get("type") == "function_call_output":
                call_id = item["call_id"]
                need(call_id in calls, f"No tool call found for function call output with call_id {call_id}.", "input")
                need(call_id not in answered, f"Duplicate function call output with call_id {call_id}.", "input")
                answered.append(call_id)
        for call_id in calls:
            need(call_id in answered, f"No tool output found for function call {call_id}.", "input")

    def check_neighbours(self, items: list, body: dict):
        """A reasoning item and what it led to stay together."""
        given = {item["id"] for item in items if item.get("type") == "reasoning"}
        for item, after in zip(items, [*items[1:], {}], strict=True):
            wanted = self.thought_of.get(item.get("id"))
            if wanted and item.get("type") == "function_call":
                message = (
                    f"Item '{item['id']}' of type 'function_call' was provided without its required 'reasoning' "
                    f"item: '{wanted}'."
                )
                need(wanted in given, message, "input")
            if item.get("type") != "reasoning":
                continue
            message = (
                f"Item with id '{item['id']}' not found. Items are not persisted when `store` is set to "
                "false. Try again with `store` set to true, or remove this item from your input."
            )
            need(item.get("encrypted_content") or body.get("store") is not False, message, "input", status=404)
            follows = after.get("type") in ("function_call", "reasoning") or after.get("role") == "assistant"
            message = f"Item '{item['id']}' of type 'reasoning' was provided without its required following item."
            need(follows, message, "input")

    # ---- what it answers ----

    def usage(self, reply: Reply) -> dict:
        return {
            "input_tokens": reply.used("input"),
            "input_tokens_details": {"cached_tokens": reply.used("cached"), "cache_write_tokens": 0},
            "output_tokens": reply.used("output"),
            "output_tokens_details": {"reasoning_tokens": reply.used("reasoning")},
            "total_tokens": reply.used("input") + reply.used("output"),
        }

    def response(self, reply: Reply) -> dict:
        body = reply.body
        defaults = {
            "instructions": None,
            "max_output_tokens": None,
            "max_tool_calls": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": True,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
        }
        echoed = {key: body[key] if body.get(key) is not None else value for key, value in defaults.items()}
        frame = {
            "id": new_id("resp_", 32),
            "object": "response",
            "created_at": EPOCH,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": reply.model,
            "output": [],
            "usage": None,
            "user": None,
        }
        return frame | echoed

    def ended(self, response: dict, reply: Reply, output: list) -> dict:
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reply.finish)
        status = "failed" if reply.finish == "failed" else "incomplete" if reason else "completed"
        error = {"code": "server_error", "message": "The model failed to generate a response."}
        return response | {
            "status": status,
            "error": error if status == "failed" else None,
            "incomplete_details": {"reason": reason} if reason else None,
            "output": [] if status == "failed" else output,
            "usage": self.usage(reply) if reply.usage and status != "failed" else None,
        }

    def items(self, reply: Reply) -> list[dict]:
        """The finished output items, in order."""
        rows = []
        if reply.reasoning:
            own = new_id("rs_", 32)
            summary = [{"type": "summary_text", "text": reply.reasoning}]
            rows.append({"id": own, "type": "reasoning", "summary": summary, "encrypted_content": signature(own)})
        if reply.text is not None:
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": reply.text}
            message = {"id": new_id("msg_", 32), "type": "message", "status": "completed", "content": [part]}
            rows.append(message | {"role": "assistant"})
        for call in reply.calls:
            row = {"id": new_id("fc_", 32), "type": "function_call", "status": "completed", "arguments": call.text}
            rows.append(row | {"call_id": call.id, "name": call.name})
            if reply.reasoning:
                self.thought_of[row["id"]] = rows[0]["id"]
        return rows

    def whole(self, reply: Reply) -> dict:
        return self.ended(self.response(reply), reply, self.items(reply))

    def stream(self, reply: Reply) -> list:
        response, output = self.response(reply), self.items(reply)
        events = [{"type": "response.created", "response": response}]
        events.append({"type": "response.in_progress", "response": response})
        for index, item in enumerate(output):
            rows = {"reasoning": self.thought, "message": self.said, "function_call": self.called}[item["type"]]
            events += [row | {"output_index": index} for row in rows(item, reply)]
        end = self.ended(response, reply, output)
        if "unknown_events" in reply.quirks:
            events.insert(2, {"type": "response.something_new", "detail": {}})
        events.append({"type": f"response.{end['status']}", "response": end})
        return [(event["type"], event | {"sequence_number": i}) for i, event in enumerate(events)]

    def thought(self, item: dict, reply: Reply) -> list[dict]:
        at, [part] = {"item_id": item["id"], "summary_index": 0}, item["summary"]
        start = "response.reasoning_summary_"
        return [
            {"type": "response.output_item.added", "item": item | {"summary": [], "encrypted_content": ""}},
            {"type": start + "part.added", **at, "part": part | {"text": ""}},
            *({"type": start + "text.delta", **at, "delta": piece} for piece in reply.pieces(part["text"])),
            {"type": start + "text.done", **at, "text": part["text"]},
            {"type": start + "part.done", **at, "part": part},
            {"type": "response.output_item.done", "item": item},
        ]

    def said(self, item: dict, reply: Reply) -> list[dict]:
        at, [part] = {"item_id": item["id"], "content_index": 0}, item["content"]
        delta = {"type": "response.output_text.delta", **at, "logprobs": []}
        return [
            {"type": "response.output_item.added", "item": item | {"status": "in_progress", "content": []}},
            {"type": "response.content_part.added", **at, "part": part | {"text": ""}},
            *(delta | {"delta": piece} for piece in reply.pieces(part["text"])),
            {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []},
            {"type": "response.content_part.done", **at, "part": part},
            {"type": "response.output_item.done", "item": item},
        ]

    def called(self, item: dict, reply: Reply) -> list[dict]:
        at, start = {"item_id": item["id"]}, "response.function_call_arguments."
        return [
            {"type": "response.output_item.added", "item": item | {"status": "in_progress", "arguments": ""}},
            *({"type": start + "delta", **at, "delta": piece} for piece in reply.pieces(item["arguments"], 3)),
            {"type": start + "done", **at, "arguments": item["arguments"]},
            {"type": "response.output_item.done", "item": item},
        ]

    def ending(self, event) -> bool:
        return event[0] in ("response.completed", "response.incomplete", "response.failed")

    def stream_error(self, reply: Reply, error) -> list:
        message = error if isinstance(error, str) else "The server had an error while processing your request."
        known = {"code": "server_error", "message": message, "param": None}
        known = error if isinstance(error, dict) else known
        return [("error", {"type": "error", **known, "sequence_number": 99})]

    def long_event(self, text: str, reply: Reply):
        at = {"item_id": "msg_long", "output_index": 0, "content_index": 0, "logprobs": [], "sequence_number": 99}
        return "response.output_text.delta", {"type": "response.output_text.delta", **at, "delta": text}


# ===== 4. Messages ============================================================
#
# Anthropic Messages. Neighbouring messages of one role count as one; the checks on
# pairs look at the merged conversation.

MESSAGES_KEYS = frozenset(
    """cache_control container context_management diagnostics inference_geo max_tokens mcp_servers messages metadata
    model output_config service_tier speed stop_sequences stream system temperature thinking tool_choice tools top_k
    top_p""".split()
)
BLOCK_KEYS = {
    "text": {"type", "text", "cache_control", "citations"},
    "image": {"type", "source", "cache_control"},
    "document": {"type", "source", "cache_control", "title", "context", "citations"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
    "thinking": {"type", "thinking", "signature"},
    "redacted_thinking": {"type", "data"},
}
BLOCKS = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "tool_use", "thinking", "redacted_thinking"},
    "tool_result": {"text", "image", "document"},
    "system": {"text"},
}
VERSIONS = ("2023-01-01", "2023-06-01", "2026-10-21")
SAMPLING_KEYS = {"temperature", "top_p", "top_k"}  # gone in version 2026-10-21
ADAPTIVE_ONLY = re.compile(r"claude-(opus-4-[78]|(sonnet|fable|opus)-5)")
ANTHROPIC_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Messages:
    path = "/messages"
    request_id_header = "request-id"

    def __init__(self):
        self.thought_before = {}  # tool_use id: signature of the thinking block that must come before it

    def new_call_id(self) -> str:
        return new_id("toolu_01", 22)

    def authorise(self, headers: dict, path: str):
        key, version = headers.get("x-api-key", ""), headers.get("anthropic-version")
        bearer = headers.get("authorization", "")
        if not key and bearer[:7].lower() == "bearer ":  # what the vendor's libraries send since 2026-10-21
            key = bearer[7:].strip()
        need(key, "x-api-key header is required", status=401)
        need(key != "bad-key", "invalid x-api-key", status=401)
        message = "Your API key does not have permission to use the specified resource."
        need(key != "forbidden-key", message, status=403)
        need(version, "anthropic-version: header is required")
        need(version in VERSIONS, f'anthropic-version: "{version}" is not a valid version')

    def error(self, wrong: Wrong, request_id: str) -> dict:
        kind = ANTHROPIC_ERRORS.get(wrong.status, "api_error" if wrong.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": wrong.message}, "request_id": request_id}

    def fault(self, status: int) -> Wrong:
        known = {
            401: "invalid x-api-key",
            403: "Your API key does not have permission to use the specified resource.",
            404: "model: not found",
            429: "This request would exceed your account's rate limit. Please try again later.",
            529: "Overloaded",
        }
        return Wrong(known.get(status, "Internal server error"), status=status)

    def unreadable(self) -> Wrong:
        return Wrong("The request body is not valid JSON.")

    def overflow(self, size: int) -> Wrong:
        return Wrong(f"prompt is too long: {max(size // 4, 200001)} tokens > 200000 maximum")

    def models(self, ids: list, bare: bool, query: dict):
        start = ids.index(query["after_id"]) + 1 if query.get("after_id") in ids else 0
        page = ids[start : start + int(query.get("limit", 20))]
        rows = [
            {"type": "model", "id": i, "display_name": i.title(), "created_at": "2025-01-01T00:00:00Z"} for i in page
        ]
        more = start + len(page) < len(ids)
        ends = {"first_id": page[0] if page else None, "last_id": page[-1] if page else None}
        return rows if bare else {"data": rows, "has_more": more, **ends}

    def last_user(self, body: dict) -> str:
        said = (texts(m["content"], "text") for m in reversed(body["messages"]) if m["role"] == "user")
        return next((text for text in said if text), "")

    def last_result(self, body: dict) -> str:
        for message in reversed(body["messages"]):
            for block in reversed(message["content"] if isinstance(message["content"], list) else []):
                if block["type"] == "tool_result":
                    return texts(block.get("content"), "text")
        return ""

    # ---- what it accepts ----

    def check(self, body: dict, step: dict, headers: dict):
        allowed = MESSAGES_KEYS | set(step.get("allow", ()))
        if headers["anthropic-version"] >= "2026-10-21":
            allowed -= SAMPLING_KEYS
        for key in body:
            need(key in allowed and key not in step.get("reject", ()), f"{key}: Extra inputs are not permitted")
        for key in ("model", "max_tokens", "messages"):
            need(body.get(key) is not None, f"{key}: Field required")
        self.check_parameters(body)
        for i, tool in enumerate(body.get("tools") or ()):
            self.check_tool(tool, f"tools.{i}")
        names = [tool["name"] for tool in body.get("tools") or ()]
        need(len(set(names)) == len(names), "tools: Tool names must be unique.")
        need(isinstance(body["messages"], list), "messages: Input should be a valid list")
        need(body["messages"], "messages: at least one message is required")
        for i, message in enumerate(body["messages"]):
            self.check_message(message, f"messages.{i}")
        marks = json.dumps([body.get("system"), body.get("tools"), body["messages"]]).count('"cache_control": {')
        need(marks <= 4, f"A maximum of 4 blocks with cache_control may be provided. Found {marks}.")
        merged = self.merged(body["messages"])
        need(merged[0][0] == "user", 'messages: first message must use the "user" role')
        message = (
            "This model does not support assistant message prefill. The conversation must end with a user message."
        )
        need(merged[-1][0] == "user", message)
        self.check_pairs(merged)
        self.check_turn(merged)

    def check_parameters(self, body: dict):
        model, limit, thinking = body["model"], body["max_tokens"], body.get("thinking") or {}
        need(isinstance(model, str) and model, "model: String should have at least 1 character")
        need(not model.startswith("missing"), f"model: {model}", status=404)
        need(is_count(limit), "max_tokens: Input should be greater than or equal to 1")
        heat = body.get("temperature")
        need(heat is None or (is_number(heat) and 0 <= heat <= 1), "temperature: range: 0..1")
        stream = body.get("stream")
        need(stream is None or isinstance(stream, bool), "stream: Input should be a valid boolean")
        kind = thinking.get("type", "disabled")
        need(
            kind in ("enabled", "disabled", "adaptive"), f"thinking: Input tag '{kind}' found using 'type' is not valid"
        )
        if kind == "enabled":
            text = '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive".'
            need(not ADAPTIVE_ONLY.match(model), text)
            budget = thinking.get("budget_tokens")
            need(is_count(budget) and budget >= 1024, "thinking.enabled.budget_tokens: Input should be at least 1024")
            need(budget < limit, "`max_tokens` must be greater than `thinking.budget_tokens`.")
            need(heat in (None, 1), "`temperature` may only be set to 1 when thinking is enabled.")
        choice = body.get("tool_choice")
        known = choice is None or (isinstance(choice, dict) and choice.get("type") in ("auto", "any", "tool", "none"))
        need(known, "tool_choice: Input should be an object with type 'auto', 'any', 'tool' or 'none'")
        need(choice is None or body.get("tools"), "tool_choice: may only be specified while providing tools.")
        system = body.get("system")
        if isinstance(system, list):
            self.check_blocks(system, "system", "system")
        else:
            need(system is None or isinstance(system, str), "system: Input should be a valid string")

    def check_tool(self, tool, path: str):
        need(isinstance(tool, dict), f"{path}: Input should be an object")
        known = {"type", "name", "description", "input_schema", "cache_control", "strict"}
        for key in tool:
            need(key in known, f"{path}.custom.{key}: Extra inputs are not permitted")
        for key in ("name", "input_schema"):
            need(key in tool, f"{path}.custom.{key}: Field required")
        self.check_tool_name(tool["name"], f"{path}.custom.name")
        schema = tool["input_schema"]
        good = isinstance(schema, dict) and schema.get("type") == "object"
        need(good, f"{path}.custom.input_schema.type: Input should be 'object'")

    def check_tool_name(self, name, path: str):
        good = isinstance(name, str) and TOOL_NAME.fullmatch(name)
        need(good, f"{path}: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'")

    def check_message(self, message, path: str):
        need(isinstance(message, dict), f"{path}: Input should be an object")
        for key in message:
            need(key in ("role", "content"), f"{path}.{key}: Extra inputs are not permitted")
        role, content = message.get("role"), message.get("content")
        text = (
            'messages: Unexpected role "system". The Messages API accepts a top-level `system` '
            'parameter, not "system" as an input message role.'
        )
        need(role != "system", text)
        need(role in ("user", "assistant"), f"{path}.role: Input should be 'user' or 'assistant'")
        need(content is not None, f"{path}.content: Field required")
        need(isinstance(content, (str, list)), f"{path}.content: Input should be a valid string or list")
        need(
            content, f"{path}: all messages must have non-empty content except for the optional final assistant message"
        )
        if isinstance(content, str):
            return self.check_words(content)
        self.check_blocks(content, role, f"{path}.content")

    def check_words(self, text):
        need(text, "messages: text content blocks must be non-empty")
        need(text.strip(), "messages: text content blocks must contain non-whitespace text")

    def check_blocks(self, blocks: list, role: str, path: str):
        for i, block in enumerate(blocks):
            kind = block.get("type") if isinstance(block, dict) else None
            expected = ", ".join(f"'{name}'" for name in sorted(BLOCKS[role]))
            message = (
                f"{path}.{i}: Input tag '{kind}' found using 'type' does not match any of the expected tags: {expected}"
            )
            need(kind in BLOCKS[role], message)
            for key in block:
                need(key in BLOCK_KEYS[kind], f"{path}.{i}.{kind}.{key}: Extra inputs are not permitted")
            checks = {
                "text": self.check_text,
                "image": self.check_image,
                "tool_use": self.check_tool_use,
                "tool_result": self.check_tool_result,
                "thinking": self.check_thinking,
            }
            if kind in checks:
                checks[kind](block, f"{path}.{i}.{kind}")

    def check_text(self, block: dict, path: str):
        need(isinstance(block.get("text"), str), f"{path}.text: Field required")
        self.check_words(block["text"])

    def check_image(self, block: dict, path: str):
        source = block.get("source")
        need(isinstance(source, dict), f"{path}.source: Field required")
        if source.get("type") == "url":
            return need(
                str(source.get("url")).startswith("https://"), f"{path}.source.url.url: Only HTTPS URLs are supported."
            )
        need(source.get("type") == "base64", f"{path}.source: Input should be of type 'base64' or 'url'")
        kinds = ("image/png", "image/jpeg", "image/gif", "image/webp")
        need(source.get("media_type") in kinds, f"{path}.source.base64.media_type: Input should be one of {kinds}")
        for key in source:
            need(key in ("type", "media_type", "data"), f"{path}.source.base64.{key}: Extra inputs are not permitted")
        good = isinstance(source.get("data"), str) and re.fullmatch(r"[A-Za-z0-9+/]+=*", source["data"])
        need(good, f"{path}.source.base64: invalid base64 data")
        message = f"image exceeds 10 MB maximum: {len(source['data'])} bytes > {IMAGE_LIMIT} bytes"
        need(len(source["data"]) <= IMAGE_LIMIT, f"{path}.source.base64: {message}")
        kind = kind_of(source["data"])
        need(kind, f"{path}.source.base64.data: Could not process image")
        same = source["media_type"] == f"image/{kind}"
        need(same, f"{path}.source.base64.data: Image does not match the provided media type {source['media_type']}")

    def check_tool_use(self, block: dict, path: str):
        for key in ("id", "name", "input"):
            need(key in block, f"{path}.{key}: Field required")
        good = isinstance(block["id"], str) and re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"])
        need(good, f"{path}.id: String should match pattern '^[a-zA-Z0-9_-]+$'")
        self.check_tool_name(block["name"], f"{path}.name")
        need(isinstance(block["input"], dict), f"{path}.input: Input should be a valid dictionary")

    def check_tool_result(self, block: dict, path: str):
        need(isinstance(block.get("tool_use_id"), str), f"{path}.tool_use_id: Field required")
        content = block.get("content")
        need(content or not block.get("is_error"), f"{path}: content cannot be empty if `is_error` is true")
        if isinstance(content, list):
            self.check_blocks(content, "tool_result", f"{path}.content")
        else:
            need(content is None or isinstance(content, str), f"{path}.content: Input should be a valid string")

    def check_thinking(self, block: dict, path: str):
        text = block.get("thinking")
        need(isinstance(text, str), f"{path}.thinking: Field required")
        need("signature" in block, f"{path}.signature: Field required")
        need(block["signature"] == signature(text), f"{path}: Invalid `signature` in `thinking` block")

    def merged(self, messages: list) -> list[tuple[str, list]]:
        """[(role, blocks), ...] with neighbours of one role joined."""
        rows = []
        for message in messages:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if rows and rows[-1][0] == message["role"]:
                rows[-1][1].extend(blocks)
            else:
                rows.append((message["role"], list(blocks)))
        return rows

    def check_pairs(self, merged: list):
        waiting, every = [], []
        for i, (_, blocks) in enumerate(merged):
            kinds = [block["type"] for block in blocks]
            answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
            for call_id in answered:
                message = (
                    f"messages.{i}.content: unexpected `tool_use_id` found in `tool_result` blocks: {call_id}. "
                    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message."
                )
                need(call_id in waiting, message)
            message = (
                f"messages.{i}.content: each tool_use must have a single result. Found multiple `tool_result` "
                f"blocks with id: {answered}"
            )
            need(len(set(answered)) == len(answered), message)
            missing = [call_id for call_id in waiting if call_id not in answered]
            message = (
                f"messages.{i - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block "
                "in the next message."
            )
            first = kinds[: len(answered)] == ["tool_result"] * len(answered)
            need(not missing and first, message if missing else f"messages.{i}: `tool_result` blocks must come first.")
            waiting = [block["id"] for block in blocks if block["type"] == "tool_use"]
            every += waiting
        need(len(set(every)) == len(every), "messages: `tool_use` ids must be unique")

    def check_turn(self, merged: list):
        """Within the current turn thinking stands before the tool_use that it led to."""
        asks = [i for i, (role, blocks) in enumerate(merged) if role == "user" and blocks[0]["type"] != "tool_result"]
        start = max(asks, default=0)
        for i, (_, blocks) in enumerate(merged[start:], start):
            signed = {block["signature"] for block in blocks if block["type"] == "thinking"}
            for block in blocks:
                wanted = self.thought_before.get(block.get("id"))
                message = (
                    f"messages.{i}.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
                    f"`{blocks[0]['type']}`."
                )
                need(not wanted or (wanted in signed and blocks[0]["type"] == "thinking"), message)

    # ---- what it answers ----

    def usage(self, reply: Reply, output: int) -> dict:
        cached = reply.used("cached")
        return {
            "input_tokens": reply.used("input") - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output,
        }

    def stop_reason(self, reply: Reply) -> str:
        words = {"length": "max_tokens", "content_filter": "refusal", "stop": "end_turn", "tool_calls": "tool_use"}
        if reply.finish:
            return words.get(reply.finish, reply.finish)
        return "tool_use" if reply.calls else "end_turn"

    def blocks(self, reply: Reply) -> list[dict]:
        rows = []
        if reply.reasoning:
            rows.append({"type": "thinking", "thinking": reply.reasoning, "signature": signature(reply.reasoning)})
            self.thought_before |= {call.id: rows[0]["signature"] for call in reply.calls}
        if reply.text:
            rows.append({"type": "text", "text": reply.text})
        uses = ({"type": "tool_use", "id": call.id, "name": call.name, "input": call.object} for call in reply.calls)
        return [*rows, *uses]

    def frame(self, reply: Reply) -> dict:
        return {"id": new_id("msg_01", 22), "type": "message", "role": "assistant", "model": reply.model}

    def whole(self, reply: Reply) -> dict:
        end = {"stop_reason": self.stop_reason(reply), "stop_sequence": None}
        usage = self.usage(reply, reply.used("output"))
        return self.frame(reply) | {"content": self.blocks(reply), **end, "usage": usage}

    def stream(self, reply: Reply) -> list:
        empty = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self.usage(reply, 1)}
        events = [{"type": "message_start", "message": self.frame(reply) | empty}]
        calls = iter(reply.calls)
        for index, block in enumerate(self.blocks(reply)):
            start, deltas = self.parts(block, reply, calls)
            rows = [{"type": "content_block_start", "content_block": start}]
            rows += [{"type": "content_block_delta", "delta": delta} for delta in deltas]
            rows.append({"type": "content_block_stop"})
            events += [row | {"index": index} for row in rows]
        events.insert(2, {"type": "ping"})
        if "unknown_events" in reply.quirks:
            events.insert(3, {"type": "something_new", "detail": {}})
        if reply.finish == "failed":
            return [*((event["type"], event) for event in events), *self.stream_error(reply, True)]
        delta = {"stop_reason": self.stop_reason(reply), "stop_sequence": None}
        events.append({"type": "message_delta", "delta": delta, "usage": self.usage(reply, reply.used("output"))})
        events.append({"type": "message_stop"})
        return [(event["type"], event) for event in events]

    def parts(self, block: dict, reply: Reply, calls) -> tuple[dict, list[dict]]:
        """How a block starts, and the deltas that fill it."""
        if block["type"] == "text":
            return block | {"text": ""}, [{"type": "text_delta", "text": p} for p in reply.pieces(block["text"])]
        if block["type"] == "thinking":
            deltas = [{"type": "thinking_delta", "thinking": p} for p in reply.pieces(block["thinking"])]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return block | {"thinking": "", "signature": ""}, deltas
        text = next(calls).text
        fragments = ["", *reply.pieces("" if text == "{}" else text, 3)]
        return block | {"input": {}}, [{"type": "input_json_delta", "partial_json": p} for p in fragments]

    def ending(self, event) -> bool:
        return event[0] == "message_stop"

    def stream_error(self, reply: Reply, error) -> list:
        message = error if isinstance(error, str) else "Overloaded"
        known = error if isinstance(error, dict) else {"type": "overloaded_error", "message": message}
        return [("error", {"type": "error", "error": known})]

    def long_event(self, text: str, reply: Reply):
        delta = {"type": "text_delta", "text": text}
        return "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta}


# ===== 5. Speech ==============================================================
#
# POST /audio/transcriptions, as OpenAI has it: a form with a model and a file; the answer is the step's text.

HEARS = re.compile(r"whisper|transcribe")
SOUNDS = ("flac", "mp3", "mp4", "mpeg", "mpga", "m4a", "ogg", "wav", "webm")
SPEECH = "/audio/transcriptions"
SOUND_LIMIT = 25 << 20  # bytes of the whole form
SPEECH_KEYS = {"file", "model", "language", "prompt", "response_format", "temperature", "stream"}


def form_fields(kind: str, raw: bytes) -> dict:
    """The fields of a form; a file is {"name", "size", "start"}."""
    boundary = re.fullmatch(r'multipart/form-data; *boundary="?([^";]+)"?', kind)
    need(boundary, f"Unsupported content type: {kind!r}.", status=415)
    need(len(raw) <= SOUND_LIMIT, f"Maximum content size limit ({SOUND_LIMIT}) exceeded.", status=413)
    mark, fields = b"--" + boundary[1].encode(), {}
    for part in raw.split(mark)[1:-1]:
        head, _, data = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        named = dict(re.findall(r'(\w+)="([^"]*)"', head.decode()))
        data = data.removesuffix(b"\r\n")
        file = {"name": named.get("filename"), "size": len(data), "start": data[:20].decode("latin-1")}
        fields[named["name"]] = file if "filename" in named else data.decode()
    return fields


def check_speech(fields: dict, step: dict):
    for key in fields:
        need(key in SPEECH_KEYS, f"Unknown parameter: '{key}'.", key, "unknown_parameter")
    file, model = fields.get("file"), fields.get("model", "")
    need(HEARS.search(model), f"invalid model ID: {model}", "model")
    need(isinstance(file, dict), "file is a required property", "file")
    need(file["name"].rpartition(".")[2] in SOUNDS, f"Unrecognized file format. Supported formats: {[*SOUNDS]}", "file")
    need(file["size"], "Audio file is too short. Minimum audio length is 0.1 seconds.", "file", "audio_too_short")


# ===== 6. Script ==============================================================
#
# The first queued step that fits answers. It is taken only when the request is
# sound: a request answered with 4xx by a check leaves the script as it was.

DONE = {"text": "done"}
GETS = ("/models", "/key", "/usage")  # of OpenRouter and OpenCode Go the last two: what they answer is scripted
MODELS = {
    OpenAI: ["gpt-4o-mini", "gpt-5", "gpt-5-codex", "o4-mini", "m1", "m2"],
    Messages: ["claude-opus-4-5", "claude-sonnet-4-5", "claude-haiku-4-5"],
}


def check_steps(steps: list):
    """A misspelt step is a mistake in the test: say so at once."""
    for step in steps:
        unknown = [*(set(step) - STEP_KEYS), *(set(step.get("quirks", ())) - QUIRKS)]
        need(not unknown, f"no such step key or quirk: {', '.join(sorted(unknown))}")


def check_expected(wanted, raw: bytes):
    wanted = wanted if isinstance(wanted, dict) else {"has": wanted}
    for name, should in (("has", True), ("not", False)):
        found = wanted.get(name, ())
        for text in [found] if isinstance(found, str) else found:
            message = f"the test expects {text!r} {'in' if should else 'not in'} the request"
            need((verbatim(text) in raw) is should, message, code="expect")


class Script:
    """Steps and the record of requests, for many threads."""

    def __init__(self, steps=()):
        self.lock = threading.Lock()
        self.replace(list(steps))

    def replace(self, steps: list):
        check_steps(steps)
        with self.lock:
            self._queue, self._defaults, self.record = [], [], []
            self._put(steps)

    def add(self, steps: list):
        check_steps(steps)
        with self.lock:
            self._put(steps)

    def _put(self, steps: list):
        for step in steps:
            row = step | {"times": step.get("times", 1)}
            (self._defaults if step.get("default") else self._queue).append(row)

    def left(self) -> int:
        with self.lock:
            return sum(max(0, step["times"]) for step in self._queue)

    def fitting(self, path: str, model) -> dict | None:
        def fits(step):
            # the list of models has steps of its own, so that looking at it disturbs no script
            there = path.endswith(step["path"]) if "path" in step else not path.endswith(GETS)
            return step["times"] and there and step.get("model") in (None, model)

        return next((step for step in [*self._queue, *self._defaults] if fits(step)), None)

    def take(self, path: str, model, check) -> dict:
        """The step that answers; check(step) raises Wrong if the request is not sound."""
        with self.lock:
            step = self.fitting(path, model) or DONE
            check(step)
            if step in self._queue and step["times"] > 0:
                step["times"] -= 1
                if not step["times"]:
                    self._queue = [row for row in self._queue if row is not step]
            return step


# ===== 7. Server ==============================================================
#
# One thread a connection, blocking sockets, HTTP/1.1 with keep-alive. An answer
# without pauses leaves in one write.

# where vendors put the same API; a test that wants one of these bases just uses it
PREFIXES = ("/v1", "/api/v1", "/openai/v1", "/v1beta/openai", "/zen/v1", "/zen/go/v1", "/compatibility/v1")
PREFIXES += ("/inference", "/api/paas/v4", "/anthropic/v1")
PUBLIC_LISTS = ("/zen/v1/models", "/api/v1/models")  # these want no key, and look at none
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    429: "Too Many Requests",
}
HTML = b"text/html; charset=utf-8"
JSON = b"application/json"
SSE = b"text/event-stream; charset=utf-8"


class Gone(Exception):
    """The connection is over: the client left, or the step says so."""


class Request:
    """One request as it came: method, path, query, headers, raw body."""

    def __init__(self, method: str, target: str, headers: dict, raw: bytes):
        self.method, self.headers, self.raw = method, headers, raw
        self.path, _, query = target.partition("?")
        self.query = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)


def read_request(file, conn) -> Request | None:
    """The next request, or None when the client has closed."""
    line = file.readline(65_537)
    while line in (b"\r\n", b"\n"):
        line = file.readline(65_537)
    if not line:
        return None
    method, target, _ = line.decode("latin-1").split()
    headers = {}
    while (line := file.readline(65_537)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    return Request(method, target, headers, read_body(file, headers))


def read_body(file, headers: dict) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return file.read(int(headers.get("content-length", 0)))
    body = bytearray()
    while size := int(file.readline(1_000).split(b";")[0], 16):
        body += file.read(size)
        file.readline(10)
    while file.readline(65_537) not in (b"\r\n", b"\n", b""):
        pass
    return bytes(body)


def pause(conn, seconds: float):
    """Sleep, but notice when the client goes away."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        readable, _, _ = select.select([conn], [], [], left)
        if readable and not conn.recv(1, socket.MSG_PEEK):
            raise Gone
        if readable:  # the next request, early
            time.sleep(max(0, end - time.monotonic()))


def sse_bytes(event, quirks) -> bytes:
    name, data = event
    data = data.encode() if isinstance(data, str) else dump(data)
    colon = b":" if "no_space" in quirks else b": "
    head = b"event" + colon + name.encode() + b"\n" if name else b""
    text = head + b"data" + colon + data + b"\n\n"
    if "keepalive_comments" in quirks:
        text = b": OPENROUTER PROCESSING\n\n" + text
    return text.replace(b"\n", b"\r\n") if "crlf" in quirks else text


def stream_parts(format, reply: Reply) -> tuple[list[bytes], int]:
    """The body of a stream, event by event, faults included, and where its middle is."""
    step, events = reply.step, format.stream(reply)
    middle = step.get("after", len(events) // 2)
    if step.get("no_done"):
        events = [event for event in events if not format.ending(event)]
    if "error_event" in step:
        events = events[:middle] + format.stream_error(reply, step["error_event"])
    if "long_line" in step:
        events.insert(middle, format.long_event("x" * step["long_line"], reply))
    parts = [sse_bytes(event, reply.quirks) for event in events]
    return parts, middle


def garbage(wanted) -> bytes:
    if isinstance(wanted, str):
        return verbatim(wanted)
    size = 512 if wanted is True else wanted
    return (bytes(range(128, 256)) + b"\x00\xff{[\n") * (size // 133 + 1)


class Exchange:
    """One request and its answer on one connection."""

    def __init__(self, server, conn, request: Request, row: dict):
        self.server, self.conn, self.request, self.row = server, conn, request, row
        self.request_id = new_id("req_")
        self.format = None

    def send(self, status: int, kind: bytes, body: bytes, headers=(), step=None):
        """An answer of known length; step may cut it."""
        self.row["status"] = status
        head = self.head(status, kind, headers, b"Content-Length: %d\r\n" % len(body))
        cut = (step or {}).get("cut_bytes")
        self.conn.sendall(head + body[:cut])
        if cut is not None:
            self.leave(step)

    def head(self, status: int, kind: bytes, headers, framing: bytes) -> bytes:
        given = dict(headers)
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Answer')}"]
        if not any(name.lower() == "content-type" for name in given):
            lines.append(f"Content-Type: {kind.decode()}")
        lines.append(f"{getattr(self.format, 'request_id_header', 'x-request-id')}: {self.request_id}")
        lines += [f"{name}: {value}" for name, value in given.items()]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n" + framing + b"\r\n"

    def leave(self, step: dict):
        if step.get("reset"):
            self.conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        raise Gone

    def refuse(self, wrong: Wrong, headers=()):
        self.row["error"] = wrong.message
        self.send(wrong.status, JSON, dump(self.format.error(wrong, self.request_id)), headers)

    # ---- the endpoints ----

    def run(self):
        request = self.request
        prefix = next((p for p in PREFIXES if request.path.startswith(p + "/")), None)
        ending = request.path[len(prefix) :] if prefix else None
        style = "x-api-key" in request.headers or "anthropic-version" in request.headers
        fallback = self.server.formats["/messages" if style else "/chat/completions"]
        self.format = self.server.formats.get(ending, fallback)
        method = "GET" if ending in GETS else "POST"
        if ending not in (*GETS, SPEECH) and ending not in self.server.formats:
            return self.refuse(Wrong(f"Invalid URL ({request.method} {request.path})", status=404))
        if request.method != method:
            return self.refuse(Wrong(f"Not allowed to {request.method} on {request.path}.", status=405))
        try:
            if request.path not in PUBLIC_LISTS:
                self.format.authorise(request.headers, request.path)
            {SPEECH: self.hear, **dict.fromkeys(GETS, self.list_models)}.get(ending, self.complete)()
        except Wrong as wrong:
            self.refuse(wrong)

    def list_models(self):
        step = self.server.script.take(self.request.path, None, lambda step: None)
        if self.plain(step):
            return
        ids = step.get("models", MODELS[Messages if isinstance(self.format, Messages) else OpenAI])
        body = self.format.models(ids, bool(step.get("bare")), self.request.query)
        self.send(200, JSON, dump(body), step.get("headers", {}), step)

    def hear(self):
        fields = self.row["body"] = form_fields(self.request.headers.get("content-type", ""), self.request.raw)
        step = self.server.script.take(self.request.path, fields.get("model"), lambda step: check_speech(fields, step))
        if not self.plain(step):
            self.send(200, JSON, dump({"text": step["text"]}), step.get("headers", {}), step)

    def complete(self):
        request, format = self.request, self.format
        kind = request.headers.get("content-type", "")
        need(kind.startswith("application/json"), f"Unsupported content type: {kind!r}.", status=415)
        too_long = isinstance(format, Messages) and len(request.raw) > ANTHROPIC_LIMIT
        need(not too_long, "Request exceeds the maximum size", status=413)
        body = self.row["body"]
        if not isinstance(body, dict):
            raise format.unreadable()
        step = self.server.script.take(request.path, body.get("model"), lambda step: self.check(body, step))
        if self.plain(step):
            return
        reply = Reply(step, body, len(request.raw), format)
        if body.get("stream"):
            self.stream(reply)
        else:
            whole = dump(format.whole(reply))
            whole = garbage(step["garbage"]) if "garbage" in step else whole
            whole = verbatim(step["raw"]) if "raw" in step else whole
            self.send(200, JSON, whole, step.get("headers", {}), step)

    def check(self, body: dict, step: dict):
        self.format.check(body, step, self.request.headers)
        check_expected(step.get("expect", ()), self.request.raw)
        if len(self.request.raw) > step.get("context", 1 << 62):
            raise self.format.overflow(len(self.request.raw))

    def plain(self, step: dict) -> bool:
        """The faults that need no model; whether one of them was the answer."""
        if step.get("delay"):
            pause(self.conn, step["delay"])
        if step.get("refuse"):
            self.leave(step)
        headers = step.get("headers", {})
        if step.get("overflow"):
            self.refuse(self.format.overflow(len(self.request.raw)), headers)
        elif "body" in step:
            body = verbatim(step["body"])
            kind = HTML if body.lstrip()[:1] == b"<" else JSON
            self.send(step.get("status", 200), kind, body, headers, step)
        elif step.get("status", 200) in range(300, 400):
            self.send(step["status"], HTML, b"", headers)
        elif step.get("status", 200) != 200:
            self.refuse(self.format.fault(step["status"]), headers)
        else:
            return False
        return True

    def stream(self, reply: Reply):
        step = reply.step
        parts, middle = stream_parts(self.format, reply)
        if "garbage" in step:
            parts = [garbage(step["garbage"])]
        if "raw" in step:
            parts = [verbatim(step["raw"])]
        cut = "cut" in step or "cut_bytes" in step
        parts = parts[: step.get("cut")]
        if "cut_bytes" in step:
            parts = [b"".join(parts)[: step["cut_bytes"]]]
        if "split" in step:
            body, size = b"".join(parts), step["split"]
            parts, middle = [body[i : i + size] for i in range(0, len(body), size)], len(body) // size // 2
        self.write(parts, middle, step)
        if (cut and not step.get("clean")) or step.get("close_delimited"):
            self.leave(step)
        self.conn.sendall(b"0\r\n\r\n")

    def write(self, parts: list[bytes], middle: int, step: dict):
        """Send the parts as chunks, with the pauses the step asks for; together where it asks for none."""
        bare, pace, stall = step.get("close_delimited"), step.get("pace", 0), step.get("stall", 0)
        framing = b"Connection: close\r\n" if bare else b"Transfer-Encoding: chunked\r\n"
        buffer = bytearray(self.head(200, SSE, step.get("headers", {}), b"Cache-Control: no-cache\r\n" + framing))
        self.row["status"] = 200
        for i, part in enumerate(parts):
            wait = (pace if i else 0) + (stall if i == middle else 0)
            if wait or "split" in step:
                self.conn.sendall(buffer)
                buffer.clear()
                pause(self.conn, wait)
            buffer += part if bare or not part else b"%x\r\n%b\r\n" % (len(part), part)
        if stall and middle >= len(parts):
            self.conn.sendall(buffer)
            buffer.clear()
            pause(self.conn, stall)
        self.conn.sendall(buffer)


class Server:
    """Listens on 127.0.0.1; answers by its script."""

    def __init__(self, port: int = 0, steps=()):
        self.script = Script(steps)
        self.formats = {format.path: format for format in (Chat(), Responses(), Messages())}
        self.socket = socket.create_server(("127.0.0.1", port), backlog=512)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def run(self):
        number = 0
        while True:
            conn, _ = self.socket.accept()
            number += 1
            threading.Thread(target=self.serve, args=(conn, number), daemon=True).start()

    def serve(self, conn, number: int):
        """One connection, until either side closes it."""
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with conn, conn.makefile("rb") as file:
                while request := read_request(file, conn):
                    self.answer(conn, request, number)
                    if request.headers.get("connection", "").lower() == "close":
                        return
        except (Gone, OSError, ValueError):
            pass  # what there is to know is in the record

    def answer(self, conn, request: Request, number: int):
        if request.path.startswith("/_/"):
            return self.control(conn, request)
        row = {
            "method": request.method,
            "path": request.path,
            "headers": request.headers,
            "body": self.body(request.raw),
            "size": len(request.raw),
            "time": time.monotonic(),
            "connection": number,
            "status": None,  # what was answered; None: nothing yet, or nothing at all
            "error": None,  # the message of a 4xx or 5xx
            "gone": False,  # whether the connection broke off, by the client or by the step
        }
        with self.script.lock:
            self.script.record.append(row)
        try:
            Exchange(self, conn, request, row).run()
        except (Gone, OSError):
            row["gone"] = True
            raise
        except Exception as error:
            row["error"] = f"a bug in fakes.py: {error!r}"
            sys.excepthook(*sys.exc_info())
            raise Gone from None

    def body(self, raw: bytes):
        try:
            return parsed(raw)
        except (ValueError, RecursionError):  # UnicodeError is a ValueError
            return None

    def control(self, conn, request: Request):
        status, value = 200, {}
        try:
            if request.path == "/_/script":
                self.script.replace(json.loads(request.raw))
            elif request.path == "/_/add":
                self.script.add(json.loads(request.raw))
            elif request.path == "/_/requests":
                value = self.script.record
            elif request.path == "/_/left":
                value = self.script.left()
            else:
                status = 404
        except Wrong as wrong:
            status, value = 400, {"error": wrong.message}
        body = json.dumps(value).encode()
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\nContent-Length: "
            f"{len(body)}\r\n\r\n"
        )
        conn.sendall(head.encode() + body)


# ===== 8. Client ==============================================================
#
# What tests and benchmarks hold in their hands.


class Served:
    """A fake server as a process of its own, which dies with this one."""

    def __init__(self, file: str, *words: str):
        import subprocess

        # -I -S: no site-packages, so that it starts quickly
        command = [sys.executable, "-I", "-S", os.path.join(os.path.dirname(os.path.abspath(__file__)), file), *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.origin = self._process.stdout.readline().strip()
        if not self.origin:
            raise RuntimeError("the fake server did not start")
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        with self._process:
            self._process.kill()

    def _ask(self, method: str, path: str, value=None):
        import http.client

        connection = http.client.HTTPConnection(self.origin.removeprefix("http://"), timeout=10)
        try:
            connection.request(method, path, None if value is None else json.dumps(value))
            answer = connection.getresponse()
            value = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(value["error"])
        return value


class ModelServer(Served):
    """The fake model server as a process of its own: with ModelServer() as model: model.script({"text": "hi"})"""

    def __init__(self, *steps):
        super().__init__("fakes.py", "model")
        self.url = self.origin + "/v1"
        if steps:
            self.script(*steps)

    def script(self, *steps):
        """Replace the script and clear the record."""
        self._ask("POST", "/_/script", steps)

    def add(self, *steps):
        self._ask("POST", "/_/add", steps)

    def requests(self) -> list[dict]:
        return self._ask("GET", "/_/requests")

    def bodies(self) -> list[dict]:
        return [row["body"] for row in self.requests() if row["method"] == "POST"]

    def left(self) -> int:
        """How many scripted answers nobody has asked for yet."""
        return self._ask("GET", "/_/left")

    def wait(self, count: int = 1, timeout: float = 10) -> list[dict]:
        """The requests, once there are so many."""
        end = time.monotonic() + timeout
        while len(rows := self.requests()) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(rows)} of {count} requests after {timeout} s")
            time.sleep(0.01)
        return rows


class BotServer(Served):
    """Telegram's Bot API as a process of its own: with BotServer() as bot: bot.say(42, "hi"); bot.wait(42)

    url and token are what [channels.telegram] wants. Chats and users are made when they are first spoken of: a
    positive number is a private chat, one below -10**12 a supergroup, any other a group. What says something returns
    {"update_id", "message_id", "time"}; update_id is None where the bot did not ask for such updates. Times are
    time.monotonic(), which is the same in all processes.
    """

    def __init__(self):
        from botapi import TOKEN

        super().__init__("botapi.py")
        self.url, self.token = self.origin, TOKEN

    # ---- what users do ----

    def say(self, chat: int, text: str = "", sender=None, **fields) -> dict:
        """sender: a user's number or object; reply_to: a message_id; any other field becomes the message's."""
        return self._do("say", chat=chat, text=text, sender=sender, **fields)

    def edit(self, chat: int, message_id: int, text: str, **fields) -> dict:
        return self._do("edit_by_user", chat=chat, message_id=message_id, text=text, **fields)

    def press(self, chat: int, message_id: int, data: str, sender=None) -> str:
        """A button of a message; the id of the callback query, see callbacks()."""
        return self._do("press", chat=chat, message_id=message_id, data=data, sender=sender)

    def document(self, chat: int, data: bytes, name: str = "file.bin", mime: str = "", size=None, **fields) -> dict:
        """caption, sender and so on as with say(); size: only said, to have a big file cheaply."""
        return self.album(chat, [self.add_file(data, name, mime, size)], "document", **fields)[0]

    def photo(self, chat: int, data: bytes, **fields) -> dict:
        return self.album(chat, [self.add_file(data, "photo.jpg")], "photo", **fields)[0]

    def album(self, chat: int, files, kind: str = "photo", caption: str = "", **fields) -> list[dict]:
        """Files by file_id or as bytes, each in a message of its own; the first has the caption."""
        name = "photo.jpg" if kind == "photo" else "file.bin"
        files = [self.add_file(file, name) if isinstance(file, bytes) else file for file in files]
        return self._do("send_media", chat=chat, files=files, kind=kind, caption=caption, **fields)

    def add_file(self, data: bytes, name: str = "file.bin", mime: str = "", size=None) -> str:
        """A file_id, for say(document={"file_id": ...})."""
        data = binascii.b2a_base64(data, newline=False).decode()
        return self._do("add_file", data=data, name=name, mime=mime, size=size)

    def block(self, chat: int, blocked: bool = True):
        self._do("block", chat=chat, blocked=blocked)

    def migrate(self, old: int, new: int):
        """A group becomes a supergroup."""
        self._do("migrate", old=old, new=new)

    def chat(self, chat: int, **fields) -> dict:
        """Makes or changes a chat: title, username, type."""
        return self._do("chat", id=chat, **fields)

    def topic(self, chat: int, thread: int):
        """Makes a topic in a forum; saying something with message_thread_id does so, too."""
        self._do("topic", chat=chat, thread=thread)

    # ---- what goes wrong ----

    def update(self, value, once: bool = False) -> int:
        """Any update, an object (it gets an update_id unless it has one) or raw bytes; once: not delivered again."""
        if isinstance(value, bytes):
            return self._do("update", raw=binascii.b2a_base64(value, newline=False).decode(), once=once)
        return self._do("update", value=value, once=once)

    def next_update(self, number: int):
        """Updates are numbered from here on."""
        self._do("next_update", id=number)

    def webhook(self, url: str):
        """Somebody sets a webhook; "": removes it."""
        self._do("webhook", url=url)

    def fault(self, method: str, kind: str, times: int = 1, after: int = 0):
        """See FAULTS in botapi.py. method: "*" for all, "file" for downloads; times: -1 for ever; after: calls."""
        self._do("fault", method=method, kind=kind, times=times, after=after)

    def calm(self):
        """No faults any more."""
        self._do("calm")

    def limit(self, on: bool = True, chat: float = 1, burst: int = 3, group: int = 20, total: int = 30):
        """429 for more than so many messages and edits a second in a chat, a minute in a group, a second in all."""
        self._do("limit", on=on, chat=chat, burst=burst, group=group, total=total)

    def reset(self):
        """A new world; only the numbers of messages and updates go on."""
        self._do("reset")

    # ---- what became of it ----

    def sent(self, chat: int | None = None) -> list[dict]:
        """The bot's messages in order, with what Post.row in botapi.py lists; deleted ones too."""
        return self._do("sent", chat=chat)["rows"]

    def calls(self, method: str | None = None) -> list[dict]:
        """method, parameters, time, answered, status (None: no answer), fault."""
        return self._do("calls", method=method)["rows"]

    def actions(self, chat: int | None = None) -> list[dict]:
        return [row for row in self.state()["actions"] if chat in (None, row["chat"])]

    def commands(self, scope: str = "default", language: str = "") -> list[dict]:
        return next(
            (rows for on, tongue, rows in self.state()["commands"] if (on["type"], tongue) == (scope, language)), []
        )

    def callbacks(self) -> dict[str, dict]:
        """{id of a callback query: {} or what answered it: text, alert, time}"""
        return self.state()["callbacks"]

    def state(self) -> dict:
        """actions, callbacks, commands, polling, pending (updates), faults, allowed (updates)."""
        return self._do("state")

    def content(self, file_id: str) -> bytes:
        return binascii.a2b_base64(self._do("content", file_id=file_id))

    def wait(self, chat: int | None, want=1, timeout: float = 10) -> list[dict]:
        """sent(chat), once there are so many, or one with this text, or want(rows) is true; without deleted ones."""
        tests = {int: lambda rows: len(rows) >= want, str: lambda rows: any(want in row["text"] for row in rows)}
        test = tests.get(type(want), want)
        return self._wait("sent", test, timeout, chat=chat)

    def wait_calls(self, method: str, count: int = 1, timeout: float = 10) -> list[dict]:
        """calls(method), once so many were answered."""
        done = lambda rows: sum(row["status"] is not None for row in rows) >= count  # noqa: E731
        return self._wait("calls", done, timeout, method=method)

    def wait_state(self, test, timeout: float = 10) -> dict:
        """state(), once the test is true of it."""
        return self._wait("state", test, timeout)

    def _wait(self, name: str, test, timeout: float, /, **words):
        end = time.monotonic() + timeout
        while True:
            version = self._do("changed")
            rows = self._do(name, **words)
            rows = [row for row in rows["rows"] if not row.get("deleted")] if "rows" in rows else rows
            if test(rows):
                return rows
            if time.monotonic() > end:
                raise TimeoutError(f"after {timeout} s there is only {rows}")
            self._do("changed", since=version, timeout=min(1, max(0, end - time.monotonic())))

    def _do(self, name: str, /, **words):
        return self._ask("POST", "/control/" + name, words)


# ===== 9. Command =============================================================


def serve_model(arguments: list[str]):
    """Serve until standard input ends, so that the server dies with its parent; --stay: until a signal."""
    import signal

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    options = dict(zip(arguments, arguments[1:], strict=False))
    steps = []
    if "--script" in options:
        with open(options["--script"], encoding="utf-8") as file:
            steps = json.load(file)
    server = Server(int(options.get("--port", 0)), steps)
    threading.Thread(target=server.run, daemon=True).start()
    print(server.url, flush=True)
    if "--stay" in arguments:
        signal.pause()
    while os.read(0, 4096):
        pass
    os._exit(0)


# ===== 10. Models =============================================================
#
# A model inside the test's own process, for what needs no HTTP; and a clock.


class ScriptedModels:
    """Stands for openpista.Models: answers in turn, and remembers what it was asked.

    An answer is a Completion, an exception, or a function, async or not, that takes the request and
    gives one of the two; a single function instead of a list answers for ever.
    """

    def __init__(self, answers, name="fake/model", window=128_000):
        self.answers, self.name, self.window = answers, name, window
        self.requests = []

    async def complete(self, request, tell):
        self.requests.append(request)
        answer = self.answers if callable(self.answers) else self.answers.pop(0)
        if callable(answer):
            answer = answer(request)
        if hasattr(answer, "__await__"):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        return answer


class FakeClock:
    """now() and sleep() for what takes a clock; it moves only when told."""

    def __init__(self, moment):
        self.moment = moment

    def now(self):
        return self.moment

    def advance(self, step):
        self.moment += step

    async def sleep(self, seconds):
        """The time passes at once."""
        import asyncio  # not above: the model server needs neither
        from datetime import timedelta

        await asyncio.sleep(0)
        self.advance(timedelta(seconds=seconds))


if __name__ == "__main__":
    if sys.argv[1:2] != ["model"]:
        sys.exit("usage: python tests/fakes.py model [--port N] [--script FILE] [--stay]")
    serve_model(sys.argv[2:])
