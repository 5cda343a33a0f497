"""The peer of `cargo bench --bench gpu`: the same shapes in PyTorch, on the same device.

Reads a JSON list of {"op", "shape"} from standard input, and prints a line of JSON for each that PyTorch has: seconds by
CUDA events, median after warm-up. Attention is scaled_dot_product_attention's flash backend; a linear layer is the base
product alone, with no adapter; product and copy are the device's limits.
"""
import json
import re
import statistics
import sys
import time


def main():
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"peer": f"no peer here: {error}"}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"peer": f"no peer here: torch {torch.__version__} sees no CUDA device"}))
        return
    print(json.dumps({"peer": f"torch {torch.__version__}, {torch.cuda.get_device_name()}"}), flush=True)
    for wanted in json.load(sys.stdin):
        made = work(torch, wanted["op"], [int(n) for n in re.findall(r"\d+", wanted["shape"])])
        if made is None:
            continue
        try:
            print(json.dumps({**wanted, "seconds": median(torch, made)}), flush=True)
        except RuntimeError as error:
            print(json.dumps({**wanted, "error": str(error).splitlines()[0]}), flush=True)
        torch.cuda.empty_cache()


def noise(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def work(torch, op, numbers):
    """What makes the operands and returns what is timed; None if PyTorch has no such op."""
    if op == "product":
        def make():
            x, w = noise(torch, numbers[0], numbers[2]), noise(torch, numbers[1], numbers[2])
            return lambda: torch.nn.functional.linear(x, w)
        return make
    if op == "copy":
        def make():
            x = noise(torch, numbers[0] * 500_000)
            y = torch.empty_like(x)
            return lambda: y.copy_(x)
        return make
    if op in ("LoRA linear forward", "LoRA linear backward"):
        m, n, k = numbers[:3]
        def make():
            x, w, dy = noise(torch, m, k), noise(torch, n, k), noise(torch, m, n)
            if op.endswith("forward"):
                return lambda: torch.matmul(x, w.T)
            return lambda: torch.matmul(dy, w)
        return make
    if op in ("attention forward", "attention backward"):
        return lambda: attention(torch, op, *numbers[:4])
    return None


def attention(torch, op, length, heads, kv_heads, size):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Flash attention of PyTorch wants as many key heads as query heads, or is asked to share them.
    q = noise(torch, 1, heads, length, size).requires_grad_()
    k = noise(torch, 1, kv_heads, length, size).requires_grad_()
    v = noise(torch, 1, kv_heads, length, size).requires_grad_()

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if op.endswith("forward"):
        def run():
            with torch.no_grad():
                forward()
        return run
    o = forward()
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def median(torch, make):
    run = make()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    seconds, started = [], time.monotonic()
    while len(seconds) < 3 or (len(seconds) < 50 and time.monotonic() - started < 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
