--- `prometheus`: metrics of plugins' own (nginx-lua-prometheus' README). They are counted in the process: what every worker adds is one
-- number, and it outlives a reload of plugins. Nothing waits but `collect` and `metric_data`. Mistakes (another number of labels, a
-- falling counter, a metric too many) are lines of error.log and count in `nginx_metric_errors_total`; they never raise.
local native = require("moongate.native").metrics
local setmetatable, tostring, type, unpack = setmetatable, tostring, type, unpack
local gmatch = string.gmatch

local _M = { _VERSION = "0.20240525" }

-- Seconds: what a histogram has when nobody says.
local DEFAULT_BUCKETS = { 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 10 }

local function complain(err)
    ngx.log(ngx.ERR, "prometheus: ", err)
end

-- Label values as texts, whatever they are.
local function texts(values)
    local n = values and #values or 0
    local plain = true
    for i = 1, n do plain = plain and type(values[i]) == "string" end
    if plain then return values or {}, n end
    local out = {}
    for i = 1, n do out[i] = tostring(values[i]) end
    return out, n
end

local function change(metric, what, value, label_values)
    if type(value) ~= "number" then return complain(metric.name .. ": the value is no number") end
    local values, n = texts(label_values)
    local ok, err = native.change(metric.number, what, value, unpack(values, 1, n))
    if not ok then complain(err) end
end

-- Class of a kind of metric.
local function class(methods)
    --- Forgets the series with these label values.
    function methods:del(label_values) change(self, "remove", 0, label_values) end
    --- Forgets all series.
    function methods:reset() native.reset(self.number) end
    return { __index = methods }
end

local kinds = {
    counter = class({
        --- @param value number from 0: 1 by default @param label_values array, in the order of the labels' names
        inc = function(self, value, label_values) change(self, "inc", value or 1, label_values) end,
    }),
    gauge = class({
        inc = function(self, value, label_values) change(self, "inc", value or 1, label_values) end,
        set = function(self, value, label_values) change(self, "set", value, label_values) end,
    }),
    histogram = class({
        observe = function(self, value, label_values) change(self, "observe", value, label_values) end,
    }),
}

local Prometheus = {}
local mt = { __index = Prometheus }

local function define(self, kind, name, help, labels, buckets)
    if type(name) ~= "string" then
        complain("the name of a metric is no text")
        return nil
    end
    local number, err = native.define(self.page, kind, self.prefix .. name, tostring(help or ""), labels or {}, buckets or {})
    if not number then
        complain(err)
        return nil
    end
    return setmetatable({ name = name, number = number }, kinds[kind])
end

--- A counter. @param name string @param help string? @param labels array? of names @return counter: `inc(value?, label_values?)`,
-- `del(label_values)`, `reset()`; nil when it cannot be. The same name gives the same counter; with other labels it starts again.
function Prometheus:counter(name, help, labels)
    return define(self, "counter", name, help, labels)
end

--- A gauge: `set(value, label_values?)`, `inc(value?, label_values?)`, `del(label_values)`, `reset()`.
function Prometheus:gauge(name, help, labels)
    return define(self, "gauge", name, help, labels)
end

--- A histogram: `observe(value, label_values?)`, `del(label_values)`, `reset()`. @param buckets array? of upper bounds, ascending
function Prometheus:histogram(name, help, labels, buckets)
    return define(self, "histogram", name, help, labels, buckets or DEFAULT_BUCKETS)
end

local function page_of(self)
    if self.page == "" then return require("moongate.native").apisix.scrape() end
    return native.page(self.page)
end

--- The page as an array of lines. Waits; before the head of a response.
function Prometheus:metric_data()
    local lines = {}
    for line in gmatch(page_of(self), "[^\n]+") do lines[#lines + 1] = line .. "\n" end
    return lines
end

--- Answers the request with the page. Waits.
function Prometheus:collect()
    ngx.header.content_type = "text/plain"
    ngx.print(page_of(self))
end

--- A page of metrics. @param dict string: the page's name; everywhere the same one for the same name. The dictionary of that name is not
-- used @param options string | table?: what all names begin with, or `{ prefix = … }` @return its metrics' maker. All phases.
function _M.init(dict, options)
    local prefix = type(options) == "table" and options.prefix or type(options) == "string" and options or ""
    return setmetatable({ page = "dict:" .. tostring(dict), prefix = prefix }, mt)
end

--- The gateway's own page, whose names get `metric_prefix` (`apisix_`) by themselves.
function _M.own()
    return setmetatable({ page = "", prefix = "" }, mt)
end

return _M
