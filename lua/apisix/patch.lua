--- `apisix.patch`: what APISIX changes of OpenResty before it starts. The gateway's own `ngx.*` does it all: sockets resolve names
-- by `apisix.dns_resolver` and work in every phase. The functions are there for scripts that call them; nothing is left
-- to do.
local function nothing() end

return { patch = nothing, patch_ngx_socket = nothing }
