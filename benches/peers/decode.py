"""The peer of benches/decode.rs: greedy decoding by transformers' `generate`, in turns with it.

    pip install torch==2.11.0 transformers==4.57.6
    PEER_PYTHON=venv/bin/python cargo bench --bench decode

Reads batch sizes, one a line, and answers each with a line of JSON. By hand:
    echo 8 | python benches/peers/decode.py f32 128 64 2
"""

import json
import sys
import time


def main():
    dtype, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:5])
    import torch
    import transformers
    from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6, attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model = Qwen2ForCausalLM(shape).eval()
    torch.set_default_dtype(torch.float32)

    class Clock(StoppingCriteria):
        """Never stops, and notes when each token was there."""

        def __init__(self):
            self.at, self.cpu = [], []

        def __call__(self, ids, scores, **_):
            self.at.append(time.perf_counter())
            self.cpu.append(time.process_time())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    def decode(batch, new):
        rows = [[(i + 1000 * row) * 2654435761 % 2**32 % 151000 for i in range(prompt)] for row in range(batch)]
        ids, clock = torch.tensor(rows), Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[clock],
            )
        assert out.shape == (batch, prompt + new) and len(clock.at) == new, (out.shape, len(clock.at))
        return {
            "steps": (new - 1) * batch / (clock.at[-1] - clock.at[0]),
            "fastest": batch / min(after - before for before, after in zip(clock.at, clock.at[1:])),
            "per_cpu": (new - 1) * batch / (clock.cpu[-1] - clock.cpu[0]),
            "prompts": prompt * batch / (clock.at[0] - start),
        }

    decode(1, 4)
    print(json.dumps({"name": f"transformers {transformers.__version__}, torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(int(line), new)), flush=True)


if __name__ == "__main__":
    main()
