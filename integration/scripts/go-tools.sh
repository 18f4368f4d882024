#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the Go programs that tests need from their modules into DIR (kept there between runs):
#   nerdctl 1.7.7 (for containerd 1.6), nerdctl 2.1.2 and containerd 2.x with its shim and ctr,
#   containerd's snapshotter test suite (integration/gosuite), the conformance tests of the
#   distribution specification, crictl, a runc that makes idmapped mounts, and integration/toccheck, which reads what
#   `sluice convert --format` writes with the code of others. Only when named: Spegel and BuildKit, for long tests, and
#   what `bench start` compares with: stargz-snapshotter and SOCI (integration/peers) and nydus-snapshotter.
# Usage: go-tools.sh DIR [TOOL ...]; TOOL: nerdctl1 nerdctl2 containerd2 suite conformance crictl runc toccheck
#   buildkit spegel stargz soci nydus (default: up to toccheck).
set -euo pipefail
dir=${1:?usage: go-tools.sh DIR [TOOL ...]}
shift
dir=$(mkdir -p "$dir" && cd "$dir" && pwd)
[ $# -gt 0 ] || set -- nerdctl1 nerdctl2 containerd2 suite conformance crictl runc toccheck
command -v go >/dev/null || { echo "go-tools: Go is missing (https://go.dev, or Debian's golang); nerdctl tests need it" >&2; exit 1; }
# What the compiler caches is gigabytes, and of no use once the programs stand in DIR.
GOCACHE=$(mktemp -d "${TMPDIR:-/tmp}/sluice-gocache.XXXXXX")
export GOCACHE
trap 'rm -rf "$GOCACHE"' EXIT

# build MODULE VERSION OUT=PACKAGE ...
build() {
  local module=$1 version=$2 stamp tmp
  shift 2
  stamp=$dir/.$(echo "$module@$version" | tr '/' '_')
  [ -e "$stamp" ] && return 0
  tmp=$(mktemp -d "${TMPDIR:-/tmp}/sluice-go.XXXXXX")
  echo "   go: $module@$version"
  ( cd "$tmp" && go mod init sluice.invalid/tools >/dev/null 2>&1 && go get "$module@$version" >"$tmp/log" 2>&1 || { tail -20 "$tmp/log" >&2; exit 1; }
    for pair in "$@"; do
      CGO_ENABLED=${cgo:-0} go build -mod=mod -trimpath -ldflags '-s -w' -o "$dir/${pair%%=*}" "$module${pair#*=}" >"$tmp/log" 2>&1 || { tail -20 "$tmp/log" >&2; exit 1; }
    done ) || { rm -rf "$tmp"; return 1; }
  rm -rf "$tmp"
  touch "$stamp"
}
# peer NAME: a program of integration/peers; cgo, for zlib.
peer() {
  local source
  source=$(dirname "$(readlink -f "$0")")/../peers/$1
  [ -e "$dir/$1-peer" ] && [ -z "$(find "$source" -newer "$dir/$1-peer" -type f)" ] && return 0
  echo "   go: $1, for benchmarks"
  (cd "$source" && go build -mod=readonly -trimpath -ldflags '-s -w' -o "$dir/$1-peer" .)
}
for tool in "$@"; do
  case $tool in
  nerdctl1) build github.com/containerd/nerdctl v1.7.7 nerdctl1=/cmd/nerdctl ;;
  nerdctl2) build github.com/containerd/nerdctl/v2 v2.1.2 nerdctl2=/cmd/nerdctl ;;
  containerd2) build github.com/containerd/containerd/v2 v2.3.7 containerd2=/cmd/containerd ctr2=/cmd/ctr containerd-shim-runc-v2=/cmd/containerd-shim-runc-v2 ;;
  conformance) build github.com/opencontainers/distribution-spec/conformance v0.0.0-20260831232431-97274622c111 oci-conformance= ;;
  crictl) build sigs.k8s.io/cri-tools v1.34.0 crictl=/cmd/crictl ;;
  runc) cgo=1 build github.com/opencontainers/runc v1.3.6 runc-idmap= ;;
  buildkit) build github.com/moby/buildkit v0.34.2 buildkitd=/cmd/buildkitd buildctl=/cmd/buildctl ;;
  spegel) build github.com/spegel-org/spegel v0.7.3 spegel= ;;
  suite)
    suite=$(dirname "$(readlink -f "$0")")/../gosuite
    if [ ! -e "$dir/snapshotter-suite" ] || [ -n "$(find "$suite" -newer "$dir/snapshotter-suite" -type f)" ]; then
      echo "   go: containerd's snapshotter test suite"
      (cd "$suite" && CGO_ENABLED=0 go test -c -mod=readonly -o "$dir/snapshotter-suite" .)
    fi ;;
  toccheck)
    toccheck=$(dirname "$(readlink -f "$0")")/../toccheck
    if [ ! -e "$dir/toccheck" ] || [ -n "$(find "$toccheck" -newer "$dir/toccheck" -type f)" ]; then
      echo "   go: toccheck"
      (cd "$toccheck" && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags '-s -w' -o "$dir/toccheck" .)
    fi ;;
  stargz | soci) peer "$tool" ;;
  nydus) build github.com/containerd/nydus-snapshotter v0.16.1 containerd-nydus-grpc=/cmd/containerd-nydus-grpc ;;
  *) echo "go-tools: unknown tool $tool" >&2; exit 2 ;;
  esac
done
