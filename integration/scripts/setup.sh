#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that building and testing need, when root; else names what is missing.
set -euo pipefail
# program=package; a program that is there counts as installed, wherever it came from.
needed=(gcc=build-essential g++=g++ make=make protoc=protobuf-compiler git=git curl=curl
  containerd=containerd ctr=containerd runc=runc docker-registry=docker-registry skopeo=skopeo umoci=umoci
  debootstrap=debootstrap zstd=zstd gzip=gzip fsck.erofs=erofs-utils setcap=libcap2-bin mount=mount ip=iproute2
  faketime=faketime pigz=pigz tc=iproute2 iptables=iptables ebtables=iptables openssl=openssl unshare=util-linux)
# Packages with no program of their own name to look for.
files=(/usr/bin/busybox=busybox-static /usr/lib/cni/bridge=containernetworking-plugins /usr/include/zlib.h=zlib1g-dev)
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:$HOME/.cargo/bin:/usr/local/go/bin
missing=()
for pair in "${needed[@]}"; do
  command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
for pair in "${files[@]}"; do [ -e "${pair%%=*}" ] || [ -e "${pair%%=*}.static" ] || missing+=("${pair#*=}"); done
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ ${#missing[@]} -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: missing packages: ${missing[*]} (as root: apt-get install ${missing[*]})" >&2
    exit 1
  fi
  echo "   apt: ${missing[*]}"
  # Installing a server must not start it.
  policy=/usr/sbin/policy-rc.d
  made=
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1; }
  trap '[ -z "$made" ] || rm -f $policy' EXIT
  log=$(mktemp)
  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "${missing[@]}"; } >"$log" 2>&1 ||
    { tail -20 "$log" >&2; exit 1; }
  rm -f "$log"
fi
if ! command -v cargo >/dev/null; then
  echo "setup: Rust is missing: install it with rustup (version in rust-toolchain.toml)" >&2
  exit 1
fi
command -v go >/dev/null || echo "   note: Go is missing; the demo then uses 'sluice pull' and 'ctr run', and 'make test' cannot run nerdctl"
[ "$(id -u)" = 0 ] || echo "   note: not root; mounts and containers need root"
