"""Tools: what they take, what they answer, who is asked first, and how much the model must read of them."""

import asyncio
import json
import os
import re
import signal
from datetime import datetime
from pathlib import Path

import pytest

import openpista
from openpista import (
    TOOLS,
    Bench,
    Decision,
    Gate,
    Message,
    Outcome,
    Redactor,
    Request,
    Role,
    Toolbox,
    ToolCall,
    ToolResult,
    ToolsConfig,
    misfit,
)

FREE = Gate("never", None)
CANARY = "canary-0123456789"


@pytest.fixture
def bench(tmp_path):
    """A bench with one skill, `dog`, in a workspace, and a loaded secret."""
    place = tmp_path / "workspace" / "skills" / "dog"
    (place / "notes").mkdir(parents=True)
    (place / "SKILL.md").write_text("---\nname: dog\ndescription: Walks the dog.\n---\nTake the lead.\n")
    (place / "run.sh").write_text('echo "args: $*"; pwd; cat; exit ${CODE:-0}\n')
    (place / "notes" / "a.txt").write_text("a note\n")
    (place / "large.txt").write_text("가" * 400_000)
    (tmp_path / "secret.txt").write_text("not yours")
    (place / "out.txt").symlink_to(tmp_path / "secret.txt")
    skills, problems = openpista.load_skills(tmp_path / "workspace")
    assert not problems
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MY_TOKEN": "hidden", "KEPT_TOKEN": "kept"}
    settings = ToolsConfig(timeout=10, output_limit=2_000, workdir=str(tmp_path), keep_env=("KEPT_TOKEN",))
    return Bench(settings, environ, tmp_path / "home", Redactor([CANARY]), tuple(skills))


@pytest.fixture
def box(bench):
    return Toolbox(bench)


def call(tool, call_id="c1", /, **arguments):
    return ToolCall(call_id, tool, arguments)


def run(box, tool, /, **arguments):
    return asyncio.run(box.run(call(tool, **arguments)))


def refusal(box, asked, gate=FREE):
    return asyncio.run(box.refusal(asked, gate))


def sh(box, command, **arguments):
    return run(box, "system.run", command=command, **arguments)


# What is asked for

WRONG = [  # tool, arguments -> what is said; '' if they are fine
    ("system.run", {"command": "ls"}, ""),
    ("system.run", {"command": ""}, ""),
    ("system.run", {"command": "한 👍\n\t"}, ""),
    ("system.run", {}, "arguments: 'command' is missing"),
    ("system.run", {"command": None}, "command must be a string, not null"),
    ("system.run", {"command": 7}, "command must be a string, not 7"),
    ("system.run", {"command": ["ls", "-l"]}, 'command must be a string, not ["ls","-l"]'),
    ("system.run", {"command": "a\0b"}, "command must not hold a NUL character"),
    ("system.run", {"command": "a\ud800b"}, "command must be text that UTF-8 can hold"),
    ("system.run", {"comand": "ls"}, "arguments: 'command' is missing"),
    ("system.run", {"command": "ls", "timout": 5}, "arguments: unknown 'timout', did you mean 'timeout'?"),
    ("system.run", {"command": "ls", "zzz": 5}, "arguments: unknown 'zzz'"),
    ("system.run", {"command": "ls", "timeout": None, "env": None, "workdir": None, "background": None}, ""),
    ("system.run", {"command": "ls", "timeout": 1}, ""),
    ("system.run", {"command": "ls", "timeout": 10**30}, ""),
    ("system.run", {"command": "ls", "timeout": 0}, "timeout must be 1 or more, not 0"),
    ("system.run", {"command": "ls", "timeout": -1}, "timeout must be 1 or more, not -1"),
    ("system.run", {"command": "ls", "timeout": True}, "timeout must be a whole number, not true"),
    ("system.run", {"command": "ls", "timeout": "5"}, 'timeout must be a whole number, not "5"'),
    ("system.run", {"command": "ls", "timeout": 1.5}, "timeout must be a whole number, not 1.5"),
    ("system.run", {"command": "ls", "background": 1}, "background must be true or false, not 1"),
    ("system.run", {"command": "ls", "background": "yes"}, 'background must be true or false, not "yes"'),
    ("system.run", {"command": "ls", "workdir": "a\0"}, "workdir must not hold a NUL character"),
    ("system.run", {"command": "ls", "env": {}}, ""),
    ("system.run", {"command": "ls", "env": {"A": "b"}}, ""),
    ("system.run", {"command": "ls", "env": {"A": 1}}, "A must be a string, not 1"),
    ("system.run", {"command": "ls", "env": {"A": None}}, "A must be a string, not null"),
    ("system.run", {"command": "ls", "env": {"A": "\0"}}, "A must not hold a NUL character"),
    ("system.run", {"command": "ls", "env": ["A=b"]}, 'env must be an object, not ["A=b"]'),
    ("skill.read", {"name": "dog"}, ""),
    ("skill.read", {"name": "dog", "file": None}, ""),
    ("skill.read", {"name": "dog", "file": 1}, "file must be a string, not 1"),
    ("skill.read", {}, "arguments: 'name' is missing"),
    ("skill.run", {"name": "dog", "stdin": {}, "timeout": 5}, "stdin must be a string, not {}"),
    ("skill.run", {"name": "dog", "args": ["a", "b"]}, ""),
    ("skill.run", {"name": "dog", "args": "a b"}, 'args must be a list, not "a b"'),
    ("skill.run", {"name": "dog", "args": ["a", 1]}, "args[1] must be a string, not 1"),
    ("skill.run", {"name": "dog", "args": ["a", None]}, "args[1] must be a string, not null"),
    ("skill.run", {"name": "dog", "args": ["\0"]}, "args[0] must not hold a NUL character"),
]


@pytest.mark.parametrize(("name", "arguments", "wrong"), WRONG)
def test_arguments(box, name, arguments, wrong):
    assert misfit(arguments, TOOLS[name].spec.parameters) == wrong
    said = refusal(box, ToolCall("c1", name, arguments))
    if wrong:
        assert said.startswith(f"{wrong}. The parameters of {name} are ")
        assert json.loads(said.partition(" are ")[2]) == TOOLS[name].spec.parameters
    else:
        assert said == ""


def test_every_argument_of_every_tool_has_a_case():
    tried = {(name, key) for name, arguments, _ in WRONG for key in arguments}
    assert {(name, key) for name, tool in TOOLS.items() for key in tool.spec.parameters["properties"]} <= tried


def test_what_cannot_be_read_goes_back(box):
    said = refusal(box, ToolCall("c1", "system.run", {}, "the arguments are not valid JSON: line 1"))
    assert said.startswith("the arguments are not valid JSON: line 1. The parameters of system.run are {")


def test_a_tool_that_is_not_there(box, bench):
    said = refusal(box, call("system.rum"))
    assert said == (
        "there is no tool 'system.rum', did you mean 'system.run'?; there are: system.run, skill.read, skill.run"
    )
    assert "there are: system.run" in refusal(Toolbox(bench._replace(skills=())), call("skill.read", name="dog"))


def test_what_is_said_of_a_wrong_call_stays_short(box):
    wrong = [
        call("x" * 1_000_000),
        call("system.run", command=["x" * 1_000_000]),
        call("system.run", **{"x" * 1_000_000: 1, "command": "ls"}),
        call("system.run", command="ls", env={"x" * 1_000_000: 1}),
    ]
    assert [len(refusal(box, each)) < 3_000 for each in wrong] == [True] * 4


# What the tools do


def test_system_run(box, tmp_path):
    assert sh(box, "echo hi") == ToolResult("c1", "hi")
    assert sh(box, "true") == ToolResult("c1", "(no output)")
    assert sh(box, "echo oh; exit 3") == ToolResult("c1", "oh\n[exit code 3]", is_error=True)
    assert sh(box, "exit 4") == ToolResult("c1", "[exit code 4]", is_error=True)
    assert sh(box, "kill -9 $$") == ToolResult("c1", "[killed by signal 9, SIGKILL]", is_error=True)
    assert sh(box, "echo oh; sleep 100", timeout=1) == ToolResult(
        "c1", "oh\n[timed out after 1 s and was ended; what it had printed is above]", is_error=True
    )
    assert sh(box, "pwd").output == str(tmp_path)
    assert sh(box, "pwd", workdir="/").output == "/"
    assert sh(box, "pwd", workdir="~").output == str(Path.home())
    assert sh(box, "pwd", timeout=None, workdir=None, env=None, background=None).output == str(tmp_path)


def test_a_relative_folder_is_one_in_the_usual_folder(box, tmp_path):
    assert sh(box, "pwd", workdir="workspace").output == str(tmp_path / "workspace")


CANNOT = [
    ({"workdir": "/no/such"}, "no folder /no/such"),
    ({"workdir": "~nosuchuser/x"}, "nosuchuser"),
    ({"workdir": "/" + "x" * 5_000}, "no folder"),
    ({"workdir": "\ud800"}, ""),
    ({"env": {"A=B": "x"}}, "environment variable name"),
    ({"env": {"": "x"}}, ""),
    ({"env": {"A\0": "x"}}, "null byte"),
    ({"env": {"A": "x" * 200_000}}, "too long"),
]


@pytest.mark.parametrize(("arguments", "words"), CANNOT)
def test_what_system_run_cannot_do_is_a_result(box, arguments, words):
    result = run(box, "system.run", **{"command": "true"} | arguments)
    assert words in result.output
    assert len(result.output) < 6_000
    assert result.is_error or arguments == {"env": {"": "x"}}
    assert "failed:" not in result.output, "it is not one of our own errors"


def test_environment_of_a_command(box):
    said = sh(box, "env", env={"MINE": "a b", "PATH": "/usr/bin:/bin"}).output.splitlines()
    assert "MINE=a b" in said
    assert "PATH=/usr/bin:/bin" in said
    assert "KEPT_TOKEN=kept" in said
    assert not [line for line in said if "hidden" in line]


def test_a_command_of_1_mb(box):
    assert sh(box, ": " + "x" * 1_000_000 + "\necho $0 done").output.endswith("done")
    assert sh(box, "echo " + "가" * 41_000 + " | wc -c").output == "123001"
    assert sh(box, "exit 7 # " + "x" * 200_000).output == "[exit code 7]"
    assert sh(box, "readlink /proc/self/fd/0 # " + "x" * 200_000).output == "/dev/null"


def test_output_is_bounded(box):
    said = sh(box, "seq 1 100000").output
    assert len(said) < 2_100
    assert re.search(r"\[… [\d,]+ characters left out …\]", said)


def test_secrets_do_not_reach_the_model(box, tmp_path):
    (tmp_path / "key").write_text(CANARY)
    key = "sk-" + "a" * 40
    assert sh(box, f"cat key; echo; echo {key}; exit 1").output == "[secret]\n[secret]\n[exit code 1]"
    assert CANARY not in sh(box, "true", workdir=f"/{CANARY}").output
    assert CANARY not in run(box, "skill.read", name=CANARY).output


def test_what_cannot_be_stored_is_replaced(box):
    assert sh(box, r"printf 'a\0b\xff'").output == "a␀b�"


def test_in_the_background(box, bench, tmp_path):
    result = sh(box, "echo begun; sleep 1000", background=True, env={"A": "b"})
    pid, log = re.fullmatch(r"started in the background: pid (\d+) .* output in (\S+)", result.output).groups()
    try:
        assert not result.is_error
        assert Path(log).parent == bench.home / "jobs"
        assert os.getpgid(int(pid)) == int(pid)
    finally:
        os.killpg(int(pid), signal.SIGKILL)


def test_time_limits(bench):
    bench = bench._replace(settings=ToolsConfig(timeout=30, max_timeout=300))
    assert [bench.seconds(wanted) for wanted in (None, 1, 299, 300, 301, 10**9)] == [30, 1, 299, 300, 300, 300]


def test_a_usual_folder_that_is_gone_is_an_error(bench):
    with pytest.raises(openpista.ConfigError, match=r"no folder /no/such; see \[tools\] workdir"):
        bench._replace(settings=ToolsConfig(workdir="/no/such")).folder()


HOW_IT_ENDED = [
    (Outcome("", 0), ""),
    (Outcome("x", 1), "[exit code 1]"),
    (Outcome("x", 255), "[exit code 255]"),
    (Outcome("x", -15), "[killed by signal 15, SIGTERM]"),
    (Outcome("x", -40), "[killed by signal 40]"),
    (Outcome("x", None), "[could not be killed; it may still be running]"),
    (Outcome("x", -9, True), "[timed out after 30 s and was ended; what it had printed is above]"),
    (Outcome("x", 0, True), "[timed out after 30 s and was ended; what it had printed is above]"),
]


@pytest.mark.parametrize(("outcome", "line"), HOW_IT_ENDED)
def test_how_it_ended(outcome, line):
    assert openpista.how_it_ended(outcome, 30) == line


def test_a_child_that_timed_out_and_still_runs_is_not_called_ended():
    said = openpista.how_it_ended(Outcome("x", None, True), 30)
    assert "timed out" in said
    assert "still be running" in said


def test_skill_read(box):
    assert "Take the lead." in run(box, "skill.read", name="dog").output
    assert run(box, "skill.read", name="dog", file="notes/a.txt").output == "a note\n"
    large = run(box, "skill.read", name="dog", file="large.txt")
    assert "characters left out" in large.output
    assert len(large.output) < openpista.SKILL_BODY_CHARS + 100


@pytest.mark.parametrize("tool", ["skill.read", "skill.run"])
@pytest.mark.parametrize("name", ["..", "../dog", "dog/..", "/etc", "dgo", "", "x" * 100_000, "\0", "\ud800"])
def test_a_skill_that_is_not_there(box, tool, name):
    result = run(box, tool, name=name)
    assert result.is_error
    assert result.output.startswith("no skill ")
    assert len(result.output) < 1_000


@pytest.mark.parametrize(
    "file", ["..", "../x", "notes/../../x", "/etc/passwd", "out.txt", "notes", "nothing", "..\\x", "a\0b", "x" * 5_000]
)
def test_no_file_outside_of_a_skill_is_read(box, file):
    result = run(box, "skill.read", name="dog", file=file)
    assert result.is_error
    assert "not yours" not in result.output
    assert "failed:" not in result.output


def test_skill_run(box, bench):
    folder = bench.skills[0].folder
    assert run(box, "skill.run", name="dog", args=["a", "b c", "$(d)"]).output == f"args: a b c $(d)\n{folder}"
    assert run(box, "skill.run", name="dog", stdin="from stdin").output == f"args: \n{folder}\nfrom stdin"
    (folder / "run.sh").write_text("env; exit 5")
    failed = run(box, "skill.run", name="dog")
    assert failed.is_error
    assert failed.output.endswith("[exit code 5]")
    assert "hidden" not in failed.output
    (folder / "run.sh").write_text("echo on; sleep 100")
    assert run(box, "skill.run", name="dog", timeout=1).output.startswith("on\n[timed out after 1 s")
    (folder / "run.sh").unlink()
    assert "cannot be run" in run(box, "skill.run", name="dog").output


def test_a_tool_that_breaks_is_a_result(box):
    class Broken(openpista.Tool):
        spec = openpista.ToolSpec("broken", "", openpista.schema())

        async def run(self, arguments):
            raise RuntimeError(f"oh no, {CANARY}")

    box.tools["broken"] = Broken(None)
    assert run(box, "broken") == ToolResult("c1", "broken failed: RuntimeError('oh no, [secret]')", is_error=True)


# The gate


def answers(*decisions):
    """Somebody who gives these answers, one after the other, and remembers the questions."""
    questions, left = [], list(decisions)

    async def approve(asked, danger):
        questions.append((asked.arguments.get("command"), danger))
        return left.pop(0)

    return approve, questions


GATES = [  # mode, command, answer (None: nobody is there) -> runs, was asked
    ("never", "rm -rf /tmp/x", None, True, False),
    ("never", "rm -rf /tmp/x", "deny", True, False),
    ("risky", "ls", None, True, False),
    ("risky", "ls", "deny", True, False),
    ("risky", "rm -rf /tmp/x", None, False, False),
    ("risky", "rm -rf /tmp/x", "deny", False, True),
    ("risky", "rm -rf /tmp/x", "once", True, True),
    ("risky", "rm -rf /tmp/x", "always", True, True),
    ("always", "ls", None, False, False),
    ("always", "ls", "deny", False, True),
    ("always", "ls", "once", True, True),
    ("always", "ls", "always", True, True),
]


@pytest.mark.parametrize(("mode", "command", "answer", "runs", "asked"), GATES)
def test_gate(box, mode, command, answer, runs, asked):
    approve, questions = answers(Decision(answer)) if answer else (None, [])
    said = refusal(box, call("system.run", command=command), Gate(mode, approve))
    assert (said == "", bool(questions)) == (runs, asked)
    assert runs or "denied" in said
    assert answer or runs or "nobody can be asked" in said


def test_every_mode_and_decision_has_a_case():
    assert {case[0] for case in GATES} == set(openpista.CHOICES["tools.approval"])
    assert {case[2] for case in GATES} - {None} == set(Decision)


def test_what_must_be_asked(box):
    approve, questions = answers(*[Decision.ONCE] * 9)
    gate = Gate("risky", approve)
    for arguments in (
        {"command": "sleep 5", "background": True},
        {"command": "ls", "env": {"LD_PRELOAD": "/tmp/x.so"}},
        {"command": "ls", "env": {"x; rm -rf /": "1"}},
        {"command": "true\nrm -rf x"},
    ):
        before = len(questions)
        assert refusal(box, call("system.run", **arguments), gate) == ""
        assert len(questions) == before + 1, arguments
    for each in (
        call("system.run", command="ls", env={"LANG": "C"}),
        call("skill.read", name="dog"),
        call("skill.run", name="dog"),
    ):
        assert refusal(box, each, gate) == ""
        assert len(questions) == 4


def test_deny_is_final_for_the_turn(box):
    approve, questions = answers(Decision.DENY)
    gate = Gate("risky", approve)
    assert refusal(box, call("system.run", command="rm a"), gate).startswith("denied by the person")
    for command in ("rm a", "mv a b"):
        assert refusal(box, call("system.run", command=command), gate).startswith("not asked")
    assert refusal(box, call("system.run", command="ls"), gate) == ""
    assert len(questions) == 1


def test_always_holds_for_the_same_call_only(box):
    approve, questions = answers(Decision.ALWAYS, Decision.ONCE, Decision.DENY, Decision.DENY)
    allowed = set()
    gate = Gate("risky", approve, allowed)
    asked = [{"command": "rm a"}, {"command": "rm a"}, {"command": "rm a b"}]
    for arguments in asked:
        assert refusal(box, call("system.run", **arguments), gate) == ""
    assert len(questions) == 2
    assert refusal(box, call("system.run", "other id", command="rm a"), gate) == ""
    later = Gate("risky", approve, allowed)
    assert refusal(box, call("system.run", command="rm a"), later) == ""
    assert refusal(box, call("system.run", command="rm a", workdir="/"), later) != ""
    assert refusal(box, call("system.run", command="rm a"), later) == "", "a no does not take back an always"
    assert len(questions) == 3


def test_one_question_at_a_time(box):
    asking = most = 0

    async def approve(asked, danger):
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await asyncio.sleep(0.01)
        asking -= 1
        return Decision.DENY if asked.arguments["command"] == "rm 3" else Decision.ONCE

    async def all_at_once():
        gate = Gate("risky", approve)
        calls = [call("system.run", command=f"rm {i}") for i in range(1, 7)]
        return await asyncio.gather(*(box.refusal(each, gate) for each in calls))

    said = asyncio.run(all_at_once())
    assert most == 1
    assert [text == "" for text in said] == [True, True, False, False, False, False], "those that wait hear the no too"


def test_a_question_that_is_cancelled_lets_the_next_one_through(box):
    async def both():
        never = asyncio.Event()

        async def approve(asked, danger):
            await never.wait() if asked.arguments["command"] == "rm 1" else None
            return Decision.ONCE

        gate = Gate("risky", approve)
        first = asyncio.create_task(box.refusal(call("system.run", command="rm 1"), gate))
        await asyncio.sleep(0)
        second = asyncio.create_task(box.refusal(call("system.run", command="rm 2"), gate))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(both()) == ""


# What the model reads


def test_tools_are_complete():
    names = openpista.wire_names(tool.spec for tool in TOOLS.values())
    assert len(set(names.values())) == len(TOOLS)
    for name, tool in TOOLS.items():
        assert tool.spec.name == name
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}", names[name])
        assert tool.spec.description
        assert tool.run is not openpista.Tool.run
        check_schema(tool.spec.parameters)


def check_schema(schema):
    """Only what `misfit` knows, so that nothing is promised that nobody checks."""
    assert schema["type"] in openpista.JSON_TYPES
    assert set(schema) <= {"type", "description", "properties", "required", "additionalProperties", "items"}
    assert set(schema.get("required", ())) <= set(schema.get("properties", ()))
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    inner += [other for other in [schema.get("additionalProperties")] if isinstance(other, dict)]
    for part in inner:
        check_schema(part)


@pytest.mark.parametrize("format", openpista.FORMATS)
def test_a_first_request_is_small(box, bench, format):
    """DESIGN 9 and 11: prompt and tools under 1,500 tokens at three bytes each, the whole body under 6,000 bytes."""
    where = openpista.describe_machine(Path("/home/somebody"), {"USER": "somebody"})
    system = openpista.build_prompt("", bench.skills, where, "2026-03-01")
    assert len(system.encode()) + len(openpista.to_json(box.specs).encode()) < 1_500 * 3
    request = Request(system, (Message(Role.USER, "Which disk is full?"),), box.specs, model="a-model-20260301")
    body = openpista.FORMATS[format].encode(request)
    assert len(json.dumps(body).encode()) < 6_000


def test_the_prompt_keeps_its_prefix(bench):
    today = f"{datetime(2026, 3, 1):%Y-%m-%d}"
    one = openpista.build_prompt("Be kind.", bench.skills, "Commands run here.", today)
    two = openpista.build_prompt("Be kind.", bench.skills, "Commands run here.", "2026-03-02")
    assert one.startswith(openpista.SYSTEM_PROMPT)
    assert one[:-10] == two[:-10] != one
    assert "Be kind." in one
    assert "dog" in one


def test_no_half_of_a_secret_where_output_is_cut(box, bench, tmp_path):
    """The key lies across the place where the head ends."""
    (tmp_path / "long").write_text("." * 990 + CANARY + "." * 5_000)
    shown = sh(box, "cat long").output
    assert "canary" not in shown and "characters left out" in shown
    skill = bench.skills[0].folder
    half = openpista.SKILL_BODY_CHARS // 2
    (skill / "long.txt").write_text("." * (half - 10) + CANARY + "." * 3 * half)
    shown = run(box, "skill.read", name="dog", file="long.txt").output
    assert "canary" not in shown and "characters left out" in shown
