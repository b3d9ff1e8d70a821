# Everything a person or CI does with this tree. `make help` lists it.
# Needed beforehand: a Rust toolchain and root. The rest is installed by scripts/install-deps.

CARGO   ?= cargo
PREFIX  ?= /usr
DESTDIR ?=
# Where the programs to install are.
BUILT ?= target/release
# .ci/run sets --locked: a Cargo.lock that does not fit is an error there, not something to mend.
CARGO_FLAGS ?=

BINS  := varve varve-agent varve-receiver
UNITS := varve-agent.service varve-receiver.service varve-drill@.service varve-drill@.timer
# Where Debian and Fedora read them. No sysusers: both daemons need root for block devices (see their units).
UNITDIR := $(PREFIX)/lib/systemd/system
TMPFDIR := $(PREFIX)/lib/tmpfiles.d
DOCDIR  := $(PREFIX)/share/doc/varve

.PHONY: help build demo test soak vm bench fuzz lint install uninstall clean need-cargo need-root

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

need-cargo:
	@command -v $(CARGO) >/dev/null || { echo "make: no '$(CARGO)' in PATH. Install Rust with rustup; under sudo: sudo env PATH=\"\$$PATH\" make …" >&2; exit 1; }

# Capture loads programs into the kernel, and the tests use loop devices and mounts.
need-root:
	@[ "$$(id -u)" = 0 ] || { echo "make: this needs root (BPF, loop devices, mounts): sudo env PATH=\"\$$PATH\" make $(MAKECMDGOALS)" >&2; exit 1; }

build: need-cargo ## the three programs, in release mode, into target/release
	@scripts/install-deps build
	$(CARGO) build $(CARGO_FLAGS) --release --workspace --bins

demo: need-root build ## protect a live database volume on this machine and prove the replica equal
	@scripts/install-deps demo
	@scripts/demo

# One build of programs and tests together: the end-to-end tests start the programs from target/debug.
test: need-root need-cargo ## every test (installs what they need)
	@scripts/install-deps build test
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins --tests
	$(CARGO) test $(CARGO_FLAGS) --quiet --workspace --doc
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
	then set -x; $(CARGO) nextest run $(CARGO_FLAGS) --workspace --config-file tests/nextest.toml; \
	else set -x; $(CARGO) test $(CARGO_FLAGS) --workspace --bins --lib --tests; fi

# Not in `make test`: it wants QEMU and two of Debian's kernels, and takes ten minutes.
vm: need-root need-cargo ## panics, lost power and capture on Debian's kernels 6.1 and 6.12, in QEMU guests
	@scripts/install-deps build test vm
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins --tests
	$(CARGO) test $(CARGO_FLAGS) -p varve-tests --test vm -- --ignored --nocapture --test-threads=1

# Long and random; `make test` has a short version of each. SOAK_SECONDS=1800.
soak: need-root need-cargo ## random load and random faults for the better part of an hour, every round judged
	@scripts/install-deps build test
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins --tests
	CARGO_FLAGS="$(CARGO_FLAGS)" scripts/soak

bench: need-root build ## speed and memory, as ratios of paired runs
	@scripts/install-deps test
	$(CARGO) run $(CARGO_FLAGS) --release -p varve-bench

# A workspace of its own, built with a sanitizer: tests/fuzz/run says how. FUZZ_SECONDS=20 for each.
fuzz: need-cargo ## every decoder against hostile input, 20 s each
	@scripts/install-deps build
	CARGO_FLAGS="$(CARGO_FLAGS)" tests/fuzz/run

lint: need-cargo ## format, warnings as errors, licences of dependencies, scripts, units
	@scripts/install-deps build lint
	@scripts/lint

install: ## programs, units, docs below $(DESTDIR)$(PREFIX); run 'make build' first
	install -d $(foreach d,$(PREFIX)/bin $(UNITDIR) $(TMPFDIR) $(DOCDIR),"$(DESTDIR)$(d)")
	install -m 0755 $(addprefix $(BUILT)/,$(BINS)) "$(DESTDIR)$(PREFIX)/bin/"
	for u in $(UNITS); do sed 's,/usr/\(bin\|share\)/,$(PREFIX)/\1/,' "systemd/$$u" > "$(DESTDIR)$(UNITDIR)/$$u" || exit 1; done
	install -m 0644 systemd/tmpfiles.conf "$(DESTDIR)$(TMPFDIR)/varve.conf"
	install -m 0644 README.md LICENSE NOTICE docs/*.md "$(DESTDIR)$(DOCDIR)/"
	install -m 0644 takeover/examples/db.toml "$(DESTDIR)$(DOCDIR)/takeover-example.toml"

uninstall: ## what 'make install' put there; data and configuration stay
	@# Capture outlives the agent: nobody would end it later.
	@if [ -z "$(DESTDIR)" ] && [ -x "$(PREFIX)/bin/varve-agent" ]; then \
	  if [ -d /run/systemd/system ]; then systemctl disable --now varve-agent 2>/dev/null || true; fi; \
	  "$(PREFIX)/bin/varve-agent" --unpin-all; fi
	rm -f $(foreach b,$(BINS),"$(DESTDIR)$(PREFIX)/bin/$(b)") $(foreach u,$(UNITS),"$(DESTDIR)$(UNITDIR)/$(u)")
	rm -f "$(DESTDIR)$(TMPFDIR)/varve.conf"
	rm -rf "$(DESTDIR)$(DOCDIR)"

clean: need-cargo ## the build's output
	$(CARGO) clean
