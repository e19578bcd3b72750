--- Answers with an example, or with data made from a JSON Schema, without an upstream.
local core = require("apisix.core")
local sleep = ngx.sleep
local random = math.random
local resolve_var = core.utils.resolve_var
local pairs, setmetatable, tostring, type = pairs, setmetatable, tostring, type

local name = "mocking"

local _M = {
    version = 0.1,
    priority = 10900,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

-- Deeper schemas end in null: a schema may refer to itself.
local MAX_DEPTH = 16

local support_types = { string = true, number = true, integer = true, boolean = true, object = true, array = true }

local function check_property(schema, depth)
    if type(schema) ~= "table" or depth > MAX_DEPTH or not schema.type then
        return true
    end
    if not support_types[schema.type] then
        return false, "unsupported type: " .. tostring(schema.type)
    end
    for _, property in pairs(schema.properties or {}) do
        local ok, err = check_property(property, depth + 1)
        if not ok then
            return false, err
        end
    end
    return check_property(schema.items, depth + 1)
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    if conf.response_schema then
        return check_property(conf.response_schema, 1)
    end
    return true
end

local function random_string(schema)
    local length = random(1, 10)
    local out = {}
    for i = 1, length do
        out[i] = string.char(random(97, 122))
    end
    return schema.example or table.concat(out)
end

local generate

local makers = {
    string = random_string,
    number = function(schema)
        return schema.example or random() * 10000
    end,
    integer = function(schema)
        return schema.example or random(1, 10000)
    end,
    boolean = function(schema)
        if schema.example ~= nil then
            return schema.example
        end
        return random(0, 1) == 1
    end,
    array = function(schema, depth)
        if schema.example then
            return schema.example
        end
        local out = core.table.new(4, 0)
        for i = 1, random(1, 3) do
            out[i] = schema.items and generate(schema.items, depth + 1)
        end
        return setmetatable(out, core.json.array_mt)
    end,
    object = function(schema, depth)
        if schema.example then
            return schema.example
        end
        local out = {}
        for key, property in pairs(schema.properties or {}) do
            out[key] = generate(property, depth + 1)
        end
        return out
    end,
}

function generate(schema, depth)
    local make = makers[schema.type]
    if not make or depth > MAX_DEPTH then
        return nil
    end
    return make(schema, depth)
end

local function to_xml(value, tag)
    if type(value) ~= "table" then
        return "<" .. tag .. ">" .. tostring(value) .. "</" .. tag .. ">"
    end
    local out = {}
    for key, v in pairs(value) do
        out[#out + 1] = to_xml(v, type(key) == "number" and "item" or key)
    end
    return "<" .. tag .. ">" .. table.concat(out) .. "</" .. tag .. ">"
end

local function encode(data, content_type)
    if content_type:find("xml", 1, true) then
        return to_xml(data, "data")
    end
    return core.json.encode(data)
end

local function body_of(conf, ctx)
    if conf.response_example then
        return (resolve_var(conf.response_example, ctx.var))
    end
    return encode(generate(conf.response_schema, 1), conf.content_type)
end

function _M.access(conf, ctx)
    local body, err = body_of(conf, ctx)
    if not body then
        core.log.error("failed to make a response: ", err)
        return 500
    end
    core.response.set_header("Content-Type", conf.content_type)
    if conf.with_mock_header then
        core.response.set_header("x-mock-by", "APISIX/" .. core.version.VERSION)
    end
    for field, value in pairs(conf.response_headers or {}) do
        core.response.add_header(field, type(value) == "string" and resolve_var(value, ctx.var) or value)
    end
    if conf.delay > 0 then
        sleep(conf.delay)
    end
    return conf.response_status, body
end

return _M
