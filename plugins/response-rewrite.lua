--- Rewrites the answer: status, headers, body or parts of the body.
local core = require("apisix.core")
local expr = require("resty.expr.v1")
local ngx = ngx
local re_sub, re_gsub = ngx.re.sub, ngx.re.gsub
local resolve_var = core.utils.resolve_var
local gsub = string.gsub
local ipairs, pairs, pcall, setmetatable, tostring, type = ipairs, pairs, pcall, setmetatable, tostring, type
local find, sub = string.find, string.sub

local name = "response-rewrite"

local _M = {
    version = 0.1,
    priority = 899,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

-- conf -> { expr, set, add, remove, body }, made once; the conf goes, its entry goes.
local compiled = setmetatable({}, { __mode = "k" })

local function split_field(text)
    local colon = find(text, ":", 1, true)
    return sub(text, 1, colon - 1), sub(text, colon + 1):match("^%s*(.-)%s*$")
end

local function has_verbs(headers)
    return type(headers.add) == "table" or type(headers.set) == "table" or type(headers.remove) == "table"
end

local function pairs_of(fields)
    local out = {}
    for field, value in pairs(fields or {}) do
        out[#out + 1] = field
        out[#out + 1] = value
    end
    return out
end

local function compile_headers(headers)
    if not headers then
        return { set = {}, add = {}, remove = {} }
    end
    if not has_verbs(headers) then
        return { set = pairs_of(headers), add = {}, remove = {} }
    end
    local add = {}
    for _, text in ipairs(headers.add or {}) do
        add[#add + 1], add[#add + 2] = split_field(text)
    end
    return { set = pairs_of(headers.set), add = add, remove = headers.remove or {} }
end

local function compile(conf)
    local out = compiled[conf]
    if out then
        return out
    end
    out = compile_headers(conf.headers)
    out.vars = conf.vars and expr.new(conf.vars)
    out.body = conf.body
    if conf.body and conf.body_base64 then
        out.body = ngx.decode_base64(conf.body)
    end
    compiled[conf] = out
    return out
end

local function check_headers(headers)
    if has_verbs(headers) then
        return true
    end
    for field, value in pairs(headers) do
        if type(field) ~= "string" or (type(value) ~= "string" and type(value) ~= "number") then
            return false, "invalid type as header value"
        end
        if field == "" then
            return false, "invalid field length in header"
        end
    end
    return true
end

local function check_filters(filters)
    for _, filter in ipairs(filters) do
        -- It raises for options that there are not, with a place in a file that is nobody's business.
        local ran, raised, _, err = pcall(re_sub, "", filter.regex, "", filter.options)
        err = not ran and (gsub(tostring(raised), "^.-:%d+: ", "")) or err
        if err then
            return false, "regex \"" .. filter.regex .. "\" validation failed: " .. err
        end
    end
    return true
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    if conf.headers then
        ok, err = check_headers(conf.headers)
        if not ok then
            return false, err
        end
    end
    if conf.body_base64 then
        if not conf.body or #conf.body == 0 then
            return false, "invalid base64 content"
        end
        if not ngx.decode_base64(conf.body) then
            return false, "invalid base64 content"
        end
    end
    if conf.vars then
        local made
        made, err = expr.new(conf.vars)
        if not made then
            return false, "failed to validate the 'vars' expression: " .. tostring(err)
        end
    end
    if conf.filters then
        return check_filters(conf.filters)
    end
    return true
end

local function applies(made, ctx)
    if not made.vars then
        return true
    end
    local ok, err = made.vars:eval(ctx.var)
    if err then
        core.log.error("failed to run the 'vars' expression: ", err)
    end
    return ok
end

local function value_for(ctx, value)
    if type(value) == "string" and find(value, "$", 1, true) then
        return (resolve_var(value, ctx.var))
    end
    return value
end

local function rewrite_headers(made, ctx)
    local add, set, remove = made.add, made.set, made.remove
    for i = 1, #add, 2 do
        core.response.add_header(add[i], value_for(ctx, add[i + 1]))
    end
    for i = 1, #set, 2 do
        core.response.set_header(set[i], value_for(ctx, set[i + 1]))
    end
    for i = 1, #remove do
        core.response.set_header(remove[i], nil)
    end
end

function _M.idle_in(conf, phase)
    return phase == "body_filter" and not conf.filters and not conf.body
end

function _M.header_filter(conf, ctx)
    local made = compile(conf)
    if not applies(made, ctx) then
        ctx.response_rewrite_skipped = true
        return
    end
    ctx.response_rewrite_skipped = nil
    if conf.status_code then
        ngx.status = conf.status_code
    end
    if conf.filters or conf.body then
        ctx.response_rewrite_encoding = ngx.header["Content-Encoding"]
        core.response.clear_header_as_body_modified()
    end
    rewrite_headers(made, ctx)
end

local function substitute(body, filter)
    local run = filter.scope == "global" and re_gsub or re_sub
    local changed, _, err = run(body, filter.regex, filter.replace, filter.options)
    if err then
        core.log.error("regex \"", filter.regex, "\" substitutes failed: ", err)
        return body
    end
    return changed
end

local function filter_body(conf, ctx)
    local body = core.response.hold_body_chunk(ctx, false, conf.max_resp_body_size, name)
    if not body then
        return
    end
    if ctx.response_rewrite_encoding then
        local decode = require("apisix.utils.content-decode").dispatch_decoder(ctx.response_rewrite_encoding)
        if not decode then
            core.log.error("filters may not work as expected due to unsupported compression encoding type: ",
                ctx.response_rewrite_encoding)
            ngx.arg[1] = body
            return
        end
        local plain, err = decode(body)
        if not plain then
            core.log.error("failed to decode the response body: ", err)
            ngx.arg[1] = body
            return
        end
        body = plain
    end
    for _, filter in ipairs(conf.filters) do
        body = substitute(body, filter)
    end
    ngx.arg[1] = body
end

function _M.body_filter(conf, ctx)
    if ctx.response_rewrite_skipped then
        return
    end
    if conf.filters then
        return filter_body(conf, ctx)
    end
    if conf.body then
        ngx.arg[1] = ngx.arg[2] and compile(conf).body or nil
    end
end

return _M
