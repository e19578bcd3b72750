//! What a connection's requests say of their host, from one to the next: nearly all of them say the same.

use std::cell::RefCell;

use super::Headers;

/// A longer field is looked at each time: no name is as long (RFC 1035, 2.3.4), and a connection that is idle holds this.
const FIELD_MAX: usize = 255 + ":65535".len();

/// The Host field of the last request, with what it came to.
#[derive(Debug, Default)]
pub struct LastHost(RefCell<Known>);

#[derive(Debug, Default)]
struct Known {
    field: Vec<u8>,
    name: Vec<u8>,
    /// Empty until somebody has made them.
    forwarded: Headers,
}

impl LastHost {
    /// Appends the name in `field` to `into`, where it is known.
    pub fn name(&self, field: &[u8], into: &mut Vec<u8>) -> bool {
        let known = self.0.borrow();
        let same = known.is(field);
        if same {
            into.extend_from_slice(&known.name);
        }
        same
    }

    /// `field` is sound, and its host is `name`.
    pub fn remember(&self, field: &[u8], name: &[u8]) {
        if field.len() <= FIELD_MAX {
            let mut known = self.0.borrow_mut();
            known.forwarded.clear();
            known.field.clear();
            known.field.extend_from_slice(field);
            known.name.clear();
            known.name.extend_from_slice(name);
        }
    }

    /// Adds to `headers` what tells the node of the Host in it, where that is known.
    pub fn forward(&self, headers: &mut Headers) -> bool {
        let known = self.0.borrow();
        let made = !known.forwarded.is_empty() && headers.get("host").is_some_and(|field| known.is(field));
        if made {
            headers.append_block(&known.forwarded);
        }
        made
    }

    /// `fields` tell the node of `field`, and will on this connection.
    pub fn remember_forwarded<'a>(&self, field: &[u8], fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        let known = &mut *self.0.borrow_mut();
        if known.is(field) {
            known.forwarded.clear();
            fields.for_each(|(name, value)| known.forwarded.append(name, value));
        }
    }
}

impl Known {
    fn is(&self, field: &[u8]) -> bool {
        !field.is_empty() && self.field == field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_field_is_known_and_none_that_is_too_long() {
        let last = LastHost::default();
        let name = |field: &[u8]| {
            let mut name = Vec::new();
            last.name(field, &mut name).then_some(name)
        };
        assert_eq!(name(b""), None);
        last.remember(b"A.example:81", b"a.example");
        assert_eq!(name(b"A.example:81").as_deref(), Some(&b"a.example"[..]));
        assert_eq!((name(b"a.example:81"), name(b"")), (None, None));
        let long = vec![b'a'; FIELD_MAX];
        last.remember(&long, &long);
        assert_eq!((name(&long), name(b"A.example:81")), (Some(long.clone()), None));
        let longer = vec![b'a'; FIELD_MAX + 1];
        last.remember(&longer, &longer);
        assert_eq!((name(&longer), name(&long)), (None, Some(long)));
    }

    #[test]
    fn fields_for_the_node_go_with_their_host() {
        let last = LastHost::default();
        let forwarded = |host: &str| {
            let mut headers = Headers::new();
            headers.append("Host", host);
            last.forward(&mut headers).then(|| headers.get("x").map(<[u8]>::to_vec)).flatten()
        };
        let remember = |field: &[u8]| last.remember_forwarded(field, [(&b"X"[..], field)].into_iter());
        last.remember(b"a", b"a");
        assert_eq!(forwarded("a"), None);
        remember(b"b");
        assert_eq!((forwarded("a"), forwarded("b")), (None, None), "not the last one");
        remember(b"a");
        assert_eq!(forwarded("a").as_deref(), Some(&b"a"[..]));
        assert!(!last.forward(&mut Headers::new()), "no host at all");
        last.remember(b"b", b"b");
        assert_eq!((forwarded("a"), forwarded("b")), (None, None));
    }
}
