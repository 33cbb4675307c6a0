"""Continue prompts greedily with vLLM; run by the Python of an environment that has it.

    VENV/bin/python vllm_texts.py '{"folder": .., "prompts": [[1, 2]], "new": 8, "cache_bytes": ..}'

Prints one JSON line: the new tokens of each prompt, the sum of their log-probabilities, and the
number of tokens that the KV cache holds.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    model = LLM(
        asked["folder"],
        dtype="float32",
        max_model_len=asked["length"],
        kv_cache_memory_bytes=asked["cache_bytes"],
        gpu_memory_utilization=0.3,  # of free memory; the cache has the given size
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new"], logprobs=0, ignore_eos=True, detokenize=False
    )
    found = [one.outputs[0] for one in model.generate(prompts, sampling)]
    cache = model.llm_engine.vllm_config.cache_config
    result = {
        "tokens": [list(one.token_ids) for one in found],
        "log_probability": [one.cumulative_logprob for one in found],
        "capacity": cache.num_gpu_blocks * cache.block_size,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
