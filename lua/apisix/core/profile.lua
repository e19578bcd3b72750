--- `core.profile`: where the configuration files of this profile are (profile.md): `APISIX_PROFILE=dev` reads
-- `conf/config-dev.yaml`. All phases.
local native = require("moongate.native")
local getenv = os.getenv

local _M = {
    --- The profile's name; nil or "" for none.
    profile = getenv("APISIX_PROFILE"),
    --- The directory that `conf/` is in, with a slash at its end; "" for the working directory.
    apisix_home = native.prefix ~= "" and native.prefix .. "/" or "",
}

local function suffix(self)
    return self.profile and self.profile ~= "" and "-" .. self.profile or ""
end

--- The path of `conf/<name>.yaml` under the profile.
function _M.yaml_path(self, name)
    return self.apisix_home .. "conf/" .. name .. suffix(self) .. ".yaml"
end

--- `json_path`: the same of `conf/<name>.json`.
function _M.json_path(self, name)
    return self.apisix_home .. "conf/" .. name .. suffix(self) .. ".json"
end

return _M
