//! `pb` and `protoc`: Protocol Buffers by their descriptors (lua-protobuf's README), on prost-reflect and protox.
//!
//! Text fields hold UTF-8, as the format asks. The nesting of messages is bounded, both ways.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::c_int,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage,
    Syntax, Value,
    prost::{Message, bytes::Bytes},
    prost_types::{FileDescriptorProto, FileDescriptorSet},
};
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

use super::Answer;
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        convert,
        ngx::object,
    },
};

/// Messages inside of messages: the bound of prost's decoder.
const MAX_DEPTH: usize = 100;
/// Descriptors and sources that are read.
const MAX_SCHEMA: usize = 16 * 1024 * 1024;

type Fallible<T> = std::result::Result<T, Raise>;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.pb.new", any, "new() -> object: an empty set of types", |s| {
        Ok(object::push(s, Rc::new(RefCell::new(State::default()))))
    })?;
    api.func("native.pb.load", any, "load(state, FileDescriptorSet bytes) -> true | nil, err", load)?;
    api.func("native.pb.types", any, "types(state) -> array of { name, basename, kind }", types)?;
    api.func(
        "native.pb.fields",
        any,
        "fields(state, type) -> array of { name, number, type, default, label, oneof, oneof_index } | nil",
        fields,
    )?;
    api.func("native.pb.enum", any, "enum(state, type, name or number) -> number or name | nil", enum_value)?;
    api.func("native.pb.encode", any, "encode(state, type, table) -> bytes; raises", encode)?;
    api.func(
        "native.pb.decode",
        any,
        "decode(state, type, bytes, { int64, enum_as_value, defaults, arrays }) -> table; raises",
        decode,
    )?;
    api.func(
        "native.pb.compile",
        any,
        "compile(name, { name = source }, imports) -> FileDescriptorSet bytes | nil, err",
        compile,
    )
}

#[derive(Default)]
struct State {
    files: Vec<FileDescriptorProto>,
    pool: DescriptorPool,
}

type Shared = RefCell<State>;

impl State {
    /// Takes files in; one of the same name, or with a type of the same name, goes.
    fn add(&mut self, new: Vec<FileDescriptorProto>) -> std::result::Result<(), String> {
        let mut files = self.files.clone();
        for file in new {
            let names = names_of(&file);
            files.retain(|old| old.name != file.name && !names_of(old).iter().any(|name| names.contains(name)));
            files.push(file);
        }
        let set = FileDescriptorSet { file: files.clone() };
        self.pool = sound(|| DescriptorPool::from_file_descriptor_set(set).map_err(|e| e.to_string()))?;
        self.files = files;
        Ok(())
    }

    fn message(&self, name: &[u8]) -> Option<MessageDescriptor> {
        self.pool.get_message_by_name(plain(name)?)
    }
}

/// prost-reflect 0.16 panics at some descriptors that no compiler makes (where it builds an error's place in a file): what comes out of a
/// panic here is dropped as a whole, so nothing half-made stays.
fn sound<T>(read: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("the descriptor is not valid".into()))
}

fn names_of(file: &FileDescriptorProto) -> Vec<String> {
    let messages = file.message_type.iter().map(|m| m.name());
    messages.chain(file.enum_type.iter().map(|e| e.name())).map(|name| format!("{}.{name}", file.package())).collect()
}

/// `.pkg.Name` and `pkg.Name` are the same.
fn plain(name: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(name).ok()?;
    Some(name.strip_prefix('.').unwrap_or(name))
}

fn load(s: &Stack) -> Answer {
    let state = object::get::<Shared>(s, 1)?;
    let bytes = s.arg_bytes(2)?;
    if bytes.len() > MAX_SCHEMA {
        return s.fail("the descriptor is too large");
    }
    let done = FileDescriptorSet::decode(bytes).map_err(|e| e.to_string());
    match done.and_then(|set| state.borrow_mut().add(set.file)) {
        Ok(()) => Ok(s.push_bool(true)),
        Err(why) => s.fail(why),
    }
}

fn types(s: &Stack) -> Answer {
    let state = object::get::<Shared>(s, 1)?;
    let pool = state.borrow().pool.clone();
    let messages = pool.all_messages().map(|m| {
        let kind = if m.is_map_entry() { "map" } else { "message" };
        (m.full_name().to_owned(), m.name().to_owned(), kind)
    });
    let enums = pool.all_enums().map(|e| (e.full_name().to_owned(), e.name().to_owned(), "enum"));
    let mut all: Vec<_> = messages.chain(enums).collect();
    all.sort();
    s.push_table(all.len(), 0);
    for (i, (name, basename, kind)) in all.iter().enumerate() {
        s.push_table(3, 0);
        for (n, text) in [&format!(".{name}"), basename, *kind].iter().enumerate() {
            s.push_bytes(text);
            s.set_index(-2, n + 1);
        }
        s.set_index(-2, i + 1);
    }
    Ok(1)
}

fn type_name(kind: &Kind) -> String {
    match kind {
        Kind::Message(m) => format!(".{}", m.full_name()),
        Kind::Enum(e) => format!(".{}", e.full_name()),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn fields(s: &Stack) -> Answer {
    let state = object::get::<Shared>(s, 1)?;
    let Some(message) = state.borrow().message(s.arg_bytes(2)?) else { return Ok(s.push_nil()) };
    let options = Options { enum_as_value: false, ..Options::default() };
    s.push_table(message.fields().len(), 0);
    for (i, field) in message.fields().enumerate() {
        s.push_table(0, 7);
        for (key, text) in [("name", field.name().to_owned()), ("type", type_name(&field.kind()))] {
            s.push_bytes(text);
            s.set(-2, key);
        }
        s.push_number(field.number().into());
        s.set(-2, "number");
        let label = match (field.is_packed() && field.is_list(), field.cardinality()) {
            (true, _) => "packed",
            (_, Cardinality::Repeated) => "repeated",
            (_, Cardinality::Required) => "required",
            _ => "optional",
        };
        s.push_bytes(label);
        s.set(-2, "label");
        if !field.is_list() && !field.is_map() && !matches!(field.kind(), Kind::Message(_)) {
            push(s, &field.default_value(), &field.kind(), &options, 0)?;
            s.set(-2, "default");
        }
        if let Some(oneof) = field.containing_oneof() {
            let at = message.oneofs().position(|o| o == oneof).unwrap_or_default();
            s.push_bytes(oneof.name());
            s.set(-2, "oneof");
            s.push_number((at + 1) as f64);
            s.set(-2, "oneof_index");
        }
        s.set_index(-2, i + 1);
    }
    Ok(1)
}

fn enum_value(s: &Stack) -> Answer {
    let state = object::get::<Shared>(s, 1)?;
    let pool = state.borrow().pool.clone();
    let Some(of) = plain(s.arg_bytes(2)?).and_then(|name| pool.get_enum_by_name(name)) else {
        return Ok(s.push_nil());
    };
    if s.kind(3) == mlua::ffi::LUA_TNUMBER {
        let value = of.get_value(s.arg_number(3)? as i32);
        return Ok(value.map_or_else(|| s.push_nil(), |value| s.push_bytes(value.name())));
    }
    let value = of.get_value_by_name(&s.arg_str(3)?);
    Ok(value.map_or_else(|| s.push_nil(), |value| s.push_number(value.number().into())))
}

fn message_type(s: &Stack) -> Fallible<MessageDescriptor> {
    let state = object::get::<Shared>(s, 1)?;
    let name = s.arg_bytes(2)?;
    let found = state.borrow().message(name);
    found.ok_or_else(|| format!("type '{}' does not exists", String::from_utf8_lossy(name)).into())
}

// To bytes -----------------------------------------------------------------------------------------------------------

fn encode(s: &Stack) -> Answer {
    let of = message_type(s)?;
    s.arg_table(3)?;
    let message = read_message(s, 3, &of, 0)?;
    Ok(s.push_bytes(message.encode_to_vec()))
}

/// The message of the table at `i`; names that are no field's are left out.
fn read_message(s: &Stack, i: c_int, of: &MessageDescriptor, depth: usize) -> Fallible<DynamicMessage> {
    if depth > MAX_DEPTH {
        return Err("a message is nested too deeply".into());
    }
    s.reserve(8)?;
    let table = s.absolute(i);
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        s.get(table, field.name());
        // Also cjson.null is no value.
        let value = match s.is_nil(-1) || s.kind(-1) == mlua::ffi::LUA_TLIGHTUSERDATA {
            true => Ok(None),
            false => read_field(s, &field, depth).map(Some),
        };
        s.pop(1);
        if let Some(value) = value? {
            message.try_set_field(&field, value).map_err(|e| Raise(format!("field '{}': {e}", field.name()).into()))?;
        }
    }
    Ok(message)
}

fn wrong(s: &Stack, field: &str, wanted: &str) -> Raise {
    format!("{wanted} expected for field '{field}', got {}", s.kind_name(-1)).into()
}

/// The value on top.
fn read_field(s: &Stack, field: &FieldDescriptor, depth: usize) -> Fallible<Value> {
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else { return Err("a map without an entry".into()) };
        return read_map(s, field, &entry, depth);
    }
    if !field.is_list() {
        return read_value(s, field.name(), &field.kind(), depth);
    }
    if !s.is_table(-1) {
        return Err(wrong(s, field.name(), "table"));
    }
    let mut items = Vec::new();
    for n in 1..=s.len(-1) {
        s.get_index(-1, n);
        let item = read_value(s, field.name(), &field.kind(), depth);
        s.pop(1);
        items.push(item?);
    }
    Ok(Value::List(items))
}

fn read_map(s: &Stack, field: &FieldDescriptor, entry: &MessageDescriptor, depth: usize) -> Fallible<Value> {
    if !s.is_table(-1) {
        return Err(wrong(s, field.name(), "table"));
    }
    let (key_kind, value_kind) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
    let mut map = HashMap::new();
    s.pairs(-1, |s| {
        // A copy of the key, as reading may change what is on the stack.
        s.push_copy(-2);
        let key = read_value(s, field.name(), &key_kind, depth);
        s.pop(1);
        let key = key?.into_map_key().ok_or("a key that a map cannot have")?;
        map.insert(key, read_value(s, field.name(), &value_kind, depth)?);
        Ok::<(), Raise>(())
    })?;
    Ok(Value::Map(map))
}

/// A whole number, also one written as text: `"-5"`, `"#18446744073709551615"`, `"0x1f"`.
fn integer(s: &Stack, field: &str) -> Fallible<i128> {
    if s.kind(-1) == mlua::ffi::LUA_TNUMBER {
        return Ok(s.number(-1).unwrap_or_default() as i128);
    }
    if s.kind(-1) == mlua::ffi::LUA_TBOOLEAN {
        return Err(wrong(s, field, "number"));
    }
    let text = s.bytes(-1).map(String::from_utf8_lossy).ok_or_else(|| wrong(s, field, "number"))?;
    let digits = text.strip_prefix('#').unwrap_or(&text);
    let number = match digits.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    number.map_err(|_| format!("integer format error for field '{field}': '{text}'").into())
}

fn read_value(s: &Stack, field: &str, kind: &Kind, depth: usize) -> Fallible<Value> {
    let number = || s.number(-1).ok_or_else(|| wrong(s, field, "number"));
    Ok(match kind {
        Kind::Double => Value::F64(number()?),
        Kind::Float => Value::F32(number()? as f32),
        // A number that is too large goes round, as it does in C.
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(integer(s, field)? as i32),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(integer(s, field)? as i64),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(integer(s, field)? as u32),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(integer(s, field)? as u64),
        Kind::Bool => Value::Bool(s.boolean(-1)),
        Kind::String => {
            let text = s.bytes(-1).ok_or_else(|| wrong(s, field, "string"))?;
            let text = std::str::from_utf8(text).map_err(|_| format!("field '{field}' is not UTF-8"))?;
            Value::String(text.to_owned())
        }
        Kind::Bytes => Value::Bytes(Bytes::copy_from_slice(s.bytes(-1).ok_or_else(|| wrong(s, field, "string"))?)),
        Kind::Enum(of) if s.kind(-1) == mlua::ffi::LUA_TSTRING => {
            let name = String::from_utf8_lossy(s.bytes(-1).unwrap_or_default()).into_owned();
            let value = of.get_value_by_name(&name);
            Value::EnumNumber(value.ok_or_else(|| format!("invalid enum value '{name}' for field '{field}'"))?.number())
        }
        Kind::Enum(_) => Value::EnumNumber(integer(s, field)? as i32),
        Kind::Message(of) => {
            if !s.is_table(-1) {
                return Err(wrong(s, field, "table"));
            }
            Value::Message(read_message(s, -1, of, depth + 1)?)
        }
    })
}

// From bytes ---------------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Options {
    int64: Int64,
    enum_as_value: bool,
    defaults: Defaults,
    /// Repeated fields without a value are empty tables.
    arrays: bool,
}

#[derive(Default, PartialEq)]
enum Int64 {
    #[default]
    Number,
    Text,
    Hex,
}

#[derive(Default, PartialEq)]
enum Defaults {
    /// Of proto3 only.
    #[default]
    Auto,
    Always,
    Never,
}

impl Options {
    fn read(s: &Stack, i: c_int) -> Options {
        let mut options = Options::default();
        if !s.is_table(i) {
            return options;
        }
        s.get(i, "int64");
        options.int64 = match s.bytes(-1) {
            Some(b"string") => Int64::Text,
            Some(b"hex") => Int64::Hex,
            _ => Int64::Number,
        };
        s.get(i, "defaults");
        options.defaults = match s.bytes(-1) {
            Some(b"always") => Defaults::Always,
            Some(b"never") => Defaults::Never,
            _ => Defaults::Auto,
        };
        s.get(i, "enum_as_value");
        options.enum_as_value = s.boolean(-1);
        s.get(i, "arrays");
        options.arrays = s.boolean(-1);
        s.pop(4);
        options
    }
}

fn decode(s: &Stack) -> Answer {
    let of = message_type(s)?;
    let options = Options::read(s, 4);
    let message = DynamicMessage::decode(of, s.arg_bytes(3)?).map_err(|e| e.to_string())?;
    push_message(s, &message, &options, 0)?;
    Ok(1)
}

fn push_message(s: &Stack, message: &DynamicMessage, options: &Options, depth: usize) -> Fallible<()> {
    if depth > MAX_DEPTH {
        return Err("a message is nested too deeply".into());
    }
    s.reserve(8)?;
    let of = message.descriptor();
    let defaults = match options.defaults {
        Defaults::Always => true,
        Defaults::Never => false,
        Defaults::Auto => of.parent_file().syntax() == Syntax::Proto3,
    };
    s.push_table(0, of.fields().len());
    for field in of.fields() {
        let many = field.is_list() || field.is_map();
        let plain = !matches!(field.kind(), Kind::Message(_)) && field.containing_oneof().is_none();
        if message.has_field(&field) || (many && options.arrays) || ((many || plain) && defaults) {
            push_field(s, &message.get_field(&field), &field, options, depth)?;
            s.set(-2, field.name());
        }
    }
    Ok(())
}

fn push_field(s: &Stack, value: &Value, field: &FieldDescriptor, options: &Options, depth: usize) -> Fallible<()> {
    match value {
        Value::List(items) => {
            s.push_table(items.len(), 0);
            for (i, item) in items.iter().enumerate() {
                push(s, item, &field.kind(), options, depth)?;
                s.set_index(-2, i + 1);
            }
            convert::mark_array(s);
        }
        Value::Map(map) => {
            let Kind::Message(entry) = field.kind() else { return Err("a map without an entry".into()) };
            let kind = entry.map_entry_value_field().kind();
            s.push_table(0, map.len());
            for (key, item) in map {
                push_key(s, key, options);
                push(s, item, &kind, options, depth)?;
                // SAFETY: a table lies below its key, which is neither nil nor NaN, and its value.
                unsafe { mlua::ffi::lua_rawset(s.raw(), -3) };
            }
        }
        one => push(s, one, &field.kind(), options, depth)?,
    }
    Ok(())
}

fn push_key(s: &Stack, key: &MapKey, options: &Options) -> c_int {
    match key {
        MapKey::Bool(b) => s.push_bool(*b),
        MapKey::I32(n) => s.push_number((*n).into()),
        MapKey::U32(n) => s.push_number((*n).into()),
        MapKey::I64(n) => push_int64(s, (*n).into(), options),
        MapKey::U64(n) => push_int64(s, (*n).into(), options),
        MapKey::String(text) => s.push_bytes(text),
    }
}

/// Whole numbers that a Lua number holds may be numbers.
fn push_int64(s: &Stack, n: i128, options: &Options) -> c_int {
    match options.int64 {
        Int64::Number => s.push_number(n as f64),
        Int64::Text => s.push_bytes(format!("#{n}")),
        Int64::Hex => s.push_bytes(format!("#0x{:016X}", n as u64)),
    }
}

fn push(s: &Stack, value: &Value, kind: &Kind, options: &Options, depth: usize) -> Fallible<()> {
    match value {
        Value::Bool(b) => s.push_bool(*b),
        Value::I32(n) => s.push_number((*n).into()),
        Value::U32(n) => s.push_number((*n).into()),
        Value::I64(n) => push_int64(s, (*n).into(), options),
        Value::U64(n) => push_int64(s, (*n).into(), options),
        Value::F32(n) => s.push_number((*n).into()),
        Value::F64(n) => s.push_number(*n),
        Value::String(text) => s.push_bytes(text),
        Value::Bytes(bytes) => s.push_bytes(bytes),
        Value::EnumNumber(n) => match kind {
            Kind::Enum(of) if !options.enum_as_value => match of.get_value(*n) {
                Some(value) => s.push_bytes(value.name()),
                None => s.push_number((*n).into()),
            },
            _ => s.push_number((*n).into()),
        },
        Value::Message(message) => {
            push_message(s, message, options, depth + 1)?;
            1
        }
        Value::List(_) | Value::Map(_) => return Err("a list inside of a list".into()),
    };
    Ok(())
}

// From sources -------------------------------------------------------------------------------------------------------

/// Finds what the script has read already.
struct Given(HashMap<String, String>);

impl FileResolver for Given {
    fn open_file(&self, name: &str) -> std::result::Result<File, protox::Error> {
        let text = self.0.get(name).ok_or_else(|| protox::Error::file_not_found(name))?;
        File::from_source(name, text)
    }
}

fn compile(s: &Stack) -> Answer {
    let name = s.arg_str(1)?.into_owned();
    s.arg_table(2)?;
    let (mut sources, mut size) = (HashMap::new(), 0);
    s.pairs(2, |s| {
        if s.kind(-2) != mlua::ffi::LUA_TSTRING || s.kind(-1) != mlua::ffi::LUA_TSTRING {
            return Err(Raise::from("names and sources expected"));
        }
        let text = |i| String::from_utf8_lossy(s.bytes(i).unwrap_or_default()).into_owned();
        size += s.len(-1);
        sources.insert(text(-2), text(-1));
        Ok(())
    })?;
    if size > MAX_SCHEMA {
        return s.fail("the sources are too large");
    }
    let mut resolver = ChainFileResolver::new();
    resolver.add(Given(sources));
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_imports(s.boolean(3));
    let made = sound(|| match compiler.open_file(&name) {
        Ok(compiler) => Ok(compiler.encode_file_descriptor_set()),
        Err(e) => Err(e.to_string()),
    });
    match made {
        Ok(bytes) => Ok(s.push_bytes(bytes)),
        Err(why) => s.fail(format!("{name}: {why}")),
    }
}
