"""Skills: what front matter says, what is loaded, what `skills validate` says, and that no name leads out."""

import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openpista
from openpista import Skill, SkillError

DATA = Path(__file__).parent / "data" / "skills"
FIELDS = "['allowed-tools', 'compatibility', 'description', 'license', 'metadata', 'name']"


def skill_text(name="walk-dog", description="Walks the dog.", more="", body="Take the lead."):
    return f"---\nname: {name}\ndescription: {description}\n{more}---\n{body}\n"


def put_skill(workspace, folder="walk-dog", text=None, file="SKILL.md"):
    """A skill's folder, with a SKILL.md of that text or bytes."""
    place = workspace / "skills" / folder
    place.mkdir(parents=True, exist_ok=True)
    text = skill_text(name=folder) if text is None else text
    (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return place


def load_one(workspace):
    skills, problems = openpista.load_skills(workspace)
    assert problems == []
    return skills[0]


def fields_of(yaml, **options):
    return openpista.parse_front_matter(f"---\n{yaml}\n---\n", **options)[0]


# Front matter

VALUES = [
    ("a: plain text", "plain text"),
    ("a:    spaces around   ", "spaces around"),
    ("a : spaced key", "spaced key"),
    ("'a': quoted key", "quoted key"),
    ('"a": quoted key', "quoted key"),
    ("a: 1.0", "1.0"),
    ("a: true", "true"),
    ("a: ~", "~"),
    ("a:", ""),
    ("a: # only a comment", ""),
    ("a: text # and a comment", "text"),
    ("a: no#comment", "no#comment"),
    ("a: http://example.org:80/x", "http://example.org:80/x"),
    ("a: -dash", "-dash"),
    ("a: --- b", "--- b"),
    ("a: one\n  two\n  three", "one two three"),
    ("a: one\n\n  two", "one\ntwo"),
    ("a:\n  one\n  two", "one two"),
    ("a:\n  'one: two'", "one: two"),
    ("# before\n\na: b\n# after", "b"),
    # quotes
    ("a: 'it''s'", "it's"),
    ("a: ''", ""),
    ('a: ""', ""),
    ("a: 'x: y # z'", "x: y # z"),
    ("a: 'x'   # comment", "x"),
    ("a: 'one\n  two\n\n  three'", "one two\nthree"),
    ("a: 'back\\slash'", "back\\slash"),
    (r'a: "tab\t, line\n, quote\", slash\/, backslash\\"', 'tab\t, line\n, quote", slash/, backslash\\'),
    (r'a: "\u0041\u00e9\b"', "Aé\b"),
    (r'a: "\uD83D\uDC34"', "🐴"),
    (r'a: "half \uD83D"', "half \ufffd"),
    ('a: "one\n  two"', "one two"),
    # blocks
    ("a: |\n  one\n   two\n\n  three", "one\n two\n\nthree\n"),
    ("a: |-\n  one\n  two\n", "one\ntwo"),
    ("a: |+\n  one\n\n", "one\n"),  # no reader of ours would see the blank lines
    ("a: |\n\n  one", "\none\n"),
    ("a: |2\n   one", "one\n"),  # nor how deep the text stands
    ("a: |-2\n   one", "one"),
    ("a: |2-\n   one", "one"),
    ("a: |", ""),
    ("a: | # comment\n  one", "one\n"),
    ("a: |-\n  # no comment\n  b: c", "# no comment\nb: c"),
    ("a: |-\n  ---\n  x", "---\nx"),
    ("a: >\n  one\n  two\n\n  three", "one two\nthree\n"),
    ("a: >-\n  one\n    deep\n  two", "one\n  deep\ntwo"),
    ("a: >-\n\n  one\n   deep\n\n   deep\n  two", "\none\n deep\n\n deep\ntwo"),
    # nested
    ("a:\n  b: c\n  d: 'e'", {"b": "c", "d": "e"}),
    ("a:\n  # in between\n  b: c\n\n  d:\n    e: f", {"b": "c", "d": {"e": "f"}}),
    ("a:\n  b: |\n    one\n  c: d", {"b": "one\n", "c": "d"}),
    ("a:\n- one\n- two", ["one", "two"]),
    ("a:\n  - one\n  - 'two: three'\n  -", ["one", "two: three", ""]),
    ("a:\n  - b: c\n    d: e\n  - - f\n    - g", [{"b": "c", "d": "e"}, ["f", "g"]]),
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("yaml", "value"), VALUES)
def test_value(yaml, value, strict):
    assert fields_of(yaml, strict=strict) == {"a": value}


LENIENT = [
    ("a: Use when: the sun shines", "Use when: the sun shines"),
    ("a: ends with a colon:", "ends with a colon:"),
    ("a: Use when\n  it: rains", "Use when it: rains"),
    ("a: *stars* and `ticks`", "*stars* and `ticks`"),
    ("a: @home", "@home"),
    ("a: > not a block", "> not a block"),
    ("a: 'quoted' start", "'quoted' start"),
    ("a: 1\na: 2", "2"),
    ('a: {"b": {"c": ["d", 1, 2.5]}}', '{"b": {"c": ["d", 1, 2.5]}}'),
    ('a:\n  {\n    "b": "c"\n  }', '{ "b": "c" }'),
    ("a: [one, 'two', three]", ["one", "two", "three"]),
    ("a: []", []),
    ("a: [draft] still a text", "[draft] still a text"),
    ("a: {not: json}", "{not: json}"),
    ("\ta: tab", "tab"),
]


@pytest.mark.parametrize(("yaml", "value"), LENIENT)
def test_lenient_value(yaml, value):
    assert fields_of(yaml) == {"a": value}
    with pytest.raises(SkillError, match="^Invalid YAML in frontmatter: "):
        fields_of(yaml, strict=True)


BROKEN = [
    ("", "SKILL.md must start with YAML frontmatter (---)"),
    ("# Title", "SKILL.md must start with YAML frontmatter (---)"),
    ("\n---\na: b\n---", "SKILL.md must start with YAML frontmatter (---)"),
    ("\ufeff---\na: b\n---", "SKILL.md must start with YAML frontmatter (---)"),
    ("----\na: b\n---", "SKILL.md must start with YAML frontmatter (---)"),
    ("---", "SKILL.md frontmatter not properly closed with ---"),
    ("---\na: b\n", "SKILL.md frontmatter not properly closed with ---"),
    ("---\na: b\n ---\n", "SKILL.md frontmatter not properly closed with ---"),
    ("---\n---\nbody", "SKILL.md frontmatter must be a YAML mapping"),
    ("---\n# nothing\n---\nbody", "SKILL.md frontmatter must be a YAML mapping"),
    ("---\n- one\n- two\n---\nbody", "SKILL.md frontmatter must be a YAML mapping"),
    ("---\njust text\n---\nbody", "SKILL.md frontmatter must be a YAML mapping"),
    ("---\na: [open\nb: c\n---", "Invalid YAML in frontmatter: "),
    ("---\na: {open\n---", "Invalid YAML in frontmatter: "),
    ("---\na: 'open\n---", "Invalid YAML in frontmatter: "),
    ('---\na: "open\n---', "Invalid YAML in frontmatter: "),
    ('---\na: "\\q"\n---', "Invalid YAML in frontmatter: "),
    ('---\na: "\\U00110000"\n---', "Invalid YAML in frontmatter: "),
    ('---\na: "\\q"\n---', "Invalid YAML in frontmatter: an unknown escape"),
    ('---\na: "\\U00110000"\n---', "Invalid YAML in frontmatter: an unknown escape"),
    ('---\na: "one\\\n  two"\n---', "Invalid YAML in frontmatter: an unknown escape"),
    ("---\na: b\nlost line\n---", "Invalid YAML in frontmatter: "),
    ("---\na:\n  - b\n  c\n---", "Invalid YAML in frontmatter: "),
    ("---\na: " + "[" * 100_000 + "\n---", "Invalid YAML in frontmatter: "),
    ("---\na:\n  " + "- " * 100_000 + "\n---", "Invalid YAML in frontmatter: nested too deep"),
    ("---\n" + "\n".join(" " * depth + "a:" for depth in range(500)) + "\n---", "Invalid YAML in frontmatter: nested"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_front_matter(text, message):
    for strict in (False, True):
        with pytest.raises(SkillError) as caught:
            openpista.parse_front_matter(text, strict=strict)
        assert str(caught.value).startswith(message)
        assert len(str(caught.value)) < 300


def test_body_is_what_follows_stripped():
    text = "---  \na: b --- c\n---\t\n\n# Title\n\n---\n\nmore\n\n"
    assert openpista.parse_front_matter(text) == ({"a": "b --- c"}, "# Title\n\n---\n\nmore")


YAMLISH = st.lists(st.sampled_from(list("ab:-#'\"\\|>[]{}, \n\t\u2028") + ["---", "a: ", "\n  ", "\\u12", "- "])).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(YAMLISH, st.text()), st.booleans())
def test_no_text_raises_anything_but_skill_error(text, strict):
    for whole in (text, f"---\n{text}\n---\n", f"---\na: {text}\n---\n"):
        try:
            fields, body = openpista.parse_front_matter(whole, strict=strict)
        except SkillError:
            continue
        assert isinstance(fields, dict)
        assert isinstance(body, str)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_every_string_survives_quoting(text):
    double = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    assert fields_of(f'a: "{double}"', strict=True) == {"a": text}
    if "\n" not in text:
        single = text.replace("'", "''")
        assert fields_of(f"a: '{single}'", strict=True) == {"a": text}


@pytest.mark.parametrize(
    "char", list(" :'\"\\[{#|>-a\t") + [": ", "''", '\\"', "- ", "\n", "\n ", " #", "a: b\n", "a:\n "]
)
def test_long_input_takes_no_time(char):
    text = char * (100_000 // len(char))
    began = time.process_time()
    for yaml in (text, f"a: {text}", f"a: '{text}", f'a: "{text}', f"a: |\n  {text}", f"a: >\n  {text}"):
        try:
            fields_of(yaml)
        except SkillError:
            pass
    assert time.process_time() - began < 2


# Validation: the cases of skills-ref's own tests, and those between them

GOOD_TEXTS = [
    ("walk-dog", skill_text()),
    ("walk-dog", skill_text(more="license: MIT\nmetadata:\n  author: Somebody\n")),
    ("walk-dog", skill_text(more="allowed-tools: Bash(jq:*) Bash(git:*)\n")),
    ("walk-dog", skill_text(more="compatibility: Wants Python 3.11 or newer\n")),
    ("walk-dog", skill_text(more="compatibility: " + "x" * 500 + "\n")),
    ("walk-dog", skill_text(description="x" * 1024)),
    ("walk-dog", skill_text(name="'  walk-dog '")),
    ("walk-dog", skill_text().replace("\n", "\r\n")),
    ("7", skill_text(name="7")),
    ("a" * 64, skill_text(name="a" * 64)),
    ("技能", skill_text(name="技能")),
    ("мой-навык", skill_text(name="мой-навык")),
    ("навык", skill_text(name="навык")),
    ("caf\u00e9", skill_text(name="cafe\u0301")),
    ("cafe\u0301", skill_text(name="caf\u00e9")),
]


@pytest.mark.parametrize(("folder", "text"), GOOD_TEXTS)
def test_valid(tmp_path, folder, text):
    assert openpista.validate_skill(put_skill(tmp_path, folder, text)) == []


def odd(name):
    return f"Skill name '{name}' contains invalid characters. Only letters, digits, and hyphens are allowed."


BAD_TEXTS = [
    ("WalkDog", skill_text(name="WalkDog"), ["Skill name 'WalkDog' must be lowercase"]),
    ("НАВЫК", skill_text(name="НАВЫК"), ["Skill name 'НАВЫК' must be lowercase"]),
    ("a" * 70, skill_text(name="a" * 70), [f"Skill name '{'a' * 70}' exceeds 64 character limit (70 chars)"]),
    ("-dog", skill_text(name="-dog"), ["Skill name cannot start or end with a hyphen"]),
    ("dog-", skill_text(name="dog-"), ["Skill name cannot start or end with a hyphen"]),
    ("walk--dog", skill_text(name="walk--dog"), ["Skill name cannot contain consecutive hyphens"]),
    ("walk_dog", skill_text(name="walk_dog"), [odd("walk_dog")]),
    ("walk dog", skill_text(name="walk dog"), [odd("walk dog")]),
    ("cat", skill_text(), ["Directory name 'cat' must match skill name 'walk-dog'"]),
    (
        "cat",
        skill_text(name="-Dog--!"),
        [
            "Skill name '-Dog--!' must be lowercase",
            "Skill name cannot start or end with a hyphen",
            "Skill name cannot contain consecutive hyphens",
            odd("-Dog--!"),
            "Directory name 'cat' must match skill name '-Dog--!'",
        ],
    ),
    ("walk-dog", skill_text(name="''"), ["Field 'name' must be a non-empty string"]),
    ("walk-dog", skill_text(name="\n  - walk-dog"), ["Field 'name' must be a non-empty string"]),
    ("walk-dog", skill_text(description=""), ["Field 'description' must be a non-empty string"]),
    ("walk-dog", skill_text(description="\n  a: b"), ["Field 'description' must be a non-empty string"]),
    ("walk-dog", skill_text(description="x" * 1100), ["Description exceeds 1024 character limit (1100 chars)"]),
    ("walk-dog", "---\ndescription: d\n---\n", ["Missing required field in frontmatter: name"]),
    ("walk-dog", "---\nname: walk-dog\n---\n", ["Missing required field in frontmatter: description"]),
    (
        "walk-dog",
        "---\nlicense: MIT\n---\n",
        ["Missing required field in frontmatter: name", "Missing required field in frontmatter: description"],
    ),
    (
        "walk-dog",
        skill_text(more="compatibility: " + "x" * 550 + "\n"),
        ["Compatibility exceeds 500 character limit (550 chars)"],
    ),
    ("walk-dog", skill_text(more="compatibility:\n  a: b\n"), ["Field 'compatibility' must be a string"]),
    (
        "walk-dog",
        skill_text(more="zebra: z\nhomepage: h\n"),
        [f"Unexpected fields in frontmatter: homepage, zebra. Only {FIELDS} are allowed."],
    ),
    (
        "cat",
        "---\nname: Dog\ndescription: ''\ncompatibility:\n- a\ncolor: brown\n---\n",
        [
            f"Unexpected fields in frontmatter: color. Only {FIELDS} are allowed.",
            "Skill name 'Dog' must be lowercase",
            "Directory name 'cat' must match skill name 'Dog'",
            "Field 'description' must be a non-empty string",
            "Field 'compatibility' must be a string",
        ],
    ),
    ("walk-dog", "Take the lead.", ["SKILL.md must start with YAML frontmatter (---)"]),
    ("walk-dog", "\ufeff" + skill_text(), ["SKILL.md must start with YAML frontmatter (---)"]),
    ("walk-dog", "---\nname: walk-dog\n", ["SKILL.md frontmatter not properly closed with ---"]),
    ("walk-dog", "---\n- walk-dog\n---\n", ["SKILL.md frontmatter must be a YAML mapping"]),
    ("walk-dog", b"---\nname: walk-dog\ndescription: \xff\n---\n", ["SKILL.md is not valid UTF-8 (at byte 32)"]),
    ("walk-dog", skill_text(body="x" * 300_000), ["SKILL.md is larger than 256 KiB"]),
]


@pytest.mark.parametrize(("folder", "text", "errors"), BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_invalid(tmp_path, folder, text, errors):
    assert openpista.validate_skill(put_skill(tmp_path, folder, text)) == errors


def test_invalid_yaml_is_one_error_that_quotes_the_line(tmp_path):
    folder = put_skill(tmp_path, text=skill_text(description="Use when: it rains"))
    (error,) = openpista.validate_skill(folder)
    assert error.startswith("Invalid YAML in frontmatter: ")
    assert "Use when: it rains" in error


def test_validate_what_is_no_skill(tmp_path):
    file, empty = tmp_path / "file.txt", tmp_path / "empty"
    file.write_text("text")
    empty.mkdir()
    (tmp_path / "odd" / "SKILL.md").mkdir(parents=True)
    assert openpista.validate_skill(tmp_path / "nowhere") == [f"Path does not exist: {tmp_path / 'nowhere'}"]
    assert openpista.validate_skill(file) == [f"Not a directory: {file}"]
    assert openpista.validate_skill(empty) == ["Missing required file: SKILL.md"]
    assert openpista.validate_skill(tmp_path / "odd") == ["SKILL.md is not a regular file"]


def test_validate_takes_skill_md_in_lower_case_and_prefers_the_other(tmp_path):
    folder = put_skill(tmp_path, file="skill.md")
    assert openpista.validate_skill(folder) == []
    put_skill(tmp_path, text="nothing")
    assert openpista.validate_skill(folder) == ["SKILL.md must start with YAML frontmatter (---)"]


def test_validate_prints_no_control_characters(tmp_path):
    folder = put_skill(tmp_path, text=skill_text(name=r'"\u001b[31mdog\n\u202etac"'))
    assert all(text.isprintable() for text in openpista.validate_skill(folder))


# Loading


def test_sample_skills(tmp_path):
    shutil.copytree(DATA, tmp_path / "skills")
    skills, problems = openpista.load_skills(tmp_path)
    assert [(skill.name, skill.warnings) for skill in skills] == [("disk-report", ()), ("wild-fields", ())]
    assert problems == []
    assert skills[1].description == "Use when: somebody brings a file from another program (it may look odd)."
    assert openpista.validate_skill(skills[0].folder) == []
    assert len(openpista.validate_skill(skills[1].folder)) == 1


def test_no_skills_folder_is_no_problem(tmp_path):
    assert openpista.load_skills(tmp_path) == ([], [])
    assert openpista.load_skills(tmp_path / "nowhere") == ([], [])


def test_skills_folder_that_is_a_file(tmp_path):
    (tmp_path / "skills").write_text("")
    skills, (problem,) = openpista.load_skills(tmp_path)
    assert skills == []
    assert problem.startswith(f"{tmp_path / 'skills'}: cannot be read")


def test_skills_come_by_name(tmp_path):
    for folder in ("zoo", "ant", "middle"):
        put_skill(tmp_path, folder)
    skills, _ = openpista.load_skills(tmp_path)
    assert [skill.name for skill in skills] == ["ant", "middle", "zoo"]
    assert skills[0] == Skill("ant", "Walks the dog.", tmp_path / "skills" / "ant")


def test_what_is_no_skill_is_passed_over(tmp_path):
    for folder in (".git", ".hidden", "node_modules"):
        put_skill(tmp_path, folder)
    (tmp_path / "skills" / "README.md").write_text("text")
    (tmp_path / "skills" / "empty").mkdir()
    put_skill(tmp_path, "group/deeper")
    assert openpista.load_skills(tmp_path) == ([], [])


USED_NAMES = [
    # folder, declared, called, a word of the warning or None
    ("dog", "dog", "dog", None),
    ("dog", "walk-dog", "walk-dog", "must match"),
    ("dog", "Walk Dog", "Walk Dog", "lowercase"),
    ("dog", "cafe\u0301", "caf\u00e9", "must match"),
    ("dog", "a" * 65, "dog", "exceeds 64"),
    ("dog", "../dog", "dog", "invalid characters"),
    ("dog", "/etc", "dog", "invalid characters"),
    ("dog", r'"a\\b"', "dog", "invalid characters"),
    ("dog", ".", "dog", "invalid characters"),
    ("dog", r'"a\nb"', "dog", "invalid characters"),
    ("dog", r'"\u001b[1mdog"', "dog", "invalid characters"),
    ("dog", r'"dog\u202Egod"', "dog", "invalid characters"),
    ("dog", "", "dog", "non-empty"),
    ("dog", "[a, b]", "dog", "non-empty"),
]


@pytest.mark.parametrize(("folder", "declared", "called", "warning"), USED_NAMES)
def test_name_and_warnings(tmp_path, folder, declared, called, warning):
    put_skill(tmp_path, folder, skill_text(name=declared))
    skill = load_one(tmp_path)
    assert skill.name == called
    assert any(warning in text for text in skill.warnings) if warning else skill.warnings == ()
    assert all(text.isprintable() for text in skill.warnings)


def test_missing_name_is_the_folders(tmp_path):
    put_skill(tmp_path, "dog", "---\ndescription: Barks.\n---\n")
    skill = load_one(tmp_path)
    assert (skill.name, skill.warnings) == ("dog", ("Missing required field in frontmatter: name",))


def test_long_description_is_loaded_with_a_warning(tmp_path):
    put_skill(tmp_path, text=skill_text(description="x" * 1100))
    skill = load_one(tmp_path)
    assert skill.warnings == ("Description exceeds 1024 character limit (1100 chars)",)
    assert len(skill.description) == 1100


LENIENT_FILES = [
    ("\ufeff" + skill_text(), "Walks the dog."),
    (skill_text().replace("\n", "\r\n"), "Walks the dog."),
    (skill_text().replace("\n", "\r"), "Walks the dog."),
    (b"---\nname: walk-dog\ndescription: caf\xe9\n---\n", "caf\ufffd"),
    (skill_text(description="|\n  one\n  two"), "one two"),
    (skill_text(description=r'"\u001b[2Jone\ttwo\u0000"'), "one two"),
]


@pytest.mark.parametrize(("text", "description"), LENIENT_FILES)
def test_lenient_file(tmp_path, text, description):
    put_skill(tmp_path, text=text)
    assert load_one(tmp_path).description == description


BROKEN_FILES = [
    ("", "must start with YAML frontmatter"),
    ("---\nname: dog\n", "not properly closed"),
    ("---\nname: dog\n---\n", "Missing required field in frontmatter: description"),
    (skill_text(description="' '"), "Field 'description' must be a non-empty string"),
    (skill_text(description=r'"\u0000"'), "Field 'description' must be a non-empty string"),
    (skill_text(description="'open"), "Invalid YAML in frontmatter"),
    (skill_text(body="x" * (256 * 1024)), "larger than 256 KiB"),
    (b"\x00\xff" * 100, "must start with YAML frontmatter"),
]


@pytest.mark.parametrize(("text", "problem"), BROKEN_FILES, ids=range(len(BROKEN_FILES)))
def test_broken_file_is_left_out_and_said(tmp_path, text, problem):
    put_skill(tmp_path, "bad", text)
    put_skill(tmp_path, "good")
    skills, (line,) = openpista.load_skills(tmp_path)
    assert [skill.name for skill in skills] == ["good"]
    assert line.startswith(f"{tmp_path / 'skills' / 'bad' / 'SKILL.md'}: ")
    assert problem in line


def test_of_two_with_one_name_the_first_counts(tmp_path):
    put_skill(tmp_path, "b", skill_text(name="dog", description="second"))
    put_skill(tmp_path, "a", skill_text(name="dog", description="first"))
    skills, (problem,) = openpista.load_skills(tmp_path)
    assert [skill.description for skill in skills] == ["first"]
    assert problem.startswith(str(tmp_path / "skills" / "b"))
    assert "'dog'" in problem


@pytest.mark.parametrize("value", ["true", "True", "'true'"])
def test_hidden(tmp_path, value):
    put_skill(tmp_path, text=skill_text(more=f"disable-model-invocation: {value}\n"))
    assert load_one(tmp_path).hidden


@pytest.mark.parametrize("value", ["false", "", "[true]", "no"])
def test_not_hidden(tmp_path, value):
    put_skill(tmp_path, text=skill_text(more=f"disable-model-invocation: {value}\n"))
    assert not load_one(tmp_path).hidden


def test_links_leading_outside_are_refused(tmp_path):
    outside = put_skill(tmp_path / "elsewhere", "outside")
    put_skill(tmp_path, "kept")
    skills = tmp_path / "skills"
    (skills / "by-folder").symlink_to(outside)
    (skills / "by-file").mkdir()
    (skills / "by-file" / "SKILL.md").symlink_to(outside / "SKILL.md")
    # A folder outside whose SKILL.md is a link back inside.
    back = tmp_path / "elsewhere" / "back"
    back.mkdir()
    (back / "SKILL.md").symlink_to(skills / "kept" / "SKILL.md")
    (skills / "there-and-back").symlink_to(back)
    loaded, problems = openpista.load_skills(tmp_path)
    assert [skill.name for skill in loaded] == ["kept"]
    assert [Path(line.split(": ")[0]).parent.name for line in problems] == ["by-file", "by-folder", "there-and-back"]
    assert all("leads outside" in line for line in problems)


def test_links_inside_and_a_linked_skills_folder_are_fine(tmp_path):
    real = tmp_path / "real"
    put_skill(real, "dog")
    (real / "skills" / "hound").symlink_to(real / "skills" / "dog")
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "skills").symlink_to(real / "skills")
    skills, (problem,) = openpista.load_skills(tmp_path / "workspace")
    assert [skill.name for skill in skills] == ["dog"]
    assert "'dog' already" in problem
    assert "Take the lead." in openpista.read_skill(skills[0])


def test_dead_links_loops_and_pipes_do_not_stop_us(tmp_path):
    put_skill(tmp_path, "good")
    skills = tmp_path / "skills"
    (skills / "dead").symlink_to(skills / "nothing")
    (skills / "loop").symlink_to(skills / "loop")
    for name in ("dead-file", "loop-file", "pipe", "folder"):
        (skills / name).mkdir()
    (skills / "dead-file" / "SKILL.md").symlink_to("nothing")
    (skills / "loop-file" / "SKILL.md").symlink_to("SKILL.md")
    os.mkfifo(skills / "pipe" / "SKILL.md")
    (skills / "folder" / "SKILL.md").mkdir()
    loaded, problems = openpista.load_skills(tmp_path)
    assert [skill.name for skill in loaded] == ["good"]
    assert len(problems) == 4


def test_folder_names_of_any_bytes(tmp_path):
    root = tmp_path / "skills"
    for raw in (b"bad\xff", b"two\nlines"):
        folder = os.path.join(os.fsencode(root), raw)
        os.makedirs(folder)
        with open(os.path.join(folder, b"SKILL.md"), "w") as file:
            file.write("---\ndescription: d\n---\n")
    skills, problems = openpista.load_skills(tmp_path)
    assert skills == []
    assert len(problems) == 2
    assert all(line.isprintable() and line.encode() for line in problems)


def test_at_most_2000_folders_are_looked_at(tmp_path):
    for number in range(2003):
        (tmp_path / "skills" / f"empty-{number:04}").mkdir(parents=True)
    put_skill(tmp_path, "zz-last")
    skills, (problem,) = openpista.load_skills(tmp_path)
    assert skills == []
    assert "2004 folders" in problem


def test_200_skills_load_at_once(tmp_path):
    for number in range(200):
        put_skill(tmp_path, f"skill-{number}", skill_text(name=f"skill-{number}", body="text\n" * 400))
    began = time.process_time()
    skills, problems = openpista.load_skills(tmp_path)
    took = time.process_time() - began
    assert (len(skills), problems) == (200, [])
    assert took < 0.3  # 0.04 measured; the limit is for a busy machine


# Finding and reading


def some_skills(*names, **options):
    return [Skill(name, f"About {name}.", Path("/nowhere") / name, **options) for name in names]


def test_find_skill():
    skills = some_skills("disk-report", "caf\u00e9", "walk-dog")
    assert openpista.find_skill(skills, "walk-dog") is skills[2]
    assert openpista.find_skill(skills, " " + unicodedata.normalize("NFD", "caf\u00e9")) is skills[1]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../walk-dog", "walk-dog/", "/", "walk-dog\0", "\ud800", "x" * 1_000_000]
)
def test_find_no_skill(name):
    skills = some_skills("walk-dog") + some_skills("walk-cat", hidden=True)
    with pytest.raises(SkillError) as caught:
        openpista.find_skill(skills, name)
    assert "walk-dog" in caught.value.hint
    assert "walk-cat" not in caught.value.hint
    assert len(str(caught.value)) < 700


def test_find_skill_names_the_nearest():
    with pytest.raises(SkillError, match="no skill 'walkdog', did you mean 'walk-dog'"):
        openpista.find_skill(some_skills("disk-report", "walk-dog"), "walkdog")
    with pytest.raises(SkillError) as caught:
        openpista.find_skill([], "walk-dog")
    assert caught.value.hint == "there are no skills"


def test_read_skill(tmp_path):
    shutil.copytree(DATA, tmp_path / "skills")
    skill = openpista.load_skills(tmp_path)[0][0]
    text = openpista.read_skill(skill)
    assert text.startswith('<skill_content name="disk-report">\n# Disk report\n')
    assert "Three dashes in the body end nothing.\n\nSkill directory: " in text
    assert text.endswith(
        f"Skill directory: {skill.folder}\n"
        "Relative paths in this skill are relative to the skill directory.\n\n"
        "<skill_resources>\n<file>run.sh</file>\n<file>references/keep.md</file>\n</skill_resources>\n</skill_content>"
    )


def test_read_skill_without_files(tmp_path):
    put_skill(tmp_path, "dog", skill_text(name='"a<b&\\""', body=""))
    text = openpista.read_skill(load_one(tmp_path))
    assert text.startswith('<skill_content name="a&lt;b&amp;&quot;">\n')
    assert "skill_resources" not in text


def test_resources_are_files_of_our_own_only(tmp_path):
    folder = put_skill(tmp_path)
    for path in ("b.txt", "a <1>.txt", "scripts/x.py", "scripts/SKILL.md", ".env", ".git/config", "node_modules/m.js"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "up").symlink_to("..")
    text = openpista.read_skill(load_one(tmp_path))
    files = [line[6:-7] for line in text.splitlines() if line.startswith("<file>")]
    assert files == ["a &lt;1&gt;.txt", "b.txt", "scripts/SKILL.md", "scripts/x.py"]


def test_at_most_50_resources(tmp_path):
    folder = put_skill(tmp_path)
    for number in range(60):
        (folder / f"{number}.txt").write_text("")
    text = openpista.read_skill(load_one(tmp_path))
    assert text.count("<file>") == 50
    assert "(there are more)" in text


def test_long_body_is_cut_and_it_is_said(tmp_path):
    put_skill(tmp_path, text=skill_text(body="x" * 60_001 + "yz"))
    text = openpista.read_skill(load_one(tmp_path))
    assert "x\n[3 more characters; the whole text is in SKILL.md]\n" in text
    assert len(text) < 60_500


def test_read_skill_that_changed_since(tmp_path):
    folder = put_skill(tmp_path)
    skill = load_one(tmp_path)
    (folder / "SKILL.md").unlink()
    with pytest.raises(SkillError, match="has lost its SKILL.md"):
        openpista.read_skill(skill)
    (tmp_path / "secret.md").write_text(skill_text(body="secret"))
    (folder / "SKILL.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(SkillError, match="leads outside"):
        openpista.read_skill(skill)


def test_read_skill_whose_folder_became_a_link_with_a_way_back(tmp_path):
    folder, other = put_skill(tmp_path), put_skill(tmp_path, "other")
    skill = openpista.find_skill(openpista.load_skills(tmp_path)[0], "walk-dog")
    moved = folder.rename(tmp_path / "moved")
    (moved / "SKILL.md").unlink()
    (moved / "SKILL.md").symlink_to(other / "SKILL.md")
    folder.symlink_to(moved)
    with pytest.raises(SkillError, match="leads outside"):
        openpista.read_skill(skill)


# Files and running


def test_skill_file(tmp_path):
    folder = put_skill(tmp_path)
    (folder / "references").mkdir()
    (folder / "references" / "a b.md").write_text("")
    (folder / "link.md").symlink_to("references/a b.md")
    skill = load_one(tmp_path)
    real = (folder / "references" / "a b.md").resolve()
    for relative in ("references/a b.md", "./references//a b.md", "link.md"):
        assert openpista.skill_file(skill, relative) == real


BAD_PATHS = [
    *("", ".", "/", "..", "../secret.md", "references/../../secret.md", "references/../SKILL.md", "..\\secret.md"),
    *("/etc/passwd", "\\etc\\passwd", "C:\\secret.md", "c:secret.md", "//host/share/x", "~/secret.md", "nothing.md"),
    *("SKILL.md\0", "\0", "\ud800", "x" * 300, "./" * 100_000 + "SKILL.md", "SKILL.md/x"),
    *("folder", "pipe", "out-file", "out-folder/secret.md", "other-skill", "loop", "dead"),
]


@pytest.mark.parametrize("relative", BAD_PATHS, ids=range(len(BAD_PATHS)))
def test_no_file_of_the_skill(tmp_path, relative):
    folder = put_skill(tmp_path)
    skill = load_one(tmp_path)
    other = put_skill(tmp_path, "other")
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "skills" / "secret.md").write_text("secret")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in [
        ("out-file", tmp_path / "secret.md"),
        ("out-folder", tmp_path),
        ("other-skill", other / "SKILL.md"),
        ("loop", "loop"),
        ("dead", "nothing"),
    ]:
        (folder / name).symlink_to(target)
    with pytest.raises(SkillError) as caught:
        openpista.skill_file(skill, relative)
    assert len(str(caught.value)) < 600
    assert str(caught.value).encode()


def test_skill_folder_that_became_a_link(tmp_path):
    folder = put_skill(tmp_path)
    skill = load_one(tmp_path)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(SkillError, match="leads outside"):
        openpista.skill_file(skill, "SKILL.md")
    with pytest.raises(SkillError, match="leads outside"):
        openpista.read_skill(skill)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("./\\ab~:\0é\ud800"), max_size=12))
def test_no_path_raises_anything_but_skill_error(relative):
    skill = Skill("skills", "d", DATA)
    with pytest.raises(SkillError):
        openpista.skill_file(skill, relative)


def test_skill_entry(tmp_path):
    folder = put_skill(tmp_path)
    skill = load_one(tmp_path)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "run.sh").write_text("")
    with pytest.raises(SkillError, match="cannot be run: it has none of run.sh, main.py, main.sh"):
        openpista.skill_entry(skill)
    for name in ("main.sh", "main.py", "run.sh"):  # from the last choice to the first
        (folder / name).write_text("")
        assert openpista.skill_entry(skill).name == name
    (folder / "run.sh").unlink()
    (folder / "run.sh").symlink_to("/bin/sh")
    with pytest.raises(SkillError, match="leads outside"):
        openpista.skill_entry(skill)


@pytest.mark.parametrize(
    ("name", "text"), [("run.sh", 'echo "$1-$2"'), ("main.py", "import sys; print('-'.join(sys.argv[1:]))")]
)
def test_skill_command_runs_without_the_executable_bit(tmp_path, name, text):
    folder = put_skill(tmp_path)
    (folder / name).write_text(text)
    command = openpista.skill_command(openpista.skill_entry(load_one(tmp_path)))
    assert command[0] == (sys.executable if name == "main.py" else shutil.which("bash"))
    assert subprocess.check_output([*command, "a b", "c"], text=True) == "a b-c\n"


def test_sh_where_there_is_no_bash(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert openpista.skill_command(Path("/x/main.sh")) == ["/bin/sh", "/x/main.sh"]


# The catalogue


def test_catalogue():
    skills = some_skills("ant", "bee") + some_skills("secret", hidden=True) + [Skill("<b>", 'a & "b" <i>', Path("/"))]
    text = openpista.skill_catalogue(skills)
    assert "skill.read" in text.splitlines()[0]
    assert text.splitlines()[1:] == [
        "<available_skills>",
        "<skill><name>ant</name><description>About ant.</description></skill>",
        "<skill><name>bee</name><description>About bee.</description></skill>",
        "<skill><name>&lt;b&gt;</name><description>a &amp; &quot;b&quot; &lt;i&gt;</description></skill>",
        "</available_skills>",
    ]


def test_no_skills_no_catalogue():
    assert openpista.skill_catalogue([]) == ""
    assert openpista.skill_catalogue(some_skills("secret", hidden=True)) == ""


def test_catalogue_clips_descriptions():
    text = openpista.skill_catalogue([Skill("a", "word " * 100, Path("/"))])
    description = text.split("<description>")[1].split("</description>")[0]
    assert len(description) <= 200
    assert description.endswith("word…")


@pytest.mark.parametrize("count", [1, 20, 60, 200, 2000])
@pytest.mark.parametrize("description", ["short", "&" * 1000, "{} {0} %s " * 30])
@pytest.mark.parametrize("size", [6, 64])
def test_catalogue_is_bounded_and_every_skill_counted(count, description, size):
    names = [f"{number:04}".ljust(size, "x") for number in range(count)]
    skills = [Skill(name, description, Path("/")) for name in names]
    text = openpista.skill_catalogue(skills)
    assert len(text) <= 4_000
    assert text == openpista.skill_catalogue(list(skills))
    shown = [name for name in names if name in text]
    assert shown == names[: len(shown)]
    assert shown == names or f" and {count - len(shown)} more\n</available_skills>" in text


def test_catalogue_is_the_same_after_every_load(tmp_path):
    for folder in ("zoo", "ant", "middle"):
        put_skill(tmp_path, folder)
    first, second = (openpista.skill_catalogue(openpista.load_skills(tmp_path)[0]) for _ in range(2))
    assert first == second
