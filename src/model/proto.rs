//! `protos`: Protocol Buffers that plugins speak by.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::{Engine, engine::general_purpose::STANDARD};
use prost_reflect::DescriptorPool;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

/// The name that messages about the text carry.
const NAME: &str = "proto";

/// The one file that a proto's content is.
struct Content(String);

impl FileResolver for Content {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        if name == NAME { File::from_source(name, &self.0) } else { Err(protox::Error::file_not_found(name)) }
    }
}

/// Whether `content` can be used: the text of a .proto file that imports nothing but Google's own, or a file descriptor set in
/// base64. The text says what is wrong.
pub fn check(content: &str) -> Result<(), String> {
    // prost-reflect 0.16 panics at some descriptors that no compiler makes; nothing half-made outlives it.
    catch_unwind(AssertUnwindSafe(|| compile(content))).unwrap_or_else(|_| Err("the descriptor is not valid".into()))
}

fn compile(content: &str) -> Result<(), String> {
    if let Ok(set) = STANDARD.decode(content.trim()) {
        return DescriptorPool::decode(&*set).map(|_| ()).map_err(|e| e.to_string());
    }
    let mut resolver = ChainFileResolver::new();
    resolver.add(Content(content.to_owned()));
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.open_file(NAME).map(|_| ()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proto_compiles_or_says_why_not() {
        check("syntax = \"proto3\"; message A { string name = 1; }").unwrap();
        check("syntax = \"proto3\"; import \"google/protobuf/any.proto\"; message A { google.protobuf.Any a = 1; }")
            .unwrap();
        for (text, why) in [
            ("syntax = \"proto3\"; message A { int32 a = 1; string b = 1; }", "1"),
            ("syntax = \"proto3\"; import \"other.proto\";", "other.proto"),
            ("not a proto", "expected"),
            ("bm90IGEgcHJvdG8=", "decode"),
        ] {
            let e = check(text).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
