//! `lfs`: files and directories (LuaFileSystem 1.8's manual). Errors are `nil, text, errno`.

use std::{
    ffi::{OsStr, c_int},
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
    time::{Duration, SystemTime},
};

use super::Answer;
use crate::{
    error::Result,
    lua::api::{Api, Phases, Stack},
};

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.lfs.attributes", any, "attributes(path, follow links) -> table | nil, err, errno", attributes)?;
    api.func("native.lfs.list", any, "list(path) -> array of names | nil, err, errno", list)?;
    api.func("native.lfs.chdir", any, "chdir(path): for the whole process", |s| {
        answer(s, std::env::set_current_dir(path(s, 1)?))
    })?;
    api.func("native.lfs.currentdir", any, "currentdir() -> path", |s| match std::env::current_dir() {
        Ok(dir) => Ok(s.push_bytes(dir.as_os_str().as_bytes())),
        Err(e) => answer(s, Err(e)),
    })?;
    api.func("native.lfs.mkdir", any, "mkdir(path)", |s| answer(s, fs::create_dir(path(s, 1)?)))?;
    api.func("native.lfs.rmdir", any, "rmdir(path)", |s| answer(s, fs::remove_dir(path(s, 1)?)))?;
    api.func("native.lfs.link", any, "link(old, new, symbolic)", |s| {
        let (old, new) = (path(s, 1)?, path(s, 2)?);
        answer(s, if s.boolean(3) { std::os::unix::fs::symlink(old, new) } else { fs::hard_link(old, new) })
    })?;
    api.func("native.lfs.touch", any, "touch(path, access?, modification?): seconds", touch)?;
    api.func("native.lfs.lock", any, "lock(fd, \"r\" | \"w\" | \"u\", start, length)", lock)
}

fn path(s: &Stack, i: c_int) -> std::result::Result<&Path, crate::lua::api::Raise> {
    s.arg_bytes(i).map(|bytes| Path::new(OsStr::from_bytes(bytes)))
}

fn answer(s: &Stack, done: io::Result<()>) -> Answer {
    match done {
        Ok(()) => Ok(s.push_bool(true)),
        Err(e) => failed(s, &e),
    }
}

/// The system's words without Rust's `(os error 2)`.
pub(in crate::lua) fn words(e: &io::Error) -> String {
    e.to_string().split(" (os error").next().unwrap_or_default().to_owned()
}

fn failed(s: &Stack, e: &io::Error) -> Answer {
    Ok(s.fail(words(e))? + s.push_number(e.raw_os_error().unwrap_or_default().into()))
}

fn attributes(s: &Stack) -> Answer {
    let (path, follow) = (path(s, 1)?, s.boolean(2));
    let data = match if follow { fs::metadata(path) } else { fs::symlink_metadata(path) } {
        Ok(data) => data,
        Err(e) => return failed(s, &e),
    };
    s.push_table(0, 16);
    let text = |name: &str, text: &[u8]| {
        s.push_bytes(text);
        s.set(-2, name);
    };
    text("mode", kind(&data.file_type()).as_bytes());
    text("permissions", permissions(data.mode()).as_bytes());
    if !follow && let Ok(target) = fs::read_link(path) {
        text("target", target.as_os_str().as_bytes());
    }
    let numbers = [
        ("dev", data.dev() as f64),
        ("ino", data.ino() as f64),
        ("nlink", data.nlink() as f64),
        ("uid", data.uid().into()),
        ("gid", data.gid().into()),
        ("rdev", data.rdev() as f64),
        ("access", data.atime() as f64),
        ("modification", data.mtime() as f64),
        ("change", data.ctime() as f64),
        ("size", data.size() as f64),
        ("blocks", data.blocks() as f64),
        ("blksize", data.blksize() as f64),
    ];
    for (name, number) in numbers {
        s.push_number(number);
        s.set(-2, name);
    }
    Ok(1)
}

fn kind(kind: &fs::FileType) -> &'static str {
    match kind {
        k if k.is_file() => "file",
        k if k.is_dir() => "directory",
        k if k.is_symlink() => "link",
        k if k.is_socket() => "socket",
        k if k.is_fifo() => "named pipe",
        k if k.is_char_device() => "char device",
        k if k.is_block_device() => "block device",
        _ => "other",
    }
}

fn permissions(mode: u32) -> String {
    (0..9).map(|i| if mode & (0o400 >> i) != 0 { ['r', 'w', 'x'][i % 3] } else { '-' }).collect()
}

fn list(s: &Stack) -> Answer {
    let names: io::Result<Vec<_>> =
        fs::read_dir(path(s, 1)?).and_then(|entries| entries.map(|e| e.map(|e| e.file_name())).collect());
    let names = match names {
        Ok(names) => names,
        Err(e) => return failed(s, &e),
    };
    s.push_table(names.len() + 2, 0);
    let all = [OsStr::new("."), OsStr::new("..")].into_iter().chain(names.iter().map(|n| n.as_os_str()));
    for (i, name) in all.enumerate() {
        s.push_bytes(name.as_bytes());
        s.set_index(-2, i + 1);
    }
    Ok(1)
}

fn touch(s: &Stack) -> Answer {
    let now = SystemTime::now();
    let time = |seconds: Option<f64>| match seconds {
        Some(seconds) => SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds.clamp(0.0, 1e11)),
        None => now,
    };
    let access = s.opt_number(2)?;
    let times = fs::FileTimes::new().set_accessed(time(access)).set_modified(time(s.opt_number(3)?.or(access)));
    // Opened without a wish to read: directories are touched as well.
    let path = path(s, 1)?;
    let opened = fs::File::open(path).or_else(|_| fs::OpenOptions::new().append(true).open(path));
    answer(s, opened.and_then(|file| file.set_times(times)))
}

fn lock(s: &Stack) -> Answer {
    let kind = match s.arg_bytes(2)? {
        b"r" => libc::F_RDLCK,
        b"w" => libc::F_WRLCK,
        b"u" => libc::F_UNLCK,
        _ => return Err(s.argument_error(2, "invalid mode")),
    };
    let (start, len) = (s.opt_number(3)?.unwrap_or(0.0), s.opt_number(4)?.unwrap_or(0.0));
    // SAFETY: all zeros is a valid flock.
    let mut region: libc::flock = unsafe { std::mem::zeroed() };
    (region.l_type, region.l_whence) = (kind as _, libc::SEEK_SET as _);
    (region.l_start, region.l_len) = (start as _, len as _);
    // SAFETY: the region lives through the call; a descriptor that is none is an error.
    let done = unsafe { libc::fcntl(s.arg_int(1)? as c_int, libc::F_SETLK, &raw mut region) };
    answer(s, if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) })
}
