#!/usr/bin/env bash
# Everything a change must pass: format, lints, tests, documentation.
# On a fresh Debian machine it needs Rust (rustup) and nothing else; a C compiler and make are installed if they are missing.
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v cc >/dev/null || ! command -v make >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update && $as_root apt-get install -y --no-install-recommends gcc libc6-dev make
fi

echo "== format"
cargo fmt --all --check
echo "== lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
echo "== tests"
if command -v cargo-nextest >/dev/null; then
    cargo nextest run --workspace --locked
else
    cargo test --workspace --locked
fi
cargo test --workspace --locked --doc
echo "== documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
