--- `apisix.utils.batch-processor`: gathers entries and hands them on in batches, in the background, with retries.
--
-- Bounds: a batch is sent when it has `batch_max_size` entries, is `buffer_duration` old, or nothing came for
-- `inactive_timeout`; a batch that fails is tried `max_retry_count` times more, `retry_delay` apart, then dropped with
-- a log line. What is gathered, sent and tried again together takes `MAX_PENDING_BYTES` at most.
local core = require("apisix.core")
local native = require("moongate.native").apisix
local ngx = ngx
local now = ngx.now
local exiting = ngx.worker.exiting
local timer_at = ngx.timer.at
local pairs, pcall, setmetatable, tostring, type = pairs, pcall, setmetatable, tostring, type

local _M = {}
local mt = { __index = _M }

-- Entries of a request without bodies take 1 to 2 KB, 8192 of them (`max_pending_entries`) a quarter of this. With bodies they take up
-- to a megabyte each: then this is the bound that holds. A batch that is being sent is there a second time, as text.
local MAX_PENDING_BYTES = 64 * 1024 * 1024
_M.MAX_PENDING_BYTES = MAX_PENDING_BYTES
-- Seconds between two lines about what is dropped.
local REPORT_INTERVAL = 1
_M.REPORT_INTERVAL = REPORT_INTERVAL
-- What a table or a field of one takes beside its texts, about.
local TABLE_BYTES, FIELD_BYTES = 64, 40
-- As deep as log entries go; what lies deeper counts as nothing.
local MAX_DEPTH = 8

local schema = {
    type = "object",
    properties = {
        name = { type = "string", default = "log buffer" },
        max_retry_count = { type = "integer", minimum = 0, default = 0 },
        retry_delay = { type = "integer", minimum = 0, default = 1 },
        buffer_duration = { type = "integer", minimum = 1, default = 60 },
        inactive_timeout = { type = "integer", minimum = 1, default = 5 },
        batch_max_size = { type = "integer", minimum = 1, default = 1000 },
    },
}
_M.schema = schema

local send_batch, arm_flush

local function new_batch()
    return { entries = {}, sizes = {}, retries = 0 }
end

-- Processors without a route or an address are counted nowhere, as in APISIX.
local function slot_of(config)
    if config.name and config.route_id and config.server_addr then
        return native.waiting_slot(config.name, tostring(config.route_id), config.server_addr)
    end
end

-- So many more entries wait, or fewer: `batch_process_entries` of the metrics.
local function waits(self, count)
    self.pending = self.pending + count
    if self.slot and not native.add_waiting(self.slot, count) then
        -- Nothing waited here for so long that somebody else got the place.
        self.slot = slot_of(self)
        if self.slot then
            native.add_waiting(self.slot, self.pending)
        end
    end
end

local function size_of(value, depth)
    local kind = type(value)
    if kind == "string" then
        return #value
    elseif kind ~= "table" or depth > MAX_DEPTH then
        return 0
    end
    local bytes = TABLE_BYTES
    for k, v in pairs(value) do
        bytes = bytes + FIELD_BYTES + size_of(k, depth + 1) + size_of(v, depth + 1)
    end
    return bytes
end

--- What an entry takes in memory, about, in bytes.
function _M.size_of(entry)
    return FIELD_BYTES + size_of(entry, 1)
end

-- The first `count` entries of a batch wait no more.
local function done(self, batch, count)
    local bytes = 0
    for i = 1, count do
        bytes = bytes + batch.sizes[i]
    end
    waits(self, -count)
    self.pending_bytes = self.pending_bytes - bytes
    if self.on_done then
        self.on_done(count, bytes)
    end
end

-- A failed batch goes without the entries that were taken: `first_fail` says where to start again. How many it had.
local function cut(self, batch, first_fail)
    local count = #batch.entries
    if type(first_fail) == "number" and first_fail > 1 and first_fail <= count then
        done(self, batch, first_fail - 1)
        local entries, sizes = {}, {}
        for i = first_fail, count do
            entries[#entries + 1] = batch.entries[i]
            sizes[#sizes + 1] = batch.sizes[i]
        end
        batch.entries, batch.sizes = entries, sizes
    end
    return count
end

local function retry_or_drop(self, batch, err, first_fail)
    if type(first_fail) == "number" then
        local count = cut(self, batch, first_fail)
        core.log.error("Batch Processor[", self.name, "] failed to process entries [", #batch.entries, "/", count, "]: ", err)
    else
        core.log.error("Batch Processor[", self.name, "] failed to process entries: ", err)
    end
    batch.retries = batch.retries + 1
    if batch.retries <= self.max_retry_count and not exiting() then
        local ok, timer_err = timer_at(self.retry_delay, send_batch, self, batch)
        if ok then
            return
        end
        core.log.error("failed to create a timer: ", timer_err)
    end
    core.log.error("Batch Processor[", self.name, "] exceeded the max_retry_count[", batch.retries,
        "] dropping the entries")
    done(self, batch, #batch.entries)
end

function send_batch(_, self, batch)
    local ran, ok, err, first_fail = pcall(self.func, batch.entries, self.batch_max_size)
    if not ran then
        ok, err = false, ok
    end
    if ok then
        core.log.debug("Batch Processor[", self.name, "] successfully processed the entries")
        return done(self, batch, #batch.entries)
    end
    retry_or_drop(self, batch, err, first_fail)
end

-- Hands the gathered entries on.
local function hand_on(self)
    local batch = self.batch
    if #batch.entries == 0 then
        return
    end
    self.batch = new_batch()
    local ok, err = timer_at(0, send_batch, self, batch)
    if not ok then
        core.log.error("failed to create a timer: ", err)
        done(self, batch, #batch.entries)
    end
end

local function send_now(self)
    local batch = self.batch
    if #batch.entries > 0 then
        self.batch = new_batch()
        send_batch(true, self, batch)
    end
end

local function flush_when_due(premature, self)
    self.armed = false
    if premature or exiting() then
        -- No timer starts any more.
        return send_now(self)
    end
    if #self.batch.entries == 0 then
        return
    end
    local t = now()
    if t - self.first_at >= self.buffer_duration or t - self.last_at >= self.inactive_timeout then
        core.log.debug("Batch Processor[", self.name, "] buffer duration exceeded, activating buffer flush")
        return hand_on(self)
    end
    core.log.debug("Batch Processor[", self.name, "] extending buffer timer")
    arm_flush(self)
end

function arm_flush(self)
    if self.armed or #self.batch.entries == 0 then
        return
    end
    local ok, err = timer_at(self.inactive_timeout, flush_when_due, self)
    if not ok then
        core.log.error("failed to create a timer: ", err)
        return
    end
    self.armed = true
end

--- A processor that calls `func(entries, batch_max_size)`: true, or false, the reason, and the first entry that failed.
-- `config`: what the schema says, `on_done(count, bytes)`, called for entries that were sent or dropped, and `max_pending_bytes`,
-- for whoever sees to a bound over several processors. nil and the reason.
function _M.new(_, func, config)
    config = core.table.clone(config or {})
    local on_done, max_pending_bytes = config.on_done, config.max_pending_bytes or MAX_PENDING_BYTES
    config.on_done, config.max_pending_bytes = nil, nil
    local ok, err = core.schema.check(schema, config)
    if not ok then
        return nil, err
    end
    if type(func) ~= "function" then
        return nil, "Invalid argument, arg #1 must be a function"
    end
    config.func, config.on_done, config.max_pending_bytes = func, on_done, max_pending_bytes
    config.batch = new_batch()
    config.slot = slot_of(config)
    config.pending, config.pending_bytes = 0, 0
    config.discarded, config.reported_at = 0, 0
    config.first_at, config.last_at = 0, 0
    return setmetatable(config, mt)
end

local function discard(self)
    self.discarded = self.discarded + 1
    local t = now()
    if t - self.reported_at >= REPORT_INTERVAL then
        core.log.error("Batch Processor[", self.name, "] max pending bytes limit exceeded. discarding entry. pending_bytes: ",
            self.pending_bytes, " max_pending_bytes: ", self.max_pending_bytes, " discarded_entries: ", self.discarded)
        self.reported_at, self.discarded = t, 0
    end
end

--- Adds an entry; it is sent with its batch. One for which there is no room is dropped, with one line of error.log a second.
-- `bytes`: what it takes, if that is known.
function _M.push(self, entry, bytes)
    if entry == nil then
        core.log.warn("Batch Processor[", self.name, "] trying to push a nil entry")
        return
    end
    bytes = bytes or _M.size_of(entry)
    if self.pending_bytes + bytes > self.max_pending_bytes then
        return discard(self)
    end
    local batch, t = self.batch, now()
    local entries = batch.entries
    if #entries == 0 then
        self.first_at = t
    end
    self.last_at = t
    entries[#entries + 1] = entry
    batch.sizes[#entries] = bytes
    waits(self, 1)
    self.pending_bytes = self.pending_bytes + bytes
    if #entries >= self.batch_max_size then
        core.log.debug("Batch Processor[", self.name, "] batch max size has exceeded")
        return hand_on(self)
    end
    arm_flush(self)
end

return _M
