//! A trainer and encoder for byte-level BPE: text -> chunks (`scan`) -> counts (`count`, `chunks`) -> merges
//! (`bpe`) -> token ids (`vocabulary`).
//!
//! All modules except `python` are plain Rust, built and tested without Python; maturin enables the bindings.

pub mod bpe;
pub mod chunks;
pub mod count;
#[cfg(feature = "python")]
mod python;
pub mod scan;
pub mod vocabulary;

/// An error message for the user, in one line.
#[derive(Debug)]
pub struct Error(pub String);
