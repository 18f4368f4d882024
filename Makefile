# SPDX-License-Identifier: Apache-2.0
# Each target prints what it does. `make demo` and `make test` install what is missing (Debian
# packages by apt when root, cargo and Go modules) or say in one line what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup tools images build install place demo test unit e2e fuzz check deny bench simulate soak clean
PROFILE_DIR := target/debug
FUZZ_SECONDS ?= 10
PREFIX ?= /usr

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install Debian packages and check the toolchains
	@echo "== setup: packages and toolchains"
	@integration/scripts/setup.sh

tools: setup ## build nerdctl, containerd 2.x and test programs from their Go modules into target/tools
	@echo "== tools: nerdctl, containerd 2.x, conformance tests (kept in target/tools)"
	@integration/scripts/go-tools.sh target/tools

images: setup ## make the test image (Debian + Python) into target/images
	@echo "== images: Debian + Python (kept in target/images)"
	@integration/scripts/image.sh target/images/python

build: setup ## build all programs
	@echo "== build: sluice, sluiced, sluice-shim and the test programs"
	@cargo build --workspace --bins --locked

install: setup ## build for production and install below $(DESTDIR)$(PREFIX) (default /usr)
	@echo "== install: sluice, sluiced, sluice-shim and the systemd unit below $(DESTDIR)$(PREFIX)"
	@cargo build --release --locked -p sluice-snapshotter -p sluice-converter --bins
	@$(MAKE) --no-print-directory place BUILT=target/release

# The second half of install: what stands in BUILT to its places.
place:
	@install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	@install -d $(DESTDIR)/etc/sluice
	@install -m 755 $(BUILT)/sluice $(BUILT)/sluiced $(BUILT)/sluice-shim $(DESTDIR)$(PREFIX)/bin/
	@sed 's|/usr/bin/|$(PREFIX)/bin/|' packaging/systemd/sluiced.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/sluiced.service

demo: build images ## the whole job on real software: convert, run lazily, compare, clean up
	@if command -v go >/dev/null; then $(MAKE) --no-print-directory tools; fi
	@echo "== demo"
	@$(PROFILE_DIR)/demo

unit: setup ## unit, model, contract and fault tests of all crates
	@echo "== unit: unit, model, contract and fault tests"
	@cargo test --locked

# One selection of packages for all of it: another would resolve other features and build everything again.
E2E := identity lazy start boot prewarm crash storm faults mixed content budget stuck doctor contract harness cluster mirror mirrors unmodified oddities matrix clients registries convert formats docs
e2e: tools images ## end-to-end tests on real containerd (short form)
	@echo "== e2e: real containerd 1.6 and 2.x, runc, registry, kernel mounts"
	@cargo test --locked --workspace $(addprefix --test ,$(E2E)) -- --nocapture

fuzz: setup ## each fuzz target for FUZZ_SECONDS (default 10)
	@echo "== fuzz: $(FUZZ_SECONDS) s per target"
	@fuzz/run $(FUZZ_SECONDS)

test: tools images ## everything: units, models, contracts, faults, end-to-end, fuzz targets in short form
	@echo "== test: units, models, contracts, faults, end-to-end on real containerd 1.6 and 2.x"
	@cargo test --locked --workspace
	@$(MAKE) --no-print-directory fuzz
	@echo "== test: all passed"

deny: setup ## licences, sources and advisories of all crates, by cargo-deny (builds it once)
	@echo "== deny: licences, bans, sources, advisories"
	@integration/scripts/deny.sh target/tools

check: setup deny ## formatting, lints, unit and model tests, docs, licences and advisories
	@echo "== check: rustfmt, clippy, unit tests, docs"
	@cargo fmt --all --check
	@cargo clippy --locked --workspace --all-targets -- -D warnings
	@cargo test --locked
	@RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --workspace

# BENCH names some of the benchmarks and START gives options, e.g. BENCH=start START='--images nginx --runs 3' or
# BENCH='conversion reads' START='--conversion-images nginx --reads-images node --reads-rounds 7';
# SCALE those of what is large, e.g. BENCH=scale SCALE='--scenes many,files': the large image wants 32 GB of disk.
# (target/release/bench --help lists them). QUICK=1: a few cold starts and a verdict, in less than five minutes.
bench: tools images ## conversion, chunks into the store, reads, cold starts, new versions and what is large beside others, file systems, first reads, memory; release build; writes docs/benchmarks
	@echo "== bench: conversion, chunks into the store, reads, cold starts, new versions and what is large beside others, file systems, first reads, memory"
	@integration/scripts/go-tools.sh target/tools stargz soci
	@cargo build --release --workspace --bins --locked
	@target/release/bench $(if $(QUICK),--quick,--json docs/benchmarks/node.json --report docs/benchmarks) $(START) $(SCALE) $(BENCH)

# SIMULATE adds options, e.g. SIMULATE='--scenario mine.json' (target/debug/simulate --help lists them).
simulate: build ## clusters of 10 to 10,000 simulated nodes: registry egress, start times, load; draws docs/benchmarks
	@echo "== simulate: 10 to 10,000 nodes that start one image at once"
	@$(PROFILE_DIR)/simulate --variants --published --svg docs/benchmarks/cluster-simulated.svg \
		--json docs/benchmarks/cluster-simulated.json $(SIMULATE)
	@echo "== simulate: beside the real runs of make soak"
	@$(PROFILE_DIR)/simulate --calibrate docs/benchmarks/cluster-real.json

soak: tools images ## the full matrix: long end-to-end forms, ten minutes per fuzz target
	@echo "== soak"
	@SLUICE_LONG=1 $(MAKE) --no-print-directory e2e
	@echo "== soak: many daemons, one image; writes docs/benchmarks/cluster-real.json"
	@cargo test --locked --workspace --test cluster -- --ignored --nocapture --test-threads 1 long_
	@echo "== soak: storms of deaths under sixteen readers"
	@cargo test --locked --workspace --test storm -- --ignored --nocapture --test-threads 1 long_
	@echo "== soak: ten million entries"
	@cargo test --locked --workspace --test oddities -- --ignored --nocapture long_
	@echo "== soak: chunks through Spegel"
	@integration/scripts/go-tools.sh target/tools spegel
	@cargo test --locked --workspace --test mirrors -- --ignored --nocapture long_
	@echo "== soak: nerdctl build on a lazy image"
	@integration/scripts/go-tools.sh target/tools buildkit
	@cargo test --locked --workspace --test builds -- --ignored --nocapture long_
	@$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=600

clean: ## remove everything that was built or cached
	@rm -rf target fuzz/target
