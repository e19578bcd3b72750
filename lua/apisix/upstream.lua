--- `apisix.upstream`: which upstream the request goes to.
local native = require("moongate.native").apisix
local json = require("apisix.core.json")
local schema = require("apisix.core.schema")
local setmetatable, tostring, type = setmetatable, tostring, type

local _M = {}

--- Checks an upstream's table: true, or false and the reason.
function _M.check_schema(conf)
    return native.check_upstream(json.encode(conf))
end

-- conf -> its handle in the gateway; the handle goes with the conf.
local handles = setmetatable({}, { __mode = "k" })

local function handle_of(conf)
    local handle = handles[conf]
    if not handle then
        local text, encode_err = json.encode(conf)
        if not text then
            return nil, encode_err
        end
        local err
        handle, err = native.make_upstream(text)
        if not handle then
            return nil, err
        end
        handles[conf] = handle
    end
    return handle
end

--- Sends this request to the upstream that the table `conf` describes. Status and body when it cannot be.
function _M.choose(ctx, conf)
    local handle, err = handle_of(conf)
    if not handle then
        require("apisix.core.log").error("failed to use the upstream: ", err)
        return 500, { error_msg = "invalid upstream" }
    end
    native.choose_upstream(handle)
    ctx.matched_upstream = conf
end

--- `set(ctx, key, version, conf)`: APISIX's form of `choose`.
function _M.set(ctx, _, _, conf)
    local code, body = _M.choose(ctx, conf)
    if code then
        return nil, body.error_msg
    end
    return true
end

--- The upstream resource of that id as a table, or nil.
function _M.get_by_id(id)
    return (native.object("upstreams", tostring(id)))
end

_M.schema = schema.upstream

return _M
