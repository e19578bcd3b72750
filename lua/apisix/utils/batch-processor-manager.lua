--- `apisix.utils.batch-processor-manager`: one batch processor per conf of a logger plugin (batch-processor.md).
--
-- A processor goes when its conf goes: the conf's table is the key, held weakly. What waits in all processors of a manager
-- is bounded by `max_pending_entries` of the plugin's metadata; what comes on top is dropped, with one line of error.log
-- a second.
local core = require("apisix.core")
local batch_processor = require("apisix.utils.batch-processor")
local plugin = require("apisix.plugin")
local now = ngx.now
local ipairs, pairs, setmetatable = ipairs, pairs, setmetatable

local _M = {}
local mt = { __index = _M }

local DEFAULT_MAX_PENDING = 8192
-- Seconds between two lines about what is dropped.
local REPORT_INTERVAL = 1

--- A manager. `name`: of the processors, for error.log. `plugin_name`: whose metadata has `max_pending_entries`; `name` by
-- default.
function _M.new(name, plugin_name)
    return setmetatable({
        name = name,
        plugin_name = plugin_name or name,
        buffers = setmetatable({}, { __mode = "k" }),
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
    function config.on_done(count)
        self.total_processed_entries = self.total_processed_entries + count
    end
    return config
end

local function max_pending_of(self)
    local metadata = plugin.plugin_metadata(self.plugin_name)
    return metadata and metadata.value and metadata.value.max_pending_entries or DEFAULT_MAX_PENDING
end

local function report(self, max_pending)
    local t = now()
    if t - self.reported_at < REPORT_INTERVAL then
        return
    end
    core.log.error("max pending entries limit exceeded. discarding entry. total_pushed_entries: ",
        self.total_pushed_entries, " total_processed_entries: ", self.total_processed_entries,
        " max_pending_entries: ", max_pending, " discarded_entries: ", self.discarded)
    self.reported_at, self.discarded = t, 0
end

local function is_full(self, max_pending)
    max_pending = max_pending or max_pending_of(self)
    if self.total_pushed_entries - self.total_processed_entries < max_pending then
        return false
    end
    self.discarded = self.discarded + 1
    report(self, max_pending)
    return true
end

local function push(self, processor, entry)
    self.total_pushed_entries = self.total_pushed_entries + 1
    processor:push(entry)
end

--- Adds to the conf's processor: true, also when the entry was dropped; false when the conf has none yet.
-- `max_pending`: instead of what the plugin's metadata says.
function _M.add_entry(self, conf, entry, max_pending)
    local processor = self.buffers[conf]
    if not processor then
        return false
    end
    if not is_full(self, max_pending) then
        push(self, processor, entry)
    end
    return true
end

--- Makes the conf's processor, which calls `func(entries, batch_max_size)`, and adds the entry. False when it cannot be made,
-- with a line of error.log.
function _M.add_entry_to_new_processor(self, conf, entry, ctx, func, max_pending)
    if is_full(self, max_pending) then
        return true
    end
    local processor, err = batch_processor:new(func, config_of(self, conf, ctx))
    if not processor then
        core.log.error("error when creating the batch processor: ", err)
        return false
    end
    self.buffers[conf] = processor
    push(self, processor, entry)
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

--- The schema of a logger with the batch processor's fields added.
function _M.wrap_schema(_, schema)
    return with(schema, batch_processor.schema.properties)
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
    return core.table.nkeys(self.buffers)
end

return _M
