"""The CPU kernels in C++: source, build, and the calls across the border.

Here belong machine code and what compiles, loads and calls it. What an operation means is said by its plain-torch
reference in `engine/kernels/<op>/reference.py`; its shapes are checked in `native.py`.
"""
