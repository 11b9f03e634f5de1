"""What files of published checkpoints hold."""

INSTRUCT = {  # generation_config.json of Qwen2-7B-Instruct
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
}
