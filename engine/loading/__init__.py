"""From a checkpoint's tensors to packed weights in memory, once per host.

    layout.py       which weight lies where (pure)
    pack.py         a checkpoint's rows -> panels, piece by piece
    packed_file.py  the file that all workers of a host map: make, verify, map
    region.py       packed weights in memory: that file, or private memory where there can be none

Here belongs what happens to weights before the first step. What they mean is said in `engine/models`, how files of
others are read in `modelfiles`.
"""
