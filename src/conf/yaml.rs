//! The bound on what aliases of a YAML document come to.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess, VariantAccess, Visitor,
};

/// What a document with aliases may come to, written out: bytes of its texts, and one for each value. A document without any may
/// be as long as its reader takes.
const MAX_EXPANDED: usize = 64 << 20;

/// Refuses a document whose aliases make it too large; also what is no YAML, when it has anchors.
pub(super) fn bound_aliases(text: &str) -> Result<(), String> {
    if !text.contains('&') {
        return Ok(());
    }
    let mut left = MAX_EXPANDED.max(text.len());
    Count(&mut left).deserialize(serde_norway::Deserializer::from_str(text)).map_err(|e| e.to_string())
}

/// Walks a document, aliases followed, and keeps nothing of it.
struct Count<'a>(&'a mut usize);

impl Count<'_> {
    fn take<E: Error>(self, size: usize) -> Result<(), E> {
        let left = self.0.checked_sub(size.saturating_add(1));
        *self.0 = left.ok_or_else(|| E::custom(format!("its aliases make it larger than {MAX_EXPANDED} bytes")))?;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Count<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.take(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.take(0)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_none<E: Error>(self) -> Result<(), E> {
        self.take(0)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.take(text.len())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Count(self.0))?.is_some() {}
        self.take(0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<(), A::Error> {
        while pairs.next_key_seed(Count(self.0))?.is_some() {
            pairs.next_value_seed(Count(self.0))?;
        }
        self.take(0)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let (IgnoredAny, value) = tagged.variant()?;
        value.newtype_variant_seed(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(text: &str) -> Result<Value, String> {
        crate::conf::document::yaml(text, None).map(|document| document.value)
    }

    #[test]
    fn reads_what_yaml_has_and_json_lacks() {
        let text =
            "a: &a {x: 1, 8080: 2}\nb:\n  <<: *a\n  x: 3\nc: !mine [1]\nd: !!omap [{e: 1}]\n~: 1\ntrue: 2\nf: 0x1F\n";
        let expected = json!({
            "a": {"x": 1, "8080": 2}, "b": {"x": 3, "8080": 2}, "c": [1], "d": [{"e": 1}], "null": 1, "true": 2, "f": 31,
        });
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read("a: &a !mine {x: 1}\nb: *a"), Ok(json!({"a": {"x": 1}, "b": {"x": 1}})), "tags with aliases");
        assert!(read("[a]: 1").is_err_and(|e| e.contains("a key must be text")));
        assert!(read("a: [").is_err_and(|e| e.contains("line")));
    }

    #[test]
    fn what_aliases_come_to_is_bounded() {
        // Beside the 64 values: two keys of one byte, the list, the table.
        let rest = 2 * 2 + 1 + 1;
        let size = (MAX_EXPANDED - rest) / 64 - 1;
        let of = |size: usize, more: usize| {
            let aliases = vec!["*a"; 63].join(", ");
            format!("a: &a {}\nb: [{aliases}, {}]\n", "x".repeat(size), "y".repeat(more))
        };
        let room = MAX_EXPANDED - rest - 64 * (size + 1) - 1;
        let fits = read(&of(size, room));
        assert_eq!(fits.map(|v| v["b"].as_array().map(Vec::len)), Ok(Some(64)));
        let refused = read(&of(size, room + 1));
        assert!(refused.is_err_and(|e| e.contains("its aliases make it larger than 67108864 bytes")));
        let laughs = "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n";
        assert_eq!(read(laughs).map(|v| v["c"].clone()), Ok(json!([[["x"], ["x"]], [["x"], ["x"]]])));
    }
}
