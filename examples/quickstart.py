import tinker
from tinker import types

service = tinker.ServiceClient(base_url="http://localhost:8000", api_key="tml-local")
training = service.create_lora_training_client(base_model="HuggingFaceTB/SmolLM2-135M-Instruct", rank=8).result()
tokenizer = training.get_tokenizer()
prompt = tokenizer.encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
answer = tokenizer.encode("I am tx. I train and sample on your own machine.<|im_end|>")
datum = types.Datum(
    model_input=types.ModelInput.from_ints((prompt + answer)[:-1]),
    loss_fn_inputs={"target_tokens": (prompt + answer)[1:], "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(answer)},
)
for step in range(8):
    loss = training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=2e-3)).result()
    print(f"step {step}: loss per token {loss.result().metrics['loss:sum'] / len(answer):.3f}")
sampler = training.save_weights_and_get_sampling_client().result()
greedy = types.SamplingParams(max_tokens=32, temperature=0.0)
reply = sampler.sample(types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=greedy).result()
print(tokenizer.decode(reply.sequences[0].tokens))
service.close("success").result()
