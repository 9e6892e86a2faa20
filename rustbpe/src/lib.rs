//! A trainer and encoder for byte-level BPE: text -> chunks (`scan`) -> counts (`count`, `chunks`) -> merges
//! (`bpe`) -> token ids (`vocabulary`).
//!
//! Everything but `python` is plain Rust, built and tested without Python; maturin turns the bindings on.

pub mod bpe;
pub mod chunks;
pub mod count;
#[cfg(feature = "python")]
mod python;
pub mod scan;
pub mod vocabulary;

/// What went wrong, in one line for the user.
#[derive(Debug)]
pub struct Error(pub String);
