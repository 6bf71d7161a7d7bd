"""What Telegram may have done or not: faults of the Bot API after which the bot must guess right."""

import asyncio
import contextlib
import types

import pytest
from fakes import BotServer

from openpista import Bot, ChannelBusy, Event, Inbox, Progress, Redactor, Store, View


@pytest.fixture(scope="module")
def server():
    with BotServer() as server:
        yield server


@contextlib.asynccontextmanager
async def shown(server, tmp_path, chat):
    """A view of a turn, its post, and the message that shows it."""
    with Store(tmp_path / "memory.db") as store:
        async with Bot(server.token, server.url) as bot:
            number = Inbox(store).add(Event(f"telegram:{chat}", "1", "s", "hi")).id
            hub = types.SimpleNamespace(inbox=Inbox(store), running={})

            async def put(channel, text, message, reply_to, quiet):
                found = message or await bot.call("sendMessage", chat_id=chat, text=text)
                return message or str(found["message_id"])

            room = [True]  # for one message
            paces = types.SimpleNamespace(spare=lambda chat: bool(room and room.pop()))
            post = types.SimpleNamespace(hub=hub, bot=bot, redact=Redactor(), paces=paces, put=put)
            view = View(post, Inbox(store).get(number), first=0.0)
            view.tell(Progress("delta", text="so far"))
            async with asyncio.timeout(5):
                while not view.message:
                    await asyncio.sleep(0.01)
            yield view
            await view.close()


@pytest.mark.parametrize(
    ("kind", "error"), [("junk", OSError), ("lost", OSError), ("drop", OSError), ("html", ChannelBusy)]
)
def test_an_answer_that_cannot_be_read_leaves_it_in_doubt(server, kind, error):
    async def go():
        async with Bot(server.token, server.url) as bot:
            server.say(1, "hi")
            server.fault("sendMessage", kind)
            with pytest.raises(error):
                await bot.call("sendMessage", chat_id=1, text=kind)
        assert (kind in [post["text"] for post in server.sent(1)]) == (kind in ("junk", "lost"))

    asyncio.run(go())


@pytest.mark.parametrize(
    ("chat", "kind", "times"), [(11, "drop", 1), (12, "lost", 1), (13, "status:500", 1), (14, "drop", 3)]
)
def test_a_progress_message_that_is_to_go_goes_or_is_used_again(server, tmp_path, chat, kind, times):

    async def go():
        server.say(chat, "hi")
        async with shown(server, tmp_path, chat) as view:
            server.fault("deleteMessage", kind, times)
            view.PAUSES = (0.0, 0.01, 0.01)
            await view.leave()
            (post,) = server.sent(chat)
            assert post["deleted"] == (times < 3)
            assert view.message == ("" if post["deleted"] else str(post["message_id"]))
            assert view.post.hub.inbox.get(view.item.id).shown == view.message

    asyncio.run(go())
