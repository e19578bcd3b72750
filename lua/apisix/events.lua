--- `apisix.events`: events that reach every worker, through the shared dictionary `worker-events`. All phases.
--
-- An event is kept for a minute; a worker sees what others post within a second. One that it posts itself it sees at once.
local log = require("apisix.core.log")
local json = require("apisix.core.json")
local ngx = ngx
local ipairs, pairs, pcall, type = ipairs, pairs, pcall, type

local _M = { EVENTS_MODULE_LUA_RESTY_WORKER_EVENTS = "lua-resty-worker-events", EVENTS_MODULE_LUA_RESTY_EVENTS = "lua-resty-events" }

local DICT = "worker-events"
-- Seconds that an event waits for the workers, and between two looks at it.
local KEPT_SECS, INTERVAL_SECS = 60, 1
-- Events that a worker takes in one look, and the bytes of one. More are lost, with a line of error.log.
local MAX_BATCH, MAX_BYTES = 1000, 65536

-- source -> event ("*": each) -> array of handlers.
local handlers = {}
local seen

local function list_of(source, event)
    local of_source = handlers[source]
    return of_source and of_source[event] or {}
end

local function deliver(source, event, data)
    for _, list in ipairs({ list_of(source, event), list_of(source, "*") }) do
        for _, handler in ipairs(list) do
            local ok, err = pcall(handler, data, event, source)
            if not ok then
                log.error("failed to handle the event ", event, " of ", source, ": ", err)
            end
        end
    end
end

-- False when there is nothing at that place.
local function take(dict, at)
    local text = dict:get("event:" .. at)
    local item = text and json.decode(text)
    if item and item.worker ~= ngx.worker.id() then
        deliver(item.source, item.event, item.data)
    end
    return text ~= nil
end

-- The place whose event was not there yet: a number is taken a moment before its event is written.
local awaited

local function look(premature)
    local dict = ngx.shared[DICT]
    if premature or not dict then
        return
    end
    local last = dict:get("last") or 0
    if last - seen > MAX_BATCH then
        log.error("lost ", last - seen - MAX_BATCH, " events: there are too many of them")
        seen = last - MAX_BATCH
    end
    for at = seen + 1, last do
        if not take(dict, at) and at == last and awaited ~= at then
            -- Asked for once more in the next turn.
            awaited, seen = at, at - 1
            return
        end
    end
    seen = last
end

local function start()
    local dict = ngx.shared[DICT]
    seen = dict and dict:get("last") or 0
    local ok, err = ngx.timer.every(INTERVAL_SECS, look)
    if not ok then
        seen = nil
        log.error("failed to watch for events: ", err)
    end
end

--- Calls `handler(data, event, source)` for each event of that name from that source from here on. Without `event`, for each
-- event of the source.
function _M.register(_, handler, source, event)
    if type(handler) ~= "function" then
        return nil, "the handler is no function"
    end
    event = event or "*"
    handlers[source] = handlers[source] or {}
    local list = list_of(source, event)
    list[#list + 1] = handler
    handlers[source][event] = list
    if not seen then
        start()
    end
    return true
end

--- Sends an event, with data that JSON can say, to the handlers of all workers: true, or nil and the reason.
function _M.post(_, source, event, data)
    local dict = ngx.shared[DICT]
    if not dict then
        return nil, "there is no shared dictionary " .. DICT .. "; name it in config.yaml"
    end
    local text, err = json.encode({ source = source, event = event, data = data, worker = ngx.worker.id() })
    if not text then
        return nil, err
    end
    if #text > MAX_BYTES then
        return nil, "the event is longer than " .. MAX_BYTES .. " bytes"
    end
    deliver(source, event, data)
    local at
    at, err = dict:incr("last", 1, 0)
    if not at then
        return nil, err
    end
    local ok
    ok, err = dict:set("event:" .. at, text, KEPT_SECS)
    return ok, err
end

--- Nothing is left to make ready.
function _M.init_worker() end

--- The names of a source's events that are handed in as an array, as a table by name.
function _M.event_list(_, source, ...)
    local out = { _source = source }
    for _, name in pairs({ ... }) do
        out[name] = name
    end
    return out
end

return _M
