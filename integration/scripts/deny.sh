#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks the crates that Sluice is built from against deny.toml: licences, bans, sources, advisories.
# cargo-deny is built by cargo into DIR, once, where it is not there already (some minutes).
# The advisory database is fetched from the network. Where it cannot be had, that is said and the rest is checked;
# SLUICE_DENY_ADVISORIES=1 makes it an error.
# Usage: deny.sh DIR
set -euo pipefail
dir=${1:?usage: deny.sh DIR}
version=0.20.2
export PATH=$PATH:$HOME/.cargo/bin
deny=$dir/bin/cargo-deny
if [ ! -x "$deny" ]; then deny=$(command -v cargo-deny || true); fi
if [ -z "$deny" ]; then
  echo "   cargo: cargo-deny $version"
  log=$(mktemp)
  cargo install --quiet --locked --root "$dir" --target-dir "$dir/cargo-deny.build" "cargo-deny@$version" >"$log" 2>&1 ||
    { tail -5 "$log" >&2; rm -f "$log"; echo "deny: cargo-deny cannot be built: NOTHING was checked" >&2; exit 1; }
  rm -rf "$log" "$dir/cargo-deny.build"
  deny=$dir/bin/cargo-deny
fi
# A subcommand of cargo: its first argument is its name.
"$deny" --locked check --hide-inclusion-graph licenses bans sources
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if timeout 120 "$deny" --locked fetch db >"$log" 2>&1; then
  "$deny" --locked check --hide-inclusion-graph --disable-fetch advisories
elif [ "${SLUICE_DENY_ADVISORIES:-0}" = 1 ]; then
  grep -v '^ *$' "$log" | tail -3 >&2
  echo "deny: the advisory database cannot be fetched" >&2
  exit 1
else
  echo "deny: ADVISORIES WERE NOT CHECKED: their database cannot be fetched ($(grep -v '^ *$' "$log" | tail -1 | cut -c1-120)); licences, bans and sources are good"
fi
