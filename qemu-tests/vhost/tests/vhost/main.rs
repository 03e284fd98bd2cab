//! The backend with a front end in this process: memory in a memfd, and messages over the socket, as a VMM has them.

#![cfg(target_os = "linux")]

mod contexts;
mod front_end;
mod hostile;
mod raw;
mod rings;
