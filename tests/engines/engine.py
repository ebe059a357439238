"""Greedy tokens of vLLM's real engine, one engine for each process: `python engine.py MODEL OPTIONS PROMPTS`, all JSON.

Prints a JSON list of lists of tokens as its last line.
"""

import json
import sys

TOKENS = 12


def main() -> None:
    from vllm import LLM, SamplingParams

    model, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    tokens = options.pop("tokens", TOKENS)
    engine = LLM(model, max_num_seqs=8, disable_log_stats=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    print("\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
