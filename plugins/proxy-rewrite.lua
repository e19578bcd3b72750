--- Rewrites what goes upstream: URI, host, method, headers.
local core = require("apisix.core")
local ngx = ngx
local re_match, re_sub = ngx.re.match, ngx.re.sub
local escape_uri = ngx.escape_uri
local set_method, set_uri = ngx.req.set_method, ngx.req.set_uri
local resolve_var = core.utils.resolve_var
local with_captures = core.utils.resolve_var_with_captures
local char, find, sub, gsub = string.char, string.find, string.sub, string.gsub
local ipairs, pairs, pcall, setmetatable, tonumber, tostring, type =
    ipairs, pairs, pcall, setmetatable, tonumber, tostring, type

local name = "proxy-rewrite"

local _M = {
    version = 0.1,
    priority = 1008,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

local function check_regex_uri(patterns)
    if #patterns % 2 ~= 0 then
        return false, "The length of regex_uri should be an even number"
    end
    for i = 1, #patterns, 2 do
        local _, _, err = re_sub("/fake_uri", patterns[i], patterns[i + 1], "jo")
        if err then
            return false, "invalid regex_uri(" .. patterns[i] .. ", " .. patterns[i + 1] .. "): " .. err
        end
    end
    return true
end

-- A value may come as a list of values.
local function check_value(value)
    if type(value) ~= "table" then
        return not find(tostring(value), "[%z\1-\8\10-\31\127]")
    end
    for _, one in ipairs(value) do
        if not check_value(one) then
            return false
        end
    end
    return true
end

local function check_fields(fields)
    for field, value in pairs(fields) do
        if type(field) ~= "string" or field == "" then
            return false, "invalid type as header field"
        end
        if find(field, "[^%w!#$%%&'*+%-.^_`|~]") then
            core.log.error("header field: ", field)
            return false, "invalid field character"
        end
        if not check_value(value) then
            return false, "invalid value character"
        end
    end
    return true
end

local function check_headers(headers)
    if not (headers.set or headers.add or headers.remove) then
        return check_fields(headers)
    end
    local ok, err = check_fields(headers.set or {})
    if not ok then
        return false, err
    end
    return check_fields(headers.add or {})
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    if conf.regex_uri and #conf.regex_uri > 0 then
        ok, err = check_regex_uri(conf.regex_uri)
        if not ok then
            return false, err
        end
    end
    if conf.headers then
        return check_headers(conf.headers)
    end
    return true
end

-- conf -> its header actions as arrays: { add = { name, value, … }, set = …, remove = { name, … } }.
local actions_of = setmetatable({}, { __mode = "k" })

local function flatten(fields, each_value)
    local out = {}
    for field, value in pairs(fields or {}) do
        if each_value and type(value) == "table" then
            for _, v in ipairs(value) do
                out[#out + 1] = field
                out[#out + 1] = v
            end
        else
            out[#out + 1] = field
            out[#out + 1] = value
        end
    end
    return out
end

local function compile_headers(headers)
    local verbs = type(headers.add) == "table" or type(headers.set) == "table" or type(headers.remove) == "table"
    if not verbs then
        return { add = {}, remove = {}, set = flatten(headers) }
    end
    return { add = flatten(headers.add, true), remove = headers.remove or {}, set = flatten(headers.set) }
end

local function header_actions(conf)
    local actions = actions_of[conf]
    if not actions then
        actions = compile_headers(conf.headers)
        actions_of[conf] = actions
    end
    return actions
end

local function value_for(ctx, value)
    if type(value) == "table" then
        local out = {}
        for i, v in ipairs(value) do
            out[i] = value_for(ctx, v)
        end
        return out
    end
    value = tostring(value)
    if not find(value, "$", 1, true) then
        return value
    end
    local captures = ctx.proxy_rewrite_regex_uri_captures
    if captures then
        value = with_captures(value, captures)
    end
    return (resolve_var(value, ctx.var))
end

local function rewrite_headers(conf, ctx)
    local actions = header_actions(conf)
    local add, set, remove = actions.add, actions.set, actions.remove
    for i = 1, #add, 2 do
        local value = value_for(ctx, add[i + 1])
        if value ~= "" then
            core.request.add_header(ctx, add[i], value)
        end
    end
    for i = 1, #remove do
        core.request.set_header(ctx, remove[i], nil)
    end
    for i = 1, #set, 2 do
        local value = value_for(ctx, set[i + 1])
        -- An empty value, such as that of a variable that is not there, takes the field away.
        core.request.set_header(ctx, set[i], value ~= "" and value or nil)
    end
end

-- Only a path is encoded: the query goes as it is.
local function escape_path(path)
    return (gsub(path, "[^/]+", function(segment)
        return escape_uri(segment, 0)
    end))
end

local function byte_of(hex)
    return char(tonumber(hex, 16))
end

local function decode_path(path)
    if not find(path, "%", 1, true) then
        return path
    end
    return (gsub(path, "%%(%x%x)", byte_of))
end

local function from_regexes(patterns, uri, ctx)
    for i = 1, #patterns, 2 do
        local captures, err = re_match(uri, patterns[i], "jo")
        if err then
            return nil, err
        end
        if captures then
            ctx.proxy_rewrite_regex_uri_captures = captures
            local rewritten
            local count
            rewritten, count, err = re_sub(uri, patterns[i], patterns[i + 1], "jo")
            return count and rewritten, err
        end
    end
    return uri
end

local function append_args(uri, args)
    if not args or args == "" then
        return uri
    end
    return uri .. (find(uri, "?", 1, true) and "&" or "?") .. args
end

local function rewritten_uri(conf, ctx)
    if conf.uri then
        return (resolve_var(conf.uri, ctx.var, function(value)
            return escape_path(value)
        end))
    end
    if conf.use_real_request_uri_unsafe then
        return ctx.var.real_request_uri or ctx.var.request_uri, nil, true
    end
    if conf.regex_uri and #conf.regex_uri > 0 then
        local uri, err = from_regexes(conf.regex_uri, ctx.var.uri, ctx)
        if not uri then
            return nil, err
        end
        local question = find(uri, "?", 1, true)
        if question then
            return escape_path(sub(uri, 1, question - 1)) .. sub(uri, question)
        end
        return escape_path(uri)
    end
    return nil
end

function _M.rewrite(conf, ctx)
    if conf.host then
        ctx.var.upstream_host = conf.host
    end
    if conf.uri or conf.regex_uri or conf.use_real_request_uri_unsafe then
        local uri, err, is_whole = rewritten_uri(conf, ctx)
        if err then
            core.log.error("failed to substitute the uri ", ctx.var.uri, " (", conf.regex_uri[1], ") with ",
                conf.regex_uri[2], " : ", err)
            return 500, { error_msg = "failed to substitute the uri" }
        end
        ctx.var.upstream_uri = is_whole and uri or append_args(uri, ctx.var.args)
        if not is_whole then
            -- What runs after this, and the log, see the new path, whatever bytes a client has put into it.
            local path = decode_path((gsub(uri, "%?.*", "")))
            if path ~= "" then
                set_uri(path, false, true)
            end
        end
    end
    if conf.headers then
        rewrite_headers(conf, ctx)
    end
    if conf.method then
        local ok, err = pcall(set_method, ngx["HTTP_" .. conf.method])
        if not ok then
            core.log.error("failed to set the method ", conf.method, ": ", err)
        end
    end
end

return _M
