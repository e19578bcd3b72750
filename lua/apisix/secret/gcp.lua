--- `apisix.secret.gcp`: Google Cloud's Secret Manager (terminology/secret.md; its REST API, `versions.access`). Waits.
local core = require("apisix.core")
local http = require("resty.http")
local google_oauth = require("apisix.utils.google-cloud-oauth")
local decode_base64 = ngx.decode_base64
local sub, type = string.sub, type

local _M = {}

--- JSON Schema of `/apisix/admin/secrets/gcp/{id}`.
_M.schema = core.schema.of_secret_manager("gcp")

local DEFAULT_ENTRIES = _M.schema.properties.auth_config.properties.entries_uri.default
-- For connecting, sending and each read. Requests wait for it.
local TIMEOUT_MS = 5000
-- Bytes of an error's name that are told.
local MAX_REASON = 64

-- Service accounts whose tokens a worker keeps, by what they are configured as; they go with that.
local oauths = core.lrucache.new({ ttl = 3600, count = 32 })

local function account_of(conf)
    if conf.auth_config then
        return conf.auth_config
    end
    local path = conf.auth_file
    local file, open_err = io.open(path, "rb")
    if not file then
        return nil, "failed to read configuration, file: " .. path .. ", err: " .. open_err
    end
    file:close()
    local text, err = core.io.get_file(path)
    if not text then
        return nil, "failed to read configuration, file: " .. path .. ", err: " .. err
    end
    local fields
    fields, err = core.json.decode(text)
    if type(fields) ~= "table" then
        return nil, "config parse failure, file: " .. path .. ", err: " .. (err or "it is no object")
    end
    local whole = { auth_config = fields }
    local ok
    ok, err = core.schema.check(_M.schema, whole)
    if not ok then
        return nil, "config parse failure, file: " .. path .. ", err: " .. err
    end
    return whole.auth_config
end

local function oauth_of(conf)
    local account, err = account_of(conf)
    if not account then
        return nil, err
    end
    local key = core.json.stably_encode({ account, conf.ssl_verify ~= false })
    return oauths(key, nil, google_oauth.new, account, conf.ssl_verify ~= false)
end

-- Whether the status says that asking again is of no use. 401 is about the token, which is renewed.
local function is_final(status)
    return status >= 400 and status < 500 and status ~= 401 and status ~= 408 and status ~= 429
end

-- Google's name for an error (its "Errors" in "Cloud APIs"), in brackets.
local function reason_of(body)
    local answer = core.json.decode(body)
    local told = type(answer) == "table" and type(answer.error) == "table" and answer.error.status
    return type(told) == "string" and " (" .. sub(told, 1, MAX_REASON) .. ")" or ""
end

-- What the secret of that name holds; nil, why not, and whether asking again is of no use.
local function read(conf, name)
    local oauth, err = oauth_of(conf)
    if not oauth then
        return nil, err
    end
    local token, _, refused = oauth:generate_access_token()
    if not token then
        return nil, "failed to get google oauth token", refused
    end
    local client = http.new()
    client:set_timeout(TIMEOUT_MS)
    local entries = oauth.entries_uri or DEFAULT_ENTRIES
    local uri = entries .. "/projects/" .. oauth.project_id .. "/secrets/" .. name .. "/versions/latest:access"
    local response
    response, err = client:request_uri(uri, {
        ssl_verify = oauth.ssl_verify,
        method = "GET",
        headers = { ["Authorization"] = (oauth.access_token_type or "Bearer") .. " " .. token },
    })
    if not response then
        return nil, err
    end
    if response.status ~= 200 then
        if response.status == 401 then
            oauth:forget_access_token()
        end
        return nil, "invalid response status " .. response.status .. reason_of(response.body), is_final(response.status)
    end
    local answer
    answer, err = core.json.decode(response.body)
    local payload = type(answer) == "table" and answer.payload
    local data = type(payload) == "table" and type(payload.data) == "string" and decode_base64(payload.data)
    if not data then
        return nil, "failed to parse response data, err: " .. (err or "there is no payload")
    end
    return data
end

--- The value of `key`: a secret's name, or its name and a field of its JSON after a slash. nil when the secret has no such
-- field; nil and the reason, and true when that is the manager's last word.
function _M.get(conf, key)
    core.log.info("fetching data from gcp for key: ", key)
    local slash = core.string.find(key, "/")
    local name, field = key, nil
    if slash then
        name, field = sub(key, 1, slash - 1), sub(key, slash + 1)
    end
    if name == "" then
        return nil, "can't find main key, key: " .. key, true
    end
    local text, err, final = read(conf, name)
    if not text then
        return nil, "failed to retrtive data from gcp secret manager: " .. err, final
    end
    if not field then
        return text
    end
    local fields
    fields, err = core.json.decode(text)
    if type(fields) ~= "table" then
        return nil, "failed to decode result, err: " .. (err or "it is no object"), true
    end
    return fields[field]
end

return _M
