--- `apisix.utils.rfc5424`: lines of syslog (RFC 5424). All phases.
local concat, ipairs, tostring = table.concat, ipairs, tostring
local os_date, floor = os.date, math.floor

local _M = {}

-- RFC 5424, 6.2.1.
local FACILITIES = {
    KERN = 0, USER = 1, MAIL = 2, DAEMON = 3, AUTH = 4, SYSLOG = 5, LPR = 6, NEWS = 7, UUCP = 8, CRON = 9, AUTHPRIV = 10,
    FTP = 11, LOCAL0 = 16, LOCAL1 = 17, LOCAL2 = 18, LOCAL3 = 19, LOCAL4 = 20, LOCAL5 = 21, LOCAL6 = 22, LOCAL7 = 23,
}
local SEVERITIES = {
    EMEGR = 0, EMERG = 0, ALERT = 1, CRIT = 2, ERR = 3, ERROR = 3, WARNING = 4, WARN = 4, NOTICE = 5, INFO = 6, DEBUG = 7,
}

-- The element's name in structured data: what Alibaba Cloud's log service reads.
local SD_ID = "logservice"

local ESCAPED = { ['"'] = '\\"', ["\\"] = "\\\\", ["]"] = "\\]" }

local function structured(data)
    if not data then
        return "-"
    end
    local parts = { SD_ID }
    for _, param in ipairs(data) do
        parts[#parts + 1] = param.name .. '="' .. tostring(param.value):gsub('["\\%]]', ESCAPED) .. '"'
    end
    return "[" .. concat(parts, " ") .. "]"
end

local function timestamp()
    local now = ngx.now()
    return os_date("!%Y-%m-%dT%H:%M:%S", floor(now)) .. (".%03dZ"):format(floor(now % 1 * 1000))
end

--- A line without its line feed: facility and severity as names ("SYSLOG", "INFO"), `hostname`, `appname`, `pid` (each
-- may be nil), the message, and structured data: an array of `{ name, value }`. Raises for a name that there is not.
function _M.encode(facility, severity, hostname, appname, pid, message, data)
    local priority = (FACILITIES[facility] or error("unknown facility " .. tostring(facility), 2)) * 8
        + (SEVERITIES[severity] or error("unknown severity " .. tostring(severity), 2))
    return "<" .. priority .. ">1 " .. timestamp() .. " " .. (hostname or "-") .. " " .. (appname or "-") .. " "
        .. tostring(pid or "-") .. " - " .. structured(data) .. " " .. message
end

return _M
