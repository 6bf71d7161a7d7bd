"""Picker and Field: keys in, an outcome and lines out; no terminal."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpista import Choice, Chosen, Field, KeyPress, Line, Picker, Style, cells, folded, padded

PLAIN, COLOURS = Style(False), Style(True)
SGR = re.compile(r"\x1b\[[0-9;]*m")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def keys(words):
    """Names of keys and single characters: "down / c o d e x space paste:two\\nlines enter"."""
    for word in words.split(" ") if words else ():
        name, _, text = word.partition(":")
        if name == "space" or len(word) == 1:
            yield KeyPress("text", " " if name == "space" else word)
        else:
            yield KeyPress(name, text)


def feed(widget, words):
    """The first outcome that the keys bring about, or None."""
    press = widget.edit if isinstance(widget, Line) else widget.press
    return next((outcome for key in keys(words) if (outcome := press(key))), None)


def shown(widget, columns=60, rows=16):
    """The lines as a person reads them."""
    return [line.rstrip() for line in widget.lines(columns, rows, PLAIN)[0]]


MODELS = [
    Choice("gpt", ("openai/gpt-5.1", "400k"), "recommended", "✓"),
    Choice("sonnet", ("anthropic/claude-sonnet-4.5", "200k"), "recommended"),
    Choice("gpt", ("openai/gpt-5.1", "400k"), "all", "✓"),
    Choice("codex", ("openai/gpt-5.1-codex", "400k"), "all"),
    Choice("mini", ("openai/gpt-5.1-codex-mini", "400k"), "all"),
    Choice("sonnet", ("anthropic/claude-sonnet-4.5", "200k"), "all"),
    Choice("solar", ("upstage/solar-프로", "64k"), "all", words="Upstage 솔라"),
]


def browser(**more):
    return Picker("Models", MODELS, heads=("id", "context"), typing=False, actions={"r": "refresh"}, **more)


def logins(**more):
    rows = [("openai", "configured", "✓"), ("anthropic", "in the cloud", ""), ("ollama", "on this machine", "")]
    return Picker("Log in to", [Choice(n, (n,), group, mark) for n, group, mark in rows], typing=True, **more)


# Outcomes

BROWSING = [
    ("enter", Chosen("picked", "gpt")),
    ("down enter", Chosen("picked", "sonnet")),
    ("j j j k ctrl-n ctrl-p enter", Chosen("picked", "gpt")),
    ("up up enter", Chosen("picked", "gpt")),
    ("end enter", Chosen("picked", "solar")),
    ("end down home down enter", Chosen("picked", "sonnet")),
    ("pagedown enter", Chosen("picked", "solar")),
    ("pagedown pageup enter", Chosen("picked", "gpt")),
    ("/ c o d e x enter", Chosen("picked", "codex")),
    ("s m i n i enter", Chosen("picked", "mini")),
    ("/ C O D E X down enter", Chosen("picked", "mini")),
    ("/ m i n i space g p t enter", Chosen("picked", "mini")),  # all words, in any order
    ("/ c o d e x - m i n i ctrl-w c o d e x enter", Chosen("picked", "codex")),
    ("/ z z ctrl-u enter", Chosen("picked", "gpt")),
    ("/ c o d x left e right enter", Chosen("picked", "codex")),
    ("/ paste:codex\nrm enter", Chosen("picked", "codex")),
    ("/ paste:솔라 enter", Chosen("picked", "solar")),
    ("/ paste:솔라 enter", Chosen("picked", "solar")),  # as macOS writes it
    ("/ paste:프로 enter", None),  # words of its own instead of the columns
    ("/ j k enter", None),
    ("/ z enter", None),
    ("/ z backspace enter", Chosen("picked", "gpt")),
    ("/ z escape enter", Chosen("picked", "gpt")),
    ("/ m i n i escape enter", Chosen("picked", "mini")),  # the whole list again, on the same row
    ("/ m i n i escape up enter", Chosen("picked", "codex")),
    ("down / escape enter", Chosen("picked", "sonnet")),
    ("/ escape escape", Chosen("cancelled")),
    ("/ c ctrl-c", Chosen("cancelled")),
    ("/ c ctrl-d", Chosen("cancelled")),
    ("escape", Chosen("cancelled")),
    ("ctrl-c", Chosen("cancelled")),
    ("ctrl-d", Chosen("cancelled")),
    ("down r", Chosen("refresh", "sonnet")),
    ("/ r", None),
    ("x paste:r resize unknown tab left", None),
]


@pytest.mark.parametrize("words, outcome", BROWSING)
def test_browsing(words, outcome):
    picker = browser()
    picker.lines(80, 24, PLAIN)
    assert feed(picker, words) == outcome


TYPING = [
    ("enter", Chosen("picked", "openai")),
    ("o l l enter", Chosen("picked", "ollama")),
    ("j enter", None),  # a letter like any other
    ("/ enter", None),
    ("down enter", Chosen("picked", "anthropic")),
    ("o l down enter", Chosen("picked", "ollama")),
    ("escape", Chosen("cancelled")),
    ("o l escape enter", Chosen("picked", "ollama")),
    ("o escape escape", Chosen("cancelled")),
]


@pytest.mark.parametrize("words, outcome", TYPING)
def test_typing(words, outcome):
    assert feed(logins(), words) == outcome


def test_start():
    assert browser(start="mini").selected.value == "mini"
    assert browser(start="gone").selected.value == "gpt"


def test_nothing_to_choose_from():
    picker = Picker("Sessions", [], typing=True)
    assert feed(picker, "down end enter x backspace enter") is None
    assert "  nothing to choose from" in shown(picker)
    assert "  nothing found for “zz”" in shown(pressed(browser(), "/ z z"))


def pressed(widget, words):
    feed(widget, words)
    return widget


REPLACED = [  # keys before, choices after, the value selected then
    ("end", MODELS[::-1], "solar"),
    ("down down down down", MODELS[3:], "mini"),
    ("end", MODELS[:2], "sonnet"),
    ("down down", MODELS, "gpt"),
    ("/ c o d e x down", MODELS[::-1], "mini"),
    ("/ c o d e x down", MODELS[:4], "codex"),
    ("/ z z", MODELS, None),
    ("j / z z", MODELS[:1], None),
    ("end", [], None),
]


@pytest.mark.parametrize("words, choices, value", REPLACED)
def test_replace_keeps_search_and_selection(words, choices, value):
    picker = pressed(browser(), words)
    search = picker.search.text
    picker.replace(choices, "fresh")
    assert (picker.selected and picker.selected.value, picker.search.text, picker.note) == (value, search, "fresh")


def test_start_counts_when_the_choices_come_later():
    picker = Picker("Models", (), start="mini", note="fetching …")
    picker.replace(MODELS)
    assert (picker.selected.value, picker.note) == ("mini", "")


def test_replace_keeps_the_group():
    picker = pressed(browser(), "down down")
    picker.replace([MODELS[1], *MODELS], "")
    assert (picker.selected.value, picker.selected.group) == ("gpt", "all")


# What is shown

BROWSER = """\
Models  4/7
/ or s to search

    id                           context
recommended
  ✓ openai/gpt-5.1               400k
    anthropic/claude-sonnet-4.5  200k
all
  ✓ openai/gpt-5.1               400k
›   openai/gpt-5.1-codex         400k
    openai/gpt-5.1-codex-mini    400k
    anthropic/claude-sonnet-4.5  200k
    upstage/solar-프로           64k

from the cache of 3 h ago
Enter choose · Esc leave · ↑↓ j/k move …
"""


def test_the_whole_picture():
    picker = pressed(browser(note="from the cache of 3 h ago"), "down down down")
    assert shown(picker, 40, 16) == BROWSER.splitlines()


SMALL = [  # keys, columns, rows, lines
    ("", 1, 1, ["…"]),
    ("end", 26, 1, ["›   upstage/solar-프로  6…"]),
    ("", 12, 3, ["Models  1/7", "› ✓ openai/…", "    anthrop…"]),
    ("/ m i n i", 10, 3, ["/ mini", "›   opena…", ""]),
    ("", 20, 5, ["Models  1/7", "/ or s to search", "recommended", "› ✓ openai/gpt-5.1 …", "    anthropic/claud…"]),
]


@pytest.mark.parametrize("words, columns, rows, lines", SMALL)
def test_a_small_terminal(words, columns, rows, lines):
    assert shown(pressed(browser(), words), columns, rows) == lines


GROUPS = [  # keys, rows, the lines of the list: the heading of what is on top always shows
    ("", 5, ["recommended", "› ✓ openai/gpt-5.1", "    anthropic/claude-sonnet-4.5"]),
    ("down down", 5, ["all", "› ✓ openai/gpt-5.1", "    openai/gpt-5.1-codex"]),
    ("down down down", 5, ["all", "  ✓ openai/gpt-5.1", "›   openai/gpt-5.1-codex"]),
    ("end", 5, ["all", "    anthropic/claude-sonnet-4.5", "›   upstage/solar-프로"]),
    ("end up up", 5, ["all", "›   openai/gpt-5.1-codex-mini", "    anthropic/claude-sonnet-4.5"]),
    ("/ s o n n e t", 6, ["recommended", "›   anthropic/claude-sonnet-4.5"]),
    ("/ m i n i", 8, ["all", "›   openai/gpt-5.1-codex-mini"]),
]


@pytest.mark.parametrize("words, rows, lines", GROUPS)
def test_groups(words, rows, lines):
    picker = Picker("Models", [choice._replace(columns=choice.columns[:1]) for choice in MODELS], typing=False)
    for key in keys(words):
        picker.press(key)
        picker.lines(60, rows, PLAIN)
    assert [line for line in shown(picker, 60, rows)[2:] if line and "Enter" not in line] == lines


def test_a_group_without_a_name_does_not_stand_under_another():
    picker = Picker("x", [Choice(1, ("one",)), Choice(2, ("two",), "named"), Choice(3, ("three",))], typing=True)
    assert shown(picker, 20, 11)[2:8] == ["› one", "named", "  two", "", "  three", ""]


HELP = [
    (browser, "", 80, "Enter choose · Esc leave · ↑↓ j/k move · s search · r refresh · more"),
    (browser, "", 30, "Enter choose · Esc leave · ↑↓…"),
    (browser, "/", 80, "Enter choose · Esc leave search · ↑↓ move · more"),
    (browser, "/ z z", 80, "Esc leave search · ↑↓ move · more"),
    (logins, "", 80, "Enter choose · Esc cancel · ↑↓ move · more"),
    (logins, "o", 80, "Enter choose · Esc clear · ↑↓ move · more"),
]


@pytest.mark.parametrize("make, words, columns, line", HELP)
def test_help_tells_what_the_keys_do_now(make, words, columns, line):
    assert shown(pressed(make(help="more"), words), columns, 16)[-1] == line


SEARCHES = [  # keys, cursor, line
    ("/", (1, 2), "/ type to search"),
    ("/ c o", (1, 4), "/ co"),
    ("/ c o left", (1, 3), "/ co"),
    ("/ c o ctrl-a x", (1, 3), "/ xco"),
    ("/ 한 글", (1, 6), "/ 한글"),
    ("/ paste:abcdefghijklmnopqrstuvwxyz", (1, 19), "/ jklmnopqrstuvwxyz"),
    ("/ paste:abcdefghijklmnopqrstuvwxyz ctrl-a", (1, 2), "/ abcdefghijklmnopq…"),
    ("", None, "/ or s to search"),
]


@pytest.mark.parametrize("words, cursor, line", SEARCHES)
def test_the_line_of_the_search(words, cursor, line):
    lines, where = pressed(browser(), words).lines(20, 10, PLAIN)
    assert (lines[1].rstrip(), where) == (line, cursor)


DETAILED = [Choice(n, (n,), detail=(f"about {n}", "words " * 30)) for n in ("one", "two")]


def test_detail_stands_below_the_list_where_there_is_room():
    picker = pressed(Picker("x", DETAILED, typing=True), "down")
    high = shown(picker, 60, 24)
    assert high.index("  about two") == 24 - 4 - 2 and sum("words" in line for line in high) == 3
    assert not any("about" in line for line in shown(picker, 60, 19))


def test_a_long_second_column_takes_what_the_first_leaves():
    choice = Choice(1, ("openai", "…4f2a from OPENAI_API_KEY"))
    assert "› openai  …4f2a from OPENAI_API_KEY" in shown(Picker("x", [choice], typing=True), 40, 12)
    assert "› openai  …4f2a from OPENA…" in shown(Picker("x", [choice], typing=True), 27, 12)


WIDTHS = [  # columns of the terminal, the head and the row: the id gives way first, then the end of the line is cut
    (70, "  id" + " " * 32 + "context  source", "› vendor/a-model-with-quite-a-name  200k     models.dev"),
    (50, "  id" + " " * 27 + "context  source", "› vendor/a-model-with-quite-…  200k     models.dev"),
    (40, "  id" + " " * 24 + "context  so…", "› vendor/a-model-with-qui…  200k     mo…"),
    (20, "  id" + " " * 15 + "…", "› vendor/a-model-wi…"),
]


@pytest.mark.parametrize("columns, head, row", WIDTHS)
def test_columns(columns, head, row):
    choice = Choice(1, ("vendor/a-model-with-quite-a-name", "200k", "models.dev"))
    lines = shown(Picker("x", [choice], heads=("id", "context", "source"), typing=True), columns, 16)
    assert lines[3:5] == [head, row]


def test_colours():
    lines = pressed(browser(), "down").lines(60, 16, COLOURS)[0]
    assert lines[0].startswith(COLOURS("Models", "bold"))
    assert COLOURS("recommended", "dim") in lines
    assert COLOURS(padded("›   anthropic/claude-sonnet-4.5  200k", 60), "mark") in lines


def test_foreign_text_does_nothing_to_the_terminal():
    evil = "\x1b]0;title\x07a\x1b[2J\nb\u202ec\x9b"
    picker = Picker(evil, [Choice(1, (evil,), evil, detail=(evil,))], heads=(evil,), typing=True, note=evil, help=evil)
    assert {line.strip() for line in shown(picker, 60, 24)} == {
        "a bc",
        "a bc  1/1",
        "/ type to search",
        "› a bc",
        "",
        "Enter choose · Esc cancel · ↑↓ move · a bc",
    }


# Anything at any size

WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "한국어 모델", "👩‍👩‍👧 가족", "\x1b[31mred\x1b[0m", "\x1b]0;t\x07", "a\nb\tc", "é" * 9, "각", "x" * 200]
    ),
)
CHOICES = st.lists(
    st.builds(
        Choice,
        st.integers(0, 9),
        st.lists(WORDS, max_size=4).map(tuple),
        st.sampled_from(["", "recommended", "all", "\x1b[2J그룹"]),
        st.sampled_from(["", "✓", "🔥", "\x1b[1m"]),
        st.lists(WORDS, max_size=2).map(tuple),
    ),
    max_size=30,
)
NAMES = "up down j k / s pageup pagedown home end left right ctrl-a ctrl-w ctrl-u backspace a x r 한"
KEYS = st.lists(
    st.sampled_from([*keys(NAMES + " enter escape resize unknown")])
    | st.builds(KeyPress, st.sampled_from(["text", "paste"]), WORDS),
    max_size=12,
)
SIZES = st.tuples(st.integers(1, 130), st.integers(1, 50))


def check(widget, columns, rows, colours):
    """The lines, which fit and hold no foreign control character."""
    lines, cursor = widget.lines(columns, rows, Style(colours))
    assert len(lines) <= rows
    assert max(map(cells, lines)) <= columns
    assert not any(CONTROLS.search(SGR.sub("", line) if colours else line) for line in lines)
    assert cursor is None or (0 <= cursor[0] < len(lines) and 0 <= cursor[1] < columns)
    return lines


@settings(max_examples=150, deadline=None)
@given(CHOICES, KEYS, SIZES, SIZES, st.booleans(), st.booleans(), CHOICES, WORDS)
def test_lines_of_a_picker_fit(choices, pressed, size, later, typing, colours, others, note):
    picker = Picker(note, choices, heads=("id", note), typing=typing, actions={"r": "refresh"}, note=note)
    for number, key in enumerate(pressed):
        picker.press(key)
        check(picker, *size, colours)
        if number == 6:
            picker.replace(others, note)
            size = later
    words = folded(picker.search.text).split()
    texts = [folded(choice.words or " ".join(choice.columns)) for choice in picker.choices]
    assert list(picker.found) == [n for n, text in enumerate(texts) if all(word in text for word in words)]
    columns, rows = later
    lines = [SGR.sub("", line) for line in check(picker, columns, rows, colours)]
    if picker.selected and columns >= 4:
        (row,) = [number for number, line in enumerate(lines) if line.startswith("› ")]
        lines = [line.strip() for line in lines]
        headings = [line for line in lines[:row] if line in ("recommended", "all", "그룹")]
        assert rows < 12 or not picker.selected.group or columns < 20 or headings[-1] in picker.selected.group
    if not typing or picker.search.text:
        picker.press(KeyPress("escape"))
    assert list(picker.found) == list(range(len(picker.choices)))


@settings(max_examples=100, deadline=None)
@given(WORDS, st.lists(WORDS, max_size=3), KEYS, SIZES, st.booleans(), WORDS)
def test_lines_of_a_field_fit(title, explanation, pressed, size, masked, problem):
    field = Field(title, explanation, masked=masked, value=title, check=lambda text: problem)
    for key in pressed:
        field.press(key)
        lines = check(field, *size, True)
        if masked:
            assert set(SGR.sub("", lines[field.lines(*size, PLAIN)[1][0]])) <= set("› •…")


# Line and Field

EDITS = [  # keys, text, cursor; it moves and cuts as the editor does, whose tests say how
    ("a b c left left x", "axbc", 2),
    ("a space b ctrl-w ctrl-y ctrl-y", "a bb", 4),
    ("a b ctrl-u c ctrl-_ ctrl-_", "ab", 2),
    ("left backspace delete ctrl-w alt-d right ctrl-d ctrl-y ctrl-_", "", 0),
    ("paste:\n\nkey\r\n", "key", 3),
    ("paste:one\ntwo", "one", 3),
    ("paste:tab\there\x1b[31m\x07", "tab here", 8),
    ("f1 tab up enter", "", 0),
]


@pytest.mark.parametrize("words, text, at", EDITS)
def test_line(words, text, at):
    line = Line()
    for key in keys(words):
        line.edit(key)
    assert (line.text, line.at) == (text, at)


def test_a_line_has_a_limit():
    line = Line("x" * 20_000)
    assert len(line.text) == Line.LIMIT and line.edit(KeyPress("text", "y")) and line.text[-1] == "x"
    assert line.view(20) == ("x" * 19, 19) and line.notice == "cut: the input holds 10,000 characters"


FIELD = [  # keys, outcome, text, problem
    ("s k enter", Chosen("picked", "sk"), "sk", ""),
    ("enter", None, "", "A key is needed."),
    ("enter s", None, "s", ""),
    ("enter left", None, "", ""),
    ("enter f5", None, "", "A key is needed."),
    ("paste:sk-abc\n\n enter", Chosen("picked", "sk-abc"), "sk-abc", ""),
    ("s paste:one\ntwo", None, "s", "What was pasted has several lines; one is needed."),
    ("s paste:one\ntwo k enter", Chosen("picked", "sk"), "sk", ""),
    ("a b left ctrl-d enter", Chosen("picked", "a"), "a", ""),
    ("a ctrl-d enter", Chosen("picked", "a"), "a", ""),
    ("ctrl-d", Chosen("cancelled"), "", ""),
    ("a ctrl-c", Chosen("cancelled"), "a", ""),
    ("a escape", Chosen("cancelled"), "a", ""),
]


@pytest.mark.parametrize("words, outcome, text, problem", FIELD)
def test_field(words, outcome, text, problem):
    field = Field("KeyPress", check=lambda text: "" if text else "A key is needed.")
    assert (feed(field, words), field.line.text, field.problem) == (outcome, text, problem)


def test_a_field_as_it_looks():
    field = Field("API key of OpenAI", ["It begins with sk-."], masked=True, check=lambda text: f"“{text}” is no key.")
    feed(field, "s k 한 left enter")
    assert (shown(field, 30, 8), field.lines(30, 8, PLAIN)[1]) == (
        ["API key of OpenAI", "It begins with sk-.", "› •••", "“sk한” is no key.", "", "Enter go on · Esc cancel"],
        (2, 4),
    )
    assert shown(field, 30, 2) == ["› •••", "“sk한” is no key."]
    assert shown(field, 30, 1) == ["› •••"]
    assert shown(Field("URL", value="http://x"), 30, 2) == ["URL", "› http://x"]
