//! The `moongate` program: the command line over the library.

use std::process::ExitCode;

use moongate::{app, cli};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(app::run)
}
