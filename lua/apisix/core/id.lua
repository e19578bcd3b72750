--- `core.id`: the identity of this gateway: `conf/apisix.uid`, made on first use.
local uuid = require("resty.jit-uuid")
local native = require("moongate.native")
local log = require("apisix.core.log")

local _M = {}
local id

local function read(path)
    local file = io.open(path)
    if not file then
        return nil
    end
    local text = file:read("*l")
    file:close()
    return text ~= "" and text or nil
end

local function write(path, text)
    local file = io.open(path, "w")
    if file then
        file:write(text)
        file:close()
    end
end

--- A text that stays the same over restarts: `apisix.id` of config.yaml, or a UUID that is kept on disk.
function _M.get()
    if id then
        return id
    end
    local conf = require("apisix.core.config_local").local_conf()
    local path = native.prefix .. "/conf/apisix.uid"
    id = conf.apisix and conf.apisix.id or read(path)
    if not id then
        id = uuid.generate_v4()
        log.info("not found apisix uid, generate a new one: ", id)
        write(path, id)
    end
    return id
end

--- A version-4 UUID.
_M.gen_uuid_v4 = uuid.generate_v4

function _M.init() end

return _M
