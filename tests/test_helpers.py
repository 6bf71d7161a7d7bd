"""Helpers: time, text in small places, private files, TOML, and what must not be shown."""

import logging
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import openpista
from openpista import ConfigError, Redactor

ROOT = Path(__file__).parent.parent
KOREA = timezone(timedelta(hours=9))


# Time and text


MOMENTS = [
    (datetime(2026, 3, 1, 9, 0, tzinfo=UTC), "2026-03-01T09:00:00.000Z"),
    (datetime(2026, 3, 1, 9, 0, 0, 999_999, tzinfo=UTC), "2026-03-01T09:00:00.999Z"),
    (datetime(2026, 3, 1, 9, 0, tzinfo=KOREA), "2026-03-01T00:00:00.000Z"),
]


@pytest.mark.parametrize("moment, text", MOMENTS)
def test_iso(moment, text):
    assert openpista.iso(moment) == text


def test_iso_sorts_as_time_does():
    moments = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=0.5 * i) for i in range(200)]
    assert sorted(map(openpista.iso, moments)) == [openpista.iso(moment) for moment in moments]


def test_now_is_in_utc():
    assert openpista.utc_now().utcoffset() == timedelta(0)


BEGINNINGS = [
    (b"\xff\xd8\xff\xe0", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"RIFF\n\0\0\nWEBPVP8 ", "image/webp"),
    (b"RIFF\n\0\0\nWAVEfmt ", None),
    (b"<svg/>", None),
    (b"BM", None),
    (b"", None),
]


@pytest.mark.parametrize("data, kind", BEGINNINGS)
def test_a_picture_is_known_by_its_beginning(tmp_path, data, kind):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    if kind:
        assert openpista.load_image(path) == openpista.Image(str(path), kind, data)
    else:
        with pytest.raises(openpista.PistaError, match="no picture that models take"):
            openpista.load_image(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\udcff", "none/there"])
def test_a_name_that_no_file_has(tmp_path, name):
    with pytest.raises(openpista.PistaError, match="cannot read"):
        openpista.read_file(tmp_path / name, 10)


CLIPPED = [
    ("", 5, ""),
    ("short", 5, "short"),
    ("longer", 5, "long…"),
    ("  two\n\twords  ", 9, "two words"),
    ("one two three", 8, "one two…"),
    ("a" + " " * 100 + "b", 5, "a…"),  # cut before it was short enough: that is said too
    ("한국어 문장입니다", 5, "한국어 …"),
]


@pytest.mark.parametrize("text, limit, expected", CLIPPED)
def test_clip(text, limit, expected):
    assert openpista.clip(text, limit) == expected


@given(st.text(), st.integers(1, 50))
def test_clip_is_one_line_and_short(text, limit):
    line = openpista.clip(text, limit)
    assert len(line) <= limit and len(line.splitlines()) <= 1


def test_clip_of_a_very_long_text_looks_at_its_start_only():
    assert openpista.clip("x" * 50_000_000, 10) == "xxxxxxxxx…"


@given(st.text(), st.integers(2, 50))
def test_head_and_tail(text, limit):
    short = openpista.head_and_tail(text, limit)
    if len(text) <= limit:
        assert short == text
    else:
        mark = openpista.left_out(len(text) - limit)
        head, tail = short[: limit // 2], short[limit // 2 + len(mark) :]
        assert text.startswith(head) and text.endswith(tail) and len(head + tail) == limit
        assert short[limit // 2 :].startswith(mark)


NEAR = [
    ("modle", ("model", "timeout"), ", did you mean 'model'?"),
    ("xyz", ("model", "timeout"), ""),
    ("model", (), ""),
    ("", ("model",), ""),
]


@pytest.mark.parametrize("word, words, expected", NEAR)
def test_near(word, words, expected):
    assert openpista.near(word, words) == expected


PLURALS = [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1_000, "1,000 files")]


@pytest.mark.parametrize("count, expected", PLURALS)
def test_plural(count, expected):
    assert openpista.plural(count, "file") == expected


STORABLE = [("", ""), ("한글 🙂", "한글 🙂"), ("a\0b", "a␀b"), ("a\udcffb", "a?b"), ("\ud83d", "?")]


@pytest.mark.parametrize("text, expected", STORABLE)
def test_storable(text, expected):
    assert openpista.storable(text) == expected


@given(st.text(st.characters()))
def test_storable_is_utf_8_and_stays_as_it_is(text):
    stored = openpista.storable(text)
    assert stored.encode() and openpista.storable(stored) == stored if text else stored == ""


def test_to_json_is_compact_sorted_and_readable():
    assert openpista.to_json({"b": [1, None], "a": "한글"}) == '{"a":"한글","b":[1,null]}'


# Paths and files


HOMES = [
    ({"OPENPISTA_HOME": "/srv/pista"}, "/srv/pista"),
    ({"OPENPISTA_HOME": ""}, "~/.openpista"),
    ({}, "~/.openpista"),
]


@pytest.mark.parametrize("environ, expected", HOMES)
def test_home(environ, expected):
    assert openpista.home(environ) == Path(expected).expanduser()


def test_a_path_in_the_home_of_nobody_is_one_clear_error():
    with pytest.raises(ConfigError, match="no home directory to expand '~nobody-like-that/x'; set OPENPISTA_HOME"):
        openpista.user_path("~nobody-like-that/x")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        openpista.write_private(tmp_path / "home" / "deep" / "key", "한글\n")
    finally:
        os.umask(old)
    assert mode(tmp_path / "home" / "deep" / "key") == 0o600 and mode(tmp_path / "home" / "deep") == 0o700
    assert (tmp_path / "home" / "deep" / "key").read_bytes() == "한글\n".encode()


def test_a_private_file_is_replaced_whole(tmp_path):
    path = tmp_path / "key"
    path.write_text("a much longer text than the new one")
    path.chmod(0o644)
    reader = path.open()
    openpista.write_private(path, "new")
    assert path.read_text() == "new" and mode(path) == 0o600
    assert reader.read().startswith("a much longer"), "who had it open still reads the old one"
    reader.close()


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "key"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        openpista.write_private(path, "\udcff")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["key"]


def test_make_private_leaves_a_folder_that_is_there(tmp_path):
    tmp_path.chmod(0o755)
    assert openpista.make_private(tmp_path) == tmp_path and mode(tmp_path) == 0o755


BROKEN_TOML = [
    (b"a = ", "is not valid TOML: Invalid value"),
    (b"a = 1\na = 2", "is not valid TOML"),
    (b"a = 'caf\xe9'", "is not UTF-8: byte 8 is 0xe9"),
    (b"\xff\xfea\x00", "is not UTF-8: byte 0 is 0xff"),
    (b"a = " + b"9" * 5_000, "is not valid TOML"),
    (b"a = " + b"[" * 50_000, "is not valid TOML"),
    (b"a = 1\0", "is not valid TOML"),
]


@pytest.mark.parametrize("raw, words", BROKEN_TOML, ids=range(len(BROKEN_TOML)))
def test_broken_toml_is_one_clear_error_that_names_the_file(tmp_path, raw, words):
    path = tmp_path / "broken.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        openpista.load_toml(path)
    assert f"{path} {words}" in str(caught.value) and "\n" not in str(caught.value)


def test_toml_with_a_mark_at_its_start_and_windows_line_ends(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[agent]\r\nmodel = 'x'\r\n")
    assert openpista.load_toml(tmp_path / "a.toml") == {"agent": {"model": "x"}}


def test_toml_that_cannot_be_read(tmp_path):
    for path, why in [(tmp_path, "Is a directory"), (tmp_path / "gone", "No such file or directory")]:
        with pytest.raises(ConfigError, match=why) as caught:
            openpista.load_toml(path)
        assert str(path) in str(caught.value)


# Secrets


REDACTED = [
    ("nothing to hide", "nothing to hide"),
    ("the key is my-secret-key!", "the key is [secret]!"),
    ("my-secret-key-and-more", "[secret]"),  # the longest one first
    ("my-secret-keymy-secret-key", "[secret][secret]"),
    ("short: abc", "short: abc"),
    ("bot 123456789:AAExampleExampleExampleExample_12345", "bot [secret]"),
    (
        "https://api.telegram.org/bot123456789:AAExampleExampleExampleExample_12345/getMe",
        "https://api.telegram.org/bot[secret]/getMe",
    ),
    ("sk-proj-abcdefghijklmnopqrstuvwx is one", "[secret] is one"),
    ("a (regex) [thing].*", "a [secret]"),
]


@pytest.mark.parametrize("text, expected", REDACTED)
def test_redactor(text, expected):
    redact = Redactor(["my-secret-key", "my-secret-key-and-more", "abc", "", "(regex) [thing].*"])
    assert redact(text) == expected


def test_redactor_learns():
    redact = Redactor()
    assert redact("learned-later") == "learned-later"
    redact.add("learned-later")
    assert redact("learned-later") == "[secret]"


def test_a_log_record_shows_no_secret_not_even_in_its_traceback():
    formatter = openpista.RedactingFormatter(Redactor(["hidden-key"]))
    try:
        raise ValueError("hidden-key in a traceback")
    except ValueError:
        record = logging.LogRecord("openpista", logging.ERROR, "", 1, "with %s", ("hidden-key",), sys.exc_info())
    text = formatter.format(record)
    assert "hidden-key" not in text and text.count("[secret]") == 3 and "Traceback" in text


def test_a_secret_with_an_escape_in_it_is_none_the_less_one():
    formatter = openpista.RedactingFormatter(Redactor(["hidden-key"]))
    record = logging.LogRecord("openpista", logging.ERROR, "", 1, "with hid\x1b[31mden-key", (), None)
    assert formatter.format(record).endswith("with [secret]")


def test_logging_goes_to_stderr_redacted_and_httpx_stays_quiet():
    code = """
import logging, openpista
openpista.setup_logging("debug", openpista.Redactor(["hidden-key"]))
logging.getLogger("openpista").debug("with hidden-key")
logging.getLogger("httpx").info("GET https://api.telegram.org/bot...")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.endswith("DEBUG openpista: with [secret]\n")
    assert done.stderr.count("\n") == 1


def test_a_record_is_one_line_whatever_is_in_it():
    formatter = openpista.RedactingFormatter(Redactor())
    record = logging.LogRecord("openpista", logging.ERROR, "", 1, "%s", ("a\n2026-01-01 INFO openpista: forged",), None)
    assert "\n" not in formatter.format(record)
