--- `lyaml`: YAML (lyaml's documentation). A document's null is `lyaml.null`, which is `ngx.null`.

local native = require("moongate.native").yaml

local error, select, type = error, select, type

local _M = { _VERSION = "6.2.8", null = ngx.null }

--- Reads the first document. Raises for what is no YAML.
-- @param text string @param options table?: `all = true` for an array of all documents (or `true` itself, the older way)
-- @return value; nil for an empty text
function _M.load(text, options)
    if type(text) ~= "string" then error("bad argument #1 to 'load' (string expected, got " .. type(text) .. ")", 2) end
    local documents, n = native.load(text)
    if not documents then error(n, 2) end
    -- The parser takes an empty text for one null.
    if n == 1 and documents[1] == _M.null and text:find("^%s*$") then documents = {} end
    if options == true or type(options) == "table" and options.all then return documents end
    return documents[1]
end

--- Writes documents. Raises for what YAML cannot hold.
-- @param documents table: an array of values @return string: each from `---` on, `...` at the end
function _M.dump(documents)
    if type(documents) ~= "table" then
        error("bad argument #1 to 'dump' (table expected, got " .. type(documents) .. ")", 2)
    end
    local parts = {}
    for i = 1, #documents do
        local text, err = native.dump(documents[i])
        if not text then error(err, 2) end
        local short = type(documents[i]) ~= "table" or next(documents[i]) == nil
        parts[#parts + 1] = "---" .. (short and " " or "\n") .. text
    end
    parts[#parts + 1] = "...\n"
    return table.concat(parts)
end

--- Whether a value is a document's null. With no argument: `lyaml.null` itself.
function _M.isnull(...)
    if select("#", ...) == 0 then return _M.null end
    return (...) == _M.null
end

return _M
