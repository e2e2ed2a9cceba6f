"""128-bit digests of KV blocks, computed where the blocks lie."""
