"""The scripts of `completion`, in the shells themselves."""

import shlex
import shutil
import subprocess

import pytest

import openpista as o

CASES = [  # what is typed before the cursor -> what must be offered, and what must not
    ("openpista ", {"start", "auth", "doctor", "--config"}, {"login", "--yes"}),
    ("openpista st", {"start", "status", "stop"}, {"auth"}),
    ("openpista auth ", {"login", "logout", "status"}, {"start", "list"}),
    ("openpista auth login --", {"--provider", "--api-key", "--config"}, {"--yes", "login"}),
    ("openpista auth login --provider an", {"anthropic"}, {"openai"}),
    ("openpista --log-level ", {"debug", "warning"}, {"start"}),
    ("openpista --log-level debug cron ", {"add", "list", "remove"}, {"start"}),
    ("openpista completion ", {"bash", "zsh", "fish"}, set()),
    ("openpista run -", {"--execute", "--json"}, {"--fix"}),
    ("openpista service print --", {"--user", "--launchd"}, {"--json"}),
]


def script(shell, folder):
    path = folder / f"completion.{shell}"
    path.write_text(o.SHELLS[shell]())
    return path


def run(*argv, cwd):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=cwd, stdin=subprocess.DEVNULL)
    assert done.stderr == "" and done.returncode == 0, done
    return done.stdout


def needs(shell):
    return pytest.mark.skipif(not shutil.which(shell), reason=f"{shell} is not here")


@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_bash(typed, offered, not_offered, tmp_path):
    words = shlex.split(typed) + [""] * typed.endswith(" ")
    lines = f"""source {script("bash", tmp_path)}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
                _openpista; printf '%s\\n' "${{COMPREPLY[@]}}" """
    found = set(run("bash", "-uc", lines, cwd=tmp_path).split())
    assert found >= offered and not found & not_offered
    assert all(word.startswith(words[-1]) for word in found)


def test_bash_at_a_terminal(terminal, tmp_path):
    (tmp_path / "saved.backup").touch()
    screen = terminal(argv=["bash", "--norc", "--noprofile", "-i"], PS1="> ")
    screen.send(f"source {script('bash', tmp_path)}\r")
    screen.send("openpista aut\tlogo\t--prov\topenr\t\x01: \x05 \r")
    screen.wait("openpista auth logout --provider openrouter")
    screen.send("openpista restore sav\t\x01: \r")
    screen.wait("openpista restore saved.backup")


@needs("zsh")
def test_zsh(terminal, tmp_path):
    (tmp_path / "saved.backup").touch()
    screen = terminal(argv=["zsh", "-f", "-i"], PS1="> ", ZDOTDIR=str(tmp_path))
    screen.send(f"autoload -U compinit && compinit -D -u; source {script('zsh', tmp_path)}; echo loa''ded\r")
    screen.wait("loaded")
    screen.send("openpista aut\tlogo\t--prov\topenr\t")
    screen.wait("openpista auth logout --provider openrouter")
    screen.send("\x15openpista restore sav\t")
    screen.wait("openpista restore saved.backup")
    screen.send("\x15openpista stat\t\x01: \r")
    screen.wait("openpista status")
    screen.send("openpista cr\tres\t")
    screen.wait("openpista cron resume")


@needs("fish")
@pytest.mark.parametrize(("typed", "offered", "not_offered"), CASES)
def test_fish(typed, offered, not_offered, tmp_path):
    lines = f"source {script('fish', tmp_path)}; complete -C {shlex.quote(typed)}"
    found = {line.split("\t")[0] for line in run("fish", "--no-config", "-c", lines, cwd=tmp_path).splitlines()}
    if not typed.endswith("-"):  # fish offers options only behind a dash
        offered, not_offered = ({word for word in words if word[0] != "-"} for words in (offered, not_offered))
    assert found >= offered and not found & not_offered


@pytest.mark.parametrize("shell", o.SHELLS)
def test_each_command_and_option_is_there(shell, openpista):
    done = openpista("completion", shell)
    text = done.stdout.replace("-l ", "--")
    assert done.stderr == "" and done.returncode == 0
    for name, entry in o.COMMANDS.items():
        assert name in text
        assert all(names[-1] in text for names, _ in entry.options if names[0].startswith("--"))


def test_another_shell(openpista):
    done = openpista("completion", "tcsh")
    assert done.returncode == 2 and "tcsh" in done.stderr
