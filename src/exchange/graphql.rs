//! GraphQL requests, as far as routes ask about them: `$graphql_operation`, `$graphql_name`, `$graphql_root_fields`.
//!
//! Pure: the text of a document in (GraphQL specification, October 2021, section 2), what its first operation is out. The whole of
//! the document must be sound; what its names mean to a schema nobody here knows.

/// How deep selections and values may nest: queries of people end long before, and the parser calls itself.
const MAX_DEPTH: usize = 128;

/// What a document's first operation is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// `query`, `mutation` or `subscription`.
    pub kind: Box<str>,
    /// Empty for an anonymous one.
    pub name: Box<str>,
    /// The names of its top-level fields, joined by commas.
    pub root_fields: Box<str>,
    /// The document holds more operations.
    pub others: bool,
}

/// Where a document is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// From 1.
    pub line: usize,
}

/// Reads a document.
pub fn parse(text: &str) -> Result<Operation, SyntaxError> {
    let mut p = Parser { text, at: 0, token: Token::End, depth: 0 };
    p.parse().map_err(|Broken| SyntaxError { line: p.line() })
}

struct Broken;

type Parsed<T = ()> = Result<T, Broken>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Name(&'a str),
    /// A number or a string.
    Literal,
    Punctuator(u8),
    Spread,
    End,
}

struct Parser<'a> {
    text: &'a str,
    /// Behind `token`.
    at: usize,
    token: Token<'a>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn parse(&mut self) -> Parsed<Operation> {
        self.advance()?;
        let mut first: Option<Operation> = None;
        while self.token != Token::End {
            match (self.definition()?, &mut first) {
                (Some(_), Some(first)) => first.others = true,
                (Some(operation), none) => *none = Some(operation),
                (None, _) => {}
            }
        }
        first.ok_or(Broken)
    }

    /// An operation, or `None` for a fragment.
    fn definition(&mut self) -> Parsed<Option<Operation>> {
        let kind = match self.token {
            Token::Punctuator(b'{') => "query",
            Token::Name(kind @ ("query" | "mutation" | "subscription")) => kind,
            Token::Name("fragment") => return self.fragment().map(|()| None),
            _ => return Err(Broken),
        };
        let mut name = "";
        if self.token != Token::Punctuator(b'{') {
            self.advance()?;
            if let Token::Name(own) = self.token {
                name = own;
                self.advance()?;
            }
            if self.token == Token::Punctuator(b'(') {
                self.variables()?;
            }
            self.directives()?;
        }
        let fields = self.selections()?;
        Ok(Some(Operation {
            kind: kind.into(),
            name: name.into(),
            root_fields: fields.join(",").into(),
            others: false,
        }))
    }

    fn fragment(&mut self) -> Parsed {
        self.advance()?;
        if self.name()? == "on" || self.name()? != "on" {
            return Err(Broken);
        }
        self.name()?;
        self.directives()?;
        self.selections().map(drop)
    }

    /// `($a: [Int!]! = [1] @d, …)`
    fn variables(&mut self) -> Parsed {
        self.expect(b'(')?;
        while !self.take(b')')? {
            self.expect(b'$')?;
            self.name()?;
            self.expect(b':')?;
            self.type_of()?;
            if self.take(b'=')? {
                self.value()?;
            }
            self.directives()?;
        }
        Ok(())
    }

    fn type_of(&mut self) -> Parsed {
        let mut lists = 0;
        while self.take(b'[')? {
            lists += 1;
        }
        self.name()?;
        self.take(b'!')?;
        for _ in 0..lists {
            self.expect(b']')?;
            self.take(b'!')?;
        }
        Ok(())
    }

    fn directives(&mut self) -> Parsed {
        while self.take(b'@')? {
            self.name()?;
            self.arguments()?;
        }
        Ok(())
    }

    fn arguments(&mut self) -> Parsed {
        if !self.take(b'(')? {
            return Ok(());
        }
        while !self.take(b')')? {
            self.name()?;
            self.expect(b':')?;
            self.value()?;
        }
        Ok(())
    }

    fn value(&mut self) -> Parsed {
        self.deeper(|p| match p.token {
            Token::Name(_) | Token::Literal => p.advance(),
            Token::Punctuator(b'$') => {
                p.advance()?;
                p.name().map(drop)
            }
            Token::Punctuator(b'[') => {
                p.advance()?;
                while !p.take(b']')? {
                    p.value()?;
                }
                Ok(())
            }
            Token::Punctuator(b'{') => {
                p.advance()?;
                while !p.take(b'}')? {
                    p.name()?;
                    p.expect(b':')?;
                    p.value()?;
                }
                Ok(())
            }
            _ => Err(Broken),
        })
    }

    /// `{ a b: c(x: 1) { … } ...F }`: the names of its fields, not of their aliases.
    fn selections(&mut self) -> Parsed<Vec<&'a str>> {
        self.deeper(|p| {
            let mut fields = Vec::new();
            p.expect(b'{')?;
            // One at least: an empty set of selections is no document (GraphQL, section 2.4).
            loop {
                match p.token {
                    Token::Spread => p.spread()?,
                    _ => fields.push(p.field()?),
                }
                if p.take(b'}')? {
                    return Ok(fields);
                }
            }
        })
    }

    fn field(&mut self) -> Parsed<&'a str> {
        let mut name = self.name()?;
        if self.take(b':')? {
            name = self.name()?;
        }
        self.arguments()?;
        self.directives()?;
        if self.token == Token::Punctuator(b'{') {
            self.selections()?;
        }
        Ok(name)
    }

    fn spread(&mut self) -> Parsed {
        self.advance()?;
        match self.token {
            Token::Name("on") => {
                self.advance()?;
                self.name()?;
            }
            Token::Name(_) => {
                self.advance()?;
                return self.directives();
            }
            _ => {}
        }
        self.directives()?;
        self.selections().map(drop)
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_DEPTH {
            return Err(Broken);
        }
        self.depth += 1;
        let parsed = inner(self);
        self.depth -= 1;
        parsed
    }

    fn name(&mut self) -> Parsed<&'a str> {
        let Token::Name(name) = self.token else { return Err(Broken) };
        self.advance()?;
        Ok(name)
    }

    fn expect(&mut self, punctuator: u8) -> Parsed {
        if self.take(punctuator)? { Ok(()) } else { Err(Broken) }
    }

    fn take(&mut self, punctuator: u8) -> Parsed<bool> {
        let there = self.token == Token::Punctuator(punctuator);
        if there {
            self.advance()?;
        }
        Ok(there)
    }

    fn advance(&mut self) -> Parsed {
        self.skip_ignored();
        let rest = &self.text.as_bytes()[self.at..];
        let (token, len) = match rest {
            [] => (Token::End, 0),
            [b'.', b'.', b'.', ..] => (Token::Spread, 3),
            [b'"', ..] => (Token::Literal, string(rest).ok_or(Broken)?),
            [b'!' | b'$' | b'&' | b'(' | b')' | b':' | b'=' | b'@' | b'[' | b']' | b'{' | b'}' | b'|', ..] => {
                (Token::Punctuator(rest[0]), 1)
            }
            [b, ..] if b.is_ascii_alphabetic() || *b == b'_' => {
                let len = rest.iter().position(|b| !b.is_ascii_alphanumeric() && *b != b'_').unwrap_or(rest.len());
                (Token::Name(&self.text[self.at..self.at + len]), len)
            }
            [b, ..] if b.is_ascii_digit() || *b == b'-' => (Token::Literal, number(rest)),
            _ => return Err(Broken),
        };
        self.token = token;
        self.at += len;
        Ok(())
    }

    /// White space, commas, comments and a byte order mark.
    fn skip_ignored(&mut self) {
        loop {
            let rest = &self.text[self.at..];
            let kept = rest.trim_start_matches([' ', '\t', '\n', '\r', ',', '\u{feff}']);
            self.at += rest.len() - kept.len();
            if !kept.starts_with('#') {
                return;
            }
            self.at += kept.find(['\n', '\r']).unwrap_or(kept.len());
        }
    }

    fn line(&self) -> usize {
        1 + self.text.as_bytes()[..self.at].iter().filter(|b| **b == b'\n').count()
    }
}

/// The length of a string that begins here, quotes included.
fn string(text: &[u8]) -> Option<usize> {
    let block = text.starts_with(b"\"\"\"");
    let quote: &[u8] = if block { b"\"\"\"" } else { b"\"" };
    let mut at = quote.len();
    loop {
        match text.get(at..)? {
            rest if rest.starts_with(quote) => return Some(at + quote.len()),
            [b'\\', b'"', b'"', b'"', ..] if block => at += 4,
            [b'\\', _, ..] if !block => at += 2,
            [b'\n' | b'\r', ..] if !block => return None,
            [_, ..] => at += 1,
            [] => return None,
        }
    }
}

fn number(text: &[u8]) -> usize {
    let belongs = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
    text.iter().position(|b| !belongs(b)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(text: &str) -> (String, String, String, bool) {
        let found = parse(text).unwrap_or_else(|e| panic!("{text}: line {}", e.line));
        (found.kind.into(), found.name.into(), found.root_fields.into(), found.others)
    }

    #[test]
    fn operations_are_read() {
        let cases = [
            ("{a}", "query", "", "a", false),
            ("query { owner { name } repo { created } }", "query", "", "owner,repo", false),
            ("query q @d(x: 1) { a: b(x: [1, -2.5e3, $v, ON]) c }", "query", "q", "b,c", false),
            (
                "mutation m($a: [Int!]! = [1] @d, $b: T = {x: \"}\", y: {}}) { f(a: $a) { ... on T { g } ...F ... @d { h } } }",
                "mutation",
                "m",
                "f",
                false,
            ),
            (
                "# c {\n\u{feff}subscription s{a}fragment F on T{b(t:\"\"\"x \\\"\"\" {\n\"\"\")}",
                "subscription",
                "s",
                "a",
                false,
            ),
            ("query a{b} mutation c{d}", "query", "a", "b", true),
            ("query a{...F}fragment F on T{b}", "query", "a", "", false),
        ];
        for (text, kind, name, fields, others) in cases {
            assert_eq!(first(text), (kind.into(), name.into(), fields.into(), others), "{text}");
        }
    }

    #[test]
    fn what_is_no_document_is_refused_with_its_line() {
        for (text, line) in [
            ("", 1),
            ("AA", 1),
            ("query {\n  a\n", 3),
            ("{}", 1),
            ("{a\n{}}", 2),
            ("query {}}", 1),
            ("{a(x:)}", 1),
            ("{a(x: \"\n\")}", 1),
            ("query a($: T) {b}", 1),
            ("fragment on on T {a}", 1),
            ("fragment F on T {a}", 1),
            ("{a\n}\n%", 3),
            ("\u{e9}{a}", 1),
        ] {
            assert_eq!(parse(text), Err(SyntaxError { line }), "{text}");
        }
    }

    #[test]
    fn nesting_ends_at_its_bound() {
        let nested = |n: usize| format!("{}{}", "{a".repeat(n), "}".repeat(n));
        assert!(parse(&nested(MAX_DEPTH)).is_ok());
        assert!(parse(&nested(MAX_DEPTH + 1)).is_err());
        let values = |n: usize| format!("{{a(x: {}1{})}}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&values(MAX_DEPTH - 2)).is_ok());
        assert!(parse(&values(1_000_000)).is_err());
    }
}
