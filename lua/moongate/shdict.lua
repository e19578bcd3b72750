--- ngx.shared: dictionaries of the process, over FFI (src/lua/ngx/shdict.rs).

local ffi = require("ffi")
local native = require("moongate.native")
local fast = native.fast

local error, ipairs, rawset, setmetatable, tonumber, tostring, type =
    error, ipairs, rawset, setmetatable, tonumber, tostring, type
local ffi_string = ffi.string

local find, get, store, delete, incr = fast.dict_find, fast.dict_get, fast.dict_store, fast.dict_delete, fast.dict_incr
local push, pop, llen, ttl, expire = fast.dict_push, fast.dict_pop, fast.dict_llen, fast.dict_ttl, fast.dict_expire
local flush_all, flush_expired, size = fast.dict_flush_all, fast.dict_flush_expired, fast.dict_size
local keys_of, names_of = native.shdict.keys, native.shdict.names

-- One value for all calls: each is over before the next begins.
local val = ffi.new("moongate_val")

local BOOLEAN, NUMBER, STRING, LIST = 1, 3, 4, 5
local SET, ADD, REPLACE, SAFE = 0, 1, 2, 4
local MAX_KEY = 65535

local _M = {}
local mt = { __index = _M }

local function pointer(dict)
    if type(dict) ~= "table" or not dict.ptr then error('bad "zone" argument', 3) end
    return dict.ptr
end

local function key_of(key)
    if type(key) ~= "string" then
        if key == nil then return nil, "nil key" end
        key = tostring(key)
    end
    local len = #key
    if len == 0 then return nil, "empty key" end
    if len > MAX_KEY then return nil, "key too long" end
    return key
end

local function load(value)
    local kind = type(value)
    if kind == "string" then
        val.kind, val.text.ptr, val.text.len = STRING, value, #value
    elseif kind == "number" then
        val.kind, val.number = NUMBER, value
    elseif kind == "boolean" then
        val.kind, val.number = BOOLEAN, value and 1 or 0
    elseif value == nil then
        val.kind = 0
    else
        return false
    end
    return true
end

local function unload()
    local kind = val.kind
    if kind == STRING then
        local text = ffi_string(val.text.ptr, val.text.len)
        return text
    end
    if kind == NUMBER then return val.number end
    if kind == BOOLEAN then return val.number ~= 0 end
    return nil
end

local function read(dict, key, stale)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    if get(dict, key, #key, stale, val) == 0 then return nil end
    if val.kind == LIST then return nil, "value is a list" end
    local flags = val.flags
    return unload(), flags ~= 0 and tonumber(flags) or nil
end

--- value, flags = DICT:get(key)
function _M.get(dict, key)
    local value, flags = read(pointer(dict), key, 0)
    if flags ~= nil then return value, flags end
    return value
end

--- value, flags, stale = DICT:get_stale(key)
function _M.get_stale(dict, key)
    local value, flags = read(pointer(dict), key, 1)
    if value == nil then return value, flags end
    return value, flags, val.stale ~= 0
end

local function write(dict, mode, key, value, exptime, flags)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    exptime = exptime or 0
    if exptime < 0 then error('bad "exptime" argument', 3) end
    if not load(value) then return nil, "bad value type" end
    if value == nil and mode ~= SET then return nil, "attempt to add or replace nil values" end
    val.flags = flags or 0
    if store(ptr, mode, key, #key, exptime, val) == 0 then
        return false, ffi_string(val.error), false
    end
    return true, nil, val.forcible ~= 0
end

--- success, err, forcible = DICT:set(key, value, exptime?, flags?)
function _M.set(dict, key, value, exptime, flags)
    local ok, err, forcible = write(dict, SET, key, value, exptime, flags)
    return ok, err, forcible
end

--- ok, err = DICT:safe_set(key, value, exptime?, flags?): never evicts.
function _M.safe_set(dict, key, value, exptime, flags)
    local ok, err, forcible = write(dict, SET + SAFE, key, value, exptime, flags)
    return ok, err, forcible
end

--- success, err, forcible = DICT:add(key, value, exptime?, flags?)
function _M.add(dict, key, value, exptime, flags)
    local ok, err, forcible = write(dict, ADD, key, value, exptime, flags)
    return ok, err, forcible
end

--- ok, err = DICT:safe_add(key, value, exptime?, flags?)
function _M.safe_add(dict, key, value, exptime, flags)
    local ok, err, forcible = write(dict, ADD + SAFE, key, value, exptime, flags)
    return ok, err, forcible
end

--- success, err, forcible = DICT:replace(key, value, exptime?, flags?)
function _M.replace(dict, key, value, exptime, flags)
    local ok, err, forcible = write(dict, REPLACE, key, value, exptime, flags)
    return ok, err, forcible
end

--- DICT:delete(key)
function _M.delete(dict, key)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    delete(ptr, key, #key)
    return true
end

--- newval, err, forcible = DICT:incr(key, value, init?, init_ttl?)
function _M.incr(dict, key, value, init, init_ttl)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    if type(value) ~= "number" then value = tonumber(value) end
    if not value then error("bad value argument", 2) end
    local has_init = 0
    if init ~= nil then
        init = tonumber(init)
        if not init then error("bad init arg: number expected, got " .. type(init), 2) end
        has_init = 1
    end
    if init_ttl ~= nil then
        init_ttl = tonumber(init_ttl)
        if not init_ttl or init_ttl < 0 then error('bad "init_ttl" argument', 2) end
        if has_init == 0 then error('must provide "init" when providing "init_ttl"', 2) end
    end
    if incr(ptr, key, #key, value, has_init, init or 0, init_ttl or 0, val) == 0 then
        return nil, ffi_string(val.error)
    end
    if has_init == 0 then return val.number end
    return val.number, nil, val.forcible ~= 0
end

local function push_at(dict, at, key, value)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    local kind = type(value)
    if kind ~= "string" and kind ~= "number" then return nil, "bad value type" end
    load(value)
    local n = push(ptr, at, key, #key, val)
    if n < 0 then return nil, ffi_string(val.error) end
    n = tonumber(n)
    return n
end

--- length, err = DICT:lpush(key, value)
function _M.lpush(dict, key, value)
    local n, err = push_at(dict, 0, key, value)
    return n, err
end

--- length, err = DICT:rpush(key, value)
function _M.rpush(dict, key, value)
    local n, err = push_at(dict, 1, key, value)
    return n, err
end

local function pop_at(dict, at, key)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    local rc = pop(ptr, at, key, #key, val)
    if rc == 0 then return nil end
    if rc < 0 then return nil, ffi_string(val.error) end
    return unload()
end

--- val, err = DICT:lpop(key)
function _M.lpop(dict, key)
    local value, err = pop_at(dict, 0, key)
    return value, err
end

--- val, err = DICT:rpop(key)
function _M.rpop(dict, key)
    local value, err = pop_at(dict, 1, key)
    return value, err
end

--- len, err = DICT:llen(key)
function _M.llen(dict, key)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    local n = llen(ptr, key, #key, val)
    if n < 0 then return nil, ffi_string(val.error) end
    n = tonumber(n)
    return n
end

--- ttl, err = DICT:ttl(key): seconds, 0 for ever.
function _M.ttl(dict, key)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    local left = ttl(ptr, key, #key)
    if left < 0 then return nil, "not found" end
    left = tonumber(left)
    return left
end

--- success, err = DICT:expire(key, exptime)
function _M.expire(dict, key, exptime)
    local ptr = pointer(dict)
    local err
    key, err = key_of(key)
    if not key then return nil, err end
    if not exptime then error('bad "exptime" argument', 2) end
    if exptime < 0 then error('bad "exptime" argument', 2) end
    if expire(ptr, key, #key, exptime) == 0 then return nil, "not found" end
    return true
end

--- DICT:flush_all()
function _M.flush_all(dict)
    flush_all(pointer(dict))
end

--- flushed = DICT:flush_expired(max_count?)
function _M.flush_expired(dict, max)
    return tonumber(flush_expired(pointer(dict), max or 0))
end

--- keys = DICT:get_keys(max_count?): 1024 by default, 0 for all.
function _M.get_keys(dict, max)
    pointer(dict)
    return keys_of(dict.name, max or 1024)
end

--- capacity_bytes = DICT:capacity()
function _M.capacity(dict)
    return tonumber(size(pointer(dict), 0))
end

--- free_bytes = DICT:free_space()
function _M.free_space(dict)
    return tonumber(size(pointer(dict), 1))
end

local function dict_of(name)
    if type(name) ~= "string" then return nil end
    local ptr = find(name, #name)
    if ptr == nil then return nil end
    return setmetatable({ ptr = ptr, name = name }, mt)
end

local shared = setmetatable({}, {
    __index = function(self, name)
        local dict = dict_of(name)
        if dict then rawset(self, name, dict) end
        return dict
    end,
})

for _, name in ipairs(names_of()) do
    shared[name] = dict_of(name)
end

return shared
