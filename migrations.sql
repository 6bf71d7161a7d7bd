-- The whole schema of openpista's database, as numbered steps.
--
-- `PRAGMA user_version` says how far a file is. Each step runs in one
-- transaction and is never edited once it was released: a change is a new step.
-- Times are UTC, ISO 8601. Text columns are what a person would want to read.

-- step 1: sessions, their messages, the journal of tool calls, usage

CREATE TABLE sessions (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    created_at  TEXT NOT NULL,
    updated_at  TEXT NOT NULL,
    elided_upto INTEGER NOT NULL DEFAULT 0,  -- tool results up to this message go out as a stub
    owner       TEXT,                        -- who works on it now: host:pid
    lease_until TEXT                         -- and until when that holds without a heartbeat
);

CREATE TABLE messages (
    id         INTEGER PRIMARY KEY,
    session_id INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE,
    role       TEXT NOT NULL CHECK (role IN ('user', 'assistant', 'tool')),
    text       TEXT NOT NULL,
    tool_calls TEXT,                         -- role assistant: JSON list of {id, name, arguments, …}
    call_id    TEXT,                         -- role tool: which call this answers
    is_error   INTEGER NOT NULL DEFAULT 0,
    echo       TEXT,                         -- JSON: what the model wants to see again, such as its reasoning
    created_at TEXT NOT NULL
);
CREATE INDEX messages_by_session ON messages (session_id, id);

-- What stands for the messages up to and with `upto`.
CREATE TABLE summaries (
    id         INTEGER PRIMARY KEY,
    session_id INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE,
    upto       INTEGER NOT NULL,
    text       TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE INDEX summaries_by_session ON summaries (session_id, upto);

-- The journal: written before a tool starts and again when it has finished, so
-- that after a crash it is known which calls may have had an effect.
CREATE TABLE tool_calls (
    id          INTEGER PRIMARY KEY,
    session_id  INTEGER NOT NULL REFERENCES sessions ON DELETE CASCADE,
    message_id  INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    call_id     TEXT NOT NULL,
    name        TEXT NOT NULL,
    arguments   TEXT NOT NULL,
    state       TEXT NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'started', 'finished', 'interrupted')),
    started_at  TEXT,
    finished_at TEXT,
    UNIQUE (message_id, call_id)
);
CREATE INDEX tool_calls_by_session ON tool_calls (session_id, state);

-- One row for each call of a model.
CREATE TABLE usage (
    id            INTEGER PRIMARY KEY,
    session_id    INTEGER REFERENCES sessions ON DELETE SET NULL,
    at            TEXT NOT NULL,
    provider      TEXT NOT NULL,
    model         TEXT NOT NULL,
    input_tokens  INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cost_usd      REAL,                      -- as reported by the provider, else NULL
    seconds       REAL NOT NULL
);
CREATE INDEX usage_by_time ON usage (at);
CREATE INDEX usage_by_session ON usage (session_id);

-- step 2: a session may have a model of its own

ALTER TABLE sessions ADD COLUMN model TEXT NOT NULL DEFAULT '';  -- provider/model; '' is the configured one

-- step 3: messages on their way in and out, jobs, devices of the gateway

-- What came in. A row is written before the sender is told that it was taken.
CREATE TABLE inbox (
    id          INTEGER PRIMARY KEY,
    channel     TEXT NOT NULL,               -- from whom, and to whom the answer goes: telegram:42, quic:laptop
    identity    TEXT NOT NULL,               -- the channel's own name for it: what comes twice is taken once
    session     TEXT NOT NULL,               -- by name: it is made when the turn begins
    sender      TEXT NOT NULL DEFAULT '',
    reply_to    TEXT NOT NULL DEFAULT '{}',  -- JSON: what else the channel needs for the answer
    text        TEXT NOT NULL,
    metadata    TEXT NOT NULL DEFAULT '{}',  -- JSON
    state       TEXT NOT NULL DEFAULT 'waiting'
                CHECK (state IN ('waiting', 'running', 'done', 'stopped', 'failed')),
    attempts    INTEGER NOT NULL DEFAULT 0,  -- how often its turn was begun or taken up again
    message_id  INTEGER REFERENCES messages ON DELETE SET NULL,  -- the same words in the transcript, once running
    received_at TEXT NOT NULL,
    done_at     TEXT,
    UNIQUE (channel, identity)
);
CREATE INDEX inbox_open ON inbox (session, id) WHERE state IN ('waiting', 'running');
CREATE INDEX inbox_by_session ON inbox (session) WHERE done_at IS NOT NULL;
CREATE INDEX inbox_by_message ON inbox (message_id) WHERE message_id IS NOT NULL;
CREATE INDEX inbox_by_end ON inbox (done_at) WHERE done_at IS NOT NULL;

-- What goes out. The answer to a message is written together with the end of its turn.
CREATE TABLE outbox (
    id         INTEGER PRIMARY KEY,
    inbox_id   INTEGER REFERENCES inbox ON DELETE CASCADE,  -- NULL: nobody asked for it
    channel    TEXT NOT NULL,
    reply_to   TEXT NOT NULL DEFAULT '{}',   -- JSON
    piece      INTEGER NOT NULL DEFAULT 0,   -- of a text that the channel cannot take whole
    text       TEXT NOT NULL,
    metadata   TEXT NOT NULL DEFAULT '{}',   -- JSON: is_error, model, usage
    state      TEXT NOT NULL DEFAULT 'waiting'
               CHECK (state IN ('waiting', 'sending', 'sent', 'unknown', 'dead')),
    attempts   INTEGER NOT NULL DEFAULT 0,
    error      TEXT NOT NULL DEFAULT '',     -- why the last attempt failed
    created_at TEXT NOT NULL,
    next_at    TEXT NOT NULL,                -- not tried before
    sent_at    TEXT
);
CREATE INDEX outbox_open ON outbox (channel, id) WHERE state IN ('waiting', 'sending');
CREATE INDEX outbox_by_inbox ON outbox (inbox_id, created_at);

CREATE TABLE jobs (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    schedule   TEXT NOT NULL,                -- cron's fields, or one moment
    tz         TEXT NOT NULL DEFAULT '',     -- IANA name; '' is the machine's
    prompt     TEXT NOT NULL,
    session    TEXT NOT NULL,
    channel    TEXT NOT NULL DEFAULT '',     -- where the answer goes
    reply_to   TEXT NOT NULL DEFAULT '{}',   -- JSON
    catch_up   TEXT NOT NULL DEFAULT 'once' CHECK (catch_up IN ('skip', 'once', 'all')),
    origin     TEXT NOT NULL DEFAULT 'command' CHECK (origin IN ('command', 'config', 'agent')),
    state      TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused', 'done')),
    next_at    TEXT,                         -- when it is due; NULL: never again
    created_at TEXT NOT NULL
);
CREATE INDEX jobs_due ON jobs (next_at) WHERE state = 'active';

CREATE TABLE job_runs (
    id       INTEGER PRIMARY KEY,
    job_id   INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    due_at   TEXT NOT NULL,
    fired_at TEXT NOT NULL,
    inbox_id INTEGER REFERENCES inbox ON DELETE SET NULL,  -- what became of it; NULL: see note
    note     TEXT NOT NULL DEFAULT '',
    UNIQUE (job_id, due_at)
);
CREATE INDEX job_runs_by_inbox ON job_runs (inbox_id);

-- Who may speak to the gateway. Of a token only its hash is kept.
CREATE TABLE devices (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    token_hash TEXT NOT NULL UNIQUE,         -- SHA-256, hexadecimal
    created_at TEXT NOT NULL,
    last_seen  TEXT,
    revoked_at TEXT
);

-- Session tickets of TLS: each is taken out when it is redeemed, and so is good for once.
CREATE TABLE tickets (
    label      TEXT PRIMARY KEY,             -- hexadecimal
    body       TEXT NOT NULL,                -- JSON
    expires_at TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX tickets_by_end ON tickets (expires_at);

-- step 4: Telegram: who may speak and where each chat stands; questions that outlive a restart; pictures

ALTER TABLE messages ADD COLUMN images TEXT;  -- JSON list of {path, media_type}: what a model sees beside the text
ALTER TABLE inbox ADD COLUMN shown TEXT NOT NULL DEFAULT '';  -- the name in the channel of the message that shows its progress
ALTER TABLE outbox ADD COLUMN in_doubt INTEGER NOT NULL DEFAULT 0;  -- an earlier attempt may have arrived

-- Risky calls that a person was asked about.
CREATE TABLE approvals (
    id         INTEGER PRIMARY KEY,
    inbox_id   INTEGER NOT NULL REFERENCES inbox ON DELETE CASCADE,
    call_id    TEXT NOT NULL,
    tool       TEXT NOT NULL,
    arguments  TEXT NOT NULL,                -- JSON
    danger     TEXT NOT NULL,
    state      TEXT NOT NULL DEFAULT 'waiting'
               CHECK (state IN ('waiting', 'once', 'always', 'deny', 'expired', 'withdrawn')),
    shown      TEXT NOT NULL DEFAULT '',     -- the channel's name for the message that asks
    decided_by TEXT NOT NULL DEFAULT '',
    asked_at   TEXT NOT NULL,
    expires_at TEXT NOT NULL,
    used_at    TEXT                          -- when the turn took the decision
);
CREATE INDEX approvals_by_inbox ON approvals (inbox_id);

-- Calls that a session need not ask about any more.
CREATE TABLE grants (
    session    TEXT NOT NULL,
    call       TEXT NOT NULL,                -- JSON: [tool, arguments]
    granted_at TEXT NOT NULL,
    PRIMARY KEY (session, call)
) WITHOUT ROWID;

-- Who wrote to a channel without being in its configuration.
CREATE TABLE people (
    channel    TEXT NOT NULL,                -- telegram
    id         TEXT NOT NULL,                -- the channel's, which nobody else can take: no user name
    name       TEXT NOT NULL DEFAULT '',
    state      TEXT NOT NULL CHECK (state IN ('asked', 'allowed', 'denied')),
    code       TEXT NOT NULL DEFAULT '',     -- that the person was given, while it is good
    asked_at   TEXT NOT NULL,
    expires_at TEXT,
    PRIMARY KEY (channel, id)
) WITHOUT ROWID;

-- Which session a chat is in.
CREATE TABLE chats (
    place    TEXT PRIMARY KEY,               -- telegram:42, telegram:-100123/7 for a topic
    session  TEXT NOT NULL DEFAULT '',       -- '': the one with the name of the place
    moved_to TEXT NOT NULL DEFAULT ''        -- the place that this group is now, if it has become another
) WITHOUT ROWID;

-- How far a channel has read.
CREATE TABLE cursors (
    name     TEXT PRIMARY KEY,
    position INTEGER NOT NULL,
    moved_at TEXT NOT NULL
) WITHOUT ROWID;
