//! The Lua files of a directory.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use super::report::{Report, Verdict::Change};

/// Files below all directories that are looked at, Lua or not.
const MAX_FILES: usize = 20_000;
/// A directory in a directory in … .
const MAX_DEPTH: usize = 16;
/// A Lua file of a plugin has some kilobytes; generated tables may have some megabytes.
pub(super) const MAX_LUA: u64 = 8 << 20;

/// The files under the roots of a Lua path.
#[derive(Default)]
pub(super) struct Sources {
    /// With the name that `require` has for each. A file that several roots lead to stands here once, with its shortest name.
    pub files: Vec<(PathBuf, String)>,
    /// Where each stands, by its path without links.
    places: HashMap<PathBuf, usize>,
    /// Modules that `require` finds among them, those in C included.
    pub modules: BTreeSet<String>,
    /// `apisix.plugins.x`: x.
    pub plugins: BTreeSet<String>,
    /// How many more files are looked at.
    left: usize,
    full: bool,
}

/// The root that `apisix.plugins.x` is found from: a directory of plugins stands for the root above it.
pub(super) fn root_of(dir: &Path) -> PathBuf {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    match dir.ends_with("apisix/plugins") {
        true => dir.ancestors().nth(2).unwrap_or(&dir).to_owned(),
        false => dir,
    }
}

impl Sources {
    /// Looks under every root; what cannot be read is told.
    pub fn find(roots: &[PathBuf], report: &mut Report) -> Sources {
        Sources::at_most(MAX_FILES, roots, report)
    }

    fn at_most(files: usize, roots: &[PathBuf], report: &mut Report) -> Sources {
        let mut sources = Sources { left: files, ..Sources::default() };
        for root in roots {
            sources.walk(root, root, 0, report);
        }
        sources
    }

    fn walk(&mut self, root: &Path, dir: &Path, depth: usize, report: &mut Report) {
        let listed = fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries = match listed {
            Ok(entries) => entries,
            Err(e) => {
                let advice = "give a directory that can be read with --lua-path";
                return report.add(Change, "lua", dir.display().to_string(), format!("cannot be read: {e}"), advice);
            }
        };
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if self.full {
                return;
            }
            let path = entry.path();
            // A link to a directory may lead back.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if depth + 1 < MAX_DEPTH {
                    self.walk(root, &path, depth + 1, report);
                } else {
                    let what = format!("is the {MAX_DEPTH}th directory in a row, and not looked into");
                    report.add(Change, "lua", path.display().to_string(), what, "check it on its own");
                }
            } else if self.left == 0 {
                self.full = true;
                let what = "has more files than are looked at together, and this is the first that is not";
                report.add(Change, "lua", path.display().to_string(), what, "check the directories on their own");
            } else {
                self.left -= 1;
                self.add(root, path);
            }
        }
    }

    fn add(&mut self, root: &Path, path: PathBuf) {
        let below = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
        let stem = below.strip_suffix(".lua").or_else(|| below.strip_suffix(".so"));
        let Some(stem) = stem else { return };
        let module = stem.replace('/', ".");
        if let Some(plugin) =
            module.strip_prefix("apisix.plugins.").filter(|name| below.ends_with(".lua") && !name.contains('.'))
        {
            self.plugins.insert(plugin.to_owned());
        }
        if let Some(parent) = module.strip_suffix(".init") {
            self.modules.insert(parent.to_owned());
        }
        if below.ends_with(".lua") {
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            match self.places.get(&real) {
                Some(&at) if self.files[at].1.len() <= module.len() => {}
                Some(&at) => self.files[at] = (path, module.clone()),
                None => {
                    self.places.insert(real, self.files.len());
                    self.files.push((path, module.clone()));
                }
            }
        }
        self.modules.insert(module);
    }
}

/// A text file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, String> {
    let bytes = read(path, limit)?;
    String::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned())
}

/// A file of at most `limit` bytes.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, String> {
    let failed = |e: std::io::Error| format!("cannot be read: {e}");
    // Opening a pipe would wait for its other end.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err("cannot be read: it is no file".to_owned());
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    match bytes.len() as u64 > limit {
        true => Err(format!("has more than {limit} bytes, and is not read")),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_and_plugins_are_named_as_require_names_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("apisix/plugins/mine")).unwrap();
        for file in ["apisix/plugins/mine.lua", "apisix/plugins/mine/more.lua", "init.lua", "a.so", "notes.txt"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let mut report = Report::default();
        let sources = Sources::find(&[dir.path().to_owned(), dir.path().join("nowhere")], &mut report);
        assert_eq!(sources.files.len(), 3);
        assert_eq!(sources.plugins.iter().collect::<Vec<_>>(), ["mine"]);
        let modules: Vec<_> = sources.modules.iter().map(String::as_str).collect();
        assert_eq!(modules, ["a", "apisix.plugins.mine", "apisix.plugins.mine.more", "init"]);
        assert_eq!(report.exit_code(), 1, "a directory that is not there is told");
        assert_eq!(root_of(&dir.path().join("apisix/plugins")), dir.path());
    }

    #[test]
    fn a_file_that_several_roots_lead_to_is_looked_at_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("lua/apisix/plugins")).unwrap();
        fs::write(dir.path().join("lua/apisix/plugins/x.lua"), "").unwrap();
        std::os::unix::fs::symlink(dir.path().join("lua"), dir.path().join("link")).unwrap();
        let roots = [dir.path().to_owned(), dir.path().join("lua"), dir.path().join("link")];
        let sources = Sources::find(&roots, &mut Report::default());
        assert_eq!(sources.files, [(dir.path().join("lua/apisix/plugins/x.lua"), "apisix.plugins.x".to_owned())]);
        assert!(sources.modules.contains("lua.apisix.plugins.x") && sources.plugins.contains("x"));
    }

    #[test]
    fn so_many_files_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        for file in ["d/a.lua", "d/b.lua", "x.lua", "y.lua"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        for (limit, found) in [(5, 4), (4, 4), (3, 3), (1, 1)] {
            let mut report = Report::default();
            let sources = Sources::at_most(limit, &[dir.path().to_owned()], &mut report);
            assert_eq!((sources.files.len(), report.findings().count()), (found, usize::from(limit < 4)), "{limit}");
        }
    }

    #[test]
    fn a_file_has_a_largest_size_and_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).as_deref(), Ok("12345"));
        assert!(read_text(&path, 4).is_err_and(|e| e.contains("more than 4 bytes")));
        assert!(read_text(dir.path(), 4).is_err_and(|e| e.contains("no file")));
        fs::write(&path, b"\xff").unwrap();
        assert!(read_text(&path, 5).is_err_and(|e| e.contains("UTF-8")));
    }

    #[test]
    fn directories_are_followed_down_to_a_depth() {
        let dir = tempfile::tempdir().unwrap();
        let mut deep = dir.path().to_owned();
        for _ in 0..MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("x.lua"), "").unwrap();
        fs::write(deep.parent().unwrap().join("y.lua"), "").unwrap();
        let mut report = Report::default();
        let sources = Sources::find(&[dir.path().to_owned()], &mut report);
        assert_eq!((sources.files.len(), report.exit_code()), (1, 1));
    }
}
