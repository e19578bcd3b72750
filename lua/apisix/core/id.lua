--- `core.id`: the identity of this gateway: `conf/apisix.uid`, made on first use. All phases.
local uuid = require("resty.jit-uuid")
local native = require("moongate.native")
local log = require("apisix.core.log")
local config_local = require("apisix.core.config_local")

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

-- Of several workers at the same time one makes the file (fopen's `x`), and the others read what it wrote.
local function generate(path)
    local new = uuid.generate_v4()
    local file, err = io.open(path, "wx")
    if not file then
        local other = read(path)
        if not other then
            log.error("failed to write ", path, ": ", err, "; the id of this gateway changes with its next start")
        end
        return other or new
    end
    log.notice("not found apisix uid, generate a new one: ", new)
    file:write(new)
    file:close()
    return new
end

--- A text that stays the same over restarts: `apisix.id` of config.yaml, or a UUID that is kept on disk.
function _M.get()
    if not id then
        local apisix = config_local.local_conf().apisix
        local path = native.prefix .. "/conf/apisix.uid"
        id = apisix and apisix.id or read(path) or generate(path)
    end
    return id
end

--- A version-4 UUID as a text.
_M.gen_uuid_v4 = uuid.generate_v4

--- Makes the id now rather than on first use.
function _M.init()
    _M.get()
end

return _M
