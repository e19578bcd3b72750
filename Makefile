# make run    builds the gateway and runs it in the foreground, with what ARGS says
# make test   formats, lints, and every test against real peers: what .ci/run runs
# make bench  measures it beside nginx and haproxy (benches/gateway --help)

CARGO ?= cargo
LUACHECK ?= luacheck
has = $(shell command -v $(1) 2>/dev/null)
# $(call need,what is there,the package that brings it): the package when nothing is there
need = $(if $(strip $(1)),,$(2))

PROTOC ?= $(call has,protoc)
# protoc finds its own .proto files beside itself; Debian packs them apart.
PROTO_FILES = $(wildcard $(dir $(PROTOC))../include/google/protobuf/empty.proto)
BUILD_PACKAGES = $(call need,$(PROTOC),protobuf-compiler) $(call need,$(PROTO_FILES),libprotobuf-dev)
# A service's place, which is not on everybody's path.
MARIADBD = $(or $(call has,mariadbd),$(wildcard /usr/sbin/mariadbd))
# Libraries for t/debian.rs: a module of each, and the package that brings it.
LUA_LIBRARIES = pl.Date=lua-penlight luaunit=lua-unit inspect=lua-inspect basexx=lua-basexx dkjson=lua-dkjson \
	argparse=lua-argparse say.init=lua-say luassert.init=lua-luassert binaryheap=lua-binaryheap MessagePack=lua-messagepack \
	markdown=lua-markdown fifo=lua-fifo moses=lua-moses uri=lua-uri socket.url=lua-socket re=lua-lpeg \
	lpeg_patterns.uri=lua-lpeg-patterns
library_file = /usr/share/lua/5.1/$(subst .,/,$(firstword $(subst =, ,$(1)))).lua
LUA_PACKAGES = $(foreach library,$(LUA_LIBRARIES),$(call need,$(wildcard $(call library_file,$(library))),$(lastword $(subst =, ,$(library)))))
TEST_PACKAGES = $(call need,$(call has,etcd),etcd-server) $(call need,$(call has,etcdctl),etcd-client) \
	$(call need,$(call has,redis-server),redis-server) $(call need,$(call has,memcached),memcached) \
	$(call need,$(MARIADBD),mariadb-server) $(call need,$(call has,prometheus),prometheus) $(call need,$(call has,openssl),openssl) \
	$(call need,$(shell /usr/bin/python3 -c 'import grpc; print(1)' 2>/dev/null),python3-grpcio) \
	$(call need,$(call has,$(LUACHECK)),lua-check) $(LUA_PACKAGES)

.PHONY: run build test lint tests bench deps test-deps

run: deps
	$(CARGO) run --locked --release -- $(ARGS)

build: deps
	$(CARGO) build --locked --release

test: lint tests

lint: deps test-deps
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(LUACHECK) -q .

# After lint, also under make -j: what does not lint is not worth the minutes.
tests: lint
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
	then set -x; $(CARGO) nextest run --locked --no-fail-fast; \
	else set -x; $(CARGO) test --locked --no-fail-fast; fi

bench: deps
	benches/gateway $(ARGS)

# What building needs: the etcd client compiles etcd's .proto files.
deps:
	@$(if $(strip $(BUILD_PACKAGES)),.ci/install $(strip $(BUILD_PACKAGES)),:)

# What testing needs: real peers, which each test starts for itself, and the linters.
test-deps: deps
	@$(if $(strip $(TEST_PACKAGES)),.ci/install $(strip $(TEST_PACKAGES)),:)
	@$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy
