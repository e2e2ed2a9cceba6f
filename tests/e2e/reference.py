"""What transformers says to twenty chats with the same weights: the truth of the end-to-end tests."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in one paragraph.",
    "List three uses of copper.",
    "Translate 'good morning' to Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What is 17 times 6?",
    "Why is the sky blue?",
    "Tell me a joke about cats.",
    "Summarise the plot of Romeo and Juliet.",
    "What is machine learning?",
    "Name five countries in Africa.",
    "How do I tie a tie?",
    "What causes earthquakes?",
    "Write a Python function that adds two numbers.",
    "Describe the water cycle.",
    "What is the difference between a virus and a bacterium?",
    "Give me advice for a job interview.",
    "What should I pack for a hike?",
]
NUM_TOKENS = 64


@functools.cache
def reference_texts() -> dict[str, str]:
    """Greedy answers of transformers, by prompt; computed once (a minute), kept in the cache folder."""
    import transformers

    from modelfiles.store import resolve

    gguf = Path(resolve("smollm2"))
    key = hashlib.sha256(
        json.dumps([PROMPTS, NUM_TOKENS, transformers.__version__, gguf.name, gguf.stat().st_size]).encode()
    )
    cache = Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "baton", "tests", f"{key.hexdigest()[:16]}.json"
    )
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_generate(gguf)))
        partial.replace(cache)
    return json.loads(cache.read_text())


def _generate(gguf: Path) -> dict[str, str]:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # transformers does not know the GGUF's pre-tokenizer "smollm" and takes GPT-2's, which joins digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    texts: dict[str, str] = {}
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        output = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        texts[prompt] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return texts
