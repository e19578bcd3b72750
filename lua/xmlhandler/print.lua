--- `xmlhandler.print`: a line of the log for each piece of a text (xml2lua's README).

local _M = {}

--- A handler.
function _M.new()
    return setmetatable({}, { __index = _M })
end

for kind, label in pairs({ starttag = "Start", endtag = "End", pi = "PI", decl = "XML Decl", dtd = "DTD" }) do
    _M[kind] = function(_, tag)
        print(label .. ": " .. tag.name)
        for name, value in pairs(tag.attrs or {}) do print(" + " .. name .. "='" .. value .. "'") end
    end
end

for kind, label in pairs({ text = "Text", cdata = "CDATA", comment = "Comment" }) do
    _M[kind] = function(_, text)
        print(label .. ": " .. text)
    end
end

return setmetatable(_M, { __call = _M.new })
