"""Writes demo_model.json: what transformers' own GGUF loader makes of the demo model's file (weights and token ids).

usage: python make_demo_model.py SmolLM2-135M-Instruct.Q4_1.gguf     (torch, transformers, gguf)
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "The capital of France is",
    "In 2024, 1234567 people said 'naïve café' — twice!\n\n\tdef f(x):\n        return x**2",
    "日本語のテキスト and emoji 🙂🙃 mixed",
    "<|im_start|>user\nHello  there<|im_end|>\n<|im_start|>assistant\n",
]

source = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
digests = {
    name: hashlib.sha256(tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().tobytes()).hexdigest()
    for name, tensor in sorted(tensors.items())
}
total = hashlib.sha256("".join(name + digest for name, digest in digests.items()).encode()).hexdigest()
some = ["model.embed_tokens.weight", "model.layers.7.self_attn.q_proj.weight", "model.layers.7.self_attn.k_proj.weight"]
golden = {
    "num_tensors": len(digests),
    "sha256_of_all": total,
    "sha256": {name: digests[name] for name in some},
    "chat_template": tokenizer.chat_template,
    "tokens": [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS],
}
Path(__file__).with_suffix("").with_name("demo_model.json").write_text(
    json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
)
