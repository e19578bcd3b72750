--- `core.pubsub`: commands of a client over a WebSocket, each answered with what its handler gives (pubsub.md, pubsub/kafka.md).
--
-- `local pubsub, err = core.pubsub.new()`, `pubsub:on("cmd_ping", function(params) return { pong_resp = … } end)`,
-- `pubsub:wait()`. Messages are Protocol Buffers as docs/pubsub.proto has them. Access phase of an HTTP/1.1 request; waits.
-- The `kafka` scheme of upstreams is not there: a plugin that speaks to its brokers answers the commands.
local log = require("apisix.core.log")
local native = require("moongate.native").pb
local ws_server = require("resty.websocket.server")
local concat, error, math_floor, pcall, setmetatable, sub = table.concat, error, math.floor, pcall, setmetatable, string.sub
local tonumber, tostring, type = tonumber, tostring, type

local PROTO = [[
// What a client of core.pubsub sends and gets over its WebSocket, each in a binary message of its own.
syntax = "proto3";

message CmdEmpty {}

// Is answered with the same state.
message CmdPing {
    bytes state = 1;
}

message CmdKafkaFetch {
    string topic = 1;
    int32 partition = 2;
    int64 offset = 3;
}

// timestamp: milliseconds of Unix time, -1 for the last offset, -2 for the first.
message CmdKafkaListOffset {
    string topic = 1;
    int32 partition = 2;
    int64 timestamp = 3;
}

// The answer has the sequence of its request.
message PubSubReq {
    int64 sequence = 1;
    oneof req {
        CmdEmpty cmd_empty = 31;
        CmdPing cmd_ping = 32;
        CmdKafkaFetch cmd_kafka_fetch = 33;
        CmdKafkaListOffset cmd_kafka_list_offset = 34;
    }
}

message ErrorResp {
    int32 code = 1;
    string message = 2;
}

message PongResp {
    bytes state = 1;
}

message KafkaMessage {
    int64 offset = 1;
    int64 timestamp = 2;
    bytes key = 3;
    bytes value = 4;
}

message KafkaFetchResp {
    repeated KafkaMessage messages = 1;
}

message KafkaListOffsetResp {
    int64 offset = 1;
}

message PubSubResp {
    int64 sequence = 1;
    oneof resp {
        ErrorResp error_resp = 31;
        PongResp pong_resp = 32;
        KafkaFetchResp kafka_fetch_resp = 33;
        KafkaListOffsetResp kafka_list_offset_resp = 34;
    }
}
]]

-- Bytes of a client's message: commands are names and numbers. The bound of lua-resty-websocket.
local MAX_REQUEST = 65535
-- Bytes of an answer: a batch of messages of a broker, whose own bound is 1 MB for each.
local MAX_RESPONSE = 4 * 1024 * 1024
-- Frames of one message: empty ones would not count as bytes.
local MAX_FRAGMENTS = 1024
-- Milliseconds without a frame until the client is asked whether it is there; as many again until it is left.
local IDLE_MS = 60 * 1000
-- Bytes of a text message that are logged.
local MAX_LOGGED = 128
-- RFC 6455, 7.4.1.
local GOING_AWAY, TOO_BIG = 1001, 1009

local COMMANDS = { "cmd_ping", "cmd_empty", "cmd_kafka_fetch", "cmd_kafka_list_offset" }
local ANSWERS = { "error_resp", "pong_resp", "kafka_fetch_resp", "kafka_list_offset_resp" }
-- As lua-protobuf's int64_as_string: what is no exact number in Lua is a text.
local OPTIONS = { defaults = "auto", int64 = "string" }

local _M = {}
local mt = { __index = _M }

local types

-- The protocol's types, in a set of their own: `pb` has those of plugins.
local function protocol()
    if types then
        return types
    end
    local set = native.new()
    local bytes, err = native.compile("pubsub.proto", { ["pubsub.proto"] = PROTO }, true)
    local ok = bytes
    if bytes then
        ok, err = native.load(set, bytes)
    end
    if not ok then
        error("failed to load the pubsub protocol: " .. tostring(err), 0)
    end
    types = set
    return set
end

--- Answers the request's handshake and takes its connection over. `opts` (ours): `idle_ms`, milliseconds without a frame until
-- the client is asked with a ping whether it is there (60000), and as many again until it is left; `max_request`, bytes of a
-- message (65535). An object; nil and why the request is no handshake, which can be answered then.
function _M.new(opts)
    opts = opts or {}
    local set = protocol()
    local max_request = opts.max_request or MAX_REQUEST
    local ws, err = ws_server:new({
        max_recv_len = max_request, max_send_len = MAX_RESPONSE, timeout = opts.idle_ms or IDLE_MS,
    })
    if not ws then
        return nil, err
    end
    return setmetatable({ ws = ws, types = set, max_request = max_request, handlers = {} }, mt)
end

--- `handler(params)` is called for each `command` (`cmd_ping`, `cmd_empty`, `cmd_kafka_fetch`, `cmd_kafka_list_offset`) with its
-- fields; integers beyond 32 bits are texts. It returns a table with the answer's field, as `{ pong_resp = { state = … } }`; nil,
-- an error for the client and (ours) an integer as its code, 0 by default. It may wait. Raises for arguments of another type.
function _M:on(command, handler)
    if type(command) ~= "string" or type(handler) ~= "function" then
        error("pubsub:on takes a command's name and a function", 2)
    end
    self.handlers[command] = handler
end

-- The next frame; where none comes in time the client is asked once, then the wait is over. payload, type, more; nil, nil, err.
local function next_frame(ws)
    local data, typ, err = ws:recv_frame()
    if data or ws.fatal then
        return data, typ, err
    end
    local sent, send_err = ws:send_ping()
    if not sent then
        return nil, nil, send_err
    end
    data, typ, err = ws:recv_frame()
    if not data and not ws.fatal then
        ws:send_close(GOING_AWAY, "idle")
    end
    return data, typ, err
end

-- Adds a frame's payload to the parts of its message: the whole message when it was the last one.
local function assemble(self, parts, data, more)
    parts.n, parts.size = parts.n + 1, parts.size + #data
    if parts.size > self.max_request or parts.n > MAX_FRAGMENTS then
        self.ws:send_close(TOO_BIG, "message too big")
        return nil, "message too big: more than " .. self.max_request .. " bytes or " .. MAX_FRAGMENTS .. " frames"
    end
    parts[parts.n] = data
    return more ~= "again" and concat(parts) or nil
end

-- A whole message and its type ("text", "binary"); "" and "close" at the client's end; nil, nil and what went wrong.
local function next_message(self)
    local ws, parts = self.ws, nil
    while true do
        local data, typ, more = next_frame(ws)
        if not data then
            return nil, nil, more
        elseif typ == "ping" then
            local sent, err = ws:send_pong(data)
            if not sent then
                return nil, nil, err
            end
        elseif typ == "close" then
            ws:send_close()
            return "", typ
        elseif typ ~= "pong" then
            if (typ == "continuation") == (parts == nil) then
                return nil, nil, "fragments out of order"
            end
            parts = parts or { n = 0, size = 0, type = typ }
            local message, err = assemble(self, parts, data, more)
            if message or err then
                return message, message and parts.type, err
            end
        end
    end
end

-- The command's name, its fields and the sequence; nil when the bytes are no request or one without a command.
local function command_of(self, bytes)
    local ok, request = pcall(native.decode, self.types, "PubSubReq", bytes, OPTIONS)
    if not ok then
        return nil
    end
    for i = 1, #COMMANDS do
        local params = request[COMMANDS[i]]
        if params then
            return COMMANDS[i], params, request.sequence
        end
    end
end

local function error_resp(message, code)
    code = tonumber(code) or 0
    return { error_resp = { code = code == math_floor(code) and code or 0, message = tostring(message) } }
end

-- What the command is answered with.
local function answer_to(self, command, params)
    local handler = self.handlers[command]
    if not handler then
        log.error("pubsub callback handler not registered for the command, command: ", command)
        return error_resp("unknown command")
    end
    local answer, err, code = handler(params)
    return answer or error_resp(err or "unknown error", code)
end

local function field_of(answer)
    for i = 1, #ANSWERS do
        if answer[ANSWERS[i]] ~= nil then
            return ANSWERS[i]
        end
    end
end

-- The bytes of an answer; nil and why it is none.
local function encoded(self, answer, sequence)
    if type(answer) ~= "table" then
        return nil, "it is no table"
    end
    local field = field_of(answer)
    if not field then
        return nil, "it has no field of PubSubResp"
    end
    local response = { sequence = sequence, [field] = answer[field] }
    local ok, bytes = pcall(native.encode, self.types, "PubSubResp", response)
    if not ok then
        return nil, bytes
    end
    if #bytes > MAX_RESPONSE then
        return nil, "it is bigger than " .. MAX_RESPONSE .. " bytes"
    end
    return bytes
end

local function handle(self, message)
    local command, params, sequence = command_of(self, message)
    if not command then
        return log.warn("pubsub server receives empty command")
    end
    local bytes, err = encoded(self, answer_to(self, command, params), sequence)
    if not bytes then
        log.error("the answer of a pubsub handler cannot be sent, command: ", command, ", err: ", err)
        bytes = encoded(self, error_resp("internal error"), sequence)
    end
    return self.ws:send_binary(bytes)
end

-- Answers until the client ends it: nil; or what went wrong.
local function serve(self)
    while true do
        local message, typ, err = next_message(self)
        if not message then
            return err
        elseif typ == "close" then
            return nil
        elseif typ ~= "binary" then
            log.warn("pubsub server receive non-binary data, type: ", typ, ", data: ", sub(message, 1, MAX_LOGGED))
        else
            local sent
            sent, err = handle(self, message)
            if err and not sent then
                return err
            end
        end
    end
end

--- Answers the client's commands one after the other until it closes the connection, or is silent for too long: nil; or what went
-- wrong, which is in error.log, too. What is no command or no binary message is passed over with a line of error.log.
function _M:wait()
    local err = serve(self)
    if err then
        log.error("fatal error in pubsub websocket server, err: ", err)
    end
    return err
end

return _M
