--- JSON Schema: `generate_validator(schema)` gives `function(data) -> true | false, err` that fills defaults in place.

local native = require("moongate.native").jsonschema
local check = native.check

return {
    generate_validator = function(schema, _)
        local compiled = native.compile(schema)
        return function(data)
            return check(compiled, data)
        end
    end,
}
