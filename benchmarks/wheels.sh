#!/usr/bin/env bash
# Fetches what benchmarks/gpu.py needs on a Linux machine with a GPU, without a network, and with older libraries:
#
#     benchmarks/wheels.sh FOLDER [PYTHON [NAME...]]   # here, with the package installed; PYTHON of the other machine, 3.12
#     FOLDER/run.sh                                    # there; writes gpu.json beside itself
#
# It takes the versions that are installed here, and all that they need but PyTorch, which takes gigabytes with CUDA: the
# other machine has to have its own, 2.11 or later. With NAMEs it takes these alone, for a machine that lacks no others:
# all together are some hundred MB. For TRL's KTO trainer beside ours it also takes TRL 1.16.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 1; }
mkdir -p "$1/wheels"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
${PYTHON_HERE:-python} - "${@:3}" > "$folder/wheels.txt" <<'END'
import sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement

known, waiting = {"trl": "1.16.0"}, ["bco-lightning"]
while waiting:
    for text in requires(waiting.pop()) or []:
        needed = Requirement(text)
        if needed.name in ("torch", *known) or not (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            continue
        known[needed.name] = version(needed.name)
        waiting.append(needed.name)
wanted = set(sys.argv[1:]) | {"trl"} if sys.argv[1:] else set(known)
if wanted - set(known):
    sys.exit(f"expected names of what the package needs, found {', '.join(sorted(wanted - set(known)))}.")
print("\n".join(f"{name}=={known[name]}" for name in sorted(wanted)))
END
${PYTHON_HERE:-python} -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels" \
    --requirement "$folder/wheels.txt" ${2:+--python-version "$2"}
git -C "$here" archive --output "$folder/package.tar" HEAD src tests benchmarks
cat > "$folder/run.sh" <<'END'
#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
# Beside what python3 has, wherever that lies, and before it.
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
tar -xf package.tar
PYTHONPATH="$PWD/site${PYTHONPATH:+:$PYTHONPATH}" exec python3 benchmarks/gpu.py --output gpu.json "$@"
END
chmod +x "$folder/run.sh"
du -sh "$folder"
