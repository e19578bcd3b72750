--- `pl.class`: classes with single inheritance (Penlight's manual).

local chunk = require("moongate.chunk")

local error, getmetatable, pairs, rawget, setmetatable, type = error, getmetatable, pairs, rawget, setmetatable, type

local function is_a(self, class)
    if type(self) ~= "table" then return false end
    if class == nil then
        local mt = getmetatable(self)
        return type(mt) == "table" and rawget(mt, "_class") or nil
    end
    local at = rawget(self, "_class") and self or getmetatable(self)
    if rawget(self, "_init") ~= nil or rawget(self, "_class") == self then at = self end
    while at do
        if at == class then return true end
        at = rawget(at, "_base")
    end
    return false
end

local function class_of(class, value)
    return type(value) == "table" and getmetatable(value) ~= nil and is_a(value, class)
end

-- Runs the constructors: a class without one has its base's; `super` is the base's for as long as the own one runs.
local function construct(class, object, ...)
    local at = class
    while at and rawget(at, "_init") == nil do at = rawget(at, "_base") end
    if not at then return end
    local base = rawget(at, "_base")
    local before = rawget(object, "super")
    if base then
        object.super = function(self, ...) construct(base, self, ...) end
    end
    local result = at._init(object, ...)
    object.super = before
    return result
end

local function define(base, methods, class)
    class = class or {}
    if base then
        for key, value in pairs(base) do
            if class[key] == nil and key ~= "_init" and key ~= "_name" and key ~= "_class_init" then class[key] = value end
        end
        class._base = base
    end
    class._class, class.is_a, class.class_of = class, is_a, class_of
    class.__index = class
    -- Fields that are not there: _handler answers, when there is one.
    function class.catch(handler)
        if type(handler) == "function" then
            class._handler = handler
            class.__index = function(self, key)
                local value = class[key]
                if value ~= nil then return value end
                return handler(self, key)
            end
        end
    end
    for key, value in pairs(methods or {}) do class[key] = value end
    setmetatable(class, {
        __call = function(_, ...)
            local object = setmetatable({}, class)
            local other = construct(class, object, ...)
            if other ~= nil then object = setmetatable(other, class) end
            if rawget(class, "_post_init") then class._post_init(object) end
            return object
        end,
        __tostring = function() return class._name and "class " .. class._name or "class" end,
    })
    if base and base._class_init then base._class_init(class) end
    return class
end

local _M = {}

--- `class(base?)`, `class { _base = base, method = … }`, and `class.Name(base?)`, which is also a global (not in
-- uploaded functions).
-- @return a class; calling it makes an object by `_init`. Objects have `is_a`; classes `class_of` and `catch`
return setmetatable(_M, {
    __call = function(_, first, methods, class)
        if first ~= nil and type(first) ~= "table" then error("base is not a class", 2) end
        if first and rawget(first, "_class") == nil and methods == nil then
            local body = {}
            for key, value in pairs(first) do
                if key ~= "_base" then body[key] = value end
            end
            return define(rawget(first, "_base"), body)
        end
        return define(first, methods, class)
    end,
    __index = function(_, name)
        return function(...)
            local class = _M(...)
            class._name = name
            if not chunk.sandboxed then chunk.globals()[name] = class end
            return class
        end
    end,
})
