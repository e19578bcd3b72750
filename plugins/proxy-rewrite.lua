--- Rewrites what goes upstream: URI, host, method, headers.
local core = require("apisix.core")
local ngx = ngx
local re_find, re_match, re_sub = ngx.re.find, ngx.re.match, ngx.re.sub
local escape_uri = ngx.escape_uri
local set_method, set_uri = ngx.req.set_method, ngx.req.set_uri
local resolve_var = core.utils.resolve_var
local with_captures = core.utils.resolve_var_with_captures
local byte, char, find, match, sub, gsub = string.byte, string.char, string.find, string.match, string.sub, string.gsub
local QUESTION = byte("?")
local concat = table.concat
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

-- A template's piece with what it names of the captures (`$1`, `${1}`; `$$` is a dollar), which a client has put there: encoded, so
-- that none of it ends the path or the query. `&` and `=` stay, as in APISIX: a capture may be several arguments. `literal` encodes what
-- the template says itself.
local function fill(piece, captures, literal)
    local out, from = {}, 1
    while true do
        local first, last = find(piece, "%$[%d{$]%d*}?", from)
        if not first then
            out[#out + 1] = literal(sub(piece, from))
            return concat(out)
        end
        out[#out + 1] = literal(sub(piece, from, first - 1))
        local number = match(sub(piece, first, last), "^%$(%d+)$") or match(sub(piece, first, last), "^%${(%d+)}$")
        if number then
            out[#out + 1] = escape_path(captures[tonumber(number)] or "")
        elseif sub(piece, first, first + 1) == "$$" then
            out[#out + 1], last = literal("$"), first + 1
        else
            -- `$1}`: the brace is the template's.
            number = match(sub(piece, first, last), "^%$(%d+)")
            last = first + #(number or "")
            out[#out + 1] = number and escape_path(captures[tonumber(number)] or "") or literal("$")
        end
        from = last + 1
    end
end

local function as_it_is(text)
    return text
end

-- The path in which what matched became the template: encoded, and behind the template's own `?` a query.
local function substituted(uri, pattern, template, captures)
    local first, last, err = re_find(uri, pattern, "jo")
    if not first then
        return nil, err
    end
    local question = find(template, "?", 1, true)
    local path, query = template, ""
    if question then
        path, query = sub(template, 1, question - 1), sub(template, question)
    end
    return escape_path(sub(uri, 1, first - 1)) .. fill(path, captures, escape_path) .. fill(query, captures, as_it_is)
        .. escape_path(sub(uri, last + 1))
end

-- `unsafe`: the URI is the client's own, whose bytes stay as they are.
local function from_regexes(patterns, uri, ctx, unsafe)
    for i = 1, #patterns, 2 do
        local captures, err = re_match(uri, patterns[i], "jo")
        if err then
            return nil, err
        end
        if captures then
            ctx.proxy_rewrite_regex_uri_captures = captures
            if not unsafe then
                return substituted(uri, patterns[i], patterns[i + 1], captures)
            end
            local rewritten, count
            rewritten, count, err = re_sub(uri, patterns[i], patterns[i + 1], "jo")
            return count and rewritten, err
        end
    end
    return unsafe and uri or escape_path(uri)
end

local function append_args(uri, args)
    if not args or args == "" then
        return uri
    end
    return uri .. (find(uri, "?", 1, true) and "&" or "?") .. args
end

-- What goes upstream; nil and why not; true when it has the arguments, too.
local function rewritten_uri(conf, ctx)
    local unsafe = conf.use_real_request_uri_unsafe
    if conf.uri then
        return (resolve_var(conf.uri, ctx.var, escape_path))
    end
    local uri = unsafe and (ctx.var.real_request_uri or ctx.var.request_uri) or ctx.var.uri
    if conf.regex_uri and #conf.regex_uri > 0 then
        local rewritten, err = from_regexes(conf.regex_uri, uri, ctx, unsafe)
        return rewritten, err, unsafe
    end
    return unsafe and uri or escape_path(uri), nil, unsafe
end

-- Whether the client's URI is what it would be written as anyway.
local function is_normal(ctx)
    local uri, written = ctx.var.uri, ctx.var.request_uri
    local n = #uri
    return sub(written, 1, n) == uri and (#written == n or byte(written, n + 1) == QUESTION)
end

-- The body of the answer when it cannot be.
local function rewrite_uri(conf, ctx)
    local uri, err, is_whole = rewritten_uri(conf, ctx)
    if err then
        core.log.error("failed to substitute the uri ", ctx.var.uri, " (", conf.regex_uri[1], ") with ", conf.regex_uri[2], " : ", err)
        return { error_msg = "failed to substitute the uri" }
    end
    ctx.var.upstream_uri = is_whole and uri or append_args(uri, ctx.var.args)
    if is_whole or not (conf.uri or conf.regex_uri) then
        return nil
    end
    -- What runs after this, and the log, see the new path, whatever bytes a client has put into it.
    local path = decode_path((gsub(uri, "%?.*", "")))
    if path ~= "" then
        set_uri(path, false, true)
    end
end

function _M.rewrite(conf, ctx)
    if conf.host then
        ctx.var.upstream_host = conf.host
    end
    if conf.uri or conf.regex_uri or conf.use_real_request_uri_unsafe or not is_normal(ctx) then
        local failed = rewrite_uri(conf, ctx)
        if failed then
            return 500, failed
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
