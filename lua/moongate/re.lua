--- ngx.re.*: match, find, gmatch, sub, gsub over PCRE2 (src/lua/host/regex.rs).
--
-- Compiled expressions are kept per VM, keyed by options and pattern; when a cache is full it starts anew, and what was
-- in it is freed by the collector.

local ffi = require("ffi")
local fast = require("moongate.native").fast

local error, tonumber, tostring, type = error, tonumber, tostring, type
local byte, concat, find, format, sub = string.byte, table.concat, string.find, string.format, string.sub
local floor, max, min = math.floor, math.max, math.min
local new_table = require("table.new")

ffi.cdef([[
typedef struct {
    const size_t *ovector;
    uint32_t groups, names, name_size, dfa;
    const unsigned char *name_table;
} moongate_regex;
]])

local regex_ptr = ffi.typeof("moongate_regex *")
local compile, exec, free = fast.regex_compile, fast.regex_exec, fast.regex_free

-- As lua_regex_cache_max_entries in APISIX.
local CACHE_ENTRIES = 8192
-- Longest error text: PCRE2's own plus the pattern.
local ERROR_BYTES = 4096

local error_buffer = ffi.new("char[?]", ERROR_BYTES)
local error_length = ffi.new("size_t[1]")

local _M = {}

local cache, cached = {}, 0

-- {ptr = moongate_regex *, groups = n, names = {{name, group}, ...} or nil, dup = D was given}
local function compile_new(regex, options)
    local bad = find(options, "[^adDijJmosuUx]")
    if bad then
        error(format('unknown flag "%s" (flags "%s")', sub(options, bad, bad), options), 4)
    end
    error_length[0] = ERROR_BYTES
    local raw = compile(regex, #regex, options, #options, error_buffer, error_length)
    if raw == nil then
        return nil, ffi.string(error_buffer, error_length[0])
    end
    local ptr = ffi.gc(ffi.cast(regex_ptr, raw), free)
    local re = { ptr = ptr, groups = ptr.groups, dup = find(options, "D", 1, true) ~= nil }
    if ptr.names > 0 then
        local names = {}
        for i = 0, ptr.names - 1 do
            local entry = ptr.name_table + i * ptr.name_size
            names[i + 1] = { ffi.string(entry + 2), entry[0] * 256 + entry[1] }
        end
        re.names = names
    end
    return re
end

local function first_look(regex, options)
    local by_options = cache[options]
    local re, err = compile_new(regex, options)
    if not re then return nil, err end
    if cached >= CACHE_ENTRIES then
        cache, cached, by_options = {}, 0, nil
    end
    if not by_options then
        by_options = {}
        cache[options] = by_options
    end
    by_options[regex] = re
    cached = cached + 1
    return re
end

-- A trace that was recorded with the first look would leave by a side exit ever after.
jit.off(first_look)

local function compiled(regex, options)
    options = options or ""
    local by_options = cache[options]
    local re = by_options and by_options[regex]
    if re then return re end
    return first_look(regex, options)
end

local function exec_error(rc)
    return "pcre_exec() failed: " .. rc
end

local function group(ovector, subject, n)
    local from, to = tonumber(ovector[2 * n]), tonumber(ovector[2 * n + 1])
    -- A group that took no part holds the largest offset.
    if from > #subject then return false end
    local part = sub(subject, from + 1, to)
    return part
end

local function captures(re, subject, set, into)
    local ovector, groups = re.ptr.ovector, re.groups
    -- The first ones by themselves: a loop in here keeps the caller's trace from being compiled.
    into[0] = group(ovector, subject, 0)
    if groups > 0 then into[1] = set > 1 and group(ovector, subject, 1) end
    if groups > 1 then into[2] = set > 2 and group(ovector, subject, 2) end
    if groups > 2 then
        for n = 3, groups do
            into[n] = n < set and group(ovector, subject, n)
        end
    end
    local names = re.names
    if names then
        for i = 1, #names do
            local name, value = names[i][1], into[names[i][2]]
            if not re.dup then
                into[name] = value
            elseif value then
                -- A name of several groups, or of one that took no part, has no `false`.
                local list = into[name]
                if not list then
                    into[name] = { value }
                else
                    list[#list + 1] = value
                end
            end
        end
    end
    return into
end

local function text(value, n)
    local kind = type(value)
    if kind == "string" then return value end
    if kind == "number" then return tostring(value) end
    error(format("bad argument #%d to '?' (string expected, got %s)", n, kind == "nil" and "nil" or kind), 3)
end

-- What is searched may be anything that has a text: a variable that is nil is the text "nil", as with lua-resty-core.
local function subject_text(value)
    if type(value) == "string" then return value end
    return tostring(value)
end

local function start(ctx, subject)
    if not ctx then return 0 end
    local pos = ctx.pos
    if not pos then return 0 end
    if pos <= 0 then return 0 end
    if pos > #subject + 1 then return nil end
    return pos - 1
end

--- captures, err = ngx.re.match(subject, regex, options?, ctx?, res_table?)
function _M.match(subject, regex, options, ctx, res)
    subject, regex = subject_text(subject), text(regex, 2)
    local re, err = compiled(regex, options)
    if not re then return nil, err end
    local from = start(ctx, subject)
    if not from then return nil end
    local rc = exec(re.ptr, subject, #subject, from)
    if rc < 0 then
        if rc == -1 then return nil end
        return nil, exec_error(rc)
    end
    if ctx then ctx.pos = tonumber(re.ptr.ovector[1]) + 1 end
    return captures(re, subject, rc, res or new_table(re.groups, re.names and #re.names or 0))
end

--- from, to, err = ngx.re.find(subject, regex, options?, ctx?, nth?)
function _M.find(subject, regex, options, ctx, nth)
    subject, regex = subject_text(subject), text(regex, 2)
    local re, err = compiled(regex, options)
    if not re then return nil, nil, err end
    local from = start(ctx, subject)
    if not from then return nil end
    local ptr = re.ptr
    local rc = exec(ptr, subject, #subject, from)
    if rc < 0 then
        if rc == -1 then return nil end
        return nil, nil, exec_error(rc)
    end
    local ovector = ptr.ovector
    if ctx then ctx.pos = tonumber(ovector[1]) + 1 end
    nth = nth or 0
    if nth < 0 or nth > re.groups then return nil, nil, "nth out of bound" end
    local first, last = tonumber(ovector[2 * nth]), tonumber(ovector[2 * nth + 1])
    if nth >= rc or first > #subject then return nil, nil end
    return first + 1, last
end

--- iterator, err = ngx.re.gmatch(subject, regex, options?)
function _M.gmatch(subject, regex, options)
    subject, regex = subject_text(subject), text(regex, 2)
    local re, err = compiled(regex, options)
    if not re then return nil, err end
    local pos = 0
    return function()
        if pos > #subject then return nil end
        local rc = exec(re.ptr, subject, #subject, pos)
        if rc < 0 then
            pos = #subject + 1
            if rc == -1 then return nil end
            return nil, exec_error(rc)
        end
        local first, last = tonumber(re.ptr.ovector[0]), tonumber(re.ptr.ovector[1])
        pos = last > first and last or last + 1
        return captures(re, subject, rc, new_table(re.groups, re.names and #re.names or 0))
    end
end

-- A replacement template as a list of texts and group numbers. Bounded cache, as for expressions.
local templates, template_count = {}, 0

-- What is wrong with the variable at `dollar`.
local function template_error(replace, dollar)
    local name = string.match(replace, "^{?([%a_][%w_]*)", dollar + 1)
    if name then
        return format('attempt to use named capturing variable "%s" (named captures not supported yet)', name)
    end
    local open = string.match(replace, "^{(%d+)", dollar + 1)
    if open then
        return format('the closing bracket in "%s" variable is missing', open)
    end
    return format('lua script: invalid capturing variable name found in "%s"', replace)
end

local function parse_template(replace)
    local parts, at = {}, 1
    while true do
        local dollar = find(replace, "$", at, true)
        if not dollar then break end
        if dollar > at then parts[#parts + 1] = sub(replace, at, dollar - 1) end
        local _, stop, digits = find(replace, "^(%d+)", dollar + 1)
        if not stop then
            _, stop, digits = find(replace, "^{(%d+)}", dollar + 1)
        end
        if stop then
            parts[#parts + 1] = tonumber(digits)
            at = stop + 1
        elseif byte(replace, dollar + 1) == 36 then
            parts[#parts + 1] = "$"
            at = dollar + 2
        else
            ngx.log(ngx.ERR, template_error(replace, dollar))
            return nil, "failed to compile the replacement template"
        end
    end
    if at <= #replace then parts[#parts + 1] = sub(replace, at) end
    return parts
end

local function template(replace)
    local parts = templates[replace]
    if parts then return parts end
    local err
    parts, err = parse_template(replace)
    if not parts then return nil, err end
    if template_count >= CACHE_ENTRIES then
        templates, template_count = {}, 0
    end
    templates[replace], template_count = parts, template_count + 1
    return parts
end

local function fill(parts, re, subject, set, out, n)
    local ovector = re.ptr.ovector
    for i = 1, #parts do
        local part = parts[i]
        if type(part) == "number" then
            part = part < set and group(ovector, subject, part) or ""
        end
        n = n + 1
        out[n] = part
    end
    return n
end

local function called(replace, re, subject, rc)
    local value = replace(captures(re, subject, rc, {}))
    local kind = type(value)
    if kind ~= "string" and kind ~= "number" then
        error("bad argument #3 to '?' (string or number expected to be returned by the replace function, got "
              .. kind .. ")", 4)
    end
    return tostring(value)
end

-- Bytes of the UTF-8 character at `pos` (from 0): what an empty match steps over.
local function char_len(subject, pos, utf8)
    if not utf8 then return 1 end
    local b = byte(subject, pos + 1) or 0
    if b >= 0xF0 then return 4 elseif b >= 0xE0 then return 3 elseif b >= 0xC0 then return 2 end
    return 1
end

local function substitute(subject, regex, replace, options, global)
    subject, regex = subject_text(subject), text(regex, 2)
    local re, err = compiled(regex, options)
    if not re then return nil, nil, err end
    local kind, parts = type(replace), nil
    if kind == "number" then
        replace, kind = tostring(replace), "string"
    end
    if kind == "string" then
        parts, err = template(replace)
        if not parts then return nil, nil, err end
    elseif kind ~= "function" then
        error("bad argument #3 to '?' (string, number, or function expected, got " .. kind .. ")", 3)
    end
    local utf8 = options and find(options, "[uU]")
    local out, n, count, pos, copied = {}, 0, 0, 0, 0
    while pos <= #subject do
        local rc = exec(re.ptr, subject, #subject, pos)
        if rc < 0 then
            if rc ~= -1 then return nil, nil, exec_error(rc) end
            break
        end
        local first, last = tonumber(re.ptr.ovector[0]), tonumber(re.ptr.ovector[1])
        count = count + 1
        if first > copied then
            n = n + 1
            out[n] = sub(subject, copied + 1, first)
        end
        if parts then
            n = fill(parts, re, subject, rc, out, n)
        else
            n = n + 1
            out[n] = called(replace, re, subject, rc)
        end
        copied = last
        pos = last > first and last or last + char_len(subject, last, utf8)
        if not global then break end
    end
    if count == 0 then return subject, 0 end
    if copied < #subject then out[n + 1] = sub(subject, copied + 1) end
    return concat(out), count
end

--- newstr, n, err = ngx.re.sub(subject, regex, replace, options?)
function _M.sub(subject, regex, replace, options)
    local s, n, err = substitute(subject, regex, replace, options, false)
    if err ~= nil then return s, n, err end
    return s, n
end

--- newstr, n, err = ngx.re.gsub(subject, regex, replace, options?)
function _M.gsub(subject, regex, replace, options)
    local s, n, err = substitute(subject, regex, replace, options, true)
    if err ~= nil then return s, n, err end
    return s, n
end

--- res, err = require("ngx.re").split(subject, regex, options?, ctx?, max?, res?)
function _M.split(subject, regex, options, ctx, limit, res)
    local re, err = compiled(regex, options)
    if not re then return nil, err end
    local len = #subject
    local pos = max((ctx and ctx.pos or 1) - 1, 0)
    if not res then res = {} end
    local n = 0
    local function put(value)
        n = n + 1
        res[n] = value
    end
    limit = limit and floor(limit) or 0
    if pos > len then
        res[1] = nil
        return res
    end
    local copied, splits, search = pos, 1, pos
    while limit <= 0 or splits < limit do
        local rc = exec(re.ptr, subject, len, min(search, len))
        if rc < 0 then
            if rc ~= -1 then return nil, exec_error(rc) end
            break
        end
        local ovector = re.ptr.ovector
        local first, last = tonumber(ovector[0]), tonumber(ovector[1])
        if last == first then
            -- An empty match splits between characters, never at the ends.
            if first >= len then break end
            if first == copied then
                search = first + 1
                rc = exec(re.ptr, subject, len, search)
                if rc < 0 or search >= len then break end
                first, last = tonumber(ovector[0]), tonumber(ovector[1])
                if last == first and first >= len then break end
            end
        end
        put(sub(subject, copied + 1, first))
        for i = 1, re.groups do
            local value = i < rc and group(ovector, subject, i)
            if value then put(value) end
        end
        copied, search = last, last
        splits = splits + 1
    end
    put(sub(subject, copied + 1))
    res[n + 1] = nil
    if ctx then ctx.pos = copied + 1 end
    return res
end

--- `require("ngx.re").opt("jit_stack_size", bytes)`: accepted and without effect, as the matcher's own bounds hold.
function _M.opt(name, value)
    if name ~= "jit_stack_size" then error("unrecognized option name", 2) end
    if type(value) ~= "number" then error("bad argument #2 to 'opt' (number expected, got " .. type(value) .. ")", 2) end
end


return _M
