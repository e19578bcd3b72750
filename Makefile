# The commands of the README. Everything else is cargo's own.

.PHONY: run test check deps test-deps

# The gateway in the foreground, under this directory.
run: deps
	cargo run --release --locked

# What CI runs: format, lints, then every test against real peers.
test: deps test-deps check
	@if cargo nextest --version >/dev/null 2>&1; then \
		echo "cargo nextest run"; cargo nextest run --locked; \
	else \
		echo "cargo test"; cargo test --locked; \
	fi

check: deps
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

# protoc and its include files: building the etcd client needs both.
deps:
	@tools/need protoc protobuf-compiler
	@tools/need /usr/include/google/protobuf/any.proto libprotobuf-dev

# What the tests start. A peer that does not run beforehand is no obstacle: each test starts its own.
test-deps:
	@tools/need etcd etcd-server
	@tools/need redis-server redis-server
