# The client benchmark (tests/bench/README.md). Included by the Makefile.
BENCH_JSON ?= build/bench.json

.PHONY: bench bench-quick bench-peers
bench: setup ## our load generator and every installed rival on the same work, one table
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python tests/bench/client_bench.py --json $(BENCH_JSON)

bench-quick: setup ## our load generator alone
	$(BIN)/python tests/bench/client_bench.py --quick

bench-peers: setup ## install the rivals in environments of their own (~/.cache/harness/peers)
	$(BIN)/python tests/bench/peers.py
