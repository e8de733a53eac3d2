#!/usr/bin/env python3
"""Times other implementations of attention on this GPU, over the cases of benches/cuda.toml. It needs PyTorch and an NVIDIA GPU.

    peers.py --csv peers.csv                      every case; rows in the columns of benches/record
    peers.py --csv peers.csv --quick              a handful
    peers.py --csv peers.csv mha/d128 gqa         the cases whose name contains one of these words
    peers.py --csv peers.csv --passes fwd         the forward alone
    peers.py --list                               prints the names; needs no GPU

flash      FlashAttention-2: PyTorch's FLASH_ATTENTION; packed batches by torch.nn.attention.varlen where PyTorch has it
cudnn      cuDNN: PyTorch's CUDNN_ATTENTION
fa3        FlashAttention-3, if flash_attn_3 is on PYTHONPATH, as a package of its own or in xformers
efficient  memory-efficient attention: PyTorch's EFFICIENT_ATTENTION; the peer of `--dtype fp32`
standard   matmul, softmax, matmul in PyTorch's operators; only if --peers names it
ceiling    a product of two matrices of 8192 x 8192

As `cargo bench --features cuda` does, it takes the median of CUDA events around one call: warm, after a pause, with the L2 cache
flushed before each. FLOP: 4 * head_dim * heads * pairs of query and key, half if causal; backward 2.5 times that. The
backward is torch.autograd.grad of o, whose gradient exists before. fwd+bwd is the sum of the two. benches/compare.py compares ours
with them.
"""

import argparse
import contextlib
import csv
import ctypes
import math
import pathlib
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass

from measure import Timer, papers_flop

CASES = pathlib.Path(__file__).resolve().parent / "cuda.toml"
COLUMNS = (
    *("peer", "kind", "dir", "dtype", "hdim", "causal", "batch", "seqlen_q", "seqlen_k", "hq", "hkv"),
    *("ms", "tflops", "gbps", "ms_min", "reps", "sm_mhz", "watts", "err", "peak_mib"),
)
NAMES = {
    "flash": "FlashAttention-2",
    "cudnn": "cuDNN",
    "fa3": "FlashAttention-3",
    "efficient": "memory-efficient",
    "standard": "standard attention",
}
PASSES = ("fwd", "bwd")
WORST_ERROR = 2e-2  # relative; bf16 rounding gives about 3e-3
OUT_OF_MEMORY = {"peak_mib": "oom"}  # as in crates/figures/src/record.rs


@dataclass
class Case:
    """One call. The seqlen of a packed call is its longest."""

    kind: str
    head_dim: int
    head_dim_v: int
    num_heads: int
    num_heads_k: int
    causal: bool
    batch: int
    seqlen: int
    lengths: list

    def name(self):
        seqlen = "" if self.lengths else f"/s{self.seqlen}"
        return f"{self.kind}/d{self.head_dim}/{'causal' if self.causal else 'full'}{seqlen}"

    def flop(self, pass_):
        pairs = sum(length**2 for length in self.lengths) if self.lengths else self.batch * self.seqlen**2
        return papers_flop(pass_, (self.head_dim, self.head_dim_v), self.num_heads, pairs, self.causal)

    def row(self, peer, pass_, dtype):
        seqlens = {"seqlen_q": self.seqlen, "seqlen_k": self.seqlen}
        shape = {"hdim": self.head_dim, "causal": int(self.causal), "hq": self.num_heads, "hkv": self.num_heads_k}
        return {
            "peer": peer,
            "kind": self.kind,
            "dir": pass_,
            "dtype": dtype,
            "batch": self.batch,
            **shape,
            **seqlens,
        }


def cases(options):
    """The chosen cases, as benches/attention/grid.rs makes them, without those that only ours runs: decoding, memory."""
    file = tomllib.loads(CASES.read_text())
    found = []
    for grid in file["grid"]:
        if grid.get("part", "grid") not in ("grid", "gqa", "packed", "sizes"):
            continue
        lengths = grid.get("lengths", [])
        for heads in grid["heads"]:
            num_heads, num_heads_k = heads["num_heads"], heads.get("num_heads_k", heads["num_heads"])
            kind = ("mha", "gqa", "varlen", "varlen_gqa")[2 * bool(lengths) + (num_heads_k != num_heads)]
            head_dims = heads["head_dim"], heads.get("head_dim_v", heads["head_dim"])
            kind += f"_v{head_dims[1]}" if "head_dim_v" in heads else ""
            for mask in grid.get("masks", ["none", "causal"]):
                for seqlen in grid.get("seqlens") or [max(lengths)]:
                    batch = len(lengths) or grid["tokens"] // seqlen
                    shape = *head_dims, num_heads, num_heads_k, mask == "causal", batch, seqlen
                    found.append(Case(kind, *shape, lengths))
    words = options.filters
    found = [case for case in found if not options.quick or case.name() in file["quick"]]
    if idle := [word for word in words if not any(word in case.name() for case in found)]:
        sys.exit(f"no case of {CASES.name} contains {' or '.join(idle)}; --list prints them")
    return [case for case in found if not words or any(word in case.name() for word in words)]


class Unsupported(Exception):
    """The peer does not support the call."""


class Sdpa:
    """One backend of PyTorch's scaled_dot_product_attention."""

    def __init__(self, torch, backend):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.torch, self.backend, self.only = torch, getattr(SDPBackend, backend), sdpa_kernel

    def attend(self, q, k, v, case):
        """q, k, v and o are (batch, seqlen, heads, head_dim)."""
        with self.only([self.backend]):
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            # Older versions do not know this argument. Pass it only where it is needed, so that other calls run there too.
            grouped = {"enable_gqa": True} if case.num_heads_k != case.num_heads else {}
            attention = self.torch.nn.functional.scaled_dot_product_attention
            return attention(q, k, v, is_causal=case.causal, **grouped).transpose(1, 2)

    def attend_packed(self, q, k, v, starts, case):
        raise Unsupported("no packed batches")


class Flash(Sdpa):
    def __init__(self, torch):
        super().__init__(torch, "FLASH_ATTENTION")

    def attend_packed(self, q, k, v, starts, case):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise Unsupported("no packed batches in this PyTorch") from None
        arguments = q, k, v, starts, starts, case.seqlen, case.seqlen
        try:
            return varlen_attn(*arguments, window_size=(-1, 0) if case.causal else (-1, -1))
        except TypeError:  # before 2.11
            return varlen_attn(*arguments, is_causal=case.causal)


class Fa3:
    """The operators of FlashAttention-3's library. They have no autograd, so this class adds it."""

    def __init__(self, torch):
        folders, places = (
            [pathlib.Path(folder or ".") for folder in sys.path],
            ("flash_attn_3", "xformers/flash_attn_3"),
        )
        paths = [path for folder in folders for place in places for path in folder.glob(f"{place}/_C*.so")]
        if not paths:
            raise Unsupported("no flash_attn_3 on PYTHONPATH")
        with contextlib.suppress(OSError):  # xformers' wheel for CUDA 12 needs it next to a PyTorch for CUDA 13
            ctypes.CDLL(str(paths[0].parent / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(paths[0]))
        operators = torch.ops.flash_attn_3

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v, options):
                o, lse, *_ = operators.fwd(q, k, v, num_splits=1, **options)
                ctx.save_for_backward(q, k, v, o, lse)
                ctx.options = options
                return o

            @staticmethod
            def backward(ctx, do):
                inputs = ctx.saved_tensors
                grads = [torch.empty_like(tensor) for tensor in inputs[:3]]
                operators.bwd(do, *inputs, *grads, **ctx.options)
                return *grads, None

        self.function = Function

    def attend(self, q, k, v, case, **packed):
        options = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal, **packed}
        return self.function.apply(q, k, v, options)

    def attend_packed(self, q, k, v, starts, case):
        starts_of, longest = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}, case.seqlen
        return self.attend(q, k, v, case, **starts_of, max_seqlen_q=longest, max_seqlen_k=longest)


class Standard(Sdpa):
    """Each step is an operator of its own, and all scores are in memory."""

    def __init__(self, torch):
        self.torch = torch

    def attend(self, q, k, v, case):
        group = case.num_heads // case.num_heads_k
        q, k, v = (
            tensor.transpose(1, 2) for tensor in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
        )
        scores = q @ k.transpose(2, 3) * case.head_dim**-0.5
        if case.causal:
            hidden = self.torch.ones(scores.shape[2:], dtype=self.torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)


PEERS = {
    "flash": Flash,
    "cudnn": lambda torch: Sdpa(torch, "CUDNN_ATTENTION"),
    "fa3": Fa3,
    "efficient": lambda torch: Sdpa(torch, "EFFICIENT_ATTENTION"),
    "standard": Standard,
}


class Bench:
    def __init__(self, options):
        try:
            import torch
        except ImportError:
            sys.exit("there is no PyTorch in the Python that runs this script; install it with `pip install torch`")
        if not torch.cuda.is_available():
            sys.exit("PyTorch finds no NVIDIA GPU, and only --list works without one")
        self.torch, self.options = torch, options
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
        self.timer = Timer(torch, options.rep_ms)
        file = sys.stdout if options.csv is None else options.csv.open("w", newline="")
        self.file, self.csv = file, csv.DictWriter(file, COLUMNS, lineterminator="\n")
        versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        print(f"# {torch.cuda.get_device_name()}; {versions}", file=file)
        self.csv.writeheader()

    def draw(self, *shape, grad=True):
        tensor = self.torch.randn(shape, dtype=self.dtype, device="cuda")
        return tensor.requires_grad_(grad)

    def gauges(self, call):
        """Clock and power under the load of `call`, from nvidia-smi. Empty without nvidia-smi."""
        uuid = str(getattr(self.torch.cuda.get_device_properties(0), "uuid", "0"))
        gpu = uuid if uuid == "0" or uuid.startswith("GPU-") else f"GPU-{uuid}"
        query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        try:
            with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as question:
                begun = time.monotonic()
                while question.poll() is None and time.monotonic() - begun < 2:
                    call()
                    self.torch.cuda.synchronize()
                question.kill()
                mhz, watts = question.stdout.read().strip().split(", ")
        except (OSError, ValueError):
            return {}
        return {name: value for name, value in (("sm_mhz", mhz), ("watts", watts)) if value[:1].isdigit()}


    def timed(self, call, flop):
        """The columns of one call, and its median, in milliseconds."""
        runs = self.timer.runs(call)
        ms = statistics.median(runs)
        columns = {"ms": f"{ms:.5g}", "tflops": f"{flop / ms * 1e-9:.5g}", "ms_min": f"{runs[0]:.5g}", "reps": len(runs)}
        return columns | self.gauges(call), ms

    def write(self, row):
        self.csv.writerow(row)
        self.file.flush()
        if self.options.csv is not None:
            shape = f"d{row.get('hdim', '')} {'causal' if row['causal'] else 'full'} s{row['seqlen_q']}"
            rate = f"{float(row['tflops']):.0f} TFLOP/s, {row['ms']} ms" if "tflops" in row else "out of memory"
            print(f"{row['peer']:<9} {row['kind']:<11} {shape:<18} {row['dir']:<8} {rate}", file=sys.stderr)

    def ceiling(self):
        size = 8192
        a, b = self.draw(size, size, grad=False), self.draw(size, size, grad=False)
        columns, _ = self.timed(lambda: a @ b, 2.0 * size**3)
        row = {"peer": "ceiling", "kind": f"matmul{size}", "dir": "fwd", "dtype": self.options.dtype, "causal": 0}
        self.write(row | {"seqlen_q": size, "seqlen_k": size} | columns)

    def calls(self, peer, case):
        """Forward and backward of one case."""
        if case.lengths:
            starts = self.torch.tensor([0, *case.lengths], device="cuda").cumsum(0, dtype=self.torch.int32)
            outer, extra, attend = (sum(case.lengths),), (starts, case), peer.attend_packed
        else:
            outer, extra, attend = (case.batch, case.seqlen), (case,), peer.attend
        q = self.draw(*outer, case.num_heads, case.head_dim)
        k, v = (self.draw(*outer, case.num_heads_k, head_dim) for head_dim in (case.head_dim, case.head_dim_v))

        def forward():
            with self.torch.no_grad():
                return attend(q, k, v, *extra)

        o = attend(q, k, v, *extra)
        do = self.torch.randn_like(o)
        return {"fwd": forward, "bwd": lambda: self.torch.autograd.grad(o, (q, k, v), do, retain_graph=True)}

    def check(self, peer, kind):
        """Compares the peer with f64, once for each kind of call. A wrong peer is not timed."""
        packed, num_heads_k = kind.startswith("varlen"), 2 if kind.endswith("gqa") else 4
        case = Case(kind, 64, 64, 4, num_heads_k, True, 2, 256, [256, 256] if packed else [])
        inputs = [self.draw(case.batch, case.seqlen, heads, case.head_dim) for heads in (4, num_heads_k, num_heads_k)]
        do = self.torch.randn_like(inputs[0])
        if packed:
            starts = self.torch.tensor([0, 256, 512], device="cuda", dtype=self.torch.int32)
            o = peer.attend_packed(*(tensor.flatten(0, 1) for tensor in inputs), starts, case).unflatten(0, (2, 256))
        else:
            o = peer.attend(*inputs, case)
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        want = Standard(self.torch).attend(*exact, case)
        got = [o, *self.torch.autograd.grad(o, inputs, do)]
        want = [want, *self.torch.autograd.grad(want, exact, do.double())]
        worst = max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, want))
        if not worst < WORST_ERROR:
            raise Unsupported(f"wrong: relative error {worst:.1e} over o, dq, dk and dv")

    def peer(self, name, chosen):
        try:
            peer = PEERS[name](self.torch)
        except (Unsupported, RuntimeError) as why:
            print(f"{NAMES[name]} is left out: {first_line(why)}", file=sys.stderr)
            return
        for kind in dict.fromkeys(case.kind for case in chosen):
            try:
                self.check(peer, kind)
            except (Unsupported, RuntimeError, TypeError) as why:
                print(f"{NAMES[name]}: {kind} is left out: {first_line(why)}", file=sys.stderr)
                continue
            for case in (case for case in chosen if case.kind == kind):
                try:
                    self.case(name, peer, case)
                except RuntimeError as why:
                    print(f"{NAMES[name]}: {case.name()} failed: {first_line(why)}", file=sys.stderr)
                self.torch.cuda.empty_cache()

    def case(self, name, peer, case):
        """Writes a row for each pass, and one for the sum of both. A pass that does not fit into memory has no numbers, nor has
        the sum."""
        sums, row = 0.0, lambda pass_: case.row(name, pass_, self.options.dtype)
        for pass_ in self.options.passes:
            try:
                columns, ms = self.timed(self.calls(peer, case)[pass_], case.flop(pass_))
            except self.torch.cuda.OutOfMemoryError:
                self.write(row(pass_) | OUT_OF_MEMORY)
                total = OUT_OF_MEMORY
                break
            sums += ms
            self.write(row(pass_) | columns)
        else:
            total = {"ms": f"{sums:.5g}", "tflops": f"{case.flop('fwd+bwd') / sums * 1e-9:.5g}"}
        if set(self.options.passes) == set(PASSES):
            self.write(row("fwd+bwd") | total)


def first_line(error):
    return str(error).strip().split("\n")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filters", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write the rows to this file instead of printing them")
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=["flash", "cudnn", "fa3"],
        help="default: flash,cudnn,fa3",
    )
    parser.add_argument(
        "--passes",
        type=lambda text: list(dict.fromkeys(text.split(","))),  # each once
        default=PASSES,
        help="default: fwd,bwd",
    )
    parser.add_argument("--quick", action="store_true", help="a handful of cases")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--rep-ms", type=float, default=100.0, metavar="MS", help="time each pass for about MS milliseconds; default: 100")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if not set(options.passes) <= set(PASSES):
        parser.error(f"the passes are {', '.join(PASSES)}")
    chosen = cases(options)
    if options.list:
        return print("\n".join(case.name() for case in chosen))
    bench = Bench(options)
    bench.ceiling()
    for name in options.peers:
        bench.peer(name, chosen)


if __name__ == "__main__":
    main()
