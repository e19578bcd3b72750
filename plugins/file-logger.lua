--- Writes an entry per request to a file.
local core = require("apisix.core")
local log_util = require("apisix.utils.log-util")
local plugin = require("apisix.plugin")
local plugins = require("moongate.plugins")
local expr = require("resty.expr.v1")
local native = require("moongate.native").apisix
local setmetatable, tostring = setmetatable, tostring

local name = "file-logger"
local NO_PATH = "property \"path\" is not set in either the plugin conf or the metadata"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.1,
    priority = 399,
    name = name,
    schema = schemas.schema,
    metadata_schema = schemas.metadata_schema,
}

local function path_of(conf)
    if conf.path then
        return conf.path
    end
    local metadata = plugin.plugin_metadata(name)
    return metadata and metadata.value and metadata.value.path
end

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    -- One that is stored stays when the metadata goes: what is missing is said for each request then.
    if not plugins.checks_stored() and not path_of(conf) then
        return false, NO_PATH
    end
    if conf.match then
        local made
        made, err = expr.new(conf.match)
        if not made then
            return false, "failed to validate the 'match' expression: " .. tostring(err)
        end
    end
    return log_util.check_log_schema(conf)
end

local compiled = setmetatable({}, { __mode = "k" })

local function matches(conf, ctx)
    if not conf.match or #conf.match == 0 then
        return true
    end
    local made = compiled[conf]
    if not made then
        made = expr.new(conf.match)
        compiled[conf] = made
    end
    return made:eval(ctx.var)
end

_M.idle_in = log_util.idle_in

function _M.access(conf, ctx)
    log_util.collect_request_body(conf, ctx)
end

function _M.body_filter(conf, ctx)
    log_util.collect_body(conf, ctx)
end

function _M.log(conf, ctx)
    if not matches(conf, ctx) then
        return
    end
    local path = path_of(conf)
    if not path then
        core.log.error(NO_PATH)
        return
    end
    local entry = log_util.get_log_entry(name, conf, ctx)
    local text, encode_err = core.json.encode(entry)
    if not text then
        core.log.error("failed to encode the log entry: ", encode_err)
        return
    end
    local ok, err = native.write_log_line(path, text .. "\n")
    if not ok then
        core.log.error("failed to open file: ", path, ", error info: ", err)
    end
end

return _M
