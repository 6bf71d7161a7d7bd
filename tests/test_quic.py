"""The gateway's transport: frames, and QUIC between real sockets on the loopback."""

import asyncio
import contextlib
import json
import os
import random
import socket
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import openpista as gateway
from openpista import (
    ConfigError,
    FrameDecoder,
    GatewayError,
    Limits,
    QuicClient,
    QuicServer,
    WireError,
    WrongServer,
    check_frame,
    encode_frame,
)

PING = {"type": "ping", "token": "good"}
MESSAGE = {"type": "message", "id": "1", "token": "good", "user_message": "hi"}
PONG = {"type": "reply", "content": "pong"}


# ===== Frames =================================================================

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
frames = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=5)


def packed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(frames, max_size=4), st.integers(1, 50))
def test_frames_come_back_in_any_portions(sent, size):
    data, decoder = b"".join(map(encode_frame, sent)), FrameDecoder()
    got = [frame for i in range(0, len(data), size) for frame in decoder.feed(data[i : i + size])]
    assert got == sent and decoder.waiting == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_a_wire_error(body):
    for data in (body, packed(body)):
        with contextlib.suppress(WireError):
            assert all(isinstance(frame, dict) for frame in FrameDecoder().feed(data))


BAD = [
    (b"\0\0\0\0", "bad_request", "JSON"),
    (b"\xff\xff\xff\xff", "too_large", "4,294,967,295"),
    ((2**20 + 1).to_bytes(4, "big"), "too_large", "1,048,577"),
    (packed(b"\xff{}"), "bad_request", "UTF-8"),
    (packed(b"{"), "bad_request", "JSON"),
    (packed(b"{} {}"), "bad_request", "JSON"),
    (packed(b"[1]"), "bad_request", "list, not an object"),
    (packed(b"null"), "bad_request", "NoneType"),
    (packed(b'{"a":NaN}'), "bad_request", "NaN"),
    (packed(b'{"a":-Infinity}'), "bad_request", "Infinity"),
    (packed(b'{"a":1e999}'), "bad_request", "1e999"),
    (packed(b'{"a":' + b"9" * 5000 + b"}"), "bad_request", "digits"),
    (packed(b'{"a":1,"a":2}'), "bad_request", "twice"),
    (packed(b'{"a":{"b":1,"b":1}}'), "bad_request", "twice"),
    (packed(b'{"a":"\\ud800"}'), "bad_request", "UTF-8"),
    (packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "bad_request", "recursion"),
    (packed(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}"), "bad_request", "nested"),
    (packed(b"\xef\xbb\xbf{}"), "bad_request", "JSON"),
    (packed(b'{"a":"\0"}'), "bad_request", "JSON"),
]


@pytest.mark.parametrize(("data", "word", "text"), BAD)
def test_bad_frames(data, word, text):
    with pytest.raises(WireError, match=text) as caught:
        list(FrameDecoder().feed(data))
    assert caught.value.word == word


def test_the_largest_frame_and_one_more():
    frame = {"a": "x" * (2**20 - 8)}
    assert list(FrameDecoder().feed(encode_frame(frame))) == [frame]
    with pytest.raises(WireError, match="1,048,577") as caught:
        encode_frame({"a": "x" * (2**20 - 7)})
    assert caught.value.word == "too_large"


def test_what_may_be_in_a_frame():
    assert list(FrameDecoder().feed(packed(b'{"a":"\\ud83d\\ude00"}'))) == [{"a": "😀"}]
    assert encode_frame({"a": "\ud83d"}) == packed(b'{"a":"?"}')
    nested = {"a": [[[]]] * 200}
    assert list(FrameDecoder().feed(encode_frame(nested))) == [nested]
    with pytest.raises(ValueError):
        encode_frame({"a": float("nan")})


GOOD = [
    PING,
    MESSAGE,
    MESSAGE | {"session_id": "main", "metadata": {"a": [1]}, "on_disconnect": "cancel", "future": 1},
    MESSAGE | {"user_message": "x" * 900_000, "session_id": None},
    {"type": "history", "token": "t", "session_id": "s", "limit": 10},
]
WRONG = [
    ({}, "type"),
    ({"type": 1}, "type"),
    ({"type": []}, "type"),
    ({"type": "pingg", "token": "t"}, "did you mean 'ping'"),
    ({"type": "x" * 100_000}, "unknown"),
    ({"type": "ping"}, "token is missing"),
    ({"type": "ping", "token": None}, "token is missing"),
    ({"type": "ping", "token": 5}, "token must be a string"),
    ({"type": "ping", "token": ""}, "token is empty"),
    ({"type": "ping", "token": "t" * 201}, "token is too long"),
    (MESSAGE | {"id": "i" * 101}, "id is too long"),
    (MESSAGE | {"id": True}, "id must be"),
    (MESSAGE | {"user_message": ["hi"]}, "user_message must be"),
    (MESSAGE | {"user_message": "x" * 900_001}, "user_message is too long"),
    (MESSAGE | {"metadata": "x"}, "metadata must be an object"),
    (MESSAGE | {"metadata": dict.fromkeys(map(str, range(101)))}, "metadata is too long"),
    ({"type": "history", "token": "t", "limit": True}, "limit must be"),
    ({"type": "history", "token": "t", "limit": -1}, "limit must be between"),
]


def test_good_requests():
    for frame in GOOD:
        check_frame(frame)
    check_frame({"type": "approval_answer", "approval_id": 7, "decision": "once"}, gateway.FOLLOW_UPS)


@pytest.mark.parametrize(("frame", "text"), WRONG)
def test_wrong_requests(frame, text):
    with pytest.raises(WireError, match=text) as caught:
        check_frame(frame)
    assert len(str(caught.value)) < 120


# ===== Certificates ===========================================================


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return gateway.load_certificate(gateway.make_certificate(tmp_path_factory.mktemp("certificate")))


@pytest.fixture
def other(tmp_path):
    """The file of another certificate."""
    return gateway.make_certificate(tmp_path / "other")


def test_a_certificate_is_made_once_and_private(tmp_path):
    path = gateway.make_certificate(tmp_path / "home")
    first = gateway.load_certificate(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == [path.name]
    assert gateway.load_certificate(gateway.make_certificate(path.parent)).fingerprint == first.fingerprint
    assert len(first.fingerprint) == 64
    assert first.certificate.public_key().curve.name == "secp256r1"
    extensions = {extension.oid._name: extension.value for extension in first.certificate.extensions}
    assert extensions["basicConstraints"].ca is False and "subjectAltName" in extensions
    assert (first.certificate.not_valid_after_utc - first.certificate.not_valid_before_utc).days > 3_650


def test_certificates_that_cannot_be_used(tmp_path, other):
    mine = gateway.make_certificate(tmp_path)
    text = tmp_path / "text"
    text.write_text("hello")
    for cert, key, said in [
        (mine, other, "does not belong"),
        (tmp_path / "missing", None, "cannot read the certificate"),
        (mine, tmp_path / "missing", "cannot read the private key"),
        (tmp_path, None, "cannot read"),
        (text, None, "no certificate in PEM"),
        (mine, text, "no private key in PEM"),
    ]:
        with pytest.raises(ConfigError, match=said):
            gateway.load_certificate(cert, key)


# ===== QUIC ===================================================================


async def answer(stream):
    """What the tests' gateway does: pings are answered, messages talked about."""
    if stream.request["type"] == "ping":
        await stream.send(PONG)
    elif stream.request["user_message"] == "fail":
        raise RuntimeError("a bug")
    elif stream.request["user_message"] == "ask":
        await stream.send({"type": "approval"})
        await stream.send({"type": "reply", "content": await stream.receive()})
    else:
        await stream.send({"type": "reply", "content": stream.request["user_message"], "early": stream.early})


def known(request, peer):
    """A device for each token that begins with good."""
    return request["token"] if request["token"].startswith("good") else None


class MemoryTickets(dict):
    """Session tickets, each good for once."""

    def pop(self, label):
        return super().pop(label, None)

    def add(self, ticket):
        self[ticket.ticket] = ticket


@contextlib.asynccontextmanager
async def serving(identity, handler=answer, tickets=None, port=0, hosts=("127.0.0.1",), **limits):
    server = QuicServer(handler, known, identity, MemoryTickets() if tickets is None else tickets, Limits(**limits))
    await server.start([(host, port) for host in hosts])
    try:
        yield server
    finally:
        await server.close()


def client(server, **options):
    """A client that pins the server."""
    host, port = options.pop("address", server.addresses[0])
    return options.pop("kind", QuicClient)(host, port, **{"fingerprint": server.identity.fingerprint} | options)


def raw(connection, data, finish=False):
    """A stream that begins with these bytes."""
    stream = connection.link.open()
    stream.write(data, finish)
    return stream


async def asked(connection, frame=PING, last=True):
    """The one frame that answers."""
    stream = connection.open_stream(frame, last)
    reply = await stream.receive()
    assert await stream.receive() is None
    return reply


async def rebind(connection):
    """Go on from another UDP socket, as when the network has changed."""
    link, old = connection.link, connection.link.port
    link.port = await gateway.Port.open(gateway.udp_socket(old.sock.family), old.received, old.failed)
    old.close()
    link.quic.change_connection_id()
    link.touch()


async def until(true, seconds=3.0):
    """Wait for something that happens soon."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


def test_requests_side_by_side_leave_nothing_behind(identity):
    async def main():
        async with serving(identity) as server:
            async with client(server) as connection:
                replies = await asyncio.gather(*(asked(connection) for _ in range(300)))
                assert replies == [PONG] * 300
                stream = connection.open_stream(MESSAGE | {"user_message": "ask"})
                assert (await stream.receive())["type"] == "approval"
                await stream.send({"type": "approval_answer"})
                assert await stream.receive() == {"type": "reply", "content": {"type": "approval_answer"}}
                assert await stream.receive() is None
                (link,) = server.guard.links
                await until(lambda: not link.streams and not link.quic._streams and not connection.link.streams)
                assert 0 < await connection.ping() < 1
            await until(lambda: not server.links)
            assert not server.guard.links

    asyncio.run(main())


def test_large_messages_and_answers_come_whole(identity):
    async def main():
        async with serving(identity) as server, client(server) as connection:
            await asked(connection)  # a stranger may not
            text = "안녕" * 150_000
            assert (await asked(connection, MESSAGE | {"user_message": text}))["content"] == text

    asyncio.run(main())


def test_bad_input_gets_an_error_and_hurts_nobody(identity):
    cases = [(data, word) for data, word, _ in BAD if len(data) < 60_000] + [
        (encode_frame({}), "bad_request"),
        (encode_frame({"type": "ping"}), "bad_request"),
        (encode_frame({"type": "pong", "token": "good"}), "bad_request"),
        (encode_frame(PING | {"token": "bad"}), "unauthorized"),
        (encode_frame(PING)[:-1], "bad_request"),
        (b"\0", "bad_request"),
        (b"", "bad_request"),
    ]

    async def main():
        async with serving(identity, failures=1000) as server, client(server) as connection:
            await asked(connection)
            for data, word in cases:
                stream = raw(connection, data, True)
                assert (await stream.receive())["code"] == word, data
                assert await stream.receive() is None
            for code in (0, 9):
                raw(connection, encode_frame(PING)[:7]).reset(code)  # reset in the middle
            talk = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await talk.receive()
            talk.write(b"\0\0\0\1[")
            assert (await talk.receive())["code"] == "bad_request"
            (link,) = server.guard.links
            await until(lambda: not link.streams and not link.quic._streams)
            assert await asked(connection) == PONG

    asyncio.run(main())


def test_a_second_frame_that_never_comes_keeps_only_its_own_handler(identity):
    async def main():
        async with serving(identity, frame=0.1) as server, client(server) as connection:
            waiting = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await waiting.receive()
            half = raw(connection, b"\0\0")
            assert (await half.receive())["code"] == "too_slow"
            assert await asked(connection) == PONG
            waiting.reset()
            (link,) = server.guard.links
            await until(lambda: not link.streams)

    asyncio.run(main())


def test_a_stranger_may_say_little(identity):
    async def main():
        async with serving(identity, first_frame=0.3, failures=2) as server:
            async with client(server) as connection:
                stream = raw(connection, (1_000_000).to_bytes(4, "big"))  # a token of 1 MB
                assert (await stream.receive())["code"] == "too_large"
            async with client(server) as connection:
                stream = connection.open_stream(MESSAGE | {"user_message": "x" * 66_000})
                assert (await stream.receive())["code"] == "too_large"
            async with client(server) as connection:
                flood = [raw(connection, b"\0\0\xf0\0" + bytes(40_000)) for _ in range(8)]
                await until(lambda: connection.problem)
                assert connection.problem.code == gateway.Code.TOO_MUCH
                with pytest.raises(GatewayError):
                    await flood[0].receive()
            async with client(server) as connection:  # and says nothing
                started = time.monotonic()
                await until(lambda: connection.problem)
                assert connection.problem.code == gateway.Code.TIMEOUT and time.monotonic() - started < 1
            assert not server.guard.links

    asyncio.run(main())


def test_wrong_tokens_are_answered_later_and_later(identity):
    async def main():
        async with serving(identity, failures=3) as server:
            times = []
            async with client(server) as connection:
                for _ in range(3):
                    started = time.monotonic()
                    assert (await asked(connection, PING | {"token": "bad"}))["code"] == "unauthorized"
                    times.append(time.monotonic() - started)
                await until(lambda: connection.problem)
                assert connection.problem.code == gateway.Code.UNAUTHORIZED
            assert times[0] >= 0.1 and times[1] >= 0.2 and times[2] >= 0.4
            assert not server.tickets
            async with client(server) as connection:
                assert await asked(connection) == PONG  # who is known is not slowed
            assert len(server.tickets) == 1

    asyncio.run(main())


def test_wrong_tokens_of_many_networks_are_not_counted_for_ever():
    guard = gateway.Guard(Limits())
    assert [guard.wrong(b"a") for _ in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 4.0]
    assert guard.wrong(b"b") == 0.1
    for i in range(5000):
        guard.wrong(i.to_bytes(4, "big"))
    assert guard.wrong(b"a") == 0.1 and len(guard._wrong) <= gateway.NETWORKS_KEPT


def test_a_handler_that_fails_or_is_cancelled_ends_its_own_stream(identity, caplog):
    async def main():
        async with serving(identity) as server, client(server) as connection:
            failing = connection.open_stream(MESSAGE | {"user_message": "fail"})
            with pytest.raises(GatewayError, match="code 1") as caught:
                await failing.receive()
            assert caught.value.code == gateway.Code.INTERNAL
            failing = connection.open_stream(MESSAGE | {"user_message": "fail"}, last=True)
            async with asyncio.timeout(0.15):  # not only at the next time-out of the connection
                with pytest.raises(GatewayError, match="code 1"):
                    await failing.receive()
            waiting = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await waiting.receive()
            for task in server.tasks:
                task.cancel()
            with pytest.raises(GatewayError, match="code 8"):
                await waiting.receive()
            assert await asked(connection) == PONG
            (link,) = server.guard.links
            await until(lambda: not link.streams and not link.quic._streams)

    asyncio.run(main())
    assert "a bug" in caplog.text


def test_the_handler_hears_that_nobody_listens(identity):
    heard = []

    async def handler(stream):
        await stream.reset_by_peer.wait()
        try:
            await stream.send(PONG)
        except GatewayError as error:
            heard.append(str(error))

    async def main():
        async with serving(identity, handler) as server, client(server) as connection:
            stream = connection.open_stream(PING)
            await asyncio.sleep(0.05)
            stream.reset(5)
            await until(lambda: heard)
            connection.open_stream(PING)
            await asyncio.sleep(0.05)
            connection.close()
            await until(lambda: len(heard) == 2)

    asyncio.run(main())


@pytest.mark.parametrize("frame", [None, PING, MESSAGE | {"user_message": "wait"}])
def test_streams_that_the_client_resets_leave_nothing_behind(identity, frame):
    """However little it says, and if it does not tell us to stop: else it could soon open no more."""

    async def handler(stream):
        if stream.request.get("user_message") == "wait":
            await stream.reset_by_peer.wait()
        else:
            await answer(stream)

    async def main():
        async with serving(identity, handler, streams=16) as server, client(server) as connection:
            for _ in range(100):
                stream = connection.open_stream(frame) if frame else connection.link.open()
                if frame:
                    await asked(connection)
                connection.link.quic.reset_stream(stream.number, 1)
                assert await asked(connection) == PONG
            (link,) = server.guard.links
            await until(lambda: len(link.streams) < 2 and len(link.quic._streams) < 3)

    asyncio.run(main())


def test_send_waits_for_a_reader_and_ends_one_that_stalls(identity):
    piece, sent, ended = {"type": "delta", "text": "x" * 50_000}, [], []

    async def handler(stream):
        try:
            for _ in range(60):
                await stream.send(piece)
                sent.append(stream.link.stuck(stream.number, 0))
        except GatewayError as error:
            ended.append(str(error))
            raise

    async def main():
        async with serving(identity, handler, stall=0.3) as server, client(server) as connection:
            stream = connection.open_stream(PING, last=True)
            for _ in range(60):
                assert await stream.receive() == piece
            assert await stream.receive() is None and max(sent) <= 256 * 1024 + 50_100
            sent.clear()
            connection.open_stream(PING, last=True)
            connection.link.port.received = lambda batch, port: None  # hears nothing more
            await until(lambda: ended)
            assert ended == ["the reader took nothing for 0.3 s"] and max(sent) <= 256 * 1024 + 50_100

    asyncio.run(main())


# Early data


async def ticket_of(server, **options):
    """A ticket, got as a client gets it."""
    tickets = []
    async with client(server, on_ticket=tickets.append, **options) as connection:
        await asked(connection)
        await until(lambda: tickets and server.tickets)
    return gateway.ticket_from_json(gateway.ticket_to_json(tickets[0]))


def test_early_data_and_that_a_ticket_is_good_once(identity):
    async def main():
        async with serving(identity) as server:
            ticket = await ticket_of(server)
            for early in (True, False):
                async with client(server, ticket=ticket) as connection:
                    assert connection.early
                    reply = await asked(connection, MESSAGE)
                    assert reply == {"type": "reply", "content": "hi", "early": early}
                    await connection.connected()
                    assert connection.early_accepted is early
                    assert not connection.early

    asyncio.run(main())


def test_tickets_outlive_the_server(identity):
    async def main():
        async with serving(identity) as server:
            port, ticket = server.addresses[0][1], await ticket_of(server)
            kept = [gateway.ticket_to_json(one) for one in server.tickets.values()]
        tickets = MemoryTickets()
        for text in kept:
            tickets.add(gateway.ticket_from_json(text))
        async with serving(identity, tickets=tickets, port=port) as server, client(server, ticket=ticket) as connection:
            assert (await asked(connection, MESSAGE))["early"] is True

    asyncio.run(main())


def test_damaged_tickets_are_none():
    for text in ("", "{}", "[]", "null", '{"age_add": 1}', "\0", json.dumps({"cipher_suite": 99})):
        assert gateway.ticket_from_json(text) is None


@pytest.mark.parametrize("text", ["hi", "x" * 5_000], ids=["one datagram", "several"])
def test_early_data_is_sent_again_after_a_retry(identity, text):
    async def main():
        async with serving(identity) as server:
            ticket = await ticket_of(server)
            server.guard.limits = Limits(half_open=1)
            server.guard.junk, server.guard._junk_since = 99, time.monotonic()  # as in a flood
            async with client(server, ticket=ticket) as connection:
                stream = connection.open_stream(MESSAGE | {"user_message": text})
                assert await stream.receive() == {"type": "reply", "content": text, "early": True}
                await connection.connected()
                assert connection.link.quic._retry_count == 1 and connection.early_accepted
                assert connection.link.quic._loss.bytes_in_flight < 10_000

    asyncio.run(main())


def test_a_first_flight_that_is_replayed_runs_nothing(identity):
    runs = []

    async def handler(stream):
        runs.append(stream.early)
        await stream.send(PONG)

    async def main():
        async with serving(identity, handler, first_frame=0.3) as server:
            ticket = await ticket_of(server)
            runs.clear()
            async with relaying(server.addresses[0]) as relay:
                async with client(server, ticket=ticket, address=relay.address) as connection:
                    assert await asked(connection, MESSAGE) == PONG
                    await connection.connected()
                    replay = relay.sent[:]
                    relay.again(replay)  # while the connection stands
                    await asyncio.sleep(0.05)
                await until(lambda: not server.guard.links)
                relay.again(replay)  # and when it is forgotten
                await asyncio.sleep(0.05)
                assert server.guard.half_open  # the server takes it for somebody new, and cannot read the early data
                await until(lambda: not server.guard.links)
            assert runs == [True]

    asyncio.run(main())


class Relay(asyncio.DatagramProtocol):
    """Passes datagrams on between one client and a server, and remembers the client's."""

    def __init__(self, target):
        self.target, self.client, self.sent = target, None, []

    def connection_made(self, transport):
        self.transport, self.address = transport, transport.get_extra_info("sockname")

    def datagram_received(self, data, address):
        if address == self.target:
            self.transport.sendto(data, self.client)
        else:
            self.client = address
            self.sent.append(data)
            self.transport.sendto(data, self.target)

    def again(self, datagrams):
        for data in datagrams:
            self.transport.sendto(data, self.target)


@contextlib.asynccontextmanager
async def relaying(target):
    transport, relay = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Relay(target), local_addr=("127.0.0.1", 0)
    )
    try:
        yield relay
    finally:
        transport.close()


# Who answers


def test_another_certificate_is_refused_before_anything_is_said(identity, other):
    runs = []

    async def handler(stream):
        runs.append(stream.request)

    async def main():
        async with serving(identity, handler) as server:
            ticket = await ticket_of_mine(server)
            runs.clear()
            pinned = gateway.load_certificate(other).fingerprint
            for given_ticket in (None, ticket):
                with pytest.raises(WrongServer, match="another certificate") as caught:
                    async with client(
                        server, fingerprint=pinned, ticket=given_ticket, on_ticket=runs.append
                    ) as connection:
                        await connection.connected()
                assert caught.value.seen == identity.fingerprint
            # A request that is already queued goes nowhere either.
            connection = client(server, fingerprint=pinned)
            connecting = asyncio.create_task(connection.__aenter__())
            while connection.link is None:
                await asyncio.sleep(0)
            stream = connection.open_stream(PING)
            with pytest.raises(WrongServer):
                await connecting
            with pytest.raises(WrongServer):
                await stream.receive()
            await asyncio.sleep(0.05)
            assert runs == [] and not server.guard.links

    async def ticket_of_mine(server):
        tickets = []
        async with client(server, on_ticket=tickets.append) as connection:
            connection.open_stream(PING)
            await until(lambda: tickets)
        return tickets[0]

    asyncio.run(main())


def test_an_early_request_to_a_server_with_another_certificate_cannot_be_read(identity, other):
    runs = []

    async def handler(stream):
        runs.append(stream.request)

    async def main():
        async with serving(identity) as server:
            ticket, port = await ticket_of(server), server.addresses[0][1]
        async with serving(gateway.load_certificate(other), handler, port=port) as impostor:
            async with client(impostor, fingerprint=identity.fingerprint, ticket=ticket) as connection:
                assert connection.early
                stream = connection.open_stream(PING)
                with pytest.raises(WrongServer):
                    await stream.receive()
                with pytest.raises(WrongServer):
                    await connection.connected()
            await asyncio.sleep(0.05)
        assert runs == []

    asyncio.run(main())


def test_without_a_pin_the_fingerprint_is_shown_and_nothing_sent(identity):
    async def main():
        async with serving(identity) as server, client(server, fingerprint="") as connection:
            assert connection.fingerprint == identity.fingerprint
            with pytest.raises(GatewayError, match="no fingerprint"):
                connection.open_stream(PING)

    asyncio.run(main())


def test_a_new_certificate_is_for_new_connections(identity, other):
    async def main():
        async with serving(identity) as server, client(server) as old:
            server.use(gateway.load_certificate(other))
            assert server.identity.fingerprint != identity.fingerprint
            async with client(server) as new:
                assert await asked(new) == await asked(old) == PONG

    asyncio.run(main())


# Ways


def test_the_client_moves_to_another_socket_in_the_middle_of_a_request(identity):
    async def main():
        async with serving(identity) as server, client(server) as connection:
            stream = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await stream.receive()
            (link,) = server.guard.links
            before = link.peer
            for _ in range(3):
                await rebind(connection)
                await connection.ping()
            await stream.send({"type": "approval_answer"})
            assert (await stream.receive())["type"] == "reply"
            assert link.peer != before and link.peer[1] == connection.link.port.sock.getsockname()[1]
            assert server.guard.links == {link}

    asyncio.run(main())


class Elsewhere(QuicClient):
    """A client of a host that has these addresses."""

    found: tuple = ()

    async def _resolve(self):
        return [(socket.AF_INET, address) for address in self.found]


def test_another_address_is_tried_when_the_first_is_silent_or_refuses(identity):
    async def main():
        silent, closed = (gateway.udp_socket(socket.AF_INET, ("127.0.0.1", 0)) for _ in range(2))
        refusing = closed.getsockname()
        closed.close()
        async with serving(identity) as server:
            for first in (silent.getsockname(), refusing):
                for ticket in (None, await ticket_of(server)):
                    connection = Elsewhere("somewhere", 1, fingerprint=identity.fingerprint, ticket=ticket)
                    connection.found = (first, server.addresses[0])
                    async with connection:
                        assert (await asked(connection, MESSAGE))["content"] == "hi"
                        assert connection.link.peer == server.addresses[0]
        silent.close()

    asyncio.run(main())


def test_close_before_anybody_has_answered(identity):
    async def main():
        silent = gateway.udp_socket(socket.AF_INET, ("127.0.0.1", 0))
        async with serving(identity) as server:
            ticket = await ticket_of(server)
        connection = Elsewhere("somewhere", 1, fingerprint=identity.fingerprint, ticket=ticket)
        connection.found = (silent.getsockname(), silent.getsockname())
        async with connection:
            stream = connection.open_stream(PING)
            connection.link.end(GatewayError("between two addresses"))
            connection.close()
            with pytest.raises(GatewayError, match="closed here"):
                await stream.receive()
            with pytest.raises(GatewayError, match="closed here"):
                connection.open_stream(PING)
        silent.close()

    asyncio.run(main())


def test_nobody_there_silence_and_no_such_host(identity):
    async def main():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            host, port = sock.getsockname()
            with pytest.raises(GatewayError, match=r"no answer from 127.0.0.1, UDP port \d+ in 0.4 s; .*block UDP"):
                async with QuicClient(host, port, fingerprint="ab" * 32, time_limit=0.4):
                    pass
        started = time.monotonic()
        with pytest.raises(GatewayError, match="cannot reach|no answer"):
            async with QuicClient(host, port, fingerprint="ab" * 32, time_limit=1):
                pass
        assert time.monotonic() - started < 0.9 or os.uname().sysname != "Linux"
        with pytest.raises(GatewayError, match="has no address"):
            async with QuicClient("no-such-host.invalid", port, fingerprint="ab" * 32):
                pass

    asyncio.run(main())


def test_a_server_that_died_is_noticed(identity):
    async def main():
        async with serving(identity) as server, client(server) as connection:
            stream = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await stream.receive()
            server.ports[0].received = lambda batch, port: None  # dead
            with pytest.raises(GatewayError, match="does not answer any more"):
                await connection.ping(0.2)
            with pytest.raises(GatewayError, match="does not answer any more"):
                await stream.receive()

    asyncio.run(main())


def test_port_in_use_and_hosts_that_are_not_there(identity):
    async def main():
        async with serving(identity) as server:
            with pytest.raises(GatewayError, match="is in use"):
                async with serving(identity, port=server.addresses[0][1]):
                    pass
        for host in ("203.0.113.1", "no-such-host.invalid"):
            with pytest.raises((GatewayError, ConfigError), match="cannot listen|has no address"):
                async with serving(identity, hosts=(host,)):
                    pass
        async with serving(identity, hosts=("203.0.113.1", "127.0.0.1")) as server:
            assert [host for host, _ in server.addresses] == ["127.0.0.1"]

    asyncio.run(main())


def test_ipv4_and_ipv6_on_one_port(identity):
    async def main():
        try:
            probe = gateway.udp_socket(socket.AF_INET6, ("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
        probe.close()
        async with serving(identity, hosts=("127.0.0.1", "::1"), port=port) as server:
            for host in ("127.0.0.1", "::1"):
                async with client(server, address=(host, port)) as connection:
                    assert await asked(connection) == PONG

    asyncio.run(main())


# The end


def test_close_tells_the_streams_and_waits_for_nobody(identity):
    async def main():
        async with serving(identity) as server, client(server) as connection:
            stream = connection.open_stream(MESSAGE | {"user_message": "ask"})
            await stream.receive()
            started = time.monotonic()
            await server.close()
            assert time.monotonic() - started < 0.2 and not server.tasks and not server.guard.links
            assert (await stream.receive())["code"] == "shutting_down"
            await until(lambda: connection.problem)
            assert connection.problem.code == gateway.Code.SHUTTING_DOWN and "shutting down" in str(connection.problem)
            with pytest.raises(GatewayError, match="shutting down"):
                connection.open_stream(PING)

    asyncio.run(main())


def test_a_revoked_device_is_cut_off(identity):
    async def main():
        async with serving(identity) as server, client(server) as bad, client(server) as good:
            await asked(bad, PING | {"token": "good-1"})
            await asked(good, PING | {"token": "good-2"})
            assert server.cut("good-1") == 1
            await until(lambda: bad.problem)
            assert bad.problem.code == gateway.Code.REVOKED
            assert await asked(good, PING | {"token": "good-2"}) == PONG

    asyncio.run(main())


# Floods


def junk(rng):
    """An Initial that nobody can read."""
    head = b"\xc3\0\0\0\1\x08" + rng.randbytes(8) + b"\x08" + rng.randbytes(8) + b"\0"
    return head + (0x4000 | (1198 - len(head))).to_bytes(2, "big") + rng.randbytes(1198 - len(head))


def test_junk_leaves_nothing_and_stops_nobody(identity):
    async def main():
        rng = random.Random(7)
        async with serving(identity) as server, client(server) as connection:
            await asked(connection)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(server.addresses[0])
                sock.setblocking(False)
                for i in range(600):
                    sock.send(junk(rng) if i % 2 else rng.randbytes(rng.randrange(1, 1400)))
                    if i % 30 == 0:
                        assert await asked(connection) == PONG
                        assert len(server.guard.links) == 1 and not server.guard.half_open
                await asyncio.sleep(0.05)
                answers = 0
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(2000):
                        answers += 1
                assert 100 < answers < 300  # Retries
            async with client(server) as newcomer:
                assert newcomer.link.quic._retry_count == 1
                assert await asked(newcomer) == PONG

    asyncio.run(main())


def test_flipped_bits_of_real_datagrams(identity):
    async def main():
        rng = random.Random(7)
        async with serving(identity, first_frame=0.5) as server, relaying(server.addresses[0]) as relay:
            async with client(server, address=relay.address) as connection:
                await asked(connection)
                for data in relay.sent * 30:
                    damaged = bytearray(data)
                    damaged[rng.randrange(min(40, len(data)))] ^= 1 << rng.randrange(8)
                    relay.again([bytes(damaged), data[: rng.randrange(len(data))]])
                    if rng.random() < 0.1:
                        await asyncio.sleep(0)
                assert await asked(connection) == PONG
            await until(lambda: not server.guard.links)

    asyncio.run(main())


def test_versions_are_negotiated_and_not_for_ever(identity):
    async def main():
        async with serving(identity) as server:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(server.addresses[0])
                sock.setblocking(False)
                head = b"\x08ABCDEFGH\x04abcd"
                sock.send(b"\xc3\x1a\x2a\x3a\x4a" + head + bytes(1200))
                await asyncio.sleep(0.05)
                assert sock.recv(2000)[1:] == b"\0\0\0\0\x04abcd\x08ABCDEFGH\0\0\0\1"
                sock.send(b"\xc3\0\0\0\0" + head + bytes(1200))  # an answer of this kind itself
                sock.send(b"\xc3\x1a\x2a\x3a\x4a" + head)  # too short
                await asyncio.sleep(0.05)
                with pytest.raises(BlockingIOError):
                    sock.recv(2000)

    asyncio.run(main())


class Deaf(QuicClient):
    """A client that never hears an answer."""

    async def _open(self, link, sock, address):
        await super()._open(link, sock, address)
        link.port.received = lambda batch, port: None


def test_half_open_connections_end_and_are_few(identity):
    async def main():
        async with serving(identity, first_frame=0.3, strangers=4) as server:
            connections = [client(server, kind=Deaf, time_limit=0.5) for _ in range(6)]
            tasks = [asyncio.create_task(connection.__aenter__()) for connection in connections]
            await until(lambda: all(connection.link for connection in connections))
            await until(lambda: server.guard.half_open)
            await asyncio.sleep(0.05)
            assert server.guard.half_open == 4
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, GatewayError) for result in results)
            await until(lambda: not server.guard.links)
            async with client(server) as connection:
                assert await asked(connection) == PONG

    asyncio.run(main())


def test_no_more_connections_than_the_limit(identity):
    async def main():
        async with serving(identity, connections=2) as server, client(server) as one, client(server) as two:
            assert await asked(one) == await asked(two) == PONG
            with pytest.raises(GatewayError, match="no answer"):
                async with client(server, time_limit=0.4):
                    pass
            one.close()
            async with client(server) as three:
                assert await asked(three) == PONG

    asyncio.run(main())


def test_networks():
    assert gateway.network_of("192.0.2.1") != gateway.network_of("192.0.2.2")
    assert gateway.network_of("2001:db8::1") == gateway.network_of("2001:db8::ffff:0:1%eth0")
    assert gateway.network_of("2001:db8::1") != gateway.network_of("2001:db8:0:1::1")


# Another implementation


def test_a_client_of_another_implementation(identity):
    qh3 = pytest.importorskip("qh3.asyncio.client")
    from qh3.quic.configuration import QuicConfiguration

    async def main():
        async with serving(identity) as server:
            configuration = QuicConfiguration(
                is_client=True, alpn_protocols=[gateway.ALPN], server_name="localhost", verify_mode=0
            )
            async with qh3.connect(*server.addresses[0], configuration=configuration) as connection:
                reader, writer = await connection.create_stream()
                writer.write(encode_frame(MESSAGE))
                writer.write_eof()
                data = await asyncio.wait_for(reader.read(), 5)
        assert [frame["content"] for frame in FrameDecoder().feed(data)] == ["hi"]

    asyncio.run(main())
