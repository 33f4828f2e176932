# Thin: what there is to do is done by cargo and the scripts in ci/. Only bash, git and make are assumed;
# `ci/setup` brings the rest, and `ci/setup env` says where it put it.
SHELL := /bin/bash
.DEFAULT_GOAL := all
.PHONY: all clean test fuzz simulate mutants torture load unload status install help demo bench

PREFIX ?= /usr/local
# What `make fuzz` runs, and for how long each.
TARGET ?= chains metadata messages control
FUZZ_SECONDS ?= 60
with_tools = eval "$$(ci/setup env)" &&
# Where `ci/setup env` finds no cargo, it has to be brought first.
with_cargo = $(with_tools) { command -v cargo >/dev/null || { ci/setup build && $(with_tools) :; }; } &&

all: ## build the program: target/release/vhost-remap
	@$(with_cargo) cargo build --release --locked

clean: ## remove everything that was built
	rm -rf target tests/fuzz/target

test: ## run every test (REQUIRE_ALL=1: a skip that ci/allowed-skips does not list fails)
	@ci/test

fuzz: ## run the fuzz targets, each for FUZZ_SECONDS=60, or only TARGET=chains
	@$(with_tools) ci/fuzz $(TARGET)

load: ## start a server: PRIMARY=disk.img [SPARE=…] [SOCKET=…] [OPTIONS='--create --size 10G']
	@ci/server load

unload: ## stop the server of SOCKET=…, which flushes and closes its volume
	@ci/server unload

status: ## show the state of the server of SOCKET=…
	@ci/server status

install: all ## copy the program, and what QEMU, libvirt and systemd read of it, under $(DESTDIR)$(PREFIX)
	install -D -m 0755 "$${CARGO_TARGET_DIR:-target}/release/vhost-remap" "$(DESTDIR)$(PREFIX)/bin/vhost-remap"
	@ci/packaging/install "$(DESTDIR)" "$(PREFIX)"

help: ## list these
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | \
	    while IFS='|' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done
	@echo; ci/server help

demo: all ## boot a guest on a failing disk and watch it heal
	@$(with_tools) ci/demo

simulate: ## run the simulator for long: SEEDS=1000000 [FIRST_SEED=0]; a failure is shrunk and can be replayed
	@$(with_cargo) ci/simulate

mutants: ## take out one safeguard after the other and see whether a test notices: [MUTANTS='commit-* …'] (hours)
	@$(with_cargo) ci/mutants $(MUTANTS)

bench: ## measure it beside qemu-storage-daemon and fio (20 minutes on a quiet machine): [BENCH_CASES='QD 128'] …
	@ci/setup bench || true # what is missing is not measured
	@$(with_cargo) ci/bench

torture: ## kill a working server 1,000 times (KILLS=…; SEED=… to do it again), and 200 times (VM_KILLS=…) under a guest
	@echo "follow it with: tail -F target/test-logs/torture.log"
	@$(with_cargo) export VHOST_REMAP_KILLS="$${KILLS:-1000}" VHOST_REMAP_SEED="$${SEED:-$$((RANDOM << 15 | RANDOM))}" && \
	    STEP_SECONDS=$$((600 + VHOST_REMAP_KILLS * 5)) ci/test torture
	@$(with_cargo) export VHOST_REMAP_VM_KILLS="$${VM_KILLS:-200}" && \
	    STEP_SECONDS=$$((600 + VHOST_REMAP_VM_KILLS * 15)) ci/test vm_kills

# What is given on make's command line reaches the scripts by itself. Not so what has a value above; and what has none
# must not reach them empty.
export FUZZ_SECONDS
