//! Packs `lua/**` and `plugins/**` into the binary as `PACKED: &[(module name, file name, source)]`, sorted by module.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let mut packed = Vec::new();
    pack(&root, Path::new("lua"), "", &mut packed)?;
    pack(&root, Path::new("plugins"), "apisix.plugins.", &mut packed)?;
    packed.sort();
    let mut out = String::from("&[\n");
    for (module, file) in packed {
        let path = root.join(&file);
        out.push_str(&format!("    ({module:?}, {file:?}, include_bytes!({:?})),\n", path.display().to_string()));
    }
    out.push_str("]\n");
    let target = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("packed.rs");
    fs::write(target, out)
}

/// `dir/a/b.lua` is the module `{prefix}a.b`; `a/init.lua` is also `{prefix}a`.
fn pack(root: &Path, dir: &Path, prefix: &str, packed: &mut Vec<(String, String)>) -> io::Result<()> {
    println!("cargo:rerun-if-changed={}", root.join(dir).display());
    let Ok(entries) = fs::read_dir(root.join(dir)) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = dir.join(&name);
        if entry.file_type()?.is_dir() {
            pack(root, &path, &format!("{prefix}{name}."), packed)?;
        } else if let Some(stem) = name.strip_suffix(".lua") {
            println!("cargo:rerun-if-changed={}", root.join(&path).display());
            let file = path.display().to_string();
            packed.push((format!("{prefix}{stem}"), file.clone()));
            // As on a disk: `a.lua` comes before `a/init.lua`.
            if stem == "init" && !root.join(dir).with_extension("lua").exists() {
                packed.push((prefix.trim_end_matches('.').to_owned(), file));
            }
        }
    }
    Ok(())
}
