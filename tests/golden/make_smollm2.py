"""Writes smollm2.json: transformers' greedy continuations of five prompts by the demo model, in float32.

usage: python make_smollm2.py FOLDER      (the demo model as a Hugging Face folder; torch, transformers)
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Question: What is 12 + 30?\nAnswer:",
]
NUM_TOKENS = 32

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
golden = []
for prompt in PROMPTS:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens, logprobs, margins = list(ids), [], []
    for _ in range(NUM_TOKENS):  # no generate(): its defaults stop at the end of a turn
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], dim=-1)
        best = torch.topk(scores, 2)
        tokens.append(int(best.indices[0]))
        logprobs.append(round(float(best.values[0]), 6))
        margins.append(float(best.values[0] - best.values[1]))
    golden.append(
        {"prompt": ids, "tokens": tokens[len(ids) :], "logprobs": logprobs, "smallest_margin": round(min(margins), 6)}
    )
Path(__file__).with_name("smollm2.json").write_text(json.dumps(golden) + "\n")
