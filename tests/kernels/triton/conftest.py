"""Triton's interpreter runs the kernels here: it must be asked for before the first of them is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
