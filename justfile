# `just` lists the recipes. Each is one command that also works without just.

_default:
    @just --list

# format, lint, documentation, the tests of the operator and of the documents
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
    cargo test --test suite --test docs

# all tests, the example's and the documentation's too
test:
    cargo test

# everything that CI runs
ci:
    .ci/run

# time attention on this machine; `just bench causal` for some cases
bench *filter:
    cargo bench --bench attention -- {{ filter }}

# time attention on an NVIDIA GPU over the papers' grid; `just bench-cuda --quick` for a few points
bench-cuda *args:
    cargo bench --features cuda --bench attention -- {{ args }}

# rewrite what is generated: the documents' tables and docs/plots, docs/kernels.md from a compilation
tables:
    CANDLE_FA2_UPDATE=1 cargo test --test docs
    .ci/kernel-table --update

# lint the feature `cuda` and compile its kernels, without a GPU or a CUDA toolkit
check-cuda:
    .ci/cuda-clippy
    .ci/kernel-table

# the tests on this machine's GPU
gpu:
    CANDLE_FA2_REQUIRE_GPU=1 cargo test --features cuda --test suite --example gpt

# its kernels under compute-sanitizer; `just sanitize racecheck` for one of its tools
sanitize *tools:
    .ci/sanitize {{ tools }}

# train the small GPT
gpt *args:
    cargo run --release --example gpt -- {{ args }}
