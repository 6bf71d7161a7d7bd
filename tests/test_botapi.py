"""The fake Bot API tells the truth, as a client library for bots sees it that knows nothing of us."""

import asyncio
import html
import http.client
import json
import socket
import threading
import time
import urllib.parse

import pytest
from botapi import TOKEN, HtmlParser, Refused, settled, units
from hypothesis import given, settings
from hypothesis import strategies as st

telegram = pytest.importorskip("telegram")
error = pytest.importorskip("telegram.error")

pytestmark = pytest.mark.filterwarnings("ignore:Deprecated since version")  # of the library, about itself
ANN, GROUP, FORUM = 42, -77, -1_001_234_567_890
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)
KEYS = telegram.InlineKeyboardMarkup([[telegram.InlineKeyboardButton("Yes", callback_data="y" * 64)]])


@pytest.fixture
def server(bot):
    return bot


class Api:
    """The library's bot, without await."""

    def __init__(self, server):
        self.loop = asyncio.new_event_loop()
        folder = server.url + "/file/bot"
        self.bot = telegram.Bot(server.token, base_url=server.url + "/bot", base_file_url=folder)
        self.run(self.bot.initialize())

    def run(self, waiting):
        return self.loop.run_until_complete(waiting)

    def __getattr__(self, name):
        return lambda *words, **more: self.run(getattr(self.bot, name)(*words, **more))

    def close(self):
        self.run(self.bot.shutdown())
        self.loop.close()


@pytest.fixture(scope="module")
def library(bot_server):
    api = Api(bot_server)
    yield api
    api.close()


@pytest.fixture
def api(library, server):
    """The library's bot, which has heard nothing yet."""
    return library


def raw(server, path, body=None, kind="application/json", method=None):
    """(status, body as JSON) without any library."""
    connection = http.client.HTTPConnection(server.origin.removeprefix("http://"), timeout=10)
    try:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def refused(text):
    """What is refused with this text, of which the library writes only the first letter large."""
    return pytest.raises(error.BadRequest, match="(?i)" + text)


def later(function, *words):
    """Called soon, by a thread of its own."""
    thread = threading.Timer(0.05, function, words)
    thread.start()
    return thread


# ---- updates ----


def test_who_am_i(api, server):
    me = api.get_me()
    assert (str(me.id), me.is_bot, me.username) == (server.token.partition(":")[0], True, "openpista_test_bot")


def test_updates_come_until_confirmed(api, server):
    first, second, third = (server.say(ANN, text)["update_id"] for text in ("1", "2", "3"))
    assert [u.update_id for u in api.get_updates(limit=2)] == [first, second]
    assert [u.message.text for u in api.get_updates(offset=second)] == ["2", "3"]
    assert [u.message.text for u in api.get_updates(offset=third)] == ["3"]
    assert server.state()["pending"] == 1


def test_negative_offset_keeps_the_last(api, server):
    for text in "123":
        server.say(ANN, text)
    assert [u.message.text for u in api.get_updates(offset=-1)] == ["3"]
    assert server.state()["pending"] == 1


def test_offset_far_ahead_confirms_nothing(api, server):
    """As after a quiet week, when Telegram numbers updates anew."""
    server.say(ANN, "1")
    assert [u.message.text for u in api.get_updates(offset=2_000_000_000)] == ["1"]


def test_repeated_offset_gets_one(api, server):
    server.say(ANN, "1")
    server.say(ANN, "2")
    assert len(api.get_updates()) == 2
    assert any(len(api.get_updates()) == 1 for _ in range(50))  # within half a second; here it may take longer


def test_poll_wakes_up(api, server):
    thread = later(server.say, ANN, "hello")
    (update,) = api.get_updates(timeout=10)
    arrived = time.monotonic()
    thread.join()
    assert update.message.text == "hello"
    assert abs(time.time() - update.message.date.timestamp()) < 60
    assert arrived - server.calls("getUpdates")[0]["answered"] < 2


def test_poll_ends_empty(api, server):
    assert api.get_updates(timeout=1) == ()
    row = server.calls("getUpdates")[0]
    assert 0.9 < row["answered"] - row["time"] < 9


def test_older_poll_is_told_of_the_newer(api, server):
    async def both():
        older = asyncio.create_task(api.bot.get_updates(timeout=10))
        await asyncio.to_thread(server.wait_state, lambda state: state["polling"])
        newer = asyncio.create_task(asyncio.to_thread(raw, server, f"/bot{TOKEN}/getUpdates?timeout=10"))
        with pytest.raises(error.Conflict, match=r"^Conflict: terminated by other getUpdates request; make sure that"):
            await older
        await asyncio.to_thread(server.say, ANN, "hi")
        return await newer

    assert api.run(both())[1]["result"][0]["message"]["text"] == "hi"


def test_poll_of_who_hung_up_is_forgotten(server):
    with socket.create_connection(server.origin.removeprefix("http://").split(":")) as sock:
        sock.sendall(f"GET /bot{TOKEN}/getUpdates?timeout=50 HTTP/1.1\r\n\r\n".encode())
        server.wait_state(lambda state: state["polling"])
    server.wait_state(lambda state: not state["polling"])


def test_allowed_updates_stay_as_they_were(api, server):
    server.say(ANN, "1")
    api.get_updates(allowed_updates=["message"])
    sent = server.say(ANN, "2")
    assert server.edit(ANN, sent["message_id"], "3")["update_id"] is None
    api.get_updates(offset=2)
    assert server.edit(ANN, sent["message_id"], "4")["update_id"] is None
    api.get_updates(offset=3, allowed_updates=[])
    assert server.edit(ANN, sent["message_id"], "5")["update_id"] is not None
    assert server.state()["allowed"] is None


def test_webhook_and_polls_exclude_each_other(api, server):
    with refused("An HTTPS URL must be provided"):
        api.set_webhook("http://example.com/")
    assert api.set_webhook("https://example.com/", allowed_updates=["message"])
    server.say(ANN, "hi")
    info = api.get_webhook_info()
    assert (info.url, info.pending_update_count, info.allowed_updates) == ("https://example.com/", 1, ("message",))
    with pytest.raises(error.Conflict, match="can't use getUpdates method while webhook is active; use deleteWebhook"):
        api.get_updates()
    assert api.delete_webhook(drop_pending_updates=True)
    assert (api.get_webhook_info().url, server.state()["pending"]) == ("", 0)


# ---- what users do ----


def test_what_a_user_says(api, server):
    server.say(ANN, "/start@openpista_test_bot 𝄞 see https://example.com/a", message_thread_id=None)
    server.say(GROUP, "hi", sender=7)
    server.say(FORUM, "in a topic", message_thread_id=5)
    private, group, forum = (u.message for u in api.get_updates())
    assert private.parse_entities() == {
        private.entities[0]: "/start@openpista_test_bot",
        private.entities[1]: "https://example.com/a",
    }
    assert [m.chat.type for m in (private, group, forum)] == ["private", "group", "supergroup"]
    assert (private.from_user.id, group.from_user.id) == (ANN, 7)
    assert (forum.message_thread_id, forum.is_topic_message) == (5, True)


def test_media_from_users(api, server):
    server.document(ANN, b"data", "a.txt", caption="look", sender=9)
    server.photo(ANN, PNG)
    server.album(ANN, [PNG, PNG], caption="two")
    server.say(ANN, voice={"file_id": server.add_file(b"ogg"), "file_unique_id": "v", "duration": 3})
    document, photo, one, two, voice = (u.message for u in api.get_updates())
    assert (document.caption, document.document.file_name, document.document.mime_type) == (
        "look",
        "a.txt",
        "text/plain",
    )
    assert api.run(api.get_file(document.document).download_as_bytearray()) == b"data"
    assert api.run(api.get_file(photo.photo[-1]).download_as_bytearray()) == PNG
    assert one.media_group_id == two.media_group_id is not None
    assert (one.caption, two.caption, voice.voice.duration) == ("two", None, 3)


def test_files_over_20_mb(api, server):
    server.document(ANN, b"", size=(20 << 20) + 1)
    document = api.get_updates()[0].message.document
    with refused("^File is too big$"):
        api.get_file(document)
    with refused("Invalid file_id"):
        api.get_file("nonsense")


def test_blocking_and_migrating(api, server):
    server.block(ANN)
    with pytest.raises(error.Forbidden, match="bot was blocked by the user"):
        api.send_message(ANN, "hi")
    server.migrate(GROUP, FORUM)
    with pytest.raises(error.ChatMigrated) as caught:
        api.send_message(GROUP, "hi")
    assert caught.value.new_chat_id == FORUM
    member, old, new = api.get_updates()
    assert member.my_chat_member.new_chat_member.status == "kicked"
    assert (old.message.migrate_to_chat_id, new.message.migrate_from_chat_id) == (FORUM, GROUP)
    server.block(ANN, False)
    assert api.send_message(ANN, "hi").text == "hi"


def test_any_update(server):
    path = f"/bot{TOKEN}/getUpdates"
    server.next_update(500)
    assert server.update({"poll": None}) == 500
    server.update({"update_id": "x"})
    server.update(b'"\xff"', once=True)
    connection = http.client.HTTPConnection(server.origin.removeprefix("http://"), timeout=10)
    connection.request("GET", path)
    assert connection.getresponse().read() == (
        b'{"ok":true,"result":[{"update_id": 500, "poll": null},{"update_id": "x"},"\xff"]}'
    )
    connection.close()
    assert raw(server, path + "?offset=501")[1]["result"] == [{"update_id": "x"}]


# ---- messages ----

TEXTS = {
    "plain": ("plain", []),
    "<b>a</b><strong>b</strong>": ("ab", ["bold ab"]),
    "<i>a</i> <em>b</em> <u>c</u> <ins>d</ins>": ("a b c d", ["italic a", "italic b", "underline c", "underline d"]),
    "<s>a</s> <strike>b</strike> <del>c</del>": ("a b c", [f"strikethrough {c}" for c in "abc"]),
    "<tg-spoiler>a</tg-spoiler> <span class='tg-spoiler'>b</span>": ("a b", ["spoiler a", "spoiler b"]),
    "<code>a</code> <pre>b</pre>": ("a b", ["code a", "pre b"]),
    '<pre><code class="language-c++">a</code></pre>': ("a", ["pre a"]),
    '<a href="https://example.com/?a=1&amp;b=2">a</a>': ("a", ["text_link a"]),
    '<a href="nowhere">a</a>': ("a", []),
    '<a href="tg://user?id=5">a</a>': ("a", ["text_mention a"]),
    "<blockquote>a</blockquote>\n<blockquote expandable>b</blockquote>": (
        "a\nb",
        ["blockquote a", "expandable_blockquote b"],
    ),
    "𝄞<b>𝄞</b>": ("𝄞𝄞", ["bold 𝄞"]),
    "&lt;&gt;&amp;&quot;&#39;&#x1d11e;&nbsp;&": ("<>&\"'𝄞&nbsp;&", []),
    "<b>a <i>b</i></b>": ("a b", ["bold a ", "bold b", "italic b"]),
    "<i>a</i><b><i>b</i></b><b>c</b>": ("abc", ["italic a", "bold bc", "italic b"]),
    "<b>a <code>b</code> c</b>": ("a b c", ["bold a ", "code b", "bold  c"]),
    "  <b></b> a\t<B >b</B > \n": ("a b", ["bold b"]),
    "a@example.com #tag @someone /help": (
        "a@example.com #tag @someone /help",
        ["email a@example.com", "hashtag #tag", "mention @someone", "bot_command /help"],
    ),
    "a\r\nb\x01c": ("a\nb c", []),
}


@pytest.mark.parametrize("source", TEXTS)
def test_html(api, server, source):
    server.chat(ANN)
    message = api.send_message(ANN, source, parse_mode="HTML")
    text, entities = TEXTS[source]
    assert message.text == text
    assert [f"{entity.type.value} {message.parse_entity(entity)}" for entity in message.entities] == entities
    (row,) = server.sent(ANN)
    assert (row["text"], row["source"], len(row["entities"])) == (text, source, len(entities))


WRONG = {
    '<x>': 'unsupported start tag "x" at byte offset 0',
    'é<b/>': 'unsupported start tag "b/" at byte offset 2',
    "<b>a": 'can\'t find end tag corresponding to start tag "b"',
    "a</b>": "unexpected end tag at byte offset 1",
    "<b>a</i>": 'unmatched end tag at byte offset 4, expected "</b>", found "</i>"',
    "<b>a<i>b</b></i>": 'unmatched end tag at byte offset 8, expected "</i>", found "</b>"',
    "a < b": 'unsupported start tag "" at byte offset 2',
    "1<2": "unclosed start tag at byte offset 1",
    "<b>a</b": "unclosed end tag at byte offset 4",
    "<a href=>a</a>": None,
    '<a href="x>a</a>': "unclosed start tag at byte offset 0",
    "<a href=a/b>a</a>": "unexpected end of name token at byte offset 8",
    '<a ="x">a</a>': 'empty attribute name in the tag "a" at byte offset 0',
    "<span>a</span>": 'tag "span" must have class "tg-spoiler" at byte offset 0',
    "&#xd800;": "text contains invalid unicode characters after decoding",
}  # fmt: skip


@pytest.mark.parametrize("source", WRONG)
def test_wrong_html(api, server, source):
    server.chat(ANN)
    if WRONG[source] is None:
        assert api.send_message(ANN, source, parse_mode="HTML").text == "a"
        return
    with pytest.raises(error.BadRequest) as caught:
        api.send_message(ANN, source, parse_mode="HTML")
    assert caught.value.message.lower().startswith("can't parse entities: " + WRONG[source])
    assert server.sent(ANN) == []


LIMITS = {
    "": "message text is empty",
    "  \n ": "text must be non-empty",
    "\u200b\u2800": "text must be non-empty",
    "<b></b>": "text must be non-empty",
    "x" * 4097: "message is too long",
    "𝄞" * 2049: "MESSAGE_TOO_LONG",
    "<b>" * 3000 + "x" + "</b>" * 3000: None,
    "<b>" * 5000 + "x" + "</b>" * 5000: "text is too long",
    "&lt;" * 4096: None,
    "𝄞" * 2048: None,
}


@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_length(api, server, number):
    source, wrong = list(LIMITS.items())[number]
    server.chat(ANN)
    if wrong is None:
        assert 1 <= units(api.send_message(ANN, source, parse_mode="HTML").text) <= 4096
        return
    with pytest.raises(error.BadRequest) as caught:
        api.send_message(ANN, source, parse_mode="HTML")
    assert caught.value.message.lower() == wrong.lower()


DROPPED = "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u0333\u033f\u030a"  # by Telegram, as control characters are
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=DROPPED) | st.just("\n"))


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_escaped_text_comes_back_as_itself(text):
    said, entities = settled(*HtmlParser(html.escape(text)).parse())
    assert said == text.strip(" \n")
    assert not {entity["type"] for entity in entities} & {"bold", "code", "text_link"}


WORDS = st.text("a é𝄞<&\"' \n", min_size=1, max_size=5).map(html.escape)
AROUND = ["<b>{}</b>", "<i>{}</i>", "<u>{}</u>", "<s>{}</s>", "<tg-spoiler>{}</tg-spoiler>", "<code>{}</code>",
    "<pre>{}</pre>", '<pre><code class="language-py">{}</code></pre>', '<a href="http://a.b/?c&amp;d">{}</a>',
    "<blockquote>{}</blockquote>", "<blockquote expandable>{}</blockquote>"]  # fmt: skip
MARKUP = st.recursive(
    WORDS,
    lambda inner: st.builds(str.format, st.sampled_from(AROUND), inner) | st.lists(inner, max_size=4).map("".join),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(MARKUP)
def test_the_library_reads_entities_as_we_write_them(source):
    """What it makes HTML of again is the same message."""
    text, entities = settled(*HtmlParser(source).parse())
    whole = {"message_id": 1, "date": 1, "chat": {"id": 1, "type": "private"}, "text": text, "entities": entities}
    message = telegram.Message.de_json(whole, None)
    again = message.text_html.replace('<code class="', '<code class="language-')  # it leaves that out
    assert settled(*HtmlParser(again).parse()) == (text, entities)
    for entity in entities:
        assert entity["offset"] >= 0 and 0 < entity["length"] <= units(text) - entity["offset"]


@settings(max_examples=100, deadline=None)
@given(st.text("<>/=\"'& abcode#x;-é"))
def test_any_html_is_parsed_or_refused(source):
    try:
        settled(*HtmlParser(source).parse())
    except Refused as refused:
        assert str(refused).startswith("Bad Request: can't parse entities: ")


def test_entities_instead_of_html(api, server):
    server.chat(ANN)
    bold = telegram.MessageEntity("bold", 2, 2)
    message = api.send_message(ANN, "𝄞𝄞", entities=[bold])
    assert message.parse_entities() == {bold: "𝄞"}


def test_replies(api, server):
    asked = server.say(ANN, "question")["message_id"]
    answer = api.send_message(ANN, "answer", reply_parameters=telegram.ReplyParameters(asked))
    assert answer.reply_to_message.text == "question"
    with refused("Message to be replied not found"):
        api.send_message(ANN, "answer", reply_to_message_id=999_999)
    gone = telegram.ReplyParameters(999_999, allow_sending_without_reply=True)
    assert api.send_message(ANN, "answer", reply_parameters=gone).reply_to_message is None
    assert [row["reply_to"] for row in server.sent(ANN)] == [asked, None]


def test_threads(api, server):
    server.topic(FORUM, 5)
    options = telegram.LinkPreviewOptions(is_disabled=True)
    message = api.send_message(
        FORUM, "hi", message_thread_id=5, link_preview_options=options, disable_notification=True
    )
    assert (message.message_thread_id, message.link_preview_options) == (5, options)
    for thread in (1, 6):
        with refused("Message thread not found"):
            api.send_message(FORUM, "hi", message_thread_id=thread)
    (row,) = server.sent(FORUM)
    assert (row["thread"], row["silent"], row["preview"]) == (5, True, {"is_disabled": True})


def test_buttons(api, server):
    server.chat(ANN)
    message = api.send_message(ANN, "sure?", reply_markup=KEYS)
    assert message.reply_markup == KEYS
    pressed = server.press(ANN, message.message_id, "y" * 64)
    query = api.get_updates()[0].callback_query
    assert (query.id, query.data, query.message.message_id, query.from_user.id) == (pressed, "y" * 64, message.id, ANN)
    assert api.answer_callback_query(query.id, "thanks", show_alert=True)
    answered = server.callbacks()[pressed]
    assert (answered["text"], answered["alert"]) == ("thanks", True)
    with refused("Query is too old and response timeout expired or query ID is invalid"):
        api.answer_callback_query("1")
    api.delete_message(ANN, message.message_id)
    assert (
        server.press(ANN, message.message_id, "y")
        and not api.get_updates(offset=-1)[0].callback_query.message.is_accessible
    )


@pytest.mark.parametrize(
    ("button", "wrong"),
    [
        ({"text": "a", "callback_data": "é" * 33}, "BUTTON_DATA_INVALID"),
        ({"text": "a"}, "can't parse inline keyboard button: Text buttons are unallowed in the inline keyboard"),
        ({"callback_data": "a"}, "can't parse inline keyboard button: Can't find field \"text\""),
        ("a", "can't parse inline keyboard button: InlineKeyboardButton must be an Object"),
    ],
)
def test_wrong_buttons(server, button, wrong):
    server.chat(ANN)
    body = {"chat_id": ANN, "text": "hi", "reply_markup": {"inline_keyboard": [[button]]}}
    status, answer = raw(server, f"/bot{TOKEN}/sendMessage", json.dumps(body))
    assert (status, answer["description"]) == (400, "Bad Request: " + wrong)


def test_edits(api, server):
    server.chat(ANN)
    message = api.send_message(ANN, "one", reply_markup=KEYS)
    edited = api.edit_message_text("<b>two</b>", ANN, message.message_id, parse_mode="HTML")
    assert (edited.text_html, edited.reply_markup, edited.edit_date is not None) == ("<b>two</b>", None, True)
    assert api.edit_message_reply_markup(ANN, message.message_id, reply_markup=KEYS).reply_markup == KEYS
    same = "^Message is not modified: specified new message content and reply markup are exactly the same as a current "
    with refused(same):
        api.edit_message_text("<b>two</b>", ANN, message.message_id, parse_mode="HTML", reply_markup=KEYS)
    with refused("Message to edit not found"):
        api.edit_message_text("x", ANN, 999_999)
    with refused("Message can't be edited"):
        api.edit_message_text("x", ANN, server.say(ANN, "mine")["message_id"])
    assert api.delete_message(ANN, message.message_id)
    with refused("Message to delete not found"):
        api.delete_message(ANN, message.message_id)
    (row,) = server.sent(ANN)
    assert (row["texts"], row["deleted"], len(row["times"])) == (["one", "two"], True, 4)
    assert row["times"] == sorted(row["times"])


def test_no_such_chat(api, server):
    for name in (ANN, "@nobody", -5):
        with refused("Chat not found"):
            api.send_message(name, "hi")
    server.chat(ANN, username="ann", first_name="Ann")
    chat = api.get_chat(ANN)
    assert (chat.first_name, chat.type, api.send_message("@ann", "hi").chat_id) == ("Ann", "private", ANN)


def test_chat_actions(api, server):
    server.chat(ANN)
    assert api.send_chat_action(ANN, "typing")
    with refused("Wrong parameter action in request"):
        api.send_chat_action(ANN, "dancing")
    assert [row["action"] for row in server.actions(ANN)] == ["typing"]


def test_commands(api, server):
    assert api.get_my_commands() == ()
    api.set_my_commands([("new", "Begin"), ("stop", "End")])
    api.set_my_commands([("neu", "Beginn")], language_code="de", scope=telegram.BotCommandScopeAllGroupChats())
    assert [c.command for c in api.get_my_commands()] == ["new", "stop"]
    assert server.commands() == [{"command": "new", "description": "Begin"}, {"command": "stop", "description": "End"}]
    assert server.commands("all_group_chats", "de") == [{"command": "neu", "description": "Beginn"}]
    for wrong in [("Big", "x")], [("a", "")], [("a" * 33, "x")], [(f"c{i}", "x") for i in range(101)]:
        with pytest.raises(error.BadRequest):
            api.set_my_commands(wrong)


@pytest.mark.parametrize("attach", [False, True])
def test_files_the_bot_sends(api, server, attach):
    server.chat(ANN)
    data = bytes(range(256)) * 100 + b"\r\n--"
    file = telegram.InputFile(data, 'a "b" é.bin', attach=attach)
    sent = api.send_document(ANN, file, caption="<i>c</i>", parse_mode="HTML", reply_markup=KEYS)
    assert (sent.caption_html, sent.document.file_size, sent.document.file_name) == (
        "<i>c</i>",
        len(data),
        'a "b" é.bin',
    )
    photo = api.send_photo(ANN, telegram.InputFile(PNG, attach=attach))
    assert len(photo.photo) == 2
    assert api.run(api.get_file(sent.document).download_as_bytearray()) == data
    assert api.send_document(ANN, sent.document.file_id).document.file_name == 'a "b" é.bin'
    document, picture, again = server.sent(ANN)
    assert (document["file"]["size"], document["text"]) == (len(data), "c")
    assert server.content(again["file"]["id"]) == data
    assert server.content(picture["file"]["id"]) == PNG


def test_wrong_files(api, server):
    server.chat(ANN)
    wrong = {
        "file must be non-empty": lambda: api.send_document(ANN, telegram.InputFile(b"", "a")),
        "IMAGE_PROCESS_FAILED": lambda: api.send_photo(ANN, b"no image"),
        "wrong file identifier/HTTP URL specified": lambda: api.send_document(ANN, "nonsense"),
        "message caption is too long": lambda: api.send_photo(ANN, PNG, caption="x" * 1025),
    }
    for text, call in wrong.items():
        with refused(f"^{text}$"):
            call()
    assert raw(server, f"/bot{TOKEN}/sendDocument?chat_id={ANN}")[1]["description"] == (
        "Bad Request: there is no document in the request"
    )


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("status:500", error.NetworkError, "Internal Server Error"),
        ("429:7", error.RetryAfter, "Retry in 7 seconds"),
        ("401", error.InvalidToken, "Unauthorized"),
        ("html", error.NetworkError, "Bad Gateway"),
        ("drop", error.NetworkError, "RemoteProtocolError|ReadError"),
        ("lost", error.NetworkError, "RemoteProtocolError|ReadError"),
        ("junk", error.TelegramError, "Invalid server response"),
    ],
)
def test_faults(api, server, kind, expected, text):
    server.chat(ANN)
    server.fault("sendMessage", kind, after=1)
    api.send_message(ANN, "one")
    with pytest.raises(expected, match=text):
        api.send_message(ANN, "two")
    api.send_message(ANN, "three")
    done = ["two"] if kind in ("lost", "junk") else []
    assert [row["text"] for row in server.sent(ANN)] == ["one", *done, "three"]
    assert [row["fault"] for row in server.calls("sendMessage")] == [None, kind.partition(":")[0], None]


def test_slow_and_silent(api, server):
    server.chat(ANN)
    server.fault("*", "slow:0.3")
    api.send_message(ANN, "slow")
    row = server.calls("sendMessage")[0]
    assert row["answered"] - row["time"] > 0.25
    server.fault("sendMessage", "silent")
    with pytest.raises(error.TimedOut):
        api.send_message(ANN, "silent", read_timeout=0.1)
    assert len(server.sent(ANN)) == 1
    with pytest.raises(ValueError):
        server.fault("sendMessage", "nonsense")


@pytest.mark.parametrize(("token", "status"), [("1", 404), (TOKEN[:-1] + "x", 401), (TOKEN, 200)])
def test_tokens(server, token, status):
    assert raw(server, f"/bot{token}/getMe")[0] == status
    assert raw(server, f"/bot{TOKEN}/nothing") == (404, {"ok": False, "error_code": 404, "description": "Not Found"})


def test_rates(api, server):
    server.chat(ANN), server.chat(GROUP), server.chat(7)
    server.limit(chat=0.01, burst=3, group=2)
    for _ in range(3):
        api.send_message(ANN, "hi")
    with pytest.raises(error.RetryAfter) as caught:
        api.send_message(ANN, "hi")
    assert 200 <= caught.value.retry_after <= 300
    api.send_message(GROUP, "hi")
    api.send_message(GROUP, "hi")
    with pytest.raises(error.RetryAfter) as caught:
        api.send_message(GROUP, "hi")
    assert 30 <= caught.value.retry_after <= 60
    server.limit(on=False)
    api.send_message(GROUP, "hi")
    assert len(server.sent()) == 6


# ---- without a library ----


def test_forms_of_requests(server):
    server.chat(ANN)
    path = f"/bot{TOKEN}/SENDmessage"
    words = {"chat_id": ANN, "text": "é & ü", "disable_notification": "True"}
    form = urllib.parse.urlencode(words)
    assert raw(server, f"{path}?{form}")[0] == 200
    assert raw(server, path, form, "application/x-www-form-urlencoded")[0] == 200
    assert raw(server, path, json.dumps(words), "application/json; charset=utf-8")[0] == 200
    parts = "".join(f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{words[key]}\r\n' for key in words)
    assert raw(server, path, (parts + "--x--\r\n").encode(), "multipart/form-data; boundary=x")[0] == 200
    assert [(row["text"], row["silent"]) for row in server.sent(ANN)] == [("é & ü", True)] * 4
    assert raw(server, path, "[]")[1]["description"] == "Bad Request: JSON object expected"
    assert (
        raw(server, path, json.dumps(words | {"parse_mode": None}))[1]["description"]
        == "Bad Request: unsupported parse_mode"
    )
    assert raw(server, path, parts.encode(), "multipart/form-data; boundary=x")[0] == 400


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"chat_id": 42, "text": "a\\ud83d"}', "application/json"),
        (b'{"chat_id": 42, "text": "a\xff"}', "application/json"),
        (b"chat_id=42&text=a%ff", "application/x-www-form-urlencoded"),
    ],
)
def test_text_that_is_no_utf_8(server, body, kind):
    server.chat(ANN)
    status, answer = raw(server, f"/bot{TOKEN}/sendMessage", body, kind)
    assert (status, answer["description"]) == (400, "Bad Request: strings must be encoded in UTF-8")
    assert server.sent(ANN) == []


def test_one_connection_many_requests(server):
    """In pieces, and several in one packet."""
    request = f"GET /bot{TOKEN}/getMe HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with socket.create_connection(server.origin.removeprefix("http://").split(":"), timeout=10) as sock:
        for piece in (request[:20], request[20:] + request + request):
            sock.sendall(piece)
        received = b""
        while received.count(b'"ok": true') < 3:
            received += sock.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 3


def test_body_in_chunks(server):
    server.chat(ANN)
    body = (piece for piece in (b'{"chat_id": 42, ', b'"text": "hi"}'))
    assert raw(server, f"/bot{TOKEN}/sendMessage", body)[0] == 200
    assert server.wait(ANN, "hi")


def test_hundreds_of_messages_a_second(server):
    server.chat(ANN)
    connection = http.client.HTTPConnection(server.origin.removeprefix("http://"), timeout=10)
    start = time.monotonic()
    for number in range(200):
        connection.request(
            "POST",
            f"/bot{TOKEN}/sendMessage",
            f'{{"chat_id": 42, "text": "{number}"}}',
            {"Content-Type": "application/json"},
        )
        connection.getresponse().read()
    connection.close()
    assert time.monotonic() - start < 10  # far less, on a machine with nothing else to do
    assert [row["text"] for row in server.sent(ANN)] == [str(number) for number in range(200)]


def test_waiting(api, server):
    server.chat(ANN)
    thread = later(lambda: server.fault("getMe", "drop"))
    api.send_message(ANN, "one two")
    assert [row["text"] for row in server.wait(ANN)] == ["one two"]
    assert server.wait(ANN, "two") and server.wait(None, lambda rows: rows[0]["edits"] == 0)
    assert len(server.wait_calls("sendMessage")) == 1
    thread.join()
    with pytest.raises(TimeoutError, match="one two"):
        server.wait(ANN, 2, timeout=0.1)
