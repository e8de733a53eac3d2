#!/usr/bin/env python3
"""Times PyTorch's operators, eager and compiled, over the cells of crates/fused-ops/benches/operators.rs, on this GPU.

    peers_ops.py --csv peers.csv               every cell; the columns are those of the bench, without of_copy
    peers_ops.py --csv peers.csv norm bf16     the cells whose name contains both words
    peers_ops.py --compare ours.csv peers.csv  prints the rows of both side by side; needs no GPU

A time is the median of several samples between CUDA events. A sample is some milliseconds of calls one after another. `share` is the
share of the rate of a copy of 1 GiB in the same run; for linear_cross_entropy, that of its three matrix products alone. The backward is
torch.autograd.grad of the result, whose gradient exists before. linear_cross_entropy in PyTorch is a product and a cross-entropy, which
hold all logits; where they do not fit, the cell is left out.
"""

import argparse
import csv
import statistics
import sys
import time

COLUMNS = ("peer", "operator", "pass", "dtype", "shape", "us", "us_min", "mb", "gbps", "share", "host_us")
SAMPLES, SAMPLE_MS, MOST_CALLS = 9, 3.0, 64

NORMS = ((32768, 768), (16384, 1024), (8192, 2048), (8192, 4096), (4096, 8192))
LOGITS = ((8192, 50304), (8192, 50257), (4096, 128256))
LINEARS = ((32768, 768, 50304), (16384, 1024, 50304), (8192, 2048, 50304))
ACTIVATION = (32768, 3072)
BATCH, SEQLEN, HEADS, HEAD_DIM, VOCAB = 32, 1024, 12, 64, 50304
PARAMETERS, ROWS, WIDTH = 53, 768, 3072


class Bench:
    def __init__(self, torch, words, file):
        self.torch, self.words = torch, words
        self.rows = csv.DictWriter(file, COLUMNS) if file else None
        if self.rows:
            self.rows.writeheader()
        source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
        self.copy = 2.0 * source.numel() / self.time(source.clone)[0]
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: a copy of 1 GiB moves {self.copy / 1e9:.0f} GB/s")

    def random(self, *shape, dtype):
        return self.torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    def ids(self, count, below):
        return self.torch.arange(count, device="cuda") * 7919 % below

    def time(self, call):
        """Median and least seconds of a call on the GPU, and seconds until the host has queued it."""
        cuda = self.torch.cuda
        event = lambda: cuda.Event(enable_timing=True)
        start, end = event(), event()
        call(), call()
        start.record()
        call()
        end.record()
        cuda.synchronize()
        calls = int(min(max(SAMPLE_MS / start.elapsed_time(end), 1), MOST_CALLS))
        marks = [event()]
        marks[0].record()
        begun = time.perf_counter()
        for sample in range(SAMPLES):
            for _ in range(calls):
                call()
            if sample == 0:
                host = (time.perf_counter() - begun) / calls
            marks.append(event())
            marks[-1].record()
        cuda.synchronize()
        seconds = [before.elapsed_time(after) / 1e3 / calls for before, after in zip(marks, marks[1:])]
        return statistics.median(seconds), min(seconds), host

    def row(self, peer, cell, pass_, measured, size, share):
        operator, dtype, shape = cell
        seconds, least, host = measured
        rate = size / seconds / 1e9
        print(f"{peer:<9} {operator:<22} {pass_:<8} {dtype:<5} {shape:<18} {seconds * 1e6:>10.1f} {rate:>8.0f} {100 * share:>6.1f}%")
        if self.rows:
            values = (f"{seconds * 1e6:.2f}", f"{least * 1e6:.2f}", f"{size / 1e6:.1f}", f"{rate:.0f}", f"{share:.4f}", f"{host * 1e6:.1f}")
            self.rows.writerow(dict(zip(COLUMNS, (peer, operator, pass_, dtype, shape, *values))))

    def wants(self, cell):
        return all(word in " ".join(cell) for word in self.words)

    def operator(self, cell, call, inputs, forward, backward):
        """Both passes, eager and compiled. The last result is the operator's own; gradients are those of `inputs`."""
        if not self.wants(cell):
            return
        torch = self.torch

        def measure(peer, function):
            measured = self.time(lambda: function(*inputs))
            self.row(peer, cell, "forward", measured, forward, forward / measured[0] / self.copy)
            result = function(*inputs)
            result = result[-1] if isinstance(result, tuple) else result
            tracked = [tensor for tensor in inputs if tensor.requires_grad]
            dy = torch.randn_like(result)
            measured = self.time(lambda: torch.autograd.grad(result, tracked, dy, retain_graph=True))
            self.row(peer, cell, "backward", measured, backward, backward / measured[0] / self.copy)

        self.eager_and_compiled(cell, call, measure)

    def eager_and_compiled(self, cell, call, measure):
        """Calls measure(peer, function) with `call` as it is and compiled. Running out of memory is a result."""
        for peer, function in (("eager", call), ("compiled", self.torch.compile(call, dynamic=False))):
            try:
                measure(peer, function)
            except self.torch.cuda.OutOfMemoryError:
                print(f"{peer:<9} {' '.join(cell)}: out of memory")
            self.torch.cuda.empty_cache()


def norms(bench, name, dtype, rows, width):
    functional, eps = bench.torch.nn.functional, 1e-5
    x, residual = bench.random(rows, width, dtype=dtype), bench.random(rows, width, dtype=dtype)
    weight, bias = bench.random(width, dtype=dtype), bench.random(width, dtype=dtype)
    size = x.numel() * x.element_size()
    cell = lambda operator: (operator, name, f"{rows}x{width}")
    layer = lambda x, weight, bias: functional.layer_norm(x, (width,), weight, bias, eps)
    rms = lambda x, weight: functional.rms_norm(x, (width,), weight, eps)

    def add_layer(x, residual, weight, bias):
        total = x + residual
        return total, layer(total, weight, bias)

    def add_rms(x, residual, weight):
        total = x + residual
        return total, rms(total, weight)

    bench.operator(cell("layer_norm"), layer, (x, weight, bias), 2 * size, 3 * size)
    bench.operator(cell("rms_norm"), rms, (x, weight), 2 * size, 3 * size)
    bench.operator(cell("add_layer_norm"), add_layer, (x, residual, weight, bias), 4 * size, 3 * size)
    bench.operator(cell("add_rms_norm"), add_rms, (x, residual, weight), 4 * size, 3 * size)


def losses(bench, name, dtype, rows, vocab):
    cell = ("cross_entropy", name, f"{rows}x{vocab}")
    if bench.wants(cell):
        logits, targets = bench.random(rows, vocab, dtype=dtype), bench.ids(rows, vocab)
        size = logits.numel() * logits.element_size()
        loss = lambda logits, targets: bench.torch.nn.functional.cross_entropy(logits.float(), targets)
        bench.operator(cell, loss, (logits, targets), size, 2 * size)


def linear_losses(bench, name, dtype, rows, width, vocab):
    cell, torch = ("linear_cross_entropy", name, f"{rows}x{width}x{vocab}"), bench.torch
    if not bench.wants(cell):
        return
    x, weight, targets = bench.random(rows, width, dtype=dtype), bench.random(vocab, width, dtype=dtype), bench.ids(rows, vocab)
    loss = lambda x, weight, targets: torch.nn.functional.cross_entropy((x @ weight.t()).float(), targets)
    with torch.no_grad():
        products = bench.time(lambda: x @ weight.t())[0]
        logits = x @ weight.t()
        products += bench.time(lambda: logits @ weight)[0] + bench.time(lambda: logits.t() @ x)[0]
        del logits

    def measure(peer, function):
        measured = bench.time(lambda: torch.autograd.grad(function(x, weight, targets), (x, weight)))
        bench.row(peer, cell, "both", measured, 0, products / measured[0])

    bench.eager_and_compiled(cell, loss, measure)


def activations(bench, name, dtype, rows, width):
    functional = bench.torch.nn.functional
    x, up = bench.random(rows, width, dtype=dtype), bench.random(rows, width, dtype=dtype)
    size = x.numel() * x.element_size()
    cell = lambda operator: (operator, name, f"{rows}x{width}")
    gelu = lambda x: functional.gelu(x, approximate="tanh")
    bench.operator(cell("gelu"), gelu, (x,), 2 * size, 3 * size)
    bench.operator(cell("swiglu"), lambda x, up: functional.silu(x) * up, (x, up), 3 * size, 5 * size)
    bench.operator(cell("geglu"), lambda x, up: gelu(x) * up, (x, up), 3 * size, 5 * size)


def positions(bench, name, dtype):
    torch = bench.torch
    x = bench.random(BATCH, SEQLEN, HEADS, HEAD_DIM, dtype=dtype)
    size = x.numel() * x.element_size()
    angles = torch.randn(SEQLEN, 1, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def half_split(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def interleaved(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    shape = f"{BATCH}x{SEQLEN}x{HEADS}x{HEAD_DIM}"
    bench.operator(("rotary", name, shape), half_split, (x,), 2 * size, 2 * size)
    bench.operator(("rotary_interleaved", name, shape), interleaved, (x,), 2 * size, 2 * size)
    width = HEADS * HEAD_DIM
    weight, ids = bench.random(VOCAB, width, dtype=dtype), bench.ids(BATCH * SEQLEN, VOCAB)
    table = weight.numel() * weight.element_size()
    embedding = lambda ids, weight: torch.nn.functional.embedding(ids, weight)
    bench.operator(("embedding", name, f"{BATCH * SEQLEN}x{width}x{VOCAB}"), embedding, (ids, weight), 2 * size, size + table)


def optimizer(bench, name, dtype):
    """Fused AdamW and clip_grad_norm_. PyTorch has no master weights: for bf16 it updates bf16 weights and bf16 moments."""
    torch, cell = bench.torch, ("adamw", name, f"{PARAMETERS}x{ROWS}x{WIDTH}")
    if not bench.wants(cell):
        return
    parameters = [bench.random(ROWS, WIDTH, dtype=dtype) for _ in range(PARAMETERS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adamw = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.1, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adamw.step()

    element = parameters[0].element_size()
    size = PARAMETERS * ROWS * WIDTH * (24 + 2 * element + (element if element < 4 else 0))
    measured = bench.time(step)
    bench.row("eager", cell, "step", measured, size, size / measured[0] / bench.copy)


def compare(paths):
    """A line for each row of the first file: its time, its share, and the times of the peers."""
    rows = [row for path in paths for row in csv.DictReader(open(path, newline=""))]
    key = lambda row: tuple(row[column] for column in ("operator", "pass", "dtype", "shape"))
    times = {(row["peer"], *key(row)): float(row["us"]) for row in rows}
    print(f"{'operator':<22} {'pass':<8} {'type':<5} {'shape':<18} {'us':>10} {'share':>7} {'eager':>7} {'compiled':>9}   (times ours)")
    for row in rows:
        if row["peer"] != "ours":
            continue
        peers = [times.get((peer, *key(row))) for peer in ("eager", "compiled")]
        ratios = ["-" if us is None else f"{us / float(row['us']):.2f}x" for us in peers]
        operator, pass_, dtype, shape = key(row)
        share = 100 * float(row["share"])
        print(f"{operator:<22} {pass_:<8} {dtype:<5} {shape:<18} {float(row['us']):>10.1f} {share:>6.1f}% {ratios[0]:>7} {ratios[1]:>9}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cells whose name contains all of them")
    parser.add_argument("--csv", help="the file to write")
    parser.add_argument("--compare", nargs=2, metavar=("OURS", "PEERS"), help="two files to compare")
    options = parser.parse_args()
    if options.compare:
        return compare(options.compare)
    import torch

    if not torch.cuda.is_available():
        sys.exit("peers_ops.py needs an NVIDIA GPU")
    torch.manual_seed(0)
    file = open(options.csv, "w", newline="") if options.csv else None
    bench = Bench(torch, options.words, file)
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        for shape in NORMS:
            norms(bench, name, dtype, *shape)
        for shape in LOGITS:
            losses(bench, name, dtype, *shape)
        for shape in LINEARS:
            linear_losses(bench, name, dtype, *shape)
        activations(bench, name, dtype, *ACTIVATION)
        positions(bench, name, dtype)
        optimizer(bench, name, dtype)


if __name__ == "__main__":
    main()
