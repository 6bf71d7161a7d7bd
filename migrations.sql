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
