#!/usr/bin/env bash
# Everything a change must pass: format, lints, tests, documentation.
# On a fresh Debian machine it needs Rust (rustup) and nothing else; a C compiler, make and Open MPI are installed
# if they are missing.
set -euo pipefail
cd "$(dirname "$0")"

packages=()
command -v cc >/dev/null || packages+=(gcc libc6-dev)
command -v make >/dev/null || packages+=(make)
# Training on many ranks; libclang reads MPI's headers.
command -v mpicc >/dev/null && command -v mpirun >/dev/null || packages+=(libopenmpi-dev openmpi-bin)
compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || packages+=(libclang-dev)
if [ ${#packages[@]} -gt 0 ]; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update && $as_root apt-get install -y --no-install-recommends "${packages[@]}"
fi
features=(--features mistral4-cli/mpi)

echo "== format"
cargo fmt --all --check
echo "== lints"
cargo clippy --workspace --all-targets --locked "${features[@]}" -- -D warnings
echo "== tests"
if command -v cargo-nextest >/dev/null; then
    cargo nextest run --workspace --locked "${features[@]}"
else
    cargo test --workspace --locked "${features[@]}"
fi
cargo test --workspace --locked "${features[@]}" --doc
echo "== documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked "${features[@]}"
