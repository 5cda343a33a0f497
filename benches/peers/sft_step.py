"""The peer of benches/sft_step.rs: the same step in PyTorch, transformers and PEFT. One JSON line per dtype.

    pip install torch==2.11.0 transformers==4.57.6 peft==0.18.1
    python benches/peers/sft_step.py > peer.jsonl

f32 is f32 throughout. bf16 is what Trainer(bf16=True) does: frozen weights in bf16, adapter in f32, autocast.
"""

import json
import resource
import subprocess
import sys
import time

TOKENS, STEPS, THREADS = 512, 4, 2


def measure(dtype):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    shape = Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6, attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model = Qwen2ForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=linears))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.tensor([[i * 2654435761 % 2**32 % 151000 for i in range(TOKENS)]])
    for step in range(STEPS + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            wall, cpu = time.perf_counter(), time.process_time()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "dtype": dtype,
        "peer": f"torch {torch.__version__}",
        "tokens_per_s": TOKENS * STEPS / wall,
        "tokens_per_cpu_s": TOKENS * STEPS / cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        for dtype in ["f32", "bf16"]:
            print(subprocess.run([sys.executable, __file__, dtype], check=True, capture_output=True, text=True).stdout, end="")
