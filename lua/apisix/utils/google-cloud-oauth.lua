--- `apisix.utils.google-cloud-oauth`: access tokens for a service account (Google's "Using OAuth 2.0 for server to server
-- applications"; RFC 7523). Waits.
local core = require("apisix.core")
local http = require("resty.http")
local jwt = require("resty.jwt")
local time = ngx.time
local concat, pcall, setmetatable, sub, tonumber, tostring, type =
    table.concat, pcall, setmetatable, string.sub, tonumber, tostring, type

local _M = {}
local mt = { __index = _M }

-- Seconds that an assertion holds, as Google's documents have it, and those before a token's end when another is fetched.
local ASSERTION_TTL = 3600
local MARGIN = 60
-- For connecting, sending and each read.
local TIMEOUT_MS = 5000
-- Bytes of what a token server says of a refusal.
local MAX_LOGGED = 256
local GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"

--- Tokens for `config`: `client_email`, `private_key` (PEM), `project_id`, `token_uri`, `scope` (a text or an array of them),
-- `entries_uri`. `ssl_verify`: whether the token server's certificate is checked.
function _M.new(config, ssl_verify)
    local scope = config.scope or config.scopes
    return setmetatable({
        client_email = config.client_email,
        private_key = config.private_key,
        project_id = config.project_id,
        token_uri = config.token_uri or "https://oauth2.googleapis.com/token",
        auth_uri = config.auth_uri,
        entries_uri = config.entries_uri,
        scope = type(scope) == "table" and concat(scope, " ") or scope or "https://www.googleapis.com/auth/cloud-platform",
        ssl_verify = ssl_verify,
        access_token = nil,
        access_token_type = nil,
        access_token_ttl = nil,
        access_token_expire_time = 0,
    }, mt)
end

local function assertion(self)
    local now = time()
    return jwt:sign(self.private_key, {
        header = { alg = "RS256", typ = "JWT" },
        payload = {
            iss = self.client_email, aud = self.token_uri, scope = self.scope, iat = now, exp = now + ASSERTION_TTL,
        },
    })
end

-- What an error of the token server says (RFC 6749, 5.2), as a log may have it: nothing else of its answer.
local function refusal(body)
    local answer = core.json.decode(body)
    if type(answer) ~= "table" or type(answer.error) ~= "string" then
        return "no OAuth error"
    end
    local described = answer.error_description
    return sub(core.json.encode({
        error = answer.error, error_description = type(described) == "string" and described or nil,
    }), 1, MAX_LOGGED)
end

local function request(self, token)
    local client = http.new()
    client:set_timeout(TIMEOUT_MS)
    local response, err = client:request_uri(self.token_uri, {
        ssl_verify = self.ssl_verify,
        method = "POST",
        body = ngx.encode_args({ grant_type = GRANT_TYPE, assertion = token }),
        headers = { ["Content-Type"] = "application/x-www-form-urlencoded" },
    })
    if not response then
        return nil, "failed to refresh google oauth access token, " .. err
    end
    if response.status ~= 200 then
        return nil, "failed to refresh google oauth access token, status: " .. response.status .. ", error: "
            .. refusal(response.body), response.status >= 400 and response.status < 500 and response.status ~= 429
    end
    local answer
    answer, err = core.json.decode(response.body)
    if type(answer) ~= "table" or type(answer.access_token) ~= "string" then
        return nil, "failed to parse google oauth response data: " .. (err or "there is no access_token")
    end
    return answer
end

--- Fetches a token whether the last one still holds or not: true; nil, what went wrong, which is in error.log, too, and true when the
-- token server refuses the account.
function _M.refresh_access_token(self)
    local signed, token = pcall(assertion, self)
    if not signed then
        local err = "failed to sign the assertion for google oauth token: "
            .. tostring(type(token) == "table" and token.reason or token)
        core.log.error(err)
        return nil, err, true
    end
    local answer, err, refused = request(self, token)
    if not answer then
        core.log.error(err)
        return nil, err, refused
    end
    self.access_token = answer.access_token
    self.access_token_type = type(answer.token_type) == "string" and answer.token_type or nil
    self.access_token_ttl = tonumber(answer.expires_in) or 0
    self.access_token_expire_time = time() + self.access_token_ttl
    return true
end

--- Has the next `generate_access_token` fetch one: for a token that is refused before its time.
function _M.forget_access_token(self)
    self.access_token = nil
end

--- A token that still holds, fetched where there is none: a text; or nil, and what `refresh_access_token` says.
function _M.generate_access_token(self)
    if not self.access_token or time() > self.access_token_expire_time - MARGIN then
        self.access_token = nil
        local ok, err, refused = self:refresh_access_token()
        if not ok then
            return nil, err, refused
        end
    end
    return self.access_token
end

return _M
