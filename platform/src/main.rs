//! The kernel binary.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod kernel;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    eprintln!("this is a kernel: `cargo xtask run` boots it");
    std::process::ExitCode::from(2)
}
