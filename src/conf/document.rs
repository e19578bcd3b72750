//! A document of YAML or JSON as a value.
//!
//! Of a key that is written more than once in a map the last counts, and it is told. Merge keys (`<<`) are followed, tags that mean
//! nothing here (`!!omap`, `!mine`) are passed over, keys become text. `${{NAME}}` and `${{NAME:=default}}` may stand for variables
//! of the environment: what they come to is never parsed, so that no value changes the document around it. A value that was
//! written without quotes becomes a number or a boolean when the outcome reads as one; in quotes it stays a text.

use std::{borrow::Cow, cell::RefCell, collections::HashSet, fmt};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde_json::{Map, Number, Value};

use super::{env, yaml};

/// Repeated keys that are told one by one; the others are counted.
const MAX_REPEATED: usize = 20;

/// What begins and ends a reference.
const OPEN: &str = "${{";
const CLOSE: &str = "}}";

/// Characters for the use of programs: some that the document does not have stand for the ends of its references while it is
/// parsed. Braces would end or begin maps where no quotes are.
const PRIVATE: std::ops::RangeInclusive<char> = '\u{E000}'..='\u{F8FF}';

/// Gives the values of variables; `None`: there is none of that name.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

pub struct Document {
    pub value: Value,
    /// Keys that are written more than once: `routes[0].uri: is written more than once, again in line 7; the last one counts`.
    pub repeated: Vec<String>,
}

/// Reads YAML; `lookup`: with references in it. The error says where it ends to be YAML.
pub fn yaml(text: &str, lookup: Option<Lookup<'_>>) -> Result<Document, String> {
    let (text, marks) = marked(without_mark(text), lookup.is_some(), Format::Yaml)?;
    yaml::bound_aliases(&text)?;
    let reader = Reader { text: &text, format: Format::Yaml, filler: marks.zip(lookup), told: RefCell::default() };
    let value = reader.root().deserialize(serde_norway::Deserializer::from_str(&text)).map_err(|e| e.to_string())?;
    Ok(reader.document(value))
}

/// Reads JSON with references in it; one outside of strings is a value, too: `{"weight": ${{WEIGHT}}}`.
pub fn json(text: &str, lookup: Lookup<'_>) -> Result<Document, String> {
    let (text, marks) = marked(without_mark(text), true, Format::Json)?;
    let filler = marks.map(|marks| (marks, lookup));
    let reader = Reader { text: &text, format: Format::Json, filler, told: RefCell::default() };
    let mut json = serde_json::Deserializer::from_str(&text);
    let value = reader.root().deserialize(&mut json).and_then(|value| json.end().map(|()| value));
    Ok(reader.document(value.map_err(|e| e.to_string())?))
}

/// Without the byte order mark that some editors put first.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Yaml,
    Json,
}

/// What stands for the ends of references in the text that is parsed.
#[derive(Clone, Copy)]
struct Marks {
    open: char,
    close: char,
    /// Begins a JSON string that was no string before.
    bare: char,
}

/// The text with its references marked; the text itself when it has none.
fn marked(text: &str, wanted: bool, format: Format) -> Result<(Cow<'_, str>, Option<Marks>), String> {
    if !wanted || !text.contains(OPEN) {
        return Ok((text.into(), None));
    }
    let used: HashSet<char> = text.chars().filter(|c| PRIVATE.contains(c)).collect();
    let mut free = PRIVATE.filter(|c| !used.contains(c));
    let (Some(open), Some(close), Some(bare)) = (free.next(), free.next(), free.next()) else {
        return Err("it has every character for private use: take some out".to_owned());
    };
    let marks = Marks { open, close, bare };
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut strings) = (text, Strings::default());
    while let Some(start) = rest.find(OPEN) {
        let (before, from) = rest.split_at(start);
        strings.pass(before);
        out.push_str(before);
        let from = &from[OPEN.len()..];
        let Some((inner, after)) = inner(from) else {
            out.push_str(OPEN);
            rest = from;
            continue;
        };
        if format == Format::Json && !strings.inside {
            let quoted = Value::from(format!("{bare}{open}{inner}{close}"));
            out.push_str(&quoted.to_string());
        } else {
            out.extend([open]);
            out.push_str(inner);
            out.extend([close]);
        }
        rest = after;
    }
    out.push_str(rest);
    Ok((out.into(), Some(marks)))
}

/// `NAME` or `NAME:=default`, and what follows the reference. It ends in its line.
fn inner(from: &str) -> Option<(&str, &str)> {
    let (inner, _) = from.lines().next()?.split_once(CLOSE)?;
    let name = inner.split_once(":=").map_or(inner, |(name, _)| name).trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    (!name.is_empty() && name.chars().all(is_name)).then(|| (inner, &from[inner.len() + CLOSE.len()..]))
}

/// Whether a place in a JSON text is in a string.
#[derive(Default)]
struct Strings {
    inside: bool,
    escaped: bool,
}

impl Strings {
    fn pass(&mut self, text: &str) {
        for byte in text.bytes() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.inside => self.escaped = true,
                b'"' => self.inside = !self.inside,
                _ => {}
            }
        }
    }
}

struct Reader<'r> {
    /// What is parsed.
    text: &'r str,
    format: Format,
    filler: Option<(Marks, Lookup<'r>)>,
    told: RefCell<Told>,
}

#[derive(Default)]
struct Told {
    repeated: Vec<String>,
    more: usize,
}

impl Reader<'_> {
    fn root(&self) -> Node<'_> {
        Node { reader: self, place: None }
    }

    fn document(&self, value: Value) -> Document {
        let Told { mut repeated, more } = self.told.take();
        if more > 0 {
            repeated.push(format!("{more} more keys are written more than once"));
        }
        Document { value, repeated }
    }

    /// Where a text of the parser's begins, when it is a part of what is parsed.
    fn offset(&self, part: &str) -> Option<usize> {
        let offset = (part.as_ptr() as usize).checked_sub(self.text.as_ptr() as usize)?;
        (offset + part.len() <= self.text.len()).then_some(offset)
    }

    /// Whether a text that begins there was written without quotes. The parser tells no styles; what it copies had quotes, escapes
    /// or more than one line.
    fn is_plain(&self, offset: Option<usize>) -> bool {
        let Some(before) = offset.and_then(|offset| self.text.get(..offset)) else { return false };
        // `!!str` says what quotes say.
        !before.ends_with(['"', '\'']) && !before.trim_end().ends_with("!!str")
    }

    /// The text with its references replaced, and whether it had any.
    fn filled(&self, text: &str) -> Result<(String, bool), String> {
        let Some((marks, lookup)) = &self.filler else { return Ok((text.to_owned(), false)) };
        let (mut out, mut rest) = (String::new(), text);
        while let Some((before, from)) = rest.split_once(marks.open) {
            let Some((inner, after)) = from.split_once(marks.close) else {
                return Err(format!("{OPEN}{from} is cut off: put the value in quotes"));
            };
            out.push_str(before);
            out.push_str(&env::reference(inner, lookup)?);
            rest = after;
        }
        out.push_str(rest);
        Ok((out, rest.len() < text.len()))
    }

    fn text(&self, text: &str, is_plain: bool) -> Result<Value, String> {
        let bare = match &self.filler {
            Some((marks, _)) if self.format == Format::Json => text.strip_prefix(marks.bare),
            _ => None,
        };
        let (filled, was_reference) = self.filled(bare.unwrap_or(text))?;
        let is_typed = was_reference && (bare.is_some() || is_plain);
        Ok(if is_typed { env::typed(filled) } else { Value::String(filled) })
    }

    /// A key that its map has already.
    fn tell(&self, place: &Place<'_>, offset: Option<usize>) {
        let mut told = self.told.borrow_mut();
        if told.repeated.len() >= MAX_REPEATED {
            told.more += 1;
            return;
        }
        let line = offset.map(|offset| self.text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1);
        let again = line.map(|line| format!(", again in line {line}")).unwrap_or_default();
        told.repeated.push(format!("{place}: is written more than once{again}; the last one counts"));
    }
}

/// Where a value stands, from the inside out.
struct Place<'p> {
    within: Option<&'p Place<'p>>,
    step: Step<'p>,
}

enum Step<'p> {
    Key(&'p str),
    Item(usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(within) = self.within {
            write!(f, "{within}")?;
        }
        match self.step {
            Step::Item(i) => write!(f, "[{i}]"),
            // Whoever wrote the document shall not write lines of a log.
            Step::Key(key) if self.within.is_some() => write!(f, ".{}", key.escape_debug()),
            Step::Key(key) => write!(f, "{}", key.escape_debug()),
        }
    }
}

#[derive(Clone, Copy)]
struct Node<'r> {
    reader: &'r Reader<'r>,
    place: Option<&'r Place<'r>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: Error>(self, b: bool) -> Result<Value, E> {
        Ok(b.into())
    }

    fn visit_i64<E: Error>(self, n: i64) -> Result<Value, E> {
        Ok(n.into())
    }

    fn visit_u64<E: Error>(self, n: u64) -> Result<Value, E> {
        Ok(n.into())
    }

    fn visit_i128<E: Error>(self, n: i128) -> Result<Value, E> {
        self.visit_f64(n as f64)
    }

    fn visit_u128<E: Error>(self, n: u128) -> Result<Value, E> {
        self.visit_f64(n as f64)
    }

    /// JSON has no infinity.
    fn visit_f64<E: Error>(self, n: f64) -> Result<Value, E> {
        Ok(Number::from_f64(n).map_or(Value::Null, Value::Number))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Value, E> {
        let is_plain = self.reader.format == Format::Yaml && self.reader.is_plain(self.reader.offset(text));
        self.reader.text(text, is_plain).map_err(E::custom)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.reader.text(text, false).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let place = Place { within: self.place, step: Step::Item(list.len()) };
            match items.next_element_seed(Node { reader: self.reader, place: Some(&place) })? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        let (mut map, mut merged) = (Map::new(), Vec::new());
        while let Some(Key { text: key, offset }) = pairs.next_key_seed(KeySeed(self.reader))? {
            let place = Place { within: self.place, step: Step::Key(&key) };
            let value = pairs.next_value_seed(Node { reader: self.reader, place: Some(&place) })?;
            if key == "<<" && self.reader.format == Format::Yaml {
                merged.push(value);
                continue;
            }
            if map.contains_key(&key) {
                self.reader.tell(&place, offset);
            }
            map.insert(key, value);
        }
        merged.into_iter().try_for_each(|from| merge(&mut map, from)).map_err(A::Error::custom)?;
        Ok(Value::Object(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Value, A::Error> {
        let (IgnoredAny, value) = tagged.variant()?;
        value.newtype_variant_seed(self)
    }
}

/// What the map has itself stays; of several maps the first that has a key gives it.
fn merge(map: &mut Map<String, Value>, from: Value) -> Result<(), String> {
    let maps = match from {
        Value::Array(maps) => maps,
        one => vec![one],
    };
    for from in maps {
        let Value::Object(from) = from else { return Err("<< takes a map, or a list of maps".to_owned()) };
        for (key, value) in from {
            map.entry(key).or_insert(value);
        }
    }
    Ok(())
}

struct Key {
    text: String,
    offset: Option<usize>,
}

/// Reads a key: whatever it is becomes a text, as in JSON: `nodes: {8080: 1}`.
struct KeySeed<'r>(&'r Reader<'r>);

impl KeySeed<'_> {
    fn of<E>(text: impl ToString) -> Result<Key, E> {
        Ok(Key { text: text.to_string(), offset: None })
    }

    fn filled<E: Error>(&self, text: &str, offset: Option<usize>) -> Result<Key, E> {
        let (text, _) = self.0.filled(text).map_err(E::custom)?;
        Ok(Key { text, offset })
    }
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bool<E: Error>(self, b: bool) -> Result<Key, E> {
        Self::of(b)
    }

    fn visit_i64<E: Error>(self, n: i64) -> Result<Key, E> {
        Self::of(n)
    }

    fn visit_u64<E: Error>(self, n: u64) -> Result<Key, E> {
        Self::of(n)
    }

    fn visit_i128<E: Error>(self, n: i128) -> Result<Key, E> {
        Self::of(n)
    }

    fn visit_u128<E: Error>(self, n: u128) -> Result<Key, E> {
        Self::of(n)
    }

    fn visit_f64<E: Error>(self, n: f64) -> Result<Key, E> {
        Self::of(Number::from_f64(n).map_or(Value::Null, Value::Number))
    }

    fn visit_unit<E: Error>(self) -> Result<Key, E> {
        Self::of(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Key, E> {
        Self::of(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Key, E> {
        let offset = self.0.offset(text);
        self.filled(text, offset)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Key, E> {
        self.filled(text, None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Key, A::Error> {
        Err(A::Error::custom("a key must be text"))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Key, A::Error> {
        Err(A::Error::custom("a key must be text"))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Key, A::Error> {
        let (IgnoredAny, value) = tagged.variant()?;
        value.newtype_variant_seed(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json as value;

    use super::*;

    fn lookup(name: &str) -> Option<String> {
        let value = match name {
            "N" => "12345",
            "ZEROS" => "0012345",
            "BIG" => "356002209726529540",
            "T" => "true",
            "HOST" => "127.0.0.1",
            "EVIL" => "a\"\n  b: 1 # ' {x: [",
            "DATA" => "{\"a\": [1]}",
            "NAME" => "key-auth",
            _ => return None,
        };
        Some(value.to_owned())
    }

    fn read(text: &str) -> Result<Value, String> {
        yaml(text, Some(&lookup)).map(|document| document.value)
    }

    #[test]
    fn a_mark_of_byte_order_is_no_part_of_the_document() {
        assert_eq!(read("\u{feff}a: ${{N}}\nb: \"${{N}}\"\n"), Ok(value!({"a": 12345, "b": "12345"})));
        let json = json("\u{feff}{\"a\": ${{N}}}", &lookup).map(|document| document.value);
        assert_eq!(json, Ok(value!({"a": 12345})));
    }

    #[test]
    fn what_is_in_quotes_stays_a_text() {
        let text = "
bare: ${{N}}
double: \"${{N}}\"
single: '${{N}}'
literal: |-
  ${{N}}
folded: >-
  ${{N}}
tagged: !!str ${{N}}
custom: !mine ${{N}}
flow: [${{N}}, \"${{N}}\", {a: ${{T}}, \"b\": '${{T}}', \"c\":${{T}}}]
flag: ${{T}}
quoted_flag: \"${{T}}\"
zeros: ${{ZEROS}}
big: ${{BIG}}
part: ${{HOST}}:80
joined: 1${{N}}
anchor: &a ${{N}}
alias: *a
";
        let expected = value!({
            "bare": 12345, "double": "12345", "single": "12345", "literal": "12345", "folded": "12345", "tagged": "12345",
            "custom": 12345, "flow": [12345, "12345", {"a": true, "b": "true", "c": true}], "flag": true,
            "quoted_flag": "true", "zeros": "0012345", "big": "356002209726529540", "part": "127.0.0.1:80",
            "joined": 112_345, "anchor": 12345, "alias": 12345,
        });
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read("${{N}}"), Ok(value!(12345)), "at the very start");
    }

    #[test]
    fn a_value_does_not_change_the_document_around_it() {
        let evil = lookup("EVIL");
        let text = "a: ${{EVIL}}\nb: \"${{EVIL}}\"\nc: [${{EVIL}}, ${{DATA}}]\n\"${{EVIL}}\": 1\n# ${{NOT_SET}}\n";
        let mut expected = value!({"a": evil, "b": evil, "c": [evil, lookup("DATA")]});
        expected[evil.unwrap_or_default()] = 1.into();
        assert_eq!(read(text), Ok(expected.clone()));
        let text = r#"{"a": ${{EVIL}}, "b": "${{EVIL}}", "c": [${{EVIL}}, "${{DATA}}"], "${{EVIL}}": 1}"#;
        assert_eq!(json(text, &lookup).map(|document| document.value), Ok(expected));
    }

    #[test]
    fn keys_defaults_and_what_is_missing() {
        let text = "${{NAME}}: 1\n\"${{HOST}}:${{N}}\": 2\n${{ N }}: 3\nd: ${{NONE:=202}}\ne: \"${{NONE := 202 }}\"\nf: ${{NONE:=}}\n\
                    g: ${{NONE:=a: b # c}}\nh: \"${{NONE:=say \\\"x\\\"}}\"\ni: ${{\nj: \"${{no name}}\"\n";
        let expected = value!({
            "key-auth": 1, "127.0.0.1:12345": 2, "12345": 3, "d": 202, "e": "202", "f": "", "h": "say \"x\"", "i": "${{",
            "j": "${{no name}}",
        });
        assert_eq!(read(&text.replace("g: ${{NONE:=a: b # c}}\n", "")), Ok(expected));
        assert!(read(text).is_err(), "a default is a part of the document");
        for text in ["a: 1\nb: [{c: ${{MISSING}}}]", "a: 1\n${{MISSING}}: 1", "- \"${{MISSING}}\""] {
            let e = read(text).unwrap_err();
            assert!(e.contains("can't find environment variable MISSING"), "{e}");
        }
        let e = read("a: [${{NONE:=1,2}}]").unwrap_err();
        assert!(e.contains("${{NONE:=1 is cut off: put the value in quotes"), "{e}");
        assert_eq!(yaml("a: \"${{N}}\"", None).map(|d| d.value), Ok(value!({"a": "${{N}}"})), "only where asked for");
    }

    #[test]
    fn references_stand_in_json_with_and_without_quotes() {
        let text =
            r#"{"a": ${{N}}, "b": "${{N}}", "c": "\"${{N}}", "${{NAME}}": ${{T}}, "e": "}} ${{", "f": ${{NONE:=x"y}}}"#;
        let expected = value!({"a": 12345, "b": "12345", "c": "\"12345", "key-auth": true, "e": "}} ${{", "f": "x\"y"});
        assert_eq!(json(text, &lookup).map(|document| document.value), Ok(expected));
        assert!(json("{} x", &lookup).is_err_and(|e| e.contains("trailing")));
    }

    #[test]
    fn marks_are_characters_that_the_document_has_not() {
        let own: String = PRIVATE.take(5).collect();
        assert_eq!(read(&format!("a: \"{own}${{{{N}}}}\"")), Ok(value!({"a": format!("{own}12345")})));
        let all: String = PRIVATE.skip(2).collect();
        assert!(read(&format!("a: \"{all}${{{{N}}}}\"")).is_err_and(|e| e.contains("private use")));
        let all: String = PRIVATE.skip(3).collect();
        assert!(read(&format!("a: \"{all}${{{{N}}}}\"")).is_ok());
    }

    #[test]
    fn of_a_repeated_key_the_last_counts_and_it_is_told() {
        let text = "routes:\n  - uri: /a\n    nodes: {\"127.0.0.1:1\": 1, 127.0.0.1:1: 2}\n    uri: /b\n\"a\\tb\": 1\n\"a\\tb\": 2\n";
        let document = yaml(text, None).unwrap_or_else(|e| panic!("{e}"));
        let expected = value!({"routes": [{"uri": "/b", "nodes": {"127.0.0.1:1": 2}}], "a\tb": 2});
        assert_eq!(document.value, expected);
        let told = [
            "routes[0].nodes.127.0.0.1:1: is written more than once, again in line 3; the last one counts",
            "routes[0].uri: is written more than once, again in line 4; the last one counts",
            "a\\tb: is written more than once; the last one counts",
        ];
        assert_eq!(document.repeated, told);
        let document = json(r#"{"a": 1, "${{NAME}}": 1, "key-auth": 2}"#, &lookup).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((document.value["key-auth"].clone(), document.repeated.len()), (value!(2), 1));
        let many = "a: 1\n".repeat(MAX_REPEATED + 1);
        assert_eq!(yaml(&many, None).map(|d| d.repeated.len()), Ok(MAX_REPEATED));
        let more = yaml(&(many + "a: 1\n"), None).map(|d| d.repeated);
        assert_eq!(
            more.map(|told| told.last().cloned()),
            Ok(Some("1 more keys are written more than once".to_owned()))
        );
    }

    #[test]
    fn merge_keys_give_what_a_map_does_not_have() {
        let text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  x: 3\n  <<: [*a, *b]\nd: {<<: *a}\n";
        let read = read(text).unwrap_or_default();
        assert_eq!((&read["c"], &read["d"]), (&value!({"x": 3, "y": 1, "z": 2}), &value!({"x": 1, "y": 1})));
        let e = yaml("a: {<<: 1}", None).map(|d| d.value).unwrap_err();
        assert!(e.contains("<< takes a map"), "{e}");
        let json = json(r#"{"<<": {"a": 1}}"#, &lookup).map(|document| document.value);
        assert_eq!(json, Ok(value!({"<<": {"a": 1}})), "JSON has none");
    }
}
