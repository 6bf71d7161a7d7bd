"""Starts openpista from its private cache; the first start fills it.

This runs on the user's machine: build_zipapp.py puts section 1 into the archive as `__main__.py`, and section 2 as
`openpista_unpack.py`. Section 1 runs at every start, so it imports next to nothing; and it must parse on any Python,
because it is what tells an old one that it is too old.
"""

# ===== 1. Start ===============================================================

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("openpista needs Python 3.11 or newer; this is %d.%d\n" % sys.version_info[:2])
    sys.exit(2)

import atexit
import gc
import os
import stat

VERSION = ""  # filled in by build_zipapp.py, as are the
IDS = {}  # platform -> the hash of its payloads, which names the copy in the cache and proves it


def platform_key():
    """What this platform is called here: x86_64-linux-gnu, darwin-arm64, win32-amd64."""
    if sys.platform == "win32":
        return "win32-" + sys.version.rpartition("(")[2].rstrip(")]").lower()
    if sys.platform == "darwin":
        return "darwin-" + os.uname().machine
    return getattr(sys.implementation, "_multiarch", "") or sys.platform


def cache_roots():
    """The folders that may hold unpacked copies, best first."""
    env, uid = os.environ.get, getattr(os, "getuid", int)()
    roots = [env("OPENPISTA_CACHE", "") and os.path.abspath(env("OPENPISTA_CACHE"))]
    roots += [env("CACHE_DIRECTORY", "").partition(":")[0]]  # systemd's, and already our own
    roots += [os.path.join(env("XDG_CACHE_HOME", ""), "openpista"), os.path.expanduser("~/.cache/openpista")]
    for folder in (env("TMPDIR", ""), env("TEMP", ""), "/tmp", "/var/tmp"):
        roots.append(os.path.join(folder, "openpista-" + str(uid)))
    return [root for root in roots if os.path.isabs(root)]


def is_private(path):
    """True if path is a real folder of this user, and no one else may write into it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    loose = found.st_mode & 0o022 if os.name == "posix" else 0
    return stat.S_ISDIR(found.st_mode) and found.st_uid == getattr(os, "getuid", int)() and not loose


def lock(path, *flags):
    """A descriptor that locks the folder until it is closed; None where that cannot be."""
    try:
        import fcntl

        folder = os.open(path, os.O_RDONLY)  # closed in child processes
        fcntl.flock(folder, sum(getattr(fcntl, flag) for flag in flags))
    except (ImportError, OSError):
        return None
    return folder


def hold(path):
    """True if the copy is there; while this process lives, no one prunes it."""
    lock(path, "LOCK_SH")
    try:
        os.utime(path)  # pruning goes by the last use
    except OSError:
        pass  # not there, or on a read-only disk
    return is_private(path)


def start():
    """Runs openpista from its copy in the cache, unpacked there if need be."""
    key = platform_key()
    if key not in IDS:
        known = ", ".join(sorted(IDS))
        sys.stderr.write("openpista: this file is for " + known + ", not for " + key + "; use build_zipapp.py there\n")
        sys.exit(2)
    roots = cache_roots()
    chosen = roots[:1] if os.environ.get("OPENPISTA_CACHE") else roots  # somebody's word: no copy elsewhere will do
    copies = [os.path.join(root, IDS[key] + "-" + key) for root in chosen if is_private(root)]
    copy = next((copy for copy in copies if hold(copy)), None)
    if copy is None:
        import openpista_unpack

        copy = openpista_unpack.unpack(IDS[key], key, roots)
        hold(copy)
    sys.path[0] = copy  # in place of the archive, which may be replaced while we run
    gc.set_threshold(100000)  # start-up makes 55,000 objects and drops few: to look through them once takes 5 ms
    atexit.register(gc.freeze)  # and at the end the process is over: there is nothing to collect
    sys.dont_write_bytecode = False  # the wish to have none is about other folders: without, each start compiles all
    try:
        import openpista

        sys.exit(openpista.main())
    except KeyboardInterrupt:  # before main could take care of it
        sys.exit(130)


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:  # known without unpacking
        print("openpista " + VERSION)
        sys.exit()
    start()


# ===== 2. Unpack ==============================================================
#
# It works beside the target and renames at the end, so a copy is whole or absent.

import contextlib
import hashlib
import io
import re
import shutil
import tempfile
import time
import zipfile


def unpack(content, key, roots):
    """The folder into which the payloads were unpacked: under the first root that will do."""
    if sys.stderr.isatty():
        sys.stderr.write("openpista: unpacking, for the first start only\n")
    failed = []
    for root in roots:
        try:
            return place(root, content, key)
        except OSError as error:
            failed.append(f"{root}: {error.strerror or error}")
    sys.exit("\n  ".join(["openpista: found no place to unpack to; set OPENPISTA_CACHE to a private folder", *failed]))


def place(root, content, key):
    """A whole copy under root: one made here, or one that another process makes meanwhile."""
    os.makedirs(root, 0o700, exist_ok=True)
    if not is_private(root):
        sys.stderr.write(f"openpista: not using {root}: it is a link, someone else's, or others may write to it\n")
        raise OSError("not private")
    if hasattr(os, "statvfs") and os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("mounted noexec")
    target, locked = os.path.join(root, f"{content}-{key}"), lock(root, "LOCK_EX")
    try:
        if not is_private(target):
            with contextlib.suppress(OSError):
                prune(root)
            fill(root, target, read_payloads(content, key))
    finally:
        if locked is not None:
            os.close(locked)
    return target


def read_payloads(content, key):
    """The two zip files of this platform, checked against their hash."""
    try:
        import lzma
    except ImportError:
        sys.exit("openpista: this Python was compiled without lzma; use another, 3.11 or newer")
    try:
        packed = [__loader__.get_data(name) for name in ("pure.zip.xz", key + ".zip.xz")]
    except OSError:
        packed = []
    if hashlib.sha256(b"".join(packed)).hexdigest()[: len(content)] != content:
        sys.exit(f"openpista: {sys.path[0]} is damaged: copy or build it again")
    return [lzma.decompress(data) for data in packed]


def fill(root, target, payloads):
    """Makes target at one stroke."""
    new = tempfile.mkdtemp(prefix=".new-", dir=root)
    try:
        for payload in payloads:
            zipfile.ZipFile(io.BytesIO(payload)).extractall(new)
        if hasattr(os, "sync"):
            os.sync()  # or a power cut may leave the name and empty files
        os.rename(new, target)
    except OSError:
        if not is_private(target):  # else someone was quicker, on a disk without locks
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def prune(root):
    """Removes the copies that were not used for a week, and what a killed unpacking left an hour ago."""
    for name in os.listdir(root):
        ours = re.fullmatch(r"(\.new-\w+)|[0-9a-f]{32}-[\w-]+", name)
        path = os.path.join(root, name)
        if ours and time.time() - os.lstat(path).st_mtime > (3600 if ours[1] else 7 * 86400):
            discard(path)


def discard(path):
    """Removes a copy unless a running process holds it."""
    held = lock(path, "LOCK_EX", "LOCK_NB")
    if held is not None:
        gone = tempfile.mkdtemp(prefix=".new-", dir=os.path.dirname(path))
        os.rename(path, gone)  # at one stroke too: nobody starts from half a copy
        shutil.rmtree(gone, ignore_errors=True)
        os.close(held)
