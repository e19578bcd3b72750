--- Reads a multipart/form-data request body piece by piece, with the public interface of lua-resty-upload (its README,
-- v0.11); RFC 2046, 5.1, and RFC 7578.
--
-- Needs ngx.req.socket(). Nothing is gathered: lines and pieces are bounded by what `new` was told.

local min, max = math.min, math.max
local pairs, select, setmetatable, tonumber, type = pairs, select, setmetatable, tonumber, type
local find, match, sub = string.find, string.match, string.sub
local req = ngx.req

-- Bytes of a piece, and of a line of a part's head, when the caller does not say.
local CHUNK_SIZE, MAX_LINE_SIZE = 4096, 512
-- Bytes of a piece at most.
local MAX_CHUNK_SIZE = 16 * 1024 * 1024

local _M = { _VERSION = "0.11" }
local mt = { __index = _M }

-- The boundary of a Content-Type's value; nil when it names none.
local function boundary_of(value)
    if type(value) == "table" then value = value[1] end
    if type(value) ~= "string" then return nil end
    -- Names of parameters are the same in any case, values are not.
    local at = select(2, find(value:lower(), ";%s*boundary="))
    if not at then return nil end
    return match(value, '^"([^"]+)"', at + 1) or match(value, '^([^",;%s]+)', at + 1)
end

--- new(chunk_size = 4096, max_line_size = 512, preserve_body = false): a reader of the body of the request that runs,
-- or nil and why not. `preserve_body` keeps in memory what is read, as the body that goes to the upstream.
function _M.new(_, chunk_size, max_line_size, preserve_body)
    local boundary = boundary_of(req.get_headers()["content-type"])
    if not boundary then return nil, "no boundary defined in Content-Type" end
    local sock, err = req.socket()
    if not sock then return nil, err end
    local self = {
        sock = sock, boundary = boundary, state = "preamble",
        size = max(1, min(tonumber(chunk_size) or CHUNK_SIZE, MAX_CHUNK_SIZE)),
        line_size = max(1, min(tonumber(max_line_size) or MAX_LINE_SIZE, MAX_CHUNK_SIZE)),
        preserve = preserve_body and true or false,
    }
    for name, pattern in pairs({ first = "--" .. boundary, next = "\r\n--" .. boundary, line = "\r\n" }) do
        self[name], err = sock:receiveuntil(pattern)
        if not self[name] then return nil, err end
    end
    if self.preserve then req.init_body() end
    return setmetatable(self, mt)
end

--- Milliseconds for each read.
function _M.set_timeout(self, timeout)
    return self.sock:settimeout(timeout)
end

local function keep(self, data)
    if self.preserve and data ~= "" then req.append_body(data) end
end

-- A line of at most `line_size` bytes; nil and what went wrong.
local function read_line(self)
    local line, err = self.line(self.line_size)
    if not line and err then return nil, err end
    if line then
        -- At the end of the line this says so, without waiting.
        local more, more_err = self.line(1)
        if more_err then return nil, more_err end
        if more then return nil, "line too long: " .. line .. more .. "..." end
    end
    line = line or ""
    keep(self, line .. "\r\n")
    return line
end

-- Drops what follows the last boundary.
local function read_rest(self)
    local sock, size = self.sock, self.size
    while true do
        local data, err, partial = sock:receive(size)
        keep(self, data or partial or "")
        if not data then
            if err == "closed" then return true end
            return nil, err
        end
    end
end

-- What follows a boundary: true when it begins a part, false when it was the last; nil and what went wrong.
local function read_boundary_end(self)
    local mark, err = self.sock:receive(2)
    if not mark then return nil, err end
    keep(self, mark)
    if mark == "\r\n" then return true end
    if mark == "--" then
        local ok
        ok, err = read_rest(self)
        if not ok then return nil, err end
        if self.preserve then req.finish_body() end
        return false
    end
    -- White space may follow a boundary; a text that only begins like it must not stand in a part.
    local line
    line, err = read_line(self)
    if not line then return nil, err end
    if find(mark .. line, "[^ \t\r]") then return nil, "invalid boundary line" end
    return true
end

local readers = {}

-- Behind a boundary: how it goes on.
local function begin(self)
    local part, err = read_boundary_end(self)
    if part == nil then return nil, nil, err end
    self.state = part and "header" or "eof"
    return self:read()
end

function readers.preamble(self)
    local tail = ""
    while true do
        local data, err = self.first(self.size)
        if err then return nil, nil, err end
        if not data then break end
        keep(self, data)
        tail = sub(tail .. data, -2)
    end
    if tail ~= "" and tail ~= "\r\n" then return nil, nil, "invalid boundary line" end
    keep(self, "--" .. self.boundary)
    return begin(self)
end

function readers.header(self)
    local line, err = read_line(self)
    if not line then return nil, nil, err end
    if line == "" then
        self.state = "body"
        return self:read()
    end
    local key, value = match(line, "^([^:%s]+)%s*:%s*(.-)%s*$")
    if not key then return "header", line end
    return "header", { key, value, line }
end

function readers.body(self)
    local data, err = self.next(self.size)
    -- A boundary right behind the head, or behind a whole piece, comes as an empty one.
    if data == "" then
        data, err = self.next(self.size)
    end
    if err then return nil, nil, err end
    if data then
        keep(self, data)
        return "body", data
    end
    keep(self, "\r\n--" .. self.boundary)
    self.state = "boundary"
    return "part_end"
end

readers.boundary = begin

function readers.eof()
    return "eof"
end

function readers.failed(self)
    return nil, nil, self.err
end

--- The next piece: "header", { key, value, line } (the bare line where it is no field); "body", data; "part_end"; "eof",
-- again and again. nil, nil and what went wrong, from then on.
function _M.read(self)
    local kind, data, err = readers[self.state](self)
    if not kind then self.state, self.err = "failed", err end
    return kind, data, err
end

return _M
