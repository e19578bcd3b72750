--- The tables of the request that runs.
--
-- A request has a slot in this VM from the first phase that enters Lua to the end of its log phase; the tables of
-- one that ended are cleared and used again.

local fast = require("moongate.native").fast
local slot = fast.slot
local pairs = pairs

local _M = {}

local ctxs, ngx_ctxs = {}, {}
-- What the handshakes of their connections have left, for those requests that have not asked yet.
local inherited = {}

-- What a request sets is its own.
local function copy(from, to)
    for name, value in pairs(from) do to[name] = value end
end

--- The plugins' `ctx`; nil outside of a request.
function _M.ctx()
    return ctxs[slot()]
end

--- `ngx.ctx`: a table of the request, made when first asked for.
function _M.ngx_ctx()
    local at = slot()
    local t = ngx_ctxs[at]
    if not t then
        t = { api_ctx = ctxs[at] }
        if inherited[at] then copy(inherited[at], t) end
        ngx_ctxs[at] = t
    end
    return t
end

--- `ngx.ctx = t`
function _M.set_ngx_ctx(t)
    ngx_ctxs[slot()] = t
end

--- Has the `ngx.ctx` of the request with the slot `at` begin with what is in `t`.
function _M.inherit(at, t)
    inherited[at] = t
end

--- What `ngx.ctx` of the slot `at` is, nil when nobody has asked for it.
function _M.left(at)
    local t = ngx_ctxs[at]
    return t
end

--- The request with the slot `at` is over.
function _M.clear(at)
    ngx_ctxs[at] = nil
    if inherited[at] then inherited[at] = nil end
end

--- Makes `t` the `ngx.ctx` of the request with the slot `at`.
function _M.adopt(at, t)
    ngx_ctxs[at] = t
end

_M.ctxs, _M.ngx_ctxs = ctxs, ngx_ctxs

return _M
