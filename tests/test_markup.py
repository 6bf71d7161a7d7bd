"""Markup: Markdown as models write it, in Telegram's HTML, in pieces that fit a message."""

import re
import sys
import time
from html import unescape

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import openpista
from openpista import clipped, pieces, telegram_html, units

LINE = "─" * 20

CASES = [
    ("", ""),
    ("plain", "plain"),
    ("**b** and __b b__", "<b>b</b> and <b>b b</b>"),
    ("*i* and _i_", "<i>i</i> and <i>i</i>"),
    ("**b *both* b**", "<b>b <i>both</i> b</b>"),
    ("***both***", "<b><i>both</i></b>"),
    ("**b *both***", "<b>b <i>both</i></b>"),
    ("***both* b**", "<b><i>both</i> b</b>"),
    ("***both** i*", "<i><b>both</b> i</i>"),
    ("*a _b_ c*", "<i>a b c</i>"),
    ("~~gone~~ ~one~ ~~~three~~~", "<s>gone</s> ~one~ ~~~three~~~"),
    ("**서울**은 *크다*고", "<b>서울</b>은 <i>크다</i>고"),
    ("**[a](https://x.org)**", '<b><a href="https://x.org">a</a></b>'),
    ("[**a** `b`](https://x.org)", '<a href="https://x.org"><b>a</b> b</a>'),  # Telegram has no code in a link
    ("**a `b` c**", "<b>a </b><code>b</code><b> c</b>"),  # nor in bold
    ("`a<b` ``c`d`` `` ` ``", "<code>a&lt;b</code> <code>c`d</code> <code>`</code>"),
    ("`a **b** \\`", "<code>a **b** \\</code>"),
    ("```sh ls```", "<code>sh ls</code>"),
    ("[t](https://x.org/?a=1&b=\"2\")", '<a href="https://x.org/?a=1&amp;b=&quot;2&quot;">t</a>'),
    ('[t](https://x.org/a_(b) "title")', '<a href="https://x.org/a_(b)">t</a>'),
    ("[t](tg://user?id=1) [m](mailto:a@x.org)", '<a href="tg://user?id=1">t</a> <a href="mailto:a@x.org">m</a>'),
    ("[t](javascript:x) [f](src/a.py)", "t (javascript:x) f (src/a.py)"),
    ("[[1]](https://x.org)", '<a href="https://x.org">[1]</a>'),
    ("[a] (b) [c](d e) [](https://x.org)", "[a] (b) [c](d e) [](https://x.org)"),
    ("[https://x.org](https://x.org)", '<a href="https://x.org">https://x.org</a>'),
    ("https://x.org/_a_/*b <https://x.org>", "https://x.org/_a_/*b &lt;https://x.org&gt;"),
    ("![cat](https://x.org/c.png)!", '<a href="https://x.org/c.png">cat</a>!'),
    ("# Head **b** [l](https://x.org) #", '<b>Head b <a href="https://x.org">l</a></b>'),
    ("## C# and `x`", "<b>C# and </b><code>x</code>"),
    ("#hashtag", "#hashtag"),
    ("- a\n  * b\n    + c", "• a\n  • b\n    • c"),
    ("1. one\n2) two", "1. one\n2) two"),
    ("- [ ] open\n- [x] done\n* [X] done", "☐ open\n☑ done\n☑ done"),
    ("---\n* * *\n--", f"{LINE}\n{LINE}\n--"),
    ("> a **b**\n>> c\n\nd", "<blockquote>a <b>b</b>\nc</blockquote>\n\nd"),
    ("> ```py\n> > x\n> ```\n> y", '<blockquote><pre><code class="language-py">&gt; x</code></pre>\ny</blockquote>'),
    ("> ```\n> x\ny", "<blockquote><pre>x</pre></blockquote>\ny"),
    ("```python\nif a < b:\n\n    **c**\n```\nd", '<pre><code class="language-python">if a &lt; b:\n\n    **c**</code></pre>\nd'),
    ("~~~\n```\n~~~", "<pre>```</pre>"),
    ("- a\n  ```c++ x=\"y\"\n  b\n    c\n  ```", '• a\n<pre><code class="language-c++">b\n  c</code></pre>'),
    ('```"><b>\nx\n```', "<pre>x</pre>"),
    ("```sh\nstill com", '<pre><code class="language-sh">still com</code></pre>'),
    ("a\n```", "a"),
    ("| A | Number |\n|---|:-:|\n| `x` | **y** |\n| 한국 | a \\| b |\nz", "<pre>A     Number\n────  ──────\nx     y\n한국  a | b</pre>\nz"),
    ("a | b\n--|--\n1 | 2 | 3", "<pre>a  b\n─  ─  ─\n1  2  3</pre>"),
    ("|a|\n|-|\n|[b](https://x.org)|", f"<pre>a\n{'─' * 17}\nb (https://x.org)</pre>"),
    (r"\![a](https://x.org)", '!<a href="https://x.org">a</a>'),
    ("| a |", "| a |"),
    ("a\n|---|---|", "a\n|---|---|"),
    ("**open\n`open\n[open\n~~open\n*open", "**open\n`open\n[open\n~~open\n*open"),
    ("snake_case_words 2*3*4 a * b __init__.py __init__", "snake_case_words 2*3*4 a * b __init__.py __init__"),
    ("*.py, *.js and **/*.c, src/**", "*.py, *.js and **/*.c, src/**"),
    ("SELECT *, COUNT(*) FROM t; f(*args, **more)", "SELECT *, COUNT(*) FROM t; f(*args, **more)"),
    ("*/5 * * * * and /a/*/b/*/c", "*/5 * * * * and /a/*/b/*/c"),
    (r"\*no\* \`no\` \[no](https://x.org) \\ \a", r"*no* `no` [no](https://x.org) \ \a"),
    ('<b>x</b><br>&amp; "q"', "&lt;b&gt;x&lt;/b&gt;&lt;br&gt;&amp;amp; &quot;q&quot;"),
    ("a\r\nb\rc\0\ud800\u202ed\x1b[31me\u200f", "a\nb\nc␀?de"),
]  # fmt: skip


@pytest.mark.parametrize("markdown, expected", CASES)
def test_html(markdown, expected):
    assert telegram_html(markdown) == expected


@pytest.mark.parametrize("text, size", [("", 0), ("abc", 3), ("한글", 2), ("🙂", 2), ("e\u0301", 2), ("\ud800", 1)])
def test_units(text, size):
    assert units(text) == size


@pytest.mark.parametrize(
    "text, limit, expected",
    [("abc", 3, "abc"), ("abcd", 3, "abc"), ("a🙂b", 2, "a"), ("a🙂b", 3, "a🙂"), ("\ud800a", 9, "?a"), ("a", 0, "")],
)
def test_clipped(text, limit, expected):
    assert clipped(text, limit) == expected


# A strict reader of what Telegram takes


TAG = re.compile(r'<(/?)(b|i|s|code|pre|blockquote|a)((?: (?:href|class)="[^"<>]*")?)>|&(lt|gt|amp|quot);|([<>&])')
MAY_HOLD = {
    "b": "is a",
    "i": "bs a",
    "s": "bi a",
    "a": "bis",
    "pre": "code",
    "code": "",
    "blockquote": "b i s a code pre",
}


def shown(html):
    """The text of the HTML; fails where Telegram would refuse it or drop a part."""
    opened = []
    for closing, tag, attribute, _, stray in TAG.findall(html):
        assert not stray, html
        if closing:
            assert opened.pop() == tag, html
        elif tag:
            assert all(
                tag in MAY_HOLD[outer].replace("bi", "b i").split() or tag in MAY_HOLD[outer] for outer in opened[-1:]
            )
            assert tag not in opened
            assert bool(attribute) == (tag == "a" or (tag == "code" and opened[-1:] == ["pre"]))
            opened.append(tag)
    assert opened == []
    return unescape(re.sub(r"<[^>]*>", "", html))


def words(text):
    return re.sub(r"\s+", "", text)


ATOMS = '* ** *** _ __ ~~ ` `` ``` [ ] ( ) ![ ](https://x.org) ](a) | |-|- - # > \\ < & " 1. : / . [x] --- a b 가 🙂 é'.split()
ATOMS += [
    " ",
    " ",
    "\n",
    "\n\n",
    "\n```py\n",
    "\n```\n",
    "\n> ",
    "\n- ",
    "\n|a|b|\n|-|-|\n",
    "\n## ",
    "e\u0301",
    "👩\u200d💻",
    "\t",
]
ATOMS += ["**a b**", "`c d`", "[e](https://x.org/f)", "*g*", "h" * 30, "word " * 12]
TEXTS = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=3)), max_size=60).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_html_is_valid(markdown):
    text = shown(telegram_html(markdown))
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", text)
    for end in range(0, len(markdown), 20):  # as it comes
        shown(telegram_html(markdown[:end]))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(64, 200))
@example("**" + "bold " * 60 + "** " + "`" + "code " * 60 + "`", 100)
@example("[" + "link " * 60 + "](https://x.org)", 100)
@example("> ```py\n" + "> x = 1\n" * 60 + "> ```", 64)
@example("| a | b |\n|---|---|\n" + "| c | d |\n" * 60, 64)
@example("👩\u200d💻" * 100, 64)
def test_pieces_fit_and_lose_nothing(markdown, limit):
    whole, parts = shown(telegram_html(markdown)), pieces(markdown, limit)
    texts = [shown(telegram_html(part)) for part in parts]
    assert words("".join(texts)) == words(whole)
    assert all(text.strip() and units(text) <= limit for text in texts)
    assert all(len(telegram_html(part).encode()) < 16_384 for part in parts)
    if units(whole) <= limit and whole.strip():
        assert len(parts) == 1 or len(telegram_html(markdown).encode()) > 14_000 * limit / 4_096 - 300


CUTS = [
    ("one", ["one"]),
    (" \n\n", []),
    ("```\n```", []),
    ("a" * 40 + "\n\n" + "b" * 10 + "\n" + "c" * 40, ["a" * 40, "b" * 10 + "\n" + "c" * 40]),
    ("a" * 40 + "\n" + "b " * 20, ["a" * 40, ("b " * 20)]),
    ("a\n\n" + "b " * 40, ["a\n\n" + "b " * 30 + "b", "b " * 9]),  # not in the first third
    ("a" * 70, ["a" * 64, "a" * 6]),
    ("🙂" * 40, ["🙂" * 32, "🙂" * 8]),
    ("a" + "e\u0301" * 40, ["a" + "e\u0301" * 31, "e\u0301" * 9]),
    ("```py\n" + "x = 10\n" * 12 + "```", ["```py\n" + "x = 10\n" * 9 + "```", "```py\n" + "x = 10\n" * 3 + "```"]),
    ("**" + "b " * 39 + "b**", ["**" + "b " * 31 + "b**", "**" + "b " * 7 + "b**"]),
    ("`" + "b " * 39 + "b`", ["`" + "b " * 31 + "b`", "`" + "b " * 7 + "b`"]),
    ("b " * 32 + "- c", ["b " * 31 + "b", "\\- c"]),  # no bullet
    ("> " + "b " * 39 + "b", ["> " + "b " * 31 + "b", "> " + "b " * 7 + "b"]),
]


@pytest.mark.parametrize("markdown, expected", CUTS)
def test_cuts(markdown, expected):
    assert [part.strip() for part in pieces(markdown, 64)] == [part.strip() for part in expected]


def test_a_cut_table_stays_in_its_columns():
    parts = pieces("| name | n |\n|---|---|\n" + "".join(f"| row {n} | {n} |\n" for n in range(20)), 64)
    assert len(parts) > 3
    assert all(part.startswith("```\n") and part.endswith("\n```") for part in parts)
    assert parts[0] == "```\nname    n\n──────  ──\nrow 0   0\nrow 1   1\nrow 2   2\nrow 3   3\n```"


LONG_LINK = "[a](https://x.org/{})"


@pytest.mark.parametrize("text", ['[a](https://x.org/a/path?with=query) "quoted" ' * 400, (LONG_LINK.format("y" * 1_900) + " ") * 20, LONG_LINK.format("y" * 20_000)])  # fmt: skip
def test_much_markup_is_cut_earlier(text):
    parts = pieces(text)
    assert len(parts) > 1
    assert words("".join(shown(telegram_html(part)) for part in parts)) == words(shown(telegram_html(text)))
    assert all(len(telegram_html(part).encode()) < 16_384 for part in parts)


HOSTILE = (
    "* ` [ ] > | _ ~ \\ ~~ **a· *a _a __a [a]( [a](b) ](x ](( ](()x( `a``b ![ -· a\n \n |a|\n |-|\n #· >·a\n ```\n **a·*b*** "
    "***a*·b https:// https://a] e\u0301 \x1b] |·a·|·b·|\n|-|-|\n"
).split(" ")


def steps(function, *args):
    """How many lines of openpista.py run: the same on any machine, however busy."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == openpista.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("text", HOSTILE)
def test_work_grows_as_the_text_does(text):
    text = text.replace("·", " ") or " "
    for function, *limit in (telegram_html,), (pieces, 200):
        small, large = (steps(function, (text * size)[:size], *limit) for size in (600, 2_400))
        assert large < 5 * small + 2_000


@pytest.mark.parametrize("text", HOSTILE)
def test_patterns_have_no_bad_text(text):
    text, begun = ((text.replace("·", " ") or " ") * 40_000)[:40_000], time.process_time()
    assert shown(telegram_html(text)) is not None
    assert time.process_time() - begun < 3  # a tenth of a second, or many if one took the square
