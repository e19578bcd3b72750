//! `vars` expressions.

/// A compiled expression.
#[derive(Debug)]
pub struct Expr;
