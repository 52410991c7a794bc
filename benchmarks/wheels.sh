#!/usr/bin/env bash
# Fetches what benchmarks/gpu.py needs on a Linux machine with a GPU, without a network, and with older libraries:
#
#     benchmarks/wheels.sh FOLDER [PYTHON]        # here, with the package installed; PYTHON of the other machine, as 3.12
#     FOLDER/run.sh                               # there; writes gpu.json beside itself
#
# It takes the versions that are installed here, and all that they need but PyTorch, which takes gigabytes with CUDA: the
# other machine has to have its own, 2.13 or later (attention of variable length knows no grouped heads before 2.12).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 1; }
mkdir -p "$1/wheels"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
${PYTHON_HERE:-python} - > "$folder/wheels.txt" <<'END'
from importlib.metadata import requires, version
from packaging.requirements import Requirement

known, waiting = {}, ["bco-lightning"]
while waiting:
    for text in requires(waiting.pop()) or []:
        needed = Requirement(text)
        if needed.name in ("torch", *known) or not (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            continue
        known[needed.name] = version(needed.name)
        waiting.append(needed.name)
print("\n".join(f"{name}=={known[name]}" for name in sorted(known)))
END
${PYTHON_HERE:-python} -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels" \
    --requirement "$folder/wheels.txt" ${2:+--python-version "$2"}
git -C "$here" archive --output "$folder/package.tar" HEAD src tests benchmarks
cat > "$folder/run.sh" <<'END'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
[ -d env ] || python3 -m venv --system-site-packages env
env/bin/pip install --quiet --no-index --no-deps wheels/*.whl
tar -xf package.tar
exec env/bin/python benchmarks/gpu.py --output gpu.json "$@"
END
chmod +x "$folder/run.sh"
du -sh "$folder"
