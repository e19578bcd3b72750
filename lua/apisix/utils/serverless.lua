--- The two serverless plugins: the user's Lua functions in a phase of the request.
--
-- A function's source evaluates to a function, or is the body of one itself. Sources compile once per conf.
local core = require("apisix.core")
local load_text = require("moongate.chunk").load
local ipairs, pcall, setmetatable, tostring, type = ipairs, pcall, setmetatable, tostring, type


-- conf -> its functions; goes with the conf.
local compiled = setmetatable({}, { __mode = "k" })

-- The function that `source` returns. A chunk that returns none is refused: APISIX runs such a chunk once at load, which
-- would hide a mistake.
local function compile(source, chunk_name)
    local chunk, err = load_text(source, chunk_name)
    if not chunk then
        return nil, "failed to loadstring: " .. err
    end
    local ok, made = pcall(chunk)
    if not ok then
        return nil, "pcall error: " .. tostring(made)
    end
    if type(made) ~= "function" then
        return nil, "only accept Lua function, the input code type is " .. type(made)
    end
    return made
end

local function functions_of(conf, name)
    local functions = compiled[conf]
    if functions then
        return functions
    end
    functions = {}
    for i, source in ipairs(conf.functions) do
        local made, err = compile(source, ("=%s(function %d)"):format(name, i))
        if not made then
            core.log.error(err)
            return nil, err
        end
        functions[i] = made
    end
    compiled[conf] = functions
    return functions
end

local function run(conf, ctx, name)
    local functions = functions_of(conf, name)
    if not functions then
        return 500
    end
    for i = 1, #functions do
        -- The name under which lines of error.log know it, as with APISIX.
        local func = functions[i]
        local code, body = func(conf, ctx)
        if code or body then
            return code, body
        end
    end
end

--- The plugin `name` with that priority.
return function(name, priority)
    local _M = {
        version = 0.1,
        priority = priority,
        name = name,
        schema = core.schema.of_plugin(name).schema,
    }

    function _M.check_schema(conf)
        local ok, err = core.schema.check(_M.schema, conf)
        if not ok then
            return false, err
        end
        for i, source in ipairs(conf.functions) do
            local made
            made, err = compile(source, ("=%s(function %d)"):format(name, i))
            if not made then
                return false, err
            end
        end
        return true
    end

    local function run_functions(conf, ctx)
        return run(conf, ctx, name)
    end

    for _, phase in ipairs({ "rewrite", "access", "before_proxy", "header_filter", "body_filter", "log" }) do
        _M[phase] = run_functions
    end

    function _M.idle_in(conf, phase)
        return conf.phase ~= phase
    end

    return _M
end
