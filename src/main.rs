//! The `moongate` program: the command line over the library.

use std::process::ExitCode;

use moongate::{
    cli,
    conf::{Config, Warning},
    error::{Error, Kind, Result},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(run)
}

/// Says so instead of pretending: the listeners are not wired up in this version.
fn run(_: Config, _: Vec<Warning>) -> Result<()> {
    Err(Error::internal(Kind::Other).context("this version checks its configuration but does not serve yet"))
}
