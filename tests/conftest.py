"""What every test shares: tiny checkpoints, and the rule that tests with real processes run one after another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# tests/kernels/triton is for Triton's interpreter. Triton decides when it is imported, for its own library too,
# and transformers imports it: so it is told before any test file is. What compiles does so in a process without.
os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["tests.cluster.fixtures"]
_WITH_PROCESSES = {"integration", "e2e", "cluster"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out whole files, and keep all tests that start processes on one pytest-xdist worker.

    xdist's own `--dist loadgroup` has no effect under pytest 9.2: it sets a node id that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "processes" if _WITH_PROCESSES & set(file.split("/")) else file

    return Scheduling(config, log)


TINY_VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers (4 heads, 2 KV heads of 16) written by transformers, with a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.3,  # spreads the logits: with 0.02 every output would be one repeated token
    )
    return _write_checkpoint(tmp_path_factory.mktemp("tiny-llama"), LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 2 layers with tied embeddings, written by transformers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return _write_checkpoint(tmp_path_factory.mktemp("tiny-qwen3"), Qwen3ForCausalLM, config)


def _write_checkpoint(folder: Path, model_class: type, config: object) -> Path:
    """Random weights from a fixed seed, so that a failure can be run again."""
    import torch

    torch.manual_seed(7)
    model_class(config).eval().save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens (ids from 3 on): every text can be said, and a chat template to say it with."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {character: 3 + i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
