--- `apisix.utils.batch-processor-manager`: one batch processor per conf of a logger plugin.
--
-- A processor goes when its conf goes: the conf's table is the key, held weakly.
local core = require("apisix.core")
local batch_processor = require("apisix.utils.batch-processor")
local setmetatable = setmetatable

local _M = {}
local mt = { __index = _M }

--- A manager for the plugin of that name.
function _M.new(name)
    return setmetatable({ name = name, buffers = setmetatable({}, { __mode = "k" }) }, mt)
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
    config.route_id = ctx and ctx.route_id
    config.server_addr = ctx and ctx.var.server_addr
    return config
end

local function is_full(processor, max_pending)
    if max_pending and processor.pending >= max_pending then
        core.log.error("max pending entries limit exceeded. discarding entry. total_pushed_entries: ",
            processor.pending, " total_processed_entries: 0 max_pending_entries: ", max_pending)
        return true
    end
    return false
end

--- Adds to the conf's processor; false when it has none yet. An entry past the bound is dropped with a log line.
function _M.add_entry(self, conf, entry, max_pending)
    local processor = self.buffers[conf]
    if not processor then
        return false
    end
    if not is_full(processor, max_pending) then
        processor:push(entry)
    end
    return true
end

--- Makes the conf's processor and adds the entry.
function _M.add_entry_to_new_processor(self, conf, entry, ctx, func)
    local processor, err = batch_processor:new(func, config_of(self, conf, ctx))
    if not processor then
        core.log.error("error when creating the batch processor: ", err)
        return false
    end
    self.buffers[conf] = processor
    processor:push(entry)
    return true
end

--- The schema of a logger with the batch processor's fields added.
function _M.wrap_schema(_, schema)
    local out = core.table.deepcopy(schema)
    for field, definition in pairs(batch_processor.schema.properties) do
        if not out.properties[field] then
            out.properties[field] = core.table.deepcopy(definition)
        end
    end
    return out
end

--- How many processors live: for tests of what is kept.
function _M.count(self)
    return core.table.nkeys(self.buffers)
end

return _M
