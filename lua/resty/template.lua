--- `resty.template`: HTML templates that are compiled to Lua (lua-resty-template's README).
--
-- `{{escaped}}`, `{*as it is*}`, `{% code %}`, `{(file)}` and `{(file, context)}`, `{[file by expression]}`, `{# comment #}`,
-- `{-block-} … {-block-}` into `blocks.block`, `{-raw-}` or `{-verbatim-}` for text as it is; `\{` before a tag keeps it. A template is
-- code: in uploaded functions it has what they have, and reads no files.

local chunk = require("moongate.chunk")

local concat, error, find, gsub, setmetatable, sub, tostring, type =
    table.concat, error, string.find, string.gsub, setmetatable, string.sub, tostring, type

local _M = { _VERSION = "2.0", cache = {} }

-- Compiled templates that are kept; the texts of templates come from the program, so more is a mistake.
local MAX_CACHED = 1000
-- Templates inside of templates.
local MAX_DEPTH = 100

local caching, cached, depth = true, 0, 0

local entities = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;", ["/"] = "&#47;" }
local code_entities = { ["{"] = "&#123;", ["}"] = "&#125;" }

--- The text of a value: nothing for nil and ngx.null, what a function returns.
function _M.output(value)
    if value == nil or value == ngx.null then return "" end
    if type(value) == "function" then return _M.output(value()) end
    return tostring(value)
end
local output = _M.output

--- The text of a value with HTML's signs escaped. @param code boolean?: braces too
function _M.escape(value, code)
    if type(value) == "function" then return _M.escape(value(), code) end
    local text = output(value)
    if type(value) == "number" or type(value) == "boolean" then return text end
    text = gsub(text, "[&<>\"'/]", entities)
    if code then text = gsub(text, "[{}]", code_entities) end
    return text
end

local function read_file(path)
    if chunk.sandboxed then return nil end
    local file = io.open(path, "rb")
    if not file then return nil end
    local text = file:read("*a")
    file:close()
    return text
end

-- Where files lie: $template_root, the document root, the gateway's prefix.
local function file_text(view)
    local ok, root = pcall(function() return ngx.var.template_root or ngx.var.document_root end)
    root = _M.root or ok and root ~= "" and root or nil
    return root and read_file(root .. "/" .. view) or read_file(view) or read_file(ngx.config.prefix() .. view)
end

--- The text of a template file; the name itself when there is none. @param plain boolean?: it is a text already
function _M.load_file(view, plain)
    if plain then return view end
    local text = file_text(view)
    if not text then error("no such template: " .. view, 2) end
    return text
end

function _M.load_string(view)
    return view
end

--- How `compile`, `render` and includes find a view; may be replaced by an own function(view, plain).
function _M.load(view, plain)
    if plain or type(view) ~= "string" then return view end
    if #view > 255 or find(view, "[\n{]") then return view end
    return file_text(view) or view
end

--- Switches the cache of compiled templates. @param on boolean? @return whether it is on
function _M.caching(on)
    if on ~= nil then
        caching = on == true
        if not caching then _M.cache, cached = {}, 0 end
    end
    return caching
end

local closing = { ["{"] = "}}", ["*"] = "*}", ["%"] = "%}", ["("] = ")}", ["["] = "]}", ["#"] = "#}", ["-"] = "-}" }

local function quote(text)
    return ("%q"):format(text):gsub("\\\n", "\\n"):gsub("\r", "\\r"):gsub("%z", "\\0")
end

-- Behind one line end, that a tag on a line of its own leaves behind.
local function skip_line_end(text, at)
    local _, last = find(text, "^\r?\n", at)
    return last and last + 1 or at
end

local function include_call(body)
    local name, context = body:match("^%s*(.-)%s*,%s*(.+)$")
    name = name or body:match("^%s*(.-)%s*$")
    if not find(name, "^[\"']") then name = quote(name) end
    return "___[#___+1] = include(" .. name .. (context and ", " .. context or "") .. ")\n"
end

-- The Lua of each tag; its result, and whether a line end behind it goes too.
local makers = {
    ["{"] = function(body) return "___[#___+1] = template.escape(" .. body .. ")\n" end,
    ["*"] = function(body) return "___[#___+1] = template.output(" .. body .. ")\n" end,
    ["%"] = function(body) return body .. "\n", true end,
    ["("] = include_call,
    ["["] = function(body) return "___[#___+1] = include(" .. body .. ")\n" end,
    ["#"] = function() return "", true end,
}

local Parser = {}
Parser.__index = Parser

function Parser:text(text)
    if text ~= "" then self.out[#self.out + 1] = "___[#___+1] = " .. quote(text) .. "\n" end
end

-- `{-name-}` at `first`, its inside from `from` on. Where to go on.
function Parser:block(view, from, name)
    local _, close = find(view, "-}", from, true)
    close = close + 1
    local mark = "{-" .. name .. "-}"
    local stop, last = find(view, mark, close, true)
    if not stop then return nil end
    local inside = sub(view, skip_line_end(view, close), stop - 1)
    if name == "raw" or name == "verbatim" then
        self:text(inside)
    else
        local out = self.out
        out[#out + 1] = "blocks[" .. quote(name) .. "] = include(" .. quote(inside) .. ", context, true)\n"
    end
    return skip_line_end(view, last + 1)
end

function Parser:run(view)
    local at, copied = 1, 1
    while true do
        local first = find(view, "{[{*%%(%[#%-]", at)
        if not first then break end
        local kind = sub(view, first + 1, first + 1)
        local stop = find(view, closing[kind], first + 2, true)
        if not stop then
            at = first + 2
        elseif first > 1 and sub(view, first - 1, first - 1) == "\\" and first - 1 >= copied then
            self:text(sub(view, copied, first - 2))
            copied, at = first, stop + 2
        elseif kind == "-" then
            local name = sub(view, first + 2, stop - 1)
            local before = sub(view, copied, first - 1)
            local count = #self.out
            self:text(before)
            local next_at = find(name, "^%w[%w_]*$") and self:block(view, first, name)
            if next_at then
                copied, at = next_at, next_at
            else
                for i = #self.out, count + 1, -1 do self.out[i] = nil end
                at = first + 2
            end
        else
            self:text(sub(view, copied, first - 1))
            local code, swallow = makers[kind](sub(view, first + 2, stop - 1))
            self.out[#self.out + 1] = code
            copied = swallow and skip_line_end(view, stop + 2) or stop + 2
            at = copied
        end
    end
    self:text(sub(view, copied))
end

-- `echo`, `include`, `blocks` and `layout` are for the template to use or not.
local head = [[return function()
local ___, blocks, layout = {}, context.blocks or {}
local function echo(...) for i = 1, select("#", ...) do ___[#___+1] = tostring((select(i, ...))) end end
local function include(v, c, p) return template.include(v, c or context, p, blocks) end
]]
local tail = [[
return layout and include(layout, setmetatable({ view = concat(___), blocks = blocks }, { __index = context })) or concat(___)
end
]]

--- The Lua source of a template: a chunk that returns a function.
-- @param plain boolean?: the view is a text, not a file's name @param load function?: in place of `load`
function _M.parse(view, plain, load)
    local parser = setmetatable({ out = { head } }, Parser)
    parser:run((load or _M.load)(view, plain))
    parser.out[#parser.out + 1] = tail
    return concat(parser.out)
end

-- What the code of a template cannot do without, whatever the context has.
local own = { template = _M, select = select, tostring = tostring, setmetatable = setmetatable, concat = concat }

-- What a template sees: its context, then the caller's globals.
local function environment(context)
    local globals = chunk.globals()
    return setmetatable({}, {
        __index = function(_, name)
            if name == "context" then return context end
            if own[name] then return own[name] end
            local value = context[name]
            if value == nil then value = globals[name] end
            return value
        end,
        __newindex = function(_, name, value)
            context[name] = value
        end,
    })
end

local function compiled(view, plain, load)
    local factory, err = chunk.load(_M.parse(view, plain, load), "=template")
    if not factory then error(err, 0) end
    return function(context)
        -- A closure of its own for each call, as one may run inside of another.
        return setfenv(factory(), environment(context or {}))()
    end
end

local function compile(view, key, plain, loader)
    if type(view) ~= "string" then error("bad argument #1 to 'compile' (string expected, got " .. type(view) .. ")", 3) end
    if key == "no-cache" or not caching then return compiled(view, plain, loader), false end
    key = (key or view) .. (plain and "\0plain" or "") .. (loader and tostring(loader) or "")
    local f = _M.cache[key]
    if f then return f, true end
    f = compiled(view, plain, loader)
    if cached >= MAX_CACHED then _M.cache, cached = {}, 0 end
    _M.cache[key], cached = f, cached + 1
    return f, false
end

--- Compiles a template. Raises for a bad one.
-- @param view string: a file's name or a text @param cache_key string?: "no-cache" for none
-- @param plain boolean?: it is a text in any case
-- @return function(context): string; whether it was in the cache
function _M.compile(view, cache_key, plain)
    return compile(view, cache_key, plain)
end

function _M.compile_string(view, cache_key)
    return compile(view, cache_key, true)
end

function _M.compile_file(view, cache_key)
    return compile(view, cache_key, nil, _M.load_file)
end

--- What a template includes. For templates.
function _M.include(view, context, plain, blocks)
    if depth >= MAX_DEPTH then error("templates include each other too deeply", 0) end
    depth = depth + 1
    local inner = setmetatable({ blocks = blocks }, { __index = context })
    local ok, result = pcall(compile(view, nil, plain), inner)
    depth = depth - 1
    if not ok then error(result, 0) end
    return result
end

--- A template's text with a context's values. @return string
function _M.process(view, context, cache_key, plain)
    return compile(view, cache_key, plain)(context)
end

function _M.process_string(view, context, cache_key)
    return compile(view, cache_key, true)(context)
end

function _M.process_file(view, context, cache_key)
    return compile(view, cache_key, nil, _M.load_file)(context)
end

--- Where `render` writes: the response's body. May be replaced.
function _M.print(text)
    return ngx.print(text)
end

--- `process` into the response's body.
function _M.render(view, context, cache_key, plain)
    return _M.print(_M.process(view, context, cache_key, plain))
end

function _M.render_string(view, context, cache_key)
    return _M.print(_M.process_string(view, context, cache_key))
end

function _M.render_file(view, context, cache_key)
    return _M.print(_M.process_file(view, context, cache_key))
end

--- The Lua source of a template, to be kept. @return string
function _M.precompile(view, _, _)
    return _M.parse(view)
end
_M.precompile_string = function(view) return _M.parse(view, true) end

--- A view to fill and render: its fields are the context.
-- @param view string: a file's name or a text
-- @param layout string or view?: gets the result as `view`
-- @return table with render(self, context?) and process(self, context?); tostring gives the text
function _M.new(view, layout)
    if type(view) ~= "string" then error("bad argument #1 to 'new' (string expected, got " .. type(view) .. ")", 2) end
    local function process(self, context)
        local all = setmetatable(context or {}, { __index = self })
        local text = _M.process(view, all)
        if not layout then return text end
        if type(layout) == "table" then
            layout.view = text
            return layout:process(layout)
        end
        return _M.process(layout, setmetatable({ view = text, blocks = rawget(all, "blocks") }, { __index = all }))
    end
    local object = {
        process = function(self, context)
            return process(self, context ~= self and context or nil)
        end,
        render = function(self, context)
            return _M.print(process(self, context))
        end,
    }
    return setmetatable(object, { __tostring = function(self) return process(self) end })
end

return _M
