#!/usr/bin/env python3
"""Times variants of the kernels beside PyTorch's FlashAttention-2, without Rust: on a machine with a GPU, nvcc and PyTorch.

    tune.py                                   the kernels of cuda/instances.def
    tune.py --lines FILE                      those of another list: tiles to try
    tune.py --cuda cuda copy/cuda             each of them from several copies of the sources, named _0, _1, .. in this order
    tune.py --points full:4096 causal:512     mask and seqlen; 16,384 tokens, heads x head_dim = 2048 (16 heads of 96 and 192)
    tune.py --deterministic                   each backward once more, in turns at dq
    tune.py --compile-only --out DIR          compiles into DIR; needs no GPU
    tune.py --reuse --out DIR                 takes from DIR what was compiled there, as it is

bf16 and plain kernels alone. Prints registers and local memory of each kernel, its largest relative error against f64 over
three small shapes, and TFLOP/s (4 s^2 d h b, half if causal; backward 2.5 times that) with the L2 cache flushed before each
call. A backward is zeroing, delta, main kernel and conversion.
"""

import argparse
import ctypes
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS, WIDTH = 16384, 2048
LOG2_E = math.log2(math.e)
OPEN_SIDE = 1 << 29  # MAX_SEQLEN of src/plan.rs: a window that hides nothing
FLUSH_BYTES = 192 << 20
REPEAT_MS, PAUSE_S = 60, 0.05
WORST_ERROR = 6e-3  # relative; bf16 rounding leaves 2.7e-3


# The structs of cuda/params.h; nvcc asserts their sizes.
def struct(name, fields):
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def of(ctype, names):
    return [(name, ctype) for name in names.split()]


POINTER, I64, I32, F32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
Strides = struct("Strides", of(I64, "batch row head"))
Shape = struct(
    "Shape",
    of(POINTER, "cu_seqlens_q cu_seqlens_k key_lengths alibi_slopes")
    + of(I64, "lse_batch lse_head")
    + of(I32, "alibi_batch batch first_batch keys_at_end seqlen_q seqlen_k num_heads num_heads_k head_dim window_left window_right")
    + of(F32, "product_factor softcap_log2"),
)
DqTiles = struct("DqTiles", of(I64, "batch head count"))
FwdParams = struct(
    "FwdParams",
    of(POINTER, "q k v o lse")
    + of(Strides, "q_strides k_strides v_strides o_strides")
    + [("shape", Shape), ("unrounded", I32)],
)
DeltaParams = struct(
    "DeltaParams", of(POINTER, "o do_ dlse delta") + of(Strides, "o_strides do_strides") + [("shape", Shape)]
)
BwdParams = struct(
    "BwdParams",
    of(POINTER, "q k v do_ lse delta dq_sums turns dk dv")
    + of(Strides, "q_strides k_strides v_strides do_strides dk_strides")
    + [("dq_tiles", DqTiles), ("shape", Shape), ("softmax_scale", F32)],
)
ConvertParams = struct(
    "ConvertParams",
    of(POINTER, "dq_sums dq")
    + [("dq_strides", Strides), ("dq_tiles", DqTiles), ("shape", Shape), ("softmax_scale", F32)],
)


class Line:
    """KERNEL(pass, arch, head_dim, block_m, block_n, warps[, stages, warps_m, warps_n]), compiled from one copy of cuda/."""

    def __init__(self, direction, numbers, sources, tag):
        self.direction, self.numbers, self.sources, self.tag = direction, numbers, sources, tag
        self.head_dim, self.block_m, self.block_n, self.warps = numbers[:4]
        layout = "_".join(map(str, numbers[1:]))
        self.name = f"{direction}_d{self.head_dim}_{layout}{tag}"
        self.threads = 32 * self.warps
        tile_q, tile_k = 2 * self.block_m * self.head_dim, 2 * self.block_n * self.head_dim
        if direction == "fwd":
            self.shared_bytes = tile_q + 2 * tile_k
        else:
            stages, warps_m, _ = numbers[4:]
            scores = (3 if warps_m == 1 else 2) * 2 * self.block_m * self.block_n
            self.shared_bytes = 2 * tile_k + scores + stages * (2 * tile_q + 8 * self.block_m)

    def source(self):
        arguments = ", ".join(map(str, self.numbers))
        traits, function, params = {
            "fwd": ("FwdTraits", "forward", "FwdParams"),
            "bwd": ("BwdTraits", "backward", "BwdParams"),
        }[self.direction]
        header = "sm80/fwd.cuh" if self.direction == "fwd" else "convert.cuh"
        text = f'#include "{header}"\n#include "delta.cuh"\nusing Traits = fa2::{traits}<fa2::bf16, {arguments}, false>;\n'
        text += f"static_assert(Traits::kSharedBytes == {self.shared_bytes});\n"
        for params_struct in (FwdParams, DeltaParams, BwdParams, ConvertParams):
            text += f"static_assert(sizeof(fa2::{params_struct.__name__}) == {ctypes.sizeof(params_struct)});\n"

        def kernel(bounds, name, params, call):
            return (
                f'extern "C" __global__ void __launch_bounds__({bounds}) {name}(const __grid_constant__ fa2::{params} params) '
                f"{{ fa2::{call}(params); }}\n"
            )

        text += kernel(f"{self.threads}, Traits::kMinBlocks", self.name, params, f"{function}<Traits>")
        if self.direction == "bwd":
            text += kernel(self.threads, "convert", "ConvertParams", "convert<Traits>")
            text += kernel("fa2::kDeltaThreads", "delta", "DeltaParams", "delta<fa2::bf16>")
        return text

    def compile(self, nvcc, arch, out, reuse):
        """Writes the image, and returns what ptxas says of it."""
        self.image, report = out / f"{self.name}.cubin", out / f"{self.name}.txt"
        if not reuse:
            source = out / f"{self.name}.cu"
            source.write_text(self.source())
            command = [nvcc, "-std=c++17", "-O3", "--use_fast_math", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
            run = subprocess.run(
                [*command, "-I", self.sources, "-o", self.image, source], capture_output=True, text=True, check=False
            )
            if run.returncode != 0:
                raise SystemExit(f"{self.name} does not compile:\n{run.stderr}")
            report.write_text(run.stderr)
        about = report.read_text().split(f"Function properties for {self.name}\n")[1]
        registers = re.search(r"Used (\d+) registers", about)[1]
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", about).groups()
        return f"{registers} registers, {stack} bytes local ({stores} / {loads} spilled), {self.shared_bytes} bytes shared"


def lines(path, folders):
    found, skipped = [], 0
    for match in re.finditer(r"^KERNEL\((\w+),\s*sm(\d+),([\d,\s]+)\)", path.read_text(), re.MULTILINE):
        if match[2] != "80":
            skipped += 1
            continue
        numbers = [int(number) for number in match[3].split(",")]
        for index, folder in enumerate(folders):
            found.append(Line(match[1], numbers, folder.resolve(), f"_{index}" if len(folders) > 1 else ""))
    if skipped:
        print(f"{skipped} lines of {path} are not of sm80, whose templates alone are compiled here: skipped")
    if not found:
        sys.exit(f"{path} has no line such as KERNEL(fwd, sm80, 64, 128, 128, 4)")
    lacking = {line.head_dim for line in found} - {line.head_dim for line in found if line.direction == "fwd"}
    if lacking:
        sys.exit(f"{path} has no forward of head_dim {sorted(lacking)}, which a backward needs")
    return found


class Driver:
    """Images, loaded once, and their launches on PyTorch's stream."""

    def __init__(self, torch):
        self.torch, self.cuda, self.functions = torch, ctypes.CDLL("libcuda.so.1"), {}

    def check(self, result, what):
        if result != 0:
            name = ctypes.c_char_p()
            self.cuda.cuGetErrorName(result, ctypes.byref(name))
            raise RuntimeError(f"{what}: {name.value}")

    def function(self, image, name, shared_bytes):
        if (image, name) not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), image.read_bytes()), image)
            self.check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
            max_dynamic_shared_bytes = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.check(self.cuda.cuFuncSetAttribute(function, max_dynamic_shared_bytes, shared_bytes), name)
            self.functions[image, name] = function
        return self.functions[image, name]

    def launch(self, image, name, grid, threads, shared_bytes, params):
        function = self.function(image, name, shared_bytes)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        result = self.cuda.cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, arguments, None)
        self.check(result, name)


def strides(tensor):
    return Strides(*tensor.stride()[:3])


class Call:
    """One attention call: inputs drawn by a seed, results poisoned."""

    def __init__(self, driver, batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, causal):
        torch = driver.torch
        self.driver, self.causal, self.softmax_scale = driver, causal, 1 / math.sqrt(head_dim)
        generator = torch.Generator("cuda").manual_seed(seqlen_q * 31 + seqlen_k)

        def draw(seqlen, heads):
            shape = (batch, seqlen, heads, head_dim)
            return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)

        self.q, self.do = draw(seqlen_q, num_heads), draw(seqlen_q, num_heads)
        self.k, self.v = draw(seqlen_k, num_heads_k), draw(seqlen_k, num_heads_k)
        self.o, self.dq = (torch.full_like(self.q, math.nan) for _ in range(2))
        self.dk, self.dv = (torch.full_like(self.k, math.nan) for _ in range(2))
        self.lse, self.delta = (torch.full((batch, num_heads, seqlen_q), math.nan, device="cuda") for _ in range(2))
        self.shape = Shape(
            lse_batch=num_heads * seqlen_q,
            lse_head=seqlen_q,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads=num_heads,
            num_heads_k=num_heads_k,
            head_dim=head_dim,
            window_left=OPEN_SIDE,
            window_right=0 if causal else OPEN_SIDE,
            product_factor=self.softmax_scale * LOG2_E,
        )

    def forward(self, line):
        shape = self.shape
        tensors = (self.q, self.k, self.v, self.o)
        params = FwdParams(*[x.data_ptr() for x in (*tensors, self.lse)], *map(strides, tensors), shape)
        grid = (-(-shape.seqlen_q // line.block_m), shape.num_heads, shape.batch)
        return lambda: self.driver.launch(line.image, line.name, grid, line.threads, line.shared_bytes, params)

    def backward(self, line, deterministic):
        torch, shape, launch = self.driver.torch, self.shape, self.driver.launch
        m_blocks, n_blocks = -(-shape.seqlen_q // line.block_m), -(-shape.seqlen_k // line.block_n)
        tiles = DqTiles(shape.num_heads * m_blocks, m_blocks, shape.batch * shape.num_heads * m_blocks)
        sums = torch.empty(tiles.count * line.block_m * line.head_dim, device="cuda")
        turns = torch.zeros(tiles.count + 1, dtype=torch.int32, device="cuda") if deterministic else None
        delta = DeltaParams(
            *(self.o.data_ptr(), self.do.data_ptr(), 0, self.delta.data_ptr()), strides(self.o), strides(self.do), shape
        )
        inputs = (self.q, self.k, self.v, self.do)
        main = BwdParams(
            *[x.data_ptr() for x in (*inputs, self.lse, self.delta, sums)],
            turns.data_ptr() if deterministic else 0,
            *(self.dk.data_ptr(), self.dv.data_ptr()),
            *map(strides, (*inputs, self.dk)),
            *(tiles, shape, self.softmax_scale),
        )
        convert = ConvertParams(
            sums.data_ptr(), self.dq.data_ptr(), strides(self.dq), tiles, shape, self.softmax_scale
        )
        # As src/plan.rs: a row has a power of two of threads, 8 elements each, and at least 4.
        lanes = max(4, 1 << (-(-shape.head_dim // 8) - 1).bit_length())
        delta_grid = (-(-shape.seqlen_q // (256 // lanes)), shape.num_heads, shape.batch)

        def run():
            sums.zero_()
            if deterministic:
                turns.zero_()
            launch(line.image, "delta", delta_grid, 256, 0, delta)
            grid = (n_blocks, shape.num_heads_k, shape.batch)
            launch(line.image, line.name, grid, line.threads, line.shared_bytes, main)
            launch(line.image, "convert", (m_blocks, shape.num_heads, shape.batch), line.threads, 0, convert)

        return run

    def reference(self):
        """o, dq, dk and dv in f64."""
        torch, group = self.driver.torch, self.shape.num_heads // self.shape.num_heads_k
        heads = lambda x: x.double().transpose(1, 2)
        repeated = lambda x: heads(x).repeat_interleave(group, 1)
        q, k, v = (x.detach().requires_grad_() for x in (heads(self.q), repeated(self.k), repeated(self.v)))
        scores = q @ k.transpose(2, 3) * self.softmax_scale
        if self.causal:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device="cuda")
            scores = scores.masked_fill(~seen.tril(scores.shape[3] - scores.shape[2]), -math.inf)
        o = scores.softmax(-1) @ v
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), heads(self.do))
        summed = lambda x: x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)
        return o.detach().transpose(1, 2), dq.transpose(1, 2), summed(dk), summed(dv)


def error(line, forward, driver, deterministic):
    """The largest relative error over three shapes: shared heads, more keys than queries, a padded head_dim."""
    d, worst = line.head_dim, 0.0
    for sizes in [(2, 333, 333, 4, 2, d, True), (1, 200, 515, 4, 4, d, False), (1, 2050, 2050, 2, 1, d - 8, True)]:
        call = Call(driver, *sizes)
        call.forward(line if line.direction == "fwd" else forward)()
        results = [call.o]
        if line.direction == "bwd":
            call.backward(line, deterministic)()
            results += [call.dq, call.dk, call.dv]
        for got, want in zip(results, call.reference()):
            relative = ((got.double() - want).norm() / want.norm()).item()
            worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def median_ms(torch, flush, run):
    event = lambda: torch.cuda.Event(enable_timing=True)
    run()
    torch.cuda.synchronize()
    time.sleep(PAUSE_S)
    start, end = event(), event()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    count = min(max(int(REPEAT_MS / max(start.elapsed_time(end), 1e-3)), 7), 60)
    events = [(event(), event()) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return times[len(times) // 2]


def flash_ms(torch, flush, call, direction):
    """FlashAttention-2 as PyTorch has it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (call.q, call.k, call.v))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=call.causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if direction == "fwd":
            with torch.no_grad():
                return median_ms(torch, flush, attend)
        o, do = attend(), call.do.transpose(1, 2)
        return median_ms(torch, flush, lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))


def measure(found, points, deterministic):
    import torch

    driver, flush = Driver(torch), torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    print(torch.cuda.get_device_name())
    # The first of each head_dim gives every backward its o and lse.
    forwards = {line.head_dim: line for line in reversed(found) if line.direction == "fwd"}
    variants = [(line, False) for line in found]
    variants += [(line, True) for line in found if deterministic and line.direction == "bwd"]
    for line, in_turns in variants:
        off = error(line, forwards[line.head_dim], driver, in_turns)
        note = "" if off < WORST_ERROR else "   WRONG"
        print(f"{line.name}{' in turns' if in_turns else ''}: error {off:.1e}{note}", flush=True)
    for head_dim in sorted({line.head_dim for line in found}):
        num_heads = 16 if head_dim in (96, 192) else min(WIDTH // head_dim, 32)
        for mask, seqlen in points:
            causal, batch = mask == "causal", TOKENS // seqlen
            call = Call(driver, batch, seqlen, seqlen, num_heads, num_heads, head_dim, causal)
            call.forward(forwards[head_dim])()
            flop = 4 * seqlen**2 * head_dim * num_heads * batch / (2 if causal else 1)
            for direction, factor in [("fwd", 1.0), ("bwd", 2.5)]:
                cells = []
                for line, in_turns in variants:
                    if (line.head_dim, line.direction) == (head_dim, direction):
                        run = call.forward(line) if direction == "fwd" else call.backward(line, in_turns)
                        rate = factor * flop / median_ms(torch, flush, run) / 1e9
                        cells.append(f"{line.name}{' in turns' if in_turns else ''} {rate:.0f}")
                if cells:
                    rate = factor * flop / flash_ms(torch, flush, call, direction) / 1e9
                    print(f"d{head_dim} {mask} {seqlen} {direction}: FlashAttention-2 {rate:.0f}; {', '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=pathlib.Path, default=ROOT / "cuda" / "instances.def")
    parser.add_argument("--cuda", type=pathlib.Path, nargs="+", default=[ROOT / "cuda"])
    parser.add_argument("--points", nargs="+", default=["full:4096", "causal:4096", "causal:512"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "tune")
    parser.add_argument("--nvcc", default=os.environ.get("NVCC", "nvcc"))
    parser.add_argument("--arch", default="90", help="compute capability times ten")
    options = parser.parse_args()

    found = lines(options.lines, options.cuda)
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda line: line.compile(options.nvcc, options.arch, options.out, options.reuse), found)
        for line, about in zip(found, compiled):
            print(f"{line.name}: {about}", flush=True)
    if not options.compile_only:
        points = [point.split(":") for point in options.points]
        measure(found, [(mask, int(seqlen)) for mask, seqlen in points], options.deterministic)


if __name__ == "__main__":
    main()
