--- `apisix.plugin`: the loaded plugins, their attributes and metadata.
local native = require("moongate.native").apisix
local config_version = require("moongate.native").fast.config_version
local config_local = require("apisix.core.config_local")

local _M = { init_plugins_syncer = function() end }

--- Every loaded plugin's module, by descending priority. The same table until plugins are reloaded.
function _M.plugins()
    return require("moongate.plugins").list()
end

--- One loaded plugin's module, or nil.
function _M.get(name)
    return require("moongate.plugins").get(name)
end

--- `plugin_attr.<name>` of config.yaml, or nil.
function _M.plugin_attr(name)
    local attrs = config_local.local_conf().plugin_attr
    return attrs and attrs[name]
end

-- name -> { uid, metadata, version }; one entry per plugin.
local metadata_of = {}

local function load_metadata(name)
    local value, revision = native.metadata(name)
    local loaded = value and _M.get(name)
    if loaded and loaded.check_schema then
        -- Fills the defaults; what does not hold was refused when it was written.
        loaded.check_schema(value, require("apisix.core.schema").TYPE_METADATA)
    end
    return value and { value = value, modifiedIndex = revision }
end

--- `/plugin_metadata/<name>` as `{ value = …, modifiedIndex = … }`, or nil. The same table until it changes.
function _M.plugin_metadata(name)
    local version = config_version()
    local known = metadata_of[name]
    if known and known.version == version then
        return known.metadata
    end
    -- Something changed, not often this.
    local uid = native.metadata_uid(name)
    if uid == 0 and not known and not _M.get(name) then
        -- No plugin's name: one entry per plugin is the bound.
        return nil
    end
    if not known or known.uid ~= uid then
        known = { uid = uid, metadata = uid ~= 0 and load_metadata(name) or nil }
        metadata_of[name] = known
    end
    known.version = version
    return known.metadata
end

--- The version of the conf under which the plugin runs: changes whenever the conf may have.
function _M.conf_version(conf)
    local parent = conf._meta and conf._meta.parent
    return parent and parent.resource_version
end

--- Whether a plugin of that name is loaded and `conf` passes its check.
function _M.check_schema(plugins_conf)
    for name, conf in pairs(plugins_conf) do
        local loaded = _M.get(name)
        if not loaded then
            return false, "unknown plugin [" .. name .. "]"
        end
        if loaded.check_schema then
            local ok, err = loaded.check_schema(conf)
            if not ok then
                return false, "failed to check the configuration of plugin " .. name .. " err: " .. err
            end
        end
    end
    return true
end

return _M
