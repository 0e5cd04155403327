"""Benchmarks, run from a checkout: ``python -m bench.peak``, ``step``, ``stored``, ``gradients``, ``sensitivity``.

Each prints a table and appends its rows to ``bench/results/NAME.csv``. On a machine with a GPU, ``bench/gpu.sh`` runs
them in parts.
"""
