--- `require("ngx.re")`: split and opt (lua-resty-core).

local re = require("moongate.re")

return { _VERSION = "0.1.28", split = re.split, opt = re.opt }
