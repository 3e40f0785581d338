"""Triton kernels, one file per stage; `stages.py` is the whole backend, with the functions that `pytorch.py` has.

`experts_fwd`, `experts_bwd` and `score` are grouped GEMMs (`grouped.py`), whose tiles are in `tiles.py` and
`tile_file.py`; `launch.py` is what every launcher needs. Importing the folder imports no Triton.
"""
