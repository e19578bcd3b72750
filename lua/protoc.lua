--- `protoc`: .proto sources into `pb` (lua-protobuf's README). The compiler is native (src/lua/host/pb.rs).
--
-- `google/protobuf/*.proto` are known. Files are not open to uploaded functions.

local native = require("moongate.native").pb
local chunk = require("moongate.chunk")
local pb = require("pb")

local assert, error, ipairs, setmetatable, tostring, type = assert, error, ipairs, setmetatable, tostring, type

-- Files that one source may import, in all.
local MAX_IMPORTS = 1000

local _M = {}
-- Apart from the module: what an instance leads to is not what others require.
local mt = { __index = _M }

--- A compiler with its own paths and sources.
function _M.new()
    return setmetatable({ paths = {}, sources = {}, loaded = {} }, mt)
end

local default = _M.new()

local function itself(self)
    return self == _M and default or self
end

--- Forgets what was loaded. @return the module
function _M.reload()
    default = _M.new()
    pb.clear()
    return _M
end

--- Where imports are looked for, beside what was loaded.
function _M:addpath(path)
    local paths = itself(self).paths
    paths[#paths + 1] = path
end

local function read(path)
    if chunk.sandboxed then return nil, "files are not open to functions" end
    local file, err = io.open(path, "rb")
    if not file then return nil, err end
    local text = file:read("*a")
    file:close()
    return text
end

local function found(self, name)
    if self.sources[name] then return self.sources[name] end
    for _, path in ipairs(self.paths) do
        local text = read(path .. "/" .. name)
        if text then return text end
    end
    return #self.paths == 0 and read(name) or nil
end

-- The names of the files that a source imports.
local function imports_of(text)
    local names = {}
    text = text:gsub("/%*.-%*/", " "):gsub("//[^\n]*", "")
    for name in text:gmatch("import%s+[%a%s]-[\"']([^\"'\n]+)[\"']%s*;") do names[#names + 1] = name end
    return names
end

local function gather(self, name, text)
    local sources, queue, at = { [name] = text }, { name }, 1
    while queue[at] do
        for _, import in ipairs(imports_of(sources[queue[at]])) do
            if not sources[import] and not import:find("^google/protobuf/") then
                if #queue > MAX_IMPORTS then error("too many imports", 0) end
                local imported = found(self, import)
                local unknown = self.unknown_import
                if not imported and type(unknown) == "function" then imported = unknown(self, import) end
                if type(imported) ~= "string" then error("module load error: " .. import, 0) end
                sources[import], queue[#queue + 1] = imported, import
            end
        end
        at = at + 1
    end
    return sources
end

--- The descriptor of a source. Raises for a bad one. @param name string?: of the file, for imports and messages
-- @return bytes: a FileDescriptorSet
function _M:compile(text, name)
    self = itself(self)
    name = name or "<input>.proto"
    local sources = gather(self, name, text)
    local bytes, err = native.compile(name, sources, true)
    if not bytes then error(err, 0) end
    self.sources[name] = text
    self.loaded[name] = true
    return bytes
end

--- Compiles a source and takes its types in. Raises for a bad one. @return true, length
function _M:load(text, name)
    local ok, result = pb.load(_M.compile(self, text, name))
    if not ok then error(result, 0) end
    return ok, result
end

--- @param path string: tried as it is, then on the paths @return bytes
function _M:compilefile(path)
    self = itself(self)
    local text, err = read(path)
    return self:compile(assert(text or found(self, path), err or "no such file: " .. tostring(path)), path)
end

--- As `load`, of a file.
function _M:loadfile(path)
    local ok, result = pb.load(_M.compilefile(self, path))
    if not ok then error(result, 0) end
    return ok, result
end

return _M
