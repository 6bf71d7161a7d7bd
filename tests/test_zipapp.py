"""The archive: built once, then started as users start it, in every home it may find."""

import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

import bootstrap
import build_zipapp
from bootstrap import platform_key

ROOT = pathlib.Path(__file__).parent.parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "openpista.py").read_text("utf-8"), re.MULTILINE)[1]
COPY = re.compile(r"[0-9a-f]{32}-[\w-]+")
HELLO = ("run", "--provider", "offline", "-e", "$ echo hi")
WEEK = 7 * 86400


def interpreter(version):
    """A Python of that version that really starts, or None."""
    installed = sorted((pathlib.Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *installed):
        if path and subprocess.run([path, "-c", "pass"], capture_output=True, check=False).returncode == 0:
            return str(path)
    return None


def environment(home, **more):
    """Nothing but what a start needs. The program's own state lies apart: here it is the cache that may be missing."""
    beside = {"TMPDIR": f"{home}.tmp", "OPENPISTA_HOME": f"{home}.state"}
    return {"PATH": os.environ["PATH"], "HOME": str(home)} | beside | more


def start(archive, home, *args, python=sys.executable, prefix=(), **env):
    """One run of the archive, with its own home and its own place for temporary files."""
    variables = {name: value for name, value in environment(home, **env).items() if value is not None}
    if "TMPDIR" in variables:
        pathlib.Path(variables["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    command = [*prefix, python, archive, *args]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def copies(root):
    """The unpacked copies under a cache root; nothing else may lie there."""
    found = sorted(root.iterdir())
    assert all(COPY.fullmatch(path.name) for path in found), found
    return found


def says_hi(done):
    assert (done.stdout, done.returncode) == ("hi\n", 0), done.stderr
    return True


def one_line(text):
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """An archive as the builder makes them, of a program that only says hi: where it unpacks is all that counts."""
    path, key = tmp_path_factory.mktemp("light") / "openpista.pyz", platform_key()
    files = {"openpista.py": b"def main():\n    print('hi')\n"} | {f"part{n}.py": os.urandom(9_000) for n in range(99)}
    payloads = [build_zipapp.packed(files), build_zipapp.packed({"native.so": os.urandom(9_000)}, key)]
    ids = {key: hashlib.sha256(b"".join(payloads)).hexdigest()[:32]}
    parts = dict(zip(("pure.zip.xz", f"{key}.zip.xz"), payloads, strict=True))
    parts |= build_zipapp.runtime(VERSION, ids)
    build_zipapp.write(path, build_zipapp.zipped(parts, build_zipapp.PRELUDE))
    return path


@pytest.fixture(scope="module")
def warm(archive, tmp_path_factory):
    """A home in which the archive has been started before."""
    home = tmp_path_factory.mktemp("warm") / "home"
    home.mkdir()
    assert says_hi(start(archive, home, *HELLO))
    return home


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system with given options; unmounts it afterwards."""
    places = []

    def mount(options):
        place = tmp_path / options
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


# What is in it


def test_two_builds_are_bit_identical(tmp_path, request):
    """The second one by another Python, where there is one. First of all: the archive is built meanwhile."""
    python, path = next(filter(None, map(interpreter, ("3.13", "3.12"))), sys.executable), tmp_path / "openpista.pyz"
    argv = [python, ROOT / "build_zipapp.py", "--output", path]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as twin:
        archive = request.getfixturevalue("archive")
        assert twin.communicate()[1] == "" and twin.returncode == 0
    assert path.read_bytes() == archive.read_bytes()


def test_holds_what_is_needed_and_no_more(archive):
    with zipfile.ZipFile(archive) as parts:
        names = parts.namelist()
        assert {entry.date_time for entry in parts.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert names == sorted(names) and len(names) == 4
    assert archive.stat().st_size <= 4.5e6 and archive.stat().st_mode & 0o777 == 0o755


def test_copy_keeps_licences_and_drops_the_unused(warm):
    [copy] = copies(warm / ".cache/openpista")
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if "__pycache__" not in path.parts}
    assert {"openpista.py", "migrations.sql"} <= files
    for metadata in copy.glob("*.dist-info/METADATA"):
        assert any(path.name.startswith("LICENSE") for path in metadata.parent.rglob("*")), metadata
    assert not [name for name in files if name.endswith((".pyc", ".pyi", ".c", ".h", "RECORD"))]
    assert len(list(copy.glob("_cffi_backend*"))) == 4  # one for each Python


def test_packages_work_from_the_copy_alone(warm):
    [copy] = copies(warm / ".cache/openpista")
    code = f"""import sys; sys.path.insert(0, {str(copy)!r})
import aioquic.asyncio, httpx, certifi, ssl
from cryptography.hazmat.primitives.asymmetric import ec
ec.generate_private_key(ec.SECP256R1())
ssl.create_default_context(cadata=certifi.contents())
httpx.AsyncClient(verify=False)"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_requirements_are_pinned_hashed_and_impersonal():
    text = (ROOT / "requirements.txt").read_text("utf-8")
    entries = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert {"aioquic", "cryptography", "httpx"} <= {entry.partition("==")[0] for entry in entries}
    assert all(re.fullmatch(r"[a-z\d-]+==[\w.]+( +--hash=sha256:[\da-f]{64})+", entry) for entry in entries)
    assert entries == sorted(entries)


# Starting it


def test_version_is_quick_and_touches_nothing(archive, home):
    done = start(archive, home, "--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"openpista {VERSION}\n", "", 0)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_starts_on(version, archive, warm):
    if not (python := interpreter(version)):
        pytest.skip(f"no Python {version} here")
    assert start(archive, warm, "--version", python=python).stdout == f"openpista {VERSION}\n"
    assert says_hi(start(archive, warm, *HELLO, python=python))


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
@pytest.mark.parametrize("file", ["archive", "builder"])
def test_refuses_python(version, file, archive, home):
    if not (python := interpreter(version)) or (version, file) == ("2.7", "builder"):
        pytest.skip(f"no Python {version} here, or too old to read the builder")
    done = start(archive if file == "archive" else ROOT / "build_zipapp.py", home, "--version", python=python)
    assert (
        done.returncode != 0
        and one_line(done.stderr)
        and f"needs Python 3.11 or newer; this is {version}" in done.stderr
    )


def test_copy_is_private(warm):
    root = warm / ".cache/openpista"
    assert [path.stat().st_mode & 0o777 for path in (root, *copies(root))] == [0o700, 0o700]


def test_bytecode_is_kept_even_if_unwanted_elsewhere(light, home):
    assert says_hi(start(light, home, *HELLO, PYTHONDONTWRITEBYTECODE="1"))
    [copy] = copies(home / ".cache/openpista")
    assert list(copy.glob("__pycache__/openpista.*.pyc"))


def test_twelve_first_starts_at_once(light, home):
    command = [sys.executable, light, *HELLO]
    runs = [subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE) for _ in range(12)]
    assert [(run.communicate()[0], run.returncode) for run in runs] == [(b"hi\n", 0)] * 12
    assert len(copies(home / ".cache/openpista")) == 1


def test_killed_while_unpacking(archive, home):
    root = home / ".cache/openpista"
    run = subprocess.Popen([sys.executable, archive, *HELLO], env=environment(home), stdout=subprocess.DEVNULL)
    while not list(root.glob(".new-*")):
        assert run.poll() is None, "it was over too soon"
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert says_hi(start(archive, home, *HELLO))
    [left] = root.glob(".new-*")
    os.utime(left, (0, 0))
    shutil.rmtree(next(path for path in root.iterdir() if COPY.fullmatch(path.name)))
    assert says_hi(start(archive, home, *HELLO))
    assert len(copies(root)) == 1


# Where it unpacks


@pytest.mark.parametrize(
    "variable, below", [("OPENPISTA_CACHE", ""), ("CACHE_DIRECTORY", ""), ("XDG_CACHE_HOME", "openpista")]
)
def test_cache_can_be_chosen(variable, below, light, home, tmp_path):
    assert says_hi(start(light, home, *HELLO, **{variable: str(tmp_path / "chosen")}))
    assert len(copies(tmp_path / "chosen" / below)) == 1 and not (home / ".cache").exists()


def test_the_chosen_cache_is_used_although_another_has_a_copy(light, home, tmp_path):
    assert says_hi(start(light, home, *HELLO))
    assert says_hi(start(light, home, *HELLO, OPENPISTA_CACHE=str(tmp_path / "chosen")))
    assert len(copies(tmp_path / "chosen")) == 1


def falls_back(archive, home, **env):
    """The run works, from the temporary folder."""
    done = start(archive, home, *HELLO, **env)
    temporary = pathlib.Path(f"{home}.tmp") / f"openpista-{os.getuid()}"
    assert says_hi(done) and len(copies(temporary)) == 1 and temporary.stat().st_mode & 0o777 == 0o700
    return done.stderr


def test_home_that_is_no_folder(light, tmp_path):
    (tmp_path / "home").write_text("a file")
    assert falls_back(light, tmp_path / "home") == ""


@pytest.mark.parametrize("options", ["ro", "noexec"])
def test_cache_on_a_disk_that_will_not_do(options, light, mounted):
    place = mounted(options)
    assert falls_back(light, place) == ""
    assert not list(place.rglob("*-linux-*"))


def test_no_home_and_no_user(archive, home):
    nobody = ("unshare", "--user", "--map-user=54321")
    if subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot become a user without a name here")
    done = start(archive, home, "--help", HOME=None, prefix=nobody)
    assert done.returncode == 0 and len(copies(pathlib.Path(f"{home}.tmp/openpista-54321"))) == 1


def test_refuses_a_link(light, home, tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    said = start(light, home, *HELLO, OPENPISTA_CACHE=str(tmp_path / "link"))
    assert says_hi(said) and one_line(said.stderr) and f"not using {tmp_path / 'link'}: it is a link" in said.stderr
    assert not list((tmp_path / "target").iterdir())


def test_refuses_what_others_may_write_to(light, home, tmp_path):
    """Even if a copy lies there already."""
    place = tmp_path / "open"
    assert says_hi(start(light, home, *HELLO, OPENPISTA_CACHE=str(place)))
    place.chmod(0o777)
    [copy] = copies(place)
    (copy / "openpista.py").write_text("raise SystemExit('a stranger wrote this')")
    assert "others may write" in start(light, home, *HELLO, OPENPISTA_CACHE=str(place)).stderr
    assert len(copies(home / ".cache/openpista")) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_refuses_what_is_someone_elses(light, home, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    assert "someone else's" in start(light, home, *HELLO, OPENPISTA_CACHE=str(tmp_path / "theirs")).stderr
    assert not list((tmp_path / "theirs").iterdir())


# A damaged file


def test_damaged_payload_is_refused(archive, home, tmp_path):
    damaged, data = tmp_path / "damaged.pyz", bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    done = start(damaged, home, *HELLO)
    assert (
        done.returncode == 1
        and one_line(done.stderr)
        and "damaged.pyz is damaged: copy or build it again" in done.stderr
    )
    assert copies(home / ".cache/openpista") == []


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_file_that_was_cut_short(version, archive, home, tmp_path):
    if not (python := interpreter(version)):
        pytest.skip(f"no Python {version} here")
    (tmp_path / "cut.pyz").write_bytes(archive.read_bytes()[:-1000])
    done = start(tmp_path / "cut.pyz", home, *HELLO, python=python)
    assert done.returncode == 1 and "this-file-is-damaged--copy-it-again" in done.stderr


# Pruning


def test_prunes_what_is_old_and_idle(light, home):
    root = home / ".cache/openpista"
    old, used, fresh, strange = (root / name for name in ("a" * 32 + "-x", "b" * 32 + "-x", "c" * 32 + "-x", "notes"))
    for folder in (old, used, fresh, strange):
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
        os.utime(folder, (0, time.time() - WEEK - 60) if folder is not fresh else None)
    root.chmod(0o700)
    running = os.open(used, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_SH)
    assert says_hi(start(light, home, *HELLO))
    os.close(running)
    left = {path.name for path in root.iterdir()}
    assert {used.name, fresh.name, strange.name} < left and len(left) == 4


def test_a_running_process_holds_its_copy_but_its_children_do_not(archive, warm):
    [copy] = copies(warm / ".cache/openpista")
    command = [
        sys.executable,
        archive,
        "run",
        "--provider",
        "offline",
        "--yes",
        "-e",
        "$ ls -l /proc/self/fd; sleep 0.7",
    ]
    run = subprocess.Popen(command, env=environment(warm), stdout=subprocess.PIPE, text=True)
    held = False
    while run.poll() is None and not held:
        folder = os.open(copy, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.005)
        except BlockingIOError:
            held = True
        os.close(folder)
    said = run.communicate()[0]
    assert held and "->" in said and str(copy) not in said


# Building it


def test_build_without_pip(home, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = start(ROOT / "build_zipapp.py", home, "--output", tmp_path / "x.pyz", python=tmp_path / "bare/bin/python")
    assert done.returncode == 1 and one_line(done.stderr) and "has no pip" in done.stderr
    assert not (tmp_path / "x.pyz").exists()


def test_build_without_an_index(home, tmp_path):
    cut_off = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    done = start(ROOT / "build_zipapp.py", home, "--output", tmp_path / "x.pyz", **cut_off)
    assert done.returncode == 1 and one_line(done.stderr) and "pip could not download" in done.stderr


def test_ctrl_c_while_the_program_is_still_loading(tmp_path):
    """Before main can take care of it: no traceback, and the same exit code."""
    start = "import sys, bootstrap; bootstrap.IDS = {bootstrap.platform_key(): '0' * 32}; bootstrap.start()"
    copy = tmp_path / "cache" / f"{'0' * 32}-{bootstrap.platform_key()}"
    copy.mkdir(parents=True, mode=0o700)
    copy.parent.chmod(0o700)
    (copy / "openpista.py").write_text("raise KeyboardInterrupt")
    env = {"OPENPISTA_CACHE": str(copy.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
