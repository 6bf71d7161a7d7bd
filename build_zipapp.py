#!/usr/bin/env python3
"""Builds openpista.pyz: the program and the packages it needs, in one file.

    build_zipapp.py               for this platform, Python 3.11 to 3.14
    build_zipapp.py --universal   for Linux (x86_64, aarch64, musl), macOS and Windows
    build_zipapp.py --lock        writes requirements.txt anew, with the latest versions

The archive holds a small `__main__.py`, a module that unpacks (both are in bootstrap.py), and payloads: one of pure
Python, and one of native files for each platform. The first start unpacks them into a private cache, because native
files cannot be loaded from a zip, and the rest starts faster from a folder.
"""

import argparse
import concurrent.futures
import hashlib
import io
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("build_zipapp.py needs Python 3.11 or newer; this is {}.{}".format(*sys.version_info))

from bootstrap import platform_key

HERE = Path(__file__).resolve().parent
SHIPPED = ("aioquic", "cryptography", "httpx")
PROJECT = ("openpista.py", "migrations.sql", "config.example.toml", "LICENSE-MIT", "LICENSE-APACHE")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# Which wheels a platform takes. Asked for by name: left to itself pip takes manylinux_2_34 where it can, and that
# needs a glibc newer than many servers have.
PLATFORMS = {
    "x86_64-linux-gnu": ("manylinux_2_28_x86_64", "manylinux2014_x86_64"),
    "aarch64-linux-gnu": ("manylinux_2_28_aarch64", "manylinux2014_aarch64"),
    "x86_64-linux-musl": ("musllinux_1_2_x86_64",),
    "darwin-arm64": ("macosx_11_0_arm64",),
    "win32-amd64": ("win_amd64",),
    "aarch64-linux-musl": ("musllinux_1_2_aarch64",),
}
UNIVERSAL = tuple(PLATFORMS)[:5]
# A plain `pip install` on a new Linux picks these, so their hashes belong into requirements.txt.
NEWER = [(f"manylinux_2_34_{cpu}", f"manylinux_2_28_{cpu}", f"manylinux2014_{cpu}") for cpu in ("x86_64", "aarch64")]

NATIVE = re.compile(r"\.(so|pyd|dylib|dll)(\.\d+)*$")
# Never needed to run. Of cffi only `_cffi_backend` is used, of attrs only `attr`; HTTP/3 is the one user of pylsqpack.
UNUSED = re.compile(
    r"(cffi|attrs)/|pycparser|pylsqpack|aioquic/(h0/|h3/connection)|anyio/(pytest_plugin|_backends/_trio)|httpx/_main"
    r"|.*\.(pyi|h|c|typed)$|.*\.dist-info/(RECORD|WHEEL|INSTALLER|entry_points\.txt|top_level\.txt)$"
)


class Failure(Exception):
    """The build cannot go on; the text says why, and what to do."""


# ===== 1. Wheels ==============================================================
#
# pip fetches them, from whatever index and cache it is set up for, and checks every hash.


def download(folder, *what):
    """Has pip bring the wheels of what into folder; its own last word becomes the error."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--dest", folder, *what]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise Failure(f"this Python has no pip: install python3-pip, or run `{sys.executable} -m ensurepip`")
    if done.returncode:
        errors = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE) or ["it failed"]
        raise Failure(f"pip could not download: {errors[-1]} (is the package index in reach?)")


def download_all(folder, tags, *what):
    """Brings what into folder for every Python on the platform that has these tags."""
    for python in PYTHONS:
        say(f"downloading for Python {python}, {tags[0]}")
        target = ["--implementation=cp", f"--python-version={python}", *(f"--platform={tag}" for tag in tags)]
        download(folder, "--no-deps", *target, *what)


LOCK_HEAD = """\
# The packages that ship in openpista.pyz, each with the hashes of its wheels for every platform and Python in
# build_zipapp.py, which installs from this list; so do the tests. To renew it: python3.11 build_zipapp.py --lock
"""


def write_lock():
    """Writes requirements.txt for the latest versions of what ships, and of what that brings along."""
    if sys.version_info[:2] != (3, 11):  # pip applies conditions on Python's version to the one it runs on
        raise Failure("--lock must run on Python 3.11, the oldest one supported: it needs the most packages")
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        say("resolving")
        download(folder, *SHIPPED)
        pins = {pin_of(wheel) for wheel in Path(folder).iterdir()}
        for tags in (*PLATFORMS.values(), *NEWER):
            download_all(folder, tags, *pins)
        for wheel in Path(folder).iterdir():
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            hashes.setdefault(pin_of(wheel), []).append(f" \\\n    --hash=sha256:{digest}")
    text = LOCK_HEAD + "".join(pin + "".join(sorted(hashes[pin])) + "\n" for pin in sorted(hashes))
    (HERE / "requirements.txt").write_text(text, "utf-8", newline="\n")
    return f"requirements.txt  {len(hashes)} packages"


def pin_of(wheel):
    """The requirement that a wheel meets: its project's normal name and its version."""
    name, version = wheel.name.split("-")[:2]
    return f"{name.replace('_', '-').lower()}=={version}"


# ===== 2. Archive =============================================================
#
# The same bytes on every build: names are sorted, times and modes fixed, and nothing in it depends on the Python
# that built it. Each platform has an id, the hash of its two payloads: it names the copy in the cache and proves it.

# The second line is for a file that was cut short: Python then reads it as source, and complains with this word.
PRELUDE = b"#!/usr/bin/env python3\n# coding: this-file-is-damaged--copy-it-again\n"


def zipped(files, prelude=b""):
    """A zip file, not compressed: xz does that better from outside."""
    epoch = max(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), 315532800)  # a zip knows nothing before 1980
    buffer = io.BytesIO()
    buffer.write(prelude)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, time.gmtime(epoch)[:6])
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # as on Unix, wherever it was built
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def packed(files, platform=""):
    """The files as a payload."""
    # Unpacking costs as much memory as the dictionary has. Code for x86 packs 5 % better with a filter of its own.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 16 << 20}]
    if re.search("x86_64|amd64", platform):
        filters.insert(0, {"id": lzma.FILTER_X86})
    return lzma.compress(zipped(files), filters=filters)


def payloads(platform):
    """What the wheels of a platform hold that is needed: its pure files, and its native ones packed."""
    pure, native = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        download_all(folder, PLATFORMS[platform], "--require-hashes", "-r", HERE / "requirements.txt")
        for path in sorted(Path(folder).iterdir()):
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if not name.endswith("/") and not UNUSED.match(name):
                        (native if NATIVE.search(name) else pure)[name] = wheel.read(name)
    say(f"packing for {platform}")
    return pure, packed(native, platform)


def program():
    """The project's own files."""
    for name in ("openpista.py", "requirements.txt"):
        if not (HERE / name).exists():
            raise Failure(f"{name} is missing in {HERE}")
    return {name: (HERE / name).read_bytes() for name in PROJECT if (HERE / name).exists()}


def runtime(version, ids):
    """The two modules of bootstrap.py, with what they must know of this archive."""
    text = (HERE / "bootstrap.py").read_text("utf-8")
    text = text.replace('VERSION = ""', f"VERSION = {version!r}").replace("IDS = {}", f"IDS = {ids!r}")
    start, unpack = text.split("# ===== 2. Unpack", 1)
    shared = "import os\nimport sys\nfrom __main__ import is_private, lock\n"
    return {"__main__.py": start.encode(), "openpista_unpack.py": f"{shared}# {unpack}".encode()}


def build(output, platforms):
    """Writes the archive and returns one line about it."""
    files = program()
    version = re.search(r'^__version__ = "(.+)"', files["openpista.py"].decode(), re.MULTILINE)[1]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {key: pool.submit(payloads, key) for key in platforms}
    # The pure files are the same for all but Windows, whose wheels have other line ends: take the first platform's.
    pure = packed(made[platforms[0]].result()[0] | files)
    natives = {key: job.result()[1] for key, job in made.items()}
    ids = {key: hashlib.sha256(pure + native).hexdigest()[:32] for key, native in natives.items()}
    parts = runtime(version, ids) | {"pure.zip.xz": pure} | {f"{key}.zip.xz": native for key, native in natives.items()}
    write(output, zipped(parts, PRELUDE))
    return f"{output.name} {version}  {output.stat().st_size / 1e6:.2f} MB  {', '.join(platforms)}"


def write(path, data):
    """Puts a program at path, in place of one that may be running."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    fresh.chmod(0o755)
    fresh.replace(path)


# ===== 3. Main ================================================================


def say(text):
    """Shows on a terminal what goes on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")


def main():
    """Reads the command line and does the one thing."""
    parser = argparse.ArgumentParser(description="Builds openpista.pyz.")
    parser.add_argument("--output", type=Path, default=HERE / "openpista.pyz", metavar="PATH", help="where to write it")
    parser.add_argument("--universal", action="store_true", help="for all platforms, not only this one")
    parser.add_argument("--lock", action="store_true", help="write requirements.txt with the latest versions")
    options = parser.parse_args()
    here = platform_key()
    if not options.universal and here not in PLATFORMS:
        raise Failure(f"there are no native packages for {here}, only for {', '.join(PLATFORMS)}")
    done = write_lock() if options.lock else build(options.output, UNIVERSAL if options.universal else (here,))
    say("")
    print(done)


if __name__ == "__main__":
    try:
        main()
    except (Failure, OSError) as error:
        say("")
        sys.exit(f"build_zipapp.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
