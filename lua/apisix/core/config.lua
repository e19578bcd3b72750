--- `core.config`: objects that follow a directory of the gateway's configuration, whatever stores it.
--
-- `core.config.new("/my-plugin", { automatic = true })` gives an object whose `values` are the items of that directory: a kind of
-- resource (`/routes`: those that are served), a directory of the plugin's own that `core.etcd` fills, or a section of
-- conf/apisix.yaml. It is loaded when it is made and kept up to date from then on: one timer of the VM waits until another
-- version of the configuration is served, and looks at the keys that it changed. No request pays for it.
--
-- An item is `{ key, value, createdIndex, modifiedIndex, clean_handlers }`; `values` holds false where one has gone, so that
-- places stay (`core.config_util.iterate_values` passes them over), `values_hash` the places by name. `conf_version` grows by
-- one with each item that comes, changes or goes, `prev_index` is the latest revision among them.
--
-- All phases, but for `getkey`, which waits for the store.
local cjson = require("cjson.safe")
local config_local = require("apisix.core.config_local")
local config_util = require("apisix.core.config_util")
local log = require("apisix.core.log")
local schema = require("apisix.core.schema")
local native = require("moongate.native").config
require("moongate.chunk").refuse_in_sandbox("apisix.core.config")

local debug_traceback, ipairs, ngx, pairs, setmetatable, tostring, type, xpcall =
    debug.traceback, ipairs, ngx, pairs, setmetatable, tostring, type, xpcall

local _M = {
    local_conf = config_local.local_conf,
    clear_local_cache = config_local.clear_cache,
}

-- Objects that a VM follows; each is looked at with every change of the configuration.
local MAX_OBJECTS = 256
-- Items of a directory that are loaded when its object is made; more of them by a timer, which lets others run.
local MAX_AT_ONCE = 1000
-- Characters of a refused value that are logged. Of an object none: it may hold keys and passwords.
local MAX_SHOWN = 200
-- Items that the timer loads between two pauses: a few milliseconds.
local STRIDE = 100
-- Places of items that have gone before the array is made anew.
local MAX_HOLES = 100

-- key -> the object made last for it.
local created = {}
-- Those that are kept up to date.
local followed = {}

local function prefix()
    local deployment = config_local.local_conf().deployment
    local etcd = deployment and deployment.etcd
    return ((etcd and etcd.prefix or "/apisix"):gsub("/+$", ""))
end

local function call(what, f, ...)
    local ok, first, second = xpcall(f, debug_traceback, ...)
    if not ok then
        log.error("failed to run the ", what, " of a configuration object: ", first)
        return nil, tostring(first)
    end
    return first, second
end

local Object = {}
Object.__index = Object
Object.__tostring = function(self) return " apisix.core.config:" .. tostring(self.key) end

local function valid(self, full, value)
    if not self.single_item and type(value) ~= "table" then
        local shown = tostring(value):sub(1, MAX_SHOWN)
        log.error("invalid item data of [", full, "], val: ", shown, ", it should be an object")
        return false
    end
    local ok, err = true, nil
    if self.item_schema then
        ok, err = schema.check(self.item_schema, value)
    end
    if ok and self.checker then
        ok, err = call("checker", self.checker, value, full)
    end
    if not ok then
        log.error("failed to check item data of [", self.key, "] err:", tostring(err), " ,key: ", full)
    end
    return ok
end

local function make_item(self, key, name, text, created_at, modified)
    local value = cjson.decode(text)
    if value == nil then
        value = text
    end
    local full = prefix() .. key
    if type(value) == "table" and not self.single_item and value.id == nil then
        value.id = name
    end
    if not valid(self, full, value) then
        return nil
    end
    return { key = full, value = value, createdIndex = created_at, modifiedIndex = modified, clean_handlers = {} }
end

local function count_change(self, modified)
    self.conf_version = self.conf_version + 1
    if modified and modified > self.prev_index then
        self.prev_index = modified
    end
end

local function place(self, name, item)
    local at = self.values_hash[name]
    local old = at and self.values[at]
    at = at or #self.values + 1
    self.values[at] = item
    self.values_hash[name] = at
    count_change(self, item.modifiedIndex)
    if old then
        config_util.fire_all_clean_handlers(old)
    end
    if self.filter then
        call("filter", self.filter, item, old)
    end
end

local function close_holes(self)
    local values, hash = {}, {}
    for name, at in pairs(self.values_hash) do
        hash[at] = name
    end
    for at, item in ipairs(self.values) do
        if item then
            values[#values + 1] = item
            self.values_hash[hash[at]] = #values
        end
    end
    self.values, self.holes = values, 0
end

local function remove(self, name)
    local at = self.values_hash[name]
    if not at then
        return
    end
    local old = self.values[at]
    self.values[at], self.values_hash[name] = false, nil
    count_change(self)
    config_util.fire_all_clean_handlers(old)
    self.holes = self.holes + 1
    if self.holes > MAX_HOLES then
        close_holes(self)
    end
end

-- The name of an item in its directory.
local function name_of(self, key)
    return key == self.dir and key:match("[^/]*$") or key:sub(#self.dir + 2)
end

-- Whether a key of the directory is the object's: its own key for a single item, what is below for all others.
local function concerns(self, key)
    return (key == self.dir) == (self.single_item == true)
end

local function look_at(self, key)
    if not concerns(self, key) then
        return
    end
    local name = name_of(self, key)
    local text, created_at, modified = native.entry(key)
    if not text then
        return remove(self, name)
    end
    local at = self.values_hash[name]
    local old = at and self.values[at]
    if old and old.modifiedIndex == modified and old.createdIndex == created_at then
        return
    end
    local item = make_item(self, key, name, text, created_at, modified)
    if item then
        place(self, name, item)
    end
end

local function remove_absent(self, keys)
    local present = {}
    for _, key in ipairs(keys) do
        present[name_of(self, key)] = true
    end
    local absent = {}
    for name in pairs(self.values_hash) do
        if not present[name] then
            absent[#absent + 1] = name
        end
    end
    for _, name in ipairs(absent) do
        remove(self, name)
    end
end

-- Everything anew; `pause`, if any, is called between strides.
local function load_all(self, keys, version, pause)
    remove_absent(self, keys)
    for i, key in ipairs(keys) do
        if pause and i % STRIDE == 0 then
            pause()
        end
        look_at(self, key)
    end
    self.version = version
    self.need_reload = false
end

local function pause()
    ngx.sleep(0)
end

local function catch_up(self)
    local keys, version
    if self.version and not self.need_reload then
        keys, version = native.changed(self.dir, self.version)
    end
    if not keys then
        keys, version = native.keys(self.dir)
        return load_all(self, keys, version, pause)
    end
    for _, key in ipairs(keys) do
        look_at(self, key)
    end
    self.version = version
end

local function load_later(premature, object)
    if not premature and object.running then
        call("update", catch_up, object)
    end
end

local following = false

local function follow(premature)
    local version = not premature and 0 or nil
    while version do
        local now = native.wait(version)
        -- A copy: a filter may make objects or close them.
        for _, object in ipairs({ unpack(followed) }) do
            if now and object.running then
                call("update", catch_up, object)
            end
        end
        version = now
    end
    following = false
end

-- A VM that only checks plugins has no timers, and serves no request that could see an object grow old.
local function start_to_follow(object)
    followed[#followed + 1] = object
    log.info("waitdir key: ", prefix() .. object.dir, " from revision ", object.prev_index)
    if not following then
        following = ngx.timer.at(0, follow) and true or false
    end
end

local function make(dir, opts)
    return setmetatable({
        key = dir and prefix() .. dir,
        dir = dir,
        automatic = opts.automatic,
        single_item = opts.single_item,
        item_schema = opts.item_schema,
        checker = opts.checker,
        filter = opts.filter,
        values = {},
        values_hash = {},
        holes = 0,
        conf_version = 0,
        prev_index = 0,
        need_reload = true,
        running = true,
    }, Object)
end

--- An object for a directory.
-- @param key string?: `/routes`; nil: an object for `getkey` alone
-- @param opts table?: `automatic`: load it and keep it up to date; `single_item`: the key is an item itself (`/plugins`);
-- `item_schema`: JSON schema that a value must follow, defaults are filled; `checker(value, key)`: returns true, or false and why
-- not; `filter(item, old)`: called with each item that comes or changes. A value that is refused is logged, and the one before
-- it stays.
-- @return table; nil, err
function _M.new(key, opts)
    opts = opts or {}
    if key ~= nil and (type(key) ~= "string" or key:sub(1, 1) ~= "/") then
        return nil, "the key of a configuration object begins with a slash"
    end
    local object = make(key, opts)
    if not key or not opts.automatic then
        return object
    end
    if #followed >= MAX_OBJECTS then
        return nil, "more than " .. MAX_OBJECTS .. " configuration objects"
    end
    local keys, version = native.keys(key)
    if #keys <= MAX_AT_ONCE then
        load_all(object, keys, version)
    else
        -- One of its own: the one that follows may wait for a change already.
        ngx.timer.at(0, load_later, object)
    end
    created[key] = object
    start_to_follow(object)
    return object
end

-- Directories of APISIX that scripts ask for without having made an object.
local known = {}
for _, name in ipairs({ "routes", "services", "upstreams", "consumers", "consumer_groups", "plugin_configs", "global_rules",
    "plugin_metadata", "ssls", "protos", "secrets", "stream_routes" }) do
    known["/" .. name] = true
end

--- The object made last for a key; those of the kinds of resources are made on first use.
-- @param key string @return table; nil
function _M.fetch_created_obj(key)
    if not created[key] and known[key] then
        return _M.new(key, { automatic = true })
    end
    return created[key]
end

--- All objects by their key.
function _M.fetch_all_created_obj()
    return created
end

--- An item by its name. @return table; nil
function Object:get(name)
    local at = self.values_hash[tostring(name)]
    return at and self.values[at] or nil
end

--- Reads from the store, past the object; waits. A key that ends with a slash stands for its directory, which is there whatever
-- it holds: `res.body.count` is one more than its items.
-- @param key string: `/routes/1` @return table: `status`, `body.kvs`; nil, err
function Object:getkey(key)
    if not self.running then
        return nil, "stopped"
    end
    local client, start = require("apisix.core.etcd").new()
    local is_dir = key:sub(-1) == "/"
    local res, err = client[is_dir and "readdir" or "get"](client, start .. key)
    if not res then
        return nil, err
    end
    if is_dir then
        res.body.kvs = res.body.kvs or {}
        res.body.count = tostring(#res.body.kvs + 1)
    elseif not res.body.kvs then
        res.status = 404
    end
    return res
end

--- Sets `conf_version`, or counts it up: what caches key on.
function Object:upgrade_version(version)
    self.conf_version = version or self.conf_version + 1
end

--- Ends the object: it is kept up to date no longer.
function Object:close()
    self.running = false
    for i, object in ipairs(followed) do
        if object == self then
            table.remove(followed, i)
            break
        end
    end
    if created[self.dir] == self then
        created[self.dir] = nil
    end
end

--- Nothing is left to make ready.
function _M.init() return true end

--- Nothing is left to make ready.
function _M.init_worker() return true end

--- The version of the server that stores; waits. @return string; nil, err
function _M.server_version()
    local res, err = require("apisix.core.etcd").server_version()
    if not res then
        return nil, err
    end
    return res.body.etcdserver
end

-- `type`: "etcd" for a store that can be written to, embedded or not; "yaml" or "json" for a file.
return setmetatable(_M, {
    __index = function(self, name)
        if name ~= "type" then
            return nil
        end
        local deployment = config_local.local_conf().deployment or {}
        local role = deployment["role_" .. (deployment.role or "traditional")] or {}
        local provider = role.config_provider
        local value = (provider == "yaml" or provider == "json") and provider or "etcd"
        rawset(self, name, value)
        return value
    end,
})
