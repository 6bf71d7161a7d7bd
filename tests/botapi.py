"""A Telegram Bot API server on 127.0.0.1: python tests/botapi.py [--port N] [--stay]

Map. Each section uses only those above it.

    1. Wire        HTTP requests, forms, what a method is given
    2. Text        HTML and entities, in code points; UTF-16 units only at the rim
    3. World       users, chats, posts, files, updates: all the state there is
    4. Methods     what a bot may call, a function each
    5. Control     what a test may do: /control/NAME, see BotServer in fakes.py
    6. Server      sockets, faults, the log of calls

It answers as api.telegram.org does, with its error texts and its quirks (a poll that repeats its offset within half
a second gets one update; an offset far ahead confirms nothing; the older of two polls gets 409), so far as the
documentation and the source of Telegram's own server tell. Not there: Markdown, inline mode, most kinds of media.

The standard library only. It serves until standard input ends, so that it dies with its parent.
"""

import asyncio
import base64
import collections
import http
import itertools
import json
import math
import mimetypes
import os
import re
import sys
import threading
import time
import types
import typing
import urllib.parse

TOKEN = "7000000001:" + "AA" + "fake_" * 6 + "bot"  # the real shape; in pieces, for those who search for real ones

# ===== 1. Wire ================================================================
#
# Whatever form a request has, a method is given strings and files, as the real
# one is: an object in a JSON body is its JSON text, and null is "null".

UPLOAD_LIMIT = 50 << 20
DOWNLOAD_LIMIT = 20 << 20


class Refused(Exception):
    """An answer with ok: false."""

    def __init__(self, text: str = "", code: int = 400, **parameters):
        phrase = http.HTTPStatus(code).phrase
        super().__init__(f"{phrase}: {text}" if text else phrase)
        self.code, self.parameters = code, parameters


def need(ok, *refused, **more):
    if not ok:
        raise Refused(*refused, **more)


class File(typing.NamedTuple):
    name: str
    mime: str
    data: bytes


class Request(typing.NamedTuple):
    method: str
    path: str
    query: str
    headers: dict
    body: bytes


def parse_head(head: bytes) -> tuple[str, str, str, dict]:
    """Method, path, query, headers; ValueError for what is no HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return method, urllib.parse.unquote(path), query, headers


def parse_body(headers: dict, buffer: bytearray) -> tuple[bytes | None, int]:
    """The body of a request and the bytes it takes; None: it is not all there."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        size = int(headers.get("content-length", 0))
        return bytes(buffer[:size]) if len(buffer) >= size else None, size
    parts, at = [], 0
    while (end := buffer.find(b"\r\n", at)) >= 0:
        size, at = int(buffer[at:end].partition(b";")[0], 16), end + 2
        parts.append(buffer[at : at + size])
        at += size + 2
        if not size and len(buffer) >= at:
            return b"".join(parts), at
    return None, at


def parse_form(text: str) -> dict[str, str]:
    return dict(reversed(urllib.parse.parse_qsl(text, keep_blank_values=True, errors="surrogateescape")))


def parse_json(body: bytes) -> dict[str, str]:
    try:
        value = json.loads(body.decode("utf-8", "surrogateescape") or "{}")
    except (ValueError, RecursionError):
        raise Refused("can't parse object, ':' expected") from None
    need(isinstance(value, dict), "JSON object expected")
    return {key: text if isinstance(text, str) else json.dumps(text) for key, text in value.items()}


def parse_multipart(body: bytes, kind: str) -> tuple[dict[str, str], dict[str, File]]:
    found = re.search(r'boundary="?([^";,]+)', kind)
    need(found, "boundary not found")
    parts = (b"\r\n" + body).split(b"\r\n--" + found[1].encode("latin-1"))
    need(parts[-1].startswith(b"--"), "unexpected end of request content")
    fields, files = {}, {}
    for part in parts[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        head = head.decode("utf-8", "surrogateescape")
        name = re.search(r'[; ]name="((?:[^"\\]|\\.)*)"', head)
        need(name, "field name in multipart/form-data not found")
        filename = re.search(r'[; ]filename="((?:[^"\\]|\\.)*)"', head)
        mime = re.search(r"(?i)^content-type: *([^\r\n]+)", head, re.M)
        if filename:
            mime = mime[1] if mime else "application/octet-stream"
            files[name[1]] = File(urllib.parse.unquote(filename[1]), mime, data)
        else:
            fields[name[1]] = data.decode("utf-8", "surrogateescape")
    return fields, files


class Given:
    """What a method is given: its parameters, as text, and files."""

    def __init__(self, texts: dict[str, str], files: dict[str, File]):
        self.texts, self.files = texts, files

    def text(self, name: str) -> str:
        return self.texts.get(name, "")

    def int(self, name: str, default: int = 0, low: int = -(1 << 62), high: int = 1 << 62) -> int:
        text = self.text(name).strip()
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else default
        return min(max(value, low), high)

    def flag(self, name: str) -> bool:
        return self.text(name).lower() in ("true", "yes", "1")

    def json(self, name: str, kind: type, what: str):
        """The parameter as JSON of that kind; None if it is not given."""
        if not self.text(name):
            return None
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError):
            raise Refused(f"can't parse {what} JSON object") from None
        need(isinstance(value, kind), "object expected as " + what)
        return value

    def log(self) -> dict:
        """The same for the log, files as what they are."""
        files = {name: {"name": f.name, "mime": f.mime, "size": len(f.data)} for name, f in self.files.items()}
        return {name: text[:10_000] for name, text in self.texts.items()} | files


def given(request: Request) -> Given:
    kind, files = request.headers.get("content-type", ""), {}
    if "multipart/form-data" in kind.lower():
        texts, files = parse_multipart(request.body, kind)
    elif "application/json" in kind.lower():
        texts = parse_json(request.body)
    elif "application/x-www-form-urlencoded" in kind.lower():
        texts = parse_form(request.body.decode("utf-8", "surrogateescape"))
    else:
        texts = {}
    return Given(texts | parse_form(request.query), files)


# ===== 2. Text ================================================================
#
# A Mark is an entity in code points. What an author writes may overlap as he
# likes; `settled` puts it in order as Telegram does: code holds nothing, links do
# not nest, bold and its like are cut where links, code and quotes begin and end.

SPACE = " \t\n\r\v\0"
TAGS = {
    "b": "bold", "strong": "bold", "i": "italic", "em": "italic", "u": "underline", "ins": "underline",
    "s": "strikethrough", "strike": "strikethrough", "del": "strikethrough", "tg-spoiler": "spoiler",
    "span": "spoiler", "a": "text_link", "code": "code", "pre": "pre", "blockquote": "blockquote",
    "tg-emoji": "custom_emoji", "tg-time": "date_time",
}  # fmt: skip
ATTRIBUTES = {("a", "href"), ("code", "class"), ("span", "class"), ("tg-emoji", "emoji-id")}
QUOTES = {"blockquote", "expandable_blockquote"}
CODE = {"code", "pre"}
RANK = {"bold": 90, "italic": 91, "underline": 92, "strikethrough": 93, "spoiler": 94, "code": 20, "pre": 11}
RANK |= {"blockquote": 0, "expandable_blockquote": 0, "text_link": 49, "text_mention": 49, "custom_emoji": 99}
SPLIT = ("bold", "italic", "underline", "strikethrough", "spoiler")
REFERENCE = re.compile(r"&(?:#x([0-9a-fA-F]*)|#([0-9]*)|([a-zA-Z]*))(;?)")
NAMED = {"lt": "<", "gt": ">", "amp": "&", "quot": '"'}
CLEAN = {i: " " for i in range(32) if i != 10} | dict.fromkeys((13, *range(0x2028, 0x202F), 0x333, 0x33F, 0x30A))
INVISIBLE = "\u200b-\u200f\ufeff\u00a0\u1680\u180e\u2000-\u200a\u202f\u205f\u2800\u3000\ufffc \n"
NOTHING = re.compile(f"[{INVISIBLE}]*")
FOUND = {
    "url": r"(?:https?|tg)://[^\s<>\"']*[\w/#=&-]",
    "email": r"(?<![\w.])[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "mention": r"(?<![\w@/])@[a-zA-Z0-9_]{2,32}(?![\w@])",
    "hashtag": r"(?<![\w#])#(?=\w*[^\W\d])\w{1,256}",
    "bot_command": r"(?<![\w/<>:])/[a-zA-Z0-9_]{1,64}(?:@[a-zA-Z0-9_]{3,32})?(?![\w/<>@])",
}
FINDER = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in FOUND.items()))


class Mark(typing.NamedTuple):
    start: int
    end: int
    type: str
    more: typing.Mapping = types.MappingProxyType({})


class Opened(typing.NamedTuple):
    tag: str
    argument: str
    start: int


def units(text: str) -> int:
    """Its length in UTF-16 units, which is what Telegram counts."""
    return len(text) + sum(c > "\uffff" for c in text)


def offsets(text: str) -> list[int]:
    """How many UTF-16 units stand before each code point, and before the end."""
    return [0, *itertools.accumulate(1 + (c > "\uffff") for c in text)]


def decode_reference(source: str, at: int) -> tuple[str, int]:
    """What the reference at & stands for and where it ends; "" if it is none."""
    found = REFERENCE.match(source, at)
    hexadecimal, decimal, name, semicolon = found.groups()
    if name is not None:
        return NAMED.get(name, ""), found.end()
    digits, base = (decimal, 10) if hexadecimal is None else (hexadecimal, 16)
    code = int(digits or "0", base)
    wrong = not 0 < code < 0x10FFFF or found.end() - len(semicolon) - at >= 10
    return "" if wrong else chr(code), found.end()


class HtmlParser:
    """Telegram's HTML: text and marks, or Refused with Telegram's words."""

    def __init__(self, source: str):
        self.source, self.at = source, 0
        self.text, self.marks, self.opened = [], [], []

    def parse(self) -> tuple[str, list[Mark]]:
        while self.at < len(self.source):
            c = self.source[self.at]
            if c == "<":
                self.close() if self.source[self.at + 1 : self.at + 2] == "/" else self.open()
                continue
            said, self.at = (
                decode_reference(self.source, self.at) if c == "&" and self.reference() else (c, self.at + 1)
            )
            self.text.append(said)
        if self.opened:
            raise self.wrong(f'Can\'t find end tag corresponding to start tag "{self.opened[-1].tag}"')
        text = "".join(self.text)
        unmatched = any("\ud800" <= c <= "\udfff" for c in text)
        if unmatched:
            raise self.wrong(
                "Text contains invalid Unicode characters after decoding HTML entities, check for unmatched surrogate "
                "code units"
            )
        return text, [m._replace(more={}) if m.type == "code" else m for m in self.marks]

    def reference(self) -> bool:
        return bool(decode_reference(self.source, self.at)[0])

    def wrong(self, text: str, at: int | None = None) -> Refused:
        where = "" if at is None else f" at byte offset {len(self.source[:at].encode('utf-8', 'surrogatepass'))}"
        return Refused(f"can't parse entities: {text}{where}")

    def take(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.source, self.at)
        self.at = found.end()
        return found[0]

    def peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def open(self):
        begin = self.at
        self.at += 1
        tag = self.take(f"[^{SPACE}>]*").lower()
        if not self.peek() or self.peek() == "\0":
            raise self.wrong("Unclosed start tag", begin)
        if tag not in TAGS:
            raise self.wrong(f'Unsupported start tag "{tag}"', begin)
        argument = ""
        while self.take(f"[{SPACE}]*") is not None and self.peek() != ">":
            name, value = self.attribute(tag, begin)
            if (tag, name) in ATTRIBUTES and value is not None:
                argument = value
            elif (tag, name) == ("blockquote", "expandable"):
                argument = "1"
        self.at += 1
        if tag == "span" and argument != "tg-spoiler":
            raise self.wrong('Tag "span" must have class "tg-spoiler"', begin)
        if tag == "code":
            argument = argument[9:] if argument.startswith("language-") else ""
        self.opened.append(Opened(tag, argument, len(self.text)))

    def attribute(self, tag: str, begin: int) -> tuple[str, str | None]:
        """One attribute: its name and its value, None if it has none."""
        unclosed = self.wrong(f'Unclosed start tag "{tag}"', begin)
        name = self.take(f"[^{SPACE}=>/\"']*")
        if not name:
            raise self.wrong(f'Empty attribute name in the tag "{tag}"', begin)
        self.take(f"[{SPACE}]*")
        if self.peek() != "=":
            if not self.peek():
                raise unclosed
            return name, None
        self.at += 1
        self.take(f"[{SPACE}]*")
        if not self.peek():
            raise unclosed
        value = self.quoted() if self.peek() in "\"'" else self.token()
        if not self.peek():
            raise self.wrong("Unclosed start tag", begin)
        return name, value

    def token(self) -> str:
        start = self.at
        value = self.take("[A-Za-z0-9.-]*").lower()
        if self.peek() not in SPACE + ">":
            raise self.wrong("Unexpected end of name token", start)
        return value

    def quoted(self) -> str:
        quote, value = self.peek(), []
        self.at += 1
        while self.peek() not in ("", quote):
            said, end = decode_reference(self.source, self.at) if self.peek() == "&" else ("", 0)
            value.append(said or self.peek())
            self.at = end if said else self.at + 1
        self.at += bool(self.peek())
        return "".join(value)

    def close(self):
        begin = self.at
        if not self.opened:
            raise self.wrong("Unexpected end tag", begin)
        self.at += 2
        found = self.take(f"[^{SPACE}>]*").lower()
        self.take(f"[{SPACE}]*")
        if self.peek() != ">":
            raise self.wrong("Unclosed end tag", begin)
        self.at += 1
        tag, argument, start = self.opened.pop()
        if found and found != tag:
            at = len(self.source[:begin].encode("utf-8", "surrogatepass"))
            raise self.wrong(f'Unmatched end tag at byte offset {at}, expected "</{tag}>", found "</{found}>"')
        if len(self.text) > start:
            self.mark(tag, argument, start, len(self.text))

    def mark(self, tag: str, argument: str, start: int, end: int):
        kind, more = TAGS[tag], {}
        last = self.marks[-1] if self.marks and self.marks[-1][:2] == (start, end) else None
        if tag == "pre" and last and last.type == "code" and last.more:
            self.marks[-1] = last._replace(type="pre")
            return
        if tag == "code" and argument and last and last.type == "pre":
            self.marks[-1] = last._replace(more={"language": argument})
            return
        if tag == "code" and argument:
            more = {"language": argument}  # only for a pre around it
        if tag == "blockquote" and argument:
            kind = "expandable_blockquote"
        if tag == "tg-emoji":
            more = {"custom_emoji_id": argument}
        if tag == "a":
            kind, more = link(argument or "".join(self.text[start:end]))
        if kind and kind != "date_time":
            self.marks.append(Mark(start, end, kind, more))


def link(url: str) -> tuple[str, dict]:
    """The kind of mark a link is; "" for what Telegram does not take for one, whose text stays."""
    user = re.fullmatch(r"(?i)tg:(?://)?user\?id=(\d+)", url)
    if user:
        return "text_mention", {"user": {"id": int(user[1]), "is_bot": False, "first_name": f"User {user[1]}"}}
    found = re.fullmatch(r"(?is)(?:(https?)://)?([^/?#]*)(.*)", url)
    app = re.fullmatch(r"(?is)tg:(?://)?([\w-]+)/?(.*)", url)
    if app:
        return "text_link", {"url": f"tg://{app[1].lower()}{'' if app[2][:1] == '?' else '/'}{app[2]}"}
    scheme, host, rest = found.groups()
    if "." not in host.strip(".") or re.search(r"[\x00-\x20<>\"\\^`{|}]|:(?!\d+$)", host.rpartition("@")[2]):
        return "", {}
    rest = "".join(f"%{ord(c):02X}" if c <= " " else c for c in rest.rstrip(SPACE))
    return "text_link", {"url": f"{(scheme or 'http').lower()}://{host.lower()}{'' if rest[:1] == '/' else '/'}{rest}"}


def in_order(marks) -> list[Mark]:
    return sorted(marks, key=lambda m: (m.start, -m.end, RANK.get(m.type, 50) - bool(m.type == "pre" and m.more)))


def apart(marks) -> list[Mark]:
    """Those that do not begin within an earlier one."""
    kept, end = [], 0
    for mark in in_order(marks):
        if mark.start >= end:
            kept.append(mark)
            end = mark.end
    return kept


class Splitter:
    """Bold and its like: joined where they touch, cut where another kind begins and at the edges of the solid ones."""

    def __init__(self, marks):
        self.waiting, self.open, self.done = collections.deque(in_order(marks)), {}, []

    def split(self, solid: list[Mark]) -> list[Mark]:
        around = []
        for mark in [*solid, None]:
            while around and (mark is None or mark.start >= around[-1].end):
                inner, before = around.pop(), len(self.done)
                self.advance(inner.end)
                if inner.type in CODE:
                    del self.done[before:]
            self.advance(mark.start if mark else math.inf)
            around.append(mark)
        return self.done

    def advance(self, end: float):
        while self.waiting and self.waiting[0].start < end:
            mark = self.waiting.popleft()
            start, last = self.open.get(mark.type, (0, -1))
            if mark.start > last:
                self.flush(start := mark.start)
            self.open[mark.type] = start, max(last, mark.end)
        self.flush(end)

    def flush(self, at: float):
        for kind in SPLIT:
            start, end = self.open.get(kind, (at, at))
            if start < at:
                self.done.append(Mark(start, min(end, at), kind))
                self.open[kind] = at, end
                if end <= at:
                    del self.open[kind]


def fixed(marks: list[Mark], found: list[Mark] = ()) -> list[Mark]:
    """The marks as Telegram keeps them, with what it finds by itself where nothing solid is."""
    quotes = apart(m for m in marks if m.type in QUOTES)
    solid = apart(m for m in marks if m.type not in QUOTES and m.type not in SPLIT)
    solid += [f for f in found if all(f.end <= s.start or s.end <= f.start for s in solid)]
    solid = [
        s
        for s in solid
        if all(s.end <= q.start or q.end <= s.start or (q.start <= s.start and s.end <= q.end) for q in quotes)
    ]
    bold = Splitter(m for m in marks if m.type in SPLIT)
    return in_order(bold.split(in_order(solid + quotes)) + solid + quotes)


def settled(text: str, marks: list[Mark]) -> tuple[str, list[dict]]:
    """Text and entities as they stand in the chat: cleaned, trimmed, in UTF-16 units."""
    kept = [c.translate(CLEAN) for c in text]
    places = [0, *itertools.accumulate(map(len, kept))]
    text = "".join(kept)
    marks = [m._replace(start=places[m.start], end=places[m.end]) for m in marks]
    text = text.rstrip(" \n")
    marks = fixed([m._replace(end=min(m.end, len(text))) for m in marks if m.start < min(m.end, len(text))])
    first = marks[0].start if marks else len(text)
    lead = min(first, len(text) - len(text.lstrip(" \n")))
    text, marks = text[lead:], [m._replace(start=m.start - lead, end=m.end - lead) for m in marks]
    marks = fixed(marks, [Mark(*found.span(), found.lastgroup) for found in FINDER.finditer(text)])
    place = offsets(text)
    return text, [
        {"type": m.type, "offset": place[m.start], "length": place[m.end] - place[m.start], **m.more} for m in marks
    ]


def marks_of(text: str, entities: list) -> list[Mark]:
    """The marks for entities in UTF-16 units, as `entities` gives them."""
    index = {unit: i for i, unit in enumerate(offsets(text))}
    marks = []
    for entity in entities:
        need(isinstance(entity, dict), "can't parse MessageEntity: expected an Object")
        start, length = entity.get("offset"), entity.get("length")
        if start in index and isinstance(length, int) and start + length in index and entity.get("type") in RANK:
            more = {key: entity[key] for key in ("url", "user", "language", "custom_emoji_id") if entity.get(key)}
            marks.append(Mark(index[start], index[start + length], entity["type"], more))
    return [mark for mark in marks if mark.end > mark.start]


def formatted(args: Given, name: str) -> tuple[str, list[dict]]:
    """Text and entities of the parameter text or caption."""
    text, mode = args.text(name), args.text("parse_mode").lower()
    need(mode in ("", "none", "html"), "unsupported parse_mode")
    encoded = not re.search("[\ud800-\udfff]", text)
    need(encoded, ("text" if mode == "html" else "strings") + " must be encoded in UTF-8")
    need(len(text.encode()) <= 1 << 15, "text is too long")
    if mode == "html":
        text, marks = HtmlParser(text).parse()
    else:
        entities = args.json("entities" if name == "text" else "caption_entities", list, "entities") or []
        marks = marks_of(text, entities)
    return settled(text, marks)


# ===== 3. World ===============================================================
#
# One bot, its chats and its updates. A Post is a message as it stands in a chat,
# with all it was before; its `message` is what the API tells of it.

BOT = {"id": int(TOKEN.partition(":")[0]), "is_bot": True, "first_name": "Pista", "username": "openpista_test_bot"}
ABILITIES = {"can_join_groups": True, "can_read_all_group_messages": True, "supports_inline_queries": False}
ON_REQUEST = {"chat_member", "message_reaction", "message_reaction_count"}
SUPERGROUPS = -1_000_000_000_000  # and below
CONFLICT = "terminated by other getUpdates request; make sure that only one bot instance is running"
PHOTO_SIZES = ((90, 67), (1280, 960))


class Post:
    """A message in a chat, and what it was before."""

    def __init__(self, message: dict, source: str = "", silent: bool = False):
        self.message, self.source, self.silent = message, source, silent
        self.texts, self.times, self.deleted, self.file = [self.text], [time.monotonic()], False, None

    @property
    def text(self) -> str:
        return self.message.get("text", self.message.get("caption", ""))

    def change(self, source: str | None, **fields):
        """Its new text and markup; a field that is None goes."""
        self.message = {k: v for k, v in (self.message | fields).items() if v is not None}
        self.times.append(time.monotonic())
        if source is not None:
            self.source = source
            self.texts.append(self.text)

    def row(self) -> dict:
        """What a test is told of it."""
        message = self.message
        return {
            "message_id": message["message_id"],
            "chat": message["chat"]["id"],
            "text": self.text,
            "entities": message.get("entities", message.get("caption_entities", [])),
            "source": self.source,  # as it was sent, with its HTML
            "markup": message.get("reply_markup"),
            "reply_to": message.get("reply_to_message", {}).get("message_id"),
            "thread": message.get("message_thread_id"),
            "preview": message.get("link_preview_options"),
            "silent": self.silent,
            "file": self.file,
            "texts": self.texts,
            "times": self.times,
            "edits": len(self.times) - 1,
            "deleted": self.deleted,
        }


class Poll(typing.NamedTuple):
    """A getUpdates that waits."""

    awake: asyncio.Future
    conflict: list


class World:
    """Everything the server knows; a fresh one forgets it."""

    def __init__(self):
        self.chats, self.posts, self.topics = {}, {}, {}
        self.last_message = collections.Counter()
        self.files, self.commands, self.callbacks = {}, {}, {}
        self.blocked, self.moved = set(), {}
        self.updates, self.next_update = [], 100_000_001
        self.allowed, self.webhook_url = None, ""
        self.poll, self.polled, self.next_conflict = None, (None, 0.0), 0.0
        self.faults, self.calls, self.actions = [], collections.deque(maxlen=50_000), []
        self.limits, self.sends = None, collections.defaultdict(list)
        self.version, self.watchers = 0, []
        self.numbers = itertools.count(1)

    def changed(self):
        """Wake the tests that wait."""
        self.version += 1
        watchers, self.watchers = self.watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def fresh(self) -> "World":
        """A new world; its numbers go on, since a bot remembers them, and whoever waits is sent away."""
        new = World()
        new.last_message, new.next_update, new.numbers = self.last_message, self.next_update, self.numbers
        new.version = self.version + 1
        if self.poll and not self.poll.awake.done():
            self.poll.awake.set_result(None)
        self.changed()
        return new

    # ---- chats and posts ----

    def chat(self, id: int, **fields) -> dict:
        """A chat, made when it is first spoken of."""
        if id not in self.chats:
            kind = "private" if id > 0 else "supergroup" if id <= SUPERGROUPS else "group"
            name = {"first_name": f"User {id}"} if id > 0 else {"title": f"Chat {id}"}
            self.chats[id] = {"id": id, **name, "type": kind}
            self.posts[id], self.topics[id] = {}, set()
        self.chats[id] |= fields
        return self.chats[id]

    def new_message_id(self, chat: int) -> int:
        space = chat if chat <= SUPERGROUPS else 0  # private chats and small groups share one
        self.last_message[space] += 1
        return self.last_message[space]

    def post(self, chat: int, sender: dict, content: dict, **more) -> Post:
        start = {"message_id": self.new_message_id(chat), "from": sender, "chat": self.chats[chat]}
        post = Post(start | {"date": int(time.time())} | content, **more)
        self.posts[chat][post.message["message_id"]] = post
        self.changed()
        return post

    def find(self, chat: int, message_id: int, what: str) -> Post:
        post = self.posts[chat].get(message_id)
        need(post and not post.deleted, f"message to {what} not found")
        return post

    def add_file(self, data: bytes, name: str, mime: str, size: int | None = None) -> dict:
        """What the API tells of a file; size: only said, to have big files cheaply."""
        number = next(self.numbers)
        folder = "photos" if mime.startswith("image/") else "documents"
        path = f"{folder}/file_{number}{os.path.splitext(name)[1]}"
        size = len(data) if size is None else size
        about = {"file_id": f"BQACAgIAAxk{number:016d}AAE", "file_unique_id": f"AgAD{number:010d}", "file_size": size}
        self.files[about["file_id"]] = (about, path, data, name, mime)
        return about

    # ---- updates ----

    def update(self, kind: str, value) -> int | None:
        """Queue one, if the bot wants that kind."""
        wanted = self.allowed if self.allowed is not None else {kind} - ON_REQUEST
        if kind not in wanted:
            return None
        return self.queue({"update_id": self.next_update, kind: value})

    def queue(self, update, id: int | None = None, once: bool = False) -> int:
        """Queue an update, or bytes that stand for one; once: it goes when it was delivered, confirmed or not."""
        id = self.next_update if id is None else id
        self.next_update = max(self.next_update, id + 1)
        raw = update if isinstance(update, bytes) else json.dumps(update).encode()
        self.updates.append((id, raw, once))
        if self.poll and not self.poll.awake.done():
            self.poll.awake.set_result(None)
        self.changed()
        return id

    def confirm(self, offset: int):
        if offset < 0:
            self.updates = self.updates[offset:]
        elif 0 < offset <= self.next_update + 10:  # further ahead confirms nothing
            self.updates = [update for update in self.updates if update[0] >= offset]

    def take(self, limit: int) -> list[bytes]:
        taken = self.updates[:limit]
        self.updates = [update for update in taken if not update[2]] + self.updates[limit:]
        return [raw for _, raw, _ in taken]

    def end_poll(self, text: str):
        """409 for the poll that waits, if one does."""
        if self.poll and not self.poll.awake.done():
            self.poll.conflict.append(text)
            self.poll.awake.set_result(None)
        self.poll = None

    # ---- limits ----

    def throttle(self, chat: int):
        """429 for too many messages and edits, if a test switched that on."""
        if not self.limits:
            return
        now, waits = time.monotonic(), []
        windows = [
            (0, self.limits["total"], 1.0),
            (chat, self.limits["burst"], self.limits["burst"] / self.limits["chat"]),
        ]
        windows += [(("group", chat), self.limits["group"], 60.0)] if chat < 0 else []
        for key, most, seconds in windows:
            times = self.sends[key] = [t for t in self.sends[key] if t > now - seconds]
            if len(times) >= most:
                waits.append(times[-most] + seconds - now)
        if waits:
            self.refuse_for(math.ceil(max(waits)))
        for key, _, _ in windows:
            self.sends[key].append(now)

    def refuse_for(self, seconds: int):
        raise Refused(f"retry after {seconds}", 429, retry_after=seconds)

    def fault(self, method: str) -> tuple[str, str] | None:
        """The fault this call is to have: kind, argument."""
        for fault in list(self.faults):
            if fault["method"].lower() not in ("*", method):
                continue
            if fault["after"] > 0:
                fault["after"] -= 1
                continue
            fault["times"] -= 1
            if fault["times"] == 0:
                self.faults.remove(fault)
            kind, _, argument = fault["kind"].partition(":")
            return kind, argument
        return None


# ===== 4. Methods =============================================================
#
# Each takes the world and what it is given, and returns its result; (result,
# description) where Telegram says more; bytes where they are JSON already.

ACTIONS = set(
    """cancel typing record_video upload_video record_audio record_voice upload_audio upload_voice upload_photo
    upload_document choose_sticker pick_up_location find_location record_video_note upload_video_note""".split()
)
IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM")


def checked_chat(world: World, name: str, write: bool = False) -> int:
    """The chat's number, if the bot may read it; write: or write to it."""
    need(name, "chat_id is empty")
    id = int(name) if re.fullmatch(r"-?\d{1,19}", name) else None
    if name.startswith("@"):
        id = next((id for id, chat in world.chats.items() if f"@{chat.get('username')}" == name), None)
    need(id in world.chats, "chat not found")
    if write:
        text = "group chat was upgraded to a supergroup chat"
        need(id not in world.moved, text, migrate_to_chat_id=world.moved.get(id))
        need(id not in world.blocked, "bot was blocked by the user", 403)
    return id


def checked_button(button) -> dict:
    start = "can't parse inline keyboard button: "
    need(isinstance(button, dict), start + "InlineKeyboardButton must be an Object")
    need("text" in button, start + 'Can\'t find field "text"')
    need(isinstance(button["text"], str), start + 'Field "text" must be of type String')
    kinds = ("url", "callback_data", "switch_inline_query", "switch_inline_query_current_chat", "copy_text", "web_app")
    need(any(button.get(kind) for kind in kinds), start + "Text buttons are unallowed in the inline keyboard")
    data = button.get("callback_data", "")
    need(isinstance(data, str), start + 'Field "callback_data" must be of type String')
    need(len(data.encode("utf-8", "surrogatepass")) <= 64, "BUTTON_DATA_INVALID")
    need(button["text"], "BUTTON_TEXT_INVALID")
    return button


def checked_markup(args: Given) -> dict | None:
    """An inline keyboard; other keyboards pass, and are not part of a message."""
    markup = args.json("reply_markup", dict, "reply markup") or {}
    rows = markup.get("inline_keyboard") or []
    wrong = 'Field "inline_keyboard" of the InlineKeyboardMarkup must be an Array of Arrays'
    need(isinstance(rows, list) and all(isinstance(row, list) for row in rows), wrong)
    rows = [[checked_button(button) for button in row] for row in rows if row]
    return {"inline_keyboard": rows} if rows else None


def checked_text(args: Given, name: str, limit: int, words: tuple[str, str]) -> tuple[str, list[dict]]:
    text, entities = formatted(args, name)
    need(len(text) <= limit, words[0])
    need(units(text) <= limit, words[1])  # what only the servers behind the API notice
    return text, entities


def text_content(args: Given) -> dict:
    need(args.text("text"), "message text is empty")
    text, entities = checked_text(args, "text", 4096, ("message is too long", "MESSAGE_TOO_LONG"))
    need(not NOTHING.fullmatch(text), "text must be non-empty")
    preview = args.json("link_preview_options", dict, "link preview options")
    return {"text": text, "entities": entities or None, "link_preview_options": preview}


def caption_content(args: Given) -> dict:
    text, entities = checked_text(args, "caption", 1024, ("message caption is too long", "MEDIA_CAPTION_TOO_LONG"))
    return {"caption": text or None, "caption_entities": entities or None}


def checked_thread(world: World, args: Given, chat: int) -> int | None:
    thread = args.int("message_thread_id") or None
    need(thread is None or (thread > 1 and thread in world.topics[chat]), "message thread not found")
    return thread


def checked_reply(world: World, args: Given, chat: int) -> dict | None:
    reply = args.json("reply_parameters", dict, "reply parameters") or {}
    if not reply:
        reply["message_id"] = args.int("reply_to_message_id")
        reply["allow_sending_without_reply"] = args.flag("allow_sending_without_reply")
        if reply["message_id"] <= 0:
            return None
    need("message_id" in reply, 'can\'t find field "message_id"')
    other = checked_chat(world, str(reply["chat_id"])) if reply.get("chat_id") else chat
    post = world.posts[other].get(reply["message_id"])
    if not post or post.deleted:
        need(reply.get("allow_sending_without_reply"), "message to be replied not found")
        return None
    return {key: value for key, value in post.message.items() if key != "reply_to_message"}


def send(world: World, args: Given, content: dict, source: str) -> Post:
    """What all methods share that send something."""
    markup = checked_markup(args)
    chat = checked_chat(world, args.text("chat_id"), write=True)
    thread, reply = checked_thread(world, args, chat), checked_reply(world, args, chat)
    world.throttle(chat)
    content |= {"reply_markup": markup, "message_thread_id": thread, "reply_to_message": reply}
    content |= {"is_topic_message": True} if thread else {}
    content = {key: value for key, value in content.items() if value is not None}
    return world.post(chat, BOT, content, source=source, silent=args.flag("disable_notification"))


def send_message(world: World, args: Given):
    return send(world, args, text_content(args), args.text("text")).message


def input_file(world: World, args: Given, name: str) -> tuple[dict, str, bytes, str, str]:
    """The file a request brings or names."""
    said = args.text(name)
    if said and not said.startswith("attach://"):
        need(not re.match("https?://", said), "failed to get HTTP URL content")
        need(said in world.files, "wrong file identifier/HTTP URL specified")
        return world.files[said]
    file = args.files.get(said.removeprefix("attach://") or name)
    need(file, f"there is no {name} in the request")
    need(file.data, "file must be non-empty")
    need(len(file.data) <= (UPLOAD_LIMIT if name == "document" else 10 << 20), "file is too big")
    return world.files[world.add_file(file.data, file.name, file.mime)["file_id"]]


def send_file(world: World, args: Given, file, content: dict):
    about, path, data, filename, mime = file
    post = send(world, args, content | caption_content(args), args.text("caption"))
    post.file = {"id": about["file_id"], "name": filename, "mime": mime, "size": len(data), "path": path}
    return post.message


def document_of(file) -> dict:
    about, _, _, name, mime = file
    return {**about, "file_name": name, "mime_type": mime}


def photo_of(file) -> list[dict]:
    return [{**file[0], "width": width, "height": height} for width, height in PHOTO_SIZES]


def send_document(world: World, args: Given):
    file = input_file(world, args, "document")
    return send_file(world, args, file, {"document": document_of(file)})


def send_photo(world: World, args: Given):
    file = input_file(world, args, "photo")
    need(file[2].startswith(IMAGES), "IMAGE_PROCESS_FAILED")
    return send_file(world, args, file, {"photo": photo_of(file)})


def editable(world: World, args: Given) -> Post:
    chat = checked_chat(world, args.text("chat_id"))
    post = world.find(chat, args.int("message_id"), "edit")
    need(post.message["from"]["id"] == BOT["id"], "message can't be edited")
    return post


def edit(world: World, post: Post, source: str | None, **fields):
    now = {key: post.message.get(key) for key in fields if key != "link_preview_options"}
    text = "message is not modified: specified new message content and reply markup are exactly the same as a current "
    need(any(now[key] != fields[key] for key in now), text + "content and reply markup of the message")
    world.throttle(post.message["chat"]["id"])
    post.change(source, **fields, edit_date=int(time.time()))
    world.changed()
    return post.message


def edit_message_text(world: World, args: Given):
    content, markup = text_content(args), checked_markup(args)
    post = editable(world, args)
    need("text" in post.message, "there is no text in the message to edit")
    return edit(world, post, args.text("text"), **content, reply_markup=markup)


def edit_message_reply_markup(world: World, args: Given):
    markup = checked_markup(args)
    return edit(world, editable(world, args), None, reply_markup=markup)


def delete_message(world: World, args: Given):
    need(args.text("chat_id"), "chat identifier is not specified")
    need(args.int("message_id"), "message identifier is not specified")
    chat = checked_chat(world, args.text("chat_id"), write=True)
    post = world.find(chat, args.int("message_id"), "delete")
    mine = post.message["from"]["id"] == BOT["id"] or chat > 0
    need(mine, "message can't be deleted")
    post.deleted = True
    post.times.append(time.monotonic())
    world.changed()
    return True


def send_chat_action(world: World, args: Given):
    action = args.text("action").lower()
    need(action in ACTIONS, "wrong parameter action in request")
    chat = checked_chat(world, args.text("chat_id"), write=True)
    thread = args.int("message_thread_id") or None
    world.actions.append({"chat": chat, "action": action, "thread": thread, "time": time.monotonic()})
    world.changed()
    return True


def answer_callback_query(world: World, args: Given):
    query = world.callbacks.get(args.text("callback_query_id"))
    need(query is not None, "query is too old and response timeout expired or query ID is invalid")
    need(units(args.text("text")) <= 200, "MESSAGE_TOO_LONG")
    query |= {"text": args.text("text"), "alert": args.flag("show_alert"), "time": time.monotonic()}
    world.changed()
    return True


def get_file(world: World, args: Given):
    need(args.text("file_id"), "file_id not specified")
    need(args.text("file_id") in world.files, "invalid file_id")
    about, path, *_ = world.files[args.text("file_id")]
    need(about["file_size"] <= DOWNLOAD_LIMIT, "file is too big")
    return about | {"file_path": path}


def command_key(args: Given) -> str:
    scope = args.json("scope", dict, "BotCommandScope") or {"type": "default"}
    return json.dumps([scope, args.text("language_code")], sort_keys=True)


def set_my_commands(world: World, args: Given):
    rows = args.json("commands", list, "commands") or []
    commands = []
    for row in rows:
        wrong = "can't parse BotCommand: "
        need(isinstance(row, dict), wrong + "expected an Object")
        for field in ("command", "description"):
            need(isinstance(row.get(field), str), f'{wrong}Can\'t find field "{field}"')
        name, description = row["command"].strip().removeprefix("/"), row["description"].strip()
        need(name, "command must be non-empty")
        need(len(name) <= 32, "command length must not exceed 32")
        need(description, "command description must be non-empty")
        need(len(description) <= 256, "command description length must not exceed 256")
        need(re.fullmatch("[a-z0-9_]+", name), "BOT_COMMAND_INVALID")
        commands.append({"command": name, "description": description})
    need(len(commands) <= 100, "BOT_COMMANDS_TOO_MUCH")
    world.commands[command_key(args)] = commands
    world.changed()
    return True


def get_my_commands(world: World, args: Given):
    return world.commands.get(command_key(args), [])


def delete_my_commands(world: World, args: Given):
    world.commands.pop(command_key(args), None)
    return True


def get_chat(world: World, args: Given):
    chat = world.chats[checked_chat(world, args.text("chat_id"))]
    gifts = "unlimited_gifts limited_gifts unique_gifts premium_subscription gifts_from_channels".split()
    gifts = dict.fromkeys(gifts, False)
    return chat | {"accent_color_id": 0, "max_reaction_count": 11, "accepted_gift_types": gifts}


def get_me(world: World, args: Given):
    return BOT | ABILITIES


def allow(world: World, args: Given):
    """Take allowed_updates if it is given and sound; otherwise the previous setting stays."""
    try:
        kinds = json.loads(args.text("allowed_updates") or "0")
    except ValueError:
        return
    if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
        world.allowed = {kind.lower() for kind in kinds} or None


def set_webhook(world: World, args: Given):
    url = args.text("url")
    if not url:
        return delete_webhook(world, args)
    need(url.lower().startswith("https://"), "bad webhook: An HTTPS URL must be provided for webhook")
    world.end_poll("terminated by setWebhook request")
    allow(world, args)
    if args.flag("drop_pending_updates"):
        world.updates = []
    same, world.webhook_url = world.webhook_url == url, url
    return True, "Webhook is already set" if same else "Webhook was set"


def delete_webhook(world: World, args: Given):
    if args.flag("drop_pending_updates"):
        world.updates = []
    was, world.webhook_url = world.webhook_url, ""
    return True, "Webhook was deleted" if was else "Webhook is already deleted"


def get_webhook_info(world: World, args: Given):
    info = {"url": world.webhook_url, "has_custom_certificate": False, "pending_update_count": len(world.updates)}
    info |= {"max_connections": 40, "ip_address": "<unknown>"} if world.webhook_url else {}
    return info | ({"allowed_updates": sorted(world.allowed)} if world.allowed else {})


async def conflict(world: World, text: str):
    """409; at once, but one that follows soon comes late, which slows down who asks without pause."""
    now = time.monotonic()
    if now < world.next_conflict:
        await asyncio.sleep(3)
    else:
        world.next_conflict = now + 3
    raise Refused(text, 409)


async def get_updates(world: World, args: Given):
    if world.webhook_url:
        text = "can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
        await conflict(world, text)
    offset, limit = args.int("offset"), args.int("limit", 100, 1, 100)
    timeout = args.int("timeout", 0, 0, 50)
    allow(world, args)
    before, at = world.polled
    world.polled = offset, time.monotonic()
    if offset == before and time.monotonic() < at + 3:
        timeout = max(timeout, 3)
    if offset == before and time.monotonic() < at + 0.5:
        limit = 1
    world.confirm(offset)
    if timeout and not world.updates:
        await wait_for_update(world, timeout)
    return b"[" + b",".join(world.take(limit)) + b"]"


async def wait_for_update(world: World, timeout: float):
    world.end_poll(CONFLICT)
    loop = asyncio.get_running_loop()
    poll = world.poll = Poll(loop.create_future(), [])
    timer = loop.call_later(timeout, lambda: poll.awake.done() or poll.awake.set_result(None))
    world.changed()
    try:
        await poll.awake
    finally:
        timer.cancel()
        if world.poll is poll:
            world.poll = None
    if poll.conflict:
        await conflict(world, poll.conflict[0])


METHODS = {
    method.__name__.replace("_", ""): method
    for method in (
        get_me, get_updates, set_webhook, delete_webhook, get_webhook_info, send_message, send_document, send_photo,
        edit_message_text, edit_message_reply_markup, delete_message, send_chat_action, get_file,
        answer_callback_query, set_my_commands, get_my_commands, delete_my_commands, get_chat,
    )
}  # fmt: skip

# ===== 5. Control =============================================================
#
# What users do, and what a test wants to know. Arguments and results are JSON.


def user_of(world: World, chat: int, sender) -> dict:
    if isinstance(sender, dict):
        return sender
    id = sender or (chat if chat > 0 else 1001)
    return {"id": id, "is_bot": False, "first_name": f"User {id}", "language_code": "en"}


def said(text: str, entities: list | None, key: str = "text") -> dict:
    """The content of a user's message."""
    if entities is None:
        text, entities = settled(text, [])
    found = {"entities" if key == "text" else "caption_entities": entities} if entities else {}
    return {key: text} | found if text else {}


def say(world: World, chat, text="", sender=None, reply_to=None, entities=None, **fields):
    """A user speaks; reply_to: a message_id. With text in a medium, give it as caption."""
    world.chat(chat)
    content = said(text, entities) | fields
    if "caption" in fields:
        content |= said(fields["caption"], None, "caption")
    if thread := fields.get("message_thread_id"):
        world.topics[chat].add(thread)
        content["is_topic_message"] = True
    if reply_to:
        content["reply_to_message"] = world.posts[chat][reply_to].message
    return told(world, "message", world.post(chat, user_of(world, chat, sender), content))


def told(world: World, kind: str, post: Post) -> dict:
    update = world.update(kind, post.message)
    return {"update_id": update, "message_id": post.message["message_id"], "time": time.monotonic()}


def edit_by_user(world: World, chat, message_id, text, **fields):
    post = world.posts[chat][message_id]
    gone = {"entities": None}
    post.change(text, **(gone | said(text, None) | fields), edit_date=int(time.time()))
    return told(world, "edited_message", post)


def press(world: World, chat, message_id, data, sender=None):
    """A user presses a button; the id of the callback query."""
    world.chat(chat)
    post = world.posts[chat].get(message_id)
    gone = {"chat": world.chats[chat], "message_id": message_id, "date": 0}
    id = str(5_000_000_000_000_000_000 + next(world.numbers))
    world.callbacks[id] = {}
    query = {"id": id, "from": user_of(world, chat, sender), "chat_instance": str(-chat * 7919), "data": data}
    world.update("callback_query", query | {"message": post.message if post and not post.deleted else gone})
    return id


def update(world: World, value=None, raw=None, once=False):
    """Any update at all: an object, or raw bytes in base64."""
    if raw is not None:
        return world.queue(base64.b64decode(raw), once=once)
    id = value.get("update_id") if isinstance(value, dict) else None
    if isinstance(value, dict) and "update_id" not in value:
        id, value = world.next_update, {"update_id": world.next_update, **value}
    return world.queue(value, id if type(id) is int else None, once)


def add_file(world: World, data, name="file.bin", mime="", size=None):
    mime = mime or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return world.add_file(base64.b64decode(data), name, mime, size)["file_id"]


def send_media(world: World, chat, files, kind, caption="", **fields):
    """A user sends files; several are an album, of which the first has the caption."""
    describe = {"document": document_of, "photo": photo_of}[kind]
    group = {"media_group_id": str(13_000_000_000_000_000 + next(world.numbers))} if len(files) > 1 else {}
    told = []
    for i, file_id in enumerate(files):
        words = {"caption": caption} if caption and not i else {}
        told.append(say(world, chat, **words, **group, **fields, **{kind: describe(world.files[file_id])}))
    return told


def block(world: World, chat, blocked=True):
    """A user blocks the bot, or no longer."""
    world.chat(chat)
    (world.blocked.add if blocked else world.blocked.discard)(chat)
    states = [{"user": BOT, "status": "member"}, {"user": BOT, "status": "kicked", "until_date": 0}]
    old, new = states if blocked else reversed(states)
    value = {"chat": world.chats[chat], "from": user_of(world, chat, None), "date": int(time.time())}
    return world.update("my_chat_member", value | {"old_chat_member": old, "new_chat_member": new})


def migrate(world: World, old, new):
    """A group becomes a supergroup; both tell it."""
    world.chat(new, title=world.chat(old)["title"])
    say(world, old, migrate_to_chat_id=new)
    say(world, new, migrate_from_chat_id=old)
    world.moved[old] = new


def fault(world: World, method, kind, times=1, after=0):
    if kind.partition(":")[0] not in FAULTS:
        raise ValueError(f"no such fault: {kind}")
    world.faults.append({"method": method, "kind": kind, "times": times, "after": after})


def calm(world: World):
    """No faults any more."""
    world.faults.clear()


def sent(world: World, chat=None):
    """What the bot wrote, in one chat or in all, in order; what it deleted too."""
    chats = world.posts.values() if chat is None else [world.posts.get(chat, {})]
    mine = (post for posts in list(chats) for post in posts.values() if post.message["from"]["id"] == BOT["id"])
    return {"rows": [post.row() for post in mine]}


def calls(world: World, method=None):
    rows = [row for row in world.calls if method is None or row["method"].lower() == method.lower()]
    return {"rows": rows}


def content(world: World, file_id):
    return base64.b64encode(world.files[file_id][2]).decode()


def limit(world: World, on=True, chat=1.0, burst=3, group=20, total=30):
    world.limits = {"chat": chat, "burst": burst, "group": group, "total": total} if on else None


def state(world: World):
    """The rest of what may be asked."""
    return {
        "actions": world.actions,
        "callbacks": world.callbacks,
        "commands": [[*json.loads(key), rows] for key, rows in world.commands.items()],
        "polling": bool(world.poll),
        "pending": len(world.updates),
        "faults": world.faults,
        "allowed": None if world.allowed is None else sorted(world.allowed),
    }


async def changed(world: World, since=None, timeout=1.0):
    """Returns when there was a change since that version, or after so long."""
    if since is not None and world.version == since:
        watcher = asyncio.get_running_loop().create_future()
        world.watchers.append(watcher)
        await asyncio.wait([watcher], timeout=timeout)
    return world.version


def webhook(world: World, url):
    world.end_poll("terminated by setWebhook request")
    world.webhook_url = url


def next_update(world: World, id):
    """Updates are numbered from here on; Telegram does such jumps after a quiet week."""
    world.next_update = id


def chat(world: World, id, **fields):
    return world.chat(id, **fields)


def topic(world: World, chat, thread):
    world.chat(chat, is_forum=True)
    world.topics[chat].add(thread)


CONTROL = {
    one.__name__: one
    for one in (
        say, edit_by_user, press, update, add_file, send_media, block, migrate, fault, calm, sent, calls, content, limit,
        state, changed, webhook, next_update, chat, topic,
    )
}  # fmt: skip

# ===== 6. Server ==============================================================
#
# A connection is a buffer and at most one task; when it breaks off, the task is
# cancelled, and with it the poll that waited.

# status:N       a plain error, nothing is done         429:N     the same, with retry_after
# 401            Unauthorized, nothing is done          html      502 with a page, nothing is done
# drop           closed before anything is done         silent    nothing is done, and no answer ever comes
# lost           done, then closed without an answer    junk      done, then 200 with what is no JSON
# slow:N         done and answered after N seconds
FAULTS = {"status", "429", "401", "html", "drop", "silent", "lost", "junk", "slow"}
PAGE = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>nginx</body>\r\n</html>\r\n"
BODY_LIMIT = 64 << 20
HEAD_LIMIT = 64 << 10


class Gone(Exception):
    """The connection is to be closed without an answer."""


class Answer(typing.NamedTuple):
    status: int
    body: bytes
    kind: str = "application/json"
    more: typing.Mapping = types.MappingProxyType({})


def failure(refused: Refused) -> Answer:
    body = {"ok": False, "error_code": refused.code, "description": str(refused)}
    body |= {"parameters": refused.parameters} if refused.parameters else {}
    retry = refused.parameters.get("retry_after")
    return Answer(refused.code, json.dumps(body).encode(), more={"Retry-After": str(retry)} if retry else {})


class Server:
    """The world, and who may ask about it."""

    def __init__(self):
        self.world = World()

    async def answer(self, request: Request) -> Answer:
        if request.path.startswith("/control/"):
            return await self.control(request)
        found = re.fullmatch(r"/(file/)?bot([^/]*)/(.*)", request.path, re.S)
        try:
            need(found and re.fullmatch(r"\d{5,}:[\w-]{30,}", found[2]), code=404)
            file, _, method = found.groups()
            need(found[2] == TOKEN, code=401)
            if file:
                return await self.call(request, "file", Given({"path": method}, {}))
            need(request.method in ("GET", "POST"), code=405)
            need(method.lower() in METHODS, code=404)
            return await self.call(request, method, given(request))
        except Refused as refused:
            return failure(refused)

    async def call(self, request: Request, method: str, args: Given) -> Answer:
        """One method, with the fault it is to have."""
        row = {"method": method, "time": time.monotonic(), "parameters": args.log(), "status": None, "fault": None}
        self.world.calls.append(row)
        kind, argument = self.world.fault(method.lower()) or ("", "")
        row["fault"] = kind or None
        self.world.changed()
        answer = await self.faulty(kind, argument) or await self.work(method, args)
        row["status"], row["answered"] = answer.status, time.monotonic()
        self.world.changed()
        if kind == "lost":
            raise Gone
        return answer._replace(body=b'{"ok":true,"result":[{\'' + os.urandom(20)) if kind == "junk" else answer

    async def faulty(self, kind: str, argument: str) -> Answer | None:
        """The answer of a fault that comes instead of the work."""
        if kind == "drop":
            raise Gone
        if kind in ("slow", "silent"):
            await asyncio.sleep(float(argument) if kind == "slow" else 1e9)
        if kind == "html":
            return Answer(502, PAGE, "text/html")
        if kind in ("status", "401"):
            return failure(Refused(code=int(argument or kind)))
        if kind == "429":
            seconds = int(argument or 1)
            return failure(Refused(f"retry after {seconds}", 429, retry_after=seconds))
        return None

    async def work(self, method: str, args: Given) -> Answer:
        try:
            if method == "file":
                return self.download(args.text("path"))
            result = METHODS[method.lower()](self.world, args)
            result = await result if asyncio.iscoroutine(result) else result
        except Refused as refused:
            return failure(refused)
        if isinstance(result, bytes):
            return Answer(200, b'{"ok":true,"result":' + result + b"}")
        result, *description = result if isinstance(result, tuple) else (result,)
        more = {"description": description[0]} if description else {}
        return Answer(200, json.dumps({"ok": True, "result": result, **more}).encode())

    def download(self, path: str) -> Answer:
        for about, known, data, _, mime in self.world.files.values():
            if known == path and about["file_size"] <= DOWNLOAD_LIMIT:
                return Answer(200, data, mime)
        raise Refused(code=404)

    async def control(self, request: Request) -> Answer:
        name = request.path.removeprefix("/control/")
        if name == "reset":
            self.world = self.world.fresh()
            return Answer(200, b"null")
        try:
            result = CONTROL[name](self.world, **json.loads(request.body or b"{}"))
            result = await result if asyncio.iscoroutine(result) else result
        except (KeyError, TypeError, ValueError, Refused) as error:
            return Answer(400, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return Answer(200, json.dumps(result).encode())


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time."""

    def __init__(self, server: Server):
        self.server, self.buffer, self.head, self.task = server, bytearray(), None, None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes):
        self.buffer += data
        if not self.task:
            self.advance()

    def advance(self):
        """Begin with the next request, if it is all there."""
        try:
            if not self.head and not self.take_head():
                return
            body, size = parse_body(self.head[3], self.buffer)
        except ValueError:
            self.transport.close()
            return
        if max(size, len(self.buffer)) > BODY_LIMIT:
            self.send(failure(Refused(code=413)), keep=False)
        elif body is not None:
            request, self.head = Request(*self.head, body), None
            del self.buffer[:size]
            self.task = asyncio.get_running_loop().create_task(self.serve(request))

    def take_head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n", 0, HEAD_LIMIT)
        if end < 0:
            if len(self.buffer) >= HEAD_LIMIT:
                raise ValueError("no end of the head")
            return False
        self.head = parse_head(bytes(self.buffer[:end]))
        del self.buffer[: end + 4]
        if self.head[3].get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    async def serve(self, request: Request):
        try:
            answer = await self.server.answer(request)
        except Gone:
            self.transport.abort()
            return
        except Exception:  # a bug in this file: say so, and go on
            sys.excepthook(*sys.exc_info())
            answer = Answer(500, b"a bug in botapi.py", "text/plain")
        self.task = None
        self.send(answer, keep=request.headers.get("connection", "").lower() != "close")
        if self.buffer and not self.transport.is_closing():
            self.advance()

    def send(self, answer: Answer, keep: bool):
        fields = {"Server": "nginx", "Content-Type": answer.kind, "Content-Length": len(answer.body), **answer.more}
        fields |= {"Connection": "keep-alive" if keep else "close"}
        lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body)
        if not keep:
            self.transport.close()


def end_with_parent():
    while os.read(0, 4096):
        pass
    os._exit(0)


async def serve(port: int):
    server = Server()
    listener = await asyncio.get_running_loop().create_server(
        lambda: Connection(server), "127.0.0.1", port, backlog=512
    )
    print(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", flush=True)
    await listener.serve_forever()


def main(words: list[str]):
    options = dict(zip(words, words[1:], strict=False))
    if "--stay" not in words:
        threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        asyncio.run(serve(int(options.get("--port", 0))))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
