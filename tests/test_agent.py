"""The agent: transcripts that every provider takes, rounds of tools, what fits into the window, what a crash leaves."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fakes import IMAGE_STARTS, ScriptedModels
from hypothesis import given, settings
from hypothesis import strategies as st

import openpista
from openpista import (
    Agent,
    AgentConfig,
    Bench,
    Completion,
    ContextTooLong,
    Decision,
    Gate,
    Image,
    Message,
    ProviderError,
    Redactor,
    Role,
    Store,
    StoreError,
    Toolbox,
    ToolCall,
    ToolResult,
    ToolsConfig,
    Unavailable,
    Usage,
    repair,
)

ROOT = Path(openpista.__file__).parent


def user(text="hi"):
    return Message(Role.USER, text)


def assistant(text="", *ids, **more):
    return Message(Role.ASSISTANT, text, tuple(ToolCall(i, "system.run", {"command": "true"}) for i in ids), **more)


def result(call_id, text="ok"):
    return Message(Role.TOOL, text, call_id=call_id)


# Repair


def faults(messages):
    """What is wrong with a transcript, by the rules of all vendors together; written apart from `repair`."""
    found, owed = [], []
    if messages and messages[0].role is not Role.USER:
        found.append("it does not begin with the person")
    for before, message in zip([None, *messages], messages, strict=False):
        if message.role is Role.TOOL:
            if owed[:1] != [message.call_id]:
                found.append(f"a result that is not due: {message.call_id!r}")
            owed = owed[1:]
            continue
        if owed:
            found.append(f"calls without a result: {owed}")
        owed = [call.id for call in message.tool_calls]
        if message.role is Role.USER and before is not None and before.role is Role.TOOL:
            found.append("the person speaks right after a tool")
        if message.role is Role.ASSISTANT and not message.tool_calls and not message.text.strip():
            found.append("an empty answer")
    return found + [f"calls without a result: {owed}"] * bool(owed)


ids = st.sampled_from(["", "a", "b", "c", "call_0"])
words = st.sampled_from(["", " ", "\n", "hi", "한국어"])
calls = st.lists(ids, max_size=4)
any_message = st.one_of(
    st.builds(user, words),
    st.builds(lambda text, ids: assistant(text, *ids), words, calls),
    st.builds(result, ids, words),
)


@st.composite
def valid_transcripts(draw):
    said = []
    for _ in range(draw(st.integers(0, 4))):
        said.append(user(draw(st.sampled_from(["hi", "again"]))))
        for _ in range(draw(st.integers(0, 3))):
            asked = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
            if said[-1].role is not Role.ASSISTANT:
                said += [assistant(draw(words), *asked), *(result(i, draw(words)) for i in asked)]
        if said[-1].role is Role.TOOL or draw(st.booleans()):
            said.append(assistant("done"))
    return said


@given(st.lists(any_message, max_size=14))
@settings(max_examples=500, deadline=None)
def test_whatever_is_there_is_repaired(messages):
    fixed = repair(messages)
    assert faults(fixed) == []
    assert repair(fixed) == fixed


@given(valid_transcripts())
@settings(max_examples=200, deadline=None)
def test_what_is_valid_stays_as_it_is(messages):
    assert faults(messages) == []
    assert repair(messages) == messages


@given(valid_transcripts(), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_a_crash_at_any_place_loses_nothing_that_was_said(messages, end):
    """What was written before the crash is still there, in order, when the person speaks again."""
    written = messages[:end]
    fixed = repair([*written, user("go on")])
    assert faults(fixed) == []
    left = iter(fixed)
    assert all(message in left for message in written)
    assert fixed[-1] == user("go on")


REPAIRS = [  # what is there -> what is sent
    ([], []),
    ([result("a"), assistant("x"), user()], [user()]),
    ([user(), assistant("", "a"), user()], [user(), assistant("", "a"), "not run", "(interrupted)", user()]),
    (
        [user(), assistant("", "a", "b"), result("b", "B"), result("a", "A")],
        [user(), assistant("", "a", "b"), result("a", "A"), result("b", "B")],
    ),
    ([user(), assistant("", "a"), result("a", "1"), result("a", "2")], [user(), assistant("", "a"), result("a", "1")]),
    ([user(), result("z"), assistant("hi")], [user(), assistant("hi")]),
    ([user(), assistant(" \n"), assistant("hi")], [user(), assistant("hi")]),
    (
        [user(), assistant("", "a"), user("b"), result("a")],
        [user(), assistant("", "a"), "not run", "(inter", user("b")],
    ),
    (
        [user(), assistant("", "a", "a"), result("a", "1"), result("a", "2")],
        [user(), assistant("", "a", "a"), result("a", "1"), result("a", "2")],
    ),
]


@pytest.mark.parametrize(("messages", "expected"), REPAIRS)
def test_repair(messages, expected):
    fixed = repair(messages)
    assert len(fixed) == len(expected)
    for message, wanted in zip(fixed, expected, strict=True):
        assert message.text.startswith(wanted) if isinstance(wanted, str) else message == wanted


# A turn


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "memory.db") as store:
        yield store


@pytest.fixture
def session(store):
    return store.session("main")


class Desk:
    """An agent with a scripted model and everything else real."""

    def __init__(self, store, session, folder):
        self.store, self.session, self.folder = store, session, folder
        self.bytes_per_token, self.told = 3.2, []

    def turn(self, answers, text="do it", **more):
        return asyncio.run(self.start(answers, text, **more))

    async def start(
        self, answers, text="do it", *, gate=None, window=128_000, system="Be brief.", images=(), **settings
    ):
        self.models = ScriptedModels(answers, window=window)
        bench = Bench(
            ToolsConfig(workdir=str(self.folder)), {"PATH": "/usr/bin:/bin"}, self.folder, Redactor(["canary-1"])
        )
        self.agent = Agent(
            lambda *_: self.models, Toolbox(bench), self.store, settings=AgentConfig(**settings), system=system
        )
        self.agent.bytes_per_token = self.bytes_per_token
        session = self.store.session(self.session.name)
        reply = await self.agent.turn(session, text, gate or Gate("never", None), self.told.append, images=images)
        for request in self.models.requests:
            assert faults(list(request.messages)) == []
        return reply

    @property
    def stored(self):
        return [entry.message for entry in self.store.transcript(self.session)]

    def sent(self, number=-1):
        return list(self.models.requests[number].messages)


@pytest.fixture
def desk(store, session, tmp_path):
    return Desk(store, session, tmp_path)


def said(text, *, cut=False, usage=Usage(10, 0, 5), echo=None):  # noqa: B008 - frozen
    return Completion(Message(Role.ASSISTANT, text, echo=echo), usage, "fake/model", cut)


def asks(*commands, name="system.run", text="", prefix="c", usage=Usage(10, 0, 5), problem=""):  # noqa: B008 - frozen
    """An answer that wants these commands run; a dict stands for other arguments."""
    calls = tuple(
        ToolCall(f"{prefix}{i}", name, command if isinstance(command, dict) else {"command": command}, problem)
        for i, command in enumerate(commands)
    )
    return Completion(Message(Role.ASSISTANT, text, calls), usage, "fake/model")


def test_no_words_of_the_model_are_stored_with_a_secret(desk):
    echo = {"model": "m", "items": [{"type": "message", "content": "canary-1"}]}
    desk.turn([asks("true", text="it is canary-1"), said("canary-1 it is", echo=echo)])
    assert [message.text for message in desk.stored if message.role is Role.ASSISTANT] == [
        "it is [secret]",
        "[secret] it is",
    ]
    assert "canary-1" not in "".join(map(str, desk.store.db.execute("SELECT text, echo FROM messages").fetchall()))


def test_words_are_the_answer(desk, session):
    reply = desk.turn([said("hello", usage=Usage(100, 40, 7, 0.5))])
    assert reply == openpista.Reply("hello", "main", "fake/model", Usage(100, 40, 7, 0.5))
    assert desk.stored == [user("do it"), assistant("hello")]
    assert desk.store.usage(session) == Usage(100, 40, 7, 0.5)


def test_a_call_and_its_result(desk):
    reply = desk.turn([asks("echo one; echo canary-1", text="I look."), said("it says one")])
    call = asks("echo one; echo canary-1").message.tool_calls[0]
    assert reply.tool_calls == ((call, ToolResult("c0", "one\n[secret]")),)
    assert reply.usage == Usage(20, 0, 10)
    assert desk.sent() == desk.stored[:-1]
    assert [message.role for message in desk.stored] == ["user", "assistant", "tool", "assistant"]
    assert [progress.kind for progress in desk.told] == ["thinking", "tool_started", "tool_finished", "thinking"]
    assert desk.store.db.execute("SELECT state FROM tool_calls").fetchall() == [("finished",)]
    assert desk.store.db.execute("SELECT count(*) FROM usage").fetchone() == (2,)
    assert desk.store.lease_holder(desk.session) == ""


def test_calls_of_one_answer_run_side_by_side(desk, tmp_path):
    """Each waits for the other: one after the other they would never end."""
    meet = "touch {0}; until test -e {1}; do sleep 0.01; done; echo met"
    reply = desk.turn([asks(meet.format("a", "b"), meet.format("b", "a")), said("done")])
    assert [result.output for _, result in reply.tool_calls] == ["met", "met"]


def test_results_are_in_the_order_of_the_calls(desk):
    desk.turn([asks("sleep 0.1; echo slow", "echo quick"), said("done")])
    assert [message.text for message in desk.sent()[-2:]] == ["slow", "quick"]


GO_BACK = [  # an answer of the model -> what it hears
    (asks("x", name="system.rum"), "there is no tool 'system.rum', did you mean 'system.run'?"),
    (asks({}, problem="the arguments are not valid JSON: oh"), "the arguments are not valid JSON: oh. The parameters"),
    (asks({"comand": "ls"}), "arguments: 'command' is missing. The parameters of system.run are {"),
    (asks("echo no; exit 3"), "no\n[exit code 3]"),
    (asks({"command": "ls", "workdir": "/no/such"}), "no folder /no/such"),
    (asks({"command": "echo \ud800"}), "command must be text that UTF-8 can hold"),
    (asks({"command": "echo ok", "workdir": "\ud800"}), "workdir must be text that UTF-8 can hold"),
    (asks("\ud800", name="\ud800"), "there is no tool"),
    (asks({"\ud800": "x", "command": "ls"}), "arguments: unknown"),
    (asks("echo canary-1", name="canary-1"), "there is no tool '[secret]'"),
]


@pytest.mark.parametrize(("answer", "words"), GO_BACK)
def test_errors_go_back_to_the_model(desk, answer, words):
    assert desk.turn([answer, said("I see")]).text == "I see"
    assert desk.sent()[-1].text.startswith(words)
    assert desk.sent()[-1].is_error


def test_a_command_that_is_denied(desk):
    async def approve(call, danger):
        return Decision.DENY

    reply = desk.turn([asks("rm -rf x", "echo fine"), said("as you wish")], gate=Gate("risky", approve))
    assert [result.is_error for _, result in sorted(reply.tool_calls, key=lambda done: done[0].id)] == [True, False]
    states = dict(desk.store.db.execute("SELECT call_id, started_at IS NULL FROM tool_calls").fetchall())
    assert states == {"c0": 1, "c1": 0}, "what is denied never started"


def test_rounds_end_with_one_last_answer(desk):
    answers = [asks(f"echo {i}", prefix=f"r{i}-") for i in range(3)]
    reply = desk.turn([*answers, said("so far so good")], max_tool_rounds=3)
    assert reply.text == (
        "so far so good\n\n(Stopped after 3 rounds of tools, the most that [agent] max_tool_rounds allows.)"
    )
    assert [request.may_call for request in desk.models.requests] == [True, True, True, False]
    assert all(
        request.tools == desk.agent.crew.personas["default"].toolbox.specs for request in desk.models.requests
    ), "the prefix stays"
    assert "No more tools" in desk.models.requests[-1].note
    assert desk.stored[-1].text == reply.text
    assert "No more tools" not in "".join(message.text for message in desk.stored)


@pytest.mark.parametrize("last", [asks("echo more", prefix="z"), asks("x", text="words", prefix="z"), said("")])
def test_the_last_answer_is_words_whatever_comes(desk, last):
    reply = desk.turn([asks("echo 1"), last], max_tool_rounds=1)
    assert "(Stopped after 1 round of tools" in reply.text
    assert len(reply.tool_calls) == 1
    assert desk.stored[-1].tool_calls == ()


def test_no_limit_given_means_ten(desk):
    desk.turn([*[asks(f"echo {i}", prefix=f"r{i}-") for i in range(10)], said("end")], max_tool_rounds=0)
    assert len(desk.models.requests) == 11


def test_equal_calls_with_equal_results(desk):
    reply = desk.turn([*[asks("echo same", prefix=f"r{i}-") for i in range(5)], said("I give up")])
    results = [message.text for message in desk.stored if message.role is Role.TOOL]
    assert results[:2] == ["same", "same"]
    assert all("same result" in text and text.startswith("same\n") for text in results[2:])
    assert "3 times" in results[2]
    assert reply.text.startswith("I give up\n\n(Stopped after the same call gave the same result five times")
    assert desk.models.requests[-1].may_call is False
    assert len(desk.models.requests) == 6


def test_equal_calls_with_other_results_go_on(desk):
    command = "echo x >>count; wc -l <count"
    reply = desk.turn([*[asks(command, prefix=f"r{i}-") for i in range(7)], said("seven")])
    assert reply.text == "seven"


def test_an_empty_answer_is_asked_for_once_more(desk):
    assert desk.turn([said(" \n"), said("here")]).text == "here"
    assert "You said nothing" in desk.models.requests[-1].note
    assert desk.stored == [user("do it"), assistant("here")]
    with pytest.raises(ProviderError, match="nothing, twice"):
        desk.turn([said(""), said("")])
    assert desk.turn([said("well")]).text == "well"


def test_an_answer_that_was_cut_says_so(desk):
    reply = desk.turn([said("once upon a", cut=True)])
    assert reply.text.startswith("once upon a\n\n(Cut off")
    assert desk.stored[-1].text == reply.text


def test_a_provider_that_fails(desk):
    with pytest.raises(Unavailable):
        desk.turn([asks("echo 1"), Unavailable("overloaded")])
    assert desk.store.lease_holder(desk.session) == ""
    assert desk.turn([said("back again")], "and now?").text == "back again"
    assert [message.role for message in desk.sent()] == ["user", "assistant", "tool", "assistant", "user"]


def test_odd_words_of_the_person(desk):
    for text in ("half \udcff", "a\0b", "\ud800" * 3, "👍", " "):
        assert desk.turn([said("ok")], text).text == "ok"
    assert desk.turn([said("half \ud800")]).text.startswith("half ")


# What fits into the window


def long_history(desk, turns, *, size=2_000, tool=True):
    """A session of so many turns with long results, stored as they would be."""
    with desk.store.atomic():
        for i in range(turns):
            desk.store.append(desk.session, user(f"question {i}"))
            if tool:
                place = desk.store.append(desk.session, assistant("", f"h{i}"))
                desk.store.finish_call(desk.session, place, ToolResult(f"h{i}", f"{i} " + "x" * size))
            desk.store.append(desk.session, assistant(f"answer {i}" if tool else f"answer {i} " + "y" * size))


def size_of(request):
    return openpista.weight(request.messages)


def test_an_overflow_is_answered_with_one_smaller_request(desk):
    long_history(desk, 20)
    assert desk.turn([ContextTooLong("too long"), said("short enough")], window=20_000).text == "short enough"
    first, second = desk.models.requests
    assert size_of(second) < size_of(first)
    with pytest.raises(ContextTooLong, match="still too long"):  # one compaction, one retry
        desk.turn([ContextTooLong("too long"), said("a summary"), ContextTooLong("still too long")], window=20_000)
    assert len(desk.models.requests) == 3


def test_an_overflow_of_a_window_that_is_smaller_than_it_says(desk):
    """The server refuses what should fit; the next request must be smaller although our own sum is content."""
    long_history(desk, 20)

    def answer(request):
        return said("ok") if size_of(request) <= 27_000 else ContextTooLong("too long")

    assert desk.turn(answer, window=22_000).text == "ok"


def test_old_results_are_elided_first_and_the_mark_stays(desk):
    long_history(desk, 12, size=3_000)
    desk.turn([said("one")], "first", window=12_000)
    assert len(desk.models.requests) == 1, "no summary was needed"
    elided = [message for message in desk.sent() if message.text.startswith("(3,0")]
    assert elided
    assert len(desk.sent()) == 12 * 4 + 1
    mark = desk.store.session("main").elided_upto
    assert mark
    before = desk.sent()
    for number in range(3):
        desk.turn([said("more")], f"next {number}", window=12_000)
        assert desk.store.session("main").elided_upto == mark
        assert desk.sent()[: len(before)] == before, "a provider's cache would miss"
        before = desk.sent()
    assert desk.stored[2].text.startswith("0 xxx"), "the database keeps the whole"


def test_then_old_turns_are_summarised_at_most_once_a_turn(desk):
    long_history(desk, 30, tool=False)
    summaries = []

    def answer(request):
        if request.system == openpista.SUMMARY_PROMPT:
            summaries.append(request)
            return said("We counted to thirty.")
        return asks(f"echo {len(summaries)}; head -c 9000 /dev/urandom | base64", prefix=f"n{time.monotonic_ns()}-")

    desk.turn(answer, window=16_000, max_tool_rounds=6)
    assert len(summaries) == 1
    assert "We counted to thirty." in desk.sent()[0].text
    assert "do it" in [message.text for message in desk.sent()]
    assert desk.store.summary(desk.session)[1] == "We counted to thirty."
    assert desk.store.usage(desk.session).input == 10 * len(desk.models.requests), "the summary's usage counts too"
    assert len(desk.stored) > 60, "nothing is deleted"


@pytest.mark.parametrize("answer", [Unavailable("no"), ContextTooLong("no"), said(""), said(" \n"), asks("ls")])
def test_a_summary_that_fails_leaves_old_turns_out_for_now(desk, answer):
    long_history(desk, 30, tool=False)
    assert desk.turn([answer, said("still here")], "the newest", window=16_000).text == "still here"
    assert desk.sent()[-1].text == "the newest"
    assert desk.store.summary(desk.session) == (0, ""), "a summary of nothing would lose the past for good"


def test_a_summary_that_is_too_long_does_not_block_the_session(desk):
    long_history(desk, 30, tool=False)
    assert desk.turn([said("z" * 200_000), said("fine")], window=16_000).text == "fine"
    assert desk.turn([said("fine"), said("fine")], window=16_000).text == "fine"


def test_a_summary_is_asked_for_within_the_window_in_any_script(desk):
    """A Korean letter has three bytes: as many letters as bytes fit would be three times too much."""
    long_history(desk, 200, size=1_000, tool=False)
    desk.store.db.execute("UPDATE messages SET text = replace(text, 'y', '가')")
    desk.turn([said("a summary"), said("fine")], window=60_000)
    assert 20_000 < size_of(desk.models.requests[0]) < 60_000 * 3.2


def test_a_second_summary_is_made_of_the_whole_first_one(desk):
    long_history(desk, 30, tool=False)
    first = "a" * 1_200 + " the middle " + "b" * 1_200
    desk.turn([said(first), said("fine")], window=20_000)
    long_history(desk, 30, tool=False)
    desk.turn([said("second"), said("fine")], window=20_000)
    assert " the middle " in desk.models.requests[0].messages[0].text


@pytest.mark.parametrize("size", [{"context_tokens": 200}, {"system": "x" * 600_000}])
def test_a_window_in_which_nothing_fits_costs_no_summary(desk, size):
    long_history(desk, 30, tool=False)
    with pytest.raises(ContextTooLong, match=r"about \d[\d,]+ tokens with \[agent\] prompt") as caught:
        desk.turn([], **size)
    tokens = int(str(caught.value).split("about ")[1].split(" ")[0].replace(",", ""))
    assert tokens > (50_000 if "system" in size else 200), "what fills the window is counted"
    assert desk.store.summary(desk.session) == (0, "")
    assert desk.store.session("main").elided_upto == 0


def test_many_small_turns_without_a_summary_are_cut_quickly(desk):
    """Counted in looks at messages, not in seconds: leaving out old turns must not weigh all again for each."""
    with desk.store.atomic():
        for i in range(1_500):
            desk.store.append(desk.session, user(f"{i}"))
            desk.store.append(desk.session, assistant(f"answer {i}"))
    looks = 0

    def count(frame, event, argument):
        nonlocal looks
        looks += event == "call" and frame.f_code.co_name == "to_json"

    sys.setprofile(count)
    try:
        desk.turn([Unavailable("no summary"), said("ok")], window=8_000)
    finally:
        sys.setprofile(None)
    assert looks < 100_000


def test_a_giant_turn(desk):
    """One turn whose results are many times the window: the question stays, old results go."""
    rounds = [asks(f"echo {i}; head -c 9000 /dev/zero | tr '\\0' x", prefix=f"r{i}-") for i in range(40)]
    reply = desk.turn([*rounds, said("done")], "the one question", window=20_000, max_tool_rounds=50)
    assert reply.text == "done"
    assert all("the one question" in [m.text for m in request.messages] for request in desk.models.requests)
    assert all(size_of(request) < 20_000 * 3.2 for request in desk.models.requests)


def test_results_of_one_answer_that_are_more_than_the_window(desk):
    """Six results of 10,000 characters do not fit into 8,000 tokens: the model hears of it, the turn goes on."""
    many = asks(*[f"echo {i}; head -c 20000 /dev/zero | tr '\\0' x" for i in range(6)])
    assert desk.turn([many, said("too much, but done")], window=8_000).text == "too much, but done"


def test_a_request_that_is_too_long_is_a_clear_error(desk):
    with pytest.raises(ContextTooLong) as caught:
        desk.turn([], "x" * 1_000_000, window=32_000)
    assert "does not fit into the window of fake/model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert desk.models.requests == []
    assert desk.turn([said("summary"), said("ok")], "a short one", window=32_000).text == "ok"


def test_a_call_with_arguments_of_1_mb(desk):
    reply = desk.turn([asks(": " + "x" * 1_000_000 + "\necho ran"), said("ok")], window=1_000_000)
    assert reply.tool_calls[0][1].output == "ran"


def test_the_real_count_of_tokens_is_learnt(desk):
    desk.turn([said("ok", usage=Usage(5_000))], "x" * 10_000)
    assert desk.agent.bytes_per_token == pytest.approx(2.3, abs=0.3)


# Pictures


@pytest.fixture
def picture(tmp_path):
    """Makes a picture: picture("a.png") -> Image without its bytes, as a channel gives it."""

    def make(name="a.png", size=100):
        (tmp_path / name).write_bytes(IMAGE_STARTS["png"].ljust(size, b"."))
        return Image(str(tmp_path / name), "image/png")

    return make


def looks(desk):
    """The words and pictures of the person's messages in each request."""
    return [
        [(m.text, [Path(image.path).name for image in m.images]) for m in request.messages if m.role is Role.USER]
        for request in desk.models.requests
    ]


def test_a_picture_is_loaded_for_each_request_and_stored_as_a_path(desk, picture):
    shown = picture()
    desk.turn([asks("true"), said("a cat")], "look", images=[shown])
    assert desk.stored[0] == user("look")._replace(images=(shown,))
    assert looks(desk) == [[("look", ["a.png"])]] * 2
    assert desk.sent()[0].images[0].data == Path(shown.path).read_bytes()
    desk.turn([said("still a cat")], "again", images=[picture("b.png")])
    assert looks(desk) == [[("look", ["a.png"]), ("again", ["b.png"])]]


GONE = {  # what became of the file
    "deleted": Path.unlink,
    "too large": lambda path: path.write_bytes(bytes(5_000_001)),
    "no picture": lambda path: path.write_text("text"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE)
def test_a_picture_that_is_gone_is_said_to_be(desk, picture, change):
    shown = [picture(), picture("b.png")]
    change(Path(shown[0].path))
    desk.turn([said("where?")], "look", images=shown)
    assert looks(desk) == [[(f"look\n(the picture {shown[0].path} is gone)", ["b.png"])]]
    assert desk.stored[0].text == "look"


def test_a_picture_is_what_it_begins_with(desk, picture):
    shown = picture("a.jpg")._replace(media_type="image/jpeg")
    desk.turn([said("a cat")], images=[shown])
    assert desk.sent()[0].images[0].media_type == "image/png"


def test_a_picture_weighs_as_much_as_it_costs(picture):
    shown = picture(size=3_000_000)
    loaded = openpista.load_image(shown.path)
    plain = openpista.weight([user("look")])
    for image in (shown, loaded):
        assert openpista.weight([user("look")._replace(images=(image,) * 2)]) == plain + 2 * openpista.IMAGE_WEIGHT


def test_a_request_has_no_more_pictures_than_vendors_take(desk, picture):
    small, large = picture("small.png"), picture("large.png", 4_900_000)
    desk.turn([said("a crowd")], images=[small] * 25)
    [(words, names)] = looks(desk)[0]
    assert len(names) == 20 and words.count("no longer shown") == 5
    desk.turn([said("more")], images=[large] * 3)
    older, newer = looks(desk)[0]
    assert (len(older[1]), len(newer[1])) == (0, 3), "the newest first"


def test_old_pictures_are_elided_and_the_mark_stays(desk, picture):
    for number in range(4):
        desk.turn([said("seen")], f"look {number}", images=[picture(f"{number}.png"), picture("b.png")])
    desk.turn([said("one")], "first", window=18_000)
    words, names = looks(desk)[0][0]
    assert len(desk.models.requests) == 1 and names == [] and words.startswith("look 0\n(the picture ")
    assert any(names for _, names in looks(desk)[0]), "not all of them"
    before = desk.sent()
    desk.turn([said("two")], "next", window=18_000)
    assert desk.sent()[: len(before)] == before, "a provider's cache would miss"
    assert len(desk.stored[0].images) == 2, "the database keeps them"


def test_the_picture_that_is_worked_on_stays_in_sight(desk, picture):
    rounds = [asks(f"echo {i}; head -c 6000 /dev/zero | tr '\\0' x", prefix=f"r{i}-") for i in range(8)]
    desk.turn([*rounds, said("done")], "build this", window=16_000, images=[picture()])
    assert desk.store.session("main").elided_upto > 1
    assert looks(desk) == [[("build this", ["a.png"])]] * 9


def test_a_summary_is_made_of_the_paths_of_pictures(desk, picture):
    shown = picture()
    for number in range(6):
        desk.turn([said("y" * 6_000)], f"look {number}", images=[shown])
    desk.turn([said("a summary"), said("fine")], "and now?", window=12_000)
    [asked] = desk.models.requests[0].messages
    assert desk.models.requests[0].system == openpista.SUMMARY_PROMPT and asked.images == ()
    assert f"picture {shown.path}" in asked.text


def test_a_turn_that_goes_on_after_another_has_its_picture(desk, picture, session):
    shown = picture()
    asked = desk.store.append(session, user("look")._replace(images=(shown,)))
    desk.turn([said("hello")], "meanwhile")
    desk.models.answers = [said("a cat")]
    asyncio.run(desk.agent.resume(session, asked, Gate("never", None), desk.told.append))
    assert looks(desk)[-1][-1] == (f"{openpista.AGAIN}\nlook", ["a.png"])


# Crashes, and stopping

CRASH = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from fakes import ScriptedModels
from openpista import *
folder = Path(sys.argv[1])
calls = tuple(ToolCall(f"c{i}", "system.run", {"command": command}) for i, command in enumerate((
    "echo x >>first", "echo x >>second; sleep 0.3; kill -9 " + str(os.getpid()) + "; sleep 5")))
models = ScriptedModels([Completion(Message(Role.ASSISTANT, "", calls), Usage(), "fake/model")])
with Store(folder / "memory.db") as store:
    bench = Bench(ToolsConfig(workdir=str(folder)), os.environ, folder, Redactor())
    agent = Agent(lambda *_: models, Toolbox(bench), store, settings=AgentConfig(), system="")
    asyncio.run(agent.turn(store.session("main"), "do it", Gate("never", None), lambda progress: None))
"""


def test_a_killed_turn_goes_on_and_repeats_nothing(desk, tmp_path):
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    reply = desk.turn([said("I see")], "what happened?")
    assert reply.text == "I see"
    texts = [message.text for message in desk.sent()]
    assert texts[0] == "do it"
    assert texts[2] == "(no output)"
    assert texts[3].startswith("interrupted by a restart; its outcome is unknown")
    assert texts[-1] == "what happened?"
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text() == "x\n"
    states = desk.store.db.execute("SELECT state FROM tool_calls").fetchall()
    assert states == [("finished",), ("interrupted",)]
    desk.turn([said("once only")], "and now?")
    assert sum(text.startswith("interrupted by") for text in (m.text for m in desk.sent())) == 1


def test_calls_that_never_began_are_told_apart(desk):
    place = desk.store.append(desk.session, user("do it"))
    place = desk.store.append(desk.session, assistant("", "c0", "c1"))
    desk.store.start_call(place, ToolCall("c0", "system.run", {}))
    desk.turn([said("ok")])
    assert [m.text for m in desk.stored if m.role is Role.TOOL] == [openpista.UNKNOWN, openpista.NOT_BEGUN]
    assert all(m.is_error for m in desk.stored if m.role is Role.TOOL)


@pytest.mark.parametrize("where", ["tool", "question", "model"])
def test_stopping(desk, tmp_path, where):
    async def approve(call, danger):
        (tmp_path / "begun").touch()
        await asyncio.sleep(1000)

    async def think(request):
        (tmp_path / "begun").touch()
        await asyncio.sleep(1000)

    async def stopped():
        gate = Gate("always", approve) if where == "question" else None
        answers = [think] if where == "model" else [asks("touch begun; sleep 1000", "exit 7")]
        turn = asyncio.create_task(desk.start(answers, gate=gate))
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn

    asyncio.run(stopped())
    assert faults(repair(desk.stored)) == []
    assert desk.store.lease_holder(desk.session) == ""
    results = {m.call_id: m.text for m in desk.stored if m.role is Role.TOOL}
    expected = {
        "tool": {"c0": openpista.STOPPED, "c1": "[exit code 7]"},
        "question": {"c0": openpista.NOT_BEGUN, "c1": openpista.NOT_BEGUN},
        "model": {},
    }
    assert results == expected[where]
    assert desk.store.open_calls(desk.session) == []
    assert desk.turn([said("on we go")], "and now?").text == "on we go"


def fill(store):
    """No page more goes into this database."""
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")


def test_an_answer_that_cannot_be_stored_is_given_all_the_same(desk):
    def full(request):
        fill(desk.store)
        return said("precious " * 10_000)

    reply = desk.turn([full])
    assert reply.text == "precious " * 10_000
    assert "could not be stored" in reply.problem
    assert "full" in reply.problem
    desk.store.db.execute("PRAGMA max_page_count = 1000000")
    assert desk.turn([said("ok")]).problem == ""


def test_a_full_disk_in_the_middle_runs_nothing_twice(desk, tmp_path):
    def full(request):
        fill(desk.store)
        return asks("echo x >>count; head -c 200000 /dev/zero | tr '\\0' x")

    with pytest.raises(StoreError, match="full"):
        desk.turn([full], max_tool_rounds=2)
    desk.store.db.execute("PRAGMA max_page_count = 1000000")
    assert desk.turn([said("ok")], "go on").text == "ok"
    assert not (tmp_path / "count").exists() or (tmp_path / "count").read_text() == "x\n"


def test_one_fault_ends_the_other_calls_too(desk, tmp_path):
    """Something of ours breaks in one of two calls: the other one does not run on without its turn."""

    def tell(progress):
        if progress.kind == "tool_finished":
            raise ZeroDivisionError

    desk.told = type("Teller", (), {"append": staticmethod(tell)})()
    with pytest.raises(ZeroDivisionError):
        desk.turn([asks("true", "sleep 0.3; touch late")])
    time.sleep(0.4)
    assert not (tmp_path / "late").exists()


def test_a_session_that_is_in_use_is_waited_for(desk, tmp_path):
    async def both():
        order = []

        def slow(request):
            order.append("first asked")
            return asks("sleep 0.5")

        def end(request):
            order.append("first ended")
            return said("one")

        with Store(tmp_path / "memory.db") as other:
            other.owner = "elsewhere:1"
            assert other.take_lease(desk.session)
            turn = asyncio.create_task(desk.start([slow, end]))
            await asyncio.sleep(0.5)
            assert order == []
            assert [p.text for p in desk.told] == ["session main is in use by elsewhere:1; waiting for it"]
            other.drop_lease(desk.session)
            assert (await turn).text == "one"
        return order

    assert asyncio.run(both()) == ["first asked", "first ended"]


def test_a_session_that_another_process_took_over(desk, tmp_path):
    """The machine slept: the turn ends with an error, and its task is not taken for cancelled afterwards."""
    desk.store.LEASE = 0.3

    async def turn():
        def taken(request):
            desk.store.db.execute("UPDATE sessions SET owner = 'elsewhere:1', lease_until = '9999'")
            return asks("sleep 30")

        with pytest.raises(StoreError, match="taken over by elsewhere:1"):
            await desk.start([taken])
        return asyncio.current_task().cancelling()

    assert asyncio.run(turn()) == 0
    assert desk.store.lease_holder(desk.session) == "elsewhere:1"


def test_a_session_that_was_deleted_while_it_was_waited_for(desk, tmp_path):
    async def both():
        with Store(tmp_path / "memory.db") as other:
            other.owner = "elsewhere:1"
            assert other.take_lease(desk.session)
            turn = asyncio.create_task(desk.start([]))
            await asyncio.sleep(0.3)
            other.delete_session("main")
            with pytest.raises(StoreError, match="no session named 'main'"):
                await turn

    asyncio.run(both())


def test_machine_and_prompt(tmp_path):
    where = openpista.describe_machine(tmp_path, {"USER": "mina"})
    assert "as mina in " in where
    assert str(tmp_path) in where
    assert "\n" not in where
    assert "uid" in openpista.describe_machine(tmp_path, {}) or "unknown" in openpista.describe_machine(tmp_path, {})
    assert f"{datetime(2026, 3, 1, tzinfo=UTC):%Y}" in openpista.build_prompt("", (), where, "2026-03-01")


def test_a_last_answer_that_still_calls_can_be_sent_again(desk):
    """Responses gives its items back as they came: a call among them that nobody ran would be refused for ever."""
    items = [
        {"type": "reasoning", "encrypted_content": "e"},
        {"type": "function_call", "call_id": "z0", "name": "system_run", "arguments": "{}"},
    ]
    last = asks("echo more", prefix="z", text="well")
    last = last._replace(message=last.message._replace(echo={"model": "m", "items": items}))
    desk.turn([asks("echo 1"), last], max_tool_rounds=1)
    desk.turn([said("ok")], "and now?")
    sent = openpista.encode_responses(openpista.Request("", tuple(desk.sent()), model="m"))["input"]
    assert [item["call_id"] for item in sent if item.get("type") == "function_call"] == ["c0"]


# Going on after a restart


def resumed(desk, answers, asked, record=None, **settings):
    """The turn whose words are message `asked`, taken up again."""

    async def go():
        desk.models = ScriptedModels(answers)
        main = desk.agent.crew.personas["default"]._replace(settings=AgentConfig(**settings))
        desk.agent.crew = openpista.Crew({"default": main})
        session = desk.store.session("main")
        return await desk.agent.resume(session, asked, Gate("never", None), desk.told.append, record)

    reply = asyncio.run(go())
    for request in desk.models.requests:
        assert faults(list(request.messages)) == []
    return reply


@pytest.fixture
def cut_off(desk):
    """A turn that a kill cut off in its second round; its words are the message of this id."""
    desk.turn([said("hello")], "hi")
    asked = desk.store.append(desk.session, user("do it"))
    place = desk.store.append(desk.session, assistant("", "c0"))
    desk.store.finish_call(desk.session, place, ToolResult("c0", "done"))
    place = desk.store.append(desk.session, assistant("", "c1", "c2"))
    desk.store.start_call(place, ToolCall("c1", "system.run", {}))
    return asked


def test_a_turn_goes_on_from_its_transcript(desk, cut_off):
    written = []
    record = openpista.Record(ended=lambda reply: written.append((reply.text, desk.store.db.in_transaction)))
    assert resumed(desk, [asks("echo more", prefix="n"), said("all done")], cut_off, record).text == "all done"
    assert written == [("all done", True)]
    texts = [message.text for message in desk.stored if message.role is Role.TOOL]
    assert texts == ["done", openpista.UNKNOWN, "(no output)", "more"]
    assert [message.text for message in desk.stored if message.role is Role.USER] == ["hi", "do it"]


def test_an_answer_that_is_there_is_not_asked_for_again(desk):
    desk.turn([asks("echo 1"), said("here")], "do it")
    written = []
    record = openpista.Record(ended=lambda reply: written.append(reply.text))
    assert resumed(desk, [], 1, record).text == "here"
    assert written == ["here"]
    assert len(desk.stored) == 4


def test_rounds_before_a_restart_count(desk, cut_off):
    reply = resumed(desk, [asks("echo 1", prefix="n"), said("enough")], cut_off, max_tool_rounds=3)
    assert "(Stopped after 3 rounds" in reply.text
    asked = desk.store.append(desk.session, user("more"))
    for number in range(3):
        place = desk.store.append(desk.session, assistant("", f"d{number}"))
        desk.store.finish_call(desk.session, place, ToolResult(f"d{number}", str(number)))
    assert "(Stopped after 3 rounds" in resumed(desk, [said("enough")], asked, max_tool_rounds=3).text


def test_a_turn_of_another_process_came_between(desk, cut_off):
    desk.turn([said("quick")], "and this?")
    begun = []
    assert resumed(desk, [said("now")], cut_off, openpista.Record(began=begun.append)).text == "now"
    words = [entry for entry in desk.store.transcript(desk.session) if entry.message.role is Role.USER]
    assert words[-1].message.text == f"{openpista.AGAIN}\ndo it"
    assert begun == [words[-1].id]


def test_what_is_gone_cannot_go_on(desk, cut_off):
    with pytest.raises(StoreError, match="message 999 of session 'main' is gone"):
        resumed(desk, [], 999)


@pytest.mark.parametrize("which", ["began", "ended"])
def test_what_is_written_beside_a_turn_is_one_transaction_with_it(desk, which):
    def fail(*given):
        raise StoreError("no")

    async def go():
        await desk.agent.turn(
            session, "do it", Gate("never", None), desk.told.append, openpista.Record(**{which: fail})
        )

    desk.turn([said("hello")], "hi")
    session, desk.models = desk.store.session("main"), ScriptedModels([said("lost")])
    if which == "began":
        with pytest.raises(StoreError):
            asyncio.run(go())
    else:
        asyncio.run(go())
    assert [message.text for message in desk.stored] == ["hi", "hello", "do it"][: 2 + (which == "ended")]


def test_many_calls_at_once_wait_for_places(desk):
    desk.turn([asks(*["sleep 0.01"] * 40), said("done")])
    steps = [{"tool_started": 1, "tool_finished": -1}.get(progress.kind, 0) for progress in desk.told]
    assert max(itertools.accumulate(steps)) == openpista.Turn.TOOLS < steps.count(1) == 40
