--- `xmlhandler.tree`: elements become fields of tables, those of one name a list, attributes `_attr` (xml2lua's README).

local _M = {}
local mt = { __index = _M }

--- A handler with its own `root`.
function _M.new()
    local root = {}
    return setmetatable({ root = root, options = { noreduce = {} }, stack = { { node = root } } }, mt)
end

_M.tree = _M.new

local function add(parent, name, value)
    local old = parent[name]
    if old == nil then
        parent[name] = value
    elseif type(old) == "table" and old[1] ~= nil and not (old._attr and #old == 1 and type(old[1]) ~= "table") then
        old[#old + 1] = value
    else
        parent[name] = { old, value }
    end
end

function _M:starttag(tag)
    self.stack[#self.stack + 1] = { name = tag.name, node = { _attr = tag.attrs } }
end

function _M:text(text)
    local node = self.stack[#self.stack].node
    node[#node + 1] = text
end

_M.cdata = _M.text

-- An element with nothing but its text is that text.
function _M:endtag()
    local stack = self.stack
    local top = stack[#stack]
    stack[#stack] = nil
    local node = top.node
    local only = node[1]
    if only ~= nil and node[2] == nil and next(node, next(node)) == nil and not self.options.noreduce[top.name] then
        node = only
    end
    add(stack[#stack].node, top.name, node)
end

return setmetatable(_M, { __call = _M.new })
