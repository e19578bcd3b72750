--- `apisix`: the gateway as scripts of APISIX's nginx.conf see it. There is no nginx.conf here: requests come by these functions when
--- somebody has replaced them (docs/compatibility.md says which), and else the gateway does without.
local _M = { version = require("apisix.core.version") }

for name, original in pairs(require("moongate.phases").originals) do _M[name] = original end

return _M
