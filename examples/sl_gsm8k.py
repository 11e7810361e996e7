# /// script
# requires-python = ">=3.11"
# dependencies = ["tinker>=0.38", "rich"]
# ///
"""Supervised fine-tuning on GSM8K: the loss falls, the held-out loss with it.

Start a server (`uv run --extra demo -m tx.tinker.api`), fetch the data once (`train.jsonl` and `test.jsonl` of
https://github.com/openai/grade-school-math: one {"question": …, "answer": …} per line), then
`uv run examples/sl_gsm8k.py --train train.jsonl --test test.jsonl`. Ends by saving the weights and solving one
problem with them.
"""

import argparse
import json
import random
from pathlib import Path

import tinker
from rich.progress import track
from tinker import types


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a GSM8K file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_of(row: dict[str, str]) -> str:
    """The question as a one-turn ChatML prompt."""
    return f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"


def datum(tokenizer: object, row: dict[str, str], max_length: int) -> tuple[types.Datum, float]:
    """One problem as a training example, and how many of its tokens count (those of the answer)."""
    prompt, answer = tokenizer.encode(prompt_of(row)), tokenizer.encode(row["answer"] + "<|im_end|>")
    tokens = (prompt + answer)[:max_length]
    weights = ([0.0] * (len(prompt) - 1) + [1.0] * len(answer))[: len(tokens) - 1]
    example = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )
    return example, sum(weights)


def main() -> None:
    """Parse the flags, train, evaluate, sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=512, help="longer examples are cut")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()

    service = tinker.ServiceClient(base_url=flags.base_url, api_key="tml-local")
    training = service.create_lora_training_client(base_model=flags.model, rank=flags.rank, seed=flags.seed)
    tokenizer = training.get_tokenizer()
    train, test = read(flags.train), read(flags.test)
    random.Random(flags.seed).shuffle(train)

    held_out = [datum(tokenizer, row, flags.max_length) for row in test[: 2 * flags.batch]]

    def evaluate() -> float:
        result = training.forward([example for example, _ in held_out], "cross_entropy").result()
        return result.metrics["loss:sum"] / sum(count for _, count in held_out)

    print(f"held-out loss per token before: {evaluate():.4f}")
    for step in track(range(flags.steps), description="training"):
        rows = [train[(step * flags.batch + i) % len(train)] for i in range(flags.batch)]
        examples = [datum(tokenizer, row, flags.max_length) for row in rows]
        num_tokens = sum(count for _, count in examples)
        # Losses are sums; a rate that shouldn't depend on the batch wants weights that sum to 1.
        for example, _ in examples:
            weights = example.loss_fn_inputs["weights"]
            weights.data = [weight / num_tokens for weight in weights.data]
        loss = training.forward_backward([example for example, _ in examples], "cross_entropy")
        rate = flags.learning_rate * (1 - step / flags.steps)
        training.optim_step(types.AdamParams(learning_rate=rate)).result()
        print(f"step {step:3d}  loss per token {loss.result().metrics['loss:sum']:.4f}  {num_tokens:.0f} tokens")
    print(f"held-out loss per token after:  {evaluate():.4f}")

    print("saved:", training.save_state("gsm8k", overwrite=True).result().path)
    sampler = training.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(tokenizer.encode(prompt_of(test[0])))
    params = types.SamplingParams(max_tokens=160, temperature=0.0)
    reply = sampler.sample(prompt, 1, params).result().sequences[0]
    print(test[0]["question"], "→", tokenizer.decode(reply.tokens, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main()
