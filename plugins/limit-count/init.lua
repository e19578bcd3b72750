--- The counting behind limit-count, for the plugin and for others that limit by its rules.
--
-- A window's counter lives in the shared dict under the limit key and dies with its window, so memory follows the number of
-- keys that are active, and the dict's own bound holds against more.
local core = require("apisix.core")
local plugin = require("apisix.plugin")
local plugins = require("moongate.plugins")
local schema_def = require("apisix.schema_def")
local ngx = ngx
local ngx_now = ngx.now
local ngx_shared = ngx.shared
local header = ngx.header
local resolve_var = core.utils.resolve_var
local floor, max = math.floor, math.max
local ipairs, pairs, tonumber, tostring, type = ipairs, pairs, tonumber, tostring, type

local schemas = schema_def.of_plugin("limit-count")
local fixed = require("apisix.plugins.limit-count.limit-count-local")
local remote = require("apisix.plugins.limit-count.remote")
local dict = ngx_shared["plugin-limit-count"]

local _M = { schema = schemas.schema, metadata_schema = schemas.metadata_schema }

-- What a conf of the same group must agree on: its first conf. Bounded by the number of groups in use at one version.
local group_conf = core.lrucache.new({ type = "plugin", count = 1024 })

local function check_rules(conf)
    local seen = {}
    for _, rule in ipairs(conf.rules or {}) do
        if seen[rule.key] then
            return false, "duplicate key '" .. rule.key .. "' in rules"
        end
        seen[rule.key] = true
    end
    return true
end

local function comparable(conf)
    local out = {}
    for k, v in pairs(conf) do
        if k ~= "_meta" then
            out[k] = v
        end
    end
    return out
end

local function nothing() end

local function itself(conf)
    return conf
end

-- The conf that the others of the group must be like. Only one that is stored becomes it.
local function first_of(group, conf)
    return group_conf(group, "", plugins.checks_stored() and itself or nothing, conf) or conf
end

-- The names of the fields in which two confs differ: their values may be secrets.
local function differing(a, b)
    local names = {}
    for name, value in pairs(a) do
        if not core.table.deep_eq(value, b[name]) then
            names[#names + 1] = name
        end
    end
    for name in pairs(b) do
        if a[name] == nil then
            names[#names + 1] = name
        end
    end
    core.table.sort(names)
    return core.table.concat(names, ", ")
end

local function check_group(conf)
    local mine = comparable(conf)
    local first = first_of(conf.group, mine)
    if core.table.deep_eq(first, mine) then
        return true
    end
    core.log.error("limit-count group ", conf.group, " is in use with another conf: ", differing(first, mine))
    return false, "group conf mismatched"
end

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    if (conf.count or conf.time_window) and conf.rules then
        return false, "count/time_window and rules cannot be specified at the same time"
    end
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    ok, err = remote.check(conf)
    if not ok then
        return false, err
    end
    if conf.group then
        ok, err = check_group(conf)
        if not ok then
            return false, err
        end
    end
    return check_rules(conf)
end

-- A number, or a text with variables: the positive integer it stands for.
local function resolved_number(value, ctx, what)
    if type(value) == "number" then
        return value
    end
    local text, err = resolve_var(value, ctx.var)
    if err then
        return nil, "could not resolve vars in " .. value .. " : " .. err
    end
    local number = tonumber(text)
    if not number or number <= 0 then
        return nil, "resolved " .. what .. " is not a positive number: " .. tostring(text)
    end
    return number
end

local function key_of(conf, ctx)
    local key_type = conf.key_type
    if key_type == "var" then
        return core.utils.var_text(ctx.var[conf.key])
    end
    if key_type == "constant" then
        return conf.key
    end
    local key, err, count = resolve_var(conf.key, ctx.var)
    if err then
        core.log.error("could not resolve vars in ", conf.key, " error: ", err)
    end
    return count ~= 0 and key or nil
end

-- conf -> how its keys begin; goes with the conf.
local prefixes = setmetatable({}, { __mode = "k" })

local function prefix_of(conf)
    local parent = conf._meta and conf._meta.parent
    local prefix
    if conf.group then
        prefix = conf.group .. ":"
    elseif parent then
        -- By what the conf says: a change elsewhere in the object leaves the counters.
        local text = core.json.stably_encode(comparable(conf))
        prefix = parent.resource_key .. ":" .. ngx.crc32_long(text) .. ":"
        if conf._meta.workflow_rule then
            -- Rules of a workflow may have the same conf.
            prefix = prefix .. conf._meta.workflow_rule .. ":"
        end
    end
    prefixes[conf] = prefix
    return prefix
end

-- Counters of different confs must not meet, those of one group must.
local function limit_key(conf, ctx, name, value)
    local prefix = prefixes[conf] or prefix_of(conf)
    if prefix then
        return prefix .. value
    end
    return name .. ":" .. (ctx.conf_type or "") .. (ctx.conf_id or "") .. ":" .. (ctx.conf_version or "") .. ":" .. value
end

-- The window slides: what the one before left counts by the share of it that is still inside.
local function count_sliding(key, cost, count, window)
    local now = ngx_now()
    local index = floor(now / window)
    local elapsed = now - index * window
    local before = dict:get(key .. ":" .. (index - 1)) or 0
    local carried = before * (window - elapsed) / window
    local current = dict:get(key .. ":" .. index) or 0
    local reset = window - elapsed
    if carried + current + cost > count then
        return -1, reset
    end
    local used, err = dict:incr(key .. ":" .. index, cost, 0, window * 2)
    if not used then
        return nil, err
    end
    -- Another worker was quicker.
    if carried + used > count then
        dict:incr(key .. ":" .. index, -cost)
        return -1, reset
    end
    return floor(count - carried - used), reset
end

-- What counts for this conf: called with key, cost, limit and seconds, and for a Redis with conf and the plugin's name.
local function counter_of(conf)
    if conf.policy and conf.policy ~= "local" then
        return remote.count
    end
    return conf.window_type == "sliding" and count_sliding or fixed.count
end

local default_headers = {
    limit_header = "X-RateLimit-Limit",
    remaining_header = "X-RateLimit-Remaining",
    reset_header = "X-RateLimit-Reset",
}

local function header_names(rule_prefix)
    if rule_prefix then
        local start = "X-" .. rule_prefix .. "-RateLimit-"
        return {
            limit_header = start .. "Limit",
            remaining_header = start .. "Remaining",
            reset_header = start .. "Reset",
        }
    end
    local metadata = plugin.plugin_metadata("limit-count")
    return metadata and metadata.value or default_headers
end

local function show_quota(conf, names, count, remaining, reset)
    if not conf.show_limit_quota_header or ngx.headers_sent then
        return
    end
    header[names.limit_header or default_headers.limit_header] = count
    header[names.remaining_header or default_headers.remaining_header] = max(0, remaining)
    header[names.reset_header or default_headers.reset_header] = floor(reset * 100 + 0.5) / 100
end

local function reject(conf)
    if conf.rejected_msg then
        return conf.rejected_code, { error_msg = conf.rejected_msg }
    end
    return conf.rejected_code
end

local function failed(conf, err)
    core.log.error("failed to limit count: ", err)
    if conf.allow_degradation then
        return nil
    end
    return 500, { error_msg = "failed to limit count" }
end

-- Applies one limit: nothing, or the answer.
local function apply(conf, ctx, name, limit, cost)
    local count, err = resolved_number(limit.count, ctx, "count")
    if not count then
        return failed(conf, err)
    end
    local window
    window, err = resolved_number(limit.time_window, ctx, "time_window")
    if not window then
        return failed(conf, err)
    end
    local key = limit_key(conf, ctx, name, limit.value)
    core.log.info("limit key: ", key)
    local remaining, reset = counter_of(conf)(key, cost, count, window, conf, name)
    if not remaining then
        return failed(conf, reset)
    end
    ctx._limit_key, ctx._limit_count, ctx._limit_window = key, count, window
    ctx._limit_remaining, ctx._limit_reset = remaining, reset
    show_quota(conf, header_names(limit.prefix), count, remaining, reset)
    if remaining < 0 then
        return reject(conf)
    end
end

local function apply_rules(conf, ctx, name, cost)
    local matched = false
    for index, rule in ipairs(conf.rules) do
        local value, err, found = resolve_var(rule.key, ctx.var)
        if err or found == 0 then
            core.log.info("rule ", index, " is skipped: its key ", rule.key, " has no value")
        else
            matched = true
            local code, body = apply(conf, ctx, name, {
                count = rule.count,
                time_window = rule.time_window,
                -- Two rules whose keys have the same value count by themselves.
                value = rule.key .. ":" .. value,
                prefix = rule.header_prefix or index,
            }, cost)
            if code then
                return code, body
            end
        end
    end
    if not matched then
        return failed(conf, "failed to get rate limit rules")
    end
end

--- What the last limit of the request came to, for `$rate_limiting_info`; nil when none was applied.
function _M.info(ctx)
    local key = ctx._limit_key
    return key and {
        rate_limiting_key = key,
        rate_limiting_limit = ctx._limit_count,
        rate_limiting_remaining = max(0, ctx._limit_remaining),
        rate_limiting_reset = floor(ctx._limit_reset + 0.5),
    }
end

--- Counts `cost` for this request: nothing, or status and body of the refusal. Access phase.
function _M.rate_limit(conf, ctx, name, cost)
    if conf.rules then
        return apply_rules(conf, ctx, name, cost)
    end
    local value = key_of(conf, ctx)
    if value == nil then
        core.log.info("The value of the configured key is empty, use client IP instead")
        value = ctx.var.remote_addr
    end
    -- A table of its own: a count with variables may wait for the body, while another request counts.
    return apply(conf, ctx, name, { count = conf.count, time_window = conf.time_window, value = value }, cost)
end

return _M
