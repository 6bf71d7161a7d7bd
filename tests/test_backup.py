"""Backup and restore: what is in one, beside a running daemon, and that a bad one changes nothing."""

import os
import pathlib
import shutil
import sqlite3
import stat
import subprocess
import sys

import launcher
import pytest
from test_daemon import OFFLINE, house, until  # noqa: F401 - a fixture

import openpista as o

WORDS = "correct horse battery"
LOGIN = '[openai]\napi_key = "sk-not-a-real-key-123456"\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a home with something in everything, and a backup of it."""
    folder = tmp_path_factory.mktemp("made")
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(OFFLINE)
    (home / "credentials.toml").write_text(LOGIN)
    (home / "credentials.toml").chmod(0o600)
    (home / "gateway.pem").write_text(o.new_certificate())
    skill = home / "workspace/skills/disk"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: disk\ndescription: Looks.\n---\nLook.\n")
    (skill / "run.sh").write_text("echo hi\n")
    (skill / "run.sh").chmod(0o755)
    (skill / "link").symlink_to("/etc/hostname")
    with o.Store(home / "memory.db") as store:
        session = store.session("main")
        store.append(session, o.Message(o.Role.USER, "hello"))
        waits = o.Inbox(store).add(o.Event("job", "1", "main", "waits"))
        o.Approvals(store).ask(waits.id, o.ToolCall("a", "system.run", {"command": "rm x"}), "rm deletes", 60)
        o.Grants(store, "main").add("[]")
        o.People(store, "telegram").decide("42", "allowed", "Ada")
        o.Chats(store).turn_to("telegram:42", "main")
        o.Chats(store).advance("telegram:7", 100)
        o.Outbox(store).add("telegram:1", {}, ["unsent"])
        store.db.execute("INSERT INTO tickets VALUES ('00', '{}', '2100')")
    env = launcher.inherited() | {"HOME": str(folder), "OPENPISTA_HOME": str(home), "TERM": "xterm"}
    done = launcher.run(["backup", "saved"], env, folder, input=WORDS + "\n")
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.endswith(" bytes: memory.db, config.toml, credentials.toml, gateway.pem, skills\n")
    return folder


@pytest.fixture
def lived_in(made, home):
    """A home with something in everything."""
    return pathlib.Path(shutil.copytree(made / "home", home, symlinks=True))


@pytest.fixture
def backup(made, tmp_path):
    """A backup of it, as a file."""
    return pathlib.Path(shutil.copy2(made / "saved", tmp_path))


def contents(folder):
    """Every file under a folder: {name: (mode, bytes)}."""
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


def test_there_and_back(lived_in, backup, openpista, tmp_path):
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    sealed = backup.read_bytes()
    assert not any(word in sealed for word in (b"hello", b"sk-not", b"PRIVATE", b"memory.db"))
    other = tmp_path / "other"
    done = openpista("restore", "saved", input=WORDS, env={"OPENPISTA_HOME": str(other)})
    assert done.returncode == 0 and done.stdout.endswith(
        "restored\n1 message had no answer yet: ask again, if that is still wanted\n"
    )
    before, after = contents(lived_in), contents(other)
    before.pop("workspace/skills/disk/link")
    assert set(after) == set(before)
    assert {mode for mode, _ in after.values()} == {0o600, 0o700}
    assert after["workspace/skills/disk/run.sh"] == (0o700, b"echo hi\n")
    for name in ("config.toml", "credentials.toml", "gateway.pem"):
        assert after[name][1] == before[name][1]
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    with o.Store(other / "memory.db") as store:
        [entry] = store.transcript(store.find_session("main"))
        assert entry.message.text == "hello"
        assert not o.Inbox(store).waiting() and not o.Outbox(store).unsent(), (
            "what may have been done is not done again"
        )
        assert not store.db.execute("SELECT * FROM tickets").fetchall()
        assert o.Approvals(store).get(1).state == "withdrawn", "its turn is over"
        assert o.Grants(store, "main").list() == ["[]"] and o.People(store, "telegram").allowed() == ["42"]
        chats = o.Chats(store)
        assert chats.session("telegram:42") == "main" and chats.position("telegram:7")[0] == 100


def test_what_is_there_is_put_aside(lived_in, backup, openpista, tmp_path):
    with o.Store(lived_in / "memory.db") as store:
        store.append(store.session("later"), o.Message(o.Role.USER, "since"))
    (lived_in / "credentials.toml").write_text("# other\n")
    done = openpista("restore", "saved", input=WORDS)
    assert done.returncode == 0, done
    [aside] = lived_in.glob("before-restore-*")
    assert f"what was there is in {aside}" in done.stdout
    assert (aside / "credentials.toml").read_text() == "# other\n"
    assert (lived_in / "credentials.toml").read_text() == LOGIN
    with o.Store(aside / "memory.db") as store:
        assert store.find_session("later")
    with o.Store(lived_in / "memory.db") as store, pytest.raises(o.StoreError):
        store.find_session("later")
    assert (aside / "skills/disk/run.sh").exists() or list(
        lived_in.glob("workspace/before-restore-*/skills/disk/run.sh")
    )


def test_prompts_in_files(lived_in, openpista, tmp_path):
    (tmp_path / "else.md").write_text("of another place")
    agents = ("a", "a.md"), ("b", "a.md"), ("c", "../else.md"), ("d", "gone.md")
    text = "".join(f"[agents.{name}]\nprompt_file = '{path}'\n" for name, path in agents)
    (lived_in / "config.toml").write_text(OFFLINE + text)
    (lived_in / "a.md").write_text("be brief")
    done = openpista("backup", "saved", input=WORDS)
    assert done.stdout.endswith("skills, prompts/a.md\n") and "else.md is not in" in done.stderr, done
    (lived_in / "a.md").write_text("be long")
    assert openpista("restore", "saved", input=WORDS).returncode == 0
    assert (lived_in / "a.md").read_text() == "be brief"
    [aside] = lived_in.glob("before-restore-*")
    assert (aside / "a.md").read_text() == "be long"


def test_a_dry_run_changes_nothing(lived_in, backup, openpista):
    before = contents(lived_in)
    done = openpista("restore", "saved", "--dry-run", input=WORDS)
    assert done.returncode == 0 and contents(lived_in) == before
    assert "nothing was changed" in done.stdout
    assert {"memory.db", "config.toml", "credentials.toml", "gateway.pem", "skills"} <= set(done.stdout.split())


def cut(data):
    return data[:-1]


def cut_at_a_piece(data):
    """Without the last piece, so that what is left is whole pieces."""
    size = len(o.BACKUP_HEAD) + 32
    return data[: size + o.BACKUP_PIECE + 16]


def changed(data):
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


def swapped(data):
    start, size = len(o.BACKUP_HEAD) + 32, o.BACKUP_PIECE + 16
    return data[:start] + data[start + size : start + 2 * size] + data[start : start + size] + data[start + 2 * size :]


def test_a_damaged_file_changes_nothing(lived_in, openpista, tmp_path):
    (lived_in / "history").write_bytes(os.urandom(3 * o.BACKUP_PIECE))  # several pieces
    assert openpista("backup", "saved", input=WORDS).returncode == 0
    path = tmp_path / "saved"
    whole, before = path.read_bytes(), contents(lived_in)
    for spoil in (cut, cut_at_a_piece, changed, swapped, lambda data: data + b"x"):  # one backup for all: it is dear
        path.write_bytes(spoil(whole))
        done = openpista("restore", "saved", input=WORDS)
        assert done.returncode == 1 and "saved is damaged or cut off, at piece" in done.stderr, spoil
        assert contents(lived_in) == before, spoil


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no backup"),
        (b"openpista backup 1\n", "is no backup"),
        (b"openpista backup 2\n" + b"x" * 90, "of a newer openpista"),
        (b"SQLite format 3\0", "is no backup"),
    ],
)
def test_no_backup_at_all(data, said, openpista, tmp_path):
    (tmp_path / "saved").write_bytes(data)
    done = openpista("restore", "saved", input=WORDS)
    assert done.returncode == 1 and said in done.stderr


def test_a_wrong_passphrase(lived_in, backup, openpista):
    before = contents(lived_in)
    done = openpista("restore", "saved", input="something else")
    assert (done.returncode, done.stderr) == (3, "openpista: this is not the passphrase of saved\n")
    assert contents(lived_in) == before
    assert openpista("restore", "saved", input="").returncode == 2
    assert openpista("restore", "nowhere", input=WORDS).returncode == 2


def test_a_passphrase_in_a_file(lived_in, openpista, tmp_path):
    (tmp_path / "words").write_text(WORDS + "\nmore\n")
    assert openpista("backup", "saved", "--passphrase-file", "words").returncode == 0
    assert openpista("restore", "saved", "--dry-run", input=WORDS).returncode == 0
    (tmp_path / "words").write_text("short\n")
    done = openpista("backup", "saved", "--passphrase-file", "words")
    assert done.returncode == 2 and "8 letters at least" in done.stderr
    assert openpista("backup", "saved", "--passphrase-file", "none").returncode == 2


def test_a_passphrase_at_a_terminal(lived_in, terminal):
    screen = terminal("backup", "saved")
    screen.wait("Passphrase:")
    screen.send(WORDS + "\r")
    screen.wait("The same again:")
    screen.send(WORDS + "x\r")
    screen.wait("the two are not the same")
    assert WORDS not in screen.text
    assert screen.end() == 2


def test_no_other_file_is_written_over(lived_in, backup, openpista, tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = openpista("backup", "mine", input=WORDS)
    assert done.returncode == 1 and "is no backup" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
    assert openpista("backup", "saved", input=WORDS).returncode == 0, "an older backup is"
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith((".saved", ".backup"))]


def test_a_configuration_that_is_a_link(lived_in, openpista, tmp_path):
    (lived_in / "config.toml").rename(tmp_path / "dotfiles.toml")
    (lived_in / "config.toml").symlink_to(tmp_path / "dotfiles.toml")
    assert openpista("backup", "saved", input=WORDS).returncode == 0
    assert openpista("restore", "saved", input=WORDS).returncode == 0
    assert not (lived_in / "config.toml").is_symlink() and (lived_in / "config.toml").read_text() == OFFLINE
    assert (tmp_path / "dotfiles.toml").read_text() == OFFLINE


def test_nothing_to_back_up(openpista):
    done = openpista("backup", "saved", input=WORDS)
    assert done.returncode == 1 and "nothing to back up" in done.stderr


def test_a_damaged_database_is_not_backed_up(lived_in, openpista, tmp_path):
    path = lived_in / "memory.db"
    path.write_bytes(path.read_bytes()[:8_192] + b"\xff" * 4_096 + path.read_bytes()[12_288:])
    done = openpista("backup", "saved", input=WORDS)
    assert done.returncode == 1 and "damaged" in done.stderr and not (tmp_path / "saved").exists()


def test_a_database_of_a_newer_openpista(lived_in, openpista, tmp_path):
    with sqlite3.connect(lived_in / "memory.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    assert openpista("backup", "saved", input=WORDS).returncode == 0
    done = openpista("restore", "saved", input=WORDS, env={"OPENPISTA_HOME": str(tmp_path / "other")})
    assert done.returncode == 1 and "newer openpista" in done.stderr
    assert not list((tmp_path / "other").iterdir())


def test_beside_a_daemon(house, openpista):  # noqa: F811
    house.start()
    number = house.put("$ echo hi")
    house.answer(number)
    assert openpista("backup", "saved", input=WORDS).returncode == 0
    done = openpista("restore", "saved", input=WORDS)
    assert done.returncode == 1 and "openpista runs, pid" in done.stderr and "`openpista stop`" in done.stderr
    assert not list(house.home.glob("before-restore-*"))
    assert openpista("restore", "saved", "--dry-run", input=WORDS).returncode == 0


def test_a_database_elsewhere(lived_in, openpista, tmp_path):
    elsewhere = tmp_path / "data/pista.db"
    (lived_in / "config.toml").write_text(f'{OFFLINE}[database]\nurl = "{elsewhere}"\n')
    elsewhere.parent.mkdir()
    shutil.move(lived_in / "memory.db", elsewhere)
    assert openpista("backup", "saved", input=WORDS).returncode == 0
    shutil.rmtree(elsewhere.parent)
    (lived_in / "config.toml").write_text("broken =\n")  # what a restore is for
    done = openpista("restore", "saved", input=WORDS)
    assert done.returncode == 0 and elsewhere.exists(), done
    assert "elsewhere" not in (lived_in / "config.toml").read_text()[:5]


def test_an_error_on_the_way_leaves_all_as_it_was(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "new"
    for path in (home, folder):
        path.mkdir()
    for name in ("a", "b", "a-wal"):
        (home / name).write_text(f"old {name}")
    (folder / "a").write_text("new a")
    with pytest.raises(OSError):
        o.put_in({folder / "a": home / "a", folder / "gone": home / "b"}, "now")
    assert {path.name: path.read_text() for path in home.iterdir() if path.is_file()} == {
        "a": "old a", "b": "old b", "a-wal": "old a-wal"
    }  # fmt: skip
    assert (folder / "a").read_text() == "new a"


def test_a_large_backup_is_not_held_in_memory(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(60 << 20)
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import openpista as o\n"
        "o.backup_cipher('a passphrase', b'x' * 16)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open(sys.argv[2], 'rb') as plain, open(sys.argv[2] + '.sealed', 'wb') as sealed:\n"
        "    o.seal(plain, sealed, 'a passphrase')\n"
        "with open(sys.argv[2] + '.sealed', 'rb') as sealed, open(sys.argv[2], 'wb') as plain:\n"
        "    o.unseal(sealed, plain, 'a passphrase')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    root = pathlib.Path(o.__file__).parent
    done = subprocess.run([sys.executable, "-c", script, root, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20
