--- Configuration objects as items: `{ value = …, key = …, modifiedIndex = … }`, the same table as long as the object is.
local native = require("moongate.native").apisix
local prefix = require("moongate.keys")
local setmetatable, tostring = setmetatable, tostring

-- kind -> uid -> item: those in use.
local known = {}

--- The item of an object as the request's configuration has it; nil when there is none. `kind`: "services" and so on.
return function(kind, id)
    id = tostring(id)
    local uid = native.object_uid(kind, id)
    if uid == 0 then
        return nil
    end
    local items = known[kind]
    if not items then
        items = setmetatable({}, { __mode = "v" })
        known[kind] = items
    end
    local item = items[uid]
    if not item then
        local value, revision = native.object(kind, id)
        if value.id == nil then
            value.id = id
        end
        item = { key = prefix .. "/" .. kind .. "/" .. id, value = value, modifiedIndex = revision, clean_handlers = {} }
        items[uid] = item
    end
    return item
end
