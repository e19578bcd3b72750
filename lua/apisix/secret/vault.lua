--- `apisix.secret.vault`: HashiCorp Vault's KV engine, version 1 (terminology/secret.md; Vault's HTTP API, "KV secrets engine").
-- Waits.
local core = require("apisix.core")
local http = require("resty.http")
local env = core.env
local byte, sub, type = string.byte, string.sub, type

local _M = {}

--- JSON Schema of `/apisix/admin/secrets/vault/{id}`.
_M.schema = core.schema.of_secret_manager("vault")

-- For connecting, sending and each read. Requests wait for it.
local TIMEOUT_MS = 5000
local SLASH = byte("/")

local function path_of(conf, name)
    if byte(name, 1) == SLASH then
        name = sub(name, 2)
    end
    return conf.uri .. "/v1/" .. conf.prefix .. "/" .. name
end

-- Whether the status says that asking again is of no use. 408 and 429 are about now; so is what a server says of itself.
local function is_final(status)
    return status >= 400 and status < 500 and status ~= 408 and status ~= 429
end

-- The answer's text; nil and why there is none; whether asking again is of no use.
local function read(conf, name)
    local client = http.new()
    client:set_timeout(TIMEOUT_MS)
    local token = env.fetch_by_uri(conf.token)
    local response, err = client:request_uri(path_of(conf, name), {
        method = "GET",
        headers = {
            ["X-Vault-Token"] = token or conf.token,
            ["X-Vault-Namespace"] = conf.namespace,
        },
    })
    if not response then
        return nil, err
    end
    if response.status ~= 200 then
        core.log.warn("vault answered with status ", response.status, " for key: ", name)
    end
    return response.body, nil, is_final(response.status)
end

--- The value of `key`, `<path of the secret>/<field>`; nil when the secret has no such field; nil and the reason, and
-- true when that is Vault's last word: it knows no such secret, or not for us.
function _M.get(conf, key)
    core.log.info("fetching data from vault for key: ", key)
    local slash = core.string.rfind_char(key, "/")
    if not slash then
        return nil, "error key format, key: " .. key, true
    end
    local name, field = sub(key, 1, slash - 1), sub(key, slash + 1)
    if name == "" then
        return nil, "can't find main key, key: " .. key, true
    end
    if field == "" then
        return nil, "can't find sub key, key: " .. key, true
    end
    local body, err, final = read(conf, name)
    if not body then
        return nil, "failed to retrtive data from vault kv engine: " .. err
    end
    local answer = core.json.decode(body)
    if type(answer) ~= "table" or type(answer.data) ~= "table" then
        return nil, "failed to decode result, res: " .. body, final
    end
    return answer.data[field]
end

return _M
