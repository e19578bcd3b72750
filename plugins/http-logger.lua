--- Sends an entry per request, in batches, to an HTTP server.
local core = require("apisix.core")
local http = require("resty.http")
local log_util = require("apisix.utils.log-util")
local manager_mod = require("apisix.utils.batch-processor-manager")
local ipairs, tostring = ipairs, tostring
local concat = table.concat

local name = "http-logger"
local schemas = core.schema.of_plugin(name)
local manager = manager_mod.new(name)

local _M = {
    version = 0.1,
    priority = 410,
    name = name,
    schema = schemas.schema,
    metadata_schema = schemas.metadata_schema,
}

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    core.utils.check_https({ "uri" }, conf, name)
    return log_util.check_log_schema(conf)
end

-- true, or false and the reason.
local function send(conf, body)
    local client = http.new()
    client:set_timeout(conf.timeout * 1000)
    local content_type = conf.concat_method == "json" and "application/json" or "text/plain"
    local res, err = client:request_uri(conf.uri, {
        method = "POST",
        body = body,
        ssl_verify = conf.ssl_verify,
        headers = { ["Content-Type"] = content_type, ["Authorization"] = conf.auth_header },
    })
    if not res then
        return false, "failed to connect to " .. conf.uri .. ": " .. tostring(err)
    end
    if res.status >= 400 then
        return false, "server returned status code[" .. res.status .. "] " .. conf.uri .. ", body[" .. (res.body or "") .. "]"
    end
    return true
end

local function join(conf, entries, batch_max_size)
    if conf.concat_method == "json" then
        return core.json.encode(batch_max_size == 1 and entries[1] or entries)
    end
    local lines = {}
    for i, entry in ipairs(entries) do
        local line, err = core.json.encode(entry)
        if not line then
            return nil, err
        end
        lines[i] = line
    end
    return concat(lines, "\n")
end

_M.idle_in = log_util.idle_in

function _M.access(conf, ctx)
    log_util.collect_request_body(conf, ctx)
end

function _M.body_filter(conf, ctx)
    log_util.collect_body(conf, ctx)
end

function _M.log(conf, ctx)
    local entry = log_util.get_log_entry(name, conf, ctx)
    entry.route_id = entry.route_id or "no-matched"
    local max_pending = log_util.max_pending_entries(name)
    if manager:add_entry(conf, entry, max_pending) then
        return
    end
    manager:add_entry_to_new_processor(conf, entry, ctx, function(entries, batch_max_size)
        local body, err = join(conf, entries, batch_max_size)
        if not body then
            return false, "error occurred while encoding the data: " .. tostring(err)
        end
        return send(conf, body)
    end, max_pending)
end

return _M
