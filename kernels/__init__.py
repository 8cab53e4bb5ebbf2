"""Triton kernels, a file for an op or a stage of one. Installed as ``diffusion_runtime.kernels``, and imported so only.

Nothing here imports the rest of ``diffusion_runtime``: a kernel file needs torch, triton and its neighbours, no more.
This file imports nothing and does nothing. transformers probes any module named ``kernels`` that it finds on the path,
and finds this one when it is started in the repository's root.

Every kernel file has ``ahead_of_time()``, which lists what ``tests/compile/compile_triton.py`` compiles for GPUs on a
machine that has none; the convention is written there.
"""
