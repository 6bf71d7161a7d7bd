"""The input of several lines, and the look of an answer's lines: keys and texts in, rows out."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpista import ERASES, KILLS, MOVES, Editor, KeyPress, Markdown, Style, cells

SGR = re.compile(r"\x1b\[[0-9;]*m")
COLOURS, PLAIN = Style(True), Style(False)
FAMILY, FLAG, WAVE, E_ACUTE, HAN = "👨\u200d👩\u200d👧", "🇰🇷", "👋🏽", "e\u0301", "\u1112\u1161\u11ab"


def keys(words):
    """'h i alt-enter' as keys; 'hello is typed letter by letter, "hello pasted; _ ⏎ → stand for blanks in these two."""
    for word in words.split():
        body = word[1:].replace("_", " ").replace("⏎", "\n").replace("→", "\t")
        if len(word) == 1:
            yield KeyPress("text", word)
        elif word[0] == "'":
            yield from (KeyPress("text", char) for char in body)
        else:
            yield KeyPress("paste", body) if word[0] == '"' else KeyPress(word)


def press(editor, words):
    """What the last key said."""
    return [editor.press(key) for key in keys(words)][-1]


def plain(editor, columns=40, rows=10):
    lines, cursor = editor.lines(columns, rows, PLAIN)
    return [line.rstrip() for line in lines], cursor


# ---- editing ----

EDITS = [
    ("h i", "hi", (0, 2)),
    ("'ab left x", "axb", (0, 2)),
    ("'ab alt-enter c", "ab\nc", (1, 1)),
    ("a shift-enter b ctrl-j c", "a\nb\nc", (2, 1)),
    (r"a \ enter b", "a\nb", (1, 1)),
    (r"'a\ left enter", "a\\", (0, 1)),  # only at the end of the line; here it is submitted
    ('"a⏎b⏎', "a\nb\n", (2, 0)),
    ("'abc home x end y", "xabcy", (0, 5)),
    ("'abc ctrl-a right ctrl-d", "ac", (0, 1)),
    ("'ab alt-enter 'cd up x", "abx\ncd", (0, 3)),
    ('"long_line⏎ab⏎another up up x', "long lixne\nab\nanother", (0, 8)),
    ("'one_two_three alt-b alt-b x", "one xtwo three", (0, 5)),
    ("'one_two ctrl-a alt-f x", "onex two", (0, 4)),
    ("'one_two-three ctrl-w", "one ", (0, 4)),
    ("'one_two-three alt-backspace", "one two-", (0, 8)),
    ("'one_two ctrl-a alt-d", " two", (0, 0)),
    ("'one_two ctrl-left ctrl-u", "two", (0, 0)),
    ("'one_two ctrl-left ctrl-k", "one ", (0, 4)),
    ("'ab alt-enter c ctrl-a ctrl-u", "abc", (0, 2)),
    ("'ab alt-enter c up ctrl-e ctrl-k", "abc", (0, 2)),
    ("'one_two_three ctrl-w ctrl-w ctrl-y", "one two three", (0, 13)),  # in a row they add up
    ("'one_two ctrl-a alt-d alt-d ctrl-y ctrl-y", "one twoone two", (0, 14)),
    ("'one ctrl-w x ctrl-y", "xone", (0, 4)),
    ("backspace delete ctrl-w ctrl-k ctrl-y ctrl-_ up down left right", "", (0, 0)),
    ("a alt-enter b home backspace", "ab", (0, 1)),
    ("a alt-enter b up end delete", "ab", (0, 1)),
    ("a alt-enter b home left", "a\nb", (0, 1)),
    ("a alt-enter b up end right", "a\nb", (1, 0)),
    (f'"a{E_ACUTE} backspace', "a", (0, 1)),
    (f'"a{FAMILY} backspace', "a", (0, 1)),
    (f'"{FLAG}{FLAG} backspace', FLAG, (0, 2)),
    (f'"{FLAG}{FLAG} home right x', f"{FLAG}x{FLAG}", (0, 3)),
    (f'"{WAVE}b home right x', f"{WAVE}xb", (0, 3)),
    (f'"{HAN}{HAN} left x', f"{HAN}x{HAN}", (0, 4)),
    ("'가나_다라 ctrl-w", "가나 ", (0, 3)),
    ('"\x1b[31mred\x07\u202e', "red", (0, 3)),  # what would colour or move never comes in
    ('"a\ud800b', "a?b", (0, 3)),
]


@pytest.mark.parametrize("words, text, cursor", EDITS)
def test_editing(words, text, cursor):
    editor = Editor()
    press(editor, words)
    before = editor.text[: editor.at]
    assert (editor.text, (before.count("\n"), len(before) - before.rfind("\n") - 1)) == (text, cursor)


ANSWERS = [
    ("enter", ""),
    ("x enter", "submit"),
    ("'_ alt-enter enter", ""),
    (r"x \ enter", ""),
    ("ctrl-c", "interrupt"),
    ("ctrl-d", "leave"),
    ("x ctrl-d", ""),
    ("ctrl-l", "clear-screen"),
    ("ctrl-z", "suspend"),
    ("escape", "ignored"),
    ("pageup", "ignored"),
    ("resize", "ignored"),
    ("unknown", "ignored"),
    ("ctrl-r ctrl-c", ""),  # leaves the search only
]


@pytest.mark.parametrize("words, answer", ANSWERS)
def test_answers(words, answer):
    assert press(Editor(["old"]), words) == answer


UNDOS = [
    ("'hello_world ctrl-_", "hello"),
    ("'hello_world ctrl-_ ctrl-_", ""),
    ("'ab left left x ctrl-_", "ab"),
    ('x "pasted⏎lines ctrl-_', "x"),
    ("'one_two ctrl-u ctrl-_", "one two"),
    ("'ab backspace backspace ctrl-_ ctrl-_ ctrl-_ ctrl-_", ""),
    ("'draft up ctrl-_", "draft"),
]


@pytest.mark.parametrize("words, text", UNDOS)
def test_undo(words, text):
    editor = Editor(["old"])
    press(editor, words)
    assert editor.text == text


# ---- history, search, completion ----

PAST = ["one", "two\nlines", "three"]
RECALLS = [
    ("up", "three"),
    ("up up", "two\nlines"),
    ("up up up up", "one"),  # up inside the two lines first
    ("up up up up up", "one"),
    ("'draft up down", "draft"),
    ("'draft up up down down", "draft"),
    ("down", ""),
    ("a alt-enter b up x up", "three"),
    ("ctrl-p ctrl-p ctrl-n", "three"),
    ("ctrl-r o enter", "two\nlines"),
    ("ctrl-r o ctrl-r enter", "one"),
    ("ctrl-r o ctrl-r ctrl-r right", "one"),
    ("ctrl-r 'TWO enter", "two\nlines"),
    ("ctrl-r 'threex backspace enter", "three"),
    ("'draft ctrl-r o escape", "draft"),
    ("'draft ctrl-r o ctrl-g", "draft"),
    ("'draft ctrl-r 'zebra enter", "draft"),
    ("'draft ctrl-r 'one enter down", "two\nlines"),
    ("ctrl-r 'one ctrl-a x", "xone"),  # any other key takes it and does its work
    ("ctrl-r 'one up up", "one"),
    ('ctrl-r "one⏎two enter', "one"),
    ("ctrl-r 'one resize enter", "one"),
]


@pytest.mark.parametrize("words, text", RECALLS)
def test_history(words, text):
    editor = Editor(PAST)
    press(editor, words)
    assert editor.text == text


def test_taken_texts_are_history_once():
    editor = Editor(PAST)
    for word in ("one", "four", "four"):
        press(editor, f"'{word} enter")
        assert editor.take() == word
        assert not editor.text
    assert editor.history == ["two\nlines", "three", "one", "four"]
    assert press(editor, "up enter") == "submit"
    assert editor.text == "four"
    press(editor, "ctrl-u ctrl-_ ctrl-_ ctrl-_ ctrl-u")
    assert (editor.take(), len(editor.history)) == ("", 4)


def test_the_search_is_shown_in_the_prompt():
    editor = Editor([*PAST, "a" * 200 + " needle \x1b[31mhere\nand there"])
    press(editor, "'draft ctrl-r 'needle")
    lines, cursor = editor.lines(60, 9, PLAIN)
    assert lines == [f"(search) needle: {'a' * 14} needle here and there"]
    assert cursor == (0, 15)
    press(editor, "x")
    assert editor.lines(60, 9, PLAIN)[0] == ["(search) needlex: nothing found"]
    assert Editor().press(KeyPress("ctrl-r")) == ""


def commands(text):
    names = ("/model", "/models", "/new", "가나다", "가나라")
    return [name for name in names if name.startswith(text.split(" ")[-1])]


COMPLETIONS = [
    ("'/n tab", "/new ", []),
    ("'/m tab", "/model", [" /model  /models"]),
    ("'/m tab tab", "/model", ["›/model  /models"]),
    ("'/m tab tab tab", "/models", [" /model ›/models"]),
    ("'/m tab tab tab tab", "/model", ["›/model  /models"]),
    ("'/m tab tab tab x", "/modelsx", []),
    ("'/m tab escape", "/model", []),
    ("'/m tab ctrl-_", "/m", []),
    ("'say_가 tab", "say 가나", [" 가나다  가나라"]),
    ("x tab", "x", []),
    ("a alt-enter '_/n tab", "a\n /n", []),  # the candidates are the owner's: this one looks at the last blank
    ("'/mx left tab", "/modelx", [" /model  /models"]),
]


@pytest.mark.parametrize("words, text, menu", COMPLETIONS)
def test_completion(words, text, menu):
    editor = Editor(complete=lambda text: [] if "\n" in text else commands(text))
    press(editor, words)
    lines, _ = plain(editor)
    assert (editor.text, lines[len(editor.text.split("\n")) :]) == (text, menu)


def test_the_chosen_candidate_is_in_view():
    names = [f"candidate-{n}" for n in range(1_000)]
    editor = Editor(complete=lambda text: names)
    press(editor, "tab " + "tab " * 300)
    row = editor.lines(30, 5, COLOURS)[0][-1]
    assert "›candidate-299" in SGR.sub("", row)
    assert cells(row) <= 29


# ---- painting ----

FRAMES = [
    ("", 20, 5, ["›"], (0, 2)),
    ("'hello", 20, 5, ["› hello"], (0, 7)),
    ('"a⏎b', 20, 5, ["› a", "  b"], (1, 3)),
    ('"가나다', 20, 5, ["› 가나다"], (0, 8)),
    ('"가나다 left', 20, 5, ["› 가나다"], (0, 6)),
    (f'"a{E_ACUTE}{HAN}b left', 20, 5, [f"› a{E_ACUTE}{HAN}b"], (0, 6)),
    ('"1234567', 10, 5, ["› 1234567"], (0, 9)),  # the last column is the cursor's
    ('"12345678', 10, 5, ["› 1234567", "  8"], (1, 3)),
    ('"12345678 left', 10, 5, ["› 1234567", "  8"], (1, 2)),
    ('"가나다라', 10, 5, ["› 가나다", "  라"], (1, 4)),
    ('"→x left', 20, 5, ["›     x"], (0, 6)),
    ('"1⏎2⏎3⏎4⏎5⏎6', 20, 4, ["› … 3 more lines", "  4", "  5", "  6"], (3, 3)),
    ('"1⏎2⏎3⏎4⏎5⏎6 up up up', 20, 4, ["› … 2 more lines", "  3", "  4", "  … 2 more lines"], (1, 3)),
    ('"1⏎2⏎3⏎4⏎5⏎6 up up up up up', 20, 4, ["› 1", "  2", "  3", "  … 3 more lines"], (0, 3)),
    ('"1⏎2⏎3⏎4⏎5⏎6 up up', 20, 2, ["› 4", "  5"], (0, 3)),
    ('"1⏎2⏎3 up', 20, 1, ["› 2"], (0, 3)),
    ('"abc', 4, 3, ["abc"], (0, 3)),
    ('"가', 1, 1, ["…"], (0, 0)),
]


@pytest.mark.parametrize("words, columns, rows, lines, cursor", FRAMES)
def test_painting(words, columns, rows, lines, cursor):
    editor = Editor()
    for key in keys(words):
        editor.press(key)
        plain(editor, columns, rows)  # painted after each key: the window stays where it was
    assert plain(editor, columns, rows) == (lines, cursor)
    assert plain(editor, columns, rows) == (lines, cursor)


def test_a_text_over_the_limit_is_cut_and_says_so():
    editor = Editor()
    editor.press(KeyPress("paste", "x" * (Editor.LIMIT + 5)))
    assert len(editor.text) == Editor.LIMIT
    assert plain(editor, 60, 5)[0][-1] == "cut: the input holds 4,194,304 characters"
    press(editor, "y left")
    assert len(editor.text) == Editor.LIMIT
    press(editor, "ctrl-_ ctrl-_")
    assert not editor.text


def test_a_great_paste_is_not_submitted():
    editor = Editor()
    text = "\n".join(f"line {n} 가나다" for n in range(10_000))
    assert editor.press(KeyPress("paste", text + "\n")) == ""
    assert editor.text == text + "\n"
    lines, _ = plain(editor, 80, 10)
    assert lines[0] == "› … 9,992 more lines"
    assert press(editor, "x enter") == "submit"


@pytest.mark.parametrize("text, width", [("0123456789" * 10_000, 1), ("가나" * 50_000, 2), ("word\n" * 20_000, 0)])
def test_what_is_painted_costs_what_is_seen(text, width):
    editor = Editor()
    editor.text = text
    press(editor, "home " + "right " * 7 if not width else "left " * 7)
    started = time.process_time()
    lines, (row, col) = editor.lines(63, 10, PLAIN)
    assert time.process_time() - started < 0.05
    if width:
        shown = "".join(lines).replace("  ", "")[-7 - (60 // width) :]
        assert text.endswith(shown) and lines[row][2:][: (col - 2) // width] + text[-7:] == lines[row][2:]


LETTERS = st.sampled_from(
    ["a", " ", "\\", "_", "가", "\t", "\u0301", "\u200d", "👩", "🇰", "\u1112", "\u1161", "ﷺ", "\x1b", "\u2028"]
)
PASTES = st.text(st.one_of(LETTERS, st.just("\n"), st.characters()), max_size=120)
OTHERS = "enter alt-enter up down tab ctrl-r ctrl-g escape ctrl-c ctrl-l ctrl-y ctrl-_ f1 resize"
KEY = st.one_of(
    st.sampled_from([KeyPress(name) for name in sorted({*MOVES, *ERASES, *KILLS, *OTHERS.split()})]),
    LETTERS.map(lambda char: KeyPress("text", char)),
    PASTES.map(lambda text: KeyPress("paste", text)),
)
SIZE = st.tuples(st.integers(1, 130), st.integers(1, 50))
WORDS = ["a", "가나다", "가나라", "a b\x1b[31m\nc"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(KEY, SIZE), max_size=30), st.booleans())
def test_whatever_is_pressed_the_frame_holds(pressed, colours):
    editor = Editor(["old", "two\nlines", "\x1b]0;x\x07가"], lambda text: WORDS[len(text) % 3 :])
    for key, (columns, rows) in pressed:
        editor.press(key)
        lines, (row, col) = editor.lines(columns, rows, Style(colours))
        assert 0 <= editor.at <= len(editor.text) <= Editor.LIMIT
        assert len(lines) <= rows and 0 <= row < len(lines) and 0 <= col < columns
        assert all(cells(line) <= columns for line in lines)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", SGR.sub("", "".join(lines)))
        if columns >= 8:
            assert all(cells(line) < columns for line in lines)


@settings(max_examples=150, deadline=None)
@given(PASTES, st.lists(KEY, max_size=25))
def test_undo_restores(text, pressed):
    editor = Editor(["old"], lambda text: WORDS)
    editor.text = text
    was = editor.text, editor.at
    for key in pressed:
        editor.press(key)
    press(editor, "ctrl-r escape " + "ctrl-_ " * 80)
    assert editor.text == was[0]


@settings(max_examples=100, deadline=None)
@given(PASTES, st.integers(1, 130), st.integers(1, 50))
def test_left_and_right_meet_all_the_way(text, columns, rows):
    editor = Editor()
    editor.text = text
    stops = [editor.at]
    for name in ("left", "right"):
        while True:
            editor.press(KeyPress(name))
            if editor.at == stops[-1]:
                break
            stops.append(editor.at)
    assert stops == stops[: len(stops) // 2 + 1] + stops[: len(stops) // 2][::-1]


# ---- the look of an answer ----


class Tags:
    """A style that can be read: <b>bold</b>."""

    colours = True

    def __call__(self, text, *names):
        return text if not (text and names) else f"<{','.join(names)}>{text}</>"


LOOKS = [
    ("plain words", "plain words"),
    ("", ""),
    ("a **b** c", "a <bold>b</> c"),
    ("a *b* c", "a <italic>b</> c"),
    ("a _b_ c", "a <italic>b</> c"),
    ("***both***", "<bold,italic>both</>"),
    ("**a *b* c**", "<bold>a <italic>b</> c</>"),
    ("**서울**은 *크다*고", "<bold>서울</>은 <italic>크다</>고"),
    ("use `rm *.log` now", "use <code>rm *.log</> now"),
    ("``a ` b``", "<code>a ` b</>"),
    ("**`x`**", "<bold><code>x</></>"),
    (r"`C:\` and `b`", r"<code>C:\</> and <code>b</>"),
    ("snake_case and _a_b", "snake_case and _a_b"),
    ("2*3*4 and 2**3**4", "2*3*4 and 2**3**4"),
    ("__init__.py", "__init__.py"),
    ("rm *.log *.tmp", "rm *.log *.tmp"),
    ("*.log and `*.tmp`", "*.log and <code>*.tmp</>"),
    ("*`a*b` c*", "<italic><code>a*b</> c</>"),
    ("**a** " * 400, "**a** " * 400),  # too long to look for pairs
    ("/a/*/b/*/c", "/a/*/b/*/c"),
    ("**not closed", "**not closed"),
    ("a * b * c", "a * b * c"),
    ("**a *b**", "<bold>a *b</>"),
    ("`not closed", "`not closed"),
    (r"\*stars\*", r"\*stars\*"),
    ("https://x.org/_a_/*b", "https://x.org/_a_/*b"),
    ("# Head **b**", "<head>Head <bold>b</></>"),
    ("###### six", "<head>six</>"),
    ("#hashtag", "#hashtag"),
    ("- one", "• one"),
    ("  * two **b**", "  • two <bold>b</>"),
    ("10. ten", "10. ten"),
    ("-x", "-x"),
    ("> said *so*", "<dim>│ </>said <italic>so</>"),
    (">> - deep", "<dim>││ </>• deep"),
    ("---", f"<dim>{'─' * 20}</>"),
    ("* * *", f"<dim>{'─' * 20}</>"),
    ("--", "--"),
    ("[docs](https://x.org/a_b_(c))!", "docs <dim>(https://x.org/a_b_(c))</>!"),
    ("**[a](b)**", "<bold>a <dim>(b)</></>"),
    ("[**a**](b) ![c](d)", "<bold>a</> <dim>(b)</> !c <dim>(d)</>"),
    ("~~old~~ __two words__", "<strike>old</> <bold>two words</>"),
    ("**a *b***, ***c* d**", "<bold>a <italic>b</></>, <bold><italic>c</> d</>"),
    ("COUNT(*), *.py, *.js", "COUNT(*), *.py, *.js"),
    ("+ plus ##", "• plus ##"),
    ("## C# ##", "<head>C#</>"),
    ("[a] (b) [c](d e)", "[a] (b) [c](d e)"),
    ("| a | **b** |", "| a | <bold>b</> |"),
]


@pytest.mark.parametrize("text, shown", LOOKS)
def test_lines(text, shown):
    markdown = Markdown(Tags())
    assert markdown.partial(text) == shown
    assert markdown.line(text) == shown


@pytest.mark.parametrize(
    "lines",
    [
        [("```python", "dim"), ("x = '**a**'", "code"), ("", ""), ("```", "dim"), ("**a**", "bold")],
        [("~~~", "dim"), ("```", "code"), ("~~~", "dim"), ("**a**", "bold")],
        [("````md", "dim"), ("```", "code"), ("````", "dim"), ("**a**", "bold")],
        [("  ```", "dim"), ("# no head", "code"), ("``` x", "code"), ("  ```", "dim"), ("**a**", "bold")],
        [("``` `x`", "code"), ("**a**", "bold")],
    ],
)
def test_fences(lines):
    markdown = Markdown(Tags())
    for text, look in lines:
        assert markdown.partial(text) == markdown.partial(text)  # it remembers nothing
        shown = markdown.line(text)
        assert (f"<{look}>" in shown) if look else shown == ""
        assert text.strip("*`") in shown or look == "code"


ANSWER_LINE = st.text(
    st.one_of(st.sampled_from("*_`[]()#>-~\\ ab가h1/"), st.characters(exclude_categories=["Cc", "Cs"])), max_size=60
)
MARKS = re.compile(r"[*+_`\[\]()#>\-~\s│•─]")


@settings(max_examples=250, deadline=None)
@given(st.lists(ANSWER_LINE, max_size=5))
def test_nothing_is_swallowed(lines):
    markdown, untouched = Markdown(COLOURS), Markdown(PLAIN)
    for text in lines:
        partial, shown = markdown.partial(text), markdown.line(text)
        assert partial == shown
        assert MARKS.sub("", SGR.sub("", shown)) == MARKS.sub("", text)
        assert untouched.line(text) == untouched.partial(text) == text


HOSTILE = "* ` _ **a· a**· *a·_b· `a``b [ [a]( [a](b (b) >· -· \\ \\` # ~ ![ https:// *a· *a·**b*·c**· `·``·```· *`a`·".split()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_lines_take_little_time(text):
    for size in (1_999, 100_000):
        line, markdown = (text.replace("·", " ") * size)[:size], Markdown(COLOURS)
        started = time.process_time()
        markdown.partial(line)
        assert time.process_time() - started < 0.3
