#!/usr/bin/env bash
# Power mode and clocks of a Jetson, with the way back: power.sh show | set [--mode M] [--clocks] [--reboot] | restore.
# The work is done by orin_kit/doctor/power.py; docs/jetson.md explains it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in /opt/orin-kit/bin/python "$here/../.venv/bin/python"; do
    if [[ -x $python ]]; then
        exec "$python" -m orin_kit.doctor.power "$@"
    fi
done
echo "power.sh: orin-kit is not installed here: run jetson/install.sh" >&2
exit 2
