#!/usr/bin/env bash
# Runs the GPU tests, the demo or a benchmark on a CUDA machine, from this checkout, with the Python and the torch that
# are installed there: nothing is downloaded and nothing installed.
#
#   bench/gpu.sh tests|demo|kernels|peak|step|compile_time|stored [options of that part]
#
# Each part takes less than 9 minutes; the benchmarks append every row to bench/results/ as soon as it is measured, so
# a part that was cut short can be repeated for what is missing (--layers, --variants; kernels: --parts, --dtypes,
# --bits; "kernels --parts weight_grad --ship" extends the package's table of weight gradients). step finds that out
# itself: repeat it, or some of it (--models, --sizes, --batches, --variants), until it leaves nothing out for lack of
# time. PYTHON names the interpreter, OUT a folder for the demo's output and copies of the results.
set -euo pipefail

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/demo-gpu}
part=${1:-}
case $part in
tests | demo | kernels | peak | step | compile_time | stored) shift ;;
*) usage ;;
esac

# The installed layout out of links, metadata with the entry point of torch.compile(backend="act") included.
site=$(mktemp -d)
mkdir -p "$out"
# What was measured is copied even when the run is cut short.
finish() {
    case $part in tests | demo) ;; *) cp "$root"/bench/results/* "$root/triton_kernels/weight_grad_times.csv" "$out/" ;; esac
    rm -rf "$site"
}
trap finish EXIT
mkdir "$site/actcompile" "$site/actcompile-0.dist-info"
ln -s "$root"/actcompile/*.py "$root/passes" "$root/triton_kernels" "$site/actcompile/"
ln -s "$root/bench" "$root/tests" "$root/examples" "$root/setup.cfg" "$site/"
printf 'Metadata-Version: 2.1\nName: actcompile\nVersion: 0\n' >"$site/actcompile-0.dist-info/METADATA"
printf '[torch_dynamo_backends]\nact = actcompile.backend:act\n' >"$site/actcompile-0.dist-info/entry_points.txt"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$site"

"$python" - <<'EOF'
import importlib.util
import torch

missing = [name for name in ("tabulate", "scipy", "sympy", "triton", "transformers", "matplotlib") if importlib.util.find_spec(name) is None]
print(f"torch {torch.__version__}, device {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
if missing:
    print(f"missing packages: {', '.join(missing)}")
EOF

case $part in
tests) "$python" -m pytest -m gpu tests "$@" ;;
demo) "$python" -m actcompile demo --out "$out/demo" "$@" ;;
kernels | peak | step | compile_time | stored)
    if [ "$part" = step ]; then
        set -- --within-s 330 --limit-s 180 "$@"
    fi
    "$python" -m "bench.$part" "$@"
    ;;
esac
