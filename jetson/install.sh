#!/usr/bin/env bash
# Sets a Jetson with JetPack 6.2 or 7.2 up for orin-kit: system packages, a Python environment in /opt/orin-kit, the
# TensorRT plugins, and a systemd unit that is left off. What is there already is left alone, so it can be run again.
#
#   sudo jetson/install.sh            do it
#   jetson/install.sh --check         say what is there and what would be done; exit code 1 when something would be
#
# --prefix DIR   the Python environment               --no-service   no systemd unit (containers)
# --jetpack V    6.2 or 7.2, where no file tells it (containers)
# --root DIR     with --check only: look at a copy of a machine's files
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=/opt/orin-kit root="" jetpack="" check=false service=true todo=0

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --check) check=true ;;
        --no-service) service=false ;;
        --prefix | --jetpack | --root)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        *) fail "unknown option $1: see the top of this file" ;;
    esac
    shift
done
[[ -z $root ]] || $check || fail "--root goes with --check only"
$check || ((EUID == 0)) || fail "installing needs root: put sudo before it, or add --check"

# step NAME DONE COMMAND...: says that a step is done, or would be, or runs it.
step() {
    local name=$1 is_done=$2
    shift 2
    if $is_done; then
        echo "ok    $name"
    elif $check; then
        echo "todo  $name"
        todo=$((todo + 1))
    else
        echo "doing $name"
        "$@"
    fi
}

# L4T R36.4.3 -> JetPack 6.2, R39.2 -> 7.2, and the later ones of their lines (orin_kit/doctor/jetpack.py says the same).
detect_jetpack() {
    local release=$root/etc/nv_tegra_release l4t
    [[ -r $release ]] || fail "no $release: this is no Jetson; in a container give --jetpack"
    l4t=$(sed -nE '1s/^# R([0-9]+) \(release\), REVISION: ([0-9]+(\.[0-9]+)*).*/\1.\2/p' "$release")
    local major minor patch
    IFS=. read -r major minor patch <<<"$l4t"
    if ((${major:-0} == 36 && (minor > 4 || (minor == 4 && ${patch:-0} >= 3)))); then
        jetpack=6.2
    elif ((${major:-0} == 39 && minor >= 2)); then
        jetpack=7.2
    else
        fail "L4T R${l4t:-?} is neither JetPack 6.2 nor 7.2: flash one of them"
    fi
}

[[ -n $jetpack ]] || detect_jetpack
case $jetpack in
    6.2) cuda=12-6 tensorrt=10.3 ;;
    7.2) cuda=13-2 tensorrt=10.16 ;;
    *) fail "JetPack $jetpack is not one of 6.2 and 7.2" ;;
esac
echo "ok    JetPack $jetpack"

# TensorRT at JetPack's own version: other repositories (NVIDIA's for servers) offer newer ones that do not fit.
plain=(build-essential cmake python3-venv python3-dev "cuda-nvcc-$cuda" "cuda-cudart-dev-$cuda"
    "cuda-driver-dev-$cuda" "cuda-profiler-api-$cuda" "libcurand-dev-$cuda") # the last three: to build pycuda
pinned=(libnvinfer10 libnvinfer-plugin10 libnvonnxparsers10 libnvinfer-dev libnvinfer-headers-plugin-dev
    libnvinfer-plugin-dev libnvonnxparsers-dev libnvinfer-bin python3-libnvinfer)
missing=()

installed() { # PACKAGE [VERSION PREFIX]
    local said
    said=$(dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null) || return 1
    [[ $said == "installed ${2:-}"* ]]
}

for package in "${plain[@]}"; do
    installed "$package" || missing+=("$package")
done
for package in "${pinned[@]}"; do
    installed "$package" "$tensorrt." || missing+=("$package=$tensorrt.*")
done

install_packages() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-remove --no-install-recommends --allow-downgrades \
        "${missing[@]}"
}

step "system packages${missing[*]:+: ${missing[*]}}" "$([[ ${#missing[@]} -eq 0 ]] && echo true || echo false)" install_packages

# TensorRT's bindings are a package of the system's Python, so the environment must see the system's packages.
has_environment() {
    [[ -x $root$prefix/bin/python ]] &&
        grep -qs 'include-system-site-packages = true' "$root$prefix/pyvenv.cfg" && echo true || echo false
}

# By the version in pyproject.toml; a checkout that moved on within a version is installed again by removing the prefix.
has_orin_kit() {
    local wanted
    wanted=$(sed -nE 's/^version = "(.*)"/\1/p' "$repo/pyproject.toml")
    local packages="$root$prefix/lib/python3*/site-packages"
    compgen -G "$packages/orin_kit-$wanted.dist-info" >/dev/null && compgen -G "$packages/pycuda-*.dist-info" >/dev/null &&
        echo true || echo false
}

install_orin_kit() {
    # pycuda has no wheels: it is built for the CUDA whose nvcc comes first.
    PATH=/usr/local/cuda/bin:$PATH CUDA_ROOT=/usr/local/cuda \
        "$prefix/bin/python" -m pip install --quiet --constraint "$repo/constraints.txt" "${repo}[device,serve]" pycuda
}

step "Python environment in $prefix" "$(has_environment)" /usr/bin/python3 -m venv --system-site-packages "$prefix"
step "orin-kit in $prefix" "$(has_orin_kit)" install_orin_kit

install_plugins() {
    local build=$repo/jetson/plugins/build
    cmake -S "$repo/jetson/plugins" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=87 \
        -DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc
    cmake --build "$build" --parallel "$(nproc)"
    cmake --install "$build" --prefix "$prefix"
}

step "TensorRT plugins" "$([[ -f $root$prefix/lib/liborin_plugins.so ]] && echo true || echo false)" install_plugins

unit=/etc/systemd/system/orin-kit.service

install_service() {
    id orin-kit &>/dev/null || useradd --system --user-group --home-dir /var/lib/orin-kit --shell /usr/sbin/nologin orin-kit
    sed "s|/opt/orin-kit|$prefix|g" "$repo/jetson/orin-kit.service" >"$unit.new"
    mv "$unit.new" "$unit"
    systemctl daemon-reload
}

has_service() {
    [[ -f $root$unit ]] && sed "s|/opt/orin-kit|$prefix|g" "$repo/jetson/orin-kit.service" | cmp -s - "$root$unit" &&
        echo true || echo false
}

if $service; then
    step "systemd unit (left off: docs/jetson.md)" "$(has_service)" install_service
fi

if $check; then
    ((todo == 0)) || exit 1
elif $service; then
    "$prefix/bin/orin-kit" doctor || echo "install.sh: the lines above say what is left to do"
fi
