"""The tiny checkpoints that other tests run on can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen3"])
def test_a_tiny_checkpoint_has_weights_and_says_every_text(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("hé 漢字\n🙂").ids) == "hé 漢字\n🙂"
