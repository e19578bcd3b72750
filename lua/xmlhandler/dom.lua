--- `xmlhandler.dom`: a tree of nodes `{ _type, _name, _attr, _text, _parent, _children }` (xml2lua's README).

local _M = {}
local mt = { __index = _M }

--- A handler; its `root` is the outermost element when the parser is done.
function _M.new()
    local top = { _type = "ROOT", _children = {} }
    return setmetatable({ options = { commentNode = 1, piNode = 1, dtdNode = 1, declNode = 1 }, top = top, current = top }, mt)
end

local function add(self, node)
    local children = self.current._children
    children[#children + 1] = node
    return node
end

function _M:starttag(tag)
    local parent = self.current._type ~= "ROOT" and self.current or nil
    local node = add(self, { _type = "ELEMENT", _name = tag.name, _attr = tag.attrs, _children = {}, _parent = parent })
    if not self.root then self.root = node end
    self.current = node
end

function _M:endtag()
    self.current = self.current._parent or self.top
end

function _M:text(text)
    add(self, { _type = "TEXT", _text = text })
end

_M.cdata = _M.text

function _M:comment(text)
    if self.options.commentNode then add(self, { _type = "COMMENT", _text = text }) end
end

function _M:pi(tag)
    if self.options.piNode then add(self, { _type = "PI", _name = tag.name, _attr = tag.attrs }) end
end

function _M:decl(tag)
    if self.options.declNode then add(self, { _type = "DECL", _name = tag.name, _attr = tag.attrs }) end
end

function _M:dtd(tag)
    if self.options.dtdNode then add(self, { _type = "DTD", _name = tag.name, _text = tag.value }) end
end

return setmetatable(_M, { __call = _M.new })
