--- `apisix.utils.span`: what took time in a request, as a tree that a plugin keeps in its context (`ctx.my_span = span.new(…)`) and
-- logs or exports itself.
--
-- APISIX documents no face of its module; this one is ours, in OpenTelemetry's words. A span is a table to be read: `name`,
-- `kind`, `parent`, `children` (an array), `attributes` (name -> value), `status` ({ code, message }), `start_time` and `end_time`
-- (seconds as `ngx.now()` gives them; no `end_time`: it is not finished). The first of a tree has `dropped`, how many found no
-- room. All phases; none of these waits.
local error, pairs, setmetatable, sub, type = error, pairs, setmetatable, string.sub, type
local now = ngx.now

-- Spans of one tree: a loop over what a client sends must not keep them all.
local MAX_SPANS = 1000
-- Attributes of a span, and bytes of the text of one. The first is OpenTelemetry's default.
local MAX_ATTRIBUTES, MAX_TEXT = 128, 4096

local _M = {}
_M.__index = _M

--- Kinds, by OpenTelemetry's numbers: `INTERNAL`, `SERVER`, `CLIENT`, `PRODUCER`, `CONSUMER`.
_M.KIND = { INTERNAL = 1, SERVER = 2, CLIENT = 3, PRODUCER = 4, CONSUMER = 5 }
--- Codes of a status, by OpenTelemetry's numbers: `UNSET`, `OK`, `ERROR`.
_M.STATUS = { UNSET = 0, OK = 1, ERROR = 2 }

local function root_of(span)
    while span.parent do
        span = span.parent
    end
    return span
end

-- Puts a tree under a span while there is room.
local function attach(parent, child)
    local root = root_of(parent)
    if root.size + child.size > MAX_SPANS then
        root.dropped = root.dropped + child.size
        return nil, "the tree has " .. root.size .. " spans, and no room for more than " .. MAX_SPANS
    end
    root.size, root.dropped = root.size + child.size, root.dropped + child.dropped
    child.size, child.dropped = nil, nil
    child.parent = parent
    parent.children[#parent.children + 1] = child
    return child
end

--- Begins a span. `name`: a text; `kind`: a number of `KIND` (INTERNAL); `parent`: the span that it is a part of. Where the parent's
-- tree has 1,000 spans it begins a tree of its own, and the parent's counts it as dropped. Raises for arguments of another type.
function _M.new(name, kind, parent)
    if type(name) ~= "string" or (kind ~= nil and type(kind) ~= "number") then
        error("a span has a name, and its kind is a number", 2)
    end
    local span = setmetatable({
        name = sub(name, 1, MAX_TEXT), kind = kind or _M.KIND.INTERNAL, children = {}, attributes = {}, attribute_count = 0,
        status = { code = _M.STATUS.UNSET }, start_time = now(), size = 1, dropped = 0,
    }, _M)
    if parent then
        attach(parent, span)
    end
    return span
end

--- Puts the tree whose first span is `child` under this one: `child`; nil and why not: it has a parent already, it is the tree that
-- this span is in, or the tree would have more than 1,000 spans.
function _M:append_child(child)
    if child.parent then
        return nil, "the span has a parent"
    end
    if root_of(self) == child then
        return nil, "a span is no part of itself"
    end
    return attach(self, child)
end

local function is_plain(value)
    local kind = type(value)
    return kind == "string" or kind == "number" or kind == "boolean"
end

--- Sets attributes: `attributes` is name -> text (of which 4,096 bytes are kept), number or boolean. Values of another type and names
-- beyond the 128th are left out. The span.
function _M:set_attributes(attributes)
    for name, value in pairs(attributes) do
        local is_new = self.attributes[name] == nil
        if type(name) == "string" and is_plain(value) and (not is_new or self.attribute_count < MAX_ATTRIBUTES) then
            self.attribute_count = self.attribute_count + (is_new and 1 or 0)
            self.attributes[name] = type(value) == "string" and sub(value, 1, MAX_TEXT) or value
        end
    end
    return self
end

--- Sets how it went: `code` is a number of `STATUS`, `message` a text that explains an error. The span. Raises for another code.
function _M:set_status(code, message)
    if code ~= _M.STATUS.UNSET and code ~= _M.STATUS.OK and code ~= _M.STATUS.ERROR then
        error("the code of a span's status is 0, 1 or 2", 2)
    end
    self.status = { code = code, message = type(message) == "string" and sub(message, 1, MAX_TEXT) or nil }
    return self
end

--- Ends the span, and those of its children that have not ended. Only the first time counts. The span.
function _M:finish()
    if self.end_time then
        return self
    end
    self.end_time = now()
    for i = 1, #self.children do
        self.children[i]:finish()
    end
    return self
end

return _M
