#!/usr/bin/env python3
"""Times training steps of a GPT-2 in PyTorch on this GPU, as `gpt time` of the GPT example times ours.

    peers_gpt.py --csv peers.csv            124M, 355M and 1.3B parameters, eager and compiled
    peers_gpt.py --csv peers.csv 124m       one size

The model is that of the example: norms before each part, GELU, learned positions, tied embeddings, 50304 rows. Autocast to bf16,
weights in f32, fused AdamW, attention by cuDNN, random tokens. A time is the mean of 10 steps after 4.
"""

import argparse
import csv
import gc
import time

WARMUP, STEPS, VOCAB = 4, 10, 50304
# name: layers, width, heads, context, batch
SIZES = {"124m": (12, 768, 12, 1024, 32), "350m": (24, 1024, 16, 1024, 16), "1.3b": (24, 2048, 16, 2048, 4)}
COLUMNS = ("peer", "layers", "width", "context", "batch", "parameters", "ms_per_step", "tokens_per_s", "peak_gib")


def model(torch, layers, width, heads, context):
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            parts = self.qkv(self.ln_1(x)).split(width, 2)
            q, k, v = [part.unflatten(-1, (heads, width // heads)).transpose(1, 2) for part in parts]
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
            self.head.weight = self.wte.weight
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, 0, 0.02)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(context, device=tokens.device))
            for block in self.blocks:
                x = block(x)
            return functional.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1).float(), targets.flatten())

    return Gpt().cuda()


def measure(torch, peer, size):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layers, width, heads, context, batch = size
    # A compiled model of the size before must not count.
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    gpt = model(torch, layers, width, heads, context)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(gpt) if peer == "compiled" else gpt
    tokens, targets = (torch.randint(0, VOCAB, (batch, context), device="cuda") for _ in range(2))

    def steps(count):
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        steps(WARMUP)
        begun = time.perf_counter()
        steps(STEPS)
        seconds = (time.perf_counter() - begun) / STEPS
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30
    shape = (peer, layers, width, context, batch, parameters)
    return dict(zip(COLUMNS, (*shape, f"{1e3 * seconds:.2f}", f"{batch * context / seconds:.0f}", f"{peak:.2f}")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}; default: all")
    parser.add_argument("--csv", required=True, help="the file to write")
    options = parser.parse_args()
    if unknown := set(options.sizes) - set(SIZES):
        parser.error(f"no size is called {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    import torch

    torch.set_float32_matmul_precision("high")
    with open(options.csv, "w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        for size in options.sizes or SIZES:
            for peer in ("eager", "compiled"):
                row = measure(torch, peer, SIZES[size])
                rows.writerow(row)
                file.flush()
                print(f"{size:<5} {peer:<9} {row['ms_per_step']:>8} ms a step {row['tokens_per_s']:>8} tokens/s {row['peak_gib']:>6} GiB", flush=True)


if __name__ == "__main__":
    main()
