"""Drawing tokens: min_tokens mask, penalties, temperature, top-k, top-p, and a counter-based generator."""
