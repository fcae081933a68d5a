# The client benchmark (tests/bench/README.md). Included by the Makefile.
BENCH_JSON ?= build/bench.json

.PHONY: bench bench-quick bench-peers
bench: setup ## our load generator and every installed rival on the same work, one table (about half an hour)
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python tests/bench/client_bench.py --json $(BENCH_JSON)

bench-quick: setup ## our load generator alone, under a minute
	$(BIN)/python tests/bench/client_bench.py --quick

bench-peers: setup ## install the rivals in environments of their own (~/.cache/harness/peers, about 9 GB)
	$(BIN)/python tests/bench/peers.py
