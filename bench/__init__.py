"""Benchmarks, run from a checkout: ``python -m bench.peak``, ``stored``, ``gradients`` and

    step            peak, stored bytes and step time of six models beside all that torch has to save memory
    compile_time    cold compile time, and where it goes (compile_phases.csv)
    sensitivity     predicted against measured noise, tensor by tensor
    allocation      bits by sensitivity, uniform and by GACT's rule, at equal bytes
    profile_cost    time and peak of the step that is probed
    targets         whether memory= and noise= are met
    kernels         codecs beside a copy, alone and compiled with their neighbours
    training        models trained with exact and with compressed activations

Each prints a table and appends its rows to ``bench/results/NAME.csv``. On a machine with a GPU, ``bench/gpu.sh`` runs
them in parts.
"""
