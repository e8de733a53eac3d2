#!/usr/bin/env python3
"""Compares ours with other implementations: compare.py CSV..

The files come from `cargo bench --features cuda -- --csv`, from benches/peers.py, or from benches/record. The script prints TFLOP/s
of each call that ours and another have timed (medians over several runs), and geometric means of the ratios.
"""

import csv
import pathlib
import statistics
import sys
from collections import defaultdict

from peers import NAMES

KINDS = ("mha", "mha_v128", "gqa", "varlen", "varlen_gqa")


def read(files):
    """Median TFLOP/s by call and peer."""
    runs = defaultdict(lambda: defaultdict(list))
    for file in files:
        try:
            lines = [line for line in pathlib.Path(file).read_text().splitlines() if not line.startswith("#")]
        except OSError as error:
            sys.exit(f"{file}: {error.strerror}")
        for row in csv.DictReader(lines):
            if row.get("tflops") and row["kind"] in KINDS and row["dir"] in ("fwd", "bwd"):
                mask = "causal" if row["causal"] == "1" else "full"
                shape = f"{row['dtype']} d{row['hdim']:<3} h{row['hq']}/{row['hkv']:<2} {mask:<6}"
                call = KINDS.index(row["kind"]), row["dir"] == "bwd", shape, int(row["seqlen_q"])
                runs[call][row["peer"]].append(float(row["tflops"]))
    return {call: {peer: statistics.median(found) for peer, found in runs[call].items()} for call in sorted(runs)}


def main():
    files = sys.argv[1:]
    if not files or files[0].startswith("-"):
        sys.exit(__doc__)
    rates = {call: cell for call, cell in read(files).items() if "ours" in cell}
    peers = [peer for peer in NAMES if any(peer in cell for cell in rates.values())]
    if not peers:
        sys.exit(
            "these files have no call of ours and another; give a file of `cargo bench --features cuda -- --csv` and one of "
            "benches/peers.py"
        )
    print(f"{'TFLOP/s, and ours over theirs':<46} {'ours':>5}" + "".join(f"{NAMES[peer]:>20}" for peer in peers))
    ratios = defaultdict(list)
    for (kind, backward, shape, seqlen), cell in rates.items():
        line = f"{KINDS[kind]:<10} {'bwd' if backward else 'fwd'} {shape} s{seqlen}"
        line = f"{line:<46} {cell['ours']:>5.0f}"
        for peer in peers:
            text = "-"
            if peer in cell:
                ratio = cell["ours"] / cell[peer]
                ratios[kind, backward, peer].append(ratio)
                text = f"{cell[peer]:.0f}, {ratio:.2f}x"
            line += f"{text:>20}"
        print(line)
    print(f"\n{'ours over each':<34} {'geometric mean':>14} {'smallest':>9} {'calls':>6}")
    for (kind, backward, peer), found in sorted(ratios.items()):
        line = f"{KINDS[kind]:<10} {'bwd' if backward else 'fwd'} {NAMES[peer]}"
        print(f"{line:<34} {statistics.geometric_mean(found):>14.3f} {min(found):>9.2f} {len(found):>6}")


if __name__ == "__main__":
    main()
