"""A key through the browser: the callback's server, what a person pastes, the exchange."""

import asyncio
import gc
import logging
import os
import re
import socket
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from openpista import BrowserLogin, CredentialError, PistaError, ProviderError, Unavailable, UsageError

# OpenRouter as it documents itself. The first part of the path says how it is today: ok, deny, refuse, html ...
VENDOR = r"""
import base64, hashlib, http.server, itertools, json, time
from urllib.parse import parse_qs, quote, urlsplit

challenges, numbers = {}, itertools.count(1)
ODD = {
    "html": (200, b"<!doctype html><p>Welcome</p>"), "nokey": (200, b'{"user_id": "u"}'), "list": (200, b"[1]"),
    "badkey": (200, b'{"key": "sk-or-v1-broken\\nSecret"}'), "number": (200, b'{"key": 5}'), "empty": (200, b""),
    "huge": (200, b'{"key": "' + b"k" * 5_000_000 + b'"}'), "deep": (200, b"[" * 60_000), "busy": (503, b"{}"),
    "limited": (429, b'{"error": {"message": "slow down", "code": 429}}'), "page": (403, b"<" * 60_000),
}

class Vendor(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def do_GET(self):
        how, fields = self.path.split("/")[1], {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        assert fields["code_challenge_method"] == "S256" and fields["key_label"] == "openpista", fields
        code = f"auth_code_{next(numbers)}"
        challenges[code] = fields["code_challenge"]
        back = fields.get("callback_url")
        if not back:
            return self.reply(200, code.encode())
        answer = "error=access_denied&error_description=" + quote("No\x1b[31m, <i>thanks") if how == "deny" else f"code={code}"
        self.reply(302, location=f"{back}?{answer}")

    def do_POST(self):
        how = self.path.split("/")[1]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.path.endswith("/api/v1/auth/keys") or set(body) != {"code", "code_verifier", "code_challenge_method"}:
            return self.reply(400, b'{"error": {"message": "bad request", "code": 400}}')
        if how in ODD:
            return self.reply(*ODD[how])
        if how == "away":
            return self.reply(307, location=f"http://{self.headers['host']}/ok/api/v1/auth/keys")
        if how == "silent":
            return time.sleep(5)
        digest = hashlib.sha256(body["code_verifier"].encode()).digest()
        right = challenges.pop(body["code"], None) == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if not right or how == "refuse":
            said = f"Invalid code or code_verifier: {json.dumps(body)}" if how == "refuse" else "Invalid code or code_verifier"
            return self.reply(403, json.dumps({"error": {"message": said, "code": 403}}).encode())
        self.reply(200, b'{"key": "sk-or-v1-0123456789abcdef", "user_id": "user_1"}')

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vendor)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def vendor():
    """The address of a fake OpenRouter, a process of its own."""
    with subprocess.Popen([sys.executable, "-c", VENDOR], stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def login_at(vendor, how="ok", **settings):
    return BrowserLogin(f"{vendor}/{how}/auth", f"{vendor}/{how}/api/v1", **{"timeout": 5.0} | settings)


async def browse(url):
    """What a browser does with an address: it follows where it is sent."""
    async with httpx.AsyncClient(follow_redirects=True) as browser:
        return await browser.get(url)


def callback(login):
    """The address that the vendor is asked to send the browser to."""
    return parse_qs(urlsplit(login.url).query)["callback_url"][0]


async def failure(coroutine):
    """The error of ours that it ends with."""
    with pytest.raises(PistaError) as caught:
        await coroutine
    return caught.value


def test_the_browser_brings_a_key(vendor):
    async def main():
        async with login_at(vendor) as login:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/callback/[\w-]{43}", callback(login))
            answer = await browse(login.url)
            key = await login.key()
        return answer, key

    answer, key = asyncio.run(main())
    assert key == "sk-or-v1-0123456789abcdef" and repr(key) == "Secret('…')"
    assert answer.status_code == 200 and "close this window" in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_key_may_be_waiting_before_the_browser_comes(vendor):
    async def main():
        async with login_at(vendor) as login:
            key = asyncio.create_task(login.key())
            await asyncio.sleep(0)
            await browse(login.url)
            return await key

    assert asyncio.run(main()).startswith("sk-or-")


def test_only_the_callback_with_the_state_is_heard(vendor):
    """Whatever else a page in the browser sends, the login goes on."""

    async def main():
        async with login_at(vendor) as login, httpx.AsyncClient() as browser:
            own = callback(login)
            origin = own.partition("/callback/")[0]
            cases = [
                ("GET", f"{origin}/callback/{'x' * 43}?code=stolen_code"),
                ("GET", f"{origin}/callback/?code=stolen_code"),
                ("GET", f"{origin}/callback/{'x' * 43}?error=access_denied"),
                ("GET", f"{own}x?code=stolen_code"),
                ("GET", f"{own[:-1]}?code=stolen_code"),
                ("GET", own),
                ("GET", f"{own}?code="),
                ("GET", f"{own}?code=%3Cscript%3E"),
                ("GET", f"{origin}/callback/%ff%00"),
                ("GET", f"{origin}/favicon.ico"),
                ("GET", f"{origin}/"),
                ("GET", f"{origin}//[{own}"),
                ("POST", f"{own}?code=posted_code"),
                ("OPTIONS", f"{own}?code=posted_code"),
            ]
            for method, url in cases:
                answer = await browser.request(method, url)
                assert (url, answer.status_code) == (url, 404)
                assert "script" not in answer.text
            await browse(login.url)
            return await login.key()

    assert asyncio.run(main()).startswith("sk-or-")


def test_a_refusal_in_the_browser_ends_the_login(vendor):
    async def main():
        async with login_at(vendor, "deny") as login:
            await browse(login.url)
            await browse(f"{callback(login)}?code=too_late_code")
            return await failure(login.key())

    error = asyncio.run(main())
    assert isinstance(error, CredentialError) and "No, <i>thanks" in str(error) and "--api-key" in error.hint
    assert "\x1b" not in str(error)


def test_no_answer_in_time(vendor):
    async def main():
        async with login_at(vendor, timeout=0.05) as login:
            return await failure(login.key())

    error = asyncio.run(main())
    assert "within 0.05 s" in str(error) and "--api-key" in error.hint


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("refuse", CredentialError, "403: Invalid code or code_verifier"),
        ("page", CredentialError, "403"),
        ("html", ProviderError, "200 without a key"),
        ("nokey", ProviderError, "without a key"),
        ("list", ProviderError, "without a key"),
        ("badkey", ProviderError, "without a key"),
        ("number", ProviderError, "without a key"),
        ("empty", ProviderError, "without a key"),
        ("huge", ProviderError, "without a key"),
        ("deep", ProviderError, "without a key"),
        ("away", CredentialError, "307"),
        ("busy", Unavailable, "503"),
        ("limited", Unavailable, "slow down"),
    ],
)
def test_an_exchange_that_fails(vendor, how, kind, words, caplog):
    caplog.set_level(logging.DEBUG)

    async def main():
        async with login_at(vendor, how) as login:
            code = (await browse(login.url_elsewhere)).text
            login.paste(code)
            error = await failure(login.key())
            return code, login._verifier, error, repr(login)

    started = time.monotonic()
    code, verifier, error, shown = asyncio.run(main())
    assert time.monotonic() - started < 2
    assert type(error) is kind and words in str(error)
    told, chain = [str(error), repr(error), error.hint, shown, caplog.text], error
    while chain := chain.__cause__ or chain.__context__:
        told += [str(chain), repr(chain)]
    for secret in (code, str(verifier), "broken"):
        assert not [text for text in told if secret in text]
    assert len(str(error)) < 600


def test_a_server_that_is_silent_or_gone(vendor):
    async def main():
        async with login_at(vendor, "silent") as login:
            login.LONGEST_EXCHANGE = 0.1
            login.paste("auth_code_9")
            silent = await failure(login.key())
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with BrowserLogin(address, address) as login:
            login.paste("auth_code_9")
            return silent, await failure(login.key())

    silent, gone = asyncio.run(main())
    assert type(silent) is type(gone) is Unavailable
    assert "for 0.1 s" in str(silent) or "within 0.1 s" in str(silent)
    assert "connection refused" in str(gone)


def test_what_a_person_pastes(vendor):
    """The address in any shape that a browser shows it in, or the code; what is neither is refused and can be mended."""

    async def main(shape):
        async with login_at(vendor) as login:
            code = (await browse(login.url_elsewhere)).text
            for nonsense in ("", "hello world", "abc", login.url, f"http://127.0.0.1:1/callback/other?code={code}",
                             "x?", "http://[?", "http://[/callback/[", "코드코드코드", "auth&code", "\ud800uth_code"):  # fmt: skip
                with pytest.raises(UsageError) as caught:
                    login.paste(nonsense)
                assert caught.value.hint
            login.paste(shape.format(url=callback(login), bare=callback(login).removeprefix("http://"), code=code))
            return await login.key()

    for shape in ("{code}", "  {code}\n", "{url}?code={code}", "{bare}?code={code}", "{url}?code={code}&x=1#top"):
        assert asyncio.run(main(shape)).startswith("sk-or-")


def test_a_pasted_refusal_is_a_refusal(vendor):
    async def main():
        async with login_at(vendor) as login:
            login.paste(f"{callback(login)}?error=access_denied")
            return await failure(login.key())

    assert "access_denied" in str(asyncio.run(main()))


def test_a_wrong_code_is_refused_and_no_other_is_tried(vendor):
    async def main():
        async with login_at(vendor) as login:
            login.paste("mistyped_code")
            await browse(login.url)
            return await failure(login.key())

    assert isinstance(error := asyncio.run(main()), CredentialError) and "a code works once" in error.hint


def test_silent_and_junk_connections_keep_nobody_out(vendor):
    async def main():
        async with login_at(vendor) as login:
            junk, port = [], urlsplit(callback(login)).port
            for number in range(100):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    (b"", b"GET /callback/", b"\x16\x03\x01\x02\0\x01", b"\r\n" * 9, b"A" * 20_000)[number % 5]
                )
                junk.append((reader, writer))
            started = time.monotonic()
            await browse(login.url)
            key, waited = await login.key(), time.monotonic() - started
            open_now = len(login._visits)
        for _, writer in junk:
            writer.close()
        return key, waited, open_now

    key, waited, open_now = asyncio.run(main())
    assert key.startswith("sk-or-") and waited < 3 and open_now <= BrowserLogin.MOST_VISITS


def test_a_slow_request_is_cut_off(vendor, caplog):
    async def main():
        async with login_at(vendor) as login:
            login.LONGEST_VISIT = 0.1
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(callback(login)).port)
            writer.write(b"GET /callback/")
            assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()

    asyncio.run(main())
    gc.collect()  # a task that failed complains when it is gone
    assert caplog.text == ""


def test_a_machine_without_a_loopback():
    async def no_server(*args, **options):
        raise OSError(99, "Cannot assign requested address")

    error = asyncio.run(failure(BrowserLogin(listen=no_server).__aenter__()))
    assert "cannot wait for the browser" in str(error) and "--api-key" in error.hint


def test_leaving_closes_the_port(vendor):
    """Also when it is cancelled while a browser hangs on it."""

    async def main():
        login = login_at(vendor)

        async def wait():
            async with login:
                await login.key()

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        port = urlsplit(callback(login)).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        assert task.cancelled() and await asyncio.wait_for(reader.read(), 1) == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")
@pytest.mark.parametrize("name", ["xdg-open", "text-browser"])
def test_open_browser_needs_a_screen_and_leaves_the_terminal_alone(vendor, tmp_path, capfd, name):
    (tmp_path / name).write_text(
        '#!/bin/sh\necho noise; echo noise >&2\n(echo "$1"; echo "TERM=$TERM"; tty; cut -d" " -f6 /proc/$$/stat; (: </dev/tty) 2>&1) >>"$OUT.part"\nmv "$OUT.part" "$OUT"\n'
    )
    (tmp_path / name).chmod(0o755)
    out = tmp_path / "opened"
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "xterm", "OUT": str(out)}
    if name == "text-browser":  # one that `webbrowser` would wait for, as it does for w3m
        environ["BROWSER"] = str(tmp_path / name)

    async def main():
        async with login_at(vendor) as login:
            assert not login.open_browser(environ)
            started = time.monotonic()
            assert login.open_browser(environ | {"DISPLAY": ":99"})
            assert time.monotonic() - started < 2
            while not out.exists():
                await asyncio.sleep(0.01)
            return login.url

    url = asyncio.run(asyncio.wait_for(main(), 5))
    opened = out.read_text()
    assert str(os.getsid(0)) not in opened.splitlines()
    assert url in opened.splitlines() and "TERM=\n" in opened and "not a tty" in opened and "/dev/tty" in opened
    assert capfd.readouterr() == ("", "")
