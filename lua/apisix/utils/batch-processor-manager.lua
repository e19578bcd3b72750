--- `apisix.utils.batch-processor-manager`: one batch processor per conf of a logger plugin (batch-processor.md).
--
-- A processor for which nothing waits goes, sooner or later: its conf may be gone, which nobody tells, and one in use is soon made anew.
-- What waits in all processors of a manager is bounded by `max_pending_entries` of the plugin's metadata, and in bytes; what comes on
-- top is dropped, with one line of error.log a second.
local core = require("apisix.core")
local batch_processor = require("apisix.utils.batch-processor")
local plugin = require("apisix.plugin")
local now = ngx.now
local timer_at = ngx.timer.at
local huge = math.huge
local ipairs, pairs, setmetatable = ipairs, pairs, setmetatable

local _M = {}
local mt = { __index = _M }

local DEFAULT_MAX_PENDING = 8192
local MAX_PENDING_BYTES = batch_processor.MAX_PENDING_BYTES
local REPORT_INTERVAL = batch_processor.REPORT_INTERVAL
-- Seconds between two looks for processors for which nothing waits. To make one anew costs less than a request.
local stale_interval = 60
-- So many processors more than twice those that the last look left, and there is a look at once: however often confs change, what is
-- kept follows what waits.
local SPARE = 64

--- A manager. `name`: of the processors, for error.log. `plugin_name`: whose metadata has `max_pending_entries`; `name` by
-- default.
function _M.new(name, plugin_name)
    return setmetatable({
        name = name,
        plugin_name = plugin_name or name,
        buffers = {},
        count_of_buffers = 0,
        look_at_count = SPARE,
        pending_bytes = 0,
        total_pushed_entries = 0,
        total_processed_entries = 0,
        discarded = 0,
        reported_at = 0,
    }, mt)
end

-- Fields of a conf that are a batch processor's.
local FIELDS = {
    "name", "retry_delay", "batch_max_size", "max_retry_count", "buffer_duration", "inactive_timeout",
}

local function config_of(self, conf, ctx)
    local config = { name = self.name }
    for _, field in ipairs(FIELDS) do
        if conf[field] ~= nil then
            config[field] = conf[field]
        end
    end
    config.route_id = ctx and ctx.var.route_id
    config.server_addr = ctx and ctx.var.server_addr
    config.max_pending_bytes = huge
    function config.on_done(count, bytes)
        self.total_processed_entries = self.total_processed_entries + count
        self.pending_bytes = self.pending_bytes - bytes
    end
    return config
end

local function max_pending_of(self)
    local metadata = plugin.plugin_metadata(self.plugin_name)
    return metadata and metadata.value and metadata.value.max_pending_entries or DEFAULT_MAX_PENDING
end

-- An entry is dropped; `...` says which bound it met.
local function discard(self, ...)
    self.discarded = self.discarded + 1
    local t = now()
    if t - self.reported_at >= REPORT_INTERVAL then
        core.log.error(...)
        self.reported_at, self.discarded = t, 0
    end
end

-- What an entry takes; nil when there is no room for it.
local function admit(self, entry, max_pending)
    max_pending = max_pending or max_pending_of(self)
    if self.total_pushed_entries - self.total_processed_entries >= max_pending then
        return discard(self, "max pending entries limit exceeded. discarding entry. total_pushed_entries: ",
            self.total_pushed_entries, " total_processed_entries: ", self.total_processed_entries,
            " max_pending_entries: ", max_pending, " discarded_entries: ", self.discarded + 1)
    end
    local bytes = batch_processor.size_of(entry)
    if self.pending_bytes + bytes > MAX_PENDING_BYTES then
        return discard(self, "max pending bytes limit exceeded. discarding entry. ", self.name, " pending_bytes: ",
            self.pending_bytes, " max_pending_bytes: ", MAX_PENDING_BYTES, " discarded_entries: ", self.discarded + 1)
    end
    return bytes
end

local function push(self, processor, entry, bytes)
    if entry ~= nil then
        self.total_pushed_entries = self.total_pushed_entries + 1
        self.pending_bytes = self.pending_bytes + bytes
    end
    processor:push(entry, bytes)
end

-- Forgets the processors for which nothing waits.
local function look(self)
    for conf, processor in pairs(self.buffers) do
        if processor.pending == 0 then
            -- Not the conf: it may have credentials.
            core.log.info("removing batch processor stale object, route id: ", processor.route_id)
            self.buffers[conf] = nil
            self.count_of_buffers = self.count_of_buffers - 1
        end
    end
    self.look_at_count = 2 * self.count_of_buffers + SPARE
end

local look_later

local function look_when_due(premature, self)
    self.looks_later = false
    if not premature then
        look(self)
        look_later(self)
    end
end

function look_later(self)
    if self.looks_later or self.count_of_buffers == 0 then
        return
    end
    local ok, err = timer_at(stale_interval, look_when_due, self)
    if not ok then
        core.log.error("failed to create a timer: ", err)
    end
    self.looks_later = ok and true or false
end

local function keep(self, conf, processor)
    if not self.buffers[conf] then
        if self.count_of_buffers >= self.look_at_count then
            look(self)
        end
        self.count_of_buffers = self.count_of_buffers + 1
    end
    self.buffers[conf] = processor
    look_later(self)
end

--- Seconds (60) between two looks for processors for which nothing waits, which go: from the next on, in every manager of this VM.
function _M.set_check_stale_interval(seconds)
    stale_interval = seconds
end

--- Adds to the conf's processor: true, also when the entry was dropped; false when the conf has none yet.
-- `max_pending`: instead of what the plugin's metadata says.
function _M.add_entry(self, conf, entry, max_pending)
    local processor = self.buffers[conf]
    if not processor then
        return false
    end
    local bytes = admit(self, entry, max_pending)
    if bytes then
        push(self, processor, entry, bytes)
    end
    return true
end

--- Makes the conf's processor, which calls `func(entries, batch_max_size)`, and adds the entry. False when it cannot be made,
-- with a line of error.log.
function _M.add_entry_to_new_processor(self, conf, entry, ctx, func, max_pending)
    local bytes = admit(self, entry, max_pending)
    if not bytes then
        return true
    end
    local processor, err = batch_processor:new(func, config_of(self, conf, ctx))
    if not processor then
        core.log.error("error when creating the batch processor: ", err)
        return false
    end
    keep(self, conf, processor)
    push(self, processor, entry, bytes)
    return true
end

local function with(schema, fields)
    local out = core.table.deepcopy(schema or { type = "object" })
    out.properties = out.properties or {}
    for field, definition in pairs(fields) do
        if not out.properties[field] then
            out.properties[field] = core.table.deepcopy(definition)
        end
    end
    return out
end

--- The schema of a logger with the batch processor's fields added; `name` is the manager's by default.
function _M.wrap_schema(self, schema)
    local fields = core.table.clone(batch_processor.schema.properties)
    fields.name = { type = "string", default = self.name }
    return with(schema, fields)
end

--- The metadata's schema of a logger with `max_pending_entries` added.
function _M.wrap_metadata_schema(_, schema)
    return with(schema, {
        max_pending_entries = {
            type = "integer",
            description = "maximum number of entries waiting to be processed; new entries are discarded while the backlog exceeds it",
            minimum = 1,
            default = DEFAULT_MAX_PENDING,
        },
    })
end

--- How many processors live: for tests of what is kept.
function _M.count(self)
    return self.count_of_buffers
end

return _M
