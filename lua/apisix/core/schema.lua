--- `core.schema`: JSON Schema checks with default filling. All phases; never waits.
local jsonschema = require("jsonschema")
local setmetatable = setmetatable
local tostring = tostring
local pcall = pcall

local _M = {
    TYPE_CONSUMER = 1,
    TYPE_METADATA = 2,
}

-- Keyed by the schema table itself; an entry goes with its schema.
local validators = setmetatable({}, { __mode = "k" })

local function validator_of(schema)
    local validator = validators[schema]
    if not validator then
        local ok, made = pcall(jsonschema.generate_validator, schema)
        if not ok then
            return nil, tostring(made)
        end
        validator = made
        validators[schema] = validator
    end
    return validator
end

--- Checks `data` and fills its defaults in place: `true`, or `false` and the reason.
function _M.check(schema, data)
    local validator, err = validator_of(schema)
    if not validator then
        return false, err
    end
    return validator(data)
end

--- Whether `schema` itself is a schema: `true`, or `false` and the reason.
function _M.valid(schema)
    local validator, err = validator_of(schema)
    if not validator then
        return false, err
    end
    return true
end

return setmetatable(_M, {
    __index = function(_, name)
        return require("apisix.schema_def")[name]
    end,
})
