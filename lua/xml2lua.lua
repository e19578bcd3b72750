--- `xml2lua`: XML to tables and back (xml2lua's README). With a handler: `xmlhandler.tree`, `xmlhandler.dom`, `xmlhandler.print`.
--
-- Names of entities that a DTD makes are not known: nothing outside of the text is read, and nothing grows.

local concat, error, find, gsub, ipairs, match, pairs, rep, sort, sub, tonumber, tostring, type =
    table.concat, error, string.find, string.gsub, ipairs, string.match, pairs, string.rep, table.sort, string.sub, tonumber,
    tostring, type

local _M = { _VERSION = "1.6-2" }

-- Elements inside of elements.
local MAX_DEPTH = 1000

local entities = { lt = "<", gt = ">", amp = "&", quot = '"', apos = "'" }

-- The character of a number, in UTF-8.
local function character(code)
    if not code or code > 0x10FFFF then return nil end
    local ok, text = pcall(require("lua-utf8").char, code)
    return ok and text or nil
end

local function unescape(text)
    if not find(text, "&", 1, true) then return text end
    return (gsub(text, "(&(#?x?)(%w+);)", function(whole, kind, name)
        if kind == "#" then return character(tonumber(name, 10)) or whole end
        if kind == "#x" then return character(tonumber(name, 16)) or whole end
        return entities[kind .. name] or whole
    end))
end

--- A text as XML has it: with `&`, `<`, `>`, `"` and `'` escaped.
function _M.escape(text)
    return (gsub(tostring(text), "[&<>\"']", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&apos;" }))
end

local Parser = {}
Parser.__index = Parser

local function fail(text, at)
    local _, lines = gsub(sub(text, 1, at), "\n", "")
    error("XML parse error at line " .. (lines + 1), 0)
end

-- Name and attributes of a tag's inside.
local function read_tag(inside)
    local name, rest = match(inside, "^([^%s/>=]+)(.*)$")
    if not name then return nil end
    local attrs, any = {}, false
    for key, _, value in rest:gmatch("([^%s=]+)%s*=%s*([\"'])(.-)%2") do
        attrs[key] = unescape(value)
        any = true
    end
    return { name = name, attrs = any and attrs or nil }
end

-- Where the tag that starts at `at` ends: quoted values may hold a bracket.
local function tag_end(text, at)
    while true do
        local place = find(text, "[>\"']", at)
        if not place then return nil end
        local sign = sub(text, place, place)
        if sign == ">" then return place end
        local close = find(text, sign, place + 1, true)
        if not close then return nil end
        at = close + 1
    end
end

function Parser:call(name, ...)
    local f = self.handler[name]
    if f then f(self.handler, ...) end
end

function Parser:give_text(raw)
    if self.options.stripWS ~= 0 and self.options.stripWS ~= false then
        raw = match(raw, "^%s*(.-)%s*$")
    end
    if raw ~= "" then self:call("text", self.options.expandEntities == false and raw or unescape(raw)) end
end

-- What starts with `<!` or `<?` at `at`; where to go on.
function Parser:special(text, at)
    local function ending(mark, from)
        local first, last = find(text, mark, from, true)
        if not first then fail(text, at) end
        return first, last
    end
    if sub(text, at, at + 3) == "<!--" then
        local first, last = ending("-->", at + 4)
        self:call("comment", sub(text, at + 4, first - 1))
        return last + 1
    elseif sub(text, at, at + 8) == "<![CDATA[" then
        local first, last = ending("]]>", at + 9)
        local data = sub(text, at + 9, first - 1)
        if self.handler.cdata then self:call("cdata", data) else self:call("text", data) end
        return last + 1
    elseif sub(text, at, at + 1) == "<?" then
        local first, last = ending("?>", at + 2)
        local tag = read_tag(sub(text, at + 2, first - 1)) or fail(text, at)
        if tag.name == "xml" then self:call("decl", tag) else self:call("pi", tag) end
        return last + 1
    end
    -- <!DOCTYPE name [ … ]>: its declarations are passed over.
    local open, close = find(text, "[", at, true), tag_end(text, at) or fail(text, at)
    if open and open < close then
        close = find(text, "]%s*>", open) or fail(text, at)
        close = find(text, ">", close, true)
    end
    self:call("dtd", { name = match(text, "^<!%s*DOCTYPE%s+([^%s>%[]+)", at) or "", value = sub(text, at, close) })
    return close + 1
end

--- Reads a text; the handler's methods are called on the way. Raises for a bad text.
-- @param text string @param parse_attributes boolean?: false: attributes are left out
function Parser:parse(text, parse_attributes)
    local open, at = {}, 1
    while true do
        local start = find(text, "<", at, true)
        self:give_text(sub(text, at, (start or 0) - 1))
        if not start then break end
        local sign = sub(text, start + 1, start + 1)
        if sign == "!" or sign == "?" then
            at = self:special(text, start)
        else
            local stop = tag_end(text, start) or fail(text, start)
            local inside = sub(text, start + 1, stop - 1)
            if sign == "/" then
                local name = match(inside, "^/%s*([^%s]+)%s*$")
                if not name or open[#open] ~= name then fail(text, start) end
                open[#open] = nil
                self:call("endtag", { name = name })
            else
                local tag = read_tag(inside) or fail(text, start)
                if parse_attributes == false then tag.attrs = nil end
                if #open >= MAX_DEPTH then error("XML is nested too deeply", 0) end
                self:call("starttag", tag)
                if sub(inside, -1) == "/" then
                    self:call("endtag", { name = tag.name })
                else
                    open[#open + 1] = tag.name
                end
            end
            at = stop + 1
        end
    end
    if #open > 0 then fail(text, #text) end
end

--- A parser that feeds a handler.
-- @param handler table: starttag, endtag, text, cdata, comment, pi, decl, dtd, each optional
-- @param options table?: stripWS (1), expandEntities (1)
function _M.parser(handler, options)
    if type(handler) ~= "table" then error("Handler must not be nil", 2) end
    return setmetatable({ handler = handler, options = options or {} }, Parser)
end

local function indented(level)
    return rep("  ", level)
end

--- A table as text for people.
function _M.toString(t, level)
    level = level or 0
    if type(t) ~= "table" then return tostring(t) end
    local lines = {}
    if level < 100 then
        for key, value in pairs(t) do
            lines[#lines + 1] = indented(level) .. tostring(key)
                .. (type(value) == "table" and "\n" .. _M.toString(value, level + 1) or "=" .. tostring(value))
        end
    end
    return concat(lines, "\n")
end

--- Writes `toString` to standard output of the log. @param t table
function _M.printable(t)
    print(_M.toString(t))
end

local function attributes_of(attrs)
    local names, parts = {}, {}
    for name in pairs(attrs or {}) do names[#names + 1] = name end
    sort(names, function(a, b) return tostring(a) < tostring(b) end)
    for i, name in ipairs(names) do parts[i] = (' %s="%s"'):format(name, _M.escape(attrs[name])) end
    return concat(parts)
end

local to_xml

local function element(name, value, level)
    local pad = indented(level)
    if type(value) ~= "table" then
        return ("%s<%s>%s</%s>\n"):format(pad, name, _M.escape(value), name)
    end
    local attrs = attributes_of(value._attr)
    if value[1] ~= nil then
        local plain = true
        for key in pairs(value) do
            if key ~= "_attr" and type(key) ~= "number" then plain = false end
        end
        if plain and value[2] == nil and type(value[1]) ~= "table" then
            return ("%s<%s%s>%s</%s>\n"):format(pad, name, attrs, _M.escape(value[1]), name)
        end
        local parts = {}
        for i, item in ipairs(value) do parts[i] = element(name, item, level) end
        return concat(parts)
    end
    local inner = to_xml(value, level + 1)
    if inner == "" then return ("%s<%s%s/>\n"):format(pad, name, attrs) end
    return ("%s<%s%s>\n%s%s</%s>\n"):format(pad, name, attrs, inner, pad, name)
end

function to_xml(t, level)
    if level > MAX_DEPTH then error("the table is nested too deeply", 0) end
    local names, parts = {}, {}
    for name in pairs(t) do
        if name ~= "_attr" then names[#names + 1] = name end
    end
    sort(names, function(a, b) return tostring(a) < tostring(b) end)
    for i, name in ipairs(names) do parts[i] = element(name, t[name], level) end
    return concat(parts)
end

--- A table as XML: fields are elements, `_attr` holds attributes, a list is an element again and again.
-- @param t table @param name string?: of the outermost element @return string
function _M.toXml(t, name, level)
    if name then return element(name, t, level or 0) end
    return to_xml(t, level or 0)
end

--- The text of a file. Not open to uploaded functions. @return string; raises when it cannot be read
function _M.loadFile(path)
    if require("moongate.chunk").sandboxed then error("files are not open to functions", 2) end
    local file, err = io.open(path, "rb")
    if not file then error(err, 2) end
    local text = file:read("*a")
    file:close()
    return text
end

return _M
