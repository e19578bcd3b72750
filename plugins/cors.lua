--- Cross-origin resource sharing (Fetch standard, "CORS protocol").
local core = require("apisix.core")
local plugin = require("apisix.plugin")
local ngx = ngx
local re_find, re_compile_check = ngx.re.find, ngx.re.match
local set_header, add_header = core.response.set_header, core.response.add_header
local ipairs = ipairs

local name = "cors"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.1,
    priority = 4000,
    name = name,
    schema = schemas.schema,
    metadata_schema = schemas.metadata_schema,
}

-- Every method that `**` stands for.
local ALL_METHODS = "GET,POST,PUT,DELETE,PATCH,HEAD,OPTIONS,CONNECT,TRACE"

local function check_regexes(list)
    for _, regex in ipairs(list or {}) do
        local _, err = re_compile_check("", regex, "jo")
        if err then
            return false, err
        end
    end
    return true
end

local function has_star(conf)
    return conf.allow_origins == "*" or conf.allow_headers == "*" or conf.allow_methods == "*"
        or conf.expose_headers == "*" or conf.timing_allow_origins == "*"
end

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    if conf.allow_credential and has_star(conf) then
        return false, "you can not set '*' for other option when 'allow_credential' is true"
    end
    ok, err = check_regexes(conf.allow_origins_by_regex)
    if not ok then
        return false, err
    end
    return check_regexes(conf.timing_allow_origins_by_regex)
end

-- A list text -> the set of its origins. Keyed by the text: confs share it, and a conf's texts are few.
local origin_sets = core.lrucache.new({ type = "plugin", count = 512 })

local function parse_origins(text)
    local set = {}
    for origin in text:gmatch("[^,]+") do
        set[origin] = true
    end
    return set
end

local function among(text, origin)
    if text == "**" then
        return true
    end
    return origin_sets(text, nil, parse_origins, text)[origin]
end

local function matches_any(list, origin)
    for _, regex in ipairs(list) do
        if re_find(origin, regex, "jo") then
            return true
        end
    end
    return false
end

local function in_metadata(keys, origin)
    local metadata = plugin.plugin_metadata(name)
    local origins = metadata and metadata.value and metadata.value.allow_origins
    for _, key in ipairs(origins and keys or {}) do
        local text = origins[key]
        if text and (text == "*" or among(text, origin)) then
            return true
        end
    end
    return false
end

-- The value of Access-Control-Allow-Origin for this origin, or nil.
local function allowed_origin(conf, origin)
    if conf.allow_origins_by_regex then
        return origin and matches_any(conf.allow_origins_by_regex, origin) and origin or nil
    end
    if conf.allow_origins_by_metadata and origin and in_metadata(conf.allow_origins_by_metadata, origin) then
        return origin
    end
    if conf.allow_origins == "*" then
        -- The default, which means nothing where the metadata says who is allowed.
        return not conf.allow_origins_by_metadata and "*" or nil
    end
    return origin and among(conf.allow_origins, origin) and origin or nil
end

local function timing_origin(conf, origin)
    if conf.timing_allow_origins_by_regex then
        return origin and matches_any(conf.timing_allow_origins_by_regex, origin) and origin or nil
    end
    if not conf.timing_allow_origins then
        return nil
    end
    if conf.timing_allow_origins == "*" then
        return "*"
    end
    return origin and among(conf.timing_allow_origins, origin) and origin or nil
end

local function set_cors_headers(conf, ctx)
    set_header("Access-Control-Allow-Methods", conf.allow_methods == "**" and ALL_METHODS or conf.allow_methods)
    set_header("Access-Control-Max-Age", conf.max_age)
    if conf.expose_headers and conf.expose_headers ~= "" then
        set_header("Access-Control-Expose-Headers", conf.expose_headers)
    end
    if conf.allow_headers == "**" then
        set_header("Access-Control-Allow-Headers", ctx.cors_request_headers)
    else
        set_header("Access-Control-Allow-Headers", conf.allow_headers)
    end
    if conf.allow_credential then
        set_header("Access-Control-Allow-Credentials", true)
    end
end

function _M.rewrite(conf, ctx)
    ctx.cors_origin = core.request.header(ctx, "Origin") or ""
    if conf.allow_headers == "**" then
        ctx.cors_request_headers = core.request.header(ctx, "Access-Control-Request-Headers")
    end
    if ctx.var.request_method == "OPTIONS" and core.request.header(ctx, "Access-Control-Request-Method") then
        return 200
    end
end

function _M.header_filter(conf, ctx)
    local origin = ctx.cors_origin ~= "" and ctx.cors_origin or nil
    local allowed = allowed_origin(conf, origin)
    if conf.allow_origins ~= "*" or conf.allow_origins_by_regex then
        add_header("Vary", "Origin")
    end
    if allowed then
        set_header("Access-Control-Allow-Origin", allowed)
        set_cors_headers(conf, ctx)
    end
    local timing = timing_origin(conf, origin)
    if timing then
        set_header("Timing-Allow-Origin", timing)
    end
end

return _M
