"""For peers.py and tune.py: FLOP as the papers count them, and the times of calls on this GPU."""

import time

FLUSH_BYTES = 192 << 20  # more than the L2 cache of any GPU so far
PAUSE_S = 0.1  # the clock depends on the power that was drawn before
RUNS = 7, 100  # at least and at most, whatever time they take

PRODUCTS = {"fwd": (1, 1), "bwd": (3, 2), "fwd+bwd": (4, 3)}  # matrix products over head_dim and over head_dim_v


def papers_flop(pass_, head_dims, num_heads, pairs, causal):
    """FLOP of a pass over `pairs` of query and key in each head, visible or not; benches/attention/cases.rs counts alike.
    `head_dims` are those of q and of v."""
    columns = sum(count * head_dim for count, head_dim in zip(PRODUCTS[pass_], head_dims))
    return 2.0 * columns * num_heads * pairs * (0.5 if causal else 1.0)


class Timer:
    """Times a call by CUDA events for about `rep_ms`: warm, after a pause, with the L2 cache flushed before each run."""

    def __init__(self, torch, rep_ms):
        self.torch, self.rep_ms = torch, rep_ms
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def runs(self, call):
        """Milliseconds of each run, ascending."""
        cuda = self.torch.cuda
        event = lambda: cuda.Event(enable_timing=True)
        call()
        cuda.synchronize()
        time.sleep(PAUSE_S)
        marks = [event() for _ in range(3)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        cuda.synchronize()
        # The first of the two calls may have to allocate memory again.
        estimate = min(marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2]))
        count = int(min(max(self.rep_ms / max(estimate, 1e-3), RUNS[0]), RUNS[1]))
        pairs = [(event(), event()) for _ in range(count)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in pairs)
