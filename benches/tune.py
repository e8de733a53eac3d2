#!/usr/bin/env python3
"""Times variants of the kernels next to PyTorch's FlashAttention-2. It needs a GPU, nvcc and PyTorch, but no Rust.

    cargo run --bin kernel-build -- describe --dtype bf16 --plain > kernels.json     on a machine with Rust
    cargo run -p attention-reference -- fixtures target/fixtures 64 128              on the same machine: the right answers
    tune.py kernels.json                        the kernels of cuda/instances.def
    tune.py kernels.json --points full:4096 causal:512
    tune.py kernels.json --deterministic        each backward once more, adding to dq_accum in a fixed order
    tune.py kernels.json --fixtures DIR         the folder of the fixtures, if it is not target/fixtures
    tune.py kernels.json --compile-only         compiles, and needs no GPU
    tune.py kernels.json --reuse                takes the compiled kernels from --out

`describe --table FILE` reads another table, with tiles to try. `describe --cuda DIR` reads another copy of the sources. A JSON file
holds sources, headers and layouts. Several files can be given. Then the names of their kernels end in _0, _1, .. in this order.

The script takes plain kernels of bf16. A point is a mask and a seqlen, at 16,384 tokens and heads x head_dim = 2048 (16 heads for 96
and 192). For each kernel the script prints what ptxas reports, and the largest error over the fixtures of its head_dim, as a share
of the limit of the tests. Then it prints TFLOP/s (4 s^2 d h b, half if causal; backward 2.5 times that), with the L2 cache flushed
before each call. A backward is zeroing, delta, main kernel and conversion.
"""

import argparse
import ctypes
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from measure import Timer, papers_flop

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS, WIDTH = 16384, 2048
LOG2_E = math.log2(math.e)
OPEN_SIDE = 1 << 29  # MAX_SEQLEN of the plan: a window that hides nothing
REPEAT_MS = 60
NULL = 0


def ceil_div(a, b):
    return -(-a // b)


class Structs:
    """The parameter structs as ctypes, made from the layout in the description."""

    SCALARS = {
        "i32": ctypes.c_int32,
        "u32": ctypes.c_uint32,
        "i64": ctypes.c_int64,
        "u64": ctypes.c_uint64,
        "f32": ctypes.c_float,
        "pointer": ctypes.c_uint64,
    }

    def __init__(self, described):
        self.described, self.types = described, {}
        for name, struct in described.items():  # a struct comes after those that it contains
            self.types[name] = self.make(name, struct)

    def make(self, name, struct):
        fields, end = [], 0

        def pad(to):
            if to > end:
                fields.append((f"padding_{end}", ctypes.c_char * (to - end)))

        for field in struct["fields"]:
            ctype = self.types[field["struct"]] if "struct" in field else self.SCALARS[field["type"]]
            ctype = ctype * field["count"] if "count" in field else ctype
            pad(field["offset"])
            fields.append((field["name"], ctype))
            end = field["offset"] + ctypes.sizeof(ctype)
        pad(struct["size"])
        # Packed, with explicit padding, because ctypes has no alignas.
        return type(name, (ctypes.Structure,), {"_pack_": 1, "_layout_": "ms", "_fields_": fields})

    def fill(self, name, values):
        """Makes a struct from values by field name: numbers, dicts for structs, sequences for arrays."""
        params, fields = self.types[name](), {field["name"]: field for field in self.described[name]["fields"]}
        if fields.keys() != values.keys():
            sys.exit(f"{name} has the fields {', '.join(fields)}, but tune.py fills {', '.join(values)}")
        for field, value in values.items():
            if "struct" in fields[field]:
                value = self.fill(fields[field]["struct"], value)
            elif "count" in fields[field]:
                value = type(getattr(params, field))(*value)
            setattr(params, field, value)
        return params


class Kernel:
    """A kernel of a unit, with what its launch needs."""

    def __init__(self, row, image):
        self.image = image
        self.name, self.params, self.max_tiles = row["name"], row["params"], row.get("max_tiles")
        self.threads, self.shared_bytes = row["threads"], row["shared_bytes"]
        self.element_bytes = row["element_bytes"]
        self.head_dim, self.block_m, self.block_n = (row.get(name) for name in ("head_dim", "block_m", "block_n"))
        self.cluster = row.get("cluster", 1)
        self.box_cols = row.get("box_cols")  # of a tensor map


class Line:
    """The kernels of one line of a table, compiled together."""

    def __init__(self, unit, description):
        self.unit, self.description = unit, description
        self.name = unit["name"] + description.tag
        self.image = description.folder / f"{unit['name']}.cubin"
        self.kernels = {row["pass"]: Kernel(row, self.image) for row in unit["kernels"]}
        if len(self.kernels) != len(unit["kernels"]):
            sys.exit(f"{self.name} has kernels of several types or variants, but tune.py takes one; describe it with --dtype bf16 --plain")
        self.kind = unit["kernels"][0]["pass"]
        self.main = self.kernels[self.kind]
        self.head_dim = self.main.head_dim

    def compile(self, nvcc, arch, reuse):
        """Compiles the image, and returns what ptxas reports of the kernel."""
        log = self.image.with_suffix(".txt")
        if not reuse:
            source = self.image.with_suffix(".cu")
            source.write_text(self.unit["source"])
            target = f"-arch=sm_{arch}{'a' if self.unit['exact'] else ''}"
            command = [nvcc, *self.description.flags, target, "-cubin", "-I", self.description.folder, "-o", self.image, source]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise SystemExit(f"{self.name} does not compile:\n{run.stderr}")
            log.write_text(run.stdout + run.stderr)
        elif not (self.image.exists() and log.exists()):
            sys.exit(f"{self.image} does not exist, so --reuse cannot take it; run without --reuse first")
        # The two lines after the name: local memory, and registers.
        text = log.read_text().partition(f"Function properties for {self.main.name}\n")[2].splitlines()[:2]
        return "; ".join([line.strip() for line in text] + [f"{self.main.shared_bytes} bytes of dynamic shared memory"])


class Description:
    """A file that kernel-build wrote, with its headers unpacked into a folder."""

    def __init__(self, path, folder, tag):
        described = json.loads(path.read_text())
        self.folder, self.tag, self.flags, self.structs = folder, tag, described["flags"], Structs(described["structs"])
        self.constants = described["constants"]  # the numbers of cuda/params.h
        for name, text in described["headers"].items():
            header = folder / name
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)
        self.lines = [Line(unit, self) for unit in described["units"]]

    def runs_on(self, line, arch):
        return arch == line.unit["sm"] if line.unit["exact"] else arch >= line.unit["sm"]

    def companion(self, kind):
        found = [line for line in self.lines if line.kind == kind]
        return found[0] if found else sys.exit(f"the table has no line KERNEL({kind.lower()}, sm80, warps), which a backward needs")


def read(paths, out, arch):
    """The lines of all files that the GPU runs."""
    lines = []
    for index, path in enumerate(paths):
        tag = f"_{index}" if len(paths) > 1 else ""
        description = Description(path, out / f"cuda{tag}", tag)
        for line in description.lines:
            if description.runs_on(line, arch):
                lines.append(line)
            else:
                print(f"{line.name} does not run on sm_{arch}: skipped")
    forwards = {line.head_dim for line in lines if line.kind == "Forward"}
    lacking = {line.head_dim for line in lines if line.kind == "Backward"} - forwards
    if lacking:
        sys.exit(f"there is no forward of head_dim {sorted(lacking)}, which a backward needs")
    return lines


class Driver:
    """Loads images once, launches kernels on PyTorch's stream, and encodes tensor maps."""

    def __init__(self, torch):
        self.torch, self.cuda, self.functions = torch, ctypes.CDLL("libcuda.so.1"), {}
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def check(self, result, what):
        if result != 0:
            name = ctypes.c_char_p()
            self.cuda.cuGetErrorName(result, ctypes.byref(name))
            raise RuntimeError(f"{what}: {name.value}")

    def function(self, kernel):
        key = (kernel.image, kernel.name)
        if key not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), kernel.image.read_bytes()), kernel.image)
            self.check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()), kernel.name)
            max_dynamic_shared_bytes = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.check(self.cuda.cuFuncSetAttribute(function, max_dynamic_shared_bytes, kernel.shared_bytes), kernel.name)
            self.functions[key] = function
        return self.functions[key]

    def launch(self, kernel, grid, params):
        function = self.function(kernel)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        launch = self.cuda.cuLaunchKernel
        self.check(launch(function, *grid, kernel.threads, 1, 1, kernel.shared_bytes, stream, arguments, None), kernel.name)

    def tensor_map(self, kernel, tensor, box_rows):
        """The tensor map of (head_dim, rows, heads, batch), encoded as in src/cuda/tensor_map.rs."""
        bfloat16, no_interleave, promotion_256b, fill_zeros = 9, 0, 3, 0  # values of the enums CUtensorMap..
        swizzle = {64: 2, 128: 3}[kernel.box_cols * kernel.element_bytes]  # SWIZZLE_64B, SWIZZLE_128B
        batch, rows, heads, head_dim = tensor.shape
        strides = [tensor.stride(axis) * kernel.element_bytes for axis in (1, 2, 0)]
        # cuTensorMapEncodeTiled requires the address of the map to be a multiple of 64.
        memory = (ctypes.c_uint64 * 24)()
        address = ceil_div(ctypes.addressof(memory), 64) * 64
        encoded = self.cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(address),
            bfloat16,
            4,
            ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 4)(head_dim, rows, heads, batch),
            (ctypes.c_uint64 * 3)(*strides),
            (ctypes.c_uint32 * 4)(kernel.box_cols, box_rows, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            *(no_interleave, swizzle, promotion_256b, fill_zeros),
        )
        self.check(encoded, f"a tensor map of {tuple(tensor.shape)} for {kernel.name}")
        return {"words": (ctypes.c_uint64 * 16).from_address(address)[:]}


def strides(tensor):
    return dict(zip(("batch", "row", "head"), tensor.stride()))


class Call:
    """One attention call on given inputs. Its results start as NaN."""

    def __init__(self, driver, q, k, v, do, causal):
        torch = driver.torch
        self.driver, self.causal = driver, causal
        self.q, self.k, self.v, self.do = q, k, v, do
        batch, seqlen_q, num_heads, head_dim = q.shape
        seqlen_k, num_heads_k = k.shape[1:3]
        self.softmax_scale = 1 / math.sqrt(head_dim)
        self.batch, self.seqlen_q, self.seqlen_k = batch, seqlen_q, seqlen_k
        self.num_heads, self.num_heads_k, self.head_dim = num_heads, num_heads_k, head_dim
        self.o, self.dq = (torch.full_like(self.q, math.nan) for _ in range(2))
        self.dk, self.dv = (torch.full_like(self.k, math.nan) for _ in range(2))
        self.lse, self.delta = (torch.full((batch, num_heads, seqlen_q), math.nan, device="cuda") for _ in range(2))
        self.shape = {
            "cu_seqlens_q": NULL,
            "cu_seqlens_k": NULL,
            "key_lengths": NULL,
            "alibi_slopes": NULL,
            "lse_batch": num_heads * seqlen_q,
            "lse_head": seqlen_q,
            "alibi_batch": 0,
            "batch": batch,
            "first_batch": 0,
            "keys_at_end": 0,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "num_heads": num_heads,
            "num_heads_k": num_heads_k,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "window_left": OPEN_SIDE,
            "window_right": 0 if causal else OPEN_SIDE,
            "softmax_scale_log2": self.softmax_scale * LOG2_E,
            "softcap_log2": 0,
            "softmax_scale_over_softcap": 0,
        }

    def launch(self, line, kernel, grid, values):
        """A launch, to be called any number of times."""
        params = line.description.structs.fill(kernel.params, values)
        return lambda: self.driver.launch(kernel, grid, params)

    def forward(self, line):
        kernel, parts = line.main, ceil_div(line.main.head_dim, line.description.constants["kMaxWidth"])
        m_blocks = ceil_div(self.seqlen_q, kernel.block_m) * parts
        values = {
            "q": self.q.data_ptr(),
            "k": self.k.data_ptr(),
            "v": self.v.data_ptr(),
            "o": self.o.data_ptr(),
            "lse": self.lse.data_ptr(),
            "q_strides": strides(self.q),
            "k_strides": strides(self.k),
            "v_strides": strides(self.v),
            "o_strides": strides(self.o),
            "shape": self.shape,
            "o_is_f32": 0,
        }
        if kernel.params == "FwdParams":
            return self.launch(line, kernel, (m_blocks, self.num_heads, self.batch), values)
        # As the plan does.
        section_tiles = line.description.constants["kForwardSection"] * self.driver.multiprocessors if self.causal else 1
        schedule = self.schedule(line, m_blocks, self.num_heads, section_tiles)
        blocks = max(min(schedule["tiles"], self.driver.multiprocessors), ceil_div(schedule["tiles"], kernel.max_tiles // 2))
        persistent = {
            "q": self.driver.tensor_map(kernel, self.q, kernel.block_m),
            "k": self.driver.tensor_map(kernel, self.k, kernel.block_n),
            "v": self.driver.tensor_map(kernel, self.v, kernel.block_n),
            "fwd": values,
            "schedule": schedule,
        }
        return self.launch(line, kernel, (blocks, 1, 1), persistent)

    def schedule(self, line, head_tiles, num_heads, section_tiles):
        """The work tiles of a persistent kernel. The plan also avoids a short last section; these points have none."""
        # The kernel finds zeros and leaves zeros.
        self.counters = self.driver.torch.zeros(2, dtype=self.driver.torch.int32, device="cuda")
        heads = num_heads * self.batch
        most_heads = min(line.description.constants["kMaxSectionHeads"], heads)
        section_heads = max(1, min(most_heads, round(section_tiles / head_tiles)))
        return {
            "counters": self.counters.data_ptr(),
            "tiles": head_tiles * heads,
            "head_tiles": head_tiles,
            "section_heads": section_heads,
        }

    def backward(self, line, deterministic):
        torch, shape = self.driver.torch, self.shape
        kernel, delta, convert = line.main, *(line.description.companion(kind) for kind in ("Delta", "Convert"))
        heads, constants = (self.num_heads, self.batch), line.description.constants
        group_rows = constants["kDqGroupRows"]
        parts = ceil_div(kernel.head_dim, constants["kMaxWidth"])  # thread blocks that share the columns of a tile

        def row_blocks(rows):
            head = ceil_div(self.seqlen_q, rows)
            return {"batch": self.num_heads * head, "head": head, "count": math.prod(heads) * head}

        groups, tiles = row_blocks(group_rows), row_blocks(kernel.block_m)
        dq_accum = torch.empty(groups["count"] * group_rows * kernel.head_dim, device="cuda")
        semaphores = torch.zeros(tiles["count"] * parts + 1, dtype=torch.int32, device="cuda") if deterministic else None
        # As the plan does: the number of threads of a row is a power of two, and at most those of a warp.
        chunks = ceil_div(self.head_dim, constants["kDeltaChunk"])
        lanes = min(constants["kWarpSize"], max(constants["kDeltaMinLanes"], 1 << (chunks - 1).bit_length()))
        run_delta = self.launch(
            delta,
            delta.main,
            (ceil_div(self.seqlen_q, delta.main.threads // lanes), *heads),
            {
                "o": self.o.data_ptr(),
                "do_": self.do.data_ptr(),
                "dlse": NULL,
                "delta": self.delta.data_ptr(),
                "o_strides": strides(self.o),
                "do_strides": strides(self.do),
                "shape": shape,
            },
        )
        values = {
            "q": self.q.data_ptr(),
            "k": self.k.data_ptr(),
            "v": self.v.data_ptr(),
            "do_": self.do.data_ptr(),
            "lse": self.lse.data_ptr(),
            "delta": self.delta.data_ptr(),
            "dq_accum": dq_accum.data_ptr(),
            "semaphores": semaphores.data_ptr() if deterministic else NULL,
            "dk": self.dk.data_ptr(),
            "dv": self.dv.data_ptr(),
            "q_strides": strides(self.q),
            "k_strides": strides(self.k),
            "v_strides": strides(self.v),
            "do_strides": strides(self.do),
            "dk_strides": strides(self.dk),
            "dv_strides": strides(self.dv),
            "dq_groups": groups,
            "dq_tiles": tiles,
            "shape": shape,
            "softmax_scale": self.softmax_scale,
        }
        keys = kernel.cluster * kernel.block_n
        grid = (ceil_div(self.seqlen_k, keys) * parts, self.num_heads_k, self.batch)
        if kernel.params == "Sm90BwdParams":
            takers = self.driver.multiprocessors // kernel.cluster
            schedule = self.schedule(line, grid[0], self.num_heads_k, constants["kBackwardSection"] * takers)
            grid = (kernel.cluster * min(schedule["tiles"], takers), 1, 1)
            values = {
                "q": self.driver.tensor_map(kernel, self.q, kernel.block_m),
                "k": self.driver.tensor_map(kernel, self.k, kernel.block_n),
                "v": self.driver.tensor_map(kernel, self.v, kernel.block_n),
                "do_": self.driver.tensor_map(kernel, self.do, kernel.block_m),
                "bwd": values,
                "schedule": schedule,
            }
        run_main = self.launch(line, kernel, grid, values)
        warps = convert.main.threads // constants["kWarpSize"]
        run_convert = self.launch(
            convert,
            convert.main,
            (ceil_div(groups["head"] * ceil_div(self.head_dim, constants["kConvertCols"]), warps), *heads),
            {
                "dq_accum": dq_accum.data_ptr(),
                "dq": self.dq.data_ptr(),
                "dq_strides": strides(self.dq),
                "dq_groups": groups,
                "shape": shape,
                "dq_accum_head_dim": kernel.head_dim,
                "softmax_scale": self.softmax_scale,
            },
        )

        def run():
            dq_accum.zero_()
            if deterministic:
                semaphores.zero_()
            run_delta()
            run_main()
            run_convert()

        return run


def draw(driver, batch, seqlen, num_heads, head_dim, causal):
    """A call on random inputs."""
    torch = driver.torch
    generator = torch.Generator("cuda").manual_seed(seqlen)
    shape = (batch, seqlen, num_heads, head_dim)
    normal = lambda: torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)
    return Call(driver, normal(), normal(), normal(), normal(), causal)


class Fixture:
    """A call with its right answers and the limit of each row, as crates/reference/src/fixtures.rs writes them."""

    def __init__(self, torch, folder, case):
        self.torch, self.folder, self.case = torch, folder, case

    def tensor(self, name):
        about = self.case["tensors"][name]
        dtype = {"bf16": self.torch.bfloat16, "f32": self.torch.float32}[about["dtype"]]
        numbers = bytearray((self.folder / about["file"]).read_bytes())
        return self.torch.frombuffer(numbers, dtype=dtype).view(about["shape"]).cuda()

    def call(self, driver):
        return Call(driver, *map(self.tensor, ("q", "k", "v", "do")), self.case["causal"])

    def share_of_limit(self, name, got):
        """The largest error of a result as a share of its row's limit; infinity for NaN."""
        off = (got.float() - self.tensor(name)).abs()
        rows = off if name == "lse" else off.amax(-1)
        share = (rows / self.tensor(f"{name}_limits")).max().item()
        return math.inf if math.isnan(share) else share


def read_fixtures(torch, folder, head_dims):
    """The fixtures of each head_dim."""
    index = folder / "fixtures.json"
    write = f"`cargo run -p attention-reference -- fixtures {folder} {' '.join(map(str, head_dims))}`"
    if not index.exists():
        sys.exit(f"{index} does not exist; {write} writes it")
    cases = json.loads(index.read_text())["cases"]
    of = lambda d: [Fixture(torch, folder, case) for case in cases if case["name"].startswith(f"d{d}-")]
    fixtures = {head_dim: of(head_dim) for head_dim in head_dims}
    lacking = [str(head_dim) for head_dim, found in fixtures.items() if not found]
    if lacking:
        sys.exit(f"{index} has no case for head_dim {', '.join(lacking)}; {write} writes all")
    return fixtures


def error(line, forward, driver, deterministic, fixtures):
    """The largest error of a line's kernels as a share of the limit."""
    worst = 0.0
    for fixture in fixtures:
        call = fixture.call(driver)
        call.forward(line if line.kind == "Forward" else forward)()
        results = {"o": call.o, "lse": call.lse}
        if line.kind == "Backward":
            call.backward(line, deterministic)()
            results |= {"dq": call.dq, "dk": call.dk, "dv": call.dv}
        worst = max([worst, *(fixture.share_of_limit(name, got) for name, got in results.items())])
    return worst


def flash_runs(timer, call, pass_):
    """Times of PyTorch's FlashAttention-2."""
    torch = timer.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (call.q, call.k, call.v))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=call.causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if pass_ == "fwd":
            with torch.no_grad():
                return timer.runs(attend)
        o, do = attend(), call.do.transpose(1, 2)
        return timer.runs(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))


def measure(lines, points, deterministic, folder):
    import torch

    fixtures = read_fixtures(torch, folder, sorted({line.head_dim for line in lines if line.kind in ("Forward", "Backward")}))
    driver, timer = Driver(torch), Timer(torch, REPEAT_MS)
    print(torch.cuda.get_device_name())
    # The first forward of each head_dim computes o and lse for all backwards.
    forwards = {line.head_dim: line for line in reversed(lines) if line.kind == "Forward"}
    variants = [(line, False, line.name) for line in lines if line.kind in ("Forward", "Backward")]
    if deterministic:
        variants += [(line, True, f"{line.name} in order") for line in lines if line.kind == "Backward"]
    for line, in_order, name in variants:
        share = error(line, forwards[line.head_dim], driver, in_order, fixtures[line.head_dim])
        note = "" if share <= 1 else "   WRONG"
        print(f"{name}: error {share:.0%} of its limit{note}", flush=True)
    for head_dim in sorted({line.head_dim for line, *_ in variants}):
        num_heads = 16 if head_dim in (96, 192) else min(WIDTH // head_dim, 32)
        for mask, seqlen in points:
            causal, batch = mask == "causal", TOKENS // seqlen
            call = draw(driver, batch, seqlen, num_heads, head_dim, causal)
            call.forward(forwards[head_dim])()
            for kind, pass_ in [("Forward", "fwd"), ("Backward", "bwd")]:
                flop = papers_flop(pass_, (head_dim, head_dim), num_heads, batch * seqlen**2, causal)
                rate = lambda runs: flop / statistics.median(runs) / 1e9
                cells = []
                for line, in_order, name in variants:
                    if (line.head_dim, line.kind) == (head_dim, kind):
                        run = call.forward(line) if kind == "Forward" else call.backward(line, in_order)
                        cells.append(f"{name} {rate(timer.runs(run)):.0f}")
                if cells:
                    flash = rate(flash_runs(timer, call, pass_))
                    print(f"d{head_dim} {mask} {seqlen} {kind}: FlashAttention-2 {flash:.0f}; {', '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=pathlib.Path, nargs="+", help="the output of `kernel-build describe`")
    parser.add_argument("--points", nargs="+", default=["full:4096", "causal:4096", "causal:512"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--fixtures", type=pathlib.Path, default=ROOT / "target" / "fixtures")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "tune")
    parser.add_argument("--nvcc", default=os.environ.get("NVCC", "nvcc"))
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    options = parser.parse_args()

    lines = read(options.kernels, options.out, options.arch)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda line: line.compile(options.nvcc, options.arch, options.reuse), lines)
        for line, about in zip(lines, compiled):
            print(f"{line.name}: {about}", flush=True)
    if not options.compile_only:
        points = [point.split(":") for point in options.points]
        measure(lines, [(mask, int(seqlen)) for mask, seqlen in points], options.deterministic, options.fixtures)


if __name__ == "__main__":
    main()
