--- What stands before the keys of objects where plugins see them: `deployment.etcd.prefix`, and nothing where they are in a file, as
-- in APISIX. A string.

local deployment = require("apisix.core.config_local").local_conf().deployment or {}
local role = deployment["role_" .. (deployment.role or "traditional")] or {}
local is_file = role.config_provider == "yaml" or role.config_provider == "json"

local prefix = deployment.etcd and deployment.etcd.prefix or "/apisix"

return is_file and "" or (prefix:gsub("/+$", ""))
