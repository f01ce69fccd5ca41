//! The program as a user meets it: what it prints, what it writes, and how it ends.

mod commands;
mod data;
mod errors;
mod quantize;
mod support;
