//! nginx's and APISIX's variables by name.

/// A variable, parsed once where it is written (access log format, `vars`, chash key, Lua).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Var {
    Custom(Box<str>),
}
