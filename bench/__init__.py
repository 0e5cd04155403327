"""Benchmarks, run from a checkout: ``python -m bench.peak``, ``step``, ``stored``, ``gradients`` and

    sensitivity     predicted against measured noise, tensor by tensor
    allocation      bits by sensitivity, uniform and by GACT's rule, at equal bytes
    profile_cost    time and peak of the step that is probed
    targets         whether memory= and noise= are met
    kernels         codecs beside a copy, alone and compiled with their neighbours
    training        models trained with exact and with compressed activations

Each prints a table and appends its rows to ``bench/results/NAME.csv``. On a machine with a GPU, ``bench/gpu.sh`` runs
them in parts.
"""
