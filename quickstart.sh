#!/usr/bin/env bash
# Builds the binary and runs the quickstart: a few minutes of training on the bundled images, then an answer about one.
# On a fresh Debian machine it needs Rust (rustup) and nothing else; a C compiler and make are installed if they are missing.
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v cc >/dev/null || ! command -v make >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update && $as_root apt-get install -y --no-install-recommends gcc libc6-dev make
fi

exec cargo run --release --locked -p mistral4-cli -- quickstart "$@"
